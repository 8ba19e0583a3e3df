//! Messages of the programs: to people on a terminal, to the journal with levels and fields, and to systemd as the unit's status.

use std::ffi::OsStr;
use std::fs::{File, OpenOptions};
use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};

use libsystemd::daemon::{NotifyState, notify};
use nix::sys::stat::fstat;

use crate::base::fault::{Code, Fault};
use crate::base::refusal::Refused;
use crate::base::root::Root;
use crate::base::types::DiskName;

/// The socket on which journald takes entries with fields (systemd.io, Native Journal Protocol).
const SOCKET: &str = "/run/systemd/journal/socket";

/// A finding that other programs can watch for. units/dualroot.catalog explains each of them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Event {
    /// A spare would not boot.
    WouldNotBoot,
    /// Nothing was written, because another disk may be newer than the booted one.
    MayBeNewer,
    /// A spare is missing.
    SpareMissing,
    /// The shared root is degraded, or one of its disks is out of date.
    DegradedRoot,
}

impl Event {
    /// Its MESSAGE_ID.
    pub const fn id(self) -> &'static str {
        match self {
            Self::WouldNotBoot => "47cd41aa0c3b46dea9a59e7ba1f41a82",
            Self::MayBeNewer => "e792af997e164fa8a5fa902a67ffc808",
            Self::SpareMissing => "12aee2e9df9d4807b1aa869ef6de1e78",
            Self::DegradedRoot => "bd30d64f0a5a4491b27307e952a67be4",
        }
    }
}

/// The subject of a message, in the fields of its journal entry.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Subject {
    event: Option<Event>,
    code: Code,
    disk: Option<DiskName>,
}

impl Subject {
    /// The subject of a fault that is an event.
    pub fn event(event: Event, fault: &Fault) -> Self {
        Self { event: Some(event), ..Self::fault(fault) }
    }

    /// The subject of a fault that is no event.
    pub fn fault(fault: &Fault) -> Self {
        Self { event: None, code: fault.code, disk: fault.disk }
    }

    /// The fields MESSAGE_ID, DUALROOT_FAULT and DUALROOT_DISK, a line each.
    fn fields(&self) -> String {
        let code = Some(self.code).filter(|code| *code != Code::Unknown);
        let fields = [
            self.event.map(|event| format!("MESSAGE_ID={}\n", event.id())),
            code.map(|code| format!("DUALROOT_FAULT={code}\n")),
            self.disk.map(|disk| format!("DUALROOT_DISK={disk}\n")),
        ];
        fields.into_iter().flatten().collect()
    }
}

/// Levels as in syslog(3).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Level {
    /// The run fails, or a part of it.
    Error = 3,
    /// Something that should be fixed.
    Warning = 4,
    /// A change, or a fact that explains the result.
    Info = 6,
    /// A detail.
    Debug = 7,
}

/// The longest message in one record of the kernel's log, in bytes: the kernel refuses records of more than about 1000 bytes.
const LONGEST: usize = 900;

/// The kernel's log, for a program that runs before journald does.
struct Kernel {
    /// The name of the program.
    name: &'static str,
    /// None if it can't be written; then standard error gets the records.
    kmsg: Option<File>,
}

impl Kernel {
    /// Writes one message. Errors are ignored.
    fn write(&self, level: Level, text: &str) {
        for part in chunks(text) {
            let record = format!("<{}>{}[{}]: {part}\n", level as u8, self.name, std::process::id());
            // One write is one record.
            if self.kmsg.as_ref().is_none_or(|mut kmsg| kmsg.write_all(record.as_bytes()).is_err()) {
                let _ = io::stderr().write_all(record.as_bytes());
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

/// The reader of standard error.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Reader {
    /// A user at a terminal.
    Terminal,
    /// journald.
    Journal,
    /// A script that writes to the kernel's log.
    Levels,
    /// Anything else: a pipe, a file, cron's mail.
    Other,
}

/// The sink of a program's messages.
pub struct Log {
    reader: Reader,
    /// journald's socket.
    socket: PathBuf,
    /// The kernel's log, which gets all messages where it is there.
    kernel: Option<Kernel>,
}

impl Log {
    /// A log on standard error. Its lines begin with the levels of sd-daemon(3) only if standard error is the journal.
    pub fn new() -> Self {
        let stderr = io::stderr();
        let reader = match stderr.is_terminal() {
            true => Reader::Terminal,
            false if is_stream(std::env::var_os("JOURNAL_STREAM").as_deref(), &stderr) => Reader::Journal,
            false => Reader::Other,
        };
        Self { reader, socket: SOCKET.into(), kernel: None }
    }

    /// A log on standard error whose lines always begin with levels.
    pub fn with_levels() -> Self {
        Self { reader: Reader::Levels, ..Self::new() }
    }

    /// A log of the program `name` in the kernel's log, for a time when neither journald nor syslog runs. If the kernel's log can't be written,
    /// or if `root` isn't this machine's, messages go to standard error.
    pub fn to_kernel(root: &Root, name: &'static str) -> Self {
        let kmsg = root.is_host().then(|| OpenOptions::new().write(true).open("/dev/kmsg").ok()).flatten();
        Self { reader: Reader::Other, socket: SOCKET.into(), kernel: Some(Kernel { name, kmsg }) }
    }

    /// Writes one message. Errors are ignored.
    pub fn line(&self, level: Level, text: &str) {
        let text = one_line(text);
        if let Some(kernel) = &self.kernel {
            return kernel.write(level, &text);
        }
        let level = level as u8;
        // A closed standard error must not stop the program.
        let _ = match self.reader {
            Reader::Journal | Reader::Levels => writeln!(io::stderr(), "<{level}>{text}"),
            Reader::Terminal | Reader::Other => writeln!(io::stderr(), "{text}"),
        };
    }

    /// Sends an entry with fields to the journal. Other readers get a line, and so does a journal that takes no entries.
    fn entry(&self, level: Level, subject: &Subject, text: &str) {
        let fields = subject.fields();
        let sent = self.reader == Reader::Journal && {
            let name = std::env::args_os().next().unwrap_or_default();
            let name = Path::new(&name).file_name().unwrap_or_default().to_string_lossy().into_owned();
            let (name, text) = (one_line(&name), one_line(text));
            let entry = format!("MESSAGE={text}\nPRIORITY={}\nSYSLOG_IDENTIFIER={name}\n{fields}", level as u8);
            send(&self.socket, &entry).is_ok()
        };
        if !sent {
            self.line(level, text);
        }
    }

    /// Reports an error, which makes the run a failure.
    pub fn error(&self, text: &str) {
        self.line(Level::Error, text);
    }

    /// As [`Log::error`], about a fault.
    pub fn error_about(&self, subject: &Subject, text: &str) {
        self.entry(Level::Error, subject, text);
    }

    /// Reports the error with which a run, or a spare's part of it, ended.
    pub fn failure(&self, error: &anyhow::Error) {
        let text = format!("{error:#}");
        match error.downcast_ref::<Refused>().and_then(Refused::fault) {
            Some(fault) if fault.code == Code::F07 => self.error_about(&Subject::event(Event::MayBeNewer, fault), &text),
            Some(fault) => self.error_about(&Subject::fault(fault), &text),
            None => self.error(&text),
        }
    }

    /// Reports a fault that doesn't make the run a failure.
    pub fn warning(&self, text: &str) {
        self.line(Level::Warning, text);
    }

    /// As [`Log::warning`], about a fault.
    pub fn warning_about(&self, subject: &Subject, text: &str) {
        self.entry(Level::Warning, subject, text);
    }

    /// Reports a change that was made.
    pub fn info(&self, text: &str) {
        self.line(Level::Info, text);
    }

    /// Reports the step that has begun: as the unit's status, and as a line on a terminal.
    pub fn status(&self, text: &str) {
        let text = one_line(text);
        if self.reader == Reader::Terminal {
            let _ = writeln!(io::stderr(), "{text}");
        }
        // Without systemd, there is no unit whose status could be set.
        let _ = notify(false, &[NotifyState::Status(text)]);
    }
}

/// Whether `stream`, the DEVICE:INODE in $JOURNAL_STREAM, is this file (systemd.exec(5)).
fn is_stream(stream: Option<&OsStr>, file: impl AsFd) -> bool {
    let found = fstat(file).map(|stat| format!("{}:{}", stat.st_dev, stat.st_ino));
    stream.is_some_and(|stream| found.is_ok_and(|found| stream == found.as_str()))
}

/// Sends an entry to journald without waiting. sd_journal_send(3) would wait while journald doesn't read.
fn send(socket: &Path, entry: &str) -> io::Result<()> {
    let sender = UnixDatagram::unbound()?;
    sender.set_nonblocking(true)?;
    sender.send_to(entry.as_bytes(), socket).map(drop)
}

/// Makes a message one line without control characters: a path that it quotes may hold a terminal's commands.
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
    use std::collections::BTreeSet;
    use std::fs::File;
    use std::os::linux::fs::MetadataExt;
    use std::sync::mpsc;
    use std::thread;
    use std::time::Duration;

    use super::*;
    use crate::base::refusal::refused_for_age;

    const EVENTS: [Event; 4] = [Event::WouldNotBoot, Event::MayBeNewer, Event::SpareMissing, Event::DegradedRoot];

    fn disk() -> DiskName {
        DiskName::parse("disk1").unwrap()
    }

    /// A socket in the place of journald's, and a log that sends to it.
    fn journald() -> (tempfile::TempDir, UnixDatagram, Log) {
        let tmp = tempfile::tempdir().unwrap();
        let socket = tmp.path().join("socket");
        let journald = UnixDatagram::bind(&socket).unwrap();
        journald.set_nonblocking(true).unwrap();
        (tmp, journald, Log { reader: Reader::Journal, socket, kernel: None })
    }

    fn received(journald: &UnixDatagram) -> String {
        let mut entry = [0; 4096];
        let length = journald.recv(&mut entry).unwrap();
        String::from_utf8(entry[..length].to_vec()).unwrap()
    }

    #[test]
    fn long_messages_come_in_parts() {
        assert_eq!(chunks(""), [""]);
        let text = format!("a{}", "é".repeat(1000));
        let parts = chunks(&text);
        assert_eq!(parts.len(), 3);
        assert!(parts.iter().all(|part| part.len() <= LONGEST));
        assert_eq!(parts.concat(), text);
    }

    #[test]
    fn f26_a_message_has_no_control_characters() {
        assert_eq!(
            one_line("esp: a.conf needs x\u{1b}]0;y\u{7}\r\u{9b}2J, and\nmore é"),
            "esp: a.conf needs x ]0;y   2J, and; more é"
        );
    }

    #[test]
    fn f65_only_the_journal_gets_levels() {
        let file = File::open("/dev/null").unwrap();
        let stat = file.metadata().unwrap();
        let stream = format!("{}:{}", stat.st_dev(), stat.st_ino());
        assert!(is_stream(Some(stream.as_ref()), &file));
        for other in [None, Some(""), Some("1"), Some(&*format!("{stream}0")), Some(&*format!("0{stream}"))] {
            assert!(!is_stream(other.map(OsStr::new), &file), "{other:?}");
        }
    }

    #[test]
    fn an_entry_has_fields() {
        let (_tmp, journald, log) = journald();
        let fault = Fault::new(Code::F14, "it waits").of(disk());
        log.error_about(&Subject::event(Event::WouldNotBoot, &fault), "disk1 would\nnot boot\u{7}");
        let entry = received(&journald);
        let lines: BTreeSet<&str> = entry.lines().collect();
        let id = format!("MESSAGE_ID={}", Event::WouldNotBoot.id());
        for line in ["MESSAGE=disk1 would; not boot ", "PRIORITY=3", "DUALROOT_FAULT=f14", "DUALROOT_DISK=disk1", &id] {
            assert!(lines.contains(line), "{line}: {entry}");
        }
        assert!(lines.len() == 6 && entry.contains("\nSYSLOG_IDENTIFIER=") && entry.ends_with('\n'), "{entry}");
        log.warning_about(&Subject::fault(&Fault::new(Code::Unknown, "x")), "x");
        let entry = received(&journald);
        assert!(entry.contains("PRIORITY=4\n") && !entry.contains("DUALROOT") && !entry.contains("MESSAGE_ID"), "{entry}");
        // A line has no fields, and goes to standard error.
        log.error("x");
        assert!(journald.recv(&mut [0]).is_err());
    }

    #[test]
    fn f07_a_refusal_for_age_is_an_event() {
        let (_tmp, journald, log) = journald();
        log.failure(&refused_for_age(disk(), "disk1 is newer").context("disk1"));
        let entry = received(&journald);
        for line in ["MESSAGE=disk1: disk1 is newer", "DUALROOT_FAULT=f07", &format!("MESSAGE_ID={}", Event::MayBeNewer.id())] {
            assert!(entry.lines().any(|found| found == line), "{line}: {entry}");
        }
        log.failure(&anyhow::anyhow!("EIO"));
        assert!(journald.recv(&mut [0]).is_err());
    }

    #[test]
    fn only_the_journal_gets_entries() {
        for reader in [Reader::Terminal, Reader::Levels, Reader::Other] {
            let (_tmp, journald, log) = journald();
            let log = Log { reader, ..log };
            log.error_about(&Subject::fault(&Fault::new(Code::F20, "EIO")), "EIO");
            assert!(journald.recv(&mut [0]).is_err(), "{reader:?}");
        }
    }

    #[test]
    fn a_journald_that_does_not_read_is_not_waited_for() {
        let (_tmp, journald, log) = journald();
        let (socket, (tell, told)) = (log.socket.clone(), mpsc::channel());
        let fill = move || {
            let error = |sent: u32| send(&socket, "MESSAGE=x\n").err().map(|error| (sent, error));
            tell.send((0..).find_map(error).unwrap()).unwrap();
        };
        thread::spawn(fill);
        let (sent, error) = told.recv_timeout(Duration::from_secs(20)).expect("it waits");
        assert!(sent > 0 && error.kind() == io::ErrorKind::WouldBlock, "{sent} {error}");
        log.error_about(&Subject::fault(&Fault::new(Code::F20, "EIO")), "this line is on standard error");
        for _ in 0..sent {
            assert_eq!(received(&journald), "MESSAGE=x\n");
        }
        assert!(journald.recv(&mut [0]).is_err(), "nothing else has come");
        drop(journald);
        assert!(send(&log.socket, "MESSAGE=x\n").is_err());
        assert!(send(Path::new("/nowhere/socket"), "MESSAGE=x\n").is_err());
    }

    #[test]
    fn the_catalog_explains_every_event() {
        let catalog = include_str!("../../units/dualroot.catalog");
        let explained: BTreeSet<&str> = catalog.lines().filter_map(|line| line.strip_prefix("-- ")).collect();
        assert_eq!(explained, EVENTS.map(Event::id).into());
    }
}
