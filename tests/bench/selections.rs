//! Which rows does attention select, step by step? Writes one `.npy` for each text, which `workload.rs` reads.
//!
//! cargo run --release -p sparsed-tests --example selections -- MODEL DIR CONTEXT STEPS N_TEXTS N_CHATS FILE...
//!
//! The files are read one after another as one text, cut into `N_TEXTS + N_CHATS` pieces. Of the first ones the
//! selections of the last `STEPS` of `CONTEXT` tokens are written; each of the others is a message of a chat, and what
//! is written are the selections while the model answers it.
#![allow(clippy::unwrap_used, clippy::print_stdout, missing_docs, reason = "a measurement")]

use npyz::WriterBuilder;
use sparsed_backend::{Backend, OpenOptions, Plugin, SearchPath};
use sparsed_engine::{ChatMessage, ChatRequest, DeviceModel, LoadOptions, Lockstep, Role, Rows};
use sparsed_kv::blocks_for;
use sparsed_model::{Model, ProgramOptions, TextStream};
use std::collections::BTreeMap;
use std::path::Path;

/// Tokens that are read at once.
const CHUNK: u32 = 256;

fn main() {
    let mut args = std::env::args().skip(1);
    let (model, dir) = (args.next().unwrap(), args.next().unwrap());
    let mut number = || args.next().unwrap().parse::<usize>().unwrap();
    let (context, steps, n_texts, n_chats) = (number(), number(), number(), number());
    let text: String = args.map(|file| String::from_utf8_lossy(&std::fs::read(file).unwrap()).into_owned()).collect();
    let model = Model::open(Path::new(&model)).unwrap();
    let mut device = load(&model, u32::try_from(context).unwrap());
    let ids = model.tokenizer().unwrap().encode(&text).unwrap();
    let pieces: Vec<&[u32]> = ids.chunks_exact(ids.len() / (n_texts + n_chats)).collect();
    for (at, piece) in pieces.into_iter().take(n_texts + n_chats).enumerate() {
        let (kind, selected) = if at < n_texts {
            ("text", read(&mut device, &piece[..context], steps))
        } else {
            ("chat", answer(&model, &mut device, piece, context, steps))
        };
        let path = Path::new(&dir).join(format!("{kind}-{context}-{at:02}.npy"));
        write(&path, &selected);
        println!("{}: {} steps", path.display(), selected.len());
    }
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
fn read(device: &mut DeviceModel, tokens: &[u32], steps: usize) -> Selected {
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

/// Has the model answer a message that leaves `steps` tokens of the context for the answer, greedily.
fn answer(model: &Model, device: &mut DeviceModel, piece: &[u32], context: usize, steps: usize) -> Selected {
    let k = device.top_k().unwrap() as usize;
    let (tokenizer, mut stream) = (model.tokenizer().unwrap(), TextStream::new(&[]));
    let message: String = piece[..context - steps - 100].iter().map(|&id| stream.push(tokenizer, id)).collect();
    let message = format!("What is this text about, and what can I do with it?\n\n{message}");
    let chat = ChatRequest { messages: vec![ChatMessage::new(Role::User, &message)], ..ChatRequest::default() };
    let prompt = model.chat_format().unwrap().render(&chat).unwrap();
    let prompt = model.tokenizer().unwrap().encode_prompt(&prompt).unwrap();
    let (mut sequence, mut selected) = (Lockstep::new(device, 1), Selected::new());
    let mut logits = Vec::new();
    for chunk in prompt.chunks(CHUNK as usize) {
        logits = sequence.step(device, chunk, Rows::Last).unwrap().logits;
    }
    for _ in 0..steps.min(context - prompt.len()) {
        let best = (0u32..).zip(&logits).max_by(|a, b| a.1.total_cmp(b.1)).unwrap().0;
        let outputs = sequence.step(device, &[best], Rows::Last).unwrap();
        selected.push(outputs.selections.iter().map(|layer| positions(&layer[..k])).collect());
        logits = outputs.logits;
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
