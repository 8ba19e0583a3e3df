//! The roots that menu entries boot.

use std::collections::{BTreeMap, BTreeSet};

use crate::base::types::Role;
use crate::boot::files::{BootFiles, Class};
use crate::boot::offers::is_offered;
use crate::devices::subvolume::is_subvolume;
use crate::names::cmdline::booted_by;
use crate::names::generation::{DIRECTORY, Generation};
use crate::write::below::Below;

pub(crate) fn generation_of(entry: &[u8]) -> Option<Generation> {
    Generation::parse(booted_by(entry)?.strip_prefix(DIRECTORY)?.strip_prefix('/')?).ok()
}

/// Why the booted disk is no source: its entries boot a generation, and the root that runs, a directory of the file system, is another
/// one, such as an older one that was booted for a look.
pub fn no_source(root: &str, booted: &BTreeMap<Role, BootFiles>) -> Option<String> {
    let named: BTreeSet<Generation> = booted.values().flat_map(self::booted).collect();
    let runs = Generation::at(root);
    let newest = named.last().filter(|_| runs.is_none_or(|runs| !named.contains(&runs)))?;
    Some(format!(
        "the root that runs is {root}, and the boot loader's entries boot {}; boot that, or have the entries name this one",
        newest.subvolume()
    ))
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

/// The subvolumes that the entries of a boot partition boot, as paths from the top of the file system.
pub fn named(files: &BootFiles) -> impl Iterator<Item = String> {
    files.of(Class::Entry).filter_map(|file| booted_by(file.text.as_deref()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::offers::tests::spare;

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
}
