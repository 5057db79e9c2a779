//! Every weight format that a device says it takes, through the ABI: LINEAR and EMBED against decoded weights in f64.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test")]

use sparsed_abi::{Blob, DIM_TOKENS, DT_F32, OP_EMBED, OP_LINEAR, OpSpec, ProgramBuilder, SpdBucket, StepArrays};
use sparsed_backend::{Backend, OpenOptions, Plugin, SearchPath, WeightUpload};
use sparsed_quant::{Format, decode};
use std::collections::BTreeMap;

const ROWS: u16 = 24;
const COLS: u16 = 512;
const TOKENS: [u32; 5] = [0, 23, 7, 7, 16];

/// A small generator's bytes.
struct Noise(u32);

impl Noise {
    fn byte(&mut self) -> u8 {
        self.0 = self.0.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        self.0.to_le_bytes()[3]
    }
}

/// Random blocks whose scales are ordinary numbers: f16 fields are set to about 0.01, every other bit is free.
fn blocks(format: Format, noise: &mut Noise) -> Vec<u8> {
    let n = usize::from(ROWS) * usize::from(COLS) / format.block_values();
    let scales: &[usize] = match format {
        Format::Q8_0 | Format::Q4_0 | Format::Q5_0 | Format::IQ4_NL | Format::IQ4_XS => &[0],
        Format::Q4_1 | Format::Q5_1 | Format::Q4_K | Format::Q5_K => &[0, 2],
        Format::Q2_K => &[80, 82],
        Format::Q3_K => &[108],
        Format::Q6_K => &[208],
        _ => &[],
    };
    let mut bytes = Vec::new();
    for _ in 0..n {
        let mut block: Vec<u8> = (0..format.block_bytes()).map(|_| noise.byte()).collect();
        for &at in scales {
            block[at + 1] = 0x21 | noise.byte() & 0x80; // about 0.01, either sign
        }
        match format {
            Format::F32 => block[3] = 0x3d | noise.byte() & 0x80,
            Format::F16 => block[1] = 0x21 | noise.byte() & 0x80,
            Format::BF16 => block[1] = 0x3d | noise.byte() & 0x80,
            Format::MXFP4 => block[0] = 120 + noise.byte() % 8,
            Format::F8E4M3 => block[0] &= 0xf7, // never NaN
            _ => {}
        }
        bytes.extend(block);
    }
    bytes
}

/// What the device makes of a weight: `[tokens, ROWS]` of LINEAR over what EMBED gives, and that, `[tokens, COLS]`.
fn compute(backend: &Backend, format: Format, bytes: &[u8]) -> (Vec<f32>, Vec<f32>) {
    let upload = WeightUpload {
        file: None,
        name: format.name().to_owned(),
        dtype: format.ggml_id(),
        batch: 1,
        rows: ROWS.into(),
        cols: COLS.into(),
        bytes: bytes.to_vec().into(),
    };
    let weight = backend.upload(&upload).unwrap();
    let mut builder = ProgramBuilder::new();
    let w = builder.weight(0, format.ggml_id(), &[ROWS.into(), COLS.into()]);
    let x = builder.activation(DT_F32, &[DIM_TOKENS, COLS.into()]);
    let y = builder.activation(DT_F32, &[DIM_TOKENS, ROWS.into()]);
    builder.op(OpSpec { kind: OP_EMBED, inputs: &[Some(w)], outputs: &[Some(x)], ..OpSpec::default() });
    builder.op(OpSpec { kind: OP_LINEAR, inputs: &[Some(x), Some(w)], outputs: &[Some(y)], ..OpSpec::default() });
    builder.mark_output(x);
    builder.mark_output(y);
    let count = u32::try_from(TOKENS.len()).unwrap();
    let bucket = SpdBucket { max_tokens: count, max_seqs: 1, max_logits: 1, max_context: count };
    let plan = backend.compile(&builder.finish(0), &[&weight], &[], bucket).unwrap();
    let positions: Vec<u32> = (0..count).collect();
    let step = StepArrays {
        step_id: 0,
        flags: 0,
        tokens: &TOKENS,
        positions: &positions,
        slots: &[0, 1, 2, 3, 4],
        seq_offsets: &[0, count],
        contexts: &[count],
        block_offsets: &[0, 1],
        block_ids: &[0],
        rows: &[],
    };
    let mut out = Blob::zeroed(usize::try_from(plan.info().out_bytes).unwrap());
    let input = Blob::zeroed(64);
    backend.queue().unwrap().run(&plan, &step.encode(), input.as_bytes(), out.as_bytes_mut()).unwrap();
    let values: Vec<f32> = out.as_bytes().as_chunks::<4>().0.iter().map(|chunk| f32::from_le_bytes(*chunk)).collect();
    // The outputs lie one after the other, each aligned; both sizes here are multiples of every alignment in use.
    let x = TOKENS.len() * usize::from(COLS);
    let y = values[x..].iter().copied().skip(padding(x)).take(TOKENS.len() * usize::from(ROWS)).collect();
    (values[..x].to_vec(), y)
}

fn padding(values: usize) -> usize {
    (4 * values).next_multiple_of(64) / 4 - values
}

#[test]
fn every_format_that_the_cpu_plugin_announces_computes_what_its_decoder_says() {
    check_formats("cpu", 17);
}

#[test]
fn every_format_that_the_c_example_announces_computes_what_its_decoder_says() {
    check_formats("minimal", 6);
}

fn check_formats(plugin: &str, at_least: usize) {
    let plugins = sparsed_tests::root().join("target/release/plugins");
    let scan = SearchPath::only(vec![plugins]).scan();
    let plugin = Plugin::load(scan.select(Some(plugin)).unwrap(), &BTreeMap::new()).unwrap();
    let backend = Backend::open(&plugin, 0, &OpenOptions { n_threads: 1, mem_budget: 0 }).unwrap();
    let announced: Vec<u32> = (0..256).filter(|&dtype| backend.info().takes_weights(dtype)).collect();
    assert!(announced.len() >= at_least, "{announced:?}");
    for dtype in announced {
        let format = Format::from_dtype(dtype).unwrap();
        let bytes = blocks(format, &mut Noise(dtype + 1));
        let mut weights = vec![0.0; usize::from(ROWS) * usize::from(COLS)];
        decode(format, &bytes, &mut weights).unwrap();
        let rows: Vec<&[f32]> = weights.chunks_exact(COLS.into()).collect();
        let (x, y) = compute(&backend, format, &bytes);
        for (t, &token) in TOKENS.iter().enumerate() {
            let x = &x[t * usize::from(COLS)..(t + 1) * usize::from(COLS)];
            assert!(x == rows[token as usize], "{}: EMBED of token {token}", format.name());
            let products = |row: &[f32]| -> (f64, f64) {
                let products = row.iter().zip(x).map(|(w, x)| f64::from(*w) * f64::from(*x));
                products.fold((0.0, 0.0), |(sum, size), product| (sum + product, size + product.abs()))
            };
            for (o, row) in rows.iter().enumerate() {
                let ((exact, size), found) = (products(row), f64::from(y[t * usize::from(ROWS) + o]));
                let name = format.name();
                assert!(size > 0.0, "{name}: the weights are not all 0");
                assert!((found - exact).abs() <= 1e-6 * size, "{name}: value {o} is {found}, not {exact}");
            }
        }
    }
}
