//! dualroot-sync(8): makes every spare a bootable copy of the booted disk.

use std::process::ExitCode;

use clap::Parser;
use dualroot::base::exit::{self, Exit};
use dualroot::base::log::Log;
use dualroot::base::types::DiskName;
use dualroot::sync::session::{self, Task};
use dualroot::sync::{Options, Outcome};

/// Make every spare disk a bootable copy of the booted disk.
///
/// Exit status: 0 every spare boots; 1 failed, or a spare would not boot; 2 usage; 3 refused, nothing was written; 4 a spare is missing.
#[derive(Parser)]
#[command(name = "dualroot-sync", version)]
struct Arguments {
    /// Print the changes that would be made, and make none
    #[arg(long)]
    dry_run: bool,
    /// Overwrite this spare (disk0, disk1, …) even if it was booted since it was last synced; changes that only it holds are lost
    #[arg(long, value_name = "DISK", value_parser = DiskName::parse)]
    discard_spare: Vec<DiskName>,
    /// Make the firmware boot this disk the next time, and do nothing else
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
    let done = session::run(&task(&arguments), &mut log).map(exit_of);
    exit::end(&log, done)
}

fn exit_of(outcome: Outcome) -> Exit {
    match outcome {
        Outcome::Whole => Exit::Good,
        Outcome::Broken => Exit::Failed,
        Outcome::Absent => Exit::Absent,
    }
}

fn task(arguments: &Arguments) -> Task {
    match arguments {
        Arguments { healed: true, .. } => Task::Healed,
        Arguments { note_boot: true, .. } => Task::NoteBoot,
        Arguments { boot_next: Some(disk), dry_run, .. } => Task::BootNext { disk: *disk, dry_run: *dry_run },
        Arguments { dry_run, discard_spare, .. } => {
            Task::Sync(Options { dry_run: *dry_run, discard: discard_spare.clone(), only: None })
        }
    }
}
