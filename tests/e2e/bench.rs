//! `sparsectl bench`, from which every figure of speed comes: it measures what it says, behind the rows that it says.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test")]

use serde_json::Value;
use sparsed_backend::{Backend, OpenOptions, Plugin, SearchPath};
use sparsed_engine::{DeviceModel, LoadOptions, Lockstep, Rows};
use sparsed_kv::{BLOCK_TOKENS, blocks_for};
use sparsed_model::{Model, ProgramOptions};
use std::collections::{BTreeMap, HashSet};
use std::path::PathBuf;
use std::process::Command;

/// Selects 12 of what it reads, by keys of its three layers' indexers.
fn tiny() -> PathBuf {
    sparsed_tests::root().join("tests/golden/tiny/v32/model.gguf")
}

/// What a row is a measurement of: its kind, then tokens, depth and sequences.
type Row = (String, [Option<u64>; 3]);

/// What the tool says of the tiny model, and its rows.
fn measured(arguments: &[&str]) -> (Value, Vec<Row>) {
    let mut command = Command::new(sparsed_tests::sparsectl());
    command.args(["bench", "--json", "-p", "8", "-n", "2", "-r", "1", "-t", "1", "--model"]).arg(tiny());
    let done = command.args(arguments).output().unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let said: Value = serde_json::from_slice(&done.stdout).unwrap();
    let row = |row: &Value| {
        assert!(["tokens_per_second", "ms_per_token"].iter().all(|rate| row[rate].as_f64() > Some(0.0)), "{row}");
        (row["kind"].as_str().unwrap().to_owned(), ["n", "depth", "sequences"].map(|key| row[key].as_u64()))
    };
    let rows = said["results"].as_array().unwrap().iter().map(row).collect();
    (said, rows)
}

#[test]
fn the_tool_measures_prompts_and_answers_behind_each_depth_for_each_number_of_sequences() {
    let (said, rows) = measured(&["-d", "1500,100", "-s", "1,2"]);
    assert_eq!((said["top_k"].as_u64(), said["depth_synthetic_from"].as_u64()), (Some(12), Some(1024)));
    let of = |sequences: u64| {
        [100, 1500].into_iter().flat_map(move |depth| {
            [("prefill", 8), ("decode", 2)].map(|(kind, n)| (kind.to_owned(), [n, depth, sequences].map(Some)))
        })
    };
    assert_eq!(rows, of(1).chain(of(2)).collect::<Vec<_>>());
}

#[test]
fn the_tool_says_that_attention_reads_everything_where_it_is_told_to() {
    let (said, rows) = measured(&["-d", "1500", "--dense"]);
    assert_eq!((&said["top_k"], rows.len()), (&Value::Null, 2), "{said}");
    assert!(rows.iter().all(|(_, [_, depth, _])| *depth == Some(1500)), "{rows:?}");
}

#[test]
fn a_cache_that_is_filled_with_copies_has_the_first_rows_again_and_again_with_their_keys() {
    const READ: u32 = 2 * BLOCK_TOKENS;
    const MORE: u32 = 3 * BLOCK_TOKENS + 7;
    let folder = sparsed_tests::root().join("target/release/plugins");
    let found = SearchPath::only(vec![folder]).scan().select(Some("cpu")).unwrap().clone();
    let plugin = Plugin::load(&found, &BTreeMap::new()).unwrap();
    let backend = Backend::open(&plugin, 0, &OpenOptions { n_threads: 1, ..OpenOptions::default() }).unwrap();
    let n_blocks = 2 * blocks_for(READ + MORE);
    let options = LoadOptions {
        program: ProgramOptions::default(),
        max_context: READ + MORE,
        max_step_tokens: 2 * READ,
        max_seqs: 2,
        max_logits: 2,
        n_blocks,
        n_fast: n_blocks,
        slow_cache_bytes: 0,
    };
    let mut device = DeviceModel::load(&backend, &Model::open(&tiny()).unwrap(), options, &mut |_, _| {}).unwrap();
    let mut lockstep = Lockstep::new(&device, 2);
    // Of 131 that the model has: no block has the tokens of another.
    let tokens: Vec<u32> = (0..2 * READ).map(|i| i % 131).collect();
    lockstep.step(&mut device, &tokens, Rows::Last).unwrap();
    lockstep.repeat(&mut device, MORE).unwrap();
    assert_eq!(lockstep.n_tokens(), READ + MORE);
    let rows = lockstep.export(&mut device).unwrap();
    // An image is the keys and rows of all layers.
    let images: Vec<&[u8]> = rows.images().collect();
    assert_eq!(images.len(), 6);
    assert_eq!(images[..2].iter().collect::<HashSet<_>>().len(), 2, "two blocks that were read");
    let copied = |image: &&[u8]| images[..2].iter().position(|read| read == image);
    assert_eq!(images[2..].iter().map(copied).collect::<Vec<_>>(), [Some(0), Some(1), Some(0), Some(1)]);
}
