//! dualroot-complete(8): completes an interrupted copy to a disk while that boots.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::Parser;
use dualroot::base::exit::{self, Exit};
use dualroot::base::log::Log;
use dualroot::base::privilege;
use dualroot::base::root::Root;
use dualroot::conf::Config;
use dualroot::copy::stage::{self, Found};
use dualroot::devices::held::Held;
use dualroot::devices::{held, mounts};
use dualroot::write::below::Below;

/// Complete a copy to this disk that was interrupted.
///
/// Exit status: 0 every file is whole; 1 failed; 2 usage; 3 refused, nothing was written.
#[derive(Parser)]
#[command(name = "dualroot-complete", version)]
struct Arguments {
    /// The top directories of the file systems; by default those of the running system
    directories: Vec<PathBuf>,
    /// The directory on which an initrd mounted the root: complete it and its /usr, even if they are mounted read-only
    #[arg(long, value_name = "directory", conflicts_with = "directories")]
    root: Option<PathBuf>,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    // In an initrd, units/initrd/complete.sh brings messages to the kernel's log.
    let log = if arguments.root.is_some() { Log::with_levels() } else { Log::new() };
    exit::end(&log, run(&arguments, &log))
}

fn run(arguments: &Arguments, log: &Log) -> Result<Exit> {
    privilege::require_root("dualroot-complete", Some("dualroot-complete.service"))?;
    if let Some(root) = &arguments.root {
        if mounts::at(&mounts::table()?, root).is_none() {
            bail!("nothing is mounted at {}", root.display());
        }
        held::enter_private_namespace()?;
        let trees = [("/", root.clone()), ("/usr", root.join("usr"))];
        return Ok(all(trees, log, |(shown, dir)| mounted(Path::new(shown), dir, log)));
    }
    let trees = match arguments.directories.as_slice() {
        [] => {
            let config = Config::load(&Root::new("/"));
            if let Err(e) = &config {
                log.warning(&format!("{e:#}; only / and /usr are checked for interrupted copies"));
            }
            stage::left_here(config.ok().flatten().as_ref())?
        }
        given => given.iter().map(|dir| Ok((dir.clone(), Below::open(dir)?))).collect::<Result<_>>()?,
    };
    Ok(all(trees, log, |(dir, tree)| one(dir, tree, log)))
}

/// Completes every tree. An error in one tree is reported, and the others are completed anyway.
fn all<T>(trees: impl IntoIterator<Item = T>, log: &Log, complete: impl Fn(&T) -> Result<bool>) -> Exit {
    let mut good = true;
    for tree in trees {
        good &= complete(&tree).unwrap_or_else(|e| {
            log.error(&format!("{e:#}"));
            false
        });
    }
    if good { Exit::Good } else { Exit::Failed }
}

/// Completes the file system that is mounted at `dir`, and that messages call `shown`. Without a mount, there is nothing to do.
fn mounted(shown: &Path, dir: &Path, log: &Log) -> Result<bool> {
    let Some(mut held) = Held::over(dir)? else { return Ok(true) };
    if held.below()?.stat(OsStr::new(stage::DIRECTORY))?.is_none() {
        return Ok(true);
    }
    held.make_writable()
        .with_context(|| format!("{}: a copy to this disk was interrupted and can't be completed", shown.display()))?;
    let good = one(shown, held.below()?, log)?;
    held.release()?;
    Ok(good)
}

fn one(dir: &Path, tree: &Below, log: &Log) -> Result<bool> {
    let shown = dir.display();
    let found = stage::complete(tree).with_context(|| {
        format!("{shown}: a copy to this disk was interrupted and can't be completed, so it may hold files of two generations")
    })?;
    match &found {
        Found::Nothing => {}
        Found::Half => log.info(&format!("{shown}: a copy to this disk was interrupted early; its staged files are removed")),
        Found::Whole => log.warning(&format!("{shown}: a copy to this disk was interrupted, and is complete now")),
        Found::Unusable(why) => log.error(&format!(
            "{shown}: a copy to this disk was interrupted and can't be completed, because {why}; it may hold files of two generations. \
             If so, boot the other disk and start dualroot-sync.service"
        )),
    }
    Ok(!matches!(found, Found::Unusable(_)))
}
