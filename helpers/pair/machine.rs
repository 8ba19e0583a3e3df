//! The machine as a program finds it: the booted disk, its mounts, and the spares that are present.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::base::log::Log;
use crate::base::refusal::refused;
use crate::base::root::Root;
use crate::base::types::{DirPath, PartUuid, Role};
use crate::boot::efi::{self, EfiVars};
use crate::boot::entry::Titles;
use crate::boot::nvram::Firmware;
use crate::conf::{Config, Disk, Layout};
use crate::devices::inventory::Inventory;
use crate::devices::mounts;
use crate::names::files::Rewritten;
use crate::names::ident::Rewriter;
use crate::names::ids::DiskIds;
use crate::names::idstore;
use crate::pair::mounted;

/// The configuration; None where there is none. Its warnings are reported at once, because a typo may be the reason for a later refusal.
///
/// # Errors
/// [`crate::base::refusal::Refused`] if it is invalid, with its warnings in the same sentence.
pub fn configuration(root: &Root, log: &Log) -> Result<Option<Config>> {
    let config = Config::load(root).map_err(|e| refused(format!("{e:#}")))?;
    config.iter().flat_map(|config| &config.warnings).for_each(|warning| log.warning(warning));
    Ok(config)
}

/// The firmware's variables, and the ESP that was booted, which they name.
///
/// # Errors
/// [`crate::base::refusal::Refused`] where they don't name one.
pub fn booted_esp(root: &Root) -> Result<(EfiVars, PartUuid)> {
    let vars = EfiVars::open(root)
        .ok_or_else(|| refused("the machine was not booted by UEFI firmware, which dualroot needs; nothing was done"))?;
    let esp = efi::booted_esp(&vars).map_err(|e| refused(format!("the booted disk is unknown: {e:#}")))?;
    Ok((vars, esp))
}

/// The disk that was booted, by its ESP.
///
/// # Errors
/// [`crate::base::refusal::Refused`] where the configuration doesn't have it.
pub fn booted_disk<'a>(config: &'a Config, esp: &PartUuid) -> Result<&'a Disk> {
    config.booted(esp).ok_or_else(|| {
        refused(format!(
            "the ESP that was booted, PARTUUID {esp}, is in no section of the configuration; add it to dualroot.conf"
        ))
    })
}

/// The running system, as decisions need it.
pub struct Machine {
    /// The system's root.
    pub root: Root,
    /// The configuration.
    pub config: Config,
    /// The booted disk.
    pub booted: Disk,
    /// The partitions that are present.
    pub inventory: Inventory,
    /// The names of all disks; those of a missing disk are as they were when it was last seen.
    pub ids: Vec<DiskIds>,
    /// The boot loader's name and version, as it gives them.
    pub loader: Option<String>,
    /// Files that are not in force yet, such as a new configuration; spares get these instead of the present ones.
    pub drafts: Vec<Rewritten>,
}

impl Machine {
    /// Probes the machine; None, which is reported, where dualroot isn't configured.
    ///
    /// # Errors
    /// [`crate::base::refusal::Refused`] if the disks can't be told apart.
    pub fn probe(log: &Log) -> Result<Option<Self>> {
        let root = Root::new("/");
        let Some(config) = configuration(&root, log)? else {
            log.info("dualroot is not configured (/etc/dualroot.conf); nothing to do");
            return Ok(None);
        };
        Self::with_config(root, config).map(Some)
    }

    /// Probes the machine, with a configuration that may not be in force yet.
    ///
    /// # Errors
    /// As [`Machine::probe`].
    pub fn with_config(root: Root, config: Config) -> Result<Self> {
        let (vars, esp) = booted_esp(&root)?;
        let booted = booted_disk(&config, &esp)?.clone();
        let loader = efi::loader_variable(&vars, "LoaderInfo");
        let mut machine =
            Self { root, config, booted, inventory: Inventory::default(), ids: Vec::new(), loader, drafts: Vec::new() };
        machine.refresh()?;
        Ok(machine)
    }

    /// Probes the partitions and mounts again.
    ///
    /// # Errors
    /// As [`Machine::probe`].
    pub fn refresh(&mut self) -> Result<()> {
        self.inventory = Inventory::read()?;
        self.inventory.check_unique(&self.config).map_err(|e| refused(format!("{e:#}")))?;
        let now = self.config.disks.iter().map(|disk| self.inventory.ids(&self.config, disk)).collect::<Result<Vec<_>>>();
        self.ids = idstore::with_last_seen(&self.root, now.map_err(|e| refused(format!("{e:#}")))?)?;
        mounted::check(&self.booted, &self.inventory, &mounts::table()?)
    }

    /// The subvolume that is the running system's root, as a path in its file system; None where that is no btrfs.
    ///
    /// # Errors
    /// Those of [`mounts::table`].
    pub fn subvolume(&self) -> Result<Option<String>> {
        let table = mounts::table()?;
        Ok(mounts::at(&table, Path::new("/")).filter(|mount| mount.fstype == "btrfs").map(|mount| mount.root.clone()))
    }

    /// The firmware, with the data that its boot entries follow from.
    pub fn firmware(&self) -> Firmware<'_> {
        Firmware { root: &self.root, config: &self.config, booted: &self.booted, inventory: &self.inventory }
    }

    /// The mount points of the booted disk's boot partitions.
    pub fn boot_dirs(&self) -> Vec<PathBuf> {
        self.booted.boot_places().into_iter().map(|(_, _, dir)| Path::new(dir.as_str()).to_owned()).collect()
    }

    /// The rewriter for one disk of the pair.
    ///
    /// # Errors
    /// [`crate::base::refusal::Refused`] for identifiers that can't be told apart.
    pub fn rewriter(&self, target: &Disk) -> Result<Rewriter> {
        let of = |disk: &&DiskIds| disk.name == target.name;
        let target = self.ids.iter().find(of).with_context(|| format!("{} has no identifiers", target.name))?;
        let others: Vec<DiskIds> = self.ids.iter().filter(|d| d.name != target.name).cloned().collect();
        Rewriter::new(target, &others).map_err(|e| refused(format!("{e:#}")))
    }

    /// The finder of the names of a disk's root, by [`Rewriter::foreign`]; None where the disks share one.
    ///
    /// # Errors
    /// As [`Machine::rewriter`].
    pub fn root_names(&self, disk: &Disk) -> Result<Option<Rewriter>> {
        let ids = self.ids.iter().find(|ids| ids.name == disk.name).and_then(|ids| ids.parts.get(&Role::Root));
        let Some(ids) = ids else { return Ok(None) };
        let one = DiskIds { name: disk.name, parts: BTreeMap::from([(Role::Root, ids.clone())]) };
        Rewriter::finder(&[one]).map(Some).map_err(|e| refused(format!("{e:#}")))
    }

    /// The prefixes of menu titles, for one disk of the pair.
    pub fn titles(&self, target: &Disk) -> Titles {
        Titles { own: target.title.clone(), all: self.config.disks.iter().filter_map(|d| d.title.clone()).collect() }
    }

    /// Whether an fstab line that mounts something at `dir` belongs to another disk: `dir` is a spare's mount point, or an ESP's.
    pub fn belongs_to_other_disk(&self, dir: &DirPath) -> bool {
        let spares = self.config.spares(&self.booted);
        spares.iter().any(|(at, _)| dir.is_within(at)) || self.config.disks.iter().any(|d| d.esp_mountpoint.as_ref() == Some(dir))
    }

    /// Whether each disk has a root of its own.
    pub fn own_roots(&self) -> bool {
        matches!(self.config.layout(), Layout::OwnRoots)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    fn partuuid(number: u32) -> String {
        format!("aaaaaaaa-0000-4000-8000-00000000000{number}")
    }

    /// Partitions of the pair, each with its minor number: 1 and 3 are the ESPs, 2 and 4 the roots.
    pub(crate) fn inventory(there: &[(u32, u32)]) -> Inventory {
        let part = |&(number, minor): &(u32, u32)| {
            let (fstype, kind) = match number % 2 {
                1 => ("vfat", "c12a7328-f81f-11d2-ba4b-00a0c93ec93b"),
                _ => ("ext4", "4f68bce3-e8cd-4db1-96e7-fbcaf984b709"),
            };
            format!(
                r#"{{"kname":"x{number}","path":"/dev/x{number}","maj:min":"8:{minor}","fstype":"{fstype}","uuid":null,"label":null,
                    "partuuid":"{}","partlabel":null,"parttype":"{kind}","log-sec":512}}"#,
                partuuid(number)
            )
        };
        let lines: Vec<String> = there.iter().map(part).collect();
        let json = format!(r#"{{"blockdevices":[{}]}}"#, lines.join(","));
        Inventory::parse(json.as_bytes(), BTreeMap::new(), std::collections::BTreeSet::new()).unwrap()
    }

    /// A machine that booted disk0, with these partitions of the pair.
    pub(crate) fn machine(there: &[u32]) -> Machine {
        let [a, b, c, d] = [1, 2, 3, 4].map(partuuid);
        let text = format!("[disk0]\nesp={a}\nroot={b}\n[disk1]\nesp={c}\nroot={d}\n");
        let config = Config::parse(&[("x".to_owned(), text.into_bytes())]).unwrap().unwrap();
        let inventory = inventory(&there.iter().map(|&number| (number, number)).collect::<Vec<_>>());
        let booted = config.disks.first().unwrap().clone();
        let ids = config.disks.iter().map(|disk| inventory.ids(&config, disk).unwrap()).collect();
        Machine { root: Root::new("/"), config, booted, inventory, ids, loader: None, drafts: Vec::new() }
    }
}
