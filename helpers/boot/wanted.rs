//! The boot files that a spare should have.

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

/// A file as it is to be on the spare.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Wanted {
    /// Its path below the partition.
    pub path: String,
    /// What it holds.
    pub content: Content,
    /// The hash of that.
    pub hash: blake3::Hash,
}

/// One boot partition of the spare: what is to be on it, and what is.
pub struct Part<'a> {
    /// [`Role::Esp`] or [`Role::Xbootldr`].
    pub role: Role,
    /// What is to be there, as [`wanted`] says.
    pub wanted: Vec<Wanted>,
    /// What is there.
    pub spare: &'a BootFiles,
    /// Folded paths of files that came from the booted disk at earlier syncs. Nothing else of the spare's own goes, but entries, and
    /// what only they referred to.
    pub known: &'a BTreeSet<String>,
}

/// What of a boot partition of the booted disk is to be on the spare, under which name, with entries and loader.conf rewritten.
///
/// # Errors
/// An entry's file name that the Boot Loader Specification doesn't allow.
pub fn wanted(
    source: &BootFiles,
    mounted: &Path,
    spare: &BootFiles,
    rewrite: impl Fn(Class, &[u8]) -> Vec<u8>,
) -> Result<Vec<Wanted>> {
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
        all.push(Wanted { path, content, hash });
    }
    // The firmware falls back to EFI/BOOT when it has no entry for a disk: a boot loader has to be there.
    if !all.iter().any(|w| fold(&w.path).starts_with("efi/boot/boot")) {
        let found = all.iter().find_map(|w| {
            let machine = fold(&w.path).strip_prefix("efi/systemd/systemd-boot")?.strip_suffix(".efi")?.to_uppercase();
            Some(Wanted { path: format!("EFI/BOOT/BOOT{machine}.EFI"), ..w.clone() })
        });
        all.extend(found);
    }
    Ok(all)
}

/// The name that a file of the booted disk has on the spare, or None when it is not to be there.
///
/// Live boot counters never travel (failure mode 25): an entry that has used up its tries, or has failed one, is not copied, and one
/// with all its tries left keeps the counters that it has on the spare.
pub(crate) fn name_on_spare(class: Class, path: &str, spare: &BootFiles) -> Result<Option<String>> {
    if class == Class::Local {
        return Ok(None);
    }
    if !class.is_bootable() {
        return Ok(Some(path.to_owned()));
    }
    let (dir, file) = path.rsplit_once('/').with_context(|| format!("{path} is no entry"))?;
    if entry::is_offer(file) {
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
            // Two of one id are two files there, too.
            let own = spare.files.get(&fold(path)).or_else(|| spare.of(class).find(same));
            Ok(Some(own.map_or_else(|| path.to_owned(), |own| own.path.clone())))
        }
    }
}
