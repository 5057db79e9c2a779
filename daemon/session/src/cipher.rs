//! Who can read a session?
//!
//! Every session has a random key of its own, which lies wrapped under the master key in the session's file `key`: who
//! destroys that file destroys the session. XChaCha20-Poly1305, because its nonces are long enough to be random: a cut
//! tail is written again with other content, so that no counter could name what a nonce was used for. Images of blocks,
//! which are thousands of times larger, have ciphers of their own (`suite`).

use crate::id::SessionId;
use crate::suite::ImageKeys;
use chacha20poly1305::aead::{AeadInPlace, KeyInit};
use chacha20poly1305::{Key, Tag, XChaCha20Poly1305, XNonce};
use zeroize::{Zeroize, Zeroizing};

/// Bytes of a nonce.
pub(crate) const NONCE_BYTES: usize = 24;
/// Bytes of a tag.
pub(crate) const TAG_BYTES: usize = 16;
/// Bytes of the file `key`: magic, version, name of the master key, nonce, wrapped key, tag.
pub(crate) const KEY_FILE_BYTES: usize = 4 + 4 + MASTER_NAME_BYTES + NONCE_BYTES + KEY_BYTES + TAG_BYTES;

const KEY_BYTES: usize = 32;
const MASTER_NAME_BYTES: usize = 8;
const MAGIC: &[u8; 4] = b"spde";
const VERSION: u32 = 1;

/// The key that wraps the sessions' keys; overwritten when it is dropped.
pub struct MasterKey(Zeroizing<[u8; 32]>);

/// What is encrypted did not verify.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Forged;

/// Why a file `key` gives no key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum KeyFault {
    /// It was wrapped under another master key.
    Foreign,
    /// It has a version that is not known.
    Version(u32),
    /// It is not what was written.
    Damaged,
}

impl MasterKey {
    /// The key with these bytes.
    pub fn new(bytes: [u8; 32]) -> Self {
        Self(Zeroizing::new(bytes))
    }

    /// Says which key it is, and nothing about it.
    fn name(&self) -> [u8; MASTER_NAME_BYTES] {
        let hash = blake3::derive_key("sparsed session store, name of a master key", &*self.0);
        std::array::from_fn(|at| hash[at])
    }
}

impl std::fmt::Debug for MasterKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("MasterKey")
    }
}

/// One session's key; overwritten when it is dropped.
pub(crate) struct SessionKey {
    bytes: Zeroizing<[u8; KEY_BYTES]>,
    // Overwrites its copy of the key itself.
    cipher: XChaCha20Poly1305,
    images: ImageKeys,
}

impl SessionKey {
    pub(crate) fn new(bytes: Zeroizing<[u8; KEY_BYTES]>) -> Self {
        let cipher = XChaCha20Poly1305::new(Key::from_slice(&*bytes));
        let images = ImageKeys::of(&bytes);
        Self { bytes, cipher, images }
    }

    /// Encrypts `bytes` in place; the tag covers `context` as well.
    pub(crate) fn seal(&self, nonce: &[u8; NONCE_BYTES], context: &[u8], bytes: &mut [u8]) -> [u8; TAG_BYTES] {
        let tag = self.cipher.encrypt_in_place_detached(XNonce::from_slice(nonce), context, bytes);
        tag.expect("fewer than 256 GiB").into()
    }

    /// Decrypts `bytes` in place; leaves them as they are when they do not verify.
    pub(crate) fn open(
        &self,
        nonce: &[u8; NONCE_BYTES],
        context: &[u8],
        bytes: &mut [u8],
        tag: &[u8; TAG_BYTES],
    ) -> Result<(), Forged> {
        let (nonce, tag) = (XNonce::from_slice(nonce), Tag::from_slice(tag));
        self.cipher.decrypt_in_place_detached(nonce, context, bytes, tag).map_err(|_| Forged)
    }

    /// What encrypts images.
    pub(crate) fn images(&self) -> &ImageKeys {
        &self.images
    }

    /// The file `key` of a session.
    pub(crate) fn wrap(
        &self,
        master: &MasterKey,
        owner: u64,
        id: SessionId,
        nonce: &[u8; NONCE_BYTES],
    ) -> [u8; KEY_FILE_BYTES] {
        let mut wrapped = *self.bytes;
        let cipher = Self::new(master.0.clone());
        let tag = cipher.seal(nonce, &context(owner, id), &mut wrapped);
        let mut file = [0; KEY_FILE_BYTES];
        let parts: [&[u8]; 6] = [MAGIC, &VERSION.to_le_bytes(), &master.name(), nonce, &wrapped, &tag];
        let mut rest = file.as_mut_slice();
        for part in parts {
            let (here, after) = rest.split_at_mut(part.len());
            here.copy_from_slice(part);
            rest = after;
        }
        file
    }

    /// The key in a file `key`.
    pub(crate) fn unwrap(file: &[u8], master: &MasterKey, owner: u64, id: SessionId) -> Result<Self, KeyFault> {
        let file: &[u8; KEY_FILE_BYTES] = file.try_into().map_err(|_| KeyFault::Damaged)?;
        let (magic, rest) = file.split_at(MAGIC.len());
        let (version, rest) = rest.split_first_chunk().ok_or(KeyFault::Damaged)?;
        let (name, rest) = rest.split_first_chunk::<MASTER_NAME_BYTES>().ok_or(KeyFault::Damaged)?;
        let (nonce, rest) = rest.split_first_chunk().ok_or(KeyFault::Damaged)?;
        let (wrapped, rest) = rest.split_first_chunk::<KEY_BYTES>().ok_or(KeyFault::Damaged)?;
        let tag = rest.try_into().map_err(|_| KeyFault::Damaged)?;
        if magic != MAGIC {
            return Err(KeyFault::Damaged);
        }
        match u32::from_le_bytes(*version) {
            VERSION => {}
            version => return Err(KeyFault::Version(version)),
        }
        if *name != master.name() {
            return Err(KeyFault::Foreign);
        }
        let mut bytes = Zeroizing::new(*wrapped);
        let opened = Self::new(master.0.clone()).open(nonce, &context(owner, id), &mut *bytes, tag);
        opened.map_err(|Forged| KeyFault::Damaged)?;
        Ok(Self::new(bytes))
    }
}

/// A key's file is of use only to its own session.
fn context(owner: u64, id: SessionId) -> [u8; 28] {
    let mut context = [0; 28];
    context[..4].copy_from_slice(MAGIC);
    context[4..12].copy_from_slice(&owner.to_le_bytes());
    context[12..].copy_from_slice(id.as_bytes());
    context
}

impl Drop for SessionKey {
    fn drop(&mut self) {
        self.bytes.zeroize();
    }
}

impl std::fmt::Debug for SessionKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SessionKey")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: SessionId = SessionId::from_bytes([7; 16]);

    fn key() -> SessionKey {
        SessionKey::new(Zeroizing::new([1; 32]))
    }

    #[test]
    fn a_key_is_given_to_its_own_session_under_its_own_master_only() {
        let master = MasterKey::new([2; 32]);
        let file = key().wrap(&master, 1000, ID, &[3; 24]);
        let fault = |file: &[u8], master: &MasterKey, owner, id| SessionKey::unwrap(file, master, owner, id).err();
        let unwrapped = SessionKey::unwrap(&file, &master, 1000, ID).unwrap();
        assert_eq!(*unwrapped.bytes, [1; 32]);
        assert_eq!(fault(&file, &MasterKey::new([4; 32]), 1000, ID), Some(KeyFault::Foreign));
        assert_eq!(fault(&file, &master, 1001, ID), Some(KeyFault::Damaged));
        assert_eq!(fault(&file, &master, 1000, SessionId::from_bytes([8; 16])), Some(KeyFault::Damaged));
        assert_eq!(fault(&[0; KEY_FILE_BYTES], &master, 1000, ID), Some(KeyFault::Damaged));
        assert_eq!(fault(&[], &master, 1000, ID), Some(KeyFault::Damaged));
    }

    #[test]
    fn no_flipped_bit_of_a_key_file_gives_a_key() {
        let master = MasterKey::new([2; 32]);
        let file = key().wrap(&master, 1000, ID, &[3; 24]);
        for bit in 0..file.len() * 8 {
            let mut flipped = file;
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(SessionKey::unwrap(&flipped, &master, 1000, ID).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn what_is_sealed_opens_in_its_own_context_only() {
        let mut bytes = *b"token";
        let tag = key().seal(&[5; 24], b"here", &mut bytes);
        assert_ne!(&bytes, b"token");
        assert_eq!(key().open(&[5; 24], b"there", &mut bytes.clone(), &tag), Err(Forged));
        assert_eq!(key().open(&[5; 24], b"here", &mut bytes, &tag), Ok(()));
        assert_eq!(&bytes, b"token");
    }
}
