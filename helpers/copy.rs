//! Copying the trees of the booted disk to a spare.
//!
//! A [`Copier`] is one kind of copy. It copies all trees of a spare, and commits them together after all were filled: if one tree can't be
//! filled, all of them stay unchanged. The trait lists the questions of a sync first, then the steps that write, in the order in which a sync
//! calls them. A sync doesn't ask which kind of copy it is. A new kind is a new file in this room, and a line in [`choose`].

pub(crate) mod changes;
pub(crate) mod generation;
pub(crate) mod generations;
pub(crate) mod modules;
pub(crate) mod rsync;
pub(crate) mod rules;
pub(crate) mod source;
pub mod stage;
pub(crate) mod staged;
pub(crate) mod tree;

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::Result;

use crate::base::fault::Fault;
use crate::base::refusal::refused;
use crate::base::root::Root;
use crate::base::types::Role;
use crate::copy::generations::Generations;
use crate::copy::staged::Staged;
use crate::devices::held::Mounted;
use crate::devices::inventory::Partition;
use crate::names::files::Rewritten;
use crate::names::generation::Generation;

/// The trees to copy, and the settings for the copy.
#[derive(Clone, Debug)]
pub struct Request {
    /// The booted system's root.
    pub root: Root,
    /// The directory of the file system that is the booted root; None where that isn't btrfs.
    pub running: Option<String>,
    /// The roles of the disks' partitions that hold trees.
    pub roles: Vec<Role>,
    /// Rules of `exclude=`.
    pub exclude: Vec<String>,
    /// The number of generations of a root to keep (`generations=`).
    pub generations: usize,
}

/// The root that a menu entry of the spare boots.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BootedRoot {
    /// The boot partition that the entry is on.
    pub role: Role,
    /// The entry's path on that partition.
    pub path: String,
    /// The subvolume that the entry names, as a path from the top of the file system.
    pub subvolume: Option<String>,
    /// Whether the entry was made for an older generation.
    pub is_older: bool,
}

/// The state of the spare before the copy.
pub struct Target<'a> {
    /// Its mounted partitions.
    pub mounted: &'a Mounted,
    /// The roots that the spare's menu entries boot.
    pub booted: &'a [BootedRoot],
    /// Whether no sync has ever written the spare, so that nothing on it is worth keeping.
    pub is_new: bool,
    /// The files of the booted root that need other bytes on the spare, where its root is of this generation.
    pub files: &'a dyn Fn(Option<Generation>) -> Result<Vec<Rewritten>>,
}

/// The roots that the spare's menu entries and files name. For a root without generations, all fields are empty: entries and files name
/// partitions only.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Roots {
    /// The directory of the file system that is the booted root. Entries that boot another directory are not copied.
    pub running: Option<String>,
    /// The generation that the entries name after the sync.
    pub current: Option<Generation>,
    /// The older generations that stay. Each gets menu entries of its own.
    pub kept: Vec<Generation>,
}

/// One kind of copy of a spare's trees.
pub trait Copier {
    /// Mounts each tree of the source without the file systems that are mounted in it.
    ///
    /// # Errors
    /// Those of mount(2).
    fn prepare(&mut self) -> Result<()>;

    /// Plans the copy, without writing anything.
    ///
    /// # Errors
    /// The spare or the booted disk can't be read.
    fn decide(&mut self, target: &Target<'_>) -> Result<()>;

    /// Checks that the trees fit on the spare. A tree that shares its files with an older copy is checked while it is filled.
    ///
    /// # Errors
    /// A refusal that names the partition that is too small.
    fn check_room(&self, spare: &Mounted) -> Result<()>;

    /// The roles of the trees that are copied.
    fn roles(&self) -> Vec<&Role>;

    /// The files that are written with other bytes than the booted disk's.
    fn files(&self) -> &[Rewritten];

    /// The roots that the spare's menu entries name.
    fn roots(&self) -> &Roots;

    /// Descriptions of the changes to each tree, a line each that begins with the tree's role, for `--dry-run`.
    fn describe(&self) -> Vec<String>;

    /// Directories of the booted root's file system that hold files, but are not copied.
    ///
    /// # Errors
    /// The mounts can't be read.
    fn left_out(&self) -> Result<Vec<String>>;

    /// Makes the directories that the trees are copied to.
    ///
    /// # Errors
    /// The spare can't be written.
    fn begin(&mut self, spare: &Mounted) -> Result<()>;

    /// Copies the trees to where a boot of the spare doesn't use them yet. `report` is called with the directory of each tree first.
    ///
    /// # Errors
    /// A file can't be read or written.
    fn fill(&mut self, spare: &Mounted, report: &dyn Fn(&str)) -> Result<()>;

    /// Writes [`Copier::files`] into the copy. A kind that copies into the spare's own tree writes them in [`Copier::commit`].
    ///
    /// # Errors
    /// The spare can't be written.
    fn rewrite(&mut self, spare: &Mounted) -> Result<()>;

    /// Moves the copy to its place. A boot of the spare uses it once the spare's entries name it.
    ///
    /// # Errors
    /// The spare can't be written.
    fn commit(&mut self, spare: &Mounted) -> Result<()>;

    /// Gives up a copy of which a step has failed. Where [`Copier::commit`] hasn't changed any tree yet, all of them stay as they were;
    /// otherwise the next sync, or a boot of the spare, completes the copy.
    fn abandon(&mut self, spare: &Mounted);

    /// Removes the modules of removed kernels. This follows the writing of the entries.
    ///
    /// # Errors
    /// The spare can't be written.
    fn retire(&mut self, spare: &Mounted) -> Result<()>;

    /// The generations that can be removed now, because no entry in `booted` needs them.
    ///
    /// # Errors
    /// The spare can't be read.
    fn expired(&self, spare: &Mounted, booted: &[BootedRoot]) -> Result<Vec<Generation>>;

    /// Removes these generations. Returns the subvolumes in them that hold files and were never copied; a generation with one stays.
    ///
    /// # Errors
    /// The spare can't be written.
    fn remove(&self, spare: &Mounted, expired: &[Generation]) -> Result<Vec<String>>;

    /// Makes the mounts of the spare's root show the generation that it boots. `dirs` are their mount points.
    ///
    /// # Errors
    /// A mount can't be removed.
    fn show(&self, spare: &Mounted, dirs: &[PathBuf]) -> Result<()>;

    /// The directory of the spare's root; None where the disks share a root.
    ///
    /// # Errors
    /// The root isn't mounted.
    fn root(&self, spare: &Mounted) -> Result<Option<PathBuf>>;

    /// The reasons why entries in `booted` boot no root, or not the copy.
    ///
    /// # Errors
    /// The spare can't be read.
    fn prove(&self, spare: &Mounted, booted: &[BootedRoot]) -> Result<Vec<Fault>>;

    /// Whether the spare's root has this subvolume, a path from the top of the file system. Always true for a root that isn't btrfs.
    fn has_subvolume(&self, spare: &Mounted, path: &str) -> bool;

    /// Unmounts the source, after the spare was proved.
    fn end(&mut self) {}
}

/// The copier for a spare with these partitions. A spare without a root partition shares its root with the booted disk.
///
/// # Errors
/// A refusal where one of the two roots is btrfs and the other isn't.
pub fn choose(request: Request, parts: &BTreeMap<Role, &Partition>) -> Result<Box<dyn Copier>> {
    let Some(part) = parts.get(&Role::Root).copied() else { return Ok(Box::new(Staged::new(request))) };
    let is_btrfs = part.fstype.as_deref() == Some("btrfs");
    match &request.running {
        Some(running) if is_btrfs => {
            let running = running.clone();
            Ok(Box::new(Generations::new(request, running, part.clone())))
        }
        None if !is_btrfs => Ok(Box::new(Staged::new(request))),
        running => Err(refused(format!(
            "root= of the spare, {}, holds {}, but the root of the booted disk is {}; both must be btrfs, or neither. Make a file \
             system of the same kind there",
            part.path,
            part.fstype.as_deref().unwrap_or("no file system"),
            if running.is_some() { "btrfs" } else { "not" },
        ))),
    }
}
