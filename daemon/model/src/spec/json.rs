//! How is a hyperparameter read from JSON? By its name, with a limit; null counts as absent, as in Python.

use crate::ModelError;
use serde_json::{Map, Value};

/// Largest `config.json` in bytes. Its depth is limited by `serde_json`, to 128.
pub(crate) const CONFIG_BYTES_MAX: usize = 4 << 20;

/// Parses `text` as an object.
pub(crate) fn parse(file: &str, text: &[u8]) -> Result<Map<String, Value>, ModelError> {
    let refuse = |reason: String| ModelError::Config { file: file.to_owned(), reason };
    if text.len() > CONFIG_BYTES_MAX {
        return Err(refuse(format!("{} bytes, the limit is {CONFIG_BYTES_MAX}", text.len())));
    }
    match serde_json::from_slice(text) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(_) => Err(refuse("is not a JSON object".to_owned())),
        Err(error) => Err(refuse(error.to_string())),
    }
}

/// An object, and where it stands in the file.
#[derive(Clone, Copy)]
pub(super) struct Object<'a> {
    pub(super) map: &'a Map<String, Value>,
    /// Before a key in messages: empty, or `rope_scaling.`
    pub(super) prefix: &'static str,
}

impl<'a> Object<'a> {
    pub(super) fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    pub(super) fn optional(&self, key: &str, max: u32) -> Result<Option<u32>, ModelError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let n = value.as_u64().and_then(|n| u32::try_from(n).ok()).filter(|&n| n <= max);
        n.ok_or_else(|| self.refuse(key, value, format!("must be a whole number up to {max}"))).map(Some)
    }

    /// A number from 1 to `max` that must be there.
    pub(super) fn count(&self, key: &str, max: u32) -> Result<u32, ModelError> {
        match self.optional(key, max)?.ok_or_else(|| self.missing(key))? {
            0 => Err(self.refuse(key, 0, "must be at least 1")),
            n => Ok(n),
        }
    }

    /// A positive number.
    pub(super) fn float(&self, key: &str) -> Result<Option<f64>, ModelError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let n = value.as_f64().filter(|n| n.is_finite() && *n > 0.0);
        n.ok_or_else(|| self.refuse(key, value, "must be a positive number")).map(Some)
    }

    pub(super) fn bool(&self, key: &str) -> Result<Option<bool>, ModelError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_bool().ok_or_else(|| self.refuse(key, value, "must be true or false")).map(Some)
    }

    pub(super) fn str(&self, key: &str) -> Result<Option<&'a str>, ModelError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_str().ok_or_else(|| self.refuse(key, value, "must be a string")).map(Some)
    }

    /// The strings of a list.
    pub(super) fn strings(&self, key: &str) -> Result<Option<Vec<&'a str>>, ModelError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let strings = value.as_array().and_then(|list| list.iter().map(Value::as_str).collect());
        strings.ok_or_else(|| self.refuse(key, "no list", "must be a list of strings")).map(Some)
    }

    pub(super) fn object(&self, key: &str, prefix: &'static str) -> Result<Option<Self>, ModelError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let map = value.as_object().ok_or_else(|| self.refuse(key, "no object", "must be an object"))?;
        Ok(Some(Self { map, prefix }))
    }

    fn missing(&self, key: &str) -> ModelError {
        let reason = format!("'{}{key}' is missing", self.prefix);
        ModelError::Config { file: "config.json".to_owned(), reason }
    }

    pub(super) fn refuse(&self, key: &str, value: impl ToString, reason: impl Into<String>) -> ModelError {
        let (key, mut value) = (format!("{}{key}", self.prefix), value.to_string());
        if value.len() > 80 {
            value = "something long".to_owned();
        }
        ModelError::Hyperparameter { key, value, reason: reason.into() }
    }

    pub(super) fn unknown(&self, key: &str) -> ModelError {
        let what = format!("'{}{key}' in config.json", self.prefix);
        ModelError::Unsupported { what, hint: ": it may change what the model computes" }
    }
}
