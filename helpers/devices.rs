//! Block devices, the layers on them, partition tables and mounts.

pub mod btrfs;
pub mod fsck;
pub mod gpt;
pub mod inventory;
pub mod luks;
pub mod mounts;
