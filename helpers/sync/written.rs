//! The third phase of a sync: trees, then boot partitions, then records are written.

use anyhow::{Context, Result};

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
    /// How many changes its boot partitions needed.
    pub(crate) writes: usize,
}

impl<'a> Written<'a> {
    /// Writes the spare. None where the booted disk changed while its trees were copied: then no entry was written.
    ///
    /// # Errors
    /// Whatever can't be read or written.
    pub(crate) fn write(planned: Planned<'a>, status: &mut Status, log: &mut Log) -> Result<Option<Self>> {
        let mut checked = planned.checked;
        checked.begin(status, log)?;
        checked.drop_expired(log)?;
        checked.copy_trees(log)?;
        // That took its time. What a package manager has begun meanwhile may be half there, although no file tells of it yet.
        if !quiet::unchanged_since(&checked.spare.machine.boot_dirs(), &checked.before)? {
            return Ok(None);
        }
        let boot = checked.boot_plan()?;
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
        for (role, files) in &self.source {
            self.known.add(role, files);
        }
        self.known.save()?;
        // If the sync is interrupted, nobody knows the state of the spare.
        status.begun(self.spare.disk);
        sync::note(status, log);
        self.spare.mounted.make_writable()?;
        if self.of_spare.is_new() {
            // What an interrupted first sync leaves there is no reason to refuse the next one.
            self.of_spare.begun(&self.own, self.spare.disk.name);
            self.of_spare.save(self.spare.mounted.below(&Role::Esp)?)?;
        }
        Ok(())
    }

    /// Removes the generations that no entry needs any more, and their entries first.
    pub(crate) fn drop_expired(&mut self, log: &Log) -> Result<()> {
        let spare = &self.spare.mounted;
        let expired = self.copier.expired(spare, &roots::booted_roots(&self.there))?;
        if expired.is_empty() {
            return Ok(());
        }
        for (role, files) in &mut self.there {
            let below = spare.below(role)?;
            for path in older::remove_entries(files, &expired) {
                below.apply(&Change::Remove(path))?;
            }
            below.apply(&Change::Barrier)?;
        }
        for path in self.copier.remove(spare, &expired)? {
            log.warning(&format!(
                "{}: {path} is a subvolume with something in it that was not copied; its generation stays",
                self.spare.disk.name
            ));
        }
        Ok(())
    }

    fn copy_trees(&mut self, log: &Log) -> Result<()> {
        let (spare, name) = (&self.spare.mounted, self.spare.disk.name);
        self.copier.begin(spare)?;
        self.copier.fill(spare, &|at| log.status(&format!("{name}: copying {at}/")))?;
        self.copier.rewrite(spare)?;
        self.copier.commit(spare)
    }

    fn save_records(&mut self) -> Result<()> {
        let name = self.spare.disk.name;
        self.own.synced(self.spare.machine.booted.name, name, &mut self.of_spare);
        // First that the spare is level with this disk: should it be left behind from here on, that has to be noted.
        self.own.save(&self.esp)?;
        self.of_spare.save(self.spare.mounted.below(&Role::Esp)?)
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

    /// Interrupted between the two, the spare counts as level with this disk, and so is left behind by what this disk does next. The other
    /// way round, that would not be noted.
    #[test]
    fn f07_the_booted_disk_s_record_is_saved_before_the_spare_s() {
        let tmp = tempfile::tempdir().unwrap();
        let esp = || Below::open(tmp.path()).unwrap();
        esp().apply(&Change::MakeDir("EFI".into())).unwrap();
        let machine = machine::tests::machine(&[1, 2, 3, 4]);
        let mut checked = checked::tests::checked(&machine, esp(), true, false);
        let (booted, spare) = (machine.booted.name, checked.spare.disk.name);
        checked.own.note_boot(&Root::new("/"), booted).unwrap();
        // The spare's can't be saved: it isn't mounted.
        checked.save_records().unwrap_err();
        assert!(Record::load(&esp(), booted).unwrap().left_behind(booted, spare));
    }
}
