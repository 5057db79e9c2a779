//! How is a hyperparameter read from a GGUF? By its name under the architecture's prefix, with a limit.

use crate::ModelError;
use sparsed_quant::gguf::{Array, GgufError, Metadata, Value};

/// Largest of any dimension, count of heads, experts or layers.
pub(super) const DIM_MAX: u32 = 1 << 20;
/// Widest row of an activation: all heads side by side.
pub(super) const ROW_MAX: u32 = 1 << 24;
/// Longest context.
pub(super) const CONTEXT_MAX: u32 = 1 << 24;
/// Most layers.
pub(super) const LAYERS_MAX: u32 = 1 << 10;

/// Metadata under one architecture's prefix.
pub(super) struct Keys<'a> {
    pub(super) metadata: &'a Metadata,
    pub(super) prefix: &'static str,
}

impl Keys<'_> {
    pub(super) fn name(&self, key: &str) -> String {
        format!("{}.{key}", self.prefix)
    }

    pub(super) fn optional(&self, key: &str, max: u32) -> Result<Option<u32>, ModelError> {
        let Some(value) = self.metadata.u32(&self.name(key))? else { return Ok(None) };
        if value > max {
            return Err(self.refuse(key, value, format!("the limit is {max}")));
        }
        Ok(Some(value))
    }

    /// A number from 0 to `max` that must be there.
    pub(super) fn required(&self, key: &str, max: u32) -> Result<u32, ModelError> {
        self.optional(key, max)?.ok_or_else(|| self.missing(key))
    }

    /// A number from 1 to `max` that must be there.
    pub(super) fn count(&self, key: &str, max: u32) -> Result<u32, ModelError> {
        match self.required(key, max)? {
            0 => Err(self.refuse(key, 0, "must be at least 1")),
            n => Ok(n),
        }
    }

    /// As [`Self::count`]; an array must hold one number for all layers, where 0 stands for "not in this layer".
    pub(super) fn count_of_layers(&self, key: &str, max: u32) -> Result<u32, ModelError> {
        let numbers: Vec<u64> = match self.metadata.get(&self.name(key)) {
            Some(Value::Array(Array::U32(numbers))) => numbers.iter().map(|&n| n.into()).collect(),
            Some(Value::Array(Array::I32(numbers))) => {
                numbers.iter().map(|&n| n.try_into().unwrap_or(u64::MAX)).collect()
            }
            _ => return self.count(key, max),
        };
        let mut used = numbers.iter().copied().filter(|&n| n != 0);
        let first = used.next().ok_or_else(|| self.refuse(key, "empty", "must hold a number"))?;
        if used.any(|n| n != first) {
            return Err(self.refuse(key, "an array", "layers of different width are not served"));
        }
        let first = u32::try_from(first).ok().filter(|&n| n <= max);
        first.ok_or_else(|| self.refuse(key, "an array", format!("the limit is {max}")))
    }

    pub(super) fn float(&self, key: &str, default: Option<f32>) -> Result<f32, ModelError> {
        let value = self.metadata.f32(&self.name(key))?.or(default).ok_or_else(|| self.missing(key))?;
        if value.is_finite() && value > 0.0 {
            return Ok(value);
        }
        Err(self.refuse(key, value, "must be a positive number"))
    }

    pub(super) fn bool(&self, key: &str, default: bool) -> Result<bool, ModelError> {
        Ok(self.metadata.bool(&self.name(key))?.unwrap_or(default))
    }

    pub(super) fn str(&self, key: &str) -> Result<Option<&str>, ModelError> {
        Ok(self.metadata.str(&self.name(key))?)
    }

    pub(super) fn even(&self, key: &str, value: u32) -> Result<u32, ModelError> {
        if value.is_multiple_of(2) { Ok(value) } else { Err(self.refuse(key, value, "must be even")) }
    }

    fn missing(&self, key: &str) -> ModelError {
        ModelError::Metadata(GgufError::Missing(self.name(key)))
    }

    pub(super) fn refuse(&self, key: &str, value: impl ToString, reason: impl Into<String>) -> ModelError {
        ModelError::Hyperparameter { key: self.name(key), value: value.to_string(), reason: reason.into() }
    }

    /// Refuses every key under the prefix that is not in `known`: a hyperparameter that is not read may change the
    /// mathematics.
    pub(super) fn only(&self, known: &[&str]) -> Result<(), ModelError> {
        let under = |key: &str| key.strip_prefix(self.prefix).and_then(|key| key.strip_prefix('.')).map(str::to_owned);
        let strange = self.metadata.iter().filter_map(|(key, _)| under(key)).find(|key| !known.contains(&key.as_str()));
        strange.map_or(Ok(()), |key| self.unknown(&key))
    }

    /// Refuses `key` if it is there.
    pub(super) fn absent(&self, key: &str) -> Result<(), ModelError> {
        if self.metadata.get(&self.name(key)).is_none() { Ok(()) } else { self.unknown(key) }
    }

    fn unknown(&self, key: &str) -> Result<(), ModelError> {
        let hint = ": it may change what the model computes";
        Err(ModelError::Unsupported { what: format!("metadata '{}'", self.name(key)), hint })
    }
}
