//! Which events have a name that stays? One table of message ids; `systemd/catalog/sparsed.catalog` explains each.
//!
//! An event is known by the constant text of its line, so crates that log know nothing of ids. An id is never given to
//! another event, and a line whose text changes keeps its id here.

/// An event with a message id.
#[derive(Clone, Copy, Debug)]
pub(super) struct Event {
    /// `MESSAGE_ID` of the journal: a random UUID, 32 hexadecimal digits.
    pub(super) id: &'static str,
    /// The constant text of the line.
    pub(super) text: &'static str,
}

const fn event(id: &'static str, text: &'static str) -> Event {
    Event { id, text }
}

/// The message id of a line; `None`: it is none of the events below.
pub(super) fn id_of(text: &str) -> Option<&'static str> {
    EVENTS.iter().find(|event| event.text == text).map(|event| event.id)
}

/// All of them, in the catalogue's order.
pub(super) const EVENTS: &[Event] = &[
    event("9fb93534081c4253b1e273a87984a8ab", "listening"),
    event("db149e4714be49abb93fe42eabd2d9f2", "device open"),
    event("3994693ea3ae4e689323451b4a95902a", "model ready"),
    event("1aa615a94b6a4551a061ae14a1dbf721", "model not served"),
    event("8b3a15353f134b709856c32a687b253b", "memory.budget holds a shorter context"),
    event("a7213dfe89324293a0dd5386c9cf0800", "nothing says how much memory there is; set memory.budget"),
    event("67d1191fda8040bd919e9bc7f4a02d92", "decided"),
    event("fd95588c5e4e410bb14cf51964cd1715", "request answered"),
    event("d561cab77e4d473db44d04cb5f0f2c02", "request failed"),
    event("3c85b930b9f0420f929e04e213311e91", "request cancelled"),
    event("1b0b5a92ca9f4dae85e1fb5bb643edf4", "step failed, trying again"),
    event(
        "fece6b989a324eaeb86c67b35a0ac810",
        "step failed for all its sequences, which may be the device's fault: trying again",
    ),
    event("5da24106869b4c3d819274d465ee28de", "step failed for a sequence alone, which ends"),
    event("4bcee26a6a9d449c8954549c429fdbf7", "device lost, requests wait"),
    event("56c8a7f9757f4125ad53b107073391a5", "strike against the plugin"),
    event("3623ac6122ae4903a20425dd2e67dbe9", "plugin refused"),
    event("cae33afe57804cdb9f642b78f0088cfc", "plugin host killed: it did not end"),
    event("76e2507bc7b14aa893655fc9e35d6c11", "a third-party plugin is loaded: the daemon is tainted"),
    event("671b5a965693463285c30e119edb8d92", "sessions found"),
    event("92d254d7fe0340e4808f532c9af26054", "session is not as it was written"),
    event("17d104f66e3342b0b3e45fcec83c2a8d", "session could not be written, trying again"),
    event("86b22542b5814f0aaffc4798d551e17d", "answer could not be journaled, it ends"),
    event("98177d4622d24a85be8804180025cd7f", "the disk is full: blocks of sessions are dropped"),
    event("884f31660a434e8899ef1e6ea55cafd9", "sessions past their retention are deleted"),
    event("8e71e249e05046ee8adb2a053379959f", "made the key of all sessions; back it up with them"),
    event(
        "c48f6f41a4504d59ab87a4dc157a8060",
        "the slow tier takes no more blocks: long contexts have to wait for each other now",
    ),
    event(
        "b9f3dd48974b4a32b2f3d31d476345e5",
        "rows in the slow tier are not what was written, they are computed again",
    ),
    event("79923b201db04de5bfdc3b1dd2742ee7", "connection not accepted"),
    event("528efc2d91d140e4adaf31aca920a5ea", "connected to the MQTT broker"),
    event("f3e9b455903c4f11b998756565e1a396", "the broker acknowledges nothing; connecting anew"),
    event("440ead791a7645e886526e36bbad2786", "the MQTT broker does not let us subscribe; see its ACL"),
    event("553138ea2d2b43d980fdc9144b239812", "the MQTT journal cannot be written; requests are refused"),
    event("8289abc740a540d5a98d9687c967d7e8", "not on D-Bus; tried again later"),
    event("9b4eaf8cb5bc40c0b7d37b2894ccd811", "the bus is gone"),
    event("586f4b39fe004ab9b63ac2db2aa4da4c", "configuration reloaded"),
    event("8525e3629e2a40ca8df3dd793635e2a7", "configuration not reloaded, nothing changes"),
    event("498b4ba0629141efb6efaf6be99cc498", "configuration is wrong"),
    event("72160fe4272440d9b3eba9e4065930ef", "the daemon cannot serve"),
    event("c34de07ecc8845ccaec549275bee8c47", "stopping"),
    event("faefb6906e434492a0a9c4988d7090d2", "answers were cut off: the time to stop is over"),
    event("026297741a0d49feb8a43183466d2daf", "stopped"),
];

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;
    use std::path::{Path, PathBuf};

    const CATALOGUE: &str = include_str!("../../../../systemd/catalog/sparsed.catalog");

    fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
        for entry in folder.read_dir().unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                sources(&path, found);
            } else if path.extension().is_some_and(|extension| extension == "rs") && !path.ends_with("events.rs") {
                found.push(path);
            }
        }
    }

    #[test]
    fn an_id_stands_for_one_event_and_is_one_that_the_journal_takes() {
        let ids: BTreeSet<&str> = EVENTS.iter().map(|event| event.id).collect();
        let texts: BTreeSet<&str> = EVENTS.iter().map(|event| event.text).collect();
        assert_eq!((ids.len(), texts.len()), (EVENTS.len(), EVENTS.len()));
        let is_hex = |c: char| c.is_ascii_digit() || ('a'..='f').contains(&c);
        assert!(ids.iter().all(|id| id.len() == 32 && id.chars().all(is_hex)));
    }

    #[test]
    fn the_catalogue_explains_exactly_these_events() {
        let mut entries = CATALOGUE.split("\n-- ").skip(1);
        for event in EVENTS {
            let entry = entries.next().unwrap_or_else(|| panic!("{} is not explained", event.text));
            let (id, rest) = entry.split_once('\n').unwrap();
            let (head, body) = rest.split_once("\n\n").unwrap();
            assert_eq!(id, event.id, "{}", event.text);
            let subject = head.lines().find_map(|line| line.strip_prefix("Subject: ")).unwrap();
            assert!(!subject.is_empty() && head.contains("Defined-By: sparsed") && body.len() > 10, "{entry}");
        }
        assert_eq!(entries.next(), None);
    }

    /// The text of an event is what some line says, so that a line that is worded anew does not lose its id unseen.
    #[test]
    fn each_event_is_logged_somewhere() {
        let mut files = Vec::new();
        sources(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/..")), &mut files);
        let texts: Vec<String> = files.iter().map(|path| std::fs::read_to_string(path).unwrap()).collect();
        for event in EVENTS {
            let quoted = format!("\"{}\"", event.text);
            assert!(texts.iter().any(|text| text.contains(&quoted)), "nobody logs {quoted}");
        }
    }
}
