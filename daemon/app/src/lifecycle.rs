//! When does the daemon stop? On a signal in good order, or when its engine has ended.
//!
//! A first SIGTERM or SIGINT: no new clients, running answers may end within `limits.stop_s`, then they hear that the
//! daemon is stopping. A second signal ends it at once.

use crate::absent;
use crate::additions::Additions;
use crate::assemble::Assembly;
use crate::config::{Config, Paths, Source};
use crate::door::{self, Passed};
use crate::mqtt::Tuning;
use crate::named::Named;
use crate::reload::Reloader;
use crate::state::{StateLock, may_mend_itself};
use crate::tcp::TcpSockets;
use crate::turned_away::{Why, turn_away};
use crate::watchdog;
use anyhow::{Context, anyhow, bail};
use clap::Parser;
use sparsed_engine::{ModelState, Service};
use sparsed_surface::{DbusOptions, MqttDoor, ServeOptions, TcpDoor, VERBS_AT_A_TIME, serve_dbus};
use std::future::Future;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::Instant;

/// Threads that carry bytes between sockets and engine; they never compute.
const SURFACE_THREADS: usize = 2;
/// Most prompts that are tokenized at a time, beside those of sessions.
const PROMPTS_AT_A_TIME: usize = 4;

/// sparsed serves DSA models to the apps on this box.
#[derive(Debug, Parser)]
#[command(name = "sparsed", version, disable_help_subcommand = true)]
struct Arguments {
    #[command(flatten)]
    source: Source,
    #[command(subcommand)]
    role: Option<Role>,
}

/// What this executable is besides the daemon.
#[derive(Clone, Debug, clap::Subcommand)]
enum Role {
    /// A plugin's process: serves it to the daemon that started it.
    #[command(hide = true)]
    PluginHost {
        /// Where the daemon's log ends.
        #[arg(long, default_value_t = log::LevelFilter::Info)]
        log_level: log::LevelFilter,
    },
}

/// The daemon's command line, for its manual page.
pub(crate) fn command_line() -> clap::Command {
    <Arguments as clap::CommandFactory>::command()
}

/// How long tasks that nobody waits for may still take at the end.
const LAST_TASKS: Duration = Duration::from_secs(1);

/// Longer than a stop takes after its patience: a few times [`LAST_TASKS`], on a machine that is busy.
const WIND_DOWN: Duration = Duration::from_secs(10);

/// Pause between looks for a state folder that could not be used at the start.
const STATE_RETRY: Duration = Duration::from_secs(5);

/// Exit code for arguments and configurations that stay wrong however often they are tried: clap's, and the one that
/// `RestartPreventExitStatus=` of the service names.
const MISCONFIGURED: u8 = 2;

/// Runs the daemon. Exit codes: 0 stopped in order, 1 could not serve, 2 wrong arguments or configuration.
pub fn main() -> ExitCode {
    let began = std::time::Instant::now();
    let arguments = Arguments::parse();
    if let Some(Role::PluginHost { log_level }) = arguments.role {
        crate::logging::start_for_daemon(log_level);
        let hosted = sparsed_backend::run_plugin_host().context("plugin host");
        return hosted.map_or_else(|error| failed(&error), |()| ExitCode::SUCCESS);
    }
    crate::logging::start(log::LevelFilter::Info);
    let passed = match door::passed() {
        Ok(passed) => passed,
        Err(error) => return failed(&error),
    };
    // Who waits there is answered whatever becomes of the daemon; out of descriptors, it would not get far either.
    let waiting = passed.try_clone().unwrap_or_default();
    let (config, named) = match configured(&arguments.source, !passed.tcp.is_empty()) {
        Ok(configured) => configured,
        // A file on a disk that comes late: the next start may find it.
        Err(Unconfigured::Unread(error)) => {
            let code = failed(&error);
            turn_away(passed, Why::Failed, began);
            return code;
        }
        Err(Unconfigured::Wrong(error)) => {
            log::error!(reason:% = format!("{error:#}"); "configuration is wrong");
            turn_away(passed, Why::Misconfigured, began);
            return ExitCode::from(MISCONFIGURED);
        }
    };
    match run(arguments.source, config, passed, named) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let code = failed(&error);
            turn_away(waiting, Why::Failed, began);
            code
        }
    }
}

fn failed(error: &anyhow::Error) -> ExitCode {
    log::error!(reason:% = format!("{error:#}"); "the daemon cannot serve");
    ExitCode::FAILURE
}

/// Why there is no configuration to start with.
enum Unconfigured {
    /// It stays wrong until somebody mends it.
    Wrong(anyhow::Error),
    /// A file of it, or one that it names, cannot be read now.
    Unread(anyhow::Error),
}

/// The configuration, and the files that it names.
///
/// # Errors
/// What is wrong with either.
fn configured(source: &Source, has_tcp: bool) -> Result<(Config, Named), Unconfigured> {
    let config = source.load().map_err(|error| match error.may_mend_itself() {
        true => Unconfigured::Unread(error.into()),
        false => Unconfigured::Wrong(error.into()),
    })?;
    crate::logging::set_level(config.log.level.into());
    let named = Named::read(&config, has_tcp).map_err(|error| match may_mend_itself(&error) {
        true => Unconfigured::Unread(error),
        false => Unconfigured::Wrong(error),
    })?;
    Ok((config, named))
}

fn run(source: Source, config: Config, passed: Passed, named: Named) -> anyhow::Result<()> {
    let runtime = runtime()?;
    let hangups = {
        let _entered = runtime.enter();
        // Caught before anybody is told that the daemon is ready, and so may be told to reload.
        signal(SignalKind::hangup()).context("SIGHUP cannot be caught")?
    };
    let assembly = Assembly::new(&config, passed, named)?;
    watchdog::start(assembly.service.clone()).context("the watchdog thread")?;
    runtime.spawn(reload_at(hangups, Reloader::new(source, config.clone(), &assembly)));
    let outcome = runtime.block_on(serve_until(assembly, &config, signalled()));
    // A prompt that is being made for a client that is gone must not hold the end up.
    runtime.shutdown_timeout(LAST_TASKS);
    outcome
}

/// The runtime of the surfaces.
///
/// # Errors
/// When threads cannot be started.
pub fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(SURFACE_THREADS)
        .max_blocking_threads(PROMPTS_AT_A_TIME + VERBS_AT_A_TIME)
        .thread_name("surface")
        .enable_all()
        .build()
        .context("the surface threads")
}

/// Serves until `stop` resolves or the engine ends by itself.
///
/// # Errors
/// When no model can be served, or the engine failed.
pub async fn serve_until(assembly: Assembly, config: &Config, stop: impl Future<Output = ()>) -> anyhow::Result<()> {
    let Assembly { service, engine, upstreams, door, tcp, mqtt, mqtt_comes, tuning, absent, paths, lock } = assembly;
    let address = door.address();
    let (listener, closing) = door.split();
    let listener = tokio::net::UnixListener::from_std(listener)?;
    let tcp = tcp.map(|TcpSockets { listeners, keys, .. }| {
        let listeners = listeners.into_iter().map(tokio::net::TcpListener::from_std);
        Ok::<_, std::io::Error>(TcpDoor { listeners: listeners.collect::<Result<_, _>>()?, keys })
    });
    let tcp = tcp.transpose()?;
    let options = ServeOptions {
        connections_max: config.limits.connections as usize,
        connections_per_user: match config.limits.per_user_connections {
            0 => u32::MAX,
            most => most,
        },
        body_bytes_max: usize::try_from(config.limits.body.0)?,
        background: config.sessions.background as usize,
        // Longer than the engine waits for a reader, who may then still hear that it was too slow.
        reader_patience: 2 * Duration::from_secs(config.limits.slow_consumer_s),
        // Longer than running answers have, so that clients hear why theirs was cut off.
        stop_timeout: Duration::from_secs(config.limits.stop_s) + 2 * LAST_TASKS,
    };
    log::info!(address:%, state_dir:% = paths.state_dir.display(); "listening");
    // The engine thread is waited for on a thread of its own: a blocking-pool place would be lost to tokenizing.
    let (ended, mut engine_end) = tokio::sync::oneshot::channel();
    std::thread::Builder::new().name("engine-end".to_owned()).spawn(move || {
        // Whoever waited is gone only when the daemon ends.
        let _unheard = ended.send(engine.join().is_ok()).is_err();
    })?;
    // Dropped, it stops all doors.
    let (stop_serving, stopped) = tokio::sync::watch::channel(());
    let stopped = move || {
        let mut stopped = stopped.clone();
        async move { while stopped.changed().await.is_ok() {} }
    };
    let on_socket = sparsed_surface::serve(listener, tcp, service.clone(), options, stopped.clone());
    let store = || Arc::new(Additions::new(config, &paths));
    let on_bus = dbus_options(config, options)?.map(|dbus| serve_dbus(service.clone(), store(), dbus, stopped()));
    let mqtt_comes = mqtt_comes.then(|| (tuning, paths.clone(), lock.clone()));
    let on_broker = serve_mqtt(mqtt, mqtt_comes, service.clone(), stopped());
    // These end with the runtime.
    tokio::spawn(absent::load(service.clone(), absent));
    for upstream in upstreams {
        tokio::spawn(async move { upstream.watch().await });
    }
    let serving = tokio::spawn(async {
        let on_bus = async {
            if let Some(on_bus) = on_bus {
                on_bus.await;
            }
        };
        tokio::join!(on_socket, on_bus, on_broker);
    });
    let outcome = tokio::select! {
        sound = &mut engine_end => Some(sound.unwrap_or(false)),
        () = stop => None,
    };
    drop(stop_serving);
    match outcome {
        Some(sound) => {
            closing.close();
            bail!("{}", why_ended(&service, sound))
        }
        None => {
            log::info!("stopping");
            let patience = Duration::from_secs(config.limits.stop_s);
            watchdog::stopping(patience + WIND_DOWN);
            closing.close();
            wind_down(&service, serving, engine_end, patience).await
        }
    }
}

/// The D-Bus door, if there is to be one.
fn dbus_options(config: &Config, socket: ServeOptions) -> anyhow::Result<Option<DbusOptions>> {
    let bus =
        config.dbus.bus(std::env::var_os("NOTIFY_SOCKET").as_deref()).map_err(|wrong| anyhow!("dbus.bus {wrong}"))?;
    Ok(bus.map(|bus| DbusOptions {
        bus,
        body_bytes_max: socket.body_bytes_max,
        reader_patience: Duration::from_secs(config.limits.slow_consumer_s),
        stop_timeout: socket.stop_timeout,
    }))
}

/// Serves MQTT, where it is configured; if its door could not be opened at the start, once it can.
async fn serve_mqtt(
    mut door: Option<MqttDoor>,
    comes: Option<(Tuning, Paths, StateLock)>,
    service: Service,
    stop: impl Future<Output = ()>,
) {
    let mut stop = std::pin::pin!(stop);
    if let Some((tuning, paths, lock)) = comes {
        door = tokio::select! {
            door = late_mqtt(&tuning, &paths, &lock) => door,
            () = &mut stop => return,
        };
    }
    if let Some(door) = door
        && let Err(error) = door.serve(service, stop).await
    {
        log::error!(reason:% = error; "MQTT is not served");
    }
}

/// The door, when its journal's folder can be used and its files be read.
async fn late_mqtt(tuning: &Tuning, paths: &Paths, lock: &StateLock) -> Option<MqttDoor> {
    loop {
        tokio::time::sleep(STATE_RETRY).await;
        match try_mqtt(tuning.clone(), paths.clone(), lock.clone()).await {
            Ok(door) => return door,
            Err(error) if may_mend_itself(&error) => {}
            Err(error) => {
                log::error!(reason:% = format!("{error:#}"); "MQTT is not served");
                return None;
            }
        }
    }
}

/// Tries once to open the door, on a thread of its own: on a disk that hangs it waits for ever, and neither the other
/// doors nor the daemon's end may wait with it.
async fn try_mqtt(tuning: Tuning, paths: Paths, lock: StateLock) -> anyhow::Result<Option<MqttDoor>> {
    let (opened, outcome) = tokio::sync::oneshot::channel();
    std::thread::Builder::new().name("mqtt-open".to_owned()).spawn(move || {
        let door = lock.take(&paths.state_dir).and_then(|()| tuning.open(&paths));
        // Whoever waited is gone only when the daemon ends.
        let _unheard = opened.send(door).is_err();
    })?;
    outcome.await.context("the thread that opens the MQTT journal")?
}

/// Lets running answers end, within the time there is. A call into a plugin that hangs is not waited for: its process
/// is killed, and if it has none, the daemon's end is its end.
async fn wind_down(
    service: &Service,
    mut serving: tokio::task::JoinHandle<()>,
    mut engine_end: tokio::sync::oneshot::Receiver<bool>,
    stop_timeout: Duration,
) -> anyhow::Result<()> {
    // Told on threads of their own: the inbox may be full, and the blocking pool busy with prompts.
    let drained = service.clone();
    std::thread::spawn(move || drained.drain());
    let answers = service.models().iter().any(|model| model.state.answers());
    // While models are being loaded there is no answer to wait for.
    let patience = if answers { stop_timeout } else { stop_timeout.min(LAST_TASKS) };
    let mut flushing = patience + 2 * LAST_TASKS;
    let over = Instant::now() + patience;
    if tokio::time::timeout(patience, &mut engine_end).await.is_err() {
        flushing = LAST_TASKS;
        log::warn!("answers were cut off: the time to stop is over");
        let stopped = service.clone();
        std::thread::spawn(move || stopped.stop());
        // A step that is under way ends its sequences in order; one that hangs is made to fail.
        if tokio::time::timeout(LAST_TASKS, &mut engine_end).await.is_err() {
            sparsed_backend::kill_plugin_hosts();
        }
    }
    // Answers of engines elsewhere may go on for as long as those of this box.
    if service.has_upstreams() && tokio::time::timeout_at(over, &mut serving).await.is_err() {
        flushing = LAST_TASKS;
        let stopped = service.clone();
        std::thread::spawn(move || stopped.stop());
    }
    // Whoever was answered reads to the end, or is not there any more.
    if !serving.is_finished() && tokio::time::timeout(flushing, serving).await.is_err() {
        log::warn!("connections were cut off: the time to stop is over");
    }
    log::info!("stopped");
    Ok(())
}

fn why_ended(service: &Service, sound: bool) -> String {
    let failed = service.models().into_iter().filter_map(|model| match model.state {
        ModelState::Failed(reason) => Some(format!("{}: {reason}", model.name)),
        _ => None,
    });
    let failed: Vec<String> = failed.collect();
    if sound && !failed.is_empty() {
        return format!("no model can be served: {}", failed.join("; "));
    }
    "the engine thread failed; the lines above say why".to_owned()
}

/// Reads the configuration again at each SIGHUP.
async fn reload_at(mut hangups: Signal, mut reloader: Reloader) {
    while hangups.recv().await.is_some() {
        watchdog::reloading();
        match tokio::task::block_in_place(|| reloader.reload()) {
            Ok(reloaded) => log::info!(changes:% = reloaded; "configuration reloaded"),
            Err(error) => log::error!(reason:% = format!("{error:#}"); "configuration not reloaded, nothing changes"),
        }
        watchdog::reloaded();
    }
}

/// Resolves at the first SIGTERM or SIGINT; at the second the process ends at once.
async fn signalled() {
    let (Ok(mut terminate), Ok(mut interrupt)) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        log::warn!("signals cannot be caught: they end the daemon at once");
        return std::future::pending().await;
    };
    let mut next = async move || {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    };
    next().await;
    tokio::spawn(async move {
        next().await;
        #[expect(clippy::exit, reason = "asked twice, the operator wants it now")]
        std::process::exit(1);
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_configuration_on_a_disk_that_is_away_is_tried_again_and_one_that_is_nowhere_is_a_mistake() {
        let dir = tempfile::tempdir().unwrap();
        let (link, file) = (dir.path().join("link.toml"), dir.path().join("disk/c.toml"));
        std::os::unix::fs::symlink(&file, &link).unwrap();
        assert!(matches!(configured(&Source::of(&link, &[]), false), Err(Unconfigured::Unread(_))));
        assert!(matches!(configured(&Source::of(&file, &[]), false), Err(Unconfigured::Wrong(_))));
    }
}
