//! Whether a spare holds what the booted disk doesn't: then it is not overwritten (failure mode 7).
//!
//! Each disk has a small record on its ESP that says what its content is made of: of every disk, how many of its lives. A disk begins
//! a new life when it is booted, and when a spare that had all of the present one is not there to get the rest. A sync hands the
//! record on with the content. It goes ahead only where the booted disk has every life that the spare has; counts that only the spare
//! has, its own or another disk's, are work that would be lost.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use anyhow::{Context, Result, bail};
use uuid::Uuid;

use crate::below::{Below, Change};
use crate::bootfiles::LINEAGE;
use crate::bootplan::text_change;
use crate::machine::{Machine, refused};
use crate::types::DiskName;

/// What an ESP says of its disk.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Record {
    /// The kernel's id of the last boot of this disk after which dualroot ran; None where it never did.
    boot: Option<Uuid>,
    /// How many lives of each disk are in what this disk holds.
    lives: BTreeMap<DiskName, u64>,
    /// Spares that have all lives of this disk.
    level: BTreeSet<DiskName>,
}

impl Record {
    /// Reads `key=value` lines: `boot=ID` or `boot=none`, `diskN=COUNT`, and `level=diskN`.
    ///
    /// # Errors
    /// Anything else: a record that can't be read says nothing about what may be overwritten.
    fn parse(text: &[u8]) -> Result<Self> {
        let text = std::str::from_utf8(text).context("it is not UTF-8")?;
        let mut record = Self::default();
        for line in text.lines().filter(|l| !l.is_empty()) {
            let (key, value) = line.split_once('=').with_context(|| format!("'{}' is no line of it", line.escape_debug()))?;
            match key {
                "boot" if value == "none" => record.boot = None,
                "boot" => {
                    let id = Uuid::try_parse(value).ok();
                    record.boot = Some(id.with_context(|| format!("'{}' is no boot id", value.escape_debug()))?);
                }
                "level" => {
                    record.level.insert(DiskName::parse(value)?);
                }
                disk => {
                    let count = value.parse().ok().with_context(|| format!("'{}' is no count", value.escape_debug()))?;
                    record.lives.insert(DiskName::parse(disk)?, count);
                }
            }
        }
        if text.trim().is_empty() {
            bail!("it is empty");
        }
        Ok(record)
    }

    fn text(&self) -> String {
        let mut text = format!("boot={}\n", self.boot.map_or("none".to_owned(), |id| id.to_string()));
        for (disk, count) in &self.lives {
            let _ = writeln!(text, "{disk}={count}");
        }
        for disk in &self.level {
            let _ = writeln!(text, "level={disk}");
        }
        text
    }

    /// The record of an ESP; a default one where there is none.
    ///
    /// # Errors
    /// One that can't be read.
    pub fn load(esp: &Below) -> Result<Self> {
        match esp.read(LINEAGE)? {
            None => Ok(Self::default()),
            Some(text) => Self::parse(&text).with_context(|| format!("{LINEAGE} on the ESP is damaged")),
        }
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

    /// Notes that this machine's booted disk was booted: with a boot, it begins a new life.
    ///
    /// # Errors
    /// A kernel that doesn't tell.
    pub fn note_boot(&mut self, machine: &Machine) -> Result<()> {
        const PATH: &str = "/proc/sys/kernel/random/boot_id";
        let text = machine.root.read(PATH).with_context(|| format!("{PATH} can't be read"))?;
        let id = std::str::from_utf8(text.trim_ascii()).ok().and_then(|id| Uuid::try_parse(id).ok());
        self.booted(machine.booted.name, id.with_context(|| format!("{PATH} holds no id"))?);
        Ok(())
    }

    fn booted(&mut self, own: DiskName, id: Uuid) {
        if self.boot.replace(id) != Some(id) {
            self.live_on(own);
        }
    }

    fn live_on(&mut self, own: DiskName) {
        let count = self.lives.entry(own).or_default();
        *count = count.saturating_add(1);
        self.level.clear();
    }

    /// Notes that the booted disk goes on without this spare. What it holds from now on isn't on a spare that was level with it.
    /// Returns whether that makes a difference.
    pub fn left_behind(&mut self, own: DiskName, spare: DiskName) -> bool {
        let was_level = self.level.contains(&spare);
        if was_level {
            self.live_on(own);
        }
        was_level
    }

    /// Whether the spare with this record may be overwritten from the disk with ours.
    ///
    /// # Errors
    /// A refusal with the ways out: it holds what ours doesn't.
    pub fn check(&self, own: DiskName, spare: DiskName, of_spare: &Self) -> Result<()> {
        let of_own = |disk: &DiskName| self.lives.get(disk).copied().unwrap_or_default();
        let Some((newer, _)) = of_spare.lives.iter().rfind(|(disk, count)| **count > of_own(disk)) else { return Ok(()) };
        let how = match *newer == spare {
            true => format!("{spare} was booted since it was last synced from {own}, or went on without it"),
            false => format!("{spare} was synced from {newer} when {own} was not"),
        };
        Err(refused(format!(
            "{how}, so it may hold what {own} doesn't; to keep that, boot {spare} and run \
             'dualroot-sync --discard-spare {own}' there; to give it up, run 'dualroot-sync --discard-spare {spare}' here"
        )))
    }

    /// What a spare's record is while it is written for the first time.
    pub fn begun(&mut self, own: DiskName) {
        self.lives.entry(own).or_default();
    }

    /// What the two records are after a sync from the disk with ours. Lives of the spare that were given up are counted as known.
    pub fn synced(&mut self, spare: DiskName, of_spare: &mut Self) {
        for (disk, count) in &of_spare.lives {
            let known = self.lives.entry(*disk).or_default();
            *known = (*known).max(*count);
        }
        of_spare.lives = self.lives.clone();
        of_spare.level.clear();
        self.level.insert(spare);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(n: u32) -> DiskName {
        DiskName::parse(&format!("disk{n}")).unwrap()
    }

    fn boot(record: &mut Record, own: u32, id: u128) {
        record.booted(disk(own), Uuid::from_u128(id));
    }

    #[test]
    fn f07_a_spare_that_was_booted_is_not_overwritten() {
        let (mut a, mut b) = (Record::default(), Record::default());
        boot(&mut a, 0, 1);
        a.check(disk(0), disk(1), &b).unwrap();
        a.synced(disk(1), &mut b);
        // Another day with A: nothing is new on B.
        boot(&mut a, 0, 2);
        a.check(disk(0), disk(1), &b).unwrap();
        a.synced(disk(1), &mut b);
        // A drops out, a week on B; A returns and is booted.
        boot(&mut b, 1, 3);
        let stale = a.clone();
        boot(&mut a, 0, 4);
        let said = a.check(disk(0), disk(1), &b).unwrap_err().to_string();
        assert!(said.contains("disk1 was booted since") && said.contains("--discard-spare disk0"), "{said}");
        // Both have moved now.
        assert!(b.check(disk(1), disk(0), &a).is_err());
        // Had B been booted instead, A would have been overwritten without a question.
        b.check(disk(1), disk(0), &stale).unwrap();
        // What is given up is not asked for again.
        let mut again = b.clone();
        again.synced(disk(0), &mut a);
        again.check(disk(1), disk(0), &a).unwrap();
        boot(&mut a, 0, 5);
        a.check(disk(0), disk(1), &again).unwrap();
    }

    #[test]
    fn f07_a_disk_that_went_on_without_the_spare_is_not_overwritten_by_it() {
        let (mut a, mut b) = (Record::default(), Record::default());
        boot(&mut a, 0, 1);
        a.synced(disk(1), &mut b);
        // In the same boot B drops out, and A goes on for a week, with a sync a day.
        assert!(a.left_behind(disk(0), disk(1)));
        assert!(!a.left_behind(disk(0), disk(1)), "once is enough");
        // B is put back, and the firmware boots it.
        let stale = b.clone();
        boot(&mut b, 1, 2);
        let said = b.check(disk(1), disk(0), &a).unwrap_err().to_string();
        assert!(said.contains("disk0 was booted since"), "{said}");
        a.check(disk(0), disk(1), &stale).unwrap();
    }

    #[test]
    fn f07_a_third_disk_that_missed_a_sync_does_not_overwrite_the_second() {
        let (mut a, mut b, mut c) = (Record::default(), Record::default(), Record::default());
        boot(&mut a, 0, 1);
        a.synced(disk(1), &mut b);
        a.synced(disk(2), &mut c);
        boot(&mut a, 0, 2);
        a.synced(disk(1), &mut b);
        // A dies; what it had is on B, and the firmware boots C.
        let (mut first, old) = (b.clone(), c.clone());
        boot(&mut c, 2, 3);
        let said = c.check(disk(2), disk(1), &b).unwrap_err().to_string();
        assert!(said.contains("disk1 was synced from disk0 when disk2 was not"), "{said}");
        // B knows all that C has.
        boot(&mut first, 1, 4);
        first.check(disk(1), disk(2), &old).unwrap();
    }

    #[test]
    fn f26_records_that_are_none_are_errors() {
        let mut record = Record::default();
        assert!(record.is_new());
        boot(&mut record, 0, 7);
        record.lives.insert(disk(1), 3);
        record.level.insert(disk(1));
        assert_eq!(Record::parse(record.text().as_bytes()).unwrap(), record);
        for bad in
            [&b""[..], b"\n\n\n", b"boot", b"boot=x\n", b"what=1\n", b"\xff=1", b"disk01=1\n", b"disk1=none\n", b"level=x\n"]
        {
            assert!(Record::parse(bad).is_err(), "{}", bad.escape_ascii());
        }
    }
}
