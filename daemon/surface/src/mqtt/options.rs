//! What must be known of the broker and of this node? All that the operator says, and its files read.

use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, RootCertStore};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use zeroize::Zeroizing;

/// The broker, this node, and limits.
#[derive(Clone)]
pub struct MqttOptions {
    /// The broker's name or address.
    pub host: String,
    /// Its port.
    pub port: u16,
    /// How the connection is encrypted; `None`: not at all. See [`tls_config`].
    pub tls: Option<Arc<ClientConfig>>,
    /// Who we are to the broker; the pool's connection is called so with `-pool` behind.
    pub client_id: String,
    /// Our name.
    pub username: Option<String>,
    /// Its secret.
    pub password: Option<Zeroizing<String>>,
    /// What all topics begin with.
    pub root: String,
    /// This node's segment.
    pub node: String,
    /// The pool that it works for.
    pub pool: Option<String>,
    /// Filters of further topics that answers may go to; `{client}` stands for who asks.
    pub reply_topics: Vec<String>,
    /// Silence after which the broker is asked whether it is there; at least 5 s.
    pub keepalive: Duration,
    /// Most bytes of a request's payload.
    pub payload_bytes_max: usize,
    /// Most unanswered requests of a client.
    pub per_client: usize,
    /// Most unanswered requests.
    pub pending_max: usize,
    /// Most requests that are answered at a time.
    pub running_max: usize,
    /// Most bytes of requests and answers that are held, in memory and on disk.
    pub held_bytes_max: u64,
    /// How long an answer is kept for those who ask again.
    pub keep: Duration,
    /// How long a request has that does not say.
    pub deadline: Duration,
    /// How long running answers may go on after the stop.
    pub stop_timeout: Duration,
    /// The folder of the journal.
    pub dir: PathBuf,
    /// Its key.
    pub key: Zeroizing<[u8; 32]>,
}

impl std::fmt::Debug for MqttOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // No secrets.
        f.debug_struct("MqttOptions").field("host", &self.host).field("node", &self.node).finish_non_exhaustive()
    }
}

/// What can be changed about a door that is open; clones are the same door's.
#[derive(Clone, Debug)]
pub struct MqttSettings(watch::Sender<MqttOptions>);

impl MqttSettings {
    pub(super) fn new(options: MqttOptions) -> Self {
        Self(watch::Sender::new(options))
    }

    /// Takes the limits, times and reply topics of `options`; the broker, names and secrets stay.
    pub fn change(&self, options: &MqttOptions) {
        self.0.send_modify(|held| {
            held.reply_topics.clone_from(&options.reply_topics);
            held.per_client = options.per_client;
            held.pending_max = options.pending_max;
            held.running_max = options.running_max;
            held.held_bytes_max = options.held_bytes_max;
            held.keep = options.keep;
            held.deadline = options.deadline;
        });
    }

    pub(super) fn subscribe(&self) -> watch::Receiver<MqttOptions> {
        self.0.subscribe()
    }
}

/// Why there is no TLS.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TlsError {
    /// A file cannot be read.
    #[error("{}: {cause}", path.display())]
    Unread {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        #[source]
        cause: std::io::Error,
    },
    /// A file has nothing of what is wanted in it.
    #[error("{}: {reason}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The system's certificates cannot be read.
    #[error("no certificates of authorities on this system; name a file of them with ca_file")]
    NoRoots,
    /// The parts do not make a whole.
    #[error("{0}")]
    Rustls(#[from] rustls::Error),
}

/// TLS with the authorities of `ca`, or else of the system, and with a certificate of our own where the other side
/// wants one: for brokers and upstream engines.
///
/// # Errors
/// Files that cannot be read, or that do not belong together.
pub fn tls_config(ca: Option<&Path>, own: Option<(&Path, &Path)>) -> Result<Arc<ClientConfig>, TlsError> {
    let mut roots = RootCertStore::empty();
    match ca {
        Some(path) => {
            for certificate in certificates(path)? {
                roots.add(certificate)?;
            }
        }
        None => {
            roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        }
    }
    if roots.is_empty() {
        return Err(TlsError::NoRoots);
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
    let builder = builder.with_root_certificates(roots);
    let config = match own {
        None => builder.with_no_client_auth(),
        Some((certificate, key)) => {
            let key = PrivateKeyDer::from_pem_file(key).map_err(|error| about(key, error))?;
            builder.with_client_auth_cert(certificates(certificate)?, key)?
        }
    };
    Ok(Arc::new(config))
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let read = CertificateDer::pem_file_iter(path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    let read = read.map_err(|error| about(path, error))?;
    if read.is_empty() {
        return Err(TlsError::File { path: path.to_owned(), reason: "has no certificate".to_owned() });
    }
    Ok(read)
}

fn about(path: &Path, error: pem::Error) -> TlsError {
    let path = path.to_owned();
    match error {
        pem::Error::Io(cause) => TlsError::Unread { path, cause },
        other => TlsError::File { path, reason: other.to_string() },
    }
}
