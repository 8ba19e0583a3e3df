//! LUKS containers of spares: cryptsetup(8) opens them, as a service, with a key that lies on every disk's root.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::{Context, Result};

use crate::base::log::Log;
use crate::base::program;
use crate::base::types::{PartUuid, Role, UnitName};
use crate::devices::inventory::Partition;
use crate::pair::machine::{Machine, refused};

/// The key that opens the containers of all disks. It is in the containers itself, and copied with the roots.
pub const KEY: &str = "/etc/cryptsetup-keys.d/dualroot.key";

/// It has no fewer bytes than this: it is as random as it is long, and no more is done to make guesses slow.
pub const LEAST: u64 = 64;

/// The device node of what the container on a partition holds, once dualroot-luks@.service has opened it.
pub fn mapping(part: &PartUuid) -> String {
    format!("/dev/mapper/dualroot-{part}")
}

/// Opens the container on a partition.
///
/// # Errors
/// A service that fails: what to look at.
pub fn open(part: &PartUuid) -> Result<()> {
    let unit = UnitName::luks(part)?;
    let run = |verb: &str| program::output("systemctl", [verb, unit.as_str()].map(Into::into));
    let mut started = run("start");
    // Closed by somebody else, it is still open to systemd.
    if started.is_ok() && !Path::new(&mapping(part)).exists() {
        started = run("restart");
    }
    started.map(drop).with_context(|| {
        format!(
            "the LUKS container on {part} can't be opened by {KEY}; see 'systemctl status {unit}'; if files on it were open when the disk \
             was pulled, what they are on is still in use ('dmsetup info')"
        )
    })
}

/// Closes it.
///
/// # Errors
/// A container that is in use.
pub fn close(part: &PartUuid) -> Result<()> {
    program::output("systemctl", ["stop", UnitName::luks(part)?.as_str()].map(Into::into)).map(drop)
}

/// Opens what of the spares is said to lie in containers, is there, and is closed. Whether anything was opened.
pub fn open_spares(machine: &Machine, log: &Log) -> bool {
    let trees = &machine.config.settings.luks;
    if trees.is_empty() {
        return false;
    }
    let mut opened = false;
    match has_key() {
        Ok(true) => {}
        Ok(false) => log.warning(&format!("{KEY} is not there, and opens no spare's LUKS container; see dualroot(7)")),
        Err(e) => log.warning(&format!("{e:#}")),
    }
    for (_, disk) in machine.config.spares(&machine.booted) {
        for partuuid in trees.iter().filter_map(|role| disk.parts.get(role)) {
            // Whatever else there is to say of it is said where it is needed.
            if machine.inventory.is_closed(partuuid) {
                match open(partuuid) {
                    Ok(()) => opened = true,
                    Err(e) => log.warning(&format!("{}: {e:#}", disk.name)),
                }
            }
        }
    }
    opened
}

/// What is secret on the booted disk stays so on a spare: a tree that lies in a container is copied into one.
///
/// # Errors
/// A refusal where it is otherwise, or where the configuration doesn't say so.
pub fn check(machine: &Machine, role: &Role, part: &Partition) -> Result<()> {
    let own = machine.booted.parts.get(role).map(|own| machine.inventory.find(own)).transpose()?.flatten();
    let kind = |part: &Partition| if part.container.is_some() { "a LUKS container" } else { "none" };
    if let Some(own) = own.filter(|own| own.container.is_some() != part.container.is_some()) {
        return Err(refused(format!(
            "{role}= lies in {} on {}, {}, and in {} on {}; make it the same on both ('cryptsetup luksFormat', and a file system in it)",
            kind(own),
            machine.booted.name,
            own.path,
            kind(part),
            part.path
        )));
    }
    if part.container.is_some() && role.is_boot() {
        return Err(refused(format!("{}, {role}= of a spare, is a LUKS container, from which nothing boots", part.path)));
    }
    let (is, said) = (part.container.is_some() && role.tree().is_some(), machine.config.settings.luks.contains(role));
    match is == said {
        true => Ok(()),
        false => Err(refused(format!(
            "{}, {role}= of a spare, is {} LUKS container, but [dualroot] has {} 'luks={role}'; see dualroot.conf(5)",
            part.path,
            if is { "a" } else { "no" },
            if said { "a" } else { "no" }
        ))),
    }
}

/// Whether a key file is there, which only root can read.
///
/// # Errors
/// One that others can read, or that is too short: a refusal.
pub fn has_key() -> Result<bool> {
    match fs::symlink_metadata(KEY) {
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(false),
        Err(e) => Err(refused(format!("{KEY} can't be looked at: {e}"))),
        Ok(meta) if meta.len() < LEAST => {
            Err(refused(format!("{KEY} has {} bytes, fewer than {LEAST}; see dualroot(7)", meta.len())))
        }
        Ok(meta) if meta.is_file() && meta.uid() == 0 && meta.mode() & 0o077 == 0 => Ok(true),
        Ok(_) => Err(refused(format!("{KEY} can be read by others than root; 'chown root {KEY}' and 'chmod 600 {KEY}'"))),
    }
}
