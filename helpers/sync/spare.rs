//! A spare whose partitions are mounted for a sync: what is on it, what is to be there, and whether it would boot then.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::base::refusal::refused;
use crate::base::types::Role;
use crate::boot::files::{BootFiles, Class, classify};
use crate::boot::known::Known;
use crate::boot::order;
use crate::boot::wanted::{Step, Wanted};
use crate::boot::{entry, offers, room, roots, wanted};
use crate::conf::Disk;
use crate::copy::generation;
use crate::copy::tree::Tree;
use crate::devices::held::{Alone, Held};
use crate::devices::inventory::{Inventory, Partition};
use crate::devices::mounts;
use crate::devices::subvolume;
use crate::names::files::Rewritten;
use crate::names::generation::Generation;
use crate::names::ident::Rewriter;
use crate::names::{files, fstab};
use crate::pair::containers;
use crate::pair::machine::Machine;
use crate::proof::searched::Searched;
use crate::proof::{images, prove, waits};
use crate::write::below::{Below, Kind};
use crate::write::change::Change;

/// Where the booted disk's file systems are seen without what is mounted in them.
pub(crate) const SOURCES: &str = "/run/dualroot/source";

/// Where spares are mounted, in a namespace of one's own.
const PLACES: &str = "/run/dualroot/spare";

/// What is to be on each boot partition.
pub(crate) type AllWanted = BTreeMap<Role, Vec<Wanted>>;

/// A spare's mounted partitions, and what on them comes from elsewhere.
pub(crate) struct Spare<'a> {
    pub(crate) machine: &'a Machine,
    pub(crate) disk: &'a Disk,
    pub(crate) rewriter: Rewriter,
    /// Finds what names its root.
    pub(crate) root_names: Option<Rewriter>,
    pub(crate) held: BTreeMap<Role, Held>,
    /// What becomes of the generations of its root, where it has any.
    pub(crate) generations: Option<generation::Plan>,
    /// The one that is being made.
    pub(crate) fresh: Option<Below>,
}

impl<'a> Spare<'a> {
    /// A spare of which every partition is there; none of them is mounted yet.
    pub(crate) fn new(machine: &'a Machine, disk: &'a Disk, parts: &BTreeMap<Role, &Partition>) -> Result<Self> {
        if let Some((role, partuuid)) = disk.parts.iter().find(|(role, _)| !parts.contains_key(*role)) {
            return Err(refused(format!(
                "its {role}= partition {partuuid} isn't there, but others of the disk are; nothing was written to it"
            )));
        }
        for (role, part) in parts {
            containers::check(machine, role, part)?;
        }
        let (rewriter, root_names) = (machine.rewriter(disk)?, machine.naming(disk, &Role::Root)?);
        Ok(Self { machine, disk, rewriter, root_names, held: BTreeMap::new(), generations: None, fresh: None })
    }

    /// Mounts the partitions of these roles, read-only, and makes sure that they are what the configuration means.
    pub(crate) fn hold(&mut self, parts: &BTreeMap<Role, &Partition>, roles: impl Fn(&Role) -> bool) -> Result<()> {
        for (role, part) in parts.iter().filter(|(role, _)| roles(role)) {
            let place = Path::new(PLACES).join(self.disk.name.to_string()).join(role.key().replace('/', "-"));
            self.held.insert(role.clone(), Held::open(part, &place)?);
        }
        self.check_devices(parts)
    }

    pub(crate) fn held(&self, role: &Role) -> Result<&Held> {
        self.held.get(role).with_context(|| format!("{role}= is not mounted"))
    }

    /// The generation of its root that it will boot, where it has any.
    pub(crate) fn generation(&self) -> Option<Generation> {
        self.generations.as_ref().map(|plan| plan.current)
    }

    /// Where the tree of a role is copied to; None where what is there is what is wanted.
    pub(crate) fn target(&self, role: &Role) -> Result<Option<&Below>> {
        match role {
            Role::Root if self.generations.is_some() => Ok(self.fresh.as_ref()),
            _ => self.held(role)?.below().map(Some),
        }
    }

    pub(crate) fn tree(&self, role: &Role, apart: &[Rewritten], generation: Option<Generation>) -> Option<Tree> {
        Tree::new(role, &self.machine.config.settings.exclude, apart, generation.filter(|_| *role == Role::Root))
    }

    /// What becomes of the generations of the spare's root; None where it isn't btrfs, or every disk's.
    pub(crate) fn plan_generations(
        &self,
        parts: &BTreeMap<Role, &Partition>,
        source: &BTreeMap<Role, BootFiles>,
        there: &BTreeMap<Role, BootFiles>,
        is_new: bool,
    ) -> Result<Option<generation::Plan>> {
        let Some(part) = parts.get(&Role::Root) else { return Ok(None) };
        let is_btrfs = part.fstype.as_deref() == Some("btrfs");
        let running = self.machine.subvolume()?;
        if is_btrfs != running.is_some() {
            return Err(refused(format!(
                "{}, root= of {}, holds {}, but one of the two roots is btrfs and the other isn't; make the same kind of file system there",
                part.path,
                self.disk.name,
                part.fstype.as_deref().unwrap_or("nothing")
            )));
        }
        let Some(running) = running else { return Ok(None) };
        if let Some(why) = roots::no_source(&running, source) {
            return Err(refused(format!("on {}, {why}", self.machine.booted.name)));
        }
        let top = self.held(&Role::Root)?.below()?;
        let found = generation::found(top)?;
        let changed = match found.last() {
            Some(last) => self.differs(*last, &top.sub(last.subvolume().as_ref())?.context("a generation has gone")?)?,
            None => true,
        };
        let base = generation::base(top, &found, there.values().flat_map(roots::named), is_new)?;
        let booted = there.values().flat_map(roots::booted).collect();
        Ok(Some(generation::plan(&found, &booted, base, changed, self.machine.config.settings.generations)))
    }

    /// What lies on the partition of the booted root beside it, and isn't copied: subvolumes in it that have something in them, and
    /// those that are mounted.
    pub(crate) fn not_copied(&self) -> Result<Vec<String>> {
        let Some(root) = self.machine.subvolume()?.filter(|_| self.generations.is_some()) else { return Ok(Vec::new()) };
        let seen = Alone::open(Path::new("/"), &Path::new(SOURCES).join("root"))?;
        let here = Below::open(seen.place())?;
        let mut found = Vec::new();
        for path in subvolume::subvolumes_of(&here, root.trim_matches('/'))? {
            if here.names(path.as_ref()).is_ok_and(|names| !names.is_empty()) {
                found.push(format!("/{path}"));
            }
        }
        let table = mounts::table()?;
        let own = mounts::at(&table, Path::new("/")).context("nothing is mounted on /")?;
        let beside =
            table.iter().filter(|m| m.fstype == "btrfs" && m.source == own.source && !Path::new(&m.root).starts_with(&root));
        found.extend(beside.map(|mount| mount.at.display().to_string()));
        found.sort();
        found.dedup();
        Ok(found)
    }

    /// Whether the booted root is another one than that generation of it.
    fn differs(&self, generation: Generation, there: &Below) -> Result<bool> {
        let apart = self.rewritten(Some(generation))?;
        let mut tree = self.tree(&Role::Root, &apart, Some(generation)).context("the root is no tree")?;
        let seen = Alone::open(&tree.source(), &Path::new(SOURCES).join("root"))?;
        tree.from = Some(seen.place().to_owned());
        for file in &apart {
            if !file.is_in(there)? {
                return Ok(true);
            }
        }
        tree.differs(there)
    }

    /// Removes the generations that are to go, but those that an entry still boots, and those with something in them that has not been
    /// copied: what that is, is returned. The offers of those that go are removed first, also from `now`, what the boot partitions hold.
    pub(crate) fn drop_generations(&self, now: &mut BTreeMap<Role, BootFiles>) -> Result<Vec<String>> {
        let Some(generations) = &self.generations else { return Ok(Vec::new()) };
        let booted: BTreeSet<Generation> = now.values().flat_map(roots::booted).collect();
        let top = self.held(&Role::Root)?.below()?;
        let found = generation::found(top)?;
        let gone = generations.gone_of(&found, &booted);
        let Some(stays) = found.iter().rfind(|one| !gone.contains(one)).filter(|_| !gone.is_empty()) else {
            return Ok(Vec::new());
        };
        // A sync that was cut may have left another one as what mounts show, which can't be removed.
        generation::show(top, *stays)?;
        for (role, files) in now {
            let below = self.held(role)?.below()?;
            for path in offers::take_offers(files, &gone) {
                below.apply(&Change::Remove(path))?;
            }
            below.apply(&Change::Barrier)?;
        }
        generation::remove(top, &gone)
    }

    /// Has the spare's mounts show the generation that it boots, now and when they are made again.
    pub(crate) fn show_generation(&self, parts: &BTreeMap<Role, &Partition>) -> Result<()> {
        let Some(generations) = &self.generations else { return Ok(()) };
        generation::show(self.held(&Role::Root)?.below()?, generations.current)?;
        if let Some(part) = parts.get(&Role::Root) {
            let spares = self.machine.config.spares(&self.machine.booted);
            let table = mounts::table()?;
            let shown = format!("/{}", generations.current.subvolume());
            let ours = |m: &&mounts::Mount| spares.iter().any(|(dir, _)| m.at == Path::new(dir.as_str()));
            mounts::stop(&table.iter().filter(|m| m.is_on(part) && m.root != shown).filter(ours).collect::<Vec<_>>())?;
        }
        Ok(())
    }

    /// The booted disk's boot partitions, read whole.
    pub(crate) fn source(&self) -> Result<BTreeMap<Role, BootFiles>> {
        let mut all = BTreeMap::new();
        for (role, _, dir) in self.machine.booted.boot_places() {
            let below = Below::open(Path::new(dir.as_str()))?;
            all.insert(role, BootFiles::scan(&below).with_context(|| format!("{dir} of the booted disk"))?);
        }
        Ok(all)
    }

    /// The spare's boot partitions, read whole.
    pub(crate) fn boot_files<'r>(&self, roles: impl Iterator<Item = &'r Role>) -> Result<BTreeMap<Role, BootFiles>> {
        let scan = |role: &Role| -> Result<_> {
            let found = BootFiles::scan(self.held(role)?.below()?).with_context(|| format!("{role}= of {}", self.disk.name))?;
            Ok((role.clone(), found))
        };
        roles.map(scan).collect()
    }

    /// The steps for the boot partitions, and what is to be on them in the end.
    pub(crate) fn boot_plan(
        &self,
        source: &BTreeMap<Role, BootFiles>,
        there: &BTreeMap<Role, BootFiles>,
        known: &Known,
    ) -> Result<(Vec<Step>, AllWanted)> {
        let titles = self.machine.titles(self.disk);
        let rewrite = |class: Class, text: &[u8]| match class {
            Class::Entry => {
                let text = entry::rewrite(text, &self.rewriter, &titles);
                match self.generation().filter(|_| self.boots_root(&text)) {
                    Some(generation) => generation.boot(&text),
                    None => text,
                }
            }
            _ => self.rewriter.rewrite(text),
        };
        let places: BTreeMap<Role, PathBuf> =
            self.machine.booted.boot_places().into_iter().map(|(role, _, dir)| (role, dir.as_str().into())).collect();
        let mut wanted = BTreeMap::new();
        for (role, files) in source {
            let found = there.get(role).with_context(|| format!("{role}= was not read"))?;
            let mounted = places.get(role).context("a boot partition has no place")?;
            wanted.insert(role.clone(), wanted::wanted(files, mounted, found, rewrite)?);
        }
        let boots = |w: &Wanted| matches!(classify(&w.path), Class::Entry | Class::Uki);
        if !wanted.values().flatten().any(boots) {
            return Err(refused(format!(
                "the booted disk has no boot loader entry that could be copied, so {} would lose its own; install a kernel again, or \
                 'kernel-install add', and see 'bootctl list'",
                self.disk.name
            )));
        }
        // Older generations are offered where there is room for their kernels.
        let offered = self.with_offers(&wanted, there);
        let parts = boot_parts(&offered, there, known);
        let steps = order::plan(&parts)?;
        if self.shortfall(&parts, &steps)?.is_none() {
            return Ok((steps, offered));
        }
        let parts = boot_parts(&wanted, there, known);
        let mut steps = order::plan(&parts)?;
        if self.shortfall(&parts, &steps)?.is_some()
            && let Some(other) = order::plan_for_little_room(&parts)?
        {
            steps = other;
        }
        if let Some((role, short)) = self.shortfall(&parts, &steps)? {
            return Err(refused(format!(
                "{}: its {role}= partition is too small to hold old and new side by side, by {short} bytes; remove an old kernel, or make it larger",
                self.disk.name
            )));
        }
        Ok((steps, wanted))
    }

    /// What is wanted, and the entries for older generations. The modules of their kernels have to be theirs, and not on a /usr apart.
    fn with_offers(&self, wanted: &AllWanted, there: &BTreeMap<Role, BootFiles>) -> AllWanted {
        let mut all = wanted.clone();
        let can = offers::can_be_offered(self.machine.loader.as_deref()) && !self.disk.parts.contains_key(&Role::Usr);
        if let Some(generations) = self.generations.as_ref().filter(|_| can) {
            for (role, files) in &mut all {
                let offers = there.get(role).map(|found| offers::offers(found, files, &generations.kept));
                files.extend(offers.unwrap_or_default());
            }
        }
        all
    }

    /// The first boot partition that has not enough room for the steps, and how many bytes it lacks.
    fn shortfall(&self, parts: &[wanted::Part<'_>], steps: &[Step]) -> Result<Option<(Role, u64)>> {
        for part in parts {
            let (free, cluster) = self.held(&part.role)?.below()?.free()?;
            let short = room::shortfall(steps, &part.role, part.spare, free, cluster);
            if short > 0 {
                return Ok(Some((part.role.clone(), short)));
            }
        }
        Ok(None)
    }

    pub(crate) fn rewritten(&self, generation: Option<Generation>) -> Result<Vec<Rewritten>> {
        match self.machine.own_roots() {
            true => {
                let keep = |dir: &_| self.machine.is_apart(dir);
                let mut files = files::rewritten(&self.machine.root, &self.rewriter, generation, keep)?;
                files.extend(self.machine.drafts.iter().cloned());
                Ok(files)
            }
            false => Ok(Vec::new()),
        }
    }

    /// Whether an entry for the spare boots its root, and not something else that is there.
    fn boots_root(&self, entry: &[u8]) -> bool {
        entry.split(u8::is_ascii_whitespace).any(|word| word.starts_with(b"root=") && self.names_root(word))
    }

    /// Whether a text names the partition of the spare's root, in any form.
    fn names_root(&self, text: &[u8]) -> bool {
        self.root_names.as_ref().is_some_and(|names| !names.foreign(text).is_empty())
    }

    /// What is mounted is held, and can't become another's. If its identifier still leads to it, it was the right one all along.
    fn check_devices(&self, parts: &BTreeMap<Role, &Partition>) -> Result<()> {
        let now = Inventory::read()?;
        for (role, part) in parts {
            let partuuid = self.disk.parts.get(role).with_context(|| format!("there is no {role}="))?;
            let there = now.find(partuuid).map_err(|e| refused(format!("{e:#}")))?;
            if !there.is_some_and(|there| there.device().is_ok_and(|device| part.device().is_ok_and(|part| part == device))) {
                return Err(refused(format!("{} is not the partition {partuuid} any more; start the sync again", part.path)));
            }
        }
        Ok(())
    }

    /// What lies on a disk that no sync has written yet is somebody's: so are boot entries, but not a boot loader that was just installed.
    pub(crate) fn check_empty(&self, trees: &[Tree], there: &BTreeMap<Role, BootFiles>) -> Result<()> {
        if let Some((role, file)) = there.iter().find_map(|(role, files)| Some((role, first_to_boot(files)?))) {
            return Err(refused(format!(
                "{0} has no record of a sync, but its {role}= partition holds {file}, so what is on it may be newer than what was booted; \
                 make a new file system, or correct the configuration, or give it up by 'dualroot-sync --discard-spare {0}'",
                self.disk.name
            )));
        }
        for tree in trees {
            let held = self.held(&tree.role)?;
            if let Some(name) = first_content(held.below()?)? {
                return Err(refused(format!(
                    "{0} was never synced, but its {1}= partition is not empty (it has '{2}'), and a sync would remove what is there; make \
                     a new file system, or correct the configuration, or give it up by 'dualroot-sync --discard-spare {0}'",
                    self.disk.name,
                    tree.role,
                    name.escape_debug()
                )));
            }
        }
        Ok(())
    }

    /// What is used on the booted disk has to fit on the spare at all.
    pub(crate) fn check_space(&self, trees: &[Tree]) -> Result<()> {
        // Of a root with generations, what differs is counted before it is staged: the rest of it is there, and shared.
        for tree in trees.iter().filter(|tree| tree.role != Role::Root || self.generations.is_none()) {
            let size = |path: &Path| -> Result<(u64, u64)> {
                let s = nix::sys::statvfs::statvfs(path).with_context(|| path.display().to_string())?;
                Ok((s.fragment_size() * (s.blocks() - s.blocks_free()), s.fragment_size() * s.blocks()))
            };
            let (used, _) = size(&tree.source())?;
            let (_, holds) = size(self.held(&tree.role)?.place())?;
            if used > holds {
                return Err(refused(format!(
                    "{}: its {}= partition holds {holds} bytes, but {} has {used} bytes, {} too many",
                    self.disk.name,
                    tree.role,
                    tree.source().display(),
                    used - holds
                )));
            }
        }
        Ok(())
    }

    pub(crate) fn print(&self, trees: &[Tree], apart: &[Rewritten], steps: &[Step]) {
        if let Some(generations) = &self.generations {
            generations.changes().for_each(|change| println!("{} root: {change}", self.disk.name));
        }
        for tree in trees {
            // It changes nothing, and says what the copy would.
            let args: Vec<_> = tree.comparison().iter().map(|a| a.to_string_lossy().into_owned()).collect();
            println!("{} {}: rsync {}", self.disk.name, tree.role, args.join(" "));
        }
        for file in apart {
            println!("{} root: replace {} ({} bytes)", self.disk.name, file.path, file.bytes.len());
        }
        for step in steps {
            println!("{} {}: {}", self.disk.name, step.role, step.change);
        }
    }

    /// Says why the spare would not boot, from what was read of its boot partitions since they were last written.
    pub(crate) fn prove(&self, wanted: &AllWanted, found: &BTreeMap<Role, BootFiles>) -> Result<Vec<String>> {
        let parts: Vec<prove::Part<'_>> = found
            .iter()
            .filter_map(|(role, found)| Some(prove::Part { role: role.clone(), wanted: wanted.get(role)?, found }))
            .collect();
        let mut faults = prove::boot_partitions(&parts, &self.rewriter);
        let mut searched = Searched::load(&self.rewriter, self.disk.name)?;
        for part in &parts {
            faults.extend(images::boot_partition(self.held(&part.role)?.place(), part.found, &self.rewriter, &mut searched)?);
        }
        searched.save(self.disk.name)?;
        let root = match (self.machine.own_roots(), self.generation()) {
            (true, Some(generation)) => Some(self.held(&Role::Root)?.place().join(generation.subvolume())),
            (true, None) => Some(self.held(&Role::Root)?.place().to_owned()),
            (false, _) => None,
        };
        // A shared root has one fstab for every disk: what it says has to hold on each.
        let root = crate::base::root::Root::new(root.unwrap_or_else(|| "/".into()));
        let files = files::identifying_texts(&root, &self.machine.drafts)?;
        faults.extend(prove::root_files(&files, &self.rewriter, |dir| self.machine.is_apart(dir)));
        let fstab = files.get("/etc/fstab").map(Vec::as_slice).unwrap_or_default();
        faults.extend(waits::on_booted_disk_only(&self.machine.root, &self.machine.inventory, &self.machine.booted, fstab)?);
        if let Some(generation) = self.generation() {
            let top = self.held(&Role::Root)?.below()?;
            faults.extend(roots::prove(top, found, generation));
            let is_there = |path: &str| subvolume::is_subvolume(top, path);
            let beside = fstab::beside_the_root(fstab, |text| self.names_root(text), is_there);
            faults.extend(beside.into_iter().map(|line| {
                format!("/etc/fstab would have the boot wait for a subvolume that is not there: {line}; make it there, or give the line nofail")
            }));
        }
        Ok(faults)
    }
}

/// The boot partitions, for a plan.
fn boot_parts<'a>(wanted: &AllWanted, there: &'a BTreeMap<Role, BootFiles>, known: &'a Known) -> Vec<wanted::Part<'a>> {
    const NONE: &BTreeSet<String> = &BTreeSet::new();
    let part = |(role, spare): (&Role, &'a BootFiles)| wanted::Part {
        role: role.clone(),
        wanted: wanted.get(role).cloned().unwrap_or_default(),
        spare,
        known: known.of(role).unwrap_or(NONE),
    };
    there.iter().map(part).collect()
}

/// The first of the files in a boot partition that boots a system.
fn first_to_boot(files: &BootFiles) -> Option<&str> {
    [Class::Entry, Class::Uki].into_iter().flat_map(|class| files.of(class)).map(|file| file.path.as_str()).next()
}

/// The first name on a file system that isn't a new one's: anything but empty directories, such as mount points.
fn first_content(below: &Below) -> Result<Option<String>> {
    for (name, kind) in below.list(".")? {
        if name != "lost+found" && (kind != Kind::Dir || !below.list(&name)?.is_empty()) {
            return Ok(Some(name));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn f07_a_boot_loader_alone_is_nobodys_system() {
        let tmp = tempfile::tempdir().unwrap();
        let files = |paths: &[&str]| {
            for path in paths {
                let path = tmp.path().join(path);
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(path, "").unwrap();
            }
            BootFiles::scan(&Below::open(tmp.path()).unwrap()).unwrap()
        };
        let installed =
            files(&["EFI/systemd/systemd-bootx64.efi", "EFI/BOOT/BOOTX64.EFI", "loader/loader.conf", "loader/random-seed"]);
        assert_eq!(first_to_boot(&installed), None);
        assert_eq!(first_to_boot(&files(&["EFI/Linux/linux.efi"])), Some("EFI/Linux/linux.efi"));
        assert_eq!(first_to_boot(&files(&["loader/entries/a.conf"])), Some("loader/entries/a.conf"));
    }

    #[test]
    fn f01_only_a_new_file_system_is_empty() {
        let tmp = tempfile::tempdir().unwrap();
        let below = Below::open(tmp.path()).unwrap();
        for dir in ["lost+found", "lost+found/x", "boot", "efi"] {
            fs::create_dir(tmp.path().join(dir)).unwrap();
        }
        assert_eq!(first_content(&below).unwrap(), None);
        fs::create_dir_all(tmp.path().join("photos/2025")).unwrap();
        assert_eq!(first_content(&below).unwrap().as_deref(), Some("photos"));
        fs::remove_dir_all(tmp.path().join("photos")).unwrap();
        fs::write(tmp.path().join("letter"), "").unwrap();
        assert_eq!(first_content(&below).unwrap().as_deref(), Some("letter"));
    }
}
