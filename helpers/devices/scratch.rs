//! File systems for tests: images on loop devices, mounted in a mount namespace of the test's own thread.

use std::ffi::OsStr;
use std::fs::File;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, umount2};

use crate::base::program;
use crate::devices::held::enter_private_namespace;
use crate::devices::mounts::{at, table};

/// Runs a program, which has to succeed.
pub(crate) fn run<S: AsRef<OsStr>>(name: &str, args: &[S]) {
    let args = args.iter().map(|arg| arg.as_ref().to_owned());
    program::output(name, args).unwrap();
}

/// A mount that goes when the value does.
///
/// It is detached: umount(2) would fail now and then. A child that the thread of another test has forked holds all descriptors of this
/// process until it calls execve(2), those of files in this file system among them. The same child makes a read-only remount fail.
pub(crate) struct Mounted(PathBuf);

impl Mounted {
    /// Takes over what is mounted at a directory.
    pub(crate) fn at(place: &Path) -> Self {
        Self(place.to_owned())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

/// A file system in an image.
pub(crate) struct Scratch {
    // Before the directories that it is mounted in.
    mounted: Option<Mounted>,
    tmp: tempfile::TempDir,
}

impl Scratch {
    /// Makes an image of 8 MiB by mke2fs(8); None where the tests aren't run by root.
    pub(crate) fn ext4(more: &[&str]) -> Option<Self> {
        if !nix::unistd::geteuid().is_root() {
            return None;
        }
        enter_private_namespace().unwrap();
        let new = Self::empty();
        File::create(new.image()).unwrap().set_len(8 << 20).unwrap();
        let image = new.image();
        run("mke2fs", &[&["-qF", "-text4"], more, &[image.to_str().unwrap()]].concat());
        Some(new)
    }

    fn empty() -> Self {
        let tmp = tempfile::tempdir().unwrap();
        std::fs::create_dir(tmp.path().join("fs")).unwrap();
        Self { mounted: None, tmp }
    }

    /// Mounts it on a loop device.
    pub(crate) fn mount(mut self, options: &str) -> Self {
        run("mount", &[OsStr::new("-o"), format!("loop,{options}").as_ref(), self.image().as_ref(), self.place().as_ref()]);
        self.mounted = Some(Mounted::at(&self.place()));
        self
    }

    /// Nobody sees it any more.
    pub(crate) fn unmount(&mut self) {
        self.mounted = None;
    }

    /// The file that is its medium.
    pub(crate) fn image(&self) -> PathBuf {
        self.tmp.path().join("image")
    }

    /// Where it is mounted.
    pub(crate) fn place(&self) -> PathBuf {
        self.tmp.path().join("fs")
    }

    /// The loop device.
    pub(crate) fn device(&self) -> String {
        at(&table().unwrap(), &self.place()).unwrap().source.clone()
    }

    /// Another one, mounted, with what a cut of the power at this moment would leave of this one.
    pub(crate) fn after_a_cut(&self) -> Self {
        let other = Self::empty();
        std::fs::copy(self.image(), other.image()).unwrap();
        other.mount("rw")
    }
}
