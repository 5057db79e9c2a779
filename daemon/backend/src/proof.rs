//! Does a plugin compute here? Asked before anybody relies on it: of the files first, then of the plugin itself, in a
//! process of its own.

use crate::remote::{HostOptions, matching_devices};
use crate::{Backend, BackendError, DeviceInfo, Found, OpenOptions, Plugin};
use sparsed_abi::{
    Blob, DIM_TOKENS, DT_F32, DT_I32, DT_Q8_0, OP_IDX_APPEND, OP_IDX_TOPK, OP_KV_APPEND, OP_LAYER_NORM, OP_LINEAR,
    OP_ROPE, OP_SILU_MUL, OP_SPARSE_MLA, OpSpec, ProgramBuilder, TensorId,
};
use std::collections::BTreeMap;

/// Values of a row of the program below: whole blocks of every format.
const WIDTH: i32 = 256;
/// Tokens that it selects.
const TOP_K: i32 = 16;

impl Found {
    /// Whether a device node that it works with is there; one that names none has none.
    pub fn sees_device(&self) -> bool {
        self.manifest.devices.iter().flat_map(|pattern| matching_devices(pattern)).any(|node| node.exists())
    }

    /// Has device `index` prove in a process of its own that it computes: it opens, passes its test, and has what a
    /// model with sparse attention is made of. Each call has the time of `host`.
    ///
    /// # Errors
    /// What it lacks, or how its process failed.
    pub fn prove(
        &self,
        settings: &BTreeMap<String, String>,
        index: u32,
        options: &OpenOptions,
        host: &HostOptions,
    ) -> Result<DeviceInfo, BackendError> {
        let plugin = Plugin::load_isolated(self, settings, host)?;
        let device = Backend::open(&plugin, index, options)?;
        if device.info().score == 0 {
            let reason = "its device says that it cannot run here".to_owned();
            return Err(BackendError::Refused { plugin: self.manifest.id.clone(), reason });
        }
        device.self_test(0)?;
        let (program, n_ops) = step_of_a_model();
        (0..n_ops).try_for_each(|op| device.supports(&program, op))?;
        Ok(device.info().clone())
    }
}

/// A step with one operator of each kind that tells a backend from the beginning of one, and how many they are. It is
/// compiled by nobody.
fn step_of_a_model() -> (Blob, u32) {
    let mut program = ProgramBuilder::new();
    let [x, angles, w] = [WIDTH, WIDTH, 1].map(|width| program.input(DT_F32, &[DIM_TOKENS, width]));
    let [heads, rotated_heads] = [(); 2].map(|()| program.input(DT_F32, &[DIM_TOKENS, 1, WIDTH]));
    let matrix = program.weight(0, DT_Q8_0, &[WIDTH, WIDTH]);
    let [gain, bias] = [1, 2].map(|slot| program.weight(slot, DT_F32, &[WIDTH]));
    let [product, gated, key, rotated] = [(); 4].map(|()| program.activation(DT_F32, &[DIM_TOKENS, WIDTH]));
    let selected = program.activation(DT_I32, &[DIM_TOKENS, TOP_K]);
    let attended = program.activation(DT_F32, &[DIM_TOKENS, 1, WIDTH]);
    let mut n_ops = 0;
    let mut op = |kind: u32, inputs: &[TensorId], outputs: &[TensorId], i: [i32; 6], f: f32| {
        let [inputs, outputs] = [inputs, outputs].map(|ids| ids.iter().copied().map(Some).collect::<Vec<_>>());
        program.op(OpSpec { kind, inputs: &inputs, outputs: &outputs, layer: 0, i, f: [f, 0.0, 0.0, 0.0] });
        n_ops += 1;
    };
    op(OP_LINEAR, &[x, matrix], &[product], [0; 6], 0.0);
    op(OP_SILU_MUL, &[product, x], &[gated], [0; 6], 0.0);
    op(OP_LAYER_NORM, &[x, gain, bias], &[key], [0; 6], 1e-5);
    op(OP_ROPE, &[x, angles], &[rotated], [0, WIDTH, 0, 0, 0, 0], 0.0);
    op(OP_KV_APPEND, &[gated, rotated], &[], [0; 6], 0.0);
    op(OP_IDX_APPEND, &[key], &[], [0; 6], 0.0);
    op(OP_IDX_TOPK, &[heads, w], &[selected], [TOP_K, 0, 0, 0, 0, 0], 1.0);
    op(OP_SPARSE_MLA, &[heads, rotated_heads, selected], &[attended], [1, 0, 0, 0, 0, 0], 1.0);
    program.mark_output(attended);
    (program.finish(1), n_ops)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::Fixture;
    use sparsed_abi::Program;

    #[test]
    fn what_is_asked_about_is_a_program() {
        let (blob, n_ops) = step_of_a_model();
        let program = Program::parse(blob.as_bytes()).unwrap();
        assert_eq!((program.ops().len(), program.header().n_kvpools), (n_ops as usize, 1));
    }

    #[test]
    fn a_plugin_sees_a_device_where_a_node_that_it_names_is_there() {
        let sees = |devices: &str| {
            let fixture = Fixture::empty("a");
            fixture.write_manifest("1", "");
            let path = fixture.dir().join("plugin.toml");
            let text = std::fs::read_to_string(&path).unwrap();
            std::fs::write(&path, format!("devices = [{devices}]\n{text}")).unwrap();
            fixture.scan().select(Some("a")).unwrap().sees_device()
        };
        assert!(sees("\"/dev/no-such-node\", \"/dev/nul*\""));
        assert!(!sees("\"/dev/no-such-node\", \"/dev/no-such*\"") && !sees(""));
    }
}
