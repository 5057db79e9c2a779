//! How much of full attention does a selection keep? Queries and selections picked out of a window while it is read,
//! and then compared with all that is in the cache.

use anyhow::ensure;
use serde_json::{Value, json};
use sparsed_engine::eval::{AttentionShape, Kept, Keys, MassError, Query, attention_mass, standard_error};
use sparsed_engine::{DeviceModel, Lockstep, Outputs, Queries};
use sparsed_model::ModelSpec;

/// Some queries of one window, picked out on their way.
#[derive(Debug)]
pub(super) struct Picked {
    /// Ascending.
    positions: Vec<usize>,
    /// Those of the positions that have been read, per layer.
    queries: Vec<Queries>,
    /// `[positions, k]` of those, per index layer.
    selections: Vec<Vec<i32>>,
}

/// What each layer keeps of one window, the mean over its queries.
pub(super) type WindowMass = Vec<Kept>;

impl Picked {
    /// Will pick the queries at these positions.
    pub(super) fn new(positions: Vec<usize>) -> Self {
        Self { positions, queries: Vec::new(), selections: Vec::new() }
    }

    /// True when nothing is to be picked.
    pub(super) fn is_empty(&self) -> bool {
        self.positions.is_empty()
    }

    /// Keeps what its positions asked and selected in a step of `n_tokens` tokens, the first at position `first`.
    pub(super) fn take(&mut self, first: usize, n_tokens: usize, outputs: &Outputs) {
        self.queries.resize_with(outputs.queries.len(), Queries::default);
        self.selections.resize_with(outputs.selections.len(), Vec::new);
        let tokens = self.positions.iter().filter(|&&p| (first..first + n_tokens).contains(&p)).map(|p| p - first);
        for token in tokens {
            for (kept, all) in self.queries.iter_mut().zip(&outputs.queries) {
                kept.latent.extend_from_slice(row(&all.latent, n_tokens, token));
                kept.rope.extend_from_slice(row(&all.rope, n_tokens, token));
            }
            for (kept, all) in self.selections.iter_mut().zip(&outputs.selections) {
                kept.extend_from_slice(row(all, n_tokens, token));
            }
        }
    }

    /// Weighs the queries against the rows of the whole window, layer by layer. Every position must have been read.
    ///
    /// # Errors
    /// The device's; a score that is no number, or a selection that is none.
    pub(super) fn weigh(
        &self,
        spec: &ModelSpec,
        sequence: &Lockstep,
        device: &mut DeviceModel,
    ) -> anyhow::Result<WindowMass> {
        let selecting = selecting(spec.indexer.as_ref().map_or(&[][..], |indexer| &indexer.full));
        let layers = self.queries.len();
        ensure!(layers == spec.n_layers as usize && selecting.len() == layers, "not every layer was watched");
        let cached = sequence.export(device)?;
        let shape = AttentionShape {
            n_heads: spec.n_heads as usize,
            group_count: spec.group_count as usize,
            softmax_scale: spec.softmax_scale,
        };
        let n = self.positions.len();
        let of_layer = |(layer, (queries, &selects)): (u32, (&Queries, &usize))| {
            let (rows, selections) = (cached.layer(layer)?, &self.selections[selects]);
            let kept = self.positions.iter().enumerate().map(|(i, &position)| {
                let visible = position + 1;
                let query = Query { latent: row(&queries.latent, n, i), rope: row(&queries.rope, n, i) };
                let keys = Keys {
                    n_tokens: visible,
                    latent: &rows.latent[..visible * spec.kv_lora_rank as usize],
                    rope: &rows.rope[..visible * spec.rope_row as usize],
                };
                Kept::new(&attention_mass(&shape, &query, &keys)?, row(selections, n, i))
            });
            Ok(Kept::mean(&kept.collect::<Result<Vec<_>, MassError>>()?))
        };
        (0..).zip(self.queries.iter().zip(&selecting)).map(of_layer).collect()
    }
}

/// Row `i` of `n` equal ones.
fn row<T>(values: &[T], n: usize, i: usize) -> &[T] {
    let width = values.len() / n;
    &values[i * width..][..width]
}

/// The index layer whose selection each layer reads: its own, or that of the last layer before it that selects.
fn selecting(full: &[bool]) -> Vec<usize> {
    let counted = full.iter().scan(0usize, |n, &full| {
        *n += usize::from(full);
        Some(n.saturating_sub(1))
    });
    counted.collect()
}

/// Means over the windows: of all layers, and of each.
///
/// # Panics
/// When there is no window, or one without layers.
pub(super) fn mass_json(windows: &[WindowMass]) -> Value {
    let of_windows: Vec<Kept> = windows.iter().map(|layers| Kept::mean(layers)).collect();
    let of_layers: Vec<Kept> = (0..windows[0].len())
        .map(|layer| Kept::mean(&windows.iter().map(|layers| layers[layer]).collect::<Vec<_>>()))
        .collect();
    let all = Kept::mean(&of_windows);
    let share = |kept: &Kept| kept.selection / kept.oracle;
    let layers = || of_layers.iter().map(share).enumerate();
    let worst = layers().min_by(|a, b| a.1.total_cmp(&b.1)).map(|(layer, _)| layer);
    let selections: Vec<f64> = of_windows.iter().map(|kept| kept.selection).collect();
    let shares: Vec<f64> = of_windows.iter().map(share).collect();
    let parts = |kept: &Kept| {
        json!({
            "selection": kept.selection,
            "oracle": kept.oracle,
            "window": kept.window,
            "random": kept.random,
            "share_of_oracle": share(kept),
        })
    };
    let mut result = parts(&all);
    result["selection_error"] = json!(standard_error(&selections));
    result["share_error"] = json!(standard_error(&shares));
    result["worst_layer"] = json!(worst);
    result["layers"] = of_layers.iter().map(parts).collect();
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept(selection: f64) -> Kept {
        Kept { selection, oracle: 0.8, window: 0.25, random: 0.125 }
    }

    #[test]
    fn the_worst_layer_is_the_one_that_is_furthest_from_its_oracle() {
        let found = mass_json(&[vec![kept(0.75), kept(0.5)], vec![kept(0.75), kept(0.25)]]);
        let near =
            |found: &Value, expected: f64| assert!((found.as_f64().unwrap() - expected).abs() < 1e-12, "{found}");
        near(&found["selection"], 0.5625);
        near(&found["share_of_oracle"], 0.5625 / 0.8);
        // 0.625 and 0.5: half of their distance.
        near(&found["selection_error"], 0.0625);
        assert_eq!(found["worst_layer"], 1);
        near(&found["layers"][1]["selection"], 0.375);
        near(&found["layers"][0]["share_of_oracle"], 0.9375);
        assert!(mass_json(&[vec![kept(0.5)]])["selection_error"].is_null(), "one window has no error");
    }

    #[test]
    fn of_each_step_the_rows_at_its_positions_are_picked() {
        let step = |values: std::ops::Range<i16>| {
            let pairs = || values.clone().flat_map(|n| [n, -n]);
            let queries =
                Queries { latent: values.clone().map(f32::from).collect(), rope: pairs().map(f32::from).collect() };
            let selections = vec![pairs().map(i32::from).collect(); 2];
            Outputs { queries: vec![queries], selections, ..Outputs::default() }
        };
        let mut picked = Picked::new(vec![1, 4, 5, 9]);
        picked.take(0, 5, &step(0..5));
        picked.take(5, 3, &step(5..8));
        assert_eq!(
            (&picked.queries[0].latent[..], &picked.queries[0].rope[..]),
            (&[1.0, 4.0, 5.0][..], &[1.0, -1.0, 4.0, -4.0, 5.0, -5.0][..])
        );
        assert_eq!(picked.selections, vec![vec![1, -1, 4, -4, 5, -5]; 2]);
    }

    #[test]
    fn a_layer_without_an_indexer_reads_the_selection_before_it() {
        assert_eq!(selecting(&[true, false, false, true, true]), [0, 0, 0, 1, 2]);
    }
}
