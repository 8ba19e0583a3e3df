//! How the trees of the booted disk get to a spare.
//!
//! A [`Copier`] is one kind of copy. It gets all trees of a spare at once, and commits once, when all of them are filled: where one tree
//! can't be filled, all of them stay as they were. The trait lists first what a sync asks, then the steps that write, in the order in
//! which a sync calls them. A sync doesn't ask which kind of copy it is. A new kind is a new file in this room, and a line in [`choose`].

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

/// What is to be copied, and how.
#[derive(Clone, Debug)]
pub struct Request {
    /// The booted system's root.
    pub root: Root,
    /// The directory of its file system that is the booted root, where that is btrfs.
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
    /// Its path there.
    pub path: String,
    /// The subvolume that it names, as a path from the top of the file system.
    pub subvolume: Option<String>,
    /// Whether it is there for an older generation only.
    pub is_older: bool,
}

/// The spare as a copier finds it.
pub struct Target<'a> {
    /// Its mounted partitions.
    pub mounted: &'a Mounted,
    /// The roots that the spare's menu entries boot.
    pub booted: &'a [BootedRoot],
    /// Whether no sync has ever written it, so that nothing on it is worth keeping.
    pub is_new: bool,
    /// The files of the booted root that need other bytes on the spare, where its root is of this generation.
    pub files: &'a dyn Fn(Option<Generation>) -> Result<Vec<Rewritten>>,
}

/// The roots of a spare that its menu entries and files name. Where its root has no generations, all fields are empty: entries and files
/// then name partitions only.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Roots {
    /// The directory of the booted root's file system that runs: entries that boot another one are not copied.
    pub running: Option<String>,
    /// The generation that the entries name after the sync.
    pub current: Option<Generation>,
    /// Older generations that stay, and get menu entries of their own.
    pub kept: Vec<Generation>,
}

/// One kind of copy of a spare's trees.
pub trait Copier {
    /// Makes the source ready: each tree is seen without the file systems that are mounted in it.
    ///
    /// # Errors
    /// Those of mount(2).
    fn prepare(&mut self) -> Result<()>;

    /// Decides what will be done, as far as that can be known without writing anything.
    ///
    /// # Errors
    /// The spare or the booted disk can't be read.
    fn look(&mut self, target: &Target<'_>) -> Result<()>;

    /// Whether the trees fit on the spare at all. A tree that shares room with an older copy of itself is checked while it is filled.
    ///
    /// # Errors
    /// A refusal with the partition that is too small.
    fn check_room(&self, spare: &Mounted) -> Result<()>;

    /// The roles of the partitions that are copied to.
    fn roles(&self) -> Vec<&Role>;

    /// The files that are written with other bytes than the booted disk's.
    fn files(&self) -> &[Rewritten];

    /// The roots that menu entries name.
    fn roots(&self) -> &Roots;

    /// What will be done to each tree, a line each with its role in front, for `--dry-run`.
    fn describe(&self) -> Vec<String>;

    /// Paths of the booted root's file system that are not copied although they hold something.
    ///
    /// # Errors
    /// What is mounted can't be read.
    fn left_out(&self) -> Result<Vec<String>>;

    /// Makes the places that the trees are copied to.
    ///
    /// # Errors
    /// The spare can't be written.
    fn begin(&mut self, spare: &Mounted) -> Result<()>;

    /// Copies the trees, where a boot of the spare doesn't find the copies yet. `tell` is given the directory of each before it is copied.
    ///
    /// # Errors
    /// A file can't be read or written.
    fn fill(&mut self, spare: &Mounted, tell: &dyn Fn(&str)) -> Result<()>;

    /// Writes [`Copier::files`] into the copy. A kind whose copy has no place of its own writes them in [`Copier::commit`].
    ///
    /// # Errors
    /// The spare can't be written.
    fn rewrite(&mut self, spare: &Mounted) -> Result<()>;

    /// Makes the copy the one that a boot of the spare finds, once its entries name it.
    ///
    /// # Errors
    /// The spare can't be written.
    fn commit(&mut self, spare: &Mounted) -> Result<()>;

    /// Removes the modules of kernels that have gone, after the entries have been written.
    ///
    /// # Errors
    /// The spare can't be written.
    fn retire(&mut self, spare: &Mounted) -> Result<()>;

    /// The generations that can be removed now, as no entry in `booted` needs them.
    ///
    /// # Errors
    /// The spare can't be read.
    fn expired(&self, spare: &Mounted, booted: &[BootedRoot]) -> Result<Vec<Generation>>;

    /// Removes these generations. Returns subvolumes in them that hold something that was never copied; their generation stays.
    ///
    /// # Errors
    /// The spare can't be written.
    fn remove(&self, spare: &Mounted, expired: &[Generation]) -> Result<Vec<String>>;

    /// Makes the mounts of the spare's root show the generation that it boots. `dirs` are their mount points.
    ///
    /// # Errors
    /// A mount can't be taken away.
    fn show(&self, spare: &Mounted, dirs: &[PathBuf]) -> Result<()>;

    /// The directory in which the spare's root is seen; None where the disks share one.
    ///
    /// # Errors
    /// The root isn't mounted.
    fn root(&self, spare: &Mounted) -> Result<Option<PathBuf>>;

    /// The reasons why entries in `booted` boot no root, or another one than was copied.
    ///
    /// # Errors
    /// The spare can't be read.
    fn prove(&self, spare: &Mounted, booted: &[BootedRoot]) -> Result<Vec<Fault>>;

    /// Whether this subvolume, a path from the top of the file system, is in the spare's root. A root that isn't btrfs has none that could
    /// be missing.
    fn has_subvolume(&self, spare: &Mounted, path: &str) -> bool;

    /// Lets go of the source, after the spare was proved.
    fn end(&mut self) {}
}

/// The copier for a spare, from its partitions. The disks share the root where it has none.
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
