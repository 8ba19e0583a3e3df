//! What the last sync, and the last verification, found about each spare, as the booted disk remembers it.
//!
//! That is the booted disk's own knowledge about the others. It says whose it is, and nobody else believes it: where /var is on every
//! disk's root, the file isn't copied, and one that a spare has from a time when it was booted is removed by a sync, as it is about a
//! disk that has changed since. It lies in a directory of its own, whose time of change is no difference between two roots.

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

/// What is no other disk's business; see [`crate::copy::rules`].
pub const DIRECTORY: &str = "/var/lib/dualroot/own";
const FILE: &str = "/var/lib/dualroot/own/status.json";
const NAME: &str = "status.json";

/// How it stands with all spares. The worst of them counts.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Standing {
    /// Every spare boots.
    Whole,
    /// A spare isn't there.
    Absent,
    /// Something is not as it has to be, so that nothing was done.
    Refused,
    /// A spare would not boot, or nobody knows whether it would.
    Broken,
}

impl Standing {
    /// How a program ends that says so.
    pub fn exit(self) -> Exit {
        match self {
            Self::Whole => Exit::Good,
            Self::Broken => Exit::Failed,
            Self::Refused => Exit::Refused,
            Self::Absent => Exit::Absent,
        }
    }
}

/// How a sync of a spare ended.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "result", content = "why", rename_all = "kebab-case")]
pub enum Outcome {
    /// It boots.
    Boots,
    /// It would not boot, for these reasons.
    WouldNotBoot(Vec<Fault>),
    /// The sync failed.
    Failed(String),
    /// Nothing was written.
    Refused(String),
}

/// The end of a sync of a spare.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct End {
    /// When, in seconds since 1970.
    pub at: u64,
    /// How.
    #[serde(flatten)]
    pub outcome: Outcome,
    /// The failure mode that it was refused for, where that has a number.
    #[serde(default)]
    pub code: Option<Code>,
}

/// What a sync read in the end, when it found that the spare boots.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Proof {
    /// When, in seconds since 1970.
    pub at: u64,
    /// What the spare's own record says of the sync that it had last.
    pub synced: Option<(DiskName, u64)>,
    /// The BLAKE3 hashes of its boot files, in hexadecimal, by the partition and the path in it.
    pub files: BTreeMap<Role, BTreeMap<String, String>>,
}

/// What came of reading a disk's boot files again, from the medium.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Reading {
    /// When, in seconds since 1970.
    pub at: u64,
    /// Which of them were not what they should be.
    pub faults: Vec<Fault>,
}

/// What is known about a spare.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Seen {
    /// Its ESP: another disk of the same name is another disk.
    pub esp: PartUuid,
    /// How the last sync ended that found it there.
    pub last: Option<End>,
    /// When the sync began that was writing it last, if that has not ended.
    pub begun: Option<u64>,
    /// Since when no sync has found it.
    pub absent_since: Option<u64>,
    /// As it was left by the last sync that wrote it, if it boots since.
    pub proof: Option<Proof>,
    /// The last verification, since that.
    pub read: Option<Reading>,
}

/// A section of the configuration, and a disk that had its turn there. Its knowledge waits for the disk's next turn.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
struct Slot {
    name: DiskName,
    disk: Seen,
}

/// The number of disks that are remembered without a turn: the sections of a machine with several spares elsewhere.
const MOST_AWAY: usize = 32;

/// What the booted disk remembers.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Status {
    /// Who remembers.
    disk: DiskName,
    esp: PartUuid,
    /// The disks that the sections of the configuration name.
    spares: BTreeMap<DiskName, Seen>,
    /// Disks whose sections name other disks now, the longest away first.
    #[serde(default)]
    away: Vec<Slot>,
    /// The last verification of the booted disk itself.
    pub own: Option<Reading>,
    /// The spares that something was learnt about since it was loaded.
    #[serde(skip)]
    told: BTreeSet<DiskName>,
    /// Whether a sync has come to nothing since then because another disk may be newer.
    #[serde(skip)]
    may_be_older: bool,
}

impl Status {
    /// Nothing.
    pub fn new(booted: &Disk) -> Self {
        let (disk, esp) = (booted.name, booted.esp());
        Self { disk, esp, spares: BTreeMap::new(), away: Vec::new(), own: None, told: BTreeSet::new(), may_be_older: false }
    }

    /// Loads what the booted disk remembers. A file that another disk wrote, or that doesn't parse, counts as empty: the next sync finds
    /// it out again. Knowledge about a disk whose section names another disk now is kept for its next turn there.
    ///
    /// # Errors
    /// A file that is there but can't be read.
    pub fn load(root: &Root, config: &Config, booted: &Disk) -> Result<Self> {
        let bytes = root.read_opt(FILE).with_context(|| format!("{FILE} can't be read"))?.unwrap_or_default();
        Ok(Self::parse(&bytes, config, booted))
    }

    fn parse(bytes: &[u8], config: &Config, booted: &Disk) -> Self {
        let Ok(mut status) = serde_json::from_slice::<Self>(bytes) else { return Self::new(booted) };
        if (status.disk, status.esp) != (booted.name, booted.esp()) {
            return Self::new(booted);
        }
        status.take_turns(config);
        status
    }

    /// Lets the disks that the configuration names take the places of those that it named when this was saved.
    fn take_turns(&mut self, config: &Config) {
        let is_named = |name: DiskName, seen: &Seen| config.disks.iter().any(|disk| (disk.name, disk.esp()) == (name, seen.esp));
        let all = std::mem::take(&mut self.spares).into_iter().map(|(name, disk)| Slot { name, disk });
        let all = std::mem::take(&mut self.away).into_iter().chain(all);
        let (here, away): (Vec<Slot>, Vec<Slot>) = all.partition(|slot| is_named(slot.name, &slot.disk));
        self.spares = here.into_iter().map(|slot| (slot.name, slot.disk)).collect();
        let too_many = away.len().saturating_sub(MOST_AWAY);
        self.away = away.into_iter().skip(too_many).collect();
    }

    /// Keeps it, for everybody to read.
    ///
    /// # Errors
    /// A root that can't be written.
    pub fn save(&self) -> Result<()> {
        self.save_in(&state::open(Path::new(DIRECTORY))?)
    }

    fn save_in(&self, own: &Below) -> Result<()> {
        let mut bytes = serde_json::to_vec(self)?;
        bytes.push(b'\n');
        own.publish(NAME, bytes)
    }

    /// What is known about a spare.
    pub fn of(&self, spare: DiskName) -> Option<&Seen> {
        self.spares.get(&spare)
    }

    fn seen(&mut self, spare: &Disk) -> &mut Seen {
        self.told.insert(spare.name);
        let new = Seen { esp: spare.esp(), last: None, begun: None, absent_since: None, proof: None, read: None };
        self.spares.entry(spare.name).or_insert(new)
    }

    /// It isn't there. What was known about it stays.
    pub fn absent(&mut self, spare: &Disk) {
        self.seen(spare).absent_since.get_or_insert(now());
    }

    /// A sync is about to write it: from here on, it is not what it was.
    pub fn begun(&mut self, spare: &Disk) {
        let seen = self.seen(spare);
        (seen.begun, seen.absent_since, seen.proof) = (Some(now()), None, None);
    }

    /// A sync has written it, and read it again: why it would not boot, what is wanted on its boot partitions, and what was found there.
    /// `synced` is what its own record says now.
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
            // What the disk itself changes when it is booted says nothing, and what is another system's is its own business.
            let lasting = files.files.iter().filter(|(key, file)| ours.contains(*key) && classify(&file.path) != Class::Local);
            lasting.map(|(_, file)| (file.path.clone(), file.hash.to_hex().to_string())).collect()
        };
        let files = found.iter().map(|(role, files)| (role.clone(), hashes(role, files))).collect();
        let seen = self.seen(spare);
        (seen.begun, seen.absent_since) = (None, None);
        if faults.is_empty() {
            seen.last = Some(End { at, outcome: Outcome::Boots, code: None });
            seen.proof = Some(Proof { at, synced, files });
            // All of it was just read, and what was damaged has been written again.
            seen.read.iter_mut().for_each(|read| read.faults.clear());
        } else {
            seen.last = Some(End { at, outcome: Outcome::WouldNotBoot(faults.to_vec()), code: None });
        }
    }

    /// A sync of it came to nothing.
    pub fn stopped(&mut self, spare: &Disk, error: &anyhow::Error) {
        self.look_for_age(error);
        let text = format!("{error:#}");
        let refused = error.downcast_ref::<Refused>();
        let outcome = if refused.is_some() { Outcome::Refused(text) } else { Outcome::Failed(text) };
        let code = refused.and_then(Refused::fault).map(|fault| fault.code);
        let seen = self.seen(spare);
        (seen.begun, seen.absent_since) = (None, None);
        seen.last = Some(End { at: now(), outcome, code });
    }

    /// A run came to nothing before anything was learnt about these spares, or while they were written.
    pub fn stopped_before<'a>(&mut self, spares: impl IntoIterator<Item = &'a Disk>, error: &anyhow::Error) {
        self.look_for_age(error);
        for spare in spares {
            if !self.told.contains(&spare.name) || self.of(spare.name).is_some_and(|seen| seen.begun.is_some()) {
                self.stopped(spare, error);
            }
        }
    }

    fn look_for_age(&mut self, error: &anyhow::Error) {
        self.may_be_older |= error.downcast_ref::<Refused>().is_some_and(Refused::is_about_age);
    }

    /// Whether the booted disk may be older than another, as was found out since this was loaded; whatever else was wrong.
    pub fn may_be_older(&self) -> bool {
        self.may_be_older
    }

    /// A verification has read it.
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

    /// What is to be on the ESP of a spare.
    fn wanted() -> BTreeMap<Role, Vec<WantedFile>> {
        let file = |path: &str| WantedFile { path: path.to_owned(), content: Content::Bytes(vec![]), hash: blake3::hash(b"") };
        BTreeMap::from([(Role::Esp, ["loader/entries/a.conf", "linux", "loader/random-seed"].map(file).into())])
    }

    /// The ESP of a spare with an entry, and another system.
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
    fn what_one_disk_knows_of_another_is_nothing_that_the_other_knows() {
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
            "as they are written there, and not the seed, or what is another system's"
        );
        // After the failover.
        assert_eq!(next(&status, &config, 1), Status::new(spare));
        // Another disk that was put in as disk0, or as disk1.
        let replaced = |from: &str, to: &str| super::tests::config(&PAIR.replace(from, to));
        assert!(next(&status, &replaced("aaaaaaaa", "cccccccc"), 0).of(spare.name).is_none());
        assert!(next(&status, &replaced("bbbbbbbb", "cccccccc"), 0).of(spare.name).is_none());
        for damaged in ["", "{", "[]", "{\"disk\":\"disk0\"}", "\u{0}"] {
            assert_eq!(Status::parse(damaged.as_bytes(), &config, booted), Status::new(booted), "{damaged}");
        }
    }

    #[test]
    fn a_disk_is_known_when_its_turn_comes_again() {
        let config = config(PAIR);
        let (booted, spare) = (&config.disks[0], &config.disks[1]);
        let other = super::tests::config(&PAIR.replace("bbbbbbbb", "cccccccc"));
        let mut status = Status::new(booted);
        status.ended(spare, &[], &wanted(), &found(), Some((booted.name, 7)));
        let mut status = next(&status, &other, 0);
        assert!(status.of(spare.name).is_none(), "another disk is in that slot");
        status.absent(&other.disks[1]);
        let again = next(&next(&status, &other, 0), &config, 0);
        assert!(again.of(spare.name).is_some_and(|seen| seen.esp == spare.esp() && seen.proof.is_some()));
        let other = next(&again, &other, 0);
        assert!(other.of(spare.name).is_some_and(|seen| seen.absent_since.is_some()));
    }

    #[test]
    fn what_an_older_version_remembers_is_read() {
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
    fn what_is_being_written_has_no_proof() {
        let config = config(PAIR);
        let (booted, spare) = (&config.disks[0], &config.disks[1]);
        let mut status = Status::new(booted);
        status.ended(spare, &[], &wanted(), &found(), None);
        let of = |status: &Status| status.of(spare.name).cloned().unwrap();
        let mut refusal = next(&status, &config, 0);
        refusal.stopped(spare, &refused("it is newer").context("disk1"));
        assert!(matches!(of(&refusal).last.unwrap().outcome, Outcome::Refused(why) if why == "disk1: it is newer"));
        assert!(of(&refusal).proof.is_some(), "nothing was written");
        let mut cut = next(&status, &config, 0);
        cut.begun(spare);
        assert!(of(&cut).proof.is_none() && of(&cut).begun.is_some());
        cut.stopped(spare, &anyhow::anyhow!("EIO"));
        assert!(of(&cut).proof.is_none() && of(&cut).begun.is_none());
        assert!(matches!(of(&cut).last.unwrap().outcome, Outcome::Failed(why) if why == "EIO"));
        // It goes, and what was known stays, but not after it has come back.
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
    fn a_run_that_never_got_to_a_spare_says_so() {
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
    fn f07_that_a_disk_may_be_newer_is_not_hidden_by_another_error() {
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
            assert!(!next(&status, &config, 0).may_be_older(), "that is for the next sync to find out");
        }
        // The booted disk's own record, after all spares were told of.
        let mut status = Status::new(booted);
        status.stopped(first, &refused("no"));
        status.stopped_before([first], &newer());
        assert!(status.may_be_older());
    }

    #[test]
    fn a_sync_makes_up_for_what_a_verification_found() {
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
    fn everybody_can_read_it_and_its_directory_alone_has_a_new_time() {
        let tmp = tempfile::tempdir().unwrap();
        let path = tmp.path().join(FILE.trim_start_matches('/'));
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        let (own, config) = (Below::open(path.parent().unwrap()).unwrap(), config(PAIR));
        let mut status = Status::new(&config.disks[0]);
        status.save_in(&own).unwrap();
        let beside = path.parent().unwrap().parent().unwrap();
        let time = fs::metadata(beside).unwrap().mtime_nsec();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        status.absent(&config.disks[1]);
        status.save_in(&own).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o644);
        assert_eq!(fs::metadata(beside).unwrap().mtime_nsec(), time);
        let loaded = Status::load(&Root::new(tmp.path()), &config, &config.disks[0]).unwrap();
        assert!(loaded.of(config.disks[1].name).unwrap().absent_since.is_some());
    }
}
