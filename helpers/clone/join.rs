//! How a disk gets its part of a shared btrfs root: as the second device, or in the place of the one that is lost.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::Path;

use anyhow::{Context, Result, bail};
use nix::sys::statvfs::statvfs;
use uuid::Uuid;

use crate::base::log::Log;
use crate::base::refusal::refused;
use crate::base::root::Root;
use crate::base::types::{DiskName, PartUuid, Role};
use crate::base::{program, progress};
use crate::boot::files::{BootFiles, Class, fold};
use crate::boot::{initrd, pe};
use crate::clone::Wish;
use crate::conf::{Config, Layout};
use crate::devices::btrfs::{Mounted, part_done};
use crate::devices::inventory::{Inventory, Partition};
use crate::devices::{gpt, mounts};
use crate::names::files::Rewritten;
use crate::names::ident::Rewriter;
use crate::names::ids::{DiskIds, PartIds};
use crate::names::{files, fstab};
use crate::pair::heal;
use crate::pair::machine::Machine;
use crate::proof::prove;
use crate::write::state;

/// The file that says what is mounted at boot.
pub const FSTAB: &str = "/etc/fstab";

/// What is left to be done.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Way {
    /// It has one device.
    Add,
    /// It goes on without the device of this id.
    Replace(u64),
    /// The new device is one of its two already: that was cut.
    GoOn,
}

/// The root that the booted disk and the new one are to share.
#[derive(Debug)]
pub struct Shared {
    uuid: Uuid,
    way: Way,
    /// The kernel's names of its devices.
    devices: Vec<String>,
}

impl Shared {
    /// The shared root of this machine: of one that isn't configured, only where that is wished for. None where each disk has its own.
    ///
    /// # Errors
    /// A refusal where the root is no btrfs that can get this disk, or is to be another's than the configuration's.
    pub fn look(root: &Root, config: Option<&Config>, wish: &Wish) -> Result<Option<Self>> {
        match config.map(Config::layout) {
            None if !wish.shared_root => return Ok(None),
            Some(Layout::OwnRoots) if wish.shared_root => {
                return Err(refused("by the configuration, each disk has a root of its own; nothing was done"));
            }
            Some(Layout::OwnRoots) => return Ok(None),
            None | Some(Layout::SharedRoot) => {}
        }
        let mounted =
            Mounted::look(root)?.ok_or_else(|| refused("the root is no btrfs, which disks could share; nothing was done"))?;
        if let Some(file) = mounts::swap_files_on_btrfs(root)?.first() {
            return Err(refused(format!(
                "{} is in use as swap space, and what it lies in would stay on one disk alone, without which the root does not boot; take it \
                 out of use ('swapoff', and its line in {FSTAB}) and remove it: on a btrfs of two disks, swap space needs a partition; \
                 nothing was done",
                file.display()
            )));
        }
        if config.is_some() && wish.replace.is_none() {
            return Err(refused(
                "the disks share their root, and so a new one takes the place of another: '--replace diskN'; nothing was done",
            ));
        }
        let disk = kname(&wish.disk).unwrap_or_default();
        let is_ours = mounted.at_work.iter().any(|part| root.exists(format!("/sys/class/block/{disk}/{part}")));
        let way = way(&mounted.ids, &mounted.lost(root)?, is_ours)
            .map_err(|why| refused(format!("the root, the btrfs {}, {why}; nothing was done", mounted.uuid)))?;
        Ok(Some(Self { uuid: mounted.uuid, way, devices: mounted.at_work }))
    }

    /// Where the new disk is a part of it already, the kernel's names of its devices.
    pub fn joined(&self) -> Option<&[String]> {
        (self.way == Way::GoOn).then_some(&self.devices)
    }

    /// The partition of the booted disk that holds a device of it.
    ///
    /// # Errors
    /// A refusal where there is none.
    pub fn beside(&self, inventory: &Inventory, esp: &PartUuid) -> Result<PartUuid> {
        let booted = inventory.find(esp)?.with_context(|| format!("the booted ESP {esp} isn't there"))?;
        let part = inventory.beside(booted).find(|part| self.has(part)).and_then(Partition::partuuid);
        part.ok_or_else(|| {
            refused(format!("no partition beside the booted ESP, {}, holds a device of the root; nothing was done", booted.path))
        })
    }

    /// Whether a partition is one of its devices.
    pub fn has(&self, part: &Partition) -> bool {
        self.devices.contains(&part.kname)
    }

    /// Takes its names out of those of the disks: it will be every disk's.
    pub fn forget(&self, ids: &mut [DiskIds]) {
        let uuid = self.uuid.to_string();
        for part in ids.iter_mut().flat_map(|disk| disk.parts.values_mut()).filter(|part| part.uuid.as_ref() == Some(&uuid)) {
            (part.uuid, part.label) = (None, None);
        }
    }

    /// How many bytes its device on the new disk has at least: what the one had that is lost, as far as that is known.
    pub fn least(&self, name: DiskName) -> Option<u64> {
        let was = gpt::load(&Path::new(state::DIRECTORY).join(gpt::NAME), name).ok();
        let was = was.filter(|_| matches!(self.way, Way::Replace(_)))?;
        was.partitions.iter().find(|part| part.role == Some(Role::Root)).map(|part| part.bytes)
    }

    /// For people.
    pub fn told(&self) -> String {
        let does = match self.way {
            Way::Add => "is added to".to_owned(),
            Way::Replace(id) => format!("takes the place, number and UUID of device {id}, which is missing, in"),
            Way::GoOn => "is a device already of".to_owned(),
        };
        format!(
            "Its root {does} the btrfs that is mounted on /, {}, and all of that is mirrored to it. That takes its time, and \
             until it has ended, the root needs both disks. Erase a disk whose place was taken before it is put in again.",
            self.uuid
        )
    }

    /// Has the root's file system use the new partition, and puts two copies of everything on it. What is cut goes on when this is done
    /// again.
    ///
    /// # Errors
    /// btrfs(8) that fails: too little room, or what can't be read of the only copy.
    pub fn join(&self, root: &Root, node: &str, log: &Log) -> Result<()> {
        state::keep(JOINING, format!("{}\n", self.uuid).into_bytes())?;
        let btrfs = |words: &[&str]| program::output("btrfs", words.iter().map(Into::into)).map(drop);
        let bytes = || statvfs("/").map_or(0, |s| s.fragment_size().saturating_mul(s.blocks() - s.blocks_free()));
        log.status(&format!("{node}: becoming a part of the shared root"));
        match self.way {
            Way::Add => btrfs(&["device", "add", "--enqueue", "-f", node, "/"])?,
            Way::Replace(id) => {
                let status = program::output("btrfs", ["replace", "status", "-1", "/"].map(Into::into))?;
                // The device that was to take the place has gone, too; until that is given up, no other one may.
                if String::from_utf8_lossy(&status).contains("suspended") {
                    btrfs(&["replace", "cancel", "/"])?;
                }
                let replace = || btrfs(&["replace", "start", "-B", "--enqueue", "-r", "-f", &id.to_string(), node, "/"]);
                progress::watch(bytes, || part_done(&["replace", "status", "-1"]), replace)?;
            }
            Way::GoOn => {}
        }
        log.status(&format!("{node}: mirroring the root"));
        // Soft: what has two copies stays, and what was written while there was one device gets them. On a small disk, the last of the old
        // chunks may find no room before those that were moved are given back.
        // What was begun before, and the kernel goes on with, is waited for.
        let balance = || btrfs(&["balance", "start", "--enqueue", "-dconvert=raid1,soft", "-mconvert=raid1,soft", "/"]);
        let balance = || balance().or_else(|_| balance());
        progress::watch(bytes, || part_done(&["balance", "status"]), balance)?;
        if self.way == Way::GoOn {
            // Either half may have been mounted without the other since it was begun: what has two copies may have an old one.
            log.status(&format!("{node}: comparing the halves of the root"));
            btrfs(&["scrub", "start", "-B", "/"])?;
        }
        let mounted = Mounted::look(root)?.context("the root isn't mounted any more")?;
        let (id, _) = mounted.device(root, &kname(Path::new(node))?)?;
        btrfs(&["filesystem", "resize", "--enqueue", &format!("{id}:max"), "/"])?;
        // udev doesn't see what btrfs writes, and others ask it.
        program::output("udevadm", ["trigger", "--settle", node].map(Into::into))?;
        heal::healed(root)
    }

    /// The configuration says from now on that the disks share their root.
    ///
    /// # Errors
    /// Those of removing a file.
    pub fn end(&self) -> Result<()> {
        state::open(Path::new(state::DIRECTORY))?.clear(JOINING.as_ref())
    }
}

/// A file of dualroot's state that is there while nothing is configured, and the root becomes one of several disks: initrds that are made
/// meanwhile mount it without one of these, too (`units/initrd/layout.sh`).
const JOINING: &str = "joining";

const WAITS: &str = "would not mount the root without one of its disks; make the initrds again ('update-initramfs -u -k all', 'dracut \
                     --regenerate-all --force')";

/// Whether the machine's files let another disk boot with the same root, and alone. `names` finds what names the booted disk, of which the
/// root isn't a part any more.
///
/// # Errors
/// The first that doesn't.
pub fn check(machine: &Machine, names: &Rewriter, files: &BTreeMap<Role, BootFiles>) -> Result<()> {
    for (role, _, dir) in machine.booted.boot_places() {
        let Some(found) = files.get(&role) else { continue };
        let place = machine.root.path(dir.as_str());
        for entry in found.of(Class::Entry) {
            let text = entry.text.as_deref().unwrap_or_default();
            let roots = || text.split(u8::is_ascii_whitespace).filter(|word| word.starts_with(b"root="));
            if let Some(id) = roots().flat_map(|word| names.foreign(word)).next() {
                bail!("{dir}/{}: the root is {id}, and not the UUID of the btrfs", entry.path);
            }
            // What has neither a root nor an initrd is no system: a test of the memory, a shell.
            let is_system = roots().next().is_some() || !initrd::initrds(text).is_empty();
            if is_system && !mounts_alone(&place, text, found)? {
                bail!("{dir}/{}: its initrd {WAITS}", entry.path);
            }
        }
        for image in found.of(Class::Uki) {
            let bytes = fs::read(place.join(&image.path)).with_context(|| format!("{dir}/{}", image.path))?;
            if pe::uki(&bytes, &variable()?)?.is_empty() {
                bail!("{dir}/{}: its initrd {WAITS}", image.path);
            }
        }
    }
    let texts = files::identifying_texts(&machine.root, &machine.drafts)?;
    match prove::root_files(&texts, names, |dir| machine.is_apart(dir)).first() {
        Some(fault) => bail!("{fault}; it is every disk's"),
        None => Ok(()),
    }
}

/// Finds in an initrd what mounts a shared root while a device of it is missing, which has the name of a variable in it (see
/// `units/initrd/degraded.sh`).
fn variable() -> Result<Rewriter> {
    let parts = BTreeMap::from([(Role::Esp, PartIds::new(heal::VENDOR.into()))]);
    Rewriter::finder(&[DiskIds { name: DiskName::free(&[])?, parts }])
}

/// Whether an initrd of an entry would.
fn mounts_alone(place: &Path, entry: &[u8], found: &BootFiles) -> Result<bool> {
    let names = variable()?;
    for initrd in initrd::initrds(entry).iter().filter_map(|path| found.files.get(&fold(path))) {
        let file = File::open(place.join(&initrd.path)).with_context(|| initrd.path.clone())?;
        if !initrd::initrd(file, &names).with_context(|| initrd.path.clone())?.is_empty() {
            return Ok(true);
        }
    }
    Ok(false)
}

/// fstab of a shared root, which is every disk's: without the lines for boot partitions and swap space of the booted disk, which the
/// generator mounts. None where it has no such lines.
///
/// # Errors
/// A file that can't be read; names that can't be told apart.
pub fn fstab(machine: &Machine) -> Result<Option<Rewritten>> {
    let old = machine.root.read_opt(FSTAB).context(FSTAB)?.unwrap_or_default();
    let own: Vec<DiskIds> = machine.ids.iter().filter(|ids| ids.name == machine.booted.name).cloned().collect();
    let own = own.into_iter().map(|mut ids| {
        ids.parts.retain(|role, _| role.is_boot() || *role == Role::Swap);
        ids
    });
    let names = Rewriter::finder(&own.collect::<Vec<_>>())?;
    let goes = |line: &fstab::Line<'_>| {
        !names.foreign(line.spec.raw).is_empty() && !line.dir().is_some_and(|dir| machine.is_apart(&dir))
    };
    let bytes = fstab::without(&old, goes);
    Ok((bytes != old).then(|| Rewritten { path: FSTAB.to_owned(), bytes }))
}

/// The kernel's name of a device node.
fn kname(node: &Path) -> Result<String> {
    let path = fs::canonicalize(node).with_context(|| node.display().to_string())?;
    let name = path.strip_prefix("/dev").ok().and_then(|name| name.to_str());
    Ok(name.with_context(|| format!("{} is no device node", path.display()))?.replace('/', "!"))
}

/// What is to be done, or why there is nothing to be.
fn way(ids: &[u64], lost: &[u64], is_ours: bool) -> Result<Way, String> {
    match (ids, lost) {
        _ if is_ours => Ok(Way::GoOn),
        ([_], []) => Ok(Way::Add),
        ([_, _], [id]) => Ok(Way::Replace(*id)),
        _ => Err(format!("has {} devices, {} of them missing, and not two with the new one", ids.len(), lost.len())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::refusal::{Refused, nothing_done};
    use crate::write::below::Below;

    #[test]
    fn a_second_device_is_added_and_a_lost_one_replaced() {
        assert_eq!(way(&[1], &[], false), Ok(Way::Add));
        // It was mounted without the first one, and made one of a single device by hand since.
        assert_eq!(way(&[2], &[], false), Ok(Way::Add));
        assert_eq!(way(&[1, 2], &[1], false), Ok(Way::Replace(1)));
        for (ids, lost) in [(&[1, 2][..], &[][..]), (&[1, 2, 3], &[3]), (&[1, 2], &[1, 2]), (&[1], &[1]), (&[], &[])] {
            assert!(way(ids, lost, false).unwrap_err().contains("not two with the new one"), "{ids:?} {lost:?}");
        }
        // What was cut: after the device was added, and while it took the place of another.
        for ids in [&[1, 2][..], &[0, 1, 2]] {
            assert_eq!(way(ids, &[], true), Ok(Way::GoOn));
        }
    }

    fn id(n: u32) -> PartUuid {
        PartUuid::parse(&format!("aaaaaaaa-0000-4000-8000-{n:012}")).unwrap()
    }

    /// Two disks: the numbers of their partitions count on from 1 and from 3.
    fn config(roles: &[&str]) -> Config {
        let section = |disk: u32| {
            let keys = (1..).zip(roles).map(|(n, role)| format!("{role}={}\n", id(2 * disk + n)));
            format!("[disk{disk}]\n{}", keys.collect::<String>())
        };
        Config::parse(&[("x".to_owned(), (section(0) + &section(1)).into_bytes())]).unwrap().unwrap()
    }

    /// Of the given kname, disk and number.
    fn inventory(parts: &[(&str, &str, u32)]) -> Inventory {
        let part = |(kname, disk, n): &(&str, &str, u32)| {
            format!(
                r#"{{"kname":"{kname}","pkname":"{disk}","path":"/dev/{kname}","maj:min":"8:{n}","fstype":null,"uuid":null,"label":null,
                    "partuuid":"{}","partlabel":null,"parttype":null,"log-sec":512}}"#,
                id(*n)
            )
        };
        let json = format!(r#"{{"blockdevices":[{}]}}"#, parts.iter().map(part).collect::<Vec<_>>().join(","));
        Inventory::parse(json.as_bytes(), BTreeMap::new(), [].into()).unwrap()
    }

    fn write(root: &Root, path: &str, text: &str) {
        let path = root.path(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn assert_refused<T: std::fmt::Debug>(found: Result<T>, expected: &str) {
        let error = found.unwrap_err();
        assert!(error.is::<Refused>() && error.to_string().contains(expected), "{error:#}");
    }

    #[test]
    fn what_can_t_be_shared_is_refused() {
        let tmp = tempfile::tempdir().unwrap();
        let root = Root::new(tmp.path());
        let wish = |shared_root| Wish { disk: "/dev/null".into(), replace: None, layout: None, shared_root };
        let mount = |fs: &str| write(&root, "/proc/thread-self/mountinfo", &format!("8 1 0:8 / / rw - {fs} /dev/a2 rw\n"));
        mount("ext4");
        let (own, shared) = (config(&["esp", "root"]), config(&["esp"]));
        assert!(Shared::look(&root, Some(&own), &wish(false)).unwrap().is_none());
        assert_refused(Shared::look(&root, Some(&own), &wish(true)), "each disk has a root of its own");
        assert_refused(Shared::look(&root, None, &wish(true)), "the root is no btrfs");
        mount("btrfs");
        let uuid = "/sys/fs/btrfs/a8426465-b755-429d-9604-9c77c2838fda";
        write(&root, &format!("{uuid}/devices/a2/dev"), "8:2\n");
        write(&root, &format!("{uuid}/devinfo/1/missing"), "0\n");
        let table = "8 1 0:8 / / rw - btrfs /dev/a2 rw\n9 8 0:9 / /srv rw - ext4 /dev/c rw\n";
        write(&root, "/proc/thread-self/mountinfo", table);
        for (line, is_refused) in
            [("/swap\\040file file 1 0 -2", true), ("/srv/swapfile file 1 0 -2", false), ("/dev/a3 partition 1 0 -2", false)]
        {
            write(&root, "/proc/swaps", &format!("Filename Type Size Used Priority\n{line}\n"));
            let found = Shared::look(&root, Some(&shared), &wish(false));
            assert_refused(found, if is_refused { "/swap file is in use as swap space" } else { "'--replace diskN'" });
        }
        assert_refused(Shared::look(&root, Some(&shared), &wish(false)), "'--replace diskN'; nothing was done");
        let parts = inventory(&[("a1", "a", 1), ("a2", "a", 2), ("b3", "b", 3)]);
        let of = |device: &str| Shared { uuid: Uuid::nil(), way: Way::Add, devices: vec![device.to_owned()] };
        assert_refused(
            of("b3").beside(&parts, &id(1)),
            "no partition beside the booted ESP, /dev/a1, holds a device of the root",
        );
        assert_eq!(of("a2").beside(&parts, &id(1)).unwrap(), id(2));
    }

    #[test]
    fn files_that_boot_no_other_disk_are_refused() {
        let root_part = PartIds::new(id(2));
        let booted = DiskIds { name: DiskName::parse("disk0").unwrap(), parts: [(Role::Root, root_part)].into() };
        let names = Rewriter::finder(&[booted]).unwrap();
        const ENTRY: &str = "/boot/loader/entries/a.conf";
        for (path, text, expected) in [
            (ENTRY, format!("linux /a\noptions root=PARTUUID={}\n", id(2)), "a.conf: the root is PARTUUID"),
            (
                ENTRY,
                "linux /a\noptions root=UUID=1\n".to_owned(),
                "a.conf: its initrd would not mount the root without one of its disks",
            ),
            ("/boot/EFI/Linux/a.efi", "MZ".to_owned(), "a.efi: its initrd would not mount the root without one of its disks"),
            (ENTRY, "title A test of the memory\nlinux /memtest\n".to_owned(), ""),
            ("/etc/kernel/cmdline", format!("root=PARTUUID={}\n", id(2)), "it is every disk's; nothing was done"),
        ] {
            let tmp = tempfile::tempdir().unwrap();
            let root = Root::new(tmp.path());
            fs::create_dir(root.path("/boot")).unwrap();
            write(&root, path, &text);
            let files = BootFiles::scan(&Below::open(&root.path("/boot")).unwrap()).unwrap();
            let config = config(&["esp"]);
            let machine = Machine {
                root,
                booted: config.disks[0].clone(),
                config,
                inventory: inventory(&[("a1", "a", 1)]),
                ids: Vec::new(),
                loader: None,
                drafts: Vec::new(),
            };
            let found = check(&machine, &names, &[(Role::Esp, files)].into()).map_err(nothing_done);
            match expected {
                "" => found.unwrap(),
                _ => assert_refused(found, expected),
            }
        }
    }
}
