//! dualroot-clone(8): makes a blank disk a spare, or the first disk of another machine.

use std::fs;
use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, anyhow};
use clap::Parser;
use dualroot::base::log::Log;
use dualroot::base::program;
use dualroot::base::refusal::{exit_status, nothing_done, refused};
use dualroot::base::root::Root;
use dualroot::base::types::DiskName;
use dualroot::clone::container::Secret;
use dualroot::clone::target::Target;
use dualroot::clone::template::identity::HostName;
use dualroot::clone::template::origin::Origin;
use dualroot::clone::{Job, Wish, template};
use dualroot::conf::edit::FILE;
use dualroot::pair::lock;

/// Erase a disk, and make it a bootable copy of the booted disk.
///
/// Exit status: 0 the disk boots; 1 failed; 2 usage; 3 refused, nothing was written.
#[derive(Parser)]
#[command(name = "dualroot-clone", version)]
struct Arguments {
    /// The disk, as /dev/sdb; everything on it is lost
    disk: PathBuf,
    /// Print what is on the disk and what would be done, and do nothing
    #[arg(long)]
    dry_run: bool,
    /// Don't ask; the disk is named again here, by its path, its name or its serial number
    #[arg(long, value_name = "DISK")]
    yes_erase: Option<String>,
    /// The disk takes the place of this one of the configuration (disk0, disk1, …), which is gone
    #[arg(long, value_name = "DISK", value_parser = DiskName::parse)]
    replace: Option<DiskName>,
    /// Make it like the disk of its name in this file, a layout.json, and not like the booted one
    #[arg(long, value_name = "FILE")]
    layout: Option<PathBuf>,
    /// The root lies in a LUKS container: this file holds the passphrase that opens it, and is to open the copy, too
    #[arg(long, value_name = "FILE")]
    key_file: Option<PathBuf>,
    /// On a machine that isn't configured yet: let the disks share the root, a btrfs, by mirroring it to this one
    #[arg(long, conflicts_with = "replace")]
    shared_root: bool,
    /// Make it the first disk of another machine, from a template: a system's tree, here or behind ssh
    #[arg(long, value_name = "DIR|HOST:DIR", value_parser = Origin::parse, conflicts_with_all = ["replace", "shared_root", "key_file"])]
    template: Option<Origin>,
    /// The name of that machine
    #[arg(long, value_name = "NAME", value_parser = HostName::parse, requires = "template")]
    hostname: Option<HostName>,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let mut log = Log::new();
    match run(&arguments, &mut log) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            log.error(&format!("{e:#}"));
            ExitCode::from(exit_status(&e))
        }
    }
}

fn run(arguments: &Arguments, log: &mut Log) -> Result<()> {
    let root = Root::new("/");
    let _lock = lock::take(false).map_err(nothing_done)?;
    if let Some(origin) = &arguments.template {
        return install(arguments, origin, &root, log);
    }
    let wish = Wish {
        disk: arguments.disk.clone(),
        replace: arguments.replace,
        layout: arguments.layout.clone(),
        shared_root: arguments.shared_root,
    };
    let job = Job::plan(&root, &wish).map_err(nothing_done)?;
    print!("{}", job.told());
    if arguments.dry_run {
        return Ok(());
    }
    confirm(arguments, &job.disk.target)?;
    let secret = secret(&job, arguments.key_file.as_deref()).map_err(nothing_done)?;
    // From here on, it isn't true any more that nothing was written.
    job.check_again(&root).map_err(nothing_done)?;
    if let Some(secret) = &secret {
        let path = job.disk.target.path();
        job.give_key(&root, secret)
            .map_err(|e| anyhow!("{e:#}; nothing was done to {path}, but the key for syncs may be there"))?;
    }
    let machine = job.make(&root, secret.as_ref(), log).map_err(erased)?;
    job.start(machine, log).map_err(|e| {
        anyhow!(
            "{e:#}; {FILE} names the disk already: once that is mended, 'systemctl start dualroot-sync.service' does what is left"
        )
    })
}

/// What opens the booted disk's LUKS containers, where it has any.
fn secret(job: &Job, file: Option<&Path>) -> Result<Option<Secret>> {
    let Some(first) = job.containers().first() else {
        return match file {
            None => Ok(None),
            Some(_) => {
                Err(refused("--key-file is given, but nothing of the booted disk lies in a LUKS container; nothing was done"))
            }
        };
    };
    let bytes = match file {
        Some(file) => fs::read(file).with_context(|| file.display().to_string())?,
        None if !io::stdin().is_terminal() => {
            return Err(refused("nobody is there to be asked for a passphrase; '--key-file FILE' gives it; nothing was done"));
        }
        None => {
            let question = format!("Passphrase of {first}, which will open the copy, too:");
            let said = program::asked("systemd-ask-password", ["--id=dualroot-clone".into(), question.into()])?;
            said.strip_suffix(b"\n").unwrap_or(&said).to_vec()
        }
    };
    let secret = Secret::new(bytes);
    job.containers().iter().try_for_each(|device| secret.check(device))?;
    Ok(Some(secret))
}

/// Makes the disk another machine's.
fn install(arguments: &Arguments, origin: &Origin, root: &Root, log: &Log) -> Result<()> {
    let wish = template::Wish { disk: arguments.disk.clone(), origin: origin.clone(), layout: arguments.layout.clone() };
    let job = template::Job::plan(root, &wish).map_err(nothing_done)?;
    print!("{}", job.told());
    if arguments.dry_run {
        return Ok(());
    }
    let name = match &arguments.hostname {
        Some(name) => name.clone(),
        None => {
            let typed = ask("The name of the new machine: ", "'--hostname NAME' gives the name of the new machine")?;
            HostName::parse(typed.trim()).map_err(nothing_done)?
        }
    };
    confirm(arguments, &job.disk.target)?;
    job.check_again(root).map_err(nothing_done)?;
    job.run(root, &name, log).map_err(erased)
}

fn erased(error: anyhow::Error) -> anyhow::Error {
    anyhow!("{error:#}; the disk was erased; once that is mended, run this again")
}

/// Whether it is this disk that is meant.
fn confirm(arguments: &Arguments, target: &Target) -> Result<()> {
    let named = match &arguments.yes_erase {
        Some(named) => named.clone(),
        None => {
            let name = target.serial().unwrap_or_else(|| target.path()).escape_debug();
            ask(
                &format!("To erase it, type its serial number or its name ({name}): "),
                &format!("'--yes-erase {}' says that it is meant", target.path()),
            )?
        }
    };
    match target.is_named(named.trim()) {
        true => Ok(()),
        false => {
            Err(refused(format!("'{}' is not what {} is called; nothing was done", named.trim().escape_debug(), target.path())))
        }
    }
}

/// What somebody types who is asked. Where nobody is there, `instead` says what to do.
fn ask(question: &str, instead: &str) -> Result<String> {
    if !io::stdin().is_terminal() {
        return Err(refused(format!("nobody is there to be asked; {instead}")));
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
    fn what_a_template_makes_no_use_of_is_no_option_with_it() {
        let parsed = |more: &[&str]| Arguments::try_parse_from(["x", "/dev/x", "--template", "/srv"].iter().chain(more)).is_ok();
        assert!(parsed(&["--hostname", "a"]) && parsed(&["--layout", "x"]));
        for more in [&["--key-file", "x"][..], &["--replace", "disk0"], &["--shared-root"]] {
            assert!(!parsed(more), "{more:?}");
        }
    }
}
