//! Making every spare a bootable copy of the booted disk.
//!
//! A sync of a spare goes through phases, each of which takes the one before it by value: [`checked`] (may it be written?), [`planned`]
//! (the plan, as data), [`written`] (room is made; then trees, then the boot partitions in the order of [`crate::boot::order`], then what
//! nothing needs any more goes) and [`proven`] (it is read again). So nothing is written that wasn't checked, and nothing is called bootable that
//! wasn't read. [`session`] is a whole run of the program.

mod boot_partitions;
mod checked;
pub mod entries;
mod planned;
mod proven;
pub mod session;
pub(crate) mod spare;
mod without_root;
mod written;

use anyhow::{Result, bail};

use crate::base::fault::{Code, Fault};
use crate::base::log::{Event, Log, Subject};
use crate::base::refusal::{Refused, refused};
use crate::base::types::DiskName;
use crate::conf::Disk;
use crate::copy::stage;
use crate::devices::gpt;
use crate::names::idstore;
use crate::pair::lineage::own_record;
use crate::pair::machine::Machine;
use crate::pair::status::Status;
use crate::pair::{containers, quiet};
use crate::sync::checked::Checked;
use crate::sync::planned::Planned;
use crate::sync::proven::Proven;
use crate::sync::spare::Parts;
use crate::sync::written::Written;
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

/// The result of a sync.
#[derive(Debug)]
pub struct Done {
    /// [`Refused`] when nothing may be written; any other error is a failure, and names the spare. Where several spares fail, it is the
    /// error of one of them.
    pub outcome: Result<Outcome>,
    /// Whether a spare, or all, were refused because another disk than the booted one may be newer.
    pub may_be_older: bool,
}

/// The sync of one spare.
enum Synced {
    /// It was written and read again: the reasons why it would not boot.
    Proven(Vec<Fault>),
    /// The plan was printed.
    Planned,
    /// The booted disk changed while its trees were copied, so that no entry was written.
    SourceChanged,
}

/// Syncs every spare that is there, and notes the results. The caller holds the lock, has entered a private mount namespace, and has
/// noted the boot: where it could not, nothing is synced.
pub fn run(machine: &mut Machine, options: &Options, noted: Result<()>, log: &mut Log) -> Done {
    let loaded = Status::load(&machine.root, &machine.config, &machine.booted);
    let mut status = loaded.unwrap_or_else(|e| {
        log.warning(&format!("{e:#}; it is made anew"));
        Status::new(&machine.booted)
    });
    // Containers stay open, as spares stay mounted.
    let noted = match containers::open_spares(machine, log) {
        true => noted.and_then(|()| machine.refresh()),
        false => noted,
    };
    // The layouts are saved before anything is copied, as spares get them, too; not during a clone, whose disk isn't configured yet.
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

/// Keeps the status. A sync goes on where that fails.
fn note(status: &Status, log: &Log) {
    if let Err(e) = status.save() {
        log.warning(&format!("{e:#}; dualroot-status will not know of this sync"));
    }
}

/// Syncs until the booted disk did not change meanwhile.
fn rounds(machine: &mut Machine, options: &Options, status: &mut Status, log: &mut Log) -> Result<Outcome> {
    let boot_dirs = machine.boot_dirs();
    let settle_time = machine.config.settings.settle;
    for _ in 0..ROUNDS {
        let before = match options.dry_run {
            true => quiet::fingerprint(&boot_dirs)?,
            false => quiet::wait(&boot_dirs, settle_time, |what| log.status(what))?,
        };
        // Disks may have come, gone, and changed places while we waited.
        machine.refresh()?;
        let outcome = round(machine, options, status, log)?;
        if let Some(outcome) = outcome
            && (options.dry_run || quiet::unchanged_since(&boot_dirs, &before)?)
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

/// Syncs every spare once. None where the booted disk changed while one of them was copied, which then keeps its old entries.
fn round(machine: &Machine, options: &Options, status: &mut Status, log: &mut Log) -> Result<Option<Outcome>> {
    if !options.dry_run {
        prepare(machine, log)?;
    }
    let mut outcome = Some(Outcome::Whole);
    let mut error: Option<anyhow::Error> = None;
    for disk in spares(machine, options) {
        // One spare's trouble is not another's.
        let synced = match machine.inventory.disk(disk).map_err(|e| refused(format!("{e:#}"))) {
            Ok(parts) if parts.is_empty() => {
                absent(machine, disk, options, status, log)?;
                outcome = outcome.map(|outcome| outcome.max(Outcome::Absent));
                continue;
            }
            Ok(parts) => one(machine, disk, &parts, options, status, log),
            Err(e) => Err(e),
        };
        match synced {
            Ok(Synced::SourceChanged) => outcome = None,
            Ok(Synced::Planned) => {}
            Ok(Synced::Proven(faults)) => {
                for fault in &faults {
                    let text = format!("{} would not boot: {fault}", disk.name);
                    log.error_about(&Subject::event(Event::WouldNotBoot, fault), &text);
                }
                if !faults.is_empty() {
                    outcome = outcome.map(|_| Outcome::Broken);
                }
            }
            Err(e) => {
                failed(machine, disk, &e, options, status)?;
                error = Some(keep_failure(error, e.context(disk.name.to_string()), log));
            }
        }
    }
    error.map_or(Ok(outcome), Err)
}

/// Keeps the identifiers of the disks that are there, and removes what an interrupted copy to this disk has left.
fn prepare(machine: &Machine, log: &Log) -> Result<()> {
    if machine.drafts.is_empty() {
        idstore::save(&machine.ids)?;
    }
    for (dir, tree) in stage::left_here(Some(&machine.config))? {
        // The staged files are older than what has been done on this disk since.
        log.warning(&format!(
            "{}: a copy to this disk was interrupted, and was not completed while it booted. Its staged files are removed; files of \
             two generations may be there",
            dir.display()
        ));
        stage::discard(&tree)?;
    }
    Ok(())
}

/// Of two spares' errors, the one that the run ends with; the other is reported. "Refused" says that nothing was written, and so a failure
/// goes before it.
fn keep_failure(earlier: Option<anyhow::Error>, error: anyhow::Error, log: &Log) -> anyhow::Error {
    let Some(earlier) = earlier else { return error };
    let (reported, kept) = if error.is::<Refused>() { (error, earlier) } else { (earlier, error) };
    log.failure(&reported);
    kept
}

fn absent(machine: &Machine, disk: &Disk, options: &Options, status: &mut Status, log: &Log) -> Result<()> {
    let fault = Fault::new(Code::F21, format!("{} is not there; it was left out", disk.name)).of(disk.name);
    log.warning_about(&Subject::event(Event::SpareMissing, &fault), &fault.text);
    if !options.dry_run {
        // It may have gone since the boot was noted.
        left_behind(machine, disk)?;
    }
    status.absent(disk);
    Ok(())
}

fn failed(machine: &Machine, disk: &Disk, error: &anyhow::Error, options: &Options, status: &mut Status) -> Result<()> {
    status.stopped(disk, error);
    match options.dry_run {
        true => Ok(()),
        false => left_behind(machine, disk),
    }
}

/// Notes that the booted disk goes on, and that this spare doesn't get what is new.
fn left_behind(machine: &Machine, spare: &Disk) -> Result<()> {
    let (esp, mut own) = own_record(machine)?;
    match own.left_behind(machine.booted.name, spare.name) {
        true => own.save(&esp),
        false => Ok(()),
    }
}

/// Takes one spare through the phases.
fn one(
    machine: &Machine,
    disk: &Disk,
    parts: &Parts<'_>,
    options: &Options,
    status: &mut Status,
    log: &mut Log,
) -> Result<Synced> {
    let checked = Checked::check(machine, disk, parts, options, log)?;
    let planned = Planned::plan(checked)?;
    if options.dry_run {
        planned.lines().iter().for_each(|line| println!("{line}"));
        return Ok(Synced::Planned);
    }
    match Written::write(planned, status, log)? {
        Some(written) => Proven::prove(written, status, log).map(|proven| Synced::Proven(proven.faults)),
        None => Ok(Synced::SourceChanged),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::base::root::Root;
    use crate::devices::held::enter_private_namespace;
    use crate::devices::scratch::{self, Mounted};
    use crate::names::files::Rewritten;
    use crate::pair::lineage::Record;
    use crate::pair::machine;
    use crate::write::below::Below;
    use crate::write::change::Change;

    /// Booted later, the spare would otherwise overwrite what was done here in the meantime.
    #[test]
    fn f07_a_spare_that_a_sync_leaves_behind_is_older_from_then_on() {
        let boot = Path::new("/boot");
        // The machine that runs the tests may have a copy of its own to complete.
        if !nix::unistd::geteuid().is_root() || !boot.is_dir() || Path::new("/").join(stage::DIRECTORY).exists() {
            return;
        }
        // The booted disk's ESP.
        enter_private_namespace().unwrap();
        scratch::run("mount", &["-ttmpfs", "none", "/boot"]);
        let _mounted = Mounted::at(boot);
        let esp = Below::open(boot).unwrap();
        esp.apply(&Change::MakeDir("EFI".into())).unwrap();
        let machine = machine::tests::machine(&[1, 2, 3]);
        let [booted, spare] = machine.config.disks.as_slice() else { panic!() };
        let run = |is_there: bool, dry_run: bool| {
            let (mut own, mut of_spare) = (Record::default(), Record::default());
            own.note_boot(&Root::new("/"), booted.name).unwrap();
            own.synced(booted.name, spare.name, &mut of_spare);
            own.save(&esp).unwrap();
            let (options, mut status) = (Options { dry_run, ..Options::default() }, Status::new(booted));
            let mut machine = machine::tests::machine(if is_there { &[1, 2, 3] } else { &[1, 2] });
            // So that nothing is kept in /var/lib.
            machine.drafts = vec![Rewritten { path: "draft".into(), bytes: Vec::new() }];
            let outcome = round(&machine, &options, &mut status, &mut Log::new());
            assert_eq!(outcome.is_ok(), !is_there, "{outcome:?}");
            of_spare.check(spare.name, booted.name, &Record::load(&esp, booted.name).unwrap())
        };
        for is_there in [true, false] {
            assert!(run(is_there, false).unwrap_err().is::<Refused>(), "{is_there}");
            run(is_there, true).unwrap();
        }
    }
}
