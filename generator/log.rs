//! The generator's messages, which go to the kernel log, because neither journald nor syslog runs yet.

use std::fs::{File, OpenOptions};
use std::io::Write;

use dualroot::base::root::Root;

/// The longest message in one record, in bytes: the kernel refuses records of more than about 1000 bytes.
const LONGEST: usize = 900;

/// Priorities as in syslog(3).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Level {
    /// Some or all units could not be made.
    Error = 3,
    /// Something that should be fixed.
    Warning = 4,
    /// A fact that explains the result.
    Info = 6,
    /// A detail.
    Debug = 7,
}

/// The log that messages are written to.
pub struct Log {
    kmsg: Option<File>,
}

impl Log {
    /// Opens the kernel log. Messages go to standard error if it can't be written, or if another root is read.
    pub fn open(root: &Root) -> Self {
        Self { kmsg: root.is_host().then(|| OpenOptions::new().write(true).open("/dev/kmsg").ok()).flatten() }
    }

    /// Writes one message. Errors are ignored.
    pub fn line(&mut self, level: Level, text: &str) {
        let text: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
        for part in chunks(&text) {
            let record = format!("<{}>dualroot-generator[{}]: {part}\n", level as u8, std::process::id());
            // One write is one record.
            let written = match &mut self.kmsg {
                Some(kmsg) => kmsg.write_all(record.as_bytes()).is_ok(),
                None => false,
            };
            if !written {
                let _ = std::io::stderr().write_all(record.as_bytes());
            }
        }
    }
}

/// The text in parts of at most [`LONGEST`] bytes.
fn chunks(mut text: &str) -> Vec<&str> {
    let mut parts = Vec::new();
    while text.len() > LONGEST {
        let end = (0..=LONGEST).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(text.len());
        let (part, rest) = text.split_at(end);
        parts.push(part);
        text = rest;
    }
    parts.push(text);
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_messages_come_in_parts() {
        assert_eq!(chunks(""), [""]);
        let text = format!("a{}", "é".repeat(1000));
        let parts = chunks(&text);
        assert_eq!(parts.len(), 3);
        assert!(parts.iter().all(|part| part.len() <= LONGEST));
        assert_eq!(parts.concat(), text);
    }
}
