//! Where does the image of a KV block lie in the file `kv`, and is it that of these tokens?
//!
//! A file is a header page (`magic "spdk", u32 version, 32 bytes fingerprint, u32 block_bytes, u32 cipher, u32 CRC32C`,
//! zeros) and places of a fixed number of pages, the image of block *i* in place *i*: ciphertext, tag, nonce. Numbers
//! are little-endian. A tag covers the session, the fingerprint, the block's number, and the digest of all tokens up to
//! the block's end: an image of what the session no longer says does not verify. Nothing here is ever synced.
//!
//! A file of another version is as good as none, its blocks are computed again. Version 1 had one cipher, and the
//! ciphertext last.

use crate::cipher::{NONCE_BYTES, TAG_BYTES};
use crate::id::SessionId;
use crate::limits::{IMAGE_BYTES_MAX, SESSION_TOKENS_MAX};
use crate::suite::{ImageKeys, Suite};

/// Tokens of a block.
pub const BLOCK_TOKENS: usize = 64;
/// What places are multiples of.
pub(crate) const PAGE_BYTES: u64 = 4096;
/// Bytes of a place behind its ciphertext.
pub(crate) const SEAL_BYTES: usize = TAG_BYTES + NONCE_BYTES;
/// Bytes of a header that mean something.
pub(crate) const HEADER_BYTES: usize = 52;

const MAGIC: &[u8; 4] = b"spdk";
const VERSION: u32 = 2;
const BLOCKS_MAX: u64 = (SESSION_TOKENS_MAX / BLOCK_TOKENS) as u64;

/// What all images of a file have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImageShape {
    /// Says model, planes, formats and whatever else an image depends on.
    pub fingerprint: [u8; 32],
    /// Bytes of one block's image.
    pub block_bytes: u32,
}

/// Why nothing of a KV file is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KvFault {
    /// It has no header that is whole.
    #[error("the file is damaged at its beginning")]
    Damaged,
    /// Another version of this program has made it.
    #[error("the file has version {0}, which is not known")]
    Version(u32),
    /// A later version of this program has made it.
    #[error("the file is encrypted with cipher {0}, which is not known")]
    Cipher(u32),
    /// They are another model's, or in another format.
    #[error("the file has rows of another model or format")]
    Shape,
}

impl ImageShape {
    /// Whether such images may be kept at all.
    pub(crate) fn is_possible(&self) -> bool {
        (1..=IMAGE_BYTES_MAX).contains(&self.block_bytes)
    }

    /// The header of a file of such images.
    pub(crate) fn header(&self, suite: Suite) -> [u8; HEADER_BYTES] {
        let mut header = [0; HEADER_BYTES];
        header[..4].copy_from_slice(MAGIC);
        header[4..8].copy_from_slice(&VERSION.to_le_bytes());
        header[8..40].copy_from_slice(&self.fingerprint);
        header[40..44].copy_from_slice(&self.block_bytes.to_le_bytes());
        header[44..48].copy_from_slice(&suite.number().to_le_bytes());
        let crc = crc32c::crc32c(&header[..48]);
        header[48..].copy_from_slice(&crc.to_le_bytes());
        header
    }

    /// What a file's header says.
    ///
    /// # Errors
    /// Why it says nothing.
    pub(crate) fn parse(header: &[u8]) -> Result<(Self, Suite), KvFault> {
        let (version, is_whole, shape, suite) = Self::fields(header).ok_or(KvFault::Damaged)?;
        // What follows the number of another version is anything.
        if version != VERSION {
            return Err(KvFault::Version(version));
        }
        if !is_whole || !shape.is_possible() {
            return Err(KvFault::Damaged);
        }
        Ok((shape, Suite::numbered(suite).ok_or(KvFault::Cipher(suite))?))
    }

    /// A header's version, whether its CRC is right, its shape, and the number of its cipher.
    fn fields(header: &[u8]) -> Option<(u32, bool, Self, u32)> {
        let header = header.first_chunk::<HEADER_BYTES>()?;
        let (body, crc) = header.split_last_chunk::<4>()?;
        let (magic, rest) = body.split_first_chunk::<4>()?;
        let (version, rest) = rest.split_first_chunk::<4>()?;
        let (fingerprint, rest) = rest.split_first_chunk::<32>()?;
        let (block_bytes, suite) = rest.split_first_chunk::<4>()?;
        let is_whole = crc32c::crc32c(body) == u32::from_le_bytes(*crc);
        let shape = Self { fingerprint: *fingerprint, block_bytes: u32::from_le_bytes(*block_bytes) };
        let suite = u32::from_le_bytes(suite.try_into().ok()?);
        (magic == MAGIC).then_some((u32::from_le_bytes(*version), is_whole, shape, suite))
    }

    /// Bytes of one place.
    pub(crate) fn place_bytes(&self) -> u64 {
        (u64::from(self.block_bytes) + SEAL_BYTES as u64).next_multiple_of(PAGE_BYTES)
    }

    /// Where place `index` begins. There are at most `BLOCKS_MAX` of 1 GiB: far from the end of `u64`.
    pub(crate) fn offset(&self, index: u32) -> u64 {
        PAGE_BYTES + u64::from(index) * self.place_bytes()
    }

    /// Places that begin in a file of `n_bytes` bytes.
    pub(crate) fn n_places(&self, n_bytes: u64) -> u32 {
        let n_places = n_bytes.saturating_sub(PAGE_BYTES).div_ceil(self.place_bytes());
        u32::try_from(n_places.min(BLOCKS_MAX)).expect("BLOCKS_MAX is below 2^32")
    }

    /// Fills `place` with the content of place `index`.
    pub(crate) fn seal(
        &self,
        image: &[u8],
        (keys, suite): (&ImageKeys, Suite),
        context: &BlockContext,
        nonce: [u8; NONCE_BYTES],
        place: &mut Vec<u8>,
    ) {
        place.clear();
        place.extend_from_slice(image);
        let tag = keys.seal(suite, &nonce, &context.bytes(self), place);
        place.extend_from_slice(&tag);
        place.extend_from_slice(&nonce);
        place.resize(usize::try_from(self.place_bytes()).expect("IMAGE_BYTES_MAX fits"), 0);
    }

    /// Turns the content of a place into the image; `false` when it is not the one that belongs there.
    pub(crate) fn open(&self, place: &mut Vec<u8>, (keys, suite): (&ImageKeys, Suite), context: &BlockContext) -> bool {
        let n_bytes = SEAL_BYTES + self.block_bytes as usize;
        if place.len() < n_bytes {
            return false;
        }
        place.truncate(n_bytes);
        let Some((sealed, nonce)) = place.split_last_chunk_mut() else { return false };
        let is_right = keys.open(suite, nonce, &context.bytes(self), sealed).is_ok();
        place.truncate(self.block_bytes as usize);
        is_right
    }
}

/// Which block an image is of.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BlockContext {
    pub(crate) id: SessionId,
    pub(crate) index: u32,
    /// Of all tokens up to the block's end.
    pub(crate) digest: [u8; 32],
}

impl BlockContext {
    fn bytes(&self, shape: &ImageShape) -> [u8; 92] {
        let mut bytes = [0; 92];
        bytes[..4].copy_from_slice(MAGIC);
        bytes[4..20].copy_from_slice(self.id.as_bytes());
        bytes[20..52].copy_from_slice(&shape.fingerprint);
        bytes[52..56].copy_from_slice(&shape.block_bytes.to_le_bytes());
        bytes[56..60].copy_from_slice(&self.index.to_le_bytes());
        bytes[60..].copy_from_slice(&self.digest);
        bytes
    }
}

/// Digests of a session's beginnings, by block.
#[derive(Debug, Default)]
pub(crate) struct Digests(Vec<[u8; 32]>);

impl Digests {
    /// The digest of `tokens` up to the end of block `index`, all of which are there.
    pub(crate) fn of(&mut self, tokens: &[u32], index: u32) -> [u8; 32] {
        let index = index as usize;
        for block in tokens.chunks_exact(BLOCK_TOKENS).take(index + 1).skip(self.0.len()) {
            let mut hasher = blake3::Hasher::new_derive_key("sparsed session store, tokens of a block");
            hasher.update(self.0.last().unwrap_or(&[0; 32]));
            for token in block {
                hasher.update(&token.to_le_bytes());
            }
            self.0.push(*hasher.finalize().as_bytes());
        }
        self.0[index]
    }

    /// Forgets what depends on tokens from `n_tokens` on.
    pub(crate) fn truncate(&mut self, n_tokens: usize) {
        self.0.truncate(n_tokens / BLOCK_TOKENS);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: ImageShape = ImageShape { fingerprint: [5; 32], block_bytes: 100 };

    #[test]
    fn a_header_is_read_back_and_no_flipped_bit_of_it() {
        let header = SHAPE.header(Suite::ChaCha20Poly1305);
        assert_eq!(ImageShape::parse(&header), Ok((SHAPE, Suite::ChaCha20Poly1305)));
        for bit in 0..header.len() * 8 {
            let mut flipped = header;
            flipped[bit / 8] ^= 1 << (bit % 8);
            let is_version = (4..8).contains(&(bit / 8));
            let fault = if is_version { KvFault::Version(VERSION ^ 1 << (bit - 32)) } else { KvFault::Damaged };
            assert_eq!(ImageShape::parse(&flipped), Err(fault), "bit {bit}");
        }
        assert_eq!(ImageShape::parse(&header[..51]), Err(KvFault::Damaged));
        let huge = ImageShape { block_bytes: IMAGE_BYTES_MAX + 1, ..SHAPE };
        assert_eq!(ImageShape::parse(&huge.header(Suite::Aes256Gcm)), Err(KvFault::Damaged));
    }

    #[test]
    fn a_file_of_the_version_before_says_nothing() {
        let mut header = SHAPE.header(Suite::Aes256Gcm);
        header[4..8].copy_from_slice(&1u32.to_le_bytes());
        let crc = crc32c::crc32c(&header[..44]);
        header[44..48].copy_from_slice(&crc.to_le_bytes());
        assert_eq!(ImageShape::parse(&header), Err(KvFault::Version(1)));
        let crc = crc32c::crc32c(&header[..48]);
        header[48..].copy_from_slice(&crc.to_le_bytes());
        assert_eq!(ImageShape::parse(&header), Err(KvFault::Version(1)), "nor with a CRC where it is now");
    }

    #[test]
    fn places_are_pages_and_cover_the_file() {
        assert_eq!((SHAPE.place_bytes(), SHAPE.offset(0), SHAPE.offset(3)), (4096, 4096, 16384));
        let large = ImageShape { block_bytes: 4096, ..SHAPE };
        assert_eq!(
            (large.place_bytes(), large.n_places(4096), large.n_places(4097), large.n_places(0)),
            (8192, 0, 1, 0)
        );
    }

    #[test]
    fn an_image_opens_for_its_own_block_and_tokens_only() {
        let key = &ImageKeys::of(&[1; 32]);
        let (tokens, id) = ((0..192).collect::<Vec<u32>>(), SessionId::from_bytes([7; 16]));
        let mut digests = Digests::default();
        let context = BlockContext { id, index: 2, digest: digests.of(&tokens, 2) };
        let image: Vec<u8> = (0..100).collect();
        let mut place = Vec::new();
        SHAPE.seal(&image, (key, Suite::Aes256Gcm), &context, [3; 24], &mut place);
        assert_eq!(place.len(), 4096);
        let opens = |shape: &ImageShape, context: &BlockContext| {
            let mut place = place.clone();
            shape.open(&mut place, (key, Suite::Aes256Gcm), context).then_some(place)
        };
        assert_eq!(opens(&SHAPE, &context), Some(image));
        let mut others = tokens.clone();
        others[0] = 1;
        let mut other_digests = Digests::default();
        let wrong = [
            BlockContext { index: 1, ..context },
            BlockContext { digest: digests.of(&tokens, 1), ..context },
            BlockContext { digest: other_digests.of(&others, 2), ..context },
            BlockContext { id: SessionId::from_bytes([8; 16]), ..context },
        ];
        wrong.iter().for_each(|context| assert_eq!(opens(&SHAPE, context), None, "{context:?}"));
        assert_eq!(opens(&ImageShape { fingerprint: [6; 32], ..SHAPE }, &context), None);
        assert!(!SHAPE.open(&mut place.clone(), (key, Suite::ChaCha20Poly1305), &context));
        assert!(!SHAPE.open(&mut place[..139].to_vec(), (key, Suite::Aes256Gcm), &context));
    }

    #[test]
    fn digests_are_the_same_in_one_go_and_after_a_cut() {
        let tokens: Vec<u32> = (0..200).collect();
        let mut digests = Digests::default();
        let first = [0, 1, 2].map(|index| digests.of(&tokens, index));
        digests.truncate(130);
        assert_eq!(digests.0.len(), 2);
        assert_eq!(digests.of(&tokens, 2), first[2]);
        assert_eq!(Digests::default().of(&tokens, 2), first[2]);
    }
}
