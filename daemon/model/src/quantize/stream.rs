//! How does a tensor pass from one file to the other? In batches of values, decoded, encoded, decoded again to see what
//! was lost. A batch is whole blocks of every format wherever rows end, so memory does not depend on a tensor's shape.

use crate::ModelError;
use sparsed_quant::gguf::DataWriter;
use sparsed_quant::{Format, QuantError, decode, encode};
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Values of a batch; whole blocks of every format. A worker holds about 16 bytes for each.
const BATCH: usize = 1 << 20;

/// A tensor on its way.
#[derive(Clone, Debug)]
pub(super) struct Planned {
    pub(super) name: String,
    pub(super) dims: Vec<u64>,
    pub(super) from: Format,
    pub(super) to: Format,
    /// Where its bytes begin in the old file.
    pub(super) start: u64,
    pub(super) values: u64,
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
pub(super) struct Recoder<'a> {
    file: &'a File,
    path: &'a Path,
    workers: Vec<Worker>,
}

impl<'a> Recoder<'a> {
    pub(super) fn new(file: &'a File, path: &'a Path, n_threads: usize) -> Self {
        Self { file, path, workers: (0..n_threads).map(|_| Worker::default()).collect() }
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
        let mut first = 0;
        while first < tensor.values {
            let busy = self.batches(tensor, &mut first)?;
            for worker in &self.workers[..busy] {
                let io = |source| ModelError::Io { path: out.to_owned(), source };
                data.piece(&worker.encoded).map_err(io)?;
                wrote(worker.encoded.len() as u64);
            }
        }
        let sum = |part: fn(&Loss) -> f64| self.workers.iter().map(|worker| part(&worker.loss)).sum();
        Ok(Loss { squared_error: sum(|loss| loss.squared_error), squared: sum(|loss| loss.squared) })
    }

    /// Recodes the next batches, one to a worker; answers how many workers had one.
    fn batches(&mut self, tensor: &Planned, first: &mut u64) -> Result<usize, ModelError> {
        let (file, path) = (self.file, self.path);
        std::thread::scope(|scope| {
            let mut running = Vec::with_capacity(self.workers.len());
            for worker in &mut self.workers {
                let (start, left) = (*first, tensor.values - *first);
                let n = usize::try_from(left).map_or(BATCH, |left| left.min(BATCH));
                if n == 0 {
                    break;
                }
                *first += n as u64;
                running.push(scope.spawn(move || worker.batch(file, path, tensor, start, n)));
            }
            let busy = running.len();
            for thread in running {
                thread.join().expect("a worker does not panic: lengths are counted and slices checked")?;
            }
            Ok(busy)
        })
    }
}

impl Worker {
    /// Recodes `n` values of the tensor from value `first` on into `self.encoded`.
    fn batch(&mut self, file: &File, path: &Path, tensor: &Planned, first: u64, n: usize) -> Result<(), ModelError> {
        let quant = |source: QuantError| ModelError::Quant { name: tensor.name.clone(), source };
        let blocks = first / tensor.from.block_values() as u64;
        let at = tensor.start + blocks * tensor.from.block_bytes() as u64;
        self.bytes.resize(tensor.from.row_bytes(n).map_err(quant)?, 0);
        let io = |source| ModelError::Io { path: path.to_owned(), source };
        file.read_exact_at(&mut self.bytes, at).map_err(io)?;
        if tensor.from == tensor.to {
            self.encoded.clone_from(&self.bytes);
            return Ok(());
        }
        self.values.resize(n, 0.0);
        decode(tensor.from, &self.bytes, &mut self.values).map_err(quant)?;
        self.encoded.resize(tensor.to.row_bytes(n).map_err(quant)?, 0);
        encode(tensor.to, &self.values, &mut self.encoded).map_err(quant)?;
        self.back.resize(n, 0.0);
        decode(tensor.to, &self.encoded, &mut self.back).map_err(quant)?;
        self.compare(tensor, first)
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
