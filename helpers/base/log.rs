//! What the oneshots say: to people on a terminal, to the journal with priorities in front, and to systemd as the unit's status.

use std::io::IsTerminal;

use libsystemd::daemon::{NotifyState, notify};

/// Where messages go.
pub struct Log {
    journal: bool,
}

impl Log {
    /// Messages bear the priorities of sd-daemon(3) unless standard error is a terminal.
    pub fn new() -> Self {
        Self { journal: !std::io::stderr().is_terminal() }
    }

    fn line(&self, priority: u8, text: &str) {
        let text = one_line(text);
        if self.journal {
            eprintln!("<{priority}>{text}");
        } else {
            eprintln!("{text}");
        }
    }

    /// Something that makes the run a failure.
    pub fn error(&self, text: &str) {
        self.line(3, text);
    }

    /// Something to look at.
    pub fn warning(&self, text: &str) {
        self.line(4, text);
    }

    /// What was done.
    pub fn info(&self, text: &str) {
        self.line(6, text);
    }

    /// What is being done: the unit's status line, and a line on a terminal.
    pub fn status(&self, text: &str) {
        let text = one_line(text);
        if !self.journal {
            eprintln!("{text}");
        }
        // Nobody who listens is no error.
        let _ = notify(false, &[NotifyState::Status(text)]);
    }
}

/// One message is one line, whatever it quotes: an entry's path may hold what a terminal takes for a command.
fn one_line(text: &str) -> String {
    text.replace('\n', "; ").replace(char::is_control, " ")
}

impl Default for Log {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn f26_a_message_commands_no_terminal() {
        assert_eq!(
            one_line("esp: a.conf needs x\u{1b}]0;y\u{7}\r\u{9b}2J, and\nmore é"),
            "esp: a.conf needs x ]0;y   2J, and; more é"
        );
    }
}
