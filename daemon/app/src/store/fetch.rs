//! How does a model come into the store? In pieces if need be, whatever the server and the line do.
//!
//! What has come lies in `partial/`, with what is known of it. The next attempt, or the next call, asks for the rest
//! only if the server says that the file is still the same (`If-Range` with a strong ETag), or where the digest is
//! known. At the end all of it is read from the disk and hashed, so what is put into the store is what lies there.

#[cfg(test)]
mod tests;

use super::copy::copy;
use super::http::{Client, Part, Reply, Unanswered};
use super::partial::{Known, Partial};
use super::{Digest, Entry, Source, Store};
use anyhow::{Context, anyhow, bail, ensure};
use hyper::{StatusCode, Uri, header};
use std::fs::File;
use std::path::PathBuf;
use std::time::Duration;

/// How often a file may turn out to be another one.
const RESTARTS_MAX: u32 = 3;
/// The longest pause that a server may ask for.
const RETRY_AFTER_S_MAX: u64 = 60;

/// How a model is fetched.
#[derive(Clone, Debug)]
pub struct FetchOptions {
    /// What it must be.
    pub expected: Option<Digest>,
    /// Largest file.
    pub bytes_max: u64,
    /// For the server that is asked first.
    pub token: Option<String>,
    /// Whose certificates are believed, in PEM; `None`: the system's authorities.
    pub ca_file: Option<PathBuf>,
    /// Pauses before further attempts; so many may fail one after another that bring nothing.
    pub pauses: Vec<Duration>,
    /// How long a server may be silent.
    pub patience: Duration,
}

/// What has been put into the store.
#[derive(Clone, Debug)]
pub struct Fetched {
    /// What its name stands for.
    pub entry: Entry,
    /// Bytes that were there from an earlier call.
    pub resumed_bytes: u64,
}

/// Hears how far a model is on its way into the store.
pub trait Watcher {
    /// `done` bytes of `total` have come.
    ///
    /// # Errors
    /// It is to end here.
    fn fetched(&mut self, done: u64, total: Option<u64>) -> std::io::Result<()>;
    /// All has come, `done` bytes of `total` are hashed.
    ///
    /// # Errors
    /// It is to end here.
    fn hashed(&mut self, done: u64, total: u64) -> std::io::Result<()>;
    /// Something that people are to know.
    fn note(&mut self, text: &str);
}

/// Fetches `source`, with the parts beside it where it is the first of several, and has `name` stand for it.
///
/// # Errors
/// Why not; what has come stays for the next call, unless it is known to be wrong.
pub async fn fetch(
    store: &Store,
    name: &str,
    source: &Source,
    options: &FetchOptions,
    watcher: &mut dyn Watcher,
) -> anyhow::Result<Fetched> {
    super::check_name(name)?;
    store.make()?;
    let parts = source.parts()?;
    let n_parts = parts.len();
    ensure!(
        n_parts == 1 || options.expected.is_none(),
        "each of the {n_parts} parts has a SHA-256 of its own; leave out the one that was given"
    );
    if n_parts > 1 {
        store.check_links(|from, to| std::fs::hard_link(from, to))?;
    }
    let (mut wholes, mut options, mut resumed_bytes) = (Vec::new(), options.clone(), 0);
    for (number, part) in (1..).zip(&parts) {
        if n_parts > 1 {
            watcher.note(&format!("part {number} of {n_parts}"));
        }
        let whole = fetch_file(store, part, &options, watcher).await?;
        resumed_bytes += whole.resumed_bytes;
        // The limit is one for all.
        options.bytes_max = options.bytes_max.saturating_sub(whole.partial.have);
        wholes.push(whole);
    }
    let files: Vec<_> = wholes.iter().map(|whole| (whole.partial.path.clone(), whole.digest)).collect();
    let entry = store.put(name, &files, source.public())?;
    for whole in wholes {
        // What remains is what was known of it.
        let _gone = std::fs::remove_file(whole.partial.known_path()).is_ok();
    }
    Ok(Fetched { entry, resumed_bytes })
}

/// A file that has come as a whole, still locked.
struct Whole {
    partial: Partial,
    digest: Digest,
    /// Bytes that were there from an earlier call.
    resumed_bytes: u64,
}

/// Has all of one file in the folder of partial ones.
async fn fetch_file(
    store: &Store,
    source: &Source,
    options: &FetchOptions,
    watcher: &mut dyn Watcher,
) -> anyhow::Result<Whole> {
    let mut partial = Partial::open(store, &source.key())?;
    let resumed_bytes = partial.have;
    let expected = match source {
        Source::File(path) => {
            let within = || path.display().to_string();
            let from = File::open(path).with_context(within)?;
            copy(&mut partial, &from, options.bytes_max, watcher).with_context(within)?;
            options.expected
        }
        Source::Web(uri) | Source::Hub { uri, .. } => {
            let downloaded = download(&mut partial, uri, options, watcher).await;
            // Also of a part of several, of which a later one may not come.
            let kept = partial.keep();
            downloaded.and_then(|expected| kept.map(|()| expected))?
        }
    };
    let digest = partial.digest(watcher)?;
    if let Some(expected) = expected.filter(|expected| *expected != digest) {
        partial.discard()?;
        bail!("what has come is another file: its SHA-256 is {digest}, not {expected}; it was removed");
    }
    Ok(Whole { partial, digest, resumed_bytes })
}

/// Why an attempt ended.
enum Ended {
    /// Another one may go further.
    ForNow(anyhow::Error, Option<Duration>),
    /// A part came as it was told, and is not known to be the last one.
    Part,
    /// The file is another one than before: all of it is to come again.
    Changed,
    /// No other one would.
    ForGood(anyhow::Error),
}

impl<E: Into<anyhow::Error>> From<E> for Ended {
    fn from(error: E) -> Self {
        Self::ForGood(error.into())
    }
}

/// What an answer brings.
struct Coming {
    /// Bytes that there are when all of it has come, if it tells them.
    until: Option<u64>,
    /// Whether its end is the file's.
    is_rest: bool,
}

/// Has all of `uri` in the partial file. Answers what it must be, as far as anybody has said.
async fn download(
    partial: &mut Partial,
    uri: &Uri,
    options: &FetchOptions,
    watcher: &mut dyn Watcher,
) -> anyhow::Result<Option<Digest>> {
    let mut client = Client::new(options.patience, options.token.clone(), options.ca_file.clone());
    let mut expected = options.expected;
    let (mut failures, mut restarts) = (options.pauses.iter(), 0);
    // The most that there was. An attempt that begins anew loses bytes: it is no progress, however far it gets.
    let mut most = partial.have;
    loop {
        let n_lost = partial.n_lost;
        let ended = attempt(partial, &mut client, uri, &mut expected, options, watcher).await;
        let has_grown = partial.have > most && partial.n_lost == n_lost;
        most = most.max(partial.have);
        if has_grown {
            failures = options.pauses.iter();
        }
        match ended {
            Ok(()) => return Ok(expected),
            Err(Ended::ForGood(error)) => return Err(error),
            Err(Ended::Part) if partial.n_lost == n_lost => {}
            Err(Ended::Part) => bail!("the server sends parts of the file and never says where it ends; give --sha256"),
            Err(Ended::Changed) => {
                restarts += 1;
                ensure!(restarts <= RESTARTS_MAX, "the file at the server changes again and again");
                watcher.note("the file is another one than before: all of it is fetched again");
                partial.restart()?;
                most = 0;
            }
            Err(Ended::ForNow(error, asked)) => {
                let Some(pause) = failures.next() else {
                    return Err(error.context("given up; what has come is kept, and the same command goes on with it"));
                };
                let pause = asked.unwrap_or(*pause);
                watcher.note(&format!("{error:#}; next attempt in {:.1} s", pause.as_secs_f64()));
                tokio::time::sleep(pause).await;
            }
        }
    }
}

async fn attempt(
    partial: &mut Partial,
    client: &mut Client,
    uri: &Uri,
    expected: &mut Option<Digest>,
    options: &FetchOptions,
    watcher: &mut dyn Watcher,
) -> Result<(), Ended> {
    if partial.have > 0 && partial.known.etag.is_none() && expected.is_none() {
        // Nobody could say whether the rest belongs to it.
        partial.restart()?;
    }
    let etag = partial.known.etag.clone();
    let part = Part { from: partial.have, if_still: etag.as_deref() };
    let mut reply = client.get(uri, part).await.map_err(|error| match error {
        Unanswered::ForNow(error) => Ended::ForNow(error, None),
        Unanswered::ForGood(error) => Ended::ForGood(error),
    })?;
    *expected = expected.or(reply.digest);
    let Some(coming) = begin(partial, &reply, expected.is_some(), options)? else { return Ok(()) };
    watcher.fetched(partial.have, partial.known.total)?;
    if partial.is_whole() {
        return Ok(());
    }
    loop {
        match reply.next().await {
            Ok(Some(bytes)) => partial.write(&bytes, options.bytes_max)?,
            Ok(None) => break,
            Err(error) => return Err(Ended::ForNow(error.context("the line broke"), None)),
        }
        watcher.fetched(partial.have, partial.known.total)?;
    }
    match coming.until {
        Some(until) if partial.have > until => Err(anyhow!("more came than the {until} bytes that were told").into()),
        Some(until) if partial.have < until => Err(Ended::ForNow(anyhow!("the server ended too early"), None)),
        _ if coming.is_rest || partial.is_whole() => Ok(()),
        _ => Err(Ended::Part),
    }
}

/// Looks at an answer's head, and has the partial file ready for its body; `None`: all is there.
fn begin(
    partial: &mut Partial,
    reply: &Reply,
    is_digest_known: bool,
    options: &FetchOptions,
) -> Result<Option<Coming>, Ended> {
    let (status, have) = (reply.status, partial.have);
    let encoding = reply.text(header::CONTENT_ENCODING).unwrap_or("identity");
    if status.is_success() && encoding != "identity" {
        return Err(anyhow!("the server sends it encoded ({encoding}), though it was asked not to").into());
    }
    // Weak ones may be the same for different bytes.
    let etag = reply.text(header::ETAG).filter(|etag| etag.starts_with('"')).map(str::to_owned);
    let coming = match status {
        StatusCode::OK => {
            if have > 0 {
                // It ignores ranges, or the file is another one.
                partial.restart()?;
            }
            let total = reply.number(header::CONTENT_LENGTH);
            let ends_by_itself = reply.text(header::TRANSFER_ENCODING).is_some();
            if total.is_none() && !ends_by_itself && !is_digest_known {
                let reason = "the server tells no length, so nobody would see that an end is missing; give --sha256";
                return Err(anyhow!(reason).into());
            }
            partial.know(etag, total)?;
            Coming { until: total, is_rest: true }
        }
        StatusCode::PARTIAL_CONTENT => {
            let range = reply.text(header::CONTENT_RANGE).and_then(content_range);
            // Of nothing, nothing is known.
            let known = if have > 0 { partial.known.clone() } else { Known { etag: etag.clone(), total: None } };
            let is_other = known.etag.is_some() && etag.is_some() && etag != known.etag;
            let fits_total = |total| known.total.is_none_or(|known| known == total);
            match range {
                Some((first, last, total)) if first == have && !is_other && total.is_none_or(fits_total) => {
                    partial.know(known.etag, known.total.or(total))?;
                    // Where the whole ends, only a length says: a part may be any.
                    Coming { until: last.checked_add(1), is_rest: false }
                }
                _ => return Err(Ended::Changed),
            }
        }
        // Nothing follows what is there: it is whole, or longer than the file now is.
        StatusCode::RANGE_NOT_SATISFIABLE if have > 0 => {
            let total =
                reply.text(header::CONTENT_RANGE).and_then(|range| range.strip_prefix("bytes */")?.parse().ok());
            let is_same = partial.known.etag.is_some() && etag.is_none_or(|etag| Some(etag) == partial.known.etag);
            let is_end = match partial.known.total {
                None => total.is_none_or(|total: u64| total == have) && (is_same || is_digest_known),
                Some(told) => total == Some(have) && (told == have || is_digest_known),
            };
            if !is_end {
                return Err(Ended::Changed);
            }
            partial.know(partial.known.etag.clone(), Some(have))?;
            return Ok(None);
        }
        _ => return Err(refused(reply)),
    };
    partial.known.total.map_or(Ok(()), |total| partial.check_room(total, options.bytes_max))?;
    Ok(Some(coming))
}

fn refused(reply: &Reply) -> Ended {
    let status = reply.status;
    let may_pass = status.is_server_error() || matches!(status.as_u16(), 408 | 425 | 429);
    if may_pass {
        let pause = reply.number(header::RETRY_AFTER).map(|s| Duration::from_secs(s.min(RETRY_AFTER_S_MAX)));
        return Ended::ForNow(anyhow!("the server answers {status}"), pause);
    }
    Ended::ForGood(match status.as_u16() {
        401 | 403 => {
            anyhow!("the server answers {status}: it wants a token (HF_TOKEN), or the file is not for everybody")
        }
        404 => anyhow!("the server answers {status}: there is no such file"),
        _ => anyhow!("the server answers {status}"),
    })
}

/// First and last byte, and the length of the whole, in `bytes 5-9/10`.
fn content_range(text: &str) -> Option<(u64, u64, Option<u64>)> {
    let (range, total) = text.strip_prefix("bytes ")?.split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let (first, last): (u64, u64) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
    let total = if total.trim() == "*" { None } else { Some(total.trim().parse().ok()?) };
    (first <= last && total.is_none_or(|total| last < total)).then_some((first, last, total))
}
