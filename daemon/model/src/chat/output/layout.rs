//! How is a client's JSON Schema given to `llguidance`? With the layout of the JSON, and without what no automaton
//! follows.
//!
//! Schemas are written for validators. What those treat as a remark (formats that they do not know), and some
//! constraints that a client's validator looks at anyway, are no reason to refuse an answer: `llguidance` passes over
//! them where it is `lenient`. The engine's compiler says which keywords may be passed over; others are refused as
//! before.

use regex::RegexBuilder;
use serde_json::{Value, json};

/// The schema with `layout` (`llguidance`'s options, an object) beneath the options that it has itself.
pub fn laid_out(schema: &Value, layout: &Value) -> Value {
    let mut schema = schema.clone();
    follow(&mut schema);
    if let Some(members) = schema.as_object_mut() {
        let own = members.entry("x-guidance").or_insert_with(|| json!({}));
        // What is no object llguidance refuses.
        if let Some(own) = own.as_object_mut() {
            for (name, value) in layout.as_object().into_iter().flatten() {
                own.entry(name.as_str()).or_insert_with(|| value.clone());
            }
            own.entry("lenient").or_insert(Value::Bool(true));
        }
    }
    schema
}

/// Leaves out patterns that look around, wherever a schema stands.
fn follow(schema: &mut Value) {
    let Some(members) = schema.as_object_mut() else { return };
    if members.get("pattern").and_then(Value::as_str).is_some_and(looks_around) {
        members.shift_remove("pattern");
    }
    for (key, value) in members {
        match (key.as_str(), value) {
            ("properties" | "patternProperties" | "$defs" | "definitions", Value::Object(parts)) => {
                parts.values_mut().for_each(follow);
            }
            ("anyOf" | "oneOf" | "allOf" | "prefixItems" | "items", Value::Array(parts)) => {
                parts.iter_mut().for_each(follow);
            }
            ("items" | "additionalProperties" | "additionalItems", part) => follow(part),
            _ => {}
        }
    }
}

/// Whether a regular expression asks for what comes before or after its match: no automaton does that.
fn looks_around(pattern: &str) -> bool {
    // It is read, and never compiled: there is no room for what it would be.
    let read = |pattern: &str| RegexBuilder::new(pattern).size_limit(0).build().map(drop);
    pattern.contains("(?") && read(pattern).is_err_and(|error| error.to_string().contains("look-around"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_schemas_own_options_come_before_the_layout() {
        let layout = json!({ "whitespace_pattern": " ", "item_separator": ", " });
        let all = json!({ "whitespace_pattern": " ", "item_separator": ", ", "lenient": true });
        assert_eq!(laid_out(&json!({ "type": "null" }), &layout), json!({ "type": "null", "x-guidance": all }));
        let own = json!({ "x-guidance": { "item_separator": ",", "lenient": false } });
        let both = json!({ "whitespace_pattern": " ", "item_separator": ",", "lenient": false });
        assert_eq!(laid_out(&own, &layout)["x-guidance"], both);
        assert_eq!(laid_out(&json!({ "x-guidance": 1 }), &layout), json!({ "x-guidance": 1 }));
        assert_eq!(laid_out(&json!(["x"]), &layout), json!(["x"]));
    }

    #[test]
    fn patterns_that_look_around_are_left_out_of_schemas_and_nowhere_else() {
        let decimal = r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$";
        let text = json!({ "type": "string", "pattern": decimal });
        let followed = |schema: Value| {
            let mut schema = laid_out(&schema, &json!({}));
            schema.as_object_mut().unwrap().remove("x-guidance");
            schema
        };
        let plain = json!({ "type": "string" });
        for place in ["properties", "patternProperties", "$defs", "definitions"] {
            assert_eq!(followed(json!({ place: { "pattern": text } })), json!({ place: { "pattern": plain } }));
        }
        for place in ["anyOf", "oneOf", "allOf", "prefixItems", "items"] {
            assert_eq!(followed(json!({ place: [text] })), json!({ place: [plain] }));
        }
        for place in ["items", "additionalProperties", "additionalItems"] {
            assert_eq!(followed(json!({ place: text })), json!({ place: plain }));
        }
        for value in [json!({ "const": text }), json!({ "enum": [text] }), json!({ "default": text })] {
            assert_eq!(followed(value.clone()), value);
        }
    }

    #[test]
    fn a_pattern_looks_around_where_its_syntax_says_so() {
        for pattern in ["(?=a)b", "a(?!b)", "(?<=a)b", "(?<!a)b", "x{900}(?=a)"] {
            assert!(looks_around(pattern), "{pattern}");
        }
        for pattern in ["(?:a)", r"\(?=", "[(?=]", "(?<name>a)", "(?i)a", "([", r"\w{900}"] {
            assert!(!looks_around(pattern), "{pattern}");
        }
    }
}
