//! What the booted disk has that a clone gets: its partitions, by role, and what is on them.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};

use crate::base::refusal::refused;
use crate::base::types::{DiskName, PartUuid, Role};
use crate::conf::disk_role;
use crate::devices::gpt::{DiskLayout, PartLayout};
use crate::devices::inventory::{Inventory, Partition};
use crate::devices::mounts::{self, Mount};

/// What is made on a partition.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Content {
    /// A file system of this kind, as mkfs(8) knows it.
    Fs(String),
    /// Swap space.
    Swap,
    /// A part of the root that all disks share. It is made by joining that.
    Shared,
}

impl Content {
    /// What can be made on the partition of a role in the place of what it holds, as blkid(8) has it.
    ///
    /// # Errors
    /// A refusal for what can't be made again.
    pub fn made_anew(part: &PartLayout, role: &Role) -> Result<Self> {
        match part.fstype.as_deref() {
            Some("swap") if *role == Role::Swap => Ok(Self::Swap),
            Some(fs @ ("vfat" | "ext2" | "ext3" | "ext4" | "xfs" | "btrfs" | "f2fs")) => Ok(Self::Fs(fs.to_owned())),
            other => Err(refused(format!(
                "{role}=, the partition {}, holds {}, which can't be made again; ext2, ext3, ext4, xfs, btrfs, f2fs and FAT can",
                part.partuuid,
                other.unwrap_or("nothing that is known")
            ))),
        }
    }

    /// How many bytes a label may have.
    pub fn label_length(&self) -> usize {
        match self {
            Self::Fs(fs) => match fs.as_str() {
                "vfat" => 11,
                "xfs" => 12,
                "ext2" | "ext3" | "ext4" => 16,
                _ => 255,
            },
            Self::Swap => 15,
            Self::Shared => 0,
        }
    }

    /// A label as this can have it: mkfs.vfat(8) takes no letters but those of ASCII, and firmware wants capitals.
    pub fn plain(&self, label: &str) -> String {
        match self {
            Self::Fs(fs) if fs == "vfat" => {
                let ours = |c: &char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | ' ');
                label.chars().filter(ours).map(|c| c.to_ascii_uppercase()).collect()
            }
            _ => label.to_owned(),
        }
    }

    /// For people.
    pub fn told(&self) -> &str {
        match self {
            Self::Fs(fs) => fs,
            Self::Swap => "swap",
            Self::Shared => "btrfs",
        }
    }
}

/// A partition of the booted disk.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Part {
    /// What it is for.
    pub role: Role,
    /// Its size in bytes.
    pub bytes: u64,
    /// The GUID of its type.
    pub kind: String,
    /// Its name in the GPT.
    pub name: Option<String>,
    /// Its attributes in the GPT, as sfdisk has them.
    pub attributes: String,
    /// What is on it.
    pub content: Content,
    /// The label of that.
    pub label: Option<String>,
    /// Whether that is in a LUKS container.
    pub luks: bool,
    /// How many bytes a tree has; None for what is made as large as it is.
    pub used: Option<u64>,
}

/// The booted disk.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Source {
    /// Its partitions, in their order on the disk, that a clone gets.
    pub parts: Vec<Part>,
    /// Partitions of it that a clone doesn't get: a sentence for each.
    pub left_out: Vec<String>,
    /// The device nodes of its LUKS containers that a clone gets.
    pub containers: Vec<String>,
}

/// The partitions of the booted disk that have a role, found by what is mounted from it: for a machine that isn't configured.
/// `shared` is its part of a root that spans disks.
///
/// # Errors
/// A refusal where the ESP, or the root, isn't where dualroot can work with it.
pub fn roles(
    inventory: &Inventory,
    table: &[Mount],
    esp: &PartUuid,
    shared: Option<PartUuid>,
) -> Result<BTreeMap<Role, PartUuid>> {
    let booted = inventory.find(esp)?.with_context(|| format!("the booted ESP {esp} isn't there"))?;
    let on = |part: &Partition, dir: &str| mounts::at(table, Path::new(dir)).is_some_and(|m| m.is_on(part));
    let mut found = BTreeMap::from([(Role::Esp, *esp)]);
    // systemd-gpt-auto-generator(8) may have it on /efi besides.
    let place = if on(booted, "/boot") { "/boot" } else { "/efi" };
    if !on(booted, place) {
        let now = table.iter().find(|m| m.is_on(booted)).map_or("nowhere".to_owned(), |m| format!("on {}", m.at.display()));
        return Err(refused(format!(
            "the booted ESP, {}, is mounted {now}; dualroot has it on /boot, or on /efi with an XBOOTLDR partition on /boot: mount it \
             there, change /etc/fstab to that, and install the kernels again",
            booted.path
        )));
    }
    for part in inventory.beside(booted) {
        let Some(partuuid) = part.partuuid() else { continue };
        let role = match part.fstype.as_deref() {
            Some("swap") => Some(Role::Swap),
            _ if on(part, "/") || shared == Some(partuuid) => Some(Role::Root),
            _ if place == "/efi" && on(part, "/boot") => Some(Role::Xbootldr),
            _ => table.iter().filter(|m| m.is_on(part) && m.root == "/").find_map(|m| role_at(m.at.to_str()?)),
        };
        if let Some(role) = role {
            found.entry(role).or_insert(partuuid);
        }
    }
    if place == "/efi" && !found.contains_key(&Role::Xbootldr) {
        return Err(refused(format!(
            "the booted ESP, {}, is mounted on /efi, but no partition of its disk on /boot; dualroot has the ESP on /boot where there is no \
             XBOOTLDR partition: mount it there, change /etc/fstab to that, and install the kernels again",
            booted.path
        )));
    }
    if !found.contains_key(&Role::Root) {
        let root = mounts::at(table, Path::new("/")).map_or("nothing that is known", |m| &m.source);
        return Err(refused(format!(
            "the root file system is on {root}, which is no partition of the booted disk, and nothing in a LUKS container on one; LVM and md can't be cloned"
        )));
    }
    Ok(found)
}

/// The role of a tree that is mounted there.
fn role_at(dir: &str) -> Option<Role> {
    let key = match dir {
        "/usr" | "/home" | "/srv" | "/var" => dir.trim_start_matches('/'),
        other => other,
    };
    disk_role(key).ok().flatten()
}

impl Source {
    /// What a clone gets of the booted disk, whose partitions with a role these are; root= is a part of a shared root, or the disk's own.
    ///
    /// # Errors
    /// sfdisk that fails; a refusal for what can't be made again.
    pub fn read(inventory: &Inventory, table: &[Mount], roles: &BTreeMap<Role, PartUuid>, is_shared: bool) -> Result<Self> {
        // Its name makes no difference here.
        let disk = DiskLayout::read(DiskName::parse("disk0")?, inventory, roles)?;
        Self::shaped(disk, "the disk of its ESP", inventory, table, roles, is_shared)
    }

    /// As [`Source::read`], but shaped like another disk; `shape` says where that was kept.
    ///
    /// # Errors
    /// As [`Source::read`]; a shape without a partition that the booted disk has, or with one that can't take its place.
    pub fn shaped(
        disk: DiskLayout,
        shape: &str,
        inventory: &Inventory,
        table: &[Mount],
        roles: &BTreeMap<Role, PartUuid>,
        is_shared: bool,
    ) -> Result<Self> {
        let is_there = |role: &Role| disk.partitions.iter().any(|part| part.role.as_ref() == Some(role));
        if let Some((role, partuuid)) = roles.iter().find(|(role, _)| !is_there(role)) {
            return Err(refused(format!(
                "{role}= of the booted disk, {partuuid}, has no like on {shape}; a disk is cloned as a whole"
            )));
        }
        let mut source = Self::default();
        for part in disk.partitions {
            let Some((role, partuuid)) = part.role.as_ref().and_then(|role| roles.get_key_value(role)) else {
                source.left_out.push(why_not(&part, inventory, table)?);
                continue;
            };
            let now = inventory.find(partuuid)?.with_context(|| format!("the partition {partuuid} has gone"))?;
            source.add(part, role.clone(), now, table, is_shared)?;
        }
        Ok(source)
    }

    /// Has the root need just so many bytes.
    pub fn give_root(&mut self, bytes: u64) {
        for part in self.parts.iter_mut().filter(|part| part.role == Role::Root) {
            (part.bytes, part.used) = (bytes, Some(bytes));
        }
    }

    /// A partition that is to be like one of the booted disk, which is `now`.
    fn add(&mut self, part: PartLayout, role: Role, now: &Partition, table: &[Mount], is_shared: bool) -> Result<()> {
        let content = match part.fstype.as_deref() {
            Some("btrfs") if is_shared && role == Role::Root => Content::Shared,
            _ => Content::made_anew(&part, &role)?,
        };
        if part.fstype != now.fstype {
            return Err(refused(format!(
                "{role}= of the booted disk, {}, holds {}, and not {}",
                now.path,
                now.fstype.as_deref().unwrap_or("nothing"),
                content.told()
            )));
        }
        let luks = part.container.is_some();
        let kind = |luks| if luks { "a LUKS container" } else { "no LUKS container" };
        if luks != now.container.is_some() {
            return Err(refused(format!(
                "{role}= of the booted disk, {}, is {}, and not {}; on all disks it is the same",
                now.path,
                kind(!luks),
                kind(luks)
            )));
        }
        if luks && (role.tree().is_none() || content == Content::Shared) {
            return Err(refused(format!(
                "{role}= of the booted disk, {}, is a LUKS container; only trees are copied into one, no swap space and no shared root",
                now.path
            )));
        }
        let used = match role {
            Role::Swap => 0,
            // A shared one is mounted by any of its devices.
            Role::Root => used(mounts::at(table, Path::new("/")), now)?,
            _ => used(table.iter().rfind(|m| m.is_on(now)), now)?,
        };
        self.containers.extend(luks.then(|| now.path.clone()));
        let is_tree = role.tree().is_some();
        if !is_tree && used > part.bytes {
            return Err(refused(format!("{role}= would have {} bytes, but {used} are in use on {}", part.bytes, now.path)));
        }
        self.parts.push(Part {
            bytes: part.bytes,
            kind: part.kind,
            name: part.name,
            attributes: part.attributes,
            label: part.label.filter(|_| content != Content::Shared),
            content,
            luks,
            used: is_tree.then_some(used),
            role,
        });
        Ok(())
    }
}

/// Why a partition of the booted disk is not cloned.
fn why_not(part: &PartLayout, inventory: &Inventory, table: &[Mount]) -> Result<String> {
    let what = part.fstype.as_deref().unwrap_or("nothing that is known");
    let now = inventory.find(&part.partuuid)?;
    let path = now.map_or_else(|| part.partuuid.to_string(), |now| now.path.clone());
    Ok(match now.and_then(|now| table.iter().find(|mount| mount.is_on(now))) {
        Some(mount) => {
            format!("{path} ({what}) is NOT cloned, although it is mounted on {}: no key names it", mount.at.display())
        }
        None => format!("{path} ({what}) is not cloned: it is mounted nowhere, and no key names it"),
    })
}

/// How many bytes the file system on a partition has, by one of its mounts.
fn used(mount: Option<&Mount>, part: &Partition) -> Result<u64> {
    let mount = mount.with_context(|| format!("{} is mounted nowhere", part.path))?;
    let stat = nix::sys::statvfs::statvfs(&mount.at).with_context(|| mount.at.display().to_string())?;
    Ok(stat.fragment_size() * (stat.blocks() - stat.blocks_free()))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::base::refusal::Refused;

    fn id(n: u32) -> PartUuid {
        PartUuid::parse(&format!("aaaaaaaa-0000-4000-8000-{n:012}")).unwrap()
    }

    /// A disk with an ESP (1), and what is given: the number, and the type of file system.
    fn inventory(parts: &[(u32, &str)]) -> Inventory {
        let part = |n: u32, fstype: &str, disk: &str| {
            format!(
                r#"{{"kname":"{disk}{n}","pkname":"{disk}","path":"/dev/{disk}{n}","maj:min":"8:{n}","fstype":"{fstype}","uuid":null,
                    "label":null,"partuuid":"{}","partlabel":null,"parttype":null,"log-sec":512}}"#,
                id(n)
            )
        };
        let mut all = vec![part(1, "vfat", "x"), part(9, "ext4", "y")];
        all.extend(parts.iter().map(|(n, fstype)| part(*n, fstype, "x")));
        let json = format!(r#"{{"blockdevices":[{}]}}"#, all.join(","));
        Inventory::parse(json.as_bytes(), BTreeMap::new(), BTreeSet::new()).unwrap()
    }

    fn mounted(mounts: &[(u32, &str, &str)]) -> Vec<Mount> {
        let line =
            |(n, at, root): &(u32, &str, &str)| Mount::parse(&format!("1 1 8:{n} {root} {at} rw - ext4 /dev/none rw")).unwrap();
        mounts.iter().map(line).collect()
    }

    fn found(parts: &[(u32, &str)], mounts: &[(u32, &str, &str)]) -> Result<Vec<(String, PartUuid)>> {
        let roles = roles(&inventory(parts), &mounted(mounts), &id(1), None)?;
        Ok(roles.into_iter().map(|(role, partuuid)| (role.key().to_owned(), partuuid)).collect())
    }

    #[test]
    fn a_machine_says_what_its_partitions_are_for() {
        let is = |found: Result<Vec<(String, PartUuid)>>, expected: &[(&str, u32)]| {
            let expected: Vec<_> = expected.iter().map(|(role, n)| ((*role).to_owned(), id(*n))).collect();
            assert_eq!(found.unwrap(), expected);
        };
        let all = [(2, "ext4"), (3, "swap"), (4, "xfs"), (5, "ext4"), (6, "ntfs")];
        let mounts =
            [(2, "/", "/"), (1, "/boot", "/"), (4, "/home", "/"), (5, "/data", "/"), (9, "/srv", "/"), (5, "/x", "/sub")];
        is(found(&all, &mounts), &[("root", 2), ("esp", 1), ("home", 4), ("swap", 3), ("/data", 5)]);
        is(found(&all[..1], &[(2, "/", "/"), (1, "/efi", "/"), (1, "/boot", "/")]), &[("root", 2), ("esp", 1)]);
        let with_xbootldr = [(2, "/", "/"), (1, "/efi", "/"), (5, "/boot", "/")];
        is(found(&all, &with_xbootldr), &[("root", 2), ("esp", 1), ("xbootldr", 5), ("swap", 3)]);
    }

    #[test]
    fn a_machine_that_is_otherwise_is_refused() {
        for (mounts, expected) in [
            (&[(2, "/", "/"), (1, "/boot/efi", "/")][..], "is mounted on /boot/efi; dualroot has it on /boot"),
            (&[(2, "/", "/")], "is mounted nowhere"),
            (&[(2, "/", "/"), (1, "/efi", "/")], "but no partition of its disk on /boot"),
            (&[(9, "/", "/"), (1, "/boot", "/")], "is no partition of the booted disk"),
        ] {
            let error = found(&[(2, "ext4")], mounts).unwrap_err();
            assert!(error.is::<Refused>() && error.to_string().contains(expected), "{error}");
        }
    }

    /// What a disk has on partitions of so many bytes, by number and role.
    fn shape(parts: &[(u32, &str, &str, u64)]) -> DiskLayout {
        let part = |(n, role, fstype, bytes): &(u32, &str, &str, u64)| PartLayout {
            role: Role::parse_key(role).unwrap(),
            partuuid: id(*n),
            bytes: *bytes,
            kind: String::new(),
            name: None,
            attributes: String::new(),
            container: None,
            fstype: Some((*fstype).to_owned()),
            uuid: None,
            label: None,
        };
        let partitions = parts.iter().map(part).collect();
        DiskLayout { name: DiskName::parse("disk0").unwrap(), sector: 512, table: Vec::new(), partitions }
    }

    #[test]
    fn what_can_t_be_made_again_is_refused() {
        const LARGE: u64 = 1 << 60;
        let all = [(2, "ext4"), (3, "swap"), (4, "LVM2_member")];
        let esp = (1, "esp", "vfat", LARGE);
        let table = mounted(&[(1, "/", "/"), (2, "/", "/"), (4, "/", "/")]);
        let shaped = |parts: &[(u32, &str, &str, u64)], named: &[(Role, u32)]| {
            let roles = [(Role::Esp, 1)].iter().chain(named).map(|(role, n)| (role.clone(), id(*n))).collect();
            Source::shaped(shape(parts), "the old one", &inventory(&all), &table, &roles, false)
        };
        shaped(&[esp, (2, "root", "ext4", 1)], &[(Role::Root, 2)]).unwrap();
        for (parts, named, expected) in [
            (
                &[esp][..],
                &[(Role::Home, 2)][..],
                "home= of the booted disk, aaaaaaaa-0000-4000-8000-000000000002, has no like on the old one",
            ),
            (&[esp, (4, "root", "LVM2_member", 1)], &[(Role::Root, 4)], "holds LVM2_member, which can't be made again; ext2, "),
            (&[esp, (3, "root", "swap", 1)], &[(Role::Root, 3)], "holds swap, which can't be made again"),
            (&[esp, (2, "root", "xfs", 1)], &[(Role::Root, 2)], "root= of the booted disk, /dev/x2, holds ext4, and not xfs"),
            (&[(1, "esp", "vfat", 1)], &[], "esp= would have 1 bytes, but "),
        ] {
            let error = shaped(parts, named).unwrap_err();
            assert!(error.is::<Refused>() && error.to_string().contains(expected), "{error}");
        }
    }
}
