//! Running other programs: by absolute path, with a cleared environment, and never ignoring how they ended.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// Where programs are looked for.
const DIRECTORIES: [&str; 4] = ["/usr/sbin", "/usr/bin", "/sbin", "/bin"];

/// The absolute path of a program.
///
/// # Errors
/// A program that is not installed.
pub fn path(name: &str) -> Result<PathBuf> {
    DIRECTORIES
        .iter()
        .map(|dir| Path::new(dir).join(name))
        .find(|path| path.is_file())
        .with_context(|| format!("the program '{name}' is not installed"))
}

/// A command with nothing of our environment but what programs need to behave the same everywhere, and no input.
///
/// # Errors
/// As [`path`].
pub fn command(name: &str) -> Result<Command> {
    let mut command = Command::new(path(name)?);
    command.env_clear().env("PATH", DIRECTORIES.join(":")).env("LC_ALL", "C.UTF-8").stdin(Stdio::null());
    Ok(command)
}

/// Runs a program to its end and returns what it printed.
///
/// # Errors
/// One that can't be run, or doesn't exit with 0: with what it said on standard error.
pub fn output<const N: usize>(name: &str, args: [OsString; N]) -> Result<Vec<u8>> {
    let done = command(name)?.args(args).output().with_context(|| format!("{name} can't be run"))?;
    if !done.status.success() {
        let said = String::from_utf8_lossy(&done.stderr);
        bail!("{name} failed ({}): {}", done.status, said.trim().replace('\n', "; "));
    }
    Ok(done.stdout)
}
