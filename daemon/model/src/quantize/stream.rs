//! How does a tensor pass from one file to the other? In batches of values, decoded, encoded, decoded again to see what
//! was lost. A batch is whole blocks of every format wherever rows end, so memory does not depend on a tensor's shape.

use super::source::{Piece, failed};
use crate::ModelError;
use crate::weights::Coding;
use sparsed_quant::gguf::DataWriter;
use sparsed_quant::{Format, QuantError, decode, encode};
use std::io::Write;
use std::path::Path;

/// Values of a batch; whole blocks of every format. A worker holds about 16 bytes for each.
const BATCH: usize = 1 << 20;

/// A tensor on its way.
#[derive(Clone, Debug)]
pub(super) struct Planned {
    pub(super) name: String,
    pub(super) dims: Vec<u64>,
    /// What holds its numbers exactly.
    pub(super) from: Format,
    pub(super) to: Format,
    /// Its numbers, piece after piece.
    pub(super) pieces: Vec<Piece>,
}

/// What a worker does next: `n` values of a piece from value `first` of it on, `before` values into the tensor.
#[derive(Clone, Copy, Debug)]
struct Task<'a> {
    piece: &'a Piece,
    first: u64,
    n: usize,
    before: u64,
}

/// The batches of a tensor, in order: none reaches over the end of a piece, and what changes places is one batch.
fn tasks(pieces: &[Piece]) -> impl Iterator<Item = Task<'_>> {
    let starts = pieces.iter().scan(0, |at, piece| {
        *at += piece.values;
        Some(*at - piece.values)
    });
    pieces.iter().zip(starts).flat_map(|(piece, start)| {
        let batch = if piece.transposed.is_some() { piece.values } else { BATCH as u64 };
        let n_batches = piece.values.div_ceil(batch.max(1));
        (0..n_batches).map(move |number| {
            let first = number * batch;
            let n = usize::try_from(batch.min(piece.values - first)).expect("at most what is transposed in memory");
            Task { piece, first, n, before: start + first }
        })
    })
}

/// What recoding lost: sums over values.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Loss {
    pub(super) squared_error: f64,
    pub(super) squared: f64,
}

/// One thread's buffers.
#[derive(Debug, Default)]
struct Worker {
    bytes: Vec<u8>,
    values: Vec<f32>,
    encoded: Vec<u8>,
    back: Vec<f32>,
    loss: Loss,
}

/// A team that recodes tensors.
#[derive(Debug)]
pub(super) struct Recoder {
    workers: Vec<Worker>,
}

impl Recoder {
    pub(super) fn new(n_threads: usize) -> Self {
        Self { workers: (0..n_threads).map(|_| Worker::default()).collect() }
    }

    /// Writes one tensor; `wrote` hears how many bytes were added. Says what was lost.
    pub(super) fn tensor<W: Write>(
        &mut self,
        tensor: &Planned,
        data: &mut DataWriter<W>,
        out: &Path,
        wrote: &mut dyn FnMut(u64),
    ) -> Result<Loss, ModelError> {
        self.workers.iter_mut().for_each(|worker| worker.loss = Loss::default());
        let mut tasks = tasks(&tensor.pieces);
        loop {
            let busy = self.batches(tensor, &mut tasks)?;
            for worker in &self.workers[..busy] {
                let io = |source| ModelError::Io { path: out.to_owned(), source };
                data.piece(&worker.encoded).map_err(io)?;
                wrote(worker.encoded.len() as u64);
            }
            if busy == 0 {
                break;
            }
        }
        let sum = |part: fn(&Loss) -> f64| self.workers.iter().map(|worker| part(&worker.loss)).sum();
        Ok(Loss { squared_error: sum(|loss| loss.squared_error), squared: sum(|loss| loss.squared) })
    }

    /// Recodes the next batches, one to a worker; answers how many workers had one.
    fn batches<'t>(
        &mut self,
        tensor: &Planned,
        tasks: &mut impl Iterator<Item = Task<'t>>,
    ) -> Result<usize, ModelError> {
        std::thread::scope(|scope| {
            let running: Vec<_> = self
                .workers
                .iter_mut()
                .zip(tasks)
                .map(|(worker, task)| scope.spawn(move || worker.batch(tensor, &task)))
                .collect();
            let busy = running.len();
            for thread in running {
                thread.join().expect("a worker does not panic: lengths are counted and slices checked")?;
            }
            Ok(busy)
        })
    }
}

impl Worker {
    /// Recodes a batch of the tensor into `self.encoded`.
    fn batch(&mut self, tensor: &Planned, task: &Task<'_>) -> Result<(), ModelError> {
        let quant = |source: QuantError| ModelError::Quant { name: tensor.name.clone(), source };
        let unread = |error| failed(&tensor.name, error);
        let (piece, n) = (task.piece, task.n);
        let first = piece.first + task.first;
        if let (Coding::Plain(format), None) = (&piece.stored.coding, piece.transposed)
            && *format == tensor.to
        {
            return piece.stored.bytes(*format, first, n, &mut self.encoded).map_err(unread);
        }
        self.values.resize(n, 0.0);
        piece.stored.values(first, &mut self.values, &mut self.bytes).map_err(unread)?;
        if let Some([_, cols]) = piece.transposed {
            // The same values, column by column.
            self.back.clear();
            for column in 0..cols {
                self.back.extend(self.values.iter().skip(column).step_by(cols));
            }
            std::mem::swap(&mut self.values, &mut self.back);
        }
        self.encoded.resize(tensor.to.row_bytes(n).map_err(quant)?, 0);
        encode(tensor.to, &self.values, &mut self.encoded).map_err(quant)?;
        self.back.resize(n, 0.0);
        decode(tensor.to, &self.encoded, &mut self.back).map_err(quant)?;
        self.compare(tensor, task.before)
    }

    fn compare(&mut self, tensor: &Planned, first: u64) -> Result<(), ModelError> {
        let refuse = |at: usize, reason: &str| {
            let reason = format!("value {} is {}{reason}", first + at as u64, self.values[at]);
            ModelError::Tensor { name: tensor.name.clone(), reason }
        };
        if let Some(at) = self.values.iter().position(|value| !value.is_finite()) {
            return Err(refuse(at, ""));
        }
        if let Some(at) = self.back.iter().position(|value| !value.is_finite()) {
            return Err(refuse(at, &format!(", or lies beside one, that {} cannot hold", tensor.to.name())));
        }
        for (value, back) in self.values.iter().zip(&self.back) {
            let (value, error) = (f64::from(*value), f64::from(*value) - f64::from(*back));
            self.loss.squared_error += error * error;
            self.loss.squared += value * value;
        }
        Ok(())
    }
}
