//! Finding out whether a spare holds changes that the booted disk doesn't have; if so, it is not overwritten (failure mode 7).
//!
//! Each disk has a small record on its ESP. For every disk of the pair, it counts the boots whose changes this disk holds, and has the time of
//! the last of them. A disk's count grows when it is booted, and also when a spare that was up to date is missing while changes are made. A sync
//! copies the counts together with the files. It runs only if the booted disk has every boot that the spare has; boots that only the spare has,
//! its own or another disk's, are changes that would be lost. DRBD decides in the same way, by its generation identifiers; counts for each disk
//! also work for more than two disks, and show by how much one of them is newer.
//!
//! A record that can't be read, or belongs to another pair or to another disk of this pair, proves nothing, so nothing is overwritten then.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::Path;

use anyhow::{Context, Result, bail};
use uuid::Uuid;

use crate::base::clock::{date, kernel_id, now};
use crate::base::refusal::refused_for_age;
use crate::base::root::Root;
use crate::base::types::{DiskName, Role};
use crate::boot::files::LINEAGE;
use crate::pair::machine::Machine;
use crate::write::below::Below;
use crate::write::change::Change;
use crate::write::sector::text_change;

/// The first line of a record.
const HEAD: &str = "dualroot lineage 2";
/// The key of a record's last line: a hash of the lines before it.
const SUM: &str = "sum=";

/// The boots of one disk.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
struct Boots {
    count: u64,
    /// The time of the last of them, in seconds since 1970 by that machine's clock; 0 where it is unknown.
    since: u64,
}

/// The record on a disk's ESP.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Record {
    /// The identifier of the pair; all disks that are synced with each other have the same.
    pair: Option<Uuid>,
    /// The disk's name.
    disk: Option<DiskName>,
    /// The kernel's boot ID of the last boot of this disk after which dualroot ran; None where it never did.
    boot_id: Option<Uuid>,
    /// The boots of each disk whose changes this disk holds.
    boots: BTreeMap<DiskName, Boots>,
    /// The spares that hold all changes of this disk's boots.
    level: BTreeSet<DiskName>,
    /// The disk that this one was last synced from, and when, as in [`Boots::since`].
    synced: Option<(DiskName, u64)>,
}

/// The relation of a spare's changes to the booted disk's.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Relation {
    /// The booted disk has all changes of the spare.
    Ancestor,
    /// The spare has more, and the booted disk has only the present boot that the spare lacks.
    Newer(Lead),
    /// Each has changes that the other lacks: first the booted disk's, then the spare's.
    Split(Lead, Lead),
}

/// The boots that one disk has and another lacks.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Lead {
    /// Their number.
    pub boots: u64,
    /// The disk of the last one.
    pub of: DiskName,
    /// The time of the last one.
    since: u64,
}

impl Lead {
    /// Describes them for messages; `without` is the disk that lacks them.
    pub fn describe(&self, without: DiskName) -> String {
        let boots = if self.boots == 1 { "one boot".to_owned() } else { format!("{} boots", self.boots) };
        let last = if self.since == 0 { String::new() } else { format!(", the last of {}", date(self.since)) };
        format!("{boots} of {} without {without}{last}", self.of)
    }
}

impl Record {
    /// Reads a record: a head, `key=value` lines, and the hash of all of them. `pair=ID`, `disk=diskN`, `boot=ID`, `diskN=COUNT TIME`,
    /// `level=diskN`, `synced=diskN TIME`.
    ///
    /// # Errors
    /// Anything else: a record that can't be read doesn't show what may be overwritten.
    pub fn parse(text: &[u8]) -> Result<Self> {
        let text = std::str::from_utf8(text).context("it is not UTF-8")?.trim_end();
        if text.starts_with("boot=") {
            return Self::parse_first(text);
        }
        let (body, sum) = text.rsplit_once('\n').context("it is truncated")?;
        let body = format!("{body}\n");
        if sum.strip_prefix(SUM) != Some(hash(&body).as_str()) {
            bail!("its last line is not the hash of the other lines");
        }
        let lines = body
            .strip_prefix(HEAD)
            .and_then(|rest| rest.strip_prefix('\n'))
            .with_context(|| format!("it does not begin with '{HEAD}'"))?;
        let mut record = Self::default();
        for line in lines.lines() {
            record.read_line(line).with_context(|| format!("its line '{}' can't be read", line.escape_debug()))?;
        }
        Ok(record)
    }

    /// Reads the oldest format of records: without a head, times and a hash, and with `boot=none` where there was no boot.
    fn parse_first(text: &str) -> Result<Self> {
        let mut record = Self::default();
        for line in text.lines().filter(|line| *line != "boot=none") {
            let timed = if line.starts_with("disk") { format!("{line} 0") } else { line.to_owned() };
            record.read_line(&timed).with_context(|| format!("its line '{}' can't be read", line.escape_debug()))?;
        }
        Ok(record)
    }

    fn read_line(&mut self, line: &str) -> Result<()> {
        let (key, value) = line.split_once('=').context("it has no '='")?;
        let timed = || -> Result<(&str, u64)> {
            let (value, time) = value.split_once(' ').context("it has no time")?;
            Ok((value, time.parse().context("its time is no number")?))
        };
        match key {
            "pair" => self.pair = Some(Uuid::try_parse(value)?),
            "disk" => self.disk = Some(DiskName::parse(value)?),
            "boot" => self.boot_id = Some(Uuid::try_parse(value)?),
            "level" => drop(self.level.insert(DiskName::parse(value)?)),
            "synced" => {
                let (disk, time) = timed()?;
                self.synced = Some((DiskName::parse(disk)?, time));
            }
            disk => {
                let (count, since) = timed()?;
                let boots = Boots { count: count.parse().context("its count is no number")?, since };
                self.boots.insert(DiskName::parse(disk)?, boots);
            }
        }
        Ok(())
    }

    /// The text of the record, which [`Record::parse`] reads.
    pub fn text(&self) -> String {
        let mut text = format!("{HEAD}\n");
        let mut line = |key: &str, value: String| {
            let _ = writeln!(text, "{key}={value}");
        };
        for (key, id) in [("pair", self.pair), ("boot", self.boot_id)] {
            id.into_iter().for_each(|id| line(key, id.to_string()));
        }
        self.disk.iter().for_each(|disk| line("disk", disk.to_string()));
        for (disk, boots) in &self.boots {
            line(&disk.to_string(), format!("{} {}", boots.count, boots.since));
        }
        self.level.iter().for_each(|disk| line("level", disk.to_string()));
        self.synced.iter().for_each(|(disk, time)| line("synced", format!("{disk} {time}")));
        let sum = hash(&text);
        let _ = writeln!(text, "{SUM}{sum}");
        text
    }

    /// Loads this disk's record from its ESP; a default one where there is none.
    ///
    /// # Errors
    /// A record that can't be read, or is another disk's.
    pub fn load(esp: &Below, of: DiskName) -> Result<Self> {
        let Some(record) = Self::read(esp)? else { return Ok(Self::default()) };
        match record.disk {
            Some(disk) if disk != of => {
                bail!("{LINEAGE} on the ESP says that this is {disk}, but the configuration says {of}")
            }
            _ => Ok(record),
        }
    }

    /// Loads the booted disk's record, with the disk's name: that of the configuration, or, where that is wrong, the record's own.
    ///
    /// # Errors
    /// As [`Record::load`]; a disk without a name.
    pub fn of_booted(esp: &Below, name: Option<DiskName>) -> Result<(DiskName, Self)> {
        if let Some(name) = name {
            return Ok((name, Self::load(esp, name)?));
        }
        let record =
            Self::read(esp)?.context("the ESP that was booted is in no section of the configuration, and has no record")?;
        Ok((record.disk.with_context(|| format!("{LINEAGE} does not name its disk"))?, record))
    }

    fn read(esp: &Below) -> Result<Option<Self>> {
        let Some(text) = esp.read(LINEAGE)? else { return Ok(None) };
        Self::parse(&text).map(Some).with_context(|| format!("{LINEAGE} on the ESP is damaged"))
    }

    /// Writes the record, in place where possible.
    ///
    /// # Errors
    /// An ESP that can't be written.
    pub fn save(&self, esp: &Below) -> Result<()> {
        let text = self.text();
        let old = esp.read(LINEAGE)?;
        if old.as_deref().is_some_and(|old| old.trim_ascii_end() == text.as_bytes().trim_ascii_end()) {
            return Ok(());
        }
        esp.apply(&Change::MakeDir("EFI/dualroot".into()))?;
        esp.apply(&text_change(LINEAGE, old.map(|o| o.len() as u64), text.as_bytes()))?;
        esp.apply(&Change::Barrier)
    }

    /// Whether the disk was never booted, and no sync has ever begun to write it.
    pub fn is_new(&self) -> bool {
        *self == Self::default()
    }

    /// The number of boots of each disk whose changes this disk holds.
    pub fn boots(&self) -> impl Iterator<Item = (DiskName, u64)> {
        self.boots.iter().map(|(disk, boots)| (*disk, boots.count))
    }

    /// The disk that this one was last synced from, and when that ended, in seconds since 1970.
    pub fn last_synced(&self) -> Option<(DiskName, u64)> {
        self.synced
    }

    /// Notes that the disk was booted. A second call in the same boot changes nothing.
    ///
    /// # Errors
    /// A boot ID that can't be read from the kernel.
    pub fn note_boot(&mut self, root: &Root, own: DiskName) -> Result<()> {
        self.booted(own, kernel_id(root, "boot_id")?, now());
        Ok(())
    }

    fn booted(&mut self, own: DiskName, id: Uuid, now: u64) {
        self.disk = Some(own);
        if self.boot_id.replace(id) != Some(id) {
            self.count_boot(own, now);
        }
        // The first boot of a pair gives it its identifier: a boot ID, which is unique.
        self.pair.get_or_insert(id);
    }

    /// Counts one more boot of this disk; no spare holds its changes yet.
    fn count_boot(&mut self, own: DiskName, now: u64) {
        let boots = self.boots.entry(own).or_default();
        *boots = Boots { count: boots.count.saturating_add(1), since: now };
        self.level.clear();
    }

    /// Notes that this spare doesn't get the booted disk's changes from now on. If it was up to date, this counts as a boot. Returns whether
    /// that was so.
    pub fn left_behind(&mut self, own: DiskName, spare: DiskName) -> bool {
        let was_level = self.level.contains(&spare);
        if was_level {
            self.count_boot(own, now());
        }
        was_level
    }

    /// The boots that this record has and another lacks.
    fn lead(&self, other: &Self) -> Option<Lead> {
        let mut lead: Option<Lead> = None;
        for (disk, ours) in &self.boots {
            let theirs = other.boots.get(disk).copied().unwrap_or_default();
            // A disk that was restored from an image counts some of its boots again, with other times.
            let is_another = ours.count == theirs.count && ours.since != theirs.since && ours.since != 0 && theirs.since != 0;
            let more = if is_another { 1 } else { ours.count.saturating_sub(theirs.count) };
            if more > 0 {
                let boots = lead.as_ref().map_or(0, |lead| lead.boots).saturating_add(more);
                let last = lead.take().filter(|lead| lead.since > ours.since);
                let (of, since) = last.map_or((*disk, ours.since), |lead| (lead.of, lead.since));
                lead = Some(Lead { boots, of, since });
            }
        }
        lead
    }

    /// The relation of a spare with that record to the booted disk, whose record this is.
    pub fn relation(&self, own: DiskName, of_spare: &Self) -> Relation {
        match (self.lead(of_spare), of_spare.lead(self)) {
            (_, None) => Relation::Ancestor,
            (None, Some(newer)) => Relation::Newer(newer),
            // The one boot that the spare lacks is the present one. An older one would be changes, even if it is the only one.
            (Some(ours), Some(newer)) if ours.of == own && ours.boots == 1 && ours.since > newer.since => Relation::Newer(newer),
            (Some(ours), Some(theirs)) => Relation::Split(ours, theirs),
        }
    }

    /// Checks that the spare with that record may be overwritten from the disk with this one.
    ///
    /// # Errors
    /// A refusal with the ways out, if the spare has changes that the disk lacks, or isn't of this pair.
    pub fn check(&self, own: DiskName, spare: DiskName, of_spare: &Self) -> Result<()> {
        let foreign = matches!((self.pair, of_spare.pair), (Some(ours), Some(theirs)) if ours != theirs);
        let finding = match self.relation(own, of_spare) {
            _ if foreign => {
                format!(
                    "{spare} was synced with another disk than {own}, or one of them has lost its record; either may be newer"
                )
            }
            Relation::Ancestor => return Ok(()),
            Relation::Newer(theirs) => format!(
                "{spare} is newer than {own}: it has {}; {own} has only the present boot without {spare}{}",
                theirs.describe(own),
                self.boots
                    .get(&own)
                    .filter(|boots| boots.since != 0)
                    .map_or(String::new(), |boots| format!(", of {}", date(boots.since)))
            ),
            Relation::Split(ours, theirs) => format!(
                "{own} and {spare} were each used without the other: {own} has {}, {spare} has {}",
                ours.describe(spare),
                theirs.describe(own)
            ),
        };
        let sentence = format!(
            "{finding}; to keep the changes on {spare}, boot it ('dualroot-sync --boot-next {spare}', then reboot) and run \
             'dualroot-sync --discard-spare {own}' there; to give them up, run 'dualroot-sync --discard-spare {spare}' here"
        );
        Err(refused_for_age(spare, sentence))
    }

    /// Marks a spare's record before it is written for the first time, from the disk with the record `own`.
    pub fn begun(&mut self, own: &Self, spare: DiskName) {
        (self.pair, self.disk) = (own.pair, Some(spare));
    }

    /// Updates both records after a sync from the disk with this one. Boots of the spare that were given up are counted as known.
    pub fn synced(&mut self, own: DiskName, spare: DiskName, of_spare: &mut Self) {
        for (disk, boots) in &of_spare.boots {
            let known = self.boots.entry(*disk).or_default();
            if boots.count > known.count {
                *known = *boots;
            }
        }
        (of_spare.pair, of_spare.disk) = (self.pair, Some(spare));
        of_spare.boots = self.boots.clone();
        of_spare.level.clear();
        of_spare.synced = Some((own, now()));
        self.level.insert(spare);
    }
}

fn hash(text: &str) -> String {
    blake3::hash(text.as_bytes()).to_hex().chars().take(16).collect()
}

/// The booted disk's ESP, and its record.
pub(crate) fn own_record(machine: &Machine) -> Result<(Below, Record)> {
    let places = machine.booted.boot_places();
    let (_, _, dir) = places.iter().find(|(role, _, _)| *role == Role::Esp).context("the booted disk has no ESP")?;
    let esp = Below::open(Path::new(dir.as_str()))?;
    let record = Record::load(&esp, machine.booted.name).map_err(|e| {
        refused_for_age(
            machine.booted.name,
            format!("{dir}: {e:#}; remove that file, and the next sync asks which disk is newer"),
        )
    })?;
    Ok((esp, record))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(n: u32) -> DiskName {
        DiskName::parse(&format!("disk{n}")).unwrap()
    }

    /// A boot with this boot ID, which is also its day: days after 2026-11-01.
    fn boot(record: &mut Record, own: u32, id: u64) {
        record.booted(disk(own), Uuid::from_u128(id.into()), 1_793_491_200 + id * 86400);
    }

    fn refusal(own: &Record, of: u32, spare: u32, of_spare: &Record) -> String {
        own.check(disk(of), disk(spare), of_spare).unwrap_err().to_string()
    }

    /// A and B, the second just synced from the first.
    fn pair() -> (Record, Record) {
        let (mut a, mut b) = (Record::default(), Record::default());
        boot(&mut a, 0, 1);
        a.check(disk(0), disk(1), &b).unwrap();
        b.begun(&a, disk(1));
        a.check(disk(0), disk(1), &b).unwrap();
        a.synced(disk(0), disk(1), &mut b);
        (a, b)
    }

    #[test]
    fn f07_a_stale_disk_that_is_booted_overwrites_nothing() {
        let (mut a, mut b) = pair();
        // Another day with A: nothing is new on B.
        boot(&mut a, 0, 2);
        a.check(disk(0), disk(1), &b).unwrap();
        a.synced(disk(0), disk(1), &mut b);
        // A drops out, and B is used for a week; A returns and is booted.
        for day in 3..=9 {
            boot(&mut b, 1, day);
        }
        let stale = a.clone();
        boot(&mut a, 0, 10);
        assert!(matches!(a.relation(disk(0), &b), Relation::Newer(Lead { boots: 7, .. })), "{:?}", a.relation(disk(0), &b));
        let said = refusal(&a, 0, 1, &b);
        for part in [
            "disk1 is newer than disk0: it has 7 boots of disk1 without disk0, the last of 2026-11-10 00:00:00 UTC",
            "disk0 has only the present boot without disk1, of 2026-11-11 00:00:00 UTC",
            "dualroot-sync --boot-next disk1",
            "run 'dualroot-sync --discard-spare disk0' there",
            "run 'dualroot-sync --discard-spare disk1' here",
        ] {
            assert!(said.contains(part), "{said}");
        }
        // Changes on A since then are not overwritten either, without being asked.
        let said = refusal(&b, 1, 0, &a);
        assert!(
            said.contains("disk1 has 7 boots of disk1 without disk0") && said.contains("disk0 has one boot of disk0"),
            "{said}"
        );
        // If B had been booted instead, A would have been overwritten without a question.
        b.check(disk(1), disk(0), &stale).unwrap();
        // Changes that were given up are not asked for again.
        let mut again = b.clone();
        again.synced(disk(1), disk(0), &mut a);
        again.check(disk(1), disk(0), &a).unwrap();
        boot(&mut a, 0, 11);
        a.check(disk(0), disk(1), &again).unwrap();
    }

    #[test]
    fn f07_both_disks_have_changes() {
        let (mut a, mut b) = pair();
        for day in [2, 3] {
            boot(&mut a, 0, day);
        }
        for day in [4, 5, 6] {
            boot(&mut b, 1, day);
        }
        assert!(matches!(a.relation(disk(0), &b), Relation::Split(Lead { boots: 2, .. }, Lead { boots: 3, .. })));
        for said in [refusal(&a, 0, 1, &b), refusal(&b, 1, 0, &a)] {
            assert!(said.contains("were each used without the other"), "{said}");
            assert!(said.contains("disk0 has 2 boots of disk0 without disk1, the last of 2026-11-04 00:00:00 UTC"), "{said}");
        }
    }

    #[test]
    fn f07_a_disk_that_was_used_without_the_spare_is_not_overwritten_by_it() {
        let (mut a, mut b) = pair();
        // In the same boot B drops out, and A is used for a week, with a sync a day.
        assert!(a.left_behind(disk(0), disk(1)));
        assert!(!a.left_behind(disk(0), disk(1)), "once is enough");
        // B is put back, and the firmware boots it.
        let stale = b.clone();
        // A's change has the present time.
        boot(&mut b, 1, 36500);
        let said = refusal(&b, 1, 0, &a);
        assert!(said.contains("disk0 is newer than disk1"), "{said}");
        a.check(disk(0), disk(1), &stale).unwrap();
    }

    #[test]
    fn f07_a_disk_that_was_used_for_long_is_not_called_old() {
        let (mut a, mut b) = pair();
        a.level.insert(disk(1));
        // B is pulled, A is used; 40 days later B is booted elsewhere once.
        a.count_boot(disk(0), 1_793_491_200 + 2 * 86400);
        boot(&mut b, 1, 42);
        assert!(matches!(a.relation(disk(0), &b), Relation::Split(..)), "{:?}", a.relation(disk(0), &b));
    }

    #[test]
    fn f07_a_disk_that_was_restored_counts_again() {
        let (a, mut b) = pair();
        let image = b.clone();
        boot(&mut b, 1, 2);
        let mut a = a.clone();
        b.synced(disk(1), disk(0), &mut a);
        // B is restored from an image, and used for a day: by its count alone, A has that boot.
        let mut b = image;
        boot(&mut b, 1, 3);
        boot(&mut a, 0, 4);
        assert!(a.check(disk(0), disk(1), &b).is_err());
        assert!(b.check(disk(1), disk(0), &a).is_err());
        a.synced(disk(0), disk(1), &mut b);
        a.check(disk(0), disk(1), &b).unwrap();
    }

    #[test]
    fn f07_a_third_disk_that_missed_a_sync_does_not_overwrite_the_second() {
        let ((mut a, mut b), mut c) = (pair(), Record::default());
        a.synced(disk(0), disk(2), &mut c);
        boot(&mut a, 0, 2);
        a.synced(disk(0), disk(1), &mut b);
        // A dies; its changes are on B, and the firmware boots C.
        let (mut first, old) = (b.clone(), c.clone());
        boot(&mut c, 2, 3);
        let said = refusal(&c, 2, 1, &b);
        assert!(said.contains("disk1 is newer than disk2: it has one boot of disk0 without disk2"), "{said}");
        // B has all that C has.
        boot(&mut first, 1, 4);
        first.check(disk(1), disk(2), &old).unwrap();
    }

    #[test]
    fn f07_records_that_are_lost_or_of_another_pair_prove_nothing() {
        let (mut a, mut b) = pair();
        // B's record is lost, and B is booted: by its counts alone it would be older.
        boot(&mut a, 0, 2);
        let mut lost = Record::default();
        boot(&mut lost, 1, 3);
        for said in [refusal(&a, 0, 1, &lost), refusal(&lost, 1, 0, &a)] {
            assert!(said.contains("either may be newer"), "{said}");
        }
        // A's is lost.
        let mut lost = Record::default();
        assert!(refusal(&lost, 0, 1, &b).contains("disk1 is newer than disk0"));
        boot(&mut lost, 0, 4);
        assert!(refusal(&lost, 0, 1, &b).contains("either may be newer"));
        // Once the changes are given up, they are a pair again.
        lost.synced(disk(0), disk(1), &mut b);
        lost.check(disk(0), disk(1), &b).unwrap();
        boot(&mut b, 1, 5);
        b.check(disk(1), disk(0), &lost).unwrap();
    }

    #[test]
    fn f07_another_disks_record_is_refused() {
        let tmp = tempfile::tempdir().unwrap();
        std::fs::create_dir(tmp.path().join("EFI")).unwrap();
        let esp = Below::open(tmp.path()).unwrap();
        assert!(Record::load(&esp, disk(1)).unwrap().is_new());
        let (_, b) = pair();
        b.save(&esp).unwrap();
        assert_eq!(Record::load(&esp, disk(1)).unwrap(), b);
        let said = Record::load(&esp, disk(0)).unwrap_err().to_string();
        assert!(said.contains("says that this is disk1, but the configuration says disk0"), "{said}");
    }

    #[test]
    fn f26_records_that_are_damaged_are_errors() {
        assert!(Record::default().is_new());
        let (mut a, mut b) = pair();
        boot(&mut b, 1, 7);
        b.synced(disk(1), disk(0), &mut a);
        for record in [&a, &b, &Record::default()] {
            assert_eq!(Record::parse(record.text().as_bytes()).unwrap(), *record);
        }
        let whole = b.text();
        for at in 0..whole.len() - 1 {
            assert!(Record::parse(&whole.as_bytes()[..at]).is_err(), "{at}");
            let mut torn = whole.clone().into_bytes();
            torn[at] ^= 1;
            assert!(Record::parse(&torn).is_err(), "{at}");
        }
        let summed = |lines: &str| format!("{lines}{SUM}{}\n", hash(lines));
        Record::parse(summed(&format!("{HEAD}\ndisk1=3 0\n")).as_bytes()).unwrap();
        for bad in ["", "disk0=1\n", "dualroot lineage 3\n", &format!("{HEAD} \n")] {
            assert!(Record::parse(summed(bad).as_bytes()).is_err(), "{bad}");
        }
        for line in
            ["boot", "boot=x", "what=1 1", "disk01=1 1", "disk1=none 1", "disk1=1", "disk1=1 x", "level=x", "synced=disk1", ""]
        {
            assert!(Record::parse(summed(&format!("{HEAD}\n{line}\n")).as_bytes()).is_err(), "{line}");
        }
        assert!(Record::parse(b"\xff=1").is_err());
        let first = Record::parse(b"boot=none\ndisk0=3\nlevel=disk1\n\n\n").unwrap();
        assert_eq!((first.boots[&disk(0)], first.level.len()), (Boots { count: 3, since: 0 }, 1));
        assert!(Record::parse(b"boot=none\ndisk0=x\n").is_err());
        assert_eq!(date(u64::MAX), "a date after the year 9999");
        assert_eq!(date(253_402_300_799), "9999-12-31 23:59:59 UTC");
    }
}
