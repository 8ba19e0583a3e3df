//! The generations and subvolumes that menu entries boot.

use std::collections::{BTreeMap, BTreeSet};

use crate::base::types::Role;
use crate::boot::files::{BootFile, BootFiles, Class};
use crate::boot::older::is_older_entry_file;
use crate::copy::BootedRoot;
use crate::names::cmdline::booted_subvolume;
use crate::names::generation::Generation;

/// The generation that an entry boots; None if it boots another root.
pub(crate) fn generation_of(entry: &[u8]) -> Option<Generation> {
    Generation::of_subvolume(&booted_subvolume(entry)?)
}

/// The reason why the booted disk can't be synced from: its entries boot a generation, and the running root (the subvolume's path) isn't one
/// of those, but for example an older generation that was booted from the menu. None if it can.
pub fn refuse_older_generation(root: &str, booted: &BTreeMap<Role, BootFiles>) -> Option<String> {
    let named: BTreeSet<Generation> = booted.values().flat_map(booted_generations).collect();
    let runs = Generation::of_root(root);
    let newest = named.last().filter(|_| runs.is_none_or(|runs| !named.contains(&runs)))?;
    let newest = newest.subvolume();
    Some(format!(
        "the running root is {root}, but the menu entries boot {newest}, and only a root that they boot is copied. Boot {newest}, or make \
         the entries boot {root}"
    ))
}

/// The generations that the entries of a boot partition boot, except entries for older generations.
pub fn booted_generations(files: &BootFiles) -> BTreeSet<Generation> {
    let entries = files.of(Class::Entry).filter(|file| !is_older_entry_file(file));
    entries.filter_map(|file| generation_of(file.text.as_deref()?)).collect()
}

/// The roots that the entries on a spare's boot partitions boot.
pub fn booted_roots(files: &BTreeMap<Role, BootFiles>) -> Vec<BootedRoot> {
    let entries = files.iter().flat_map(|(role, files)| files.of(Class::Entry).map(move |file| (role, file)));
    let root = |(role, file): (&Role, &BootFile)| BootedRoot {
        role: role.clone(),
        path: file.path.clone(),
        subvolume: file.text.as_deref().and_then(booted_subvolume),
        is_older: is_older_entry_file(file),
    };
    entries.map(root).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::older::tests::spare;

    #[test]
    fn a_running_older_generation_is_refused() {
        let files = spare(&[
            ("loader/entries/a.conf", "options root=UUID=1 rootflags=subvol=dualroot/7\n"),
            // A sync was interrupted while it changed the entries.
            ("loader/entries/b.conf", "options root=UUID=1 rootflags=subvol=dualroot/6\n"),
            ("loader/entries/-dualroot-5-a.conf", "options root=UUID=1 rootflags=subvol=dualroot/5\n"),
        ]);
        let plain = spare(&[("loader/entries/a.conf", "options root=UUID=1\n")]);
        let why =
            |root: &str, files: &BootFiles| refuse_older_generation(root, &BTreeMap::from([(Role::Xbootldr, files.clone())]));
        assert_eq!(why("/dualroot/7", &files), None);
        assert_eq!(why("/dualroot/6", &files), None);
        for root in ["/dualroot/5", "/dualroot/8", "/@rootfs", "/"] {
            let why = why(root, &files).unwrap();
            assert!(why.contains(root) && why.contains("dualroot/7"), "{why}");
        }
        assert_eq!(why("/@rootfs", &plain), None);
    }
}
