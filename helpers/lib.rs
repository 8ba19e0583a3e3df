//! What the dualroot generator and its oneshots share: the configuration, the identifiers of a pair of disks, the rewriting of
//! files that name a disk, and the sync that makes a spare a bootable copy of the booted disk.
//!
//! Words: the *pair* is the disks that are to boot the same system (two or more), the *booted disk* the one whose ESP the firmware
//! started from, a *spare* any other. Decisions are pure functions that return plans; only the sync and the binaries act.

#![cfg_attr(not(test), deny(clippy::string_slice))]

pub mod base;
pub mod boot;
pub mod clone;
pub mod conf;
pub mod copy;
pub mod devices;
pub mod names;
pub mod pair;
pub mod proof;
pub mod report;
pub mod sync;
pub mod trial;
pub mod write;
