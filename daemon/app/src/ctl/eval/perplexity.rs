//! How well is text predicted? Windows read under each kind of attention, and their losses compared; and on the way,
//! what a selection keeps of attention.

use super::mass::{Picked, WindowMass, mass_json};
use super::texts::Texts;
use super::{Attention, Bench};
use anyhow::ensure;
use serde_json::{Value, json};
use sparsed_engine::eval::{Comparison, WindowLoss, compare, cross_entropy, query_positions, windows};
use sparsed_engine::{DeviceModel, Lockstep, Rows};

/// Windows of one length, to be read under several kinds of attention.
#[derive(Debug)]
pub(super) struct Perplexity {
    context: u32,
    windows: Vec<Vec<u32>>,
    rows: Vec<Attention>,
}

impl Perplexity {
    /// Cuts the windows.
    ///
    /// # Errors
    /// When the text does not fill one.
    pub(super) fn plan(texts: &Texts, context: u32, tokens: u32, top_k: &[u32]) -> anyhow::Result<Self> {
        ensure!(context as usize > texts.prefix.len() + 1, "--context {context} has no room for two tokens");
        let count = tokens.div_ceil(context) as usize;
        let windows = windows(&texts.documents, &texts.prefix, context as usize, count);
        let have: usize = texts.documents.iter().map(Vec::len).sum();
        ensure!(!windows.is_empty(), "the text has {have} tokens, a window of --context {context} is not filled");
        let sparse = top_k.iter().filter(|&&k| k < context).map(|&k| Attention::Sparse(k));
        Ok(Self { context, windows, rows: std::iter::once(Attention::Dense).chain(sparse).collect() })
    }

    /// Tokens that go through the model.
    pub(super) fn n_tokens(&self) -> u64 {
        u64::from(self.context) * self.windows.len() as u64 * self.rows.len() as u64
    }

    /// Whether a row selects, so that there is something to compare with full attention.
    pub(super) fn selects(&self) -> bool {
        self.rows.iter().any(|row| matches!(row, Attention::Sparse(_)))
    }

    /// Reads the windows under each kind of attention.
    ///
    /// # Errors
    /// The device's.
    pub(super) fn measure(&self, bench: &Bench<'_>) -> anyhow::Result<Value> {
        let read = self.rows.iter().map(|&row| self.read(bench, row)).collect::<Result<Vec<_>, _>>()?;
        let rows: Vec<Value> = self.rows.iter().zip(&read).map(|(&row, own)| row_json(row, own, &read[0])).collect();
        Ok(json!({
            "context": self.context,
            "windows": self.windows.len(),
            "mass_queries": self.positions(bench, 0).len(),
            "scored_tokens": self.windows.iter().map(|window| window.len() - 1).sum::<usize>(),
            "rows": rows,
        }))
    }

    fn read(&self, bench: &Bench<'_>, attention: Attention) -> anyhow::Result<Read> {
        let mut device = bench.load(attention, self.context, bench.eval.mass_queries() > 0)?;
        let selects = matches!(attention, Attention::Sparse(_));
        let mut read = Read { losses: Vec::new(), masses: Vec::new() };
        for (number, window) in (0..).zip(&self.windows) {
            let positions = if selects { self.positions(bench, number) } else { Vec::new() };
            let (loss, mass) = read_window(bench, &mut device, window, positions)?;
            read.losses.push(loss);
            read.masses.extend(mass);
        }
        Ok(read)
    }

    /// Whose attention is looked at in window number `window`: the same queries for every k.
    fn positions(&self, bench: &Bench<'_>, window: u64) -> Vec<usize> {
        query_positions(self.context as usize, bench.eval.mass_queries() as usize, bench.eval.seed, window)
    }
}

/// What came of the windows under one kind of attention.
struct Read {
    losses: Vec<WindowLoss>,
    /// Empty when nothing is selected, or no query was looked at.
    masses: Vec<WindowMass>,
}

/// The loss of a window that is read from its first token, and what its selections keep of the attention of the queries
/// at `positions`, if there are any; memory for one chunk's outputs.
fn read_window(
    bench: &Bench<'_>,
    device: &mut DeviceModel,
    window: &[u32],
    positions: Vec<usize>,
) -> anyhow::Result<(WindowLoss, Option<WindowMass>)> {
    let mut sequence = Lockstep::new(device, 1);
    let mut losses = Vec::with_capacity(window.len());
    let mut picked = Picked::new(positions);
    // What each token is followed by; the last one's row is not needed.
    let mut next = window.iter().skip(1);
    for chunk in window.chunks(bench.chunk()) {
        let first = sequence.n_tokens() as usize;
        let outputs = sequence.step(device, chunk, Rows::All)?;
        picked.take(first, chunk.len(), &outputs);
        let logits = outputs.logits;
        for (row, &token) in logits.chunks_exact(logits.len() / chunk.len()).zip(next.by_ref().take(chunk.len())) {
            losses.push(cross_entropy(row, token)?);
        }
        bench.progress.inc(chunk.len() as u64);
    }
    let mass = match picked.is_empty() {
        true => None,
        false => Some(picked.weigh(bench.model.spec(), &sequence, device)?),
    };
    Ok((WindowLoss::new(&losses), mass))
}

fn row_json(attention: Attention, own: &Read, dense: &Read) -> Value {
    let part = |of: fn(&WindowLoss) -> f64| {
        let list = |losses: &[WindowLoss]| losses.iter().map(of).collect::<Vec<_>>();
        comparison_json(&compare(&list(&own.losses), &list(&dense.losses)))
    };
    let top_k = if let Attention::Sparse(k) = attention { Some(k) } else { None };
    let mass = if own.masses.is_empty() { Value::Null } else { mass_json(&own.masses) };
    json!({ "top_k": top_k, "all": part(|loss| loss.all), "late": part(|loss| loss.late), "mass": mass })
}

fn comparison_json(compared: &Comparison) -> Value {
    json!({
        "cross_entropy": compared.cross_entropy,
        "cross_entropy_error": compared.standard_error,
        "perplexity": compared.cross_entropy.exp(),
        "ratio": compared.ratio,
        "ratio_error": compared.ratio_error,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_selection_of_everything_is_not_measured_twice() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ids.json");
        std::fs::write(&path, format!("{:?}", vec![1; 100])).unwrap();
        let texts = Texts::of_ids(&path, 10).unwrap();
        let plan = Perplexity::plan(&texts, 32, 65, &[16, 31, 32, 64]).unwrap();
        assert_eq!(plan.rows, [Attention::Dense, Attention::Sparse(16), Attention::Sparse(31)]);
        assert_eq!((plan.windows.len(), plan.n_tokens()), (3, 288));
        let too_long = Perplexity::plan(&texts, 101, 1, &[]).unwrap_err();
        assert!(too_long.to_string().contains("100 tokens"), "{too_long}");
    }
}
