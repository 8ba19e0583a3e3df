//! The booted disk's trees, as copies read them.

use std::path::Path;

use anyhow::Result;

use crate::copy::tree::Tree;
use crate::devices::held::ReadOnlyView;

/// Where the booted disk's file systems are seen without what is mounted in them.
const PLACES: &str = "/run/dualroot/source";

/// The file systems of the trees that are copied. They are seen at places of their own as long as this lives.
#[derive(Default)]
pub struct Source {
    seen: Vec<ReadOnlyView>,
}

impl Source {
    /// Shows the file system of a tree at a place of its own, and makes the tree be copied from there.
    ///
    /// # Errors
    /// Those of mount(2).
    pub fn open(&mut self, tree: &mut Tree) -> Result<()> {
        let seen = ReadOnlyView::open(&tree.source(), &Path::new(PLACES).join(tree.role.key().replace('/', "-")))?;
        tree.from = Some(seen.place().to_owned());
        self.seen.push(seen);
        Ok(())
    }
}
