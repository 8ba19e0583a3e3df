//! The files on a boot partition (ESP or XBOOTLDR), and the class of each.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Result, bail};

use crate::write::below::{Below, FileKind, is_temporary};

/// The file on an ESP that records the boots of its disk, see [`crate::pair::lineage`]. Its directory isn't watched, because writing it needs
/// no sync.
pub const LINEAGE: &str = "EFI/dualroot/lineage";

/// The class of a file on a boot partition; it decides when a sync writes the file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Class {
    /// A menu entry of type 1 (UAPI.1), `loader/entries/*.conf`.
    Entry,
    /// A unified kernel image in `EFI/Linux`: a menu entry of type 2 with its payload.
    Uki,
    /// `loader/loader.conf`.
    LoaderConf,
    /// A boot loader, or any other EFI program.
    Loader,
    /// A file that entries refer to, or any other file.
    Payload,
    /// A file that is never copied: the disk's lineage, and the random seed, which the boot loader rewrites at every boot and which no two
    /// disks may share.
    Local,
}

impl Class {
    /// Whether such a file is an item of the boot loader's menu.
    pub fn is_bootable(self) -> bool {
        matches!(self, Self::Entry | Self::Uki)
    }
}

/// The class of a file by its path below the partition, ignoring case as FAT does.
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

/// A path in lower case, to compare paths as FAT does; used for every file system, because a boot partition may be FAT on one disk only.
pub fn fold(path: &str) -> String {
    path.to_lowercase()
}

/// A file on a boot partition.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BootFile {
    /// Its path below the partition, in its original case.
    pub path: String,
    /// Its size in bytes.
    pub size: u64,
    /// The BLAKE3 hash of its content: size and time may be the same for a changed initrd (failure mode 11).
    pub hash: blake3::Hash,
    /// The content of an entry or loader.conf; None for other files.
    pub text: Option<Vec<u8>>,
}

/// The files on a boot partition.
#[derive(Clone, Default, Debug)]
pub struct BootFiles {
    /// Files by [`fold`]ed path, without temporary ones.
    pub files: BTreeMap<String, BootFile>,
    /// Directories, in their original case.
    pub dirs: BTreeSet<String>,
    /// Temporary files of interrupted syncs, by folded path: an entry may refer to one. Also files that fsck.fat made of them, which are not
    /// copied, and which would fill a spare's partition after many power cuts.
    pub temporary: BTreeMap<String, BootFile>,
}

impl BootFiles {
    /// Reads a whole boot partition, with the contents of all files.
    ///
    /// # Errors
    /// Those of reading; an invalid name, two names that differ only in case, or directories nested too deeply.
    pub fn scan(below: &Below) -> Result<Self> {
        let mut found = Self::default();
        found.scan_dir(below, "", 0)?;
        Ok(found)
    }

    fn scan_dir(&mut self, below: &Below, dir: &str, depth: u8) -> Result<()> {
        if depth > 16 {
            bail!("{dir}: directories are nested more than 16 deep; the file system may be damaged. Check it with fsck(8)");
        }
        for (name, kind) in below.list(if dir.is_empty() { "." } else { dir })? {
            let path = if dir.is_empty() { name.clone() } else { format!("{dir}/{name}") };
            check(&path)?;
            match kind {
                FileKind::Dir if dir.is_empty() && matches!(name.as_str(), "lost+found" | "System Volume Information") => {}
                FileKind::Dir => {
                    self.add_dir(&path)?;
                    self.scan_dir(below, &path, depth + 1)?;
                }
                FileKind::File(size) => {
                    let class = classify(&path);
                    let text = if matches!(class, Class::Entry | Class::LoaderConf) { below.read(&path)? } else { None };
                    // A file that has been removed since the listing is left out.
                    let Some(hash) = below.hash(&path)? else { continue };
                    self.add(BootFile { path, size, hash, text })?;
                }
                FileKind::Other => {}
            }
        }
        Ok(())
    }

    /// Adds a directory by its path.
    ///
    /// # Errors
    /// The path contains an invalid name.
    pub fn add_dir(&mut self, path: &str) -> Result<()> {
        check(path)?;
        self.dirs.insert(path.to_owned());
        Ok(())
    }

    /// Adds a file.
    ///
    /// # Errors
    /// The path contains an invalid name, or differs only in case from another one.
    pub fn add(&mut self, file: BootFile) -> Result<()> {
        check(&file.path)?;
        let key = fold(&file.path);
        if is_temporary(file.path.rsplit('/').next().unwrap_or_default()) {
            self.temporary.insert(key, file);
        } else if let Some(twin) = self.files.get(&key) {
            bail!("{} and {} differ only in case, and FAT can't hold both. Rename one", twin.path, file.path);
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

/// Checks that a path doesn't lead out of the partition, and is one line in a message, even if a damaged directory lists it.
fn check(path: &str) -> Result<()> {
    let is_odd = |name: &str| matches!(name, "" | "." | "..") || name.contains('\\') || name.chars().any(char::is_control);
    if path.split('/').any(is_odd) {
        bail!(
            "'{}' is not a valid name for a boot file; the file system may be damaged. Check it with fsck(8)",
            path.escape_debug()
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn f26_paths_that_lead_out_of_the_partition_are_refused() {
        let mut files = BootFiles::default();
        for path in ["../linux", "a/../linux", "/linux", "a//linux", "a/./b", "", "a/", "a\\b", "a\u{1b}"] {
            let file = BootFile { path: path.to_owned(), size: 0, hash: blake3::hash(b""), text: None };
            assert!(files.add(file).is_err() && files.add_dir(path).is_err(), "{path}");
        }
        assert!(files.files.is_empty() && files.dirs.is_empty());
    }

    #[test]
    fn classes_follow_from_paths() {
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
