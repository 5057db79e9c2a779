//! Has the daemon a folder for what must survive, and does it keep conversations there?

use super::installation::{AS_DAEMON, quoted};
use super::people::USER;
use super::service::{Service, lets_write};
use super::{Check, Verdict, sets};
use crate::door::is_same;
use crate::state::{is_away, unmounted};
use rustix::fs::Access;
use serde_json::Value;
use std::io::ErrorKind;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// The service's own, which its unit lets it write and tmpfiles makes.
const OWN: &str = "/var/lib/sparsed";
/// One on another disk, for advice to people who have not chosen any.
pub(super) const ELSEWHERE: &str = "/srv/sparsed";
/// What only a folder has that a daemon has kept conversations in.
const KEPT: [&str; 2] = ["store", "master.key"];

/// What moves the service's state, once `state_dir` is `to`, and lets it write there. Who connects meanwhile is served
/// without conversations. Models stay where they are found, and what is at `to` already is left as it is.
pub(super) fn moves(from: &Path, to: &Path) -> String {
    // Into itself a folder cannot be moved.
    let within = to.strip_prefix(from).ok().and_then(|path| path.iter().next());
    let spared = within.map_or(String::new(), |name| format!("! -name {} ", quoted(&name.to_string_lossy())));
    let (from, to) = (quoted(&from.display().to_string()), quoted(&to.display().to_string()));
    format!(
        "sudo systemctl stop sparsed && sudo install -d -m 0700 -o {USER} -g {USER} {to} && \
         sudo find -H {from} -mindepth 1 -maxdepth 1 ! -name models {spared}-exec mv -n -t {to} {{}} + && {}",
        lets_write(&to)
    )
}

/// Where conversations are besides `dir`.
#[derive(Debug, PartialEq, Eq)]
enum Left {
    Nowhere,
    In(PathBuf),
    /// In one of several folders that whoever asks may not look into.
    Unseen,
}

impl Left {
    /// Among the folders that the service may write; the one that was named last goes first.
    fn behind(dir: &Path, service: &Service) -> Self {
        let others: Vec<&PathBuf> = service.writable.iter().rev().filter(|other| !is_same(other, dir)).collect();
        let has = |other: &Path| KEPT.map(|name| other.join(name).symlink_metadata());
        if let Some(found) = others.iter().find(|other| has(other).iter().any(Result::is_ok)) {
            return Self::In((*found).clone());
        }
        let is_shut = |found: &std::io::Result<_>| {
            found.as_ref().is_err_and(|error: &std::io::Error| error.kind() == ErrorKind::PermissionDenied)
        };
        let shut: Vec<&&PathBuf> = others.iter().filter(|other| has(other).iter().any(is_shut)).collect();
        match shut.as_slice() {
            [] => Self::Nowhere,
            [only] => Self::In((**only).clone()),
            _ => Self::Unseen,
        }
    }
}

/// Whether a daemon has kept conversations in `dir`.
fn has_kept(dir: &Path) -> bool {
    KEPT.iter().any(|name| dir.join(name).exists())
}

/// What brings the service's conversations to `dir`, which it may not write.
fn moves_all(dir: &Path, service: &Service) -> String {
    match Left::behind(dir, service) {
        Left::In(from) => moves(&from, dir),
        Left::Nowhere => moves(Path::new(OWN), dir),
        Left::Unseen => format!("{AS_DAEMON}, which sees where conversations are that have to move"),
    }
}

/// That conversations lie in another folder than `dir`, which the service uses and may write.
fn left_behind(name: &str, dir: &Path, service: &Service) -> Option<Check> {
    let Left::In(other) = Left::behind(dir, service) else { return None };
    // What only the daemon's user sees may as well be nothing.
    if !has_kept(&other) {
        return None;
    }
    let (shown, there) = (dir.display(), other.display());
    let found = format!("conversations are in {there} too, and the service uses {shown}");
    let fix = match has_kept(dir) {
        false => moves(&other, dir),
        true => {
            let [store, key] = KEPT.map(|name| quoted(&other.join(name).display().to_string()));
            let back = sets(&format!("state_dir = \"{there}\""));
            format!("to have those in the place of these, {back}; where nobody wants them, sudo rm -r {store} {key}")
        }
    };
    Some(Check::warn(name, found, fix))
}

/// Whether the service could keep its state in `dir`, or else a daemon that whoever asks runs.
pub(super) fn folder(root: &Path, dir: &Path, service: Option<&Service>) -> Check {
    const NAME: &str = "state folder";
    let shown = dir.display();
    if let Some(point) = unmounted(root, dir) {
        let fix = format!("sudo mount {}, or mend its line: sudoedit /etc/fstab", quoted(&point.display().to_string()));
        return Check::fail(NAME, is_away(&point), fix);
    }
    if let Some(service) = service {
        if let Some(setting) = service.hides(dir) {
            let found = format!("{shown} is not there for sparsed.service ({setting})");
            return Check::fail(NAME, found, sets("state_dir elsewhere, or no state_dir"));
        }
        if !service.may_write(dir) {
            let found = format!("{shown} cannot be written by sparsed.service (ProtectSystem=strict)");
            return Check::fail(NAME, found, moves_all(dir, service));
        }
    }
    let check = usable(NAME, dir, service);
    match service.and_then(|service| left_behind(NAME, dir, service)) {
        Some(left) if check.verdict != Verdict::Fail || !dir.exists() => {
            Check { verdict: left.verdict.max(check.verdict), ..left }
        }
        _ => check,
    }
}

/// Whether a folder that the service's sandbox lets it write can be used.
fn usable(name: &str, dir: &Path, service: Option<&Service>) -> Check {
    let shown = dir.display();
    let Ok(found) = dir.metadata() else { return absent(name, dir, service) };
    if !found.is_dir() {
        return Check::fail(name, format!("{shown} is no folder"), format!("sudo mv {shown} {shown}.away"));
    }
    if rustix::fs::access(dir, Access::WRITE_OK | Access::EXEC_OK).is_err() {
        let found = format!("{shown} cannot be written by you");
        // Right for other users; what the daemon may do, its own user sees.
        return Check::warn(name, found, AS_DAEMON);
    }
    if found.permissions().mode() & 0o077 != 0 {
        let found = format!("{shown} is open to others (mode {:o})", found.permissions().mode() & 0o777);
        return Check::warn(name, found, format!("chmod 0700 {shown}"));
    }
    Check::ok(name, shown.to_string())
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

/// What a daemon says that keeps no conversations, since it cannot use its folder.
pub(super) fn sessions_away(status: &Value) -> Option<Check> {
    let found = "the daemon keeps none, and answers 503 sessions_away: it cannot use its state folder";
    let why = "sudo journalctl -u sparsed -b -g 'state folder'; sudo -u sparsed sparsectl doctor";
    (status["sessions_away"] == true).then(|| Check::fail("sessions", found, why))
}

/// What a daemon says that was started with another master key than conversations were written with.
pub(super) fn other_key(status: &Value) -> Option<Check> {
    let n = status["sessions_of_other_key"].as_u64().filter(|n| *n > 0)?;
    let found = format!("{n} were written with another master key than the daemon's, and nobody sees them");
    let fix = "give the daemon the key that they were written with, the credential sparsed.master-key or master.key in the \
               state folder, then: sudo systemctl restart sparsed. Until then keep every key there is (man sparsed, \
               CREDENTIALS)";
    Some(Check::fail("sessions", found, fix))
}

#[cfg(test)]
mod tests {
    use super::super::machine::tests::machine;
    use super::*;
    use std::fs;

    #[test]
    fn an_open_state_folder_and_a_file_in_its_place_are_told() {
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let open = folder(Path::new("/"), dir.path(), None);
        assert_eq!((open.verdict, open.fix), (Verdict::Warn, Some(format!("chmod 0700 {}", dir.path().display()))));
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o700)).unwrap();
        assert_eq!(folder(Path::new("/"), dir.path(), None).verdict, Verdict::Ok);
        fs::write(dir.path().join("file"), "").unwrap();
        assert_eq!(folder(Path::new("/"), &dir.path().join("file"), None).verdict, Verdict::Fail);
        assert_eq!(folder(Path::new("/"), &dir.path().join("not/yet"), None).verdict, Verdict::Ok);
    }

    #[test]
    fn a_folder_whose_partition_is_away_fails_with_what_mounts_it() {
        let dir = tempfile::tempdir().unwrap();
        let top = dir.path().canonicalize().unwrap();
        let root = machine(&[("etc/fstab", &format!("LABEL=state {} ext4 nofail 0 2\n", top.display()))]);
        fs::set_permissions(&top, fs::Permissions::from_mode(0o700)).unwrap();
        let away = folder(root.path(), &top, None);
        assert_eq!((away.verdict, folder(machine(&[]).path(), &top, None).verdict), (Verdict::Fail, Verdict::Ok));
        assert_eq!(away.found, format!("{} is not mounted, which /etc/fstab has", top.display()));
        assert!(away.fix.unwrap().starts_with(&format!("sudo mount {}, or ", top.display())));
    }

    #[test]
    fn a_daemon_that_keeps_no_conversations_for_want_of_its_folder_fails() {
        let said = sessions_away(&serde_json::json!({ "sessions_away": true, "sessions": null })).unwrap();
        assert_eq!((said.name.as_str(), said.verdict), ("sessions", Verdict::Fail));
        assert_eq!(sessions_away(&serde_json::json!({ "sessions_away": false, "sessions": null })), None);
        assert_eq!(sessions_away(&Value::Null), None);
    }

    #[test]
    fn conversations_of_another_key_fail_with_how_many_they_are() {
        let said = other_key(&serde_json::json!({ "sessions_away": false, "sessions_of_other_key": 3 })).unwrap();
        assert_eq!((said.name.as_str(), said.verdict), ("sessions", Verdict::Fail));
        assert!(said.found.starts_with("3 were") && said.fix.unwrap().contains("keep every key"), "{}", said.found);
        for sound in [serde_json::json!({ "sessions_of_other_key": 0 }), Value::Null] {
            assert_eq!(other_key(&sound), None);
        }
    }

    #[test]
    fn what_moves_is_what_the_service_has_kept_in_whichever_folder_it_is() {
        let top = tempfile::tempdir().unwrap();
        let at = |name: &str| top.path().join(name);
        let (own, second, third) = (at("own"), at("second"), at("third"));
        fs::create_dir(&own).unwrap();
        fs::create_dir(&second).unwrap();
        fs::write(second.join("master.key"), "").unwrap();
        // As it is once the state has moved from the first folder to the second one.
        let mut service =
            Service { is_read_only: true, writable: vec![own.clone(), second.clone()], ..Service::default() };
        let said = |service: &Service, dir: &Path| folder(Path::new("/"), dir, Some(service));
        let moved = said(&service, &third);
        let starts = |from: &Path| format!("find -H {} ", from.display());
        assert_eq!(moved.verdict, Verdict::Fail);
        assert!(moved.fix.as_ref().unwrap().contains(&starts(&second)), "{moved:?}");
        // A sandbox that is open already must not have it begin anew either, without a word.
        service.writable.push(third.clone());
        let told = said(&service, &third);
        assert!(told.found.starts_with("conversations are in "), "{told:?}");
        assert!(told.verdict == Verdict::Fail && told.fix.as_ref().unwrap().contains(&starts(&second)), "{told:?}");
        fs::create_dir(&third).unwrap();
        fs::set_permissions(&third, fs::Permissions::from_mode(0o700)).unwrap();
        fs::write(third.join("master.key"), "").unwrap();
        let both = said(&service, &third);
        let back = format!("state_dir = \"{}\"; then", second.display());
        assert!(both.verdict == Verdict::Warn && both.fix.as_ref().unwrap().contains(&back), "{both:?}");
        fs::remove_file(second.join("master.key")).unwrap();
        assert_eq!(said(&service, &third).verdict, Verdict::Ok);
        let below = moves(&own, &own.join("state/sparsed"));
        assert!(below.contains("! -name models ! -name state -exec mv"), "{below}");
    }

    #[test]
    fn a_folder_that_the_sandbox_does_not_let_it_write_fails_with_what_moves_the_state_there() {
        let dir = tempfile::tempdir().unwrap();
        let to = dir.path().join("a b");
        let mut service = Service { is_read_only: true, writable: vec![PathBuf::from(OWN)], ..Service::default() };
        let said = folder(Path::new("/"), &to, Some(&service));
        assert_eq!(said.verdict, Verdict::Fail);
        let (fix, to_word) = (said.fix.unwrap(), format!("'{}'", to.display()));
        assert!(fix.starts_with("sudo systemctl stop sparsed && ") && fix.ends_with("restart sparsed"), "{fix}");
        assert!(fix.contains("find -H /var/lib/sparsed ") && fix.contains(&format!("mv -n -t {to_word} ")), "{fix}");
        assert!(fix.contains(&format!("ReadWritePaths=\"-%s\"\\n' {to_word} | ")), "{fix}");
        service.writable.push(to.clone());
        let missing = folder(Path::new("/"), &to, Some(&service));
        assert!(missing.verdict == Verdict::Fail && missing.fix.unwrap().ends_with("restart sparsed"));
        fs::create_dir(&to).unwrap();
        fs::set_permissions(&to, fs::Permissions::from_mode(0o700)).unwrap();
        assert_eq!(folder(Path::new("/"), &to, Some(&service)).verdict, Verdict::Ok);
        service.hidden.push((dir.path().to_owned(), "ProtectHome=yes".to_owned()));
        let hidden = folder(Path::new("/"), &to, Some(&service));
        assert!(hidden.verdict == Verdict::Fail && hidden.found.contains("(ProtectHome=yes)"), "{hidden:?}");
    }
}
