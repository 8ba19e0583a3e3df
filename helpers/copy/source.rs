//! The booted disk's trees, without the file systems that are mounted in them.

use std::path::Path;

use anyhow::Result;

use crate::copy::tree::Tree;
use crate::devices::held::ReadOnlyView;

/// The directory of the mount points for the booted disk's file systems.
const PLACES: &str = "/run/dualroot/source";

/// Read-only mounts of the trees that are copied. Dropping this unmounts them.
#[derive(Default)]
pub struct Source {
    views: Vec<ReadOnlyView>,
}

impl Source {
    /// Mounts the file system of a tree at a mount point of its own, and makes the tree copy from there.
    ///
    /// # Errors
    /// Those of mount(2).
    pub fn open(&mut self, tree: &mut Tree) -> Result<()> {
        let view = ReadOnlyView::open(&tree.source(), &Path::new(PLACES).join(tree.role.file_name()))?;
        tree.from = Some(view.place().to_owned());
        self.views.push(view);
        Ok(())
    }
}
