//! rsync's filter rules for a tree.

use crate::names::files::Rewritten;

/// rsync filter rules for files that are never copied, with paths of the running system. The rules of `exclude=` come after these, and
/// before [`USUALLY`], so that they can include again what [`USUALLY`] excludes.
const ALWAYS: [&str; 10] = [
    "- /mnt/root[0-9]*/",
    "- /dev/*",
    "- /proc/*",
    "- /sys/*",
    "- /run/*",
    "- /tmp/*",
    "- /lost+found",
    "- /var/lib/systemd/random-seed",
    // Not copied, and removed from the spare: see crate::pair::status.
    "H /var/lib/dualroot/own/",
    "- .dualroot-*",
];
/// Rules for files that are not copied, unless `exclude=` includes them.
const USUALLY: [&str; 9] = [
    "- /var/cache/apt/*.bin",
    "- /var/cache/apt/archives/*.deb",
    "- /var/cache/apt/archives/partial/*",
    "- /var/cache/pacman/pkg/*",
    "- /var/cache/dnf/*",
    "- /var/cache/libdnf5/*",
    "- /var/cache/zypp/*",
    "- /var/tmp/systemd-private-*",
    "- /var/lib/systemd/coredump/*",
];
/// See [`OldModules::Stay`].
const OLD_MODULES: [&str; 2] = ["P /usr/lib/modules/*", "P /lib/modules/*"];

/// The treatment of modules of kernels that the booted disk doesn't have.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum OldModules {
    /// They stay until the spare's boot partitions don't need them any more.
    Stay,
    /// They are removed by the copy: an older generation of the root has its own.
    Go,
}

/// The rules for the tree that is mounted at `at` in the running system (`""` for the root). `exclude` are rules of the configuration,
/// and `files` are written separately.
pub fn all(at: &str, exclude: &[String], files: &[Rewritten], old: OldModules) -> Vec<String> {
    let strings = |rules: &[&str]| rules.iter().map(|rule| (*rule).to_owned()).collect::<Vec<_>>();
    let separate = files.iter().map(|file| format!("- {}", escape(&file.path)));
    let user = exclude.iter().map(|rule| if has_prefix(rule) { rule.clone() } else { format!("- {rule}") });
    let modules = strings(if old == OldModules::Stay { &OLD_MODULES } else { &[] });
    let rules = strings(&ALWAYS).into_iter().chain(separate).chain(user).chain(strings(&USUALLY)).chain(modules);
    rules.filter_map(|rule| reanchor(&rule, at)).collect()
}

/// Whether a rule of `exclude=` is more than a pattern (rsync(1), FILTER RULES).
pub(crate) fn has_prefix(rule: &str) -> bool {
    rule.split_once(' ').is_some_and(|(op, _)| {
        let short = op.split(',').next().unwrap_or_default();
        matches!(short, "-" | "+" | "P" | "R" | "H" | "S" | "exclude" | "include" | "hide" | "show" | "protect" | "risk")
    })
}

/// A pattern that matches only this path. In a path without wildcards, rsync takes a backslash literally, as in the names of units.
pub(crate) fn escape(path: &str) -> String {
    if !path.contains(['*', '?', '[']) {
        return path.to_owned();
    }
    let mut out = String::new();
    for c in path.chars() {
        if matches!(c, '*' | '?' | '[' | ']' | '\\') {
            out.push('\\');
        }
        out.push(c);
    }
    out
}

/// A rule with paths of the running system, changed into a rule for the copy of the tree mounted at `at`; None if it is about a path
/// outside that tree.
pub(crate) fn reanchor(rule: &str, at: &str) -> Option<String> {
    let (op, pattern) = rule.split_once(' ')?;
    if at.is_empty() || !pattern.starts_with('/') {
        return Some(rule.to_owned());
    }
    let inner = pattern.strip_prefix(at).filter(|rest| rest.starts_with('/'))?;
    Some(format!("{op} {inner}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::types::Role;
    use crate::copy::tree::Tree;

    #[test]
    fn rules_follow_the_tree() {
        assert_eq!(reanchor("- /var/cache/apt/*.bin", "").as_deref(), Some("- /var/cache/apt/*.bin"));
        assert_eq!(reanchor("- /var/cache/apt/*.bin", "/var").as_deref(), Some("- /cache/apt/*.bin"));
        assert_eq!(reanchor("- /various", "/var"), None);
        assert_eq!(reanchor("- /home/x", "/var"), None);
        assert_eq!(reanchor("- *.tmp", "/var").as_deref(), Some("- *.tmp"));
        let tree =
            Tree::new(&Role::Var, &["/var/spool/x/".into(), "+ /var/cache/dnf/keep".into()], &[], OldModules::Stay).unwrap();
        assert!(tree.rules.contains(&"- /spool/x/".to_owned()), "{:?}", tree.rules);
        let at = |rule: &str| tree.rules.iter().position(|r| r == rule).unwrap();
        assert!(at("+ /cache/dnf/keep") < at("- /cache/dnf/*"), "rules of the configuration come before the usual ones");
        assert!(
            Tree::new(&Role::Swap, &[], &[], OldModules::Stay).is_none()
                && Tree::new(&Role::Esp, &[], &[], OldModules::Stay).is_none()
        );
    }
}
