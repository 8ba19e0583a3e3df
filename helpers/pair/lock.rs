//! The lock that keeps syncs, and programs that read spares, from running at the same time (failure mode 23).

use std::fs::{self, File};
use std::path::Path;

use anyhow::{Context, Result};

use crate::base::refusal::refused;
use crate::base::root::Root;

const LOCK: &str = "/run/dualroot/lock";

/// Takes the lock, which the kernel releases when the process ends. Without `wait`, a lock that is held is a refusal.
///
/// # Errors
/// [`crate::base::refusal::Refused`] if it is held; a lock file that can't be made.
pub fn take(wait: bool) -> Result<File> {
    take_at(Path::new(LOCK), wait)
}

fn take_at(path: &Path, wait: bool) -> Result<File> {
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir).with_context(|| format!("{} can't be made", dir.display()))?;
    }
    let file = File::create(path).with_context(|| format!("{} can't be made", path.display()))?;
    if wait {
        file.lock().with_context(|| path.display().to_string())?;
        return Ok(file);
    }
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(fs::TryLockError::WouldBlock) => {
            Err(refused("another sync is running, or a verification; nothing was done; run this again when that has ended"))
        }
        Err(fs::TryLockError::Error(e)) => Err(e).with_context(|| path.display().to_string()),
    }
}

/// Whether a process holds the lock, by the kernel's list of locks. Trying to take it would disturb a sync that begins.
pub fn is_held(root: &Root) -> bool {
    use std::os::unix::fs::MetadataExt;
    let Ok(meta) = fs::metadata(root.path(LOCK)) else { return false };
    let (major, minor) = (nix::sys::stat::major(meta.dev()), nix::sys::stat::minor(meta.dev()));
    let id = format!("{major:02x}:{minor:02x}:{}", meta.ino());
    let text = root.read("/proc/locks").unwrap_or_default();
    // "1: FLOCK  ADVISORY  WRITE 1234 00:19:567 0 EOF"; a process that waits has "->" after the number.
    String::from_utf8_lossy(&text).lines().any(|line| {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        words.get(1) == Some(&"FLOCK") && words.get(5) == Some(&id.as_str())
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;
    use crate::base::refusal::Refused;

    #[test]
    fn f23_one_process_at_a_time_holds_the_lock() {
        let tmp = tempfile::tempdir().unwrap();
        let path = tmp.path().join("run/lock");
        let first = take_at(&path, false).unwrap();
        assert!(take_at(&path, false).unwrap_err().is::<Refused>());
        std::thread::scope(|threads| {
            let waits = threads.spawn(|| take_at(&path, true).is_ok());
            drop(first);
            assert!(waits.join().unwrap());
        });
        take_at(&path, false).unwrap();
    }

    #[test]
    fn every_process_sees_that_the_lock_is_held() {
        let tmp = tempfile::tempdir().unwrap();
        let root = Root::new(tmp.path());
        assert!(!is_held(&root), "there is no lock file");
        fs::create_dir_all(tmp.path().join("run/dualroot")).unwrap();
        fs::create_dir(tmp.path().join("proc")).unwrap();
        let file = File::create(tmp.path().join("run/dualroot/lock")).unwrap();
        let held = || {
            fs::write(tmp.path().join("proc/locks"), fs::read("/proc/locks").unwrap()).unwrap();
            is_held(&root)
        };
        assert!(!held(), "nobody has taken {}", file.metadata().unwrap().ino());
        file.lock().unwrap();
        assert!(held());
        file.unlock().unwrap();
        assert!(!held());
    }
}
