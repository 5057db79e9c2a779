//! Where do packed weights live? In one anonymous mapping per compiled plan, beside the weights as they were uploaded.

use crate::kernels::packed::{TILE_ROWS, can_pack, pack_tile, tile_bytes};
use crate::memory::Weight;
use crate::tensor::Tensor;
use crate::threads::{Team, part};
use memmap2::{Advice, MmapMut};
use sparsed_abi::E_NOMEM_DEVICE;
use sparsed_plugin_kit::{Held, PluginError, Result, Usage};
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::Arc;

/// A weight's matrices as tiles of 16 rows; see `kernels::packed`.
#[derive(Debug)]
pub(crate) struct Packed {
    slab: Arc<Slab>,
    /// Of the first tile in the slab.
    start: usize,
    tile_bytes: usize,
    /// Tiles of one matrix.
    pub(crate) tiles: usize,
}

/// Packed weights side by side: in huge pages where the system gives them, which a scan through all weights notices.
#[derive(Debug)]
struct Slab {
    map: MmapMut,
    _held: Held,
}

/// Packs those of `weights` that are not packed yet and whose format can be.
pub(crate) fn pack(weights: &[&Weight], team: &Team, usage: &Arc<Usage>) -> Result<()> {
    let mut ranges: Vec<(&Weight, Range<usize>)> = Vec::new();
    let mut end = 0usize;
    for &weight in weights {
        let known = weight.packed.get().is_some() || ranges.iter().any(|(other, _)| std::ptr::eq(*other, weight));
        if known || !can_pack(weight.format, weight.cols) {
            continue;
        }
        let tiles = weight.rows.div_ceil(TILE_ROWS).checked_mul(weight.batch);
        let bytes = tiles.and_then(|tiles| tiles.checked_mul(tile_bytes(weight.format, weight.cols)));
        let next = bytes.and_then(|bytes| bytes.checked_add(end));
        let next = next.ok_or_else(|| PluginError::invalid("the size of packed weights overflows"))?;
        ranges.push((weight, end..next));
        end = next;
    }
    if ranges.is_empty() {
        return Ok(());
    }
    let held = usage.hold(|u| &u.weights, end as u64)?;
    let no_memory = |error: std::io::Error| PluginError::new(E_NOMEM_DEVICE, format!("{end} bytes: {error}"));
    let mut map = MmapMut::map_anon(end).map_err(no_memory)?;
    // A refusal costs speed only.
    let _refused = map.advise(Advice::HugePage);
    for (weight, range) in &ranges {
        fill(weight, &mut map[range.clone()], team);
    }
    let slab = Arc::new(Slab { map, _held: held });
    for (weight, range) in ranges {
        let packed = Packed {
            slab: Arc::clone(&slab),
            start: range.start,
            tile_bytes: tile_bytes(weight.format, weight.cols),
            tiles: weight.rows.div_ceil(TILE_ROWS),
        };
        // Two plans that are compiled at once may both pack; one of the two stays.
        let _other = weight.packed.set(packed);
    }
    Ok(())
}

fn fill(weight: &Weight, to: &mut [u8], team: &Team) {
    let (n2, tiles) = (tile_bytes(weight.format, weight.cols), weight.rows.div_ceil(TILE_ROWS));
    let n0 = tiles * weight.batch;
    assert!(to.len() >= n0 * n2, "room for every tile");
    let to = Tensor { at: to.as_mut_ptr(), n0, n1: 1, n2, s0: n2, s1: 0, life: PhantomData::<&u8> };
    team.run(&|number| {
        for unit in part(n0, number, team.len()) {
            let (batch, first) = (unit / tiles, unit % tiles * TILE_ROWS);
            let row = |lane: usize| (first + lane < weight.rows).then(|| weight.row(batch, first + lane));
            // SAFETY: each tile belongs to one thread.
            pack_tile(weight.format, weight.cols, row, unsafe { to.row_mut(unit, 0) });
        }
    });
}

impl Packed {
    /// Tile `tile` of matrix `batch`.
    pub(crate) fn tile(&self, batch: usize, tile: usize) -> &[u8] {
        let at = self.start + (batch * self.tiles + tile) * self.tile_bytes;
        &self.slab.map[at..at + self.tile_bytes]
    }

    /// Tiles that fit half of a core's second-level cache.
    pub(crate) fn tiles_in_cache(&self) -> usize {
        const HALF_CACHE_BYTES: usize = 512 << 10;
        (HALF_CACHE_BYTES / self.tile_bytes).max(1)
    }
}
