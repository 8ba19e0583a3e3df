//! A dry run by a user other than root, who can neither mount a spare nor read its boot partitions.

use anyhow::Result;

use crate::base::log::Log;
use crate::base::privilege;
use crate::boot::nvram;
use crate::conf::{Config, Disk};
use crate::devices::inventory::Inventory;
use crate::pair::machine::Machine;
use crate::sync::Outcome;

/// Prints the part of the plan that is known without mounting the spares.
///
/// # Errors
/// As [`Machine::probe`]; and [`crate::base::refusal::Refused`] with the names of the spares that would be synced.
pub fn dry_run(log: &Log) -> Result<Outcome> {
    let Some(machine) = Machine::probe(log)? else { return Ok(Outcome::Whole) };
    let (lines, not_seen) = spares(&machine.config, &machine.booted, &machine.inventory)?;
    lines.iter().for_each(|line| println!("{line}"));
    nvram::plan(&machine.firmware())?.iter().for_each(|change| println!("firmware: {change}"));
    match not_seen.is_empty() {
        true => Ok(Outcome::Absent),
        false => Err(privilege::not_seen("dualroot-sync", &not_seen)),
    }
}

/// A line for each spare, and the spares that can't be read.
fn spares(config: &Config, booted: &Disk, inventory: &Inventory) -> Result<(Vec<String>, Vec<String>)> {
    let (mut lines, mut not_seen) = (Vec::new(), Vec::new());
    for (_, spare) in config.spares(booted) {
        let present = !inventory.disk(spare)?.is_empty();
        lines.push(format!("{}: {}", spare.name, if present { "would be synced" } else { "is not there" }));
        if present {
            not_seen.push(spare.name.to_string());
        }
    }
    Ok((lines, not_seen))
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::*;

    #[test]
    fn present_spares_are_reported_as_not_seen() {
        let id = |n: u32| format!("aaaaaaaa-0000-4000-8000-00000000000{n}");
        let sections: String = (0..3).map(|n| format!("[disk{n}]\nesp={}\n", id(n))).collect();
        let config = Config::parse(&[("x".to_owned(), sections.into_bytes())]).unwrap().unwrap();
        let part = |n: u32| {
            format!(
                r#"{{"kname":"x{n}","path":"/dev/x{n}","maj:min":"8:{n}","fstype":"vfat","uuid":null,"label":null,
                    "partuuid":"{}","partlabel":null,"parttype":"c12a7328-f81f-11d2-ba4b-00a0c93ec93b","log-sec":512}}"#,
                id(n)
            )
        };
        let json = format!(r#"{{"blockdevices":[{},{}]}}"#, part(0), part(1));
        let inventory = Inventory::parse(json.as_bytes(), BTreeMap::new(), BTreeSet::new()).unwrap();
        let (lines, not_seen) = spares(&config, &config.disks[0], &inventory).unwrap();
        assert_eq!(lines, ["disk1: would be synced", "disk2: is not there"]);
        assert_eq!(not_seen, ["disk1"]);
    }
}
