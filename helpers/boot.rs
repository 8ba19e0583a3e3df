//! The files that boot a system, the order in which they are written, and the firmware's variables.

pub mod efi;
pub mod entry;
pub mod files;
pub mod known;
pub mod nvram;
pub mod order;
