//! The copy that stages the changed files of each tree, and moves them to their places by renames. It copies every root that is not btrfs,
//! and all other trees.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::base::fault::Fault;
use crate::base::refusal::refused;
use crate::base::root::Root;
use crate::base::types::Role;
use crate::copy::modules::drop_old_modules;
use crate::copy::rules::OldModules;
use crate::copy::source::Source;
use crate::copy::tree::{Staging, Tree};
use crate::copy::{BootedRoot, Copier, Request, Roots, Target, stage};
use crate::devices::held::Mounted;
use crate::names::files::Rewritten;
use crate::names::generation::Generation;
use crate::write::change::Change;

/// Trees that are updated in place.
pub struct Staged {
    root: Root,
    exclude: Vec<String>,
    trees: Vec<Tree>,
    source: Source,
    files: Vec<Rewritten>,
    roots: Roots,
    /// The remaining work for each tree that was filled; None where nothing differed.
    staged: Vec<Option<Staging>>,
}

impl Staged {
    /// A copy of the trees of these roles.
    pub fn new(request: Request) -> Self {
        let trees = request.roles.iter().filter_map(|role| Tree::new(role, &request.exclude, &[], OldModules::Stay)).collect();
        Self {
            root: request.root,
            exclude: request.exclude,
            trees,
            source: Source::default(),
            files: Vec::new(),
            roots: Roots::default(),
            staged: Vec::new(),
        }
    }

    /// Removes the staged files after a failure. A file that can't be removed takes room until the next sync.
    fn discard(&self, spare: &Mounted) {
        for tree in self.trees.iter().take(self.staged.len()) {
            let _ = spare.below(&tree.role).and_then(stage::discard);
        }
    }

    fn has_root(&self) -> bool {
        self.trees.iter().any(|tree| tree.role == Role::Root)
    }
}

impl Copier for Staged {
    fn prepare(&mut self) -> Result<()> {
        self.trees.iter_mut().try_for_each(|tree| self.source.open(tree))
    }

    fn decide(&mut self, target: &Target<'_>) -> Result<()> {
        self.files = (target.files)(None)?;
        for tree in &mut self.trees {
            tree.leave_out(&self.exclude, &self.files, OldModules::Stay);
        }
        Ok(())
    }

    fn check_room(&self, spare: &Mounted) -> Result<()> {
        for tree in &self.trees {
            let size = |path: &Path| -> Result<(u64, u64)> {
                let s = nix::sys::statvfs::statvfs(path).with_context(|| path.display().to_string())?;
                Ok((s.fragment_size() * (s.blocks() - s.blocks_free()), s.fragment_size() * s.blocks()))
            };
            let (used, _) = size(&tree.source())?;
            let (_, capacity) = size(spare.get(&tree.role)?.place())?;
            if used > capacity {
                return Err(refused(format!(
                    "the {}= partition holds {capacity} bytes, but {}/ of the booted disk has {used} bytes, {} too many; nothing was \
                     written. Make the partition larger, or remove something on the booted disk",
                    tree.role,
                    tree.at,
                    used - capacity
                )));
            }
        }
        Ok(())
    }

    fn roles(&self) -> Vec<&Role> {
        self.trees.iter().map(|tree| &tree.role).collect()
    }

    fn files(&self) -> &[Rewritten] {
        &self.files
    }

    fn roots(&self) -> &Roots {
        &self.roots
    }

    fn describe(&self) -> Vec<String> {
        self.trees.iter().map(Tree::describe).collect()
    }

    fn left_out(&self) -> Result<Vec<String>> {
        Ok(Vec::new())
    }

    fn begin(&mut self, _spare: &Mounted) -> Result<()> {
        Ok(())
    }

    fn fill(&mut self, spare: &Mounted, report: &dyn Fn(&str)) -> Result<()> {
        for tree in &self.trees {
            report(&tree.at);
            match tree.stage(spare.below(&tree.role)?) {
                Ok(staging) => self.staged.push(staging),
                Err(error) => {
                    // All trees change together, or none.
                    self.discard(spare);
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    fn rewrite(&mut self, _spare: &Mounted) -> Result<()> {
        // This kind replaces these files one by one, after the staged files were moved to their places.
        Ok(())
    }

    fn commit(&mut self, spare: &Mounted) -> Result<()> {
        for (tree, staging) in self.trees.iter().zip(std::mem::take(&mut self.staged)) {
            let target = spare.below(&tree.role)?;
            if let Some(staging) = staging {
                tree.put_in_place(target, staging)?;
            }
            if tree.role == Role::Root {
                self.files.iter().try_for_each(|file| file.write(target, &self.root))?;
            }
            // A new kernel's modules are on the medium before an entry boots that kernel.
            target.apply(&Change::Barrier)?;
        }
        Ok(())
    }

    fn retire(&mut self, spare: &Mounted) -> Result<()> {
        self.trees.iter().try_for_each(|tree| drop_old_modules(tree, spare.below(&tree.role)?))
    }

    fn expired(&self, _spare: &Mounted, _booted: &[BootedRoot]) -> Result<Vec<Generation>> {
        Ok(Vec::new())
    }

    fn remove(&self, _spare: &Mounted, _expired: &[Generation]) -> Result<Vec<String>> {
        Ok(Vec::new())
    }

    fn show(&self, _spare: &Mounted, _dirs: &[PathBuf]) -> Result<()> {
        Ok(())
    }

    fn root(&self, spare: &Mounted) -> Result<Option<PathBuf>> {
        match self.has_root() {
            true => Ok(Some(spare.get(&Role::Root)?.place().to_owned())),
            false => Ok(None),
        }
    }

    fn prove(&self, _spare: &Mounted, _booted: &[BootedRoot]) -> Result<Vec<Fault>> {
        Ok(Vec::new())
    }

    fn has_subvolume(&self, _spare: &Mounted, _path: &str) -> bool {
        true
    }
}
