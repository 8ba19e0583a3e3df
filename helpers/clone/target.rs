//! The disk to erase: its contents, and whether it may be erased.

use std::fmt::Write as _;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use anyhow::{Context, Result, bail};
use nix::libc;
use serde::Deserialize;

use crate::base::program;
use crate::base::refusal::refused;
use crate::base::root::Root;
use crate::base::types::{DiskName, PartUuid};
use crate::clone::plan::mib;
use crate::conf::Config;
use crate::devices::inventory::ESP_TYPE;
use crate::devices::luks;
use crate::pair::machine::booted_esp;

/// A block device as lsblk shows it, with its partitions and the devices that use it.
#[derive(Clone, Debug, Deserialize)]
struct Device {
    kname: String,
    path: String,
    r#type: String,
    size: u64,
    model: Option<String>,
    serial: Option<String>,
    ro: bool,
    fstype: Option<String>,
    label: Option<String>,
    uuid: Option<String>,
    partuuid: Option<String>,
    partlabel: Option<String>,
    partflags: Option<String>,
    parttype: Option<String>,
    #[serde(default)]
    mountpoints: Vec<Option<String>>,
    #[serde(rename = "log-sec")]
    sector: u64,
    #[serde(default)]
    children: Vec<Device>,
}

/// A disk that is not in use and not in the pair.
#[derive(Debug)]
pub struct Target {
    device: Device,
    /// Its size in bytes.
    pub bytes: u64,
    /// The size of its sectors in bytes.
    pub sector: u64,
    /// While it is open, no other disk can get its name.
    file: File,
}

// Without NAME, lsblk prints a list and no tree.
const COLUMNS: &str =
    "NAME,KNAME,PATH,TYPE,SIZE,MODEL,SERIAL,RO,FSTYPE,LABEL,UUID,PARTUUID,PARTLABEL,PARTFLAGS,PARTTYPE,MOUNTPOINTS,LOG-SEC";

impl Target {
    /// Probes the disk with this path. If an earlier clone to it was interrupted, its partitions may be among those that have `joined` the
    /// shared root, which are given by the kernel's names.
    ///
    /// # Errors
    /// A refusal: no disk, a disk that is mounted or in use, or one of the pair.
    pub fn probe(path: &Path, config: Option<&Config>, joined: Option<&[String]>) -> Result<Self> {
        let shown = path.display();
        // The path may be one of udev's links.
        let path = fs::canonicalize(path).map_err(|e| refused(format!("{shown}: {e}; 'lsblk -d' shows the disks")))?;
        let file = File::open(&path).map_err(|e| refused(format!("{shown} can't be opened: {e}")))?;
        let arguments = ["--json".into(), "--bytes".into(), "--output".into(), COLUMNS.into(), path.clone().into_os_string()];
        let read = || {
            let printed = program::output("lsblk", arguments.clone());
            parse(&printed.map_err(|e| refused(format!("lsblk can't show {shown}: {e:#}; 'lsblk -d' shows the disks")))?)
        };
        let mut device = read()?;
        let open = device.left_open(config);
        open.iter().try_for_each(luks::close)?;
        if !open.is_empty() {
            device = read()?;
        }
        let joined = joined.filter(|_| device.unfinished().is_some()).unwrap_or_default();
        check(&device, config, joined)?;
        if let Ok((_, esp)) = booted_esp(&Root::new("/")) {
            device.check_booted(esp)?;
        }
        // The kernel holds a whole disk while a partition of it is in use.
        for part in device.all().into_iter().filter(|part| !part.is_among(joined) && (joined.is_empty() || part.r#type == "part"))
        {
            let path = &part.path;
            // The kernel doesn't hold a device of a mounted btrfs that was unplugged and came back.
            if let Some(uuid) = part.uuid.as_deref().filter(|uuid| Path::new("/sys/fs/btrfs").join(uuid).exists()) {
                return Err(refused(format!("{path} belongs to a btrfs that is in use, {uuid}; nothing was done")));
            }
            // The kernel holds each device of a mounted file system, and others that lsblk doesn't show as used.
            let opened = OpenOptions::new().read(true).custom_flags(libc::O_EXCL).open(path);
            opened.map_err(|e| refused(format!("{path} is in use ({e}); nothing was done")))?;
        }
        let (bytes, sector) = (device.size, device.sector);
        Ok(Self { device, bytes, sector, file })
    }

    /// The path of its device node.
    pub fn path(&self) -> &str {
        &self.device.path
    }

    /// The kernel's name for it, as `sdb`.
    pub fn kname(&self) -> &str {
        &self.device.kname
    }

    /// Its serial number, where it has one.
    pub fn serial(&self) -> Option<&str> {
        self.device.serial.as_deref().map(str::trim).filter(|serial| !serial.is_empty())
    }

    /// Whether a text names it: its path, the kernel's name for it, or its serial number.
    pub fn is_named(&self, text: &str) -> bool {
        let is_path = || fs::canonicalize(text).is_ok_and(|path| path == Path::new(self.path()));
        !text.is_empty() && (text == self.device.kname || Some(text) == self.serial() || is_path())
    }

    /// The device nodes of its partitions. The ESP comes first: once it is erased, no firmware boots the others.
    pub fn partitions(&self) -> Vec<&str> {
        let is_esp = |part: &&Device| part.parttype.as_deref().is_some_and(|kind| kind.eq_ignore_ascii_case(ESP_TYPE));
        let (esps, others): (Vec<_>, Vec<_>) = self.device.children.iter().partition(is_esp);
        [esps, others].concat().into_iter().map(|part| part.path.as_str()).collect()
    }

    /// A table of its contents.
    pub fn table(&self) -> String {
        let device = &self.device;
        let words = [device.model.as_deref().unwrap_or_default().trim(), self.serial().unwrap_or("no serial number")];
        let words = words.join(" ");
        let mut text = format!("{}: {} MiB, {}\n", device.path, mib(device.size), words.trim().escape_debug());
        for part in &device.children {
            let names = [&part.fstype, &part.label, &part.partlabel]
                .map(|name| name.as_deref().unwrap_or("-").escape_debug().to_string());
            let [fstype, label, name] = names;
            let _ = writeln!(text, "  {:<16} {:>10} MiB  {fstype:<8} {label:<16} {name}", part.path, mib(part.size));
        }
        if device.unfinished().is_some() {
            text.push_str("  A clone to it was interrupted: it was to become a spare, and that was not finished.\n");
        }
        if device.children.is_empty() {
            let _ = writeln!(text, "  {}", device.fstype.as_deref().unwrap_or("no partitions"));
        }
        text
    }

    /// The ESP, if it has the mark of an interrupted clone.
    pub fn unfinished(&self) -> Option<PartUuid> {
        self.device.unfinished()
    }

    /// Checks that its path still leads to the disk that the user was asked about.
    ///
    /// # Errors
    /// A path that leads elsewhere.
    pub fn check_same(&self) -> Result<()> {
        let now = fs::metadata(self.path()).map(|meta| meta.rdev()).ok();
        let was = self.file.metadata().context("the disk can't be read any more")?.rdev();
        match now == Some(was) {
            true => Ok(()),
            false => {
                bail!("{} is no longer the disk that you were asked about: that was unplugged, or got another name", self.path())
            }
        }
    }
}

impl Device {
    /// The device and all devices below it.
    fn all(&self) -> Vec<&Self> {
        let mut all = vec![self];
        all.extend(self.children.iter().flat_map(Device::all));
        all
    }

    /// The ESP, if it has the attribute [`crate::clone::plan::UNFINISHED`].
    fn unfinished(&self) -> Option<PartUuid> {
        let marked = self.children.iter().find(|part| part.partflags.as_deref().is_some_and(is_marked))?;
        marked.partuuid()
    }

    /// The LUKS containers that an interrupted clone has left open; those of the pair's disks are not among them.
    fn left_open(&self, config: Option<&Config>) -> Vec<PartUuid> {
        let parts = self.children.iter().filter(|part| disk_of(part, config).is_none());
        let open = |part: &Self| {
            let partuuid = part.partuuid()?;
            let is_ours = |child: &Self| child.path == partuuid.mapping() && child.mountpoints.iter().flatten().next().is_none();
            part.children.iter().any(is_ours).then_some(partuuid)
        };
        parts.filter_map(open).collect()
    }

    /// Checks that the ESP that was booted is not on it, which is not seen from the mounts if that is unmounted.
    fn check_booted(&self, esp: PartUuid) -> Result<()> {
        match self.all().into_iter().find(|part| part.partuuid() == Some(esp)) {
            Some(part) => Err(refused(format!("{} is the ESP that this machine was booted from; nothing was done", part.path))),
            None => Ok(()),
        }
    }

    fn partuuid(&self) -> Option<PartUuid> {
        PartUuid::parse(self.partuuid.as_deref()?).ok()
    }

    fn is_among(&self, knames: &[String]) -> bool {
        knames.contains(&self.kname)
    }
}

fn parse(printed: &[u8]) -> Result<Device> {
    #[derive(Deserialize)]
    struct Printed {
        blockdevices: Vec<Device>,
    }
    let printed: Printed = serde_json::from_slice(printed).context("the output of lsblk can't be understood")?;
    printed.blockdevices.into_iter().next().context("lsblk printed nothing")
}

/// Whether a partition's attributes, as lsblk shows them, have bit 1: [`crate::clone::plan::UNFINISHED`].
fn is_marked(flags: &str) -> bool {
    flags.strip_prefix("0x").and_then(|hex| u64::from_str_radix(hex, 16).ok()).is_some_and(|bits| bits & 2 != 0)
}

/// Checks that a disk may be erased. Its partitions that are `joined` stay, and are not checked.
fn check(device: &Device, config: Option<&Config>, joined: &[String]) -> Result<()> {
    let path = &device.path;
    if device.r#type != "disk" {
        return Err(refused(format!(
            "{path} is no disk (type {}); name the whole disk ('lsblk -d' shows the disks)",
            device.r#type
        )));
    }
    for part in device.all().into_iter().filter(|part| !part.is_among(joined)) {
        if let Some(place) = part.mountpoints.iter().flatten().next() {
            let place = if place == "[SWAP]" { "in use as swap space".to_owned() } else { format!("mounted on {place}") };
            return Err(refused(format!("{} is {place}; nothing was done", part.path)));
        }
        if let Some(disk) = disk_of(part, config) {
            return Err(refused(format!(
                "{} belongs to {disk} of the pair; to make {disk} again on this disk, erase it yourself first ('wipefs -a' on its \
                 partitions, then on {path}), and run this again with '--replace {disk}'",
                part.path
            )));
        }
        if let Some(user) = part.children.iter().find(|child| child.r#type != "part") {
            return Err(refused(format!("{} is used by {} ({}); nothing was done", part.path, user.path, user.r#type)));
        }
    }
    match device.ro {
        true => Err(refused(format!("{path} is read-only; nothing was done"))),
        false => Ok(()),
    }
}

/// The disk of the pair that a partition belongs to.
fn disk_of(part: &Device, config: Option<&Config>) -> Option<DiskName> {
    let partuuid = part.partuuid()?;
    config?.disks.iter().find(|disk| disk.parts.values().any(|of| *of == partuuid)).map(|disk| disk.name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::refusal::Refused;

    fn device(json: &str) -> Device {
        parse(format!(r#"{{"blockdevices":[{json}]}}"#).as_bytes()).unwrap()
    }

    fn node(path: &str, kind: &str, more: &str) -> String {
        format!(
            r#"{{"kname":"{}","path":"{path}","type":"{kind}","size":1073741824,"model":"A disk","serial":"123","ro":false,"fstype":null,
               "label":null,"uuid":null,"partuuid":null,"partlabel":null,"log-sec":512{more}}}"#,
            path.trim_start_matches("/dev/")
        )
    }

    fn why(json: &str, config: Option<&Config>) -> String {
        let error = check(&device(json), config, &[]).unwrap_err();
        assert!(error.is::<Refused>());
        error.to_string()
    }

    #[test]
    fn f04_a_disk_in_use_is_not_erased() {
        check(&device(&node("/dev/sdb", "disk", "")), None, &[]).unwrap();
        let part = |more: &str| format!(r#","children":[{}]"#, node("/dev/sdb1", "part", more));
        check(&device(&node("/dev/sdb", "disk", &part(r#","mountpoints":[null]"#))), None, &[]).unwrap();
        for (more, expected) in [
            (part(r#","mountpoints":[null,"/mnt"]"#), "/dev/sdb1 is mounted on /mnt"),
            (part(r#","mountpoints":["[SWAP]"]"#), "/dev/sdb1 is in use as swap space"),
            (r#","mountpoints":["/srv"]"#.to_owned(), "/dev/sdb is mounted on /srv"),
            (
                part(&format!(r#","children":[{}]"#, node("/dev/mapper/x", "crypt", ""))),
                "/dev/sdb1 is used by /dev/mapper/x (crypt)",
            ),
            (format!(r#","children":[{}]"#, node("/dev/md0", "raid1", "")), "/dev/sdb is used by /dev/md0 (raid1)"),
        ] {
            let found = why(&node("/dev/sdb", "disk", &more), None);
            assert!(found.starts_with(expected), "{found}");
        }
        assert!(why(&node("/dev/sdb1", "part", ""), None).contains("is no disk (type part)"));
        assert!(why(&node("/dev/sdb", "disk", "").replace("\"ro\":false", "\"ro\":true"), None).contains("read-only"));
    }

    #[test]
    fn containers_that_an_interrupted_clone_left_open_are_known() {
        let id = |n| format!("aaaaaaaa-0000-4000-8000-00000000000{n}");
        let text = format!("[disk0]\nesp={}\nroot={}\n[disk1]\nesp={}\nroot={}\n", id(1), id(2), id(3), id(4));
        let config = Config::parse(&[("x".to_owned(), text.into_bytes())]).unwrap().unwrap();
        let disk = |n: u32, mapped: &str, more: &str| {
            let open = format!(r#","partuuid":"{}","children":[{}]"#, id(n), node(mapped, "crypt", more));
            let part = node("/dev/sdb2", "part", "").replace(r#","partuuid":null"#, &open);
            device(&node("/dev/sdb", "disk", &format!(r#","children":[{part}]"#))).left_open(Some(&config)).len()
        };
        let ours = |n| format!("/dev/mapper/dualroot-{}", id(n));
        assert_eq!(disk(5, &ours(5), ""), 1);
        assert_eq!(disk(4, &ours(4), ""), 0, "a spare's");
        assert_eq!(disk(5, "/dev/mapper/data", ""), 0);
        assert_eq!(disk(5, &ours(5), r#","mountpoints":["/mnt"]"#), 0);
    }

    #[test]
    fn the_esp_is_erased_first() {
        let parts = [(1, "0fc63daf-8483-4772-8e79-3d69d8477de4"), (2, "C12A7328-F81F-11D2-BA4B-00A0C93EC93B"), (3, ESP_TYPE)];
        let parts = parts.map(|(n, kind)| node(&format!("/dev/sdb{n}"), "part", &format!(r#","parttype":"{kind}""#)));
        let device = device(&node("/dev/sdb", "disk", &format!(r#","children":[{}]"#, parts.join(","))));
        let target = Target { device, bytes: 0, sector: 512, file: File::open("/dev/null").unwrap() };
        assert_eq!(target.partitions(), ["/dev/sdb2", "/dev/sdb3", "/dev/sdb1"]);
    }

    #[test]
    fn the_mark_is_one_of_the_attributes() {
        assert!(["0x2", "0x3", "0x8000000000000002"].into_iter().all(is_marked));
        assert!(!["0x1", "0x4", "0x8000000000000000", "", "2", "0xx"].into_iter().any(is_marked));
    }

    #[test]
    fn f04_a_disk_of_the_pair_is_not_erased() {
        let id = |n| format!("aaaaaaaa-0000-4000-8000-00000000000{n}");
        let text = format!("[disk0]\nesp={}\n[disk1]\nesp={}\n", id(1), id(2));
        let config = Config::parse(&[("x".to_owned(), text.into_bytes())]).unwrap().unwrap();
        let part = |n| node("/dev/sdb1", "part", "").replace(r#""partuuid":null"#, &format!(r#""partuuid":"{}""#, id(n)));
        let disk = |n| node("/dev/sdb", "disk", &format!(r#","children":[{}]"#, part(n)));
        let found = why(&disk(2), Some(&config));
        assert!(found.starts_with("/dev/sdb1 belongs to disk1 of the pair"), "{found}");
        check(&device(&disk(3)), Some(&config), &[]).unwrap();
        let booted = |n| device(&disk(3)).check_booted(PartUuid::parse(&id(n)).unwrap());
        assert!(booted(3).unwrap_err().to_string().starts_with("/dev/sdb1 is the ESP that this machine was booted from"));
        booted(4).unwrap();
        device(&node("/dev/sdb", "disk", "")).check_booted(PartUuid::parse(&id(3)).unwrap()).unwrap();
    }

    #[test]
    fn f04_a_device_of_the_shared_root_stays_after_an_interrupted_clone() {
        let flags = |flags: &str| format!(r#","partflags":{flags},"partuuid":"aaaaaaaa-0000-4000-8000-000000000001""#);
        let disk = |esp: &str| {
            let esp = node("/dev/sdb1", "part", "").replace(r#","partuuid":null"#, &flags(esp));
            let root = node("/dev/sdb2", "part", r#","mountpoints":["/"]"#);
            device(&node("/dev/sdb", "disk", &format!(r#","children":[{esp},{root}]"#)))
        };
        assert!(disk(r#""0x2""#).unfinished().is_some() && disk("null").unfinished().is_none());
        let joined = ["sdb2".to_owned()];
        check(&disk(r#""0x2""#), None, &joined).unwrap();
        for joined in [&[][..], &["sda2".to_owned()], &["sdb1".to_owned()]] {
            assert!(check(&disk(r#""0x2""#), None, joined).unwrap_err().to_string().contains("/dev/sdb2 is mounted on /"));
        }
    }
}
