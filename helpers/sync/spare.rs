//! A spare whose partitions are mounted for a sync.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};

use crate::base::refusal::refused;
use crate::base::types::Role;
use crate::boot::files::BootFiles;
use crate::conf::Disk;
use crate::devices::held::{Held, Mounted};
use crate::devices::inventory::{Inventory, Partition};
use crate::names::files::{self, Rewritten};
use crate::names::generation::Generation;
use crate::names::ident::Rewriter;
use crate::pair::containers;
use crate::pair::machine::Machine;
use crate::write::below::Below;

/// The directory of the spares' mount points, in the sync's own mount namespace.
const PLACES: &str = "/run/dualroot/spare";

/// The present partitions of a spare, by role.
pub(crate) type Parts<'a> = BTreeMap<Role, &'a Partition>;

/// The content of a disk's boot partitions, by role.
pub(crate) type BootContents = BTreeMap<Role, BootFiles>;

/// A spare's mounted partitions, and the names of the disks of the pair.
pub(crate) struct Spare<'a> {
    pub(crate) machine: &'a Machine,
    pub(crate) disk: &'a Disk,
    /// Replaces names of other disks in texts by this disk's.
    pub(crate) rewriter: Rewriter,
    /// Finds the names of this disk's root.
    root_names: Option<Rewriter>,
    pub(crate) mounted: Mounted,
}

impl<'a> Spare<'a> {
    /// A spare with all its partitions present, and none of them mounted yet.
    ///
    /// # Errors
    /// A refusal where a partition is missing, or is in a LUKS container on one disk only.
    pub(crate) fn new(machine: &'a Machine, disk: &'a Disk, parts: &Parts<'_>) -> Result<Self> {
        if let Some((role, partuuid)) = disk.parts.iter().find(|(role, _)| !parts.contains_key(*role)) {
            return Err(refused(format!(
                "its {role}= partition {partuuid} isn't there, but others of the disk are; nothing was written to it"
            )));
        }
        for (role, part) in parts {
            containers::check(machine, role, part)?;
        }
        let (rewriter, root_names) = (machine.rewriter(disk)?, machine.root_names(disk)?);
        Ok(Self { machine, disk, rewriter, root_names, mounted: Mounted::default() })
    }

    /// Mounts the partitions of these roles read-only, and checks that they are those of the configuration.
    ///
    /// # Errors
    /// A partition can't be mounted; a refusal where an identifier belongs to another partition now.
    pub(crate) fn hold(&mut self, parts: &Parts<'_>, roles: impl Fn(&Role) -> bool) -> Result<()> {
        for (role, part) in parts.iter().filter(|(role, _)| roles(role)) {
            let place = Path::new(PLACES).join(self.disk.name.to_string()).join(role.file_name());
            self.mounted.add(role.clone(), Held::open(part, &place)?);
        }
        self.check_devices(parts, &Inventory::read()?)
    }

    /// Checks that each identifier still belongs to the same device. While a partition is mounted, its device can't become another one, and so
    /// the right partition was mounted.
    fn check_devices(&self, parts: &Parts<'_>, now: &Inventory) -> Result<()> {
        for (role, part) in parts {
            let partuuid = self.disk.parts.get(role).with_context(|| format!("there is no {role}="))?;
            let found = now.find(partuuid).map_err(|e| refused(format!("{e:#}")))?;
            if !found.is_some_and(|found| found.device().is_ok_and(|device| part.device().is_ok_and(|part| part == device))) {
                return Err(refused(format!("{} is not the partition {partuuid} any more; start the sync again", part.path)));
            }
        }
        Ok(())
    }

    /// Reads the booted disk's boot partitions.
    ///
    /// # Errors
    /// A file can't be read.
    pub(crate) fn source(&self) -> Result<BootContents> {
        let mut all = BTreeMap::new();
        for (role, _, dir) in self.machine.booted.boot_places() {
            let below = Below::open(Path::new(dir.as_str()))?;
            all.insert(role, BootFiles::scan(&below).with_context(|| format!("{dir} of the booted disk"))?);
        }
        Ok(all)
    }

    /// Reads the spare's boot partitions of these roles.
    ///
    /// # Errors
    /// A file can't be read.
    pub(crate) fn boot_files<'r>(&self, roles: impl Iterator<Item = &'r Role>) -> Result<BootContents> {
        let scan = |role: &Role| -> Result<_> {
            let found = BootFiles::scan(self.mounted.below(role)?).with_context(|| format!("{role}= of {}", self.disk.name))?;
            Ok((role.clone(), found))
        };
        roles.map(scan).collect()
    }

    /// The files of the booted root that need other bytes on this disk, where its root is of this generation.
    ///
    /// # Errors
    /// A file can't be read.
    pub(crate) fn rewritten(&self, generation: Option<Generation>) -> Result<Vec<Rewritten>> {
        if !self.machine.own_roots() {
            return Ok(Vec::new());
        }
        let keep = |dir: &_| self.machine.belongs_to_other_disk(dir);
        let mut found = files::rewritten(&self.machine.root, &self.rewriter, generation, keep)?;
        found.extend(self.machine.drafts.iter().cloned());
        Ok(found)
    }

    /// Whether an entry for this disk boots this disk's root, and not another system on it.
    pub(crate) fn boots_root(&self, entry: &[u8]) -> bool {
        entry.split(u8::is_ascii_whitespace).any(|word| word.starts_with(b"root=") && self.names_root(word))
    }

    /// Whether a text names the partition of this disk's root, in any form.
    pub(crate) fn names_root(&self, text: &[u8]) -> bool {
        self.root_names.as_ref().is_some_and(|names| !names.foreign(text).is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::refusal::Refused;
    use crate::pair::machine::tests::{inventory, machine};

    #[test]
    fn f06_a_partition_whose_identifier_moved_is_not_written() {
        let machine = machine(&[1, 2, 3, 4]);
        let disk = machine.config.disks.get(1).unwrap();
        let parts = machine.inventory.disk(disk).unwrap();
        let mut spare = Spare::new(&machine, disk, &parts).unwrap();
        spare.check_devices(&parts, &inventory(&[(1, 1), (2, 2), (3, 3), (4, 4)])).unwrap();
        for now in [&[(3, 3)][..], &[(3, 3), (4, 5)], &[(3, 4), (4, 3)], &[(3, 3), (4, 4), (4, 5)], &[]] {
            let error = spare.check_devices(&parts, &inventory(now)).unwrap_err();
            assert!(error.is::<Refused>(), "{now:?}: {error:#}");
        }
        // The machine that runs the tests has none of these partitions.
        let error = spare.hold(&parts, |_| false).unwrap_err();
        assert!(error.is::<Refused>(), "{error:#}");
    }
}
