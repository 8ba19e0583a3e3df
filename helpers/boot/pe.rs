//! Unified kernel images (UAPI.5): the sections of a PE file.

use std::io::Cursor;

use anyhow::Result;
use object::pe::IMAGE_DIRECTORY_ENTRY_SECURITY;
use object::read::pe::PeFile64;
use object::{LittleEndian, Object, ObjectSection};

use crate::boot::initrd::search_initrd;
use crate::names::ident::Rewriter;

/// The faults of a unified kernel image: identifiers of other disks in its command line and initrd. None for a file that isn't PE.
///
/// # Errors
/// A decompressor fails.
pub fn search_uki(image: &[u8], rewriter: &Rewriter) -> Result<Vec<String>> {
    let Ok(pe) = PeFile64::parse(image) else { return Ok(Vec::new()) };
    let mut faults = Vec::new();
    for section in pe.sections() {
        let (Ok(name), Ok(data)) = (section.name(), section.data()) else { continue };
        match name {
            ".cmdline" => {
                faults.extend(rewriter.foreign(data).into_iter().map(|id| format!("its embedded command line names {id}")))
            }
            ".initrd" => {
                faults.extend(
                    search_initrd(Cursor::new(data), rewriter)?.into_iter().map(|id| format!("its embedded initrd names {id}")),
                );
            }
            _ => {}
        }
    }
    let signature = pe.data_directory(IMAGE_DIRECTORY_ENTRY_SECURITY).is_some_and(|dir| dir.size.get(LittleEndian) > 0);
    if signature {
        for fault in &mut faults {
            fault.push_str(" (and it is signed: under Secure Boot nothing can override that)");
        }
    }
    Ok(faults)
}

/// The initrd in a unified kernel image; None if it has none, or isn't a PE file.
pub fn embedded_initrd(image: &[u8]) -> Option<&[u8]> {
    let pe = PeFile64::parse(image).ok()?;
    pe.section_by_name(".initrd")?.data().ok()
}
