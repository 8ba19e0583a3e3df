//! What lies on a boot partition (ESP or XBOOTLDR), and what each file is for.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Result, bail};

use crate::write::below::{Below, Kind, is_temporary};

/// Where an ESP says which boots its disk has seen; see [`crate::pair::lineage`]. In a directory that isn't watched: writing it is no change
/// that a spare has to follow.
pub const LINEAGE: &str = "EFI/dualroot/lineage";

/// What a file on a boot partition is for; its class decides when in a sync it is written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Class {
    /// A boot loader entry of type 1 (UAPI.1), `loader/entries/*.conf`.
    Entry,
    /// A unified kernel image in `EFI/Linux`: entry and payload in one (an entry of type 2).
    Uki,
    /// `loader/loader.conf`.
    LoaderConf,
    /// A boot loader, or any other EFI program.
    Loader,
    /// Whatever entries refer to, and everything else.
    Payload,
    /// What never travels: the random seed, which the boot loader rewrites at every boot and which no two disks may share, and the
    /// disk's lineage.
    Local,
}

impl Class {
    /// Whether such a file is an item of the boot loader's menu.
    pub fn is_bootable(self) -> bool {
        matches!(self, Self::Entry | Self::Uki)
    }
}

/// The class of a file by its path below the partition. FAT ignores case, and so does this.
pub fn classify(path: &str) -> Class {
    let path = fold(path);
    let efi = path.ends_with(".efi");
    match path.as_str() {
        "loader/random-seed" => Class::Local,
        p if p == fold(LINEAGE) => Class::Local,
        "loader/loader.conf" => Class::LoaderConf,
        p if p.strip_prefix("loader/entries/").is_some_and(|f| f.ends_with(".conf") && !f.contains('/')) => Class::Entry,
        p if efi && p.strip_prefix("efi/linux/").is_some_and(|f| !f.contains('/')) => Class::Uki,
        p if efi && p.starts_with("efi/") => Class::Loader,
        _ => Class::Payload,
    }
}

/// The form in which FAT compares names; used on every file system, as a boot partition may be FAT on one disk only.
pub fn fold(path: &str) -> String {
    path.to_lowercase()
}

/// A file on a boot partition.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BootFile {
    /// Its path below the partition, as written there.
    pub path: String,
    /// Its size in bytes.
    pub size: u64,
    /// The BLAKE3 hash of its content: sizes and times don't tell a changed initrd (failure mode 11).
    pub hash: blake3::Hash,
    /// The content itself, of entries and loader.conf.
    pub text: Option<Vec<u8>>,
}

/// All of a boot partition but what is left from interrupted syncs.
#[derive(Clone, Default, Debug)]
pub struct BootFiles {
    /// By [`fold`]ed path.
    pub files: BTreeMap<String, BootFile>,
    /// Directories, as written.
    pub dirs: BTreeSet<String>,
    /// Temporary files of ours, with their sizes and hashes: an interrupted sync may have left an entry pointing at one. And what
    /// fsck.fat made of them: on the booted disk that is nothing to copy, and on a spare it would fill the partition, cut by cut.
    pub temporary: BTreeMap<String, BootFile>,
}

impl BootFiles {
    /// Reads a whole boot partition, contents and all.
    ///
    /// # Errors
    /// Those of reading; a name with a control character, or two names that differ only in case; directories nested too deeply.
    pub fn scan(below: &Below) -> Result<Self> {
        let mut found = Self::default();
        found.scan_dir(below, "", 0)?;
        Ok(found)
    }

    fn scan_dir(&mut self, below: &Below, dir: &str, depth: u8) -> Result<()> {
        if depth > 16 {
            bail!("{dir}: directories are nested more than 16 deep; is the file system damaged?");
        }
        for (name, kind) in below.list(if dir.is_empty() { "." } else { dir })? {
            let path = if dir.is_empty() { name.clone() } else { format!("{dir}/{name}") };
            check(&path)?;
            match kind {
                Kind::Dir if dir.is_empty() && matches!(name.as_str(), "lost+found" | "System Volume Information") => {}
                Kind::Dir => {
                    self.add_dir(&path)?;
                    self.scan_dir(below, &path, depth + 1)?;
                }
                Kind::File(size) => {
                    let class = classify(&path);
                    let text = if matches!(class, Class::Entry | Class::LoaderConf) { below.read(&path)? } else { None };
                    // A file that is gone again by now was never there.
                    let Some(hash) = below.hash(&path)? else { continue };
                    self.add(BootFile { path, size, hash, text })?;
                }
                Kind::Other => {}
            }
        }
        Ok(())
    }

    /// Takes in a directory, by its path.
    ///
    /// # Errors
    /// A path with names that no boot partition has.
    pub fn add_dir(&mut self, path: &str) -> Result<()> {
        check(path)?;
        self.dirs.insert(path.to_owned());
        Ok(())
    }

    /// Takes in a file.
    ///
    /// # Errors
    /// A path with names that no boot partition has, or that differs only in case from another one.
    pub fn add(&mut self, file: BootFile) -> Result<()> {
        check(&file.path)?;
        let key = fold(&file.path);
        if is_temporary(file.path.rsplit('/').next().unwrap_or_default()) {
            self.temporary.insert(key, file);
        } else if let Some(twin) = self.files.get(&key) {
            bail!("{} and {} differ only in case, which FAT can't hold; rename one", twin.path, file.path);
        } else {
            self.files.insert(key, file);
        }
        Ok(())
    }

    /// The files of one class.
    pub fn of(&self, class: Class) -> impl Iterator<Item = &BootFile> {
        self.files.values().filter(move |f| classify(&f.path) == class)
    }
}

/// Whatever a damaged directory lists, no path leads out of the partition, or is more than one line in a message.
fn check(path: &str) -> Result<()> {
    let is_odd = |name: &str| matches!(name, "" | "." | "..") || name.contains('\\') || name.chars().any(char::is_control);
    if path.split('/').any(is_odd) {
        bail!("'{}' is no name for a boot file; is the file system damaged?", path.escape_debug());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn f26_names_that_lead_elsewhere_are_refused() {
        let mut files = BootFiles::default();
        for path in ["../linux", "a/../linux", "/linux", "a//linux", "a/./b", "", "a/", "a\\b", "a\u{1b}"] {
            let file = BootFile { path: path.to_owned(), size: 0, hash: blake3::hash(b""), text: None };
            assert!(files.add(file).is_err() && files.add_dir(path).is_err(), "{path}");
        }
        assert!(files.files.is_empty() && files.dirs.is_empty());
    }

    #[test]
    fn classes() {
        for (path, class) in [
            ("loader/entries/a.conf", Class::Entry),
            ("LOADER/ENTRIES/A.CONF", Class::Entry),
            ("loader/entries/a.conf.bak", Class::Payload),
            ("loader/random-seed", Class::Local),
            ("loader/loader.conf", Class::LoaderConf),
            ("EFI/Linux/arch.efi", Class::Uki),
            ("EFI/systemd/systemd-bootx64.efi", Class::Loader),
            ("EFI/BOOT/BOOTX64.EFI", Class::Loader),
            ("vmlinuz-linux", Class::Payload),
        ] {
            assert_eq!(classify(path), class, "{path}");
        }
    }

    #[test]
    fn scan_finds_files_directories_and_leftovers() {
        let tmp = tempfile::tempdir().unwrap();
        fs::create_dir_all(tmp.path().join("loader/entries")).unwrap();
        fs::write(tmp.path().join("loader/entries/a.conf"), "title a\n").unwrap();
        fs::write(tmp.path().join("linux"), "kernel").unwrap();
        for other in ["FSCK0000.recovery", "fsck1.rec"] {
            fs::write(tmp.path().join(other), "").unwrap();
        }
        fs::write(tmp.path().join(".dualroot-linux"), "ker").unwrap();
        for left in ["DUALRO~1.NEW", "FSCK0000.REC", "loader/entries/fsck0001.000"] {
            fs::write(tmp.path().join(left), "ker").unwrap();
        }
        let found = BootFiles::scan(&Below::open(tmp.path()).unwrap()).unwrap();
        assert_eq!(found.files.keys().collect::<Vec<_>>(), ["fsck0000.recovery", "fsck1.rec", "linux", "loader/entries/a.conf"]);
        assert_eq!(found.files["loader/entries/a.conf"].text.as_deref(), Some(&b"title a\n"[..]));
        assert_eq!(found.files["linux"].hash, blake3::hash(b"kernel"));
        assert_eq!(found.temporary.len(), 4);
        assert_eq!(found.dirs.len(), 2);
    }

    #[test]
    fn f26_names_that_fat_cannot_hold_are_refused() {
        let tmp = tempfile::tempdir().unwrap();
        fs::write(tmp.path().join("Linux"), "1").unwrap();
        fs::write(tmp.path().join("linux"), "2").unwrap();
        let error = BootFiles::scan(&Below::open(tmp.path()).unwrap()).unwrap_err();
        assert!(error.to_string().contains("differ only in case"), "{error}");
        fs::remove_file(tmp.path().join("Linux")).unwrap();
        fs::write(tmp.path().join("a\nb"), "3").unwrap();
        assert!(BootFiles::scan(&Below::open(tmp.path()).unwrap()).is_err());
    }
}
