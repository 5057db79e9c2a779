//! What is in a file, even one that is not served? Everything that can be read, and every reason against serving it.
//!
//! Reads headers, metadata and the scales of FP8 weights only; weights stay where they are.

use crate::language::Language;
use crate::program::{WeightBinding, kv_shape};
use crate::weights::Weights;
use crate::{KvFormats, KvShape, Model, ModelError, ModelSpec, Program, ProgramOptions, Selection};
use serde_json::Value;
use sparsed_quant::Format;
use std::collections::BTreeMap;
use std::path::Path;

/// Tensors of one format.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FormatCount {
    /// How many.
    pub tensors: u64,
    /// Numbers in them.
    pub values: u64,
    /// Their bytes in the file.
    pub bytes: u64,
}

/// What the weights of a model take in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// Bytes that stay mapped from the files.
    pub mapped: u64,
    /// Bytes that are made: decoded FP8, vectors in single precision, stacked experts, parts of an unsplit kv_b.
    pub made: u64,
    /// Bytes of the copies that a plugin may make of matrices for a layout of its own, if it copies all that it can.
    pub copies: u64,
}

/// What was found in a model file or folder.
#[derive(Debug)]
pub struct Inspection {
    /// What the file calls itself.
    pub name: Option<String>,
    /// `general.architecture` of a GGUF, `model_type` of a folder.
    pub architecture: Option<String>,
    /// Whether it is a Hugging Face folder.
    pub is_folder: bool,
    /// Bytes of all its files with tensors.
    pub file_bytes: u64,
    /// By format name.
    pub formats: BTreeMap<&'static str, FormatCount>,
    /// The hyperparameters, if they are served.
    pub spec: Option<ModelSpec>,
    /// What its weights take in memory, if it is served.
    pub held: Option<Held>,
    /// The tokenizer's kind and pre-tokenizer, and how many tokens it has.
    pub tokenizer: Option<(String, usize)>,
    /// Whether there is a chat template, the file's own or one that its tokens show.
    pub has_template: bool,
    /// Why it is not served; the first is what [`Model::open`] answers.
    pub refusals: Vec<String>,
}

impl Inspection {
    /// Reads what can be read.
    ///
    /// # Errors
    /// A file that is not a model at all, or whose table of tensors cannot be read.
    pub fn read(path: &Path) -> Result<Self, ModelError> {
        let weights = Weights::open(path)?;
        let text = |key: &str| match (weights.metadata(), weights.config()) {
            (Some(metadata), _) => metadata.str(key).ok().flatten().map(str::to_owned),
            (None, Some(config)) => config.get(key).and_then(Value::as_str).map(str::to_owned),
            (None, None) => None,
        };
        let is_folder = weights.metadata().is_none();
        let mut refusals: Vec<String> = Vec::new();
        let mut refuse = |error: ModelError| {
            let said = error.to_string();
            if !refusals.contains(&said) {
                refusals.push(said);
            }
        };
        let spec = ModelSpec::parse(&weights);
        let model = Model::open(path);
        let served = model.as_ref().ok().and_then(Model::chat_format).is_some();
        // Also where the model itself is not served.
        let of_folder =
            if is_folder { Language::of(&weights).ok().and_then(|language| language.tokenizer) } else { None };
        let of_folder = of_folder.map(|tokenizer| ("tokenizer.json".to_owned(), tokenizer.vocab_size()));
        let tokenizer = tokenizer(&weights).or(of_folder);
        let options = ProgramOptions { selection: Selection::Model, ..ProgramOptions::default() };
        let program = model.and_then(|model| model.outline(&options));
        let held = program.map_err(&mut refuse).ok().map(|program| held(&program));
        let spec = spec.map_err(&mut refuse).ok();
        if let Some(metadata) = weights.metadata() {
            crate::Tokenizer::from_metadata(metadata).err().into_iter().for_each(&mut refuse);
        }
        Ok(Self {
            name: text(if is_folder { "_name_or_path" } else { "general.name" }),
            architecture: text(if is_folder { "model_type" } else { "general.architecture" }),
            is_folder,
            file_bytes: weights.file_bytes(),
            formats: formats(&weights),
            spec,
            held,
            tokenizer,
            has_template: served || text("tokenizer.chat_template").is_some(),
            refusals,
        })
    }

    /// The rows that a token has in the KV pool; `None` without hyperparameters, an error where rows are not whole
    /// blocks of their formats.
    pub fn kv(&self, formats: &KvFormats, dense: bool) -> Option<Result<KvShape, ModelError>> {
        self.spec.as_ref().map(|spec| kv_shape(spec, formats, dense))
    }

    /// Numbers in all tensors.
    pub fn parameters(&self) -> u64 {
        self.formats.values().map(|format| format.values).sum()
    }
}

fn held(program: &Program) -> Held {
    let mut held = Held { made: program.made_bytes(), ..Held::default() };
    for weight in &program.weights {
        let size = weight.size();
        if weight.file.is_some() {
            held.mapped = held.mapped.saturating_add(size);
        }
        held.copies = held.copies.saturating_add(copy_bytes(weight));
    }
    held
}

/// Bytes of a weight in the layout of the CPU plugin, 0 in a format that it reads as it is: rows are filled up to
/// sixteens, and the six-bit scales and minima of a K format become bytes.
fn copy_bytes(weight: &WeightBinding) -> u64 {
    const ROWS: u64 = 16;
    let k_bytes = match Format::from_ggml_id(weight.dtype) {
        Some(Format::Q4_K | Format::Q5_K) => weight.cols / 256 * 4,
        Some(Format::Q4_0 | Format::Q4_1 | Format::Q5_0 | Format::Q5_1 | Format::Q8_0 | Format::Q6_K) => 0,
        _ => return 0,
    };
    let rows = weight.rows.next_multiple_of(ROWS);
    let matrices = rows.saturating_mul(weight.batch.into());
    matrices
        .saturating_mul((weight.size() / weight.rows.max(1) / u64::from(weight.batch.max(1))).saturating_add(k_bytes))
}

fn formats(weights: &Weights) -> BTreeMap<&'static str, FormatCount> {
    let mut formats: BTreeMap<&'static str, FormatCount> = BTreeMap::new();
    for tensor in weights.listed() {
        let format = formats.entry(tensor.format).or_default();
        format.tensors += 1;
        // A table of tensors may claim more than there is; what is told must not wrap round.
        format.values = format.values.saturating_add(tensor.values);
        format.bytes = format.bytes.saturating_add(tensor.bytes);
    }
    formats
}

/// What the metadata say, whether the tokenizer is served or not.
fn tokenizer(weights: &Weights) -> Option<(String, usize)> {
    let metadata = weights.metadata()?;
    let kind = metadata.str("tokenizer.ggml.model").ok()??;
    if matches!(kind, "none" | "no_vocab") {
        return None;
    }
    let tokens = metadata.strings("tokenizer.ggml.tokens").ok()?.map_or(0, <[String]>::len);
    let pre = metadata.str("tokenizer.ggml.pre").ok().flatten();
    Some((pre.map_or_else(|| kind.to_owned(), |pre| format!("{kind}, {pre}")), tokens))
}

#[cfg(test)]
mod tests {
    use super::*;
    use sparsed_quant::gguf::{Metadata, Value as Entry, Writer};

    /// A GGUF file with an architecture, a tokenizer and one tensor.
    fn inspected(architecture: &str, tokenizer: &str) -> Inspection {
        let mut metadata = Metadata::new();
        metadata.set("general.architecture", Entry::String(architecture.to_owned()));
        metadata.set("general.name", Entry::String("A name".to_owned()));
        metadata.set("tokenizer.ggml.model", Entry::String(tokenizer.to_owned()));
        let mut writer = Writer::new(metadata);
        let bytes = vec![0; writer.add("token_embd.weight", &[32, 3], Format::Q8_0).unwrap()];
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.gguf");
        let mut out = writer.begin(std::fs::File::create(&path).unwrap()).unwrap();
        out.tensor(&bytes).unwrap();
        out.finish().unwrap();
        Inspection::read(&path).unwrap()
    }

    #[test]
    fn a_refused_file_is_still_read_and_every_reason_is_told() {
        let found = inspected("mamba", "llama");
        assert_eq!((found.architecture.as_deref(), found.name.as_deref()), (Some("mamba"), Some("A name")));
        let format = FormatCount { tensors: 1, values: 96, bytes: 102 };
        assert_eq!(found.formats, BTreeMap::from([("Q8_0", format)]));
        assert_eq!(found.tokenizer, Some(("llama".to_owned(), 0)));
        assert!(found.spec.is_none() && !found.has_template && found.kv(&KvFormats::exact(), false).is_none());
        let [architecture, tokenizer] = &found.refusals[..] else { panic!("{:?}", found.refusals) };
        assert!(architecture.contains("'mamba'") && tokenizer.contains("'llama'"));
    }
}
