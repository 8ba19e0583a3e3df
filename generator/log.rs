//! What the generator says: to the kernel log, because neither journald nor syslog is there yet.

use std::fs::{File, OpenOptions};
use std::io::Write;

use dualroot::base::root::Root;

/// The kernel refuses records that are longer than about 1000 bytes.
const LONGEST: usize = 900;

/// Priorities as in syslog(3).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Level {
    /// Nothing could be done, or not all of it.
    Error = 3,
    /// Something is not as it should be.
    Warning = 4,
    /// What someone may want to know.
    Info = 6,
    /// What nobody needs to know.
    Debug = 7,
}

/// Where messages go.
pub struct Log {
    kmsg: Option<File>,
}

impl Log {
    /// The kernel log; standard error where that can't be written, or where another root is read.
    pub fn open(root: &Root) -> Self {
        Self { kmsg: root.is_host().then(|| OpenOptions::new().write(true).open("/dev/kmsg").ok()).flatten() }
    }

    /// Writes one message; it can't fail in a way that matters.
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
