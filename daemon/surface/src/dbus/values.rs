//! How do D-Bus's values and JSON's become each other? Options come in as a dictionary and are read as JSON is.

use super::call::CallError;
use crate::bodies::parse;
use crate::refusal::Refusal;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use std::collections::HashMap;
use zbus::wire::{OwnedVariant, Variant};

/// `a{sv}`
pub(super) type Dict = HashMap<String, OwnedVariant>;

/// The fields of `T` in a dictionary.
///
/// # Errors
/// A value that is no number, text or truth, and whatever is wrong for `T`.
pub(super) fn fields<T: DeserializeOwned>(dict: &Dict) -> Result<T, CallError> {
    let json = dict.iter().map(|(key, value)| Ok((key.clone(), json(key, value)?))).collect::<Result<_, Refusal>>()?;
    Ok(parse(Value::Object(json).to_string().as_bytes())?)
}

fn json(key: &str, value: &OwnedVariant) -> Result<Value, Refusal> {
    Ok(match &**value {
        Variant::Bool(value) => (*value).into(),
        Variant::U8(value) => (*value).into(),
        Variant::I16(value) => (*value).into(),
        Variant::U16(value) => (*value).into(),
        Variant::I32(value) => (*value).into(),
        Variant::U32(value) => (*value).into(),
        Variant::I64(value) => (*value).into(),
        Variant::U64(value) => (*value).into(),
        Variant::F64(value) => (*value).into(),
        Variant::Str(value) => value.as_str().into(),
        _ => return Err(Refusal::invalid(key, "must be a number, a string or a boolean")),
    })
}

/// A value of a D-Bus type, from JSON that has it; what is not there is empty.
pub(super) fn typed(kind: &str, value: &Value) -> OwnedVariant {
    let number = value.as_u64().unwrap_or_default();
    match kind {
        "b" => value.as_bool().unwrap_or_default().into(),
        "u" => u32::try_from(number).unwrap_or(u32::MAX).into(),
        "t" => number.into(),
        _ => text(value.as_str().unwrap_or_default()),
    }
}

/// `s`
pub(super) fn text(text: &str) -> OwnedVariant {
    OwnedVariant::from(zbus::wire::Str::from(text.to_owned()))
}

/// `as`
pub(super) fn texts(texts: &[String]) -> OwnedVariant {
    let array = zbus::wire::Array::from(texts.to_vec());
    OwnedVariant::try_from(array).expect("strings hold no file descriptor")
}

/// Numbers of an object of numbers, as `u`.
pub(super) fn counts(object: &Map<String, Value>) -> Dict {
    object.iter().map(|(key, value)| (key.clone(), typed("u", value))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(serde::Deserialize, Debug, PartialEq)]
    #[serde(deny_unknown_fields)]
    struct Fields {
        title: String,
        turns: Option<u32>,
    }

    fn dict(values: &[(&str, OwnedVariant)]) -> Dict {
        values.iter().map(|(key, value)| ((*key).to_owned(), value.try_clone().unwrap())).collect()
    }

    #[test]
    fn a_dictionary_is_read_as_json_is() {
        let read: Fields = fields(&dict(&[("title", text("a \"b\"")), ("turns", 3_u32.into())])).unwrap();
        assert_eq!(read, Fields { title: "a \"b\"".to_owned(), turns: Some(3) });
    }

    #[test]
    fn a_wrong_key_or_type_is_named() {
        let refused = |values: &[(&str, OwnedVariant)]| fields::<Fields>(&dict(values)).unwrap_err().to_string();
        assert!(refused(&[("titel", text("x"))]).contains("titel"));
        assert!(refused(&[("title", text("x")), ("turns", (-1_i32).into())]).contains("turns"));
        assert!(refused(&[("title", texts(&[]))]).contains("'title' must be a number"));
    }

    #[test]
    fn numbers_that_are_too_large_are_the_largest() {
        assert_eq!(typed("u", &Value::from(u64::MAX)), OwnedVariant::from(u32::MAX));
        assert_eq!(typed("s", &Value::Null), text(""));
    }
}
