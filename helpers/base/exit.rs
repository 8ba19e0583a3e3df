//! Exit statuses: one table for all programs, which dualroot(7) explains.

use std::process::ExitCode;

use anyhow::Result;
use serde::Serialize;

use crate::base::log::Log;
use crate::base::refusal::Refused;

/// The exit status of a program.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(into = "u8")]
pub enum Exit {
    /// The work is done, and every spare boots.
    Good = 0,
    /// An error occurred, or a spare would not boot.
    Failed = 1,
    /// The arguments are wrong.
    Usage = 2,
    /// A precondition is not met, and nothing was written.
    Refused = 3,
    /// A spare is missing.
    Absent = 4,
}

impl Exit {
    /// All exit statuses, in the order of their numbers.
    pub const ALL: [Self; 5] = [Self::Good, Self::Failed, Self::Usage, Self::Refused, Self::Absent];

    /// Its number.
    pub const fn status(self) -> u8 {
        self as u8
    }

    /// The exit status for an error: a refusal, or a failure.
    pub fn of(error: &anyhow::Error) -> Self {
        if error.is::<Refused>() { Self::Refused } else { Self::Failed }
    }
}

impl From<Exit> for u8 {
    fn from(exit: Exit) -> Self {
        exit.status()
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit.status())
    }
}

/// Ends a program: reports an error, and returns the exit status.
pub fn end(log: &Log, done: Result<Exit>) -> ExitCode {
    let exit = done.unwrap_or_else(|e| {
        log.failure(&e);
        Exit::of(&e)
    });
    exit.into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::refusal::{nothing_done, refused};

    /// The statuses in the table of dualroot(7).
    fn table() -> Vec<u8> {
        let page = include_str!("../../man/dualroot.7");
        let section = page.split("\n.Sh ").find(|section| section.starts_with("EXIT STATUS\n")).unwrap();
        section.lines().filter_map(|line| line.strip_prefix(".It ")?.parse().ok()).collect()
    }

    #[test]
    fn the_manual_has_every_exit_status() {
        assert_eq!(table(), Exit::ALL.map(Exit::status));
    }

    #[test]
    fn a_refusal_is_no_failure() {
        let error = || anyhow::anyhow!("EIO");
        assert_eq!(Exit::of(&error()), Exit::Failed);
        assert_eq!(Exit::of(&refused("no").context("disk1")), Exit::Refused);
        assert_eq!(Exit::of(&nothing_done(error())), Exit::Refused);
    }
}
