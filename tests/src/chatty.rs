//! A tiny model that chats: the weights of `tests/golden/tiny/v32` with a vocabulary of all bytes and a chat template.
//! What it says is nonsense, and the same nonsense each time.

use crate::root;
use crate::tiny::{Tensor, rewrite_with};
use sparsed_quant::gguf::{Array, Metadata, Value};
use std::path::{Path, PathBuf};

/// Bytes, then the control tokens.
const VOCAB: usize = 256 + CONTROL.len();
const CONTROL: [&str; 3] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];
const TEMPLATE: &str = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}\
                        {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

/// Calls as Hermes and Qwen write them.
const TEMPLATE_WITH_TOOLS: &str = "{% if tools %}<|im_start|>system\n{{ tools | tojson }} <tool_call><|im_end|>\n\
                                   {% endif %}";

/// Writes it into `folder`.
///
/// # Panics
/// When it cannot be written.
pub fn write(folder: &Path) -> PathBuf {
    write_as(folder, "chatty.gguf", TEMPLATE)
}

/// The same with a template that shows tools, and whose calls are JSON between `<tool_call>` tags.
///
/// # Panics
/// When it cannot be written.
pub fn write_with_tools(folder: &Path) -> PathBuf {
    write_as(folder, "chatty-with-tools.gguf", &format!("{TEMPLATE_WITH_TOOLS}{TEMPLATE}"))
}

/// The first one with a template that shows what tools are called, however long they are described.
///
/// # Panics
/// When it cannot be written.
pub fn write_with_names_of_tools(folder: &Path) -> PathBuf {
    let names = "{% for tool in tools %}{{ tool.function.name }}{% endfor %}";
    write_as(folder, "chatty-with-names-of-tools.gguf", &format!("{names}{TEMPLATE}"))
}

/// The first one with two tokens changed for each other: what was said with that one means something else to it.
///
/// # Panics
/// When it cannot be written.
pub fn write_with_other_tokens(folder: &Path) -> PathBuf {
    write_of(folder, "chatty-with-other-tokens.gguf", TEMPLATE, |names| names.swap(0, 1))
}

fn write_as(folder: &Path, name: &str, template: &str) -> PathBuf {
    write_of(folder, name, template, |_| {})
}

fn write_of(folder: &Path, name: &str, template: &str, change: impl Fn(&mut [String])) -> PathBuf {
    let path = folder.join(name);
    rewrite_with(&root().join("tests/golden/tiny/v32/model.gguf"), &path, |metadata, tensors| {
        set_vocabulary(metadata, template, &change);
        tensors.into_iter().map(widened).collect()
    });
    path
}

fn set_vocabulary(metadata: &mut Metadata, template: &str, change: &dyn Fn(&mut [String])) {
    let mut names: Vec<String> = (0..=255).map(letter).map(String::from).chain(CONTROL.map(str::to_owned)).collect();
    change(&mut names);
    let kinds = (0..VOCAB).map(|id| if id < 256 { 1 } else { 3 }).collect();
    let end = |n: u32| Value::U32(u32::try_from(VOCAB).expect("few tokens") - n);
    for (key, value) in [
        ("deepseek32.vocab_size", end(0)),
        ("tokenizer.ggml.model", Value::String("gpt2".to_owned())),
        ("tokenizer.ggml.pre", Value::String("smollm".to_owned())),
        ("tokenizer.ggml.tokens", Value::Array(Array::String(names))),
        ("tokenizer.ggml.token_type", Value::Array(Array::I32(kinds))),
        ("tokenizer.ggml.merges", Value::Array(Array::String(Vec::new()))),
        ("tokenizer.ggml.eos_token_id", end(1)),
        ("tokenizer.chat_template", Value::String(template.to_owned())),
    ] {
        metadata.set(key, value);
    }
}

/// GPT-2's letter for a byte.
fn letter(byte: u8) -> char {
    let is_plain = |byte: u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    if is_plain(byte) {
        return char::from(byte);
    }
    let before = (0..byte).filter(|&byte| !is_plain(byte)).count();
    char::from_u32(256 + u32::try_from(before).expect("fewer than 256")).expect("letters from U+0100 on")
}

/// The rows of a tensor over the vocabulary, as many as there are tokens now.
fn widened(mut tensor: Tensor) -> Tensor {
    if !matches!(tensor.name.as_str(), "token_embd.weight" | "output.weight") {
        return tensor;
    }
    let mut random = fastrand::Rng::with_seed(5);
    let cols = usize::try_from(tensor.dims[0]).expect("a tiny tensor");
    let scale = tensor.values.iter().map(|value| value.abs()).sum::<f32>() / tensor.values.len() as f32;
    tensor.values.resize_with(VOCAB * cols, || (random.f32() - 0.5) * 4.0 * scale);
    tensor.dims[1] = VOCAB as u64;
    tensor
}
