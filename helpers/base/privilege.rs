//! The rights of the user who runs a program.

use anyhow::Result;
use nix::unistd::geteuid;

use crate::base::refusal::refused;

/// Whether root runs this program.
pub fn is_root() -> bool {
    geteuid().is_root()
}

/// Checks that root runs this program. `unit` is the unit that does the same work, if there is one.
///
/// # Errors
/// [`crate::base::refusal::Refused`] for any other user.
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

/// The refusal of a dry run by another user than root, who may not read these things.
pub fn not_seen(program: &str, things: &[String]) -> anyhow::Error {
    let things = things.join(" and ");
    refused(format!(
        "only root may read {things}; the changes there are unknown, and nothing was done. Run it by sudo: 'sudo {program} --dry-run'."
    ))
}

/// Whether an error means that root's rights are needed.
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
    fn every_program_gives_other_users_the_same_message() {
        assert_eq!(
            sentence("dualroot-sync", Some("dualroot-sync.service")),
            "dualroot-sync has to run as root; nothing was done. Run it by sudo, or 'systemctl start dualroot-sync.service'."
        );
        assert_eq!(sentence("dualroot-clone", None), "dualroot-clone has to run as root; nothing was done. Run it by sudo.");
    }

    #[test]
    fn a_denied_access_differs_from_a_missing_file() {
        let of = |errno| Err::<(), _>(errno).context("/boot").unwrap_err();
        assert!(is_denied(&of(nix::Error::EACCES)) && is_denied(&of(nix::Error::EPERM)));
        assert!(!is_denied(&of(nix::Error::ENOENT)));
        let of = |kind: std::io::ErrorKind| Err::<(), _>(std::io::Error::from(kind)).context("/etc").unwrap_err();
        assert!(is_denied(&of(std::io::ErrorKind::PermissionDenied)) && !is_denied(&of(std::io::ErrorKind::NotFound)));
    }
}
