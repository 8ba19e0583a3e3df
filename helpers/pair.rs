pub mod booted;
pub mod containers;
pub mod heal;
pub mod lineage;
pub mod lock;
pub mod machine;
mod mounted;
pub mod settle;
pub mod status;
