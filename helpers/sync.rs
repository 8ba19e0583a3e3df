//! Making every spare a bootable copy of the booted disk.
//!
//! The order is the point: root trees first, staged whole and then renamed; then the boot partitions, in the order of [`order`];
//! then what nothing needs any more; then the proof, and a second look at the source.

pub mod entries;
pub(crate) mod spare;

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, bail};

use crate::base::log::Log;
use crate::base::refusal::{Refused, refused, refused_for_age};
use crate::base::types::{DiskName, Role};
use crate::boot::known::Known;
use crate::boot::offers;
use crate::conf::Disk;
use crate::copy::tree::Tree;
use crate::copy::{generation, modules, stage};
use crate::devices::held::Alone;
use crate::devices::inventory::Partition;
use crate::devices::{fsck, gpt};
use crate::names::{fstab, idstore};
use crate::pair::lineage::{Record, own_record};
use crate::pair::machine::Machine;
use crate::pair::status::Status;
use crate::pair::{containers, settle};
use crate::sync::spare::{SOURCES, Spare};
use crate::write::change::Change;
use crate::write::state;

/// A source that changes during this many syncs in a row is reported.
const ROUNDS: u32 = 3;

/// What the caller asks for.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Print the plan and write nothing.
    pub dry_run: bool,
    /// Overwrite these spares even if they were booted since they were last synced.
    pub discard: Vec<DiskName>,
    /// Sync this spare, and no other.
    pub only: Option<DiskName>,
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

/// What came of a sync.
#[derive(Debug)]
pub struct Done {
    /// [`crate::base::refusal::Refused`] when nothing may be written; any other error is a failure, and names the spare. Of several spares'
    /// errors it is one.
    pub outcome: Result<Outcome>,
    /// Whether a spare, or all, were refused because another disk than the booted one may be newer.
    pub may_be_older: bool,
}

/// Syncs every spare that is there, and notes what came of it. The caller holds the lock, has entered a private mount namespace, and has
/// noted the boot: where it could not, nothing is synced.
pub fn run(machine: &mut Machine, options: &Options, noted: Result<()>, log: &mut Log) -> Done {
    let loaded = Status::load(&machine.root, &machine.config, &machine.booted);
    let mut status = loaded.unwrap_or_else(|e| {
        log.warning(&format!("{e:#}; it is made anew"));
        Status::new(&machine.booted)
    });
    // They stay open, as spares stay mounted.
    let noted = match containers::open_spares(machine, log) {
        true => noted.and_then(|()| machine.look_again()),
        false => noted,
    };
    // Before anything is copied, as spares get it, too. Of a disk that isn't in force yet, nothing is kept.
    if !options.dry_run
        && machine.drafts.is_empty()
        && let Err(e) = gpt::save(&machine.root, &machine.config, &machine.inventory)
    {
        log.warning(&format!("{}/{} can't be kept up to date: {e:#}", state::DIRECTORY, gpt::NAME));
    }
    let outcome = noted.and_then(|()| rounds(machine, options, &mut status, log));
    if let Err(e) = &outcome {
        status.stopped_before(spares(machine, options), e);
    }
    if !options.dry_run {
        note(&status, log);
    }
    Done { outcome, may_be_older: status.may_be_older() }
}

/// That it can't be noted how it stands is no reason not to go on.
fn note(status: &Status, log: &Log) {
    if let Err(e) = status.save() {
        log.warning(&format!("{e:#}; dualroot-status will not know of this sync"));
    }
}

fn rounds(machine: &mut Machine, options: &Options, status: &mut Status, log: &mut Log) -> Result<Outcome> {
    let boot_dirs = machine.boot_dirs();
    let settle_time = machine.config.settings.settle;
    for _ in 0..ROUNDS {
        let before = match options.dry_run {
            true => settle::print(&boot_dirs)?,
            false => settle::wait(&boot_dirs, settle_time, |what| log.status(what))?,
        };
        // Disks may have come, gone, and changed places while we waited.
        machine.look_again()?;
        let outcome = round(machine, options, status, log)?;
        if let Some(outcome) = outcome
            && (options.dry_run || settle::is_as(&boot_dirs, &before)?)
        {
            return Ok(outcome);
        }
        log.info("the booted disk changed while it was copied; copying again");
    }
    bail!("the booted disk changed during {ROUNDS} syncs in a row; the spares may not be up to date")
}

/// The spares that are asked for.
fn spares<'a>(machine: &'a Machine, options: &Options) -> impl Iterator<Item = &'a Disk> {
    let only = options.only;
    let all = machine.config.spares(&machine.booted).into_iter().map(|(_, spare)| spare);
    all.filter(move |spare| only.is_none_or(|only| only == spare.name))
}

/// Syncs every spare once; None where one of them was left as it was, as the booted disk changed meanwhile.
fn round(machine: &Machine, options: &Options, status: &mut Status, log: &mut Log) -> Result<Option<Outcome>> {
    if !options.dry_run {
        if machine.drafts.is_empty() {
            idstore::save(&machine.ids)?;
        }
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
    let mut outcome = Some(Outcome::Whole);
    let mut error: Option<anyhow::Error> = None;
    for spare in spares(machine, options) {
        // One spare's trouble is not another's.
        let done = match machine.inventory.disk(spare).map_err(|e| refused(format!("{e:#}"))) {
            Ok(parts) if parts.is_empty() => {
                log.warning(&format!("{} is not there; it was left out", spare.name));
                if !options.dry_run {
                    // It may have gone since the boot was noted.
                    left_behind(machine, spare)?;
                }
                status.absent(spare);
                outcome = outcome.map(|outcome| outcome.max(Outcome::Absent));
                continue;
            }
            Ok(parts) => one(machine, spare, &parts, options, status, log),
            Err(e) => Err(e),
        };
        if let Err(e) = &done {
            status.stopped(spare, e);
        }
        match done.with_context(|| spare.name.to_string()) {
            Ok(None) => outcome = None,
            Ok(Some(faults)) if faults.is_empty() => {}
            Ok(Some(faults)) => {
                for fault in faults {
                    log.error(&format!("{} would not boot: {fault}", spare.name));
                }
                outcome = outcome.map(|_| Outcome::Broken);
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

/// Syncs one spare, and returns why it would not boot; None where the booted disk changed while its trees were copied, so that no entry was
/// written.
fn one(
    machine: &Machine,
    disk: &Disk,
    parts: &BTreeMap<Role, &Partition>,
    options: &Options,
    status: &mut Status,
    log: &mut Log,
) -> Result<Option<Vec<String>>> {
    let mut spare = Spare::new(machine, disk, parts)?;
    for part in parts.iter().filter(|(role, _)| role.is_boot() && !options.dry_run).map(|(_, part)| part) {
        if let Some(program) = fsck::repair(part)? {
            log.warning(&format!("{}: {} was left by a cut and has been repaired by {program}", disk.name, part.path));
        }
    }
    spare.hold(parts, |role| *role != Role::Swap)?;
    let (esp, own) = own_record(machine)?;
    let of_spare = Record::load(spare.held(&Role::Esp)?.below()?, disk.name);
    if !options.discard.contains(&disk.name) {
        let of_spare = of_spare.as_ref().map_err(|e| {
            refused_for_age(format!(
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
    let mut there = spare.boot_files(source.keys())?;
    spare.generations = spare.plan_generations(parts, &source, &there, of_spare.as_ref().is_ok_and(Record::is_new))?;
    if spare.generations.is_some()
        && let Some(root) = machine.subvolume()?
    {
        source.values_mut().for_each(|files| offers::keep_own(files, &root));
    }
    for path in spare.not_copied()? {
        log.warning(&format!("{}: {path} is a subvolume of its own; what is in it is not copied", disk.name));
    }
    if machine.own_roots() {
        for path in fstab::swap_files(&machine.root.read_opt("/etc/fstab").context("/etc/fstab")?.unwrap_or_default()) {
            log.warning(&format!(
                "{}: {path} is a swap file, and its copy has holes, with which the kernel takes it for none; swap space that each disk has \
                 lies in a partition (swap=)",
                disk.name
            ));
        }
    }
    let (expected, _) = spare.boot_plan(&source, &there, &known)?;
    let apart = spare.rewritten(spare.generation())?;
    let mut trees: Vec<Tree> = disk.parts.keys().filter_map(|role| spare.tree(role, &apart, spare.generation())).collect();
    spare.check_space(&trees)?;
    if of_spare.as_ref().is_ok_and(Record::is_new) && !options.discard.contains(&disk.name) {
        spare.check_empty(&trees, &there)?;
    }
    if options.dry_run {
        spare.print(&trees, &apart, &expected);
        return Ok(Some(Vec::new()));
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

    // If this is cut, nobody knows what is there.
    status.begun(disk);
    note(status, log);
    for held in spare.held.values_mut() {
        held.make_writable()?;
    }
    let (mut own, mut of_spare) = (own, of_spare.unwrap_or_default());
    if of_spare.is_new() {
        // What a first sync that is cut has left there is no reason to refuse the next.
        of_spare.begun(&own, disk.name);
        of_spare.save(spare.held(&Role::Esp)?.below()?)?;
    }
    // They make room.
    report(disk, spare.drop_generations(&mut there)?, log);
    if let Some(generations) = &spare.generations
        && let Some(base) = &generations.made_of
    {
        let held = spare.held(&Role::Root)?;
        spare.fresh = Some(generation::begin(held.below()?, held.place(), generations.current, base)?);
    }
    for tree in &trees {
        let Some(target) = spare.target(&tree.role)? else { continue };
        log.status(&format!("{}: copying {}/", disk.name, tree.at));
        tree.copy(target)?;
        // Modules of a new kernel are on the medium before anything there boots it.
        target.apply(&Change::Barrier)?;
    }
    if machine.own_roots()
        && let Some(root) = spare.target(&Role::Root)?
    {
        for file in &apart {
            file.write(root, &machine.root)?;
        }
        root.apply(&Change::Barrier)?;
    }
    if let (Some(generations), Some(_)) = (&spare.generations, spare.fresh.take()) {
        generation::finish(spare.held(&Role::Root)?.below()?, generations.current)?;
    }
    // That took its time. What a package manager has begun meanwhile may be half there, although nothing that tells of it has changed yet.
    if !settle::is_as(&boot_dirs, &before)? {
        return Ok(None);
    }
    let (steps, wanted) = spare.boot_plan(&source, &there, &known)?;
    let writes = steps.iter().filter(|s| s.change != Change::Barrier).count();
    log.status(&format!("{}: {writes} changes to its boot partitions", disk.name));
    for step in &steps {
        spare.held(&step.role)?.below()?.apply(&step.change).with_context(|| step.role.to_string())?;
    }
    for tree in &trees {
        if !(tree.role == Role::Root && spare.generations.is_some()) {
            modules::drop_old_modules(tree, spare.held(&tree.role)?.below()?)?;
        }
    }
    own.synced(machine.booted.name, disk.name, &mut of_spare);
    // First that the spare is level with this disk: should it be left behind from here on, that has to be noted.
    own.save(&esp)?;
    of_spare.save(spare.held(&Role::Esp)?.below()?)?;
    log.status(&format!("{}: reading it again", disk.name));
    let mut now = match writes {
        0 => there,
        _ => spare.boot_files(source.keys())?,
    };
    // The spare boots without these.
    for done in [spare.show_generation(parts).map(|()| Vec::new()), spare.drop_generations(&mut now)] {
        match done {
            Ok(kept) => report(disk, kept, log),
            Err(error) => log.warning(&format!("{}: {error:#}", disk.name)),
        }
    }
    let faults = spare.prove(&wanted, &now)?;
    status.ended(disk, &faults, &wanted, &now, of_spare.last_synced());
    for held in std::mem::take(&mut spare.held).into_values() {
        held.release()?;
    }
    log.info(&format!(
        "{}: {}, {writes} changes to its boot partitions",
        disk.name,
        if faults.is_empty() { "boots" } else { "would not boot" }
    ));
    Ok(Some(faults))
}

/// Says which subvolumes keep their generations from being removed.
fn report(disk: &Disk, kept: Vec<String>, log: &mut Log) {
    for path in kept {
        log.warning(&format!(
            "{}: {path} is a subvolume with something in it that was not copied; its generation stays",
            disk.name
        ));
    }
}
