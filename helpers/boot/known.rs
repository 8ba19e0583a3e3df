//! Which files on the boot partitions came from a booted disk of the pair. A spare's own vendor directories (failure mode 4) were
//! never seen there, and so are never deleted.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result};

use crate::base::root::Root;
use crate::base::types::Role;
use crate::boot::files::BootFiles;
use crate::write::state;

const NAME: &str = "boot-files.json";
/// A list that has grown beyond this is begun anew: then files stay that could go.
const MOST: usize = 20_000;

/// Folded paths by the role's name.
#[derive(Default)]
pub struct Known(BTreeMap<String, BTreeSet<String>>);

impl Known {
    /// Reads the list; one that doesn't parse is taken for an empty one, which deletes less.
    ///
    /// # Errors
    /// A file that is there but can't be read.
    pub fn load(root: &Root) -> Result<Self> {
        let path = format!("{}/{NAME}", state::DIRECTORY);
        let bytes = root.read_opt(&path).with_context(|| format!("{path} can't be read"))?.unwrap_or_default();
        Ok(Self(serde_json::from_slice(&bytes).unwrap_or_default()))
    }

    /// The folded paths of one partition.
    pub fn of(&self, role: &Role) -> Option<&BTreeSet<String>> {
        self.0.get(role.key())
    }

    /// Adds what is on a partition of the booted disk now.
    pub fn add(&mut self, role: &Role, files: &BootFiles) {
        let paths = self.0.entry(role.key().to_owned()).or_default();
        if paths.len() > MOST {
            paths.clear();
        }
        paths.extend(files.files.keys().cloned());
    }

    /// Keeps the list on the booted root, from where it is copied with it.
    ///
    /// # Errors
    /// A root that can't be written.
    pub fn save(&self) -> Result<()> {
        state::keep(NAME, serde_json::to_vec(&self.0).context("the list can't be written as JSON")?)
    }
}
