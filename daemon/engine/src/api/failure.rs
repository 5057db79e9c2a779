//! Why is there no answer, or no more of it?

/// Why a request failed. Surfaces map each variant to their own codes, in one table each.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Failure {
    /// No such model is configured.
    #[error("model '{name}' is not configured; known are: {known}")]
    ModelNotFound {
        /// What was asked for.
        name: String,
        /// What there is.
        known: String,
    },
    /// The model is still being loaded.
    #[error("model '{name}' is loading")]
    ModelLoading {
        /// The model.
        name: String,
    },
    /// The model is not in memory, and this does not have it loaded.
    #[error("model '{name}' is not loaded; a request for an answer loads it")]
    ModelUnloaded {
        /// The model.
        name: String,
    },
    /// The model could not be loaded.
    #[error("model '{name}' cannot be served: {reason}")]
    ModelUnavailable {
        /// The model.
        name: String,
        /// Why not.
        reason: String,
    },
    /// The prompt leaves no room for an answer.
    #[error("the prompt has {have_tokens} tokens, the context holds {max_tokens}, the answer included")]
    ContextTooLong {
        /// Tokens of the prompt.
        have_tokens: usize,
        /// Tokens of the context.
        max_tokens: u32,
    },
    /// A parameter is not what it must be.
    #[error("'{param}' {reason}")]
    InvalidRequest {
        /// The parameter.
        param: String,
        /// What it must be.
        reason: String,
    },
    /// Too many requests wait.
    #[error("{limit} requests are waiting already; try again in {retry_after_s} s")]
    QueueFull {
        /// Requests that may wait.
        limit: u32,
        /// When to try again.
        retry_after_s: u32,
    },
    /// Too many requests of its owner wait.
    #[error("{limit} requests of this user are waiting already; try again in {retry_after_s} s")]
    UserQueueFull {
        /// Requests of one owner that may wait.
        limit: u32,
        /// When to try again.
        retry_after_s: u32,
    },
    /// Its owner has all the requests under way that one may have.
    #[error(
        "{limit} requests of this user are under way, which is all it may have at a time; try again in {retry_after_s} s"
    )]
    TooManyRequests {
        /// Requests of one owner that may be under way, by all doors together.
        limit: u32,
        /// When to try again.
        retry_after_s: u32,
    },
    /// Prompts of its owner that wait have too many tokens.
    #[error("{limit} tokens of this user's prompts may wait at a time; try again in {retry_after_s} s")]
    UserTokensFull {
        /// Tokens of one owner's prompts that may wait.
        limit: u64,
        /// When to try again.
        retry_after_s: u32,
    },
    /// It wants more of the KV cache than its owner may have.
    #[error("the request needs more than the {limit_bytes} bytes of the KV cache that one user may hold")]
    UserKvFull {
        /// Bytes of KV rows that one owner's requests may hold together.
        limit_bytes: u64,
    },
    /// Memory is short.
    #[error("memory is short; try again in {retry_after_s} s")]
    MemoryShort {
        /// When to try again.
        retry_after_s: u32,
    },
    /// Its deadline was over before it could begin, or, where a door waits for whole answers, before it had one.
    #[error("the request could not begin within its deadline of {deadline_ms} ms")]
    DeadlineExceeded {
        /// As the request had it.
        deadline_ms: u64,
    },
    /// The listener did not read for too long.
    #[error("the answer was not read for {limit_s} s")]
    SlowConsumer {
        /// How long a listener may be silent.
        limit_s: u64,
    },
    /// The answer cannot go on under its grammar: nothing is allowed, or a limit is reached.
    #[error("the answer cannot go on under its grammar: {reason}")]
    GrammarFailed {
        /// What happened.
        reason: String,
    },
    /// The device failed.
    #[error("the device failed: {reason}")]
    BackendFailed {
        /// What it said.
        reason: String,
    },
    /// The model is computed elsewhere, and what was asked for needs its tokens here.
    #[error(
        "model '{name}' is computed by another engine: chats and completions are passed on to it; it has no sessions, \
         stored responses or tokens here"
    )]
    ComputedElsewhere {
        /// The model.
        name: String,
    },
    /// The engine that computes the model cannot be reached.
    #[error("the engine that computes model '{name}' cannot be reached: {reason}")]
    UpstreamUnreachable {
        /// The model.
        name: String,
        /// Why not.
        reason: String,
    },
    /// The engine that computes the model took too long.
    #[error("the engine that computes model '{name}' took longer than {limit_s} s for {what}")]
    UpstreamLate {
        /// The model.
        name: String,
        /// For what.
        what: &'static str,
        /// How long it may take.
        limit_s: u64,
    },
    /// The engine that computes the model takes no more requests now.
    #[error("the engine that computes model '{name}' is busy; try again in {retry_after_s} s")]
    UpstreamBusy {
        /// The model.
        name: String,
        /// When to try again.
        retry_after_s: u32,
    },
    /// The engine that computes the model failed, or did not keep to the protocol.
    #[error("the engine that computes model '{name}' failed: {reason}")]
    UpstreamFailed {
        /// The model.
        name: String,
        /// What it did.
        reason: String,
    },
    /// The engine that computes the model refuses the request.
    #[error("the engine that computes model '{name}' refuses the request: {reason}")]
    UpstreamRefused {
        /// The model.
        name: String,
        /// The parameter, where it names one.
        param: Option<String>,
        /// What it said.
        reason: String,
    },
    /// The prompt is too long for the engine that computes the model.
    #[error("the engine that computes model '{name}' refuses the prompt: {reason}")]
    UpstreamContextTooLong {
        /// The model.
        name: String,
        /// What it said.
        reason: String,
    },
    /// The answer ended without a last event: its listener did not read in time, or the engine is gone.
    #[error("the answer was cut off: it was not read for too long, or the engine has ended")]
    CutOff,
    /// The daemon is stopping.
    #[error("the daemon is stopping")]
    ShuttingDown,
    /// The daemon keeps no sessions.
    #[error("this daemon keeps no sessions; set sessions.enabled")]
    SessionsOff,
    /// The disk that keeps the sessions cannot be used yet.
    #[error("no sessions are kept now: their disk cannot be used; try again in {retry_after_s} s")]
    SessionsAway {
        /// When to try again.
        retry_after_s: u32,
    },
    /// The few threads that carry verbs of sessions out did not come to this one.
    #[error(
        "sessions are busy: {waiting} request{} for their disk, of which {limit} are carried out at a time, and this \
         one has waited for {waited_s} s; try again in {retry_after_s} s",
        if *waiting == 1 { " waits" } else { "s wait" }
    )]
    SessionsOverloaded {
        /// Requests that wait, this one among them.
        waiting: usize,
        /// How many are carried out at a time.
        limit: usize,
        /// How long this one has waited.
        waited_s: u64,
        /// When to try again.
        retry_after_s: u32,
    },
    /// The caller has no such session.
    #[error("there is no session '{id}'")]
    SessionNotFound {
        /// What was asked for.
        id: String,
    },
    /// The session cannot be used so now.
    #[error("session '{id}' is {state}")]
    SessionBusy {
        /// The session.
        id: String,
        /// What it is.
        state: &'static str,
    },
    /// The daemon has cut the session's last answer, and it is to be finished before another turn begins.
    #[error("the last answer of session '{id}' was cut; it is to be finished first")]
    SessionCut {
        /// The session.
        id: String,
    },
    /// Another turn has come before one that goes on from a certain turn.
    #[error("session '{id}' has gone on meanwhile")]
    SessionWentOn {
        /// The session.
        id: String,
    },
    /// The session's tokens are another model's.
    #[error(
        "session '{id}' was made with another model that was called '{model}'; its tokens mean nothing to this one"
    )]
    SessionOfOtherModel {
        /// The session.
        id: String,
        /// Its model's name.
        model: String,
    },
    /// A quota of sessions.
    #[error("{what}: the limit is {limit}; delete a session, or raise the limit")]
    SessionLimit {
        /// Of what.
        what: &'static str,
        /// The limit.
        limit: u64,
    },
    /// A session's files are not what was written.
    #[error("the session is damaged: {reason}")]
    SessionDamaged {
        /// What is wrong.
        reason: String,
    },
    /// The disk took nothing more: what was said before is safe.
    #[error("the session could not be written: {reason}")]
    DiskFailed {
        /// What it said.
        reason: String,
    },
}

impl Failure {
    /// [`Failure::InvalidRequest`] for `param`.
    pub fn invalid(param: &str, reason: impl Into<String>) -> Self {
        Self::InvalidRequest { param: param.to_owned(), reason: reason.into() }
    }

    /// Whether the same request may be answered another time, and nothing need be changed for it: it was its time, its
    /// client, a device or a disk, what others ask, not itself. Every failure has its row, so that none is forgotten.
    pub fn may_pass(&self) -> bool {
        match self {
            Self::ModelLoading { .. }
            | Self::ModelUnloaded { .. }
            | Self::ModelUnavailable { .. }
            | Self::QueueFull { .. }
            | Self::UserQueueFull { .. }
            | Self::TooManyRequests { .. }
            | Self::UserTokensFull { .. }
            | Self::MemoryShort { .. }
            | Self::DeadlineExceeded { .. }
            | Self::SlowConsumer { .. }
            | Self::BackendFailed { .. }
            | Self::UpstreamUnreachable { .. }
            | Self::UpstreamLate { .. }
            | Self::UpstreamBusy { .. }
            | Self::UpstreamFailed { .. }
            | Self::CutOff
            | Self::ShuttingDown
            | Self::SessionsAway { .. }
            | Self::SessionsOverloaded { .. }
            | Self::SessionBusy { .. }
            | Self::SessionCut { .. }
            | Self::SessionWentOn { .. }
            | Self::DiskFailed { .. } => true,
            Self::ModelNotFound { .. }
            | Self::ContextTooLong { .. }
            | Self::InvalidRequest { .. }
            | Self::UserKvFull { .. }
            | Self::GrammarFailed { .. }
            | Self::ComputedElsewhere { .. }
            | Self::UpstreamRefused { .. }
            | Self::UpstreamContextTooLong { .. }
            | Self::SessionsOff
            | Self::SessionNotFound { .. }
            | Self::SessionOfOtherModel { .. }
            | Self::SessionLimit { .. }
            | Self::SessionDamaged { .. } => false,
        }
    }
}
