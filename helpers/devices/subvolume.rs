//! Lists and removes subvolumes of a btrfs, by btrfs(8).

use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::base::program;
use crate::write::below::Below;

/// The inode number of the top directory of every subvolume.
const TOP: u64 = 256;

/// Whether an inode number is that of a subvolume's top directory.
pub fn is_top(inode: u64) -> bool {
    inode == TOP
}

/// Whether there is a subvolume at a path from the top of the file system.
pub fn is_subvolume(top: &Below, path: &str) -> bool {
    top.stat(path.as_ref()).is_ok_and(|stat| stat.is_some_and(|stat| is_top(stat.st_ino)))
}

/// Waits until the kernel has freed the space of removed subvolumes, which it does only while the file system is writable. Gives up after
/// a minute: a subvolume with an open file is freed only when the file is closed.
pub(crate) fn wait_until_freed(top: &Below) -> Result<()> {
    const PATIENCE: Duration = Duration::from_secs(60);
    btrfs(top, &["filesystem", "sync", "."])?;
    let mut waiting = program::command("btrfs")?;
    waiting.args(["subvolume", "sync", "."]).current_dir(top.proc_path()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut waiting = waiting.spawn().context("btrfs can't be run")?;
    let begun = Instant::now();
    while begun.elapsed() < PATIENCE {
        if waiting.try_wait()?.is_some() {
            return Ok(());
        }
        thread::sleep(Duration::from_millis(100));
    }
    waiting.kill()?;
    waiting.wait()?;
    Ok(())
}

/// The subvolumes directly in the subvolume `path`, as paths below it. Both are below the handle `top`, the top of the file system.
pub(crate) fn subvolumes_in(top: &Below, path: &str) -> Result<Vec<String>> {
    let listed = btrfs(top, &["subvolume", "list", "-o", &format!("./{path}")])?;
    paths_within(&listed, if path == "." { "" } else { path })
}

/// The subvolumes directly in the subvolume that the handle `mounted` is for, as paths below it. `path` is its path from the top of the
/// file system.
///
/// # Errors
/// Those of btrfs(8).
pub fn subvolumes_of(mounted: &Below, path: &str) -> Result<Vec<String>> {
    paths_within(&btrfs(mounted, &["subvolume", "list", "-o", "."])?, path)
}

/// The paths below `path` in the output of `btrfs subvolume list`.
pub(crate) fn paths_within(listed: &[u8], path: &str) -> Result<Vec<String>> {
    let within = if path.is_empty() { String::new() } else { format!("{path}/") };
    let one = |line: &str| {
        // "ID 260 gen 10 top level 256 path dualroot/5/var/lib/machines", a path from the top of the file system.
        let inner = line.split_once(" path ").and_then(|(_, inner)| inner.strip_prefix(&within));
        inner.map(str::to_owned).with_context(|| format!("'btrfs subvolume list' printed '{line}' for the subvolume '{path}'"))
    };
    String::from_utf8_lossy(listed).lines().map(one).collect()
}

/// Removes a subvolume.
pub(crate) fn delete(top: &Below, path: &str) -> Result<()> {
    btrfs(top, &["subvolume", "delete", path]).map(|_| ())
}

/// Runs btrfs(8) with the directory `top` as its working directory.
pub(crate) fn btrfs(top: &Below, args: &[&str]) -> Result<Vec<u8>> {
    let mut command = program::command("btrfs")?;
    // The child enters the directory by our handle, so that no path can lead it elsewhere.
    let done = command.args(args).current_dir(top.proc_path()).output().context("btrfs can't be run")?;
    if !done.status.success() {
        let said = String::from_utf8_lossy(&done.stderr);
        bail!("'btrfs {}' failed ({}): {}", args.join(" "), done.status, said.trim().replace('\n', "; "));
    }
    Ok(done.stdout)
}
