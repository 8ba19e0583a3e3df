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

/// The steps for a spare's boot partitions, and the files that should be there after them.
pub(crate) struct BootPlan {
    pub(crate) steps: Vec<Step>,
    pub(crate) wanted: AllWanted,
}

impl BootPlan {
    /// Decides, from what lies on both disks.
    ///
    /// # Errors
    /// A refusal where the booted disk has no entry, or a partition is too small.
    pub(crate) fn make(
        spare: &Spare<'_>,
        roots: &Roots,
        source: &BootContents,
        there: &BootContents,
        known: &Known,
    ) -> Result<Self> {
        let wanted = wanted_files(spare, roots, source, there)?;
        // Older generations get entries where there is room for their kernels.
        let offered = with_older_entries(spare, roots, &wanted, there);
        let parts = parts(&offered, there, known);
        let steps = order::plan(&parts)?;
        if shortfall(spare, &parts, &steps)?.is_none() {
            return Ok(Self { steps, wanted: offered });
        }
        let parts = self::parts(&wanted, there, known);
        let mut steps = order::plan(&parts)?;
        if shortfall(spare, &parts, &steps)?.is_some()
            && let Some(other) = order::plan_for_little_room(&parts)?
        {
            steps = other;
        }
        if let Some((role, short)) = shortfall(spare, &parts, &steps)? {
            return Err(refused(format!(
                "{}: its {role}= partition is too small to hold old and new side by side, by {short} bytes; remove an old kernel, or make it larger",
                spare.disk.name
            )));
        }
        Ok(Self { steps, wanted })
    }
}

/// The files of the booted disk's boot partitions as the spare should have them.
fn wanted_files(spare: &Spare<'_>, roots: &Roots, source: &BootContents, there: &BootContents) -> Result<AllWanted> {
    let titles = spare.machine.titles(spare.disk);
    let rewrite = |class: Class, text: &[u8]| match class {
        Class::Entry => bootable::retarget(text, &spare.rewriter, &titles, roots.current, |text| spare.boots_root(text)),
        _ => spare.rewriter.rewrite(text),
    };
    let places: BTreeMap<Role, PathBuf> =
        spare.machine.booted.boot_places().into_iter().map(|(role, _, dir)| (role, dir.as_str().into())).collect();
    let mut all = BTreeMap::new();
    for (role, files) in source {
        let found = there.get(role).with_context(|| format!("{role}= was not read"))?;
        let mounted = places.get(role).context("a boot partition has no place")?;
        all.insert(role.clone(), wanted::wanted_files(files, mounted, found, rewrite)?);
    }
    if !all.values().flatten().any(|wanted| classify(&wanted.path).is_bootable()) {
        return Err(refused(format!(
            "the booted disk has no boot loader entry that could be copied, so {} would lose its own; install a kernel again, or \
             'kernel-install add', and see 'bootctl list'",
            spare.disk.name
        )));
    }
    Ok(all)
}

/// The wanted files, and entries for older generations. Those have the modules of their kernels in themselves, and not on another /usr.
fn with_older_entries(spare: &Spare<'_>, roots: &Roots, wanted: &AllWanted, there: &BootContents) -> AllWanted {
    let mut all = wanted.clone();
    if older::are_sorted_last(spare.machine.loader.as_deref()) && !spare.disk.parts.contains_key(&Role::Usr) {
        for (role, files) in &mut all {
            let entries = there.get(role).map(|found| older::entries_for(found, files, &roots.kept));
            files.extend(entries.unwrap_or_default());
        }
    }
    all
}

/// The first boot partition that has not enough room for the steps, and how many bytes it lacks.
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

/// The boot partitions, for a plan.
fn parts<'a>(wanted: &AllWanted, there: &'a BootContents, known: &'a Known) -> Vec<BootPartition<'a>> {
    const NONE: &BTreeSet<String> = &BTreeSet::new();
    let part = |(role, spare)| BootPartition {
        role: Role::clone(role),
        wanted: wanted.get(role).cloned().unwrap_or_default(),
        spare,
        known: known.of(role).unwrap_or(NONE),
    };
    there.iter().map(part).collect()
}
