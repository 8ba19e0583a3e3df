//! The plan for a spare's boot partitions.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use anyhow::{Context, Result};

use crate::base::refusal::refused;
use crate::base::types::Role;
use crate::boot::files::{Class, classify};
use crate::boot::known::Known;
use crate::boot::wanted::{BootPartition, Step, WantedFile};
use crate::boot::{bootable, older, order, room, wanted};
use crate::copy::Roots;
use crate::sync::spare::{BootContents, Spare};

/// The files that each boot partition should have.
pub(crate) type AllWanted = BTreeMap<Role, Vec<WantedFile>>;

/// The steps for a spare's boot partitions, and the files that these should have afterwards.
pub(crate) struct BootPlan {
    pub(crate) steps: Vec<Step>,
    pub(crate) wanted: AllWanted,
}

impl BootPlan {
    /// Plans the steps, from the boot files of both disks.
    ///
    /// # Errors
    /// A refusal where the booted disk has no entry, or a partition is too small.
    pub(crate) fn make(
        spare: &Spare<'_>,
        roots: &Roots,
        source: &BootContents,
        spare_files: &BootContents,
        known: &Known,
    ) -> Result<Self> {
        let wanted = wanted_files(spare, roots, source, spare_files)?;
        // Older generations get entries where there is room for their kernels.
        let with_older = with_older_entries(spare, roots, &wanted, spare_files);
        let parts = parts(&with_older, spare_files, known);
        let steps = order::plan(&parts)?;
        if shortfall(spare, &parts, &steps)?.is_none() {
            return Ok(Self { steps, wanted: with_older });
        }
        let parts = self::parts(&wanted, spare_files, known);
        let mut steps = order::plan(&parts)?;
        if shortfall(spare, &parts, &steps)?.is_some()
            && let Some(other) = order::plan_for_little_room(&parts)?
        {
            steps = other;
        }
        if let Some((role, short)) = shortfall(spare, &parts, &steps)? {
            return Err(refused(format!(
                "{}: its {role}= partition is too small to hold old and new files side by side, by {short} bytes. Remove an old kernel, \
                 or make the partition larger",
                spare.disk.name
            )));
        }
        Ok(Self { steps, wanted })
    }
}

/// The files of the booted disk's boot partitions as the spare should have them.
fn wanted_files(spare: &Spare<'_>, roots: &Roots, source: &BootContents, spare_files: &BootContents) -> Result<AllWanted> {
    let titles = spare.machine.titles(spare.disk);
    let rewrite = |class: Class, text: &[u8]| match class {
        Class::Entry => bootable::retarget(text, &spare.rewriter, &titles, roots.current, |text| spare.boots_root(text)),
        _ => spare.rewriter.rewrite(text),
    };
    let places: BTreeMap<Role, PathBuf> =
        spare.machine.booted.boot_places().into_iter().map(|(role, _, dir)| (role, dir.as_str().into())).collect();
    let mut all = BTreeMap::new();
    for (role, files) in source {
        let found = spare_files.get(role).with_context(|| format!("{role}= was not read"))?;
        let mounted = places.get(role).context("a boot partition has no place")?;
        all.insert(role.clone(), wanted::wanted_files(files, mounted, found, rewrite)?);
    }
    if !all.values().flatten().any(|wanted| classify(&wanted.path).is_bootable()) {
        return Err(refused(format!(
            "the booted disk has no boot loader entry that could be copied, so {} would lose its own. Install a kernel again, or run \
             'kernel-install add', and see 'bootctl list'",
            spare.disk.name
        )));
    }
    Ok(all)
}

/// The wanted files, and entries for older generations. A spare with a separate /usr gets no such entries: an older generation needs its own
/// kernel modules.
fn with_older_entries(spare: &Spare<'_>, roots: &Roots, wanted: &AllWanted, spare_files: &BootContents) -> AllWanted {
    let mut all = wanted.clone();
    if older::are_sorted_last(spare.machine.loader.as_deref()) && !spare.disk.parts.contains_key(&Role::Usr) {
        for (role, files) in &mut all {
            let entries = spare_files.get(role).map(|found| older::entries_for(found, files, &roots.kept));
            files.extend(entries.unwrap_or_default());
        }
    }
    all
}

/// The first boot partition without enough room for the steps, and the number of bytes that it lacks.
fn shortfall(spare: &Spare<'_>, parts: &[BootPartition<'_>], steps: &[Step]) -> Result<Option<(Role, u64)>> {
    for part in parts {
        let (free, cluster) = spare.mounted.below(&part.role)?.free()?;
        let short = room::shortfall(steps, &part.role, part.spare, free, cluster);
        if short > 0 {
            return Ok(Some((part.role.clone(), short)));
        }
    }
    Ok(None)
}

/// The boot partitions, in the form that a plan is made from.
fn parts<'a>(wanted: &AllWanted, spare_files: &'a BootContents, known: &'a Known) -> Vec<BootPartition<'a>> {
    const NONE: &BTreeSet<String> = &BTreeSet::new();
    let part = |(role, spare)| BootPartition {
        role: Role::clone(role),
        wanted: wanted.get(role).cloned().unwrap_or_default(),
        spare,
        known: known.of(role).unwrap_or(NONE),
    };
    spare_files.iter().map(part).collect()
}
