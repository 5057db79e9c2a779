//! What must an answer be that has to call a function, or may do so beside an answer of a certain form? A grammar of
//! the model's syntax around a schema of arguments.

use super::layout::laid_out;
use super::syntax::{SEPARATOR, ToolSyntax};
use serde_json::{Map, Value, json};

impl ToolSyntax {
    /// A grammar in `llguidance`'s dialect of Lark: one call of one of `functions`, which have `name` and `parameters`.
    /// `is_token` says whether a tag is a control token. `None`: arguments are not written as JSON, or there are no
    /// calls.
    pub(in crate::chat) fn one_call(self, functions: &[&Value], is_token: impl Fn(&str) -> bool) -> Option<String> {
        self.calls(is_token, functions, |Calls { one, .. }| format!("start: {one}\n"))
    }

    /// The same for either JSON that `schema` describes, or one call after the other.
    pub(in crate::chat) fn calls_or_json(
        self,
        functions: &[&Value],
        schema: &Value,
        is_token: impl Fn(&str) -> bool,
    ) -> Option<String> {
        self.calls(is_token, functions, |Calls { several, .. }| {
            format!("start: json | calls\njson: %json {}\ncalls: {several}\n", plain(schema))
        })
    }

    fn calls(
        self,
        is_token: impl Fn(&str) -> bool,
        functions: &[&Value],
        start: impl FnOnce(Calls) -> String,
    ) -> Option<String> {
        let tags = self.tags()?;
        let tag = |name: &str| if is_token(name) { name.to_owned() } else { literal(name) };
        let (open, close) = (tag(tags.open), tag(tags.item_close));
        match (self, tags.block) {
            (Self::Hermes, _) => {
                let before = |name: &str| literal(&format!("{{\"name\": {}, \"arguments\": ", json!(name)));
                let one = format!("{open} \"\\n\" call \"}}\\n\" {close}");
                let several = format!("{one} (\"\\n\" {one})*");
                Some(start(Calls { one, several }) + &rules(functions, before))
            }
            (Self::DeepSeekV3, Some((item, block_close))) => {
                let (item, separator, end) = (tag(item), tag(SEPARATOR), tag(block_close));
                let before = |name: &str| format!("{} {separator}", literal(name));
                let one = format!("{open} {item} call {close} {end}");
                let several = format!("{open} {item} call {close} (\"\\n\"? {item} call {close})* {end}");
                Some(start(Calls { one, several }) + &rules(functions, before))
            }
            (Self::None | Self::Dsml | Self::Glm | Self::DeepSeekV3, _) => None,
        }
    }
}

/// Expressions around the rule `call`.
struct Calls {
    one: String,
    several: String,
}

/// The rule `call`, which begins with what `before` says of its function.
fn rules(functions: &[&Value], before: impl Fn(&str) -> String) -> String {
    let names: Vec<String> = (0..functions.len()).map(|at| format!("call{at}")).collect();
    let mut grammar = format!("call: {}\n", names.join(" | "));
    for (function, rule) in functions.iter().zip(names) {
        let before = before(function["name"].as_str().unwrap_or_default());
        grammar.push_str(&format!("{rule}: {before} %json {}\n", plain(&arguments(&function["parameters"]))));
    }
    grammar
}

/// A function's parameters as a schema of an object, written as models were shown it.
fn arguments(parameters: &Value) -> Value {
    let mut schema = parameters.as_object().cloned().unwrap_or_else(Map::new);
    schema.entry("type").or_insert_with(|| json!("object"));
    let layout = json!({ "whitespace_flexible": false, "item_separator": ", ", "key_separator": ": " });
    laid_out(&Value::Object(schema), &layout)
}

/// Lark's strings are JSON's.
fn literal(text: &str) -> String {
    plain(&json!(text))
}

/// JSON in which no `&` can be taken for Lark's intersection: the number of those is limited.
fn plain(value: &Value) -> String {
    value.to_string().replace('&', "\\u0026")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grammar(syntax: ToolSyntax, is_token: bool) -> Option<String> {
        let function = json!({ "name": "f", "parameters": { "properties": { "a": { "type": "integer" } } } });
        syntax.one_call(&[&function, &json!({ "name": "g" })], |_| is_token)
    }

    #[test]
    fn a_call_has_its_models_tags_as_tokens_or_text() {
        let hermes = grammar(ToolSyntax::Hermes, false).unwrap();
        assert!(
            hermes.starts_with("start: \"<tool_call>\" \"\\n\" call \"}\\n\" \"</tool_call>\"\ncall: call0 | call1\n")
        );
        assert!(hermes.contains(r#"call0: "{\"name\": \"f\", \"arguments\": " %json {"properties""#), "{hermes}");
        let v3 = grammar(ToolSyntax::DeepSeekV3, true).unwrap();
        assert!(v3.starts_with("start: <｜tool▁calls▁begin｜> <｜tool▁call▁begin｜> call <｜tool▁call▁end｜>"), "{v3}");
        assert!(v3.contains("call1: \"g\" <｜tool▁sep｜> %json {\"type\":\"object\""), "{v3}");
    }

    #[test]
    fn an_answer_may_be_calls_or_json_of_a_schema() {
        let schema = json!({ "type": "object", "description": "R&D" });
        let either = |syntax: ToolSyntax| syntax.calls_or_json(&[&json!({ "name": "f" })], &schema, |_| false);
        let hermes = either(ToolSyntax::Hermes).unwrap();
        let one = r#""<tool_call>" "\n" call "}\n" "</tool_call>""#;
        assert!(hermes.starts_with("start: json | calls\njson: %json {"), "{hermes}");
        assert!(hermes.contains(&format!("\ncalls: {one} (\"\\n\" {one})*\ncall: call0\n")), "{hermes}");
        assert!(hermes.contains(r"R\u0026D") && !hermes.contains('&'), "{hermes}");
        assert!(either(ToolSyntax::DeepSeekV3).is_some());
    }

    #[test]
    fn calls_whose_arguments_are_no_json_cannot_be_enforced() {
        for syntax in [ToolSyntax::None, ToolSyntax::Dsml, ToolSyntax::Glm] {
            assert!(grammar(syntax, true).is_none());
        }
    }
}
