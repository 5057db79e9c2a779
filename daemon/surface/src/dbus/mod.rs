//! How do desktop services reach us? `org.sparsed1` on a D-Bus: requests as calls, answers through pipes.
//!
//! The bus may be missing, come later or go away: the daemon goes on, and connects again. Three tasks live as long as a
//! connection: one takes calls, one hears who leaves, one says what has changed. None of them waits for a caller.

mod additions;
mod call;
mod dispatch;
mod interface;
mod leases;
mod manager;
mod memfd;
mod object;
mod peers;
mod polkit;
mod requests;
mod session;
mod stream;
mod values;
mod xml;

use crate::additions::ModelStore;
use crate::beat::Beat;
use crate::shares::Shares;
use additions::Additions;
use futures_util::StreamExt;
use interface::{Changes, MANAGER, NAME, ROOT};
use peers::Peers;
use requests::Requests;
use sparsed_engine::{Service, Tenants};
use std::collections::HashMap;
use std::future::Future;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Semaphore;
use zbus::connection::Builder;
use zbus::fdo::{RequestNameFlags, RequestNameReply};
use zbus::message::Type;
use zbus::names::OwnedUniqueName;
use zbus::wire::OwnedVariant;
use zbus::{Connection, MatchRule, MessageStream};

/// Calls that are worked on at a time, of all callers.
const CALLS_MAX: usize = 256;
/// Largest bodies that are held at a time, before they are prompts; smaller ones in proportion.
const BODIES_MAX: usize = 8;
/// Pauses before another connection is tried; the last one again and again.
const BACKOFF: [Duration; 4] =
    [Duration::from_millis(200), Duration::from_secs(1), Duration::from_secs(5), Duration::from_secs(30)];
/// How long a bus may take to answer.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// How soon after a change properties are looked at again, and so at most how often they are announced. While nothing
/// changes they are looked at with every beat.
const LOOK: Duration = Duration::from_secs(3);

/// Which bus.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Bus {
    /// The system's.
    System,
    /// The one of the user's session.
    Session,
    /// The one at a D-Bus address.
    Address(String),
}

impl Bus {
    /// A connection to it.
    ///
    /// # Errors
    /// No such bus, or it does not let us in.
    pub async fn connect(&self) -> zbus::Result<Connection> {
        let builder = match self {
            Self::System => Builder::system(),
            Self::Session => Builder::session(),
            Self::Address(address) => Builder::address(address.as_str()),
        };
        builder.build().await
    }
}

impl FromStr for Bus {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "system" => Ok(Self::System),
            "session" => Ok(Self::Session),
            // On other transports than a Unix socket the bus does not know who is who.
            address if address.starts_with("unix:") => match zbus::Address::from_str(address) {
                Ok(_) => Ok(Self::Address(address.to_owned())),
                Err(error) => Err(format!("is '{address}', which is no address: {error}")),
            },
            _ => Err(format!("is '{text}', must be off, auto, system, session or an address that begins with unix:")),
        }
    }
}

/// Limits of this door.
#[derive(Clone, Debug)]
pub struct DbusOptions {
    /// Which bus.
    pub bus: Bus,
    /// Most bytes of a request's body.
    pub body_bytes_max: usize,
    /// How long a full pipe may not be read before its answer is given up.
    pub reader_patience: Duration,
    /// How long running answers may go on after `stop`.
    pub stop_timeout: Duration,
}

/// What outlives a connection.
#[derive(Debug)]
struct Shared {
    service: Service,
    options: DbusOptions,
    requests: Arc<Requests>,
    leases: Arc<Tenants>,
    additions: Additions,
    /// Memory for bodies that are no prompts yet.
    bodies: Arc<Shares>,
}

/// The door on one connection.
#[derive(Debug)]
struct Door {
    shared: Arc<Shared>,
    bus: Connection,
    peers: Arc<Peers>,
    /// Calls that may still be taken.
    calls: Arc<Semaphore>,
}

impl Door {
    /// The connection, if it is to the system's bus.
    fn system_bus(&self) -> Option<&Connection> {
        (self.shared.options.bus == Bus::System).then_some(&self.bus)
    }
}

/// A memfd with `bytes` that is sealed as the door wants it, for clients.
///
/// # Errors
/// No memory or no descriptors.
pub fn sealed(bytes: &[u8]) -> std::io::Result<std::os::fd::OwnedFd> {
    memfd::write("body", bytes)
}

/// Serves `org.sparsed1` until `stop` resolves, then lets running answers end. A bus that is not there is waited for.
/// Models that come in go into `store`.
pub async fn serve_dbus(
    service: Service,
    store: Arc<dyn ModelStore>,
    options: DbusOptions,
    stop: impl Future<Output = ()>,
) {
    let bodies = Arc::new(Shares::new(BODIES_MAX * options.body_bytes_max.div_ceil(1024)));
    let requests = Arc::new(Requests::new());
    let additions = Additions::new(store);
    let shared = Arc::new(Shared { service, options, requests, leases: leases::all(), additions, bodies });
    let mut stop = std::pin::pin!(stop);
    let mut pauses = BACKOFF.into_iter();
    let mut is_failing = false;
    loop {
        let connected = tokio::select! {
            connected = connect(&shared) => connected,
            () = &mut stop => return,
        };
        match connected {
            Ok((door, calls)) => {
                (pauses, is_failing) = (BACKOFF.into_iter(), false);
                log::info!(bus:? = shared.options.bus, name = NAME; "on D-Bus");
                let mut is_stopping = false;
                tokio::select! {
                    () = serve_on(&door, calls) => {}
                    // Calls are answered until the last answer has ended: one of them may be to cancel it.
                    () = async {
                        (&mut stop).await;
                        is_stopping = true;
                        wind_down(&door).await;
                    } => {}
                }
                if is_stopping {
                    return;
                }
                log::warn!("the bus is gone");
                shared.requests.sender_gone(None);
            }
            // Once per episode: a box without a bus stays one.
            Err(error) if !std::mem::replace(&mut is_failing, true) => {
                log::warn!(bus:? = shared.options.bus, reason:% = error; "not on D-Bus; tried again later");
            }
            Err(error) => log::debug!(reason:% = error; "not on D-Bus yet"),
        }
        let pause = pauses.next().unwrap_or(BACKOFF[BACKOFF.len() - 1]);
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = &mut stop => return,
        }
    }
}

/// Connects and takes the name, in an order that loses no call.
async fn connect(shared: &Arc<Shared>) -> zbus::Result<(Arc<Door>, MessageStream)> {
    let connecting = async {
        let bus = shared.options.bus.connect().await?;
        let rule = MatchRule::builder().msg_type(Type::MethodCall).build()?;
        let calls = MessageStream::for_match_rule(rule, &bus, None).await?;
        let reply = bus.request_name_with_flags(NAME, RequestNameFlags::DO_NOT_QUEUE).await?;
        if !matches!(reply, RequestNameReply::PrimaryOwner | RequestNameReply::AlreadyOwner) {
            return Err(zbus::Error::NameTaken);
        }
        let (shared, calls_max) = (Arc::clone(shared), Arc::new(Semaphore::new(CALLS_MAX)));
        Ok((Arc::new(Door { shared, bus, peers: Arc::default(), calls: calls_max }), calls))
    };
    let timeout = || zbus::Error::from(std::io::Error::from(std::io::ErrorKind::TimedOut));
    tokio::time::timeout(CONNECT_TIMEOUT, connecting).await.map_err(|_| timeout())?
}

/// Takes calls until the connection ends.
async fn serve_on(door: &Arc<Door>, mut calls: MessageStream) {
    // A stream that nobody polls stalls the connection: each has a task of its own.
    let leaving = tokio::spawn(hear_who_leaves(Arc::clone(door)));
    let announcing = tokio::spawn(announce(Arc::clone(door)));
    let ends = Ends(vec![leaving.abort_handle(), announcing.abort_handle()]);
    while let Some(Ok(message)) = calls.next().await {
        dispatch::take(door, message).await;
    }
    drop(ends);
}

/// Tasks that end when this is dropped.
struct Ends(Vec<tokio::task::AbortHandle>);

impl Drop for Ends {
    fn drop(&mut self) {
        self.0.iter().for_each(tokio::task::AbortHandle::abort);
    }
}

/// Ends the requests of connections that leave the bus.
async fn hear_who_leaves(door: Arc<Door>) {
    let name = "org.freedesktop.DBus";
    // Only those whose name has no new owner.
    let rule = MatchRule::builder().msg_type(Type::Signal).sender(name).interface(name);
    let rule = rule.member("NameOwnerChanged").arg(2, "").build();
    let heard = match rule {
        Ok(rule) => MessageStream::for_match_rule(rule, &door.bus, None).await,
        Err(error) => Err(error),
    };
    let mut changes = match heard {
        Ok(changes) => changes,
        // Their pipes still end their requests.
        Err(error) => return log::warn!(reason:% = error; "who leaves the bus is not heard"),
    };
    while let Some(Ok(message)) = changes.next().await {
        let body = message.body();
        let Ok((sender, _, _)) = body.deserialize::<(&str, &str, &str)>() else { continue };
        if let Ok(sender) = OwnedUniqueName::try_from(sender) {
            door.peers.forget(&sender);
            door.shared.requests.sender_gone(Some(&sender));
        }
    }
}

/// Says at most once in three seconds which of the manager's properties have changed. Nobody's own are among them.
async fn announce(door: Arc<Door>) {
    let mut said = manager::properties(&door);
    let (beat, mut is_lively) = (Beat::every(1), false);
    loop {
        if is_lively {
            tokio::time::sleep(LOOK).await;
        } else {
            beat.next().await;
        }
        let now = manager::properties(&door);
        let (mut changed, mut noted): (HashMap<&str, &OwnedVariant>, Vec<&str>) = Default::default();
        for ((name, value), _) in now.iter().zip(&said).filter(|(now, before)| now.1 != before.1) {
            match MANAGER.properties.iter().find(|row| row.name == *name).map(|row| row.changes) {
                Some(Changes::Announced) => drop(changed.insert(name, value)),
                Some(Changes::Noted) => noted.push(name),
                _ => {}
            }
        }
        is_lively = !changed.is_empty() || !noted.is_empty();
        if !is_lively {
            continue;
        }
        let interface = interface::PROPERTIES.name;
        let body = (MANAGER.name, changed, noted);
        let emitted = door.bus.emit_signal(None::<&str>, ROOT, interface, "PropertiesChanged", &body).await;
        if let Err(error) = emitted {
            log::debug!(reason:% = error; "a change of properties was not announced");
        }
        said = now;
    }
}

/// Gives the name away, so that new calls go to the next daemon, and waits for the answers under way.
async fn wind_down(door: &Door) {
    door.shared.additions.stop();
    if let Err(error) = door.bus.release_name(NAME).await {
        log::debug!(reason:% = error; "the bus name was not released");
    }
    if tokio::time::timeout(door.shared.options.stop_timeout, door.shared.requests.all_ended()).await.is_err() {
        log::warn!("answers on D-Bus were still running when the time to stop was over");
    }
}
