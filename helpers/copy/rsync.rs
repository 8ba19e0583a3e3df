//! Running rsync(1).

use std::ffi::OsString;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::thread;

use anyhow::{Context, Result, bail};

use crate::base::program;
use crate::base::progress::Progress;
use crate::write::below::Below;

/// The number of bytes copied so far, from a line of `--info=progress2`: "  1048576  34%  9.43MB/s  0:00:02 (xfr#1, to-chk=2/5)".
pub(crate) fn bytes_done(line: &[u8]) -> Option<u64> {
    let mut words = std::str::from_utf8(line).ok()?.split_ascii_whitespace();
    let done = words.next()?.parse().ok()?;
    words.next()?.ends_with('%').then_some(done)
}

/// Exit status of rsync when source files vanished before they could be transferred (rsync(1), EXIT VALUES).
pub(crate) const VANISHED: i32 = 24;

pub(crate) fn rsync(args: Vec<OsString>, input: Stdio, output: Stdio, target: &Below) -> Result<Vec<u8>> {
    let mut command = program::command("rsync")?;
    command.args(args).stdin(input).stdout(output);
    run_rsync(command, target)
}

/// Runs rsync on the directory of a handle, and returns what it printed, if that is piped.
///
/// # Errors
/// As [`Tree::copy`].
pub fn run_rsync(mut command: Command, target: &Below) -> Result<Vec<u8>> {
    end(spawn(&mut command, target)?)
}

/// Options that make rsync print its progress.
pub(crate) const SHOWN: [&str; 2] = ["--info=progress2", "--no-human-readable"];

/// As [`run_rsync`], with [`SHOWN`] among its options, and shows the progress. rsync's own line isn't shown: it mixes the time left with the
/// elapsed time, and its percentage counts only the files that rsync has found so far.
///
/// # Errors
/// As [`Tree::copy`].
pub(crate) fn run_rsync_shown(mut command: Command, target: &Below, mut progress: Progress) -> Result<()> {
    let mut child = spawn(command.stdout(Stdio::piped()), target)?;
    let lines = child.stdout.take().context("there is no pipe")?;
    thread::scope(|scope| {
        scope.spawn(move || {
            for line in BufReader::new(lines).split(b'\r').map_while(Result::ok) {
                if let Some(done) = bytes_done(&line) {
                    progress.show(done);
                }
            }
        });
        end(child)
    })?;
    Ok(())
}

pub(crate) fn spawn(command: &mut Command, target: &Below) -> Result<Child> {
    // The child changes to the directory of the handle before it runs rsync, so that no path can lead it elsewhere.
    command.stderr(Stdio::piped()).current_dir(target.proc_path()).spawn().context("rsync can't be run")
}

pub(crate) fn end(child: Child) -> Result<Vec<u8>> {
    let done = child.wait_with_output().context("rsync can't be waited for")?;
    match done.status.code() {
        Some(0 | VANISHED) => Ok(done.stdout),
        _ => {
            let messages = String::from_utf8_lossy(&done.stderr);
            let mut last: Vec<&str> = messages.lines().rev().take(8).collect();
            last.reverse();
            bail!("rsync failed ({}): {}", done.status, last.join("; "))
        }
    }
}
