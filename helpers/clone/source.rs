//! The booted disk's partitions that are cloned, with their roles and contents.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};

use crate::base::refusal::refused;
use crate::base::types::{DiskName, PartUuid, Role};
use crate::conf::disk_role;
use crate::devices::gpt::{DiskLayout, PartLayout};
use crate::devices::inventory::{Inventory, Partition};
use crate::devices::mounts::{self, Mount};

/// The content of a partition, as mkfs(8) makes it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Content {
    /// A file system of this kind, as mkfs(8) calls it.
    Fs(String),
    /// Swap space.
    Swap,
    /// A device of the root that all disks share. It gets its content by joining that.
    Shared,
}

impl Content {
    /// The content that a copy of a partition with this role gets, by what blkid(8) finds on it.
    ///
    /// # Errors
    /// A refusal for a content that dualroot can't make.
    pub fn like(part: &PartLayout, role: &Role) -> Result<Self> {
        match part.fstype.as_deref() {
            Some("swap") if *role == Role::Swap => Ok(Self::Swap),
            Some(fs @ ("vfat" | "ext2" | "ext3" | "ext4" | "xfs" | "btrfs" | "f2fs")) => Ok(Self::Fs(fs.to_owned())),
            other => Err(refused(format!(
                "{role}=, the partition {}, holds {}, which dualroot can't make on another disk; it makes ext2, ext3, ext4, xfs, btrfs, f2fs \
                 and FAT, and swap space for swap=",
                part.partuuid,
                other.unwrap_or("nothing that blkid knows")
            ))),
        }
    }

    /// The limit for a label in bytes.
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

    /// A valid form of a label: on FAT, mkfs.vfat(8) takes letters of ASCII only, and firmware wants capitals.
    pub fn valid_label(&self, label: &str) -> String {
        match self {
            Self::Fs(fs) if fs == "vfat" => {
                let is_valid = |c: &char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | ' ');
                label.chars().filter(is_valid).map(|c| c.to_ascii_uppercase()).collect()
            }
            _ => label.to_owned(),
        }
    }

    /// The name of the file system, for people.
    pub fn name(&self) -> &str {
        match self {
            Self::Fs(fs) => fs,
            Self::Swap => "swap",
            Self::Shared => "btrfs",
        }
    }
}

/// A partition of the booted disk.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SourcePart {
    /// Its role.
    pub role: Role,
    /// Its size in bytes.
    pub bytes: u64,
    /// The GUID of its type.
    pub kind: String,
    /// Its name in the GPT.
    pub name: Option<String>,
    /// Its attributes in the GPT, as sfdisk has them.
    pub attributes: String,
    /// The content of its copy.
    pub content: Content,
    /// The label of its file system.
    pub label: Option<String>,
    /// Whether its file system is in a LUKS container.
    pub luks: bool,
    /// The bytes in use, for a tree; None for a partition whose copy has the same size.
    pub used: Option<u64>,
}

/// The booted disk, as far as it is cloned.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Source {
    /// The partitions that are cloned, in their order on the disk.
    pub parts: Vec<SourcePart>,
    /// A sentence for each partition that is not cloned.
    pub left_out: Vec<String>,
    /// The device nodes of the LUKS containers that are cloned.
    pub containers: Vec<String>,
}

/// Finds the roles of the booted disk's partitions by where they are mounted, on a machine that isn't configured. `shared` is its device of a
/// root that spans disks.
///
/// # Errors
/// A refusal where the ESP, or the root, is where dualroot can't work with it.
pub fn roles(
    inventory: &Inventory,
    table: &[Mount],
    esp: &PartUuid,
    shared: Option<PartUuid>,
) -> Result<BTreeMap<Role, PartUuid>> {
    let booted = inventory.find(esp)?.with_context(|| format!("the booted ESP {esp} isn't there"))?;
    let on = |part: &Partition, dir: &str| mounts::at(table, Path::new(dir)).is_some_and(|m| m.is_on(part));
    let mut found = BTreeMap::from([(Role::Esp, *esp)]);
    // systemd-gpt-auto-generator(8) may mount it on /efi, too.
    let place = if on(booted, "/boot") { "/boot" } else { "/efi" };
    if !on(booted, place) {
        let now = table.iter().find(|m| m.is_on(booted)).map_or("nowhere".to_owned(), |m| format!("on {}", m.at.display()));
        return Err(refused(format!(
            "the booted ESP, {}, is mounted {now}; dualroot needs it on /boot, or on /efi with an XBOOTLDR partition on /boot; mount it \
             there, change /etc/fstab accordingly, and install the kernels again",
            booted.path
        )));
    }
    for part in inventory.others_on_disk(booted) {
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
            "the booted ESP, {}, is mounted on /efi, but no partition of its disk is mounted on /boot; without an XBOOTLDR partition, dualroot \
             needs the ESP on /boot; mount it there, change /etc/fstab accordingly, and install the kernels again",
            booted.path
        )));
    }
    if !found.contains_key(&Role::Root) {
        let root = mounts::at(table, Path::new("/")).map_or("an unknown device", |m| &m.source);
        return Err(refused(format!(
            "the root file system is on {root}, which is neither a partition of the booted disk nor a LUKS container on one; dualroot clones \
             no other root (LVM, md)"
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
    /// Reads the booted disk, whose partitions have these roles. `is_shared` tells whether root= is a device of a shared root.
    ///
    /// # Errors
    /// A failure of sfdisk; a refusal for a partition that can't be cloned.
    pub fn read(inventory: &Inventory, table: &[Mount], roles: &BTreeMap<Role, PartUuid>, is_shared: bool) -> Result<Self> {
        // The name makes no difference here.
        let disk = DiskLayout::read(DiskName::parse("disk0")?, inventory, roles)?;
        Self::with_layout(disk, "the disk of its ESP", inventory, table, roles, is_shared)
    }

    /// Reads the booted disk as [`Source::read`] does, except that another layout counts, which `from` names for messages.
    ///
    /// # Errors
    /// As [`Source::read`]; a layout that lacks a partition of the booted disk, or has a different content for one.
    pub fn with_layout(
        disk: DiskLayout,
        from: &str,
        inventory: &Inventory,
        table: &[Mount],
        roles: &BTreeMap<Role, PartUuid>,
        is_shared: bool,
    ) -> Result<Self> {
        let is_there = |role: &Role| disk.partitions.iter().any(|part| part.role.as_ref() == Some(role));
        if let Some((role, partuuid)) = roles.iter().find(|(role, _)| !is_there(role)) {
            return Err(refused(format!(
                "{from} has no partition for {role}= of the booted disk, {partuuid}; a disk can only be cloned with all of its partitions"
            )));
        }
        let mut source = Self::default();
        for part in disk.partitions {
            let Some((role, partuuid)) = part.role.as_ref().and_then(|role| roles.get_key_value(role)) else {
                source.left_out.push(why_not_cloned(&part, inventory, table)?);
                continue;
            };
            let now = inventory.find(partuuid)?.with_context(|| format!("the partition {partuuid} is gone"))?;
            source.add(part, role.clone(), now, table, is_shared)?;
        }
        Ok(source)
    }

    /// Sets the size of the root's partition, and the room that it needs, to this number of bytes.
    pub fn set_root_bytes(&mut self, bytes: u64) {
        for part in self.parts.iter_mut().filter(|part| part.role == Role::Root) {
            (part.bytes, part.used) = (bytes, Some(bytes));
        }
    }

    /// Adds a partition of the layout, whose counterpart on the booted disk is `now`.
    fn add(&mut self, part: PartLayout, role: Role, now: &Partition, table: &[Mount], is_shared: bool) -> Result<()> {
        let content = match part.fstype.as_deref() {
            Some("btrfs") if is_shared && role == Role::Root => Content::Shared,
            _ => Content::like(&part, &role)?,
        };
        if part.fstype != now.fstype {
            return Err(refused(format!(
                "{role}= of the booted disk, {}, holds {}, but the layout has {} for it; both must be the same",
                now.path,
                now.fstype.as_deref().unwrap_or("nothing"),
                content.name()
            )));
        }
        let luks = part.container.is_some();
        let kind = |luks| if luks { "a LUKS container" } else { "no LUKS container" };
        if luks != now.container.is_some() {
            return Err(refused(format!(
                "{role}= of the booted disk, {}, is {}, but the layout has {} for it; both must be the same",
                now.path,
                kind(!luks),
                kind(luks)
            )));
        }
        if luks && (role.tree().is_none() || content == Content::Shared) {
            return Err(refused(format!(
                "{role}= of the booted disk, {}, is a LUKS container; dualroot can only clone trees in containers, not swap space and not a \
                 shared root",
                now.path
            )));
        }
        let used = match role {
            Role::Swap => 0,
            // The mount of a shared root may name any of its devices.
            Role::Root => used_bytes(mounts::at(table, Path::new("/")), now)?,
            _ => used_bytes(table.iter().rfind(|m| m.is_on(now)), now)?,
        };
        self.containers.extend(luks.then(|| now.path.clone()));
        let is_tree = role.tree().is_some();
        if !is_tree && used > part.bytes {
            return Err(refused(format!(
                "{role}= would have {} bytes, but {used} bytes are in use on {}; give a layout with a larger one (--layout)",
                part.bytes, now.path
            )));
        }
        self.parts.push(SourcePart {
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

/// The reason why a partition of the booted disk is not cloned.
fn why_not_cloned(part: &PartLayout, inventory: &Inventory, table: &[Mount]) -> Result<String> {
    let content = part.fstype.as_deref().unwrap_or("unknown content");
    let now = inventory.find(&part.partuuid)?;
    let path = now.map_or_else(|| part.partuuid.to_string(), |now| now.path.clone());
    Ok(match now.and_then(|now| table.iter().find(|mount| mount.is_on(now))) {
        Some(mount) => {
            format!("{path} ({content}) is NOT cloned, although it is mounted on {}: no key names it", mount.at.display())
        }
        None => format!("{path} ({content}) is not cloned: it is mounted nowhere, and no key names it"),
    })
}

/// The bytes in use in the file system of a partition, by one of its mounts.
fn used_bytes(mount: Option<&Mount>, part: &Partition) -> Result<u64> {
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

    /// A disk with an ESP (1) and the given partitions: number, and type of file system.
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
    fn roles_follow_from_the_mounts() {
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
    fn an_esp_or_a_root_elsewhere_is_refused() {
        for (mounts, expected) in [
            (&[(2, "/", "/"), (1, "/boot/efi", "/")][..], "is mounted on /boot/efi; dualroot needs it on /boot"),
            (&[(2, "/", "/")], "is mounted nowhere"),
            (&[(2, "/", "/"), (1, "/efi", "/")], "but no partition of its disk is mounted on /boot"),
            (&[(9, "/", "/"), (1, "/boot", "/")], "is neither a partition of the booted disk"),
        ] {
            let error = found(&[(2, "ext4")], mounts).unwrap_err();
            assert!(error.is::<Refused>() && error.to_string().contains(expected), "{error}");
        }
    }

    /// The layout of a disk: number, role, file system and bytes of each partition.
    fn layout(parts: &[(u32, &str, &str, u64)]) -> DiskLayout {
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
    fn partitions_that_can_t_be_cloned_are_refused() {
        const LARGE: u64 = 1 << 60;
        let all = [(2, "ext4"), (3, "swap"), (4, "LVM2_member")];
        let esp = (1, "esp", "vfat", LARGE);
        let table = mounted(&[(1, "/", "/"), (2, "/", "/"), (4, "/", "/")]);
        let source = |parts: &[(u32, &str, &str, u64)], named: &[(Role, u32)]| {
            let roles = [(Role::Esp, 1)].iter().chain(named).map(|(role, n)| (role.clone(), id(*n))).collect();
            Source::with_layout(layout(parts), "the old one", &inventory(&all), &table, &roles, false)
        };
        source(&[esp, (2, "root", "ext4", 1)], &[(Role::Root, 2)]).unwrap();
        for (parts, named, expected) in [
            (
                &[esp][..],
                &[(Role::Home, 2)][..],
                "the old one has no partition for home= of the booted disk, aaaaaaaa-0000-4000-8000-000000000002;",
            ),
            (
                &[esp, (4, "root", "LVM2_member", 1)],
                &[(Role::Root, 4)],
                "holds LVM2_member, which dualroot can't make on another disk; it makes ext2, ",
            ),
            (&[esp, (3, "root", "swap", 1)], &[(Role::Root, 3)], "holds swap, which dualroot can't make on another disk"),
            (
                &[esp, (2, "root", "xfs", 1)],
                &[(Role::Root, 2)],
                "root= of the booted disk, /dev/x2, holds ext4, but the layout has xfs",
            ),
            (&[(1, "esp", "vfat", 1)], &[], "esp= would have 1 bytes, but "),
        ] {
            let error = source(parts, named).unwrap_err();
            assert!(error.is::<Refused>() && error.to_string().contains(expected), "{error}");
        }
    }
}
