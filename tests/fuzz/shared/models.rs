//! Models whose descriptions a fuzzer writes: a GGUF with changed metadata, and a folder with its index and FP8 blocks.
//!
//! Their tensors have the names and shapes of a tiny model of `tests/golden` and are holes of zeros in files under the
//! system's temporary folder, so each is the smallest change of a model that is served.

use sparsed_model::{Model, ModelError, ModelSpec, ProgramOptions};
use sparsed_quant::gguf::{Array, Gguf, Metadata, Value, Writer};
use std::fmt::Write as _;
use std::fs::File;
use std::path::{Path, PathBuf};

const GGUFS: [(&str, &[u8]); 3] = [
    ("v32", include_bytes!("../../golden/tiny/v32/model.gguf")),
    ("glm52", include_bytes!("../../golden/tiny/glm52/model.gguf")),
    ("v2", include_bytes!("../../golden/tiny/v2/model.gguf")),
];
const CONFIG: &str = include_str!("../../golden/tiny/v32/config.json");
const SAFETENSORS: &[u8] = include_bytes!("../../golden/tiny/v32/model.safetensors");
/// Rows and columns under one FP8 scale.
const BLOCK: u64 = 128;

/// Opens what is at `path` as far as a device would need it.
///
/// # Panics
/// When a specification contradicts itself.
pub fn open(path: &Path) -> Result<(), ModelError> {
    let model = Model::open(path)?;
    check(model.spec());
    model.program(&ProgramOptions::default()).map(drop)
}

/// What holds of every specification that a reader gives out.
///
/// # Panics
/// When it does not hold.
pub fn check(spec: &ModelSpec) {
    let layers = spec.n_layers as usize;
    assert!(layers > 0 && spec.vocab_size > 0 && spec.n_heads.is_multiple_of(spec.group_count));
    assert_eq!(spec.rope_frequencies.len() * 2, spec.rope_row as usize);
    assert!(spec.rope_frequencies.iter().all(|frequency| frequency.is_finite()) && spec.softmax_scale.is_finite());
    if let Some(indexer) = &spec.indexer {
        assert!(indexer.full.len() == layers && indexer.full[0] && indexer.rope_dim <= indexer.head_dim);
    }
    if let Some(moe) = &spec.moe {
        assert!(moe.layers.len() == layers && moe.n_active <= moe.n_experts / moe.n_groups * moe.n_groups_kept);
    }
}

/// A folder of this process.
///
/// # Panics
/// When it cannot be made.
pub fn scratch(name: &str) -> PathBuf {
    let path = std::env::temp_dir().join(format!("sparsed-fuzz-{name}-{}", std::process::id()));
    std::fs::create_dir_all(&path).expect("a temporary folder");
    path
}

/// Writes a GGUF as `edits` says. The first line names what it is made of (`v32`, `glm52`, `v2`); each further one is
/// `KEY KIND VALUE`, where the kind `-` takes the key away. A key without an architecture gets the file's.
///
/// # Panics
/// When it cannot be written.
pub fn write_gguf(path: &Path, edits: &str) {
    let mut lines = edits.lines();
    let name = lines.next().unwrap_or_default();
    let (_, base) = GGUFS.iter().find(|(known, _)| *known == name).unwrap_or(&GGUFS[0]);
    let base = Gguf::parse(base).expect("a fixture");
    let mut entries: Vec<(String, Value)> =
        base.metadata().iter().map(|(key, value)| (key.to_owned(), value.clone())).collect();
    let architecture = base.metadata().str("general.architecture").ok().flatten().unwrap_or_default();
    for line in lines {
        let mut words = line.splitn(3, ' ');
        let (key, kind, text) =
            (words.next().unwrap_or_default(), words.next().unwrap_or_default(), words.next().unwrap_or_default());
        let whole = ["general.", "tokenizer.", "split."].iter().any(|prefix| key.starts_with(prefix));
        let key = if whole { key.to_owned() } else { format!("{architecture}.{key}") };
        entries.retain(|(known, _)| *known != key);
        if let Some(value) = value(kind, text) {
            entries.push((key, value));
        }
    }
    let mut metadata = Metadata::new();
    entries.into_iter().for_each(|(key, value)| metadata.set(key, value));
    let mut writer = Writer::new(metadata);
    for info in base.tensors() {
        writer.add(&info.name, &info.dims, info.format).expect("as in the fixture");
    }
    let file = File::create(path).expect("a temporary file");
    writer.begin(file).and_then(|data| data.skip()).expect("there is room for a header");
}

fn value(kind: &str, text: &str) -> Option<Value> {
    let list = text.split(' ');
    Some(match kind {
        "u8" => Value::U8(text.parse().ok()?),
        "u32" => Value::U32(text.parse().ok()?),
        "i32" => Value::I32(text.parse().ok()?),
        "u64" => Value::U64(text.parse().ok()?),
        "f32" => Value::F32(text.parse().ok()?),
        "bool" => Value::Bool(text == "true"),
        "str" => Value::String(text.to_owned()),
        "bools" => Value::Array(Array::Bool(list.map(|word| word == "true").collect())),
        "i32s" => Value::Array(Array::I32(list.filter_map(|word| word.parse().ok()).collect())),
        "u32s" => Value::Array(Array::U32(list.filter_map(|word| word.parse().ok()).collect())),
        "strs" => Value::Array(Array::String(list.map(str::to_owned).collect())),
        _ => return None,
    })
}

/// Writes the two shards of a folder: matrices in FP8 with blocks of 128, those of feed-forward layers in the second.
///
/// # Panics
/// When they cannot be written.
pub fn write_shards(folder: &Path) {
    let length = SAFETENSORS.first_chunk::<8>().map_or(0, |n| u64::from_le_bytes(*n));
    let header = &SAFETENSORS[8..8 + usize::try_from(length).expect("a fixture")];
    let header: serde_json::Map<String, serde_json::Value> = serde_json::from_slice(header).expect("a fixture");
    for (file, feed_forward) in [("a.safetensors", false), ("b.safetensors", true)] {
        let (mut text, mut end) = (String::from("{"), 0);
        let mut add = |name: &str, dtype: &str, shape: &str, bytes: u64| {
            let comma = if end == 0 { "" } else { "," };
            let written = write!(
                text,
                r#"{comma}"{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{end},{}]}}"#,
                end + bytes
            );
            written.expect("writing to a String cannot fail");
            end += bytes;
        };
        for (name, info) in header.iter().filter(|(name, info)| {
            name.contains(".mlp.") == feed_forward && info.get("shape").is_some_and(serde_json::Value::is_array)
        }) {
            let shape: Vec<u64> = serde_json::from_value(info["shape"].clone()).expect("a fixture");
            let values: u64 = shape.iter().product();
            let small = shape.len() == 1 || name.contains("embed") || name.contains("lm_head");
            if small || name.ends_with("gate.weight") {
                add(name, "F32", &info["shape"].to_string(), values * 4);
            } else {
                let scales: Vec<u64> = shape.iter().map(|side| side.div_ceil(BLOCK)).collect();
                add(name, "F8_E4M3", &info["shape"].to_string(), values);
                let bytes = scales.iter().product::<u64>() * 4;
                add(&format!("{name}_scale_inv"), "F32", &format!("{scales:?}"), bytes);
            }
        }
        text.push('}');
        let head = [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat();
        std::fs::write(folder.join(file), &head).expect("a temporary file");
        let file = File::options().write(true).open(folder.join(file)).expect("it was just written");
        file.set_len(head.len() as u64 + end).expect("a hole");
    }
}

/// Writes what describes the shards: an index and, after a NUL byte, the value of `quantization_config`.
///
/// # Panics
/// When it cannot be written.
pub fn write_index(folder: &Path, input: &[u8]) {
    let mut parts = input.splitn(2, |byte| *byte == 0);
    let (index, quantisation) =
        (parts.next().unwrap_or_default(), parts.next().unwrap_or(br#"{"quant_method":"fp8"}"#));
    let rest = CONFIG.trim_start().strip_prefix('{').expect("a fixture");
    let config = [br#"{"quantization_config":"#, quantisation, b",", rest.as_bytes()].concat();
    std::fs::write(folder.join("config.json"), config).expect("a temporary file");
    std::fs::write(folder.join("model.safetensors.index.json"), index).expect("a temporary file");
}
