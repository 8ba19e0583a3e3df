//! Do the initrds have the new disk's drivers? A new disk may need other kernel modules than the booted one, and an initrd may hold only
//! those that its machine booted with (initramfs-tools: MODULES=dep, dracut: hostonly).

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{Cursor, Read};
use std::os::unix::ffi::OsStrExt;

use anyhow::{Context, Result, bail};

use crate::base::root::Root;
use crate::base::types::Role;
use crate::boot::files::{BootFiles, Class, fold};
use crate::boot::{initrd, pe};
use crate::devices::inventory::Partition;
use crate::names::ident::Rewriter;
use crate::pair::machine::Machine;

/// The kernel modules that drive a disk, by its kernel name: the disk itself, its controller, and everything between and above. Drivers
/// that are built into the kernel are left out. A disk without a device of its own, such as a loop device, has none.
///
/// # Errors
/// Those of reading a directory in /sys.
pub fn modules(root: &Root, disk: &str) -> Result<BTreeSet<String>> {
    let device = format!("/sys/class/block/{}/device", disk.replace('/', "!"));
    // With native multipath, the device of an NVMe disk is a subsystem, in which its controllers are links: nvme0, and so on.
    let names = root.names(&device).with_context(|| device.clone())?;
    let controllers = names.iter().filter(|name| name.as_bytes().starts_with(b"nvme"));
    let devices = controllers.map(|name| root.path(&device).join(name)).chain([root.path(&device)]);
    let Ok(top) = fs::canonicalize(root.path("/sys/devices")) else { return Ok(BTreeSet::new()) };
    let mut found = BTreeSet::new();
    for device in devices.filter_map(|device| fs::canonicalize(device).ok()) {
        for dir in device.ancestors().take_while(|dir| dir.starts_with(&top)) {
            // Most have no driver. A driver that is built in has no module, or one without a state.
            let Ok(module) = fs::canonicalize(dir.join("driver/module")) else { continue };
            if module.join("initstate").exists() {
                found.extend(module.file_name().and_then(|name| name.to_str()).map(str::to_owned));
            }
        }
    }
    Ok(found)
}

/// Checks that the initrds of every entry and every unified kernel image of the booted disk have the drivers of the disk with this kernel
/// name. Drivers that the booted disk needs as well have been found there by booting.
///
/// # Errors
/// The first entry or image whose initrds lack a driver; initrds that can't be read.
pub fn check(machine: &Machine, disk: &str, files: &BTreeMap<Role, BootFiles>) -> Result<()> {
    let booted = machine.inventory.find(&machine.booted.esp())?.and_then(Partition::disk);
    let proven = booted.map(|booted| modules(&machine.root, booted)).transpose()?.unwrap_or_default();
    let needed = &modules(&machine.root, disk)? - &proven;
    if needed.is_empty() {
        return Ok(());
    }
    let finder = module_finder(&needed);
    for (role, _, dir) in machine.booted.boot_places() {
        let Some(found) = files.get(&role) else { continue };
        let place = machine.root.path(dir.as_str());
        for entry in found.of(Class::Entry) {
            let paths = initrd::initrd_paths(entry.text.as_deref().unwrap_or_default());
            let initrds: Vec<_> = paths.iter().filter_map(|path| found.files.get(&fold(path))).collect();
            let mut missing = needed.clone();
            for initrd in &initrds {
                let file = File::open(place.join(&initrd.path)).with_context(|| initrd.path.clone())?;
                remove_found(&mut missing, file, &finder).with_context(|| initrd.path.clone())?;
            }
            // An entry without initrds has a kernel with all drivers built in. One whose initrds don't exist boots from no disk.
            if !initrds.is_empty() && !missing.is_empty() {
                bail!("{dir}/{}: none of its initrds has {}", entry.path, describe(&missing, disk));
            }
        }
        for image in found.of(Class::Uki) {
            let bytes = fs::read(place.join(&image.path)).with_context(|| format!("{dir}/{}", image.path))?;
            let Some(initrd) = pe::embedded_initrd(&bytes) else { continue };
            let mut missing = needed.clone();
            remove_found(&mut missing, Cursor::new(initrd), &finder).with_context(|| image.path.clone())?;
            if !missing.is_empty() {
                bail!("{dir}/{}: its initrd does not have {}", image.path, describe(&missing, disk));
            }
        }
    }
    Ok(())
}

/// Finds modules in an initrd by the ends of their files' paths, which a NUL follows in an archive. Their names alone would not do,
/// because an initrd also has modules.order, the list of all modules. A module whose licence is in modules.builtin.modinfo is built into
/// that kernel, which may be another than the running one.
fn module_finder(modules: &BTreeSet<String>) -> Rewriter {
    let forms = |module: &String| {
        let files = ["", ".zst", ".xz", ".gz"].map(|suffix| format!("/{module}.ko{suffix}\0"));
        let forms = files.into_iter().chain([format!("\0{module}.license=")]);
        forms.map(|form| (module.clone(), form.into_bytes())).collect::<Vec<_>>()
    };
    Rewriter::words(modules.iter().flat_map(forms))
}

/// Removes the modules that an initrd has from those that are missing.
fn remove_found(missing: &mut BTreeSet<String>, initrd: impl Read + Send, finder: &Rewriter) -> Result<()> {
    for module in initrd::search_initrd(initrd, finder)? {
        missing.remove(&module);
    }
    Ok(())
}

/// The end of a message about missing modules.
fn describe(missing: &BTreeSet<String>, disk: &str) -> String {
    let modules = missing.iter().map(|module| format!("'{module}'")).collect::<Vec<_>>().join(" and ");
    let (drives, that) = if missing.len() == 1 { ("drives", "that") } else { ("drive", "these") };
    format!(
        "{modules}, which {drives} /dev/{disk}; without {that}, the copy would not boot; put all drivers into the initrds \
         (initramfs-tools: MODULES=most in /etc/initramfs-tools/initramfs.conf, nothing else in its conf.d, and 'update-initramfs -u -k \
         all'; dracut: hostonly=no in dracut.conf, and 'dracut --regenerate-all --force')"
    )
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;
    use std::path::Path;

    use super::*;
    use crate::base::types::PartUuid;
    use crate::conf::Config;
    use crate::devices::inventory::Inventory;
    use crate::proof::images::tests::{image, pipe};
    use crate::write::below::Below;

    fn make(root: &Root, dir: &str) {
        fs::create_dir_all(root.path(dir)).unwrap();
    }

    /// A link as sysfs has them.
    fn link(root: &Root, path: &str, to: &str) {
        make(root, Path::new(path).parent().unwrap().to_str().unwrap());
        make(root, to);
        let up = "../".repeat(path.matches('/').count() - 1);
        symlink(up + to.trim_start_matches('/'), root.path(path)).unwrap();
    }

    /// A device has a driver, which is of a module that is loaded, or built in.
    fn drive(root: &Root, device: &str, driver: &str, module: &str, loaded: bool) {
        let (driver, module) = (format!("/sys/bus/x/drivers/{driver}"), format!("/sys/module/{module}"));
        link(root, &format!("{device}/driver"), &driver);
        if !root.exists(format!("{driver}/module")) {
            link(root, &format!("{driver}/module"), &module);
        }
        if loaded {
            fs::write(root.path(format!("{module}/initstate")), "live\n").unwrap();
        }
    }

    /// A disk below a device.
    fn disk(root: &Root, kname: &str, device: &str, below: &str) {
        let block = format!("{device}{below}/{kname}");
        link(root, &format!("/sys/class/block/{kname}"), &block);
        link(root, &format!("{block}/device"), device);
    }

    const PCI: &str = "/sys/devices/pci0000:00/0000:00:1c.0";

    /// Disks at SATA, sda; at USB, sdb; and at NVMe, nvme0n1, and as one of a subsystem, nvme1n1. All are below a bridge whose
    /// driver is built in.
    fn disks(root: &Root) {
        drive(root, PCI, "pcieport", "pcieportdrv", false);
        let sata = format!("{PCI}/0000:01:00.0");
        drive(root, &sata, "ahci", "ahci", true);
        let scsi = format!("{sata}/ata1/host0/target0:0:0/0:0:0:0");
        drive(root, &scsi, "sd", "sd_mod", true);
        disk(root, "sda", &scsi, "/block");
        let xhci = format!("{PCI}/0000:02:00.0");
        drive(root, &xhci, "xhci_hcd", "xhci_pci", true);
        // It has no module, not even a built-in one.
        link(root, &format!("{xhci}/usb2/2-1/driver"), "/sys/bus/usb/drivers/usb");
        let usb = format!("{xhci}/usb2/2-1/2-1:1.0");
        drive(root, &usb, "usb-storage", "usb_storage", true);
        let scsi = format!("{usb}/host6/target6:0:0/6:0:0:0");
        drive(root, &scsi, "sd", "sd_mod", true);
        disk(root, "sdb", &scsi, "/block");
        for (n, slot) in [(0, "0000:03:00.0"), (1, "0000:04:00.0")] {
            drive(root, &format!("{PCI}/{slot}"), "nvme", "nvme", true);
            make(root, &format!("{PCI}/{slot}/nvme/nvme{n}"));
        }
        disk(root, "nvme0n1", &format!("{PCI}/0000:03:00.0/nvme/nvme0"), "");
        let subsystem = "/sys/devices/virtual/nvme-subsystem/nvme-subsys1";
        disk(root, "nvme1n1", subsystem, "");
        link(root, &format!("{subsystem}/nvme1"), &format!("{PCI}/0000:04:00.0/nvme/nvme1"));
        link(root, &format!("{subsystem}/subsystem"), "/sys/class/nvme-subsystem");
        make(root, "/sys/devices/virtual/block/loop0");
        link(root, "/sys/class/block/loop0", "/sys/devices/virtual/block/loop0");
    }

    #[test]
    fn modules_of_a_disk_and_of_its_controller_unless_they_are_built_in() {
        let tmp = tempfile::tempdir().unwrap();
        let root = Root::new(tmp.path());
        disks(&root);
        for (name, expected) in [
            ("sda", &["ahci", "sd_mod"][..]),
            ("sdb", &["sd_mod", "usb_storage", "xhci_pci"]),
            ("nvme0n1", &["nvme"]),
            ("nvme1n1", &["nvme"]),
            ("loop0", &[]),
            ("sdz", &[]),
        ] {
            assert_eq!(modules(&root, name).unwrap().iter().map(String::as_str).collect::<Vec<_>>(), expected, "{name}");
        }
    }

    const ORDER: &str =
        "kernel/drivers/scsi/sd_mod.ko\nkernel/drivers/usb/storage/usb-storage.ko\nkernel/drivers/usb/host/xhci-pci.ko\n";

    /// An initrd with these modules, and lists as every one has them, of all modules and of those that are built in.
    fn initrd(modules: &[&str], builtin: &str) -> Vec<u8> {
        let tmp = tempfile::tempdir().unwrap();
        let files =
            modules.iter().map(|path| (*path, "\x7fELF")).chain([("modules.order", ORDER), ("modules.builtin.modinfo", builtin)]);
        let mut list = String::new();
        for (path, content) in files {
            let path = format!("usr/lib/modules/6.1/{path}");
            fs::create_dir_all(tmp.path().join(&path).parent().unwrap()).unwrap();
            fs::write(tmp.path().join(&path), content).unwrap();
            list += &(path + "\n");
        }
        pipe("cpio", &["-o", "-H", "newc", "--quiet"], list.as_bytes(), tmp.path())
    }

    /// The result of checking sdb on a machine that was booted from `booted`, with these files on its ESP.
    fn said(booted: &str, on_esp: &[(&str, &[u8])]) -> String {
        let tmp = tempfile::tempdir().unwrap();
        let root = Root::new(tmp.path());
        disks(&root);
        let id = |n: u32| PartUuid::parse(&format!("aaaaaaaa-0000-4000-8000-{n:012}")).unwrap();
        let config = format!("[disk0]\nesp={}\n[disk1]\nesp={}\n", id(1), id(2));
        let config = Config::parse(&[("x".to_owned(), config.into_bytes())]).unwrap().unwrap();
        let lsblk = format!(
            r#"{{"blockdevices":[{{"kname":"{booted}p1","pkname":"{booted}","path":"/dev/{booted}p1","maj:min":"8:1",
                "fstype":null,"uuid":null,"label":null,"partuuid":"{}","partlabel":null,"parttype":null,"log-sec":512}}]}}"#,
            id(1)
        );
        make(&root, "/boot");
        for (path, bytes) in on_esp {
            let path = root.path("/boot").join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, bytes).unwrap();
        }
        let files = BootFiles::scan(&Below::open(&root.path("/boot")).unwrap()).unwrap();
        let inventory = Inventory::parse(lsblk.as_bytes(), BTreeMap::new(), BTreeSet::new()).unwrap();
        let booted = config.disks[0].clone();
        let machine = Machine { root, config, booted, inventory, ids: Vec::new(), loader: None, drafts: Vec::new() };
        check(&machine, "sdb", &[(Role::Esp, files)].into()).map_or_else(|e| format!("{e:#}"), |()| String::new())
    }

    const ENTRY: (&str, &[u8]) = ("loader/entries/a.conf", b"linux /linux\ninitrd /ucode\ninitrd /initrd\n");
    const USB: [&str; 3] = ["kernel/usb/usb-storage.ko", "kernel/usb/xhci-pci.ko.xz", "kernel/scsi/sd_mod.ko.zst"];

    #[test]
    fn initrds_that_lack_the_drivers_of_the_new_disk() {
        let packed = |bytes: Vec<u8>| pipe("gzip", &["-c"], &bytes, Path::new("/"));
        let small = initrd(&["kernel/nvme.ko"], "\0loop.license=GPL\0");
        for small in [small.clone(), packed(small)] {
            let found = said("nvme0n1", &[ENTRY, ("initrd", &small)]);
            let expected = "/boot/loader/entries/a.conf: none of its initrds has 'sd_mod' and 'usb_storage' and 'xhci_pci', \
                            which drive /dev/sdb; without these, the copy would not boot; put all";
            assert!(found.starts_with(expected), "{found}");
        }
        for (modules, builtin, lacking) in [
            (&USB[..], "", ""),
            (&["usb_storage.ko.gz", "x/xhci_pci.ko", "sd_mod.ko"], "", ""),
            (&USB[..2], "\0sd_mod.license=GPL\0", ""),
            (&USB[..2], "\0xsd_mod.license=GPL\0", "'sd_mod', which drives"),
            (&["usb-storage.ko", "xhci-pci.ko", "sd_mod.ko.d/x"], "", "'sd_mod', which drives"),
            (&["usb-storage.ko", "xhci-pci.ko", "xsd_mod.ko"], "", "'sd_mod', which drives"),
        ] {
            let plain = initrd(modules, builtin);
            for initrd in [plain.clone(), packed(plain)] {
                let found = said("nvme0n1", &[ENTRY, ("initrd", &initrd)]);
                assert_eq!((found.is_empty(), found.contains(lacking)), (lacking.is_empty(), true), "{modules:?}: {found}");
                // An embedded initrd counts in the same way.
                let uki = image(&[(".initrd", &initrd)], false);
                let found = said("nvme0n1", &[("EFI/Linux/a.efi", &uki)]);
                assert_eq!((found.is_empty(), found.contains(lacking)), (lacking.is_empty(), true), "{modules:?}: {found}");
            }
        }
        // Each has what the other lacks.
        let (one, other) = (initrd(&USB[..1], ""), initrd(&USB[1..], ""));
        assert_eq!(said("nvme0n1", &[ENTRY, ("ucode", &one), ("initrd", &other)]), "");
        let embedded = image(&[(".initrd", &one)], false);
        let found = said("nvme0n1", &[("EFI/Linux/a.efi", &embedded)]);
        assert!(found.starts_with("/boot/EFI/Linux/a.efi: its initrd does not have 'sd_mod' and 'xhci_pci'"), "{found}");
    }

    #[test]
    fn only_drivers_that_the_booted_disk_does_not_need_are_searched() {
        let small = initrd(&["ahci.ko"], "");
        assert!(said("sda", &[ENTRY, ("initrd", &small)]).contains("has 'usb_storage' and 'xhci_pci', which"));
        // Nothing is read: it could not be.
        assert_eq!(said("sdb", &[ENTRY, ("initrd", b"not an archive")]), "");
        assert!(said("sda", &[ENTRY, ("initrd", b"not an archive")]).starts_with("initrd: it begins with"));
        // Kernels without an initrd have all that they need.
        let none = image(&[(".cmdline", b"x")], false);
        assert_eq!(said("sda", &[("loader/entries/a.conf", b"linux /linux\n"), ("EFI/Linux/a.efi", &none)]), "");
    }
}
