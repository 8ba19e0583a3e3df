//! A check that the booted disk's partitions are mounted where a sync expects them.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::base::refusal::refused;
use crate::base::types::Role;
use crate::conf::Disk;
use crate::devices::inventory::Inventory;
use crate::devices::mounts::{self, Mount};
use crate::devices::subvolume;

/// Checks that every partition of the booted disk that is copied is mounted where it belongs. If nothing is mounted on /boot, a kernel that is
/// installed there is missing on the boot partition (failure mode 5).
///
/// # Errors
/// [`crate::base::refusal::Refused`], which names the first partition that isn't.
pub(super) fn check(booted: &Disk, inventory: &Inventory, table: &[Mount]) -> Result<()> {
    let trees = booted.parts.iter().filter_map(|(role, part)| {
        let at = role.tree()?;
        Some((role.clone(), *part, PathBuf::from(if at.is_empty() { "/" } else { at })))
    });
    let boot = booted.boot_places().into_iter().map(|(role, part, dir)| (role, part, PathBuf::from(dir.as_str())));
    for (role, partuuid, dir) in trees.chain(boot) {
        let name = booted.name;
        let found = inventory.find(&partuuid).map_err(|e| refused(format!("{e:#}")))?;
        let part = found.ok_or_else(|| {
            refused(format!("{name} was booted, but its {role}= partition {partuuid} does not exist; correct the configuration"))
        })?;
        match mounts::at(table, &dir) {
            Some(mount) if mount.is_on(part) && mount.root == "/" => {}
            // A root may be a subvolume, which the menu entries name.
            Some(mount) if mount.is_on(part) && role == Role::Root && mount.fstype == "btrfs" && is_subvolume(&dir) => {}
            // Another subvolume, or a directory that is bind-mounted: on a copy, the boot would find other files there.
            Some(mount) if mount.is_on(part) => {
                return Err(refused(format!(
                    "{name} was booted, but {} has only {} of its {role}= partition {}, and dualroot copies whole file systems; mount that \
                     without subvol= and without bind",
                    dir.display(),
                    mount.root,
                    part.path
                )));
            }
            Some(mount) => {
                return Err(refused(format!(
                    "{name} was booted, but {} has {} mounted instead of its {role}= partition {}; mount that there",
                    dir.display(),
                    mount.source,
                    part.path
                )));
            }
            None => {
                return Err(refused(format!(
                    "{name} was booted, but nothing is mounted on {}; mount its {role}= partition {} there \
                     ('systemctl daemon-reload' and 'systemctl start local-fs.target' make the generator's mounts)",
                    dir.display(),
                    part.path
                )));
            }
        }
    }
    Ok(())
}

/// Whether this is the top directory of a btrfs subvolume, and not a directory inside one that is bind-mounted.
fn is_subvolume(dir: &Path) -> bool {
    fs::metadata(dir).is_ok_and(|meta| subvolume::is_top(meta.ino()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::refusal::Refused;
    use crate::pair::machine::Machine;
    use crate::pair::machine::tests::machine;

    #[test]
    fn f05_every_partition_has_to_be_mounted_where_it_belongs() {
        let Machine { booted, inventory, .. } = machine(&[1, 2, 3]);
        let line = |device: &str, root: &str, at: &str| {
            Mount::parse(&format!("22 1 {device} {root} {at} rw - ext4 /dev/none rw")).unwrap()
        };
        let root = line("8:2", "/", "/");
        let check = |boot: &[Mount]| super::check(&booted, &inventory, &[std::slice::from_ref(&root), boot].concat());
        check(&[line("8:1", "/", "/boot")]).unwrap();
        for (boot, expected) in [
            (vec![], "nothing is mounted on /boot; mount its esp= partition /dev/x1 there"),
            (vec![line("8:3", "/", "/boot")], "/boot has /dev/none mounted instead of its esp= partition /dev/x1"),
            (
                vec![line("8:1", "/", "/boot"), line("0:30", "/", "/boot")],
                "/boot has /dev/none mounted instead of its esp= partition",
            ),
            (vec![line("8:1", "/sub", "/boot")], "/boot has only /sub of its esp= partition"),
        ] {
            let error = check(&boot).unwrap_err();
            assert!(error.is::<Refused>() && error.to_string().contains(expected), "{error}");
        }
        let error = super::check(&booted, &inventory, &[line("8:9", "/", "/"), line("8:1", "/", "/boot")]).unwrap_err();
        assert!(error.to_string().contains("/ has /dev/none mounted instead of its root= partition /dev/x2"), "{error}");
    }
}
