//! LUKS containers of spares: a service opens them by cryptsetup(8), with a key file on every disk's root.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::{Context, Result};

use crate::base::program;
use crate::base::refusal::refused;
use crate::base::types::{PartUuid, UnitName};
use crate::names::crypttab::KEY;

/// The least size in bytes of the key file: only its length protects it, as guesses aren't slowed down.
pub const MIN_KEY_BYTES: u64 = 64;

/// Opens the container on a partition.
///
/// # Errors
/// The service fails.
pub fn open(part: &PartUuid) -> Result<()> {
    let unit = UnitName::luks(part)?;
    let run = |verb: &str| program::output("systemctl", [verb, unit.as_str()].map(Into::into));
    let mut started = run("start");
    // If somebody else has closed it, the service is still active.
    if started.is_ok() && !Path::new(&part.mapping()).exists() {
        started = run("restart");
    }
    started.map(drop).with_context(|| {
        format!(
            "the LUKS container on {part} can't be opened with {KEY}. See 'systemctl status {unit}'. If the disk was pulled while files on \
             it were open, its old mapping is still in use (see 'dmsetup info'): end the programs that use it"
        )
    })
}

/// Closes the container on a partition.
///
/// # Errors
/// The container is in use.
pub fn close(part: &PartUuid) -> Result<()> {
    program::output("systemctl", ["stop", UnitName::luks(part)?.as_str()].map(Into::into)).map(drop)
}

/// Whether the key file exists.
///
/// # Errors
/// Others than root can read it, it is too short, or it isn't a regular file: a refusal.
pub fn has_key() -> Result<bool> {
    is_key(Path::new(KEY), 0)
}

/// As [`has_key`], of a key file that this user has to own.
fn is_key(path: &Path, owner: u32) -> Result<bool> {
    let shown = path.display();
    match fs::symlink_metadata(path) {
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(false),
        Err(e) => Err(refused(format!("{shown} can't be read: {e}"))),
        Ok(meta) if meta.len() < MIN_KEY_BYTES => Err(refused(format!(
            "{shown} has {} bytes, and at least {MIN_KEY_BYTES} are needed. Make a new key, see dualroot(7)",
            meta.len()
        ))),
        Ok(meta) if meta.is_file() && meta.uid() == owner && meta.mode() & 0o077 == 0 => Ok(true),
        Ok(_) => Err(refused(format!(
            "{shown} must be a file that only root can read. Run 'chown root {shown}' and 'chmod 600 {shown}'"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;
    use crate::base::refusal::Refused;

    #[test]
    fn a_key_that_others_can_read_is_none() {
        let tmp = tempfile::tempdir().unwrap();
        let (path, me) = (tmp.path().join("key"), nix::unistd::geteuid().as_raw());
        let refusal = |path: &Path, owner| {
            let error = is_key(path, owner).unwrap_err();
            assert!(error.is::<Refused>(), "{error:#}");
            error.to_string()
        };
        assert!(!is_key(&path, me).unwrap(), "there is none");
        fs::write(&path, [7; 64]).unwrap();
        for mode in [0o600, 0o400] {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            assert!(is_key(&path, me).unwrap(), "{mode:o}");
        }
        assert!(refusal(&path, me + 1).contains("must be a file that only root can read. Run 'chown root "));
        for mode in [0o640, 0o620, 0o604, 0o602] {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            assert!(refusal(&path, me).contains("must be a file that only root can read"), "{mode:o}");
        }
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        let (link, dir) = (tmp.path().join(format!("{:064}", 0)), tmp.path().join("dir"));
        symlink(&path, tmp.path().join("link")).unwrap();
        symlink(&link, tmp.path().join("long")).unwrap();
        fs::create_dir(&dir).unwrap();
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o700)).unwrap();
        for other in [tmp.path().join("link"), tmp.path().join("long"), dir, path.join("below")] {
            refusal(&other, me);
        }
        fs::write(&path, [7; 63]).unwrap();
        assert!(refusal(&path, me).contains("has 63 bytes, and at least 64 are needed"));
    }
}
