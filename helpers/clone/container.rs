//! LUKS containers that are made: cryptsetup(8) does the work.
//!
//! Each opens by two keys: the passphrase, or whatever else, that opens the booted disk's, for whoever boots the disk; and
//! [`crypttab::KEY`], for syncs, which the booted disk's container gets, too.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result};
use uuid::Uuid;

use crate::base::program;
use crate::base::refusal::refused;
use crate::base::root::Root;
use crate::devices::luks;
use crate::names::crypttab;
use crate::write::below::Below;
use crate::write::change::{Change, Content};

/// The key is as random as it is long: to make guesses slow is of no use.
const QUICK: [&str; 4] = ["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"];

/// What opens the booted disk's containers. It is never shown.
pub struct Secret(Vec<u8>);

impl Secret {
    /// What somebody typed, or what a file holds: every byte counts, as for cryptsetup(8).
    pub fn new(bytes: Vec<u8>) -> Self {
        Self(bytes)
    }

    /// Whether it opens the container on a device.
    ///
    /// # Errors
    /// A refusal if not.
    pub fn check(&self, device: &str) -> Result<()> {
        // Such a copy could be opened by what is in the copy only.
        if fs::read(crypttab::KEY).is_ok_and(|key| key == self.0) {
            return Err(refused(format!(
                "{} is for syncs: a disk is opened by something else when it is booted; nothing was done",
                crypttab::KEY
            )));
        }
        match program::fed("cryptsetup", test("-", device), &self.0) {
            Ok(_) => Ok(()),
            Err(e) => Err(refused(format!("that does not open the LUKS container {device} ({e:#}); nothing was done"))),
        }
    }
}

/// The arguments that have cryptsetup try a key. What a TPM or the like has for it is another one, and would be asked first.
fn test(key: &str, device: &str) -> [OsString; 7] {
    ["open", "--test-passphrase", "--batch-mode", "--disable-external-tokens", "--key-file", key, device].map(Into::into)
}

/// Makes the key file, unless it is there.
///
/// # Errors
/// A key that others can read; a root that can't be written.
pub fn make_key(root: &Root) -> Result<()> {
    if luks::has_key()? {
        return Ok(());
    }
    let mut key = Vec::new();
    let random = File::open("/dev/urandom").context("/dev/urandom")?;
    random.take(luks::LEAST).read_to_end(&mut key).context("/dev/urandom")?;
    let path = Path::new(crypttab::KEY).strip_prefix("/").unwrap_or(Path::new(crypttab::KEY));
    let (dir, path) = (path.parent().context("the key is in no directory")?, path.to_str().context("not UTF-8")?);
    let below = Below::open(&root.path("/"))?;
    below.apply(&Change::MakeDir(dir.display().to_string()))?;
    below.apply(&Change::Create { path: path.to_owned(), content: Content::Bytes(key) })?;
    below.apply(&Change::Barrier)
}

/// Makes a container on a device.
///
/// # Errors
/// cryptsetup that fails.
pub fn format(device: &str, uuid: &Uuid, secret: &Secret) -> Result<()> {
    let kind = ["luksFormat", "--batch-mode", "--type", "luks2", "--uuid"].map(OsString::from);
    let rest = ["--key-file", crypttab::KEY, device].map(OsString::from);
    program::output("cryptsetup", kind.into_iter().chain([uuid.to_string().into()]).chain(QUICK.map(Into::into)).chain(rest))?;
    let add = ["luksAddKey", "--batch-mode", "--key-file", crypttab::KEY, device, "-"];
    program::fed("cryptsetup", add.map(Into::into), &secret.0).map(drop)
}

/// Has the key file open the booted disk's container on a device, unless it does.
///
/// # Errors
/// cryptsetup that fails.
pub fn add_key(device: &str, secret: &Secret) -> Result<()> {
    if program::output("cryptsetup", test(crypttab::KEY, device)).is_ok() {
        return Ok(());
    }
    let first = ["luksAddKey", "--batch-mode", "--key-file", "-"].into_iter().chain(QUICK);
    let all = first.chain([device, crypttab::KEY]).map(OsString::from);
    program::fed("cryptsetup", all, &secret.0)
        .map(drop)
        .with_context(|| format!("{} can't be made a key of {device}", crypttab::KEY))
}
