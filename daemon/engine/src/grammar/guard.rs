//! Which grammars does `llguidance` not bound by itself? Refused before it sees them.
//!
//! Its fuel is counted between derivatives of regular expressions, and one derivative of an intersection of many can
//! take all memory; a `multipleOf` is an automaton with as many states as its digits say. The figures behind the
//! limits: 4 intersections of adverse expressions are refused or compiled in 50 ms, 10 take 3 s, 59 took 15 GiB.

use serde_json::{Map, Value};

/// Longest schema or grammar in bytes.
const GRAMMAR_BYTES_MAX: usize = 64 << 10;
/// Most `&` of a Lark grammar, wherever they stand: `\u0026` in a string and `\x26` in a pattern do not count.
const INTERSECTIONS_MAX: usize = 4;
/// Most regular expressions of a schema that may intersect some of them.
const PATTERNS_MAX: usize = 4;
/// Greatest least common multiple of a schema's `multipleOf`s, in units of their last decimal.
const MULTIPLE_MAX: u64 = 10_000;
/// Most decimals of a `multipleOf`.
const DECIMALS_MAX: usize = 9;

/// Whether a Lark grammar is bounded.
///
/// # Errors
/// Which limit it exceeds.
pub(super) fn check_lark(text: &str) -> Result<(), String> {
    check_length(text.len())?;
    let intersections = text.matches('&').count();
    if intersections > INTERSECTIONS_MAX {
        return Err(format!("has {intersections} '&', the limit is {INTERSECTIONS_MAX}"));
    }
    // What is no JSON here llguidance refuses.
    let schemas = text
        .split("%json")
        .skip(1)
        .filter_map(|rest| serde_json::Deserializer::from_str(rest).into_iter::<Value>().next().and_then(Result::ok));
    schemas.into_iter().try_for_each(|schema| check_schema(&schema))
}

/// Whether a JSON Schema is bounded.
///
/// # Errors
/// Which limit it exceeds.
pub(super) fn check_schema(schema: &Value) -> Result<(), String> {
    check_length(schema.to_string().len())?;
    let mut found = Found::default();
    found.read(schema);
    if found.combines && found.patterns > PATTERNS_MAX {
        return Err(format!(
            "has a schema with {} patterns and formats that combines schemas (allOf; anyOf, oneOf or $ref beside other \
             keywords): the limit is {PATTERNS_MAX} then",
            found.patterns
        ));
    }
    if found.common_multiple().is_none_or(|multiple| multiple > MULTIPLE_MAX) {
        return Err(format!(
            "has a schema whose multipleOf are too large: their least common multiple, in units of the last decimal, \
             may be {MULTIPLE_MAX}"
        ));
    }
    Ok(())
}

fn check_length(bytes: usize) -> Result<(), String> {
    if bytes > GRAMMAR_BYTES_MAX {
        return Err(format!("has {bytes} bytes, the limit is {GRAMMAR_BYTES_MAX}"));
    }
    Ok(())
}

/// What in a schema costs.
#[derive(Default)]
struct Found {
    patterns: usize,
    combines: bool,
    multiples: Vec<String>,
}

impl Found {
    /// JSON from a request's body is nested at most 128 deep.
    fn read(&mut self, value: &Value) {
        match value {
            Value::Object(members) => {
                self.note(members);
                members.values().for_each(|member| self.read(member));
            }
            Value::Array(list) => list.iter().for_each(|member| self.read(member)),
            _ => {}
        }
    }

    fn note(&mut self, members: &Map<String, Value>) {
        let has = |key: &str| members.contains_key(key);
        self.patterns += usize::from(has("pattern")) + usize::from(has("format"));
        if let Some(Value::Object(patterns)) = members.get("patternProperties") {
            self.patterns += patterns.len();
        }
        if let Some(multiple @ Value::Number(_)) = members.get("multipleOf") {
            self.multiples.push(multiple.to_string());
        }
        let branches = ["anyOf", "oneOf", "$ref"].iter().filter(|key| has(key)).count();
        let constrains = ["pattern", "format", "properties", "patternProperties", "additionalProperties", "items"];
        let beside = constrains.iter().chain(&["prefixItems", "multipleOf"]).any(|key| has(key));
        self.combines |= has("allOf") || branches > 1 || branches == 1 && beside;
    }

    /// `None` when it cannot be said, or is larger than any limit.
    fn common_multiple(&self) -> Option<u64> {
        let decimals = |text: &str| text.split_once('.').map_or(0, |(_, decimals)| decimals.len());
        let most = self.multiples.iter().map(|text| decimals(text)).max().unwrap_or(0);
        if most > DECIMALS_MAX {
            return None;
        }
        self.multiples.iter().try_fold(1, |common, text| {
            // An exponent is no digit: such numbers are refused.
            let digits: u64 = text.replace(['.', '-'], "").parse().ok()?;
            let scale = 10u64.checked_pow(u32::try_from(most - decimals(text)).ok()?)?;
            least_common_multiple(common, digits.checked_mul(scale)?)
        })
    }
}

fn least_common_multiple(a: u64, b: u64) -> Option<u64> {
    let (mut divisor, mut rest) = (a, b);
    while rest != 0 {
        (divisor, rest) = (rest, divisor % rest);
    }
    // 0 is no multiple; llguidance says so itself.
    a.checked_div(divisor).map_or(Some(0), |part| part.checked_mul(b))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn intersections_are_few() {
        assert!(check_lark("start: A\nA: /a/ & /b/ & /c/ & /d/ & /e/").is_ok());
        assert!(check_lark("start: A\nA: /a/ & /b/ & /c/ & /d/ & /e/ & /f/").unwrap_err().contains("5 '&'"));
    }

    #[test]
    fn a_schema_inside_a_grammar_is_checked_too() {
        assert!(check_lark(r#"start: "a" %json {"multipleOf": 3} "b""#).is_ok());
        assert!(check_lark(r#"start: "a" %json {"multipleOf": 123456789} "b""#).is_err());
    }

    #[test]
    fn many_patterns_are_fine_until_schemas_are_combined() {
        let fields: Map<String, Value> = (0..20).map(|i| (format!("p{i}"), json!({ "pattern": "a" }))).collect();
        assert!(check_schema(&json!({ "properties": fields })).is_ok());
        assert!(
            check_schema(&json!({ "properties": fields, "$defs": { "a": { "$ref": "#/b", "description": "x" } } }))
                .is_ok()
        );
        assert!(check_schema(&json!({ "allOf": [{ "properties": fields }] })).is_err());
        assert!(check_schema(&json!({ "properties": fields, "$ref": "#/a" })).is_err());
        assert!(check_schema(&json!({ "properties": { "a": { "anyOf": [], "oneOf": [], "b": fields } } })).is_err());
    }

    #[test]
    fn multiples_are_small_together() {
        let check = |multiples: &[f64]| {
            let parts: Vec<Value> = multiples.iter().map(|m| json!({ "multipleOf": m })).collect();
            check_schema(&json!({ "anyOf": parts })).is_ok()
        };
        assert!(check(&[0.01, 5.0]));
        assert!(check(&[60.0, 90.0, 100.0]));
        assert!(!check(&[9999.0, 9998.0]));
        assert!(!check(&[100_001.0]));
        assert!(!check(&[1e-30]));
        assert!(check_schema(&json!({ "multipleOf": 10_000 })).is_ok());
        assert!(check_schema(&json!({ "multipleOf": 0 })).is_ok());
    }
}
