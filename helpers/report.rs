//! How it stands with every disk, for people and for programs: what is there, what the last sync found, and what would happen if another
//! disk died now. Nothing is written, no spare is read, and root is needed for nothing but the records on the ESPs.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use anyhow::Result;
use nix::sys::statvfs::statvfs;
use serde::Serialize;

use crate::base::clock::{date, now};
use crate::base::exit::Exit;
use crate::base::fault::{Code, Fault};
use crate::base::root::Root;
use crate::base::types::{DiskName, PartUuid, Role};
use crate::boot::{load_option, nvram};
use crate::conf::{Config, Disk, Layout};
use crate::devices::inventory::{Inventory, Partition};
use crate::devices::mounts::{self, Mount};
use crate::names::generation::Generation;
use crate::pair::lineage::{Record, Relation};
use crate::pair::machine::{booted_disk, booted_esp};
use crate::pair::status::{End, Outcome, Reading, Seen, Standing, Status};
use crate::pair::{heal, lock};
use crate::write::below::Below;

mod text;

/// What was found out about the machine.
#[derive(Clone, Debug)]
pub struct Facts {
    /// The time, in seconds since 1970.
    pub now: u64,
    /// Whether each disk has its own root.
    pub layout: Layout,
    /// How a shared root stands.
    pub root: heal::RootState,
    /// Whether a sync, or a verification, is running.
    pub running: bool,
    /// The warnings of the configuration.
    pub warnings: Vec<String>,
    /// The reason why the results of earlier syncs can't be read, if they can't.
    pub status_error: Option<String>,
    /// All disks, as they are configured; the booted one is among them.
    pub disks: Vec<DiskFacts>,
}

/// What was found out about a disk.
#[derive(Clone, Debug)]
pub struct DiskFacts {
    /// Its name.
    pub name: DiskName,
    /// Whether it was booted.
    pub booted: bool,
    /// Whether any of its partitions is there.
    pub present: bool,
    /// Those that aren't.
    pub missing: BTreeSet<Role>,
    /// Why nobody can say which partitions are its own.
    pub fault: Option<Fault>,
    /// Its partitions.
    pub partitions: Vec<PartReport>,
    /// Which generation of its root is mounted, where it has any.
    pub generation: Option<u32>,
    /// The record on its ESP.
    pub record: Lineage,
    /// The firmware's entries for it, and the place of the first of them in BootOrder, from 1; None where that can't be read.
    pub firmware: Option<(Vec<u16>, Option<usize>)>,
    /// Its file systems that are mounted.
    pub space: Vec<Space>,
    /// What the booted disk remembers of it.
    pub seen: Option<Seen>,
    /// The last verification of it, if it was booted.
    pub own: Option<Reading>,
}

impl DiskFacts {
    /// What could not be read of it, although it is there.
    fn not_seen(&self) -> Vec<String> {
        let record = match &self.record {
            Lineage::Unknown(why) if self.present => Some(format!("the record on the ESP of {} ({why})", self.name)),
            _ => None,
        };
        let firmware = self.firmware.is_none().then(|| format!("the firmware's entries for {}", self.name));
        record.into_iter().chain(firmware).collect()
    }
}

/// The record on a disk's ESP.
#[derive(Clone, Debug)]
pub enum Lineage {
    /// It can't be read now, for this reason.
    Unknown(String),
    /// This is it.
    Read(Record),
}

/// The room in a file system.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Space {
    /// What it is for: `esp`, `root` and so on.
    pub role: Role,
    /// Where it is mounted.
    pub mounted_at: PathBuf,
    /// What is free, in bytes.
    pub free: u64,
    /// What it holds, in bytes.
    pub size: u64,
}

impl Facts {
    /// Looks at this machine.
    ///
    /// # Errors
    /// [`crate::base::refusal::Refused`] where it is not known which disk was booted; lsblk that fails.
    pub fn gather(root: &Root, config: &Config) -> Result<Self> {
        let (vars, esp) = booted_esp(root)?;
        let booted = booted_disk(config, &esp)?;
        let (status, status_error) = stored_status(Status::load(root, config, booted), booted);
        let look = Look {
            inventory: Inventory::read()?,
            table: mounts::table()?,
            options: vars.boot_options().and_then(|options| Ok((options, vars.boot_order()?))).ok(),
            status,
        };
        let mut disks = vec![look.disk(booted, "", true)];
        disks.extend(config.spares(booted).into_iter().map(|(dir, spare)| look.disk(spare, dir.as_str(), false)));
        disks.sort_by_key(|disk| disk.name);
        let (layout, root_is) = (config.layout(), heal::probe(root, config)?);
        let warnings = config.warnings.clone();
        Ok(Self { now: now(), layout, root: root_is, running: lock::is_held(root), warnings, status_error, disks })
    }

    /// The facts that could not be read, each with the reason.
    fn not_seen(&self) -> Vec<String> {
        let status = self.status_error.iter().map(|error| format!("the results of earlier syncs ({error})"));
        status.chain(self.disks.iter().flat_map(DiskFacts::not_seen)).collect()
    }
}

/// The stored results of syncs; empty ones with the reason if they can't be read.
fn stored_status(loaded: Result<Status>, booted: &Disk) -> (Status, Option<String>) {
    match loaded {
        Ok(status) => (status, None),
        Err(e) => (Status::new(booted), Some(format!("{e:#}"))),
    }
}

/// What all disks are found in.
struct Look {
    inventory: Inventory,
    table: Vec<Mount>,
    options: Option<(Vec<load_option::BootOption>, Vec<u16>)>,
    status: Status,
}

impl Look {
    /// A disk whose file systems are mounted below `dir`.
    fn disk(&self, disk: &Disk, dir: &str, booted: bool) -> DiskFacts {
        let (parts, fault) = match self.inventory.disk(disk) {
            Ok(parts) => (parts, None),
            Err(e) => (BTreeMap::new(), Some(self.fault(disk, &e))),
        };
        let boot = disk.boot_places().into_iter().map(|(role, _, at)| (role, format!("{dir}{}", at.as_str())));
        let trees = disk.parts.keys().filter_map(|role| Some((role.clone(), format!("{dir}{}", role.tree()?))));
        let places: BTreeMap<Role, PathBuf> =
            boot.chain(trees).map(|(role, at)| (role, if at.is_empty() { "/".into() } else { at.into() })).collect();
        let mounted =
            |role: &Role, part: &Partition| mounts::at(&self.table, places.get(role)?).filter(|mount| mount.is_on(part));
        let found: Vec<(&Role, &Mount)> = parts.iter().filter_map(|(role, part)| Some((role, mounted(role, part)?))).collect();
        let at = |wanted: Role| found.iter().find(|(role, _)| **role == wanted).map(|(_, mount)| *mount);
        DiskFacts {
            name: disk.name,
            booted,
            present: !parts.is_empty(),
            missing: disk.parts.keys().filter(|role| !parts.contains_key(*role)).cloned().collect(),
            fault,
            partitions: disk.parts.iter().map(|(role, id)| PartReport::new(role, *id, parts.get(role).copied())).collect(),
            generation: at(Role::Root).and_then(|mount| Generation::of_root(&mount.root)).map(|generation| generation.number()),
            record: record(at(Role::Esp), disk.name),
            firmware: self.options.as_ref().map(|(options, order)| firmware(options, order, disk.esp())),
            space: found.iter().filter_map(|(role, mount)| space(role, mount)).collect(),
            seen: self.status.of(disk.name).cloned(),
            own: self.status.own.clone().filter(|_| booted),
        }
    }

    /// Why nobody can say which partitions are a disk's own.
    fn fault(&self, disk: &Disk, error: &anyhow::Error) -> Fault {
        let has_twin = disk.parts.values().any(|partuuid| self.inventory.find(partuuid).is_err());
        Fault::new(if has_twin { Code::F03 } else { Code::F01 }, format!("{error:#}"))
    }
}

fn record(esp: Option<&Mount>, disk: DiskName) -> Lineage {
    let Some(mount) = esp else { return Lineage::Unknown("its ESP is not mounted".into()) };
    match Below::open(&mount.at).and_then(|below| Record::load(&below, disk)) {
        Ok(record) => Lineage::Read(record),
        Err(e) if matches!(e.downcast_ref(), Some(nix::errno::Errno::EACCES)) => Lineage::Unknown("needs root".into()),
        Err(e) => Lineage::Unknown(format!("{e:#}")),
    }
}

fn firmware(options: &[load_option::BootOption], order: &[u16], esp: PartUuid) -> (Vec<u16>, Option<usize>) {
    let numbers: Vec<u16> = nvram::entries_booting_from(options, esp).collect();
    let place = order.iter().position(|number| numbers.contains(number)).map(|at| at + 1);
    (numbers, place)
}

fn space(role: &Role, mount: &Mount) -> Option<Space> {
    let s = statvfs(&mount.at).ok()?;
    let unit = s.fragment_size();
    Some(Space { role: role.clone(), mounted_at: mount.at.clone(), free: s.blocks_available() * unit, size: s.blocks() * unit })
}

/// The version of the JSON. Fields may be added in one version; a field that changes its meaning, or goes, makes another version.
const VERSION: u32 = 1;

/// How it stands.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Report {
    /// [`VERSION`].
    pub version: u32,
    /// Whether there is a configuration.
    pub configured: bool,
    /// When it was looked at. All times are in seconds since 1970.
    pub time: u64,
    /// `own-roots` or `shared-root`.
    pub layout: Option<&'static str>,
    /// How the root stands: `whole`, `degraded`, or `behind` where a disk that was away lacks what was written meanwhile.
    pub root: Option<&'static str>,
    /// Whether a sync or a verification is running.
    pub running: bool,
    /// The exit status.
    #[serde(rename = "exit_status")]
    pub exit: Exit,
    /// The warnings of the configuration.
    pub warnings: Vec<String>,
    /// The facts that could not be seen, and why.
    pub not_seen: Vec<String>,
    /// Every disk.
    pub disks: Vec<DiskReport>,
}

/// How it stands with a disk.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct DiskReport {
    /// Its name.
    pub name: DiskName,
    /// Whether it was booted.
    pub booted: bool,
    /// Whether it is there.
    pub present: bool,
    /// Partitions of it that aren't there, while others are.
    pub missing: Vec<Role>,
    /// All partitions that the configuration names.
    pub partitions: Vec<PartReport>,
    /// Since when syncs have not found it.
    pub absent_since: Option<u64>,
    /// Whether it boots without the others, as far as is known; null where nobody knows, and for the booted disk.
    pub boots: Option<bool>,
    /// What happens to the machine with this disk if the others die now, in words.
    pub if_others_died: String,
    /// Why it would not boot, or nobody knows whether it would; of the booted disk, why it may not boot again. Empty if all is well.
    pub faults: Vec<Fault>,
    /// When a sync last left it as a copy that boots, and nothing has begun to write it since.
    pub last_good_sync: Option<u64>,
    /// How the last sync of it ended.
    pub last_sync: Option<End>,
    /// When the sync began that has not ended.
    pub sync_begun: Option<u64>,
    /// The last time that its boot files were read from the medium and compared.
    pub last_verify: Option<Reading>,
    /// Which generation of its root is mounted, where it has any.
    pub generation: Option<u32>,
    /// What its own record says; null where that can't be read.
    pub lineage: Option<LineageReport>,
    #[serde(skip)]
    lineage_unknown: Option<String>,
    /// The firmware's entries for it, as `0001`; null where the firmware's variables can't be read.
    pub efi_entries: Option<Vec<String>>,
    /// The place of the first of them in BootOrder, from 1.
    pub boot_order: Option<usize>,
    /// Its file systems that are mounted.
    pub space: Vec<Space>,
}

/// A partition of a disk; all but its role and PARTUUID is null if it is absent.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct PartReport {
    /// Its key in the configuration.
    pub role: Role,
    /// Its number in the partition table.
    pub number: Option<u32>,
    /// Its PARTUUID.
    pub partuuid: PartUuid,
    /// The UUID of its file system: in a LUKS container, once that is open.
    pub uuid: Option<String>,
    /// The type of that file system.
    pub filesystem: Option<String>,
    /// Its size.
    pub bytes: Option<u64>,
    /// Its device node.
    pub node: Option<String>,
}

impl PartReport {
    fn new(role: &Role, partuuid: PartUuid, part: Option<&Partition>) -> Self {
        Self {
            role: role.clone(),
            number: part.and_then(|part| part.index),
            partuuid,
            uuid: part.and_then(|part| part.uuid.clone()),
            filesystem: part.and_then(|part| part.fstype.clone()),
            bytes: part.map(|part| part.bytes),
            node: part.map(|part| part.path.clone()),
        }
    }
}

/// What a disk's own record says.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct LineageReport {
    /// How many lives of each disk are in what it holds.
    pub lives: BTreeMap<DiskName, u64>,
    /// The disk that it was last synced from.
    pub synced_from: Option<DiskName>,
    /// When.
    pub synced: Option<u64>,
    /// What it holds and the booted disk lacks, in words.
    pub newer: Option<String>,
}

/// What becomes of a disk if the others die.
struct Fate {
    boots: Option<bool>,
    standing: Standing,
    told: String,
    faults: Vec<Fault>,
}

impl Fate {
    fn new(boots: Option<bool>, standing: Standing, told: impl Into<String>) -> Self {
        Self { boots, standing, told: told.into(), faults: Vec::new() }
    }

    fn unknown(standing: Standing, fault: Fault) -> Self {
        Self { faults: vec![fault.clone()], ..Self::new(None, standing, format!("nobody knows: {fault}")) }
    }

    /// `when` that was found is told after the first of the faults.
    fn fails(faults: Vec<Fault>, when: &str) -> Self {
        let told = format!("would not boot: {}{when}", first(&faults));
        Self { faults, ..Self::new(Some(false), Standing::Broken, told) }
    }
}

impl Report {
    /// The report of a machine that isn't configured, of which nothing is known.
    pub fn unconfigured() -> Self {
        Self {
            version: VERSION,
            configured: false,
            time: now(),
            layout: None,
            root: None,
            running: false,
            exit: Exit::Refused,
            warnings: Vec::new(),
            not_seen: Vec::new(),
            disks: Vec::new(),
        }
    }

    /// Decides.
    pub fn new(facts: &Facts) -> Self {
        let booted = facts.disks.iter().find(|disk| disk.booted);
        let own = booted.and_then(|disk| match &disk.record {
            Lineage::Read(record) => Some((disk.name, record)),
            Lineage::Unknown(_) => None,
        });
        let mut standing = Standing::Whole;
        let disks = facts.disks.iter().map(|disk| {
            let fate = if disk.booted { goes_on(facts, disk) } else { fate(facts, disk) };
            standing = standing.max(fate.standing);
            of_disk(disk, fate, own)
        });
        let disks = disks.collect();
        let layout = match facts.layout {
            Layout::OwnRoots => "own-roots",
            Layout::SharedRoot => "shared-root",
        };
        let root = match facts.root {
            heal::RootState::Whole => "whole",
            heal::RootState::Degraded => "degraded",
            heal::RootState::Behind => "behind",
        };
        Self {
            version: VERSION,
            configured: true,
            time: facts.now,
            layout: Some(layout),
            root: Some(root),
            running: facts.running,
            exit: standing.exit(),
            warnings: facts.warnings.clone(),
            not_seen: facts.not_seen(),
            disks,
        }
    }
}

fn of_disk(disk: &DiskFacts, fate: Fate, booted: Option<(DiskName, &Record)>) -> DiskReport {
    let seen = disk.seen.as_ref().filter(|_| !disk.booted);
    let (lineage, lineage_unknown) = match &disk.record {
        Lineage::Read(record) => (Some(lineage(record, disk.name, booted)), None),
        Lineage::Unknown(why) => (None, Some(why.clone())),
    };
    DiskReport {
        name: disk.name,
        booted: disk.booted,
        present: disk.present,
        missing: disk.missing.iter().filter(|_| disk.present).cloned().collect(),
        partitions: disk.partitions.clone(),
        absent_since: seen.and_then(|seen| seen.absent_since).filter(|_| !disk.present),
        boots: fate.boots,
        if_others_died: fate.told,
        faults: fate.faults.into_iter().map(|fault| fault.of(disk.name)).collect(),
        last_good_sync: seen.and_then(|seen| seen.proof.as_ref()).map(|proof| proof.at),
        last_sync: seen.and_then(|seen| seen.last.clone()),
        sync_begun: seen.and_then(|seen| seen.begun),
        last_verify: disk.own.clone().or_else(|| seen.and_then(|seen| seen.read.clone())),
        generation: disk.generation,
        lineage,
        lineage_unknown,
        efi_entries: disk.firmware.as_ref().map(|(numbers, _)| numbers.iter().map(|n| format!("{n:04X}")).collect()),
        boot_order: disk.firmware.as_ref().and_then(|(_, place)| *place),
        space: disk.space.clone(),
    }
}

fn lineage(record: &Record, disk: DiskName, booted: Option<(DiskName, &Record)>) -> LineageReport {
    let relation = booted.filter(|(name, _)| *name != disk).map(|(name, own)| (name, own.relation(name, record)));
    let newer = match relation {
        Some((name, Relation::Newer(lead) | Relation::Split(_, lead))) => Some(lead.describe(name)),
        _ => None,
    };
    let (synced_from, synced) = record.last_synced().unzip();
    LineageReport { lives: record.boots().collect(), synced_from, synced, newer }
}

/// What becomes of the booted disk.
fn goes_on(facts: &Facts, disk: &DiskFacts) -> Fate {
    let mut told = match (facts.layout, facts.root) {
        (Layout::OwnRoots, _) => "goes on running: its root is its own".to_owned(),
        (Layout::SharedRoot, heal::RootState::Whole) => "goes on running, with one half of the shared root".to_owned(),
        (Layout::SharedRoot, heal::RootState::Degraded) => {
            "goes on running: the shared root is without one of its disks already".to_owned()
        }
        (Layout::SharedRoot, heal::RootState::Behind) => {
            "may stop: one half of the shared root is behind, until dualroot-heal.service has ended well".to_owned()
        }
    };
    let Some(read) = disk.own.as_ref().filter(|read| !read.faults.is_empty()) else {
        return Fate::new(None, Standing::Whole, told);
    };
    told.push_str(&format!("; but it may not boot again: {}, read at {}", first(&read.faults), date(read.at)));
    Fate { faults: read.faults.clone(), ..Fate::new(None, Standing::Broken, told) }
}

/// What becomes of a spare, by what is known of it now, and else by what the last sync has found.
fn fate(facts: &Facts, disk: &DiskFacts) -> Fate {
    if let Some(fault) = &disk.fault {
        return Fate::unknown(Standing::Refused, fault.clone());
    }
    let seen = disk.seen.as_ref();
    if !disk.present {
        let since = seen.and_then(|seen| seen.absent_since).map(|at| format!(" (no sync has found it since {})", date(at)));
        let told = format!("is not there{}", since.unwrap_or_default());
        let faults = vec![Fault::new(Code::F21, told.clone())];
        return Fate { faults, ..Fate::new(Some(false), Standing::Absent, told) };
    }
    if let Some(role) = disk.missing.first() {
        let text = format!("its {role}= partition isn't there, but others of it are");
        return Fate::unknown(Standing::Refused, Fault::new(Code::F21, text).on(role));
    }
    match facts.root {
        heal::RootState::Whole => {}
        heal::RootState::Degraded => {
            return Fate::fails(vec![Fault::new(Code::F28, "the shared root is without one of its disks")], "");
        }
        heal::RootState::Behind => {
            let text = "one half of the shared root is behind, until dualroot-heal.service has ended well";
            return Fate::fails(vec![Fault::new(Code::F29, text)], "");
        }
    }
    let booted = facts.disks.iter().find(|disk| disk.booted).map_or_else(String::new, |disk| disk.name.to_string());
    let unknown = |code: Code, text: String| Fate::unknown(Standing::Broken, Fault::new(code, text));
    if let Some(error) = &facts.status_error {
        return unknown(Code::Unknown, format!("the results of earlier syncs can't be read ({error})"));
    }
    let Some(seen) = seen else { return unknown(Code::Unknown, format!("{booted} has not synced it yet")) };
    match (seen.begun, &seen.last) {
        (Some(at), _) if !facts.running => unknown(Code::F18, format!("the sync that began at {} has not ended", date(at))),
        (Some(at), None) => unknown(Code::Unknown, format!("its first sync began at {}, and is running", date(at))),
        (None, None) => unknown(Code::Unknown, format!("{booted} has not synced it yet")),
        (_, Some(last)) => by_last_sync(facts, seen, last),
    }
}

fn by_last_sync(facts: &Facts, seen: &Seen, last: &End) -> Fate {
    let at = date(last.at);
    let earlier = || match &seen.proof {
        Some(proof) => format!(" (it boots, as of {})", date(proof.at)),
        None => String::new(),
    };
    let unknown = |standing: Standing, text: String| {
        Fate::unknown(standing, Fault::new(last.code.unwrap_or(Code::Unknown), text + &earlier()))
    };
    // What has been written since a verification is not what that read.
    let unwritten = seen.proof.is_some() || seen.begun.is_some();
    if let Some(read) = seen.read.as_ref().filter(|read| unwritten && !read.faults.is_empty()) {
        return Fate::fails(read.faults.clone(), &format!(", read at {}", date(read.at)));
    }
    match &last.outcome {
        Outcome::Failed(why) => unknown(Standing::Broken, format!("the sync of {at} failed: {why}")),
        Outcome::Refused(why) => unknown(Standing::Refused, format!("the sync of {at} was refused: {why}")),
        Outcome::WouldNotBoot(faults) => Fate::fails(faults.clone(), &format!(", as of {at}")),
        Outcome::Boots => {
            let content = match facts.layout {
                Layout::OwnRoots => format!(", with what was there {}", ago(facts.now, last.at)),
                Layout::SharedRoot => String::new(),
            };
            Fate::new(Some(true), Standing::Whole, format!("boots, as of {at}{content}"))
        }
    }
}

/// The first of several faults, and how many more there are.
fn first(faults: &[Fault]) -> String {
    match faults {
        [] => "for an unknown reason".to_owned(),
        [only] => only.to_string(),
        [first, more @ ..] => format!("{first} (and {} more)", more.len()),
    }
}

/// How long ago something was, in one unit.
fn ago(now: u64, then: u64) -> String {
    let Some(seconds) = now.checked_sub(then) else { return "at a time that is yet to come".to_owned() };
    let units = [("day", 86400), ("hour", 3600), ("minute", 60), ("second", 1)];
    let (unit, length) = units.into_iter().find(|(_, length)| seconds >= *length).unwrap_or(("second", 1));
    let count = seconds / length;
    format!("{count} {unit}{} ago", if count == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests;
