//! The time, as a number and for people, and the ids that the kernel gives.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use uuid::Uuid;

use crate::base::root::Root;

/// Seconds since 1970 as people write them, in UTC.
pub fn date(seconds: u64) -> String {
    let time = UNIX_EPOCH.checked_add(Duration::from_secs(seconds));
    // It panics behind the year 9999.
    match time.filter(|_| seconds < 253_402_300_800) {
        Some(time) => humantime::format_rfc3339_seconds(time).to_string().replace('T', " ").replace('Z', " UTC"),
        None => "a day that no clock shows".to_owned(),
    }
}

/// Seconds since 1970 by this machine's clock.
pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
}

/// An id that the kernel gives (random(4)): `boot_id`, that of this boot, or `uuid`, another one each time.
///
/// # Errors
/// A kernel that doesn't tell.
pub fn kernel_id(root: &Root, name: &str) -> Result<Uuid> {
    let path = format!("/proc/sys/kernel/random/{name}");
    let text = root.read(&path).with_context(|| format!("{path} can't be read"))?;
    let id = std::str::from_utf8(text.trim_ascii()).ok().and_then(|id| Uuid::try_parse(id).ok());
    id.with_context(|| format!("{path} holds no id"))
}
