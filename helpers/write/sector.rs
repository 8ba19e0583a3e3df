//! Small texts that change within one sector.

use crate::write::change::{Change, Content};

/// The size in bytes of a sector, which a disk writes whole or not at all.
pub(crate) const SECTOR: usize = 512;

/// The change that gives a small text file of the boot loader a new content: in place if the new text fits into the file's one sector, by
/// a rename otherwise. The text is filled up with newlines to a whole sector, so that the next change can be made in place. `there` is
/// the present size of the file in bytes, None if it doesn't exist.
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
