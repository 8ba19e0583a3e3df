//! The time as a number and as text, and ids from the kernel.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use uuid::Uuid;

use crate::base::root::Root;

/// A time in seconds since 1970 as text for people, in UTC: `2026-11-29 14:06:00 UTC`.
pub fn date(seconds: u64) -> String {
    let time = UNIX_EPOCH.checked_add(Duration::from_secs(seconds));
    // humantime panics after the year 9999.
    match time.filter(|_| seconds < 253_402_300_800) {
        Some(time) => humantime::format_rfc3339_seconds(time).to_string().replace('T', " ").replace('Z', " UTC"),
        None => "a date after the year 9999".to_owned(),
    }
}

/// Seconds since 1970 by this machine's clock.
pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
}

/// Reads an id from the kernel (random(4)). `name` is `boot_id`, which stays the same until the next boot, or `uuid`, which is a new one
/// at every read.
///
/// # Errors
/// The file can't be read, or holds no UUID.
pub fn kernel_id(root: &Root, name: &str) -> Result<Uuid> {
    let path = format!("/proc/sys/kernel/random/{name}");
    let text = root.read(&path).with_context(|| format!("{path} can't be read"))?;
    let id = std::str::from_utf8(text.trim_ascii()).ok().and_then(|id| Uuid::try_parse(id).ok());
    id.with_context(|| format!("{path} holds no id"))
}
