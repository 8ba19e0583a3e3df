//! The LUKS containers of the pair's disks.

use anyhow::Result;

use crate::base::log::Log;
use crate::base::refusal::refused;
use crate::base::types::Role;
use crate::devices::inventory::Partition;
use crate::devices::luks::{has_key, open};
use crate::names::crypttab::KEY;
use crate::pair::machine::Machine;

/// Opens the spares' containers that luks= names and that are present and closed. Returns whether any was opened.
pub fn open_spares(machine: &Machine, log: &Log) -> bool {
    let trees = &machine.config.settings.luks;
    if trees.is_empty() {
        return false;
    }
    let mut opened = false;
    match has_key() {
        Ok(true) => {}
        Ok(false) => log.warning(&format!("{KEY} does not exist, so no spare's LUKS container can be opened; see dualroot(7)")),
        Err(e) => log.warning(&format!("{e:#}")),
    }
    for (_, disk) in machine.config.spares(&machine.booted) {
        for partuuid in trees.iter().filter_map(|role| disk.parts.get(role)) {
            // Other faults of a container are reported when it is used.
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

/// Checks that an encrypted tree of the booted disk is copied into an encrypted partition of the spare.
///
/// # Errors
/// A refusal if not, or where luks= in the configuration doesn't say so.
pub fn check(machine: &Machine, role: &Role, part: &Partition) -> Result<()> {
    let own = machine.booted.parts.get(role).map(|own| machine.inventory.find(own)).transpose()?.flatten();
    let kind = |part: &Partition| if part.container.is_some() { "a LUKS container" } else { "not encrypted" };
    if let Some(own) = own.filter(|own| own.container.is_some() != part.container.is_some()) {
        return Err(refused(format!(
            "{role}= of {} ({}) is {}, but {role}= of the spare ({}) is {}; both must be containers, or neither ('cryptsetup luksFormat', \
             and a file system in it)",
            machine.booted.name,
            own.path,
            kind(own),
            part.path,
            kind(part)
        )));
    }
    if part.container.is_some() && role.is_boot() {
        return Err(refused(format!(
            "{role}= of a spare ({}) is a LUKS container, from which no firmware boots; use a plain partition",
            part.path
        )));
    }
    let (is, named) = (part.container.is_some() && role.tree().is_some(), machine.config.settings.luks.contains(role));
    match is == named {
        true => Ok(()),
        false => Err(refused(format!(
            "{role}= of a spare ({}) is {} LUKS container, but luks= in the configuration {} it; correct luks=, see dualroot.conf(5)",
            part.path,
            if is { "a" } else { "no" },
            if named { "names" } else { "does not name" }
        ))),
    }
}
