pub(crate) mod btrfs;
pub(crate) mod fsck;
pub(crate) mod gpt;
pub mod held;
pub(crate) mod inventory;
pub(crate) mod luks;
pub mod mounts;
pub(crate) mod stack;
pub(crate) mod subvolume;

#[cfg(test)]
pub(crate) mod scratch;
