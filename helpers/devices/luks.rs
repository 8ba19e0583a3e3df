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
    match fs::symlink_metadata(KEY) {
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(false),
        Err(e) => Err(refused(format!("{KEY} can't be read: {e}"))),
        Ok(meta) if meta.len() < MIN_KEY_BYTES => Err(refused(format!(
            "{KEY} has {} bytes, and at least {MIN_KEY_BYTES} are needed. Make a new key, see dualroot(7)",
            meta.len()
        ))),
        Ok(meta) if meta.is_file() && meta.uid() == 0 && meta.mode() & 0o077 == 0 => Ok(true),
        Ok(_) => {
            Err(refused(format!("{KEY} must be a file that only root can read. Run 'chown root {KEY}' and 'chmod 600 {KEY}'")))
        }
    }
}
