//! The files of a root that name disks or partitions.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::base::root::Root;
use crate::base::types::DirPath;
use crate::names::generation::Generation;
use crate::names::ident::Rewriter;
use crate::names::{fstab, unitfile};
use crate::write::below::{Below, is_link};
use crate::write::change::{Change, Content};

/// Single files that may name disks; see also [`DIRECTORIES`], and [`unitfile`] for units.
pub(crate) const FILES: [&str; 6] =
    ["/etc/fstab", "/etc/crypttab", "/etc/crypttab.initramfs", "/etc/kernel/cmdline", "/etc/dracut.conf", "/etc/default/grub"];

/// Directories in which every file may name disks.
pub(crate) const DIRECTORIES: [&str; 4] =
    ["/etc/kernel/cmdline.d", "/etc/cmdline.d", "/etc/dracut.conf.d", "/etc/initramfs-tools/conf.d"];

/// A file that every system has; a new file gets its owner and mode, so that everybody may read it.
pub(crate) const MODEL_FILE: &str = "/etc/os-release";

/// The paths, or their beginnings, of files that hold a kernel command line and nothing else.
pub(crate) const COMMAND_LINES: [&str; 3] = ["/etc/kernel/cmdline", "/etc/kernel/cmdline.d/", "/etc/cmdline.d/"];

/// A file of the booted root with its content for another disk.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Rewritten {
    /// Its path in the running system.
    pub path: String,
    /// Its content for the other disk.
    pub bytes: Vec<u8>,
}

/// The files below `root` that have to be rewritten for the rewriter's target. Left alone are lines of fstab, and mount units, whose mount
/// point `keep` accepts, because they name another disk on purpose; and units whose file name contains an identifier (the proof reports
/// them). With a generation, kernel command lines boot that generation.
///
/// # Errors
/// A file exists but can't be read.
pub fn rewritten(
    root: &Root,
    rewriter: &Rewriter,
    generation: Option<Generation>,
    keep: impl Fn(&DirPath) -> bool,
) -> Result<Vec<Rewritten>> {
    let mut found = Vec::new();
    for path in identifying_files(root)? {
        if unitfile::mount_point(&path).is_some_and(|dir| keep(&dir))
            || !unitfile::foreign_ids_in_name(&path, rewriter).is_empty()
        {
            continue;
        }
        let Some(old) = root.read_opt(&path).with_context(|| format!("{path} can't be read"))? else { continue };
        let bytes = match (path.as_str(), generation) {
            ("/etc/fstab", None) => fstab::rewrite(&old, rewriter, &keep),
            ("/etc/fstab", Some(_)) => fstab::without_subvolume_options(&fstab::rewrite(&old, rewriter, &keep)),
            (path, Some(generation)) if COMMAND_LINES.iter().any(|start| path.starts_with(start)) => {
                generation.command_line(&rewriter.rewrite(&old))
            }
            _ => rewriter.rewrite(&old),
        };
        if bytes != old {
            found.push(Rewritten { path, bytes });
        }
    }
    Ok(found)
}

/// The paths of all existing files of a root that may name a disk.
///
/// # Errors
/// A directory can't be read.
pub fn identifying_files(root: &Root) -> Result<Vec<String>> {
    let mut paths: Vec<String> = FILES.iter().filter(|p| root.path(p).is_file()).map(|p| (*p).to_owned()).collect();
    for dir in DIRECTORIES {
        for name in root.names(dir).with_context(|| format!("{dir} can't be read"))? {
            if let Some(name) = name.to_str() {
                let path = format!("{dir}/{name}");
                if root.path(&path).is_file() {
                    paths.push(path);
                }
            }
        }
    }
    paths.extend(unitfile::files(root).context("the units in /etc/systemd/system can't be read")?);
    Ok(paths)
}

/// The contents of [`identifying_files`] by path, with those of `drafts` in place of the files that they will replace.
///
/// # Errors
/// A file exists but can't be read.
pub fn identifying_texts(root: &Root, drafts: &[Rewritten]) -> Result<BTreeMap<String, Vec<u8>>> {
    let mut texts = BTreeMap::new();
    for path in identifying_files(root)? {
        let draft = drafts.iter().find(|draft| draft.path == path).map(|draft| draft.bytes.clone());
        let text = draft.map_or_else(|| root.read_opt(&path), |bytes| Ok(Some(bytes)));
        if let Some(text) = text.with_context(|| format!("{path} can't be read"))? {
            texts.insert(path, text);
        }
    }
    Ok(texts)
}

/// The symbolic links ("LINK -> TARGET") on the paths of files that may name a disk, and of `others`: writing there would write elsewhere, or
/// replace the link. Not counted are links to /dev/null, which say that the file doesn't exist, and links among units, which are usual
/// and are never written through.
///
/// # Errors
/// A directory can't be read.
pub fn symlinks(root: &Root, others: &[&str]) -> Result<Vec<String>> {
    let mut found = BTreeSet::new();
    let mut paths: Vec<PathBuf> = FILES.iter().chain(others).map(PathBuf::from).collect();
    for dir in DIRECTORIES {
        match first_link(root, Path::new(dir))? {
            Some(link) => {
                found.insert(link);
            }
            None => {
                let names = root.names(dir).with_context(|| format!("{dir} can't be read"))?;
                paths.extend(names.into_iter().map(|name| Path::new(dir).join(name)));
            }
        }
    }
    for path in paths {
        found.extend(first_link(root, &path)?);
    }
    Ok(found.into_iter().collect())
}

/// The first symbolic link on the way to a path, as "LINK -> TARGET"; None if there is none, or it leads to /dev/null.
pub(crate) fn first_link(root: &Root, path: &Path) -> Result<Option<String>> {
    let mut steps: Vec<&Path> = path.ancestors().filter(|step| *step != Path::new("/")).collect();
    steps.reverse();
    for step in steps {
        let place = root.path(step);
        match std::fs::symlink_metadata(&place) {
            Ok(meta) if meta.is_symlink() => {
                let to = std::fs::read_link(&place).with_context(|| place.display().to_string())?;
                let shown = format!("{} -> {}", step.display(), to.display().to_string().escape_debug());
                return Ok(Some(shown).filter(|_| to != Path::new("/dev/null")));
            }
            Ok(_) => {}
            // Missing, or below a file that isn't a directory.
            Err(_) => return Ok(None),
        }
    }
    Ok(None)
}

impl Rewritten {
    /// The change that writes this file, with owner, mode and attributes of the booted disk's file. It is for a handle of the
    /// directory `dir`: `""` for the root, or `/etc`, which contains all of these files.
    pub fn change(&self, dir: &str, root: &Root) -> Change {
        Change::Replace {
            path: self.path.strip_prefix(dir).unwrap_or(&self.path).trim_start_matches('/').to_owned(),
            content: Content::Bytes(self.bytes.clone()),
            like: Some(
                [self.path.as_str(), MODEL_FILE].map(|path| root.path(path)).into_iter().find(|p| p.exists()).unwrap_or_default(),
            ),
        }
    }

    /// Whether a root holds this file with this content already. A symbolic link in its place, such as that of a masked unit, doesn't
    /// count.
    ///
    /// # Errors
    /// Those of reading from the root.
    pub fn is_in(&self, root: &Below) -> Result<bool> {
        Ok(!self.is_link_in(root)? && root.read(self.inner())?.as_ref() == Some(&self.bytes))
    }

    /// Writes this file to a root, as [`Rewritten::change`], unless it is there already.
    ///
    /// # Errors
    /// Those of writing to the root.
    pub fn write(&self, root: &Below, booted: &Root) -> Result<()> {
        if self.is_in(root)? {
            return Ok(());
        }
        if self.is_link_in(root)? {
            // A file replaces the link, and the change then gives it its attributes.
            root.publish(self.inner(), self.bytes.clone())?;
        }
        root.apply(&self.change("", booted))
    }

    fn is_link_in(&self, root: &Below) -> Result<bool> {
        Ok(root.stat(self.inner().as_ref())?.is_some_and(|stat| is_link(&stat)))
    }

    fn inner(&self) -> &str {
        self.path.trim_start_matches('/')
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::names::ident::tests::{ROOT_A, ROOT_B, to_b};

    /// dualroot-entries.service can't write anywhere else on the root.
    #[test]
    fn files_that_name_a_disk_are_in_etc() {
        let root = Root::new("/");
        for path in FILES.iter().chain(&DIRECTORIES) {
            let file = Rewritten { path: (*path).to_owned(), bytes: vec![] };
            let inner = path.strip_prefix("/etc/").unwrap();
            for (dir, expected) in [("", format!("etc/{inner}")), ("/etc", inner.to_owned())] {
                assert!(matches!(file.change(dir, &root), Change::Replace { path, .. } if path == expected), "{path}");
            }
        }
    }

    fn unit(uuid: &str) -> String {
        format!("[Mount]\nWhat=/dev/disk/by-uuid/{uuid}\nWhere=/x\n")
    }

    #[test]
    fn f14_units_are_rewritten_except_links_and_those_for_another_disk() {
        let tmp = tempfile::tempdir().unwrap();
        let root = Root::new(tmp.path());
        let units = tmp.path().join("etc/systemd/system");
        for dir in ["home.mount.d", "x.service.d", "local-fs.target.wants", "elsewhere"] {
            fs::create_dir_all(units.join(dir)).unwrap();
        }
        let swap = format!("dev-disk-by\\x2duuid-{}.swap", ROOT_A.replace('-', "\\x2d"));
        let files = [
            "dev-zram0.swap",
            "home.mount",
            "home.mount.d/a.conf",
            "mnt-root1.mount",
            "srv-my\\x2ddata.mount",
            &swap,
            "home.automount",
            "home.mount.d/notes",
            "x.service",
            "x.service.d/a.conf",
            "elsewhere/a.conf",
        ];
        for name in files {
            fs::write(units.join(name), unit(ROOT_A)).unwrap();
        }
        for (link, to) in [
            ("masked.mount", "/dev/null"),
            ("alias.mount", "home.mount"),
            ("gone.swap", "/x"),
            ("local-fs.target.wants/home.mount", "../home.mount"),
            ("x.mount.d", "elsewhere"),
            ("loop.mount.d", "loop.mount.d"),
            ("home.mount.d/b.conf", "a.conf"),
        ] {
            symlink(to, units.join(link)).unwrap();
        }
        let mut paths: Vec<String> = files[..6].iter().map(|name| format!("/etc/systemd/system/{name}")).collect();
        paths.sort();
        let mut found = identifying_files(&root).unwrap();
        found.sort();
        assert_eq!(found, paths);
        assert_eq!(symlinks(&root, &[]).unwrap(), [""; 0]);
        let spares = DirPath::parse("/mnt/root1").unwrap();
        let new = rewritten(&root, &to_b(), None, |dir| dir.is_within(&spares)).unwrap();
        paths.retain(|path| !path.contains("root1") && !path.contains("uuid"));
        assert_eq!(new.iter().map(|file| &file.path).collect::<BTreeSet<_>>(), paths.iter().collect());
        assert!(new.iter().all(|file| file.bytes == unit(ROOT_B).into_bytes()), "{new:?}");
        // As where the whole configuration is made by something else.
        fs::rename(&units, tmp.path().join("etc/static")).unwrap();
        symlink("../static", &units).unwrap();
        assert_eq!(identifying_files(&root).unwrap(), [""; 0]);
    }

    #[test]
    fn f14_a_file_replaces_the_link_of_a_masked_unit() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let path = "etc/systemd/system/home.mount";
        for dir in [from.path(), to.path()] {
            fs::create_dir_all(dir.join(path).parent().unwrap()).unwrap();
        }
        fs::write(from.path().join(path), unit(ROOT_A)).unwrap();
        symlink("/dev/null", to.path().join(path)).unwrap();
        let file = Rewritten { path: format!("/{path}"), bytes: unit(ROOT_B).into_bytes() };
        let (root, below) = (Root::new(from.path()), Below::open(to.path()).unwrap());
        for _ in 0..2 {
            file.write(&below, &root).unwrap();
            assert!(file.is_in(&below).unwrap());
            assert_eq!(below.read(path).unwrap(), Some(file.bytes.clone()));
        }
        fs::remove_file(to.path().join(path)).unwrap();
        file.write(&below, &root).unwrap();
        assert!(file.is_in(&below).unwrap());
    }

    #[test]
    fn links_on_the_way_to_files_that_name_disks_are_found() {
        let tmp = tempfile::tempdir().unwrap();
        let root = Root::new(tmp.path());
        for dir in ["etc/dracut.conf.d", "etc/default", "usr/etc"] {
            fs::create_dir_all(tmp.path().join(dir)).unwrap();
        }
        fs::write(tmp.path().join("etc/crypttab"), "").unwrap();
        fs::write(tmp.path().join("etc/dracut.conf.d/a.conf"), "").unwrap();
        symlink("/dev/null", tmp.path().join("etc/dracut.conf.d/masked.conf")).unwrap();
        assert_eq!(symlinks(&root, &["/etc/hostname"]).unwrap(), [""; 0]);
        for (link, to) in [
            ("etc/hostname", "x"),
            ("etc/fstab", "/usr/etc/fstab"),
            ("etc/dracut.conf.d/b.conf", "a.conf"),
            ("etc/kernel", "../usr/kernel"),
        ] {
            symlink(to, tmp.path().join(link)).unwrap();
        }
        let expected = [
            "/etc/dracut.conf.d/b.conf -> a.conf",
            "/etc/fstab -> /usr/etc/fstab",
            "/etc/hostname -> x",
            "/etc/kernel -> ../usr/kernel",
        ];
        assert_eq!(symlinks(&root, &["/etc/hostname"]).unwrap(), expected);
    }
}
