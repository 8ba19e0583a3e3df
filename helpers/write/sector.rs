//! Small texts that change within one sector.

use crate::write::change::{Change, Content};

/// A disk writes a sector of this many bytes whole or not at all.
pub(crate) const SECTOR: usize = 512;

/// The change that gives a small text which the boot loader reads a new content: in place where it fits into the file's one sector, by
/// a rename otherwise. Texts end in as many newlines as fill the sector, so that the next change can be made in place. `there` is the
/// size in bytes of the file as it is.
pub fn text_change(path: &str, there: Option<u64>, text: &[u8]) -> Change {
    let text = text.trim_ascii_end();
    let in_place = there.and_then(|size| usize::try_from(size).ok()).filter(|&size| size <= SECTOR && text.len() < size);
    let mut bytes = text.to_vec();
    bytes.push(b'\n');
    bytes.resize(bytes.len().max(in_place.unwrap_or(SECTOR)), b'\n');
    match in_place {
        Some(_) => Change::Overwrite { path: path.to_owned(), bytes },
        None => Change::Replace { path: path.to_owned(), content: Content::Bytes(bytes), like: None },
    }
}
