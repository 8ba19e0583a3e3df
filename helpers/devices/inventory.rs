//! The machine's partitions, by lsblk(8), and the identifiers of each.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde::Deserialize;
use uuid::Uuid;

use crate::base::program;
use crate::base::types::{DirPath, DiskName, PartUuid, Role};
use crate::conf::{Config, Disk};
use crate::names::ids::{ContainerIds, DiskIds, PartIds};

/// The GPT type of an EFI system partition (UEFI specification, 5.3.3).
pub(crate) const ESP_TYPE: &str = "c12a7328-f81f-11d2-ba4b-00a0c93ec93b";

/// A LUKS container on a partition.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Container {
    /// Its own identifiers.
    pub ids: ContainerIds,
    /// The device node and device number of its content, if it is open.
    mapping: Option<(String, String)>,
}

/// A partition, or another block device, as lsblk shows it.
#[derive(Clone, Debug, Deserialize)]
pub struct Partition {
    /// The kernel's name, such as `sda2`.
    pub kname: String,
    /// The kernel's name of the disk that it is on.
    #[serde(default)]
    pkname: Option<String>,
    /// The device node.
    pub path: String,
    #[serde(rename = "maj:min")]
    number: String,
    /// lsblk's type of device: `part`, `crypt`, …
    #[serde(rename = "type", default)]
    kind: String,
    /// The type of its file system, such as `ext4` or `vfat`; of the one inside, if it is an open LUKS container.
    pub fstype: Option<String>,
    /// The UUID of that file system; None in a container that isn't open.
    pub uuid: Option<String>,
    /// Its label.
    pub label: Option<String>,
    /// The LUKS container on it.
    #[serde(skip)]
    pub container: Option<Container>,
    partuuid: Option<String>,
    /// The name of the partition in the GPT.
    pub partlabel: Option<String>,
    parttype: Option<String>,
    /// Its number in the partition table.
    #[serde(skip)]
    pub index: Option<u32>,
    /// Its size in bytes.
    #[serde(rename = "size", default)]
    pub bytes: u64,
    /// The size of a logical sector in bytes.
    #[serde(rename = "log-sec")]
    pub sector: u64,
}

impl Partition {
    /// The device node of its file system: its own, or the mapping of its open LUKS container.
    pub fn node(&self) -> &str {
        self.mapping().map_or(&self.path, |(node, _)| node)
    }

    /// Whether it is a LUKS container that isn't open.
    pub fn is_closed(&self) -> bool {
        self.container.is_some() && self.mapping().is_none()
    }

    fn mapping(&self) -> Option<&(String, String)> {
        self.container.as_ref()?.mapping.as_ref()
    }

    /// The device number of [`Partition::node`].
    ///
    /// # Errors
    /// lsblk didn't print the number as MAJOR:MINOR.
    pub fn device(&self) -> Result<u64> {
        let number = self.mapping().map_or(&self.number, |(_, number)| number);
        number
            .split_once(':')
            .and_then(|(major, minor)| Some(nix::sys::stat::makedev(major.trim().parse().ok()?, minor.trim().parse().ok()?)))
            .with_context(|| format!("lsblk prints '{number}' as the device number of {}, expected MAJOR:MINOR", self.node()))
    }

    /// Recognises ext4 with a half-written superblock, which libblkid (2.39 and later) doesn't report, so that
    /// [`crate::devices::fsck`] can repair it.
    fn detect_torn_ext(&mut self) {
        let mut block = [0; 1024];
        let unknown = self.fstype.is_none() && self.partuuid.is_some();
        // If the device can't be read, those who need it report that.
        let read = unknown && File::open(self.node()).is_ok_and(|device| device.read_exact_at(&mut block, 1024).is_ok());
        if let Some((uuid, label)) = ext(&block).filter(|_| read) {
            self.fstype = Some("ext4".to_owned());
            self.uuid = Some(uuid);
            self.label = label;
        }
    }

    /// Makes this a LUKS container, with the mapping `inside` if it is open.
    fn set_container(&mut self, inside: Option<&Self>) {
        let (uuid, label) = (self.uuid.take(), self.label.take());
        let mapping = inside.map(|inside| (inside.path.clone(), inside.number.clone()));
        if let Some(inside) = inside {
            (self.fstype, self.uuid, self.label) = (inside.fstype.clone(), inside.uuid.clone(), inside.label.clone());
        }
        self.container = Some(Container { ids: ContainerIds { uuid, label }, mapping });
    }

    /// Its PARTUUID, if it has one.
    pub fn partuuid(&self) -> Option<PartUuid> {
        PartUuid::parse(self.partuuid.as_deref()?).ok()
    }

    /// The kernel's name of the disk that it is on.
    pub fn disk(&self) -> Option<&str> {
        self.pkname.as_deref()
    }

    /// The UUIDs of its file system and of its container.
    fn uuids(&self) -> impl Iterator<Item = &str> {
        self.uuid.as_deref().into_iter().chain(self.container.as_ref().and_then(|container| container.ids.uuid.as_deref()))
    }

    fn has_partuuid(&self, wanted: &PartUuid) -> bool {
        self.partuuid() == Some(*wanted)
    }
}

/// All partitions and other block devices of the machine.
#[derive(Clone, Debug, Default)]
pub struct Inventory {
    parts: Vec<Partition>,
    /// The links below /dev/disk, by the kernel's name of the device.
    links: BTreeMap<String, BTreeSet<String>>,
    /// The UUIDs of mounted btrfs file systems with several devices.
    multi_device: BTreeSet<String>,
}

impl Inventory {
    /// Runs lsblk, and reads udev's links and the kernel's list of btrfs file systems.
    ///
    /// # Errors
    /// lsblk fails, or its output can't be understood.
    pub fn read() -> Result<Self> {
        let columns = "KNAME,PKNAME,PATH,MAJ:MIN,TYPE,FSTYPE,UUID,LABEL,PARTUUID,PARTLABEL,PARTTYPE,SIZE,LOG-SEC";
        let printed = program::output("lsblk", ["--json", "--bytes", "--list", "--output", columns].map(Into::into))?;
        let mut read = Self::parse(&printed, links(Path::new("/dev/disk")), multi_device(Path::new("/sys/fs/btrfs")))?;
        read.parts.iter_mut().for_each(Partition::detect_torn_ext);
        read.parts.iter_mut().for_each(|part| part.index = index(Path::new("/sys/class/block"), &part.kname));
        Ok(read)
    }

    /// An inventory from the output of `lsblk --json --list`, the links to each device by its kernel name, and the UUIDs of btrfs file
    /// systems with several devices.
    ///
    /// # Errors
    /// The output can't be understood.
    pub fn parse(json: &[u8], links: BTreeMap<String, BTreeSet<String>>, multi_device: BTreeSet<String>) -> Result<Self> {
        #[derive(Deserialize)]
        struct Printed {
            blockdevices: Vec<Partition>,
        }
        let printed: Printed = serde_json::from_slice(json).context("the output of lsblk can't be understood")?;
        let mut parts = printed.blockdevices;
        let mappings: Vec<Partition> = parts.iter().filter(|part| part.kind == "crypt").cloned().collect();
        for part in parts.iter_mut().filter(|part| part.fstype.as_deref() == Some("crypto_LUKS")) {
            part.set_container(mappings.iter().find(|mapping| mapping.pkname.as_ref() == Some(&part.kname)));
        }
        Ok(Self { parts, links, multi_device })
    }

    /// The partition with this PARTUUID, or None if it is missing.
    ///
    /// # Errors
    /// Two partitions have this PARTUUID, as after a copy with dd(1) (failure mode 3).
    pub fn find(&self, wanted: &PartUuid) -> Result<Option<&Partition>> {
        let mut found = self.parts.iter().filter(|p| p.has_partuuid(wanted));
        let first = found.next();
        if let (Some(a), Some(b)) = (first, found.next()) {
            bail!(
                "{} and {} both have the PARTUUID {wanted}. Give the copy a new one ('sgdisk --partition-guid=N:R DISK')",
                a.path,
                b.path
            );
        }
        Ok(first)
    }

    /// Whether the partition with this PARTUUID is present and is a LUKS container that isn't open.
    pub fn is_closed(&self, wanted: &PartUuid) -> bool {
        self.find(wanted).is_ok_and(|part| part.is_some_and(Partition::is_closed))
    }

    /// The other partitions of the disk that this one is on.
    pub fn others_on_disk<'a>(&'a self, part: &'a Partition) -> impl Iterator<Item = &'a Partition> {
        self.parts.iter().filter(move |other| other.pkname.is_some() && other.pkname == part.pkname && other.kname != part.kname)
    }

    /// All partitions and other block devices.
    pub fn all(&self) -> impl Iterator<Item = &Partition> {
        self.parts.iter()
    }

    /// The labels of all file systems and the names of all partitions, except those on the disk with this device node.
    pub fn labels_on_other_disks(&self, disk: &str) -> BTreeSet<String> {
        let kname = self.parts.iter().find(|part| part.path == disk).map(|part| part.kname.as_str());
        let others =
            self.parts.iter().filter(|part| part.path != disk && (part.pkname.is_none() || part.pkname.as_deref() != kname));
        others.flat_map(|part| [part.label.clone(), part.partlabel.clone()]).flatten().collect()
    }

    /// The present partitions of a disk of the pair, by role.
    ///
    /// # Errors
    /// As [`Inventory::find`]; the partition of `esp=` isn't an ESP by its type, or isn't FAT.
    pub fn disk(&self, disk: &Disk) -> Result<BTreeMap<Role, &Partition>> {
        let mut found = BTreeMap::new();
        for (role, partuuid) in &disk.parts {
            let Some(part) = self.find(partuuid)? else { continue };
            if *role == Role::Esp {
                let kind = part.parttype.as_deref().unwrap_or("nothing").to_lowercase();
                if kind != ESP_TYPE {
                    bail!(
                        "{} (esp= of {}) is not an EFI system partition: its type is {kind}. Set it with 'sgdisk --typecode=N:ef00 DISK'",
                        part.path,
                        disk.name
                    );
                }
                let fs = part.fstype.as_deref().unwrap_or("nothing");
                if fs != "vfat" {
                    bail!("{} (esp= of {}) holds {fs}, not FAT. Make a FAT with 'mkfs.vfat -F32'", part.path, disk.name);
                }
            }
            found.insert(role.clone(), part);
        }
        Ok(found)
    }

    /// The identifiers of a disk's partitions. A missing partition has only its PARTUUID. Partitions that are on the same disk and not in
    /// the configuration get their device node as role: they have no counterpart on another disk, but a file that names them needs this
    /// disk.
    ///
    /// # Errors
    /// As [`Inventory::find`].
    pub fn ids(&self, config: &Config, disk: &Disk) -> Result<DiskIds> {
        let mut parts = BTreeMap::new();
        for (role, &partuuid) in &disk.parts {
            let mut ids = PartIds::new(partuuid);
            if let Some(part) = self.find(&partuuid)? {
                ids.uuid = part.uuid.clone();
                ids.label = part.label.clone();
                ids.container = part.container.as_ref().map(|container| container.ids.clone());
                ids.partlabel = part.partlabel.clone();
                ids.paths = self.paths(part);
            }
            parts.insert(role.clone(), ids);
        }
        for (role, ids) in self.unnamed(config, disk)? {
            parts.insert(role, ids);
        }
        Ok(DiskIds { name: disk.name, parts })
    }

    fn paths(&self, part: &Partition) -> BTreeSet<String> {
        let links = self.links.get(&part.kname).cloned().unwrap_or_default();
        links.into_iter().chain([part.path.clone()]).collect()
    }

    /// The partitions on the same disk that the configuration doesn't name. An identifier that another partition has too, as in a RAID,
    /// doesn't identify a disk, and is left out; so is that of a btrfs with several devices, of which the others may be missing, or may
    /// have been added after udev's last look.
    fn unnamed(&self, config: &Config, disk: &Disk) -> Result<Vec<(Role, PartIds)>> {
        let mut whole: BTreeMap<&str, BTreeSet<DiskName>> = BTreeMap::new();
        let mut named = BTreeSet::new();
        for (name, partuuid) in config.disks.iter().flat_map(|d| d.parts.values().map(|p| (d.name, p))) {
            if let Some(part) = self.find(partuuid)? {
                named.insert(part.path.as_str());
                whole.entry(part.pkname.as_deref().unwrap_or_default()).or_default().insert(name);
            }
        }
        let only = |value: &Option<String>, of: fn(&Partition) -> &Option<String>| {
            let value = value.clone().filter(|v| !v.is_empty())?;
            (self.parts.iter().filter(|p| of(p).as_ref() == Some(&value)).count() == 1).then_some(value)
        };
        let mut found = Vec::new();
        for part in &self.parts {
            let beside = part.pkname.as_deref().and_then(|disk| whole.get(disk));
            let Some(partuuid) = only(&part.partuuid, |p| &p.partuuid).and_then(|p| PartUuid::parse(&p).ok()) else { continue };
            if beside.is_some_and(|disks| disks.len() == 1 && disks.contains(&disk.name)) && !named.contains(part.path.as_str()) {
                let multi_device = part.uuid.as_ref().is_some_and(|uuid| self.multi_device.contains(uuid));
                let ids = PartIds {
                    uuid: only(&part.uuid, |p| &p.uuid).filter(|_| !multi_device),
                    label: only(&part.label, |p| &p.label).filter(|_| !multi_device),
                    container: part.container.as_ref().map(|container| container.ids.clone()),
                    partlabel: only(&part.partlabel, |p| &p.partlabel),
                    paths: self.paths(part),
                    ..PartIds::new(partuuid)
                };
                found.push((Role::Dir(DirPath::parse(&part.path)?), ids));
            }
        }
        Ok(found)
    }

    /// Checks that no other partition of the machine has the UUID of a file system or LUKS container of the pair: chance would decide
    /// which one is mounted (failure mode 3). Devices of a shared root have the same UUID, but no section names them.
    ///
    /// # Errors
    /// Two partitions have the same UUID.
    pub fn check_unique(&self, config: &Config) -> Result<()> {
        for disk in &config.disks {
            for partuuid in disk.parts.values() {
                let Some(part) = self.find(partuuid)? else { continue };
                for uuid in part.uuids() {
                    let same =
                        |p: &&Partition| p.path != part.path && p.partuuid.is_some() && p.uuids().any(|other| other == uuid);
                    if let Some(twin) = self.parts.iter().find(same) {
                        bail!(
                            "{} and {} both hold a file system or LUKS container with the UUID {uuid}. Give the copy a new one \
                             (tune2fs -U random, btrfstune -u, xfs_admin -U generate, mlabel -n, cryptsetup luksUUID)",
                            part.path,
                            twin.path
                        );
                    }
                }
            }
        }
        Ok(())
    }
}

/// The number of a partition in the partition table, as the kernel has it: lsblk prints it from version 2.39 on only.
fn index(sys: &Path, kname: &str) -> Option<u32> {
    fs::read_to_string(sys.join(kname).join("partition")).ok()?.trim().parse().ok()
}

/// UUID and label from an ext2, ext3 or ext4 superblock, whatever its checksum (Linux, fs/ext4/ext4.h).
fn ext(block: &[u8; 1024]) -> Option<(String, Option<String>)> {
    if block.get(0x38..0x3a)? != [0x53, 0xef] {
        return None;
    }
    let uuid = Uuid::from_slice(block.get(0x68..0x78)?).ok()?.to_string();
    let label = block.get(0x78..0x88)?.split(|byte| *byte == 0).next()?;
    Some((uuid, std::str::from_utf8(label).ok().filter(|label| !label.is_empty()).map(str::to_owned)))
}

/// udev's links in the directories below `dir`, by the kernel's name of their device.
fn links(dir: &Path) -> BTreeMap<String, BTreeSet<String>> {
    let mut found: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for kind in fs::read_dir(dir).into_iter().flatten().flatten() {
        for link in fs::read_dir(kind.path()).into_iter().flatten().flatten() {
            let leads = fs::read_link(link.path()).ok();
            let kname = leads.as_deref().and_then(Path::file_name).and_then(|n| n.to_str());
            if let (Some(kname), Some(path)) = (kname, link.path().to_str()) {
                found.entry(kname.to_owned()).or_default().insert(path.to_owned());
            }
        }
    }
    found
}

/// The UUIDs of mounted btrfs file systems with several devices, missing ones included: each has a directory below /sys/fs/btrfs, whose
/// devinfo/ has an entry for each device (Linux, fs/btrfs/sysfs.c).
fn multi_device(dir: &Path) -> BTreeSet<String> {
    let several = |uuid: &String| fs::read_dir(dir.join(uuid).join("devinfo")).is_ok_and(|devices| devices.count() > 1);
    let names = fs::read_dir(dir).into_iter().flatten().flatten().filter_map(|entry| entry.file_name().into_string().ok());
    names.filter(several).collect()
}

#[cfg(test)]
mod tests {
    use nix::sys::stat::makedev;

    use super::*;
    use crate::names::ident::Rewriter;
    use crate::proof::prove;

    const CONF: &str = "[disk0]\nesp=aaaaaaaa-0000-4000-8000-000000000001\nroot=aaaaaaaa-0000-4000-8000-000000000002\n\
        [disk1]\nesp=bbbbbbbb-0000-4000-8000-000000000001\nroot=bbbbbbbb-0000-4000-8000-000000000002\n";

    fn line(kname: &str, start: &str, n: u32, uuid: &str, label: &str) -> String {
        format!(
            r#"{{"kname":"{kname}{n}","pkname":"{kname}","path":"/dev/{kname}{n}","maj:min":"8:{n}","fstype":"ext4","uuid":"{uuid}",
               "label":{label},"partuuid":"{start}-0000-4000-8000-00000000000{n}","partlabel":null,"parttype":null,"log-sec":512}}"#
        )
    }

    #[test]
    fn f24_an_ext4_with_a_torn_superblock_is_recognised() {
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(8 << 20).unwrap();
        let uuid = "cccccccc-0000-4000-8000-000000000001";
        let made =
            program::command("mke2fs").unwrap().args(["-qF", "-t", "ext4", "-U", uuid, "-L", "boot"]).arg(image.path()).output();
        assert!(made.unwrap().status.success());
        image.as_file().write_all_at(&[0; 4], 1024 + 0x3fc).unwrap();
        let path = image.path().to_str().unwrap();
        let line = |fstype: &str, partuuid: &str| {
            let text = format!(
                r#"{{"kname":"sda1","path":"{path}","maj:min":"8:1","fstype":{fstype},"uuid":null,"label":null,"partuuid":{partuuid},
                   "partlabel":null,"parttype":null,"log-sec":512}}"#
            );
            let mut part: Partition = serde_json::from_str(&text).unwrap();
            part.detect_torn_ext();
            (part.fstype, part.uuid, part.label)
        };
        let part = r#""bbbbbbbb-0000-4000-8000-000000000001""#;
        assert_eq!(line("null", part), (Some("ext4".into()), Some(uuid.into()), Some("boot".into())));
        assert_eq!(line("null", "null"), (None, None, None));
        assert_eq!(line(r#""swap""#, part), (Some("swap".into()), None, None));
        image.as_file().write_all_at(&[0; 2], 1024 + 0x38).unwrap();
        assert_eq!(line("null", part), (None, None, None));
    }

    #[test]
    fn an_open_container_shows_the_file_system_inside() {
        let luks = |n: u32, uuid: &str| line("sda", "aaaaaaaa", n, uuid, r#""box""#).replace("ext4", "crypto_LUKS");
        let mapping = r#"{"kname":"dm-0","pkname":"sda2","path":"/dev/mapper/x","maj:min":"253:0","type":"crypt","fstype":"xfs",
            "uuid":"inside","label":null,"partuuid":null,"partlabel":null,"parttype":null,"log-sec":512}"#;
        let json = format!(r#"{{"blockdevices":[{},{mapping},{}]}}"#, luks(2, "open"), luks(3, "closed"));
        let inventory = Inventory::parse(json.as_bytes(), BTreeMap::new(), BTreeSet::new()).unwrap();
        let [open, _, closed] = &inventory.parts[..] else { panic!() };
        let shown = |part: &Partition| {
            let container = part.container.as_ref().and_then(|c| Some((c.ids.uuid.clone()?, c.ids.label.clone()?)));
            (part.path.clone(), part.node().to_owned(), part.uuid.clone(), container, part.is_closed())
        };
        let container = |uuid: &str| Some((uuid.to_owned(), "box".to_owned()));
        let nodes = |path: &str, node: &str| (path.to_owned(), node.to_owned());
        let (path, node) = nodes("/dev/sda2", "/dev/mapper/x");
        assert_eq!(shown(open), (path, node, Some("inside".into()), container("open"), false));
        let (path, node) = nodes("/dev/sda3", "/dev/sda3");
        assert_eq!(shown(closed), (path, node, None, container("closed"), true));
        assert_eq!((open.device().unwrap(), closed.device().unwrap()), (makedev(253, 0), makedev(8, 3)));
        let config = Config::parse(&[("dualroot.conf".into(), CONF.into())]).unwrap().unwrap();
        let ids = inventory.ids(&config, &config.disks[0]).unwrap();
        let root = &ids.parts[&Role::Root];
        assert_eq!((root.uuid.as_deref(), root.paths.contains("/dev/mapper/x")), (Some("inside"), false));
        assert_eq!(root.container.as_ref().and_then(|c| c.uuid.as_deref()), Some("open"));
    }

    #[test]
    fn f03_two_containers_with_one_uuid_are_refused() {
        let luks = |disk: &str, start: &str| {
            line(disk, start, 2, "cccccccc-0000-4000-8000-000000000001", "null").replace("ext4", "crypto_LUKS")
        };
        let json = format!(r#"{{"blockdevices":[{},{}]}}"#, luks("sda", "aaaaaaaa"), luks("sdb", "bbbbbbbb"));
        let inventory = Inventory::parse(json.as_bytes(), BTreeMap::new(), BTreeSet::new()).unwrap();
        let config = Config::parse(&[("dualroot.conf".into(), CONF.into())]).unwrap().unwrap();
        let error = inventory.check_unique(&config).unwrap_err().to_string();
        assert!(error.starts_with("/dev/sda2 and /dev/sdb2 both hold"), "{error}");
    }

    #[test]
    fn a_partition_has_its_number_from_the_kernel() {
        let sys = tempfile::tempdir().unwrap();
        fs::create_dir_all(sys.path().join("nvme0n1p12")).unwrap();
        fs::create_dir_all(sys.path().join("dm-0")).unwrap();
        fs::write(sys.path().join("nvme0n1p12/partition"), "12\n").unwrap();
        let of = |kname: &str| index(sys.path(), kname);
        assert_eq!((of("nvme0n1p12"), of("dm-0"), of("sda")), (Some(12), None, None));
    }

    #[test]
    fn f14_a_line_that_names_a_partition_outside_the_configuration_needs_its_disk() {
        let uuid = |n: u32| format!("cccccccc-0000-4000-8000-0000000000{n:02}");
        let mut lines = Vec::new();
        for (kname, start, first) in [("sda", "aaaaaaaa", 0), ("sdb", "bbbbbbbb", 4)] {
            lines.push(line(kname, start, 1, &format!("AAAA-000{first}"), "null"));
            lines.push(line(kname, start, 2, &uuid(first + 2), "null"));
            lines.push(line(kname, start, 3, &uuid(first + 3), r#""data""#));
            // A mirror over both disks.
            lines.push(line(kname, start, 4, &uuid(9), r#""mirror""#));
        }
        // A mirror whose other half udev doesn't know, and a btrfs with one device.
        lines.push(line("sda", "aaaaaaaa", 5, &uuid(10), r#""half""#));
        lines.push(line("sda", "aaaaaaaa", 6, &uuid(11), "null"));
        let sys = tempfile::tempdir().unwrap();
        for device in [uuid(10) + "/devinfo/1", uuid(10) + "/devinfo/2", uuid(11) + "/devinfo/1", "features".into()] {
            fs::create_dir_all(sys.path().join(device)).unwrap();
        }
        let json = format!(r#"{{"blockdevices":[{}]}}"#, lines.join(","));
        let inventory = Inventory::parse(json.as_bytes(), BTreeMap::new(), multi_device(sys.path())).unwrap();
        let config = Config::parse(&[("dualroot.conf".into(), CONF.into())]).unwrap().unwrap();
        let ids: Vec<DiskIds> = config.disks.iter().map(|d| inventory.ids(&config, d).unwrap()).collect();
        let rewriter = Rewriter::new(&ids[1], &ids).unwrap();
        let fstab = |line: &str| {
            let files = BTreeMap::from([("/etc/fstab".to_owned(), rewriter.rewrite(format!("{line}\n").as_bytes()))]);
            prove::root_files(&files, &rewriter, |_| false).len()
        };
        for (line, faults) in [
            (format!("UUID={} / ext4 defaults 0 1", uuid(2)), 0),
            (format!("UUID={} /data ext4 defaults 0 2", uuid(3)), 1),
            (format!("UUID={} /data ext4 nofail 0 2", uuid(3)), 0),
            (format!("UUID={} none swap sw 0 0", uuid(3)), 1),
            ("/dev/sda3 none swap sw 0 0".to_owned(), 1),
            ("LABEL=data /data ext4 defaults 0 2".to_owned(), 0),
            (format!("UUID={} /mirror btrfs defaults 0 0", uuid(9)), 0),
            (format!("UUID={} /half btrfs defaults 0 0", uuid(10)), 0),
            ("LABEL=half /half btrfs defaults 0 0".to_owned(), 0),
            (format!("UUID={} /one btrfs defaults 0 0", uuid(11)), 1),
            (format!("UUID={} /data ext4 defaults 0 2", uuid(7)), 0),
        ] {
            assert_eq!(fstab(&line), faults, "{line}");
        }
        let crypttab = |line: &str| {
            let files = BTreeMap::from([("/etc/crypttab".to_owned(), format!("{line}\n").into_bytes())]);
            prove::root_files(&files, &rewriter, |_| false).len()
        };
        assert_eq!(crypttab(&format!("swap UUID={} /dev/urandom swap", uuid(3))), 1);
        assert_eq!(crypttab(&format!("data UUID={} none luks,nofail", uuid(3))), 0);
        // These lines format the device with this path: on a copy, that may be a file system.
        for (device, options, faults) in [
            ("/dev/sda3", "swap,nofail", 1),
            ("/dev/sda3", "noauto,tmp=ext4", 1),
            ("/dev/sda3", "luks,nofail", 0),
            (&format!("UUID={}", uuid(3)), "swap,nofail", 0),
            (&format!("/dev/disk/by-uuid/{}", uuid(3)), "nofail,tmp", 0),
            ("/dev/sdz9", "swap,nofail", 0),
        ] {
            assert_eq!(crypttab(&format!("x {device} /dev/urandom {options}")), faults, "{device} {options}");
        }
    }
}
