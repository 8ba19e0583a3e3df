//! What the dualroot generator and its oneshots share. The rooms below are the architecture: a room imports from lower floors only, and
//! the rooms of one floor don't know each other (`tests/suites/rooms` holds them to that).
//!
//! Words: the *pair* is the disks that boot the same system (two or more), the *booted disk* the one whose ESP the firmware started
//! from, a *spare* any other. Decisions are pure functions that return plans; only `write/` changes disks.

#![cfg_attr(not(test), deny(clippy::string_slice))]

// Floor 1: nothing of ours is imported.
/// Types that have rules, refusals, faults and their codes, the clock, other programs, logging and progress. A failure mode gets its
/// code here, and its check in [`proof`].
pub mod base;
/// The only room that changes a disk: changes as data, and how each is made.
pub mod write;

// Floor 2: texts.
/// /etc/dualroot.conf and its drop-ins: syntax, merging, the check of every key, and edits that keep lines. A key of the configuration
/// is added here.
pub mod conf;
/// Identifiers of disks, and the texts that hold them: fstab, crypttab, units, kernel command lines. A file of the root that names a
/// disk is added to [`names::files`].
pub mod names;

// Floor 3: devices.
/// Block devices and the layers on them, partition tables, subvolumes and mounts.
pub mod devices;

// Floor 4: trees.
/// How the trees of the booted disk get to a spare. A kind of copy is added here: it implements [`copy::Copier`].
pub mod copy;

// Floor 5: boot files.
/// The files that boot a system, the order in which they are written, and the firmware's variables. A boot loader's configuration file
/// is added to [`boot::files`], which says what each file is for, and gets its place in [`boot::order`].
pub mod boot;

// Floor 6: the machine and its disks.
/// This machine and its disks: which disk is newer, what is remembered of each, whether the booted disk is quiet, and a shared root that
/// lacked a disk.
pub mod pair;
/// The reasons why a spare would not boot, found in what was read from it.
pub mod proof;

// Floor 7: what programs do.
/// The state of every disk, for people, JSON and metrics.
pub mod report;
/// A sync of the spares, in phases.
pub mod sync;

// Floor 8: what uses a sync.
/// Making a blank disk a spare, or the first disk of another machine.
pub mod clone;
/// Reading a spare again from its medium.
pub mod trial;
