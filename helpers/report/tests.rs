use super::*;
use crate::boot::load_option;
use crate::pair::status::Proof;

/// 2026-11-21 10:00:00 UTC.
const T: u64 = 1_795_255_200;

fn name(n: u32) -> DiskName {
    DiskName::parse(&format!("disk{n}")).unwrap()
}

fn esp(n: u32) -> PartUuid {
    PartUuid::parse(&format!("{}-0000-4000-8000-000000000001", ["aaaaaaaa", "bbbbbbbb", "cccccccc"][n as usize])).unwrap()
}

fn disk(n: u32) -> DiskFacts {
    let space = Space { role: Role::Esp, mounted_at: "/boot".into(), free: 300 << 20, size: 511 << 20 };
    DiskFacts {
        name: name(n),
        booted: n == 0,
        present: true,
        missing: BTreeSet::new(),
        fault: None,
        partitions: vec![PartReport {
            role: Role::Esp,
            number: Some(1),
            partuuid: esp(n),
            uuid: Some(format!("AAAA-000{n}")),
            filesystem: Some("vfat".into()),
            bytes: Some(512 << 20),
            node: Some(format!("/dev/sd{}1", ["a", "b", "c"][n as usize])),
        }],
        generation: None,
        record: Lineage::Unknown("needs root".into()),
        firmware: Some((vec![10], Some(1))),
        space: if n == 0 { vec![space] } else { Vec::new() },
        seen: None,
        own: None,
    }
}

fn pair(change: impl FnOnce(&mut Facts, &mut DiskFacts)) -> Facts {
    let mut facts = Facts {
        now: T + 7300,
        layout: Layout::OwnRoots,
        root: heal::RootState::Whole,
        running: false,
        warnings: Vec::new(),
        status_error: None,
        disks: vec![disk(0)],
    };
    let mut spare = disk(1);
    change(&mut facts, &mut spare);
    facts.disks.push(spare);
    facts
}

fn seen(outcome: Outcome) -> Seen {
    let proof = matches!(outcome, Outcome::Boots).then(|| proof(T));
    Seen { esp: esp(1), last: Some(End { at: T, outcome, code: None }), begun: None, absent_since: None, proof, read: None }
}

fn proof(at: u64) -> Proof {
    Proof { at, synced: None, files: BTreeMap::new() }
}

/// The codes of a disk's faults in a report.
fn codes(report: &Report, disk: usize) -> Vec<Code> {
    let disk = &report.disks[disk];
    assert!(disk.faults.iter().all(|fault| fault.disk == Some(disk.name)), "{:?}", disk.faults);
    crate::base::fault::tests::codes(&disk.faults)
}

/// The sentence about the spare, the codes of its faults, whether it boots, and the exit status.
fn spare(change: impl FnOnce(&mut Facts, &mut DiskFacts)) -> (String, Vec<Code>, Option<bool>, u8) {
    let report = Report::new(&pair(change));
    let disk = &report.disks[1];
    (disk.if_others_died.clone(), codes(&report, 1), disk.boots, report.exit.status())
}

fn is(found: (String, Vec<Code>, Option<bool>, u8), sentence: &str, codes: &[Code], boots: Option<bool>, status: u8) {
    assert_eq!(found, (sentence.to_owned(), codes.to_vec(), boots, status));
}

#[test]
fn a_spare_by_its_last_sync() {
    let with = |outcome: Outcome| spare(|_, disk| disk.seen = Some(seen(outcome)));
    is(with(Outcome::Boots), "boots, as of 2026-11-21 10:00:00 UTC, with the files of 2 hours ago", &[], Some(true), 0);
    let faults = vec![Fault::new(Code::F10, "esp: linux is missing"), Fault::new(Code::F16, "another")];
    let told = "would not boot: esp: linux is missing (and 1 more), as of 2026-11-21 10:00:00 UTC";
    is(with(Outcome::WouldNotBoot(faults)), told, &[Code::F10, Code::F16], Some(false), 1);
    let told = "unknown: the sync of 2026-11-21 10:00:00 UTC failed: EIO";
    is(with(Outcome::Failed("EIO".into())), told, &[Code::Unknown], None, 1);
    let told = "unknown: the sync of 2026-11-21 10:00:00 UTC was refused: disk1 is newer";
    is(with(Outcome::Refused("disk1 is newer".into())), told, &[Code::Unknown], None, 3);
    let newer = spare(|_, disk| {
        let mut seen = seen(Outcome::Refused("disk1 is newer".into()));
        seen.last.as_mut().unwrap().code = Some(Code::F07);
        disk.seen = Some(seen);
    });
    is(newer, told, &[Code::F07], None, 3);
    is(spare(|_, _| {}), "unknown: disk0 has not synced it yet", &[Code::Unknown], None, 1);
    // The sentence names an earlier sync after which the spare booted, if nothing was written since.
    let found = spare(|_, disk| {
        disk.seen = Some(Seen { proof: Some(proof(T - 60)), ..seen(Outcome::Failed("dpkg is at work".into())) });
    });
    let told = "unknown: the sync of 2026-11-21 10:00:00 UTC failed: dpkg is at work (it boots, as of 2026-11-21 09:59:00 UTC)";
    is(found, told, &[Code::Unknown], None, 1);
}

#[test]
fn a_spare_that_is_being_synced_counts_by_its_last_sync() {
    let being = |running: bool, last: bool| {
        spare(|facts, disk| {
            facts.running = running;
            let mut being = Seen { begun: Some(T + 60), proof: None, ..seen(Outcome::Boots) };
            being.last.take_if(|_| !last);
            disk.seen = Some(being);
        })
    };
    is(being(true, true), "boots, as of 2026-11-21 10:00:00 UTC, with the files of 2 hours ago", &[], Some(true), 0);
    is(
        being(true, false),
        "unknown: its first sync began at 2026-11-21 10:01:00 UTC and is still running",
        &[Code::Unknown],
        None,
        1,
    );
    for last in [true, false] {
        is(being(false, last), "unknown: the sync that began at 2026-11-21 10:01:00 UTC was interrupted", &[Code::F18], None, 1);
    }
}

#[test]
fn results_that_cannot_be_read_are_not_called_missing() {
    let tmp = tempfile::tempdir().unwrap();
    let config = crate::pair::status::tests::config(crate::pair::status::tests::PAIR);
    let booted = &config.disks[0];
    // A directory in the place of the file: root can't read that, either.
    std::fs::create_dir_all(tmp.path().join("var/lib/dualroot/own/status.json")).unwrap();
    let (_, error) = stored_status(Status::load(&Root::new(tmp.path()), &config, booted), booted);
    let error = error.unwrap();
    assert!(error.starts_with("/var/lib/dualroot/own/status.json can't be read: "), "{error}");
    let report = Report::new(&pair(|facts, _| facts.status_error = Some(error.clone())));
    assert_eq!(report.not_seen[0], format!("the results of earlier syncs ({error})"));
    let spare = &report.disks[1];
    assert_eq!(spare.if_others_died, format!("unknown: the results of earlier syncs can't be read ({error})"));
    assert_eq!((spare.boots, report.exit.status()), (None, 1));
    let (_, error) = stored_status(Status::load(&Root::new("/nowhere"), &config, booted), booted);
    assert_eq!(error, None, "a machine without a sync has no such file");
}

#[test]
fn a_missing_spare() {
    let absent = |since| {
        spare(|_, disk| {
            disk.present = false;
            disk.missing = BTreeSet::from([Role::Esp, Role::Root]);
            disk.seen = Some(Seen { absent_since: since, ..seen(Outcome::Boots) });
        })
    };
    is(absent(None), "is missing", &[Code::F21], Some(false), 4);
    is(absent(Some(T)), "is missing (no sync has found it since 2026-11-21 10:00:00 UTC)", &[Code::F21], Some(false), 4);
    let found = spare(|_, disk| {
        disk.missing = BTreeSet::from([Role::Root]);
        disk.seen = Some(seen(Outcome::Boots));
    });
    is(found, "unknown: its root= partition is missing, but other partitions of it are present", &[Code::F21], None, 3);
    let found = spare(|_, disk| {
        disk.fault = Some(Fault::new(Code::F03, "/dev/sda1 and /dev/sdb1 both have the PARTUUID"));
        disk.present = false;
    });
    is(found, "unknown: /dev/sda1 and /dev/sdb1 both have the PARTUUID", &[Code::F03], None, 3);
}

#[test]
fn a_shared_root_that_is_not_whole_boots_from_no_other_disk() {
    for (root, codes, told, own) in [
        (
            heal::RootState::Whole,
            &[][..],
            "boots, as of 2026-11-21 10:00:00 UTC",
            "continues to run, with one half of the shared root",
        ),
        (
            heal::RootState::Degraded,
            &[Code::F28],
            "would not boot: the shared root is degraded: one of its disks is missing",
            "continues to run: the shared root is degraded already",
        ),
        (
            heal::RootState::Behind,
            &[Code::F29],
            "would not boot: one half of the shared root is out of date until dualroot-heal.service has succeeded",
            "may stop: one half of the shared root is out of date until dualroot-heal.service has succeeded",
        ),
    ] {
        let shared = |facts: &mut Facts, disk: &mut DiskFacts| {
            (facts.layout, facts.root) = (Layout::SharedRoot, root);
            disk.seen = Some(seen(Outcome::Boots));
        };
        let whole = root == heal::RootState::Whole;
        is(spare(shared), told, codes, Some(whole), u8::from(!whole));
        assert_eq!(Report::new(&pair(shared)).disks[0].if_others_died, own);
    }
}

#[test]
fn the_faults_of_a_verification_count() {
    let read = |faults: &[(Code, &str)]| Reading { at: T + 60, faults: faults.iter().map(|(c, t)| Fault::new(*c, *t)).collect() };
    let found = spare(|_, disk| {
        disk.seen = Some(Seen {
            read: Some(read(&[(Code::F37, "esp: linux is not what the last sync read there")])),
            ..seen(Outcome::Boots)
        });
    });
    let told = "would not boot: esp: linux is not what the last sync read there, read at 2026-11-21 10:01:00 UTC";
    is(found, told, &[Code::F37], Some(false), 1);
    // A sync that failed has written it.
    for (proof, told) in [(Some(proof(T)), told), (None, "unknown: the sync of 2026-11-21 10:00:00 UTC failed: EIO")] {
        let found = spare(|_, disk| {
            let faults = &[(Code::F37, "esp: linux is not what the last sync read there")];
            disk.seen = Some(Seen { read: Some(read(faults)), proof, ..seen(Outcome::Failed("EIO".into())) });
        });
        assert_eq!(found.0, told);
    }
    let facts = pair(|facts, disk| {
        disk.seen = Some(Seen { read: Some(read(&[])), ..seen(Outcome::Boots) });
        facts.disks[0].own = Some(read(&[(Code::F20, "esp (/boot): linux can't be read: EIO")]));
    });
    let report = Report::new(&facts);
    assert_eq!((report.exit.status(), report.disks[1].boots), (1, Some(true)));
    assert_eq!((codes(&report, 0), codes(&report, 1)), (vec![Code::F20], vec![]));
    assert_eq!(
        report.disks[0].if_others_died,
        "continues to run: it has a root of its own; but it may not boot again: esp (/boot): linux can't be read: EIO, \
         read at 2026-11-21 10:01:00 UTC"
    );
}

#[test]
fn the_worst_of_several_spares_counts() {
    let report = |change: fn(&mut DiskFacts)| {
        let mut facts = pair(|_, disk| disk.seen = Some(seen(Outcome::Boots)));
        let mut third = DiskFacts { seen: Some(seen(Outcome::Boots)), ..disk(2) };
        change(&mut third);
        facts.disks.push(third);
        facts.disks[1].present = false;
        Report::new(&facts)
    };
    assert_eq!(report(|_| {}).exit.status(), 4);
    assert_eq!(report(|disk| disk.seen = Some(seen(Outcome::Refused(String::new())))).exit.status(), 3);
    assert_eq!(report(|disk| disk.seen = None).exit.status(), 1);
    assert!(report(|_| {}).text().contains("if the others died: "));
}

/// The report on a pair that fills every field.
fn full() -> Report {
    Report::new(&pair(|facts, disk| {
        facts.warnings = vec!["/etc/dualroot.conf:9: unknown key 'colour=' in section [disk1], ignoring".to_owned()];
        facts.disks[0].record = Lineage::Read(Record::default());
        facts.disks[0].own = Some(Reading { at: T - 60, faults: Vec::new() });
        disk.generation = Some(3);
        disk.partitions.push(PartReport::new(&Role::Root, esp(2), None));
        disk.firmware = Some((Vec::new(), None));
        disk.seen = Some(Seen {
            proof: Some(proof(T - 60)),
            read: Some(Reading {
                at: T - 30,
                faults: vec![
                    Fault::new(Code::F10, "esp: a\\b \"c\"\nis missing").on(&Role::Esp).at("a\\b \"c\""),
                    Fault::new(Code::F14, "/etc/fstab would make the boot wait").at("/etc/fstab").remedy("give the line nofail"),
                    Fault::new(Code::F14, "again").of(name(1)),
                ],
            }),
            ..seen(Outcome::Refused("disk1 is newer than disk0".into()))
        });
    }))
}

#[test]
fn for_people() {
    assert_eq!(full().text(), include_str!("golden.txt"));
    let text = Report::unconfigured().text();
    assert!(text.contains("not configured") && text.contains("dualroot-clone(8)") && text.contains("dualroot.conf(5)"), "{text}");
}

#[test]
fn for_programs() {
    assert_eq!(serde_json::to_string_pretty(&full()).unwrap() + "\n", include_str!("golden.json"));
}

#[test]
fn as_metrics() {
    assert_eq!(full().prometheus(), include_str!("golden.prom"));
    let none = Report::unconfigured().prometheus();
    let values: Vec<&str> = none.lines().filter(|line| !line.starts_with("# ")).collect();
    assert_eq!(values, ["dualroot_configured 0"], "{none}");
    assert_eq!(Report::unconfigured().exit, Exit::Refused);
}

#[test]
fn records_are_compared() {
    let disk = |n: u32, record: Record| DiskFacts { record: Lineage::Read(record), ..disk(n) };
    let (mut a, mut b) = (Record::default(), Record::default());
    a.synced(name(0), name(1), &mut b);
    let report = |a: &Record, b: &Record| {
        let facts = Facts { disks: vec![disk(0, a.clone()), disk(1, b.clone())], ..pair(|_, _| {}) };
        Report::new(&facts).disks[1].lineage.clone().unwrap()
    };
    let level = report(&a, &b);
    assert_eq!((level.synced_from, level.newer), (Some(name(0)), None));
    // B is synced to A, and then used without it.
    b.synced(name(1), name(0), &mut a);
    assert!(b.left_behind(name(1), name(0)));
    let newer = report(&a, &b);
    assert_eq!(newer.lives, BTreeMap::from([(name(1), 1)]));
    assert!(newer.newer.unwrap().starts_with("one boot of disk1 without disk0, the last of 20"));
}

#[test]
fn times_are_relative_to_now() {
    for (seconds, told) in [(0, "0 seconds ago"), (1, "1 second ago"), (3599, "59 minutes ago"), (86400, "1 day ago")] {
        assert_eq!(ago(T + seconds, T), told);
    }
    assert_eq!(ago(T, T + 1), "a time in the future");
}

#[test]
fn a_disk_is_found_in_the_firmwares_order() {
    let [own, other] =
        ["aaaaaaaa", "bbbbbbbb"].map(|start| PartUuid::parse(&format!("{start}-0000-4000-8000-000000000001")).unwrap());
    let option = |number, partition| load_option::BootOption {
        number,
        active: true,
        description: String::new(),
        partition: Some(partition),
        file: Some("x".into()),
        raw: Vec::new(),
    };
    let options = [option(1, other), option(4, own), option(5, own)];
    assert_eq!(firmware(&options, &[9, 5, 1], own), (vec![4, 5], Some(2)));
    assert_eq!(firmware(&options, &[9], other), (vec![1], None));
    assert_eq!(firmware(&options[1..], &[9, 5], other), (Vec::new(), None));
}

#[test]
fn a_partition_by_its_role() {
    let line = |kname: &str, parent: &str, kind: &str, fstype: &str, uuid: &str, id: Option<PartUuid>| {
        serde_json::json!({"kname": kname, "pkname": parent, "path": format!("/dev/{kname}"), "maj:min": "8:1", "type": kind,
            "fstype": fstype, "uuid": uuid, "label": null, "partuuid": id.map(|id| id.to_string()), "partlabel": null,
            "parttype": null, "size": 4096, "log-sec": 512})
    };
    let (id, found) = (esp(1), |devices: Vec<serde_json::Value>| {
        let json = serde_json::json!({"blockdevices": devices}).to_string();
        let inventory = Inventory::parse(json.as_bytes(), BTreeMap::new(), BTreeSet::new()).unwrap();
        let part = PartReport::new(&Role::Root, esp(1), inventory.find(&esp(1)).unwrap());
        (part.filesystem, part.uuid, part.node, part.bytes)
    });
    let text = |text: &str| Some(text.to_owned());
    let (node, bytes) = (text("/dev/sdb2"), Some(4096));
    let plain = line("sdb2", "sdb", "part", "ext4", "a-root", Some(id));
    assert_eq!(found(vec![plain]), (text("ext4"), text("a-root"), node.clone(), bytes));
    let container = line("sdb2", "sdb", "part", "crypto_LUKS", "a-container", Some(id));
    assert_eq!(found(vec![container.clone()]), (text("crypto_LUKS"), None, node.clone(), bytes));
    let inside = line("dm-0", "sdb2", "crypt", "ext4", "a-root", None);
    assert_eq!(found(vec![container, inside]), (text("ext4"), text("a-root"), node, bytes), "the node is the partition's");
    assert_eq!(found(vec![]), (None, None, None, None));
}
