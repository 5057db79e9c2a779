//! How is the next token chosen? A request's sampling parameters, every one in its range.

use crate::api::{Failure, Urgency};

/// Most stop strings of a request.
const STOPS_MAX: usize = 16;
/// Longest stop string in bytes.
const STOP_BYTES_MAX: usize = 1024;
/// Most entries of `logit_bias`.
const BIASES_MAX: usize = 1024;

/// The least and the most urgent priority are this far from 0.
const PRIORITY_MAX: i32 = 1000;
/// Longest deadline: a day.
const DEADLINE_MS_MAX: u64 = 86_400_000;

/// Sampling parameters. [`Sampling::checked`] is the only way to one that a request may carry.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct Sampling {
    /// Divides the logits; 0: always the greatest. `0 ..= 2` in OpenAI's API, up to 100 here.
    pub temperature: f32,
    /// Only this many of the greatest; 0: all.
    pub top_k: u32,
    /// Only the greatest whose probabilities first reach this sum, `0 < p <= 1`.
    pub top_p: f32,
    /// Only those at least this share of the greatest probability, `0 ..= 1`.
    pub min_p: f32,
    /// Same seed, same history: same tokens.
    pub seed: u64,
    /// Divides positive and multiplies negative logits of tokens in prompt and answer; 1: none.
    pub repetition_penalty: f32,
    /// Subtracted per earlier occurrence in the answer, `-2 ..= 2`.
    pub frequency_penalty: f32,
    /// Subtracted once for a token in the answer, `-2 ..= 2`.
    pub presence_penalty: f32,
    /// Added to the logits of these tokens, `-100 ..= 100`.
    pub logit_bias: Vec<(u32, f32)>,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            seed: 0,
            repetition_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            logit_bias: Vec::new(),
        }
    }
}

impl Sampling {
    /// The same with the seed that comes `nth` after this one's.
    pub(crate) fn reseeded(&self, nth: u32) -> Self {
        Self { seed: self.seed.wrapping_add(u64::from(nth)), ..self.clone() }
    }

    /// Itself, if every number is in its range.
    ///
    /// # Errors
    /// [`Failure::InvalidRequest`] with the parameter's name and its range.
    pub fn checked(self) -> Result<Self, Failure> {
        within("temperature", self.temperature, 0.0, 100.0)?;
        within("top_p", self.top_p, f32::MIN_POSITIVE, 1.0)?;
        within("min_p", self.min_p, 0.0, 1.0)?;
        within("repetition_penalty", self.repetition_penalty, f32::MIN_POSITIVE, 10.0)?;
        within("frequency_penalty", self.frequency_penalty, -2.0, 2.0)?;
        within("presence_penalty", self.presence_penalty, -2.0, 2.0)?;
        if self.logit_bias.len() > BIASES_MAX {
            let reason = format!("{} entries, the limit is {BIASES_MAX}", self.logit_bias.len());
            return Err(Failure::invalid("logit_bias", reason));
        }
        for (_, bias) in &self.logit_bias {
            within("logit_bias", *bias, -100.0, 100.0)?;
        }
        Ok(self)
    }
}

/// Stop strings, if there are few enough and none is empty or too long.
///
/// # Errors
/// [`Failure::InvalidRequest`] for `stop`.
pub fn checked_stops(stops: Vec<String>) -> Result<Vec<String>, Failure> {
    if stops.len() > STOPS_MAX {
        return Err(Failure::invalid("stop", format!("{} strings, the limit is {STOPS_MAX}", stops.len())));
    }
    if let Some(bad) = stops.iter().find(|stop| stop.is_empty() || stop.len() > STOP_BYTES_MAX) {
        let reason = format!("a string of {} bytes, 1 to {STOP_BYTES_MAX} are allowed", bad.len());
        return Err(Failure::invalid("stop", reason));
    }
    Ok(stops)
}

impl Urgency {
    /// The urgency with these numbers, 0 and no deadline where there are none, if they are in their ranges.
    ///
    /// # Errors
    /// [`Failure::InvalidRequest`] for `priority` or `deadline_ms`.
    pub fn checked(priority: Option<i64>, deadline_ms: Option<u64>) -> Result<Self, Failure> {
        let asked = priority.unwrap_or(0);
        let inside = i32::try_from(asked).ok().filter(|n| (-PRIORITY_MAX..=PRIORITY_MAX).contains(n));
        let out = || Failure::invalid("priority", format!("is {asked}, must be -{PRIORITY_MAX} to {PRIORITY_MAX}"));
        let priority = inside.ok_or_else(out)?;
        match deadline_ms {
            Some(ms) if !(1..=DEADLINE_MS_MAX).contains(&ms) => {
                Err(Failure::invalid("deadline_ms", format!("is {ms}, must be 1 to {DEADLINE_MS_MAX}")))
            }
            deadline_ms => Ok(Self { priority, deadline_ms }),
        }
    }
}

fn within(param: &'static str, value: f32, low: f32, high: f32) -> Result<(), Failure> {
    if value >= low && value <= high {
        return Ok(());
    }
    let low = if low == f32::MIN_POSITIVE { "above 0".to_owned() } else { low.to_string() };
    Err(Failure::invalid(param, format!("is {value}, must be {low} to {high}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_out_of_range_is_named_with_its_range() {
        let said = |sampling: Sampling| sampling.checked().unwrap_err().to_string();
        assert_eq!(
            said(Sampling { temperature: -1.0, ..Sampling::default() }),
            "'temperature' is -1, must be 0 to 100"
        );
        assert_eq!(said(Sampling { top_p: 0.0, ..Sampling::default() }), "'top_p' is 0, must be above 0 to 1");
        assert!(said(Sampling { min_p: f32::NAN, ..Sampling::default() }).contains("min_p"));
        assert!(said(Sampling { logit_bias: vec![(0, 101.0)], ..Sampling::default() }).contains("logit_bias"));
        assert!(Sampling::default().checked().is_ok());
    }

    #[test]
    fn an_urgency_out_of_range_is_named_with_its_range() {
        let said = |priority, deadline_ms| Urgency::checked(priority, deadline_ms).unwrap_err().to_string();
        assert_eq!(said(Some(-1001), None), "'priority' is -1001, must be -1000 to 1000");
        assert!(said(Some(i64::MAX), None).contains("priority") && said(None, Some(0)).contains("deadline_ms"));
        assert_eq!(Urgency::checked(Some(-3), Some(5)), Ok(Urgency { priority: -3, deadline_ms: Some(5) }));
        assert_eq!(Urgency::checked(None, None), Ok(Urgency::default()));
    }

    #[test]
    fn stop_strings_are_few_and_short() {
        assert!(checked_stops(vec![String::new()]).is_err());
        assert!(checked_stops(vec!["x".repeat(STOP_BYTES_MAX + 1)]).is_err());
        assert!(checked_stops(vec!["x".to_owned(); STOPS_MAX + 1]).is_err());
        assert!(checked_stops(vec!["x".to_owned(); STOPS_MAX]).is_ok());
    }
}
