//! How does the indexer find a selection with half of the products? By the high bytes of its queries first.
//!
//! The score of a key with the high bytes alone is off by no more than a bound (`Indexer::margin`). A sample of the
//! keys says which score more than the selected ones are above; keys that stay below it by more than the bound are
//! passed over, the others are copied side by side while they are in the cache and get the score that they always had.
//! When fewer than K of them are above the sample's score, or too many had to be copied, nothing was found and all keys
//! are scored. Either way the selection is the same: it is a function of the scores.

use super::select::{Indexer, Query};
use crate::kernels::activations::{BLOCK, Rounding};
use crate::kernels::dot::dot;
use crate::kernels::packed::{KeyTiles, Sums, TILE_ROWS};
use crate::kernels::select::{Scratch, above, top_k};
use crate::keys::copy_key;
use crate::level::Level;
use crate::threads::part;
use sparsed_quant::Format;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

/// Every so-manieth tile is in the sample; odd, so that it is not in step with what repeats.
const SAMPLE_STRIDE: usize = 17;

/// What a key's copy costs, in products of one of its blocks with as many heads.
const COPY_HEADS: usize = 10;

/// Indexers of fewer heads score all keys: with 4 heads of 64 what is done for each key costs more than it saves.
const HEADS_FROM: usize = 16;

/// A token whose keys are sieved.
struct Sieve {
    t: usize,
    query: Query,
    /// Its high bytes.
    coarse: Query,
    /// A key must score more than this to be selected.
    limit: f32,
    /// With the high bytes alone it scores more than this then.
    coarse_limit: f32,
}

/// Keys of a token that may be selected, in order of position.
#[derive(Debug, Default)]
pub(super) struct Candidates {
    positions: Vec<u32>,
    scores: Vec<f32>,
    /// Keys that have no score yet.
    tile: Vec<u8>,
    masks: Vec<u16>,
}

impl Candidates {
    fn begin(&mut self, tile_bytes: usize) {
        self.positions.clear();
        self.scores.clear();
        self.tile.resize(tile_bytes, 0);
    }

    /// Takes keys of which the coarse score is above the sieve's limit, of tiles whose first key is at `position`, up
    /// to position `end`.
    fn take(&mut self, level: Level, sieve: &Sieve, keys: KeyTiles<'_>, position: usize, coarse: &[Sums], end: usize) {
        let mut masks = std::mem::take(&mut self.masks);
        above(level, coarse, sieve.coarse_limit, &mut masks);
        let tiles = keys.tiles.chunks_exact(self.tile.len());
        for ((tile, &mask), first) in tiles.zip(&masks).zip((position..).step_by(TILE_ROWS)) {
            let mut left = mask;
            while left != 0 {
                let lane = left.trailing_zeros() as usize;
                left &= left - 1;
                if first + lane < end {
                    copy_key(tile, lane, &mut self.tile, self.positions.len() % TILE_ROWS);
                    self.positions.push(u32::try_from(first + lane).expect("positions are 32 bits"));
                    if self.positions.len().is_multiple_of(TILE_ROWS) {
                        self.score(level, &sieve.query);
                    }
                }
            }
        }
        self.masks = masks;
    }

    /// Scores what has none.
    fn score(&mut self, level: Level, query: &Query) {
        let mut sums = [Sums::default()];
        query.score(level, KeyTiles { codes: BLOCK, tiles: &self.tile, ahead: &[] }, &mut sums);
        let left = self.positions.len() - self.scores.len();
        self.scores.extend_from_slice(&sums[0][..left]);
    }
}

impl Indexer<'_> {
    /// Writes the selections of neighbouring tokens. False: nothing is written, all scores are needed.
    pub(super) fn refine_run(&self, run: &Range<usize>, all: &mut [Candidates], scratch: &mut Scratch) -> bool {
        if !self.is_worth_it(run.start) {
            return false;
        }
        let (level, last) = (self.frame.device.level, run.end - 1);
        let queries: Vec<Query> = run.clone().map(|t| self.query(t)).collect();
        let mut samples = vec![Vec::new(); run.len()];
        let coarse: Vec<Query> = queries.iter().map(Query::coarse).collect();
        self.sample(run.start, 0..self.visible(run.start) / TILE_ROWS, &coarse, &mut samples);
        let (queries, longest) = (queries.into_iter().zip(coarse), self.longest_key(last));
        let sieves = run
            .clone()
            .zip(queries)
            .zip(&mut samples)
            .map(|((t, query), sample)| self.sieve(t, query, sample, longest));
        let Some(sieves) = sieves.collect::<Option<Vec<Sieve>>>() else { return false };
        if !self.collect(&sieves, 0..self.visible(last), all) {
            return false;
        }
        // All are found before one is written: who scores all keys does so for the whole run.
        let mut found = vec![0; run.len() * self.sel.n2];
        for ((sieve, candidates), found) in sieves.iter().zip(all).zip(found.chunks_exact_mut(self.sel.n2)) {
            if !select(level, sieve, &candidates.positions, &candidates.scores, scratch, found) {
                return false;
            }
        }
        for (t, found) in run.clone().zip(found.chunks_exact(self.sel.n2)) {
            // SAFETY: the rows of a run belong to one thread.
            unsafe { self.sel.row_mut(t, 0) }.copy_from_slice(found);
        }
        true
    }

    /// Writes the selection of token t, whose keys the team shares. False as above.
    pub(super) fn refine_shared(&self, t: usize, sel: &mut [i32]) -> bool {
        if !self.is_worth_it(t) {
            return false;
        }
        let (team, level, visible) = (&self.frame.device.team, self.frame.device.level, self.visible(t));
        let mut samples = [Vec::new()];
        let query = self.query(t);
        let coarse = query.coarse();
        self.sample(t, 0..visible / TILE_ROWS, std::slice::from_ref(&coarse), &mut samples);
        let longest = self.longest_key(t);
        let Some(sieve) = self.sieve(t, (query, coarse), &mut samples[0], longest) else { return false };
        let sieves = [sieve];
        let parts: Vec<Mutex<Option<Candidates>>> = (0..team.len()).map(|_| Mutex::new(None)).collect();
        team.run(&|number| {
            let tiles = part(visible.div_ceil(TILE_ROWS), number, team.len());
            let mut own = [Candidates::default()];
            if self.collect(&sieves, tiles.start * TILE_ROWS..visible.min(tiles.end * TILE_ROWS), &mut own) {
                let [own] = own;
                *parts[number].lock().unwrap_or_else(PoisonError::into_inner) = Some(own);
            }
        });
        let (mut positions, mut scores) = (Vec::new(), Vec::new());
        for part in parts {
            let Some(part) = part.into_inner().unwrap_or_else(PoisonError::into_inner) else { return false };
            positions.extend_from_slice(&part.positions);
            scores.extend_from_slice(&part.scores);
        }
        select(level, &sieves[0], &positions, &scores, &mut Scratch::default(), sel)
    }

    /// Whether token t has so many keys for each selected one that copying candidates is cheaper than half of the
    /// products.
    fn is_worth_it(&self, t: usize) -> bool {
        self.pool.index.format == Format::Q8_0
            && self.rounding == Rounding::Int16
            && self.q.n1 >= HEADS_FROM
            && self.affordable(self.visible(t)) >= 3 * self.sel.n2
    }

    /// How many of `n` keys can be copied and scored for less than half of all products.
    fn affordable(&self, n: usize) -> usize {
        n * self.q.n1 / (2 * (COPY_HEADS + self.q.n1))
    }

    /// Appends coarse scores of some of `tiles`, which all queries see, of token t's sequence.
    fn sample(&self, t: usize, tiles: Range<usize>, coarse: &[Query], samples: &mut [Vec<f32>]) {
        for tile in tiles.step_by(SAMPLE_STRIDE) {
            let keys = self.pool.key_tiles(self.layer, self.frame.slot(t, tile * TILE_ROWS), 1);
            for (query, sample) in coarse.iter().zip(&mut *samples) {
                let mut sums = [Sums::default()];
                query.score(self.frame.device.level, self.tiles(keys, &[]), &mut sums);
                sample.extend_from_slice(&sums[0]);
            }
        }
    }

    /// No key that token t sees is longer. A block of the pool counts whole, with keys behind the token.
    fn longest_key(&self, t: usize) -> f32 {
        self.pool.longest_key(self.layer, self.frame.blocks(t, self.visible(t)))
    }

    /// The limits that a sample of coarse scores gives a query, of whose keys none is longer than `longest`; `None`
    /// when the sample is too short.
    fn sieve(&self, t: usize, (query, coarse): (Query, Query), sample: &mut [f32], longest: f32) -> Option<Sieve> {
        // As many of the sample as k of all, and four standard deviations more: neighbours are alike.
        let share = self.sel.n2 * sample.len() / self.visible(t);
        let rank = share + 4 * share.isqrt() + 4;
        if rank >= sample.len() {
            return None;
        }
        let (_, &mut limit, _) = sample.select_nth_unstable_by(rank, |a, b| b.total_cmp(a));
        let coarse_limit = limit - self.margin(t, &query) * longest;
        // Too many are above it where keys are alike; of a NaN or an infinity nothing can be said.
        let open = sample.iter().filter(|&&score| score > coarse_limit).count();
        let few = open <= self.affordable(sample.len());
        (few && coarse_limit.is_finite()).then_some(Sieve { t, query, coarse, limit, coarse_limit })
    }

    /// How far a score and the coarse one are apart, for a key of length 1.
    ///
    /// With the rests r of the queries and weights w the difference is at most `sum_h |w_h r_h . key|`, which is at
    /// most `sqrt(H)` times the length of `R key`, R having rows `w_h r_h`; and R's norm squared is at most the largest
    /// sum of magnitudes in a row of `R R^T`. Both scores are also rounded, by no more than their terms' number times
    /// what f32 rounds the sum of magnitudes by.
    #[allow(clippy::cast_precision_loss, reason = "small numbers")]
    fn margin(&self, t: usize, query: &Query) -> f32 {
        let (level, heads, width) = (self.frame.device.level, self.q.n1, self.q.n2);
        let mut rest = query.rest();
        let mut size = 0.0;
        for ((head, rest), w) in rest.chunks_exact_mut(width).enumerate().zip(&query.w) {
            rest.iter_mut().for_each(|rest| *rest *= w);
            let q = self.q.row(t, head);
            size += w.abs() * dot(level, q, q).sqrt();
        }
        let mut sums = vec![0.0; heads];
        let row = |head: usize| &rest[head * width..(head + 1) * width];
        for a in 0..heads {
            for b in 0..=a {
                let product = dot(level, row(a), row(b)).abs();
                sums[a] += product;
                sums[b] += if a == b { 0.0 } else { product };
            }
        }
        let largest = sums.into_iter().fold(0.0, |a: f32, b: f32| if b > a || b.is_nan() { b } else { a });
        let terms = (heads + width + 8) as f32;
        (heads as f32 * largest).sqrt() * 1.001 + 4.0 * f32::EPSILON * terms * size
    }

    /// Candidates among `positions`, which begin with a tile. False when there are too many.
    fn collect(&self, sieves: &[Sieve], positions: Range<usize>, all: &mut [Candidates]) -> bool {
        let Some(last) = sieves.last() else { return true };
        let (level, tile_bytes) = (self.frame.device.level, self.tile_bytes());
        let most = TILE_ROWS + self.affordable(positions.len());
        all.iter_mut().for_each(|candidates| candidates.begin(tile_bytes));
        let (mut coarse, mut few) = (Vec::new(), true);
        self.walk(last.t, positions, |position, keys| {
            if !few {
                return;
            }
            coarse.resize(keys.tiles.len() / tile_bytes, Sums::default());
            for (number, (sieve, candidates)) in sieves.iter().zip(&mut *all).enumerate() {
                let keys = KeyTiles { ahead: if number == 0 { keys.ahead } else { &[] }, ..keys };
                sieve.coarse.score(level, keys, &mut coarse);
                candidates.take(level, sieve, keys, position, &coarse, self.visible(sieve.t));
                few &= candidates.positions.len() <= most;
            }
        });
        for (sieve, candidates) in sieves.iter().zip(all) {
            if candidates.scores.len() < candidates.positions.len() {
                candidates.score(level, &sieve.query);
            }
        }
        few
    }
}

/// Writes the best candidates, if all of them are above what was passed over.
fn select(
    level: Level,
    sieve: &Sieve,
    positions: &[u32],
    scores: &[f32],
    scratch: &mut Scratch,
    sel: &mut [i32],
) -> bool {
    if scores.len() < sel.len() {
        return false;
    }
    top_k(level, scores, scratch, sel);
    if !sel.iter().all(|&i| scores[i.unsigned_abs() as usize] > sieve.limit) {
        return false;
    }
    sel.iter_mut().for_each(|i| *i = positions[i.unsigned_abs() as usize].cast_signed());
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::CpuDevice;
    use crate::execute::Frame;
    use crate::memory::Pool;
    use crate::plan::Plan;
    use crate::tensor::Tensor;
    use sparsed_abi::{
        DIM_TOKENS, DT_F16, DT_F32, DT_I32, DT_Q8_0, KV_DISCARD, OP_IDX_TOPK, OpSpec, Program, ProgramBuilder,
        SpdBucket, SpdKvDesc, SpdKvOp, SpdRow, StepArrays,
    };
    use sparsed_plugin_kit::Device;
    use std::marker::PhantomData;
    use std::sync::Arc;

    const HEADS: usize = 16;
    const WIDTH: usize = 64;
    const K: usize = 40;
    const TOKENS: usize = 5;
    const CONTEXT: usize = 3001;
    const BLOCK_TOKENS: usize = 64;
    const BLOCKS: usize = CONTEXT.div_ceil(BLOCK_TOKENS);

    struct Bed {
        device: CpuDevice,
        pool: Arc<Pool>,
        plan: Plan,
    }

    impl Bed {
        /// Encoded keys that `key` makes of their position, in a pool whose blocks are in reverse order. The last block
        /// is another sequence's.
        fn new(level: Level, key: impl Fn(usize) -> Vec<u8>) -> Self {
            let device = CpuDevice::with_threads(level, 3);
            let row = |dtype, width| SpdRow { dtype, width };
            let desc = SpdKvDesc {
                block_tokens: BLOCK_TOKENS as u32,
                n_blocks: BLOCKS as u32 + 1,
                n_layers: 1,
                n_index_layers: 1,
                latent: row(DT_F16, 32),
                rope: row(DT_F16, 32),
                index: row(DT_Q8_0, WIDTH as u32),
                ..SpdKvDesc::default()
            };
            let pool = Arc::new(device.kv_create(&desc, None).unwrap().0);
            let mut builder = ProgramBuilder::new();
            let q = builder.input(DT_F32, &[DIM_TOKENS, HEADS as i32, WIDTH as i32]);
            let w = builder.input(DT_F32, &[DIM_TOKENS, HEADS as i32]);
            let sel = builder.activation(DT_I32, &[DIM_TOKENS, K as i32]);
            let (inputs, outputs) = (&[Some(q), Some(w)], &[Some(sel)]);
            let i = [K as i32, 0, 0, 0, 0, 0];
            builder.op(OpSpec { kind: OP_IDX_TOPK, inputs, outputs, layer: 0, i, f: [0.3, 0.0, 0.0, 0.0] });
            builder.mark_output(sel);
            let program = Program::parse(builder.finish(1).as_bytes()).unwrap();
            let bucket = SpdBucket { max_tokens: 8, max_seqs: 1, max_context: 4096, ..SpdBucket::default() };
            let (plan, _) = device.compile(program, Vec::new(), vec![Arc::clone(&pool)], bucket).unwrap();
            let bed = Self { device, pool, plan };
            (0..CONTEXT).for_each(|position| bed.put(Self::slot(position), &key(position)));
            bed
        }

        fn put(&self, slot: usize, key: &[u8]) {
            // SAFETY: this thread alone has the pool.
            unsafe { self.pool.put_key(0, slot, key) };
        }

        fn slot(position: usize) -> usize {
            (BLOCKS - 1 - position / BLOCK_TOKENS) * BLOCK_TOKENS + position % BLOCK_TOKENS
        }

        /// The selections of the last tokens: by all scores, of the run by candidates, of each token by those that a
        /// team finds. `None` where candidates were too many.
        fn selections(&self, seed: u64) -> (Vec<i32>, [Option<Vec<i32>>; 2]) {
            let mut random = fastrand::Rng::with_seed(seed);
            let mut values = |n: usize| (0..n).map(|_| random.f32() - 0.4).collect::<Vec<f32>>();
            let (q, w) = (values(TOKENS * HEADS * WIDTH), values(TOKENS * HEADS));
            let positions: Vec<u32> = (CONTEXT - TOKENS..CONTEXT).map(|position| position as u32).collect();
            let block_ids: Vec<u32> = (0..BLOCKS as u32).rev().collect();
            let step = StepArrays {
                positions: &positions,
                contexts: &[CONTEXT as u32],
                block_offsets: &[0, BLOCKS as u32],
                block_ids: &block_ids,
                ..StepArrays::default()
            };
            let (device, plan) = (&self.device, &self.plan);
            let frame = Frame { device, plan, step, seq_of: vec![0; TOKENS], base: Vec::new() };
            let run = |job: &dyn Fn(&Indexer<'_>) -> bool| {
                let (mut q, mut w, mut sel) = (q.clone(), w.clone(), vec![0; TOKENS * K]);
                let done = job(&Indexer {
                    frame: &frame,
                    pool: &self.pool,
                    layer: 0,
                    q: tensor(&mut q, HEADS, WIDTH),
                    w: tensor(&mut w, 1, HEADS),
                    sel: tensor(&mut sel, 1, K),
                    scale: 0.3,
                    rounding: Rounding::Int16,
                });
                done.then_some(sel)
            };
            let all = run(&|job| {
                for t in 0..TOKENS {
                    let mut scores = vec![0.0; job.visible(t)];
                    job.score(t..t + 1, 0, &mut [&mut scores[..]]);
                    // SAFETY: one thread writes.
                    top_k(self.device.level, &scores, &mut Scratch::default(), unsafe { job.sel.row_mut(t, 0) });
                }
                true
            });
            let together = run(&|job| {
                let mut room: [Candidates; TOKENS] = Default::default();
                job.refine_run(&(0..TOKENS), &mut room, &mut Scratch::default())
            });
            // SAFETY: one thread writes.
            let alone = run(&|job| (0..TOKENS).all(|t| job.refine_shared(t, unsafe { job.sel.row_mut(t, 0) })));
            (all.unwrap(), [together, alone])
        }
    }

    fn tensor<T: 'static>(values: &mut [T], n1: usize, n2: usize) -> Tensor<'static, T> {
        assert_eq!(values.len(), TOKENS * n1 * n2);
        Tensor { at: values.as_mut_ptr(), n0: TOKENS, n1, n2, s0: n1 * n2, s1: n2, life: PhantomData }
    }

    fn encoded(key: &[f32]) -> Vec<u8> {
        let mut encoded = vec![0; Format::Q8_0.row_bytes(WIDTH).unwrap()];
        sparsed_quant::encode(Format::Q8_0, key, &mut encoded).unwrap();
        encoded
    }

    /// A key whose scales are NaN.
    fn no_number() -> Vec<u8> {
        [0, 0xfe].repeat(WIDTH * 34 / 64)
    }

    fn random_key(position: usize) -> Vec<u8> {
        let mut random = fastrand::Rng::with_seed(position as u64);
        encoded(&(0..WIDTH).map(|_| random.f32() - 0.5).collect::<Vec<f32>>())
    }

    #[test]
    fn candidates_give_the_selection_that_all_scores_give() {
        for level in Level::all() {
            // Every key once, and thousands of ties.
            for repeats in [CONTEXT, 300] {
                let bed = Bed::new(level, |position| random_key(position % repeats));
                for seed in 0..3 {
                    let (all, refined) = bed.selections(seed);
                    for refined in refined {
                        assert!(refined.expect("few candidates") == all, "{level:?}, {repeats} keys, seed {seed}");
                    }
                }
            }
        }
    }

    #[test]
    fn keys_that_are_alike_or_no_numbers_are_left_to_all_scores() {
        let alike = |position: usize| {
            let mut key = vec![1.0; WIDTH];
            key[position % WIDTH] += 1e-3;
            encoded(&key)
        };
        let no_number = |position: usize| if position == 77 { no_number() } else { random_key(position) };
        for bed in [Bed::new(Level::detect(), alike), Bed::new(Level::detect(), no_number)] {
            assert_eq!(bed.selections(1).1, [None, None]);
        }
    }

    #[test]
    fn a_long_key_of_another_sequence_hinders_nobody() {
        let bed = Bed::new(Level::detect(), random_key);
        let before = bed.selections(1);
        assert!(before.1.iter().all(Option::is_some));
        for key in [encoded(&[1e3; WIDTH]), no_number()] {
            bed.put(BLOCKS * BLOCK_TOKENS + 3, &key);
            assert!(bed.selections(1) == before);
            bed.put(Bed::slot(77), &key);
            assert_eq!(bed.selections(1).1, [None, None], "its own does");
            bed.put(Bed::slot(77), &random_key(77));
        }
    }

    #[test]
    fn a_long_key_is_forgotten_when_another_takes_its_place_or_its_block_is_discarded() {
        let bed = Bed::new(Level::detect(), random_key);
        let before = bed.selections(1);
        for key in [encoded(&[1e3; WIDTH]), no_number()] {
            bed.put(Bed::slot(77), &key);
            assert_eq!(bed.selections(1).1, [None, None]);
            bed.put(Bed::slot(77), &random_key(77));
            assert!(bed.selections(1) == before);
            bed.put(Bed::slot(77), &key);
            let block = Bed::slot(77) / BLOCK_TOKENS;
            let discard = SpdKvOp { kind: KV_DISCARD, dst_block: block as u32, ..SpdKvOp::default() };
            bed.pool.apply(&[discard], &mut []).unwrap();
            let positions = (0..CONTEXT).filter(|&position| Bed::slot(position) / BLOCK_TOKENS == block);
            positions.for_each(|position| bed.put(Bed::slot(position), &random_key(position)));
            assert!(bed.selections(1) == before);
        }
    }
}
