//! What the dualroot generator and its oneshots share: the configuration, the identifiers of a pair of disks, the rewriting of
//! files that name a disk, and the sync that makes a spare a bootable copy of the booted disk.
//!
//! Words: the *pair* is the disks that are to boot the same system (two or more), the *booted disk* the one whose ESP the firmware
//! started from, a *spare* any other. Decisions are pure functions that return plans; only the sync and the binaries act.

#![cfg_attr(not(test), deny(clippy::string_slice))]

pub mod below;
pub mod booted;
pub mod bootfiles;
pub mod bootplan;
mod btrfs;
pub mod clone;
pub mod conf;
pub mod efi;
pub mod entries;
pub mod entry;
pub mod fsck;
pub mod fstab;
pub mod generation;
pub mod heal;
pub mod ident;
pub mod idstore;
pub mod inventory;
pub mod known;
pub mod layout;
pub mod lineage;
pub mod lock;
pub mod log;
pub mod luks;
pub mod machine;
pub mod mounts;
pub mod nvram;
pub mod opaque;
pub mod program;
mod progress;
pub mod prove;
pub mod report;
pub mod root;
pub mod searched;
pub mod settle;
mod spare;
mod stacked;
pub mod stage;
pub mod state;
pub mod status;
pub mod sync;
pub mod tree;
pub mod types;
pub mod unitfile;
pub mod verify;
