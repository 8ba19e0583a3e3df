//! Making LUKS containers with cryptsetup(8).
//!
//! Two keys open each container: the passphrase (or key file) of the booted disk's container, for booting the disk; and
//! [`crypttab::KEY`], for syncs. The booted disk's container gets the latter, too.

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

/// The key is random over its whole length, so slowing down guesses is useless.
const QUICK: [&str; 4] = ["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"];

/// The passphrase or key that opens the booted disk's containers. It is never shown.
pub struct Secret(Vec<u8>);

impl Secret {
    /// Takes the bytes of a typed passphrase or of a key file: every byte counts, as for cryptsetup(8).
    pub fn new(bytes: Vec<u8>) -> Self {
        Self(bytes)
    }

    /// Checks that it opens the container on a device.
    ///
    /// # Errors
    /// A refusal if not.
    pub fn check(&self, device: &str) -> Result<()> {
        // Only a key that lies inside the copy would open the copy.
        if fs::read(crypttab::KEY).is_ok_and(|key| key == self.0) {
            return Err(refused(format!(
                "{} is the key for syncs, which lies inside the container; give the passphrase or key that opens the disk when it boots; \
                 nothing was done",
                crypttab::KEY
            )));
        }
        match program::output_with_input("cryptsetup", test("-", device), &self.0) {
            Ok(_) => Ok(()),
            Err(e) => Err(refused(format!(
                "the passphrase or key does not open the LUKS container {device} ({e:#}); run this again with the right one; nothing was done"
            ))),
        }
    }
}

/// The arguments with which cryptsetup tries a key. Without --disable-external-tokens, it would try a TPM's key first.
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
    random.take(luks::MIN_KEY_BYTES).read_to_end(&mut key).context("/dev/urandom")?;
    let path = Path::new(crypttab::KEY).strip_prefix("/").unwrap_or(Path::new(crypttab::KEY));
    let (dir, path) = (path.parent().context("the key's path has no directory")?, path.to_str().context("not UTF-8")?);
    let below = Below::open(&root.path("/"))?;
    below.apply(&Change::MakeDir(dir.display().to_string()))?;
    below.apply(&Change::Create { path: path.to_owned(), content: Content::Bytes(key) })?;
    below.apply(&Change::Barrier)
}

/// Makes a container on a device.
///
/// # Errors
/// A failure of cryptsetup.
pub fn format(device: &str, uuid: &Uuid, secret: &Secret) -> Result<()> {
    let kind = ["luksFormat", "--batch-mode", "--type", "luks2", "--uuid"].map(OsString::from);
    let rest = ["--key-file", crypttab::KEY, device].map(OsString::from);
    program::output("cryptsetup", kind.into_iter().chain([uuid.to_string().into()]).chain(QUICK.map(Into::into)).chain(rest))?;
    let add = ["luksAddKey", "--batch-mode", "--key-file", crypttab::KEY, device, "-"];
    program::output_with_input("cryptsetup", add.map(Into::into), &secret.0).map(drop)
}

/// Adds the key file to the booted disk's container on a device, unless it opens that already.
///
/// # Errors
/// A failure of cryptsetup.
pub fn add_key(device: &str, secret: &Secret) -> Result<()> {
    if program::output("cryptsetup", test(crypttab::KEY, device)).is_ok() {
        return Ok(());
    }
    let first = ["luksAddKey", "--batch-mode", "--key-file", "-"].into_iter().chain(QUICK);
    let all = first.chain([device, crypttab::KEY]).map(OsString::from);
    program::output_with_input("cryptsetup", all, &secret.0)
        .map(drop)
        .with_context(|| format!("{} can't be added to the keys of {device}", crypttab::KEY))
}
