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

/// The message id of a line that a plugin or its process says; its text may go on with a reason.
pub(super) fn relayed_id_of(text: &str) -> Option<&'static str> {
    RELAYED.iter().find(|known| text.starts_with(**known)).and_then(|known| id_of(known))
}

/// Events that come from plugins, which may say anything and are not to be taken for the daemon.
const RELAYED: &[&str] = &[
    "this kernel has no Landlock: the plugin may open any file of its user",
    "this kernel's Landlock confines the plugin in part only",
    "system calls of the plugin are not filtered",
    "the slow tier is read by threads, as io_uring cannot be used",
];

/// All of them, in the catalogue's order.
pub(super) const EVENTS: &[Event] = &[
    event("9fb93534081c4253b1e273a87984a8ab", "listening"),
    event("6fc49798068445af948da078fdc750c7", "plugin chosen"),
    event("db149e4714be49abb93fe42eabd2d9f2", "device open"),
    event("3994693ea3ae4e689323451b4a95902a", "model ready"),
    event("1aa615a94b6a4551a061ae14a1dbf721", "model not served"),
    event("8b3a15353f134b709856c32a687b253b", "memory.budget holds a shorter context"),
    event(
        "67e9a780ab5c4b6c987a891004b9209a",
        "requests without a session get a shorter context, as their rows may not be in the slow tier",
    ),
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
    event(
        "caa7ec24b5ea409085e3496e3c1a7c33",
        "sessions have another master key and are not listed; start with the key that they were written with",
    ),
    event(
        "78398c8af5244c7b9711f802d223223c",
        "session of another version of this program: it is kept as it is, for that one, and not listed",
    ),
    event("17d104f66e3342b0b3e45fcec83c2a8d", "session could not be written, trying again"),
    event("86b22542b5814f0aaffc4798d551e17d", "answer could not be journaled, it ends"),
    event("98177d4622d24a85be8804180025cd7f", "the disk is full: blocks of sessions are dropped"),
    event("052f12a5a60a4a85889f1859c59a4460", "the disk is full: what was truncated is left in the session's journal"),
    event("227c3e28eb524263b42b59dda82eff15", "a session that no turn came of could not be deleted"),
    event("884f31660a434e8899ef1e6ea55cafd9", "sessions past their retention are deleted"),
    event("8e71e249e05046ee8adb2a053379959f", "made the key of all sessions; back it up with them"),
    event(
        "e5275c25f552420592bb5da96465fd77",
        "the credential is another key than the file's, which nothing needs that is kept",
    ),
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
    event(
        "9bb2d466c6344beaaf3543b6403899e9",
        "the state folder cannot be used: no sessions, no MQTT and no slow tier until it can",
    ),
    event("44f76cfd08fb4f338f85b01c8bf2ce7c", "the state folder cannot be used yet"),
    event("4a7db39dfa654ea0abc3d1224faacfab", "sessions are kept now"),
    event("c1285f067d7d4094abf6b7c618ce048c", "the model is not there; it is loaded when it comes"),
    event("f6adb0d2d4c7491f8d87868708650ccc", "the model is there now"),
    event("2f7629e08cf8492486cdbcaafc6a9550", "none of the sockets that were passed is ours"),
    event("48468e575cda49119c2f869a0f91b1d4", "socket.path is not used: the service manager has opened another socket"),
    event(
        "107423170340468b9ab3b283aeb92d01",
        "tcp.listen is not used: the service manager has opened other TCP sockets",
    ),
    event("09ff9760d5da4799a15fd3b954b63889", "signals cannot be caught: they end the daemon at once"),
    event("942c774d1e674420b1b7080d06bdde51", "connections were cut off: the time to stop is over"),
    event("bd87d943ea1f4f1db472976332a12e3b", "answers were still running when the time to stop was over"),
    event("98d40182db584b48a83293b138a4ea40", "answers on D-Bus were still running when the time to stop was over"),
    event(
        "3e2974ea7883466a84e0d2ae18c6f475",
        "the MQTT broker or answers were still there when the time to stop was over",
    ),
    event("f36718ba2be545c896751bced8bc16ca", "budget"),
    event("d7e09c49cac44b818768933128f76cf2", "memory is watched"),
    event("ebf1373a4e64407285beeb2ac88ba786", "MEMORY_PRESSURE_WATCH cannot be used"),
    event("67c07e1f6b664fe1809971291d5b79c4", "model is being loaded"),
    event("41a07a7278f04a21b3c1849d40377d29", "model open"),
    event("523cc21d276e4db789e075bbe2654135", "model unloaded"),
    event("a7b663a707b94f8d939f0b8c84f669f4", "model not loaded"),
    event("f7a86c4768164047afd692f1179e7b99", "model file verified"),
    event("e3f268a4d3a5448e85dea3b49025857d", "that a model's file was verified is not remembered"),
    event("bf64a7a526424851936ea8f4cbb06391", "model added to the store"),
    event("b8ed394541934338bfa97ad1a4b04fa6", "model not added to the store"),
    event("3a3b0f2c32fd4550ada3cab9944de1be", "longer than the model was trained for"),
    event(
        "557d4e72b2664479a82db9c170652391",
        "the device has no slow tier: no more tokens than these are answered at a time",
    ),
    event(
        "f8c2aad748284e49b68c37a05a6ac9ee",
        "the device has no room for all tokens wanted at a time, its pool is made smaller",
    ),
    event("c0807e8676444dbe981c0e67d18fd421", "model leased"),
    event("7da2787253bf4ebf80fc07f6f36529e3", "lease of a model ended"),
    event("18a7634ae4624b4d940def90ed6bb0df", "model not leased"),
    event("4f4ae7d450df4feaa2625affc3a40d98", "another device takes over"),
    event("2da5aa7830804de7a80e219adb0c3292", "used all the same: no other device could take over"),
    event("44b9ea7b15ab4cddaf32664d66d20dc7", "preferred device is not back yet"),
    event("3f613155c91a4a1eafc555f5f1511225", "the next device fails at the same step: no strike"),
    event("12b63f5ba26c4f4faa18f740770e533e", "step failed again, each sequence runs alone"),
    event("82a0204777b444b381bea363d3b279fa", "queue lost, trying again on a new one"),
    event("2074f9ade4544071bd15cdfd7d39f871", "the plugin reports a device event"),
    event("1fe80e6b45514eda84c2392df2b2d2df", "strike not noted"),
    event("4d0d8ce1dbff431bb83b4aace8235f2f", "quarantine cannot be read, no plugin is refused by it"),
    event("9cbf3f0706f948c5a2ff0f30710c0629", "the quarantine of plugins cannot be read and begins empty"),
    event("3f46fcdd32ac43608ec8a3dd4ccc7734", "engine.isolation is none: what this plugin breaks ends the daemon"),
    event("f4a32598f5df46dca5a433405fc0b12d", "plugin loaded"),
    event("66f87f9d540347ce954b50bd6965e3bf", "plugin loaded in a host of its own"),
    event("8df8c3eaf37f433ab50cb5b6ab4b29c7", "plugin host started"),
    event("3379a82b619f40b6b558d24c4268b059", "plugin host lost"),
    event("df8ce2a7c37344c3955863c16065a766", "a killed plugin host does not end: a driver holds it in the kernel"),
    event("f1ac61fbf2744199a6e1c993a37807f2", "lines of the plugin host dropped: it says too much"),
    event("015fe65ea9e74a78a6aef235892b83ea", "this kernel has no Landlock: the plugin may open any file of its user"),
    event("5dc2898d0c94410f9c741bc32f861374", "this kernel's Landlock confines the plugin in part only"),
    event("5388d97624e24100960a5309b801aef3", "system calls of the plugin are not filtered"),
    event("de30d21942a9459d9c2c0a8ea785cd5b", "the slow tier is read by threads, as io_uring cannot be used"),
    event("dd9bfa7e9bb74a6781320725339ef7f1", "session tidied"),
    event("b608896d970844a8adc06fc71d5f50bc", "session cannot be read again"),
    event("2ff5225f39c84450b47abfd2073cde27", "sessions past their retention could not be deleted"),
    event("8fbf2adc703d4337b9e0b744329c6f31", "block not saved, it would be computed again"),
    event("bf9337696b8f49d2891d3ffb3c30e854", "block cannot be read, it is computed again"),
    event("0c59b4e9d6284ac291a6d53ea7c0733b", "blocks cannot be read, they are computed again"),
    event("783921569183408893e6713d08b49787", "block could not be copied, it is not saved"),
    event("77643c913f2741738c92f14121e00799", "blocks could not be restored, they are computed again"),
    event("27ed37a3c2634138bfd744188611e46f", "daemons have ended at this answer, it waits to be asked for"),
    event("640c4ca390f54298abfe2af8f35a6d13", "answer that was cut goes on by itself"),
    event("23bebfea294b48bcba8e122ae448826a", "answer does not go on by itself, only when it is asked for"),
    event("44be9a9cb42646d68a9748acbc23f283", "block could not be written into the slow tier"),
    event("515a46e9828a4f9ebde01ff81071008b", "block could not be moved in the slow tier"),
    event("510ccbf80ade4f46bb25af6934232c9a", "on D-Bus"),
    event("03b2b4aeb0284778b7b5aa2c4e25082b", "who leaves the bus is not heard"),
    event("5a3f9eada0194063a0b678df999811fe", "MQTT is not served"),
    event("c48291be68474d9e81de8a6f8486b771", "MQTT is not served until its journal can be opened"),
    event("11446a677e104613a98187867998aee4", "MQTT is not served until its files can be read"),
    event("841859f385784863a6970da4e9158ecf", "no connection to the MQTT broker; trying again"),
    event("6d1a06ecac0242099d0e037c0f18ebc8", "the MQTT connection takes nothing; connecting anew"),
    event("64c3e9c0be69433091144eee14e18ceb", "the broker did not take a message"),
    event("d3460ad89f1e43bca367d91aece8c4c6", "the broker did not take an answer"),
    event("5df8098046d9481ba9b726f974128205", "the end of the MQTT journal was torn and is cut off"),
    event("546e8cff87054ccdbf23f1af50c1c082", "the MQTT journal could not be written anew"),
    event("fd73cad4bd6b4f5684969c4c3813d676", "the MQTT journal can be written again"),
    event("db350dbfd8fa4a0291b30f736ec001b8", "upstream engine answers"),
    event("daae549a0f3148559ef9c0b0a18b7b78", "upstream engine does not answer"),
];

#[cfg(test)]
mod tests {
    use super::super::journal::field;
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

    /// A call that logs, as it is written.
    #[derive(Debug, Default)]
    struct Logged {
        /// Its last string.
        text: String,
        /// Names of its values; what else stands before the semicolon may be among them.
        keys: Vec<String>,
    }

    /// The calls in a source file that begin with one of `macros`.
    fn logged(source: &str, macros: &[&str]) -> Vec<Logged> {
        let code = source.split("#[cfg(test)]\nmod tests").next().unwrap();
        let mut calls = Vec::new();
        for (at, name) in macros.iter().flat_map(|name| code.match_indices(name)) {
            let (mut depth, mut text, mut call) = (1, None::<String>, Logged::default());
            let (mut value, mut values) = (String::new(), Vec::new());
            let mut letters = code[at + name.len()..].chars();
            while depth > 0 {
                let letter = letters.next().unwrap();
                match (&mut text, letter) {
                    (Some(inside), '\\') => inside.extend(letters.next()),
                    (Some(_), '"') => call.text = text.take().unwrap(),
                    (Some(inside), letter) => inside.push(letter),
                    (None, '"') => text = Some(String::new()),
                    (None, '(' | '[' | '{') => depth += 1,
                    (None, ')' | ']' | '}') => depth -= 1,
                    (None, ',' | ';') if depth == 1 => values.push(std::mem::take(&mut value)),
                    (None, letter) => value.push(letter),
                }
                if letter == ';' && depth == 1 && text.is_none() {
                    call.keys = values.iter().map(|value| key_of(value)).collect();
                }
            }
            calls.push(call);
        }
        calls
    }

    /// The name of a value in a call that logs, as `reason:% = error`.
    fn key_of(value: &str) -> String {
        value.trim().chars().take_while(|c| c.is_ascii_alphanumeric() || *c == '_').collect()
    }

    /// The fields whose values the text of an event in the catalogue has.
    fn quoted(event: &Event) -> Vec<&'static str> {
        let entry = CATALOGUE.split("\n-- ").find(|entry| entry.starts_with(event.id)).unwrap();
        entry.split('@').filter(|word| word.starts_with("SPARSED_")).collect()
    }

    /// The journal shows a field's name where its value is to be and there is none.
    #[test]
    fn each_line_has_the_values_that_its_explanation_quotes() {
        let macros = ["log::error!(", "log::warn!(", "log::info!(", "log::debug!(", "log::log!("];
        let mut files = Vec::new();
        sources(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/..")), &mut files);
        let mut n = 0;
        for path in &files {
            for call in logged(&std::fs::read_to_string(path).unwrap(), &macros) {
                let Some(event) = EVENTS.iter().find(|event| event.text == call.text) else { continue };
                n += 1;
                let fields: Vec<String> = call.keys.iter().map(|key| field(key)).collect();
                for quoted in quoted(event) {
                    // systemd knows fields by capitals and underscores here: one with a digit stays as it is written.
                    assert!(quoted.chars().all(|c| c.is_ascii_uppercase() || c == '_'), "{call:?}: {quoted}");
                    assert!(fields.iter().any(|field| field == quoted), "{}: {call:?}: {quoted}", path.display());
                }
            }
        }
        assert!(n > 100, "{n} lines were found");
        // What a plugin says has no values.
        let relayed = |event: &&Event| RELAYED.contains(&event.text);
        assert!(EVENTS.iter().filter(relayed).all(|event| quoted(event).is_empty()));
        let call = logged("log::log!(level, a:% = f(x, \"y; z\"), b; \"c\")", &macros).remove(0);
        assert_eq!((call.keys.as_slice(), call.text.as_str()), (&["level", "a", "b"].map(str::to_owned)[..], "c"));
    }

    /// What is wrong is explained, whoever says it. Below `warn` it is whoever writes a line who decides.
    #[test]
    fn each_error_and_each_warning_is_an_event() {
        let macros = ["log::error!(", "log::warn!(", "log::log!("];
        let mut files = Vec::new();
        sources(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/..")), &mut files);
        let mut n = 0;
        for path in &files {
            let source = std::fs::read_to_string(path).unwrap();
            // A macro under another name would not be seen.
            assert!(!source.contains(" warn!(") && !source.contains(" error!("), "{}", path.display());
            for Logged { text, .. } in logged(&source, &macros) {
                n += 1;
                // What plugins say.
                let is_relayed = ["{message}", "{line}"].contains(&text.as_str());
                let is_event = id_of(&text).is_some() || relayed_id_of(&text).is_some();
                assert!(is_relayed || is_event, "{}: \"{text}\" has no id", path.display());
            }
        }
        assert!(n > 60, "{n} lines were found");
        let found = logged("log::warn!(a = f(\")\"); \"a \\\"b\"); #[cfg(test)]\nmod tests log::warn!(", &macros);
        assert!(found.len() == 1 && found[0].text == "a \"b", "{found:?}");
    }

    /// The text of an event is what some line says, so that a line that is worded anew does not lose its id unseen.
    #[test]
    fn each_event_is_logged_somewhere() {
        let mut files = Vec::new();
        sources(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/..")), &mut files);
        sources(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../plugins/cpu/src")), &mut files);
        let texts: Vec<String> = files.iter().map(|path| std::fs::read_to_string(path).unwrap()).collect();
        for event in EVENTS {
            // One of a plugin may go on with a reason.
            let quoted = format!("\"{}{}", event.text, if RELAYED.contains(&event.text) { "" } else { "\"" });
            assert!(texts.iter().any(|text| text.contains(&quoted)), "nobody logs {quoted}");
        }
    }
}
