//! The file systems of a new disk, with the copy of a template that becomes a machine of its own.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::base::fault::{Code, Fault};
use crate::base::root::Root;
use crate::base::types::Role;
use crate::boot::entry::Titles;
use crate::boot::files::{BootFiles, Class};
use crate::boot::wanted::WantedFile;
use crate::boot::{bootable, older, order, room, roots, wanted};
use crate::clone::plan::DiskPlan;
use crate::clone::template::identity::{self, HOST_NAME, HostName};
use crate::clone::template::needed;
use crate::clone::template::origin::About;
use crate::copy::generation::{self, Base};
use crate::devices::held::Held;
use crate::devices::inventory::Partition;
use crate::devices::subvolume;
use crate::names::files::Rewritten;
use crate::names::generation::Generation;
use crate::names::ident::Rewriter;
use crate::names::{files, fstab};
use crate::proof::searched::Searched;
use crate::proof::{images, prove};
use crate::write::below::{self, Below, is_link};
use crate::write::change::Change;

/// The mount points for the new disk, in a private mount namespace.
const PLACES: &str = "/run/dualroot/new";
pub(super) const FSTAB: &str = "/etc/fstab";
pub(super) const CRYPTTAB: &str = "/etc/crypttab";
const HOSTS: &str = "/etc/hosts";

/// The names of the new disk and machine.
pub(super) struct Names {
    /// Rewrites the names of the template's disks and machine into these.
    pub(super) rewriter: Rewriter,
    /// Finds the names of the new root.
    pub(super) root: Rewriter,
    /// Finds the names of any partition of the new disk.
    pub(super) own: Rewriter,
    pub(super) machine_id: String,
}

/// The new disk's file systems, mounted where no other process sees them.
pub(super) struct NewSystem {
    pub(super) held: BTreeMap<Role, Held>,
    /// The top directory of the new system.
    pub(super) top: PathBuf,
    pub(super) below: Below,
    /// The generation that is its root, where that is btrfs, as on every spare.
    pub(super) generation: Option<Generation>,
    pub(super) names: Names,
}

impl NewSystem {
    /// Mounts the new file systems.
    pub(super) fn mount(parts: &BTreeMap<Role, &Partition>, names: Names) -> Result<Self> {
        let of = |role: &Role| parts.get(role).copied().with_context(|| format!("the new disk has no {role}="));
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
        // A mount point inside another tree comes after that tree.
        let mut trees: Vec<(&Role, &str)> = parts.keys().filter_map(|role| Some((role, role.tree()?))).collect();
        trees.sort_by_key(|(_, at)| at.len());
        for (role, at) in trees.into_iter().filter(|(_, at)| !at.is_empty()) {
            let (below, path) = new.locate(at)?;
            below.apply(&Change::MakeDir(path.to_owned()))?;
            let mut one = Held::open(of(role)?, &new.files().path(at))?;
            one.make_writable()?;
            new.held.insert(role.clone(), one);
        }
        Ok(new)
    }

    /// The handle of the root.
    pub(super) fn root(&self) -> &Below {
        &self.below
    }

    /// The new system's files.
    fn files(&self) -> Root {
        Root::new(&self.top)
    }

    /// The handle of the file system that holds a path of the new system, and the path there.
    fn locate<'p>(&self, path: &'p str) -> Result<(&Below, &'p str)> {
        let trees = self.held.iter().filter_map(|(role, held)| Some((role.tree().filter(|at| !at.is_empty())?, held)));
        let inner = |at: &str| path.strip_prefix(at)?.strip_prefix('/');
        match trees.filter_map(|(at, held)| Some((inner(at)?, held))).min_by_key(|(inner, _)| inner.len()) {
            Some((inner, held)) => Ok((held.below()?, inner)),
            None => Ok((&self.below, path.trim_start_matches('/'))),
        }
    }

    fn read(&self, path: &str) -> Result<Option<Vec<u8>>> {
        let (below, path) = self.locate(path)?;
        below.read(path)
    }

    /// A file's content; None for a link, which is not followed.
    fn read_file(&self, path: &str) -> Result<Option<Vec<u8>>> {
        if self.is_file(path)? { self.read(path) } else { Ok(None) }
    }

    fn is_file(&self, path: &str) -> Result<bool> {
        let (below, path) = self.locate(path)?;
        Ok(below.stat(path.as_ref())?.is_some_and(|stat| !is_link(&stat)))
    }

    fn write(&self, path: &str, bytes: Vec<u8>) -> Result<()> {
        let file = Rewritten { path: path.to_owned(), bytes };
        let (below, inner) = self.locate(path)?;
        let dir = path.strip_suffix(inner).unwrap_or_default();
        below.apply(&file.change(dir, &self.files()))
    }

    /// Gives the copied tree the identity of the new machine and disk.
    pub(super) fn personalise(&self, about: &About, plan: &DiskPlan, name: &HostName) -> Result<()> {
        if let Some(fault) = links(&self.files())? {
            bail!("{fault}");
        }
        if let Some(fstab) = self.read_file(FSTAB)? {
            self.write_changed(FSTAB, &fstab, needed::without_other_disks(&fstab, &about.ids, about.disk.name)?)?;
        }
        for file in files::rewritten(&self.files(), &self.names.rewriter, self.generation, |_| false)? {
            self.write(&file.path, file.bytes)?;
        }
        let fstab = self.read_file(FSTAB)?.unwrap_or_default();
        self.write_changed(FSTAB, &fstab, identity::add_lines(&fstab, &super::fstab_entries(about, plan)?))?;
        if let (Some(was), Some(hosts)) = (&about.host_name, self.read_file(HOSTS)?) {
            self.write_changed(HOSTS, &hosts, identity::rename_host(&hosts, was, name))?;
        }
        for path in identity::NAMING {
            let old = self.read_file(path)?.unwrap_or_default();
            self.write_changed(path, &old, self.names.rewriter.rewrite(&old))?;
        }
        self.write(HOST_NAME, format!("{name}\n").into_bytes())?;
        let id = format!("{}\n", self.names.machine_id).into_bytes();
        if self.is_file(identity::DBUS_MACHINE_ID)? {
            self.write(identity::DBUS_MACHINE_ID, id.clone())?;
        }
        self.write(identity::MACHINE_ID, id)
    }

    /// Writes a file, if its content changes.
    fn write_changed(&self, path: &str, old: &[u8], new: Vec<u8>) -> Result<()> {
        if new == old { Ok(()) } else { self.write(path, new) }
    }

    /// Flushes everything.
    pub(super) fn barrier(&self) -> Result<()> {
        self.held.values().try_for_each(|held| held.below()?.apply(&Change::Barrier))
    }

    /// The files on the boot partitions.
    fn boot_files(&self) -> Result<BTreeMap<Role, BootFiles>> {
        let boot = self.held.iter().filter(|(role, _)| role.is_boot());
        boot.map(|(role, held)| Ok((role.clone(), BootFiles::scan(held.below()?).with_context(|| role.to_string())?))).collect()
    }

    /// Whether an entry boots the new root; None where it has no root=.
    pub(super) fn boots_root(&self, entry: &[u8]) -> Option<bool> {
        let mut roots = entry.split(u8::is_ascii_whitespace).filter(|word| word.starts_with(b"root=")).peekable();
        roots.peek()?;
        Some(roots.any(|word| !self.names.root.foreign(word).is_empty()))
    }

    /// Whether entries say what they boot, and none that it is the new root. One of another system, or of a tool, may be among them.
    pub(super) fn boots_another(&self, entries: &[&[u8]]) -> bool {
        let said: Vec<bool> = entries.iter().filter_map(|text| self.boots_root(text)).collect();
        !said.is_empty() && !said.contains(&true)
    }

    pub(super) fn rewrite(&self, class: Class, text: &[u8]) -> Vec<u8> {
        if class != Class::Entry {
            return self.names.rewriter.rewrite(text);
        }
        let boots_root = |text: &[u8]| self.boots_root(text) == Some(true);
        bootable::retarget(text, &self.names.rewriter, &Titles::default(), self.generation, boots_root)
    }

    /// The copied tree's files for a boot partition. A link would lead to this machine's files.
    pub(super) fn copied_boot_files(&self, place: &str) -> Result<BootFiles> {
        let (below, path) = self.locate(place)?;
        let dir = below.sub(path.as_ref()).and_then(|dir| dir.context("it is no directory"));
        let found = dir.and_then(|dir| BootFiles::scan(&dir));
        found.with_context(|| format!("{place} of the template, which has to be a directory, not a link"))
    }

    /// Writes the copied tree's boot files to the boot partitions, in the order of [`order`]; returns the wanted files.
    pub(super) fn write_boot_files(&self, places: &[(Role, &str)]) -> Result<BTreeMap<Role, Vec<WantedFile>>> {
        let mut source = BTreeMap::new();
        for (role, place) in places {
            source.insert(role, (self.copied_boot_files(place)?, self.files().path(place)));
        }
        // Entries of older generations, and files that only they need, are not written.
        if let Some(newest) = source.values().flat_map(|(files, _)| roots::booted_generations(files)).max() {
            source.values_mut().for_each(|(files, _)| older::keep_own(files, &newest.subvolume()));
        }
        let there = self.boot_files()?;
        let mut parts = Vec::new();
        let known = [].into();
        for (role, (files, dir)) in source {
            let spare = there.get(role).with_context(|| format!("{role}= was not read"))?;
            let mut wanted = wanted::wanted_files(&files, &dir, spare, |class, text| self.rewrite(class, text))?;
            for file in &mut wanted {
                let path = String::from_utf8(self.names.rewriter.rewrite(file.path.as_bytes()));
                file.path = path.with_context(|| file.path.clone())?;
            }
            parts.push(wanted::BootPartition { role: role.clone(), wanted, spare, known: &known });
        }
        let steps = order::plan(&parts)?;
        for part in &parts {
            let (free, cluster) = self.below_of(&part.role)?.free()?;
            match room::shortfall(&steps, &part.role, part.spare, free, cluster) {
                0 => {}
                short => bail!("{}= is too small by {short} bytes; give a layout with a larger one (--layout)", part.role),
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

    /// Reads the new disk again, and says why it would not boot as the new machine.
    pub(super) fn prove(&self, wanted: &BTreeMap<Role, Vec<WantedFile>>) -> Result<Vec<Fault>> {
        let found = self.boot_files()?;
        let rewriter = &self.names.rewriter;
        let part = |(role, found)| Some(prove::Part { role: Role::clone(role), wanted: wanted.get(role)?, found });
        let parts: Vec<prove::Part<'_>> = found.iter().filter_map(part).collect();
        let mut faults = prove::boot_partitions(&parts, rewriter);
        let mut searched = Searched::new(rewriter)?;
        for part in &parts {
            let place = self.held.get(&part.role).context("a boot partition is gone")?.place();
            let fault = |path: &String| Fault::new(Code::F15, format!("{}: {path} has the template's name", part.role)).at(path);
            let found = images::boot_partition(place, part.found, rewriter, &mut searched)?.into_iter();
            faults.extend(found.chain(misnamed(part.found, rewriter).map(fault)).map(|fault| fault.on(&part.role)));
        }
        let texts: Vec<&[u8]> = parts.iter().flat_map(|p| p.found.of(Class::Entry)).filter_map(|f| f.text.as_deref()).collect();
        if self.boots_another(&texts) {
            faults.push(Fault::new(
                Code::F15,
                "no entry boots the new root: root= names a device that the template's identifiers.json does not have",
            ));
        }
        let mut files = BTreeMap::new();
        let paths = files::identifying_files(&self.files())?;
        for path in paths.into_iter().chain(identity::NAMING.map(str::to_owned)) {
            if let Some(bytes) = self.read_file(&path)? {
                files.insert(path, bytes);
            }
        }
        faults.extend(prove::root_files(&files, rewriter, |_| false));
        let text = |path: &str| files.get(path).map(Vec::as_slice).unwrap_or_default();
        faults.extend(needed::missing_devices(text(FSTAB), text(CRYPTTAB), &self.names.own));
        if let Some(current) = self.generation {
            let top = self.below_of(&Role::Root)?;
            faults.extend(generation::prove(top, &roots::booted_roots(&found), current));
            let is_there = |path: &str| subvolume::is_subvolume(top, path);
            let beside = fstab::missing_subvolumes(text(FSTAB), |text| !self.names.root.foreign(text).is_empty(), is_there);
            faults.extend(beside.into_iter().map(|line| {
                Fault::new(Code::F14, format!("{FSTAB} would make the boot wait for a subvolume that does not exist: {line}"))
                    .on(&Role::Root)
                    .at(FSTAB)
            }));
        }
        Ok(faults)
    }

    /// Empties a directory, which becomes a mount point.
    pub(super) fn empty_dir(&self, place: &str) -> Result<()> {
        let (below, path) = self.locate(place)?;
        for name in below.names(path.as_ref())? {
            below.clear(&below::join(path.as_ref(), &name))?;
        }
        Ok(())
    }

    /// Flushes and unmounts everything.
    pub(super) fn release(self) -> Result<()> {
        drop(self.below);
        // Mounts inside other mounts come first.
        self.held.into_values().rev().try_for_each(Held::release)
    }
}

/// A fault that names links in the place of files that have to be written.
pub(super) fn links(root: &Root) -> Result<Option<String>> {
    let found = files::symlinks(root, &[identity::MACHINE_ID, HOST_NAME])?;
    let list = || {
        format!(
            "{} of the template: symbolic links, but these files differ from machine to machine; make them regular files in the template",
            found.join(", ")
        )
    };
    Ok((!found.is_empty()).then(list))
}

/// The files and directories whose names contain a name of the template.
pub(super) fn misnamed<'f>(found: &'f BootFiles, rewriter: &Rewriter) -> impl Iterator<Item = &'f String> {
    let paths = found.files.values().map(|file| &file.path).chain(&found.dirs);
    paths.filter(|path| !rewriter.foreign(path.as_bytes()).is_empty())
}
