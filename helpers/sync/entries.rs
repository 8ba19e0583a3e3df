//! Rewriting files of the booted disk that name another disk, so that a kernel that is installed after a failover boots this disk.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::base::privilege;
use crate::boot::entry::{self, Titles};
use crate::names::files;
use crate::names::ident::Rewriter;
use crate::pair::machine::Machine;
use crate::write::below::{Below, FileKind};
use crate::write::change::Change;
use crate::write::sector::text_change;

/// The directory of the entries, and the boot loader's own configuration, on each boot partition.
const ENTRIES: &str = "loader/entries";
const LOADER_CONF: &str = "loader/loader.conf";
/// The directory of the root's files that name disks. In dualroot-entries.service, it is a mount point, because nothing else of the root is
/// writable.
const ETC: &str = "/etc";

/// A change below one of the booted disk's mount points.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Rewrite {
    /// The mount point.
    pub dir: PathBuf,
    /// The change.
    pub change: Change,
}

/// The changes that the booted disk needs.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct RewritePlan {
    /// The changes; empty if every file names the right disk already.
    pub rewrites: Vec<Rewrite>,
    /// The mount points below which only root may read. Their files were not checked.
    pub not_seen: Vec<PathBuf>,
}

impl RewritePlan {
    /// Adds the changes below a mount point. A missing permission is no error for a user other than root, who can't apply the plan anyway.
    fn add(&mut self, dir: &Path, found: Result<Vec<Change>>, is_root: bool) -> Result<()> {
        match found {
            Err(e) if !is_root && privilege::is_denied(&e) => self.not_seen.push(dir.to_owned()),
            found => self.rewrites.extend(found?.into_iter().map(|change| Rewrite { dir: dir.to_owned(), change })),
        }
        Ok(())
    }
}

/// Plans the changes to the booted disk's files that name another disk. A shared root's files belong to every disk, and stay unchanged.
///
/// # Errors
/// A file can't be read; identifiers of two disks can't be told apart.
pub fn plan(machine: &Machine) -> Result<RewritePlan> {
    let is_root = privilege::is_root();
    let rewriter = machine.rewriter(&machine.booted)?;
    let titles = machine.titles(&machine.booted);
    let mut plan = RewritePlan::default();
    if machine.own_roots() {
        let files = files::rewritten(&machine.root, &rewriter, None, |dir| machine.belongs_to_other_disk(dir));
        let changes = files.map(|files| files.iter().map(|file| file.change(ETC, &machine.root)).collect());
        plan.add(Path::new(ETC), changes, is_root)?;
    }
    for dir in machine.boot_dirs() {
        plan.add(&dir, boot_partition(&dir, &rewriter, &titles), is_root)?;
    }
    Ok(plan)
}

/// The changes to the entries and the boot loader's configuration on a boot partition.
fn boot_partition(dir: &Path, rewriter: &Rewriter, titles: &Titles) -> Result<Vec<Change>> {
    let below = Below::open(dir)?;
    let mut texts = vec![LOADER_CONF.to_owned()];
    for (name, kind) in below.list(ENTRIES)? {
        if matches!(kind, FileKind::File(_)) && name.to_lowercase().ends_with(".conf") {
            texts.push(format!("{ENTRIES}/{name}"));
        }
    }
    let mut changes = Vec::new();
    for path in texts {
        let Some(old) = below.read(&path)? else { continue };
        let new = if path == LOADER_CONF { rewriter.rewrite(&old) } else { entry::rewrite(&old, rewriter, titles) };
        if new.trim_ascii_end() != old.trim_ascii_end() {
            changes.push(text_change(&path, Some(old.len() as u64), &new));
        }
    }
    Ok(changes)
}

/// Makes the changes.
///
/// # Errors
/// Those of the first change that fails.
pub fn apply(rewrites: &[Rewrite]) -> Result<()> {
    for rewrite in rewrites {
        let path: &Path = &rewrite.dir;
        Below::open(path)?.apply(&rewrite.change).with_context(|| format!("rewriting below {}", path.display()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unreadable_directory_is_named_in_a_dry_run_and_an_error_otherwise() {
        let denied = || Err::<Vec<Change>, _>(nix::Error::EACCES).context("/boot can't be opened");
        let mut plan = RewritePlan::default();
        plan.add(Path::new("/boot"), denied(), false).unwrap();
        plan.add(Path::new("/etc"), Ok(vec![Change::Barrier]), false).unwrap();
        assert_eq!((plan.not_seen, plan.rewrites.len()), (vec![PathBuf::from("/boot")], 1));
        let mut plan = RewritePlan::default();
        assert!(plan.add(Path::new("/boot"), denied(), true).is_err(), "root needs every file");
        assert!(plan.add(Path::new("/boot"), Err(anyhow::anyhow!("EIO")), false).is_err());
    }
}
