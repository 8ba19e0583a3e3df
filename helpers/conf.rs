//! The configuration: dualroot.conf(5), `/etc/dualroot.conf` and its drop-ins, by systemd's rules.
//!
//! `syntax` finds the files and reads their lines; this module merges them, checks them and gives them types.

pub mod edit;
mod syntax;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use anyhow::{Result, bail};

use crate::base::root::Root;
use crate::base::types::{DirPath, DiskName, PartUuid, Role};
use crate::conf::syntax::{Line, MAIN, Place, boolean, sources, time_span};

/// The times at which spares are mounted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SpareMount {
    /// Read-only, at every boot.
    Boot,
    /// Only while a sync runs.
    Sync,
}

/// The section `[dualroot]`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Settings {
    /// `spare-mount=`: when spares are mounted.
    pub spare_mount: SpareMount,
    /// `settle=`: a sync starts when the booted disk hasn't changed for this long.
    pub settle: Duration,
    /// `exclude=`: rsync(1) filter rules, one per assignment, in order.
    pub exclude: Vec<String>,
    /// `generations=`: the number of generations kept of a spare's btrfs root, with the one that it boots. Never zero.
    pub generations: usize,
    /// `efi-entries=`: whether the firmware gets a boot entry for each disk.
    pub efi_entries: bool,
    /// `luks=`: the roles that are in a LUKS container on every disk.
    pub luks: BTreeSet<Role>,
    /// `device-timeout=`: how long systemd waits for a partition to appear. Never zero, which systemd takes as "for ever".
    pub device_timeout: Duration,
}

/// The keys of `[dualroot]`, except `exclude=`, which may be there several times. Each has its arm in `Raw::settings`.
const SETTINGS: [&str; 6] = ["spare-mount", "settle", "generations", "efi-entries", "luks", "device-timeout"];

impl Default for Settings {
    fn default() -> Self {
        Self {
            spare_mount: SpareMount::Boot,
            settle: Duration::from_secs(5),
            exclude: Vec::new(),
            generations: 2,
            efi_entries: true,
            luks: BTreeSet::new(),
            device_timeout: Duration::from_secs(5),
        }
    }
}

/// One section `[diskN]`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Disk {
    /// The section's name.
    pub name: DiskName,
    /// Its partitions, the ESP among them.
    pub parts: BTreeMap<Role, PartUuid>,
    /// `title=`: the prefix of this disk's boot menu titles.
    pub title: Option<String>,
    /// `esp-mountpoint=`: the directory on which fstab mounts this disk's ESP.
    pub esp_mountpoint: Option<DirPath>,
    esp: PartUuid,
}

impl Disk {
    /// The EFI system partition, which every disk has.
    pub fn esp(&self) -> PartUuid {
        self.esp
    }

    /// The mount points of its boot partitions when it is booted: the ESP on /boot, or with an XBOOTLDR the ESP on /efi and the
    /// XBOOTLDR on /boot (Boot Loader Specification, UAPI.1). For a spare, they are below the spare's directory.
    pub fn boot_places(&self) -> Vec<(Role, PartUuid, DirPath)> {
        let places = match self.parts.get(&Role::Xbootldr) {
            Some(xbootldr) => vec![(Role::Esp, self.esp, "/efi"), (Role::Xbootldr, *xbootldr, "/boot")],
            None => vec![(Role::Esp, self.esp, "/boot")],
        };
        places.into_iter().filter_map(|(role, part, path)| Some((role, part, DirPath::parse(path).ok()?))).collect()
    }
}

/// The two ways in which disks can hold the root.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Layout {
    /// One root file system across the disks; no section has `root=`.
    SharedRoot,
    /// Each disk has a root of its own; all sections have `root=`.
    OwnRoots,
}

/// A valid configuration.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Config {
    /// The main file, or the first drop-in where there is none.
    pub source: String,
    /// The section `[dualroot]`.
    pub settings: Settings,
    /// The disks, sorted by number: two or more, with the same roles, and no partition twice.
    pub disks: Vec<Disk>,
    /// Lines that were not understood and are ignored: one sentence each, with file and line.
    pub warnings: Vec<String>,
}

impl Config {
    /// Reads the main file and the drop-ins as systemd does: the main file of the most important directory, then the drop-ins of
    /// all directories, sorted by name. Of several drop-ins with one name, that in the most important directory counts; if it is empty,
    /// or a link to /dev/null, it masks the others. None if nothing is configured.
    ///
    /// # Errors
    /// A file can't be read; those of [`Config::parse`].
    pub fn load(root: &Root) -> Result<Option<Self>> {
        Self::parse(&sources(root)?)
    }

    /// The paths and contents of the files that make up the configuration; later files win.
    ///
    /// # Errors
    /// A file can't be read.
    pub fn sources(root: &Root) -> Result<Vec<(String, Vec<u8>)>> {
        sources(root)
    }

    /// Makes a configuration of texts with their paths; later texts win. None if they contain no disk's section and no line that was not
    /// understood.
    ///
    /// # Errors
    /// All faults in one line, each with its file, its line and the text that was expected there.
    pub fn parse(sources: &[(String, Vec<u8>)]) -> Result<Option<Self>> {
        let mut raw = Raw::default();
        for (file, text) in sources {
            raw.add(file, text);
        }
        let settings = raw.settings();
        let disks = raw.disks();
        raw.check_luks(&settings, &disks);
        if disks.is_empty() && raw.sections.is_empty() && raw.faults.is_empty() && raw.warnings.is_empty() {
            return Ok(None);
        }
        if raw.sections.len() < 2 && raw.faults.is_empty() {
            let file = sources.first().map_or(MAIN, |(file, _)| file.as_str());
            raw.faults
                .push(format!("{file}: expected two or more disks, such as [disk0] and [disk1], found {}", raw.sections.len()));
        }
        if !raw.faults.is_empty() {
            raw.faults.append(&mut raw.warnings);
            bail!("{}", raw.faults.join("; "));
        }
        let source = sources.first().map_or(MAIN, |(file, _)| file).to_owned();
        Ok(Some(Self { source, settings, disks, warnings: raw.warnings }))
    }

    /// The layout that the disks' sections describe.
    pub fn layout(&self) -> Layout {
        match self.disks.first() {
            Some(disk) if disk.parts.contains_key(&Role::Root) => Layout::OwnRoots,
            _ => Layout::SharedRoot,
        }
    }

    /// The disk with this ESP.
    pub fn booted(&self, esp: &PartUuid) -> Option<&Disk> {
        self.disks.iter().find(|disk| disk.esp == *esp)
    }

    /// The other disks, sorted by number, with their mount points: /mnt/root1, /mnt/root2, and so on.
    pub fn spares(&self, booted: &Disk) -> Vec<(DirPath, &Disk)> {
        let spares = self.disks.iter().filter(|disk| disk.name != booted.name);
        (1..).zip(spares).filter_map(|(n, disk)| Some((DirPath::parse(&format!("/mnt/root{n}")).ok()?, disk))).collect()
    }
}

/// A value and the line that assigned it.
#[derive(Clone, Debug)]
struct Value {
    text: String,
    place: Place,
}

/// The section that a line is in.
enum Section {
    None,
    Settings,
    Disk(DiskName),
    Ignored,
}

/// The assignments of all files, merged, and the faults found in them.
#[derive(Default)]
struct Raw {
    settings: BTreeMap<String, Value>,
    exclude: Vec<Value>,
    sections: BTreeMap<DiskName, (Place, BTreeMap<String, Value>)>,
    faults: Vec<String>,
    warnings: Vec<String>,
}

impl Raw {
    /// Adds the assignments of one file to those of earlier ones.
    fn add(&mut self, file: &str, text: &[u8]) {
        let mut section = Section::None;
        for (number, line) in syntax::lines(text) {
            let place = Place { file: file.to_owned(), line: number };
            match line {
                Line::Section(name) => section = self.section(place, &name),
                Line::Assignment { key, value } => self.assign(&section, &key, Value { text: value, place }),
                // Other programs' sections may hold anything.
                Line::BadAssignment(_) if matches!(section, Section::Ignored) => {}
                Line::BadAssignment(found) => self.faults.push(format!("{place}: expected key=value, found '{found}'")),
                Line::BadSection(found) => {
                    self.faults.push(format!("{place}: expected a section such as [disk0], found '{found}'"))
                }
                Line::NotUtf8(found) => self.faults.push(format!("{place}: expected UTF-8 text, found '{found}'")),
            }
        }
    }

    /// Begins a section.
    fn section(&mut self, place: Place, name: &str) -> Section {
        if name == "dualroot" {
            return Section::Settings;
        }
        match DiskName::parse(name) {
            Ok(disk) => {
                self.sections.entry(disk).or_insert_with(|| (place, BTreeMap::new()));
                return Section::Disk(disk);
            }
            Err(e) if name.get(..4).is_some_and(|start| start.eq_ignore_ascii_case("disk")) => {
                self.faults.push(format!("{place}: {e:#}"));
            }
            Err(_) if name.starts_with("X-") => {}
            Err(_) => {
                let name = name.escape_debug();
                self.warnings.push(format!("{place}: expected [dualroot] or [disk0], [disk1], …, found [{name}], ignoring"));
            }
        }
        Section::Ignored
    }

    /// Stores an assignment; an empty value removes an earlier one.
    fn assign(&mut self, section: &Section, key: &str, value: Value) {
        match section {
            Section::Ignored => {}
            _ if key.is_empty() => self.faults.push(format!("{}: expected a key before the '='", value.place)),
            Section::None => {
                let (place, key) = (value.place, key.escape_debug());
                self.warnings.push(format!("{place}: '{key}=' stands before the first section, ignoring"));
            }
            Section::Settings => match key {
                "exclude" if value.text.is_empty() => self.exclude.clear(),
                "exclude" => self.exclude.push(value),
                _ if SETTINGS.contains(&key) => set(&mut self.settings, key, value),
                _ => self.unknown("dualroot", key, &value.place),
            },
            Section::Disk(disk) => {
                let known = match key {
                    "title" | "esp-mountpoint" => Ok(Some(key.to_owned())),
                    _ => disk_role(key).map(|role| role.map(|role| role.key().to_owned())),
                };
                match (known, self.sections.get_mut(disk)) {
                    (Ok(Some(key)), Some((_, values))) => set(values, &key, value),
                    (Ok(_), _) => self.unknown(&disk.to_string(), key, &value.place),
                    (Err(e), _) => self.faults.push(format!("{}: {e:#}", value.place)),
                }
            }
        }
    }

    /// Warns of an unknown key, unless it begins with X-: those are for other programs, like sections with such names.
    fn unknown(&mut self, section: &str, key: &str, place: &Place) {
        if !key.starts_with("X-") {
            self.warnings.push(format!("{place}: unknown key '{}=' in section [{section}], ignoring", key.escape_debug()));
        }
    }

    /// The parsed value, or None after its fault was added to the others.
    fn check<T>(&mut self, key: &str, value: &Value, result: Result<T>) -> Option<T> {
        result.map_err(|e| self.faults.push(format!("{}: {key}=: {e:#}", value.place))).ok()
    }

    /// The typed section `[dualroot]`.
    fn settings(&mut self) -> Settings {
        let mut settings = Settings::default();
        for (key, value) in self.settings.clone() {
            let text = value.text.as_str();
            let result = match key.as_str() {
                "spare-mount" => match text {
                    "boot" => Ok(SpareMount::Boot),
                    "sync" => Ok(SpareMount::Sync),
                    _ => Err(anyhow::anyhow!("expected boot or sync, found '{}'", text.escape_debug())),
                }
                .map(|when| settings.spare_mount = when),
                "settle" => time_span(text).map(|span| settings.settle = span),
                "generations" => match text.parse() {
                    Ok(number @ 1..) => Ok(number),
                    _ => Err(anyhow::anyhow!("expected a number of 1 or more, found '{}'", text.escape_debug())),
                }
                .map(|number| settings.generations = number),
                "efi-entries" => boolean(text).map(|yes| settings.efi_entries = yes),
                "luks" => trees(text).map(|roles| settings.luks = roles),
                "device-timeout" => match time_span(text) {
                    Ok(span) if span.is_zero() => Err(anyhow::anyhow!("expected a time longer than 0, found '{text}'")),
                    span => span.map(|span| settings.device_timeout = span),
                },
                _ => Err(anyhow::anyhow!("this version reads no such key")),
            };
            self.check(&key, &value, result);
        }
        for value in self.exclude.clone() {
            settings.exclude.extend(self.check("exclude", &value, plain(&value.text)));
        }
        settings
    }

    /// Checks that each role in `luks=` is on all disks, and that the root is in the list: the key file for the containers is on it.
    fn check_luks(&mut self, settings: &Settings, disks: &[Disk]) {
        let Some(value) = self.settings.get("luks").filter(|_| !settings.luks.is_empty()) else { return };
        let absent = |role: &&Role| !disks.iter().all(|disk| disk.parts.contains_key(*role));
        if let Some(role) = settings.luks.iter().find(absent) {
            self.faults.push(format!("{}: luks=: expected {role}= in the section of each disk", value.place));
        } else if !settings.luks.contains(&Role::Root) {
            self.faults.push(format!(
                "{}: luks=: expected root in the list, because the key to the other containers is on the root",
                value.place
            ));
        }
    }

    /// Notes the keys that a disk's section lacks, by the `roles` that all sections name, each with the section and place of one of them.
    fn check_keys(
        &mut self,
        name: DiskName,
        place: &Place,
        values: &BTreeMap<String, Value>,
        roles: &BTreeMap<&str, (DiskName, &Place)>,
    ) {
        if !values.contains_key("esp") {
            self.faults.push(format!("{place}: expected esp= in section [{name}]"));
        }
        for (key, (other, its_place)) in roles {
            if *key == "esp" || values.contains_key(*key) {
                continue;
            }
            let why = match *key {
                "root" => "either all disks have root= (each its own root) or none (one shared root)",
                _ => "all disks must have the same partitions",
            };
            self.faults.push(format!("{place}: expected {key}= in section [{name}], as in [{other}] at {its_place}: {why}"));
        }
    }

    /// The typed sections `[diskN]`; faults in them are added to the others.
    fn disks(&mut self) -> Vec<Disk> {
        let sections = self.sections.clone();
        let roles: BTreeMap<&str, (DiskName, &Place)> = (sections.iter().rev())
            .flat_map(|(name, (_, values))| values.iter().map(|(key, value)| (key.as_str(), (*name, &value.place))))
            .filter(|(key, _)| !matches!(*key, "title" | "esp-mountpoint"))
            .collect();
        let mut parts_seen: BTreeMap<PartUuid, (DiskName, String, &Place)> = BTreeMap::new();
        let mut mountpoints_seen = BTreeSet::new();
        let mut disks = Vec::new();
        for (name, (place, values)) in &sections {
            self.check_keys(*name, place, values, &roles);
            let mut disk = Disk {
                name: *name,
                parts: BTreeMap::new(),
                title: None,
                esp_mountpoint: None,
                esp: PartUuid::from(uuid::Uuid::nil()),
            };
            for (key, value) in values {
                match key.as_str() {
                    "title" => disk.title = self.check(key, value, plain(&value.text)),
                    "esp-mountpoint" => {
                        disk.esp_mountpoint = self.check(key, value, esp_mountpoint(&value.text));
                        if disk.esp_mountpoint.as_ref().is_some_and(|path| !mountpoints_seen.insert(path.clone())) {
                            self.faults.push(format!(
                                "{}: esp-mountpoint={} is also that of another disk: expected a different directory for each",
                                value.place, value.text
                            ));
                        }
                    }
                    _ => {
                        let Some(part) = self.check(key, value, PartUuid::parse(&value.text)) else { continue };
                        if let Some((other, its_key, its_place)) = parts_seen.get(&part) {
                            self.faults.push(format!(
                                "{}: {key}= of [{name}] names the partition {part}, which is {its_key}= of [{other}] at {its_place}: \
                                 expected a different partition for each, see 'lsblk -o NAME,PARTUUID'",
                                value.place
                            ));
                        } else {
                            parts_seen.insert(part, (*name, key.clone(), &value.place));
                        }
                        match disk_role(key) {
                            Ok(Some(role)) => {
                                if role == Role::Esp {
                                    disk.esp = part;
                                }
                                disk.parts.insert(role, part);
                            }
                            other => self.faults.extend(other.err().map(|e| format!("{}: {e:#}", value.place))),
                        }
                    }
                }
            }
            disks.push(disk);
        }
        disks
    }
}

/// Stores a value; an empty one removes an earlier one.
fn set(values: &mut BTreeMap<String, Value>, key: &str, value: Value) {
    if value.text.is_empty() {
        values.remove(key);
    } else {
        values.insert(key.to_owned(), value);
    }
}

/// The role that a key names, or None if it names no partition.
///
/// # Errors
/// A directory that can't be a partition of its own, or that dualroot uses itself.
pub(crate) fn disk_role(key: &str) -> Result<Option<Role>> {
    let role = Role::parse_key(key)?;
    if let Some(Role::Dir(path)) = &role {
        let first = path.relative().split('/').next().unwrap_or_default();
        match first {
            "boot" | "efi" => {
                bail!("{path}= can't be a partition of its own: expected esp= and xbootldr= for the partitions on /boot and /efi")
            }
            "dev" | "proc" | "run" | "sys" | "tmp" => {
                bail!("{path}= is in a file system that is made at every boot: expected another directory")
            }
            "etc" => bail!("{path}= is needed before it can be mounted: expected a directory outside /etc"),
            "mnt"
                if path
                    .relative()
                    .strip_prefix("mnt/root")
                    .is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit())) =>
            {
                bail!("{path}= is where spares are mounted: expected another directory")
            }
            _ => {}
        }
    }
    Ok(role)
}

/// The roles in a list of keys that is separated by blanks; all of them must be copied trees.
fn trees(text: &str) -> Result<BTreeSet<Role>> {
    let tree = |key: &str| match disk_role(key)? {
        Some(role) if role.tree().is_some() => Ok(role),
        _ => bail!("expected keys of partitions that are copied, such as root or home, found '{}'", key.escape_debug()),
    };
    text.split_whitespace().map(tree).collect()
}

/// A directory from which the ESP is bound to /boot or /efi. It can't be in those: the bind mount would hide it.
fn esp_mountpoint(text: &str) -> Result<DirPath> {
    let path = DirPath::parse(text)?;
    for place in ["/boot", "/efi"] {
        if path.is_within(&DirPath::parse(place)?) {
            bail!("expected a directory outside /boot and /efi, such as /efi0, found '{path}'");
        }
    }
    Ok(path)
}

/// Text without control characters.
fn plain(text: &str) -> Result<String> {
    if text.chars().any(char::is_control) {
        bail!("expected text without control characters, found '{}'", text.escape_debug());
    }
    Ok(text.to_owned())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use proptest::prelude::*;

    use super::*;

    const A: &str = "6ffd4e1c-0000-4000-8000-00000000000";
    const PAIR: &str = "[disk0]\nesp=6FFD4E1C-0000-4000-8000-000000000000\nroot=PARTUUID=6ffd4e1c-0000-4000-8000-000000000001\n\
                        [disk1]\nesp=6ffd4e1c-0000-4000-8000-000000000010\nroot=partuuid=6ffd4e1c-0000-4000-8000-000000000011\n";

    fn parse(texts: &[&str]) -> Result<Option<Config>> {
        let name = |n| if n == 0 { "/etc/dualroot.conf".to_owned() } else { format!("/etc/dualroot.conf.d/{n}.conf") };
        Config::parse(&texts.iter().enumerate().map(|(n, text)| (name(n), text.as_bytes().to_vec())).collect::<Vec<_>>())
    }

    fn good(texts: &[&str]) -> Config {
        parse(texts).unwrap().unwrap()
    }

    fn bad(text: &str) -> String {
        let error = format!("{:#}", parse(&[text]).unwrap_err());
        assert!(!error.contains('\n'), "one line: {error}");
        error
    }

    fn shared(extra0: &str, extra1: &str) -> String {
        format!("[disk0]\nesp={A}0\n{extra0}\n[disk1]\nesp={A}1\n{extra1}\n")
    }

    #[test]
    fn luks_names_trees_of_all_disks() {
        assert_eq!(good(&[PAIR, "[dualroot]\nluks=root\n"]).settings.luks, [Role::Root].into());
        assert!(good(&[PAIR, "[dualroot]\nluks=root\n", "[dualroot]\nluks=\n"]).settings.luks.is_empty());
        for (luks, expected) in [
            ("root home", "luks=: expected home= in the section of each disk"),
            ("esp", "expected keys of partitions that are copied, such as root or home, found 'esp'"),
            ("swap", "found 'swap'"),
            ("yes", "found 'yes'"),
        ] {
            let error = bad(&format!("{PAIR}[dualroot]\nluks={luks}\n"));
            assert!(error.contains(expected), "{error}");
        }
        let home = format!("[disk0]\nhome={A}7\n[disk1]\nhome={A}8\n");
        assert!(bad(&format!("{PAIR}{home}[dualroot]\nluks=home\n")).contains("expected root in the list"));
        assert!(bad(&format!("{}[dualroot]\nluks=root\n", shared("", ""))).contains("expected root= in"));
    }

    #[test]
    fn a_pair_with_own_roots() {
        let config = good(&[PAIR]);
        assert_eq!(config.layout(), Layout::OwnRoots);
        assert_eq!(config.settings, Settings::default());
        let [a, b] = &config.disks[..] else { panic!() };
        assert_eq!(a.esp().to_string(), format!("{A}0"));
        assert_eq!(a.parts.len(), 2);
        assert_eq!(config.booted(&b.esp()), Some(b));
        assert_eq!(config.booted(&b.parts[&Role::Root]), None);
        let spares: Vec<_> = config.spares(b).into_iter().map(|(dir, disk)| (dir.to_string(), disk.name.to_string())).collect();
        assert_eq!(spares, [("/mnt/root1".to_owned(), "disk0".to_owned())]);
        assert!(config.warnings.is_empty());
    }

    #[test]
    fn spares_are_numbered_by_section_whatever_their_order_in_the_file() {
        let config = good(&[&format!("[disk10]\nesp={A}9\n[disk2]\nesp={A}2\n[disk0]\nesp={A}0\n[disk1]\nesp={A}1\n")]);
        let spares = config.spares(&config.disks[1]);
        let spares: Vec<_> = spares.iter().map(|(dir, disk)| format!("{dir} {}", disk.name)).collect();
        assert_eq!(spares, ["/mnt/root1 disk0", "/mnt/root2 disk2", "/mnt/root3 disk10"]);
        assert_eq!(config.layout(), Layout::SharedRoot);
    }

    #[test]
    fn mount_points_of_boot_partitions() {
        let place = |text: &str| {
            let config = good(&[text]);
            config.disks[0].boot_places().iter().map(|(role, _, path)| format!("{role} {path}")).collect::<Vec<_>>()
        };
        assert_eq!(place(PAIR), ["esp /boot"]);
        assert_eq!(place(&shared(&format!("xbootldr={A}2"), &format!("xbootldr={A}3"))), ["esp /efi", "xbootldr /boot"]);
    }

    #[test]
    fn later_settings_win_and_empty_ones_reset() {
        let text = "[dualroot]\nspare-mount=sync\nsettle=2min 30s\nexclude=- /var/cache/\nexclude=*.o\nefi-entries=No\ndevice-timeout=500ms\n";
        let config = good(&[text, PAIR]);
        assert_eq!(config.settings.spare_mount, SpareMount::Sync);
        assert_eq!(config.settings.settle, Duration::from_secs(150));
        assert_eq!(config.settings.exclude, ["- /var/cache/", "*.o"]);
        assert!(!config.settings.efi_entries);
        assert_eq!(config.settings.device_timeout, Duration::from_millis(500));
        // Later wins; empty resets; a list accumulates.
        let later = "[dualroot]\nspare-mount=\nsettle=1\nexclude=\nexclude=third\n[disk1]\ntitle=B\n[dualroot]\nexclude=fourth\n";
        let config = good(&[text, PAIR, later]);
        assert_eq!(config.settings.spare_mount, SpareMount::Boot);
        assert_eq!(config.settings.settle, Duration::from_secs(1));
        assert_eq!(config.settings.exclude, ["third", "fourth"]);
        assert_eq!(config.disks[1].title.as_deref(), Some("B"));
    }

    #[test]
    fn files_without_a_disk_configure_nothing() {
        for texts in [&[][..], &[""], &["# only notes\n"], &["[dualroot]\nsettle=1\n"], &["[X-other]\nfoo=1\n"]] {
            assert_eq!(parse(texts).unwrap(), None, "{texts:?}");
        }
        // This may be a misspelt section.
        assert!(
            bad("[dsk0]\nesp=1\n")
                .contains("/etc/dualroot.conf:1: expected [dualroot] or [disk0], [disk1], …, found [dsk0], ignoring")
        );
    }

    #[test]
    fn faults_name_file_and_line() {
        for (text, expected) in [
            ("[disk0]\nesp\n", "/etc/dualroot.conf:2: expected key=value, found 'esp'"),
            ("[disk0\n", "/etc/dualroot.conf:1: expected a section such as [disk0], found '[disk0'"),
            ("[a]b]\n", "/etc/dualroot.conf:1: expected a section"),
            ("[disk0]\n=5\n", "/etc/dualroot.conf:2: expected a key before the '='"),
            ("[disk00]\n", "/etc/dualroot.conf:1: 'disk00' is not a disk's section"),
            ("[Disk0]\n", "/etc/dualroot.conf:1: 'Disk0' is not a disk's section"),
            ("[dualroot]\ngenerations=0\n", "/etc/dualroot.conf:2: generations=: expected a number of 1 or more, found '0'"),
            (
                "[dualroot]\n\nsettle=soon\n",
                "/etc/dualroot.conf:3: settle=: expected a time span such as 5s, 500ms or 2min 30s, found 'soon'",
            ),
            ("[dualroot]\ndevice-timeout=0\n", "/etc/dualroot.conf:2: device-timeout=: expected a time longer than 0, found '0'"),
            ("[dualroot]\nspare-mount=always\n", "/etc/dualroot.conf:2: spare-mount=: expected boot or sync, found 'always'"),
            ("[dualroot]\nefi-entries=2\n", "/etc/dualroot.conf:2: efi-entries=: expected yes or no, found '2'"),
            (
                "[dualroot]\nexclude=a\tb\n",
                "/etc/dualroot.conf:2: exclude=: expected text without control characters, found 'a\\tb'",
            ),
            ("[disk0]\nesp=1234abcd-01\n", "/etc/dualroot.conf:2: esp=: '1234abcd-01' is not a PARTUUID"),
            ("[disk0]\nesp=00000000-0000-0000-0000-000000000000\n", "/etc/dualroot.conf:2: esp=: the PARTUUID is all zeros"),
            ("[disk0]\n/home=x\n", "/etc/dualroot.conf:2: write home= instead of /home="),
            ("[disk0]\n/boot/efi=x\n", "/etc/dualroot.conf:2: /boot/efi= can't be a partition of its own"),
            ("[disk0]\n/mnt/root1/x=x\n", "/etc/dualroot.conf:2: /mnt/root1/x= is where spares are mounted"),
            ("[disk0]\n/a/../b=x\n", "/etc/dualroot.conf:2: the path '/a/../b' contains '..'"),
            (
                "[disk0]\ntitle=a\x07b\n",
                "/etc/dualroot.conf:2: title=: expected text without control characters, found 'a\\u{7}b'",
            ),
            ("[disk0]\nesp-mountpoint=efi0\n", "/etc/dualroot.conf:2: esp-mountpoint=: 'efi0' is not an absolute path"),
            (
                "[disk0]\nesp-mountpoint=/boot/efi\n",
                "/etc/dualroot.conf:2: esp-mountpoint=: expected a directory outside /boot and /efi",
            ),
            ("[disk0]\ntitle=x\n", "/etc/dualroot.conf:1: expected esp= in section [disk0]"),
        ] {
            let error = bad(text);
            assert!(error.contains(expected), "{text:?} gave {error}");
        }
        let error = format!("{:#}", Config::parse(&[("f".into(), b"[disk0]\nesp=\xff\n".to_vec())]).unwrap_err());
        assert!(error.contains("f:2: expected UTF-8 text, found 'esp=\\xff'"), "{error}");
        // All of it at once.
        assert_eq!(bad("[dualroot]\nsettle=x\nspare-mount=y\nfoo=1\n").split("; ").count(), 3);
    }

    #[test]
    fn disks_must_match() {
        let one = format!("[disk0]\nesp={A}0\n");
        assert_eq!(bad(&one), "/etc/dualroot.conf: expected two or more disks, such as [disk0] and [disk1], found 1");
        let error = bad(&shared(&format!("root={A}2"), ""));
        let why = "either all disks have root= (each its own root) or none (one shared root)";
        assert_eq!(
            error,
            format!("/etc/dualroot.conf:4: expected root= in section [disk1], as in [disk0] at /etc/dualroot.conf:3: {why}")
        );
        let error = bad(&shared("", &format!("/data={A}2")));
        let why = "all disks must have the same partitions";
        assert_eq!(
            error,
            format!("/etc/dualroot.conf:1: expected /data= in section [disk0], as in [disk1] at /etc/dualroot.conf:6: {why}")
        );
        let error = bad(&shared("esp-mountpoint=/efi0", "esp-mountpoint=/efi0/"));
        assert_eq!(
            error,
            "/etc/dualroot.conf:6: esp-mountpoint=/efi0/ is also that of another disk: expected a different directory for each"
        );
    }

    #[test]
    fn f64_a_typo_is_told_with_the_fault_that_it_makes() {
        let error = bad(&shared(&format!("rot={A}2"), &format!("root={A}3")));
        let faults: Vec<&str> = error.split("; ").collect();
        let [missing, typo] = faults[..] else { panic!("{error}") };
        assert!(missing.starts_with("/etc/dualroot.conf:1: expected root= in section [disk0], as in [disk1]"), "{missing}");
        assert_eq!(typo, "/etc/dualroot.conf:3: unknown key 'rot=' in section [disk0], ignoring");
    }

    #[test]
    fn f02_f03_a_partition_can_be_named_once_only() {
        let error = bad(&format!("[disk0]\nesp={A}0\n[disk1]\nesp={}\n", format!("{A}0").to_uppercase()));
        assert_eq!(
            error,
            format!(
                "/etc/dualroot.conf:4: esp= of [disk1] names the partition {A}0, which is esp= of [disk0] at /etc/dualroot.conf:2: \
                 expected a different partition for each, see 'lsblk -o NAME,PARTUUID'"
            )
        );
        let error = bad(&shared(&format!("home={A}2\nsrv={A}2"), &format!("home={A}3\nsrv={A}4")));
        assert!(error.contains("srv= of [disk0] names the partition"), "{error}");
    }

    #[test]
    fn each_setting_that_is_listed_is_read() {
        for key in SETTINGS {
            let error = bad(&format!("{PAIR}[dualroot]\n{key}=\u{1b}\n"));
            assert!(error.contains(&format!("{key}=: ")) && !error.contains("no such key"), "{error}");
        }
    }

    #[test]
    fn unknown_keys_are_warned_of() {
        let config =
            good(&["esp=1\n[other]\nx=1\nnothing\n[X-y]\nz=1\n[dualroot]\nX-k=1\ncolour=red\n", PAIR, "[disk1]\nboot=1\n"]);
        assert_eq!(
            config.warnings,
            [
                "/etc/dualroot.conf:1: 'esp=' stands before the first section, ignoring",
                "/etc/dualroot.conf:2: expected [dualroot] or [disk0], [disk1], …, found [other], ignoring",
                "/etc/dualroot.conf:9: unknown key 'colour=' in section [dualroot], ignoring",
                "/etc/dualroot.conf.d/2.conf:2: unknown key 'boot=' in section [disk1], ignoring",
            ]
        );
    }

    #[test]
    fn duplicate_sections_merge_and_paths_are_normalised() {
        let config = good(&[&format!(
            "[disk0]\nesp={A}0\n/data/={A}2\n[disk1]\nesp={A}1\n//data={A}3\n[disk0]\n/data={A}4\ntitle=x\ntitle=\n"
        )]);
        assert_eq!(config.disks[0].parts[&Role::parse_key("/data").unwrap().unwrap()].to_string(), format!("{A}4"));
        assert_eq!(config.disks[0].title, None);
    }

    #[test]
    fn files_are_found_as_systemd_finds_them() {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::new(dir.path());
        let write = |path: &str, text: &str| {
            let path = root.path(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        let paths = || sources(&root).unwrap().into_iter().map(|(path, _)| path).collect::<Vec<_>>();
        assert_eq!(Config::load(&root).unwrap(), None);
        write("/usr/lib/dualroot.conf", PAIR);
        write("/usr/local/lib/dualroot.conf", PAIR);
        write("/usr/lib/dualroot.conf.d/50-b.conf", "[dualroot]\nsettle=1\n");
        write("/usr/lib/dualroot.conf.d/40-c.conf", "[dualroot]\nsettle=2\n");
        write("/usr/lib/dualroot.conf.d/note.txt", "[[[");
        write("/usr/lib/dualroot.conf.d/.hidden.conf", "[[[");
        let expected =
            ["/usr/local/lib/dualroot.conf", "/usr/lib/dualroot.conf.d/40-c.conf", "/usr/lib/dualroot.conf.d/50-b.conf"];
        assert_eq!(paths(), expected);
        assert_eq!(Config::load(&root).unwrap().unwrap().settings.settle, Duration::from_secs(1));
        // A drop-in in a more important directory wins or masks; the order is by name in any case.
        write("/run/dualroot.conf.d/50-b.conf", "");
        write("/etc/dualroot.conf.d/30-a.conf", "[dualroot]\nsettle=3\n");
        std::os::unix::fs::symlink("/dev/null", root.path("/etc/dualroot.conf.d/40-c.conf")).unwrap();
        let config = Config::load(&root).unwrap().unwrap();
        assert_eq!(config.settings.settle, Duration::from_secs(3));
        // The main file can be masked too; a dangling link counts as absent.
        std::os::unix::fs::symlink("/nowhere", root.path("/etc/dualroot.conf")).unwrap();
        assert_eq!(Config::load(&root).unwrap().unwrap(), config);
        std::os::unix::fs::symlink("/dev/null", root.path("/run/dualroot.conf")).unwrap();
        assert_eq!(Config::load(&root).unwrap(), None);
    }

    #[test]
    fn other_types_of_files_are_refused_before_they_are_opened() {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::new(dir.path());
        fs::create_dir(root.path("/etc")).unwrap();
        nix::unistd::mkfifo(&root.path("/etc/dualroot.conf"), nix::sys::stat::Mode::S_IRUSR).unwrap();
        assert_eq!(format!("{:#}", Config::load(&root).unwrap_err()), "/etc/dualroot.conf is not a regular file");
        fs::remove_file(root.path("/etc/dualroot.conf")).unwrap();
        fs::create_dir(root.path("/etc/dualroot.conf")).unwrap();
        assert!(Config::load(&root).is_err());
    }

    proptest! {
        /// f26: any bytes give a configuration, none, or an error of one line.
        #[test]
        fn f26_any_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            if let Err(e) = Config::parse(&[("f".into(), bytes)]) {
                let text = format!("{e:#}");
                prop_assert!(!text.contains('\n'));
            }
        }

        /// f26: the same for words of a configuration in any order.
        #[test]
        fn f26_any_words(words in proptest::collection::vec(proptest::sample::select(vec![
            "[disk0]", "[disk1]", "[dualroot]", "[", "]", "\n", "\n", "\n", "=", "esp", "root", "/data", "title", "esp-mountpoint", "\\",
            "settle", "exclude", "device-timeout", "5s", " ", "#", "6ffd4e1c-0000-4000-8000-000000000000", "PARTUUID=", "/x", "é", "\u{0}", "\r",
        ]), 0..60)) {
            if let Ok(Some(config)) = Config::parse(&[("f".into(), words.concat().into_bytes())]) {
                prop_assert!(config.disks.len() >= 2);
                prop_assert!(config.disks.iter().all(|d| d.parts.get(&Role::Esp) == Some(&d.esp())));
            }
        }
    }
}
