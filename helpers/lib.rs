//! What the dualroot generator and its oneshots share. The rooms below are the architecture: a room imports from lower floors only, and
//! the rooms of one floor don't know each other (`tests/suites/rooms` holds them to that).
//!
//! Words: the *pair* is the disks that boot the same system (two or more), the *booted disk* the one whose ESP the firmware started
//! from, a *spare* any other. Decisions are pure functions that return plans; only `write/` changes disks.

#![cfg_attr(not(test), deny(clippy::string_slice))]

// Floor 1: nothing of ours is imported.
pub mod base;
pub mod write;
// Floor 2: texts.
pub mod conf;
pub mod names;
// Floor 3: devices.
pub mod devices;
// Floor 4: trees.
pub mod copy;
// Floor 5: boot files.
pub mod boot;
// Floor 6: the machine and its disks.
pub mod pair;
pub mod proof;
// Floor 7: what programs do.
pub mod report;
pub mod sync;
// Floor 8: what uses a sync.
pub mod clone;
pub mod trial;
