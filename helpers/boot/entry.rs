//! Menu entries of type 1 (Boot Loader Specification, UAPI.1): their file names with boot counters, the files that they need, and their
//! rewriting for another disk, line by line.

use std::fmt;
use std::ops::Range;

use anyhow::{Context, Result, bail};

use crate::names::ident::Rewriter;

/// The file name of an entry or of a unified kernel image: id, boot counters, extension.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct EntryName {
    /// The id, without counters and extension. It is the same on every disk, because EFI variables refer to it.
    pub id: String,
    /// The boot attempts that are left; None if the entry isn't counted, or not any more.
    pub tries_left: Option<u32>,
    /// The boot attempts that failed; None if the name doesn't tell.
    pub tries_done: Option<u32>,
    extension: String,
}

impl EntryName {
    /// Reads `ID.conf`, `ID+LEFT.conf` or `ID+LEFT-DONE.conf`, or the same with `.efi`. As in the boot loader, a plus sign that isn't
    /// followed by counters belongs to the id.
    ///
    /// # Errors
    /// Another extension, an empty id, one that begins with a dot, and names with slashes or control characters.
    pub fn parse(name: &str) -> Result<Self> {
        let quoted = name.escape_debug();
        if name.starts_with('.') || name.contains(['/', '\\']) || name.chars().any(char::is_control) {
            bail!("'{quoted}' is not a valid name for a menu entry");
        }
        let (stem, extension) = name.rsplit_once('.').with_context(|| format!("'{quoted}' has no extension"))?;
        if !extension.eq_ignore_ascii_case("conf") && !extension.eq_ignore_ascii_case("efi") {
            bail!("'{quoted}' ends neither in .conf nor in .efi");
        }
        let (id, tries_left, tries_done) = match stem.rsplit_once('+').and_then(|(id, rest)| Some((id, counters(rest)?))) {
            Some((id, (left, done))) => (id, Some(left), done),
            None => (stem, None, None),
        };
        if id.is_empty() {
            bail!("'{quoted}' has no id");
        }
        Ok(Self { id: id.to_owned(), tries_left, tries_done, extension: extension.to_owned() })
    }
}

impl fmt::Display for EntryName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.id)?;
        match (self.tries_left, self.tries_done) {
            (Some(left), Some(done)) => write!(f, "+{left}-{done}")?,
            (Some(left), None) => write!(f, "+{left}")?,
            (None, _) => {}
        }
        write!(f, ".{}", self.extension)
    }
}

fn counters(text: &str) -> Option<(u32, Option<u32>)> {
    let number = |digits: &str| digits.bytes().all(|b| b.is_ascii_digit()).then(|| digits.parse().ok()).flatten();
    match text.split_once('-') {
        Some((left, done)) => Some((number(left)?, Some(number(done)?))),
        None => Some((number(text)?, None)),
    }
}

/// A line's key and value; None for a blank line, a comment, or a key without a value.
fn field(line: &[u8]) -> Option<(&[u8], &[u8])> {
    let line = line.trim_ascii();
    if line.starts_with(b"#") {
        return None;
    }
    let end = line.iter().position(u8::is_ascii_whitespace)?;
    let (key, value) = line.split_at_checked(end)?;
    Some((key, value.trim_ascii()))
}

/// The files that an entry needs, as paths below its partition: kernel, initrds, EFI program, unified kernel image and device trees.
/// Paths that aren't UTF-8 are left out: FAT has none.
pub fn files(entry: &[u8]) -> Vec<String> {
    let lines = entry.split(|b| *b == b'\n');
    lines.flat_map(|line| paths(line).into_iter().map(|(_, path)| path)).collect()
}

/// The entry with each of its [`files`] replaced by the path that `to` returns for it, if any. Every other byte stays.
pub fn redirect(entry: &[u8], to: impl Fn(&str) -> Option<String>) -> Vec<u8> {
    let mut out = Vec::with_capacity(entry.len());
    for line in entry.split_inclusive(|b| *b == b'\n') {
        let mut done = 0;
        for (span, path) in paths(line) {
            if let Some(other) = to(&path) {
                out.extend(line.get(done..span.start).unwrap_or_default());
                out.push(b'/');
                out.extend(other.bytes());
                done = span.end;
            }
        }
        out.extend(line.get(done..).unwrap_or_default());
    }
    out
}

/// The paths in a line, with their places, as paths below the partition. As in the boot loader and the firmware, quotes around a value are
/// dropped, and a backslash, or several slashes, count as one slash. No `..` leads out of the partition.
fn paths(line: &[u8]) -> Vec<(Range<usize>, String)> {
    let Some((key, value)) = field(line) else { return Vec::new() };
    let blanks = line.len() - line.trim_ascii_end().len();
    let mut start = line.len() - blanks - value.len();
    let value = match value {
        [b'"', inner @ .., b'"'] => {
            start += 1;
            inner
        }
        _ => value,
    };
    let words: Vec<&[u8]> = match key {
        b"linux" | b"initrd" | b"efi" | b"uki" | b"devicetree" => vec![value],
        b"devicetree-overlay" => value.split(u8::is_ascii_whitespace).collect(),
        _ => Vec::new(),
    };
    let mut found = Vec::new();
    for word in words {
        let mut names = Vec::new();
        for name in std::str::from_utf8(word).unwrap_or_default().split(['/', '\\']) {
            match name {
                "" | "." => {}
                ".." => drop(names.pop()),
                name => names.push(name),
            }
        }
        if !names.is_empty() {
            found.push((start..start + word.len(), names.join("/")));
        }
        start += word.len() + 1;
    }
    found
}

/// The value of the last line with this key.
pub fn value<'a>(text: &'a [u8], key: &str) -> Option<&'a [u8]> {
    text.split(|b| *b == b'\n').filter_map(field).rfind(|(k, _)| *k == key.as_bytes()).map(|(_, value)| value)
}

/// The prefixes of menu titles, from title= in the disks' sections.
#[derive(Clone, Default, Debug)]
pub struct Titles {
    /// The prefix of the disk that the entry is for.
    pub own: Option<String>,
    /// The prefixes of all disks, which are replaced at the beginning of a title.
    pub all: Vec<String>,
}

/// The entry for the rewriter's target: identifiers of other disks are replaced, and the title has the target's prefix. Every other byte
/// stays. A second call changes nothing.
pub fn rewrite(entry: &[u8], rewriter: &Rewriter, titles: &Titles) -> Vec<u8> {
    let mut out = Vec::with_capacity(entry.len() + 64);
    for line in entry.split_inclusive(|b| *b == b'\n') {
        match field(line) {
            Some((b"title", title)) if !titles.all.is_empty() => {
                // The bytes before and after the title stay.
                let after = line.len() - line.trim_ascii_end().len();
                let before = line.len() - after - title.len();
                out.extend(line.get(..before).unwrap_or_default());
                out.extend(retitle(title, titles));
                out.extend(line.get(line.len() - after..).unwrap_or_default());
            }
            Some((b"title", _)) => out.extend(line),
            _ => out.extend(rewriter.rewrite(line)),
        }
    }
    out
}

fn retitle(title: &[u8], titles: &Titles) -> Vec<u8> {
    let mut bare = title;
    // The longest first: one prefix may begin with another.
    let mut all: Vec<&String> = titles.all.iter().collect();
    all.sort_by_key(|prefix| std::cmp::Reverse(prefix.len()));
    while let Some(rest) = all.iter().find_map(|p| {
        let rest = bare.strip_prefix(p.as_bytes())?;
        (rest.is_empty() || rest.first().is_some_and(u8::is_ascii_whitespace)).then(|| rest.trim_ascii_start())
    }) {
        bare = rest;
    }
    match &titles.own {
        Some(own) if bare.is_empty() => own.as_bytes().to_vec(),
        Some(own) => [own.as_bytes(), b" ", bare].concat(),
        None if bare.is_empty() => title.to_vec(),
        None => bare.to_vec(),
    }
}

/// The beginning of the ids of entries for older generations. The boot loader sorts them last: they have no sort key, and entries without
/// one come after those with one, in descending order of their names, and the hyphen is the least character.
pub(crate) const OLDER_PREFIX: &str = "-dualroot-";

/// Whether this is the file name of an entry for an older generation. Those are on the same disk only, so it is never copied.
pub fn is_older_entry(name: &str) -> bool {
    name.starts_with(OLDER_PREFIX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn f25_names_and_counters_are_read_as_by_the_boot_loader() {
        for (name, id, left, done) in [
            ("a.conf", "a", None, None),
            ("a+3.conf", "a", Some(3), None),
            ("a+2-1.conf", "a", Some(2), Some(1)),
            ("a+0-3.EFI", "a", Some(0), Some(3)),
            ("6.1+deb12.conf", "6.1+deb12", None, None),
            ("6.1+deb12+3.conf", "6.1+deb12", Some(3), None),
            ("a+.conf", "a+", None, None),
            ("a+3-.conf", "a+3-", None, None),
        ] {
            let parsed = EntryName::parse(name).unwrap();
            assert_eq!((parsed.id.as_str(), parsed.tries_left, parsed.tries_done), (id, left, done), "{name}");
            assert_eq!(parsed.to_string(), name);
        }
        for name in ["", ".conf", "+3.conf", ".a.conf", "a/b.conf", "a\\b.conf", "a\nb.conf", "a", "a.txt", "../a.conf"] {
            assert!(EntryName::parse(name).is_err(), "{name}");
        }
    }

    #[test]
    fn all_files_of_an_entry_are_found() {
        let entry = b"# linux /not\ntitle x\nlinux /t/1/linux\ninitrd\t/ucode.img\ninitrd  /t/1/initrd \r\n\
            devicetree-overlay /a.dtbo /b.dtbo\noptions root=UUID=1 initrd=/x\nlinux\n";
        assert_eq!(files(entry), ["t/1/linux", "ucode.img", "t/1/initrd", "a.dtbo", "b.dtbo"]);
        assert_eq!(files(b"linux \"//t\\\\1/./linux\"\n"), ["t/1/linux"]);
        assert_eq!(value(b"timeout 3\ndefault a\ndefault b\n", "default"), Some(&b"b"[..]));
    }

    #[test]
    fn f26_no_path_leads_out_of_the_partition() {
        let entry = b"linux /../../etc/shadow\ninitrd a/../..\\b\ninitrd /..\nuki /EFI/../EFI/x.efi\n";
        assert_eq!(files(entry), ["etc/shadow", "b", "EFI/x.efi"]);
    }

    #[test]
    fn paths_are_redirected_however_they_are_written() {
        let to = |path: &str| path.ends_with("linux").then(|| ".staged".to_owned());
        for (line, expected) in [
            ("linux /t/linux\n", "linux /.staged\n"),
            ("  linux\tt//linux  \r\n", "  linux\t/.staged  \r\n"),
            ("linux \"\\t\\linux\"", "linux \"/.staged\""),
            ("devicetree-overlay /a  /linux /b\n", "devicetree-overlay /a  /.staged /b\n"),
            ("options linux=/t/linux\n", "options linux=/t/linux\n"),
            ("initrd /t/initrd", "initrd /t/initrd"),
        ] {
            assert_eq!(String::from_utf8_lossy(&redirect(line.as_bytes(), to)), expected, "{line}");
        }
    }

    #[test]
    fn titles_change_their_prefix_once() {
        let of = |own: Option<&str>| Titles { own: own.map(Into::into), all: vec!["Disk".into(), "Disk B".into(), "A".into()] };
        for (title, own, expected) in [
            ("Arch", Some("A"), "A Arch"),
            ("A Arch", Some("Disk B"), "Disk B Arch"),
            ("Disk B Arch", Some("Disk"), "Disk Arch"),
            ("Disk Arch", None, "Arch"),
            ("Another", Some("A"), "A Another"),
            ("A", Some("A"), "A"),
        ] {
            let once = retitle(title.as_bytes(), &of(own));
            assert_eq!(String::from_utf8_lossy(&once), expected, "{title}");
            assert_eq!(retitle(&once, &of(own)), once, "{title} twice");
        }
    }
}
