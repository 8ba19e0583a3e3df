//! The list of boot files that were ever on a booted disk of the pair. Only these are deleted from a spare, so that its own vendor
//! directories stay (failure mode 4).

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result};

use crate::base::root::Root;
use crate::base::types::Role;
use crate::boot::files::BootFiles;
use crate::write::state;

/// The file's name in [`state::DIRECTORY`].
const NAME: &str = "boot-files.json";
/// The greatest number of paths for a role. A longer list is begun again, and files that could be deleted stay.
const MOST: usize = 20_000;

/// The folded paths of known boot files, by the key of their partition's role.
#[derive(Default)]
pub struct Known(BTreeMap<String, BTreeSet<String>>);

impl Known {
    /// Reads the saved list. One that doesn't parse counts as empty, so that less is deleted.
    ///
    /// # Errors
    /// The file exists but can't be read.
    pub fn load(root: &Root) -> Result<Self> {
        state::load(|path| root.read_opt(path), NAME).map(Self)
    }

    /// The folded paths for one role.
    pub fn of(&self, role: &Role) -> Option<&BTreeSet<String>> {
        self.0.get(role.key())
    }

    /// Adds the files that are on a partition of the booted disk.
    pub fn add(&mut self, role: &Role, files: &BootFiles) {
        let paths = self.0.entry(role.key().to_owned()).or_default();
        if paths.len() > MOST {
            paths.clear();
        }
        paths.extend(files.files.keys().cloned());
    }

    /// Saves the list on the booted root, with which it is copied to spares.
    ///
    /// # Errors
    /// The root can't be written.
    pub fn save(&self) -> Result<()> {
        state::save(NAME, serde_json::to_vec(&self.0).context("the list can't be written as JSON")?)
    }
}
