//! Golden cases for dualroot-generator: `tests/generator/NN-name/` holds an input tree (`root/`) and the expected output.
//!
//! A case consists of
//! - `root/`: the tree that the generator reads as `/`,
//! - `expected/`: the files that it writes to the normal directory; symbolic links are compared by their targets, and never followed,
//! - `expect-nothing` (instead of `expected/`): the reason why it must write nothing,
//! - `expected.log`: its messages, with the process id masked; without this file, there must be none,
//! - `env`: environment variables, one a line, `status`: the exit status if it is not 0, `dirs`: empty directories to make below
//!   `root/`, one a line, because git has none.
//!
//! `UPDATE=1 cargo test --test generator` replaces the expected files by the present output; read `git diff` afterwards. It never writes
//! `expect-nothing`, so that no case begins to expect nothing unnoticed.

// A test may panic; clippy allows that in `#[test]` functions, but not in their helper functions.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

const GENERATOR: &str = env!("CARGO_BIN_EXE_dualroot-generator");

/// A test for each case.
macro_rules! cases {
    ($($name:ident => $dir:literal,)*) => {
        const CASES: &[&str] = &[$($dir),*];
        $(#[test] fn $name() { run_case($dir); })*
    };
}

cases! {
    own_roots => "01-own-roots",
    own_roots_xbootldr => "02-own-roots-xbootldr",
    shared_root => "03-shared-root",
    shared_root_xbootldr => "04-shared-root-xbootldr",
    three_disks => "05-three-disks",
    mounted_by_others => "06-mounted-by-others",
    esp_mountpoint => "07-esp-mountpoint",
    f01_esp_mountpoint_not_in_fstab => "08-esp-mountpoint-not-in-fstab",
    spare_mount_sync => "09-spare-mount-sync",
    every_role => "10-every-role",
    swap_in_fstab => "11-swap-in-fstab",
    boot_current => "12-boot-current",
    drop_ins => "13-drop-ins",
    f26_odd_paths => "14-f26-odd-paths",
    luks => "15-luks",
    f02_no_variable => "20-f02-no-variable",
    f02_other_esp => "21-f02-other-esp",
    f02_esp_in_both => "22-f02-esp-in-both",
    f02_firmware_entry => "23-f02-firmware-entry",
    f02_mbr_entry => "24-f02-mbr-entry",
    f03_partuuid_twice => "25-f03-partuuid-twice",
    f26_odd_length => "30-f26-odd-length",
    f26_no_nul => "31-f26-no-nul",
    f26_not_utf16 => "32-f26-not-utf16",
    f26_newline => "33-f26-newline",
    f26_empty_variable => "34-f26-empty-variable",
    f26_fstab => "35-f26-fstab",
    f26_short_variable => "36-f26-short-variable",
    f27_not_configured => "40-f27-not-configured",
    f27_only_comments => "41-f27-only-comments",
    f27_initrd => "42-f27-initrd",
    f27_initrd_release => "43-f27-initrd-release",
    f27_container => "44-f27-container",
    f27_container_file => "45-f27-container-file",
    f27_user_scope => "46-f27-user-scope",
    f27_no_efi => "47-f27-no-efi",
    f27_in_a_virtual_machine => "48-f27-in-a-virtual-machine",
    invalid => "49-invalid",
}

/// A file, link or empty directory of a tree. Other directories are not listed, because git has none.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Node {
    File(String),
    Link(PathBuf),
    EmptyDir,
    Other,
}

type Tree = BTreeMap<String, Node>;

/// The tree below a directory; an empty one if the directory doesn't exist.
fn tree(dir: &Path) -> Tree {
    fn walk(top: &Path, dir: &Path, tree: &mut Tree) -> bool {
        let mut empty = true;
        for entry in fs::read_dir(dir).unwrap() {
            empty = false;
            let (path, kind) = entry.map(|e| (e.path(), e.file_type().unwrap())).unwrap();
            let name = path.strip_prefix(top).unwrap().to_str().unwrap().to_owned();
            if kind.is_symlink() {
                tree.insert(name, Node::Link(fs::read_link(&path).unwrap()));
            } else if kind.is_file() {
                tree.insert(name, Node::File(fs::read(&path).unwrap().escape_ascii().to_string().replace("\\n", "\n")));
            } else if !kind.is_dir() {
                tree.insert(name, Node::Other);
            } else if walk(top, &path, tree) {
                tree.insert(name, Node::EmptyDir);
            }
        }
        empty
    }
    let mut found = Tree::new();
    if fs::symlink_metadata(dir).is_ok() {
        walk(dir, dir, &mut found);
    }
    found
}

/// The differences of two trees, for people; empty if they are equal.
fn differences(expected: &Tree, found: &Tree) -> String {
    let mut text = String::new();
    for name in expected.keys().chain(found.keys().filter(|name| !expected.contains_key(*name))) {
        text += &match (expected.get(name), found.get(name)) {
            (a, b) if a == b => continue,
            (Some(_), None) => format!("missing: {name}\n"),
            (None, Some(Node::File(b))) => format!("not expected: {name}:\n{b}\n"),
            (None, Some(b)) => format!("not expected: {name}: {b:?}\n"),
            (Some(Node::File(a)), Some(Node::File(b))) => format!("{name}: expected:\n{a}\nfound:\n{b}\n"),
            (a, b) => format!("{name}: expected {a:?}, found {b:?}\n"),
        };
    }
    text
}

/// Copies a tree without following links.
fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let (from, to) = (entry.path(), to.join(entry.file_name()));
        match entry.file_type().unwrap() {
            kind if kind.is_symlink() => symlink(fs::read_link(&from).unwrap(), &to).unwrap(),
            kind if kind.is_dir() => copy(&from, &to),
            _ => fs::write(&to, fs::read(&from).unwrap()).unwrap(),
        }
    }
}

/// The directory of the cases.
fn cases() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/generator")
}

/// The text of a case's file; empty if it doesn't exist.
fn text(path: &Path) -> String {
    match fs::read_to_string(path) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => String::new(),
        Err(e) => panic!("{}: {e}", path.display()),
    }
}

/// A case's input, copied to a temporary directory.
struct Setup {
    dir: tempfile::TempDir,
    env: String,
}

impl Setup {
    fn new(case: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let case = cases().join(case);
        copy(&case.join("root"), &dir.path().join("root"));
        for name in text(&case.join("dirs")).lines() {
            fs::create_dir_all(dir.path().join("root").join(name)).unwrap();
        }
        Self { dir, env: text(&case.join("env")) }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn run(&self, args: &[&str]) -> Output {
        let mut command = Command::new(GENERATOR);
        command.env_clear().env("DUALROOT_ROOT", self.path("root")).current_dir(self.dir.path());
        for line in self.env.lines() {
            let (name, value) = line.split_once('=').unwrap();
            command.env(name, value);
        }
        command.args(args.iter().map(|arg| self.path(arg))).output().unwrap()
    }

    /// The messages of a run, without the parts that differ between runs.
    fn log(&self, output: &Output) -> String {
        assert!(output.stdout.is_empty(), "standard output is not empty: {output:?}");
        let text = String::from_utf8(output.stderr.clone()).unwrap().replace(self.dir.path().to_str().unwrap(), "DIR");
        text.lines().map(|line| format!("{}\n", mask(line))).collect()
    }
}

/// A message with its process id masked. Any other line gets a mark that matches no message.
fn mask(line: &str) -> String {
    let masked = line.split_once("dualroot-generator[").and_then(|(priority, rest)| {
        let (pid, text) = rest.split_once("]: ")?;
        pid.parse::<u32>().ok()?;
        Some(format!("{priority}dualroot-generator[PID]: {text}"))
    });
    masked.unwrap_or_else(|| format!("(no message) {line}"))
}

fn run_case(name: &str) {
    let case = cases().join(name);
    let setup = Setup::new(name);
    let before = tree(&setup.path("root"));
    let output = setup.run(&["normal", "early", "late"]);
    let log = setup.log(&output);
    let status: i32 = text(&case.join("status")).trim().parse().unwrap_or(0);
    assert_eq!(output.status.code(), Some(status), "{name}: exit status; messages:\n{log}");
    // Nothing else is written.
    assert_eq!(tree(&setup.path("root")), before, "{name}: the input was changed");
    let others: Vec<_> = fs::read_dir(setup.dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert!(others.iter().all(|other| other == "root" || other == "normal"), "{name}: written elsewhere: {others:?}");

    let found = tree(&setup.path("normal"));
    let nothing = case.join("expect-nothing").exists();
    if std::env::var_os("UPDATE").is_some_and(|update| update == "1") {
        assert_eq!(
            found.is_empty(),
            nothing,
            "{name}: the output and expect-nothing contradict each other; check, then add or remove expect-nothing"
        );
        update(&case, &setup.path("normal"), &log);
    }
    if nothing {
        assert!(!case.join("expected").exists(), "{name}: has both expected/ and expect-nothing");
        assert!(!setup.path("normal").exists(), "{name}: expected nothing, found:\n{found:#?}");
    } else {
        let expected = tree(&case.join("expected"));
        assert!(!expected.is_empty(), "{name}: expected/ is empty, and there is no expect-nothing");
        let differences = differences(&expected, &found);
        assert!(differences.is_empty(), "{name}:\n{differences}");
    }
    assert_eq!(text(&case.join("expected.log")), log, "{name}: messages");
}

/// Replaces the expected files of a case.
fn update(case: &Path, normal: &Path, log: &str) {
    let expected = case.join("expected");
    if expected.exists() {
        fs::remove_dir_all(&expected).unwrap();
    }
    if normal.exists() {
        copy(normal, &expected);
    }
    let path = case.join("expected.log");
    if !log.is_empty() {
        fs::write(path, log).unwrap();
    } else if path.exists() {
        fs::remove_file(path).unwrap();
    }
}

#[test]
fn every_case_has_a_test() {
    let mut dirs: Vec<_> = fs::read_dir(cases()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    dirs.sort();
    assert_eq!(dirs, CASES);
}

#[test]
fn the_comparison_sees_differences() {
    let dir = tempfile::tempdir().unwrap();
    let make = |name: &str, change: &dyn Fn(&Path)| {
        let top = dir.path().join(name);
        fs::create_dir_all(top.join("a")).unwrap();
        fs::write(top.join("a/file"), "text").unwrap();
        symlink("file", top.join("a/link")).unwrap();
        change(&top);
        tree(&top)
    };
    let first = make("0", &|_| {});
    assert_eq!(differences(&first, &make("1", &|_| {})), "");
    for (name, change) in [
        ("2", &(|top: &Path| fs::write(top.join("a/file"), "test").unwrap()) as &dyn Fn(&Path)),
        ("3", &|top| fs::remove_file(top.join("a/link")).unwrap()),
        ("4", &|top| fs::create_dir(top.join("b")).unwrap()),
        ("5", &|top| fs::write(top.join("new"), "").unwrap()),
        // A link with another target of the same content, and a file of the same content instead of the link.
        ("6", &|top| {
            fs::remove_file(top.join("a/link")).unwrap();
            symlink("./file", top.join("a/link")).unwrap();
        }),
        ("7", &|top| {
            fs::remove_file(top.join("a/link")).unwrap();
            fs::write(top.join("a/link"), "text").unwrap();
        }),
    ] {
        assert_ne!(differences(&first, &make(name, change)), "", "{name}");
    }
    assert!(tree(&dir.path().join("nowhere")).is_empty());
}

/// Runs a case, which must succeed, and returns its output too.
fn good_run(case: &str) -> (Setup, Tree) {
    let setup = Setup::new(case);
    let output = setup.run(&["normal", "early", "late"]);
    assert!(output.status.success(), "{case}: {output:?}");
    let found = tree(&setup.path("normal"));
    (setup, found)
}

#[test]
fn f27_twice() {
    let (setup, first) = good_run("10-every-role");
    let again = setup.run(&["normal", "early", "late"]);
    assert!(again.status.success(), "{again:?}");
    assert_eq!(tree(&setup.path("normal")), first);
    // The output doesn't depend on the directory or the time.
    assert!(setup.run(&["other", "early", "late"]).status.success());
    assert_eq!(tree(&setup.path("other")), first);
}

#[test]
fn f27_one_argument() {
    let (setup, expected) = good_run("01-own-roots");
    assert!(setup.run(&["units"]).status.success());
    let differences = differences(&expected, &tree(&setup.path("units")));
    assert!(differences.is_empty(), "{differences}");
}

/// An argument that is no absolute path is refused, and makes no directory of its name.
#[test]
fn f27_wrong_arguments() {
    let setup = Setup::new("01-own-roots");
    let run = |args: &[&str]| {
        let mut command = Command::new(GENERATOR);
        command.env("DUALROOT_ROOT", setup.path("root")).current_dir(setup.dir.path()).args(args).output().unwrap()
    };
    for (args, expected) in [
        (&[][..], "expected one or three directories as arguments, found 0"),
        (&["/nowhere/a", "/nowhere/b"], "expected one or three directories as arguments, found 2"),
        (&["/nowhere/a", "/nowhere/b", "/nowhere/c", "/nowhere/d"], "expected one or three directories as arguments, found 4"),
        (&[""], "'' is no absolute path of a directory"),
        (&["units"], "'units' is no absolute path of a directory"),
        (&["--halp"], "'--halp' is no absolute path of a directory"),
        (&["/nowhere/a", "--help", "/nowhere/c"], "'--help' is no absolute path of a directory"),
        (&["/nowhere/a", "early", "/nowhere/c"], "'early' is no absolute path of a directory"),
    ] {
        let output = run(args);
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        let found = String::from_utf8(output.stderr).unwrap();
        assert_eq!(found, format!("dualroot-generator: {expected}; nothing was written. See 'dualroot-generator --help'.\n"));
    }
    for args in [["--help"], ["-h"], ["--version"], ["-V"]] {
        let output = run(&args);
        assert!(output.status.success() && output.stderr.is_empty(), "{args:?}: {output:?}");
        assert!(String::from_utf8(output.stdout).unwrap().contains("dualroot-generator "), "{args:?}");
    }
    assert_eq!(fs::read_dir(setup.dir.path()).unwrap().count(), 1, "something was written");
    assert!(!Path::new("/nowhere").exists());
}

#[test]
fn f27_unwritable_directory() {
    let setup = Setup::new("01-own-roots");
    fs::write(setup.path("normal"), "").unwrap();
    let output = setup.run(&["normal", "early", "late"]);
    assert_eq!(output.status.code(), Some(1));
    let log = setup.log(&output);
    assert!(
        log.starts_with("<3>dualroot-generator[PID]: ") && log.contains("units can't be written; the first one: can't "),
        "{log}"
    );
    assert_eq!(log.lines().count(), 1, "{log}");
}

/// If one file can't be written, the others are written anyway.
#[test]
fn f27_partly_unwritable_directory() {
    let (setup, mut expected) = good_run("01-own-roots");
    fs::create_dir(setup.path("partly")).unwrap();
    fs::write(setup.path("partly/local-fs.target.wants"), "").unwrap();
    let output = setup.run(&["partly", "early", "late"]);
    assert_eq!(output.status.code(), Some(1));
    let all = expected.len();
    expected.retain(|name, _| !name.starts_with("local-fs.target.wants/"));
    assert!(expected.len() < all);
    expected.insert("local-fs.target.wants".to_owned(), Node::File(String::new()));
    let differences = differences(&expected, &tree(&setup.path("partly")));
    assert!(differences.is_empty(), "{differences}");
}

/// Another generator's unit stays, and links aren't followed to write elsewhere.
#[test]
fn f27_units_of_others_stay() {
    let setup = Setup::new("01-own-roots");
    fs::create_dir(setup.path("normal")).unwrap();
    fs::write(setup.path("normal/boot.mount"), "# another's").unwrap();
    symlink(setup.path("elsewhere"), setup.path("normal/mnt-root1.mount")).unwrap();
    let output = setup.run(&["normal", "early", "late"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(setup.log(&output).contains("2 of "), "{output:?}");
    assert_eq!(fs::read(setup.path("normal/boot.mount")).unwrap(), b"# another's");
    assert!(!setup.path("elsewhere").exists());
}

/// f26: every unit names the drop-in as its source; a newline in the name would begin another line.
#[test]
fn f26_a_file_name_adds_no_line_to_a_unit() {
    let setup = Setup::new("01-own-roots");
    let dir = setup.path("root/etc/dualroot.conf.d");
    fs::create_dir(&dir).unwrap();
    fs::rename(setup.path("root/etc/dualroot.conf"), dir.join("a\n[Mount]\nOptions=exec\n#.conf")).unwrap();
    let output = setup.run(&["normal", "early", "late"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(!setup.path("normal").exists());
    let expected = "<3>dualroot-generator[PID]: no mount units are made, because the configuration is invalid: \
                    /etc/dualroot.conf.d: expected names without control \
                    characters, found 'a\\n[Mount]\\nOptions=exec\\n#.conf'\n";
    assert_eq!(setup.log(&output), expected);
}

/// f10: at boot, the partition with the databases of package managers is not mounted yet.
#[test]
fn f10_package_databases_on_other_partitions_are_watched() {
    let watched = |setup: &Setup| {
        assert!(setup.run(&["normal", "early", "late"]).status.success());
        fs::read_to_string(setup.path("normal/dualroot-entries.path.d/50-dualroot.conf")).unwrap()
    };
    // A partition in the configuration, none, and one in fstab.
    assert!(watched(&Setup::new("10-every-role")).contains("PathChanged=/var/lib/dpkg\n"));
    let setup = Setup::new("02-own-roots-xbootldr");
    assert!(!watched(&setup).contains("/var/lib/dpkg"));
    fs::write(setup.path("root/etc/fstab"), "LABEL=var /var ext4 defaults 0 2\n").unwrap();
    fs::remove_dir_all(setup.path("normal")).unwrap();
    assert!(watched(&setup).contains("PathChanged=/var/lib/dpkg\n"));
}

/// A typo may be the reason for a missing unit, so its warning comes first.
#[test]
fn warnings_come_before_a_reason() {
    let setup = Setup::new("21-f02-other-esp");
    let path = setup.path("root/etc/dualroot.conf");
    fs::write(&path, format!("{}\ncolour=red\n", text(&path))).unwrap();
    let log = setup.log(&setup.run(&["normal", "early", "late"]));
    let [warning, reason] = log.lines().collect::<Vec<_>>()[..] else { panic!("{log}") };
    assert!(warning.starts_with("<4>") && warning.contains("unknown key 'colour=' in section [disk1], ignoring"), "{log}");
    assert!(reason.contains("the booted disk is unknown: "), "{log}");
}

/// f27: a named pipe in the place of a file doesn't hold up the boot.
#[test]
fn f27_named_pipes_are_not_waited_for() {
    for (name, says) in
        [("etc/fstab", "no mount units are made, because /etc/fstab can't be read: not a regular file"), ("etc/machine-id", "")]
    {
        let setup = Setup::new("01-own-roots");
        let path = setup.path("root").join(name);
        fs::remove_file(&path).unwrap();
        assert!(Command::new("mkfifo").arg(&path).status().unwrap().success());
        let (done, ended) = std::sync::mpsc::channel();
        std::thread::scope(|scope| {
            scope.spawn(|| done.send(setup.run(&["normal", "early", "late"])));
            let in_time = ended.recv_timeout(std::time::Duration::from_secs(10));
            // A generator that waits for a writer gets one, so that the test ends.
            let _ = fs::OpenOptions::new().read(true).write(true).open(&path);
            let log = setup.log(&in_time.unwrap_or_else(|_| panic!("{name}: the generator waits")));
            assert!(log.contains(says), "{name}: {log}");
        });
    }
}

/// systemd accepts all units that the generator writes.
#[test]
fn systemd_has_no_complaints() {
    let cases: Vec<_> = CASES.iter().filter(|case| !cases().join(case).join("expect-nothing").exists()).collect();
    assert!(cases.len() > 10);
    for case in cases {
        let (setup, _) = good_run(case);
        let complaints = complaints(&setup.path("normal"));
        assert!(complaints.is_empty(), "{case}: {complaints}");
    }
}

/// The test above would fail for bad units.
#[test]
fn systemd_complains_of_bad_units() {
    let (setup, _) = good_run("01-own-roots");
    for (from, to, complaint) in [
        ("SourcePath=", "SourcePart=", "Unknown key 'SourcePart'"),
        ("Where=/boot", "Where=/boat", "Where= setting doesn't match unit name"),
        ("PathChanged=/etc\n", "PathChanged=etc\n", "PathChanged"),
        ("[Mount]\nWhat=/dev", "[Mount]\nX=/dev", "What= setting"),
    ] {
        let bad = setup.path(&to.replace(['/', '\n'], " "));
        copy(&setup.path("normal"), &bad);
        for file in ["boot.mount", "dualroot-entries.path.d/50-dualroot.conf"] {
            let text = fs::read_to_string(bad.join(file)).unwrap();
            fs::write(bad.join(file), text.replace(from, to)).unwrap();
        }
        let found = complaints(&bad);
        assert!(found.contains(complaint), "{complaint}: {found}");
    }
}

/// The output of `systemd-analyze verify` for a directory of units together with systemd's own units. The devices need not exist.
fn complaints(units: &Path) -> String {
    let dir = tempfile::tempdir().unwrap();
    copy(units, dir.path());
    // The unit of the drop-in, so that systemd reads the drop-in too.
    let path_unit = Path::new(env!("CARGO_MANIFEST_DIR")).join("units/dualroot-entries.path");
    fs::copy(path_unit, dir.path().join("dualroot-entries.path")).unwrap();
    fs::write(dir.path().join("dualroot-entries.service"), "[Service]\nType=oneshot\nExecStart=/bin/sh -c true\n").unwrap();
    fs::write(dir.path().join("dualroot-luks@.service"), "[Service]\nType=oneshot\nExecStart=/bin/sh -c true\n").unwrap();
    let is_unit = |path: &Path| path.extension().is_some_and(|e| e == "mount" || e == "swap" || e == "path");
    let mut names: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().path()).filter(|path| is_unit(path)).collect();
    names.sort();
    assert!(names.len() > 1, "there are no units in {}", units.display());
    let output = Command::new("systemd-analyze")
        .args(["verify", "--man=no"])
        .args(&names)
        .env("SYSTEMD_UNIT_PATH", format!("{}:/usr/lib/systemd/system:/lib/systemd/system", dir.path().display()))
        .env("SYSTEMD_LOG_LEVEL", "info")
        .output()
        .unwrap_or_else(|e| panic!("systemd-analyze can't be run ({e}): install systemd ('apt-get install systemd' on Debian)"));
    let mut text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    if !output.status.success() {
        text += &format!("systemd-analyze verify: {}\n", output.status);
    }
    text
}

/// By systemd's own reading of the units, no mount of a spare is ordered before local-fs.target or another unit for which a boot waits, and
/// every mount of the booted disk is.
#[test]
fn f14_boot_waits_for_no_spare() {
    let (setup, found) = good_run("10-every-role");
    let log = loaded_by_systemd(&setup.path("normal"));
    let mounts: Vec<_> = found.keys().filter(|name| name.ends_with(".mount") && !name.contains('/')).collect();
    assert!(mounts.len() > 10);
    for mount in mounts {
        let unit = log
            .split("-> Unit ")
            .find(|unit| unit.starts_with(&format!("{mount}:\n")))
            .unwrap_or_else(|| panic!("{mount}:\n{log}"));
        let before: Vec<_> = unit.lines().filter_map(|line| line.trim().strip_prefix("Before: ")?.split(' ').next()).collect();
        assert_eq!(unit.matches("Load State: loaded").count(), 1, "{unit}");
        if mount.starts_with("mnt-root1") {
            let harmless = |name: &&&str| name.starts_with("mnt-root1-") || **name == "umount.target";
            assert_eq!(before.iter().filter(|name| !harmless(name)).collect::<Vec<_>>(), [&""; 0], "{mount}");
            assert!(unit.contains("BindsTo: dev-disk-by\\x2dpartuuid-bbbbbbbb"), "{unit}");
            assert!(unit.contains("Conflicts: umount.target"), "{unit}");
        } else {
            assert!(before.contains(&"local-fs.target"), "{mount}: {before:?}");
            assert!(!unit.contains("RequiredBy: local-fs.target"), "{mount}");
        }
    }
}

/// The units as the test mode of systemd's manager prints them after loading, together with systemd's own units.
fn loaded_by_systemd(units: &Path) -> String {
    let dir = tempfile::tempdir_in("/tmp").unwrap();
    let units_copy = dir.path().join("units");
    copy(units, &units_copy);
    fs::set_permissions(dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let systemd = "/lib/systemd/systemd";
    let test = [systemd, "--test", "--system", "--unit=local-fs.target", "--log-target=console"];
    // The test mode refuses to run as root.
    let id = Command::new("id").arg("-u").output().unwrap().stdout;
    let nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"];
    let words: Vec<&str> = if id == b"0\n" { nobody.into_iter().chain(test).collect() } else { test.to_vec() };
    let output = Command::new(words[0])
        .args(&words[1..])
        .current_dir("/")
        .env("SYSTEMD_UNIT_PATH", format!("{}:/usr/lib/systemd/system:/lib/systemd/system", units_copy.display()))
        .output()
        .unwrap_or_else(|e| panic!("{} can't be run ({e})", words[0]));
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    let hint = "install systemd and util-linux ('apt-get install systemd util-linux' on Debian)";
    assert!(output.status.success(), "{words:?}: {}, {hint}: {text}", output.status);
    text
}
