//! How are numbers named on the border? ggml's ids where ggml has one; ours begin at 128.

pub const DT_F32: u32 = 0;
pub const DT_F16: u32 = 1;
pub const DT_Q4_0: u32 = 2;
pub const DT_Q4_1: u32 = 3;
pub const DT_Q5_0: u32 = 6;
pub const DT_Q5_1: u32 = 7;
pub const DT_Q8_0: u32 = 8;
pub const DT_Q2_K: u32 = 10;
pub const DT_Q3_K: u32 = 11;
pub const DT_Q4_K: u32 = 12;
pub const DT_Q5_K: u32 = 13;
pub const DT_Q6_K: u32 = 14;
pub const DT_IQ4_NL: u32 = 20;
pub const DT_IQ4_XS: u32 = 23;
pub const DT_I32: u32 = 26;
pub const DT_BF16: u32 = 30;
pub const DT_MXFP4: u32 = 39;
pub const DT_F8E4M3: u32 = 129;
pub const DT_W16: u32 = 130;
pub const DT_F8_128: u32 = 131;
pub const DT_Q6_0: u32 = 132;

/// The bit of `dtype` in a dtype bitmap, as (word, mask); `None` past the bitmap.
pub const fn dtype_bit(dtype: u32) -> Option<(usize, u64)> {
    let word = (dtype / 64) as usize;
    if word < crate::DTYPE_WORDS { Some((word, 1 << (dtype % 64))) } else { None }
}
