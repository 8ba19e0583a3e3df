//! Kernel command lines: the subvolume that one boots.

/// The kernel parameter with the mount options of the root.
pub(crate) const ROOT_FLAGS: &[u8] = b"rootflags=";

/// Splits the value of a kernel parameter into its quote (or nothing) and the text inside.
pub(crate) fn unquote(value: &[u8]) -> (&[u8], &[u8]) {
    match value {
        [b'"', inner @ .., b'"'] => (b"\"", inner),
        _ => (b"", value),
    }
}

/// The words of a text, separated by blanks and newlines.
pub(crate) fn words(text: &[u8]) -> impl DoubleEndedIterator<Item = &[u8]> {
    text.split(u8::is_ascii_whitespace).filter(|word| !word.is_empty())
}

/// Whether a mount option selects a subvolume of a btrfs.
pub fn is_subvolume_option(option: &[u8]) -> bool {
    option.starts_with(b"subvol=") || option.starts_with(b"subvolid=")
}

/// The subvolume that an entry or command line boots, as a path from the top of the file system; None if it names none.
pub(crate) fn booted_subvolume(entry: &[u8]) -> Option<String> {
    let (_, flags) = unquote(words(entry).filter_map(|word| word.strip_prefix(ROOT_FLAGS)).next_back()?);
    let path = flags.split(|b| *b == b',').filter_map(|flag| flag.strip_prefix(b"subvol=")).next_back()?;
    let path = std::str::from_utf8(path).ok()?.trim_matches('/');
    path.split('/').all(|name| name != "..").then(|| path.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn f26_no_entry_leads_out_of_the_file_system() {
        let of = |path: &str| booted_subvolume(format!("options rootflags=subvol={path}\n").as_bytes());
        assert_eq!(of("/@rootfs/").as_deref(), Some("@rootfs"));
        for path in ["..", "../x", "a/../../x"] {
            assert_eq!(of(path), None, "{path}");
        }
    }
}
