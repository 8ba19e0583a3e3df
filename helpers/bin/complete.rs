//! dualroot-complete(8): completes, while a disk boots, the copy to it that was cut.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;
use dualroot::below::Below;
use dualroot::conf::Config;
use dualroot::log::Log;
use dualroot::root::Root;
use dualroot::stage::{self, Found};

/// Complete what was being copied to this disk when that was cut.
///
/// Exit status: 0 all is whole; 1 failed; 2 usage.
#[derive(Parser)]
#[command(name = "dualroot-complete", version)]
struct Arguments {
    /// The top directories of the file systems; without any, those of the running system
    directories: Vec<PathBuf>,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let log = Log::new();
    match run(&arguments, &log) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(e) => {
            log.error(&format!("{e:#}"));
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments, log: &Log) -> Result<bool> {
    let trees = match arguments.directories.as_slice() {
        [] => {
            let config = Config::load(&Root::new("/"));
            if let Err(e) = &config {
                log.warning(&format!("only / and /usr are looked at: {e:#}"));
            }
            stage::left_here(config.ok().flatten().as_ref())?
        }
        given => given.iter().map(|dir| Ok((dir.clone(), Below::open(dir)?))).collect::<Result<_>>()?,
    };
    let mut good = true;
    // One tree's trouble is not another's.
    for (dir, tree) in &trees {
        good &= one(dir, tree, log).unwrap_or_else(|e| {
            log.error(&format!("{e:#}"));
            false
        });
    }
    Ok(good)
}

fn one(dir: &Path, tree: &Below, log: &Log) -> Result<bool> {
    let shown = dir.display();
    let found = stage::complete(tree).with_context(|| {
        format!("{shown}: a copy to this disk was cut and can't be completed, so files of two generations may be there")
    })?;
    match &found {
        Found::Nothing => {}
        Found::Half => log.info(&format!("{shown}: removed what a copy to this disk that was cut had staged")),
        Found::Whole => log.warning(&format!("{shown}: a copy to this disk was cut, and is complete now")),
        Found::Unusable(why) => log.error(&format!(
            "{shown}: a copy to this disk was cut and can't be completed, as {why}; if files of two generations are there, boot \
             the other disk and start dualroot-sync.service"
        )),
    }
    Ok(!matches!(found, Found::Unusable(_)))
}
