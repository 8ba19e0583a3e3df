//! The files of a root that name disks.

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

/// Files that name disks. Those of the first list stand alone; of the second, every file in the directory counts. Units come besides, see
/// [`unitfile`].
pub(crate) const FILES: [&str; 6] =
    ["/etc/fstab", "/etc/crypttab", "/etc/crypttab.initramfs", "/etc/kernel/cmdline", "/etc/dracut.conf", "/etc/default/grub"];

pub(crate) const DIRECTORIES: [&str; 4] =
    ["/etc/kernel/cmdline.d", "/etc/cmdline.d", "/etc/dracut.conf.d", "/etc/initramfs-tools/conf.d"];

/// Every system has this one. A file that isn't there yet becomes like it: everybody may read it.
pub(crate) const USUAL: &str = "/etc/os-release";

/// Those that hold a kernel's command line, and nothing else.
pub(crate) const COMMAND_LINES: [&str; 3] = ["/etc/kernel/cmdline", "/etc/kernel/cmdline.d/", "/etc/cmdline.d/"];

/// A file of the booted root that is another one for another disk.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Rewritten {
    /// Its path in the running system.
    pub path: String,
    /// What it is to hold.
    pub bytes: Vec<u8>,
}

/// The files below `root` that name a disk other than the rewriter's target, as they have to be for the target. Lines of fstab and mount
/// units whose mount point `keep` names are about another disk on purpose, and stay; so do units that are called after what they name,
/// which the proof finds. With a generation, kernel command lines name that.
///
/// # Errors
/// A file that is there but can't be read.
pub fn rewritten(
    root: &Root,
    rewriter: &Rewriter,
    generation: Option<Generation>,
    keep: impl Fn(&DirPath) -> bool,
) -> Result<Vec<Rewritten>> {
    let mut found = Vec::new();
    for path in identifying_files(root)? {
        if unitfile::dir(&path).is_some_and(|dir| keep(&dir)) || !unitfile::named_after(&path, rewriter).is_empty() {
            continue;
        }
        let Some(old) = root.read_opt(&path).with_context(|| format!("{path} can't be read"))? else { continue };
        let bytes = match (path.as_str(), generation) {
            ("/etc/fstab", None) => fstab::rewrite(&old, rewriter, &keep),
            ("/etc/fstab", Some(_)) => fstab::any_subvolume(&fstab::rewrite(&old, rewriter, &keep)),
            (path, Some(generation)) if COMMAND_LINES.iter().any(|start| path.starts_with(start)) => {
                generation.boot(&rewriter.rewrite(&old))
            }
            _ => rewriter.rewrite(&old),
        };
        if bytes != old {
            found.push(Rewritten { path, bytes });
        }
    }
    Ok(found)
}

/// The paths of all files of a root that may name a disk and are there.
///
/// # Errors
/// A directory that can't be read.
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
    paths.extend(unitfile::files(root).context("units can't be read")?);
    Ok(paths)
}

/// What [`identifying_files`] hold, by their paths, once what is drafted is written.
///
/// # Errors
/// A file that is there but can't be read.
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

/// The files of a root that may name a disk, and these others, that lead through a symbolic link, as the link and where it leads: what is
/// written there would be written elsewhere, or stand in its place. A link to /dev/null is none: it says that there is no such file.
/// Nor are links among units: there they are usual, and what they lead to is not written.
///
/// # Errors
/// A directory that can't be read.
pub fn links(root: &Root, others: &[&str]) -> Result<Vec<String>> {
    let mut found = BTreeSet::new();
    let mut paths: Vec<PathBuf> = FILES.iter().chain(others).map(PathBuf::from).collect();
    for dir in DIRECTORIES {
        match link_on(root, Path::new(dir))? {
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
        found.extend(link_on(root, &path)?);
    }
    Ok(found.into_iter().collect())
}

/// The first link on the way to a path, and what it says.
pub(crate) fn link_on(root: &Root, path: &Path) -> Result<Option<String>> {
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
            // Or a file where a directory was looked for.
            Err(_) => return Ok(None),
        }
    }
    Ok(None)
}

impl Rewritten {
    /// The change that puts it on a disk, with owner, mode and attributes of the booted disk's file. The handle is that of the
    /// directory `dir`: `""` for the root, or `/etc`, which all of them are in.
    pub fn change(&self, dir: &str, root: &Root) -> Change {
        Change::Replace {
            path: self.path.strip_prefix(dir).unwrap_or(&self.path).trim_start_matches('/').to_owned(),
            content: Content::Bytes(self.bytes.clone()),
            like: Some(
                [self.path.as_str(), USUAL].map(|path| root.path(path)).into_iter().find(|p| p.exists()).unwrap_or_default(),
            ),
        }
    }

    /// Whether a root has it already. A link in its place, such as that of a unit that was masked, is something else.
    ///
    /// # Errors
    /// Those of reading there.
    pub fn is_in(&self, root: &Below) -> Result<bool> {
        Ok(!self.is_link_in(root)? && root.read(self.inner())?.as_ref() == Some(&self.bytes))
    }

    /// Writes it to a root that hasn't got it, as a [`Rewritten::change`] of the file of the booted root.
    ///
    /// # Errors
    /// Those of writing there.
    pub fn write(&self, root: &Below, booted: &Root) -> Result<()> {
        if self.is_in(root)? {
            return Ok(());
        }
        if self.is_link_in(root)? {
            // It gives way to a file, which then gets its attributes.
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

    /// dualroot-entries.service can write nowhere else on the root.
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
    fn f14_units_are_rewritten_but_for_links_and_what_is_about_another_disk() {
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
        assert_eq!(links(&root, &[]).unwrap(), [""; 0]);
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
    fn f14_a_unit_that_was_masked_becomes_one() {
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
    fn links_in_the_place_of_files_that_name_disks_are_found() {
        let tmp = tempfile::tempdir().unwrap();
        let root = Root::new(tmp.path());
        for dir in ["etc/dracut.conf.d", "etc/default", "usr/etc"] {
            fs::create_dir_all(tmp.path().join(dir)).unwrap();
        }
        fs::write(tmp.path().join("etc/crypttab"), "").unwrap();
        fs::write(tmp.path().join("etc/dracut.conf.d/a.conf"), "").unwrap();
        symlink("/dev/null", tmp.path().join("etc/dracut.conf.d/masked.conf")).unwrap();
        assert_eq!(links(&root, &["/etc/hostname"]).unwrap(), [""; 0]);
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
        assert_eq!(links(&root, &["/etc/hostname"]).unwrap(), expected);
    }
}
