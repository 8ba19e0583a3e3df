//! The numbers of generations of a btrfs root, and command lines that boot one.

use std::fmt;

use anyhow::{Context, Result, bail};

use crate::names::cmdline::{ROOT_FLAGS, is_subvolume_option, unquote, words};

/// The directory at the top of the file system that holds the generations' subvolumes.
pub(crate) const DIRECTORY: &str = "dualroot";

/// The number of a generation, from 1.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Generation(u32);

impl Generation {
    /// Reads the name of a generation's subvolume.
    ///
    /// # Errors
    /// The text isn't a decimal number of 1 or more without leading zeros.
    pub fn parse(name: &str) -> Result<Self> {
        let number: u32 = name.parse().with_context(|| format!("'{}' is not the name of a generation", name.escape_debug()))?;
        if number == 0 || number.to_string() != name {
            bail!("'{}' is not the name of a generation", name.escape_debug());
        }
        Ok(Self(number))
    }

    /// The generation whose subvolume is `root`, a path from the top of the file system with a leading slash; None for another subvolume.
    pub fn of_root(root: &str) -> Option<Self> {
        Self::of_subvolume(root.strip_prefix('/')?)
    }

    /// The generation with this subvolume, a path from the top of the file system; None for another subvolume.
    pub fn of_subvolume(path: &str) -> Option<Self> {
        Self::parse(path.strip_prefix(DIRECTORY)?.strip_prefix('/')?).ok()
    }

    /// The generation after `last`; the first one if there is none.
    pub fn after(last: Option<Self>) -> Self {
        Self(last.map_or(0, |last| last.0).saturating_add(1))
    }

    /// The number.
    pub fn number(self) -> u32 {
        self.0
    }

    /// The path of its subvolume from the top of the file system.
    pub fn subvolume(self) -> String {
        format!("{DIRECTORY}/{self}")
    }

    /// A kernel command line, or an entry, changed to boot this generation: `rootflags=` names its subvolume, and is added after `root=` if
    /// missing. Every other byte stays. A second call changes nothing.
    pub fn command_line(self, text: &[u8]) -> Vec<u8> {
        let has_flags = words(text).any(|word| word.starts_with(ROOT_FLAGS));
        let mut out = Vec::with_capacity(text.len() + 32);
        for word in text.split_inclusive(u8::is_ascii_whitespace) {
            let bare = word.trim_ascii_end();
            let blank = word.get(bare.len()..).unwrap_or_default();
            if let Some(value) = bare.strip_prefix(ROOT_FLAGS) {
                let (quote, flags) = unquote(value);
                let others = flags.split(|b| *b == b',').filter(|flag| !flag.is_empty() && !is_subvolume_option(flag));
                let own = format!("subvol={}", self.subvolume());
                let flags = others.chain([own.as_bytes()]).collect::<Vec<_>>().join(&b',');
                out.extend([ROOT_FLAGS, quote, &flags, quote].concat());
            } else {
                out.extend(bare);
                if bare.starts_with(b"root=") && !has_flags {
                    out.extend(format!(" rootflags=subvol={}", self.subvolume()).bytes());
                }
            }
            out.extend(blank);
        }
        out
    }
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::boot::roots::generation_of;

    pub(crate) fn nth(number: u32) -> Generation {
        Generation(number)
    }

    pub(crate) fn numbers(list: &[u32]) -> Vec<Generation> {
        list.iter().map(|number| Generation(*number)).collect()
    }

    #[test]
    fn names_of_generations_are_plain_numbers() {
        assert_eq!(Generation::parse("12").unwrap().subvolume(), "dualroot/12");
        for name in ["", "0", "01", "+1", "-1", "1a", "new", "4294967296"] {
            assert!(Generation::parse(name).is_err(), "{name}");
        }
    }

    #[test]
    fn f15_a_command_line_is_changed_to_boot_a_generation() {
        let boots = |text: &str| String::from_utf8(Generation(7).command_line(text.as_bytes())).unwrap();
        for (text, expected) in [
            ("root=UUID=1 ro quiet\n", "root=UUID=1 rootflags=subvol=dualroot/7 ro quiet\n"),
            ("root=UUID=1", "root=UUID=1 rootflags=subvol=dualroot/7"),
            ("options  root=UUID=1\trw rootflags=subvol=@rootfs\r\n", "options  root=UUID=1\trw rootflags=subvol=dualroot/7\r\n"),
            ("rootflags=noatime,subvolid=256,subvol=/@,compress=zstd", "rootflags=noatime,compress=zstd,subvol=dualroot/7"),
            ("rootflags=noatime root=/dev/vda2", "rootflags=noatime,subvol=dualroot/7 root=/dev/vda2"),
            ("rootflags=subvol=dualroot/6 root=UUID=1", "rootflags=subvol=dualroot/7 root=UUID=1"),
            ("rootflags=\"subvol=@,ssd\" root=UUID=1", "rootflags=\"ssd,subvol=dualroot/7\" root=UUID=1"),
            (
                "title Debian\nefi /EFI/memtest.efi\noptions quiet resume=UUID=2\n",
                "title Debian\nefi /EFI/memtest.efi\noptions quiet resume=UUID=2\n",
            ),
        ] {
            assert_eq!(boots(text), expected, "{text}");
            assert_eq!(boots(expected), expected, "{text}, twice");
            let named = text.contains("root").then_some(Generation(7));
            assert_eq!(
                generation_of(expected.as_bytes()),
                named.filter(|_| text.contains("root=") || text.contains("rootflags"))
            );
        }
    }
}
