//! Block devices, the layers on them, partition tables and mounts.

pub mod btrfs;
pub mod fsck;
pub mod gpt;
pub mod held;
pub mod inventory;
pub mod luks;
pub mod mounts;
pub mod stack;
pub mod subvolume;
