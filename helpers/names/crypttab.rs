//! Lines of crypttab(5).

/// The key file for the LUKS containers of all disks. It is on the root, inside the containers, and is copied with the root.
pub const KEY: &str = "/etc/cryptsetup-keys.d/dualroot.key";

/// Whether a boot can do without the device in a line of crypttab(5): `nofail` or `noauto`. Lines with `swap` or `tmp` format their
/// device at every boot (see the warning in crypttab(5)), so these options count only if a UUID or PARTUUID names the device.
pub(crate) fn may_fail(line: &[u8]) -> bool {
    let mut fields = line.split(u8::is_ascii_whitespace).filter(|field| !field.is_empty()).skip(1);
    let (device, options) = (fields.next().unwrap_or_default(), fields.nth(1).unwrap_or_default());
    let any = |of: fn(&[u8]) -> bool| options.split(|b| *b == b',').any(of);
    let is_formatted = any(|option| matches!(option, b"swap" | b"tmp") || option.starts_with(b"tmp="));
    let is_certain = [&b"UUID="[..], b"PARTUUID=", b"/dev/disk/by-uuid/", b"/dev/disk/by-partuuid/"];
    let is_certain = is_certain.iter().any(|start| device.starts_with(start));
    any(|option| matches!(option, b"nofail" | b"noauto")) && (is_certain || !is_formatted)
}

/// The containers of the booted disk that crypttab(5) opens with another key file than [`KEY`], as "NAME by FILE": that file wouldn't open
/// the spare's containers. `names` tells whether a text names something of the booted disk.
pub fn containers_opened_by_files(crypttab: &[u8], names: impl Fn(&[u8]) -> bool) -> Vec<String> {
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
    fn containers_opened_by_another_key_file_are_found() {
        let crypttab =
            b"root UUID=a none luks\n# home UUID=a /key luks\nhome  UUID=a\t/key luks\nvar UUID=a\ndata UUID=a - luks\n\
            other UUID=b /key luks\nsrv UUID=a /etc/cryptsetup-keys.d/dualroot.key luks\n";
        assert_eq!(containers_opened_by_files(crypttab, |spec| spec == b"UUID=a"), ["home by /key"]);
    }
}
