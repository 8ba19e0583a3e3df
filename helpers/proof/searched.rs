//! Notes of images that were searched for names of other disks without a finding. Unpacking an initrd takes longer than hashing it.
//!
//! A note is one hash over everything that the result depends on: the program itself, the names that it searches for, and the image's bytes.
//! So a note can be missing, but never apply to another image or search. Notes are kept in /run until the next boot. An image with a finding
//! gets no note.

use std::collections::BTreeSet;
use std::fs::File;
use std::path::Path;

use anyhow::{Context, Result};

use crate::base::types::DiskName;
use crate::names::ident::Rewriter;
use crate::write::below::Below;
use crate::write::change::{Change, Content};

const DIRECTORY: &str = "/run/dualroot";
const PROGRAM: &str = "/proc/self/exe";

/// The notes of images that need not be searched again.
pub struct Searched {
    /// The hash of the program, and of the names that it searches for.
    base: blake3::Hash,
    /// The saved notes, a line each.
    saved: Vec<u8>,
    /// The notes of `saved` that are still in use, and new ones.
    notes: BTreeSet<String>,
}

impl Searched {
    /// No notes.
    ///
    /// # Errors
    /// This program's own file can't be read.
    pub fn new(rewriter: &Rewriter) -> Result<Self> {
        let mut hasher = blake3::Hasher::new();
        hasher.update_reader(File::open(PROGRAM).context(PROGRAM)?).context(PROGRAM)?;
        hasher.update(rewriter.fingerprint().as_bytes());
        Ok(Self { base: hasher.finalize(), saved: Vec::new(), notes: BTreeSet::new() })
    }

    /// Reads the notes of a spare's images that were saved since the machine was booted.
    ///
    /// # Errors
    /// As [`Searched::new`]; the list can't be read.
    pub fn load(rewriter: &Rewriter, disk: DiskName) -> Result<Self> {
        let saved = Below::open(Path::new(DIRECTORY))?.read(&name(disk))?.unwrap_or_default();
        Ok(Self { saved, ..Self::new(rewriter)? })
    }

    /// Whether an image with this hash was searched without a finding.
    pub fn has(&mut self, image: &blake3::Hash) -> bool {
        let note = self.note_of(image);
        let found = self.saved.split(|b| *b == b'\n').any(|line| line == note.as_bytes());
        if found {
            self.notes.insert(note);
        }
        found
    }

    /// Notes that an image with these bytes was searched without a finding.
    pub fn add(&mut self, image: &[u8]) {
        let note = self.note_of(&blake3::hash(image));
        self.notes.insert(note);
    }

    fn note_of(&self, image: &blake3::Hash) -> String {
        blake3::Hasher::new().update(self.base.as_bytes()).update(image.as_bytes()).finalize().to_hex().to_string()
    }

    fn lines(&self) -> Vec<u8> {
        self.notes.iter().flat_map(|note| [note.as_bytes(), b"\n"].concat()).collect()
    }

    /// Saves the notes that this sync has used or added.
    ///
    /// # Errors
    /// /run can't be written.
    pub fn save(&self, disk: DiskName) -> Result<()> {
        let bytes = self.lines();
        if bytes == self.saved {
            return Ok(());
        }
        Below::open(Path::new(DIRECTORY))?.apply(&Change::Replace {
            path: name(disk),
            content: Content::Bytes(bytes),
            like: None,
        })
    }
}

fn name(disk: DiskName) -> String {
    format!("searched-{disk}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::names::ident::tests::{from_another, to_b};

    impl Searched {
        /// The notes as the next sync loads them.
        pub fn for_the_next_sync(&self) -> Self {
            Self { base: self.base, saved: self.lines(), notes: BTreeSet::new() }
        }
    }

    fn next(kept: &Searched, rewriter: &Rewriter) -> Searched {
        Searched { saved: kept.lines(), ..Searched::new(rewriter).unwrap() }
    }

    #[test]
    fn f17_a_note_applies_to_one_image_and_one_search() {
        let (image, other) = (&b"image"[..], &b"imagf"[..]);
        let mut first = Searched::new(&to_b()).unwrap();
        assert!(!first.has(&blake3::hash(image)));
        first.add(image);
        let mut second = next(&first, &to_b());
        assert!(second.has(&blake3::hash(image)) && !second.has(&blake3::hash(other)));
        assert!(!next(&first, &from_another()).has(&blake3::hash(image)), "other names are searched for");
        let mut newer = next(&first, &to_b());
        newer.base = blake3::hash(b"another program");
        assert!(!newer.has(&blake3::hash(image)));
    }

    #[test]
    fn an_unused_note_is_removed() {
        let mut first = Searched::new(&to_b()).unwrap();
        first.add(b"old");
        first.add(b"new");
        let mut second = next(&first, &to_b());
        assert!(second.has(&blake3::hash(b"new")));
        let mut third = next(&second, &to_b());
        assert!(third.has(&blake3::hash(b"new")) && !third.has(&blake3::hash(b"old")));
    }

    #[test]
    fn f26_a_damaged_list_notes_nothing() {
        let mut first = Searched::new(&to_b()).unwrap();
        first.add(b"image");
        let mut damaged = next(&first, &to_b());
        damaged.saved.pop();
        damaged.saved.pop();
        assert!(!damaged.has(&blake3::hash(b"image")));
        damaged.saved = vec![0xff; 100];
        assert!(!damaged.has(&blake3::hash(b"")));
    }
}
