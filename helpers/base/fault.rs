//! Faults: each says why a disk would not boot, by the number of a failure mode for programs and by a sentence for people.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::base::types::{DiskName, Role};

/// The number of a failure mode. A number never changes its meaning, and programs may rely on it; sentences may be worded anew.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Code {
    /// A partition is not of the kind that the configuration means.
    F01,
    /// Two partitions have one PARTUUID.
    F03,
    /// The disk may be newer than the booted one.
    F07,
    /// No menu entry is left.
    F09,
    /// A boot file is missing.
    F10,
    /// A file that the next kernel is installed by, crypttab, or a swap unit names another disk.
    F13,
    /// The boot waits for something that is missing without the other disk.
    F14,
    /// A menu entry, or the boot loader's configuration, names another disk, or no disk of the pair.
    F15,
    /// A unified kernel image names another disk.
    F16,
    /// An initrd names another disk.
    F17,
    /// A sync was interrupted, or an entry boots a generation that is gone.
    F18,
    /// The medium can't be read.
    F20,
    /// The disk is missing, or a partition of it is.
    F21,
    /// The shared root is without one of its disks.
    F28,
    /// One half of the shared root lacks what was written while it was away.
    F29,
    /// A menu entry names a file that is missing.
    F32,
    /// The fallback boot loader is missing.
    F35,
    /// A boot file is not what it should be.
    F37,
    /// A fault that an older version noted without a number, or a newer version with one that is unknown here.
    #[serde(other)]
    Unknown,
}

impl fmt::Display for Code {
    /// As it is in JSON.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}

/// Why a disk would not boot, or nobody can tell whether it would.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(from = "Noted")]
pub struct Fault {
    /// Which failure mode it is.
    pub code: Code,
    /// The disk that has it.
    pub disk: Option<DiskName>,
    /// The partition that it is on.
    pub role: Option<Role>,
    /// The file: by its path in a boot partition, or in the running system.
    pub path: Option<String>,
    /// The finding, and what follows from it.
    pub text: String,
    /// The advice, if there is any.
    pub remedy: Option<String>,
}

impl Fault {
    /// A fault that nothing but this is known of.
    pub fn new(code: Code, text: impl Into<String>) -> Self {
        Self { code, disk: None, role: None, path: None, text: text.into(), remedy: None }
    }

    /// The disk that has it, unless that is known already.
    #[must_use]
    pub fn of(mut self, disk: DiskName) -> Self {
        self.disk.get_or_insert(disk);
        self
    }

    /// The partition that it is on.
    #[must_use]
    pub fn on(mut self, role: &Role) -> Self {
        self.role = Some(role.clone());
        self
    }

    /// The file that it is in.
    #[must_use]
    pub fn at(mut self, path: impl Into<String>) -> Self {
        self.path = Some(path.into());
        self
    }

    /// The advice.
    #[must_use]
    pub fn remedy(mut self, remedy: impl Into<String>) -> Self {
        self.remedy = Some(remedy.into());
        self
    }
}

impl fmt::Display for Fault {
    /// One line, whatever it quotes.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text.replace('\n', "; "))?;
        self.remedy.as_ref().map_or(Ok(()), |remedy| write!(f, "; {remedy}"))
    }
}

/// Several faults in one line.
pub fn told(faults: &[Fault]) -> String {
    faults.iter().map(Fault::to_string).collect::<Vec<_>>().join("; ")
}

/// A fault as records have it: an older release wrote a sentence only.
#[derive(Deserialize)]
#[serde(untagged)]
enum Noted {
    Sentence(String),
    Fault { code: Code, disk: Option<DiskName>, role: Option<Role>, path: Option<String>, text: String, remedy: Option<String> },
}

impl From<Noted> for Fault {
    fn from(noted: Noted) -> Self {
        match noted {
            Noted::Sentence(text) => Self::new(Code::Unknown, text),
            Noted::Fault { code, disk, role, path, text, remedy } => Self { code, disk, role, path, text, remedy },
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Which failure modes were found.
    pub(crate) fn codes(faults: &[Fault]) -> Vec<Code> {
        faults.iter().map(|fault| fault.code).collect()
    }

    #[test]
    fn a_fault_is_one_line() {
        let fault = Fault::new(Code::F10, "esp: a\nb is missing");
        assert_eq!(fault.to_string(), "esp: a; b is missing");
        let fault = fault.remedy("start dualroot-sync.service");
        assert_eq!(fault.to_string(), "esp: a; b is missing; start dualroot-sync.service");
        assert_eq!(told(&[fault.clone(), Fault::new(Code::F09, "no entry")]), format!("{fault}; no entry"));
    }

    #[test]
    fn a_fault_is_read_as_it_was_written() {
        let [first, second] = [0, 1].map(|n| DiskName::parse(&format!("disk{n}")).unwrap());
        let fault = Fault::new(Code::F14, "it waits").on(&Role::Root).at("/etc/fstab").remedy("nofail").of(second).of(first);
        let json = serde_json::to_string(&fault).unwrap();
        assert_eq!(
            json,
            r#"{"code":"f14","disk":"disk1","role":"root","path":"/etc/fstab","text":"it waits","remedy":"nofail"}"#
        );
        assert_eq!(serde_json::from_str::<Fault>(&json).unwrap(), fault);
        assert_eq!(fault.code.to_string(), "f14");
    }

    #[test]
    fn what_another_version_noted_is_read() {
        let older: Vec<Fault> = serde_json::from_str(r#"["esp: linux is missing"]"#).unwrap();
        assert_eq!(older, [Fault::new(Code::Unknown, "esp: linux is missing")]);
        let newer: Fault = serde_json::from_str(r#"{"code":"f99","text":"the moon is full","phase":1}"#).unwrap();
        assert_eq!(newer, Fault::new(Code::Unknown, "the moon is full"));
        assert_eq!(Code::Unknown.to_string(), "unknown");
        assert!(serde_json::from_str::<Fault>("{}").is_err());
    }
}
