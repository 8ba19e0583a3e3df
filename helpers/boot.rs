//! The files that boot a system, the order in which they are written, and the firmware's variables.

pub mod bootable;
pub mod efi;
pub mod entry;
pub mod files;
pub mod initrd;
pub mod known;
pub mod load_option;
pub mod nvram;
pub mod offers;
pub mod order;
pub mod pe;
pub mod room;
pub mod roots;
pub mod wanted;
