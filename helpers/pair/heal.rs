//! A shared btrfs root after a time without one of its disks.
//!
//! The initrd leaves a record in /run when it mounts the root degraded, and tmpfiles.d(5) copies it to the root. Another record is an EFI
//! variable, from which the initrd of the disk that was away learns that it is old (failure mode 29). It is also written when a disk drops out
//! while the machine runs. Once the disk is back, dualroot-heal.service updates it (btrfs scrub, then balance), and removes both records. Until
//! then the disk's half is old, and is not mounted alone.

use std::path::Path;

use anyhow::{Context, Result};
use efivar::efi::{Variable, VariableFlags};
use uuid::{Uuid, uuid};

use crate::base::program;
use crate::base::refusal::refused;
use crate::base::root::Root;
use crate::boot::efi::EfiVars;
use crate::conf::{Config, Layout};
use crate::devices::btrfs::MountedBtrfs;
use crate::write::below::Below;
use crate::write::change::Change;

const NOW: &str = "/run/dualroot/degraded";
const KEPT: &str = "/var/lib/dualroot/degraded";
const NAME: &str = "degraded";

/// The namespace of dualroot's variable, which units/initrd/degraded.sh writes.
pub(crate) const VENDOR: Uuid = uuid!("5e3df885-f0ed-4d14-bd72-a97d06c0619f");

/// The state of a shared root.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RootState {
    /// Every disk holds all of it, or each disk has a root of its own.
    Whole,
    /// One of its disks was missing at the mount, or has dropped out since.
    Degraded,
    /// It was degraded, and the disk that was away is not healed yet.
    Behind,
}

/// Probes the state of this machine's root.
///
/// # Errors
/// Mounts, or the kernel's view of the file system, that can't be read.
pub fn probe(root: &Root, config: &Config) -> Result<RootState> {
    if config.layout() == Layout::OwnRoots {
        return Ok(RootState::Whole);
    }
    let mounted = MountedBtrfs::read(root)?;
    Ok(match () {
        () if root.exists(NOW) || mounted.as_ref().is_some_and(MountedBtrfs::is_degraded) => RootState::Degraded,
        // A system that was powered off early, or lost a disk while it ran, has the record in the firmware only.
        () if root.exists(KEPT) || mounted.is_some_and(|mounted| is_in_firmware(root, &mounted)) => RootState::Behind,
        () => RootState::Whole,
    })
}

/// Whether the variable exists and is about this file system.
fn is_in_firmware(root: &Root, mounted: &MountedBtrfs) -> bool {
    variable(root).is_some_and(|value| recorded_devices(&value, &mounted.uuid).is_some())
}

/// The variable's text. The initrd can't use a variable that can't be read, either.
fn variable(root: &Root) -> Option<String> {
    let value = EfiVars::open(root)?.get(&alone()).ok()?;
    value.map(|(_, value)| String::from_utf8_lossy(&value).into_owned())
}

fn alone() -> Variable {
    Variable::new_with_vendor("DualrootAlone", VENDOR)
}

/// The up-to-date devices of the file system with this UUID, if the variable is about that.
fn recorded_devices<'a>(value: &'a str, uuid: &Uuid) -> Option<&'a str> {
    value.strip_prefix(&uuid.to_string())?.strip_prefix(' ')
}

/// The variable's new text, as in units/initrd/degraded.sh, when its text is `was`, and the root continues with the devices that are `here`.
/// None where all of these are old already, which the variable must keep.
fn record(was: &str, uuid: &Uuid, here: &[String]) -> Option<String> {
    let devices: Vec<&str> = match recorded_devices(was, uuid) {
        Some(recorded) => recorded.split(' ').filter(|device| here.iter().any(|here| here == device)).collect(),
        None => here.iter().map(String::as_str).collect(),
    };
    (!devices.is_empty()).then(|| format!("{uuid} {}", devices.join(" ")))
}

/// Records in the firmware which devices of a shared root are up to date, where one is missing and so gets old from now on. Returns whether the
/// record changed.
///
/// # Errors
/// A device, or the mounts, that can't be read; a variable that can't be written.
pub fn note(root: &Root) -> Result<bool> {
    // The sync reports a wrong configuration.
    if Config::load(root).is_ok_and(|config| config.is_none_or(|config| config.layout() == Layout::OwnRoots)) {
        return Ok(false);
    }
    let Some(mounted) = MountedBtrfs::read(root)?.filter(MountedBtrfs::is_degraded) else { return Ok(false) };
    let Some(mut vars) = EfiVars::open(root) else { return Ok(false) };
    let was = variable(root).unwrap_or_default();
    let record = record(&was, &mounted.uuid, &mounted.device_uuids(root)?).filter(|record| *record != was);
    if let Some(record) = &record {
        let name = alone();
        vars.set(&name, VariableFlags::default(), record.as_bytes())
            .with_context(|| format!("can't write the EFI variable {}", name.name()))?;
    }
    Ok(record.is_some())
}

/// Removes the records, because every disk holds all of the root again. The record in the root goes last, so that an interrupted run is repeated.
///
/// # Errors
/// [`crate::base::refusal::Refused`] while a disk is missing, or holds something that no other disk holds; a variable, or a record, that can't
/// be removed.
pub fn healed(root: &Root) -> Result<()> {
    let mounted = MountedBtrfs::read(root)?;
    if mounted.as_ref().is_some_and(MountedBtrfs::is_degraded) {
        return Err(refused(
            "the shared root is mounted without one of its disks, so that disk is not up to date; put the disk back, if it is out, and \
             reboot; the next sync starts dualroot-heal.service again",
        ));
    }
    // A balance leaves out block groups with an active swap file, and doesn't fail (fs/btrfs/volumes.c, __btrfs_balance).
    let single = mounted.as_ref().map_or(Ok(Vec::new()), |mounted| mounted.not_mirrored(root))?;
    if let Some(kind) = single.first() {
        return Err(refused(format!(
            "a part of the shared root is on one disk only ({kind}; see 'btrfs filesystem df /'), because 'btrfs balance' left it out, as it \
             does with the surroundings of an active swap file; stop using such a file ('swapoff'), delete it, and run this again"
        )));
    }
    if mounted.is_some_and(|mounted| is_in_firmware(root, &mounted))
        && let Some(vars) = EfiVars::open(root)
    {
        vars.remove(&alone())?;
    }
    for path in [NOW, KEPT].map(Path::new).into_iter().filter(|path| root.exists(path)) {
        let dir = path.parent().unwrap_or(path);
        Below::open(&root.path(dir))?.apply(&Change::Remove(NAME.to_owned()))?;
    }
    Ok(())
}

/// Starts dualroot-heal.service, and doesn't wait for it.
///
/// # Errors
/// A failure of systemctl.
pub fn start() -> Result<()> {
    program::output("systemctl", ["start", "--no-block", "dualroot-heal.service"].map(Into::into)).map(drop)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::base::refusal::Refused;

    const UUID: Uuid = uuid!("a8426465-b755-429d-9604-9c77c2838fda");

    /// The id of a device, by its first letter.
    fn id(device: &str) -> u64 {
        u64::from(device.as_bytes()[0] - b'a' + 1)
    }

    /// A machine whose root is a btrfs, with functions that change its disks.
    struct Machine {
        _dir: tempfile::TempDir,
        root: Root,
    }

    impl Machine {
        fn new(source: &str, devices: &[&str]) -> Self {
            let dir = tempfile::tempdir().unwrap();
            let root = Root::new(dir.path());
            let new = Self { _dir: dir, root };
            new.write("/etc/dualroot.conf", SHARED);
            new.mount(source);
            for path in ["/sys/fs/btrfs/features", "/sys/fs/btrfs/b8426465-b755-429d-9604-9c77c2838fda/devices"] {
                fs::create_dir_all(new.root.path(path)).unwrap();
            }
            fs::create_dir_all(new.vars()).unwrap();
            for device in devices {
                fs::create_dir_all(new.shown("devinfo").join(id(device).to_string())).unwrap();
                new.put(device, device);
                new.opens(device);
            }
            new
        }

        fn write(&self, path: &str, bytes: impl AsRef<[u8]>) {
            let path = self.root.path(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, bytes).unwrap();
        }

        fn mount(&self, source: &str) {
            self.write(
                "/proc/thread-self/mountinfo",
                format!("9 1 0:9 / /home rw - ext4 /dev/x rw\n8 1 0:8 / / rw - btrfs {source} rw\n"),
            );
        }

        fn vars(&self) -> std::path::PathBuf {
            self.root.path("/sys/firmware/efi/efivars")
        }

        fn shown(&self, name: &str) -> std::path::PathBuf {
            self.root.path("/sys/fs/btrfs").join(UUID.to_string()).join(name)
        }

        /// Puts in device `which` of the file system, with this name.
        fn put(&self, which: &str, name: &str) {
            let mut block = vec![0; 0x10000];
            block.resize(0x10020, 0);
            block.extend(UUID.as_bytes());
            block.resize(0x100c9, 0);
            block.extend(id(which).to_le_bytes());
            block.resize(0x1010b, 0);
            block.extend([which.as_bytes()[0]; 16]);
            self.write(&format!("/dev/{}", name.replace('!', "/")), block);
            fs::create_dir_all(self.root.path("/sys/devices").join(name)).unwrap();
        }

        fn pull(&self, name: &str) {
            fs::remove_file(self.root.path("/dev").join(name.replace('!', "/"))).unwrap();
            fs::remove_dir(self.root.path("/sys/devices").join(name)).unwrap();
        }

        /// Opens a device, as btrfs does at the mount with those that are there.
        fn opens(&self, name: &str) {
            let link = self.shown("devices").join(name);
            fs::create_dir_all(self.shown("devices")).unwrap();
            symlink(Path::new("../../../../devices").join(name), link).unwrap();
        }

        fn probe(&self) -> RootState {
            probe(&self.root, &Config::load(&self.root).unwrap().unwrap()).unwrap()
        }

        /// The up-to-date devices that the initrd finds in the firmware, by their first letters.
        fn recorded(&self) -> Option<String> {
            let value = fs::read(self.vars().join(alone().to_string())).ok()?;
            let devices = value.strip_prefix(format!("\x07\0\0\0{UUID}").as_bytes()).unwrap().to_vec();
            let of = |device: &str| char::from(Uuid::parse_str(device).unwrap().as_bytes()[0]);
            Some(String::from_utf8(devices).unwrap().strip_prefix(' ').unwrap().split(' ').map(of).collect())
        }
    }

    const SHARED: &str = "[disk0]\nesp=aaaaaaaa-0000-4000-8000-000000000001\n[disk1]\nesp=bbbbbbbb-0000-4000-8000-000000000001\n";

    #[test]
    fn f29_a_disk_that_drops_out_while_the_machine_runs_is_noted() {
        // The mount is called by the first device.
        for (gone, left) in [("a2", "b2"), ("b2", "a2")] {
            let machine = Machine::new("/dev/a2", &["a2", "b2"]);
            assert_eq!((note(&machine.root).unwrap(), machine.recorded(), machine.probe()), (false, None, RootState::Whole));
            machine.pull(gone);
            assert_eq!(machine.probe(), RootState::Degraded);
            assert_eq!(MountedBtrfs::read(&machine.root).unwrap().unwrap().missing_ids(&machine.root).unwrap(), [id(gone)]);
            assert!(note(&machine.root).unwrap() && !note(&machine.root).unwrap(), "it is noted once");
            assert_eq!(machine.recorded().unwrap(), left[..1]);
            // It is put back, which btrfs ignores: nothing is healed.
            machine.put(gone, "c2");
            assert_eq!((note(&machine.root).unwrap(), machine.probe()), (false, RootState::Degraded));
            machine.write(KEPT, "");
            assert!(healed(&machine.root).unwrap_err().is::<Refused>());
            assert!(machine.recorded().is_some() && machine.root.exists(KEPT));
            // After a reboot, it is behind, and it stays so if the other one drops out now.
            fs::remove_file(machine.shown("devices").join(gone)).unwrap();
            machine.opens("c2");
            machine.mount("/dev/c2");
            fs::remove_file(machine.root.path(KEPT)).unwrap();
            assert_eq!((note(&machine.root).unwrap(), machine.probe()), (false, RootState::Behind));
            machine.pull(left);
            assert!(!note(&machine.root).unwrap());
            assert_eq!(machine.recorded().unwrap(), left[..1]);
            machine.put(left, left);
            healed(&machine.root).unwrap();
            assert_eq!((machine.recorded(), machine.probe()), (None, RootState::Whole));
        }
    }

    #[test]
    fn f29_data_on_one_disk_only_is_not_healed() {
        let machine = Machine::new("/dev/a2", &["a2", "b2"]);
        let chunks = |kind: &str, bytes: &str| {
            machine.write(KEPT, "");
            machine.write(&format!("/sys/fs/btrfs/{UUID}/allocation/{kind}/total_bytes"), bytes);
            healed(&machine.root).map_err(|e| e.is::<Refused>())
        };
        for (kind, bytes, expected) in [
            ("data/raid1", "1073741824\n", Ok(())),
            ("data/single", "0\n", Ok(())),
            ("data/single", "1073741824\n", Err(true)),
            ("data/single", "0\n", Ok(())),
            ("system/dup", "8388608\n", Err(true)),
            ("system/dup", "0\n", Ok(())),
            ("mixed/raid0", "8388608\n", Err(true)),
        ] {
            assert_eq!(chunks(kind, bytes), expected, "{kind}");
            assert_eq!(machine.root.exists(KEPT), expected.is_err(), "{kind}");
        }
        // A btrfs that has one device by now has no other half.
        let machine = Machine::new("/dev/a2", &["a2"]);
        machine.write(&format!("/sys/fs/btrfs/{UUID}/allocation/data/single/total_bytes"), "1");
        healed(&machine.root).unwrap();
    }

    #[test]
    fn f29_of_three_disks_two_drop_out() {
        let machine = Machine::new("/dev/mapper/root", &["dm-1", "b!2", "c2"]);
        fs::create_dir(machine.root.path("/dev/mapper")).unwrap();
        symlink("../dm-1", machine.root.path("/dev/mapper/root")).unwrap();
        machine.pull("c2");
        assert!(note(&machine.root).unwrap());
        assert_eq!(machine.recorded().unwrap(), "bd");
        machine.pull("b!2");
        assert!(note(&machine.root).unwrap());
        assert_eq!(machine.recorded().unwrap(), "d");
        // A device that was missing at the mount has no link. The record of another file system isn't kept.
        let machine = Machine::new("/dev/a2", &["a2", "b2"]);
        fs::remove_file(machine.shown("devices/b2")).unwrap();
        machine.write(
            &format!("/sys/firmware/efi/efivars/{}", alone()),
            format!("\x07\0\0\0b{} {}", &UUID.to_string()[1..], "longer than the new one is".repeat(3)),
        );
        assert!(note(&machine.root).unwrap());
        assert_eq!((machine.recorded().unwrap().as_str(), machine.probe()), ("a", RootState::Degraded));
    }

    #[test]
    fn f29_nothing_is_noted_without_a_shared_root_or_where_it_can_t_be_read() {
        for (configuration, noted) in [(crate::pair::status::tests::PAIR, false), ("", false), ("nonsense", true), (SHARED, true)]
        {
            let machine = Machine::new("/dev/a2", &["a2", "b2"]);
            machine.pull("b2");
            machine.write("/etc/dualroot.conf", configuration);
            assert_eq!((note(&machine.root).unwrap(), machine.recorded().is_some()), (noted, noted), "{configuration}");
        }
        let machine = Machine::new("/dev/a2", &["a2", "b2"]);
        machine.pull("b2");
        machine.write("/dev/a2", [0; 0x11000]);
        assert!(note(&machine.root).is_err() && machine.recorded().is_none());
        machine.write("/dev/a2", "short");
        assert!(note(&machine.root).is_err() && machine.recorded().is_none());
        // Another root than btrfs, and one that the kernel doesn't show.
        machine.mount("/dev/d2");
        assert_eq!((note(&machine.root).unwrap(), machine.probe()), (false, RootState::Whole));
        machine.write("/proc/thread-self/mountinfo", "8 1 0:8 / / rw - ext4 /dev/a2 rw\n");
        assert_eq!((note(&machine.root).unwrap(), machine.probe()), (false, RootState::Whole));
        fs::remove_file(machine.root.path("/proc/thread-self/mountinfo")).unwrap();
        assert!(note(&machine.root).is_err());
    }

    #[test]
    fn f29_the_firmware_remembers_one_file_system() {
        let machine = Machine::new("/dev/a2", &["a2", "b2"]);
        let root = &machine.root;
        assert_eq!(variable(root), None);
        // The name in the initrd's script.
        let script = include_str!("../../units/initrd/degraded.sh");
        let name = script.lines().find_map(|line| line.strip_prefix("dualroot_variable=")).unwrap();
        let file = machine.vars().join(name);
        fs::write(&file, format!("\x07\0\0\0{UUID} 11111111-2222")).unwrap();
        assert_eq!(machine.probe(), RootState::Behind);
        // A record of another root stays, and so do records that are truncated or no text; the one of this root is removed.
        let other = format!("\x07\0\0\0b{} 11111111-2222", &UUID.to_string()[1..]);
        let truncated = format!("\x07\0\0\0{UUID}");
        for bytes in [other.as_bytes(), truncated.as_bytes(), b"", b"\x07\0", b"\x07\0\0\0", b"\x07\0\0\0\xff\n "] {
            fs::write(&file, bytes).unwrap();
            machine.write(KEPT, "");
            assert_eq!(machine.probe(), RootState::Behind);
            healed(root).unwrap();
            assert!(file.exists() && !root.exists(KEPT));
            assert_eq!(machine.probe(), RootState::Whole);
            healed(root).unwrap();
        }
    }
}
