//! Fuzz targets: a function for each kind of hostile input (failure mode 26). cargo-fuzz generates input for them; tests/corpus.rs runs them
//! with the files of corpus/, so that a fault that was fixed is found if it returns.
//!
//! They also panic if an answer of dualroot is wrong.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Component, Path};

use dualroot::base::fault::Code;
use dualroot::base::types::{DirPath, DiskName, PartUuid, Role};
use dualroot::boot::efi::{self, EfiVars};
use dualroot::boot::entry::{self, EntryName, Titles};
use dualroot::boot::files::{BootFile, BootFiles, Class, classify, fold};
use dualroot::boot::load_option::BootOption;
use dualroot::boot::wanted::{BootPartition, WantedFile};
use dualroot::boot::{initrd, older, order, pe, room, wanted};
use dualroot::conf::Config;
use dualroot::names::generation::Generation;
use dualroot::names::ident::Rewriter;
use dualroot::names::ids::{DiskIds, PartIds};
use dualroot::names::{cmdline, fstab};
use dualroot::pair::lineage::Record;
use dualroot::proof::prove;
use dualroot::write::change::{Change, Content};
use dualroot::write::sector;
use efivar::boot::{EFIHardDrive, EFIHardDriveType};

/// The other disk's long UUIDs: file systems, then partitions.
const FOREIGN: [&str; 4] = [
    "cccccccc-1111-4111-8111-111111111111",
    "aaaaaaaa-0000-4000-8000-000000000001",
    "aaaaaaaa-0000-4000-8000-000000000002",
    "aaaaaaaa-0000-4000-8000-000000000003",
];

/// The rewriter from disk0 (sda) to disk1 (sdb), which has a name for each kind of name of disk0.
fn to_disk1() -> Rewriter {
    let disk = |name: &str, letter: &str, dev: &str, esp: &str, root: &str, home: &str| {
        let part = |n: u32, uuid: Option<&str>, label: &str| PartIds {
            container: None,
            partuuid: PartUuid::parse(&format!("{}-0000-4000-8000-00000000000{n}", letter.repeat(8))).unwrap(),
            uuid: uuid.map(Into::into),
            label: Some(label.into()),
            partlabel: Some(format!("p{label}")),
            paths: [format!("/dev/{dev}{n}"), format!("/dev/disk/by-id/ata-{dev}.1-part{n}")].into(),
        };
        let parts = [
            (Role::Esp, part(1, Some(esp), "EFI")),
            (Role::Root, part(2, Some(root), "root")),
            (Role::Home, part(3, None, home)),
        ];
        DiskIds { name: DiskName::parse(name).unwrap(), parts: parts.into() }
    };
    let a = disk("disk0", "a", "sda", "AAAA-0001", FOREIGN[0], "my home");
    let b = disk("disk1", "b", "sdb", "BBBB-0001", "dddddddd-1111-4111-8111-111111111111", "home1");
    Rewriter::new(&b, &[a]).unwrap()
}

thread_local! {
    static TO_DISK1: Rewriter = to_disk1();
    /// A directory of EFI variables that all have the same content.
    static VARIABLES: RefCell<tempfile::TempDir> = RefCell::new(variables());
}

/// Checks that a text has no control characters: messages are one line, and values in units are a part of one.
#[track_caller]
fn one_line(text: &str) {
    assert!(!text.chars().any(char::is_control), "{text:?} has a control character");
}

/// Checks that a relative path leads to a place below its directory.
#[track_caller]
fn stays_below(path: &str) {
    let plain = Path::new(path).components().all(|part| matches!(part, Component::Normal(_)));
    assert!(plain && !path.is_empty() && !path.ends_with('/'), "{path:?} leads out of its directory");
}

/// Compares a rewritten text with the original, and with the result of a second rewriting.
#[track_caller]
fn rewritten_well(rewriter: &Rewriter, old: &[u8], new: &[u8], again: &[u8]) {
    assert_eq!(new.escape_ascii().to_string(), again.escape_ascii().to_string(), "rewriting twice isn't rewriting once");
    assert_eq!(rewriter.foreign(new), [""; 0], "a name of another disk is left in {}", new.escape_ascii());
    let lower = new.to_ascii_lowercase();
    for uuid in FOREIGN {
        let mut places = lower.windows(uuid.len()).enumerate().filter(|(_, text)| *text == uuid.as_bytes()).map(|(at, _)| at);
        let is_part = |at: usize| {
            let before = at.checked_sub(1).and_then(|at| lower.get(at));
            [before, lower.get(at + uuid.len())].into_iter().flatten().any(u8::is_ascii_alphanumeric)
        };
        assert!(places.all(is_part), "{uuid} is left in {}", new.escape_ascii());
    }
    if rewriter.foreign(old).is_empty() {
        assert_eq!(old.escape_ascii().to_string(), new.escape_ascii().to_string(), "changed without a reason");
    }
}

/// fstab(5).
pub fn fstab(data: &[u8]) {
    TO_DISK1.with(|rewriter| {
        let mut last = 0;
        for line in fstab::lines(data) {
            assert!(line.span.start >= last && line.span.end <= data.len());
            last = line.span.end;
            for field in [&line.spec, &line.file, &line.fstype, &line.options, &line.freq, &line.pass] {
                assert_eq!(&data[field.span.clone()], field.raw);
            }
            if let Some(dir) = line.dir() {
                one_line(dir.as_str());
                stays_below(dir.relative());
            }
        }
        let new = fstab::rewrite(data, rewriter, |_| false);
        rewritten_well(rewriter, data, &new, &fstab::rewrite(&new, rewriter, |_| false));
        let named = fstab::foreign_ids_needed_at_boot(&new, rewriter);
        assert_eq!(named, [""; 0]);
        fstab::foreign_ids_needed_at_boot(data, rewriter).iter().for_each(|line| one_line(line));

        // Lines that are kept are there byte for byte, in their order.
        let keep = |dir: &DirPath| dir.as_str().starts_with("/mnt/root");
        let kept = |text: &[u8]| -> Vec<Vec<u8>> {
            let lines = fstab::lines(text).filter(|line| line.dir().is_some_and(|dir| keep(&dir)));
            lines.map(|line| text[line.span].to_vec()).collect()
        };
        let mut new = kept(&fstab::rewrite(data, rewriter, keep)).into_iter();
        assert!(kept(data).into_iter().all(|line| new.any(|new| new == line)));

        let free = fstab::without_subvolume_options(data);
        assert_eq!(fstab::without_subvolume_options(&free), free);
        let of_root = |line: &fstab::Line<'_>| line.is_at("/") && line.fstype.raw == b"btrfs";
        let names = |line: &fstab::Line<'_>| line.options.raw.split(|b| *b == b',').any(cmdline::is_subvolume_option);
        assert!(!fstab::lines(&free).any(|line| of_root(&line) && names(&line)));
        assert_eq!(fstab::lines(&free).count(), fstab::lines(data).count());
        fstab::missing_subvolumes(data, |spec| spec == b"UUID=a", |path| path == "@").iter().for_each(|line| one_line(line));
    });
}

/// Menu entries of a boot loader; the first line also serves as a file's name.
pub fn entries(data: &[u8]) {
    let name = data.split(|b| *b == b'\n').next().unwrap_or_default();
    if let Ok(name) = std::str::from_utf8(name)
        && let Ok(parsed) = EntryName::parse(name)
    {
        let shown = parsed.to_string();
        one_line(&shown);
        stays_below(&shown);
        assert_eq!(EntryName::parse(&shown).unwrap(), parsed);
    }
    let titles = Titles { own: Some("B".into()), all: vec!["A".into(), "B".into(), "A B".into()] };
    TO_DISK1.with(|rewriter| {
        for titles in [Titles::default(), titles.clone(), Titles { own: None, ..titles }] {
            let new = entry::rewrite(data, rewriter, &titles);
            let again = entry::rewrite(&new, rewriter, &titles);
            assert_eq!(new.escape_ascii().to_string(), again.escape_ascii().to_string());
            // Titles may contain any text.
            let rest = |text: &[u8]| -> Vec<u8> {
                let is_title = |line: &&[u8]| line.trim_ascii().starts_with(b"title");
                text.split_inclusive(|b| *b == b'\n').filter(|line| !is_title(line)).flatten().copied().collect()
            };
            rewritten_well(rewriter, &rest(data), &rest(&new), &rest(&again));
        }
    });
    let files = entry::files(data);
    for path in &files {
        stays_below(path);
    }
    // A redirected entry names the new paths, and nothing else changes.
    assert_eq!(entry::redirect(data, |_| None), data);
    // A blank at the end of a name can't be written.
    if files.iter().all(|path| path.trim_ascii_end() == path) {
        let redirected = entry::redirect(data, |path| Some(path.to_owned()));
        assert_eq!(entry::files(&redirected), files);
    }
    let staged = entry::redirect(data, |_| Some(".staged".to_owned()));
    assert_eq!(entry::files(&staged), vec![".staged"; files.len()]);

    let one = Generation::parse("1").unwrap();
    let boots = one.command_line(data);
    assert_eq!(one.command_line(&boots).escape_ascii().to_string(), boots.escape_ascii().to_string());
    assert_eq!(boots.iter().filter(|b| **b == b'\n').count(), data.iter().filter(|b| **b == b'\n').count());
}

/// loader.conf, and other small texts that are only rewritten, such as a kernel's command line.
pub fn loader_conf(data: &[u8]) {
    TO_DISK1.with(|rewriter| {
        let new = rewriter.rewrite(data);
        rewritten_well(rewriter, data, &new, &rewriter.rewrite(&new));
        assert_eq!(rewriter.foreign_in_stream(data).unwrap(), rewriter.foreign(data));
        rewriter.foreign(data).iter().for_each(|name| one_line(name));
        for key in ["default", "timeout"] {
            assert!(entry::value(data, key).is_none_or(|value| !value.contains(&b'\n')));
        }
        // The change has the same text; one in place has the size of the old file.
        for size in [None, Some(0), Some(1), Some(511), Some(512), Some(513), Some(u64::MAX)] {
            let bytes = match sector::text_change("loader/loader.conf", size, &new) {
                Change::Overwrite { bytes, .. } => {
                    assert_eq!(Some(bytes.len() as u64), size);
                    bytes
                }
                Change::Replace { content: Content::Bytes(bytes), .. } => bytes,
                other => panic!("{other:?}"),
            };
            assert_eq!(bytes.trim_ascii_end(), new.trim_ascii_end());
        }
    });
}

/// crypttab(5).
pub fn crypttab(data: &[u8]) {
    TO_DISK1.with(|rewriter| {
        let new = rewriter.rewrite(data);
        rewritten_well(rewriter, data, &new, &rewriter.rewrite(&new));
        let faults = |text: &[u8]| prove::root_files(&[("/etc/crypttab".to_owned(), text.to_vec())].into(), rewriter, |_| false);
        assert_eq!(faults(&new), []);
        faults(data).iter().for_each(|fault| one_line(&fault.to_string()));
    });
}

/// The configuration: the main file, and after each record separator (0x1e) a drop-in.
pub fn configuration(data: &[u8]) {
    let sources: Vec<_> = (0..).zip(data.split(|b| *b == 0x1e)).map(|(n, text)| (format!("{n}.conf"), text.to_vec())).collect();
    let config = match Config::parse(&sources) {
        Ok(None) => return,
        Ok(Some(config)) => config,
        Err(e) => return one_line(&format!("{e:#}")),
    };
    config.warnings.iter().for_each(|warning| one_line(warning));
    config.settings.exclude.iter().for_each(|rule| one_line(rule));
    assert!(config.disks.len() >= 2 && config.settings.generations > 0 && !config.settings.device_timeout.is_zero());
    let mut parts = BTreeSet::new();
    for disk in &config.disks {
        assert_eq!(disk.parts.get(&Role::Esp), Some(&disk.esp()));
        assert!(disk.parts.values().all(|part| parts.insert(*part)), "a partition is listed twice");
        assert!(disk.parts.keys().eq(config.disks[0].parts.keys()), "the disks differ");
        disk.title.iter().for_each(|title| one_line(title));
        let places = disk.boot_places().into_iter().map(|(_, _, place)| place);
        let dirs = disk.parts.keys().filter_map(|role| DirPath::parse(role.tree()?).ok());
        for dir in places.chain(dirs).chain(disk.esp_mountpoint.clone()) {
            one_line(dir.as_str());
            stays_below(dir.relative());
        }
        assert_eq!(config.booted(&disk.esp()), Some(disk));
        assert_eq!(config.spares(disk).len(), config.disks.len() - 1);
    }
}

/// Directories of EFI variables: one in which all have the same content, one with BootCurrent only, and one in which BootCurrent leads to an
/// entry with that content.
fn variables() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let global = "8be4df61-93ca-11d2-aa0d-00e098032b8c";
    let loader = "4a67b082-0a4c-41cf-b6c7-440b29bb8c4f";
    for (set, names) in [
        ("all", vec![format!("LoaderDevicePartUUID-{loader}"), format!("LoaderInfo-{loader}"), format!("BootOrder-{global}")]),
        ("current", vec![format!("BootCurrent-{global}")]),
        ("entry", vec![format!("Boot0001-{global}")]),
    ] {
        fs::create_dir(dir.path().join(set)).unwrap();
        for name in names {
            symlink("../data", dir.path().join(set).join(name)).unwrap();
        }
    }
    fs::write(dir.path().join("entry").join(format!("BootCurrent-{global}")), [6, 0, 0, 0, 1, 0]).unwrap();
    dir
}

/// An EFI variable as in efivarfs, with its attributes first, in the place of each variable that dualroot reads.
pub fn efi_variables(data: &[u8]) {
    VARIABLES.with_borrow(|dir| {
        fs::write(dir.path().join("data"), data).unwrap();
        for set in ["all", "current", "entry"] {
            let vars = EfiVars::new(dir.path().join(set));
            match efi::booted_esp(&vars) {
                Ok(esp) => assert_eq!(PartUuid::parse(&esp.to_string()).unwrap(), esp),
                Err(e) => one_line(&format!("{e:#}")),
            }
            let said = efi::loader_variable(&vars, "LoaderInfo");
            older::are_sorted_last(said.as_deref());
            if let Err(e) = vars.boot_order() {
                one_line(&format!("{e:#}"));
            }
            if let Ok(options) = vars.boot_options() {
                assert!(options.len() <= 1 && options.iter().all(|option| option.number == 1));
            }
        }
    });
}

/// A boot entry of the firmware, an EFI_LOAD_OPTION with its device paths.
pub fn device_paths(data: &[u8]) {
    let option = BootOption::parse(7, data.to_vec());
    assert_eq!((option.number, &option.raw[..]), (7, data));
    assert!(!option.partition.is_some_and(|part| part.uuid().is_nil()));
    // A parsed entry can be written and parsed again.
    if let (Some(part), Some(file)) = (option.partition, &option.file) {
        let drive = EFIHardDrive {
            partition_number: 1,
            partition_start: 2048,
            partition_size: 4096,
            partition_sig: part.uuid(),
            format: 2,
            sig_type: EFIHardDriveType::Gpt,
        };
        let Ok(raw) = BootOption::encode(&option.description, &drive, file) else { return };
        let again = BootOption::parse(7, raw.clone());
        assert_eq!(again, BootOption { active: true, raw, ..option });
    }
}

/// A unified kernel image, which is a PE file; the same bytes also serve as an initrd.
pub fn images(data: &[u8]) {
    TO_DISK1.with(|rewriter| {
        match pe::search_uki(data, rewriter) {
            Ok(faults) => faults.iter().for_each(|fault| one_line(fault)),
            Err(e) => one_line(&format!("{e:#}")),
        }
        match initrd::search_initrd(data, rewriter) {
            Ok(found) => found.iter().for_each(|name| one_line(name)),
            Err(e) => one_line(&format!("{e:#}")),
        }
    });
}

/// The record of boots on a disk's ESP.
pub fn lineage(data: &[u8]) {
    // The input itself, and the input with a correct hash, so that its lines are parsed.
    let lines = [data.trim_ascii_end(), b"\n"].concat();
    let sum: String = blake3::hash(&lines).to_hex().chars().take(16).collect();
    for text in [data.to_vec(), [&lines, format!("sum={sum}\n").as_bytes()].concat()] {
        match Record::parse(&text) {
            Ok(record) => {
                let text = record.text();
                assert_eq!(Record::parse(text.as_bytes()).unwrap(), record);
                // Padding to a sector is ignored.
                assert_eq!(Record::parse(format!("{text}\n\n\n").as_bytes()).unwrap(), record);
                decide(&record);
            }
            Err(e) => one_line(&format!("{e:#}")),
        }
    }
}

/// The decisions about a spare with that record and a booted disk with another one, before and after a sync.
fn decide(record: &Record) {
    let [own, spare] = ["disk0", "disk1"].map(|name| DiskName::parse(name).unwrap());
    let mut ours = Record::default();
    let mut theirs = record.clone();
    for (one, other) in [(&ours, record), (record, &ours), (record, record)] {
        if let Err(e) = one.check(own, spare, other) {
            one_line(&format!("{e:#}"));
        }
    }
    // Changes that were given up cause no other refusal.
    ours.synced(own, spare, &mut theirs);
    ours.check(own, spare, &theirs).unwrap();
    theirs.check(spare, own, &ours).unwrap();
}

/// A model of a boot partition: FAT, which ignores case. The keys are folded paths.
#[derive(Clone, Default, PartialEq, Eq)]
struct Fat {
    files: BTreeMap<String, (String, Vec<u8>)>,
    dirs: BTreeSet<String>,
}

impl Fat {
    /// Adds a file, unless a directory has its path or a file the path of one of its directories.
    fn put(&mut self, path: &str, content: &[u8]) {
        let parents = || path.match_indices('/').map(|(at, _)| fold(&path[..at]));
        if !parents().any(|dir| self.files.contains_key(&dir)) && !self.dirs.contains(&fold(path)) {
            self.dirs.extend(parents());
            self.files.entry(fold(path)).or_insert_with(|| (path.to_owned(), content.to_owned()));
        }
    }

    /// The result of a scan of the partition.
    fn scan(&self) -> BootFiles {
        let mut found = BootFiles::default();
        for dir in &self.dirs {
            found.add_dir(dir).unwrap();
        }
        for (path, content) in self.files.values() {
            let is_text = matches!(classify(path), Class::Entry | Class::LoaderConf);
            let text = is_text.then(|| content.clone());
            found.add(BootFile { path: path.clone(), size: content.len() as u64, hash: blake3::hash(content), text }).unwrap();
        }
        found
    }

    fn apply(&mut self, change: &Change, source: &Fat) {
        let has_parent = |fat: &Self, path: &str| path.rsplit_once('/').is_none_or(|(dir, _)| fat.dirs.contains(&fold(dir)));
        match change {
            Change::MakeDir(path) => {
                stays_below(path);
                let upto = path.match_indices('/').map(|(at, _)| at).chain([path.len()]);
                for dir in upto.map(|at| fold(&path[..at])) {
                    assert!(!self.files.contains_key(&dir), "{dir} is a file");
                    self.dirs.insert(dir);
                }
            }
            Change::Create { path, content } | Change::Replace { path, content, .. } => {
                stays_below(path);
                assert!(has_parent(self, path), "{path} has no directory");
                assert!(!self.dirs.contains(&fold(path)), "{path} is a directory");
                let bytes = match content {
                    Content::Bytes(bytes) => bytes.clone(),
                    Content::File { source: from, .. } => {
                        let from = from.strip_prefix("/source").unwrap().to_str().unwrap();
                        source.files.get(&fold(from)).unwrap().1.clone()
                    }
                };
                self.files.insert(fold(path), (path.clone(), bytes));
            }
            Change::Overwrite { path, bytes } => {
                stays_below(path);
                let (_, there) = self.files.get_mut(&fold(path)).unwrap();
                there[..bytes.len()].copy_from_slice(bytes);
            }
            Change::Remove(path) => {
                stays_below(path);
                let key = fold(path);
                let below = format!("{key}/");
                if self.files.remove(&key).is_none() && !self.files.keys().chain(&self.dirs).any(|k| k.starts_with(&below)) {
                    self.dirs.remove(&key);
                }
            }
            Change::Barrier => {}
        }
    }

    /// The menu entries whose needed files are all payloads, with these files.
    fn entries(&self) -> impl Iterator<Item = (&String, &Vec<u8>, BTreeSet<String>)> {
        self.files.iter().filter(|(key, (path, _))| classify(key) == Class::Entry && !is_temporary(path)).filter_map(
            |(key, (_, text))| {
                let needs: BTreeSet<String> = entry::files(text).iter().map(|path| fold(path)).collect();
                needs.iter().all(|path| classify(path) == Class::Payload).then_some((key, text, needs))
            },
        )
    }
}

/// Whether the last part of a path is the name of a temporary file, as an interrupted write leaves it.
fn is_temporary(path: &str) -> bool {
    dualroot::write::below::is_temporary(path.rsplit('/').next().unwrap_or_default())
}

/// The files of two boot partitions: records that end in a NUL, each a letter, a path and, after `=`, a content. `s` is a file of the booted
/// disk, `d` one of the spare, and `k` one that an earlier sync wrote to the spare.
pub fn boot_files(data: &[u8]) {
    let (mut source, mut spare, mut known) = (Fat::default(), Fat::default(), BTreeSet::new());
    for record in data.split(|b| *b == 0) {
        let Some((letter, record)) = record.split_first() else { continue };
        let mut parts = record.splitn(2, |b| *b == b'=');
        let Some(Ok(path)) = parts.next().map(std::str::from_utf8) else { continue };
        let mut taken = BootFiles::default();
        match taken.add(BootFile { path: path.to_owned(), size: 0, hash: blake3::hash(b""), text: None }) {
            Err(e) => one_line(&format!("{e:#}")),
            Ok(()) => {
                stays_below(path);
                one_line(path);
                let side = if *letter == b's' { &mut source } else { &mut spare };
                side.put(path, parts.next().unwrap_or_default());
                known.extend((*letter == b'k').then(|| fold(path)));
            }
        }
    }
    TO_DISK1.with(|rewriter| synced(&source, &spare, &known, rewriter));
}

/// Plans a sync of boot partitions, applies it to a model, and checks the model after each step.
fn synced(source: &Fat, before: &Fat, known: &BTreeSet<String>, rewriter: &Rewriter) {
    let (there, titles) = (before.scan(), Titles::default());
    let rewrite = |class: Class, text: &[u8]| match class {
        Class::Entry => entry::rewrite(text, rewriter, &titles),
        _ => rewriter.rewrite(text),
    };
    let wanted = |there: &BootFiles| wanted::wanted_files(&source.scan(), Path::new("/source"), there, rewrite);
    let wanted_files = match wanted(&there) {
        Ok(wanted) => wanted,
        Err(e) => return one_line(&format!("{e:#}")),
    };
    wanted_files.iter().for_each(|file| stays_below(&file.path));
    fn part<'a>(wanted: &[WantedFile], spare: &'a BootFiles, known: &'a BTreeSet<String>) -> [BootPartition<'a>; 1] {
        [BootPartition { role: Role::Esp, wanted: wanted.to_vec(), spare, known }]
    }
    let steps = match order::plan(&part(&wanted_files, &there, known)) {
        Ok(steps) => steps,
        Err(e) => return one_line(&format!("{e:#}")),
    };
    let one = Generation::parse("1").unwrap();
    for file in older::entries_for(&there, &wanted_files, &[one]) {
        stays_below(&file.path);
    }
    let mut own = source.scan();
    older::keep_own(&mut own, "/dualroot/1");
    for (free, cluster) in [(0, 0), (0, 4096), (u64::MAX, 512)] {
        room::shortfall(&steps, &Role::Esp, &there, free, cluster);
    }
    // A file on one disk with the path of a directory on the other: a sync reports an error when it applies the step.
    let files = |fat: &Fat| fat.files.keys().cloned().collect::<BTreeSet<_>>();
    let dirs = wanted_files.iter().flat_map(|file| file.path.match_indices('/').map(|(at, _)| fold(&file.path[..at])));
    if dirs.chain(source.dirs.clone()).any(|dir| before.files.contains_key(&dir)) || !before.dirs.is_disjoint(&files(source)) {
        return;
    }
    let is_complete = |text: &WantedFile| match &text.content {
        Content::Bytes(text) => entry::files(text).iter().all(|path| wanted_files.iter().any(|w| fold(&w.path) == fold(path))),
        Content::File { .. } => true,
    };
    let source_is_whole = wanted_files.iter().filter(|file| classify(&file.path) == Class::Entry).all(is_complete);
    let little = order::plan_for_little_room(&part(&wanted_files, &there, known)).unwrap();
    for steps in [Some(steps), little].into_iter().flatten() {
        let mut spare = before.clone();
        for step in &steps {
            let old = spare.clone();
            if let Change::Create { path, .. } = &step.change {
                let needed = old.entries().find(|(_, _, needs)| needs.contains(&fold(path)));
                assert!(needed.is_none(), "{needed:?} needs {path}, which may be incomplete after an interruption");
            }
            spare.apply(&step.change, source);
            for (key, text, needs) in spare.entries().filter(|_| source_is_whole) {
                let was_whole = old
                    .entries()
                    .any(|(k, t, needs)| k == key && t == text && !needs.iter().all(|path| old.files.contains_key(path)));
                let is_whole = needs.iter().all(|path| spare.files.contains_key(path));
                assert!(is_whole || was_whole, "{key} lacks a file after {:?} of {steps:#?}", step.change);
            }
        }
        let now = spare.scan();
        for file in &wanted_files {
            let (_, found) = spare.files.get(&fold(&file.path)).unwrap_or_else(|| panic!("{} is missing", file.path));
            match &file.content {
                Content::Bytes(text) => assert_eq!(found.trim_ascii_end(), text.trim_ascii_end(), "{}", file.path),
                Content::File { .. } => assert_eq!(blake3::hash(found), file.hash, "{}", file.path),
            }
        }
        // Files of other systems stay: those that are no entry, that no entry needed, and that no earlier sync wrote.
        let needed: BTreeSet<String> =
            before.files.values().flat_map(|(_, text)| entry::files(text)).map(|path| fold(&path)).collect();
        for (key, file) in &before.files {
            let is_ours =
                wanted_files.iter().any(|wanted| fold(&wanted.path) == *key) || needed.contains(key) || known.contains(key);
            if classify(key) == Class::Local
                || !is_ours && !is_temporary(key) && !matches!(classify(key), Class::Entry | Class::Uki)
            {
                assert_eq!(spare.files.get(key), Some(file), "{key} must not change");
            }
        }
        // A second sync has nothing to do, unless an entry lacks a file: a sync removes that first, and writes it again.
        let again = order::plan(&part(&wanted(&now).unwrap(), &now, known)).unwrap();
        assert!(again.is_empty() || !source_is_whole, "the second sync has steps: {again:#?}");
        let proof = prove::Part { role: Role::Esp, wanted: &wanted_files, found: &now };
        for fault in prove::boot_partitions(&[proof], rewriter) {
            assert!(!matches!(fault.code, Code::F10 | Code::F37), "{fault}");
        }
    }
}
