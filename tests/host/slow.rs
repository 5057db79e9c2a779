//! The slow tier of a plugin in a process of its own.

use super::isolated_cpu;
use super::probe::ALONE;
use sparsed_abi::{DT_F32, E_DATA, KV_EXPORT, KV_IMPORT, KV_TO_FAST, KV_TO_SLOW, SpdKvOp, SpdRow};
use sparsed_backend::{Cipher, KvDesc, SlowArea};
use std::sync::PoisonError;

#[test]
fn a_host_reads_blocks_in_the_daemons_slow_tier_and_says_which_is_bad() {
    let _not_killed = ALONE.read().unwrap_or_else(PoisonError::into_inner);
    let (_plugin, backend) = isolated_cpu();
    assert!(backend.info().takes_slow_file() && backend.info().takes_slow_memory());
    let row = |width| SpdRow { dtype: DT_F32, width };
    let (latent, rope, index) = (row(24), row(8), row(4));
    let desc = KvDesc { block_tokens: 64, n_blocks: 4, n_layers: 3, n_index_layers: 1, latent, rope, index };
    let folder = tempfile::tempdir().unwrap();
    let row_bytes = 4 * (24 + 8);
    let in_file = SlowArea::create(folder.path(), Cipher::Aes256Gcm, &desc, row_bytes, 1 << 20).unwrap();
    for area in [in_file, SlowArea::in_memory(&desc, row_bytes, 1 << 20).unwrap()] {
        let pool = backend.create_kv(&desc, Some(&area)).unwrap();
        let mut queue = backend.queue().unwrap();
        let length = |bytes| usize::try_from(bytes).unwrap();
        let (image, latent) = (length(pool.info().image_bytes), length(pool.info().image_latent_offset));
        let filled: Vec<u8> = (0..image).map(|i| (i % 251) as u8 >> 2).collect();
        let op = |kind, block| SpdKvOp {
            kind,
            src_block: block,
            dst_block: block,
            slow_offset: area.offset_of(block),
            tag: u64::from(block) << 8,
            ..SpdKvOp::default()
        };
        // Block 2 is what was written; the pages of block 3 belong to another tag.
        for (block, tag) in [(2, 2 << 8), (3, 999)] {
            queue.kv(&pool, &[op(KV_IMPORT, block)], &mut filled.clone()).unwrap();
            area.write(block, tag, &filled[latent..]).unwrap();
            queue.kv(&pool, &[op(KV_TO_SLOW, block)], &mut []).unwrap();
        }
        for _ in 0..2 {
            let mut found = vec![0; image];
            queue.kv(&pool, &[op(KV_EXPORT, 2)], &mut found).unwrap();
            assert!(found == filled);
            queue.kv(&pool, &[op(KV_TO_FAST, 2)], &mut []).unwrap();
            queue.kv(&pool, &[op(KV_TO_SLOW, 2)], &mut []).unwrap();
        }
        let bad = queue.kv(&pool, &[op(KV_EXPORT, 3)], &mut vec![0; image]).unwrap_err();
        assert_eq!((bad.status(), bad.bad_block()), (Some(E_DATA), Some(3)), "{bad}");
    }
}

#[test]
fn a_host_cannot_write_into_the_daemons_slow_tier() {
    let row = SpdRow { dtype: DT_F32, width: 8 };
    let desc =
        KvDesc { block_tokens: 16, n_blocks: 1, n_layers: 1, n_index_layers: 1, latent: row, rope: row, index: row };
    let folder = tempfile::tempdir().unwrap();
    let area = SlowArea::create(folder.path(), Cipher::Aes256Gcm, &desc, 64, 1 << 20).unwrap();
    let _not_killed = ALONE.read().unwrap_or_else(PoisonError::into_inner);
    let (plugin, backend) = isolated_cpu();
    let _pool = backend.create_kv(&desc, Some(&area)).unwrap();
    let pid = plugin.host_process().unwrap();
    let name = folder.path().to_str().unwrap();
    let of_area = |entry: &std::fs::DirEntry| {
        std::fs::read_link(entry.path()).is_ok_and(|target| target.to_string_lossy().starts_with(name))
    };
    let fds: Vec<_> = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten().filter(of_area).collect();
    assert!(!fds.is_empty());
    for fd in fds {
        let info = std::fs::read_to_string(format!("/proc/{pid}/fdinfo/{}", fd.file_name().display())).unwrap();
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:")).unwrap().trim();
        let access = u32::from_str_radix(flags, 8).unwrap() & 3;
        assert_eq!(access, 0, "{fd:?}: {info}");
    }
}
