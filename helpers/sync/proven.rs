//! The last phase of a sync: the spare is read again, and compared with the booted disk. Generations that no entry names any more are
//! removed.

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
    /// Reads the spare again, notes the verdict, and unmounts the spare.
    ///
    /// # Errors
    /// The spare can't be read, or can't be flushed.
    pub(crate) fn prove(written: Written<'_>, status: &mut Status, log: &mut Log) -> Result<Self> {
        let Written { mut checked, wanted, writes } = written;
        let disk = checked.spare.disk;
        log.status(&format!("{}: reading it again", disk.name));
        if writes > 0 {
            checked.spare_boot_files = checked.spare.boot_files(checked.booted_boot_files.keys())?;
        }
        // If one of these two fails, the spare boots nevertheless.
        for result in [checked.show_root(), checked.drop_expired(log)] {
            if let Err(error) = result {
                log.warning(&format!("{}: {error:#}", disk.name));
            }
        }
        let faults = checked.faults(&wanted)?;
        status.ended(disk, &faults, &wanted, &checked.spare_boot_files, checked.spare_record.last_synced());
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

    /// The reasons why the spare would not boot. Its boot partitions have been read since they were written.
    fn faults(&self, wanted: &AllWanted) -> Result<Vec<Fault>> {
        let (spare, machine) = (&self.spare, self.spare.machine);
        let parts: Vec<prove::Part<'_>> = self
            .spare_boot_files
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
        // All disks boot a shared root with the same fstab, and so that is checked for each of them.
        let root = Root::new(self.copier.root(&spare.mounted)?.unwrap_or_else(|| "/".into()));
        let texts = files::identifying_texts(&root, &machine.drafts)?;
        faults.extend(prove::root_files(&texts, &spare.rewriter, |dir| machine.belongs_to_other_disk(dir)));
        let fstab = texts.get("/etc/fstab").map(Vec::as_slice).unwrap_or_default();
        faults.extend(waits::on_booted_disk_only(&machine.root, &machine.inventory, &machine.booted, fstab)?);
        faults.extend(self.copier.prove(&spare.mounted, &roots::booted_roots(&self.spare_boot_files))?);
        let has = |path: &str| self.copier.has_subvolume(&spare.mounted, path);
        let missing = fstab::missing_subvolumes(fstab, |text| spare.names_root(text), has);
        faults.extend(missing.into_iter().map(|line| {
            Fault::new(Code::F14, format!("/etc/fstab would make the boot wait for a subvolume that does not exist: {line}"))
                .on(&Role::Root)
                .at("/etc/fstab")
                .remedy("make that subvolume on the spare, or give the line nofail")
        }));
        Ok(faults.into_iter().map(|fault| fault.of(spare.disk.name)).collect())
    }
}
