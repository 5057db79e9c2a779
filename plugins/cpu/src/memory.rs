//! Where do weights and KV rows live? Weights where the daemon mapped them, KV rows in lazily committed memory.

use crate::kernels::packed::TILE_ROWS;
use crate::kernels::rows::decode;
use crate::keys::LongestKeys;
use crate::level::Level;
use crate::packing::Packed;
use memmap2::{Advice, MmapMut, MmapOptions, UncheckedAdvice};
use rustix::param::page_size;
use sparsed_abi::{
    DT_BF16, DT_F8_128, DT_F16, DT_F32, DT_Q4_0, DT_Q6_0, DT_Q8_0, DT_W16, E_NOMEM_DEVICE, SpdKvDesc, SpdKvInfo,
    SpdRow, SpdWeightDesc, W_HOST_IN_PLACE,
};
use sparsed_plugin_kit::slow::SlowTier;
use sparsed_plugin_kit::slow::rowcache::SlowLayout;
use sparsed_plugin_kit::{Held, PluginError, Result, SlowArea, Source, Usage};
use sparsed_quant::Format;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

/// Tokens of a block are a multiple of this: tiles of index keys are whole.
#[allow(clippy::cast_possible_truncation, reason = "16")]
pub(crate) const BLOCK_TOKENS_ALIGN: u32 = TILE_ROWS as u32;

/// A weight: `batch` matrices `[rows, cols]`.
#[derive(Debug)]
pub(crate) struct Weight {
    pub(crate) format: Format,
    pub(crate) batch: usize,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    row_bytes: usize,
    in_place: bool,
    bytes: Bytes,
    /// Which batches have been.
    uploaded: Vec<bool>,
    /// The same values laid out for rounded activations, once a plan has asked for it.
    pub(crate) packed: OnceLock<Packed>,
    /// See [`Self::vector`].
    vector: OnceLock<Vec<f32>>,
    _held: Option<Held>,
}

#[derive(Debug)]
enum Bytes {
    Own(Vec<u8>),
    Mapped(&'static [u8]),
}

impl Weight {
    pub(crate) fn create(desc: &SpdWeightDesc, usage: &Arc<Usage>) -> Result<Self> {
        let unknown = || PluginError::unsupported(format!("weights of dtype {}", desc.dtype));
        let format = Format::from_dtype(desc.dtype).ok_or_else(unknown)?;
        if desc.flags & !W_HOST_IN_PLACE != 0 {
            return Err(PluginError::unsupported(format!("weight flags {:#x}", desc.flags)));
        }
        let too_large = || PluginError::invalid("a weight's size overflows");
        let (rows, cols) = (small(desc.rows)?, small(desc.cols)?);
        let row_bytes = format.row_bytes(cols).map_err(|error| PluginError::invalid(error.to_string()))?;
        let batch = desc.batch as usize;
        let total = row_bytes.checked_mul(rows).and_then(|n| n.checked_mul(batch)).ok_or_else(too_large)?;
        let in_place = desc.flags & W_HOST_IN_PLACE != 0;
        let held = if in_place { None } else { Some(usage.hold(|u| &u.weights, total as u64)?) };
        let bytes = Bytes::Own(if in_place { Vec::new() } else { vec![0; total] });
        let (packed, vector) = (OnceLock::new(), OnceLock::new());
        let uploaded = vec![false; batch];
        Ok(Self { format, batch, rows, cols, row_bytes, in_place, bytes, uploaded, packed, vector, _held: held })
    }

    pub(crate) fn upload(&mut self, first: u32, n: u32, source: Source) -> Result<()> {
        let matrix = self.row_bytes * self.rows;
        let (first, n) = (first as usize, n as usize);
        if first.checked_add(n).is_none_or(|end| end > self.batch) || n == 0 {
            return Err(PluginError::invalid(format!("batches {first}..+{n} of {}", self.batch)));
        }
        let source_length = source.bytes().len();
        if source_length != matrix * n {
            return Err(PluginError::invalid(format!("{source_length} bytes for {n} matrices of {matrix}")));
        }
        if self.in_place {
            if n != self.batch {
                return Err(PluginError::unsupported("a weight in place, uploaded in pieces"));
            }
            // SAFETY: created with W_HOST_IN_PLACE, and the slice lives in the weight, which the host destroys first.
            self.bytes = Bytes::Mapped(unsafe { source.bytes_in_place() });
        } else if let Bytes::Own(own) = &mut self.bytes {
            own[first * matrix..(first + n) * matrix].copy_from_slice(source.bytes());
        }
        self.uploaded[first..first + n].fill(true);
        Ok(())
    }

    /// A weight of these bytes.
    #[cfg(test)]
    pub(crate) fn uploaded(desc: &SpdWeightDesc, bytes: Vec<u8>, usage: &Arc<Usage>) -> Self {
        let mut weight = Self::create(desc, usage).unwrap();
        assert_eq!(bytes.len(), weight.row_bytes * weight.rows * weight.batch);
        weight.uploaded.fill(true);
        Self { bytes: Bytes::Own(bytes), ..weight }
    }

    pub(crate) fn commit(&self) -> Result<()> {
        match self.uploaded.iter().position(|&uploaded| !uploaded) {
            Some(missing) => Err(PluginError::invalid(format!("batch {missing} of {} was not uploaded", self.batch))),
            None => Ok(()),
        }
    }

    /// The first row, decoded once and kept: for norms and biases.
    pub(crate) fn vector(&self) -> &[f32] {
        self.vector.get_or_init(|| {
            let mut values = vec![0.0; self.cols];
            decode(Level::Scalar, self.format, self.row(0, 0), &mut values);
            values
        })
    }

    /// Row `row` of matrix `batch`, encoded.
    pub(crate) fn row(&self, batch: usize, row: usize) -> &[u8] {
        let bytes = match &self.bytes {
            Bytes::Own(own) => own,
            Bytes::Mapped(mapped) => *mapped,
        };
        let at = (batch * self.rows + row) * self.row_bytes;
        &bytes[at..at + self.row_bytes]
    }
}

/// How rows of the pool may be stored.
pub(crate) const ROW_DTYPES: [u32; 8] = [DT_F32, DT_F16, DT_BF16, DT_Q8_0, DT_Q4_0, DT_W16, DT_F8_128, DT_Q6_0];

/// One kind of row in the pool.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RowFormat {
    pub(crate) format: Format,
    pub(crate) width: usize,
    pub(crate) bytes: usize,
}

impl RowFormat {
    fn new(row: SpdRow) -> Result<Self> {
        let width = row.width as usize;
        if !ROW_DTYPES.contains(&row.dtype) {
            return Err(PluginError::unsupported(format!("KV rows of dtype {}", row.dtype)));
        }
        let format = Format::from_dtype(row.dtype).ok_or_else(|| PluginError::unsupported("KV dtype"))?;
        let bytes = format.row_bytes(width).map_err(|error| PluginError::invalid(error.to_string()))?;
        Ok(Self { format, width, bytes })
    }
}

/// A KV pool. Rows are written by one step at a time, each by one thread.
#[derive(Debug)]
pub(crate) struct Pool {
    pub(crate) block_tokens: usize,
    pub(crate) n_blocks: usize,
    pub(crate) latent: RowFormat,
    pub(crate) rope: RowFormat,
    pub(crate) index: RowFormat,
    pub(crate) n_layers: usize,
    pub(crate) n_index_layers: usize,
    pub(crate) latent_plane: Plane,
    pub(crate) index_plane: Plane,
    /// See [`LongestKeys`]; of other keys than those in q8_0 nobody asks it.
    pub(crate) longest_keys: Option<LongestKeys>,
    /// Where latent rows of some blocks lie instead; see `blocks.rs`.
    slow: Option<Mutex<SlowTier>>,
    _held: Held,
}

/// Rows by block, layer and token: a block is one range, so that its memory can be given back.
#[derive(Debug)]
pub(crate) struct Plane {
    map: MmapMut,
    at: *mut u8,
    pub(crate) block_bytes: usize,
}

// SAFETY: the mapping is reached through `at`; steps write disjoint rows, see Pool.
unsafe impl Sync for Plane {}
// SAFETY: as above.
unsafe impl Send for Plane {}

impl Plane {
    fn new(block_bytes: usize, n_blocks: usize, pages: Advice) -> Result<Self> {
        let overflow = || PluginError::invalid("a KV pool's size overflows");
        let total = block_bytes.checked_mul(n_blocks).ok_or_else(overflow)?.max(1);
        let no_memory = |error: std::io::Error| PluginError::new(E_NOMEM_DEVICE, format!("{total} bytes: {error}"));
        // Not reserved: a plane is laid out for all blocks, fast or slow, and may be larger than the machine's memory.
        let mut map = MmapOptions::new().len(total).no_reserve_swap().map_anon().map_err(no_memory)?;
        // A refusal costs speed, or memory that comes back later.
        let _refused = map.advise(pages);
        Ok(Self { at: map.as_mut_ptr(), map, block_bytes })
    }

    /// # Safety
    /// Nobody else uses these bytes now.
    #[allow(clippy::mut_from_ref, reason = "disjoint rows are written by several threads")]
    pub(crate) unsafe fn bytes_mut(&self, at: usize, length: usize) -> &mut [u8] {
        assert!(at + length <= self.map.len(), "outside the plane");
        // SAFETY: inside the mapping; sole use by the caller's contract.
        unsafe { std::slice::from_raw_parts_mut(self.at.add(at), length) }
    }

    /// Copies `bytes` to `at`.
    ///
    /// # Safety
    /// Nobody else uses these bytes now.
    pub(crate) unsafe fn put(&self, at: usize, bytes: &[u8]) {
        assert!(at + bytes.len() <= self.map.len(), "outside the plane");
        // SAFETY: inside the mapping; sole use by the caller's contract.
        unsafe { self.at.add(at).copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
    }

    pub(crate) fn bytes(&self, at: usize, length: usize) -> &[u8] {
        assert!(at + length <= self.map.len(), "outside the plane");
        // SAFETY: inside the mapping; rows that are read are not written by the same operator.
        unsafe { std::slice::from_raw_parts(self.at.add(at), length) }
    }

    pub(crate) fn discard(&self, block: usize) {
        let range = block * self.block_bytes..(block + 1) * self.block_bytes;
        // SAFETY: the host has let go of the block.
        unsafe { self.bytes_mut(range.start, self.block_bytes) }.fill(0);
        // Whole pages inside go back to the system; they read as zero afterwards, as they do now.
        // A page larger than the machine's would leave what blocks begin and end in.
        let page = page_size();
        let (first, last) = (range.start.next_multiple_of(page), range.end / page * page);
        if first < last {
            // SAFETY: private anonymous pages without a reference into them; a refusal leaves zeroed pages.
            drop(unsafe { self.map.unchecked_advise_range(UncheckedAdvice::DontNeed, first, last - first) });
        }
    }
}

impl Pool {
    pub(crate) fn create(desc: &SpdKvDesc, slow: Option<SlowArea>, usage: &Arc<Usage>) -> Result<(Self, SpdKvInfo)> {
        let (latent, rope, index) =
            (RowFormat::new(desc.latent)?, RowFormat::new(desc.rope)?, RowFormat::new(desc.index)?);
        if !desc.block_tokens.is_multiple_of(BLOCK_TOKENS_ALIGN) {
            let have = desc.block_tokens;
            return Err(PluginError::unsupported(format!("blocks of {have} tokens, not whole {BLOCK_TOKENS_ALIGN}")));
        }
        let overflow = || PluginError::invalid("a KV block's size overflows");
        let plane = |row: usize, layers: u32| {
            row.checked_mul(layers as usize)
                .and_then(|n| n.checked_mul(desc.block_tokens as usize))
                .ok_or_else(overflow)
        };
        let latent_block = plane(latent.bytes + rope.bytes, desc.n_layers)?;
        let index_block = plane(index.bytes, desc.n_index_layers)?;
        let image = latent_block.checked_add(index_block).ok_or_else(overflow)?;
        let total = (image as u64).checked_mul(u64::from(desc.n_blocks)).ok_or_else(overflow)?;
        let cached = slow.as_ref().map_or(0, |slow| slow.cache_bytes);
        // Huge pages where the system gives them: gathered rows are all over a plane. Not where latents of single
        // blocks go to the slow tier: a huge page of which a part is given back stays the process's until memory is
        // short.
        let pages = if slow.is_some() { Advice::NoHugePage } else { Advice::HugePage };
        let held = usage.hold(|u| &u.kv, total.checked_add(cached).ok_or_else(overflow)?)?;
        let slow = slow.map(|slow| {
            let layout = SlowLayout::new(latent.bytes + rope.bytes, desc.block_tokens, desc.n_layers)?;
            Ok::<_, PluginError>(Mutex::new(SlowTier::new(slow, layout, desc.n_blocks)?))
        });
        let pool = Self {
            block_tokens: desc.block_tokens as usize,
            n_blocks: desc.n_blocks as usize,
            latent,
            rope,
            index,
            n_layers: desc.n_layers as usize,
            n_index_layers: desc.n_index_layers as usize,
            longest_keys: (index.format == Format::Q8_0).then(|| LongestKeys::new(desc.n_index_layers, desc.n_blocks)),
            slow: slow.transpose()?,
            _held: held,
            latent_plane: Plane::new(latent_block, desc.n_blocks as usize, pages)?,
            index_plane: Plane::new(index_block, desc.n_blocks as usize, Advice::HugePage)?,
        };
        let info = SpdKvInfo {
            device_bytes: total,
            image_bytes: image as u64,
            image_latent_offset: index_block as u64,
            ..SpdKvInfo::default()
        };
        Ok((pool, info))
    }

    /// The latent and the rope row of `slot` in `layer` together, encoded; its block is not in the slow tier.
    pub(crate) fn latent_row(&self, layer: usize, slot: usize) -> &[u8] {
        let row = self.latent.bytes + self.rope.bytes;
        self.latent_plane.bytes(self.offset(self.n_layers, layer, slot, row), row)
    }

    /// The slow tier, if the pool has one, for as long as the guard lives.
    pub(crate) fn slow(&self) -> Option<MutexGuard<'_, SlowTier>> {
        // A panic leaves at most rows that are marked as in use, until the next release.
        self.slow.as_ref().map(|slow| slow.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The index row of `slot` in `layer`, encoded; of a pool without tiles of keys.
    pub(crate) fn index_row(&self, layer: usize, slot: usize) -> &[u8] {
        self.index_plane.bytes(self.index_offset(layer, slot), self.index.bytes)
    }

    /// The latent and the rope row of `slot` in `layer`, to write.
    ///
    /// # Safety
    /// No other thread uses these rows now.
    #[allow(clippy::mut_from_ref, reason = "disjoint rows are written by several threads")]
    pub(crate) unsafe fn latent_rows_mut(&self, layer: usize, slot: usize) -> (&mut [u8], &mut [u8]) {
        let row = self.latent.bytes + self.rope.bytes;
        // SAFETY: the caller's contract.
        let bytes = unsafe { self.latent_plane.bytes_mut(self.offset(self.n_layers, layer, slot, row), row) };
        bytes.split_at_mut(self.latent.bytes)
    }

    /// Where the key of `slot` lies in the index plane if keys lie row by row, or the tile that it is the first of.
    pub(crate) fn index_offset(&self, layer: usize, slot: usize) -> usize {
        self.offset(self.n_index_layers, layer, slot, self.index.bytes)
    }

    fn offset(&self, layers: usize, layer: usize, slot: usize, row: usize) -> usize {
        ((slot / self.block_tokens * layers + layer) * self.block_tokens + slot % self.block_tokens) * row
    }
}

fn small(n: u64) -> Result<usize> {
    let too_large = || PluginError::invalid(format!("{n} rows or columns"));
    usize::try_from(n).ok().filter(|&n| n <= 1 << 31).ok_or_else(too_large)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    /// Pages of the plane that are in memory.
    fn resident(plane: &Plane) -> usize {
        let (page, n) = (page_size(), plane.map.len().div_ceil(page_size()));
        let mut entries = vec![0; 8 * n];
        let first = plane.at.addr() / page;
        File::open("/proc/self/pagemap").unwrap().read_exact_at(&mut entries, 8 * first as u64).unwrap();
        entries.as_chunks().0.iter().filter(|entry| u64::from_ne_bytes(**entry) >> 63 == 1).count()
    }

    #[test]
    fn a_plane_may_be_larger_than_the_machines_memory() {
        let overcommit = std::fs::read_to_string("/proc/sys/vm/overcommit_memory").unwrap();
        if overcommit.trim() == "2" {
            return; // The kernel wants all of it to be there.
        }
        let machine = rustix::system::sysinfo();
        let bytes = (machine.totalram + machine.totalswap) as usize * machine.mem_unit as usize;
        let plane = Plane::new(1 << 20, bytes.div_ceil(1 << 19), Advice::NoHugePage).unwrap();
        // SAFETY: nobody else uses the plane.
        unsafe { plane.bytes_mut(bytes, 4) }.fill(1);
        assert_eq!(plane.bytes(bytes - 4, 8), [0, 0, 0, 0, 1, 1, 1, 1]);
    }

    #[test]
    fn memory_of_a_block_is_given_back_whole_and_its_neighbours_stay() {
        // Odd numbers of pages, which no larger page divides, and a block that ends inside of one.
        for (n_pages, more) in [(5, 0), (23, 0), (7, 100)] {
            let block_bytes = n_pages * page_size() + more;
            let plane = Plane::new(block_bytes, 4, Advice::NoHugePage).unwrap();
            for block in 0..4 {
                // SAFETY: nobody else uses the plane.
                unsafe { plane.bytes_mut(block * block_bytes, block_bytes) }.fill(block as u8 + 1);
            }
            let all = resident(&plane);
            plane.discard(1);
            plane.discard(2);
            let pages = all - resident(&plane);
            assert!(pages == 2 * n_pages || more > 0 && pages >= 2 * (n_pages - 1), "{pages} of blocks of {n_pages}");
            for (block, value) in [(0, 1), (1, 0), (2, 0), (3, 4)] {
                assert!(plane.bytes(block * block_bytes, block_bytes).iter().all(|&byte| byte == value), "{block}");
            }
        }
    }
}
