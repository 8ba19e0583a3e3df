//! The second phase of a sync: the plan, which is data. `--dry-run` prints it.

use anyhow::Result;

use crate::sync::boot_partitions::BootPlan;
use crate::sync::checked::Checked;

/// A spare for which everything that a sync writes is decided, and has room.
pub(crate) struct Planned<'a> {
    pub(crate) checked: Checked<'a>,
    /// The steps for its boot partitions, as things stand now. They are decided again after the trees were copied.
    boot: BootPlan,
}

impl<'a> Planned<'a> {
    /// Decides.
    ///
    /// # Errors
    /// A refusal where something has no room, or would overwrite what no sync has written.
    pub(crate) fn plan(checked: Checked<'a>) -> Result<Self> {
        let boot = checked.boot_plan()?;
        checked.copier.check_room(&checked.spare.mounted)?;
        checked.check_empty()?;
        Ok(Self { checked, boot })
    }

    /// The plan, a line for each change.
    pub(crate) fn lines(&self) -> Vec<String> {
        let (name, copier) = (self.checked.spare.disk.name, &self.checked.copier);
        let mut lines: Vec<String> = copier.describe().into_iter().map(|change| format!("{name} root: {change}")).collect();
        for tree in copier.trees() {
            // It changes nothing, and prints what the copy would change.
            let arguments: Vec<_> = tree.shown_comparison().iter().map(|a| a.to_string_lossy().into_owned()).collect();
            lines.push(format!("{name} {}: rsync {}", tree.role, arguments.join(" ")));
        }
        for file in copier.files() {
            lines.push(format!("{name} root: replace {} ({} bytes)", file.path, file.bytes.len()));
        }
        lines.extend(self.boot.steps.iter().map(|step| format!("{name} {}: {}", step.role, step.change)));
        lines
    }
}

impl Checked<'_> {
    /// The plan for the boot partitions, from what is on them by now.
    pub(crate) fn boot_plan(&self) -> Result<BootPlan> {
        BootPlan::make(&self.spare, self.copier.roots(), &self.source, &self.there, &self.known)
    }
}
