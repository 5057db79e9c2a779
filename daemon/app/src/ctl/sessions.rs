//! `sparsectl sessions`: conversations that the daemon keeps.

use super::client::{Address, Client};
use super::run::written;
use super::{number, print, print_json, word};
use anyhow::{Context, bail};
use clap::Subcommand;
use serde_json::{Map, Value, json};
use std::fmt::Write;
use std::path::PathBuf;

/// List, read and change the conversations that the daemon keeps. A session may be named by the beginning of its id.
#[derive(Debug, clap::Args)]
pub(super) struct SessionsCommand {
    #[command(flatten)]
    address: Address,
    /// Print JSON.
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    verb: Option<Verb>,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// All of yours, the one used last first. The default.
    List,
    /// One with its messages.
    Show { id: String },
    /// Makes one, and prints its id.
    New {
        /// The model's name.
        #[arg(long)]
        model: Option<String>,
        #[command(flatten)]
        wishes: Wishes,
    },
    /// Changes one.
    Set {
        id: String,
        #[command(flatten)]
        wishes: Wishes,
    },
    /// Makes another one with the same beginning.
    Fork {
        id: String,
        /// Only so many turns of it.
        #[arg(long)]
        turns: Option<u32>,
    },
    /// Forgets all but the first turns.
    Truncate { id: String, turns: u32 },
    /// Has all of it survive a power cut from now on.
    Checkpoint { id: String },
    /// The last answer once more from its first token, and on from where it was cut.
    Continue { id: String },
    /// Writes one into a file, not encrypted; nobody but you may read it.
    Export {
        id: String,
        /// The file; there must be none yet.
        file: PathBuf,
    },
    /// Makes one of such a file.
    Import { file: PathBuf },
    /// Destroys their keys, then removes their files.
    Delete {
        #[arg(required = true)]
        ids: Vec<String>,
    },
}

/// What may be chosen of a session.
#[derive(Debug, clap::Args)]
struct Wishes {
    /// What it is about.
    #[arg(long)]
    title: Option<String>,
    /// Whether its files are the last to go.
    #[arg(long)]
    pinned: Option<bool>,
    /// What a power cut may lose: token (nothing that was sent), turn (a running answer), none (more).
    #[arg(long)]
    durability: Option<String>,
    /// What to do when the context is full: error or truncate-oldest.
    #[arg(long)]
    context_full: Option<String>,
}

impl Wishes {
    fn body(self) -> Value {
        let Self { title, pinned, durability, context_full } = self;
        let text = |name: &str, value: Option<String>| value.map(|value| (name.to_owned(), Value::String(value)));
        let mut body: Map<String, Value> =
            [text("title", title), text("durability", durability), text("context_full", context_full)]
                .into_iter()
                .flatten()
                .collect();
        body.extend(pinned.map(|pinned| ("pinned".to_owned(), Value::Bool(pinned))));
        Value::Object(body)
    }
}

impl SessionsCommand {
    pub(super) fn run(self) -> anyhow::Result<()> {
        crate::lifecycle::runtime()?
            .block_on(async { carry_out(&self.address.client(), self.verb.unwrap_or(Verb::List), self.json).await })
    }
}

async fn carry_out(client: &Client, verb: Verb, as_json: bool) -> anyhow::Result<()> {
    let one = async |id: &str| Ok::<_, anyhow::Error>(format!("/v1/sessions/{}", whole_id(client, id).await?));
    let done = match verb {
        Verb::List => {
            let list = client.get("/v1/sessions").await?;
            return if as_json { print_json(&list["data"]) } else { print(&list_text(&list["data"])) };
        }
        Verb::Show { id } => {
            let session = client.get(&one(&id).await?).await?;
            return if as_json { print_json(&session) } else { print(&session_text(&session)) };
        }
        Verb::New { model, wishes } => {
            let mut body = wishes.body();
            if let Some(model) = model {
                body["model"] = json!(model);
            }
            client.post("/v1/sessions", &body).await?
        }
        Verb::Set { id, wishes } => client.post(&one(&id).await?, &wishes.body()).await?,
        Verb::Fork { id, turns } => client.post(&(one(&id).await? + "/fork"), &json!({ "turns": turns })).await?,
        Verb::Truncate { id, turns } => {
            client.post(&(one(&id).await? + "/truncate"), &json!({ "turns": turns })).await?
        }
        Verb::Checkpoint { id } => client.post(&(one(&id).await? + "/checkpoint"), &json!({})).await?,
        Verb::Continue { id } => {
            let path = one(&id).await? + "/continue";
            if as_json {
                return print_json(&client.answer_at(&path, &json!({})).await?);
            }
            written(client.stream_at(&path, &json!({ "stream": true })).await?).await?;
            return print("");
        }
        Verb::Export { id, file } => return export(&client.get_file(&(one(&id).await? + "/export")).await?, &file),
        Verb::Import { file } => {
            let bytes = std::fs::read(&file).with_context(|| file.display().to_string())?;
            client.put_file("/v1/sessions/import", bytes).await?
        }
        Verb::Delete { ids } => {
            for id in ids {
                let gone = client.delete(&one(&id).await?).await?;
                print(word(&gone["id"]))?;
            }
            return Ok(());
        }
    };
    if as_json { print_json(&done) } else { print(word(&done["id"])) }
}

/// The id of the one session whose id begins so.
///
/// # Errors
/// None does, or several do.
pub(super) async fn whole_id(client: &Client, beginning: &str) -> anyhow::Result<String> {
    let list = client.get("/v1/sessions").await?;
    let ids = list["data"].as_array().into_iter().flatten().filter_map(|session| session["id"].as_str());
    let ids: Vec<&str> = ids.filter(|id| begins_so(id, beginning)).collect();
    match ids[..] {
        [id] => Ok(id.to_owned()),
        [] => bail!("there is no session '{beginning}'; `sparsectl sessions` lists yours"),
        _ => bail!("{} sessions begin with '{beginning}': {}", ids.len(), ids.join(" ")),
    }
}

/// With or without what all ids begin with.
fn begins_so(id: &str, beginning: &str) -> bool {
    !beginning.is_empty() && (id.starts_with(beginning) || id.trim_start_matches("sess_").starts_with(beginning))
}

fn export(bytes: &[u8], file: &PathBuf) -> anyhow::Result<()> {
    use std::io::Write as _;
    use std::os::unix::fs::OpenOptionsExt;
    let whole = || file.display().to_string();
    // What the daemon keeps encrypted: whoever else is on this box is not to read it because of a mask.
    let mut new = std::fs::File::options().write(true).create_new(true).mode(0o600).open(file).with_context(whole)?;
    new.write_all(bytes).and_then(|()| new.sync_all()).with_context(whole)
}

fn list_text(list: &Value) -> String {
    let mut text = format!("{:<37} {:<12} {:>5} {:>8} {:>9}  {}\n", "ID", "STATE", "TURNS", "TOKENS", "DISK", "TITLE");
    for session in list.as_array().into_iter().flatten() {
        let disk = session["disk_bytes"].as_u64().unwrap_or(0);
        let marks = [("pinned", " [pinned]"), ("damaged", " [damaged]")];
        let marks: String = marks.iter().filter(|(key, _)| is_set(&session[*key])).map(|(_, mark)| *mark).collect();
        let written = writeln!(
            text,
            "{:<37} {:<12} {:>5} {:>8} {:>6} MB  {}{marks}",
            word(&session["id"]),
            word(&session["state"]),
            number(&session["turns"]),
            number(&session["tokens"]),
            disk / 1_000_000,
            plain(word(&session["title"])),
        );
        written.expect("writing to a String cannot fail");
    }
    text.trim_end().to_owned()
}

fn session_text(session: &Value) -> String {
    let mut text = list_text(&json!([session]));
    for message in session["messages"].as_array().into_iter().flatten() {
        text += &format!("\n\n{}:\n", word(&message["role"]));
        text += &plain(message["content"].as_str().unwrap_or_default());
        if let Some(calls) = message["tool_calls"].as_array() {
            text += &plain(&serde_json::to_string(calls).unwrap_or_default());
        }
    }
    text
}

/// What somebody said, without what would command the terminal.
fn plain(text: &str) -> String {
    text.chars().map(|c| if c.is_control() && c != '\n' && c != '\t' { '\u{fffd}' } else { c }).collect()
}

/// A flag, or a reason.
fn is_set(value: &Value) -> bool {
    !matches!(value, Value::Null | Value::Bool(false))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_is_named_by_the_beginning_of_its_id() {
        assert!(begins_so("sess_12ab", "sess_1") && begins_so("sess_12ab", "12"));
        assert!(!begins_so("sess_12ab", "2ab") && !begins_so("sess_12ab", ""));
    }

    #[test]
    fn an_export_is_its_owners_alone_and_replaces_no_file() {
        use std::os::unix::fs::MetadataExt;
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("exported");
        export(b"said", &file).unwrap();
        assert_eq!((std::fs::read(&file).unwrap(), file.metadata().unwrap().mode() & 0o777), (b"said".to_vec(), 0o600));
        assert!(export(b"other", &file).is_err());
        assert_eq!(std::fs::read(&file).unwrap(), b"said");
    }

    #[test]
    fn a_list_has_a_row_for_each_and_commands_no_terminal() {
        let session = json!({
            "id": "sess_00", "state": "idle", "turns": 2, "tokens": 40, "disk_bytes": 3_000_000, "title": "\u{1b}[2Jx",
            "pinned": true, "damaged": null,
        });
        let text = list_text(&json!([session]));
        let row: Vec<&str> = text.lines().nth(1).unwrap().split_whitespace().collect();
        assert_eq!(row, ["sess_00", "idle", "2", "40", "3", "MB", "\u{fffd}[2Jx", "[pinned]"]);
    }

    #[test]
    fn only_what_was_chosen_is_sent() {
        let wishes = Wishes { title: Some("x".to_owned()), pinned: Some(false), durability: None, context_full: None };
        assert_eq!(wishes.body(), json!({ "title": "x", "pinned": false }));
    }
}
