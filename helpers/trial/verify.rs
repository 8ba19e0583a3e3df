//! Reading the spares' boot files again, from the medium, and holding them against what the last sync had read there.
//!
//! A spare is written and read by syncs, and then rests, for months if nothing changes. What its medium loses meanwhile is found here,
//! and not on the day when it is booted. Nothing is written to it.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use anyhow::{Context, Result};

use crate::base::clock::{date, now};
use crate::base::log::Log;
use crate::base::refusal::{Refused, refused};
use crate::base::types::Role;
use crate::conf::Disk;
use crate::devices::inventory::Partition;
use crate::pair::lineage::{Record, own_record};
use crate::pair::machine::Machine;
use crate::pair::status::{Proof, Reading, Standing, Status};
use crate::sync::spare::Spare;
use crate::write::below::{Below, Kind};

/// A file that is not what it should be.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Fault {
    /// Its path in the partition.
    pub path: String,
    /// What is wrong with it.
    pub what: What,
}

/// What can be wrong with a file.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum What {
    /// Other bytes.
    Differs,
    /// It isn't there.
    Missing,
    /// It can't be read, for this reason.
    Unreadable(String),
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = &self.path;
        match &self.what {
            What::Differs => write!(f, "{path} is not what the last sync read there"),
            What::Missing => write!(f, "{path} is missing"),
            What::Unreadable(why) => write!(f, "{path} can't be read: {why}"),
        }
    }
}

/// Reads the files of a list of hashes, in hexadecimal, and says which are something else. They come from where the handle reads.
pub fn compare(below: &Below, files: &BTreeMap<String, String>) -> Vec<Fault> {
    let look = |(path, hash): (&String, &String)| {
        let what = match below.hash(path) {
            Ok(Some(found)) if found.to_hex().as_str() == hash => return None,
            Ok(Some(_)) => What::Differs,
            Ok(None) => What::Missing,
            Err(e) => What::Unreadable(format!("{:#}", e.root_cause())),
        };
        Some(Fault { path: path.clone(), what })
    };
    files.iter().filter_map(look).collect()
}

/// Reads all that is below the handle, and says what can't be read.
pub fn unreadable(below: &Below) -> Vec<Fault> {
    const DEEPEST: usize = 16;
    let mut faults = Vec::new();
    let mut dirs = vec![".".to_owned()];
    while let Some(dir) = dirs.pop() {
        let fault = |path: &str, e: &anyhow::Error| Fault {
            path: path.to_owned(),
            what: What::Unreadable(format!("{:#}", e.root_cause())),
        };
        let names = below.list(&dir).unwrap_or_else(|e| {
            faults.push(fault(&dir, &e));
            Vec::new()
        });
        for (name, kind) in names {
            let path = if dir == "." { name } else { format!("{dir}/{name}") };
            match kind {
                Kind::Dir if path.split('/').count() < DEEPEST => dirs.push(path),
                // A file that is gone by now was none.
                Kind::File(_) => faults.extend(below.hash(&path).err().map(|e| fault(&path, &e))),
                Kind::Dir | Kind::Other => {}
            }
        }
    }
    faults.sort_by(|a, b| a.path.cmp(&b.path));
    faults
}

/// Reads every spare that is there, and the booted disk's own boot partitions, and notes what came of it. The caller holds the lock and
/// has entered a private mount namespace.
pub fn run(machine: &Machine, status: &mut Status, log: &Log) -> Standing {
    let mut standing = Standing::Whole;
    for (_, disk) in machine.config.spares(&machine.booted) {
        let read = match machine.inventory.disk(disk).map_err(|e| refused(format!("{e:#}"))) {
            Ok(parts) if parts.is_empty() => {
                log.warning(&format!("{} is not there, and was not read", disk.name));
                status.absent(disk);
                standing = standing.max(Standing::Absent);
                continue;
            }
            Ok(parts) => one(machine, disk, &parts, status, log),
            Err(e) => Err(e),
        };
        let faults = match read {
            Ok(faults) => faults,
            Err(e) if e.is::<Refused>() => {
                log.error(&format!("{} was not read: {e:#}", disk.name));
                standing = standing.max(Standing::Refused);
                continue;
            }
            Err(e) => vec![format!("{e:#}")],
        };
        for fault in &faults {
            log.error(&format!(
                "{}: {fault}; 'systemctl start dualroot-sync.service' writes it again, if the disk can still be written; watch the \
                 disk's SMART values (smartctl -a), and replace it if there is more of this",
                disk.name
            ));
        }
        if faults.is_empty() {
            log.info(&format!("{}: its boot files are what the last sync wrote", disk.name));
        } else {
            standing = Standing::Broken;
        }
        status.read(disk, faults);
    }
    let faults = own(machine);
    for fault in &faults {
        log.error(&format!(
            "{}, which is booted: {fault}; watch the disk's SMART values (smartctl -a), and replace it; the other disk can be booted by \
             'dualroot-sync --boot-next'",
            machine.booted.name
        ));
    }
    if !faults.is_empty() {
        standing = Standing::Broken;
    }
    status.own = Some(Reading { at: now(), faults });
    standing
}

/// What is wrong with a spare's boot files.
fn one(machine: &Machine, disk: &Disk, parts: &BTreeMap<Role, &Partition>, status: &Status, log: &Log) -> Result<Vec<String>> {
    let proof = status.of(disk.name).and_then(|seen| seen.proof.as_ref()).ok_or_else(|| {
        refused("there is nothing to compare its boot files with before a sync has ended well; start dualroot-sync.service")
    })?;
    let mut spare = Spare::new(machine, disk, parts)?;
    spare.hold(parts, Role::is_boot)?;
    let record = Record::load(spare.mounted.below(&Role::Esp)?, disk.name).map_err(|e| refused(format!("{e:#}")))?;
    let (_, own) = own_record(machine)?;
    // Booted since, it has changed its files itself.
    own.check(machine.booted.name, disk.name, &record)?;
    check_is_of(&record, proof)?;
    let mut faults = Vec::new();
    for (role, files) in &proof.files {
        let part = parts.get(role).map_or("", |part| part.path.as_str());
        log.status(&format!("{}: reading {} files of its {role}=", disk.name, files.len()));
        let found = compare(spare.mounted.below(role)?, files);
        faults.extend(found.into_iter().map(|fault| format!("{role} ({part}): {fault}")));
    }
    spare.mounted.release()?;
    Ok(faults)
}

/// What was read then is what the spare was left with.
fn check_is_of(record: &Record, proof: &Proof) -> Result<()> {
    if record.last_synced() == proof.synced {
        return Ok(());
    }
    let last = record.last_synced().map_or_else(
        || "says of no sync".to_owned(),
        |(disk, at)| format!("says that it was synced from {disk} at {}", date(at)),
    );
    Err(refused(format!(
        "its own record {last}, and this disk remembers another state of it, of {}; start dualroot-sync.service",
        date(proof.at)
    )))
}

/// What of the booted disk's boot files can't be read. What they hold is up to whoever installs kernels.
fn own(machine: &Machine) -> Vec<String> {
    let mut faults = Vec::new();
    for (role, _, dir) in machine.booted.boot_places() {
        match Below::open(Path::new(dir.as_str())).context("it can't be read") {
            Ok(below) => {
                faults.extend(unreadable(&below.from_medium()).into_iter().map(|fault| format!("{role} ({dir}): {fault}")))
            }
            Err(e) => faults.push(format!("{role} ({dir}): {e:#}")),
        }
    }
    faults
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;
    use std::fs;
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::base::types::DiskName;
    use crate::boot::files::BootFiles;
    use crate::write::change::{Change, Content};

    fn hashes(below: &Below) -> BTreeMap<String, String> {
        let found = BootFiles::scan(below).unwrap();
        found.files.values().map(|file| (file.path.clone(), file.hash.to_hex().to_string())).collect()
    }

    #[test]
    fn what_changes_on_the_medium_is_found_below_what_the_kernel_remembers() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let (image, tmp) = (tempfile::NamedTempFile::new().unwrap(), tempfile::tempdir().unwrap());
        image.as_file().set_len(8 << 20).unwrap();
        let run = |name: &str, args: &[&OsStr]| {
            let done = crate::base::program::command(name).unwrap().args(args).output().unwrap();
            assert!(done.status.success(), "{name}: {}", String::from_utf8_lossy(&done.stderr));
        };
        let [first, second] = ["first", "second"].map(|name| tmp.path().join(name));
        fs::create_dir(&first).unwrap();
        fs::create_dir(&second).unwrap();
        run("mke2fs", &["-qF".as_ref(), "-text4".as_ref(), image.path().as_ref()]);
        crate::devices::held::enter_private_namespace().unwrap();
        run("mount", &["-oloop".as_ref(), image.path().as_ref(), first.as_ref()]);
        let linux = [b'k'; 70_000];
        let below = Below::open(&first).unwrap();
        for (path, bytes) in [("linux", &linux[..]), ("a.conf", b"title a")] {
            below.apply(&Change::Create { path: path.into(), content: Content::Bytes(bytes.to_vec()) }).unwrap();
        }
        below.apply(&Change::Barrier).unwrap();
        drop(below);
        // At rest, and seen by everybody, as a spare is.
        run("mount", &["-oremount,ro".as_ref(), first.as_ref()]);
        run("mount", &["--bind".as_ref(), first.as_ref(), second.as_ref()]);
        let (everybody, medium) = (Below::open(&first).unwrap(), Below::open(&second).unwrap().from_medium());
        let files = hashes(&everybody);
        assert_eq!(compare(&medium, &files), []);
        let on_medium = fs::read(image.path()).unwrap();
        let at = on_medium.windows(linux.len()).position(|part| part == linux).unwrap() + 40_000;
        image.as_file().write_all_at(b"K", at as u64).unwrap();
        assert_eq!(fs::read(first.join("linux")).unwrap(), linux, "it is remembered");
        assert_eq!(compare(&everybody, &files), [], "and nobody would know");
        assert_eq!(compare(&medium, &files), [Fault { path: "linux".into(), what: What::Differs }]);
        assert_eq!(unreadable(&medium), []);
        // The medium ends before that: a loop device gives EIO.
        image.as_file().set_len((at as u64 - 30_000) & !4095).unwrap();
        let found = unreadable(&medium);
        let why = What::Unreadable("Input/output error (os error 5)".into());
        assert!(found.contains(&Fault { path: "linux".into(), what: why.clone() }), "{found:?}");
        assert!(compare(&medium, &files).contains(&Fault { path: "linux".into(), what: why }));
        drop((everybody, medium));
        run("umount", &[second.as_ref()]);
        run("umount", &[first.as_ref()]);
    }

    #[test]
    fn each_file_that_is_not_what_it_was_is_named() {
        let tmp = tempfile::tempdir().unwrap();
        fs::create_dir_all(tmp.path().join("loader/entries")).unwrap();
        for path in ["linux", "initrd", "loader/entries/a.conf", "gone", "strange"] {
            fs::write(tmp.path().join(path), path).unwrap();
        }
        let below = Below::open(tmp.path()).unwrap();
        let files = hashes(&below);
        fs::write(tmp.path().join("new"), "of nobody's concern").unwrap();
        assert_eq!(compare(&below, &files), []);
        fs::write(tmp.path().join("initrd"), "Initrd").unwrap();
        fs::remove_file(tmp.path().join("gone")).unwrap();
        fs::remove_file(tmp.path().join("strange")).unwrap();
        fs::create_dir(tmp.path().join("strange")).unwrap();
        let told: Vec<String> = compare(&below, &files).iter().map(ToString::to_string).collect();
        assert_eq!(told.len(), 3, "{told:?}");
        assert_eq!(&told[..2], ["gone is missing", "initrd is not what the last sync read there"]);
        assert!(told[2].starts_with("strange can't be read: "), "{told:?}");
    }

    #[test]
    fn another_sync_is_another_state() {
        let [first, second] = [0, 1].map(|n| DiskName::parse(&format!("disk{n}")).unwrap());
        let proof = |synced| Proof { at: 1_793_491_200, synced, files: BTreeMap::new() };
        let (mut own, mut record) = (Record::default(), Record::default());
        check_is_of(&record, &proof(None)).unwrap();
        own.synced(first, second, &mut record);
        check_is_of(&record, &proof(record.last_synced())).unwrap();
        let error = check_is_of(&record, &proof(Some((first, 7)))).unwrap_err();
        assert!(error.is::<Refused>());
        let error = error.to_string();
        assert!(error.contains("synced from disk0 at ") && error.contains("of 2026-11-01 00:00:00 UTC; start"), "{error}");
    }
}
