//! Runs other programs: by absolute path, with a cleared environment, and with their exit status checked.

use std::ffi::OsString;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use anyhow::{Context, Result, bail};

/// The directories that are searched for programs.
const DIRECTORIES: [&str; 4] = ["/usr/sbin", "/usr/bin", "/sbin", "/bin"];

/// The absolute path of a program; `$PATH` is ignored.
///
/// # Errors
/// The program is not installed, or the name contains a slash.
pub fn path(name: &str) -> Result<PathBuf> {
    DIRECTORIES
        .iter()
        .map(|dir| Path::new(dir).join(name))
        .find(|path| !name.contains('/') && path.is_file())
        .with_context(|| format!("the program '{name}' is not installed"))
}

/// A command without input, whose environment holds `PATH` and `LC_ALL` only, so that it behaves the same everywhere.
///
/// # Errors
/// As [`path`].
pub fn command(name: &str) -> Result<Command> {
    let mut command = Command::new(path(name)?);
    command.env_clear().env("PATH", DIRECTORIES.join(":")).env("LC_ALL", "C.UTF-8").stdin(Stdio::null());
    Ok(command)
}

/// Runs a program to its end and returns its standard output.
///
/// # Errors
/// The program can't be run, or exits with another status than 0; the message then quotes its standard error.
pub fn output(name: &str, args: impl IntoIterator<Item = OsString>) -> Result<Vec<u8>> {
    check(name, command(name)?.args(args).output())
}

/// As [`output`], with `input` as standard input.
///
/// # Errors
/// As [`output`]; the program doesn't read all of its input.
pub fn output_with_input(name: &str, args: impl IntoIterator<Item = OsString>, input: &[u8]) -> Result<Vec<u8>> {
    let mut command = command(name)?;
    command.args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().with_context(|| format!("{name} can't be run"))?;
    // The input is short enough to fit into the pipe, which is closed by being dropped.
    let written = child.stdin.take().context("the program has no standard input")?.write_all(input);
    let printed = check(name, child.wait_with_output())?;
    written.with_context(|| format!("{name} didn't read all of its input"))?;
    Ok(printed)
}

/// As [`output`], for a program that asks questions on the terminal.
///
/// # Errors
/// As [`output`].
pub fn output_on_terminal(name: &str, args: impl IntoIterator<Item = OsString>) -> Result<Vec<u8>> {
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
    fn programs_get_a_cleared_environment() {
        const NAME: &str = "base::program::tests::programs_get_a_cleared_environment";
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
        // Variables that rsync, e2fsck, lsblk (libblkid, libudev), xz, zstd, gzip, bzip2, systemctl, or all programs would read.
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
    fn only_system_directories_are_searched_for_programs() {
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
