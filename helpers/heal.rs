//! A shared btrfs root after a time without one of its disks.
//!
//! The initrd leaves a record in /run when it had to mount the root degraded. It is kept on the root until the disk is back; then what
//! was written meanwhile is brought to it by dualroot-heal.service (btrfs scrub, then balance).

use std::path::Path;

use anyhow::{Context, Result};

use crate::below::{Below, Change, Content};
use crate::log::Log;
use crate::machine::Machine;
use crate::program;

const NOW: &str = "/run/dualroot/degraded";
const KEPT: &str = "/var/lib/dualroot/degraded";

/// Keeps the record, or starts the healing once no disk is missing any more, and says which.
///
/// # Errors
/// A root that can't be written; systemctl that fails.
pub fn look(machine: &Machine, log: &Log) -> Result<()> {
    if machine.own_roots() {
        return Ok(());
    }
    if let Some(record) = machine.root.read_opt(NOW).with_context(|| format!("{NOW} can't be read"))? {
        let root = Below::open(Path::new("/"))?;
        root.apply(&Change::MakeDir("var/lib/dualroot".into()))?;
        root.apply(&Change::Replace { path: KEPT.trim_start_matches('/').into(), content: Content::Bytes(record), like: None })?;
        log.warning("the shared root is mounted degraded, without one of its disks; what is written now is on one disk only");
    } else if machine.root.exists(KEPT) {
        log.warning(
            "the shared root was mounted degraded and its disk is back: starting dualroot-heal.service (scrub and balance)",
        );
        program::output("systemctl", ["start", "--no-block", "dualroot-heal.service"].map(Into::into))?;
    }
    Ok(())
}
