//! Which topic is what? The tree below `{root}`, who asks by a request's topic, and where answers may go.
//!
//! Identity is the `<client>` segment of the request's topic: the broker's ACL must let a client publish below its own
//! segment only (mosquitto: `pattern write sparsed/v1/+/req/%c/#`). Answers go where the request says, so the daemon
//! must not lend a client its own rights: reply topics are matched against a list, and what the tree has for one client
//! (`res/<client>`, `reply/<client>`) is closed to all others, whether that one is known here or not.

/// Who asks without a segment of its own.
pub(super) const ANONYMOUS: &str = "anonymous";
/// Longest topic in bytes that a request may name.
const TOPIC_BYTES_MAX: usize = 512;
/// Most levels of it. A broker may take one that is deeper for a broken packet, and go.
const TOPIC_LEVELS_MAX: usize = 32;
/// Longest segment of a client, node, pool or id.
const SEGMENT_BYTES_MAX: usize = 128;

/// What is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Op {
    /// A chat completion.
    Chat,
    /// A completion.
    Complete,
    /// The tokens of a text.
    Tokenize,
    /// The text of tokens.
    Detokenize,
    /// A verb of sessions.
    Session,
    /// The end of another request of the same client.
    Cancel,
}

impl Op {
    /// All of them by their names in topics.
    pub(super) const ALL: [(&'static str, Self); 6] = [
        ("chat", Self::Chat),
        ("complete", Self::Complete),
        ("tokenize", Self::Tokenize),
        ("detokenize", Self::Detokenize),
        ("session", Self::Session),
        ("cancel", Self::Cancel),
    ];
}

/// Where a request came in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Place {
    /// Who asks.
    pub(super) client: String,
    /// What; `None`: nothing that there is.
    pub(super) op: Option<Op>,
    /// By the pool's topic, not by this node's.
    pub(super) pool: bool,
}

/// The topics of this node.
#[derive(Clone, Debug)]
pub(super) struct Topics {
    root: String,
    node: String,
    pool: Option<String>,
    /// Filters; `{client}` in them stands for who asks.
    replies: Vec<String>,
}

impl Topics {
    /// `replies` are filters of topics that answers may go to, beside the tree's own.
    pub(super) fn new(root: &str, node: &str, pool: Option<&str>, replies: &[String]) -> Self {
        let own = [format!("{root}/+/res/#"), format!("{root}/pool/+/res/#"), format!("{root}/reply/#")];
        let replies = own.into_iter().chain(replies.iter().cloned()).collect();
        Self { root: root.to_owned(), node: node.to_owned(), pool: pool.map(str::to_owned), replies }
    }

    /// The name of this node.
    pub(super) fn node(&self) -> &str {
        &self.node
    }

    /// Filters of requests to this node.
    pub(super) fn direct(&self) -> Vec<String> {
        [&["+"][..], &["+", "+"]].map(|rest| format!("{}/{}/req/{}", self.root, self.node, rest.join("/"))).into()
    }

    /// Filters of requests to its pool, none without one.
    pub(super) fn pooled(&self) -> Vec<String> {
        let filters =
            |pool: &String| ["+", "+/+"].map(|rest| format!("$share/{pool}/{}/pool/{pool}/req/{rest}", self.root));
        self.pool.as_ref().map(filters).into_iter().flatten().collect()
    }

    /// A topic of this node's own.
    pub(super) fn own(&self, name: &str) -> String {
        format!("{}/{}/{name}", self.root, self.node)
    }

    /// What a topic asks, if it is one for requests.
    pub(super) fn place(&self, topic: &str) -> Option<Place> {
        let rest = topic.strip_prefix(&self.root)?.strip_prefix('/')?;
        let direct = rest.strip_prefix(&self.node).and_then(|rest| rest.strip_prefix("/req/"));
        let pooled = || {
            let pool = self.pool.as_ref()?;
            rest.strip_prefix("pool/")?.strip_prefix(pool)?.strip_prefix("/req/")
        };
        let (rest, pool) = direct.map(|rest| (rest, false)).or_else(|| Some((pooled()?, true)))?;
        let (client, op) = rest.rsplit_once('/').unwrap_or((ANONYMOUS, rest));
        let op = Op::ALL.into_iter().find(|(name, _)| *name == op).map(|(_, op)| op);
        is_client(client).then(|| Place { client: client.to_owned(), op, pool })
    }

    /// Where an answer goes when its request does not say.
    pub(super) fn reply(&self, place: &Place, id: &str) -> String {
        let client = &place.client;
        match &self.pool {
            Some(pool) if place.pool => format!("{}/pool/{pool}/res/{client}/{id}", self.root),
            _ => format!("{}/{}/res/{client}/{id}", self.root, self.node),
        }
    }

    /// Whether an answer to `client` may go to `topic`.
    ///
    /// # Errors
    /// Why not.
    pub(super) fn check_reply(&self, client: &str, topic: &str) -> Result<(), &'static str> {
        if topic.is_empty() || topic.len() > TOPIC_BYTES_MAX || !topic.chars().all(is_text) {
            return Err("is no topic");
        }
        if topic.split('/').count() > TOPIC_LEVELS_MAX {
            return Err("has more than 32 levels");
        }
        if topic.contains(['+', '#']) || topic.starts_with('$') {
            return Err("has a wildcard, or begins with '$'");
        }
        if !self.replies.iter().any(|filter| matches(&filter.replace("{client}", client), topic)) {
            return Err("is not among the topics that answers may go to (mqtt.reply_topics)");
        }
        if self.owner_of(topic).is_some_and(|owner| owner != client) {
            return Err("is another client's");
        }
        Ok(())
    }

    /// Whose topic of the tree's it is: `<client>` of `{root}/reply/<client>/...` and `{root}/{node}/res/<client>/...`.
    fn owner_of<'a>(&self, topic: &'a str) -> Option<&'a str> {
        let rest = topic.strip_prefix(&self.root)?.strip_prefix('/')?;
        let levels: Vec<&str> = rest.split('/').collect();
        match levels.as_slice() {
            ["reply", below @ ..] | ["pool", _, "res", below @ ..] | [_, "res", below @ ..] => {
                Some(below.first().copied().unwrap_or_default())
            }
            _ => None,
        }
    }
}

/// Whether a client may have this name: it is echoed in topics, and else only compared and hashed.
fn is_client(text: &str) -> bool {
    !text.is_empty() && text.len() <= SEGMENT_BYTES_MAX && text.chars().all(|c| is_text(c) && !"/+#".contains(c))
}

/// Whether a broker takes it in a topic. It may take others for a broken packet, and go.
fn is_text(c: char) -> bool {
    !c.is_control() && u32::from(c) & 0xfffe != 0xfffe && !('\u{fdd0}'..='\u{fdef}').contains(&c)
}

/// Whether `text` may stand between two slashes of a topic that we make of it: an id.
pub(super) fn is_segment(text: &str) -> bool {
    let is_plain = |c: char| c.is_alphanumeric() || "-_.:@~".contains(c);
    !text.is_empty() && text.len() <= SEGMENT_BYTES_MAX && text.chars().all(is_plain)
}

/// MQTT's filters: `+` is one level, a last `#` any number of them.
fn matches(filter: &str, topic: &str) -> bool {
    let (mut filters, mut levels) = (filter.split('/'), topic.split('/'));
    loop {
        match (filters.next(), levels.next()) {
            (Some("#"), _) | (None, None) => return true,
            (Some("+"), Some(_)) => {}
            (Some(wanted), Some(level)) if wanted == level => {}
            _ => return false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn topics() -> Topics {
        Topics::new("s/v1", "box", Some("fleet"), &["home/{client}/answers".to_owned()])
    }

    #[test]
    fn a_requests_topic_says_who_asks_what() {
        let place = |topic: &str| topics().place(topic).map(|place| (place.client, place.op, place.pool));
        assert_eq!(place("s/v1/box/req/lamp/chat"), Some(("lamp".to_owned(), Some(Op::Chat), false)));
        assert_eq!(place("s/v1/box/req/cancel"), Some((ANONYMOUS.to_owned(), Some(Op::Cancel), false)));
        assert_eq!(place("s/v1/pool/fleet/req/a/tokenize"), Some(("a".to_owned(), Some(Op::Tokenize), true)));
        assert_eq!(place("s/v1/box/req/lamp/x"), Some(("lamp".to_owned(), None, false)));
        for none in ["s/v1/other/req/chat", "s/v1/pool/x/req/chat", "s/v1/box/req/a/b/chat", "s/v1/box/req//chat"] {
            assert_eq!(place(none), None, "{none}");
        }
    }

    #[test]
    fn a_client_may_have_any_name_that_is_one_level_of_a_topic() {
        for name in ["my device", "dev=1", "a,b;c", "{client}", "$x", "küche", "\u{1f980}", &"x".repeat(128)] {
            let topics = topics();
            let place = topics.place(&format!("s/v1/box/req/{name}/chat")).unwrap();
            assert_eq!(place.client, name);
            for reply in [topics.reply(&place, "7"), format!("s/v1/reply/{name}"), format!("home/{name}/answers")] {
                assert_eq!(topics.check_reply(name, &reply), Ok(()), "{reply}");
            }
        }
        for none in ["a\u{1}b", "\u{ffff}", "a+", "#", &"x".repeat(129)] {
            assert_eq!(topics().place(&format!("s/v1/box/req/{none}/chat")), None, "{none:?}");
        }
    }

    #[test]
    fn answers_go_only_where_their_asker_may_be() {
        let check = |topic: &str| topics().check_reply("lamp", topic);
        for allowed in [
            "s/v1/box/res/lamp/1",
            "s/v1/pool/fleet/res/lamp/1",
            "s/v1/reply/lamp",
            "s/v1/reply/lamp/any/thing",
            "home/lamp/answers",
        ] {
            assert_eq!(check(allowed), Ok(()), "{allowed}");
        }
        let denied = [
            "",
            "s/v1/box/res/tv/1",
            "s/v1/box/res/tv",
            "s/v1/box/res",
            "s/v1/pool/fleet/res/tv/1",
            "s/v1/box/req/lamp/chat",
            "$SYS/x",
            "s/v1/reply/tv",
            "s/v1/reply/tv/1",
            "s/v1/reply",
            "s/v1/reply/",
            "s/v1/reply/nobody/has/asked",
            "s/v1/reply/+",
            "s/v1/reply/#",
            "home/tv/answers",
            "s/v1/box/status",
        ];
        for topic in denied {
            assert!(check(topic).is_err(), "{topic}");
        }
        for broken in
            ["x".repeat(600), "x/".repeat(40), "\u{1}".to_owned(), "\u{ffff}".to_owned(), "\u{fdd0}".to_owned()]
        {
            assert!(check(&format!("s/v1/reply/lamp/{broken}")).is_err(), "{broken}");
        }
    }

    #[test]
    fn an_answers_own_topic_is_allowed() {
        let topics = topics();
        for pool in [false, true] {
            let place = Place { client: "lamp".to_owned(), op: Some(Op::Chat), pool };
            assert_eq!(topics.check_reply("lamp", &topics.reply(&place, "7")), Ok(()));
        }
    }
}
