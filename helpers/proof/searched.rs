//! Which images were searched for what names another disk, and have nothing of it. To unpack an initrd takes longer than to compare it.
//!
//! What is noted is one hash over all that the finding depends on: the program itself, what it searches for, and the image's bytes.
//! So a note can be missing, but not be about something else. It is kept in /run, until the next boot, and never for an image with
//! a finding.

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

/// The images that need not be searched again.
pub struct Searched {
    /// Of the program, and of what it searches for.
    base: blake3::Hash,
    /// As they were kept, a line each.
    before: Vec<u8>,
    /// Those of `before` that are still of use, and new ones.
    notes: BTreeSet<String>,
}

impl Searched {
    /// Nothing yet.
    ///
    /// # Errors
    /// This program's own file that can't be read.
    pub fn new(rewriter: &Rewriter) -> Result<Self> {
        let mut hasher = blake3::Hasher::new();
        hasher.update_reader(File::open(PROGRAM).context(PROGRAM)?).context(PROGRAM)?;
        hasher.update(rewriter.fingerprint().as_bytes());
        Ok(Self { base: hasher.finalize(), before: Vec::new(), notes: BTreeSet::new() })
    }

    /// What was kept of a spare's images since the machine was booted.
    ///
    /// # Errors
    /// As [`Searched::new`]; a list that can't be read.
    pub fn load(rewriter: &Rewriter, disk: DiskName) -> Result<Self> {
        let before = Below::open(Path::new(DIRECTORY))?.read(&name(disk))?.unwrap_or_default();
        Ok(Self { before, ..Self::new(rewriter)? })
    }

    /// Whether an image of this hash was searched, and has nothing.
    pub fn has(&mut self, image: &blake3::Hash) -> bool {
        let note = self.note_of(image);
        let found = self.before.split(|b| *b == b'\n').any(|line| line == note.as_bytes());
        if found {
            self.notes.insert(note);
        }
        found
    }

    /// Notes that an image with these bytes has nothing.
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

    /// Keeps what this sync has asked for and noted.
    ///
    /// # Errors
    /// /run that can't be written.
    pub fn save(&self, disk: DiskName) -> Result<()> {
        let bytes = self.lines();
        if bytes == self.before {
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
        /// As it is loaded then.
        pub fn for_the_next_sync(&self) -> Self {
            Self { base: self.base, before: self.lines(), notes: BTreeSet::new() }
        }
    }

    fn next(kept: &Searched, rewriter: &Rewriter) -> Searched {
        Searched { before: kept.lines(), ..Searched::new(rewriter).unwrap() }
    }

    #[test]
    fn f17_a_note_is_about_one_image_and_one_search() {
        let (image, other) = (&b"image"[..], &b"imagf"[..]);
        let mut first = Searched::new(&to_b()).unwrap();
        assert!(!first.has(&blake3::hash(image)));
        first.add(image);
        let mut second = next(&first, &to_b());
        assert!(second.has(&blake3::hash(image)) && !second.has(&blake3::hash(other)));
        assert!(!next(&first, &from_another()).has(&blake3::hash(image)), "something else is searched for");
        let mut newer = next(&first, &to_b());
        newer.base = blake3::hash(b"another program");
        assert!(!newer.has(&blake3::hash(image)));
    }

    #[test]
    fn what_nobody_asks_for_is_forgotten() {
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
        damaged.before.pop();
        damaged.before.pop();
        assert!(!damaged.has(&blake3::hash(b"image")));
        damaged.before = vec![0xff; 100];
        assert!(!damaged.has(&blake3::hash(b"")));
    }
}
