//! The identity of a copy of a template: its host name, its machine id, and the files that it doesn't take over.

use std::fmt;

use anyhow::{Context, Result, bail};
use uuid::Uuid;

use crate::base::types::{DirPath, PartUuid, Role};
use crate::names::fstab;
use crate::names::ids::{DiskIds, PartIds};

/// The file with a system's machine id (machine-id(5)).
pub const MACHINE_ID: &str = "/etc/machine-id";
/// D-Bus's file with it, usually a link.
pub const DBUS_MACHINE_ID: &str = "/var/lib/dbus/machine-id";
/// The file with a system's name (hostname(5)).
pub const HOST_NAME: &str = "/etc/hostname";
/// Files that may name the machine, in addition to those that name disks: see kernel-install(8).
pub const NAMING: [&str; 2] = ["/etc/kernel/entry-token", "/etc/machine-info"];

/// rsync filter rules for files that stay with the machine that the template was made of: its secrets, and statements about its disks.
const OWN: [&str; 7] = [
    "- /etc/ssh/ssh_host_*_key",
    "- /etc/ssh/ssh_host_*_key.pub",
    "- /etc/cryptsetup-keys.d/dualroot.key",
    "- /etc/dualroot.conf",
    "- /etc/dualroot.conf.d/*",
    "- /var/lib/dualroot/*",
    "- /.dualroot",
];

/// The name of a machine (hostname(7), RFC 1123).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct HostName(String);

impl HostName {
    /// Reads a host name: labels of letters, digits and hyphens, with dots between them.
    ///
    /// # Errors
    /// Anything else; labels of more than 63 characters, or with a hyphen at an end; more than 64 characters in all.
    pub fn parse(text: &str) -> Result<Self> {
        let is_plain = |c: char| c.is_ascii_alphanumeric() || c == '-';
        let is_label = |label: &str| {
            (1..=63).contains(&label.len()) && label.chars().all(is_plain) && !label.starts_with('-') && !label.ends_with('-')
        };
        if text.len() > 64 || !text.split('.').all(is_label) {
            bail!(
                "'{}' is no host name; it has up to 64 characters: labels of letters, digits and inner hyphens, separated by dots",
                text.escape_debug()
            );
        }
        Ok(Self(text.to_owned()))
    }

    /// The name up to its first dot.
    fn first(&self) -> &str {
        self.0.split('.').next().unwrap_or_default()
    }
}

impl fmt::Display for HostName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The name in a file like [`HOST_NAME`].
pub fn host_name(file: &[u8]) -> Option<String> {
    let text = String::from_utf8_lossy(file);
    let mut lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    lines.next().map(str::to_owned)
}

/// Replaces a machine's old name in hosts(5) by the new one, also where it is the first part of a longer name. An alias that is the first
/// part of the old name becomes that of the new one. Addresses, comments and `localhost` stay.
pub fn rename_host(hosts: &[u8], old: &str, new: &HostName) -> Vec<u8> {
    let mut out = Vec::with_capacity(hosts.len());
    let alias = old.split('.').next().unwrap_or_default();
    for line in hosts.split_inclusive(|b| *b == b'\n') {
        let end = line.iter().position(|b| *b == b'#').unwrap_or(line.len());
        let mut number = 0;
        for word in line.get(..end).unwrap_or_default().split_inclusive(u8::is_ascii_whitespace) {
            let name = word.trim_ascii_end();
            let rest =
                name.get(old.len()..).filter(|_| name.get(..old.len()).is_some_and(|n| n.eq_ignore_ascii_case(old.as_bytes())));
            let is_alias = name.eq_ignore_ascii_case(alias.as_bytes());
            match rest.or(is_alias.then_some(b"")).filter(|_| number > 0 && alias != "localhost") {
                Some(b"") if name.len() < old.len() => out.extend(new.first().bytes()),
                Some(b"") => out.extend(new.0.bytes()),
                Some(rest @ [b'.', ..]) => out.extend([new.first().as_bytes(), rest].concat()),
                _ => out.extend(name),
            }
            out.extend(word.get(name.len()..).unwrap_or_default());
            number += usize::from(!name.is_empty());
        }
        out.extend(line.get(end..).unwrap_or_default());
    }
    out
}

/// The id in a file like [`MACHINE_ID`].
///
/// # Errors
/// A file without one.
pub fn machine_id(file: &[u8]) -> Result<Uuid> {
    let text = std::str::from_utf8(file).unwrap_or_default().trim();
    let id = Uuid::try_parse(text).ok().filter(|id| text.len() == 32 && !id.is_nil());
    id.with_context(|| format!("'{}' is no machine id of 32 hexadecimal digits", text.escape_debug()))
}

/// Adds the machine id to a disk's identifiers, so that it is found and rewritten together with them.
///
/// # Errors
/// None in practice.
pub fn add_machine_id(disk: &mut DiskIds, id: Uuid) -> Result<()> {
    let ids = PartIds::new(PartUuid::from(id));
    disk.parts.insert(Role::Dir(DirPath::parse(MACHINE_ID)?), ids);
    Ok(())
}

/// rsync's filter rules for the files that aren't copied from a machine with this id.
pub fn exclude_rules(id: Uuid) -> Vec<String> {
    let journal = format!("- /var/log/journal/{}", id.simple());
    OWN.iter().map(|rule| (*rule).to_owned()).chain([journal]).collect()
}

/// Adds a line to fstab for each of these partitions that has none: on the template's machine, dualroot-generator(8) mounted them by a
/// configuration that isn't copied. Each is given by its mount point (None for swap space), its PARTUUID and its type.
pub fn add_lines(old: &[u8], parts: &[(Option<&str>, PartUuid, &str)]) -> Vec<u8> {
    let mut text = old.to_vec();
    for (at, partuuid, fstype) in parts {
        if fstab::lines(old).any(|line| at.map_or_else(|| line.is_swap(), |at| line.is_at(at))) {
            continue;
        }
        if !text.is_empty() && !text.ends_with(b"\n") {
            text.push(b'\n');
        }
        let at = at.map_or_else(|| "none".to_owned(), |at| at.replace('\\', "\\134").replace(' ', "\\040"));
        let (options, pass) = match *fstype {
            "vfat" => ("umask=0077", 2),
            "ext2" | "ext3" | "ext4" => ("defaults", 2),
            _ => ("defaults", 0),
        };
        text.extend(format!("PARTUUID={partuuid} {at} {fstype} {options} 0 {pass}\n").bytes());
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::types::DiskName;
    use crate::names::ident::Rewriter;

    #[test]
    fn host_names() {
        let long = ["a"; 63].concat();
        for name in ["pair", "a", "9-x", "Pair.example.org", &long] {
            assert_eq!(HostName::parse(name).unwrap().to_string(), name);
        }
        let (longer, many) = (["a"; 64].concat(), ["aaaa"; 13].join("."));
        assert_eq!(many.len(), 64);
        HostName::parse(&many).unwrap();
        for name in ["", ".", "a.", ".a", "a..b", "-a", "a-", "a.-b", "a_b", "a b", "a\n", "é", &longer, &format!("{many}a")] {
            let error = HostName::parse(name).unwrap_err().to_string();
            assert!(error.contains("is no host name"), "{error}");
        }
        assert_eq!(host_name(b"# The name.\n\n pair \nother\n").as_deref(), Some("pair"));
        assert_eq!(host_name(b"\n#\n"), None);
    }

    #[test]
    fn the_old_name_is_replaced_in_hosts() {
        let other = HostName::parse("other.example.net").unwrap();
        let old = "127.0.0.1\tlocalhost pair\n# pair is here\n  127.0.1.1 pair.example.org  PAIR # pair\npair pair\n::1 pairs repair x.pair\n\n10.0.0.1";
        let expected = "127.0.0.1\tlocalhost other.example.net\n# pair is here\n  127.0.1.1 other.example.org  other.example.net # pair\n\
            pair other.example.net\n::1 pairs repair x.pair\n\n10.0.0.1";
        assert_eq!(String::from_utf8(rename_host(old.as_bytes(), "pair", &other)).unwrap(), expected);
        assert_eq!(rename_host(old.as_bytes(), "localhost", &other), old.as_bytes());
        let long = "1 pair.example.org pair Pair repair pair.other localhost";
        let renamed_long = "1 other.example.net other other repair pair.other localhost";
        assert_eq!(String::from_utf8(rename_host(long.as_bytes(), "pair.example.org", &other)).unwrap(), renamed_long);
        let everybodys = b"::1 localhost.localdomain localhost";
        assert_eq!(rename_host(everybodys, "localhost.localdomain", &other), everybodys);
        assert_eq!(rename_host(b"1 pair pair", "pair", &HostName::parse("a").unwrap()), b"1 a a");
    }

    #[test]
    fn a_machine_id_is_valid_if_systemd_takes_it() {
        let text = "d0a1c0ded0a1c0ded0a1c0ded0a1c0de";
        assert_eq!(machine_id(format!("{text}\n").as_bytes()).unwrap().simple().to_string(), text);
        for text in ["", "uninitialized\n", "d0a1c0de-d0a1-c0de-d0a1-c0ded0a1c0de", "00000000000000000000000000000000"] {
            assert!(machine_id(text.as_bytes()).unwrap_err().to_string().contains("is no machine id"), "{text}");
        }
    }

    #[test]
    fn the_machine_id_is_replaced_wherever_it_stands() {
        let disk = |name: &str, id: &str| {
            let mut disk = DiskIds { name: DiskName::parse(name).unwrap(), parts: [].into() };
            add_machine_id(&mut disk, machine_id(id.as_bytes()).unwrap()).unwrap();
            disk
        };
        let (a, b) = ("d0a1c0ded0a1c0ded0a1c0ded0a1c0de", "0123456789abcdef0123456789abcdef");
        let rewriter = Rewriter::new(&disk("disk1", b), &[disk("disk0", a)]).unwrap();
        for text in [
            "machine-id ID\n",
            "linux /ID/6.1.0-1-amd64/linux\ninitrd /ID/6.1.0-1-amd64/initrd.img",
            "options root=x systemd.machine_id=ID ro",
            "loader/entries/ID-6.1.0-1-amd64+3.conf",
            "EFI/Linux/ID-6.1.0.efi",
            "default ID-*\n",
            "ID",
            "IDs 0ID",
        ] {
            let expected = if text.contains("IDs") { text.replace("ID", a) } else { text.replace("ID", b) };
            assert_eq!(String::from_utf8(rewriter.rewrite(text.replace("ID", a).as_bytes())).unwrap(), expected);
        }
        assert_eq!(rewriter.rewrite(a.to_uppercase().as_bytes()), b.as_bytes(), "FAT knows no case");
        let named = rewriter.foreign(format!("/{a}/linux").as_bytes());
        assert!(matches!(&named[..], [name] if name.contains("/etc/machine-id of disk0")), "{named:?}");
        assert!(exclude_rules(machine_id(a.as_bytes()).unwrap()).contains(&format!("- /var/log/journal/{a}")));
        assert!(exclude_rules(Uuid::from_u128(1)).contains(&format!("- {}", crate::names::crypttab::KEY)));
    }

    #[test]
    fn partitions_that_the_generator_mounted_get_lines() {
        let id = |n: u32| PartUuid::parse(&format!("aaaaaaaa-0000-4000-8000-00000000000{n}")).unwrap();
        let parts =
            [(Some("/boot"), id(1), "vfat"), (Some("/home"), id(2), "ext4"), (Some("/a b"), id(3), "xfs"), (None, id(4), "swap")];
        let text = add_lines(b"UUID=x / ext4\nLABEL=h //home/ ext4", &parts);
        assert_eq!(
            String::from_utf8(text).unwrap(),
            format!(
                "UUID=x / ext4\nLABEL=h //home/ ext4\nPARTUUID={} /boot vfat umask=0077 0 2\nPARTUUID={} /a\\040b xfs defaults 0 0\n\
                 PARTUUID={} none swap defaults 0 0\n",
                id(1),
                id(3),
                id(4)
            )
        );
        let whole = b"a /boot vfat\nb /home ext4\nc /a\\040b xfs\nd none swap";
        assert_eq!(add_lines(whole, &parts), whole);
    }
}
