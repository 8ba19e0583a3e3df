//! Searches initrds for identifiers of disks.

use std::io::{self, BufReader, Cursor, Read, Write};
use std::process::Stdio;
use std::thread;

use anyhow::{Context, Result, bail};

use crate::base::program;
use crate::boot::entry;
use crate::names::ident::Rewriter;

/// The largest kernel image or initrd that is searched, in bytes.
pub(crate) const LARGEST: u64 = 4 << 30;

/// The paths of the initrds that an entry names.
pub fn initrd_paths(text: &[u8]) -> Vec<String> {
    let lines = text.split(|b| *b == b'\n').filter(|line| line.trim_ascii().starts_with(b"initrd"));
    lines.flat_map(entry::files).collect()
}

/// The first bytes of each compression that the kernel knows, and the program that undoes it.
pub(crate) const COMPRESSIONS: [(&[u8], &str); 6] = [
    (b"\x1f\x8b", "gzip"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"\xfd7zXZ", "xz"),
    (b"\x5d\x00\x00", "xz"),
    (b"\x02\x21\x4c\x18", "lz4"),
    (b"BZh", "bzip2"),
];

/// The identifiers of other disks in an initrd: a sequence of archives, plain (such as that with the microcode) or compressed. A compressed
/// one ends the file, as initramfs-tools and dracut make them.
///
/// # Errors
/// Those of reading; the compression is unknown, or its program isn't installed.
pub fn search_initrd(stream: impl Read + Send, rewriter: &Rewriter) -> Result<Vec<String>> {
    let mut stream = BufReader::new(stream.take(LARGEST));
    let mut found = Vec::new();
    loop {
        // Archives are padded with zeros.
        let mut start = vec![0];
        while start == [0] {
            start.clear();
            if (&mut stream).take(1).read_to_end(&mut start)? == 0 {
                return Ok(found);
            }
        }
        (&mut stream).take(5).read_to_end(&mut start)?;
        if start.starts_with(b"07070") {
            found.extend(search_archive(start, &mut stream, rewriter)?);
            continue;
        }
        let Some((_, program)) = COMPRESSIONS.iter().find(|(magic, _)| start.starts_with(magic)) else {
            bail!("it begins with {}, which is neither a cpio archive nor a known compression", start.escape_ascii());
        };
        found.extend(search_compressed(program, Cursor::new(start).chain(stream), rewriter)?);
        return Ok(found);
    }
}

/// Searches the names and data of all files in a cpio archive of the "newc" form, up to its trailer.
pub(crate) fn search_archive(mut header: Vec<u8>, stream: &mut impl Read, rewriter: &Rewriter) -> Result<Vec<String>> {
    let mut found = Vec::new();
    loop {
        stream.take((110 - header.len()) as u64).read_to_end(&mut header)?;
        let field = |n: usize| -> Result<u64> {
            let at = 6 + n * 8;
            let digits = header.get(at..at + 8).and_then(|d| std::str::from_utf8(d).ok());
            digits.and_then(|d| u64::from_str_radix(d, 16).ok()).context("an archive in it is damaged")
        };
        let (size, name_size) = (field(6)?, field(11)?);
        let mut name = Vec::new();
        stream.take(name_size.min(4096)).read_to_end(&mut name)?;
        io::copy(&mut stream.take((4 - (110 + name_size) % 4) % 4), &mut io::sink())?;
        if name.strip_suffix(b"\0").unwrap_or(&name) == b"TRAILER!!!" {
            return Ok(found);
        }
        // With its NUL, as in a compressed archive.
        found.extend(rewriter.foreign(&name));
        found.extend(rewriter.foreign_in_stream(stream.take(size))?);
        io::copy(&mut stream.take((4 - size % 4) % 4), &mut io::sink())?;
        header.clear();
    }
}

/// Searches compressed data, decompressed by this program.
pub(crate) fn search_compressed(program: &str, mut stream: impl Read + Send, rewriter: &Rewriter) -> Result<Vec<String>> {
    let mut child = program::command(program)
        .with_context(|| {
            format!("it is compressed with {program}, which is not installed, so it can't be searched. Install {program}")
        })?
        .arg("-dc")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .with_context(|| format!("{program} can't be run"))?;
    let (Some(mut input), Some(output)) = (child.stdin.take(), child.stdout.take()) else { bail!("{program} has no pipes") };
    let found = thread::scope(|scope| {
        // The program may stop reading early because of garbage after its data; its exit status tells.
        scope.spawn(move || io::copy(&mut stream, &mut input).and_then(|_| input.flush()).is_ok());
        rewriter.foreign_in_stream(output)
    });
    let status = child.wait().with_context(|| format!("{program} can't be waited for"))?;
    let found = found.with_context(|| format!("the output of {program} can't be read"))?;
    // gzip skips zeros after its data; for anything else there, which the kernel would unpack, it exits with 2.
    if !status.success() {
        bail!("{program} can't decompress it ({status}). Make the initrd again");
    }
    Ok(found)
}
