//! Q8_0: 32 values as f16 scale d and 32 int8; value = d q.

use half::f16;

pub(crate) fn decode(block: &[u8; 34], values: &mut [f32; 32]) {
    let d = f16::from_le_bytes([block[0], block[1]]).to_f32();
    for (value, q) in values.iter_mut().zip(&block[2..]) {
        *value = f32::from(q.cast_signed()) * d;
    }
}

pub(crate) fn encode(values: &[f32; 32], block: &mut [u8; 34]) {
    let largest = values.iter().fold(0f32, |m, v| m.max(v.abs()));
    let d = largest / 127.0;
    let inverse = if d == 0.0 { 0.0 } else { 1.0 / d };
    block[..2].copy_from_slice(&f16::from_f32(d).to_le_bytes());
    for (q, value) in block[2..].iter_mut().zip(values) {
        #[expect(clippy::cast_possible_truncation, reason = "within -127 ..= 127; NaN becomes 0")]
        let rounded = (value * inverse).round() as i8;
        *q = rounded.cast_unsigned();
    }
}
