//! What does a process of its own cost a plugin? Prints the rows of `RESULTS.md`, "Plugin host".
//!
//! cargo run --release -p sparsed-tests --example host -- MODEL...
#![allow(clippy::unwrap_used, clippy::print_stdout, missing_docs, reason = "a measurement")]

use rustix::process::{Pid, Signal, kill_process};
use sparsed_backend::{Backend, Found, HostOptions, OpenOptions, Plugin, SearchPath};
use sparsed_engine::{DeviceModel, LoadOptions, Lockstep, Rows};
use sparsed_kv::blocks_for;
use sparsed_model::{Model, ProgramOptions};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Steps of one side before the other's turn.
const TURN: usize = 200;
/// Turns of each side.
const TURNS: usize = 6;
/// Tokens in the cache.
const DEPTH: u32 = 32;
/// Starts and ends that are timed.
const STARTS: usize = 60;
const KILLS: usize = 15;

fn main() {
    let mut starts: Vec<Duration> = (0..STARTS).map(|_| timed(|| drop(open(true)))).collect();
    println!("start, load, negotiate, open, close: {}", quantiles(&mut starts));
    let mut starts: Vec<Duration> = (0..STARTS).map(|_| timed(|| drop(open(false)))).collect();
    println!("the same in the process: {}", quantiles(&mut starts));
    let mut sums: Vec<Duration> = (0..STARTS).map(|_| timed(|| found().verify().unwrap())).collect();
    println!("of it the manifest, the ELF headers and sha256: {}", quantiles(&mut sums));
    for model in std::env::args().skip(1) {
        let model = Model::open(Path::new(&model)).unwrap();
        overhead(&model);
        let mut kills: Vec<Duration> = (0..KILLS).map(|_| notice(&model)).collect();
        println!("{}: SIGKILL during steps to the error: {}", model.name(), quantiles(&mut kills));
    }
}

fn release() -> PathBuf {
    sparsed_tests::root().join("target/release")
}

fn found() -> Found {
    SearchPath::only(vec![release().join("plugins")]).scan().select(Some("cpu")).unwrap().clone()
}

fn open(isolated: bool) -> (Arc<Plugin>, Backend) {
    let options = HostOptions { program: release().join("sparsed"), ..HostOptions::default() };
    let plugin = match isolated {
        true => Plugin::load_isolated(&found(), &BTreeMap::new(), &options).unwrap(),
        false => Plugin::load(&found(), &BTreeMap::new()).unwrap(),
    };
    // One thread: on a busy machine several would wait for each other, not for the host.
    let backend = Backend::open(&plugin, 0, &OpenOptions { n_threads: 1, ..OpenOptions::default() }).unwrap();
    (plugin, backend)
}

fn load(backend: &Backend, model: &Model) -> DeviceModel {
    let options = LoadOptions {
        program: ProgramOptions::default(),
        max_context: 2 * DEPTH,
        max_step_tokens: DEPTH,
        max_seqs: 1,
        max_logits: 1,
        n_blocks: blocks_for(2 * DEPTH),
        n_fast: blocks_for(2 * DEPTH),
        slow_cache_bytes: 0,
    };
    DeviceModel::load(backend, model, options, &mut |_, _| {}).unwrap()
}

/// Decode steps at one depth, the two sides by turns.
fn overhead(model: &Model) {
    let backends = [open(false), open(true)];
    let mut sides: Vec<_> = backends.iter().map(|(_, backend)| Side::new(load(backend, model))).collect();
    for _ in 0..TURNS {
        sides.iter_mut().for_each(Side::turn);
    }
    let [own, isolated] = &mut sides[..] else { unreachable!("two sides") };
    let name = model.name();
    println!("{name}: step in the process: {}", quantiles(&mut own.times));
    println!("{name}: step in a host: {}", quantiles(&mut isolated.times));
    let difference = |q: usize| micros(isolated.times[q]) - micros(own.times[q]);
    println!("{name}: difference of the medians: {:.1} us", difference(own.times.len() / 2));
}

struct Side {
    device: DeviceModel,
    sequence: Lockstep,
    times: Vec<Duration>,
}

impl Side {
    fn new(mut device: DeviceModel) -> Self {
        let mut sequence = Lockstep::new(&device, 1);
        sequence.step(&mut device, &[1; DEPTH as usize], Rows::Last).unwrap();
        Self { device, sequence, times: Vec::new() }
    }

    fn turn(&mut self) {
        for i in 0..TURN {
            let took = timed(|| drop(self.sequence.step(&mut self.device, &[2], Rows::Last).unwrap()));
            self.sequence.truncate(DEPTH);
            // The first ones wake what has slept during the other side's turn.
            if i >= TURN / 4 {
                self.times.push(took);
            }
        }
    }
}

/// From SIGKILL of a host that computes to the failure of its step.
fn notice(model: &Model) -> Duration {
    let (plugin, backend) = open(true);
    let mut side = Side::new(load(&backend, model));
    let pid = plugin.host_process().unwrap();
    let steps = std::thread::spawn(move || {
        while side.sequence.step(&mut side.device, &[2], Rows::Last).is_ok() {
            side.sequence.truncate(DEPTH);
        }
        Instant::now()
    });
    let pid = Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    let killed = Instant::now();
    kill_process(pid, Signal::KILL).unwrap();
    steps.join().unwrap().saturating_duration_since(killed)
}

fn timed(run: impl FnOnce()) -> Duration {
    let began = Instant::now();
    run();
    began.elapsed()
}

fn micros(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

/// Sorts, and tells the median and its neighbours.
fn quantiles(times: &mut [Duration]) -> String {
    times.sort_unstable();
    let at = |permille: usize| micros(times[(times.len() - 1) * permille / 1000]);
    format!("p50 {:.1} us, p10 {:.1}, p90 {:.1}, n = {}", at(500), at(100), at(900), times.len())
}
