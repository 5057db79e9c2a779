//! How do devices reach us? MQTT: requests and answers on topics, by a broker that may die at any moment.
//!
//! From the broker to the engine: [`rumqtt`] carries a connection (behind [`link::MqttLink`]), the [`desk`] decides
//! what is to be done, on a thread of its own that may wait for its journal ([`ledger`], [`journal`]), and [`work`]
//! answers with the bodies that every door has. Deltas go past the desk: they are lost without harm, since a result has
//! the whole text.

mod desk;
mod entry;
mod envelope;
mod herald;
mod journal;
#[cfg(test)]
mod latency;
mod ledger;
mod link;
mod message;
mod options;
mod outbox;
mod probe;
mod rumqtt;
mod topics;
mod work;

pub use options::{MqttOptions, MqttSettings, TlsError, tls_config};
pub use probe::{MqttProbe, MqttProbeError, mqtt_probe};

use crate::beat::Beat;
use desk::{Act, Desk, Input, Limits, Line};
use journal::Seal;
use ledger::Ledger;
use link::{Command, Deltas, Told};
use message::{Key, Request};
use sparsed_engine::Service;
use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::runtime::Handle;
use tokio::sync::{mpsc, watch};
use tokio::task::AbortHandle;
use topics::Topics;

/// What waits for the desk; whoever has more waits too.
const INBOX: usize = 256;
/// How often time is told.
const TICK: Duration = Duration::from_millis(100);
/// With which beats while nobody waits for anything: results that were kept long enough are forgotten.
const QUIET_BEATS: u32 = 2;
/// How long goodbyes may take.
const GOODBYE: Duration = Duration::from_secs(1);
/// A broker that acknowledges nothing for so many keepalives is left.
const STALL_KEEPALIVES: u32 = 3;

/// Has the journal in `dir`, which no door has open, another key from now on, if there is one and it has `from`.
///
/// # Errors
/// The disk's.
pub fn seal_journal_anew(dir: &Path, from: &[u8; 32], to: &[u8; 32]) -> std::io::Result<()> {
    journal::seal_anew(dir, Seal::new(from), Seal::new(to))
}

/// A door whose journal is open.
#[derive(Debug)]
pub struct MqttDoor {
    options: MqttOptions,
    desk: Desk,
    topics: Topics,
    settings: MqttSettings,
}

impl MqttDoor {
    /// Opens the journal.
    ///
    /// # Errors
    /// The disk's, or a journal of another version or key.
    pub fn open(options: MqttOptions) -> std::io::Result<Self> {
        std::fs::create_dir_all(&options.dir)?;
        let (ledger, kept) = Ledger::open(&options.dir, &options.key)?;
        let topics = topics_of(&options);
        let desk = Desk::new(topics.clone(), limits_of(&options), ledger, kept);
        let settings = MqttSettings::new(options.clone());
        Ok(Self { options, desk, topics, settings })
    }

    /// What can be changed about the door while it is open.
    pub fn settings(&self) -> MqttSettings {
        self.settings.clone()
    }

    /// Serves until `stop` resolves; then running answers may end within the time that the options give them.
    ///
    /// # Errors
    /// When the desk's thread cannot be started.
    pub async fn serve(self, service: Service, stop: impl Future<Output = ()>) -> std::io::Result<()> {
        let Self { options, desk, topics, settings } = self;
        let boot_id = format!("{:016x}", getrandom::u64().unwrap_or_else(|_| now_ms()));
        let (sender, inbox) = mpsc::channel(INBOX);
        let (now_there, deltas) = Deltas::new();
        let work = Work { service: service.clone(), node: Arc::from(options.node.as_str()), deltas: deltas.clone() };
        let status = topics.own("status");
        let say =
            |state: &str| Input::News { topic: status.clone(), payload: herald::status(state, &boot_id), retain: true };
        let farewell = [say("draining"), say("offline")];
        let will = (status.clone(), herald::status("offline", &boot_id));
        let thread = Thread {
            desk,
            work,
            runtime: Handle::current(),
            sender: sender.clone(),
            lines: [None, None],
            running: HashMap::new(),
            quiet: watch::Sender::new(false),
        };
        let quiet = thread.quiet.subscribe();
        let (ended, has_ended) = tokio::sync::oneshot::channel::<()>();
        std::thread::Builder::new().name("mqtt".to_owned()).spawn(move || {
            thread.run(inbox, farewell);
            drop(ended);
        })?;
        let _heard = sender.send(Told::Input(say("online"))).await.is_ok();
        let (stopping, stopped) = watch::channel(false);
        let link = Arc::new(rumqtt::Rumqtt::new(options.clone(), will));
        let (mut lines, mut tasks) = (tokio::task::JoinSet::new(), tokio::task::JoinSet::new());
        lines.spawn(link::keep(Arc::clone(&link), Line::Node, sender.clone(), Some(now_there), stopped.clone()));
        if options.pool.is_some() {
            lines.spawn(link::keep(link, Line::Pool, sender.clone(), None, stopped));
        }
        tasks.spawn(tell_time(quiet, sender.clone()));
        let mut changes = settings.subscribe();
        // What was changed since the door was opened is told, too.
        changes.mark_changed();
        tasks.spawn(tell_settings(changes, sender.clone()));
        let stop_timeout = options.stop_timeout;
        tasks.spawn(herald::herald(service, settings.subscribe(), topics, deltas, sender.clone()));
        stop.await;
        let _known = stopping.send(true).is_ok();
        let _heard = sender.send(Told::Input(Input::Stop)).await.is_ok();
        drop(sender);
        if tokio::time::timeout(stop_timeout, has_ended).await.is_err() {
            log::warn!("the MQTT broker or answers were still there when the time to stop was over");
        }
        // They say goodbye; a broker that does not hear it says what our will is.
        let _said = tokio::time::timeout(GOODBYE, lines.join_all()).await.is_ok();
        Ok(())
    }
}

fn topics_of(options: &MqttOptions) -> Topics {
    Topics::new(&options.root, &options.node, options.pool.as_deref(), &options.reply_topics)
}

fn limits_of(options: &MqttOptions) -> Limits {
    Limits {
        per_client: options.per_client,
        pending: options.pending_max,
        running: options.running_max,
        held_bytes: options.held_bytes_max,
        payload_bytes: options.payload_bytes_max,
        keep_ms: millis(options.keep),
        deadline_ms: millis(options.deadline),
        stall_ms: millis(options.keepalive * STALL_KEEPALIVES),
    }
}

/// Tells the desk that time goes by, seldom while it is quiet.
async fn tell_time(mut quiet: watch::Receiver<bool>, desk: mpsc::Sender<Told>) {
    let beat = Beat::every(QUIET_BEATS);
    loop {
        if *quiet.borrow_and_update() {
            // Whoever ends the quiet is told the time at once.
            tokio::select! {
                () = beat.next() => {}
                _ended = quiet.changed() => {}
            }
        } else {
            tokio::time::sleep(TICK).await;
        }
        if desk.send(Told::Input(Input::Tick)).await.is_err() {
            return;
        }
    }
}

/// Tells the desk what the operator has changed.
async fn tell_settings(mut settings: watch::Receiver<MqttOptions>, desk: mpsc::Sender<Told>) {
    while settings.changed().await.is_ok() {
        let input = {
            let options = settings.borrow_and_update();
            Input::Settings { limits: limits_of(&options), topics: topics_of(&options) }
        };
        if desk.send(Told::Input(input)).await.is_err() {
            return;
        }
    }
}

/// What answers requests.
#[derive(Clone, Debug)]
struct Work {
    service: Service,
    node: Arc<str>,
    deltas: Deltas,
}

/// The thread that the desk works on.
#[derive(Debug)]
struct Thread {
    desk: Desk,
    work: Work,
    runtime: Handle,
    /// For those whom it starts.
    sender: mpsc::Sender<Told>,
    /// The ways to the connections.
    lines: [Option<mpsc::Sender<Command>>; 2],
    running: HashMap<Key, AbortHandle>,
    /// Whether the desk is.
    quiet: watch::Sender<bool>,
}

impl Thread {
    /// Works until it was told to stop, all is done, and `farewell` is said.
    fn run(mut self, mut inbox: mpsc::Receiver<Told>, farewell: [Input; 2]) {
        let mut farewell = farewell.into_iter();
        let mut is_stopping = false;
        while let Some(first) = inbox.blocking_recv() {
            // All that has come meanwhile goes to the disk together.
            let mut inputs = Vec::new();
            for told in std::iter::once(first).chain(std::iter::from_fn(|| inbox.try_recv().ok())).take(INBOX) {
                match told {
                    Told::Opening(line, commands) => self.lines[line as usize] = Some(commands),
                    Told::Input(input) => {
                        if let Input::Stop = input {
                            is_stopping = true;
                            inputs.extend(farewell.next());
                        }
                        if let Input::Done { key, .. } = &input {
                            self.running.remove(key);
                        }
                        inputs.push(input);
                    }
                }
            }
            let acts = self.desk.handle(now_ms(), inputs);
            acts.into_iter().for_each(|act| self.act(act));
            let is_quiet = self.desk.is_quiet();
            self.quiet.send_if_modified(|quiet| std::mem::replace(quiet, is_quiet) != is_quiet);
            if is_stopping && self.desk.is_idle() {
                match farewell.next() {
                    Some(last) => {
                        let acts = self.desk.handle(now_ms(), [last, Input::Tick]);
                        acts.into_iter().for_each(|act| self.act(act));
                    }
                    None => break,
                }
            }
        }
        for commands in self.lines.iter().flatten() {
            let _gone = commands.try_send(Command::Close).is_err();
        }
    }

    fn act(&mut self, act: Act) {
        match act {
            Act::Subscribe { line, filters } => self.command(line, Command::Subscribe(filters)),
            Act::Unsubscribe { line, filters } => self.command(line, Command::Unsubscribe(filters)),
            Act::Publish { token, address, payload, retain, expiry_s } => {
                self.command(Line::Node, Command::Publish { token, address, payload, retain, expiry_s });
            }
            Act::Ack(ack) => self.command(ack.line, Command::Ack(ack.pkid)),
            Act::Reset(line) => self.lines[line as usize] = None,
            Act::Cancel(key) => {
                if let Some(task) = self.running.remove(&key) {
                    task.abort();
                }
            }
            Act::Start { key, attempt, request } => self.start(key, attempt, *request),
        }
    }

    /// A connection that takes nothing is given up; what it was told is told the next one.
    fn command(&mut self, line: Line, command: Command) {
        let Some(commands) = &self.lines[line as usize] else { return };
        if let Err(mpsc::error::TrySendError::Full(_)) = commands.try_send(command) {
            log::warn!(line:? = line; "the MQTT connection takes nothing; connecting anew");
            self.lines[line as usize] = None;
        }
    }

    fn start(&mut self, key: Key, attempt: u64, request: Request) {
        let (work, sender, done) = (self.work.clone(), self.sender.clone(), key.clone());
        let task = self.runtime.spawn(async move {
            let outcome = work::answer(&work.service, &request, &work.node, &work.deltas).await;
            let _ended = sender.send(Told::Input(Input::Done { key: done, attempt, outcome })).await.is_err();
        });
        self.running.insert(key, task.abort_handle());
    }
}

/// Milliseconds since 1970; before 1970 it is 1970.
fn now_ms() -> u64 {
    millis(SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default())
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
