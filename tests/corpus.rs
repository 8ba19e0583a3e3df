//! What fuzzing began with and what it found, once more, as ordinary tests: each file of `tests/fuzz/corpus/TARGET/` goes through the
//! target of that name, and those that the generator reads go through the generator, too (failure mode 26). How to fuzz is in README.md.

// A test that panics fails, as it should; clippy takes only `#[test]` functions for tests.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::Command;

#[path = "fuzz/targets.rs"]
mod targets;

/// A test for each target.
macro_rules! targets {
    ($($name:ident,)*) => {
        const TARGETS: &[&str] = &[$(stringify!($name)),*];
        mod f26 {
            $(#[test] fn $name() { super::run(stringify!($name), super::targets::$name); })*
        }
    };
}

targets! {
    boot_files,
    configuration,
    crypttab,
    device_paths,
    efi_variables,
    entries,
    fstab,
    images,
    lineage,
    loader_conf,
}

/// The directory of the fuzz targets.
fn fuzz() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz")
}

/// The names in a directory, sorted.
fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// The files of a target's corpus.
fn corpus(target: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let dir = fuzz().join("corpus").join(target);
    let files: Vec<_> =
        names(&dir).iter().map(|name| dir.join(name)).map(|path| (path.clone(), fs::read(path).unwrap())).collect();
    assert!(!files.is_empty(), "{} is empty", dir.display());
    files
}

fn run(target: &str, function: fn(&[u8])) {
    for (path, bytes) in corpus(target) {
        let passed = catch_unwind(AssertUnwindSafe(|| function(&bytes)));
        assert!(passed.is_ok(), "{} fails", path.display());
    }
}

#[test]
fn every_target_has_a_corpus_a_program_and_a_test() {
    assert_eq!(names(&fuzz().join("corpus")), TARGETS);
    assert_eq!(names(&fuzz().join("targets")), TARGETS.iter().map(|name| format!("{name}.rs")).collect::<Vec<_>>());
    let manifest = fs::read_to_string(fuzz().join("Cargo.toml")).unwrap();
    let listed: BTreeSet<_> =
        manifest.lines().filter_map(|line| line.strip_prefix("path = \"targets/")?.strip_suffix(".rs\"")).collect();
    assert!(listed.into_iter().eq(TARGETS.iter().copied()));
}

/// Where the generator's input begins to be hostile, and which corpus goes there.
const PLACES: [(&str, &[&str]); 6] = [
    ("configuration", &["etc/dualroot.conf", "etc/dualroot.conf.d/50-x.conf"]),
    ("fstab", &["etc/fstab"]),
    ("efi_variables", &[LOADER, BOOT_CURRENT, BOOT_ENTRY]),
    ("device_paths", &[BOOT_ENTRY]),
    ("entries", &["etc/machine-id"]),
    ("loader_conf", &["etc/kernel/entry-token"]),
];
const LOADER: &str = "sys/firmware/efi/efivars/LoaderDevicePartUUID-4a67b082-0a4c-41cf-b6c7-440b29bb8c4f";
const BOOT_CURRENT: &str = "sys/firmware/efi/efivars/BootCurrent-8be4df61-93ca-11d2-aa0d-00e098032b8c";
const BOOT_ENTRY: &str = "sys/firmware/efi/efivars/Boot0001-8be4df61-93ca-11d2-aa0d-00e098032b8c";

#[test]
fn f26_the_generator_takes_any_input() {
    let mut wrote = 0;
    for (target, places) in PLACES {
        for (path, bytes) in corpus(target) {
            for place in places {
                let dir = tempfile::tempdir().unwrap();
                let root = dir.path().join("root");
                let put = |place: &str, bytes: &[u8]| {
                    fs::create_dir_all(root.join(place).parent().unwrap()).unwrap();
                    fs::write(root.join(place), bytes).unwrap();
                };
                put("etc/dualroot.conf", CONFIGURATION);
                // Either of the variables, as the generator looks no further when it finds the first.
                match *place {
                    BOOT_CURRENT | BOOT_ENTRY => put(BOOT_CURRENT, b"\x06\0\0\0\x01\0"),
                    _ => put(LOADER, &variable()),
                }
                put(place, &bytes);
                wrote += usize::from(generate(dir.path(), &format!("{} as {place}", path.display())));
            }
        }
    }
    assert!(wrote > 20, "hardly anything was written, {wrote} times");
}

/// The disks of the corpus of configurations, so that what it adds goes with it.
const CONFIGURATION: &[u8] = b"[disk0]\nesp=66666666-0000-4000-8000-000000000001\nroot=66666666-0000-4000-8000-000000000002\n\
    [disk1]\nesp=77777777-0000-4000-8000-000000000001\nroot=77777777-0000-4000-8000-000000000002\n";

/// LoaderDevicePartUUID of a boot from disk0.
fn variable() -> Vec<u8> {
    let wide = "66666666-0000-4000-8000-000000000001\0".encode_utf16().flat_map(u16::to_le_bytes);
    [6, 0, 0, 0].into_iter().chain(wide).collect()
}

/// Runs the generator with what lies in `root/`, looks at what it did, and says whether it wrote anything.
fn generate(dir: &Path, what: &str) -> bool {
    let before = files(dir);
    let output = Command::new(env!("CARGO_BIN_EXE_dualroot-generator"))
        .env_clear()
        .env("DUALROOT_ROOT", dir.join("root"))
        .current_dir(dir)
        .args(["normal", "early", "late"].map(|name| dir.join(name)))
        .output()
        .unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(
        matches!(output.status.code(), Some(0 | 1)),
        "{what}: {}, signal {:?}: {said}",
        output.status,
        output.status.signal()
    );
    let is_message =
        |line: &str| line.starts_with('<') && line.contains(">dualroot-generator[") && !line.contains(char::is_control);
    assert!(output.stdout.is_empty() && said.lines().all(is_message) && !said.contains("panicked"), "{what}: {said}");
    let after = files(dir);
    assert!(before.is_subset(&after), "{what}: something was removed or changed");
    let written: Vec<_> = after.difference(&before).collect();
    for (path, content) in &written {
        assert!(path.starts_with("normal/"), "{what}: {path} was written");
        if let Some(text) = content {
            unit(text).unwrap_or_else(|line| panic!("{what}: {path} has the line {line:?}:\n{text}"));
        }
    }
    !written.is_empty()
}

/// Everything below a directory with its content; None for links.
fn files(dir: &Path) -> BTreeSet<(String, Option<String>)> {
    let mut found = BTreeSet::new();
    let mut dirs = vec![dir.to_owned()];
    while let Some(next) = dirs.pop() {
        for entry in fs::read_dir(next).unwrap() {
            let entry = entry.unwrap();
            let path = entry.path();
            let name = path.strip_prefix(dir).unwrap().to_str().unwrap().to_owned();
            match entry.file_type().unwrap() {
                kind if kind.is_dir() => dirs.push(path),
                kind if kind.is_symlink() => {
                    let leads = fs::read_link(&path).unwrap();
                    let is_plain =
                        leads == Path::new("/dev/null") || leads.to_str().unwrap().strip_prefix("../") == name.rsplit('/').next();
                    assert!(is_plain, "{name} leads to {}", leads.display());
                    found.insert((name, None));
                }
                _ => drop(found.insert((name, Some(String::from_utf8_lossy(&fs::read(&path).unwrap()).into_owned())))),
            }
        }
    }
    found
}

/// What the generator's units consist of, and in which order; the first line that is something else.
fn unit(text: &str) -> Result<(), String> {
    const KEYS: [(&str, &[&str]); 4] = [
        (
            "Unit",
            &[
                "Description",
                "Documentation",
                "SourcePath",
                "Before",
                "Wants",
                "After",
                "BindsTo",
                "ConditionPathIsDirectory",
                "JobRunningTimeoutSec",
            ],
        ),
        ("Mount", &["What", "Where", "Type", "Options", "LazyUnmount"]),
        ("Swap", &["What"]),
        ("Path", &["PathChanged"]),
    ];
    let mut sections: Vec<&str> = Vec::new();
    let mut seen = BTreeSet::new();
    for line in text.split('\n').filter(|line| !line.is_empty()).skip_while(|line| line.starts_with('#')) {
        // A backslash at the end takes in the next line; a percent sign begins a specifier, unless there are two.
        let backslashes = line.len() - line.trim_end_matches('\\').len();
        if backslashes % 2 == 1 || line.replace("%%", "").contains('%') || line.contains(char::is_control) {
            return Err(line.to_owned());
        }
        if let Some(section) = line.strip_prefix('[').and_then(|line| line.strip_suffix(']')) {
            // Each once.
            if sections.contains(&section) {
                return Err(line.to_owned());
            }
            sections.push(section);
            continue;
        }
        let keys = KEYS.iter().find(|(name, _)| sections.last() == Some(name)).map_or(&[][..], |(_, keys)| keys);
        let key = line.split_once('=').map_or("", |(key, _)| key);
        if !keys.contains(&key) || !seen.insert((sections.len(), key)) && !matches!(key, "PathChanged" | "After") {
            return Err(line.to_owned());
        }
    }
    Ok(())
}

#[test]
fn a_smuggled_line_is_seen() {
    let unit_with = |line: &str| unit(&format!("# x\n\n[Unit]\nDescription=a\n\n[Mount]\nWhat=/dev/x\nWhere=/boot\n{line}\n"));
    assert_eq!(unit_with("Options=ro"), Ok(()));
    for line in
        ["ExecStart=/x", "What=/dev/y", "[Mount]", "[Service]\nExecStart=/x", "Options=%n", "Where=/x", "x", "# x", "Options=\\"]
    {
        assert!(unit_with(line).is_err(), "{line}");
    }
}
