//! A blank disk becomes the first one of another machine: a tree that rsync(1) has made of a system is copied to it, and gets a name and
//! identifiers of its own. The machine that does it isn't changed, and what it boots from makes no difference.
//!
//! What is made of the tree is what a sync makes of the booted disk, by the same code: boot files in the same order, with everything that
//! names a disk of the template rewritten, and in the end the proof.

pub mod identity;
pub mod origin;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::below::{self, Below, Change, is_link};
use crate::bootfiles::{BootFiles, Class};
use crate::bootplan::{self, Wanted};
use crate::clone::plan::Plan;
use crate::clone::source::{self, Source};
use crate::clone::target::Target;
use crate::clone::template::identity::{HOST_NAME, HostName};
use crate::clone::template::origin::{About, Listing, Origin};
use crate::clone::{NewDisk, check_programs, mib};
use crate::conf::Config;
use crate::entry::{self, Titles};
use crate::fstab;
use crate::generation::{self, Base, Generation};
use crate::ident::{DiskIds, PartIds, Rewriter};
use crate::inventory::{Inventory, Partition};
use crate::lineage::kernel_id;
use crate::log::Log;
use crate::machine::refused;
use crate::mounts::{self, Held};
use crate::opaque;
use crate::prove;
use crate::root::Root;
use crate::searched::Searched;
use crate::tree::{self, Rewritten, Tree};
use crate::types::{DiskName, PartUuid, Role};

/// Where the new disk is mounted, in a namespace of one's own.
const PLACES: &str = "/run/dualroot/new";
const FSTAB: &str = "/etc/fstab";
const HOSTS: &str = "/etc/hosts";

/// What is asked for.
#[derive(Clone, Debug)]
pub struct Wish {
    /// The disk that is to be erased.
    pub disk: PathBuf,
    /// What it becomes a copy of.
    pub origin: Origin,
    /// A file of layouts, of which the first counts instead of the template's own.
    pub layout: Option<PathBuf>,
}

/// What will be done.
pub struct Job {
    /// The disk that is erased, and what is made on it.
    pub disk: NewDisk,
    origin: Origin,
    about: About,
    /// What is not copied.
    rules: Vec<String>,
    left_out: Vec<String>,
}

impl Job {
    /// Decides, from what the template is now. Nothing is written.
    ///
    /// # Errors
    /// A refusal: what is missing, in the way, or not understood.
    pub fn plan(root: &Root, wish: &Wish) -> Result<Self> {
        let config = Config::load(root).map_err(|e| refused(format!("{e:#}")))?;
        let target = Target::look(&wish.disk, config.as_ref(), None)?;
        let origin = wish.origin.found()?;
        let about = origin.about(wish.layout.as_deref())?;
        let places = boot_places(&about)?;
        let mut rules = identity::left_out(about.machine_id);
        rules = Tree::new(&Role::Root, &rules, &[], None).context("the root is no tree")?.rules;
        let trees = about.disk.partitions.iter().filter_map(|part| part.role.as_ref()?.tree());
        let listing = origin.list(&rules, &trees.chain(places.iter().map(|(_, place)| *place)).collect::<Vec<_>>())?;
        if listing.boots.is_empty() {
            let dirs: Vec<&str> = places.iter().map(|(_, place)| *place).collect();
            return Err(refused(format!(
                "the template {origin} has no boot loader entry in {}; copy what is mounted there, too",
                dirs.join(" or ")
            )));
        }
        let source = source(&about, &places, &listing)?;
        let mut taken = Inventory::read()?.labels_beside(target.path());
        let named = about.ids.iter().flat_map(|disk| disk.parts.values());
        taken.extend(named.flat_map(|part| [part.label.clone(), part.partlabel.clone()]).flatten());
        let fresh_id = || kernel_id(root, "uuid");
        let plan = Plan::make(&source, DiskName::parse("disk0")?, (target.bytes, target.sector), taken, fresh_id)
            .map_err(|e| refused(format!("{}: {e:#}", target.path())))?;
        check_programs(&plan)?;
        let job = Self { disk: NewDisk { target, plan }, origin, about, rules, left_out: source.left_out };
        job.check_images(&places)?;
        Ok(job)
    }

    /// What is there and what will be, for people.
    pub fn told(&self) -> String {
        let mut text = self.disk.told("as the first disk of another machine");
        for line in &self.left_out {
            let _ = writeln!(text, "  {line}");
        }
        let _ =
            writeln!(text, "It is filled from {}, and gets a machine id of its own. This machine stays as it is.", self.origin);
        text
    }

    /// Looks again whether the disk may be erased, as somebody may have taken their time to answer.
    ///
    /// # Errors
    /// A refusal, as for [`Job::plan`].
    pub fn check_again(&self, root: &Root) -> Result<()> {
        self.disk.check_again(root, None)
    }

    /// Does it. The caller holds the lock, and has asked.
    ///
    /// # Errors
    /// Whatever fails; no firmware boots the disk then.
    pub fn run(self, root: &Root, name: &HostName, log: &Log) -> Result<()> {
        self.disk.partition(log)?;
        self.disk.make_file_systems(None, log)?;
        mounts::enter_private_namespace()?;
        let inventory = Inventory::read()?;
        let parts = self.disk.parts(&inventory)?;
        let new = New::mount(&parts, self.names(&parts, root)?)?;
        log.status(&format!("{}: copying {}", self.disk.target.path(), self.origin));
        self.origin.copy(&self.rules, new.root())?;
        new.make_own(&self.about, &self.disk.plan, name)?;
        new.barrier()?;
        log.status(&format!("{}: writing its boot partitions", self.disk.target.path()));
        let places = boot_places(&self.about)?;
        let wanted = new.write_boot_files(&places)?;
        log.status(&format!("{}: reading it again", self.disk.target.path()));
        let faults = new.prove(&wanted)?;
        if !faults.is_empty() {
            bail!("{} would not boot: {}", self.disk.target.path(), faults.join("; "));
        }
        for (_, place) in &places {
            new.empty(place)?;
        }
        new.release()?;
        self.disk.finish()?;
        log.info(&format!("{} boots as {name}", self.disk.target.path()));
        Ok(())
    }

    /// What can't be rewritten is looked for while nothing is erased yet, where that can be read without copying it.
    fn check_images(&self, places: &[(Role, &str)]) -> Result<()> {
        let Origin::Here(dir) = &self.origin else { return Ok(()) };
        let nothing = DiskIds { name: self.new_name()?, parts: BTreeMap::new() };
        let names = rewriter(&nothing, &self.old_ids()?)?;
        for (_, place) in places {
            let place = Root::new(dir).path(place);
            let found = Below::open(&place).and_then(|below| BootFiles::scan(&below));
            let found = found.map_err(|e| refused(format!("{}: {e:#}; nothing was done", place.display())))?;
            let faults = opaque::boot_partition(&place, &found, &names, &mut Searched::new(&names)?);
            let faults = faults.map_err(|e| refused(format!("{}: {e:#}; nothing was done", place.display())))?;
            if let Some(fault) = faults.first() {
                return Err(refused(format!("{}/{fault}; nothing was done", place.display())));
            }
        }
        Ok(())
    }

    /// A number for the new disk that none of the template's has: what is rewritten goes from one disk to another.
    fn new_name(&self) -> Result<DiskName> {
        let mut names = (0..1000).filter_map(|n| DiskName::parse(&format!("disk{n}")).ok());
        names.find(|name| self.about.ids.iter().all(|ids| ids.name != *name)).context("the template has a thousand disks")
    }

    /// What names the template's disks, and its machine.
    fn old_ids(&self) -> Result<Vec<DiskIds>> {
        let mut ids = self.about.ids.clone();
        let first = ids.first_mut().context("the template has no disks")?;
        identity::add_machine_id(first, self.about.machine_id)?;
        Ok(ids)
    }

    fn names(&self, parts: &BTreeMap<Role, &Partition>, root: &Root) -> Result<Names> {
        let of = |(role, part): (&Role, &&Partition)| {
            let partuuid = part.partuuid().with_context(|| format!("{} has no PARTUUID", part.path))?;
            let (uuid, label, partlabel) = (part.uuid.clone(), part.label.clone(), part.partlabel.clone());
            Ok((role.clone(), PartIds { uuid, label, partlabel, ..PartIds::new(partuuid) }))
        };
        let name = self.new_name()?;
        let mut own = DiskIds { name, parts: parts.iter().map(of).collect::<Result<_>>()? };
        let alone = |ids: &PartIds| DiskIds { name, parts: [(Role::Root, ids.clone())].into() };
        let its_root = own.parts.get(&Role::Root).map(alone).context("there is no root")?;
        let old = self.old_ids()?;
        let other = DiskIds { name: old.first().context("the template has no disks")?.name, parts: [].into() };
        let root_names = rewriter(&other, &[its_root])?;
        let machine_id = kernel_id(root, "uuid")?;
        identity::add_machine_id(&mut own, machine_id)?;
        Ok(Names { rewriter: rewriter(&own, &old)?, root: root_names, machine_id: machine_id.simple().to_string() })
    }
}

fn rewriter(target: &DiskIds, others: &[DiskIds]) -> Result<Rewriter> {
    Rewriter::new(target, others).map_err(|e| refused(format!("{e:#}")))
}

/// Where the template has what belongs on the boot partitions: as [`crate::conf::Disk::boot_places`].
fn boot_places(about: &About) -> Result<Vec<(Role, &'static str)>> {
    let has = |role: &Role| about.disk.partitions.iter().any(|part| part.role.as_ref() == Some(role));
    for role in [Role::Esp, Role::Root] {
        if !has(&role) {
            return Err(refused(format!("the layout of the template has no {role}=, which every disk has; nothing was done")));
        }
    }
    Ok(match has(&Role::Xbootldr) {
        true => vec![(Role::Esp, "/efi"), (Role::Xbootldr, "/boot")],
        false => vec![(Role::Esp, "/boot")],
    })
}

/// What fstab has to have lines for: all but the first two, which are mounted before anything reads it.
fn lines<'a>(about: &About, plan: &'a Plan) -> Result<Vec<(Option<&'a str>, PartUuid, &'a str)>> {
    let places = boot_places(about)?;
    let at = |role: &Role| places.iter().find(|(boot, _)| boot == role).map(|(_, place)| *place);
    let parts = plan.parts.iter().filter(|part| !matches!(part.role, Role::Root | Role::Usr));
    Ok(parts.map(|part| (at(&part.role).or(part.role.tree()), part.partuuid, part.content.told())).collect())
}

/// The partitions that are made, and room for what is copied to them. The root holds the boot files for a while, too.
fn source(about: &About, places: &[(Role, &str)], listing: &Listing<'_>) -> Result<Source> {
    let mut made = Source::default();
    let bytes = |place: &str| listing.bytes.get(place).copied().unwrap_or_default();
    for part in &about.disk.partitions {
        let Some(role) = part.role.clone() else {
            let what = part.fstype.as_deref().unwrap_or("nothing that is known");
            made.left_out.push(format!("{} ({what}) is not made: no key named it", part.partuuid));
            continue;
        };
        let content = source::Content::made_anew(part, &role)?;
        if part.container.is_some() {
            return Err(refused(format!(
                "{role}= of the template lay in a LUKS container, which is not made from a template; nothing was done"
            )));
        }
        if let Some((_, place)) = places.iter().find(|(of, _)| *of == role).filter(|(_, place)| bytes(place) > part.bytes) {
            return Err(refused(format!(
                "{place} of the template has {} MiB, more than its {role}= partition, which has {} MiB; nothing was done",
                mib(bytes(place)),
                mib(part.bytes)
            )));
        }
        let boot = || places.iter().map(|(_, place)| bytes(place)).sum::<u64>();
        made.parts.push(source::Part {
            bytes: part.bytes,
            kind: part.kind.clone(),
            name: part.name.clone(),
            attributes: part.attributes.clone(),
            content,
            label: part.label.clone(),
            luks: false,
            used: role.tree().map(|at| bytes(at).saturating_add(if role == Role::Root { boot() } else { 0 })),
            role,
        });
    }
    Ok(made)
}

/// What the new disk is known by.
struct Names {
    /// Replaces what names the template's disks, and its machine.
    rewriter: Rewriter,
    /// Finds what names the new root.
    root: Rewriter,
    machine_id: String,
}

/// The new disk's file systems, mounted where nobody else sees them.
struct New {
    held: BTreeMap<Role, Held>,
    /// Where the top directory of the new system is.
    top: PathBuf,
    below: Below,
    /// The one that its root is, where that is btrfs, as on every spare.
    generation: Option<Generation>,
    names: Names,
}

impl New {
    fn mount(parts: &BTreeMap<Role, &Partition>, names: Names) -> Result<Self> {
        let of = |role: &Role| parts.get(role).copied().with_context(|| format!("there is no {role}="));
        let mut held = BTreeMap::new();
        let mut hold = |role: &Role, place: &Path| -> Result<()> {
            let mut one = Held::open(of(role)?, place)?;
            one.make_writable()?;
            held.insert(role.clone(), one);
            Ok(())
        };
        for role in parts.keys().filter(|role| role.is_boot() || **role == Role::Root) {
            hold(role, &Path::new(PLACES).join(role.key()))?;
        }
        let mut top = Path::new(PLACES).join(Role::Root.key());
        let mut generation = None;
        if of(&Role::Root)?.fstype.as_deref() == Some("btrfs") {
            let below = Below::open(&top)?;
            let first = generation::plan(&[], &[].into(), Base::Empty, true, 1).current;
            generation::begin(&below, &top, first, &Base::Empty)?;
            generation::finish(&below, first)?;
            generation::show(&below, first)?;
            top = top.join(first.subvolume());
            generation = Some(first);
        }
        let mut new = Self { below: Below::open(&top)?, held, top, generation, names };
        // Those in others come behind these.
        let mut trees: Vec<(&Role, &str)> = parts.keys().filter_map(|role| Some((role, role.tree()?))).collect();
        trees.sort_by_key(|(_, at)| at.len());
        for (role, at) in trees.into_iter().filter(|(_, at)| !at.is_empty()) {
            let (below, path) = new.at(at)?;
            below.apply(&Change::MakeDir(path.to_owned()))?;
            let mut one = Held::open(of(role)?, &new.files().path(at))?;
            one.make_writable()?;
            new.held.insert(role.clone(), one);
        }
        Ok(new)
    }

    /// The handle of the root.
    fn root(&self) -> &Below {
        &self.below
    }

    /// The new system's files.
    fn files(&self) -> Root {
        Root::new(&self.top)
    }

    /// The handle of the file system that holds a path of the new system, and the path there.
    fn at<'p>(&self, path: &'p str) -> Result<(&Below, &'p str)> {
        let trees = self.held.iter().filter_map(|(role, held)| Some((role.tree().filter(|at| !at.is_empty())?, held)));
        let inner = |at: &str| path.strip_prefix(at)?.strip_prefix('/');
        match trees.filter_map(|(at, held)| Some((inner(at)?, held))).min_by_key(|(inner, _)| inner.len()) {
            Some((inner, held)) => Ok((held.below()?, inner)),
            None => Ok((&self.below, path.trim_start_matches('/'))),
        }
    }

    fn read(&self, path: &str) -> Result<Option<Vec<u8>>> {
        let (below, path) = self.at(path)?;
        below.read(path)
    }

    fn is_file(&self, path: &str) -> Result<bool> {
        let (below, path) = self.at(path)?;
        Ok(below.stat(path.as_ref())?.is_some_and(|stat| !is_link(&stat)))
    }

    fn write(&self, path: &str, bytes: Vec<u8>) -> Result<()> {
        let file = Rewritten { path: path.to_owned(), bytes };
        let (below, inner) = self.at(path)?;
        let dir = path.strip_suffix(inner).unwrap_or_default();
        below.apply(&file.change(dir, &self.files()))
    }

    /// Has the copied tree be that of a machine of its own, with this disk.
    fn make_own(&self, about: &About, plan: &Plan, name: &HostName) -> Result<()> {
        for file in tree::rewritten(&self.files(), &self.names.rewriter, self.generation, |_| false)? {
            self.write(&file.path, file.bytes)?;
        }
        let fstab = self.read(FSTAB)?.unwrap_or_default();
        self.write_other(FSTAB, &fstab, identity::with_lines(&fstab, &lines(about, plan)?))?;
        if let (Some(was), Some(hosts)) = (&about.host_name, self.read(HOSTS)?) {
            self.write_other(HOSTS, &hosts, identity::renamed(&hosts, was, name))?;
        }
        for path in identity::NAMING {
            let old = self.read(path)?.unwrap_or_default();
            self.write_other(path, &old, self.names.rewriter.rewrite(&old))?;
        }
        self.write(HOST_NAME, format!("{name}\n").into_bytes())?;
        let id = format!("{}\n", self.names.machine_id).into_bytes();
        if self.is_file(identity::DBUS_MACHINE_ID)? {
            self.write(identity::DBUS_MACHINE_ID, id.clone())?;
        }
        self.write(identity::MACHINE_ID, id)
    }

    fn write_other(&self, path: &str, old: &[u8], new: Vec<u8>) -> Result<()> {
        if new == old { Ok(()) } else { self.write(path, new) }
    }

    fn barrier(&self) -> Result<()> {
        self.held.values().try_for_each(|held| held.below()?.apply(&Change::Barrier))
    }

    /// What is on the boot partitions.
    fn boot_files(&self) -> Result<BTreeMap<Role, BootFiles>> {
        let boot = self.held.iter().filter(|(role, _)| role.is_boot());
        boot.map(|(role, held)| Ok((role.clone(), BootFiles::scan(held.below()?).with_context(|| role.to_string())?))).collect()
    }

    /// Whether an entry boots the new root; None where it doesn't say what it boots.
    fn boots_root(&self, entry: &[u8]) -> Option<bool> {
        let mut roots = entry.split(u8::is_ascii_whitespace).filter(|word| word.starts_with(b"root=")).peekable();
        roots.peek()?;
        Some(roots.any(|word| !self.names.root.foreign(word).is_empty()))
    }

    fn rewrite(&self, class: Class, text: &[u8]) -> Vec<u8> {
        if class != Class::Entry {
            return self.names.rewriter.rewrite(text);
        }
        let text = entry::rewrite(text, &self.names.rewriter, &Titles::default());
        match self.generation.filter(|_| self.boots_root(&text) == Some(true)) {
            Some(generation) => generation.boot(&text),
            None => text,
        }
    }

    /// Fills the boot partitions with what the copied tree has for them, in the order of [`bootplan`]; returns what is to be there.
    fn write_boot_files(&self, places: &[(Role, &str)]) -> Result<BTreeMap<Role, Vec<Wanted>>> {
        let mut source = BTreeMap::new();
        for (role, place) in places {
            let dir = self.files().path(place);
            let found = Below::open(&dir).and_then(|below| BootFiles::scan(&below));
            source.insert(role, (found.with_context(|| format!("{place} of the template"))?, dir));
        }
        // Older generations, and what only they need, stay behind.
        if let Some(newest) = source.values().flat_map(|(files, _)| generation::booted(files)).max() {
            source.values_mut().for_each(|(files, _)| generation::keep_own(files, &newest.subvolume()));
        }
        let there = self.boot_files()?;
        let mut parts = Vec::new();
        let known = [].into();
        for (role, (files, dir)) in source {
            let spare = there.get(role).with_context(|| format!("{role}= was not read"))?;
            let mut wanted = bootplan::wanted(&files, &dir, spare, |class, text| self.rewrite(class, text))?;
            for file in &mut wanted {
                let path = String::from_utf8(self.names.rewriter.rewrite(file.path.as_bytes()));
                file.path = path.with_context(|| file.path.clone())?;
            }
            parts.push(bootplan::Part { role: role.clone(), wanted, spare, known: &known });
        }
        let steps = bootplan::plan(&parts)?;
        for part in &parts {
            let (free, cluster) = self.below_of(&part.role)?.free()?;
            match bootplan::shortfall(&steps, &part.role, part.spare, free, cluster) {
                0 => {}
                short => bail!("{}= is too small, by {short} bytes; give a larger one by --layout", part.role),
            }
        }
        for step in &steps {
            self.below_of(&step.role)?.apply(&step.change).with_context(|| step.role.to_string())?;
        }
        Ok(parts.into_iter().map(|part| (part.role, part.wanted)).collect())
    }

    fn below_of(&self, role: &Role) -> Result<&Below> {
        self.held.get(role).with_context(|| format!("{role}= is not mounted"))?.below()
    }

    /// Why it would not boot as what it is to be, from what is read of it now.
    fn prove(&self, wanted: &BTreeMap<Role, Vec<Wanted>>) -> Result<Vec<String>> {
        let found = self.boot_files()?;
        let rewriter = &self.names.rewriter;
        let part = |(role, found)| Some(prove::Part { role: Role::clone(role), wanted: wanted.get(role)?, found });
        let parts: Vec<prove::Part<'_>> = found.iter().filter_map(part).collect();
        let mut faults = prove::boot_partitions(&parts, rewriter);
        let mut searched = Searched::new(rewriter)?;
        for part in &parts {
            let place = self.held.get(&part.role).context("a boot partition has gone")?.place();
            faults.extend(opaque::boot_partition(place, part.found, rewriter, &mut searched)?);
            faults.extend(misnamed(part.found, rewriter).map(|path| format!("{}: {path} bears the template's name", part.role)));
        }
        let texts: Vec<&[u8]> = parts.iter().flat_map(|p| p.found.of(Class::Entry)).filter_map(|f| f.text.as_deref()).collect();
        if !texts.is_empty() && texts.iter().all(|text| self.boots_root(text) == Some(false)) {
            faults.push(
                "no entry boots the root that was made: root= names something that the template's identifiers.json doesn't know"
                    .to_owned(),
            );
        }
        let mut files = BTreeMap::new();
        let paths = tree::identifying_files(&self.files())?;
        for path in paths.into_iter().chain(identity::NAMING.map(str::to_owned)) {
            if let Some(bytes) = self.read(&path)? {
                files.insert(path, bytes);
            }
        }
        faults.extend(prove::root_files(&files, rewriter));
        if let Some(current) = self.generation {
            let top = self.below_of(&Role::Root)?;
            faults.extend(generation::prove(top, &found, current));
            let fstab = files.get(FSTAB).map(Vec::as_slice).unwrap_or_default();
            let is_there = |path: &str| generation::is_subvolume(top, path);
            let beside = fstab::beside_the_root(fstab, |text| !self.names.root.foreign(text).is_empty(), is_there);
            faults.extend(
                beside
                    .into_iter()
                    .map(|line| format!("{FSTAB} would have the boot wait for a subvolume that is not there: {line}")),
            );
        }
        Ok(faults)
    }

    /// Leaves an empty directory to mount something on.
    fn empty(&self, place: &str) -> Result<()> {
        let (below, path) = self.at(place)?;
        for name in below.names(path.as_ref())? {
            below.clear(&below::join(path.as_ref(), &name))?;
        }
        Ok(())
    }

    /// Flushes everything, and lets go of it.
    fn release(self) -> Result<()> {
        drop(self.below);
        // What is mounted in others comes before these.
        self.held.into_values().rev().try_for_each(Held::release)
    }
}

/// Files and directories that are called after what names the template.
fn misnamed<'f>(found: &'f BootFiles, rewriter: &Rewriter) -> impl Iterator<Item = &'f String> {
    let paths = found.files.values().map(|file| &file.path).chain(&found.dirs);
    paths.filter(|path| !rewriter.foreign(path.as_bytes()).is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bootfiles::BootFile;
    use crate::clone::MIB;
    use crate::layout::{DiskLayout, PartLayout};
    use crate::machine::Refused;
    use std::fs;
    use std::os::unix::fs::symlink;
    use uuid::Uuid;

    const OLD: &str = "aaaaaaaa-0000-4000-8000-00000000000";
    const NEW: &str = "bbbbbbbb-0000-4000-8000-00000000000";
    const ROLES: [&str; 5] = ["esp", "xbootldr", "root", "swap", "home"];

    fn role(key: &str) -> Role {
        Role::parse_key(key).unwrap().unwrap()
    }

    fn id(start: &str, key: &str) -> PartUuid {
        PartUuid::parse(&format!("{start}{}", ROLES.iter().position(|role| *role == key).unwrap() + 1)).unwrap()
    }

    fn about(roles: &[&str]) -> About {
        let part = |key: &&str| PartLayout {
            role: Some(role(key)),
            partuuid: id(OLD, key),
            bytes: 100 * MIB,
            kind: String::new(),
            name: None,
            attributes: String::new(),
            container: None,
            fstype: Some(
                if *key == "esp" {
                    "vfat"
                } else if *key == "swap" {
                    "swap"
                } else {
                    "ext4"
                }
                .to_owned(),
            ),
            uuid: None,
            label: Some(format!("{key}0")),
        };
        let name = DiskName::parse("disk0").unwrap();
        About {
            machine_id: Uuid::from_u128(0xd0a1),
            host_name: Some("pair".to_owned()),
            disk: DiskLayout { name, sector: 512, table: Vec::new(), partitions: roles.iter().map(part).collect() },
            ids: vec![ids("disk0", OLD, 0xd0a1, roles)],
        }
    }

    fn ids(name: &str, start: &str, machine: u128, roles: &[&str]) -> DiskIds {
        let part = |key: &&str| {
            let part = PartIds::new(id(start, key));
            (role(key), part)
        };
        let mut ids = DiskIds { name: DiskName::parse(name).unwrap(), parts: roles.iter().map(part).collect() };
        identity::add_machine_id(&mut ids, Uuid::from_u128(machine)).unwrap();
        ids
    }

    fn names() -> Names {
        let (own, old) = (ids("disk1", NEW, 0x1234, &ROLES), ids("disk0", OLD, 0xd0a1, &ROLES));
        let root = DiskIds { name: own.name, parts: [(Role::Root, own.parts[&Role::Root].clone())].into() };
        let nothing = DiskIds { name: old.name, parts: [].into() };
        Names {
            rewriter: rewriter(&own, &[old]).unwrap(),
            root: rewriter(&nothing, &[root]).unwrap(),
            machine_id: Uuid::from_u128(0x1234).simple().to_string(),
        }
    }

    fn listing(bytes: &[(&'static str, u64)]) -> Listing<'static> {
        Listing { bytes: bytes.iter().map(|(at, mebibytes)| (*at, mebibytes * MIB)).collect(), boots: vec!["/boot"] }
    }

    #[test]
    fn every_partition_gets_room_for_what_is_copied_to_it() {
        let about = about(&ROLES);
        let places = boot_places(&about).unwrap();
        assert_eq!(places, [(Role::Esp, "/efi"), (Role::Xbootldr, "/boot")]);
        let source = source(&about, &places, &listing(&[("", 900), ("/boot", 60), ("/efi", 5), ("/home", 7)])).unwrap();
        let used: Vec<Option<u64>> = source.parts.iter().map(|part| part.used.map(mib)).collect();
        // The root has the boot files for a while.
        assert_eq!(used, [None, None, Some(965), None, Some(7)]);
    }

    #[test]
    fn what_cannot_be_made_is_refused() {
        let refusal = |about: &About, listed: &[(&'static str, u64)]| {
            let made = boot_places(about).and_then(|places| source(about, &places, &listing(listed)));
            let error = made.unwrap_err();
            assert!(error.is::<Refused>(), "{error:#}");
            error.to_string()
        };
        assert!(refusal(&about(&["root"]), &[]).contains("has no esp="));
        assert!(refusal(&about(&["esp", "home"]), &[]).contains("has no root="));
        let found = refusal(&about(&["esp", "root"]), &[("/boot", 101)]);
        assert!(found.contains("/boot of the template has 101 MiB, more than its esp= partition, which has 100 MiB"), "{found}");
        let mut encrypted = about(&["esp", "root"]);
        encrypted.disk.partitions[1].container = Some("x".into());
        assert!(refusal(&encrypted, &[]).contains("root= of the template lay in a LUKS container"));
    }

    /// A tree that was copied, on one file system.
    fn copied(files: &[(&str, &str)]) -> (tempfile::TempDir, New) {
        let tmp = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = tmp.path().join(path.trim_start_matches('/'));
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let (top, below) = (tmp.path().to_owned(), Below::open(tmp.path()).unwrap());
        (tmp, New { held: BTreeMap::new(), top, below, generation: None, names: names() })
    }

    #[test]
    fn a_copy_becomes_a_machine_of_its_own() {
        let roles = ["esp", "root", "swap", "home"];
        let plan = {
            let source = source(&about(&roles), &[(Role::Esp, "/boot")], &listing(&[])).unwrap();
            let mut plan =
                Plan::make(&source, DiskName::parse("disk0").unwrap(), (2000 * MIB, 512), [].into(), || Ok(Uuid::from_u128(1)))
                    .unwrap();
            plan.parts.iter_mut().for_each(|part| part.partuuid = id(NEW, part.role.key()));
            plan
        };
        let (old_id, new_id) = (Uuid::from_u128(0xd0a1).simple().to_string(), Uuid::from_u128(0x1234).simple().to_string());
        let dbus = "/var/lib/dbus/machine-id";
        let (tmp, new) = copied(&[
            ("/etc/os-release", ""),
            ("/etc/machine-id", &format!("{old_id}\n")),
            (dbus, &format!("{old_id}\n")),
            ("/etc/kernel/entry-token", &old_id),
            ("/etc/kernel/cmdline", &format!("root=PARTUUID={} systemd.machine_id={old_id}", id(OLD, "root"))),
            ("/etc/hostname", "pair\n"),
            ("/etc/hosts", "127.0.1.1 pair\n"),
            ("/etc/fstab", &format!("PARTUUID={} / ext4\nPARTUUID={} /home ext4\n", id(OLD, "root"), id(OLD, "home"))),
        ]);
        let name = HostName::parse("other").unwrap();
        new.make_own(&about(&roles), &plan, &name).unwrap();
        let read = |path: &str| fs::read_to_string(tmp.path().join(path.trim_start_matches('/'))).unwrap();
        for (path, expected) in [
            ("/etc/machine-id", format!("{new_id}\n")),
            (dbus, format!("{new_id}\n")),
            ("/etc/kernel/entry-token", new_id.clone()),
            ("/etc/kernel/cmdline", format!("root=PARTUUID={} systemd.machine_id={new_id}", id(NEW, "root"))),
            ("/etc/hostname", "other\n".to_owned()),
            ("/etc/hosts", "127.0.1.1 other\n".to_owned()),
            (
                "/etc/fstab",
                format!(
                    "PARTUUID={} / ext4\nPARTUUID={} /home ext4\nPARTUUID={} /boot vfat umask=0077 0 2\nPARTUUID={} none swap defaults 0 0\n",
                    id(NEW, "root"),
                    id(NEW, "home"),
                    id(NEW, "esp"),
                    id(NEW, "swap")
                ),
            ),
        ] {
            assert_eq!(read(path), expected, "{path}");
        }
        assert!(!tmp.path().join("etc/machine-info").exists());
        // A link to the machine id stays one.
        fs::remove_file(tmp.path().join("var/lib/dbus/machine-id")).unwrap();
        symlink("/etc/machine-id", tmp.path().join("var/lib/dbus/machine-id")).unwrap();
        new.make_own(&about(&roles), &plan, &name).unwrap();
        assert!(tmp.path().join("var/lib/dbus/machine-id").is_symlink());
    }

    #[test]
    fn an_entry_boots_the_new_root_or_does_not() {
        let (_tmp, new) = copied(&[]);
        let old = format!("options root=PARTUUID={} ro\nlinux /{}/linux\n", id(OLD, "root"), Uuid::from_u128(0xd0a1).simple());
        assert_eq!(new.boots_root(old.as_bytes()), Some(false));
        let text = new.rewrite(Class::Entry, old.as_bytes());
        assert_eq!(new.boots_root(&text), Some(true));
        assert_eq!(new.boots_root(b"options ro\n"), None);
        let mut found = BootFiles::default();
        let mut add = |path: &str| found.add(BootFile { path: path.to_owned(), size: 0, hash: blake3::hash(b""), text: None });
        add("linux").unwrap();
        add(&format!("loader/entries/{}-6.1.conf", Uuid::from_u128(0xd0a1).simple())).unwrap();
        add(&format!("{}/linux", Uuid::from_u128(0x1234).simple())).unwrap();
        let misnamed: Vec<&String> = misnamed(&found, &new.names.rewriter).collect();
        assert!(matches!(&misnamed[..], [path] if path.ends_with("-6.1.conf")), "{misnamed:?}");
    }

    #[test]
    fn boot_files_leave_an_empty_mount_point() {
        let (tmp, new) = copied(&[("/boot/a/b/c", ""), ("/boot/vmlinuz", ""), ("/etc/x", "")]);
        new.empty("/boot").unwrap();
        assert_eq!(fs::read_dir(tmp.path().join("boot")).unwrap().count(), 0);
        assert!(tmp.path().join("etc/x").exists());
        new.empty("/efi").unwrap_err();
    }
}
