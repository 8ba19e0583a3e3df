//! The saved layouts of the pair's disks, from which a lost disk can be made again: partition tables in the form of sfdisk(8), and the
//! kind of content of each partition.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::base::program;
use crate::base::root::Root;
use crate::base::types::{DiskName, PartUuid, Role};
use crate::conf::{Config, Disk, Layout};
use crate::devices::inventory::{Inventory, Partition};
use crate::devices::mounts;
use crate::write::state;

/// The file's name in [`state::DIRECTORY`].
pub const NAME: &str = "layout.json";

/// The saved layout of a partition.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct PartLayout {
    /// The role that the configuration gives it; `root` also for a device of a shared root.
    pub role: Option<Role>,
    /// Its PARTUUID.
    pub partuuid: PartUuid,
    /// Its size in bytes.
    pub bytes: u64,
    /// The GUID of its type, as sfdisk writes it.
    pub kind: String,
    /// Its name in the GPT.
    pub name: Option<String>,
    /// Its attributes in the GPT, as sfdisk writes them.
    pub attributes: String,
    /// The UUID of the LUKS container on it; the fields below then describe the content of the container.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub container: Option<String>,
    /// The type of its content by blkid(8): `ext4`, `swap`, …
    pub fstype: Option<String>,
    /// The UUID of the content.
    pub uuid: Option<String>,
    /// The label of the content.
    pub label: Option<String>,
}

/// The saved layout of a disk.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct DiskLayout {
    /// Its name in the configuration.
    pub name: DiskName,
    /// The size of its sectors in bytes.
    pub sector: u64,
    /// Its partition table as lines of input for `sfdisk DISK`. They name no device.
    pub table: Vec<String>,
    /// Its partitions, in their order on the disk.
    pub partitions: Vec<PartLayout>,
}

/// The output of `sfdisk --json`.
#[derive(Deserialize)]
struct Printed {
    partitiontable: Table,
}

#[derive(Deserialize)]
struct Table {
    label: String,
    id: String,
    #[serde(default = "default_sector")]
    sectorsize: u64,
    #[serde(default)]
    partitions: Vec<Row>,
}

#[derive(Deserialize)]
struct Row {
    start: u64,
    size: u64,
    r#type: String,
    uuid: PartUuid,
    name: Option<String>,
    attrs: Option<String>,
}

fn default_sector() -> u64 {
    512
}

impl DiskLayout {
    /// Reads the layout of the disk with the ESP in `roles`, which gives each known partition its role.
    ///
    /// # Errors
    /// The ESP is missing; sfdisk fails; the partition table isn't GPT.
    pub fn read(name: DiskName, inventory: &Inventory, roles: &BTreeMap<Role, PartUuid>) -> Result<Self> {
        let esp = roles.get(&Role::Esp).context("the disk has no esp=")?;
        let part = inventory.find(esp)?.with_context(|| format!("the ESP {esp} of {name} is missing"))?;
        let disk = part.disk().with_context(|| format!("{} is not a partition", part.path))?;
        let printed = program::output("sfdisk", ["--json", &format!("/dev/{disk}")].map(Into::into))?;
        Self::parse(&printed, name, inventory, roles).with_context(|| format!("/dev/{disk}"))
    }

    pub(crate) fn parse(printed: &[u8], name: DiskName, inventory: &Inventory, roles: &BTreeMap<Role, PartUuid>) -> Result<Self> {
        let printed: Printed = serde_json::from_slice(printed).context("the output of sfdisk can't be understood")?;
        let mut table = printed.partitiontable;
        if table.label != "gpt" {
            bail!("its partition table is {}, not GPT", table.label);
        }
        table.partitions.sort_by_key(|row| row.start);
        let mut lines = vec!["label: gpt".to_owned(), format!("label-id: {}", table.id)];
        let mut partitions = Vec::new();
        for row in table.partitions {
            let (name, attributes) = (row.name.filter(|name| !name.is_empty()), row.attrs.unwrap_or_default());
            lines.push(line(row.start, row.size, &row.r#type, row.uuid, name.as_deref(), &attributes));
            let found = inventory.find(&row.uuid)?;
            let of =
                |value: fn(&Partition) -> &Option<String>| found.and_then(|part| value(part).clone()).filter(|v| !v.is_empty());
            partitions.push(PartLayout {
                role: roles.iter().find(|(_, named)| **named == row.uuid).map(|(role, _)| role.clone()),
                partuuid: row.uuid,
                bytes: row.size.saturating_mul(table.sectorsize),
                kind: row.r#type,
                name,
                attributes,
                container: found.and_then(|part| part.container.as_ref()?.ids.uuid.clone()),
                fstype: of(|part| &part.fstype),
                uuid: of(|part| &part.uuid),
                label: of(|part| &part.label),
            });
        }
        Ok(Self { name, sector: table.sectorsize, table: lines, partitions })
    }

    fn has(&self, partuuid: &PartUuid) -> bool {
        self.partitions.iter().any(|part| part.partuuid == *partuuid)
    }
}

/// The UUID of the file system on / if all disks share it.
fn shared_root(config: &Config, inventory: &Inventory) -> Result<Option<String>> {
    if config.layout() == Layout::OwnRoots {
        return Ok(None);
    }
    let table = mounts::table()?;
    let root = mounts::at(&table, Path::new("/")).and_then(|mount| inventory.all().find(|part| mount.is_on(part)));
    Ok(root.and_then(|part| part.uuid.clone()))
}

/// A line of a partition table in the form of sfdisk; `start` and `size` are in sectors.
pub(crate) fn line(start: u64, size: u64, kind: &str, partuuid: PartUuid, name: Option<&str>, attributes: &str) -> String {
    let mut text = format!("start={start}, size={size}, type={kind}, uuid={partuuid}");
    if let Some(name) = name {
        // sfdisk decodes \x escapes, and reads line by line.
        let plain = |c: char| -> String {
            match c {
                '"' | '\\' => format!("\\x{:02x}", u32::from(c)),
                c if c.is_control() => String::new(),
                c => c.to_string(),
            }
        };
        text += &format!(", name=\"{}\"", name.chars().map(plain).collect::<String>());
    }
    if !attributes.is_empty() {
        text += &format!(", attrs=\"{}\"", attributes.trim());
    }
    text
}

/// All layouts in a file that [`save`] wrote.
///
/// # Errors
/// The file can't be read, or is another kind of file.
pub fn load_all(file: &Path) -> Result<Vec<DiskLayout>> {
    // `Root::read` would take a relative path as one below `/`.
    let absolute = std::path::absolute(file).with_context(|| file.display().to_string())?;
    let bytes = Root::new("/").read(absolute).with_context(|| file.display().to_string())?;
    serde_json::from_slice(&bytes)
        .with_context(|| format!("{} is not a file of disk layouts such as {}/{NAME}", file.display(), state::DIRECTORY))
}

/// The layout of one disk in a file that [`save`] wrote.
///
/// # Errors
/// As [`load_all`]; the file has no such disk.
pub fn load(file: &Path, name: DiskName) -> Result<DiskLayout> {
    let disks = load_all(file)?;
    disks.into_iter().find(|disk| disk.name == name).with_context(|| format!("{} holds no layout of {name}", file.display()))
}

/// Saves the layouts of the disks that are present, and keeps the saved ones of missing disks.
///
/// # Errors
/// sfdisk fails; the root can't be written.
pub fn save(root: &Root, config: &Config, inventory: &Inventory) -> Result<()> {
    let stored: Vec<DiskLayout> = state::load(|path| root.read_opt(path), NAME)?;
    let root_uuid = shared_root(config, inventory)?;
    let now = |disk: &Disk| -> Result<Option<DiskLayout>> {
        let known = || stored.iter().find(|old| old.name == disk.name && old.has(&disk.esp())).cloned();
        // The content of a closed container is unknown.
        let closed = disk.parts.values().any(|part| inventory.is_closed(part));
        match inventory.find(&disk.esp())?.filter(|_| !closed || known().is_none()) {
            Some(esp) => {
                let mut roles = disk.parts.clone();
                // No section names the devices of a shared root.
                let member = inventory.others_on_disk(esp).find(|part| root_uuid.is_some() && part.uuid == root_uuid);
                roles.extend(member.and_then(Partition::partuuid).map(|partuuid| (Role::Root, partuuid)));
                DiskLayout::read(disk.name, inventory, &roles).map(Some)
            }
            None => Ok(known()),
        }
    };
    let disks = config.disks.iter().filter_map(|disk| now(disk).transpose()).collect::<Result<Vec<_>>>()?;
    let mut bytes = serde_json::to_vec_pretty(&disks).context("the layouts can't be written as JSON")?;
    bytes.push(b'\n');
    state::save(NAME, bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ESP: &str = "aaaaaaaa-0000-4000-8000-000000000001";
    const ROOT: &str = "aaaaaaaa-0000-4000-8000-000000000002";

    fn inventory() -> Inventory {
        let part = |kname: &str, partuuid: &str, fstype: &str| {
            format!(
                r#"{{"kname":"{kname}","pkname":"x","path":"/dev/{kname}","maj:min":"8:1","fstype":"{fstype}","uuid":"u-{kname}","label":"",
                    "partuuid":"{partuuid}","partlabel":null,"parttype":null,"log-sec":512}}"#
            )
        };
        let json = format!(r#"{{"blockdevices":[{},{}]}}"#, part("x1", ESP, "vfat"), part("x2", ROOT, "ext4"));
        Inventory::parse(json.as_bytes(), BTreeMap::new(), std::collections::BTreeSet::new()).unwrap()
    }

    #[test]
    fn a_saved_table_makes_the_same_disk_again() {
        let tmp = tempfile::tempdir().unwrap();
        let disk = tmp.path().join("disk");
        std::fs::File::create(&disk).unwrap().set_len(64 << 20).unwrap();
        let node = || disk.clone().into_os_string();
        let made = format!(
            "label: gpt\nlabel-id: AAAAAAAA-0000-4000-8000-000000000009\n{}\n{}\n",
            line(
                2048,
                2048,
                "C12A7328-F81F-11D2-BA4B-00A0C93EC93B",
                PartUuid::parse(ESP).unwrap(),
                Some(r#"E"F\I"#),
                " NoBlockIOProtocol"
            ),
            line(8192, 4096, "0FC63DAF-8483-4772-8E79-3D69D8477DE4", PartUuid::parse(ROOT).unwrap(), None, ""),
        );
        program::output_with_input("sfdisk", ["-q".into(), node()], made.as_bytes()).unwrap();
        let roles = [(Role::Esp, PartUuid::parse(ESP).unwrap()), (Role::Root, PartUuid::parse(ROOT).unwrap())].into();
        let read = || {
            let printed = program::output("sfdisk", ["--json".into(), node()]).unwrap();
            DiskLayout::parse(&printed, DiskName::parse("disk1").unwrap(), &inventory(), &roles).unwrap()
        };
        let found = read();
        assert_eq!(found.table.join("\n") + "\n", made.replace(" NoBlock", "NoBlock"));
        let [esp, root] = &found.partitions[..] else { panic!("{found:?}") };
        assert_eq!(
            (esp.role.clone(), esp.name.as_deref(), esp.attributes.as_str()),
            (Some(Role::Esp), Some(r#"E"F\I"#), "NoBlockIOProtocol")
        );
        assert_eq!(
            (root.bytes, root.fstype.as_deref(), root.uuid.as_deref(), &root.label),
            (2 << 20, Some("ext4"), Some("u-x2"), &None)
        );
        // The saved layout is enough to make it again.
        let kept = serde_json::to_vec(&found).unwrap();
        let kept: DiskLayout = serde_json::from_slice(&kept).unwrap();
        std::fs::File::create(&disk).unwrap().set_len(64 << 20).unwrap();
        program::output_with_input("sfdisk", ["-q".into(), node()], kept.table.join("\n").as_bytes()).unwrap();
        assert_eq!(read(), found);
    }

    #[test]
    fn a_relative_path_is_relative_to_the_working_directory() {
        let tmp = tempfile::tempdir_in(".").unwrap();
        let file = Path::new(tmp.path().file_name().unwrap()).join("shape");
        assert!(file.is_relative());
        std::fs::write(&file, "[]").unwrap();
        assert_eq!(load_all(&file).unwrap(), []);
    }
}
