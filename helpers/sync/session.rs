//! A run of dualroot-sync(8): the notes and checks before a sync, the sync, and the firmware's boot entries after it.

use anyhow::Result;

use crate::base::fault::{Code, Fault};
use crate::base::log::{Event, Log, Subject};
use crate::base::privilege;
use crate::base::refusal::refused;
use crate::base::root::Root;
use crate::base::types::DiskName;
use crate::boot::nvram;
use crate::conf::Disk;
use crate::devices::{held, mounts};
use crate::pair::machine::Machine;
use crate::pair::{booted, heal, lock};
use crate::sync::{self, Options, Outcome, SyncResult, without_root};

/// The task of a run.
#[derive(Clone, Debug)]
pub enum Task {
    /// Sync every spare.
    Sync(Options),
    /// Make the firmware boot this disk the next time.
    BootNext {
        /// The disk.
        disk: DiskName,
        /// Print the changes to the firmware's variables, and make none.
        dry_run: bool,
    },
    /// Note that this disk was booted.
    NoteBoot,
    /// Note that every disk holds all of a shared root again.
    Healed,
}

impl Task {
    fn is_dry_run(&self) -> bool {
        matches!(self, Self::Sync(Options { dry_run: true, .. }) | Self::BootNext { dry_run: true, .. })
    }

    /// The unit that does the same.
    fn unit(&self) -> Option<&'static str> {
        match self {
            Self::Sync(options) if options.discard.is_empty() => Some("dualroot-sync.service"),
            Self::Sync(_) | Self::BootNext { .. } => None,
            Self::NoteBoot => Some("dualroot-booted.service"),
            Self::Healed => Some("dualroot-heal.service"),
        }
    }
}

/// Does the task.
///
/// # Errors
/// [`crate::base::refusal::Refused`] where nothing was written; any other error is a failure.
pub fn run(task: &Task, log: &mut Log) -> Result<Outcome> {
    if !task.is_dry_run() {
        privilege::require_root("dualroot-sync", task.unit())?;
    }
    let root = Root::new("/");
    match task {
        Task::Healed => heal::healed(&root).map(|()| Outcome::Whole),
        Task::NoteBoot => {
            // Waits for the lock: the boot must be noted, and that is short.
            let _lock = lock::take(true)?;
            booted::note(&root).map(|()| Outcome::Whole)
        }
        Task::BootNext { disk, dry_run } => {
            let _lock = if *dry_run { None } else { Some(lock::take(false)?) };
            boot_next(*disk, *dry_run, log)
        }
        Task::Sync(_) if !privilege::is_root() => without_root::dry_run(log),
        Task::Sync(options) => sync(&root, options, log),
    }
}

/// The disk of the configuration that has this name.
fn named(machine: &Machine, name: DiskName) -> Result<&Disk> {
    let disk = machine.config.disks.iter().find(|disk| disk.name == name);
    disk.ok_or_else(|| refused(format!("there is no [{name}] in the configuration; nothing was done")))
}

fn boot_next(name: DiskName, dry_run: bool, log: &Log) -> Result<Outcome> {
    let Some(machine) = Machine::probe(log)? else { return Ok(Outcome::Whole) };
    let firmware = machine.firmware();
    for change in nvram::plan_next(&firmware, named(&machine, name)?)? {
        match dry_run {
            true => println!("firmware: {change}"),
            false => nvram::apply(&firmware, &change)?,
        }
    }
    Ok(Outcome::Whole)
}

fn sync(root: &Root, options: &Options, log: &mut Log) -> Result<Outcome> {
    if !options.dry_run {
        note_degraded(root, log);
    }
    let _lock = lock::take(false)?;
    // The boot is noted even if no sync follows.
    let boot_noted = if options.dry_run { Ok(()) } else { booted::note(root) };
    let Some(mut machine) = Machine::probe(log)? else { return Ok(Outcome::Whole) };
    check_discard(&machine, options)?;
    held::enter_private_namespace()?;
    let state = heal::probe(&machine.root, &machine.config)?;
    report_shared_root(state, options, log)?;
    let result = sync::run(&mut machine, options, boot_noted, log);
    if !options.dry_run {
        mounts::start_spares(log);
    }
    update_firmware(&machine, &result, options, log)?;
    match (state, result.outcome) {
        (heal::RootState::Behind, Ok(_)) | (heal::RootState::Degraded, Ok(Outcome::Whole)) => Ok(Outcome::Broken),
        (_, outcome) => outcome,
    }
}

/// The subject of messages about a shared root that is not whole.
fn degraded(code: Code) -> Subject {
    Subject::event(Event::DegradedRoot, &Fault::new(code, "the shared root is not whole"))
}

/// Saves in the firmware which disks a degraded shared root still has. This comes before every check that may refuse, because the missing
/// disk may be the booted one.
fn note_degraded(root: &Root, log: &Log) {
    match heal::note(root) {
        Ok(true) => log.warning_about(
            &degraded(Code::F28),
            "the shared root is mounted without one of its disks; the firmware remembers that, so that the missing disk is not booted \
             alone before it is up to date again",
        ),
        Ok(false) => {}
        Err(e) => log.warning(&format!(
            "the firmware could not be told whether the shared root is without one of its disks: {e:#}. If it is, do not boot that disk \
             alone: what is written now would be lost"
        )),
    }
}

/// Refuses to give up the content of a disk that is no spare.
fn check_discard(machine: &Machine, options: &Options) -> Result<()> {
    for name in &options.discard {
        named(machine, *name)?;
        if *name == machine.booted.name {
            return Err(refused(format!(
                "{name} is the booted disk, not a spare. To give up its changes, boot the other disk and run this command there"
            )));
        }
    }
    Ok(())
}

/// Reports a shared root that lacks a disk, and starts the healing where the disk is back.
fn report_shared_root(state: heal::RootState, options: &Options, log: &Log) -> Result<()> {
    match state {
        heal::RootState::Whole => Ok(()),
        heal::RootState::Degraded => {
            log.warning_about(
                &degraded(Code::F28),
                "the shared root is mounted without one of its disks; what is written now is on one disk only until the machine is \
                 rebooted with both, even if the disk has been put back",
            );
            Ok(())
        }
        heal::RootState::Behind => {
            log.error_about(
                &degraded(Code::F29),
                "a disk was away while the shared root was written, and would not boot alone before dualroot-heal.service (scrub and \
                 balance, started now) has ended well",
            );
            if options.dry_run { Ok(()) } else { heal::start() }
        }
    }
}

/// Gives each disk its boot entry, even if the sync failed, such as after a failover from a failing disk; except if the booted disk may be
/// the older one.
fn update_firmware(machine: &Machine, result: &SyncResult, options: &Options, log: &Log) -> Result<()> {
    let firmware = machine.firmware();
    match (result.may_be_older, options.dry_run) {
        (true, _) => Ok(()),
        (false, true) => {
            nvram::plan(&firmware)?.iter().for_each(|change| println!("firmware: {change}"));
            Ok(())
        }
        (false, false) => nvram::carry_out(&firmware, log),
    }
}
