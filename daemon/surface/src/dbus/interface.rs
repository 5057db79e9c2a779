//! What does `org.sparsed1` look like? The tables of its methods, properties and signals.
//!
//! A call is looked up here before anything of it is read: what has no row, or other arguments than its row, is
//! refused.
//! `xml.rs` makes the introspection data of the same rows.

use Changes::{Announced, Constant, Never, Noted};

/// The bus name.
pub(super) const NAME: &str = "org.sparsed1";
/// The manager's object; all others are below it.
pub(super) const ROOT: &str = "/org/sparsed1";

/// What a call asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verb {
    Ping,
    Introspect,
    Get,
    GetAll,
    Set,
    Generate,
    GenerateFromFd,
    GetStatus,
    ListModels,
    Tokenize,
    Detokenize,
    Lease,
    KeepModel,
    AddModel,
    CreateSession,
    ListSessions,
    ImportSession,
    ListSessionsOf,
    DeleteSessionOf,
    GetMessages,
    Continue,
    Fork,
    Truncate,
    Checkpoint,
    Rename,
    Pin,
    Change,
    Export,
    Delete,
    Cancel,
}

/// A name and a D-Bus type.
pub(super) type Argument = (&'static str, &'static str);

/// A row of an interface.
#[derive(Debug)]
pub(super) struct Method {
    pub(super) verb: Verb,
    pub(super) name: &'static str,
    pub(super) takes: &'static [Argument],
    pub(super) gives: &'static [Argument],
    pub(super) doc: &'static str,
}

/// What is said when a property changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Changes {
    /// Its value, at most once in three seconds.
    Announced,
    /// That it changed, at most once in three seconds.
    Noted,
    /// Nothing: it does not change.
    Constant,
    /// Nothing, as it changes with every look, or is a user's own: whoever wants to know asks.
    Never,
}

/// A property; all are read only.
#[derive(Debug)]
pub(super) struct Property {
    pub(super) name: &'static str,
    pub(super) kind: &'static str,
    pub(super) changes: Changes,
    pub(super) doc: &'static str,
}

/// What an object says by itself.
#[derive(Debug)]
pub(super) struct Signal {
    pub(super) name: &'static str,
    pub(super) carries: &'static [Argument],
    pub(super) doc: &'static str,
}

/// All that an object has under one name.
#[derive(Debug)]
pub(super) struct Interface {
    pub(super) name: &'static str,
    pub(super) methods: &'static [Method],
    pub(super) properties: &'static [Property],
    pub(super) signals: &'static [Signal],
}

const fn method(
    verb: Verb,
    name: &'static str,
    takes: &'static [Argument],
    gives: &'static [Argument],
    doc: &'static str,
) -> Method {
    Method { verb, name, takes, gives, doc }
}

const fn property(name: &'static str, kind: &'static str, changes: Changes, doc: &'static str) -> Property {
    Property { name, kind, changes, doc }
}

/// `/org/sparsed1`
pub(super) static MANAGER: Interface = Interface {
    name: "org.sparsed1.Manager",
    methods: &[
        method(
            Verb::Generate,
            "Generate",
            &[("body", "s"), ("options", "a{sv}")],
            &[("request", "o"), ("answer", "h")],
            "Asks for an answer. The body is OpenAI's JSON for a chat completion, at most 1 MiB. The answer comes \
             through a pipe: the object, or with \"stream\": true its chunks, one on a line; its end is the end of \
             the pipe. Closing the pipe cancels the request, and so does leaving the bus. \
             Options: endpoint s (chat.completions or completions), handle_token s (the last part of the request's \
             path), detach b (goes on when the caller leaves the bus, as long as the pipe is open).",
        ),
        method(
            Verb::GenerateFromFd,
            "GenerateFromFd",
            &[("body", "h"), ("options", "a{sv}")],
            &[("request", "o"), ("answer", "h")],
            "As Generate, with a body in a memfd that is sealed against writing, growing and shrinking; at most \
             limits.body bytes.",
        ),
        method(Verb::GetStatus, "GetStatus", &[], &[("status", "s")], "The JSON of GET /v1/status."),
        method(Verb::ListModels, "ListModels", &[], &[("models", "s")], "The JSON of GET /v1/models."),
        method(
            Verb::Tokenize,
            "Tokenize",
            &[("body", "s")],
            &[("tokens", "s")],
            "The tokens of a text or a conversation: body and answer are the JSON of POST /tokenize, at most 1 MiB each.",
        ),
        method(
            Verb::Detokenize,
            "Detokenize",
            &[("body", "s")],
            &[("text", "s")],
            "The text of tokens: body and answer are the JSON of POST /detokenize, at most 1 MiB each.",
        ),
        method(
            Verb::Lease,
            "Lease",
            &[("model", "s")],
            &[("lease", "h")],
            "Has the model loaded, and keeps it in memory as long as the descriptor is open, in whichever process. \
             Returns at once; nothing is ever to be read from it but its end, which says that the model could not be \
             loaded.",
        ),
        method(
            Verb::KeepModel,
            "KeepModel",
            &[("model", "s"), ("seconds", "x")],
            &[],
            "How long the model stays in memory when nobody needs it: 0: it leaves, less: as long as there is memory. \
             Holds until somebody says otherwise or it is loaded anew; not for a model that the configuration keeps.",
        ),
        method(
            Verb::AddModel,
            "AddModel",
            &[("file", "h"), ("name", "s"), ("options", "a{sv}")],
            &[("request", "o"), ("progress", "h")],
            "Copies a GGUF into the store of models, where the name stands for it. The file is plain and open for \
             reading, and not on FUSE; it is read from its beginning. The pipe has a line of JSON four times a second \
             with stage, done_bytes and total_bytes; the last one has sha256, bytes and next, which says how the \
             model comes to be served, or error. Closing the pipe ends it, and so do Cancel and leaving the bus; then \
             nothing is left. One at a time. Options: sha256 s (what it must be), handle_token s, detach b, as for \
             Generate. For root, or with polkit's org.sparsed1.add-models.",
        ),
        method(
            Verb::CreateSession,
            "CreateSession",
            &[("options", "a{sv}")],
            &[("session", "o")],
            "Makes a conversation that the daemon keeps. Options: model s, title s, pinned b, durability s (token, \
             turn, none), context_full s (error, truncate-oldest). Its turns are Generate with \"session_id\".",
        ),
        method(
            Verb::ListSessions,
            "ListSessions",
            &[],
            &[("sessions", "a(oa{sv})")],
            "The caller's sessions with their properties, the one used last first.",
        ),
        method(
            Verb::ImportSession,
            "ImportSession",
            &[("file", "h")],
            &[("session", "o")],
            "A session from what Export gave, in a memfd that is sealed as for GenerateFromFd.",
        ),
        method(
            Verb::ListSessionsOf,
            "ListSessionsOf",
            &[("uid", "u")],
            &[("sessions", "aa{sv}")],
            "Another user's sessions, without their titles. For root, or with polkit's \
             org.sparsed1.manage-sessions-of-others.",
        ),
        method(
            Verb::DeleteSessionOf,
            "DeleteSessionOf",
            &[("uid", "u"), ("id", "s")],
            &[],
            "Deletes another user's session. Allowed as ListSessionsOf.",
        ),
    ],
    properties: &[
        property("Version", "s", Constant, "The daemon's version."),
        property("State", "s", Announced, "starting, ready, degraded, recovering or failed."),
        property("StatusText", "s", Announced, "The same for people."),
        property("Tainted", "b", Announced, "Whether plugins of others have been loaded."),
        property("ThirdPartyPlugins", "as", Announced, "Which ones, as id and version."),
        property("Device", "s", Announced, "The device that computes."),
        property("DeviceState", "s", Announced, "loading, ready, recovering or unused."),
        property(
            "DeviceFault",
            "s",
            Announced,
            "Why a device was lost or could not be had, the last time; empty: never.",
        ),
        property("DeviceFaults", "t", Noted, "How often that happened since the start."),
        property("Models", "as", Announced, "Names of the models that answer."),
        property(
            "ModelStates",
            "a{ss}",
            Announced,
            "All models by name: unloaded, loading, ready or failed, those of engines elsewhere connecting, ready or \
             unreachable.",
        ),
        property("RunningRequests", "u", Announced, "Answers under way, of all doors and users."),
        property("QueuedRequests", "u", Announced, "Requests that wait for their turn."),
        property("KvBlocksUsed", "u", Noted, "Blocks of the KV pools that somebody holds."),
        property("KvBlocksTotal", "u", Noted, "Blocks of the KV pools."),
        property("MemoryLimit", "t", Never, "Bytes that the process may take by the tightest limit; 0: none is known."),
        property("MemoryLimitedBy", "s", Noted, "config, cgroup_max, cgroup_high, machine or device; empty: none."),
        property("MemoryForKv", "t", Never, "Bytes of the limit that are for KV caches; 0: none is known."),
        property("MemoryHeadroom", "t", Never, "Bytes that may be taken yet, at the last look; 0: none, or not known."),
        property("MemoryPressure", "s", Announced, "none, some or critical."),
        property("SampledTokens", "t", Noted, "Tokens of answers since the start."),
    ],
    signals: &[],
};

/// `/org/sparsed1/sessions/<id>`
pub(super) static SESSION: Interface = Interface {
    name: "org.sparsed1.Session",
    methods: &[
        method(Verb::GetMessages, "GetMessages", &[], &[("messages", "s")], "All messages, as a JSON list."),
        method(
            Verb::Continue,
            "Continue",
            &[("options", "a{sv}")],
            &[("request", "o"), ("answer", "h")],
            "The last answer, which was cut: once more from its first token, and on. Options: stream b, \
             handle_token s, detach b, as for Manager.Generate.",
        ),
        method(
            Verb::Fork,
            "Fork",
            &[("options", "a{sv}")],
            &[("session", "o")],
            "A new session that begins as this one. Options: turns u (so many of the first ones).",
        ),
        method(Verb::Truncate, "Truncate", &[("turns", "u")], &[], "Forgets all but the first turns."),
        method(Verb::Checkpoint, "Checkpoint", &[], &[], "Returns when all that was said is on the disk."),
        method(Verb::Rename, "Rename", &[("title", "s")], &[], "Gives it another title."),
        method(Verb::Pin, "Pin", &[("pinned", "b")], &[], "Whether its files are the last to go."),
        method(
            Verb::Change,
            "Change",
            &[("options", "a{sv}")],
            &[],
            "Changes what the options name: those of Manager.CreateSession but model.",
        ),
        method(Verb::Export, "Export", &[], &[("file", "h")], "All of it in a sealed memfd, not encrypted."),
        method(Verb::Delete, "Delete", &[], &[], "Destroys its key and removes its files."),
    ],
    properties: &[
        property("Id", "s", Constant, "What \"session_id\" calls it."),
        property("Model", "s", Constant, "The model's name."),
        property("Title", "s", Never, "What it is about."),
        property("Created", "t", Constant, "Seconds since 1970."),
        property("LastUsed", "t", Never, "Seconds since 1970."),
        property("State", "s", Never, "idle, answering or interrupted."),
        property("Turns", "u", Never, "Questions with their answers."),
        property("Tokens", "u", Never, "Of all turns."),
        property("Pinned", "b", Never, "Whether its files are the last to go."),
        property("DiskBytes", "t", Never, "What its files take."),
        property("Damaged", "b", Never, "Whether its files are not what was written."),
    ],
    signals: &[],
};

/// `/org/sparsed1/requests/<sender>/<token>`
pub(super) static REQUEST: Interface = Interface {
    name: "org.sparsed1.Request",
    methods: &[method(Verb::Cancel, "Cancel", &[], &[], "Ends the answer where it is.")],
    properties: &[
        property("State", "s", Never, "preparing or answering; when it has ended the object is gone."),
        property("Lines", "t", Never, "Lines that were written into the pipe."),
    ],
    signals: &[Signal {
        name: "Finished",
        carries: &[("reason", "s"), ("usage", "a{sv}")],
        doc: "To the caller alone, once, before the object goes: OpenAI's finish_reason, or added for a model, or \
              cancelled, slow_consumer, or the code of an error. usage has prompt_tokens, cached_tokens and \
              completion_tokens, as u, when an answer is complete.",
    }],
};

/// What every object has.
pub(super) static PEER: Interface = Interface {
    name: "org.freedesktop.DBus.Peer",
    methods: &[method(Verb::Ping, "Ping", &[], &[], "")],
    properties: &[],
    signals: &[],
};

/// What every object has.
pub(super) static INTROSPECTABLE: Interface = Interface {
    name: "org.freedesktop.DBus.Introspectable",
    methods: &[method(Verb::Introspect, "Introspect", &[], &[("xml_data", "s")], "")],
    properties: &[],
    signals: &[],
};

/// What objects with properties have.
pub(super) static PROPERTIES: Interface = Interface {
    name: "org.freedesktop.DBus.Properties",
    methods: &[
        method(Verb::Get, "Get", &[("interface_name", "s"), ("property_name", "s")], &[("value", "v")], ""),
        method(Verb::GetAll, "GetAll", &[("interface_name", "s")], &[("properties", "a{sv}")], ""),
        method(Verb::Set, "Set", &[("interface_name", "s"), ("property_name", "s"), ("value", "v")], &[], ""),
    ],
    properties: &[],
    signals: &[Signal {
        name: "PropertiesChanged",
        carries: &[("interface_name", "s"), ("changed_properties", "a{sv}"), ("invalidated_properties", "as")],
        doc: "",
    }],
};

impl Method {
    /// The signature of its arguments.
    pub(super) fn signature(&self) -> String {
        self.takes.iter().map(|(_, kind)| *kind).collect()
    }
}

impl Interface {
    /// The row of a member.
    pub(super) fn method(&self, member: &str) -> Option<&'static Method> {
        self.methods.iter().find(|method| method.name == member)
    }
}
