//! Reading the spares' boot files again from the medium, and comparing them with the hashes of the last sync.
//!
//! After a sync, a spare may rest for months if nothing changes. This finds damage on its medium before the day when it is booted. Nothing is
//! written to it.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};

use crate::base::clock::{date, now};
use crate::base::fault::{Code, Fault};
use crate::base::log::{Event, Log, Subject};
use crate::base::refusal::{Refused, refused};
use crate::base::types::Role;
use crate::conf::Disk;
use crate::devices::inventory::Partition;
use crate::pair::lineage::{Record, own_record};
use crate::pair::machine::Machine;
use crate::pair::status::{Proof, Reading, Standing, Status};
use crate::sync::spare::Spare;
use crate::write::below::{Below, FileKind};

/// Reads the files of a list of hashes, in hexadecimal, and returns those that differ. The handle decides whether they come from the medium.
pub fn compare(below: &Below, files: &BTreeMap<String, String>) -> Vec<Fault> {
    let check = |(path, hash): (&String, &String)| match below.hash(path) {
        Ok(Some(found)) if found.to_hex().as_str() == hash => None,
        Ok(Some(_)) => Some(Fault::new(Code::F37, format!("{path} is not what the last sync read there")).at(path)),
        Ok(None) => Some(Fault::new(Code::F10, format!("{path} is missing")).at(path)),
        Err(e) => Some(is_unreadable(path, &e)),
    };
    files.iter().filter_map(check).collect()
}

fn is_unreadable(path: &str, error: &anyhow::Error) -> Fault {
    Fault::new(Code::F20, format!("{path} can't be read: {:#}", error.root_cause())).at(path)
}

/// Reads all files below the handle, and returns those that can't be read.
pub fn unreadable(below: &Below) -> Vec<Fault> {
    const DEEPEST: usize = 16;
    let mut faults = Vec::new();
    let mut dirs = vec![".".to_owned()];
    while let Some(dir) = dirs.pop() {
        let names = below.list(&dir).unwrap_or_else(|e| {
            faults.push(is_unreadable(&dir, &e));
            Vec::new()
        });
        for (name, kind) in names {
            let path = if dir == "." { name } else { format!("{dir}/{name}") };
            match kind {
                FileKind::Dir if path.split('/').count() < DEEPEST => dirs.push(path),
                // A file that was deleted meanwhile is no fault.
                FileKind::File(_) => faults.extend(below.hash(&path).err().map(|e| is_unreadable(&path, &e))),
                FileKind::Dir | FileKind::Other => {}
            }
        }
    }
    faults.sort_by(|a, b| a.path.cmp(&b.path));
    faults
}

/// The faults of a partition, each with the partition in front.
fn placed(faults: Vec<Fault>, role: &Role, place: &str) -> impl Iterator<Item = Fault> {
    faults.into_iter().map(move |fault| Fault { text: format!("{role} ({place}): {}", fault.text), ..fault.on(role) })
}

/// Reads every spare that is there, and the booted disk's own boot partitions, and records the result in the status. The caller holds the lock
/// and has entered a private mount namespace.
pub fn run(machine: &Machine, status: &mut Status, log: &Log) -> Standing {
    let mut standing = Standing::Whole;
    for (_, disk) in machine.config.spares(&machine.booted) {
        let read = match machine.inventory.disk(disk).map_err(|e| refused(format!("{e:#}"))) {
            Ok(parts) if parts.is_empty() => {
                let fault = Fault::new(Code::F21, format!("{} is missing, and was not read", disk.name)).of(disk.name);
                log.warning_about(&Subject::event(Event::SpareMissing, &fault), &fault.text);
                status.absent(disk);
                standing = standing.max(Standing::Absent);
                continue;
            }
            Ok(parts) => verify_spare(machine, disk, &parts, status, log),
            Err(e) => Err(e),
        };
        let faults = match read {
            Ok(faults) => faults,
            Err(e) if e.is::<Refused>() => {
                log.failure(&e.context(format!("{} was not read", disk.name)));
                standing = standing.max(Standing::Refused);
                continue;
            }
            Err(e) => vec![Fault::new(Code::F20, format!("{e:#}")).of(disk.name)],
        };
        for fault in &faults {
            let text = format!(
                "{}: {fault}; 'systemctl start dualroot-sync.service' writes it again, if the disk can still be written; watch the \
                 disk's SMART values (smartctl -a), and replace the disk if this happens again",
                disk.name
            );
            log.error_about(&Subject::event(Event::WouldNotBoot, fault), &text);
        }
        if faults.is_empty() {
            log.info(&format!("{}: its boot files are as the last sync wrote them", disk.name));
        } else {
            standing = Standing::Broken;
        }
        status.read(disk, faults);
    }
    let faults = verify_booted(machine);
    for fault in &faults {
        let text = format!(
            "{}, which is booted: {fault}; watch the disk's SMART values (smartctl -a), and replace the disk; 'dualroot-sync --boot-next' \
             makes the firmware boot another one",
            machine.booted.name
        );
        log.error_about(&Subject::fault(fault), &text);
    }
    if !faults.is_empty() {
        standing = Standing::Broken;
    }
    status.own = Some(Reading { at: now(), faults });
    standing
}

/// The faults of a spare's boot files.
fn verify_spare(
    machine: &Machine,
    disk: &Disk,
    parts: &BTreeMap<Role, &Partition>,
    status: &Status,
    log: &Log,
) -> Result<Vec<Fault>> {
    let proof = status.of(disk.name).and_then(|seen| seen.proof.as_ref()).ok_or_else(|| {
        refused("no sync of it has ended well yet, so there are no hashes to compare its boot files with; start dualroot-sync.service")
    })?;
    let mut spare = Spare::new(machine, disk, parts)?;
    spare.hold(parts, Role::is_boot)?;
    let record = Record::load(spare.mounted.below(&Role::Esp)?, disk.name).map_err(|e| refused(format!("{e:#}")))?;
    let (_, own) = own_record(machine)?;
    // A spare that was booted since has changed its files itself.
    own.check(machine.booted.name, disk.name, &record)?;
    check_proof(&record, proof)?;
    let mut faults = Vec::new();
    for (role, files) in &proof.files {
        let part = parts.get(role).map_or("", |part| part.path.as_str());
        log.status(&format!("{}: reading {} files of its {role}=", disk.name, files.len()));
        let found = compare(spare.mounted.below(role)?, files);
        faults.extend(placed(found, role, part).map(|fault| fault.of(disk.name)));
    }
    spare.mounted.release()?;
    Ok(faults)
}

/// Checks that the proof is of the last sync that wrote the spare.
fn check_proof(record: &Record, proof: &Proof) -> Result<()> {
    if record.last_synced() == proof.synced {
        return Ok(());
    }
    let last = record
        .last_synced()
        .map_or_else(|| "has no sync".to_owned(), |(disk, at)| format!("says that it was synced from {disk} at {}", date(at)));
    Err(refused(format!(
        "its own record {last}, but the hashes on this disk are from another sync, of {}; start dualroot-sync.service",
        date(proof.at)
    )))
}

/// The booted disk's boot files that can't be read. Their contents may change at any time, when a kernel is installed.
fn verify_booted(machine: &Machine) -> Vec<Fault> {
    let mut faults = Vec::new();
    for (role, _, dir) in machine.booted.boot_places() {
        match Below::open(Path::new(dir.as_str())).context("it can't be read") {
            Ok(below) => faults.extend(placed(unreadable(&below.from_medium()), &role, dir.as_str())),
            Err(e) => faults.push(Fault::new(Code::F20, format!("{role} ({dir}): {e:#}")).on(&role)),
        }
    }
    faults.into_iter().map(|fault| fault.of(machine.booted.name)).collect()
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::base::types::DiskName;
    use crate::boot::files::BootFiles;
    use crate::devices::scratch::{self, Mounted, Scratch};

    fn hashes(below: &Below) -> BTreeMap<String, String> {
        let found = BootFiles::scan(below).unwrap();
        found.files.values().map(|file| (file.path.clone(), file.hash.to_hex().to_string())).collect()
    }

    #[test]
    fn changes_on_the_medium_are_found_despite_the_cache() {
        let linux = [b'k'; 70_000];
        let spare = tempfile::tempdir().unwrap();
        for (path, bytes) in [("linux", &linux[..]), ("a.conf", b"title a")] {
            fs::write(spare.path().join(path), bytes).unwrap();
        }
        // Read-only and visible to all processes, as a spare is.
        let from = spare.path().to_str().unwrap();
        let Some(disk) = Scratch::ext4(&["-d", from]).map(|disk| disk.mount("ro")) else { return };
        let (first, second) = (disk.place(), tempfile::tempdir().unwrap());
        scratch::run("mount", &["--bind".as_ref(), first.as_os_str(), second.path().as_os_str()]);
        let _mounted = Mounted::at(second.path());
        let image = fs::File::options().write(true).open(disk.image()).unwrap();
        let (everybody, medium) = (Below::open(&first).unwrap(), Below::open(second.path()).unwrap().from_medium());
        let files = hashes(&everybody);
        assert_eq!(compare(&medium, &files), []);
        let on_medium = fs::read(disk.image()).unwrap();
        let at = on_medium.windows(linux.len()).position(|part| part == linux).unwrap() + 40_000;
        image.write_all_at(b"K", at as u64).unwrap();
        assert_eq!(fs::read(first.join("linux")).unwrap(), linux, "it is cached");
        assert_eq!(compare(&everybody, &files), [], "and the damage is not seen");
        let is = |faults: &[Fault], code: Code| faults.iter().any(|f| f.code == code && f.path.as_deref() == Some("linux"));
        let differs = compare(&medium, &files);
        assert!(differs.len() == 1 && is(&differs, Code::F37), "{differs:?}");
        assert_eq!(unreadable(&medium), []);
        // The medium ends before that file: a loop device gives EIO.
        image.set_len((at as u64 - 30_000) & !4095).unwrap();
        let found = unreadable(&medium);
        assert!(is(&found, Code::F20), "{found:?}");
        assert!(is(&compare(&medium, &files), Code::F20));
    }

    #[test]
    fn each_damaged_file_is_named() {
        let tmp = tempfile::tempdir().unwrap();
        fs::create_dir_all(tmp.path().join("loader/entries")).unwrap();
        for path in ["linux", "initrd", "loader/entries/a.conf", "gone", "strange"] {
            fs::write(tmp.path().join(path), path).unwrap();
        }
        let below = Below::open(tmp.path()).unwrap();
        let files = hashes(&below);
        fs::write(tmp.path().join("new"), "not in the list").unwrap();
        assert_eq!(compare(&below, &files), []);
        fs::write(tmp.path().join("initrd"), "Initrd").unwrap();
        fs::remove_file(tmp.path().join("gone")).unwrap();
        fs::remove_file(tmp.path().join("strange")).unwrap();
        fs::create_dir(tmp.path().join("strange")).unwrap();
        let found: Vec<_> = compare(&below, &files).into_iter().map(|fault| (fault.code, fault.path.unwrap())).collect();
        let expected = [(Code::F10, "gone"), (Code::F37, "initrd"), (Code::F20, "strange")];
        assert_eq!(found, expected.map(|(code, path)| (code, path.to_owned())));
    }

    #[test]
    fn hashes_of_another_sync_are_refused() {
        let [first, second] = [0, 1].map(|n| DiskName::parse(&format!("disk{n}")).unwrap());
        let proof = |synced| Proof { at: 1_793_491_200, synced, files: BTreeMap::new() };
        let (mut own, mut record) = (Record::default(), Record::default());
        check_proof(&record, &proof(None)).unwrap();
        own.synced(first, second, &mut record);
        check_proof(&record, &proof(record.last_synced())).unwrap();
        let error = check_proof(&record, &proof(Some((first, 7)))).unwrap_err();
        assert!(error.is::<Refused>());
        let error = error.to_string();
        assert!(error.contains("synced from disk0 at ") && error.contains("of 2026-11-01 00:00:00 UTC; start"), "{error}");
    }
}
