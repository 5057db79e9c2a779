//! `sparsectl bench`: how fast does a model run here? In the manner of llama-bench.
//!
//! For each number of sequences and each depth the cache is filled to it once; then each prompt length is read and the
//! decode steps are run from there, repeated, and cut off again. Sequences go in one step, and a time per token is that
//! of a step by the tokens of all of them. Times are wall times of the median repetition, and CPU times of the process
//! in that of the median CPU time: on a machine with other work the second is the one to compare.
//!
//! Reading some ten thousand tokens only to measure behind them takes minutes, so all but the first [`READ_TOKENS`] of
//! a depth are synthetic: copies of the rows of those. The work is the same; what the model says there means nothing.

use super::local::{Local, LocalOutputs, Needs};
use anyhow::ensure;
use serde_json::{Value, json};
use sparsed_engine::{DeviceModel, Lockstep, Rows};
use std::time::{Duration, Instant};

/// Tokens of one prefill step.
const CHUNK: u32 = 256;
/// Most tokens that are read to fill the cache; whole blocks and whole chunks.
const READ_TOKENS: u32 = 1024;
/// Largest of any number of tokens.
const TOKENS_MAX: u32 = 1 << 22;
/// Most sequences of a step: each has a token in it at least.
const SEQUENCES_MAX: i64 = 128;

/// Measure prefill and decode speed.
#[derive(Debug, clap::Args)]
pub(super) struct Bench {
    #[command(flatten)]
    local: Local,
    /// Prompt lengths to read.
    #[arg(short = 'p', long = "prompt", value_delimiter = ',', default_value = "512")]
    prompts: Vec<u32>,
    /// Tokens to generate; 0: none.
    #[arg(short = 'n', long = "generate", default_value_t = 128)]
    generate: u32,
    /// Tokens that are in the cache before; those past 1024 are copies of the first.
    #[arg(short = 'd', long = "depth", value_delimiter = ',', default_value = "0")]
    depths: Vec<u32>,
    /// Sequences in one step; prompts and depths are of each.
    #[arg(short = 's', long, value_delimiter = ',', default_value = "1",
        value_parser = clap::value_parser!(u32).range(1..=SEQUENCES_MAX))]
    sequences: Vec<u32>,
    /// Attention reads everything, as with --top-k 0.
    #[arg(long, conflicts_with = "top_k")]
    dense: bool,
    /// Repetitions; the median is told.
    #[arg(short = 'r', long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    repetitions: u32,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// One line of the result.
#[derive(Debug)]
struct Row {
    kind: &'static str,
    n: u32,
    depth: u32,
    sequences: u32,
    took: Took,
}

/// What a repetition took.
#[derive(Clone, Copy, Debug)]
struct Took {
    wall: Duration,
    /// Of all threads of this process.
    cpu: Duration,
}

impl Bench {
    pub(super) fn run(mut self) -> anyhow::Result<()> {
        let longest = self.prompts.iter().copied().max().unwrap_or(0).max(self.generate);
        let deepest = self.depths.iter().copied().max().unwrap_or(0);
        ensure!(longest > 0, "nothing to measure: give -p or -n");
        ensure!(longest <= TOKENS_MAX && deepest <= TOKENS_MAX, "at most {TOKENS_MAX} tokens can be asked for");
        if self.dense {
            self.local.select_all();
        }
        let began = Instant::now();
        let (model, backend) = self.local.open()?;
        let needs = Needs {
            context: deepest + longest,
            step_tokens: CHUNK,
            sequences: self.sequences.iter().copied().max().unwrap_or(1),
            outputs: LocalOutputs::LastRow,
        };
        let mut device = self.local.load(&model, &backend, needs)?;
        let load = began.elapsed();
        let vocab = model.spec().vocab_size;
        let rows = self.measure(&mut device, vocab)?;
        let result = json!({
            "model": model.name(),
            "file_bytes": model.file_bytes(),
            "top_k": device.top_k(),
            "depth_synthetic_from": READ_TOKENS,
            "load_ms": load.as_secs_f64() * 1e3,
            "kv_bytes_per_token": device.kv_bytes_per_token()?,
            "peak_rss_bytes": peak_rss_bytes(),
            "results": rows.iter().map(|row| row.json(self.threads())).collect::<Vec<_>>(),
        });
        if self.json { super::print_json(&result) } else { super::print(&table(&result)) }
    }

    /// Threads asked for, or else what a plugin has by itself: one for each processor it may use.
    fn threads(&self) -> u32 {
        let available = || std::thread::available_parallelism().map_or(1, |n| u32::try_from(n.get()).unwrap_or(1));
        if self.local.device.threads() > 0 { self.local.device.threads() } else { available() }
    }

    fn measure(&self, device: &mut DeviceModel, vocab: u32) -> anyhow::Result<Vec<Row>> {
        let mut rows = Vec::new();
        let mut depths = self.depths.clone();
        depths.sort_unstable();
        for &sequences in &self.sequences {
            let mut lockstep = Lockstep::new(device, sequences as usize);
            for &depth in &depths {
                fill(device, &mut lockstep, depth, vocab)?;
                let decoded = (self.generate > 0).then_some(("decode", self.generate));
                let prompts = self.prompts.iter().filter(|&&n| n > 0).map(|&n| ("prefill", n));
                for (kind, n) in prompts.chain(decoded) {
                    let at_once = if kind == "decode" { 1 } else { CHUNK / sequences };
                    let took = self.median(|| {
                        let took = timed(|| append(device, &mut lockstep, n, at_once, vocab));
                        lockstep.truncate(depth);
                        took
                    })?;
                    rows.push(Row { kind, n, depth, sequences, took });
                }
            }
        }
        Ok(rows)
    }

    /// The median times of the repetitions, after one that does not count.
    fn median(&self, mut run: impl FnMut() -> anyhow::Result<Took>) -> anyhow::Result<Took> {
        run()?;
        let times = (0..self.repetitions).map(|_| run()).collect::<Result<Vec<_>, _>>()?;
        let middle = |part: fn(&Took) -> Duration| {
            let mut times: Vec<Duration> = times.iter().map(part).collect();
            times.sort_unstable();
            times[times.len() / 2]
        };
        Ok(Took { wall: middle(|took| took.wall), cpu: middle(|took| took.cpu) })
    }
}

impl Row {
    fn json(&self, threads: u32) -> Value {
        let tokens = f64::from(self.n) * f64::from(self.sequences);
        let per_token = |took: Duration| took.as_secs_f64() * 1e3 / tokens;
        let ms = per_token(self.took.wall);
        json!({
            "kind": self.kind,
            "n": self.n,
            "depth": self.depth,
            "sequences": self.sequences,
            "threads": threads,
            "tokens_per_second": 1e3 / ms,
            "ms_per_token": ms,
            "cpu_ms_per_token": per_token(self.took.cpu),
        })
    }
}

/// Brings the cache to `depth` tokens.
fn fill(device: &mut DeviceModel, lockstep: &mut Lockstep, depth: u32, vocab: u32) -> anyhow::Result<()> {
    lockstep.truncate(lockstep.n_tokens().min(READ_TOKENS));
    append(device, lockstep, depth.min(READ_TOKENS) - lockstep.n_tokens(), CHUNK / sequences(lockstep), vocab)?;
    if depth > READ_TOKENS {
        lockstep.repeat(device, depth - READ_TOKENS)?;
    }
    Ok(())
}

/// Appends `n` tokens to each sequence, `at_once` in a step.
fn append(device: &mut DeviceModel, lockstep: &mut Lockstep, n: u32, at_once: u32, vocab: u32) -> anyhow::Result<()> {
    let end = lockstep.n_tokens() + n;
    while lockstep.n_tokens() < end {
        let now = lockstep.n_tokens()..end.min(lockstep.n_tokens() + at_once);
        let of = |sequence: u32| now.clone().map(move |position| token(sequence, position, vocab));
        let tokens: Vec<u32> = (0..sequences(lockstep)).flat_map(of).collect();
        lockstep.step(device, &tokens, Rows::Last)?;
    }
    Ok(())
}

/// At most [`SEQUENCES_MAX`].
fn sequences(lockstep: &Lockstep) -> u32 {
    u32::try_from(lockstep.n_sequences()).unwrap_or(u32::MAX)
}

fn timed(run: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<Took> {
    let (began, cpu) = (Instant::now(), cpu_time());
    run()?;
    Ok(Took { wall: began.elapsed(), cpu: cpu_time().saturating_sub(cpu) })
}

/// The CPU time of this process so far.
fn cpu_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::try_from(time).unwrap_or_default()
}

/// A token that looks like any other, and is another one in each sequence, so that they ask other experts.
fn token(sequence: u32, position: u32, vocab: u32) -> u32 {
    (position.wrapping_mul(2_654_435_761) ^ sequence.wrapping_mul(0x9e37_79b1)) % vocab
}

/// The process's largest resident memory so far; 0 where the kernel does not say.
fn peak_rss_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}

fn table(result: &Value) -> String {
    let bytes = |key: &str| result[key].as_u64().unwrap_or(0);
    let mut text = format!(
        "{}: {} MB, {} KV bytes per token, loaded in {:.0} ms, peak memory {} MB\n\
         {:<8} {:>9} {:>8} {:>8} {:>12} {:>12} {:>12}\n",
        result["model"].as_str().unwrap_or_default(),
        bytes("file_bytes") / 1_000_000,
        bytes("kv_bytes_per_token"),
        result["load_ms"].as_f64().unwrap_or(0.0),
        bytes("peak_rss_bytes") / 1_000_000,
        "TEST",
        "SEQUENCES",
        "TOKENS",
        "DEPTH",
        "TOKENS/S",
        "MS/TOKEN",
        "CPU MS",
    );
    for row in result["results"].as_array().into_iter().flatten() {
        let number = |key: &str| row[key].as_f64().unwrap_or(0.0);
        text += &format!(
            "{:<8} {:>9} {:>8} {:>8} {:>12.1} {:>12.3} {:>12.3}\n",
            row["kind"].as_str().unwrap_or_default(),
            row["sequences"].to_string(),
            row["n"].to_string(),
            row["depth"].to_string(),
            number("tokens_per_second"),
            number("ms_per_token"),
            number("cpu_ms_per_token"),
        );
    }
    text.trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_follow_from_times() {
        let took = Took { wall: Duration::from_millis(50), cpu: Duration::from_millis(80) };
        let row = Row { kind: "decode", n: 10, depth: 5, sequences: 2, took }.json(2);
        assert_eq!((row["ms_per_token"].as_f64(), row["tokens_per_second"].as_f64()), (Some(2.5), Some(400.0)));
        assert_eq!(row["cpu_ms_per_token"].as_f64(), Some(4.0));
        assert_eq!(
            (row["kind"].as_str(), row["depth"].as_u64(), row["threads"].as_u64()),
            (Some("decode"), Some(5), Some(2))
        );
    }

    #[test]
    fn this_process_has_used_memory() {
        assert!(peak_rss_bytes() > 1 << 20);
    }
}
