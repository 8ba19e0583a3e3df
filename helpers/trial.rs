//! Reading a spare again from its medium.

pub mod verify;
