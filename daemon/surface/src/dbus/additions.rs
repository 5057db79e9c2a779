//! How does a model file come in? As a descriptor; how far it is goes out through a pipe, as an answer does.
//!
//! Whether the caller may is asked before anything of the file is. The work is done on a thread of its own, since a
//! disk, or whoever else is behind a descriptor, may have it wait; only that thread touches the file.

use super::call::{Call, CallError, Outcome};
use super::interface::REQUEST;
use super::requests::Request;
use super::stream::{self, Broken, Ended, gone};
use super::values::{self, Dict};
use super::{Door, polkit};
use crate::additions::{AddFailure, AddStage, AddStep, AddedModel, ModelStore, NewModel};
use crate::refusal::Refusal;
use rustix::fs::{FileType, FsWord, OFlags};
use serde::Deserialize;
use serde_json::{Value, json};
use sparsed_engine::api::Failure;
use std::fs::File;
use std::ops::ControlFlow;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::net::unix::pipe::Sender;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot, watch};
use tokio::time::MissedTickBehavior;
use zbus::Fd;

/// Models that are added at a time, of all users: the disk is one.
const AT_A_TIME: usize = 1;
/// Pause between lines that say how far it is.
const SAY_EVERY: Duration = Duration::from_millis(250);
/// How long the thread may take to see that its work is not wanted any more, before it is left to itself.
const STOP_PATIENCE: Duration = Duration::from_secs(10);
/// What the kernel calls file systems that another process serves.
const FUSE: FsWord = 0x6573_5546;

/// Models that are being added.
#[derive(Debug)]
pub(super) struct Additions {
    store: Arc<dyn ModelStore>,
    places: Arc<Semaphore>,
    /// Whether the daemon stops.
    stops: watch::Sender<bool>,
}

/// How a model is to be added.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct AddOptions {
    sha256: Option<String>,
    handle_token: Option<String>,
    detach: bool,
}

impl Additions {
    /// None, into `store`.
    pub(super) fn new(store: Arc<dyn ModelStore>) -> Self {
        Self { store, places: Arc::new(Semaphore::new(AT_A_TIME)), stops: watch::Sender::new(false) }
    }

    fn begin(&self) -> Result<OwnedSemaphorePermit, AddFailure> {
        let place = Arc::clone(&self.places).try_acquire_owned();
        place.map_err(|_| AddFailure::Busy { limit: AT_A_TIME })
    }

    /// Ends what is under way: a copy may take longer than a daemon has that is to stop.
    pub(super) fn stop(&self) {
        self.stops.send_replace(true);
    }
}

/// Puts the file that `call` carries into the store.
///
/// # Errors
/// The caller may not; what is wrong with the call; another one is being added. What is wrong with the file is told
/// through the pipe.
pub(super) async fn add(door: &Door, call: &Call) -> Result<Outcome, CallError> {
    polkit::check(door.system_bus(), call, polkit::ADD_MODELS).await?;
    let (file, name, options): (zbus::OwnedFd, String, Dict) = call.arguments()?;
    let AddOptions { sha256, handle_token, detach } = values::fields(&options)?;
    let (shared, uid) = (Arc::clone(&door.shared), call.uid);
    shared.additions.store.check(&name, sha256.as_deref()).map_err(Refusal::from)?;
    let turn = shared.additions.begin().map_err(Refusal::from)?;
    let place = shared.requests.begin(uid, &call.sender, handle_token.as_deref(), detach)?;
    let (pipe, reader) = tokio::net::unix::pipe::pipe().map_err(|error| CallError::system(&error))?;
    let reader = reader.into_blocking_fd().map_err(|error| CallError::system(&error))?;
    let outcome = call.answer(&(place.request.path.clone(), Fd::from(reader)))?;
    let bus = door.bus.clone();
    Ok(outcome.then(async move {
        let request = &place.request;
        request.answers();
        let origin = format!("D-Bus, uid {uid}");
        let work = Work::begin(&shared.additions, turn, file.into(), NewModelOf { name, sha256, origin });
        let ended = match work {
            Ok(work) => carry(work, uid, &pipe, request, shared.options.reader_patience).await,
            Err(error) => Ended::failed(&Refusal::from(AddFailure::Store(error.to_string()))),
        };
        drop(pipe);
        let (to, carried) = (Some(request.sender.as_str()), (ended.reason, ended.usage));
        let said = bus.emit_signal(to, &request.path, REQUEST.name, "Finished", &carried).await;
        if let Err(error) = said {
            log::debug!(reason:% = error; "the end of a request was not heard");
        }
    }))
}

/// A model whose file has not been looked at.
struct NewModelOf {
    name: String,
    sha256: Option<String>,
    origin: String,
}

/// A model on its way into the store. Dropped, it gets no further than the piece that is being copied.
#[derive(Debug)]
struct Work {
    name: String,
    step: watch::Receiver<Option<AddStep>>,
    end: oneshot::Receiver<Result<AddedModel, AddFailure>>,
    stops: watch::Receiver<bool>,
    is_wanted: Wanted,
}

/// Says to the thread, when it is dropped, that nobody wants its work any more.
#[derive(Debug)]
struct Wanted(Arc<AtomicBool>);

impl Drop for Wanted {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Relaxed);
    }
}

impl Work {
    /// Begins it on a thread of its own, which keeps `turn` until its end.
    fn begin(
        additions: &Additions,
        turn: OwnedSemaphorePermit,
        file: OwnedFd,
        model: NewModelOf,
    ) -> std::io::Result<Self> {
        let (store, name) = (Arc::clone(&additions.store), model.name.clone());
        let (said, step) = watch::channel(None);
        let (ended, end) = oneshot::channel();
        let is_wanted = Arc::new(AtomicBool::new(true));
        let seen = Arc::clone(&is_wanted);
        std::thread::Builder::new().name("add-model".to_owned()).spawn(move || {
            let NewModelOf { name, sha256, origin } = model;
            let outcome = plain(file).and_then(|file| {
                store.add(NewModel { file, name, sha256, origin }, &mut |step| {
                    said.send_replace(Some(step));
                    if seen.load(Ordering::Relaxed) { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
                })
            });
            // Whoever hears of the end may begin the next one.
            drop(turn);
            let _unheard = ended.send(outcome).is_err();
        })?;
        Ok(Self { name, step, end, stops: additions.stops.subscribe(), is_wanted: Wanted(is_wanted) })
    }
}

/// The file of a descriptor that can be read and whose reads come to an end: nothing that another process serves.
fn plain(fd: OwnedFd) -> Result<File, AddFailure> {
    let wrong = |reason: &str| AddFailure::Invalid { param: "file", reason: reason.to_owned() };
    let failed = |error: rustix::io::Errno| wrong(&format!("cannot be looked at: {error}"));
    let flags = rustix::fs::fcntl_getfl(&fd).map_err(failed)?;
    if flags.contains(OFlags::PATH) || flags & OFlags::RWMODE == OFlags::WRONLY {
        return Err(wrong("must be open for reading"));
    }
    // Asked first: what a file of such a system is, its process would be asked for.
    if rustix::fs::fstatfs(&fd).map_err(failed)?.f_type == FUSE {
        return Err(wrong("lies on a file system that another process serves (FUSE); copy it elsewhere first"));
    }
    let stat = rustix::fs::fstat(&fd).map_err(failed)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(wrong("must be a plain file"));
    }
    Ok(File::from(fd))
}

/// Says how far it is, and how it ended.
async fn carry(mut work: Work, uid: u32, pipe: &Sender, request: &Request, patience: Duration) -> Ended {
    let mut ticks = tokio::time::interval(SAY_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let broken = loop {
        tokio::select! {
            outcome = &mut work.end => {
                let outcome = outcome.unwrap_or_else(|_| Err(AddFailure::Store("its thread has failed".to_owned())));
                return tell(outcome, &work.name, uid, pipe, request, patience).await;
            }
            _ = ticks.tick() => {
                let Ok(true) = work.step.has_changed() else { continue };
                let Some(step) = *work.step.borrow_and_update() else { continue };
                if let Err(broken) = stream::write(pipe, line(step).to_string(), request, patience).await {
                    break Some(broken);
                }
            }
            () = gone(pipe, request) => break Some(Broken::Cancelled),
            () = stopped(&mut work.stops) => break None,
        }
    };
    drop(work.is_wanted);
    // So that what is told to have ended has ended, and the next one may begin.
    let end = tokio::time::timeout(STOP_PATIENCE, work.end).await;
    match (end, broken) {
        // It was there before anybody could stop it.
        (Ok(Ok(outcome @ Ok(_))), _) => tell(outcome, &work.name, uid, pipe, request, patience).await,
        (_, None) => {
            let refusal = Refusal::from(Failure::ShuttingDown);
            let told = stream::write(pipe, refusal.body().to_string(), request, patience).await;
            told.map_or_else(|broken| Ended::broken(broken, patience), |()| Ended::failed(&refusal))
        }
        (_, Some(broken)) => {
            log::info!(model:% = work.name, uid; "adding a model was cancelled");
            Ended::broken(broken, patience)
        }
    }
}

/// Resolves when the daemon is to stop.
async fn stopped(stops: &mut watch::Receiver<bool>) {
    // Without a sender there is no daemon.
    let _gone = stops.wait_for(|stops| *stops).await.is_err();
}

/// The last line.
async fn tell(
    outcome: Result<AddedModel, AddFailure>,
    name: &str,
    uid: u32,
    pipe: &Sender,
    request: &Request,
    patience: Duration,
) -> Ended {
    let (last, ended) = match outcome {
        Ok(model) => {
            log::info!(model:% = name, digest:% = model.sha256, bytes = model.bytes, uid; "model added to the store");
            (last_line(&model), Ended { reason: "added".to_owned(), usage: Dict::new() })
        }
        Err(failure) => {
            log::warn!(model:% = name, uid, reason:% = failure; "model not added to the store");
            let refusal = Refusal::from(failure);
            (refusal.body(), Ended::failed(&refusal))
        }
    };
    // What is there is there, whether anybody hears it or not.
    match stream::write(pipe, last.to_string(), request, patience).await {
        Err(broken) if ended.reason != "added" => Ended::broken(broken, patience),
        _ => ended,
    }
}

fn line(AddStep { stage, done, total }: AddStep) -> Value {
    let stage = match stage {
        AddStage::Copying => "copying",
        AddStage::Verifying => "verifying",
    };
    json!({ "object": "model.progress", "stage": stage, "done_bytes": done, "total_bytes": total })
}

fn last_line(model: &AddedModel) -> Value {
    let AddedModel { name, sha256, bytes, served_as, next, not_served } = model;
    json!({ "object": "model.added", "name": name, "sha256": sha256, "bytes": bytes, "path": format!("store:{name}"),
            "served_as": served_as, "next": next, "not_served": not_served })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dbus::requests::{Place, Requests};
    use rustix::fs::Mode;
    use std::io::{BufRead, BufReader};
    use std::sync::Mutex;
    use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

    const LONG: Duration = Duration::from_secs(60);

    /// Copies a piece whenever it is told to, and is done when nobody tells any more.
    #[derive(Debug)]
    struct Told(Mutex<Receiver<()>>);

    impl Told {
        fn store() -> (SyncSender<()>, Additions) {
            let (piece, pieces) = sync_channel(1);
            (piece, Additions::new(Arc::new(Self(Mutex::new(pieces)))))
        }
    }

    impl ModelStore for Told {
        fn check(&self, _: &str, _: Option<&str>) -> Result<(), AddFailure> {
            Ok(())
        }

        fn add(
            &self,
            model: NewModel,
            step: &mut dyn FnMut(AddStep) -> ControlFlow<()>,
        ) -> Result<AddedModel, AddFailure> {
            let mut at = AddStep { stage: AddStage::Copying, done: 0, total: 9 };
            for () in self.0.lock().unwrap().iter() {
                at.done += 1;
                if step(at).is_break() {
                    return Err(AddFailure::Stopped);
                }
            }
            let (name, sha256) = (model.name, "ab".to_owned());
            let (served_as, next) = (Vec::new(), model.origin);
            Ok(AddedModel { name, sha256, bytes: at.done, served_as, next, not_served: None })
        }
    }

    fn place() -> Place {
        Arc::new(Requests::new()).begin(5, &":1.1".try_into().unwrap(), None, false).unwrap()
    }

    fn pipe() -> (Sender, File) {
        let (sender, receiver) = tokio::net::unix::pipe::pipe().unwrap();
        (sender, receiver.into_blocking_fd().unwrap().into())
    }

    fn work(additions: &Additions, file: impl Into<OwnedFd>) -> Work {
        let model = NewModelOf { name: "m".to_owned(), sha256: None, origin: "a test".to_owned() };
        Work::begin(additions, additions.begin().unwrap(), file.into(), model).unwrap()
    }

    fn a_file() -> File {
        tempfile::tempfile().unwrap()
    }

    fn lines(file: File) -> Vec<Value> {
        BufReader::new(file).lines().map(|line| serde_json::from_str(&line.unwrap()).unwrap()).collect()
    }

    #[tokio::test]
    async fn the_last_line_says_what_is_there_and_then_the_next_one_may_begin() {
        let (piece, additions) = Told::store();
        let (sender, file) = pipe();
        let place = place();
        let work = work(&additions, a_file());
        assert_eq!(additions.begin().unwrap_err(), AddFailure::Busy { limit: AT_A_TIME });
        piece.send(()).unwrap();
        drop(piece);
        let ended = carry(work, 5, &sender, &place.request, LONG).await;
        drop(sender);
        let last = lines(file).pop().unwrap();
        assert_eq!(
            (&last["object"], &last["path"], &last["bytes"]),
            (&json!("model.added"), &json!("store:m"), &json!(1))
        );
        assert_eq!((ended.reason.as_str(), &last["next"]), ("added", &json!("a test")));
        assert!(additions.begin().is_ok());
    }

    #[tokio::test]
    async fn how_far_it_is_is_a_line_and_who_closes_the_pipe_ends_it() {
        let (piece, additions) = Told::store();
        let (sender, file) = pipe();
        let place = place();
        let work = work(&additions, a_file());
        piece.send(()).unwrap();
        let reading = tokio::task::spawn_blocking(move || {
            let mut line = String::new();
            BufReader::new(file).read_line(&mut line).unwrap();
            serde_json::from_str::<Value>(&line).unwrap()
        });
        let mut carried = std::pin::pin!(carry(work, 5, &sender, &place.request, LONG));
        let line = tokio::select! {
            line = reading => line.unwrap(),
            ended = &mut carried => panic!("{ended:?}"),
        };
        let pieces = async {
            loop {
                // Full when the last one was not taken yet.
                let _full = piece.try_send(()).is_err();
                tokio::task::yield_now().await;
            }
        };
        let ended = tokio::select! {
            ended = carried => ended,
            () = pieces => unreachable!("it has no end"),
        };
        assert_eq!(
            (&line["stage"], &line["done_bytes"], &line["total_bytes"]),
            (&json!("copying"), &json!(1), &json!(9))
        );
        assert_eq!(ended.reason, "cancelled");
    }

    #[tokio::test]
    async fn a_daemon_that_stops_says_so_and_does_not_wait_for_a_copy() {
        let (piece, additions) = Told::store();
        let (sender, file) = pipe();
        let place = place();
        let work = work(&additions, a_file());
        additions.stop();
        let next = async { piece.send(()).unwrap() };
        let (ended, ()) = tokio::join!(carry(work, 5, &sender, &place.request, LONG), next);
        drop(sender);
        assert_eq!(
            (ended.reason.as_str(), &lines(file)[0]["error"]["code"]),
            ("shutting_down", &json!("shutting_down"))
        );
    }

    #[tokio::test]
    async fn what_is_wrong_with_a_descriptor_is_the_only_line() {
        let (_piece, additions) = Told::store();
        let (sender, file) = pipe();
        let place = place();
        let work = work(&additions, std::io::pipe().unwrap().0);
        let ended = carry(work, 5, &sender, &place.request, LONG).await;
        drop(sender);
        let lines = lines(file);
        assert_eq!((lines.len(), &lines[0]["error"]["param"]), (1, &json!("file")), "{lines:?}");
        assert_eq!(ended.reason, "invalid_value");
    }

    #[test]
    fn only_a_plain_file_that_is_open_for_reading_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m");
        let open = |flags: OFlags| rustix::fs::open(&path, flags | OFlags::CREATE, Mode::RUSR | Mode::WUSR).unwrap();
        assert!(plain(open(OFlags::RDWR)).is_ok() && plain(open(OFlags::RDONLY)).is_ok());
        let (socket, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        let refused = [
            (open(OFlags::WRONLY), "open for reading"),
            (rustix::fs::open(&path, OFlags::PATH, Mode::empty()).unwrap(), "open for reading"),
            (File::open(dir.path()).unwrap().into(), "plain file"),
            (File::open("/dev/zero").unwrap().into(), "plain file"),
            (std::io::pipe().unwrap().0.into(), "plain file"),
            (socket.into(), "plain file"),
        ];
        for (fd, why) in refused {
            let said = plain(fd).unwrap_err().to_string();
            assert!(said.starts_with("'file'") && said.contains(why), "{said}");
        }
    }
}
