//! How does a model become a smaller GGUF? Tensor by tensor, as a stream: no file is too large for memory.
//!
//! It may be a GGUF, one file or all parts of a split one, or a Hugging Face folder. Of a folder, keys and names are
//! llama.cpp's ([`source`]); before any data is written the new header is read as the model that it will be, and a
//! folder that has something that the keys do not say, so that the two would compute differently, is refused.
//!
//! [`Recipe`] names what most matrices become. Excepted are, in this order:
//!
//! 1. What `keep` names, by whole name, `*` standing for any run of characters: stays as it is.
//! 2. Vectors, norms, biases, the router (`ffn_gate_inp`, `exp_probs_b`), the indexer's head weights (`indexer.proj`)
//!    and its `k_norm`: stay as they are, but BF16 and all of a folder become F32, without loss.
//! 3. The indexer's matrices: at least Q8_0, since what it selects decides what is read at all.
//! 4. `output`, and `token_embd` where it is the output too: at least Q6_K.
//! 5. In recipes ending in `_M`, as llama.cpp has it: `attn_v`, `attn_v_b`, `attn_kv_b` and `ffn_down` (experts' too)
//!    are Q6_K in the first and last eighth of the layers and every third between. `attn_kv_a`, which holds keys and
//!    values in one, likewise, and is Q5_K in the other layers.
//! 6. Rows that are not whole blocks of 256 take blocks of 32 (Q4_K: Q5_0, Q5_K: Q5_1, Q6_K: Q8_0), others F16, with a
//!    note in the report.
//!
//! What has the wanted format already is copied as bytes. Source of 4 and 5: llama.cpp, `llama-quant.cpp`.

mod rules;
mod source;
mod stream;

pub use rules::Recipe;

use crate::ModelError;
use crate::new_file::{NewFile, folder};
use crate::weights::Weights;
use crate::{Model, ModelSpec, ProgramOptions};
use rules::{Subject, Whole};
use source::Source;
use sparsed_quant::gguf::{Metadata, Value, Writer};
use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use stream::{Planned, Recoder};

/// `general.quantization_version` of the block layouts that llama.cpp writes today.
const QUANTIZATION_VERSION: u32 = 2;
/// Most threads.
const THREADS_MAX: usize = 256;

/// How a model is quantised.
#[derive(Clone, Debug)]
pub struct QuantizeOptions {
    /// What most matrices become.
    pub recipe: Recipe,
    /// Names, with `*`, of tensors that stay as they are.
    pub keep: Vec<String>,
    /// Threads; 0: one for each processor.
    pub n_threads: usize,
}

/// What became of a model.
#[derive(Clone, Debug, Default)]
pub struct QuantizeReport {
    /// By the name of the new format.
    pub formats: BTreeMap<&'static str, FormatReport>,
    /// What a user should know, one sentence each.
    pub notes: Vec<String>,
    /// Size of all old files with tensors.
    pub bytes_before: u64,
    /// Size of the new file.
    pub bytes_after: u64,
}

/// What became of the tensors that have one format now.
#[derive(Clone, Copy, Debug, Default)]
pub struct FormatReport {
    /// How many.
    pub tensors: u64,
    /// Of these, how many were copied as they were.
    pub copied: u64,
    /// Their bytes in the new file.
    pub bytes: u64,
    squared_error: f64,
    squared: f64,
}

impl FormatReport {
    /// Root of the mean squared error of what was recoded over that of its mean square; `None` when all was copied.
    pub fn relative_error(&self) -> Option<f64> {
        (self.squared > 0.0).then(|| (self.squared_error / self.squared).sqrt())
    }
}

/// Writes `output`: the tensors of `input`, quantised. `progress` hears (bytes written, bytes in all). The file appears
/// whole or not at all, in place of one that was there.
///
/// # Errors
/// What is wrong with the input or with what was asked for, too little room on the disk, or what the disk said.
pub fn quantize(
    input: &Path,
    output: &Path,
    options: &QuantizeOptions,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<QuantizeReport, ModelError> {
    // Data is read in batches, not through the mapping, whose pages would stay resident.
    let weights = Weights::open(input)?;
    refuse_output(&weights, output)?;
    let mut report = QuantizeReport { bytes_before: weights.file_bytes(), ..QuantizeReport::default() };
    let (metadata, spec, sources) = match weights.metadata() {
        Some(metadata) => (whole(metadata), None, source::of_gguf(&weights)?),
        None => {
            let (metadata, spec, sources) = source::of_folder(&weights)?;
            (metadata, Some(spec), sources)
        }
    };
    let planned = plan(sources, options, spec.is_some(), &mut report.notes)?;
    let mut writer = Writer::new(metadata);
    writer.set("general.file_type", Value::U32(options.recipe.file_type));
    writer.set("general.quantization_version", Value::U32(QUANTIZATION_VERSION));
    let mut total = 0;
    for tensor in &planned {
        let quant = |source| ModelError::Quant { name: tensor.name.clone(), source };
        let bytes = writer.add(&tensor.name, &tensor.dims, tensor.to).map_err(quant)? as u64;
        let entry = report.formats.entry(tensor.to.name()).or_default();
        entry.tensors += 1;
        entry.copied += u64::from(tensor.from == tensor.to);
        entry.bytes += bytes;
        total += bytes;
    }
    refuse_full_disk(output, total)?;
    if let Some(spec) = spec {
        read_back(&spec, output, &writer, &mut report.notes)?;
    }
    let (new, sink) = NewFile::create(output).map_err(|source| ModelError::Io { path: output.to_owned(), source })?;
    let part = new.path().to_owned();
    let io = |source| ModelError::Io { path: part.clone(), source };
    let mut data = writer.begin(sink).map_err(io)?;
    let mut recoder = Recoder::new(n_threads(options.n_threads));
    let mut done = 0;
    for tensor in &planned {
        let loss = recoder.tensor(tensor, &mut data, &part, &mut |bytes| {
            done += bytes;
            progress(done, total);
        })?;
        let entry = report.formats.entry(tensor.to.name()).or_default();
        entry.squared_error += loss.squared_error;
        entry.squared += loss.squared;
    }
    report.bytes_after = new.arrive(data.finish().map_err(io)?).map_err(io)?;
    Ok(report)
}

/// The metadata of all parts of a split file in one: without the keys of the split.
fn whole(metadata: &Metadata) -> Metadata {
    let mut whole = Metadata::new();
    for (key, value) in metadata.iter().filter(|(key, _)| !key.starts_with("split.")) {
        whole.set(key, value.clone());
    }
    whole
}

/// Reads the header that `writer` will write, in a file of holes that is gone afterwards, and compares the model that
/// it describes with the folder's.
fn read_back(spec: &ModelSpec, output: &Path, writer: &Writer, notes: &mut Vec<String>) -> Result<(), ModelError> {
    let (new, sink) = NewFile::create(output).map_err(|source| ModelError::Io { path: output.to_owned(), source })?;
    let io = |source| ModelError::Io { path: new.path().to_owned(), source };
    writer.clone().begin(sink).map_err(io)?.skip().map_err(io)?;
    let model = Model::open(new.path())?;
    model.outline(&ProgramOptions::default())?;
    let read = model.spec();
    if let Some(what) = spec.difference(read) {
        let reason = format!("the keys of a GGUF do not say this of the folder: {what}; serve the folder itself");
        return Err(ModelError::Quantize(reason));
    }
    if spec.latent_norm_eps.total_cmp(&read.latent_norm_eps).is_ne() {
        let (ours, theirs) = (read.latent_norm_eps, spec.latent_norm_eps);
        notes.push(format!("norms of latents take the eps {ours:e} in a GGUF, {theirs:e} in the folder (D3)"));
    }
    Ok(())
}

fn n_threads(wanted: usize) -> usize {
    let all = || std::thread::available_parallelism().map_or(1, usize::from);
    if wanted == 0 { all().min(THREADS_MAX) } else { wanted.min(THREADS_MAX) }
}

/// Decides for every tensor, and notes what a user should know.
fn plan(
    sources: Vec<Source>,
    options: &QuantizeOptions,
    is_folder: bool,
    notes: &mut Vec<String>,
) -> Result<Vec<Planned>, ModelError> {
    if let Some(pattern) =
        options.keep.iter().find(|keep| !sources.iter().any(|source| rules::matches(keep, &source.name)))
    {
        return Err(ModelError::Quantize(format!("no tensor is called '{pattern}', which was to be kept")));
    }
    let layer = |name: &str| name.strip_prefix("blk.")?.split_once('.')?.0.parse::<u64>().ok();
    let n_layers = sources.iter().filter_map(|source| layer(&source.name)).max().map_or(0, |n| n.saturating_add(1));
    let whole = Whole { n_layers, tied: !sources.iter().any(|source| source.name == "output.weight"), is_folder };
    let mut planned = Vec::with_capacity(sources.len());
    let (mut again, mut instead) = (0u64, BTreeMap::<(&str, &str), u64>::new());
    for Source { name, dims, format, pieces } in sources {
        let kept = options.keep.iter().any(|pattern| rules::matches(pattern, &name));
        let to = if kept {
            format
        } else {
            let choice = options.recipe.choose(&Subject { name: &name, dims: &dims, format }, &whole);
            if let Some(wanted) = choice.instead_of {
                *instead.entry((choice.format.name(), wanted.name())).or_default() += 1;
            }
            choice.format
        };
        again += u64::from(to != format && format.block_values() > 1);
        planned.push(Planned { name, dims, from: format, to, pieces });
    }
    for ((taken, wanted), n) in instead {
        notes.push(format!("{n} tensors are {taken} instead of {wanted}: their rows are not whole blocks of it"));
    }
    if again > 0 {
        notes.push(format!("{again} tensors were quantised before: their errors add up; start from F16 where you can"));
    }
    Ok(planned)
}

/// A file of the input, and what is no file, is not overwritten.
fn refuse_output(input: &Weights, output: &Path) -> Result<(), ModelError> {
    let Ok(there) = std::fs::metadata(output) else { return Ok(()) };
    for file in input.files() {
        let read = file.metadata().map_err(|source| ModelError::Io { path: input.path().to_owned(), source })?;
        if (there.dev(), there.ino()) == (read.dev(), read.ino()) {
            return Err(ModelError::Quantize("the output is the input; write to another file".to_owned()));
        }
    }
    if !there.is_file() {
        return Err(ModelError::Quantize(format!("{} is there and is not a regular file", output.display())));
    }
    Ok(())
}

fn refuse_full_disk(output: &Path, needed: u64) -> Result<(), ModelError> {
    let dir = folder(output);
    let disk =
        rustix::fs::statvfs(dir).map_err(|error| ModelError::Io { path: dir.to_owned(), source: error.into() })?;
    let free = disk.f_bavail.saturating_mul(disk.f_frsize);
    if free < needed {
        let what = format!("{} has {free} bytes free, the new file needs {needed}", dir.display());
        return Err(ModelError::Quantize(what));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::open_gguf;
    use sparsed_quant::gguf::Metadata;
    use sparsed_quant::{Format, decode, encode};
    use std::path::PathBuf;

    /// Rows of the large matrix: more than two batches of values.
    const ROWS: u64 = 9000;

    /// Values between -1 and 1 from a small generator.
    fn noise(n: u64) -> Vec<f32> {
        let mut state = 7u32;
        let mut draw = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            f32::from(i16::try_from(state >> 17).unwrap() - 0x4000) / 16384.0
        };
        (0..n).map(|_| draw()).collect()
    }

    fn bytes(format: Format, values: &[f32]) -> Vec<u8> {
        let mut bytes = vec![0; format.row_bytes(values.len()).unwrap()];
        encode(format, values, &mut bytes).unwrap();
        bytes
    }

    const TENSORS: [(&str, &[u64], Format); 6] = [
        ("token_embd.weight", &[256, ROWS], Format::F16),
        ("output.weight", &[256, 4], Format::F32),
        ("blk.0.attn_norm.weight", &[256], Format::F32),
        ("blk.0.ffn_gate_inp.weight", &[256, 2], Format::F16),
        ("blk.0.indexer.attn_k.weight", &[256, 4], Format::BF16),
        ("blk.0.ffn_up.weight", &[96, 2, 3], Format::F32),
    ];

    fn input(dir: &Path, poison: Option<f32>, parts: u16) -> PathBuf {
        let mut metadata = Metadata::new();
        metadata.set("general.architecture", Value::String("test".to_owned()));
        metadata.set("general.file_type", Value::U32(1));
        metadata.set("split.count", Value::U16(parts));
        let mut writer = Writer::new(metadata);
        for (name, dims, format) in TENSORS {
            writer.add(name, dims, format).unwrap();
        }
        let path = dir.join("in.gguf");
        let mut data = writer.begin(std::fs::File::create(&path).unwrap()).unwrap();
        for (_, dims, format) in TENSORS {
            let mut values = noise(dims.iter().product());
            *values.last_mut().unwrap() = poison.filter(|_| dims.len() == 3).unwrap_or(0.5);
            data.tensor(&bytes(format, &values)).unwrap();
        }
        data.finish().unwrap();
        path
    }

    fn options(recipe: &str, n_threads: usize) -> QuantizeOptions {
        QuantizeOptions { recipe: Recipe::from_name(recipe).unwrap(), keep: Vec::new(), n_threads }
    }

    fn tensor(file: &Path, name: &str) -> (Format, Vec<u8>) {
        let (_, mapped, gguf) = open_gguf(file).unwrap();
        let info = gguf.tensor(name).unwrap();
        (info.format, mapped[info.range.clone()].to_vec())
    }

    #[test]
    fn every_tensor_is_what_encoding_it_alone_gives_with_any_number_of_threads() {
        let dir = tempfile::tempdir().unwrap();
        let (input, output) = (input(dir.path(), None, 1), dir.path().join("out.gguf"));
        for n_threads in [1, 2, 5] {
            let mut last = (0, 0);
            let report = quantize(&input, &output, &options("Q4_0", n_threads), &mut |done, all| last = (done, all));
            let report = report.unwrap();
            assert!(last.0 == last.1 && last.0 > 0, "progress ends at the whole: {last:?}");
            let expected = [Format::Q4_0, Format::Q6_K, Format::F32, Format::F16, Format::Q8_0, Format::Q4_0];
            for ((name, dims, before), after) in TENSORS.into_iter().zip(expected) {
                let (format, found) = tensor(&output, name);
                assert_eq!(format, after, "{name}");
                let mut values = vec![0.0; usize::try_from(dims.iter().product::<u64>()).unwrap()];
                decode(before, &tensor(&input, name).1, &mut values).unwrap();
                assert!(found == bytes(after, &values), "{name} with {n_threads} threads");
            }
            assert_eq!((report.formats["Q4_0"].tensors, report.formats["F32"].copied), (2, 1));
            let error = report.formats["Q8_0"].relative_error().unwrap();
            assert!((1e-3..1e-2).contains(&error), "{error}");
            assert_eq!(report.formats["F32"].relative_error(), None);
            assert_eq!(report.bytes_after, std::fs::metadata(&output).unwrap().len());
        }
        let (_, _, gguf) = open_gguf(&output).unwrap();
        assert_eq!(gguf.metadata().u32("general.file_type"), Ok(Some(2)));
        assert_eq!(gguf.metadata().u32("general.quantization_version"), Ok(Some(2)));
        assert_eq!(gguf.metadata().str("general.architecture"), Ok(Some("test")));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2, "no unfinished file stays");
    }

    #[test]
    fn what_is_to_be_kept_is_copied_and_odd_rows_are_noted() {
        let dir = tempfile::tempdir().unwrap();
        let (input, output) = (input(dir.path(), None, 1), dir.path().join("out.gguf"));
        let mut options = options("Q4_K", 2);
        options.keep = vec!["token_*".to_owned(), "output.weight".to_owned()];
        let report = quantize(&input, &output, &options, &mut |_, _| {}).unwrap();
        for name in ["token_embd.weight", "output.weight"] {
            assert_eq!(tensor(&output, name), tensor(&input, name));
        }
        assert_eq!(tensor(&output, "blk.0.ffn_up.weight").0, Format::Q5_0);
        assert!(report.notes[0].contains("1 tensors are Q5_0 instead of Q4_K"), "{:?}", report.notes);
        // And once more from what is quantised already.
        let again = dir.path().join("again.gguf");
        let report = quantize(&output, &again, &self::options("F16", 1), &mut |_, _| {}).unwrap();
        assert!(report.notes[0].contains("quantised before"), "{:?}", report.notes);
    }

    #[test]
    fn what_cannot_be_done_is_refused_and_leaves_no_file() {
        let dir = tempfile::tempdir().unwrap();
        let output = dir.path().join("out.gguf");
        let reason = |input: &Path, output: &Path, options: &QuantizeOptions| {
            quantize(input, output, options, &mut |_, _| {}).expect_err("it cannot be done").to_string()
        };
        let good = input(dir.path(), None, 1);
        let link = dir.path().join("link.gguf");
        std::os::unix::fs::symlink(&good, &link).unwrap();
        assert!(reason(&good, &link, &options("Q4_0", 1)).contains("the output is the input"));
        assert!(reason(&good, dir.path(), &options("Q4_0", 1)).contains("not a regular file"));
        assert!(reason(&good, &dir.path().join("absent/out"), &options("Q4_0", 1)).contains("absent"));
        let mut keep = options("Q4_0", 1);
        keep.keep = vec!["blk.7.*".to_owned()];
        assert!(reason(&good, &output, &keep).contains("blk.7.*"));
        for poison in [f32::NAN, f32::INFINITY] {
            let bad = input(dir.path(), Some(poison), 1);
            let said = reason(&bad, &output, &options("Q4_0", 3));
            assert!(said.contains("blk.0.ffn_up.weight") && said.contains("value 575"), "{said}");
        }
        let large = input(dir.path(), Some(1e9), 1);
        assert!(reason(&large, &output, &options("F16", 1)).contains("F16 cannot hold"));
        assert!(reason(&input(dir.path(), None, 2), &output, &options("Q4_0", 1)).contains("split.no"));
        assert!(refuse_full_disk(&output, u64::MAX).unwrap_err().to_string().contains("bytes free"));
        let left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left.len(), 2, "only the input and the link: {left:?}");
    }
}
