//! Staged files: a sync writes all changed files of a spare's tree into a directory of that tree, and then moves them to their places by
//! renames.
//!
//! `.dualroot/new` at the top of the tree holds the changed files, each under its own path and with all its attributes. `.dualroot/plan`
//! lists the operations. The plan is written last, after everything else is on the medium. Without a plan, no file was replaced yet, and
//! the staged files are discarded. With a plan, the source isn't needed any more: the next sync carries the plan out, or the spare itself
//! while it boots. Every operation can be repeated, so that an interrupted plan is simply carried out again from its start.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::base::types::Role;
use crate::conf::Config;
use crate::devices::mounts::{self, Mount};
use crate::write::below::{Below, is_dir, is_link, join};
use crate::write::change::{Change, Content};

/// The directory of the staged files and the plan, at the top of a tree.
pub const DIRECTORY: &str = ".dualroot";
/// The directory of the staged files.
pub const NEW: &str = ".dualroot/new";
/// The file with the plan.
const PLAN: &str = ".dualroot/plan";
/// The first line of a plan. A version of dualroot with another format writes another line.
const FIRST: &[u8] = b"dualroot 1";
/// The last line of a plan.
const LAST: &[u8] = b".";

/// A step from the old tree to the new one.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Op {
    /// A staged file moves to its place, or a staged directory with everything in it.
    Put { path: OsString, directory: bool },
    /// A file or directory that the source doesn't have is removed.
    Remove { path: OsString, directory: bool },
    /// A directory that exists on both disks gets new attributes. The plan holds its time, because the time of the staged directory changes
    /// when files are moved out of it.
    SetAttributes { path: OsString, time: (i64, i64) },
}

impl Op {
    fn line(&self) -> Vec<u8> {
        let (head, path) = match self {
            Self::Put { path, directory: true } => ("D".to_owned(), path),
            Self::Put { path, directory: false } => ("F".to_owned(), path),
            Self::Remove { path, directory: true } => ("d".to_owned(), path),
            Self::Remove { path, directory: false } => ("f".to_owned(), path),
            Self::SetAttributes { path, time: (seconds, nanoseconds) } => (format!("{seconds}.{nanoseconds}"), path),
        };
        [head.as_bytes(), b" ", path.as_bytes()].concat()
    }

    fn parse(line: &[u8]) -> Option<Self> {
        let space = line.iter().position(|b| *b == b' ')?;
        let (head, path) = (line.get(..space)?, line.get(space + 1..)?);
        let mut parts = path.split(|b| *b == b'/').peekable();
        let is_staged = parts.peek() == Some(&DIRECTORY.as_bytes());
        let is_top = path == b".";
        if is_staged || (!is_top && parts.any(|part| matches!(part, b"" | b"." | b".."))) {
            return None;
        }
        let path = OsStr::from_bytes(path).to_owned();
        match head {
            b"D" | b"F" if !is_top => Some(Self::Put { path, directory: head == b"D" }),
            b"d" | b"f" if !is_top => Some(Self::Remove { path, directory: head == b"d" }),
            time => {
                let (seconds, nanoseconds) = std::str::from_utf8(time).ok()?.split_once('.')?;
                Some(Self::SetAttributes { path, time: (seconds.parse().ok()?, nanoseconds.parse().ok()?) })
            }
        }
    }
}

/// The staged files that [`complete`] found.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Found {
    /// No staged files.
    Nothing,
    /// Files without a plan. They were removed; the tree is unchanged.
    Half,
    /// Files with a plan. They were moved to their places.
    Whole,
    /// Files whose plan can't be used, for this reason. They were removed; the tree may hold files of two generations.
    Unusable(String),
}

/// Removes older staged files, and makes an empty `.dualroot/new` in the tree.
///
/// # Errors
/// Those of the system calls.
pub fn begin(tree: &Below) -> Result<()> {
    discard(tree)?;
    // Files in directories that only their owner may enter stay private here, too.
    tree.make_private(OsStr::new(DIRECTORY))?;
    tree.make_private(OsStr::new(NEW))
}

/// Removes the staged files and the plan.
///
/// # Errors
/// Those of the system calls.
pub fn discard(tree: &Below) -> Result<()> {
    // The plan goes first: staged files without a plan are never used.
    tree.unlink(OsStr::new(PLAN), false)?;
    tree.clear(OsStr::new(DIRECTORY))
}

/// Writes the plan, after flushing the staged files to the medium. `gone` are the paths that the source doesn't have: a directory's path
/// ends in a slash, and comes after the paths in it. `top` has the attributes for the top of the tree.
///
/// # Errors
/// Those of the system calls; a directory of the tree into which no file can be renamed.
pub fn seal(tree: &Below, gone: &[OsString], top: &File) -> Result<()> {
    let new = tree.sub(OsStr::new(NEW))?.with_context(|| format!("{NEW} has gone"))?;
    let mut ops = operations(&new, tree, gone)?;
    let meta = top.metadata().with_context(|| format!("the attributes of {NEW}"))?;
    let (path, time) = (OsString::from("."), (meta.mtime(), meta.mtime_nsec()));
    new.set_attributes(&path, top, time)?;
    ops.push(Op::SetAttributes { path, time });
    let lines: Vec<Vec<u8>> = [FIRST.to_vec()].into_iter().chain(ops.iter().map(Op::line)).chain([LAST.to_vec()]).collect();
    // No path contains NUL.
    let content = Content::Bytes(lines.join(&0));
    tree.apply(&Change::Replace { path: PLAN.into(), content, like: None })
}

/// The operations that turn the old tree into the new one, in a safe order: new files, which nothing in the tree refers to yet, then changed
/// files, then symbolic links, whose targets exist by then, then removals of files that no link leads to any more, then attributes.
fn operations(new: &Below, tree: &Below, gone: &[OsString]) -> Result<Vec<Op>> {
    let (mut added, mut changed, mut links, mut attributes) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let device = tree.device()?;
    let mut dirs = vec![OsString::from(".")];
    while let Some(dir) = dirs.pop() {
        for name in new.names(&dir)? {
            let path = join(&dir, &name);
            let staged = new.stat(&path)?.with_context(|| format!("{NEW}/{} has gone", path.display()))?;
            let old = tree.stat(&path)?;
            let directory = is_dir(&staged);
            if let Some(old) = &old
                && directory
                && is_dir(old)
            {
                if old.st_dev != device {
                    if new.names(&path)?.is_empty() {
                        // Only its attributes differ, and those of another file system stay as they are.
                        continue;
                    }
                    bail!(
                        "'{}' on the spare is a file system or subvolume of its own, and so no file can be renamed into it; nothing was \
                         replaced. Replace it by a plain directory with the same files",
                        path.display()
                    );
                }
                attributes.push(Op::SetAttributes { path: path.clone(), time: (staged.st_mtime, staged.st_mtime_nsec) });
                dirs.push(path);
                continue;
            }
            let list = match &old {
                // This file itself is unchanged: it was staged together with a new name of it.
                Some(old) if (old.st_dev, old.st_ino) == (staged.st_dev, staged.st_ino) => continue,
                _ if is_link(&staged) => &mut links,
                None => &mut added,
                Some(_) => &mut changed,
            };
            list.push(Op::Put { path, directory });
        }
    }
    let gone = gone.iter().map(|path| match path.as_bytes() {
        [dir @ .., b'/'] => Op::Remove { path: OsStr::from_bytes(dir).to_owned(), directory: true },
        _ => Op::Remove { path: path.clone(), directory: false },
    });
    let ops: Vec<Op> = added.into_iter().chain(changed).chain(links).chain(gone).chain(attributes).collect();
    check_mutable(&ops, tree)?;
    Ok(ops)
}

/// Refuses an immutable file in the tree: it would stop the plan halfway, now and at every further try.
fn check_mutable(ops: &[Op], tree: &Below) -> Result<()> {
    let mut paths: BTreeSet<&OsStr> = BTreeSet::from([OsStr::new(".")]);
    for op in ops {
        let (Op::Put { path, .. } | Op::Remove { path, .. } | Op::SetAttributes { path, .. }) = op;
        let dir = Path::new(path).parent().map(Path::as_os_str).filter(|dir| !dir.is_empty());
        paths.extend([Some(path.as_os_str()), dir].into_iter().flatten());
    }
    for path in paths {
        if tree.is_fixed(path)? {
            bail!(
                "'{}' on the spare is immutable or append-only; nothing was replaced. Boot that disk or mount it for writing, and \
                 remove that attribute with 'chattr -ia', or name the path in exclude=",
                path.display()
            );
        }
    }
    Ok(())
}

/// A plan that was read from the medium, and the staged files.
struct SavedPlan {
    ops: Vec<Op>,
    new: Below,
}

fn load(tree: &Below) -> Result<Option<SavedPlan>> {
    let Some(mut file) = tree.file(PLAN)? else { return Ok(None) };
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).with_context(|| format!("{PLAN} can't be read"))?;
    let lines: Vec<&[u8]> = bytes.split(|b| *b == 0).collect();
    let [FIRST, ops @ .., LAST] = lines.as_slice() else {
        bail!("{PLAN} is not a plan of this version of dualroot");
    };
    let parse = |line: &&[u8]| Op::parse(line).with_context(|| format!("{PLAN} has the invalid line '{}'", line.escape_ascii()));
    let ops = ops.iter().map(parse).collect::<Result<_>>()?;
    let new = tree.sub(OsStr::new(NEW))?.with_context(|| format!("{PLAN} exists without {NEW}"))?;
    Ok(Some(SavedPlan { ops, new }))
}

/// Carries out the plan in the tree, if there is one, and removes the staged files.
///
/// # Errors
/// Those of the system calls. A later call completes the plan.
pub fn complete(tree: &Below) -> Result<Found> {
    complete_with(tree, &mut || Ok(()))
}

/// As [`complete`]; `step` is called before each change, and an error from it stops the work.
pub(crate) fn complete_with(tree: &Below, step: &mut dyn FnMut() -> Result<()>) -> Result<Found> {
    let plan = match load(tree) {
        Ok(Some(plan)) => plan,
        Ok(None) if tree.stat(OsStr::new(DIRECTORY))?.is_none() => return Ok(Found::Nothing),
        other => {
            step()?;
            discard(tree)?;
            return Ok(other.map_or_else(|e| Found::Unusable(format!("{e:#}")), |_| Found::Half));
        }
    };
    for op in &plan.ops {
        step()?;
        plan.carry_out(op, tree)?;
    }
    step()?;
    tree.apply(&Change::Barrier)?;
    step()?;
    tree.unlink(OsStr::new(PLAN), false)?;
    step()?;
    discard(tree)?;
    // Removing the directory has changed the time of the top, so that it is set again. The staged top was removed, but is still open, and
    // keeps its attributes.
    for top in plan.ops.iter().filter(|op| matches!(op, Op::SetAttributes { path, .. } if path == ".")) {
        step()?;
        plan.carry_out(top, tree)?;
    }
    Ok(Found::Whole)
}

impl SavedPlan {
    /// Carries out one operation, unless that was done already.
    fn carry_out(&self, op: &Op, tree: &Below) -> Result<()> {
        match op {
            Op::Put { path, directory } => {
                // After the move, nothing is staged at this path. After an exchange, the old file is, which is of the other kind.
                if self.new.stat(path)?.is_none_or(|staged| is_dir(&staged) != *directory) {
                    return Ok(());
                }
                match tree.stat(path)? {
                    Some(old) if is_dir(&old) != *directory => tree.take(&self.new, path, true),
                    // Somebody has made this directory after the plan was written. The next sync copies the files that it lacks.
                    Some(_) if *directory => Ok(()),
                    _ => tree.take(&self.new, path, false),
                }
            }
            Op::Remove { path, directory } => tree.unlink(path, *directory),
            Op::SetAttributes { path, time } => match self.new.sub(path)? {
                Some(staged) => tree.set_attributes(path, &staged.as_file()?, *time),
                None => Ok(()),
            },
        }
    }
}

/// The trees of the running system that hold staged files, each with its mount point: the root, `/usr`, and the trees of the configured
/// disks.
///
/// # Errors
/// Those of the system calls.
pub fn left_here(config: Option<&Config>) -> Result<Vec<(PathBuf, Below)>> {
    // /usr may hold the configuration, and so is searched without one, too.
    let roles = config.iter().flat_map(|config| &config.disks).flat_map(|disk| disk.parts.keys());
    let dirs = [&Role::Root, &Role::Usr].into_iter().chain(roles).filter_map(Role::tree);
    left_in(&mounts::table()?, dirs.collect())
}

fn left_in(table: &[Mount], dirs: BTreeSet<&str>) -> Result<Vec<(PathBuf, Below)>> {
    let mut found = Vec::new();
    for dir in dirs {
        let dir = PathBuf::from(if dir.is_empty() { "/" } else { dir });
        // Where no file system is mounted, `.dualroot` would be somebody's own directory. An automount is not opened: it would make the boot
        // wait for its disk.
        if mounts::at(table, &dir).is_none_or(|mount| mount.fstype == "autofs") {
            continue;
        }
        let tree = Below::open(&dir)?;
        if tree.stat(OsStr::new(DIRECTORY))?.is_some() {
            found.push((dir, tree));
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    /// A tree with staged files, and a directory outside the tree.
    fn staged(plan: &[u8]) -> (tempfile::TempDir, Below) {
        let tmp = tempfile::tempdir().unwrap();
        for (path, text) in [("outside/file", "kept"), ("tree/file", "old"), ("tree/.dualroot/new/file", "new")] {
            fs::create_dir_all(tmp.path().join(path).parent().unwrap()).unwrap();
            fs::write(tmp.path().join(path), text).unwrap();
        }
        symlink("../outside", tmp.path().join("tree/link")).unwrap();
        fs::create_dir(tmp.path().join("tree/.dualroot/new/link")).unwrap();
        fs::write(tmp.path().join("tree/.dualroot/new/link/file"), "new").unwrap();
        fs::write(tmp.path().join("tree/.dualroot/plan"), plan).unwrap();
        let below = Below::open(&tmp.path().join("tree")).unwrap();
        (tmp, below)
    }

    fn read(dir: &Path, path: &str) -> String {
        fs::read_to_string(dir.join(path)).unwrap_or_default()
    }

    #[test]
    fn f18_a_plan_is_carried_out_and_removed() {
        let (tmp, below) = staged(b"dualroot 1\0F file\x001234.5 .\0.");
        assert_eq!(complete(&below).unwrap(), Found::Whole);
        assert_eq!(read(tmp.path(), "tree/file"), "new");
        assert!(!tmp.path().join("tree/.dualroot").exists());
        assert_eq!(fs::metadata(tmp.path().join("tree")).unwrap().mtime(), 1234);
        assert_eq!(complete(&below).unwrap(), Found::Nothing);
    }

    #[test]
    fn f18_staged_files_without_a_plan_are_removed() {
        let (tmp, below) = staged(b"");
        fs::rename(tmp.path().join("tree/.dualroot/plan"), tmp.path().join("tree/.dualroot/.dualroot-plan")).unwrap();
        assert_eq!(complete(&below).unwrap(), Found::Half);
        assert_eq!(read(tmp.path(), "tree/file"), "old");
        assert!(!tmp.path().join("tree/.dualroot").exists());
    }

    #[test]
    fn f26_an_invalid_plan_is_not_carried_out() {
        let plans: [&[u8]; 17] = [
            b"",
            b"dualroot 1",
            b"dualroot 1\0F file",
            b"dualroot 1\0F fi",
            b"dualroot 2\0F file\0.",
            b"dualroot 1\0F file\0f ../outside/file\0.",
            b"dualroot 1\0F file\0f /etc/passwd\0.",
            b"dualroot 1\0F file\0f link/../../outside/file\0.",
            b"dualroot 1\0F file\0d ..\0.",
            b"dualroot 1\0F file\0d .\0.",
            b"dualroot 1\0F file\0D .\0.",
            b"dualroot 1\0F file\0f \0.",
            b"dualroot 1\0F file\0f .dualroot/new\0.",
            b"dualroot 1\0F file\0D a//b\0.",
            b"dualroot 1\0F file\0x file\0.",
            b"dualroot 1\0F file\x001.x file\0.",
            b"dualroot 1\0F file\0\xff\0.",
        ];
        for plan in plans {
            let (tmp, below) = staged(plan);
            let found = complete(&below).unwrap();
            assert!(matches!(found, Found::Unusable(_)), "{}: {found:?}", plan.escape_ascii());
            assert_eq!((read(tmp.path(), "tree/file"), read(tmp.path(), "outside/file")), ("old".into(), "kept".into()));
            assert!(!tmp.path().join("tree/.dualroot").exists());
        }
    }

    #[test]
    fn f26_no_plan_leads_out_of_the_tree() {
        let (tmp, below) = staged(b"dualroot 1\0F link/file\0f link/file\x001.1 link\0.");
        assert_eq!(complete(&below).unwrap(), Found::Whole);
        assert_eq!(read(tmp.path(), "outside/file"), "kept");
        assert!(fs::metadata(tmp.path().join("outside")).unwrap().mtime() > 1);
    }

    #[test]
    fn f18_mounts_in_the_tree_do_not_stop_a_plan() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let (tmp, _) = staged(b"dualroot 1\0F file\x001234.5 dev\x001234.5 etc\x001234.5 .\0.");
        for dir in ["dev", "etc", ".dualroot/new/dev", ".dualroot/new/etc"] {
            fs::create_dir(tmp.path().join("tree").join(dir)).unwrap();
        }
        crate::devices::held::enter_private_namespace().unwrap();
        use nix::mount::{MsFlags, mount};
        mount(Some("none"), &tmp.path().join("tree/dev"), Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
        let below = Below::open(&tmp.path().join("tree")).unwrap();
        assert_eq!(complete(&below).unwrap(), Found::Whole);
        assert_eq!(read(tmp.path(), "tree/file"), "new");
        let time = |dir: &str| fs::metadata(tmp.path().join("tree").join(dir)).unwrap().mtime();
        assert!(time("etc") == 1234 && time("dev") != 1234);
        assert!(!tmp.path().join("tree/.dualroot").exists());
    }

    #[test]
    fn f26_links_in_the_place_of_staged_files_are_removed_and_not_followed() {
        let tmp = tempfile::tempdir().unwrap();
        fs::create_dir_all(tmp.path().join("outside/new/deep")).unwrap();
        fs::write(tmp.path().join("outside/plan"), "dualroot 1\0f file\0.").unwrap();
        let tree = tmp.path().join("tree");
        fs::create_dir(&tree).unwrap();
        fs::write(tree.join("file"), "kept").unwrap();
        let below = Below::open(&tree).unwrap();
        let directory = tree.join(".dualroot");
        let kinds: [&dyn Fn(); 4] = [
            &|| symlink("../outside", &directory).unwrap(),
            &|| fs::write(&directory, "").unwrap(),
            &|| {
                fs::create_dir(&directory).unwrap();
                symlink("../../outside", directory.join("new")).unwrap();
                symlink("../../outside/plan", directory.join("plan")).unwrap();
            },
            &|| {
                fs::create_dir_all(directory.join("new/deep/deeper")).unwrap();
                symlink("/etc", directory.join("new/deep/etc")).unwrap();
            },
        ];
        for make in kinds {
            make();
            complete(&below).unwrap();
            assert!(directory.symlink_metadata().is_err());
            make();
            begin(&below).unwrap();
            assert!(
                fs::symlink_metadata(directory.join("new")).unwrap().is_dir()
                    && fs::read_dir(directory.join("new")).unwrap().count() == 0
            );
            discard(&below).unwrap();
        }
        assert_eq!(read(&tree, "file"), "kept");
        assert!(tmp.path().join("outside/new/deep").exists() && tmp.path().join("outside/plan").exists());
    }

    #[test]
    fn f18_a_link_comes_after_its_possible_targets() {
        let tmp = tempfile::tempdir().unwrap();
        let below = Below::open(tmp.path()).unwrap();
        begin(&below).unwrap();
        symlink("z", tmp.path().join(NEW).join("a")).unwrap();
        fs::write(tmp.path().join("m"), "old").unwrap();
        for name in ["m", "z"] {
            fs::write(tmp.path().join(NEW).join(name), "new").unwrap();
        }
        seal(&below, &["gone".into()], &File::open(tmp.path()).unwrap()).unwrap();
        let ops: Vec<Vec<u8>> = load(&below).unwrap().unwrap().ops.iter().map(Op::line).collect();
        assert_eq!(ops[..4], [&b"F z"[..], b"F m", b"F a", b"f gone"], "new names, then changed files, then links");
    }

    #[test]
    fn f18_each_line_of_a_plan_is_read_as_it_was_written() {
        let path = || OsString::from("a b/c");
        let mut ops = vec![
            Op::SetAttributes { path: path(), time: (-1, 999_999_999) },
            Op::SetAttributes { path: ".".into(), time: (5, 0) },
        ];
        for directory in [false, true] {
            ops.extend([Op::Put { path: path(), directory }, Op::Remove { path: path(), directory }]);
        }
        for op in ops {
            assert_eq!(Op::parse(&op.line()), Some(op));
        }
    }

    #[test]
    fn only_the_owner_can_read_staged_files() {
        use std::os::unix::fs::PermissionsExt;
        let tmp = tempfile::tempdir().unwrap();
        begin(&Below::open(tmp.path()).unwrap()).unwrap();
        for path in [DIRECTORY, NEW] {
            assert_eq!(fs::metadata(tmp.path().join(path)).unwrap().permissions().mode() & 0o7777, 0o700, "{path}");
        }
    }

    #[test]
    fn staged_files_are_found_where_a_tree_is_mounted() {
        let (tmp, _) = staged(b"");
        let (tree, outside) = (tmp.path().join("tree"), tmp.path().join("outside"));
        let table: Vec<Mount> = [&tree, &outside]
            .iter()
            .map(|dir| Mount::parse(&format!("36 35 98:0 / {} rw - ext4 /dev/sdb2 rw", dir.display())).unwrap())
            .collect();
        let dirs: BTreeSet<&str> = [&tree, &outside].iter().map(|dir| dir.to_str().unwrap()).collect();
        let found = |table: &[Mount]| left_in(table, dirs.clone()).unwrap().into_iter().map(|(dir, _)| dir).collect::<Vec<_>>();
        assert_eq!(found(&table), std::slice::from_ref(&tree));
        let automount = Mount::parse(&format!("36 35 0:40 / {} rw - autofs systemd-1 rw", tree.display())).unwrap();
        assert!(found(&[automount]).is_empty(), "an automount is not mounted to search it");
        assert!(found(&table[1..]).is_empty(), "somebody's directory of that name in another file system");
    }
}
