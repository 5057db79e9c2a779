//! Which fields may a body have? All of them are ignored that are not known, unless the client says `"strict": true`.

use super::parse;
use crate::refusal::Refusal;
use serde::de::value::Error;
use serde::de::{DeserializeOwned, Deserializer, Error as _, IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, forward_to_deserialize_any};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;

/// Fields that change nothing here and are no mistake: labels, and wishes about what this daemon does not have.
const HARMLESS: &[&str] = &[
    "max_tool_calls",
    "metadata",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "strict",
    "user",
];

#[derive(serde::Deserialize)]
struct Strict {
    strict: Option<bool>,
}

/// Refuses fields that none of `A`, `B`, `C` and `D` has, if the body says that it is strict.
///
/// # Errors
/// The first unknown field.
pub(super) fn check<A, B, C, D>(body: &[u8]) -> Result<(), Refusal>
where
    A: DeserializeOwned,
    B: DeserializeOwned,
    C: DeserializeOwned,
    D: DeserializeOwned,
{
    if parse::<Strict>(body)?.strict != Some(true) {
        return Ok(());
    }
    let known = [HARMLESS, names::<A>(), names::<B>(), names::<C>(), names::<D>()];
    let all = parse::<BTreeMap<String, IgnoredAny>>(body)?;
    match all.keys().find(|name| !known.iter().any(|names| names.contains(&name.as_str()))) {
        Some(name) => Err(Refusal::invalid(name, "is not known, and the request is strict")),
        None => Ok(()),
    }
}

/// The fields that `A` or `B` has, as the body has them, for who writes a body anew in other words.
///
/// # Errors
/// What is wrong with the body, and a field that is there twice.
pub(super) fn shared<A: DeserializeOwned, B: DeserializeOwned>(body: &[u8]) -> Result<Map<String, Value>, Refusal> {
    Ok(parse::<Shared<A, B>>(body)?.0)
}

struct Shared<A, B>(Map<String, Value>, PhantomData<(A, B)>);

impl<'de, A: DeserializeOwned, B: DeserializeOwned> Deserialize<'de> for Shared<A, B> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let names = [names::<A>(), names::<B>()];
        Ok(Self(deserializer.deserialize_map(Picking(names))?, PhantomData))
    }
}

/// Keeps the values of these names; others are passed over, so a long prompt costs no memory.
struct Picking([&'static [&'static str]; 2]);

impl<'de> Visitor<'de> for Picking {
    type Value = Map<String, Value>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<Self::Value, M::Error> {
        let mut kept = Map::new();
        while let Some(name) = map.next_key::<String>()? {
            if !self.0.iter().any(|names| names.contains(&name.as_str())) {
                map.next_value::<IgnoredAny>()?;
                continue;
            }
            let value = map.next_value()?;
            if kept.contains_key(&name) {
                return Err(M::Error::custom(format!("duplicate field `{name}`")));
            }
            kept.insert(name, value);
        }
        Ok(kept)
    }
}

/// The names of a struct's fields, as its derived reader asks for them.
fn names<T: DeserializeOwned>() -> &'static [&'static str] {
    let mut names: &'static [&'static str] = &[];
    // It never gets a value: it is asked only for what it would read.
    let _refused = T::deserialize(Probe(&mut names)).is_err();
    names
}

struct Probe<'p>(&'p mut &'static [&'static str]);

impl<'de> Deserializer<'de> for Probe<'_> {
    type Error = Error;

    fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Error> {
        Err(Error::custom("only names are asked for"))
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        _: V,
    ) -> Result<V::Value, Error> {
        *self.0 = fields;
        Err(Error::custom("only names are asked for"))
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit unit_struct
        newtype_struct seq tuple tuple_struct map enum identifier ignored_any
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(serde::Deserialize)]
    #[expect(dead_code, reason = "only named")]
    struct One {
        model: Option<String>,
    }

    #[derive(serde::Deserialize)]
    #[expect(dead_code, reason = "only named")]
    struct Two {
        #[serde(rename = "top_k")]
        k: Option<u32>,
    }

    #[test]
    fn a_strict_body_has_known_fields_only() {
        let checked = |body: &str| {
            check::<One, Two, Two, Two>(body.as_bytes()).map_err(|error| error.body()["error"]["param"].clone())
        };
        assert_eq!(checked(r#"{"model": "x", "top_k": 1, "tempratur": 1}"#), Ok(()));
        assert_eq!(checked(r#"{"strict": true, "model": "x", "top_k": 1, "user": "me"}"#), Ok(()));
        assert_eq!(checked(r#"{"strict": true, "tempratur": 1}"#), Err("tempratur".into()));
        assert_eq!(checked(r#"{"strict": 1}"#), Err("strict".into()));
    }

    #[test]
    fn of_a_body_those_fields_are_picked_that_are_asked_for() {
        let picked = |body: &str| shared::<One, Two>(body.as_bytes()).map(Value::Object);
        let body = r#"{"model": null, "input": [{"top_k": 1}], "top_k": {"any": 1}}"#;
        assert_eq!(picked(body).unwrap(), serde_json::json!({ "model": null, "top_k": { "any": 1 } }));
        assert!(picked(r#"{"top_k": 1, "top_k": 2}"#).is_err() && picked("[]").is_err());
    }
}
