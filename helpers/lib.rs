//! The library of the dualroot generator (`generator/`) and of its programs (`helpers/bin/`), which parse their options and call one
//! function. The rooms below are the architecture: a room imports from lower floors only, and the rooms of one floor don't know each
//! other (`tests/suites/rooms` holds them to that).
//!
//! Words: the *pair* is the disks that boot the same system (two or more), the *booted disk* the one whose ESP the firmware started
//! from, a *spare* any other. With *own roots* each disk boots without the others; a *shared root* lies on all of them. A partition has a
//! *role* (root, esp, home, …); a *tree* is the content of one that is copied. An *entry* is an item of the boot loader's menu, a
//! *generation* one of several copies of a btrfs root on a spare. A disk's *record* says which boots of which disks are in its content.
//!
//! Decisions are pure functions that return plans. Files are written by `write/`, trees by the programs that `copy/` runs.

#![cfg_attr(not(test), deny(clippy::string_slice))]

// Floor 1: nothing of ours is imported.
/// PARTUUIDs, paths, roles and names as types that can't be invalid; refusals, faults and their codes, the clock, other programs, logging
/// and progress. A failure mode gets its code in [`base::fault`], its check in [`proof`], and the check its call in `sync/proven.rs`.
pub mod base;
/// Changes to files as data, and the only code that makes them.
pub mod write;

// Floor 2: texts.
/// /etc/dualroot.conf and its drop-ins: syntax, merging, the check of every key, and edits that keep lines. A key is added to
/// `conf.rs` itself: `Settings` or `Disk`, its list of keys, and the function that reads it.
pub mod conf;
/// Identifiers of disks, and the texts that hold them: fstab, crypttab, units, kernel command lines. A file of the root that names a
/// disk is added to [`names::files`].
pub mod names;

// Floor 3: devices.
/// Block devices and the layers on them, partition tables, subvolumes and mounts.
pub mod devices;

// Floor 4: trees.
/// How the trees of the booted disk get to a spare. A kind of copy is added here: it implements [`copy::Copier`], and [`copy::choose`]
/// chooses it.
pub mod copy;

// Floor 5: boot files.
/// The files that boot a system, the order in which they are written, and the firmware's variables. A boot loader's configuration file
/// is added to [`boot::files`], which says what each file is for; a new class of files gets a place in [`boot::order`]. On the booted
/// disk, [`sync::entries`] rewrites it.
pub mod boot;

// Floor 6: the machine and its disks.
/// This machine and its disks: which disk is newer, what is remembered of each, whether the booted disk is quiet, and a shared root that
/// lacked a disk.
pub mod pair;
/// The reasons why a spare would not boot, found in what was read from it.
pub mod proof;

// Floor 7: what programs do.
/// The state of every disk, for people, JSON and metrics. A field of the JSON is added to `DiskReport` or `Report`.
pub mod report;
/// A sync of the spares, in phases; and the rewriting of the booted disk's own files after a failover.
pub mod sync;

// Floor 8: what uses a sync.
/// Making a blank disk a spare, or the first disk of another machine.
pub mod clone;
/// dualroot-verify: reading a spare's boot files from the medium, long after the sync that wrote them.
pub mod trial;
