//! The firmware's boot entries: one for each disk of the pair that is there, the booted disk's before the spares'.
//!
//! The path that firmware falls back to (`EFI/BOOT`) is no guarantee: with entries for other disks in its variables, some firmware
//! doesn't look for it. Entries are only ever added, and BootOrder is only changed where it has a spare before the booted disk.

use std::collections::BTreeSet;
use std::fmt;
use std::path::Path;

use anyhow::{Context, Result, bail};
use efivar::boot::{EFIHardDrive, EFIHardDriveType};

use crate::base::log::Log;
use crate::base::root::Root;
use crate::base::types::{DiskName, PartUuid, Role};
use crate::boot::efi::{self, EfiVars};
use crate::boot::load_option::BootOption;
use crate::conf::{Config, Disk};
use crate::devices::inventory::{Inventory, Partition};
use crate::write::below::Below;

/// The firmware of a machine, and what its boot entries follow from.
#[derive(Clone, Copy)]
pub struct Firmware<'a> {
    /// The system's root, for the variables and /sys.
    pub root: &'a Root,
    /// The configuration.
    pub config: &'a Config,
    /// The booted disk.
    pub booted: &'a Disk,
    /// The partitions that are there.
    pub inventory: &'a Inventory,
}

/// A change to the firmware's variables.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Change {
    /// A new Boot#### variable.
    Create {
        /// Its number.
        number: u16,
        /// What the firmware's menu is to show.
        description: String,
        /// The ESP that it boots.
        esp: PartUuid,
        /// The boot loader's path there, with backslashes.
        file: String,
    },
    /// A new value of BootOrder.
    Order(Vec<u16>),
    /// A value of BootNext: what the firmware boots the next time, and only then.
    Next(u16),
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Create { number, description, esp, file } => {
                write!(f, "create Boot{number:04X} '{description}' for {file} on the ESP {esp}")
            }
            Self::Order(order) => {
                let numbers: Vec<String> = order.iter().map(|n| format!("{n:04X}")).collect();
                write!(f, "set BootOrder to {}", numbers.join(","))
            }
            Self::Next(number) => write!(f, "set BootNext to {number:04X}"),
        }
    }
}

/// What the firmware's variables lack; nothing with `efi-entries=no`.
///
/// # Errors
/// Variables that can't be read; a booted ESP without a boot loader.
pub fn plan(firmware: &Firmware<'_>) -> Result<Vec<Change>> {
    if !firmware.config.settings.efi_entries {
        return Ok(Vec::new());
    }
    let vars = EfiVars::open(firmware.root).context("there are no EFI variables")?;
    let mut disks = vec![(firmware.booted.name, firmware.booted.esp(), true)];
    for (_, spare) in firmware.config.spares(firmware.booted) {
        disks.push((spare.name, spare.esp(), firmware.inventory.find(&spare.esp())?.is_some()));
    }
    Ok(decide(&vars.boot_options()?, &vars.boot_order()?, &disks, &loader(firmware, &vars)?))
}

/// What has the firmware boot this disk the next time.
///
/// # Errors
/// A disk that isn't there; otherwise as [`plan`].
pub fn plan_next(firmware: &Firmware<'_>, disk: &Disk) -> Result<Vec<Change>> {
    let vars = EfiVars::open(firmware.root).context("there are no EFI variables")?;
    if firmware.inventory.find(&disk.esp())?.is_none() {
        bail!("{} is not there: no partition is its ESP, {}", disk.name, disk.esp());
    }
    Ok(decide_next(&vars.boot_options()?, (disk.name, disk.esp()), &loader(firmware, &vars)?))
}

fn decide_next(options: &[BootOption], (name, esp): (DiskName, PartUuid), file: &str) -> Vec<Change> {
    // Other programs have entries for an ESP, too: updaters of firmware, other systems.
    let is_loader = |o: &&BootOption| {
        o.partition == Some(esp) && o.active && o.file.as_deref().is_some_and(|own| own.eq_ignore_ascii_case(file))
    };
    let own = options.iter().find(is_loader).map(|o| o.number);
    match (own, free_number(&options.iter().map(|o| o.number).collect())) {
        (Some(own), _) => vec![Change::Next(own)],
        (None, Some(number)) => vec![create(number, name, esp, file), Change::Next(number)],
        (None, None) => Vec::new(),
    }
}

/// The numbers of the entries that boot a disk, by its ESP.
pub fn entries_of(options: &[BootOption], esp: PartUuid) -> impl Iterator<Item = u16> {
    options.iter().filter(move |o| o.partition == Some(esp) && o.file.is_some()).map(|o| o.number)
}

fn free_number(taken: &BTreeSet<u16>) -> Option<u16> {
    (0..=u16::MAX).find(|n| !taken.contains(n))
}

fn create(number: u16, name: DiskName, esp: PartUuid, file: &str) -> Change {
    Change::Create { number, description: format!("Linux Boot Manager ({name})"), esp, file: file.to_owned() }
}

/// The path of the boot loader that every disk has.
fn loader(firmware: &Firmware<'_>, vars: &EfiVars) -> Result<String> {
    let esp = firmware.booted.boot_places().into_iter().find(|(role, _, _)| *role == Role::Esp);
    let (_, _, dir) = esp.context("the booted disk has no ESP")?;
    let below = Below::open(Path::new(dir.as_str()))?;
    match find_loader(&below, efi::booted_file(vars, &firmware.booted.esp()), efi::is_secure(vars))? {
        Some(path) => Ok(path),
        None => bail!("{dir} holds neither EFI/systemd/systemd-boot*.efi nor EFI/BOOT/BOOT*.EFI; run 'bootctl install'"),
    }
}

/// What was booted itself is what the firmware is known to take. With Secure Boot, what it falls back to may be another one than
/// systemd-boot, which starts that (shim).
fn find_loader(esp: &Below, booted: Option<String>, is_secure: bool) -> Result<Option<String>> {
    let is_there =
        |file: &String| esp.stat(file.replace('\\', "/").trim_start_matches('/').as_ref()).is_ok_and(|stat| stat.is_some());
    if let Some(file) = booted.filter(is_there) {
        return Ok(Some(file));
    }
    let mut places = [("EFI/systemd", "systemd-boot"), ("EFI/BOOT", "boot")];
    if is_secure {
        places.reverse();
    }
    for (directory, start) in places {
        for (name, _) in esp.list(directory)? {
            let folded = name.to_lowercase();
            if folded.starts_with(start) && folded.ends_with(".efi") {
                return Ok(Some(format!("\\{}\\{name}", directory.replace('/', "\\"))));
            }
        }
    }
    Ok(None)
}

/// The decision, from what the variables hold. The first of the disks is the booted one. Those that aren't there get no entry, but what
/// they have is behind the booted disk's: a disk that comes back after a failover is not to be booted by surprise.
fn decide(options: &[BootOption], order: &[u16], disks: &[(DiskName, PartUuid, bool)], file: &str) -> Vec<Change> {
    let mut changes = Vec::new();
    let mut taken: BTreeSet<u16> = options.iter().map(|o| o.number).collect();
    let mut of_disks: Vec<Vec<u16>> = Vec::new();
    for (name, esp, present) in disks {
        let mut numbers: Vec<u16> = entries_of(options, *esp).collect();
        if numbers.is_empty() && *present {
            let Some(number) = free_number(&taken) else { continue };
            taken.insert(number);
            numbers.push(number);
            changes.push(create(number, *name, *esp, file));
        }
        numbers.retain(|n| *present || order.contains(n));
        of_disks.push(numbers);
    }
    let new = reorder(order, &of_disks);
    if new != order {
        changes.push(Change::Order(new));
    }
    changes
}

/// BootOrder with the first disk's entries before the others', each disk in it, and everything else where it was.
fn reorder(order: &[u16], of_disks: &[Vec<u16>]) -> Vec<u16> {
    let mut new = order.to_vec();
    let [booted, spares @ ..] = of_disks else { return new };
    let first_spare = |order: &[u16]| order.iter().position(|n| spares.iter().any(|s| s.contains(n)));
    if !new.iter().any(|n| booted.contains(n)) {
        let at = first_spare(&new).unwrap_or(0);
        new.splice(at..at, booted.first().copied());
    }
    if let (Some(spare), Some(own)) = (first_spare(&new), new.iter().position(|n| booted.contains(n)))
        && spare < own
    {
        let number = new.remove(own);
        new.insert(spare, number);
    }
    for spare in spares {
        if !new.iter().any(|n| spare.contains(n)) {
            let behind = new.iter().rposition(|n| of_disks.iter().any(|d| d.contains(n))).map_or(0, |at| at + 1);
            new.splice(behind..behind, spare.first().copied());
        }
    }
    new
}

/// Makes every change of [`plan`]. Firmware that doesn't let them be written is complained of: what is on the disks boots all the same.
///
/// # Errors
/// As [`plan`].
pub fn carry_out(firmware: &Firmware<'_>, log: &Log) -> Result<()> {
    for change in plan(firmware)? {
        if let Err(e) = apply(firmware, &change) {
            log.warning(&format!("the firmware's boot entries can't be written, so check them by hand (efibootmgr): {e:#}"));
        }
    }
    Ok(())
}

/// Makes one change.
///
/// # Errors
/// Variables that the firmware doesn't let be written; a partition that is gone.
pub fn apply(firmware: &Firmware<'_>, change: &Change) -> Result<()> {
    let mut vars = EfiVars::open(firmware.root).context("there are no EFI variables")?;
    match change {
        Change::Create { number, description, esp, file } => {
            let part = firmware.inventory.find(esp)?.with_context(|| format!("the ESP {esp} is gone"))?;
            vars.set_boot_option(*number, &BootOption::encode(description, &drive(firmware, part, esp)?, file)?)
        }
        Change::Order(order) => vars.set_boot_order(order),
        Change::Next(number) => vars.set_boot_next(*number),
    }
}

/// The device path node of a partition, from sysfs, which counts in 512 bytes whatever the disk does.
fn drive(firmware: &Firmware<'_>, part: &Partition, esp: &PartUuid) -> Result<EFIHardDrive> {
    let number = |name: &str| -> Result<u64> {
        let path = format!("/sys/class/block/{}/{name}", part.kname);
        let text = firmware.root.read(&path).with_context(|| format!("{path} can't be read"))?;
        std::str::from_utf8(&text).ok().and_then(|t| t.trim().parse().ok()).with_context(|| format!("{path} holds no number"))
    };
    let per_sector = (part.sector / 512).max(1);
    Ok(EFIHardDrive {
        partition_number: u32::try_from(number("partition")?)?,
        partition_start: number("start")? / per_sector,
        partition_size: number("size")? / per_sector,
        partition_sig: esp.uuid(),
        format: 2,
        sig_type: EFIHardDriveType::Gpt,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_booted_disk_comes_first_and_the_rest_stays() {
        for (order, booted, spare, expected) in [
            (&[1, 2][..], &[1][..], &[2][..], &[1, 2][..]),
            (&[2, 1], &[1], &[2], &[1, 2]),
            (&[9, 2, 8, 1, 7], &[1], &[2], &[9, 1, 2, 8, 7]),
            (&[9], &[1], &[2], &[1, 2, 9]),
            (&[9, 1], &[1], &[2], &[9, 1, 2]),
            (&[9, 2], &[1], &[2], &[9, 1, 2]),
            (&[], &[1], &[2], &[1, 2]),
            (&[1, 9, 2], &[1], &[2], &[1, 9, 2]),
        ] {
            let of_disks = [booted.to_vec(), spare.to_vec()];
            let new = reorder(order, &of_disks);
            assert_eq!(new, expected, "{order:?}");
            assert_eq!(reorder(&new, &of_disks), new, "once is enough");
        }
    }

    #[test]
    fn an_entry_is_for_what_the_firmware_takes() {
        let tmp = tempfile::tempdir().unwrap();
        for path in ["EFI/BOOT/BOOTX64.EFI", "EFI/BOOT/grubx64.efi", "EFI/systemd/systemd-bootx64.efi", "EFI/debian/shimx64.efi"]
        {
            std::fs::create_dir_all(tmp.path().join(path).parent().unwrap()).unwrap();
            std::fs::write(tmp.path().join(path), "").unwrap();
        }
        let esp = Below::open(tmp.path()).unwrap();
        let (usual, fallback, shim) =
            ("\\EFI\\systemd\\systemd-bootx64.efi", "\\EFI\\BOOT\\BOOTX64.EFI", "\\EFI\\debian\\shimx64.efi");
        for (booted, is_secure, expected) in [
            (None, false, usual),
            (None, true, fallback),
            (Some(shim), true, shim),
            (Some(shim), false, shim),
            (Some("\\EFI\\gone\\x.efi"), false, usual),
            (Some("\\..\\x.efi"), true, fallback),
        ] {
            let found = find_loader(&esp, booted.map(str::to_owned), is_secure).unwrap();
            assert_eq!(found.as_deref(), Some(expected), "{booted:?} {is_secure}");
        }
    }

    #[test]
    fn an_absent_disk_gets_no_entry_but_goes_behind() {
        let esp = |n: u32| PartUuid::parse(&format!("{n:08}-0000-4000-8000-000000000000")).unwrap();
        let disk = |n: u32, present| (DiskName::parse(&format!("disk{n}")).unwrap(), esp(n), present);
        let option = |number, n| BootOption {
            number,
            active: true,
            description: String::new(),
            partition: Some(esp(n)),
            file: Some("x".into()),
            raw: Vec::new(),
        };
        let both = [option(4, 0), option(5, 1)];
        let after_failover = decide(&both, &[4, 5, 1], &[disk(1, true), disk(0, false)], "x");
        assert_eq!(after_failover, [Change::Order(vec![5, 4, 1])]);
        assert_eq!(decide(&both, &[5, 4, 1], &[disk(1, true), disk(0, false)], "x"), []);
        assert_eq!(decide(&both, &[5, 1], &[disk(1, true), disk(0, false)], "x"), [], "what someone took out stays out");
        assert_eq!(decide(&both[1..], &[5, 1], &[disk(1, true), disk(0, false)], "x"), []);
        let next = decide_next(&both, (disk(0, true).0, esp(0)), "x");
        assert_eq!(next, [Change::Next(4)]);
        let next = decide_next(&both[1..], (disk(0, true).0, esp(0)), "x");
        assert!(
            matches!(&next[..], [Change::Create { number: 0, esp: created, .. }, Change::Next(0)] if *created == esp(0)),
            "{next:?}"
        );
        let created = decide(&both[1..], &[5, 1], &[disk(1, true), disk(0, true)], "x");
        assert!(matches!(&created[..], [Change::Create { number: 0, .. }, Change::Order(o)] if *o == [5, 0, 1]), "{created:?}");
    }
}
