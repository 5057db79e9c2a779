//! How are 16-bit words multiplied? In pairs, the two words of each 32-bit lane.
//!
//! Sums are exact modulo 2^32, so each level may add in the order that it is good at.

use super::{LANES, Lanes};

/// Products of 16-bit words, two to a lane.
pub(crate) trait Words: Lanes {
    /// A sum of each lane, in the form in which the level adds to it.
    type Sums: Copy;

    fn load_ints(self, v: &[i32; LANES]) -> Self::I;
    /// The bits of each lane.
    fn bits(self, v: Self::F) -> Self::I;
    /// Each lane's low word from `low`, its high word the low one of `high`.
    fn pair_words(self, low: Self::I, high: Self::I) -> Self::I;
    /// The low words of `a`'s lanes, then those of `b`'s.
    fn pack_words(self, a: Self::I, b: Self::I) -> Self::I;
    /// Pairs of a word of `a` and the same of `b`, in an order of the level's own: see [`Self::zipped_in_order`].
    fn zip_words(self, a: Self::I, b: Self::I) -> [Self::I; 2];
    /// Lanes that came with the pairs of [`Self::zip_words`], in the order of the words.
    fn zipped_in_order(self, v: [Self::F; 2]) -> [Self::F; 2];
    /// Words divided by 2^`by` and rounded (a half up, but not past the greatest word); `by` from 0 to 15.
    fn shift_words(self, v: Self::I, by: i32) -> Self::I;
    /// The number whose eight bits are the lowest ones of a line's first words.
    #[inline(always)]
    fn unit_bits(self, line: &[u8; 4 * LANES]) -> i32 {
        (0..8).fold(0, |bits, word| bits | i32::from(line[2 * word] & 1) << word)
    }
    /// The lanes as they are, taken for floats.
    fn as_float(self, v: Self::I) -> Self::F;
    /// Lanes divided by 2^`by`, rounded down; `by` from 0 to 31.
    fn shift_right(self, v: Self::I, by: i32) -> Self::I;
    /// Per 16 bits: the greater of `most` and what is left of `v` without the highest bit, both unsigned.
    fn max_magnitude_words(self, most: Self::I, v: Self::I) -> Self::I;

    /// Sums that begin with `start`.
    fn begin(self, start: Self::I) -> Self::Sums;
    /// Adds the products of each lane's low words and of its high words.
    fn dot_words(self, sums: Self::Sums, a: Self::I, b: Self::I) -> Self::Sums;
    fn end(self, sums: Self::Sums) -> Self::I;

    /// The first half of adding the lanes of 16 vectors, for [`Self::finish_ints`]: see [`Lanes::fold`].
    fn fold_ints(self, vectors: &[Self::I; 4]) -> Self::I;
    /// The other half: lane 4 i + j is the sum of the i-th of the vectors that became `folded[j]`.
    #[inline(always)]
    fn finish_ints(self, folded: &[Self::I; 4]) -> Self::I {
        let [a, b] = self.pair_up_ints(folded);
        self.finish_pairs(a, b)
    }
    /// Its first step: two sums are left of each vector, those of its even and of its odd lanes.
    fn pair_up_ints(self, folded: &[Self::I; 4]) -> [Self::I; 2];
    /// Its second step.
    fn finish_pairs(self, a: Self::I, b: Self::I) -> Self::I;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::level::Level;
    use crate::simd::on_level;

    const WORDS: usize = 2 * LANES;

    pub(crate) struct Found {
        dot: [i32; LANES],
        pairs: [i32; LANES],
        shifted: [i32; LANES],
        folded: [i32; LANES],
        most: [i32; LANES],
    }

    on_level! {
        fn compute(vectors: &[[i32; LANES]; LANES]) -> Found = compute_body
    }

    #[inline(always)]
    fn compute_body<L: Words>(l: L, vectors: &[[i32; LANES]; LANES]) -> Found {
        let stored = |v| {
            let mut to = [0; LANES];
            l.store_i(v, &mut to);
            to
        };
        let mut loaded = [l.splat_i(0); LANES];
        for (loaded, v) in loaded.iter_mut().zip(vectors) {
            *loaded = l.load_ints(v);
        }
        let sums = l.dot_words(l.begin(loaded[0]), loaded[1], loaded[2]);
        let mut folded = [loaded[0]; 4];
        for (j, folded) in folded.iter_mut().enumerate() {
            *folded = l.fold_ints(&[loaded[j], loaded[j + 4], loaded[j + 8], loaded[j + 12]]);
        }
        Found {
            dot: stored(l.end(l.dot_words(sums, loaded[3], loaded[4]))),
            pairs: stored(l.pair_words(loaded[5], loaded[6])),
            shifted: stored(l.shift_right(loaded[7], 5)),
            folded: stored(l.finish_ints(&folded)),
            most: stored(l.max_magnitude_words(loaded[8], loaded[9])),
        }
    }

    fn words(v: &[i32; LANES]) -> [i16; WORDS] {
        std::array::from_fn(|i| (v[i / 2] >> (16 * (i % 2))) as i16)
    }

    #[test]
    fn every_level_does_to_words_what_is_written() {
        let mut random = fastrand::Rng::with_seed(3);
        let vectors: [[i32; LANES]; LANES] = std::array::from_fn(|_| std::array::from_fn(|_| random.i32(..)));
        let product =
            |a: usize, b: usize, i: usize| i32::from(words(&vectors[a])[i]) * i32::from(words(&vectors[b])[i]);
        for level in Level::all() {
            let found = compute(level, &vectors);
            for i in 0..LANES {
                let products =
                    [product(1, 2, 2 * i), product(1, 2, 2 * i + 1), product(3, 4, 2 * i), product(3, 4, 2 * i + 1)];
                assert_eq!(
                    found.dot[i],
                    products.iter().fold(vectors[0][i], |sum, p| sum.wrapping_add(*p)),
                    "{level:?}"
                );
                let pair = words(&found.pairs);
                assert_eq!([pair[2 * i], pair[2 * i + 1]], [words(&vectors[5])[2 * i], words(&vectors[6])[2 * i]]);
                assert_eq!(found.shifted[i], vectors[7][i] >> 5, "{level:?}");
                assert_eq!(
                    found.folded[i],
                    vectors[i].iter().fold(0, |sum, v| i32::wrapping_add(sum, *v)),
                    "{level:?}"
                );
            }
            for (i, most) in words(&found.most).iter().enumerate() {
                let (a, b) = (words(&vectors[8])[i] as u16, words(&vectors[9])[i] as u16);
                assert_eq!(*most as u16, a.max(b & 0x7fff), "{level:?}");
            }
        }
    }
}
