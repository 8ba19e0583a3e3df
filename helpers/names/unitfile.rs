//! Mount and swap units of the administrator, and their drop-ins (systemd.mount(5), systemd.swap(5)): like lines of fstab(5), they name
//! disks. Automount units name none.

use std::path::Path;
use std::{fs, io};

use crate::base::root::Root;
use crate::base::types::DirPath;
use crate::names::ident::Rewriter;

/// The directory of the administrator's units.
const DIR: &str = "/etc/systemd/system";

/// The paths of existing units and drop-ins. Symbolic links aren't followed: they are aliases, masks, or files of other packages.
///
/// # Errors
/// A directory can't be read.
pub fn files(root: &Root) -> io::Result<Vec<String>> {
    let mut paths = Vec::new();
    let is_unit = |name: &str| name.ends_with(".mount") || name.ends_with(".swap");
    for name in names(root, DIR)? {
        let path = format!("{DIR}/{name}");
        if is_unit(&name) {
            paths.push(path);
        } else if name.strip_suffix(".d").is_some_and(is_unit) {
            let confs = names(root, &path)?.into_iter().filter(|name| name.ends_with(".conf"));
            paths.extend(confs.map(|conf| format!("{path}/{conf}")));
        }
    }
    paths.retain(|path| fs::symlink_metadata(root.path(path)).is_ok_and(|meta| meta.is_file()));
    Ok(paths)
}

/// The names in a directory; empty if a symbolic link leads to it.
fn names(root: &Root, dir: &str) -> io::Result<Vec<String>> {
    let mut steps = Path::new(dir).ancestors().filter(|step| step.parent().is_some());
    match steps.all(|step| fs::symlink_metadata(root.path(step)).is_ok_and(|meta| meta.is_dir())) {
        true => Ok(root.names(dir)?.into_iter().filter_map(|name| name.into_string().ok()).collect()),
        false => Ok(Vec::new()),
    }
}

/// The unit's name for a path of [`files`], also for a drop-in's path.
fn name(path: &str) -> Option<&str> {
    let name = path.strip_prefix(DIR)?.strip_prefix('/')?.split('/').next()?;
    Some(name.strip_suffix(".d").unwrap_or(name))
}

/// The mount point of the mount unit at this path, from its name: systemd requires `Where=` to be the same, and drop-ins may lack it.
pub fn mount_point(path: &str) -> Option<DirPath> {
    let mut parts = name(path)?.strip_suffix(".mount")?.split("\\x");
    let mut dir = format!("/{}", parts.next()?.replace('-', "/")).into_bytes();
    for part in parts {
        let (hex, rest) = part.split_at_checked(2)?;
        dir.push(u8::from_str_radix(hex, 16).ok()?);
        dir.extend(rest.replace('-', "/").bytes());
    }
    DirPath::parse(std::str::from_utf8(&dir).ok()?).ok()
}

/// The identifiers of other disks in the unit's name. Such a unit can't be rewritten, because systemd requires a swap unit's name to match
/// its `What=`.
pub fn foreign_ids_in_name(path: &str, rewriter: &Rewriter) -> Vec<String> {
    name(path).map(|name| rewriter.foreign(name.as_bytes())).unwrap_or_default()
}

/// Whether boot can do without a mount unit: it has the option `nofail`, as in fstab.
pub fn may_fail(text: &[u8]) -> bool {
    let text = String::from_utf8_lossy(text);
    let mut options = text.lines().filter_map(|line| line.split_once('=')).filter(|(key, _)| key.trim() == "Options");
    options.next_back().is_some_and(|(_, options)| options.trim().split(',').any(|option| option == "nofail"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn f26_a_mount_units_name_gives_its_mount_point() {
        for (name, expected) in [
            ("home.mount", Some("/home")),
            ("mnt-root1-boot.mount", Some("/mnt/root1/boot")),
            ("mnt-root1-boot.mount.d/a.conf", Some("/mnt/root1/boot")),
            ("srv-my\\x2ddata.mount", Some("/srv/my-data")),
            ("srv-\\xc3\\xa4-b\\x20c.mount", Some("/srv/ä/b c")),
            ("-.mount", None),
            ("a-..-b.mount", None),
            ("a\\x.mount", None),
            ("a\\xzz.mount", None),
            ("a\\xää.mount", None),
            ("a\\xff.mount", None),
            ("a\\x0ab.mount", None),
            ("dev-sda2.swap", None),
        ] {
            assert_eq!(mount_point(&format!("{DIR}/{name}")).as_ref().map(DirPath::as_str), expected, "{name}");
        }
        assert_eq!(mount_point("/etc/fstab"), None);
        for path in ["/home", "/srv/my-data", "/.a/b.c", "/a b/ä:_"] {
            let unit = crate::base::types::UnitName::from_path(&DirPath::parse(path).unwrap(), "mount").unwrap();
            assert_eq!(mount_point(&format!("{DIR}/{unit}")).unwrap().as_str(), path);
        }
    }

    #[test]
    fn f14_boot_does_not_wait_for_a_mount_unit_with_nofail() {
        for (text, expected) in [
            ("[Mount]\nWhat=x\nOptions=noatime,nofail\n", true),
            ("[Mount]\r\n Options = nofail \r\n", true),
            ("[Mount]\nOptions=noatime\n", false),
            ("[Mount]\nOptions=nofail\nOptions=noatime\n", false),
            ("[Mount]\nOptions=xnofail\n#Options=nofail\nXOptions=nofail\n", false),
            ("", false),
        ] {
            assert_eq!(may_fail(text.as_bytes()), expected, "{text}");
        }
    }
}
