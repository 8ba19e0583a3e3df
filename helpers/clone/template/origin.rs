//! A template's place, and its properties, which are read before a disk is erased.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use serde::de::DeserializeOwned;
use uuid::Uuid;

use crate::base::program;
use crate::base::progress::Progress;
use crate::base::refusal::{nothing_done, refused};
use crate::base::root::Root;
use crate::base::types::Role;
use crate::boot::files::classify;
use crate::clone::template::identity::{self, HOST_NAME, MACHINE_ID};
use crate::copy::rsync;
use crate::devices::gpt::{self, DiskLayout};
use crate::names::ids::DiskIds;
use crate::write::below::Below;
use crate::write::state;

const RUN: &str = "/run/dualroot";
/// A directory for files of a template on another machine, while they are read.
const PLACE: &str = "/run/dualroot/template";

/// dualroot's own records in a template: see [`gpt`] and [`crate::names::idstore`].
const LAYOUT: &str = "/var/lib/dualroot/layout.json";
const IDENTIFIERS: &str = "/var/lib/dualroot/identifiers.json";

/// The environment variables by which ssh(1) finds keys.
const FOR_SSH: [&str; 2] = ["SSH_AUTH_SOCK", "HOME"];

/// No shared connection: one that stays open (ControlPersist) is a process whose working directory is on the new disk.
const SSH: &str = "--rsh=ssh -oControlMaster=no -oControlPath=none";

/// The place of a template: a tree that rsync(1) has made of a system.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Origin {
    /// In a directory of this machine.
    Here(PathBuf),
    /// In a directory of another machine, which ssh(1) reaches.
    There {
        /// The host, as ssh(1) takes it, perhaps with a user in front.
        host: String,
        /// The directory.
        dir: String,
    },
}

impl Origin {
    /// Reads `DIR`, or `HOST:DIR` where a colon comes before the first slash, as rsync(1) does.
    ///
    /// # Errors
    /// A host without a directory, or one that would be an option; rsync's daemons.
    pub fn parse(text: &str) -> Result<Self> {
        // The colons of an address are in brackets.
        let host = match (text.find('['), text.find("]:"), text.find(':')) {
            (Some(open), Some(close), Some(colon)) if open < colon => text.split_at_checked(close + 1),
            (_, _, Some(colon)) => text.split_at_checked(colon),
            _ => None,
        };
        let Some((host, dir)) = host.filter(|(host, _)| !host.contains('/')) else {
            return match text {
                "" => bail!("a template is a directory, or HOST:DIRECTORY"),
                dir => Ok(Self::Here(dir.into())),
            };
        };
        let dir = dir.strip_prefix(':').unwrap_or(dir);
        if dir.starts_with(':') || text.starts_with("rsync://") {
            bail!("'{}' is a template on an rsync daemon; only ssh is supported: HOST:DIRECTORY", text.escape_debug());
        }
        let is_odd = |c: char| c.is_control() || c.is_whitespace();
        // ssh gets the host without the user and without brackets.
        let name = host.rsplit('@').next().unwrap_or_default();
        let name = name.strip_prefix('[').unwrap_or(name).trim_end_matches(']');
        let is_option = host.starts_with('-') || name.starts_with('-');
        if name.is_empty() || dir.is_empty() || is_option || host.contains(is_odd) {
            bail!("'{}' is no template; name a directory, or HOST:DIRECTORY", text.escape_debug());
        }
        Ok(Self::There { host: host.to_owned(), dir: dir.to_owned() })
    }

    /// The origin with an absolute path, if it is on this machine.
    ///
    /// # Errors
    /// A refusal for a directory that isn't there.
    pub fn canonical(&self) -> Result<Self> {
        let Self::Here(dir) = self else { return Ok(self.clone()) };
        let found = dir.canonicalize().map_err(|e| refused(format!("the template {self}: {e}; nothing was done")))?;
        match found.is_dir() {
            true => Ok(Self::Here(found)),
            false => Err(refused(format!("the template {self} is no directory; nothing was done"))),
        }
    }

    /// rsync's arguments for copying the whole template to the working directory.
    fn arguments(&self, options: &[&str], rules: &[String]) -> Vec<OsString> {
        let remote: &[&str] = match self {
            Self::Here(_) => &[],
            // No shell on the other side interprets the name.
            Self::There { .. } => &[SSH, "--protect-args"],
        };
        let mut source = match self {
            Self::Here(dir) => dir.clone().into_os_string(),
            Self::There { host, dir } => format!("{host}:{dir}").into(),
        };
        source.push("/");
        let options = options.iter().chain(remote).map(OsString::from);
        let rules = rules.iter().map(|rule| format!("--filter={rule}").into());
        options.chain(rules).chain(["--".into(), source, "./".into()]).collect()
    }

    fn command(&self, options: &[&str], rules: &[String]) -> Result<Command> {
        let mut command = program::command("rsync")?;
        command.args(self.arguments(options, rules));
        if let Self::There { .. } = self {
            command.envs(FOR_SSH.iter().filter_map(|name| Some((name, std::env::var_os(name)?))));
        }
        Ok(command)
    }

    fn rsync(&self, options: &[&str], rules: &[String], output: Stdio, target: &Below) -> Result<Vec<u8>> {
        let mut command = self.command(options, rules)?;
        command.stdout(output);
        rsync::run_rsync(command, target).with_context(|| format!("the template {self}"))
    }

    /// Copies the template below a handle and what is mounted there, except for files that the rules exclude.
    ///
    /// # Errors
    /// As [`rsync::run_rsync`].
    pub(super) fn copy(&self, rules: &[String], progress: Option<Progress>, target: &Below) -> Result<()> {
        let options = ["--archive", "--hard-links", "--acls", "--xattrs", "--numeric-ids", "--sparse"];
        match progress {
            None => self.rsync(&options, rules, Stdio::null(), target).map(drop),
            Some(progress) => {
                let command = self.command(&[&options[..], &rsync::SHOWN[..]].concat(), rules)?;
                rsync::run_rsync_shown(command, target, progress).with_context(|| format!("the template {self}"))
            }
        }
    }

    /// Lists the files to copy, for each of these directories, such as `/home` or `""`. One inside another counts for itself.
    ///
    /// # Errors
    /// A refusal, where the template can't be read.
    pub fn list<'p>(&self, rules: &[String], places: &[&'p str]) -> Result<Listing<'p>> {
        let options = ["--dry-run", "--archive", "--hard-links", "--out-format=%i %l /%n"];
        let said = in_scratch_directory(|dir| self.rsync(&options, rules, Stdio::piped(), dir));
        Ok(Listing::parse(&said.map_err(nothing_done)?, places))
    }

    /// Reads the template's properties; `layout` is a file of layouts that is used instead of its own.
    ///
    /// # Errors
    /// A refusal, where the template can't be reached, or lacks something.
    pub fn about(&self, layout: Option<&Path>) -> Result<About> {
        if let Self::Here(dir) = self {
            return About::read(&Root::new(dir), self, layout);
        }
        let paths = ["/etc/", MACHINE_ID, HOST_NAME, "/var/", "/var/lib/", "/var/lib/dualroot/", LAYOUT, IDENTIFIERS];
        let rules: Vec<String> = paths.iter().map(|path| format!("+ {path}")).chain(["- *".to_owned()]).collect();
        in_scratch_directory(|dir| {
            let copied = self.rsync(&["--recursive", "--copy-links"], &rules, Stdio::null(), dir);
            copied.map_err(nothing_done)?;
            About::read(&Root::new(PLACE), self, layout)
        })
    }
}

/// Calls `act` with an empty directory, which is removed afterwards.
fn in_scratch_directory<T>(act: impl FnOnce(&Below) -> Result<T>) -> Result<T> {
    let run = state::open(Path::new(RUN))?;
    let name = PLACE.strip_prefix(RUN).unwrap_or_default().trim_start_matches('/').as_ref();
    run.clear(name)?;
    run.make_private(name)?;
    let done = act(&Below::open(Path::new(PLACE))?);
    run.clear(name)?;
    done
}

impl std::fmt::Display for Origin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Here(dir) => write!(f, "{}", dir.display()),
            Self::There { host, dir } => write!(f, "{host}:{dir}"),
        }
    }
}

/// A template's properties: the system that it was made of.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct About {
    /// The id of the machine.
    pub machine_id: Uuid,
    /// Its name.
    pub host_name: Option<String>,
    /// The layout of its disks.
    pub disk: DiskLayout,
    /// The names of its disks.
    pub ids: Vec<DiskIds>,
}

impl About {
    /// Reads them in the tree, or in a copy of some of its files; messages name the template as `shown`.
    fn read(root: &Root, shown: &Origin, layout: Option<&Path>) -> Result<Self> {
        let has = |path: &str| {
            let read = root.read_opt(path).map_err(|e| refused(format!("the template {shown}: {path} can't be read: {e}")))?;
            read.ok_or_else(|| refused(format!("the template {shown} has no {path}; {}", advice(path))))
        };
        let id = identity::machine_id(&has(MACHINE_ID)?);
        let machine_id = id.map_err(|e| refused(format!("the template {shown}: {MACHINE_ID}: {e}; {}", advice(MACHINE_ID))))?;
        let disks = match layout {
            Some(file) => gpt::load_all(file).map_err(|e| refused(format!("{e:#}")))?,
            None => parse(LAYOUT, &has(LAYOUT)?, shown)?,
        };
        let ids: Vec<DiskIds> = parse(IDENTIFIERS, &has(IDENTIFIERS)?, shown)?;
        if ids.is_empty() || !ids.iter().all(|disk| disk.parts.contains_key(&Role::Root)) {
            return Err(refused(format!(
                "the template {shown} is of a machine whose disks share one root ({IDENTIFIERS} names no root of a disk), and such a template \
                 can't be installed; nothing was done"
            )));
        }
        let host_name = root.read_opt(HOST_NAME).ok().flatten().and_then(|file| identity::host_name(&file));
        // The disks of a pair have the same partitions.
        let disk = disks.into_iter().next();
        let disk = disk.ok_or_else(|| refused(format!("the template {shown}: its layout has no disk; {}", advice(LAYOUT))))?;
        check(&disk).map_err(|e| {
            let file = layout.map_or_else(|| format!("the template {shown}: {LAYOUT}"), |file| file.display().to_string());
            refused(format!("{file}: {e:#}; {}", advice(LAYOUT)))
        })?;
        Ok(Self { machine_id, host_name, disk, ids })
    }
}

/// Checks a layout: it comes from another machine, and its texts go to sfdisk and mkfs.
fn check(disk: &DiskLayout) -> Result<()> {
    const LARGEST: u64 = 1 << 60;
    let mut roles = BTreeSet::new();
    for part in &disk.partitions {
        let of = format!("the partition {}", part.partuuid);
        if Uuid::try_parse(&part.kind).is_err() {
            bail!("{of} is of the type '{}', which is no GUID", part.kind.escape_debug());
        }
        let is_odd = |text: &str| text.contains(|c: char| c.is_control() || c == '"');
        let texts = [Some(&part.attributes), part.fstype.as_ref()];
        if let Some(text) = texts.into_iter().flatten().find(|text| is_odd(text)) {
            bail!("{of} has '{}' as an attribute or type, which can't have such characters", text.escape_debug());
        }
        if part.bytes > LARGEST {
            bail!("{of} has {} bytes, more than any disk", part.bytes);
        }
        if let Some(role) = part.role.as_ref().filter(|role| !roles.insert(*role)) {
            bail!("{of} is {role}=, and so is another one");
        }
    }
    Ok(())
}

fn parse<T: DeserializeOwned>(path: &str, bytes: &[u8], shown: &Origin) -> Result<T> {
    serde_json::from_slice(bytes)
        .map_err(|e| refused(format!("the template {shown}: {path} can't be understood ({e}); {}", advice(path))))
}

/// The remedy for a file of the template that is missing or can't be used.
fn advice(path: &str) -> &'static str {
    match path {
        LAYOUT => {
            "run dualroot-sync on the machine that it was made of, and make the template again, or give a layout with --layout; nothing was done"
        }
        IDENTIFIERS => "run dualroot-sync on the machine that it was made of, and make the template again; nothing was done",
        _ => "make the template again, of a whole system that was booted; nothing was done",
    }
}

/// The amount to copy.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Listing<'p> {
    /// The approximate bytes on a disk, by directory.
    pub bytes: BTreeMap<&'p str, u64>,
    /// The directories with a menu entry or a unified kernel image in the place where boot loaders search.
    pub boots: Vec<&'p str>,
    /// The bytes in all files together, each counted once.
    pub content: u64,
}

impl<'p> Listing<'p> {
    /// Parses lines of rsync's format `%i %l /%n`.
    fn parse(said: &[u8], places: &[&'p str]) -> Self {
        let mut found = Self::default();
        for line in String::from_utf8_lossy(said).lines() {
            let mut words = line.splitn(3, ' ');
            let (Some(item), Some(Ok(size)), Some(path)) = (words.next(), words.next().map(str::parse::<u64>), words.next())
            else {
                continue;
            };
            let below = |place: &&'p str| Some((*place, path.strip_prefix(*place)?.strip_prefix('/')?));
            let Some((place, inner)) = places.iter().filter_map(below).max_by_key(|(place, _)| place.len()) else { continue };
            if item.starts_with(">f") {
                found.content = found.content.saturating_add(size);
            }
            // Whole blocks, and an inode. Another name of a file needs neither.
            let room = if item.starts_with('h') { 0 } else { size.div_ceil(BLOCK).saturating_mul(BLOCK).saturating_add(INODE) };
            let bytes = found.bytes.entry(place).or_default();
            *bytes = bytes.saturating_add(room);
            if classify(inner).is_bootable() && !found.boots.contains(&place) {
                found.boots.push(place);
            }
        }
        found
    }
}

/// The usual unit of a file system's space, and its overhead for each file.
const BLOCK: u64 = 4096;
const INODE: u64 = 256;

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::{Read, Seek};

    use super::*;
    use crate::base::refusal::Refused;

    fn there(host: &str, dir: &str) -> Origin {
        Origin::There { host: host.to_owned(), dir: dir.to_owned() }
    }

    #[test]
    fn a_template_is_here_or_there() {
        for (text, expected) in [
            ("/srv/template", Origin::Here("/srv/template".into())),
            ("template", Origin::Here("template".into())),
            ("./a:b", Origin::Here("./a:b".into())),
            ("/a:b", Origin::Here("/a:b".into())),
            ("[a", Origin::Here("[a".into())),
            ("host:/srv/a:b", there("host", "/srv/a:b")),
            ("root@host:dir", there("root@host", "dir")),
            ("[fe80::1%eth0]:/srv", there("[fe80::1%eth0]", "/srv")),
            ("root@[::1]:/srv", there("root@[::1]", "/srv")),
        ] {
            assert_eq!(Origin::parse(text).unwrap(), expected, "{text}");
        }
        for text in [
            "",
            ":",
            "host:",
            ":/srv",
            "-oProxyCommand=x:/srv",
            "root@-oX:/srv",
            "[-oX]:/srv",
            "root@[-oX]:/srv",
            "[a@-oX]:/srv",
            "root@:/srv",
            "[]:/srv",
            "host::module",
            "rsync://host/module",
            "a b:/srv",
            "[::1]:",
        ] {
            let error = Origin::parse(text).unwrap_err().to_string();
            assert!(error.contains("template"), "{text}: {error}");
        }
    }

    #[test]
    fn rsync_gets_the_template_and_nothing_else() {
        let said = |origin: &Origin, options: &[&str]| -> Vec<String> {
            let rules = ["- /var/lib/dualroot/*".to_owned()];
            origin.arguments(options, &rules).into_iter().map(|arg| arg.into_string().unwrap()).collect()
        };
        assert_eq!(
            said(&Origin::Here("/a:b; c".into()), &["--archive"]),
            ["--archive", "--filter=- /var/lib/dualroot/*", "--", "/a:b; c/", "./"]
        );
        assert_eq!(
            said(&there("root@host", "/srv/$(x) y"), &["--archive"]),
            ["--archive", SSH, "--protect-args", "--filter=- /var/lib/dualroot/*", "--", "root@host:/srv/$(x) y/", "./"]
        );
    }

    #[test]
    fn files_are_counted_where_they_will_be() {
        let said = b"cd+++++++++ 4096 /./\n>f+++++++++ 5000 /etc/a b\n>f+++++++++ 10 /home/a\nhf+++++++++ 10 /home/b\n\
            >f+++++++++ 0 /homes\n>f+++++++++ 1 /boot/loader/entries/a.conf\n>f+++++++++ 1 /efi/EFI/BOOT/BOOTX64.EFI\nx y z\n\n";
        let found = Listing::parse(said, &["", "/home", "/boot", "/efi"]);
        let expected = [("", 3 * 4096 + 3 * 256), ("/boot", 4096 + 256), ("/efi", 4096 + 256), ("/home", 4096 + 256)];
        assert_eq!(found.bytes, expected.into());
        assert_eq!(found.boots, ["/boot"]);
        assert_eq!(found.content, 5012);
        assert_eq!(Listing::parse(said, &[""]).boots, Vec::<&str>::new());
    }

    #[test]
    fn a_tree_is_listed_as_it_is_copied() {
        // Only root can make directories in /run.
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let tmp = tempfile::tempdir().unwrap();
        let (from, to) = (tmp.path().join("a template"), tmp.path().join("to"));
        for dir in ["boot/loader/entries", "etc/ssh", "home"] {
            fs::create_dir_all(from.join(dir)).unwrap();
        }
        fs::create_dir(&to).unwrap();
        for file in
            ["boot/loader/entries/a.conf", "etc/ssh/ssh_host_rsa_key", "etc/ssh/ssh_host_rsa_key.pub", "etc/ssh/ssh_config"]
        {
            fs::write(from.join(file), "12345").unwrap();
        }
        fs::hard_link(from.join("etc/ssh/ssh_config"), from.join("home/same")).unwrap();
        let origin = Origin::Here(from);
        let rules = identity::exclude_rules(Uuid::from_u128(1));
        let listing = origin.list(&rules, &["", "/home", "/boot"]).unwrap();
        assert_eq!(listing.boots, ["/boot"]);
        // Three directories, and a file.
        assert_eq!(listing.bytes["/boot"], 4 * (4096 + 256));
        assert_eq!(listing.content, 10);
        let mut terminal = tempfile::tempfile().unwrap();
        let progress = Progress::on(terminal.try_clone().unwrap(), listing.content);
        origin.copy(&rules, Some(progress), &Below::open(&to).unwrap()).unwrap();
        let mut said = String::new();
        terminal.rewind().unwrap();
        terminal.read_to_string(&mut said).unwrap();
        assert!(said.starts_with("\r[") && said.contains(" MiB/s "), "{said:?}");
        let names = |dir: &str| Below::open(&to).unwrap().names(dir.as_ref()).unwrap();
        assert_eq!(names("etc/ssh"), ["ssh_config"]);
        assert_eq!(names("home"), ["same"]);
        assert!(!Path::new(PLACE).exists());
    }

    const ID: &str = "aaaaaaaa-0000-4000-8000-000000000001";

    fn template(files: &[(&str, &str)]) -> (tempfile::TempDir, Origin) {
        let tmp = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = tmp.path().join(path.trim_start_matches('/'));
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let origin = Origin::Here(tmp.path().to_owned());
        (tmp, origin)
    }

    #[test]
    fn a_template_without_a_needed_file_is_refused() {
        let part = format!(r#"{{"partuuid":"{ID}","uuid":null,"label":null,"partlabel":null,"paths":[]}}"#);
        let ids = format!(r#"[{{"name":"disk0","parts":{{"root":{part}}}}}]"#);
        let shared = ids.replace("root", "esp");
        let layout = r#"[{"name":"disk0","sector":512,"table":[],"partitions":[]}]"#;
        let whole = [
            (MACHINE_ID, "d0a1c0ded0a1c0ded0a1c0ded0a1c0de\n"),
            (HOST_NAME, "pair\n"),
            (LAYOUT, layout),
            (IDENTIFIERS, ids.as_str()),
        ];
        let (_tmp, origin) = template(&whole);
        let about = origin.about(None).unwrap();
        assert_eq!((about.host_name.as_deref(), about.ids.len(), about.disk.sector), (Some("pair"), 1, 512));
        let with = |path: &str, text: Option<&'static str>| {
            let mut files: Vec<_> = whole.into_iter().filter(|(other, _)| *other != path).collect();
            files.extend(text.map(|text| (if path == MACHINE_ID { MACHINE_ID } else { LAYOUT }, text)));
            template(&files)
        };
        for (path, text, expected) in [
            (MACHINE_ID, None, "has no /etc/machine-id; make the template again"),
            (MACHINE_ID, Some("uninitialized\n"), "/etc/machine-id: 'uninitialized' is no machine id"),
            (LAYOUT, None, "has no /var/lib/dualroot/layout.json; run dualroot-sync on the machine that it was made of"),
            (LAYOUT, Some("{}"), "/var/lib/dualroot/layout.json can't be understood"),
            (LAYOUT, Some("[]"), "its layout has no disk"),
            (IDENTIFIERS, None, "has no /var/lib/dualroot/identifiers.json; run dualroot-sync"),
        ] {
            let (_tmp, origin) = with(path, text);
            let error = origin.about(None).unwrap_err();
            assert!(error.is::<Refused>() && error.to_string().contains(expected), "{error:#}");
        }
        let part = |partuuid: &str| {
            format!(
                r#"{{"role":"root","partuuid":"{partuuid}","bytes":1,"kind":"0FC63DAF-8483-4772-8E79-3D69D8477DE4","name":null,
                    "attributes":"","fstype":"ext4","uuid":null,"label":null}}"#
            )
        };
        let (one, other) = (part(ID), part(&ID.replace("01", "02")));
        let disk = |parts: &str| layout.replace("[]}]", &format!("[{parts}]}}]"));
        for (parts, expected) in [
            (one.clone(), None),
            (one.replace("0FC63DAF", "x"), Some("which is no GUID")),
            (one.replace(r#""attributes":"""#, r#""attributes":"a\nb""#), Some("which can't have such characters")),
            (one.replace(r#""attributes":"""#, r#""attributes":"a\" b""#), Some("which can't have such characters")),
            (one.replace("ext4", r"ext\u0000"), Some("which can't have such characters")),
            (one.replace(r#""bytes":1"#, r#""bytes":1152921504606846977"#), Some("more than any disk")),
            (format!("{one},{other}"), Some("is root=, and so is another one")),
        ] {
            let layout = disk(&parts);
            let (_tmp, origin) = template(&[whole[0], whole[1], (LAYOUT, &layout), whole[3]]);
            let error = origin.about(None).err().map(|e| (e.is::<Refused>(), e.to_string()));
            match expected {
                None => assert_eq!(error, None),
                Some(expected) => {
                    assert!(error.as_ref().is_some_and(|(refused, e)| *refused && e.contains(expected)), "{error:?}")
                }
            }
        }
        let (tmp, origin) = with(LAYOUT, None);
        let file = tmp.path().join("layout");
        fs::write(&file, layout).unwrap();
        origin.about(Some(&file)).unwrap();
        let (_tmp, origin) = template(&[whole[0], whole[1], whole[2], (IDENTIFIERS, &shared)]);
        let error = origin.about(None).unwrap_err();
        assert!(error.is::<Refused>() && error.to_string().contains("share one root"), "{error:#}");
        let error = Origin::Here(tmp.path().join("absent")).canonical().unwrap_err();
        assert!(error.is::<Refused>(), "{error:#}");
    }
}
