//! What do the daemon and a plugin host say to each other? Requests and replies, one message each.
//!
//! A message is one record of a SOCK_SEQPACKET socket: a value in postcard's encoding, and with some requests file
//! descriptors. Both ends are the same version of the same executable, so nothing here is a format; [`Start`] checks
//! it. The daemon gives objects their numbers, so that no answer can name another's.

use crate::BackendError;
use crate::call::clean;
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};
use serde::de::{DeserializeOwned, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use sparsed_abi::{
    Pod, SpdBucket, SpdDeviceInfo, SpdHealth, SpdKvInfo, SpdMemInfo, SpdRow, SpdStatus, SpdWeightDesc, bytes_of,
    read_exact,
};
use sparsed_plugin_kit::PluginError;
use sparsed_plugin_kit::slow::rowcache::{Cipher, SlowKey};
use std::collections::BTreeMap;
use std::fmt;
use std::io::{Error, ErrorKind, IoSlice, IoSliceMut};
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::PathBuf;

/// Longest message in bytes; the longest there is names every weight of a program.
const MESSAGE_BYTES_MAX: usize = 128 << 10;
/// Most descriptors beside a message.
pub(super) const FDS_MAX: usize = 3;

/// What the daemon asks.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Request {
    Start(Start),
    DeviceInfo {
        index: u32,
    },
    Open {
        device: u32,
        index: u32,
        n_threads: u32,
        mem_budget: u64,
    },
    Memory {
        device: u32,
    },
    Health {
        device: u32,
    },
    SelfTest {
        device: u32,
        level: u32,
    },
    /// Comes with the program.
    Supports {
        device: u32,
        op: u32,
        blob_bytes: u64,
    },
    /// Comes with what [`Source`] says.
    Upload {
        device: u32,
        weight: u32,
        desc: Plain<SpdWeightDesc>,
        source: Source,
    },
    /// Comes with the file of the slow tier, if there is one.
    CreateKv {
        device: u32,
        pool: u32,
        shape: PoolShape,
        slow: Option<SlowShape>,
    },
    /// Comes with the program.
    Compile {
        device: u32,
        plan: u32,
        weights: Vec<u32>,
        pools: Vec<u32>,
        bucket: Plain<SpdBucket>,
        blob_bytes: u64,
    },
    /// Comes with the arena, the host's doorbell and the daemon's.
    Lane {
        device: u32,
        lane: u32,
        arena_bytes: u64,
    },
    Drop(Object),
}

/// The first request.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Start {
    pub(super) version: String,
    pub(super) layout: u64,
    /// The plugin's folder.
    pub(super) dir: PathBuf,
    pub(super) id: String,
    pub(super) plugin_version: String,
    pub(super) settings: BTreeMap<String, String>,
}

/// Where a weight's bytes are.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Source {
    /// In a file that stays mapped; its descriptor comes with the first weight of it.
    File { number: u32, offset: u64, length: u64 },
    /// In a memory file of their own, which comes with the message.
    Memory { length: u64 },
}

/// See `spd_kv_desc`.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct PoolShape {
    pub(super) block_tokens: u32,
    pub(super) n_blocks: u32,
    pub(super) n_layers: u32,
    pub(super) n_index_layers: u32,
    /// Latent, rope and index row.
    pub(super) rows: [Plain<SpdRow>; 3],
}

/// See `spd_kv_slow`.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct SlowShape {
    /// Whether the file is memory, to be mapped.
    pub(super) is_memory: bool,
    pub(super) offset: u64,
    pub(super) length: u64,
    pub(super) cache_bytes: u64,
    #[serde(with = "secret")]
    pub(super) key: Option<SlowKey>,
}

/// A key by its cipher's number and its bytes.
mod secret {
    use super::{Cipher, Deserialize, Deserializer, Serialize, Serializer, SlowKey};
    use serde::de::Error;

    pub(super) fn serialize<S: Serializer>(key: &Option<SlowKey>, to: S) -> Result<S::Ok, S::Error> {
        key.as_ref().map(|key| (key.cipher().number(), key.bytes())).serialize(to)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Option<SlowKey>, D::Error> {
        let key = Option::<(u32, [u8; 32])>::deserialize(from)?;
        let cipher = |number| Cipher::numbered(number).ok_or_else(|| D::Error::custom("an unknown cipher"));
        key.map(|(number, bytes)| Ok(SlowKey::new(cipher(number)?, bytes))).transpose()
    }
}

/// Something that lives in the host until it is dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Object {
    Device(u32),
    Weight(u32),
    Pool(u32),
    Plan(u32),
    Lane(u32),
}

impl Object {
    pub(super) fn id(self) -> u32 {
        match self {
            Self::Device(id) | Self::Weight(id) | Self::Pool(id) | Self::Plan(id) | Self::Lane(id) => id,
        }
    }
}

/// What the host answers.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Reply {
    Done,
    Started { device_count: u32, abi_minor: u32 },
    DeviceInfo(Box<Plain<SpdDeviceInfo>>),
    Memory(Plain<SpdMemInfo>),
    Health(Plain<SpdHealth>),
    Pool(Plain<SpdKvInfo>),
    Plan { workspace: u64, input: u64, output: u64 },
    Failed(Failure),
}

/// Why something failed; see `spd_error`.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Failure {
    pub(super) status: SpdStatus,
    pub(super) op_index: Option<u32>,
    pub(super) block: Option<u32>,
    pub(super) vendor_code: i64,
    pub(super) message: String,
}

impl Failure {
    /// One that says no more than this.
    pub(super) fn new(status: SpdStatus, message: String) -> Self {
        Self { status, op_index: None, block: None, vendor_code: 0, message }
    }

    /// A failure as the daemon hears it: a plugin's with its own status and words, any other with `otherwise`.
    pub(super) fn of(error: &BackendError, otherwise: SpdStatus) -> Self {
        match error {
            BackendError::Call { status, message, op_index, block, vendor_code, .. } => Self {
                status: *status,
                op_index: *op_index,
                block: *block,
                vendor_code: *vendor_code,
                message: message.clone(),
            },
            other => Self::new(otherwise, other.to_string()),
        }
    }
}

impl From<Failure> for PluginError {
    /// The words come from a process that is not trusted, so they are cleaned here.
    fn from(failure: Failure) -> Self {
        let Failure { status, op_index, block, vendor_code, message } = failure;
        Self { status, message: clean(&message), op_index, block, vendor_code }
    }
}

/// A mirrored struct of the ABI without pointers, as its bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Plain<T>(pub(super) T);

impl<T: Pod> Serialize for Plain<T> {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_bytes(bytes_of(std::slice::from_ref(&self.0)))
    }
}

impl<'de, T: Pod> Deserialize<'de> for Plain<T> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Bytes<T>(PhantomData<T>);
        impl<T: Pod> Visitor<'_> for Bytes<T> {
            type Value = Plain<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{} bytes", size_of::<T>())
            }

            fn visit_bytes<E: serde::de::Error>(self, bytes: &[u8]) -> Result<Plain<T>, E> {
                read_exact(bytes).map(Plain).ok_or_else(|| E::invalid_length(bytes.len(), &self))
            }
        }
        from.deserialize_bytes(Bytes(PhantomData))
    }
}

/// Sends one message.
///
/// # Errors
/// A message that is too long, or the socket's.
pub(super) fn send<T: Serialize>(socket: BorrowedFd<'_>, message: &T, fds: &[BorrowedFd<'_>]) -> Result<(), Error> {
    let bytes = postcard::to_allocvec(message).map_err(|error| Error::new(ErrorKind::InvalidData, error))?;
    if bytes.len() > MESSAGE_BYTES_MAX || fds.len() > FDS_MAX {
        let reason = format!("a message of {} bytes, the limit is {MESSAGE_BYTES_MAX}", bytes.len());
        return Err(Error::new(ErrorKind::InvalidData, reason));
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(Error::new(ErrorKind::InvalidData, "too many descriptors"));
    }
    loop {
        match rustix::net::sendmsg(socket, &[IoSlice::new(&bytes)], &mut control, SendFlags::NOSIGNAL) {
            Err(Errno::INTR) => {}
            sent => return sent.map(|_| ()).map_err(Error::from),
        }
    }
}

/// Waits for one message; `None` when the other side is gone.
///
/// # Errors
/// What is no message, or the socket's.
pub(super) fn receive<T: DeserializeOwned>(socket: BorrowedFd<'_>) -> Result<Option<(T, Vec<OwnedFd>)>, Error> {
    let mut bytes = vec![0; MESSAGE_BYTES_MAX];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = loop {
        let mut parts = [IoSliceMut::new(&mut bytes)];
        match rustix::net::recvmsg(socket, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC) {
            Err(Errno::INTR) => {}
            Err(Errno::CONNRESET) => return Ok(None),
            received => break received?,
        }
    };
    let fds = control.drain().flat_map(|message| match message {
        RecvAncillaryMessage::ScmRights(fds) => fds.collect(),
        _ => Vec::new(),
    });
    let fds: Vec<OwnedFd> = fds.collect();
    if received.bytes == 0 {
        return Ok(None);
    }
    if received.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
        return Err(Error::new(ErrorKind::InvalidData, "a message that is too long"));
    }
    let message = postcard::from_bytes(&bytes[..received.bytes]);
    Ok(Some((message.map_err(|error| Error::new(ErrorKind::InvalidData, error))?, fds)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
    use std::os::fd::AsFd;

    fn pair() -> (OwnedFd, OwnedFd) {
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap()
    }

    #[test]
    fn a_message_arrives_with_its_descriptors() {
        let (near, far) = pair();
        let desc = SpdWeightDesc { rows: 7, cols: 9, ..SpdWeightDesc::default() };
        let source = Source::Memory { length: 3 };
        let request = Request::Upload { device: 1, weight: 2, desc: Plain(desc), source };
        send(near.as_fd(), &request, &[near.as_fd(), far.as_fd()]).unwrap();
        let (got, fds) = receive::<Request>(far.as_fd()).unwrap().unwrap();
        assert_eq!(format!("{got:?}"), format!("{request:?}"));
        assert_eq!(fds.len(), 2);
    }

    #[test]
    fn the_end_of_the_other_side_is_no_message() {
        let (near, far) = pair();
        drop(near);
        assert!(receive::<Reply>(far.as_fd()).unwrap().is_none());
    }

    #[test]
    fn a_message_past_the_limit_is_not_sent() {
        let (near, _far) = pair();
        let long = Reply::Failed(Failure::new(-1, "x".repeat(MESSAGE_BYTES_MAX)));
        assert!(send(near.as_fd(), &long, &[]).unwrap_err().to_string().contains("limit"));
    }

    #[test]
    fn bytes_that_are_no_message_are_refused() {
        let (near, far) = pair();
        for bytes in [&[0xff; 40][..], &[2, 5, 1, 2], &[7, 1, 0, 0xff, 0xff, 0xff, 0xff, 0x7f, b'x']] {
            rustix::net::send(&near, bytes, SendFlags::empty()).unwrap();
            assert_eq!(receive::<Reply>(far.as_fd()).unwrap_err().kind(), ErrorKind::InvalidData, "{bytes:?}");
        }
    }
}
