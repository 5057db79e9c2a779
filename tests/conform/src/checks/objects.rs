//! L1: are weights and pools made as described, and refused when the description is wrong?

use super::refused;
use crate::cache::{Plane, Shape, row_formats};
use crate::case::{CLASS_F, Case, Matrix, close, floats, wide, words};
use crate::child::Context;
use crate::oracle;
use crate::rig::{Session, Weight, struct_size, weight_desc};
use crate::rule::{Level, Rule, rule};
use crate::step::Step;
use crate::verdict::{Outcome, Wrong, ensure, skip};
use sparsed_abi::{
    DIM_TOKENS, DT_F32, DT_I32, E_ABI, E_INVALID, E_UNSUPPORTED, FEAT_HOST_WEIGHTS, OP_LINEAR, OpSpec, SpdBucket,
    SpdKvDesc, SpdSource, SpdWeightDesc, W_HOST_IN_PLACE,
};
use sparsed_quant::Format;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::rc::Rc;

const WEIGHTS: &str = "plugin.h, weights";
const POOL: &str = "plugin.h, the KV pool";

pub(crate) const RULES: &[Rule] = &[
    rule(
        Level::L1,
        "weight.dtype_unknown",
        "a weight of a dtype that nobody has is SPD_E_UNSUPPORTED",
        WEIGHTS,
        &[],
        dtype_unknown,
    ),
    rule(Level::L1, "weight.flags", "an unknown flag of a weight is refused", WEIGHTS, &[], flags),
    rule(Level::L1, "weight.length", "an upload of the wrong length is SPD_E_INVALID", WEIGHTS, &[], length),
    rule(Level::L1, "weight.range", "an upload of batches that are not there is SPD_E_INVALID", WEIGHTS, &[], range),
    rule(Level::L1, "weight.commit", "a weight with a batch missing cannot be committed", WEIGHTS, &[], commit),
    rule(Level::L1, "weight.bind", "a weight that is not committed cannot be bound", WEIGHTS, &[], bind),
    rule(
        Level::L1,
        "weight.file",
        "a weight may be uploaded from a file, if the plugin takes one",
        "plugin.h, spd_source",
        &[],
        file,
    ),
    rule(
        Level::L1,
        "weight.in_place",
        "with SPD_FEAT_HOST_WEIGHTS, SPD_W_HOST_IN_PLACE is taken",
        WEIGHTS,
        &[],
        in_place,
    ),
    rule(
        Level::L1,
        "kv.create",
        "a pool of each claimed row dtype has the sizes that its description says",
        POOL,
        &[],
        kv_create,
    ),
    rule(
        Level::L1,
        "kv.refused",
        "a pool without blocks, of an unknown dtype or with an unknown flag is refused",
        POOL,
        &[],
        kv_refused,
    ),
];

fn dtype_unknown(context: &Context) -> Outcome {
    let session = context.session()?;
    for dtype in [DT_I32, 127, 255, u32::MAX] {
        let answer = Weight::create(&session.device, &weight_desc(dtype, (1, 4, 32)));
        refused(&format!("a weight of dtype {dtype}"), answer, &[E_UNSUPPORTED])?;
    }
    Ok(())
}

fn flags(context: &Context) -> Outcome {
    let session = context.session()?;
    let desc = SpdWeightDesc { flags: 1 << 31, ..weight_desc(DT_F32, (1, 4, 32)) };
    let answer = Weight::create(&session.device, &desc);
    refused("a weight with flags = 1 << 31", answer, &[E_INVALID, E_UNSUPPORTED, E_ABI])
}

fn length(context: &Context) -> Outcome {
    let session = context.session()?;
    let bytes = vec![0u8; 1024];
    for length in [0, 4, 508, 516, 1024] {
        let weight = Weight::create(&session.device, &weight_desc(DT_F32, (1, 4, 32)))?;
        let answer = weight.upload(0, 1, &bytes[..length]);
        refused(&format!("{length} bytes for a weight of 512"), answer, &[E_INVALID])?;
    }
    Ok(())
}

fn range(context: &Context) -> Outcome {
    let session = context.session()?;
    let bytes = vec![0u8; 512 * 4];
    for (first, n) in [(3u32, 1u32), (2, 2), (0, 4), (u32::MAX, 2)] {
        let weight = Weight::create(&session.device, &weight_desc(DT_F32, (3, 4, 32)))?;
        let answer = weight.upload(first, n, &bytes[..512 * n as usize]);
        refused(&format!("batches {first}..+{n} of 3"), answer, &[E_INVALID])?;
    }
    Ok(())
}

fn commit(context: &Context) -> Outcome {
    let session = context.session()?;
    let weight = Weight::create(&session.device, &weight_desc(DT_F32, (2, 4, 32)))?;
    weight.upload(1, 1, &[0; 512])?;
    refused("weight_commit after one of two batches", weight.commit(), &[E_INVALID])
}

fn bind(context: &Context) -> Outcome {
    let session = context.session()?;
    let weight = Rc::new(Weight::create(&session.device, &weight_desc(DT_F32, (1, 4, 32)))?);
    weight.upload(0, 1, &[0; 512])?;
    let blob = linear_of(&session, (4, 32)).blob();
    let bucket = SpdBucket { max_tokens: 4, max_seqs: 1, max_logits: 1, max_context: 4 };
    let answer = session.compile(&blob, vec![weight], None, bucket);
    refused("plan_compile with a weight that is not committed", answer, &[E_INVALID])
}

/// LINEAR with an f32 weight in slot 0 that the caller binds.
fn linear_of(session: &Session, (rows, cols): (i32, i32)) -> Case<'_> {
    let mut case = Case::new(session);
    let x = case.input(&[DIM_TOKENS, cols]);
    let w = case.builder.weight(0, DT_F32, &[rows, cols]);
    let y = case.output(&[DIM_TOKENS, rows]);
    case.op(OpSpec { kind: OP_LINEAR, inputs: &[Some(x), Some(w)], outputs: &[Some(y)], ..OpSpec::default() });
    case
}

/// Fails unless LINEAR with this weight multiplies with the matrix.
fn multiplies(session: &Session, rng: &mut fastrand::Rng, weight: Weight, matrix: &Matrix, what: &str) -> Outcome {
    let step = Step::without_pool(&[3]);
    let n = |n: usize| i32::try_from(n).expect("small");
    let case = linear_of(session, (n(matrix.rows), n(matrix.cols))).bound_to(weight);
    let x = floats(rng, 3 * matrix.cols);
    let found = case.compile(&[&step])?.run(&step, &[&words(&x)])?;
    let rows = wide(&x);
    let expected: Vec<f64> = rows.chunks_exact(matrix.cols).flat_map(|x| oracle::product(&matrix.values, x)).collect();
    close(CLASS_F, what, &found[0], &expected)
}

fn file(context: &Context) -> Outcome {
    let (session, mut rng) = (context.session()?, context.random());
    let matrix = Matrix::random(&mut rng, Format::F32, (1, 5, 32));
    let path = std::env::temp_dir().join(format!("sparsed-conform-{}", std::process::id()));
    let io = |error: std::io::Error| Wrong::Failed(format!("{}: {error}", path.display()));
    let mut file = std::fs::File::options().read(true).write(true).create_new(true).open(&path).map_err(io)?;
    std::fs::remove_file(&path).map_err(io)?;
    file.write_all(&[0xee; 96]).map_err(io)?;
    file.write_all(&matrix.bytes).map_err(io)?;
    let weight = Weight::create(&session.device, &weight_desc(DT_F32, (1, 5, 32)))?;
    let source = SpdSource {
        struct_size: struct_size::<SpdSource>(),
        fd: file.as_raw_fd(),
        offset: 96,
        length: matrix.bytes.len() as u64,
        ..SpdSource::default()
    };
    match weight.upload_from(0, 1, &source) {
        Err(fault) if fault.status == E_UNSUPPORTED => return skip(fault.to_string()),
        answer => answer?,
    }
    weight.commit()?;
    multiplies(&session, &mut rng, weight, &matrix, "LINEAR with a weight from a file")
}

fn in_place(context: &Context) -> Outcome {
    let (session, mut rng) = (context.session()?, context.random());
    if !session.claims(FEAT_HOST_WEIGHTS) {
        return skip("SPD_FEAT_HOST_WEIGHTS is not claimed");
    }
    let matrix = Matrix::random(&mut rng, Format::F32, (1, 5, 32));
    let desc = SpdWeightDesc { flags: W_HOST_IN_PLACE, ..weight_desc(DT_F32, (1, 5, 32)) };
    let weight = Weight::create(&session.device, &desc)?;
    weight.upload(0, 1, &matrix.bytes)?;
    weight.commit()?;
    multiplies(&session, &mut rng, weight, &matrix, "LINEAR with a weight in place")
}

fn kv_create(context: &Context) -> Outcome {
    let session = context.session()?;
    for format in row_formats(&session) {
        for index_layers in [0, 3] {
            let shape = Shape { index_layers, layers: 2, ..Shape::usual(&session, format) };
            let pool = shape.pool(&session)?;
            let [latent, rope, index] = Plane::ALL.map(|plane| shape.row_bytes(plane) as u64);
            let per_token = index * u64::from(index_layers);
            let index = per_token * u64::from(shape.block_tokens);
            let latent = (latent + rope) * 2 * u64::from(shape.block_tokens);
            let (info, name) = (pool.info, format.name());
            ensure!(
                info.image_latent_offset == index,
                "{name}: image_latent_offset is {}, {index} is right",
                info.image_latent_offset
            );
            let image = index + latent;
            ensure!(info.image_bytes == image, "{name}: image_bytes is {}, {image} is right", info.image_bytes);
            let least = image * u64::from(shape.n_blocks);
            ensure!(info.device_bytes >= least, "{name}: device_bytes is {}, rows are {least}", info.device_bytes);
        }
    }
    Ok(())
}

fn kv_refused(context: &Context) -> Outcome {
    let session = context.session()?;
    let formats = row_formats(&session);
    let Some(&format) = formats.first() else { return skip("no row dtype is claimed") };
    let good = Shape::usual(&session, format).desc();
    let odd = |dtype| sparsed_abi::SpdRow { dtype, width: 64 };
    let bad = [
        ("no blocks", SpdKvDesc { n_blocks: 0, ..good }),
        ("blocks of no tokens", SpdKvDesc { block_tokens: 0, ..good }),
        ("latent rows of dtype 127", SpdKvDesc { latent: odd(127), ..good }),
        ("rope rows of dtype 255", SpdKvDesc { rope: odd(255), ..good }),
        ("index rows of dtype i32", SpdKvDesc { index: odd(DT_I32), ..good }),
        ("flags = 1 << 31", SpdKvDesc { flags: 1 << 31, ..good }),
    ];
    for (what, desc) in bad {
        refused(&format!("a pool with {what}"), session.pool(&desc), &[E_INVALID, E_UNSUPPORTED, E_ABI])?;
    }
    Ok(())
}
