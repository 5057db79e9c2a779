//! Who connects over TCP? Whoever has an API key, from this box, and no page of a browser's other tabs.
//!
//! A page that a browser has loaded from elsewhere can reach 127.0.0.1, under a name of its own that resolves to it
//! (DNS rebinding), or directly: so names in `Host` and `Origin` must be this box's. The key is asked for after them.

use crate::accept::{Guest, Listener};
use crate::http::error::for_path;
use crate::refusal::{AtDoor, Refusal};
use crate::strangers::{Stranger, Strangers};
use crate::unix::all_taken;
use axum::Router;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, Uri, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use sparsed_engine::api::Owner;
use sparsed_engine::{Admission, Tenants};
use std::fmt;
use std::future::poll_fn;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock, PoisonError, RwLock, RwLockReadGuard};
use std::task::{Context, Poll};
use std::time::Duration;
use subtle::ConstantTimeEq;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Names of this box for itself.
const HOSTS: &[&str] = &["localhost", "127.0.0.1", "[::1]"];
/// What a key has for a header where it is none of `Authorization`: llama.cpp's server, and Azure's clients.
const KEY_HEADERS: &[&str] = &["x-api-key", "api-key"];
/// Shortest key in bytes.
const KEY_BYTES_MIN: usize = 16;
/// Longest key in bytes.
const KEY_BYTES_MAX: usize = 512;
/// Most keys.
const KEYS_MAX: usize = 256;
/// Most connections that have not shown a key.
const STRANGERS_MAX: usize = 64;
/// How long they may be without: as long as a head may take.
const KEY_TIMEOUT: Duration = Duration::from_secs(15);

/// The keys that clients may have, and who has them. Clones are the same keys, also after [`ApiKeys::replace`].
#[derive(Clone, Default)]
pub struct ApiKeys(Arc<RwLock<Vec<(Owner, String)>>>);

impl fmt::Debug for ApiKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ApiKeys").field("n", &self.keys().len()).finish_non_exhaustive()
    }
}

impl ApiKeys {
    /// Reads a line for each: a name and its key, parted by blanks. Whoever has one of a name's keys is that name's
    /// owner, so a key can be exchanged. Empty lines and those that begin with `#` say nothing.
    ///
    /// # Errors
    /// What is wrong with a line, by its number; there are no keys, or more than 256.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut keys: Vec<(Owner, String)> = Vec::new();
        let lines = text.lines().enumerate().map(|(at, line)| (at + 1, line.trim()));
        for (at, line) in lines.filter(|(_, line)| !line.is_empty() && !line.starts_with('#')) {
            let mut words = line.split_whitespace();
            let (Some(name), Some(key), None) = (words.next(), words.next(), words.next()) else {
                return Err(format!("line {at} is not a name and a key"));
            };
            if !(KEY_BYTES_MIN..=KEY_BYTES_MAX).contains(&key.len()) {
                let len = key.len();
                return Err(format!("line {at}: a key of {len} bytes; {KEY_BYTES_MIN} to {KEY_BYTES_MAX} are allowed"));
            }
            if keys.iter().any(|(_, known)| known == key) {
                return Err(format!("line {at}: the key is there already"));
            }
            keys.push((Owner::named("tcp", name), key.to_owned()));
        }
        match keys.len() {
            0 => Err("there is no key".to_owned()),
            1..=KEYS_MAX => Ok(Self(Arc::new(RwLock::new(keys)))),
            n => Err(format!("{n} keys, the limit is {KEYS_MAX}")),
        }
    }

    /// How many there are.
    #[expect(clippy::len_without_is_empty, reason = "a door without keys is not opened")]
    pub fn len(&self) -> usize {
        self.keys().len()
    }

    /// Whether these are the same keys, and of the same owners.
    pub fn are(&self, others: &Self) -> bool {
        *self.keys() == *others.keys()
    }

    /// Takes the place of all keys there are, for every clone: requests that come from now on need one of these.
    pub fn replace(&self, keys: &Self) {
        let keys = keys.keys().clone();
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = keys;
    }

    /// A list behind this lock is whole at any time.
    fn keys(&self) -> RwLockReadGuard<'_, Vec<(Owner, String)>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whose key it is. Takes as long for any key of the same length.
    fn owner(&self, key: &str) -> Option<Owner> {
        let keys = self.keys();
        let all = keys.iter().map(|(owner, known)| (*owner, known.as_bytes().ct_eq(key.as_bytes())));
        all.fold(None, |found, (owner, is_it)| if bool::from(is_it) { Some(owner) } else { found })
    }
}

/// Sockets on loopback addresses.
#[derive(Debug)]
pub struct TcpDoor {
    /// Non-blocking; at least one.
    pub listeners: Vec<TcpListener>,
    /// Who may come in.
    pub keys: ApiKeys,
}

/// The same with a count of who is connected by it.
#[derive(Debug)]
pub(crate) struct CountedDoor {
    door: TcpDoor,
    /// Which address is looked at first.
    turn: AtomicUsize,
    counts: Arc<Counts>,
    strangers: Strangers,
}

/// Who has shown a key.
#[derive(Debug)]
struct Counts {
    /// All of them together.
    places: Arc<Semaphore>,
    connections: Arc<Tenants>,
    per_user: u32,
}

/// A connection: it counts from the first key that it has shown, as its owner's.
#[derive(Clone, Debug)]
struct Visit {
    keys: ApiKeys,
    counts: Arc<Counts>,
    stranger: Arc<Stranger>,
    counted: Arc<OnceLock<(Admission, OwnedSemaphorePermit)>>,
}

/// Tells that a connection has ended.
#[derive(Debug)]
struct Leaving(Arc<Stranger>);

impl Drop for Leaving {
    fn drop(&mut self) {
        self.0.has_gone();
    }
}

impl CountedDoor {
    /// Of all names `most` connections at a time, of each `per_user`.
    pub(crate) fn new(door: TcpDoor, most: usize, per_user: u32) -> Self {
        let (places, connections) = (Arc::new(Semaphore::new(most)), Arc::new(Tenants::new(per_user)));
        let counts = Arc::new(Counts { places, connections, per_user });
        Self { door, turn: AtomicUsize::new(0), counts, strangers: Strangers::new(STRANGERS_MAX, KEY_TIMEOUT) }
    }

    /// The next connection to any of the addresses, which have turns: nobody who is busy at one of them keeps clients
    /// of the others waiting.
    fn poll_accept(&self, context: &mut Context<'_>) -> Poll<std::io::Result<TcpStream>> {
        let listeners = &self.door.listeners;
        let first = self.turn.fetch_add(1, Ordering::Relaxed) % listeners.len().max(1);
        for listener in listeners.iter().cycle().skip(first).take(listeners.len()) {
            if let Poll::Ready(accepted) = listener.poll_accept(context) {
                return Poll::Ready(accepted.map(|(stream, _)| stream));
            }
        }
        Poll::Pending
    }
}

impl Visit {
    /// Whose request it is, and whether its connection may be one more of that owner's.
    fn admitted(&self, headers: &HeaderMap, uri: &Uri) -> Result<Owner, Refusal> {
        let owner = admitted(&self.keys, headers, uri)?;
        if self.counted.get().is_none() {
            let Counts { places, connections, per_user } = &*self.counts;
            let admission = connections.admit(owner).map_err(|failure| all_taken(failure, *per_user))?;
            let place = Arc::clone(places).try_acquire_owned().map_err(|_| {
                Refusal::door_full("all connections are taken (limits.connections); try again in a second".to_owned())
            })?;
            // Requests of a connection come one after the other.
            let _counted_already = self.counted.set((admission, place)).is_err();
            self.stranger.is_known();
        }
        Ok(owner)
    }
}

impl Listener for CountedDoor {
    type Stream = TcpStream;

    const COUNTS_ALL: bool = false;

    async fn accept(&self) -> std::io::Result<TcpStream> {
        let stream = poll_fn(|context| self.poll_accept(context)).await?;
        // Tokens are small and wanted at once.
        stream.set_nodelay(true)?;
        Ok(stream)
    }

    fn guest(&self, _: &TcpStream, router: &Router) -> Option<Guest> {
        let (keys, counts, stranger) = (self.door.keys.clone(), Arc::clone(&self.counts), self.strangers.add());
        let (must_go, leaving) = (stranger.must_go(), Leaving(Arc::clone(&stranger)));
        let visit = Visit { keys, counts, stranger, counted: Arc::default() };
        let interface = router.clone().layer(middleware::from_fn_with_state(visit, guard));
        let must_go = Box::pin(async move {
            // Its end is known by this future's.
            let _leaving = leaving;
            must_go.await;
        });
        Some(Guest { interface, must_go })
    }
}

async fn guard(State(visit): State<Visit>, mut request: Request, next: Next) -> Response {
    let page = request.headers().get(header::ORIGIN).cloned();
    let mut response = match visit.admitted(request.headers(), request.uri()) {
        Ok(owner) => {
            request.extensions_mut().insert(owner);
            next.run(request).await
        }
        Err(refusal) if refusal.name().status == 401 && is_preflight(&request) => preflight(request.headers()),
        Err(refusal) => for_path(request.uri().path(), refused(refusal)),
    };
    // Pages of other sites have got no further than to 403.
    if let Some(page) = page.filter(|_| response.status() != StatusCode::FORBIDDEN) {
        response.headers_mut().insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, page);
        response.headers_mut().append(header::VARY, HeaderValue::from_static("origin"));
    }
    response
}

fn refused(refusal: Refusal) -> Response {
    let status = refusal.name().status;
    let mut response = refusal.into_response();
    let more = match status {
        401 => Some((header::WWW_AUTHENTICATE, "Bearer")),
        429 => Some((header::CONNECTION, "close")),
        _ => None,
    };
    response.headers_mut().extend(more.map(|(name, value)| (name, HeaderValue::from_static(value))));
    response
}

/// Whether a browser asks, without the key, what the page may send.
fn is_preflight(request: &Request) -> bool {
    request.method() == Method::OPTIONS && request.headers().contains_key(header::ACCESS_CONTROL_REQUEST_METHOD)
}

/// All that there is; the key is asked for then.
fn preflight(asked: &HeaderMap) -> Response {
    let methods = HeaderValue::from_static("GET, POST, PATCH, DELETE");
    let names = asked.get(header::ACCESS_CONTROL_REQUEST_HEADERS).cloned();
    let names = names.unwrap_or(HeaderValue::from_static("authorization, content-type"));
    let allowed = [
        (header::ACCESS_CONTROL_ALLOW_METHODS, methods),
        (header::ACCESS_CONTROL_ALLOW_HEADERS, names),
        (header::ACCESS_CONTROL_MAX_AGE, HeaderValue::from_static("600")),
    ];
    (StatusCode::NO_CONTENT, allowed).into_response()
}

/// Whose request it is.
fn admitted(keys: &ApiKeys, headers: &HeaderMap, uri: &Uri) -> Result<Owner, Refusal> {
    let host = headers.get(header::HOST).and_then(|host| host.to_str().ok());
    // A request line may have the name too; it then counts as well.
    let in_line = uri.authority().is_none_or(|authority| is_ours(authority.as_str()));
    if !in_line || !host.is_some_and(is_ours) {
        return Err(forbidden("the host is not a name of this box"));
    }
    if let Some(origin) = headers.get(header::ORIGIN) {
        let host = origin.to_str().ok().and_then(|origin| Some(origin.split_once("://")?.1));
        if !host.is_some_and(is_ours) {
            return Err(forbidden("the request comes from a page of another site"));
        }
    }
    shown_key(headers).and_then(|key| keys.owner(key.trim())).ok_or_else(|| {
        let message = "an API key is needed: Authorization: Bearer KEY";
        Refusal::at_door(AtDoor::InvalidApiKey, None, message)
    })
}

/// The key of a request, by whichever name its client has for it.
fn shown_key(headers: &HeaderMap) -> Option<&str> {
    let bearer = headers.get(header::AUTHORIZATION).and_then(|value| {
        let (scheme, key) = value.to_str().ok()?.split_once(' ')?;
        scheme.eq_ignore_ascii_case("Bearer").then_some(key)
    });
    bearer.or_else(|| KEY_HEADERS.iter().find_map(|name| headers.get(*name)?.to_str().ok()))
}

fn forbidden(message: &str) -> Refusal {
    Refusal::at_door(AtDoor::Forbidden, None, message)
}

/// Whether `host`, which may have a port, is a name of this box for itself.
fn is_ours(host: &str) -> bool {
    let name = match host.rsplit_once(':') {
        Some((name, port)) if !port.contains(']') => {
            if port.is_empty() || !port.bytes().all(|byte| byte.is_ascii_digit()) {
                return false;
            }
            name
        }
        _ => host,
    };
    HOSTS.iter().any(|ours| name.eq_ignore_ascii_case(ours))
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIRST: &str = "0123456789abcdef";
    const SECOND: &str = "fedcba9876543210";

    fn keys() -> ApiKeys {
        ApiKeys::parse(&format!("# keys\n\nhall {FIRST}\n  bath\t{SECOND}\n")).unwrap()
    }

    fn status(headers: &[(header::HeaderName, &str)]) -> Result<Owner, u16> {
        let headers = headers.iter().map(|(name, value)| (name.clone(), value.parse().unwrap())).collect();
        admitted(&keys(), &headers, &Uri::from_static("/v1/models")).map_err(|refusal| refusal.name().status)
    }

    #[test]
    fn each_name_is_an_owner_of_its_own() {
        let bearer =
            |key: &str| status(&[(header::HOST, "localhost:1"), (header::AUTHORIZATION, &format!("Bearer {key}"))]);
        let (first, second) = (bearer(FIRST).unwrap(), bearer(SECOND).unwrap());
        assert_eq!((first, second), (Owner::named("tcp", "hall"), Owner::named("tcp", "bath")));
        assert_ne!(first, second);
        for wrong in ["", "0123456789abcde", "0123456789abcdeg", "hall"] {
            assert_eq!(bearer(wrong), Err(401), "{wrong}");
        }
    }

    #[test]
    fn a_key_is_known_by_each_name_that_clients_have_for_it() {
        let with = |name: &'static str, value: &str| {
            status(&[(header::HOST, "localhost"), (header::HeaderName::from_static(name), value)]).is_ok()
        };
        for (name, value) in [("authorization", format!("bearer {FIRST}")), ("x-api-key", FIRST.to_owned())] {
            assert!(with(name, &value), "{name}: {value}");
        }
        assert!(with("api-key", FIRST) && !with("api-key", "x") && !with("authorization", FIRST));
        assert!(!with("authorization", &format!("Basic {FIRST}")));
    }

    #[test]
    fn exchanged_keys_hold_for_a_door_that_is_open() {
        let (held, first) = (keys(), keys());
        let at_the_door = held.clone();
        held.replace(&ApiKeys::parse("attic abcdefghijklmnop").unwrap());
        assert_eq!(at_the_door.owner("abcdefghijklmnop"), Some(Owner::named("tcp", "attic")));
        assert_eq!((at_the_door.owner(FIRST), first.owner(FIRST).is_some()), (None, true));
    }

    #[test]
    fn hosts_and_origins_of_others_are_refused_before_the_key_is_looked_at() {
        let from = |host: &str, origin: Option<&str>| {
            let bearer = format!("Bearer {FIRST}");
            let mut headers = vec![(header::HOST, host), (header::AUTHORIZATION, bearer.as_str())];
            headers.extend(origin.map(|origin| (header::ORIGIN, origin)));
            status(&headers).map(drop)
        };
        for host in ["localhost", "LOCALHOST:80", "127.0.0.1:11535", "[::1]:5", "[::1]"] {
            assert_eq!(from(host, None), Ok(()), "{host}");
        }
        for host in ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example:80", "localhost:", "a:b:80", ""]
        {
            assert_eq!(from(host, None), Err(403), "{host}");
        }
        assert_eq!(from("localhost", Some("http://localhost:3000")), Ok(()));
        for origin in ["null", "https://evil.example", "http://localhost.evil.example"] {
            assert_eq!(from("localhost", Some(origin)), Err(403), "{origin}");
        }
        assert_eq!(status(&[(header::AUTHORIZATION, &format!("Bearer {FIRST}"))]), Err(403), "no host");
    }

    #[test]
    fn lines_that_are_no_keys_are_named() {
        let wrong = |text: &str| ApiKeys::parse(text).unwrap_err();
        assert_eq!(wrong("# none\n"), "there is no key");
        assert!(wrong("hall\n").contains("line 1 is not"));
        assert!(wrong("\nhall short\n").contains("line 2: a key of 5 bytes"));
        assert!(wrong(&format!("a {FIRST}\nb {FIRST}")).contains("line 2: the key is there already"));
        assert!(!format!("{:?}", keys()).contains(FIRST));
    }
}
