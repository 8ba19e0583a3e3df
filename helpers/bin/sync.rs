//! dualroot-sync(8): makes every spare a bootable copy of the booted disk.

use std::fs::{self, File};
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;
use dualroot::log::Log;
use dualroot::machine::{Machine, Refused, refused};
use dualroot::sync::{Options, Outcome};
use dualroot::types::DiskName;
use dualroot::{heal, mounts, nvram, sync};

const LOCK: &str = "/run/dualroot/lock";

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
            ExitCode::from(if e.is::<Refused>() { 3 } else { 1 })
        }
    }
}

fn run(arguments: &Arguments, log: &mut Log) -> Result<Outcome> {
    let _lock = lock()?;
    let Some(mut machine) = Machine::look()? else {
        log.info("dualroot is not configured (/etc/dualroot.conf); nothing to do");
        return Ok(Outcome::Whole);
    };
    for warning in &machine.config.warnings {
        log.warning(warning);
    }
    let options = Options { dry_run: arguments.dry_run, discard: arguments.discard_spare.clone() };
    if let Some(unknown) = options.discard.iter().find(|d| !machine.config.disks.iter().any(|c| c.name == **d)) {
        return Err(refused(format!("there is no [{unknown}] in the configuration; nothing was done")));
    }
    mounts::enter_private_namespace()?;
    // The root's two halves are one matter, the boot partitions another.
    let root = heal::look(&machine);
    match root {
        heal::Root::Whole => {}
        heal::Root::Degraded => {
            log.warning("the shared root is mounted degraded, without one of its disks; what is written now is on one disk only");
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
    let mut outcome = sync::run(&mut machine, &options, log)?;
    if root == heal::Root::Behind {
        outcome = Outcome::Broken;
    }
    for change in nvram::plan(&machine)? {
        if arguments.dry_run {
            println!("firmware: {change}");
        } else if let Err(e) = nvram::apply(&machine, &change) {
            log.warning(&format!("the firmware's boot entries can't be written, so check them by hand (efibootmgr): {e:#}"));
        }
    }
    if !arguments.dry_run {
        start_mounts(log);
    }
    Ok(outcome)
}

/// One writer at a time (failure mode 23). The lock goes with the process, however that ends.
fn lock() -> Result<File> {
    fs::create_dir_all("/run/dualroot").context("/run/dualroot can't be made (this has to run as root)")?;
    let file = File::create(LOCK).with_context(|| format!("{LOCK} can't be made"))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(fs::TryLockError::WouldBlock) => Err(refused("another sync is running; nothing was done")),
        Err(fs::TryLockError::Error(e)) => Err(e).context(LOCK),
    }
}

/// Has systemd make the spares' mounts that could not be made at boot, for lack of a directory to mount them on.
fn start_mounts(log: &Log) {
    let Ok(units) = fs::read_dir("/run/systemd/generator") else { return };
    let table = mounts::table().unwrap_or_default();
    for unit in units.flatten() {
        let name = unit.file_name();
        let Some(name) = name.to_str().filter(|n| n.starts_with("mnt-root") && n.ends_with(".mount")) else { continue };
        let text = fs::read_to_string(unit.path()).unwrap_or_default();
        let values = |key: &'static str| text.lines().filter_map(move |line| line.strip_prefix(key));
        // systemd would wait for the device of an absent spare; what is mounted needs no start.
        if !values("What=").all(|device| Path::new(device).exists())
            || values("Where=").any(|dir| mounts::at(&table, Path::new(dir)).is_some())
        {
            continue;
        }
        if let Err(e) = dualroot::program::output("systemctl", ["start", "--no-block", name].map(Into::into)) {
            log.warning(&format!("{name} can't be started: {e:#}"));
        }
    }
}
