//! Modules of kernels that have gone.

use std::ffi::{OsStr, OsString};
use std::process::Stdio;

use anyhow::{Context, Result};

use crate::copy::rsync::rsync;
use crate::copy::tree::Tree;
use crate::write::below::Below;

/// Makes the modules directory of the spare's tree that of the booted disk, old kernels' modules gone.
///
/// # Errors
/// As [`Tree::copy`].
pub fn drop_old_modules(tree: &Tree, target: &Below) -> Result<()> {
    for dir in ["/usr/lib/modules", "/lib/modules"] {
        let Some(inner) = dir.strip_prefix(tree.at.as_str()).and_then(|d| d.strip_prefix('/')) else { continue };
        let source = tree.source().join(inner);
        // Where /lib is a link to usr/lib, it is the same directory.
        if source.canonicalize().is_ok_and(|real| real == source) {
            // Most syncs have none to remove, and rsync would read all modules of the others to find that.
            let stays = |name: &OsString| source.join(name).symlink_metadata().is_ok();
            let Some(there) = target.sub(OsStr::new(inner))? else { continue };
            if there.names(OsStr::new("."))?.iter().all(stays) {
                continue;
            }
            // What differs otherwise is for the next sync to stage.
            let only = ["-aHAX", "--numeric-ids", "--one-file-system", "--delete", "--existing", "--ignore-existing"];
            let mut args: Vec<OsString> = only.map(Into::into).into();
            args.push(source.join("").into());
            args.push(format!("./{inner}/").into());
            rsync(args, Stdio::null(), Stdio::null(), target)
                .with_context(|| format!("the removal of old kernels' modules from {dir}"))?;
        }
    }
    Ok(())
}
