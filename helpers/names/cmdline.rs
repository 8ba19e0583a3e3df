//! A kernel's command line: which subvolume it boots.

/// Where a kernel's command line says how the root is mounted.
pub(crate) const FLAGS: &[u8] = b"rootflags=";

/// A value of a kernel's command line: the quotes around it, and what is in them.
pub(crate) fn unquote(value: &[u8]) -> (&[u8], &[u8]) {
    match value {
        [b'"', inner @ .., b'"'] => (b"\"", inner),
        _ => (b"", value),
    }
}

pub(crate) fn words(text: &[u8]) -> impl DoubleEndedIterator<Item = &[u8]> {
    text.split(u8::is_ascii_whitespace).filter(|word| !word.is_empty())
}

/// Whether a mount option says which subvolume of a btrfs is mounted.
pub fn names_subvolume(option: &[u8]) -> bool {
    option.starts_with(b"subvol=") || option.starts_with(b"subvolid=")
}

/// The subvolume that an entry boots, as a path from the top of the file system; None where it doesn't say.
pub(crate) fn booted_by(entry: &[u8]) -> Option<String> {
    let (_, flags) = unquote(words(entry).filter_map(|word| word.strip_prefix(FLAGS)).next_back()?);
    let path = flags.split(|b| *b == b',').filter_map(|flag| flag.strip_prefix(b"subvol=")).next_back()?;
    let path = std::str::from_utf8(path).ok()?.trim_matches('/');
    path.split('/').all(|name| name != "..").then(|| path.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn f26_no_entry_leads_out_of_the_file_system() {
        let of = |path: &str| booted_by(format!("options rootflags=subvol={path}\n").as_bytes());
        assert_eq!(of("/@rootfs/").as_deref(), Some("@rootfs"));
        for path in ["..", "../x", "a/../../x"] {
            assert_eq!(of(path), None, "{path}");
        }
    }
}
