//! What the generator goes by: the configuration, the booted disk, and what others mount.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;

use anyhow::{Context, Result};
use dualroot::base::root::Root;
use dualroot::base::types::{DirPath, DiskName};
use dualroot::boot::efi::{self, EfiVars};
use dualroot::conf::{Config, Layout};
use dualroot::names::fstab;

use crate::log::Level;

/// Where administrators and programs put units that come before a generator's.
const UNIT_DIRS: [&str; 2] = ["/etc/systemd/system", "/run/systemd/system"];

/// The databases of package managers: they change whenever programs do.
const PACKAGE_DIRS: [&str; 4] = ["/var/lib/dpkg", "/var/lib/rpm", "/var/lib/pacman/local", "/usr/lib/sysimage/rpm"];

/// What was found.
pub enum Found {
    /// There is nothing to do: why, and how much that matters.
    Reason(Level, String),
    /// What a plan is made of.
    Facts(Box<Facts>),
}

/// What a plan is made of.
#[derive(Clone, Debug)]
pub struct Facts {
    /// The configuration.
    pub config: Config,
    /// The disk that was booted; it is one of the configuration's.
    pub booted: DiskName,
    /// Where fstab mounts something.
    pub fstab: BTreeSet<DirPath>,
    /// Whether fstab has any swap space.
    pub fstab_swap: bool,
    /// The names of mount units that come before ours, with their directories.
    pub units: BTreeMap<String, &'static str>,
    /// The directory that kernel-install(8) names after the installation, on the boot partition.
    pub entry_token: Option<String>,
    /// Directories in which package managers note what they did.
    pub package_dirs: Vec<DirPath>,
}

/// Reads everything. What says that the generator doesn't apply comes first: a configuration with faults is none of a container's
/// business.
///
/// # Errors
/// An invalid configuration; files that can't be read.
pub fn read(root: &Root, env: impl Fn(&str) -> Option<OsString>) -> Result<Found> {
    let config = match Config::load(root) {
        Ok(None) => return Ok(Found::Reason(Level::Debug, "not configured".to_owned())),
        config => config,
    };
    if let Some(reason) = elsewhere(root, env) {
        return Ok(Found::Reason(Level::Info, reason.to_owned()));
    }
    let Some(config) = config.context("invalid configuration, no units")? else {
        return Ok(Found::Reason(Level::Debug, "not configured".to_owned()));
    };
    let Some(vars) = EfiVars::open(root) else {
        return Ok(Found::Reason(Level::Info, "not booted by EFI".to_owned()));
    };
    let esp = match efi::booted_esp(&vars) {
        Ok(esp) => esp,
        Err(e) => return Ok(Found::Reason(Level::Warning, format!("the booted disk is unknown: {e:#}"))),
    };
    let Some(booted) = config.booted(&esp).map(|disk| disk.name) else {
        let reason = format!("the booted disk is unknown: its ESP {esp} is the esp= of no section in {}", config.source);
        return Ok(Found::Reason(Level::Warning, reason));
    };

    let fstab = root.read_opt("/etc/fstab").context("can't read /etc/fstab, no units")?.unwrap_or_default();
    let mut units = BTreeMap::new();
    for dir in UNIT_DIRS.iter().rev() {
        for name in root.names(dir).with_context(|| format!("can't list {dir}, no units"))? {
            if let Some(name) = name.to_str().filter(|name| name.ends_with(".mount")) {
                units.insert(name.to_owned(), *dir);
            }
        }
    }
    let fstab_swap = fstab::lines(&fstab).any(|line| line.is_swap());
    let fstab: BTreeSet<DirPath> = fstab::lines(&fstab).filter_map(|line| line.dir()).collect();
    Ok(Found::Facts(Box::new(Facts {
        package_dirs: package_dirs(root, &config, booted, &fstab)?,
        booted,
        fstab,
        fstab_swap,
        units,
        entry_token: entry_token(root),
        config,
    })))
}

/// The directories of package managers that are there, and those that may be once all is mounted: at boot, it isn't yet.
fn package_dirs(root: &Root, config: &Config, booted: DiskName, fstab: &BTreeSet<DirPath>) -> Result<Vec<DirPath>> {
    if config.layout() == Layout::SharedRoot {
        return Ok(Vec::new());
    }
    let mut mounted = fstab.clone();
    for disk in config.disks.iter().filter(|disk| disk.name == booted) {
        let trees = disk.parts.keys().filter_map(|role| role.tree()).filter(|tree| !tree.is_empty());
        mounted.extend(trees.map(DirPath::parse).collect::<Result<Vec<_>>>()?);
    }
    let dirs = PACKAGE_DIRS.into_iter().map(DirPath::parse).collect::<Result<Vec<_>>>()?;
    let counts = |dir: &DirPath| root.path(dir.as_str()).is_dir() || mounted.iter().any(|place| dir.is_within(place));
    Ok(dirs.into_iter().filter(counts).collect())
}

/// Why this is not the system that dualroot takes care of.
fn elsewhere(root: &Root, env: impl Fn(&str) -> Option<OsString>) -> Option<&'static str> {
    let is = |name: &str, value: &str| env(name).is_some_and(|text| text == value);
    if is("SYSTEMD_SCOPE", "user") {
        Some("run by a user's service manager")
    } else if is("SYSTEMD_IN_INITRD", "1") || root.exists("/etc/initrd-release") {
        Some("in the initrd")
    } else if env("SYSTEMD_VIRTUALIZATION").is_some_and(|text| text.as_encoded_bytes().starts_with(b"container:"))
        || root.exists("/run/systemd/container")
    {
        Some("in a container")
    } else {
        None
    }
}

/// The name that kernel-install(8) gives this installation's directory: what /etc/kernel/entry-token says, or the machine id.
fn entry_token(root: &Root) -> Option<String> {
    let first_line = |path: &str| {
        let text = root.read_opt(path).ok()??;
        let line = text.split(|b| *b == b'\n').next()?.trim_ascii();
        String::from_utf8(line.to_vec()).ok()
    };
    // It becomes a part of a path in a unit: letters, digits and a few signs are all that bootctl(1) makes it of.
    let plain = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'-' | b'_' | b'.');
    let token = first_line("/etc/kernel/entry-token");
    let token = token.filter(|text| !text.is_empty() && !text.starts_with('.') && text.len() < 256 && text.bytes().all(plain));
    let machine = || first_line("/etc/machine-id").filter(|id| id.len() == 32 && id.bytes().all(|c| c.is_ascii_hexdigit()));
    token.or_else(machine)
}
