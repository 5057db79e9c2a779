//! What is a whole number in JSON? Also one that is written as 4.0, as languages do that have one kind of numbers.

use serde::de::{Deserializer, Error, Unexpected, Visitor};
use serde_json::Value;
use std::fmt;
use std::marker::PhantomData;

/// Beyond it (2^53) neighbouring whole numbers are one number with a point.
const EXACT_MAX: f64 = 9_007_199_254_740_992.0;

/// A whole number; none for null. For fields, with `default` where one may be absent.
///
/// # Errors
/// Something else, and a number that is none of `T`'s.
pub(super) fn whole<'de, D: Deserializer<'de>, T: TryFrom<i128>>(deserializer: D) -> Result<Option<T>, D::Error> {
    deserializer.deserialize_any(Whole(PhantomData))
}

/// The same of a value that may be something else.
pub(super) fn as_whole(value: &Value) -> Option<i128> {
    whole(value).ok().flatten()
}

struct Whole<T>(PhantomData<T>);

impl<T: TryFrom<i128>> Visitor<'_> for Whole<T> {
    type Value = Option<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a whole number")
    }

    fn visit_unit<E: Error>(self) -> Result<Option<T>, E> {
        Ok(None)
    }

    fn visit_i64<E: Error>(self, number: i64) -> Result<Option<T>, E> {
        in_range(number.into())
    }

    fn visit_u64<E: Error>(self, number: u64) -> Result<Option<T>, E> {
        in_range(number.into())
    }

    fn visit_f64<E: Error>(self, number: f64) -> Result<Option<T>, E> {
        if number.fract() != 0.0 || number.abs() > EXACT_MAX {
            return Err(E::invalid_type(Unexpected::Float(number), &self));
        }
        #[expect(clippy::cast_possible_truncation, reason = "it is whole and small")]
        in_range(number as i128)
    }
}

fn in_range<T: TryFrom<i128>, E: Error>(number: i128) -> Result<Option<T>, E> {
    T::try_from(number).map(Some).map_err(|_| E::custom(format!("{number} is out of range")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, PartialEq, serde::Deserialize)]
    struct Fields {
        #[serde(default, deserialize_with = "whole")]
        n: Option<u32>,
    }

    #[test]
    fn a_number_may_have_a_point_as_long_as_it_is_whole() {
        let read = |text: &str| serde_json::from_str::<Fields>(text).map(|fields| fields.n).map_err(|e| e.to_string());
        for (text, n) in [
            (r#"{"n": 4}"#, Some(4)),
            (r#"{"n": 4.0}"#, Some(4)),
            (r#"{"n": 4e3}"#, Some(4000)),
            (r#"{"n": -0.0}"#, Some(0)),
            (r#"{"n": null}"#, None),
            ("{}", None),
        ] {
            assert_eq!(read(text), Ok(n), "{text}");
        }
        for (text, said) in [
            (r#"{"n": 4.5}"#, "floating point `4.5`, expected a whole number"),
            (r#"{"n": 1e300}"#, "expected a whole number"),
            (r#"{"n": "4"}"#, "string \"4\", expected a whole number"),
            (r#"{"n": -1}"#, "-1 is out of range"),
            (r#"{"n": 4294967296}"#, "4294967296 is out of range"),
        ] {
            assert!(read(text).unwrap_err().contains(said), "{text}: {:?}", read(text));
        }
    }

    #[test]
    fn a_value_is_a_whole_number_or_not() {
        let of = |text: &str| as_whole(&serde_json::from_str(text).unwrap());
        assert_eq!((of("18446744073709551615"), of("-1.0")), (Some(u64::MAX.into()), Some(-1)));
        assert_eq!((of("true"), of("null"), of("0.5")), (None, None, None));
    }
}
