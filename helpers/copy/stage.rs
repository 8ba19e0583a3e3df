//! What a sync puts into a tree of a spare: staged whole in that tree, and then put into its place by renames.
//!
//! `.dualroot/new` at the top of the tree holds all that is new, each thing under its own path and with all its attributes, and
//! `.dualroot/plan` what is to be done with it. The plan comes last, once everything else is on the medium. Where there is none,
//! nothing has been replaced, and what is staged counts for nothing. Where there is one, nothing of the source is needed any
//! more: whoever finds it carries it out, be it the next sync or the spare itself while it boots. Every operation may be done
//! again, so that it doesn't matter how far somebody else has come.

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

/// Where everything is, at the top of a tree.
pub const DIRECTORY: &str = ".dualroot";
/// What is new.
pub const NEW: &str = ".dualroot/new";
/// What is to be done.
const PLAN: &str = ".dualroot/plan";
/// The first line of a plan: another version of dualroot, which may put something else there, says so.
const FIRST: &[u8] = b"dualroot 1";
/// The last line.
const LAST: &[u8] = b".";

/// A step from the old tree to the new one.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Op {
    /// What is staged takes its place: whole, if it is a directory.
    Put { path: OsString, directory: bool },
    /// What the source doesn't have goes.
    Remove { path: OsString, directory: bool },
    /// A directory that was and is there gets its attributes. Its time is in the plan: that of the staged one changes when what
    /// is in it takes its place.
    Dress { path: OsString, time: (i64, i64) },
}

impl Op {
    fn line(&self) -> Vec<u8> {
        let (head, path) = match self {
            Self::Put { path, directory: true } => ("D".to_owned(), path),
            Self::Put { path, directory: false } => ("F".to_owned(), path),
            Self::Remove { path, directory: true } => ("d".to_owned(), path),
            Self::Remove { path, directory: false } => ("f".to_owned(), path),
            Self::Dress { path, time: (seconds, nanoseconds) } => (format!("{seconds}.{nanoseconds}"), path),
        };
        [head.as_bytes(), b" ", path.as_bytes()].concat()
    }

    fn parse(line: &[u8]) -> Option<Self> {
        let space = line.iter().position(|b| *b == b' ')?;
        let (head, path) = (line.get(..space)?, line.get(space + 1..)?);
        let mut parts = path.split(|b| *b == b'/').peekable();
        let ours = parts.peek() == Some(&DIRECTORY.as_bytes());
        let top = path == b".";
        if ours || (!top && parts.any(|part| matches!(part, b"" | b"." | b".."))) {
            return None;
        }
        let path = OsStr::from_bytes(path).to_owned();
        match head {
            b"D" | b"F" if !top => Some(Self::Put { path, directory: head == b"D" }),
            b"d" | b"f" if !top => Some(Self::Remove { path, directory: head == b"d" }),
            time => {
                let (seconds, nanoseconds) = std::str::from_utf8(time).ok()?.split_once('.')?;
                Some(Self::Dress { path, time: (seconds.parse().ok()?, nanoseconds.parse().ok()?) })
            }
        }
    }
}

/// What [`complete`] came upon.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Found {
    /// Nothing.
    Nothing,
    /// Something that was not whole. It was removed; the tree is as old as it was.
    Half,
    /// Something whole. It has taken its place.
    Whole,
    /// Something whose plan can't be used, for this reason. It was removed; what is in the tree is unknown.
    Unusable(String),
}

/// Begins anew: an empty `.dualroot/new` in the tree.
///
/// # Errors
/// Those of the system calls.
pub fn begin(tree: &Below) -> Result<()> {
    discard(tree)?;
    // Files whose directories nobody else may enter are not to be seen here either.
    tree.make_private(OsStr::new(DIRECTORY))?;
    tree.make_private(OsStr::new(NEW))
}

/// Removes what is staged.
///
/// # Errors
/// Those of the system calls.
pub fn discard(tree: &Below) -> Result<()> {
    // The plan first: without it, the rest is known to be good for nothing.
    tree.unlink(OsStr::new(PLAN), false)?;
    tree.clear(OsStr::new(DIRECTORY))
}

/// Declares what is staged to be whole, once it is on the medium. `gone` are the paths that the source doesn't have, directories
/// with a slash behind them and after what is in them; `top` has the attributes that the top of the tree is to have.
///
/// # Errors
/// Those of the system calls; a directory of the tree in which nothing can be put by a rename.
pub fn seal(tree: &Below, gone: &[OsString], top: &File) -> Result<()> {
    let new = tree.sub(OsStr::new(NEW))?.with_context(|| format!("{NEW} has gone"))?;
    let mut ops = plan(&new, tree, gone)?;
    let meta = top.metadata().with_context(|| format!("the attributes of {NEW}"))?;
    let (path, time) = (OsString::from("."), (meta.mtime(), meta.mtime_nsec()));
    new.set_attributes(&path, top, time)?;
    ops.push(Op::Dress { path, time });
    let lines: Vec<Vec<u8>> = [FIRST.to_vec()].into_iter().chain(ops.iter().map(Op::line)).chain([LAST.to_vec()]).collect();
    // NUL is the one byte that is in no path.
    let content = Content::Bytes(lines.join(&0));
    tree.apply(&Change::Replace { path: PLAN.into(), content, like: None })
}

/// What turns the tree into the new one. What nothing there refers to yet comes first, and symbolic links come after what they
/// may lead to; what is gone goes once nothing leads there any more.
fn plan(new: &Below, tree: &Below, gone: &[OsString]) -> Result<Vec<Op>> {
    let (mut fresh, mut changed, mut links, mut dress) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let device = tree.device()?;
    let mut dirs = vec![OsString::from(".")];
    while let Some(dir) = dirs.pop() {
        for name in new.names(&dir)? {
            let path = join(&dir, &name);
            let staged = new.stat(&path)?.with_context(|| format!("{NEW}/{} has gone", path.display()))?;
            let there = tree.stat(&path)?;
            let directory = is_dir(&staged);
            if let Some(there) = &there
                && directory
                && is_dir(there)
            {
                if there.st_dev != device {
                    if new.names(&path)?.is_empty() {
                        // Only its attributes differ. What it holds is its own matter.
                        continue;
                    }
                    bail!(
                        "'{}' on the spare is a file system or subvolume of its own, where nothing can be put by a rename; \
                         replace it by a plain directory with what it holds",
                        path.display()
                    );
                }
                dress.push(Op::Dress { path: path.clone(), time: (staged.st_mtime, staged.st_mtime_nsec) });
                dirs.push(path);
                continue;
            }
            let list = match &there {
                // A new name of a file that was and is there: that was staged along with it.
                Some(there) if (there.st_dev, there.st_ino) == (staged.st_dev, staged.st_ino) => continue,
                _ if is_link(&staged) => &mut links,
                None => &mut fresh,
                Some(_) => &mut changed,
            };
            list.push(Op::Put { path, directory });
        }
    }
    let gone = gone.iter().map(|path| match path.as_bytes() {
        [dir @ .., b'/'] => Op::Remove { path: OsStr::from_bytes(dir).to_owned(), directory: true },
        _ => Op::Remove { path: path.clone(), directory: false },
    });
    let ops: Vec<Op> = fresh.into_iter().chain(changed).chain(links).chain(gone).chain(dress).collect();
    check_free(&ops, tree)?;
    Ok(ops)
}

/// What nobody may change would stop the renames in their middle, now and whenever they are tried again.
fn check_free(ops: &[Op], tree: &Below) -> Result<()> {
    let mut paths: BTreeSet<&OsStr> = BTreeSet::from([OsStr::new(".")]);
    for op in ops {
        let (Op::Put { path, .. } | Op::Remove { path, .. } | Op::Dress { path, .. }) = op;
        let dir = Path::new(path).parent().map(Path::as_os_str).filter(|dir| !dir.is_empty());
        paths.extend([Some(path.as_os_str()), dir].into_iter().flatten());
    }
    for path in paths {
        if tree.is_fixed(path)? {
            bail!(
                "'{}' on the spare is immutable or append-only; nothing was replaced; boot that disk or mount it for writing, and \
                 remove that attribute by 'chattr -ia', or name the path in exclude=",
                path.display()
            );
        }
    }
    Ok(())
}

/// A plan, and what it is about.
struct Plan {
    ops: Vec<Op>,
    new: Below,
}

fn load(tree: &Below) -> Result<Option<Plan>> {
    let Some(mut file) = tree.file(PLAN)? else { return Ok(None) };
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).with_context(|| format!("{PLAN} can't be read"))?;
    let lines: Vec<&[u8]> = bytes.split(|b| *b == 0).collect();
    let [FIRST, ops @ .., LAST] = lines.as_slice() else {
        bail!("{PLAN} is not one of this version of dualroot");
    };
    let parse = |line: &&[u8]| Op::parse(line).with_context(|| format!("{PLAN} has '{}' in it", line.escape_ascii()));
    let ops = ops.iter().map(parse).collect::<Result<_>>()?;
    let new = tree.sub(OsStr::new(NEW))?.with_context(|| format!("there is a {PLAN} without {NEW}"))?;
    Ok(Some(Plan { ops, new }))
}

/// Carries out the plan that is there, and removes what is staged.
///
/// # Errors
/// Those of the system calls. What is left to do may be done later.
pub fn complete(tree: &Below) -> Result<Found> {
    complete_with(tree, &mut || Ok(()))
}

/// As [`complete`]; `step` is called before everything that is written, and may stop it.
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
    // Again, as this has changed its time. A directory that has been removed keeps its attributes while it is open.
    for top in plan.ops.iter().filter(|op| matches!(op, Op::Dress { path, .. } if path == ".")) {
        step()?;
        plan.carry_out(top, tree)?;
    }
    Ok(Found::Whole)
}

impl Plan {
    /// What has been done already is found done, and left alone.
    fn carry_out(&self, op: &Op, tree: &Below) -> Result<()> {
        match op {
            Op::Put { path, directory } => {
                // What isn't staged any more is in its place, and what is of the other kind came from there in exchange.
                if self.new.stat(path)?.is_none_or(|staged| is_dir(&staged) != *directory) {
                    return Ok(());
                }
                match tree.stat(path)? {
                    Some(there) if is_dir(&there) != *directory => tree.take(&self.new, path, true),
                    // Somebody has made a directory there in between; the next sync sees what it lacks.
                    Some(_) if *directory => Ok(()),
                    _ => tree.take(&self.new, path, false),
                }
            }
            Op::Remove { path, directory } => tree.unlink(path, *directory),
            Op::Dress { path, time } => match self.new.sub(path)? {
                Some(staged) => tree.set_attributes(path, &staged.as_file()?, *time),
                None => Ok(()),
            },
        }
    }
}

/// The trees of the running system in which something is staged: the root, and what is mounted where a disk of the
/// configuration has a tree. Each comes with its path.
///
/// # Errors
/// Those of the system calls.
pub fn left_here(config: Option<&Config>) -> Result<Vec<(PathBuf, Below)>> {
    // /usr is mounted before anything is read, and may hold the configuration.
    let roles = config.iter().flat_map(|config| &config.disks).flat_map(|disk| disk.parts.keys());
    let dirs = [&Role::Root, &Role::Usr].into_iter().chain(roles).filter_map(Role::tree);
    left_in(&mounts::table()?, dirs.collect())
}

fn left_in(table: &[Mount], dirs: BTreeSet<&str>) -> Result<Vec<(PathBuf, Below)>> {
    let mut found = Vec::new();
    for dir in dirs {
        let dir = PathBuf::from(if dir.is_empty() { "/" } else { dir });
        // Where nothing is mounted, `.dualroot` would be somebody's own directory.
        // And to look into what is only mounted when somebody looks would hold up the boot until its disk is there.
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

    /// A tree with something staged in it, and a directory that is none of its business.
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
    fn f18_a_plan_is_carried_out_and_nothing_of_it_is_left() {
        let (tmp, below) = staged(b"dualroot 1\0F file\x001234.5 .\0.");
        assert_eq!(complete(&below).unwrap(), Found::Whole);
        assert_eq!(read(tmp.path(), "tree/file"), "new");
        assert!(!tmp.path().join("tree/.dualroot").exists());
        assert_eq!(fs::metadata(tmp.path().join("tree")).unwrap().mtime(), 1234);
        assert_eq!(complete(&below).unwrap(), Found::Nothing);
    }

    #[test]
    fn f18_what_has_no_plan_is_not_whole() {
        let (tmp, below) = staged(b"");
        fs::rename(tmp.path().join("tree/.dualroot/plan"), tmp.path().join("tree/.dualroot/.dualroot-plan")).unwrap();
        assert_eq!(complete(&below).unwrap(), Found::Half);
        assert_eq!(read(tmp.path(), "tree/file"), "old");
        assert!(!tmp.path().join("tree/.dualroot").exists());
    }

    #[test]
    fn f26_a_plan_that_is_none_is_not_carried_out() {
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
    fn f18_what_is_mounted_in_a_running_system_keeps_nothing_from_being_completed() {
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
    fn f26_what_somebody_else_has_put_there_is_removed_and_not_followed() {
        let tmp = tempfile::tempdir().unwrap();
        fs::create_dir_all(tmp.path().join("outside/new/deep")).unwrap();
        fs::write(tmp.path().join("outside/plan"), "dualroot 1\0f file\0.").unwrap();
        let tree = tmp.path().join("tree");
        fs::create_dir(&tree).unwrap();
        fs::write(tree.join("file"), "kept").unwrap();
        let below = Below::open(&tree).unwrap();
        let ours = tree.join(".dualroot");
        let kinds: [&dyn Fn(); 4] = [
            &|| symlink("../outside", &ours).unwrap(),
            &|| fs::write(&ours, "").unwrap(),
            &|| {
                fs::create_dir(&ours).unwrap();
                symlink("../../outside", ours.join("new")).unwrap();
                symlink("../../outside/plan", ours.join("plan")).unwrap();
            },
            &|| {
                fs::create_dir_all(ours.join("new/deep/deeper")).unwrap();
                symlink("/etc", ours.join("new/deep/etc")).unwrap();
            },
        ];
        for make in kinds {
            make();
            complete(&below).unwrap();
            assert!(ours.symlink_metadata().is_err());
            make();
            begin(&below).unwrap();
            assert!(
                fs::symlink_metadata(ours.join("new")).unwrap().is_dir() && fs::read_dir(ours.join("new")).unwrap().count() == 0
            );
            discard(&below).unwrap();
        }
        assert_eq!(read(&tree, "file"), "kept");
        assert!(tmp.path().join("outside/new/deep").exists() && tmp.path().join("outside/plan").exists());
    }

    #[test]
    fn f18_a_link_comes_after_what_it_may_lead_to() {
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
        let mut ops = vec![Op::Dress { path: path(), time: (-1, 999_999_999) }, Op::Dress { path: ".".into(), time: (5, 0) }];
        for directory in [false, true] {
            ops.extend([Op::Put { path: path(), directory }, Op::Remove { path: path(), directory }]);
        }
        for op in ops {
            assert_eq!(Op::parse(&op.line()), Some(op));
        }
    }

    #[test]
    fn what_is_staged_is_seen_by_nobody_else() {
        use std::os::unix::fs::PermissionsExt;
        let tmp = tempfile::tempdir().unwrap();
        begin(&Below::open(tmp.path()).unwrap()).unwrap();
        for path in [DIRECTORY, NEW] {
            assert_eq!(fs::metadata(tmp.path().join(path)).unwrap().permissions().mode() & 0o7777, 0o700, "{path}");
        }
    }

    #[test]
    fn what_is_staged_is_found_where_a_tree_is_mounted() {
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
        assert!(found(&[automount]).is_empty(), "it isn't mounted for that");
        assert!(found(&table[1..]).is_empty(), "somebody's directory of that name in another file system");
    }
}
