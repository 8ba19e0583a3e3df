//! File systems that a sync mounts for itself, in its private mount namespace.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};

use crate::base::types::Role;
use crate::devices::inventory::Partition;
use crate::devices::mounts::{Mount, at, table};
use crate::write::below::Below;
use crate::write::change::Change;

/// Gives this process a mount namespace of its own: others don't see its mounts, but their unmounts happen here too.
///
/// # Errors
/// The process may not make mount namespaces.
pub fn enter_private_namespace() -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNS).context("a mount namespace can't be made. Run this as root")?;
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_SLAVE, None::<&str>).context("/ can't be made private")
}

/// A read-only view of one file system of the booted disk, without the file systems mounted in it: files below those mount points are
/// seen, and no file is seen twice.
pub struct ReadOnlyView {
    place: PathBuf,
}

impl ReadOnlyView {
    /// Mounts the view of the file system at `dir` on `place` (made if missing), in the private namespace.
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

    /// The directory that it is mounted on.
    pub fn place(&self) -> &Path {
        &self.place
    }
}

impl Drop for ReadOnlyView {
    fn drop(&mut self) {
        // Otherwise it ends with the namespace.
        let _ = umount2(&self.place, MntFlags::MNT_DETACH);
    }
}

/// A file system mounted for writing: one of a spare or, in the initrd, the root.
pub struct Held {
    below: Option<Below>,
    place: PathBuf,
    device: String,
    flags: MsFlags,
    /// Whether the file system was read-only before, and must be again.
    rests_read_only: bool,
    writable: bool,
}

impl Held {
    /// Mounts a partition read-only on `place` (made if missing), in the private namespace.
    ///
    /// # Errors
    /// The partition holds no file system that can be mounted directly; mount(2) fails; the mounted file system is on another partition.
    pub fn open(part: &Partition, place: &Path) -> Result<Self> {
        let fstype = match part.fstype.as_deref() {
            None => bail!("{} holds no file system; make one there, and start the sync again", part.node()),
            Some("crypto_LUKS") => {
                bail!("{} is a LUKS container that isn't open. Name it in luks=, see dualroot.conf(5)", part.path)
            }
            Some(other @ ("LVM2_member" | "linux_raid_member")) => {
                bail!("{} holds {other}, which dualroot can't mount. Use a partition with a file system of its own", part.path)
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
                    // The top of the file system, whichever subvolume is the default.
                    "btrfs" => Some("subvolid=5"),
                    _ => None,
                };
                mount(Some(part.node()), place, Some(fstype), flags | MsFlags::MS_RDONLY, data)
            }
        }
        .with_context(|| format!("{0} can't be mounted. Check its file system ('fsck {0}')", part.node()))?;
        if !at(&table()?, place).is_some_and(|m| m.is_on(part)) {
            bail!("the file system mounted on {} is not that of {}", place.display(), part.path);
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

    /// Opens the file system that is mounted on `dir`, without those mounted in it, in the private namespace; None if nothing is mounted.
    ///
    /// # Errors
    /// Those of mount(2).
    pub fn over(dir: &Path) -> Result<Option<Self>> {
        let table = table()?;
        let Some(there) = at(&table, dir) else { return Ok(None) };
        // Bound over itself: an initrd may have no other directory for it.
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

    /// Makes it writable, in the private namespace only, and flushes: FAT's dirty bit must reach the medium before any other write, or a
    /// power cut between them would not be noticed.
    ///
    /// # Errors
    /// The medium can't be written.
    pub fn make_writable(&mut self) -> Result<()> {
        self.writable = true;
        let why = |error: &Errno| match error {
            // mount(2): the device is read-only, or an error has made an ext4 so.
            Errno::EACCES | Errno::EROFS => ", because it is read-only. Check the disk and the kernel log ('journalctl -k')",
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

    /// The handle for reading and writing it.
    ///
    /// # Errors
    /// It was released; never before [`Held::release`].
    pub fn below(&self) -> Result<&Below> {
        self.below.as_ref().context("the file system is not mounted any more")
    }

    /// The directory that it is mounted on, in the private namespace.
    pub fn place(&self) -> &Path {
        &self.place
    }

    /// Flushes it, makes it read-only again if it was, and unmounts it. This clears FAT's dirty bit (failure mode 24).
    ///
    /// # Errors
    /// Those of flushing, remounting and unmounting.
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
        // There is something left to do only after another error, which is the one to report.
        let _ = self.put_back();
    }
}

/// The partitions of a spare that are mounted for a sync, by role.
#[derive(Default)]
pub struct Mounted(BTreeMap<Role, Held>);

impl Mounted {
    /// Adds a mounted partition.
    pub fn add(&mut self, role: Role, held: Held) {
        self.0.insert(role, held);
    }

    /// The partition of a role.
    ///
    /// # Errors
    /// It isn't mounted.
    pub fn get(&self, role: &Role) -> Result<&Held> {
        self.0.get(role).with_context(|| format!("{role}= is not mounted"))
    }

    /// The handle for the file system of a role.
    ///
    /// # Errors
    /// As [`Mounted::get`].
    pub fn below(&self, role: &Role) -> Result<&Below> {
        self.get(role)?.below()
    }

    /// Makes all of them writable, as [`Held::make_writable`].
    ///
    /// # Errors
    /// The first medium that can't be written.
    pub fn make_writable(&mut self) -> Result<()> {
        self.0.values_mut().try_for_each(Held::make_writable)
    }

    /// Releases all of them, as [`Held::release`].
    ///
    /// # Errors
    /// The first error; the others are still released.
    pub fn release(self) -> Result<()> {
        self.0.into_values().map(Held::release).fold(Ok(()), Result::and)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::scratch::Scratch;

    #[test]
    fn a_mounted_file_system_is_writable_in_the_private_namespace_only() {
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
    /// What a partition of the spare has on it is nothing that this machine is to run, or to take for a device.
    #[test]
    fn a_spare_s_file_system_is_data() {
        use nix::sys::statvfs::{FsFlags, statvfs};
        let Some(mut disk) = Scratch::ext4(&[]).map(|disk| disk.mount("rw")) else { return };
        let path = disk.device();
        let number = fs::read_to_string(format!("/sys/block/{}/dev", path.trim_start_matches("/dev/"))).unwrap();
        let part = serde_json::json!({
            "kname": "loop", "path": path, "maj:min": number.trim(), "fstype": "ext4", "log-sec": 512,
        });
        let part: Partition = serde_json::from_value(part).unwrap();
        // The loop device goes when nobody has it open.
        let _device = fs::File::open(&path).unwrap();
        // Where it is mounted, that mount is bound; then where it isn't.
        for seen in [true, false] {
            if !seen {
                disk.unmount();
            }
            let place = tempfile::tempdir().unwrap();
            let mut held = Held::open(&part, place.path()).unwrap();
            let flags = || statvfs(place.path()).unwrap().flags();
            if !seen {
                assert!(flags().contains(FsFlags::ST_NOSUID | FsFlags::ST_NODEV | FsFlags::ST_RDONLY), "{:?}", flags());
            }
            held.make_writable().unwrap();
            assert!(flags().contains(FsFlags::ST_NOSUID | FsFlags::ST_NODEV), "{:?}", flags());
            assert!(!flags().contains(FsFlags::ST_RDONLY));
            held.release().unwrap();
        }
    }
}
