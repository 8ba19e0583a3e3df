//! Removal of old kernels' modules.

use std::ffi::{OsStr, OsString};
use std::process::Stdio;

use anyhow::{Context, Result};

use crate::copy::rsync::rsync;
use crate::copy::tree::Tree;
use crate::write::below::Below;

/// Removes modules that the booted disk doesn't have from the modules directories of the spare's tree.
///
/// # Errors
/// As [`Tree::copy`].
pub fn drop_old_modules(tree: &Tree, target: &Below) -> Result<()> {
    for dir in ["/usr/lib/modules", "/lib/modules"] {
        let Some(inner) = dir.strip_prefix(tree.at.as_str()).and_then(|d| d.strip_prefix('/')) else { continue };
        let source = tree.source().join(inner);
        // Where /lib is a link to usr/lib, both are the same directory, which is handled once.
        if source.canonicalize().is_ok_and(|real| real == source) {
            // Most syncs have nothing to remove, and rsync would read the modules of all kernels to find that.
            let is_in_source = |name: &OsString| source.join(name).symlink_metadata().is_ok();
            let Some(modules) = target.sub(OsStr::new(inner))? else { continue };
            if modules.names(OsStr::new("."))?.iter().all(is_in_source) {
                continue;
            }
            // Only removals: the next sync stages other differences.
            let options = ["-aHAX", "--numeric-ids", "--one-file-system", "--delete", "--existing", "--ignore-existing"];
            let mut args: Vec<OsString> = options.map(Into::into).into();
            args.push(source.join("").into());
            args.push(format!("./{inner}/").into());
            rsync(args, Stdio::null(), Stdio::null(), target)
                .with_context(|| format!("the removal of old kernels' modules from {dir}"))?;
        }
    }
    Ok(())
}
