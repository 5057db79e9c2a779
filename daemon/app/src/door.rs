//! On which sockets do clients come in? On those that the service manager has opened, else on our own.
//!
//! A socket of the service manager's (`sparsed.socket`) is there before the daemon and after it: a client that comes
//! while the daemon is restarted waits, and is not refused.

use crate::config::Socket;
use anyhow::{Context, bail};
use std::fs::Permissions;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// Who may connect to a socket of our own: its owner and group.
const SOCKET_MODE: u32 = 0o660;
/// What the service manager calls the Unix socket: `FileDescriptorName=`.
const NAME: &str = "api";
/// What it calls the TCP socket.
const TCP_NAME: &str = "tcp";

/// Sockets of the service manager's.
#[derive(Debug, Default)]
pub struct Passed {
    /// Ours, or the only one without a name.
    pub api: Option<UnixListener>,
    /// For apps that cannot use a Unix socket: one for each address of the unit.
    pub tcp: Vec<TcpListener>,
}

impl Passed {
    /// The same sockets once more.
    ///
    /// # Errors
    /// When there are no further descriptors.
    pub(crate) fn try_clone(&self) -> std::io::Result<Self> {
        Ok(Self {
            api: self.api.as_ref().map(UnixListener::try_clone).transpose()?,
            tcp: self.tcp.iter().map(TcpListener::try_clone).collect::<Result<_, _>>()?,
        })
    }
}

/// A socket that is listened on.
#[derive(Debug)]
pub struct Door {
    /// Non-blocking.
    pub listener: UnixListener,
    /// Of a socket of our own, to be removed at the end.
    path: Option<PathBuf>,
}

impl Door {
    /// The service manager's socket, or one at `path`. Says so where the former is not the one that is configured.
    ///
    /// # Errors
    /// A path that something else has.
    pub fn open(config: &Socket, path: &Path, passed: Option<UnixListener>) -> anyhow::Result<Self> {
        let listener = match passed {
            Some(listener) => {
                if let Some((wanted, socket)) = overruled(config, &listener) {
                    log::warn!(
                        wanted:% = wanted.display(), socket;
                        "socket.path is not used: the service manager has opened another socket"
                    );
                }
                Self { listener, path: None }
            }
            None => Self { listener: listen(path)?, path: Some(path.to_owned()) },
        };
        listener.listener.set_nonblocking(true)?;
        Ok(listener)
    }

    /// Whether the service manager has opened it: where it is, its unit decides.
    pub(crate) fn is_passed(&self) -> bool {
        self.path.is_none()
    }

    /// What clients connect to, whoever has opened it: people read it in the log, and type it.
    pub fn address(&self) -> String {
        self.path.as_ref().map_or_else(|| name_of(&self.listener), |path| path.display().to_string())
    }

    /// Takes the listener; what is given back removes a socket of our own.
    pub fn split(self) -> (UnixListener, Closing) {
        (self.listener, Closing(self.path))
    }
}

/// The end of a door.
#[derive(Debug)]
pub struct Closing(Option<PathBuf>);

impl Closing {
    /// Lets no further clients come: they see that nobody is there, unless the service manager has them wait.
    pub fn close(&self) {
        let Some(path) = &self.0 else { return };
        if let Err(error) = std::fs::remove_file(path) {
            log::debug!(reason:% = error; "socket not removed");
        }
    }
}

/// The configured path and the address of a socket that was passed, where they differ.
fn overruled<'a>(config: &'a Socket, passed: &UnixListener) -> Option<(&'a Path, String)> {
    let wanted = config.path.as_deref()?;
    let address = passed.local_addr().ok()?;
    let is_wanted = address.as_pathname().is_some_and(|path| is_same(wanted, path));
    (!is_wanted).then(|| (wanted, name_of(passed)))
}

/// The path of a socket, whoever has bound it.
fn name_of(listener: &UnixListener) -> String {
    let address = listener.local_addr().ok();
    let path = address.as_ref().and_then(|address| address.as_pathname());
    path.map_or_else(|| "a socket without a path".to_owned(), |path| path.display().to_string())
}

/// Whether both name one file, as `/var/run` and `/run` do.
pub(crate) fn is_same(a: &Path, b: &Path) -> bool {
    a == b || a.canonicalize().is_ok_and(|a| b.canonicalize().is_ok_and(|b| a == b))
}

/// What the service manager has passed. May be asked once: afterwards it is not known any more.
///
/// # Errors
/// A descriptor that is not a listening socket of its kind.
pub fn passed() -> anyhow::Result<Passed> {
    take_passed().context("the sockets that the service manager has passed")
}

fn take_passed() -> std::io::Result<Passed> {
    let mut passed = listenfd::ListenFd::from_env();
    let names = std::env::var("LISTEN_FDNAMES").unwrap_or_default();
    let places = |wanted| {
        let named = names.split(':').take(passed.len()).enumerate().filter(move |(_, name)| *name == wanted);
        named.map(|(at, _)| at).collect::<Vec<usize>>()
    };
    let (api, tcp) = match passed.len() {
        1 if names.is_empty() || names == "unknown" => (Some(0), Vec::new()),
        _ => (places(NAME).first().copied(), places(TCP_NAME)),
    };
    if passed.len() > 0 && api.is_none() && tcp.is_empty() {
        log::warn!(names, wanted = NAME; "none of the sockets that were passed is ours");
    }
    Ok(Passed {
        api: api.map(|at| passed.take_unix_listener(at)).transpose()?.flatten(),
        tcp: tcp.into_iter().filter_map(|at| passed.take_tcp_listener(at).transpose()).collect::<Result<_, _>>()?,
    })
}

/// Listens on `path`. A socket that nobody listens on any more is replaced, anything else is left alone.
fn listen(path: &Path) -> anyhow::Result<UnixListener> {
    if let Some(dir) = path.parent().filter(|dir| !dir.as_os_str().is_empty()) {
        crate::assemble::make_dir(dir, 0o755)?;
    }
    if let Ok(found) = path.symlink_metadata() {
        use std::os::unix::fs::FileTypeExt;
        if !found.file_type().is_socket() {
            bail!("{} is there and is not a socket; remove it, or set another socket.path", path.display());
        }
        if UnixStream::connect(path).is_ok() {
            bail!("another process listens on {}; stop it, or set another socket.path", path.display());
        }
        std::fs::remove_file(path).with_context(|| path.display().to_string())?;
    }
    let listener = UnixListener::bind(path).with_context(|| format!("cannot listen on {}", path.display()))?;
    std::fs::set_permissions(path, Permissions::from_mode(SOCKET_MODE)).with_context(|| path.display().to_string())?;
    Ok(listener)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dead_socket_is_replaced_and_a_live_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run/api.sock");
        drop(listen(&path).unwrap());
        let _live = listen(&path).unwrap();
        assert!(listen(&path).unwrap_err().to_string().contains("another process"));
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, SOCKET_MODE);
    }

    #[test]
    fn a_path_that_is_configured_and_not_the_one_of_the_socket_that_was_passed_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let (path, link) = (dir.path().join("api.sock"), dir.path().join("link.sock"));
        std::os::unix::fs::symlink(&path, &link).unwrap();
        let passed = UnixListener::bind(&path).unwrap();
        let said = |path: Option<&Path>| {
            let config = Socket { path: path.map(Path::to_owned) };
            overruled(&config, &passed).map(|(wanted, socket)| (wanted.to_owned(), socket))
        };
        assert_eq!((said(None), said(Some(&path)), said(Some(&link))), (None, None, None));
        let other = dir.path().join("other.sock");
        assert_eq!(said(Some(&other)), Some((other, path.display().to_string())));
    }

    #[test]
    fn a_socket_that_was_passed_is_called_by_its_path_as_one_of_our_own_is() {
        use std::os::linux::net::SocketAddrExt;
        use std::os::unix::net::SocketAddr;
        let dir = tempfile::tempdir().unwrap();
        let (path, own) = (dir.path().join("api.sock"), dir.path().join("own.sock"));
        let open = |passed| Door::open(&Socket::default(), &own, passed).unwrap();
        let passed = open(Some(UnixListener::bind(&path).unwrap()));
        assert!(passed.is_passed() && !open(None).is_passed());
        assert_eq!((passed.address(), open(None).address()), (path.display().to_string(), own.display().to_string()));
        let nameless = SocketAddr::from_abstract_name(own.as_os_str().as_encoded_bytes()).unwrap();
        assert_eq!(open(Some(UnixListener::bind_addr(&nameless).unwrap())).address(), "a socket without a path");
    }

    #[test]
    fn a_file_in_the_sockets_place_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api.sock");
        std::fs::write(&path, "precious").unwrap();
        assert!(listen(&path).unwrap_err().to_string().contains("not a socket"));
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
    }
}
