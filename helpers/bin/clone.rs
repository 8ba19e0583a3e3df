//! dualroot-clone(8): makes a blank disk a spare, or the first disk of another machine.

use std::fs;
use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, anyhow};
use clap::Parser;
use dualroot::base::exit::{self, Exit};
use dualroot::base::log::Log;
use dualroot::base::refusal::{nothing_done, refused};
use dualroot::base::root::Root;
use dualroot::base::types::DiskName;
use dualroot::base::{privilege, program};
use dualroot::clone::container::Secret;
use dualroot::clone::target::Target;
use dualroot::clone::template::identity::HostName;
use dualroot::clone::template::origin::Origin;
use dualroot::clone::{ClonePlan, Request, template};
use dualroot::conf::edit::FILE;
use dualroot::pair::lock;

/// Erase a disk, and make it a bootable copy of the booted disk.
///
/// Exit status: 0 the disk boots; 1 failed; 2 wrong arguments; 3 refused, nothing was written.
#[derive(Parser)]
#[command(name = "dualroot-clone", version)]
struct Arguments {
    /// The disk, such as /dev/sdb; everything on it is lost
    disk: PathBuf,
    /// Print the disk's contents now and afterwards, and write nothing
    #[arg(long)]
    dry_run: bool,
    /// Erase without a question; name the disk again by its path, its name or its serial number
    #[arg(long, value_name = "DISK")]
    yes_erase: Option<String>,
    /// Replace this disk of the configuration (disk0, disk1, …), which is missing
    #[arg(long, value_name = "DISK", value_parser = DiskName::parse)]
    replace: Option<DiskName>,
    /// Partition it like the disk of its name in this layout.json, instead of like the booted disk
    #[arg(long, value_name = "FILE")]
    layout: Option<PathBuf>,
    /// Read the passphrase of the root's LUKS container from this file; the copy gets the same one
    #[arg(long, value_name = "FILE")]
    key_file: Option<PathBuf>,
    /// On a machine without a configuration: mirror the root, a btrfs, to this disk, so that the disks share it
    #[arg(long, conflicts_with = "replace")]
    shared_root: bool,
    /// Make it the first disk of another machine, from a template: the tree of a system, here or on a host that ssh reaches
    #[arg(long, value_name = "DIR|HOST:DIR", value_parser = Origin::parse, conflicts_with_all = ["replace", "shared_root", "key_file"])]
    template: Option<Origin>,
    /// The name of that machine
    #[arg(long, value_name = "NAME", value_parser = HostName::parse, requires = "template")]
    hostname: Option<HostName>,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let mut log = Log::new();
    let done = run(&arguments, &mut log);
    exit::end(&log, done)
}

fn run(arguments: &Arguments, log: &mut Log) -> Result<Exit> {
    if arguments.dry_run && !privilege::is_root() {
        return Err(privilege::not_seen("dualroot-clone", &["the partitions and file systems of the disks".to_owned()]));
    }
    privilege::require_root("dualroot-clone", None)?;
    let root = Root::new("/");
    let _lock = lock::take(false).map_err(nothing_done)?;
    if let Some(origin) = &arguments.template {
        return install(arguments, origin, &root, log).map(|()| Exit::Good);
    }
    let request = Request {
        disk: arguments.disk.clone(),
        replace: arguments.replace,
        layout: arguments.layout.clone(),
        shared_root: arguments.shared_root,
    };
    let plan = ClonePlan::new(&root, &request, log).map_err(nothing_done)?;
    print!("{}", plan.describe());
    if arguments.dry_run {
        return Ok(Exit::Good);
    }
    confirm(arguments, &plan.disk.target)?;
    let secret = read_secret(&plan, arguments.key_file.as_deref()).map_err(nothing_done)?;
    // After this, an error may no longer say that nothing was done.
    plan.check_again(&root).map_err(nothing_done)?;
    if let Some(secret) = &secret {
        let path = plan.disk.target.path();
        plan.add_sync_key(&root, secret)
            .map_err(|e| anyhow!("{e:#}; nothing was done to {path}, but the key for syncs may have been added"))?;
    }
    let machine = plan.make_disk(&root, secret.as_ref(), log).map_err(erased)?;
    plan.activate(machine, log).map_err(|e| {
        anyhow!("{e:#}; {FILE} names the new disk already; fix that, and 'systemctl start dualroot-sync.service' does the rest")
    })?;
    Ok(Exit::Good)
}

/// Reads the secret of the booted disk's LUKS containers from the file or the terminal; None if it has no container.
fn read_secret(plan: &ClonePlan, file: Option<&Path>) -> Result<Option<Secret>> {
    let Some(first) = plan.containers().first() else {
        return match file {
            None => Ok(None),
            Some(_) => Err(refused(
                "the booted disk has no LUKS container that --key-file could open; nothing was done. Leave the option out",
            )),
        };
    };
    let bytes = match file {
        Some(file) => fs::read(file).with_context(|| file.display().to_string())?,
        None if !io::stdin().is_terminal() => {
            return Err(refused(
                "there is no terminal to ask for a passphrase on; give it with '--key-file FILE'; nothing was done",
            ));
        }
        None => {
            let question = format!("Passphrase of {first}, which will open the copy, too:");
            let typed = program::output_on_terminal("systemd-ask-password", ["--id=dualroot-clone".into(), question.into()])?;
            typed.strip_suffix(b"\n").unwrap_or(&typed).to_vec()
        }
    };
    let secret = Secret::new(bytes);
    plan.containers().iter().try_for_each(|device| secret.check(device))?;
    Ok(Some(secret))
}

/// Makes the disk the first one of another machine.
fn install(arguments: &Arguments, origin: &Origin, root: &Root, log: &Log) -> Result<()> {
    let request = template::Request { disk: arguments.disk.clone(), origin: origin.clone(), layout: arguments.layout.clone() };
    let plan = template::InstallPlan::new(root, &request, log).map_err(nothing_done)?;
    print!("{}", plan.describe());
    if arguments.dry_run {
        return Ok(());
    }
    let name = match &arguments.hostname {
        Some(name) => name.clone(),
        None => {
            let typed = ask("The name of the new machine: ", "give the name of the new machine with '--hostname NAME'")?;
            HostName::parse(typed.trim()).map_err(nothing_done)?
        }
    };
    confirm(arguments, &plan.disk.target)?;
    plan.check_again(root).map_err(nothing_done)?;
    plan.install(root, &name, log).map_err(erased)
}

/// Adds to an error that the disk was erased.
fn erased(error: anyhow::Error) -> anyhow::Error {
    anyhow!("{error:#}; the disk was erased; fix that, and run this again")
}

/// Checks that the user named this disk, in the option or on the terminal.
fn confirm(arguments: &Arguments, target: &Target) -> Result<()> {
    let named = match &arguments.yes_erase {
        Some(named) => named.clone(),
        None => {
            let name = target.serial().unwrap_or_else(|| target.path()).escape_debug();
            ask(
                &format!("To erase it, type its serial number or its name ({name}): "),
                &format!("confirm with '--yes-erase {}'", target.path()),
            )?
        }
    };
    match target.is_named(named.trim()) {
        true => Ok(()),
        false => Err(refused(format!(
            "'{}' is neither the name nor the serial number of {}; nothing was done",
            named.trim().escape_debug(),
            target.path()
        ))),
    }
}

/// Asks a question on the terminal. Without one, the refusal gives `instead` as advice.
fn ask(question: &str, instead: &str) -> Result<String> {
    if !io::stdin().is_terminal() {
        return Err(refused(format!("there is no terminal to ask on; {instead}; nothing was done")));
    }
    print!("{question}");
    io::stdout().flush().context("standard output")?;
    let mut line = String::new();
    io::stdin().read_line(&mut line).context("standard input")?;
    Ok(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_template_excludes_the_options_that_it_does_not_use() {
        let parsed = |more: &[&str]| Arguments::try_parse_from(["x", "/dev/x", "--template", "/srv"].iter().chain(more)).is_ok();
        assert!(parsed(&["--hostname", "a"]) && parsed(&["--layout", "x"]));
        for more in [&["--key-file", "x"][..], &["--replace", "disk0"], &["--shared-root"]] {
            assert!(!parsed(more), "{more:?}");
        }
    }
}
