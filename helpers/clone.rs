//! A blank disk becomes a spare: dualroot-clone(8).
//!
//! Partitions and file systems are made by sfdisk(8) and mkfs(8), and filled by the same sync that keeps spares up to date. Until that has
//! proved that the disk boots, its ESP is marked in the partition table so that no firmware boots it, and no configuration names it: whatever
//! is cut before is begun anew, but for what a shared root has been given already, which goes on.

pub mod container;
mod drivers;
mod join;
pub mod plan;
pub mod source;
pub mod target;
pub mod template;

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::base::clock::kernel_id;
use crate::base::log::Log;
use crate::base::program;
use crate::base::refusal::refused;
use crate::base::root::Root;
use crate::base::types::{DiskName, PartUuid, Role};
use crate::boot::files::BootFiles;
use crate::boot::{nvram, offers, roots};
use crate::clone::container::Secret;
use crate::clone::join::Shared;
use crate::clone::plan::{Plan, UNFINISHED};
use crate::clone::source::Source;
use crate::clone::target::Target;
use crate::conf::edit::{Draft, Section};
use crate::conf::{Config, edit};
use crate::devices::gpt::{self, DiskLayout};
use crate::devices::inventory::{Inventory, Partition};
use crate::devices::{held, luks, mounts};
use crate::names::files::Rewritten;
use crate::names::ident::Rewriter;
use crate::names::ids::DiskIds;
use crate::names::{crypttab, files, fstab};
use crate::pair::machine::{Machine, booted_disk, booted_esp};
use crate::pair::{booted, lineage};
use crate::proof::searched::Searched;
use crate::proof::{images, prove, waits};
use crate::sync::{self, Options, Outcome};
use crate::write::below::Below;

/// 1 MiB in bytes.
pub(crate) const MIB: u64 = 1 << 20;

/// Bytes as people read them: whole MiB.
pub(crate) fn mib(bytes: u64) -> u64 {
    bytes / MIB
}

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

/// A disk that is made anew.
pub struct NewDisk {
    /// The disk that is erased.
    pub target: Target,
    /// What is made on it.
    pub plan: Plan,
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

impl NewDisk {
    /// What is there and what will be, for people; it becomes that as `what`.
    fn told(&self, what: &str) -> String {
        let mut text = format!("What is on the disk, and will be lost:\n{}\n", self.target.table());
        let _ = writeln!(text, "What it becomes, {what}:");
        for part in &self.plan.parts {
            let label = part.label.as_deref().or(part.name.as_deref()).unwrap_or("-").escape_debug().to_string();
            let _ = writeln!(
                text,
                "  {:<10} {:>10} MiB  {:<13} {label:<16} {}",
                part.role.to_string(),
                mib(part.bytes),
                part.told(),
                part.partuuid
            );
        }
        text
    }

    /// Looks again whether the disk may be erased. Its partitions may be among those that are `joined`, as for [`Target::look`].
    fn check_again(&self, root: &Root, joined: Option<&[String]>) -> Result<()> {
        self.target.check_same()?;
        let config = Config::load(root).map_err(|e| refused(format!("{e:#}")))?;
        Target::look(Path::new(self.target.path()), config.as_ref(), joined).map(drop)
    }

    fn partition(&self, log: &Log) -> Result<()> {
        log.status(&format!("{}: making partitions", self.target.path()));
        self.target.check_same()?;
        // What is in the old places would be found in the new ones.
        for old in self.target.partitions() {
            program::output("wipefs", ["-q", "-a", old].map(Into::into))?;
        }
        self.target.check_same()?;
        program::output("wipefs", ["-q", "-a", self.target.path()].map(Into::into))?;
        let options = ["-q", "--wipe=always", "--wipe-partitions=always", self.target.path()];
        program::fed("sfdisk", options.map(Into::into), self.plan.table().as_bytes())?;
        settle()
    }

    /// Makes the file systems, and returns the device nodes that they are on.
    fn make_file_systems(&self, secret: Option<&Secret>, log: &Log) -> Result<BTreeMap<Role, String>> {
        let mut nodes = self.nodes()?;
        for part in &self.plan.parts {
            let node = nodes.get_mut(&part.role).context("a partition has gone")?;
            if let Some(uuid) = &part.container {
                log.status(&format!("{node}: making a LUKS container for {}", part.role));
                self.target.check_same()?;
                container::format(node, uuid, secret.context("there is no passphrase for it")?)?;
                luks::open(&part.partuuid)?;
                *node = part.partuuid.mapping();
            }
            let Some((program, arguments)) = part.make(node, self.target.sector) else { continue };
            log.status(&format!("{node}: making {} for {}", part.content.told(), part.role));
            self.target.check_same()?;
            program::output(&program, arguments)?;
        }
        // udev notices by itself, but perhaps only after it has been waited for.
        let arguments = ["trigger".to_owned(), "--settle".to_owned()].into_iter().chain(nodes.values().cloned());
        program::output("udevadm", arguments.map(OsString::from))?;
        Ok(nodes)
    }

    /// The device nodes of the new partitions.
    fn nodes(&self) -> Result<BTreeMap<Role, String>> {
        let now = Inventory::read()?;
        Ok(self.parts(&now)?.into_iter().map(|(role, part)| (role, part.path.clone())).collect())
    }

    /// The new partitions, among those that are there.
    fn parts<'i>(&self, now: &'i Inventory) -> Result<BTreeMap<Role, &'i Partition>> {
        let find = |part: &plan::Part| -> Result<_> {
            let found = now.find(&part.partuuid)?;
            let found = found.with_context(|| format!("the new partition {} doesn't appear", part.partuuid))?;
            Ok((part.role.clone(), found))
        };
        self.plan.parts.iter().map(find).collect()
    }

    /// Takes the mark away.
    fn finish(&self) -> Result<()> {
        let at = self.plan.parts.iter().position(|part| part.role == Role::Esp).context("there is no ESP")?;
        let attributes = self.plan.parts.get(at).map(|part| part.attributes.clone()).unwrap_or_default();
        let arguments = ["-q", "--no-reread", "--no-tell-kernel", "--part-attrs", self.target.path()];
        let arguments = arguments.into_iter().map(OsString::from).chain([(at + 1).to_string().into(), attributes.into()]);
        program::output("sfdisk", arguments).with_context(|| format!("the mark {UNFINISHED} can't be taken from the ESP"))?;
        settle()
    }
}

/// Whether every program is there, before something needs to be undone for lack of one.
fn check_programs(plan: &Plan) -> Result<()> {
    let made = plan.parts.iter().filter_map(|part| part.make("", 512)).map(|(program, _)| program);
    let is_btrfs = plan.parts.iter().any(|part| part.content.told() == "btrfs");
    let is_luks = plan.parts.iter().any(|part| part.container.is_some());
    for name in made
        .chain(is_luks.then(|| "cryptsetup".to_owned()))
        .chain(is_btrfs.then(|| "btrfs".to_owned()))
        .chain(["wipefs", "sfdisk", "udevadm", "rsync", "fsck.fat", "systemctl"].map(str::to_owned))
    {
        program::path(&name).map_err(|e| refused(format!("{e:#}; nothing was done")))?;
    }
    Ok(())
}

/// What a boot partition holds, and the first reason why a copy of its images would not boot.
fn look_into(place: &Path, names: &Rewriter) -> Result<(BootFiles, Option<String>)> {
    let look = || -> Result<_> {
        let found = BootFiles::scan(&Below::open(place)?)?;
        let faults = images::boot_partition(place, &found, names, &mut Searched::new(names)?)?;
        Ok((found, faults.into_iter().next()))
    };
    look().with_context(|| place.display().to_string())
}

/// Whether the booted disk can be copied, as far as that can be seen before; where a disk is given, also whether the copy has
/// what drives that.
fn check_source(mut machine: Machine, name: DiskName, shared: Option<&Shared>, disk: Option<&Target>) -> Result<()> {
    let new = machine.config.disks.iter().find(|disk| disk.name == name).context("the new disk has no section")?;
    if let Some(shared) = shared {
        shared.forget(&mut machine.ids);
    }
    // As the sync will search for what names another disk.
    let names = machine.rewriter(new)?;
    let mut files = BTreeMap::new();
    for (role, _, dir) in machine.booted.boot_places() {
        let (found, fault) = look_into(Path::new(dir.as_str()), &names)?;
        if let Some(fault) = fault {
            bail!("{dir}/{fault}; a copy would not boot without the booted disk");
        }
        files.insert(role, found);
    }
    match shared {
        Some(_) => join::check(&machine, &names, &files)?,
        None => check_own_root(&machine, &names, &mut files)?,
    }
    disk.map_or(Ok(()), |disk| drivers::check(&machine, disk.kname(), &files))
}

/// Whether the booted disk's root can be copied. What boots another one isn't, and is taken out of `files`.
fn check_own_root(machine: &Machine, names: &Rewriter, files: &mut BTreeMap<Role, BootFiles>) -> Result<()> {
    let crypttab = machine.root.read_opt("/etc/crypttab").context("/etc/crypttab can't be read")?.unwrap_or_default();
    if let Some(line) = crypttab::opened_by_files(&crypttab, |spec| !names.foreign(spec).is_empty()).first() {
        bail!(
            "/etc/crypttab opens the LUKS container {line}, which would not open that of the copy; have {} there, or none",
            crypttab::KEY
        );
    }
    if let Some(fault) = prove::named_unit(&machine.root, names)? {
        bail!("{fault}");
    }
    if let Some(fault) = beside(machine)? {
        bail!("{fault}; that is not cloned");
    }
    let Some(running) = machine.subvolume()? else { return Ok(()) };
    if let Some(why) = roots::no_source(&running, files) {
        bail!("on {}, {why}", machine.booted.name);
    }
    files.values_mut().for_each(|files| offers::keep_own(files, &running));
    Ok(())
}

/// What the copy would wait for when it boots: what of the booted disk isn't cloned.
fn beside(machine: &Machine) -> Result<Option<String>> {
    let mut booted: Vec<DiskIds> = machine.ids.iter().filter(|ids| ids.name == machine.booted.name).cloned().collect();
    booted.iter_mut().for_each(|ids| ids.parts.retain(|role, _| !machine.booted.parts.contains_key(role)));
    let names = Rewriter::finder(&booted)?;
    let files = files::identifying_texts(&machine.root, &[])?;
    let fstab = files.get("/etc/fstab").map(Vec::as_slice).unwrap_or_default();
    let root = machine.root_names(&machine.booted)?;
    let names_root = |spec: &[u8]| root.as_ref().is_some_and(|root| !root.foreign(spec).is_empty());
    let subvolumes = fstab::beside_the_root(fstab, names_root, |_| false);
    let subvolumes = subvolumes.into_iter().map(|line| {
        format!(
            "/etc/fstab would have the boot wait for another subvolume than the root: {line}; give the line nofail, or have the disks \
             share the root"
        )
    });
    let on_disk = waits::on_booted_disk_only(&machine.root, &machine.inventory, &machine.booted, fstab)?;
    let found = prove::root_files(&files, &names, |dir| machine.is_apart(dir));
    Ok(found.into_iter().chain(subvolumes).chain(on_disk).next())
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

/// Waits until udev has seen what was done.
fn settle() -> Result<()> {
    program::output("udevadm", ["settle".into()]).map(drop)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::base::types::DirPath;
    use crate::names::ids::PartIds;

    #[test]
    fn f14_what_boot_waits_for_is_cloned_or_refused() {
        let id = |n: u32| PartUuid::parse(&format!("aaaaaaaa-0000-4000-8000-{n:012}")).unwrap();
        let text = format!("[disk0]\nesp={}\nroot={}\n[disk1]\nesp={}\nroot={}\n", id(1), id(2), id(3), id(4));
        let config = Config::parse(&[("x".to_owned(), text.into_bytes())]).unwrap().unwrap();
        let part = |n, uuid: &str| PartIds { uuid: Some(uuid.to_owned()), ..PartIds::new(id(n)) };
        let parts = [(Role::Root, part(2, "of-root")), (Role::Dir(DirPath::parse("/dev/sda3").unwrap()), part(5, "of-tmp"))];
        let ids = vec![DiskIds { name: config.disks[0].name, parts: parts.into() }];
        let tmp = tempfile::tempdir().unwrap();
        fs::create_dir(tmp.path().join("etc")).unwrap();
        let booted = config.disks[0].clone();
        let inventory = Inventory::parse(br#"{"blockdevices":[]}"#, BTreeMap::new(), BTreeSet::new()).unwrap();
        let machine = Machine { root: Root::new(tmp.path()), config, booted, inventory, ids, loader: None, drafts: Vec::new() };
        for (line, expected) in [
            ("", None),
            ("UUID=of-tmp /tmp ext4 nofail", None),
            ("UUID=of-tmp /tmp ext4 defaults", Some("line 2 (/tmp) needs")),
            ("PARTUUID=aaaaaaaa-0000-4000-8000-000000000005 /tmp ext4", Some("line 2 (/tmp) needs")),
            ("UUID=of-root /home btrfs subvol=@home", Some("another subvolume than the root: line 2 (/home)")),
            ("UUID=of-root /home btrfs subvol=@home,nofail", None),
            ("UUID=of-other /home btrfs subvol=@home", None),
        ] {
            fs::write(tmp.path().join("etc/fstab"), format!("UUID=of-root / ext4\n{line}\n")).unwrap();
            match (beside(&machine).unwrap(), expected) {
                (None, None) => {}
                (Some(fault), Some(expected)) if fault.contains(expected) => {}
                (found, _) => panic!("{line}: {found:?}"),
            }
        }
        fs::remove_file(tmp.path().join("etc/fstab")).unwrap();
        fs::create_dir_all(tmp.path().join("etc/systemd/system")).unwrap();
        for (options, expected) in [("defaults", true), ("nofail", false)] {
            let what = "/dev/disk/by-partuuid/aaaaaaaa-0000-4000-8000-000000000005";
            let text = format!("[Mount]\nWhat={what}\nWhere=/tmp\nOptions={options}\n");
            fs::write(tmp.path().join("etc/systemd/system/tmp.mount"), text).unwrap();
            let fault = beside(&machine).unwrap();
            assert_eq!(fault.is_some_and(|fault| fault.contains("give its Options= nofail")), expected);
        }
    }
}
