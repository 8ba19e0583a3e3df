//! Whether a spare holds what the booted disk doesn't: then it is not overwritten (failure mode 7).
//!
//! Each disk has a small record on its ESP that says what its content is made of: of every disk, how many of its lives, and when the last
//! of them began. A disk begins a new life when it is booted, and when a spare that had all of the present one is not there to get the
//! rest. A sync hands the record on with the content. It goes ahead only where the booted disk has every life that the spare has; lives
//! that only the spare has, its own or another disk's, are work that would be lost. DRBD decides in the same way, by its generation
//! identifiers; counts for each disk tell more of more than two disks, and by how much one of them is newer.
//!
//! What can't be read, belongs to another pair of disks or to another disk of this one says nothing: then nothing is overwritten, either.

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
/// What the last line of a record begins with: a hash of those before it.
const SUM: &str = "sum=";

/// What is known of a disk's lives.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
struct Life {
    count: u64,
    /// When the last of them began, in seconds since 1970 by that machine's clock; 0 where nobody knows.
    since: u64,
}

/// What an ESP says of its disk.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Record {
    /// The disks that are synced with each other have the same.
    pair: Option<Uuid>,
    /// Which of them this is.
    disk: Option<DiskName>,
    /// The kernel's id of the last boot of this disk after which dualroot ran; None where it never did.
    boot: Option<Uuid>,
    /// The lives of each disk that are in what this disk holds.
    lives: BTreeMap<DiskName, Life>,
    /// Spares that have all lives of this disk.
    level: BTreeSet<DiskName>,
    /// The disk that this one was last synced from, and when, as in [`Life::since`].
    synced: Option<(DiskName, u64)>,
}

/// How what is on a spare relates to what is on the booted disk.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Relation {
    /// The booted disk has all that the spare has.
    Ancestor,
    /// The spare has more, and the booted disk has nothing but the present boot that the spare lacks.
    Newer(Lead),
    /// Each has what the other lacks: first the booted disk's, then the spare's.
    Split(Lead, Lead),
}

/// What one disk has and another lacks.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Lead {
    /// How many lives.
    pub lives: u64,
    /// Whose the last of them is.
    pub of: DiskName,
    /// When that began.
    since: u64,
}

impl Lead {
    /// For people; `without` is the disk that lacks it.
    pub fn told(&self, without: DiskName) -> String {
        let boots = if self.lives == 1 { "one boot".to_owned() } else { format!("{} boots", self.lives) };
        let last = if self.since == 0 { String::new() } else { format!(", the last of {}", date(self.since)) };
        format!("{boots} of {} without {without}{last}", self.of)
    }
}

impl Record {
    /// Reads a record: a head, `key=value` lines, and the hash of all of them. `pair=ID`, `disk=diskN`, `boot=ID`, `diskN=COUNT TIME`,
    /// `level=diskN`, `synced=diskN TIME`.
    ///
    /// # Errors
    /// Anything else: a record that can't be read says nothing about what may be overwritten.
    pub fn parse(text: &[u8]) -> Result<Self> {
        let text = std::str::from_utf8(text).context("it is not UTF-8")?.trim_end();
        if text.starts_with("boot=") {
            return Self::parse_first(text);
        }
        let (body, sum) = text.rsplit_once('\n').context("it is cut off")?;
        let body = format!("{body}\n");
        if sum.strip_prefix(SUM) != Some(hash(&body).as_str()) {
            bail!("its last line is not the hash of the rest");
        }
        let lines =
            body.strip_prefix(HEAD).and_then(|rest| rest.strip_prefix('\n')).with_context(|| format!("it is no '{HEAD}'"))?;
        let mut record = Self::default();
        for line in lines.lines() {
            record.take(line).with_context(|| format!("its line '{}' can't be read", line.escape_debug()))?;
        }
        Ok(record)
    }

    /// Reads the first form that records had: without a head, times and a hash, and with `boot=none` where there was none.
    fn parse_first(text: &str) -> Result<Self> {
        let mut record = Self::default();
        for line in text.lines().filter(|line| *line != "boot=none") {
            let timed = if line.starts_with("disk") { format!("{line} 0") } else { line.to_owned() };
            record.take(&timed).with_context(|| format!("its line '{}' can't be read", line.escape_debug()))?;
        }
        Ok(record)
    }

    fn take(&mut self, line: &str) -> Result<()> {
        let (key, value) = line.split_once('=').context("it has no '='")?;
        let timed = || -> Result<(&str, u64)> {
            let (value, time) = value.split_once(' ').context("it has no time")?;
            Ok((value, time.parse().context("that is no time")?))
        };
        match key {
            "pair" => self.pair = Some(Uuid::try_parse(value)?),
            "disk" => self.disk = Some(DiskName::parse(value)?),
            "boot" => self.boot = Some(Uuid::try_parse(value)?),
            "level" => drop(self.level.insert(DiskName::parse(value)?)),
            "synced" => {
                let (disk, time) = timed()?;
                self.synced = Some((DiskName::parse(disk)?, time));
            }
            disk => {
                let (count, since) = timed()?;
                let life = Life { count: count.parse().context("that is no count")?, since };
                self.lives.insert(DiskName::parse(disk)?, life);
            }
        }
        Ok(())
    }

    /// The record as it is written, which [`Record::parse`] reads.
    pub fn text(&self) -> String {
        let mut text = format!("{HEAD}\n");
        let mut line = |key: &str, value: String| {
            let _ = writeln!(text, "{key}={value}");
        };
        for (key, id) in [("pair", self.pair), ("boot", self.boot)] {
            id.into_iter().for_each(|id| line(key, id.to_string()));
        }
        self.disk.iter().for_each(|disk| line("disk", disk.to_string()));
        for (disk, life) in &self.lives {
            line(&disk.to_string(), format!("{} {}", life.count, life.since));
        }
        self.level.iter().for_each(|disk| line("level", disk.to_string()));
        self.synced.iter().for_each(|(disk, time)| line("synced", format!("{disk} {time}")));
        let sum = hash(&text);
        let _ = writeln!(text, "{SUM}{sum}");
        text
    }

    /// The record of an ESP, which is that of this disk; a default one where there is none.
    ///
    /// # Errors
    /// One that can't be read, or is another disk's.
    pub fn load(esp: &Below, of: DiskName) -> Result<Self> {
        let Some(record) = Self::read(esp)? else { return Ok(Self::default()) };
        match record.disk {
            Some(disk) if disk != of => {
                bail!("{LINEAGE} on the ESP says that it is {disk}, and the configuration that it is {of}")
            }
            _ => Ok(record),
        }
    }

    /// The record of the disk that is booted, with that disk's name: that of the configuration, or, where that is wrong, the record's own.
    ///
    /// # Errors
    /// As [`Record::load`]; a disk that nothing names.
    pub fn of_booted(esp: &Below, name: Option<DiskName>) -> Result<(DiskName, Self)> {
        if let Some(name) = name {
            return Ok((name, Self::load(esp, name)?));
        }
        let record =
            Self::read(esp)?.context("the ESP that was booted is in no section of the configuration, and has no record")?;
        Ok((record.disk.with_context(|| format!("{LINEAGE} doesn't say which disk it is of"))?, record))
    }

    fn read(esp: &Below) -> Result<Option<Self>> {
        let Some(text) = esp.read(LINEAGE)? else { return Ok(None) };
        Self::parse(&text).map(Some).with_context(|| format!("{LINEAGE} on the ESP is damaged"))
    }

    /// Writes the record, in place where it can be.
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

    /// Whether no sync has ever begun to write this disk, and it was never booted.
    pub fn is_new(&self) -> bool {
        *self == Self::default()
    }

    /// How many lives of each disk are in what this one holds.
    pub fn lives(&self) -> impl Iterator<Item = (DiskName, u64)> {
        self.lives.iter().map(|(disk, life)| (*disk, life.count))
    }

    /// The disk that this one was last synced from, and when that ended, in seconds since 1970.
    pub fn last_synced(&self) -> Option<(DiskName, u64)> {
        self.synced
    }

    /// Notes that the disk was booted: with a boot, it begins a new life.
    ///
    /// # Errors
    /// A kernel that doesn't tell.
    pub fn note_boot(&mut self, root: &Root, own: DiskName) -> Result<()> {
        self.booted(own, kernel_id(root, "boot_id")?, now());
        Ok(())
    }

    fn booted(&mut self, own: DiskName, id: Uuid, now: u64) {
        self.disk = Some(own);
        if self.boot.replace(id) != Some(id) {
            self.live_on(own, now);
        }
        // The first boot of a pair gives it its name. That is the boot's, of which there are no two.
        self.pair.get_or_insert(id);
    }

    fn live_on(&mut self, own: DiskName, now: u64) {
        let life = self.lives.entry(own).or_default();
        *life = Life { count: life.count.saturating_add(1), since: now };
        self.level.clear();
    }

    /// Notes that the booted disk goes on without this spare. What it holds from now on isn't on a spare that was level with it.
    /// Returns whether that makes a difference.
    pub fn left_behind(&mut self, own: DiskName, spare: DiskName) -> bool {
        let was_level = self.level.contains(&spare);
        if was_level {
            self.live_on(own, now());
        }
        was_level
    }

    /// What this one has and another lacks.
    fn lead(&self, other: &Self) -> Option<Lead> {
        let mut lead: Option<Lead> = None;
        for (disk, life) in &self.lives {
            let theirs = other.lives.get(disk).copied().unwrap_or_default();
            // A disk that was brought back from an image counts some of its lives again: they began at another time.
            let other_life = life.count == theirs.count && life.since != theirs.since && life.since != 0 && theirs.since != 0;
            let more = if other_life { 1 } else { life.count.saturating_sub(theirs.count) };
            if more > 0 {
                let lives = lead.as_ref().map_or(0, |lead| lead.lives).saturating_add(more);
                let last = lead.take().filter(|lead| lead.since > life.since);
                let (of, since) = last.map_or((*disk, life.since), |lead| (lead.of, lead.since));
                lead = Some(Lead { lives, of, since });
            }
        }
        lead
    }

    /// How a spare with that record relates to the booted disk, with ours.
    pub fn relation(&self, own: DiskName, of_spare: &Self) -> Relation {
        match (self.lead(of_spare), of_spare.lead(self)) {
            (_, None) => Relation::Ancestor,
            (None, Some(newer)) => Relation::Newer(newer),
            // Each boot begins a life, also that of a disk that was away. One that began before was more than that.
            (Some(ours), Some(newer)) if ours.of == own && ours.lives == 1 && ours.since > newer.since => Relation::Newer(newer),
            (Some(ours), Some(theirs)) => Relation::Split(ours, theirs),
        }
    }

    /// Whether the spare with that record may be overwritten from the disk with ours.
    ///
    /// # Errors
    /// A refusal with the ways out: it holds what ours doesn't, or isn't of this pair.
    pub fn check(&self, own: DiskName, spare: DiskName, of_spare: &Self) -> Result<()> {
        let foreign = matches!((self.pair, of_spare.pair), (Some(ours), Some(theirs)) if ours != theirs);
        let what = match self.relation(own, of_spare) {
            _ if foreign => {
                format!(
                    "{spare} was synced with another disk than {own}, or one of them has lost its record, so either may be newer"
                )
            }
            Relation::Ancestor => return Ok(()),
            Relation::Newer(theirs) => format!(
                "{spare} is newer than {own}: it has {}; what {own} has without {spare} is from this boot{}",
                theirs.told(own),
                self.lives
                    .get(&own)
                    .filter(|life| life.since != 0)
                    .map_or(String::new(), |life| format!(", of {}", date(life.since)))
            ),
            Relation::Split(ours, theirs) => format!(
                "{own} and {spare} have each gone on without the other: {own} has {}, {spare} has {}",
                ours.told(spare),
                theirs.told(own)
            ),
        };
        Err(refused_for_age(format!(
            "{what}; to keep what {spare} holds, boot it ('dualroot-sync --boot-next {spare}', then reboot) and run \
             'dualroot-sync --discard-spare {own}' there; to give it up, run 'dualroot-sync --discard-spare {spare}' here"
        )))
    }

    /// What a spare's record is while it is written for the first time, from the disk with ours.
    pub fn begun(&mut self, own: &Self, spare: DiskName) {
        (self.pair, self.disk) = (own.pair, Some(spare));
    }

    /// What the two records are after a sync from the disk with ours. Lives of the spare that were given up are counted as known.
    pub fn synced(&mut self, own: DiskName, spare: DiskName, of_spare: &mut Self) {
        for (disk, life) in &of_spare.lives {
            let known = self.lives.entry(*disk).or_default();
            if life.count > known.count {
                *known = *life;
            }
        }
        (of_spare.pair, of_spare.disk) = (self.pair, Some(spare));
        of_spare.lives = self.lives.clone();
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
    let record = Record::load(&esp, machine.booted.name)
        .map_err(|e| refused_for_age(format!("{dir}: {e:#}; remove that file, and the next sync asks which disk is newer")))?;
    Ok((esp, record))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(n: u32) -> DiskName {
        DiskName::parse(&format!("disk{n}")).unwrap()
    }

    /// A boot whose time is the more, the greater its id is: days after 2026-11-01.
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
        // A drops out, a week on B; A returns and is booted.
        for day in 3..=9 {
            boot(&mut b, 1, day);
        }
        let stale = a.clone();
        boot(&mut a, 0, 10);
        assert!(matches!(a.relation(disk(0), &b), Relation::Newer(Lead { lives: 7, .. })), "{:?}", a.relation(disk(0), &b));
        let said = refusal(&a, 0, 1, &b);
        for part in [
            "disk1 is newer than disk0: it has 7 boots of disk1 without disk0, the last of 2026-11-10 00:00:00 UTC",
            "what disk0 has without disk1 is from this boot, of 2026-11-11 00:00:00 UTC",
            "dualroot-sync --boot-next disk1",
            "run 'dualroot-sync --discard-spare disk0' there",
            "run 'dualroot-sync --discard-spare disk1' here",
        ] {
            assert!(said.contains(part), "{said}");
        }
        // What was done on A meanwhile is not taken from it either, without being asked.
        let said = refusal(&b, 1, 0, &a);
        assert!(
            said.contains("disk1 has 7 boots of disk1 without disk0") && said.contains("disk0 has one boot of disk0"),
            "{said}"
        );
        // Had B been booted instead, A would have been overwritten without a question.
        b.check(disk(1), disk(0), &stale).unwrap();
        // What is given up is not asked for again.
        let mut again = b.clone();
        again.synced(disk(1), disk(0), &mut a);
        again.check(disk(1), disk(0), &a).unwrap();
        boot(&mut a, 0, 11);
        a.check(disk(0), disk(1), &again).unwrap();
    }

    #[test]
    fn f07_both_have_moved() {
        let (mut a, mut b) = pair();
        for day in [2, 3] {
            boot(&mut a, 0, day);
        }
        for day in [4, 5, 6] {
            boot(&mut b, 1, day);
        }
        assert!(matches!(a.relation(disk(0), &b), Relation::Split(Lead { lives: 2, .. }, Lead { lives: 3, .. })));
        for said in [refusal(&a, 0, 1, &b), refusal(&b, 1, 0, &a)] {
            assert!(said.contains("have each gone on without the other"), "{said}");
            assert!(said.contains("disk0 has 2 boots of disk0 without disk1, the last of 2026-11-04 00:00:00 UTC"), "{said}");
        }
    }

    #[test]
    fn f07_a_disk_that_went_on_without_the_spare_is_not_overwritten_by_it() {
        let (mut a, mut b) = pair();
        // In the same boot B drops out, and A goes on for a week, with a sync a day.
        assert!(a.left_behind(disk(0), disk(1)));
        assert!(!a.left_behind(disk(0), disk(1)), "once is enough");
        // B is put back, and the firmware boots it.
        let stale = b.clone();
        // By the clock of this machine, that A went on is now.
        boot(&mut b, 1, 36500);
        let said = refusal(&b, 1, 0, &a);
        assert!(said.contains("disk0 is newer than disk1"), "{said}");
        a.check(disk(0), disk(1), &stale).unwrap();
    }

    #[test]
    fn f07_a_disk_that_went_on_for_long_is_not_called_old() {
        let (mut a, mut b) = pair();
        a.level.insert(disk(1));
        // B is pulled, A goes on; 40 days later B is booted elsewhere for a look.
        a.live_on(disk(0), 1_793_491_200 + 2 * 86400);
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
        // B is brought back from an image, and booted for a day: by its count alone, A has that.
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
        // A dies; what it had is on B, and the firmware boots C.
        let (mut first, old) = (b.clone(), c.clone());
        boot(&mut c, 2, 3);
        let said = refusal(&c, 2, 1, &b);
        assert!(said.contains("disk1 is newer than disk2: it has one boot of disk0 without disk2"), "{said}");
        // B knows all that C has.
        boot(&mut first, 1, 4);
        first.check(disk(1), disk(2), &old).unwrap();
    }

    #[test]
    fn f07_records_that_are_lost_or_of_another_pair_say_nothing() {
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
        // Given up, they are a pair again.
        lost.synced(disk(0), disk(1), &mut b);
        lost.check(disk(0), disk(1), &b).unwrap();
        boot(&mut b, 1, 5);
        b.check(disk(1), disk(0), &lost).unwrap();
    }

    #[test]
    fn f07_a_record_is_its_disks() {
        let tmp = tempfile::tempdir().unwrap();
        std::fs::create_dir(tmp.path().join("EFI")).unwrap();
        let esp = Below::open(tmp.path()).unwrap();
        assert!(Record::load(&esp, disk(1)).unwrap().is_new());
        let (_, b) = pair();
        b.save(&esp).unwrap();
        assert_eq!(Record::load(&esp, disk(1)).unwrap(), b);
        let said = Record::load(&esp, disk(0)).unwrap_err().to_string();
        assert!(said.contains("says that it is disk1, and the configuration that it is disk0"), "{said}");
    }

    #[test]
    fn f26_records_that_are_none_are_errors() {
        assert!(Record::default().is_new());
        let (mut a, mut b) = pair();
        boot(&mut b, 1, 7);
        b.synced(disk(1), disk(0), &mut a);
        for record in [&a, &b, &Record::default()] {
            assert_eq!(Record::parse(record.text().as_bytes()).unwrap(), *record);
        }
        let whole = b.text();
        for cut in 0..whole.len() - 1 {
            assert!(Record::parse(&whole.as_bytes()[..cut]).is_err(), "{cut}");
            let mut torn = whole.clone().into_bytes();
            torn[cut] ^= 1;
            assert!(Record::parse(&torn).is_err(), "{cut}");
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
        assert_eq!((first.lives[&disk(0)], first.level.len()), (Life { count: 3, since: 0 }, 1));
        assert!(Record::parse(b"boot=none\ndisk0=x\n").is_err());
        assert_eq!(date(u64::MAX), "a date after the year 9999");
        assert_eq!(date(253_402_300_799), "9999-12-31 23:59:59 UTC");
    }
}
