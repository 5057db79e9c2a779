//! How do searches round? As ggml, in a way that compilers vectorise.

/// Sums are kept in this many lanes.
pub(crate) const LANES: usize = 8;

/// The nearest whole number, ties to even, for magnitudes below 2^22: adding 1.5 * 2^23 leaves no bit for a fraction.
pub(crate) fn nearest(value: f32) -> f32 {
    const SHIFT: f32 = 12_582_912.0;
    (value + SHIFT) - SHIFT
}

#[cfg(test)]
mod tests {
    #[test]
    fn ties_go_to_even() {
        for value in [0.0, 0.5, 1.5, 2.5, -0.5, -1.5, 0.499_999_97, 31.5, 4_000_000.5, -127.5] {
            assert_eq!(super::nearest(value), value.round_ties_even(), "{value}");
        }
    }
}
