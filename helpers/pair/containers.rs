//! The LUKS containers of a pair's disks.

use anyhow::Result;

use crate::base::log::Log;
use crate::base::refusal::refused;
use crate::base::types::Role;
use crate::devices::inventory::Partition;
use crate::devices::luks::{has_key, open};
use crate::names::crypttab::KEY;
use crate::pair::machine::Machine;

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
