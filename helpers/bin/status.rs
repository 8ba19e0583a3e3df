//! dualroot-status(8): what would happen if a disk died now.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;
use dualroot::base::exit::{self, Exit};
use dualroot::base::log::Log;
use dualroot::report::{Facts, Report};
use dualroot::write::below::Below;

/// Show how it stands with every disk, and what would happen if another one died now.
///
/// Exit status: 0 every spare boots; 1 failed, or a spare would not boot; 2 usage; 3 refused, or nothing is known; 4 a spare isn't there.
#[derive(Parser)]
#[command(name = "dualroot-status", version)]
struct Arguments {
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Print nothing, and write metrics to a file for node_exporter's textfile collector; its name must end in .prom
    #[arg(long, value_name = "FILE", value_parser = metrics_file, conflicts_with = "json")]
    prometheus: Option<PathBuf>,
}

/// The collector reads no other files.
fn metrics_file(text: &str) -> Result<PathBuf, String> {
    let path = PathBuf::from(text);
    match path.extension().is_some_and(|end| end == "prom") && path.file_name().and_then(|name| name.to_str()).is_some() {
        true => Ok(path),
        false => Err("its name must end in .prom, as node_exporter reads no other".to_owned()),
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    exit::end(&Log::new(), run(&arguments))
}

fn run(arguments: &Arguments) -> Result<Exit> {
    let report = Facts::gather()?.map_or_else(Report::unconfigured, |facts| Report::new(&facts));
    if let Some(path) = &arguments.prometheus {
        let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let name = path.file_name().and_then(|name| name.to_str()).context("the file has no name")?;
        Below::open(dir)?.publish(name, report.prometheus().into_bytes())?;
    } else if arguments.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print!("{}", report.text());
    }
    Ok(report.exit)
}
