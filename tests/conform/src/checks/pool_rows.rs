//! L2: are rows written where and as `OPS.md` says? Read back through the host image of each block.

use super::blocks::{export, image_row};
use crate::cache::{Contents, Plane, Shape, append_all, row_formats};
use crate::case::{Case, words};
use crate::child::Context;
use crate::rig::Session;
use crate::rule::{Level, Rule, rule};
use crate::verdict::{Outcome, ensure};
use sparsed_quant::{Format, decode};

pub(crate) const RULES: &[Rule] = &[
    rule(
        Level::L2,
        "op.kv_append.golden",
        "KV_APPEND writes every layer's rows into their slots, in every claimed format",
        "OPS.md, KV_APPEND and rows in the pool",
        &["kv.create"],
        |context| append(context, &[Plane::Latent, Plane::Rope], 3, 0),
    ),
    rule(
        Level::L2,
        "op.idx_append.golden",
        "IDX_APPEND writes every index layer's rows into their slots, in every claimed format",
        "OPS.md, IDX_APPEND and rows in the pool",
        &["kv.create"],
        |context| append(context, &[Plane::Index], 1, 3),
    ),
];

fn append(context: &Context, planes: &[Plane], layers: u32, index_layers: u32) -> Outcome {
    let (session, mut rng) = (context.session()?, context.random());
    for format in row_formats(&session) {
        let shape = Shape { layers, index_layers, ..Shape::usual(&session, format) };
        let mut order: Vec<u32> = (0..shape.n_blocks).collect();
        rng.shuffle(&mut order);
        let edge = shape.block_tokens;
        let contents = Contents::random(&mut rng, shape, shape.sequences(&[edge - 1, edge + 1, 2 * edge], &order));
        written(&session, &contents, planes)?;
    }
    Ok(())
}

/// Appends the rows of `planes` and compares them with what the blocks' images hold.
fn written(session: &Session, contents: &Contents, planes: &[Plane]) -> Outcome {
    let (pool, step) = (contents.shape.pool(session)?, contents.step());
    let mut case = Case::with_pool(session, &pool);
    let sources = append_all(&mut case, &contents.shape, planes);
    let inputs: Vec<_> = sources.iter().map(|source| words(&source.rows(contents).given)).collect();
    case.compile(&[&step])?.run(&step, &inputs.iter().map(|input| &input[..]).collect::<Vec<_>>())?;
    for (seq, sequence) in contents.sequences.iter().enumerate() {
        let images = export(session, &pool, &sequence.blocks)?;
        for position in 0..sequence.n {
            let token = contents.token(seq, position as usize);
            let (block, within) = (position / contents.shape.block_tokens, position % contents.shape.block_tokens);
            for source in &sources {
                let rows = source.rows(contents);
                let place = image_row(&contents.shape, *source, within);
                let found = &images[block as usize][place];
                let same = same_row(rows.format, found, rows.stored(token), rows.given_row(token));
                ensure!(
                    same.is_ok(),
                    "{}: the {source:?} row of position {position} is not in token {within} of block {}: {}",
                    rows.format.name(),
                    sequence.blocks[block as usize],
                    same.err().unwrap_or_default()
                );
            }
        }
    }
    Ok(())
}

/// Compares stored rows: the same bits, but for Q8_0, Q4_0 and Q6_0 whose codes may be off where x / d lies between two
/// of them.
fn same_row(format: Format, found: &[u8], expected: &[u8], given: &[f32]) -> Result<(), String> {
    if found == expected {
        return Ok(());
    }
    let greatest = match format {
        Format::Q8_0 => 127.0,
        Format::Q4_0 => 8.0,
        Format::Q6_0 => 32.0,
        _ => return Err(format!("{found:02x?} instead of {expected:02x?}")),
    };
    let decoded = |bytes: &[u8]| {
        let mut values = vec![0.0; given.len()];
        decode(format, bytes, &mut values).expect("as long as the expected row");
        values
    };
    let (values, best) = (decoded(found), decoded(expected));
    for (at, given) in given.chunks(32).enumerate() {
        let step = given.iter().fold(0f32, |most, x| most.max(x.abs())) / greatest;
        for (i, x) in (32 * at..).zip(given) {
            // The other code where two are as near, and the next f16 of the scale.
            let allowed = (best[i] - x).abs() + step * (greatest / 1024.0 + 2e-3);
            if (values[i] - x).abs() > allowed {
                return Err(format!("{} instead of {x}, {allowed} off is allowed", values[i]));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::case::stored;

    #[test]
    fn q6_0_may_have_the_next_f16_as_its_scale_and_no_other() {
        let given: Vec<f32> = (0..32u8).map(|i| f32::from(i) * 0.37 - 5.0).collect();
        let expected = stored(Format::Q6_0, &given);
        for (ulps, is_right) in [(0, true), (1, true), (8, false)] {
            let mut other = expected.clone();
            other[0] = other[0].wrapping_add(ulps);
            assert_eq!(same_row(Format::Q6_0, &other, &expected, &given).is_ok(), is_right, "{ulps}");
        }
        let mut other = expected.clone();
        other[25] ^= 0x10;
        assert!(same_row(Format::Q6_0, &other, &expected, &given).is_err(), "another code");
    }

    #[test]
    fn q8_0_may_take_the_next_code_at_a_half_and_no_other() {
        let mut given = [0.0f32; 32];
        (given[0], given[1]) = (127.0, 3.5);
        let expected = stored(Format::Q8_0, &given);
        let mut other = expected.clone();
        other[3] ^= 7; // 4 becomes 3
        assert_eq!((expected[3], other[3]), (4, 3));
        assert!(same_row(Format::Q8_0, &other, &expected, &given).is_ok());
        other[3] = 5;
        assert!(same_row(Format::Q8_0, &other, &expected, &given).is_err());
        let f16 = stored(Format::F16, &given);
        assert!(same_row(Format::F16, &f16, &f16, &given).is_ok());
        assert!(same_row(Format::F16, &[0; 64], &f16, &given).is_err());
    }
}
