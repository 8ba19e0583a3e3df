//! Names in which some bytes are written in octal: `\040` in fstab(5), /proc/self/mountinfo and /proc/swaps, `\#040` in rsync(1)'s output.

use std::borrow::Cow;

/// Decodes each byte that is written as `mark` and three octal digits. A mark without such digits after it is kept.
pub fn unescape<'a>(text: &'a [u8], mark: &[u8]) -> Cow<'a, [u8]> {
    if !text.windows(mark.len().max(1)).any(|window| window == mark) {
        return text.into();
    }
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&first, tail)) = rest.split_first() {
        let (byte, left) = rest.strip_prefix(mark).and_then(digits).unwrap_or((first, tail));
        out.push(byte);
        rest = left;
    }
    out.into()
}

fn digits(text: &[u8]) -> Option<(u8, &[u8])> {
    let [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', rest @ ..] = text else { return None };
    Some(((a - b'0') * 64 + (b - b'0') * 8 + (c - b'0'), rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn f26_only_a_byte_in_three_octal_digits_is_decoded() {
        for (text, mark, expected) in [
            (&b"/a\\040b"[..], &b"\\"[..], &b"/a b"[..]),
            (b"\\303\\274", b"\\", "\u{fc}".as_bytes()),
            (b"\\400 \\08 \\04", b"\\", b"\\400 \\08 \\04"),
            (b"a\\#012b\\040", b"\\#", b"a\nb\\040"),
            (b"\\#\\#134#", b"\\#", b"\\#\\#"),
            (b"", b"\\", b""),
            (b"plain", b"\\#", b"plain"),
        ] {
            assert_eq!(unescape(text, mark), expected, "{}", text.escape_ascii());
        }
    }
}
