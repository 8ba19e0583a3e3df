//! What is mounted where, and a private, writable view of a spare's file systems.
//!
//! A sync never writes through /mnt/root1. It works in a mount namespace of its own, in which it binds the spare's file system (or
//! mounts it, where nobody has) and makes *that* mount writable. Everybody else keeps the read-only mount that they had. What is
//! written to is known by its device number, so that a directory on which nothing is mounted (failure mode 1) can't be meant.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::makedev;

use crate::base::log::Log;
use crate::base::program;
use crate::base::root::Root;
use crate::devices::inventory::Partition;
use crate::write::below::{Below, Change};

/// A line of /proc/self/mountinfo (proc_pid_mountinfo(5)).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Mount {
    /// The device number; of btrfs, one that belongs to no device.
    device: u64,
    /// The directory of the file system that is mounted.
    pub root: String,
    /// Where it is mounted.
    pub at: PathBuf,
    /// The type of the file system.
    pub fstype: String,
    /// The device, as it was given to mount(2).
    pub source: String,
    /// Whether this mount is read-only.
    read_only: bool,
    /// Whether the file system is, for every mount of it.
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

    /// Whether anybody can write by this mount. A file system that a killed sync left writable behind a read-only mount isn't meant.
    pub fn is_writable(&self) -> bool {
        !self.read_only && !self.all_read_only
    }

    /// Whether the file system lies on this partition.
    pub fn is_on(&self, part: &Partition) -> bool {
        part.device().is_ok_and(|device| self.is_of(device))
    }

    /// Whether the file system lies on the device with this number.
    pub fn is_of(&self, device: u64) -> bool {
        // btrfs has device numbers of its own; its source is a device node.
        self.device == device
            || (self.source.starts_with("/dev/") && fs::metadata(&self.source).is_ok_and(|m| m.rdev() == device))
    }
}

/// `\040` and its kin, as the kernel writes them.
fn unescape(field: &str) -> String {
    let mut out = Vec::new();
    let mut rest = field.as_bytes();
    while let [first, tail @ ..] = rest {
        let octal = tail.get(..3).and_then(|d| std::str::from_utf8(d).ok()).and_then(|d| u8::from_str_radix(d, 8).ok());
        match (first, octal) {
            (b'\\', Some(byte)) => {
                out.push(byte);
                rest = tail.get(3..).unwrap_or_default();
            }
            _ => {
                out.push(*first);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// Every mount of this namespace, in the order in which they were made.
///
/// # Errors
/// /proc that isn't there.
pub fn table() -> Result<Vec<Mount>> {
    table_of(&Root::new("/"))
}

/// What the /proc below `root` has for that.
///
/// # Errors
/// As [`table`].
pub fn table_of(root: &Root) -> Result<Vec<Mount>> {
    const PATH: &str = "/proc/thread-self/mountinfo";
    let text = root.read(PATH).with_context(|| format!("{PATH} can't be read"))?;
    Ok(String::from_utf8_lossy(&text).lines().filter_map(Mount::parse).collect())
}

/// Has systemd take mounts away.
///
/// # Errors
/// A mount that stays.
pub fn stop(mounts: &[&Mount]) -> Result<()> {
    for mount in mounts {
        let path = mount.at.to_str().context("a mount point isn't UTF-8")?;
        let unit = format!("{}.mount", libsystemd::unit::escape_path(path));
        program::output("systemctl", ["stop", &unit].map(Into::into))?;
    }
    Ok(())
}

/// Has systemd make the spares' mounts that could not be made at boot, for lack of a directory to mount them on.
pub fn start_spares(log: &Log) {
    let Ok(units) = fs::read_dir("/run/systemd/generator") else { return };
    let table = table().unwrap_or_default();
    for unit in units.flatten() {
        let name = unit.file_name();
        let Some(name) = name.to_str().filter(|n| n.starts_with("mnt-root") && n.ends_with(".mount")) else { continue };
        let text = fs::read_to_string(unit.path()).unwrap_or_default();
        let values = |key: &'static str| text.lines().filter_map(move |line| line.strip_prefix(key));
        // systemd would wait for the device of an absent spare; what is mounted needs no start.
        if !values("What=").all(|device| Path::new(device).exists())
            || values("Where=").any(|dir| at(&table, Path::new(dir)).is_some())
        {
            continue;
        }
        if let Err(e) = program::output("systemctl", ["start", "--no-block", name].map(Into::into)) {
            log.warning(&format!("{name} can't be started: {e:#}"));
        }
    }
}

/// The mount that one sees at a directory: of those that were made there, the last.
pub fn at<'a>(table: &'a [Mount], dir: &Path) -> Option<&'a Mount> {
    table.iter().rev().find(|m| m.at == dir)
}

/// Files in use as swap space that lie on a btrfs, as the kernel lists them (proc_swaps(5)).
///
/// # Errors
/// /proc that isn't there, or can't be read.
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

/// From here on, what this process mounts is its own; what others unmount goes here too.
///
/// # Errors
/// Lack of privilege.
pub fn enter_private_namespace() -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNS).context("a mount namespace can't be made (this has to run as root)")?;
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_SLAVE, None::<&str>).context("/ can't be made private")
}

/// A file system of the booted disk without what is mounted in it: what lies below those mounts is seen, and nothing is seen twice.
pub struct Alone {
    place: PathBuf,
}

impl Alone {
    /// Shows the file system that is seen at `dir`, read-only, at `place` (made if need be), in the private namespace only.
    ///
    /// # Errors
    /// Those of mount(2).
    pub fn open(dir: &Path, place: &Path) -> Result<Self> {
        fs::create_dir_all(place).with_context(|| format!("{} can't be made", place.display()))?;
        let bind = |flags| mount(Some(dir), place, None::<&str>, MsFlags::MS_BIND | flags, None::<&str>);
        bind(MsFlags::empty()).with_context(|| format!("{} can't be bound to {}", dir.display(), place.display()))?;
        let new = Self { place: place.to_owned() };
        bind(MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY).with_context(|| format!("{} can't be made read-only", place.display()))?;
        Ok(new)
    }

    /// Where it is.
    pub fn place(&self) -> &Path {
        &self.place
    }
}

impl Drop for Alone {
    fn drop(&mut self) {
        // It goes with the namespace at the latest.
        let _ = umount2(&self.place, MntFlags::MNT_DETACH);
    }
}

/// A file system that is mounted for being written: a spare's, or, in the initrd, the root's.
pub struct Held {
    below: Option<Below>,
    place: PathBuf,
    device: String,
    flags: MsFlags,
    /// Whether the file system has to become read-only again.
    rests_read_only: bool,
    writable: bool,
}

impl Held {
    /// Mounts a partition at `place` (made if need be) read-only, in the private namespace only.
    ///
    /// # Errors
    /// A partition without a file system, or with one that can't be mounted on its own; what is mounted then not being on it.
    pub fn open(part: &Partition, place: &Path) -> Result<Self> {
        let fstype = match part.fstype.as_deref() {
            None => bail!("{} holds no file system; make one there, and start the sync again", part.node()),
            Some("crypto_LUKS") => bail!("{} is a LUKS container that isn't open, see dualroot.conf(5), luks=", part.path),
            Some(other @ ("LVM2_member" | "linux_raid_member")) => {
                bail!("{} holds {other}, which dualroot doesn't open by itself", part.path)
            }
            Some(fs) => fs,
        };
        fs::create_dir_all(place).with_context(|| format!("{} can't be made", place.display()))?;
        let mut flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        if fstype == "vfat" {
            flags |= MsFlags::MS_NOEXEC;
        }
        let mut uses = table()?;
        uses.retain(|m| m.is_on(part));
        let existing = uses.iter().rfind(|m| m.root == "/");
        match existing {
            Some(there) => mount(Some(&there.at), place, None::<&str>, MsFlags::MS_BIND, None::<&str>),
            None => {
                let data = match fstype {
                    "vfat" => Some("umask=0077,utf8,tz=UTC,errors=remount-ro"),
                    // The top, whichever subvolume is its default.
                    "btrfs" => Some("subvolid=5"),
                    _ => None,
                };
                mount(Some(part.node()), place, Some(fstype), flags | MsFlags::MS_RDONLY, data)
            }
        }
        .with_context(|| format!("{0} can't be mounted; see what fsck(8) says of it ('fsck {0}')", part.node()))?;
        if !at(&table()?, place).is_some_and(|m| m.is_on(part)) {
            bail!("what is mounted at {} is not {}", place.display(), part.path);
        }
        Ok(Self {
            below: Some(Below::open(place)?.from_medium()),
            place: place.to_owned(),
            device: part.path.clone(),
            flags,
            rests_read_only: !uses.iter().any(Mount::is_writable),
            writable: false,
        })
    }

    /// Takes hold of the file system that is mounted at `dir`, in the private namespace only, without what is mounted in it; None
    /// where nothing is mounted.
    ///
    /// # Errors
    /// Those of mount(2).
    pub fn over(dir: &Path) -> Result<Option<Self>> {
        let table = table()?;
        let Some(there) = at(&table, dir) else { return Ok(None) };
        // Over itself: an initrd may have no other directory for it.
        mount(Some(dir), dir, None::<&str>, MsFlags::MS_BIND, None::<&str>)
            .with_context(|| format!("{} can't be bound to itself", dir.display()))?;
        Ok(Some(Self {
            below: Some(Below::open(dir)?),
            place: dir.to_owned(),
            device: there.source.clone(),
            flags: MsFlags::MS_NOSUID | MsFlags::MS_NODEV,
            rests_read_only: !table.iter().any(|m| m.device == there.device && m.is_writable()),
            writable: false,
        }))
    }

    /// Makes it writable, here and nowhere else. That it is being written is on the medium before anything else: a cut that takes FAT's
    /// dirty bit, and leaves what was written after it, would not be noticed.
    ///
    /// # Errors
    /// A medium that can't be written.
    pub fn make_writable(&mut self) -> Result<()> {
        self.writable = true;
        let why = |error: &Errno| match error {
            // mount(2): the device is read-only, or, of ext4, the file system has become so by an error.
            Errno::EACCES | Errno::EROFS => "; it is read-only: look at the disk, and at the kernel's log",
            _ => "",
        };
        self.remount(MsFlags::empty()).map_err(|error| {
            anyhow::Error::new(error).context(format!("{} can't be made writable{}", self.device, why(&error)))
        })?;
        self.below()?.apply(&Change::Barrier)
    }

    fn remount(&self, more: MsFlags) -> nix::Result<()> {
        mount(None::<&str>, &self.place, None::<&str>, MsFlags::MS_REMOUNT | self.flags | more, None::<&str>)
    }

    /// The handle to work below.
    ///
    /// # Errors
    /// None before [`Held::release`].
    pub fn below(&self) -> Result<&Below> {
        self.below.as_ref().context("the file system is not mounted any more")
    }

    /// Where it is mounted, in the private namespace.
    pub fn place(&self) -> &Path {
        &self.place
    }

    /// Flushes it, makes it read-only again if it was, and lets go of it. FAT's dirty bit is cleared by that (failure mode 24).
    ///
    /// # Errors
    /// What is still to be written can't be.
    pub fn release(mut self) -> Result<()> {
        self.put_back()
    }

    fn put_back(&mut self) -> Result<()> {
        let Some(below) = self.below.take() else { return Ok(()) };
        let mut result = if self.writable { below.apply(&Change::Barrier) } else { Ok(()) };
        drop(below);
        if self.writable && self.rests_read_only {
            let remounted = self.remount(MsFlags::MS_RDONLY);
            result = result.and(remounted.with_context(|| format!("{} can't be made read-only again", self.device)));
        }
        let unmounted = umount2(&self.place, MntFlags::MNT_DETACH);
        result.and(unmounted.with_context(|| format!("{} can't be unmounted", self.place.display())))
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        // Only reached with something left to do after another error, which is the one to report.
        let _ = self.put_back();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mountinfo_lines() {
        let m = Mount::parse("36 35 98:0 /mnt1 /mnt\\0402 rw,noatime master:1 - ext3 /dev/root ro,errors=continue").unwrap();
        assert_eq!(
            (m.device, m.root.as_str(), m.at.as_path(), m.fstype.as_str(), m.read_only, m.all_read_only),
            (makedev(98, 0), "/mnt1", Path::new("/mnt 2"), "ext3", false, true)
        );
        assert!(!m.is_writable());
        let left_by_a_killed_sync = Mount::parse("36 35 98:0 / /mnt/root1 ro,nosuid - ext4 /dev/sdb2 rw").unwrap();
        assert!(!left_by_a_killed_sync.is_writable());
        assert!(Mount::parse("36 35 98:0 / /mnt rw - ext4 /dev/sdb2 rw").unwrap().is_writable());
        assert_eq!(Mount::parse("36 35 98:0 / /mnt rw - ext3 /dev/root rw").unwrap().root, "/");
        for bad in ["", "36 35 98 / /mnt rw - ext3 a rw", "36 35 98:0 / /mnt rw", "- - - -"] {
            assert!(Mount::parse(bad).is_none(), "{bad}");
        }
    }

    #[test]
    fn a_mounted_file_system_is_written_where_nobody_sees_it() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let tmp = tempfile::tempdir().unwrap();
        let (dir, view) = (tmp.path().join("dir"), tmp.path().join("view"));
        for path in [&dir, &view] {
            fs::create_dir(path).unwrap();
        }
        enter_private_namespace().unwrap();
        assert!(Held::over(&dir).unwrap().is_none(), "nothing is mounted there");
        mount(Some("none"), &dir, Some("tmpfs"), MsFlags::MS_NOATIME, None::<&str>).unwrap();
        mount(Some(&dir), &view, None::<&str>, MsFlags::MS_BIND, None::<&str>).unwrap();
        for (read_only, flags) in [(true, MsFlags::MS_RDONLY), (false, MsFlags::empty())] {
            for place in [&dir, &view] {
                mount(None::<&str>, place, None::<&str>, MsFlags::MS_REMOUNT | MsFlags::MS_NOATIME | flags, None::<&str>)
                    .unwrap();
            }
            let mine = |table: Vec<Mount>| table.into_iter().filter(|m| m.at == dir || m.at == view).collect::<Vec<_>>();
            let before = mine(table().unwrap());
            let mut held = Held::over(&dir).unwrap().unwrap();
            held.make_writable().unwrap();
            held.below().unwrap().apply(&Change::MakeDir(format!("made-{read_only}"))).unwrap();
            assert_eq!(fs::create_dir(view.join("other")).is_err(), read_only);
            held.release().unwrap();
            assert_eq!(mine(table().unwrap()), before, "all is as it was");
            assert!(dir.join(format!("made-{read_only}")).exists());
            assert_eq!(fs::create_dir(dir.join("another")).is_err(), read_only);
        }
    }

    #[test]
    fn the_last_mount_of_a_directory_is_seen() {
        let line = |id: u32, source: &str| Mount::parse(&format!("{id} 1 8:{id} / /boot rw - vfat {source} rw")).unwrap();
        let table = [line(1, "/dev/a"), line(2, "/dev/b")];
        assert_eq!(at(&table, Path::new("/boot")).unwrap().source, "/dev/b");
        assert!(at(&table, Path::new("/efi")).is_none());
    }
}
