//! The needles of a search: the identifiers of other disks' partitions, each with its replacement.

use std::collections::BTreeMap;

use crate::base::types::{DiskName, Role};
use crate::names::ids::{DiskIds, PartIds};

/// The kinds of identifiers that have a tag (`UUID=`) and a directory below /dev/disk.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum IdKind {
    Uuid,
    PartUuid,
    Label,
    PartLabel,
}

impl IdKind {
    pub(super) fn tag(self) -> &'static str {
        match self {
            Self::Uuid => "UUID",
            Self::PartUuid => "PARTUUID",
            Self::Label => "LABEL",
            Self::PartLabel => "PARTLABEL",
        }
    }

    pub(super) fn dir(self) -> &'static str {
        match self {
            Self::Uuid => "by-uuid/",
            Self::PartUuid => "by-partuuid/",
            Self::Label => "by-label/",
            Self::PartLabel => "by-partlabel/",
        }
    }
}

/// The form in which a value is written, and by which it is recognised.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Form {
    /// The value alone.
    Bare,
    /// `TAG=`, perhaps with a quote after it.
    Tag(IdKind),
    /// `by-KIND/`.
    Dir(IdKind),
    /// The value is a path.
    Path,
    /// The value is the escaped name of a unit without its suffix.
    Unit,
    /// The value is written byte for byte, whatever is around it, except that `-` matches `_`.
    Exact,
}

/// An identifier of another disk.
#[derive(Clone, Debug)]
pub(super) struct Needle {
    pub(super) form: Form,
    pub(super) value: Vec<u8>,
    pub(super) any_case: bool,
    /// The replacement; None if the target has no partition of that role.
    pub(super) new: Option<(IdKind, String)>,
    /// The text for people.
    pub(super) shown: String,
}

/// The needles for all partitions of the other disks.
pub(super) fn all(target: &DiskIds, others: Vec<&DiskIds>) -> Vec<Needle> {
    let mut needles = Needles { target, others, list: Vec::new() };
    needles.add_uuids();
    needles.add_labels(IdKind::Label, |ids| ids.label.clone(), |ids| ids.uuid.clone());
    let container = |ids: &PartIds| ids.container.clone();
    needles.add_labels(IdKind::Label, |ids| container(ids)?.label, |ids| container(ids)?.uuid);
    needles.add_labels(IdKind::PartLabel, |ids| ids.partlabel.clone(), |_| None);
    needles.add_paths();
    needles.list
}

struct Needles<'a> {
    target: &'a DiskIds,
    others: Vec<&'a DiskIds>,
    list: Vec<Needle>,
}

impl<'a> Needles<'a> {
    fn parts(&self) -> Vec<(DiskName, &'a Role, &'a PartIds)> {
        self.others.iter().flat_map(|disk| disk.parts.iter().map(|(role, ids)| (disk.name, role, ids))).collect()
    }

    fn push(&mut self, form: Form, value: impl Into<Vec<u8>>, any_case: bool, new: Option<(IdKind, String)>, shown: &str) {
        let value = value.into();
        if !value.is_empty() {
            self.list.push(Needle { form, value, any_case, new, shown: shown.to_owned() });
        }
    }

    fn add_uuids(&mut self) {
        for (disk, role, ids) in self.parts() {
            let own = self.target.parts.get(role);
            let pair = |of: fn(&PartIds) -> Option<String>| {
                let own = own.and_then(of).filter(|u| !u.is_empty());
                of(ids).map(|u| (IdKind::Uuid, u, own))
            };
            let uuid = pair(|ids| ids.uuid.clone());
            let container = pair(|ids| ids.container.as_ref()?.uuid.clone());
            let partuuid = (IdKind::PartUuid, ids.partuuid.to_string(), own.map(|own| own.partuuid.to_string()));
            for (kind, value, new) in uuid.into_iter().chain(container).chain([partuuid]) {
                let shown = format!("{}={} ({role} of {disk})", kind.tag(), value.escape_debug());
                if is_long_uuid(&value) {
                    let bare: String = value.chars().filter(|c| *c != '-').collect();
                    let bare_new = new.as_ref().map(|n| (kind, n.chars().filter(|c| *c != '-').collect()));
                    self.push(Form::Bare, bare, true, bare_new, &shown);
                    self.push(Form::Bare, value, true, new.map(|n| (kind, n)), &shown);
                } else {
                    let new = new.map(|n| (kind, n));
                    self.push(Form::Tag(kind), value.clone(), true, new.clone(), &shown);
                    self.push(Form::Dir(kind), value, true, new, &shown);
                }
            }
        }
    }

    /// Adds labels of one kind. If the target has no label that can be used, the replacement is its UUID, or else its PARTUUID.
    fn add_labels(
        &mut self,
        kind: IdKind,
        label: impl Fn(&PartIds) -> Option<String>,
        uuid: impl Fn(&PartIds) -> Option<String>,
    ) {
        let label = |ids: &PartIds| label(ids).filter(|l| !l.is_empty());
        let parts = self.parts();
        let mut owners: BTreeMap<String, Vec<(DiskName, &Role)>> = BTreeMap::new();
        for (disk, role, ids) in &parts {
            if let Some(label) = label(ids) {
                owners.entry(label).or_default().push((*disk, *role));
            }
        }
        let own: Vec<String> = self.target.parts.values().filter_map(&label).collect();
        for (value, owners) in &owners {
            let new = one_role(owners).and_then(|role| {
                let ids = self.target.parts.get(role)?;
                let fit = |l: &String| {
                    own.iter().filter(|o| *o == l).count() == 1
                        && plain(l)
                        && !parts.iter().any(|p| label(p.2).as_ref() == Some(l))
                };
                let uuid = uuid(ids).filter(|u| plain(u));
                let partuuid = (IdKind::PartUuid, ids.partuuid.to_string());
                Some(label(ids).filter(fit).map(|l| (kind, l)).or(uuid.map(|u| (IdKind::Uuid, u))).unwrap_or(partuuid))
            });
            let mut shown = format!("{}={} ({}", kind.tag(), value.escape_debug(), all_of(owners));
            shown.push_str(
                if own.contains(value) { format!(", but {} has it too)", self.target.name) } else { ")".into() }.as_str(),
            );
            let encoded = udev_encode(value);
            for value in [Some(value.clone()), Some(encoded.clone()).filter(|e| e != value)].into_iter().flatten() {
                self.push(Form::Tag(kind), value.clone(), false, new.clone(), &shown);
                self.push(Form::Dir(kind), value, false, new.clone(), &shown);
            }
        }
    }

    fn add_paths(&mut self) {
        let mut owners: BTreeMap<&str, Vec<(DiskName, &Role)>> = BTreeMap::new();
        for (disk, role, ids) in self.parts() {
            for path in &ids.paths {
                owners.entry(path).or_default().push((disk, role));
            }
        }
        let by_kind = ["by-uuid/", "by-partuuid/", "by-label/", "by-partlabel/"];
        for (path, owners) in owners {
            let known = path.strip_prefix("/dev/disk/").is_some_and(|rest| by_kind.iter().any(|kind| rest.starts_with(kind)));
            if known || !path.starts_with("/dev/") || self.target.parts.values().any(|own| own.paths.contains(path)) {
                continue;
            }
            let new = one_role(&owners).and_then(|role| self.target.parts.get(role));
            let new = new.map(|own| (IdKind::PartUuid, own.partuuid.to_string()));
            let shown = format!("{} ({})", path.escape_debug(), all_of(&owners));
            self.push(Form::Path, path, false, new.clone(), &shown);
            self.push(Form::Unit, libsystemd::unit::escape_path(path), false, new, &shown);
        }
    }
}

/// The role of all owners, or None if they differ.
fn one_role<'r>(owners: &[(DiskName, &'r Role)]) -> Option<&'r Role> {
    let (_, role) = owners.first()?;
    owners.iter().all(|(_, r)| r == role).then_some(*role)
}

fn all_of(owners: &[(DiskName, &Role)]) -> String {
    owners.iter().map(|(disk, role)| format!("{role} of {disk}")).collect::<Vec<_>>().join(", ")
}

fn is_long_uuid(text: &str) -> bool {
    text.len() == 36 && uuid::Uuid::try_parse(text).is_ok()
}

/// Whether a label can be written everywhere without quotes or escapes.
fn plain(label: &str) -> bool {
    label.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-' | b'.'))
}

/// A label as in the names of udev's links: a character outside udev's list becomes `\xHH`.
fn udev_encode(label: &str) -> String {
    let mut out = String::new();
    for c in label.chars() {
        if c.is_ascii_alphanumeric() || !c.is_ascii() || "#+-.:=@_".contains(c) {
            out.push(c);
        } else {
            out.push_str(&format!("\\x{:02x}", u32::from(c)));
        }
    }
    out
}
