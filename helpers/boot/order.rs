//! The order in which a sync writes the boot partitions of a spare.
//!
//! The plan is a list of [`Step`]s that follows from the files on both disks alone. Its order keeps one promise: *at every write boundary,
//! the entry that the boot loader would boot unattended is whole, all old or all new.* So:
//!
//! 1. payloads (kernels, initrds, device trees) are written under names that no entry on the spare refers to. If the content of a name
//!    changes, the new payload is first staged under another name (`.dualroot-HASH-NAME`);
//! 2. then entries are changed to refer to these files, each in one sector or by a rename; then loader.conf;
//! 3. then entries that the booted disk doesn't have are removed, because they may refer to names whose content changes next;
//! 4. then staged payloads are written under their final names, and the entries are changed to those;
//! 5. then the boot loaders, one after the other;
//! 6. then files that nothing needs any more are removed.
//!
//! Everything is flushed between any two of these ([`Change::Barrier`]). dualroot(7) has the facts about FAT on which this relies.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Result, bail};

use crate::base::types::Role;
use crate::boot::bootable::Bootable;
use crate::boot::entry;
use crate::boot::files::{BootFile, Class, classify, fold};
use crate::boot::wanted::{BootPartition, Step, WantedFile};
use crate::write::below::TEMPORARY_PREFIX;
use crate::write::change::{Change, Content};
use crate::write::sector::text_change;

/// The steps that give these partitions their wanted files, in the order of the module's documentation.
///
/// # Errors
/// Two wanted files have the same name.
pub fn plan(parts: &[BootPartition<'_>]) -> Result<Vec<Step>> {
    let partitions = parts.iter().map(PartitionState::new).collect::<Result<Vec<_>>>()?;
    Ok(in_order(partitions, &phases()))
}

/// The steps for partitions without space for old and new files at the same time (failure mode 19): unneeded files are removed first. None
/// if the spare would be left without a whole entry to boot until the new ones are written.
///
/// # Errors
/// As [`plan`].
pub fn plan_for_little_room(parts: &[BootPartition<'_>]) -> Result<Option<Vec<Step>>> {
    let partitions = parts.iter().map(PartitionState::new).collect::<Result<Vec<_>>>()?;
    if !partitions.iter().any(PartitionState::has_whole_entry) {
        return Ok(None);
    }
    let phases: Vec<Phase<'_>> = [PartitionState::sweep as Phase<'_>, PartitionState::drop_entries, PartitionState::drop_files]
        .into_iter()
        .chain(phases())
        .collect();
    Ok(Some(in_order(partitions, &phases)))
}

fn phases<'a>() -> [Phase<'a>; 9] {
    [
        PartitionState::sweep,
        PartitionState::payloads,
        PartitionState::entries,
        PartitionState::loader_conf,
        PartitionState::drop_entries,
        PartitionState::final_names,
        PartitionState::entries,
        PartitionState::loaders,
        PartitionState::drop_files,
    ]
}

fn in_order<'a>(mut partitions: Vec<PartitionState<'a>>, phases: &[Phase<'a>]) -> Vec<Step> {
    let mut steps = Steps::default();
    for phase in phases {
        for partition in &mut partitions {
            phase(partition, &mut steps);
        }
        steps.barrier();
    }
    steps.list
}

type Phase<'a> = fn(&mut PartitionState<'a>, &mut Steps);

/// The steps so far, and the partitions with steps that aren't flushed.
#[derive(Default)]
struct Steps {
    list: Vec<Step>,
    dirty: BTreeSet<Role>,
}

impl Steps {
    fn push(&mut self, role: &Role, change: Change) {
        self.dirty.insert(role.clone());
        self.list.push(Step { role: role.clone(), change });
    }

    fn barrier(&mut self) {
        for role in std::mem::take(&mut self.dirty) {
            self.list.push(Step { role, change: Change::Barrier });
        }
    }
}

/// A partition while its plan is made.
struct PartitionState<'a> {
    role: &'a Role,
    wanted: BTreeMap<String, &'a WantedFile>,
    known: &'a BTreeSet<String>,
    /// The files on it after the steps so far.
    files: BTreeMap<String, BootFile>,
    temporary: BTreeMap<String, BootFile>,
    dirs: BTreeSet<String>,
    /// The names under which payloads are staged, by their folded paths.
    staged: BTreeMap<String, String>,
    /// Folded paths of files that removed entries referred to.
    orphans: BTreeSet<String>,
}

impl<'a> PartitionState<'a> {
    fn new(part: &'a BootPartition<'a>) -> Result<Self> {
        let mut wanted = BTreeMap::new();
        for file in &part.wanted {
            if wanted.insert(fold(&file.path), file).is_some() {
                bail!("{} exists twice on the booted disk, with and without boot counters. Remove one", file.path);
            }
        }
        Ok(Self {
            role: &part.role,
            wanted,
            known: part.known,
            files: part.spare.files.clone(),
            temporary: part.spare.temporary.clone(),
            dirs: part.spare.dirs.iter().map(|d| fold(d)).collect(),
            staged: BTreeMap::new(),
            orphans: BTreeSet::new(),
        })
    }

    fn wanted_of(&self, classes: &[Class]) -> Vec<&'a WantedFile> {
        self.wanted.values().copied().filter(|w| classes.contains(&classify(&w.path))).collect()
    }

    /// Folded paths of the files that present entries refer to.
    fn referred(&self) -> BTreeSet<String> {
        Bootable::all(&self.files).flat_map(|bootable| bootable.refers_to()).map(|path| fold(&path)).collect()
    }

    /// Whether the file is there with its wanted content.
    fn has(&self, wanted: &WantedFile) -> bool {
        self.files.get(&fold(&wanted.path)).is_some_and(|f| f.hash == wanted.hash)
    }

    /// Whether an entry that stays has all its files already, with their wanted content.
    fn has_whole_entry(&self) -> bool {
        let is_whole = |path: &String| self.wanted.get(&fold(path)).is_some_and(|file| self.has(file));
        Bootable::all(&self.files).any(|bootable| match (&bootable, self.wanted.get(&fold(&bootable.file().path))) {
            (_, None) => false,
            (Bootable::Entry(_), Some(_)) => bootable.refers_to().iter().all(is_whole),
            (Bootable::Uki(_) | Bootable::UkiWithAddons(..), Some(wanted)) => self.has(wanted),
        })
    }

    fn make_parents(&mut self, steps: &mut Steps, path: &str) {
        let Some((dir, _)) = path.rsplit_once('/') else { return };
        if self.dirs.insert(fold(dir)) {
            steps.push(self.role, Change::MakeDir(dir.to_owned()));
            let mut upper = dir;
            while let Some((parent, _)) = upper.rsplit_once('/') {
                self.dirs.insert(fold(parent));
                upper = parent;
            }
        }
    }

    fn note(&mut self, path: &str, content: &Content, hash: blake3::Hash) {
        let text = match content {
            Content::Bytes(bytes) => Some(bytes.clone()),
            Content::File { .. } => None,
        };
        self.files.insert(fold(path), BootFile { path: path.to_owned(), size: content.size(), hash, text });
    }

    fn remove(&mut self, steps: &mut Steps, key: &str) {
        if let Some(file) = self.files.remove(key).or_else(|| self.temporary.remove(key)) {
            steps.push(self.role, Change::Remove(file.path));
        }
    }

    /// Removes temporary files of interrupted syncs that no entry refers to, and entries with missing files: such an entry would become
    /// bootable while its payload is half written.
    fn sweep(&mut self, steps: &mut Steps) {
        let referred = self.referred();
        for key in self.temporary.keys().filter(|k| !referred.contains(*k)).cloned().collect::<Vec<_>>() {
            self.remove(steps, &key);
        }
        let dead = |bootable: &Bootable<'_>| {
            let lacks = |f: &String| !self.files.contains_key(&fold(f)) && !self.temporary.contains_key(&fold(f));
            bootable.refers_to().iter().any(lacks)
        };
        for key in Bootable::all(&self.files).filter(dead).map(|b| fold(&b.file().path)).collect::<Vec<_>>() {
            self.remove(steps, &key);
        }
    }

    /// Writes payloads, staged if an entry refers to their name.
    fn payloads(&mut self, steps: &mut Steps) {
        let referred = self.referred();
        for file in self.wanted_of(&[Class::Payload]) {
            if self.has(file) {
                continue;
            }
            self.make_parents(steps, &file.path);
            if !referred.contains(&fold(&file.path)) {
                steps.push(self.role, Change::Create { path: file.path.clone(), content: file.content.clone() });
                self.note(&file.path, &file.content, file.hash);
                continue;
            }
            let (dir, name) = match file.path.rsplit_once('/') {
                Some((dir, name)) => (format!("{dir}/"), name),
                None => (String::new(), file.path.as_str()),
            };
            let short: String = file.hash.to_hex().chars().take(16).collect();
            let staged = format!("{dir}{TEMPORARY_PREFIX}{short}-{name}");
            let whole = self.temporary.get(&fold(&staged)).is_some_and(|t| t.hash == file.hash);
            if !whole {
                steps.push(self.role, Change::Create { path: staged.clone(), content: file.content.clone() });
            }
            let there = BootFile { path: staged.clone(), size: file.content.size(), hash: file.hash, text: None };
            self.temporary.insert(fold(&staged), there);
            self.staged.insert(fold(&file.path), staged);
        }
    }

    /// Writes the wanted entries; those of a staged payload refer to its temporary name.
    fn entries(&mut self, steps: &mut Steps) {
        for file in self.wanted_of(&[Class::Entry, Class::Uki]) {
            match &file.content {
                Content::Bytes(text) => {
                    let text = entry::redirect(text, |path| self.staged.get(&fold(path)).cloned());
                    self.put_text(steps, &file.path, &text);
                }
                Content::File { .. } if !self.has(file) => {
                    self.make_parents(steps, &file.path);
                    steps.push(self.role, Change::Replace { path: file.path.clone(), content: file.content.clone(), like: None });
                    self.note(&file.path, &file.content, file.hash);
                }
                Content::File { .. } => {}
            }
        }
    }

    fn loader_conf(&mut self, steps: &mut Steps) {
        for file in self.wanted_of(&[Class::LoaderConf]) {
            if let Content::Bytes(text) = &file.content {
                self.put_text(steps, &file.path, text);
            }
        }
    }

    fn put_text(&mut self, steps: &mut Steps, path: &str, text: &[u8]) {
        let there = self.files.get(&fold(path));
        if there.and_then(|f| f.text.as_deref()).is_some_and(|old| old.trim_ascii_end() == text.trim_ascii_end()) {
            return;
        }
        let path = there.map_or(path, |f| f.path.as_str()).to_owned();
        let change = text_change(&path, there.map(|f| f.size), text);
        let bytes = match &change {
            Change::Overwrite { bytes, .. } | Change::Replace { content: Content::Bytes(bytes), .. } => bytes.clone(),
            _ => text.to_vec(),
        };
        let hash = blake3::hash(&bytes);
        self.make_parents(steps, &path);
        steps.push(self.role, change);
        self.note(&path, &Content::Bytes(bytes), hash);
    }

    /// Writes staged payloads under their final names, which no entry refers to at this time.
    fn final_names(&mut self, steps: &mut Steps) {
        for key in std::mem::take(&mut self.staged).into_keys() {
            let Some(file) = self.wanted.get(&key).copied() else { continue };
            steps.push(self.role, Change::Create { path: file.path.clone(), content: file.content.clone() });
            self.note(&file.path, &file.content, file.hash);
        }
    }

    /// Writes one boot loader after the other, each flushed before the next; the firmware's fallback is last.
    fn loaders(&mut self, steps: &mut Steps) {
        let mut loaders = self.wanted_of(&[Class::Loader]);
        loaders.sort_by_key(|w| fold(&w.path).starts_with("efi/boot/"));
        for file in loaders {
            if !self.has(file) {
                self.make_parents(steps, &file.path);
                let change = Change::Replace { path: file.path.clone(), content: file.content.clone(), like: None };
                steps.push(self.role, change);
                self.note(&file.path, &file.content, file.hash);
            }
        }
    }

    /// Removes the entries that aren't wanted.
    fn drop_entries(&mut self, steps: &mut Steps) {
        let all = Bootable::all(&self.files).map(|bootable| (fold(&bootable.file().path), bootable.refers_to()));
        for (key, referred) in all.filter(|(key, _)| !self.wanted.contains_key(key)).collect::<Vec<_>>() {
            // Files that only this entry needed are removed too, wherever they came from.
            for path in referred {
                if classify(&path) == Class::Payload {
                    self.orphans.insert(fold(&path));
                }
            }
            self.remove(steps, &key);
        }
    }

    /// Removes files that nothing needs and that came from a booted disk, temporary files, and directories that become empty.
    fn drop_files(&mut self, steps: &mut Steps) {
        let referred = self.referred();
        let gone = |key: &&String| {
            !self.wanted.contains_key(*key)
                && classify(key) != Class::Local
                && !referred.contains(*key)
                && (self.known.contains(*key) || self.orphans.contains(*key))
        };
        let mut keys: Vec<_> = self.files.keys().filter(gone).cloned().collect();
        keys.extend(self.temporary.keys().filter(|key| !referred.contains(*key)).cloned());
        let mut emptied = BTreeSet::new();
        for key in keys {
            let path = self.files.get(&key).or(self.temporary.get(&key)).map(|f| f.path.clone()).unwrap_or_default();
            self.remove(steps, &key);
            let mut dir = path.as_str();
            while let Some((parent, _)) = dir.rsplit_once('/') {
                emptied.insert((std::cmp::Reverse(parent.matches('/').count()), parent.to_owned()));
                dir = parent;
            }
        }
        // The deepest first, and only empty ones.
        for (_, dir) in emptied {
            let below = format!("{}/", fold(&dir));
            if !self.files.keys().chain(self.temporary.keys()).any(|k| k.starts_with(&below)) {
                // A later step that needs it makes it again.
                self.dirs.remove(&fold(&dir));
                steps.push(self.role, Change::Remove(dir));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::boot::files::BootFiles;
    use crate::boot::room::shortfall;
    use crate::boot::wanted::wanted_files;
    use crate::write::below::Below;

    const ENTRY: &str = "loader/entries/a.conf";

    /// Two directories that stand for a boot partition of the booted disk and of the spare.
    struct Disks {
        tmp: tempfile::TempDir,
        known: BTreeSet<String>,
    }

    impl Disks {
        fn new(source: &[(&str, &str)], spare: &[(&str, &str)]) -> Self {
            let disks = Self { tmp: tempfile::tempdir().unwrap(), known: BTreeSet::new() };
            for (side, files) in [("source", source), ("spare", spare)] {
                fs::create_dir(disks.tmp.path().join(side)).unwrap();
                for (path, text) in files {
                    let path = disks.tmp.path().join(side).join(path);
                    fs::create_dir_all(path.parent().unwrap()).unwrap();
                    fs::write(path, text).unwrap();
                }
            }
            disks
        }

        fn below(&self, side: &str) -> Below {
            Below::open(&self.tmp.path().join(side)).unwrap()
        }

        fn scan(&self, side: &str) -> BootFiles {
            BootFiles::scan(&self.below(side)).unwrap()
        }

        fn plan(&self) -> Vec<Step> {
            let spare = self.scan("spare");
            let wanted =
                wanted_files(&self.scan("source"), &self.tmp.path().join("source"), &spare, |_, text| text.to_vec()).unwrap();
            plan(&[BootPartition { role: Role::Esp, wanted, spare: &spare, known: &self.known }]).unwrap()
        }

        /// Carries out the plan. After each step, every entry on the spare must have all its files, and these must be of one generation: they
        /// begin with the same character.
        fn sync(&self) -> Vec<Step> {
            let steps = self.plan();
            for step in &steps {
                self.below("spare").apply(&step.change).unwrap();
                self.check(&format!("after {:?} of {steps:#?}", step.change));
            }
            assert_eq!(self.plan(), [], "a second plan is empty");
            steps
        }

        fn check(&self, when: &str) {
            for file in self.scan("spare").of(Class::Entry) {
                let generations: BTreeSet<char> = entry::files(file.text.as_ref().unwrap())
                    .iter()
                    .map(|path| {
                        let text = fs::read_to_string(self.tmp.path().join("spare").join(path));
                        text.unwrap_or_else(|e| panic!("{path}: {e} {when}")).chars().next().unwrap()
                    })
                    .collect();
                assert_eq!(generations.len(), 1, "{} mixes generations {when}", file.path);
            }
        }

        fn on_spare(&self) -> Vec<String> {
            self.scan("spare").files.into_keys().collect()
        }
    }

    const FIXED: &str = "title Arch\nlinux /vmlinuz-linux\ninitrd /initramfs-linux.img\n";

    #[test]
    fn f18_fixed_names_are_changed_as_a_pair() {
        let files = |n: &'static str| [("vmlinuz-linux", n), ("initramfs-linux.img", n), (ENTRY, FIXED)];
        let disks = Disks::new(&files("2 new"), &files("1 old"));
        let steps = disks.sync();
        assert_eq!(disks.on_spare(), ["initramfs-linux.img", ENTRY, "vmlinuz-linux"]);
        assert!(steps.iter().any(|s| matches!(&s.change, Change::Create { path, .. } if path.starts_with(TEMPORARY_PREFIX))));
    }

    #[test]
    fn f18_a_removed_entry_never_gets_other_files() {
        let of = |name: &'static str, n: &'static str| [("vmlinuz-linux", n), ("initramfs-linux.img", n), (name, FIXED)];
        let disks = Disks::new(&of("loader/entries/b.conf", "2 new"), &of("loader/entries/a.conf", "1 old"));
        disks.sync();
        assert_eq!(disks.on_spare(), ["initramfs-linux.img", "loader/entries/b.conf", "vmlinuz-linux"]);
    }

    #[test]
    fn f08_a_kernel_is_written_before_its_entry_and_removed_after_it() {
        let of = |n: &str| format!("title Debian\nlinux /t/{n}/linux\ninitrd /t/{n}/initrd\n");
        let (one, two) = (of("1"), of("2"));
        let mut disks = Disks::new(
            &[("t/2/linux", "2"), ("t/2/initrd", "2"), ("loader/entries/2.conf", &two), ("loader/loader.conf", "default 2.conf")],
            &[("t/1/linux", "1"), ("t/1/initrd", "1"), ("loader/entries/1.conf", &one), ("loader/loader.conf", "default 1.conf")],
        );
        disks.known = ["t/1/linux", "t/1/initrd"].map(Into::into).into();
        let steps = disks.sync();
        let at = |wanted: &dyn Fn(&Change) -> bool| steps.iter().position(|s| wanted(&s.change)).unwrap();
        let barrier = |from: usize, to: usize| steps[from..to].iter().any(|s| s.change == Change::Barrier);
        let payload = at(&|c| matches!(c, Change::Create { path, .. } if path == "t/2/linux"));
        let entry = at(&|c| matches!(c, Change::Replace { path, .. } if path == "loader/entries/2.conf"));
        let conf = at(&|c| matches!(c, Change::Replace { path, .. } if path == "loader/loader.conf"));
        let old_entry = at(&|c| *c == Change::Remove("loader/entries/1.conf".into()));
        let old_payload = at(&|c| *c == Change::Remove("t/1/linux".into()));
        for (first, then) in [(payload, entry), (entry, conf), (conf, old_entry), (old_entry, old_payload)] {
            assert!(first < then && barrier(first, then), "{steps:#?}");
        }
        assert!(!disks.tmp.path().join("spare/t/1").exists());
    }

    #[test]
    fn first_sync_writes_the_boot_loader_last() {
        let disks = Disks::new(
            &[
                ("EFI/systemd/systemd-bootx64.efi", "sd"),
                ("linux", "1"),
                (ENTRY, "linux /linux\n"),
                ("loader/random-seed", "secret"),
            ],
            &[],
        );
        let steps = disks.sync();
        assert_eq!(
            disks.on_spare(),
            ["efi/boot/bootx64.efi", "efi/systemd/systemd-bootx64.efi", "linux", ENTRY],
            "with the fallback, and without the random seed"
        );
        let first = steps.iter().position(|s| s.change.to_string().contains("EFI/")).unwrap();
        assert!(
            steps[first..].iter().all(|s| s.change == Change::Barrier || s.change.to_string().contains("EFI/")),
            "{steps:#?}"
        );
    }

    #[test]
    fn f18_an_entry_without_its_kernel_goes_before_the_kernel_comes() {
        let disks = Disks::new(
            &[("vmlinuz-linux", "2 new"), ("initramfs-linux.img", "2 new"), (ENTRY, FIXED)],
            &[("initramfs-linux.img", "1 old"), (ENTRY, FIXED), ("whole", "1"), ("loader/entries/b.conf", "linux /whole\n")],
        );
        let steps: Vec<Change> = disks.plan().into_iter().map(|step| step.change).collect();
        assert_eq!(steps[..2], [Change::Remove(ENTRY.into()), Change::Barrier], "{steps:#?}");
    }

    #[test]
    fn f19_leftovers_go_first() {
        let left = ".dualroot-0-linux";
        let disks = Disks::new(&[("linux", "1"), (ENTRY, "linux /linux\n")], &[(left, "1")]);
        let steps: Vec<Change> = disks.sync().into_iter().map(|step| step.change).collect();
        assert_eq!(steps[..2], [Change::Remove(left.into()), Change::Barrier], "{steps:#?}");
        // Something boots by it.
        let disks =
            Disks::new(&[("linux", "1"), (ENTRY, "linux /linux\n")], &[(left, "1"), (ENTRY, "linux /.dualroot-0-linux\n")]);
        let removed = Change::Remove(left.into());
        let steps: Vec<Change> = disks.plan().into_iter().map(|step| step.change).collect();
        assert!(steps.iter().position(|step| *step == removed) > Some(2), "{steps:#?}");
    }

    #[test]
    fn f19_a_whole_unified_image_boots_meanwhile() {
        let disks = Disks::new(
            &[("EFI/Linux/a.efi", "1"), ("EFI/Linux/b.efi", "2")],
            &[("EFI/Linux/a.efi", "1"), ("EFI/Linux/c.efi", "3")],
        );
        let spare = disks.scan("spare");
        let wanted =
            wanted_files(&disks.scan("source"), &disks.tmp.path().join("source"), &spare, |_, text| text.to_vec()).unwrap();
        let plan = |path: &str| {
            let wanted = wanted.iter().filter(|w| w.path == path).cloned().collect();
            plan_for_little_room(&[BootPartition { role: Role::Esp, wanted, spare: &spare, known: &disks.known }]).unwrap()
        };
        assert!(plan("EFI/Linux/a.efi").is_some() && plan("EFI/Linux/b.efi").is_none());
    }

    #[test]
    fn f18_the_firmware_s_fallback_is_the_last_boot_loader() {
        let files = |n: &'static str| {
            [("EFI/BOOT/BOOTX64.EFI", n), ("EFI/systemd/systemd-bootx64.efi", n), ("linux", "1"), (ENTRY, "linux /linux\n")]
        };
        for spare in [&files("1 old")[..], &[]] {
            let steps = Disks::new(&files("2 new"), spare).sync();
            let at = |dir: &str| {
                let writes = |s: &Step| matches!(&s.change, Change::Replace { path, .. } if path.starts_with(dir));
                steps.iter().position(writes).unwrap()
            };
            assert!(at("EFI/systemd/") < at("EFI/BOOT/"), "{steps:#?}");
        }
    }

    #[test]
    fn f04_files_that_did_not_come_from_the_booted_disk_stay() {
        let disks = Disks::new(
            &[("linux", "1"), (ENTRY, "linux /linux\n"), ("EFI/BOOT/BOOTX64.EFI", "sd")],
            &[
                ("EFI/Microsoft/Boot/bootmgfw.efi", "w"),
                ("notes.txt", "n"),
                ("loader/random-seed", "r"),
                ("loader/entries/b.conf", "linux /b\n"),
                ("b", "1"),
            ],
        );
        disks.sync();
        assert_eq!(
            disks.on_spare(),
            ["efi/boot/bootx64.efi", "efi/microsoft/boot/bootmgfw.efi", "linux", ENTRY, "loader/random-seed", "notes.txt"],
            "an entry that the booted disk lacks is removed, with the files that only it needed"
        );
    }

    #[test]
    fn f10_an_interrupted_sync_is_completed_from_any_step() {
        let files = |n: &'static str| [("vmlinuz-linux", n), ("initramfs-linux.img", n), (ENTRY, FIXED)];
        let count = Disks::new(&files("2 new"), &files("1 old")).plan().len();
        for stop in 0..count {
            let disks = Disks::new(&files("2 new"), &files("1 old"));
            for step in disks.plan().iter().take(stop) {
                disks.below("spare").apply(&step.change).unwrap();
            }
            disks.sync();
            assert_eq!(disks.on_spare(), ["initramfs-linux.img", ENTRY, "vmlinuz-linux"], "stopped after {stop} steps");
            assert!(disks.scan("spare").temporary.is_empty(), "stopped after {stop} steps");
        }
    }

    #[test]
    fn f25_boot_counters_in_use_are_not_copied() {
        for (source, spare, expected) in [
            (&["a+0-3"][..], &[][..], &[][..]),
            (&["a+2-1"], &[], &[]),
            (&["a+3"], &[], &["a+3"]),
            (&["a+3"], &["a+2-1"], &["a+2-1"]),
            (&["a"], &["a+2-1"], &["a"]),
            (&["a+3"], &["a"], &["a"]),
        ] {
            let path = |n: &&str| format!("loader/entries/{n}.conf");
            let list = |names: &[&str]| names.iter().map(path).collect::<Vec<_>>();
            let (source, spare) = (list(source), list(spare));
            let with = |paths: &'_ [String]| -> Vec<(String, String)> {
                paths.iter().map(|p| (p.clone(), "linux /linux\n".to_owned())).chain([("linux".into(), "1".into())]).collect()
            };
            let (source_files, spare_files) = (with(&source), with(&spare));
            let borrow = |files: &'static [(String, String)]| -> Vec<(&str, &str)> {
                files.iter().map(|(a, b)| (a.as_str(), b.as_str())).collect()
            };
            let disks = Disks::new(&borrow(source_files.leak()), &borrow(spare_files.leak()));
            disks.sync();
            let entries: Vec<String> = disks.scan("spare").of(Class::Entry).map(|f| f.path.clone()).collect();
            assert_eq!(entries, list(expected), "{source:?} onto {spare:?}");
        }
    }

    #[test]
    fn f26_entries_that_differ_only_in_counters_are_both_copied() {
        let (one, two) = ("loader/entries/a+3.conf", "loader/entries/a+4.conf");
        let disks = Disks::new(&[(one, "linux /linux\n"), (two, "linux /linux\n"), ("linux", "1")], &[]);
        disks.sync();
        assert_eq!(disks.on_spare(), ["linux", one, two]);
    }

    #[test]
    fn f19_missing_space_is_known_before_writing() {
        let files = |n: &'static str| [("vmlinuz-linux", n), ("initramfs-linux.img", n), (ENTRY, FIXED)];
        let disks = Disks::new(&files("2"), &files("1"));
        let (steps, spare) = (disks.plan(), disks.scan("spare"));
        // At most two staged files and a second copy of the entry, of a cluster each, exist at the same time.
        assert_eq!(shortfall(&steps, &Role::Esp, &spare, 3 * 4096, 4096), 0);
        assert_eq!(shortfall(&steps, &Role::Esp, &spare, 4096, 4096), 2 * 4096);
    }

    #[test]
    fn f19_unneeded_files_are_removed_first_if_space_is_short() {
        let of = |n: &str| [format!("t/{n}/linux"), format!("loader/entries/{n}.conf"), format!("linux /t/{n}/linux\n")];
        let ([l1, e1, t1], [l2, e2, t2], [l3, e3, t3]) = (of("1"), of("2"), of("3"));
        let mut disks =
            Disks::new(&[(&l2, "2"), (&e2, &t2), (&l3, "3"), (&e3, &t3)], &[(&l1, "1"), (&e1, &t1), (&l2, "2"), (&e2, &t2)]);
        disks.known.insert(l1.clone());
        let spare = disks.scan("spare");
        let wanted =
            wanted_files(&disks.scan("source"), &disks.tmp.path().join("source"), &spare, |_, text| text.to_vec()).unwrap();
        let part = |wanted: &[WantedFile]| BootPartition {
            role: Role::Esp,
            wanted: wanted.to_vec(),
            spare: &spare,
            known: &disks.known,
        };
        // Added are a directory, a kernel and an entry; removed are as many.
        let short = |steps: &[Step]| shortfall(steps, &Role::Esp, &spare, 4096, 4096);
        assert!(short(&plan(&[part(&wanted)]).unwrap()) > 0);
        let steps = plan_for_little_room(&[part(&wanted)]).unwrap().unwrap();
        assert_eq!(short(&steps), 0, "{steps:#?}");
        for step in &steps {
            disks.below("spare").apply(&step.change).unwrap();
            disks.check(&format!("after {step:?}"));
            assert!(disks.on_spare().contains(&e2), "there is always an entry");
        }
        assert_eq!(disks.plan(), []);
        // If the disks have no entry in common, there is none to boot meanwhile.
        let new: Vec<WantedFile> = wanted.into_iter().filter(|w| w.path.contains('3')).collect();
        assert!(plan_for_little_room(&[part(&new)]).unwrap().is_none());
    }

    #[test]
    fn f26_a_directory_that_was_removed_for_space_is_made_again() {
        let mut disks = Disks::new(
            &[("linux", "1"), (ENTRY, "linux /linux\n"), ("t/2/new", "2")],
            &[("linux", "1"), (ENTRY, "linux /linux\n"), ("t/2/old", "1")],
        );
        disks.known.insert("t/2/old".to_owned());
        let spare = disks.scan("spare");
        let wanted =
            wanted_files(&disks.scan("source"), &disks.tmp.path().join("source"), &spare, |_, text| text.to_vec()).unwrap();
        let part = BootPartition { role: Role::Esp, wanted, spare: &spare, known: &disks.known };
        for step in plan_for_little_room(&[part]).unwrap().unwrap() {
            disks.below("spare").apply(&step.change).unwrap();
        }
        assert_eq!(disks.on_spare(), ["linux", ENTRY, "t/2/new"]);
    }

    #[test]
    fn entries_change_in_place_within_a_sector() {
        assert!(matches!(text_change("a", None, b"x\n"), Change::Replace { content: Content::Bytes(b), .. } if b.len() == 512));
        let changed = text_change("a", Some(512), b"y\n");
        assert!(matches!(changed, Change::Overwrite { bytes, .. } if bytes.len() == 512 && bytes.starts_with(b"y\n\n")));
        assert!(matches!(text_change("a", Some(3), b"longer\n"), Change::Replace { .. }));
        assert!(matches!(text_change("a", Some(1024), b"y\n"), Change::Replace { .. }));
    }
}
