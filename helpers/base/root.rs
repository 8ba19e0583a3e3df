//! The directory that stands for `/` whenever a system file is read, so that tests and packagers can use a tree of their own.

use std::ffi::OsString;
use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::libc;

/// The largest file that is read, in bytes: a larger one is an error, so that it doesn't fill the memory.
const LARGEST: u64 = 4 << 20;

/// The directory that stands for `/`.
#[derive(Clone, Debug)]
pub struct Root(PathBuf);

impl Root {
    /// `/`, or the directory that the environment variable DUALROOT_ROOT names.
    pub fn from_env() -> Self {
        match std::env::var_os("DUALROOT_ROOT") {
            Some(dir) if !dir.is_empty() => Self(dir.into()),
            _ => Self("/".into()),
        }
    }

    /// The tree below `dir`.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self(dir.into())
    }

    /// Whether this is the running system's own root.
    pub fn is_host(&self) -> bool {
        self.0 == Path::new("/")
    }

    /// The real path of the system's absolute path `path`.
    pub fn path(&self, path: impl AsRef<Path>) -> PathBuf {
        let path = path.as_ref();
        self.0.join(path.strip_prefix("/").unwrap_or(path))
    }

    /// The contents of a file of at most 4 MiB; /dev/null is empty. Doesn't block on a named pipe.
    ///
    /// # Errors
    /// Those of opening and reading; `InvalidInput` if it is neither a regular file nor a character device; `FileTooLarge`.
    pub fn read(&self, path: impl AsRef<Path>) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        let file = fs::OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(self.path(path))?;
        let kind = file.metadata()?.file_type();
        if !kind.is_file() && !kind.is_char_device() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
        }
        file.take(LARGEST + 1).read_to_end(&mut bytes)?;
        if bytes.len() as u64 > LARGEST {
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, "larger than 4 MiB"));
        }
        Ok(bytes)
    }

    /// The contents of a file, or None if it or its directory doesn't exist.
    ///
    /// # Errors
    /// As [`Root::read`], except that the file doesn't exist.
    pub fn read_opt(&self, path: impl AsRef<Path>) -> io::Result<Option<Vec<u8>>> {
        match self.read(path) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// The names in a directory, sorted; empty if it doesn't exist.
    ///
    /// # Errors
    /// A directory that exists can't be read.
    pub fn names(&self, path: impl AsRef<Path>) -> io::Result<Vec<OsString>> {
        let mut names = match fs::read_dir(self.path(path)) {
            Ok(dir) => dir.map(|e| Ok(e?.file_name())).collect::<io::Result<Vec<_>>>()?,
            Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Vec::new(),
            Err(e) => return Err(e),
        };
        names.sort();
        Ok(names)
    }

    /// Whether the path exists; a dangling symbolic link counts as existing.
    pub fn exists(&self, path: impl AsRef<Path>) -> bool {
        fs::symlink_metadata(self.path(path)).is_ok()
    }
}
