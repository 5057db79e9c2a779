//! Is a page what was written at its place, and can only this process read it?
//!
//! The format is normative in `abi/OPS.md`. A page in a file is encrypted and authenticated under a key that lives in
//! memory only, and ends with the 16 bytes of its tag; its nonce is the block's tag and the page's number, so a page of
//! another place, or of an older owner of its own, does not open. A page in memory ends with that tag, that number and
//! a CRC32C: a device reads it where it lies.

use crate::layout::{PAGE_BYTES, PageBytes, TRAILER_BYTES};
use ring::aead::{AES_256_GCM, Aad, Algorithm, CHACHA20_POLY1305, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use zeroize::Zeroizing;

const TAG_AT: usize = PAGE_BYTES - TRAILER_BYTES;
const NUMBER_AT: usize = TAG_AT + 8;
const CRC_AT: usize = NUMBER_AT + 4;

/// Authenticated ciphers with keys of 32 bytes, by their numbers in the ABI.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Cipher {
    /// `SPD_SLOW_AES_256_GCM`: for processors with instructions for it.
    Aes256Gcm = 1,
    /// `SPD_SLOW_CHACHA20_POLY1305`: for the others.
    ChaCha20Poly1305 = 2,
}

impl Cipher {
    /// The one with this number.
    pub fn numbered(number: u32) -> Option<Self> {
        [Self::Aes256Gcm, Self::ChaCha20Poly1305].into_iter().find(|cipher| cipher.number() == number)
    }

    /// Its number.
    pub const fn number(self) -> u32 {
        self as u32
    }

    fn algorithm(self) -> &'static Algorithm {
        match self {
            Self::Aes256Gcm => &AES_256_GCM,
            Self::ChaCha20Poly1305 => &CHACHA20_POLY1305,
        }
    }
}

/// What the pages of one slow area are encrypted with; overwritten when it is dropped.
#[derive(Clone)]
pub struct SlowKey {
    cipher: Cipher,
    bytes: Zeroizing<[u8; 32]>,
}

impl SlowKey {
    /// `bytes` are random, and no other area's.
    pub fn new(cipher: Cipher, bytes: [u8; 32]) -> Self {
        Self { cipher, bytes: Zeroizing::new(bytes) }
    }

    /// What it is for.
    pub const fn cipher(&self) -> Cipher {
        self.cipher
    }

    /// As they cross the border.
    pub fn bytes(&self) -> &[u8; 32] {
        &self.bytes
    }
}

impl std::fmt::Debug for SlowKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "SlowKey({:?})", self.cipher)
    }
}

/// What is wrong with a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PageFault {
    /// It does not open: its bytes are not those that were written, or belong to another block or place.
    #[error("it is not what was encrypted for its place")]
    Seal,
    /// Its bytes are not those that were written.
    #[error("CRC32C {stored:08x}, its bytes have {computed:08x}")]
    Crc {
        /// In the page.
        stored: u32,
        /// Of its bytes.
        computed: u32,
    },
    /// It belongs to another block.
    #[error("tag {stored:016x} instead of {expected:016x}")]
    Tag {
        /// In the page.
        stored: u64,
        /// Of the block.
        expected: u64,
    },
    /// It belongs to another place of the block.
    #[error("it is page {stored}")]
    Number {
        /// In the page.
        stored: u32,
    },
}

/// How pages of an area show that they are what was written.
#[derive(Clone, Debug)]
pub struct Seal(Option<LessSafeKey>);

impl Seal {
    /// With a key: encrypted. Without: by a CRC32C. *ring* does not overwrite what it makes of the key.
    pub fn new(key: Option<&SlowKey>) -> Self {
        let of = |key: &SlowKey| UnboundKey::new(key.cipher.algorithm(), key.bytes()).expect("keys of 32 bytes");
        Self(key.map(|key| LessSafeKey::new(of(key))))
    }

    /// Finishes page `page` of a block with this tag, whose rows and filler are there. With a key, no two pages of the
    /// same tag and number may differ.
    pub(crate) fn close(&self, tag: u64, page: u32, bytes: &mut PageBytes) {
        let (content, trailer) = bytes.split_at_mut(TAG_AT);
        if let Some(key) = &self.0 {
            let sealed = key.seal_in_place_separate_tag(nonce(tag, page), Aad::empty(), content);
            trailer.copy_from_slice(sealed.expect("a page is short").as_ref());
            return;
        }
        bytes[TAG_AT..NUMBER_AT].copy_from_slice(&tag.to_le_bytes());
        bytes[NUMBER_AT..CRC_AT].copy_from_slice(&page.to_le_bytes());
        let crc = crc32c::crc32c(&bytes[..CRC_AT]);
        bytes[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
    }

    /// Checks a page that was read as page `page` of the block with tag `tag`, and decrypts it in place: its rows are
    /// there then.
    ///
    /// # Errors
    /// What is wrong with it; nothing of such a page may be used, nor may it be opened again.
    pub fn open(&self, tag: u64, page: u32, bytes: &mut PageBytes) -> Result<(), PageFault> {
        match &self.0 {
            Some(key) => {
                let opened = key.open_in_place(nonce(tag, page), Aad::empty(), bytes);
                opened.map(drop).map_err(|_| PageFault::Seal)
            }
            None => check(tag, page, bytes),
        }
    }
}

/// What no other page of a key has, as long as no two blocks have had the same tag.
fn nonce(tag: u64, page: u32) -> Nonce {
    let mut bytes = [0; NONCE_LEN];
    bytes[..8].copy_from_slice(&tag.to_le_bytes());
    bytes[8..].copy_from_slice(&page.to_le_bytes());
    Nonce::assume_unique_for_key(bytes)
}

fn check(tag: u64, page: u32, bytes: &PageBytes) -> Result<(), PageFault> {
    let (covered, crc) = bytes.split_last_chunk().expect("a page is longer than its checksum");
    let (stored, computed) = (u32::from_le_bytes(*crc), crc32c::crc32c(covered));
    if stored != computed {
        return Err(PageFault::Crc { stored, computed });
    }
    let (covered, number) = covered.split_last_chunk().expect("a page is longer than its trailer");
    let (_, found_tag) = covered.split_last_chunk().expect("a page is longer than its trailer");
    let (number, found_tag) = (u32::from_le_bytes(*number), u64::from_le_bytes(*found_tag));
    if found_tag != tag {
        return Err(PageFault::Tag { stored: found_tag, expected: tag });
    }
    if number != page {
        return Err(PageFault::Number { stored: number });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use chacha20poly1305::{AeadInPlace, ChaCha20Poly1305, KeyInit};

    const KEYS: [Option<Cipher>; 3] = [None, Some(Cipher::Aes256Gcm), Some(Cipher::ChaCha20Poly1305)];

    fn seal(cipher: Option<Cipher>, byte: u8) -> Seal {
        Seal::new(cipher.map(|cipher| SlowKey::new(cipher, [byte; 32])).as_ref())
    }

    /// A page of one row that occurs again and again.
    fn page(seal: &Seal, tag: u64, number: u32) -> PageBytes {
        let mut page = [0x41; PAGE_BYTES];
        seal.close(tag, number, &mut page);
        page
    }

    #[test]
    fn a_page_opens_at_its_own_place_and_under_its_own_key_only() {
        for cipher in KEYS {
            let own = seal(cipher, 9);
            let sealed = page(&own, 3, 4);
            let opens = |seal: &Seal, tag, number| {
                let mut page = sealed;
                seal.open(tag, number, &mut page).map(|()| assert_eq!(page[..TAG_AT], [0x41; TAG_AT]))
            };
            let seals = |tag, number| if cipher.is_some() { PageFault::Seal } else { tag_or_number(tag, number) };
            assert_eq!(opens(&own, 3, 4), Ok(()), "{cipher:?}");
            assert_eq!(opens(&own, 2, 4), Err(seals(2, 4)), "a block's that was there before");
            assert_eq!(opens(&own, 3, 5), Err(seals(3, 5)), "another page's");
            for other in KEYS.into_iter().filter(|&other| other != cipher) {
                assert!(opens(&seal(other, 9), 3, 4).is_err(), "{cipher:?} {other:?}");
            }
            assert_eq!(opens(&seal(cipher, 8), 3, 4).is_err(), cipher.is_some());
        }
    }

    /// What is wrong with page 4 of tag 3 when it is read as another one.
    fn tag_or_number(tag: u64, number: u32) -> PageFault {
        assert!(tag != 3 || number != 4);
        if tag == 3 { PageFault::Number { stored: 4 } } else { PageFault::Tag { stored: 3, expected: tag } }
    }

    #[test]
    fn a_page_with_any_wrong_bit_and_a_hole_in_a_file_are_refused() {
        for cipher in KEYS {
            let seal = seal(cipher, 9);
            let sealed = page(&seal, 3, 4);
            for bit in 0..PAGE_BYTES * 8 {
                let mut page = sealed;
                page[bit / 8] ^= 1 << (bit % 8);
                assert!(seal.open(3, 4, &mut page).is_err(), "{cipher:?}: bit {bit}");
            }
            assert!(seal.open(0, 0, &mut [0; PAGE_BYTES]).is_err(), "a hole in a file");
        }
    }

    #[test]
    fn nothing_of_the_rows_can_be_seen_nor_that_two_pages_are_alike() {
        for cipher in KEYS.into_iter().flatten() {
            let seal = seal(Some(cipher), 9);
            let pages = [page(&seal, 3, 4), page(&seal, 3, 5), page(&seal, 4, 4)];
            for (n, page) in pages.iter().enumerate() {
                assert!(!page.windows(3).any(|bytes| bytes == [0x41; 3]), "a run of three letters");
                assert!(pages[..n].iter().all(|other| other != page));
            }
        }
    }

    #[test]
    fn the_trailer_of_a_page_in_memory_is_as_written_down() {
        let page = page(&seal(None, 0), 0x0807_0605_0403_0201, 21);
        assert_eq!(page[..TAG_AT], [0x41; TAG_AT]);
        assert_eq!(page[4080..4092], [1, 2, 3, 4, 5, 6, 7, 8, 21, 0, 0, 0]);
        assert_eq!(page[4092..], crc32c::crc32c(&page[..4092]).to_le_bytes());
        // The polynomial, by the check value of the catalogue of CRCs.
        assert_eq!(crc32c::crc32c(b"123456789"), 0xE306_9283);
    }

    #[test]
    fn another_library_reads_what_is_sealed() {
        let mut page = page(&seal(Some(Cipher::ChaCha20Poly1305), 9), 0x0807_0605_0403_0201, 21);
        let (content, tag) = page.split_at_mut(TAG_AT);
        let nonce = [1, 2, 3, 4, 5, 6, 7, 8, 21, 0, 0, 0].into();
        let cipher = ChaCha20Poly1305::new(&[9; 32].into());
        cipher.decrypt_in_place_detached(&nonce, b"", content, (&*tag).into()).unwrap();
        assert_eq!(content, [0x41; TAG_AT]);
    }

    #[test]
    fn a_key_does_not_show_itself_and_ciphers_have_the_numbers_of_the_abi() {
        let key = SlowKey::new(Cipher::Aes256Gcm, [0xAB; 32]);
        assert_eq!(format!("{key:?}"), "SlowKey(Aes256Gcm)");
        assert!(!format!("{:?}", Seal::new(Some(&key))).contains("171"));
        assert_eq!((key.cipher().number(), key.bytes()), (1, &[0xAB; 32]));
        assert_eq!([0, 1, 2, 3].map(Cipher::numbered), [None, KEYS[1], KEYS[2], None]);
    }
}
