//! The progress of long work: a line on a terminal that is overwritten every second.

use std::io::{self, IsTerminal, Write};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// The length of the bar in characters.
const WIDTH: u64 = 20;
/// The time between two updates of the line.
const PERIOD: Duration = Duration::from_secs(1);

/// The progress line of a piece of work; dropping it erases the line.
pub(crate) struct Progress {
    terminal: Box<dyn Write + Send>,
    total: u64,
    /// The time of the first report, and the bytes that were done by then: the kernel may be resuming earlier work.
    first: Option<(Instant, u64)>,
    shown: Option<Instant>,
}

impl Progress {
    /// Begins a line for `total` bytes of work; None if standard output is not a terminal.
    pub fn begin(total: impl FnOnce() -> u64) -> Option<Self> {
        io::stdout().is_terminal().then(|| Self::on(io::stdout(), total()))
    }

    /// As [`Progress::begin`], on `terminal`.
    pub fn on(terminal: impl Write + Send + 'static, total: u64) -> Self {
        Self { terminal: Box::new(terminal), total, first: None, shown: None }
    }

    /// Shows how many bytes are done, at most once in [`PERIOD`].
    pub fn show(&mut self, done: u64) {
        let now = Instant::now();
        let (begun, before) = *self.first.get_or_insert((now, done));
        if self.shown.is_some_and(|shown| now - shown < PERIOD) {
            return;
        }
        self.shown = Some(now);
        self.write(&line(before, done, self.total, now - begun));
    }

    /// Ignores errors: a terminal that was closed must not stop the work.
    fn write(&mut self, line: &str) {
        let _ = write!(self.terminal, "\r{line}\x1b[K");
        let _ = self.terminal.flush();
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if self.shown.is_some() {
            self.write("");
        }
    }
}

/// Runs `work`, which is about `total` bytes, and shows its progress meanwhile. `fraction_done` returns a number from 0 to 1.
///
/// # Errors
/// Those of `work`.
pub(crate) fn watch<T: Send>(
    total: impl FnOnce() -> u64,
    fraction_done: impl Fn() -> Option<f64>,
    work: impl FnOnce() -> Result<T> + Send,
) -> Result<T> {
    let Some(mut progress) = Progress::begin(total) else { return work() };
    thread::scope(|scope| {
        let (sender, ended) = mpsc::channel();
        scope.spawn(move || sender.send(work()));
        loop {
            match ended.recv_timeout(PERIOD) {
                Ok(done) => return done,
                Err(RecvTimeoutError::Disconnected) => bail!("the work ended without a result"),
                Err(RecvTimeoutError::Timeout) => {
                    if let Some(part) = fraction_done() {
                        progress.show((progress.total as f64 * part) as u64);
                    }
                }
            }
        }
    })
}

/// A bar, the rate since `before` bytes were done, and the time that the rest takes at that rate.
fn line(before: u64, done: u64, total: u64, elapsed: Duration) -> String {
    let done = done.min(total);
    let of = |whole: u64| u128::from(done).saturating_mul(whole.into()).checked_div(total.into()).unwrap_or(0) as u64;
    let bar: String = (0..WIDTH).map(|at| if at < of(WIDTH) { '#' } else { '.' }).collect();
    let rate = (done.saturating_sub(before) as f64 / elapsed.as_secs_f64().max(0.001)) as u64;
    let left = match (total - done).checked_div(rate) {
        Some(left) => format!("{}:{:02}:{:02} left", left / 3600, left / 60 % 60, left % 60),
        None => "-:--:-- left".to_owned(),
    };
    format!("[{bar}] {:3} %  {:6.1} MiB/s  {left}", of(100), rate as f64 / f64::from(1 << 20))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bar_rate_and_time_left() {
        const GIB: u64 = 1 << 30;
        for (before, done, total, seconds, expected) in [
            (0, 0, GIB, 0, "[....................]   0 %     0.0 MiB/s  -:--:-- left"),
            (0, 0, GIB, 9, "[....................]   0 %     0.0 MiB/s  -:--:-- left"),
            (0, GIB / 4, GIB, 64, "[#####...............]  25 %     4.0 MiB/s  0:03:12 left"),
            (0, GIB, 100 * GIB, 16, "[....................]   1 %    64.0 MiB/s  0:26:24 left"),
            (0, GIB, 5000 * GIB, 16, "[....................]   0 %    64.0 MiB/s  22:13:04 left"),
            // Half of the work was done earlier.
            (2 * GIB, 3 * GIB, 4 * GIB, 16, "[###############.....]  75 %    64.0 MiB/s  0:00:16 left"),
            (0, GIB, GIB, 64, "[####################] 100 %    16.0 MiB/s  0:00:00 left"),
            // The total has grown meanwhile.
            (0, 2 * GIB, GIB, 64, "[####################] 100 %    16.0 MiB/s  0:00:00 left"),
            (GIB, 0, GIB, 1, "[....................]   0 %     0.0 MiB/s  -:--:-- left"),
            (0, 0, 0, 1, "[....................]   0 %     0.0 MiB/s  -:--:-- left"),
        ] {
            assert_eq!(line(before, done, total, Duration::from_secs(seconds)), expected);
        }
    }
}
