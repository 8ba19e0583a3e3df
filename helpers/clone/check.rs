//! Whether the booted disk can be copied, as far as that can be seen before a disk is erased.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, bail};

use crate::base::program;
use crate::base::refusal::refused;
use crate::base::types::{DiskName, Role};
use crate::boot::files::BootFiles;
use crate::boot::{offers, roots};
use crate::clone::drivers;
use crate::clone::join::{self, Shared};
use crate::clone::plan::Plan;
use crate::clone::target::Target;
use crate::names::ident::Rewriter;
use crate::names::ids::DiskIds;
use crate::names::{crypttab, files, fstab};
use crate::pair::machine::Machine;
use crate::proof::searched::Searched;
use crate::proof::{images, prove, waits};
use crate::write::below::Below;

/// Whether every program is there, before something needs to be undone for lack of one.
pub(super) fn check_programs(plan: &Plan) -> Result<()> {
    let made = plan.parts.iter().filter_map(|part| part.make("", 512)).map(|(program, _)| program);
    let is_btrfs = plan.parts.iter().any(|part| part.content.told() == "btrfs");
    let is_luks = plan.parts.iter().any(|part| part.container.is_some());
    for name in made
        .chain(is_luks.then(|| "cryptsetup".to_owned()))
        .chain(is_btrfs.then(|| "btrfs".to_owned()))
        .chain(["wipefs", "sfdisk", "udevadm", "rsync", "fsck.fat", "systemctl"].map(str::to_owned))
    {
        program::path(&name).map_err(|e| refused(format!("{e:#}; nothing was done")))?;
    }
    Ok(())
}

/// What a boot partition holds, and the first reason why a copy of its images would not boot.
pub(super) fn look_into(place: &Path, names: &Rewriter) -> Result<(BootFiles, Option<String>)> {
    let look = || -> Result<_> {
        let found = BootFiles::scan(&Below::open(place)?)?;
        let faults = images::boot_partition(place, &found, names, &mut Searched::new(names)?)?;
        Ok((found, faults.into_iter().next()))
    };
    look().with_context(|| place.display().to_string())
}

/// Whether the booted disk can be copied, as far as that can be seen before; where a disk is given, also whether the copy has
/// what drives that.
pub(super) fn check_source(mut machine: Machine, name: DiskName, shared: Option<&Shared>, disk: Option<&Target>) -> Result<()> {
    let new = machine.config.disks.iter().find(|disk| disk.name == name).context("the new disk has no section")?;
    if let Some(shared) = shared {
        shared.forget(&mut machine.ids);
    }
    // As the sync will search for what names another disk.
    let names = machine.rewriter(new)?;
    let mut files = BTreeMap::new();
    for (role, _, dir) in machine.booted.boot_places() {
        let (found, fault) = look_into(Path::new(dir.as_str()), &names)?;
        if let Some(fault) = fault {
            bail!("{dir}/{fault}; a copy would not boot without the booted disk");
        }
        files.insert(role, found);
    }
    match shared {
        Some(_) => join::check(&machine, &names, &files)?,
        None => check_own_root(&machine, &names, &mut files)?,
    }
    disk.map_or(Ok(()), |disk| drivers::check(&machine, disk.kname(), &files))
}

/// Whether the booted disk's root can be copied. What boots another one isn't, and is taken out of `files`.
fn check_own_root(machine: &Machine, names: &Rewriter, files: &mut BTreeMap<Role, BootFiles>) -> Result<()> {
    let crypttab = machine.root.read_opt("/etc/crypttab").context("/etc/crypttab can't be read")?.unwrap_or_default();
    if let Some(line) = crypttab::opened_by_files(&crypttab, |spec| !names.foreign(spec).is_empty()).first() {
        bail!(
            "/etc/crypttab opens the LUKS container {line}, which would not open that of the copy; have {} there, or none",
            crypttab::KEY
        );
    }
    if let Some(fault) = prove::named_unit(&machine.root, names)? {
        bail!("{fault}");
    }
    if let Some(fault) = beside(machine)? {
        bail!("{fault}; that is not cloned");
    }
    let Some(running) = machine.subvolume()? else { return Ok(()) };
    if let Some(why) = roots::no_source(&running, files) {
        bail!("on {}, {why}", machine.booted.name);
    }
    files.values_mut().for_each(|files| offers::keep_own(files, &running));
    Ok(())
}

/// What the copy would wait for when it boots: what of the booted disk isn't cloned.
fn beside(machine: &Machine) -> Result<Option<String>> {
    let mut booted: Vec<DiskIds> = machine.ids.iter().filter(|ids| ids.name == machine.booted.name).cloned().collect();
    booted.iter_mut().for_each(|ids| ids.parts.retain(|role, _| !machine.booted.parts.contains_key(role)));
    let names = Rewriter::finder(&booted)?;
    let files = files::identifying_texts(&machine.root, &[])?;
    let fstab = files.get("/etc/fstab").map(Vec::as_slice).unwrap_or_default();
    let root = machine.root_names(&machine.booted)?;
    let names_root = |spec: &[u8]| root.as_ref().is_some_and(|root| !root.foreign(spec).is_empty());
    let subvolumes = fstab::beside_the_root(fstab, names_root, |_| false);
    let subvolumes = subvolumes.into_iter().map(|line| {
        format!(
            "/etc/fstab would have the boot wait for another subvolume than the root: {line}; give the line nofail, or have the disks \
             share the root"
        )
    });
    let on_disk = waits::on_booted_disk_only(&machine.root, &machine.inventory, &machine.booted, fstab)?;
    let found = prove::root_files(&files, &names, |dir| machine.is_apart(dir));
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
    fn f14_what_boot_waits_for_is_cloned_or_refused() {
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
            ("UUID=of-root /home btrfs subvol=@home", Some("another subvolume than the root: line 2 (/home)")),
            ("UUID=of-root /home btrfs subvol=@home,nofail", None),
            ("UUID=of-other /home btrfs subvol=@home", None),
        ] {
            fs::write(tmp.path().join("etc/fstab"), format!("UUID=of-root / ext4\n{line}\n")).unwrap();
            match (beside(&machine).unwrap(), expected) {
                (None, None) => {}
                (Some(fault), Some(expected)) if fault.contains(expected) => {}
                (found, _) => panic!("{line}: {found:?}"),
            }
        }
        fs::remove_file(tmp.path().join("etc/fstab")).unwrap();
        fs::create_dir_all(tmp.path().join("etc/systemd/system")).unwrap();
        for (options, expected) in [("defaults", true), ("nofail", false)] {
            let what = "/dev/disk/by-partuuid/aaaaaaaa-0000-4000-8000-000000000005";
            let text = format!("[Mount]\nWhat={what}\nWhere=/tmp\nOptions={options}\n");
            fs::write(tmp.path().join("etc/systemd/system/tmp.mount"), text).unwrap();
            let fault = beside(&machine).unwrap();
            assert_eq!(fault.is_some_and(|fault| fault.contains("give its Options= nofail")), expected);
        }
    }
}
