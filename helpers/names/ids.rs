//! The identifiers of partitions and disks.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::base::types::{DiskName, PartUuid, Role};

/// By what a LUKS container can be named.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ContainerIds {
    /// Its UUID.
    pub uuid: Option<String>,
    /// Its label.
    pub label: Option<String>,
}

/// By what one partition can be named.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct PartIds {
    /// The unique GUID of the partition.
    pub partuuid: PartUuid,
    /// The UUID of the file system (or swap space) on it, as blkid(8) prints it: of that in its LUKS container, if it is one.
    pub uuid: Option<String>,
    /// The label of that file system.
    pub label: Option<String>,
    /// The LUKS container.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub container: Option<ContainerIds>,
    /// The name of the partition in the GPT.
    pub partlabel: Option<String>,
    /// Every path below /dev that leads to the partition: the kernel's name and udev's links.
    pub paths: BTreeSet<String>,
}

impl PartIds {
    /// A partition of which nothing else is known.
    pub fn new(partuuid: PartUuid) -> Self {
        Self { partuuid, uuid: None, label: None, container: None, partlabel: None, paths: BTreeSet::new() }
    }
}

/// By what the partitions of one disk can be named.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct DiskIds {
    /// The disk.
    pub name: DiskName,
    /// Its partitions, as far as they are known.
    pub parts: BTreeMap<Role, PartIds>,
}
