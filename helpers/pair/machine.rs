//! The machine as a oneshot finds it: which disk was booted, what is mounted, which spares are there. Everything that is refused
//! before anything is written is refused here.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::base::refusal::refused;
use crate::base::root::Root;
use crate::base::types::{DirPath, PartUuid, Role};
use crate::boot::efi::{self, EfiVars};
use crate::boot::entry::Titles;
use crate::boot::nvram::Firmware;
use crate::conf::{Config, Disk, Layout};
use crate::devices::inventory::Inventory;
use crate::devices::mounts::{self, Mount};
use crate::devices::subvolume;
use crate::names::files::Rewritten;
use crate::names::ident::Rewriter;
use crate::names::ids::DiskIds;
use crate::names::idstore;

/// The firmware's variables, and the ESP that was booted, by what they say.
///
/// # Errors
/// [`Refused`] where they don't say that.
pub fn booted_esp(root: &Root) -> Result<(EfiVars, PartUuid)> {
    let vars = EfiVars::open(root).ok_or_else(|| refused("the machine was not booted by UEFI firmware; nothing was done"))?;
    let esp = efi::booted_esp(&vars).map_err(|e| refused(format!("the booted disk is unknown: {e:#}")))?;
    Ok((vars, esp))
}

/// The disk that was booted, by its ESP.
///
/// # Errors
/// [`Refused`] where it is none of the configuration's.
pub fn booted_disk<'a>(config: &'a Config, esp: &PartUuid) -> Result<&'a Disk> {
    config.booted(esp).ok_or_else(|| {
        refused(format!(
            "the ESP that was booted, PARTUUID {esp}, is in no section of the configuration; add it to dualroot.conf"
        ))
    })
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
    /// The boot loader's name and version, as it gives them.
    pub loader: Option<String>,
    /// What files are to hold that are not in force yet, the configuration among them: spares get these.
    pub drafts: Vec<Rewritten>,
}

impl Machine {
    /// Looks at the machine; None where dualroot isn't configured.
    ///
    /// # Errors
    /// [`Refused`] for whatever makes it unsure which disk is which.
    pub fn look() -> Result<Option<Self>> {
        let root = Root::new("/");
        let Some(config) = Config::load(&root).map_err(|e| refused(format!("{e:#}")))? else { return Ok(None) };
        Self::with(root, config).map(Some)
    }

    /// Looks at the machine, with a configuration that may not be in force yet.
    ///
    /// # Errors
    /// As [`Machine::look`].
    pub fn with(root: Root, config: Config) -> Result<Self> {
        let (vars, esp) = booted_esp(&root)?;
        let booted = booted_disk(&config, &esp)?.clone();
        let loader = efi::loader_says(&vars, "LoaderInfo");
        let mut machine =
            Self { root, config, booted, inventory: Inventory::default(), ids: Vec::new(), loader, drafts: Vec::new() };
        machine.look_again()?;
        Ok(machine)
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
                // The entries name the subvolume of a root.
                Some(mount) if mount.is_on(part) && role == Role::Root && mount.fstype == "btrfs" && is_subvolume(&dir) => {}
                // Another btrfs subvolume, or a directory that is bound there. What the boot finds by its path isn't where it was.
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

    /// The directory of its file system that is the running system's root, where that is btrfs.
    ///
    /// # Errors
    /// Those of [`mounts::table`].
    pub fn subvolume(&self) -> Result<Option<String>> {
        let table = mounts::table()?;
        Ok(mounts::at(&table, Path::new("/")).filter(|mount| mount.fstype == "btrfs").map(|mount| mount.root.clone()))
    }

    /// The firmware, with what its boot entries follow from.
    pub fn firmware(&self) -> Firmware<'_> {
        Firmware { root: &self.root, config: &self.config, booted: &self.booted, inventory: &self.inventory }
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

    /// The finder of the names of a disk's root, by [`Rewriter::foreign`]; None where the disks share one.
    ///
    /// # Errors
    /// As [`Machine::rewriter`].
    pub fn root_names(&self, disk: &Disk) -> Result<Option<Rewriter>> {
        let ids = self.ids.iter().find(|ids| ids.name == disk.name).and_then(|ids| ids.parts.get(&Role::Root));
        let Some(ids) = ids else { return Ok(None) };
        let one = DiskIds { name: disk.name, parts: BTreeMap::from([(Role::Root, ids.clone())]) };
        Rewriter::finder(&[one]).map(Some).map_err(|e| refused(format!("{e:#}")))
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

/// Whether this is the top directory of a btrfs subvolume, and not one that is bound there.
fn is_subvolume(dir: &Path) -> bool {
    fs::metadata(dir).is_ok_and(|meta| meta.ino() == subvolume::TOP)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::refusal::Refused;

    fn machine() -> Machine {
        let part = |kname: &str, number: u32, partuuid: &str, fstype: &str| {
            format!(
                r#"{{"kname":"{kname}","path":"/dev/{kname}","maj:min":"8:{number}","fstype":"{fstype}","uuid":null,"label":null,
                    "partuuid":"{partuuid}","partlabel":null,"parttype":null,"log-sec":512}}"#
            )
        };
        let [a, b, c] = [1, 2, 3].map(|n| format!("aaaaaaaa-0000-4000-8000-00000000000{n}"));
        let text = format!("[disk0]\nesp={a}\nroot={b}\n[disk1]\nesp={c}\nroot={}4\n", &c[..35]);
        let config = Config::parse(&[("x".to_owned(), text.into_bytes())]).unwrap().unwrap();
        let lines = [part("x1", 1, &a, "vfat"), part("x2", 2, &b, "ext4"), part("x3", 3, &c, "vfat")].join(",");
        let json = format!(r#"{{"blockdevices":[{lines}]}}"#);
        let inventory = Inventory::parse(json.as_bytes(), BTreeMap::new(), std::collections::BTreeSet::new()).unwrap();
        let booted = config.disks.first().unwrap().clone();
        Machine { root: Root::new("/"), config, booted, inventory, ids: Vec::new(), loader: None, drafts: Vec::new() }
    }

    #[test]
    fn f05_every_partition_has_to_be_mounted_where_it_belongs() {
        let machine = machine();
        let line = |device: &str, root: &str, at: &str| {
            Mount::parse(&format!("22 1 {device} {root} {at} rw - ext4 /dev/none rw")).unwrap()
        };
        let root = line("8:2", "/", "/");
        let check = |boot: &[Mount]| machine.check_mounts(&[std::slice::from_ref(&root), boot].concat());
        check(&[line("8:1", "/", "/boot")]).unwrap();
        for (boot, expected) in [
            (vec![], "nothing is mounted on /boot; mount its esp= partition /dev/x1 there"),
            (vec![line("8:3", "/", "/boot")], "/boot is /dev/none and not its esp= partition /dev/x1"),
            (vec![line("8:1", "/", "/boot"), line("0:30", "/", "/boot")], "/boot is /dev/none and not its esp= partition"),
            (vec![line("8:1", "/sub", "/boot")], "/boot is only /sub of its esp= partition"),
        ] {
            let error = check(&boot).unwrap_err();
            assert!(error.is::<Refused>() && error.to_string().contains(expected), "{error}");
        }
        let error = machine.check_mounts(&[line("8:9", "/", "/"), line("8:1", "/", "/boot")]).unwrap_err();
        assert!(error.to_string().contains("/ is /dev/none and not its root= partition /dev/x2"), "{error}");
    }
}
