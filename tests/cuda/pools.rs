//! Blocks of a KV pool are what was put into them, whichever queue did it, as long as the queues wait for each other.

use crate::rig::{Pool, Queue, Result, Rig, call, size};
use fastrand::Rng;
use sparsed_abi::{
    DT_F16, DT_Q8_0, E_INVALID, E_NOMEM_DEVICE, E_UNSUPPORTED, KV_COPY, KV_DISCARD, KV_EXPORT, KV_IMPORT, KV_TO_SLOW,
    SpdKvDesc, SpdKvInfo, SpdKvOp, SpdRow,
};
use std::ops::Range;

const BLOCK_TOKENS: usize = 4;
const N_BLOCKS: usize = 5;
/// Bytes of the rows of a token: two index layers of 34, three layers of 8 + 4.
const LAYERS: [usize; 5] = [34, 34, 12, 12, 12];
const IMAGE: usize = 104 * BLOCK_TOKENS;

impl Rig {
    fn pool(&self, n_blocks: usize) -> Result<(Pool<'_>, SpdKvInfo)> {
        let desc = SpdKvDesc {
            struct_size: size::<SpdKvDesc>(),
            block_tokens: u32::try_from(BLOCK_TOKENS).unwrap(),
            n_blocks: u32::try_from(n_blocks).unwrap(),
            n_layers: 3,
            n_index_layers: 2,
            latent: SpdRow { dtype: DT_F16, width: 4 },
            rope: SpdRow { dtype: DT_F16, width: 2 },
            index: SpdRow { dtype: DT_Q8_0, width: 32 },
            ..SpdKvDesc::default()
        };
        let mut info = SpdKvInfo { struct_size: size::<SpdKvInfo>(), ..SpdKvInfo::default() };
        let mut raw = std::ptr::null_mut();
        // SAFETY: a living device; description and out pointers are ours.
        call(|e| unsafe { self.api.kv_create.unwrap()(self.device, &raw const desc, &raw mut raw, &raw mut info, e) })?;
        Ok((Pool { rig: self, raw }, info))
    }
}

impl Queue<'_> {
    /// The buffer stays the plugin's until the test has waited.
    fn kv(&self, pool: &Pool<'_>, ops: &[SpdKvOp], host: &mut [u8]) -> Result<u64> {
        let (n, stride, mut timeline) = (u32::try_from(ops.len()).unwrap(), size::<SpdKvOp>(), 0);
        let (at, length) = (host.as_mut_ptr().cast(), host.len() as u64);
        // SAFETY: living handles; operations and buffer live long enough.
        call(|e| unsafe {
            self.rig.api.queue_kv.unwrap()(
                self.raw,
                pool.raw,
                ops.as_ptr(),
                n,
                stride,
                at,
                length,
                &raw mut timeline,
                e,
            )
        })?;
        Ok(timeline)
    }
}

fn op(kind: u32, src: usize, dst: usize, n_tokens: usize, image: usize) -> SpdKvOp {
    let small = |n: usize| u32::try_from(n).unwrap();
    let (src_block, dst_block, n_tokens) = (small(src), small(dst), small(n_tokens));
    SpdKvOp { kind, src_block, dst_block, n_tokens, host_offset: (image * IMAGE) as u64, ..SpdKvOp::default() }
}

fn image(n: usize) -> Range<usize> {
    n * IMAGE..(n + 1) * IMAGE
}

/// The first tokens of every layer of `from`, over `to`.
fn copy_tokens(from: &[u8], to: &mut [u8], n_tokens: usize) {
    let mut at = 0;
    for row in LAYERS {
        to[at..at + n_tokens * row].copy_from_slice(&from[at..at + n_tokens * row]);
        at += row * BLOCK_TOKENS;
    }
}

#[test]
fn a_pool_has_the_sizes_of_its_description_and_reads_as_zero() {
    let rig = Rig::open(&[]);
    let (pool, info) = rig.pool(N_BLOCKS).unwrap();
    let sizes = (info.image_bytes, info.image_latent_offset, info.device_bytes, rig.memory().used_kv);
    assert_eq!(sizes, (IMAGE as u64, 34 * 2 * 4, (IMAGE * N_BLOCKS) as u64, (IMAGE * N_BLOCKS) as u64));
    let (queue, mut host) = (rig.queue().unwrap(), vec![7; IMAGE]);
    let timeline = queue.kv(&pool, &[op(KV_EXPORT, 4, 0, 0, 0)], &mut host).unwrap();
    queue.wait(timeline).unwrap();
    assert!(host.iter().all(|&byte| byte == 0));
    drop(pool);
    assert_eq!(rig.memory().used_kv, 0);
}

#[test]
fn data_goes_from_queue_to_queue_under_fifty_seeds() {
    let (rig, mut random) = (Rig::open(&[]), Rng::with_seed(1));
    for seed in 0..50 {
        rig.set("seed", seed);
        let (pool, _) = rig.pool(N_BLOCKS).unwrap();
        let queues = [rig.queue().unwrap(), rig.queue().unwrap()];
        let mut blocks = vec![0; IMAGE * N_BLOCKS];
        // What is imported, then room for what is exported: both belong to the plugin until the end.
        let mut host: Vec<u8> = (0..IMAGE * N_BLOCKS).map(|_| random.u8(..)).collect();
        let mut last: Option<(usize, u64)> = None;
        for _ in 0..20 {
            let (src, dst, n) = (random.usize(..N_BLOCKS), random.usize(..N_BLOCKS), random.usize(..=BLOCK_TOKENS));
            let from = random.usize(..N_BLOCKS);
            let operation = match random.u8(..3) {
                0 => {
                    blocks[image(dst)].copy_from_slice(&host[image(from)]);
                    op(KV_IMPORT, 0, dst, 0, from)
                }
                1 => {
                    let source = blocks[image(src)].to_vec();
                    copy_tokens(&source, &mut blocks[image(dst)], n);
                    op(KV_COPY, src, dst, n, 0)
                }
                _ => {
                    blocks[image(dst)].fill(0);
                    op(KV_DISCARD, 0, dst, 0, 0)
                }
            };
            let queue = random.usize(..2);
            if let Some((other, timeline)) = last.filter(|(other, _)| *other != queue) {
                queues[queue].wait_queue(&queues[other], timeline).unwrap();
            }
            last = Some((queue, queues[queue].kv(&pool, &[operation], &mut host).unwrap()));
        }
        let (queue, timeline) = last.unwrap();
        let reader = 1 - queue;
        queues[reader].wait_queue(&queues[queue], timeline).unwrap();
        let exports: Vec<_> = (0..N_BLOCKS).map(|n| op(KV_EXPORT, n, 0, 0, n)).collect();
        let mut found = vec![0; IMAGE * N_BLOCKS];
        let timeline = queues[reader].kv(&pool, &exports, &mut found).unwrap();
        queues[reader].wait(timeline).unwrap();
        assert_eq!(found, blocks, "seed {seed}");
    }
}

#[test]
fn a_list_that_is_longer_than_the_staging_memory_comes_through_whole() {
    let (rig, mut random) = (Rig::open(&[]), Rng::with_seed(2));
    let n = (1 << 20) / IMAGE * 5 / 2; // two and a half times what is staged at once
    let (pool, _) = rig.pool(n).unwrap();
    let queue = rig.queue().unwrap();
    let mut host: Vec<u8> = (0..n * IMAGE).map(|_| random.u8(..)).collect();
    let expected = host.clone();
    let imports: Vec<_> = (0..n).map(|n| op(KV_IMPORT, 0, n, 0, n)).collect();
    let timeline = queue.kv(&pool, &imports, &mut host).unwrap();
    queue.wait(timeline).unwrap();
    let mut found = vec![0; n * IMAGE];
    let exports: Vec<_> = (0..n).map(|n| op(KV_EXPORT, n, 0, 0, n)).collect();
    let timeline = queue.kv(&pool, &exports, &mut found).unwrap();
    queue.wait(timeline).unwrap();
    assert!(found == expected);
}

#[test]
fn a_long_list_that_fails_in_its_third_part_writes_nothing_to_the_buffer_afterwards() {
    let rig = Rig::open(&[]);
    let n = (1 << 20) / IMAGE * 5 / 2; // three parts
    let (pool, _) = rig.pool(n).unwrap();
    let queue = rig.queue().unwrap();
    let exports: Vec<_> = (0..n).map(|n| op(KV_EXPORT, n, 0, 0, n)).collect();
    let mut host = vec![0; n * IMAGE];
    rig.set("unrecorded_at", rig.counter("records") + 3);
    let refused = queue.kv(&pool, &exports, &mut host).unwrap_err();
    assert_eq!((refused.status, refused.vendor_code), (E_NOMEM_DEVICE, 2), "{refused:?}");
    // It is the caller's again. What was enqueued is over once work behind it is.
    host.fill(0x5a);
    let after = queue.kv(&pool, &[op(KV_DISCARD, 0, 0, 0, 0)], &mut []).unwrap();
    queue.wait(after).unwrap();
    assert_eq!(queue.completed(), after);
    assert!(host.iter().all(|&byte| byte == 0x5a), "an image was copied after the call had failed");
    let (first, second) = (queue.wait(1), queue.wait(2).unwrap_err());
    first.unwrap(); // over before the third part could be staged
    assert_eq!(second.vendor_code, 2, "{second:?}");
}

#[test]
fn a_list_with_an_impossible_operation_changes_nothing() {
    let rig = Rig::open(&[]);
    let (pool, _) = rig.pool(N_BLOCKS).unwrap();
    let (queue, mut host) = (rig.queue().unwrap(), vec![9; IMAGE]);
    for (bad, status) in [
        (op(KV_COPY, 0, N_BLOCKS, 1, 0), E_INVALID),
        (op(KV_COPY, 0, 1, BLOCK_TOKENS + 1, 0), E_INVALID),
        (op(KV_EXPORT, 0, 0, 0, 1), E_INVALID),
        (op(KV_TO_SLOW, 0, 0, 0, 0), E_UNSUPPORTED),
        (op(77, 0, 0, 0, 0), E_UNSUPPORTED),
    ] {
        let refused = queue.kv(&pool, &[op(KV_IMPORT, 0, 0, 0, 0), bad], &mut host).unwrap_err();
        assert_eq!(refused.status, status, "{refused:?}");
    }
    let timeline = queue.kv(&pool, &[op(KV_EXPORT, 0, 0, 0, 0)], &mut host).unwrap();
    queue.wait(timeline).unwrap();
    assert!(host.iter().all(|&byte| byte == 0), "the import before the impossible one was not done");
}
