//! Changes to a file system, as data.

use std::fmt;
use std::path::PathBuf;

/// One change to a file system. Paths are relative to the [`Below`](super::below::Below) that it is applied to.
#[derive(Clone, PartialEq, Eq)]
pub enum Change {
    /// Makes a directory and its missing parents.
    MakeDir(String),
    /// Writes a new file under a name that nothing needs yet; an existing file is removed first.
    Create {
        /// The file's path.
        path: String,
        /// Its new content.
        content: Content,
    },
    /// Overwrites the first bytes of a file in place; its size stays. Within one sector this is atomic.
    Overwrite {
        /// The file's path.
        path: String,
        /// The new bytes, not more than the file holds.
        bytes: Vec<u8>,
    },
    /// Replaces a file's whole content, or makes the file: written under a temporary name, flushed, renamed, flushed. An existing file
    /// keeps its owner, mode and extended attributes.
    Replace {
        /// The file's path.
        path: String,
        /// Its new content.
        content: Content,
        /// The file whose owner, mode and attributes a new file gets.
        like: Option<PathBuf>,
    },
    /// Removes a file or an empty directory. A directory that isn't empty stays; a missing file is no error.
    Remove(String),
    /// Flushes everything written so far to the medium: syncfs(2), then fsync(2), because on vfat syncfs doesn't flush the disk's cache.
    Barrier,
}

/// The content of a file to be written.
#[derive(Clone, PartialEq, Eq)]
pub enum Content {
    /// These bytes.
    Bytes(Vec<u8>),
    /// A copy of a file of the booted disk.
    File {
        /// Its path.
        source: PathBuf,
        /// Its BLAKE3 hash when the change was planned; a copy with another hash is an error.
        hash: blake3::Hash,
        /// Its size in bytes.
        size: u64,
    },
}

impl Content {
    /// The size in bytes.
    pub fn size(&self) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes.len() as u64,
            Self::File { size, .. } => *size,
        }
    }
}

impl fmt::Display for Change {
    /// One line for people, as `--dry-run` prints it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::MakeDir(path) => write!(f, "make directory {path}"),
            Self::Create { path, content } => write!(f, "write {path} ({} bytes)", content.size()),
            Self::Overwrite { path, bytes } => write!(f, "overwrite {path} in place ({} bytes)", bytes.len()),
            Self::Replace { path, content, .. } => write!(f, "replace {path} ({} bytes)", content.size()),
            Self::Remove(path) => write!(f, "remove {path}"),
            Self::Barrier => f.write_str("flush"),
        }
    }
}

impl fmt::Debug for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Debug for Content {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.size())
    }
}
