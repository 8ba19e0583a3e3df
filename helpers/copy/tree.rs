//! Copying one tree with rsync(1): changed files are staged, and moved to their places by renames.

use std::ffi::OsString;
use std::fs::File;
use std::path::PathBuf;
use std::process::Stdio;

use anyhow::{Context, Result};

use crate::base::program;
use crate::base::progress::Progress;
use crate::base::types::Role;
use crate::copy::changes::{Changes, files, list};
use crate::copy::rsync::{SHOWN, rsync, run_rsync_shown};
use crate::copy::rules::{self, OldModules};
use crate::copy::stage::{self, Found};
use crate::names::files::Rewritten;
use crate::write::below::Below;

/// A tree that is copied: the root, or a partition that is mounted below it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Tree {
    /// The role of its partition.
    pub role: Role,
    /// The mount point in the running system: `""` for the root, `/home` and so on.
    pub at: String,
    /// The directory that it is copied from; None for `at`.
    pub from: Option<PathBuf>,
    /// rsync's filter rules.
    pub rules: Vec<String>,
}

/// The files of a tree that differ, from the comparison until they are in their places.
pub struct Staging {
    changes: Changes,
    /// The paths of files that get attributes only, each with NUL after it.
    in_place: Vec<u8>,
    /// The list of these files, opened before it is removed with the staged files.
    attributes: Option<File>,
}

impl Tree {
    /// The tree of a role; None for roles that no tree belongs to. `exclude` are rules of the configuration, and `files` are written
    /// separately.
    pub fn new(role: &Role, exclude: &[String], files: &[Rewritten], old: OldModules) -> Option<Self> {
        role.tree().map(|at| Self::at(role, at, exclude, files, old))
    }

    /// The tree of the root, as [`Tree::new`].
    pub fn of_root(exclude: &[String], files: &[Rewritten], old: OldModules) -> Self {
        Self::at(&Role::Root, "", exclude, files, old)
    }

    fn at(role: &Role, at: &str, exclude: &[String], files: &[Rewritten], old: OldModules) -> Self {
        Self { role: role.clone(), at: at.to_owned(), from: None, rules: rules::all(at, exclude, files, old) }
    }

    /// Makes its rules leave out these files, which are written separately.
    pub fn leave_out(&mut self, exclude: &[String], files: &[Rewritten], old: OldModules) {
        self.rules = rules::all(&self.at, exclude, files, old);
    }

    /// The directory that the tree is copied from, with a slash at the end.
    pub fn source(&self) -> PathBuf {
        let at = PathBuf::from(format!("{}/", self.at));
        self.from.as_ref().map_or(at, |from| from.join(""))
    }

    /// rsync's arguments for comparing the source with a tree. rsync prints a line for each difference, and writes nothing.
    pub fn comparison(&self) -> Vec<OsString> {
        // The fields are separated by two slashes, which no path contains.
        let options = ["--dry-run", "--delete", "--force", "--out-format=//%i//%n//%L", "--filter=- /.dualroot"];
        let rules = self.rules.iter().map(|rule| format!("--filter={rule}"));
        let all = options.iter().map(|arg| (*arg).to_owned()).chain(rules);
        self.arguments(all.map(Into::into), "./")
    }

    /// The rsync command that prints the changes of a copy, and makes none. Its source is the mount point in the running system.
    pub fn describe(&self) -> String {
        let arguments = Self { from: None, ..self.clone() }.comparison();
        let arguments: Vec<_> = arguments.iter().map(|argument| argument.to_string_lossy()).collect();
        format!("{}: rsync {}", self.role, arguments.join(" "))
    }

    /// rsync's arguments for staging the files that are listed on standard input. A listed file that is unchanged, because only another
    /// name of it is new, becomes a hard link to the file in the tree.
    fn staging(&self) -> Vec<OsString> {
        let options = ["--files-from=-", "--from0", "--ignore-missing-args", "--link-dest=../.."];
        self.arguments(options.into_iter().map(Into::into), &format!("./{}/", stage::NEW))
    }

    /// rsync's arguments for changing only the attributes of files that are listed on standard input.
    fn attributes_only(&self) -> Vec<OsString> {
        let options = ["--files-from=-", "--from0", "--ignore-missing-args", "--existing", "--no-implied-dirs"];
        self.arguments(options.into_iter().map(Into::into), "./")
    }

    fn arguments(&self, options: impl Iterator<Item = OsString>, target: &str) -> Vec<OsString> {
        let common = ["--archive", "--hard-links", "--acls", "--xattrs", "--numeric-ids", "--sparse", "--one-file-system"];
        let all = common.into_iter().map(Into::into).chain(options);
        all.chain([self.source().into_os_string(), target.into()]).collect()
    }

    /// Whether the tree below the handle differs from the source.
    ///
    /// # Errors
    /// As [`Tree::copy`].
    pub fn differs(&self, target: &Below) -> Result<bool> {
        let output = rsync(self.comparison(), Stdio::null(), Stdio::piped(), target)
            .with_context(|| format!("the comparison with {}", self.source().display()))?;
        Ok(Changes::parse(&output) != Changes::default())
    }

    /// Copies the tree into the directory of the handle: all changed files are staged there, and then moved to their places. Where nothing
    /// differs, nothing is written.
    ///
    /// # Errors
    /// rsync can't read or write a file; its messages are in the error. A source file that vanishes meanwhile is no error. Nothing stays
    /// staged then, unless the moves have begun: those are completed later.
    pub fn copy(&self, target: &Below) -> Result<()> {
        let Some(mut staging) = self.compare(target)? else { return Ok(()) };
        let sealed = self.stage(target, &mut staging).and_then(|()| self.seal(target, &staging));
        if sealed.is_err() {
            drop(staging);
            // The staged files take room that the spare may need when it is booted.
            let _ = stage::discard(target);
            return sealed;
        }
        self.put_in_place(target, staging)
    }

    /// Finds the files that differ from the tree below the handle, and checks that they have room there; None where nothing differs. A plan
    /// that an interrupted sync has left is carried out first.
    ///
    /// # Errors
    /// As [`Tree::copy`].
    pub fn compare(&self, target: &Below) -> Result<Option<Staging>> {
        self.compare_with(target, stage::complete).with_context(|| self.context())
    }

    /// Stages these files. Whoever finds them without a plan removes them.
    ///
    /// # Errors
    /// As [`Tree::copy`].
    pub fn stage(&self, target: &Below, staging: &mut Staging) -> Result<()> {
        self.fill(target, staging).with_context(|| self.context())
    }

    /// Writes the plan for the staged files. From here on, whoever finds it carries it out.
    ///
    /// # Errors
    /// As [`Tree::copy`]; a file on the spare that can't be replaced.
    pub fn seal(&self, target: &Below, staging: &Staging) -> Result<()> {
        let source = self.source();
        let top = File::open(&source).with_context(|| source.display().to_string());
        top.and_then(|top| stage::seal(target, &staging.changes.gone, &top)).with_context(|| self.context())
    }

    /// Moves the staged files to their places.
    ///
    /// # Errors
    /// As [`Tree::copy`]. The next sync, or a boot of the spare, completes the moves.
    pub fn put_in_place(&self, target: &Below, staging: Staging) -> Result<()> {
        self.put_in_place_with(target, staging, stage::complete).with_context(|| self.context())
    }

    fn context(&self) -> String {
        format!("the copy of {}", self.source().display())
    }

    fn compare_with(&self, target: &Below, complete: impl Fn(&Below) -> Result<Found>) -> Result<Option<Staging>> {
        // Staged files without a plan are removed, and staged again.
        complete(target)?;
        let mut changes = Changes::parse(&rsync(self.comparison(), Stdio::null(), Stdio::piped(), target)?);
        if changes == Changes::default() {
            return Ok(None);
        }
        // Without enough room, files of which only attributes differ are changed in place, such as after a change of owner.
        let mut in_place = Vec::new();
        if changes.check_room(&self.source(), target).is_err() {
            in_place = std::mem::take(&mut changes.attributes);
            changes.check_room(&self.source(), target)?;
        }
        Ok(Some(Staging { changes, in_place, attributes: None }))
    }

    fn fill(&self, target: &Below, staging: &mut Staging) -> Result<()> {
        stage::begin(target)?;
        staging.attributes = list(&staging.in_place, "attributes", target)?;
        let changes = &staging.changes;
        let paths = [&*changes.list, &*changes.attributes, &*changes.links, &*changes.parents(&self.source())].concat();
        let Some(list) = list(&paths, "list", target)? else { return Ok(()) };
        match Progress::begin(|| files(&self.source(), &changes.list).map(|meta| meta.len()).sum()) {
            None => rsync(self.staging(), list.into(), Stdio::null(), target).map(drop),
            Some(progress) => self.stage_shown(list, target, progress),
        }
    }

    fn put_in_place_with(&self, target: &Below, staging: Staging, complete: impl Fn(&Below) -> Result<Found>) -> Result<()> {
        complete(target)?;
        if let Some(list) = staging.attributes {
            rsync(self.attributes_only(), list.into(), Stdio::null(), target)?;
        }
        Ok(())
    }

    fn stage_shown(&self, list: File, target: &Below, progress: Progress) -> Result<()> {
        let mut command = program::command("rsync")?;
        command.args(SHOWN).args(self.staging()).stdin(list);
        run_rsync_shown(command, target, progress)
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::collections::{BTreeMap, BTreeSet};
    use std::ffi::OsStr;
    use std::fs;
    use std::io::{Read, Seek, Write};
    use std::os::unix::ffi::OsStrExt;
    use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
    use std::path::Path;
    use std::time::{Duration, UNIX_EPOCH};

    use anyhow::bail;
    use proptest::prelude::*;

    use super::*;
    use crate::copy::modules::drop_old_modules;
    use crate::copy::rsync::bytes_done;

    impl Tree {
        /// Copies as [`Tree::copy`], and completes the copy with this function.
        fn copy_with(&self, target: &Below, complete: impl Fn(&Below) -> Result<Found>) -> Result<()> {
            let Some(mut staging) = self.compare_with(target, &complete)? else { return Ok(()) };
            self.stage(target, &mut staging)?;
            self.seal(target, &staging)?;
            self.put_in_place_with(target, staging, complete)
        }
    }

    #[test]
    fn f12_rewritten_files_are_not_copied_whatever_their_names() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let names = ["srv-my\\x2ddata.mount", "[x]\\x2d*.conf", "plain"];
        for name in names {
            fs::write(from.path().join(name), "").unwrap();
        }
        copy(from.path(), to.path(), &[], &names.map(|name| Rewritten { path: format!("/{name}"), bytes: vec![] }));
        assert_eq!(fs::read_dir(to.path()).unwrap().count(), 0);
    }

    fn copy(from: &std::path::Path, to: &std::path::Path, exclude: &[String], apart: &[Rewritten]) {
        let mut tree = Tree::new(&Role::Root, exclude, apart, OldModules::Stay).unwrap();
        tree.at = from.to_str().unwrap().to_owned();
        tree.copy(&Below::open(to).unwrap()).unwrap();
    }

    #[test]
    fn a_tree_is_copied_without_excluded_files_and_old_modules_stay() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let write = |dir: &std::path::Path, path: &str| {
            fs::create_dir_all(dir.join(path).parent().unwrap()).unwrap();
            fs::write(dir.join(path), path).unwrap();
        };
        for path in ["etc/fstab", "etc/hosts", "mnt/root1/x", "mnt/rootless/x", "tmp/x", "usr/lib/modules/2/m", "opt/no/x", "a"] {
            write(from.path(), path);
        }
        fs::hard_link(from.path().join("a"), from.path().join("b")).unwrap();
        for path in ["etc/fstab", "gone", "usr/lib/modules/1/m", "mnt/root1/kept"] {
            write(to.path(), path);
        }
        for dir in [from.path(), to.path()] {
            write(dir, "var/lib/dualroot/own/status.json");
            write(dir, "var/lib/dualroot/identifiers.json");
        }
        fs::write(to.path().join("etc/fstab"), "of the spare").unwrap();
        let apart = [Rewritten { path: "/etc/fstab".into(), bytes: vec![] }];
        copy(from.path(), to.path(), &["/opt/no".into()], &apart);
        let has = |path: &str| to.path().join(path).exists();
        assert!(has("etc/hosts") && has("mnt/rootless/x") && has("usr/lib/modules/2/m") && has("tmp"));
        assert!(has("usr/lib/modules/1/m"), "modules of the old kernel stay for now");
        assert!(!has("gone") && !has("tmp/x") && !has("opt/no") && !has("mnt/root1/x"));
        assert!(has("var/lib/dualroot/identifiers.json") && !has("var/lib/dualroot/own"), "a spare's own status is removed");
        assert!(has("mnt/root1/kept"), "an excluded file is not removed either");
        assert_eq!(fs::read(to.path().join("etc/fstab")).unwrap(), b"of the spare");
        let inode = |path: &str| std::os::unix::fs::MetadataExt::ino(&fs::metadata(to.path().join(path)).unwrap());
        assert_eq!(inode("a"), inode("b"), "hard links stay hard links");
    }

    #[test]
    fn a_copy_shows_its_progress_on_a_terminal() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::write(from.path().join("a"), [1; 300_000]).unwrap();
        fs::hard_link(from.path().join("a"), from.path().join("b")).unwrap();
        let mut tree = Tree::new(&Role::Root, &[], &[], OldModules::Stay).unwrap();
        tree.at = from.path().to_str().unwrap().to_owned();
        let below = Below::open(to.path()).unwrap();
        stage::begin(&below).unwrap();
        let list = || list(b"a\0b\0", "list", &below).unwrap().unwrap();
        let mut terminal = tempfile::tempfile().unwrap();
        tree.stage_shown(list(), &below, Progress::on(terminal.try_clone().unwrap(), 300_000)).unwrap();
        assert_eq!(fs::read(to.path().join(".dualroot/new/b")).unwrap(), [1; 300_000]);
        let mut output = String::new();
        terminal.rewind().unwrap();
        terminal.read_to_string(&mut output).unwrap();
        assert!(output.starts_with("\r[") && output.contains(" MiB/s ") && output.ends_with("\r\x1b[K"), "{output:?}");
        tree.at = "/nonexistent-source".into();
        let error = tree.stage_shown(list(), &below, Progress::on(terminal, 1)).unwrap_err().to_string();
        assert!(error.contains("rsync failed"), "{error}");
    }

    #[test]
    fn progress_of_rsync_is_parsed() {
        for (line, expected) in [
            ("         32768   0%    0.00kB/s    0:00:00  ", Some(32768)),
            ("\n      372244480  98%  172.15MB/s    0:00:02 (xfr#62, to-chk=0/68)", Some(372_244_480)),
            ("", None),
            ("\n", None),
            ("4 files", None),
            ("32,768 0%", None),
        ] {
            assert_eq!(bytes_done(line.as_bytes()), expected, "{line}");
        }
    }

    /// One file of a tree. Files of different content differ in size, because rsync compares sizes and times.
    #[derive(Clone, Debug)]
    enum Node {
        File {
            size: u8,
            mode: u32,
            time: i64,
            attribute: bool,
        },
        Dir {
            mode: u32,
            time: i64,
        },
        Link(u8),
        Pipe,
        /// A hard link to an earlier file.
        Name(usize),
    }

    const NAMES: [&[u8]; 18] = [
        b"a",
        b"b",
        b"c",
        b"d",
        b"d/a",
        b"d/b",
        b"d/e",
        b"d/e/f",
        b"d/e/g",
        b"g",
        b"g/a",
        b"g/.dualroot",
        b"new\nline",
        br"d/back\#012slash",
        b"d/inv\xff => \xc3\xbc",
        b"-d",
        b" # *[x]",
        b"d/;",
    ];

    type Listing = Vec<(usize, Node)>;

    fn listing() -> impl Strategy<Value = Listing> {
        let file = (0u8..4, prop_oneof![Just(0o644), Just(0o4755)], 0i64..3, any::<bool>())
            .prop_map(|(size, mode, time, attribute)| Node::File { size, mode, time, attribute });
        let dir = (prop_oneof![Just(0o755), Just(0o2770)], 0i64..3).prop_map(|(mode, time)| Node::Dir { mode, time });
        let node = prop_oneof![
            5 => file,
            4 => dir,
            1 => (0u8..3).prop_map(Node::Link),
            1 => Just(Node::Pipe),
            3 => (0..NAMES.len()).prop_map(Node::Name),
        ];
        proptest::collection::vec((0..NAMES.len(), node), 0..16).prop_map(|mut nodes| {
            nodes.sort_by_key(|(name, _)| *name);
            nodes
        })
    }

    /// Makes the tree. A path below a file is skipped.
    fn make(root: &Path, listing: &Listing) {
        let path = |name: usize| root.join(OsStr::from_bytes(NAMES[name]));
        let times =
            |time: i64| fs::FileTimes::new().set_modified(UNIX_EPOCH + Duration::from_secs(1_000_000 + time.unsigned_abs()));
        for (name, node) in listing {
            let path_of = path(*name);
            match node {
                Node::File { size, mode, time, attribute } => {
                    let Ok(mut file) = File::create_new(&path_of) else { continue };
                    file.write_all(&vec![*size; *size as usize * 3000]).unwrap();
                    file.set_permissions(fs::Permissions::from_mode(*mode)).unwrap();
                    if *attribute {
                        // Not every file system has extended attributes.
                        let _ = xattr::FileExt::set_xattr(&file, "user.test", &[*size]);
                    }
                    file.set_times(times(*time)).unwrap();
                }
                Node::Dir { .. } => {
                    let _ = fs::create_dir(&path_of);
                }
                Node::Link(to) => {
                    let _ = symlink(["a", "d", "../b"][*to as usize], &path_of);
                }
                Node::Pipe => {
                    let _ = nix::unistd::mkfifo(&path_of, nix::sys::stat::Mode::S_IRUSR);
                }
                Node::Name(of) => {
                    if path(*of).symlink_metadata().is_ok_and(|m| m.is_file()) {
                        let _ = fs::hard_link(path(*of), &path_of);
                    }
                }
            }
        }
        for (name, node) in listing.iter().rev() {
            if let Node::Dir { mode, time } = node
                && path(*name).symlink_metadata().is_ok_and(|m| m.is_dir())
            {
                let dir = File::open(path(*name)).unwrap();
                dir.set_permissions(fs::Permissions::from_mode(*mode)).unwrap();
                dir.set_times(times(*time)).unwrap();
            }
        }
        File::open(root).unwrap().set_times(times(0)).unwrap();
    }

    /// Every file in a tree except `.dualroot`, by its path: its attributes and content as text, and all its names.
    fn contents(root: &Path) -> BTreeMap<PathBuf, (String, BTreeSet<PathBuf>)> {
        let (mut found, mut names) = (BTreeMap::new(), BTreeMap::<u64, BTreeSet<PathBuf>>::new());
        let mut paths = vec![root.to_owned()];
        while let Some(path) = paths.pop() {
            let meta = path.symlink_metadata().unwrap();
            let inner = path.strip_prefix(root).unwrap().to_owned();
            let mut text = format!("{:o} {}:{} ", meta.mode(), meta.uid(), meta.gid());
            if meta.is_dir() {
                paths.extend(fs::read_dir(&path).unwrap().map(|e| e.unwrap().path()).filter(|p| *p != root.join(".dualroot")));
            } else {
                names.entry(meta.ino()).or_default().insert(inner.clone());
            }
            if meta.is_symlink() {
                text += &format!("-> {:?}", fs::read_link(&path).unwrap());
            } else {
                // rsync doesn't set the times of pipes.
                if meta.is_file() {
                    text += &format!("{}.{} ", meta.mtime(), meta.mtime_nsec());
                }
                for name in xattr::list(&path).into_iter().flatten() {
                    text += &format!("{name:?}={:?} ", xattr::get(&path, &name).unwrap());
                }
            }
            if meta.is_file() {
                text += &format!("{:?}", fs::read(&path).unwrap());
            }
            found.insert(inner, (text, meta.ino()));
        }
        found.into_iter().map(|(path, (text, ino))| (path, (text, names.get(&ino).cloned().unwrap_or_default()))).collect()
    }

    /// Asserts that the spare has the files of the source, and no other. rsync leaves equal files hard links of each other on the spare, even
    /// if they are separate files in the source.
    fn assert_same(source: &Path, spare: &Path) {
        let (wanted, found) = (contents(source), contents(spare));
        assert_eq!(wanted.keys().collect::<Vec<_>>(), found.keys().collect::<Vec<_>>());
        for (path, (text, names)) in &wanted {
            let (found_text, found_names) = &found[path];
            assert_eq!(text, found_text, "{}", path.display());
            assert!(names.is_subset(found_names), "{}: {names:?} {found_names:?}", path.display());
        }
        assert!(!spare.join(".dualroot").exists());
    }

    struct Pair {
        tmp: tempfile::TempDir,
        tree: Tree,
        below: Below,
    }

    impl Pair {
        fn new(source: &Listing, spare: &Listing) -> Self {
            // Flushing is fast on tmpfs.
            let tmp = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
            for (name, listing) in [("source", source), ("spare", spare)] {
                fs::create_dir(tmp.path().join(name)).unwrap();
                make(&tmp.path().join(name), listing);
            }
            let mut tree = Tree::new(&Role::Root, &[], &[], OldModules::Stay).unwrap();
            tree.at = tmp.path().join("source").to_str().unwrap().to_owned();
            let below = Below::open(&tmp.path().join("spare")).unwrap();
            Self { tmp, tree, below }
        }

        fn source(&self) -> PathBuf {
            self.tmp.path().join("source")
        }

        fn spare(&self) -> PathBuf {
            self.tmp.path().join("spare")
        }

        fn differences(&self) -> Vec<u8> {
            rsync(self.tree.comparison(), Stdio::null(), Stdio::piped(), &self.below).unwrap()
        }
    }

    /// Completes the copy up to this many steps, and then fails.
    fn interrupted_after(steps: usize) -> impl Fn(&Below) -> Result<Found> {
        let left = Cell::new(steps);
        move |tree: &Below| {
            stage::complete_with(tree, &mut || match left.get().checked_sub(1) {
                Some(rest) => {
                    left.set(rest);
                    Ok(())
                }
                None => bail!("interrupted"),
            })
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn f18_any_tree_becomes_any_other_wherever_the_copy_is_interrupted(source in listing(), spare in listing(), steps in 0usize..40) {
            let pair = Pair::new(&source, &spare);
            let old = contents(&pair.spare());
            // All files are staged, and none is moved.
            pair.tree.copy_with(&pair.below, |_| Ok(Found::Nothing)).unwrap();
            let mut staged = contents(&pair.spare());
            staged.insert(PathBuf::new(), old[Path::new("")].clone());
            prop_assert_eq!(&old, &staged);
            // The copy is interrupted, and the spare completes it when it is booted.
            if let Err(e) = interrupted_after(steps)(&pair.below) {
                prop_assert_eq!(format!("{e:#}"), "interrupted");
            }
            stage::complete(&pair.below).unwrap();
            assert_same(&pair.source(), &pair.spare());
            let left = pair.differences();
            // An interruption at the very end leaves the time of the top directory to the next sync.
            prop_assert!(left.is_empty() || left == b"//.d..t......//.///\n", "{}", left.escape_ascii());
            pair.tree.copy(&pair.below).unwrap();
            assert_eq!(pair.differences().escape_ascii().to_string(), "");
        }
    }

    #[test]
    fn f18_links_lead_to_something_at_every_step() {
        let build = |pair: &Pair| {
            for (dir, files) in [
                // A library whose link changes, and the directories of all libraries merged, or separated again.
                (pair.source(), [("usr/lib/ld.so", "newer"), ("lib.2", "newer"), ("bin/sh", "newer")]),
                (pair.spare(), [("lib/ld.so", "old"), ("lib.1", "old"), ("usr/bin/sh", "old")]),
            ] {
                for (path, text) in files {
                    fs::create_dir_all(dir.join(path).parent().unwrap()).unwrap();
                    fs::write(dir.join(path), text).unwrap();
                }
            }
            for (dir, link, to) in [
                (pair.source(), "lib", "usr/lib"),
                (pair.source(), "lib.so", "lib.2"),
                (pair.spare(), "bin", "usr/bin"),
                (pair.spare(), "lib.so", "lib.1"),
            ] {
                symlink(to, dir.join(link)).unwrap();
            }
        };
        let mut exchanged = false;
        for steps in 0.. {
            let pair = Pair::new(&Vec::new(), &Vec::new());
            build(&pair);
            let done = pair.tree.copy_with(&pair.below, interrupted_after(steps)).is_ok();
            for path in ["lib/ld.so", "lib.so", "bin/sh"] {
                let text =
                    fs::read_to_string(pair.spare().join(path)).unwrap_or_else(|e| panic!("{path} after {steps} steps: {e}"));
                assert!(text == "newer" || text == "old" && !done);
            }
            exchanged |=
                pair.spare().join(".dualroot/new/bin").is_symlink() && pair.spare().join(".dualroot/new/lib/ld.so").exists();
            // The next sync completes the interrupted one.
            pair.tree.copy(&pair.below).unwrap();
            assert_same(&pair.source(), &pair.spare());
            if done {
                assert!(exchanged, "a directory and a link are exchanged in one step");
                break;
            }
        }
    }

    #[test]
    fn f18_an_interruption_while_staging_leaves_the_old_tree() {
        let node = |size, time| Node::File { size, mode: 0o644, time, attribute: false };
        let pair = Pair::new(&vec![(0, node(1, 1)), (1, node(2, 2))], &vec![(0, node(3, 1)), (9, node(1, 1))]);
        let old = contents(&pair.spare());
        stage::begin(&pair.below).unwrap();
        fs::write(pair.spare().join(".dualroot/new/a"), "half of").unwrap();
        assert_eq!(stage::complete(&pair.below).unwrap(), Found::Half);
        let mut found = contents(&pair.spare());
        found.insert(PathBuf::new(), old[Path::new("")].clone());
        assert_eq!(old, found);
        assert!(!pair.spare().join(".dualroot").exists());
        // The next sync works after such an interruption, too.
        stage::begin(&pair.below).unwrap();
        fs::write(pair.spare().join(".dualroot/new/a"), "half of").unwrap();
        pair.tree.copy(&pair.below).unwrap();
        assert_same(&pair.source(), &pair.spare());
    }

    #[test]
    fn f18_an_immutable_file_is_found_before_any_file_is_replaced() {
        for fixed in ["etc/resolv.conf", "etc", "gone"] {
            let pair = Pair::new(&Vec::new(), &Vec::new());
            for (dir, text) in [(pair.source(), "newer"), (pair.spare(), "old")] {
                fs::create_dir(dir.join("etc")).unwrap();
                fs::write(dir.join("etc/resolv.conf"), text).unwrap();
                fs::write(dir.join("a"), text).unwrap();
            }
            fs::write(pair.spare().join("gone"), "").unwrap();
            let chattr = |how: &str| {
                let mut command = program::command("chattr").unwrap();
                command.arg(how).arg(pair.spare().join(fixed)).output().unwrap().status.success()
            };
            // Not every file system has this attribute.
            if !chattr("+i") {
                return;
            }
            let result = pair.tree.copy(&pair.below);
            let old = fs::read_to_string(pair.spare().join("a")).unwrap();
            assert!(chattr("-i"));
            let error = format!("{:#}", result.unwrap_err());
            assert!(error.contains(&format!("'{fixed}' on the spare is immutable")), "{error}");
            assert_eq!(old, "old");
            assert!(!pair.spare().join(".dualroot").exists());
            pair.tree.copy(&pair.below).unwrap();
            assert_same(&pair.source(), &pair.spare());
        }
    }

    #[test]
    fn a_directory_with_directories_becomes_a_file_or_a_link() {
        for file in [true, false] {
            let dir = |name| (name, Node::Dir { mode: 0o755, time: 1 });
            let pair = Pair::new(&vec![dir(9)], &vec![dir(3), dir(6), (7, Node::Pipe)]);
            match file {
                true => fs::write(pair.source().join("d"), "").unwrap(),
                false => symlink("g", pair.source().join("d")).unwrap(),
            }
            fs::create_dir(pair.source().join("g/e")).unwrap();
            pair.tree.copy(&pair.below).unwrap();
            assert_same(&pair.source(), &pair.spare());
        }
    }

    #[test]
    fn a_directory_keeps_its_time_when_a_file_in_it_is_removed() {
        let pair = Pair::new(&vec![(3, Node::Dir { mode: 0o755, time: 1 })], &vec![(3, Node::Dir { mode: 0o755, time: 1 })]);
        let dir = File::open(pair.spare().join("d")).unwrap();
        fs::write(pair.spare().join("d/x"), "").unwrap();
        dir.set_times(fs::FileTimes::new().set_modified(pair.source().join("d").metadata().unwrap().modified().unwrap()))
            .unwrap();
        pair.tree.copy(&pair.below).unwrap();
        assert!(!pair.spare().join("d/x").exists());
        assert_eq!(pair.differences().escape_ascii().to_string(), "");
    }

    #[test]
    fn only_changed_files_are_written_and_once() {
        let pair = Pair::new(&Vec::new(), &Vec::new());
        for name in ["large", "small", "d/same"] {
            let path = pair.source().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, vec![7; 1 << 20]).unwrap();
        }
        pair.tree.copy(&pair.below).unwrap();
        assert_eq!(pair.differences(), b"");
        let before = contents(&pair.spare());
        let calls = Cell::new(0);
        let count_only = |_: &Below| Ok((calls.set(calls.get() + 1), Found::Nothing).1);
        pair.tree.copy_with(&pair.below, count_only).unwrap();
        assert_eq!(calls.get(), 1, "no file is staged, so that none is moved");
        assert_eq!(before, contents(&pair.spare()));
        fs::write(pair.source().join("small"), vec![8; 1 << 16]).unwrap();
        fs::hard_link(pair.source().join("large"), pair.source().join("d/large")).unwrap();
        pair.tree.copy_with(&pair.below, |_| Ok(Found::Nothing)).unwrap();
        let (new, old) = (pair.spare().join(".dualroot/new"), pair.spare().join("large").metadata().unwrap().ino());
        let is_written = |path: &PathBuf| new.join(path).metadata().is_ok_and(|m| m.is_file() && m.ino() != old);
        let written: Vec<PathBuf> = contents(&new).into_keys().filter(is_written).collect();
        assert_eq!(written, [Path::new("small")], "a new hard link is not a new copy");
        assert_eq!(fs::metadata(new.join("small")).unwrap().len(), 1 << 16);
        stage::complete(&pair.below).unwrap();
        assert_same(&pair.source(), &pair.spare());
    }

    #[test]
    fn f19_without_room_for_old_and_new_files_nothing_is_staged() {
        let pair = Pair::new(&Vec::new(), &Vec::new());
        let free = {
            let s = nix::sys::statvfs::fstatvfs(pair.below.fd()).unwrap();
            s.fragment_size() * s.blocks_free()
        };
        let file = File::create(pair.source().join("large")).unwrap();
        // A sparse file takes no room.
        file.set_len(free * 2).unwrap();
        let changes = Changes::parse(&pair.differences());
        changes.check_room(&pair.source(), &pair.below).unwrap();
        let too_much = Changes { list: b"large\0".repeat(3), ..Changes::default() };
        file.set_len(1 << 20).unwrap();
        file.write_all_at(&vec![1; 1 << 20], 0).unwrap();
        let tmpfs = Path::new("/dev/shm");
        if nix::unistd::geteuid().is_root() && tmpfs.exists() {
            crate::devices::held::enter_private_namespace().unwrap();
            use nix::mount::{MsFlags, mount};
            mount(Some("none"), &pair.spare(), Some("tmpfs"), MsFlags::empty(), Some("size=2m")).unwrap();
            let below = Below::open(&pair.spare()).unwrap();
            let error = format!("{:#}", too_much.check_room(&pair.source(), &below).unwrap_err());
            assert!(error.contains("but 3145728 are staged") && error.contains("1048576 too few"), "{error}");
            pair.tree.copy(&below).unwrap();
        }
    }

    #[test]
    fn f19_attributes_need_no_room() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let mut pair = Pair::new(&Vec::new(), &Vec::new());
        crate::devices::held::enter_private_namespace().unwrap();
        use nix::mount::{MsFlags, mount};
        mount(Some("none"), &pair.spare(), Some("tmpfs"), MsFlags::empty(), Some("size=3m")).unwrap();
        pair.below = Below::open(&pair.spare()).unwrap();
        let large = pair.source().join("d/large");
        fs::create_dir(pair.source().join("d")).unwrap();
        fs::write(&large, vec![1; 2 << 20]).unwrap();
        fs::hard_link(&large, pair.source().join("name")).unwrap();
        pair.tree.copy(&pair.below).unwrap();
        fs::set_permissions(&large, fs::Permissions::from_mode(0o600)).unwrap();
        fs::write(pair.source().join("small"), "new").unwrap();
        pair.tree.copy(&pair.below).unwrap();
        assert_same(&pair.source(), &pair.spare());
        assert_eq!(pair.differences().escape_ascii().to_string(), "");
    }

    #[test]
    fn f22_excluded_files_keep_their_directory_and_that_is_reported() {
        let pair = Pair::new(&Vec::new(), &Vec::new());
        fs::write(pair.source().join("mnt"), "").unwrap();
        fs::create_dir_all(pair.spare().join("mnt/root1/x")).unwrap();
        let error = format!("{:#}", pair.tree.copy(&pair.below).unwrap_err());
        assert!(error.contains("could not make way for new regular file: mnt"), "{error}");
        assert!(pair.spare().join("mnt/root1/x").exists() && !pair.spare().join(".dualroot").exists());
    }

    #[test]
    fn a_separate_file_system_on_the_spare_stays() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let mut pair = Pair::new(&Vec::new(), &Vec::new());
        for dir in [pair.source(), pair.spare()] {
            fs::create_dir(dir.join("own")).unwrap();
        }
        fs::write(pair.source().join("file"), "new").unwrap();
        crate::devices::held::enter_private_namespace().unwrap();
        use nix::mount::{MsFlags, mount};
        // The tmpfs stands for a subvolume of btrfs, such as systemd-tmpfiles makes at /var/lib/machines.
        mount(Some("none"), &pair.spare().join("own"), Some("tmpfs"), MsFlags::empty(), Some("mode=700")).unwrap();
        fs::write(pair.spare().join("own/kept"), "").unwrap();
        pair.below = Below::open(&pair.spare()).unwrap();
        pair.tree.copy(&pair.below).unwrap();
        assert!(pair.spare().join("file").exists() && pair.spare().join("own/kept").exists());
        fs::write(pair.source().join("own/file"), "new").unwrap();
        fs::write(pair.source().join("file"), "newer").unwrap();
        let error = format!("{:#}", pair.tree.copy(&pair.below).unwrap_err());
        assert!(error.contains("'own' on the spare is a file system or subvolume of its own"), "{error}");
        assert_eq!(fs::read(pair.spare().join("file")).unwrap(), b"new");
    }

    #[test]
    fn staged_files_of_the_source_are_not_copied() {
        let pair = Pair::new(&Vec::new(), &Vec::new());
        fs::create_dir_all(pair.source().join(".dualroot/new")).unwrap();
        fs::create_dir_all(pair.source().join("home/.dualroot")).unwrap();
        pair.tree.copy(&pair.below).unwrap();
        assert!(!pair.spare().join(".dualroot").exists() && pair.spare().join("home/.dualroot").exists());
    }

    #[test]
    fn files_below_a_mount_point_are_copied_and_the_mount_is_not() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let tmp = tempfile::tempdir().unwrap();
        let path = |name: &str| tmp.path().join(name);
        for (name, text) in
            [("from/mnt/below", "b"), ("from/home/x", "x"), ("from/usr/lib/modules/2/m", "m"), ("to/usr/lib/modules/1/m", "m")]
        {
            fs::create_dir_all(path(name).parent().unwrap()).unwrap();
            fs::write(path(name), text).unwrap();
        }
        fs::create_dir(path("from/again")).unwrap();
        crate::devices::held::enter_private_namespace().unwrap();
        let bind = |from: &str, to: &str| {
            use nix::mount::{MsFlags, mount};
            mount(Some(&path(from)), &path(to), None::<&str>, MsFlags::MS_BIND, None::<&str>).unwrap();
        };
        bind("from/home", "from/again");
        bind("from/home", "from/mnt");
        let alone = crate::devices::held::ReadOnlyView::open(&path("from"), &path("alone")).unwrap();
        let mut tree = Tree::new(&Role::Root, &[], &[], OldModules::Stay).unwrap();
        tree.from = Some(alone.place().to_owned());
        let below = Below::open(&path("to")).unwrap();
        tree.copy(&below).unwrap();
        assert!(path("to/mnt/below").exists() && !path("to/mnt/x").exists() && !path("to/again/x").exists());
        assert!(path("to/home/x").exists() && path("to/usr/lib/modules/1/m").exists());
        drop_old_modules(&tree, &below).unwrap();
        assert!(path("to/usr/lib/modules/2/m").exists() && !path("to/usr/lib/modules/1").exists());
        fs::write(path("to/usr/lib/modules/2/new"), "").unwrap();
        drop_old_modules(&tree, &below).unwrap();
        assert!(path("to/usr/lib/modules/2/new").exists(), "where no kernel was removed, its modules are not compared");
        for top in ["from", "to"] {
            symlink("usr/lib", path(top).join("lib")).unwrap();
        }
        drop_old_modules(&tree, &below).unwrap();
        fs::remove_dir_all(path("to/usr")).unwrap();
        drop_old_modules(&tree, &below).unwrap();
        assert!(fs::write(alone.place().join("new"), "").is_err(), "the source is mounted read-only");
    }

    #[test]
    fn f22_a_failed_copy_is_an_error() {
        let to = tempfile::tempdir().unwrap();
        let mut tree = Tree::new(&Role::Root, &[], &[], OldModules::Stay).unwrap();
        tree.at = "/nonexistent-source".into();
        let error = format!("{:#}", tree.copy(&Below::open(to.path()).unwrap()).unwrap_err());
        assert!(error.contains("rsync failed") && error.contains("/nonexistent-source"), "{error}");
    }
}
