//! File systems that are mounted for a sync, in a mount namespace of its own.

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

/// The partitions of a spare that are mounted for a sync, by role.
#[derive(Default)]
pub struct Mounted(BTreeMap<Role, Held>);

impl Mounted {
    /// Takes in a partition.
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

    /// The handle to work below the partition of a role.
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

    /// Lets go of all of them, as [`Held::release`].
    ///
    /// # Errors
    /// The first that fails; the others are let go of all the same.
    pub fn release(self) -> Result<()> {
        self.0.into_values().map(Held::release).fold(Ok(()), Result::and)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
}
