//! The proof that a spare boots: its files are read again and compared with the booted disk's, whichever program wrote them.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result};

use crate::base::fault::{Code, Fault};
use crate::base::root::Root;
use crate::base::types::{DirPath, Role};
use crate::boot::bootable::Bootable;
use crate::boot::entry;
use crate::boot::files::{BootFiles, Class, fold};
use crate::boot::wanted::WantedFile;
use crate::names::crypttab::may_fail;
use crate::names::ident::Rewriter;
use crate::names::{fstab, unitfile};
use crate::write::change::Content;

/// One boot partition of the spare after the sync, with its wanted files.
pub struct Part<'a> {
    /// [`Role::Esp`] or [`Role::Xbootldr`].
    pub role: Role,
    /// The files that the partition should have.
    pub wanted: &'a [WantedFile],
    /// The files that it has.
    pub found: &'a BootFiles,
}

/// The reasons in its boot partitions why the spare would not boot as the booted disk does; none if it would.
pub fn boot_partitions(parts: &[Part<'_>], rewriter: &Rewriter) -> Vec<Fault> {
    let mut faults = Vec::new();
    for part in parts {
        let fault = |code: Code, path: &str, text: String| {
            Fault::new(code, format!("{}: {path} {text}", part.role)).on(&part.role).at(path)
        };
        for wanted in part.wanted {
            match part.found.files.get(&fold(&wanted.path)) {
                None => faults.push(fault(Code::F10, &wanted.path, "is missing".into())),
                Some(found) if !same(wanted, found) => {
                    faults.push(fault(Code::F37, &wanted.path, "is not what the booted disk has".into()));
                }
                Some(_) => {}
            }
        }
        for file in part.found.of(Class::Entry).chain(part.found.of(Class::LoaderConf)) {
            let text = file.text.as_deref().unwrap_or_default();
            for path in entry::files(text).iter().filter(|p| !part.found.files.contains_key(&fold(p))) {
                faults.push(fault(Code::F32, &file.path, format!("needs {path}, which is missing")));
            }
            faults.extend(rewriter.foreign(text).into_iter().map(|id| fault(Code::F15, &file.path, format!("names {id}"))));
        }
    }
    if !parts.iter().any(|part| Bootable::all(&part.found.files).next().is_some()) {
        faults.push(Fault::new(Code::F09, "there is no boot loader entry"));
    }
    let fallback = |p: &Part<'_>| p.role == Role::Esp && p.found.files.keys().any(|k| k.starts_with("efi/boot/boot"));
    if !parts.iter().any(fallback) {
        faults.push(Fault::new(Code::F35, "esp: EFI/BOOT holds no boot loader").on(&Role::Esp).at("EFI/BOOT"));
    }
    faults
}

fn same(wanted: &WantedFile, found: &crate::boot::files::BootFile) -> bool {
    match (&wanted.content, &found.text) {
        // Texts are padded with newlines.
        (Content::Bytes(text), Some(found)) => text.trim_ascii_end() == found.trim_ascii_end(),
        _ => wanted.hash == found.hash,
    }
}

/// The fault of the first unit of a root that can't be rewritten.
///
/// # Errors
/// A directory that can't be read.
pub fn named_unit(root: &Root, rewriter: &Rewriter) -> Result<Option<Fault>> {
    Ok(unitfile::files(root).context("units can't be read")?.iter().find_map(|path| unit_name(path, rewriter)))
}

/// The fault of a unit that can't be rewritten, because its own name contains that of a disk.
fn unit_name(path: &str, rewriter: &Rewriter) -> Option<Fault> {
    let names = unitfile::foreign_ids_in_name(path, rewriter);
    let fault = || {
        let text = format!("{path} has {} in its name, and so can't be adapted to each disk", names.join(", "));
        Fault::new(Code::F13, text)
            .at(path)
            .remedy("remove it, and use a line of /etc/fstab instead (or for swap space, swap= in dualroot.conf)")
    };
    (!names.is_empty()).then(fault)
}

/// The reasons in files of its root why the spare would not boot. `files` are by path in the running system. A unit for a mount point for
/// which `keep` is true names another disk on purpose.
pub fn root_files(files: &BTreeMap<String, Vec<u8>>, rewriter: &Rewriter, keep: impl Fn(&DirPath) -> bool) -> Vec<Fault> {
    let of_file = |(path, text): (&String, &Vec<u8>)| root_file(path, text, rewriter, &keep);
    files.iter().flat_map(of_file).collect()
}

fn root_file(path: &str, text: &[u8], rewriter: &Rewriter, keep: impl Fn(&DirPath) -> bool) -> Vec<Fault> {
    let fault = |code: Code, text: String| Fault::new(code, format!("{path} {text}")).on(&Role::Root).at(path);
    if path.starts_with("/etc/crypttab") {
        // A device that the boot doesn't wait for may be on another disk.
        let lines = text.split(|b| *b == b'\n').filter(|line| !may_fail(line));
        let names: BTreeSet<String> = lines.flat_map(|line| rewriter.foreign(line)).collect();
        let hint =
            "a line that the boot does not need has nofail, and names a partition by its PARTUUID= if it makes swap space of it";
        names.into_iter().map(|id| fault(Code::F13, format!("names {id}")).remedy(hint)).collect()
    } else if path == "/etc/fstab" {
        let lines = fstab::foreign_ids_needed_at_boot(text, rewriter);
        let of_line = |line| fault(Code::F14, format!("would make the boot wait for another disk: {line}"));
        let hint = "name the partition in dualroot.conf, or give the line nofail";
        lines.into_iter().map(|line| of_line(line).remedy(hint)).collect()
    } else if let Some(fault) = unit_name(path, rewriter) {
        vec![fault.on(&Role::Root)]
    } else if let Some(dir) = unitfile::mount_point(path) {
        let names = rewriter.foreign(text);
        // Again, a device that the boot doesn't wait for may be on another disk.
        if names.is_empty() || keep(&dir) || unitfile::may_fail(text) {
            return Vec::new();
        }
        let text = format!("would make the boot wait for another disk: it names {}", names.join(", "));
        vec![fault(Code::F14, text).remedy("name the partition in dualroot.conf, remove the unit, or give its Options= nofail")]
    } else {
        rewriter.foreign(text).into_iter().map(|id| fault(Code::F13, format!("names {id}"))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::fault::tests::codes;
    use crate::names::ident::tests::{ROOT_A, ROOT_B, to_b};

    fn faults(name: &str, text: &str) -> Vec<Fault> {
        let spares = DirPath::parse("/mnt/root1").unwrap();
        let files = BTreeMap::from([(format!("/etc/systemd/system/{name}"), text.as_bytes().to_vec())]);
        root_files(&files, &to_b(), |dir| dir.is_within(&spares))
    }

    #[test]
    fn f14_a_mount_unit_that_needs_another_disk() {
        let what = |uuid: &str| format!("[Mount]\nWhat=/dev/disk/by-uuid/{uuid}\n");
        for (name, text, expected) in [
            ("home.mount", what(ROOT_A), &[Code::F14][..]),
            ("home.mount.d/a.conf", what(ROOT_A), &[Code::F14]),
            ("-.mount", what(ROOT_A) + "Options=nofail\n", &[Code::F13]),
            ("home.mount", what(ROOT_B), &[]),
            ("home.mount", what(ROOT_A) + "Options=noatime,nofail\n", &[]),
            ("mnt-root1-home.mount", what(ROOT_A), &[]),
            ("mnt-root1.mount.d/a.conf", what(ROOT_A), &[]),
        ] {
            let faults = faults(name, &text);
            assert_eq!(codes(&faults), expected, "{name} {text} {faults:?}");
            let path = format!("/etc/systemd/system/{name}");
            assert!(faults.iter().all(|fault| fault.path.as_ref() == Some(&path) && fault.text.contains(ROOT_A)), "{faults:?}");
        }
    }

    #[test]
    fn f13_the_name_of_a_swap_unit_names_its_disk() {
        let by_uuid = |uuid: &str| format!("dev-disk-by\\x2duuid-{}.swap", uuid.replace('-', "\\x2d"));
        let names =
            [by_uuid(ROOT_A), by_uuid("AAAA-0001"), "dev-sda2.swap".into(), "dev-disk-by\\x2dlabel-root.swap.d/a.conf".into()];
        for name in names {
            for text in ["", "[Swap]\nWhat=/dev/sda2\nOptions=nofail\n"] {
                let faults = faults(&name, text);
                assert_eq!(codes(&faults), [Code::F13], "{name} {faults:?}");
            }
        }
        for name in [&by_uuid(ROOT_B), "dev-sdb2.swap", "dev-zram0.swap", "swapfile.swap"] {
            assert_eq!(faults(name, "[Swap]\nWhat=/dev/sdb2\n"), [], "{name}");
        }
        assert_eq!(faults("dev-zram0.swap", "[Unit]\nAfter=dev-sda2.device\n").len(), 1);
    }
}
