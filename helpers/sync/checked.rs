//! The first phase of a sync: checks that the spare may be written, and reads both disks. Nothing is written, except that a boot partition
//! that an interruption left damaged is repaired.

use anyhow::{Context, Result};

use crate::base::log::Log;
use crate::base::refusal::{refused, refused_for_age};
use crate::base::types::{DiskName, Role};
use crate::boot::bootable::Bootable;
use crate::boot::files::BootFiles;
use crate::boot::known::Known;
use crate::boot::{older, roots};
use crate::conf::Disk;
use crate::copy::{self, Copier, Request, Target};
use crate::devices::fsck;
use crate::names::fstab;
use crate::pair::lineage::{Record, own_record};
use crate::pair::machine::Machine;
use crate::pair::quiet::{self, Fingerprint};
use crate::sync::Options;
use crate::sync::spare::{BootContents, Parts, Spare};
use crate::write::below::{Below, FileKind};

/// A spare that may be written, and the content of both disks.
pub(crate) struct Checked<'a> {
    /// Dropped before the spare, in which it may hold files open: they would keep it writable.
    pub(crate) copier: Box<dyn Copier>,
    pub(crate) spare: Spare<'a>,
    /// The booted disk's ESP.
    pub(crate) esp: Below,
    /// The booted disk's record.
    pub(crate) own_record: Record,
    /// The spare's record; an empty one where it can't be read, and the user gives up the spare's changes.
    pub(crate) spare_record: Record,
    /// Whether no sync has ever written the spare.
    is_new: bool,
    /// Whether the user gives up the changes that only the spare has.
    discard: bool,
    /// The boot files that were ever on a booted disk. No other file is removed from the spare's boot partitions.
    pub(crate) known: Known,
    /// The fingerprint of the booted disk's boot directories before they were read.
    pub(crate) fingerprint: Fingerprint,
    /// The content of the booted disk's boot partitions.
    pub(crate) booted_boot_files: BootContents,
    /// The content of the spare's boot partitions.
    pub(crate) spare_boot_files: BootContents,
}

impl<'a> Checked<'a> {
    /// Mounts the spare read-only, reads both disks, and plans the copy of the trees.
    ///
    /// # Errors
    /// A refusal where the spare may have changes that the booted disk lacks, or doesn't match the configuration; a file that can't be read.
    pub(crate) fn check(
        machine: &'a Machine,
        disk: &'a Disk,
        parts: &Parts<'_>,
        options: &Options,
        log: &mut Log,
    ) -> Result<Self> {
        let mut spare = Spare::new(machine, disk, parts)?;
        if !options.dry_run {
            repair(disk.name, parts, log)?;
        }
        spare.hold(parts, |role| *role != Role::Swap)?;
        let (esp, own_record) = own_record(machine)?;
        let discard = options.discard.contains(&disk.name);
        let spare_record = load_spare_record(machine.booted.name, &spare, &own_record, discard)?;
        let is_new = spare_record.as_ref().is_some_and(Record::is_new);
        let known = Known::load(&machine.root)?;
        let fingerprint = quiet::fingerprint(&machine.boot_dirs())?;
        let mut booted_boot_files = spare.source()?;
        let spare_boot_files = spare.boot_files(booted_boot_files.keys())?;
        let mut copier = copy::choose(request(machine, disk)?, parts)?;
        if let Some(running) = copier.roots().running.clone() {
            if let Some(reason) = roots::refuse_older_generation(&running, &booted_boot_files) {
                return Err(refused(format!("on {}, {reason}", machine.booted.name)));
            }
            booted_boot_files.values_mut().for_each(|files| older::keep_own(files, &running));
        }
        copier.prepare()?;
        let booted = roots::booted_roots(&spare_boot_files);
        let target =
            Target { mounted: &spare.mounted, booted: &booted, is_new, files: &|generation| spare.rewritten(generation) };
        copier.decide(&target)?;
        warn_of_left_out_files(&spare, copier.as_ref(), log)?;
        Ok(Self {
            spare,
            copier,
            esp,
            own_record,
            spare_record: spare_record.unwrap_or_default(),
            is_new,
            discard,
            known,
            fingerprint,
            booted_boot_files,
            spare_boot_files,
        })
    }
}

/// Repairs the boot partitions that an interruption left damaged.
fn repair(name: DiskName, parts: &Parts<'_>, log: &Log) -> Result<()> {
    for part in parts.iter().filter(|(role, _)| role.is_boot()).map(|(_, part)| part) {
        if let Some(program) = fsck::repair(part)? {
            log.warning(&format!("{name}: {} was damaged by an interruption; {program} has repaired it", part.path));
        }
    }
    Ok(())
}

/// Loads the spare's record, and checks that the spare may be overwritten. None where the record can't be read, and the user gives up the
/// spare's changes.
fn load_spare_record(booted: DiskName, spare: &Spare<'_>, own_record: &Record, discard: bool) -> Result<Option<Record>> {
    let name = spare.disk.name;
    let record = Record::load(spare.mounted.below(&Role::Esp)?, name);
    if discard {
        return Ok(record.ok());
    }
    let record = record.map_err(|e| {
        refused_for_age(
            name,
            format!("{e:#}, so what is on {name} may be newer; to give it up, run 'dualroot-sync --discard-spare {name}'"),
        )
    })?;
    own_record.check(booted, name, &record)?;
    Ok(Some(record))
}

fn request(machine: &Machine, disk: &Disk) -> Result<Request> {
    Ok(Request {
        root: machine.root.clone(),
        running: machine.subvolume()?,
        roles: disk.parts.keys().filter(|role| role.tree().is_some()).cloned().collect(),
        exclude: machine.config.settings.exclude.clone(),
        generations: machine.config.settings.generations,
    })
}

/// Warns of files on the booted disk that are not copied.
fn warn_of_left_out_files(spare: &Spare<'_>, copier: &dyn Copier, log: &Log) -> Result<()> {
    let name = spare.disk.name;
    for path in copier.left_out()? {
        log.warning(&format!("{name}: {path} is a subvolume of its own; its files are not copied"));
    }
    if spare.machine.own_roots() {
        let fstab = spare.machine.root.read_opt("/etc/fstab").context("/etc/fstab")?.unwrap_or_default();
        for path in fstab::swap_files(&fstab) {
            log.warning(&format!(
                "{name}: {path} is a swap file; its copy on the spare is sparse, and the kernel refuses it. Use a swap partition on \
                 each disk (swap=)"
            ));
        }
    }
    Ok(())
}

impl Checked<'_> {
    /// Refuses a disk that no sync has written yet, but that has a menu entry or a file in a tree. A newly installed boot loader alone doesn't
    /// count.
    ///
    /// # Errors
    /// A refusal that names the file that was found.
    pub(crate) fn check_empty(&self) -> Result<()> {
        if !self.is_new || self.discard {
            return Ok(());
        }
        let name = self.spare.disk.name;
        if let Some((role, file)) = self.spare_boot_files.iter().find_map(|(role, files)| Some((role, first_to_boot(files)?))) {
            return Err(refused(format!(
                "{name} has no record of a sync, but its {role}= partition holds {file}, so it may be newer than the booted disk. \
                 Make a new file system, or correct the configuration, or give it up with 'dualroot-sync --discard-spare {name}'"
            )));
        }
        for role in self.copier.roles() {
            if let Some(content) = first_content(self.spare.mounted.below(role)?)? {
                return Err(refused(format!(
                    "{name} was never synced, but its {role}= partition is not empty (it has '{}'), and a sync would remove its files. \
                     Make a new file system, or correct the configuration, or give it up with 'dualroot-sync --discard-spare {name}'",
                    content.escape_debug()
                )));
            }
        }
        Ok(())
    }
}

/// The first of the files in a boot partition that boots a system.
fn first_to_boot(files: &BootFiles) -> Option<&str> {
    // An entry comes before an image, because its name tells a person more.
    let mut all: Vec<Bootable<'_>> = Bootable::all(&files.files).collect();
    all.sort_by_key(|bootable| !matches!(bootable, Bootable::Entry(_)));
    all.first().map(|bootable| bootable.file().path.as_str())
}

/// The first file or non-empty directory at the top of a file system; None on a new file system. Empty directories may be mount points.
fn first_content(below: &Below) -> Result<Option<String>> {
    for (name, kind) in below.list(".")? {
        if name != "lost+found" && (kind != FileKind::Dir || !below.list(&name)?.is_empty()) {
            return Ok(Some(name));
        }
    }
    Ok(None)
}

#[cfg(test)]
pub(crate) mod tests {
    use std::fs;

    use super::*;

    /// disk1, with nothing read and nothing mounted. `esp` is that of disk0, which is booted.
    pub(crate) fn checked(machine: &Machine, esp: Below, is_new: bool, discard: bool) -> Checked<'_> {
        let disk = machine.config.disks.get(1).unwrap();
        let parts = machine.inventory.disk(disk).unwrap();
        // The root of the machine that runs the tests doesn't matter.
        let request = Request { running: None, ..request(machine, disk).unwrap() };
        Checked {
            spare: Spare::new(machine, disk, &parts).unwrap(),
            copier: copy::choose(request, &parts).unwrap(),
            esp,
            own_record: Record::default(),
            spare_record: Record::default(),
            is_new,
            discard,
            known: Known::default(),
            fingerprint: quiet::fingerprint(&[]).unwrap(),
            booted_boot_files: BootContents::new(),
            spare_boot_files: BootContents::new(),
        }
    }

    #[test]
    fn f07_a_boot_loader_alone_is_nobodys_system() {
        let tmp = tempfile::tempdir().unwrap();
        let files = |paths: &[&str]| {
            for path in paths {
                let path = tmp.path().join(path);
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(path, "").unwrap();
            }
            BootFiles::scan(&Below::open(tmp.path()).unwrap()).unwrap()
        };
        let installed =
            files(&["EFI/systemd/systemd-bootx64.efi", "EFI/BOOT/BOOTX64.EFI", "loader/loader.conf", "loader/random-seed"]);
        assert_eq!(first_to_boot(&installed), None);
        assert_eq!(first_to_boot(&files(&["EFI/Linux/linux.efi"])), Some("EFI/Linux/linux.efi"));
        assert_eq!(first_to_boot(&files(&["loader/entries/a.conf"])), Some("loader/entries/a.conf"));
    }

    #[test]
    fn f01_only_a_new_file_system_is_empty() {
        let tmp = tempfile::tempdir().unwrap();
        let below = Below::open(tmp.path()).unwrap();
        for dir in ["lost+found", "lost+found/x", "boot", "efi"] {
            fs::create_dir(tmp.path().join(dir)).unwrap();
        }
        assert_eq!(first_content(&below).unwrap(), None);
        fs::create_dir_all(tmp.path().join("photos/2025")).unwrap();
        assert_eq!(first_content(&below).unwrap().as_deref(), Some("photos"));
        fs::remove_dir_all(tmp.path().join("photos")).unwrap();
        fs::write(tmp.path().join("letter"), "").unwrap();
        assert_eq!(first_content(&below).unwrap().as_deref(), Some("letter"));
    }
}
