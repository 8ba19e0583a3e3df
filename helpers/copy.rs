//! How a tree gets from one disk to another.

pub mod generation;
pub mod stage;
pub mod tree;
