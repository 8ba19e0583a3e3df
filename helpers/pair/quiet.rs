//! Waiting until the booted disk is quiet: no package manager runs, and the boot files have stopped changing.
//!
//! Path units only hint that something happened. This reads the files themselves, and a sync reads them again when it ends.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

use crate::base::root::Root;
use crate::boot::files::{Class, classify};

/// Files that package managers lock with fcntl(2) while they work.
const LOCKED: [&str; 4] =
    ["/var/lib/dpkg/lock", "/var/lib/dpkg/lock-frontend", "/var/lib/rpm/.rpm.lock", "/usr/lib/sysimage/rpm/.rpm.lock"];
/// Files that exist while a package manager works.
const PRESENT: [&str; 1] = ["/var/lib/pacman/db.lck"];
/// Files of the root that change when a package is installed, or when the boot is configured.
const STATE: [&str; 5] = ["/var/lib/dpkg/status", "/etc/fstab", "/etc/crypttab", "/etc/kernel/cmdline", "/usr/lib/modules"];
/// The limit for the wait; a source that is busy for longer is reported as a failure.
const PATIENCE: Duration = Duration::from_secs(20 * 60);

/// A hash of files' names, sizes and times. If two fingerprints are equal, nothing has changed in between, as far as those show.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Fingerprint(blake3::Hash);

/// The fingerprint of all files below the boot partitions' directories, and of [`STATE`].
///
/// # Errors
/// A directory that can't be read.
pub fn fingerprint(boot: &[PathBuf]) -> Result<Fingerprint> {
    fingerprint_in(&Root::new("/"), boot)
}

fn fingerprint_in(root: &Root, boot: &[PathBuf]) -> Result<Fingerprint> {
    let mut hasher = blake3::Hasher::new();
    for dir in boot {
        add_tree(&mut hasher, dir, dir, 0).with_context(|| format!("{} can't be read", dir.display()))?;
    }
    for path in STATE {
        add(&mut hasher, &root.path(path))?;
    }
    Ok(Fingerprint(hasher.finalize()))
}

/// Whether nothing has changed and no package manager runs, which may have written half of its files while the fingerprint is still the same.
///
/// # Errors
/// As [`fingerprint`].
pub fn unchanged_since(boot: &[PathBuf], before: &Fingerprint) -> Result<bool> {
    unchanged_since_in(&Root::new("/"), boot, before)
}

fn unchanged_since_in(root: &Root, boot: &[PathBuf], before: &Fingerprint) -> Result<bool> {
    Ok(fingerprint_in(root, boot)? == *before && package_manager_lock_in(root).is_none())
}

fn add(hasher: &mut blake3::Hasher, path: &Path) -> std::io::Result<()> {
    let meta = match fs::symlink_metadata(path) {
        Ok(meta) => meta,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(e),
    };
    hasher.update(path.as_os_str().as_encoded_bytes());
    // No access time, no change time and no inode number: the first changes by reading, and FAT has none of the others. Its inode numbers
    // change whenever the kernel drops the file from its cache, as it does while a large tree is copied.
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
            // Only files count: the directory of the lineage record is no change.
            if depth < 16 {
                add_tree(hasher, top, &path, depth + 1)?;
            }
        } else if !is_local(top, &path) {
            add(hasher, &path)?;
        }
    }
    Ok(())
}

/// Whether a file stays on its disk. The sync itself writes the lineage record, which is no reason to copy again.
fn is_local(top: &Path, path: &Path) -> bool {
    path.strip_prefix(top).ok().and_then(Path::to_str).is_some_and(|path| classify(path) == Class::Local)
}

/// The lock of a package manager that runs now, if any.
pub fn package_manager_lock() -> Option<&'static str> {
    package_manager_lock_in(&Root::new("/"))
}

fn package_manager_lock_in(root: &Root) -> Option<&'static str> {
    LOCKED.into_iter().find(|path| is_locked(&root.path(path))).or(PRESENT.into_iter().find(|path| root.path(path).exists()))
}

fn is_locked(path: &Path) -> bool {
    let Ok(file) = File::open(path) else { return false };
    let mut lock = libc::flock { l_type: short(libc::F_WRLCK), l_whence: short(libc::SEEK_SET), l_start: 0, l_len: 0, l_pid: 0 };
    fcntl(&file, FcntlArg::F_GETLK(&mut lock)).is_ok() && lock.l_type != short(libc::F_UNLCK)
}

/// Converts a constant of fcntl(2), which is an int, to the type of its structure's field.
fn short(value: libc::c_int) -> libc::c_short {
    libc::c_short::try_from(value).unwrap_or_default()
}

/// Waits until nothing has changed for `settle` and no package manager runs, and returns the fingerprint. Calls `tell` once with the reason
/// for the wait.
///
/// # Errors
/// A source that isn't quiet after 20 minutes.
pub fn wait(boot: &[PathBuf], settle: Duration, tell: impl FnMut(&str)) -> Result<Fingerprint> {
    wait_for(|| Ok((fingerprint(boot)?, package_manager_lock())), settle, PATIENCE, tell)
}

/// As [`wait`], with a probe that returns the fingerprint, and the lock of a package manager that runs.
fn wait_for(
    mut probe: impl FnMut() -> Result<(Fingerprint, Option<&'static str>)>,
    settle: Duration,
    patience: Duration,
    mut tell: impl FnMut(&str),
) -> Result<Fingerprint> {
    let begun = Instant::now();
    let mut told = false;
    let (mut before, _) = probe()?;
    loop {
        thread::sleep(settle);
        let (now, busy) = probe()?;
        if now == before && busy.is_none() {
            return Ok(now);
        }
        let reason = busy.map_or("the boot files are being changed".to_owned(), |lock| format!("a package manager holds {lock}"));
        if begun.elapsed() > patience {
            bail!("the booted disk was busy for 20 minutes ({reason}); the spare was left as it is; the next sync tries again");
        }
        if !std::mem::replace(&mut told, true) {
            tell(&format!("waiting: {reason}"));
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
    fn f11_fingerprints_show_changes() {
        let tmp = tempfile::tempdir().unwrap();
        let dirs = [tmp.path().to_owned()];
        fs::create_dir(tmp.path().join("sub")).unwrap();
        fs::write(tmp.path().join("sub/initrd"), "one").unwrap();
        let first = fingerprint(&dirs).unwrap();
        assert_eq!(fingerprint(&dirs).unwrap(), first);
        fs::write(tmp.path().join("sub/new"), "").unwrap();
        assert_ne!(fingerprint(&dirs).unwrap(), first);
        assert!(fingerprint(&[tmp.path().join("absent")]).is_err());
    }

    #[test]
    fn f10_fingerprints_ignore_the_lineage_and_inode_numbers() {
        let tmp = tempfile::tempdir().unwrap();
        let dirs = [tmp.path().to_owned()];
        let path = |name: &str| tmp.path().join(name);
        fs::create_dir(path("loader")).unwrap();
        fs::write(path("loader/linux"), "one").unwrap();
        let first = fingerprint(&dirs).unwrap();
        fs::create_dir_all(path("EFI/dualroot")).unwrap();
        fs::write(path(crate::boot::files::LINEAGE), "boot=none").unwrap();
        assert_eq!(fingerprint(&dirs).unwrap(), first, "the sync itself writes the lineage");
        // The same file under another inode number, as FAT's are after a while.
        let time = fs::metadata(path("loader/linux")).unwrap().modified().unwrap();
        fs::copy(path("loader/linux"), path("loader/again")).unwrap();
        fs::rename(path("loader/again"), path("loader/linux")).unwrap();
        File::open(path("loader/linux")).unwrap().set_modified(time).unwrap();
        assert_eq!(fingerprint(&dirs).unwrap(), first);
    }

    /// A process that has locked a file, until it is dropped.
    struct Locked(std::process::Child);

    impl Locked {
        fn new(path: &Path) -> Self {
            let script = "import fcntl, sys; f = open(sys.argv[1], 'r+'); fcntl.lockf(f, fcntl.LOCK_EX); \
                          print('locked', flush=True); sys.stdin.read()";
            let mut child = std::process::Command::new("python3")
                .args(["-c", script, path.to_str().unwrap()])
                .stdin(std::process::Stdio::piped())
                .stdout(std::process::Stdio::piped())
                .spawn()
                .unwrap();
            let mut line = String::new();
            std::io::BufRead::read_line(&mut std::io::BufReader::new(child.stdout.take().unwrap()), &mut line).unwrap();
            Self(child)
        }
    }

    impl Drop for Locked {
        fn drop(&mut self) {
            self.0.kill().unwrap();
            self.0.wait().unwrap();
        }
    }

    #[test]
    fn a_lock_of_another_process_is_seen() {
        let tmp = tempfile::NamedTempFile::new().unwrap();
        assert!(!is_locked(tmp.path()));
        let locked = Locked::new(tmp.path());
        assert!(is_locked(tmp.path()));
        drop(locked);
        assert!(!is_locked(tmp.path()));
    }

    /// A root with the lock files of package managers.
    fn root_with_package_managers() -> (tempfile::TempDir, Root) {
        let tmp = tempfile::tempdir().unwrap();
        for path in LOCKED {
            let path = tmp.path().join(&path[1..]);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "").unwrap();
        }
        fs::create_dir_all(tmp.path().join("var/lib/pacman")).unwrap();
        let root = Root::new(tmp.path());
        (tmp, root)
    }

    #[test]
    fn f09_a_running_package_manager_counts_as_a_change() {
        let (_tmp, root) = root_with_package_managers();
        let before = fingerprint_in(&root, &[]).unwrap();
        assert!(unchanged_since_in(&root, &[], &before).unwrap(), "files that nobody has locked");
        for path in LOCKED {
            let _locked = Locked::new(&root.path(path));
            assert_eq!(package_manager_lock_in(&root), Some(path));
            assert!(!unchanged_since_in(&root, &[], &before).unwrap(), "{path}");
        }
        fs::write(root.path(PRESENT[0]), "").unwrap();
        assert!(!unchanged_since_in(&root, &[], &before).unwrap(), "pacman's");
        fs::remove_file(root.path(PRESENT[0])).unwrap();
        assert!(unchanged_since_in(&root, &[], &before).unwrap());
        fs::write(root.path("/var/lib/dpkg/status"), "Package: linux\n").unwrap();
        assert!(!unchanged_since_in(&root, &[], &before).unwrap(), "it has installed something");
    }

    #[test]
    fn f09_a_change_prolongs_the_wait() {
        let of = |text: &str| Fingerprint(blake3::hash(text.as_bytes()));
        let wait = |probes: &[(&str, Option<&'static str>)], patience| {
            let mut probes = probes.iter();
            let mut told = Vec::new();
            let mut probe = || probes.next().map(|(text, lock)| (of(text), *lock)).context("it should be quiet by now");
            let found = wait_for(&mut probe, Duration::ZERO, patience, |text| told.push(text.to_owned()));
            (found, told, probes.count())
        };
        for (probes, expected) in [
            (&[("a", None), ("a", None)][..], &[][..]),
            (&[("a", None), ("b", None), ("c", None), ("c", None)], &["waiting: the boot files are being changed"]),
            (&[("c", None), ("c", Some("LOCK")), ("c", None)], &["waiting: a package manager holds LOCK"]),
            (&[("a", None), ("b", Some("LOCK")), ("c", None), ("c", None)], &["waiting: a package manager holds LOCK"]),
        ] {
            let (found, told, left) = wait(probes, PATIENCE);
            assert_eq!((found.unwrap(), left), (of(probes.last().unwrap().0), 0), "{probes:?}");
            assert_eq!(told, expected, "{probes:?}");
        }
        let (found, told, _) = wait(&[("a", None), ("a", Some("LOCK")), ("a", None)], Duration::ZERO);
        let error = found.unwrap_err().to_string();
        assert!(error.contains("was busy for 20 minutes") && error.contains("a package manager holds LOCK"), "{error}");
        assert!(told.is_empty());
    }
}
