//! One transformer layer in operators: DeepSeek-V3.2-Exp `model.py` (MLA, Indexer, MoE), in the absorbed form.

use super::build::{Builder, dim};
use super::{Activations, OutputKind};
use crate::{Architecture, GroupScore, IndexerSpec, ModelError, MoeSpec, RopeLayout, RouterScore};
use sparsed_abi::{
    DIM_TOKENS, DT_I32, DT_Q4_0, OP_DENSE_MLA, OP_HADAMARD, OP_IDX_APPEND, OP_IDX_TOPK, OP_KV_APPEND, OP_LAYER_NORM,
    OP_MLA_ABSORB, OP_MLA_EXPAND, OP_MOE_COMBINE, OP_MOE_LINEAR, OP_MOE_ROUTE, OP_RMS_NORM, OP_ROPE, OP_SILU_MUL,
    OP_SPARSE_MLA, TensorId,
};

/// A layout by ROPE's number.
fn rope_layout(layout: RopeLayout) -> i32 {
    match layout {
        RopeLayout::Interleaved => 0,
        RopeLayout::HalfSplit => 1,
    }
}

impl Builder<'_> {
    /// Appends layer `layer`; its feed-forward output stays pending.
    pub(super) fn layer(&mut self, layer: u32, top_k: Option<u32>) -> Result<(), ModelError> {
        let name = |what: &str| format!("blk.{layer}.{what}");
        let h = self.norm(&name("attn_norm.weight"))?;
        let compressed = self.compressed_query(&name, h)?;
        let (q_latent, q_rope) = self.query(&name, compressed.unwrap_or(h))?;
        if self.options.queries_out {
            let spec = self.spec;
            self.output(q_rope, OutputKind::QueryRope, spec.n_heads * spec.qk_rope_head_dim);
            if let Some(q_latent) = q_latent {
                self.output(q_latent, OutputKind::QueryLatent, spec.n_heads * spec.kv_lora_rank);
            }
        }
        self.append(layer, &name, h)?;
        let selection = match top_k {
            Some(k) => Some(self.selection(layer, &name, h, compressed.unwrap_or(h), k)?),
            None => None,
        };
        let spec = self.spec;
        let out = self.tokens(&[spec.n_heads, spec.kv_lora_rank / spec.group_count]);
        let kind = if selection.is_some() { OP_SPARSE_MLA } else { OP_DENSE_MLA };
        let groups = [dim(spec.group_count), 0, 0, 0, 0, 0];
        self.layer_op(kind, layer, &[q_latent, Some(q_rope), selection], &[out], groups, spec.softmax_scale);
        let heads = self.expand(&name, out)?;
        let attended =
            self.linear(&name("attn_output.weight"), heads, spec.n_heads * spec.v_head_dim, spec.hidden_size, false)?;
        self.pending = Some(attended);
        let y = self.norm(&name("ffn_norm.weight"))?;
        let fed = match &spec.moe {
            Some(moe) if spec.is_moe_layer(layer) => self.experts(&name, y, moe)?,
            _ => self.feed_forward(&name, "", y, spec.feed_forward)?,
        };
        self.pending = Some(fed);
        Ok(())
    }

    /// The normalised low-rank query, in models that have one.
    fn compressed_query(&mut self, name: &dyn Fn(&str) -> String, h: TensorId) -> Result<Option<TensorId>, ModelError> {
        let Some(rank) = self.spec.q_lora_rank else { return Ok(None) };
        let a = self.linear(&name("attn_q_a.weight"), h, self.spec.hidden_size, rank, false)?;
        let gain = self.vector(&name("attn_q_a_norm.weight"), rank)?;
        let normed = self.tokens(&[rank]);
        self.op(OP_RMS_NORM, &[Some(a), Some(gain)], &[normed], [0; 6], self.spec.latent_norm_eps);
        Ok(Some(normed))
    }

    /// The absorbed query (genuine MLA only) and the rotated query.
    fn query(
        &mut self,
        name: &dyn Fn(&str) -> String,
        from: TensorId,
    ) -> Result<(Option<TensorId>, TensorId), ModelError> {
        let spec = self.spec;
        let (heads, nope, rope) = (spec.n_heads, spec.qk_nope_head_dim, spec.qk_rope_head_dim);
        let (source, cols) = match spec.q_lora_rank {
            Some(rank) => ("attn_q_b.weight", rank),
            None => ("attn_q.weight", spec.hidden_size),
        };
        let q = self.linear(&name(source), from, cols, heads * (nope + rope), false)?;
        let strides = [dim(heads * (nope + rope)), dim(nope + rope)];
        let part = [DIM_TOKENS, dim(heads), dim(rope)];
        let q_rope = self.program.view(q, i64::from(nope), &part, &strides);
        // Groups share their frequencies, so a head turns by those of the first slice.
        let frequencies = &spec.rope_frequencies[..rope as usize / 2];
        let rotated = self.rotate(q_rope, &[heads, rope], frequencies, spec.rope_layout);
        if nope == 0 {
            return Ok((None, rotated));
        }
        let q_nope = self.program.view(q, 0, &[DIM_TOKENS, dim(heads), dim(nope)], &strides);
        let weight = self.matrices(&name("attn_k_b.weight"), nope, spec.kv_lora_rank, heads)?;
        let q_latent = self.tokens(&[heads, spec.kv_lora_rank]);
        let rounding = [self.rounding(), 0, 0, 0, 0, 0];
        self.op(OP_MLA_ABSORB, &[Some(q_nope), Some(weight)], &[q_latent], rounding, 0.0);
        Ok((Some(q_latent), rotated))
    }

    /// Computes this token's latent and rope row and appends them.
    fn append(&mut self, layer: u32, name: &dyn Fn(&str) -> String, h: TensorId) -> Result<(), ModelError> {
        let spec = self.spec;
        let (hidden, latent, rope) = (spec.hidden_size, spec.kv_lora_rank, spec.rope_row);
        let fused = name("attn_kv_a_mqa.weight");
        let (mut c, k) = if spec.architecture == Architecture::Llama {
            let c = self.linear(&name("attn_v.weight"), h, hidden, latent, false)?;
            (c, self.linear(&name("attn_k.weight"), h, hidden, rope, false)?)
        } else if self.weights.has(&fused) {
            let both = self.linear(&fused, h, hidden, latent + rope, false)?;
            let stride = [dim(latent + rope)];
            let c = self.program.view(both, 0, &[DIM_TOKENS, dim(latent)], &stride);
            (c, self.program.view(both, i64::from(latent), &[DIM_TOKENS, dim(rope)], &stride))
        } else {
            let c = self.linear(&name("attn_kv_a.weight"), h, hidden, latent, false)?;
            (c, self.linear(&name("attn_k_rope.weight"), h, hidden, rope, false)?)
        };
        if spec.kv_a_norm {
            let gain = self.vector(&name("attn_kv_a_norm.weight"), latent)?;
            let normed = self.tokens(&[latent]);
            self.op(OP_RMS_NORM, &[Some(c), Some(gain)], &[normed], [0; 6], spec.latent_norm_eps);
            c = normed;
        }
        let k = self.rotate(k, &[rope], &spec.rope_frequencies, spec.rope_layout);
        self.layer_op(OP_KV_APPEND, layer, &[Some(c), Some(k)], &[], [0; 6], 0.0);
        Ok(())
    }

    /// The tokens that layer `layer` attends to: its own selection, or that of the layer before it.
    fn selection(
        &mut self,
        layer: u32,
        name: &dyn Fn(&str) -> String,
        h: TensorId,
        q_from: TensorId,
        k: u32,
    ) -> Result<TensorId, ModelError> {
        let indexer = self.spec.indexer.as_ref().expect("top_k() asks for an indexer");
        if indexer.full[layer as usize] {
            return self.select(indexer, name, h, q_from, k);
        }
        Ok(*self.selections.last().expect("the first layer selects"))
    }

    /// The lightning indexer: appends this token's key, selects k tokens.
    fn select(
        &mut self,
        indexer: &IndexerSpec,
        name: &dyn Fn(&str) -> String,
        h: TensorId,
        q_from: TensorId,
        k: u32,
    ) -> Result<TensorId, ModelError> {
        let spec = self.spec;
        // Layers of the index plane are those that select, counted in order.
        let layer = u32::try_from(self.selections.len()).expect("at most one for each layer");
        let (heads, width) = (indexer.n_heads, indexer.head_dim);
        let key = self.linear(&name("indexer.attn_k.weight"), h, spec.hidden_size, width, false)?;
        let gain = self.vector(&name("indexer.k_norm.weight"), width)?;
        let bias = self.vector(&name("indexer.k_norm.bias"), width)?;
        let normed = self.tokens(&[width]);
        self.op(OP_LAYER_NORM, &[Some(key), Some(gain), Some(bias)], &[normed], [0; 6], indexer.k_norm_eps);
        let key = self.rotate(normed, &[width], &indexer.rope_frequencies, indexer.rope_layout);
        let key = self.spread(key, &[width]);
        self.layer_op(OP_IDX_APPEND, layer, &[Some(key)], &[], [0; 6], 0.0);
        let cols = spec.q_lora_rank.unwrap_or(spec.hidden_size);
        let q = self.linear(&name("indexer.attn_q_b.weight"), q_from, cols, heads * width, false)?;
        let per_head = [DIM_TOKENS, dim(heads), dim(width)];
        let q = self.program.view(q, 0, &per_head, &[dim(heads * width), dim(width)]);
        let q = self.rotate(q, &[heads, width], &indexer.rope_frequencies, indexer.rope_layout);
        let q = self.spread(q, &[heads, width]);
        let w = self.linear(&name("indexer.proj.weight"), h, spec.hidden_size, heads, true)?;
        let selection = self.program.activation(DT_I32, &[DIM_TOKENS, dim(k)]);
        #[expect(clippy::cast_possible_truncation, reason = "a scale in single precision")]
        let scale = (1.0 / f64::from(heads * width).sqrt()) as f32;
        // Keys in 4 bits are off by more than queries in 8 are.
        let is_coarse = self.options.activations == Activations::Int8 || self.kv.index.dtype == DT_Q4_0;
        let attributes = [dim(k), i32::from(is_coarse), 0, 0, 0, 0];
        self.layer_op(OP_IDX_TOPK, layer, &[Some(q), Some(w)], &[selection], attributes, scale);
        self.selections.push(selection);
        if self.options.selections_out {
            self.output(selection, OutputKind::Selection, k);
        }
        Ok(selection)
    }

    /// The heads' outputs side by side.
    fn expand(&mut self, name: &dyn Fn(&str) -> String, out: TensorId) -> Result<TensorId, ModelError> {
        let spec = self.spec;
        let width = spec.n_heads * spec.v_head_dim;
        if spec.group_count > 1 || spec.qk_nope_head_dim == 0 {
            // A head's slice of the latent is its value: only the shape changes.
            return Ok(self.program.view(out, 0, &[DIM_TOKENS, dim(width)], &[dim(width)]));
        }
        let weight = self.matrices(&name("attn_v_b.weight"), spec.kv_lora_rank, spec.v_head_dim, spec.n_heads)?;
        let y = self.tokens(&[width]);
        let rounding = [self.rounding(), 0, 0, 0, 0, 0];
        self.op(OP_MLA_EXPAND, &[Some(out), Some(weight)], &[y], rounding, 0.0);
        Ok(y)
    }

    /// Rotates the first `2 frequencies.len()` values of each row.
    fn rotate(&mut self, x: TensorId, dims: &[u32], frequencies: &[f64], layout: RopeLayout) -> TensorId {
        let angles = self.angle_input(frequencies);
        let y = self.tokens(dims);
        let width = i32::try_from(frequencies.len() * 2).expect("a small dimension");
        self.op(OP_ROPE, &[Some(x), Some(angles)], &[y], [0, width, rope_layout(layout), 0, 0, 0], 0.0);
        y
    }

    /// Keys in 4 bits, and the queries of such, times a Hadamard matrix: products are the same, and no value of a key
    /// is much larger than the others of its block.
    fn spread(&mut self, x: TensorId, dims: &[u32]) -> TensorId {
        if self.kv.index.dtype != DT_Q4_0 {
            return x;
        }
        let y = self.tokens(dims);
        self.op(OP_HADAMARD, &[Some(x)], &[y], [0; 6], 0.0);
        y
    }

    /// `down(silu(gate y) * up y)` with the weights `ffn_*{suffix}`.
    fn feed_forward(
        &mut self,
        name: &dyn Fn(&str) -> String,
        suffix: &str,
        y: TensorId,
        width: u32,
    ) -> Result<TensorId, ModelError> {
        let hidden = self.spec.hidden_size;
        let gate = self.linear(&name(&format!("ffn_gate{suffix}.weight")), y, hidden, width, false)?;
        let up = self.linear(&name(&format!("ffn_up{suffix}.weight")), y, hidden, width, false)?;
        let inner = self.tokens(&[width]);
        self.op(OP_SILU_MUL, &[Some(gate), Some(up)], &[inner], [0; 6], 0.0);
        self.linear(&name(&format!("ffn_down{suffix}.weight")), inner, width, hidden, false)
    }

    /// Routed experts, and the shared ones if there are any.
    fn experts(&mut self, name: &dyn Fn(&str) -> String, y: TensorId, moe: &MoeSpec) -> Result<TensorId, ModelError> {
        let (hidden, width, active) = (self.spec.hidden_size, moe.feed_forward, moe.n_active);
        let logits = self.linear(&name("ffn_gate_inp.weight"), y, hidden, moe.n_experts, true)?;
        let bias_name = name("exp_probs_b.bias");
        let bias = if moe.correction_bias { Some(self.vector(&bias_name, moe.n_experts)?) } else { None };
        let ids = self.program.activation(DT_I32, &[DIM_TOKENS, dim(active)]);
        let weights = self.tokens(&[active]);
        let (score, by) =
            (i32::from(moe.score == RouterScore::Softmax), i32::from(moe.group_score == GroupScore::Best));
        let route = [dim(active), dim(moe.n_groups), dim(moe.n_groups_kept), score, i32::from(moe.renormalise), by];
        self.op(OP_MOE_ROUTE, &[Some(logits), bias], &[ids, weights], route, moe.scale);
        let rounding = self.rounding();
        let project = |builder: &mut Self, what: &str, x: TensorId, cols: u32, rows: u32, per_expert: i32| {
            let weight = builder.matrices(&name(what), cols, rows, moe.n_experts)?;
            let out = builder.tokens(&[active, rows]);
            let i = [per_expert, rounding, 0, 0, 0, 0];
            builder.op(OP_MOE_LINEAR, &[Some(x), Some(weight), Some(ids)], &[out], i, 0.0);
            Ok::<_, ModelError>(out)
        };
        let gate = project(self, "ffn_gate_exps.weight", y, hidden, width, 0)?;
        let up = project(self, "ffn_up_exps.weight", y, hidden, width, 0)?;
        let inner = self.tokens(&[active, width]);
        self.op(OP_SILU_MUL, &[Some(gate), Some(up)], &[inner], [0; 6], 0.0);
        let down = project(self, "ffn_down_exps.weight", inner, width, hidden, 1)?;
        let shared = match moe.n_shared {
            0 => None,
            n => Some(self.feed_forward(name, "_shexp", y, width * n)?),
        };
        let z = self.tokens(&[hidden]);
        self.op(OP_MOE_COMBINE, &[Some(down), Some(weights), shared], &[z], [0; 6], 0.0);
        Ok(z)
    }
}
