//! The only place that changes a disk: changes as data, and how each is made.

pub mod below;
pub mod change;
pub mod sector;
pub mod state;
