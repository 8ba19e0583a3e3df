//! The space that the steps of a plan need on a boot partition.

use std::collections::BTreeMap;

use crate::base::types::Role;
use crate::boot::files::{BootFiles, fold};
use crate::boot::wanted::Step;
use crate::write::change::Change;

/// The bytes that a partition lacks for the steps, or 0 if they fit: the greatest lack after any step. `free` is the free space and
/// `cluster` the allocation unit, both in bytes.
pub fn shortfall(steps: &[Step], role: &Role, spare: &BootFiles, free: u64, cluster: u64) -> u64 {
    let cluster = cluster.max(1);
    let whole = |size: u64| i128::from(size.div_ceil(cluster) * cluster);
    let mut sizes: BTreeMap<String, u64> =
        spare.files.iter().chain(&spare.temporary).map(|(key, file)| (key.clone(), file.size)).collect();
    let mut left = i128::from(free);
    let mut least = left;
    for step in steps.iter().filter(|s| s.role == *role) {
        match &step.change {
            Change::MakeDir(_) => left -= i128::from(cluster),
            Change::Create { path, content } => {
                left += whole(sizes.insert(fold(path), content.size()).unwrap_or(0)) - whole(content.size());
            }
            Change::Replace { path, content, .. } => {
                left -= whole(content.size());
                least = least.min(left);
                left += whole(sizes.insert(fold(path), content.size()).unwrap_or(0));
            }
            Change::Remove(path) => left += whole(sizes.remove(&fold(path)).unwrap_or(0)),
            Change::Overwrite { .. } | Change::Barrier => {}
        }
        least = least.min(left);
    }
    u64::try_from(-least).unwrap_or(0)
}
