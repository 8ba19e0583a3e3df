//! Making every spare a bootable copy of the booted disk.
//!
//! The order is the point: root trees first, staged whole and then renamed; then the boot partitions, in the order of [`bootplan`];
//! then what nothing needs any more; then the proof, and a second look at the source.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::below::{Below, Change, Kind};
use crate::bootfiles::{BootFiles, Class, classify};
use crate::bootplan::{self, Step, Wanted};
use crate::conf::Disk;
use crate::entry;
use crate::fsck;
use crate::ident::Rewriter;
use crate::idstore;
use crate::inventory::{Inventory, Partition};
use crate::known::Known;
use crate::lineage::Record;
use crate::log::Log;
use crate::machine::{Machine, Refused, refused};
use crate::mounts::{Alone, Held};
use crate::opaque;
use crate::prove;
use crate::searched::Searched;
use crate::settle;
use crate::stage;
use crate::tree::{self, Rewritten, Tree};
use crate::types::{DiskName, Role};

/// Where spares are mounted during a sync, in a namespace of its own.
const PLACES: &str = "/run/dualroot/spare";
/// Where the booted disk's file systems are seen without what is mounted in them.
const SOURCES: &str = "/run/dualroot/source";
/// A source that changes during this many syncs in a row is reported.
const ROUNDS: u32 = 3;

/// What the caller asks for.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Print the plan and write nothing.
    pub dry_run: bool,
    /// Overwrite these spares even if they were booted since they were last synced.
    pub discard: Vec<DiskName>,
}

/// How it stands after a sync.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Outcome {
    /// Every spare is there, and boots.
    Whole,
    /// A spare isn't there; those that are boot.
    Absent,
    /// A spare would not boot.
    Broken,
}

/// Syncs every spare that is there. The caller holds the lock and has entered a private mount namespace.
///
/// # Errors
/// [`crate::machine::Refused`] when nothing may be written; anything else is a failure, and names the spare.
pub fn run(machine: &mut Machine, options: &Options, log: &mut Log) -> Result<Outcome> {
    let boot_dirs = machine.boot_dirs();
    let settle_time = machine.config.settings.settle;
    for _ in 0..ROUNDS {
        let before = match options.dry_run {
            true => settle::print(&boot_dirs)?,
            false => settle::wait(&boot_dirs, settle_time, |what| log.status(what))?,
        };
        // Disks may have come, gone, and changed places while we waited.
        machine.look_again()?;
        let outcome = round(machine, options, log)?;
        // What a package manager has begun meanwhile may be half there, although nothing that tells of it has changed yet.
        if options.dry_run || settle::print(&boot_dirs)? == before && settle::package_manager().is_none() {
            return Ok(outcome);
        }
        log.info("the booted disk changed while it was copied; copying again");
    }
    bail!("the booted disk changed during {ROUNDS} syncs in a row; the spares may not be up to date")
}

fn round(machine: &Machine, options: &Options, log: &mut Log) -> Result<Outcome> {
    if !options.dry_run {
        idstore::save(&machine.ids)?;
        // Also without a spare: what happens on this disk from now on is not on any other.
        let (esp, mut own) = own_record(machine)?;
        own.note_boot(machine)?;
        for (_, spare) in machine.config.spares(&machine.booted) {
            if machine.inventory.disk(spare).is_ok_and(|parts| parts.is_empty()) {
                own.left_behind(machine.booted.name, spare.name);
            }
        }
        own.save(&esp)?;
        for (dir, tree) in stage::left_here(Some(&machine.config))? {
            // It is older than what has been done here since.
            log.warning(&format!(
                "{}: a copy to this disk was cut, and was not completed while it booted; what was staged is removed, and files of \
                 two generations may be there",
                dir.display()
            ));
            stage::discard(&tree)?;
        }
    }
    let mut outcome = Outcome::Whole;
    let mut error: Option<anyhow::Error> = None;
    for (_, spare) in machine.config.spares(&machine.booted) {
        // One spare's trouble is not another's.
        let done = match machine.inventory.disk(spare).map_err(|e| refused(format!("{e:#}"))) {
            Ok(parts) if parts.is_empty() => {
                log.warning(&format!("{} is not there; it was left out", spare.name));
                outcome = outcome.max(Outcome::Absent);
                continue;
            }
            Ok(parts) => one(machine, spare, &parts, options, log),
            Err(e) => Err(e),
        };
        match done.with_context(|| spare.name.to_string()) {
            Ok(faults) if faults.is_empty() => {}
            Ok(faults) => {
                for fault in faults {
                    log.error(&format!("{} would not boot: {fault}", spare.name));
                }
                outcome = Outcome::Broken;
            }
            Err(e) => {
                if !options.dry_run {
                    left_behind(machine, spare)?;
                }
                // "Refused" says that nothing was written, and so it comes behind what failed.
                let (told, kept) = match error.take() {
                    Some(earlier) if e.is::<Refused>() => (Some(e), earlier),
                    earlier => (earlier, e),
                };
                if let Some(told) = told {
                    log.error(&format!("{told:#}"));
                }
                error = Some(kept);
            }
        }
    }
    match error {
        Some(e) => Err(e),
        None => Ok(outcome),
    }
}

/// The booted disk goes on, and this spare doesn't get what is new.
fn left_behind(machine: &Machine, spare: &Disk) -> Result<()> {
    let (esp, mut own) = own_record(machine)?;
    match own.left_behind(machine.booted.name, spare.name) {
        true => own.save(&esp),
        false => Ok(()),
    }
}

/// What is to be on each boot partition.
type AllWanted = BTreeMap<Role, Vec<Wanted>>;

/// A spare's mounted partitions, and what on them comes from elsewhere.
struct Spare<'a> {
    machine: &'a Machine,
    disk: &'a Disk,
    rewriter: Rewriter,
    held: BTreeMap<Role, Held>,
}

/// Syncs one spare, and returns why it would not boot.
fn one(
    machine: &Machine,
    disk: &Disk,
    parts: &BTreeMap<Role, &Partition>,
    options: &Options,
    log: &mut Log,
) -> Result<Vec<String>> {
    if let Some((role, partuuid)) = disk.parts.iter().find(|(role, _)| !parts.contains_key(*role)) {
        return Err(refused(format!(
            "its {role}= partition {partuuid} isn't there, but others of the disk are; nothing was written to it"
        )));
    }
    let mut spare = Spare { machine, disk, rewriter: machine.rewriter(disk)?, held: BTreeMap::new() };
    for (role, part) in parts {
        let repairs = matches!(role, Role::Esp | Role::Xbootldr) && !options.dry_run;
        if let Some(program) = if repairs { fsck::repair(part)? } else { None } {
            log.warning(&format!("{}: {} was left by a cut and has been repaired by {program}", disk.name, part.path));
        }
        if *role != Role::Swap {
            let place = Path::new(PLACES).join(disk.name.to_string()).join(role.key().replace('/', "-"));
            spare.held.insert(role.clone(), Held::open(part, &place)?);
        }
    }
    spare.check_devices(parts)?;
    let (esp, own) = own_record(machine)?;
    let of_spare = Record::load(spare.held(&Role::Esp)?.below()?);
    if !options.discard.contains(&disk.name) {
        let of_spare = of_spare.as_ref().map_err(|e| {
            refused(format!(
                "{e:#}, so what is on {0} may be newer; to give it up, run 'dualroot-sync --discard-spare {0}'",
                disk.name
            ))
        })?;
        own.check(machine.booted.name, disk.name, of_spare)?;
    }
    let mut known = Known::load(&machine.root)?;
    // Whatever doesn't fit is refused before the first byte is written.
    let boot_dirs = machine.boot_dirs();
    let before = settle::print(&boot_dirs)?;
    let mut source = spare.source()?;
    let there = spare.boot_files(source.keys())?;
    let (expected, _) = spare.boot_plan(&source, &there, &known)?;
    let apart = spare.rewritten()?;
    let mut trees: Vec<Tree> =
        disk.parts.keys().filter_map(|role| Tree::new(role, &machine.config.settings.exclude, &apart)).collect();
    spare.check_space(&trees)?;
    if of_spare.as_ref().is_ok_and(Record::is_new) && !options.discard.contains(&disk.name) {
        spare.check_empty(&trees)?;
    }
    if options.dry_run {
        spare.print(&trees, &apart, &expected);
        return Ok(Vec::new());
    }
    let mut alone = Vec::new();
    for tree in &mut trees {
        let seen = Alone::open(&tree.source(), &Path::new(SOURCES).join(tree.role.key().replace('/', "-")))?;
        tree.from = Some(seen.place().to_owned());
        alone.push(seen);
    }
    for (role, files) in &source {
        known.add(role, files);
    }
    known.save()?;

    for held in spare.held.values_mut() {
        held.make_writable()?;
    }
    let (mut own, mut of_spare) = (own, of_spare.unwrap_or_default());
    if of_spare.is_new() {
        // What a first sync that is cut has left there is no reason to refuse the next.
        of_spare.begun(machine.booted.name);
        of_spare.save(spare.held(&Role::Esp)?.below()?)?;
    }
    for tree in &trees {
        log.status(&format!("{}: copying {}/", disk.name, tree.at));
        let target = spare.held(&tree.role)?.below()?;
        tree.copy(target)?;
        // Modules of a new kernel are on the medium before anything there boots it.
        target.apply(&Change::Barrier)?;
    }
    if machine.own_roots() {
        let root = spare.held(&Role::Root)?.below()?;
        for file in &apart {
            if root.read(file.path.trim_start_matches('/'))?.as_ref() != Some(&file.bytes) {
                root.apply(&file.change(&machine.root))?;
            }
        }
        root.apply(&Change::Barrier)?;
    }
    // That took its time. On the spare's boot partitions, nobody else writes.
    if settle::print(&boot_dirs)? != before {
        source = spare.source()?;
    }
    let (steps, wanted) = spare.boot_plan(&source, &there, &known)?;
    let writes = steps.iter().filter(|s| s.change != Change::Barrier).count();
    log.status(&format!("{}: {writes} changes to its boot partitions", disk.name));
    for step in &steps {
        spare.held(&step.role)?.below()?.apply(&step.change).with_context(|| step.role.to_string())?;
    }
    for tree in &trees {
        tree::drop_old_modules(tree, spare.held(&tree.role)?.below()?)?;
    }
    own.synced(disk.name, &mut of_spare);
    of_spare.save(spare.held(&Role::Esp)?.below()?)?;
    own.save(&esp)?;
    log.status(&format!("{}: reading it again", disk.name));
    let faults = match writes {
        0 => spare.prove(&wanted, &there)?,
        _ => spare.prove(&wanted, &spare.boot_files(source.keys())?)?,
    };
    for held in std::mem::take(&mut spare.held).into_values() {
        held.release()?;
    }
    log.info(&format!(
        "{}: {}, {writes} changes to its boot partitions",
        disk.name,
        if faults.is_empty() { "boots" } else { "would not boot" }
    ));
    Ok(faults)
}

/// The first name on a file system that isn't a new one's: anything but empty directories, such as mount points.
fn first_content(below: &Below) -> Result<Option<String>> {
    for (name, kind) in below.list(".")? {
        if name != "lost+found" && (kind != Kind::Dir || !below.list(&name)?.is_empty()) {
            return Ok(Some(name));
        }
    }
    Ok(None)
}

/// The booted disk's ESP, and its record.
fn own_record(machine: &Machine) -> Result<(Below, Record)> {
    let places = machine.booted.boot_places();
    let (_, _, dir) = places.iter().find(|(role, _, _)| *role == Role::Esp).context("the booted disk has no ESP")?;
    let esp = Below::open(Path::new(dir.as_str()))?;
    let record = Record::load(&esp)
        .map_err(|e| refused(format!("{dir}: {e:#}; remove it, and the next sync asks which disk is newer")))?;
    Ok((esp, record))
}

impl Spare<'_> {
    fn held(&self, role: &Role) -> Result<&Held> {
        self.held.get(role).with_context(|| format!("{role}= is not mounted"))
    }

    /// The booted disk's boot partitions, read whole.
    fn source(&self) -> Result<BTreeMap<Role, BootFiles>> {
        let mut all = BTreeMap::new();
        for (role, _, dir) in self.machine.booted.boot_places() {
            let below = Below::open(Path::new(dir.as_str()))?;
            all.insert(role, BootFiles::scan(&below).with_context(|| format!("{dir} of the booted disk"))?);
        }
        Ok(all)
    }

    /// The spare's boot partitions, read whole.
    fn boot_files<'r>(&self, roles: impl Iterator<Item = &'r Role>) -> Result<BTreeMap<Role, BootFiles>> {
        let scan = |role: &Role| -> Result<_> {
            let found = BootFiles::scan(self.held(role)?.below()?).with_context(|| format!("{role}= of {}", self.disk.name))?;
            Ok((role.clone(), found))
        };
        roles.map(scan).collect()
    }

    /// The steps for the boot partitions, and what is to be on them in the end.
    fn boot_plan(
        &self,
        source: &BTreeMap<Role, BootFiles>,
        there: &BTreeMap<Role, BootFiles>,
        known: &Known,
    ) -> Result<(Vec<Step>, AllWanted)> {
        let titles = self.machine.titles(self.disk);
        let rewrite = |class: Class, text: &[u8]| match class {
            Class::Entry => entry::rewrite(text, &self.rewriter, &titles),
            _ => self.rewriter.rewrite(text),
        };
        let places: BTreeMap<Role, PathBuf> =
            self.machine.booted.boot_places().into_iter().map(|(role, _, dir)| (role, dir.as_str().into())).collect();
        let mut wanted = BTreeMap::new();
        for (role, files) in source {
            let found = there.get(role).with_context(|| format!("{role}= was not read"))?;
            let mounted = places.get(role).context("a boot partition has no place")?;
            wanted.insert(role.clone(), bootplan::wanted(files, mounted, found, rewrite)?);
        }
        let boots = |w: &Wanted| matches!(classify(&w.path), Class::Entry | Class::Uki);
        if !wanted.values().flatten().any(boots) {
            return Err(refused(format!(
                "the booted disk has no boot loader entry that could be copied, so {} would lose its own; install a kernel again, or \
                 'kernel-install add', and see 'bootctl list'",
                self.disk.name
            )));
        }
        let none = BTreeSet::new();
        let parts: Vec<bootplan::Part<'_>> = there
            .iter()
            .map(|(role, spare)| bootplan::Part {
                role: role.clone(),
                wanted: wanted.get(role).cloned().unwrap_or_default(),
                spare,
                known: known.of(role).unwrap_or(&none),
            })
            .collect();
        let mut steps = bootplan::plan(&parts)?;
        if self.shortfall(&parts, &steps)?.is_some()
            && let Some(other) = bootplan::plan_for_little_room(&parts)?
        {
            steps = other;
        }
        if let Some((role, short)) = self.shortfall(&parts, &steps)? {
            return Err(refused(format!(
                "{}: its {role}= partition is too small to hold old and new side by side, by {short} bytes; remove an old kernel, or make it larger",
                self.disk.name
            )));
        }
        Ok((steps, wanted))
    }

    /// The first boot partition that has not enough room for the steps, and how many bytes it lacks.
    fn shortfall(&self, parts: &[bootplan::Part<'_>], steps: &[Step]) -> Result<Option<(Role, u64)>> {
        for part in parts {
            let (free, cluster) = self.held(&part.role)?.below()?.free()?;
            let short = bootplan::shortfall(steps, &part.role, part.spare, free, cluster);
            if short > 0 {
                return Ok(Some((part.role.clone(), short)));
            }
        }
        Ok(None)
    }

    fn rewritten(&self) -> Result<Vec<Rewritten>> {
        match self.machine.own_roots() {
            true => tree::rewritten(&self.machine.root, &self.rewriter, |dir| self.machine.is_apart(dir)),
            false => Ok(Vec::new()),
        }
    }

    /// What is mounted is held, and can't become another's. If its identifier still leads to it, it was the right one all along.
    fn check_devices(&self, parts: &BTreeMap<Role, &Partition>) -> Result<()> {
        let now = Inventory::read()?;
        for (role, part) in parts {
            let partuuid = self.disk.parts.get(role).with_context(|| format!("there is no {role}="))?;
            let there = now.find(partuuid).map_err(|e| refused(format!("{e:#}")))?;
            if !there.is_some_and(|there| there.device().is_ok_and(|device| part.device().is_ok_and(|part| part == device))) {
                return Err(refused(format!("{} is not the partition {partuuid} any more; start the sync again", part.path)));
            }
        }
        Ok(())
    }

    /// What lies on a disk that no sync has written yet is somebody's.
    fn check_empty(&self, trees: &[Tree]) -> Result<()> {
        for tree in trees {
            let held = self.held(&tree.role)?;
            if let Some(name) = first_content(held.below()?)? {
                return Err(refused(format!(
                    "{0} was never synced, but its {1}= partition is not empty (it has '{2}'), and a sync would remove what is there; make \
                     a new file system, or correct the configuration, or give it up by 'dualroot-sync --discard-spare {0}'",
                    self.disk.name,
                    tree.role,
                    name.escape_debug()
                )));
            }
        }
        Ok(())
    }

    /// What is used on the booted disk has to fit on the spare at all.
    fn check_space(&self, trees: &[Tree]) -> Result<()> {
        for tree in trees {
            let size = |path: &Path| -> Result<(u64, u64)> {
                let s = nix::sys::statvfs::statvfs(path).with_context(|| path.display().to_string())?;
                Ok((s.fragment_size() * (s.blocks() - s.blocks_free()), s.fragment_size() * s.blocks()))
            };
            let (used, _) = size(&tree.source())?;
            let (_, holds) = size(self.held(&tree.role)?.place())?;
            if used > holds {
                return Err(refused(format!(
                    "{}: its {}= partition holds {holds} bytes, but {} has {used} bytes, {} too many",
                    self.disk.name,
                    tree.role,
                    tree.source().display(),
                    used - holds
                )));
            }
        }
        Ok(())
    }

    fn print(&self, trees: &[Tree], apart: &[Rewritten], steps: &[Step]) {
        for tree in trees {
            // It changes nothing, and says what the copy would.
            let args: Vec<_> = tree.comparison().iter().map(|a| a.to_string_lossy().into_owned()).collect();
            println!("{} {}: rsync {}", self.disk.name, tree.role, args.join(" "));
        }
        for file in apart {
            println!("{} root: replace {} ({} bytes)", self.disk.name, file.path, file.bytes.len());
        }
        for step in steps {
            println!("{} {}: {}", self.disk.name, step.role, step.change);
        }
    }

    /// Says why the spare would not boot, from what was read of its boot partitions since they were last written.
    fn prove(&self, wanted: &AllWanted, found: &BTreeMap<Role, BootFiles>) -> Result<Vec<String>> {
        let parts: Vec<prove::Part<'_>> = found
            .iter()
            .filter_map(|(role, found)| Some(prove::Part { role: role.clone(), wanted: wanted.get(role)?, found }))
            .collect();
        let mut faults = prove::boot_partitions(&parts, &self.rewriter);
        let mut searched = Searched::load(&self.rewriter, self.disk.name)?;
        for part in &parts {
            faults.extend(opaque::boot_partition(self.held(&part.role)?.place(), part.found, &self.rewriter, &mut searched)?);
        }
        searched.save(self.disk.name)?;
        let mut files = BTreeMap::new();
        let root = match self.machine.own_roots() {
            true => Some(self.held(&Role::Root)?.place().to_owned()),
            false => None,
        };
        // A shared root has one fstab for every disk: what it says has to hold on each.
        let root = crate::root::Root::new(root.unwrap_or_else(|| "/".into()));
        for path in tree::identifying_files(&root)? {
            if let Some(bytes) = root.read_opt(&path)? {
                files.insert(path, bytes);
            }
        }
        faults.extend(prove::root_files(&files, &self.rewriter));
        Ok(faults)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn f01_only_a_new_file_system_is_empty() {
        let tmp = tempfile::tempdir().unwrap();
        let below = Below::open(tmp.path()).unwrap();
        for dir in ["lost+found", "lost+found/x", "boot", "efi"] {
            fs::create_dir(tmp.path().join(dir)).unwrap();
        }
        assert_eq!(first_content(&below).unwrap(), None);
        fs::create_dir_all(tmp.path().join("photos/2025")).unwrap();
        assert_eq!(first_content(&below).unwrap().as_deref(), Some("photos"));
        fs::remove_dir_all(tmp.path().join("photos")).unwrap();
        fs::write(tmp.path().join("letter"), "").unwrap();
        assert_eq!(first_content(&below).unwrap().as_deref(), Some("letter"));
    }
}
