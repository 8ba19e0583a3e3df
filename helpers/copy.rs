//! How a tree gets from one disk to another.

pub mod changes;
pub mod generation;
pub mod modules;
pub mod rsync;
pub mod rules;
pub mod stage;
pub mod tree;
