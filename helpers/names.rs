//! Identifiers of disks, and the texts that hold them.

pub mod cmdline;
pub mod crypttab;
pub mod files;
pub mod fstab;
pub mod generation;
pub mod ident;
pub mod ids;
pub mod idstore;
pub mod unitfile;
