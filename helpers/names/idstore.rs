//! What each disk of the pair was called when it was last seen.
//!
//! After a failover the other disk is gone, and with it the UUIDs of its file systems; a kernel's entry may still name them. They are
//! kept in a file of the root, which the sync brings to every disk.

use anyhow::{Context, Result};

use crate::base::root::Root;
use crate::names::ids::DiskIds;
use crate::write::state;

const NAME: &str = "identifiers.json";

/// The identifiers of all disks: those of the parts that are there as they are now, the others as they were when last seen. Of a
/// disk that isn't in the configuration any more, nothing.
///
/// # Errors
/// A store that can't be read. One that doesn't parse is taken for an empty one: the disks that are there fill it again.
pub fn complete(root: &Root, now: Vec<DiskIds>) -> Result<Vec<DiskIds>> {
    let path = format!("{}/{NAME}", state::DIRECTORY);
    let stored = root.read_opt(&path).with_context(|| format!("{path} can't be read"))?.unwrap_or_default();
    let stored: Vec<DiskIds> = serde_json::from_slice(&stored).unwrap_or_default();
    Ok(merge(now, &stored))
}

fn merge(now: Vec<DiskIds>, stored: &[DiskIds]) -> Vec<DiskIds> {
    let complete = |mut disk: DiskIds| {
        for old in stored.iter().filter(|s| s.name == disk.name) {
            for (role, part) in &mut disk.parts {
                let Some(seen) = old.parts.get(role).filter(|seen| seen.partuuid == part.partuuid) else { continue };
                if part.paths.is_empty() {
                    *part = seen.clone();
                } else if part.container.is_some() && part.container == seen.container && part.uuid.is_none() {
                    // A container that isn't open.
                    (part.uuid, part.label) = (seen.uuid.clone(), seen.label.clone());
                }
            }
        }
        disk
    };
    now.into_iter().map(complete).collect()
}

/// Keeps what is known for a time when a disk is gone.
///
/// # Errors
/// A root that can't be written.
pub fn save(ids: &[DiskIds]) -> Result<()> {
    let mut bytes = serde_json::to_vec_pretty(ids).context("the identifiers can't be written as JSON")?;
    bytes.push(b'\n');
    state::keep(NAME, bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::types::{DiskName, PartUuid, Role};
    use crate::names::ids::{ContainerIds, PartIds};

    #[test]
    fn what_is_in_a_closed_container_is_remembered() {
        let disk = |uuid: Option<&str>, container: &str| {
            let partuuid = PartUuid::parse("aaaaaaaa-0000-4000-8000-000000000002").unwrap();
            let part = PartIds {
                uuid: uuid.map(str::to_owned),
                container: Some(ContainerIds { uuid: Some(container.to_owned()), label: None }),
                paths: ["/dev/sda2".to_owned()].into(),
                ..PartIds::new(partuuid)
            };
            DiskIds { name: DiskName::parse("disk1").unwrap(), parts: [(Role::Root, part)].into() }
        };
        let seen = [disk(Some("inside"), "box")];
        assert_eq!(merge(vec![disk(None, "box")], &seen), seen);
        assert_eq!(merge(vec![disk(Some("new"), "box")], &seen), [disk(Some("new"), "box")]);
        let other = disk(None, "another");
        assert_eq!(merge(vec![other.clone()], &seen), [other]);
    }
}
