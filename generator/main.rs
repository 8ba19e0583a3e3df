//! dualroot-generator(8): finds the booted disk of the pair, and writes the mount units that follow from it.
//!
//! It reads facts ([`facts`]), makes a plan from them alone ([`plan`]), and turns the plan into the text of units ([`units`]), which are
//! written. It reads efivarfs, sysfs and small files, never a disk: all generators share one time-out, and a failing spare must not hold
//! up the boot.

#![cfg_attr(not(test), deny(clippy::string_slice))]

mod facts;
mod log;
mod plan;
mod units;

use std::ffi::OsString;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Result, bail};
use dualroot::base::root::Root;

use crate::facts::FactsOrReason;
use crate::log::{Level, Log};

fn main() -> ExitCode {
    let root = Root::from_env();
    let mut log = Log::open(&root);
    match run(&root, &mut log) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            log.line(Level::Error, &format!("{e:#}"));
            ExitCode::FAILURE
        }
    }
}

/// Reads facts, plans and writes. If there is nothing to do, it writes nothing and succeeds.
fn run(root: &Root, log: &mut Log) -> Result<()> {
    let args: Vec<OsString> = std::env::args_os().skip(1).collect();
    // systemd.generator(7): the normal, early and late directories; for tests one that stands for all.
    let ([normal] | [normal, _, _]) = &args[..] else {
        bail!("expected one or three directories as arguments, found {}", args.len());
    };
    if normal.is_empty() {
        bail!("expected a directory as the first argument, found an empty one");
    }
    let facts = match facts::read(root, |name| std::env::var_os(name))? {
        FactsOrReason::Reason(level, reason) => {
            log.line(level, &format!("no mount units are made: {reason}"));
            return Ok(());
        }
        FactsOrReason::Facts(facts) => facts,
    };
    for warning in &facts.config.warnings {
        log.line(Level::Warning, warning);
    }
    let plan = plan::make(&facts)?;
    for (level, note) in &plan.notes {
        log.line(*level, note);
    }
    units::write(Path::new(normal), &units::files(&plan)?)
}
