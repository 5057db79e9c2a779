//! How does the service manager know that the daemon lives? By a thread that tells it so while the engine gets on.
//!
//! Outside a service of systemd (`NOTIFY_SOCKET` is not set) nothing is told.

use sd_notify::NotifyState;
use sparsed_engine::{DeviceState, Service};
use std::time::{Duration, Instant};

/// Pause between looks while models are loaded or a device is away; also how late STATUS is then.
const PAUSE: Duration = Duration::from_millis(500);
/// Longest pause while all is well, so that an idle box sleeps.
const STEADY_PAUSE: Duration = Duration::from_secs(5);

/// What was told last.
#[derive(Debug, Default)]
struct Told {
    ready: bool,
    status: String,
}

/// Starts the thread. It ends with the process: a daemon that is stopping has a time limit of its own.
///
/// # Errors
/// When no thread can be started.
pub fn start(service: Service) -> std::io::Result<()> {
    if std::env::var_os("NOTIFY_SOCKET").is_none() {
        return Ok(());
    }
    let watchdog = sd_notify::watchdog_enabled();
    // systemd asks for a sign in half the time.
    let longest = watchdog.map_or(STEADY_PAUSE, |limit| (limit / 4).min(STEADY_PAUSE));
    let mut told = Told::default();
    let run = move || {
        loop {
            let alive = service.is_alive(Instant::now());
            if watchdog.is_some() && alive {
                tell(&[NotifyState::Watchdog]);
            }
            let is_steady = told.tell(&service, alive);
            std::thread::sleep(if is_steady { longest } else { longest.min(PAUSE) });
        }
    };
    std::thread::Builder::new().name("watchdog".to_owned()).spawn(run)?;
    Ok(())
}

/// Says that the configuration is being read again.
pub fn reloading() {
    match NotifyState::monotonic_usec_now() {
        Ok(now) => tell(&[NotifyState::Reloading, now]),
        Err(error) => log::debug!(reason:% = error; "the service manager was not told of a reload"),
    }
}

/// Says that it has been read, whatever has become of it.
pub fn reloaded() {
    tell(&[NotifyState::Ready]);
}

/// Says that the daemon is stopping, and that this may take so long: the service's own limit may be shorter.
pub fn stopping(most: Duration) {
    let most = u32::try_from(most.as_micros()).unwrap_or(u32::MAX);
    tell(&[NotifyState::Stopping, NotifyState::ExtendTimeoutUsec(most)]);
}

impl Told {
    /// Answers whether all is well and was so before.
    fn tell(&mut self, service: &Service, alive: bool) -> bool {
        let device = service.device();
        let state = match device.state {
            DeviceState::Loading => "loading models".to_owned(),
            DeviceState::Ready if device.backend_changed => format!("serving on {} instead", device.name),
            DeviceState::Ready => format!("serving on {}", device.name),
            DeviceState::Recovering => format!("no device, {} is next", device.name),
            DeviceState::Unused => "serving models of upstream engines".to_owned(),
        };
        let status = if alive { state } else { format!("stuck: {state}") };
        let is_new = status != self.status;
        if is_new {
            tell(&[NotifyState::Status(&status)]);
            self.status = status;
        }
        // The socket listens. That models answer is for `/health` to say: they may take longer than a start may.
        if !std::mem::replace(&mut self.ready, true) {
            tell(&[NotifyState::Ready]);
        }
        alive && !is_new && is_settled(device.state)
    }
}

/// Whether nothing is about to change by itself. A box without a model of its own has no device to wait for.
fn is_settled(device: DeviceState) -> bool {
    matches!(device, DeviceState::Ready | DeviceState::Unused)
}

fn tell(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        log::debug!(reason:% = error; "the service manager was not told");
    }
}
