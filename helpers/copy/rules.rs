//! rsync's filter rules.

/// Whether a rule of `exclude=` is more than a pattern (rsync(1), FILTER RULES).
pub(crate) fn has_prefix(rule: &str) -> bool {
    rule.split_once(' ').is_some_and(|(op, _)| {
        let short = op.split(',').next().unwrap_or_default();
        matches!(short, "-" | "+" | "P" | "R" | "H" | "S" | "exclude" | "include" | "hide" | "show" | "protect" | "risk")
    })
}

/// A path as a pattern that means just it. Where nothing in it is a wildcard, a backslash is one to rsync, as in names of units.
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

/// A rule by the path in the running system, as a rule for the transfer of the tree mounted at `at`; None if it is about something
/// outside that tree.
pub(crate) fn reanchor(rule: &str, at: &str) -> Option<String> {
    let (op, pattern) = rule.split_once(' ')?;
    if at.is_empty() || !pattern.starts_with('/') {
        return Some(rule.to_owned());
    }
    let inner = pattern.strip_prefix(at).filter(|rest| rest.starts_with('/'))?;
    Some(format!("{op} {inner}"))
}
