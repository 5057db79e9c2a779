//! Attention over the KV pool, for rows of any format; `blocked` is the fast path.

use super::Frame;
use crate::kernels::attention::{HeadBlock, ROWS, Softmax, attend};
use crate::kernels::rows::decode_slice;
use crate::memory::Pool;
use crate::tensor::Tensor;
use crate::threads::part;
use sparsed_abi::{OP_SPARSE_MLA, SpdOp};
use sparsed_plugin_kit::slow::rowcache::RowCache;
use sparsed_plugin_kit::{PluginError, Result};
use std::ops::Range;

impl Frame<'_> {
    pub(super) fn attention(&self, op: &SpdOp) -> Result<()> {
        let sel = (op.kind == OP_SPARSE_MLA).then(|| self.tensor::<i32>(op.inputs[2]));
        if let Some(sel) = sel {
            self.check_selection(sel)?;
        }
        let job = Attention {
            frame: self,
            pool: self.pool(),
            slow: None,
            tokens: 0..self.tensor::<f32>(op.inputs[1]).n0,
            layer: op.layer as usize,
            q_latent: self.optional(op.inputs[0]),
            q_rope: self.tensor(op.inputs[1]),
            sel,
            out: self.tensor(op.outputs[0]),
            groups: op.i[0].unsigned_abs() as usize,
            scale: op.f[0],
        };
        match self.pool().slow() {
            None => job.compute(),
            Some(mut slow) => job.compute_slow(&mut slow)?,
        }
        Ok(())
    }

    /// Selections are data: a position past the token must not be followed, nor one behind the end of the list.
    fn check_selection(&self, sel: Tensor<'_, i32>) -> Result<()> {
        for t in 0..sel.n0 {
            let (row, position) = (sel.row(t, 0), self.step.positions[t]);
            let listed = row.iter().take_while(|&&s| s >= 0).count();
            if let Some(s) = row[..listed].iter().find(|s| s.unsigned_abs() > position) {
                return Err(PluginError::invalid(format!("selected position {s} is after the token's {position}")));
            }
            if let Some(s) = row[listed..].iter().find(|&&s| s >= 0) {
                return Err(PluginError::invalid(format!("selected position {s} is after the end of its list")));
            }
        }
        Ok(())
    }
}

/// One attention operator of a step.
pub(super) struct Attention<'a> {
    pub(super) frame: &'a Frame<'a>,
    pub(super) pool: &'a Pool,
    /// Has the slow rows of `tokens`.
    pub(super) slow: Option<&'a RowCache>,
    /// Those that are computed now.
    pub(super) tokens: Range<usize>,
    pub(super) layer: usize,
    pub(super) q_latent: Option<Tensor<'a, f32>>,
    pub(super) q_rope: Tensor<'a, f32>,
    pub(super) sel: Option<Tensor<'a, i32>>,
    pub(super) out: Tensor<'a, f32>,
    pub(super) groups: usize,
    pub(super) scale: f32,
}

impl Attention<'_> {
    /// Computes its tokens.
    pub(super) fn compute(&self) {
        if self.is_blocked() {
            return self.run_blocked();
        }
        let team = &self.frame.device.team;
        // A unit is some heads of one group at one token; a lone token's heads are dealt to the whole team.
        let heads = self.q_rope.n1 / self.groups;
        let split = if self.tokens.len() * self.groups >= team.len() { 1 } else { team.len().min(heads) };
        let units = self.tokens.len() * self.groups * split;
        team.deal(units, &|dealt| {
            let mut rows = (vec![0f32; ROWS * self.out.n2], vec![0f32; ROWS * self.q_rope.n2]);
            for unit in dealt {
                let (t, group, piece) = (unit / split / self.groups, unit / split % self.groups, unit % split);
                let own = part(heads, piece, split);
                let own = group * heads + own.start..group * heads + own.end;
                self.run_decoded(self.tokens.start + t, group, own, &mut rows);
            }
        });
    }

    /// The latent and the rope row of `slot` together, wherever they lie.
    pub(super) fn row(&self, slot: usize) -> &[u8] {
        match self.slow {
            Some(cache) if cache.is_attached(self.key(slot).block) => {
                cache.row(self.key(slot)).expect("rows of these tokens were fetched")
            }
            _ => self.pool.latent_row(self.layer, slot),
        }
    }

    /// Positions that token t sees.
    pub(super) fn visible(&self, t: usize) -> usize {
        self.frame.step.positions[t] as usize + 1
    }

    /// How many rows token t reads.
    pub(super) fn listed(&self, t: usize) -> usize {
        match self.sel {
            Some(sel) => sel.row(t, 0).iter().filter(|&&s| s >= 0).count(),
            None => self.visible(t),
        }
    }

    /// The position of row `i` of token t's list.
    pub(super) fn position(&self, t: usize, i: usize) -> usize {
        match self.sel {
            Some(sel) => sel.row(t, 0)[i].unsigned_abs() as usize,
            None => i,
        }
    }

    /// Heads `heads`, all of group `group`, of token t, from rows of any format. Each listed row is decoded once for
    /// all of them.
    fn run_decoded(&self, t: usize, group: usize, heads: Range<usize>, rows: &mut (Vec<f32>, Vec<f32>)) {
        let (frame, level) = (self.frame, self.frame.device.level);
        let listed = self.listed(t);
        let position = |i: usize| self.position(t, i);
        let (latent, rope) = rows;
        let mut states = vec![Softmax::EMPTY; heads.len()];
        for head in heads.clone() {
            // SAFETY: this thread has these heads of this token.
            unsafe { self.out.row_mut(t, head) }.fill(0.0);
        }
        for first in (0..listed).step_by(ROWS) {
            let n = (listed - first).min(ROWS);
            for i in 0..n {
                let row = self.row(frame.slot(t, position(first + i)));
                let (latent_row, rope_row) = row.split_at(self.pool.latent.bytes);
                let (width, rope_width) = (self.out.n2, self.q_rope.n2);
                let to = &mut latent[i * width..(i + 1) * width];
                decode_slice(level, self.pool.latent.format, latent_row, group * width, to);
                let to = &mut rope[i * rope_width..(i + 1) * rope_width];
                decode_slice(level, self.pool.rope.format, rope_row, group * rope_width, to);
            }
            for (head, state) in heads.clone().zip(&mut states) {
                let q_latent = self.q_latent.map_or(&[][..], |q| q.row(t, head));
                let block =
                    HeadBlock { q_latent, q_rope: self.q_rope.row(t, head), latent, rope, n, scale: self.scale };
                // SAFETY: this thread has these heads of this token.
                attend(level, block, state, unsafe { self.out.row_mut(t, head) });
            }
        }
        for (head, state) in heads.zip(states) {
            // SAFETY: as above.
            unsafe { self.out.row_mut(t, head) }.iter_mut().for_each(|o| *o /= state.sum);
        }
        debug_assert!(self.groups * self.q_rope.n2 == self.pool.rope.width, "checked when the plan was compiled");
    }
}
