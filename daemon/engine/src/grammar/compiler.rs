//! What does a request's grammar cost, and is it one? Limits, the model's vocabulary as a trie, the compilation.
//!
//! Everything here happens on a thread that may wait. One grammar per model is compiled at a time, so the memory of a
//! compilation is there once; `llguidance` recurses along references, so it runs on a stack of its own that is large
//! enough for the longest chain which `guard`'s limit on its length has room for.

use super::locate::failing_place;
use super::{Grammar, GrammarSpec, guard};
use crate::api::Failure;
use llguidance::api::{ParserLimits, TopLevelGrammar};
use llguidance::toktrie::{ApproximateTokEnv, TokEnv, TokRxInfo, TokTrie};
use llguidance::{ParserFactory, panic_utils};
use serde_json::{Value, json};
use sparsed_model::Tokenizer;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// Stack of a compilation; only what is used of it is ever in memory.
const STACK_BYTES: usize = 256 << 20;
/// Longest token that a grammar can use; longer ones are left out. The trie can hold 1024.
const TOKEN_BYTES_MAX: usize = 1000;
/// What may stand between the tokens of JSON: small models otherwise write blanks until `max_tokens`.
const WHITESPACE: &str = r"[ \n\r\t]{1,40}";
/// Keywords of schemas that are not followed and no reason to refuse one: libraries write them for dictionaries and
/// sets, and look at the answer themselves.
const PASSED_OVER: &[&str] = &["propertyNames", "uniqueItems"];
/// Longest message about a grammar.
const MESSAGE_CHARS_MAX: usize = 200;
/// `llguidance`'s token id for "none".
const NO_TOKEN: u32 = u32::MAX;

/// `llguidance` counts its work, so the same grammar is refused on every machine.
fn limits() -> ParserLimits {
    ParserLimits {
        max_items_in_row: 1_000,
        initial_lexer_fuel: 1_000_000,
        step_lexer_fuel: 100_000,
        step_max_items: 10_000,
        max_lexer_states: 50_000,
        max_grammar_size: 200_000,
        precompute_large_lexemes: true,
        // They hold the state of the answer.
        verbose_errors: false,
    }
}

/// Compiles the grammars of one model's requests. Public for its fuzz target; a surface asks a
/// [`ServedModel`](crate::ServedModel).
#[derive(Default)]
pub struct Compiler {
    /// Made when the first grammar is asked for: the trie takes time and memory.
    factory: OnceLock<Result<ParserFactory, String>>,
    /// Guards no data: one compilation at a time.
    turn: Mutex<()>,
}

impl std::fmt::Debug for Compiler {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Compiler").field("used", &self.factory.get().is_some()).finish_non_exhaustive()
    }
}

impl Compiler {
    /// The grammar for `spec` over the tokens of `tokenizer`.
    ///
    /// # Errors
    /// [`Failure::InvalidRequest`] that says where the schema or grammar is broken, or which limit it exceeds.
    pub fn compile(&self, spec: GrammarSpec, tokenizer: &Tokenizer) -> Result<Grammar, Failure> {
        self.compile_with(spec, || Vocabulary::of(tokenizer))
    }

    pub(super) fn compile_with(
        &self,
        spec: GrammarSpec,
        vocabulary: impl Fn() -> Vocabulary + Copy + Send + Sync,
    ) -> Result<Grammar, Failure> {
        let (param, alone) = match &spec {
            GrammarSpec::CallOrJson { json, .. } => {
                // Limits of a schema are those of the schema alone.
                Source::of((**json).clone()).check().map_err(|reason| Failure::invalid(json.param(), reason))?;
                (spec.param(), Some((**json).clone()))
            }
            _ => (spec.param(), None),
        };
        let made = self.made(Source::of(spec), vocabulary);
        made.map_err(|reason| match alone.map(|json| self.compile_with(json, vocabulary)) {
            // What is wrong with the JSON is said of it. It is made alone only where both together are not: a
            // compilation may take as long as a request has to wait for its first token.
            Some(Err(of_json)) => of_json,
            _ => Failure::invalid(param, reason),
        })
    }

    /// One compilation, or why there is no grammar.
    fn made(
        &self,
        source: Source,
        vocabulary: impl Fn() -> Vocabulary + Copy + Send + Sync,
    ) -> Result<Grammar, String> {
        source.check()?;
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let work = || {
            let factory = self.factory.get_or_init(|| vocabulary().factory()).as_ref().map_err(Clone::clone)?;
            build(factory, &source)
        };
        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().name("grammar".to_owned()).stack_size(STACK_BYTES);
            let thread =
                thread.spawn_scoped(scope, work).map_err(|error| format!("cannot be compiled now: {error}"))?;
            thread.join().map_err(|_| "cannot be compiled: llguidance panicked".to_owned())?
        })
    }
}

enum Source {
    Schema(Value),
    Lark(String),
}

impl Source {
    fn of(spec: GrammarSpec) -> Self {
        match spec {
            GrammarSpec::JsonObject => Self::Schema(json!({ "type": "object" })),
            GrammarSpec::JsonSchema(schema) => Self::Schema(schema),
            GrammarSpec::Regex(regex) => Self::Lark(expression(&regex)),
            GrammarSpec::Choice(texts) => Self::Lark(choice(&texts)),
            GrammarSpec::Lark(text) | GrammarSpec::Call(text) => Self::Lark(text),
            GrammarSpec::CallOrJson { grammar, .. } => Self::Lark(grammar),
        }
    }

    fn check(&self) -> Result<(), String> {
        match self {
            Self::Schema(schema) if schema.is_object() => guard::check_schema(schema),
            Self::Schema(schema) => Err(format!("has a schema that is not an object: {}", cut(&schema.to_string()))),
            Self::Lark(text) => guard::check_lark(text),
        }
    }
}

/// A whole answer that matches a regular expression. A slash would end it in a grammar, and so would a line.
fn expression(regex: &str) -> String {
    let mut escaped = String::with_capacity(regex.len());
    let mut letters = regex.chars();
    while let Some(letter) = letters.next() {
        match letter {
            '\\' => {
                escaped.push('\\');
                escaped.extend(letters.next());
            }
            '/' => escaped.push_str("\\/"),
            '\n' => escaped.push_str("\\n"),
            other => escaped.push(other),
        }
    }
    format!("start: /{escaped}/")
}

/// One of these texts. Lark's strings are JSON's.
fn choice(texts: &[String]) -> String {
    let texts: Vec<String> = texts.iter().map(|text| json!(text).to_string()).collect();
    format!("start: {}", texts.join(" | "))
}

fn build(factory: &ParserFactory, source: &Source) -> Result<Grammar, String> {
    match source {
        Source::Lark(text) => {
            let grammar = TopLevelGrammar::from_lark(text.clone());
            compile(factory, grammar).map_err(|error| format!("cannot be used: {error}"))
        }
        Source::Schema(schema) => {
            let compile = |schema: &Value| compile(factory, TopLevelGrammar::from_json_schema(laid_out(schema)));
            compile(schema).map_err(|error| {
                let place = failing_place(schema, &error, &|part| compile(part).err());
                format!("has a schema that cannot be used, at '{place}': {error}")
            })
        }
    }
}

/// The schema with a bound on the blanks between its tokens.
pub(crate) fn laid_out(schema: &Value) -> Value {
    sparsed_model::laid_out(schema, &json!({ "whitespace_pattern": WHITESPACE }))
}

fn compile(factory: &ParserFactory, grammar: TopLevelGrammar) -> Result<Grammar, String> {
    let made = factory.create_parser(grammar).map_err(|error| error.to_string()).and_then(|mut parser| {
        parser.grammar_warnings().iter().find_map(|warning| not_followed(warning)).map_or(Ok(()), Err)?;
        Grammar::new(parser)
    });
    made.map_err(|error| message(&error))
}

/// What a warning says of keywords that are constraints and would not be followed, in the words of an error.
fn not_followed(warning: &str) -> Option<String> {
    let names = warning.strip_prefix("Unimplemented keys: [")?.split_once(']')?.0;
    let missing = names.split(", ").filter(|name| !PASSED_OVER.contains(&name.trim_matches('"'))).collect::<Vec<_>>();
    (!missing.is_empty()).then(|| format!("Unimplemented keys: [{}]", missing.join(", ")))
}

/// The bytes of each token of a model, as a grammar sees them.
pub(super) struct Vocabulary {
    /// Nothing for a token that no grammar can use.
    pub(super) words: Vec<Vec<u8>>,
    pub(super) ends: Vec<u32>,
}

impl Vocabulary {
    fn of(tokenizer: &Tokenizer) -> Self {
        let ends = tokenizer.end_tokens().to_vec();
        let ids = 0..u32::try_from(tokenizer.vocab_size()).unwrap_or(u32::MAX);
        let word = |id: u32| {
            let bytes = tokenizer.token_bytes(id);
            let word = if bytes.is_empty() || ends.contains(&id) {
                // A control token: no text, only a grammar's own `<name>` can ask for it.
                let name = tokenizer.token_name(id).filter(|name| !name.is_empty());
                name.map_or(Vec::new(), |name| [&[TokTrie::SPECIAL_TOKEN_MARKER], name.as_bytes()].concat())
            } else if bytes.contains(&TokTrie::SPECIAL_TOKEN_MARKER) {
                // Never part of UTF-8, and the trie's mark of control tokens.
                Vec::new()
            } else {
                bytes.to_vec()
            };
            if word.len() > TOKEN_BYTES_MAX { Vec::new() } else { word }
        };
        Self { words: ids.map(word).collect(), ends }
    }

    /// One token per ASCII byte, then `words`, then the control token `<|end|>` that ends an answer.
    #[cfg(test)]
    pub(super) fn tiny(words: &[&str]) -> Self {
        let mut all: Vec<Vec<u8>> = (0..128u8).map(|byte| vec![byte]).collect();
        all.extend(words.iter().map(|word| word.as_bytes().to_vec()));
        all.push(b"\xff<|end|>".to_vec());
        let end = u32::try_from(all.len() - 1).expect("few words");
        Self { words: all, ends: vec![end] }
    }

    fn factory(self) -> Result<ParserFactory, String> {
        let Self { words, ends } = self;
        let made = panic_utils::catch_unwind(move || {
            let size = u32::try_from(words.len())?;
            let info = TokRxInfo::new(size, ends.first().copied().unwrap_or(NO_TOKEN));
            let mut trie = TokTrie::from(&info, &words);
            if !ends.is_empty() {
                trie = trie.with_eos_tokens(&ends);
            }
            let env: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
            let mut factory = ParserFactory::new_simple(&env)?;
            factory.quiet();
            *factory.limits_mut() = limits();
            Ok(factory)
        });
        made.map_err(|error| format!("cannot be used with this model's tokens: {}", message(&error.to_string())))
    }
}

/// What `llguidance` says, in one line: states, backtraces and copies of the text follow in others.
pub(super) fn message(error: &str) -> String {
    let mut lines = error.lines();
    let first = lines.next().unwrap_or_default().trim_end();
    if first.starts_with("panic: ") {
        return "llguidance cannot do this".to_owned();
    }
    if first == "NoExtensionBias" {
        return "no token of the model may come".to_owned();
    }
    // A regular expression's own message comes last.
    match lines.rev().find_map(|line| line.trim().strip_prefix("error: ")) {
        Some(regex) => format!("{}: {regex}", cut(first).trim_end_matches(':')),
        None => cut(first),
    }
}

fn cut(text: &str) -> String {
    match text.char_indices().nth(MESSAGE_CHARS_MAX) {
        Some((at, _)) => format!("{}...", &text[..at]),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn compiled(schema: Value) -> Result<Grammar, String> {
        let spec = GrammarSpec::JsonSchema(schema);
        Compiler::default().compile_with(spec, || Vocabulary::tiny(&[])).map_err(|error| error.to_string())
    }

    #[test]
    fn expressions_and_choices_are_grammars_of_nothing_else() {
        assert_eq!(expression("a/b\\/c\\d\n"), r"start: /a\/b\/c\d\n/");
        let texts = ["a\"b", "/"].map(str::to_owned);
        assert_eq!(choice(&texts), r#"start: "a\"b" | "/""#);
        match Compiler::default().compile_with(GrammarSpec::Regex("(".to_owned()), || Vocabulary::tiny(&[])) {
            Err(Failure::InvalidRequest { param, .. }) => assert_eq!(param, "regex"),
            other => panic!("{other:?}"),
        }
        let made = [GrammarSpec::Regex("a/b+".to_owned()), GrammarSpec::Choice(texts.to_vec())];
        for spec in made {
            assert!(Compiler::default().compile_with(spec, || Vocabulary::tiny(&[])).is_ok());
        }
    }

    #[test]
    fn what_libraries_write_for_validators_is_no_mistake() {
        let text = |format: &str| json!({ "type": "string", "format": format });
        let formats =
            ["path", "file-path", "binary", "byte", "password", "uuid4", "base64url", "regex", "uri-reference"];
        let formats = formats.map(text).into_iter();
        let decimal = json!({ "type": "string", "pattern": r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$" });
        let others = [
            json!({ "type": "object", "propertyNames": { "type": "string" }, "additionalProperties": { "type": "null" } }),
            json!({ "type": "array", "uniqueItems": true, "items": { "type": "integer" } }),
            json!({ "anyOf": [{ "type": "number" }, decimal] }),
            json!({ "type": "object", "minProperties": 2, "additionalProperties": { "type": "integer" } }),
            json!({ "oneOf": [{ "type": "integer" }, { "type": "number" }] }),
        ];
        for schema in formats.chain(others) {
            for schema in [schema.clone(), json!({ "type": "object", "properties": { "a": schema } })] {
                let said = compiled(schema.clone()).err();
                assert_eq!(said, None, "{schema}");
            }
        }
    }

    #[test]
    fn constraints_that_would_not_be_followed_are_refused_wherever_they_stand() {
        let refused = |schema: Value| compiled(schema).expect_err("a constraint");
        let schema = json!({ "properties": { "a": { "uniqueItems": true, "contains": {}, "if": {}, "then": {} } } });
        let said = refused(schema.clone());
        assert!(said.contains("'#/properties/a'") && said.contains("[\"contains\", \"if\", \"then\"]"), "{said}");
        let call = GrammarSpec::Call(format!("start: %json {}", laid_out(&schema)));
        let said = Compiler::default().compile_with(call, || Vocabulary::tiny(&[])).expect_err("a constraint");
        assert!(said.to_string().starts_with("'tools'") && said.to_string().contains("contains"), "{said}");
    }

    #[test]
    fn a_schemas_own_layout_leaves_the_bound_on_blanks() {
        let schema = json!({ "type": "array", "maxItems": 0, "x-guidance": { "item_separator": ";" } });
        let mut grammar = compiled(schema).expect("a grammar");
        grammar.commit(u32::from(b'[')).expect("an array");
        for _ in 0..40 {
            grammar.commit(u32::from(b' ')).expect("a blank");
        }
        let mut logits = [0.0; 129];
        grammar.mask(&mut logits).expect("a mask");
        assert!(logits[usize::from(b' ')].is_infinite() && logits[usize::from(b']')].is_finite());
    }
}
