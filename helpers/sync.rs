//! Making every spare a bootable copy of the booted disk.
//!
//! A sync of a spare goes through phases, each of which takes the one before it by value: [`checked`] (may the spare be written?), [`planned`]
//! (the plan, as data), [`written`] (expired generations are removed, then the trees are written, then the boot partitions in the order of
//! [`crate::boot::order`], then old modules are removed) and [`proven`] (the spare is read again). So no spare is written unchecked, and none
//! is called bootable unread. [`session`] is a whole run of the program.

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

/// The greatest number of syncs in a row during which the source may change; then that is reported.
const MAX_SYNCS: u32 = 3;

/// The options of a sync.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Print the plan and write nothing.
    pub dry_run: bool,
    /// Overwrite these spares even if they were booted since they were last synced.
    pub discard: Vec<DiskName>,
    /// Sync this spare, and no other.
    pub only: Option<DiskName>,
}

/// The state of the spares after a sync.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Outcome {
    /// Every spare is present, and boots.
    Whole,
    /// A spare is absent; all present ones boot.
    Absent,
    /// A spare would not boot.
    Broken,
}

/// The result of a sync.
#[derive(Debug)]
pub struct SyncResult {
    /// The state of the spares. The error is [`Refused`] when nothing may be written; any other is a failure, and names the spare. Where
    /// several spares fail, it is the error of one of them.
    pub outcome: Result<Outcome>,
    /// Whether a spare, or every spare, was refused because another disk may be newer than the booted one.
    pub may_be_older: bool,
}

/// The sync of one spare.
enum Synced {
    /// The spare was written and read again. The faults are the reasons why it would not boot.
    Proven(Vec<Fault>),
    /// The plan was printed.
    Planned,
    /// The booted disk changed while its trees were copied, so that no entry was written.
    SourceChanged,
}

/// Syncs every spare that is present, and saves the results. The caller holds the lock, has entered a private mount namespace, and has noted
/// the boot: if `boot_noted` is an error, nothing is synced.
pub fn run(machine: &mut Machine, options: &Options, boot_noted: Result<()>, log: &mut Log) -> SyncResult {
    let loaded = Status::load(&machine.root, &machine.config, &machine.booted);
    let mut status = loaded.unwrap_or_else(|e| {
        log.warning(&format!("{e:#}; it is replaced by a new one"));
        Status::new(&machine.booted)
    });
    // Containers stay open, as spares stay mounted.
    let ready = match containers::open_spares(machine, log) {
        true => boot_noted.and_then(|()| machine.refresh()),
        false => boot_noted,
    };
    // The layouts are saved before anything is copied, because spares get them, too. During a clone, the new disk isn't configured yet.
    if !options.dry_run
        && machine.drafts.is_empty()
        && let Err(e) = gpt::save(&machine.root, &machine.config, &machine.inventory)
    {
        log.warning(&format!("{}/{} can't be kept up to date: {e:#}", state::DIRECTORY, gpt::NAME));
    }
    let outcome = ready.and_then(|()| sync_until_unchanged(machine, options, &mut status, log));
    if let Err(e) = &outcome {
        status.stopped_before(spares(machine, options), e);
    }
    if !options.dry_run {
        save_status(&status, log);
    }
    SyncResult { outcome, may_be_older: status.may_be_older() }
}

/// Saves the status. A failure of that doesn't stop the sync.
fn save_status(status: &Status, log: &Log) {
    if let Err(e) = status.save() {
        log.warning(&format!("{e:#}; dualroot-status will not know of this sync"));
    }
}

/// Syncs again until the booted disk did not change during the sync.
fn sync_until_unchanged(machine: &mut Machine, options: &Options, status: &mut Status, log: &mut Log) -> Result<Outcome> {
    let boot_dirs = machine.boot_dirs();
    let settle_time = machine.config.settings.settle;
    for _ in 0..MAX_SYNCS {
        let before = match options.dry_run {
            true => quiet::fingerprint(&boot_dirs)?,
            false => quiet::wait(&boot_dirs, settle_time, |what| log.status(what))?,
        };
        // Disks may have been added, removed or moved to other slots during the wait.
        machine.refresh()?;
        let outcome = sync_once(machine, options, status, log)?;
        if let Some(outcome) = outcome
            && (options.dry_run || quiet::unchanged_since(&boot_dirs, &before)?)
        {
            return Ok(outcome);
        }
        log.info("the booted disk changed while it was copied; copying again");
    }
    bail!("the booted disk changed during {MAX_SYNCS} syncs in a row; the spares may not be up to date")
}

/// The spares that the options name, or all.
fn spares<'a>(machine: &'a Machine, options: &Options) -> impl Iterator<Item = &'a Disk> {
    let only = options.only;
    let all = machine.config.spares(&machine.booted).into_iter().map(|(_, spare)| spare);
    all.filter(move |spare| only.is_none_or(|only| only == spare.name))
}

/// Syncs every spare once. None where the booted disk changed while a spare was copied; that spare keeps its old entries.
fn sync_once(machine: &Machine, options: &Options, status: &mut Status, log: &mut Log) -> Result<Option<Outcome>> {
    if !options.dry_run {
        prepare(machine, log)?;
    }
    let mut outcome = Some(Outcome::Whole);
    let mut error: Option<anyhow::Error> = None;
    for disk in spares(machine, options) {
        // A failure of one spare doesn't stop the sync of the others.
        let synced = match machine.inventory.disk(disk).map_err(|e| refused(format!("{e:#}"))) {
            Ok(parts) if parts.is_empty() => {
                skip_absent(machine, disk, options, status, log)?;
                outcome = outcome.map(|outcome| outcome.max(Outcome::Absent));
                continue;
            }
            Ok(parts) => sync_spare(machine, disk, &parts, options, status, log),
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
                note_failure(machine, disk, &e, options, status)?;
                error = Some(keep_failure(error, e.context(disk.name.to_string()), log));
            }
        }
    }
    error.map_or(Ok(outcome), Err)
}

/// Saves the identifiers of the disks that are present, and removes the staged files of an interrupted copy to the booted disk.
fn prepare(machine: &Machine, log: &Log) -> Result<()> {
    if machine.drafts.is_empty() {
        idstore::save(&machine.ids)?;
    }
    for (dir, tree) in stage::left_here(Some(&machine.config))? {
        // This disk was written since, and so the staged files are older than its files.
        log.warning(&format!(
            "{}: a copy to this disk was interrupted, and was not completed while it booted. Its staged files are removed; files of \
             two generations may be there",
            dir.display()
        ));
        stage::discard(&tree)?;
    }
    Ok(())
}

/// Keeps one of two spares' errors for the end of the run, and reports the other. A failure is kept before a refusal, which says that nothing
/// was written.
fn keep_failure(earlier: Option<anyhow::Error>, error: anyhow::Error, log: &Log) -> anyhow::Error {
    let Some(earlier) = earlier else { return error };
    let (reported, kept) = if error.is::<Refused>() { (error, earlier) } else { (earlier, error) };
    log.failure(&reported);
    kept
}

fn skip_absent(machine: &Machine, disk: &Disk, options: &Options, status: &mut Status, log: &Log) -> Result<()> {
    let fault = Fault::new(Code::F21, format!("{} is not there; it was left out", disk.name)).of(disk.name);
    log.warning_about(&Subject::event(Event::SpareMissing, &fault), &fault.text);
    if !options.dry_run {
        // The disk may have been removed since the boot was noted.
        note_left_behind(machine, disk)?;
    }
    status.absent(disk);
    Ok(())
}

fn note_failure(machine: &Machine, disk: &Disk, error: &anyhow::Error, options: &Options, status: &mut Status) -> Result<()> {
    status.stopped(disk, error);
    match options.dry_run {
        true => Ok(()),
        false => note_left_behind(machine, disk),
    }
}

/// Notes on the booted disk that this spare lacks its changes from now on.
fn note_left_behind(machine: &Machine, spare: &Disk) -> Result<()> {
    let (esp, mut record) = own_record(machine)?;
    match record.left_behind(machine.booted.name, spare.name) {
        true => record.save(&esp),
        false => Ok(()),
    }
}

/// Takes one spare through the phases.
fn sync_spare(
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

    /// If the spare were booted later, it would otherwise overwrite the changes that were made on this disk meanwhile.
    #[test]
    fn f07_a_spare_that_a_sync_leaves_behind_is_older_from_then_on() {
        let boot = Path::new("/boot");
        // The machine that runs the tests may have a copy of its own to complete.
        if !nix::unistd::geteuid().is_root() || !boot.is_dir() || Path::new("/").join(stage::DIRECTORY).exists() {
            return;
        }
        // The tmpfs is the booted disk's ESP.
        enter_private_namespace().unwrap();
        scratch::run("mount", &["-ttmpfs", "none", "/boot"]);
        let _mounted = Mounted::at(boot);
        let esp = Below::open(boot).unwrap();
        esp.apply(&Change::MakeDir("EFI".into())).unwrap();
        let machine = machine::tests::machine(&[1, 2, 3]);
        let [booted, spare] = machine.config.disks.as_slice() else { panic!() };
        let run = |is_present: bool, dry_run: bool| {
            let (mut own_record, mut spare_record) = (Record::default(), Record::default());
            own_record.note_boot(&Root::new("/"), booted.name).unwrap();
            own_record.synced(booted.name, spare.name, &mut spare_record);
            own_record.save(&esp).unwrap();
            let (options, mut status) = (Options { dry_run, ..Options::default() }, Status::new(booted));
            let mut machine = machine::tests::machine(if is_present { &[1, 2, 3] } else { &[1, 2] });
            // With a draft, the sync saves no identifiers in /var/lib.
            machine.drafts = vec![Rewritten { path: "draft".into(), bytes: Vec::new() }];
            let outcome = sync_once(&machine, &options, &mut status, &mut Log::new());
            assert_eq!(outcome.is_ok(), !is_present, "{outcome:?}");
            spare_record.check(spare.name, booted.name, &Record::load(&esp, booted.name).unwrap())
        };
        for is_present in [true, false] {
            assert!(run(is_present, false).unwrap_err().is::<Refused>(), "{is_present}");
            run(is_present, true).unwrap();
        }
    }
}
