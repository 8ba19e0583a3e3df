//! Checks of the booted disk before another disk is erased: can it be copied?

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, bail};

use crate::base::fault::{Code, Fault};
use crate::base::program;
use crate::base::refusal::refused;
use crate::base::types::{DiskName, Role};
use crate::boot::files::BootFiles;
use crate::boot::{older, roots};
use crate::clone::drivers;
use crate::clone::join::{self, SharedRoot};
use crate::clone::plan::DiskPlan;
use crate::clone::target::Target;
use crate::names::ident::Rewriter;
use crate::names::ids::DiskIds;
use crate::names::{crypttab, files, fstab};
use crate::pair::machine::Machine;
use crate::proof::searched::Searched;
use crate::proof::{images, prove, waits};
use crate::write::below::Below;

/// Checks that every program that a clone runs is installed, while there is nothing to undo yet.
pub(super) fn check_programs(plan: &DiskPlan) -> Result<()> {
    let mkfs = plan.parts.iter().filter_map(|part| part.mkfs("", 512)).map(|(program, _)| program);
    let is_btrfs = plan.parts.iter().any(|part| part.content.name() == "btrfs");
    let is_luks = plan.parts.iter().any(|part| part.container.is_some());
    for name in mkfs
        .chain(is_luks.then(|| "cryptsetup".to_owned()))
        .chain(is_btrfs.then(|| "btrfs".to_owned()))
        .chain(["wipefs", "sfdisk", "udevadm", "rsync", "fsck.fat", "systemctl"].map(str::to_owned))
    {
        program::path(&name).map_err(|e| refused(format!("{e:#}; nothing was done")))?;
    }
    Ok(())
}

/// Reads a boot partition: its files, and the first reason why a copy of its images would not boot.
pub(super) fn scan_boot_partition(place: &Path, names: &Rewriter) -> Result<(BootFiles, Option<Fault>)> {
    let scan = || -> Result<_> {
        let found = BootFiles::scan(&Below::open(place)?)?;
        let faults = images::boot_partition(place, &found, names, &mut Searched::new(names)?)?;
        Ok((found, faults.into_iter().next()))
    };
    scan().with_context(|| place.display().to_string())
}

/// Checks that a copy of the booted disk would boot; where a disk is given, also that the initrds have its drivers.
pub(super) fn check_source(
    mut machine: Machine,
    name: DiskName,
    shared: Option<&SharedRoot>,
    disk: Option<&Target>,
) -> Result<()> {
    let new = machine.config.disks.iter().find(|disk| disk.name == name).context("the new disk has no section")?;
    if let Some(shared) = shared {
        shared.remove_own_names(&mut machine.ids);
    }
    // The same search as in the sync: for names of another disk.
    let names = machine.rewriter(new)?;
    let mut files = BTreeMap::new();
    for (role, _, dir) in machine.booted.boot_places() {
        let (found, fault) = scan_boot_partition(Path::new(dir.as_str()), &names)?;
        if let Some(fault) = fault {
            bail!("{dir}/{fault}; without the booted disk, a copy would not boot");
        }
        files.insert(role, found);
    }
    match shared {
        Some(_) => join::check(&machine, &names, &files)?,
        None => check_own_root(&machine, &names, &mut files)?,
    }
    disk.map_or(Ok(()), |disk| drivers::check(&machine, disk.kname(), &files))
}

/// Checks that the booted disk's root can be copied. Entries that boot another root aren't copied, and are removed from `files`.
fn check_own_root(machine: &Machine, names: &Rewriter, files: &mut BTreeMap<Role, BootFiles>) -> Result<()> {
    let crypttab = machine.root.read_opt("/etc/crypttab").context("/etc/crypttab can't be read")?.unwrap_or_default();
    if let Some(line) = crypttab::containers_opened_by_files(&crypttab, |spec| !names.foreign(spec).is_empty()).first() {
        bail!(
            "/etc/crypttab opens the LUKS container {line}, which would not open the copy's; write {} or none there",
            crypttab::KEY
        );
    }
    if let Some(fault) = prove::named_unit(&machine.root, names)? {
        bail!("{fault}");
    }
    if let Some(fault) = needed_but_not_cloned(machine)? {
        bail!("{fault}; that is not cloned");
    }
    let Some(running) = machine.subvolume()? else { return Ok(()) };
    if let Some(why) = roots::refuse_older_generation(&running, files) {
        bail!("on {}, {why}", machine.booted.name);
    }
    files.values_mut().for_each(|files| older::keep_own(files, &running));
    Ok(())
}

/// The first thing that a boot of the copy would wait for in vain, because it is on the booted disk and isn't cloned.
fn needed_but_not_cloned(machine: &Machine) -> Result<Option<Fault>> {
    let mut booted: Vec<DiskIds> = machine.ids.iter().filter(|ids| ids.name == machine.booted.name).cloned().collect();
    booted.iter_mut().for_each(|ids| ids.parts.retain(|role, _| !machine.booted.parts.contains_key(role)));
    let names = Rewriter::finder(&booted)?;
    let files = files::identifying_texts(&machine.root, &[])?;
    let fstab = files.get("/etc/fstab").map(Vec::as_slice).unwrap_or_default();
    let root = machine.root_names(&machine.booted)?;
    let names_root = |spec: &[u8]| root.as_ref().is_some_and(|root| !root.foreign(spec).is_empty());
    let subvolumes = fstab::missing_subvolumes(fstab, names_root, |_| false);
    let subvolumes = subvolumes.into_iter().map(|line| {
        Fault::new(Code::F14, format!("/etc/fstab would make the boot wait for a subvolume other than the root: {line}"))
            .on(&Role::Root)
            .at("/etc/fstab")
            .remedy("add nofail to the line, or let the disks share the root")
    });
    let on_disk = waits::on_booted_disk_only(&machine.root, &machine.inventory, &machine.booted, fstab)?;
    let found = prove::root_files(&files, &names, |dir| machine.belongs_to_other_disk(dir));
    Ok(found.into_iter().chain(subvolumes).chain(on_disk).next())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::fs;

    use super::*;
    use crate::base::root::Root;
    use crate::base::types::{DirPath, PartUuid};
    use crate::conf::Config;
    use crate::devices::inventory::Inventory;
    use crate::names::ids::PartIds;

    #[test]
    fn f14_a_device_that_the_boot_waits_for_is_cloned_or_refused() {
        let id = |n: u32| PartUuid::parse(&format!("aaaaaaaa-0000-4000-8000-{n:012}")).unwrap();
        let text = format!("[disk0]\nesp={}\nroot={}\n[disk1]\nesp={}\nroot={}\n", id(1), id(2), id(3), id(4));
        let config = Config::parse(&[("x".to_owned(), text.into_bytes())]).unwrap().unwrap();
        let part = |n, uuid: &str| PartIds { uuid: Some(uuid.to_owned()), ..PartIds::new(id(n)) };
        let parts = [(Role::Root, part(2, "of-root")), (Role::Dir(DirPath::parse("/dev/sda3").unwrap()), part(5, "of-tmp"))];
        let ids = vec![DiskIds { name: config.disks[0].name, parts: parts.into() }];
        let tmp = tempfile::tempdir().unwrap();
        fs::create_dir(tmp.path().join("etc")).unwrap();
        let booted = config.disks[0].clone();
        let inventory = Inventory::parse(br#"{"blockdevices":[]}"#, BTreeMap::new(), BTreeSet::new()).unwrap();
        let machine = Machine { root: Root::new(tmp.path()), config, booted, inventory, ids, loader: None, drafts: Vec::new() };
        for (line, expected) in [
            ("", None),
            ("UUID=of-tmp /tmp ext4 nofail", None),
            ("UUID=of-tmp /tmp ext4 defaults", Some("line 2 (/tmp) needs")),
            ("PARTUUID=aaaaaaaa-0000-4000-8000-000000000005 /tmp ext4", Some("line 2 (/tmp) needs")),
            ("UUID=of-root /home btrfs subvol=@home", Some("a subvolume other than the root: line 2 (/home)")),
            ("UUID=of-root /home btrfs subvol=@home,nofail", None),
            ("UUID=of-other /home btrfs subvol=@home", None),
        ] {
            fs::write(tmp.path().join("etc/fstab"), format!("UUID=of-root / ext4\n{line}\n")).unwrap();
            match (needed_but_not_cloned(&machine).unwrap(), expected) {
                (None, None) => {}
                (Some(fault), Some(expected)) if fault.code == Code::F14 && fault.text.contains(expected) => {}
                (found, _) => panic!("{line}: {found:?}"),
            }
        }
        fs::remove_file(tmp.path().join("etc/fstab")).unwrap();
        fs::create_dir_all(tmp.path().join("etc/systemd/system")).unwrap();
        for (options, expected) in [("defaults", true), ("nofail", false)] {
            let what = "/dev/disk/by-partuuid/aaaaaaaa-0000-4000-8000-000000000005";
            let text = format!("[Mount]\nWhat={what}\nWhere=/tmp\nOptions={options}\n");
            fs::write(tmp.path().join("etc/systemd/system/tmp.mount"), text).unwrap();
            let fault = needed_but_not_cloned(&machine).unwrap();
            assert_eq!(fault.is_some_and(|fault| fault.code == Code::F14), expected, "{options}");
        }
    }
}
