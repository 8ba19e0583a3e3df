//! The devices that the copy of a template would wait for when it boots: removes fstab(5) lines about other disks, and finds lines whose
//! device the new disk doesn't have.

use anyhow::Result;

use crate::base::fault::{Code, Fault};
use crate::base::refusal::refused;
use crate::base::types::{DiskName, Role};
use crate::names::crypttab;
use crate::names::fstab::{self, Line};
use crate::names::ident::Rewriter;
use crate::names::ids::DiskIds;

/// The tags that name a device, and the paths that do.
const TAGS: [&[u8]; 4] = [b"UUID=", b"PARTUUID=", b"LABEL=", b"PARTLABEL="];
const DEVICES: &[u8] = b"/dev/";
const MAPPED: &[u8] = b"/dev/mapper/";
/// Swap space in memory, which is on no disk.
const MEMORY: &[u8] = b"/dev/zram";

/// Finds the names of these disks.
///
/// # Errors
/// A refusal: those of [`Rewriter::finder`].
pub(super) fn finder(disks: &[DiskIds]) -> Result<Rewriter> {
    Rewriter::finder(disks).map_err(|e| refused(format!("{e:#}")))
}

/// Removes the lines about the template's spares from fstab, which would otherwise be rewritten into lines about the new disk. `first` is the
/// disk that the template was made of, unless fstab has the root on another one, as after a failover.
///
/// # Errors
/// As [`finder`].
pub(super) fn without_other_disks(fstab: &[u8], disks: &[DiskIds], first: DiskName) -> Result<Vec<u8>> {
    let finders = disks.iter().map(|disk| Ok((disk.name, finder(std::slice::from_ref(disk))?))).collect::<Result<Vec<_>>>()?;
    let named = |line: &Line<'_>| -> Vec<DiskName> {
        finders.iter().filter(|(_, finder)| !finder.foreign(line.spec.raw).is_empty()).map(|(name, _)| *name).collect()
    };
    let roots = fstab::lines(fstab).find(|line| line.is_at("/")).map(|line| named(&line)).unwrap_or_default();
    let own = if roots.contains(&first) { first } else { roots.first().copied().unwrap_or(first) };
    let is_anothers = |line: &Line<'_>| {
        let named = named(line);
        !named.is_empty() && !named.contains(&own)
    };
    Ok(fstab::without_lines(fstab, |line| is_a_spares(line) || is_anothers(line)))
}

/// Whether the line mounts something where spares are mounted, or below.
fn is_a_spares(line: &Line<'_>) -> bool {
    let place = line.mount_point().unwrap_or_default();
    place.strip_prefix(b"/mnt/root").is_some_and(|rest| rest.first().is_some_and(u8::is_ascii_digit))
}

/// One fault for each line that the boot waits for and whose device is none of the disk whose names `own` finds.
pub(super) fn missing_devices(fstab: &[u8], crypttab: &[u8], own: &Rewriter) -> Vec<Fault> {
    let is_absent = |spec: &[u8]| {
        let is_device = TAGS.iter().any(|tag| spec.starts_with(tag)) || spec.starts_with(DEVICES);
        is_device && !spec.starts_with(MEMORY) && own.foreign(spec).is_empty()
    };
    let fields = |line: &'_ [u8]| -> Vec<Vec<u8>> {
        line.split(u8::is_ascii_whitespace).filter(|field| !field.is_empty()).take(2).map(<[u8]>::to_vec).collect()
    };
    let mut faults = Vec::new();
    let mut opened = Vec::new();
    let mut fault = |path: &str, number: usize, what: &[u8], spec: &[u8]| {
        let text = format!(
            "{path} would make the boot wait for a device that the new disk does not have: line {number} ({}) needs {}",
            what.escape_ascii(),
            spec.escape_ascii()
        );
        faults.push(
            Fault::new(Code::F14, text)
                .on(&Role::Root)
                .at(path)
                .remedy("in the template's file, remove the line or add nofail to it"),
        );
    };
    for (index, line) in crypttab.split(|b| *b == b'\n').enumerate() {
        let fields = fields(line);
        let [name, spec] = &fields[..] else { continue };
        if name.starts_with(b"#") {
            continue;
        }
        if !is_absent(spec) {
            opened.push([MAPPED, name].concat());
        } else if !crypttab::may_fail(line) {
            fault("/etc/crypttab", index + 1, name, spec);
        }
    }
    for line in fstab::lines(fstab).filter(Line::is_needed_at_boot) {
        let spec = line.spec.text();
        // The raw text counts, too: labels may be escaped.
        if is_absent(&spec) && is_absent(line.spec.raw) && !opened.iter().any(|path| **path == *spec) {
            fault("/etc/fstab", line.number, &line.file.text(), &spec);
        }
    }
    faults
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::types::PartUuid;
    use crate::names::ids::PartIds;

    fn disk(name: &str, start: char, roles: &[Role]) -> DiskIds {
        let id = |n: usize| PartUuid::parse(&format!("{start}aaaaaaa-0000-4000-8000-00000000000{n}")).unwrap();
        let part = |(n, role): (usize, &Role)| {
            let ids = PartIds {
                uuid: Some(format!("{}AAA-000{n}", start.to_ascii_uppercase())),
                label: Some(format!("{role} {start}")),
                paths: [format!("/dev/sd{start}{n}")].into(),
                ..PartIds::new(id(n))
            };
            (role.clone(), ids)
        };
        DiskIds { name: DiskName::parse(name).unwrap(), parts: roles.iter().enumerate().map(part).collect() }
    }

    #[test]
    fn lines_about_spares_are_removed() {
        let roles = [Role::Esp, Role::Root, Role::Swap];
        let disks = [disk("disk0", 'a', &roles), disk("disk1", 'b', &roles)];
        let own = "# on UUID=BAAA-0001\nUUID=AAAA-0001 / ext4\nLABEL=esp\\040a /boot vfat\n/dev/sda2 none swap\nUUID=x /data ext4\ntmpfs /tmp tmpfs\n";
        let others = "UUID=BAAA-0000 /efi2 vfat\n/dev/sdb2 none swap\nUUID=BAAA-0001 /mnt/root1 ext4 noauto\n/dev/sdz /mnt/root22/boot vfat\n";
        let first = disks[0].name;
        let left = without_other_disks(format!("{own}{others}/dev/sdz /mnt/rootless ext4\n").as_bytes(), &disks, first).unwrap();
        assert_eq!(String::from_utf8(left).unwrap(), format!("{own}/dev/sdz /mnt/rootless ext4\n"));
        // It was made after a failover.
        let text = b"UUID=BAAA-0001 / ext4\n/dev/sda2 none swap\n/dev/sdb2 none swap\n";
        assert_eq!(without_other_disks(text, &disks, first).unwrap(), b"UUID=BAAA-0001 / ext4\n/dev/sdb2 none swap\n");
    }

    #[test]
    fn devices_that_the_new_disk_lacks_are_found() {
        let own = finder(&[disk("disk0", 'a', &[Role::Esp, Role::Root])]).unwrap();
        let crypttab = "# a UUID=c\ns PARTUUID=aaaaaaaa-0000-4000-8000-000000000001 /dev/urandom swap\n";
        let fine = "PARTUUID=AAAAAAAA-0000-4000-8000-000000000001 / ext4\nUUID=\"AAAA-0000\" /boot vfat\nLABEL=root\\040a /a ext4\n\
            /dev/disk/by-uuid/AAAA-0000 /b vfat\ntmpfs /tmp tmpfs\n/srv/a /srv/b none bind\nproc /proc proc\nhost:/dev/x /nfs nfs\n\
            /dev/zram0 none swap\n/dev/mapper/s none swap\nUUID=gone /c ext4 nofail\n/dev/sr0 /media/cd iso9660 ro,noauto\n\
            /dev/sdq /d ext4 x-systemd.automount\n";
        assert_eq!(missing_devices(fine.as_bytes(), crypttab.as_bytes(), &own), []);
        for line in [
            "UUID=BBBB-0000 /boot vfat umask=0077 0 2",
            "UUID=bbbbbbbb-0000-4000-8000-000000000001 /data ext4",
            "PARTUUID=bbbbbbbb-0000-4000-8000-000000000001 none swap",
            "LABEL=data /data ext4",
            "PARTLABEL=data /data ext4",
            "/dev/sdc1 /data ext4 defaults",
            "/dev/mapper/data /data ext4",
            "/dev/disk/by-id/x-part1 /data ext4",
        ] {
            let faults = missing_devices(format!("{fine}{line}\n").as_bytes(), crypttab.as_bytes(), &own);
            assert!(
                matches!(&faults[..], [fault] if fault.text.contains("line 14 (") && fault.path.as_deref() == Some("/etc/fstab")),
                "{line}: {faults:?}"
            );
        }
        for (line, count) in [
            ("data UUID=x", 1),
            ("data /dev/sdc1 none luks", 1),
            ("data UUID=x none luks,nofail", 0),
            ("data UUID=x - noauto", 0),
        ] {
            assert_eq!(missing_devices(b"", format!("{crypttab}{line}\n").as_bytes(), &own).len(), count, "{line}");
        }
    }
}
