//! Activations rounded for products, laid out as tokens go through a weight's tiles.
//!
//! As many rows as go through a tile together (`tokens_at_once`) lie together, block by block: all their first blocks,
//! then all second ones. So a product over all rows in order, which most are, reads them where they were written; what
//! takes other rows (heads, experts) gathers them.

use super::Frame;
use super::matmul::Pair;
use super::room::make_room;
use crate::kernels::activations::{BLOCK, Block, Rounding, round_row};
use crate::kernels::packed::{TOKENS_MAX, groups_at_once, tokens_at_once};
use crate::level::Level;
use crate::tensor::Tensor;
use std::marker::PhantomData;
use std::ops::Range;

/// Rounded activations, kept for the next operator that reads the same tensor.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    blocks: Vec<Block>,
    /// The tensor and the rounding of what `blocks` holds.
    holds: Option<(u32, Rounding)>,
}

/// Bytes of `n` rows of `width` values.
pub(crate) fn rounded_bytes(n: usize, width: usize) -> usize {
    n.saturating_mul(width / BLOCK).saturating_mul(size_of::<Block>())
}

/// Bytes at most that a thread has while it multiplies: rows of `width` values that it has put beside each other, or a
/// decoded row of the weight.
pub(crate) fn product_bytes(width: usize) -> usize {
    rounded_bytes(TOKENS_MAX, width).max(width.saturating_mul(size_of::<f32>()))
}

impl Scratch {
    /// Forgets what a tensor's values were.
    pub(super) fn forget(&mut self) {
        self.holds = None;
    }

    /// The tensor whose values it holds.
    pub(super) fn held(&self) -> Option<u32> {
        self.holds.map(|(tensor, _)| tensor)
    }
}

/// The rounded rows of a tensor.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rounded<'a> {
    level: Level,
    rounding: Rounding,
    n_rows: usize,
    /// Blocks of a row.
    n_blocks: usize,
    blocks: &'a [Block],
}

impl Frame<'_> {
    /// All rows of `x`, rounded; kept from the operator before if it read the same tensor, which `id` is.
    pub(super) fn round<'s>(
        &self,
        x: Tensor<'_, f32>,
        id: u32,
        rounding: Rounding,
        scratch: &'s mut Scratch,
    ) -> Rounded<'s> {
        let (level, n_rows, n_blocks) = (self.device.level, x.rows(), x.n2 / BLOCK);
        let n = n_rows * n_blocks;
        if scratch.holds != Some((id, rounding)) {
            if scratch.blocks.len() < n {
                make_room(&mut scratch.blocks, n);
                scratch.blocks.resize(n, Block::default());
            }
            let to = Tensor { at: scratch.blocks.as_mut_ptr(), n0: 1, n1: 1, n2: n, s0: n, s1: n, life: PhantomData };
            let most = tokens_at_once(level, rounding, usize::MAX);
            self.each(n_rows.div_ceil(most), most * x.n2, |run| {
                let rows = run * most..n_rows.min((run + 1) * most);
                for together in groups_at_once(level, rounding, rows) {
                    // SAFETY: each run of rows belongs to one thread; `blocks` has room for all.
                    let to = unsafe { to.part_mut(together.start * n_blocks..together.end * n_blocks) };
                    for (i, row) in together.clone().enumerate() {
                        round_row(level, rounding, x.flat(row), &mut to[i..], together.len());
                    }
                }
            });
            scratch.holds = Some((id, rounding));
        }
        Rounded { level, rounding, n_rows, n_blocks, blocks: &scratch.blocks[..n] }
    }
}

impl<'a> Rounded<'a> {
    pub(super) fn rounding(&self) -> Rounding {
        self.rounding
    }

    /// The rows that lie together with `row`.
    fn together(&self, row: usize) -> Range<usize> {
        let first = row - row % tokens_at_once(self.level, self.rounding, usize::MAX);
        let mut groups = groups_at_once(self.level, self.rounding, first..self.n_rows);
        groups.find(|group| group.contains(&row)).expect("a row of the tensor")
    }

    /// The rows of these pairs block by block, as `packed::product` wants them: where they lie, or put `beside`.
    pub(super) fn interleaved<'s>(&self, pairs: &[Pair], beside: &'s mut Vec<Block>) -> &'s [Block]
    where
        'a: 's,
    {
        let n = pairs.len();
        let together = self.together(pairs[0].0);
        if together.len() == n && pairs.iter().map(|&(from, _)| from).eq(together.clone()) {
            return &self.blocks[together.start * self.n_blocks..together.end * self.n_blocks];
        }
        beside.resize(n * self.n_blocks, Block::default());
        for (i, &(from, _)) in pairs.iter().enumerate() {
            let together = self.together(from);
            let own = &self.blocks[together.start * self.n_blocks + from - together.start..];
            let own = own.iter().step_by(together.len());
            own.zip(beside[i..].iter_mut().step_by(n)).for_each(|(from, to)| *to = *from);
        }
        beside
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rows whose blocks say whose they are and which, in `d` and `sum`.
    fn laid_out(level: Level, n_rows: usize, n_blocks: usize) -> Vec<Block> {
        let mut blocks = Vec::new();
        for group in groups_at_once(level, Rounding::Int8, 0..n_rows) {
            for b in 0..n_blocks {
                blocks.extend(group.clone().map(|row| Block { d: row as f32, sum: b as f32, ..Block::default() }));
            }
        }
        blocks
    }

    #[test]
    fn rows_of_any_pairs_come_block_by_block_and_in_order_they_are_not_copied() {
        const N_BLOCKS: usize = 3;
        for (level, n_rows) in Level::all().flat_map(|level| [1, 2, 7, 8, 15, 23].map(|n| (level, n))) {
            let blocks = laid_out(level, n_rows, N_BLOCKS);
            let x = Rounded { level, rounding: Rounding::Int8, n_rows, n_blocks: N_BLOCKS, blocks: &blocks };
            let mut beside = Vec::new();
            let mut check = |rows: Vec<usize>, is_copied: bool| {
                let pairs: Vec<Pair> = rows.iter().map(|&row| (row, 0)).collect();
                let found: Vec<_> = x.interleaved(&pairs, &mut beside).iter().map(|b| (b.d, b.sum)).collect();
                let all = (0..N_BLOCKS).flat_map(|b| rows.iter().map(move |&row| (row as f32, b as f32)));
                assert_eq!(found, all.collect::<Vec<_>>());
                assert!(is_copied || beside.is_empty());
            };
            groups_at_once(level, Rounding::Int8, 0..n_rows).for_each(|group| check(group.collect(), false));
            check(vec![n_rows - 1], true);
            check((0..n_rows).rev().collect(), true);
        }
    }
}
