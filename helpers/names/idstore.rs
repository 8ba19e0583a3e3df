//! The identifiers that each disk of the pair had when it was last seen.
//!
//! After a failover the other disk may be gone, but a menu entry may still name the UUIDs of its file systems. They are saved in a file of
//! the root, which a sync copies to every disk.

use anyhow::{Context, Result};

use crate::base::root::Root;
use crate::names::ids::DiskIds;
use crate::write::state;

/// The file's name in [`state::DIRECTORY`].
const NAME: &str = "identifiers.json";

/// Completes the identifiers of `now` by the saved ones: a partition that is missing gets those that it had when it was last seen.
///
/// # Errors
/// The file can't be read. One that doesn't parse counts as empty: present disks fill it again.
pub fn with_last_seen(root: &Root, now: Vec<DiskIds>) -> Result<Vec<DiskIds>> {
    let stored: Vec<DiskIds> = state::load(|path| root.read_opt(path), NAME)?;
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
                    // The container isn't open.
                    (part.uuid, part.label) = (seen.uuid.clone(), seen.label.clone());
                }
            }
        }
        disk
    };
    now.into_iter().map(complete).collect()
}

/// Saves the identifiers for the time when a disk is missing.
///
/// # Errors
/// The root can't be written.
pub fn save(ids: &[DiskIds]) -> Result<()> {
    let mut bytes = serde_json::to_vec_pretty(ids).context("the identifiers can't be written as JSON")?;
    bytes.push(b'\n');
    state::save(NAME, bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::types::{DiskName, PartUuid, Role};
    use crate::names::ids::{ContainerIds, PartIds};

    #[test]
    fn ids_in_a_closed_container_are_remembered() {
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
