//! The differences that rsync reports.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::fs::{File, Metadata};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::{Context, Result, bail};

use crate::base::octal;
use crate::copy::stage;
use crate::write::below::Below;
use crate::write::change::{Change, Content};

/// The differences between the source and the spare's tree.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct Changes {
    /// The paths to stage, each followed by NUL.
    pub(crate) list: Vec<u8>,
    /// The files of which only attributes differ, in the same form.
    pub(crate) attributes: Vec<u8>,
    /// The new names of files that have several (hard links), in the same form.
    pub(crate) links: Vec<u8>,
    /// The paths that the source doesn't have. A directory's path ends in a slash, and comes after the paths in it.
    pub(crate) gone: Vec<OsString>,
    /// Whether the attributes of the top directory differ.
    pub(crate) top: bool,
}

impl Changes {
    pub(crate) fn parse(output: &[u8]) -> Self {
        let mut found = Self::default();
        for line in output.split(|b| *b == b'\n') {
            let Some([item, path, link]) = fields(line) else { continue };
            let path = unescape(path);
            match item {
                [b'*', b'd', ..] => found.gone.push(path),
                [b'*', ..] => {}
                // Content, size and time are the same, and no name is new.
                [b'.' | b'h', b'f', b'.', b'.', b'.', ..] if link.is_empty() => append(&mut found.attributes, &path),
                [b'h', ..] => {
                    append(&mut found.links, &path);
                    // rsync links to the first name, and so that is listed, too, even if that file is unchanged.
                    append(&mut found.links, &unescape(link.strip_prefix(b" => ").unwrap_or_default()));
                }
                _ if path == "./" => found.top = true,
                // With a slash at the end, rsync would copy everything in the directory.
                _ => append(&mut found.list, OsStr::from_bytes(path.as_bytes().strip_suffix(b"/").unwrap_or(path.as_bytes()))),
            }
        }
        found
    }

    /// The directories that stay and lose a file, which changes their times.
    pub(crate) fn parents(&self, source: &Path) -> Vec<u8> {
        let parents: BTreeSet<&Path> = self.gone.iter().filter_map(|path| Path::new(path).parent()).collect();
        let gone: BTreeSet<&Path> = self.gone.iter().map(Path::new).collect();
        let mut list = Vec::new();
        for dir in parents.difference(&gone) {
            // A directory that is another kind of file in the source is listed already.
            if source.join(dir).symlink_metadata().is_ok_and(|meta| meta.is_dir()) {
                append(&mut list, dir.as_os_str());
            }
        }
        list
    }

    /// Refuses a change without enough room: the staged files exist at the same time as the files that they replace.
    pub(crate) fn check_room(&self, source: &Path, target: &Below) -> Result<()> {
        let staged = [&self.list, &self.attributes].into_iter().flat_map(|list| files(source, list));
        let needed = staged.fold(0u64, |sum, meta| sum.saturating_add(meta.len().min(meta.blocks().saturating_mul(512))));
        let s = nix::sys::statvfs::fstatvfs(target.fd())?;
        let free = s.fragment_size().saturating_mul(s.blocks_free());
        if needed > free {
            bail!(
                "the spare has {free} bytes free, but {needed} are staged before a file there is replaced, {} too few; nothing was \
                 changed. Remove unneeded files on the booted disk, or make the spare's partition larger, or make a new file system \
                 there",
                needed - free
            );
        }
        Ok(())
    }
}

/// The files among these paths. A file that was removed meanwhile is left out.
pub(crate) fn files(source: &Path, paths: &[u8]) -> impl Iterator<Item = Metadata> {
    let paths = paths.split(|b| *b == 0).filter(|path| !path.is_empty());
    paths.filter_map(|path| source.join(OsStr::from_bytes(path)).symlink_metadata().ok()).filter(Metadata::is_file)
}

/// Writes paths for rsync to read; None where `paths` is empty. The file stays readable after the staged files were removed.
pub(crate) fn list(paths: &[u8], name: &str, target: &Below) -> Result<Option<File>> {
    if paths.is_empty() {
        return Ok(None);
    }
    let path = format!("{}/{name}", stage::DIRECTORY);
    target.apply(&Change::Create { path: path.clone(), content: Content::Bytes(paths.to_vec()) })?;
    Ok(Some(target.file(&path)?.with_context(|| format!("{path} has gone"))?))
}

pub(crate) fn append(list: &mut Vec<u8>, path: &OsStr) {
    if !path.is_empty() {
        list.extend_from_slice(path.as_bytes());
        list.push(0);
    }
}

/// The fields of a line of [`Tree::comparison`]; other lines are messages.
pub(crate) fn fields(line: &[u8]) -> Option<[&[u8]; 3]> {
    let separator = |text: &'_ [u8]| text.windows(2).position(|two| two == b"//");
    let line = line.strip_prefix(b"//")?;
    let (item, rest) = line.split_at_checked(separator(line)?)?;
    let rest = rest.get(2..)?;
    let mut at = separator(rest)?;
    // A directory's path ends in a slash, before the separator.
    if rest.get(at + 2) == Some(&b'/') {
        at += 1;
    }
    let (path, link) = rest.split_at_checked(at)?;
    Some([item, path, link.get(2..)?])
}

/// A name as rsync printed it.
fn unescape(text: &[u8]) -> OsString {
    OsString::from_vec(octal::unescape(text, b"\\#").into_owned())
}

#[cfg(test)]
mod tests {

    use super::*;

    #[test]
    fn escaped_names_are_decoded() {
        for (text, bytes) in [
            (&b"a b"[..], &b"a b"[..]),
            (br"\#012x", b"\nx"),
            (br"x\#134#012", br"x\#012"),
            (br"\#377\#0", b"\xff\\#0"),
            (br"\#999", br"\#999"),
            // Not a number to rsync, which leaves the text unchanged.
            (br"\#+12", br"\#+12"),
        ] {
            assert_eq!(unescape(text).as_bytes(), bytes);
        }
    }
}
