//! A btrfs of several devices, as the kernel shows it (fs/btrfs/sysfs.c of Linux), and the devices' superblocks.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, Result, bail};
use uuid::Uuid;

use crate::base::program;
use crate::base::root::Root;
use crate::devices::mounts;

const BTRFS: &str = "/sys/fs/btrfs";

/// The btrfs that is mounted on /.
pub(crate) struct Mounted {
    /// Its UUID.
    pub uuid: Uuid,
    /// The ids of its devices, those of missing ones too.
    pub ids: Vec<u64>,
    /// The kernel's names of those that are read and written. btrfs doesn't let go of one that was pulled, nor does it take one that is
    /// put back, before it is mounted anew.
    pub at_work: Vec<String>,
}

/// Which part is done of what keeps the btrfs on / busy, as btrfs(8) tells that when it is run with these words. None where it is over.
pub(crate) fn part_done(words: &[&str]) -> Option<f64> {
    // That there is something left makes its exit status 1.
    let done = program::command("btrfs").ok()?.args(words).arg("/").output().ok()?;
    part(&String::from_utf8_lossy(&done.stdout))
}

/// "1.4% done, 0 write errs, …" of a replacement; "3 out of about 8 chunks balanced (4 considered),  62% left".
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

impl Mounted {
    /// Looks; None where another file system is mounted.
    ///
    /// # Errors
    /// What is mounted, or what the kernel shows of it, can't be read.
    pub fn look(root: &Root) -> Result<Option<Self>> {
        let table = mounts::table_of(root)?;
        let Some(mount) = mounts::at(&table, Path::new("/")).filter(|mount| mount.fstype == "btrfs") else { return Ok(None) };
        // The node of a device that was pulled is gone.
        let source = fs::canonicalize(root.path(&mount.source)).unwrap_or_else(|_| mount.source.clone().into());
        for uuid in root.names(BTRFS)? {
            let shown = Path::new(BTRFS).join(&uuid);
            // Links, of which that of a device that was pulled leads nowhere. One that was missing at the mount has none.
            let links = root.names(shown.join("devices"))?;
            let Some(uuid) = uuid.to_str().and_then(|uuid| Uuid::try_parse(uuid).ok()) else { continue };
            if links.iter().any(|name| Some(name.as_os_str()) == source.file_name()) {
                let alive = links.into_iter().filter(|name| root.path(shown.join("devices").join(name)).exists());
                let at_work = alive.filter_map(|name| name.into_string().ok()).collect();
                let ids = root.names(shown.join("devinfo"))?.into_iter();
                let ids = ids.filter_map(|id| id.to_str().and_then(|id| id.parse().ok())).collect();
                return Ok(Some(Self { uuid, ids, at_work }));
            }
        }
        Ok(None)
    }

    /// Whether it goes on without one of its devices.
    pub fn lacks_a_device(&self) -> bool {
        self.at_work.len() < self.ids.len()
    }

    /// The kinds of chunks of which some lie on one of several devices only, as "data, single". btrfs is not mounted writable without that.
    ///
    /// # Errors
    /// What the kernel shows can't be read.
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

    /// The devices that it goes on without.
    ///
    /// # Errors
    /// A device that can't be read.
    pub fn lost(&self, root: &Root) -> Result<Vec<u64>> {
        let here = self.at_work.iter().map(|name| self.device(root, name).map(|(id, _)| id)).collect::<Result<Vec<_>>>()?;
        Ok(self.ids.iter().copied().filter(|id| !here.contains(id)).collect())
    }

    /// What blkid(8) calls UUID_SUB, of each device that is at work.
    ///
    /// # Errors
    /// A device that can't be read.
    pub fn device_uuids(&self, root: &Root) -> Result<Vec<String>> {
        self.at_work.iter().map(|name| self.device(root, name).map(|(_, uuid)| uuid.to_string())).collect()
    }

    /// Id and UUID of a device by the kernel's name: of its superblock (struct btrfs_super_block of Linux), dev_item.devid and
    /// dev_item.uuid.
    ///
    /// # Errors
    /// A device that can't be read, or holds something else.
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
    fn what_btrfs_says_of_its_work() {
        for (said, expected) in [
            ("Balance on '/' is running\n3 out of about 8 chunks balanced (4 considered),  50% left\n", Some(0.5)),
            ("Balance on '/' is running\n0 out of about 8 chunks balanced (1 considered), 100% left\n", Some(0.0)),
            // More of them than it had expected, and none at all.
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
