//! Generations of a spare's root. Where that is btrfs, a sync that changes it makes a new subvolume of it, a snapshot of the last one
//! that was brought up to date, and has the entries name that (`rootflags=subvol=`). So no entry ever leads to half a root: root and
//! kernel change together, with the entry. The last few stay, and are offered in the boot menu.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Context, Result};

use crate::base::fault::{Code, Fault};
use crate::copy::BootedRoot;
use crate::devices::subvolume::{btrfs, delete, is_subvolume, subvolumes_in, wait_until_freed};
use crate::names::generation::{DIRECTORY, Generation};
use crate::write::below::Below;
use crate::write::change::Change;

/// Where one is that is being made. No entry names it.
const NEW: &str = "dualroot/new";

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
        found.extend(Generation::parse(&name).ok().filter(|one| is_subvolume(top, &one.subvolume())));
    }
    found.sort();
    Ok(found)
}

/// What the next generation is compared with, and made of: the last one, or what the spare's entries boot, as after a failover from a
/// disk that was installed otherwise, or what is mounted where they don't say. `named` are the subvolumes that its entries name, as paths
/// from the top; `is_new` says that nothing on the disk is worth keeping.
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

/// Decides: a new generation where something has changed, and of the others `keep` less one stay, first of all those that are `booted`
/// by an entry, and then the last.
pub fn plan(found: &[Generation], booted: &BTreeSet<Generation>, base: Base, changed: bool, keep: usize) -> Plan {
    let (current, made_of) = match found.last() {
        Some(last) if !changed => (*last, None),
        last => (Generation::after(last.copied()), Some(base)),
    };
    let mut others: Vec<_> = found.iter().copied().filter(|one| *one != current).collect();
    others.sort_by_key(|one| (booted.contains(one), *one));
    let mut kept = others.split_off((others.len() + 1).saturating_sub(keep.max(1)).min(others.len()));
    kept.sort();
    Plan { current, made_of, kept, gone: others }
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
        wait_until_freed(top)?;
    }
    Ok(kept)
}

/// The reasons why entries boot no root, or not `current`, with `top` the top of the file system of the spare's root.
pub fn prove(top: &Below, booted: &[BootedRoot], current: Generation) -> Vec<Fault> {
    let lost = |entry: &BootedRoot| {
        let subvolume = entry.subvolume.as_deref().filter(|path| !is_subvolume(top, path))?;
        let text = format!("{}: {} boots the subvolume {subvolume}, which doesn't exist", entry.role, entry.path);
        Some(Fault::new(Code::F18, text).on(&entry.role).at(&entry.path))
    };
    let mut faults: Vec<Fault> = booted.iter().filter_map(lost).collect();
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
            let expected =
                Plan { current: nth(current), made_of: changed.then_some(Base::Empty), kept: numbers(kept), gone: numbers(gone) };
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
        crate::devices::held::enter_private_namespace().unwrap();
        run("mkfs.btrfs", &["-q", image.to_str().unwrap()]);
        run("mount", &["-t", "btrfs", "-o", "loop,subvolid=5", image.to_str().unwrap(), place.to_str().unwrap()]);
        let _mounted = crate::devices::scratch::Mounted::at(&place);
        let top = Below::open(&place).unwrap();
        let none = std::iter::empty;

        assert_eq!(base(&top, &[], none(), true).unwrap(), Base::Empty);
        assert_eq!(base(&top, &[], none(), false).unwrap(), Base::Snapshot(".".to_owned()));
        run("btrfs", &["subvolume", "create", &path("@")]);
        run("btrfs", &["subvolume", "set-default", &path("@")]);
        assert_eq!(base(&top, &[], none(), false).unwrap(), Base::Snapshot("@".to_owned()));
        let booted = |by: &str| {
            let subvolume = Some(by.to_owned());
            vec![BootedRoot { role: Role::Esp, path: "loader/entries/a.conf".to_owned(), subvolume, is_older: false }]
        };
        let named = |by: &str| std::iter::once(by.to_owned());
        assert_eq!(base(&top, &[], named("absent"), false).unwrap(), Base::Snapshot("@".to_owned()));
        run("btrfs", &["subvolume", "create", &path("@rootfs")]);
        assert_eq!(base(&top, &[], named("@rootfs"), false).unwrap(), Base::Snapshot("@rootfs".to_owned()));
        assert_eq!(base(&top, &numbers(&[3]), named("@rootfs"), false).unwrap(), Base::Snapshot("dualroot/3".to_owned()));

        // Of a root that was booted: with subvolumes in it, of which one holds something.
        std::fs::create_dir(path("@rootfs/var")).unwrap();
        for inner in ["@rootfs/var/empty", "@rootfs/var/full", "@rootfs/var/full/deep"] {
            run("btrfs", &["subvolume", "create", &path(inner)]);
        }
        let of = |base: &str| Base::Snapshot(base.to_owned());
        begin(&top, &place, nth(1), &of("@rootfs")).unwrap();
        assert_eq!(found(&top).unwrap(), [], "it isn't one before it is whole");
        let first = begin(&top, &place, nth(1), &of("@rootfs")).unwrap();
        assert_eq!(first.list("var").unwrap(), [], "nothing is left that nobody can write to");
        finish(&top, nth(1)).unwrap();
        show(&top, nth(1)).unwrap();
        std::fs::write(path("dualroot/7"), "").unwrap();
        std::fs::create_dir(path("dualroot/8")).unwrap();
        assert_eq!(found(&top).unwrap(), numbers(&[1]), "other things are none");

        for number in [2, 3] {
            begin(&top, &place, nth(number), &of("dualroot/1")).unwrap();
            finish(&top, nth(number)).unwrap();
        }
        for inner in ["dualroot/2/var/empty", "dualroot/3/var/empty", "dualroot/3/var/full"] {
            run("btrfs", &["subvolume", "create", &path(inner)]);
        }
        std::fs::write(path("dualroot/3/var/full/file"), "").unwrap();
        assert_eq!(remove(&top, &numbers(&[2, 3])).unwrap(), ["dualroot/3/var/full"]);
        assert_eq!(found(&top).unwrap(), numbers(&[1, 3]), "what nobody has copied stays");
        assert!(Path::new(&path("dualroot/3/var/full/file")).exists());
        assert_eq!(prove(&top, &booted("dualroot/1"), nth(1)), []);
        assert_eq!(codes(&prove(&top, &booted("@rootfs"), nth(1))), [Code::F15]);
        let faults = prove(&top, &booted("dualroot/2"), nth(2));
        assert_eq!(codes(&faults), [Code::F18], "{faults:?}");
        assert_eq!(faults[0].path.as_deref(), Some("loader/entries/a.conf"));
    }
}
