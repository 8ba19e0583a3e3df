//! A blank disk becomes the first one of another machine: a tree that rsync(1) has made of a system is copied to it, and gets a name and
//! identifiers of its own. The machine that does it isn't changed, and what it boots from makes no difference.
//!
//! What is made of the tree is what a sync makes of the booted disk, by the same code: boot files in the same order, with everything that
//! names a disk of the template rewritten, and in the end the proof.

pub mod identity;
mod needed;
pub mod origin;
mod system;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};

use crate::base::clock::kernel_id;
use crate::base::log::Log;
use crate::base::progress::Progress;
use crate::base::refusal::refused;
use crate::base::root::Root;
use crate::base::types::{DiskName, PartUuid, Role};
use crate::clone::check::{check_programs, look_into};
use crate::clone::disk::NewDisk;
use crate::clone::plan::{Plan, mib};
use crate::clone::source::{self, Source};
use crate::clone::target::Target;
use crate::clone::template::identity::HostName;
use crate::clone::template::origin::{About, Listing, Origin};
use crate::clone::template::system::{Names, New};
use crate::conf::Config;
use crate::copy::rules::{self, OldModules};
use crate::devices::held;
use crate::devices::inventory::{Inventory, Partition};
use crate::names::ident::Rewriter;
use crate::names::ids::{DiskIds, PartIds};
use crate::proof::prove;
use crate::write::below::{Below, is_link};

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
    /// The bytes in all files that are.
    bytes: u64,
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
        let rules = rules::all("", &identity::left_out(about.machine_id), &[], OldModules::Stay);
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
        check_files(&origin, &about, &plan, &places)?;
        let bytes = listing.content;
        let job = Self { disk: NewDisk { target, plan }, origin, about, rules, bytes, left_out: source.left_out };
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
        held::enter_private_namespace()?;
        let inventory = Inventory::read()?;
        let parts = self.disk.parts(&inventory)?;
        let new = New::mount(&parts, self.names(&parts, root)?)?;
        log.status(&format!("{}: copying {}", self.disk.target.path(), self.origin));
        self.origin.copy(&self.rules, Progress::begin(|| self.bytes), new.root())?;
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
        let names = needed::finder(&self.old_ids()?)?;
        for (_, place) in places {
            let place = Root::new(dir).path(place);
            if let (_, Some(fault)) = look_into(&place, &names)? {
                return Err(refused(format!("{}/{fault}; nothing was done", place.display())));
            }
        }
        Ok(())
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
        // What is rewritten goes from one disk to another.
        let taken: Vec<DiskName> = self.about.ids.iter().map(|disk| disk.name).collect();
        let name = DiskName::free(&taken)?;
        let mut own = DiskIds { name, parts: parts.iter().map(of).collect::<Result<_>>()? };
        let alone = |ids: &PartIds| DiskIds { name, parts: [(Role::Root, ids.clone())].into() };
        let its_root = own.parts.get(&Role::Root).map(alone).context("there is no root")?;
        let old = self.old_ids()?;
        let root_names = needed::finder(&[its_root])?;
        let own_names = needed::finder(std::slice::from_ref(&own))?;
        let machine_id = kernel_id(root, "uuid")?;
        identity::add_machine_id(&mut own, machine_id)?;
        let machine_id = machine_id.simple().to_string();
        let rewriter = Rewriter::new(&own, &old).map_err(|e| refused(format!("{e:#}")))?;
        Ok(Names { rewriter, root: root_names, own: own_names, machine_id })
    }
}

/// What the new machine would wait for in vain, or what can't be written or followed, is looked for while nothing is erased yet, where that
/// can be read without copying it.
fn check_files(origin: &Origin, about: &About, plan: &Plan, places: &[(Role, &str)]) -> Result<()> {
    let Origin::Here(dir) = origin else { return Ok(()) };
    let root = Root::new(dir);
    if let Some(fault) = system::links(&root)? {
        return Err(refused(format!("{fault}; nothing was done")));
    }
    if let Some(fault) = prove::named_unit(&root, &needed::finder(&about.ids)?)? {
        return Err(refused(format!("the template's {fault}; nothing was done")));
    }
    let top = Below::open(dir)?;
    for (_, place) in places {
        if top.stat(place.trim_start_matches('/').as_ref())?.is_some_and(|stat| is_link(&stat)) {
            return Err(refused(format!(
                "{} is a symbolic link; copy what is mounted there to a directory of that name; nothing was done",
                root.path(place).display()
            )));
        }
    }
    let read =
        |path: &str| root.read_opt(path).map(Option::unwrap_or_default).with_context(|| format!("{}{path}", dir.display()));
    let fstab = needed::of_one_disk(&read(system::FSTAB)?, &about.ids, about.disk.name)?;
    // What names a part that is made will name that.
    let mut made = about.ids.clone();
    made.iter_mut().for_each(|disk| disk.parts.retain(|role, _| plan.parts.iter().any(|part| part.role == *role)));
    let faults = needed::absent(&fstab, &read(system::CRYPTTAB)?, &needed::finder(&made)?);
    match faults.is_empty() {
        true => Ok(()),
        false => Err(refused(format!("{}; nothing was done", faults.join("; ")))),
    }
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
    for disk in &about.ids {
        // Whatever the layout says: what the key of that machine opens isn't copied to a plain partition.
        if let Some((role, _)) = disk.parts.iter().find(|(_, part)| part.container.is_some()) {
            return Err(refused(format!(
                "{role}= of the template's {} lay in a LUKS container, which is not made from a template; nothing was done",
                disk.name
            )));
        }
    }
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

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use uuid::Uuid;

    use super::*;
    use crate::base::refusal::Refused;
    use crate::boot::files::{BootFile, BootFiles, Class};
    use crate::clone::plan::MIB;
    use crate::clone::template::system::misnamed;
    use crate::devices::gpt::{DiskLayout, PartLayout};
    use crate::names::ids::ContainerIds;

    const OLD: &str = "aaaaaaaa-0000-4000-8000-00000000000";
    const NEW: &str = "bbbbbbbb-0000-4000-8000-00000000000";
    const SPARE: &str = "cccccccc-0000-4000-8000-00000000000";
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
        Names {
            rewriter: Rewriter::new(&own, std::slice::from_ref(&old)).unwrap(),
            root: needed::finder(&[root]).unwrap(),
            own: needed::finder(&[own]).unwrap(),
            machine_id: Uuid::from_u128(0x1234).simple().to_string(),
        }
    }

    fn listing(bytes: &[(&'static str, u64)]) -> Listing<'static> {
        Listing { bytes: bytes.iter().map(|(at, mebibytes)| (*at, mebibytes * MIB)).collect(), boots: vec!["/boot"], content: 0 }
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
        // Another layout doesn't change what it was.
        let mut encrypted = about(&["esp", "root"]);
        let root = encrypted.ids[0].parts.get_mut(&Role::Root).unwrap();
        root.container = Some(ContainerIds { uuid: None, label: None });
        assert!(refusal(&encrypted, &[]).contains("root= of the template's disk0 lay in a LUKS container"));
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
            (
                "/etc/fstab",
                &format!(
                    "PARTUUID={} / ext4\nPARTUUID={} /home ext4\nPARTUUID={SPARE}1 none swap\nLABEL=x /mnt/root1 ext4 noauto\n",
                    id(OLD, "root"),
                    id(OLD, "home")
                ),
            ),
        ]);
        let name = HostName::parse("other").unwrap();
        let mut about = about(&roles);
        about.ids.push(ids("disk1", SPARE, 0xd0a1, &roles));
        about.ids[1].parts.retain(|role, _| matches!(role, Role::Esp | Role::Root));
        new.make_own(&about, &plan, &name).unwrap();
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
        new.make_own(&about, &plan, &name).unwrap();
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
        let (tool, old, new_one) = (&b"efi /memtest.efi\n"[..], old.as_bytes(), &text[..]);
        for (entries, expected) in
            [(&[tool, old][..], true), (&[old], true), (&[tool, old, new_one], false), (&[tool], false), (&[], false)]
        {
            assert_eq!(new.boots_another(entries), expected);
        }
        let mut found = BootFiles::default();
        let mut add = |path: &str| found.add(BootFile { path: path.to_owned(), size: 0, hash: blake3::hash(b""), text: None });
        add("linux").unwrap();
        add(&format!("loader/entries/{}-6.1.conf", Uuid::from_u128(0xd0a1).simple())).unwrap();
        add(&format!("{}/linux", Uuid::from_u128(0x1234).simple())).unwrap();
        let misnamed: Vec<&String> = misnamed(&found, &new.names.rewriter).collect();
        assert!(matches!(&misnamed[..], [path] if path.ends_with("-6.1.conf")), "{misnamed:?}");
    }

    #[test]
    fn what_cannot_be_mended_later_is_refused_before_the_disk_is_erased() {
        let (tmp, _) = copied(&[("/etc/fstab", &format!("PARTUUID={} / ext4\n", id(OLD, "root"))), ("/boot/x", "")]);
        let (origin, about) = (Origin::Here(tmp.path().to_owned()), about(&["esp", "root"]));
        let places = boot_places(&about).unwrap();
        let source = source(&about, &places, &listing(&[])).unwrap();
        let disk0 = DiskName::parse("disk0").unwrap();
        let plan = Plan::make(&source, disk0, (2000 * MIB, 512), [].into(), || Ok(Uuid::from_u128(1))).unwrap();
        let check = || check_files(&origin, &about, &plan, &places);
        check().unwrap();
        let refusal = || {
            let error = check().unwrap_err();
            assert!(error.is::<Refused>(), "{error:#}");
            error.to_string()
        };
        // There is such a partition there, but it isn't made.
        fs::write(tmp.path().join("etc/fstab"), format!("PARTUUID={} /home ext4\n", id(OLD, "home"))).unwrap();
        assert!(refusal().contains("line 1 (/home) needs PARTUUID="));
        fs::remove_file(tmp.path().join("etc/fstab")).unwrap();
        symlink("../x", tmp.path().join("etc/fstab")).unwrap();
        assert!(refusal().contains("/etc/fstab -> ../x of the template"));
        fs::remove_file(tmp.path().join("etc/fstab")).unwrap();
        let units = tmp.path().join("etc/systemd/system");
        let swap = format!("dev-disk-by\\x2dpartuuid-{}.swap", id(OLD, "root").to_string().replace('-', "\\x2d"));
        fs::create_dir_all(&units).unwrap();
        fs::write(units.join(&swap), "").unwrap();
        assert!(refusal().starts_with("the template's /etc/systemd/system/dev-disk"));
        fs::remove_file(units.join(&swap)).unwrap();
        fs::rename(tmp.path().join("boot"), tmp.path().join("x")).unwrap();
        symlink("/x", tmp.path().join("boot")).unwrap();
        assert!(refusal().contains("/boot is a symbolic link"));
    }

    #[test]
    fn links_stay_or_are_faults() {
        let (tmp, new) = copied(&[("/etc/os-release", ""), ("/usr/x", "pair"), ("/boot/vmlinuz", "")]);
        let link = |to: &str, at: &str| symlink(to, tmp.path().join(at)).unwrap();
        link("../usr/x", "etc/hosts");
        link("/usr/x", "etc/machine-info");
        let roles = ["esp", "root"];
        let (about, name) = (about(&roles), HostName::parse("other").unwrap());
        let source = source(&about, &[(Role::Esp, "/boot")], &listing(&[])).unwrap();
        let disk0 = DiskName::parse("disk0").unwrap();
        let plan = Plan::make(&source, disk0, (2000 * MIB, 512), [].into(), || Ok(Uuid::from_u128(1))).unwrap();
        new.make_own(&about, &plan, &name).unwrap();
        assert!(tmp.path().join("etc/hosts").is_symlink() && tmp.path().join("etc/machine-info").is_symlink());
        assert_eq!(fs::read(tmp.path().join("usr/x")).unwrap(), b"pair");
        link("../usr/x", "etc/crypttab");
        let error = new.make_own(&about, &plan, &name).unwrap_err().to_string();
        assert!(error.contains("/etc/crypttab -> ../usr/x of the template"), "{error}");
        assert!(new.copied_boot_files("/boot").unwrap().files.contains_key("vmlinuz"));
        link(tmp.path().join("boot").to_str().unwrap(), "efi");
        for place in ["/efi", "/none"] {
            let error = new.copied_boot_files(place).unwrap_err();
            assert!(format!("{error:#}").contains("has to be a directory and no link"), "{error:#}");
        }
    }

    #[test]
    fn a_machine_that_would_wait_in_vain_is_found_in_the_end() {
        let fstab = format!("PARTUUID={} / ext4\nUUID=gone /data ext4\nUUID=gone /more ext4 nofail\n", id(NEW, "root"));
        let (_tmp, new) = copied(&[("/etc/fstab", &fstab), ("/etc/crypttab", "x /dev/sdz1\n"), ("/usr/x", "")]);
        let faults = new.prove(&[].into()).unwrap();
        let waits: Vec<&String> = faults.iter().filter(|fault| fault.contains("the boot wait for")).collect();
        assert!(
            matches!(&waits[..], [one, other] if one.contains("line 1 (x) needs /dev/sdz1") && other.contains("line 2 (/data) needs UUID=gone")),
            "{faults:?}"
        );
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
