//! fstab(5), by line and by field, on bytes; everything that isn't changed stays byte for byte.
//!
//! Lines and fields are split as in libmount: blanks and tabs separate fields, a carriage return before the newline is dropped, `#` at the
//! beginning of a line (after blanks) begins a comment, and three octal digits after a backslash are a byte.

use std::borrow::Cow;
use std::ops::Range;

use crate::base::octal::unescape;
use crate::base::types::DirPath;
use crate::names::cmdline::is_subvolume_option;
use crate::names::ident::Rewriter;

/// The byte before a byte in octal, as for libmount.
const MARK: &[u8] = b"\\";

/// A field of a line.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Field<'a> {
    /// The field's place in the file; empty, at the end of the line, if the line has fewer fields.
    pub span: Range<usize>,
    /// The field's bytes, with escapes.
    pub raw: &'a [u8],
}

impl<'a> Field<'a> {
    /// The field's text, with escapes such as `\040` decoded.
    pub fn text(&self) -> Cow<'a, [u8]> {
        unescape(self.raw, MARK)
    }

    /// As [`Field::text`]; bytes that aren't UTF-8 become replacement characters.
    pub fn to_str_lossy(&self) -> String {
        String::from_utf8_lossy(&self.text()).into_owned()
    }

    /// Whether the line lacks this field.
    pub fn is_empty(&self) -> bool {
        self.raw.is_empty()
    }
}

/// A line that mounts something.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Line<'a> {
    /// The device: `UUID=…`, a path, and so on.
    pub spec: Field<'a>,
    /// The mount point.
    pub file: Field<'a>,
    /// The type of the file system.
    pub fstype: Field<'a>,
    /// The options, separated by commas.
    pub options: Field<'a>,
    /// The fifth field, for dump(8).
    pub freq: Field<'a>,
    /// The sixth field: the order of fsck(8). See [`Line::passno`].
    pub pass: Field<'a>,
    /// The number of the line in the file, from 1.
    pub number: usize,
    /// The line's place in the file, with its newline.
    pub span: Range<usize>,
}

impl Line<'_> {
    /// The mount point without doubled and trailing slashes, `/` for the root; None if the field is not an absolute path, such as
    /// `none` for swap. `.` and `..` stay, as in systemd.
    pub fn mount_point(&self) -> Option<Vec<u8>> {
        let text = self.file.text();
        if text.first() != Some(&b'/') {
            return None;
        }
        let mut path = Vec::with_capacity(text.len());
        for part in text.split(|b| *b == b'/').filter(|p| !p.is_empty()) {
            path.push(b'/');
            path.extend(part);
        }
        if path.is_empty() {
            path.push(b'/');
        }
        Some(path)
    }

    /// The mount point as a [`DirPath`]; None for swap, for `/`, and for an invalid path.
    pub fn dir(&self) -> Option<DirPath> {
        DirPath::parse(std::str::from_utf8(&self.mount_point()?).ok()?).ok()
    }

    /// Whether the line mounts on this directory (an absolute path without doubled or trailing slashes).
    pub fn is_at(&self, path: &str) -> bool {
        self.mount_point().is_some_and(|p| p == path.as_bytes())
    }

    /// Whether the line is for swap space.
    pub fn is_swap(&self) -> bool {
        self.fstype.raw == b"swap"
    }

    /// The single options. As in libmount, a comma inside double quotes doesn't separate (SELinux contexts have them).
    pub fn options(&self) -> Vec<Cow<'_, [u8]>> {
        let mut quoted = false;
        self.options
            .raw
            .split(|b| {
                quoted ^= *b == b'"';
                *b == b',' && !quoted
            })
            .filter(|o| !o.is_empty())
            .map(|option| unescape(option, MARK))
            .collect()
    }

    /// Whether the line has an option without a value, such as `nofail`.
    pub fn has_option(&self, name: &str) -> bool {
        self.options().iter().any(|o| **o == *name.as_bytes())
    }

    /// The values of an option such as `x-systemd.requires`, in order.
    pub fn option_values(&self, name: &str) -> Vec<Vec<u8>> {
        let value = |o: &Cow<'_, [u8]>| o.strip_prefix(name.as_bytes())?.strip_prefix(b"=").map(<[u8]>::to_vec);
        self.options().iter().filter_map(value).collect()
    }

    /// The sixth field as a number; 0 (no check) if it is absent or not a number.
    pub fn passno(&self) -> u32 {
        std::str::from_utf8(self.pass.raw).ok().and_then(|t| t.parse().ok()).unwrap_or(0)
    }

    /// Whether boot waits for this line: it has neither `nofail` nor `noauto`, and is no automount. `/` is always needed, and `/usr`
    /// is no automount at boot.
    pub fn is_needed_at_boot(&self) -> bool {
        let automount = self.has_option("x-systemd.automount") && !self.is_at("/usr");
        self.is_at("/") || !(self.has_option("nofail") || self.has_option("noauto") || automount)
    }
}

/// The lines that mount something: not comments, blank lines, and lines of one field.
pub fn lines(fstab: &[u8]) -> impl Iterator<Item = Line<'_>> {
    split(fstab).enumerate().filter_map(|(index, span)| parse(fstab, span, index + 1))
}

/// fstab with every identifier of another disk replaced, also in comments. Lines whose mount point `keep` accepts name another disk on
/// purpose (the spares' directories, and those of esp-mountpoint=), and stay byte for byte.
pub fn rewrite(fstab: &[u8], rewriter: &Rewriter, keep: impl Fn(&DirPath) -> bool) -> Vec<u8> {
    let mut out = Vec::with_capacity(fstab.len());
    for span in split(fstab) {
        let text = fstab.get(span.clone()).unwrap_or_default();
        if parse(fstab, span, 0).and_then(|line| line.dir()).is_some_and(|dir| keep(&dir)) {
            out.extend(text);
        } else {
            out.extend(rewriter.rewrite(text));
        }
    }
    out
}

/// fstab without the lines that `goes` accepts.
pub fn without_lines(fstab: &[u8], goes: impl Fn(&Line<'_>) -> bool) -> Vec<u8> {
    let goes = |span: &Range<usize>| parse(fstab, span.clone(), 0).is_some_and(|line| goes(&line));
    split(fstab).filter(|span| !goes(span)).filter_map(|span| fstab.get(span)).flatten().copied().collect()
}

/// fstab without the options that select the root's btrfs subvolume: `rootflags=` on the kernel command line selects it.
pub fn without_subvolume_options(fstab: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(fstab.len());
    let mut done = 0;
    for line in lines(fstab).filter(|line| line.is_at("/") && line.fstype.raw == b"btrfs") {
        let options: Vec<&[u8]> = line.options.raw.split(|b| *b == b',').collect();
        let left: Vec<&[u8]> = options.iter().copied().filter(|option| !is_subvolume_option(option)).collect();
        if left.len() < options.len() {
            out.extend(fstab.get(done..line.options.span.start).unwrap_or_default());
            out.extend(if left.is_empty() { b"defaults".to_vec() } else { left.join(&b',') });
            done = line.options.span.end;
        }
    }
    out.extend(fstab.get(done..).unwrap_or_default());
    out
}

/// The swap files: paths outside /dev.
pub fn swap_files(fstab: &[u8]) -> Vec<String> {
    let specs = lines(fstab).filter(Line::is_swap).map(|line| line.spec.to_str_lossy());
    specs.filter(|spec| spec.starts_with('/') && !spec.starts_with("/dev/")).collect()
}

/// The lines ("line N (DIRECTORY)") that boot needs and that mount a subvolume of the root's partition which doesn't exist on the spare:
/// it isn't copied with the root. `names` tells whether a text names that partition, `is_there` whether a subvolume exists.
pub fn missing_subvolumes(fstab: &[u8], names: impl Fn(&[u8]) -> bool, is_there: impl Fn(&str) -> bool) -> Vec<String> {
    let is_absent = |option: &[u8]| match option.strip_prefix(b"subvol=") {
        Some(path) => !std::str::from_utf8(path).is_ok_and(|path| is_there(path.trim_matches('/'))),
        // A subvolume has another number on each file system.
        None => option.starts_with(b"subvolid="),
    };
    let lacks = |line: &Line<'_>| line.options.raw.split(|b| *b == b',').any(is_absent);
    let beside = lines(fstab).filter(|line| !line.is_at("/") && line.is_needed_at_boot() && names(line.spec.raw) && lacks(line));
    beside.map(|line| format!("line {} ({})", line.number, line.file.to_str_lossy().escape_debug())).collect()
}

/// The lines ("line N (DIRECTORY) needs …") that boot needs and that name another disk than the rewriter's target (failure mode 14). Lines
/// that are kept on purpose count too: boot would wait for a spare.
pub fn foreign_ids_needed_at_boot(fstab: &[u8], rewriter: &Rewriter) -> Vec<String> {
    let mut found = Vec::new();
    for line in lines(fstab).filter(Line::is_needed_at_boot) {
        let names = rewriter.foreign(fstab.get(line.span.clone()).unwrap_or_default());
        if !names.is_empty() {
            let place = line.file.to_str_lossy();
            found.push(format!("line {} ({}) needs {}", line.number, place.escape_debug(), names.join(", ")));
        }
    }
    found
}

/// The places of all lines, with their newlines.
fn split(text: &[u8]) -> impl Iterator<Item = Range<usize>> {
    let mut start = 0;
    text.split_inclusive(|b| *b == b'\n').map(move |line| {
        let span = start..start + line.len();
        start = span.end;
        span
    })
}

fn parse(fstab: &[u8], span: Range<usize>, number: usize) -> Option<Line<'_>> {
    let text = fstab.get(span.clone())?;
    let text = text.strip_suffix(b"\n").unwrap_or(text);
    let text = text.strip_suffix(b"\r").unwrap_or(text);
    let mut at = 0;
    let mut field = || {
        let blank = |b: &u8| matches!(b, b' ' | b'\t');
        let rest = text.get(at..).unwrap_or_default();
        let start = at + rest.iter().position(|b| !blank(b)).unwrap_or(rest.len());
        let rest = text.get(start..).unwrap_or_default();
        at = start + rest.iter().position(blank).unwrap_or(rest.len());
        Field { span: span.start + start..span.start + at, raw: text.get(start..at).unwrap_or_default() }
    };
    let line = Line {
        spec: field(),
        file: field(),
        fstype: field(),
        options: field(),
        freq: field(),
        pass: field(),
        number,
        span: span.clone(),
    };
    (!line.spec.raw.starts_with(b"#") && !line.file.is_empty()).then_some(line)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::names::ident::tests::{ROOT_A, ROOT_B, to_b};

    fn one(text: &str) -> Line<'_> {
        let mut all = lines(text.as_bytes());
        let line = all.next().expect("a line");
        assert_eq!(all.next(), None);
        line
    }

    #[test]
    fn fields_and_spans() {
        let text = "# comment\n\n \t \n  UUID=a  /mnt\t ext4 defaults,nofail,x-systemd.requires=/a\\040b 0 2\r\nshort\n";
        let line = one(text);
        assert_eq!((line.spec.raw, line.file.raw, line.fstype.raw), (&b"UUID=a"[..], &b"/mnt"[..], &b"ext4"[..]));
        assert_eq!(&text[line.file.span.clone()], "/mnt");
        assert_eq!(&text[line.pass.span.clone()], "2");
        assert_eq!((line.passno(), line.number), (2, 4));
        assert!(line.has_option("nofail") && !line.has_option("no") && !line.has_option("x-systemd.requires"));
        assert_eq!(line.option_values("x-systemd.requires"), [b"/a b"]);
        assert!(text[line.span.clone()].ends_with("0 2\r\n"));
    }

    #[test]
    fn lines_of_a_partition_are_removed() {
        let text = b"# /boot is /dev/sda1\n/dev/sda1 /boot vfat defaults 0 2\nUUID=1 / btrfs\n/dev/sda1 /efi vfat noauto";
        let left = without_lines(text, |line| line.spec.raw == b"/dev/sda1");
        assert_eq!(left, b"# /boot is /dev/sda1\nUUID=1 / btrfs\n");
        assert_eq!(without_lines(text, |_| false), text);
    }

    #[test]
    fn missing_fields_and_no_newline() {
        let line = one("/dev/sda2 /");
        assert!(line.is_at("/") && line.fstype.is_empty() && line.options().is_empty() && line.passno() == 0);
        assert_eq!(line.options.span, 11..11);
        assert_eq!(line.dir(), None);
        assert_eq!(lines(b"").count() + lines(b"#a b\n  # c d\none\n\r\n").count(), 0);
        assert_eq!(lines(b"a /b\nc /d").count(), 2);
        assert_eq!(one("a#b /c # d").fstype.raw, b"#");
    }

    #[test]
    fn mount_points_are_normalised_and_unescaped() {
        assert_eq!(one("x //mnt///root1/ ext4").dir().unwrap().as_str(), "/mnt/root1");
        assert!(one(r"x /a\040b\011c\134d\043e\012f ext4").is_at("/a b\tc\\d#e\nf"));
        assert!(one(r"x /a\04 ext4").is_at(r"/a\04"));
        assert!(one(r"x /a\777 ext4").is_at(r"/a\777"));
        let swap = one("UUID=s none swap sw 0 0");
        assert!(swap.is_swap() && swap.mount_point().is_none());
        let files =
            swap_files(b"UUID=s none swap sw\n/dev/sda3 none swap\n/a\\040b none swap sw 0 0\n/c /d none bind\n#/e none swap\n");
        assert_eq!(files, ["/a b"]);
        assert_eq!(one("x /a/../b ext4").dir(), None);
    }

    #[test]
    fn options_with_quotes() {
        let line = one(r#"x / ext4 context="a:b,c",,nofail 0 1"#);
        assert_eq!(line.options().len(), 2);
        assert_eq!(line.option_values("context"), [br#""a:b,c""#]);
    }

    #[test]
    fn options_decide_whether_boot_needs_a_line() {
        for (options, needed) in
            [("defaults", true), ("rw,nofail", false), ("noauto", false), ("x-systemd.automount", false), ("nofailure", true)]
        {
            assert_eq!(one(&format!("x /data ext4 {options}")).is_needed_at_boot(), needed, "{options}");
        }
        assert!(one("x / ext4 nofail,noauto,x-systemd.automount").is_needed_at_boot());
        assert!(one("x /usr ext4 x-systemd.automount").is_needed_at_boot());
    }

    #[test]
    fn f12_every_line_is_rewritten_except_those_that_are_kept() {
        let old = format!(
            "# root was UUID={ROOT_A}\r\nUUID={ROOT_A}\t/  ext4 errors=remount-ro 0 1\n\n\
             UUID=AAAA-0001 /boot vfat umask=0077 0 2\nUUID={ROOT_A} //mnt/root1/ ext4 nofail\nLABEL=root none swap"
        );
        let new = format!(
            "# root was UUID={ROOT_B}\r\nUUID={ROOT_B}\t/  ext4 errors=remount-ro 0 1\n\n\
             UUID=BBBB-0001 /boot vfat umask=0077 0 2\nUUID={ROOT_A} //mnt/root1/ ext4 nofail\nUUID={ROOT_B} none swap"
        );
        let keep = |dir: &DirPath| dir.as_str() == "/mnt/root1";
        let once = rewrite(old.as_bytes(), &to_b(), keep);
        assert_eq!(String::from_utf8_lossy(&once), new);
        assert_eq!(rewrite(&once, &to_b(), keep), once);
        assert_eq!(foreign_ids_needed_at_boot(&once, &to_b()), [""; 0]);
    }

    #[test]
    fn f14_lines_that_boot_would_wait_for_are_found() {
        let text = format!(
            "# UUID={ROOT_A}\nUUID={ROOT_B} / ext4\nUUID={ROOT_A} /mnt/root1 ext4 ro,nofail 0 0\n\
             UUID=AAAA-0001 /mnt/root1/boot vfat ro 0 0\n/dev/sdb9 /x ext4 x-systemd.requires=/dev/sda2\nUUID={ROOT_A} none swap sw"
        );
        let found = foreign_ids_needed_at_boot(text.as_bytes(), &to_b());
        assert_eq!(found.len(), 3, "{found:?}");
        assert!(found[0].starts_with("line 4 (/mnt/root1/boot) needs UUID=AAAA-0001"), "{found:?}");
        assert!(found[1].contains("line 5 (/x)") && found[2].contains("line 6 (none)"), "{found:?}");
    }

    proptest! {
        #[test]
        fn f26_any_bytes_are_read(
            text in proptest::collection::vec(prop_oneof![Just(b' '), Just(b'\n'), Just(b'\\'), any::<u8>()], 0..200)
        ) {
            let mut last = 0;
            for line in lines(&text) {
                prop_assert!(line.span.start >= last && line.span.end <= text.len());
                last = line.span.end;
                for field in [&line.spec, &line.file, &line.fstype, &line.options, &line.freq, &line.pass] {
                    prop_assert_eq!(&text[field.span.clone()], field.raw);
                    prop_assert!(field.span.start >= line.span.start && field.span.end <= line.span.end);
                }
                line.options();
                line.dir();
            }
            prop_assert_eq!(split(&text).map(|s| s.len()).sum::<usize>(), text.len());
        }
    }

    #[test]
    fn options_for_the_roots_subvolume_are_removed() {
        for (text, expected) in [
            ("UUID=a / btrfs subvol=@ 0 0\n", "UUID=a / btrfs defaults 0 0\n"),
            ("UUID=a  /  btrfs  noatime,subvolid=256,subvol=/@,ssd 0 0 # x", "UUID=a  /  btrfs  noatime,ssd 0 0 # x"),
            ("UUID=a / btrfs defaults 0 0\nUUID=a /home btrfs subvol=@home 0 0\n", ""),
            ("UUID=a / ext4 subvol=@ 0 0\n", ""),
            ("# UUID=a / btrfs subvol=@ 0 0\n", ""),
            ("UUID=a / btrfs\n", ""),
        ] {
            let expected = if expected.is_empty() { text } else { expected };
            assert_eq!(String::from_utf8_lossy(&without_subvolume_options(text.as_bytes())), expected, "{text}");
        }
    }

    #[test]
    fn f14_missing_subvolumes_of_the_roots_partition_are_found() {
        let text =
            b"UUID=a / btrfs subvol=@ 0 0\nUUID=a /home btrfs x,subvol=/@home 0 0\nUUID=a /srv btrfs nofail,subvol=@srv 0 0\n\
                     UUID=b /var btrfs subvol=@var 0 0\nUUID=a /opt btrfs x 0 0\nUUID=a /data btrfs subvolid=9 0 0\n";
        let found = |there: &str| missing_subvolumes(text, |spec| spec == b"UUID=a", |path| path == there);
        assert_eq!(found("@srv"), ["line 2 (/home)", "line 6 (/data)"]);
        assert_eq!(found("@home"), ["line 6 (/data)"]);
    }
}
