//! Lines of fstab for devices that are layered on partitions: volumes of LVM, arrays of md, mappings. The kernel lists the partitions of such
//! a device in `/sys/class/block/*/slaves` (Documentation/ABI/stable/sysfs-block).

use std::collections::BTreeSet;

use anyhow::Result;

use crate::base::fault::{Code, Fault};
use crate::base::root::Root;
use crate::base::types::Role;
use crate::conf::Disk;
use crate::devices::inventory::Inventory;
use crate::devices::stack::Stack;
use crate::names::fstab::{self, Line};

/// One fault for each line of fstab that makes the boot wait for a device that only the booted disk has: all its partitions are on that disk,
/// and no key names them.
///
/// # Errors
/// A file of /sys can't be read.
pub(crate) fn on_booted_disk_only(root: &Root, inventory: &Inventory, booted: &Disk, fstab: &[u8]) -> Result<Vec<Fault>> {
    let unnamed = unnamed(inventory, booted)?;
    let mut faults = Vec::new();
    for line in fstab::lines(fstab).filter(Line::is_needed_at_boot) {
        let spec = line.spec.to_str_lossy();
        if Stack::of(root, &spec)?.is_some_and(|stack| stack.is_layered_within(&unnamed)) {
            let text = format!(
                "/etc/fstab would make the boot wait for another disk: line {} ({}) needs {}, which lies on {} alone",
                line.number,
                line.file.to_str_lossy().escape_debug(),
                spec.escape_debug(),
                booted.name
            );
            faults.push(Fault::new(Code::F14, text).on(&Role::Root).at("/etc/fstab").remedy("give the line nofail"));
        }
    }
    Ok(faults)
}

/// The kernel's names of the partitions of the booted disk that no key names.
fn unnamed(inventory: &Inventory, booted: &Disk) -> Result<BTreeSet<String>> {
    let Some(esp) = inventory.find(&booted.esp())? else { return Ok(BTreeSet::new()) };
    let is_named = |partuuid| booted.parts.values().any(|named| *named == partuuid);
    let unnamed = inventory.others_on_disk(esp).filter(|part| !part.partuuid().is_some_and(is_named));
    Ok(unnamed.map(|part| part.kname.clone()).collect())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::base::fault::tests::codes;
    use crate::conf::Config;

    #[test]
    fn f14_a_device_on_the_booted_disk_alone_is_not_waited_for() {
        let id = |n: u32| format!("aaaaaaaa-0000-4000-8000-{n:012}");
        let text = format!("[disk0]\nesp={}\nroot={}\n[disk1]\nesp={}\nroot={}\n", id(1), id(2), id(4), id(5));
        let config = Config::parse(&[("x".to_owned(), text.into_bytes())]).unwrap().unwrap();
        let part = |disk: &str, part: &str, n| {
            format!(
                r#"{{"kname":"{disk}{part}","pkname":"{disk}","path":"/dev/{disk}{part}","maj:min":"8:{n}","fstype":null,"uuid":null,
                    "label":null,"partuuid":"{}","partlabel":null,"parttype":null,"log-sec":512}}"#,
                id(n)
            )
        };
        let parts =
            [part("a", "1", 1), part("a", "2", 2), part("a", "3", 3), part("a", "4", 7), part("b", "1", 4), part("b", "3", 6)];
        let json = format!(r#"{{"blockdevices":[{}]}}"#, parts.join(","));
        let tmp = tempfile::tempdir().unwrap();
        let at = |path: &str| tmp.path().join(path);
        for dir in ["dev/disk/by-uuid", "dev/mapper"] {
            fs::create_dir_all(at(dir)).unwrap();
        }
        // A volume on two partitions of the booted disk, one on an array of both disks, and one in the root's container.
        for (device, slaves) in
            [("dm-0", &["a3", "a4"][..]), ("dm-1", &["md0"]), ("md0", &["a4", "b3"]), ("dm-2", &["a2"]), ("a3", &[])]
        {
            fs::write(at(&format!("dev/{device}")), "").unwrap();
            for slave in slaves {
                fs::create_dir_all(at(&format!("sys/class/block/{device}/slaves/{slave}"))).unwrap();
            }
        }
        for (link, to) in
            [("mapper/vg-home", "../dm-0"), ("disk/by-uuid/of-home", "../../dm-0"), ("disk/by-uuid/both", "../../dm-1")]
        {
            symlink(to, at(&format!("dev/{link}"))).unwrap();
        }
        let (root, booted) = (Root::new(tmp.path()), &config.disks[0]);
        let inventory = Inventory::parse(json.as_bytes(), BTreeMap::new(), [].into()).unwrap();
        let found = |line: &str| on_booted_disk_only(&root, &inventory, booted, format!("# one\n{line}\n").as_bytes()).unwrap();
        for line in ["/dev/mapper/vg-home /home ext4", "UUID=of-home /home ext4 defaults 0 2", "UUID=\"of-home\" /home ext4"] {
            let faults = found(line);
            assert_eq!(codes(&faults), [Code::F14], "{line}");
            assert!(faults[0].text.contains("line 2 (/home) needs"), "{line}: {faults:?}");
        }
        for line in [
            "/dev/mapper/vg-home /home ext4 nofail",
            "UUID=both /home ext4",
            "/dev/dm-2 / ext4",
            "/dev/a3 /home ext4",
            "UUID=absent /home ext4",
            "tmpfs /tmp tmpfs",
            "host:/x /x nfs",
        ] {
            assert_eq!(found(line), [], "{line}");
        }
    }
}
