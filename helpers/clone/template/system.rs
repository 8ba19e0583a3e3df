//! The file systems of a new disk, and the copy of a template on them, which becomes the system of a machine of its own.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::base::root::Root;
use crate::base::types::Role;
use crate::boot::entry::Titles;
use crate::boot::files::{BootFiles, Class};
use crate::boot::wanted::Wanted;
use crate::boot::{bootable, offers, order, room, roots, wanted};
use crate::clone::plan::Plan;
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

/// Where the new disk is mounted, in a namespace of one's own.
const PLACES: &str = "/run/dualroot/new";
pub(super) const FSTAB: &str = "/etc/fstab";
pub(super) const CRYPTTAB: &str = "/etc/crypttab";
const HOSTS: &str = "/etc/hosts";

/// What the new disk is known by.
pub(super) struct Names {
    /// Replaces what names the template's disks, and its machine.
    pub(super) rewriter: Rewriter,
    /// Finds what names the new root.
    pub(super) root: Rewriter,
    /// Finds what names any part of the new disk.
    pub(super) own: Rewriter,
    pub(super) machine_id: String,
}

/// The new disk's file systems, mounted where nobody else sees them.
pub(super) struct New {
    pub(super) held: BTreeMap<Role, Held>,
    /// Where the top directory of the new system is.
    pub(super) top: PathBuf,
    pub(super) below: Below,
    /// The one that its root is, where that is btrfs, as on every spare.
    pub(super) generation: Option<Generation>,
    pub(super) names: Names,
}

impl New {
    /// Mounts what was made.
    pub(super) fn mount(parts: &BTreeMap<Role, &Partition>, names: Names) -> Result<Self> {
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
    pub(super) fn root(&self) -> &Below {
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

    /// What a file holds that may be a link, which leads elsewhere and stays as it is: then nothing.
    fn read_file(&self, path: &str) -> Result<Option<Vec<u8>>> {
        if self.is_file(path)? { self.read(path) } else { Ok(None) }
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
    pub(super) fn make_own(&self, about: &About, plan: &Plan, name: &HostName) -> Result<()> {
        if let Some(fault) = links(&self.files())? {
            bail!("{fault}");
        }
        if let Some(fstab) = self.read_file(FSTAB)? {
            self.write_other(FSTAB, &fstab, needed::of_one_disk(&fstab, &about.ids, about.disk.name)?)?;
        }
        for file in files::rewritten(&self.files(), &self.names.rewriter, self.generation, |_| false)? {
            self.write(&file.path, file.bytes)?;
        }
        let fstab = self.read_file(FSTAB)?.unwrap_or_default();
        self.write_other(FSTAB, &fstab, identity::with_lines(&fstab, &super::lines(about, plan)?))?;
        if let (Some(was), Some(hosts)) = (&about.host_name, self.read_file(HOSTS)?) {
            self.write_other(HOSTS, &hosts, identity::renamed(&hosts, was, name))?;
        }
        for path in identity::NAMING {
            let old = self.read_file(path)?.unwrap_or_default();
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

    /// Flushes everything.
    pub(super) fn barrier(&self) -> Result<()> {
        self.held.values().try_for_each(|held| held.below()?.apply(&Change::Barrier))
    }

    /// What is on the boot partitions.
    fn boot_files(&self) -> Result<BTreeMap<Role, BootFiles>> {
        let boot = self.held.iter().filter(|(role, _)| role.is_boot());
        boot.map(|(role, held)| Ok((role.clone(), BootFiles::scan(held.below()?).with_context(|| role.to_string())?))).collect()
    }

    /// Whether an entry boots the new root; None where it doesn't say what it boots.
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

    /// What the copied tree has for a boot partition. By a link, that would be this machine's.
    pub(super) fn copied_boot_files(&self, place: &str) -> Result<BootFiles> {
        let (below, path) = self.at(place)?;
        let dir = below.sub(path.as_ref()).and_then(|dir| dir.context("it is no directory"));
        let found = dir.and_then(|dir| BootFiles::scan(&dir));
        found.with_context(|| format!("{place} of the template, which has to be a directory and no link"))
    }

    /// Fills the boot partitions with what the copied tree has for them, in the order of [`order`]; returns what is to be there.
    pub(super) fn write_boot_files(&self, places: &[(Role, &str)]) -> Result<BTreeMap<Role, Vec<Wanted>>> {
        let mut source = BTreeMap::new();
        for (role, place) in places {
            source.insert(role, (self.copied_boot_files(place)?, self.files().path(place)));
        }
        // Older generations, and what only they need, stay behind.
        if let Some(newest) = source.values().flat_map(|(files, _)| roots::booted(files)).max() {
            source.values_mut().for_each(|(files, _)| offers::keep_own(files, &newest.subvolume()));
        }
        let there = self.boot_files()?;
        let mut parts = Vec::new();
        let known = [].into();
        for (role, (files, dir)) in source {
            let spare = there.get(role).with_context(|| format!("{role}= was not read"))?;
            let mut wanted = wanted::wanted(&files, &dir, spare, |class, text| self.rewrite(class, text))?;
            for file in &mut wanted {
                let path = String::from_utf8(self.names.rewriter.rewrite(file.path.as_bytes()));
                file.path = path.with_context(|| file.path.clone())?;
            }
            parts.push(wanted::Part { role: role.clone(), wanted, spare, known: &known });
        }
        let steps = order::plan(&parts)?;
        for part in &parts {
            let (free, cluster) = self.below_of(&part.role)?.free()?;
            match room::shortfall(&steps, &part.role, part.spare, free, cluster) {
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
    pub(super) fn prove(&self, wanted: &BTreeMap<Role, Vec<Wanted>>) -> Result<Vec<String>> {
        let found = self.boot_files()?;
        let rewriter = &self.names.rewriter;
        let part = |(role, found)| Some(prove::Part { role: Role::clone(role), wanted: wanted.get(role)?, found });
        let parts: Vec<prove::Part<'_>> = found.iter().filter_map(part).collect();
        let mut faults = prove::boot_partitions(&parts, rewriter);
        let mut searched = Searched::new(rewriter)?;
        for part in &parts {
            let place = self.held.get(&part.role).context("a boot partition has gone")?.place();
            faults.extend(images::boot_partition(place, part.found, rewriter, &mut searched)?);
            faults.extend(misnamed(part.found, rewriter).map(|path| format!("{}: {path} bears the template's name", part.role)));
        }
        let texts: Vec<&[u8]> = parts.iter().flat_map(|p| p.found.of(Class::Entry)).filter_map(|f| f.text.as_deref()).collect();
        if self.boots_another(&texts) {
            faults.push(
                "no entry boots the root that was made: root= names something that the template's identifiers.json doesn't know"
                    .to_owned(),
            );
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
        faults.extend(needed::absent(text(FSTAB), text(CRYPTTAB), &self.names.own));
        if let Some(current) = self.generation {
            let top = self.below_of(&Role::Root)?;
            faults.extend(generation::prove(top, &roots::booted_roots(&found), current));
            let is_there = |path: &str| subvolume::is_subvolume(top, path);
            let beside = fstab::beside_the_root(text(FSTAB), |text| !self.names.root.foreign(text).is_empty(), is_there);
            faults.extend(
                beside
                    .into_iter()
                    .map(|line| format!("{FSTAB} would have the boot wait for a subvolume that is not there: {line}")),
            );
        }
        Ok(faults)
    }

    /// Leaves an empty directory to mount something on.
    pub(super) fn empty(&self, place: &str) -> Result<()> {
        let (below, path) = self.at(place)?;
        for name in below.names(path.as_ref())? {
            below.clear(&below::join(path.as_ref(), &name))?;
        }
        Ok(())
    }

    /// Flushes everything, and lets go of it.
    pub(super) fn release(self) -> Result<()> {
        drop(self.below);
        // What is mounted in others comes before these.
        self.held.into_values().rev().try_for_each(Held::release)
    }
}

/// Links in the place of files that are written, as a fault.
pub(super) fn links(root: &Root) -> Result<Option<String>> {
    let found = files::links(root, &[identity::MACHINE_ID, HOST_NAME])?;
    let list = || {
        format!(
            "{} of the template: a file that differs by machine can't be a symbolic link; make it a file there",
            found.join(", ")
        )
    };
    Ok((!found.is_empty()).then(list))
}

/// Files and directories that are called after what names the template.
pub(super) fn misnamed<'f>(found: &'f BootFiles, rewriter: &Rewriter) -> impl Iterator<Item = &'f String> {
    let paths = found.files.values().map(|file| &file.path).chain(&found.dirs);
    paths.filter(|path| !rewriter.foreign(path.as_bytes()).is_empty())
}
