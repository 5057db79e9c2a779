//! Has the daemon a folder for what must survive?

use super::installation::{AS_DAEMON, quoted};
use super::people::USER;
use super::service::{Service, lets_write};
use super::{Check, sets};
use rustix::fs::Access;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

/// The service's own, which its unit lets it write and tmpfiles makes.
const OWN: &str = "/var/lib/sparsed";
/// One on another disk, for advice to people who have not chosen any.
pub(super) const ELSEWHERE: &str = "/srv/sparsed";

/// What moves the service's state, once `state_dir` is `to`, and lets it write there. Who connects meanwhile is served
/// without conversations. Models stay where they are found, and what is at `to` already is left as it is.
pub(super) fn moves(from: &Path, to: &Path) -> String {
    let (from, to) = (quoted(&from.display().to_string()), quoted(&to.display().to_string()));
    format!(
        "sudo systemctl stop sparsed && sudo install -d -m 0700 -o {USER} -g {USER} {to} && \
         sudo find -H {from} -mindepth 1 -maxdepth 1 ! -name models -exec mv -n -t {to} {{}} + && {}",
        lets_write(&to)
    )
}

/// Whether the service could keep its state in `dir`, or else a daemon that whoever asks runs.
pub(super) fn folder(dir: &Path, service: Option<&Service>) -> Check {
    const NAME: &str = "state folder";
    let shown = dir.display();
    if let Some(service) = service {
        if let Some(setting) = service.hides(dir) {
            let found = format!("{shown} is not there for sparsed.service ({setting})");
            return Check::fail(NAME, found, sets("state_dir elsewhere, or no state_dir"));
        }
        if !service.may_write(dir) {
            let found = format!("{shown} cannot be written by sparsed.service (ProtectSystem=strict)");
            return Check::fail(NAME, found, moves(Path::new(OWN), dir));
        }
    }
    let Ok(found) = dir.metadata() else { return absent(NAME, dir, service) };
    if !found.is_dir() {
        return Check::fail(NAME, format!("{shown} is no folder"), format!("sudo mv {shown} {shown}.away"));
    }
    if rustix::fs::access(dir, Access::WRITE_OK | Access::EXEC_OK).is_err() {
        let found = format!("{shown} cannot be written by you");
        // Right for other users; what the daemon may do, its own user sees.
        return Check::warn(NAME, found, AS_DAEMON);
    }
    if found.permissions().mode() & 0o077 != 0 {
        let found = format!("{shown} is open to others (mode {:o})", found.permissions().mode() & 0o777);
        return Check::warn(NAME, found, format!("chmod 0700 {shown}"));
    }
    Check::ok(NAME, shown.to_string())
}

/// A folder that is not there, which the daemon makes where it may.
fn absent(name: &str, dir: &Path, service: Option<&Service>) -> Check {
    let shown = dir.display();
    let makes = format!("sudo install -d -m 0700 -o {USER} -g {USER} {shown}");
    let above = dir.ancestors().skip(1).find(|above| above.exists()).unwrap_or_else(|| Path::new("/"));
    if service.is_some_and(|service| dir != Path::new(OWN) && !service.may_write(above)) {
        // What was not there at its start is not let through its sandbox.
        let found = format!("{shown} is not there, and sparsed.service may not make it (ProtectSystem=strict)");
        return Check::fail(name, found, format!("{makes} && sudo systemctl restart sparsed"));
    }
    match rustix::fs::access(above, Access::WRITE_OK) {
        Ok(()) => Check::ok(name, format!("{shown} is not there yet; the daemon makes it")),
        Err(_) => Check::fail(name, format!("{shown} is not there, and you may not make it"), makes),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Verdict;
    use super::*;
    use std::fs;
    use std::path::PathBuf;

    #[test]
    fn an_open_state_folder_and_a_file_in_its_place_are_told() {
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let open = folder(dir.path(), None);
        assert_eq!((open.verdict, open.fix), (Verdict::Warn, Some(format!("chmod 0700 {}", dir.path().display()))));
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o700)).unwrap();
        assert_eq!(folder(dir.path(), None).verdict, Verdict::Ok);
        fs::write(dir.path().join("file"), "").unwrap();
        assert_eq!(folder(&dir.path().join("file"), None).verdict, Verdict::Fail);
        assert_eq!(folder(&dir.path().join("not/yet"), None).verdict, Verdict::Ok);
    }

    #[test]
    fn a_folder_that_the_sandbox_does_not_let_it_write_fails_with_what_moves_the_state_there() {
        let dir = tempfile::tempdir().unwrap();
        let to = dir.path().join("a b");
        let mut service = Service { is_read_only: true, writable: vec![PathBuf::from(OWN)], ..Service::default() };
        let said = folder(&to, Some(&service));
        assert_eq!(said.verdict, Verdict::Fail);
        let (fix, to_word) = (said.fix.unwrap(), format!("'{}'", to.display()));
        assert!(fix.starts_with("sudo systemctl stop sparsed && ") && fix.ends_with("restart sparsed"), "{fix}");
        assert!(fix.contains("find -H /var/lib/sparsed ") && fix.contains(&format!("mv -n -t {to_word} ")), "{fix}");
        assert!(fix.contains(&format!("ReadWritePaths=\"-%s\"\\n' {to_word} | ")), "{fix}");
        service.writable.push(to.clone());
        let missing = folder(&to, Some(&service));
        assert!(missing.verdict == Verdict::Fail && missing.fix.unwrap().ends_with("restart sparsed"));
        fs::create_dir(&to).unwrap();
        fs::set_permissions(&to, fs::Permissions::from_mode(0o700)).unwrap();
        assert_eq!(folder(&to, Some(&service)).verdict, Verdict::Ok);
        service.hidden.push((dir.path().to_owned(), "ProtectHome=yes".to_owned()));
        let hidden = folder(&to, Some(&service));
        assert!(hidden.verdict == Verdict::Fail && hidden.found.contains("(ProtectHome=yes)"), "{hidden:?}");
    }
}
