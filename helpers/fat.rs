//! The dirty bit of a FAT file system, and its repair by fsck.fat(8), which must run while the file system is not mounted: after a
//! cut, two names may share a chain of clusters, and deleting one of them then would destroy the other.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, Result, bail};

use crate::inventory::Partition;
use crate::mounts;
use crate::program;

/// Whether a FAT file system was left by a writer that didn't end well: bit 0 of the state byte that Linux and Windows keep in the
/// boot sector, at 0x41 for FAT32 and 0x25 for FAT12 and FAT16.
///
/// # Errors
/// Those of reading the device; something that isn't FAT.
pub fn is_dirty(device: &Path) -> Result<bool> {
    let mut sector = [0; 512];
    let file = File::open(device).with_context(|| format!("{} can't be opened", device.display()))?;
    file.read_exact_at(&mut sector, 0).with_context(|| format!("{} can't be read", device.display()))?;
    let word = |at: usize| match sector.get(at..at + 2) {
        Some([low, high]) => u16::from_le_bytes([*low, *high]),
        _ => 0,
    };
    if word(510) != 0xaa55 {
        bail!("{} has no boot sector of a FAT file system", device.display());
    }
    // Sectors per FAT, of 16 bits: 0 on FAT32, which has a field of its own.
    let state = if word(22) == 0 { 0x41 } else { 0x25 };
    Ok(sector.get(state).is_some_and(|byte| byte & 1 != 0))
}

/// Repairs a FAT file system that was left dirty. Its mounts are taken away first, by systemd where it made them; what the generator
/// made is started again at the end of the sync. Returns whether there was anything to repair.
///
/// # Errors
/// A file system that stays mounted or can't be repaired.
pub fn repair(part: &Partition) -> Result<bool> {
    let table = mounts::table()?;
    let uses: Vec<_> = table.iter().filter(|m| m.is_on(part)).collect();
    // While somebody has it mounted for writing, the bit is set and means nothing.
    if uses.iter().any(|m| m.is_writable()) || !is_dirty(Path::new(&part.path))? {
        return Ok(false);
    }
    for mount in uses {
        let path = mount.at.to_str().context("a mount point isn't UTF-8")?;
        let unit = format!("{}.mount", libsystemd::unit::escape_path(path));
        program::output("systemctl", ["stop", &unit].map(Into::into))?;
    }
    if mounts::table()?.iter().any(|m| m.is_on(part)) {
        bail!("{} was left dirty and can't be unmounted for repair; unmount it, and start the sync again", part.path);
    }
    // 1: errors were corrected (fsck.fat(8), EXIT STATUS).
    let done = program::command("fsck.fat")?.args(["-a", &part.path]).output().context("fsck.fat can't be run")?;
    match done.status.code() {
        Some(0 | 1) => Ok(true),
        _ => bail!("fsck.fat can't repair {}: {}", part.path, String::from_utf8_lossy(&done.stdout).trim().replace('\n', "; ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn f24_the_dirty_bit_is_read() {
        for (bits, at) in [("32", 0x41_u64), ("16", 0x25)] {
            let image = tempfile::NamedTempFile::new().unwrap();
            image.as_file().set_len(64 << 20).unwrap();
            let made = program::command("mkfs.vfat").unwrap().args(["-F", bits]).arg(image.path()).output().unwrap();
            assert!(made.status.success());
            assert!(!is_dirty(image.path()).unwrap());
            image.as_file().write_all_at(&[1], at).unwrap();
            assert!(is_dirty(image.path()).unwrap());
        }
        let none = tempfile::NamedTempFile::new().unwrap();
        assert!(is_dirty(none.path()).is_err());
        none.as_file().set_len(4096).unwrap();
        assert!(is_dirty(none.path()).is_err());
    }
}
