//! MXFP4: 32 values as a power of two and 16 bytes of nibbles, the low ones first; value = 2^(e - 128) F[q].
//!
//! F is twice the e2m1 value, so that it is whole; the halved power makes up for it. OCP Microscaling Formats 1.0, but
//! e = 255, NaN there, is a number here as in ggml.

/// Twice the value of an e2m1 code.
const DOUBLED: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

pub(crate) fn decode(block: &[u8; 17], values: &mut [f32; 32]) {
    let d = half_power(block[0]);
    let (low, high) = values.split_at_mut(16);
    for ((low, high), byte) in low.iter_mut().zip(high).zip(&block[1..]) {
        *low = f32::from(DOUBLED[usize::from(byte & 15)]) * d;
        *high = f32::from(DOUBLED[usize::from(byte >> 4)]) * d;
    }
}

/// 2^(e - 128); below 2^-126 single precision is subnormal.
fn half_power(e: u8) -> f32 {
    f32::from_bits(if e < 2 { 0x0020_0000 << e } else { u32::from(e - 1) << 23 })
}

#[cfg(test)]
mod tests {
    #[test]
    fn powers_of_two_are_exact_down_to_the_subnormal_ones() {
        for e in 0..=255u8 {
            let exact = 2f64.powi(i32::from(e) - 128);
            assert_eq!(f64::from(super::half_power(e)), exact, "e = {e}");
        }
    }
}
