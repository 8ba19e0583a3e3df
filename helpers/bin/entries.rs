//! dualroot-entries(8): rewrites the files of the booted disk that name another disk of the pair.

use std::fs::{self, File};
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;
use dualroot::base::exit::{self, Exit};
use dualroot::base::log::Log;
use dualroot::base::privilege;
use dualroot::pair::machine::Machine;
use dualroot::sync::entries;

/// The file that makes a path unit start the sync.
const MARK: &str = "/run/dualroot/dirty";

/// Rewrite menu entries, fstab and similar files of the booted disk where they name another disk.
///
/// Exit status: 0 every file is right; 1 failed; 2 usage; 3 refused, nothing was written.
#[derive(Parser)]
#[command(name = "dualroot-entries", version)]
struct Arguments {
    /// Print the changes that would be made, and make none
    #[arg(long)]
    dry_run: bool,
    /// Also mark the booted disk as changed, which starts dualroot-sync.service
    #[arg(long)]
    mark: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let log = Log::new();
    exit::end(&log, run(&arguments, &log))
}

fn run(arguments: &Arguments, log: &Log) -> Result<Exit> {
    if !arguments.dry_run {
        privilege::require_root("dualroot-entries", Some("dualroot-entries.service"))?;
    }
    // The mark comes first: the sync reads the state itself, so it includes every change after the mark.
    if arguments.mark && !arguments.dry_run {
        fs::create_dir_all("/run/dualroot").context("/run/dualroot can't be made")?;
        File::create(MARK).with_context(|| format!("{MARK} can't be made"))?;
    }
    let Some(machine) = Machine::probe(log)? else { return Ok(Exit::Good) };
    let plan = entries::plan(&machine)?;
    for rewrite in &plan.rewrites {
        let line = format!("{}: {}", rewrite.dir.display(), rewrite.change);
        match arguments.dry_run {
            true => println!("{line}"),
            false => log.info(&line),
        }
    }
    if !plan.not_seen.is_empty() {
        let dirs: Vec<String> = plan.not_seen.iter().map(|dir| dir.display().to_string()).collect();
        return Err(privilege::not_seen("dualroot-entries", &dirs));
    }
    if !arguments.dry_run {
        entries::apply(&plan.rewrites)?;
    }
    Ok(Exit::Good)
}
