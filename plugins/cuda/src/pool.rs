//! Where do KV rows live? Blocks on the device, each laid out as its host image, and the way in and out.

use crate::driver::{Address, Context, Stream};
use crate::frame::{Copied, Frame, Layout, Scratch};
use crate::memory::{BYTES_MAX, Counted};
use sparsed_abi::{
    DT_BF16, DT_F16, DT_F32, DT_Q8_0, KV_COPY, KV_DISCARD, KV_EXPORT, KV_IMPORT, SpdKvDesc, SpdKvInfo, SpdKvOp, SpdRow,
    StepArrays,
};
use sparsed_plugin_kit::{PluginError, Result, Usage};
use std::sync::Arc;

/// Formats of rows: they are bytes here, since this slice has no operator that reads them.
pub(crate) const ROW_DTYPES: [u32; 4] = [DT_F32, DT_F16, DT_BF16, DT_Q8_0];
/// Calls whose images may be in flight at once.
const FRAMES: usize = 2;
/// Bytes of images that a frame takes, or one image where it is larger.
const FRAME_BYTES: u64 = 1 << 20;

/// A pool of blocks.
#[derive(Debug)]
pub(crate) struct Pool {
    pub(crate) frames: Vec<Arc<Frame>>,
    block_tokens: u32,
    n_blocks: u32,
    /// Bytes of a token's rows in each layer of the image, layer by layer.
    layer_rows: Vec<u64>,
    image_bytes: u64,
    memory: Counted,
}

/// Bytes of a row.
fn row_bytes(row: SpdRow) -> Result<u64> {
    let width = u64::from(row.width);
    match row.dtype {
        _ if width == 0 => Ok(0),
        DT_F32 => Ok(width * 4),
        DT_F16 | DT_BF16 => Ok(width * 2),
        DT_Q8_0 if width.is_multiple_of(32) => Ok(width / 32 * 34),
        DT_Q8_0 => Err(PluginError::invalid(format!("Q8_0 rows of {width} values are not whole blocks"))),
        dtype => Err(PluginError::unsupported(format!("KV rows of dtype {dtype}"))),
    }
}

impl Pool {
    pub(crate) fn create(desc: &SpdKvDesc, context: &Arc<Context>, usage: &Arc<Usage>) -> Result<(Self, SpdKvInfo)> {
        let overflow = || PluginError::invalid("a pool of more than 2^42 bytes");
        let (index, latent) = (row_bytes(desc.index)?, row_bytes(desc.latent)? + row_bytes(desc.rope)?);
        let plane = |row: u64, layers: u32| {
            let bytes = row.checked_mul(layers.into()).and_then(|n| n.checked_mul(desc.block_tokens.into()));
            bytes.filter(|&bytes| bytes <= BYTES_MAX).ok_or_else(overflow)
        };
        let (index_bytes, latent_bytes) = (plane(index, desc.n_index_layers)?, plane(latent, desc.n_layers)?);
        let image_bytes = index_bytes + latent_bytes;
        let total = image_bytes.checked_mul(desc.n_blocks.into()).filter(|&bytes| bytes <= BYTES_MAX);
        let total = total.ok_or_else(overflow)?;
        let memory = Counted::allocate(context, usage, |u| &u.kv, total)?;
        memory.zero(total)?;
        let end = image_bytes.max(FRAME_BYTES / image_bytes.max(1) * image_bytes);
        let layout = Layout { rows: 0, input: 0, output: 0, end };
        let n_images = usize::try_from(end / image_bytes.max(1)).unwrap_or(0);
        let frame = |_| {
            let scratch = Scratch { addresses: Vec::new(), outputs: Vec::with_capacity(n_images) };
            Frame::new(context, usage, layout, 0, scratch).map(Arc::new)
        };
        let frames = (0..FRAMES).map(frame).collect::<Result<Vec<_>>>()?;
        let rows = |row: u64, layers: u32| std::iter::repeat_n(row, layers as usize);
        let layer_rows = rows(index, desc.n_index_layers).chain(rows(latent, desc.n_layers)).collect();
        let info =
            SpdKvInfo { device_bytes: total, image_bytes, image_latent_offset: index_bytes, ..SpdKvInfo::default() };
        let (block_tokens, n_blocks) = (desc.block_tokens, desc.n_blocks);
        Ok((Self { frames, block_tokens, n_blocks, layer_rows, image_bytes, memory }, info))
    }

    /// Whether operations are possible, whatever the ones before them do.
    ///
    /// # Errors
    /// `SPD_E_INVALID` or `SPD_E_UNSUPPORTED`; nothing has been enqueued then.
    pub(crate) fn check(&self, ops: &[SpdKvOp], host_length: usize) -> Result<()> {
        let block = |n: u32| {
            let out = || PluginError::invalid(format!("block {n} of {}", self.n_blocks));
            Some(()).filter(|()| n < self.n_blocks).ok_or_else(out)
        };
        let image = |op: &SpdKvOp| {
            let end = op.host_offset.checked_add(self.image_bytes);
            let fits = end.is_some_and(|end| end <= host_length as u64);
            if fits { Ok(()) } else { Err(PluginError::invalid("a host image reaches past the buffer")) }
        };
        ops.iter().try_for_each(|op| match op.kind {
            KV_COPY if op.n_tokens > self.block_tokens => {
                Err(PluginError::invalid(format!("{} tokens of a block of {}", op.n_tokens, self.block_tokens)))
            }
            KV_COPY => block(op.src_block).and_then(|()| block(op.dst_block)),
            KV_EXPORT => block(op.src_block).and_then(|()| image(op)),
            KV_IMPORT => block(op.dst_block).and_then(|()| image(op)),
            KV_DISCARD => block(op.dst_block),
            kind => Err(PluginError::unsupported(format!("KV operation {kind}: this slice has no slow tier"))),
        })
    }

    /// How many of checked operations fit into one frame, from the first.
    pub(crate) fn part(&self, ops: &[SpdKvOp]) -> usize {
        let room = self.frames[0].layout().end;
        let mut used = 0;
        let fits = |op: &&SpdKvOp| {
            used += if matches!(op.kind, KV_EXPORT | KV_IMPORT) { self.image_bytes } else { 0 };
            used <= room
        };
        ops.iter().take_while(fits).count().max(1)
    }

    /// Enqueues checked operations that fit into a taken frame, whose list of outputs says where images go.
    ///
    /// # Safety
    /// `host` is the call's buffer; the frame stays taken until its event is over.
    pub(crate) unsafe fn enqueue(&self, stream: &Stream, frame: &Frame, ops: &[SpdKvOp], host: &[u8]) -> Result<()> {
        let outputs = &mut frame.scratch().outputs;
        outputs.clear();
        let (bytes, mut at) = (self.image_bytes as usize, 0);
        for op in ops {
            let (from, to) = (self.block(op.src_block), self.block(op.dst_block));
            match op.kind {
                KV_EXPORT => {
                    // SAFETY: a block and an image of the frame; the host looks at it once the event is over.
                    unsafe { stream.copy_out(frame.host(at), from, bytes)? };
                    let (to, bytes) = (op.host_offset, self.image_bytes);
                    outputs.push(Copied { from: at, to, bytes, is_f32: false });
                    at += self.image_bytes;
                }
                KV_IMPORT => {
                    let start = op.host_offset as usize;
                    // SAFETY: an image of the frame, which nothing else has; a block.
                    unsafe {
                        frame.stage(at, &host[start..start + bytes]);
                        stream.copy_in(to, frame.host(at), bytes)?;
                    }
                    at += self.image_bytes;
                }
                // SAFETY: both are blocks.
                KV_COPY if from != to => unsafe { self.copy(stream, from, to, op.n_tokens)? },
                KV_COPY => (),
                // SAFETY: a block.
                _ => unsafe { stream.fill_zero(to, bytes)? },
            }
        }
        Ok(())
    }

    /// Copies the first `n_tokens` tokens of every layer.
    ///
    /// # Safety
    /// Both addresses are blocks, and `n_tokens` no more than a block has.
    unsafe fn copy(&self, stream: &Stream, from: Address, to: Address, n_tokens: u32) -> Result<()> {
        let mut layer = 0;
        for row in &self.layer_rows {
            // SAFETY: inside the layer of both blocks.
            unsafe { stream.copy(to + layer, from + layer, (row * u64::from(n_tokens)) as usize)? };
            layer += row * u64::from(self.block_tokens);
        }
        Ok(())
    }

    /// The address of a block; of no meaning for one that the pool does not have.
    fn block(&self, n: u32) -> Address {
        self.memory.address() + u64::from(n) * self.image_bytes
    }

    /// Whether a step's slots and blocks are the pool's and its contexts have blocks enough.
    ///
    /// # Errors
    /// `SPD_E_INVALID`.
    pub(crate) fn check_step(&self, step: &StepArrays<'_>) -> Result<()> {
        let slots = u64::from(self.n_blocks) * u64::from(self.block_tokens);
        let inside = step.block_ids.iter().all(|&id| id < self.n_blocks) && step.slots.iter().all(|&s| s < slots);
        let mut ranges = step.block_offsets.windows(2).zip(step.contexts);
        let has_room = |blocks: u32, context: u32| u64::from(blocks) * u64::from(self.block_tokens) >= context.into();
        if inside && ranges.all(|(range, &context)| has_room(range[1] - range[0], context)) {
            return Ok(());
        }
        Err(PluginError::invalid("step: a slot or block outside the pool or the context"))
    }
}
