//! Copying root trees with rsync(1), and the files in them that name a disk.

use std::ffi::OsString;
use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::Stdio;

use anyhow::{Context, Result, bail};

use crate::below::{Below, Change, Content};
use crate::fstab;
use crate::ident::Rewriter;
use crate::program;
use crate::root::Root;
use crate::types::{DirPath, Role};

/// What is never copied, as rsync filter rules by the path in the running system. Rules of `exclude=` come between the first part
/// and the second, so that they can bring something of the second back.
const ALWAYS: [&str; 9] = [
    "- /mnt/root[0-9]*/",
    "- /dev/*",
    "- /proc/*",
    "- /sys/*",
    "- /run/*",
    "- /tmp/*",
    "- /lost+found",
    "- /var/lib/systemd/random-seed",
    "- .dualroot-*",
];
const USUALLY: [&str; 9] = [
    "- /var/cache/apt/*.bin",
    "- /var/cache/apt/archives/*.deb",
    "- /var/cache/apt/archives/partial/*",
    "- /var/cache/pacman/pkg/*",
    "- /var/cache/dnf/*",
    "- /var/cache/libdnf5/*",
    "- /var/cache/zypp/*",
    "- /var/tmp/systemd-private-*",
    "- /var/lib/systemd/coredump/*",
];
/// Kernel modules of the spare's old kernels stay until its boot partitions don't need them any more.
const UNTIL_THE_END: [&str; 2] = ["P /usr/lib/modules/*", "P /lib/modules/*"];

/// Files that name disks. Those of the first list stand alone; of the second, every file in the directory counts.
const FILES: [&str; 6] =
    ["/etc/fstab", "/etc/crypttab", "/etc/crypttab.initramfs", "/etc/kernel/cmdline", "/etc/dracut.conf", "/etc/default/grub"];
const DIRECTORIES: [&str; 4] = ["/etc/kernel/cmdline.d", "/etc/cmdline.d", "/etc/dracut.conf.d", "/etc/initramfs-tools/conf.d"];

/// A file of the booted root that is another one for another disk.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Rewritten {
    /// Its path in the running system.
    pub path: String,
    /// What it is to hold.
    pub bytes: Vec<u8>,
}

/// The files below `root` that name a disk other than the rewriter's target, as they have to be for the target. Lines of fstab whose
/// mount point `keep` names are about another disk on purpose, and stay.
///
/// # Errors
/// A file that is there but can't be read.
pub fn rewritten(root: &Root, rewriter: &Rewriter, keep: impl Fn(&DirPath) -> bool) -> Result<Vec<Rewritten>> {
    let mut found = Vec::new();
    for path in identifying_files(root)? {
        let Some(old) = root.read_opt(&path).with_context(|| format!("{path} can't be read"))? else { continue };
        let bytes = match path.as_str() {
            "/etc/fstab" => fstab_for(&old, rewriter, &keep),
            _ => rewriter.rewrite(&old),
        };
        if bytes != old {
            found.push(Rewritten { path, bytes });
        }
    }
    Ok(found)
}

fn fstab_for(old: &[u8], rewriter: &Rewriter, keep: impl Fn(&DirPath) -> bool) -> Vec<u8> {
    fstab::rewrite(old, rewriter, keep)
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
    Ok(paths)
}

impl Rewritten {
    /// The change that puts it on a disk whose root is the handle, with owner, mode and attributes of the booted disk's file.
    pub fn change(&self, root: &Root) -> Change {
        Change::Replace {
            path: self.path.trim_start_matches('/').to_owned(),
            content: Content::Bytes(self.bytes.clone()),
            like: Some(root.path(&self.path)),
        }
    }
}

/// A tree that is copied: the root, or a partition that is mounted below it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Tree {
    /// What it is.
    pub role: Role,
    /// Where it is mounted in the running system: `""` for the root, `/home` and so on.
    pub at: String,
    /// Where it is copied from, if not from there.
    pub from: Option<PathBuf>,
    /// rsync's filter rules.
    pub rules: Vec<String>,
}

impl Tree {
    /// The tree of a role, with the rules that hold in it; None for roles that aren't copied by rsync.
    /// `exclude` are rules of the configuration, and `apart` paths of files that are written separately.
    pub fn new(role: &Role, exclude: &[String], apart: &[Rewritten]) -> Option<Self> {
        let at = role.tree()?;
        let apart = apart.iter().map(|file| format!("- {}", escape(&file.path)));
        let user = exclude.iter().map(|rule| if has_prefix(rule) { rule.clone() } else { format!("- {rule}") });
        let strings = |rules: &[&str]| rules.iter().map(|r| (*r).to_owned()).collect::<Vec<_>>();
        let all = strings(&ALWAYS).into_iter().chain(apart).chain(user).chain(strings(&USUALLY)).chain(strings(&UNTIL_THE_END));
        let rules = all.filter_map(|rule| reanchor(&rule, at)).collect();
        Some(Self { role: role.clone(), at: at.to_owned(), from: None, rules })
    }

    /// Where the tree is copied from, with a slash behind it.
    pub fn source(&self) -> PathBuf {
        let at = PathBuf::from(format!("{}/", self.at));
        self.from.as_ref().map_or(at, |from| from.join(""))
    }

    /// rsync's arguments, for two runs. In the first, files are transferred under temporary names (`--delay-updates`) and then renamed.
    /// Symbolic links are not delayed by that, and would lead to files that have not got their names yet; they, and the removal of what
    /// the source doesn't have, are left to the second run, which also finds what has changed meanwhile.
    pub fn arguments(&self) -> [Vec<OsString>; 2] {
        [self.run(&["--no-links"]), self.run(&["--delete-after"])]
    }

    fn run(&self, special: &[&str]) -> Vec<OsString> {
        let mut args: Vec<OsString> = [
            "--archive",
            "--hard-links",
            "--acls",
            "--xattrs",
            "--numeric-ids",
            "--sparse",
            "--one-file-system",
            "--delay-updates",
            "--force",
            // What a transfer that was cut has staged: never copied, and removed with what the source doesn't have.
            "--filter=H .~tmp~/",
            "--filter=R .~tmp~/",
        ]
        .map(Into::into)
        .into();
        args.extend(special.iter().map(Into::into));
        args.extend(self.rules.iter().map(|rule| format!("--filter={rule}").into()));
        args.push(self.source().into());
        args.push("./".into());
        args
    }

    /// Copies the tree to below the handle.
    ///
    /// # Errors
    /// What rsync couldn't read or write; its messages are in the error. A source file that vanished meanwhile is none.
    pub fn copy(&self, target: &Below) -> Result<()> {
        for run in self.arguments() {
            rsync(run, target).with_context(|| format!("the copy of {}", self.source().display()))?;
        }
        Ok(())
    }
}

/// Makes the modules directory of the spare's tree that of the booted disk, old kernels' modules gone.
///
/// # Errors
/// As [`Tree::copy`].
pub fn drop_old_modules(tree: &Tree, target: &Below) -> Result<()> {
    for dir in ["/usr/lib/modules", "/lib/modules"] {
        let Some(inner) = dir.strip_prefix(tree.at.as_str()).and_then(|d| d.strip_prefix('/')) else { continue };
        let source = tree.source().join(inner);
        if source.canonicalize().is_ok_and(|real| real == source) {
            let mut args: Vec<OsString> = ["-aHAX", "--numeric-ids", "--one-file-system", "--delete"].map(Into::into).into();
            args.push(source.join("").into());
            args.push(format!("./{inner}/").into());
            rsync(args, target).with_context(|| format!("the removal of old kernels' modules from {dir}"))?;
        }
    }
    Ok(())
}

/// Exit status of rsync when source files vanished before they could be transferred (rsync(1), EXIT VALUES).
const VANISHED: i32 = 24;

fn rsync(args: Vec<OsString>, target: &Below) -> Result<()> {
    let mut command = program::command("rsync")?;
    if std::io::stdout().is_terminal() {
        command.arg("--info=progress2").stdout(Stdio::inherit());
    } else {
        command.stdout(Stdio::null());
    }
    // The child changes to the directory by our handle, before it becomes rsync: no path can lead it elsewhere.
    let done = command.args(args).current_dir(target.proc_path()).stderr(Stdio::piped()).spawn().context("rsync can't be run")?;
    let done = done.wait_with_output().context("rsync can't be waited for")?;
    match done.status.code() {
        Some(0 | VANISHED) => Ok(()),
        _ => {
            let said = String::from_utf8_lossy(&done.stderr);
            let said: Vec<&str> = said.lines().rev().take(8).collect();
            let said: Vec<&str> = said.into_iter().rev().collect();
            bail!("rsync failed ({}): {}", done.status, said.join("; "))
        }
    }
}

/// Whether a rule of `exclude=` is more than a pattern (rsync(1), FILTER RULES).
fn has_prefix(rule: &str) -> bool {
    rule.split_once(' ').is_some_and(|(op, _)| {
        let short = op.split(',').next().unwrap_or_default();
        matches!(short, "-" | "+" | "P" | "R" | "H" | "S" | "exclude" | "include" | "hide" | "show" | "protect" | "risk")
    })
}

/// A path as a pattern that means just it.
fn escape(path: &str) -> String {
    let mut out = String::new();
    for c in path.chars() {
        if matches!(c, '*' | '?' | '[' | ']' | '\\') {
            out.push('\\');
        }
        out.push(c);
    }
    out
}

/// A rule by the path in the running system, as a rule for the transfer of the tree mounted at `at`; None if it is about something
/// outside that tree.
fn reanchor(rule: &str, at: &str) -> Option<String> {
    let (op, pattern) = rule.split_once(' ')?;
    if at.is_empty() || !pattern.starts_with('/') {
        return Some(rule.to_owned());
    }
    let inner = pattern.strip_prefix(at).filter(|rest| rest.starts_with('/'))?;
    Some(format!("{op} {inner}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn rules_follow_the_tree() {
        assert_eq!(reanchor("- /var/cache/apt/*.bin", "").as_deref(), Some("- /var/cache/apt/*.bin"));
        assert_eq!(reanchor("- /var/cache/apt/*.bin", "/var").as_deref(), Some("- /cache/apt/*.bin"));
        assert_eq!(reanchor("- /various", "/var"), None);
        assert_eq!(reanchor("- /home/x", "/var"), None);
        assert_eq!(reanchor("- *.tmp", "/var").as_deref(), Some("- *.tmp"));
        let tree = Tree::new(&Role::Var, &["/var/spool/x/".into(), "+ /var/cache/dnf/keep".into()], &[]).unwrap();
        assert!(tree.rules.contains(&"- /spool/x/".to_owned()), "{:?}", tree.rules);
        let at = |rule: &str| tree.rules.iter().position(|r| r == rule).unwrap();
        assert!(at("+ /cache/dnf/keep") < at("- /cache/dnf/*"), "the configuration comes before what is usual");
        assert!(Tree::new(&Role::Swap, &[], &[]).is_none() && Tree::new(&Role::Esp, &[], &[]).is_none());
    }

    fn copy(from: &std::path::Path, to: &std::path::Path, exclude: &[String], apart: &[Rewritten]) {
        let mut tree = Tree::new(&Role::Root, exclude, apart).unwrap();
        tree.at = from.to_str().unwrap().to_owned();
        tree.copy(&Below::open(to).unwrap()).unwrap();
    }

    #[test]
    fn a_tree_is_copied_without_what_is_excluded_and_old_modules_stay() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let write = |dir: &std::path::Path, path: &str| {
            fs::create_dir_all(dir.join(path).parent().unwrap()).unwrap();
            fs::write(dir.join(path), path).unwrap();
        };
        for path in ["etc/fstab", "etc/hosts", "mnt/root1/x", "mnt/rootless/x", "tmp/x", "usr/lib/modules/2/m", "opt/no/x", "a"] {
            write(from.path(), path);
        }
        fs::hard_link(from.path().join("a"), from.path().join("b")).unwrap();
        for path in ["etc/fstab", "gone", "usr/lib/modules/1/m", "mnt/root1/kept"] {
            write(to.path(), path);
        }
        fs::write(to.path().join("etc/fstab"), "of the spare").unwrap();
        let apart = [Rewritten { path: "/etc/fstab".into(), bytes: vec![] }];
        copy(from.path(), to.path(), &["/opt/no".into()], &apart);
        let has = |path: &str| to.path().join(path).exists();
        assert!(has("etc/hosts") && has("mnt/rootless/x") && has("usr/lib/modules/2/m") && has("tmp"));
        assert!(has("usr/lib/modules/1/m"), "modules of the old kernel stay for now");
        assert!(!has("gone") && !has("tmp/x") && !has("opt/no") && !has("mnt/root1/x"));
        assert!(has("mnt/root1/kept"), "what is excluded isn't deleted either");
        assert_eq!(fs::read(to.path().join("etc/fstab")).unwrap(), b"of the spare");
        let inode = |path: &str| std::os::unix::fs::MetadataExt::ino(&fs::metadata(to.path().join(path)).unwrap());
        assert_eq!(inode("a"), inode("b"), "hard links stay hard links");
    }

    #[test]
    fn f18_links_change_after_what_they_lead_to() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        for (dir, name) in [(&from, "lib.2"), (&to, "lib.1")] {
            fs::write(dir.path().join(name), name).unwrap();
            std::os::unix::fs::symlink(name, dir.path().join("lib")).unwrap();
        }
        let mut tree = Tree::new(&Role::Root, &[], &[]).unwrap();
        tree.at = from.path().to_str().unwrap().to_owned();
        let below = Below::open(to.path()).unwrap();
        let [first, second] = tree.arguments();
        rsync(first, &below).unwrap();
        assert_eq!(fs::read(to.path().join("lib")).unwrap(), b"lib.1", "old, and whole");
        assert_eq!(fs::read(to.path().join("lib.2")).unwrap(), b"lib.2");
        rsync(second, &below).unwrap();
        assert_eq!(fs::read(to.path().join("lib")).unwrap(), b"lib.2");
        assert!(!to.path().join("lib.1").exists());
    }

    #[test]
    fn f21_what_a_cut_transfer_has_staged_is_removed_and_not_copied() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        for path in [from.path().join("etc/.~tmp~"), to.path().join("etc/.~tmp~")] {
            fs::create_dir_all(&path).unwrap();
            fs::write(path.join("large"), "staged, and gone from the source since").unwrap();
        }
        fs::write(from.path().join("etc/hosts"), "new").unwrap();
        copy(from.path(), to.path(), &[], &[]);
        assert!(to.path().join("etc/hosts").exists() && !to.path().join("etc/.~tmp~").exists());
    }

    #[test]
    fn what_is_mounted_in_a_tree_is_not_copied_and_what_is_below_it_is() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let tmp = tempfile::tempdir().unwrap();
        let path = |name: &str| tmp.path().join(name);
        for (name, text) in
            [("from/mnt/below", "b"), ("from/home/x", "x"), ("from/usr/lib/modules/2/m", "m"), ("to/usr/lib/modules/1/m", "m")]
        {
            fs::create_dir_all(path(name).parent().unwrap()).unwrap();
            fs::write(path(name), text).unwrap();
        }
        fs::create_dir(path("from/again")).unwrap();
        crate::mounts::enter_private_namespace().unwrap();
        let bind = |from: &str, to: &str| {
            use nix::mount::{MsFlags, mount};
            mount(Some(&path(from)), &path(to), None::<&str>, MsFlags::MS_BIND, None::<&str>).unwrap();
        };
        bind("from/home", "from/again");
        bind("from/home", "from/mnt");
        let alone = crate::mounts::Alone::open(&path("from"), &path("alone")).unwrap();
        let mut tree = Tree::new(&Role::Root, &[], &[]).unwrap();
        tree.from = Some(alone.place().to_owned());
        let below = Below::open(&path("to")).unwrap();
        tree.copy(&below).unwrap();
        assert!(path("to/mnt/below").exists() && !path("to/mnt/x").exists() && !path("to/again/x").exists());
        assert!(path("to/home/x").exists() && path("to/usr/lib/modules/1/m").exists());
        drop_old_modules(&tree, &below).unwrap();
        assert!(path("to/usr/lib/modules/2/m").exists() && !path("to/usr/lib/modules/1").exists());
        assert!(fs::write(alone.place().join("new"), "").is_err(), "nothing is written to the booted disk by it");
    }

    #[test]
    fn f22_a_failed_copy_is_an_error() {
        let to = tempfile::tempdir().unwrap();
        let mut tree = Tree::new(&Role::Root, &[], &[]).unwrap();
        tree.at = "/nonexistent-source".into();
        let error = format!("{:#}", tree.copy(&Below::open(to.path()).unwrap()).unwrap_err());
        assert!(error.contains("rsync failed") && error.contains("/nonexistent-source"), "{error}");
    }
}
