//! Operators that treat each row by itself.

use super::Frame;
use crate::kernels::elementwise::silu_mul;
use crate::kernels::route::{Routing, route};
use crate::kernels::{norm, rows};
use sparsed_abi::SpdOp;
use sparsed_plugin_kit::{PluginError, Result};

impl Frame<'_> {
    pub(super) fn embed(&self, op: &SpdOp) -> Result<()> {
        let (weight, x) = (self.weight(op.inputs[0]), self.tensor::<f32>(op.outputs[0]));
        if let Some(token) = self.step.tokens.iter().find(|&&token| token as usize >= weight.rows) {
            return Err(PluginError::invalid(format!("token {token} of {}", weight.rows)));
        }
        self.each(x.n0, x.n2, |t| {
            // SAFETY: each row belongs to one thread.
            let row = unsafe { x.row_mut(t, 0) };
            rows::decode(self.device.level, weight.format, weight.row(0, self.step.tokens[t] as usize), row);
        });
        Ok(())
    }

    pub(super) fn rms_norm(&self, op: &SpdOp) {
        let (x, y) = (self.tensor::<f32>(op.inputs[0]), self.tensor::<f32>(op.outputs[0]));
        let (residual, sum) = (self.optional::<f32>(op.inputs[2]), self.optional::<f32>(op.outputs[1]));
        let (gain, eps, level) = (self.vector(op.inputs[1]), op.f[0], self.device.level);
        self.each(x.rows(), x.n2, |row| {
            // SAFETY: each row belongs to one thread, and an operator's outputs are different tensors.
            let y = unsafe { y.flat_mut(row) };
            let (Some(residual), Some(sum)) = (residual, sum) else {
                return norm::rms(level, x.flat(row), gain, eps, y);
            };
            // SAFETY: as above.
            let sum = unsafe { sum.flat_mut(row) };
            sum.iter_mut().zip(x.flat(row)).zip(residual.flat(row)).for_each(|((s, a), b)| *s = a + b);
            norm::rms(level, sum, gain, eps, y);
        });
    }

    pub(super) fn layer_norm(&self, op: &SpdOp) {
        let (x, y) = (self.tensor::<f32>(op.inputs[0]), self.tensor::<f32>(op.outputs[0]));
        let (gain, bias) = (self.vector(op.inputs[1]), self.vector(op.inputs[2]));
        self.each(x.rows(), x.n2, |row| {
            // SAFETY: each row belongs to one thread.
            let y = unsafe { y.flat_mut(row) };
            norm::layer(self.device.level, x.flat(row), gain, bias, op.f[0], y);
        });
    }

    pub(super) fn rope(&self, op: &SpdOp) {
        let (x, y) = (self.tensor::<f32>(op.inputs[0]), self.tensor::<f32>(op.outputs[0]));
        let angles = self.tensor::<f32>(op.inputs[1]);
        let start = op.i[0].unsigned_abs() as usize;
        self.each(x.rows(), x.n2, |row| {
            // SAFETY: each row belongs to one thread.
            let y = unsafe { y.flat_mut(row) };
            rows::rope(x.flat(row), angles.row(row / x.n1, 0), start, op.i[2] == 1, y);
        });
    }

    pub(super) fn hadamard(&self, op: &SpdOp) {
        let (x, y) = (self.tensor::<f32>(op.inputs[0]), self.tensor::<f32>(op.outputs[0]));
        self.each(x.rows(), x.n2, |row| {
            // SAFETY: each row belongs to one thread.
            rows::hadamard(x.flat(row), unsafe { y.flat_mut(row) });
        });
    }

    pub(super) fn kv_append(&self, op: &SpdOp) {
        let (latent, rope) = (self.tensor::<f32>(op.inputs[0]), self.tensor::<f32>(op.inputs[1]));
        let pool = self.pool();
        self.each(latent.n0, latent.n2 + rope.n2, |t| {
            let slot = usize::try_from(self.step.slots[t]).expect("checked against the pool");
            // SAFETY: each token of a step has a slot of its own, which was checked.
            let (latent_to, rope_to) = unsafe { pool.latent_rows_mut(op.layer as usize, slot) };
            rows::encode(self.device.level, pool.latent.format, latent.row(t, 0), latent_to);
            rows::encode(self.device.level, pool.rope.format, rope.row(t, 0), rope_to);
        });
    }

    pub(super) fn idx_append(&self, op: &SpdOp) {
        let key = self.tensor::<f32>(op.inputs[0]);
        let pool = self.pool();
        self.each(key.n0, key.n2, |t| {
            let slot = usize::try_from(self.step.slots[t]).expect("checked against the pool");
            let mut row = vec![0; pool.index.bytes];
            rows::encode(self.device.level, pool.index.format, key.row(t, 0), &mut row);
            // SAFETY: as in kv_append.
            unsafe { pool.put_key(op.layer as usize, slot, &row) };
        });
    }

    pub(super) fn moe_route(&self, op: &SpdOp) {
        let logits = self.tensor::<f32>(op.inputs[0]);
        let (ids, weights) = (self.tensor::<i32>(op.outputs[0]), self.tensor::<f32>(op.outputs[1]));
        let bias = self.vector(op.inputs[1]);
        let routing = Routing {
            groups: op.i[1].unsigned_abs() as usize,
            groups_kept: op.i[2].unsigned_abs() as usize,
            softmax: op.i[3] == 1,
            renormalise: op.i[4] == 1,
            group_by_best: op.i[5] == 1,
            scale: op.f[0],
        };
        self.each(logits.n0, logits.n2, |t| {
            // SAFETY: each row belongs to one thread.
            let (ids, weights) = unsafe { (ids.row_mut(t, 0), weights.row_mut(t, 0)) };
            route(routing, logits.row(t, 0), bias, ids, weights);
        });
    }

    pub(super) fn moe_combine(&self, op: &SpdOp) {
        let (y, w) = (self.tensor::<f32>(op.inputs[0]), self.tensor::<f32>(op.inputs[1]));
        let (shared, z) = (self.optional::<f32>(op.inputs[2]), self.tensor::<f32>(op.outputs[0]));
        self.each(z.n0, y.n1 * y.n2, |t| {
            // SAFETY: each row belongs to one thread.
            let z = unsafe { z.row_mut(t, 0) };
            match shared {
                Some(shared) => z.copy_from_slice(shared.row(t, 0)),
                None => z.fill(0.0),
            }
            for (a, w) in w.row(t, 0).iter().enumerate() {
                z.iter_mut().zip(y.row(t, a)).for_each(|(z, y)| *z += w * y);
            }
        });
    }

    pub(super) fn silu_mul(&self, op: &SpdOp) {
        let (gate, up) = (self.tensor::<f32>(op.inputs[0]), self.tensor::<f32>(op.inputs[1]));
        let y = self.tensor::<f32>(op.outputs[0]);
        self.each(y.rows(), y.n2, |row| {
            // SAFETY: each row belongs to one thread.
            silu_mul(self.device.level, gate.flat(row), up.flat(row), unsafe { y.flat_mut(row) });
        });
    }

    pub(super) fn add(&self, op: &SpdOp) {
        let (a, b) = (self.tensor::<f32>(op.inputs[0]), self.tensor::<f32>(op.inputs[1]));
        let y = self.tensor::<f32>(op.outputs[0]);
        self.each(y.rows(), y.n2, |row| {
            // SAFETY: each row belongs to one thread.
            let y = unsafe { y.flat_mut(row) };
            y.iter_mut().zip(a.flat(row)).zip(b.flat(row)).for_each(|((y, a), b)| *y = a + b);
        });
    }

    pub(super) fn gather_rows(&self, op: &SpdOp) {
        let (x, y) = (self.tensor::<f32>(op.inputs[0]), self.tensor::<f32>(op.outputs[0]));
        for (to, &from) in self.step.rows.iter().enumerate() {
            for i in 0..y.n1 {
                // SAFETY: one thread writes.
                unsafe { y.row_mut(to, i) }.copy_from_slice(x.row(from as usize, i));
            }
        }
    }
}
