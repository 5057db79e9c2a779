//! Attention over blocks of which some lie in the slow tier: which tokens' rows are in memory together?
//!
//! Tokens are taken in portions whose slow rows fit into the row cache; their rows are fetched, then computed with as
//! rows of the pool are. A token's bits do not depend on the portion it is in.

use super::attention::Attention;
use sparsed_plugin_kit::Result;
use sparsed_plugin_kit::slow::SlowTier;
use sparsed_plugin_kit::slow::rowcache::{RowCache, RowKey};
use std::ops::Range;

impl Attention<'_> {
    /// Computes its tokens, some of whose rows may be slow.
    ///
    /// # Errors
    /// `SPD_E_DATA` for a page that is not what was written, `SPD_E_NOMEM_DEVICE` when one token lists more slow rows
    /// than the row cache holds.
    pub(super) fn compute_slow(&self, slow: &mut SlowTier) -> Result<()> {
        if !self.frame.step.block_ids.iter().any(|&block| slow.cache().is_attached(block)) {
            self.compute();
            return Ok(());
        }
        let mut keys = Vec::new();
        let mut next = self.tokens.start;
        while next < self.tokens.end {
            slow.cache_mut().release();
            let tokens = self.portion(next, slow.cache(), &mut keys);
            slow.fetch(&keys)?;
            next = tokens.end;
            Attention { slow: Some(slow.cache()), tokens, ..*self }.compute();
        }
        Ok(())
    }

    /// The most tokens from `first` on, but at least one, whose slow rows fit into the cache; and those rows.
    fn portion(&self, first: usize, cache: &RowCache, keys: &mut Vec<RowKey>) -> Range<usize> {
        keys.clear();
        for t in first..self.tokens.end {
            let before = keys.len();
            // Without a selection a token lists what the one before it in its sequence lists, and more.
            let known = t > first && self.sel.is_none() && self.frame.seq_of[t - 1] == self.frame.seq_of[t];
            let rows = if known { self.listed(t - 1).min(self.listed(t)) } else { 0 }..self.listed(t);
            let slots = rows.map(|i| self.key(self.frame.slot(t, self.position(t, i))));
            keys.extend(slots.filter(|key| cache.is_attached(key.block)));
            if keys.len() > cache.n_slots() && t > first {
                keys.truncate(before);
                return first..t;
            }
        }
        first..self.tokens.end
    }

    /// How the row cache names the row of `slot`.
    pub(super) fn key(&self, slot: usize) -> RowKey {
        let number = |n: usize| u32::try_from(n).expect("the pool's sizes are 32-bit numbers");
        let tokens = self.pool.block_tokens;
        RowKey { block: number(slot / tokens), layer: number(self.layer), token: number(slot % tokens) }
    }
}

#[cfg(test)]
mod tests {
    use crate::device::CpuDevice;
    use crate::level::Level;
    use crate::memory::Pool;
    use crate::plan::{Plan, arena};
    use fastrand::Rng;
    use sparsed_abi::{
        Blob, DIM_TOKENS, DT_F8_128, DT_F16, DT_F32, DT_I32, DT_Q6_0, DT_Q8_0, DT_W16, E_DATA, E_INVALID,
        E_NOMEM_DEVICE, KV_COPY, KV_DISCARD, KV_EXPORT, KV_IMPORT, KV_TO_FAST, KV_TO_SLOW, OP_DENSE_MLA, OP_IDX_APPEND,
        OP_IDX_TOPK, OP_KV_APPEND, OP_SPARSE_MLA, OpSpec, Program, ProgramBuilder, SpdBucket, SpdKvDesc, SpdKvOp,
        SpdRow, StepArrays, T_INPUT, T_OUTPUT, TensorId,
    };
    use sparsed_plugin_kit::slow::rowcache::{Cipher, SLOT_OVERHEAD_BYTES, Seal, SlowKey, SlowLayout};
    use sparsed_plugin_kit::{Device, PluginError, Result, Run, SlowArea, SlowPlace, Synchronous};
    use sparsed_quant::Format;
    use std::fs::File;
    use std::ops::Range;
    use std::os::unix::fs::FileExt;
    use std::sync::Arc;

    const BLOCK_TOKENS: usize = 16;
    const N_BLOCKS: u32 = 24;
    const N_LAYERS: u32 = 2;
    const TOP_K: usize = 24;
    /// The blocks of two sequences, in order.
    const TABLES: [[u32; 10]; 2] = [[3, 1, 19, 2, 8, 5, 20, 7, 0, 9], [4, 6, 10, 12, 11, 13, 14, 15, 16, 17]];
    /// What the slow file has before its area.
    const AREA_OFFSET: u64 = 2 * 4096;

    #[derive(Clone, Copy, Debug)]
    struct Shape {
        /// Of latent and rope rows.
        dtypes: [u32; 2],
        groups: u32,
        /// Of a group: from eight on rows become words.
        heads: u32,
        dense: bool,
    }

    /// A device, a pool and a plan of attention in two layers.
    struct Bed {
        device: CpuDevice,
        pool: Arc<Pool>,
        plan: Plan,
        layout: SlowLayout,
        image_bytes: usize,
        latent_at: usize,
        file: File,
    }

    fn program(shape: Shape) -> Program {
        let mut builder = ProgramBuilder::new();
        let groups = shape.groups.cast_signed();
        let heads = (shape.groups * shape.heads).cast_signed();
        let mut input = |dims: &[i32]| builder.input(DT_F32, &[&[DIM_TOKENS], dims].concat());
        let (latent, rope, key) = (input(&[32 * groups]), input(&[32 * groups]), input(&[32]));
        let (q, w, q_latent, q_rope) = (input(&[2, 32]), input(&[2]), input(&[heads, 32]), input(&[heads, 32]));
        let groups = [groups, 0, 0, 0, 0, 0];
        for layer in 0..N_LAYERS {
            let op =
                |builder: &mut ProgramBuilder, kind, inputs: &[Option<TensorId>], outputs: &[Option<TensorId>], i| {
                    builder.op(OpSpec { kind, inputs, outputs, layer, i, f: [0.3, 0.0, 0.0, 0.0] });
                };
            op(&mut builder, OP_KV_APPEND, &[Some(latent), Some(rope)], &[], [0; 6]);
            op(&mut builder, OP_IDX_APPEND, &[Some(key)], &[], [0; 6]);
            let sel = builder.activation(DT_I32, &[DIM_TOKENS, TOP_K as i32]);
            op(&mut builder, OP_IDX_TOPK, &[Some(q), Some(w)], &[Some(sel)], [TOP_K as i32, 0, 0, 0, 0, 0]);
            let out = builder.activation(DT_F32, &[DIM_TOKENS, heads, 32]);
            op(&mut builder, OP_SPARSE_MLA, &[Some(q_latent), Some(q_rope), Some(sel)], &[Some(out)], groups);
            builder.mark_output(out);
            if shape.dense {
                let out = builder.activation(DT_F32, &[DIM_TOKENS, heads, 32]);
                op(&mut builder, OP_DENSE_MLA, &[Some(q_latent), Some(q_rope)], &[Some(out)], groups);
                builder.mark_output(out);
            }
        }
        Program::parse(builder.finish(1).as_bytes()).unwrap()
    }

    fn key() -> SlowKey {
        SlowKey::new(Cipher::ChaCha20Poly1305, [6; 32])
    }

    impl Bed {
        /// With a slow tier of `cached` rows, or none.
        fn new(shape: Shape, cached: Option<usize>) -> Self {
            let device = CpuDevice::with_threads(Level::detect(), 3);
            let width = 32 * shape.groups;
            let row = |dtype| SpdRow { dtype, width };
            let desc = SpdKvDesc {
                block_tokens: BLOCK_TOKENS as u32,
                n_blocks: N_BLOCKS,
                n_layers: N_LAYERS,
                n_index_layers: N_LAYERS,
                latent: row(shape.dtypes[0]),
                rope: row(shape.dtypes[1]),
                index: SpdRow { dtype: DT_F16, width: 32 },
                ..SpdKvDesc::default()
            };
            let bytes = |dtype| Format::from_dtype(dtype).unwrap().row_bytes(width as usize).unwrap();
            let row_bytes: usize = shape.dtypes.map(bytes).iter().sum();
            let layout = SlowLayout::new(row_bytes, desc.block_tokens, N_LAYERS).unwrap();
            let file = tempfile::tempfile().unwrap();
            file.set_len(AREA_OFFSET + u64::from(N_BLOCKS) * layout.block_bytes() as u64).unwrap();
            let slow = cached.map(|rows| SlowArea {
                place: SlowPlace::File(file.try_clone().unwrap()),
                offset: AREA_OFFSET,
                length: u64::from(N_BLOCKS) * layout.block_bytes() as u64,
                cache_bytes: (rows * (row_bytes + SLOT_OVERHEAD_BYTES)) as u64,
                key: Some(key()),
            });
            let (pool, info) = device.kv_create(&desc, slow).unwrap();
            let pool = Arc::new(pool);
            let bucket = SpdBucket { max_tokens: 256, max_seqs: 2, max_context: 160, ..SpdBucket::default() };
            let (plan, _) = device.compile(program(shape), Vec::new(), vec![Arc::clone(&pool)], bucket).unwrap();
            let (image_bytes, latent_at) = (info.image_bytes as usize, info.image_latent_offset as usize);
            Self { device, pool, plan, layout, image_bytes, latent_at, file }
        }

        /// Runs positions `ranges[i]` of sequence i, whose inputs depend on sequence and position only; the outputs.
        fn step(&self, ranges: [Range<u32>; 2]) -> Result<Vec<u8>> {
            let at = (0u32..).zip(&ranges).flat_map(|(seq, range)| range.clone().map(move |p| (seq, p)));
            let at: Vec<(u32, u32)> = at.collect();
            let slot = |&(seq, p): &(u32, u32)| {
                let block = TABLES[seq as usize][p as usize / BLOCK_TOKENS];
                u64::from(block) * BLOCK_TOKENS as u64 + u64::from(p) % BLOCK_TOKENS as u64
            };
            let (slots, positions): (Vec<u64>, Vec<u32>) = at.iter().map(|at| (slot(at), at.1)).unzip();
            let ends = ranges.iter().scan(0, |end, range| {
                *end += range.len() as u32;
                Some(*end)
            });
            let step = StepArrays {
                tokens: &vec![0; at.len()],
                positions: &positions,
                slots: &slots,
                seq_offsets: &std::iter::once(0).chain(ends).collect::<Vec<_>>(),
                contexts: &ranges.clone().map(|range| range.end),
                block_offsets: &[0, 10, 20],
                block_ids: TABLES.as_flattened(),
                ..StepArrays::default()
            };
            let (offsets, length) = arena(&self.plan.program, T_INPUT, at.len(), 2, 0);
            let mut input = Blob::zeroed(length);
            let tensors = self.plan.program.tensors().iter().filter(|tensor| tensor.kind == T_INPUT);
            for ((nth, offset), tensor) in (0u64..).zip(offsets).zip(tensors) {
                let width = crate::plan::row_len(tensor);
                for (row, &(seq, p)) in at.iter().enumerate() {
                    let mut random = Rng::with_seed(nth << 40 | u64::from(seq) << 32 | u64::from(p));
                    let to = &mut input.as_bytes_mut()[offset + row * width * 4..][..width * 4];
                    to.as_chunks_mut().0.iter_mut().for_each(|to| *to = (random.f32() - 0.5).to_le_bytes());
                }
            }
            let mut output = Blob::zeroed(arena(&self.plan.program, T_OUTPUT, at.len(), 2, 0).1);
            let bytes = step.encode();
            self.device.run(&self.plan, Run::new(step, bytes.as_bytes(), input.as_bytes(), output.as_bytes_mut()))?;
            Ok(output.as_bytes().to_vec())
        }

        fn op(&self, kind: u32, src_block: u32, dst_block: u32, image: &mut [u8]) -> Result<()> {
            let n_tokens = if kind == KV_COPY { 11 } else { 0 };
            let (slow_offset, tag) = (self.slow_offset(dst_block), u64::from(dst_block) + 100);
            let op = SpdKvOp { kind, src_block, dst_block, n_tokens, slow_offset, tag, ..SpdKvOp::default() };
            self.device.kv(&self.pool, &[op], image)
        }

        fn export(&self, block: u32) -> Vec<u8> {
            let mut image = vec![0; self.image_bytes];
            self.op(KV_EXPORT, block, 0, &mut image).unwrap();
            image
        }

        fn slow_offset(&self, block: u32) -> u64 {
            u64::from(N_BLOCKS - 1 - block) * self.layout.block_bytes() as u64
        }

        /// Writes the block's pages as the daemon does.
        fn write(&self, block: u32, image: &[u8]) {
            let mut pages = vec![0; self.layout.block_bytes()];
            let (seal, plane) = (Seal::new(Some(&key())), &image[self.latent_at..]);
            self.layout.encode_block(&seal, plane, u64::from(block) + 100, &mut pages).unwrap();
            self.file.write_all_at(&pages, AREA_OFFSET + self.slow_offset(block)).unwrap();
        }

        fn to_slow(&self, blocks: &[u32]) {
            for &block in blocks {
                self.write(block, &self.export(block));
                self.op(KV_TO_SLOW, 0, block, &mut []).unwrap();
            }
        }
    }

    /// Full blocks of both sequences after the first step.
    const SLOW: [u32; 8] = [3, 1, 2, 8, 20, 6, 10, 12];
    const FIRST: [Range<u32>; 2] = [0..130, 0..70];
    const NEXT: [[Range<u32>; 2]; 5] =
        [[130..131, 70..71], [131..150, 71..90], [150..151, 90..90], [151..151, 90..91], [151..154, 91..96]];

    /// Formats, groups, and heads of a group.
    const SHAPES: [([u32; 2], u32, u32); 17] = [
        ([DT_F16; 2], 1, 4),
        ([DT_F16; 2], 2, 2),
        ([DT_F16; 2], 1, 16),
        ([DT_F16; 2], 2, 8),
        ([DT_W16; 2], 1, 4),
        ([DT_W16; 2], 2, 2),
        ([DT_W16; 2], 1, 16),
        ([DT_Q8_0; 2], 1, 4),
        ([DT_Q8_0; 2], 2, 2),
        ([DT_Q8_0; 2], 1, 16),
        ([DT_F8_128; 2], 1, 4),
        ([DT_F8_128; 2], 5, 2),
        ([DT_F8_128; 2], 1, 16),
        ([DT_Q6_0, DT_Q8_0], 1, 4),
        ([DT_Q6_0, DT_Q8_0], 2, 2),
        ([DT_Q6_0, DT_Q8_0], 1, 16),
        ([DT_F32; 2], 1, 4),
    ];

    #[test]
    fn a_tokens_answer_is_the_same_in_a_prompt_and_alone() {
        for (dtypes, groups, heads) in SHAPES {
            let shape = Shape { dtypes, groups, heads, dense: true };
            let (whole, apart) = (Bed::new(shape, None), Bed::new(shape, None));
            let together = whole.step([0..150, 0..90]).unwrap();
            apart.step([0..101, 0..0]).unwrap();
            let alone = apart.step([101..102, 0..0]).unwrap();
            // Each output is `[token][head][32]` of f32.
            let row = (groups * heads * 32 * 4) as usize;
            let starts = |bed: &Bed, tokens: usize| arena(&bed.plan.program, T_OUTPUT, tokens, 2, 0).0;
            for (whole, own) in starts(&whole, 240).into_iter().zip(starts(&apart, 1)) {
                let start = whole + 101 * row;
                assert!(together[start..start + row] == alone[own..own + row], "{shape:?}");
            }
        }
    }

    #[test]
    fn attention_over_slow_blocks_has_the_bits_of_fast_ones() {
        for (dtypes, groups, heads) in SHAPES {
            // With dense attention a token lists up to 5 slow blocks of a sequence.
            for (dense, cached) in [(false, TOP_K), (false, 60), (true, 5 * BLOCK_TOKENS), (true, 1000)] {
                let shape = Shape { dtypes, groups, heads, dense };
                let (fast, slow) = (Bed::new(shape, None), Bed::new(shape, Some(cached)));
                assert!(fast.step(FIRST).unwrap() == slow.step(FIRST).unwrap());
                slow.to_slow(&SLOW);
                for ranges in NEXT {
                    let equal = fast.step(ranges.clone()).unwrap() == slow.step(ranges.clone()).unwrap();
                    assert!(equal, "{shape:?}, {cached} rows, {ranges:?}");
                }
                let counters = slow.pool.slow().unwrap().cache().counters();
                assert!(counters.misses > 20 && (counters.evictions > 0) == (cached < 1000), "{counters:?}");
            }
        }
    }

    #[test]
    fn a_bad_page_fails_the_step_with_its_block_and_the_step_can_be_repeated() {
        let shape = Shape { dtypes: [DT_F16; 2], groups: 1, heads: 4, dense: true };
        let (fast, slow) = (Bed::new(shape, None), Bed::new(shape, Some(300)));
        fast.step(FIRST).unwrap();
        slow.step(FIRST).unwrap();
        let image = slow.export(8);
        slow.to_slow(&SLOW);
        slow.file.write_all_at(&[0x77; 3], AREA_OFFSET + slow.slow_offset(8) + 1234).unwrap();
        let error = slow.step([130..131, 70..71]).unwrap_err();
        assert_eq!((error.status, error.block), (E_DATA, Some(8)), "{error}");
        slow.write(8, &image);
        assert!(fast.step([130..131, 70..71]).unwrap() == slow.step([130..131, 70..71]).unwrap());
    }

    #[test]
    fn a_cache_that_one_tokens_rows_do_not_fit_into_is_refused() {
        let slow =
            Bed::new(Shape { dtypes: [DT_F16; 2], groups: 1, heads: 4, dense: true }, Some(5 * BLOCK_TOKENS - 1));
        slow.step(FIRST).unwrap();
        slow.to_slow(&SLOW);
        assert_eq!(slow.step([130..131, 70..71]).unwrap_err().status, E_NOMEM_DEVICE);
        assert!(slow.step([130..130, 70..71]).is_ok(), "three blocks of the other sequence");
    }

    #[test]
    fn operations_on_slow_blocks_are_those_on_fast_ones() {
        let shape = Shape { dtypes: [DT_Q8_0; 2], groups: 1, heads: 4, dense: true };
        let (fast, slow) = (Bed::new(shape, None), Bed::new(shape, Some(300)));
        fast.step(FIRST).unwrap();
        slow.step(FIRST).unwrap();
        slow.to_slow(&SLOW);
        // Export, copy, and the way back to fast by reading or by import.
        for block in [3, 2, 20] {
            assert!(slow.export(block) == fast.export(block));
        }
        for bed in [&fast, &slow] {
            bed.op(KV_COPY, 1, 22, &mut []).unwrap();
        }
        assert!(slow.export(22) == fast.export(22) && slow.export(22) != slow.export(1), "11 tokens of 16");
        slow.op(KV_TO_FAST, 0, 3, &mut []).unwrap();
        slow.op(KV_IMPORT, 0, 2, &mut fast.export(2)).unwrap();
        // Their pages are not read any more.
        for block in [3, 2] {
            slow.file.write_all_at(&[0; 4096], AREA_OFFSET + slow.slow_offset(block)).unwrap();
        }
        assert!(slow.step([130..131, 70..71]).unwrap() == fast.step([130..131, 70..71]).unwrap());
        // A block that was given back is fast, zero, and may be written.
        slow.op(KV_DISCARD, 0, 12, &mut []).unwrap();
        assert!(slow.export(12).iter().all(|&byte| byte == 0) && !slow.pool.is_slow(12));
        // Moved within the slow area, a block is read where it lies now.
        slow.write(8, &fast.export(20));
        slow.op(KV_TO_SLOW, 0, 8, &mut []).unwrap();
        assert!(slow.export(8)[slow.latent_at..] == fast.export(20)[slow.latent_at..]);
    }

    #[test]
    fn what_a_slow_block_cannot_do_is_refused_and_changes_nothing() {
        let shape = Shape { dtypes: [DT_F16; 2], groups: 1, heads: 4, dense: false };
        let (fast, slow) = (Bed::new(shape, None), Bed::new(shape, Some(300)));
        slow.step(FIRST).unwrap();
        let status = |outcome: Result<()>| outcome.map_err(|error: PluginError| error.status);
        assert_eq!(status(fast.op(KV_TO_SLOW, 0, 3, &mut [])), Err(E_INVALID), "no slow tier");
        assert_eq!(status(slow.op(KV_TO_FAST, 0, 3, &mut [])), Err(E_INVALID), "not slow");
        slow.to_slow(&SLOW);
        let before = slow.export(8);
        assert_eq!(status(slow.op(KV_COPY, 5, 8, &mut [])), Err(E_INVALID), "a copy into a slow block");
        let outside = SpdKvOp { kind: KV_TO_SLOW, dst_block: 8, slow_offset: 1 << 40, ..SpdKvOp::default() };
        assert_eq!(status(slow.device.kv(&slow.pool, &[outside], &mut [])), Err(E_INVALID));
        let append = slow.step([64..65, 70..71]);
        assert_eq!(append.unwrap_err().status, E_INVALID, "position 64 lies in block 8");
        slow.file.write_all_at(&[1], AREA_OFFSET + slow.slow_offset(20)).unwrap();
        let error = slow.op(KV_TO_FAST, 0, 20, &mut []).unwrap_err();
        assert!(error.status == E_DATA && error.block == Some(20) && slow.pool.is_slow(20), "{error}");
        assert!(slow.export(8) == before);
    }
}
