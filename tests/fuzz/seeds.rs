//! What the fuzz targets begin with: does each parser answer as the table in `README.md` says?
#![allow(
    clippy::unwrap_used,
    missing_docs,
    unreachable_pub,
    dead_code,
    reason = "a test, and a module that targets share"
)]

#[path = "shared/models.rs"]
mod models;

use serde_json::json;
use sparsed_backend::{ElfFacts, Manifest};
use sparsed_engine::api::Event;
use sparsed_engine::{GrammarCompiler, GrammarSpec};
use sparsed_model::{
    ChatFormat, ChatMessage, ChatRequest, Model, ModelSpec, OutputEvent, Role, SafetensorsHeader, Tokenizer,
    TokenizerConfig,
};
use sparsed_quant::gguf::Gguf;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

fn folder() -> PathBuf {
    sparsed_tests::root().join("tests/fuzz")
}

/// All bytes and three control tokens, as the targets have it.
fn bytes_tokenizer() -> Tokenizer {
    let file = std::fs::read(folder().join("seeds/bytes.json")).unwrap();
    Tokenizer::from_json(&file, &TokenizerConfig::default()).unwrap()
}

/// The reader; and what it takes, as a model.
fn gguf(path: &Path, file: &[u8]) -> Result<String, String> {
    let read = Gguf::parse(file).map_err(|error| error.to_string());
    let opened = Model::open(path).map_err(|error| error.to_string());
    match (read, opened) {
        (Err(error), Err(_)) => Err(error),
        (Err(error), Ok(_)) => panic!("{}: the model takes what the reader refuses: {error}", path.display()),
        (Ok(_), opened) => opened.map(|_| "read".to_owned()).map_err(|error| format!("no model: {error}")),
    }
}

fn config(text: &[u8]) -> Result<String, String> {
    ModelSpec::from_config(text).map(|_| "read".to_owned()).map_err(|error| error.to_string())
}

fn safetensors(file: &[u8]) -> Result<String, String> {
    SafetensorsHeader::parse("seed", file).map(|_| "read".to_owned()).map_err(|error| error.to_string())
}

/// A file, its configuration and a text, each after a NUL byte.
fn tokenizer(seed: &[u8]) -> Result<String, String> {
    let mut parts = seed.splitn(3, |byte| *byte == 0);
    let (file, config, text) = (parts.next().unwrap(), parts.next().unwrap_or(b"{}"), parts.next().unwrap_or(b"ab"));
    let read = || {
        let tokenizer = Tokenizer::from_json(file, &TokenizerConfig::parse(config)?)?;
        tokenizer.encode(&String::from_utf8_lossy(text))
    };
    read().map(|_| "read".to_owned()).map_err(|error| error.to_string())
}

/// A template and a user's message after a NUL byte.
fn template(seed: &[u8]) -> Result<String, String> {
    let seed = String::from_utf8_lossy(seed);
    let (template, message) = seed.split_once('\0').unwrap_or((&seed, "x"));
    let rendered = || {
        let format = ChatFormat::choose(Some(template), "", &bytes_tokenizer())?.expect("there is a template");
        let messages = vec![ChatMessage::new(Role::User, message)];
        format.render(&ChatRequest { messages, now: Some(0), ..ChatRequest::default() })
    };
    rendered().map(|_| "read".to_owned()).map_err(|error| error.to_string())
}

/// An answer after a byte that says whose, counted as the target does: what comes out, in order.
fn answer(seed: &[u8]) -> Result<String, String> {
    let (first, answer) = seed.split_first().unwrap();
    let tokenizer = bytes_tokenizer();
    let hermes = "{{ messages[0].content }}{% if tools %}<tool_call></tool_call>{% endif %}";
    let format = match first / 2 {
        0 => ChatFormat::built_in("deepseek-v3.2", &tokenizer).unwrap(),
        1 => ChatFormat::built_in("deepseek-v3.1", &tokenizer).unwrap(),
        2 => ChatFormat::built_in("glm-5", &tokenizer).unwrap(),
        _ => ChatFormat::choose(Some(hermes), "", &tokenizer).unwrap().unwrap(),
    };
    let function = json!({"name": "f", "parameters": {"properties": {"a": {"type": "string"}}}});
    let request = ChatRequest {
        messages: vec![ChatMessage::new(Role::User, "x")],
        tools: vec![json!({"type": "function", "function": function})],
        thinking: Some(first % 2 == 0),
        ..ChatRequest::default()
    };
    let mut parser = format.render(&request).unwrap().parser();
    let mut events = parser.push(&String::from_utf8_lossy(answer));
    events.extend(parser.finish());
    let mut said: Vec<&str> = Vec::new();
    for event in &events {
        let (what, again) = match event {
            OutputEvent::Reasoning(_) => ("reasoning", "reasoning"),
            OutputEvent::Content(_) => ("content", "content"),
            OutputEvent::ToolCall { .. } => ("call", "calls"),
        };
        match said.last_mut() {
            Some(last) if *last == what || *last == again => *last = again,
            _ => said.push(what),
        }
    }
    Ok(said.join(", "))
}

/// A JSON Schema, or what is no JSON as a Lark grammar.
fn grammar(seed: &[u8]) -> Result<String, String> {
    let spec = match serde_json::from_slice(seed) {
        Ok(schema) => GrammarSpec::JsonSchema(schema),
        Err(_) => GrammarSpec::Lark(String::from_utf8(seed.to_vec()).unwrap()),
    };
    let compiled = GrammarCompiler::default().compile(spec, &bytes_tokenizer());
    compiled.map(|_| "read".to_owned()).map_err(|error| error.to_string())
}

fn manifest(text: &[u8]) -> Result<String, String> {
    let text = std::str::from_utf8(text).unwrap();
    Manifest::parse(Path::new("plugin.toml"), text, "acme")
        .map(|_| "read".to_owned())
        .map_err(|error| error.to_string())
}

fn elf(bytes: &[u8]) -> Result<String, String> {
    let facts = ElfFacts::parse(bytes)?;
    facts.check(Path::new("lib.so"), &[]).map(|()| "read".to_owned()).map_err(|error| error.to_string())
}

/// What is in a session's journal.
fn journal(file: &[u8]) -> Result<String, String> {
    sparsed_session::probe::journal(file).map_err(|error| error.to_string())
}

/// What is in an exported session.
fn export(file: &[u8]) -> Result<String, String> {
    sparsed_session::probe::export(file).map_err(|error| error.to_string())
}

/// A KV file's header; one that is not right is a file to be replaced.
fn kv(file: &[u8]) -> Result<String, String> {
    let block_bytes = sparsed_session::probe::kv(file).ok_or("no images")?;
    Ok(format!("images of {block_bytes} bytes"))
}

/// Changes of a GGUF's metadata.
fn hyperparameters(edits: &[u8]) -> Result<String, String> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    models::write_gguf(&path, std::str::from_utf8(edits).unwrap());
    models::open(&path).map(|()| "read".to_owned()).map_err(|error| error.to_string())
}

/// An index of safetensors files and, after a NUL byte, a `quantization_config`.
fn index(input: &[u8]) -> Result<String, String> {
    let dir = tempfile::tempdir().unwrap();
    models::write_shards(dir.path());
    models::write_index(dir.path(), input);
    models::open(dir.path()).map(|()| "read".to_owned()).map_err(|error| error.to_string())
}

/// What a request would hear of the stream of an engine elsewhere, in order, and how it would end.
fn upstream(bytes: &[u8]) -> Result<String, String> {
    let (events, end) = sparsed_upstream::probe::stream([bytes]);
    let mut said: Vec<&str> = events
        .iter()
        .map(|event| match event {
            Event::Reasoning { .. } => "reasoning",
            Event::Delta { .. } => "content",
            Event::ToolCall { .. } => "call",
            Event::Likelihood(_) => "likelihood",
            other => panic!("{other:?} is not of a stream"),
        })
        .collect();
    said.dedup();
    end.map(|(reason, usage)| format!("{}; {reason:?}, {} tokens", said.join(", "), usage.completion_tokens))
}

fn read(seed: &str) -> Result<String, String> {
    let path = folder().join("seeds").join(seed);
    let file = std::fs::read(&path).unwrap();
    match seed.split_once('/').unwrap().0 {
        "gguf" => gguf(&path, &file),
        "config" => config(&file),
        "safetensors" => safetensors(&file),
        "tokenizer" => tokenizer(&file),
        "template" => template(&file),
        "answer" => answer(&file),
        "grammar" => grammar(&file),
        "manifest" => manifest(&file),
        "elf" => elf(&file),
        "journal" => journal(&file),
        "export" => export(&file),
        "kv" => kv(&file),
        "hyperparameters" => hyperparameters(&file),
        "index" => index(&file),
        "upstream" => upstream(&file),
        other => panic!("no parser for '{other}'"),
    }
}

/// Seeds and answers of the table, which begins with `| class |`. A seed has the name of its class, unless that is
/// `ordinary`.
fn table() -> BTreeMap<String, String> {
    let text = std::fs::read_to_string(folder().join("README.md")).unwrap();
    let rows =
        text.lines().skip_while(|line| !line.starts_with("| class |")).skip(2).take_while(|l| l.starts_with('|'));
    let mut table = BTreeMap::new();
    for row in rows {
        let cells: Vec<&str> = row.trim_matches('|').split(" | ").map(str::trim).collect();
        let [class, seed, answer] = cells[..] else { panic!("three cells: {row}") };
        let named = seed.split_once('/').is_some_and(|(_, name)| name.starts_with(&format!("{class}-")));
        assert!(named || class == "ordinary", "the class is not in the name: {row}");
        let twice = table.insert(seed.trim_matches('`').to_owned(), answer.to_owned());
        assert_eq!(twice, None, "{row}");
    }
    table
}

/// Whether a parser's answer is what the table says: `read`, what an answer has in it, or a part of the refusal.
fn agrees(answer: &Result<String, String>, expected: &str) -> bool {
    match (answer, expected.strip_prefix("refused: ")) {
        (Ok(answer), None) => answer == expected,
        (Err(error), Some(part)) => error.contains(part),
        _ => false,
    }
}

#[test]
fn every_seed_is_answered_as_the_table_says() {
    let wrong: Vec<String> = table()
        .iter()
        .map(|(seed, expected)| (seed, expected, read(seed)))
        .filter(|(_, expected, answer)| !agrees(answer, expected))
        .map(|(seed, expected, answer)| format!("{seed}: {answer:?}, not '{expected}'"))
        .collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn every_seed_is_in_the_table() {
    let mut seeds = Vec::new();
    for parser in std::fs::read_dir(folder().join("seeds")).unwrap().map(|entry| entry.unwrap().path()) {
        let Ok(files) = std::fs::read_dir(&parser) else { continue };
        let parser = parser.file_name().unwrap().to_string_lossy().into_owned();
        seeds.extend(files.map(|file| format!("{parser}/{}", file.unwrap().file_name().to_string_lossy())));
    }
    seeds.sort();
    assert_eq!(seeds, table().into_keys().collect::<Vec<_>>());
}

/// What a parser says of an input.
type Reader = fn(&[u8]) -> Result<String, String>;

/// One change of a seed, as a fuzzer would make it: a number, a line, a byte, or a piece of another seed.
fn change(random: &mut fastrand::Rng, input: &mut Vec<u8>, other: &[u8]) {
    const NUMBERS: [&str; 12] =
        ["0", "1", "2", "3", "7", "64", "-1", "1048576", "4294967295", "18446744073709551615", "1e300", "NaN"];
    let at = random.usize(..=input.len());
    match random.u8(..5) {
        0 => {
            let digits = |start: usize| input[start..].iter().take_while(|byte| byte.is_ascii_digit()).count();
            let starts: Vec<usize> = (0..input.len()).filter(|&at| digits(at) > 0).collect();
            if let Some(start) = random.choice(starts) {
                let end = start + digits(start);
                input.splice(start..end, random.choice(NUMBERS).unwrap().bytes());
            }
        }
        1 => {
            let mut lines: Vec<Vec<u8>> = input.split(|byte| *byte == b'\n').map(<[u8]>::to_vec).collect();
            random.shuffle(&mut lines[1..]);
            lines.truncate(random.usize(1..=lines.len()));
            *input = lines.join(&b'\n');
        }
        2 => input.extend(other.iter().skip_while(|byte| **byte != b'\n').skip(1)),
        3 if at < input.len() => input[at] = if random.bool() { input[at] ^ (1 << random.u8(..7)) } else { b' ' },
        _ => input.truncate(at),
    }
}

#[test]
fn changed_descriptions_of_models_are_read_or_refused_and_never_contradict_themselves() {
    let mut random = fastrand::Rng::with_seed(7);
    let readers = [("hyperparameters/", hyperparameters as Reader), ("index/", index)];
    for (parser, reader) in readers {
        let seeds: Vec<Vec<u8>> = table()
            .into_keys()
            .filter(|seed| seed.starts_with(parser))
            .map(|seed| std::fs::read(folder().join("seeds").join(seed)).unwrap())
            .collect();
        let (mut read, mut refused) = (0, 0);
        for _ in 0..1000 {
            let mut input = random.choice(&seeds).unwrap().clone();
            for _ in 0..random.u8(1..4) {
                let other = random.choice(&seeds).unwrap();
                change(&mut random, &mut input, other);
            }
            let input = if parser == "index/" { input } else { String::from_utf8_lossy(&input).into_owned().into() };
            match reader(&input) {
                Ok(_) => read += 1,
                Err(_) => refused += 1,
            }
        }
        assert!(read > 20 && refused > 20, "{parser}: {read} read, {refused} refused: too few to try anything");
    }
}

#[test]
fn the_comparison_can_fail() {
    let refused = Err("the limit is 4".to_owned());
    assert!(agrees(&refused, "refused: limit is 4") && agrees(&Ok("read".to_owned()), "read"));
    assert!(!agrees(&refused, "read") && !agrees(&refused, "refused: overflow"));
    assert!(!agrees(&Ok("read".to_owned()), "refused: limit"));
}
