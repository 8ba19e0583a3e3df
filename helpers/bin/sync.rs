//! dualroot-sync(8): makes every spare a bootable copy of the booted disk.

use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;
use dualroot::base::log::Log;
use dualroot::base::refusal::{exit_status, refused};
use dualroot::base::root::Root;
use dualroot::base::types::DiskName;
use dualroot::boot::nvram;
use dualroot::devices::{held, mounts};
use dualroot::pair::machine::Machine;
use dualroot::pair::{booted, heal, lock};
use dualroot::sync;
use dualroot::sync::{Options, Outcome};

/// Make every spare disk a bootable copy of the booted disk.
///
/// Exit status: 0 every spare boots; 1 failed; 2 usage; 3 refused, nothing was written; 4 a spare isn't there.
#[derive(Parser)]
#[command(name = "dualroot-sync", version)]
struct Arguments {
    /// Print what would be done, and do nothing
    #[arg(long)]
    dry_run: bool,
    /// Overwrite this spare (disk0, disk1, …) even if it was booted since it was last synced: what only it holds is lost
    #[arg(long, value_name = "DISK", value_parser = DiskName::parse)]
    discard_spare: Vec<DiskName>,
    /// Have the firmware boot this disk the next time, and do nothing else
    #[arg(long, value_name = "DISK", value_parser = DiskName::parse, conflicts_with_all = ["discard_spare", "note_boot"])]
    boot_next: Option<DiskName>,
    /// Note that this disk was booted, and do nothing else; dualroot-booted.service does that
    #[arg(long, conflicts_with_all = ["discard_spare", "dry_run"])]
    note_boot: bool,
    /// Note that every disk holds all of the shared root again, and do nothing else; dualroot-heal.service does that
    #[arg(long, exclusive = true)]
    healed: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let mut log = Log::new();
    match run(&arguments, &mut log) {
        Ok(Outcome::Whole) => ExitCode::SUCCESS,
        Ok(Outcome::Broken) => ExitCode::from(1),
        Ok(Outcome::Absent) => ExitCode::from(4),
        Err(e) => {
            log.error(&format!("{e:#}"));
            ExitCode::from(exit_status(&e))
        }
    }
}

fn run(arguments: &Arguments, log: &mut Log) -> Result<Outcome> {
    if arguments.healed {
        return heal::healed(&Root::new("/")).map(|()| Outcome::Whole);
    }
    let notes = !arguments.dry_run && arguments.boot_next.is_none();
    if notes && !arguments.note_boot {
        // Before anything that may refuse: it may be the booted disk that has dropped out.
        match heal::note(&Root::new("/")) {
            Ok(true) => log.warning(
                "the shared root goes on without one of its disks; the firmware remembers that, so that the disk is not booted alone \
                 before it has been brought what is written from now on",
            ),
            Ok(false) => {}
            Err(e) => log.warning(&format!(
                "if the shared root goes on without one of its disks, that is not noted in the firmware: do not boot that disk alone, what \
                 is written now would be lost: {e:#}"
            )),
        }
    }
    // What is noted is short, and has to be.
    let _lock = lock::take(arguments.note_boot)?;
    if arguments.note_boot {
        return booted::note(&Root::new("/")).map(|()| Outcome::Whole);
    }
    // Also where there is no sync, for whatever reason.
    let noted = match notes {
        true => booted::note(&Root::new("/")),
        false => Ok(()),
    };
    let Some(mut machine) = Machine::look()? else {
        log.info("dualroot is not configured (/etc/dualroot.conf); nothing to do");
        return Ok(Outcome::Whole);
    };
    for warning in &machine.config.warnings {
        log.warning(warning);
    }
    let options = Options { dry_run: arguments.dry_run, discard: arguments.discard_spare.clone(), only: None };
    let named = options.discard.iter().chain(&arguments.boot_next);
    for name in named {
        if !machine.config.disks.iter().any(|disk| disk.name == *name) {
            return Err(refused(format!("there is no [{name}] in the configuration; nothing was done")));
        }
    }
    if options.discard.contains(&machine.booted.name) {
        return Err(refused(format!(
            "{0} is the disk that is booted, which is no spare; to give up what is on it, boot the other one and run this there",
            machine.booted.name
        )));
    }
    if let Some(disk) = machine.config.disks.iter().find(|disk| Some(disk.name) == arguments.boot_next) {
        for change in nvram::plan_next(&machine.firmware(), disk)? {
            match arguments.dry_run {
                true => println!("firmware: {change}"),
                false => nvram::apply(&machine.firmware(), &change)?,
            }
        }
        return Ok(Outcome::Whole);
    }
    held::enter_private_namespace()?;
    // The root's two halves are one matter, the boot partitions another.
    let root = heal::look(&machine.root, &machine.config)?;
    match root {
        heal::Root::Whole => {}
        heal::Root::Degraded => {
            log.warning(
                "the shared root goes on without one of its disks; what is written now is on one disk only, also if that disk has been put \
                 back, until the machine is rebooted with it",
            );
        }
        heal::Root::Behind => {
            log.error(
                "a disk was away while the shared root was written, and would not boot alone before dualroot-heal.service (scrub and \
                 balance, started now) has ended well",
            );
            if !arguments.dry_run {
                heal::start()?;
            }
        }
    }
    let done = sync::run(&mut machine, &options, noted, log);
    if !arguments.dry_run {
        mounts::start_spares(log);
    }
    // Also after a failover to this disk with the other one half dead, but not for a disk that may be the older one.
    if !done.may_be_older {
        match arguments.dry_run {
            true => nvram::plan(&machine.firmware())?.iter().for_each(|change| println!("firmware: {change}")),
            false => nvram::carry_out(&machine.firmware(), log)?,
        }
    }
    match (root, done.outcome) {
        (heal::Root::Behind, Ok(_)) | (heal::Root::Degraded, Ok(Outcome::Whole)) => Ok(Outcome::Broken),
        (_, outcome) => outcome,
    }
}
