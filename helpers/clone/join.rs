//! Adding a disk to a shared btrfs root: as its second device, or in the place of a lost one.

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
use crate::clone::Request;
use crate::conf::{Config, Layout};
use crate::devices::btrfs::{MountedBtrfs, fraction_done};
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

/// The table of the file systems that are mounted at boot: fstab(5).
pub const FSTAB: &str = "/etc/fstab";

/// The step with which the new disk joins.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Step {
    /// The root has one device; add the new one.
    Add,
    /// The root lacks the device with this id; replace that.
    Replace(u64),
    /// The new device is one of its two already: an earlier clone was interrupted.
    Resume,
}

/// The root that the booted disk and the new one will share.
#[derive(Debug)]
pub struct SharedRoot {
    uuid: Uuid,
    step: Step,
    /// The kernel's names of its devices.
    devices: Vec<String>,
}

impl SharedRoot {
    /// Probes the shared root of this machine. On a machine that isn't configured, there is one only if the request asks for it. None where
    /// each disk has a root of its own.
    ///
    /// # Errors
    /// A refusal where the root is no btrfs that this disk can join, or where the configuration contradicts the request.
    pub fn probe(root: &Root, config: Option<&Config>, request: &Request) -> Result<Option<Self>> {
        match config.map(Config::layout) {
            None if !request.shared_root => return Ok(None),
            Some(Layout::OwnRoots) if request.shared_root => {
                return Err(refused(
                    "by the configuration, each disk has a root of its own, so this one can't share it; leave --shared-root out; nothing was \
                     done",
                ));
            }
            Some(Layout::OwnRoots) => return Ok(None),
            None | Some(Layout::SharedRoot) => {}
        }
        let mounted = MountedBtrfs::read(root)?
            .ok_or_else(|| refused("the root is no btrfs, and only a btrfs can be shared; nothing was done"))?;
        if let Some(file) = mounts::swap_files_on_btrfs(root)?.first() {
            return Err(refused(format!(
                "{} is a swap file in use; btrfs does not mirror it, so the root would not boot without this disk; stop using it ('swapoff', \
                 and remove its line in {FSTAB}), delete it, and use a swap partition on each disk (swap=); nothing was done",
                file.display()
            )));
        }
        if config.is_some() && request.replace.is_none() {
            return Err(refused(
                "the disks share their root, so a new disk has to replace another one; name that with '--replace diskN'; nothing was done",
            ));
        }
        let disk = kname(&request.disk).unwrap_or_default();
        let is_ours = mounted.present.iter().any(|part| root.exists(format!("/sys/class/block/{disk}/{part}")));
        let step = choose_step(&mounted.ids, &mounted.missing_ids(root)?, is_ours)
            .map_err(|why| refused(format!("the root, the btrfs {}, {why}; nothing was done", mounted.uuid)))?;
        Ok(Some(Self { uuid: mounted.uuid, step, devices: mounted.present }))
    }

    /// The kernel's names of its devices, if the new disk holds one of them already.
    pub fn joined(&self) -> Option<&[String]> {
        (self.step == Step::Resume).then_some(&self.devices)
    }

    /// The partition of the booted disk that is one of its devices.
    ///
    /// # Errors
    /// A refusal where there is none.
    pub fn booted_partition(&self, inventory: &Inventory, esp: &PartUuid) -> Result<PartUuid> {
        let booted = inventory.find(esp)?.with_context(|| format!("the booted ESP {esp} isn't there"))?;
        let part = inventory.others_on_disk(booted).find(|part| self.contains(part)).and_then(Partition::partuuid);
        part.ok_or_else(|| {
            refused(format!(
                "the disk that was booted, with the ESP {}, has no partition that belongs to the root; nothing was done",
                booted.path
            ))
        })
    }

    /// Whether a partition is one of its devices.
    pub fn contains(&self, part: &Partition) -> bool {
        self.devices.contains(&part.kname)
    }

    /// Removes its names from those of the disks, because it will be on every disk.
    pub fn remove_own_names(&self, ids: &mut [DiskIds]) {
        let uuid = self.uuid.to_string();
        for part in ids.iter_mut().flat_map(|disk| disk.parts.values_mut()).filter(|part| part.uuid.as_ref() == Some(&uuid)) {
            (part.uuid, part.label) = (None, None);
        }
    }

    /// The least size of its device on the new disk, in bytes: that of the lost device, where it is known.
    pub fn least_bytes(&self, name: DiskName) -> Option<u64> {
        let lost = gpt::load(&Path::new(state::DIRECTORY).join(gpt::NAME), name).ok();
        let lost = lost.filter(|_| matches!(self.step, Step::Replace(_)))?;
        lost.partitions.iter().find(|part| part.role == Some(Role::Root)).map(|part| part.bytes)
    }

    /// Describes for the user how the disk joins.
    pub fn describe(&self) -> String {
        let does = match self.step {
            Step::Add => "is added to".to_owned(),
            Step::Replace(id) => format!("takes the place, number and UUID of device {id}, which is missing, in"),
            Step::Resume => "is a device already of".to_owned(),
        };
        format!(
            "Its root {does} the btrfs that is mounted on /, {}, and everything in that is mirrored to it. This takes time, and \
             until it has ended, the root needs both disks. Erase the replaced disk before you put it in again.",
            self.uuid
        )
    }

    /// Adds the new partition to the root's file system, and mirrors everything to it. After an interruption, running it again resumes.
    ///
    /// # Errors
    /// A failure of btrfs(8): too little room, or an only copy that can't be read.
    pub fn join(&self, root: &Root, node: &str, log: &Log) -> Result<()> {
        state::save(JOINING, format!("{}\n", self.uuid).into_bytes())?;
        let btrfs = |words: &[&str]| program::output("btrfs", words.iter().map(Into::into)).map(drop);
        let bytes = || statvfs("/").map_or(0, |s| s.fragment_size().saturating_mul(s.blocks() - s.blocks_free()));
        log.status(&format!("{node}: joining the shared root"));
        match self.step {
            Step::Add => btrfs(&["device", "add", "--enqueue", "-f", node, "/"])?,
            Step::Replace(id) => {
                let status = program::output("btrfs", ["replace", "status", "-1", "/"].map(Into::into))?;
                // The device of an earlier replacement is missing, too; that replacement has to be cancelled first.
                if String::from_utf8_lossy(&status).contains("suspended") {
                    btrfs(&["replace", "cancel", "/"])?;
                }
                let replace = || btrfs(&["replace", "start", "-B", "--enqueue", "-r", "-f", &id.to_string(), node, "/"]);
                progress::watch(bytes, || fraction_done(&["replace", "status", "-1"]), replace)?;
            }
            Step::Resume => {}
        }
        log.status(&format!("{node}: mirroring the root"));
        // Soft: chunks that have two copies stay, and only those with one copy are converted. On a small disk, the last of the old chunks
        // may find no room before the space of the moved ones is free: then a second balance does it. --enqueue waits for a balance that
        // the kernel has resumed.
        let balance = || btrfs(&["balance", "start", "--enqueue", "-dconvert=raid1,soft", "-mconvert=raid1,soft", "/"]);
        let balance = || balance().or_else(|_| balance());
        progress::watch(bytes, || fraction_done(&["balance", "status"]), balance)?;
        if self.step == Step::Resume {
            // Either half may have been mounted without the other since the clone began, so one of two copies may be old.
            log.status(&format!("{node}: comparing the halves of the root"));
            btrfs(&["scrub", "start", "-B", "/"])?;
        }
        let mounted = MountedBtrfs::read(root)?.context("the root isn't mounted any more")?;
        let (id, _) = mounted.device(root, &kname(Path::new(node))?)?;
        btrfs(&["filesystem", "resize", "--enqueue", &format!("{id}:max"), "/"])?;
        // udev doesn't notice what btrfs writes, and other programs read udev's database.
        program::output("udevadm", ["trigger", "--settle", node].map(Into::into))?;
        heal::healed(root)
    }

    /// Removes the file [`JOINING`], because the configuration says now that the disks share their root.
    ///
    /// # Errors
    /// Those of removing a file.
    pub fn finish(&self) -> Result<()> {
        state::open(Path::new(state::DIRECTORY))?.clear(JOINING.as_ref())
    }
}

/// A state file that exists while the root becomes a shared one and the configuration doesn't say so yet. Initrds that are made meanwhile
/// can mount the root without one of its disks, too (`units/initrd/layout.sh`).
const JOINING: &str = "joining";

const NEEDS_ALL_DISKS: &str = "would not mount the root without one of its disks; make the initrds again ('update-initramfs -u -k all', \
                               'dracut --regenerate-all --force')";

/// Checks that with the machine's files, another disk boots the same root, and boots it alone. `names` finds the booted disk's names, without
/// those of the shared root.
///
/// # Errors
/// The first file that prevents that.
pub fn check(machine: &Machine, names: &Rewriter, files: &BTreeMap<Role, BootFiles>) -> Result<()> {
    for (role, _, dir) in machine.booted.boot_places() {
        let Some(found) = files.get(&role) else { continue };
        let place = machine.root.path(dir.as_str());
        for entry in found.of(Class::Entry) {
            let text = entry.text.as_deref().unwrap_or_default();
            let roots = || text.split(u8::is_ascii_whitespace).filter(|word| word.starts_with(b"root="));
            if let Some(id) = roots().flat_map(|word| names.foreign(word)).next() {
                bail!("{dir}/{}: root= is {id}, which only this disk has; use the UUID of the btrfs (root=UUID=...)", entry.path);
            }
            // An entry without a root and without an initrd boots no system: a memory test, a shell.
            let is_system = roots().next().is_some() || !initrd::initrd_paths(text).is_empty();
            if is_system && !mounts_degraded(&place, text, found)? {
                bail!("{dir}/{}: its initrd {NEEDS_ALL_DISKS}", entry.path);
            }
        }
        for image in found.of(Class::Uki) {
            let bytes = fs::read(place.join(&image.path)).with_context(|| format!("{dir}/{}", image.path))?;
            if pe::search_uki(&bytes, &variable_finder()?)?.is_empty() {
                bail!("{dir}/{}: its initrd {NEEDS_ALL_DISKS}", image.path);
            }
        }
    }
    let texts = files::identifying_texts(&machine.root, &machine.drafts)?;
    match prove::root_files(&texts, names, |dir| machine.belongs_to_other_disk(dir)).first() {
        Some(fault) => bail!("{fault}; the file is on a root that every disk shares"),
        None => Ok(()),
    }
}

/// Finds, in an initrd, the script that mounts a shared root while a device is missing, by the EFI variable that it names
/// (`units/initrd/degraded.sh`).
fn variable_finder() -> Result<Rewriter> {
    let parts = BTreeMap::from([(Role::Esp, PartIds::new(heal::VENDOR.into()))]);
    Rewriter::finder(&[DiskIds { name: DiskName::first_free(&[])?, parts }])
}

/// Whether an initrd of an entry has that script.
fn mounts_degraded(place: &Path, entry: &[u8], found: &BootFiles) -> Result<bool> {
    let names = variable_finder()?;
    for initrd in initrd::initrd_paths(entry).iter().filter_map(|path| found.files.get(&fold(path))) {
        let file = File::open(place.join(&initrd.path)).with_context(|| initrd.path.clone())?;
        if !initrd::search_initrd(file, &names).with_context(|| initrd.path.clone())?.is_empty() {
            return Ok(true);
        }
    }
    Ok(false)
}

/// The fstab of a shared root, without the lines for the booted disk's boot partitions and swap space, which the generator mounts instead.
/// None where it has no such lines.
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
    let is_own = |line: &fstab::Line<'_>| {
        !names.foreign(line.spec.raw).is_empty() && !line.dir().is_some_and(|dir| machine.belongs_to_other_disk(&dir))
    };
    let bytes = fstab::without_lines(&old, is_own);
    Ok((bytes != old).then(|| Rewritten { path: FSTAB.to_owned(), bytes }))
}

/// The kernel's name of a device node.
fn kname(node: &Path) -> Result<String> {
    let path = fs::canonicalize(node).with_context(|| node.display().to_string())?;
    let name = path.strip_prefix("/dev").ok().and_then(|name| name.to_str());
    Ok(name.with_context(|| format!("{} is no device node", path.display()))?.replace('/', "!"))
}

/// Chooses the step, or says why the disk can't join.
fn choose_step(ids: &[u64], lost: &[u64], is_ours: bool) -> Result<Step, String> {
    match (ids, lost) {
        _ if is_ours => Ok(Step::Resume),
        ([_], []) => Ok(Step::Add),
        ([_, _], [id]) => Ok(Step::Replace(*id)),
        _ => Err(format!(
            "has {} devices, {} of them missing; a disk can only become the second device, or replace the missing one of two",
            ids.len(),
            lost.len()
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::refusal::{Refused, nothing_done};
    use crate::write::below::Below;

    #[test]
    fn a_second_device_is_added_and_a_lost_one_replaced() {
        assert_eq!(choose_step(&[1], &[], false), Ok(Step::Add));
        // It was mounted without the first device, and converted to a single device by hand since.
        assert_eq!(choose_step(&[2], &[], false), Ok(Step::Add));
        assert_eq!(choose_step(&[1, 2], &[1], false), Ok(Step::Replace(1)));
        for (ids, lost) in [(&[1, 2][..], &[][..]), (&[1, 2, 3], &[3]), (&[1, 2], &[1, 2]), (&[1], &[1]), (&[], &[])] {
            assert!(choose_step(ids, lost, false).unwrap_err().contains("can only become the second"), "{ids:?} {lost:?}");
        }
        // Interrupted after the device was added, and while it replaced another.
        for ids in [&[1, 2][..], &[0, 1, 2]] {
            assert_eq!(choose_step(ids, &[], true), Ok(Step::Resume));
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

    /// Partitions with the given kname, disk and number.
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
    fn a_root_that_can_t_be_shared_is_refused() {
        let tmp = tempfile::tempdir().unwrap();
        let root = Root::new(tmp.path());
        let request = |shared_root| Request { disk: "/dev/null".into(), replace: None, layout: None, shared_root };
        let mount = |fs: &str| write(&root, "/proc/thread-self/mountinfo", &format!("8 1 0:8 / / rw - {fs} /dev/a2 rw\n"));
        mount("ext4");
        let (own, shared) = (config(&["esp", "root"]), config(&["esp"]));
        assert!(SharedRoot::probe(&root, Some(&own), &request(false)).unwrap().is_none());
        assert_refused(SharedRoot::probe(&root, Some(&own), &request(true)), "each disk has a root of its own");
        assert_refused(SharedRoot::probe(&root, None, &request(true)), "the root is no btrfs");
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
            let found = SharedRoot::probe(&root, Some(&shared), &request(false));
            assert_refused(found, if is_refused { "/swap file is a swap file in use" } else { "'--replace diskN'" });
        }
        assert_refused(SharedRoot::probe(&root, Some(&shared), &request(false)), "'--replace diskN'; nothing was done");
        let parts = inventory(&[("a1", "a", 1), ("a2", "a", 2), ("b3", "b", 3)]);
        let of = |device: &str| SharedRoot { uuid: Uuid::nil(), step: Step::Add, devices: vec![device.to_owned()] };
        assert_refused(
            of("b3").booted_partition(&parts, &id(1)),
            "with the ESP /dev/a1, has no partition that belongs to the root",
        );
        assert_eq!(of("a2").booted_partition(&parts, &id(1)).unwrap(), id(2));
    }

    #[test]
    fn files_that_boot_no_other_disk_are_refused() {
        let root_part = PartIds::new(id(2));
        let booted = DiskIds { name: DiskName::parse("disk0").unwrap(), parts: [(Role::Root, root_part)].into() };
        let names = Rewriter::finder(&[booted]).unwrap();
        const ENTRY: &str = "/boot/loader/entries/a.conf";
        for (path, text, expected) in [
            (ENTRY, format!("linux /a\noptions root=PARTUUID={}\n", id(2)), "a.conf: root= is PARTUUID"),
            (
                ENTRY,
                "linux /a\noptions root=UUID=1\n".to_owned(),
                "a.conf: its initrd would not mount the root without one of its disks",
            ),
            ("/boot/EFI/Linux/a.efi", "MZ".to_owned(), "a.efi: its initrd would not mount the root without one of its disks"),
            (ENTRY, "title A test of the memory\nlinux /memtest\n".to_owned(), ""),
            ("/etc/kernel/cmdline", format!("root=PARTUUID={}\n", id(2)), "on a root that every disk shares; nothing was done"),
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
