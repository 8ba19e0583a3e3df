//! Making a blank disk a spare: dualroot-clone(8).
//!
//! sfdisk(8) and mkfs(8) make partitions and file systems; the same sync that keeps spares up to date fills them. Until that has proved that
//! the disk boots, its ESP is marked in the partition table so that no firmware boots it, and no configuration names it. A clone that was
//! interrupted starts again from the beginning, except that a shared root keeps the device that it has got already.

mod check;
pub mod container;
pub(crate) mod disk;
mod drivers;
mod join;
pub(crate) mod plan;
pub(crate) mod source;
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
use crate::clone::join::SharedRoot;
use crate::clone::plan::DiskPlan;
use crate::clone::source::Source;
use crate::clone::target::Target;
use crate::conf::edit::{Draft, Section};
use crate::conf::{Config, edit};
use crate::devices::gpt::{self, DiskLayout};
use crate::devices::inventory::Inventory;
use crate::devices::{held, mounts};
use crate::names::files::Rewritten;
use crate::pair::machine::{Machine, booted_disk, booted_esp, configuration};
use crate::pair::{booted, lineage};
use crate::sync::{self, Options, Outcome};
use crate::write::below::Below;

/// A clone that the user asked for.
#[derive(Clone, Debug)]
pub struct Request {
    /// The disk to erase.
    pub disk: PathBuf,
    /// The disk of the configuration that it replaces; None adds a disk.
    pub replace: Option<DiskName>,
    /// A file of layouts, of which the one with the new disk's name is used instead of the booted disk's.
    pub layout: Option<PathBuf>,
    /// Whether the disks of a machine that isn't configured will share the root.
    pub shared_root: bool,
}

/// A clone that was checked.
pub struct ClonePlan {
    /// The disk to erase, and its new partitions.
    pub disk: NewDisk,
    /// The disk's name in the configuration.
    pub name: DiskName,
    source: Source,
    shared: Option<SharedRoot>,
    /// The new configuration, and the new fstab where that changes.
    drafts: Vec<Rewritten>,
    /// The ESP that was booted when the plan was made.
    esp: PartUuid,
    efi_entries: bool,
    /// On a machine that isn't configured, the booted disk and its section.
    first: Option<(DiskName, Section)>,
    /// The section of the new disk.
    section: Section,
}

impl ClonePlan {
    /// Plans and checks a clone of this machine. Nothing is written.
    ///
    /// # Errors
    /// A refusal: something is missing, in the way, or not understood.
    pub fn new(root: &Root, request: &Request, log: &Log) -> Result<Self> {
        let config = configuration(root, log)?;
        let shared = SharedRoot::probe(root, config.as_ref(), request)?;
        let target = Target::probe(&request.disk, config.as_ref(), shared.as_ref().and_then(SharedRoot::joined))?;
        let (_, esp) = booted_esp(root)?;
        // An automount mounts nothing before the directory is read.
        let _ = ["/boot", "/efi"].map(|dir| root.names(dir));
        let inventory = Inventory::read()?;
        let table = mounts::table()?;
        let part = shared.as_ref().map(|shared| shared.booted_partition(&inventory, &esp)).transpose()?;
        let mut roles = match &config {
            Some(config) => booted_disk(config, &esp)?.parts.clone(),
            None => source::roles(&inventory, &table, &esp, part)?,
        };
        roles.extend(part.map(|part| (Role::Root, part)));
        let name = choose_name(config.as_ref(), &inventory, request)?;
        let mut source = match &request.layout {
            Some(file) => {
                let disk = gpt::load(file, name).map_err(|e| refused(format!("{e:#}")))?;
                Source::with_layout(disk, &file.display().to_string(), &inventory, &table, &roles, shared.is_some())?
            }
            None => Source::read(&inventory, &table, &roles, shared.is_some())?,
        };
        if let Some(least) = shared.as_ref().and_then(|shared| shared.least_bytes(name)) {
            source.set_root_bytes(least);
        }
        let taken = inventory.labels_on_other_disks(target.path());
        let in_the_way = |e| refused(format!("{}: {e:#}", target.path()));
        let fresh_id = || kernel_id(root, "uuid");
        let mut plan = DiskPlan::make(&source, name, (target.bytes, target.sector), taken, fresh_id).map_err(in_the_way)?;
        if let (Some(shared), Some(esp)) = (&shared, target.unfinished())
            && shared.joined().is_some()
        {
            let made = DiskLayout::read(name, &inventory, &BTreeMap::from([(Role::Esp, esp)]));
            let is_shared =
                |partuuid: &PartUuid| inventory.find(partuuid).is_ok_and(|part| part.is_some_and(|p| shared.contains(p)));
            made.and_then(|made| plan.adopt(&made, is_shared)).map_err(in_the_way)?;
        }
        // No section names the partitions of a shared root.
        let named = |role: &Role| shared.is_none() || *role != Role::Root;
        let section: Section =
            plan.parts.iter().map(|part| (part.role.clone(), part.partuuid)).filter(|(role, _)| named(role)).collect();
        roles.retain(|role, _| named(role));
        let first = if config.is_none() { Some((DiskName::parse("disk0")?, roles)) } else { None };
        let disk = NewDisk { target, plan };
        let efi_entries = config.is_none_or(|config| config.settings.efi_entries);
        let mut plan = Self { disk, name, source, shared, drafts: Vec::new(), esp, efi_entries, first, section };
        let machine = plan.draft(root)?;
        check_programs(&plan.disk.plan)?;
        plan.drafts.clone_from(&machine.drafts);
        // The first sync would find a bad record only after the disk was erased.
        lineage::own_record(&machine)?;
        check_source(machine, name, plan.shared.as_ref(), Some(&plan.disk.target))?;
        Ok(plan)
    }

    /// Describes the disk as it is and as it will be.
    pub fn describe(&self) -> String {
        let mut text = self.disk.describe(&format!("as {}", self.name));
        for line in &self.source.left_out {
            let _ = writeln!(text, "  {line}");
        }
        if let Some(shared) = &self.shared {
            let _ = writeln!(text, "{}", shared.describe());
        }
        if self.drafts.iter().any(|draft| draft.path == join::FSTAB) {
            let _ = writeln!(
                text,
                "{} loses its lines for the booted disk's boot partitions and swap space; dualroot's generator mounts these instead.",
                join::FSTAB
            );
        }
        let _ = write!(text, "At the end, {} names the disk", edit::FILE);
        text.push_str(match self.efi_entries {
            true => ", and the firmware gets a boot entry for it, after the booted disk's.\n",
            false => "; the firmware gets no boot entry for it (efi-entries=no).\n",
        });
        text
    }

    /// Checks again that the disk may be erased, because the user may have taken long to answer. Also notes each disk of the pair that is
    /// missing as left behind, because the disk that this one replaces may come back.
    ///
    /// # Errors
    /// A refusal, as for [`ClonePlan::new`].
    pub fn check_again(&self, root: &Root) -> Result<()> {
        self.disk.check_again(root, self.joined())?;
        booted::note(root)
    }

    /// Adds the key for syncs to the booted disk's containers, because the new disk, once booted, syncs to this one.
    ///
    /// # Errors
    /// A key that others can read; a failure of cryptsetup.
    pub fn add_sync_key(&self, root: &Root, secret: &Secret) -> Result<()> {
        container::make_key(root)?;
        self.containers().iter().try_for_each(|device| container::add_key(device, secret))
    }

    /// Erases and fills the disk, and writes the configuration that names it. The caller holds the lock and has asked the user, also for the
    /// secret that opens [`ClonePlan::containers`], if there are any.
    ///
    /// # Errors
    /// Any failure. Then no configuration names the disk, and no firmware boots it, unless the error says otherwise.
    pub fn make_disk(&self, root: &Root, secret: Option<&Secret>, log: &mut Log) -> Result<Machine> {
        if self.joined().is_none() {
            self.disk.partition(log)?;
        }
        let nodes = self.disk.make_file_systems(secret, log)?;
        if let Some(shared) = &self.shared {
            let node = nodes.get(&Role::Root).context("the plan has no partition for the shared root")?;
            shared.join(root, node, log).with_context(|| {
                format!("the root may need {} by now; leave it in, and put no other disk in its place", self.disk.target.path())
            })?;
        }
        held::enter_private_namespace()?;
        // The files may have changed since the plan was made.
        let mut machine = self.draft(root)?;
        if machine.booted.esp() != self.esp {
            bail!("the firmware names another booted disk than when the clone began");
        }
        self.sync(&mut machine, log)?;
        if self.shared.is_some() {
            // Initrds may have been made since, and what they contain depends on the number of devices.
            check_source(self.draft(root)?, self.name, self.shared.as_ref(), None)?;
        }
        self.disk.finish()?;
        // The files may have changed during the sync, too.
        let mut machine = self.draft(root).with_context(|| format!("the disk boots, but {} does not name it yet", edit::FILE))?;
        for file in std::mem::take(&mut machine.drafts) {
            Below::open(&root.path("/"))?.apply(&file.change("", root))?;
        }
        Ok(machine)
    }

    /// Puts the new configuration into force; `machine` comes from [`ClonePlan::make_disk`].
    ///
    /// # Errors
    /// Any failure; a sync can do the rest.
    pub fn activate(&self, mut machine: Machine, log: &mut Log) -> Result<()> {
        self.shared.as_ref().map_or(Ok(()), SharedRoot::finish)?;
        program::output("systemctl", ["daemon-reload".into()]).context("the new configuration is not in force")?;
        // This sync also records the disks' names and layouts, which the first one left out.
        self.sync(&mut machine, log)?;
        mounts::start_spares(log);
        nvram::carry_out(&machine.firmware(), log)?;
        log.info(&format!("{} is {} now, and boots", self.disk.target.path(), self.name));
        Ok(())
    }

    /// The machine with the new disk in its configuration. The configuration, and fstab where it changes, are its drafts.
    fn draft(&self, root: &Root) -> Result<Machine> {
        let Draft { text, config } = edit::draft(root, self.first.as_ref(), self.name, &self.section, &self.luks_roles())?;
        let mut machine = Machine::with_config(root.clone(), config)?;
        let fstab = if self.shared.is_some() { join::fstab(&machine)? } else { None };
        machine.drafts = std::iter::once(Rewritten { path: edit::FILE.to_owned(), bytes: text }).chain(fstab).collect();
        Ok(machine)
    }

    /// The roles of the new disk's LUKS containers.
    fn luks_roles(&self) -> BTreeSet<Role> {
        self.disk.plan.parts.iter().filter(|part| part.container.is_some()).map(|part| part.role.clone()).collect()
    }

    /// The device nodes of the booted disk's LUKS containers that are copied into new ones.
    pub fn containers(&self) -> &[String] {
        &self.source.containers
    }

    fn joined(&self) -> Option<&[String]> {
        self.shared.as_ref().and_then(SharedRoot::joined)
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

/// The new disk's name: that of the disk that it replaces, or a free one.
fn choose_name(config: Option<&Config>, inventory: &Inventory, request: &Request) -> Result<DiskName> {
    let Some(name) = request.replace else { return edit::free_name(config) };
    let disk = config.and_then(|config| config.disks.iter().find(|disk| disk.name == name));
    let disk = disk.ok_or_else(|| refused(format!("the configuration has no section [{name}]; nothing was done")))?;
    for partuuid in disk.parts.values() {
        if let Some(part) = inventory.find(partuuid)? {
            return Err(refused(format!(
                "{name} is still there: {} is one of its partitions; take the disk out, or erase it ('wipefs -a'), and run this again",
                part.path
            )));
        }
    }
    Ok(name)
}
