//! How are packed codes multiplied with rounded activations?
//!
//! Sums are exact integers, so each level may multiply in the order and in the signs that it is good at.

use super::Lanes;

/// Products of the codes of 16 rows with a token's activations of one or two bytes (PLANES).
pub(crate) trait Products: Lanes {
    /// What is added to signed codes of 8 bits before they are multiplied: 128 where the level wants unsigned ones, or
    /// nothing.
    const BYTE_OFFSET: u8;
    /// The codes of eight values of 16 rows.
    type Codes: Copy;
    /// The sums of 16 rows, of each plane.
    type Sums: Copy;

    /// Takes the codes of four values and of the next four.
    fn codes<const PLANES: usize>(self, first: Self::I, second: Self::I) -> Self::Codes;
    /// Sums that begin with `start`.
    fn start<const PLANES: usize>(self, start: i32) -> Self::Sums;
    /// Adds the products with eight activations: their high bytes, then their low bytes, which alone count where PLANES
    /// is 1. SMALL: codes are at most 63.
    fn dot<const PLANES: usize, const SMALL: bool>(
        self,
        sums: Self::Sums,
        codes: Self::Codes,
        x: &[i32; 4],
    ) -> Self::Sums;
    /// 256 times the sums of the high bytes plus those of the low ones.
    fn total<const PLANES: usize>(self, sums: Self::Sums) -> Self::I;
}

/// Levels that multiply unsigned codes with one broadcast plane at a time.
pub(super) trait BroadcastProducts: Lanes {
    /// Per 32-bit lane: `acc` plus the four products of unsigned bytes of `w`, at most 63, and signed bytes of `x`.
    fn dot_small(self, acc: Self::I, w: Self::I, x: Self::I) -> Self::I;
    /// As [`Self::dot_small`] for any unsigned bytes.
    fn dot_bytes(self, acc: Self::I, w: Self::I, x: Self::I) -> Self::I;
    /// 32-bit lanes times 256.
    fn shl_byte(self, v: Self::I) -> Self::I;
}

impl<L: BroadcastProducts> Products for L {
    const BYTE_OFFSET: u8 = 128;
    type Codes = [L::I; 2];
    /// Of the high bytes, of the low bytes.
    type Sums = [L::I; 2];

    #[inline(always)]
    fn codes<const PLANES: usize>(self, first: L::I, second: L::I) -> [L::I; 2] {
        [first, second]
    }
    #[inline(always)]
    fn start<const PLANES: usize>(self, start: i32) -> [L::I; 2] {
        [self.splat_i(0), self.splat_i(start)]
    }
    #[inline(always)]
    fn dot<const PLANES: usize, const SMALL: bool>(
        self,
        mut sums: [L::I; 2],
        codes: [L::I; 2],
        x: &[i32; 4],
    ) -> [L::I; 2] {
        for four in 0..2 {
            for plane in 2 - PLANES..2 {
                let x = self.splat_i(x[2 * plane + four]);
                let (sum, w) = (sums[plane], codes[four]);
                sums[plane] = if SMALL { self.dot_small(sum, w, x) } else { self.dot_bytes(sum, w, x) };
            }
        }
        sums
    }
    #[inline(always)]
    fn total<const PLANES: usize>(self, sums: [L::I; 2]) -> L::I {
        if PLANES == 2 { self.add_i(self.shl_byte(sums[0]), sums[1]) } else { sums[1] }
    }
}
