//! What of a new configuration takes hold without a restart? All that SIGHUP finds changed and that can be.
//!
//! Everything is read and checked first, the files that the configuration names among it: what is wrong leaves all as
//! it was. What changed, and what waits for the next start, is one line of the log.

use crate::assemble::{Assembly, engine_limits};
use crate::config::{Config, Difference, Paths, Source};
use crate::mqtt::Tuning;
use crate::tcp::CREDENTIAL;
use crate::{logging, tcp, upstream};
use anyhow::Context;
use sparsed_engine::Service;
use sparsed_surface::ApiKeys;
use sparsed_upstream::Client;
use std::fmt;

/// The running parts that can be changed, and what they were told last.
#[derive(Debug)]
pub struct Reloader {
    source: Source,
    running: Config,
    paths: Paths,
    service: Service,
    keys: Option<ApiKeys>,
    mqtt: Tuning,
    upstreams: Vec<Client>,
    /// Bytes that KV pools were laid out for.
    kv_bytes: Option<u64>,
    /// Keys that say where a socket is which the service manager has opened.
    unused: Vec<&'static str>,
}

/// What has become of a new configuration.
#[derive(Debug, Default)]
pub struct Reloaded {
    /// Taken up.
    changed: Vec<Difference>,
    /// Waits for the next start.
    pending: Vec<Difference>,
    /// Neither is nor will be taken up, since the service manager opens the sockets.
    unused: Vec<Difference>,
    /// API keys that were read again.
    n_keys: Option<usize>,
    /// They are a credential's, and what they were: others would be handed over at the next start only.
    keys_stay: bool,
    /// KV pools cannot grow as far as they may now.
    pools_stay: bool,
}

impl Reloader {
    /// A daemon that runs with `config`, which `source` says.
    pub fn new(source: Source, config: Config, assembly: &Assembly) -> Self {
        Self {
            source,
            running: config,
            paths: assembly.paths.clone(),
            service: assembly.service.clone(),
            keys: assembly.tcp.as_ref().map(|tcp| tcp.keys.clone()),
            mqtt: assembly.tuning.clone(),
            upstreams: assembly.upstreams.clone(),
            kv_bytes: assembly.service.budget().for_kv(),
            unused: unused(assembly.door.is_passed(), assembly.tcp.as_ref().is_some_and(|tcp| tcp.are_passed)),
        }
    }

    /// Reads the configuration again and takes up what can be. Nothing waits for the engine or a disk.
    ///
    /// # Errors
    /// What is wrong, with its line; nothing has changed then.
    pub fn reload(&mut self) -> anyhow::Result<Reloaded> {
        let next = self.source.load()?;
        let keys = self.keys.as_ref().map(|_| tcp::keys(&next.tcp)).transpose()?;
        let mqtt = self.mqtt.check(&next, &self.paths).context("[mqtt]")?;
        let (changed, pending): (_, Vec<_>) =
            self.running.differences(&next).into_iter().partition(Difference::is_live);
        let is_unused = |difference: &Difference| self.unused.contains(&difference.key());
        let (unused, pending) = pending.into_iter().partition(is_unused);
        self.running = self.running.adopting(&next);
        logging::set_level(self.running.log.level.into());
        self.service.set_limits(engine_limits(&self.running));
        self.upstreams.iter().for_each(|client| client.set_limits(upstream::limits(&self.running.limits)));
        let bytes = |bytes: Option<crate::config::Bytes>| bytes.map(|bytes| bytes.0);
        let memory = &self.running.memory;
        self.service.set_memory(bytes(memory.total), bytes(memory.budget));
        if let Ok(sessions) = self.service.sessions() {
            sessions.set_limits(crate::sessions::limits(&self.running.sessions));
        }
        let n_keys = keys.as_ref().map(ApiKeys::len);
        // What has changed there, the service manager has refreshed.
        let are_same = self.keys.as_ref().zip(keys.as_ref()).is_some_and(|(held, keys)| held.are(keys));
        let keys_stay = are_same && next.tcp.keys.is_none();
        if let (Some(held), Some(keys)) = (&self.keys, &keys) {
            held.replace(keys);
        }
        self.mqtt.take_up(&self.running, mqtt.as_ref());
        let pools_stay = self.service.budget().for_kv().zip(self.kv_bytes).is_some_and(|(now, then)| now > then);
        Ok(Reloaded { changed, pending, unused, n_keys, keys_stay, pools_stay })
    }
}

/// The keys that are not used where the service manager has opened the socket, or those of TCP.
fn unused(has_socket: bool, has_tcp: bool) -> Vec<&'static str> {
    let keys = [(has_socket, "socket.path"), (has_tcp, "tcp.listen")];
    keys.into_iter().filter_map(|(has, key)| has.then_some(key)).collect()
}

impl fmt::Display for Reloaded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = |list: &[Difference]| list.iter().map(ToString::to_string).collect::<Vec<_>>();
        match self.changed.as_slice() {
            [] => f.write_str("nothing changed that can change now")?,
            changed => f.write_str(&list(changed).join(", "))?,
        }
        let is_memory = |difference: &Difference| difference.key().starts_with("memory.");
        if self.pools_stay && self.changed.iter().any(is_memory) {
            f.write_str("; KV pools do not grow beyond their size at the start")?;
        }
        let mut pending = list(&self.pending);
        match self.n_keys {
            Some(_) if self.keys_stay => pending.push(format!("API keys that are new in the credential {CREDENTIAL}")),
            Some(n) => write!(f, "; {n} API keys read")?,
            None => {}
        }
        match pending.as_slice() {
            [] => {}
            pending => write!(f, "; a restart is needed for {}", pending.join(", "))?,
        }
        match list(&self.unused).as_slice() {
            [] => Ok(()),
            unused => write!(f, "; not used, as ListenStream= of the socket's unit decides: {}", unused.join(", ")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_no_restart_takes_up_is_told_apart_from_what_waits_for_one() {
        let before = Config::default();
        let change = |set: &str| before.differences(&Config::of(&[set]));
        let both =
            Reloaded { pending: change("engine.threads=2"), unused: change("socket.path=/x"), ..Reloaded::default() };
        assert_eq!(
            both.to_string(),
            "nothing changed that can change now; a restart is needed for engine.threads = 2 (was 0); not used, as \
             ListenStream= of the socket's unit decides: socket.path = \"/x\" (was not set)"
        );
        assert_eq!((unused(true, false), unused(false, true)), (vec!["socket.path"], vec!["tcp.listen"]));
    }
}
