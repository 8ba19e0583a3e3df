//! Adding a disk to /etc/dualroot.conf; every other line stays as it is.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use anyhow::{Context, Result};

use crate::base::refusal::refused;
use crate::base::root::Root;
use crate::base::types::{DiskName, PartUuid, Role};
use crate::conf::Config;

/// The file that is written.
pub const FILE: &str = "/etc/dualroot.conf";

/// A configuration that isn't in force yet.
#[derive(Clone, Debug)]
pub struct Draft {
    /// The new text of [`FILE`].
    pub text: Vec<u8>,
    /// The configuration that this text and the other files make.
    pub config: Config,
}

/// The partitions that a section names.
pub type Section = BTreeMap<Role, PartUuid>;

/// Drafts the configuration with these partitions for `name`: a new section at the end, or new values in the section that is there.
/// Where there is no configuration yet, `first` is the section of the booted disk, which is written before, with `luks=` in front.
///
/// # Errors
/// A refusal where the files, changed in this way, don't give these partitions: the user has to edit them.
pub fn draft(
    root: &Root,
    first: Option<&(DiskName, Section)>,
    name: DiskName,
    section: &Section,
    luks: &BTreeSet<Role>,
) -> Result<Draft> {
    let sources = Config::sources(root)?;
    let at = sources.iter().find(|(file, _)| file == FILE);
    let old = at.map(|(_, text)| text.clone()).unwrap_or_default();
    let by_hand = || {
        format!(
            "{FILE} can't be changed line by line; write every disk's section there and nowhere else, one key a line, and run this again; \
             nothing was done"
        )
    };
    let old = String::from_utf8(old).ok().with_context(|| refused(format!("{FILE} is not UTF-8; {}", by_hand())))?;
    let text = match has_section(&old, name) {
        true => replace_values(&old, name, section),
        false => append_section(&old, first, name, section, luks),
    };
    // A main file in /etc would hide the one that is in force.
    if at.is_none() && sources.iter().any(|(file, _)| !file.contains(".conf.d/")) {
        return Err(refused(by_hand()));
    }
    let rest = sources.into_iter().filter(|(file, _)| file != FILE);
    let sources: Vec<_> = std::iter::once((FILE.to_owned(), text.clone().into_bytes())).chain(rest).collect();
    let config = Config::parse(&sources).map_err(|e| refused(format!("{e:#}; {}", by_hand())))?;
    let config = config.with_context(|| refused(by_hand()))?;
    if let Some(role) = luks.symmetric_difference(&config.settings.luks).next() {
        return Err(refused(format!(
            "{role}= {}; luks= in the configuration has to name exactly the LUKS containers; correct it, see dualroot.conf(5); nothing was \
             done",
            if luks.contains(role) {
                "is a LUKS container, but luks= does not name it"
            } else {
                "is no LUKS container, but luks= names it"
            }
        )));
    }
    match config.disks.iter().find(|disk| disk.name == name).is_some_and(|disk| disk.parts == *section) {
        true => Ok(Draft { text: text.into_bytes(), config }),
        false => Err(refused(by_hand())),
    }
}

/// The lowest name that no disk has. Where nothing is configured, the booted disk is disk0.
///
/// # Errors
/// A thousand disks.
pub fn free_name(config: Option<&Config>) -> Result<DiskName> {
    let taken = match config {
        Some(config) => config.disks.iter().map(|disk| disk.name).collect(),
        None => vec![DiskName::first_free(&[])?],
    };
    DiskName::first_free(&taken)
}

fn section_text(name: DiskName, section: &Section) -> String {
    let mut text = format!("[{name}]\n");
    // In the usual order: boot partitions first.
    let boot = section.iter().filter(|(role, _)| role.is_boot());
    for (role, partuuid) in boot.chain(section.iter().filter(|(role, _)| !role.is_boot())) {
        let _ = writeln!(text, "{role}={partuuid}");
    }
    text
}

fn append_section(
    old: &str,
    first: Option<&(DiskName, Section)>,
    name: DiskName,
    section: &Section,
    luks: &BTreeSet<Role>,
) -> String {
    let mut text = old.to_owned();
    if !text.is_empty() {
        text.push_str(if text.ends_with('\n') { "\n" } else { "\n\n" });
    }
    if let Some((booted, its)) = first {
        if !luks.is_empty() {
            let keys: Vec<&str> = luks.iter().map(Role::key).collect();
            let _ = writeln!(text, "[dualroot]\nluks={}\n", keys.join(" "));
        }
        text += &section_text(*booted, its);
        text.push('\n');
    }
    text + &section_text(name, section)
}

/// The name of the section that begins with this line, if one does.
fn section_of(line: &str) -> Option<&str> {
    line.trim().strip_prefix('[')?.strip_suffix(']').map(str::trim)
}

fn has_section(text: &str, name: DiskName) -> bool {
    text.lines().any(|line| section_of(line) == Some(&name.to_string()))
}

fn replace_values(old: &str, name: DiskName, section: &Section) -> String {
    let name = name.to_string();
    let mut inside = false;
    let mut text = String::new();
    for line in old.split_inclusive('\n') {
        if let Some(begun) = section_of(line) {
            inside = begun == name;
        }
        let role = |key: &str| section.iter().find(|(role, _)| role.key() == key.trim()).map(|(_, partuuid)| partuuid);
        match line.split_once('=').filter(|_| inside).and_then(|(key, value)| Some((key, value, role(key)?))) {
            Some((key, value, partuuid)) => {
                let blank = value.len() - value.trim_start_matches([' ', '\t']).len();
                let end = if value.ends_with('\n') { "\n" } else { "" };
                let _ = write!(text, "{key}={}{partuuid}{end}", value.get(..blank).unwrap_or_default());
            }
            None => text.push_str(line),
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::base::refusal::Refused;

    fn id(n: u32) -> PartUuid {
        PartUuid::parse(&format!("{n:08}-0000-4000-8000-000000000000")).unwrap()
    }

    fn section(n: u32) -> Section {
        [(Role::Esp, id(n)), (Role::Root, id(n + 1))].into()
    }

    fn disk(n: u32) -> DiskName {
        DiskName::parse(&format!("disk{n}")).unwrap()
    }

    fn with(files: &[(&str, &str)]) -> (tempfile::TempDir, Root) {
        let tmp = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = tmp.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let root = Root::new(tmp.path());
        (tmp, root)
    }

    fn text(root: &Root, first: bool, n: u32) -> Result<String> {
        text_with(root, first, n, &[])
    }

    fn text_with(root: &Root, first: bool, n: u32, luks: &[Role]) -> Result<String> {
        let booted = (disk(0), section(0));
        let draft = draft(root, first.then_some(&booted), disk(n), &section(10), &luks.iter().cloned().collect())?;
        Ok(String::from_utf8(draft.text).unwrap())
    }

    #[test]
    fn a_first_configuration() {
        let (_tmp, root) = with(&[]);
        let expected = format!("[disk0]\nesp={}\nroot={}\n\n[disk1]\nesp={}\nroot={}\n", id(0), id(1), id(10), id(11));
        assert_eq!(text(&root, true, 1).unwrap(), expected);
        // A file without disks stays as it is.
        let (_tmp, root) = with(&[("etc/dualroot.conf", "# Nothing yet.\n[dualroot]\nsettle=1")]);
        assert_eq!(text(&root, true, 1).unwrap(), format!("# Nothing yet.\n[dualroot]\nsettle=1\n\n{expected}"));
        assert_eq!((free_name(None).unwrap(), disk(1)), (disk(1), disk(1)));
    }

    #[test]
    fn luks_containers_are_named_in_the_configuration() {
        let (_tmp, root) = with(&[]);
        let found = text_with(&root, true, 1, &[Role::Root]).unwrap();
        assert!(found.starts_with(&format!("[dualroot]\nluks=root\n\n[disk0]\nesp={}\n", id(0))), "{found}");
        let pair = format!("[disk0]\nesp={}\nroot={}\n[disk1]\nesp={}\nroot={}\n", id(0), id(1), id(2), id(3));
        for (text, luks, expected) in [
            (pair.clone(), &[Role::Root][..], "root= is a LUKS container, but luks= does not name it"),
            (format!("{pair}[dualroot]\nluks=root\n"), &[], "root= is no LUKS container, but luks= names it"),
        ] {
            let (_tmp, root) = with(&[("etc/dualroot.conf", &text)]);
            let error = text_with(&root, false, 1, luks).unwrap_err();
            assert!(error.is::<Refused>() && error.to_string().contains(expected), "{error:#}");
        }
    }

    #[test]
    fn lines_stay_as_they_are() {
        let pair = format!(
            "# The pair.\n[disk0]\nesp={}\nroot = {}\n\n[disk1]\n title=[1]\nesp=  {}\n; the root\nroot={}",
            id(0),
            id(1),
            id(2),
            id(3)
        );
        let (_tmp, root) = with(&[("etc/dualroot.conf", &pair)]);
        let new = pair.replace(&id(2).to_string(), &id(10).to_string()).replace(&id(3).to_string(), &id(11).to_string());
        assert_eq!(text(&root, false, 1).unwrap(), new);
        let third = format!("{pair}\n\n[disk2]\nesp={}\nroot={}\n", id(10), id(11));
        assert_eq!(text(&root, false, 2).unwrap(), third);
        let config = Config::load(&root).unwrap();
        assert_eq!(free_name(config.as_ref()).unwrap(), disk(2));
    }

    #[test]
    fn files_that_would_need_guessing_are_refused() {
        let pair = format!("[disk0]\nesp={}\nroot={}\n[disk1]\nesp={}\nroot={}\n", id(0), id(1), id(2), id(3));
        let elsewhere = [("usr/lib/dualroot.conf", pair.as_str())];
        let later = [
            ("etc/dualroot.conf", pair.as_str()),
            ("etc/dualroot.conf.d/a.conf", "[disk1]\nesp=00000077-0000-4000-8000-000000000000\n"),
        ];
        let continued = pair.replace(&format!("root={}\n", id(3)), &format!("root=\\\n{}\n", id(3)));
        let more = format!("{pair}home={}\n", id(4)).replace("[disk1]", &format!("home={}\n[disk1]", id(5)));
        for files in [&elsewhere[..], &later, &[("etc/dualroot.conf", &continued)], &[("etc/dualroot.conf", &more)]] {
            let (_tmp, root) = with(files);
            let error = text(&root, false, 1).unwrap_err();
            assert!(
                error.is::<Refused>() && error.to_string().contains("write every disk's section there"),
                "{files:?}: {error:#}"
            );
        }
    }
}
