//! Configuration files in systemd's syntax: their directories, their lines, booleans and time spans.
//!
//! The syntax is that of systemd.syntax(7). Comments, continuation lines, byte order mark, line ends and line numbers are handled here,
//! because serde_ini's parser, which reads the single lines, knows none of them.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::time::Duration;
use std::{fmt, fs};

use anyhow::{Context, Result, bail};
use serde_ini::Item;
use serde_ini::parse::OkIter;

use crate::base::root::Root;

/// The directories of configuration files, the most important one first.
const DIRS: [&str; 4] = ["/etc", "/run", "/usr/local/lib", "/usr/lib"];

/// The name of the main file; drop-ins are in the directory of this name with `.d` added.
pub(super) const MAIN: &str = "dualroot.conf";

/// The paths and contents of the files that make up the configuration, the main file first.
pub(super) fn sources(root: &Root) -> Result<Vec<(String, Vec<u8>)>> {
    let mut found = Vec::new();
    for dir in DIRS {
        let path = format!("{dir}/{MAIN}");
        if let Some(text) = read(root, &path)? {
            found.push((path, text));
            break;
        }
    }
    let mut dropins: BTreeMap<OsString, (String, Vec<u8>)> = BTreeMap::new();
    for dir in DIRS.map(|dir| format!("{dir}/{MAIN}.d")) {
        for name in root.names(&dir).with_context(|| format!("can't list {dir}"))? {
            let bytes = name.as_encoded_bytes();
            if !bytes.ends_with(b".conf") || bytes.starts_with(b".") || dropins.contains_key(&name) {
                continue;
            }
            // The name appears in units and messages, where a newline in it would begin a new line.
            let text = name.to_str().filter(|text| !text.chars().any(char::is_control));
            let text = text
                .with_context(|| format!("{dir}: expected names without control characters, found '{}'", bytes.escape_ascii()))?;
            let path = format!("{dir}/{text}");
            if let Some(text) = read(root, &path)? {
                dropins.insert(name, (path, text));
            }
        }
    }
    found.extend(dropins.into_values());
    Ok(found)
}

/// The content of a regular file; empty for /dev/null; None for a missing file or a dangling link. Other types of files are refused
/// before they are opened: a named pipe would hold up the boot.
fn read(root: &Root, path: &str) -> Result<Option<Vec<u8>>> {
    match fs::metadata(root.path(path)) {
        Ok(meta) if meta.is_file() => root.read_opt(path).with_context(|| format!("can't read {path}")),
        Ok(meta) if meta.file_type().is_char_device() && meta.rdev() == nix::sys::stat::makedev(1, 3) => Ok(Some(Vec::new())),
        Ok(_) => bail!("{path} is not a regular file"),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e).with_context(|| format!("can't read {path}")),
    }
}

/// A line of a file.
#[derive(Clone, Debug)]
pub(super) struct Place {
    /// The file's path.
    pub(super) file: String,
    /// The number of the line, from 1.
    pub(super) line: usize,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.file, self.line)
    }
}

/// A line that was read. The text of one that can't be understood has its special characters escaped.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Line {
    /// `[name]`
    Section(String),
    /// `key=value`, which may both be empty.
    Assignment {
        /// The text before the first `=`.
        key: String,
        /// The text after it.
        value: String,
    },
    /// A line that begins with a bracket and is no section.
    BadSection(String),
    /// Neither a section nor an assignment.
    BadAssignment(String),
    /// Not UTF-8.
    NotUtf8(String),
}

/// The lines of a file, except comments and blank ones, with their numbers.
pub(super) fn lines(text: &[u8]) -> Vec<(usize, Line)> {
    logical_lines(text).into_iter().filter_map(|(number, bytes)| Some((number, line(&bytes)?))).collect()
}

fn line(bytes: &[u8]) -> Option<Line> {
    let Ok(text) = std::str::from_utf8(bytes) else { return Some(Line::NotUtf8(bytes.escape_ascii().to_string())) };
    let text = text.trim();
    match serde_ini::Parser::new(OkIter([text].into_iter())).next() {
        Some(Ok(Item::Section { name })) => Some(Line::Section(name)),
        Some(Ok(Item::Value { key, value })) => Some(Line::Assignment { key, value }),
        Some(Ok(Item::Empty | Item::Comment { .. })) | None => None,
        Some(Err(_)) if text.starts_with('[') => Some(Line::BadSection(text.escape_debug().to_string())),
        Some(Err(_)) => Some(Line::BadAssignment(text.escape_debug().to_string())),
    }
}

/// The lines of a file, joined as in systemd.syntax(7): without comments and blank lines; a line that ends in a backslash goes on with
/// the next line that is no comment. Each has the number of its first line.
fn logical_lines(text: &[u8]) -> Vec<(usize, Vec<u8>)> {
    let text = text.strip_prefix(b"\xef\xbb\xbf").unwrap_or(text);
    let mut lines = Vec::new();
    let mut open: Option<(usize, Vec<u8>)> = None;
    for (number, line) in (1..).zip(text.split(|b| *b == b'\n')) {
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        if let Some(b'#' | b';') = line.trim_ascii_start().first() {
            continue;
        }
        let (number, mut joined) = open.take().unwrap_or((number, Vec::new()));
        joined.extend_from_slice(line);
        // An even number of backslashes are escaped ones, and continue nothing.
        if joined.iter().rev().take_while(|b| **b == b'\\').count() % 2 == 1 {
            joined.pop();
            joined.push(b' ');
            open = Some((number, joined));
        } else {
            lines.push((number, joined));
        }
    }
    lines.extend(open);
    lines.retain(|(_, line)| !line.trim_ascii().is_empty());
    lines
}

/// A boolean, in systemd's spellings.
pub(super) fn boolean(text: &str) -> Result<bool> {
    match text.to_ascii_lowercase().as_str() {
        "1" | "yes" | "y" | "true" | "t" | "on" => Ok(true),
        "0" | "no" | "n" | "false" | "f" | "off" => Ok(false),
        _ => bail!("expected yes or no, found '{}'", text.escape_debug()),
    }
}

/// A time span as in systemd.time(7): numbers with units, added up; without a unit, seconds.
pub(super) fn time_span(text: &str) -> Result<Duration> {
    let expected = || format!("expected a time span such as 5s, 500ms or 2min 30s, found '{}'", text.escape_debug());
    let mut rest = text.trim();
    let mut sum = Duration::ZERO;
    loop {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(rest.len());
        let (number, tail) = rest.split_at_checked(digits).with_context(expected)?;
        let tail = tail.trim_start();
        let letters = tail.find(|c: char| !c.is_alphabetic()).unwrap_or(tail.len());
        let (unit, tail) = tail.split_at_checked(letters).with_context(expected)?;
        let micros: u64 = match unit {
            "us" | "usec" | "µs" | "μs" => 1,
            "ms" | "msec" => 1_000,
            "" | "s" | "sec" | "second" | "seconds" => 1_000_000,
            "m" | "min" | "minute" | "minutes" => 60_000_000,
            "h" | "hr" | "hour" | "hours" => 3_600_000_000,
            "d" | "day" | "days" => 86_400_000_000,
            "w" | "week" | "weeks" => 604_800_000_000,
            _ => bail!(expected()),
        };
        let (whole, fraction) = number.split_once('.').unwrap_or((number, "0"));
        // systemd counts in microseconds: further decimals are dropped.
        let fraction = fraction.get(..6).unwrap_or(fraction);
        let scale = u32::try_from(fraction.len()).ok().and_then(|n| 10_u64.checked_pow(n)).with_context(expected)?;
        let whole: u64 = whole.parse().ok().with_context(expected)?;
        let fraction: u64 = fraction.parse().ok().with_context(expected)?;
        let micros = (whole.checked_mul(micros))
            .and_then(|w| w.checked_add(fraction.checked_mul(micros)? / scale))
            .with_context(expected)?;
        sum = sum.checked_add(Duration::from_micros(micros)).with_context(expected)?;
        rest = tail.trim_start();
        if rest.is_empty() {
            return Ok(sum);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn time_spans_as_systemd_reads_them() {
        for (text, micros) in [
            ("5", 5_000_000),
            ("5s", 5_000_000),
            ("0", 0),
            ("1.5s", 1_500_000),
            ("1.000001", 1_000_001),
            ("500ms", 500_000),
            ("1min", 60_000_000),
            ("2min 30s", 150_000_000),
            ("2min30", 150_000_000),
            ("1 h", 3_600_000_000),
            ("1d 1us", 86_400_000_001),
            ("3 µs", 3),
            ("1w", 604_800_000_000),
        ] {
            assert_eq!(time_span(text).unwrap(), Duration::from_micros(micros), "{text}");
        }
        for text in [
            "",
            "s",
            "-5",
            "5x",
            "infinity",
            "5 5 s s",
            "1.2.3",
            ".",
            "1.",
            "99999999999999999999",
            "18446744073709551615w",
            "5é",
        ] {
            assert!(time_span(text).is_err(), "{text}");
        }
    }

    #[test]
    fn continued_lines_are_joined() {
        let text = b"\xef\xbb\xbfa=1\r\n  \t\n # note\nb=2 \\\r\n ; not this\n   3\\\\\n\n;x\nc=\\\n";
        let lines: Vec<_> = logical_lines(text).into_iter().map(|(n, l)| (n, String::from_utf8(l).unwrap())).collect();
        assert_eq!(lines, [(1, "a=1".to_owned()), (4, "b=2     3\\\\".to_owned()), (9, "c= ".to_owned())]);
        assert_eq!(logical_lines(b"x\\"), [(1, b"x ".to_vec())]);
        assert_eq!(logical_lines(b""), []);
    }

    #[test]
    fn lines_of_all_kinds() {
        let text = b"[a]\n k = v = w \n=\n[b\n\xff\nnothing\n";
        let is = |key: &str, value: &str| Line::Assignment { key: key.into(), value: value.into() };
        assert_eq!(
            lines(text),
            [
                (1, Line::Section("a".into())),
                (2, is("k", "v = w")),
                (3, is("", "")),
                (4, Line::BadSection("[b".into())),
                (5, Line::NotUtf8("\\xff".into())),
                (6, Line::BadAssignment("nothing".into())),
            ]
        );
    }

    proptest! {
        #[test]
        fn f26_any_time_span(text in "[0-9.]{0,30}[a-zµ ]{0,5}[0-9.]{0,30}") {
            let _ = time_span(&text);
        }
    }
}
