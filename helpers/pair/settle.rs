//! Waiting until the booted disk is quiet: no package manager at work, and boot files that have stopped changing.
//!
//! Path units only hint that something happened. What is looked at here is the state itself, and it is looked at again after a sync.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

use crate::boot::files::{Class, classify};

/// Files that package managers lock with fcntl(2) while they work.
const LOCKED: [&str; 4] =
    ["/var/lib/dpkg/lock", "/var/lib/dpkg/lock-frontend", "/var/lib/rpm/.rpm.lock", "/usr/lib/sysimage/rpm/.rpm.lock"];
/// Files that are there while a package manager works.
const PRESENT: [&str; 1] = ["/var/lib/pacman/db.lck"];
/// What else of a root tells that something is being changed.
const STATE: [&str; 5] = ["/var/lib/dpkg/status", "/etc/fstab", "/etc/crypttab", "/etc/kernel/cmdline", "/usr/lib/modules"];
/// A source that is busy for longer is reported, so that someone looks at it.
const PATIENCE: Duration = Duration::from_secs(20 * 60);

/// What files' names, sizes and times say; equal prints mean that nothing was changed in between, as far as those can tell.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Print(blake3::Hash);

/// Prints everything below the boot partitions' directories, and the state files.
///
/// # Errors
/// A directory that can't be read.
pub fn print(boot: &[PathBuf]) -> Result<Print> {
    let mut hasher = blake3::Hasher::new();
    for dir in boot {
        add_tree(&mut hasher, dir, dir, 0).with_context(|| format!("{} can't be read", dir.display()))?;
    }
    for path in STATE {
        add(&mut hasher, Path::new(path))?;
    }
    Ok(Print(hasher.finalize()))
}

/// Whether it looks as it did, and no package manager is at work: what that has begun may be half there, although nothing that tells of it
/// has changed yet.
///
/// # Errors
/// As [`print`].
pub fn is_as(boot: &[PathBuf], before: &Print) -> Result<bool> {
    Ok(print(boot)? == *before && package_manager().is_none())
}

fn add(hasher: &mut blake3::Hasher, path: &Path) -> std::io::Result<()> {
    let meta = match fs::symlink_metadata(path) {
        Ok(meta) => meta,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(e),
    };
    hasher.update(path.as_os_str().as_encoded_bytes());
    // No access time, no change time and no inode number: the first changes by reading, and FAT makes up the others. The number is
    // another one whenever the kernel has forgotten the file, as it does while a large tree is copied.
    for value in [meta.size(), meta.mtime().cast_unsigned(), meta.mtime_nsec().cast_unsigned()] {
        hasher.update(&value.to_le_bytes());
    }
    Ok(())
}

fn add_tree(hasher: &mut blake3::Hasher, top: &Path, dir: &Path, depth: u8) -> std::io::Result<()> {
    let mut paths = fs::read_dir(dir)?.map(|e| Ok(e?.path())).collect::<std::io::Result<Vec<_>>>()?;
    paths.sort();
    for path in paths {
        if fs::symlink_metadata(&path).is_ok_and(|m| m.is_dir()) {
            // The files in it are what matters: the lineage's own directory is no change.
            if depth < 16 {
                add_tree(hasher, top, &path, depth + 1)?;
            }
        } else if !is_local(top, &path) {
            add(hasher, &path)?;
        }
    }
    Ok(())
}

/// Whether a file is one that stays on its disk. The sync itself writes the lineage, which is no reason to copy again.
fn is_local(top: &Path, path: &Path) -> bool {
    path.strip_prefix(top).ok().and_then(Path::to_str).is_some_and(|path| classify(path) == Class::Local)
}

/// The package manager's lock that is held now, if any.
pub fn package_manager() -> Option<&'static str> {
    LOCKED.into_iter().find(|path| is_locked(Path::new(path))).or(PRESENT.into_iter().find(|path| Path::new(path).exists()))
}

fn is_locked(path: &Path) -> bool {
    let Ok(file) = File::open(path) else { return false };
    let mut lock = libc::flock { l_type: short(libc::F_WRLCK), l_whence: short(libc::SEEK_SET), l_start: 0, l_len: 0, l_pid: 0 };
    fcntl(&file, FcntlArg::F_GETLK(&mut lock)).is_ok() && lock.l_type != short(libc::F_UNLCK)
}

/// The constants of fcntl(2) are ints, its structure has shorts.
fn short(value: libc::c_int) -> libc::c_short {
    libc::c_short::try_from(value).unwrap_or_default()
}

/// Waits until nothing has changed for `settle` and no package manager is at work, and returns how it looks then.
/// `tell` is told once what is waited for.
///
/// # Errors
/// A source that doesn't come to rest in 20 minutes.
pub fn wait(boot: &[PathBuf], settle: Duration, mut tell: impl FnMut(&str)) -> Result<Print> {
    let begun = Instant::now();
    let mut told = false;
    let mut before = print(boot)?;
    loop {
        thread::sleep(settle);
        let now = print(boot)?;
        let busy = package_manager();
        if now == before && busy.is_none() {
            return Ok(now);
        }
        let what = busy.map_or("the boot files are being changed".to_owned(), |lock| format!("a package manager holds {lock}"));
        if begun.elapsed() > PATIENCE {
            bail!("the booted disk was not quiet for 20 minutes ({what}); the spare was left as it is");
        }
        if !std::mem::replace(&mut told, true) {
            tell(&format!("waiting: {what}"));
        }
        before = now;
        // A lock may be held with nothing changing: don't spin when settle=0.
        thread::sleep(Duration::from_millis(if busy.is_some() { 500 } else { 0 }));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn f11_prints_tell_changes() {
        let tmp = tempfile::tempdir().unwrap();
        let dirs = [tmp.path().to_owned()];
        fs::create_dir(tmp.path().join("sub")).unwrap();
        fs::write(tmp.path().join("sub/initrd"), "one").unwrap();
        let first = print(&dirs).unwrap();
        assert_eq!(print(&dirs).unwrap(), first);
        fs::write(tmp.path().join("sub/new"), "").unwrap();
        assert_ne!(print(&dirs).unwrap(), first);
        assert!(print(&[tmp.path().join("absent")]).is_err());
    }

    #[test]
    fn f10_prints_do_not_tell_what_is_no_change() {
        let tmp = tempfile::tempdir().unwrap();
        let dirs = [tmp.path().to_owned()];
        let path = |name: &str| tmp.path().join(name);
        fs::create_dir(path("loader")).unwrap();
        fs::write(path("loader/linux"), "one").unwrap();
        let first = print(&dirs).unwrap();
        fs::create_dir_all(path("EFI/dualroot")).unwrap();
        fs::write(path(crate::boot::files::LINEAGE), "boot=none").unwrap();
        assert_eq!(print(&dirs).unwrap(), first, "the lineage is the sync's own");
        // The same file under another inode number, as FAT's are after a while.
        let time = fs::metadata(path("loader/linux")).unwrap().modified().unwrap();
        fs::copy(path("loader/linux"), path("loader/again")).unwrap();
        fs::rename(path("loader/again"), path("loader/linux")).unwrap();
        File::open(path("loader/linux")).unwrap().set_modified(time).unwrap();
        assert_eq!(print(&dirs).unwrap(), first);
    }

    #[test]
    fn a_lock_of_another_process_is_seen() {
        let tmp = tempfile::NamedTempFile::new().unwrap();
        assert!(!is_locked(tmp.path()));
        let script = "import fcntl, sys; f = open(sys.argv[1], 'r+'); fcntl.lockf(f, fcntl.LOCK_EX); print('locked', flush=True); \
                      sys.stdin.read()";
        let mut child = std::process::Command::new("python3")
            .args(["-c", script, tmp.path().to_str().unwrap()])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        std::io::BufRead::read_line(&mut std::io::BufReader::new(child.stdout.take().unwrap()), &mut line).unwrap();
        assert!(is_locked(tmp.path()));
        drop(child.stdin.take());
        child.wait().unwrap();
        assert!(!is_locked(tmp.path()));
    }
}
