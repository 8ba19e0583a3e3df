//! Copying root trees with rsync(1), and the files in them that name a disk.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::fs::{File, Metadata};
use std::io::{BufRead, BufReader};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;

use anyhow::{Context, Result, bail};

use crate::base::program;
use crate::base::progress::Progress;
use crate::base::root::Root;
use crate::base::types::{DirPath, Role};
use crate::copy::generation::Generation;
use crate::copy::stage::{self, Found, unescape};
use crate::names::fstab;
use crate::names::ident::Rewriter;
use crate::names::unitfile;
use crate::write::below::{Below, Change, Content, is_link};

/// What is never copied, as rsync filter rules by the path in the running system. Rules of `exclude=` come between the first part
/// and the second, so that they can bring something of the second back.
const ALWAYS: [&str; 10] = [
    "- /mnt/root[0-9]*/",
    "- /dev/*",
    "- /proc/*",
    "- /sys/*",
    "- /run/*",
    "- /tmp/*",
    "- /lost+found",
    "- /var/lib/systemd/random-seed",
    // Not copied, and removed where it is: see crate::pair::status.
    "H /var/lib/dualroot/own/",
    "- .dualroot-*",
];
const USUALLY: [&str; 9] = [
    "- /var/cache/apt/*.bin",
    "- /var/cache/apt/archives/*.deb",
    "- /var/cache/apt/archives/partial/*",
    "- /var/cache/pacman/pkg/*",
    "- /var/cache/dnf/*",
    "- /var/cache/libdnf5/*",
    "- /var/cache/zypp/*",
    "- /var/tmp/systemd-private-*",
    "- /var/lib/systemd/coredump/*",
];
/// Kernel modules of the spare's old kernels stay until its boot partitions don't need them any more.
const UNTIL_THE_END: [&str; 2] = ["P /usr/lib/modules/*", "P /lib/modules/*"];

/// Files that name disks. Those of the first list stand alone; of the second, every file in the directory counts. Units come besides, see
/// [`unitfile`].
const FILES: [&str; 6] =
    ["/etc/fstab", "/etc/crypttab", "/etc/crypttab.initramfs", "/etc/kernel/cmdline", "/etc/dracut.conf", "/etc/default/grub"];
const DIRECTORIES: [&str; 4] = ["/etc/kernel/cmdline.d", "/etc/cmdline.d", "/etc/dracut.conf.d", "/etc/initramfs-tools/conf.d"];

/// Every system has this one. A file that isn't there yet becomes like it: everybody may read it.
const USUAL: &str = "/etc/os-release";

/// Those that hold a kernel's command line, and nothing else.
const COMMAND_LINES: [&str; 3] = ["/etc/kernel/cmdline", "/etc/kernel/cmdline.d/", "/etc/cmdline.d/"];

/// A file of the booted root that is another one for another disk.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Rewritten {
    /// Its path in the running system.
    pub path: String,
    /// What it is to hold.
    pub bytes: Vec<u8>,
}

/// The files below `root` that name a disk other than the rewriter's target, as they have to be for the target. Lines of fstab and mount
/// units whose mount point `keep` names are about another disk on purpose, and stay; so do units that are called after what they name,
/// which the proof finds. With a generation, kernel command lines name that.
///
/// # Errors
/// A file that is there but can't be read.
pub fn rewritten(
    root: &Root,
    rewriter: &Rewriter,
    generation: Option<Generation>,
    keep: impl Fn(&DirPath) -> bool,
) -> Result<Vec<Rewritten>> {
    let mut found = Vec::new();
    for path in identifying_files(root)? {
        if unitfile::dir(&path).is_some_and(|dir| keep(&dir)) || !unitfile::named_after(&path, rewriter).is_empty() {
            continue;
        }
        let Some(old) = root.read_opt(&path).with_context(|| format!("{path} can't be read"))? else { continue };
        let bytes = match (path.as_str(), generation) {
            ("/etc/fstab", None) => fstab::rewrite(&old, rewriter, &keep),
            ("/etc/fstab", Some(_)) => fstab::any_subvolume(&fstab::rewrite(&old, rewriter, &keep)),
            (path, Some(generation)) if COMMAND_LINES.iter().any(|start| path.starts_with(start)) => {
                generation.boot(&rewriter.rewrite(&old))
            }
            _ => rewriter.rewrite(&old),
        };
        if bytes != old {
            found.push(Rewritten { path, bytes });
        }
    }
    Ok(found)
}

/// The paths of all files of a root that may name a disk and are there.
///
/// # Errors
/// A directory that can't be read.
pub fn identifying_files(root: &Root) -> Result<Vec<String>> {
    let mut paths: Vec<String> = FILES.iter().filter(|p| root.path(p).is_file()).map(|p| (*p).to_owned()).collect();
    for dir in DIRECTORIES {
        for name in root.names(dir).with_context(|| format!("{dir} can't be read"))? {
            if let Some(name) = name.to_str() {
                let path = format!("{dir}/{name}");
                if root.path(&path).is_file() {
                    paths.push(path);
                }
            }
        }
    }
    paths.extend(unitfile::files(root).context("units can't be read")?);
    Ok(paths)
}

/// What [`identifying_files`] hold, by their paths, once what is drafted is written.
///
/// # Errors
/// A file that is there but can't be read.
pub fn identifying_texts(root: &Root, drafts: &[Rewritten]) -> Result<BTreeMap<String, Vec<u8>>> {
    let mut texts = BTreeMap::new();
    for path in identifying_files(root)? {
        let draft = drafts.iter().find(|draft| draft.path == path).map(|draft| draft.bytes.clone());
        let text = draft.map_or_else(|| root.read_opt(&path), |bytes| Ok(Some(bytes)));
        if let Some(text) = text.with_context(|| format!("{path} can't be read"))? {
            texts.insert(path, text);
        }
    }
    Ok(texts)
}

/// The files of a root that may name a disk, and these others, that lead through a symbolic link, as the link and where it leads: what is
/// written there would be written elsewhere, or stand in its place. A link to /dev/null is none: it says that there is no such file.
/// Nor are links among units: there they are usual, and what they lead to is not written.
///
/// # Errors
/// A directory that can't be read.
pub fn links(root: &Root, others: &[&str]) -> Result<Vec<String>> {
    let mut found = BTreeSet::new();
    let mut paths: Vec<PathBuf> = FILES.iter().chain(others).map(PathBuf::from).collect();
    for dir in DIRECTORIES {
        match link_on(root, Path::new(dir))? {
            Some(link) => {
                found.insert(link);
            }
            None => {
                let names = root.names(dir).with_context(|| format!("{dir} can't be read"))?;
                paths.extend(names.into_iter().map(|name| Path::new(dir).join(name)));
            }
        }
    }
    for path in paths {
        found.extend(link_on(root, &path)?);
    }
    Ok(found.into_iter().collect())
}

/// The first link on the way to a path, and what it says.
fn link_on(root: &Root, path: &Path) -> Result<Option<String>> {
    let mut steps: Vec<&Path> = path.ancestors().filter(|step| *step != Path::new("/")).collect();
    steps.reverse();
    for step in steps {
        let place = root.path(step);
        match std::fs::symlink_metadata(&place) {
            Ok(meta) if meta.is_symlink() => {
                let to = std::fs::read_link(&place).with_context(|| place.display().to_string())?;
                let shown = format!("{} -> {}", step.display(), to.display().to_string().escape_debug());
                return Ok(Some(shown).filter(|_| to != Path::new("/dev/null")));
            }
            Ok(_) => {}
            // Or a file where a directory was looked for.
            Err(_) => return Ok(None),
        }
    }
    Ok(None)
}

impl Rewritten {
    /// The change that puts it on a disk, with owner, mode and attributes of the booted disk's file. The handle is that of the
    /// directory `dir`: `""` for the root, or `/etc`, which all of them are in.
    pub fn change(&self, dir: &str, root: &Root) -> Change {
        Change::Replace {
            path: self.path.strip_prefix(dir).unwrap_or(&self.path).trim_start_matches('/').to_owned(),
            content: Content::Bytes(self.bytes.clone()),
            like: Some(
                [self.path.as_str(), USUAL].map(|path| root.path(path)).into_iter().find(|p| p.exists()).unwrap_or_default(),
            ),
        }
    }

    /// Whether a root has it already. A link in its place, such as that of a unit that was masked, is something else.
    ///
    /// # Errors
    /// Those of reading there.
    pub fn is_in(&self, root: &Below) -> Result<bool> {
        Ok(!self.is_link_in(root)? && root.read(self.inner())?.as_ref() == Some(&self.bytes))
    }

    /// Writes it to a root that hasn't got it, as a [`Rewritten::change`] of the file of the booted root.
    ///
    /// # Errors
    /// Those of writing there.
    pub fn write(&self, root: &Below, booted: &Root) -> Result<()> {
        if self.is_in(root)? {
            return Ok(());
        }
        if self.is_link_in(root)? {
            // It gives way to a file, which then gets its attributes.
            root.publish(self.inner(), self.bytes.clone())?;
        }
        root.apply(&self.change("", booted))
    }

    fn is_link_in(&self, root: &Below) -> Result<bool> {
        Ok(root.stat(self.inner().as_ref())?.is_some_and(|stat| is_link(&stat)))
    }

    fn inner(&self) -> &str {
        self.path.trim_start_matches('/')
    }
}

/// A tree that is copied: the root, or a partition that is mounted below it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Tree {
    /// What it is.
    pub role: Role,
    /// Where it is mounted in the running system: `""` for the root, `/home` and so on.
    pub at: String,
    /// Where it is copied from, if not from there.
    pub from: Option<PathBuf>,
    /// rsync's filter rules.
    pub rules: Vec<String>,
}

impl Tree {
    /// The tree of a role, with the rules that hold in it; None for roles that aren't copied by rsync.
    /// `exclude` are rules of the configuration, `apart` paths of files that are written separately, and `generation` is the one of
    /// which this is the root, if any.
    pub fn new(role: &Role, exclude: &[String], apart: &[Rewritten], generation: Option<Generation>) -> Option<Self> {
        let at = role.tree()?;
        let apart = apart.iter().map(|file| format!("- {}", escape(&file.path)));
        let user = exclude.iter().map(|rule| if has_prefix(rule) { rule.clone() } else { format!("- {rule}") });
        let strings = |rules: &[&str]| rules.iter().map(|r| (*r).to_owned()).collect::<Vec<_>>();
        // Older generations have theirs.
        let modules = strings(if generation.is_some() { &[] } else { &UNTIL_THE_END });
        let all = strings(&ALWAYS).into_iter().chain(apart).chain(user).chain(strings(&USUALLY)).chain(modules);
        let rules = all.filter_map(|rule| reanchor(&rule, at)).collect();
        Some(Self { role: role.clone(), at: at.to_owned(), from: None, rules })
    }

    /// Where the tree is copied from, with a slash behind it.
    pub fn source(&self) -> PathBuf {
        let at = PathBuf::from(format!("{}/", self.at));
        self.from.as_ref().map_or(at, |from| from.join(""))
    }

    /// rsync's arguments for comparing the source with a tree: a line for everything that is to change, and nothing is written.
    pub fn comparison(&self) -> Vec<OsString> {
        // Between two slashes, as these are in no path.
        let own = ["--dry-run", "--delete", "--force", "--out-format=//%i//%n//%L", "--filter=- /.dualroot"];
        let rules = self.rules.iter().map(|rule| format!("--filter={rule}"));
        let all = own.iter().map(|arg| (*arg).to_owned()).chain(rules);
        self.run(all.map(Into::into), "./")
    }

    /// rsync's arguments for staging what is listed on standard input. What is listed but hasn't changed, the other names of
    /// files that have got a new one, becomes another name of the tree's own file.
    fn staging(&self) -> Vec<OsString> {
        let own = ["--files-from=-", "--from0", "--ignore-missing-args", "--link-dest=../.."];
        self.run(own.into_iter().map(Into::into), &format!("./{}/", stage::NEW))
    }

    /// rsync's arguments for changing nothing but attributes, of files that are listed on standard input.
    fn dressing(&self) -> Vec<OsString> {
        let own = ["--files-from=-", "--from0", "--ignore-missing-args", "--existing", "--no-implied-dirs"];
        self.run(own.into_iter().map(Into::into), "./")
    }

    fn run(&self, own: impl Iterator<Item = OsString>, target: &str) -> Vec<OsString> {
        let same = ["--archive", "--hard-links", "--acls", "--xattrs", "--numeric-ids", "--sparse", "--one-file-system"];
        let all = same.into_iter().map(Into::into).chain(own);
        all.chain([self.source().into_os_string(), target.into()]).collect()
    }

    /// Whether anything below the handle is to change.
    ///
    /// # Errors
    /// As [`Tree::copy`].
    pub fn differs(&self, target: &Below) -> Result<bool> {
        let said = rsync(self.comparison(), Stdio::null(), Stdio::piped(), target)
            .with_context(|| format!("the comparison with {}", self.source().display()))?;
        Ok(Changes::parse(&said) != Changes::default())
    }

    /// Copies the tree to below the handle: what differs is staged there, whole, and then put into its place. Where nothing
    /// differs, nothing is written.
    ///
    /// # Errors
    /// What rsync couldn't read or write; its messages are in the error. A source file that vanished meanwhile is none.
    pub fn copy(&self, target: &Below) -> Result<()> {
        self.copy_with(target, stage::complete).with_context(|| format!("the copy of {}", self.source().display()))
    }

    fn copy_with(&self, target: &Below, complete: impl Fn(&Below) -> Result<Found>) -> Result<()> {
        // What a sync that was cut has left comes first, if it is whole. If not, all that differs is found anyway.
        complete(target)?;
        let mut changes = Changes::parse(&rsync(self.comparison(), Stdio::null(), Stdio::piped(), target)?);
        if changes == Changes::default() {
            return Ok(());
        }
        // A new owner of all files isn't worth a copy of them all where there is no room for that.
        let mut in_place = Vec::new();
        if changes.check_room(&self.source(), target).is_err() {
            in_place = std::mem::take(&mut changes.attributes);
            changes.check_room(&self.source(), target)?;
        }
        stage::begin(target)?;
        let staged = list(&in_place, "attributes", target).and_then(|list| self.stage(&changes, target).map(|()| list));
        if staged.is_err() {
            // It takes room that the spare may need when it is booted.
            let _ = stage::discard(target);
        }
        let later = staged?;
        complete(target)?;
        if let Some(list) = later {
            rsync(self.dressing(), list.into(), Stdio::null(), target)?;
        }
        Ok(())
    }

    fn stage(&self, changes: &Changes, target: &Below) -> Result<()> {
        let paths = [&*changes.list, &*changes.attributes, &*changes.links, &*changes.parents(&self.source())].concat();
        if let Some(list) = list(&paths, "list", target)? {
            match Progress::begin(|| files(&self.source(), &changes.list).map(|meta| meta.len()).sum()) {
                None => drop(rsync(self.staging(), list.into(), Stdio::null(), target)?),
                Some(progress) => self.stage_shown(list, target, progress)?,
            }
        }
        let source = self.source();
        let top = File::open(&source).with_context(|| source.display().to_string())?;
        stage::seal(target, &changes.gone, &top)
    }

    fn stage_shown(&self, list: File, target: &Below, progress: Progress) -> Result<()> {
        let mut command = program::command("rsync")?;
        command.args(SHOWN).args(self.staging()).stdin(list);
        run_rsync_shown(command, target, progress)
    }
}

/// How many bytes rsync says that it has copied, as `--info=progress2` does: "  1048576  34%  9.43MB/s  0:00:02 (xfr#1, to-chk=2/5)".
fn bytes_done(line: &[u8]) -> Option<u64> {
    let mut words = std::str::from_utf8(line).ok()?.split_ascii_whitespace();
    let done = words.next()?.parse().ok()?;
    words.next()?.ends_with('%').then_some(done)
}

/// What rsync found to be different.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
struct Changes {
    /// The paths that are to be staged, each with NUL behind it.
    list: Vec<u8>,
    /// Likewise, files of which nothing but attributes differs.
    attributes: Vec<u8>,
    /// Likewise, further names of files.
    links: Vec<u8>,
    /// What the source doesn't have: directories with a slash behind them, and after what is in them.
    gone: Vec<OsString>,
    /// Whether the attributes of the top directory differ.
    top: bool,
}

impl Changes {
    fn parse(said: &[u8]) -> Self {
        let mut found = Self::default();
        for line in said.split(|b| *b == b'\n') {
            let Some([item, path, link]) = fields(line) else { continue };
            let path = unescape(path);
            match item {
                [b'*', b'd', ..] => found.gone.push(path),
                [b'*', ..] => {}
                // Content, size and time are the same, and no name is new.
                [b'.' | b'h', b'f', b'.', b'.', b'.', ..] if link.is_empty() => append(&mut found.attributes, &path),
                [b'h', ..] => {
                    append(&mut found.links, &path);
                    // The first name is listed, too, although that file may be the same as before.
                    append(&mut found.links, &unescape(link.strip_prefix(b" => ").unwrap_or_default()));
                }
                _ if path == "./" => found.top = true,
                // By a slash, rsync would understand all that is in a directory.
                _ => append(&mut found.list, OsStr::from_bytes(path.as_bytes().strip_suffix(b"/").unwrap_or(path.as_bytes()))),
            }
        }
        found
    }

    /// The directories from which something goes, and which stay: their times change by that.
    fn parents(&self, source: &Path) -> Vec<u8> {
        let parents: BTreeSet<&Path> = self.gone.iter().filter_map(|path| Path::new(path).parent()).collect();
        let gone: BTreeSet<&Path> = self.gone.iter().map(Path::new).collect();
        let mut list = Vec::new();
        for dir in parents.difference(&gone) {
            // One that is something else now is listed already.
            if source.join(dir).symlink_metadata().is_ok_and(|meta| meta.is_dir()) {
                append(&mut list, dir.as_os_str());
            }
        }
        list
    }

    /// What is staged lies beside what it will replace.
    fn check_room(&self, source: &Path, target: &Below) -> Result<()> {
        let all = [&self.list, &self.attributes].into_iter().flat_map(|list| files(source, list));
        let needed = all.fold(0u64, |sum, meta| sum.saturating_add(meta.len().min(meta.blocks().saturating_mul(512))));
        let s = nix::sys::statvfs::fstatvfs(target.fd())?;
        let free = s.fragment_size().saturating_mul(s.blocks_free());
        if needed > free {
            bail!(
                "{needed} bytes are to be staged on the spare before anything there is replaced, but only {free} are free, {} too \
                 few; nothing was changed; remove on the booted disk what isn't needed, or make the spare's partition larger, or \
                 make a new file system there",
                needed - free
            );
        }
        Ok(())
    }
}

/// The files among these paths. What has gone meanwhile is none.
fn files(source: &Path, paths: &[u8]) -> impl Iterator<Item = Metadata> {
    let paths = paths.split(|b| *b == 0).filter(|path| !path.is_empty());
    paths.filter_map(|path| source.join(OsStr::from_bytes(path)).symlink_metadata().ok()).filter(Metadata::is_file)
}

/// Writes paths for rsync to read; None where there are none. The file can be read even when what is staged has been removed.
fn list(paths: &[u8], name: &str, target: &Below) -> Result<Option<File>> {
    if paths.is_empty() {
        return Ok(None);
    }
    let path = format!("{}/{name}", stage::DIRECTORY);
    target.apply(&Change::Create { path: path.clone(), content: Content::Bytes(paths.to_vec()) })?;
    Ok(Some(target.file(&path)?.with_context(|| format!("{path} has gone"))?))
}

fn append(list: &mut Vec<u8>, path: &OsStr) {
    if !path.is_empty() {
        list.extend_from_slice(path.as_bytes());
        list.push(0);
    }
}

/// The fields of a line of [`Tree::comparison`]; other lines are messages.
fn fields(line: &[u8]) -> Option<[&[u8]; 3]> {
    let cut = |text: &'_ [u8]| text.windows(2).position(|two| two == b"//");
    let line = line.strip_prefix(b"//")?;
    let (item, rest) = line.split_at_checked(cut(line)?)?;
    let rest = rest.get(2..)?;
    let mut at = cut(rest)?;
    // A directory's own slash comes first.
    if rest.get(at + 2) == Some(&b'/') {
        at += 1;
    }
    let (path, link) = rest.split_at_checked(at)?;
    Some([item, path, link.get(2..)?])
}

/// Makes the modules directory of the spare's tree that of the booted disk, old kernels' modules gone.
///
/// # Errors
/// As [`Tree::copy`].
pub fn drop_old_modules(tree: &Tree, target: &Below) -> Result<()> {
    for dir in ["/usr/lib/modules", "/lib/modules"] {
        let Some(inner) = dir.strip_prefix(tree.at.as_str()).and_then(|d| d.strip_prefix('/')) else { continue };
        let source = tree.source().join(inner);
        // Where /lib is a link to usr/lib, it is the same directory.
        if source.canonicalize().is_ok_and(|real| real == source) {
            // Most syncs have none to remove, and rsync would read all modules of the others to find that.
            let stays = |name: &OsString| source.join(name).symlink_metadata().is_ok();
            let Some(there) = target.sub(OsStr::new(inner))? else { continue };
            if there.names(OsStr::new("."))?.iter().all(stays) {
                continue;
            }
            // What differs otherwise is for the next sync to stage.
            let only = ["-aHAX", "--numeric-ids", "--one-file-system", "--delete", "--existing", "--ignore-existing"];
            let mut args: Vec<OsString> = only.map(Into::into).into();
            args.push(source.join("").into());
            args.push(format!("./{inner}/").into());
            rsync(args, Stdio::null(), Stdio::null(), target)
                .with_context(|| format!("the removal of old kernels' modules from {dir}"))?;
        }
    }
    Ok(())
}

/// Exit status of rsync when source files vanished before they could be transferred (rsync(1), EXIT VALUES).
const VANISHED: i32 = 24;

fn rsync(args: Vec<OsString>, input: Stdio, output: Stdio, target: &Below) -> Result<Vec<u8>> {
    let mut command = program::command("rsync")?;
    command.args(args).stdin(input).stdout(output);
    run_rsync(command, target)
}

/// Runs rsync on the directory of a handle, and returns what it printed, if that is piped.
///
/// # Errors
/// As [`Tree::copy`].
pub fn run_rsync(mut command: Command, target: &Below) -> Result<Vec<u8>> {
    end(spawn(&mut command, target)?)
}

/// Options that have rsync say how far it is.
pub(crate) const SHOWN: [&str; 2] = ["--info=progress2", "--no-human-readable"];

/// As [`run_rsync`], with [`SHOWN`] among its options, and shows what it says. Its own line has the time that is left in turns with the time that
/// has gone, and in the share of the work only what it has found so far.
///
/// # Errors
/// As [`Tree::copy`].
pub(crate) fn run_rsync_shown(mut command: Command, target: &Below, mut progress: Progress) -> Result<()> {
    let mut child = spawn(command.stdout(Stdio::piped()), target)?;
    let lines = child.stdout.take().context("there is no pipe")?;
    thread::scope(|scope| {
        scope.spawn(move || {
            for line in BufReader::new(lines).split(b'\r').map_while(Result::ok) {
                if let Some(done) = bytes_done(&line) {
                    progress.show(done);
                }
            }
        });
        end(child)
    })?;
    Ok(())
}

fn spawn(command: &mut Command, target: &Below) -> Result<Child> {
    // The child changes to the directory by our handle, before it becomes rsync: no path can lead it elsewhere.
    command.stderr(Stdio::piped()).current_dir(target.proc_path()).spawn().context("rsync can't be run")
}

fn end(child: Child) -> Result<Vec<u8>> {
    let done = child.wait_with_output().context("rsync can't be waited for")?;
    match done.status.code() {
        Some(0 | VANISHED) => Ok(done.stdout),
        _ => {
            let said = String::from_utf8_lossy(&done.stderr);
            let said: Vec<&str> = said.lines().rev().take(8).collect();
            let said: Vec<&str> = said.into_iter().rev().collect();
            bail!("rsync failed ({}): {}", done.status, said.join("; "))
        }
    }
}

/// Whether a rule of `exclude=` is more than a pattern (rsync(1), FILTER RULES).
fn has_prefix(rule: &str) -> bool {
    rule.split_once(' ').is_some_and(|(op, _)| {
        let short = op.split(',').next().unwrap_or_default();
        matches!(short, "-" | "+" | "P" | "R" | "H" | "S" | "exclude" | "include" | "hide" | "show" | "protect" | "risk")
    })
}

/// A path as a pattern that means just it. Where nothing in it is a wildcard, a backslash is one to rsync, as in names of units.
fn escape(path: &str) -> String {
    if !path.contains(['*', '?', '[']) {
        return path.to_owned();
    }
    let mut out = String::new();
    for c in path.chars() {
        if matches!(c, '*' | '?' | '[' | ']' | '\\') {
            out.push('\\');
        }
        out.push(c);
    }
    out
}

/// A rule by the path in the running system, as a rule for the transfer of the tree mounted at `at`; None if it is about something
/// outside that tree.
fn reanchor(rule: &str, at: &str) -> Option<String> {
    let (op, pattern) = rule.split_once(' ')?;
    if at.is_empty() || !pattern.starts_with('/') {
        return Some(rule.to_owned());
    }
    let inner = pattern.strip_prefix(at).filter(|rest| rest.starts_with('/'))?;
    Some(format!("{op} {inner}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::names::ident::tests::{ROOT_A, ROOT_B, to_b};
    use proptest::prelude::*;
    use std::cell::Cell;
    use std::collections::BTreeMap;
    use std::fs;
    use std::io::{Read, Seek, Write};
    use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
    use std::time::{Duration, UNIX_EPOCH};

    #[test]
    fn rules_follow_the_tree() {
        assert_eq!(reanchor("- /var/cache/apt/*.bin", "").as_deref(), Some("- /var/cache/apt/*.bin"));
        assert_eq!(reanchor("- /var/cache/apt/*.bin", "/var").as_deref(), Some("- /cache/apt/*.bin"));
        assert_eq!(reanchor("- /various", "/var"), None);
        assert_eq!(reanchor("- /home/x", "/var"), None);
        assert_eq!(reanchor("- *.tmp", "/var").as_deref(), Some("- *.tmp"));
        let tree = Tree::new(&Role::Var, &["/var/spool/x/".into(), "+ /var/cache/dnf/keep".into()], &[], None).unwrap();
        assert!(tree.rules.contains(&"- /spool/x/".to_owned()), "{:?}", tree.rules);
        let at = |rule: &str| tree.rules.iter().position(|r| r == rule).unwrap();
        assert!(at("+ /cache/dnf/keep") < at("- /cache/dnf/*"), "the configuration comes before what is usual");
        assert!(Tree::new(&Role::Swap, &[], &[], None).is_none() && Tree::new(&Role::Esp, &[], &[], None).is_none());
    }

    /// dualroot-entries.service can write nowhere else on the root.
    #[test]
    fn files_that_name_a_disk_are_in_etc() {
        let root = Root::new("/");
        for path in FILES.iter().chain(&DIRECTORIES) {
            let file = Rewritten { path: (*path).to_owned(), bytes: vec![] };
            let inner = path.strip_prefix("/etc/").unwrap();
            for (dir, expected) in [("", format!("etc/{inner}")), ("/etc", inner.to_owned())] {
                assert!(matches!(file.change(dir, &root), Change::Replace { path, .. } if path == expected), "{path}");
            }
        }
    }

    fn unit(uuid: &str) -> String {
        format!("[Mount]\nWhat=/dev/disk/by-uuid/{uuid}\nWhere=/x\n")
    }

    #[test]
    fn f14_units_are_rewritten_but_for_links_and_what_is_about_another_disk() {
        let tmp = tempfile::tempdir().unwrap();
        let root = Root::new(tmp.path());
        let units = tmp.path().join("etc/systemd/system");
        for dir in ["home.mount.d", "x.service.d", "local-fs.target.wants", "elsewhere"] {
            fs::create_dir_all(units.join(dir)).unwrap();
        }
        let swap = format!("dev-disk-by\\x2duuid-{}.swap", ROOT_A.replace('-', "\\x2d"));
        let files = [
            "dev-zram0.swap",
            "home.mount",
            "home.mount.d/a.conf",
            "mnt-root1.mount",
            "srv-my\\x2ddata.mount",
            &swap,
            "home.automount",
            "home.mount.d/notes",
            "x.service",
            "x.service.d/a.conf",
            "elsewhere/a.conf",
        ];
        for name in files {
            fs::write(units.join(name), unit(ROOT_A)).unwrap();
        }
        for (link, to) in [
            ("masked.mount", "/dev/null"),
            ("alias.mount", "home.mount"),
            ("gone.swap", "/x"),
            ("local-fs.target.wants/home.mount", "../home.mount"),
            ("x.mount.d", "elsewhere"),
            ("loop.mount.d", "loop.mount.d"),
            ("home.mount.d/b.conf", "a.conf"),
        ] {
            symlink(to, units.join(link)).unwrap();
        }
        let mut paths: Vec<String> = files[..6].iter().map(|name| format!("/etc/systemd/system/{name}")).collect();
        paths.sort();
        let mut found = identifying_files(&root).unwrap();
        found.sort();
        assert_eq!(found, paths);
        assert_eq!(links(&root, &[]).unwrap(), [""; 0]);
        let spares = DirPath::parse("/mnt/root1").unwrap();
        let new = rewritten(&root, &to_b(), None, |dir| dir.is_within(&spares)).unwrap();
        paths.retain(|path| !path.contains("root1") && !path.contains("uuid"));
        assert_eq!(new.iter().map(|file| &file.path).collect::<BTreeSet<_>>(), paths.iter().collect());
        assert!(new.iter().all(|file| file.bytes == unit(ROOT_B).into_bytes()), "{new:?}");
        // As where the whole configuration is made by something else.
        fs::rename(&units, tmp.path().join("etc/static")).unwrap();
        symlink("../static", &units).unwrap();
        assert_eq!(identifying_files(&root).unwrap(), [""; 0]);
    }

    #[test]
    fn f14_a_unit_that_was_masked_becomes_one() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let path = "etc/systemd/system/home.mount";
        for dir in [from.path(), to.path()] {
            fs::create_dir_all(dir.join(path).parent().unwrap()).unwrap();
        }
        fs::write(from.path().join(path), unit(ROOT_A)).unwrap();
        symlink("/dev/null", to.path().join(path)).unwrap();
        let file = Rewritten { path: format!("/{path}"), bytes: unit(ROOT_B).into_bytes() };
        let (root, below) = (Root::new(from.path()), Below::open(to.path()).unwrap());
        for _ in 0..2 {
            file.write(&below, &root).unwrap();
            assert!(file.is_in(&below).unwrap());
            assert_eq!(below.read(path).unwrap(), Some(file.bytes.clone()));
        }
        fs::remove_file(to.path().join(path)).unwrap();
        file.write(&below, &root).unwrap();
        assert!(file.is_in(&below).unwrap());
    }

    #[test]
    fn f12_what_is_written_apart_is_not_copied_whatever_it_is_called() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let names = ["srv-my\\x2ddata.mount", "[x]\\x2d*.conf", "plain"];
        for name in names {
            fs::write(from.path().join(name), "").unwrap();
        }
        copy(from.path(), to.path(), &[], &names.map(|name| Rewritten { path: format!("/{name}"), bytes: vec![] }));
        assert_eq!(fs::read_dir(to.path()).unwrap().count(), 0);
    }

    fn copy(from: &std::path::Path, to: &std::path::Path, exclude: &[String], apart: &[Rewritten]) {
        let mut tree = Tree::new(&Role::Root, exclude, apart, None).unwrap();
        tree.at = from.to_str().unwrap().to_owned();
        tree.copy(&Below::open(to).unwrap()).unwrap();
    }

    #[test]
    fn a_tree_is_copied_without_what_is_excluded_and_old_modules_stay() {
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
        assert!(has("var/lib/dualroot/identifiers.json") && !has("var/lib/dualroot/own"), "what a spare knew is out of date");
        assert!(has("mnt/root1/kept"), "what is excluded isn't deleted either");
        assert_eq!(fs::read(to.path().join("etc/fstab")).unwrap(), b"of the spare");
        let inode = |path: &str| std::os::unix::fs::MetadataExt::ino(&fs::metadata(to.path().join(path)).unwrap());
        assert_eq!(inode("a"), inode("b"), "hard links stay hard links");
    }

    #[test]
    fn on_a_terminal_it_is_shown_how_far_a_copy_is() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::write(from.path().join("a"), [1; 300_000]).unwrap();
        fs::hard_link(from.path().join("a"), from.path().join("b")).unwrap();
        let mut tree = Tree::new(&Role::Root, &[], &[], None).unwrap();
        tree.at = from.path().to_str().unwrap().to_owned();
        let below = Below::open(to.path()).unwrap();
        stage::begin(&below).unwrap();
        let list = || list(b"a\0b\0", "list", &below).unwrap().unwrap();
        let mut terminal = tempfile::tempfile().unwrap();
        tree.stage_shown(list(), &below, Progress::on(terminal.try_clone().unwrap(), 300_000)).unwrap();
        assert_eq!(fs::read(to.path().join(".dualroot/new/b")).unwrap(), [1; 300_000]);
        let mut said = String::new();
        terminal.rewind().unwrap();
        terminal.read_to_string(&mut said).unwrap();
        assert!(said.starts_with("\r[") && said.contains(" MiB/s ") && said.ends_with("\r\x1b[K"), "{said:?}");
        tree.at = "/nonexistent-source".into();
        let error = tree.stage_shown(list(), &below, Progress::on(terminal, 1)).unwrap_err().to_string();
        assert!(error.contains("rsync failed"), "{error}");
    }

    #[test]
    fn what_rsync_says_of_its_progress() {
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

    /// What may be at a path of a tree. The size of a file follows from its content, as rsync looks at sizes and times.
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
        /// Another name of a file before it.
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

    /// Makes the tree, as far as it can be made: nothing lies below what isn't a directory.
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
                        // Not every file system has them.
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

    /// Everything in a tree but `.dualroot`, by its path: what it is, whole, and what other names it has.
    fn look(root: &Path) -> BTreeMap<PathBuf, (String, BTreeSet<PathBuf>)> {
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

    /// The source is all in the spare, with nothing else there. Names that were one file on the spare and aren't in the source
    /// are left so by rsync while they are equal.
    fn assert_same(source: &Path, spare: &Path) {
        let (wanted, found) = (look(source), look(spare));
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
            // Where flushing costs nothing, if there is such a place.
            let tmp = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
            for (name, listing) in [("source", source), ("spare", spare)] {
                fs::create_dir(tmp.path().join(name)).unwrap();
                make(&tmp.path().join(name), listing);
            }
            let mut tree = Tree::new(&Role::Root, &[], &[], None).unwrap();
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

    /// Completes a tree up to this many steps.
    fn cut_after(steps: usize) -> impl Fn(&Below) -> Result<Found> {
        let left = Cell::new(steps);
        move |tree: &Below| {
            stage::complete_with(tree, &mut || match left.get().checked_sub(1) {
                Some(rest) => {
                    left.set(rest);
                    Ok(())
                }
                None => bail!("cut"),
            })
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn f18_any_tree_becomes_any_other_wherever_that_is_cut(source in listing(), spare in listing(), steps in 0usize..40) {
            let pair = Pair::new(&source, &spare);
            let old = look(&pair.spare());
            // Staged whole, and nothing more.
            pair.tree.copy_with(&pair.below, |_| Ok(Found::Nothing)).unwrap();
            let mut staged = look(&pair.spare());
            staged.insert(PathBuf::new(), old[Path::new("")].clone());
            prop_assert_eq!(&old, &staged);
            // The cut, and what the spare does when it is booted.
            let cut = cut_after(steps)(&pair.below);
            if let Err(e) = cut {
                prop_assert_eq!(format!("{e:#}"), "cut");
            }
            stage::complete(&pair.below).unwrap();
            assert_same(&pair.source(), &pair.spare());
            let left = pair.differences();
            // A cut at the very end leaves the time of the top directory to the next sync.
            prop_assert!(left.is_empty() || left == b"//.d..t......//.///\n", "{}", left.escape_ascii());
            pair.tree.copy(&pair.below).unwrap();
            assert_eq!(pair.differences().escape_ascii().to_string(), "");
        }
    }

    #[test]
    fn links_in_the_place_of_files_that_name_disks_are_found() {
        let tmp = tempfile::tempdir().unwrap();
        let root = Root::new(tmp.path());
        for dir in ["etc/dracut.conf.d", "etc/default", "usr/etc"] {
            fs::create_dir_all(tmp.path().join(dir)).unwrap();
        }
        fs::write(tmp.path().join("etc/crypttab"), "").unwrap();
        fs::write(tmp.path().join("etc/dracut.conf.d/a.conf"), "").unwrap();
        symlink("/dev/null", tmp.path().join("etc/dracut.conf.d/masked.conf")).unwrap();
        assert_eq!(links(&root, &["/etc/hostname"]).unwrap(), [""; 0]);
        for (link, to) in [
            ("etc/hostname", "x"),
            ("etc/fstab", "/usr/etc/fstab"),
            ("etc/dracut.conf.d/b.conf", "a.conf"),
            ("etc/kernel", "../usr/kernel"),
        ] {
            symlink(to, tmp.path().join(link)).unwrap();
        }
        let expected = [
            "/etc/dracut.conf.d/b.conf -> a.conf",
            "/etc/fstab -> /usr/etc/fstab",
            "/etc/hostname -> x",
            "/etc/kernel -> ../usr/kernel",
        ];
        assert_eq!(links(&root, &["/etc/hostname"]).unwrap(), expected);
    }

    #[test]
    fn f18_links_lead_to_something_at_every_step() {
        let build = |pair: &Pair| {
            for (dir, files) in [
                // A library whose link changes, and the directories of all libraries merged, or parted again.
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
            let done = pair.tree.copy_with(&pair.below, cut_after(steps)).is_ok();
            for path in ["lib/ld.so", "lib.so", "bin/sh"] {
                let text =
                    fs::read_to_string(pair.spare().join(path)).unwrap_or_else(|e| panic!("{path} after {steps} steps: {e}"));
                assert!(text == "newer" || text == "old" && !done);
            }
            exchanged |=
                pair.spare().join(".dualroot/new/bin").is_symlink() && pair.spare().join(".dualroot/new/lib/ld.so").exists();
            // The next sync goes on where this one was cut.
            pair.tree.copy(&pair.below).unwrap();
            assert_same(&pair.source(), &pair.spare());
            if done {
                assert!(exchanged, "there is no instant without the directory and without the link");
                break;
            }
        }
    }

    #[test]
    fn f18_a_cut_while_staging_leaves_the_old_tree() {
        let node = |size, time| Node::File { size, mode: 0o644, time, attribute: false };
        let pair = Pair::new(&vec![(0, node(1, 1)), (1, node(2, 2))], &vec![(0, node(3, 1)), (9, node(1, 1))]);
        let old = look(&pair.spare());
        stage::begin(&pair.below).unwrap();
        fs::write(pair.spare().join(".dualroot/new/a"), "half of").unwrap();
        assert_eq!(stage::complete(&pair.below).unwrap(), Found::Half);
        let mut found = look(&pair.spare());
        found.insert(PathBuf::new(), old[Path::new("")].clone());
        assert_eq!(old, found);
        assert!(!pair.spare().join(".dualroot").exists());
        // And the next sync doesn't mind either.
        stage::begin(&pair.below).unwrap();
        fs::write(pair.spare().join(".dualroot/new/a"), "half of").unwrap();
        pair.tree.copy(&pair.below).unwrap();
        assert_same(&pair.source(), &pair.spare());
    }

    #[test]
    fn f18_what_cannot_be_replaced_is_found_before_anything_is() {
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
            // Not every file system knows it.
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
    fn a_directory_with_directories_becomes_something_else() {
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
    fn a_directory_keeps_its_time_when_something_goes_from_it() {
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
    fn only_what_differs_is_written_and_once() {
        let pair = Pair::new(&Vec::new(), &Vec::new());
        for name in ["large", "small", "d/same"] {
            let path = pair.source().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, vec![7; 1 << 20]).unwrap();
        }
        pair.tree.copy(&pair.below).unwrap();
        assert_eq!(pair.differences(), b"");
        let before = look(&pair.spare());
        let looks = Cell::new(0);
        let look_only = |_: &Below| Ok((looks.set(looks.get() + 1), Found::Nothing).1);
        pair.tree.copy_with(&pair.below, look_only).unwrap();
        assert_eq!(looks.get(), 1, "there is nothing to put into its place");
        assert_eq!(before, look(&pair.spare()));
        fs::write(pair.source().join("small"), vec![8; 1 << 16]).unwrap();
        fs::hard_link(pair.source().join("large"), pair.source().join("d/large")).unwrap();
        pair.tree.copy_with(&pair.below, |_| Ok(Found::Nothing)).unwrap();
        let (new, old) = (pair.spare().join(".dualroot/new"), pair.spare().join("large").metadata().unwrap().ino());
        let is_written = |path: &PathBuf| new.join(path).metadata().is_ok_and(|m| m.is_file() && m.ino() != old);
        let written: Vec<PathBuf> = look(&new).into_keys().filter(is_written).collect();
        assert_eq!(written, [Path::new("small")], "another name of a file is not another copy of it");
        assert_eq!(fs::metadata(new.join("small")).unwrap().len(), 1 << 16);
        stage::complete(&pair.below).unwrap();
        assert_same(&pair.source(), &pair.spare());
    }

    #[test]
    fn f19_what_does_not_fit_beside_the_old_is_not_begun() {
        let pair = Pair::new(&Vec::new(), &Vec::new());
        let free = {
            let s = nix::sys::statvfs::fstatvfs(pair.below.fd()).unwrap();
            s.fragment_size() * s.blocks_free()
        };
        let file = File::create(pair.source().join("large")).unwrap();
        // Sparse, it takes no room.
        file.set_len(free * 2).unwrap();
        let changes = Changes::parse(&pair.differences());
        changes.check_room(&pair.source(), &pair.below).unwrap();
        let too_much = Changes { list: b"large\0".repeat(3), ..Changes::default() };
        file.set_len(1 << 20).unwrap();
        file.write_all_at(&vec![1; 1 << 20], 0).unwrap();
        let tmpfs = Path::new("/dev/shm");
        if nix::unistd::geteuid().is_root() && tmpfs.exists() {
            crate::devices::mounts::enter_private_namespace().unwrap();
            use nix::mount::{MsFlags, mount};
            mount(Some("none"), &pair.spare(), Some("tmpfs"), MsFlags::empty(), Some("size=2m")).unwrap();
            let below = Below::open(&pair.spare()).unwrap();
            let error = format!("{:#}", too_much.check_room(&pair.source(), &below).unwrap_err());
            assert!(error.starts_with("3145728 bytes are to be staged") && error.contains("1048576 too few"), "{error}");
            pair.tree.copy(&below).unwrap();
        }
    }

    #[test]
    fn f19_attributes_need_no_room() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let mut pair = Pair::new(&Vec::new(), &Vec::new());
        crate::devices::mounts::enter_private_namespace().unwrap();
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
    fn f22_what_is_excluded_keeps_its_directory_and_that_is_said() {
        let pair = Pair::new(&Vec::new(), &Vec::new());
        fs::write(pair.source().join("mnt"), "").unwrap();
        fs::create_dir_all(pair.spare().join("mnt/root1/x")).unwrap();
        let error = format!("{:#}", pair.tree.copy(&pair.below).unwrap_err());
        assert!(error.contains("could not make way for new regular file: mnt"), "{error}");
        assert!(pair.spare().join("mnt/root1/x").exists() && !pair.spare().join(".dualroot").exists());
    }

    #[test]
    fn what_is_a_file_system_of_its_own_on_the_spare_stays() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let mut pair = Pair::new(&Vec::new(), &Vec::new());
        for dir in [pair.source(), pair.spare()] {
            fs::create_dir(dir.join("own")).unwrap();
        }
        fs::write(pair.source().join("file"), "new").unwrap();
        crate::devices::mounts::enter_private_namespace().unwrap();
        use nix::mount::{MsFlags, mount};
        // As a subvolume of btrfs, such as systemd-tmpfiles makes of /var/lib/machines.
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
    fn what_is_staged_in_the_source_is_not_copied() {
        let pair = Pair::new(&Vec::new(), &Vec::new());
        fs::create_dir_all(pair.source().join(".dualroot/new")).unwrap();
        fs::create_dir_all(pair.source().join("home/.dualroot")).unwrap();
        pair.tree.copy(&pair.below).unwrap();
        assert!(!pair.spare().join(".dualroot").exists() && pair.spare().join("home/.dualroot").exists());
    }

    #[test]
    fn what_is_mounted_in_a_tree_is_not_copied_and_what_is_below_it_is() {
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
        crate::devices::mounts::enter_private_namespace().unwrap();
        let bind = |from: &str, to: &str| {
            use nix::mount::{MsFlags, mount};
            mount(Some(&path(from)), &path(to), None::<&str>, MsFlags::MS_BIND, None::<&str>).unwrap();
        };
        bind("from/home", "from/again");
        bind("from/home", "from/mnt");
        let alone = crate::devices::mounts::Alone::open(&path("from"), &path("alone")).unwrap();
        let mut tree = Tree::new(&Role::Root, &[], &[], None).unwrap();
        tree.from = Some(alone.place().to_owned());
        let below = Below::open(&path("to")).unwrap();
        tree.copy(&below).unwrap();
        assert!(path("to/mnt/below").exists() && !path("to/mnt/x").exists() && !path("to/again/x").exists());
        assert!(path("to/home/x").exists() && path("to/usr/lib/modules/1/m").exists());
        drop_old_modules(&tree, &below).unwrap();
        assert!(path("to/usr/lib/modules/2/m").exists() && !path("to/usr/lib/modules/1").exists());
        fs::write(path("to/usr/lib/modules/2/new"), "").unwrap();
        drop_old_modules(&tree, &below).unwrap();
        assert!(path("to/usr/lib/modules/2/new").exists(), "where no kernel goes, nothing is looked at");
        for top in ["from", "to"] {
            symlink("usr/lib", path(top).join("lib")).unwrap();
        }
        drop_old_modules(&tree, &below).unwrap();
        fs::remove_dir_all(path("to/usr")).unwrap();
        drop_old_modules(&tree, &below).unwrap();
        assert!(fs::write(alone.place().join("new"), "").is_err(), "nothing is written to the booted disk by it");
    }

    #[test]
    fn f22_a_failed_copy_is_an_error() {
        let to = tempfile::tempdir().unwrap();
        let mut tree = Tree::new(&Role::Root, &[], &[], None).unwrap();
        tree.at = "/nonexistent-source".into();
        let error = format!("{:#}", tree.copy(&Below::open(to.path()).unwrap()).unwrap_err());
        assert!(error.contains("rsync failed") && error.contains("/nonexistent-source"), "{error}");
    }
}
