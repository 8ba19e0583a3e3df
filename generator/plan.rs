//! What is mounted where, decided from [`Facts`] alone.

use std::collections::BTreeSet;

use anyhow::{Context, Result};
use dualroot::base::types::{DirPath, PartUuid, Role, UnitName};
use dualroot::conf::{Disk, Layout, SpareMount};

use crate::facts::Facts;
use crate::log::Level;

/// The decision.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Plan {
    /// The configuration file that all of it comes from.
    pub source: String,
    /// What is mounted.
    pub mounts: Vec<Mount>,
    /// The booted disk's swap space, with its description.
    pub swap: Option<(PartUuid, String)>,
    /// Automount units that must not get in the way of ours.
    pub masks: Vec<UnitName>,
    /// How long to wait for the devices of what is mounted, in microseconds.
    pub device_timeout: u128,
    /// Directories in which a change means that entries may need rewriting, and the spares a sync.
    pub watched: Vec<DirPath>,
    /// What someone should know.
    pub notes: Vec<(Level, String)>,
}

/// A mount unit.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Mount {
    /// For people.
    pub description: String,
    /// The partition that is mounted in the end.
    pub part: PartUuid,
    /// Where it is mounted already, to be bound from there.
    pub bound_from: Option<DirPath>,
    /// The mount point.
    pub place: DirPath,
    /// What kind of file system it has.
    pub kind: Kind,
    /// Whether this is the booted disk's, which is writable, checked, and awaited for a while.
    pub booted: bool,
    /// Whether it lies in a LUKS container, which is opened before.
    pub luks: bool,
    /// Whether the mount point must be there before, as on a spare's root that may still be blank.
    pub needs_mount_point: bool,
}

/// Kinds of partitions by how they are mounted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// An ESP: always FAT.
    Esp,
    /// An XBOOTLDR: a file system that firmware or boot loader read, of whatever type.
    Xbootldr,
    /// Anything else.
    Tree,
}

/// Makes the plan.
///
/// # Errors
/// A booted disk that isn't configured, which can't be.
pub fn make(facts: &Facts) -> Result<Plan> {
    let config = &facts.config;
    let booted = config.disks.iter().find(|disk| disk.name == facts.booted).context("the booted disk is not configured")?;
    let mut plan =
        Plan { source: config.source.clone(), device_timeout: config.settings.device_timeout.as_micros(), ..Plan::default() };
    plan.booted(facts, booted)?;
    if config.settings.spare_mount == SpareMount::Boot {
        for (dir, spare) in config.spares(booted) {
            plan.spare(facts, &dir, spare)?;
        }
    }
    plan.watch(facts, booted)?;
    Ok(plan)
}

impl Plan {
    /// The booted disk's own partitions, in the places where the running system expects them.
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
                        self.note("no swap unit: /etc/fstab has swap space");
                    } else {
                        self.swap = Some((*part, format!("swap space of {whose}")));
                    }
                }
                // The root is mounted by the time that a generator runs.
                None | Some("") => {}
                Some(tree) if facts.config.settings.luks.contains(role) => {
                    if !facts.fstab.contains(&DirPath::parse(tree)?) {
                        let text =
                            format!("no unit for {tree}: expected its LUKS container in /etc/crypttab, and it in /etc/fstab");
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

    /// A spare's partitions, below its directory.
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

    /// Takes a mount into the plan, unless someone else mounts something there.
    fn mount(&mut self, facts: &Facts, mount: Mount) -> Result<bool> {
        let place = &mount.place;
        let unit = match UnitName::from_path(place, "mount") {
            Ok(unit) => unit,
            Err(e) => {
                self.notes.push((Level::Warning, format!("no unit for {place}: {e:#}, ignoring")));
                return Ok(false);
            }
        };
        if facts.fstab.contains(place) {
            self.note(&format!("no unit for {place}: /etc/fstab has it"));
            return Ok(false);
        }
        if let Some(dir) = facts.units.get(unit.as_str()) {
            self.note(&format!("no unit for {place}: {dir}/{unit} has it"));
            return Ok(false);
        }
        self.mounts.push(mount);
        Ok(true)
    }

    /// What is to be watched; see dualroot-entries.path. What isn't there (yet) does no harm.
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

/// A directory below another.
fn below(dir: &DirPath, path: &str) -> Result<DirPath> {
    DirPath::parse(&format!("{dir}{path}"))
}

/// A boot partition, bound from where fstab has it if the configuration says so. A directory that nothing mounts isn't bound: what
/// is written there would end in the root file system.
fn boot_partition(
    plan: &mut Plan,
    facts: &Facts,
    disk: &Disk,
    role: &Role,
    part: PartUuid,
    place: DirPath,
    whose: &str,
) -> Mount {
    let (kind, what) = match role {
        Role::Esp => (Kind::Esp, "EFI system partition"),
        _ => (Kind::Xbootldr, "boot partition"),
    };
    let mut bound_from = disk.esp_mountpoint.clone().filter(|_| kind == Kind::Esp);
    if let Some(dir) = bound_from.take_if(|dir| !facts.fstab.contains(dir) && !has_unit(facts, dir)) {
        let text = format!("esp-mountpoint={dir} of {}: expected a line for {dir} in /etc/fstab, ignoring", disk.name);
        plan.notes.push((Level::Warning, text));
    }
    Mount {
        description: format!("{what} of {whose}"),
        part,
        bound_from,
        place,
        kind,
        booted: false,
        luks: false,
        needs_mount_point: false,
    }
}

/// Whether someone's mount unit mounts this directory.
fn has_unit(facts: &Facts, dir: &DirPath) -> bool {
    UnitName::from_path(dir, "mount").is_ok_and(|unit| facts.units.contains_key(unit.as_str()))
}

/// A partition that isn't a boot partition.
fn tree_mount(role: &Role, part: PartUuid, place: DirPath, whose: &str) -> Mount {
    let what = match role {
        Role::Root => "root",
        other => other.tree().unwrap_or_default(),
    };
    Mount {
        description: format!("{what} of {whose}"),
        part,
        bound_from: None,
        place,
        kind: Kind::Tree,
        booted: false,
        luks: false,
        needs_mount_point: false,
    }
}
