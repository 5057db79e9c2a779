//! The daemon's loader takes the staged plugin, and its types drive it.

use crate::rig::{built, driver_folder};
use sparsed_abi::{DIM_TOKENS, DT_F16, DT_F32, DT_Q8_0, E_DRIVER, OP_ADD, OpSpec, SpdBucket, StepArrays};
use sparsed_backend::{Backend, DeviceKind, OpenOptions, Plugin, SearchPath};
use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

/// Stages the plugin into `dir` as an operator would.
pub fn stage(dir: &Path) {
    let staged = Command::new("sh")
        .current_dir(sparsed_tests::root())
        .args(["packaging/stage-plugin.sh", "cuda"])
        .args([&built("libsparsed_plugin_cuda.so"), Path::new("plugins/cuda/plugin.toml.in"), dir])
        .output()
        .unwrap();
    assert!(staged.status.success(), "{}", String::from_utf8_lossy(&staged.stderr));
}

/// Stages the plugin and loads it.
fn load(dir: &Path, lib_dir: &Path) -> Arc<Plugin> {
    stage(dir);
    let settings = BTreeMap::from([("lib_dir".to_owned(), lib_dir.to_str().unwrap().to_owned())]);
    let scan = SearchPath::only(vec![dir.to_owned()]).scan();
    Plugin::load(scan.select(Some("cuda")).unwrap(), &settings).unwrap()
}

#[test]
fn the_daemon_loads_the_plugin_and_runs_a_step() {
    let (dir, driver) = (tempfile::tempdir().unwrap(), driver_folder());
    let backend = Backend::open(&load(dir.path(), driver.path()), 0, &OpenOptions::default()).unwrap();
    let info = backend.info();
    assert_eq!((info.kind, &*info.id, &*info.driver), (DeviceKind::Gpu, "0000:01:00.0", "CUDA 12.6"));
    assert!(info.takes_weights(DT_F16) && !info.takes_weights(DT_Q8_0) && !info.is_invariant());
    let blob = crate::rig::program(|b| {
        let (x, y) = (b.input(DT_F32, &[DIM_TOKENS, 2]), b.activation(DT_F32, &[DIM_TOKENS, 2]));
        b.op(OpSpec { kind: OP_ADD, inputs: &[Some(x), Some(x)], outputs: &[Some(y)], ..OpSpec::default() });
        b.mark_output(y);
    });
    let bucket = SpdBucket { max_tokens: 1, max_seqs: 1, max_logits: 1, max_context: 1 };
    let plan = backend.compile(&blob, &[], &[], bucket).unwrap();
    let step = StepArrays {
        tokens: &[0],
        positions: &[0],
        slots: &[0],
        seq_offsets: &[0, 1],
        contexts: &[1],
        block_offsets: &[0, 1],
        block_ids: &[0],
        ..StepArrays::default()
    };
    let input: Vec<u8> = [1.5f32, -2.0].iter().flat_map(|v| v.to_le_bytes()).collect();
    let mut output = vec![0; 8];
    backend.queue().unwrap().run(&plan, &step.encode(), &input, &mut output).unwrap();
    assert_eq!(output, [3.0f32, -4.0].map(f32::to_le_bytes).concat());
}

#[test]
fn the_daemon_hears_why_a_box_has_no_device() {
    let dir = tempfile::tempdir().unwrap();
    let error = load(dir.path(), Path::new("/nonexistent")).device_count().unwrap_err();
    assert_eq!(error.status(), Some(E_DRIVER));
    assert!(error.to_string().contains("/nonexistent/libcuda.so.1 cannot be loaded"), "{error}");
    assert!(error.to_string().contains("No such file or directory"), "the dynamic linker's reason: {error}");
}

#[test]
fn the_conformance_kit_finds_no_broken_rule_and_tries_every_operator_of_the_slice() {
    let dir = tempfile::tempdir().unwrap();
    stage(dir.path());
    // In the plugin's own folder: a rule tries it in the confinement of its host.
    std::fs::copy(built("libsparsed_fake_cuda.so"), dir.path().join("cuda/libcuda.so.1")).unwrap();
    let tried = Command::new(sparsed_tests::sparsectl())
        .arg("conform")
        .arg(dir.path().join("cuda"))
        .env("SPARSED_CUDA_LIB_DIR", dir.path().join("cuda"))
        .output()
        .unwrap();
    let report = String::from_utf8(tried.stdout).unwrap();
    assert!(tried.status.success(), "{report}{}", String::from_utf8_lossy(&tried.stderr));
    for rule in [
        "op.embed.golden",
        "op.rms_norm.golden",
        "op.linear.golden",
        "op.add.golden",
        "op.gather_rows.golden",
        "op.views",
        "kv.create",
        "queue.timeline",
        "mem.budget",
        "mem.counted",
        "run.nan_guard",
        "life.confined",
    ] {
        let line = report.lines().find(|line| line.contains(&format!(" - {rule}"))).unwrap_or_default();
        assert!(line.starts_with("ok") && !line.contains("SKIP"), "{rule}: {line}");
    }
}
