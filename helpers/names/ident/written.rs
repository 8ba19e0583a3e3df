//! Finds identifiers in a text, with their quotes and escapes, and writes replacements in the same form.

use std::ops::Range;

use super::needle::{Form, IdKind, Needle};

/// A place in a text where a needle was found.
pub(super) struct Match<'n> {
    pub(super) needle: &'n Needle,
    pub(super) span: Range<usize>,
    style: Style,
}

/// The way in which the characters of a match are written; the replacement is written the same way.
#[derive(Default)]
struct Style {
    /// The written forms of `-`, `/` and `=`; None if the character didn't occur.
    hyphen: Option<Vec<u8>>,
    slash: Option<Vec<u8>>,
    equals: Option<Vec<u8>>,
    /// The tag as written.
    tag: Vec<u8>,
    /// The quote after the tag.
    quote: Vec<u8>,
}

impl Style {
    fn note(&mut self, byte: u8, written: &[u8]) {
        let slot = match byte {
            b'-' => &mut self.hyphen,
            b'/' => &mut self.slash,
            b'=' => &mut self.equals,
            _ => return,
        };
        if slot.is_none() {
            *slot = Some(written.to_vec());
        }
    }

    /// In a unit's name slashes are hyphens, and hyphens are escaped.
    fn is_unit(&self) -> bool {
        self.slash.as_deref() == Some(b"-")
    }

    fn write(&self, out: &mut Vec<u8>, text: &str) {
        for byte in text.bytes() {
            let written = match byte {
                b'-' => &self.hyphen,
                b'/' => &self.slash,
                b'=' => &self.equals,
                _ => &None,
            };
            match written {
                Some(written) => out.extend(written),
                None => out.push(byte),
            }
        }
    }
}

/// The number of bytes before a match that are examined at most.
pub(super) const LOOK_BACK: usize = 32;

/// Tells whether a double quote is open on a line, for places in ascending order.
#[derive(Default)]
pub(super) struct Quotes {
    upto: usize,
    open: bool,
}

impl Quotes {
    /// Whether a double quote is open before a place.
    pub(super) fn open_at(&mut self, text: &[u8], at: usize) -> bool {
        let passed = text.get(self.upto..at).unwrap_or_default();
        let line = passed.rsplit(|b| *b == b'\n').next().unwrap_or_default();
        let begun = self.open && line.len() == passed.len();
        self.open = begun ^ (line.iter().filter(|b| **b == b'"').count() % 2 == 1);
        self.upto = at;
        self.open
    }

    /// Adjusts to a text that lost this many bytes at its beginning, all of them before the last place.
    pub(super) fn drop_bytes(&mut self, bytes: usize) {
        self.upto = self.upto.saturating_sub(bytes);
    }
}

/// Decodes the byte at a place and returns it with the length of its written form: the byte itself, `\xHH` (also with a doubled
/// backslash), or `\OOO`.
fn read(text: &[u8], at: usize) -> Option<(u8, usize)> {
    let rest = text.get(at..)?;
    let hex = |high: u8, low: u8| {
        let digit = |b: u8| char::from(b).to_digit(16);
        u8::try_from(digit(high)? * 16 + digit(low)?).ok()
    };
    let octal = |digits: [u8; 3]| {
        digits.iter().try_fold(0u32, |n, b| Some(n * 8 + char::from(*b).to_digit(8)?)).and_then(|n| u8::try_from(n).ok())
    };
    let escaped = match rest {
        [b'\\', b'x', h, l, ..] => hex(*h, *l).map(|b| (b, 4)),
        [b'\\', b'\\', b'x', h, l, ..] => hex(*h, *l).map(|b| (b, 5)),
        [b'\\', a, b, c, ..] => octal([*a, *b, *c]).map(|b| (b, 4)),
        _ => None,
    };
    escaped.or_else(|| rest.first().map(|b| (*b, 1)))
}

/// Whether the text before a place ends in an escape sequence: its last letter or digit then isn't one.
fn ends_in_escape(text: &[u8], at: usize) -> bool {
    at.checked_sub(4).is_some_and(|start| text.get(start..at).and_then(|t| read(t, 0)).is_some_and(|(_, len)| len == 4))
}

/// The match of a needle that begins at this place, if there is one.
pub(super) fn match_at<'n>(needle: &'n Needle, text: &[u8], at: usize, quotes: &mut Quotes) -> Option<Match<'n>> {
    let before = at.checked_sub(1).and_then(|p| text.get(p)).copied();
    let alnum = |b: Option<u8>| b.is_some_and(|b| b.is_ascii_alphanumeric());
    let word_before = alnum(before) && !ends_in_escape(text, at);
    let mut style = Style::default();
    let mut end = at;
    match needle.form {
        Form::Bare | Form::Dir(_) if word_before => return None,
        Form::Tag(IdKind::Uuid | IdKind::PartUuid) if word_before => return None,
        Form::Tag(_) if word_before || before == Some(b'_') => return None,
        Form::Unit if before.is_some_and(|b| b.is_ascii_alphanumeric() || br"_\-.:".contains(&b)) => return None,
        Form::Path if text.get(at) == Some(&b'/') && before.is_some_and(|b| is_path(b) || b == b'/') => return None,
        _ => {}
    }
    match needle.form {
        Form::Unit => {
            end += needle.value.len();
            let whole = text.get(at..end) == Some(&needle.value) && text.get(end) == Some(&b'.');
            return whole.then_some(Match { needle, span: at..end, style });
        }
        Form::Exact => {
            end += needle.value.len();
            let is_written = |(wanted, byte): (&u8, &u8)| wanted == byte || (*wanted, *byte) == (b'_', b'-');
            let whole = needle.value.iter().zip(text.get(at..end)?).all(is_written);
            return whole.then_some(Match { needle, span: at..end, style });
        }
        Form::Tag(kind) => {
            style.tag = text.get(at..at + kind.tag().len())?.to_vec();
            end = literal(needle, kind.tag().as_bytes(), text, end, &mut style, true)?;
            end = literal(needle, b"=", text, end, &mut style, true)?;
            style.quote = quote_at(text, end).to_vec();
            end += style.quote.len();
        }
        Form::Dir(kind) => end = literal(needle, kind.dir().as_bytes(), text, end, &mut style, false)?,
        Form::Bare | Form::Path => {}
    }
    let quoted = matches!(needle.form, Form::Tag(_)) && (!style.quote.is_empty() || quotes.open_at(text, at));
    end = literal(needle, &needle.value, text, end, &mut style, quoted)?;
    let after = text.get(end).copied();
    let ends = match needle.form {
        Form::Bare => !alnum(after),
        // An unclosed quote ends with its line.
        Form::Tag(_) if !style.quote.is_empty() => {
            matches!(after, None | Some(b'\n')) || text.get(end..)?.starts_with(&style.quote)
        }
        Form::Tag(_) => {
            let own_quote = before.filter(|b| matches!(b, b'"' | b'\''));
            is_end_of_value(text, end) && !(own_quote.is_some() && matches!(after, Some(b' ' | b'\t')))
        }
        Form::Dir(_) | Form::Path => is_end_of_path(text, end, &style),
        Form::Unit | Form::Exact => false,
    };
    ends.then_some(Match { needle, span: at..end, style })
}

/// Matches bytes of a needle, escaped or not, and returns their end. Blanks must be escaped unless `blanks`.
fn literal(needle: &Needle, wanted: &[u8], text: &[u8], at: usize, style: &mut Style, blanks: bool) -> Option<usize> {
    let mut end = at;
    for &wanted in wanted {
        let (byte, len) = read(text, end)?;
        let written = text.get(end..end + len)?;
        let same = byte == wanted || needle.any_case && byte.eq_ignore_ascii_case(&wanted);
        // In the name of a unit, `/` is written `-`, and `-` is escaped.
        let as_unit = wanted == b'/' && written == b"-" && style.hyphen.as_ref().is_some_and(|h| h.len() > 1);
        if !same && !as_unit || len == 1 && byte.is_ascii_whitespace() && !blanks {
            return None;
        }
        style.note(wanted, written);
        end += len;
    }
    Some(end)
}

/// The quote at a place, with a backslash before it if there is one.
fn quote_at(text: &[u8], at: usize) -> &[u8] {
    let rest = text.get(at..).unwrap_or_default();
    match rest {
        [b'"' | b'\'', ..] => rest.get(..1).unwrap_or_default(),
        [b'\\', b'"' | b'\'', ..] => rest.get(..2).unwrap_or_default(),
        _ => &[],
    }
}

fn is_end_of_value(text: &[u8], at: usize) -> bool {
    let Some(&byte) = text.get(at) else { return true };
    byte.is_ascii_whitespace() || byte.is_ascii_control() || br#""',:;)]}|&<>`"#.contains(&byte) || !quote_at(text, at).is_empty()
}

/// Whether a byte can continue the path of a device file.
fn is_path(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || br"_-+.@~%#\".contains(&byte) || !byte.is_ascii()
}

fn is_end_of_path(text: &[u8], at: usize, style: &Style) -> bool {
    let Some(&byte) = text.get(at) else { return true };
    let escaped_slash = style.slash.as_ref().is_some_and(|s| s != b"/");
    match byte {
        b'.' if escaped_slash => true,
        b'.' => !text.get(at + 1).is_some_and(|b| is_path(*b) || *b == b'/'),
        b'\\' => !quote_at(text, at).is_empty(),
        b'/' => false,
        _ => !is_path(byte),
    }
}

/// Writes the replacement of a match.
pub(super) fn write_replacement(found: &Match<'_>, new: &(IdKind, String), text: &[u8], out: &mut Vec<u8>) {
    let (kind, value) = new;
    let style = &found.style;
    match found.needle.form {
        Form::Bare | Form::Exact => style.write(out, value),
        Form::Tag(old) => {
            if old == *kind {
                out.extend(&style.tag);
            } else {
                out.extend(kind.tag().as_bytes());
            }
            style.write(out, "=");
            out.extend(&style.quote);
            style.write(out, value);
        }
        Form::Dir(_) => {
            style.write(out, kind.dir());
            style.write(out, value);
        }
        Form::Path if !style.is_unit() && is_root_argument(text, found.span.start) => {
            out.extend(format!("{}={value}", kind.tag()).bytes());
        }
        Form::Path => style.write(out, &format!("/dev/disk/{}{value}", kind.dir())),
        Form::Unit => out.extend(format!("dev-disk-by\\x2dpartuuid-{}", value.replace('-', "\\x2d")).bytes()),
    }
}

/// Whether a place is directly after `root=` or `resume=`, or after a quote there.
fn is_root_argument(text: &[u8], at: usize) -> bool {
    let before = text.get(at.saturating_sub(16)..at).unwrap_or_default();
    let before = before.strip_suffix(b"\"").or(before.strip_suffix(b"'")).unwrap_or(before);
    let before = before.strip_suffix(b"\\").unwrap_or(before);
    let key = before.strip_suffix(b"root=").or(before.strip_suffix(b"resume="));
    key.is_some_and(|rest| !rest.last().is_some_and(|b| b.is_ascii_alphanumeric() || b"._-".contains(b)))
}
