//! The programs as a whole: their --help texts, and their messages to users other than root.

// A test may panic; clippy allows that in `#[test]` functions, but not in their helper functions.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
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

/// The section EXIT STATUS of a manual page.
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

/// Runs a program as an ordinary user.
fn as_nobody(path: &str, args: &[&str]) -> (Option<i32>, String) {
    let is_root = Command::new("id").arg("-u").output().unwrap().stdout == b"0\n";
    // A build's directory may be root's alone.
    let dir = tempfile::tempdir_in("/tmp").unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let program = dir.path().join(Path::new(path).file_name().unwrap());
    // By another process: a child of another test would inherit the open file, which nobody can run meanwhile.
    assert!(Command::new("cp").args([Path::new(path), &program]).status().unwrap().success());
    let mut command = match is_root {
        true => Command::new("setpriv"),
        false => Command::new(&program),
    };
    if is_root {
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]).arg(&program);
    }
    let output = command.current_dir("/").args(args).output().unwrap();
    let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    (output.status.code(), said)
}

#[test]
fn every_program_gives_other_users_the_same_message() {
    for (program, args, unit) in [
        ("dualroot-sync", &[][..], Some("dualroot-sync.service")),
        ("dualroot-sync", &["--discard-spare", "disk1"], None),
        ("dualroot-sync", &["--boot-next", "disk1"], None),
        ("dualroot-sync", &["--note-boot"], Some("dualroot-booted.service")),
        ("dualroot-sync", &["--healed"], Some("dualroot-heal.service")),
        ("dualroot-entries", &[], Some("dualroot-entries.service")),
        ("dualroot-entries", &["--mark"], Some("dualroot-entries.service")),
        ("dualroot-verify", &[], Some("dualroot-verify.service")),
        ("dualroot-complete", &[], Some("dualroot-complete.service")),
        ("dualroot-clone", &["/dev/null"], None),
    ] {
        let path = PROGRAMS.iter().find(|(name, _)| *name == program).unwrap().1;
        let (status, said) = as_nobody(path, args);
        let other = unit.map(|unit| format!(", or 'systemctl start {unit}'")).unwrap_or_default();
        let expected = format!("{program} has to run as root; nothing was done. Run it by sudo{other}.\n");
        assert!(
            status == Some(3) && said.ends_with(&expected) && said.lines().count() == 1,
            "{program} {args:?}: {status:?}, {said}"
        );
    }
}

/// A configuration with two missing disks, and with a key that doesn't exist.
const CONFIGURATION: &str = "[disk0]
esp=aaaaaaaa-0000-4000-8000-000000000001
root=aaaaaaaa-0000-4000-8000-000000000002
[disk1]
esp=bbbbbbbb-0000-4000-8000-000000000001
root=bbbbbbbb-0000-4000-8000-000000000002
colour=red
";

/// Runs a program with this configuration. None if this is not root, or if the machine has a configuration of its own.
fn configured(program: &str, args: &[&str], text: &str) -> Option<(Option<i32>, String, String)> {
    let is_root = Command::new("id").arg("-u").output().unwrap().stdout == b"0\n";
    if !is_root || Path::new("/etc/dualroot.conf").exists() {
        return None;
    }
    let path = PROGRAMS.iter().find(|(name, _)| *name == program).unwrap().1;
    let script = "mount -t tmpfs none /run && printf %s \"$1\" >/run/dualroot.conf && shift && exec \"$@\"";
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", script, "sh", text, path]).args(args);
    let output = command.output().unwrap();
    let [out, err] = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    Some((output.status.code(), out, err))
}

const PROGRAMS_THAT_REFUSE: [(&str, &[&str]); 7] = [
    ("dualroot-sync", &[]),
    ("dualroot-sync", &["--dry-run"]),
    ("dualroot-sync", &["--boot-next", "disk1"]),
    ("dualroot-entries", &["--dry-run"]),
    ("dualroot-verify", &[]),
    ("dualroot-status", &["--json"]),
    ("dualroot-clone", &["--dry-run", "/dev/null"]),
];

#[test]
fn a_refused_run_reports_a_typo_in_the_configuration() {
    for (program, args) in PROGRAMS_THAT_REFUSE {
        let Some((status, out, err)) = configured(program, args, CONFIGURATION) else { return };
        let said = format!("{program} {args:?}: {status:?}: {out}{err}");
        assert!(status == Some(3) && out.is_empty() && err.lines().count() >= 2, "{said}");
        let warnings = err.matches("/run/dualroot.conf:7: unknown key 'colour=' in section [disk1], ignoring").count();
        assert_eq!(warnings, 1, "{said}");
    }
}

/// f64: also if the typo itself makes the configuration invalid.
#[test]
fn f64_a_typo_is_reported_with_its_consequence() {
    let text = CONFIGURATION.replacen("root=", "rot=", 1);
    for (program, args) in PROGRAMS_THAT_REFUSE {
        let Some((status, out, err)) = configured(program, args, &text) else { return };
        let said = format!("{program} {args:?}: {status:?}: {out}{err}");
        assert!(status == Some(3) && out.is_empty(), "{said}");
        assert!(err.contains("expected root= in section [disk0]") && err.contains("unknown key 'rot='"), "{said}");
    }
}

/// Without a configuration, services succeed with nothing to do, but dualroot-status calls no spare good.
#[test]
fn without_a_configuration_nothing_is_done_or_called_good() {
    for (program, args) in [("dualroot-sync", &["--dry-run"][..]), ("dualroot-entries", &[]), ("dualroot-verify", &[])] {
        let Some((status, _, err)) = configured(program, args, "") else { return };
        assert!(status == Some(0) && err.contains("dualroot is not configured"), "{program}: {status:?}: {err}");
    }
    let Some((status, out, _)) = configured("dualroot-status", &[], "") else { return };
    assert!(status == Some(3) && out.contains("dualroot-clone(8)"), "{status:?}: {out}");
}

/// An old file of metrics would still call the spares good.
#[test]
fn metrics_are_written_if_the_disks_are_unknown() {
    for text in ["", CONFIGURATION, "[disk0]\n"] {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("x.prom");
        fs::write(&file, "dualroot_spare_boots{disk=\"disk1\"} 1\n").unwrap();
        let Some((status, _, err)) = configured("dualroot-status", &["--prometheus", file.to_str().unwrap()], text) else {
            return;
        };
        let found = fs::read_to_string(&file).unwrap();
        assert!(status == Some(3) && found.contains("\ndualroot_configured 0\n"), "{text}: {status:?}: {err}{found}");
        assert!(!found.contains("dualroot_spare_boots{"), "{text}: {found}");
    }
}

/// Without a configuration, a dry run needs no root; dualroot-clone's reads the disks anyway.
#[test]
fn dry_runs_go_as_far_as_they_can_without_root() {
    for (program, args, expected, code) in [
        ("dualroot-sync", &["--dry-run"][..], "dualroot is not configured", 0),
        ("dualroot-sync", &["--dry-run", "--boot-next", "disk1"], "dualroot is not configured", 0),
        ("dualroot-entries", &["--dry-run"], "dualroot is not configured", 0),
        ("dualroot-clone", &["--dry-run", "/dev/null"], "only root may read the partitions and file systems of the disks", 3),
    ] {
        if Path::new("/etc/dualroot.conf").exists() {
            return;
        }
        let path = PROGRAMS.iter().find(|(name, _)| *name == program).unwrap().1;
        let (status, said) = as_nobody(path, args);
        assert!(status == Some(code) && said.contains(expected), "{program} {args:?}: {status:?}: {said}");
    }
}
