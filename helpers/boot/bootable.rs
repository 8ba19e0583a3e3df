//! The items of the boot loader's menu on a boot partition: the files that each needs, those with its command line, and its rewriting for
//! another disk.

use std::collections::BTreeMap;

use crate::boot::entry::{self, Titles};
use crate::boot::files::{BootFile, Class, classify, fold};
use crate::boot::initrd;
use crate::names::generation::Generation;
use crate::names::ident::Rewriter;

/// An item of the boot loader's menu.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Bootable<'a> {
    /// An entry of type 1: a text that names its files and contains its command line.
    Entry(&'a BootFile),
    /// A unified kernel image, which contains everything that it needs.
    Uki(&'a BootFile),
    /// A unified kernel image with add-ons, whose command lines are appended to the embedded one (systemd-stub(7)).
    UkiWithAddons(&'a BootFile, Vec<&'a BootFile>),
}

impl<'a> Bootable<'a> {
    /// All items on a boot partition; `files` are its files by folded path.
    pub fn all(files: &'a BTreeMap<String, BootFile>) -> impl Iterator<Item = Self> {
        files.values().filter_map(move |file| match classify(&file.path) {
            Class::Entry => Some(Self::Entry(file)),
            Class::Uki => Some(Self::uki(file, files)),
            _ => None,
        })
    }

    fn uki(file: &'a BootFile, files: &'a BTreeMap<String, BootFile>) -> Self {
        let dir = format!("{}.extra.d/", fold(&file.path));
        let addons: Vec<&BootFile> = files
            .range(dir.clone()..)
            .take_while(|(path, _)| path.starts_with(&dir))
            .filter(|(path, _)| path.ends_with(".addon.efi"))
            .map(|(_, addon)| addon)
            .collect();
        if addons.is_empty() { Self::Uki(file) } else { Self::UkiWithAddons(file, addons) }
    }

    /// The entry's file or the image.
    pub fn file(&self) -> &'a BootFile {
        match self {
            Self::Entry(file) | Self::Uki(file) | Self::UkiWithAddons(file, _) => file,
        }
    }

    /// The text of an entry; nothing for an image.
    pub fn text(&self) -> &'a [u8] {
        self.file().text.as_deref().unwrap_or_default()
    }

    /// The files that it names, as paths below the partition.
    pub fn refers_to(&self) -> Vec<String> {
        match self {
            Self::Entry(_) => entry::files(self.text()),
            Self::Uki(_) | Self::UkiWithAddons(..) => Vec::new(),
        }
    }

    /// The initrds among [`Bootable::refers_to`].
    pub fn initrds(&self) -> Vec<String> {
        match self {
            Self::Entry(_) => initrd::initrd_paths(self.text()),
            Self::Uki(_) | Self::UkiWithAddons(..) => Vec::new(),
        }
    }

    /// The folded paths of the files that may have a command line embedded.
    pub fn images(&self) -> Vec<String> {
        match self {
            Self::Entry(_) => {
                let initrds = self.initrds();
                self.refers_to().iter().filter(|path| !initrds.contains(path)).map(|path| fold(path)).collect()
            }
            Self::Uki(file) => vec![fold(&file.path)],
            Self::UkiWithAddons(file, addons) => [file].into_iter().chain(addons).map(|file| fold(&file.path)).collect(),
        }
    }
}

/// An entry rewritten for the rewriter's target. If `boots_root` tells that the result boots that disk's root, it boots this generation.
pub fn retarget(
    text: &[u8],
    rewriter: &Rewriter,
    titles: &Titles,
    generation: Option<Generation>,
    boots_root: impl Fn(&[u8]) -> bool,
) -> Vec<u8> {
    let text = entry::rewrite(text, rewriter, titles);
    match generation.filter(|_| boots_root(&text)) {
        Some(generation) => generation.command_line(&text),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::older::tests::spare;

    #[test]
    fn each_item_of_the_menu_has_its_files() {
        let entry = "title a\nlinux /a/linux\ninitrd /a/initrd\noptions root=x\n";
        let found = spare(&[
            ("loader/entries/a.conf", entry),
            ("a/linux", ""),
            ("a/initrd", ""),
            ("EFI/Linux/b.efi", ""),
            ("EFI/Linux/c.efi", ""),
            ("EFI/Linux/C.efi.extra.d/x.addon.efi", ""),
            ("EFI/Linux/c.efi.extra.d/note.txt", ""),
            ("EFI/systemd/systemd-bootx64.efi", ""),
        ]);
        let all: Vec<Bootable<'_>> = Bootable::all(&found.files).collect();
        let [Bootable::Uki(b), Bootable::UkiWithAddons(c, addons), Bootable::Entry(a)] = all.as_slice() else {
            panic!("{all:?}")
        };
        assert_eq!([&*b.path, &*c.path, &*a.path], ["EFI/Linux/b.efi", "EFI/Linux/c.efi", "loader/entries/a.conf"]);
        assert_eq!(addons.len(), 1);
        let paths: Vec<Vec<String>> = all.iter().map(Bootable::images).collect();
        assert_eq!(
            paths,
            [vec!["efi/linux/b.efi"], vec!["efi/linux/c.efi", "efi/linux/c.efi.extra.d/x.addon.efi"], vec!["a/linux"]]
        );
        assert_eq!(all[2].refers_to(), ["a/linux", "a/initrd"]);
        assert_eq!(all[2].initrds(), ["a/initrd"]);
    }
}
