//! `sparsectl eval` against losses that are computed here from `sparsectl logits`, and `sparsectl inspect` on files
//! that are served and files that are not.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test")]

use serde_json::Value;
use sparsed_quant::Format;
use sparsed_quant::gguf::{Metadata, Value as Entry, Writer};
use sparsed_tests::{root, sparsectl, tiny::Tiny};
use std::path::Path;
use std::process::Command;

/// Runs the tool; answers its exit code, its JSON and what it said on standard error.
fn run(arguments: &[&str], paths: &[&Path]) -> (i32, Value, String) {
    let done = Command::new(sparsectl()).args(arguments).args(paths).output().unwrap();
    let json = serde_json::from_slice(&done.stdout).unwrap_or(Value::Null);
    (done.status.code().unwrap(), json, String::from_utf8(done.stderr).unwrap())
}

/// Mean of `ln sum exp(row) - row[next]` over a document, and over the second half of its scored tokens.
fn expected(model: &Path, ids: &[u32], top_k: &str) -> (f64, f64) {
    let answer = sparsed_tests::logits(model, ids, false, &["--act", "f32", "--top-k", top_k]);
    let vocab = answer.logits.len() / ids.len();
    let rows = answer.logits.chunks_exact(vocab).zip(&ids[1..]);
    let losses: Vec<f64> = rows
        .map(|(row, &next)| {
            let sum: f64 = row.iter().map(|&logit| f64::from(logit).exp()).sum();
            sum.ln() - f64::from(row[next as usize])
        })
        .collect();
    let mean = |losses: &[f64]| losses.iter().sum::<f64>() / losses.len() as f64;
    (mean(&losses), mean(&losses[losses.len() / 2..]))
}

#[test]
fn losses_and_ratios_are_those_of_the_logits() {
    let tiny = Tiny::open("v32");
    let dir = tempfile::tempdir().unwrap();
    let ids = dir.path().join("ids.json");
    let windows = [&tiny.ids[..40], &tiny.ids[40..80]];
    std::fs::write(&ids, format!("{:?}", &tiny.ids[..80])).unwrap();
    let arguments = ["eval", "--act", "f32", "--json", "--context", "40", "--top-k", "4,64", "--chunk", "7"];
    let (code, found, said) = run(&[&arguments[..], &["--ids"]].concat(), &[&ids, &tiny.gguf()]);
    assert_eq!(code, 0, "{said}");
    let table = &found["perplexity"][0];
    assert_eq!((table["windows"].as_u64(), table["scored_tokens"].as_u64()), (Some(2), Some(78)));
    let rows = table["rows"].as_array().unwrap();
    // 64 of 40 tokens is all of them: no row.
    assert_eq!(rows.iter().map(|row| row["top_k"].as_u64()).collect::<Vec<_>>(), [None, Some(4)]);
    let dense: Vec<_> = windows.iter().map(|ids| expected(&tiny.gguf(), ids, "0")).collect();
    let sparse: Vec<_> = windows.iter().map(|ids| expected(&tiny.gguf(), ids, "4")).collect();
    for (row, own) in rows.iter().zip([&dense, &sparse]) {
        let near = |found: &Value, expected: f64| assert!((found.as_f64().unwrap() - expected).abs() < 1e-9, "{row}");
        let mean = |of: fn(&(f64, f64)) -> f64, list: &[(f64, f64)]| f64::midpoint(of(&list[0]), of(&list[1]));
        for (part, of) in [("all", (|pair| pair.0) as fn(&(f64, f64)) -> f64), ("late", |pair| pair.1)] {
            near(&row[part]["cross_entropy"], mean(of, own));
            near(&row[part]["ratio"], (mean(of, own) - mean(of, &dense)).exp());
            // Two values: half of their distance.
            near(&row[part]["cross_entropy_error"], (of(&own[0]) - of(&own[1])).abs() / 2.0);
        }
    }
    let ratio = rows[1]["all"]["ratio"].as_f64().unwrap();
    assert!((ratio - 1.0).abs() > 1e-3, "4 of 40 tokens make a difference: {ratio}");
}

#[test]
fn the_default_model_recalls_what_a_window_has_lost() {
    let dir = tempfile::tempdir().unwrap();
    let text: Vec<String> = (0..400).map(|n| format!("Line {n} is about nothing in particular.\n")).collect();
    std::fs::write(dir.path().join("a.txt"), text.concat()).unwrap();
    let arguments = ["eval", "--json", "--context", "0", "--recall-lengths", "400", "--recall-prompts", "5"];
    let options = ["--recall-notes", "4", "--top-k", "128", "--chunk", "90"];
    let model = sparsed_tests::model("smollm2-135m-dsa.gguf");
    let recall = |more: &[&str]| {
        let arguments = [&arguments[..], &options, more, &["--text"]].concat();
        let (code, found, said) = run(&arguments, &[dir.path(), Path::new("--"), &model]);
        assert_eq!(code, 0, "{said}");
        (found, said)
    };
    let (found, said) = recall(&[]);
    let table = &found["recall"][0];
    assert_eq!((table["prompts"].as_u64(), table["contexts"].as_u64()), (Some(5), Some(2)));
    let rows = table["rows"].as_array().unwrap();
    let kinds: Vec<_> = rows.iter().map(|row| (row["attention"].as_str().unwrap(), row["size"].as_u64())).collect();
    assert_eq!(kinds, [("dense", None), ("sparse", Some(128)), ("window", Some(128))]);
    let digits: Vec<f64> = rows.iter().map(|row| row["digit_accuracy"].as_f64().unwrap()).collect();
    assert!(digits[0] >= 0.8 && digits[1] >= 0.8, "{digits:?}");
    assert!(digits[2] <= 0.4, "a window cannot know: {digits:?}");
    // What is known so far is said on the way: each text and each row.
    assert!(said.contains("recall at 400 tokens, k = 128: 2 of 2 contexts"), "{said}");
    assert_eq!(said.lines().filter(|line| line.contains("/5 ")).count(), 3, "{said}");
    assert_eq!(recall(&[]).0, found, "the same seed, the same figures");
    assert_eq!(recall(&["--recall-alone"]).0, found, "a text that questions share is as good as one for each");
    assert_ne!(recall(&["--seed", "2"]).0["recall"], found["recall"], "figures can differ");
}

#[test]
fn lengths_that_were_not_asked_for_and_that_the_text_does_not_fill_are_left_out() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("a.md"), "A short text of a few words.\n".repeat(10)).unwrap();
    let arguments = ["eval", "--json", "--context", "32", "--tokens", "32", "--text"];
    let model = sparsed_tests::model("smollm2-135m-dsa.gguf");
    let (code, found, said) = run(&arguments, &[dir.path(), Path::new("--"), &model]);
    assert_eq!(code, 0, "{said}");
    assert_eq!(found["recall"].as_array().map(Vec::len), Some(0));
    assert!(found["notes"][0].as_str().unwrap().contains("recall at 1024 tokens is left out"), "{found}");
}

#[test]
fn what_cannot_be_measured_is_said() {
    let tiny = Tiny::open("v32");
    let dir = tempfile::tempdir().unwrap();
    let file = |text: &str| {
        let path = dir.path().join("ids.json");
        std::fs::write(&path, text).unwrap();
        path
    };
    let failed = |arguments: &[&str], ids: &str| {
        let (code, _, said) = run(&[&["eval"], arguments, &["--ids"]].concat(), &[&file(ids), &tiny.gguf()]);
        assert_eq!(code, 1, "{said}");
        said
    };
    assert!(failed(&["--context", "9"], "[1, 2, 3]").contains("the text has 3 tokens"));
    assert!(failed(&["--context", "2"], "[1, 2, 70000]").contains("token 70000 is past the vocabulary"));
    assert!(failed(&["--recall-lengths", "1024"], "[1, 2]").contains("--recall-lengths"));
    assert!(failed(&["--context", "0"], "[1, 2]").contains("nothing to measure"));
    let (code, _, said) = run(&["eval", "--text"], &[dir.path(), Path::new("--"), &tiny.gguf()]);
    assert!(code == 1 && said.contains("no tokenizer"), "{said}");
    let dense = Tiny::open("v3");
    let (code, _, said) = run(&["eval", "--top-k", "4", "--ids"], &[&file("[1, 2]"), &dense.gguf()]);
    assert!(code == 1 && said.contains("no indexer"), "{said}");
}

#[test]
fn inspect_tells_sizes_and_memory_of_the_default_model() {
    let model = sparsed_tests::model("smollm2-135m-dsa.gguf");
    let (code, found, said) = run(&["inspect", "--json", "--context", "1000"], &[&model]);
    assert_eq!(code, 0, "{said}");
    assert_eq!((found["architecture"].as_str(), found["top_k"].as_u64()), (Some("deepseek32"), Some(512)));
    assert_eq!(found["tokenizer"]["tokens"].as_u64(), Some(49152));
    assert!(found["chat_template"] == true && found["refusals"].as_array().unwrap().is_empty());
    let bytes: u64 = found["formats"].as_object().unwrap().values().map(|one| one["bytes"].as_u64().unwrap()).sum();
    assert!(bytes < found["file_bytes"].as_u64().unwrap() && bytes > 100_000_000);
    let memory = &found["memory"];
    // 30 layers: 2 rows of 192 as f16 and an index row of 64 as q8_0; or all in f32.
    for (kind, latent, index) in [("default", 30 * 2 * 192 * 2, 30 * 68), ("exact", 30 * 2 * 192 * 4, 30 * 64 * 4)] {
        let kv = &memory[kind];
        assert_eq!(kv["latent_bytes_per_token"].as_u64(), Some(latent));
        assert_eq!(kv["index_bytes_per_token"].as_u64(), Some(index));
        // 1000 tokens are 16 blocks of 64.
        assert_eq!(kv["kv_bytes"].as_u64(), Some((latent + index) * 1024));
    }
}

#[test]
fn inspect_reads_a_file_that_is_not_served_and_says_why() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    let mut metadata = Metadata::new();
    metadata.set("general.architecture", Entry::String("mamba".to_owned()));
    let mut writer = Writer::new(metadata);
    let bytes = vec![0; writer.add("x", &[32, 2], Format::Q4_0).unwrap()];
    let mut out = writer.begin(std::fs::File::create(&path).unwrap()).unwrap();
    out.tensor(&bytes).unwrap();
    out.finish().unwrap();
    let (code, found, said) = run(&["inspect", "--json"], &[&path]);
    assert_eq!(code, 1);
    assert!(said.contains("m.gguf is not served: architecture 'mamba' is not supported"), "{said}");
    assert_eq!(found["formats"]["Q4_0"]["values"].as_u64(), Some(64));
    assert_eq!((&found["architecture"], &found["memory"]), (&Value::from("mamba"), &Value::Null));
    std::fs::write(&path, "no model").unwrap();
    let (code, found, said) = run(&["inspect", "--json"], &[&path]);
    assert!(code == 1 && found.is_null() && said.contains("m.gguf"), "{said}");
}

#[test]
fn inspect_finds_a_tensor_that_is_missing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("cut.gguf");
    sparsed_tests::tiny::rewrite(&root().join("tests/golden/tiny/v32/model.gguf"), &path, |mut tensors| {
        tensors.retain(|tensor| tensor.name != "blk.1.ffn_norm.weight");
        tensors
    });
    let (code, found, said) = run(&["inspect", "--json"], &[&path]);
    assert!(code == 1 && said.contains("blk.1.ffn_norm.weight"), "{said}");
    assert!(found["memory"]["default"]["kv_bytes"].as_u64().unwrap() > 0, "{found}");
}

#[test]
fn inspect_names_a_folders_tokenizer_even_where_the_model_is_not_served() {
    let (tiny, dir) = (root().join("tests/golden/tiny/v32"), tempfile::tempdir().unwrap());
    let vocab: serde_json::Map<String, Value> =
        ["a", "b", "ab", "c"].iter().zip(0..).map(|(name, id)| ((*name).to_owned(), Value::from(id))).collect();
    let tokenizer = serde_json::json!({
        "model": { "type": "BPE", "vocab": vocab, "merges": [["a", "b"]] },
        "pre_tokenizer": { "type": "ByteLevel", "add_prefix_space": false, "use_regex": true },
    });
    let write = |name: &str, json: &Value| std::fs::write(dir.path().join(name), json.to_string()).unwrap();
    std::fs::copy(tiny.join("model.safetensors"), dir.path().join("model.safetensors")).unwrap();
    let mut config: Value = serde_json::from_slice(&std::fs::read(tiny.join("config.json")).unwrap()).unwrap();
    write("config.json", &config);
    let said = |code| {
        let done = Command::new(sparsectl()).arg("inspect").arg(dir.path()).output().unwrap();
        assert_eq!(done.status.code(), Some(code));
        String::from_utf8(done.stdout).unwrap()
    };
    assert!(said(0).contains("tokenizer     none\n"), "ids alone: {}", said(0));
    write("tokenizer.json", &tokenizer);
    assert!(said(0).contains("tokenizer     tokenizer.json, 4 tokens\n"), "{}", said(0));
    config["hidden_act"] = Value::from("relu");
    write("config.json", &config);
    assert!(said(1).contains("tokenizer     tokenizer.json, 4 tokens\n"), "{}", said(1));
}

#[test]
fn inspect_looks_for_the_tensors_of_a_folder_and_counts_what_they_become() {
    let tiny = root().join("tests/golden/tiny/v32");
    let (code, found, said) = run(&["inspect", "--json"], &[&tiny]);
    assert_eq!(code, 0, "{said}");
    let memory = &found["memory"];
    let (mapped, made) =
        (memory["weights_mapped_bytes"].as_u64().unwrap(), memory["weights_made_bytes"].as_u64().unwrap());
    assert_eq!(memory["weights_bytes"].as_u64(), Some(mapped + made));
    let bytes: u64 = found["formats"].as_object().unwrap().values().map(|one| one["bytes"].as_u64().unwrap()).sum();
    // Experts are stacked and kv_b is split: made of what the files hold, number for number.
    assert!(made > 0 && mapped > 0 && mapped + made == bytes, "{memory} of {bytes}");
    let dir = tempfile::tempdir().unwrap();
    std::fs::copy(tiny.join("model.safetensors"), dir.path().join("model.safetensors")).unwrap();
    let text = std::fs::read(tiny.join("config.json")).unwrap();
    let mut config: Value = serde_json::from_slice(&text).unwrap();
    config["num_hidden_layers"] = Value::from(config["num_hidden_layers"].as_u64().unwrap() + 1);
    config.as_object_mut().unwrap().remove("mlp_layer_types");
    config.as_object_mut().unwrap().remove("layer_types");
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    let (code, _, said) = run(&["inspect", "--json"], &[dir.path()]);
    assert!(code == 1 && said.contains("blk.3.") && said.contains("is missing"), "{said}");
}

#[test]
fn the_bench_tells_each_number_of_sequences_and_each_depth_and_refuses_what_it_cannot_run() {
    let model = Tiny::open("v32").gguf();
    let bench = |arguments: &str| {
        let all = format!("bench --json -t 1 -r 1 {arguments} --model");
        run(&all.split(' ').collect::<Vec<_>>(), &[&model])
    };
    let (code, told, said) = bench("-p 8 -n 2 -s 1,3 -d 0,1088");
    assert_eq!(code, 0, "{said}");
    let key = |row: &Value| {
        (row["sequences"].as_u64().unwrap(), row["depth"].as_u64().unwrap(), row["kind"].as_str().unwrap().to_owned())
    };
    let rows: Vec<_> = told["results"].as_array().unwrap().iter().map(key).collect();
    let all = [1, 3].into_iter().flat_map(|sequences| [0, 1088].map(|depth| (sequences, depth)));
    let all: Vec<_> = all.flat_map(|(s, d)| ["prefill", "decode"].map(|kind| (s, d, kind.to_owned()))).collect();
    assert_eq!(rows, all);
    let (code, _, said) = bench("-s 129");
    assert!(code == 2 && said.contains("1..=128"), "{said}");
    let (code, _, said) = bench("-p 0 -n 0");
    assert!(code == 1 && said.contains("-p or -n"), "{said}");
}
