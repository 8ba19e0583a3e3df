//! Lines of crypttab(5).

/// The key file that opens the containers of all disks. It lies in the containers themselves, and is copied with the roots.
pub const KEY: &str = "/etc/cryptsetup-keys.d/dualroot.key";

/// Whether it doesn't matter to a boot what is where a line of crypttab(5) looks: that isn't waited for. Swap space and file systems that
/// are made anew at every boot are made of whatever has the path, and so matter (the warning in crypttab(5)).
pub(crate) fn may_fail(line: &[u8]) -> bool {
    let mut fields = line.split(u8::is_ascii_whitespace).filter(|field| !field.is_empty()).skip(1);
    let (device, options) = (fields.next().unwrap_or_default(), fields.nth(1).unwrap_or_default());
    let any = |of: fn(&[u8]) -> bool| options.split(|b| *b == b',').any(of);
    let is_made = any(|option| matches!(option, b"swap" | b"tmp") || option.starts_with(b"tmp="));
    let is_certain = [&b"UUID="[..], b"PARTUUID=", b"/dev/disk/by-uuid/", b"/dev/disk/by-partuuid/"];
    let is_certain = is_certain.iter().any(|start| device.starts_with(start));
    any(|option| matches!(option, b"nofail" | b"noauto")) && (is_certain || !is_made)
}

/// The lines of crypttab(5) that open the booted disk's containers by a file: the copy's would not be opened by it. `names` says whether
/// a text names something of the booted disk.
pub fn opened_by_files(crypttab: &[u8], names: impl Fn(&[u8]) -> bool) -> Vec<String> {
    let is_file = |field: &str| !matches!(field, "none" | "-" | KEY);
    let mut found = Vec::new();
    for line in crypttab.split(|b| *b == b'\n').filter(|line| !line.trim_ascii_start().starts_with(b"#")) {
        let text = String::from_utf8_lossy(line);
        let fields: Vec<&str> = text.split_ascii_whitespace().collect();
        if let [name, spec, key, ..] = fields.as_slice()
            && is_file(key)
            && names(spec.as_bytes())
        {
            found.push(format!("{} by {}", name.escape_debug(), key.escape_debug()));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn containers_that_a_file_opens_are_known() {
        let crypttab =
            b"root UUID=a none luks\n# home UUID=a /key luks\nhome  UUID=a\t/key luks\nvar UUID=a\ndata UUID=a - luks\n\
            other UUID=b /key luks\nsrv UUID=a /etc/cryptsetup-keys.d/dualroot.key luks\n";
        assert_eq!(opened_by_files(crypttab, |spec| spec == b"UUID=a"), ["home by /key"]);
    }
}
