//! What happens to whole blocks? Copies, host images, and the way to the slow tier and back.
//!
//! A block in the slow tier keeps its index plane; its latent plane is zero, and nobody may write into it.

use crate::memory::Pool;
use sparsed_abi::{KV_COPY, KV_DISCARD, KV_EXPORT, KV_IMPORT, KV_LIMIT_CACHE, KV_TO_FAST, KV_TO_SLOW, SpdKvOp};
use sparsed_plugin_kit::slow::SlowTier;
use sparsed_plugin_kit::{PluginError, Result};
use std::ops::Range;
use std::sync::MutexGuard;

/// Where a block's host image lies in the buffer of the call.
struct Image {
    index: Range<usize>,
    latent: Range<usize>,
}

impl Pool {
    /// Carries out block operations, in order. A list with an impossible one changes nothing.
    pub(crate) fn apply(&self, ops: &[SpdKvOp], host: &mut [u8]) -> Result<()> {
        ops.iter().try_for_each(|op| self.check(op, host.len()))?;
        for op in ops {
            match op.kind {
                KV_DISCARD => self.discard(self.block(op.dst_block)?),
                KV_EXPORT => {
                    let (src, image) = (self.block(op.src_block)?, self.image(op, host.len())?);
                    self.export_keys(src, &mut host[image.index]);
                    self.latents(src, &mut host[image.latent])?;
                }
                KV_IMPORT => {
                    let (dst, image) = (self.block(op.dst_block)?, self.image(op, host.len())?);
                    self.leave_slow(dst);
                    // SAFETY: the host owns the block and runs nothing on it now.
                    unsafe { self.import_keys(dst, &host[image.index]) };
                    // SAFETY: as above.
                    unsafe { self.latents_mut(dst) }.copy_from_slice(&host[image.latent]);
                }
                KV_COPY => self.copy(self.block(op.src_block)?, self.block(op.dst_block)?, op.n_tokens as usize)?,
                KV_TO_SLOW => self.to_slow(op)?,
                KV_TO_FAST => self.to_fast(self.block(op.dst_block)?)?,
                KV_LIMIT_CACHE => self.limit_cache(op.cache_bytes)?,
                other => return Err(PluginError::unsupported(format!("KV operation {other}"))),
            }
        }
        Ok(())
    }

    /// Whether the operation is possible, whatever the ones before it do.
    fn check(&self, op: &SpdKvOp, host_length: usize) -> Result<()> {
        match op.kind {
            KV_DISCARD | KV_TO_SLOW | KV_TO_FAST => self.block(op.dst_block).map(drop),
            KV_EXPORT => self.block(op.src_block).and_then(|_| self.image(op, host_length)).map(drop),
            KV_IMPORT => self.block(op.dst_block).and_then(|_| self.image(op, host_length)).map(drop),
            KV_COPY if op.n_tokens as usize > self.block_tokens => {
                Err(PluginError::invalid(format!("{} tokens of a block of {}", op.n_tokens, self.block_tokens)))
            }
            KV_COPY => self.block(op.src_block).and_then(|_| self.block(op.dst_block)).map(drop),
            KV_LIMIT_CACHE => {
                let slow = self.slow_tier()?;
                Ok(slow.cache().slots_in(bytes_in_memory(op.cache_bytes)).map(drop)?)
            }
            other => Err(PluginError::unsupported(format!("KV operation {other}"))),
        }
    }

    fn block(&self, n: u32) -> Result<usize> {
        let out = || PluginError::invalid(format!("block {n} of {}", self.n_blocks));
        Some(n as usize).filter(|&n| n < self.n_blocks).ok_or_else(out)
    }

    fn image(&self, op: &SpdKvOp, host_length: usize) -> Result<Image> {
        let out = || PluginError::invalid("a host image reaches past the buffer");
        let (index, latent) = (self.index_plane.block_bytes, self.latent_plane.block_bytes);
        let start = usize::try_from(op.host_offset).map_err(|_| out())?;
        let end = start.checked_add(index + latent).filter(|&end| end <= host_length).ok_or_else(out)?;
        Ok(Image { index: start..start + index, latent: start + index..end })
    }

    fn discard(&self, block: usize) {
        self.leave_slow(block);
        self.latent_plane.discard(block);
        self.index_plane.discard(block);
        self.forget_lengths(block);
    }

    fn to_slow(&self, op: &SpdKvOp) -> Result<()> {
        let block = self.block(op.dst_block)?;
        let mut slow = self.slow_tier()?;
        slow.cache_mut().attach(op.dst_block, op.slow_offset, op.tag)?;
        self.latent_plane.discard(block);
        Ok(())
    }

    fn to_fast(&self, block: usize) -> Result<()> {
        let Some(mut slow) = self.slow().filter(|slow| slow.cache().is_attached(block as u32)) else {
            return Err(PluginError::invalid(format!("block {block} is not in the slow tier")));
        };
        // SAFETY: the host owns the block and runs nothing on it now.
        let read = slow.read_block(block as u32, unsafe { self.latents_mut(block) });
        match read {
            Ok(()) => Ok(slow.cache_mut().detach(block as u32)?),
            Err(error) => {
                self.latent_plane.discard(block);
                Err(error)
            }
        }
    }

    fn limit_cache(&self, bytes: u64) -> Result<()> {
        Ok(self.slow_tier()?.cache_mut().limit(bytes_in_memory(bytes))?)
    }

    fn slow_tier(&self) -> Result<MutexGuard<'_, SlowTier>> {
        self.slow().ok_or_else(|| PluginError::invalid("the pool has no slow tier"))
    }

    /// The block is fast from now on, if it was not; its latent rows are zero then.
    fn leave_slow(&self, block: usize) {
        if let Some(mut slow) = self.slow()
            && slow.cache().is_attached(block as u32)
        {
            slow.cache_mut().detach(block as u32).expect("it is attached");
        }
    }

    /// Copies the latent plane of a block, wherever it lies.
    fn latents(&self, block: usize, to: &mut [u8]) -> Result<()> {
        if let Some(mut slow) = self.slow()
            && slow.cache().is_attached(block as u32)
        {
            return slow.read_block(block as u32, to);
        }
        let length = self.latent_plane.block_bytes;
        to.copy_from_slice(self.latent_plane.bytes(block * length, length));
        Ok(())
    }

    /// # Safety
    /// Nobody else uses the block's latent plane now.
    #[allow(clippy::mut_from_ref, reason = "blocks are disjoint")]
    unsafe fn latents_mut(&self, block: usize) -> &mut [u8] {
        let length = self.latent_plane.block_bytes;
        // SAFETY: the caller's contract.
        unsafe { self.latent_plane.bytes_mut(block * length, length) }
    }

    fn copy(&self, src: usize, dst: usize, n_tokens: usize) -> Result<()> {
        if self.is_slow(dst) {
            return Err(PluginError::invalid(format!("a copy into block {dst}, which is in the slow tier")));
        }
        if src == dst {
            return Ok(());
        }
        let mut slow_rows = Vec::new();
        if self.is_slow(src) {
            slow_rows.resize(self.latent_plane.block_bytes, 0);
            self.latents(src, &mut slow_rows)?;
        }
        let length = self.latent_plane.block_bytes;
        let from = if slow_rows.is_empty() { self.latent_plane.bytes(src * length, length) } else { &slow_rows };
        // SAFETY: another block than the one that is read; the host runs nothing on it now.
        let to = unsafe { self.latents_mut(dst) };
        copy_tokens(from, to, self.n_layers, self.block_tokens, n_tokens);
        // SAFETY: as above.
        unsafe { self.copy_keys(src, dst, n_tokens) };
        Ok(())
    }

    /// Whether the latent rows of `block` lie in the slow tier.
    pub(crate) fn is_slow(&self, block: usize) -> bool {
        self.slow().is_some_and(|slow| slow.cache().is_attached(block as u32))
    }
}

/// As a size here; more than that is as much as there can be.
fn bytes_in_memory(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX)
}

/// Copies the first `n_tokens` of `block_tokens` rows of each layer.
fn copy_tokens(from: &[u8], to: &mut [u8], n_layers: usize, block_tokens: usize, n_tokens: usize) {
    if n_layers == 0 {
        return;
    }
    let layer = from.len() / n_layers;
    let part = layer / block_tokens * n_tokens;
    for (from, to) in from.chunks_exact(layer).zip(to.chunks_exact_mut(layer)) {
        to[..part].copy_from_slice(&from[..part]);
    }
}
