//! The firmware's boot entries: one for each present disk of the pair, that of the booted disk before those of the spares.
//!
//! The fallback path `EFI/BOOT` is not enough: some firmware doesn't try it if it has entries for other disks. Entries are only added, never
//! removed, and BootOrder changes only to add entries, or if a spare is before the booted disk.

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

/// The facts from which the firmware's boot entries follow.
#[derive(Clone, Copy)]
pub struct Firmware<'a> {
    /// The root directory, for the variables and /sys.
    pub root: &'a Root,
    /// The configuration.
    pub config: &'a Config,
    /// The booted disk.
    pub booted: &'a Disk,
    /// The present partitions.
    pub inventory: &'a Inventory,
}

/// A change of one of the firmware's variables.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum FirmwareChange {
    /// A new boot entry (a `Boot####` variable).
    Create {
        /// Its number.
        number: u16,
        /// The text for the firmware's menu.
        description: String,
        /// The ESP that it boots.
        esp: PartUuid,
        /// The boot loader's path on the ESP, with backslashes.
        file: String,
    },
    /// A new value of BootOrder.
    Order(Vec<u16>),
    /// A value of BootNext: the boot entry for the next boot only.
    Next(u16),
}

impl fmt::Display for FirmwareChange {
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

/// The changes that the firmware's variables need; none with `efi-entries=no`.
///
/// # Errors
/// A variable can't be read; the booted ESP has no boot loader.
pub fn plan(firmware: &Firmware<'_>) -> Result<Vec<FirmwareChange>> {
    if !firmware.config.settings.efi_entries {
        return Ok(Vec::new());
    }
    let vars = EfiVars::open(firmware.root).context("the system was not booted by EFI, so there are no boot entries")?;
    let mut disks = vec![(firmware.booted.name, firmware.booted.esp(), true)];
    for (_, spare) in firmware.config.spares(firmware.booted) {
        disks.push((spare.name, spare.esp(), firmware.inventory.find(&spare.esp())?.is_some()));
    }
    Ok(decide(&vars.boot_options()?, &vars.boot_order()?, &disks, &loader(firmware, &vars)?))
}

/// The changes after which the firmware boots this disk the next time.
///
/// # Errors
/// The disk is missing; those of [`plan`].
pub fn plan_next(firmware: &Firmware<'_>, disk: &Disk) -> Result<Vec<FirmwareChange>> {
    let vars = EfiVars::open(firmware.root).context("the system was not booted by EFI, so there are no boot entries")?;
    if firmware.inventory.find(&disk.esp())?.is_none() {
        bail!("{} is missing: no partition has the PARTUUID of its ESP, {}", disk.name, disk.esp());
    }
    Ok(decide_next(&vars.boot_options()?, (disk.name, disk.esp()), &loader(firmware, &vars)?))
}

fn decide_next(options: &[BootOption], (name, esp): (DiskName, PartUuid), file: &str) -> Vec<FirmwareChange> {
    // Other systems and firmware updaters have entries for the same ESP.
    let is_loader = |o: &&BootOption| {
        o.partition == Some(esp) && o.active && o.file.as_deref().is_some_and(|own| own.eq_ignore_ascii_case(file))
    };
    let own = options.iter().find(is_loader).map(|o| o.number);
    match (own, free_number(&options.iter().map(|o| o.number).collect())) {
        (Some(own), _) => vec![FirmwareChange::Next(own)],
        (None, Some(number)) => vec![create(number, name, esp, file), FirmwareChange::Next(number)],
        (None, None) => Vec::new(),
    }
}

/// The numbers of the entries that boot from this ESP.
pub fn entries_booting_from(options: &[BootOption], esp: PartUuid) -> impl Iterator<Item = u16> {
    options.iter().filter(move |o| o.partition == Some(esp) && o.file.is_some()).map(|o| o.number)
}

fn free_number(taken: &BTreeSet<u16>) -> Option<u16> {
    (0..=u16::MAX).find(|n| !taken.contains(n))
}

fn create(number: u16, name: DiskName, esp: PartUuid, file: &str) -> FirmwareChange {
    FirmwareChange::Create { number, description: format!("Linux Boot Manager ({name})"), esp, file: file.to_owned() }
}

/// The path of the boot loader, which is the same on every disk.
fn loader(firmware: &Firmware<'_>, vars: &EfiVars) -> Result<String> {
    let esp = firmware.booted.boot_places().into_iter().find(|(role, _, _)| *role == Role::Esp);
    let (_, _, dir) = esp.context("the booted disk has no ESP")?;
    let below = Below::open(Path::new(dir.as_str()))?;
    match find_loader(&below, efi::booted_file(vars, &firmware.booted.esp()), efi::is_secure(vars))? {
        Some(path) => Ok(path),
        None => bail!("{dir} holds neither EFI/systemd/systemd-boot*.efi nor EFI/BOOT/BOOT*.EFI; run 'bootctl install'"),
    }
}

/// The boot loader on an ESP: the booted one if it is there, because the firmware is known to accept it. Otherwise systemd-boot or, first
/// with Secure Boot, the fallback loader, which may be one that firmware accepts and that starts systemd-boot (shim).
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

/// The changes for these variables. `disks` are name, ESP and presence; the first one is the booted disk. A missing disk gets no entry, but
/// its existing ones are sorted after those of the booted disk, so that a disk that comes back after a failover isn't booted by surprise.
fn decide(options: &[BootOption], order: &[u16], disks: &[(DiskName, PartUuid, bool)], file: &str) -> Vec<FirmwareChange> {
    let mut changes = Vec::new();
    let mut taken: BTreeSet<u16> = options.iter().map(|o| o.number).collect();
    let mut of_disks: Vec<Vec<u16>> = Vec::new();
    for (name, esp, present) in disks {
        let mut numbers: Vec<u16> = entries_booting_from(options, *esp).collect();
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
        changes.push(FirmwareChange::Order(new));
    }
    changes
}

/// BootOrder with an entry of each disk in it, and one of the first disk before those of the others; everything else keeps its place.
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
            let last = new.iter().rposition(|n| of_disks.iter().any(|d| d.contains(n))).map_or(0, |at| at + 1);
            new.splice(last..last, spare.first().copied());
        }
    }
    new
}

/// Makes every change of [`plan`]. If the firmware refuses one, that is a warning only, because the disks boot without it.
///
/// # Errors
/// As [`plan`].
pub fn carry_out(firmware: &Firmware<'_>, log: &Log) -> Result<()> {
    for change in plan(firmware)? {
        if let Err(e) = apply(firmware, &change) {
            log.warning(&format!("the firmware's boot entries can't be written; check them by hand (efibootmgr): {e:#}"));
        }
    }
    Ok(())
}

/// Makes one change.
///
/// # Errors
/// The firmware refuses to write the variable; the ESP is missing.
pub fn apply(firmware: &Firmware<'_>, change: &FirmwareChange) -> Result<()> {
    let mut vars = EfiVars::open(firmware.root).context("the system was not booted by EFI, so there are no boot entries")?;
    match change {
        FirmwareChange::Create { number, description, esp, file } => {
            let part = firmware.inventory.find(esp)?.with_context(|| format!("the ESP {esp} is missing"))?;
            vars.set_boot_option(*number, &BootOption::encode(description, &drive(firmware, part, esp)?, file)?)
        }
        FirmwareChange::Order(order) => vars.set_boot_order(order),
        FirmwareChange::Next(number) => vars.set_boot_next(*number),
    }
}

/// The device path node of a partition, from sysfs, whose unit is 512 bytes on every disk.
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
            assert_eq!(reorder(&new, &of_disks), new, "a second call changes nothing");
        }
    }

    #[test]
    fn an_entry_is_for_a_loader_that_the_firmware_accepts() {
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
    fn a_missing_disk_gets_no_entry_and_is_sorted_last() {
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
        assert_eq!(after_failover, [FirmwareChange::Order(vec![5, 4, 1])]);
        assert_eq!(decide(&both, &[5, 4, 1], &[disk(1, true), disk(0, false)], "x"), []);
        assert_eq!(
            decide(&both, &[5, 1], &[disk(1, true), disk(0, false)], "x"),
            [],
            "an entry that was removed from BootOrder stays out"
        );
        assert_eq!(decide(&both[1..], &[5, 1], &[disk(1, true), disk(0, false)], "x"), []);
        let next = decide_next(&both, (disk(0, true).0, esp(0)), "x");
        assert_eq!(next, [FirmwareChange::Next(4)]);
        let next = decide_next(&both[1..], (disk(0, true).0, esp(0)), "x");
        assert!(
            matches!(&next[..], [FirmwareChange::Create { number: 0, esp: created, .. }, FirmwareChange::Next(0)] if *created == esp(0)),
            "{next:?}"
        );
        let created = decide(&both[1..], &[5, 1], &[disk(1, true), disk(0, true)], "x");
        assert!(
            matches!(&created[..], [FirmwareChange::Create { number: 0, .. }, FirmwareChange::Order(o)] if *o == [5, 0, 1]),
            "{created:?}"
        );
    }
}
