//! The encoding of the firmware's boot entries (variables `Boot####`).

use anyhow::{Result, bail};
use efivar::boot::{EFIHardDrive, EFIHardDriveType};

use crate::base::types::PartUuid;

/// A boot entry of the firmware, from a variable `Boot####`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BootOption {
    /// The number in the variable's name.
    pub number: u16,
    /// Whether the firmware tries it by itself (LOAD_OPTION_ACTIVE).
    pub active: bool,
    /// The text in the firmware's menu; invalid UTF-16 is replaced.
    pub description: String,
    /// The GPT partition that it boots from; None if it names none, as an entry that firmware makes for itself or one for an MBR disk.
    pub partition: Option<PartUuid>,
    /// The file that it boots, with backslashes, such as `\EFI\systemd\systemd-bootx64.efi`.
    pub file: Option<String>,
    /// The whole value.
    pub raw: Vec<u8>,
}

impl BootOption {
    /// Reads an EFI_LOAD_OPTION (UEFI specification, 3.1.3). Fields of a malformed one stay empty.
    pub fn parse(number: u16, raw: Vec<u8>) -> Self {
        let mut option = Self { number, active: false, description: String::new(), partition: None, file: None, raw };
        let Some((attributes, rest)) = option.raw.split_first_chunk::<4>() else { return option };
        let Some((paths_length, rest)) = rest.split_first_chunk::<2>() else { return option };
        option.active = u32::from_le_bytes(*attributes) & 1 == 1;
        let units = rest.as_chunks::<2>().0;
        let Some(end) = units.iter().position(|unit| *unit == [0, 0]) else { return option };
        option.description = utf16(units.iter().take(end));
        let paths = rest.get(2 * end + 2..).and_then(|rest| rest.get(..usize::from(u16::from_le_bytes(*paths_length))));
        let path = DevicePath::parse(paths.unwrap_or_default());
        option.partition = path.partition;
        option.file = (!path.file.is_empty()).then_some(path.file);
        option
    }

    /// The value of a `Boot####` variable for an active entry that boots `file` (with backslashes) from a partition. The device path is
    /// the short form, which begins with the partition's node, so that firmware finds the disk on any connector.
    ///
    /// # Errors
    /// The file name is too long for a device path; `drive` is not a GPT partition.
    pub fn encode(description: &str, drive: &EFIHardDrive, file: &str) -> Result<Vec<u8>> {
        // The crate's encoder panics on these.
        if drive.sig_type != EFIHardDriveType::Gpt {
            bail!("the partition of a boot entry is not a GPT partition");
        }
        if file.encode_utf16().count() > 1000 {
            bail!("the file name of a boot entry is longer than 1000 characters");
        }
        let entry = efivar::boot::BootEntry {
            attributes: efivar::boot::BootEntryAttributes::LOAD_OPTION_ACTIVE,
            description: description.to_owned(),
            file_path_list: Some(efivar::boot::FilePathList {
                file_path: efivar::boot::FilePath { path: file.to_owned() },
                hard_drive: drive.clone(),
            }),
            optional_data: Vec::new(),
        };
        Ok(entry.to_bytes())
    }
}

/// The first GPT partition and the file in a device path, up to its first end node.
#[derive(Default)]
pub(crate) struct DevicePath {
    partition: Option<PartUuid>,
    file: String,
}

impl DevicePath {
    fn parse(mut nodes: &[u8]) -> Self {
        let mut path = Self::default();
        while let Some(([kind, subkind, low, high], rest)) = nodes.split_first_chunk::<4>() {
            let length = usize::from(u16::from_le_bytes([*low, *high]));
            // The length counts the four bytes of the node's head.
            let Some((mut data, next)) = length.checked_sub(4).and_then(|length| rest.split_at_checked(length)) else { break };
            match (kind, subkind) {
                // Hard drive.
                (4, 1) if path.partition.is_none() => {
                    path.partition = EFIHardDrive::parse(&mut data)
                        .ok()
                        .filter(|drive| drive.sig_type == EFIHardDriveType::Gpt && !drive.partition_sig.is_nil())
                        .map(|drive| PartUuid::from(drive.partition_sig));
                }
                // File path, which may be in several nodes.
                (4, 4) => path.file.push_str(&utf16(data.as_chunks::<2>().0.iter().take_while(|unit| **unit != [0, 0]))),
                // The end of the path, or of one of its instances.
                (0x7f, _) => break,
                _ => {}
            }
            nodes = next;
        }
        path
    }
}

/// Text from UTF-16LE units; invalid ones are replaced.
pub(crate) fn utf16<'a>(units: impl Iterator<Item = &'a [u8; 2]>) -> String {
    char::decode_utf16(units.map(|unit| u16::from_le_bytes(*unit))).map(|c| c.unwrap_or(char::REPLACEMENT_CHARACTER)).collect()
}

#[cfg(test)]
pub(crate) mod tests {
    use uuid::Uuid;

    use super::*;

    pub(crate) fn drive(sig_type: EFIHardDriveType) -> EFIHardDrive {
        EFIHardDrive {
            partition_number: 1,
            partition_start: 2048,
            partition_size: 4096,
            partition_sig: Uuid::parse_str(ESP).unwrap(),
            format: 2,
            sig_type,
        }
    }

    pub(crate) fn drive_option(sig_type: EFIHardDriveType) -> Vec<u8> {
        let mut node = drive(sig_type).to_bytes_encap();
        node.extend([0x7f, 0xff, 4, 0]);
        [&[1, 0, 0, 0, u8::try_from(node.len()).unwrap(), 0], &wide("x\0")[..], &node].concat()
    }

    #[test]
    fn partition_and_file_are_read_from_device_paths() {
        let gpt = drive(EFIHardDriveType::Gpt).to_bytes_encap();
        let path = |nodes: &[&[u8]]| {
            let path = DevicePath::parse(&nodes.concat());
            (path.partition.map(|p| p.to_string()), path.file)
        };
        let some = Some(ESP.to_owned());
        let name = [&[4, 4, 10, 0][..], &wide("\\a\0")].concat();
        assert_eq!(path(&[&[2, 1, 4, 0], &gpt, &name, &name, &[0x7f, 0xff, 4, 0]]), (some.clone(), "\\a\\a".to_owned()));
        // Another path after the end of the first one isn't used.
        assert_eq!(path(&[&[0x7f, 0xff, 4, 0], &gpt]), (None, String::new()));
        assert_eq!(path(&[&[0x7f, 1, 4, 0], &gpt]), (None, String::new()));
        // An invalid length ends the path.
        assert_eq!(path(&[&[2, 1, 3, 0], &gpt]), (None, String::new()));
        assert_eq!(path(&[&[2, 1, 255, 255], &gpt]), (None, String::new()));
        assert_eq!(path(&[&gpt, &[4, 4, 255]]), (some, String::new()));
        assert_eq!(path(&[&[4, 1, 8, 0, 1, 2, 3, 4], &gpt]).0, Some(ESP.to_owned()));
    }

    #[test]
    fn other_disks_and_long_names_cannot_be_encoded() {
        assert!(BootOption::encode("x", &drive(EFIHardDriveType::Unknown), "y").is_err());
        assert!(BootOption::encode("x", &drive(EFIHardDriveType::Gpt), &"y".repeat(40_000)).is_err());
    }

    pub(crate) const ESP: &str = "6ffd4e1c-26a7-4d3e-a3af-cfb8f7cea339";

    pub(crate) fn wide(text: &str) -> Vec<u8> {
        text.encode_utf16().flat_map(u16::to_le_bytes).collect()
    }
}
