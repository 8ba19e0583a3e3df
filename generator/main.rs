//! dualroot-generator(8): finds the booted disk of the pair, and writes the mount units that follow from it.
//!
//! It reads facts ([`facts`]), makes a plan from them alone ([`plan`]), and turns the plan into the text of units ([`units`]), which are
//! written. It reads efivarfs, sysfs and small files, never a disk: all generators share one time-out, and a failing spare must not hold
//! up the boot.

#![cfg_attr(not(test), deny(clippy::string_slice))]

mod facts;
mod plan;
mod units;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Result;
use dualroot::base::exit::Exit;
use dualroot::base::log::{Level, Log};
use dualroot::base::root::Root;

use crate::facts::FactsOrReason;

/// The text of `--help`.
const HELP: &str = "\
Write the mount units that follow from which disk of the pair was booted. systemd runs this at every boot (systemd.generator(7)).

Usage: dualroot-generator NORMAL-DIR [EARLY-DIR LATE-DIR]

Options:
  -h, --help     Print help
  -V, --version  Print version

Exit status: 0 the units were written, or there was nothing to do; 1 failed; 2 usage.
";

/// The request in the arguments.
enum Call {
    Help,
    Version,
    /// Units in this directory.
    Units(PathBuf),
}

fn main() -> ExitCode {
    let args: Vec<OsString> = std::env::args_os().skip(1).collect();
    let normal = match parse(&args) {
        Ok(Call::Help) => {
            print!("{HELP}");
            return Exit::Good.into();
        }
        Ok(Call::Version) => {
            println!("dualroot-generator {}", env!("CARGO_PKG_VERSION"));
            return Exit::Good.into();
        }
        Ok(Call::Units(normal)) => normal,
        Err(sentence) => {
            eprintln!("dualroot-generator: {sentence}; nothing was written. See 'dualroot-generator --help'.");
            return Exit::Usage.into();
        }
    };
    let root = Root::from_env();
    let log = Log::to_kernel(&root, "dualroot-generator");
    match run(&root, &normal, &log) {
        Ok(()) => Exit::Good.into(),
        Err(e) => {
            log.line(Level::Error, &format!("{e:#}"));
            Exit::Failed.into()
        }
    }
}

/// Reads the arguments: the normal, early and late directories, or for tests one that stands for all.
fn parse(args: &[OsString]) -> Result<Call, String> {
    if let [only] = args {
        match only.to_str() {
            Some("-h" | "--help") => return Ok(Call::Help),
            Some("-V" | "--version") => return Ok(Call::Version),
            _ => {}
        }
    }
    // A relative path is no directory of systemd's; an option that doesn't exist is among them.
    if let Some(other) = args.iter().find(|arg| !Path::new(arg).is_absolute()) {
        return Err(format!("'{}' is no absolute path of a directory", other.to_string_lossy().escape_debug()));
    }
    match args {
        [normal] | [normal, _, _] => Ok(Call::Units(normal.into())),
        _ => Err(format!("expected one or three directories as arguments, found {}", args.len())),
    }
}

/// Reads facts, plans and writes. If there is nothing to do, it writes nothing and succeeds.
fn run(root: &Root, normal: &Path, log: &Log) -> Result<()> {
    let env = |name: &str| std::env::var_os(name);
    let facts = match facts::read(root, env, |warning| log.line(Level::Warning, warning))? {
        FactsOrReason::Reason(level, reason) => {
            log.line(level, &format!("no mount units are made: {reason}"));
            return Ok(());
        }
        FactsOrReason::Facts(facts) => facts,
    };
    let plan = plan::make(&facts)?;
    for (level, note) in &plan.notes {
        log.line(*level, note);
    }
    units::write(normal, &units::files(&plan)?)
}
