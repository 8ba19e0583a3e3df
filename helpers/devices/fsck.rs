//! Repairs a spare's boot partitions with fsck.fat or e2fsck, while they are not mounted. After a power cut, two names on a FAT may share
//! their clusters, so that deleting one would destroy the other; and an ext4 superblock, which is two sectors long, may be half written,
//! so that no kernel mounts it.

use std::fs::File;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::fcntl::OFlag;

use crate::base::program;
use crate::devices::inventory::Partition;
use crate::devices::mounts;

/// Whether a FAT file system needs fsck.fat: it is marked dirty, or fsck.fat finds errors. The mark alone isn't enough: fsck.fat removes
/// it in no particular order with its other writes, so that it may be gone after an interrupted repair.
///
/// # Errors
/// The device can't be read, or isn't FAT.
fn fat_needs_repair(device: &Path) -> Result<bool> {
    Ok(is_dirty(device)? || fsck_fat("-n", device)?)
}

/// Whether a FAT file system is marked dirty, because it was not unmounted cleanly: bit 0 of the state byte that Linux and Windows keep in
/// the boot sector, at 0x41 for FAT32 and 0x25 for FAT12 and FAT16.
///
/// # Errors
/// The device can't be read, or isn't FAT.
fn is_dirty(device: &Path) -> Result<bool> {
    let mut sector = [0; 512];
    let file = File::open(device).with_context(|| format!("{} can't be opened", device.display()))?;
    file.read_exact_at(&mut sector, 0).with_context(|| format!("{} can't be read", device.display()))?;
    let word = |at: usize| match sector.get(at..at + 2) {
        Some([low, high]) => u16::from_le_bytes([*low, *high]),
        _ => 0,
    };
    if word(510) != 0xaa55 {
        bail!("{} holds no FAT file system", device.display());
    }
    // The 16-bit number of sectors per FAT is 0 on FAT32, which has another field for it.
    let state = if word(22) == 0 { 0x41 } else { 0x25 };
    Ok(sector.get(state).is_some_and(|byte| byte & 1 != 0))
}

/// Repairs a boot partition's file system after an interrupted write. A FAT that needs repair is unmounted first, by systemd; the
/// generator's mount units are started again at the end of the sync. Returns the program that repaired something.
///
/// # Errors
/// The file system stays mounted, or can't be repaired.
pub fn repair(part: &Partition) -> Result<Option<&'static str>> {
    let table = mounts::table()?;
    let uses: Vec<_> = table.iter().filter(|m| m.is_on(part)).collect();
    let device = Path::new(&part.path);
    match part.fstype.as_deref() {
        // While it is mounted writable, it is marked dirty, and fsck.fat may see half-written changes.
        Some("vfat") if uses.iter().any(|m| m.is_writable()) || !fat_needs_repair(device)? => Ok(None),
        Some("vfat") => {
            let _held = claim(part)?;
            check_fat(device)?;
            Ok(Some("fsck.fat"))
        }
        // A mounted file system has a whole superblock, and its journal was replayed.
        Some("ext2" | "ext3" | "ext4") if uses.is_empty() => Ok(check_ext(device)?.then_some("e2fsck")),
        _ => Ok(None),
    }
}

/// Unmounts a partition, and keeps its device open so that it can't be mounted (O_EXCL of a block device, open(2)): systemd is about to
/// mount a disk that was just plugged in.
fn claim(part: &Partition) -> Result<File> {
    const TRIES: u32 = 5;
    for _ in 0..TRIES {
        let table = mounts::table()?;
        mounts::stop(&table.iter().filter(|m| m.is_on(part)).collect::<Vec<_>>())?;
        match File::options().read(true).custom_flags(OFlag::O_EXCL.bits()).open(&part.path) {
            Ok(device) => return Ok(device),
            Err(error) if error.raw_os_error() == Some(Errno::EBUSY as i32) => {}
            Err(error) => return Err(error).with_context(|| format!("{} can't be opened", part.path)),
        }
        // mount(8) is running, and its mount isn't in the table yet.
        thread::sleep(Duration::from_millis(200));
    }
    bail!("{} needs a repair after an interrupted write, but is in use. Unmount it, and start the sync again", part.path)
}

/// Runs fsck.fat until it finds no more errors: correcting one (a directory whose cluster is free becomes an empty one without clusters,
/// which can't be read) may make the next.
fn check_fat(device: &Path) -> Result<()> {
    const RUNS: u32 = 5;
    for _ in 0..RUNS {
        if !fsck_fat("-a", device)? {
            return Ok(());
        }
    }
    bail!(
        "fsck.fat still finds errors on {} after {RUNS} runs. Make a new file system there (mkfs.vfat -F32), and start the sync again",
        device.display()
    );
}

/// Runs fsck.fat, and returns whether it found errors (with -n) or corrected some (with -a).
fn fsck_fat(option: &str, device: &Path) -> Result<bool> {
    let done = program::command("fsck.fat")?.arg(option).arg(device).output().context("fsck.fat can't be run")?;
    // fsck.fat(8), EXIT STATUS.
    match done.status.code() {
        Some(0) => Ok(false),
        Some(1) => Ok(true),
        _ => {
            let said = String::from_utf8_lossy(&done.stdout).trim().replace('\n', "; ");
            bail!(
                "fsck.fat can't repair {}: {said}. Check the disk, or make a new file system there (mkfs.vfat -F32), and start \
                 the sync again",
                device.display()
            );
        }
    }
}

/// Runs e2fsck for safe corrections, then, if those aren't enough, for all: the sync compares everything on a boot partition with the
/// source, byte for byte. Returns whether it changed anything.
fn check_ext(device: &Path) -> Result<bool> {
    let mut said = String::new();
    for answer in ["-p", "-y"] {
        let done = program::command("e2fsck")?.arg(answer).arg(device).output().context("e2fsck can't be run")?;
        // 1: errors were corrected (e2fsck(8), EXIT CODE), or the journal was replayed.
        match done.status.code() {
            Some(0) => return Ok(false),
            Some(1) => return Ok(true),
            _ => said = String::from_utf8_lossy(&done.stdout).trim().replace('\n', "; "),
        }
    }
    bail!(
        "e2fsck can't repair {}: {said}. Check the disk, or make a new file system there, and start the sync again",
        device.display()
    );
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

    #[test]
    fn f24_errors_that_a_correction_makes_are_corrected_too() {
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(64 << 20).unwrap();
        let run = |name: &str, args: &[&str]| {
            let done = program::command(name).unwrap().args(args).output().unwrap();
            assert!(done.status.success(), "{name}: {}", String::from_utf8_lossy(&done.stdout));
        };
        let path = image.path().to_str().unwrap();
        run("mkfs.vfat", &["-F", "32", path]);
        run("mmd", &["-i", path, "::/d"]);
        // A directory that was being removed: its cluster, the first after that of the root, is free already.
        let mut sector = [0; 512];
        image.as_file().read_exact_at(&mut sector, 0).unwrap();
        let reserved = u64::from(u16::from_le_bytes([sector[14], sector[15]]));
        let fat = u64::from(u32::from_le_bytes([sector[36], sector[37], sector[38], sector[39]]));
        for table in [reserved, reserved + fat] {
            image.as_file().write_all_at(&[0; 4], table * 512 + 3 * 4).unwrap();
        }
        // It isn't marked dirty: an interrupted repair may have removed the mark already.
        assert!(!is_dirty(image.path()).unwrap());
        assert!(fat_needs_repair(image.path()).unwrap());
        check_fat(image.path()).unwrap();
        run("fsck.fat", &["-n", path]);
        assert!(!fat_needs_repair(image.path()).unwrap());
    }

    #[test]
    fn f24_a_torn_superblock_is_repaired() {
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(32 << 20).unwrap();
        let made = program::command("mke2fs").unwrap().args(["-qF", "-t", "ext4", "-b", "1024"]).arg(image.path()).output();
        assert!(made.unwrap().status.success());
        assert!(!check_ext(image.path()).unwrap());
        // Changes the time of the last write, but not the checksum.
        image.as_file().write_all_at(&[1; 4], 1024 + 0x30).unwrap();
        assert!(check_ext(image.path()).unwrap());
        assert!(!check_ext(image.path()).unwrap());
        let none = tempfile::NamedTempFile::new().unwrap();
        none.as_file().set_len(32 << 20).unwrap();
        assert!(check_ext(none.path()).is_err());
    }
}
