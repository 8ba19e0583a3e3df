//! Identifiers of disks, and the texts that hold them.

pub mod fstab;
pub mod ident;
pub mod idstore;
pub mod unitfile;
