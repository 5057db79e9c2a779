//! How does the other engine hear a request? As the body of OpenAI's chat completion or completion, with the fields
//! that it knows beyond OpenAI's.

use crate::described::Described;
use crate::dialect::{Counting, Dialect};
use serde_json::{Map, Value, json};
use sparsed_engine::api::{Calling, Failure, Relay, RelayPrompt};
use sparsed_engine::{ChatRequest, GrammarSpec, Sampling};

/// The seeds that every engine takes: llama.cpp's has 32 bits, its greatest means a random one.
const SEED_MAX: u64 = 0x7fff_ffff;

/// Where to and with what.
#[derive(Debug, PartialEq)]
pub(crate) struct Body {
    /// Below the base address.
    pub(crate) endpoint: &'static str,
    pub(crate) json: Value,
}

impl Body {
    /// The body for a relay; with its priority where the engine is to hear of it.
    ///
    /// # Errors
    /// A wish that this engine does not know, by its name.
    pub(crate) fn of(relay: &Relay, there: &Described, with_priority: bool) -> Result<Self, Failure> {
        let mut json = Map::new();
        let mut set = |name: &str, value: Value| drop(json.insert(name.to_owned(), value));
        set("model", json!(there.model));
        set("stream", json!(true));
        let counting = if relay.wishes.progress { there.dialect.counting() } else { Counting::None };
        let mut options = json!({ "include_usage": true });
        match counting {
            Counting::OfPromptToo => {
                set("return_progress", json!(true));
                set("timings_per_token", json!(true));
            }
            Counting::OfTokens => options["continuous_usage_stats"] = json!(true),
            Counting::None => {}
        }
        set("stream_options", options);
        let endpoint = match &relay.prompt {
            RelayPrompt::Chat { chat, calling } => {
                chat_fields(chat, (calling, relay.wishes.one_call), there.dialect, &mut set)?;
                "/chat/completions"
            }
            RelayPrompt::Text(text) => {
                set("prompt", json!(text));
                "/completions"
            }
            RelayPrompt::Tokens(tokens) => {
                set("prompt", json!(tokens));
                "/completions"
            }
        };
        // At least one alternative: for llama.cpp none is no logprobs at all.
        match (relay.logprobs, &relay.prompt) {
            (Some(n), RelayPrompt::Chat { .. }) => {
                set("logprobs", json!(true));
                set("top_logprobs", json!(n.max(1)));
            }
            (Some(n), _) => set("logprobs", json!(n.max(1))),
            (None, _) => {}
        }
        let wishes = &relay.wishes;
        if let Some(n) = wishes.max_tokens {
            set("max_tokens", json!(n));
        }
        if !wishes.stops.is_empty() {
            set("stop", json!(wishes.stops));
        }
        sampling_fields(&wishes.sampling, there.dialect, &mut set)?;
        if wishes.ignore_end {
            known(there, "ignore_eos")?;
            set("ignore_eos", json!(true));
        }
        owner_fields(relay, there.dialect, with_priority, &mut set)?;
        if let Some(spec) = &wishes.grammar {
            let not_known = || not_known(there.dialect, wishes.form.unwrap_or("grammar"));
            let (name, value) = grammar_field(spec, there.dialect).ok_or_else(not_known)?;
            set(name, value);
        }
        Ok(Self { endpoint, json: Value::Object(json) })
    }
}

fn chat_fields(
    chat: &ChatRequest,
    (calling, one_call): (&Calling, bool),
    dialect: Dialect,
    set: &mut impl FnMut(&str, Value),
) -> Result<(), Failure> {
    let unwritable = |error: serde_json::Error| Failure::invalid("messages", format!("cannot be passed on: {error}"));
    set("messages", serde_json::to_value(&chat.messages).map_err(unwritable)?);
    if !chat.tools.is_empty() {
        set("tools", json!(chat.tools));
        if one_call {
            set("parallel_tool_calls", json!(false));
        }
    }
    if chat.continues {
        match dialect {
            Dialect::OpenAi => return Err(not_known(dialect, "continue_final_message")),
            Dialect::LlamaCpp => {} // always
            Dialect::Vllm | Dialect::SgLang | Dialect::Sparsed => {
                set("continue_final_message", json!(true));
                set("add_generation_prompt", json!(false));
            }
        }
    }
    match calling {
        Calling::Free => {}
        Calling::Required => set("tool_choice", json!("required")),
        Calling::Only(name) => set("tool_choice", json!({ "type": "function", "function": { "name": name } })),
    }
    let arguments = thinking_fields(chat, dialect, set);
    if !arguments.is_empty() {
        if dialect == Dialect::OpenAi {
            return Err(not_known(dialect, "chat_template_kwargs"));
        }
        set("chat_template_kwargs", Value::Object(arguments));
    }
    Ok(())
}

/// How the model is to think; answers the template's arguments, with what is said by them.
fn thinking_fields(chat: &ChatRequest, dialect: Dialect, set: &mut impl FnMut(&str, Value)) -> Map<String, Value> {
    let mut arguments = chat.template_arguments.clone();
    let effort = chat.effort.as_deref();
    match (effort, dialect) {
        (None, _) => {}
        // Its template may have degrees all the same.
        (Some(effort), Dialect::LlamaCpp) => {
            arguments.entry("reasoning_effort").or_insert_with(|| json!(effort));
        }
        // Not all of them know this one; the variables below say it.
        (Some("none"), Dialect::Vllm | Dialect::SgLang | Dialect::Sparsed) => {}
        (Some(effort), _) => set("reasoning_effort", json!(effort)),
    }
    let is_said = dialect == Dialect::OpenAi && chat.thinking == effort.map(|effort| effort != "none");
    if let Some(thinking) = chat.thinking.filter(|_| !is_said) {
        // Templates differ in the name.
        for name in ["thinking", "enable_thinking"] {
            arguments.insert(name.to_owned(), json!(thinking));
        }
    }
    arguments
}

/// What is said of those who ask: whose turn it is, and with whom rows are shared.
fn owner_fields(
    relay: &Relay,
    dialect: Dialect,
    with_priority: bool,
    set: &mut impl FnMut(&str, Value),
) -> Result<(), Failure> {
    match (relay.wishes.cache_salt, dialect) {
        (None, _) => {}
        (Some(salt), Dialect::Vllm | Dialect::SgLang | Dialect::Sparsed) => {
            set("cache_salt", json!(salt.relayed(relay.owner)));
        }
        (Some(_), Dialect::LlamaCpp | Dialect::OpenAi) => return Err(not_known(dialect, "cache_salt")),
    }
    let priority = Some(relay.wishes.urgency.priority).filter(|priority| with_priority && *priority != 0);
    if let Some(priority) = priority.and_then(|priority| dialect.priority(priority)) {
        set("priority", json!(priority));
    }
    Ok(())
}

/// What an engine would choose by itself is said too: its own choices are others than ours.
fn sampling_fields(sampling: &Sampling, dialect: Dialect, set: &mut impl FnMut(&str, Value)) -> Result<(), Failure> {
    set("temperature", json!(sampling.temperature));
    set("top_p", json!(sampling.top_p));
    set("seed", json!(sampling.seed & SEED_MAX));
    for (name, value) in
        [("frequency_penalty", sampling.frequency_penalty), ("presence_penalty", sampling.presence_penalty)]
    {
        if value != 0.0 {
            set(name, json!(value));
        }
    }
    if !sampling.logit_bias.is_empty() {
        let biases = sampling.logit_bias.iter().map(|(token, bias)| (token.to_string(), json!(bias)));
        set("logit_bias", Value::Object(biases.collect()));
    }
    let off = Sampling::default();
    let Some(repetition_penalty) = dialect.repetition_penalty() else {
        let asked = [
            ("top_k", sampling.top_k != off.top_k),
            ("min_p", sampling.min_p != off.min_p),
            ("repetition_penalty", sampling.repetition_penalty != off.repetition_penalty),
        ];
        return match asked.iter().find(|(_, asked)| *asked) {
            Some((name, _)) => Err(not_known(dialect, name)),
            None => Ok(()),
        };
    };
    let all = if dialect.all_is_minus_one() { json!(-1) } else { json!(0) };
    set("top_k", if sampling.top_k == 0 { all } else { json!(sampling.top_k) });
    set("min_p", json!(sampling.min_p));
    set(repetition_penalty, json!(sampling.repetition_penalty));
    Ok(())
}

/// The field for what an answer must be; `None`: the engine has none.
fn grammar_field(spec: &GrammarSpec, dialect: Dialect) -> Option<(&'static str, Value)> {
    match (spec, dialect) {
        (GrammarSpec::JsonObject, _) => Some(("response_format", json!({ "type": "json_object" }))),
        (GrammarSpec::JsonSchema(schema), _) => {
            let schema = json!({ "name": "answer", "strict": true, "schema": schema });
            Some(("response_format", json!({ "type": "json_schema", "json_schema": schema })))
        }
        (GrammarSpec::Regex(regex), Dialect::Vllm) => Some(("structured_outputs", json!({ "regex": regex }))),
        (GrammarSpec::Regex(regex), Dialect::SgLang | Dialect::Sparsed) => Some(("regex", json!(regex))),
        (GrammarSpec::Choice(texts), Dialect::Vllm) => Some(("structured_outputs", json!({ "choice": texts }))),
        (GrammarSpec::Choice(texts), Dialect::Sparsed) => Some(("guided_choice", json!(texts))),
        (GrammarSpec::Choice(texts), Dialect::SgLang) => Some(("regex", json!(one_of(texts, quoted_for_regex, "|")))),
        (GrammarSpec::Choice(texts), Dialect::LlamaCpp) => {
            Some(("grammar", json!(format!("root ::= {}", one_of(texts, quoted_for_gbnf, " | ")))))
        }
        (GrammarSpec::Lark(text), dialect) if dialect.takes_lark() => Some(("grammar", json!(text))),
        // Calls are enforced by `tool_choice`; no door makes one of those for an engine elsewhere.
        _ => None,
    }
}

fn one_of(texts: &[String], quoted: fn(&str) -> String, or: &str) -> String {
    texts.iter().map(|text| quoted(text)).collect::<Vec<_>>().join(or)
}

/// A text as a regular expression of nothing else.
fn quoted_for_regex(text: &str) -> String {
    let mut quoted = String::with_capacity(text.len());
    for letter in text.chars() {
        if r"\.+*?()|[]{}^$".contains(letter) {
            quoted.push('\\');
        }
        quoted.push(letter);
    }
    quoted
}

/// A text as llama.cpp's grammars have it.
fn quoted_for_gbnf(text: &str) -> String {
    let mut quoted = String::from("\"");
    for letter in text.chars() {
        match letter {
            '"' | '\\' => quoted.extend(['\\', letter]),
            '\n' => quoted.push_str("\\n"),
            '\r' => quoted.push_str("\\r"),
            '\t' => quoted.push_str("\\t"),
            other => quoted.push(other),
        }
    }
    quoted.push('"');
    quoted
}

/// # Errors
/// Where only OpenAI's fields are known.
fn known(there: &Described, param: &str) -> Result<(), Failure> {
    if there.dialect == Dialect::OpenAi { Err(not_known(there.dialect, param)) } else { Ok(()) }
}

fn not_known(dialect: Dialect, param: &str) -> Failure {
    let reason =
        format!("cannot be passed on: the engine that computes this model ({}) does not know it", dialect.name());
    Failure::invalid(param, reason)
}

#[cfg(test)]
mod tests {
    use super::*;
    use sparsed_engine::api::{CacheSalt, Owner};
    use sparsed_engine::{ChatMessage, Role, Wishes};

    fn there(dialect: Dialect) -> Described {
        Described { model: "ds".to_owned(), max_context: None, dialect }
    }

    fn chat() -> Relay {
        let messages = vec![ChatMessage::new(Role::User, "x")];
        let chat = Box::new(ChatRequest { messages, ..ChatRequest::default() });
        Relay {
            model: "big".to_owned(),
            owner: Owner::Uid(1),
            prompt: RelayPrompt::Chat { chat, calling: Calling::Free },
            wishes: Wishes::default(),
            logprobs: None,
        }
    }

    fn body(relay: &Relay, dialect: Dialect) -> Value {
        Body::of(relay, &there(dialect), true).unwrap().json
    }

    fn refused(relay: &Relay, dialect: Dialect) -> String {
        match Body::of(relay, &there(dialect), true).unwrap_err() {
            Failure::InvalidRequest { param, .. } => param,
            other => panic!("{other}"),
        }
    }

    #[test]
    fn a_plain_chat_asks_openai_for_what_openai_knows_only() {
        let expected = json!({
            "model": "ds", "stream": true, "stream_options": { "include_usage": true },
            "messages": [{ "role": "user", "content": "x" }], "temperature": 1.0, "top_p": 1.0, "seed": 0,
        });
        assert_eq!(body(&chat(), Dialect::OpenAi), expected);
    }

    #[test]
    fn what_an_engine_would_choose_otherwise_is_said_in_its_own_words() {
        let of = |dialect| body(&chat(), dialect);
        assert_eq!((&of(Dialect::Vllm)["top_k"], &of(Dialect::LlamaCpp)["top_k"]), (&json!(-1), &json!(0)));
        assert_eq!(of(Dialect::LlamaCpp)["repeat_penalty"], 1.0);
        assert_eq!(of(Dialect::Sparsed)["repetition_penalty"], 1.0);
    }

    #[test]
    fn a_wish_that_the_engine_does_not_know_is_refused_by_its_name() {
        let with = |edit: fn(&mut Relay)| {
            let mut relay = chat();
            edit(&mut relay);
            relay
        };
        let top_k = with(|relay| relay.wishes.sampling.top_k = 4);
        assert_eq!(
            (refused(&top_k, Dialect::OpenAi), &body(&top_k, Dialect::SgLang)["top_k"]),
            ("top_k".to_owned(), &json!(4))
        );
        let grammar = with(|relay| relay.wishes.grammar = Some(GrammarSpec::Lark("start: \"a\"".to_owned())));
        for dialect in [Dialect::Vllm, Dialect::SgLang, Dialect::LlamaCpp, Dialect::OpenAi] {
            assert_eq!(refused(&grammar, dialect), "grammar");
        }
        assert_eq!(body(&grammar, Dialect::Sparsed)["grammar"], "start: \"a\"");
        assert_eq!(refused(&with(|relay| relay.wishes.ignore_end = true), Dialect::OpenAi), "ignore_eos");
        let thinking = with(|relay| {
            let RelayPrompt::Chat { chat, .. } = &mut relay.prompt else { panic!("a chat") };
            chat.thinking = Some(false);
        });
        assert_eq!(refused(&thinking, Dialect::OpenAi), "chat_template_kwargs");
        assert_eq!(body(&thinking, Dialect::Vllm)["chat_template_kwargs"]["enable_thinking"], false);
    }

    #[test]
    fn a_form_is_said_in_the_words_of_the_engine_or_refused_in_the_clients() {
        let with = |spec: GrammarSpec| {
            let mut relay = chat();
            (relay.wishes.grammar, relay.wishes.form) = (Some(spec), Some("structured_outputs"));
            relay
        };
        let regex = with(GrammarSpec::Regex("a+".to_owned()));
        assert_eq!(body(&regex, Dialect::Vllm)["structured_outputs"], json!({ "regex": "a+" }));
        for dialect in [Dialect::SgLang, Dialect::Sparsed] {
            assert_eq!(body(&regex, dialect)["regex"], "a+");
        }
        let choice = with(GrammarSpec::Choice(vec!["a.\"".to_owned(), "b\\\n".to_owned()]));
        assert_eq!(body(&choice, Dialect::Vllm)["structured_outputs"]["choice"], json!(["a.\"", "b\\\n"]));
        assert_eq!(body(&choice, Dialect::Sparsed)["guided_choice"], json!(["a.\"", "b\\\n"]));
        assert_eq!(body(&choice, Dialect::SgLang)["regex"], "a\\.\"|b\\\\\n");
        assert_eq!(body(&choice, Dialect::LlamaCpp)["grammar"], r#"root ::= "a.\"" | "b\\\n""#);
        for (relay, dialect) in [
            (&regex, Dialect::LlamaCpp),
            (&regex, Dialect::OpenAi),
            (&choice, Dialect::OpenAi),
            (&with(GrammarSpec::Lark("start: \"a\"".to_owned())), Dialect::Vllm),
        ] {
            assert_eq!(refused(relay, dialect), "structured_outputs");
        }
    }

    #[test]
    fn a_salt_is_passed_on_for_each_owner_or_refused_where_rows_would_be_shared() {
        let salted = |owner: u32| {
            let mut relay = Relay { owner: Owner::Uid(owner), ..chat() };
            relay.wishes.cache_salt = Some(CacheSalt::checked("x").unwrap());
            relay
        };
        let told = |owner: u32, dialect| body(&salted(owner), dialect)["cache_salt"].clone();
        for dialect in [Dialect::Vllm, Dialect::SgLang, Dialect::Sparsed] {
            assert!(told(1, dialect).as_str().is_some_and(|salt| salt.len() == 64));
        }
        assert_ne!(told(1, Dialect::Vllm), told(2, Dialect::Vllm));
        for dialect in [Dialect::LlamaCpp, Dialect::OpenAi] {
            assert_eq!(refused(&salted(1), dialect), "cache_salt");
        }
    }

    #[test]
    fn an_effort_is_passed_on_as_the_word_that_it_is() {
        let asked = |effort: &str, dialect| {
            let mut relay = chat();
            let RelayPrompt::Chat { chat, .. } = &mut relay.prompt else { panic!("a chat") };
            (chat.effort, chat.thinking) = (Some(effort.to_owned()), Some(effort != "none"));
            let body = body(&relay, dialect);
            (body["reasoning_effort"].clone(), body["chat_template_kwargs"].clone())
        };
        for dialect in [Dialect::Vllm, Dialect::SgLang, Dialect::Sparsed] {
            let thinking = |is_on: bool| json!({ "thinking": is_on, "enable_thinking": is_on });
            assert_eq!(asked("low", dialect), (json!("low"), thinking(true)));
            assert_eq!(asked("none", dialect), (Value::Null, thinking(false)));
        }
        let (none, variables) = asked("low", Dialect::LlamaCpp);
        assert_eq!((none, &variables["reasoning_effort"]), (Value::Null, &json!("low")));
        for effort in ["low", "none"] {
            assert_eq!(asked(effort, Dialect::OpenAi), (json!(effort), Value::Null), "it is OpenAI's own field");
        }
    }

    #[test]
    fn a_priority_is_told_to_those_who_have_them_if_they_are_to_hear_of_it() {
        let mut relay = chat();
        relay.wishes.urgency.priority = 5;
        let told = |dialect| body(&relay, dialect).get("priority").cloned();
        assert_eq!((told(Dialect::Vllm), told(Dialect::SgLang)), (Some(json!(5)), Some(json!(-5))));
        assert_eq!((told(Dialect::LlamaCpp), told(Dialect::OpenAi)), (None, None));
        let untold = Body::of(&relay, &there(Dialect::Vllm), false).unwrap().json;
        assert!(untold.get("priority").is_none());
    }

    #[test]
    fn an_engine_is_asked_to_count_as_it_can_and_only_where_somebody_wants_to_hear_it() {
        let mut relay = chat();
        assert!(body(&relay, Dialect::Sparsed).get("return_progress").is_none());
        relay.wishes.progress = true;
        for dialect in [Dialect::Sparsed, Dialect::LlamaCpp] {
            let body = body(&relay, dialect);
            assert_eq!((&body["return_progress"], &body["timings_per_token"]), (&json!(true), &json!(true)));
        }
        for dialect in [Dialect::Vllm, Dialect::SgLang] {
            assert_eq!(body(&relay, dialect)["stream_options"]["continuous_usage_stats"], true);
        }
        assert_eq!(body(&relay, Dialect::OpenAi)["stream_options"], json!({ "include_usage": true }));
    }

    #[test]
    fn what_is_said_of_calls_and_of_an_answer_that_goes_on_is_said_where_it_is_known() {
        let mut relay = chat();
        relay.wishes.one_call = true;
        assert!(body(&relay, Dialect::OpenAi).get("parallel_tool_calls").is_none(), "there is nothing to call");
        let RelayPrompt::Chat { chat, .. } = &mut relay.prompt else { panic!("a chat") };
        chat.tools = vec![json!({ "type": "function", "function": { "name": "f" } })];
        assert_eq!(body(&relay, Dialect::OpenAi)["parallel_tool_calls"], false);
        let RelayPrompt::Chat { chat, .. } = &mut relay.prompt else { panic!("a chat") };
        chat.continues = true;
        assert_eq!(refused(&relay, Dialect::OpenAi), "continue_final_message");
        let said = |dialect| body(&relay, dialect).get("add_generation_prompt").cloned();
        assert_eq!((said(Dialect::Vllm), said(Dialect::LlamaCpp)), (Some(json!(false)), None));
    }

    #[test]
    fn calls_schemas_and_logprobs_have_openais_forms() {
        let mut relay = chat();
        let RelayPrompt::Chat { chat, calling } = &mut relay.prompt else { panic!("a chat") };
        chat.tools = vec![json!({ "type": "function", "function": { "name": "f" } })];
        *calling = Calling::Only("f".to_owned());
        relay.wishes.grammar = Some(GrammarSpec::JsonSchema(json!({ "type": "array" })));
        relay.logprobs = Some(0);
        let body = body(&relay, Dialect::OpenAi);
        assert_eq!(body["tool_choice"]["function"]["name"], "f");
        assert_eq!(body["response_format"]["json_schema"]["schema"]["type"], "array");
        assert_eq!((&body["logprobs"], &body["top_logprobs"]), (&json!(true), &json!(1)));
    }

    #[test]
    fn texts_and_tokens_are_completions_and_a_seed_fits_every_engine() {
        let mut relay = Relay { prompt: RelayPrompt::Tokens(vec![3, 4]), logprobs: Some(2), ..chat() };
        relay.wishes.sampling.seed = u64::MAX;
        let body = Body::of(&relay, &there(Dialect::Vllm), false).unwrap();
        assert_eq!((body.endpoint, &body.json["prompt"]), ("/completions", &json!([3, 4])));
        assert_eq!((&body.json["seed"], &body.json["logprobs"]), (&json!(SEED_MAX), &json!(2)));
    }
}
