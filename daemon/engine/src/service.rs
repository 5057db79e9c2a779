//! What do surfaces hold? Names of models, a way to make prompts, and a way to ask for answers.
//!
//! A [`Service`] is shared by all surfaces. It never waits for the engine: requests go into a bounded inbox, answers
//! come back through each request's sink.

mod turns;

use crate::api::{ALTERNATIVES_MAX, ChatPrompt, Failure, Generate, Reading, Sink};
use crate::device::DeviceStatus;
use crate::durable::Restored;
use crate::grammar::{Compiler, Grammar, GrammarSpec};
use crate::memory::{Budget, Outlook};
use crate::progress::Progress;
use crate::scheduler::Load;
use crate::sessions::Sessions;
use crate::telemetry::{Board, Tally};
use crate::warm::Demoted;
use sparsed_model::{ChatRequest, Model, ModelError};
use sparsed_session::ImageShape;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{SyncSender, TrySendError};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// The model of requests that name none.
pub const DEFAULT_MODEL: &str = "default";

/// Shared by all surfaces; cheap to clone.
#[derive(Clone, Debug)]
pub struct Service {
    slots: Arc<[Arc<Slot>]>,
    inbox: SyncSender<Command>,
    shared: Arc<Shared>,
    /// Requests that the inbox holds.
    inbox_limit: u32,
    /// `None` where no sessions are kept.
    sessions: Option<Sessions>,
}

/// What the engine thread and the service tell each other beside requests.
#[derive(Debug)]
pub(crate) struct Shared {
    /// No new requests are taken.
    pub(crate) stopping: AtomicBool,
    /// Requests that are under way are given up too.
    pub(crate) ending: AtomicBool,
    /// Written by the engine when the device changes its state.
    pub(crate) device: Mutex<DeviceStatus>,
    /// Written by the engine at each turn.
    pub(crate) progress: Mutex<Progress>,
    /// The last look at the memory.
    pub(crate) outlook: Mutex<Outlook>,
    /// What KV caches may take; the engine knows the exact sizes of the rest once models are loaded.
    pub(crate) budget: Mutex<Budget>,
    /// The engine's time begins here.
    pub(crate) epoch: Instant,
}

/// What the engine thread is told.
pub(crate) enum Command {
    /// Answer a request of the model `slot`.
    Generate { slot: usize, request: Box<Generate>, sink: Box<dyn Sink> },
    /// An image of the model `slot` is written, or could not be.
    Written { slot: usize },
    /// What has become of a block of the model `slot` on its way to the slow tier.
    Demoted { slot: usize, demoted: Demoted },
    /// Images of the model `slot` that were asked for.
    Restored { slot: usize, restored: Restored },
    /// There is a new look at the memory.
    Look,
    /// Take nothing new; end when nothing runs any more.
    Drain,
    /// End now.
    Stop,
}

impl std::fmt::Debug for Command {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // A prompt is what somebody said: it stays out of logs.
        f.write_str(match self {
            Self::Generate { .. } => "Generate",
            Self::Written { .. } => "Written",
            Self::Demoted { .. } => "Demoted",
            Self::Restored { .. } => "Restored",
            Self::Look => "Look",
            Self::Drain => "Drain",
            Self::Stop => "Stop",
        })
    }
}

/// A configured model, loaded or not.
#[derive(Debug)]
pub(crate) struct Slot {
    pub(crate) name: String,
    /// Set once, when loading has ended: the model, or why there is none.
    pub(crate) outcome: OnceLock<Result<Arc<ServedModel>, String>>,
    /// Bytes uploaded, in thousandths of all.
    pub(crate) progress_permille: AtomicU64,
    /// The engine thread writes it after each step, status pages read it.
    pub(crate) stats: Mutex<Stats>,
    /// As `stats`: who waits, and what was decided.
    pub(crate) board: Mutex<Board>,
}

/// A model that answers.
#[derive(Debug)]
pub struct ServedModel {
    /// The file.
    pub model: Model,
    /// Tokens of prompt and answer together.
    pub max_context: u32,
    /// Bytes that one token holds in the KV pool.
    pub kv_bytes_per_token: u64,
    /// Tokens that attention selects, `None` when it reads all.
    pub top_k: Option<u32>,
    /// Seconds since 1970, when it was loaded.
    pub created: u64,
    /// Says which tokens there are: a session's tokens mean something to models with the same.
    pub(crate) vocabulary: [u8; 32],
    /// What the host images of its blocks are.
    pub(crate) images: ImageShape,
    /// Of requests that say what the answer must be.
    pub(crate) grammars: Compiler,
}

/// What a model's engine has done and holds.
#[derive(Clone, Copy, Debug, Default)]
pub struct Stats {
    /// Now.
    pub load: Load,
    /// Prompt and answer tokens that went through the model, since the start.
    pub computed_tokens: u64,
    /// Tokens that were sampled, since the start.
    pub sampled_tokens: u64,
    /// Steps, since the start.
    pub steps: u64,
    /// What became of requests.
    pub tally: Tally,
}

/// What a configured model is doing.
#[derive(Clone, Debug)]
pub enum ModelState {
    /// Being read and uploaded.
    Loading {
        /// Thousandths of the weights that are uploaded.
        progress_permille: u64,
    },
    /// Answers.
    Ready(Arc<ServedModel>),
    /// Does not, and why.
    Failed(String),
}

/// A configured model.
#[derive(Clone, Debug)]
pub struct ModelStatus {
    /// Its name in the configuration.
    pub name: String,
    /// What it is doing.
    pub state: ModelState,
    /// What its engine has done.
    pub stats: Stats,
    /// Who waits and runs, and what was decided about it.
    pub board: Board,
}

/// Values behind these locks are whole at any time, so a panic elsewhere has spoilt nothing.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Slot {
    pub(crate) fn new(name: String) -> Self {
        Self {
            name,
            outcome: OnceLock::new(),
            progress_permille: AtomicU64::new(0),
            stats: Mutex::new(Stats::default()),
            board: Mutex::new(Board::default()),
        }
    }

    pub(crate) fn set_stats(&self, stats: Stats) {
        *lock(&self.stats) = stats;
    }

    fn state(&self) -> ModelState {
        match self.outcome.get() {
            None => ModelState::Loading { progress_permille: self.progress_permille.load(Ordering::Relaxed) },
            Some(Err(reason)) => ModelState::Failed(reason.clone()),
            Some(Ok(model)) => ModelState::Ready(Arc::clone(model)),
        }
    }
}

impl Service {
    pub(crate) fn new(
        slots: Vec<Arc<Slot>>,
        inbox: SyncSender<Command>,
        inbox_limit: u32,
        shared: Arc<Shared>,
        sessions: Option<Sessions>,
    ) -> Self {
        Self { slots: slots.into(), inbox, shared, inbox_limit, sessions }
    }

    /// The device in use and how it is.
    pub fn device(&self) -> DeviceStatus {
        lock(&self.shared.device).clone()
    }

    /// Whether the engine gets anywhere, as of `now`: the service's watchdog is fed while it does.
    pub fn is_alive(&self, now: Instant) -> bool {
        lock(&self.shared.progress).is_alive(now.saturating_duration_since(self.shared.epoch))
    }

    /// What KV caches may take, and why.
    pub fn budget(&self) -> Budget {
        lock(&self.shared.budget).clone()
    }

    /// The last look at the memory.
    pub fn outlook(&self) -> Outlook {
        *lock(&self.shared.outlook)
    }

    /// Time since the engine's start.
    pub fn uptime(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.shared.epoch)
    }

    /// Takes a new look at the memory; an engine that does nothing is woken by one that `matters`. Takes no memory.
    pub fn report(&self, outlook: Outlook, matters: bool) {
        *lock(&self.shared.outlook) = outlook;
        if matters {
            // An engine with a full inbox is awake; one that has ended needs nothing.
            let _unheard = self.inbox.try_send(Command::Look).is_err();
        }
    }

    /// Every configured model, in the order of the configuration.
    pub fn models(&self) -> Vec<ModelStatus> {
        let status = |slot: &Arc<Slot>| ModelStatus {
            name: slot.name.clone(),
            state: slot.state(),
            stats: *lock(&slot.stats),
            board: lock(&slot.board).clone(),
        };
        self.slots.iter().map(status).collect()
    }

    /// Plugins of others that were loaded, as `id version`; any marks the daemon as tainted.
    pub fn third_party_plugins(&self) -> Vec<String> {
        sparsed_backend::third_party()
    }

    /// The model `name`, if it answers.
    ///
    /// # Errors
    /// Not configured, loading, or failed.
    pub fn model(&self, name: &str) -> Result<Arc<ServedModel>, Failure> {
        match self.slot(name)?.1.state() {
            ModelState::Ready(model) => Ok(model),
            ModelState::Loading { .. } => Err(Failure::ModelLoading { name: name.to_owned() }),
            ModelState::Failed(reason) => Err(Failure::ModelUnavailable { name: name.to_owned(), reason }),
        }
    }

    /// Hands a request to the engine; its events go to `sink`.
    ///
    /// # Errors
    /// What is wrong with the request, or that it cannot be taken now. The sink has heard nothing then.
    pub fn generate(&self, mut request: Generate, mut sink: Box<dyn Sink>) -> Result<(), Failure> {
        if self.shared.stopping.load(Ordering::Relaxed) {
            return Err(Failure::ShuttingDown);
        }
        let (slot, _) = self.slot(&request.model)?;
        let model = self.model(&request.model)?;
        model.check(&request)?;
        if let Some(recorder) = request.turn.as_mut().and_then(|turn| turn.recorder.take()) {
            sink = recorder.record(sink);
        }
        self.inbox.try_send(Command::Generate { slot, request: Box::new(request), sink }).map_err(|error| match error {
            TrySendError::Full(_) => Failure::QueueFull { limit: self.inbox_limit, retry_after_s: 1 },
            TrySendError::Disconnected(_) => Failure::ShuttingDown,
        })
    }

    /// Takes no more requests; the engine ends when those it has are answered.
    pub fn drain(&self) {
        self.shared.stopping.store(true, Ordering::Relaxed);
        self.tell(Command::Drain);
    }

    /// Ends the engine; requests that run hear [`Failure::ShuttingDown`].
    pub fn stop(&self) {
        self.shared.stopping.store(true, Ordering::Relaxed);
        self.shared.ending.store(true, Ordering::Relaxed);
        self.tell(Command::Stop);
    }

    /// Blocks while the inbox is full: for a step, or until models are loaded. Nobody to tell: it has ended already.
    fn tell(&self, command: Command) {
        let _ended = self.inbox.send(command).is_err();
    }

    /// The slot of model `name`. [`DEFAULT_MODEL`] is the first model where none is called so.
    fn slot(&self, name: &str) -> Result<(usize, &Arc<Slot>), Failure> {
        let found = self.slots.iter().enumerate().find(|(_, slot)| slot.name == name);
        let first = || self.slots.first().filter(|_| name == DEFAULT_MODEL).map(|slot| (0, slot));
        found.or_else(first).ok_or_else(|| Failure::ModelNotFound {
            name: name.to_owned(),
            known: self.slots.iter().map(|slot| slot.name.as_str()).collect::<Vec<_>>().join(", "),
        })
    }
}

impl ServedModel {
    /// The tokens of a conversation, up to where the next answer begins. Takes long for long texts: not for threads
    /// that must not wait.
    ///
    /// # Errors
    /// A model without tokenizer or chat format, the template's own refusal, text that is too long.
    pub fn chat_prompt(&self, request: &ChatRequest) -> Result<ChatPrompt, Failure> {
        let tokenizer = self.tokenizer("messages")?;
        let format = self.model.chat_format().ok_or_else(|| {
            Failure::invalid("messages", "cannot be used: the model has no chat template; use /v1/completions")
        })?;
        if !request.tools.is_empty() && !format.takes_tools() {
            return Err(Failure::invalid("tools", "cannot be used: the model's chat template has no place for them"));
        }
        let refused = |error: ModelError| Failure::invalid("messages", format!("cannot be rendered: {error}"));
        let prompt = format.render(request).map_err(refused)?;
        let tokens = tokenizer.encode_prompt(&prompt).map_err(refused)?;
        let reading = Reading { parser: prompt.parser(), visible: format.visible_tokens().to_vec() };
        Ok(ChatPrompt { tokens, reading })
    }

    /// The tokens of plain text. Takes long for long texts: not for threads that must not wait.
    ///
    /// # Errors
    /// A model without tokenizer, text that is too long.
    pub fn text_prompt(&self, text: &str) -> Result<Vec<u32>, Failure> {
        let tokens = self.tokenizer("prompt")?.encode(text);
        tokens.map_err(|error| Failure::invalid("prompt", format!("cannot be tokenized: {error}")))
    }

    /// What an answer must be that calls one of `tools`, or the one that is called `only`.
    ///
    /// # Errors
    /// No such tool; a model whose calls cannot be enforced.
    pub fn call_grammar(&self, tools: &[serde_json::Value], only: Option<&str>) -> Result<GrammarSpec, Failure> {
        let name = |tool: &serde_json::Value| tool["function"]["name"].as_str().map(str::to_owned);
        let offered: Vec<_> = tools.iter().filter(|tool| only.is_none() || name(tool).as_deref() == only).collect();
        if offered.is_empty() {
            return Err(Failure::invalid("tool_choice", "names a function that is not among the tools"));
        }
        let format = self.model.chat_format().filter(|format| format.takes_tools());
        let grammar = format.and_then(|format| format.call_grammar(&offered));
        let none = || Failure::invalid("tool_choice", "cannot be enforced: this model does not write calls as JSON");
        grammar.map(GrammarSpec::Call).ok_or_else(none)
    }

    /// The text of tokens; what is not whole characters is replaced, and control tokens have their names.
    ///
    /// # Errors
    /// A model without tokenizer; a token that is not of its vocabulary.
    pub fn text_of(&self, tokens: &[u32]) -> Result<String, Failure> {
        let none = || Failure::invalid("tokens", "have no text: the model has no tokenizer");
        let tokenizer = self.model.tokenizer().ok_or_else(none)?;
        let mut bytes = Vec::new();
        for &token in tokens {
            let text = tokenizer.token_bytes(token);
            if text.is_empty() && token as usize >= tokenizer.vocab_size() {
                let reason = format!("has token {token}, the vocabulary ends at {}", tokenizer.vocab_size());
                return Err(Failure::invalid("tokens", reason));
            }
            let name = || tokenizer.token_name(token).unwrap_or_default().as_bytes();
            bytes.extend_from_slice(if text.is_empty() { name() } else { text });
        }
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// The grammar of an answer. Takes long, for some schemas: not for threads that must not wait.
    ///
    /// # Errors
    /// A model without tokenizer; a schema or grammar that is broken or too large, with its place.
    pub fn grammar(&self, spec: GrammarSpec) -> Result<Grammar, Failure> {
        let none = || Failure::invalid(spec.param(), "cannot be used: the model has no tokenizer");
        let tokenizer = self.model.tokenizer().ok_or_else(none)?;
        self.grammars.compile(spec, tokenizer)
    }

    fn tokenizer(&self, param: &str) -> Result<&sparsed_model::Tokenizer, Failure> {
        let none = || Failure::invalid(param, "cannot be text: the model has no tokenizer; send a list of token ids");
        self.model.tokenizer().ok_or_else(none)
    }

    fn check(&self, request: &Generate) -> Result<(), Failure> {
        if request.max_tokens == Some(0) {
            return Err(Failure::invalid("max_tokens", "is 0, must be at least 1"));
        }
        let vocab = self.model.spec().vocab_size;
        if let Some((bad, _)) = request.sampling.logit_bias.iter().find(|(token, _)| *token >= vocab) {
            return Err(Failure::invalid("logit_bias", format!("has token {bad}, the vocabulary ends at {vocab}")));
        }
        if request.logprobs.is_some_and(|n| n > ALTERNATIVES_MAX) {
            return Err(Failure::invalid("top_logprobs", format!("must be 0 to {ALTERNATIVES_MAX}")));
        }
        self.check_prompt(&request.prompt)
    }

    /// That a prompt has tokens, all of this model, and leaves room for an answer.
    pub(crate) fn check_prompt(&self, prompt: &[u32]) -> Result<(), Failure> {
        if prompt.is_empty() {
            return Err(Failure::invalid("prompt", "is empty"));
        }
        if prompt.len() >= self.max_context as usize {
            return Err(Failure::ContextTooLong { have_tokens: prompt.len(), max_tokens: self.max_context });
        }
        let vocab = self.model.spec().vocab_size;
        match prompt.iter().find(|&&token| token >= vocab) {
            Some(bad) => Err(Failure::invalid("prompt", format!("has token {bad}, the vocabulary ends at {vocab}"))),
            None => Ok(()),
        }
    }
}
