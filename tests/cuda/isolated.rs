//! The plugin in a process of its own, as the daemon runs every accelerator: an asynchronous client behind the host.

use crate::loading::stage;
use crate::queues::Model;
use crate::reference::{Step, assert_close, bytes, singles};
use crate::rig::{BUCKET, built};
use fastrand::Rng;
use sparsed_abi::{DT_F16, E_CANCELLED, E_DEVICE_LOST, KV_EXPORT, KV_IMPORT, SpdKvOp, SpdRow};
use sparsed_backend::{
    Backend, BackendError, HostOptions, KvDesc, OpenOptions, Plan, Plugin, Queue, SearchPath, Weight, WeightUpload,
};
use std::collections::BTreeMap;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;

/// A plugin host with the plugin, its fake driver and the model of `queues.rs` on it.
struct Isolated {
    queue: Queue,
    plan: Plan,
    _weights: Vec<Weight>,
    backend: Backend,
    plugin: Arc<Plugin>,
    dir: tempfile::TempDir,
}

impl Isolated {
    fn open(model: &Model) -> Self {
        let dir = tempfile::tempdir().unwrap();
        stage(dir.path());
        // In the plugin's own folder, since a host reads nothing else of the files of its user.
        std::fs::copy(built("libsparsed_fake_cuda.so"), dir.path().join("cuda/libcuda.so.1")).unwrap();
        Self::load(model, dir)
    }

    fn load(model: &Model, dir: tempfile::TempDir) -> Self {
        let options = HostOptions { program: built("sparsed"), ..HostOptions::default() };
        let lib_dir = dir.path().join("cuda").to_str().unwrap().to_owned();
        let settings = BTreeMap::from([("lib_dir".to_owned(), lib_dir)]);
        let scan = SearchPath::only(vec![dir.path().to_owned()]).scan();
        let plugin = Plugin::load_isolated(scan.select(Some("cuda")).unwrap(), &settings, &options).unwrap();
        let backend = Backend::open(&plugin, 0, &OpenOptions::default()).unwrap();
        let upload = |(dtype, rows, cols, bytes): &(u32, u64, u64, Vec<u8>)| WeightUpload {
            name: "weight".to_owned(),
            dtype: *dtype,
            batch: 1,
            rows: *rows,
            cols: *cols,
            bytes: bytes.clone().into(),
            file: None,
        };
        let weights: Vec<_> = model.data.iter().map(|data| backend.upload(&upload(data)).unwrap()).collect();
        let plan = backend.compile(&Model::blob(), &weights.iter().collect::<Vec<_>>(), &[], BUCKET).unwrap();
        Self { queue: backend.queue().unwrap(), plan, _weights: weights, backend, plugin, dir }
    }

    /// A random step; its logits are right, or the call fails.
    fn step(
        &mut self,
        model: &Model,
        random: &mut Rng,
        cancel: Option<&AtomicU32>,
        what: &str,
    ) -> Result<(), BackendError> {
        let step = Step::random(random, Model::VOCABULARY);
        let input = singles(random, step.tokens.len() * Model::WIDTH);
        let expected = model.logits(&step, &input);
        let mut output = vec![0; expected.len() * size_of::<f32>()];
        self.queue.run_cancellable(&self.plan, &step.arrays().encode(), &bytes(&input), &mut output, cancel)?;
        let found: Vec<f32> = output.as_chunks().0.iter().map(|&value| f32::from_le_bytes(value)).collect();
        assert_close(&found, &expected, what);
        Ok(())
    }
}

#[test]
fn a_host_computes_what_the_operators_say_and_a_new_one_does_after_a_sigkill() {
    let mut random = Rng::with_seed(21);
    let model = Model::new(&mut random);
    let mut isolated = Isolated::open(&model);
    for i in 0..50 {
        isolated.step(&model, &mut random, None, &format!("step {i}")).unwrap();
    }
    let refused = isolated.step(&model, &mut random, Some(&AtomicU32::new(1)), "a cancelled step").unwrap_err();
    assert_eq!(refused.status(), Some(E_CANCELLED), "{refused}");
    isolated.step(&model, &mut random, None, "the step after").unwrap();

    let pid = isolated.plugin.host_process().unwrap().to_string();
    assert!(Command::new("kill").args(["-KILL", &pid]).status().unwrap().success());
    let lost = isolated.step(&model, &mut random, None, "a step of a dead host").unwrap_err();
    assert_eq!(lost.status(), Some(E_DEVICE_LOST), "{lost}");
    let Isolated { dir, .. } = isolated;
    let mut again = Isolated::load(&model, dir);
    again.step(&model, &mut random, None, "the step of a new host").unwrap();
}

#[test]
fn blocks_of_a_pool_go_through_a_host_as_they_are() {
    let mut random = Rng::with_seed(22);
    let mut isolated = Isolated::open(&Model::new(&mut random));
    let row = |width| SpdRow { dtype: DT_F16, width };
    let desc = KvDesc {
        block_tokens: 16,
        n_blocks: 3,
        n_layers: 2,
        n_index_layers: 1,
        latent: row(8),
        rope: row(4),
        index: row(4),
    };
    let pool = isolated.backend.create_kv(&desc, None).unwrap();
    let image = usize::try_from(pool.info().image_bytes).unwrap();
    // Small numbers in f16, none of them a NaN.
    let filled: Vec<u8> = (0..image).map(|i| if i % 2 == 0 { random.u8(..) } else { 0x3c }).collect();
    let op = |kind, block, host_offset| SpdKvOp {
        kind,
        src_block: block,
        dst_block: block,
        n_tokens: 16,
        host_offset,
        ..SpdKvOp::default()
    };
    isolated.queue.kv(&pool, &[op(KV_IMPORT, 2, 0)], &mut filled.clone()).unwrap();
    let mut host = vec![0xee; image + 64];
    isolated.queue.kv(&pool, &[op(KV_EXPORT, 2, 64)], &mut host).unwrap();
    assert_eq!((&host[..64], &host[64..]), (&[0xee; 64][..], &filled[..]));
}
