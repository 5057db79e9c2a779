//! Which part of a schema is it that cannot be used? `llguidance` says what is wrong, not always where.

use serde_json::Value;

/// Most parts that are tried.
const TRIES_MAX: u32 = 200;

/// The smallest part of `schema` that fails with the same message as the whole, as a JSON pointer (RFC 6901) in the
/// form of a `$ref`: `#`, `#/properties/city`. `error_of` compiles a part and answers what is wrong with it.
pub(super) fn failing_place(schema: &Value, error: &str, error_of: &dyn Fn(&Value) -> Option<String>) -> String {
    let mut place = "#".to_owned();
    // A limit is reached by the whole; and parts that reach it take long.
    if ["too large", "too complex", "too many", "fuel", "limit"].iter().any(|word| error.contains(word)) {
        return place;
    }
    let mut part = schema;
    let mut tries = 0;
    'down: loop {
        for (path, child) in children(part) {
            tries += 1;
            if tries > TRIES_MAX {
                return place;
            }
            if error_of(&with_definitions(child, schema)).as_deref() == Some(error) {
                place += &path;
                part = child;
                continue 'down;
            }
        }
        return place;
    }
}

/// The schemas right inside a schema, each with its path.
fn children(schema: &Value) -> Vec<(String, &Value)> {
    let mut found = Vec::new();
    for (key, value) in schema.as_object().into_iter().flatten() {
        match (key.as_str(), value) {
            ("properties" | "patternProperties" | "$defs" | "definitions", Value::Object(parts)) => {
                found.extend(parts.iter().map(|(name, part)| (format!("/{key}/{}", escaped(name)), part)));
            }
            ("anyOf" | "oneOf" | "allOf" | "prefixItems" | "items", Value::Array(parts)) => {
                found.extend(parts.iter().enumerate().map(|(at, part)| (format!("/{key}/{at}"), part)));
            }
            ("items" | "additionalProperties" | "additionalItems" | "not" | "contains", Value::Object(_)) => {
                found.push((format!("/{key}"), value));
            }
            _ => {}
        }
    }
    found
}

/// `part` with the definitions of the whole, which it may refer to.
fn with_definitions(part: &Value, whole: &Value) -> Value {
    let mut part = part.clone();
    if let Some(members) = part.as_object_mut() {
        for key in ["$defs", "definitions"] {
            if let Some(definitions) = whole.get(key).filter(|_| !members.contains_key(key)) {
                members.insert(key.to_owned(), definitions.clone());
            }
        }
    }
    part
}

fn escaped(name: &str) -> String {
    name.replace('~', "~0").replace('/', "~1")
}
