//! A blank disk becomes a spare: dualroot-clone(8).
//!
//! Partitions and file systems are made by sfdisk(8) and mkfs(8), and filled by the same sync that keeps spares up to date. Until that has
//! proved that the disk boots, its ESP is marked in the partition table so that no firmware boots it, and no configuration names it: whatever
//! is cut before is begun anew, but for what a shared root has been given already, which goes on.

mod check;
pub mod container;
pub mod disk;
mod drivers;
mod join;
pub mod plan;
pub mod source;
pub mod target;
pub mod template;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};

use crate::base::clock::kernel_id;
use crate::base::log::Log;
use crate::base::program;
use crate::base::refusal::refused;
use crate::base::root::Root;
use crate::base::types::{DiskName, PartUuid, Role};
use crate::boot::nvram;
use crate::clone::check::{check_programs, check_source};
use crate::clone::container::Secret;
use crate::clone::disk::NewDisk;
use crate::clone::join::Shared;
use crate::clone::plan::Plan;
use crate::clone::source::Source;
use crate::clone::target::Target;
use crate::conf::edit::{Draft, Section};
use crate::conf::{Config, edit};
use crate::devices::gpt::{self, DiskLayout};
use crate::devices::inventory::Inventory;
use crate::devices::{held, mounts};
use crate::names::files::Rewritten;
use crate::pair::machine::{Machine, booted_disk, booted_esp};
use crate::pair::{booted, lineage};
use crate::sync::{self, Options, Outcome};
use crate::write::below::Below;

/// What is asked for.
#[derive(Clone, Debug)]
pub struct Wish {
    /// The disk that is to be erased.
    pub disk: PathBuf,
    /// The disk of the configuration whose place it takes; a new one if None.
    pub replace: Option<DiskName>,
    /// A file of layouts; the disk becomes like the one in it that has the name that this one gets.
    pub layout: Option<PathBuf>,
    /// Whether the disks of a machine that isn't configured are to share the root.
    pub shared_root: bool,
}

/// What will be done.
pub struct Job {
    /// The disk that is erased, and what is made on it.
    pub disk: NewDisk,
    /// What it is called.
    pub name: DiskName,
    source: Source,
    shared: Option<Shared>,
    /// What files will hold: the configuration, and fstab where that changes.
    drafts: Vec<Rewritten>,
    esp: PartUuid,
    efi_entries: bool,
    /// On a machine that isn't configured, the booted disk and its section.
    first: Option<(DiskName, Section)>,
    /// The section of the new disk.
    section: Section,
}

impl Job {
    /// Decides, from what the machine is now. Nothing is written.
    ///
    /// # Errors
    /// A refusal: what is missing, in the way, or not understood.
    pub fn plan(root: &Root, wish: &Wish) -> Result<Self> {
        let config = Config::load(root).map_err(|e| refused(format!("{e:#}")))?;
        let shared = Shared::look(root, config.as_ref(), wish)?;
        let target = Target::look(&wish.disk, config.as_ref(), shared.as_ref().and_then(Shared::joined))?;
        let (_, esp) = booted_esp(root)?;
        // An automount shows nothing before somebody looks.
        let _ = ["/boot", "/efi"].map(|dir| root.names(dir));
        let inventory = Inventory::read()?;
        let table = mounts::table()?;
        let part = shared.as_ref().map(|shared| shared.beside(&inventory, &esp)).transpose()?;
        let mut roles = match &config {
            Some(config) => booted_disk(config, &esp)?.parts.clone(),
            None => source::roles(&inventory, &table, &esp, part)?,
        };
        roles.extend(part.map(|part| (Role::Root, part)));
        let name = name(config.as_ref(), &inventory, wish)?;
        let mut source = match &wish.layout {
            Some(file) => {
                let disk = gpt::load(file, name).map_err(|e| refused(format!("{e:#}")))?;
                Source::shaped(disk, &file.display().to_string(), &inventory, &table, &roles, shared.is_some())?
            }
            None => Source::read(&inventory, &table, &roles, shared.is_some())?,
        };
        if let Some(least) = shared.as_ref().and_then(|shared| shared.least(name)) {
            source.give_root(least);
        }
        let taken = inventory.labels_beside(target.path());
        let in_the_way = |e| refused(format!("{}: {e:#}", target.path()));
        let fresh_id = || kernel_id(root, "uuid");
        let mut plan = Plan::make(&source, name, (target.bytes, target.sector), taken, fresh_id).map_err(in_the_way)?;
        if let (Some(shared), Some(esp)) = (&shared, target.unfinished())
            && shared.joined().is_some()
        {
            let made = DiskLayout::read(name, &inventory, &BTreeMap::from([(Role::Esp, esp)]));
            let is_shared = |partuuid: &PartUuid| inventory.find(partuuid).is_ok_and(|part| part.is_some_and(|p| shared.has(p)));
            made.and_then(|made| plan.adopt(&made, is_shared)).map_err(in_the_way)?;
        }
        // No section names the parts of a shared root.
        let named = |role: &Role| shared.is_none() || *role != Role::Root;
        let section: Section =
            plan.parts.iter().map(|part| (part.role.clone(), part.partuuid)).filter(|(role, _)| named(role)).collect();
        roles.retain(|role, _| named(role));
        let first = if config.is_none() { Some((DiskName::parse("disk0")?, roles)) } else { None };
        let disk = NewDisk { target, plan };
        let efi_entries = config.is_none_or(|config| config.settings.efi_entries);
        let mut job = Self { disk, name, source, shared, drafts: Vec::new(), esp, efi_entries, first, section };
        let machine = job.draft(root)?;
        check_programs(&job.disk.plan)?;
        job.drafts.clone_from(&machine.drafts);
        // The first sync would find that, when the disk is erased.
        lineage::own_record(&machine)?;
        check_source(machine, name, job.shared.as_ref(), Some(&job.disk.target))?;
        Ok(job)
    }

    /// What is there and what will be, for people.
    pub fn told(&self) -> String {
        let mut text = self.disk.told(&format!("as {}", self.name));
        for line in &self.source.left_out {
            let _ = writeln!(text, "  {line}");
        }
        if let Some(shared) = &self.shared {
            let _ = writeln!(text, "{}", shared.told());
        }
        if self.drafts.iter().any(|draft| draft.path == join::FSTAB) {
            let _ = writeln!(
                text,
                "{} loses its lines for the booted disk's boot partitions and swap space, which dualroot's generator mounts.",
                join::FSTAB
            );
        }
        let _ = write!(text, "Then {} names it", edit::FILE);
        text.push_str(match self.efi_entries {
            true => ", and it is booted by the firmware behind the booted disk.\n",
            false => "; the firmware gets no entry for it (efi-entries=no).\n",
        });
        text
    }

    /// Looks again whether the disk may be erased, as somebody may have taken their time to answer; and notes that a disk of the pair that
    /// isn't there was left behind: the one whose place this one takes may come back.
    ///
    /// # Errors
    /// A refusal, as for [`Job::plan`].
    pub fn check_again(&self, root: &Root) -> Result<()> {
        self.disk.check_again(root, self.joined())?;
        booted::note(root)
    }

    /// Has the key for syncs open the booted disk's containers: booted, the new disk syncs to this one.
    ///
    /// # Errors
    /// A key that others can read; cryptsetup that fails.
    pub fn give_key(&self, root: &Root, secret: &Secret) -> Result<()> {
        container::make_key(root)?;
        self.containers().iter().try_for_each(|device| container::add_key(device, secret))
    }

    /// Makes the disk, and writes the configuration that names it. The caller holds the lock, and has asked, also for what opens
    /// [`Job::containers`], if there are any.
    ///
    /// # Errors
    /// Whatever fails; no configuration names the disk then, and no firmware boots it, unless that is said.
    pub fn make(&self, root: &Root, secret: Option<&Secret>, log: &mut Log) -> Result<Machine> {
        if self.joined().is_none() {
            self.disk.partition(log)?;
        }
        let nodes = self.disk.make_file_systems(secret, log)?;
        if let Some(shared) = &self.shared {
            let node = nodes.get(&Role::Root).context("there is no part of the root")?;
            shared.join(root, node, log).with_context(|| {
                format!(
                    "leave {} in, and put no other disk in its place, as the root may need it by now",
                    self.disk.target.path()
                )
            })?;
        }
        held::enter_private_namespace()?;
        // Somebody may have changed the files since.
        let mut machine = self.draft(root)?;
        if machine.booted.esp() != self.esp {
            bail!("another disk was booted than a moment ago");
        }
        self.sync(&mut machine, log)?;
        if self.shared.is_some() {
            // Initrds may have been made since, and what they are made like depends on the number of devices.
            check_source(self.draft(root)?, self.name, self.shared.as_ref(), None)?;
        }
        self.disk.finish()?;
        // And since then.
        let mut machine = self.draft(root).with_context(|| format!("the disk boots, but {} does not name it yet", edit::FILE))?;
        for file in std::mem::take(&mut machine.drafts) {
            Below::open(&root.path("/"))?.apply(&file.change("", root))?;
        }
        Ok(machine)
    }

    /// Has the configuration be in force, with which [`Job::make`] has come back.
    ///
    /// # Errors
    /// Whatever fails; what is left can be done by a sync.
    pub fn start(&self, mut machine: Machine, log: &mut Log) -> Result<()> {
        self.shared.as_ref().map_or(Ok(()), Shared::end)?;
        program::output("systemctl", ["daemon-reload".into()]).context("the configuration is not in force")?;
        // What is known of the disks, which nobody was to know before.
        self.sync(&mut machine, log)?;
        mounts::start_spares(log);
        nvram::carry_out(&machine.firmware(), log)?;
        log.info(&format!("{} is {} now, and boots", self.disk.target.path(), self.name));
        Ok(())
    }

    /// The machine as it is with the new disk in its configuration: that, and fstab where it changes, are the machine's drafts.
    fn draft(&self, root: &Root) -> Result<Machine> {
        let Draft { text, config } = edit::draft(root, self.first.as_ref(), self.name, &self.section, &self.luks())?;
        let mut machine = Machine::with(root.clone(), config)?;
        let fstab = if self.shared.is_some() { join::fstab(&machine)? } else { None };
        machine.drafts = std::iter::once(Rewritten { path: edit::FILE.to_owned(), bytes: text }).chain(fstab).collect();
        Ok(machine)
    }

    /// What lies in LUKS containers.
    fn luks(&self) -> BTreeSet<Role> {
        self.disk.plan.parts.iter().filter(|part| part.container.is_some()).map(|part| part.role.clone()).collect()
    }

    /// The booted disk's partitions that are LUKS containers, and are copied into such.
    pub fn containers(&self) -> &[String] {
        &self.source.containers
    }

    fn joined(&self) -> Option<&[String]> {
        self.shared.as_ref().and_then(Shared::joined)
    }

    fn sync(&self, machine: &mut Machine, log: &mut Log) -> Result<()> {
        let options = Options { only: Some(self.name), ..Options::default() };
        let noted = booted::note_with(&machine.root, Some(&machine.config));
        match sync::run(machine, &options, noted, log).outcome? {
            Outcome::Whole => Ok(()),
            _ => bail!("{} would not boot", self.name),
        }
    }
}

/// What the new disk is called.
fn name(config: Option<&Config>, inventory: &Inventory, wish: &Wish) -> Result<DiskName> {
    let Some(name) = wish.replace else { return edit::free_name(config) };
    let disk = config.and_then(|config| config.disks.iter().find(|disk| disk.name == name));
    let disk = disk.ok_or_else(|| refused(format!("there is no [{name}] in the configuration; nothing was done")))?;
    for partuuid in disk.parts.values() {
        if let Some(part) = inventory.find(partuuid)? {
            return Err(refused(format!(
                "{name} is there: {} is one of its partitions; take the disk out, or erase it ('wipefs -a'), before another one takes its \
                 place",
                part.path
            )));
        }
    }
    Ok(name)
}
