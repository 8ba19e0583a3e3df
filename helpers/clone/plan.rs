//! The plan of a new disk: partitions, file systems and their names, from the booted disk's and the new disk's size.

use std::collections::BTreeSet;
use std::ffi::OsString;

use anyhow::{Result, bail};
use uuid::Uuid;

use crate::base::types::{DiskName, PartUuid, Role};
use crate::clone::source::{Content, Source, SourcePart};
use crate::devices::gpt::{self, DiskLayout, PartLayout};

/// The bytes of 1 MiB.
pub(crate) const MIB: u64 = 1 << 20;

/// A number of bytes in whole MiB, for messages.
pub(crate) fn mib(bytes: u64) -> u64 {
    bytes / MIB
}

/// "Firmware must not produce EFI_BLOCK_IO_PROTOCOL for this partition" (UEFI specification, 5.3.3): from an ESP with this attribute,
/// nothing is booted. It marks a disk that isn't finished yet.
pub const UNFINISHED: &str = "NoBlockIOProtocol";

/// The space before the first partition, and after the last one. The tables of GPT there are smaller.
const MARGIN: u64 = MIB;

/// The size of a LUKS2 container's header, as cryptsetup(8) makes it.
const HEADER: u64 = 16 * MIB;

/// A partition to make.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NewPart {
    /// Its role.
    pub role: Role,
    /// Its PARTUUID.
    pub partuuid: PartUuid,
    /// Its size in bytes, a multiple of 1 MiB.
    pub bytes: u64,
    /// The GUID of its type, as sfdisk has it.
    pub kind: String,
    /// Its name in the GPT.
    pub name: Option<String>,
    /// Its attributes in the GPT once it is finished, as sfdisk has them.
    pub attributes: String,
    /// The UUID of its LUKS container, if it gets one.
    pub container: Option<Uuid>,
    /// The file system, or the like, that is made on it.
    pub content: Content,
    /// The UUID of the file system. FAT takes the first eight digits.
    pub uuid: Uuid,
    /// The label of the file system.
    pub label: Option<String>,
}

/// The new partitions of a disk.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DiskPlan {
    /// The disk's GUID.
    pub disk: Uuid,
    /// Its partitions, in their order on the disk.
    pub parts: Vec<NewPart>,
    /// The size of its sectors in bytes.
    sector: u64,
}

impl DiskPlan {
    /// Plans the partitions of the booted disk on a disk with the given size in bytes, size of sectors and name. Boot partitions and swap
    /// space keep their size; trees grow or shrink in proportion, but never below the room that their files need. `taken` has the labels of
    /// other disks; `ids` gives new identifiers.
    ///
    /// # Errors
    /// A disk that is too small, with figures; an identifier that can't be made.
    pub fn make(
        source: &Source,
        name: DiskName,
        (bytes, sector): (u64, u64),
        taken: BTreeSet<String>,
        mut ids: impl FnMut() -> Result<Uuid>,
    ) -> Result<Self> {
        let sizes = sizes(source, bytes)?;
        let free_label = |old: Option<&str>, taken: &mut BTreeSet<String>, limit: usize| {
            let new = old.filter(|old| !old.is_empty()).map(|old| new_label(old, name, taken, limit));
            taken.extend(new.clone());
            new
        };
        // A partition's name may be the same as its file system's label.
        let (mut names, mut labels) = (taken.clone(), taken);
        let mut parts = Vec::new();
        for (part, bytes) in source.parts.iter().zip(sizes) {
            parts.push(NewPart {
                role: part.role.clone(),
                partuuid: PartUuid::from(ids()?),
                bytes,
                kind: part.kind.clone(),
                name: free_label(part.name.as_deref(), &mut names, 36),
                // The layout may be that of a disk that was never finished.
                attributes: part.attributes.replace(UNFINISHED, "").trim().to_owned(),
                content: part.content.clone(),
                container: if part.luks { Some(ids()?) } else { None },
                uuid: ids()?,
                label: free_label(
                    part.label.as_deref().map(|label| part.content.valid_label(label)).as_deref(),
                    &mut labels,
                    part.content.label_length(),
                ),
            });
        }
        Ok(Self { disk: ids()?, parts, sector })
    }

    /// Keeps the partitions that an interrupted clone has made on the disk. `is_shared` tells which of them the shared root uses; that must
    /// be its own partition and no other.
    ///
    /// # Errors
    /// A disk whose partitions differ from the plan.
    pub fn adopt(&mut self, disk: &DiskLayout, is_shared: impl Fn(&PartUuid) -> bool) -> Result<()> {
        let is_same = |(part, made): (&NewPart, &PartLayout)| {
            part.kind.eq_ignore_ascii_case(&made.kind) && (part.content == Content::Shared) == is_shared(&made.partuuid)
        };
        if self.parts.len() != disk.partitions.len() || !self.parts.iter().zip(&disk.partitions).all(is_same) {
            bail!(
                "an interrupted clone made other partitions on it than this one would; run this again with that clone's options"
            );
        }
        for (part, made) in self.parts.iter_mut().zip(&disk.partitions) {
            (part.partuuid, part.bytes) = (made.partuuid, made.bytes);
        }
        Ok(())
    }

    /// The input with which sfdisk(8) makes the partitions. The ESP is marked as [`UNFINISHED`].
    pub fn sfdisk_input(&self) -> String {
        let mut text = format!("label: gpt\nlabel-id: {}\n", self.disk);
        let mut start = MARGIN;
        for part in &self.parts {
            let attributes = match part.role {
                Role::Esp => format!("{} {UNFINISHED}", part.attributes),
                _ => part.attributes.clone(),
            };
            let (at, size) = (start / self.sector, part.bytes / self.sector);
            text += &gpt::line(at, size, &part.kind, part.partuuid, part.name.as_deref(), &attributes);
            text.push('\n');
            start += part.bytes;
        }
        text
    }
}

impl NewPart {
    /// Its content, for people: "ext4 in LUKS".
    pub fn describe(&self) -> String {
        format!("{}{}", self.content.name(), if self.container.is_some() { " in LUKS" } else { "" })
    }

    /// The program that makes its file system on a device, and the program's arguments; None for a partition of a shared root.
    pub fn mkfs(&self, device: &str, sector: u64) -> Option<(String, Vec<OsString>)> {
        let uuid = self.uuid.to_string();
        let volume = uuid.replace('-', "").chars().take(8).collect::<String>();
        let label = |option: &str| self.label.iter().flat_map(|l| [option.to_owned(), l.clone()]).collect::<Vec<_>>();
        let words = |words: &[&str]| words.iter().map(|w| (*w).to_owned()).collect::<Vec<_>>();
        let (program, mut args) = match &self.content {
            Content::Shared => return None,
            Content::Swap => ("mkswap".to_owned(), [words(&["-q", "-U", &uuid]), label("-L")].concat()),
            Content::Fs(fs) => {
                let args = match fs.as_str() {
                    "vfat" => {
                        // The least size of a FAT32 grows with the sectors. For a smaller partition, mkfs.vfat(8) chooses the width.
                        let wide = if self.bytes >= 65_600 * sector + 2 * MIB { words(&["-F", "32"]) } else { Vec::new() };
                        [wide, words(&["-i", &volume]), label("-n")].concat()
                    }
                    "ext2" | "ext3" | "ext4" => [words(&["-q", "-F", "-U", &uuid]), label("-L")].concat(),
                    "xfs" => [words(&["-q", "-f", "-m", &format!("uuid={uuid}")]), label("-L")].concat(),
                    "f2fs" => [words(&["-q", "-f", "-U", &uuid]), label("-l")].concat(),
                    _ => [words(&["-q", "-f", "-U", &uuid]), label("-L")].concat(),
                };
                (format!("mkfs.{fs}"), args)
            }
        };
        args.push(device.to_owned());
        Some((program, args.into_iter().map(OsString::from).collect()))
    }
}

/// The size of each new partition in bytes.
fn sizes(source: &Source, bytes: u64) -> Result<Vec<u64>> {
    let up = |size: u64| size.div_ceil(MIB) * MIB;
    // A tree gets room for its files and some more, which includes the least size that mkfs.xfs(8) and mkfs.btrfs(8) take. Its old size is
    // enough in any case.
    let need = |part: &SourcePart| match part.used {
        Some(used) => {
            let used = used + if part.luks { HEADER } else { 0 };
            let roomy = used + used / 10 + 320 * MIB;
            up(match part.content {
                // At most the size of the device that it mirrors or replaces.
                Content::Shared => roomy.min(part.bytes.max(used)),
                // An old layout may be smaller than what the tree holds by now.
                _ if used > part.bytes => roomy,
                _ => roomy.min(part.bytes),
            })
        }
        None => up(part.bytes),
    };
    let room = (bytes / MIB * MIB).saturating_sub(2 * MARGIN);
    let needed: u64 = source.parts.iter().map(need).sum();
    let Some(rest) = room.checked_sub(needed) else {
        let each: Vec<String> = source.parts.iter().map(|p| format!("{} {} MiB", p.role, mib(need(p)))).collect();
        bail!(
            "it is too small: it has {} MiB, and {} MiB are needed ({}), {} MiB more",
            mib(room),
            mib(needed),
            each.join(", "),
            mib(needed - room)
        );
    };
    // The rest is divided in the booted disk's proportions.
    let weight = |part: &SourcePart| match part.used {
        Some(_) => up(part.bytes).saturating_sub(need(part)) / MIB,
        None => 0,
    };
    let all: u64 = source.parts.iter().map(weight).sum();
    let share = |part: &SourcePart| {
        u128::from(rest / MIB).saturating_mul(weight(part).into()).checked_div(all.into()).unwrap_or(0) as u64 * MIB
    };
    let mut sizes: Vec<u64> = source.parts.iter().map(|part| need(part) + share(part)).collect();
    let spare = room - sizes.iter().sum::<u64>();
    // Rounding leaves some, which the last tree gets.
    if let Some((_, last)) = source.parts.iter().zip(&mut sizes).rfind(|(part, _)| part.used.is_some()) {
        *last += spare;
    }
    Ok(sizes)
}

/// A label for this disk: the old one with the disk's number instead of the number at its end. It is not taken, and no longer than the limit.
fn new_label(old: &str, name: DiskName, taken: &BTreeSet<String>, limit: usize) -> String {
    let number = name.number();
    let stem = old.trim_end_matches(|c: char| c.is_ascii_digit());
    let end = |stem: &str, end: &str| {
        let mut stem = stem.to_owned();
        while stem.len() + end.len() > limit && stem.pop().is_some() {}
        stem + end
    };
    let first = end(stem, &number.to_string());
    let others = (1..).map(|n: u32| end(stem, &format!("{number}-{n}")));
    // Labels of FAT that differ in case only are the same.
    let is_free = |label: &String| !taken.iter().any(|t| t.eq_ignore_ascii_case(label));
    std::iter::once(first).chain(others).find(is_free).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clone::source::SourcePart as Old;

    fn old(role: &str, mebibytes: u64, used: Option<u64>) -> Old {
        Old {
            role: Role::parse_key(role).unwrap().unwrap(),
            bytes: mebibytes * MIB,
            kind: "0FC63DAF-8483-4772-8E79-3D69D8477DE4".into(),
            name: Some(format!("{role}0")),
            attributes: String::new(),
            content: match role {
                "swap" => Content::Swap,
                "esp" => Content::Fs("vfat".into()),
                _ => Content::Fs("ext4".into()),
            },
            label: Some(format!("{role}0")),
            luks: false,
            used: used.map(|used| used * MIB),
        }
    }

    fn source(parts: Vec<Old>) -> Source {
        Source { parts, ..Source::default() }
    }

    fn disk1() -> DiskName {
        DiskName::parse("disk1").unwrap()
    }

    fn make(source: &Source, mebibytes: u64) -> Result<DiskPlan> {
        let mut next = 0;
        let taken = source.parts.iter().flat_map(|p| [p.name.clone(), p.label.clone()]).flatten().collect();
        DiskPlan::make(source, disk1(), (mebibytes * MIB, 512), taken, || {
            next += 1;
            Ok(Uuid::from_u128(0x1000_0000_0000_4000_8000_0000_0000_0000 + next))
        })
    }

    fn mebibytes(plan: &DiskPlan) -> Vec<u64> {
        plan.parts.iter().map(|p| p.bytes / MIB).collect()
    }

    #[test]
    fn trees_share_the_room_of_the_disk() {
        let source = source(vec![
            old("esp", 512, None),
            old("root", 20_000, Some(4000)),
            old("swap", 1024, None),
            old("home", 40_000, Some(10_000)),
        ]);
        assert_eq!(mebibytes(&make(&source, 61_538).unwrap()), [512, 20_000, 1024, 40_000], "the same size");
        let larger = mebibytes(&make(&source, 121_538).unwrap());
        assert_eq!((larger[0], larger[2]), (512, 1024), "as they are");
        assert_eq!(larger.iter().sum::<u64>(), 121_536, "all of it");
        assert!(larger[1] > 35_000 && larger[3] > 75_000, "{larger:?}");
        let smaller = mebibytes(&make(&source, 18_000).unwrap());
        assert_eq!(smaller.iter().sum::<u64>(), 17_998);
        assert!(smaller[1] >= 4720 && smaller[3] >= 11_320, "the files have room: {smaller:?}");
        let error = make(&source, 17_577).unwrap_err().to_string();
        assert_eq!(
            error,
            "it is too small: it has 17575 MiB, and 17576 MiB are needed (esp 512 MiB, root 4720 MiB, swap 1024 MiB, home 11320 MiB), \
             1 MiB more"
        );
        make(&source, 17_578).unwrap();
        make(&source, 0).unwrap_err();
    }

    #[test]
    fn a_container_has_a_header_and_a_uuid() {
        let mut parts = vec![old("esp", 100, None), old("root", 4000, Some(1000))];
        parts[1].luks = true;
        let plan = make(&source(parts.clone()), 1540).unwrap();
        assert_eq!(mebibytes(&plan), [100, 1438], "1016 and some free room");
        assert!(make(&source(parts), 1539).is_err());
        let root = &plan.parts[1];
        assert!(plan.parts[0].container.is_none() && root.container.is_some_and(|uuid| uuid != root.uuid));
        assert_eq!(root.describe(), "ext4 in LUKS");
    }

    #[test]
    fn a_full_disk_fits_on_one_of_its_size() {
        let source = source(vec![old("esp", 100, None), old("root", 900, Some(890))]);
        assert_eq!(mebibytes(&make(&source, 1002).unwrap()), [100, 900]);
        make(&source, 1001).unwrap_err();
        // Sizes that aren't whole MiB.
        let mut odd = source.clone();
        odd.parts[1].bytes += 5 * 512;
        assert_eq!(mebibytes(&make(&odd, 1003).unwrap()), [100, 901]);
    }

    #[test]
    fn a_tree_that_outgrew_the_layout_has_room() {
        let source = source(vec![old("esp", 100, None), old("root", 1000, Some(2000)), old("home", 9000, Some(10))]);
        assert!(mebibytes(&make(&source, 20_002).unwrap())[1] >= 2000 + 200 + 320);
        make(&source, 2502).unwrap_err();
        // A device of a shared root is at least as large as the one that it replaces.
        let mut device = old("root", 1000, Some(1000));
        for bytes in [1000, 900] {
            device.bytes = bytes * MIB;
            device.content = Content::Shared;
            assert_eq!(mebibytes(&make(&self::source(vec![old("esp", 100, None), device.clone()]), 1102).unwrap()), [100, 1000]);
        }
    }

    #[test]
    fn the_table_marks_the_disk_as_unfinished() {
        let mut source = source(vec![old("esp", 64, None), old("root", 1000, Some(10))]);
        source.parts[1].name = Some(r#"a "\"#.into());
        source.parts[1].attributes = "GUID:60".into();
        let plan = make(&source, 1066).unwrap();
        let kind = &plan.parts[0].kind;
        let id = |n: u128| Uuid::from_u128(0x1000_0000_0000_4000_8000_0000_0000_0000 + n);
        assert_eq!(
            plan.sfdisk_input(),
            format!(
                "label: gpt\nlabel-id: {}\nstart=2048, size=131072, type={kind}, uuid={}, name=\"esp1\", attrs=\"NoBlockIOProtocol\"\n\
                 start=133120, size=2048000, type={kind}, uuid={}, name=\"a \\x22\\x5c1\", attrs=\"GUID:60\"\n",
                id(5),
                id(1),
                id(3)
            )
        );
    }

    #[test]
    fn labels_differ_from_those_of_other_disks() {
        let taken = ["root0", "root1", "EFI"].map(str::to_owned).into();
        for (old, limit, expected) in [
            ("root0", 16, "root1-1"),
            ("root", 16, "root1-1"),
            ("EFI", 11, "EFI1"),
            ("home12", 16, "home1"),
            ("0", 16, "1"),
            ("LONGLONGLONG", 11, "LONGLONGLO1"),
            ("Größe", 6, "Grö1"),
        ] {
            assert_eq!(new_label(old, disk1(), &taken, limit), expected, "{old}");
        }
    }

    #[test]
    fn file_systems_get_the_planned_names() {
        let plan = make(&source(vec![old("esp", 64, None), old("swap", 10, None), old("root", 1000, Some(10))]), 1200).unwrap();
        let said: Vec<String> = plan
            .parts
            .iter()
            .map(|part| {
                let (program, args) = part.mkfs("/dev/x", 512).unwrap();
                let args: Vec<_> = args.iter().map(|a| a.to_string_lossy()).collect();
                format!("{program} {}", args.join(" "))
            })
            .collect();
        let [_, swap, root] = &plan.parts[..] else { panic!() };
        assert_eq!(
            said,
            [
                "mkfs.vfat -F 32 -i 10000000 -n ESP1 /dev/x".to_owned(),
                format!("mkswap -q -U {} -L swap1 /dev/x", swap.uuid),
                format!("mkfs.ext4 -q -F -U {} -L root1 /dev/x", root.uuid),
            ]
        );
        let (_, args) = plan.parts[0].mkfs("/dev/x", 4096).unwrap();
        assert!(!args.contains(&"-F".into()), "too small for that: {args:?}");
    }

    #[test]
    fn file_systems_are_made_as_planned() {
        for kind in ["vfat", "ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "swap"] {
            let mut of = old("root", 1000, Some(10));
            of.content = if kind == "swap" { Content::Swap } else { Content::Fs(kind.into()) };
            let plan = make(&source(vec![of]), 1002).unwrap();
            let [part] = &plan.parts[..] else { panic!() };
            let image = tempfile::NamedTempFile::new().unwrap();
            image.as_file().set_len(part.bytes).unwrap();
            let path = image.path().to_str().unwrap();
            let (program, arguments) = part.mkfs(path, 512).unwrap();
            crate::base::program::output(&program, arguments).unwrap_or_else(|e| panic!("{e:#}; the test needs it"));
            let found = |tag: &str| {
                let said = crate::base::program::output("blkid", ["-p", "-s", tag, "-o", "value", path].map(Into::into)).unwrap();
                String::from_utf8(said).unwrap().trim().to_owned()
            };
            let (uuid, label) = match kind {
                "vfat" => ("1000-0000".to_owned(), "ROOT1"),
                _ => (part.uuid.to_string(), "root1"),
            };
            assert_eq!((found("TYPE"), found("UUID"), found("LABEL")), (kind.to_owned(), uuid, label.to_owned()));
        }
    }

    #[test]
    fn partitions_of_an_interrupted_clone_are_kept() {
        let source = source(vec![old("esp", 512, None), old("root", 2000, Some(100))]);
        let mut plan = make(&source, 3000).unwrap();
        let made = |part: &NewPart| PartLayout {
            role: None,
            partuuid: PartUuid::parse("aaaaaaaa-0000-4000-8000-000000000001").unwrap(),
            bytes: 7,
            kind: part.kind.to_lowercase(),
            name: part.name.clone(),
            attributes: String::new(),
            container: None,
            fstype: None,
            uuid: None,
            label: None,
        };
        let mut disk =
            DiskLayout { name: disk1(), sector: 512, table: Vec::new(), partitions: plan.parts.iter().map(made).collect() };
        plan.adopt(&disk, |_| false).unwrap();
        plan.adopt(&disk, |_| true).unwrap_err();
        assert!(plan.parts.iter().all(|part| part.bytes == 7 && part.partuuid == disk.partitions[0].partuuid));
        disk.partitions[1].kind.clear();
        plan.adopt(&disk, |_| false).unwrap_err();
        disk.partitions.pop();
        plan.adopt(&disk, |_| false).unwrap_err();
    }
}
