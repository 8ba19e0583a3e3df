//! Reads and writes EFI variables in efivarfs (or any directory of such files), and finds the booted disk by them.
//!
//! Types and traits are from the crate efivar. Its access to variables, its lists of boot entries and its parser of device paths panic on
//! unexpected values, so these parts are here. Sources: UEFI specification 2.10, 3.1 (variables, load options) and 10.3.5 (media device
//! paths); Boot Loader Interface for the loader's variables.

use std::fs;
use std::io::{self, ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use efivar::boot::BootVarName;
use efivar::efi::{Variable, VariableFlags};
use efivar::{VarReader, VarWriter};
use rustix::fs::{IFlags, ioctl_getflags, ioctl_setflags};
use uuid::{Uuid, uuid};

use crate::base::root::Root;
use crate::base::types::PartUuid;
use crate::boot::load_option::BootOption;

/// The largest variable that is read, in bytes; firmware commonly stops at 32 KiB.
const LARGEST: usize = 64 << 10;

/// The namespace of the Boot Loader Interface.
const LOADER: Uuid = uuid!("4a67b082-0a4c-41cf-b6c7-440b29bb8c4f");

/// The namespace of the firmware's own variables.
const GLOBAL: Uuid = uuid!("8be4df61-93ca-11d2-aa0d-00e098032b8c");

/// A directory of EFI variables: one file each, named `Name-GUID`, of four bytes of attributes and then the value.
#[derive(Clone, Debug)]
pub struct EfiVars {
    dir: PathBuf,
}

impl EfiVars {
    /// The variables of the running system, or None where it was not booted by EFI.
    pub fn open(root: &Root) -> Option<Self> {
        root.path("/sys/firmware/efi").is_dir().then(|| Self::new(root.path("/sys/firmware/efi/efivars")))
    }

    /// The variables in `dir`.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into() }
    }

    fn path(&self, var: &Variable) -> PathBuf {
        self.dir.join(var.to_string())
    }

    /// A variable's attributes and value; None if it doesn't exist or is empty, as efivarfs shows one that is being made or deleted.
    ///
    /// # Errors
    /// Those of reading; fewer than four bytes; more than 64 KiB. The message doesn't name the variable.
    pub fn get(&self, var: &Variable) -> io::Result<Option<(VariableFlags, Vec<u8>)>> {
        let mut file = match fs::File::open(self.path(var)) {
            Ok(file) => file,
            Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => return Ok(None),
            Err(e) => return Err(e),
        };
        // One read, as efivarfs asks the firmware at each, and two could see two values. It returns EINTR when it limits the rate.
        let mut buffer = vec![0; LARGEST + 1];
        let mut retries = 0_u32;
        let length = loop {
            match file.read(&mut buffer) {
                Err(e) if e.kind() == ErrorKind::Interrupted && retries < 10 => {
                    retries += 1;
                    std::thread::sleep(Duration::from_millis(10));
                }
                result => break result?,
            }
        };
        buffer.truncate(length);
        match buffer.split_first_chunk::<4>() {
            _ if length > LARGEST => Err(io::Error::new(ErrorKind::FileTooLarge, "larger than 64 KiB")),
            Some((attributes, value)) => {
                Ok(Some((VariableFlags::from_bits_retain(u32::from_le_bytes(*attributes)), value.to_vec())))
            }
            None if length == 0 => Ok(None),
            None => Err(io::Error::new(ErrorKind::InvalidData, "shorter than its attributes")),
        }
    }

    /// A variable's value.
    fn value(&self, var: &Variable) -> Result<Option<Vec<u8>>> {
        Ok(self.get(var).with_context(|| format!("can't read the EFI variable {}", var.name()))?.map(|(_, value)| value))
    }

    /// All boot entries of the firmware, sorted by number. One that can't be understood has neither partition nor file.
    ///
    /// # Errors
    /// A variable can't be read.
    pub fn boot_options(&self) -> Result<Vec<BootOption>> {
        let entries = match fs::read_dir(&self.dir) {
            Ok(entries) => entries,
            Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => return Ok(Vec::new()),
            Err(e) => return Err(e).context("can't list the EFI variables"),
        };
        let mut options = Vec::new();
        for entry in entries {
            let name = entry.context("can't list the EFI variables")?.file_name();
            let Some(number) = name.to_str().and_then(boot_number) else { continue };
            let name = name.to_string_lossy();
            let var = Variable::new(name.split('-').next().unwrap_or_default());
            if let Some(raw) = self.value(&var)? {
                options.push(BootOption::parse(number, raw));
            }
        }
        options.sort_by_key(|option| option.number);
        Ok(options)
    }

    /// The boot entry with this number, in the variable `Boot####` (upper-case digits); None if it doesn't exist.
    ///
    /// # Errors
    /// The variable can't be read.
    pub fn boot_option(&self, number: u16) -> Result<Option<BootOption>> {
        Ok(self.value(&Variable::new(&number.boot_var_name()))?.map(|raw| BootOption::parse(number, raw)))
    }

    /// BootCurrent: the number of the boot entry that the firmware booted; None if the variable doesn't exist.
    ///
    /// # Errors
    /// The variable can't be read, or isn't two bytes long.
    pub fn boot_current(&self) -> Result<Option<u16>> {
        let Some(value) = self.value(&Variable::new("BootCurrent"))? else { return Ok(None) };
        let [low, high] = value[..] else {
            bail!("the EFI variable BootCurrent has {} bytes, expected 2", value.len());
        };
        Ok(Some(u16::from_le_bytes([low, high])))
    }

    /// BootOrder: the numbers of boot entries in the order in which the firmware tries them; empty if the variable doesn't exist.
    ///
    /// # Errors
    /// The variable can't be read, or has an odd length.
    pub fn boot_order(&self) -> Result<Vec<u16>> {
        let value = self.value(&Variable::new("BootOrder"))?.unwrap_or_default();
        let (numbers, []) = value.as_chunks::<2>() else {
            bail!("the EFI variable BootOrder has an odd length, {}", value.len());
        };
        Ok(numbers.iter().map(|number| u16::from_le_bytes(*number)).collect())
    }

    /// Writes BootOrder.
    ///
    /// # Errors
    /// Those of writing the variable.
    pub fn set_boot_order(&mut self, order: &[u16]) -> Result<()> {
        let value: Vec<u8> = order.iter().flat_map(|number| number.to_le_bytes()).collect();
        self.set(&Variable::new("BootOrder"), VariableFlags::default(), &value).context("can't write the EFI variable BootOrder")
    }

    /// Writes BootNext: the boot entry for the next boot only (UEFI specification, 3.3).
    ///
    /// # Errors
    /// Those of writing the variable.
    pub fn set_boot_next(&mut self, number: u16) -> Result<()> {
        self.set(&Variable::new("BootNext"), VariableFlags::default(), &number.to_le_bytes())
            .context("can't write the EFI variable BootNext")
    }

    /// Writes a boot entry, encoded by [`BootOption::encode`].
    ///
    /// # Errors
    /// Those of writing the variable.
    pub fn set_boot_option(&mut self, number: u16, raw: &[u8]) -> Result<()> {
        let name = number.boot_var_name();
        self.set(&Variable::new(&name), VariableFlags::default(), raw)
            .with_context(|| format!("can't write the EFI variable {name}"))
    }

    /// Removes a variable.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn remove(&self, var: &Variable) -> Result<()> {
        let path = self.path(var);
        let remove = || make_mutable(&path).and_then(|()| fs::remove_file(&path));
        remove().with_context(|| format!("can't remove the EFI variable {}", var.name()))
    }

    /// Writes a variable, attributes first, in a single write, as efivarfs requires.
    ///
    /// # Errors
    /// Those of the file system. The message doesn't name the variable.
    pub fn set(&mut self, var: &Variable, attributes: VariableFlags, value: &[u8]) -> io::Result<()> {
        let bytes = [&attributes.bits().to_le_bytes(), value].concat();
        make_mutable(&self.path(var))?;
        // Not truncated before: the write sets the size, and a variable without a value must not exist in between.
        let mut file = fs::OpenOptions::new().write(true).create(true).truncate(false).open(self.path(var))?;
        let mut retries = 0_u32;
        let written = loop {
            match file.write(&bytes) {
                Err(e) if e.kind() == ErrorKind::Interrupted && retries < 10 => {
                    retries += 1;
                    std::thread::sleep(Duration::from_millis(10));
                }
                result => break result?,
            }
        };
        if written != bytes.len() {
            return Err(io::Error::new(ErrorKind::WriteZero, "only a part was written"));
        }
        // If the variables are plain files, a shorter value leaves the end of a longer one.
        if file.metadata()?.len() > bytes.len() as u64 {
            file.set_len(bytes.len() as u64)?;
        }
        Ok(())
    }
}

/// Removes a variable's immutable flag, which efivarfs sets on variables that the kernel doesn't know. Other file systems may lack it.
fn make_mutable(path: &Path) -> io::Result<()> {
    let file = match fs::File::open(path) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
        result => result?,
    };
    match ioctl_getflags(&file) {
        Ok(flags) if flags.contains(IFlags::IMMUTABLE) => Ok(ioctl_setflags(&file, flags - IFlags::IMMUTABLE)?),
        _ => Ok(()),
    }
}

impl VarReader for EfiVars {
    fn read(&self, var: &Variable) -> efivar::Result<(Vec<u8>, VariableFlags)> {
        match self.get(var) {
            Ok(Some((flags, value))) => Ok((value, flags)),
            Ok(None) => Err(efivar::Error::VarNotFound { var: var.clone() }),
            Err(e) => Err(efivar::Error::for_variable(e, var)),
        }
    }
}

impl VarWriter for EfiVars {
    fn write(&mut self, var: &Variable, attributes: VariableFlags, value: &[u8]) -> efivar::Result<()> {
        self.set(var, attributes, value).map_err(|e| efivar::Error::for_variable(e, var))
    }

    fn delete(&mut self, var: &Variable) -> efivar::Result<()> {
        fs::remove_file(self.path(var)).map_err(|e| efivar::Error::for_variable(e, var))
    }
}

/// The number of a boot entry from its file's name: `Boot`, four hexadecimal digits (upper case in the specification, but not in all
/// firmware), and the namespace.
fn boot_number(name: &str) -> Option<u16> {
    let (digits, vendor) = name.strip_prefix("Boot")?.split_once('-')?;
    let plain = digits.len() == 4 && digits.bytes().all(|b| b.is_ascii_hexdigit());
    let global = Uuid::try_parse(vendor).is_ok_and(|vendor| vendor == GLOBAL);
    u16::from_str_radix(digits, 16).ok().filter(|_| plain && global)
}

/// The ESP that the system was booted from: that in LoaderDevicePartUUID, which the boot loader sets, or else the partition of the boot
/// entry in the firmware's BootCurrent.
///
/// # Errors
/// A variable can't be read or has an invalid value; neither exists; the boot entry names no GPT partition, as those that firmware makes
/// for itself.
pub fn booted_esp(vars: &EfiVars) -> Result<PartUuid> {
    if let Some(value) = vars.value(&Variable::new_with_vendor("LoaderDevicePartUUID", LOADER))? {
        return loader_uuid(&value);
    }
    let Some(number) = vars.boot_current()? else {
        bail!("neither of the EFI variables LoaderDevicePartUUID and BootCurrent exists: expected a boot by systemd-boot");
    };
    let name = number.boot_var_name();
    let no_loader = "the EFI variable LoaderDevicePartUUID is missing";
    let Some(option) = vars.boot_option(number)? else {
        bail!("{no_loader}, and BootCurrent names {name}, which does not exist: expected a boot by systemd-boot");
    };
    option.partition.with_context(|| {
        format!("{no_loader}, and the boot entry {name} names no GPT partition: expected a boot by systemd-boot")
    })
}

/// The file of the boot entry that the firmware booted, with backslashes; None if that entry is for another ESP, or unknown.
pub fn booted_file(vars: &EfiVars, esp: &PartUuid) -> Option<String> {
    let option = vars.boot_option(vars.boot_current().ok()??).ok()??;
    option.file.filter(|_| option.partition.as_ref() == Some(esp))
}

/// Whether Secure Boot is on (UEFI specification, 3.3).
pub fn is_secure(vars: &EfiVars) -> bool {
    vars.value(&Variable::new("SecureBoot")).is_ok_and(|value| value.as_deref() == Some(&[1]))
}

/// The text of one of the boot loader's variables, such as LoaderInfo (Boot Loader Interface); None if it doesn't exist or isn't text.
pub fn loader_variable(vars: &EfiVars, name: &str) -> Option<String> {
    let value = vars.value(&Variable::new_with_vendor(name, LOADER)).ok()??;
    let units: Vec<u16> = value.chunks_exact(2).filter_map(|two| Some(u16::from_le_bytes(two.try_into().ok()?))).collect();
    let text = String::from_utf16(&units).ok()?;
    Some(text.trim_end_matches('\0').to_owned())
}

/// The value of LoaderDevicePartUUID: a UUID in UTF-16LE, with or without a NUL at its end.
fn loader_uuid(value: &[u8]) -> Result<PartUuid> {
    let wrong = |fault: &str| format!("the EFI variable LoaderDevicePartUUID is not a PARTUUID: {fault}");
    let (units, []) = value.as_chunks::<2>() else {
        bail!(wrong(&format!("its length is odd, {}", value.len())));
    };
    let units = units.strip_suffix(&[[0, 0]]).unwrap_or(units);
    let text: String = (units.iter())
        .map(|unit| match unit {
            [byte, 0] if byte.is_ascii_hexdigit() || *byte == b'-' => Ok(char::from(*byte)),
            _ => Err(wrong(&format!("it has the character 0x{:04x}", u16::from_le_bytes(*unit)))),
        })
        .collect::<std::result::Result<_, _>>()
        .map_err(anyhow::Error::msg)?;
    PartUuid::parse(&text).map_err(|_| anyhow::Error::msg(wrong(&format!("its value is '{text}'"))))
}

#[cfg(test)]
mod tests {
    use efivar::boot::EFIHardDriveType;
    use proptest::prelude::*;

    use super::*;
    use crate::boot::load_option::tests::{ESP, drive, drive_option, wide};

    const LOADER_FILE: &str = "LoaderDevicePartUUID-4a67b082-0a4c-41cf-b6c7-440b29bb8c4f";

    fn vars(files: &[(&str, Vec<u8>)]) -> (tempfile::TempDir, EfiVars) {
        let dir = tempfile::tempdir().unwrap();
        for (name, bytes) in files {
            let name = if name.contains('-') { (*name).to_owned() } else { format!("{name}-{GLOBAL}") };
            fs::write(dir.path().join(name), bytes).unwrap();
        }
        let vars = EfiVars::new(dir.path());
        (dir, vars)
    }

    /// A variable's file: attributes, value.
    fn file(value: &[u8]) -> Vec<u8> {
        [&[6, 0, 0, 0], value].concat()
    }

    fn boot0001() -> Vec<u8> {
        BootOption::encode("Linux", &drive(EFIHardDriveType::Gpt), "\\EFI\\systemd\\systemd-bootx64.efi").unwrap()
    }

    fn booted(files: &[(&str, Vec<u8>)]) -> String {
        match booted_esp(&vars(files).1) {
            Ok(esp) => esp.to_string(),
            Err(e) => format!("{e:#}"),
        }
    }

    #[test]
    fn the_loaders_variable_names_the_booted_esp() {
        for text in [ESP.to_owned(), ESP.to_uppercase(), format!("{ESP}\0")] {
            assert_eq!(booted(&[(LOADER_FILE, file(&wide(&text)))]), ESP);
        }
    }

    #[test]
    fn f26_an_invalid_loaders_variable_is_an_error() {
        for (value, why) in [
            (b"\x36\0\x36".to_vec(), "its length is odd, 3"),
            (wide(""), "its value is ''"),
            (wide("\0"), "its value is ''"),
            (wide(&format!("{ESP}\n")), "it has the character 0x000a"),
            (wide(&format!("{ESP}\0\0")), "it has the character 0x0000"),
            (wide(&format!("{ESP}\0{ESP}")), "it has the character 0x0000"),
            (wide("ﬀ"), "it has the character 0xfb00"),
            (b"\x00\xd8".to_vec(), "it has the character 0xd800"),
            (ESP.as_bytes().to_vec(), "it has the character 0x6636"),
            (wide("PARTUUID=6ffd4e1c-26a7-4d3e-a3af-cfb8f7cea339"), "it has the character 0x0050"),
            (wide("6ffd4e1c26a74d3ea3afcfb8f7cea339"), "its value is '6ffd4e1c26a74d3ea3afcfb8f7cea339'"),
            (wide("1234abcd-01"), "its value is '1234abcd-01'"),
            (wide("00000000-0000-0000-0000-000000000000"), "its value is '00000000"),
        ] {
            let error = booted(&[(LOADER_FILE, file(&value))]);
            assert!(error.starts_with(&format!("the EFI variable LoaderDevicePartUUID is not a PARTUUID: {why}")), "{error}");
        }
        let error = booted(&[(LOADER_FILE, vec![6, 0])]);
        assert_eq!(error, "can't read the EFI variable LoaderDevicePartUUID: shorter than its attributes");
        let error = booted(&[(LOADER_FILE, vec![0; LARGEST + 1])]);
        assert_eq!(error, "can't read the EFI variable LoaderDevicePartUUID: larger than 64 KiB");
    }

    #[test]
    fn without_the_loaders_variable_the_firmwares_entry_counts() {
        let current = ("BootCurrent", file(&[0x1a, 0]));
        assert_eq!(booted(&[current.clone(), ("Boot001A", file(&boot0001()))]), ESP);
        // An empty variable counts as absent.
        assert_eq!(booted(&[(LOADER_FILE, Vec::new()), current.clone(), ("Boot001A", file(&boot0001()))]), ESP);
        assert!(booted(&[]).starts_with("neither of the EFI variables"));
        assert!(booted(std::slice::from_ref(&current)).contains("BootCurrent names Boot001A, which does not exist"));
        assert_eq!(booted(&[("BootCurrent", file(&[1]))]), "the EFI variable BootCurrent has 1 bytes, expected 2");
        // Neither an entry that firmware makes for itself nor one for an MBR disk names a GPT partition.
        let fv = [&[1, 0, 0, 0, 8, 0][..], &wide("UiApp\0"), &[4, 7, 4, 0, 0x7f, 0xff, 4, 0]].concat();
        let mbr = drive_option(EFIHardDriveType::Mbr);
        for value in [fv, mbr, Vec::new(), vec![1; 5], vec![1, 0, 0, 0, 255, 255, 65, 0, 0, 0]] {
            let error = booted(&[current.clone(), ("Boot001A", file(&value))]);
            assert!(error.contains("the boot entry Boot001A names no GPT partition"), "{error}");
        }
    }

    #[test]
    fn boot_entries_and_their_order_are_read_and_written() {
        let (dir, mut vars) = vars(&[
            ("Boot0001", file(&boot0001())),
            ("Boot000a", file(b"")),
            ("Boot0000", Vec::new()),
            ("Boot00001", file(&boot0001())),
            ("Boot+001", file(&boot0001())),
            ("BootOrder", file(&[1, 0, 10, 0])),
            ("Boot0002-4a67b082-0a4c-41cf-b6c7-440b29bb8c4f", file(&boot0001())),
        ]);
        let options = vars.boot_options().unwrap();
        assert_eq!(options.iter().map(|option| option.number).collect::<Vec<_>>(), [1, 10]);
        assert_eq!(options[0].description, "Linux");
        assert!(options[0].active);
        assert_eq!(options[0].partition.unwrap().to_string(), ESP);
        assert_eq!(options[0].file.as_deref(), Some("\\EFI\\systemd\\systemd-bootx64.efi"));
        assert_eq!(options[1].partition, None);
        assert_eq!(vars.boot_order().unwrap(), [1, 10]);
        // A shorter value leaves no rest of the longer one.
        vars.set_boot_order(&[7]).unwrap();
        assert_eq!(vars.boot_order().unwrap(), [7]);
        assert_eq!(fs::read(dir.path().join(format!("BootOrder-{GLOBAL}"))).unwrap(), [7, 0, 0, 0, 7, 0]);
        vars.set_boot_next(0x1ab).unwrap();
        assert_eq!(fs::read(dir.path().join(format!("BootNext-{GLOBAL}"))).unwrap(), [7, 0, 0, 0, 0xab, 1]);
        vars.set_boot_option(0xab, &boot0001()).unwrap();
        assert_eq!(vars.boot_option(0xab).unwrap().unwrap().raw, boot0001());
        assert!(dir.path().join(format!("Boot00AB-{GLOBAL}")).exists());
    }

    #[test]
    fn f29_a_variable_that_the_kernel_does_not_know_is_written_and_removed() {
        let (dir, mut vars) = vars(&[("Alone", file(b"x"))]);
        let path = dir.path().join(format!("Alone-{GLOBAL}"));
        // As efivarfs does. It needs root, and not every file system has the flag.
        let immutable = || ioctl_setflags(fs::File::open(&path).unwrap(), IFlags::IMMUTABLE).is_ok();
        if !immutable() {
            return;
        }
        assert!(fs::OpenOptions::new().write(true).open(&path).is_err());
        vars.set(&Variable::new("Alone"), VariableFlags::default(), b"yz").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"\x07\0\0\0yz");
        assert!(immutable());
        vars.remove(&Variable::new("Alone")).unwrap();
        assert!(!path.exists());
    }

    #[test]
    fn an_absent_boot_order_is_empty_and_an_odd_one_an_error() {
        assert_eq!(vars(&[]).1.boot_order().unwrap(), [0_u16; 0]);
        let error = vars(&[("BootOrder", file(&[1, 0, 2]))]).1.boot_order().unwrap_err();
        assert_eq!(format!("{error:#}"), "the EFI variable BootOrder has an odd length, 3");
    }

    #[test]
    fn the_crates_traits_read_write_and_delete() {
        let (_dir, mut vars) = vars(&[("A", file(b"x")), ("B", vec![1])]);
        assert_eq!(vars.read(&Variable::new("A")).unwrap(), (b"x".to_vec(), VariableFlags::from_bits_retain(6)));
        assert!(matches!(vars.read(&Variable::new("C")), Err(efivar::Error::VarNotFound { .. })));
        assert!(matches!(vars.read(&Variable::new("B")), Err(efivar::Error::VarUnknownError { .. })));
        vars.write(&Variable::new("C"), VariableFlags::default(), b"yz").unwrap();
        assert_eq!(vars.read(&Variable::new("C")).unwrap(), (b"yz".to_vec(), VariableFlags::default()));
        vars.delete(&Variable::new("C")).unwrap();
        assert!(!vars.exists(&Variable::new("C")).unwrap());
    }

    #[test]
    fn without_efi_there_are_no_variables() {
        let dir = tempfile::tempdir().unwrap();
        assert!(EfiVars::open(&Root::new(dir.path())).is_none());
        fs::create_dir_all(dir.path().join("sys/firmware/efi")).unwrap();
        let vars = EfiVars::open(&Root::new(dir.path())).unwrap();
        assert!(booted_esp(&vars).is_err());
        assert_eq!(vars.boot_options().unwrap(), []);
    }

    proptest! {
        /// f26: any bytes in any of the variables.
        #[test]
        fn f26_any_bytes(loader in proptest::option::of(proptest::collection::vec(any::<u8>(), 0..100)),
                         current in proptest::collection::vec(any::<u8>(), 0..5),
                         boot in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut files = vec![("BootCurrent", file(&current)), ("BootOrder", file(&current)), ("Boot0001", boot.clone())];
            files.extend(loader.map(|bytes| (LOADER_FILE, bytes)));
            let (_dir, vars) = vars(&files);
            let _ = (booted_esp(&vars), vars.boot_options(), vars.boot_order());
            BootOption::parse(1, boot);
        }

        /// f26: a valid boot entry with a few bytes changed.
        #[test]
        fn f26_mutated_boot_entry(changes in proptest::collection::vec((0_usize..200, any::<u8>()), 0..6), cut in 0_usize..200) {
            let mut raw = boot0001();
            for (at, byte) in changes {
                if let Some(b) = raw.get_mut(at) {
                    *b = byte;
                }
            }
            raw.truncate(cut);
            BootOption::parse(1, raw);
        }
    }
}
