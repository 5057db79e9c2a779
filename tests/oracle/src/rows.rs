//! What is a table of numbers here? Row-major, one row per token or per output of a weight.

use num_traits::Float;
use std::iter::Sum;
use std::ops::AddAssign;

/// The precision that everything is computed in: `f32` or `f64`.
pub trait Real: Float + AddAssign + Sum + From<f32> + Into<f64> {
    /// The nearest value.
    fn of(value: f64) -> Self {
        <Self as num_traits::NumCast>::from(value).expect("both precisions take any f64")
    }
}

impl Real for f32 {}
impl Real for f64 {}

/// `[n, width]` values, row-major.
#[derive(Clone, Debug, PartialEq)]
pub struct Rows<T> {
    width: usize,
    values: Vec<T>,
}

impl<T: Real> Rows<T> {
    /// Rows of `width` values, one after another.
    ///
    /// # Panics
    /// When the last row is not whole.
    pub fn new(width: usize, values: Vec<T>) -> Self {
        assert!(width > 0 && values.len().is_multiple_of(width), "{} values in rows of {width}", values.len());
        Self { width, values }
    }

    /// `n` rows of zeros.
    pub fn zeros(n: usize, width: usize) -> Self {
        Self::new(width, vec![T::zero(); n * width])
    }

    /// Values of a row.
    pub fn width(&self) -> usize {
        self.width
    }

    /// All values.
    pub fn values(&self) -> &[T] {
        &self.values
    }

    /// Row `i`.
    pub fn row(&self, i: usize) -> &[T] {
        &self.values[i * self.width..][..self.width]
    }

    /// Row `i`, to be changed.
    pub fn row_mut(&mut self, i: usize) -> &mut [T] {
        &mut self.values[i * self.width..][..self.width]
    }

    /// The rows in order.
    pub fn iter(&self) -> std::slice::ChunksExact<'_, T> {
        self.values.chunks_exact(self.width)
    }

    /// How many rows there are.
    pub fn len(&self) -> usize {
        self.values.len() / self.width
    }

    /// True without rows.
    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }

    /// The same rows, each changed by `change(i, row)`.
    pub fn map(mut self, mut change: impl FnMut(usize, &mut [T])) -> Self {
        self.values.chunks_exact_mut(self.width).enumerate().for_each(|(i, row)| change(i, row));
        self
    }

    /// `[n, count]`: values `first .. first + count` of each row.
    pub fn columns(&self, first: usize, count: usize) -> Self {
        Self::new(count, self.iter().flat_map(|row| row[first..first + count].iter().copied()).collect())
    }

    /// `[count, width]`: rows `first .. first + count`.
    pub fn slice(&self, first: usize, count: usize) -> Self {
        Self::new(self.width, self.values[first * self.width..][..count * self.width].to_vec())
    }

    /// `[width, n]`.
    pub fn transposed(&self) -> Self {
        let column = |i: usize| self.iter().map(move |row| row[i]);
        Self::new(self.len(), (0..self.width).flat_map(column).collect())
    }

    /// `self + other`, value by value.
    pub fn plus(self, other: &Self) -> Self {
        self.map(|i, row| row.iter_mut().zip(other.row(i)).for_each(|(a, &b)| *a += b))
    }
}

/// `sum_i a_i b_i`, in 16 sums side by side so that it takes seconds and not minutes.
pub(crate) fn dot<T: Real>(a: &[T], b: &[T]) -> T {
    assert_eq!(a.len(), b.len(), "rows of one width");
    let mut sums = [T::zero(); 16];
    let (a, a_rest) = a.as_chunks::<16>();
    let (b, b_rest) = b.as_chunks::<16>();
    for (a, b) in a.iter().zip(b) {
        sums.iter_mut().zip(a.iter().zip(b)).for_each(|(sum, (&a, &b))| *sum += a * b);
    }
    let rest: T = a_rest.iter().zip(b_rest).map(|(&a, &b)| a * b).sum();
    sums.into_iter().sum::<T>() + rest
}

/// `y[t, o] = sum_c x[t, c] w[o, c]`.
pub(crate) fn linear<T: Real>(x: &Rows<T>, w: &Rows<T>) -> Rows<T> {
    let mut y = Rows::zeros(x.len(), w.len());
    for (o, weights) in w.iter().enumerate() {
        for (t, row) in x.iter().enumerate() {
            y.row_mut(t)[o] = dot(row, weights);
        }
    }
    y
}
