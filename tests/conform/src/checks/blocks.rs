//! L3: is a block's host image what `plugin.h` says, and do blocks move without a changed bit?

use super::refused;
use crate::cache::{Contents, Plane, Shape, Source, row_formats};
use crate::child::Context;
use crate::rig::{Fault, KvList, Pool, Session, struct_size};
use crate::rule::{Level, Rule, rule};
use crate::verdict::{Outcome, Wrong, ensure};
use sparsed_abi::{E_ABI, E_INVALID, E_UNSUPPORTED, KV_COPY, KV_DISCARD, KV_EXPORT, KV_IMPORT, SpdKvOp};
use sparsed_quant::Format;
use std::ops::Range;
use std::rc::Rc;

const PLACE: &str = "plugin.h, spd_kv_op";

pub(crate) const RULES: &[Rule] = &[
    rule(Level::L3, "kv.zero", "rows of a new pool read as zero", "plugin.h, kv_create", &["kv.create"], zero),
    rule(
        Level::L3,
        "kv.export_import",
        "blocks that are exported and imported elsewhere are the same to the bit",
        PLACE,
        &["op.kv_append.golden", "op.idx_append.golden"],
        export_import,
    ),
    rule(
        Level::L3,
        "kv.copy",
        "SPD_KV_COPY copies the first n_tokens tokens of every layer and nothing else",
        PLACE,
        &["kv.export_import"],
        copy,
    ),
    rule(
        Level::L3,
        "kv.discard",
        "SPD_KV_DISCARD zeroes its block and nothing else",
        PLACE,
        &["kv.export_import"],
        discard,
    ),
    rule(
        Level::L3,
        "kv.stride",
        "operations of an older or newer minor are read by their stride, unless what is longer is set",
        PLACE,
        &["kv.export_import"],
        stride,
    ),
    rule(
        Level::L3,
        "kv.bounds",
        "a block outside the pool, an image outside the buffer and an unknown kind are refused",
        PLACE,
        &["kv.create"],
        bounds,
    ),
];

/// Where a row lies in a block's host image.
pub(crate) fn image_row(shape: &Shape, source: Source, within: u32) -> Range<usize> {
    let [latent, rope, index] = Plane::ALL.map(|plane| shape.row_bytes(plane));
    let (tokens, within) = (shape.block_tokens as usize, within as usize);
    let planes = shape.index_layers as usize * tokens * index;
    let pair = planes + (source.1 * tokens + within) * (latent + rope);
    match source.0 {
        Plane::Index => {
            let at = (source.1 * tokens + within) * index;
            at..at + index
        }
        Plane::Latent => pair..pair + latent,
        Plane::Rope => pair + latent..pair + latent + rope,
    }
}

/// An operation on one block and the image at the start of the buffer.
fn op(kind: u32, src_block: u32, dst_block: u32) -> SpdKvOp {
    SpdKvOp { kind, src_block, dst_block, ..SpdKvOp::default() }
}

/// The host images of blocks, each by a call of its own.
pub(crate) fn export(session: &Session, pool: &Pool, blocks: &[u32]) -> Result<Vec<Vec<u8>>, Fault> {
    let length = usize::try_from(pool.info.image_bytes).expect("a small pool");
    let one = |&block: &u32| {
        let mut image = vec![0x77; length];
        session.queue.kv(pool, &[op(KV_EXPORT, block, 0)], &mut image).map(|_| image)
    };
    blocks.iter().map(one).collect()
}

/// Makes `image` the content of `block`.
pub(crate) fn import(session: &Session, pool: &Pool, block: u32, image: &[u8]) -> Result<(), Fault> {
    session.queue.kv(pool, &[op(KV_IMPORT, 0, block)], &mut image.to_vec()).map(drop)
}

/// A pool, blocks in it that hold rows, and the host image of each of them.
type Filled = (Rc<Pool>, Vec<u32>, Vec<Vec<u8>>);

/// A pool of this format with two sequences of two blocks in it.
fn filled(context: &Context, session: &Session, format: Format) -> Result<Filled, Wrong> {
    let mut rng = context.random();
    let shape = Shape { n_blocks: 8, ..Shape::usual(session, format) };
    let order = [6, 1, 4, 3];
    let contexts = [2 * shape.block_tokens, shape.block_tokens + 3];
    let contents = Contents::random(&mut rng, shape, shape.sequences(&contexts, &order));
    let pool = shape.pool(session)?;
    contents.write(session, &pool, &Plane::ALL)?;
    let images = export(session, &pool, &order)?;
    Ok((pool, order.to_vec(), images))
}

fn zero(context: &Context) -> Outcome {
    let session = context.session()?;
    for format in row_formats(&session) {
        let shape = Shape { n_blocks: 3, ..Shape::usual(&session, format) };
        let pool = shape.pool(&session)?;
        for (block, image) in export(&session, &pool, &[0, 1, 2])?.iter().enumerate() {
            let set = image.iter().position(|&byte| byte != 0);
            ensure!(set.is_none(), "{}: byte {set:?} of block {block} of a new pool is not 0", format.name());
        }
    }
    Ok(())
}

fn export_import(context: &Context) -> Outcome {
    let session = context.session()?;
    for format in row_formats(&session) {
        let (pool, blocks, images) = filled(context, &session, format)?;
        let length = images[0].len();
        // In one call, at offsets in the other order, with a gap in front.
        let gap = 40;
        let offset = |i: usize| (gap + (blocks.len() - 1 - i) * length) as u64;
        let all = |kind, to: &[u32]| -> Vec<SpdKvOp> {
            let one = |(i, &block): (usize, &u32)| SpdKvOp { host_offset: offset(i), ..op(kind, block, block) };
            to.iter().enumerate().map(one).collect()
        };
        let mut buffer = vec![0x33; gap + blocks.len() * length];
        session.queue.kv(&pool, &all(KV_EXPORT, &blocks), &mut buffer)?;
        ensure!(
            buffer[..gap].iter().all(|&byte| byte == 0x33),
            "{}: bytes before the image were written",
            format.name()
        );
        let elsewhere = [0, 2, 5, 7];
        session.queue.kv(&pool, &all(KV_IMPORT, &elsewhere), &mut buffer)?;
        let found = export(&session, &pool, &elsewhere)?;
        for ((image, found), (from, to)) in images.iter().zip(&found).zip(blocks.iter().zip(elsewhere)) {
            let wrong = image.iter().zip(found).position(|(a, b)| a != b);
            ensure!(
                wrong.is_none(),
                "{}: block {from}, exported and imported as block {to}, differs at byte {}",
                format.name(),
                wrong.unwrap_or(0)
            );
        }
        ensure!(export(&session, &pool, &blocks)? == images, "{}: the exported blocks have changed", format.name());
    }
    Ok(())
}

fn copy(context: &Context) -> Outcome {
    let session = context.session()?;
    for format in row_formats(&session) {
        let (pool, blocks, images) = filled(context, &session, format)?;
        let shape = Shape { n_blocks: 8, ..Shape::usual(&session, format) };
        for n_tokens in [0, 1, shape.block_tokens - 1, shape.block_tokens] {
            let (from, to) = (blocks[0], blocks[1]);
            import(&session, &pool, to, &images[1])?;
            let copied = SpdKvOp { n_tokens, ..op(KV_COPY, from, to) };
            session.queue.kv(&pool, &[copied], &mut [])?;
            let found = export(&session, &pool, &[to])?;
            for within in 0..shape.block_tokens {
                let expected = if within < n_tokens { &images[0] } else { &images[1] };
                let layers =
                    [(Plane::Latent, shape.layers), (Plane::Rope, shape.layers), (Plane::Index, shape.index_layers)];
                for (plane, layers) in layers {
                    for layer in 0..layers as usize {
                        let place = image_row(&shape, Source(plane, layer), within);
                        ensure!(
                            found[0][place.clone()] == expected[place],
                            "{}: {n_tokens} tokens copied, the {plane:?} row of token {within} in layer {layer} is wrong",
                            format.name()
                        );
                    }
                }
            }
        }
        let others = export(&session, &pool, &blocks[2..])?;
        ensure!(others == images[2..], "{}: a copy changes other blocks", format.name());
    }
    Ok(())
}

fn discard(context: &Context) -> Outcome {
    let session = context.session()?;
    for format in row_formats(&session) {
        let (pool, blocks, images) = filled(context, &session, format)?;
        session.queue.kv(&pool, &[op(KV_DISCARD, 0, blocks[2])], &mut [])?;
        let found = export(&session, &pool, &blocks)?;
        ensure!(found[2].iter().all(|&byte| byte == 0), "{}: a discarded block is not zero", format.name());
        for i in [0, 1, 3] {
            ensure!(found[i] == images[i], "{}: discarding a block changes block {}", format.name(), blocks[i]);
        }
    }
    Ok(())
}

/// An operation that is followed by a field of a newer minor.
#[repr(C)]
struct Newer {
    op: SpdKvOp,
    field: u64,
}

fn stride(context: &Context) -> Outcome {
    let session = context.session()?;
    let format = super::sequences::any_format(&session)?;
    let (pool, blocks, images) = filled(context, &session, format)?;
    let offset = |i: usize| (i * images[0].len()) as u64;
    let export =
        |i: usize, field| Newer { op: SpdKvOp { host_offset: offset(i), ..op(KV_EXPORT, blocks[i], 0) }, field };
    let newer = [export(0, 0), export(1, 0)];
    let mut buffer = vec![0; 2 * images[0].len()];
    let list = KvList { first: newer.as_ptr().cast(), n: 2, stride: struct_size::<Newer>() };
    session.queue.kv_raw(&pool, list, &mut buffer)?;
    ensure!(buffer == images[..2].concat(), "operations with a stride of {} are read wrongly", list.stride);
    let set = [export(0, 0), export(1, 1)];
    let list = KvList { first: set.as_ptr().cast(), ..list };
    let answer = session.queue.kv_raw(&pool, list, &mut buffer);
    refused("an operation with a field set that this ABI lacks", answer, &[E_INVALID, E_UNSUPPORTED, E_ABI])?;
    // The first minors' operations end with host_offset.
    let old: Vec<u64> =
        (0..2).flat_map(|i| [u64::from(KV_EXPORT) | u64::from(blocks[i]) << 32, 0, offset(i)]).collect();
    let list = KvList { first: old.as_ptr().cast(), n: 2, stride: 24 };
    buffer.fill(0);
    session.queue.kv_raw(&pool, list, &mut buffer)?;
    ensure!(buffer == images[..2].concat(), "operations with a stride of 24 are read wrongly");
    Ok(())
}

fn bounds(context: &Context) -> Outcome {
    let session = context.session()?;
    for format in row_formats(&session) {
        let shape = Shape { n_blocks: 3, ..Shape::usual(&session, format) };
        let pool = shape.pool(&session)?;
        let image = usize::try_from(pool.info.image_bytes).expect("a small pool");
        let late = |kind| SpdKvOp { host_offset: 1, ..op(kind, 0, 0) };
        let far = |kind| SpdKvOp { host_offset: u64::MAX - 7, ..op(kind, 0, 0) };
        let too_many = SpdKvOp { n_tokens: shape.block_tokens + 1, ..op(KV_COPY, 0, 1) };
        let bad = [
            ("export of block 3 of 3", op(KV_EXPORT, 3, 0)),
            ("import into block 2^32 - 1", op(KV_IMPORT, 0, u32::MAX)),
            ("discard of block 3 of 3", op(KV_DISCARD, 0, 3)),
            ("copy from block 3 of 3", SpdKvOp { n_tokens: 1, ..op(KV_COPY, 3, 0) }),
            ("copy to block 3 of 3", SpdKvOp { n_tokens: 1, ..op(KV_COPY, 0, 3) }),
            ("copy of more tokens than a block has", too_many),
            ("export that ends a byte past the buffer", late(KV_EXPORT)),
            ("import that ends a byte past the buffer", late(KV_IMPORT)),
            ("export at offset 2^64 - 8", far(KV_EXPORT)),
            ("operation of kind 0", op(0, 0, 0)),
            ("operation of kind 99", op(99, 0, 0)),
        ];
        for (what, op) in bad {
            let answer = session.queue.kv(&pool, &[op], &mut vec![0; image]);
            refused(&format!("{what} ({})", format.name()), answer, &[E_INVALID, E_UNSUPPORTED, E_ABI])?;
        }
    }
    Ok(())
}
