//! The third phase of a sync: trees, then boot partitions, then records are written.

use anyhow::{Context, Result, anyhow};

use crate::base::log::Log;
use crate::base::types::Role;
use crate::boot::{older, roots};
use crate::pair::quiet;
use crate::pair::status::Status;
use crate::sync;
use crate::sync::boot_partitions::AllWanted;
use crate::sync::checked::Checked;
use crate::sync::planned::Planned;
use crate::write::change::Change;

/// A spare that was written.
pub(crate) struct Written<'a> {
    pub(crate) checked: Checked<'a>,
    /// The files that its boot partitions should have.
    pub(crate) wanted: AllWanted,
    /// The number of changes to its boot partitions.
    pub(crate) writes: usize,
}

impl<'a> Written<'a> {
    /// Writes the spare. None where the booted disk changed while its trees were copied: then no entry was written.
    ///
    /// # Errors
    /// A file can't be read or written.
    pub(crate) fn write(planned: Planned<'a>, status: &mut Status, log: &mut Log) -> Result<Option<Self>> {
        let mut checked = planned.checked;
        checked.begin(status, log)?;
        checked.drop_expired(log)?;
        checked.copy_trees(log)?;
        // During the copy, a package manager may have begun to install a kernel, so that the copy may have half of it.
        if !quiet::unchanged_since(&checked.spare.machine.boot_dirs(), &checked.fingerprint)? {
            return Ok(None);
        }
        // Trees were written: an error is no refusal any more.
        let boot = checked.boot_plan().map_err(|e| anyhow!("{e:#}"))?;
        let writes = boot.steps.iter().filter(|step| step.change != Change::Barrier).count();
        log.status(&format!("{}: {writes} changes to its boot partitions", checked.spare.disk.name));
        for step in &boot.steps {
            checked.spare.mounted.below(&step.role)?.apply(&step.change).with_context(|| step.role.to_string())?;
        }
        checked.copier.retire(&checked.spare.mounted)?;
        checked.save_records()?;
        Ok(Some(Self { checked, wanted: boot.wanted, writes }))
    }
}

impl Checked<'_> {
    /// Notes that the spare is being written, and makes it writable.
    fn begin(&mut self, status: &mut Status, log: &Log) -> Result<()> {
        for (role, files) in &self.booted_boot_files {
            self.known.add(role, files);
        }
        self.known.save()?;
        // If the sync is interrupted, the state of the spare is unknown.
        status.begun(self.spare.disk);
        sync::save_status(status, log);
        self.spare.mounted.make_writable()?;
        if self.spare_record.is_new() {
            // With this record, the files of an interrupted first sync don't make the next one refuse the spare.
            self.spare_record.begun(&self.own_record, self.spare.disk.name);
            self.spare_record.save(self.spare.mounted.below(&Role::Esp)?)?;
        }
        Ok(())
    }

    /// Removes the entries of the generations that are no longer needed, and then these generations.
    pub(crate) fn drop_expired(&mut self, log: &Log) -> Result<()> {
        let spare = &self.spare.mounted;
        let expired = self.copier.expired(spare, &roots::booted_roots(&self.spare_boot_files))?;
        if expired.is_empty() {
            return Ok(());
        }
        for (role, files) in &mut self.spare_boot_files {
            let below = spare.below(role)?;
            for path in older::remove_entries(files, &expired) {
                below.apply(&Change::Remove(path))?;
            }
            below.apply(&Change::Barrier)?;
        }
        for path in self.copier.remove(spare, &expired)? {
            log.warning(&format!(
                "{}: {path} is a subvolume with files that were not copied; its generation stays",
                self.spare.disk.name
            ));
        }
        Ok(())
    }

    fn copy_trees(&mut self, log: &Log) -> Result<()> {
        let (spare, name) = (&self.spare.mounted, self.spare.disk.name);
        let copier = self.copier.as_mut();
        let copied = copier
            .begin(spare)
            .and_then(|()| copier.fill(spare, &|at| log.status(&format!("{name}: copying {at}/"))))
            .and_then(|()| copier.rewrite(spare))
            .and_then(|()| copier.commit(spare));
        if copied.is_err() {
            copier.abandon(spare);
        }
        copied
    }

    fn save_records(&mut self) -> Result<()> {
        let name = self.spare.disk.name;
        self.own_record.synced(self.spare.machine.booted.name, name, &mut self.spare_record);
        // The booted disk's record is saved first. From then on it says that the spare is up to date, and so the next change here is noted as
        // one that the spare lacks.
        self.own_record.save(&self.esp)?;
        self.spare_record.save(self.spare.mounted.below(&Role::Esp)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::root::Root;
    use crate::pair::lineage::Record;
    use crate::pair::machine;
    use crate::sync::checked;
    use crate::write::below::Below;

    /// After an interruption between the two, the booted disk counts the spare as up to date, and notes that its next changes leave the spare
    /// behind. In the other order, that would not be noted.
    #[test]
    fn f07_the_booted_disk_s_record_is_saved_before_the_spare_s() {
        let tmp = tempfile::tempdir().unwrap();
        let esp = || Below::open(tmp.path()).unwrap();
        esp().apply(&Change::MakeDir("EFI".into())).unwrap();
        let machine = machine::tests::machine(&[1, 2, 3, 4]);
        let mut checked = checked::tests::checked(&machine, esp(), true, false);
        let (booted, spare) = (machine.booted.name, checked.spare.disk.name);
        checked.own_record.note_boot(&Root::new("/"), booted).unwrap();
        // The spare's record can't be saved, because the spare isn't mounted.
        checked.save_records().unwrap_err();
        assert!(Record::load(&esp(), booted).unwrap().left_behind(booted, spare));
    }
}
