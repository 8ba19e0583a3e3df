//! Changes to a file system, as data.

use std::fmt;
use std::path::PathBuf;

/// One change to a file system, by a path relative to the handle.
#[derive(Clone, PartialEq, Eq)]
pub enum Change {
    /// A directory, with its parents.
    MakeDir(String),
    /// A new file under a name that nothing needs yet; what stands there is removed first.
    Create {
        /// Where.
        path: String,
        /// What it is to hold.
        content: Content,
    },
    /// The first bytes of a file, in place, with its size kept. Within one sector that is atomic.
    Overwrite {
        /// Where.
        path: String,
        /// Not more than the file holds.
        bytes: Vec<u8>,
    },
    /// A whole new content for a file that may be there: written beside it, flushed, renamed over it, flushed. Owner, mode and
    /// extended attributes stay as they are, or become those of the file `like`.
    Replace {
        /// Where.
        path: String,
        /// What it is to hold.
        content: Content,
        /// Whose attributes a file that is not there yet gets.
        like: Option<PathBuf>,
    },
    /// A file or an empty directory goes; one that isn't there is no error.
    Remove(String),
    /// All that was written reaches the medium before anything that follows: syncfs(2), then fsync(2), because on vfat the former
    /// doesn't flush the disk's own cache.
    Barrier,
}

/// What a file is to hold.
#[derive(Clone, PartialEq, Eq)]
pub enum Content {
    /// These bytes.
    Bytes(Vec<u8>),
    /// The bytes of a file of the booted disk, which must have this BLAKE3 hash once copied.
    File {
        /// Its path.
        source: PathBuf,
        /// Its hash, as it was when the change was planned.
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
