//! Making a blank disk the first one of another machine, from a template: a system's tree that rsync(1) has copied. The copy gets a name and
//! identifiers of its own. The machine that runs this isn't changed, and it doesn't matter what it boots from.
//!
//! The code is that of a sync: boot files are written in the same order, every name of the template's disks is rewritten, and at the end the
//! disk is proved.

pub mod identity;
mod needed;
pub mod origin;
mod system;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};

use crate::base::clock::kernel_id;
use crate::base::fault::told;
use crate::base::log::Log;
use crate::base::progress::Progress;
use crate::base::refusal::refused;
use crate::base::root::Root;
use crate::base::types::{DiskName, PartUuid, Role};
use crate::clone::check::{check_programs, scan_boot_partition};
use crate::clone::disk::NewDisk;
use crate::clone::plan::{DiskPlan, mib};
use crate::clone::source::{self, Source, SourcePart};
use crate::clone::target::Target;
use crate::clone::template::identity::HostName;
use crate::clone::template::origin::{About, Listing, Origin};
use crate::clone::template::system::{Names, NewSystem};
use crate::copy::rules::{self, OldModules};
use crate::devices::held;
use crate::devices::inventory::{Inventory, Partition};
use crate::names::ident::Rewriter;
use crate::names::ids::{DiskIds, PartIds};
use crate::pair::machine::configuration;
use crate::proof::prove;
use crate::write::below::{Below, is_link};

/// An installation that the user asked for.
#[derive(Clone, Debug)]
pub struct Request {
    /// The disk to erase.
    pub disk: PathBuf,
    /// The template.
    pub origin: Origin,
    /// A file of layouts, of which the first is used instead of the template's own.
    pub layout: Option<PathBuf>,
}

/// An installation that was checked.
pub struct InstallPlan {
    /// The disk to erase, and its new partitions.
    pub disk: NewDisk,
    origin: Origin,
    about: About,
    /// rsync(1) filter rules for the files that are not copied.
    rules: Vec<String>,
    /// The bytes in all files that are copied.
    bytes: u64,
    left_out: Vec<String>,
}

impl InstallPlan {
    /// Plans and checks an installation of the template as it is now. Nothing is written.
    ///
    /// # Errors
    /// A refusal: something is missing, in the way, or not understood.
    pub fn new(root: &Root, request: &Request, log: &Log) -> Result<Self> {
        let config = configuration(root, log)?;
        let target = Target::probe(&request.disk, config.as_ref(), None)?;
        let origin = request.origin.canonical()?;
        let about = origin.about(request.layout.as_deref())?;
        let places = boot_places(&about)?;
        let rules = rules::all("", &identity::exclude_rules(about.machine_id), &[], OldModules::Stay);
        let trees = about.disk.partitions.iter().filter_map(|part| part.role.as_ref()?.tree());
        let listing = origin.list(&rules, &trees.chain(places.iter().map(|(_, place)| *place)).collect::<Vec<_>>())?;
        if listing.boots.is_empty() {
            let dirs: Vec<&str> = places.iter().map(|(_, place)| *place).collect();
            return Err(refused(format!(
                "the template {origin} has no menu entry and no unified kernel image in {}; copy the boot partitions into the template, too; \
                 nothing was done",
                dirs.join(" or ")
            )));
        }
        let source = source(&about, &places, &listing)?;
        let mut taken = Inventory::read()?.labels_on_other_disks(target.path());
        let named = about.ids.iter().flat_map(|disk| disk.parts.values());
        taken.extend(named.flat_map(|part| [part.label.clone(), part.partlabel.clone()]).flatten());
        let fresh_id = || kernel_id(root, "uuid");
        let plan = DiskPlan::make(&source, DiskName::parse("disk0")?, (target.bytes, target.sector), taken, fresh_id)
            .map_err(|e| refused(format!("{}: {e:#}", target.path())))?;
        check_programs(&plan)?;
        check_files(&origin, &about, &plan, &places)?;
        let bytes = listing.content;
        let plan = Self { disk: NewDisk { target, plan }, origin, about, rules, bytes, left_out: source.left_out };
        plan.check_images(&places)?;
        Ok(plan)
    }

    /// Describes the disk as it is and as it will be.
    pub fn describe(&self) -> String {
        let mut text = self.disk.describe("as the first disk of another machine");
        for line in &self.left_out {
            let _ = writeln!(text, "  {line}");
        }
        let _ =
            writeln!(text, "It is filled from {}, and gets a machine id of its own. This machine is not changed.", self.origin);
        text
    }

    /// Checks again that the disk may be erased, because the user may have taken long to answer.
    ///
    /// # Errors
    /// A refusal, as for [`InstallPlan::new`].
    pub fn check_again(&self, root: &Root) -> Result<()> {
        self.disk.check_again(root, None)
    }

    /// Erases the disk and installs the copy. The caller holds the lock and has asked the user.
    ///
    /// # Errors
    /// Any failure; no firmware boots the disk then.
    pub fn install(self, root: &Root, name: &HostName, log: &Log) -> Result<()> {
        self.disk.partition(log)?;
        self.disk.make_file_systems(None, log)?;
        held::enter_private_namespace()?;
        let inventory = Inventory::read()?;
        let parts = self.disk.parts(&inventory)?;
        let new = NewSystem::mount(&parts, self.names(&parts, root)?)?;
        log.status(&format!("{}: copying {}", self.disk.target.path(), self.origin));
        self.origin.copy(&self.rules, Progress::begin(|| self.bytes), new.root())?;
        new.personalise(&self.about, &self.disk.plan, name)?;
        new.barrier()?;
        log.status(&format!("{}: writing its boot partitions", self.disk.target.path()));
        let places = boot_places(&self.about)?;
        let wanted = new.write_boot_files(&places)?;
        log.status(&format!("{}: reading it again", self.disk.target.path()));
        let faults = new.prove(&wanted)?;
        if !faults.is_empty() {
            bail!("{} would not boot: {}", self.disk.target.path(), told(&faults));
        }
        for (_, place) in &places {
            new.empty_dir(place)?;
        }
        new.release()?;
        self.disk.finish()?;
        log.info(&format!("{} boots as {name}", self.disk.target.path()));
        Ok(())
    }

    /// Checks the boot images for names that can't be rewritten, before anything is erased. A template on another machine can't be checked
    /// without copying it.
    fn check_images(&self, places: &[(Role, &str)]) -> Result<()> {
        let Origin::Here(dir) = &self.origin else { return Ok(()) };
        let names = needed::finder(&self.old_ids()?)?;
        for (_, place) in places {
            let place = Root::new(dir).path(place);
            if let (_, Some(fault)) = scan_boot_partition(&place, &names)? {
                return Err(refused(format!("{}/{fault}; nothing was done", place.display())));
            }
        }
        Ok(())
    }

    /// The names of the template's disks, and of its machine.
    fn old_ids(&self) -> Result<Vec<DiskIds>> {
        let mut ids = self.about.ids.clone();
        let first = ids.first_mut().context("the template has no disks")?;
        identity::add_machine_id(first, self.about.machine_id)?;
        Ok(ids)
    }

    /// The names of the new disk and machine, and the rewriter to them.
    fn names(&self, parts: &BTreeMap<Role, &Partition>, root: &Root) -> Result<Names> {
        let of = |(role, part): (&Role, &&Partition)| {
            let partuuid = part.partuuid().with_context(|| format!("{} has no PARTUUID", part.path))?;
            let (uuid, label, partlabel) = (part.uuid.clone(), part.label.clone(), part.partlabel.clone());
            Ok((role.clone(), PartIds { uuid, label, partlabel, ..PartIds::new(partuuid) }))
        };
        // The rewriter distinguishes disks by their names in the configuration, so the new disk gets one that the template's disks don't have.
        let taken: Vec<DiskName> = self.about.ids.iter().map(|disk| disk.name).collect();
        let name = DiskName::first_free(&taken)?;
        let mut own = DiskIds { name, parts: parts.iter().map(of).collect::<Result<_>>()? };
        let alone = |ids: &PartIds| DiskIds { name, parts: [(Role::Root, ids.clone())].into() };
        let its_root = own.parts.get(&Role::Root).map(alone).context("the new disk has no root=")?;
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

/// Checks the template's files, before anything is erased, for devices that the new machine would wait for in vain, and for links where files
/// are needed. A template on another machine can't be checked without copying it.
fn check_files(origin: &Origin, about: &About, plan: &DiskPlan, places: &[(Role, &str)]) -> Result<()> {
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
                "{} is a symbolic link; make it a directory with the boot partition's files in the template; nothing was done",
                root.path(place).display()
            )));
        }
    }
    let read =
        |path: &str| root.read_opt(path).map(Option::unwrap_or_default).with_context(|| format!("{}{path}", dir.display()));
    let fstab = needed::without_other_disks(&read(system::FSTAB)?, &about.ids, about.disk.name)?;
    // Names of partitions that are made will be rewritten.
    let mut made = about.ids.clone();
    made.iter_mut().for_each(|disk| disk.parts.retain(|role, _| plan.parts.iter().any(|part| part.role == *role)));
    let faults = needed::missing_devices(&fstab, &read(system::CRYPTTAB)?, &needed::finder(&made)?);
    match faults.is_empty() {
        true => Ok(()),
        false => Err(refused(format!("{}; nothing was done", told(&faults)))),
    }
}

/// The template's directories with the files of the boot partitions: as [`crate::conf::Disk::boot_places`].
fn boot_places(about: &About) -> Result<Vec<(Role, &'static str)>> {
    let has = |role: &Role| about.disk.partitions.iter().any(|part| part.role.as_ref() == Some(role));
    for role in [Role::Esp, Role::Root] {
        if !has(&role) {
            return Err(refused(format!(
                "the template's layout has no {role}=, which every disk needs; give another layout (--layout); nothing was done"
            )));
        }
    }
    Ok(match has(&Role::Xbootldr) {
        true => vec![(Role::Esp, "/efi"), (Role::Xbootldr, "/boot")],
        false => vec![(Role::Esp, "/boot")],
    })
}

/// The partitions that fstab needs lines for: all except root and /usr, which are mounted before fstab is read.
fn fstab_entries<'a>(about: &About, plan: &'a DiskPlan) -> Result<Vec<(Option<&'a str>, PartUuid, &'a str)>> {
    let places = boot_places(about)?;
    let at = |role: &Role| places.iter().find(|(boot, _)| boot == role).map(|(_, place)| *place);
    let parts = plan.parts.iter().filter(|part| !matches!(part.role, Role::Root | Role::Usr));
    Ok(parts.map(|part| (at(&part.role).or(part.role.tree()), part.partuuid, part.content.name())).collect())
}

/// The partitions to make, with the room that their files need. The root holds the boot files for a while, too.
fn source(about: &About, places: &[(Role, &str)], listing: &Listing<'_>) -> Result<Source> {
    for disk in &about.ids {
        // Whatever the layout says: encrypted files must not end up on a plain partition.
        if let Some((role, _)) = disk.parts.iter().find(|(_, part)| part.container.is_some()) {
            return Err(refused(format!(
                "{role}= of the template's {} was in a LUKS container, and dualroot installs no containers from a template; nothing was done",
                disk.name
            )));
        }
    }
    let mut made = Source::default();
    let bytes = |place: &str| listing.bytes.get(place).copied().unwrap_or_default();
    for part in &about.disk.partitions {
        let Some(role) = part.role.clone() else {
            let content = part.fstype.as_deref().unwrap_or("unknown content");
            made.left_out.push(format!("{} ({content}) is not made: no key named it", part.partuuid));
            continue;
        };
        let content = source::Content::like(part, &role)?;
        if part.container.is_some() {
            return Err(refused(format!(
                "{role}= of the template was in a LUKS container, and dualroot installs no containers from a template; nothing was done"
            )));
        }
        if let Some((_, place)) = places.iter().find(|(of, _)| *of == role).filter(|(_, place)| bytes(place) > part.bytes) {
            return Err(refused(format!(
                "{place} of the template has {} MiB, but its {role}= partition only {} MiB; give a layout with a larger one (--layout); \
                 nothing was done",
                mib(bytes(place)),
                mib(part.bytes)
            )));
        }
        let boot = || places.iter().map(|(_, place)| bytes(place)).sum::<u64>();
        made.parts.push(SourcePart {
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
    use crate::base::fault::{Code, Fault};
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
    fn every_partition_gets_room_for_its_files() {
        let about = about(&ROLES);
        let places = boot_places(&about).unwrap();
        assert_eq!(places, [(Role::Esp, "/efi"), (Role::Xbootldr, "/boot")]);
        let source = source(&about, &places, &listing(&[("", 900), ("/boot", 60), ("/efi", 5), ("/home", 7)])).unwrap();
        let used: Vec<Option<u64>> = source.parts.iter().map(|part| part.used.map(mib)).collect();
        // The root has the boot files for a while.
        assert_eq!(used, [None, None, Some(965), None, Some(7)]);
    }

    #[test]
    fn a_layout_that_cannot_be_made_is_refused() {
        let refusal = |about: &About, listed: &[(&'static str, u64)]| {
            let made = boot_places(about).and_then(|places| source(about, &places, &listing(listed)));
            let error = made.unwrap_err();
            assert!(error.is::<Refused>(), "{error:#}");
            error.to_string()
        };
        assert!(refusal(&about(&["root"]), &[]).contains("has no esp="));
        assert!(refusal(&about(&["esp", "home"]), &[]).contains("has no root="));
        let found = refusal(&about(&["esp", "root"]), &[("/boot", 101)]);
        assert!(found.contains("/boot of the template has 101 MiB, but its esp= partition only 100 MiB"), "{found}");
        let mut encrypted = about(&["esp", "root"]);
        encrypted.disk.partitions[1].container = Some("x".into());
        assert!(refusal(&encrypted, &[]).contains("root= of the template was in a LUKS container"));
        // Another layout doesn't change that its files were encrypted.
        let mut encrypted = about(&["esp", "root"]);
        let root = encrypted.ids[0].parts.get_mut(&Role::Root).unwrap();
        root.container = Some(ContainerIds { uuid: None, label: None });
        assert!(refusal(&encrypted, &[]).contains("root= of the template's disk0 was in a LUKS container"));
    }

    /// A tree that was copied, on one file system.
    fn copied(files: &[(&str, &str)]) -> (tempfile::TempDir, NewSystem) {
        let tmp = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = tmp.path().join(path.trim_start_matches('/'));
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let (top, below) = (tmp.path().to_owned(), Below::open(tmp.path()).unwrap());
        (tmp, NewSystem { held: BTreeMap::new(), top, below, generation: None, names: names() })
    }

    #[test]
    fn a_copy_becomes_a_machine_of_its_own() {
        let roles = ["esp", "root", "swap", "home"];
        let plan = {
            let source = source(&about(&roles), &[(Role::Esp, "/boot")], &listing(&[])).unwrap();
            let mut plan = DiskPlan::make(&source, DiskName::parse("disk0").unwrap(), (2000 * MIB, 512), [].into(), || {
                Ok(Uuid::from_u128(1))
            })
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
        new.personalise(&about, &plan, &name).unwrap();
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
        new.personalise(&about, &plan, &name).unwrap();
        assert!(tmp.path().join("var/lib/dbus/machine-id").is_symlink());
    }

    #[test]
    fn entries_boot_the_new_root_or_another() {
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
    fn faults_that_cannot_be_fixed_later_are_refused_before_the_disk_is_erased() {
        let (tmp, _) = copied(&[("/etc/fstab", &format!("PARTUUID={} / ext4\n", id(OLD, "root"))), ("/boot/x", "")]);
        let (origin, about) = (Origin::Here(tmp.path().to_owned()), about(&["esp", "root"]));
        let places = boot_places(&about).unwrap();
        let source = source(&about, &places, &listing(&[])).unwrap();
        let disk0 = DiskName::parse("disk0").unwrap();
        let plan = DiskPlan::make(&source, disk0, (2000 * MIB, 512), [].into(), || Ok(Uuid::from_u128(1))).unwrap();
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
        let plan = DiskPlan::make(&source, disk0, (2000 * MIB, 512), [].into(), || Ok(Uuid::from_u128(1))).unwrap();
        new.personalise(&about, &plan, &name).unwrap();
        assert!(tmp.path().join("etc/hosts").is_symlink() && tmp.path().join("etc/machine-info").is_symlink());
        assert_eq!(fs::read(tmp.path().join("usr/x")).unwrap(), b"pair");
        link("../usr/x", "etc/crypttab");
        let error = new.personalise(&about, &plan, &name).unwrap_err().to_string();
        assert!(error.contains("/etc/crypttab -> ../usr/x of the template"), "{error}");
        assert!(new.copied_boot_files("/boot").unwrap().files.contains_key("vmlinuz"));
        link(tmp.path().join("boot").to_str().unwrap(), "efi");
        for place in ["/efi", "/none"] {
            let error = new.copied_boot_files(place).unwrap_err();
            assert!(format!("{error:#}").contains("has to be a directory, not a link"), "{error:#}");
        }
    }

    #[test]
    fn devices_that_the_boot_would_wait_for_in_vain_are_found_in_the_end() {
        let fstab = format!("PARTUUID={} / ext4\nUUID=gone /data ext4\nUUID=gone /more ext4 nofail\n", id(NEW, "root"));
        let (_tmp, new) = copied(&[("/etc/fstab", &fstab), ("/etc/crypttab", "x /dev/sdz1\n"), ("/usr/x", "")]);
        let faults = new.prove(&[].into()).unwrap();
        let waits: Vec<&Fault> = faults.iter().filter(|fault| fault.code == Code::F14).collect();
        assert!(
            matches!(&waits[..], [one, other] if one.text.contains("line 1 (x) needs /dev/sdz1")
                && other.text.contains("line 2 (/data) needs UUID=gone")),
            "{faults:?}"
        );
    }

    #[test]
    fn boot_files_leave_an_empty_mount_point() {
        let (tmp, new) = copied(&[("/boot/a/b/c", ""), ("/boot/vmlinuz", ""), ("/etc/x", "")]);
        new.empty_dir("/boot").unwrap();
        assert_eq!(fs::read_dir(tmp.path().join("boot")).unwrap().count(), 0);
        assert!(tmp.path().join("etc/x").exists());
        new.empty_dir("/efi").unwrap_err();
    }
}
