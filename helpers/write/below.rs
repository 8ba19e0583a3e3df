//! Reading and writing below one directory handle.
//!
//! Everything that dualroot writes to a disk goes through [`Below`], except the trees that rsync stages below such a handle. The kernel
//! resolves paths with `RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_XDEV` (openat2(2)), so that no symbolic link, mount or
//! swapped directory can lead a write elsewhere.

use std::ffi::{OsStr, OsString};
use std::fs::{File, Metadata};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{
    AtFlags, OFlag, OpenHow, PosixFadviseAdvice, RenameFlags, ResolveFlag, openat2, posix_fadvise, renameat, renameat2,
};
use nix::sys::stat::{FileStat, Mode, fchmod, fstatat, futimens, mkdirat};
use nix::sys::time::TimeSpec;
use nix::unistd::{Gid, Uid, UnlinkatFlags, fchown, syncfs, unlinkat};

use crate::write::change::{Change, Content};

/// The prefix of temporary files, which an interrupted write leaves behind. The boot loader skips names that begin with a dot.
pub const TEMPORARY_PREFIX: &str = ".dualroot-";
/// Their prefix, in lower case, on a FAT where a power cut has left only the short (8.3) one of a file's two names.
const SHORT_NAME_PREFIX: &str = "dualro~";

/// Whether a name is that of a temporary file, or of a file that fsck.fat made of one: FSCK0000.REC for clusters without a name,
/// FSCK0000.000 for the second file of a name.
pub fn is_temporary(name: &str) -> bool {
    let name = name.to_lowercase();
    let salvaged = name.strip_prefix("fsck").and_then(|rest| rest.split_once('.')).is_some_and(|(number, kind)| {
        let is_number = |text: &str, len| text.len() == len && text.bytes().all(|byte| byte.is_ascii_digit());
        is_number(number, 4) && (kind == "rec" || is_number(kind, 3))
    });
    salvaged || name.starts_with(TEMPORARY_PREFIX) || name.starts_with(SHORT_NAME_PREFIX)
}

/// The type of a file in a directory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FileKind {
    /// A regular file of this size in bytes.
    File(u64),
    /// A directory.
    Dir,
    /// Anything else.
    Other,
}

/// An open directory, below which files are read and written.
pub struct Below {
    dir: OwnedFd,
    shown: PathBuf,
    from_medium: bool,
}

impl Below {
    /// Opens a directory. `path` is resolved only now; later it appears in messages only.
    ///
    /// # Errors
    /// Those of open(2).
    pub fn open(path: &Path) -> Result<Self> {
        let dir = nix::fcntl::open(path, OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())
            .with_context(|| format!("{} can't be opened as a directory", path.display()))?;
        Ok(Self { dir, shown: path.into(), from_medium: false })
    }

    /// The same handle, reading from the medium instead of the page cache: after a failed write, the cache still holds data that the
    /// medium lacks (fsync(2), NOTES).
    #[must_use]
    pub fn from_medium(self) -> Self {
        Self { from_medium: true, ..self }
    }

    /// A path to the directory by its handle, for programs that this process starts.
    pub fn proc_path(&self) -> PathBuf {
        format!("/proc/self/fd/{}", self.dir.as_raw_fd()).into()
    }

    /// The handle.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.dir.as_fd()
    }

    /// The number (st_dev) of the device that the directory is on.
    ///
    /// # Errors
    /// Those of fstat(2).
    pub fn device(&self) -> Result<u64> {
        Ok(nix::sys::stat::fstat(&self.dir).with_context(|| format!("{}", self.shown.display()))?.st_dev)
    }

    /// The free bytes of the file system, and the size in bytes of its allocation unit.
    ///
    /// # Errors
    /// Those of fstatvfs(3).
    pub fn free(&self) -> Result<(u64, u64)> {
        let s = nix::sys::statvfs::fstatvfs(&self.dir).with_context(|| format!("{}", self.shown.display()))?;
        Ok((s.blocks_available() * s.fragment_size(), s.fragment_size()))
    }

    fn open_how(flags: OFlag) -> OpenHow {
        OpenHow::new()
            .flags(flags | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW)
            .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS | ResolveFlag::RESOLVE_NO_XDEV)
    }

    /// Opens a file for reading; None if it doesn't exist.
    ///
    /// # Errors
    /// Those of openat2(2), also for a symbolic link on the way.
    pub fn file(&self, path: &str) -> Result<Option<File>> {
        let fd = match openat2(&self.dir, path, Self::open_how(OFlag::O_RDONLY | OFlag::O_NONBLOCK)) {
            Ok(fd) => fd,
            Err(Errno::ENOENT | Errno::ENOTDIR) => return Ok(None),
            Err(e) => return Err(e).with_context(|| format!("{} can't be opened", self.show(path))),
        };
        if self.from_medium {
            posix_fadvise(&fd, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)
                .with_context(|| format!("{} can't be dropped from the page cache", self.show(path)))?;
        }
        Ok(Some(fd.into()))
    }

    /// The content of a file of at most 4 MiB; None if it doesn't exist.
    ///
    /// # Errors
    /// As [`Below::file`]; the file is larger.
    pub fn read(&self, path: &str) -> Result<Option<Vec<u8>>> {
        const LARGEST: u64 = 4 << 20;
        let Some(file) = self.file(path)? else { return Ok(None) };
        let mut bytes = Vec::new();
        file.take(LARGEST + 1).read_to_end(&mut bytes).with_context(|| format!("{} can't be read", self.show(path)))?;
        if bytes.len() as u64 > LARGEST {
            bail!("{} is larger than 4 MiB", self.show(path));
        }
        Ok(Some(bytes))
    }

    /// The names in a directory (`"."` for the handle itself) with their types, sorted; empty if it doesn't exist.
    ///
    /// # Errors
    /// Those of reading a directory; a name that isn't UTF-8 (FAT is mounted with `utf8`).
    pub fn list(&self, path: &str) -> Result<Vec<(String, FileKind)>> {
        let fd = match openat2(&self.dir, path, Self::open_how(OFlag::O_RDONLY | OFlag::O_DIRECTORY)) {
            Ok(fd) => fd,
            Err(Errno::ENOENT | Errno::ENOTDIR) => return Ok(Vec::new()),
            Err(e) => return Err(e).with_context(|| format!("{} can't be opened", self.show(path))),
        };
        let mut found = Vec::new();
        for name in names_in_order(&fd).with_context(|| format!("{} can't be read", self.show(path)))? {
            let stat = fstatat(&fd, name.as_os_str(), AtFlags::AT_SYMLINK_NOFOLLOW)
                .with_context(|| format!("{}/{}", self.show(path), name.to_string_lossy().escape_debug()))?;
            let kind = match stat.st_mode & nix::libc::S_IFMT {
                nix::libc::S_IFREG => FileKind::File(u64::try_from(stat.st_size).unwrap_or_default()),
                nix::libc::S_IFDIR => FileKind::Dir,
                _ => FileKind::Other,
            };
            let name = name.into_string().ok().with_context(|| format!("{} holds a name that isn't UTF-8", self.show(path)))?;
            found.push((name, kind));
        }
        found.sort_by(|a, b| a.0.cmp(&b.0));
        Ok(found)
    }

    /// The BLAKE3 hash of a file; None if it doesn't exist.
    ///
    /// # Errors
    /// Those of reading it.
    pub fn hash(&self, path: &str) -> Result<Option<blake3::Hash>> {
        let Some(file) = self.file(path)? else { return Ok(None) };
        let mut hasher = blake3::Hasher::new();
        io::copy(&mut io::BufReader::with_capacity(1 << 17, file), &mut hasher)
            .with_context(|| format!("{} can't be read", self.show(path)))?;
        Ok(Some(hasher.finalize()))
    }

    /// Opens a directory below this one; None if it doesn't exist or isn't a directory.
    ///
    /// # Errors
    /// Those of openat2(2), also for a symbolic link on the way.
    pub fn sub(&self, path: &OsStr) -> Result<Option<Self>> {
        match self.dir(path) {
            Ok(dir) => Ok(Some(Self { dir, shown: self.shown.join(path), from_medium: self.from_medium })),
            Err(Errno::ENOENT | Errno::ENOTDIR) => Ok(None),
            Err(e) => Err(e).with_context(|| format!("{} can't be opened", self.shown.join(path).display())),
        }
    }

    /// The directory itself as a file, to read its attributes.
    ///
    /// # Errors
    /// Those of dup(2).
    pub fn as_file(&self) -> Result<File> {
        Ok(self.dir.try_clone().with_context(|| self.shown.display().to_string())?.into())
    }

    /// The status of the file at `path`, symbolic links not followed; None if it doesn't exist, or a directory on the way is a link.
    ///
    /// # Errors
    /// Those of the system calls; a path that leads out of the directory.
    pub fn stat(&self, path: &OsStr) -> Result<Option<FileStat>> {
        self.at(path, |dir, name| fstatat(dir, name, AtFlags::AT_SYMLINK_NOFOLLOW))
    }

    /// Whether chattr(1) has made the file at `path` (`"."` for the handle itself) immutable or append-only, so that neither it nor its
    /// contents can be replaced or removed.
    ///
    /// # Errors
    /// As [`Below::stat`].
    pub fn is_fixed(&self, path: &OsStr) -> Result<bool> {
        use rustix::fs::{AtFlags, StatxAttributes, StatxFlags, statx};
        let is_fixed = |dir: &OwnedFd, name: &OsStr| {
            let found = statx(dir, name, AtFlags::SYMLINK_NOFOLLOW | AtFlags::EMPTY_PATH, StatxFlags::empty());
            let found = found.map_err(|e| Errno::from_raw(e.raw_os_error()))?;
            Ok(found.stx_attributes.intersects(StatxAttributes::IMMUTABLE | StatxAttributes::APPEND))
        };
        match path == "." {
            true => is_fixed(&self.dir, OsStr::new("")).with_context(|| self.shown.display().to_string()),
            false => Ok(self.at(path, is_fixed)?.unwrap_or_default()),
        }
    }

    /// The names in a directory (`"."` for the handle itself), sorted; they may be any bytes.
    ///
    /// # Errors
    /// Those of reading a directory.
    pub fn names(&self, path: &OsStr) -> Result<Vec<OsString>> {
        let shown = || self.shown.join(path).display().to_string();
        let mut names = names_in_order(&self.dir(path).with_context(shown)?).with_context(shown)?;
        names.sort();
        Ok(names)
    }

    /// Makes a directory that only its owner can enter.
    ///
    /// # Errors
    /// Those of mkdirat(2), also if the name exists.
    pub fn make_private(&self, path: &OsStr) -> Result<()> {
        let make = || -> Result<()> {
            let (dir, name) = self.parent(path)?;
            Ok(mkdirat(&dir, name, Mode::S_IRWXU)?)
        };
        make().with_context(|| format!("{} can't be made", self.shown.join(path).display()))
    }

    /// Moves the file at `path` below `from` to the same path here, in one step: it replaces a file there, or changes places with
    /// it if `exchange`. Does nothing if the directory that would hold it is missing.
    ///
    /// # Errors
    /// Those of renameat2(2).
    pub fn take(&self, from: &Self, path: &OsStr, exchange: bool) -> Result<()> {
        let flags = if exchange { RenameFlags::RENAME_EXCHANGE } else { RenameFlags::empty() };
        let take = || -> Result<()> {
            let ((old, name), (new, _)) = (from.parent(path)?, self.parent(path)?);
            Ok(renameat2(&old, name, &new, name, flags)?)
        };
        take()
            .or_else(|e| if is_absent(&e) { Ok(()) } else { Err(e) })
            .with_context(|| format!("{} can't be moved into place", self.shown.join(path).display()))
    }

    /// Removes a file, or (if `directory`) an empty directory. A missing file, one of the other type, or a directory that isn't empty is
    /// no error, and stays.
    ///
    /// # Errors
    /// Those of unlinkat(2); a path that leads out of the directory.
    pub fn unlink(&self, path: &OsStr, directory: bool) -> Result<()> {
        let flag = if directory { UnlinkatFlags::RemoveDir } else { UnlinkatFlags::NoRemoveDir };
        let removed = self.at(path, |dir, name| match unlinkat(dir, name, flag) {
            Err(Errno::EISDIR | Errno::ENOTEMPTY | Errno::EEXIST) => Ok(()),
            // Some file systems return this for a directory.
            Err(Errno::EPERM) if fstatat(dir, name, AtFlags::AT_SYMLINK_NOFOLLOW).is_ok_and(|s| is_dir(&s)) => Ok(()),
            done => done,
        });
        removed.map(|_| ()).with_context(|| format!("{} can't be removed", self.shown.join(path).display()))
    }

    /// Removes a file, or a directory and everything in it. Symbolic links are removed, not followed.
    ///
    /// # Errors
    /// Those of the system calls; a file system is mounted in it.
    pub fn clear(&self, path: &OsStr) -> Result<()> {
        let mut dirs = Vec::new();
        let mut found = vec![path.to_owned()];
        while let Some(path) = found.pop() {
            match self.stat(&path)? {
                Some(stat) if is_dir(&stat) => {
                    found.extend(self.names(&path)?.iter().map(|name| join(&path, name)));
                    dirs.push(path);
                }
                Some(_) => self.unlink(&path, false)?,
                None => {}
            }
        }
        dirs.iter().rev().try_for_each(|dir| self.unlink(dir, true))
    }

    /// Gives the directory `path` (`"."` for the handle itself) the owner, mode and extended attributes of the directory `like`, and
    /// the modification time `time` in seconds and nanoseconds. Does nothing if the directory is missing, or is a mount point.
    ///
    /// # Errors
    /// Those of the system calls.
    pub fn set_attributes(&self, path: &OsStr, like: &File, time: (i64, i64)) -> Result<()> {
        let set = || -> Result<()> {
            let dir = match self.dir(path) {
                Ok(dir) => File::from(dir),
                Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP | Errno::EXDEV) => return Ok(()),
                Err(e) => return Err(e.into()),
            };
            use xattr::FileExt as _;
            let wanted: Vec<OsString> = like.list_xattr().into_iter().flatten().collect();
            // Before the mode: removing an ACL changes the meaning of the mode. Security labels can't be removed, only changed.
            let unwanted = |name: &OsString| !wanted.contains(name) && !name.as_bytes().starts_with(b"security.");
            for name in dir.list_xattr().into_iter().flatten().filter(unwanted) {
                dir.remove_xattr(&name).with_context(|| format!("extended attribute {}", name.to_string_lossy()))?;
            }
            copy_attributes(like, &dir)?;
            Ok(futimens(&dir, &TimeSpec::UTIME_OMIT, &TimeSpec::new(time.0, time.1))?)
        };
        set().with_context(|| format!("the attributes of {} can't be set", self.shown.join(path).display()))
    }

    /// Calls `act` with the directory that holds `path` and the name in it; None if either doesn't exist.
    fn at<T>(&self, path: &OsStr, act: impl FnOnce(&OwnedFd, &OsStr) -> nix::Result<T>) -> Result<Option<T>> {
        let done: Result<T> = self.parent(path).and_then(|(dir, name)| Ok(act(&dir, name)?));
        match done {
            Ok(found) => Ok(Some(found)),
            Err(e) if is_absent(&e) => Ok(None),
            Err(e) => Err(e.context(self.shown.join(path).display().to_string())),
        }
    }

    /// Carries out one change. An interrupted [`Change::Replace`] leaves the old or the new content, never a part.
    ///
    /// # Errors
    /// Those of the system calls; a source file has changed since the plan was made.
    pub fn apply(&self, change: &Change) -> Result<()> {
        match change {
            Change::MakeDir(path) => self.make_dir(path),
            Change::Create { path, content } => self.create(path, content),
            Change::Overwrite { path, bytes } => self.overwrite(path, bytes),
            Change::Replace { path, content, like } => self.replace(path, content, like.as_deref()),
            Change::Remove(path) => self.remove(path),
            Change::Barrier => self.barrier(),
        }
        .with_context(|| format!("{}: {change}", self.shown.display()))
    }

    /// Replaces a file, or a link, by a new file that everybody may read: written, flushed and renamed. It flushes nothing else, and is
    /// not for FAT, see [`Change::Replace`].
    ///
    /// # Errors
    /// Those of the system calls.
    pub fn publish(&self, path: &str, bytes: Vec<u8>) -> Result<()> {
        let publish = || -> Result<()> {
            let (dir, name) = self.parent(path)?;
            let temporary = format!("{TEMPORARY_PREFIX}{}.new", name.to_str().context("the file's name is not UTF-8")?);
            let fresh = self.write_new(&dir, &temporary, &Content::Bytes(bytes))?;
            fchmod(&fresh, Mode::from_bits_truncate(0o644))?;
            fresh.sync_all()?;
            renameat(&dir, temporary.as_str(), &dir, name)?;
            Ok(nix::unistd::fsync(&dir)?)
        };
        publish().with_context(|| format!("{} can't be written", self.show(path)))
    }

    fn show(&self, path: &str) -> String {
        format!("{}/{path}", self.shown.display())
    }

    /// The directory that holds `path`, and the last component.
    fn parent<'p>(&self, path: &'p (impl AsRef<OsStr> + ?Sized)) -> Result<(OwnedFd, &'p OsStr)> {
        let path = path.as_ref().as_bytes();
        let (dir, name) = match path.iter().rposition(|b| *b == b'/') {
            Some(slash) => (path.get(..slash).unwrap_or_default(), path.get(slash + 1..).unwrap_or_default()),
            None => (&b"."[..], path),
        };
        if matches!(name, b"" | b"." | b"..") {
            bail!("'{}' names no file", path.escape_ascii());
        }
        Ok((self.dir(OsStr::from_bytes(dir))?, OsStr::from_bytes(name)))
    }

    fn dir(&self, path: &OsStr) -> nix::Result<OwnedFd> {
        openat2(&self.dir, path, Self::open_how(OFlag::O_RDONLY | OFlag::O_DIRECTORY))
    }

    fn make_dir(&self, path: &str) -> Result<()> {
        let mut upto = String::new();
        for part in path.split('/') {
            if !upto.is_empty() {
                upto.push('/');
            }
            upto.push_str(part);
            let (dir, name) = self.parent(&upto)?;
            match mkdirat(&dir, name, Mode::from_bits_truncate(0o755)) {
                Ok(()) | Err(Errno::EEXIST) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }

    fn write_new(&self, dir: &OwnedFd, name: impl AsRef<OsStr>, content: &Content) -> Result<File> {
        let name = name.as_ref();
        match unlinkat(dir, name, UnlinkatFlags::NoRemoveDir) {
            Ok(()) | Err(Errno::ENOENT) => {}
            Err(e) => return Err(e.into()),
        }
        let how = Self::open_how(OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL).mode(Mode::from_bits_truncate(0o600));
        let mut file = File::from(openat2(dir, name, how)?);
        match content {
            Content::Bytes(bytes) => file.write_all(bytes)?,
            Content::File { source, hash, .. } => {
                let mut from = File::open(source).with_context(|| format!("{} can't be opened", source.display()))?;
                let mut hasher = blake3::Hasher::new();
                let mut buffer = vec![0; 1 << 17];
                loop {
                    let n = from.read(&mut buffer).with_context(|| format!("{} can't be read", source.display()))?;
                    let Some(part) = buffer.get(..n).filter(|p| !p.is_empty()) else { break };
                    hasher.update(part);
                    file.write_all(part)?;
                }
                if hasher.finalize() != *hash {
                    bail!("{} changed while it was copied", source.display());
                }
            }
        }
        Ok(file)
    }

    fn create(&self, path: &str, content: &Content) -> Result<()> {
        let (dir, name) = self.parent(path)?;
        self.write_new(&dir, name, content)?;
        Ok(())
    }

    fn overwrite(&self, path: &str, bytes: &[u8]) -> Result<()> {
        let mut file = File::from(openat2(&self.dir, path, Self::open_how(OFlag::O_RDWR))?);
        if bytes.len() as u64 > file.seek(SeekFrom::End(0))? {
            bail!("the file is smaller than the bytes to write in place");
        }
        file.write_all_at(bytes, 0)?;
        file.sync_all()?;
        Ok(())
    }

    fn replace(&self, path: &str, content: &Content, like: Option<&Path>) -> Result<()> {
        let (dir, name) = self.parent(path)?;
        let name = name.to_str().context("the file's name is not UTF-8")?;
        let mut names = self.temporary_names(&dir, name)?;
        let temporary = names.pop().context("there is no temporary name")?;
        let fresh = self.write_new(&dir, &temporary, content)?;
        for name in names {
            unlinkat(&dir, name.as_str(), UnlinkatFlags::NoRemoveDir)?;
        }
        // Kept open until the rename is on the medium, so that vfat doesn't reuse its clusters before.
        let old = self.file(path)?;
        let model = match (&old, like) {
            (Some(old), _) => Some(old.try_clone()?),
            (None, Some(like)) => Some(File::open(like).with_context(|| format!("{} can't be opened", like.display()))?),
            (None, None) => None,
        };
        if let Some(model) = model {
            copy_attributes(&model, &fresh)?;
        }
        fresh.sync_all()?;
        self.barrier()?;
        renameat(&dir, temporary.as_str(), &dir, name)?;
        fresh.sync_all()?;
        self.barrier()?;
        drop(old);
        Ok(())
    }

    /// Temporary names; the last one is for the file that is then renamed to `name`. After a power cut, both names may have the same
    /// clusters on FAT, and fsck.fat(8) empties the second one in the directory: that must be the temporary one. Its place is known only
    /// after it was made; the other names in the list fill the places before. None ends in `.efi`: a cut can leave the short name alone,
    /// and the boot loader would list it.
    fn temporary_names(&self, dir: &OwnedFd, name: &str) -> Result<Vec<String>> {
        let mut tried = vec![format!("{TEMPORARY_PREFIX}{name}.new")];
        if nix::sys::statfs::fstatfs(dir)?.filesystem_type() != nix::sys::statfs::MSDOS_SUPER_MAGIC {
            return Ok(tried);
        }
        while let Some(last) = tried.last() {
            self.write_new(dir, last, &Content::Bytes(Vec::new()))?;
            let names = names_in_order(dir)?;
            let place = |wanted: &str| names.iter().position(|name| name.eq_ignore_ascii_case(wanted));
            if place(last) > place(name) {
                break;
            }
            if tried.len() > 1000 {
                bail!(
                    "no temporary file comes after '{name}' in its directory; the file system may be damaged. Check it with fsck.fat(8)"
                );
            }
            tried.push(format!("{TEMPORARY_PREFIX}{}-{name}.new", tried.len()));
        }
        Ok(tried)
    }

    fn remove(&self, path: &str) -> Result<()> {
        let (dir, name) = match self.parent(path) {
            Ok(found) => found,
            Err(e) if e.downcast_ref::<Errno>() == Some(&Errno::ENOENT) => return Ok(()),
            Err(e) => return Err(e),
        };
        match unlinkat(&dir, name, UnlinkatFlags::NoRemoveDir) {
            Err(Errno::EISDIR | Errno::EPERM) => match unlinkat(&dir, name, UnlinkatFlags::RemoveDir) {
                Ok(()) | Err(Errno::ENOENT | Errno::ENOTEMPTY) => Ok(()),
                Err(e) => Err(e.into()),
            },
            Ok(()) | Err(Errno::ENOENT) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }

    fn barrier(&self) -> Result<()> {
        syncfs(&self.dir)?;
        match nix::unistd::fsync(&self.dir) {
            // A directory that was opened before a read-only remount can't be synced; then there is nothing to flush.
            Ok(()) | Err(Errno::EROFS) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }
}

/// The names in a directory, except `.` and `..`, in the directory's own order.
fn names_in_order(dir: &OwnedFd) -> nix::Result<Vec<OsString>> {
    let mut dir = Dir::openat(dir, ".", OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())?;
    let names = dir.iter().map(|entry| entry.map(|entry| OsString::from_vec(entry.file_name().to_bytes().to_vec())));
    names.filter(|name| !name.as_ref().is_ok_and(|name| name == "." || name == "..")).collect()
}

/// Whether the error says that a file, or a directory on the way to it, doesn't exist.
fn is_absent(e: &anyhow::Error) -> bool {
    matches!(e.downcast_ref(), Some(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP))
}

/// The path of a name in a directory.
pub fn join(dir: &OsStr, name: &OsStr) -> OsString {
    if dir == "." { name.to_owned() } else { Path::new(dir).join(name).into_os_string() }
}

/// Whether a file is a directory.
pub fn is_dir(stat: &FileStat) -> bool {
    stat.st_mode & nix::libc::S_IFMT == nix::libc::S_IFDIR
}

/// Whether a file is a symbolic link.
pub fn is_link(stat: &FileStat) -> bool {
    stat.st_mode & nix::libc::S_IFMT == nix::libc::S_IFLNK
}

/// Attributes by which IMA and EVM sign a file's content and inode (evmctl(1)); they are wrong on any other file.
const SIGNATURES: [&str; 2] = ["security.ima", "security.evm"];

/// Copies owner, mode and extended attributes (with ACLs and security labels) from `from` to `to`. A file system without them (FAT) is
/// no error.
fn copy_attributes(from: &File, to: &File) -> Result<()> {
    let is_fat = nix::sys::statfs::fstatfs(to)?.filesystem_type() == nix::sys::statfs::MSDOS_SUPER_MAGIC;
    let tolerated = |result: nix::Result<()>| match result {
        Ok(()) | Err(Errno::EOPNOTSUPP) => Ok(()),
        Err(Errno::EPERM) if is_fat => Ok(()),
        Err(e) => Err(e),
    };
    let meta: Metadata = from.metadata()?;
    tolerated(fchown(to, Some(Uid::from_raw(meta.uid())), Some(Gid::from_raw(meta.gid()))))
        .with_context(|| format!("owner {}:{}", meta.uid(), meta.gid()))?;
    tolerated(fchmod(to, Mode::from_bits_truncate(meta.mode() & 0o7777))).with_context(|| format!("mode {:o}", meta.mode()))?;
    if is_fat {
        // The attributes that it shows are labels that a security module gives all of its files.
        return Ok(());
    }
    use xattr::FileExt as _;
    for name in from.list_xattr().into_iter().flatten().filter(|name| !SIGNATURES.iter().any(|signature| name == signature)) {
        if let Some(value) = from.get_xattr(&name)? {
            to.set_xattr(&name, &value).with_context(|| format!("extended attribute {}", name.to_string_lossy()))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::devices::scratch::Scratch;

    fn bytes(text: &str) -> Content {
        Content::Bytes(text.into())
    }

    #[test]
    fn writes_reads_lists_and_removes() {
        let tmp = tempfile::tempdir().unwrap();
        let below = Below::open(tmp.path()).unwrap();
        below.apply(&Change::MakeDir("a/b".into())).unwrap();
        below.apply(&Change::Create { path: "a/b/c".into(), content: bytes("one") }).unwrap();
        below.apply(&Change::Create { path: "a/b/c".into(), content: bytes("two!") }).unwrap();
        assert_eq!(below.read("a/b/c").unwrap().unwrap(), b"two!");
        assert_eq!(below.list("a/b").unwrap(), [("c".to_owned(), FileKind::File(4))]);
        below.apply(&Change::Overwrite { path: "a/b/c".into(), bytes: b"six".into() }).unwrap();
        assert_eq!(below.read("a/b/c").unwrap().unwrap(), b"six!");
        assert!(below.apply(&Change::Overwrite { path: "a/b/c".into(), bytes: b"longer".into() }).is_err());
        below.apply(&Change::Remove("a/b".into())).unwrap();
        assert!(below.read("a/b/c").unwrap().is_some(), "a directory that isn't empty stays");
        below.apply(&Change::Remove("a/b/c".into())).unwrap();
        below.apply(&Change::Remove("a/b/c".into())).unwrap();
        below.apply(&Change::Remove("a/b".into())).unwrap();
        below.apply(&Change::Remove("a/b/c".into())).unwrap();
        assert!(below.list("a").unwrap().is_empty());
        below.apply(&Change::Barrier).unwrap();
    }

    #[test]
    fn replace_keeps_mode_and_leaves_no_temporary_file() {
        let tmp = tempfile::tempdir().unwrap();
        std::fs::write(tmp.path().join("fstab"), "old").unwrap();
        std::fs::set_permissions(tmp.path().join("fstab"), std::fs::Permissions::from_mode(0o640)).unwrap();
        let below = Below::open(tmp.path()).unwrap();
        below.apply(&Change::Replace { path: "fstab".into(), content: bytes("new"), like: None }).unwrap();
        assert_eq!(std::fs::metadata(tmp.path().join("fstab")).unwrap().permissions().mode() & 0o7777, 0o640);
        assert_eq!(below.list(".").unwrap(), [("fstab".to_owned(), FileKind::File(3))]);
    }

    #[test]
    fn replace_keeps_attributes_except_those_of_the_content() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let tmp = tempfile::tempdir().unwrap();
        let path = tmp.path().join("fstab");
        std::fs::write(&path, "old").unwrap();
        std::os::unix::fs::chown(&path, Some(5), Some(6)).unwrap();
        for name in ["security.ima", "security.evm", "security.other", "trusted.one", "user.one"] {
            xattr::set(&path, name, name.as_bytes()).unwrap();
        }
        Below::open(tmp.path())
            .unwrap()
            .apply(&Change::Replace { path: "fstab".into(), content: bytes("new"), like: None })
            .unwrap();
        let meta = std::fs::metadata(&path).unwrap();
        assert_eq!((meta.uid(), meta.gid()), (5, 6));
        let mut names: Vec<_> = xattr::list(&path).unwrap().collect();
        names.sort();
        // The machine's kernel may give labels by itself.
        names.retain(|name| name != "security.selinux");
        assert_eq!(names, ["security.other", "trusted.one", "user.one"]);
    }

    /// dualroot-entries.service does this as root without capabilities.
    #[test]
    fn replace_without_capabilities_keeps_the_owner_or_fails() {
        const NAME: &str = "write::below::tests::replace_without_capabilities_keeps_the_owner_or_fails";
        const VARIABLE: &str = "DUALROOT_TEST_WITHOUT_CAPABILITIES";
        if let Some(dir) = std::env::var_os(VARIABLE) {
            let below = Below::open(Path::new(&dir)).unwrap();
            let replace = |path: &str| below.apply(&Change::Replace { path: path.into(), content: bytes("new"), like: None });
            replace("own").unwrap();
            let error = format!("{:#}", replace("of-a-group").unwrap_err());
            assert!(error.contains("owner 0:4: EPERM"), "{error}");
            return;
        }
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let tmp = tempfile::tempdir().unwrap();
        for (name, group) in [("own", 0), ("of-a-group", 4)] {
            std::fs::write(tmp.path().join(name), "old").unwrap();
            std::os::unix::fs::chown(tmp.path().join(name), Some(0), Some(group)).unwrap();
        }
        let mut command = crate::base::program::command("setpriv").unwrap();
        command.args(["--bounding-set=-all", "--inh-caps=-all"]).arg(std::env::current_exe().unwrap());
        let done = command.args(["--exact", NAME]).env(VARIABLE, tmp.path()).output().unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stdout));
        let read = |name: &str| std::fs::read_to_string(tmp.path().join(name)).unwrap();
        assert_eq!((read("own").as_str(), read("of-a-group").as_str()), ("new", "old"));
    }

    #[test]
    fn f20_a_write_that_the_medium_lost_is_noticed() {
        let Some(disk) = Scratch::ext4(&[]).map(|disk| disk.mount("rw")) else { return };
        let cached = Below::open(&disk.place()).unwrap();
        let medium = Below::open(&disk.place()).unwrap().from_medium();
        let (new, old) = ([b'n'; 8192], [b'o'; 8192]);
        cached.apply(&Change::Create { path: "linux".into(), content: Content::Bytes(new.to_vec()) }).unwrap();
        cached.apply(&Change::Barrier).unwrap();
        // As if the write had failed: the medium holds other bytes.
        let on_medium = std::fs::read(disk.image()).unwrap();
        let at = on_medium.windows(new.len()).position(|part| part == new).unwrap();
        let image = File::options().write(true).open(disk.image()).unwrap();
        image.write_all_at(&old, at as u64).unwrap();
        assert_eq!(cached.hash("linux").unwrap(), Some(blake3::hash(&new)), "the page cache has the new bytes");
        assert_eq!(medium.hash("linux").unwrap(), Some(blake3::hash(&old)));
        assert_eq!(medium.sub("lost+found".as_ref()).unwrap().map(|below| below.from_medium), Some(true));
    }

    /// Each change on a file system of its own: to flush one would flush the others, too.
    #[test]
    fn f18_a_flushed_change_outlives_a_cut() {
        let [new, old] = [b'n', b'o'].map(|byte| vec![byte; 70_000]);
        let content = Content::Bytes(new.clone());
        type Apply<'a> = &'a dyn Fn(&Below) -> Result<()>;
        let changes: [Apply<'_>; 4] = [
            &|below| {
                below.apply(&Change::Create { path: "linux".into(), content: content.clone() })?;
                below.apply(&Change::Barrier)
            },
            &|below| below.apply(&Change::Overwrite { path: "linux".into(), bytes: new.clone() }),
            &|below| below.apply(&Change::Replace { path: "linux".into(), content: content.clone(), like: None }),
            &|below| below.publish("linux", new.clone()),
        ];
        for (number, change) in changes.iter().enumerate() {
            let Some(disk) = Scratch::ext4(&[]).map(|disk| disk.mount("rw")) else { return };
            let below = Below::open(&disk.place()).unwrap();
            below.apply(&Change::Create { path: "linux".into(), content: Content::Bytes(old.clone()) }).unwrap();
            below.apply(&Change::Barrier).unwrap();
            change(&below).unwrap();
            let after = Below::open(&disk.after_a_cut().place()).unwrap();
            assert_eq!(after.hash("linux").unwrap(), Some(blake3::hash(&new)), "change {number}");
        }
    }

    #[test]
    fn f18_a_new_content_is_on_the_medium_before_it_gets_its_name() {
        let Some(disk) = Scratch::ext4(&[]).map(|disk| disk.mount("rw")) else { return };
        let below = Below::open(&disk.place()).unwrap();
        below.apply(&Change::MakeDir("linux".into())).unwrap();
        let content = vec![b'n'; 70_000];
        let replace = Change::Replace { path: "linux".into(), content: Content::Bytes(content.clone()), like: None };
        // A directory doesn't give way to a file: the rename fails.
        assert_eq!(below.apply(&replace).unwrap_err().downcast_ref(), Some(&Errno::EISDIR));
        let after = Below::open(&disk.after_a_cut().place()).unwrap();
        assert_eq!(after.hash(".dualroot-linux.new").unwrap(), Some(blake3::hash(&content)));
    }

    #[test]
    fn f20_a_barrier_that_fails_is_an_error() {
        // procfs flushes its file system, and none of its directories.
        let error = Below::open(Path::new("/proc")).unwrap().apply(&Change::Barrier).unwrap_err();
        assert_eq!(error.downcast_ref(), Some(&Errno::EINVAL), "{error:#}");
    }

    #[test]
    fn temporary_names_are_known() {
        for name in [".dualroot-linux.new", ".DUALROOT-LINUX.NEW", "DUALRO~1", "dualro~2.new", "FSCK0000.REC", "fsck0012.003"] {
            assert!(is_temporary(name), "{name}");
        }
        for name in [
            "linux",
            "dualroot",
            "dualroot-x",
            ".dualroo",
            "fsck",
            "fsck.fat",
            "fsck000.rec",
            "fsck0000.re",
            "fsck0000.txt",
            "fsck0000.0000",
            "fsckabcd.rec",
            "fsckabcd.000",
            "FSCK00000.REC",
        ] {
            assert!(!is_temporary(name), "{name}");
        }
    }

    #[test]
    fn a_handle_is_of_a_directory_and_stays_in_this_process() {
        use nix::fcntl::{FcntlArg, FdFlag, fcntl};
        let tmp = tempfile::tempdir().unwrap();
        std::fs::write(tmp.path().join("file"), "").unwrap();
        std::fs::create_dir(tmp.path().join("dir")).unwrap();
        assert!(Below::open(&tmp.path().join("file")).is_err());
        let below = Below::open(tmp.path()).unwrap();
        assert!(below.sub("file".as_ref()).unwrap().is_none() && below.sub("absent".as_ref()).unwrap().is_none());
        assert!(below.file("absent").unwrap().is_none() && below.file("file/below").unwrap().is_none());
        let (dir, file) = (below.sub("dir".as_ref()).unwrap().unwrap(), below.file("file").unwrap().unwrap());
        for fd in [below.fd(), dir.fd(), file.as_fd()] {
            let flags = FdFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFD).unwrap());
            assert!(flags.contains(FdFlag::FD_CLOEXEC), "a program that is started would get it");
        }
        assert_eq!(below.device().unwrap(), std::fs::metadata(tmp.path()).unwrap().dev());
        assert_eq!(std::fs::canonicalize(dir.proc_path()).unwrap(), tmp.path().join("dir").canonicalize().unwrap());
    }

    #[test]
    fn f19_free_bytes_and_clusters_are_those_of_the_file_system() {
        let Some(disk) = Scratch::ext4(&["-b2048"]).map(|disk| disk.mount("rw")) else { return };
        let below = Below::open(&disk.place()).unwrap();
        let (before, cluster) = below.free().unwrap();
        assert!(cluster == 2048 && (4 << 20..8 << 20).contains(&before), "{before} {cluster}");
        below.apply(&Change::Create { path: "linux".into(), content: Content::Bytes(vec![1; 1 << 20]) }).unwrap();
        below.apply(&Change::Barrier).unwrap();
        assert_eq!(before - below.free().unwrap().0, 1 << 20);
    }

    #[test]
    fn f26_neither_large_files_nor_pipes_are_waited_for() {
        let tmp = tempfile::tempdir().unwrap();
        let below = Below::open(tmp.path()).unwrap();
        let file = File::create(tmp.path().join("file")).unwrap();
        file.set_len(4 << 20).unwrap();
        assert_eq!(below.read("file").unwrap().unwrap().len(), 4 << 20);
        file.set_len((4 << 20) + 1).unwrap();
        assert!(below.read("file").is_err());
        nix::unistd::mkfifo(&tmp.path().join("pipe"), Mode::S_IRWXU).unwrap();
        assert_eq!(below.read("pipe").unwrap().unwrap(), b"");
        assert_eq!(below.list(".").unwrap().last(), Some(&("pipe".to_owned(), FileKind::Other)));
    }

    #[test]
    fn new_files_and_private_directories_are_closed_to_others() {
        let tmp = tempfile::tempdir().unwrap();
        let below = Below::open(tmp.path()).unwrap();
        let mode = |name: &str| std::fs::metadata(tmp.path().join(name)).unwrap().permissions().mode() & 0o7777;
        below.make_private("dir".as_ref()).unwrap();
        below.apply(&Change::Create { path: "file".into(), content: bytes("secret") }).unwrap();
        assert_eq!((mode("dir"), mode("file")), (0o700, 0o600));
        below.publish("everybody", b"public".into()).unwrap();
        assert_eq!(mode("everybody"), 0o644);
    }

    /// Somebody else makes the name while it is written: another name of a file that must not change.
    #[test]
    fn f26_a_file_that_somebody_else_makes_meanwhile_is_not_written_to() {
        let tmp = tempfile::tempdir().unwrap();
        let (victim, name) = (tmp.path().join("victim"), tmp.path().join("linux"));
        std::fs::write(&victim, "kept").unwrap();
        let below = Below::open(tmp.path()).unwrap();
        let done = std::sync::atomic::AtomicBool::new(false);
        let relaxed = std::sync::atomic::Ordering::Relaxed;
        std::thread::scope(|threads| {
            threads.spawn(|| {
                while !done.load(relaxed) {
                    let _ = std::fs::hard_link(&victim, &name);
                }
            });
            // Until it has happened once that the name was there between its removal and its creation.
            let met = loop {
                let result = below.apply(&Change::Create { path: "linux".into(), content: bytes("bad") });
                if std::fs::read(&victim).unwrap() != b"kept" || result.is_err() {
                    break result;
                }
            };
            done.store(true, relaxed);
            assert_eq!(met.unwrap_err().downcast_ref(), Some(&Errno::EEXIST));
        });
        assert_eq!(std::fs::read(&victim).unwrap(), b"kept");
    }

    #[test]
    fn f26_no_link_is_followed_inside_either() {
        let tmp = tempfile::tempdir().unwrap();
        std::fs::create_dir(tmp.path().join("a")).unwrap();
        std::fs::write(tmp.path().join("a/file"), "kept").unwrap();
        std::os::unix::fs::symlink("a", tmp.path().join("dir")).unwrap();
        std::os::unix::fs::symlink("a/file", tmp.path().join("link")).unwrap();
        let below = Below::open(tmp.path()).unwrap();
        for path in ["link", "dir/file"] {
            assert!(below.read(path).is_err(), "{path}");
            assert!(below.apply(&Change::Overwrite { path: path.into(), bytes: b"bad".into() }).is_err(), "{path}");
        }
        assert!(below.apply(&Change::Create { path: "dir/new".into(), content: bytes("bad") }).is_err());
        assert!(below.apply(&Change::Remove("dir/file".into())).is_err());
        assert!(below.names("dir".as_ref()).is_err());
        assert!(below.stat("dir/file".as_ref()).unwrap().is_none());
        assert_eq!(below.list("a").unwrap(), [("file".to_owned(), FileKind::File(4))]);
        assert_eq!(std::fs::read(tmp.path().join("a/file")).unwrap(), b"kept");
    }

    #[test]
    fn f26_no_path_leads_out_of_the_directory() {
        let tmp = tempfile::tempdir().unwrap();
        let outside = tempfile::tempdir().unwrap();
        std::fs::write(outside.path().join("file"), "kept").unwrap();
        std::os::unix::fs::symlink(outside.path(), tmp.path().join("link")).unwrap();
        std::os::unix::fs::symlink(outside.path().join("file"), tmp.path().join("filelink")).unwrap();
        std::fs::create_dir(tmp.path().join("a")).unwrap();
        let below = Below::open(tmp.path()).unwrap();
        for path in ["../x", "/etc/x", "link/file", "a/../../x", "..", "."] {
            assert!(below.apply(&Change::Create { path: path.into(), content: bytes("bad") }).is_err(), "{path}");
            assert!(below.apply(&Change::Remove(path.into())).is_err(), "{path}");
        }
        assert!(below.apply(&Change::Overwrite { path: "filelink".into(), bytes: b"bad".into() }).is_err());
        assert!(below.read("filelink").is_err());
        assert_eq!(std::fs::read(outside.path().join("file")).unwrap(), b"kept");
    }

    #[test]
    fn a_source_that_changes_while_it_is_copied_is_an_error() {
        let tmp = tempfile::tempdir().unwrap();
        std::fs::write(tmp.path().join("source"), "now this").unwrap();
        let below = Below::open(tmp.path()).unwrap();
        let content = Content::File { source: tmp.path().join("source"), hash: blake3::hash(b"planned"), size: 7 };
        let error = below.apply(&Change::Create { path: "copy".into(), content }).unwrap_err();
        assert!(format!("{error:#}").contains("changed while it was copied"), "{error:#}");
    }
}
