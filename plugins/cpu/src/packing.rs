//! Where do packed weights live? In one anonymous mapping per compiled plan, beside the weights as they were uploaded.
//!
//! All of a file is read for it, from whatever disk it is on. Steps of other plans have half of the time meanwhile, in
//! turns: packing takes twice as long beside them, however long they are and however small the weights.

use crate::kernels::packed::{TILE_ROWS, can_pack, pack_tile, tile_bytes};
use crate::memory::Weight;
use crate::tensor::Tensor;
use crate::threads::{Team, part};
use crate::turns::Shift;
use memmap2::{Advice, MmapMut};
use sparsed_abi::E_NOMEM_DEVICE;
use sparsed_plugin_kit::{Held, PluginError, Result, Usage};
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Packed bytes between two looks at the time: a millisecond or two where the file is in memory, half a second where it
/// comes from a disk that gives 4 MiB/s. A step waits for one piece at most and as long as packing has waited itself.
const PIECE_BYTES: usize = 2 << 20;

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
    let began = Instant::now();
    pack_by(&|| began.elapsed(), weights, team, usage)
}

fn pack_by(clock: &dyn Fn() -> Duration, weights: &[&Weight], team: &Team, usage: &Arc<Usage>) -> Result<()> {
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
    let mut shift = Shift::new(&team.turns, clock);
    for (weight, range) in &ranges {
        fill(weight, &mut map[range.clone()], team, &mut shift);
    }
    drop(shift);
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

fn fill(weight: &Weight, to: &mut [u8], team: &Team, shift: &mut Shift<'_>) {
    let (n2, tiles) = (tile_bytes(weight.format, weight.cols), weight.rows.div_ceil(TILE_ROWS));
    let n0 = tiles * weight.batch;
    assert!(to.len() >= n0 * n2, "room for every tile");
    let to = Tensor { at: to.as_mut_ptr(), n0, n1: 1, n2, s0: n2, s1: 0, life: PhantomData::<&u8> };
    let piece = (PIECE_BYTES / n2).max(1);
    for done in (0..n0).step_by(piece) {
        let n = piece.min(n0 - done);
        shift.next_piece();
        team.run(&|number| {
            for unit in part(n, number, team.len()).map(|unit| done + unit) {
                let (batch, first) = (unit / tiles, unit % tiles * TILE_ROWS);
                let row = |lane: usize| (first + lane < weight.rows).then(|| weight.row(batch, first + lane));
                // SAFETY: each tile belongs to one thread.
                pack_tile(weight.format, weight.cols, row, unsafe { to.row_mut(unit, 0) });
            }
        });
    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use fastrand::Rng;
    use sparsed_abi::{DT_Q8_0, SpdWeightDesc};
    use std::sync::atomic::{AtomicU64, Ordering};

    #[test]
    fn a_large_weight_is_packed_in_pieces_and_whoever_waits_has_a_turn_between_them() {
        let (team, usage) = (Team::new(2, &[]).expect("threads"), Arc::new(Usage::default()));
        let (rows, cols, mut random) = (4096 - 3, 4096 + 32, Rng::with_seed(1));
        let desc = SpdWeightDesc { dtype: DT_Q8_0, batch: 1, rows, cols, ..SpdWeightDesc::default() };
        let block = |_| [&[0, 0x20][..], &std::array::from_fn::<u8, 32, _>(|_| random.u8(..))].concat();
        let weight = Weight::uploaded(&desc, (0..rows * cols / 32).flat_map(block).collect(), &usage);
        pack(&[&weight], &team, &usage).expect("memory");
        let packed = weight.packed.get().expect("a format that is packed");
        let n_pieces = packed.tiles.div_ceil(PIECE_BYTES / packed.tile_bytes);
        assert_eq!((team.turns.n_taken(), n_pieces), (9, 9));
        let mut expected = vec![0; packed.tile_bytes];
        for tile in 0..packed.tiles {
            let first = tile * TILE_ROWS;
            let row = |lane: usize| (first + lane < weight.rows).then(|| weight.row(0, first + lane));
            pack_tile(weight.format, weight.cols, row, &mut expected);
            assert!(packed.tile(0, tile) == expected, "tile {tile}");
        }
    }

    #[test]
    fn small_weights_do_not_wait_for_a_step_each_but_are_packed_as_long_as_the_first_one_has_waited() {
        let (team, usage) = (Team::new(2, &[]).expect("threads"), Arc::new(Usage::default()));
        let desc = SpdWeightDesc { dtype: DT_Q8_0, batch: 1, rows: 16, cols: 32, ..SpdWeightDesc::default() };
        let weights: Vec<_> = (0..50).map(|_| Weight::uploaded(&desc, vec![0; 16 * 34], &usage)).collect();
        // Each look at the time is a millisecond later.
        let ms = AtomicU64::new(0);
        let clock = || Duration::from_millis(ms.fetch_add(1, Ordering::Relaxed));
        std::thread::scope(|scope| {
            let step = team.turns.take();
            let weights: Vec<_> = weights.iter().collect();
            let (clock, team, usage) = (&clock, &team, &usage);
            let packs = scope.spawn(move || pack_by(clock, &weights, team, usage).is_ok());
            while team.turns.n_taken() < 2 {
                std::thread::yield_now();
            }
            ms.fetch_add(100, Ordering::Relaxed);
            drop(step);
            assert!(packs.join().expect("no panic"));
        });
        assert_eq!(team.turns.n_taken(), 2, "the step's and one for all weights");
        assert!(weights.iter().all(|weight| weight.packed.get().is_some()));
    }
}
