//! What each disk of the pair was called when it was last seen.
//!
//! After a failover the other disk is gone, and with it the UUIDs of its file systems; a kernel's entry may still name them. They are
//! kept in a file of the root, which the sync brings to every disk.

use anyhow::{Context, Result};

use crate::ident::DiskIds;
use crate::root::Root;
use crate::state;

/// The file's name in [`state::DIRECTORY`].
pub const NAME: &str = "identifiers.json";

/// The identifiers of all disks: those of the parts that are there as they are now, the others as they were when last seen. Of a
/// disk that isn't in the configuration any more, nothing.
///
/// # Errors
/// A store that can't be read. One that doesn't parse is taken for an empty one: the disks that are there fill it again.
pub fn complete(root: &Root, now: Vec<DiskIds>) -> Result<Vec<DiskIds>> {
    let path = format!("{}/{NAME}", state::DIRECTORY);
    let stored = root.read_opt(&path).with_context(|| format!("{path} can't be read"))?.unwrap_or_default();
    let stored: Vec<DiskIds> = serde_json::from_slice(&stored).unwrap_or_default();
    Ok(merge(now, &stored))
}

fn merge(now: Vec<DiskIds>, stored: &[DiskIds]) -> Vec<DiskIds> {
    let complete = |mut disk: DiskIds| {
        for old in stored.iter().filter(|s| s.name == disk.name) {
            for (role, part) in &mut disk.parts {
                let absent = part.paths.is_empty();
                if let Some(seen) = old.parts.get(role).filter(|seen| absent && seen.partuuid == part.partuuid) {
                    *part = seen.clone();
                }
            }
        }
        disk
    };
    now.into_iter().map(complete).collect()
}

/// Keeps what is known for a time when a disk is gone.
///
/// # Errors
/// A root that can't be written.
pub fn save(ids: &[DiskIds]) -> Result<()> {
    let mut bytes = serde_json::to_vec_pretty(ids).context("the identifiers can't be written as JSON")?;
    bytes.push(b'\n');
    state::keep(NAME, bytes)
}
