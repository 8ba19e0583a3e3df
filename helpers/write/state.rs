//! Files in which dualroot keeps its state on the running system from one run to the next.

use std::path::Path;
use std::{fs, io};

use anyhow::{Context, Result};
use serde::de::DeserializeOwned;

use crate::write::below::Below;
use crate::write::change::{Change, Content};

/// The directory of these files. It, or `/var`, may be a file system of its own.
pub const DIRECTORY: &str = "/var/lib/dualroot";

/// Saves bytes in the file `name` of [`DIRECTORY`], unless it holds them already.
///
/// # Errors
/// The directory can't be made or written.
pub fn save(name: &str, bytes: Vec<u8>) -> Result<()> {
    save_in(Path::new(DIRECTORY), name, bytes)
}

/// Loads JSON that [`keep`] saved in the file `name`; `read` reads a file of the running system, if it exists. JSON that doesn't parse
/// counts as absent: what is kept here can be found out again.
///
/// # Errors
/// The file exists but can't be read.
pub fn load<T: Default + DeserializeOwned>(read: impl FnOnce(&str) -> io::Result<Option<Vec<u8>>>, name: &str) -> Result<T> {
    let path = format!("{DIRECTORY}/{name}");
    let bytes = read(&path).with_context(|| format!("{path} can't be read"))?.unwrap_or_default();
    Ok(serde_json::from_slice(&bytes).unwrap_or_default())
}

/// Opens a directory, and makes it if it doesn't exist. Opening the root instead would fail where `/var` is a file system of its own,
/// because a [`Below`] doesn't cross into another file system.
///
/// # Errors
/// The directory can't be made or opened.
pub fn open(dir: &Path) -> Result<Below> {
    fs::create_dir_all(dir).with_context(|| format!("{} can't be made", dir.display()))?;
    Below::open(dir)
}

fn save_in(dir: &Path, name: &str, bytes: Vec<u8>) -> Result<()> {
    let below = open(dir)?;
    match below.read(name)?.is_some_and(|old| old == bytes) {
        true => Ok(()),
        false => below.apply(&Change::Replace { path: name.to_owned(), content: Content::Bytes(bytes), like: None }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn var_may_be_a_file_system_of_its_own() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let tmp = tempfile::tempdir().unwrap();
        let var = tmp.path().join("var");
        fs::create_dir(&var).unwrap();
        crate::devices::held::enter_private_namespace().unwrap();
        nix::mount::mount(Some("none"), &var, Some("tmpfs"), nix::mount::MsFlags::empty(), None::<&str>).unwrap();
        let _mounted = crate::devices::scratch::Mounted::at(&var);
        let dir = var.join("lib/dualroot");
        for text in ["one", "another", "another"] {
            save_in(&dir, "file", text.into()).unwrap();
            assert_eq!(fs::read_to_string(dir.join("file")).unwrap(), text);
        }
    }
}
