//! Which kernels does an image have, and does a launch fit? The text that stands for device code.

use std::collections::BTreeMap;

/// The first line of an image that the fake takes.
const MAGIC: &str = "sparsed-kernels 1";
/// The largest launch (the driver's reference, table of compute capabilities).
const GRID_MAX: (u32, u32, u32) = ((1 << 31) - 1, 65_535, 65_535);
const THREADS_MAX: u32 = 1024;

/// The kernels of an image: sizes of parameters in bytes, by name.
pub(crate) type Image = BTreeMap<String, Vec<usize>>;

/// A launch in a stream.
#[derive(Debug)]
pub(crate) struct Launch {
    pub(crate) name: String,
    /// Blocks along x and y.
    pub(crate) grid: (u32, u32),
    pub(crate) threads: u32,
    /// Parameters, zero-extended.
    pub(crate) words: Vec<u64>,
    /// It has begun and does not end.
    pub(crate) hangs: bool,
}

/// Reads an image; `None`: it is none of ours.
pub(crate) fn parse(text: &str) -> Option<Image> {
    let mut lines = text.lines();
    if lines.next() != Some(MAGIC) {
        return None;
    }
    let kernels = lines.filter(|line| !line.starts_with('#') && !line.is_empty()).map(|line| {
        let mut words = line.split(' ');
        let name = words.next()?.to_owned();
        let sizes = words.map(|size| size.parse().ok().filter(|size| matches!(size, 4 | 8))).collect::<Option<_>>()?;
        Some((name, sizes))
    });
    kernels.collect()
}

/// True when a device takes such a launch.
pub(crate) fn fits(grid: (u32, u32, u32), block: (u32, u32, u32)) -> bool {
    let threads = block.0.checked_mul(block.1).and_then(|n| n.checked_mul(block.2));
    let all = [grid.0, grid.1, grid.2];
    all.iter().zip([GRID_MAX.0, GRID_MAX.1, GRID_MAX.2]).all(|(&n, max)| (1..=max).contains(&n))
        && threads.is_some_and(|n| (1..=THREADS_MAX).contains(&n))
}
