//! Turns a plan into files (systemd units, drop-ins and links), and writes them.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::io::{ErrorKind, Write};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use dualroot::base::types::{DirPath, PartUuid, UnitName};

use crate::plan::{Mount, MountPlan, PartitionKind};

/// The first line of every file.
const HEAD: &str = "# Made by dualroot-generator(8) at every boot and daemon-reload.\n\n";

/// Mount options for FAT, which has neither owners nor time zones; after an error it becomes read-only.
const FAT: &str = "umask=0077,utf8,tz=UTC,errors=remount-ro";

/// The content of a file below the generator's directory.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum UnitContent {
    /// The text of a regular file.
    Text(String),
    /// The target of a symbolic link.
    Link(String),
}

/// All files of a plan, by their paths below the generator's directory.
///
/// # Errors
/// systemd doesn't allow the name of a unit.
pub fn files(plan: &MountPlan) -> Result<BTreeMap<String, UnitContent>> {
    let mut files = BTreeMap::new();
    let mut devices = BTreeSet::new();
    for mount in &plan.mounts {
        let unit = UnitName::from_path(&mount.place, "mount")?;
        let device = UnitName::device(&mount.part)?;
        files.insert(unit.to_string(), UnitContent::Text(mount_unit(mount, &plan.source)?));
        let mut wants = vec!["local-fs.target".to_owned()];
        if !mount.booted {
            // Starts the mount when the spare is plugged in later.
            wants.push(device.to_string());
        }
        for by in wants {
            files.insert(format!("{by}.wants/{unit}"), UnitContent::Link(format!("../{unit}")));
        }
        if !mount.booted {
            devices.insert((device, None));
        }
        if mount.luks {
            devices.insert((mapping_device(&mount.part)?, Some(UnitName::luks(&mount.part)?)));
        }
    }
    if let Some((part, description)) = &plan.swap {
        let unit = UnitName::from_path(&DirPath::parse(&part.device_path())?, "swap")?;
        let mut text = head(description, &plan.source);
        let _ = write!(text, "\n[Swap]\nWhat={}\n", part.device_path());
        files.insert(unit.to_string(), UnitContent::Text(text));
        files.insert(format!("swap.target.wants/{unit}"), UnitContent::Link(format!("../{unit}")));
    }
    for (device, maker) in devices {
        // For spares only: a short time-out for the booted disk could fail the boot. The name sorts before 50-device-timeout.conf, the
        // drop-in for x-systemd.device-timeout= of fstab, which must win.
        let timeout = time_span(plan.device_timeout);
        let mut text = format!("{HEAD}[Unit]\nJobRunningTimeoutSec={timeout}\n");
        if let Some(maker) = maker {
            // The time-out runs only after the container's service has ended.
            let _ = writeln!(text, "After={maker}");
        }
        files.insert(format!("{device}.d/40-dualroot.conf"), UnitContent::Text(text));
    }
    for mask in &plan.masks {
        files.insert(mask.to_string(), UnitContent::Link("/dev/null".to_owned()));
    }
    let mut text = format!("{HEAD}[Path]\nPathChanged=\n");
    for path in &plan.watched {
        let _ = writeln!(text, "PathChanged={}", path_value(path));
    }
    files.insert("dualroot-entries.path.d/50-dualroot.conf".to_owned(), UnitContent::Text(text));
    Ok(files)
}

/// The text of a mount unit.
fn mount_unit(mount: &Mount, source: &str) -> Result<String> {
    let mut text = head(&mount.description, source);
    let device = UnitName::device(&mount.part)?;
    let node = if mount.luks { mount.part.mapping() } else { mount.part.device_path() };
    if mount.booted {
        // Wanted, not required, so that boot goes on without it. The usual device time-out applies.
        text.push_str("Before=local-fs.target\n");
        // The initrd has checked and mounted /usr; a check now would be of a file system in use.
        if mount.bound_from.is_none() && mount.place.as_str() != "/usr" {
            let fsck = fsck(&mount.part)?;
            let _ = write!(text, "Wants={fsck}\nAfter={fsck}\n");
        }
    } else {
        // Unmounts the file system when the disk is pulled.
        let _ = write!(text, "BindsTo={device}\nAfter={device}\n");
        if mount.luks {
            let container = UnitName::luks(&mount.part)?;
            let _ = write!(text, "Requires={container}\nAfter={container}\n");
        }
        if mount.needs_mount_point {
            let _ = writeln!(text, "ConditionPathIsDirectory={}", path_value(&mount.place));
        }
    }
    text.push_str("\n[Mount]\n");
    let mut options = Vec::new();
    match &mount.bound_from {
        Some(dir) => {
            let _ = writeln!(text, "What={}", path_value(dir));
            options.push("bind");
        }
        None => {
            let _ = writeln!(text, "What={node}");
        }
    }
    let _ = writeln!(text, "Where={}", path_value(&mount.place));
    if !mount.booted {
        // nofail: systemd doesn't order the mount before local-fs.target.
        options.extend(["ro", "nofail", "nosuid", "nodev"]);
    }
    if mount.kind != PartitionKind::Tree {
        options.extend(if mount.booted { &["nosuid", "nodev", "noexec"][..] } else { &["noexec"] });
    }
    match (mount.kind, &mount.bound_from) {
        (_, Some(_)) => text.push_str("Type=none\n"),
        (PartitionKind::Esp, None) => {
            text.push_str("Type=vfat\n");
            options.push(FAT);
        }
        _ => {}
    }
    if !options.is_empty() {
        let _ = writeln!(text, "Options={}", options.join(","));
    }
    if !mount.booted {
        // Open files on a pulled disk don't keep it mounted.
        text.push_str("LazyUnmount=yes\n");
    }
    Ok(text)
}

/// The device unit of an open container's mapping.
fn mapping_device(part: &PartUuid) -> Result<UnitName> {
    UnitName::from_path(&DirPath::parse(&part.mapping())?, "device")
}

/// The beginning of every unit.
fn head(description: &str, source: &str) -> String {
    let (description, source) = (percent(description), percent(source));
    format!("{HEAD}[Unit]\nDescription={description}\nDocumentation=man:dualroot-generator(8)\nSourcePath={source}\n")
}

/// The service that checks a partition's file system.
fn fsck(part: &PartUuid) -> Result<String> {
    let instance = UnitName::from_path(&DirPath::parse(&part.device_path())?, "service")?;
    Ok(format!("systemd-fsck@{instance}"))
}

/// Escapes percent signs, which would begin a specifier.
fn percent(text: &str) -> String {
    text.replace('%', "%%")
}

/// A path as a value in a unit. A slash is added after a final blank, which would be dropped, or backslash, which would join the next line.
fn path_value(path: &DirPath) -> String {
    let mut text = percent(path.as_str());
    if text.ends_with([' ', '\\']) {
        text.push('/');
    }
    text
}

/// A time in systemd's notation.
fn time_span(micros: u128) -> String {
    match micros {
        _ if micros.is_multiple_of(1_000_000) => format!("{}s", micros / 1_000_000),
        _ if micros.is_multiple_of(1_000) => format!("{}ms", micros / 1_000),
        _ => format!("{micros}us"),
    }
}

/// Writes the files below the generator's directory. An existing file stays; if its content differs, another generator made it, and that
/// is an error.
///
/// # Errors
/// The first file that can't be written; the others are still written.
pub fn write(dir: &Path, files: &BTreeMap<String, UnitContent>) -> Result<()> {
    let mut failed = 0;
    let mut first = None;
    for (path, content) in files {
        if let Err(e) = write_file(&dir.join(path), content) {
            failed += 1;
            first.get_or_insert(e);
        }
    }
    match (first, failed) {
        (None, _) => Ok(()),
        (Some(e), 1) => Err(e),
        (Some(e), _) => Err(e.context(format!("{failed} of {} units can't be written; the first one", files.len()))),
    }
}

fn write_file(path: &PathBuf, content: &UnitContent) -> Result<()> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).with_context(|| format!("can't make the directory {}", parent.display()))?;
    }
    let made = match content {
        UnitContent::Link(target) => symlink(target, path),
        UnitContent::Text(text) => {
            fs::OpenOptions::new().write(true).create_new(true).open(path).and_then(|mut file| {
                // A missing unit is better than half of one.
                file.write_all(text.as_bytes()).inspect_err(|_| drop(fs::remove_file(path)))
            })
        }
    };
    match made {
        Err(e) if e.kind() == ErrorKind::AlreadyExists => {
            let same = match content {
                UnitContent::Link(target) => fs::read_link(path).is_ok_and(|found| found == Path::new(target)),
                UnitContent::Text(text) => {
                    fs::symlink_metadata(path).is_ok_and(|meta| meta.is_file())
                        && fs::read(path).is_ok_and(|found| found == text.as_bytes())
                }
            };
            if !same {
                bail!("can't write {}: another generator made it", path.display());
            }
            Ok(())
        }
        made => made.with_context(|| format!("can't write {}", path.display())),
    }
}
