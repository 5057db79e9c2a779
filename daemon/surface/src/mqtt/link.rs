//! What must an MQTT client do for us? Carry one connection; and what keeps connections coming.
//!
//! The library behind [`MqttLink`] can be another one. A link lives as long as its connection: nothing of its state
//! goes over to the next, since what is to be sent again is known to the desk.

use super::desk::{Input, Line};
use super::message::Address;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

/// Commands between desk and connection. The desk's window is far smaller: a connection that does not take them is
/// stuck.
const COMMANDS: usize = 256;
/// Deltas between answers and connection; further ones grow instead.
const DELTAS: usize = 64;
/// Pauses between two connections: the first, and the longest.
const PAUSE_MIN: Duration = Duration::from_millis(200);
const PAUSE_MAX: Duration = Duration::from_secs(30);
/// A connection that lasted so long begins with the first pause again.
const SOUND: Duration = Duration::from_secs(10);

/// What the desk tells a connection.
#[derive(Debug)]
pub(super) enum Command {
    /// To these filters, with QoS 1 and without what the broker has retained.
    Subscribe(Vec<String>),
    /// Not to these any more.
    Unsubscribe(Vec<String>),
    /// With QoS 1.
    Publish {
        /// Comes back with the broker's word.
        token: u64,
        /// Where to.
        address: Address,
        /// What.
        payload: String,
        /// For whoever comes later.
        retain: bool,
        /// How long it is of use.
        expiry_s: Option<u32>,
    },
    /// The broker's publish of this number is taken.
    Ack(u16),
    /// Say goodbye.
    Close,
}

/// Something published with QoS 0.
#[derive(Debug)]
pub(super) struct Delta {
    /// Where to.
    pub(super) address: Address,
    /// What.
    pub(super) payload: String,
}

/// Where deltas go: to the connection that is there now.
#[derive(Clone, Debug)]
pub(super) struct Deltas(watch::Receiver<Option<mpsc::Sender<Delta>>>);

impl Deltas {
    /// The way of deltas, and its beginning.
    pub(super) fn new() -> (watch::Sender<Option<mpsc::Sender<Delta>>>, Self) {
        let (sender, receiver) = watch::channel(None);
        (sender, Self(receiver))
    }

    /// Whether it was sent, or nobody is there to hear it; `false` when there is no room.
    pub(super) fn tell(&self, delta: Delta) -> bool {
        let now = self.0.borrow().clone();
        !now.is_some_and(|sender| matches!(sender.try_send(delta), Err(mpsc::error::TrySendError::Full(_))))
    }
}

/// What the desk hears.
#[derive(Debug)]
pub(super) enum Told {
    /// The way to a line's connection that is being made.
    Opening(Line, mpsc::Sender<Command>),
    /// Something for the desk itself.
    Input(Input),
}

/// A connection's ends.
#[derive(Debug)]
pub(super) struct Wire {
    /// Which one it is.
    pub(super) line: Line,
    /// Counts the line's connections.
    pub(super) epoch: u64,
    /// Who hears what comes.
    pub(super) desk: mpsc::Sender<Told>,
    /// What is to be done; closed when the connection is to end.
    pub(super) commands: mpsc::Receiver<Command>,
    /// What may be sent in between.
    pub(super) deltas: mpsc::Receiver<Delta>,
}

/// A client library.
pub(super) trait MqttLink: Send + Sync + 'static {
    /// Carries one connection from its beginning to its end; answers why it has ended.
    ///
    /// Tells the desk [`Input::Up`], each publish that comes, and for each publish of the desk's either that it has
    /// landed or nothing. Ends when `commands` is closed, or after [`Command::Close`] when what came before it is sent.
    fn carry(&self, wire: Wire) -> impl Future<Output = String> + Send;
}

/// Keeps `line` connected until `stop` holds.
pub(super) async fn keep<L: MqttLink>(
    link: Arc<L>,
    line: Line,
    desk: mpsc::Sender<Told>,
    deltas: Option<watch::Sender<Option<mpsc::Sender<Delta>>>>,
    mut stop: watch::Receiver<bool>,
) {
    let (mut pause, mut is_failing) = (PAUSE_MIN, false);
    for epoch in 1.. {
        let (command_sender, commands) = mpsc::channel(COMMANDS);
        let (delta_sender, delta_receiver) = mpsc::channel(DELTAS);
        if desk.send(Told::Opening(line, command_sender)).await.is_err() {
            return;
        }
        if let Some(deltas) = &deltas {
            deltas.send_replace(Some(delta_sender));
        }
        let begun = Instant::now();
        let wire = Wire { line, epoch, desk: desk.clone(), commands, deltas: delta_receiver };
        let reason = link.carry(wire).await;
        if let Some(deltas) = &deltas {
            deltas.send_replace(None);
        }
        let gone = desk.send(Told::Input(Input::Down { line, epoch })).await.is_err();
        if gone || *stop.borrow() {
            return;
        }
        if begun.elapsed() >= SOUND {
            (pause, is_failing) = (PAUSE_MIN, false);
        }
        // Once per episode: a broker may be away for days.
        let level = if std::mem::replace(&mut is_failing, true) { log::Level::Debug } else { log::Level::Warn };
        log::log!(level, line:? = line, reason:%; "no connection to the MQTT broker; trying again");
        tokio::select! {
            () = tokio::time::sleep(jittered(pause)) => {}
            _ = stop.wait_for(|stop| *stop) => return,
        }
        pause = (pause * 2).min(PAUSE_MAX);
    }
}

/// Half of the pause to all of it: a fleet does not come back at once.
fn jittered(pause: Duration) -> Duration {
    let share = getrandom::u32().map_or(0.5, |random| f64::from(random) / f64::from(u32::MAX));
    pause.mul_f64(0.5 + share / 2.0)
}
