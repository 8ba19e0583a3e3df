//! The report on every disk, for people and for programs: its partitions, the results of the last sync, and the fate of the machine if the
//! other disks died now. Nothing is written, and no spare is read. Only the records on the ESPs require root.

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

/// The facts about the machine, as they were gathered.
#[derive(Clone, Debug)]
pub struct Facts {
    /// The time, in seconds since 1970.
    pub now: u64,
    /// Whether each disk has a root of its own, or all share one.
    pub layout: Layout,
    /// The state of a shared root.
    pub root: heal::RootState,
    /// Whether a sync, or a verification, is running.
    pub running: bool,
    /// The warnings of the configuration.
    pub warnings: Vec<String>,
    /// The reason why the results of earlier syncs can't be read, if they can't.
    pub status_error: Option<String>,
    /// All disks of the configuration, the booted one among them.
    pub disks: Vec<DiskFacts>,
}

/// The facts about a disk.
#[derive(Clone, Debug)]
pub struct DiskFacts {
    /// Its name.
    pub name: DiskName,
    /// Whether it was booted.
    pub booted: bool,
    /// Whether at least one of its partitions is present.
    pub present: bool,
    /// The roles of the missing partitions.
    pub missing: BTreeSet<Role>,
    /// The reason why its partitions can't be identified, if they can't.
    pub fault: Option<Fault>,
    /// Its partitions.
    pub partitions: Vec<PartReport>,
    /// The mounted generation of its root, if the root has generations.
    pub generation: Option<u32>,
    /// The record on its ESP.
    pub record: Lineage,
    /// The numbers of the firmware's entries for it, and the place of the first of them in BootOrder, from 1; None if the firmware's variables
    /// can't be read.
    pub firmware: Option<(Vec<u16>, Option<usize>)>,
    /// The free space of its mounted file systems.
    pub space: Vec<Space>,
    /// The results of earlier syncs and verifications of it, as the booted disk stores them.
    pub seen: Option<Seen>,
    /// The last verification of the booted disk; None for a spare.
    pub own: Option<Reading>,
}

impl DiskFacts {
    /// The facts that could not be read although the disk is present, each with the reason.
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
    /// The reason why it can't be read.
    Unknown(String),
    /// The record.
    Read(Record),
}

/// The free space of a mounted file system.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Space {
    /// The role of its partition.
    pub role: Role,
    /// Its mount point.
    pub mounted_at: PathBuf,
    /// The free space, in bytes.
    pub free: u64,
    /// The size of the file system, in bytes.
    pub size: u64,
}

impl Facts {
    /// Gathers the facts about this machine.
    ///
    /// # Errors
    /// [`crate::base::refusal::Refused`] if the booted disk is unknown; a failure of lsblk; mounts that can't be read.
    pub fn gather(root: &Root, config: &Config) -> Result<Self> {
        let (vars, esp) = booted_esp(root)?;
        let booted = booted_disk(config, &esp)?;
        let (status, status_error) = stored_status(Status::load(root, config, booted), booted);
        let sources = Sources {
            inventory: Inventory::read()?,
            table: mounts::table()?,
            options: vars.boot_options().and_then(|options| Ok((options, vars.boot_order()?))).ok(),
            status,
        };
        let mut disks = vec![sources.disk(booted, "", true)];
        disks.extend(config.spares(booted).into_iter().map(|(dir, spare)| sources.disk(spare, dir.as_str(), false)));
        disks.sort_by_key(|disk| disk.name);
        let (layout, root_state) = (config.layout(), heal::probe(root, config)?);
        let warnings = config.warnings.clone();
        Ok(Self { now: now(), layout, root: root_state, running: lock::is_held(root), warnings, status_error, disks })
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

/// The data from which the facts about each disk are read.
struct Sources {
    inventory: Inventory,
    table: Vec<Mount>,
    options: Option<(Vec<load_option::BootOption>, Vec<u16>)>,
    status: Status,
}

impl Sources {
    /// The facts about a disk whose file systems are mounted below `dir`.
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

    /// The fault of a disk whose partitions can't be identified.
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

/// The version of the JSON. A new field keeps the version; a field that changes its meaning, or is removed, changes it.
const VERSION: u32 = 1;

/// The report on the machine and its disks.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Report {
    /// [`VERSION`].
    pub version: u32,
    /// Whether there is a configuration.
    pub configured: bool,
    /// The time at which the facts were gathered. All times are in seconds since 1970.
    pub time: u64,
    /// `own-roots` or `shared-root`.
    pub layout: Option<&'static str>,
    /// The state of the root: `whole`, `degraded`, or `behind` if a disk that was away lacks the changes since then.
    pub root: Option<&'static str>,
    /// Whether a sync or a verification is running.
    pub running: bool,
    /// The exit status.
    #[serde(rename = "exit_status")]
    pub exit: Exit,
    /// The warnings of the configuration.
    pub warnings: Vec<String>,
    /// The facts that could not be read, each with the reason.
    pub not_seen: Vec<String>,
    /// Every disk.
    pub disks: Vec<DiskReport>,
}

/// The report on a disk.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct DiskReport {
    /// Its name.
    pub name: DiskName,
    /// Whether it was booted.
    pub booted: bool,
    /// Whether at least one of its partitions is present.
    pub present: bool,
    /// Its missing partitions, while others are present.
    pub missing: Vec<Role>,
    /// All partitions that the configuration names.
    pub partitions: Vec<PartReport>,
    /// The time of the first sync that did not find it, if it is missing since then.
    pub absent_since: Option<u64>,
    /// Whether it boots without the others; null if that is unknown, and for the booted disk.
    pub boots: Option<bool>,
    /// The fate of the machine with this disk if the others died now, as a sentence.
    pub if_others_died: String,
    /// The reasons why it would not boot, or why that is unknown; for the booted disk, why it may not boot again. Empty if there are none.
    pub faults: Vec<Fault>,
    /// The time of the last sync that left it bootable, if no later sync began to write it.
    pub last_good_sync: Option<u64>,
    /// The end of its last sync.
    pub last_sync: Option<End>,
    /// The time at which an unfinished sync of it began.
    pub sync_begun: Option<u64>,
    /// The last verification, which read its boot files from the medium and compared them.
    pub last_verify: Option<Reading>,
    /// The mounted generation of its root, if the root has generations.
    pub generation: Option<u32>,
    /// The contents of the record on its ESP; null if that can't be read.
    pub lineage: Option<LineageReport>,
    #[serde(skip)]
    lineage_unknown: Option<String>,
    /// The numbers of the firmware's entries for it, as `0001`; null if the firmware's variables can't be read.
    pub efi_entries: Option<Vec<String>>,
    /// The place of the first of these entries in BootOrder, from 1.
    pub boot_order: Option<usize>,
    /// The free space of its mounted file systems.
    pub space: Vec<Space>,
}

/// A partition of a disk. If it is missing, all fields except the role and the PARTUUID are null.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct PartReport {
    /// Its key in the configuration.
    pub role: Role,
    /// Its number in the partition table.
    pub number: Option<u32>,
    /// Its PARTUUID.
    pub partuuid: PartUuid,
    /// The UUID of its file system; for a LUKS container, of the file system in it once it is open.
    pub uuid: Option<String>,
    /// The type of the file system.
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

/// The contents of the record on a disk's ESP.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct LineageReport {
    /// The number of boots of each disk whose changes this disk holds.
    pub lives: BTreeMap<DiskName, u64>,
    /// The disk that it was last synced from.
    pub synced_from: Option<DiskName>,
    /// The time of that sync.
    pub synced: Option<u64>,
    /// The changes that it holds and the booted disk lacks, as a phrase.
    pub newer: Option<String>,
}

/// The fate of a disk if the others died.
struct Fate {
    boots: Option<bool>,
    standing: Standing,
    sentence: String,
    faults: Vec<Fault>,
}

impl Fate {
    fn new(boots: Option<bool>, standing: Standing, sentence: impl Into<String>) -> Self {
        Self { boots, standing, sentence: sentence.into(), faults: Vec::new() }
    }

    fn unknown(standing: Standing, fault: Fault) -> Self {
        Self { faults: vec![fault.clone()], ..Self::new(None, standing, format!("unknown: {fault}")) }
    }

    /// A disk that would not boot. `when` is the time of the finding, and follows the first of the faults.
    fn fails(faults: Vec<Fault>, when: &str) -> Self {
        let sentence = format!("would not boot: {}{when}", first(&faults));
        Self { faults, ..Self::new(Some(false), Standing::Broken, sentence) }
    }
}

impl Report {
    /// The report on a machine without a configuration, whose disks are unknown.
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

    /// Draws the conclusions from the facts.
    pub fn new(facts: &Facts) -> Self {
        let booted = facts.disks.iter().find(|disk| disk.booted);
        let own = booted.and_then(|disk| match &disk.record {
            Lineage::Read(record) => Some((disk.name, record)),
            Lineage::Unknown(_) => None,
        });
        let mut standing = Standing::Whole;
        let disks = facts.disks.iter().map(|disk| {
            let fate = if disk.booted { fate_of_booted(facts, disk) } else { fate_of_spare(facts, disk) };
            standing = standing.max(fate.standing);
            disk_report(disk, fate, own)
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

fn disk_report(disk: &DiskFacts, fate: Fate, booted: Option<(DiskName, &Record)>) -> DiskReport {
    let seen = disk.seen.as_ref().filter(|_| !disk.booted);
    let (lineage, lineage_unknown) = match &disk.record {
        Lineage::Read(record) => (Some(lineage_report(record, disk.name, booted)), None),
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
        if_others_died: fate.sentence,
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

fn lineage_report(record: &Record, disk: DiskName, booted: Option<(DiskName, &Record)>) -> LineageReport {
    let relation = booted.filter(|(name, _)| *name != disk).map(|(name, own)| (name, own.relation(name, record)));
    let newer = match relation {
        Some((name, Relation::Newer(lead) | Relation::Split(_, lead))) => Some(lead.describe(name)),
        _ => None,
    };
    let (synced_from, synced) = record.last_synced().unzip();
    LineageReport { lives: record.boots().collect(), synced_from, synced, newer }
}

/// The fate of the booted disk: the machine continues to run, but its files may be damaged.
fn fate_of_booted(facts: &Facts, disk: &DiskFacts) -> Fate {
    let mut sentence = match (facts.layout, facts.root) {
        (Layout::OwnRoots, _) => "continues to run: it has a root of its own".to_owned(),
        (Layout::SharedRoot, heal::RootState::Whole) => "continues to run, with one half of the shared root".to_owned(),
        (Layout::SharedRoot, heal::RootState::Degraded) => "continues to run: the shared root is degraded already".to_owned(),
        (Layout::SharedRoot, heal::RootState::Behind) => {
            "may stop: one half of the shared root is out of date until dualroot-heal.service has succeeded".to_owned()
        }
    };
    let Some(read) = disk.own.as_ref().filter(|read| !read.faults.is_empty()) else {
        return Fate::new(None, Standing::Whole, sentence);
    };
    sentence.push_str(&format!("; but it may not boot again: {}, read at {}", first(&read.faults), date(read.at)));
    Fate { faults: read.faults.clone(), ..Fate::new(None, Standing::Broken, sentence) }
}

/// The fate of a spare: by the present facts, and if these show no fault, by the results of its last sync.
fn fate_of_spare(facts: &Facts, disk: &DiskFacts) -> Fate {
    if let Some(fault) = &disk.fault {
        return Fate::unknown(Standing::Refused, fault.clone());
    }
    let seen = disk.seen.as_ref();
    if !disk.present {
        let since = seen.and_then(|seen| seen.absent_since).map(|at| format!(" (no sync has found it since {})", date(at)));
        let sentence = format!("is missing{}", since.unwrap_or_default());
        let faults = vec![Fault::new(Code::F21, sentence.clone())];
        return Fate { faults, ..Fate::new(Some(false), Standing::Absent, sentence) };
    }
    if let Some(role) = disk.missing.first() {
        let text = format!("its {role}= partition is missing, but other partitions of it are present");
        return Fate::unknown(Standing::Refused, Fault::new(Code::F21, text).on(role));
    }
    match facts.root {
        heal::RootState::Whole => {}
        heal::RootState::Degraded => {
            return Fate::fails(vec![Fault::new(Code::F28, "the shared root is degraded: one of its disks is missing")], "");
        }
        heal::RootState::Behind => {
            let text = "one half of the shared root is out of date until dualroot-heal.service has succeeded";
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
        (Some(at), _) if !facts.running => unknown(Code::F18, format!("the sync that began at {} was interrupted", date(at))),
        (Some(at), None) => unknown(Code::Unknown, format!("its first sync began at {} and is still running", date(at))),
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
    // A verification says nothing about files that were written after it.
    let is_unwritten = seen.proof.is_some() || seen.begun.is_some();
    if let Some(read) = seen.read.as_ref().filter(|read| is_unwritten && !read.faults.is_empty()) {
        return Fate::fails(read.faults.clone(), &format!(", read at {}", date(read.at)));
    }
    match &last.outcome {
        Outcome::Failed(why) => unknown(Standing::Broken, format!("the sync of {at} failed: {why}")),
        Outcome::Refused(why) => unknown(Standing::Refused, format!("the sync of {at} was refused: {why}")),
        Outcome::WouldNotBoot(faults) => Fate::fails(faults.clone(), &format!(", as of {at}")),
        Outcome::Boots => {
            let contents = match facts.layout {
                Layout::OwnRoots => format!(", with the files of {}", ago(facts.now, last.at)),
                Layout::SharedRoot => String::new(),
            };
            Fate::new(Some(true), Standing::Whole, format!("boots, as of {at}{contents}"))
        }
    }
}

/// The first of several faults, and the number of the others.
fn first(faults: &[Fault]) -> String {
    match faults {
        [] => "for an unknown reason".to_owned(),
        [only] => only.to_string(),
        [first, more @ ..] => format!("{first} (and {} more)", more.len()),
    }
}

/// The time between `then` and now, in one unit.
fn ago(now: u64, then: u64) -> String {
    let Some(seconds) = now.checked_sub(then) else { return "a time in the future".to_owned() };
    let units = [("day", 86400), ("hour", 3600), ("minute", 60), ("second", 1)];
    let (unit, length) = units.into_iter().find(|(_, length)| seconds >= *length).unwrap_or(("second", 1));
    let count = seconds / length;
    format!("{count} {unit}{} ago", if count == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests;
