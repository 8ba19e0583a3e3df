//! Generations of a spare's btrfs root. Where the root has changed, a sync makes a new subvolume: a snapshot of the last generation, brought
//! up to date. Then it makes the menu entries name the new subvolume (`rootflags=subvol=`). So no entry ever boots half a root: root and
//! kernel change together, with the entry. The last few generations stay, and have menu entries of their own.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Context, Result};

use crate::base::fault::{Code, Fault};
use crate::copy::BootedRoot;
use crate::devices::subvolume::{btrfs, delete, is_subvolume, subvolumes_in, wait_until_freed};
use crate::names::generation::{DIRECTORY, Generation};
use crate::write::below::Below;
use crate::write::change::Change;

/// The directory of a generation that is being made. No entry names it.
const NEW: &str = "dualroot/new";

/// The changes that a sync makes to a spare's generations.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct GenerationPlan {
    /// The generation that the entries name after the sync.
    pub current: Generation,
    /// The content that it starts with; None where it exists already.
    pub base: Option<Base>,
    /// The older generations that stay.
    pub kept: Vec<Generation>,
    /// The generations that are removed once no entry names them.
    pub expired: Vec<Generation>,
}

impl GenerationPlan {
    /// The generations in `found` that can be removed now: no entry boots them, and no snapshot is still to be made of them.
    pub fn removable(&self, found: &[Generation], booted: &BTreeSet<Generation>) -> Vec<Generation> {
        let base = self.base.as_ref().filter(|_| !found.contains(&self.current));
        let is_base = |one: &Generation| matches!(base, Some(Base::Snapshot(of)) if *of == one.subvolume());
        self.expired.iter().copied().filter(|one| found.contains(one) && !booted.contains(one) && !is_base(one)).collect()
    }

    /// A line for each change, for people.
    pub fn changes(&self) -> impl Iterator<Item = String> {
        let made = self.base.as_ref().map(|base| match base {
            Base::Empty => format!("make {}", self.current.subvolume()),
            Base::Snapshot(of) => format!("make {} of {of}", self.current.subvolume()),
        });
        made.into_iter().chain(self.expired.iter().map(|generation| format!("remove {}", generation.subvolume())))
    }
}

/// The content that a new generation starts with.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Base {
    /// Nothing: every file is copied.
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
        found.extend(Generation::parse(&name).ok().filter(|one| is_subvolume(top, &one.subvolume())));
    }
    found.sort();
    Ok(found)
}

/// The content that the next generation starts with: the last generation. Where there is none, such as on a disk that was installed without
/// dualroot, it is the subvolume that the spare's entries boot, or else the default one. `named` are the subvolumes that the entries name, as
/// paths from the top; `is_new` means that nothing on the disk is worth keeping.
///
/// # Errors
/// Those of btrfs(8).
pub fn base(top: &Below, found: &[Generation], mut named: impl Iterator<Item = String>, is_new: bool) -> Result<Base> {
    if let Some(last) = found.last() {
        return Ok(Base::Snapshot(last.subvolume()));
    }
    if is_new {
        return Ok(Base::Empty);
    }
    Ok(Base::Snapshot(match named.find(|path| is_subvolume(top, path)) {
        Some(path) => path,
        // "ID 256 gen 9 top level 5 path @", or "ID 5 (FS_TREE)".
        None => {
            let said = String::from_utf8_lossy(&btrfs(top, &["subvolume", "get-default", "."])?).trim().to_owned();
            said.split_once(" path ").map_or_else(|| ".".to_owned(), |(_, path)| path.to_owned())
        }
    }))
}

/// Plans a new generation where the root has changed. `keep` generations stay, including the current one: those that an entry boots
/// (`booted`) are kept first, then the newest.
pub fn plan(found: &[Generation], booted: &BTreeSet<Generation>, base: Base, changed: bool, keep: usize) -> GenerationPlan {
    let (current, base) = match found.last() {
        Some(last) if !changed => (*last, None),
        last => (Generation::after(last.copied()), Some(base)),
    };
    let mut others: Vec<_> = found.iter().copied().filter(|one| *one != current).collect();
    others.sort_by_key(|one| (booted.contains(one), *one));
    let mut kept = others.split_off((others.len() + 1).saturating_sub(keep.max(1)).min(others.len()));
    kept.sort();
    GenerationPlan { current, base, kept, expired: others }
}

/// Begins a generation: removes the one that an interrupted sync has left, and makes a new one that no entry names yet. `place` is the
/// mount point of the top of the file system.
///
/// # Errors
/// Those of btrfs(8).
pub fn begin(top: &Below, place: &Path, generation: Generation, base: &Base) -> Result<Below> {
    let left = top.list(NEW)?;
    for (name, _) in &left {
        delete(top, &format!("{NEW}/{name}"))?;
    }
    if !left.is_empty() {
        wait_until_freed(top)?;
    }
    top.apply(&Change::MakeDir(NEW.to_owned()))?;
    let path = format!("{NEW}/{generation}");
    match base {
        Base::Empty => btrfs(top, &["subvolume", "create", &path])?,
        Base::Snapshot(of) => btrfs(top, &["subvolume", "snapshot", &format!("./{of}"), &path])?,
    };
    let made = Below::open(&place.join(path))?;
    if let Base::Snapshot(of) = base {
        // A snapshot has an empty directory for each inner subvolume, and nobody can make a file in it.
        for stub in subvolumes_in(top, of)? {
            made.unlink(stub.as_ref(), true)?;
        }
    }
    Ok(made)
}

/// Moves the new generation to its place, after flushing all of it to the medium.
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

/// Makes mounts of the file system that don't name a subvolume show this generation.
///
/// # Errors
/// Those of btrfs(8).
pub fn show(top: &Below, generation: Generation) -> Result<()> {
    btrfs(top, &["subvolume", "set-default", &generation.subvolume()]).map(|_| ())
}

/// Removes generations, except those that contain other subvolumes with files in them, which no sync has copied. Returns these subvolumes,
/// as paths from the top. Empty ones, such as systemd-tmpfiles(8) makes, are removed.
///
/// # Errors
/// Those of btrfs(8).
pub fn remove(top: &Below, expired: &[Generation]) -> Result<Vec<String>> {
    let mut kept = Vec::new();
    for generation in expired {
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
    if !expired.is_empty() {
        wait_until_freed(top)?;
    }
    Ok(kept)
}

/// The reasons why entries boot no root, or why none boots `current`. `top` is the top of the file system of the spare's root.
pub fn prove(top: &Below, booted: &[BootedRoot], current: Generation) -> Vec<Fault> {
    let missing = |entry: &BootedRoot| {
        let subvolume = entry.subvolume.as_deref().filter(|path| !is_subvolume(top, path))?;
        let text = format!("{}: {} boots the subvolume {subvolume}, which doesn't exist", entry.role, entry.path);
        Some(Fault::new(Code::F18, text).on(&entry.role).at(&entry.path))
    };
    let mut faults: Vec<Fault> = booted.iter().filter_map(missing).collect();
    let is_current = |entry: &BootedRoot| !entry.is_older && entry.subvolume.as_deref() == Some(&current.subvolume());
    if !booted.iter().any(is_current) {
        let text = format!("no menu entry boots {}, the new copy of the root", current.subvolume());
        let remedy = "add root= (such as root=UUID=…) to the entries and to /etc/kernel/cmdline";
        faults.push(Fault::new(Code::F15, text).remedy(remedy));
    }
    faults
}

#[cfg(test)]
mod tests {

    use super::*;
    use crate::base::fault::tests::codes;
    use crate::base::program;
    use crate::base::types::Role;
    use crate::names::generation::tests::{nth, numbers};

    #[test]
    fn a_changed_root_gets_a_new_generation() {
        for (found, booted, changed, keep, current, kept, expired) in [
            (&[][..], &[][..], true, 2, 1, &[][..], &[][..]),
            (&[1], &[1], true, 2, 2, &[1], &[]),
            (&[1, 2], &[2], true, 2, 3, &[2], &[1]),
            (&[1, 2], &[2], false, 2, 2, &[1], &[]),
            (&[1, 2, 5], &[5], false, 2, 5, &[2], &[1]),
            (&[1, 2, 5], &[5], true, 1, 6, &[], &[1, 2, 5]),
            (&[1, 2, 5], &[5], true, 9, 6, &[1, 2, 5], &[]),
            // A sync was interrupted before entries named the last one.
            (&[1, 2, 3], &[2], true, 2, 4, &[2], &[1, 3]),
            (&[1, 2, 3], &[2], true, 3, 4, &[2, 3], &[1]),
        ] {
            let plan = plan(&numbers(found), &numbers(booted).into_iter().collect(), Base::Empty, changed, keep);
            let base = changed.then_some(Base::Empty);
            let expected = GenerationPlan { current: nth(current), base, kept: numbers(kept), expired: numbers(expired) };
            assert_eq!(plan, expected, "{found:?}, {changed}, {keep}");
        }
        let two = Base::Snapshot("dualroot/2".to_owned());
        let changes: Vec<_> = plan(&numbers(&[1, 2]), &BTreeSet::new(), two, true, 2).changes().collect();
        assert_eq!(changes, ["make dualroot/3 of dualroot/2", "remove dualroot/1"]);
    }

    #[test]
    fn f18_a_generation_that_is_still_needed_stays() {
        let booted = |booted: &[u32]| numbers(booted).into_iter().collect();
        for (found, entries, keep, first, then) in [
            (&[1, 2][..], &[2][..], 2, &[1][..], &[1][..]),
            // Syncs were interrupted before entries named the new generations.
            (&[1, 2, 3], &[2], 2, &[1], &[1, 3]),
            (&[1, 2], &[1], 1, &[], &[2]),
            (&[1], &[], 1, &[], &[1]),
        ] {
            let found = numbers(found);
            let base = Base::Snapshot(found.last().unwrap().subvolume());
            let plan = plan(&found, &booted(entries), base, true, keep);
            assert_eq!(plan.removable(&found, &booted(entries)), numbers(first), "{found:?}");
            let made = [found.as_slice(), &[plan.current]].concat();
            assert_eq!(plan.removable(&made, &booted(entries)), numbers(then), "{found:?}, made");
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
        crate::devices::held::enter_private_namespace().unwrap();
        run("mkfs.btrfs", &["-q", image.to_str().unwrap()]);
        run("mount", &["-t", "btrfs", "-o", "loop,subvolid=5", image.to_str().unwrap(), place.to_str().unwrap()]);
        let _mounted = crate::devices::scratch::Mounted::at(&place);
        let top = Below::open(&place).unwrap();
        let unnamed = std::iter::empty;

        assert_eq!(base(&top, &[], unnamed(), true).unwrap(), Base::Empty);
        assert_eq!(base(&top, &[], unnamed(), false).unwrap(), Base::Snapshot(".".to_owned()));
        run("btrfs", &["subvolume", "create", &path("@")]);
        run("btrfs", &["subvolume", "set-default", &path("@")]);
        assert_eq!(base(&top, &[], unnamed(), false).unwrap(), Base::Snapshot("@".to_owned()));
        let booted = |by: &str| {
            let subvolume = Some(by.to_owned());
            vec![BootedRoot { role: Role::Esp, path: "loader/entries/a.conf".to_owned(), subvolume, is_older: false }]
        };
        let named = |by: &str| std::iter::once(by.to_owned());
        assert_eq!(base(&top, &[], named("absent"), false).unwrap(), Base::Snapshot("@".to_owned()));
        run("btrfs", &["subvolume", "create", &path("@rootfs")]);
        assert_eq!(base(&top, &[], named("@rootfs"), false).unwrap(), Base::Snapshot("@rootfs".to_owned()));
        assert_eq!(base(&top, &numbers(&[3]), named("@rootfs"), false).unwrap(), Base::Snapshot("dualroot/3".to_owned()));

        // A root that was booted has subvolumes in it. One of them holds a file.
        std::fs::create_dir(path("@rootfs/var")).unwrap();
        for inner in ["@rootfs/var/empty", "@rootfs/var/full", "@rootfs/var/full/deep"] {
            run("btrfs", &["subvolume", "create", &path(inner)]);
        }
        let of = |base: &str| Base::Snapshot(base.to_owned());
        begin(&top, &place, nth(1), &of("@rootfs")).unwrap();
        assert_eq!(found(&top).unwrap(), [], "a generation counts after it was finished");
        let first = begin(&top, &place, nth(1), &of("@rootfs")).unwrap();
        assert_eq!(first.list("var").unwrap(), [], "the stub directories of subvolumes are removed");
        finish(&top, nth(1)).unwrap();
        show(&top, nth(1)).unwrap();
        std::fs::write(path("dualroot/7"), "").unwrap();
        std::fs::create_dir(path("dualroot/8")).unwrap();
        assert_eq!(found(&top).unwrap(), numbers(&[1]), "a file and a directory are no generations");

        for number in [2, 3] {
            begin(&top, &place, nth(number), &of("dualroot/1")).unwrap();
            finish(&top, nth(number)).unwrap();
        }
        for inner in ["dualroot/2/var/empty", "dualroot/3/var/empty", "dualroot/3/var/full"] {
            run("btrfs", &["subvolume", "create", &path(inner)]);
        }
        std::fs::write(path("dualroot/3/var/full/file"), "").unwrap();
        assert_eq!(remove(&top, &numbers(&[2, 3])).unwrap(), ["dualroot/3/var/full"]);
        assert_eq!(found(&top).unwrap(), numbers(&[1, 3]), "a subvolume that no sync has copied stays");
        assert!(Path::new(&path("dualroot/3/var/full/file")).exists());
        assert_eq!(prove(&top, &booted("dualroot/1"), nth(1)), []);
        assert_eq!(codes(&prove(&top, &booted("@rootfs"), nth(1))), [Code::F15]);
        let faults = prove(&top, &booted("dualroot/2"), nth(2));
        assert_eq!(codes(&faults), [Code::F18], "{faults:?}");
        assert_eq!(faults[0].path.as_deref(), Some("loader/entries/a.conf"));
    }
}
