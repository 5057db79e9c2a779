//! Where blocks lie in the slow tier, written as `OPS.md` says.

use crate::cache::{Plane, Shape};
use crate::rig::{Pool, Session, struct_size};
use crate::verdict::{Outcome, Wrong};
use ring::aead::{AES_256_GCM, Aad, CHACHA20_POLY1305, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use sparsed_abi::{
    FEAT_SLOW_FILE, FEAT_SLOW_HOST, FEAT_SLOW_SEALED, SLOW_AES_256_GCM, SLOW_CHACHA20_POLY1305, SpdKvSlow,
};
use std::io::Write;
use std::os::fd::AsRawFd;

pub(super) const PAGE: usize = 4096;
/// A row cache that holds every row of these checks, in bytes.
pub(super) const ROOMY: u64 = 1 << 20;
/// Bytes of a page after its rows and zeros.
const TRAILER: usize = 16;
/// The area begins here, so that who forgets `spd_kv_slow.offset` reads nothing good.
const OFFSET: usize = 2 * PAGE;

/// What an area's pages are encrypted with where they are.
static KEY: [u8; 32] = *b"as random as a test has need of.";

/// Where a slow area lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    File,
    Host,
    /// In a file, encrypted.
    Sealed(Cipher),
}

/// `SPD_SLOW_*`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cipher {
    Aes,
    ChaCha,
}

impl Kind {
    pub(super) const SEALED: [Self; 2] = [Self::Sealed(Cipher::Aes), Self::Sealed(Cipher::ChaCha)];

    pub(super) fn is_claimed(self, session: &Session) -> bool {
        session.claims(match self {
            Self::File => FEAT_SLOW_FILE,
            Self::Host => FEAT_SLOW_HOST,
            Self::Sealed(_) => FEAT_SLOW_SEALED,
        })
    }

    /// Finishes page `number` of a block, whose rows and zeros are there.
    fn finish(self, tag: u64, number: u32, page: &mut [u8; PAGE]) {
        let (rows, trailer) = page.split_at_mut(PAGE - TRAILER);
        let named = [&tag.to_le_bytes()[..], &number.to_le_bytes()].concat();
        let Self::Sealed(cipher) = self else {
            trailer[..NONCE_LEN].copy_from_slice(&named);
            let crc = crc32c::crc32c(&page[..PAGE - 4]);
            page[PAGE - 4..].copy_from_slice(&crc.to_le_bytes());
            return;
        };
        let algorithm = if cipher == Cipher::Aes { &AES_256_GCM } else { &CHACHA20_POLY1305 };
        let key = LessSafeKey::new(UnboundKey::new(algorithm, &KEY).expect("keys of 32 bytes"));
        let nonce = Nonce::try_assume_unique_for_key(&named).expect("12 bytes");
        let sealed = key.seal_in_place_separate_tag(nonce, Aad::empty(), rows).expect("a page is short");
        trailer.copy_from_slice(sealed.as_ref());
    }
}

#[derive(Clone, Copy)]
#[repr(C, align(4096))]
pub(super) struct Page(pub(super) [u8; PAGE]);

/// A slow area and what it is in.
pub(super) struct Area {
    kind: Kind,
    pub(super) pages: Vec<Page>,
    file: std::fs::File,
    pub(super) cache_bytes: u64,
}

impl Area {
    pub(super) fn new(kind: Kind, pages: usize) -> Result<Self, Wrong> {
        // In memory: a confined process may create no other.
        let file = rustix::fs::memfd_create("slow area", rustix::fs::MemfdFlags::CLOEXEC);
        let file = file.map_err(|errno| Wrong::Failed(format!("no file for the slow area: {errno}")))?.into();
        let area = Self { kind, pages: vec![Page([0xee; PAGE]); OFFSET / PAGE + pages], file, cache_bytes: ROOMY };
        area.flush()?;
        Ok(area)
    }

    /// Page `number` of the area, to write; [`Self::flush`] makes it seen.
    pub(super) fn page(&mut self, number: usize) -> &mut [u8; PAGE] {
        &mut self.pages[OFFSET / PAGE + number].0
    }

    /// Brings the file to what the pages are.
    pub(super) fn flush(&self) -> Outcome {
        use std::os::unix::fs::FileExt;
        let io = |error: std::io::Error| Wrong::Failed(format!("the slow area: {error}"));
        for (number, page) in self.pages.iter().enumerate() {
            self.file.write_all_at(&page.0, (number * PAGE) as u64).map_err(io)?;
        }
        (&self.file).flush().map_err(io)
    }

    pub(super) fn desc(&self) -> SpdKvSlow {
        let (fd, ptr) = match self.kind {
            Kind::File | Kind::Sealed(_) => (self.file.as_raw_fd(), std::ptr::null()),
            Kind::Host => (0, self.pages.as_ptr().cast()),
        };
        let (key, cipher) = match self.kind {
            Kind::File | Kind::Host => (std::ptr::null(), 0),
            Kind::Sealed(Cipher::Aes) => (KEY.as_ptr().cast(), SLOW_AES_256_GCM),
            Kind::Sealed(Cipher::ChaCha) => (KEY.as_ptr().cast(), SLOW_CHACHA20_POLY1305),
        };
        SpdKvSlow {
            struct_size: struct_size::<SpdKvSlow>(),
            fd,
            page_bytes: 4096,
            ptr,
            offset: OFFSET as u64,
            length: (self.pages.len() * PAGE - OFFSET) as u64,
            cache_bytes: self.cache_bytes,
            key,
            cipher,
            ..SpdKvSlow::default()
        }
    }
}

/// Bytes of a token's latent and rope row.
pub(super) fn row_bytes(shape: &Shape) -> usize {
    shape.row_bytes(Plane::Latent) + shape.row_bytes(Plane::Rope)
}

/// Pages that the latent plane of a block has, and rows in each.
pub(super) fn paging(shape: &Shape) -> (usize, usize) {
    let rows = (PAGE - TRAILER) / row_bytes(shape);
    (shape.layers as usize * (shape.block_tokens as usize).div_ceil(rows), rows)
}

/// Writes the latent plane of a host image as pages from `first` on, with this tag.
pub(super) fn write_pages(area: &mut Area, shape: &Shape, pool: &Pool, image: &[u8], (first, tag): (usize, u64)) {
    let (pages, rows) = paging(shape);
    let per_layer = pages / shape.layers as usize;
    let latent = &image[usize::try_from(pool.info.image_latent_offset).expect("small")..];
    let layer_bytes = latent.len() / shape.layers as usize;
    let row = layer_bytes / shape.block_tokens as usize;
    let kind = area.kind;
    for number in 0..pages {
        let (layer, within) = (number / per_layer, number % per_layer);
        let layer = &latent[layer * layer_bytes..(layer + 1) * layer_bytes];
        let own = &layer[within * rows * row..layer_bytes.min((within + 1) * rows * row)];
        let page = area.page(first + number);
        page.fill(0);
        page[..own.len()].copy_from_slice(own);
        kind.finish(tag, u32::try_from(number).expect("small"), page);
    }
}
