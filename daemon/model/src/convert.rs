//! How does a Llama file become a DSA file? Exactly: no number of the base changes.
//!
//! Grouped-query attention is MLA without compression: the latent row is all value heads side by side, the rope row all
//! key heads, and `attention.group_count` says that each query head sees its group's slice. Key rows in a Llama GGUF
//! are already in the interleaved order of DeepSeek's RoPE, so rows of `attn_v` and `attn_k` are copied as bytes. The
//! trained indexer is added. Keys are llama.cpp's `deepseek32` and four of our own, each with a default that means
//! "genuine DeepSeek".

use crate::ModelError;
use crate::new_file::NewFile;
use crate::spec::{Architecture, ModelSpec};
use crate::weights::{Tensor, Weights};
use safetensors::{Dtype, SafeTensors};
use sparsed_quant::Format;
use sparsed_quant::gguf::{DataWriter, Metadata, Value, Writer};
use std::path::Path;

/// Largest indexer file in bytes.
const INDEXER_BYTES_MAX: u64 = 4 << 30;
/// Most index heads, and the widest index key.
const INDEX_DIM_MAX: u32 = 1 << 12;
/// An indexer's tensors in each layer.
const INDEXER_PARTS: u32 = 5;

/// How a base is converted.
#[derive(Clone, Copy, Debug)]
pub struct ConvertOptions {
    /// Of the indexer's two matrices: F16 or Q8_0. Its head weights stay F16, its norms F32.
    pub indexer_format: Format,
    /// Tokens that attention selects.
    pub top_k: u32,
}

impl Default for ConvertOptions {
    fn default() -> Self {
        Self { indexer_format: Format::Q8_0, top_k: 512 }
    }
}

/// What was written.
#[derive(Clone, Copy, Debug)]
pub struct ConvertReport {
    /// Layers.
    pub n_layers: u32,
    /// Index heads.
    pub index_heads: u32,
    /// Width of an index key.
    pub index_head_dim: u32,
    /// Size of the new file.
    pub file_bytes: u64,
}

/// A tensor on its way into the new file.
struct Planned {
    name: String,
    dims: Vec<u64>,
    format: Format,
    parts: Vec<bytes::Bytes>,
}

/// Writes `out`: the base with this indexer. `progress` hears (bytes written, bytes in all). The file appears whole or
/// not at all.
///
/// # Errors
/// What in the base or the indexer does not fit, or what the disk said.
pub fn convert(
    base: &Path,
    indexer: &Path,
    options: &ConvertOptions,
    out: &Path,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<ConvertReport, ModelError> {
    let weights = Weights::open(base)?;
    let spec = ModelSpec::parse(&weights)?;
    if spec.architecture != Architecture::Llama {
        return Err(ModelError::Convert(format!("{} is a DSA or MLA model already", base.display())));
    }
    if !matches!(options.indexer_format, Format::F16 | Format::Q8_0) {
        return Err(ModelError::Convert(format!("indexer type {}: f16 or q8_0", options.indexer_format.name())));
    }
    let bytes = read_limited(indexer)?;
    let file =
        SafeTensors::deserialize(&bytes).map_err(|e| ModelError::Convert(format!("{}: {e}", indexer.display())))?;
    let shape = IndexerShape::find(&file)?;
    let (found, wanted) = (file.len(), spec.n_layers * INDEXER_PARTS);
    if found > wanted as usize {
        let what = format!("the indexer has {found} tensors, {} layers need {wanted}", spec.n_layers);
        return Err(ModelError::Convert(format!("{what}: it was trained for another base")));
    }
    let base_metadata = weights.metadata().expect("a Llama model is read from a GGUF only");
    let mut planned = vec![rope_factors(&spec, f64::from(freq_base(base_metadata)?))];
    for name in weights.names() {
        plan_tensor(&weights, &spec, name, &mut planned)?;
    }
    for layer in 0..spec.n_layers {
        plan_indexer(&file, &spec, &shape, layer, options, &mut planned)?;
    }
    let metadata = metadata(base_metadata, &spec, &shape, options)?;
    let file_bytes = write(out, metadata, &planned, progress)?;
    Ok(ConvertReport { n_layers: spec.n_layers, index_heads: shape.heads, index_head_dim: shape.width, file_bytes })
}

fn read_limited(path: &Path) -> Result<Vec<u8>, ModelError> {
    let io = |source| ModelError::Io { path: path.to_owned(), source };
    let size = std::fs::metadata(path).map_err(io)?.len();
    if size > INDEXER_BYTES_MAX {
        return Err(ModelError::Convert(format!("{}: {size} bytes, the limit is {INDEXER_BYTES_MAX}", path.display())));
    }
    std::fs::read(path).map_err(io)
}

/// The indexer's shape, read from its first layer.
struct IndexerShape {
    heads: u32,
    width: u32,
    rope: u32,
}

impl IndexerShape {
    fn find(file: &SafeTensors<'_>) -> Result<Self, ModelError> {
        let shape = |name: &str| {
            let tensor = file.tensor(name).map_err(|_| ModelError::Convert(format!("the indexer lacks {name}")))?;
            let dims: Option<Vec<u32>> = tensor.shape().iter().map(|&n| u32::try_from(n).ok()).collect();
            dims.filter(|dims| dims.len() == 2 && !dims.contains(&0))
                .ok_or_else(|| ModelError::Convert(format!("{name} is not a matrix")))
        };
        let heads = shape("blk.0.indexer.proj.weight")?[0];
        let width = shape("blk.0.indexer.attn_k.weight")?[0];
        if heads > INDEX_DIM_MAX || width > INDEX_DIM_MAX || !width.is_multiple_of(4) {
            let limit = format!("at most {INDEX_DIM_MAX} each, and the key's width a multiple of 4");
            return Err(ModelError::Convert(format!("the indexer has {heads} heads of {width}: {limit}")));
        }
        // The rotated width is not in the tensors; half of the key is how these indexers are trained.
        Ok(Self { heads, width, rope: width / 2 })
    }
}

fn plan_tensor(weights: &Weights, spec: &ModelSpec, name: &str, planned: &mut Vec<Planned>) -> Result<(), ModelError> {
    let tensor = weights.find(name)?.expect("the name comes from the file");
    let mut keep = |name: String, dims: Vec<u64>, format: Format, parts: Vec<bytes::Bytes>| {
        planned.push(Planned { name, dims, format, parts });
    };
    if name == "rope_freqs.weight" {
        return Ok(()); // its factors are in the new ones
    }
    let Some((layer, part)) = name.strip_prefix("blk.").and_then(|rest| rest.split_once('.')) else {
        keep(name.to_owned(), tensor.dims, tensor.format, vec![tensor.bytes]);
        return Ok(());
    };
    match part {
        "attn_k.weight" => {} // goes with attn_v
        "attn_v.weight" => {
            let (hidden, row) = (spec.hidden_size, spec.kv_lora_rank);
            let v = weights.get(name, &[hidden, row])?;
            let k: Tensor = weights.get(&format!("blk.{layer}.attn_k.weight"), &[hidden, row])?;
            let dims = |rows: u32| vec![hidden.into(), rows.into()];
            if v.format == k.format {
                keep(format!("blk.{layer}.attn_kv_a_mqa.weight"), dims(2 * row), v.format, vec![v.bytes, k.bytes]);
            } else {
                keep(format!("blk.{layer}.attn_kv_a.weight"), dims(row), v.format, vec![v.bytes]);
                keep(format!("blk.{layer}.attn_k_rope.weight"), dims(row), k.format, vec![k.bytes]);
            }
        }
        "attn_norm.weight" | "attn_q.weight" | "attn_output.weight" | "ffn_norm.weight" | "ffn_gate.weight"
        | "ffn_up.weight" | "ffn_down.weight" => keep(name.to_owned(), tensor.dims, tensor.format, vec![tensor.bytes]),
        _ => {
            return Err(ModelError::Convert(format!("the base has {name}, which the converted form has no place for")));
        }
    }
    Ok(())
}

/// `rope_freqs`: plain frequency over wanted frequency, so that every group of the row turns as the base's heads do.
fn rope_factors(spec: &ModelSpec, base: f64) -> Planned {
    let row = f64::from(spec.rope_row);
    let factor = |(i, wanted): (usize, &f64)| {
        #[expect(
            clippy::cast_precision_loss,
            clippy::cast_possible_truncation,
            reason = "a small index; stored single"
        )]
        let factor = (base.powf(-2.0 * i as f64 / row) / wanted) as f32;
        factor.to_le_bytes()
    };
    let bytes: Vec<u8> = spec.rope_frequencies.iter().enumerate().flat_map(factor).collect();
    let dims = vec![u64::from(spec.rope_row) / 2];
    Planned { name: "rope_freqs.weight".to_owned(), dims, format: Format::F32, parts: vec![bytes.into()] }
}

/// The base of unscaled frequencies, as the new file will carry it.
fn freq_base(base: &Metadata) -> Result<f32, ModelError> {
    Ok(base.f32("llama.rope.freq_base")?.unwrap_or(10000.0))
}

fn plan_indexer(
    file: &SafeTensors<'_>,
    spec: &ModelSpec,
    shape: &IndexerShape,
    layer: u32,
    options: &ConvertOptions,
    planned: &mut Vec<Planned>,
) -> Result<(), ModelError> {
    let (hidden, width, heads) = (spec.hidden_size, shape.width, shape.heads);
    let parts: [(&str, &[u32], Format); 5] = [
        ("attn_q_b.weight", &[hidden, heads * width], options.indexer_format),
        ("attn_k.weight", &[hidden, width], options.indexer_format),
        ("k_norm.weight", &[width], Format::F32),
        ("k_norm.bias", &[width], Format::F32),
        ("proj.weight", &[hidden, heads], Format::F16),
    ];
    for (part, dims, format) in parts {
        let name = format!("blk.{layer}.indexer.{part}");
        let tensor = file.tensor(&name).map_err(|_| ModelError::Convert(format!("the indexer lacks {name}")))?;
        let wanted: Vec<usize> = dims.iter().rev().map(|&n| n as usize).collect();
        if tensor.shape() != wanted {
            return Err(ModelError::Convert(format!("{name} is {:?}, the base needs {wanted:?}", tensor.shape())));
        }
        let values = decode(&name, tensor.dtype(), tensor.data())?;
        let quant = |source| ModelError::Quant { name: name.clone(), source };
        let row_bytes = format.row_bytes(dims[0] as usize).map_err(quant)?;
        let mut bytes = vec![0; row_bytes * values.len() / dims[0] as usize];
        sparsed_quant::encode(format, &values, &mut bytes).map_err(quant)?;
        let dims = dims.iter().map(|&n| n.into()).collect();
        planned.push(Planned { name, dims, format, parts: vec![bytes.into()] });
    }
    Ok(())
}

fn decode(name: &str, dtype: Dtype, bytes: &[u8]) -> Result<Vec<f32>, ModelError> {
    let format = match dtype {
        Dtype::F32 => Format::F32,
        Dtype::F16 => Format::F16,
        Dtype::BF16 => Format::BF16,
        other => return Err(ModelError::Convert(format!("{name} is {other:?}, the indexer must be F32, F16 or BF16"))),
    };
    let mut values = vec![0.0; bytes.len() / format.block_bytes()];
    let source = sparsed_quant::decode(format, bytes, &mut values);
    source.map_err(|source| ModelError::Quant { name: name.to_owned(), source })?;
    Ok(values)
}

fn metadata(
    base: &Metadata,
    spec: &ModelSpec,
    shape: &IndexerShape,
    options: &ConvertOptions,
) -> Result<Metadata, ModelError> {
    let mut metadata = Metadata::new();
    metadata.set("general.architecture", Value::String("deepseek32".to_owned()));
    for (key, value) in base.iter().filter(|(key, _)| !key.starts_with("llama.") && *key != "general.architecture") {
        metadata.set(key, value.clone());
    }
    let mut set = |key: &str, value: Value| metadata.set(format!("deepseek32.{key}"), value);
    let row = spec.kv_lora_rank;
    for (key, n) in [
        ("block_count", spec.n_layers),
        ("context_length", spec.context_length),
        ("embedding_length", spec.hidden_size),
        ("feed_forward_length", spec.feed_forward),
        ("vocab_size", spec.vocab_size),
        ("leading_dense_block_count", spec.n_layers),
        ("expert_count", 0),
        ("attention.head_count", spec.n_heads),
        ("attention.head_count_kv", 1),
        ("attention.q_lora_rank", 0),
        ("attention.kv_lora_rank", row),
        ("attention.key_length", row + spec.rope_row),
        ("attention.value_length", row),
        ("attention.key_length_mla", spec.rope_row),
        ("attention.value_length_mla", spec.v_head_dim),
        ("attention.group_count", spec.group_count),
        ("attention.indexer.head_count", shape.heads),
        ("attention.indexer.key_length", shape.width),
        ("attention.indexer.top_k", options.top_k),
        ("attention.indexer.rope_dimension_count", shape.rope),
        ("rope.dimension_count", spec.rope_row),
    ] {
        set(key, Value::U32(n));
    }
    set("rope.freq_base", Value::F32(freq_base(base)?));
    set("attention.layer_norm_rms_epsilon", Value::F32(spec.rms_norm_eps));
    set("attention.scale", Value::F32(spec.softmax_scale));
    set("attention.kv_a_norm", Value::Bool(false));
    Ok(metadata)
}

fn write(
    out: &Path,
    metadata: Metadata,
    planned: &[Planned],
    progress: &mut dyn FnMut(u64, u64),
) -> Result<u64, ModelError> {
    let mut writer = Writer::new(metadata);
    for tensor in planned {
        let quant = |source| ModelError::Quant { name: tensor.name.clone(), source };
        writer.add(&tensor.name, &tensor.dims, tensor.format).map_err(quant)?;
    }
    let io = |source| ModelError::Io { path: out.to_owned(), source };
    let (new, sink) = NewFile::create(out).map_err(io)?;
    let mut data: DataWriter<_> = writer.begin(sink).map_err(io)?;
    let size = |tensor: &Planned| tensor.parts.iter().map(|part| part.len() as u64).sum::<u64>();
    let (total, mut done) = (planned.iter().map(size).sum(), 0);
    for tensor in planned {
        let parts: Vec<&[u8]> = tensor.parts.iter().map(|part| &part[..]).collect();
        data.parts(&parts).map_err(io)?;
        done += size(tensor);
        progress(done, total);
    }
    new.arrive(data.finish().map_err(io)?).map_err(io)
}

#[cfg(test)]
mod tests {
    use super::*;
    use safetensors::tensor::TensorView;
    use std::fs::File;
    use std::path::PathBuf;
    use std::sync::atomic::{AtomicU32, Ordering};

    const HIDDEN: u64 = 32;

    /// A folder of one test's own, gone at its end.
    struct Scratch(PathBuf);

    impl Scratch {
        fn new() -> Self {
            static NEXT: AtomicU32 = AtomicU32::new(0);
            let n = NEXT.fetch_add(1, Ordering::Relaxed);
            let path = std::env::temp_dir().join(format!("sparsed-convert-{}-{n}", std::process::id()));
            std::fs::create_dir(&path).unwrap();
            Self(path)
        }

        fn path(&self) -> &Path {
            &self.0
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            drop(std::fs::remove_dir_all(&self.0));
        }
    }

    /// A Llama base of one layer, 4 heads in 2 groups of 8, written by hand; `v_format` is that of the value rows.
    fn base(dir: &Path, v_format: Format, extra: Option<&str>) -> PathBuf {
        let mut metadata = Metadata::new();
        metadata.set("general.architecture", Value::String("llama".to_owned()));
        for (key, n) in [
            ("block_count", 1),
            ("context_length", 64),
            ("embedding_length", 32),
            ("feed_forward_length", 32),
            ("attention.head_count", 4),
            ("attention.head_count_kv", 2),
        ] {
            metadata.set(format!("llama.{key}"), Value::U32(n));
        }
        metadata.set("llama.rope.freq_base", Value::F32(500.0));
        metadata.set("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-5));
        metadata.set("tokenizer.ggml.model", Value::String("gpt2".to_owned()));
        let matrix = [
            ("token_embd", 40, Format::F16),
            ("blk.0.attn_q", 32, Format::F16),
            ("blk.0.attn_k", 16, Format::Q8_0),
            ("blk.0.attn_v", 16, v_format),
            ("blk.0.attn_output", 32, Format::F16),
        ];
        let mut tensors: Vec<(String, Vec<u64>, Format)> = matrix
            .iter()
            .map(|(name, rows, format)| (format!("{name}.weight"), vec![HIDDEN, *rows], *format))
            .collect();
        tensors.push(("output_norm.weight".to_owned(), vec![HIDDEN], Format::F32));
        tensors.extend(extra.map(|name| (name.to_owned(), vec![HIDDEN], Format::F32)));
        let mut writer = Writer::new(metadata);
        let sizes: Vec<usize> =
            tensors.iter().map(|(name, dims, format)| writer.add(name, dims, *format).unwrap()).collect();
        let path = dir.join("base.gguf");
        let mut data = writer.begin(File::create(&path).unwrap()).unwrap();
        for (fill, size) in (1u8..).zip(sizes) {
            data.tensor(&vec![fill; size]).unwrap();
        }
        data.finish().unwrap();
        path
    }

    /// An indexer of `layers` layers with 2 heads of `width`.
    fn indexer(dir: &Path, layers: usize, width: usize) -> PathBuf {
        let (hidden, bytes) = (usize::try_from(HIDDEN).unwrap(), vec![0u8; 1 << 14]);
        let mut tensors = Vec::new();
        for layer in 0..layers {
            let shapes = [
                ("attn_q_b.weight", vec![2 * width, hidden]),
                ("attn_k.weight", vec![width, hidden]),
                ("k_norm.weight", vec![width]),
                ("k_norm.bias", vec![width]),
                ("proj.weight", vec![2, hidden]),
            ];
            for (part, shape) in shapes {
                let size = 4 * shape.iter().product::<usize>();
                let view = TensorView::new(Dtype::F32, shape, &bytes[..size]).unwrap();
                tensors.push((format!("blk.{layer}.indexer.{part}"), view));
            }
        }
        let path = dir.join("indexer.safetensors");
        std::fs::write(&path, safetensors::serialize(tensors, None).unwrap()).unwrap();
        path
    }

    fn run(base: &Path, indexer: &Path, out: &Path) -> Result<ConvertReport, ModelError> {
        convert(base, indexer, &ConvertOptions::default(), out, &mut |_, _| {})
    }

    #[test]
    fn value_and_key_rows_are_copied_side_by_side_as_bytes() {
        let dir = Scratch::new();
        let base = base(dir.path(), Format::Q8_0, None);
        let out = dir.path().join("out.gguf");
        let mut last = (0, 0);
        let options = ConvertOptions { indexer_format: Format::F16, top_k: 9 };
        convert(&base, &indexer(dir.path(), 1, 8), &options, &out, &mut |done, all| last = (done, all)).unwrap();
        assert!(last.0 == last.1 && last.0 > 0, "progress ends at the whole: {last:?}");
        let (base, made) = (Weights::open(&base).unwrap(), Weights::open(&out).unwrap());
        let rows = made.get("blk.0.attn_kv_a_mqa.weight", &[32, 32]).unwrap();
        let bytes = |name: &str| base.find(name).unwrap().unwrap().bytes;
        assert_eq!(rows.bytes, [bytes("blk.0.attn_v.weight"), bytes("blk.0.attn_k.weight")].concat());
        let spec = ModelSpec::parse(&made).unwrap();
        assert_eq!((spec.kv_lora_rank, spec.rope_row, spec.group_count), (16, 16, 2));
        assert_eq!(spec.indexer.as_ref().map(|i| (i.n_heads, i.head_dim, i.rope_dim, i.top_k)), Some((2, 8, 4, 9)));
        assert_eq!(made.metadata().unwrap().str("tokenizer.ggml.model"), Ok(Some("gpt2")));
        assert_eq!(made.metadata().unwrap().bool("deepseek32.attention.kv_a_norm"), Ok(Some(false)));
        let wanted = ModelSpec::parse(&base).unwrap().rope_frequencies;
        for (found, wanted) in spec.rope_frequencies.iter().zip(&wanted) {
            assert!((found / wanted - 1.0).abs() < 1e-6, "each group turns as the base's heads do");
        }
        let left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left.len(), 3, "no unfinished file stays: {left:?}");
    }

    #[test]
    fn value_and_key_rows_of_different_formats_stay_apart() {
        let dir = Scratch::new();
        let out = dir.path().join("out.gguf");
        run(&base(dir.path(), Format::Q4_1, None), &indexer(dir.path(), 1, 8), &out).unwrap();
        let made = Weights::open(&out).unwrap();
        assert_eq!(made.get("blk.0.attn_kv_a.weight", &[32, 16]).unwrap().format, Format::Q4_1);
        assert_eq!(made.get("blk.0.attn_k_rope.weight", &[32, 16]).unwrap().format, Format::Q8_0);
        assert_eq!(made.get("blk.0.indexer.attn_q_b.weight", &[32, 16]).unwrap().format, Format::Q8_0);
        assert_eq!(made.get("blk.0.indexer.proj.weight", &[32, 2]).unwrap().format, Format::F16);
    }

    #[test]
    fn what_does_not_fit_is_refused_and_leaves_no_file() {
        let dir = Scratch::new();
        let out = dir.path().join("out.gguf");
        let good = base(dir.path(), Format::Q8_0, None);
        let reason = |base: &Path, indexer: &Path| {
            let said = run(base, indexer, &out).expect_err("it does not fit").to_string();
            assert!(!out.exists());
            said
        };
        assert!(reason(&good, &indexer(dir.path(), 2, 8)).contains("another base"));
        assert!(reason(&good, &indexer(dir.path(), 1, 6)).contains("multiple of 4"));
        let file = indexer(dir.path(), 1, 8);
        let bytes = std::fs::read(&file).unwrap();
        std::fs::write(&file, &bytes[..bytes.len() - 1]).unwrap();
        assert!(reason(&good, &file).contains("indexer.safetensors"));
        let file = indexer(dir.path(), 1, 8);
        let odd = base(dir.path(), Format::Q8_0, Some("blk.0.attn_k.bias"));
        assert!(reason(&odd, &file).contains("blk.0.attn_k.bias"));
    }
}
