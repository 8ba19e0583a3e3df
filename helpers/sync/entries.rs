//! Rewriting what on the booted disk names another one, so that a kernel that is installed after a failover boots from here.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::boot::entry;
use crate::names::files;
use crate::pair::machine::Machine;
use crate::write::below::{Below, FileKind};
use crate::write::change::Change;
use crate::write::sector::text_change;

/// The directory of the entries, and the boot loader's own configuration, on each boot partition.
const ENTRIES: &str = "loader/entries";
const LOADER_CONF: &str = "loader/loader.conf";
/// Where the root's files that name disks are. dualroot-entries.service has nothing else of the root writable, and so it is a mount there.
const ETC: &str = "/etc";

/// A change below one of the booted disk's mount points.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Rewrite {
    /// The mount point.
    pub dir: PathBuf,
    /// The change.
    pub change: Change,
}

/// What has to be rewritten on the booted disk; nothing if all is right already. A shared root's files belong to every disk, and stay.
///
/// # Errors
/// Files that can't be read; identifiers that can't be told apart.
pub fn plan(machine: &Machine) -> Result<Vec<Rewrite>> {
    let rewriter = machine.rewriter(&machine.booted)?;
    let titles = machine.titles(&machine.booted);
    let mut changes = Vec::new();
    if machine.own_roots() {
        for file in files::rewritten(&machine.root, &rewriter, None, |dir| machine.belongs_to_other_disk(dir))? {
            changes.push(Rewrite { dir: ETC.into(), change: file.change(ETC, &machine.root) });
        }
    }
    for dir in machine.boot_dirs() {
        let below = Below::open(&dir)?;
        let mut texts = vec![LOADER_CONF.to_owned()];
        for (name, kind) in below.list(ENTRIES)? {
            if matches!(kind, FileKind::File(_)) && name.to_lowercase().ends_with(".conf") {
                texts.push(format!("{ENTRIES}/{name}"));
            }
        }
        for path in texts {
            let Some(old) = below.read(&path)? else { continue };
            let new = if path == LOADER_CONF { rewriter.rewrite(&old) } else { entry::rewrite(&old, &rewriter, &titles) };
            if new.trim_ascii_end() != old.trim_ascii_end() {
                changes.push(Rewrite { dir: dir.clone(), change: text_change(&path, Some(old.len() as u64), &new) });
            }
        }
    }
    Ok(changes)
}

/// Makes the changes.
///
/// # Errors
/// The first that fails.
pub fn apply(rewrites: &[Rewrite]) -> Result<()> {
    for rewrite in rewrites {
        let path: &Path = &rewrite.dir;
        Below::open(path)?.apply(&rewrite.change).with_context(|| format!("rewriting below {}", path.display()))?;
    }
    Ok(())
}
