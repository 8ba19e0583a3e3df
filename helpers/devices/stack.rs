//! The layers under a file system (LVM volumes, md arrays, LUKS mappings) down to its partitions. The kernel shows them in
//! `/sys/class/block/*/slaves` (Linux, Documentation/ABI/stable/sysfs-block).

use std::collections::BTreeSet;
use std::fs;

use anyhow::{Context, Result};

use crate::base::root::Root;

/// The block devices under a file system.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Stack {
    /// The kernel's names of the lowest devices: partitions or whole disks.
    leaves: BTreeSet<String>,
    /// Whether there is any layer between the file system and the leaves.
    layered: bool,
}

impl Stack {
    /// The stack under the device that the first field of a line of fstab(5) names; None if it names no present block device, or names a
    /// partition by PARTUUID= or PARTLABEL=.
    ///
    /// # Errors
    /// /sys can't be read.
    pub fn of(root: &Root, spec: &str) -> Result<Option<Self>> {
        device(root, spec).map(|device| Self::under(root, device)).transpose()
    }

    fn under(root: &Root, device: String) -> Result<Self> {
        let mut stack = Self { leaves: BTreeSet::new(), layered: false };
        let mut seen = BTreeSet::from([device.clone()]);
        let mut left = vec![device];
        while let Some(device) = left.pop() {
            let dir = format!("/sys/class/block/{device}/slaves");
            let slaves = root.names(&dir).with_context(|| dir.clone())?;
            if slaves.is_empty() {
                stack.leaves.insert(device);
                continue;
            }
            stack.layered = true;
            let slaves = slaves.iter().filter_map(|name| name.to_str()).map(str::to_owned);
            left.extend(slaves.filter(|name| seen.insert(name.clone())));
        }
        Ok(stack)
    }

    /// Whether there are layers under the file system, and all its leaves are among `parts`, kernel names.
    pub fn is_layered_within(&self, parts: &BTreeSet<String>) -> bool {
        self.layered && self.leaves.is_subset(parts)
    }
}

/// The kernel's name of the present device that fstab(5) names in this way.
fn device(root: &Root, spec: &str) -> Option<String> {
    let path = match spec.split_once('=') {
        Some(("UUID", uuid)) => format!("/dev/disk/by-uuid/{}", uuid.trim_matches('"')),
        Some(("LABEL", label)) => format!("/dev/disk/by-label/{}", label.trim_matches('"')),
        None if spec.starts_with("/dev/") => spec.to_owned(),
        _ => return None,
    };
    fs::canonicalize(root.path(path)).ok()?.file_name()?.to_str().map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn leaves_are_found_through_all_layers() {
        let tmp = tempfile::tempdir().unwrap();
        let at = |path: &str| tmp.path().join(path);
        fs::create_dir_all(at("dev/mapper")).unwrap();
        // A volume on an array of two partitions, one of them in a container.
        for (device, slaves) in [("dm-1", &["md0"][..]), ("md0", &["a3", "dm-0"]), ("dm-0", &["b3"]), ("a3", &[]), ("b3", &[])] {
            fs::write(at(&format!("dev/{device}")), "").unwrap();
            for slave in slaves {
                fs::create_dir_all(at(&format!("sys/class/block/{device}/slaves/{slave}"))).unwrap();
            }
        }
        symlink("../dm-1", at("dev/mapper/vg-home")).unwrap();
        let root = Root::new(tmp.path());
        let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<BTreeSet<_>>();
        let stack = Stack::of(&root, "/dev/mapper/vg-home").unwrap().unwrap();
        assert_eq!(stack, Stack { leaves: names(&["a3", "b3"]), layered: true });
        assert!(stack.is_layered_within(&names(&["a3", "b3", "c"])) && !stack.is_layered_within(&names(&["a3"])));
        let plain = Stack::of(&root, "/dev/a3").unwrap().unwrap();
        assert!(plain.leaves == names(&["a3"]) && !plain.is_layered_within(&names(&["a3"])));
        assert_eq!(Stack::of(&root, "UUID=absent").unwrap(), None);
    }
}
