//! The last phase of a sync: the spare is read again, and held against the booted disk. Generations that no entry names any more go.

use std::path::PathBuf;

use anyhow::Result;

use crate::base::fault::{Code, Fault};
use crate::base::log::Log;
use crate::base::root::Root;
use crate::base::types::Role;
use crate::boot::roots;
use crate::names::{files, fstab};
use crate::pair::status::Status;
use crate::proof::searched::Searched;
use crate::proof::{images, prove, waits};
use crate::sync::boot_partitions::AllWanted;
use crate::sync::checked::Checked;
use crate::sync::written::Written;

/// A spare that was written and read again.
pub(crate) struct Proven {
    /// The reasons why it would not boot; none if it would.
    pub(crate) faults: Vec<Fault>,
}

impl Proven {
    /// Reads the spare again, notes the verdict, and lets go of the spare.
    ///
    /// # Errors
    /// The spare can't be read, or not be flushed.
    pub(crate) fn prove(written: Written<'_>, status: &mut Status, log: &mut Log) -> Result<Self> {
        let Written { mut checked, wanted, writes } = written;
        let disk = checked.spare.disk;
        log.status(&format!("{}: reading it again", disk.name));
        if writes > 0 {
            checked.there = checked.spare.boot_files(checked.source.keys())?;
        }
        // A failure of these two is no reason why the spare would not boot.
        for done in [checked.show_root(), checked.drop_expired(log)] {
            if let Err(error) = done {
                log.warning(&format!("{}: {error:#}", disk.name));
            }
        }
        let faults = checked.faults(&wanted)?;
        status.ended(disk, &faults, &wanted, &checked.there, checked.of_spare.last_synced());
        checked.copier.end();
        drop(checked.copier);
        checked.spare.mounted.release()?;
        let verdict = if faults.is_empty() { "boots" } else { "would not boot" };
        log.info(&format!("{}: {verdict}, {writes} changes to its boot partitions", disk.name));
        Ok(Self { faults })
    }
}

impl Checked<'_> {
    fn show_root(&self) -> Result<()> {
        let machine = self.spare.machine;
        let dirs: Vec<PathBuf> = machine.config.spares(&machine.booted).into_iter().map(|(dir, _)| dir.as_str().into()).collect();
        self.copier.show(&self.spare.mounted, &dirs)
    }

    /// The reasons why the spare would not boot, from what was read of its boot partitions since they were written.
    fn faults(&self, wanted: &AllWanted) -> Result<Vec<Fault>> {
        let (spare, machine) = (&self.spare, self.spare.machine);
        let parts: Vec<prove::Part<'_>> = self
            .there
            .iter()
            .filter_map(|(role, found)| Some(prove::Part { role: role.clone(), wanted: wanted.get(role)?, found }))
            .collect();
        let mut faults = prove::boot_partitions(&parts, &spare.rewriter);
        let mut searched = Searched::load(&spare.rewriter, spare.disk.name)?;
        for part in &parts {
            let place = spare.mounted.get(&part.role)?.place();
            let found = images::boot_partition(place, part.found, &spare.rewriter, &mut searched)?;
            faults.extend(found.into_iter().map(|fault| fault.on(&part.role)));
        }
        searched.save(spare.disk.name)?;
        // A shared root has one fstab for every disk: what it says has to hold on each.
        let root = Root::new(self.copier.root(&spare.mounted)?.unwrap_or_else(|| "/".into()));
        let texts = files::identifying_texts(&root, &machine.drafts)?;
        faults.extend(prove::root_files(&texts, &spare.rewriter, |dir| machine.belongs_to_other_disk(dir)));
        let fstab = texts.get("/etc/fstab").map(Vec::as_slice).unwrap_or_default();
        faults.extend(waits::on_booted_disk_only(&machine.root, &machine.inventory, &machine.booted, fstab)?);
        faults.extend(self.copier.prove(&spare.mounted, &roots::booted_roots(&self.there))?);
        let has = |path: &str| self.copier.has_subvolume(&spare.mounted, path);
        let lost = fstab::missing_subvolumes(fstab, |text| spare.names_root(text), has);
        faults.extend(lost.into_iter().map(|line| {
            Fault::new(Code::F14, format!("/etc/fstab makes the boot wait for a subvolume that is not there: {line}"))
                .on(&Role::Root)
                .at("/etc/fstab")
                .remedy("make it there, or give the line nofail")
        }));
        Ok(faults.into_iter().map(|fault| fault.of(spare.disk.name)).collect())
    }
}
