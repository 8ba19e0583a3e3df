pub mod below;
pub mod change;
pub mod sector;
pub(crate) mod state;
