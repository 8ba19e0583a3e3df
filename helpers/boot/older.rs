//! Menu entries for older generations of a root, and those of the booted disk that aren't copied.

use std::collections::BTreeSet;

use crate::boot::entry::{self, EntryName, OLDER_PREFIX, is_older_entry};
use crate::boot::files::{BootFile, BootFiles, Class, fold};
use crate::boot::roots::generation_of;
use crate::boot::wanted::WantedFile;
use crate::names::cmdline::{booted_subvolume, words};
use crate::names::generation::Generation;
use crate::write::change::Content;

/// The first version of systemd-boot that sorts the hyphen below letters.
pub(crate) const SORTS_HYPHENS_LAST: u32 = 250;

/// Removes from the booted disk's boot files those that aren't copied: entries for other subvolumes than `root`, the running one, such as
/// older generations and snapshots, and the files that only these entries need.
pub fn keep_own(files: &mut BootFiles, root: &str) {
    let root = root.trim_matches('/');
    let is_other = |file: &BootFile| {
        is_older_entry_file(file) || file.text.as_deref().and_then(booted_subvolume).is_some_and(|path| path != root)
    };
    let needed = |others: bool| -> BTreeSet<String> {
        let entries = files.of(Class::Entry).filter(|file| is_other(file) == others);
        entries.filter_map(|file| file.text.as_deref()).flat_map(entry::files).map(|path| fold(&path)).collect()
    };
    let (theirs, own) = (needed(true), needed(false));
    let entries: BTreeSet<String> = files.of(Class::Entry).filter(|file| is_other(file)).map(|file| fold(&file.path)).collect();
    files.files.retain(|path, _| !entries.contains(path) && (own.contains(path) || !theirs.contains(path)));
}

pub(crate) fn is_older_entry_file(file: &BootFile) -> bool {
    file.path.rsplit_once('/').is_some_and(|(_, name)| is_older_entry(name))
}

/// Whether the boot loader sorts entries for older generations last, by its name and version (LoaderInfo, Boot Loader Interface).
pub fn are_sorted_last(loader: Option<&str>) -> bool {
    let version =
        loader.and_then(|info| info.strip_prefix("systemd-boot ")?.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok());
    version.is_some_and(|version: u32| version >= SORTS_HYPHENS_LAST)
}

/// The menu entries for the generations that are kept, made from the entries that boot them now. A generation gets none if its kernel or
/// initrd will be replaced by another one of the same name.
pub fn entries_for(spare: &BootFiles, wanted: &[WantedFile], kept: &[Generation]) -> Vec<WantedFile> {
    let stays = |path: &String| {
        let there = spare.files.get(&fold(path));
        there.is_some_and(|there| wanted.iter().all(|w| fold(&w.path) != fold(path) || w.hash == there.hash))
    };
    let mut entries: Vec<WantedFile> = Vec::new();
    for file in spare.of(Class::Entry) {
        let Some(text) = &file.text else { continue };
        let Some(generation) = generation_of(text).filter(|generation| kept.contains(generation)) else { continue };
        let Some((dir, name)) = file.path.rsplit_once('/') else { continue };
        let Ok(EntryName { id, .. }) = EntryName::parse(name) else { continue };
        let (path, text) = match is_older_entry(name) {
            true => (file.path.clone(), text.clone()),
            false => (format!("{dir}/{OLDER_PREFIX}{generation}-{id}.conf"), older_entry(text, generation)),
        };
        if entry::files(&text).iter().all(stays) && !entries.iter().any(|entry| fold(&entry.path) == fold(&path)) {
            let hash = blake3::hash(&text);
            entries.push(WantedFile { path, content: Content::Bytes(text), hash });
        }
    }
    entries
}

/// Removes the menu entries for these older generations from a boot partition's files, and returns their paths.
pub fn remove_entries(files: &mut BootFiles, gone: &[Generation]) -> Vec<String> {
    let is_one = |file: &&BootFile| {
        is_older_entry_file(file)
            && file.text.as_deref().and_then(generation_of).is_some_and(|generation| gone.contains(&generation))
    };
    let taken: Vec<String> = files.of(Class::Entry).filter(is_one).map(|file| file.path.clone()).collect();
    for path in &taken {
        files.files.remove(&fold(path));
    }
    taken
}

pub(crate) fn older_entry(text: &[u8], generation: Generation) -> Vec<u8> {
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

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::names::generation::tests::numbers;

    pub(crate) fn spare(files: &[(&str, &str)]) -> BootFiles {
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
    fn f09_entries_for_other_subvolumes_are_not_copied() {
        let entry = |by: &str, kernel: &str| format!("linux /{kernel}\ninitrd /both\noptions root=UUID=1{by}\n");
        let mut files = spare(&[
            ("loader/entries/a.conf", &entry(" rootflags=subvol=@", "a")),
            ("loader/entries/plain.conf", &entry("", "plain")),
            ("loader/entries/snapshot.conf", &entry(" rootflags=subvol=@/.snapshots/1", "old")),
            ("loader/entries/-dualroot-1-a.conf", &entry(" rootflags=subvol=dualroot/1", "older")),
            ("a", ""),
            ("plain", ""),
            ("old", ""),
            ("older", ""),
            ("both", ""),
            ("other", ""),
        ]);
        keep_own(&mut files, "/@");
        let left: Vec<&str> = files.files.keys().map(String::as_str).collect();
        assert_eq!(left, ["a", "both", "loader/entries/a.conf", "loader/entries/plain.conf", "other", "plain"]);
    }

    #[test]
    fn f19_entries_of_removed_generations_are_taken_out() {
        let entry = |number: u32| format!("options root=UUID=1 rootflags=subvol=dualroot/{number}\n");
        let mut files = spare(&[
            ("loader/entries/-dualroot-1-a.conf", &entry(1)),
            ("loader/entries/-dualroot-2-a.conf", &entry(2)),
            ("loader/entries/a.conf", &entry(1)),
        ]);
        assert_eq!(remove_entries(&mut files, &numbers(&[1])), ["loader/entries/-dualroot-1-a.conf"]);
        let left: Vec<&str> = files.files.keys().map(String::as_str).collect();
        assert_eq!(left, ["loader/entries/-dualroot-2-a.conf", "loader/entries/a.conf"]);
    }

    #[test]
    fn old_boot_loaders_do_not_sort_older_entries_last() {
        for (loader, can) in [
            (Some("systemd-boot 249.11-0ubuntu3"), false),
            (Some("systemd-boot 250"), true),
            (Some("systemd-boot 252.39-1~deb12u1"), true),
            (Some("rEFInd 0.14"), false),
            (Some("systemd-boot v"), false),
            (None, false),
        ] {
            assert_eq!(are_sorted_last(loader), can, "{loader:?}");
        }
    }

    #[test]
    fn older_generations_have_entries_while_their_kernel_is_there() {
        let entry = |key: &str| {
            format!("title Debian\n{key}linux /t/linux\ninitrd /t/initrd\noptions root=UUID=1 rootflags=subvol=dualroot/6\n\n\n")
        };
        let expected = || {
            let text = "title Debian (generation 6)\nlinux /t/linux\ninitrd /t/initrd\noptions root=UUID=1 rootflags=subvol=dualroot/6\n"
                .to_owned();
            WantedFile {
                path: "loader/entries/-dualroot-6-t.conf".to_owned(),
                hash: blake3::hash(text.as_bytes()),
                content: Content::Bytes(text.into_bytes()),
            }
        };
        let payload = |text: &str| WantedFile {
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
            assert_eq!(
                entries_for(&now, &[], &six),
                [expected()],
                "the new entries don't replace the kernel: it stays, because an entry refers to it"
            );
            assert_eq!(entries_for(&now, &[payload("initrd")], &six), [expected()]);
            assert_eq!(entries_for(&now, &[payload("another")], &six), []);
            assert_eq!(entries_for(&now, &[], &numbers(&[5])), []);
            // An entry for an older generation stays as it is.
            let Content::Bytes(text) = expected().content else { panic!() };
            let later = on(std::str::from_utf8(&text).unwrap(), "-dualroot-6-t.conf");
            assert_eq!(entries_for(&later, &[payload("initrd")], &six), [expected()]);
            assert_eq!(entries_for(&later, &[payload("another")], &six), []);
        }
        assert_eq!(entries_for(&spare(&[("t/linux", "kernel"), ("loader/entries/t.conf", &entry(""))]), &[], &six), []);
    }
}
