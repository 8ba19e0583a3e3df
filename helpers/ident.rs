//! The names that a partition goes by, and the rewriting of texts that name one disk into texts that name another.
//!
//! The rewriter works on bytes, wherever in a text an identifier stands: boot options, fstab, crypttab and the rest have different
//! grammars, but an identifier looks the same in all of them. What is no identifier of another disk of the pair stays byte for byte.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read};
use std::ops::Range;

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};

use crate::types::{DiskName, PartUuid, Role};

/// What a partition can be called.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct PartIds {
    /// The GUID in the partition table.
    pub partuuid: PartUuid,
    /// The UUID of the file system on it, as blkid(8) prints it.
    pub uuid: Option<String>,
    /// The label of the file system.
    pub label: Option<String>,
    /// The name in the partition table.
    pub partlabel: Option<String>,
    /// Every path below /dev that leads to it.
    pub paths: BTreeSet<String>,
}

/// The partitions of a disk, by role.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct DiskIds {
    /// The disk's section.
    pub name: DiskName,
    /// Its partitions.
    pub parts: BTreeMap<Role, PartIds>,
}

/// What is found, and what is put in its place.
#[derive(Clone, Debug)]
struct Rule {
    /// None where the target has nothing to put there; the identifier is reported then.
    to: Option<String>,
    /// Whose it is, for people.
    whose: String,
}

/// Replaces every identifier of other disks by that of the same role of one disk, the target.
#[derive(Clone, Default, Debug)]
pub struct Rewriter {
    /// 36-character UUIDs in lower case, wherever they stand.
    uuids: BTreeMap<String, Rule>,
    /// Tags with values that only mean something behind the tag, as `UUID=ABCD-1234` and `LABEL=root`; the tag in upper case.
    tags: BTreeMap<(&'static str, Vec<u8>), Rule>,
    /// Paths below /dev.
    paths: BTreeMap<String, Rule>,
}

const TAGS: [&str; 4] = ["UUID", "LABEL", "PARTLABEL", "PARTUUID"];
/// No identifier, escaped and tagged, is longer: the overlap of chunks of a stream.
const LONGEST: usize = 1024;

impl Rewriter {
    /// The rewriter for a target disk, from the names of all.
    ///
    /// What leads to a partition by a path is replaced by the path of udev's by-partuuid link: that is a device path like the one it
    /// replaces, and so it is understood wherever the old one was, but for `root=` without an initrd.
    ///
    /// # Errors
    /// Two disks that share a PARTUUID or a file system UUID.
    pub fn new(target: &DiskIds, others: &[DiskIds]) -> Result<Self> {
        let mut new = Self::default();
        let labels = |of: fn(&PartIds) -> Option<&String>| -> BTreeSet<&String> {
            others.iter().flat_map(|d| d.parts.values()).filter_map(of).collect()
        };
        let (fs_labels, part_labels) = (labels(|p| p.label.as_ref()), labels(|p| p.partlabel.as_ref()));
        for other in others.iter().filter(|d| d.name != target.name) {
            for (role, from) in &other.parts {
                let whose = format!("{role} of {}", other.name);
                let to = target.parts.get(role);
                if let Some(to) = to
                    && (to.partuuid == from.partuuid || (to.uuid.is_some() && to.uuid == from.uuid))
                {
                    bail!(
                        "{role}= of {} and of {} share an identifier ({}); give one of them new ones",
                        target.name,
                        other.name,
                        from.uuid.as_deref().unwrap_or(&from.partuuid.to_string())
                    );
                }
                let rule = |to: Option<String>| Rule { to, whose: whose.clone() };
                let partuuid = to.map(|t| t.partuuid.to_string());
                let uuid = to.and_then(|t| t.uuid.clone());
                new.uuids.insert(from.partuuid.to_string(), rule(partuuid.clone()));
                if let Some(old) = &from.uuid {
                    if is_long(old.as_bytes()) {
                        new.uuids.insert(old.to_lowercase(), rule(uuid.clone()));
                    } else {
                        let to = uuid.as_ref().map(|u| format!("UUID={u}"));
                        new.tag("UUID", old, &rule(to));
                        new.path("by-uuid", old, &rule(partuuid.clone()));
                    }
                }
                if let Some(old) = &from.label {
                    // A label that both have names neither.
                    let own = to.and_then(|t| t.label.clone()).filter(|l| !fs_labels.contains(l) && is_plain(l));
                    let to = own.map(|l| format!("LABEL={l}")).or(uuid.as_ref().map(|u| format!("UUID={u}")));
                    new.tag("LABEL", old, &rule(to.or(partuuid.as_ref().map(|p| format!("PARTUUID={p}")))));
                    new.path("by-label", old, &rule(partuuid.clone()));
                }
                if let Some(old) = &from.partlabel {
                    let own = to.and_then(|t| t.partlabel.clone()).filter(|l| !part_labels.contains(l) && is_plain(l));
                    let to = own.map(|l| format!("PARTLABEL={l}")).or(partuuid.as_ref().map(|p| format!("PARTUUID={p}")));
                    new.tag("PARTLABEL", old, &rule(to));
                    new.path("by-partlabel", old, &rule(partuuid.clone()));
                }
                for path in &from.paths {
                    // Links by a long UUID are found by that.
                    if !path.rsplit('/').next().is_some_and(|name| is_long(name.as_bytes())) {
                        let to = partuuid.as_ref().map(|p| format!("/dev/disk/by-partuuid/{p}"));
                        new.paths.entry(path.clone()).or_insert(rule(to));
                    }
                }
            }
        }
        Ok(new)
    }

    fn tag(&mut self, tag: &'static str, value: &str, rule: &Rule) {
        for form in [value.as_bytes().to_vec(), octal(value), udev(value).into_bytes()] {
            self.tags.entry((tag, form)).or_insert(rule.clone());
        }
    }

    fn path(&mut self, by: &str, value: &str, rule: &Rule) {
        let to = rule.to.as_ref().map(|p| format!("/dev/disk/by-partuuid/{p}"));
        let rule = Rule { to, whose: rule.whose.clone() };
        self.paths.entry(format!("/dev/disk/{by}/{}", udev(value))).or_insert(rule);
    }

    /// The text with every identifier of another disk replaced that the target has a counterpart for.
    pub fn rewrite(&self, text: &[u8]) -> Vec<u8> {
        let mut out = Vec::with_capacity(text.len());
        let mut at = 0;
        while let Some(byte) = text.get(at) {
            match self.at(text, at) {
                Some((length, rule, escaped)) => {
                    match &rule.to {
                        Some(to) if escaped => out.extend(to.replace('-', "\\x2d").bytes()),
                        Some(to) => out.extend(to.bytes()),
                        None => out.extend(text.get(at..at + length).unwrap_or_default()),
                    }
                    at += length;
                }
                None => {
                    out.push(*byte);
                    at += 1;
                }
            }
        }
        out
    }

    /// Every identifier of another disk in the text, with whose it is, each once.
    pub fn foreign(&self, text: &[u8]) -> Vec<String> {
        let mut found = BTreeSet::new();
        self.collect(text, 0..text.len(), &mut found);
        found.into_iter().collect()
    }

    /// [`Rewriter::foreign`] of a stream of any length.
    ///
    /// # Errors
    /// Those of reading it.
    pub fn foreign_in_stream(&self, mut stream: impl Read) -> io::Result<Vec<String>> {
        let mut found = BTreeSet::new();
        let mut window = Vec::new();
        // The first bytes of the window were looked at already: they only tell whether an identifier may begin behind them.
        let mut seen = 0;
        let mut chunk = vec![0; 1 << 18];
        loop {
            let n = stream.read(&mut chunk)?;
            window.extend(chunk.get(..n).unwrap_or_default());
            // What begins in the last part of the window may go on behind it.
            let complete = if n == 0 { window.len() } else { window.len().saturating_sub(LONGEST) };
            self.collect(&window, seen..complete, &mut found);
            if n == 0 {
                return Ok(found.into_iter().collect());
            }
            seen = complete.min(4);
            window.drain(..complete - seen);
        }
    }

    fn collect(&self, text: &[u8], range: Range<usize>, found: &mut BTreeSet<String>) {
        let mut at = range.start;
        while at < range.end {
            match self.at(text, at) {
                Some((length, rule, _)) => {
                    let id = text.get(at..at + length).unwrap_or_default();
                    found.insert(format!("{} ({})", String::from_utf8_lossy(id).escape_debug(), rule.whose));
                    at += length;
                }
                None => at += 1,
            }
        }
    }

    /// The identifier that begins at a position: its length in bytes, its rule, and whether its hyphens are escaped as in unit names.
    fn at(&self, text: &[u8], at: usize) -> Option<(usize, &Rule, bool)> {
        let rest = text.get(at..)?;
        let before = text.get(..at).unwrap_or_default();
        let free = |previous: Option<&u8>| previous.is_none_or(|b| !b.is_ascii_alphanumeric());
        match rest.first()? {
            b'/' => self.path_at(rest).map(|(length, rule)| (length, rule, false)),
            b if b.is_ascii_alphanumeric() && (free(before.last()) || before.ends_with(b"\\x2d")) => {
                if let Some((uuid, length, escaped)) = long_uuid(rest)
                    && free(rest.get(length))
                    && let Some(rule) = self.uuids.get(&uuid)
                {
                    return Some((length, rule, escaped));
                }
                if before.last() == Some(&b'-') {
                    return None;
                }
                self.tag_at(rest).map(|(length, rule)| (length, rule, false))
            }
            _ => None,
        }
    }

    fn path_at(&self, rest: &[u8]) -> Option<(usize, &Rule)> {
        rest.strip_prefix(b"/dev/")?;
        let length = rest.iter().position(|b| ends_value(*b) || *b == b':').unwrap_or(rest.len());
        // A name of by-path has colons in it; what stands before a colon of `cryptdevice=` is the device.
        let whole = rest.iter().position(|b| ends_value(*b)).unwrap_or(rest.len());
        [whole, length].into_iter().find_map(|length| {
            let path = std::str::from_utf8(rest.get(..length)?).ok()?;
            Some((length, self.paths.get(path)?))
        })
    }

    fn tag_at(&self, rest: &[u8]) -> Option<(usize, &Rule)> {
        let tag = TAGS.into_iter().find(|tag| {
            rest.get(..tag.len()).is_some_and(|t| t.eq_ignore_ascii_case(tag.as_bytes())) && rest.get(tag.len()) == Some(&b'=')
        })?;
        let begin = tag.len() + 1;
        let quote = rest.get(begin).copied().filter(|b| matches!(b, b'"' | b'\''));
        let value = rest.get(begin + usize::from(quote.is_some())..)?;
        let end = |b: &u8| quote.map_or_else(|| ends_value(*b), |q| *b == q);
        let whole = value.iter().position(end).unwrap_or(value.len());
        let colon = value.iter().position(|b| end(b) || *b == b':').unwrap_or(value.len());
        [whole, colon].into_iter().find_map(|length| {
            let value = value.get(..length)?;
            let folded = value.to_ascii_uppercase();
            let rules = [value.to_vec(), if tag == "UUID" { folded } else { value.to_vec() }];
            let rule = rules.into_iter().find_map(|value| self.tags.get(&(tag, value)))?;
            // The quotes go with the old value: the new one needs none.
            let closed = quote.is_some_and(|q| rest.get(begin + 1 + length) == Some(&q));
            Some((begin + length + if closed { 2 } else { usize::from(quote.is_some()) }, rule))
        })
    }
}

/// What ends an identifier that isn't quoted.
fn ends_value(byte: u8) -> bool {
    byte.is_ascii_whitespace() || byte.is_ascii_control() || matches!(byte, b'"' | b'\'' | b',' | b';' | b'=')
}

/// Whether a label can be written without quotes or escapes.
fn is_plain(label: &str) -> bool {
    !label.is_empty() && label.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.' | b'+'))
}

/// Whether it has the form of a UUID of 36 characters.
fn is_long(text: &[u8]) -> bool {
    text.len() == 36
        && text.iter().enumerate().all(|(i, b)| if matches!(i, 8 | 13 | 18 | 23) { *b == b'-' } else { b.is_ascii_hexdigit() })
}

/// A UUID of 36 characters at the beginning, in lower case, with its length there and whether its hyphens are escaped.
fn long_uuid(text: &[u8]) -> Option<(String, usize, bool)> {
    let plain = |text: &[u8]| is_long(text).then(|| String::from_utf8_lossy(text).to_lowercase());
    if text.get(8) == Some(&b'-') {
        return Some((plain(text.get(..36)?)?, 36, false));
    }
    if text.get(8..12) != Some(b"\\x2d") {
        return None;
    }
    let escaped = std::str::from_utf8(text.get(..48)?).ok()?;
    Some((plain(escaped.replace("\\x2d", "-").as_bytes())?, 48, true))
}

/// A value with the escapes of fstab(5).
fn octal(value: &str) -> Vec<u8> {
    let mut out = Vec::new();
    for byte in value.bytes() {
        match byte {
            b' ' | b'\t' | b'\n' | b'\\' => out.extend(format!("\\{byte:03o}").bytes()),
            other => out.push(other),
        }
    }
    out
}

/// A value as udev writes it into the names of links: everything but a few characters and valid UTF-8 as `\xNN`.
fn udev(value: &str) -> String {
    let mut out = String::new();
    for c in value.chars() {
        if c.is_ascii_alphanumeric() || "#+-.:=@_".contains(c) || !c.is_ascii() {
            out.push(c);
        } else {
            out.push_str(&format!("\\x{:02x}", c as u32));
        }
    }
    out
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    const A: &str = "aaaaaaaa-0000-4000-8000-00000000000";
    const B: &str = "bbbbbbbb-0000-4000-8000-00000000000";

    fn part(start: &str, n: u32, uuid: Option<&str>, label: Option<&str>, paths: &[&str]) -> PartIds {
        PartIds {
            partuuid: PartUuid::parse(&format!("{start}{n}")).unwrap(),
            uuid: uuid.map(Into::into),
            label: label.map(Into::into),
            partlabel: label.map(|l| format!("p{l}")),
            paths: paths.iter().map(|p| (*p).to_owned()).collect(),
        }
    }

    fn disks() -> (DiskIds, DiskIds) {
        let disk = |name: &str, start: &str, esp: &str, root: char, dev: &str, home: &str| {
            let root = format!("{}-1111-4111-8111-111111111111", root.to_string().repeat(8));
            let by_path = format!("/dev/disk/by-path/pci-0000:00:{dev}-part2");
            let parts = [
                (Role::Esp, part(start, 1, Some(esp), Some("EFI"), &[&format!("/dev/{dev}1")])),
                (Role::Root, part(start, 2, Some(&root), Some("root"), &[&format!("/dev/{dev}2"), &by_path])),
                (Role::Home, part(start, 3, None, Some(home), &[])),
            ];
            DiskIds { name: DiskName::parse(name).unwrap(), parts: parts.into() }
        };
        let a = disk("disk0", A, "AAAA-0001", 'c', "sda", "my home");
        (a, disk("disk1", B, "BBBB-0001", 'd', "sdb", "home1"))
    }

    pub fn to_b() -> Rewriter {
        let (a, b) = disks();
        Rewriter::new(&b, &[a]).unwrap()
    }

    fn rewrite(text: &str) -> String {
        String::from_utf8(to_b().rewrite(text.as_bytes())).unwrap()
    }

    pub const ROOT_A: &str = "cccccccc-1111-4111-8111-111111111111";
    pub const ROOT_B: &str = "dddddddd-1111-4111-8111-111111111111";

    #[test]
    fn f15_every_form_of_an_identifier() {
        let upper = ROOT_A.to_uppercase();
        let by_b = |n: u32| format!("/dev/disk/by-partuuid/{B}{n}");
        for (text, expected) in [
            (format!("root=UUID={ROOT_A} ro"), format!("root=UUID={ROOT_B} ro")),
            (format!("root=\"UUID={ROOT_A}\""), format!("root=\"UUID={ROOT_B}\"")),
            (format!("root=uuid={upper}"), format!("root=uuid={ROOT_B}")),
            (format!("root=PARTUUID={A}2"), format!("root=PARTUUID={B}2")),
            (format!("/dev/disk/by-uuid/{ROOT_A}"), format!("/dev/disk/by-uuid/{ROOT_B}")),
            (format!("rd.luks.uuid=luks-{ROOT_A}"), format!("rd.luks.uuid=luks-{ROOT_B}")),
            (format!("cryptdevice=UUID={ROOT_A}:root"), format!("cryptdevice=UUID={ROOT_B}:root")),
            (
                format!("x-systemd.requires=dev-disk-by\\x2duuid-{}.device", ROOT_A.replace('-', "\\x2d")),
                format!("x-systemd.requires=dev-disk-by\\x2duuid-{}.device", ROOT_B.replace('-', "\\x2d")),
            ),
            ("UUID=AAAA-0001 /boot".into(), "UUID=BBBB-0001 /boot".into()),
            ("UUID=aaaa-0001 /boot".into(), "UUID=BBBB-0001 /boot".into()),
            ("UUID=\"AAAA-0001\" /boot".into(), "UUID=BBBB-0001 /boot".into()),
            ("/dev/disk/by-uuid/AAAA-0001".into(), by_b(1)),
            ("LABEL=root /".into(), format!("UUID={ROOT_B} /")),
            ("LABEL=\"root\" /".into(), format!("UUID={ROOT_B} /")),
            ("LABEL=my\\040home /home".into(), "LABEL=home1 /home".into()),
            ("LABEL=\"my home\" /home".into(), "LABEL=home1 /home".into()),
            ("PARTLABEL=pmy\\x20home".into(), "PARTLABEL=phome1".into()),
            ("PARTLABEL=proot".into(), format!("PARTUUID={B}2")),
            ("/dev/disk/by-label/root".into(), by_b(2)),
            ("/dev/disk/by-label/my\\x20home".into(), by_b(3)),
            ("root=/dev/sda2".into(), format!("root={}", by_b(2))),
            ("cryptdevice=/dev/sda2:root".into(), format!("cryptdevice={}:root", by_b(2))),
            ("/dev/disk/by-path/pci-0000:00:sda-part2 /".into(), format!("{} /", by_b(2))),
        ] {
            assert_eq!(rewrite(&text), expected);
            assert_eq!(rewrite(&expected), expected, "again");
            assert_eq!(to_b().foreign(text.as_bytes()).len(), 1, "{text}");
            assert_eq!(to_b().foreign(expected.as_bytes()), [""; 0], "{expected}");
        }
    }

    #[test]
    fn f15_what_only_looks_alike_stays() {
        for text in [
            format!("x{ROOT_A}"),
            format!("{ROOT_A}0"),
            "/dev/sda20 /dev/sda /dev/sda2x".into(),
            "LABEL=root2 LABEL=roo XLABEL=root".into(),
            "AAAA-0001 NOTUUID=AAAA-0001".into(),
            "title Debian on root".into(),
            format!("UUID={ROOT_B} /dev/sdb2"),
        ] {
            assert_eq!(rewrite(&text), text);
        }
    }

    #[test]
    fn f03_shared_identifiers_are_refused() {
        let (a, mut b) = disks();
        b.parts.get_mut(&Role::Root).unwrap().uuid = Some(ROOT_A.into());
        assert!(Rewriter::new(&b, &[a]).unwrap_err().to_string().contains("share an identifier"));
    }

    #[test]
    fn what_has_no_counterpart_stays_and_is_reported() {
        let (a, mut b) = disks();
        b.parts.remove(&Role::Root);
        let rewriter = Rewriter::new(&b, &[a]).unwrap();
        let text = format!("root=UUID={ROOT_A} LABEL=root");
        assert_eq!(rewriter.rewrite(text.as_bytes()), text.as_bytes());
        assert_eq!(rewriter.foreign(text.as_bytes()).len(), 2);
    }

    #[test]
    fn f17_streams_are_searched_across_chunks() {
        let chunk = 1 << 18;
        for at in [0, 5, 1000, chunk - 1100, chunk - 20, chunk - 1, chunk, 2 * chunk - 30] {
            let mut text = vec![0_u8; 2 * chunk + 100];
            text.splice(at..at + 36, ROOT_A.bytes());
            assert_eq!(to_b().foreign_in_stream(&text[..]).unwrap().len(), 1, "at {at}");
        }
        let words = "x".repeat(chunk - 36) + ROOT_A;
        assert_eq!(to_b().foreign_in_stream(words.as_bytes()).unwrap(), [""; 0]);
    }

    #[test]
    fn identifiers_are_stored_as_text() {
        let (a, _) = disks();
        let json = serde_json::to_string(&a).unwrap();
        assert!(json.contains("\"disk0\"") && json.contains("\"root\":{\"partuuid\":\"aaaaaaaa-"), "{json}");
        assert_eq!(serde_json::from_str::<DiskIds>(&json).unwrap(), a);
    }

    fn piece() -> impl Strategy<Value = Vec<u8>> {
        let (a, b) = (format!("{A}2"), format!("{B}2"));
        let fixed: Vec<Vec<u8>> =
            [ROOT_A, ROOT_B, &a, &b, "UUID=", "LABEL=", "root", "my\\040home", "/dev/sda2", "/dev/disk/by-label/", " "]
                .map(|s| s.as_bytes().to_vec())
                .into();
        let more: Vec<Vec<u8>> = ["\"", "\n", ":", ",", "=", "AAAA-0001", "PARTLABEL=", "proot", "-", "x2d", "\\x2d"]
            .map(|s| s.as_bytes().to_vec())
            .into();
        prop_oneof![
            proptest::sample::select(fixed),
            proptest::sample::select(more),
            proptest::collection::vec(any::<u8>(), 0..12)
        ]
    }

    proptest! {
        #[test]
        fn rewriting_twice_is_rewriting_once(pieces in proptest::collection::vec(piece(), 0..20)) {
            let text = pieces.concat();
            let once = to_b().rewrite(&text);
            prop_assert_eq!(to_b().rewrite(&once), once.clone());
            prop_assert_eq!(to_b().foreign(&once), Vec::<String>::new());
            if to_b().foreign(&text).is_empty() {
                prop_assert_eq!(once, text);
            }
        }
    }
}
