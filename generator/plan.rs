//! Decides from [`Facts`] alone which mount units are made.

use std::collections::BTreeSet;

use anyhow::{Context, Result};
use dualroot::base::log::Level;
use dualroot::base::types::{DirPath, PartUuid, Role, UnitName};
use dualroot::conf::{Disk, Layout, SpareMount};

use crate::facts::Facts;

/// The units to be made.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct MountPlan {
    /// The configuration file, for `SourcePath=`.
    pub source: String,
    /// The mount units.
    pub mounts: Vec<Mount>,
    /// The booted disk's swap space, with its description.
    pub swap: Option<(PartUuid, String)>,
    /// Automount units of others that would conflict with ours, and are masked.
    pub masks: Vec<UnitName>,
    /// The time to wait for the devices of spares, in microseconds.
    pub device_timeout: u128,
    /// Directories in which a change may need rewritten entries, and a sync.
    pub watched: Vec<DirPath>,
    /// Messages for the log.
    pub notes: Vec<(Level, String)>,
}

/// A mount unit.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Mount {
    /// The unit's description.
    pub description: String,
    /// The partition that is mounted.
    pub part: PartUuid,
    /// The directory on which fstab mounts it; it is bound from there.
    pub bound_from: Option<DirPath>,
    /// The mount point.
    pub place: DirPath,
    /// The kind of partition.
    pub kind: PartitionKind,
    /// Whether it is a partition of the booted disk, which is checked, and mounted writable.
    pub booted: bool,
    /// Whether its file system is in a LUKS container, which must be opened first.
    pub luks: bool,
    /// Whether the unit is skipped if its mount point is missing, as on a spare's root that is still empty.
    pub needs_mount_point: bool,
}

/// Kinds of partitions by how they are mounted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PartitionKind {
    /// An ESP: always FAT.
    Esp,
    /// An XBOOTLDR: any file system that the firmware or the boot loader can read.
    Xbootldr,
    /// Anything else.
    Tree,
}

/// Makes the plan.
///
/// # Errors
/// The booted disk isn't in the configuration, which [`facts::read`](crate::facts::read) rules out; a path or name is invalid.
pub fn make(facts: &Facts) -> Result<MountPlan> {
    let config = &facts.config;
    let booted = config.disks.iter().find(|disk| disk.name == facts.booted).context("the booted disk is not configured")?;
    let mut plan = MountPlan {
        source: config.source.clone(),
        device_timeout: config.settings.device_timeout.as_micros(),
        ..MountPlan::default()
    };
    plan.booted(facts, booted)?;
    if config.settings.spare_mount == SpareMount::Boot {
        for (dir, spare) in config.spares(booted) {
            plan.spare(facts, &dir, spare)?;
        }
    }
    plan.watch(facts, booted)?;
    Ok(plan)
}

impl MountPlan {
    /// Adds the booted disk's partitions, on the directories where the running system expects them.
    fn booted(&mut self, facts: &Facts, disk: &Disk) -> Result<()> {
        let whose = format!("{} (booted)", disk.name);
        for (role, part, place) in disk.boot_places() {
            let mask = UnitName::from_path(&place, "automount")?;
            let mount = boot_partition(self, facts, disk, &role, part, place, &whose);
            if self.mount(facts, Mount { booted: true, ..mount })? {
                self.masks.push(mask);
            }
        }
        for (role, part) in &disk.parts {
            match role.tree() {
                None if *role == Role::Swap => {
                    if facts.fstab_swap {
                        self.note("no swap unit is made, because /etc/fstab names swap space");
                    } else {
                        self.swap = Some((*part, format!("swap space of {whose}")));
                    }
                }
                // The root is mounted before a generator runs.
                None | Some("") => {}
                Some(tree) if facts.config.settings.luks.contains(role) => {
                    if !facts.fstab.contains(&DirPath::parse(tree)?) {
                        let text = format!(
                            "no mount unit is made for {tree}: expected a line for its LUKS container in /etc/crypttab, \
                             and one for {tree} in /etc/fstab"
                        );
                        self.notes.push((Level::Warning, text));
                    }
                }
                Some(tree) => {
                    let mount = Mount { booted: true, ..tree_mount(role, *part, DirPath::parse(tree)?, &whose) };
                    self.mount(facts, mount)?;
                }
            }
        }
        Ok(())
    }

    /// Adds a spare's partitions, below its directory.
    fn spare(&mut self, facts: &Facts, dir: &DirPath, disk: &Disk) -> Result<()> {
        let whose = format!("{} (spare)", disk.name);
        let own_root = facts.config.layout() == Layout::OwnRoots;
        for (role, part) in &disk.parts {
            let Some(tree) = role.tree() else { continue };
            let mount = tree_mount(role, *part, below(dir, tree)?, &whose);
            let luks = facts.config.settings.luks.contains(role);
            self.mount(facts, Mount { needs_mount_point: own_root && *role != Role::Root, luks, ..mount })?;
        }
        for (role, part, place) in disk.boot_places() {
            let mount = boot_partition(self, facts, disk, &role, part, below(dir, place.as_str())?, &whose);
            self.mount(facts, Mount { needs_mount_point: own_root, ..mount })?;
        }
        Ok(())
    }

    /// Adds a mount, unless fstab or another unit mounts on that directory. Returns whether it was added.
    fn mount(&mut self, facts: &Facts, mount: Mount) -> Result<bool> {
        let place = &mount.place;
        let unit = match UnitName::from_path(place, "mount") {
            Ok(unit) => unit,
            Err(e) => {
                self.notes.push((Level::Warning, format!("no mount unit is made for {place}: {e:#}")));
                return Ok(false);
            }
        };
        if facts.fstab.contains(place) {
            self.note(&format!("no mount unit is made for {place}, because /etc/fstab mounts it"));
            return Ok(false);
        }
        if let Some(dir) = facts.units.get(unit.as_str()) {
            self.note(&format!("no mount unit is made for {place}, because {dir}/{unit} mounts it"));
            return Ok(false);
        }
        self.mounts.push(mount);
        Ok(true)
    }

    /// Sets the directories for dualroot-entries.path to watch. Missing ones do no harm.
    fn watch(&mut self, facts: &Facts, booted: &Disk) -> Result<()> {
        let mut paths: Vec<String> = ["/etc", "/etc/kernel", "/dev/disk/by-partuuid"].map(str::to_owned).into();
        for (_, _, place) in booted.boot_places() {
            let below = ["", "/loader", "/loader/entries", "/EFI", "/EFI/Linux", "/EFI/BOOT", "/EFI/systemd"];
            paths.extend(below.map(|path| format!("{place}{path}")));
            paths.extend(facts.entry_token.iter().map(|token| format!("{place}/{token}")));
        }
        let mut watched = paths.iter().map(|path| DirPath::parse(path)).collect::<Result<BTreeSet<_>>>()?;
        watched.extend(facts.package_dirs.iter().cloned());
        self.watched = watched.into_iter().collect();
        Ok(())
    }

    fn note(&mut self, text: &str) {
        self.notes.push((Level::Info, text.to_owned()));
    }
}

/// A directory below another one.
fn below(dir: &DirPath, path: &str) -> Result<DirPath> {
    DirPath::parse(&format!("{dir}{path}"))
}

/// The mount of a boot partition, bound from esp-mountpoint= if that is configured. A directory that neither fstab nor a unit mounts isn't
/// bound: files written there would be on the root file system.
fn boot_partition(
    plan: &mut MountPlan,
    facts: &Facts,
    disk: &Disk,
    role: &Role,
    part: PartUuid,
    place: DirPath,
    whose: &str,
) -> Mount {
    let (kind, name) = match role {
        Role::Esp => (PartitionKind::Esp, "EFI system partition"),
        _ => (PartitionKind::Xbootldr, "boot partition"),
    };
    let mut bound_from = disk.esp_mountpoint.clone().filter(|_| kind == PartitionKind::Esp);
    if let Some(dir) = bound_from.take_if(|dir| !facts.fstab.contains(dir) && !has_unit(facts, dir)) {
        let text = format!("esp-mountpoint={dir} of {}: expected a line for {dir} in /etc/fstab; ignoring", disk.name);
        plan.notes.push((Level::Warning, text));
    }
    Mount {
        description: format!("{name} of {whose}"),
        part,
        bound_from,
        place,
        kind,
        booted: false,
        luks: false,
        needs_mount_point: false,
    }
}

/// Whether another mount unit mounts on this directory.
fn has_unit(facts: &Facts, dir: &DirPath) -> bool {
    UnitName::from_path(dir, "mount").is_ok_and(|unit| facts.units.contains_key(unit.as_str()))
}

/// The mount of a partition that isn't a boot partition.
fn tree_mount(role: &Role, part: PartUuid, place: DirPath, whose: &str) -> Mount {
    let name = match role {
        Role::Root => "root",
        other => other.tree().unwrap_or_default(),
    };
    Mount {
        description: format!("{name} of {whose}"),
        part,
        bound_from: None,
        place,
        kind: PartitionKind::Tree,
        booted: false,
        luks: false,
        needs_mount_point: false,
    }
}
