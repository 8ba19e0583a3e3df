//! LUKS containers of spares: cryptsetup(8) opens them, as a service, with a key that lies on every disk's root.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::{Context, Result};

use crate::base::program;
use crate::base::refusal::refused;
use crate::base::types::{PartUuid, UnitName};
use crate::names::crypttab::KEY;

/// It has no fewer bytes than this: it is as random as it is long, and no more is done to make guesses slow.
pub const LEAST: u64 = 64;

/// Opens the container on a partition.
///
/// # Errors
/// A service that fails: what to look at.
pub fn open(part: &PartUuid) -> Result<()> {
    let unit = UnitName::luks(part)?;
    let run = |verb: &str| program::output("systemctl", [verb, unit.as_str()].map(Into::into));
    let mut started = run("start");
    // Closed by somebody else, it is still open to systemd.
    if started.is_ok() && !Path::new(&part.mapping()).exists() {
        started = run("restart");
    }
    started.map(drop).with_context(|| {
        format!(
            "the LUKS container on {part} can't be opened by {KEY}; see 'systemctl status {unit}'; if files on it were open when the disk \
             was pulled, what they are on is still in use ('dmsetup info')"
        )
    })
}

/// Closes it.
///
/// # Errors
/// A container that is in use.
pub fn close(part: &PartUuid) -> Result<()> {
    program::output("systemctl", ["stop", UnitName::luks(part)?.as_str()].map(Into::into)).map(drop)
}

/// Whether a key file is there, which only root can read.
///
/// # Errors
/// One that others can read, or that is too short: a refusal.
pub fn has_key() -> Result<bool> {
    match fs::symlink_metadata(KEY) {
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(false),
        Err(e) => Err(refused(format!("{KEY} can't be looked at: {e}"))),
        Ok(meta) if meta.len() < LEAST => {
            Err(refused(format!("{KEY} has {} bytes, fewer than {LEAST}; see dualroot(7)", meta.len())))
        }
        Ok(meta) if meta.is_file() && meta.uid() == 0 && meta.mode() & 0o077 == 0 => Ok(true),
        Ok(_) => Err(refused(format!("{KEY} can be read by others than root; 'chown root {KEY}' and 'chmod 600 {KEY}'"))),
    }
}
