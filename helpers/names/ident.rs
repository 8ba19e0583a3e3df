//! The identifiers of a pair's partitions, and the rewriting of texts that name them.
//!
//! Rewriting works on bytes and doesn't parse the file's format: an identifier of another disk's partition is replaced by one of the
//! target's partition with the same role, wherever it occurs; everything else stays byte for byte. It knows these forms (those of
//! fstab(5), crypttab(5), kernel-command-line(7), udev's links and systemd's unit names):
//!
//! - UUIDs and PARTUUIDs of 36 characters, in any case, anywhere between characters that are neither letters nor digits (`UUID=…`,
//!   `rd.luks.uuid=luks-…`, `/dev/disk/by-uuid/…`), also without hyphens (as in names of device-mapper);
//! - shorter ones (FAT, NTFS) only after `UUID=` or `by-uuid/`;
//! - labels only after `LABEL=`, `PARTLABEL=` (in upper case, as no program reads another form), `by-label/`, `by-partlabel/`;
//! - any other path of the partition below /dev, as a whole, and as the name of its unit (`dev-sda2.device`).
//!
//! Every character of these may be escaped as fstab(5), udev and systemd do it (`\040`, `\x20`, `\x2d`); values after a tag may
//! be quoted.
//!
//! The replacement keeps the form: the tag or directory, quotes, escaped hyphens and slashes. There are two exceptions. A label becomes a
//! UUID if the target has no label, one that another disk has too, or one with characters that would have to be escaped. A path such
//! as `/dev/sda2` becomes `/dev/disk/by-partuuid/…`, which works wherever a path does (`x-systemd.requires=` takes nothing else); but
//! directly after `root=` or `resume=` it becomes `PARTUUID=…`, the only form that the kernel itself reads without an initrd, and that
//! every initrd reads too.

mod needle;
mod written;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read};

use anyhow::{Result, bail};

use self::needle::{Form, Needle};
use self::written::{LOOK_BACK, Match, Quotes, match_at, write_replacement};
use crate::base::types::{DiskName, Role};
use crate::names::ids::DiskIds;

/// The bytes that a match can have besides its value: tag, directory and quotes, with escapes.
const AROUND: usize = 128;
/// The bytes of a stream that are read at once.
const CHUNK: usize = 1 << 20;

/// Replaces the identifiers of other disks by those of one disk, the target.
#[derive(Clone, Debug)]
pub struct Rewriter {
    needles: Vec<Needle>,
    /// For each byte, the indexes of the needles whose matches can begin with it.
    first: Vec<Vec<usize>>,
    /// A bit for each pair of bytes: whether a match can begin with it. This rules out most places of an initrd cheaply.
    pairs: Vec<u64>,
    /// The length in bytes of the longest possible match.
    longest: usize,
}

impl Rewriter {
    /// A rewriter from the identifiers of `others` to those of `target`. A disk with the target's name among the others is ignored.
    ///
    /// # Errors
    /// A UUID or PARTUUID is on two disks, or in two roles (failure mode 3). A label may be, and becomes a UUID.
    pub fn new(target: &DiskIds, others: &[DiskIds]) -> Result<Self> {
        let others: Vec<&DiskIds> = others.iter().filter(|d| d.name != target.name).collect();
        check_uuids(target, &others)?;
        Ok(Self::index(needle::all(target, others)))
    }

    /// A rewriter that only finds the identifiers of these disks ([`Rewriter::foreign`]) and replaces none.
    ///
    /// # Errors
    /// As [`Rewriter::new`]; all names of disks are taken.
    pub fn finder(disks: &[DiskIds]) -> Result<Self> {
        let taken: Vec<DiskName> = disks.iter().map(|disk| disk.name).collect();
        Self::new(&DiskIds { name: DiskName::first_free(&taken)?, parts: BTreeMap::new() }, disks)
    }

    /// A rewriter that only finds these words, given as the text to report and the word. They match byte for byte whatever is around
    /// them, except that `-` matches `_` after the first two bytes.
    pub fn words(words: impl IntoIterator<Item = (String, Vec<u8>)>) -> Self {
        let exact = |(shown, value)| Needle { form: Form::Exact, value, any_case: false, new: None, shown };
        Self::index(words.into_iter().map(exact).collect())
    }

    /// Builds the tables by which most places of a text are skipped.
    fn index(needles: Vec<Needle>) -> Self {
        let mut new = Self { needles, first: vec![Vec::new(); 256], pairs: vec![0; 1 << 10], longest: 0 };
        for (number, needle) in new.needles.iter().enumerate() {
            new.longest = new.longest.max(needle.value.len() * 5 + AROUND);
            let begin = match needle.form {
                Form::Bare | Form::Unit | Form::Path | Form::Exact => &needle.value,
                Form::Tag(kind) => kind.tag().as_bytes(),
                Form::Dir(kind) => kind.dir().as_bytes(),
            };
            let [a, b, ..] = *begin else { continue };
            let cases = |byte: u8| match needle.any_case {
                true => BTreeSet::from([byte.to_ascii_lowercase(), byte.to_ascii_uppercase()]),
                false => BTreeSet::from([byte]),
            };
            let mut firsts = cases(a);
            if matches!(needle.form, Form::Path) {
                firsts.insert(b'\\');
            }
            for first in firsts {
                if let Some(list) = new.first.get_mut(usize::from(first)) {
                    list.push(number);
                }
                // A backslash begins an escape of either byte.
                let seconds =
                    if first == b'\\' { BTreeSet::from(*b"x\\0123") } else { cases(b).into_iter().chain([b'\\']).collect() };
                for second in seconds {
                    let (word, bit) = pair(first, second);
                    if let Some(word) = new.pairs.get_mut(word) {
                        *word |= bit;
                    }
                }
            }
        }
        new
    }

    /// A hash of all needles. A file in which one rewriter found nothing needs no search by another with the same hash.
    pub fn fingerprint(&self) -> blake3::Hash {
        blake3::hash(format!("{:?}", self.needles).as_bytes())
    }

    /// The text with every identifier of another disk replaced, if the target has a partition of that role. A second call changes
    /// nothing.
    pub fn rewrite(&self, text: &[u8]) -> Vec<u8> {
        let mut out = Vec::with_capacity(text.len());
        let mut done = 0;
        self.scan(text, 0, text.len(), &mut Quotes::default(), |found| {
            if let Some(new) = &found.needle.new {
                out.extend(text.get(done..found.span.start).unwrap_or_default());
                write_replacement(&found, new, text, &mut out);
                done = found.span.end;
            }
        });
        out.extend(text.get(done..).unwrap_or_default());
        out
    }

    /// The identifiers of other disks in a text, each once, as text for people: `UUID=… (root of disk0)`.
    pub fn foreign(&self, text: &[u8]) -> Vec<String> {
        let mut seen = Vec::new();
        self.scan(text, 0, text.len(), &mut Quotes::default(), |found| note(&mut seen, &found));
        seen
    }

    /// As [`Rewriter::foreign`], for a stream of any length in bounded memory.
    ///
    /// # Errors
    /// Those of reading.
    pub fn foreign_in_stream(&self, stream: impl Read) -> io::Result<Vec<String>> {
        self.search(stream, CHUNK)
    }

    fn search(&self, mut stream: impl Read, chunk: usize) -> io::Result<Vec<String>> {
        let mut seen = Vec::new();
        let mut held = Vec::new();
        let mut quotes = Quotes::default();
        // Where the next match may begin.
        let mut next = 0;
        loop {
            let more = stream.by_ref().take(chunk as u64).read_to_end(&mut held)?;
            // Places too near the end wait for more bytes: a match there could be incomplete.
            let upto = if more == 0 { held.len() } else { held.len().saturating_sub(self.longest) };
            next = self.scan(&held, next, upto, &mut quotes, |found| note(&mut seen, &found));
            if more == 0 {
                return Ok(seen);
            }
            let dropped = next.saturating_sub(LOOK_BACK);
            quotes.open_at(&held, next);
            quotes.drop_bytes(dropped);
            held.drain(..dropped.min(held.len()));
            next -= dropped;
        }
    }

    /// Calls `each` for every match that begins in `from..upto`, and returns where the next one may begin.
    fn scan<'n>(&'n self, text: &[u8], from: usize, upto: usize, quotes: &mut Quotes, mut each: impl FnMut(Match<'n>)) -> usize {
        let mut at = from;
        while at < upto {
            let rest = text.get(at..).unwrap_or_default().windows(2).take(upto - at);
            let may_begin = |two: &[u8]| match *two {
                [a, b] => {
                    let (word, bit) = pair(a, b);
                    self.pairs.get(word).is_some_and(|word| word & bit != 0)
                }
                _ => false,
            };
            let Some(skip) = rest.into_iter().position(may_begin) else { return upto };
            at += skip;
            match self.find(text, at, quotes) {
                Some(found) => {
                    at = found.span.end.max(at + 1);
                    each(found);
                }
                None => at += 1,
            }
        }
        at
    }

    /// The longest match that begins at this place.
    fn find(&self, text: &[u8], at: usize, quotes: &mut Quotes) -> Option<Match<'_>> {
        let candidates = self.first.get(usize::from(*text.get(at)?))?;
        let matches = candidates.iter().filter_map(|&n| match_at(self.needles.get(n)?, text, at, quotes));
        matches.max_by_key(|found| found.span.end)
    }
}

/// The index and bit for a pair of bytes in [`Rewriter::pairs`].
fn pair(a: u8, b: u8) -> (usize, u64) {
    let number = usize::from(a) << 8 | usize::from(b);
    (number >> 6, 1 << (number & 63))
}

/// Adds a match to the list of identifiers, unless it is there.
fn note(seen: &mut Vec<String>, found: &Match<'_>) {
    if !seen.contains(&found.needle.shown) {
        seen.push(found.needle.shown.clone());
    }
}

/// Checks that no UUID is on the target and on another disk, or in two roles of the other disks.
fn check_uuids(target: &DiskIds, others: &[&DiskIds]) -> Result<()> {
    let mut known: Vec<(String, &'static str, &Role, DiskName)> = Vec::new();
    for disk in [target].into_iter().chain(others.iter().copied()) {
        for (role, ids) in &disk.parts {
            let lower = |uuid: &Option<String>| uuid.as_deref().filter(|u| !u.is_empty()).map(str::to_lowercase);
            let uuid = lower(&ids.uuid).map(|uuid| (uuid, "file system UUID"));
            let container = ids.container.as_ref().and_then(|c| lower(&c.uuid)).map(|uuid| (uuid, "LUKS UUID"));
            for (value, kind) in uuid.into_iter().chain(container).chain([(ids.partuuid.to_string(), "PARTUUID")]) {
                let twin = known.iter().find(|(v, _, r, d)| *v == value && (*d == target.name || *r != role));
                if let Some((_, _, twin_role, twin_disk)) = twin {
                    bail!(
                        "{twin_role} of {twin_disk} and {role} of {} have the same {kind} {value}. Give one of them a new one \
                         (file systems: tune2fs -U random, btrfstune -u, xfs_admin -U generate, mlabel -n, swaplabel -U, \
                         cryptsetup luksUUID; partitions: sgdisk --partition-guid=N:R)",
                        disk.name
                    );
                }
                known.push((value, kind, role, disk.name));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::base::types::PartUuid;
    use crate::names::ids::{ContainerIds, PartIds};

    const A: &str = "aaaaaaaa-0000-4000-8000-00000000000";
    const B: &str = "bbbbbbbb-0000-4000-8000-00000000000";
    pub const ROOT_A: &str = "cccccccc-1111-4111-8111-111111111111";
    pub const ROOT_B: &str = "dddddddd-1111-4111-8111-111111111111";

    fn part(start: &str, n: u32, uuid: Option<&str>, label: Option<&str>, paths: &[&str]) -> PartIds {
        PartIds {
            uuid: uuid.map(Into::into),
            label: label.map(Into::into),
            partlabel: label.map(|l| format!("p{l}")),
            paths: paths.iter().map(|p| (*p).to_owned()).collect(),
            ..PartIds::new(PartUuid::parse(&format!("{start}{n}")).unwrap())
        }
    }

    fn disks() -> (DiskIds, DiskIds) {
        let disk = |name: &str, start: &str, esp: &str, root: &str, dev: &str, home: &str| {
            let by_path = format!("/dev/disk/by-path/pci-0000:00:{dev}-part2");
            let by_id = format!("/dev/disk/by-id/ata-{dev}.1-part2");
            let parts = [
                (Role::Esp, part(start, 1, Some(esp), Some("EFI"), &[&format!("/dev/{dev}1")])),
                (Role::Root, part(start, 2, Some(root), Some("root"), &[&format!("/dev/{dev}2"), &by_path, &by_id])),
                (Role::Home, part(start, 3, None, Some(home), &[])),
            ];
            DiskIds { name: DiskName::parse(name).unwrap(), parts: parts.into() }
        };
        let a = disk("disk0", A, "AAAA-0001", ROOT_A, "sda", "my home");
        (a, disk("disk1", B, "BBBB-0001", ROOT_B, "sdb", "home1"))
    }

    pub fn to_b() -> Rewriter {
        let (a, b) = disks();
        Rewriter::new(&b, &[a]).unwrap()
    }

    /// For the same target, but another disk with another root.
    pub fn from_another() -> Rewriter {
        let (mut a, b) = disks();
        a.parts.get_mut(&Role::Root).unwrap().uuid = Some(ROOT_A.replace('c', "e"));
        Rewriter::new(&b, &[a]).unwrap()
    }

    fn rewrite(text: &str) -> String {
        String::from_utf8(to_b().rewrite(text.as_bytes())).unwrap()
    }

    fn unit(text: &str) -> String {
        text.replace('-', "\\x2d")
    }

    #[test]
    fn f15_every_form_of_an_identifier_is_rewritten() {
        let upper = ROOT_A.to_uppercase();
        let short = |uuid: &str| uuid.replace('-', "");
        let by_b = |n: u32| format!("/dev/disk/by-partuuid/{B}{n}");
        let by_b_unit = |n: u32| format!("dev-disk-by\\x2dpartuuid-{}", unit(&format!("{B}{n}")));
        for (text, expected) in [
            // UUIDs of 36 characters.
            (format!("root=UUID={ROOT_A} ro"), format!("root=UUID={ROOT_B} ro")),
            (format!("root=\"UUID={ROOT_A}\""), format!("root=\"UUID={ROOT_B}\"")),
            (format!("root='UUID={upper}'"), format!("root='UUID={ROOT_B}'")),
            (format!("root=uuid={upper}"), format!("root=uuid={ROOT_B}")),
            (format!("root=PARTUUID={A}2"), format!("root=PARTUUID={B}2")),
            (format!("root=PARTUUID={A}1/PARTNROFF=1"), format!("root=PARTUUID={B}1/PARTNROFF=1")),
            (format!("/dev/disk/by-uuid/{ROOT_A}"), format!("/dev/disk/by-uuid/{ROOT_B}")),
            (format!("/dev/disk/by-partuuid/{A}2"), by_b(2)),
            (format!("rd.luks.uuid=luks-{ROOT_A}"), format!("rd.luks.uuid=luks-{ROOT_B}")),
            (format!("rd.luks.name={ROOT_A}=x"), format!("rd.luks.name={ROOT_B}=x")),
            (format!("/dev/mapper/luks-{ROOT_A}"), format!("/dev/mapper/luks-{ROOT_B}")),
            (format!("cryptdevice=UUID={ROOT_A}:root"), format!("cryptdevice=UUID={ROOT_B}:root")),
            (format!("dm-uuid-CRYPT-LUKS2-{}-x", short(ROOT_A)), format!("dm-uuid-CRYPT-LUKS2-{}-x", short(ROOT_B))),
            (format!("dev-disk-by\\x2duuid-{}.device", unit(ROOT_A)), format!("dev-disk-by\\x2duuid-{}.device", unit(ROOT_B))),
            (format!("dev-mapper-luks\\x2d{}.device", unit(ROOT_A)), format!("dev-mapper-luks\\x2d{}.device", unit(ROOT_B))),
            (
                format!("devexists-\\x2fdev\\x2fdisk\\x2fby-uuid\\x2f{ROOT_A}.sh"),
                format!("devexists-\\x2fdev\\x2fdisk\\x2fby-uuid\\x2f{ROOT_B}.sh"),
            ),
            // Shorter UUIDs.
            ("UUID=AAAA-0001 /boot".into(), "UUID=BBBB-0001 /boot".into()),
            ("uuid=aaaa-0001 /boot".into(), "uuid=BBBB-0001 /boot".into()),
            ("UUID=\"AAAA-0001\" /boot".into(), "UUID=\"BBBB-0001\" /boot".into()),
            ("\"UUID=AAAA-0001\"".into(), "\"UUID=BBBB-0001\"".into()),
            ("/dev/disk/by-uuid/AAAA-0001".into(), "/dev/disk/by-uuid/BBBB-0001".into()),
            ("dev-disk-by\\x2duuid-AAAA\\x2d0001.device".into(), "dev-disk-by\\x2duuid-BBBB\\x2d0001.device".into()),
            // Labels.
            ("LABEL=root /".into(), format!("UUID={ROOT_B} /")),
            ("LABEL=\"root\" /".into(), format!("UUID=\"{ROOT_B}\" /")),
            ("root=LABEL=root\n".into(), format!("root=UUID={ROOT_B}\n")),
            ("X=\"root=LABEL=root quiet\"".into(), format!("X=\"root=UUID={ROOT_B} quiet\"")),
            ("cryptdevice=LABEL=root:x".into(), format!("cryptdevice=UUID={ROOT_B}:x")),
            ("LABEL=my\\040home /home".into(), "LABEL=home1 /home".into()),
            ("LABEL=my\\x20home /home".into(), "LABEL=home1 /home".into()),
            ("LABEL=\"my home\" /home".into(), "LABEL=\"home1\" /home".into()),
            ("\"LABEL=my home\" /home".into(), "\"LABEL=home1\" /home".into()),
            ("home=\"LABEL=my home\"".into(), "home=\"LABEL=home1\"".into()),
            ("PARTLABEL=pmy\\x20home".into(), "PARTLABEL=phome1".into()),
            ("PARTLABEL=proot".into(), format!("PARTUUID={B}2")),
            ("/dev/disk/by-label/root".into(), format!("/dev/disk/by-uuid/{ROOT_B}")),
            ("/dev/disk/by-label/my\\x20home".into(), "/dev/disk/by-label/home1".into()),
            ("/dev/disk/by-partlabel/proot,x".into(), format!("{},x", by_b(2))),
            ("dev-disk-by\\x2dlabel-root.device".into(), format!("dev-disk-by\\x2duuid-{}.device", unit(ROOT_B))),
            ("dev-disk-by\\x2dlabel-my\\x5cx20home.device".into(), "dev-disk-by\\x2dlabel-home1.device".into()),
            ("dev-disk-by\\x2dpartlabel-proot.swap".into(), format!("{}.swap", by_b_unit(2))),
            // Other paths.
            ("root=/dev/sda2 ro".into(), format!("root=PARTUUID={B}2 ro")),
            ("root=\"/dev/sda2\" ro".into(), format!("root=\"PARTUUID={B}2\" ro")),
            ("resume=/dev/disk/by-id/ata-sda.1-part2".into(), format!("resume=PARTUUID={B}2")),
            ("mount.usr=/dev/sda2".into(), format!("mount.usr={}", by_b(2))),
            ("cryptdevice=/dev/sda2:root".into(), format!("cryptdevice={}:root", by_b(2))),
            ("x-systemd.requires=/dev/sda2,x".into(), format!("x-systemd.requires={},x", by_b(2))),
            ("# /dev/sda2.".into(), format!("# {}.", by_b(2))),
            ("/dev/disk/by-path/pci-0000:00:sda-part2 /".into(), format!("{} /", by_b(2))),
            ("BindsTo=dev-sda2.device".into(), format!("BindsTo={}.device", by_b_unit(2))),
            ("dev-disk-by\\x2did-ata\\x2dsda.1\\x2dpart2.device".into(), format!("{}.device", by_b_unit(2))),
        ] {
            assert_eq!(rewrite(&text), expected, "{text}");
            assert_eq!(rewrite(&expected), expected, "again");
            assert_eq!(to_b().foreign(text.as_bytes()).len(), 1, "{text}");
            assert_eq!(to_b().foreign(expected.as_bytes()), [""; 0], "{expected}");
        }
    }

    #[test]
    fn f13_the_ids_of_a_container_and_of_its_file_system_are_rewritten() {
        let (mut a, mut b) = disks();
        let [box_a, box_b] = ["eeeeeeee", "ffffffff"].map(|start| format!("{start}-1111-4111-8111-111111111111"));
        for (disk, uuid, label) in [(&mut a, &box_a, "box"), (&mut b, &box_b, "box1")] {
            let container = ContainerIds { uuid: Some(uuid.clone()), label: Some(label.to_owned()) };
            disk.parts.get_mut(&Role::Root).unwrap().container = Some(container);
        }
        let rewriter = Rewriter::new(&b, &[a.clone()]).unwrap();
        let text = |uuid: &str, root: &str, label: &str| {
            let bare = uuid.replace('-', "");
            format!(
                "root=UUID={root} cryptopts=target=cryptroot,source=UUID={uuid} rd.luks.name={uuid}=cryptroot luks-{uuid} \
                 dm-uuid-CRYPT-LUKS2-{bare}-x LABEL={label} /dev/mapper/cryptroot"
            )
        };
        let rewritten = rewriter.rewrite(text(&box_a, ROOT_A, "box").as_bytes());
        assert_eq!(String::from_utf8(rewritten).unwrap(), text(&box_b, ROOT_B, "box1"));
        assert_eq!(rewriter.foreign(box_a.as_bytes()), [format!("UUID={box_a} (root of disk0)")]);
        b.parts.get_mut(&Role::Root).unwrap().container = a.parts[&Role::Root].container.clone();
        assert!(Rewriter::new(&b, &[a]).unwrap_err().to_string().contains("the same LUKS UUID"));
    }

    #[test]
    fn f13_kernel_command_lines_and_crypttab_are_rewritten() {
        let long = |root: &str| {
            format!(
                "root=/dev/mapper/root cryptdevice=UUID={root}:root resume=UUID={root} rd.luks.uuid=luks-{root} \
                 rd.luks.options={root}=discard rd.luks.name={root}=root rootflags=subvol=@ quiet\n\
                 root\tUUID={root} none luks,discard,header=/x\nswap /dev/disk/by-uuid/{root} /dev/urandom swap\n"
            )
        };
        assert_eq!(rewrite(&long(ROOT_A)), long(ROOT_B));
        assert_eq!(to_b().foreign(long(ROOT_A).as_bytes()), [format!("UUID={ROOT_A} (root of disk0)")]);
    }

    #[test]
    fn f26_a_quote_is_open_however_long_the_line_is() {
        for length in [0, 200, 300, 5000] {
            let line = |label: &str| format!("\"\nx=\"{} LABEL={label}\" LABEL={label}\"\n", "y".repeat(length));
            assert_eq!(rewrite(&line("my home")), line("home1").replace(" LABEL=home1\"\n", " LABEL=my home\"\n"), "{length}");
            let text = line("my home");
            assert_eq!(to_b().search(text.as_bytes(), 100).unwrap().len(), 1, "{length}");
        }
    }

    #[test]
    fn f26_a_quote_that_is_not_closed_ends_with_its_line() {
        assert_eq!(rewrite("a LABEL=\"my home\nb LABEL='my home"), "a LABEL=\"home1\nb LABEL='home1");
        assert_eq!(rewrite("LABEL=\"my home x\n"), "LABEL=\"my home x\n");
    }

    #[test]
    fn f15_texts_that_only_look_alike_stay() {
        for text in [
            format!("x{ROOT_A}"),
            format!("{ROOT_A}0"),
            "/dev/sda20 /dev/sda /dev/sda2x /dev/sda2-x /sysroot/dev/sda2 /dev/sda2/x".into(),
            "LABEL=root2 LABEL=roo XLABEL=root X_LABEL=root LABEL=root-2 label=root LABEL=\"root 2\" LABEL=root\\0402".into(),
            "LABEL=my home".into(),
            "AAAA-0001 UUID=AAAA-00012 UUID=AAAA-0001-2 PARTUUID=AAAA-0001".into(),
            "dev-sda20.device dev-sda2 x-dev-sda2.device dev-disk-by\\x2dlabel-root2.device".into(),
            "/dev/disk/by-label/root2 /dev/disk/by-label/root.2 /dev/disk/by-label/root/x".into(),
            "title Debian on root".into(),
            format!("UUID={ROOT_B} /dev/sdb2"),
        ] {
            assert_eq!(rewrite(&text), text);
            assert_eq!(to_b().foreign(text.as_bytes()), [""; 0], "{text}");
        }
    }

    #[test]
    fn f03_shared_identifiers_are_refused() {
        let (a, b) = disks();
        let with_root = |disk: &DiskIds, role: &Role, uuid: &str| {
            let mut disk = disk.clone();
            disk.parts.get_mut(role).unwrap().uuid = Some(uuid.into());
            disk
        };
        for (target, other) in [
            (with_root(&b, &Role::Root, ROOT_A), a.clone()),
            (with_root(&b, &Role::Root, &ROOT_A.to_uppercase()), a.clone()),
            (with_root(&b, &Role::Home, ROOT_A), a.clone()),
            (b.clone(), with_root(&a, &Role::Home, ROOT_A)),
            (b.clone(), with_root(&a, &Role::Home, ROOT_B)),
        ] {
            let error = Rewriter::new(&target, &[other]).unwrap_err().to_string();
            assert!(error.contains("have the same file system UUID"), "{error}");
        }
        let mut twin = b.clone();
        twin.parts.get_mut(&Role::Home).unwrap().partuuid = PartUuid::parse(&format!("{A}3")).unwrap();
        assert!(Rewriter::new(&twin, std::slice::from_ref(&a)).unwrap_err().to_string().contains("PARTUUID"));
        assert!(Rewriter::new(&b, &[a, b.clone()]).is_ok(), "the target among the others is ignored");
    }

    #[test]
    fn identifiers_without_a_counterpart_stay_and_are_reported() {
        let (a, mut b) = disks();
        b.parts.remove(&Role::Root);
        let rewriter = Rewriter::new(&b, &[a]).unwrap();
        let text = format!("root=UUID={ROOT_A} LABEL=root /dev/sda2");
        assert_eq!(rewriter.rewrite(text.as_bytes()), text.as_bytes());
        assert_eq!(rewriter.foreign(text.as_bytes()).len(), 3);
    }

    #[test]
    fn a_label_of_two_roles_stays_and_is_reported() {
        let (mut a, b) = disks();
        a.parts.get_mut(&Role::Home).unwrap().label = Some("root".into());
        let rewriter = Rewriter::new(&b, &[a]).unwrap();
        assert_eq!(rewriter.rewrite(b"LABEL=root"), b"LABEL=root");
        assert_eq!(rewriter.foreign(b"LABEL=root"), ["LABEL=root (root of disk0, home of disk0, but disk1 has it too)"]);
    }

    #[test]
    fn f06_a_remembered_device_name_that_now_belongs_to_the_target_stays() {
        let (a, mut b) = disks();
        b.parts.get_mut(&Role::Home).unwrap().paths.insert("/dev/sda2".into());
        let rewriter = Rewriter::new(&b, &[a]).unwrap();
        assert_eq!(rewriter.rewrite(b"/dev/sda2 /home ext4"), b"/dev/sda2 /home ext4");
        assert_eq!(rewriter.foreign(b"/dev/sda2"), [""; 0]);
    }

    #[test]
    fn labels_that_need_escapes_become_uuids() {
        let (a, mut b) = disks();
        for (label, expected) in [("new-1.x_", "LABEL=new-1.x_"), ("a b", "UUID=u"), ("a\"b", "UUID=u"), ("root", "UUID=u")] {
            let home = b.parts.get_mut(&Role::Home).unwrap();
            (home.label, home.uuid) = (Some(label.into()), Some("u".into()));
            let rewriter = Rewriter::new(&b, std::slice::from_ref(&a)).unwrap();
            assert_eq!(String::from_utf8(rewriter.rewrite(b"LABEL=my\\040home")).unwrap(), expected);
        }
    }

    #[test]
    fn f17_streams_are_searched_across_chunks() {
        for at in [0, 5, 1000, CHUNK - 1100, CHUNK - 400, CHUNK - 20, CHUNK - 1, CHUNK, 2 * CHUNK - 30] {
            let mut text = vec![0_u8; 2 * CHUNK + 100];
            text.splice(at..at + 36, ROOT_A.bytes());
            assert_eq!(to_b().foreign_in_stream(&text[..]).unwrap().len(), 1, "at {at}");
        }
        let words = "x".repeat(CHUNK - 36) + ROOT_A;
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
        let known: Vec<Vec<u8>> = [
            ROOT_A,
            ROOT_B,
            "UUID=",
            "LABEL=",
            "PARTLABEL=",
            "root",
            "proot",
            "my\\040home",
            "my home",
            "AAAA-0001",
            "BBBB-0001",
            "/dev/sda2",
            "/dev/sdb2",
            "/dev/disk/",
            "by-label/",
            "by-uuid/",
            "by\\x2dlabel-",
            "by\\x2duuid-",
            "dev-sda2",
            ".device",
            "root=",
            "resume=",
            "cccccccc111141118111111111111111",
            " ",
            "\"",
            "'",
            "\\\"",
            "\n",
            ":",
            ",",
            "=",
            "-",
            "/",
            "\\x2d",
            "\\x2f",
            "\\\\x2d",
            "\\040",
            "\\x20",
            "x2d",
        ]
        .map(|s| s.as_bytes().to_vec())
        .into();
        let partuuids = vec![format!("{A}2").into_bytes(), format!("{B}2").into_bytes(), unit(ROOT_A).into_bytes()];
        prop_oneof![
            4 => proptest::sample::select(known),
            1 => proptest::sample::select(partuuids),
            1 => proptest::collection::vec(any::<u8>(), 0..12)
        ]
    }

    /// Returns a few bytes at a time.
    struct Trickle<'a>(&'a [u8], usize);

    impl Read for Trickle<'_> {
        fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
            let n = self.0.len().min(into.len()).min(self.1);
            into[..n].copy_from_slice(&self.0[..n]);
            self.0 = &self.0[n..];
            Ok(n)
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn rewriting_again_changes_nothing(pieces in proptest::collection::vec(piece(), 0..20)) {
            let text = pieces.concat();
            let rewriter = to_b();
            let once = rewriter.rewrite(&text);
            let twice = rewriter.rewrite(&once);
            prop_assert_eq!(String::from_utf8_lossy(&twice), String::from_utf8_lossy(&once));
            prop_assert_eq!(rewriter.foreign(&once), Vec::<String>::new());
            if rewriter.foreign(&text).is_empty() {
                prop_assert_eq!(once, text);
            }
        }

        #[test]
        fn a_stream_is_searched_like_a_text(pieces in proptest::collection::vec(piece(), 0..60), chunk in 1usize..4096, step in 1usize..300) {
            let text = pieces.concat();
            let rewriter = to_b();
            prop_assert_eq!(rewriter.search(Trickle(&text, step), chunk).unwrap(), rewriter.foreign(&text));
        }
    }
}
