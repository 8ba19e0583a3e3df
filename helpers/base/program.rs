//! Running other programs: by absolute path, with a cleared environment, and never ignoring how they ended.

use std::ffi::OsString;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use anyhow::{Context, Result, bail};

/// Where programs are looked for.
const DIRECTORIES: [&str; 4] = ["/usr/sbin", "/usr/bin", "/sbin", "/bin"];

/// The absolute path of a program: `$PATH` is not asked.
///
/// # Errors
/// A program that is not installed; a name that is a path.
pub fn path(name: &str) -> Result<PathBuf> {
    DIRECTORIES
        .iter()
        .map(|dir| Path::new(dir).join(name))
        .find(|path| !name.contains('/') && path.is_file())
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
pub fn output(name: &str, args: impl IntoIterator<Item = OsString>) -> Result<Vec<u8>> {
    check(name, command(name)?.args(args).output())
}

/// As [`output`], with something to read.
///
/// # Errors
/// As [`output`]; a program that doesn't read all of it.
pub fn fed(name: &str, args: impl IntoIterator<Item = OsString>, input: &[u8]) -> Result<Vec<u8>> {
    let mut command = command(name)?;
    command.args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().with_context(|| format!("{name} can't be run"))?;
    // So little that it fits into the pipe. Closed by being dropped.
    let written = child.stdin.take().context("there is no pipe")?.write_all(input);
    let printed = check(name, child.wait_with_output())?;
    written.with_context(|| format!("{name} didn't read what it was given"))?;
    Ok(printed)
}

/// As [`output`], of a program that asks on the terminal.
///
/// # Errors
/// As [`output`].
pub fn asked(name: &str, args: impl IntoIterator<Item = OsString>) -> Result<Vec<u8>> {
    check(name, command(name)?.args(args).stdin(Stdio::inherit()).stderr(Stdio::inherit()).output())
}

fn check(name: &str, done: io::Result<Output>) -> Result<Vec<u8>> {
    let done = done.with_context(|| format!("{name} can't be run"))?;
    if !done.status.success() {
        let said = String::from_utf8_lossy(&done.stderr);
        bail!("{name} failed ({}): {}", done.status, said.trim().replace('\n', "; "));
    }
    Ok(done.stdout)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn nothing_of_the_environment_reaches_a_program() {
        const NAME: &str = "base::program::tests::nothing_of_the_environment_reaches_a_program";
        const VARIABLE: &str = "DUALROOT_TEST_HOSTILE";
        if let Some(file) = std::env::var_os(VARIABLE) {
            fs::write(file, output("env", []).unwrap()).unwrap();
            return;
        }
        let tmp = tempfile::tempdir().unwrap();
        let (said, other) = (tmp.path().join("said"), tmp.path().join("env"));
        fs::write(&other, "#!/bin/sh\necho another program was run\n").unwrap();
        fs::set_permissions(&other, fs::Permissions::from_mode(0o755)).unwrap();
        let mut hostile = Command::new(std::env::current_exe().unwrap());
        hostile.args(["--exact", NAME]).current_dir(tmp.path()).env(VARIABLE, &said).env("PATH", tmp.path());
        for name in ["LD_PRELOAD", "LD_LIBRARY_PATH", "LD_AUDIT"] {
            hostile.env(name, tmp.path().join("absent.so"));
        }
        // Of the programs that are run: rsync, e2fsck, lsblk (libblkid, libudev), xz, zstd, gzip, bzip2, systemctl, and of every one.
        for name in [
            "RSYNC_RSH",
            "RSYNC_OLD_ARGS",
            "RSYNC_PARTIAL_DIR",
            "E2FSCK_CONFIG",
            "E2FSCK_TIME",
            "UNDO_DIR",
            "LIBBLKID_DEBUG",
            "BLKID_FILE",
            "XZ_OPT",
            "ZSTD_NBTHREADS",
            "GZIP",
            "BZIP2",
            "SYSTEMCTL_FORCE_BUS",
            "SYSTEMD_OFFLINE",
            "LC_ALL",
            "LANG",
            "TMPDIR",
            "IFS",
            "ENV",
            "BASH_ENV",
            "HOME",
        ] {
            hostile.env(name, "hostile");
        }
        let done = hostile.output().unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stdout));
        let said = fs::read_to_string(said).unwrap();
        let mut lines: Vec<&str> = said.lines().collect();
        lines.sort_unstable();
        assert_eq!(lines, ["LC_ALL=C.UTF-8", "PATH=/usr/sbin:/usr/bin:/sbin:/bin"]);
    }

    #[test]
    fn programs_are_found_in_the_system_s_directories_only() {
        let found = path("env").unwrap();
        assert!(DIRECTORIES.iter().any(|dir| found.parent() == Some(Path::new(dir))), "{}", found.display());
        assert_eq!(command("env").unwrap().get_program(), found);
        let tmp = tempfile::tempdir().unwrap();
        let elsewhere = tmp.path().join("env");
        fs::write(&elsewhere, "").unwrap();
        for name in [elsewhere.to_str().unwrap(), "../../bin/env", "./env", "", "no-such-program"] {
            let error = path(name).unwrap_err().to_string();
            assert_eq!(error, format!("the program '{name}' is not installed"));
        }
    }
}
