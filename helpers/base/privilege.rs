//! Who runs a program.

use anyhow::Result;
use nix::unistd::geteuid;

use crate::base::refusal::refused;

/// Whether root does.
pub fn is_root() -> bool {
    geteuid().is_root()
}

/// Refuses to go on for anybody but root. `unit` does the same, where there is one.
///
/// # Errors
/// [`crate::base::refusal::Refused`] as said.
pub fn require_root(program: &str, unit: Option<&str>) -> Result<()> {
    match is_root() {
        true => Ok(()),
        false => Err(refused(sentence(program, unit))),
    }
}

fn sentence(program: &str, unit: Option<&str>) -> String {
    let other = unit.map(|unit| format!(", or 'systemctl start {unit}'")).unwrap_or_default();
    format!("{program} has to run as root; nothing was done. Run it by sudo{other}.")
}

/// The end of a dry run of somebody else than root: only root may read these things.
pub fn not_seen(program: &str, things: &[String]) -> anyhow::Error {
    let things = things.join(" and ");
    refused(format!(
        "only root may read {things}; what would change there is unknown, and nothing was done. Run it by sudo: 'sudo {program} --dry-run'."
    ))
}

/// Whether an error means that only root may do that.
pub fn is_denied(error: &anyhow::Error) -> bool {
    use std::io::ErrorKind::PermissionDenied;
    let denied = |errno: &nix::Error| matches!(errno, nix::Error::EACCES | nix::Error::EPERM);
    error.chain().any(|cause| {
        cause.downcast_ref::<nix::Error>().is_some_and(denied)
            || cause.downcast_ref::<std::io::Error>().is_some_and(|e| e.kind() == PermissionDenied)
    })
}

#[cfg(test)]
mod tests {
    use anyhow::Context;

    use super::*;

    #[test]
    fn whoever_is_not_root_is_told_in_one_way() {
        assert_eq!(
            sentence("dualroot-sync", Some("dualroot-sync.service")),
            "dualroot-sync has to run as root; nothing was done. Run it by sudo, or 'systemctl start dualroot-sync.service'."
        );
        assert_eq!(sentence("dualroot-clone", None), "dualroot-clone has to run as root; nothing was done. Run it by sudo.");
    }

    #[test]
    fn what_only_root_may_do_is_told_apart_from_what_is_not_there() {
        let of = |errno| Err::<(), _>(errno).context("/boot").unwrap_err();
        assert!(is_denied(&of(nix::Error::EACCES)) && is_denied(&of(nix::Error::EPERM)));
        assert!(!is_denied(&of(nix::Error::ENOENT)));
        let of = |kind: std::io::ErrorKind| Err::<(), _>(std::io::Error::from(kind)).context("/etc").unwrap_err();
        assert!(is_denied(&of(std::io::ErrorKind::PermissionDenied)) && !is_denied(&of(std::io::ErrorKind::NotFound)));
    }
}
