//! The btrfs on /, which may have several devices: as the kernel shows it (Linux, fs/btrfs/sysfs.c), and its devices' superblocks.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, Result, bail};
use uuid::Uuid;

use crate::base::program;
use crate::base::root::Root;
use crate::devices::mounts;

const BTRFS: &str = "/sys/fs/btrfs";

/// The btrfs on / and its devices.
pub(crate) struct MountedBtrfs {
    /// Its UUID.
    pub uuid: Uuid,
    /// The ids of its devices, also of missing ones.
    pub ids: Vec<u64>,
    /// The kernel's names of the devices in use. Until the next mount, btrfs keeps a device that was pulled, and doesn't use one that is
    /// plugged in again.
    pub present: Vec<String>,
}

/// The progress, from 0 to 1, of a balance or replacement of the btrfs on /, as btrfs(8) prints it when run with these arguments. None if
/// none is running.
pub(crate) fn fraction_done(words: &[&str]) -> Option<f64> {
    // Its exit status is 1 while work is left.
    let done = program::command("btrfs").ok()?.args(words).arg("/").output().ok()?;
    part(&String::from_utf8_lossy(&done.stdout))
}

/// Reads "1.4% done, 0 write errs, …" (a replacement) or "3 out of about 8 chunks balanced (4 considered),  62% left".
fn part(said: &str) -> Option<f64> {
    let words: Vec<&str> = said.split_ascii_whitespace().collect();
    words.windows(2).find_map(|two| {
        let [percent, what] = two else { return None };
        let part = percent.strip_suffix('%')?.parse::<f64>().ok().filter(|percent| (0.0..=100.0).contains(percent))? / 100.0;
        match *what {
            "left" => Some(1.0 - part),
            "done," => Some(part),
            _ => None,
        }
    })
}

impl MountedBtrfs {
    /// Reads the mounts and /sys; None if / is not a btrfs.
    ///
    /// # Errors
    /// /proc or /sys can't be read.
    pub fn read(root: &Root) -> Result<Option<Self>> {
        let table = mounts::table_of(root)?;
        let Some(mount) = mounts::at(&table, Path::new("/")).filter(|mount| mount.fstype == "btrfs") else { return Ok(None) };
        // A device that was pulled has no node.
        let source = fs::canonicalize(root.path(&mount.source)).unwrap_or_else(|_| mount.source.clone().into());
        for uuid in root.names(BTRFS)? {
            let shown = Path::new(BTRFS).join(&uuid);
            // The link of a device that was pulled dangles; a device that was missing at the mount has no link.
            let links = root.names(shown.join("devices"))?;
            let Some(uuid) = uuid.to_str().and_then(|uuid| Uuid::try_parse(uuid).ok()) else { continue };
            if links.iter().any(|name| Some(name.as_os_str()) == source.file_name()) {
                let alive = links.into_iter().filter(|name| root.path(shown.join("devices").join(name)).exists());
                let present = alive.filter_map(|name| name.into_string().ok()).collect();
                let ids = root.names(shown.join("devinfo"))?.into_iter();
                let ids = ids.filter_map(|id| id.to_str().and_then(|id| id.parse().ok())).collect();
                return Ok(Some(Self { uuid, ids, present }));
            }
        }
        Ok(None)
    }

    /// Whether it is degraded: one of its devices is missing.
    pub fn is_degraded(&self) -> bool {
        self.present.len() < self.ids.len()
    }

    /// The kinds of chunks that are on a single one of several devices, such as "data, single". Without that device, btrfs can't be mounted
    /// writable.
    ///
    /// # Errors
    /// /sys can't be read.
    pub fn not_mirrored(&self, root: &Root) -> Result<Vec<String>> {
        let mut found = Vec::new();
        if self.ids.len() < 2 {
            return Ok(found);
        }
        for kind in ["data", "metadata", "mixed", "system"] {
            for profile in ["single", "dup", "raid0"] {
                let path = Path::new(BTRFS).join(self.uuid.to_string()).join(format!("allocation/{kind}/{profile}/total_bytes"));
                let bytes = root.read_opt(&path).with_context(|| path.display().to_string())?;
                if bytes.is_some_and(|bytes| bytes.trim_ascii() != b"0") {
                    found.push(format!("{kind}, {profile}"));
                }
            }
        }
        Ok(found)
    }

    /// The ids of the missing devices.
    ///
    /// # Errors
    /// A device in use can't be read.
    pub fn missing_ids(&self, root: &Root) -> Result<Vec<u64>> {
        let here = self.present.iter().map(|name| self.device(root, name).map(|(id, _)| id)).collect::<Result<Vec<_>>>()?;
        Ok(self.ids.iter().copied().filter(|id| !here.contains(id)).collect())
    }

    /// The UUID of each device in use, which blkid(8) calls UUID_SUB.
    ///
    /// # Errors
    /// A device can't be read.
    pub fn device_uuids(&self, root: &Root) -> Result<Vec<String>> {
        self.present.iter().map(|name| self.device(root, name).map(|(_, uuid)| uuid.to_string())).collect()
    }

    /// The id and UUID of the device with this kernel name, from its superblock: dev_item.devid and dev_item.uuid of Linux's struct
    /// btrfs_super_block.
    ///
    /// # Errors
    /// The device can't be read, or belongs to another file system.
    pub fn device(&self, root: &Root, kname: &str) -> Result<(u64, Uuid)> {
        let path = root.path("/dev").join(kname.replace('!', "/"));
        let mut block = [0; 0x11b];
        let read = File::open(&path).and_then(|device| device.read_exact_at(&mut block, 64 << 10));
        read.with_context(|| format!("{} can't be read", path.display()))?;
        let part = |at: usize, length: usize| block.get(at..at + length);
        let id = part(0xc9, 8).and_then(|id| id.try_into().ok()).map(u64::from_le_bytes);
        let uuid = part(0x10b, 16).and_then(|uuid| Uuid::from_slice(uuid).ok());
        match (part(0x20, 16), id, uuid) {
            (Some(fsid), Some(id), Some(uuid)) if fsid == self.uuid.as_bytes() => Ok((id, uuid)),
            _ => bail!("{} does not hold the btrfs {}", path.display(), self.uuid),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_is_read_from_btrfs_output() {
        for (said, expected) in [
            ("Balance on '/' is running\n3 out of about 8 chunks balanced (4 considered),  50% left\n", Some(0.5)),
            ("Balance on '/' is running\n0 out of about 8 chunks balanced (1 considered), 100% left\n", Some(0.0)),
            // More chunks than it had expected, and no chunks.
            ("9 out of about 8 chunks balanced (10 considered), -25% left\n", None),
            ("0 out of about 0 chunks balanced (0 considered), -nan% left\n", None),
            ("No balance found on '/'\n", None),
            ("62.5% done, 0 write errs, 0 uncorr. read errs\n", Some(0.625)),
            ("Started on 22.Nov 07:00:00, finished on 22.Nov 07:00:01, 0 write errs, 0 uncorr. read errs\n", None),
            ("Never started\n", None),
            ("", None),
        ] {
            assert_eq!(part(said), expected, "{said}");
        }
    }
}
