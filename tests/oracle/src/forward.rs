//! What does a DSA model compute? The whole forward pass in the plain form of the DeepSeek-V2 and V3.2 reports.
//!
//! Letters: T tokens, D model width, H heads, G KV groups, N and P widths of a head's key without and with position,
//! V of its value, C of the latent. Where llama.cpp, Hugging Face and DeepSeek's code differ, the file's own eps holds
//! for every RMSNorm, the indexer's LayerNorm has eps 1e-6, and nothing is rounded on the way.

use crate::model::{Config, Indexer, Model, Moe};
use crate::rope::Rope;
use crate::rows::{Real, Rows, dot, linear};
use anyhow::ensure;

/// Epsilon of the index keys' LayerNorm: a constant in every implementation.
const K_NORM_EPS: f64 = 1e-6;
/// What keeps the sum of expert weights from zero (Hugging Face).
const EXPERT_SUM_EPS: f64 = 1e-20;

/// One thing done wrong on purpose, to show that a comparison notices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mistake {
    /// The indexer rotates pairs of the other style.
    IndexerRopeStyle,
    /// Index scores keep their negative products.
    NoRelu,
    /// Index keys are not shifted by `k_norm.bias`.
    NoKNormBias,
}

/// How to run.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Tokens selected instead of the file's number; 0 is dense attention.
    pub top_k: Option<usize>,
    /// Only the last so many rows get logits; all without it.
    pub last_rows: Option<usize>,
    /// The deliberate mistake.
    pub mistake: Option<Mistake>,
    /// Whether [`Output::attention`] is wanted: T x T values for each layer.
    pub attention: bool,
}

/// What one indexer selected.
#[derive(Clone, Debug, PartialEq)]
pub struct Selection {
    /// The positions for each query, ascending.
    pub positions: Vec<Vec<usize>>,
    /// How far the last selected score is above the first rejected one; infinite where nothing was rejected.
    pub margins: Vec<f64>,
}

/// What a forward pass gives.
#[derive(Clone, Debug)]
pub struct Output<T> {
    /// `[rows, vocabulary]`
    pub logits: Rows<T>,
    /// One per layer that owns an indexer; empty when dense.
    pub selections: Vec<Selection>,
    /// What attention over all tokens would weigh, `[T, T]` for each layer, the mean over the heads: the queries and
    /// keys are those of the run, only the mask is left out. Empty unless wanted.
    pub attention: Vec<Rows<T>>,
}

/// [`Output::selections`] and [`Output::attention`] so far.
type Found<T> = (Vec<Selection>, Vec<Rows<T>>);

/// Runs all tokens of one sequence through the model.
///
/// # Errors
/// A tensor is missing or of another shape, or a token is past the vocabulary.
pub fn forward<T: Real>(model: &Model, ids: &[u32], options: &Options) -> anyhow::Result<Output<T>> {
    let c = &model.config;
    ensure!(!ids.is_empty() && ids.iter().all(|&id| (id as usize) < c.vocab), "tokens must be 0 to {}", c.vocab - 1);
    let embedding = model.matrix::<T>("token_embd.weight", c.vocab, c.hidden)?;
    let mut x = Rows::new(c.hidden, ids.iter().flat_map(|&id| embedding.row(id as usize).to_vec()).collect());
    let mut found = (Vec::new(), Vec::new());
    for n in 0..c.n_layers {
        let layer = Layer { model, c, n };
        x = layer.forward(x, options, &mut found)?;
    }
    let rows = options.last_rows.unwrap_or(x.len()).min(x.len());
    let x = rms_norm(&x.slice(x.len() - rows, rows), &model.vector("output_norm.weight", c.hidden)?, c.eps);
    let head = match model.has("output.weight") {
        true => model.matrix("output.weight", c.vocab, c.hidden)?,
        false => embedding,
    };
    let (selections, attention) = found;
    Ok(Output { logits: linear(&x, &head), selections, attention })
}

/// One layer's weights.
struct Layer<'a> {
    model: &'a Model,
    c: &'a Config,
    n: usize,
}

impl Layer<'_> {
    fn has(&self, name: &str) -> bool {
        self.model.has(&format!("blk.{}.{name}", self.n))
    }

    fn vector<T: Real>(&self, name: &str, n: usize) -> anyhow::Result<Vec<T>> {
        self.model.vector(&format!("blk.{}.{name}", self.n), n)
    }

    fn matrix<T: Real>(&self, name: &str, rows: usize, columns: usize) -> anyhow::Result<Rows<T>> {
        self.model.matrix(&format!("blk.{}.{name}.weight", self.n), rows, columns)
    }

    /// `count` matrices `[rows, columns]` in one tensor.
    fn matrices<T: Real>(&self, name: &str, n: usize, rows: usize, columns: usize) -> anyhow::Result<Vec<Rows<T>>> {
        let all = self.model.matrix::<T>(&format!("blk.{}.{name}.weight", self.n), n * rows, columns)?;
        Ok((0..n).map(|i| all.slice(i * rows, rows)).collect())
    }

    fn forward<T: Real>(&self, x: Rows<T>, options: &Options, found: &mut Found<T>) -> anyhow::Result<Rows<T>> {
        let (c, (selections, attention)) = (self.c, found);
        let h = rms_norm(&x, &self.vector("attn_norm.weight", c.hidden)?, c.eps);
        // MLA's query and the indexer's come from the same compressed row, where there is one.
        let q_from = match c.q_lora {
            Some(rank) => {
                let compressed = linear(&h, &self.matrix("attn_q_a", rank, c.hidden)?);
                rms_norm(&compressed, &self.vector("attn_q_a_norm.weight", rank)?, c.eps)
            }
            None => h.clone(),
        };
        if let Some(indexer) = c.indexer.as_ref().filter(|_| options.top_k != Some(0))
            && indexer.full[self.n]
        {
            selections.push(self.select(indexer, &h, &q_from, options)?);
        }
        // A layer without an indexer of its own attends to what the last one with it selected.
        let mut weights = options.attention.then(|| Rows::zeros(h.len(), h.len()));
        let attended = self.attention(&h, &q_from, selections.last(), weights.as_mut())?;
        attention.extend(weights);
        let x = x.plus(&linear(&attended, &self.matrix("attn_output", c.hidden, c.n_heads * c.v_head)?));
        let y = rms_norm(&x, &self.vector("ffn_norm.weight", c.hidden)?, c.eps);
        let fed = match c.moe.as_ref().filter(|moe| self.n >= moe.first_layer) {
            Some(moe) => self.experts(moe, &y)?,
            None => self.feed_forward("", c.feed_forward, &y)?,
        };
        Ok(x.plus(&fed))
    }

    /// The lightning indexer: `score(t, s) = sum_h w[t, h] relu(q[t, h] . k[s])`, the best k of `s <= t`.
    fn select<T: Real>(
        &self,
        ix: &Indexer,
        h: &Rows<T>,
        q_from: &Rows<T>,
        options: &Options,
    ) -> anyhow::Result<Selection> {
        let gain = self.vector("indexer.k_norm.weight", ix.width)?;
        let mut bias = self.vector("indexer.k_norm.bias", ix.width)?;
        if options.mistake == Some(Mistake::NoKNormBias) {
            bias.fill(T::zero());
        }
        let interleaved = ix.interleaved != (options.mistake == Some(Mistake::IndexerRopeStyle));
        let turn = |row: &mut [T], t: usize| rotate(&mut row[..ix.rope.width()], t, &ix.rope, interleaved);
        let keys = linear(h, &self.matrix("indexer.attn_k", ix.width, self.c.hidden)?);
        let keys = layer_norm(keys, &gain, &bias).map(|t, row| turn(row, t));
        let q = linear(q_from, &self.matrix("indexer.attn_q_b", ix.n_heads * ix.width, q_from.width())?);
        let q = q.map(|t, row| row.chunks_exact_mut(ix.width).for_each(|head| turn(head, t)));
        let scale = T::of(1.0 / ((ix.n_heads * ix.width) as f64).sqrt());
        let weights = linear(h, &self.matrix("indexer.proj", ix.n_heads, self.c.hidden)?);
        let relu = |z: T| if options.mistake == Some(Mistake::NoRelu) { z } else { z.max(T::zero()) };
        let score = |t: usize, s: usize| -> T {
            let heads = q.row(t).chunks_exact(ix.width).zip(weights.row(t));
            heads.map(|(q, &w)| w * scale * relu(dot(q, keys.row(s)))).sum()
        };
        let k = options.top_k.unwrap_or(ix.top_k);
        let best = (0..h.len()).map(|t| best(&(0..=t).map(|s| score(t, s)).collect::<Vec<_>>(), k));
        let (positions, margins) = best.unzip();
        Ok(Selection { positions, margins })
    }

    /// Multi-head attention over the selected tokens: `[T, H V]`. Adds to `weights` what it would weigh without a mask.
    fn attention<T: Real>(
        &self,
        h: &Rows<T>,
        q_from: &Rows<T>,
        selection: Option<&Selection>,
        mut weights: Option<&mut Rows<T>>,
    ) -> anyhow::Result<Rows<T>> {
        let c = self.c;
        let key = c.nope + c.rope_head;
        let source = if c.q_lora.is_some() { "attn_q_b" } else { "attn_q" };
        let q = linear(q_from, &self.matrix(source, c.n_heads * key, q_from.width())?);
        let (latent, turned) = self.latent(h)?;
        let heads = self.expand(&latent)?;
        let mut out = Rows::zeros(h.len(), c.n_heads * c.v_head);
        for (head, (nope, values)) in heads.iter().enumerate() {
            let group = head * c.groups / c.n_heads;
            let rope = c.rope.part(group * c.rope_head / 2, c.rope_head / 2);
            let shared = turned.columns(group * c.rope_head, c.rope_head);
            let keys: Vec<Vec<T>> = (0..h.len()).map(|s| [nope.get(s), Some(shared.row(s))]).map(join).collect();
            for t in 0..h.len() {
                let mut query = q.row(t)[head * key..][..key].to_vec();
                rotate(&mut query[c.nope..], t, &rope, true);
                let mut scores: Vec<T> = keys[..=t].iter().map(|k| dot(&query, k) * T::of(c.scale)).collect();
                if let Some(weights) = &mut weights {
                    let mut full = scores.clone();
                    softmax(&mut full);
                    let heads = T::of(c.n_heads as f64);
                    weights.row_mut(t).iter_mut().zip(full).for_each(|(mean, p)| *mean += p / heads);
                }
                if let Some(selection) = selection {
                    let chosen = &selection.positions[t];
                    let masked = (0..=t).filter(|s| chosen.binary_search(s).is_err());
                    masked.for_each(|s| scores[s] = T::neg_infinity());
                }
                softmax(&mut scores);
                let o = &mut out.row_mut(t)[head * c.v_head..][..c.v_head];
                for (p, value) in scores.into_iter().zip(values.iter()) {
                    o.iter_mut().zip(value).for_each(|(o, &v)| *o += p * v);
                }
            }
        }
        Ok(out)
    }

    /// What a cache would hold: the latent `[T, C]`, and the rotated rope key `[T, G P]`.
    fn latent<T: Real>(&self, h: &Rows<T>) -> anyhow::Result<(Rows<T>, Rows<T>)> {
        let c = self.c;
        let rope_row = c.groups * c.rope_head;
        let (mut latent, rope) = if c.llama {
            let v = linear(h, &self.matrix("attn_v", c.latent, c.hidden)?);
            (v, linear(h, &self.matrix("attn_k", rope_row, c.hidden)?))
        } else if self.has("attn_kv_a_mqa.weight") {
            let both = linear(h, &self.matrix("attn_kv_a_mqa", c.latent + rope_row, c.hidden)?);
            (both.columns(0, c.latent), both.columns(c.latent, rope_row))
        } else {
            let latent = linear(h, &self.matrix("attn_kv_a", c.latent, c.hidden)?);
            (latent, linear(h, &self.matrix("attn_k_rope", rope_row, c.hidden)?))
        };
        if c.kv_a_norm {
            latent = rms_norm(&latent, &self.vector("attn_kv_a_norm.weight", c.latent)?, c.eps);
        }
        Ok((latent, rope.map(|t, row| rotate(row, t, &c.rope, true))))
    }

    /// Every head's keys without position `[T, N]` and values `[T, V]`.
    fn expand<T: Real>(&self, latent: &Rows<T>) -> anyhow::Result<Vec<(Keys<T>, Rows<T>)>> {
        let c = self.c;
        if c.group_form {
            // A head's value is its group's slice of the latent, and all of its key has a position.
            let slice = |head: usize| latent.columns(head * c.groups / c.n_heads * c.v_head, c.v_head);
            return Ok((0..c.n_heads).map(|head| (Keys(None), slice(head))).collect());
        }
        if self.has("attn_kv_b.weight") {
            let both = self.matrices("attn_kv_b", c.n_heads, c.nope + c.v_head, c.latent)?;
            let split = |w: &Rows<T>| (w.slice(0, c.nope), w.slice(c.nope, c.v_head));
            let heads = both.iter().map(split);
            return Ok(heads.map(|(k, v)| (Keys(Some(linear(latent, &k))), linear(latent, &v))).collect());
        }
        // attn_k_b is stored the other way round: a row per value of the latent.
        let k = self.matrices("attn_k_b", c.n_heads, c.latent, c.nope)?;
        let v = self.matrices("attn_v_b", c.n_heads, c.v_head, c.latent)?;
        let heads = k.iter().zip(&v);
        Ok(heads.map(|(k, v)| (Keys(Some(linear(latent, &k.transposed()))), linear(latent, v))).collect())
    }

    /// `down(silu(gate y) * up y)` with the weights `ffn_*{suffix}`.
    fn feed_forward<T: Real>(&self, suffix: &str, width: usize, y: &Rows<T>) -> anyhow::Result<Rows<T>> {
        let gate = self.matrix(&format!("ffn_gate{suffix}"), width, self.c.hidden)?;
        let up = self.matrix(&format!("ffn_up{suffix}"), width, self.c.hidden)?;
        Ok(swiglu(y, &gate, &up, &self.matrix(&format!("ffn_down{suffix}"), self.c.hidden, width)?))
    }

    /// Mixture of experts: `sum_e weight_e expert_e(y)`, and the shared experts as one that everyone takes.
    fn experts<T: Real>(&self, moe: &Moe, y: &Rows<T>) -> anyhow::Result<Rows<T>> {
        let (n, width, hidden) = (moe.n_experts, moe.feed_forward, self.c.hidden);
        let gate = self.matrices("ffn_gate_exps", n, width, hidden)?;
        let up = self.matrices("ffn_up_exps", n, width, hidden)?;
        let down = self.matrices("ffn_down_exps", n, hidden, width)?;
        let bias = match self.has("exp_probs_b.bias") {
            true => self.vector("exp_probs_b.bias", n)?,
            false => vec![T::zero(); n],
        };
        let logits = linear(y, &self.matrix("ffn_gate_inp", n, hidden)?);
        let routed = y.clone().map(|t, row| {
            let token = Rows::new(hidden, row.to_vec());
            row.fill(T::zero());
            for (expert, weight) in route(logits.row(t), &bias, moe) {
                let out = swiglu(&token, &gate[expert], &up[expert], &down[expert]);
                row.iter_mut().zip(out.values()).for_each(|(z, &o)| *z += weight * o);
            }
        });
        Ok(match moe.n_shared {
            0 => routed,
            n => routed.plus(&self.feed_forward("_shexp", width * n, y)?),
        })
    }
}

/// A head's keys without position, in models that have them.
struct Keys<T>(Option<Rows<T>>);

impl<T: Real> Keys<T> {
    fn get(&self, s: usize) -> Option<&[T]> {
        self.0.as_ref().map(|rows| rows.row(s))
    }
}

fn join<T: Copy>(parts: [Option<&[T]>; 2]) -> Vec<T> {
    parts.into_iter().flatten().flatten().copied().collect()
}

/// The experts of one token with their weights (DeepSeek-V3's "noaux_tc"; with softmax scores V2's greedy methods).
fn route<T: Real>(logits: &[T], bias: &[T], moe: &Moe) -> Vec<(usize, T)> {
    let mut p = logits.to_vec();
    match moe.softmax {
        true => softmax(&mut p),
        false => p.iter_mut().for_each(|p| *p = sigmoid(*p)),
    }
    // The bias decides who is chosen, and has no part in the weight.
    let mut choice: Vec<T> = p.iter().zip(bias).map(|(&p, &b)| p + b).collect();
    if moe.n_groups > 1 {
        let per_group = moe.n_experts / moe.n_groups;
        let group_score = |group: &[T]| -> T {
            let counted = if moe.softmax { 1 } else { 2 };
            best(group, counted).0.into_iter().map(|e| group[e]).sum()
        };
        let scores: Vec<T> = choice.chunks_exact(per_group).map(group_score).collect();
        let kept = best(&scores, moe.n_groups_kept).0;
        let dropped = (0..moe.n_experts).filter(|e| !kept.contains(&(e / per_group)));
        dropped.for_each(|e| choice[e] = T::neg_infinity());
    }
    let chosen = best(&choice, moe.n_active).0;
    let sum = chosen.iter().map(|&e| p[e]).sum::<T>() + T::of(EXPERT_SUM_EPS);
    let norm = if moe.renormalise { sum } else { T::one() };
    chosen.into_iter().map(|e| (e, p[e] / norm * T::of(moe.scale))).collect()
}

/// The places of the k greatest values, ascending, the lower place first of equals; and the gap to the next one.
fn best<T: Real>(values: &[T], k: usize) -> (Vec<usize>, f64) {
    let mut order: Vec<usize> = (0..values.len()).collect();
    // Adding 0 makes one zero of both, so that total_cmp sees equals as equals.
    let value = |i: usize| -> f64 { values[i].into() + 0.0 };
    order.sort_by(|&a, &b| value(b).total_cmp(&value(a)));
    let gap = match (k.checked_sub(1).and_then(|last| order.get(last)), order.get(k)) {
        (Some(&last), Some(&next)) => (values[last] - values[next]).into(),
        _ => f64::INFINITY,
    };
    order.truncate(k);
    order.sort_unstable();
    (order, gap)
}

/// `x / sqrt(mean(x^2) + eps) * gain`, row by row.
fn rms_norm<T: Real>(x: &Rows<T>, gain: &[T], eps: f64) -> Rows<T> {
    x.clone().map(|_, row| {
        let root = (dot(row, row) / T::of(row.len() as f64) + T::of(eps)).sqrt();
        row.iter_mut().zip(gain).for_each(|(x, &g)| *x = *x / root * g);
    })
}

/// `(x - mean) / sqrt(var + eps) * gain + bias`, row by row.
fn layer_norm<T: Real>(x: Rows<T>, gain: &[T], bias: &[T]) -> Rows<T> {
    x.map(|_, row| {
        let n = T::of(row.len() as f64);
        let mean = row.iter().copied().sum::<T>() / n;
        row.iter_mut().for_each(|x| *x = *x - mean);
        let root = (dot(row, row) / n + T::of(K_NORM_EPS)).sqrt();
        row.iter_mut().zip(gain.iter().zip(bias)).for_each(|(x, (&g, &b))| *x = *x / root * g + b);
    })
}

/// Turns pair j of a row by `position * frequency_j`: `(x[2j], x[2j+1])` interleaved, `(x[j], x[j + P/2])` half-split.
fn rotate<T: Real>(row: &mut [T], position: usize, rope: &Rope, interleaved: bool) {
    let pairs = rope.frequencies.len();
    for (j, frequency) in rope.frequencies.iter().enumerate() {
        let (sin, cos) = (position as f64 * frequency).sin_cos();
        let (sin, cos) = (T::of(sin * rope.magnitude), T::of(cos * rope.magnitude));
        let (first, second) = if interleaved { (2 * j, 2 * j + 1) } else { (j, j + pairs) };
        let (a, b) = (row[first], row[second]);
        row[first] = a * cos - b * sin;
        row[second] = b * cos + a * sin;
    }
}

fn softmax<T: Real>(z: &mut [T]) {
    let top = z.iter().copied().fold(T::neg_infinity(), T::max);
    z.iter_mut().for_each(|z| *z = (*z - top).exp());
    let sum: T = z.iter().copied().sum();
    z.iter_mut().for_each(|z| *z = *z / sum);
}

fn sigmoid<T: Real>(z: T) -> T {
    T::one() / (T::one() + (-z).exp())
}

/// `down(silu(gate y) * up y)`.
fn swiglu<T: Real>(y: &Rows<T>, gate: &Rows<T>, up: &Rows<T>, down: &Rows<T>) -> Rows<T> {
    let up = linear(y, up);
    let inner =
        linear(y, gate).map(|t, row| row.iter_mut().zip(up.row(t)).for_each(|(g, &u)| *g = *g * sigmoid(*g) * u));
    linear(&inner, down)
}
