//! The facts for a plan: the configuration, the booted disk, and the mounts of fstab and of other units.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;

use anyhow::{Context, Result};
use dualroot::base::log::Level;
use dualroot::base::root::Root;
use dualroot::base::types::{DirPath, DiskName};
use dualroot::boot::efi::{self, EfiVars};
use dualroot::conf::{Config, Layout};
use dualroot::names::fstab;

/// The directories of units that have precedence over a generator's.
const UNIT_DIRS: [&str; 2] = ["/etc/systemd/system", "/run/systemd/system"];

/// The databases of package managers, which change with every installed package.
const PACKAGE_DIRS: [&str; 4] = ["/var/lib/dpkg", "/var/lib/rpm", "/var/lib/pacman/local", "/usr/lib/sysimage/rpm"];

/// The facts, or the reason why there is nothing to do.
pub enum FactsOrReason {
    /// There is nothing to do, for this reason, which is logged at this level.
    Reason(Level, String),
    /// The facts for a plan.
    Facts(Box<Facts>),
}

/// The facts for a plan.
#[derive(Clone, Debug)]
pub struct Facts {
    /// The configuration.
    pub config: Config,
    /// The booted disk, which is in the configuration.
    pub booted: DiskName,
    /// The mount points in fstab.
    pub fstab: BTreeSet<DirPath>,
    /// Whether fstab names swap space.
    pub fstab_swap: bool,
    /// The names of mount units that have precedence over ours, with their directories.
    pub units: BTreeMap<String, &'static str>,
    /// The name of the directory on the boot partition that kernel-install(8) uses for this installation.
    pub entry_token: Option<String>,
    /// The directories of package managers' databases.
    pub package_dirs: Vec<DirPath>,
}

/// Reads the facts. Whether the generator applies is decided before the configuration is judged, because in a container its faults don't
/// matter.
///
/// # Errors
/// The configuration is invalid; a file can't be read.
pub fn read(root: &Root, env: impl Fn(&str) -> Option<OsString>, mut warn: impl FnMut(&str)) -> Result<FactsOrReason> {
    let config = match Config::load(root) {
        Ok(None) => return Ok(FactsOrReason::Reason(Level::Debug, "not configured".to_owned())),
        config => config,
    };
    if let Some(reason) = elsewhere(root, env) {
        return Ok(FactsOrReason::Reason(Level::Info, reason.to_owned()));
    }
    let Some(config) = config.context("no mount units are made, because the configuration is invalid")? else {
        return Ok(FactsOrReason::Reason(Level::Debug, "not configured".to_owned()));
    };
    // A typo may be the reason for whatever is found from here on.
    config.warnings.iter().for_each(|warning| warn(warning));
    let Some(vars) = EfiVars::open(root) else {
        return Ok(FactsOrReason::Reason(Level::Info, "not booted by EFI".to_owned()));
    };
    let esp = match efi::booted_esp(&vars) {
        Ok(esp) => esp,
        Err(e) => return Ok(FactsOrReason::Reason(Level::Warning, format!("the booted disk is unknown: {e:#}"))),
    };
    let Some(booted) = config.booted(&esp).map(|disk| disk.name) else {
        let reason = format!("the booted disk is unknown: no section in {} has esp={esp}", config.source);
        return Ok(FactsOrReason::Reason(Level::Warning, reason));
    };

    let fstab =
        root.read_opt("/etc/fstab").context("no mount units are made, because /etc/fstab can't be read")?.unwrap_or_default();
    let mut units = BTreeMap::new();
    for dir in UNIT_DIRS.iter().rev() {
        for name in root.names(dir).with_context(|| format!("no mount units are made, because {dir} can't be listed"))? {
            if let Some(name) = name.to_str().filter(|name| name.ends_with(".mount")) {
                units.insert(name.to_owned(), *dir);
            }
        }
    }
    let fstab_swap = fstab::lines(&fstab).any(|line| line.is_swap());
    let fstab: BTreeSet<DirPath> = fstab::lines(&fstab).filter_map(|line| line.dir()).collect();
    Ok(FactsOrReason::Facts(Box::new(Facts {
        package_dirs: package_dirs(root, &config, booted, &fstab)?,
        booted,
        fstab,
        fstab_swap,
        units,
        entry_token: entry_token(root),
        config,
    })))
}

/// The directories of package managers' databases that exist, or that are on a file system which isn't mounted yet at boot.
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

/// The reason why this is not the system that dualroot is configured for; None if it is.
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

/// The name of kernel-install(8)'s directory for this installation: from /etc/kernel/entry-token, or else the machine id.
fn entry_token(root: &Root) -> Option<String> {
    let first_line = |path: &str| {
        let text = root.read_opt(path).ok()??;
        let line = text.split(|b| *b == b'\n').next()?.trim_ascii();
        String::from_utf8(line.to_vec()).ok()
    };
    // It becomes part of a path in a unit. bootctl(1) makes it of letters, digits and a few signs only.
    let plain = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'-' | b'_' | b'.');
    let token = first_line("/etc/kernel/entry-token");
    let token = token.filter(|text| !text.is_empty() && !text.starts_with('.') && text.len() < 256 && text.bytes().all(plain));
    let machine = || first_line("/etc/machine-id").filter(|id| id.len() == 32 && id.bytes().all(|c| c.is_ascii_hexdigit()));
    token.or_else(machine)
}
