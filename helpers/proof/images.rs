//! Images that name the booted disk. They can't be rewritten for another disk, and so are reported: unified kernel images with such a
//! command line or initrd (failure mode 16), and initrds (failure mode 17).

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result};

use crate::base::fault::{Code, Fault};
use crate::boot::bootable::Bootable;
use crate::boot::files::{BootFiles, fold};
use crate::boot::initrd::search_initrd;
use crate::boot::pe::search_uki;
use crate::names::ident::Rewriter;
use crate::proof::searched::Searched;

/// The reasons in its images why entries of a boot partition would not boot on the rewriter's target. `place` is the partition's mount point,
/// and `found` its content, just read. An image that was searched before with the same content isn't read again.
///
/// # Errors
/// A file can't be read.
pub fn boot_partition(place: &Path, found: &BootFiles, rewriter: &Rewriter, searched: &mut Searched) -> Result<Vec<Fault>> {
    let mut faults = Vec::new();
    let all: Vec<Bootable<'_>> = Bootable::all(&found.files).collect();
    let mut initrds: Vec<String> = all.iter().flat_map(Bootable::initrds).collect();
    let images: BTreeSet<String> = all.iter().flat_map(Bootable::images).collect();
    // Add-ons for all images (systemd-stub(7)) hold command lines, too.
    let is_image = |key: &str| images.contains(key) || key.ends_with(".addon.efi");
    for image in found.files.iter().filter(|(key, _)| is_image(key)).map(|(_, image)| image) {
        if searched.has(&image.hash) {
            continue;
        }
        let bytes = fs::read(place.join(&image.path)).with_context(|| format!("{} can't be read", image.path))?;
        let names = search_uki(&bytes, rewriter)?;
        if names.is_empty() {
            searched.add(&bytes);
        }
        faults.extend(names.into_iter().map(|name| Fault::new(Code::F16, format!("{}: {name}", image.path)).at(&image.path)));
    }
    initrds.sort();
    initrds.dedup();
    for path in initrds {
        // Only files in `found` are opened: another path may lead to a device, or out of the partition.
        let Some(file) = found.files.get(&fold(&path)).filter(|file| !searched.has(&file.hash)) else { continue };
        let Ok(mut file) = File::open(place.join(&file.path)) else { continue };
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).with_context(|| format!("{path} can't be read"))?;
        let names = search_initrd(&*bytes, rewriter).with_context(|| path.clone())?;
        if names.is_empty() {
            searched.add(&bytes);
        }
        faults.extend(names.into_iter().map(|name| {
            Fault::new(Code::F17, format!("{path} has {name} built in"))
                .at(&path)
                .remedy("configure the initrd's generator not to name disks (see dualroot(7)), and make the initrd again")
        }));
    }
    Ok(faults)
}

#[cfg(test)]
pub(crate) mod tests {
    use std::io::Write;
    use std::process::Stdio;
    use std::thread;

    use super::*;
    use crate::base::fault::tests::codes;
    use crate::base::program;
    use crate::names::ident::tests::{ROOT_A, ROOT_B, to_b};

    /// Runs a program with input and returns what it printed.
    pub fn pipe(name: &str, args: &[&str], input: &[u8], dir: &Path) -> Vec<u8> {
        let mut command = program::command(name).unwrap_or_else(|e| panic!("{e:#}; the test needs it: apt-get install {name}"));
        let mut child = command.args(args).current_dir(dir).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let (mut stdin, input) = (child.stdin.take().unwrap(), input.to_vec());
        let writer = thread::spawn(move || stdin.write_all(&input));
        let output = child.wait_with_output().unwrap();
        writer.join().unwrap().unwrap();
        assert!(output.status.success(), "{name}");
        output.stdout
    }

    fn archive(content: &str) -> Vec<u8> {
        let tmp = tempfile::tempdir().unwrap();
        fs::write(tmp.path().join("resume"), content).unwrap();
        fs::write(tmp.path().join("odd"), "x").unwrap();
        pipe("cpio", &["-o", "-H", "newc", "--quiet"], b"odd\nresume\n", tmp.path())
    }

    #[test]
    fn f17_initrds_that_name_another_disk() {
        let (bad, good) = (archive(&format!("RESUME=UUID={ROOT_A}\n")), archive(&format!("RESUME=UUID={ROOT_B}\n")));
        let search = |bytes: &[u8]| search_initrd(bytes, &to_b()).unwrap();
        assert_eq!(search(&bad), [format!("UUID={ROOT_A} (root of disk0)")]);
        assert_eq!(search(&good), [""; 0]);
        for (program, args) in [
            ("gzip", &["-c"][..]),
            ("zstd", &["-q", "-c"]),
            ("xz", &["-c", "--check=crc32"]),
            ("xz", &["-c", "--format=lzma"]),
            ("lz4", &["-q", "-l", "-c"]),
            ("bzip2", &["-c"]),
        ] {
            let pack = |bytes: &[u8]| pipe(program, args, bytes, Path::new("/"));
            let with_microcode = [good.clone(), vec![0; 508], pack(&bad)].concat();
            assert_eq!(search(&with_microcode).len(), 1, "{program} {args:?}");
            assert_eq!(search(&[good.clone(), pack(&good)].concat()), [""; 0], "{program} {args:?}");
            let name_in_first = [bad.clone(), vec![0; 4], pack(&good)].concat();
            assert_eq!(search(&name_in_first).len(), 1, "{program} {args:?}");
        }
    }

    #[test]
    fn f26_damaged_initrds_are_errors() {
        let good = archive("x");
        assert!(search_initrd(&good[..100], &to_b()).is_err());
        assert!(search_initrd(&b"not an archive"[..], &to_b()).is_err());
        assert!(search_initrd(&b"\x1f\x8bnot gzip"[..], &to_b()).is_err());
        assert_eq!(search_initrd(&b""[..], &to_b()).unwrap(), [""; 0]);
    }

    /// A PE image with these sections, as small as they come (PE format: DOS header, signature, COFF header, optional header).
    pub fn image(sections: &[(&str, &[u8])], signed: bool) -> Vec<u8> {
        let le = |n: usize| u32::try_from(n).unwrap().to_le_bytes();
        let mut out = [b"MZ".to_vec(), vec![0; 58], le(64).to_vec(), b"PE\0\0".to_vec()].concat();
        out.extend([0x64, 0x86, u8::try_from(sections.len()).unwrap(), 0]);
        out.extend([0; 12]);
        out.extend([240, 0, 0x22, 0]);
        let mut optional = vec![0; 240];
        optional[..2].copy_from_slice(&[0x0b, 0x02]);
        optional[108] = 16;
        if signed {
            optional[112 + 4 * 8..][..8].copy_from_slice(&[le(4096), le(8)].concat());
        }
        out.extend(optional);
        let mut at = out.len() + 40 * sections.len();
        for (name, data) in sections {
            let mut header = name.as_bytes().to_vec();
            header.resize(8, 0);
            for n in [data.len(), 0x1000, data.len(), at] {
                header.extend(le(n));
            }
            header.resize(40, 0);
            out.extend(header);
            at += data.len();
        }
        for (_, data) in sections {
            out.extend(*data);
        }
        out
    }

    #[test]
    fn f16_images_that_name_another_disk() {
        let bad = format!("root=UUID={ROOT_A} ro\0");
        let found = search_uki(&image(&[(".osrel", b"ID=x"), (".cmdline", bad.as_bytes())], false), &to_b()).unwrap();
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].starts_with("its embedded command line names ") && found[0].contains("(root of disk0)"), "{found:?}");
        let good = format!("root=UUID={ROOT_B} ro");
        assert_eq!(search_uki(&image(&[(".cmdline", good.as_bytes())], true), &to_b()).unwrap(), [""; 0]);
        let signed = search_uki(&image(&[(".cmdline", bad.as_bytes()), (".initrd", &archive(&bad))], true), &to_b()).unwrap();
        assert_eq!(signed.len(), 2, "{signed:?}");
        assert!(signed.iter().all(|f| f.contains("it is signed")) && signed[1].contains("embedded initrd"), "{signed:?}");
    }

    #[test]
    fn f16_images_in_every_directory_are_searched() {
        let tmp = tempfile::tempdir().unwrap();
        let bad = image(&[(".cmdline", format!("root=UUID={ROOT_A}").as_bytes())], false);
        let paths = ["EFI/Linux/a.efi", "EFI/Linux/b.efi.extra.d/x.addon.efi", "loader/addons/y.addon.efi", "Debian/linux.efi"];
        for path in paths {
            fs::create_dir_all(tmp.path().join(path).parent().unwrap()).unwrap();
            fs::write(tmp.path().join(path), &bad).unwrap();
        }
        fs::create_dir_all(tmp.path().join("loader/entries")).unwrap();
        fs::write(tmp.path().join("loader/entries/a.conf"), "linux /debian/Linux.efi\n").unwrap();
        let found = BootFiles::scan(&crate::write::below::Below::open(tmp.path()).unwrap()).unwrap();
        let faults = boot_partition(tmp.path(), &found, &to_b(), &mut Searched::new(&to_b()).unwrap()).unwrap();
        for path in paths {
            assert!(faults.iter().any(|f| f.code == Code::F16 && f.path.as_deref() == Some(path)), "{path}: {faults:?}");
        }
    }

    #[test]
    fn f17_only_an_image_without_a_finding_is_not_searched_again() {
        let tmp = tempfile::tempdir().unwrap();
        fs::create_dir_all(tmp.path().join("loader/entries")).unwrap();
        fs::write(tmp.path().join("loader/entries/a.conf"), "linux /linux\ninitrd /initrd\n").unwrap();
        fs::write(tmp.path().join("linux"), "MZ").unwrap();
        let search = |kept: &Searched| {
            let found = BootFiles::scan(&crate::write::below::Below::open(tmp.path()).unwrap()).unwrap();
            let mut searched = kept.for_the_next_sync();
            (boot_partition(tmp.path(), &found, &to_b(), &mut searched).unwrap(), searched)
        };
        let (good, bad) = (archive(ROOT_B), archive(ROOT_A));
        fs::write(tmp.path().join("initrd"), &bad).unwrap();
        let (faults, kept) = search(&Searched::new(&to_b()).unwrap());
        assert_eq!(codes(&faults), [Code::F17], "{faults:?}");
        assert_eq!(search(&kept).0, faults, "a finding is not forgotten");
        fs::write(tmp.path().join("initrd"), &good).unwrap();
        let (faults, mut kept) = search(&kept);
        assert_eq!(faults, []);
        let mut kept_before = kept.for_the_next_sync();
        assert!(kept_before.has(&blake3::hash(&good)) && kept_before.has(&blake3::hash(b"MZ")), "both are noted");
        assert_eq!(good.len(), bad.len());
        fs::write(tmp.path().join("initrd"), &bad).unwrap();
        assert_eq!(codes(&search(&kept).0), [Code::F17], "another content of the same size is searched");
        // An image that is noted as clean is not even opened.
        kept.add(&bad);
        assert_eq!(search(&kept).0, []);
    }

    #[test]
    fn f26_a_file_outside_the_partition_is_not_opened() {
        let tmp = tempfile::tempdir().unwrap();
        let place = tmp.path().join("boot");
        fs::create_dir_all(place.join("loader/entries")).unwrap();
        fs::write(tmp.path().join("outside"), archive(ROOT_A)).unwrap();
        std::os::unix::fs::symlink("../outside", place.join("link")).unwrap();
        fs::write(place.join("loader/entries/a.conf"), "initrd /../outside\ninitrd /link\n").unwrap();
        let found = BootFiles::scan(&crate::write::below::Below::open(&place).unwrap()).unwrap();
        assert_eq!(boot_partition(&place, &found, &to_b(), &mut Searched::new(&to_b()).unwrap()).unwrap(), []);
    }

    #[test]
    fn f17_an_archive_after_a_compressed_part_is_searched() {
        let packed = pipe("gzip", &["-c"], &archive("x"), Path::new("/"));
        assert!(search_initrd(&[packed.clone(), vec![0; 512]].concat()[..], &to_b()).is_ok());
        assert!(search_initrd(&[packed, archive(ROOT_A)].concat()[..], &to_b()).is_err());
    }

    proptest::proptest! {
        #[test]
        fn f26_mutated_images_do_not_panic(at in 0usize..600, byte: u8, length in 0usize..700) {
            let mut image = image(&[(".cmdline", b"root=x"), (".initrd", &[0; 64])], true);
            if let Some(b) = image.get_mut(at) {
                *b = byte;
            }
            image.truncate(length);
            let _ = search_uki(&image, &to_b());
        }
    }

    #[test]
    fn f16_a_file_that_is_not_an_image_has_no_finding() {
        assert_eq!(search_uki(b"MZ", &to_b()).unwrap(), [""; 0]);
        assert_eq!(search_uki(ROOT_A.as_bytes(), &to_b()).unwrap(), [""; 0]);
    }
}
