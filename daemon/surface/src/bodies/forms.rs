//! What must an answer be? One form in the words of OpenAI, llama.cpp, vLLM or SGLang.
//!
//! Servers ignore what they do not know. A client that asks for a form in another server's words would have text of any
//! form then, and not notice it: so all words that are in use are known here.

use super::missing::{is_asked, refuse_asked};
use crate::refusal::Refusal;
use serde::Deserialize;
use serde_json::Value;
use sparsed_engine::GrammarSpec;

/// Most texts of which an answer may be one.
const CHOICES_MAX: usize = 1000;

/// Fields that say what an answer must be; at most one of them does.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct FormFields {
    response_format: Option<ResponseFormat>,
    /// llama.cpp's name; here in llguidance's dialect of Lark.
    grammar: Option<String>,
    /// llama.cpp's, and SGLang's, which has it as text.
    json_schema: Option<Value>,
    /// SGLang's.
    regex: Option<String>,
    ebnf: Option<String>,
    /// vLLM's.
    structured_outputs: Option<StructuredOutputs>,
    /// vLLM's before 0.12.
    guided_json: Option<Value>,
    guided_regex: Option<String>,
    guided_choice: Option<Vec<String>>,
    guided_grammar: Option<String>,
}

/// OpenAI's `response_format`; `schema` beside `json_object` as llama.cpp has it.
#[derive(Clone, Debug, Deserialize)]
struct ResponseFormat {
    #[serde(rename = "type")]
    kind: String,
    schema: Option<Value>,
    json_schema: Option<JsonSchema>,
}

/// Its `name`, `description` and `strict` change nothing: a schema is always followed.
#[derive(Clone, Debug, Deserialize)]
struct JsonSchema {
    schema: Option<Value>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct StructuredOutputs {
    json: Option<Value>,
    json_object: Option<bool>,
    regex: Option<String>,
    choice: Option<Vec<String>>,
    grammar: Option<String>,
    // What is not served.
    structural_tag: Option<Value>,
    disable_additional_properties: Option<bool>,
}

impl StructuredOutputs {
    fn refuse_what_is_missing(&self) -> Result<(), Refusal> {
        let asked = [
            ("structured_outputs.structural_tag", is_asked(&self.structural_tag)),
            ("structured_outputs.disable_additional_properties", self.disable_additional_properties == Some(true)),
        ];
        refuse_asked(&asked, "is not served")
    }
}

impl FormFields {
    /// The form, if the request says any, and the field that says it.
    ///
    /// # Errors
    /// A form that is none, and more than one.
    pub(crate) fn spec(&self) -> Result<Option<(&'static str, GrammarSpec)>, Refusal> {
        let outputs = self.structured_outputs.clone().unwrap_or_default();
        outputs.refuse_what_is_missing()?;
        let lark = |text: &Option<String>| text.clone().map(GrammarSpec::Lark);
        let expression = |regex: &Option<String>| regex.clone().map(GrammarSpec::Regex);
        let outputs = [
            schema("structured_outputs", outputs.json.as_ref())?,
            outputs.json_object.filter(|is_asked| *is_asked).map(|_| GrammarSpec::JsonObject),
            expression(&outputs.regex),
            outputs.choice.as_deref().map(|texts| choice("structured_outputs", texts)).transpose()?,
            lark(&outputs.grammar),
        ];
        let outputs = outputs.into_iter().map(|form| ("structured_outputs", form));
        let others = [
            ("response_format", self.response_format.as_ref().map(ResponseFormat::spec).transpose()?.flatten()),
            ("grammar", lark(&self.grammar)),
            ("json_schema", schema("json_schema", self.json_schema.as_ref())?),
            ("regex", expression(&self.regex)),
            ("ebnf", lark(&self.ebnf)),
            ("guided_json", schema("guided_json", self.guided_json.as_ref())?),
            ("guided_regex", expression(&self.guided_regex)),
            ("guided_choice", self.guided_choice.as_deref().map(|all| choice("guided_choice", all)).transpose()?),
            ("guided_grammar", lark(&self.guided_grammar)),
        ];
        let mut forms = others.into_iter().chain(outputs).filter_map(|(name, form)| Some((name, form?)));
        let (first, second) = (forms.next(), forms.next());
        match (first, second) {
            (Some((first, _)), Some((name, _))) => {
                Err(Refusal::invalid(name, format!("and {first} exclude each other: an answer has one form")))
            }
            (first, _) => Ok(first),
        }
    }
}

impl ResponseFormat {
    fn spec(&self) -> Result<Option<GrammarSpec>, Refusal> {
        let Self { kind, schema, json_schema } = self;
        match kind.as_str() {
            "text" => Ok(None),
            "json_object" => Ok(Some(schema.clone().map_or(GrammarSpec::JsonObject, GrammarSpec::JsonSchema))),
            "json_schema" => {
                let schema = json_schema.as_ref().and_then(|format| format.schema.clone());
                let none = || Refusal::invalid("response_format", "has no json_schema.schema");
                Ok(Some(GrammarSpec::JsonSchema(schema.ok_or_else(none)?)))
            }
            other => {
                let reason = format!("is of type '{other}'; text, json_object and json_schema are served");
                Err(Refusal::invalid("response_format", reason))
            }
        }
    }
}

/// A schema, which may be written down as text.
fn schema(name: &str, value: Option<&Value>) -> Result<Option<GrammarSpec>, Refusal> {
    match value {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => {
            let schema = serde_json::from_str(text)
                .map_err(|error| Refusal::invalid(name, format!("is text that is no JSON: {error}")))?;
            Ok(Some(GrammarSpec::JsonSchema(schema)))
        }
        Some(schema) => Ok(Some(GrammarSpec::JsonSchema(schema.clone()))),
    }
}

fn choice(name: &str, texts: &[String]) -> Result<GrammarSpec, Refusal> {
    if !(1..=CHOICES_MAX).contains(&texts.len()) || texts.iter().any(String::is_empty) {
        return Err(Refusal::invalid(name, format!("must have 1 to {CHOICES_MAX} texts, none of them empty")));
    }
    Ok(GrammarSpec::Choice(texts.to_vec()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn form(text: &str) -> Result<Option<(&'static str, GrammarSpec)>, Value> {
        let fields: FormFields = serde_json::from_str(text).unwrap();
        fields.spec().map_err(|error| error.body()["error"]["param"].clone())
    }

    fn spec(text: &str) -> Result<Option<GrammarSpec>, Value> {
        form(text).map(|form| form.map(|(_, spec)| spec))
    }

    fn schema(value: Value) -> Result<Option<GrammarSpec>, Value> {
        Ok(Some(GrammarSpec::JsonSchema(value)))
    }

    fn lark(text: &str) -> Result<Option<GrammarSpec>, Value> {
        Ok(Some(GrammarSpec::Lark(text.to_owned())))
    }

    #[test]
    fn a_request_says_what_the_answer_must_be() {
        let any = json!({ "type": "array" });
        assert_eq!(spec("{}"), Ok(None));
        assert_eq!(spec(r#"{"response_format": {"type": "text"}}"#), Ok(None));
        assert_eq!(spec(r#"{"response_format": {"type": "json_object"}}"#), Ok(Some(GrammarSpec::JsonObject)));
        let openai = r#"{"response_format": {"type": "json_schema", "json_schema": {"name": "x", "strict": true, "schema": {"type": "array"}}}}"#;
        assert_eq!(spec(openai), schema(any.clone()));
        let llama = r#"{"response_format": {"type": "json_object", "schema": {"type": "array"}}}"#;
        assert_eq!(spec(llama), schema(any));
        assert_eq!(spec(r#"{"grammar": "start: \"a\""}"#), lark("start: \"a\""));
        for (json, param) in [
            (r#"{"response_format": {"type": "xml"}}"#, "response_format"),
            (r#"{"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}"#, "response_format"),
            (r#"{"response_format": {"type": "json_object"}, "grammar": "start: \"a\""}"#, "grammar"),
        ] {
            assert_eq!(spec(json), Err(param.into()), "{json}");
        }
    }

    #[test]
    fn the_field_that_says_the_form_is_known_by_its_name() {
        for (json, field) in [
            (r#"{"guided_regex": "a"}"#, "guided_regex"),
            (r#"{"structured_outputs": {"choice": ["a"]}}"#, "structured_outputs"),
            (r#"{"response_format": {"type": "json_object"}}"#, "response_format"),
        ] {
            assert_eq!(form(json).unwrap().unwrap().0, field);
        }
    }

    #[test]
    fn the_words_of_other_servers_mean_the_same() {
        let any = json!({ "type": "array" });
        for json in [
            r#"{"json_schema": {"type": "array"}}"#,
            r#"{"json_schema": "{\"type\": \"array\"}"}"#,
            r#"{"guided_json": {"type": "array"}}"#,
            r#"{"structured_outputs": {"json": {"type": "array"}, "whitespace_pattern": " "}}"#,
        ] {
            assert_eq!(spec(json), schema(any.clone()), "{json}");
        }
        assert_eq!(spec(r#"{"structured_outputs": {"json_object": true}}"#), Ok(Some(GrammarSpec::JsonObject)));
        for json in [r#"{"guided_choice": ["a\"b", "/"]}"#, r#"{"structured_outputs": {"choice": ["a\"b", "/"]}}"#] {
            assert_eq!(spec(json), Ok(Some(GrammarSpec::Choice(vec!["a\"b".to_owned(), "/".to_owned()]))));
        }
        for json in
            [r#"{"regex": "a/b+"}"#, r#"{"guided_regex": "a/b+"}"#, r#"{"structured_outputs": {"regex": "a/b+"}}"#]
        {
            assert_eq!(spec(json), Ok(Some(GrammarSpec::Regex("a/b+".to_owned()))));
        }
        assert_eq!(spec(r#"{"ebnf": "start: \"a\""}"#), lark("start: \"a\""));
        assert_eq!(spec(r#"{"structured_outputs": {}, "guided_json": null}"#), Ok(None));
        for (json, param) in [
            (r#"{"guided_choice": []}"#, "guided_choice"),
            (r#"{"structured_outputs": {"structural_tag": "{}"}}"#, "structured_outputs.structural_tag"),
            (
                r#"{"structured_outputs": {"json": {}, "disable_additional_properties": true}}"#,
                "structured_outputs.disable_additional_properties",
            ),
            (r#"{"json_schema": "{"}"#, "json_schema"),
            (r#"{"structured_outputs": {"regex": "a", "choice": ["b"]}}"#, "structured_outputs"),
        ] {
            assert_eq!(spec(json), Err(param.into()), "{json}");
        }
    }
}
