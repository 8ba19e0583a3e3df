//! Noting that a disk was booted, because changes from then on are on this disk only (failure mode 7). This needs the disk's own ESP and
//! nothing else, so that it works whatever else is wrong with the machine.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::{Context, Result};

use crate::base::refusal::refused;
use crate::base::root::Root;
use crate::conf::Config;
use crate::devices::mounts;
use crate::pair::lineage::Record;
use crate::pair::machine::booted_esp;
use crate::write::below::Below;

/// The directories where the ESP of a booted disk may be mounted (Boot Loader Specification, UAPI.1).
const PLACES: [&str; 2] = ["/efi", "/boot"];

/// Notes in the booted disk's record that it was booted, and which spares are missing. Does nothing where dualroot isn't configured.
///
/// # Errors
/// An ESP that is unknown, isn't mounted, or can't be written; a record that can't be read.
pub fn note(root: &Root) -> Result<()> {
    // The sync reports a wrong configuration.
    match Config::load(root) {
        Ok(None) => Ok(()),
        Ok(Some(config)) => note_with(root, Some(&config)),
        Err(_) => note_with(root, None),
    }
}

/// As [`note`], with the configuration.
///
/// # Errors
/// As [`note`].
pub fn note_with(root: &Root, config: Option<&Config>) -> Result<()> {
    let (_, esp) = booted_esp(root)?;
    let device = fs::metadata(esp.device_path()).with_context(|| format!("the booted ESP {esp} is missing"))?.rdev();
    let table = mounts::table()?;
    let is_there = |dir: &&str| mounts::at(&table, Path::new(dir)).is_some_and(|mount| mount.is_of(device) && mount.root == "/");
    let dir = PLACES.into_iter().find(is_there).ok_or_else(|| {
        refused(format!(
            "the booted ESP {esp} is mounted neither on /efi nor on /boot, so the boot can't be noted on it; mount it there"
        ))
    })?;
    let below = Below::open(Path::new(dir))?;
    let booted = config.and_then(|config| config.booted(&esp));
    let (own, mut record) = Record::of_booted(&below, booted.map(|disk| disk.name)).with_context(|| dir.to_owned())?;
    record.note_boot(root, own)?;
    if let (Some(config), Some(booted)) = (config, booted) {
        for (_, spare) in config.spares(booted) {
            if !spare.parts.values().any(|part| Path::new(&part.device_path()).exists()) {
                record.left_behind(own, spare.name);
            }
        }
    }
    record.save(&below)
}
