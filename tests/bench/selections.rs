//! Which rows does attention select, step by step? Writes one `.npy` for each text and chat, which `workload.rs` reads.
//!
//! cargo run --release -p sparsed-tests --example selections -- MODEL DIR CONTEXT STEPS N_TEXTS FILE...
//!
//! A file `.jsonl` has a chat in each line, an array of OpenAI's messages (`chats.py` makes such a file). It is
//! rendered with the model's template, its answers are read as they were recorded. The other files are read one after
//! another as one text, cut into `N_TEXTS` pieces. Of each piece and each chat the first `CONTEXT` tokens are read, and
//! the selections of the last `STEPS` of them are written; what is shorter is left out.
#![allow(clippy::unwrap_used, clippy::print_stdout, missing_docs, reason = "a measurement")]

use npyz::WriterBuilder;
use sparsed_backend::{Backend, OpenOptions, Plugin, SearchPath};
use sparsed_engine::{ChatMessage, ChatRequest, DeviceModel, LoadOptions, Lockstep, Rows};
use sparsed_kv::blocks_for;
use sparsed_model::{Model, ProgramOptions};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Tokens that are read at once.
const CHUNK: u32 = 256;

fn main() {
    let mut args = std::env::args().skip(1);
    let (model, dir) = (args.next().unwrap(), args.next().unwrap());
    let mut number = || args.next().unwrap().parse::<usize>().unwrap();
    let (context, steps, n_texts) = (number(), number(), number());
    let is_chats = |file: &PathBuf| file.extension().is_some_and(|extension| extension == "jsonl");
    let (chats, texts): (Vec<_>, Vec<_>) = args.map(PathBuf::from).partition(is_chats);
    let model = Model::open(Path::new(&model)).unwrap();
    let mut device = load(&model, u32::try_from(context).unwrap());
    let inputs = [("text", read_texts(&model, &texts, n_texts)), ("chat", read_chats(&model, &chats))];
    for (kind, inputs) in inputs {
        for (at, tokens) in inputs.iter().enumerate().filter(|(_, tokens)| tokens.len() >= context) {
            let begin = Instant::now();
            let selected = select(&mut device, &tokens[..context], steps);
            let path = Path::new(&dir).join(format!("{kind}-{context}-{at:02}.npy"));
            write(&path, &selected);
            println!("{}: {} steps in {:.1} s", path.display(), selected.len(), begin.elapsed().as_secs_f64());
        }
    }
}

/// The tokens of each of the `n` pieces.
fn read_texts(model: &Model, files: &[PathBuf], n: usize) -> Vec<Vec<u32>> {
    let text: String =
        files.iter().map(|file| String::from_utf8_lossy(&std::fs::read(file).unwrap()).into_owned()).collect();
    let ids = model.tokenizer().unwrap().encode(&text).unwrap();
    ids.chunks_exact((ids.len() / n.max(1)).max(1)).take(n).map(<[u32]>::to_vec).collect()
}

/// The tokens of each chat, as a prompt.
fn read_chats(model: &Model, files: &[PathBuf]) -> Vec<Vec<u32>> {
    let prompt = |line: &str| {
        let chat =
            ChatRequest { messages: serde_json::from_str::<Vec<ChatMessage>>(line).unwrap(), ..ChatRequest::default() };
        let prompt = model.chat_format().unwrap().render(&chat).unwrap();
        model.tokenizer().unwrap().encode_prompt(&prompt).unwrap()
    };
    files
        .iter()
        .flat_map(|file| std::fs::read_to_string(file).unwrap().lines().map(prompt).collect::<Vec<_>>())
        .collect()
}

fn load(model: &Model, context: u32) -> DeviceModel {
    let release = sparsed_tests::root().join("target/release");
    let scan = SearchPath::only(vec![release.join("plugins")]).scan();
    let plugin = Plugin::load(scan.select(Some("cpu")).unwrap(), &BTreeMap::new()).unwrap();
    let backend = Backend::open(&plugin, 0, &OpenOptions::default()).unwrap();
    let options = LoadOptions {
        program: ProgramOptions { selections_out: true, ..ProgramOptions::default() },
        max_context: context,
        max_step_tokens: CHUNK,
        max_seqs: 1,
        max_logits: 1,
        n_blocks: blocks_for(context),
        n_fast: blocks_for(context),
        slow_cache_bytes: 0,
    };
    DeviceModel::load(&backend, model, options, &mut |_, _| {}).unwrap()
}

/// Per step and layer the selected positions.
type Selected = Vec<Vec<Vec<u16>>>;

/// Steps `tokens`, and keeps what each of the last `steps` has selected.
fn select(device: &mut DeviceModel, tokens: &[u32], steps: usize) -> Selected {
    let k = device.top_k().unwrap() as usize;
    let (mut sequence, mut selected) = (Lockstep::new(device, 1), Selected::new());
    let first = tokens.len() - steps;
    for (start, chunk) in (0..).step_by(CHUNK as usize).zip(tokens.chunks(CHUNK as usize)) {
        let outputs = sequence.step(device, chunk, Rows::Last).unwrap();
        for at in (start..start + chunk.len()).filter(|&at| at >= first) {
            let row = |layer: &Vec<i32>| positions(&layer[(at - start) * k..][..k]);
            selected.push(outputs.selections.iter().map(row).collect());
        }
    }
    selected
}

fn positions(selection: &[i32]) -> Vec<u16> {
    selection.iter().map(|&position| u16::try_from(position).unwrap()).collect()
}

/// `[steps, layers, k]`
fn write(path: &Path, selected: &Selected) {
    let shape = [selected.len(), selected[0].len(), selected[0][0].len()].map(|n| n as u64);
    let file = std::io::BufWriter::new(std::fs::File::create(path).unwrap());
    let mut writer = npyz::WriteOptions::new().default_dtype().shape(&shape).writer(file).begin_nd().unwrap();
    writer.extend(selected.iter().flatten().flatten().copied()).unwrap();
    writer.finish().unwrap();
}
