//! What do the kernels compute? Host functions by name, naive and in f64, block by block as a device would.

use crate::device_memory::{DeviceMemory, Wild};
use crate::launches::Launch;
use half::f16;

/// A kernel: what one block of the grid does.
type Block = fn(&mut DeviceMemory, (u32, u32), &Launch) -> Result<(), Wild>;

/// The function of this name, with the sizes of its parameters in bytes.
pub(crate) fn find(name: &str) -> Option<(Block, &'static [usize])> {
    Some(match name {
        "embed_f16" => ((|m, b, l| embed(m, b, l, halves)) as Block, &[8, 8, 8, 8, 4, 4][..]),
        "embed_f32" => (|m, b, l| embed(m, b, l, floats), &[8, 8, 8, 8, 4, 4]),
        "rms_norm" => (rms_norm, &[8, 8, 4, 4, 8, 8, 4, 4, 8, 8, 4, 4, 4, 4]),
        "linear_f16" => (|m, b, l| linear(m, b, l, halves), &[8, 8, 4, 8, 8, 8, 4, 4, 4]),
        "linear_f32" => (|m, b, l| linear(m, b, l, floats), &[8, 8, 4, 8, 8, 8, 4, 4, 4]),
        "add" => (add, &[8, 8, 4, 4, 8, 4, 4, 8, 4, 4, 4]),
        "gather_rows" => (gather_rows, &[8, 8, 4, 4, 8, 8, 4, 4, 4]),
        _ => return None,
    })
}

/// Runs all blocks of a launch, unless its cancel word says otherwise; true when it ran.
pub(crate) fn run(memory: &mut DeviceMemory, launch: &Launch) -> Result<bool, Wild> {
    let (block, _) = find(&launch.name).ok_or(Wild)?;
    if word(memory, launch.words[0])? != 0 {
        return Ok(false);
    }
    for y in 0..launch.grid.1 {
        for x in 0..launch.grid.0 {
            block(memory, (x, y), launch)?;
        }
    }
    Ok(true)
}

fn word(memory: &DeviceMemory, at: u64) -> Result<u32, Wild> {
    Ok(u32::from_le_bytes(memory.read(at, 4)?.try_into().expect("four bytes")))
}

/// Reads values `first .. first + n` of an array.
type Read = fn(&DeviceMemory, u64, u64, u64) -> Result<Vec<f64>, Wild>;

fn floats(memory: &DeviceMemory, base: u64, first: u64, n: u64) -> Result<Vec<f64>, Wild> {
    let bytes = memory.read(base + first * 4, n as usize * 4)?;
    Ok(bytes.as_chunks::<4>().0.iter().map(|&b| f32::from_le_bytes(b).into()).collect())
}

fn halves(memory: &DeviceMemory, base: u64, first: u64, n: u64) -> Result<Vec<f64>, Wild> {
    let bytes = memory.read(base + first * 2, n as usize * 2)?;
    Ok(bytes.as_chunks::<2>().0.iter().map(|&b| f16::from_le_bytes(b).into()).collect())
}

#[expect(clippy::cast_possible_truncation, reason = "activations are f32")]
fn store(memory: &mut DeviceMemory, at: u64, values: &[f64]) -> Result<(), Wild> {
    let to = memory.write(at, values.len() * 4)?;
    for (to, &value) in to.as_chunks_mut::<4>().0.iter_mut().zip(values) {
        *to = (value as f32).to_le_bytes();
    }
    Ok(())
}

/// At which value row `row` of `[rows, n1, n2]` begins, rows counted over the first two dimensions.
fn strided(strides: (u64, u64), n1: u64, row: u64) -> u64 {
    row / n1 * strides.0 + row % n1 * strides.1
}

fn embed(memory: &mut DeviceMemory, block: (u32, u32), launch: &Launch, read: Read) -> Result<(), Wild> {
    let &[_, weights, tokens, y, rows, width] = &launch.words[..] else { return Err(Wild) };
    let t = u64::from(block.0);
    if t >= rows {
        return Ok(());
    }
    let token = u64::from(word(memory, tokens + t * 4)?);
    let row = read(memory, weights, token * width, width)?;
    store(memory, y + t * width * 4, &row)
}

fn rms_norm(memory: &mut DeviceMemory, block: (u32, u32), launch: &Launch) -> Result<(), Wild> {
    let &[_, x, x0, x1, gain, residual, r0, r1, y, sum, rows, n1, cols, eps] = &launch.words[..] else {
        return Err(Wild);
    };
    let row = u64::from(block.0);
    if row >= rows * n1 {
        return Ok(());
    }
    let mut values = floats(memory, x, strided((x0, x1), n1, row), cols)?;
    if residual != 0 {
        let residual = floats(memory, residual, strided((r0, r1), n1, row), cols)?;
        values.iter_mut().zip(residual).for_each(|(value, r)| *value += r);
        store(memory, sum + row * cols * 4, &values)?;
    }
    let eps = f64::from(f32::from_bits(u32::try_from(eps).map_err(|_| Wild)?));
    let mean = values.iter().map(|v| v * v).sum::<f64>() / cols as f64;
    let gains = if gain == 0 { vec![1.0; cols as usize] } else { floats(memory, gain, 0, cols)? };
    let scale = 1.0 / (mean + eps).sqrt();
    let normal: Vec<f64> = values.iter().zip(gains).map(|(value, gain)| value * scale * gain).collect();
    store(memory, y + row * cols * 4, &normal)
}

fn linear(memory: &mut DeviceMemory, block: (u32, u32), launch: &Launch, read: Read) -> Result<(), Wild> {
    let &[_, x, stride, weights, bias, y, rows, cols, outputs] = &launch.words[..] else { return Err(Wild) };
    let warps = u64::from(launch.threads / 32);
    let first = u64::from(block.0) * warps;
    for row in (u64::from(block.1)..rows).step_by(launch.grid.1 as usize) {
        let input = floats(memory, x, row * stride, cols)?;
        for o in first..outputs.min(first + warps) {
            let weight = read(memory, weights, o * cols, cols)?;
            let start = if bias == 0 { 0.0 } else { floats(memory, bias, o, 1)?[0] };
            let value = weight.iter().zip(&input).fold(start, |sum, (w, v)| sum + w * v);
            store(memory, y + (row * outputs + o) * 4, &[value])?;
        }
    }
    Ok(())
}

fn add(memory: &mut DeviceMemory, block: (u32, u32), launch: &Launch) -> Result<(), Wild> {
    let &[_, a, a0, a1, b, b0, b1, y, rows, n1, n2] = &launch.words[..] else { return Err(Wild) };
    let row = u64::from(block.0);
    if row >= rows * n1 {
        return Ok(());
    }
    let mut sum = floats(memory, a, strided((a0, a1), n1, row), n2)?;
    let other = floats(memory, b, strided((b0, b1), n1, row), n2)?;
    sum.iter_mut().zip(other).for_each(|(value, b)| *value += b);
    store(memory, y + row * n2 * 4, &sum)
}

fn gather_rows(memory: &mut DeviceMemory, block: (u32, u32), launch: &Launch) -> Result<(), Wild> {
    let &[_, x, x0, x1, rows_at, y, rows, n1, n2] = &launch.words[..] else { return Err(Wild) };
    let l = u64::from(block.0);
    if l >= rows {
        return Ok(());
    }
    let from = u64::from(word(memory, rows_at + l * 4)?);
    for i in 0..n1 {
        let row = floats(memory, x, strided((x0, x1), n1, from * n1 + i), n2)?;
        store(memory, y + (l * n1 + i) * n2 * 4, &row)?;
    }
    Ok(())
}
