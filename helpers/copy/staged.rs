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
    /// For each tree, the files that differ; None where none do.
    staged: Vec<Option<Staging>>,
    /// Whether every tree has a plan, which whoever finds it carries out.
    sealed: bool,
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
            sealed: false,
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
        // A tree that has no room ends the copy before hours are spent on another.
        for tree in &self.trees {
            self.staged.push(tree.compare(spare.below(&tree.role)?)?);
        }
        for (tree, staging) in self.trees.iter().zip(&mut self.staged) {
            report(&tree.at);
            if let Some(staging) = staging {
                tree.stage(spare.below(&tree.role)?, staging)?;
            }
        }
        Ok(())
    }

    fn rewrite(&mut self, _spare: &Mounted) -> Result<()> {
        // This kind replaces these files one by one, after the staged files were moved to their places.
        Ok(())
    }

    fn commit(&mut self, spare: &Mounted) -> Result<()> {
        for (tree, staging) in self.trees.iter().zip(&self.staged) {
            if let Some(staging) = staging {
                tree.seal(spare.below(&tree.role)?, staging)?;
            }
        }
        self.sealed = true;
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

    fn abandon(&mut self, spare: &Mounted) {
        let staged = std::mem::take(&mut self.staged);
        let is_staged: Vec<bool> = staged.iter().map(Option::is_some).collect();
        // Open files would keep the file system from becoming read-only again.
        drop(staged);
        for (tree, _) in self.trees.iter().zip(is_staged).filter(|(_, is_staged)| *is_staged && !self.sealed) {
            // A file that can't be removed takes room until the next sync.
            let _ = spare.below(&tree.role).and_then(stage::discard);
        }
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

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;
    use std::path::PathBuf;

    use nix::mount::{MsFlags, mount};

    use super::*;
    use crate::devices::held::{Held, enter_private_namespace};
    use crate::devices::scratch;

    /// A root and a /home, which are copied to file systems in memory; `home` are mount options of the latter. None without root.
    struct Pair {
        tmp: tempfile::TempDir,
        copy: Staged,
        spare: Mounted,
        _mounts: Vec<scratch::Mounted>,
    }

    impl Pair {
        fn new(home: &str) -> Option<Self> {
            if !nix::unistd::geteuid().is_root() {
                return None;
            }
            enter_private_namespace().unwrap();
            let tmp = tempfile::tempdir().unwrap();
            let (mut spare, mut mounts, mut trees) = (Mounted::default(), Vec::new(), Vec::new());
            for (role, name, options) in [(Role::Root, "root", "size=1m"), (Role::Home, "home", home)] {
                let [from, to] = ["from", "to"].map(|side| tmp.path().join(side).join(name));
                fs::create_dir_all(&from).unwrap();
                fs::create_dir_all(&to).unwrap();
                mount(Some("none"), &to, Some("tmpfs"), MsFlags::empty(), Some(options)).unwrap();
                mounts.push(scratch::Mounted::at(&to));
                fs::write(from.join("file"), "a new text").unwrap();
                fs::write(to.join("file"), "old").unwrap();
                spare.add(role.clone(), Held::over(&to).unwrap().unwrap());
                let tree = Tree::new(&role, &[], &[], OldModules::Stay).unwrap();
                trees.push(Tree { from: Some(from), ..tree });
            }
            let request =
                Request { root: Root::new(tmp.path()), running: None, roles: Vec::new(), exclude: Vec::new(), generations: 1 };
            Some(Self { tmp, copy: Staged { trees, ..Staged::new(request) }, spare, _mounts: mounts })
        }

        fn on_spare(&self, path: &str) -> PathBuf {
            self.tmp.path().join("to").join(path)
        }

        /// Whether each tree is as it was, with nothing staged.
        fn is_unchanged(&self) -> bool {
            ["root", "home"].iter().all(|tree| {
                let file = fs::read(self.on_spare(&format!("{tree}/file"))).unwrap();
                file == b"old" && !self.on_spare(&format!("{tree}/.dualroot")).exists()
            })
        }
    }

    #[test]
    fn f72_trees_change_together() {
        let Some(mut pair) = Pair::new("size=1m") else { return };
        pair.copy.fill(&pair.spare, &|_| {}).unwrap();
        for tree in ["root", "home"] {
            assert_eq!(fs::read(pair.on_spare(&format!("{tree}/file"))).unwrap(), b"old");
            let plan = pair.on_spare(&format!("{tree}/.dualroot/plan"));
            assert!(!plan.exists(), "a boot of the spare would complete {tree} alone");
        }
        pair.copy.commit(&pair.spare).unwrap();
        for tree in ["root", "home"] {
            assert_eq!(fs::read(pair.on_spare(&format!("{tree}/file"))).unwrap(), b"a new text");
        }
    }

    #[test]
    fn f72_a_tree_that_cannot_be_filled_leaves_all_unchanged() {
        let Some(mut pair) = Pair::new("size=1m,nr_inodes=12") else { return };
        for number in 0..20 {
            fs::write(pair.tmp.path().join(format!("from/home/{number}")), "").unwrap();
        }
        pair.copy.fill(&pair.spare, &|_| {}).unwrap_err();
        assert!(pair.on_spare("root/.dualroot").exists(), "the root was staged first");
        pair.copy.abandon(&pair.spare);
        assert!(pair.is_unchanged());
    }

    #[test]
    fn f72_room_is_looked_for_before_anything_is_staged() {
        let Some(mut pair) = Pair::new("size=64k") else { return };
        fs::write(pair.tmp.path().join("from/home/large"), vec![1; 1 << 20]).unwrap();
        let told = std::cell::Cell::new(false);
        pair.copy.fill(&pair.spare, &|_| told.set(true)).unwrap_err();
        assert!(!told.get() && pair.is_unchanged());
    }

    #[test]
    fn f73_an_abandoned_copy_has_no_file_open_on_the_spare() {
        let Some(mut pair) = Pair::new("size=1m,nr_inodes=12") else { return };
        // No room for a second copy: of this file, only the mode is changed.
        let time = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000);
        for (side, mode) in [("from", 0o640), ("to", 0o600)] {
            let path = pair.tmp.path().join(side).join("root/large");
            fs::write(&path, vec![1; 700 << 10]).unwrap();
            fs::File::options().write(true).open(&path).unwrap().set_modified(time).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        }
        for number in 0..20 {
            fs::write(pair.tmp.path().join(format!("from/home/{number}")), "").unwrap();
        }
        let staging = pair.on_spare("root/.dualroot");
        let is_open = || {
            let links = fs::read_dir("/proc/self/fd").unwrap().flatten().filter_map(|fd| fs::read_link(fd.path()).ok());
            links.filter(|file| file.starts_with(&staging)).count()
        };
        pair.copy.fill(&pair.spare, &|_| {}).unwrap_err();
        assert_eq!(is_open(), 1, "the list of files that get attributes only");
        pair.copy.abandon(&pair.spare);
        assert_eq!(is_open(), 0, "the file system could not become read-only again");
    }
}
