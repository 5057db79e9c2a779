//! How does the service manager know that the daemon lives? By a thread that tells it so while the engine gets on.
//!
//! Outside a service of systemd (`NOTIFY_SOCKET` is not set) nothing is told.

use sd_notify::NotifyState;
use sparsed_engine::{DeviceState, Service};
use std::time::{Duration, Instant};

/// Longest pause between looks; also how late READY and STATUS are.
const PAUSE_MAX: Duration = Duration::from_millis(500);

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
    let pause = watchdog.map_or(PAUSE_MAX, |limit| (limit / 4).min(PAUSE_MAX));
    let mut told = Told::default();
    let run = move || {
        loop {
            let alive = service.is_alive(Instant::now());
            if watchdog.is_some() && alive {
                tell(&[NotifyState::Watchdog]);
            }
            told.tell(&service, alive);
            std::thread::sleep(pause);
        }
    };
    std::thread::Builder::new().name("watchdog".to_owned()).spawn(run)?;
    Ok(())
}

/// Says that the daemon is stopping.
pub fn stopping() {
    tell(&[NotifyState::Stopping]);
}

impl Told {
    fn tell(&mut self, service: &Service, alive: bool) {
        let device = service.device();
        let state = match device.state {
            DeviceState::Loading => "loading models".to_owned(),
            DeviceState::Ready if device.backend_changed => format!("serving on {} instead", device.name),
            DeviceState::Ready => format!("serving on {}", device.name),
            DeviceState::Recovering => format!("no device, {} is next", device.name),
            DeviceState::Unused => "serving models of upstream engines".to_owned(),
        };
        let status = if alive { state } else { format!("stuck: {state}") };
        if status != self.status {
            tell(&[NotifyState::Status(&status)]);
            self.status = status;
        }
        // The socket listens. That models answer is for `/health` to say: they may take longer than a start may.
        if !std::mem::replace(&mut self.ready, true) {
            tell(&[NotifyState::Ready]);
        }
    }
}

fn tell(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        log::debug!(reason:% = error; "the service manager was not told");
    }
}
