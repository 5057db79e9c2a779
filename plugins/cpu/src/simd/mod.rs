//! Which vector instructions does a level have? Sixteen lanes of 32 bits, written once for each instruction set.
//!
//! A kernel is written once over [`Lanes`], [`Products`] of packed codes or [`Words`], and compiled per level by
//! [`on_level`]. Every operation rounds as IEEE says and [`Lanes::mul_add`] rounds once, so a kernel gives the same
//! bits at every level.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;
mod portable;
mod products;
mod words;

#[cfg(target_arch = "x86_64")]
pub(crate) use avx2::Avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) use avx512::Avx512;
#[cfg(target_arch = "aarch64")]
pub(crate) use neon::{Base, Dotprod, I8mm, Neon};
pub(crate) use portable::{Portable, portable_mul_add};
pub(crate) use products::Products;
pub(crate) use words::Words;

/// Lanes of a vector.
pub(crate) const LANES: usize = 16;

/// What is left of a code of e4m3 that was widened with its sign and moved by 7: the sign, exponent and fraction of a
/// half.
const E4M3_IN_HALF: i16 = 0xbf80_u16.cast_signed();

/// Vector instructions. A value of an implementing type is the proof that the CPU has them.
pub(crate) trait Lanes: Copy {
    /// Registers that 16 x f32 fill.
    const REGISTERS: usize;
    /// 16 x f32.
    type F: Copy;
    /// 64 bytes or 16 x i32.
    type I: Copy;

    fn splat(self, v: f32) -> Self::F;
    fn load(self, v: &[f32; LANES]) -> Self::F;
    fn store(self, v: Self::F, to: &mut [f32; LANES]);
    /// 16 x f16, little-endian, widened.
    fn load_half(self, v: &[u8; 2 * LANES]) -> Self::F;
    /// 16 unsigned bytes, widened.
    fn load_bytes(self, v: &[u8; LANES]) -> Self::F;
    /// 16 signed bytes, widened.
    fn load_signed_bytes(self, v: &[u8; LANES]) -> Self::F;
    /// 16 codes of e4m3 as a 256th of their values: moved to their places in a half, whose exponent has that bias. Not
    /// for the codes of NaN.
    fn load_e4m3(self, v: &[u8; LANES]) -> Self::F;
    /// Rounded to nearest even f16, little-endian.
    fn store_half(self, v: Self::F, to: &mut [u8; 2 * LANES]);
    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    fn div(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a b + c`, rounded once.
    fn mul_add(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// The greater; of no use where a NaN may be.
    fn max(self, a: Self::F, b: Self::F) -> Self::F;

    fn splat_i(self, v: i32) -> Self::I;
    fn load_i(self, v: &[u8; 4 * LANES]) -> Self::I;
    /// Asks for the cache line of a byte.
    fn prefetch(self, at: &u8);
    fn store_i(self, v: Self::I, to: &mut [i32; LANES]);
    fn add_i(self, a: Self::I, b: Self::I) -> Self::I;
    /// The greater of signed 32-bit lanes.
    fn max_i(self, a: Self::I, b: Self::I) -> Self::I;
    /// 128 added to each byte: signed bytes become unsigned ones, or those signed ones again.
    fn offset_bytes(self, v: Self::I) -> Self::I;
    /// Bit i: lane i of `a` is above lane i of `b`; a NaN is not.
    fn above(self, a: Self::F, b: Self::F) -> u16;
    /// The high half of each byte, as a byte.
    fn high_nibbles(self, v: Self::I) -> Self::I;
    /// The low half of each byte.
    fn low_nibbles(self, v: Self::I) -> Self::I;
    /// Per byte: `nibbles` plus 16 times bit `at` of `fifth`.
    fn with_fifth_bit(self, nibbles: Self::I, fifth: Self::I, at: usize) -> Self::I;
    /// Per byte: `nibbles` plus 16 times the two bits from bit `2 at` of `upper` on.
    fn with_upper_bits(self, nibbles: Self::I, upper: Self::I, at: usize) -> Self::I;
    /// The signed byte that is nearest to each 32-bit lane divided by 256, and what is left, again a signed byte, of 32
    /// values from -32639 to 32639 in order.
    fn split_bytes(self, low: Self::I, high: Self::I) -> ([u8; 2 * LANES], [u8; 2 * LANES]);
    fn to_float(self, v: Self::I) -> Self::F;
    /// To the nearest even integer; NaN and what does not fit is unspecified.
    fn round(self, v: Self::F) -> Self::I;
    /// The bits of the absolute value: order as integers is order as magnitudes, NaN above infinity.
    fn magnitude_bits(self, v: Self::F) -> Self::I;
    /// 2 to the power of each lane (an integer from -126 to 127).
    fn power_of_two(self, v: Self::F) -> Self::F;
    /// Each lane of `v` times 2 to the power of that of `power`, an integer from -126 to 127.
    #[inline(always)]
    fn times_power_of_two(self, v: Self::F, power: Self::F) -> Self::F {
        self.mul(v, self.power_of_two(power))
    }
    /// Rounded to integers, ties to even; for magnitudes below 2^22.
    fn round_f(self, v: Self::F) -> Self::F;

    /// The first half of [`Self::sums`] for four vectors, for [`Self::finish`].
    fn fold(self, vectors: &[Self::F; 4]) -> Self::F;
    /// The other half: lane 4 i + j is the sum of the i-th of the vectors that became `folded[j]`.
    fn finish(self, folded: &[Self::F; 4]) -> Self::F;

    /// Lane i: the sum of vector i, its lanes added as a tree: lane i + 8 to lane i, then i + 4, i + 2, i + 1.
    #[inline(always)]
    fn sums(self, vectors: &[Self::F; LANES]) -> Self::F {
        let mut folded = [vectors[0]; 4];
        for (j, folded) in folded.iter_mut().enumerate() {
            *folded = self.fold(&[vectors[j], vectors[j + 4], vectors[j + 8], vectors[j + 12]]);
        }
        self.finish(&folded)
    }

    /// Lane i: the greatest lane of vector i; of no use where a NaN may be.
    #[inline(always)]
    fn maxima(self, vectors: &[Self::F; LANES]) -> Self::F {
        let mut most = [0.0; LANES];
        for (most, v) in most.iter_mut().zip(vectors) {
            *most = self.largest(*v);
        }
        self.load(&most)
    }

    /// Vector i: lane i of all vectors.
    #[inline(always)]
    fn transpose(self, vectors: &[Self::F; LANES]) -> [Self::F; LANES] {
        let (mut from, mut to) = ([[0.0; LANES]; LANES], [[0.0; LANES]; LANES]);
        for (from, v) in from.iter_mut().zip(vectors) {
            self.store(*v, from);
        }
        for (i, to) in to.iter_mut().enumerate() {
            for (from, to) in from.iter().zip(to) {
                *to = from[i];
            }
        }
        let mut out = *vectors;
        for (out, to) in out.iter_mut().zip(&to) {
            *out = self.load(to);
        }
        out
    }

    /// The greatest of the lanes; of no use where a NaN may be.
    #[inline(always)]
    fn largest(self, v: Self::F) -> f32 {
        let mut lanes = [0.0; LANES];
        self.store(v, &mut lanes);
        lanes.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }
}

/// Compiles the generic `$body::<Lanes, ..>(lanes, ..)` once per level and chooses among them at run time.
macro_rules! on_level {
    (
        $(#[$meta:meta])*
        fn $name:ident $(<$(const $n:ident: $nt:ty),+>)? ($($arg:ident: $kind:ty),* $(,)?) $(-> $out:ty)? = $body:ident
    ) => {
        $(#[$meta])*
        pub(crate) fn $name $(<$(const $n: $nt),+>)? (level: $crate::level::Level, $($arg: $kind),*) $(-> $out)? {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2,fma,f16c")]
                fn avx2 $(<$(const $n: $nt),+>)? ($($arg: $kind),*) $(-> $out)? {
                    // SAFETY: this function is compiled for, and only called with, these features.
                    $body::<_ $($(, $n)+)?>(unsafe { $crate::simd::Avx2::assume() }, $($arg),*)
                }
                #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
                fn avx512 $(<$(const $n: $nt),+>)? ($($arg: $kind),*) $(-> $out)? {
                    // SAFETY: as above.
                    $body::<_ $($(, $n)+)?>(unsafe { $crate::simd::Avx512::assume() }, $($arg),*)
                }
                match level {
                    // SAFETY: a Level above Scalar exists only where the CPU has its instructions.
                    $crate::level::Level::Avx2 => return unsafe { avx2 $(::<$($n),+>)? ($($arg),*) },
                    // SAFETY: as above.
                    $crate::level::Level::Avx512 => return unsafe { avx512 $(::<$($n),+>)? ($($arg),*) },
                    _ => {}
                }
            }
            #[cfg(target_arch = "aarch64")]
            {
                fn neon $(<$(const $n: $nt),+>)? ($($arg: $kind),*) $(-> $out)? {
                    // SAFETY: NEON is part of the target.
                    $body::<_ $($(, $n)+)?>(unsafe { $crate::simd::Neon::<$crate::simd::Base>::assume() }, $($arg),*)
                }
                #[target_feature(enable = "dotprod")]
                fn dotprod $(<$(const $n: $nt),+>)? ($($arg: $kind),*) $(-> $out)? {
                    // SAFETY: this function is compiled for, and only called with, this feature.
                    let lanes = unsafe { $crate::simd::Neon::<$crate::simd::Dotprod>::assume() };
                    $body::<_ $($(, $n)+)?>(lanes, $($arg),*)
                }
                #[target_feature(enable = "dotprod,i8mm")]
                fn i8mm $(<$(const $n: $nt),+>)? ($($arg: $kind),*) $(-> $out)? {
                    // SAFETY: as above.
                    $body::<_ $($(, $n)+)?>(unsafe { $crate::simd::Neon::<$crate::simd::I8mm>::assume() }, $($arg),*)
                }
                match level {
                    $crate::level::Level::Neon => return neon $(::<$($n),+>)? ($($arg),*),
                    // SAFETY: a Level above Scalar exists only where the CPU has its instructions.
                    $crate::level::Level::Dotprod => return unsafe { dotprod $(::<$($n),+>)? ($($arg),*) },
                    // SAFETY: as above.
                    $crate::level::Level::I8mm => return unsafe { i8mm $(::<$($n),+>)? ($($arg),*) },
                    _ => {}
                }
            }
            let _ = level;
            $body::<_ $($(, $n)+)?>($crate::simd::Portable, $($arg),*)
        }
    };
}
pub(crate) use on_level;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::inputs::{bits, cases, values};
    use crate::level::Level;
    use proptest::prelude::*;
    use sparsed_quant::{Format, decode};

    on_level! {
        fn e4m3(codes: &[u8], to: &mut [f32]) = e4m3_body
    }

    #[inline(always)]
    fn e4m3_body<L: Lanes>(l: L, codes: &[u8], to: &mut [f32]) {
        let vectors = codes.as_chunks().0.iter().zip(to.as_chunks_mut().0);
        vectors.for_each(|(codes, to)| l.store(l.mul(l.load_e4m3(codes), l.splat(256.0)), to));
    }

    #[test]
    fn every_level_reads_every_code_of_e4m3_as_the_decoder_does() {
        let codes: Vec<u8> = (0..=255).collect();
        let (mut expected, mut found) = ([0.0; 256], [0.0; 256]);
        decode(Format::F8E4M3, &codes, &mut expected).unwrap();
        for level in Level::all() {
            e4m3(level, &codes, &mut found);
            let same = |code: usize| found[code].to_bits() == expected[code].to_bits() || expected[code].is_nan();
            assert_eq!((0..256).find(|code| !same(*code)), None, "{level:?}");
        }
    }

    /// By name, lanes that came out.
    type Floats = Vec<(&'static str, Vec<[f32; LANES]>)>;
    type Ints = Vec<(&'static str, [i32; LANES])>;

    on_level! {
        fn floats(vectors: &[[f32; LANES]; LANES]) -> Floats = floats_body
    }

    #[inline(always)]
    fn floats_body<L: Lanes>(l: L, vectors: &[[f32; LANES]; LANES]) -> Floats {
        let v = vectors.map(|v| l.load(&v));
        let mut halves = [0; 2 * LANES];
        l.store_half(v[7], &mut halves);
        let powers = l.round_f(l.mul(v[9], l.splat(40.0)));
        // Which zero is the greater of two is not said.
        let no_sign = |v: L::F| l.add(v, l.splat(0.0));
        let found = [
            ("add", vec![l.add(v[0], v[1])]),
            ("sub", vec![l.sub(v[0], v[1])]),
            ("mul", vec![l.mul(v[0], v[1])]),
            ("div", vec![l.div(v[0], v[1])]),
            ("mul_add", vec![l.mul_add(v[2], v[3], v[4])]),
            ("max", vec![no_sign(l.max(v[5], v[6]))]),
            ("halves", vec![l.load_half(&halves)]),
            ("round_f", vec![l.round_f(l.mul(v[8], l.splat(1000.5)))]),
            ("power_of_two", vec![l.power_of_two(powers)]),
            ("times_power_of_two", vec![l.times_power_of_two(v[10], powers)]),
            ("sums", vec![l.sums(&v)]),
            ("maxima", vec![no_sign(l.maxima(&v))]),
            ("largest", vec![no_sign(l.splat(l.largest(v[11])))]),
            ("transpose", l.transpose(&v).to_vec()),
        ];
        let stored = |v: &L::F| {
            let mut to = [0.0; LANES];
            l.store(*v, &mut to);
            to
        };
        found.iter().map(|(name, v)| (*name, v.iter().map(stored).collect())).collect()
    }

    on_level! {
        fn ints(bytes: &[[u8; 4 * LANES]; 4], floats: &[[f32; LANES]; 2]) -> Ints = ints_body
    }

    #[inline(always)]
    fn ints_body<L: Lanes>(l: L, bytes: &[[u8; 4 * LANES]; 4], floats: &[[f32; LANES]; 2]) -> Ints {
        let [a, b, c, d] = bytes.map(|bytes| l.load_i(&bytes));
        let [x, y] = floats.map(|v| l.load(&v));
        // What is split is a code of 16 bits.
        let code = |v: L::F| l.round(l.mul(v, l.splat(32639.0 / 3.0)));
        let (high, low) = l.split_bytes(code(x), code(y));
        let (nibbles, halves) = (l.low_nibbles(a), bytes[0].as_chunks().0);
        let mut found = vec![
            ("add_i", l.add_i(a, b)),
            ("max_i", l.max_i(a, b)),
            ("offset_bytes", l.offset_bytes(a)),
            ("above", l.splat_i(i32::from(l.above(x, y)))),
            ("high_nibbles", l.high_nibbles(a)),
            ("low_nibbles", nibbles),
            ("round", code(x)),
            ("magnitude_bits", l.magnitude_bits(x)),
            ("high bytes", l.load_i(&[high, low].concat().as_chunks().0[0])),
            ("bytes", l.round(l.load_bytes(&halves[1]))),
            ("signed bytes", l.round(l.load_signed_bytes(&halves[1]))),
            ("to_float", l.magnitude_bits(l.to_float(d))),
        ];
        found.extend((0..8).map(|at| ("fifth bit", l.with_fifth_bit(nibbles, b, at))));
        found.extend((0..4).map(|at| ("upper bits", l.with_upper_bits(nibbles, c, at))));
        let stored = |(name, v)| {
            let mut to = [0; LANES];
            l.store_i(v, &mut to);
            (name, to)
        };
        found.into_iter().map(stored).collect()
    }

    proptest! {
        #![proptest_config(cases(64))]
        /// The same bits.
        #[test]
        fn every_level_does_to_lanes_what_portable_rust_does(
            inputs in values(3.0), bytes in proptest::collection::vec(any::<u8>(), 16 * LANES),
        ) {
            let mut row = inputs.rows();
            let vectors: [[f32; LANES]; LANES] = std::array::from_fn(|_| row(LANES).as_chunks().0[0]);
            let bytes: [[u8; 4 * LANES]; 4] = std::array::from_fn(|i| bytes.as_chunks().0[i]);
            let pair = [vectors[0], vectors[1]];
            let expected = (floats(Level::Scalar, &vectors), ints(Level::Scalar, &bytes, &pair));
            for level in Level::all() {
                for ((name, found), (_, expected)) in floats(level, &vectors).iter().zip(&expected.0) {
                    let (found, expected) = (found.as_flattened(), expected.as_flattened());
                    prop_assert_eq!(bits(found), bits(expected), "{:?}, {}", level, name);
                }
                prop_assert_eq!(&ints(level, &bytes, &pair), &expected.1, "{:?}", level);
            }
        }
    }
}
