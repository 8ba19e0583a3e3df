//! Whether a spare was booted since it was last synced: then it has a life of its own, and is not overwritten (failure mode 7).
//!
//! Each disk has a small record on its ESP: the id of its own last boot, and of every other disk the boot id that its record bore when
//! the two were last synced. A sync from the booted disk goes ahead only where the spare's record is as it was then.

use std::collections::BTreeMap;
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
    /// Other disks' `boot`, as it was when the two were last synced.
    seen: BTreeMap<DiskName, Option<Uuid>>,
}

impl Record {
    /// Reads `key=value` lines: `boot=ID`, and `diskN=ID` or `diskN=none`.
    ///
    /// # Errors
    /// Anything else: a record that can't be read says nothing about what may be overwritten.
    fn parse(text: &[u8]) -> Result<Self> {
        let text = std::str::from_utf8(text).context("it is not UTF-8")?;
        let mut record = Self::default();
        for line in text.lines().filter(|l| !l.is_empty()) {
            let (key, value) = line.split_once('=').with_context(|| format!("'{}' is no line of it", line.escape_debug()))?;
            let id = match value {
                "none" => None,
                id => Some(Uuid::try_parse(id).ok().with_context(|| format!("'{}' is no boot id", id.escape_debug()))?),
            };
            match key {
                "boot" => record.boot = id,
                disk => {
                    record.seen.insert(DiskName::parse(disk)?, id);
                }
            }
        }
        if text.trim().is_empty() {
            bail!("it is empty");
        }
        Ok(record)
    }

    fn text(&self) -> String {
        let show = |id: &Option<Uuid>| id.map_or("none".to_owned(), |id| id.to_string());
        let mut text = format!("boot={}\n", show(&self.boot));
        for (disk, id) in &self.seen {
            let _ = writeln!(text, "{disk}={}", show(id));
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

    /// This boot is the disk's last one.
    ///
    /// # Errors
    /// A kernel that doesn't tell.
    pub fn note_boot(&mut self, machine: &Machine) -> Result<()> {
        const PATH: &str = "/proc/sys/kernel/random/boot_id";
        let text = machine.root.read(PATH).with_context(|| format!("{PATH} can't be read"))?;
        let id = std::str::from_utf8(text.trim_ascii()).ok().and_then(|id| Uuid::try_parse(id).ok());
        self.boot = Some(id.with_context(|| format!("{PATH} holds no id"))?);
        Ok(())
    }

    /// Whether the spare with this record may be overwritten from the disk with ours.
    ///
    /// # Errors
    /// A refusal with the ways out: it was booted since.
    pub fn check(&self, own: DiskName, spare: DiskName, of_spare: &Self) -> Result<()> {
        if of_spare.boot.is_none() || self.seen.get(&spare) == Some(&of_spare.boot) {
            return Ok(());
        }
        Err(refused(format!(
            "{spare} was booted since it was last synced from {own}, so it may hold what {own} doesn't; to keep that, boot {spare} and run \
             'dualroot-sync --discard-spare {own}' there; to give it up, run 'dualroot-sync --discard-spare {spare}' here"
        )))
    }

    /// What the two records are after a sync from the disk with ours.
    pub fn synced(&mut self, own: DiskName, spare: DiskName, of_spare: &mut Self) {
        self.seen.insert(spare, of_spare.boot);
        of_spare.seen.insert(own, self.boot);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(n: u32) -> DiskName {
        DiskName::parse(&format!("disk{n}")).unwrap()
    }

    fn boot(record: &mut Record, id: u128) {
        record.boot = Some(Uuid::from_u128(id));
    }

    #[test]
    fn f07_a_spare_that_was_booted_is_not_overwritten() {
        let (mut a, mut b) = (Record::default(), Record::default());
        boot(&mut a, 1);
        a.check(disk(0), disk(1), &b).unwrap();
        a.synced(disk(0), disk(1), &mut b);
        // Another day with A: nothing is new on B.
        boot(&mut a, 2);
        a.check(disk(0), disk(1), &b).unwrap();
        a.synced(disk(0), disk(1), &mut b);
        // A drops out, a week on B; A returns and is booted.
        boot(&mut b, 3);
        let stale = a.clone();
        boot(&mut a, 4);
        let said = a.check(disk(0), disk(1), &b).unwrap_err().to_string();
        assert!(said.contains("disk1 was booted since") && said.contains("--discard-spare disk0"), "{said}");
        // Both have moved now.
        assert!(b.check(disk(1), disk(0), &a).is_err());
        // Had B been booted instead, A would have been overwritten without a question.
        b.check(disk(1), disk(0), &stale).unwrap();
        b.synced(disk(1), disk(0), &mut a);
        b.check(disk(1), disk(0), &a).unwrap();
    }

    #[test]
    fn f26_records_that_are_none_are_errors() {
        let mut record = Record::default();
        boot(&mut record, 7);
        record.seen.insert(disk(1), None);
        assert_eq!(Record::parse(record.text().as_bytes()).unwrap(), record);
        for bad in [&b""[..], b"\n\n\n", b"boot", b"boot=x\n", b"what=none\n", b"\xff=none", b"disk01=none\n"] {
            assert!(Record::parse(bad).is_err(), "{}", bad.escape_ascii());
        }
    }
}
