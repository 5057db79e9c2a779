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
    use crate::kernels::inputs::cases;
    use crate::level::Level;
    use crate::simd::on_level;
    use proptest::prelude::*;

    const WORDS: usize = 2 * LANES;

    /// By name, what came out.
    type Found = Vec<(&'static str, [i32; LANES])>;

    on_level! {
        fn compute(vectors: &[[i32; LANES]; LANES], by: i32) -> Found = compute_body
    }

    #[inline(always)]
    fn compute_body<L: Words>(l: L, vectors: &[[i32; LANES]; LANES], by: i32) -> Found {
        let mut v = [l.splat_i(0); LANES];
        for (v, from) in v.iter_mut().zip(vectors) {
            *v = l.load_ints(from);
        }
        let sums = l.dot_words(l.begin(v[0]), v[1], v[2]);
        let mut folded = [v[0]; 4];
        for (j, folded) in folded.iter_mut().enumerate() {
            *folded = l.fold_ints(&[v[j], v[j + 4], v[j + 8], v[j + 12]]);
        }
        // The sum of both words of a pair: below 2^24, so as a float it is exact.
        let ones = l.splat_i(0x0001_0001);
        let pairs = l.zip_words(v[10], v[11]);
        let pairs = pairs.map(|pair| l.to_float(l.end(l.dot_words(l.begin(l.splat_i(0)), pair, ones))));
        let [low, high] = l.zipped_in_order(pairs);
        let mut line = [0; 4 * LANES];
        line.as_chunks_mut().0.iter_mut().zip(&vectors[15]).for_each(|(to, pair)| *to = pair.to_le_bytes());
        let found = [
            ("dot", l.end(l.dot_words(sums, v[3], v[4]))),
            ("pair", l.pair_words(v[5], v[6])),
            ("shift", l.shift_right(v[7], by)),
            ("fold", l.finish_ints(&folded)),
            ("most", l.max_magnitude_words(v[8], v[9])),
            ("zip low", l.round(low)),
            ("zip high", l.round(high)),
            ("shift words", l.shift_words(v[12], by % 16)),
            ("pack", l.pack_words(v[13], v[14])),
            ("unit", l.splat_i(l.unit_bits(&line))),
        ];
        let stored = |(name, v)| {
            let mut to = [0; LANES];
            l.store_i(v, &mut to);
            (name, to)
        };
        found.into_iter().map(stored).collect()
    }

    fn words(v: &[i32; LANES]) -> [i32; WORDS] {
        std::array::from_fn(|i| i32::from((v[i / 2] >> (16 * (i % 2))) as i16))
    }

    fn pair(low: i32, high: i32) -> i32 {
        low & 0xffff | high << 16
    }

    /// As [`compute`], word by word.
    fn defined(v: &[[i32; LANES]; LANES], by: i32) -> Found {
        let w: [[i32; WORDS]; LANES] = std::array::from_fn(|i| words(&v[i]));
        let lanes = |f: &dyn Fn(usize) -> i32| std::array::from_fn(f);
        let products = |a: usize, b: usize, i: usize| {
            [2 * i, 2 * i + 1].iter().fold(0, |sum: i32, &i| sum.wrapping_add(w[a][i] * w[b][i]))
        };
        let of_pairs = |f: &dyn Fn(usize) -> i32| std::array::from_fn(|i| pair(f(2 * i), f(2 * i + 1)));
        // What is halfway is rounded up, and the greatest word is not passed.
        let shifted = |i: usize| (w[12][i] + ((1 << (by % 16)) >> 1)).min(0x7fff) >> (by % 16);
        let packed = |i: usize| if i < LANES { w[13][2 * i] } else { w[14][2 * (i - LANES)] };
        vec![
            ("dot", lanes(&|i| v[0][i].wrapping_add(products(1, 2, i)).wrapping_add(products(3, 4, i)))),
            ("pair", lanes(&|i| pair(w[5][2 * i], w[6][2 * i]))),
            ("shift", lanes(&|i| v[7][i] >> by)),
            ("fold", lanes(&|i| v[i].iter().fold(0, |sum, v| i32::wrapping_add(sum, *v)))),
            ("most", of_pairs(&|i| (w[8][i] & 0xffff).max(w[9][i] & 0x7fff))),
            ("zip low", lanes(&|i| w[10][i] + w[11][i])),
            ("zip high", lanes(&|i| w[10][LANES + i] + w[11][LANES + i])),
            ("shift words", of_pairs(&shifted)),
            ("pack", of_pairs(&packed)),
            ("unit", lanes(&|_| (0..8).fold(0, |bits, i| bits | (w[15][i] & 1) << i))),
        ]
    }

    /// Words, the extreme ones among them.
    fn vectors() -> impl Strategy<Value = Vec<i32>> {
        let word = prop_oneof![4 => any::<i16>(), 1 => proptest::sample::select(vec![i16::MIN, i16::MAX, 0, -1])];
        let lane = (word.clone(), word).prop_map(|(low, high)| pair(i32::from(low), i32::from(high)));
        proptest::collection::vec(lane, LANES * LANES)
    }

    proptest! {
        #![proptest_config(cases(64))]
        /// Exactly.
        #[test]
        fn every_level_does_to_words_what_is_written(lanes in vectors(), by in 0i32..32) {
            let vectors = std::array::from_fn(|i| lanes.as_chunks().0[i]);
            let defined = defined(&vectors, by);
            for level in Level::all() {
                prop_assert_eq!(&compute(level, &vectors, by), &defined, "{:?}", level);
            }
        }
    }
}
