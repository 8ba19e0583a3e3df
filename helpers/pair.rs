pub mod booted;
pub mod containers;
pub mod heal;
pub mod lineage;
pub mod lock;
pub mod machine;
pub mod settle;
pub mod status;
