//! Values that have rules (PARTUUIDs, paths, roles, names). Each type has one constructor that checks them.

use std::fmt;

use anyhow::{Context, Result, bail};
use uuid::Uuid;

/// The unique GUID of a GPT partition, which udev and the kernel call PARTUUID (UEFI specification, 5.3.3).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PartUuid(Uuid);

impl PartUuid {
    /// Reads a PARTUUID in any case, with or without `PARTUUID=` in front.
    ///
    /// # Errors
    /// Text that isn't a hyphenated UUID; the nil UUID, which GPT reserves for unused entries. The short PARTUUIDs of MBR partitions
    /// (`1234abcd-02`) are refused too, because UEFI systems with two boot disks have GPT on both.
    pub fn parse(text: &str) -> Result<Self> {
        let bare = match text.get(..9) {
            Some(tag) if tag.eq_ignore_ascii_case("PARTUUID=") => text.get(9..).unwrap_or_default(),
            _ => text,
        };
        if bare.len() != 36 {
            bail!("'{}' is not a PARTUUID (36 characters, as in 'lsblk -o NAME,PARTUUID')", text.escape_debug());
        }
        let uuid = Uuid::try_parse(bare)
            .ok()
            .with_context(|| format!("'{}' is not a PARTUUID (as in 'lsblk -o NAME,PARTUUID')", text.escape_debug()))?;
        if uuid.is_nil() {
            bail!("the PARTUUID is all zeros, which no partition has");
        }
        Ok(Self(uuid))
    }

    /// The path of udev's link to the partition. udev writes PARTUUIDs in lower case.
    pub fn device_path(&self) -> String {
        format!("/dev/disk/by-partuuid/{self}")
    }

    /// The device node of the file system in a LUKS container on the partition, once dualroot-luks@.service has opened it.
    pub fn mapping(&self) -> String {
        format!("/dev/mapper/dualroot-{self}")
    }

    /// The UUID itself; its `to_bytes_le()` is the byte order of GPT and of EFI device paths.
    pub fn uuid(&self) -> Uuid {
        self.0
    }
}

impl From<Uuid> for PartUuid {
    fn from(uuid: Uuid) -> Self {
        Self(uuid)
    }
}

impl fmt::Display for PartUuid {
    /// Lower case and hyphenated.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.as_hyphenated().fmt(f)
    }
}

impl fmt::Debug for PartUuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// An absolute, normalised path of a directory: no `.` or `..`, no empty component, no trailing slash, no control character.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct DirPath(String);

impl DirPath {
    /// Takes an absolute path, and drops doubled and trailing slashes.
    ///
    /// # Errors
    /// Relative paths, `.` and `..`, control characters, and `/` itself.
    pub fn parse(text: &str) -> Result<Self> {
        if !text.starts_with('/') {
            bail!("'{}' is not an absolute path", text.escape_debug());
        }
        if text.chars().any(char::is_control) {
            bail!("the path '{}' contains a control character", text.escape_debug());
        }
        let mut path = String::new();
        for part in text.split('/').filter(|p| !p.is_empty()) {
            if part == "." || part == ".." {
                bail!("the path '{text}' contains '{part}'");
            }
            path.push('/');
            path.push_str(part);
        }
        if path.is_empty() {
            bail!("'/' can't be used here; name a directory below it");
        }
        Ok(Self(path))
    }

    /// The path, beginning with a slash.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The path without its leading slash, to be joined to another directory.
    pub fn relative(&self) -> &str {
        self.0.strip_prefix('/').unwrap_or(&self.0)
    }

    /// Whether `self` is `other` or lies below it.
    pub fn is_within(&self, other: &DirPath) -> bool {
        self.0.strip_prefix(other.as_str()).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    }
}

impl fmt::Display for DirPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The role of a partition, named as in the Discoverable Partitions Specification (UAPI.2), or any other directory that a disk's section
/// names by its path.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Role {
    /// The root file system.
    Root,
    /// /usr.
    Usr,
    /// The EFI system partition.
    Esp,
    /// The extended boot loader partition.
    Xbootldr,
    /// /home.
    Home,
    /// /srv.
    Srv,
    /// /var.
    Var,
    /// Swap space: its name is rewritten in texts, its content is never copied.
    Swap,
    /// Any other directory, such as `/data`.
    Dir(DirPath),
}

impl Role {
    /// The role that a key of a `[diskN]` section names, or None if the key names no partition.
    ///
    /// # Errors
    /// A key that begins with `/` and isn't a valid directory, or that has a shorter name (`home` for `/home`).
    pub fn parse_key(key: &str) -> Result<Option<Self>> {
        Ok(Some(match key {
            "root" => Self::Root,
            "usr" => Self::Usr,
            "esp" => Self::Esp,
            "xbootldr" => Self::Xbootldr,
            "home" => Self::Home,
            "srv" => Self::Srv,
            "var" => Self::Var,
            "swap" => Self::Swap,
            path if path.starts_with('/') => {
                let path = DirPath::parse(path)?;
                if let "/boot" | "/efi" | "/usr" | "/home" | "/srv" | "/var" = path.as_str() {
                    let name = match path.as_str() {
                        "/boot" | "/efi" => "esp= or xbootldr",
                        named => named.trim_start_matches('/'),
                    };
                    bail!("write {name}= instead of {path}=");
                }
                Self::Dir(path)
            }
            _ => return Ok(None),
        }))
    }

    /// A file name that no other role has. A slash becomes `-`, and a hyphen `%2D`.
    pub fn file_name(&self) -> String {
        self.key().replace('%', "%25").replace('-', "%2D").replace('/', "-")
    }

    /// The key that names this role in a `[diskN]` section.
    pub fn key(&self) -> &str {
        match self {
            Self::Root => "root",
            Self::Usr => "usr",
            Self::Esp => "esp",
            Self::Xbootldr => "xbootldr",
            Self::Home => "home",
            Self::Srv => "srv",
            Self::Var => "var",
            Self::Swap => "swap",
            Self::Dir(path) => path.as_str(),
        }
    }

    /// Whether the partition holds boot files: an ESP or an XBOOTLDR.
    pub fn is_boot(&self) -> bool {
        matches!(self, Self::Esp | Self::Xbootldr)
    }

    /// The directory that a running system mounts this role on: `""` for the root, `/home` and so on. None for boot partitions, whose
    /// directory depends on whether there is an XBOOTLDR, and for swap.
    pub fn tree(&self) -> Option<&str> {
        match self {
            Self::Root => Some(""),
            Self::Usr => Some("/usr"),
            Self::Home => Some("/home"),
            Self::Srv => Some("/srv"),
            Self::Var => Some("/var"),
            Self::Dir(path) => Some(path.as_str()),
            Self::Esp | Self::Xbootldr | Self::Swap => None,
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.key())
    }
}

/// The name of a disk of the pair: `diskN`, from its section `[diskN]`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct DiskName(u32);

impl DiskName {
    /// Reads a section's name: `disk0`, `disk1`, and so on.
    ///
    /// # Errors
    /// Any other text; a number with leading zeros or above 999.
    pub fn parse(section: &str) -> Result<Self> {
        section
            .strip_prefix("disk")
            .filter(|digits| digits.len() <= 3 && digits.bytes().all(|b| b.is_ascii_digit()))
            .filter(|digits| *digits == "0" || !digits.starts_with('0'))
            .and_then(|digits| digits.parse().ok())
            .map(Self)
            .with_context(|| {
                format!("'{}' is not a disk's section; expected [disk0], [disk1], and so on", section.escape_debug())
            })
    }

    /// The lowest name that is not in `taken`.
    ///
    /// # Errors
    /// All names are taken.
    pub fn first_free(taken: &[Self]) -> Result<Self> {
        (0..1000).map(Self).find(|name| !taken.contains(name)).context("all names from disk0 to disk999 are taken")
    }

    /// The N of `diskN`.
    pub fn number(&self) -> u32 {
        self.0
    }
}

impl fmt::Display for DiskName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "disk{}", self.0)
    }
}

/// The name of a systemd unit, at most 255 bytes long (systemd.unit(5)).
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct UnitName(String);

impl UnitName {
    /// The unit for a path: `/mnt/root1` and `mount` give `mnt-root1.mount`.
    ///
    /// # Errors
    /// The name would be longer than systemd allows.
    pub fn from_path(path: &DirPath, suffix: &str) -> Result<Self> {
        let name = format!("{}.{suffix}", libsystemd::unit::escape_path(path.as_str()));
        if name.len() > 255 {
            bail!("the unit name of {path} would be longer than 255 bytes");
        }
        Ok(Self(name))
    }

    /// The device unit of a partition.
    ///
    /// # Errors
    /// Never in practice: the path of a PARTUUID link always fits.
    pub fn device(part: &PartUuid) -> Result<Self> {
        Self::from_path(&DirPath::parse(&part.device_path())?, "device")
    }

    /// The service that opens the LUKS container on a partition.
    ///
    /// # Errors
    /// Never in practice: the text of a PARTUUID always fits.
    pub fn luks(part: &PartUuid) -> Result<Self> {
        let name = format!("dualroot-luks@{}.service", libsystemd::unit::escape_name(&part.to_string()));
        if name.len() > 255 {
            bail!("the unit name of the container on {part} would be longer than 255 bytes");
        }
        Ok(Self(name))
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for UnitName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Serializes a type as its text, and parses it when it is read.
macro_rules! stored_as_text {
    ($type:ty, $parse:expr) => {
        impl serde::Serialize for $type {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> serde::Deserialize<'de> for $type {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
                let text = String::deserialize(deserializer)?;
                $parse(&text).map_err(serde::de::Error::custom)
            }
        }
    };
}

stored_as_text!(PartUuid, PartUuid::parse);
stored_as_text!(DiskName, DiskName::parse);
stored_as_text!(Role, |text: &str| Role::parse_key(text).and_then(|role| role.context("not a role")));

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn f71_no_two_roles_share_a_file_name() {
        let keys = ["root", "/srv/data", "/srv-data", "/srv%2Ddata", "/srv/-data", "/srv-/data", "/srv--data"];
        let names: BTreeSet<String> = keys.iter().map(|key| Role::parse_key(key).unwrap().unwrap().file_name()).collect();
        assert_eq!(names.len(), keys.len(), "{names:?}");
        assert!(names.iter().all(|name| !name.contains('/')), "{names:?}");
    }
}
