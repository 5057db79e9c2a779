//! How many bytes? A number, or a number with a unit: `2GiB`, `512 MB`.

use serde::{Deserialize, Deserializer, Serialize};
use std::str::FromStr;

/// A number of bytes in a configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Bytes(pub u64);

/// Units by name, the longer ones first.
const UNITS: [(&str, u64); 9] = [
    ("kib", 1 << 10),
    ("mib", 1 << 20),
    ("gib", 1 << 30),
    ("tib", 1 << 40),
    ("kb", 1_000),
    ("mb", 1_000_000),
    ("gb", 1_000_000_000),
    ("tb", 1_000_000_000_000),
    ("b", 1),
];

impl FromStr for Bytes {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad =
            || format!("'{text}' is not a size: write a number of bytes, or one with KiB, MiB, GiB, kB, MB or GB");
        let lower = text.trim().to_ascii_lowercase();
        let unit = UNITS.iter().find(|(unit, _)| lower.ends_with(unit));
        let (number, factor) = match unit {
            Some((unit, factor)) => (lower[..lower.len() - unit.len()].trim(), *factor),
            None => (lower.as_str(), 1),
        };
        let number: u64 = number.parse().map_err(|_| bad())?;
        number.checked_mul(factor).map(Self).ok_or_else(bad)
    }
}

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged, expecting = "expected a size: a number of bytes, or a text like '2GiB'")]
        enum Written {
            Number(u64),
            Text(String),
        }
        match Written::deserialize(deserializer)? {
            Written::Number(bytes) => Ok(Self(bytes)),
            Written::Text(text) => text.parse().map_err(serde::de::Error::custom),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units_of_both_kinds() {
        let bytes = |text: &str| text.parse::<Bytes>().map(|b| b.0);
        assert_eq!(bytes("2GiB"), Ok(2 << 30));
        assert_eq!(bytes(" 512 MB "), Ok(512_000_000));
        assert_eq!(bytes("17"), Ok(17));
        assert_eq!(bytes("1b"), Ok(1));
        for bad in ["", "GiB", "-1", "1.5GiB", "99999999999999TiB", "2 potatoes"] {
            assert!(bytes(bad).is_err(), "{bad}");
        }
    }
}
