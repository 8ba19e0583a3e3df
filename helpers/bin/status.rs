//! dualroot-status(8): reports the state of every disk, and what would happen if another one died now.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;
use dualroot::base::exit::{self, Exit};
use dualroot::base::log::Log;
use dualroot::base::refusal::refused;
use dualroot::base::root::Root;
use dualroot::conf::Config;
use dualroot::report::{Facts, Report};
use dualroot::write::below::Below;

/// Show the state of every disk, and what would happen if another one died now.
///
/// Exit status: 0 every spare boots; 1 failed, or a spare would not boot; 2 usage; 3 refused, or nothing is known; 4 a spare is missing.
#[derive(Parser)]
#[command(name = "dualroot-status", version)]
struct Arguments {
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Write metrics to a file for node_exporter's textfile collector instead; its name must end in .prom
    #[arg(long, value_name = "FILE", value_parser = metrics_file, conflicts_with = "json")]
    prometheus: Option<PathBuf>,
}

/// Accepts the files that the collector reads: those whose names end in .prom.
fn metrics_file(text: &str) -> Result<PathBuf, String> {
    let path = PathBuf::from(text);
    match path.extension().is_some_and(|end| end == "prom") && path.file_name().and_then(|name| name.to_str()).is_some() {
        true => Ok(path),
        false => Err("its name must end in .prom, because node_exporter reads no other files".to_owned()),
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let log = Log::new();
    exit::end(&log, run(&arguments, &log))
}

fn run(arguments: &Arguments, log: &Log) -> Result<Exit> {
    let made = report(log);
    if let Some(path) = &arguments.prometheus {
        // Without new metrics, those of an earlier run would still call the spares good.
        publish(path, made.as_ref().unwrap_or(&Report::unconfigured()))?;
    }
    let report = made?;
    if arguments.prometheus.is_some() {
        return Ok(report.exit);
    }
    if arguments.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print!("{}", report.text());
    }
    Ok(report.exit)
}

fn report(log: &Log) -> Result<Report> {
    let root = Root::new("/");
    let Some(config) = Config::load(&root).map_err(|e| refused(format!("{e:#}")))? else { return Ok(Report::unconfigured()) };
    // A report includes the warnings; a refusal would lose them.
    let warn = |_: &_| config.warnings.iter().for_each(|warning| log.warning(warning));
    let facts = Facts::gather(&root, &config).inspect_err(warn)?;
    Ok(Report::new(&facts))
}

fn publish(path: &Path, report: &Report) -> Result<()> {
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let name = path.file_name().and_then(|name| name.to_str()).context("the file has no name")?;
    Below::open(dir)?.publish(name, report.prometheus().into_bytes())
}
