//! Faults: the reasons why a disk would not boot, each with the number of a failure mode for programs and a sentence for people.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::base::types::{DiskName, Role};

/// The number of a failure mode. Programs may rely on a number, because it never changes its meaning; a sentence may change its words.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Code {
    /// A partition is of another kind than its role in the configuration.
    F01,
    /// Two partitions have one PARTUUID.
    F03,
    /// The disk may be newer than the booted one.
    F07,
    /// No menu entry is left.
    F09,
    /// A boot file is missing.
    F10,
    /// A file that the installation of the next kernel reads, crypttab, or a swap unit names another disk.
    F13,
    /// The boot waits for a device or mount that is missing without the other disk.
    F14,
    /// A menu entry, or the boot loader's configuration, names another disk, or no disk of the pair.
    F15,
    /// A unified kernel image names another disk.
    F16,
    /// An initrd names another disk.
    F17,
    /// A sync was interrupted, or a menu entry boots a generation that no longer exists.
    F18,
    /// The medium can't be read.
    F20,
    /// The disk or one of its partitions is missing.
    F21,
    /// The shared root is degraded: one of its disks is missing.
    F28,
    /// One half of the shared root is out of date: it lacks the changes that were made without it.
    F29,
    /// A menu entry names a file that is missing.
    F32,
    /// The fallback boot loader is missing.
    F35,
    /// A boot file differs from the wanted one.
    F37,
    /// A fault without a number from an older version, or with an unknown number from a newer one.
    #[serde(other)]
    Unknown,
}

impl fmt::Display for Code {
    /// The text in JSON.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}

/// The reason why a disk would not boot, or why it is unknown whether it would.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(from = "Noted")]
pub struct Fault {
    /// Its failure mode.
    pub code: Code,
    /// The disk with the fault.
    pub disk: Option<DiskName>,
    /// The partition with the fault.
    pub role: Option<Role>,
    /// The file with the fault: its path in a boot partition, or in the running system.
    pub path: Option<String>,
    /// The finding, and what follows from it.
    pub text: String,
    /// The advice, if there is any.
    pub remedy: Option<String>,
}

impl Fault {
    /// A fault of an unknown disk, partition and file.
    pub fn new(code: Code, text: impl Into<String>) -> Self {
        Self { code, disk: None, role: None, path: None, text: text.into(), remedy: None }
    }

    /// Adds the disk, unless the fault has one already.
    #[must_use]
    pub fn of(mut self, disk: DiskName) -> Self {
        self.disk.get_or_insert(disk);
        self
    }

    /// Adds the partition.
    #[must_use]
    pub fn on(mut self, role: &Role) -> Self {
        self.role = Some(role.clone());
        self
    }

    /// Adds the file.
    #[must_use]
    pub fn at(mut self, path: impl Into<String>) -> Self {
        self.path = Some(path.into());
        self
    }

    /// Adds the advice.
    #[must_use]
    pub fn remedy(mut self, remedy: impl Into<String>) -> Self {
        self.remedy = Some(remedy.into());
        self
    }
}

impl fmt::Display for Fault {
    /// The sentence and the advice in one line, even if they quote several.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text.replace('\n', "; "))?;
        self.remedy.as_ref().map_or(Ok(()), |remedy| write!(f, "; {remedy}"))
    }
}

/// The sentences of several faults in one line.
pub fn told(faults: &[Fault]) -> String {
    faults.iter().map(Fault::to_string).collect::<Vec<_>>().join("; ")
}

/// A fault as files hold it: an older release wrote a sentence only.
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

    /// The failure modes of these faults.
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
    fn the_faults_of_other_versions_are_read() {
        let older: Vec<Fault> = serde_json::from_str(r#"["esp: linux is missing"]"#).unwrap();
        assert_eq!(older, [Fault::new(Code::Unknown, "esp: linux is missing")]);
        let newer: Fault = serde_json::from_str(r#"{"code":"f99","text":"the moon is full","phase":1}"#).unwrap();
        assert_eq!(newer, Fault::new(Code::Unknown, "the moon is full"));
        assert_eq!(Code::Unknown.to_string(), "unknown");
        assert!(serde_json::from_str::<Fault>("{}").is_err());
    }
}
