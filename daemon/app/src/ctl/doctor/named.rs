//! Would the daemon take the files that its configuration names for its doors: keys, passwords, certificates?

use super::installation::{AS_DAEMON, is_closed};
use super::people::USER;
use super::service::Service;
use super::{Check, sets};
use crate::config::Config;
use crate::named::{Named, TCP, Trouble, files};
use crate::private::Missing;
use std::path::Path;

/// Where the service sees files of the operator's.
const SEEN: &str = "/etc/sparsed";

/// What is wrong with them for whoever asks, and with those that he may read and the daemon's user may not.
pub(super) fn named_files(root: &Path, config: &Config, service: Option<&Service>) -> Vec<Check> {
    let has_tcp = service.is_some_and(|service| service.has_tcp_socket);
    // The daemon reads no keys for a door that it has not.
    let has_no_tcp = !has_tcp && config.tcp.listen.is_none();
    let troubles = Named::troubles(config, has_tcp).into_iter().map(|Trouble { table, error }| {
        let (title, found) = (format!("files of {table}"), format!("{error:#}"));
        let missing = error.chain().find_map(|cause| cause.downcast_ref::<Missing>());
        match missing {
            Some(Missing { credential, .. }) if service.is_some_and(|service| service.is_handed(credential)) => {
                Check::ok(title, format!("sparsed.service is handed {credential}, which is not looked at here"))
            }
            _ if is_closed(&error) => Check::warn(title, found, AS_DAEMON),
            _ if has_no_tcp && table == TCP => {
                Check::warn(title, format!("{found}; no TCP socket is open yet"), sets(table))
            }
            _ => Check::fail(title, found, format!("{}; man sparsed, CREDENTIALS", sets(table))),
        }
    });
    let shut = files(config).into_iter().filter_map(|(key, file)| {
        let why = service.filter(|_| file.exists())?.keeps_from(root, file)?;
        let shown = file.display();
        let fix = match service.and_then(|service| service.hides(file)) {
            Some(_) => {
                let moved = Path::new(SEEN).join(file.file_name().unwrap_or_default());
                let sets = sets(&format!("{key} = \"{}\"", moved.display()));
                format!("sudo install -o {USER} -m 0600 -t {SEEN} {shown}, then {sets}")
            }
            None => format!("sudo chown {USER}: {shown} && sudo systemctl restart sparsed"),
        };
        Some(match has_no_tcp && key == "tcp.keys" {
            true => Check::warn(key, format!("{shown} {why}; no TCP socket is open yet"), fix),
            false => Check::fail(key, format!("{shown} {why}"), fix),
        })
    });
    troubles.chain(shut).collect()
}

#[cfg(test)]
mod tests {
    use super::super::Verdict;
    use super::*;
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_credential_of_the_service_is_no_mistake_and_keys_that_nobody_has_named_are() {
        let config = Config::of(&["tcp.listen=127.0.0.1:0".to_owned()]);
        let said = |service: &Service| named_files(Path::new("/nowhere"), &config, Some(service)).remove(0);
        let missing = said(&Service::default());
        assert!(missing.verdict == Verdict::Fail && missing.found.contains("set tcp.keys"), "{missing:?}");
        let handed = Service { credentials: vec!["sparsed.api-keys".to_owned()], ..Service::default() };
        assert_eq!(said(&handed).verdict, Verdict::Ok);
    }

    #[test]
    fn a_tcp_socket_of_the_service_manager_needs_keys_though_the_configuration_says_nothing_of_it() {
        let said = |service: &Service| named_files(Path::new("/nowhere"), &Config::default(), Some(service));
        let missing = said(&Service { has_tcp_socket: true, ..Service::default() }).remove(0);
        assert!(missing.verdict == Verdict::Fail && missing.found.contains("set tcp.keys"), "{missing:?}");
        assert!(said(&Service::default()).is_empty());
    }

    #[test]
    fn keys_that_no_tcp_socket_wants_yet_are_a_remark() {
        let keys = ["tcp.keys=/no/such/keys", "tcp.listen=127.0.0.1:0"];
        let (no_socket, socket) = (Service::default(), Service { has_tcp_socket: true, ..Service::default() });
        let said = |sets: &[&str], service| named_files(Path::new("/nowhere"), &Config::of(sets), service).remove(0);
        for service in [None, Some(&no_socket)] {
            let remark = said(&keys[..1], service);
            assert!(remark.verdict == Verdict::Warn && remark.found.contains("no TCP socket is open"), "{remark:?}");
            assert!(Named::read(&Config::of(&keys[..1]), false).is_ok(), "the daemon starts");
        }
        for (sets, service) in [(&keys[..], None), (&keys[..1], Some(&socket))] {
            assert_eq!(said(sets, service).verdict, Verdict::Fail);
        }
    }

    #[test]
    fn keys_that_only_root_may_read_are_told_with_what_gives_them_to_the_daemons_user() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("etc")).unwrap();
        // Nobody here: neither the owner of these files nor of their group.
        fs::write(root.path().join("etc/passwd"), format!("{USER}:x:4294967:4294967::/:/\n")).unwrap();
        let keys = root.path().join("keys");
        fs::write(&keys, "hall 0123456789abcdef\n").unwrap();
        fs::set_permissions(&keys, fs::Permissions::from_mode(0o600)).unwrap();
        let config = Config::of(&["tcp.listen=127.0.0.1:0".to_owned(), format!("tcp.keys={}", keys.display())]);
        assert!(named_files(root.path(), &config, None).is_empty());
        let said = named_files(root.path(), &config, Some(&Service::default())).remove(0);
        assert_eq!((said.name.as_str(), said.verdict), ("tcp.keys", Verdict::Fail));
        let unused = Config { tcp: crate::config::Tcp { listen: None, ..config.tcp.clone() }, ..config.clone() };
        assert_eq!(named_files(root.path(), &unused, Some(&Service::default())).remove(0).verdict, Verdict::Warn);
        assert!(said.fix.unwrap().starts_with("sudo chown sparsed: /"), "{}", said.found);
        let hidden = vec![(root.path().to_owned(), "PrivateTmp=yes".to_owned())];
        let said = named_files(root.path(), &config, Some(&Service { hidden, ..Service::default() })).remove(0);
        assert!(said.found.contains("(PrivateTmp=yes)"), "{said:?}");
        let fix = said.fix.unwrap();
        assert!(fix.contains("-t /etc/sparsed") && fix.contains(": tcp.keys = \"/etc/sparsed/keys\"; then "), "{fix}");
    }
}
