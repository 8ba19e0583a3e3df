//! The disk that is erased, and its new partitions and file systems.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt::Write as _;
use std::path::Path;

use anyhow::{Context, Result};

use crate::base::log::Log;
use crate::base::program;
use crate::base::refusal::refused;
use crate::base::root::Root;
use crate::base::types::Role;
use crate::clone::container::{self, Secret};
use crate::clone::plan::{DiskPlan, NewPart, UNFINISHED, mib};
use crate::clone::target::Target;
use crate::conf::Config;
use crate::devices::inventory::{Inventory, Partition};
use crate::devices::luks;

/// A disk to erase and partition.
pub struct NewDisk {
    /// The disk that is erased.
    pub target: Target,
    /// Its new partitions.
    pub plan: DiskPlan,
}

impl NewDisk {
    /// Describes the disk as it is and as it will be; `becomes` says in which place, such as "as disk1".
    pub(super) fn describe(&self, becomes: &str) -> String {
        let mut text = format!("On the disk now, and lost when it is erased:\n{}\n", self.target.table());
        let _ = writeln!(text, "On it afterwards, {becomes}:");
        for part in &self.plan.parts {
            let label = part.label.as_deref().or(part.name.as_deref()).unwrap_or("-").escape_debug().to_string();
            let _ = writeln!(
                text,
                "  {:<10} {:>10} MiB  {:<13} {label:<16} {}",
                part.role.to_string(),
                mib(part.bytes),
                part.describe(),
                part.partuuid
            );
        }
        text
    }

    /// Checks again that the disk may be erased. Its partitions may be among those that are `joined`, as for [`Target::probe`].
    pub(super) fn check_again(&self, root: &Root, joined: Option<&[String]>) -> Result<()> {
        self.target.check_same()?;
        let config = Config::load(root).map_err(|e| refused(format!("{e:#}")))?;
        Target::probe(Path::new(self.target.path()), config.as_ref(), joined).map(drop)
    }

    /// Erases the disk, and makes its partitions.
    pub(super) fn partition(&self, log: &Log) -> Result<()> {
        log.status(&format!("{}: making partitions", self.target.path()));
        self.target.check_same()?;
        // An old file system that begins where a new partition begins would be found in that.
        for old in self.target.partitions() {
            program::output("wipefs", ["-q", "-a", old].map(Into::into))?;
        }
        self.target.check_same()?;
        program::output("wipefs", ["-q", "-a", self.target.path()].map(Into::into))?;
        let options = ["-q", "--wipe=always", "--wipe-partitions=always", self.target.path()];
        program::output_with_input("sfdisk", options.map(Into::into), self.plan.sfdisk_input().as_bytes())?;
        settle()
    }

    /// Makes the file systems, and returns their device nodes.
    pub(super) fn make_file_systems(&self, secret: Option<&Secret>, log: &Log) -> Result<BTreeMap<Role, String>> {
        let mut nodes = self.nodes()?;
        for part in &self.plan.parts {
            let node = nodes.get_mut(&part.role).context("a new partition is gone")?;
            if let Some(uuid) = &part.container {
                log.status(&format!("{node}: making a LUKS container for {}", part.role));
                self.target.check_same()?;
                container::format(node, uuid, secret.context("it has no passphrase")?)?;
                luks::open(&part.partuuid)?;
                *node = part.partuuid.mapping();
            }
            let Some((program, arguments)) = part.mkfs(node, self.target.sector) else { continue };
            log.status(&format!("{node}: making {} for {}", part.content.name(), part.role));
            self.target.check_same()?;
            program::output(&program, arguments)?;
        }
        // udev notices new file systems by itself, but perhaps only after "udevadm settle" has returned.
        let arguments = ["trigger".to_owned(), "--settle".to_owned()].into_iter().chain(nodes.values().cloned());
        program::output("udevadm", arguments.map(OsString::from))?;
        Ok(nodes)
    }

    /// The device nodes of the new partitions.
    fn nodes(&self) -> Result<BTreeMap<Role, String>> {
        let now = Inventory::read()?;
        Ok(self.parts(&now)?.into_iter().map(|(role, part)| (role, part.path.clone())).collect())
    }

    /// The new partitions, as the inventory shows them.
    pub(super) fn parts<'i>(&self, now: &'i Inventory) -> Result<BTreeMap<Role, &'i Partition>> {
        let find = |part: &NewPart| -> Result<_> {
            let found = now.find(&part.partuuid)?;
            let found = found.with_context(|| format!("the new partition {} did not appear", part.partuuid))?;
            Ok((part.role.clone(), found))
        };
        self.plan.parts.iter().map(find).collect()
    }

    /// Removes the mark [`UNFINISHED`], so that firmware boots the disk.
    pub(super) fn finish(&self) -> Result<()> {
        let at = self.plan.parts.iter().position(|part| part.role == Role::Esp).context("the plan has no ESP")?;
        let attributes = self.plan.parts.get(at).map(|part| part.attributes.clone()).unwrap_or_default();
        let arguments = ["-q", "--no-reread", "--no-tell-kernel", "--part-attrs", self.target.path()];
        let arguments = arguments.into_iter().map(OsString::from).chain([(at + 1).to_string().into(), attributes.into()]);
        program::output("sfdisk", arguments)
            .with_context(|| format!("the attribute {UNFINISHED} of the ESP can't be removed"))?;
        settle()
    }
}

/// Waits until udev has handled the change.
fn settle() -> Result<()> {
    program::output("udevadm", ["settle".into()]).map(drop)
}
