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
use crate::clone::plan::{self, Plan, UNFINISHED, mib};
use crate::clone::target::Target;
use crate::conf::Config;
use crate::devices::inventory::{Inventory, Partition};
use crate::devices::luks;

/// A disk that is made anew.
pub struct NewDisk {
    /// The disk that is erased.
    pub target: Target,
    /// What is made on it.
    pub plan: Plan,
}

impl NewDisk {
    /// What is there and what will be, for people; it becomes that as `what`.
    pub(super) fn told(&self, what: &str) -> String {
        let mut text = format!("What is on the disk, and will be lost:\n{}\n", self.target.table());
        let _ = writeln!(text, "What it becomes, {what}:");
        for part in &self.plan.parts {
            let label = part.label.as_deref().or(part.name.as_deref()).unwrap_or("-").escape_debug().to_string();
            let _ = writeln!(
                text,
                "  {:<10} {:>10} MiB  {:<13} {label:<16} {}",
                part.role.to_string(),
                mib(part.bytes),
                part.told(),
                part.partuuid
            );
        }
        text
    }

    /// Looks again whether the disk may be erased. Its partitions may be among those that are `joined`, as for [`Target::look`].
    pub(super) fn check_again(&self, root: &Root, joined: Option<&[String]>) -> Result<()> {
        self.target.check_same()?;
        let config = Config::load(root).map_err(|e| refused(format!("{e:#}")))?;
        Target::look(Path::new(self.target.path()), config.as_ref(), joined).map(drop)
    }

    pub(super) fn partition(&self, log: &Log) -> Result<()> {
        log.status(&format!("{}: making partitions", self.target.path()));
        self.target.check_same()?;
        // What is in the old places would be found in the new ones.
        for old in self.target.partitions() {
            program::output("wipefs", ["-q", "-a", old].map(Into::into))?;
        }
        self.target.check_same()?;
        program::output("wipefs", ["-q", "-a", self.target.path()].map(Into::into))?;
        let options = ["-q", "--wipe=always", "--wipe-partitions=always", self.target.path()];
        program::fed("sfdisk", options.map(Into::into), self.plan.table().as_bytes())?;
        settle()
    }

    /// Makes the file systems, and returns the device nodes that they are on.
    pub(super) fn make_file_systems(&self, secret: Option<&Secret>, log: &Log) -> Result<BTreeMap<Role, String>> {
        let mut nodes = self.nodes()?;
        for part in &self.plan.parts {
            let node = nodes.get_mut(&part.role).context("a partition has gone")?;
            if let Some(uuid) = &part.container {
                log.status(&format!("{node}: making a LUKS container for {}", part.role));
                self.target.check_same()?;
                container::format(node, uuid, secret.context("there is no passphrase for it")?)?;
                luks::open(&part.partuuid)?;
                *node = part.partuuid.mapping();
            }
            let Some((program, arguments)) = part.make(node, self.target.sector) else { continue };
            log.status(&format!("{node}: making {} for {}", part.content.told(), part.role));
            self.target.check_same()?;
            program::output(&program, arguments)?;
        }
        // udev notices by itself, but perhaps only after it has been waited for.
        let arguments = ["trigger".to_owned(), "--settle".to_owned()].into_iter().chain(nodes.values().cloned());
        program::output("udevadm", arguments.map(OsString::from))?;
        Ok(nodes)
    }

    /// The device nodes of the new partitions.
    fn nodes(&self) -> Result<BTreeMap<Role, String>> {
        let now = Inventory::read()?;
        Ok(self.parts(&now)?.into_iter().map(|(role, part)| (role, part.path.clone())).collect())
    }

    /// The new partitions, among those that are there.
    pub(super) fn parts<'i>(&self, now: &'i Inventory) -> Result<BTreeMap<Role, &'i Partition>> {
        let find = |part: &plan::Part| -> Result<_> {
            let found = now.find(&part.partuuid)?;
            let found = found.with_context(|| format!("the new partition {} doesn't appear", part.partuuid))?;
            Ok((part.role.clone(), found))
        };
        self.plan.parts.iter().map(find).collect()
    }

    /// Takes the mark away.
    pub(super) fn finish(&self) -> Result<()> {
        let at = self.plan.parts.iter().position(|part| part.role == Role::Esp).context("there is no ESP")?;
        let attributes = self.plan.parts.get(at).map(|part| part.attributes.clone()).unwrap_or_default();
        let arguments = ["-q", "--no-reread", "--no-tell-kernel", "--part-attrs", self.target.path()];
        let arguments = arguments.into_iter().map(OsString::from).chain([(at + 1).to_string().into(), attributes.into()]);
        program::output("sfdisk", arguments).with_context(|| format!("the mark {UNFINISHED} can't be taken from the ESP"))?;
        settle()
    }
}

/// Waits until udev has seen what was done.
fn settle() -> Result<()> {
    program::output("udevadm", ["settle".into()]).map(drop)
}
