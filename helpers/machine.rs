//! The machine as a oneshot finds it: which disk was booted, what is mounted, which spares are there. Everything that is refused
//! before anything is written is refused here.

use std::fmt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::conf::{Config, Disk, Layout};
use crate::efi::{self, EfiVars};
use crate::entry::Titles;
use crate::ident::{DiskIds, Rewriter};
use crate::idstore;
use crate::inventory::Inventory;
use crate::mounts::{self, Mount};
use crate::root::Root;
use crate::types::DirPath;

/// An error that means: nothing was written, because something is not as it has to be. It makes exit status 3.
#[derive(Debug)]
pub struct Refused(String);

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Refused {}

/// A refusal with its one sentence.
pub fn refused(sentence: impl Into<String>) -> anyhow::Error {
    anyhow::Error::new(Refused(sentence.into()))
}

/// What is known about the running system before a decision.
pub struct Machine {
    /// The system's root.
    pub root: Root,
    /// The configuration.
    pub config: Config,
    /// The booted disk.
    pub booted: Disk,
    /// The partitions that are there.
    pub inventory: Inventory,
    /// The names of all disks, those that are absent as they were when last seen.
    pub ids: Vec<DiskIds>,
}

impl Machine {
    /// Looks at the machine; None where dualroot isn't configured.
    ///
    /// # Errors
    /// [`Refused`] for whatever makes it unsure which disk is which.
    pub fn look() -> Result<Option<Self>> {
        let root = Root::new("/");
        let Some(config) = Config::load(&root).map_err(|e| refused(format!("{e:#}")))? else { return Ok(None) };
        let vars =
            EfiVars::open(&root).ok_or_else(|| refused("the machine was not booted by UEFI firmware; nothing was done"))?;
        let esp = efi::booted_esp(&vars).map_err(|e| refused(format!("the booted disk is unknown: {e:#}")))?;
        let booted = config.booted(&esp).cloned().ok_or_else(|| {
            refused(format!(
                "the ESP that was booted, PARTUUID {esp}, is in no section of the configuration; add it to dualroot.conf"
            ))
        })?;
        let mut machine = Self { root, config, booted, inventory: Inventory::default(), ids: Vec::new() };
        machine.look_again()?;
        Ok(Some(machine))
    }

    /// Looks at the partitions and mounts as they are now.
    ///
    /// # Errors
    /// As [`Machine::look`].
    pub fn look_again(&mut self) -> Result<()> {
        self.inventory = Inventory::read()?;
        self.inventory.check_unique(&self.config).map_err(|e| refused(format!("{e:#}")))?;
        let now = self.config.disks.iter().map(|disk| self.inventory.ids(&self.config, disk)).collect::<Result<Vec<_>>>();
        self.ids = idstore::complete(&self.root, now.map_err(|e| refused(format!("{e:#}")))?)?;
        self.check_mounts(&mounts::table()?)
    }

    /// Every partition of the booted disk that is copied is mounted where it belongs: a kernel that was installed into a /boot on
    /// which nothing is mounted is not where anybody looks for it (failure mode 5).
    fn check_mounts(&self, table: &[Mount]) -> Result<()> {
        let trees = self.booted.parts.iter().filter_map(|(role, part)| {
            let at = role.tree()?;
            Some((role.clone(), *part, PathBuf::from(if at.is_empty() { "/" } else { at })))
        });
        let boot = self.booted.boot_places().into_iter().map(|(role, part, dir)| (role, part, PathBuf::from(dir.as_str())));
        for (role, partuuid, dir) in trees.chain(boot) {
            let name = self.booted.name;
            let found = self.inventory.find(&partuuid).map_err(|e| refused(format!("{e:#}")))?;
            let part = found.ok_or_else(|| {
                refused(format!("{name} was booted, but its {role}= partition {partuuid} isn't there; correct the configuration"))
            })?;
            match mounts::at(table, &dir) {
                Some(mount) if mount.is_on(part) && mount.root == "/" => {}
                // A btrfs subvolume, or a directory that is bound there. What the boot finds by its path isn't where it was.
                Some(mount) if mount.is_on(part) => {
                    return Err(refused(format!(
                        "{name} was booted, but {} is only {} of its {role}= partition {}; dualroot copies whole file systems, so mount \
                         that without subvol= and without bind",
                        dir.display(),
                        mount.root,
                        part.path
                    )));
                }
                Some(mount) => {
                    return Err(refused(format!(
                        "{name} was booted, but {} is {} and not its {role}= partition {}; mount that there",
                        dir.display(),
                        mount.source,
                        part.path
                    )));
                }
                None => {
                    return Err(refused(format!(
                        "{name} was booted, but nothing is mounted on {}; mount its {role}= partition {} there \
                         ('systemctl daemon-reload' and 'systemctl start local-fs.target' have the generator's mounts made)",
                        dir.display(),
                        part.path
                    )));
                }
            }
        }
        Ok(())
    }

    /// Where the booted disk's boot partitions are mounted.
    pub fn boot_dirs(&self) -> Vec<PathBuf> {
        self.booted.boot_places().into_iter().map(|(_, _, dir)| Path::new(dir.as_str()).to_owned()).collect()
    }

    /// The rewriter for one disk of the pair.
    ///
    /// # Errors
    /// [`Refused`] for identifiers that can't be told apart.
    pub fn rewriter(&self, target: &Disk) -> Result<Rewriter> {
        let of = |disk: &&DiskIds| disk.name == target.name;
        let target = self.ids.iter().find(of).with_context(|| format!("{} has no identifiers", target.name))?;
        let others: Vec<DiskIds> = self.ids.iter().filter(|d| d.name != target.name).cloned().collect();
        Rewriter::new(target, &others).map_err(|e| refused(format!("{e:#}")))
    }

    /// The prefixes of menu titles, for one disk of the pair.
    pub fn titles(&self, target: &Disk) -> Titles {
        Titles { own: target.title.clone(), all: self.config.disks.iter().filter_map(|d| d.title.clone()).collect() }
    }

    /// Whether an fstab line that mounts something at `dir` is about another disk on purpose: a spare's place, or an ESP's.
    pub fn is_apart(&self, dir: &DirPath) -> bool {
        let spares = self.config.spares(&self.booted);
        spares.iter().any(|(at, _)| dir.is_within(at)) || self.config.disks.iter().any(|d| d.esp_mountpoint.as_ref() == Some(dir))
    }

    /// Whether each disk has a root of its own.
    pub fn own_roots(&self) -> bool {
        matches!(self.config.layout(), Layout::OwnRoots)
    }
}
