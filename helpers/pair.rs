pub(crate) mod booted;
pub(crate) mod containers;
pub(crate) mod heal;
pub mod lineage;
pub mod lock;
pub mod machine;
mod mounted;
pub(crate) mod quiet;
pub mod status;
