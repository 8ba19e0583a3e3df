//! The table of mounts, and starting and stopping mount units.
//!
//! A sync never writes through /mnt/root1. In a mount namespace of its own, it mounts the spare's file system (or binds it, if it is
//! mounted already) and makes *that* mount writable; everybody else keeps the read-only mount. The device number tells whether the right
//! file system is mounted, so that a bare directory is never written to (failure mode 1).

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nix::sys::stat::makedev;

use crate::base::log::Log;
use crate::base::root::Root;
use crate::base::{octal, program};
use crate::devices::inventory::Partition;

/// A line of /proc/self/mountinfo (proc_pid_mountinfo(5)).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Mount {
    /// The device number; a btrfs has one that belongs to no device.
    pub(crate) device: u64,
    /// The directory of the file system that is mounted, from its top.
    pub root: String,
    /// The mount point.
    pub at: PathBuf,
    /// The type of the file system.
    pub fstype: String,
    /// The source given to mount(2), usually a device node.
    pub source: String,
    /// Whether this mount is read-only.
    read_only: bool,
    /// Whether the whole file system is read-only.
    all_read_only: bool,
}

impl Mount {
    pub(crate) fn parse(line: &str) -> Option<Self> {
        let (mount, fs) = line.split_once(" - ")?;
        let mut mount = mount.split(' ').skip(2);
        let (major, minor) = mount.next()?.split_once(':')?;
        let device = makedev(major.parse().ok()?, minor.parse().ok()?);
        let (root, at, options) = (mount.next()?, mount.next()?, mount.next()?);
        let mut fs = fs.split(' ');
        let (fstype, source, all) = (fs.next()?, fs.next()?, fs.next()?);
        Some(Self {
            device,
            root: unescape(root),
            at: unescape(at).into(),
            fstype: fstype.to_owned(),
            source: unescape(source),
            read_only: options.split(',').any(|o| o == "ro"),
            all_read_only: all.split(',').any(|o| o == "ro"),
        })
    }

    /// Whether files can be written through this mount. A read-only mount of a file system that a killed sync left writable isn't.
    pub fn is_writable(&self) -> bool {
        !self.read_only && !self.all_read_only
    }

    /// Whether the file system is on this partition.
    pub fn is_on(&self, part: &Partition) -> bool {
        part.device().is_ok_and(|device| self.is_of(device))
    }

    /// Whether the file system is on the device with this number.
    pub fn is_of(&self, device: u64) -> bool {
        // A btrfs has a number of its own, but its source is a device node.
        self.device == device
            || (self.source.starts_with("/dev/") && fs::metadata(&self.source).is_ok_and(|m| m.rdev() == device))
    }
}

/// A field of one of the kernel's lists of mounts.
fn unescape(field: &str) -> String {
    String::from_utf8_lossy(&octal::unescape(field.as_bytes(), b"\\")).into_owned()
}

/// All mounts of this namespace, in the order in which they were made.
///
/// # Errors
/// /proc can't be read.
pub fn table() -> Result<Vec<Mount>> {
    table_of(&Root::new("/"))
}

/// As [`table`], from the /proc below `root`.
///
/// # Errors
/// As [`table`].
pub fn table_of(root: &Root) -> Result<Vec<Mount>> {
    const PATH: &str = "/proc/thread-self/mountinfo";
    let text = root.read(PATH).with_context(|| format!("{PATH} can't be read"))?;
    Ok(String::from_utf8_lossy(&text).lines().filter_map(Mount::parse).collect())
}

/// Unmounts these mounts by stopping their systemd units.
///
/// # Errors
/// A file system stays mounted.
pub fn stop(mounts: &[&Mount]) -> Result<()> {
    for mount in mounts {
        let path = mount.at.to_str().context("a mount point isn't UTF-8")?;
        let unit = format!("{}.mount", libsystemd::unit::escape_path(path));
        program::output("systemctl", ["stop", &unit].map(Into::into))?;
    }
    Ok(())
}

/// Starts the spares' mount units that could not start at boot because their mount point was missing.
pub fn start_spares(log: &Log) {
    for name in unstarted(Path::new("/run/systemd/generator"), &table().unwrap_or_default()) {
        if let Err(e) = program::output("systemctl", ["start", "--no-block", &name].map(Into::into)) {
            log.warning(&format!("{name} can't be started: {e:#}"));
        }
    }
}

/// The spares' mount units in a directory whose devices exist, and whose mount points have nothing mounted.
fn unstarted(units: &Path, table: &[Mount]) -> Vec<String> {
    let mut found = Vec::new();
    for unit in fs::read_dir(units).into_iter().flatten().flatten() {
        let name = unit.file_name();
        let Some(name) = name.to_str().filter(|n| n.starts_with("mnt-root") && n.ends_with(".mount")) else { continue };
        let text = fs::read_to_string(unit.path()).unwrap_or_default();
        let values = |key: &'static str| text.lines().filter_map(move |line| line.strip_prefix(key));
        // For an absent spare, systemd would wait for the device.
        if values("What=").all(|device| Path::new(device).exists())
            && !values("Where=").any(|dir| at(table, Path::new(dir)).is_some())
        {
            found.push(name.to_owned());
        }
    }
    found.sort();
    found
}

/// The visible mount on a directory: the last one that was made there.
pub fn at<'a>(table: &'a [Mount], dir: &Path) -> Option<&'a Mount> {
    table.iter().rev().find(|m| m.at == dir)
}

/// The active swap files that are on a btrfs, from the kernel's list (proc_swaps(5)).
///
/// # Errors
/// /proc can't be read.
pub fn swap_files_on_btrfs(root: &Root) -> Result<Vec<PathBuf>> {
    let table = table_of(root)?;
    let text = root.read_opt("/proc/swaps").context("/proc/swaps can't be read")?.unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let files = text.lines().skip(1).filter_map(|line| {
        let mut words = line.split_ascii_whitespace();
        let (path, kind) = (words.next()?, words.next()?);
        (kind == "file").then(|| PathBuf::from(unescape(path)))
    });
    let is_on_btrfs = |file: &PathBuf| file.ancestors().find_map(|dir| at(&table, dir)).is_some_and(|m| m.fstype == "btrfs");
    Ok(files.filter(is_on_btrfs).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_mountinfo_are_read() {
        let m = Mount::parse("36 35 98:0 /mnt1 /mnt\\0402 rw,noatime master:1 - ext3 /dev/root ro,errors=continue").unwrap();
        assert_eq!(
            (m.device, m.root.as_str(), m.at.as_path(), m.fstype.as_str(), m.read_only, m.all_read_only),
            (makedev(98, 0), "/mnt1", Path::new("/mnt 2"), "ext3", false, true)
        );
        assert!(!m.is_writable());
        let after_a_killed_sync = Mount::parse("36 35 98:0 / /mnt/root1 ro,nosuid - ext4 /dev/sdb2 rw").unwrap();
        assert!(!after_a_killed_sync.is_writable());
        assert!(Mount::parse("36 35 98:0 / /mnt rw - ext4 /dev/sdb2 rw").unwrap().is_writable());
        assert_eq!(Mount::parse("36 35 98:0 / /mnt rw - ext3 /dev/root rw").unwrap().root, "/");
        for bad in ["", "36 35 98 / /mnt rw - ext3 a rw", "36 35 98:0 / /mnt rw", "- - - -"] {
            assert!(Mount::parse(bad).is_none(), "{bad}");
        }
    }

    #[test]
    fn the_last_mount_on_a_directory_is_the_visible_one() {
        let line = |id: u32, source: &str| Mount::parse(&format!("{id} 1 8:{id} / /boot rw - vfat {source} rw")).unwrap();
        let table = [line(1, "/dev/a"), line(2, "/dev/b")];
        assert_eq!(at(&table, Path::new("/boot")).unwrap().source, "/dev/b");
        assert!(at(&table, Path::new("/efi")).is_none());
    }
    #[test]
    fn f14_only_mounts_of_spares_that_are_there_are_started() {
        let tmp = tempfile::tempdir().unwrap();
        let (there, absent) = (tmp.path().join("device"), tmp.path().join("absent"));
        for (name, device, place) in [
            ("mnt-root1.mount", &there, "/mnt/root1"),
            ("mnt-root1-boot.mount", &absent, "/mnt/root1/boot"),
            ("mnt-root1-home.mount", &there, "/mnt/root1/home"),
            ("mnt-root2.mount", &there, "/mnt/root2"),
            ("mnt-root2.automount", &there, "/mnt/root2"),
            ("boot.mount", &there, "/boot"),
        ] {
            let text = format!("[Mount]\nWhat={}\nWhere={place}\n", device.display());
            fs::write(tmp.path().join(name), text).unwrap();
        }
        fs::write(&there, "").unwrap();
        let table = [Mount::parse("36 35 98:0 / /mnt/root2 ro - ext4 /dev/sdb2 ro").unwrap()];
        assert_eq!(unstarted(tmp.path(), &table), ["mnt-root1-home.mount", "mnt-root1.mount"]);
        assert!(unstarted(&absent, &table).is_empty());
    }

    #[test]
    fn swap_files_on_btrfs_are_found() {
        let tmp = tempfile::tempdir().unwrap();
        fs::create_dir_all(tmp.path().join("proc/thread-self")).unwrap();
        let mounts = "30 1 0:30 /@ / rw - btrfs /dev/sda2 rw\n31 30 8:3 / /data rw - ext4 /dev/sda3 rw\n";
        fs::write(tmp.path().join("proc/thread-self/mountinfo"), mounts).unwrap();
        let root = Root::new(tmp.path());
        assert!(swap_files_on_btrfs(&root).unwrap().is_empty(), "a kernel without swap");
        let swaps = "Filename Type Size Used Priority\n/dev/sda4 partition 1 0 -2\n/data/swap file 1 0 -3\n\
                     /var/swap\\040file file 1 0 -4\n";
        fs::write(tmp.path().join("proc/swaps"), swaps).unwrap();
        assert_eq!(swap_files_on_btrfs(&root).unwrap(), [Path::new("/var/swap file")]);
    }
}
