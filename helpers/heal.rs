//! A shared btrfs root after a time without one of its disks.
//!
//! The initrd leaves a record in /run when it had to mount the root degraded, and tmpfiles.d(5) keeps it on the root. Once the disk is
//! back, dualroot-heal.service brings it what was written meanwhile (btrfs scrub, then balance), and removes the record. Until then the
//! disk's half is old, and can't be relied on: alone, it may not even be mountable.

use anyhow::Result;

use crate::machine::Machine;
use crate::program;

const NOW: &str = "/run/dualroot/degraded";
const KEPT: &str = "/var/lib/dualroot/degraded";

/// How a shared root stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Root {
    /// Every disk that is there holds all of it, or each disk has its own.
    Whole,
    /// It is mounted without one of its disks.
    Degraded,
    /// It was, and the disk that was away is behind still.
    Behind,
}

/// How this machine's root stands.
pub fn look(machine: &Machine) -> Root {
    match () {
        () if machine.own_roots() => Root::Whole,
        () if machine.root.exists(NOW) => Root::Degraded,
        () if machine.root.exists(KEPT) => Root::Behind,
        () => Root::Whole,
    }
}

/// Starts the healing, and doesn't wait for it.
///
/// # Errors
/// systemctl that fails.
pub fn start() -> Result<()> {
    program::output("systemctl", ["start", "--no-block", "dualroot-heal.service"].map(Into::into)).map(drop)
}
