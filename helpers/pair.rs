//! The machine and its disks: which one is newer, what is remembered of each, and healing a shared root.

pub mod booted;
pub mod containers;
pub mod heal;
pub mod lineage;
pub mod lock;
pub mod machine;
pub mod settle;
pub mod status;
