//! Which cipher are images encrypted with?
//!
//! A session that is restored decrypts hundreds of megabytes before its first token, so the cipher is the one that the
//! processor is good at, and a file says which it was: a folder may move to another machine. Every image has a key of
//! its own, BLAKE3's keyed hash of 24 random bytes under a key that comes of the session's: so it may be encrypted
//! under a nonce of zeros, by ciphers whose nonces are too short to be random. *ring* does not overwrite a key when it
//! is dropped; what may stay in memory opens that one image.

use crate::cipher::{Forged, NONCE_BYTES, TAG_BYTES};
use ring::aead::{AES_256_GCM, Aad, Algorithm, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use zeroize::Zeroizing;

/// Authenticated ciphers with keys of 32 bytes, by their numbers in files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Suite {
    /// Several gigabytes a second where the processor has instructions for it, very slow where not.
    Aes256Gcm = 1,
    ChaCha20Poly1305 = 2,
}

impl Suite {
    /// The faster one on this machine.
    pub(crate) fn fastest() -> Self {
        if has_aes() { Self::Aes256Gcm } else { Self::ChaCha20Poly1305 }
    }

    /// The one with this number.
    pub(crate) fn numbered(number: u32) -> Option<Self> {
        [Self::Aes256Gcm, Self::ChaCha20Poly1305].into_iter().find(|suite| suite.number() == number)
    }

    pub(crate) fn number(self) -> u32 {
        self as u32
    }

    fn algorithm(self) -> &'static Algorithm {
        match self {
            Self::Aes256Gcm => &AES_256_GCM,
            Self::ChaCha20Poly1305 => &CHACHA20_POLY1305,
        }
    }
}

/// Whether the processor has instructions for AES-GCM; without, ChaCha20-Poly1305 is the faster cipher.
pub fn has_aes() -> bool {
    #[cfg(any(target_arch = "x86_64", target_arch = "x86"))]
    let has = std::arch::is_x86_feature_detected!("aes") && std::arch::is_x86_feature_detected!("pclmulqdq");
    // A Raspberry Pi 4 has neither.
    #[cfg(target_arch = "aarch64")]
    let has = std::arch::is_aarch64_feature_detected!("aes") && std::arch::is_aarch64_feature_detected!("pmull");
    #[cfg(not(any(target_arch = "x86_64", target_arch = "x86", target_arch = "aarch64")))]
    let has = false;
    has
}

/// What the keys of a session's images are made of; overwritten when it is dropped.
#[derive(Clone)]
pub(crate) struct ImageKeys(Zeroizing<[u8; 32]>);

impl ImageKeys {
    /// Those of the session with this key.
    pub(crate) fn of(session_key: &[u8; 32]) -> Self {
        Self(Zeroizing::new(blake3::derive_key("sparsed session store, keys of images", session_key)))
    }

    /// Encrypts `bytes` in place; the tag covers `context` as well. `nonce` is random, and no other image's.
    pub(crate) fn seal(
        &self,
        suite: Suite,
        nonce: &[u8; NONCE_BYTES],
        context: &[u8],
        bytes: &mut [u8],
    ) -> [u8; TAG_BYTES] {
        let sealed = self.key(suite, nonce).seal_in_place_separate_tag(zeros(), Aad::from(context), bytes);
        let tag = sealed.expect("fewer than 64 GiB");
        tag.as_ref().try_into().expect("tags of both ciphers have 16 bytes")
    }

    /// Decrypts in place all but the tag, which are the last bytes of `sealed`.
    pub(crate) fn open(
        &self,
        suite: Suite,
        nonce: &[u8; NONCE_BYTES],
        context: &[u8],
        sealed: &mut [u8],
    ) -> Result<(), Forged> {
        self.key(suite, nonce).open_in_place(zeros(), Aad::from(context), sealed).map(drop).map_err(|_| Forged)
    }

    fn key(&self, suite: Suite, nonce: &[u8; NONCE_BYTES]) -> LessSafeKey {
        let bytes = Zeroizing::new(*blake3::keyed_hash(&self.0, nonce).as_bytes());
        LessSafeKey::new(UnboundKey::new(suite.algorithm(), &*bytes).expect("both ciphers have keys of 32 bytes"))
    }
}

/// The nonce of a key that encrypts once.
fn zeros() -> Nonce {
    Nonce::assume_unique_for_key([0; ring::aead::NONCE_LEN])
}

#[cfg(test)]
mod tests {
    use super::*;

    const SUITES: [Suite; 2] = [Suite::Aes256Gcm, Suite::ChaCha20Poly1305];

    fn keys() -> ImageKeys {
        ImageKeys::of(&[1; 32])
    }

    #[test]
    fn what_is_sealed_opens_under_its_own_nonce_context_key_and_cipher_only() {
        for (suite, other) in [(SUITES[0], SUITES[1]), (SUITES[1], SUITES[0])] {
            let mut sealed = b"latent rows".to_vec();
            let tag = keys().seal(suite, &[5; 24], b"here", &mut sealed);
            assert_ne!(sealed, b"latent rows");
            sealed.extend_from_slice(&tag);
            let opens = |keys: ImageKeys, suite, nonce: u8, context: &[u8]| {
                let mut bytes = sealed.clone();
                let opened = keys.open(suite, &[nonce; 24], context, &mut bytes).is_ok();
                opened.then(|| bytes[..11].to_vec())
            };
            assert_eq!(opens(keys(), suite, 5, b"here").as_deref(), Some(&b"latent rows"[..]));
            assert_eq!(opens(keys(), suite, 6, b"here"), None);
            assert_eq!(opens(keys(), suite, 5, b"there"), None);
            assert_eq!(opens(ImageKeys::of(&[2; 32]), suite, 5, b"here"), None);
            assert_eq!(opens(keys(), other, 5, b"here"), None);
        }
    }

    #[test]
    fn no_flipped_bit_opens() {
        for suite in SUITES {
            let mut sealed = b"latent rows".to_vec();
            let tag = keys().seal(suite, &[5; 24], b"", &mut sealed);
            sealed.extend_from_slice(&tag);
            for bit in 0..sealed.len() * 8 {
                let mut flipped = sealed.clone();
                flipped[bit / 8] ^= 1 << (bit % 8);
                assert_eq!(keys().open(suite, &[5; 24], b"", &mut flipped), Err(Forged), "bit {bit}");
            }
        }
    }

    #[test]
    fn a_number_is_a_ciphers_for_ever() {
        assert_eq!([1, 2].map(Suite::numbered), SUITES.map(Some));
        assert_eq!([0, 3, u32::MAX].map(Suite::numbered), [None; 3]);
    }
}
