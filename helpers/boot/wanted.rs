//! The wanted files: those that a spare's boot partitions must have after a sync.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Context, Result};

use crate::base::types::Role;
use crate::boot::entry::{self, EntryName};
use crate::boot::files::{BootFile, BootFiles, Class, classify, fold};
use crate::write::change::{Change, Content};

/// One change to one of the spare's boot partitions.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Step {
    /// [`Role::Esp`] or [`Role::Xbootldr`].
    pub role: Role,
    /// The change.
    pub change: Change,
}

/// A file that the spare must have.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct WantedFile {
    /// Its path below the partition.
    pub path: String,
    /// Its content.
    pub content: Content,
    /// The BLAKE3 hash of its content.
    pub hash: blake3::Hash,
}

/// A boot partition of the spare: its wanted files and its present ones.
pub struct BootPartition<'a> {
    /// [`Role::Esp`] or [`Role::Xbootldr`].
    pub role: Role,
    /// The wanted files, from [`wanted_files`].
    pub wanted: Vec<WantedFile>,
    /// The present files.
    pub spare: &'a BootFiles,
    /// Folded paths of files that came from the booted disk in earlier syncs. Of the spare's other files, only entries and files that only
    /// entries needed are removed.
    pub known: &'a BTreeSet<String>,
}

/// The wanted files for a boot partition of the booted disk (`source`, mounted on `mounted`). `rewrite` changes entries and loader.conf for
/// the spare, whose present files decide the boot counters in names.
///
/// # Errors
/// An entry's file name is invalid (Boot Loader Specification).
pub fn wanted_files(
    source: &BootFiles,
    mounted: &Path,
    spare: &BootFiles,
    rewrite: impl Fn(Class, &[u8]) -> Vec<u8>,
) -> Result<Vec<WantedFile>> {
    let mut all = Vec::new();
    for file in source.files.values() {
        let class = classify(&file.path);
        let Some(path) = name_on_spare(class, &file.path, spare)? else { continue };
        let (content, hash) = match &file.text {
            Some(text) => {
                let text = rewrite(class, text);
                let hash = blake3::hash(&text);
                (Content::Bytes(text), hash)
            }
            None => (Content::File { source: mounted.join(&file.path), hash: file.hash, size: file.size }, file.hash),
        };
        all.push(WantedFile { path, content, hash });
    }
    // The firmware falls back to EFI/BOOT if it has no entry for a disk, so a boot loader must be there.
    if !all.iter().any(|w| fold(&w.path).starts_with("efi/boot/boot")) {
        let found = all.iter().find_map(|w| {
            let machine = fold(&w.path).strip_prefix("efi/systemd/systemd-boot")?.strip_suffix(".efi")?.to_uppercase();
            Some(WantedFile { path: format!("EFI/BOOT/BOOT{machine}.EFI"), ..w.clone() })
        });
        all.extend(found);
    }
    Ok(all)
}

/// The path of a file of the booted disk on the spare, or None if it isn't copied.
///
/// Boot counters in use are never copied (failure mode 25): an entry that failed a boot attempt, or has none left, isn't copied, and one
/// with all its attempts left keeps the counters that it has on the spare.
pub(crate) fn name_on_spare(class: Class, path: &str, spare: &BootFiles) -> Result<Option<String>> {
    if class == Class::Local {
        return Ok(None);
    }
    if !class.is_bootable() {
        return Ok(Some(path.to_owned()));
    }
    let (dir, file) = path.rsplit_once('/').with_context(|| format!("{path} is not in a directory of entries"))?;
    if entry::is_older_entry(file) {
        return Ok(None);
    }
    let name = EntryName::parse(file)?;
    match (name.tries_left, name.tries_done) {
        (None, _) => Ok(Some(path.to_owned())),
        (Some(0), _) | (Some(_), Some(1..)) => Ok(None),
        (Some(_), _) => {
            let same = |other: &&BootFile| {
                let (other_dir, other) = other.path.rsplit_once('/').unwrap_or_default();
                fold(other_dir) == fold(dir) && EntryName::parse(other).is_ok_and(|o| fold(&o.id) == fold(&name.id))
            };
            // If the booted disk has two files with one id, so has the spare.
            let own = spare.files.get(&fold(path)).or_else(|| spare.of(class).find(same));
            Ok(Some(own.map_or_else(|| path.to_owned(), |own| own.path.clone())))
        }
    }
}
