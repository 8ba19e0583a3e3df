//! The results of the last sync and the last verification of each spare, in a file on the booted disk.
//!
//! The file names the disk that wrote it, and is ignored on any other disk. A sync doesn't copy it, even if /var is on the root of each disk.
//! A spare may have a file of its own, from a time when it was booted; a sync removes that, because the disks have changed since. The file has
//! a directory of its own, because the directory's time of change must not count as a difference between two roots.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::base::clock::now;
use crate::base::exit::Exit;
use crate::base::fault::{Code, Fault};
use crate::base::refusal::Refused;
use crate::base::root::Root;
use crate::base::types::{DiskName, PartUuid, Role};
use crate::boot::files::{BootFiles, Class, classify, fold};
use crate::boot::wanted::WantedFile;
use crate::conf::{Config, Disk};
use crate::write::below::Below;
use crate::write::state;

/// The directory of the files that are not copied to other disks; see [`crate::copy::rules`].
pub const DIRECTORY: &str = "/var/lib/dualroot/own";
const FILE: &str = "/var/lib/dualroot/own/status.json";
const NAME: &str = "status.json";

/// The state of all spares together: that of the worst one.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Standing {
    /// Every spare boots.
    Whole,
    /// A spare is missing.
    Absent,
    /// A precondition is not met, so nothing was done.
    Refused,
    /// A spare would not boot, or it is unknown whether it would.
    Broken,
}

impl Standing {
    /// The exit status of a program that found this state.
    pub fn exit(self) -> Exit {
        match self {
            Self::Whole => Exit::Good,
            Self::Broken => Exit::Failed,
            Self::Refused => Exit::Refused,
            Self::Absent => Exit::Absent,
        }
    }
}

/// The result of a sync of a spare.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "result", content = "why", rename_all = "kebab-case")]
pub enum Outcome {
    /// The spare boots.
    Boots,
    /// The spare would not boot, because of these faults.
    WouldNotBoot(Vec<Fault>),
    /// The sync failed, with this message.
    Failed(String),
    /// The sync was refused with this message, and nothing was written.
    Refused(String),
}

/// The end of a sync of a spare.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct End {
    /// The time, in seconds since 1970.
    pub at: u64,
    /// The result.
    #[serde(flatten)]
    pub outcome: Outcome,
    /// The failure mode for which the sync was refused, if that has a number.
    #[serde(default)]
    pub code: Option<Code>,
}

/// The boot files of a spare as the sync read them when it found that the spare boots.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Proof {
    /// The time, in seconds since 1970.
    pub at: u64,
    /// The source and the time of the spare's last sync, from the record on its ESP.
    pub synced: Option<(DiskName, u64)>,
    /// The BLAKE3 hashes of its boot files, in hexadecimal, by the partition and the path in it.
    pub files: BTreeMap<Role, BTreeMap<String, String>>,
}

/// The result of a verification, which reads a disk's boot files from the medium.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Reading {
    /// The time, in seconds since 1970.
    pub at: u64,
    /// A fault for each boot file that differs or can't be read.
    pub faults: Vec<Fault>,
}

/// The stored results about a spare.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Seen {
    /// Its ESP, which tells it from another disk with the same name.
    pub esp: PartUuid,
    /// The end of the last sync that found it present.
    pub last: Option<End>,
    /// The time at which the last sync began to write it, if that sync has not ended.
    pub begun: Option<u64>,
    /// The time of the first sync that found it missing, if none has found it since.
    pub absent_since: Option<u64>,
    /// Its boot files after the last sync that wrote it, if that left it bootable.
    pub proof: Option<Proof>,
    /// The last verification; a later sync that succeeds removes its faults.
    pub read: Option<Reading>,
}

/// A section of the configuration, and the results about a disk that it names at times: two disks may take turns in one section.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
struct Slot {
    name: DiskName,
    disk: Seen,
}

/// The largest number of disks whose results are kept while no section names them, such as spares that are stored elsewhere.
const MOST_AWAY: usize = 32;

/// The contents of the file: the results that the booted disk stores.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Status {
    /// The disk that wrote the file.
    disk: DiskName,
    /// Its ESP.
    esp: PartUuid,
    /// The results about the disks that the configuration names.
    spares: BTreeMap<DiskName, Seen>,
    /// The results about disks whose sections name other disks now; the one that is away longest comes first.
    #[serde(default)]
    away: Vec<Slot>,
    /// The last verification of the booted disk itself.
    pub own: Option<Reading>,
    /// The spares whose results this program has changed.
    #[serde(skip)]
    changed: BTreeSet<DiskName>,
    /// Whether this program refused a sync because another disk may be newer.
    #[serde(skip)]
    may_be_older: bool,
}

impl Status {
    /// No results.
    pub fn new(booted: &Disk) -> Self {
        let (disk, esp) = (booted.name, booted.esp());
        Self { disk, esp, spares: BTreeMap::new(), away: Vec::new(), own: None, changed: BTreeSet::new(), may_be_older: false }
    }

    /// Loads the results. A file that another disk wrote, or that can't be parsed, counts as empty, because the next sync makes new results.
    /// Those about a disk whose section names another disk now are kept until the section names it again.
    ///
    /// # Errors
    /// A file that exists but can't be read.
    pub fn load(root: &Root, config: &Config, booted: &Disk) -> Result<Self> {
        let bytes = root.read_opt(FILE).with_context(|| format!("{FILE} can't be read"))?.unwrap_or_default();
        Ok(Self::parse(&bytes, config, booted))
    }

    fn parse(bytes: &[u8], config: &Config, booted: &Disk) -> Self {
        let Ok(mut status) = serde_json::from_slice::<Self>(bytes) else { return Self::new(booted) };
        if (status.disk, status.esp) != (booted.name, booted.esp()) {
            return Self::new(booted);
        }
        status.sort_by_sections(config);
        status
    }

    /// Makes `spares` the disks that the configuration names now, and `away` all others.
    fn sort_by_sections(&mut self, config: &Config) {
        let is_named = |name: DiskName, seen: &Seen| config.disks.iter().any(|disk| (disk.name, disk.esp()) == (name, seen.esp));
        let all = std::mem::take(&mut self.spares).into_iter().map(|(name, disk)| Slot { name, disk });
        let all = std::mem::take(&mut self.away).into_iter().chain(all);
        let (named, away): (Vec<Slot>, Vec<Slot>) = all.partition(|slot| is_named(slot.name, &slot.disk));
        self.spares = named.into_iter().map(|slot| (slot.name, slot.disk)).collect();
        let too_many = away.len().saturating_sub(MOST_AWAY);
        self.away = away.into_iter().skip(too_many).collect();
    }

    /// Saves the results; everybody may read the file.
    ///
    /// # Errors
    /// A file system that can't be written.
    pub fn save(&self) -> Result<()> {
        self.save_in(&state::open(Path::new(DIRECTORY))?)
    }

    fn save_in(&self, own: &Below) -> Result<()> {
        let mut bytes = serde_json::to_vec(self)?;
        bytes.push(b'\n');
        own.publish(NAME, bytes)
    }

    /// The results about a spare.
    pub fn of(&self, spare: DiskName) -> Option<&Seen> {
        self.spares.get(&spare)
    }

    fn seen(&mut self, spare: &Disk) -> &mut Seen {
        self.changed.insert(spare.name);
        let new = Seen { esp: spare.esp(), last: None, begun: None, absent_since: None, proof: None, read: None };
        self.spares.entry(spare.name).or_insert(new)
    }

    /// Notes that the spare is missing. Its other results stay.
    pub fn absent(&mut self, spare: &Disk) {
        self.seen(spare).absent_since.get_or_insert(now());
    }

    /// Notes that a sync begins to write the spare, so that earlier results are no longer valid.
    pub fn begun(&mut self, spare: &Disk) {
        let seen = self.seen(spare);
        (seen.begun, seen.absent_since, seen.proof) = (Some(now()), None, None);
    }

    /// Notes that a sync has written the spare and read it again: the faults, and the wanted and the found files of its boot partitions.
    /// `synced` is the source and the time of this sync, from the record on the spare's ESP.
    pub fn ended(
        &mut self,
        spare: &Disk,
        faults: &[Fault],
        wanted: &BTreeMap<Role, Vec<WantedFile>>,
        found: &BTreeMap<Role, BootFiles>,
        synced: Option<(DiskName, u64)>,
    ) {
        let at = now();
        let hashes = |role: &Role, files: &BootFiles| {
            let ours: BTreeSet<String> = wanted.get(role).into_iter().flatten().map(|file| fold(&file.path)).collect();
            // A boot changes some files of the disk itself, and other systems change theirs: these are not verified.
            let lasting = files.files.iter().filter(|(key, file)| ours.contains(*key) && classify(&file.path) != Class::Local);
            lasting.map(|(_, file)| (file.path.clone(), file.hash.to_hex().to_string())).collect()
        };
        let files = found.iter().map(|(role, files)| (role.clone(), hashes(role, files))).collect();
        let seen = self.seen(spare);
        (seen.begun, seen.absent_since) = (None, None);
        if faults.is_empty() {
            seen.last = Some(End { at, outcome: Outcome::Boots, code: None });
            seen.proof = Some(Proof { at, synced, files });
            // The sync has read all files, and written damaged ones again.
            seen.read.iter_mut().for_each(|read| read.faults.clear());
        } else {
            seen.last = Some(End { at, outcome: Outcome::WouldNotBoot(faults.to_vec()), code: None });
        }
    }

    /// Notes that a sync of the spare failed or was refused.
    pub fn stopped(&mut self, spare: &Disk, error: &anyhow::Error) {
        self.note_age(error);
        let text = format!("{error:#}");
        let refused = error.downcast_ref::<Refused>();
        let outcome = if refused.is_some() { Outcome::Refused(text) } else { Outcome::Failed(text) };
        let code = refused.and_then(Refused::fault).map(|fault| fault.code);
        let seen = self.seen(spare);
        (seen.begun, seen.absent_since) = (None, None);
        seen.last = Some(End { at: now(), outcome, code });
    }

    /// Notes that a run failed or was refused, for each of these spares that has no result of this run or was being written.
    pub fn stopped_before<'a>(&mut self, spares: impl IntoIterator<Item = &'a Disk>, error: &anyhow::Error) {
        self.note_age(error);
        for spare in spares {
            if !self.changed.contains(&spare.name) || self.of(spare.name).is_some_and(|seen| seen.begun.is_some()) {
                self.stopped(spare, error);
            }
        }
    }

    fn note_age(&mut self, error: &anyhow::Error) {
        self.may_be_older |= error.downcast_ref::<Refused>().is_some_and(Refused::is_about_age);
    }

    /// Whether this program found that another disk may be newer than the booted one, even if other errors followed.
    pub fn may_be_older(&self) -> bool {
        self.may_be_older
    }

    /// Notes the result of a verification of the spare.
    pub fn read(&mut self, spare: &Disk, faults: Vec<Fault>) {
        self.seen(spare).read = Some(Reading { at: now(), faults });
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    use super::*;
    use crate::base::refusal::{refused, refused_for_age};
    use crate::write::change::Content;

    pub(crate) const PAIR: &str = "[disk0]\nesp=aaaaaaaa-0000-4000-8000-000000000001\nroot=aaaaaaaa-0000-4000-8000-000000000002\n\
        [disk1]\nesp=bbbbbbbb-0000-4000-8000-000000000001\nroot=bbbbbbbb-0000-4000-8000-000000000002\n";

    pub(crate) fn config(text: &str) -> Config {
        Config::parse(&[("dualroot.conf".into(), text.into())]).unwrap().unwrap()
    }

    fn three() -> String {
        format!("{PAIR}[disk2]\nesp=dddddddd-0000-4000-8000-000000000001\nroot=dddddddd-0000-4000-8000-000000000002\n")
    }

    /// The wanted files of a spare's ESP.
    fn wanted() -> BTreeMap<Role, Vec<WantedFile>> {
        let file = |path: &str| WantedFile { path: path.to_owned(), content: Content::Bytes(vec![]), hash: blake3::hash(b"") };
        BTreeMap::from([(Role::Esp, ["loader/entries/a.conf", "linux", "loader/random-seed"].map(file).into())])
    }

    /// The files of a spare's ESP with a menu entry and another system's files.
    fn found() -> BTreeMap<Role, BootFiles> {
        let tmp = tempfile::tempdir().unwrap();
        for dir in ["loader/entries", "EFI/Microsoft"] {
            fs::create_dir_all(tmp.path().join(dir)).unwrap();
        }
        for path in ["loader/entries/a.conf", "Linux", "loader/random-seed", "EFI/Microsoft/BCD"] {
            fs::write(tmp.path().join(path), path).unwrap();
        }
        BTreeMap::from([(Role::Esp, BootFiles::scan(&Below::open(tmp.path()).unwrap()).unwrap())])
    }

    fn next(status: &Status, config: &Config, booted: usize) -> Status {
        Status::parse(&serde_json::to_vec(status).unwrap(), config, &config.disks[booted])
    }

    #[test]
    fn the_results_of_one_disk_are_ignored_on_another() {
        let config = config(PAIR);
        let (booted, spare) = (&config.disks[0], &config.disks[1]);
        let mut status = Status::new(booted);
        status.ended(spare, &[], &wanted(), &found(), Some((booted.name, 7)));
        let kept = next(&status, &config, 0);
        let seen = kept.of(spare.name).unwrap();
        assert_eq!(seen.last.as_ref().unwrap().outcome, Outcome::Boots);
        let files: Vec<_> = seen.proof.as_ref().unwrap().files[&Role::Esp].keys().collect();
        assert_eq!(
            files,
            ["Linux", "loader/entries/a.conf"],
            "by the names on the spare, without the seed and another system's files"
        );
        // After the failover.
        assert_eq!(next(&status, &config, 1), Status::new(spare));
        // Another disk takes the place of disk0, or of disk1.
        let replaced = |from: &str, to: &str| super::tests::config(&PAIR.replace(from, to));
        assert!(next(&status, &replaced("aaaaaaaa", "cccccccc"), 0).of(spare.name).is_none());
        assert!(next(&status, &replaced("bbbbbbbb", "cccccccc"), 0).of(spare.name).is_none());
        for damaged in ["", "{", "[]", "{\"disk\":\"disk0\"}", "\u{0}"] {
            assert_eq!(Status::parse(damaged.as_bytes(), &config, booted), Status::new(booted), "{damaged}");
        }
    }

    #[test]
    fn results_are_kept_while_a_section_names_another_disk() {
        let config = config(PAIR);
        let (booted, spare) = (&config.disks[0], &config.disks[1]);
        let other = super::tests::config(&PAIR.replace("bbbbbbbb", "cccccccc"));
        let mut status = Status::new(booted);
        status.ended(spare, &[], &wanted(), &found(), Some((booted.name, 7)));
        let mut status = next(&status, &other, 0);
        assert!(status.of(spare.name).is_none(), "the section names another disk");
        status.absent(&other.disks[1]);
        let again = next(&next(&status, &other, 0), &config, 0);
        assert!(again.of(spare.name).is_some_and(|seen| seen.esp == spare.esp() && seen.proof.is_some()));
        let other = next(&again, &other, 0);
        assert!(other.of(spare.name).is_some_and(|seen| seen.absent_since.is_some()));
    }

    #[test]
    fn the_file_of_an_older_version_is_read() {
        let config = config(PAIR);
        let (booted, spare) = (&config.disks[0], &config.disks[1]);
        let older = format!(
            r#"{{"disk":"disk0","esp":"{}","own":{{"at":5,"faults":["esp (/boot): linux can't be read: EIO"]}},
                "spares":{{"disk1":{{"esp":"{}","last":{{"at":7,"result":"would-not-boot","why":["esp: linux is missing"]}},
                "begun":null,"absent_since":null,"proof":null,"read":null}}}}}}"#,
            booted.esp(),
            spare.esp()
        );
        let status = Status::parse(older.as_bytes(), &config, booted);
        let faults = vec![Fault::new(Code::Unknown, "esp: linux is missing")];
        let last = End { at: 7, outcome: Outcome::WouldNotBoot(faults), code: None };
        assert_eq!(status.of(spare.name).unwrap().last, Some(last));
        assert_eq!(status.own.unwrap().faults.len(), 1);
    }

    #[test]
    fn a_spare_that_is_being_written_has_no_proof() {
        let config = config(PAIR);
        let (booted, spare) = (&config.disks[0], &config.disks[1]);
        let mut status = Status::new(booted);
        status.ended(spare, &[], &wanted(), &found(), None);
        let of = |status: &Status| status.of(spare.name).cloned().unwrap();
        let mut refusal = next(&status, &config, 0);
        refusal.stopped(spare, &refused("it is newer").context("disk1"));
        assert!(matches!(of(&refusal).last.unwrap().outcome, Outcome::Refused(why) if why == "disk1: it is newer"));
        assert!(of(&refusal).proof.is_some(), "nothing was written");
        let mut interrupted = next(&status, &config, 0);
        interrupted.begun(spare);
        assert!(of(&interrupted).proof.is_none() && of(&interrupted).begun.is_some());
        interrupted.stopped(spare, &anyhow::anyhow!("EIO"));
        assert!(of(&interrupted).proof.is_none() && of(&interrupted).begun.is_none());
        assert!(matches!(of(&interrupted).last.unwrap().outcome, Outcome::Failed(why) if why == "EIO"));
        // The spare is missing: its results stay, until a sync finds it again.
        status.absent(spare);
        let since = of(&status).absent_since;
        status.absent(spare);
        assert!(of(&status).absent_since == since && since.is_some() && of(&status).proof.is_some());
        let faults = [Fault::new(Code::F09, "no entry")];
        status.ended(spare, &faults, &wanted(), &found(), None);
        assert!(of(&status).absent_since.is_none());
        assert!(matches!(of(&status).last.unwrap().outcome, Outcome::WouldNotBoot(why) if why == faults));
    }

    #[test]
    fn a_run_that_ends_early_is_noted_for_every_spare_it_did_not_reach() {
        let config = config(&three());
        let [booted, first, second] = &config.disks[..] else { panic!() };
        let mut status = Status::new(booted);
        status.ended(first, &[], &wanted(), &found(), None);
        status.begun(second);
        status.stopped_before([first, second], &anyhow::anyhow!("busy"));
        assert_eq!(status.of(first.name).unwrap().last.as_ref().unwrap().outcome, Outcome::Boots);
        assert_eq!(status.of(second.name).unwrap().last.as_ref().unwrap().outcome, Outcome::Failed("busy".into()));
        let mut later = next(&status, &config, 0);
        later.stopped_before([first, second], &anyhow::anyhow!("busy again"));
        assert_eq!(later.of(first.name).unwrap().last.as_ref().unwrap().outcome, Outcome::Failed("busy again".into()));
        assert!(later.of(first.name).unwrap().proof.is_some(), "it was not written");
    }

    #[test]
    fn f07_a_newer_disk_is_not_hidden_by_another_error() {
        let config = config(&three());
        let [booted, first, second] = &config.disks[..] else { panic!() };
        let newer = || refused_for_age(first.name, "it is newer").context("disk1");
        let others = || [anyhow::anyhow!("EIO"), refused("it is not mounted"), anyhow::anyhow!("EIO").context("disk2")];
        for other in others() {
            let mut status = Status::new(booted);
            status.stopped(second, &other);
            assert!(!status.may_be_older());
            status.stopped(first, &newer());
            assert!(status.may_be_older());
            assert_eq!(status.of(first.name).unwrap().last.as_ref().unwrap().code, Some(Code::F07));
            assert_eq!(status.of(second.name).unwrap().last.as_ref().unwrap().code, None, "{other:#}");
            status.stopped(second, &other);
            assert!(status.may_be_older(), "{other:#}");
            assert!(!next(&status, &config, 0).may_be_older(), "the next sync finds that itself");
        }
        // The booted disk's own record, after all spares have a result.
        let mut status = Status::new(booted);
        status.stopped(first, &refused("no"));
        status.stopped_before([first], &newer());
        assert!(status.may_be_older());
    }

    #[test]
    fn a_sync_removes_the_faults_of_a_verification() {
        let config = config(PAIR);
        let (booted, spare) = (&config.disks[0], &config.disks[1]);
        let mut status = Status::new(booted);
        status.ended(spare, &[], &wanted(), &found(), None);
        let faults = vec![Fault::new(Code::F37, "esp: Linux differs")];
        status.read(spare, faults.clone());
        let kept = next(&status, &config, 0);
        assert_eq!(kept.of(spare.name).unwrap().read.as_ref().unwrap().faults, faults);
        status.stopped(spare, &anyhow::anyhow!("EIO"));
        assert!(!status.of(spare.name).unwrap().read.as_ref().unwrap().faults.is_empty());
        status.ended(spare, &[], &wanted(), &found(), None);
        assert!(status.of(spare.name).unwrap().read.as_ref().unwrap().faults.is_empty());
    }

    #[test]
    fn everybody_can_read_the_file_and_only_its_directory_gets_a_new_time() {
        let tmp = tempfile::tempdir().unwrap();
        let path = tmp.path().join(FILE.trim_start_matches('/'));
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        let (own, config) = (Below::open(path.parent().unwrap()).unwrap(), config(PAIR));
        let mut status = Status::new(&config.disks[0]);
        status.save_in(&own).unwrap();
        let parent = path.parent().unwrap().parent().unwrap();
        let time = fs::metadata(parent).unwrap().mtime_nsec();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        status.absent(&config.disks[1]);
        status.save_in(&own).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o644);
        assert_eq!(fs::metadata(parent).unwrap().mtime_nsec(), time);
        let loaded = Status::load(&Root::new(tmp.path()), &config, &config.disks[0]).unwrap();
        assert!(loaded.of(config.disks[1].name).unwrap().absent_since.is_some());
    }
}
