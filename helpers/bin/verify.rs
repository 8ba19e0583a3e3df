//! dualroot-verify(8): reads the spares' boot files from the medium, and reports those that differ from the last sync.

use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;
use dualroot::base::exit::{self, Exit};
use dualroot::base::log::Log;
use dualroot::base::privilege;
use dualroot::devices::held;
use dualroot::pair::lock;
use dualroot::pair::machine::Machine;
use dualroot::pair::status::Status;
use dualroot::trial::verify;

/// Read every boot file of the spare disks from the medium, and compare it with the last sync's.
///
/// Exit status: 0 every spare is whole; 1 failed, or something is damaged; 2 usage; 3 refused, a spare was not read; 4 a spare is missing.
#[derive(Parser)]
#[command(name = "dualroot-verify", version)]
struct Arguments {}

fn main() -> ExitCode {
    Arguments::parse();
    let log = Log::new();
    exit::end(&log, run(&log))
}

fn run(log: &Log) -> Result<Exit> {
    privilege::require_root("dualroot-verify", Some("dualroot-verify.service"))?;
    // The files that a sync is writing match neither the old ones nor the new ones.
    log.status("waiting for a sync to end, if one is running");
    let _lock = lock::take(true)?;
    let Some(machine) = Machine::probe(log)? else { return Ok(Exit::Good) };
    held::enter_private_namespace()?;
    let mut status = Status::load(&machine.root, &machine.config, &machine.booted)?;
    let standing = verify::run(&machine, &mut status, log);
    if let Err(e) = status.save() {
        log.warning(&format!("{e:#}; dualroot-status won't show this verification"));
    }
    Ok(standing.exit())
}
