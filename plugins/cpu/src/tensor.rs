//! How do kernels see a tensor of the running step? As rows behind a raw pointer that several threads share.

use std::marker::PhantomData;

/// A tensor `[n0, n1, n2]` of f32 or i32 with unit stride inside; rank 2 has n1 = 1.
///
/// Kernels read rows with [`Self::row`] and write with [`Self::row_mut`]; the plan has checked every shape, and the
/// dispatcher gives each thread its own rows.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tensor<'a, T> {
    pub(crate) at: *mut T,
    pub(crate) n0: usize,
    pub(crate) n1: usize,
    pub(crate) n2: usize,
    pub(crate) s0: usize,
    pub(crate) s1: usize,
    pub(crate) life: PhantomData<&'a T>,
}

// SAFETY: threads write disjoint rows and read rows that nobody writes in the same operator.
unsafe impl<T: Sync> Sync for Tensor<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Send for Tensor<'_, T> {}

impl<'a, T: Copy> Tensor<'a, T> {
    /// Row `[i0, i1, ..]`, n2 values.
    pub(crate) fn row(&self, i0: usize, i1: usize) -> &'a [T] {
        assert!(i0 < self.n0 && i1 < self.n1, "row outside the tensor");
        // SAFETY: the plan gave every tensor room for n0 rows of this shape; nobody writes an input of the operator.
        unsafe { std::slice::from_raw_parts(self.at.add(i0 * self.s0 + i1 * self.s1), self.n2) }
    }

    /// Row `[i0, i1, ..]` to write.
    ///
    /// # Safety
    /// No other thread reads or writes this row now, and the caller holds no other reference to it.
    #[allow(clippy::mut_from_ref, reason = "disjoint rows of one tensor are written by several threads")]
    pub(crate) unsafe fn row_mut(&self, i0: usize, i1: usize) -> &'a mut [T] {
        assert!(i0 < self.n0 && i1 < self.n1, "row outside the tensor");
        // SAFETY: room as in `row`; sole use by the caller's contract.
        unsafe { std::slice::from_raw_parts_mut(self.at.add(i0 * self.s0 + i1 * self.s1), self.n2) }
    }

    /// Rows n0 * n1 in all.
    pub(crate) fn rows(&self) -> usize {
        self.n0 * self.n1
    }

    /// Row `i` counted through.
    pub(crate) fn flat(&self, i: usize) -> &'a [T] {
        self.row(i / self.n1, i % self.n1)
    }

    /// Row `i` counted through, to write.
    ///
    /// # Safety
    /// As [`Self::row_mut`].
    #[allow(clippy::mut_from_ref, reason = "as row_mut")]
    pub(crate) unsafe fn flat_mut(&self, i: usize) -> &'a mut [T] {
        // SAFETY: the caller's contract.
        unsafe { self.row_mut(i / self.n1, i % self.n1) }
    }

    /// Writes value `i2` of row `i` counted through.
    ///
    /// # Safety
    /// No other thread uses this value now.
    pub(crate) unsafe fn put(&self, i: usize, i2: usize, value: T) {
        assert!(i < self.rows() && i2 < self.n2, "value outside the tensor");
        // SAFETY: inside a row, see `row`; sole use by the caller's contract.
        unsafe { self.at.add(i / self.n1 * self.s0 + i % self.n1 * self.s1 + i2).write(value) };
    }

    /// Values `range` of row `i` counted through, to write.
    ///
    /// # Safety
    /// No other thread uses these values now.
    #[allow(clippy::mut_from_ref, reason = "as row_mut")]
    pub(crate) unsafe fn flat_part_mut(&self, i: usize, range: std::ops::Range<usize>) -> &'a mut [T] {
        assert!(i < self.rows() && range.end <= self.n2, "values outside the tensor");
        let at = i / self.n1 * self.s0 + i % self.n1 * self.s1 + range.start;
        // SAFETY: inside a row, see `row`; sole use by the caller's contract.
        unsafe { std::slice::from_raw_parts_mut(self.at.add(at), range.len()) }
    }

    /// Values `range` of the first row, to write.
    ///
    /// # Safety
    /// No other thread uses these values now.
    #[allow(clippy::mut_from_ref, reason = "as row_mut")]
    pub(crate) unsafe fn part_mut(&self, range: std::ops::Range<usize>) -> &'a mut [T] {
        assert!(range.end <= self.n2, "range outside the row");
        // SAFETY: inside the row; sole use by the caller's contract.
        unsafe { std::slice::from_raw_parts_mut(self.at.add(range.start), range.len()) }
    }
}
