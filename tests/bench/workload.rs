//! How often does a row cache have what attention asks for? Reads what `selections.rs` has written and prints the
//! tables of `daemon/kv/WORKLOAD.md`.
//!
//! cargo run --release -p sparsed-tests --example workload -- N_FAST FILE.npy...
//!
//! The cache is shared by all layers, as in the plugins, and its replacement is the plugins' own code. A row that comes
//! into being while the log runs is not counted, nor are those of the `N_FAST` tokens before it: they lie in fast
//! memory. The first quarter of each log warms the cache.
#![allow(clippy::unwrap_used, clippy::print_stdout, missing_docs, reason = "a measurement")]
#![allow(clippy::cast_precision_loss, reason = "counts")]

use sparsed_rowcache::{Policy, Replacement};
use std::collections::{BTreeSet, HashSet};
use std::path::{Path, PathBuf};

/// Slots of the cache, in rows of one step in all layers: `k * n_layers`.
const SIZES: [f64; 9] = [0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0];

/// Rows of a page of the slow tier, and tokens of a block: the default model's in f16.
const PAGE_ROWS: usize = 5;
const BLOCK_TOKENS: usize = 64;

/// The selections of one text.
struct Log {
    n_steps: usize,
    n_layers: usize,
    k: usize,
    /// `[n_steps, n_layers, k]`, ascending.
    positions: Vec<u16>,
    /// Tokens whose rows may lie in the slow tier.
    n_before: u16,
}

fn main() {
    let mut args = std::env::args().skip(1);
    let n_fast = args.next().unwrap().parse().unwrap();
    let paths: Vec<PathBuf> = args.map(PathBuf::from).collect();
    let logs: Vec<Log> = paths.iter().map(|path| Log::read(path, n_fast)).collect();
    print_overlap(&paths, &logs);
    print_hit_rates(&logs);
    print_guesses(&logs);
}

fn print_overlap(paths: &[PathBuf], logs: &[Log]) {
    println!("| log | layers | k | steps overlap | layers overlap | rows touched |\n|---|---|---|---|---|---|");
    for (path, log) in paths.iter().zip(logs) {
        let name = path.file_stem().unwrap().display();
        let (steps, layers) = (log.overlap_of_steps(), log.overlap_of_layers());
        println!(
            "| {name} | {} | {} | {:.1} % ({:.1} to {:.1}) | {:.1} % | {:.2} k of {:.1} k |",
            log.n_layers,
            log.k,
            100.0 * mean(&steps),
            100.0 * steps.iter().copied().fold(1.0, f64::min),
            100.0 * steps.iter().copied().fold(0.0, f64::max),
            100.0 * layers,
            log.touched(),
            f64::from(log.n_before) / log.k as f64,
        );
    }
}

fn print_hit_rates(logs: &[Log]) {
    println!("\n| slots | CLOCK | frequency | LRU | random | optimal | with CLOCK misses a step | reads |");
    println!("|---|---|---|---|---|---|---|---|");
    for size in SIZES {
        let by = |choice: fn(usize) -> Choice| logs.iter().map(|log| log.replay(choice, size)).collect::<Vec<_>>();
        let rates = |replays: &[Replay]| range(&replays.iter().map(|replay| replay.rate).collect::<Vec<_>>(), 1);
        let clock = by(|n| Choice::Plugins(Replacement::new(Policy::Clock, n)));
        println!(
            "| {size} | {} | {} | {} | {} | {} | {} | {} |",
            rates(&clock),
            rates(&by(|n| Choice::Plugins(Replacement::new(Policy::Frequency, n)))),
            rates(&by(|n| Choice::Plugins(Replacement::new(Policy::Lru, n)))),
            rates(&by(|n| Choice::Random(fastrand::Rng::with_seed(1), n))),
            range(&logs.iter().map(|log| log.optimal(size)).collect::<Vec<_>>(), 1),
            range(&clock.iter().map(|replay| replay.misses).collect::<Vec<_>>(), 0),
            range(&clock.iter().map(|replay| replay.reads).collect::<Vec<_>>(), 0),
        );
    }
}

fn print_guesses(logs: &[Log]) {
    println!(
        "\n| cached steps | misses a step | rows that only the layer before has selected | of them selected here |"
    );
    println!("|---|---|---|---|");
    for cached in 1..=3 {
        let all: Vec<[f64; 3]> = logs.iter().map(|log| log.guesses(cached)).collect();
        let of = |at: usize| range(&all.iter().map(|guesses| guesses[at]).collect::<Vec<_>>(), 0);
        println!("| {cached} | {} | {} | {} |", of(0), of(1), of(2));
    }
}

/// Mean, lowest and highest.
fn range(values: &[f64], decimals: usize) -> String {
    let (low, high) = values.iter().fold((f64::MAX, f64::MIN), |(low, high), &value| (low.min(value), high.max(value)));
    format!("{:.decimals$} ({low:.decimals$} to {high:.decimals$})", mean(values))
}

/// What became of the steps of a log.
struct Replay {
    /// Percent.
    rate: f64,
    /// Of a step.
    misses: f64,
    /// Of a step: pages that lie side by side are one.
    reads: f64,
}

/// Which slot is given up.
enum Choice {
    /// The plugins' own.
    Plugins(Replacement),
    /// Any, of so many.
    Random(fastrand::Rng, usize),
}

impl Choice {
    fn hit(&mut self, slot: usize) {
        match self {
            Self::Plugins(replacement) => replacement.hit(slot),
            Self::Random(..) => {}
        }
    }

    fn filled(&mut self, slot: usize) {
        match self {
            Self::Plugins(replacement) => replacement.filled(slot),
            Self::Random(..) => {}
        }
    }

    fn victim(&mut self, may_go: impl Fn(usize) -> bool) -> Option<usize> {
        match self {
            Self::Plugins(replacement) => replacement.victim(may_go),
            Self::Random(rng, n_slots) => std::iter::repeat_with(|| rng.usize(..*n_slots)).find(|&slot| may_go(slot)),
        }
    }
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

impl Log {
    fn read(path: &Path, n_fast: u16) -> Self {
        let (shape, positions) = sparsed_tests::npy::<u16>(path);
        let [n_steps, n_layers, k] = shape[..] else { panic!("{} has {} axes", path.display(), shape.len()) };
        // The last step's own token is the newest there is.
        let last = *positions.iter().max().unwrap();
        let [n_steps, n_layers, k] = [n_steps, n_layers, k].map(|n| usize::try_from(n).unwrap());
        let n_before = last + 1 - u16::try_from(n_steps).unwrap() - n_fast;
        Self { n_steps, n_layers, k, positions, n_before }
    }

    fn selection(&self, step: usize, layer: usize) -> &[u16] {
        &self.positions[(step * self.n_layers + layer) * self.k..][..self.k]
    }

    /// The rows of one operator that may lie in the slow tier.
    fn slow(&self, step: usize, layer: usize) -> impl Iterator<Item = usize> {
        self.selection(step, layer).iter().filter(|&&at| at < self.n_before).map(|&at| usize::from(at))
    }

    /// The share of a step's selection that the step before had, in each layer.
    fn overlap_of_steps(&self) -> Vec<f64> {
        let of_layer = |layer| {
            let shared =
                (1..self.n_steps).map(|step| common(self.selection(step - 1, layer), self.selection(step, layer)));
            shared.sum::<usize>() as f64 / ((self.n_steps - 1) * self.k) as f64
        };
        (0..self.n_layers).map(of_layer).collect()
    }

    /// The share of a layer's selection that the layer before had.
    fn overlap_of_layers(&self) -> f64 {
        let pairs = (0..self.n_steps).flat_map(|step| (1..self.n_layers).map(move |layer| (step, layer)));
        let shared = pairs.map(|(step, layer)| common(self.selection(step, layer - 1), self.selection(step, layer)));
        shared.sum::<usize>() as f64 / (self.n_steps * (self.n_layers - 1) * self.k) as f64
    }

    /// Different rows of a layer that were selected at all, in selections of one step; the mean of the layers.
    fn touched(&self) -> f64 {
        let of_layer = |layer| {
            let all: HashSet<usize> = (0..self.n_steps).flat_map(|step| self.slow(step, layer)).collect();
            all.len() as f64 / self.k as f64
        };
        mean(&(0..self.n_layers).map(of_layer).collect::<Vec<_>>())
    }

    /// A step's misses in all layers with a cache of so many last steps, the rows that the layer before has selected
    /// and the cache has not, and how many of them are misses: what reading them ahead would cost and save.
    fn guesses(&self, cached: usize) -> [f64; 3] {
        let n_rows = usize::from(self.n_before);
        let (mut used, mut counts) = (vec![None; self.n_layers * n_rows], [0; 3]);
        for (step, layer) in self.operators() {
            let is_missing = |row: &usize| used[layer * n_rows + row].is_none_or(|last: usize| step - last > cached);
            let missing: Vec<usize> = self.slow(step, layer).filter(is_missing).collect();
            let before = layer.checked_sub(1).into_iter().flat_map(|before| self.slow(step, before));
            let guessed: Vec<usize> = before.filter(is_missing).collect();
            if self.is_counted(step) {
                counts[0] += missing.len();
                counts[1] += guessed.len();
                counts[2] += common(&missing, &guessed);
            }
            for row in self.slow(step, layer) {
                used[layer * n_rows + row] = Some(step);
            }
        }
        counts.map(|count| count as f64 / self.n_counted())
    }

    fn n_slots(&self, size: f64) -> usize {
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a size in the table")]
        let n = (size * (self.k * self.n_layers) as f64) as usize;
        n
    }

    /// Every operator of the log: a step's layers in their order.
    fn operators(&self) -> impl Iterator<Item = (usize, usize)> {
        (0..self.n_steps).flat_map(|step| (0..self.n_layers).map(move |layer| (step, layer)))
    }

    fn is_counted(&self, step: usize) -> bool {
        step >= self.n_steps / 4
    }

    fn n_counted(&self) -> f64 {
        (0..self.n_steps).filter(|&step| self.is_counted(step)).count() as f64
    }

    fn replay(&self, choice: fn(usize) -> Choice, size: f64) -> Replay {
        let (n_slots, n_rows) = (self.n_slots(size), usize::from(self.n_before));
        let mut replacement = choice(n_slots);
        let mut slot_of = vec![None; self.n_layers * n_rows];
        // Of each slot its row, and the operator that has used it last.
        let (mut owners, mut used) = (vec![None; n_slots], vec![usize::MAX; n_slots]);
        let (mut n_free, mut hits, mut asked, mut reads) = (n_slots, 0_u64, 0_u64, 0_u64);
        for (epoch, (step, layer)) in self.operators().enumerate() {
            let counted = u64::from(self.is_counted(step));
            let (mut missing, rows) = (Vec::new(), self.slow(step, layer).map(|at| layer * n_rows + at));
            for row in rows {
                asked += counted;
                match slot_of[row] {
                    Some(slot) => {
                        hits += counted;
                        used[slot] = epoch;
                        replacement.hit(slot);
                    }
                    None => missing.push(row),
                }
            }
            reads += counted * n_reads(&missing, layer * n_rows);
            for row in missing {
                let slot = if n_free > 0 {
                    n_free -= 1;
                    n_free
                } else {
                    replacement.victim(|slot| used[slot] != epoch).expect("an operator's rows fit")
                };
                if let Some(gone) = owners[slot].replace(row) {
                    slot_of[gone] = None;
                }
                slot_of[row] = Some(slot);
                used[slot] = epoch;
                replacement.filled(slot);
            }
        }
        Replay {
            rate: 100.0 * hits as f64 / asked as f64,
            misses: (asked - hits) as f64 / self.n_counted(),
            reads: reads as f64 / self.n_counted(),
        }
    }

    /// The hit rate of a cache that knows the future: what is asked for again latest makes room (Belady). Rows of the
    /// operator at hand stay, as in the cache.
    fn optimal(&self, size: f64) -> f64 {
        let (n_slots, n_rows) = (self.n_slots(size), usize::from(self.n_before));
        // When each row of each operator is asked for again, from the last one back.
        let mut next_use = vec![usize::MAX; self.n_layers * n_rows];
        let mut again: Vec<Vec<usize>> = Vec::new();
        for (step, layer) in self.operators().collect::<Vec<_>>().into_iter().rev() {
            let now = step * self.n_layers + layer;
            again.push(
                self.slow(step, layer).map(|at| std::mem::replace(&mut next_use[layer * n_rows + at], now)).collect(),
            );
        }
        again.reverse();
        let mut present = vec![None; self.n_layers * n_rows];
        let mut by_next: BTreeSet<(usize, usize)> = BTreeSet::new();
        let (mut hits, mut asked) = (0_u64, 0_u64);
        for (epoch, (step, layer)) in self.operators().enumerate() {
            let counted = u64::from(self.is_counted(step));
            let rows: Vec<usize> = self.slow(step, layer).map(|at| layer * n_rows + at).collect();
            // Those of this operator are not among the victims.
            for &row in &rows {
                asked += counted;
                if let Some(next) = present[row] {
                    hits += counted;
                    by_next.remove(&(next, row));
                }
            }
            while by_next.len() + rows.len() > n_slots {
                let (_, row) = by_next.pop_last().expect("an operator's rows fit");
                present[row] = None;
            }
            for (&row, &next) in rows.iter().zip(&again[epoch]) {
                present[row] = Some(next);
                by_next.insert((next, row));
            }
        }
        100.0 * hits as f64 / asked as f64
    }
}

/// How many reads fetch the rows of one operator, of which `first` is the first there is.
fn n_reads(rows: &[usize], first: usize) -> u64 {
    let page = |row: &usize| ((row - first) / BLOCK_TOKENS, (row - first) % BLOCK_TOKENS / PAGE_ROWS);
    let (mut last, mut n) = (None, 0);
    for (block, page) in rows.iter().map(page) {
        let goes_on = last.is_some_and(|(of, before)| of == block && page <= before + 1);
        n += u64::from(!goes_on);
        last = Some((block, page));
    }
    n
}

/// How many two ascending lists share.
fn common<T: Ord>(a: &[T], b: &[T]) -> usize {
    let (mut at, mut n) = (0, 0);
    for x in a {
        while at < b.len() && b[at] < *x {
            at += 1;
        }
        n += usize::from(b.get(at) == Some(x));
    }
    n
}
