//! The copy that makes a new subvolume for a root that has changed, and stages the changed files of all other trees.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::base::fault::Fault;
use crate::base::root::Root;
use crate::base::types::Role;
use crate::copy::generation::{self, GenerationPlan};
use crate::copy::rules::OldModules;
use crate::copy::source::Source;
use crate::copy::staged::Staged;
use crate::copy::tree::Tree;
use crate::copy::{BootedRoot, Copier, Request, Roots, Target};
use crate::devices::held::{Mounted, ReadOnlyView};
use crate::devices::inventory::Partition;
use crate::devices::mounts::{self, Mount};
use crate::devices::subvolume;
use crate::names::files::Rewritten;
use crate::names::generation::Generation;
use crate::write::below::Below;
use crate::write::change::Change;

/// The mount point at which the booted root's subvolumes are listed.
const PLACE: &str = "/run/dualroot/source/subvolumes";

/// A root with generations, and the other trees.
pub struct Generations {
    root: Root,
    /// The partition of the spare's root.
    part: Partition,
    exclude: Vec<String>,
    keep: usize,
    tree: Tree,
    source: Source,
    others: Staged,
    files: Vec<Rewritten>,
    roots: Roots,
    /// The changes to the generations; None before [`Copier::decide`].
    plan: Option<GenerationPlan>,
    /// The directory of the generation that is being made.
    unfinished: Option<Below>,
}

impl Generations {
    /// A copy of the requested trees. `running` is the directory of the file system that is the booted root, and `part` the partition of
    /// the spare's root.
    pub fn new(mut request: Request, running: String, part: Partition) -> Self {
        request.roles.retain(|role| *role != Role::Root);
        let tree = Tree::of_root(&request.exclude, &[], OldModules::Go);
        Self {
            root: request.root.clone(),
            part,
            exclude: request.exclude.clone(),
            keep: request.generations,
            tree,
            source: Source::default(),
            others: Staged::new(request),
            files: Vec::new(),
            roots: Roots { running: Some(running), ..Roots::default() },
            plan: None,
            unfinished: None,
        }
    }

    fn plan(&self) -> Result<&GenerationPlan> {
        self.plan.as_ref().context("the generations were not planned")
    }

    /// Makes the root's tree leave out the files that get other bytes on the spare.
    fn leave_out(&mut self, files: Vec<Rewritten>) {
        self.tree.leave_out(&self.exclude, &files, OldModules::Go);
        self.files = files;
    }

    /// Whether the booted root differs from this generation, whose directory is `copy`.
    fn differs(&mut self, generation: Generation, copy: &Below, target: &Target<'_>) -> Result<bool> {
        self.leave_out((target.files)(Some(generation))?);
        for file in &self.files {
            if !file.is_in(copy)? {
                return Ok(true);
            }
        }
        self.tree.differs(copy)
    }
}

/// The generations that menu entries boot, except entries that were made for an older generation.
fn generations_of(booted: &[BootedRoot]) -> BTreeSet<Generation> {
    let entries = booted.iter().filter(|entry| !entry.is_older);
    entries.filter_map(|entry| Generation::of_subvolume(entry.subvolume.as_deref()?)).collect()
}

impl Copier for Generations {
    fn prepare(&mut self) -> Result<()> {
        self.source.open(&mut self.tree)?;
        self.others.prepare()
    }

    fn decide(&mut self, target: &Target<'_>) -> Result<()> {
        let top = target.mounted.below(&Role::Root)?;
        let found = generation::found(top)?;
        let changed = match found.last() {
            Some(last) => {
                let copy = top.sub(last.subvolume().as_ref())?.context("a generation has gone")?;
                self.differs(*last, &copy, target)?
            }
            None => true,
        };
        let named = target.booted.iter().filter_map(|entry| entry.subvolume.clone());
        let base = generation::base(top, &found, named, target.is_new)?;
        let plan = generation::plan(&found, &generations_of(target.booted), base, changed, self.keep);
        self.leave_out((target.files)(Some(plan.current))?);
        (self.roots.current, self.roots.kept) = (Some(plan.current), plan.kept.clone());
        self.plan = Some(plan);
        // They are written to the root only. A tree of its own at a directory such as /etc leaves them out, too.
        let files = &self.files;
        self.others.decide(&Target { files: &|_| Ok(files.clone()), ..*target })
    }

    fn check_room(&self, spare: &Mounted) -> Result<()> {
        // The root shares its unchanged files with the last generation. The changed files are counted before they are staged.
        self.others.check_room(spare)
    }

    fn roles(&self) -> Vec<&Role> {
        [vec![&self.tree.role], self.others.roles()].concat()
    }

    fn files(&self) -> &[Rewritten] {
        &self.files
    }

    fn roots(&self) -> &Roots {
        &self.roots
    }

    fn describe(&self) -> Vec<String> {
        let changes = self.plan.iter().flat_map(GenerationPlan::changes).map(|change| format!("{}: {change}", self.tree.role));
        changes.chain([self.tree.describe()]).chain(self.others.describe()).collect()
    }

    fn left_out(&self) -> Result<Vec<String>> {
        let Some(running) = &self.roots.running else { return Ok(Vec::new()) };
        let view = ReadOnlyView::open(Path::new("/"), Path::new(PLACE))?;
        let top = Below::open(view.place())?;
        let mut found = Vec::new();
        for path in subvolume::subvolumes_of(&top, running.trim_matches('/'))? {
            if top.names(path.as_ref()).is_ok_and(|names| !names.is_empty()) {
                found.push(format!("/{path}"));
            }
        }
        let table = mounts::table()?;
        let root = mounts::at(&table, Path::new("/")).context("nothing is mounted on /")?;
        let is_other = |m: &&Mount| m.fstype == "btrfs" && m.source == root.source && !Path::new(&m.root).starts_with(running);
        found.extend(table.iter().filter(is_other).map(|mount| mount.at.display().to_string()));
        found.sort();
        found.dedup();
        Ok(found)
    }

    fn begin(&mut self, spare: &Mounted) -> Result<()> {
        let held = spare.get(&Role::Root)?;
        let plan = self.plan()?;
        if let Some(base) = &plan.base {
            self.unfinished = Some(generation::begin(held.below()?, held.place(), plan.current, base)?);
        }
        self.others.begin(spare)
    }

    fn fill(&mut self, spare: &Mounted, report: &dyn Fn(&str)) -> Result<()> {
        if let Some(unfinished) = &self.unfinished {
            report(&self.tree.at);
            self.tree.copy(unfinished)?;
            unfinished.apply(&Change::Barrier)?;
        }
        self.others.fill(spare, report)
    }

    fn rewrite(&mut self, _spare: &Mounted) -> Result<()> {
        let Some(unfinished) = &self.unfinished else { return Ok(()) };
        self.files.iter().try_for_each(|file| file.write(unfinished, &self.root))?;
        unfinished.apply(&Change::Barrier)
    }

    fn commit(&mut self, spare: &Mounted) -> Result<()> {
        if self.unfinished.take().is_some() {
            generation::finish(spare.below(&Role::Root)?, self.plan()?.current)?;
        }
        self.others.commit(spare)
    }

    fn abandon(&mut self, spare: &Mounted) {
        self.unfinished = None;
        self.others.abandon(spare);
    }

    fn retire(&mut self, spare: &Mounted) -> Result<()> {
        self.others.retire(spare)
    }

    fn expired(&self, spare: &Mounted, booted: &[BootedRoot]) -> Result<Vec<Generation>> {
        let found = generation::found(spare.below(&Role::Root)?)?;
        let expired = self.plan()?.removable(&found, &generations_of(booted));
        // One has to stay, which the spare's mounts show.
        Ok(if found.iter().all(|one| expired.contains(one)) { Vec::new() } else { expired })
    }

    fn remove(&self, spare: &Mounted, expired: &[Generation]) -> Result<Vec<String>> {
        let top = spare.below(&Role::Root)?;
        let found = generation::found(top)?;
        let Some(stays) = found.iter().rfind(|one| !expired.contains(one)).filter(|_| !expired.is_empty()) else {
            return Ok(Vec::new());
        };
        // After an interrupted sync, mounts may show an expired generation, which can't be removed then.
        generation::show(top, *stays)?;
        generation::remove(top, expired)
    }

    fn show(&self, spare: &Mounted, dirs: &[PathBuf]) -> Result<()> {
        let current = self.plan()?.current;
        generation::show(spare.below(&Role::Root)?, current)?;
        let table = mounts::table()?;
        let shown = format!("/{}", current.subvolume());
        let is_stale = |m: &&Mount| m.is_on(&self.part) && m.root != shown && dirs.contains(&m.at);
        mounts::stop(&table.iter().filter(is_stale).collect::<Vec<_>>())
    }

    fn root(&self, spare: &Mounted) -> Result<Option<PathBuf>> {
        Ok(Some(spare.get(&Role::Root)?.place().join(self.plan()?.current.subvolume())))
    }

    fn prove(&self, spare: &Mounted, booted: &[BootedRoot]) -> Result<Vec<Fault>> {
        Ok(generation::prove(spare.below(&Role::Root)?, booted, self.plan()?.current))
    }

    fn has_subvolume(&self, spare: &Mounted, path: &str) -> bool {
        spare.below(&Role::Root).is_ok_and(|top| subvolume::is_subvolume(top, path))
    }
}
