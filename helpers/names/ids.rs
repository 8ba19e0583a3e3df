//! The identifiers of partitions and disks.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::base::types::{DiskName, PartUuid, Role};

/// The identifiers of a LUKS container.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ContainerIds {
    /// Its UUID.
    pub uuid: Option<String>,
    /// Its label.
    pub label: Option<String>,
}

/// The identifiers of one partition.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct PartIds {
    /// The unique GUID of the partition.
    pub partuuid: PartUuid,
    /// The UUID of its file system or swap space, as blkid(8) prints it; if the partition is a LUKS container, of the one inside.
    pub uuid: Option<String>,
    /// The label of that file system or swap space.
    pub label: Option<String>,
    /// The LUKS container on it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub container: Option<ContainerIds>,
    /// The name of the partition in the GPT.
    pub partlabel: Option<String>,
    /// Every path below /dev that leads to the partition: the kernel's name and udev's links.
    pub paths: BTreeSet<String>,
}

impl PartIds {
    /// A partition of which only the PARTUUID is known.
    pub fn new(partuuid: PartUuid) -> Self {
        Self { partuuid, uuid: None, label: None, container: None, partlabel: None, paths: BTreeSet::new() }
    }
}

/// The identifiers of one disk's partitions.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct DiskIds {
    /// The disk's name.
    pub name: DiskName,
    /// Its known partitions.
    pub parts: BTreeMap<Role, PartIds>,
}
