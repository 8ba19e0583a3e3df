//! The programs as a whole: what they say of themselves, and to somebody who isn't root.

// A test that panics fails, as it should; clippy takes only `#[test]` functions for tests.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

const PROGRAMS: [(&str, &str); 7] = [
    ("dualroot-clone", env!("CARGO_BIN_EXE_dualroot-clone")),
    ("dualroot-complete", env!("CARGO_BIN_EXE_dualroot-complete")),
    ("dualroot-entries", env!("CARGO_BIN_EXE_dualroot-entries")),
    ("dualroot-generator", env!("CARGO_BIN_EXE_dualroot-generator")),
    ("dualroot-status", env!("CARGO_BIN_EXE_dualroot-status")),
    ("dualroot-sync", env!("CARGO_BIN_EXE_dualroot-sync")),
    ("dualroot-verify", env!("CARGO_BIN_EXE_dualroot-verify")),
];

/// The section of a manual page about exit statuses.
fn section(page: &str) -> String {
    let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("man").join(page)).unwrap();
    let section = text.split("\n.Sh ").find_map(|section| section.strip_prefix("EXIT STATUS\n"));
    section.unwrap_or_else(|| panic!("{page} has no EXIT STATUS")).to_owned()
}

/// The exit statuses that a program's --help names.
fn of_help(path: &str) -> BTreeSet<u8> {
    let output = Command::new(path).arg("--help").output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("Exit status: ")).unwrap_or_else(|| panic!("{path}: {text}"));
    line.split("; ").map(|part| part.split_once(' ').unwrap().0.parse().unwrap()).collect()
}

/// The exit statuses that the table in dualroot(7) has for a program.
fn of_table(program: &str) -> BTreeSet<u8> {
    let table = section("dualroot.7");
    let items = table.split(".It ").skip(1).map(|item| item.split_once('\n').unwrap());
    let names = |text: &str| {
        text.contains("all programs") || text.contains(&format!(".Xr {program} 8")) || text.contains(&format!(" Xr {program} 8"))
    };
    items.filter(|(_, text)| names(text)).map(|(status, _)| status.parse().unwrap()).collect()
}

/// The exit statuses that a program's own page names before it refers to the table.
fn of_page(program: &str) -> BTreeSet<u8> {
    let text = section(&format!("{program}.8"));
    let (first, rest) = text.split_once('\n').unwrap();
    assert!(rest.starts_with(".Xr dualroot 7 ."), "{program}: {text}");
    let list = first.strip_suffix(": see the table in").unwrap_or_else(|| panic!("{program}: {first}"));
    list.replace(" or ", ", ").split(", ").map(|status| status.parse().unwrap()).collect()
}

#[test]
fn exit_statuses_are_one_table() {
    for (program, path) in PROGRAMS {
        let table = of_table(program);
        assert!(table.is_superset(&[0, 1, 2].into()), "{program}: {table:?}");
        assert_eq!(of_help(path), table, "{program}: --help");
        assert_eq!(of_page(program), table, "{program}: its page");
    }
}
