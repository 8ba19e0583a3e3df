//! The report as text for a terminal, and as metrics.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use super::{DiskReport, Report, Space, first};
use crate::base::clock::date;
use crate::base::fault::{Code, told};
use crate::pair::status::Outcome;

/// A metric: its name, its help text, and its value for a disk, if it has one.
type Metric = (&'static str, &'static str, fn(&DiskReport) -> Option<u64>);

/// The metrics of each disk, all gauges with the label `disk`.
const METRICS: [Metric; 5] = [
    ("dualroot_booted", "Whether this disk was booted.", |disk| Some(disk.booted.into())),
    ("dualroot_spare_present", "Whether this spare disk is present, with all its partitions.", |disk| {
        (!disk.booted).then_some((disk.present && disk.missing.is_empty()).into())
    }),
    ("dualroot_spare_boots", "Whether this spare disk is known to boot without the others.", |disk| {
        (!disk.booted).then_some((disk.boots == Some(true)).into())
    }),
    ("dualroot_last_sync_timestamp_seconds", "Time of the last sync that left this spare disk bootable.", |disk| {
        disk.last_good_sync
    }),
    (
        "dualroot_last_verify_timestamp_seconds",
        "Time at which the boot files of this disk were last read from its medium.",
        |disk| disk.last_verify.as_ref().map(|read| read.at),
    ),
];

/// The metric with a second label, `fault`.
const FAULTS: (&str, &str) = ("dualroot_fault", "1 for each kind of fault that this disk has.");

/// The text of a report without a configuration.
const UNCONFIGURED: &str = "dualroot is not configured: /etc/dualroot.conf names no disks, so no disk is a spare of another. \
    dualroot-clone(8) makes a blank disk a spare and writes the configuration; for disks that are copies already, write it as in \
    dualroot.conf(5).\n";

impl Report {
    /// The report in the text format of Prometheus.
    pub fn prometheus(&self) -> String {
        let configured = u8::from(self.configured);
        let mut text = format!(
            "# HELP dualroot_configured Whether the disks are configured, and the booted one is known.\n\
             # TYPE dualroot_configured gauge\ndualroot_configured {configured}\n"
        );
        for (name, help, value) in METRICS {
            let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} gauge");
            for disk in &self.disks {
                if let Some(value) = value(disk) {
                    let _ = writeln!(text, "{name}{{disk=\"{}\"}} {value}", escape(&disk.name.to_string()));
                }
            }
        }
        let (name, help) = FAULTS;
        let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} gauge");
        for disk in &self.disks {
            for code in disk.faults.iter().map(|fault| fault.code).collect::<BTreeSet<Code>>() {
                let _ = writeln!(text, "{name}{{disk=\"{}\",fault=\"{code}\"}} 1", escape(&disk.name.to_string()));
            }
        }
        text
    }

    /// The report for people: a block for each disk.
    pub fn text(&self) -> String {
        if !self.configured {
            return UNCONFIGURED.to_owned();
        }
        let mut text = String::new();
        if self.layout == Some("shared-root") {
            let _ = writeln!(text, "shared root: {}\n", self.root.unwrap_or("unknown"));
        }
        let others = |of: &DiskReport| match self.disks.iter().filter(|disk| disk.name != of.name).collect::<Vec<_>>()[..] {
            [only] => only.name.to_string(),
            _ => "the others".to_owned(),
        };
        let blocks: Vec<String> = self.disks.iter().map(|disk| block(disk, &others(disk))).collect();
        text.push_str(&blocks.join("\n"));
        if !self.warnings.is_empty() || !self.not_seen.is_empty() {
            text.push('\n');
        }
        if !self.not_seen.is_empty() {
            let _ = writeln!(text, "not seen: {}", self.not_seen.join("; "));
        }
        for warning in &self.warnings {
            let _ = writeln!(text, "warning: {warning}");
        }
        text
    }
}

/// Escapes the value of a label (Prometheus, exposition formats).
fn escape(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

fn block(disk: &DiskReport, others: &str) -> String {
    let state = match (disk.booted, disk.present) {
        (true, _) => "booted",
        (false, true) => "spare",
        (false, false) => "spare, missing",
    };
    let mut text = format!("{}: {state}\n", disk.name);
    for (key, value) in lines(disk, others) {
        // A fault may quote several lines.
        let _ = writeln!(text, "{key:>16}: {}", value.replace('\n', "; "));
    }
    text
}

fn lines(disk: &DiskReport, others: &str) -> Vec<(String, String)> {
    let mut lines: Vec<(String, String)> = Vec::new();
    let mut line = |key: &str, value: String| lines.push((key.to_owned(), value));
    line(&format!("if {others} died"), disk.if_others_died.clone());
    if let Some(last) = disk.last_sync.as_ref() {
        let end = match &last.outcome {
            Outcome::Boots => "boots".to_owned(),
            Outcome::WouldNotBoot(faults) => format!("would not boot: {}", told(faults)),
            Outcome::Failed(why) => format!("failed: {why}"),
            Outcome::Refused(why) => format!("refused: {why}"),
        };
        line("last sync", format!("{}, {end}", date(last.at)));
    } else if !disk.booted {
        line("last sync", "none".to_owned());
    }
    if let Some(begun) = disk.sync_begun {
        line("being synced", format!("since {}", date(begun)));
    }
    let read = disk.last_verify.as_ref().map(|read| match &read.faults[..] {
        [] => format!("{}, whole", date(read.at)),
        faults => format!("{}, {}", date(read.at), first(faults)),
    });
    line("last verified", read.unwrap_or_else(|| "never".to_owned()));
    if let Some(generation) = disk.generation {
        line("generation", generation.to_string());
    }
    if disk.present {
        line("holds", holds(disk));
    }
    let entry = match (&disk.efi_entries, disk.boot_order) {
        (None, _) => "unknown".to_owned(),
        (Some(numbers), _) if numbers.is_empty() => "none; the firmware has to find EFI/BOOT by itself".to_owned(),
        (Some(numbers), Some(place)) => format!("{}, number {place} in BootOrder", numbers.join(", ")),
        (Some(numbers), None) => format!("{}, not in BootOrder", numbers.join(", ")),
    };
    line("EFI entry", entry);
    if !disk.missing.is_empty() {
        line("missing", disk.missing.iter().map(|role| format!("{role}=")).collect::<Vec<_>>().join(", "));
    }
    for space in &disk.space {
        line("free", free(space));
    }
    lines
}

fn holds(disk: &DiskReport) -> String {
    let Some(lineage) = &disk.lineage else {
        return format!("unknown ({})", disk.lineage_unknown.as_deref().unwrap_or_default());
    };
    let plural = |count: u64| if count == 1 { "boot" } else { "boots" };
    let boots: Vec<String> = lineage.lives.iter().map(|(name, count)| format!("{count} {} of {name}", plural(*count))).collect();
    let mut text = if boots.is_empty() { "no recorded boots".to_owned() } else { boots.join(", ") };
    if let (Some(from), Some(at)) = (lineage.synced_from, lineage.synced) {
        text.push_str(&format!("; synced from {from} at {}", date(at)));
    }
    if let Some(newer) = &lineage.newer {
        text.push_str(&format!("; {newer}"));
    }
    text
}

fn free(space: &Space) -> String {
    format!("{} of {} in {}= ({})", size(space.free), size(space.size), space.role, space.mounted_at.display())
}

/// A size for people, rounded down to a tenth of its unit.
fn size(bytes: u64) -> String {
    let units = [("GiB", 30), ("MiB", 20), ("KiB", 10)];
    match units.into_iter().find(|(_, shift)| bytes >> shift > 0) {
        Some((unit, shift)) => format!("{}.{} {unit}", bytes >> shift, ((bytes >> (shift - 10)) % 1024) * 10 / 1024),
        None => format!("{bytes} bytes"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_escaped() {
        assert_eq!(escape("a\\b\"c\nd"), "a\\\\b\\\"c\\nd");
    }

    #[test]
    fn sizes() {
        for (bytes, text) in
            [(0, "0 bytes"), (1023, "1023 bytes"), (1 << 20, "1.0 MiB"), ((5 << 30) / 2, "2.5 GiB"), (2047, "1.9 KiB")]
        {
            assert_eq!(size(bytes), text);
        }
    }
}
