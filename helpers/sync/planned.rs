//! The second phase of a sync: the plan, which is data. `--dry-run` prints it.

use anyhow::Result;

use crate::sync::boot_partitions::BootPlan;
use crate::sync::checked::Checked;

/// A spare with a plan for everything that a sync writes, for which there is room.
pub(crate) struct Planned<'a> {
    pub(crate) checked: Checked<'a>,
    /// The plan for its boot partitions, from their content before the copy. After the trees were copied, it is made again.
    boot: BootPlan,
}

impl<'a> Planned<'a> {
    /// Makes the plan.
    ///
    /// # Errors
    /// A refusal where there is not enough room, or where the sync would overwrite files that no sync has written.
    pub(crate) fn plan(checked: Checked<'a>) -> Result<Self> {
        checked.check_empty()?;
        let boot = checked.boot_plan()?;
        checked.copier.check_room(&checked.spare.mounted)?;
        Ok(Self { checked, boot })
    }

    /// The plan, a line for each change.
    pub(crate) fn lines(&self) -> Vec<String> {
        let (name, copier) = (self.checked.spare.disk.name, &self.checked.copier);
        let mut lines: Vec<String> = copier.describe().into_iter().map(|line| format!("{name} {line}")).collect();
        for file in copier.files() {
            lines.push(format!("{name} root: replace {} ({} bytes)", file.path, file.bytes.len()));
        }
        lines.extend(self.boot.steps.iter().map(|step| format!("{name} {}: {}", step.role, step.change)));
        lines
    }
}

impl Checked<'_> {
    /// The plan for the boot partitions, from their present content.
    pub(crate) fn boot_plan(&self) -> Result<BootPlan> {
        BootPlan::make(&self.spare, self.copier.roots(), &self.booted_boot_files, &self.spare_boot_files, &self.known)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::refusal::Refused;
    use crate::base::types::Role;
    use crate::boot::files::BootFiles;
    use crate::pair::machine;
    use crate::sync::checked;
    use crate::write::below::Below;
    use crate::write::change::Change;

    #[test]
    fn f07_nothing_is_planned_over_files_that_no_sync_has_written() {
        let tmp = tempfile::tempdir().unwrap();
        let esp = || Below::open(tmp.path()).unwrap();
        esp().apply(&Change::MakeDir("loader/entries".into())).unwrap();
        std::fs::write(tmp.path().join("loader/entries/a.conf"), "linux /linux\n").unwrap();
        let machine = machine::tests::machine(&[1, 2, 3, 4]);
        let refusal = |is_new, discard| {
            let mut checked = checked::tests::checked(&machine, esp(), is_new, discard);
            checked.spare_boot_files.insert(Role::Esp, BootFiles::scan(&esp()).unwrap());
            let error = Planned::plan(checked).err().unwrap();
            assert!(error.is::<Refused>(), "{error:#}");
            error.to_string()
        };
        let said = refusal(true, false);
        assert!(said.contains("loader/entries/a.conf"), "{said}");
        // Otherwise the next check refuses, because nothing was read of the booted disk.
        for (is_new, discard) in [(true, true), (false, false)] {
            let said = refusal(is_new, discard);
            assert!(said.contains("has no boot loader entry"), "{said}");
        }
    }
}
