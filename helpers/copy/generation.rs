//! Generations of a spare's root. Where that is btrfs, a sync that changes it makes a new subvolume of it, a snapshot of the last one
//! that was brought up to date, and has the entries name that (`rootflags=subvol=`). So no entry ever leads to half a root: root and
//! kernel change together, with the entry. The last few stay, and are offered in the boot menu.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::Path;
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::base::program;
use crate::base::types::Role;
use crate::boot::entry::{self, EntryName};
use crate::boot::files::{BootFile, BootFiles, Class, fold};
use crate::boot::order::Wanted;
use crate::write::below::{Below, Change, Content};

/// The directory at the top of the file system that holds the subvolumes.
const DIRECTORY: &str = "dualroot";
/// Where one is that is being made. No entry names it.
const NEW: &str = "dualroot/new";
/// What the ids of entries that boot older generations begin with. They have no sort key: so the boot loader puts them behind those
/// that have one, and among the others the greatest name comes first, and nothing is less than a hyphen.
const OFFER: &str = "-dualroot-";
/// The first version of systemd-boot for which that is so. For those before it, the hyphen is greater than letters.
const SORTS_HYPHENS_LAST: u32 = 250;
/// The inode number of the top directory of every subvolume.
pub(crate) const TOP: u64 = 256;

/// The number of a generation, from 1.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Generation(u32);

impl Generation {
    /// Reads the name of a generation's subvolume.
    ///
    /// # Errors
    /// What is no decimal number from 1, or has zeros in front.
    pub fn parse(name: &str) -> Result<Self> {
        let number: u32 = name.parse().with_context(|| format!("'{}' is no generation", name.escape_debug()))?;
        if number == 0 || number.to_string() != name {
            bail!("'{}' is no generation", name.escape_debug());
        }
        Ok(Self(number))
    }

    /// The number.
    pub fn number(self) -> u32 {
        self.0
    }

    /// Its subvolume, as a path from the top of the file system.
    pub fn subvolume(self) -> String {
        format!("{DIRECTORY}/{self}")
    }

    /// A kernel's command line, or an entry, that boots this generation: `rootflags=` names its subvolume, and comes behind `root=` where
    /// it wasn't there. Every other byte stays. Doing it twice is doing it once.
    pub fn boot(self, text: &[u8]) -> Vec<u8> {
        let has_flags = words(text).any(|word| word.starts_with(FLAGS));
        let mut out = Vec::with_capacity(text.len() + 32);
        for word in text.split_inclusive(u8::is_ascii_whitespace) {
            let bare = word.trim_ascii_end();
            let behind = word.get(bare.len()..).unwrap_or_default();
            if let Some(value) = bare.strip_prefix(FLAGS) {
                let (quote, flags) = unquote(value);
                let others = flags.split(|b| *b == b',').filter(|flag| !flag.is_empty() && !names_subvolume(flag));
                let own = format!("subvol={}", self.subvolume());
                let flags = others.chain([own.as_bytes()]).collect::<Vec<_>>().join(&b',');
                out.extend([FLAGS, quote, &flags, quote].concat());
            } else {
                out.extend(bare);
                if bare.starts_with(b"root=") && !has_flags {
                    out.extend(format!(" rootflags=subvol={}", self.subvolume()).bytes());
                }
            }
            out.extend(behind);
        }
        out
    }
}

/// Where a kernel's command line says how the root is mounted.
const FLAGS: &[u8] = b"rootflags=";

/// A value of a kernel's command line: the quotes around it, and what is in them.
fn unquote(value: &[u8]) -> (&[u8], &[u8]) {
    match value {
        [b'"', inner @ .., b'"'] => (b"\"", inner),
        _ => (b"", value),
    }
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

fn words(text: &[u8]) -> impl DoubleEndedIterator<Item = &[u8]> {
    text.split(u8::is_ascii_whitespace).filter(|word| !word.is_empty())
}

/// Whether a mount option says which subvolume of a btrfs is mounted.
pub fn names_subvolume(option: &[u8]) -> bool {
    option.starts_with(b"subvol=") || option.starts_with(b"subvolid=")
}

/// The subvolume that an entry boots, as a path from the top of the file system; None where it doesn't say.
fn booted_by(entry: &[u8]) -> Option<String> {
    let (_, flags) = unquote(words(entry).filter_map(|word| word.strip_prefix(FLAGS)).next_back()?);
    let path = flags.split(|b| *b == b',').filter_map(|flag| flag.strip_prefix(b"subvol=")).next_back()?;
    let path = std::str::from_utf8(path).ok()?.trim_matches('/');
    path.split('/').all(|name| name != "..").then(|| path.to_owned())
}

fn generation_of(entry: &[u8]) -> Option<Generation> {
    Generation::parse(booted_by(entry)?.strip_prefix(DIRECTORY)?.strip_prefix('/')?).ok()
}

/// The generation of which a directory of a file system, as it is mounted, is the root; None where that is another one.
pub fn at(root: &str) -> Option<Generation> {
    Generation::parse(root.strip_prefix('/')?.strip_prefix(DIRECTORY)?.strip_prefix('/')?).ok()
}

/// Why the booted disk is no source: its entries boot a generation, and the root that runs, a directory of the file system, is another
/// one, such as an older one that was booted for a look.
pub fn no_source(root: &str, booted: &BTreeMap<Role, BootFiles>) -> Option<String> {
    let named: BTreeSet<Generation> = booted.values().flat_map(self::booted).collect();
    let runs = at(root);
    let newest = named.last().filter(|_| runs.is_none_or(|runs| !named.contains(&runs)))?;
    Some(format!(
        "the root that runs is {root}, and the boot loader's entries boot {}; boot that, or have the entries name this one",
        newest.subvolume()
    ))
}

/// Leaves of a booted disk's boot partition what boots the root that runs, a directory of the file system: entries for other subvolumes
/// of it, such as older generations and snapshots, stay on their disk, and so does what only these need.
pub fn keep_own(files: &mut BootFiles, root: &str) {
    let root = root.trim_matches('/');
    let is_other =
        |file: &BootFile| is_offered(file) || file.text.as_deref().and_then(booted_by).is_some_and(|path| path != root);
    let needed = |others: bool| -> BTreeSet<String> {
        let entries = files.of(Class::Entry).filter(|file| is_other(file) == others);
        entries.filter_map(|file| file.text.as_deref()).flat_map(entry::files).map(|path| fold(&path)).collect()
    };
    let (theirs, own) = (needed(true), needed(false));
    let entries: BTreeSet<String> = files.of(Class::Entry).filter(|file| is_other(file)).map(|file| fold(&file.path)).collect();
    files.files.retain(|path, _| !entries.contains(path) && (own.contains(path) || !theirs.contains(path)));
}

/// Whether this is the file name of an entry that boots an older generation: that of its own disk, so that it is never copied.
pub fn is_offer(name: &str) -> bool {
    name.starts_with(OFFER)
}

fn is_offered(file: &BootFile) -> bool {
    file.path.rsplit_once('/').is_some_and(|(_, name)| is_offer(name))
}

/// What becomes of a spare's generations in a sync.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Plan {
    /// The one that the entries name in the end.
    pub current: Generation,
    /// The subvolume that it is made of, as a path from the top; None where it is there already.
    pub made_of: Option<Base>,
    /// Older ones that stay.
    pub kept: Vec<Generation>,
    /// Those that go once no entry names them.
    pub gone: Vec<Generation>,
}

impl Plan {
    /// Those that can go now, of those that are found: not what an entry boots, nor what the next one is yet to be made of.
    pub fn gone_of(&self, found: &[Generation], booted: &BTreeSet<Generation>) -> Vec<Generation> {
        let base = self.made_of.as_ref().filter(|_| !found.contains(&self.current));
        let is_base = |one: &Generation| matches!(base, Some(Base::Snapshot(of)) if *of == one.subvolume());
        self.gone.iter().copied().filter(|one| found.contains(one) && !booted.contains(one) && !is_base(one)).collect()
    }

    /// What is done, a line each, for people.
    pub fn changes(&self) -> impl Iterator<Item = String> {
        let made = self.made_of.as_ref().map(|base| match base {
            Base::Empty => format!("make {}", self.current.subvolume()),
            Base::Snapshot(of) => format!("make {} of {of}", self.current.subvolume()),
        });
        made.into_iter().chain(self.gone.iter().map(|generation| format!("remove {}", generation.subvolume())))
    }
}

/// What a new generation begins as.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Base {
    /// Nothing: all is copied.
    Empty,
    /// A snapshot of this subvolume, given as a path from the top of the file system.
    Snapshot(String),
}

/// The generations that a file system holds: subvolumes with a number for a name.
///
/// # Errors
/// Those of reading the directory.
pub fn found(top: &Below) -> Result<Vec<Generation>> {
    let mut found = Vec::new();
    for (name, _) in top.list(DIRECTORY)? {
        let is_subvolume = top.stat(format!("{DIRECTORY}/{name}").as_ref())?.is_some_and(|stat| stat.st_ino == TOP);
        found.extend(Generation::parse(&name).ok().filter(|_| is_subvolume));
    }
    found.sort();
    Ok(found)
}

/// Whether there is a subvolume at a path from the top of the file system.
pub fn is_subvolume(top: &Below, path: &str) -> bool {
    top.stat(path.as_ref()).is_ok_and(|stat| stat.is_some_and(|stat| stat.st_ino == TOP))
}

/// Why entries of a spare would boot no root, or not the one that is meant for them: `current` of those at the top of its file system.
pub fn prove(top: &Below, found: &BTreeMap<Role, BootFiles>, current: Generation) -> Vec<String> {
    let mut faults = Vec::new();
    for (role, file) in found.iter().flat_map(|(role, files)| files.of(Class::Entry).map(move |file| (role, file))) {
        if let Some(path) = file.text.as_deref().and_then(booted_by).filter(|path| !is_subvolume(top, path)) {
            faults.push(format!("{role}: {} boots the subvolume {path}, which isn't there", file.path));
        }
    }
    if !found.values().flat_map(booted).any(|generation| generation == current) {
        faults.push(format!(
            "no entry boots {}, which the root was copied to; an entry (and /etc/kernel/cmdline) has to say root=, as UUID= or otherwise",
            current.subvolume()
        ));
    }
    faults
}

/// The generations that the entries of a boot partition boot, but those that only offers boot.
pub fn booted(files: &BootFiles) -> BTreeSet<Generation> {
    let entries = files.of(Class::Entry).filter(|file| !is_offered(file));
    entries.filter_map(|file| generation_of(file.text.as_deref()?)).collect()
}

/// What the next generation is compared with, and made of: the last one, or what the spare's entries boot, as after a failover from a
/// disk that was installed otherwise, or what is mounted where they don't say. `is_new` says that nothing on the disk is worth keeping.
///
/// # Errors
/// Those of btrfs(8).
pub fn base(top: &Below, found: &[Generation], spare: &BTreeMap<Role, BootFiles>, is_new: bool) -> Result<Base> {
    if let Some(last) = found.last() {
        return Ok(Base::Snapshot(last.subvolume()));
    }
    if is_new {
        return Ok(Base::Empty);
    }
    let mut named = spare.values().flat_map(|files| files.of(Class::Entry)).filter_map(|file| booted_by(file.text.as_deref()?));
    Ok(Base::Snapshot(match named.find(|path| is_subvolume(top, path)) {
        Some(path) => path,
        // "ID 256 gen 9 top level 5 path @", or "ID 5 (FS_TREE)".
        None => {
            let said = String::from_utf8_lossy(&btrfs(top, &["subvolume", "get-default", "."])?).trim().to_owned();
            said.split_once(" path ").map_or_else(|| ".".to_owned(), |(_, path)| path.to_owned())
        }
    }))
}

/// Decides: a new generation where something has changed, and of the others `keep` less one stay, first of all those that are `booted`
/// by an entry, and then the last.
pub fn plan(found: &[Generation], booted: &BTreeSet<Generation>, base: Base, changed: bool, keep: usize) -> Plan {
    let (current, made_of) = match found.last() {
        Some(last) if !changed => (*last, None),
        last => (Generation(last.map_or(0, |last| last.0).saturating_add(1)), Some(base)),
    };
    let mut others: Vec<_> = found.iter().copied().filter(|one| *one != current).collect();
    others.sort_by_key(|one| (booted.contains(one), *one));
    let mut kept = others.split_off((others.len() + 1).saturating_sub(keep.max(1)).min(others.len()));
    kept.sort();
    Plan { current, made_of, kept, gone: others }
}

/// Whether entries for older generations come last in the menu of the boot loader, by its name and version (LoaderInfo of the Boot
/// Loader Interface).
pub fn can_be_offered(loader: Option<&str>) -> bool {
    let version =
        loader.and_then(|info| info.strip_prefix("systemd-boot ")?.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok());
    version.is_some_and(|version: u32| version >= SORTS_HYPHENS_LAST)
}

/// Entries for the generations that are kept, made of those that boot them now. A generation whose kernel or initrd is to be another
/// one under the same name can't be booted any more, and isn't offered.
pub fn offers(spare: &BootFiles, wanted: &[Wanted], kept: &[Generation]) -> Vec<Wanted> {
    let stays = |path: &String| {
        let there = spare.files.get(&fold(path));
        there.is_some_and(|there| wanted.iter().all(|w| fold(&w.path) != fold(path) || w.hash == there.hash))
    };
    let mut offers: Vec<Wanted> = Vec::new();
    for file in spare.of(Class::Entry) {
        let Some(text) = &file.text else { continue };
        let Some(generation) = generation_of(text).filter(|generation| kept.contains(generation)) else { continue };
        let Some((dir, name)) = file.path.rsplit_once('/') else { continue };
        let Ok(EntryName { id, .. }) = EntryName::parse(name) else { continue };
        let (path, text) = match is_offer(name) {
            true => (file.path.clone(), text.clone()),
            false => (format!("{dir}/{OFFER}{generation}-{id}.conf"), offer(text, generation)),
        };
        if entry::files(&text).iter().all(stays) && !offers.iter().any(|offer| fold(&offer.path) == fold(&path)) {
            let hash = blake3::hash(&text);
            offers.push(Wanted { path, content: Content::Bytes(text), hash });
        }
    }
    offers
}

/// Takes the offers of these generations out of what a boot partition holds, and returns their paths.
pub fn take_offers(files: &mut BootFiles, gone: &[Generation]) -> Vec<String> {
    let is_one = |file: &&BootFile| {
        is_offered(file) && file.text.as_deref().and_then(generation_of).is_some_and(|generation| gone.contains(&generation))
    };
    let taken: Vec<String> = files.of(Class::Entry).filter(is_one).map(|file| file.path.clone()).collect();
    for path in &taken {
        files.files.remove(&fold(path));
    }
    taken
}

fn offer(text: &[u8], generation: Generation) -> Vec<u8> {
    let mut out = Vec::new();
    for line in text.trim_ascii_end().split(|b| *b == b'\n') {
        let line = line.trim_ascii_end();
        match words(line).next() {
            Some(b"title") => out.extend([line, format!(" (generation {generation})").as_bytes()].concat()),
            Some(b"sort-key") => continue,
            _ => out.extend(line),
        }
        out.push(b'\n');
    }
    out
}

/// Begins a generation: what an interrupted sync has left goes, and then there is one that nothing names yet. `place` is where the top of
/// the file system is mounted.
///
/// # Errors
/// Those of btrfs(8).
pub fn begin(top: &Below, place: &Path, generation: Generation, base: &Base) -> Result<Below> {
    let left = top.list(NEW)?;
    for (name, _) in &left {
        delete(top, &format!("{NEW}/{name}"))?;
    }
    if !left.is_empty() {
        reclaim(top)?;
    }
    top.apply(&Change::MakeDir(NEW.to_owned()))?;
    let path = format!("{NEW}/{generation}");
    match base {
        Base::Empty => btrfs(top, &["subvolume", "create", &path])?,
        Base::Snapshot(of) => btrfs(top, &["subvolume", "snapshot", &format!("./{of}"), &path])?,
    };
    let made = Below::open(&place.join(path))?;
    if let Base::Snapshot(of) = base {
        // What was another subvolume is a directory now in which nobody can make anything.
        for stub in subvolumes_in(top, of)? {
            made.unlink(stub.as_ref(), true)?;
        }
    }
    Ok(made)
}

/// Puts the generation that was made where it belongs, once all of it is on the medium.
///
/// # Errors
/// Those of writing.
pub fn finish(top: &Below, generation: Generation) -> Result<()> {
    top.apply(&Change::Barrier)?;
    let dir = |path: &str| top.sub(path.as_ref())?.with_context(|| format!("{path} has gone"));
    dir(DIRECTORY)?.take(&dir(NEW)?, generation.to_string().as_ref(), false)?;
    top.apply(&Change::Remove(NEW.to_owned()))?;
    top.apply(&Change::Barrier)
}

/// Has mounts of the file system that don't name a subvolume show this generation.
///
/// # Errors
/// Those of btrfs(8).
pub fn show(top: &Below, generation: Generation) -> Result<()> {
    btrfs(top, &["subvolume", "set-default", &generation.subvolume()]).map(|_| ())
}

/// Removes generations, but those with something in other subvolumes in them, which nobody has copied: these are returned, as paths from
/// the top. Empty ones are no reason; systemd-tmpfiles(8) makes some.
///
/// # Errors
/// Those of btrfs(8).
pub fn remove(top: &Below, gone: &[Generation]) -> Result<Vec<String>> {
    let mut kept = Vec::new();
    for generation in gone {
        let path = generation.subvolume();
        let mut full = Vec::new();
        for inner in subvolumes_in(top, &path)? {
            let inner = format!("{path}/{inner}");
            if top.names(inner.as_ref())?.is_empty() {
                delete(top, &inner)?;
            } else {
                full.push(inner);
            }
        }
        if full.is_empty() {
            delete(top, &path)?;
        }
        kept.append(&mut full);
    }
    if !gone.is_empty() {
        reclaim(top)?;
    }
    Ok(kept)
}

/// Has the kernel give back the room of subvolumes that were removed, which it does while the file system is writable, and waits for it.
/// Not for ever: where somebody still has a file of one open, it stays until that ends.
fn reclaim(top: &Below) -> Result<()> {
    const PATIENCE: Duration = Duration::from_secs(60);
    btrfs(top, &["filesystem", "sync", "."])?;
    let mut waiting = program::command("btrfs")?;
    waiting.args(["subvolume", "sync", "."]).current_dir(top.proc_path()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut waiting = waiting.spawn().context("btrfs can't be run")?;
    let begun = Instant::now();
    while begun.elapsed() < PATIENCE {
        if waiting.try_wait()?.is_some() {
            return Ok(());
        }
        thread::sleep(Duration::from_millis(100));
    }
    waiting.kill()?;
    waiting.wait()?;
    Ok(())
}

/// The subvolumes in a subvolume below the top of the file system, by paths from its own top directory.
fn subvolumes_in(top: &Below, path: &str) -> Result<Vec<String>> {
    let listed = btrfs(top, &["subvolume", "list", "-o", &format!("./{path}")])?;
    inner(&listed, if path == "." { "" } else { path })
}

/// The subvolumes in the subvolume that is mounted at the handle: `path` from the top of the file system.
///
/// # Errors
/// Those of btrfs(8).
pub fn subvolumes_of(mounted: &Below, path: &str) -> Result<Vec<String>> {
    inner(&btrfs(mounted, &["subvolume", "list", "-o", "."])?, path)
}

fn inner(listed: &[u8], path: &str) -> Result<Vec<String>> {
    let within = if path.is_empty() { String::new() } else { format!("{path}/") };
    let one = |line: &str| {
        // "ID 260 gen 10 top level 256 path dualroot/5/var/lib/machines", by the path from the top of the file system.
        let inner = line.split_once(" path ").and_then(|(_, inner)| inner.strip_prefix(&within));
        inner.map(str::to_owned).with_context(|| format!("btrfs subvolume list has '{line}' in '{path}'"))
    };
    String::from_utf8_lossy(listed).lines().map(one).collect()
}

fn delete(top: &Below, path: &str) -> Result<()> {
    btrfs(top, &["subvolume", "delete", path]).map(|_| ())
}

/// Runs btrfs(8) in the top of a file system.
fn btrfs(top: &Below, args: &[&str]) -> Result<Vec<u8>> {
    let mut command = program::command("btrfs")?;
    // The child changes to the directory by our handle: no path can lead it elsewhere.
    let done = command.args(args).current_dir(top.proc_path()).output().context("btrfs can't be run")?;
    if !done.status.success() {
        let said = String::from_utf8_lossy(&done.stderr);
        bail!("'btrfs {}' failed ({}): {}", args.join(" "), done.status, said.trim().replace('\n', "; "));
    }
    Ok(done.stdout)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(list: &[u32]) -> Vec<Generation> {
        list.iter().map(|number| Generation(*number)).collect()
    }

    #[test]
    fn names_of_generations() {
        assert_eq!(Generation::parse("12").unwrap().subvolume(), "dualroot/12");
        for name in ["", "0", "01", "+1", "-1", "1a", "new", "4294967296"] {
            assert!(Generation::parse(name).is_err(), "{name}");
        }
    }

    #[test]
    fn f15_a_command_line_boots_a_generation() {
        let boots = |text: &str| String::from_utf8(Generation(7).boot(text.as_bytes())).unwrap();
        for (text, expected) in [
            ("root=UUID=1 ro quiet\n", "root=UUID=1 rootflags=subvol=dualroot/7 ro quiet\n"),
            ("root=UUID=1", "root=UUID=1 rootflags=subvol=dualroot/7"),
            ("options  root=UUID=1\trw rootflags=subvol=@rootfs\r\n", "options  root=UUID=1\trw rootflags=subvol=dualroot/7\r\n"),
            ("rootflags=noatime,subvolid=256,subvol=/@,compress=zstd", "rootflags=noatime,compress=zstd,subvol=dualroot/7"),
            ("rootflags=noatime root=/dev/vda2", "rootflags=noatime,subvol=dualroot/7 root=/dev/vda2"),
            ("rootflags=subvol=dualroot/6 root=UUID=1", "rootflags=subvol=dualroot/7 root=UUID=1"),
            ("rootflags=\"subvol=@,ssd\" root=UUID=1", "rootflags=\"ssd,subvol=dualroot/7\" root=UUID=1"),
            (
                "title Debian\nefi /EFI/memtest.efi\noptions quiet resume=UUID=2\n",
                "title Debian\nefi /EFI/memtest.efi\noptions quiet resume=UUID=2\n",
            ),
        ] {
            assert_eq!(boots(text), expected, "{text}");
            assert_eq!(boots(expected), expected, "{text}, twice");
            let named = text.contains("root").then_some(Generation(7));
            assert_eq!(
                generation_of(expected.as_bytes()),
                named.filter(|_| text.contains("root=") || text.contains("rootflags"))
            );
        }
    }

    #[test]
    fn f26_no_entry_leads_out_of_the_file_system() {
        let of = |path: &str| booted_by(format!("options rootflags=subvol={path}\n").as_bytes());
        assert_eq!(of("/@rootfs/").as_deref(), Some("@rootfs"));
        for path in ["..", "../x", "a/../../x"] {
            assert_eq!(of(path), None, "{path}");
        }
    }

    #[test]
    fn a_new_generation_is_made_where_something_has_changed() {
        for (found, booted, changed, keep, current, kept, gone) in [
            (&[][..], &[][..], true, 2, 1, &[][..], &[][..]),
            (&[1], &[1], true, 2, 2, &[1], &[]),
            (&[1, 2], &[2], true, 2, 3, &[2], &[1]),
            (&[1, 2], &[2], false, 2, 2, &[1], &[]),
            (&[1, 2, 5], &[5], false, 2, 5, &[2], &[1]),
            (&[1, 2, 5], &[5], true, 1, 6, &[], &[1, 2, 5]),
            (&[1, 2, 5], &[5], true, 9, 6, &[1, 2, 5], &[]),
            // A cut came before entries named the last one.
            (&[1, 2, 3], &[2], true, 2, 4, &[2], &[1, 3]),
            (&[1, 2, 3], &[2], true, 3, 4, &[2, 3], &[1]),
        ] {
            let plan = plan(&numbers(found), &numbers(booted).into_iter().collect(), Base::Empty, changed, keep);
            let expected = Plan {
                current: Generation(current),
                made_of: changed.then_some(Base::Empty),
                kept: numbers(kept),
                gone: numbers(gone),
            };
            assert_eq!(plan, expected, "{found:?}, {changed}, {keep}");
        }
        let two = Base::Snapshot("dualroot/2".to_owned());
        let changes: Vec<_> = plan(&numbers(&[1, 2]), &BTreeSet::new(), two, true, 2).changes().collect();
        assert_eq!(changes, ["make dualroot/3 of dualroot/2", "remove dualroot/1"]);
    }

    #[test]
    fn f18_what_is_needed_yet_does_not_go() {
        let booted = |booted: &[u32]| numbers(booted).into_iter().collect();
        for (found, entries, keep, first, then) in [
            (&[1, 2][..], &[2][..], 2, &[1][..], &[1][..]),
            // Cuts came before entries named what was made.
            (&[1, 2, 3], &[2], 2, &[1], &[1, 3]),
            (&[1, 2], &[1], 1, &[], &[2]),
            (&[1], &[], 1, &[], &[1]),
        ] {
            let found = numbers(found);
            let base = Base::Snapshot(found.last().unwrap().subvolume());
            let plan = plan(&found, &booted(entries), base, true, keep);
            assert_eq!(plan.gone_of(&found, &booted(entries)), numbers(first), "{found:?}");
            let made = [found.as_slice(), &[plan.current]].concat();
            assert_eq!(plan.gone_of(&made, &booted(entries)), numbers(then), "{found:?}, made");
        }
    }

    #[test]
    fn f18_generations_on_btrfs() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let tmp = tempfile::tempdir().unwrap();
        let (image, place) = (tmp.path().join("image"), tmp.path().join("top"));
        std::fs::File::create(&image).unwrap().set_len(128 << 20).unwrap();
        std::fs::create_dir(&place).unwrap();
        let run = |program: &str, args: &[&str]| {
            let done = program::command(program).unwrap().args(args).output().unwrap();
            assert!(done.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&done.stderr));
        };
        let path = |path: &str| place.join(path).to_str().unwrap().to_owned();
        crate::devices::mounts::enter_private_namespace().unwrap();
        run("mkfs.btrfs", &["-q", image.to_str().unwrap()]);
        run("mount", &["-t", "btrfs", "-o", "loop,subvolid=5", image.to_str().unwrap(), place.to_str().unwrap()]);
        let top = Below::open(&place).unwrap();
        let none = BTreeMap::new();

        assert_eq!(base(&top, &[], &none, true).unwrap(), Base::Empty);
        assert_eq!(base(&top, &[], &none, false).unwrap(), Base::Snapshot(".".to_owned()));
        run("btrfs", &["subvolume", "create", &path("@")]);
        run("btrfs", &["subvolume", "set-default", &path("@")]);
        assert_eq!(base(&top, &[], &none, false).unwrap(), Base::Snapshot("@".to_owned()));
        let named = |by: &str| {
            let files = spare(&[("loader/entries/a.conf", &format!("options root=UUID=1 rootflags=subvol={by}\n"))]);
            BTreeMap::from([(Role::Esp, BootFiles::default()), (Role::Xbootldr, files)])
        };
        assert_eq!(base(&top, &[], &named("absent"), false).unwrap(), Base::Snapshot("@".to_owned()));
        run("btrfs", &["subvolume", "create", &path("@rootfs")]);
        assert_eq!(base(&top, &[], &named("/@rootfs"), false).unwrap(), Base::Snapshot("@rootfs".to_owned()));
        assert_eq!(base(&top, &numbers(&[3]), &named("/@rootfs"), false).unwrap(), Base::Snapshot("dualroot/3".to_owned()));

        // Of a root that was booted: with subvolumes in it, of which one holds something.
        std::fs::create_dir(path("@rootfs/var")).unwrap();
        for inner in ["@rootfs/var/empty", "@rootfs/var/full", "@rootfs/var/full/deep"] {
            run("btrfs", &["subvolume", "create", &path(inner)]);
        }
        let of = |base: &str| Base::Snapshot(base.to_owned());
        begin(&top, &place, Generation(1), &of("@rootfs")).unwrap();
        assert_eq!(found(&top).unwrap(), [], "it isn't one before it is whole");
        let first = begin(&top, &place, Generation(1), &of("@rootfs")).unwrap();
        assert_eq!(first.list("var").unwrap(), [], "nothing is left that nobody can write to");
        finish(&top, Generation(1)).unwrap();
        show(&top, Generation(1)).unwrap();
        std::fs::write(path("dualroot/7"), "").unwrap();
        std::fs::create_dir(path("dualroot/8")).unwrap();
        assert_eq!(found(&top).unwrap(), numbers(&[1]), "other things are none");

        for number in [2, 3] {
            begin(&top, &place, Generation(number), &of("dualroot/1")).unwrap();
            finish(&top, Generation(number)).unwrap();
        }
        for inner in ["dualroot/2/var/empty", "dualroot/3/var/empty", "dualroot/3/var/full"] {
            run("btrfs", &["subvolume", "create", &path(inner)]);
        }
        std::fs::write(path("dualroot/3/var/full/file"), "").unwrap();
        assert_eq!(remove(&top, &numbers(&[2, 3])).unwrap(), ["dualroot/3/var/full"]);
        assert_eq!(found(&top).unwrap(), numbers(&[1, 3]), "what nobody has copied stays");
        assert!(Path::new(&path("dualroot/3/var/full/file")).exists());
        assert_eq!(prove(&top, &named("dualroot/1"), Generation(1)), Vec::<String>::new());
        assert!(
            matches!(prove(&top, &named("@rootfs"), Generation(1)).as_slice(), [one] if one.contains("no entry boots dualroot/1"))
        );
        let faults = prove(&top, &named("dualroot/2"), Generation(2));
        assert!(
            matches!(faults.as_slice(), [one] if one.contains("a.conf boots the subvolume dualroot/2, which isn't there")),
            "{faults:?}"
        );
        drop((top, first));
        run("umount", &[place.to_str().unwrap()]);
    }

    fn spare(files: &[(&str, &str)]) -> BootFiles {
        let mut found = BootFiles::default();
        for (path, text) in files {
            let text = text.as_bytes();
            let file = BootFile {
                path: (*path).to_owned(),
                size: text.len() as u64,
                hash: blake3::hash(text),
                text: path.ends_with(".conf").then(|| text.to_vec()),
            };
            found.files.insert(fold(path), file);
        }
        found
    }

    #[test]
    fn an_older_generation_that_runs_is_no_source() {
        let files = spare(&[
            ("loader/entries/a.conf", "options root=UUID=1 rootflags=subvol=dualroot/7\n"),
            // A cut came while entries were turned.
            ("loader/entries/b.conf", "options root=UUID=1 rootflags=subvol=dualroot/6\n"),
            ("loader/entries/-dualroot-5-a.conf", "options root=UUID=1 rootflags=subvol=dualroot/5\n"),
        ]);
        let plain = spare(&[("loader/entries/a.conf", "options root=UUID=1\n")]);
        let why = |root: &str, files: &BootFiles| no_source(root, &BTreeMap::from([(Role::Xbootldr, files.clone())]));
        assert_eq!(why("/dualroot/7", &files), None);
        assert_eq!(why("/dualroot/6", &files), None);
        for root in ["/dualroot/5", "/dualroot/8", "/@rootfs", "/"] {
            let why = why(root, &files).unwrap();
            assert!(why.contains(root) && why.contains("dualroot/7"), "{why}");
        }
        assert_eq!(why("/@rootfs", &plain), None);
    }

    #[test]
    fn f09_what_boots_another_subvolume_stays_on_its_disk() {
        let entry = |by: &str, kernel: &str| format!("linux /{kernel}\ninitrd /both\noptions root=UUID=1{by}\n");
        let mut files = spare(&[
            ("loader/entries/a.conf", &entry(" rootflags=subvol=@", "a")),
            ("loader/entries/plain.conf", &entry("", "plain")),
            ("loader/entries/snapshot.conf", &entry(" rootflags=subvol=@/.snapshots/1", "old")),
            ("loader/entries/-dualroot-1-a.conf", &entry(" rootflags=subvol=dualroot/1", "offered")),
            ("a", ""),
            ("plain", ""),
            ("old", ""),
            ("offered", ""),
            ("both", ""),
            ("other", ""),
        ]);
        keep_own(&mut files, "/@");
        let left: Vec<&str> = files.files.keys().map(String::as_str).collect();
        assert_eq!(left, ["a", "both", "loader/entries/a.conf", "loader/entries/plain.conf", "other", "plain"]);
    }

    #[test]
    fn f19_offers_of_what_goes_are_taken_first() {
        let offer = |number: u32| format!("options root=UUID=1 rootflags=subvol=dualroot/{number}\n");
        let mut files = spare(&[
            ("loader/entries/-dualroot-1-a.conf", &offer(1)),
            ("loader/entries/-dualroot-2-a.conf", &offer(2)),
            ("loader/entries/a.conf", &offer(1)),
        ]);
        assert_eq!(take_offers(&mut files, &numbers(&[1])), ["loader/entries/-dualroot-1-a.conf"]);
        let left: Vec<&str> = files.files.keys().map(String::as_str).collect();
        assert_eq!(left, ["loader/entries/-dualroot-2-a.conf", "loader/entries/a.conf"]);
    }

    #[test]
    fn offers_are_for_boot_loaders_that_sort_them_last() {
        for (loader, can) in [
            (Some("systemd-boot 249.11-0ubuntu3"), false),
            (Some("systemd-boot 250"), true),
            (Some("systemd-boot 252.39-1~deb12u1"), true),
            (Some("rEFInd 0.14"), false),
            (Some("systemd-boot v"), false),
            (None, false),
        ] {
            assert_eq!(can_be_offered(loader), can, "{loader:?}");
        }
    }

    #[test]
    fn older_generations_are_offered_while_their_kernel_is_there() {
        let entry = |key: &str| {
            format!("title Debian\n{key}linux /t/linux\ninitrd /t/initrd\noptions root=UUID=1 rootflags=subvol=dualroot/6\n\n\n")
        };
        let expected = || {
            let text = "title Debian (generation 6)\nlinux /t/linux\ninitrd /t/initrd\noptions root=UUID=1 rootflags=subvol=dualroot/6\n"
                .to_owned();
            Wanted {
                path: "loader/entries/-dualroot-6-t.conf".to_owned(),
                hash: blake3::hash(text.as_bytes()),
                content: Content::Bytes(text.into_bytes()),
            }
        };
        let payload = |text: &str| Wanted {
            path: "t/initrd".to_owned(),
            hash: blake3::hash(text.as_bytes()),
            content: Content::Bytes(text.into()),
        };
        let on = |text: &str, name: &str| {
            spare(&[("t/linux", "kernel"), ("t/initrd", "initrd"), (&format!("loader/entries/{name}"), text)])
        };
        let six = numbers(&[6]);
        for key in ["", "sort-key debian\n"] {
            let now = on(&entry(key), "t+3.conf");
            assert_eq!(offers(&now, &[], &six), [expected()], "nothing is to be there: it stays, as it is referred to");
            assert_eq!(offers(&now, &[payload("initrd")], &six), [expected()]);
            assert_eq!(offers(&now, &[payload("another")], &six), []);
            assert_eq!(offers(&now, &[], &numbers(&[5])), []);
            // What is offered stays as it is.
            let Content::Bytes(text) = expected().content else { panic!() };
            let later = on(std::str::from_utf8(&text).unwrap(), "-dualroot-6-t.conf");
            assert_eq!(offers(&later, &[payload("initrd")], &six), [expected()]);
            assert_eq!(offers(&later, &[payload("another")], &six), []);
        }
        assert_eq!(offers(&spare(&[("t/linux", "kernel"), ("loader/entries/t.conf", &entry(""))]), &[], &six), []);
    }
}
