//! How does a tensor become the one that was asked for? Rows are cut out and transposed, experts put one after another.
//! In outline the answer has its format and dimensions and no bytes.

use super::Tensor;
use crate::ModelError;
use bytes::Bytes;
use sparsed_quant::Format;

/// `kv_b` `[rank, heads (nope + value)]`, measured: rows per head, bytes per row.
fn measure(name: &str, kv_b: &Tensor, rank: u32, part: u32, heads: u32) -> Result<(usize, usize), ModelError> {
    let refuse = || {
        let reason = format!("attn_kv_b has dimensions {:?}: no {heads} heads of more than {part} rows", kv_b.dims);
        ModelError::Tensor { name: name.to_owned(), reason }
    };
    let &[width, rows] = &kv_b.dims[..] else { return Err(refuse()) };
    if width != u64::from(rank) || heads == 0 || !rows.is_multiple_of(heads.into()) {
        return Err(refuse());
    }
    let per_head = usize::try_from(rows / u64::from(heads)).ok().filter(|&n| n > part as usize).ok_or_else(refuse)?;
    let quant = |source| ModelError::Quant { name: name.to_owned(), source };
    Ok((per_head, kv_b.format.row_bytes(rank as usize).map_err(quant)?))
}

/// The value part of each head: its last `value` rows, `[rank, value, heads]`.
pub(super) fn value_part(
    name: &str,
    kv_b: &Tensor,
    [rank, value, heads]: [u32; 3],
    outline: bool,
) -> Result<Tensor, ModelError> {
    let (per_head, row) = measure(name, kv_b, rank, value, heads)?;
    let dims = vec![rank.into(), value.into(), heads.into()];
    if outline {
        return Ok(Tensor { format: kv_b.format, dims, bytes: Bytes::new() });
    }
    let skipped = (per_head - value as usize) * row;
    let bytes: Vec<u8> = kv_b.bytes.chunks_exact(per_head * row).flat_map(|head| &head[skipped..]).copied().collect();
    Ok(Tensor { format: kv_b.format, dims, bytes: bytes.into() })
}

/// The key part of each head: its first `nope` rows, transposed, `[nope, rank, heads]`. Block formats hold rows, not
/// columns, so they become F32.
pub(super) fn key_part(
    name: &str,
    kv_b: &Tensor,
    [nope, rank, heads]: [u32; 3],
    outline: bool,
) -> Result<Tensor, ModelError> {
    let plain = matches!(kv_b.format, Format::F32 | Format::F16 | Format::BF16);
    let dims = vec![nope.into(), rank.into(), heads.into()];
    if outline {
        measure(name, kv_b, rank, nope, heads)?;
        let format = if plain { kv_b.format } else { Format::F32 };
        return Ok(Tensor { format, dims, bytes: Bytes::new() });
    }
    let single;
    let kv_b = if plain {
        kv_b
    } else {
        single = kv_b.clone().single(name)?;
        &single
    };
    let (per_head, row) = measure(name, kv_b, rank, nope, heads)?;
    let size = kv_b.format.block_bytes();
    let mut bytes = Vec::with_capacity(nope as usize * row * heads as usize);
    for head in kv_b.bytes.chunks_exact(per_head * row) {
        for column in 0..rank as usize {
            let values = head.chunks_exact(row).take(nope as usize);
            bytes.extend(values.flat_map(|values| &values[column * size..(column + 1) * size]));
        }
    }
    Ok(Tensor { format: kv_b.format, dims, bytes: bytes.into() })
}

/// Matrices of one shape as one tensor; in F32 where their formats differ.
pub(super) fn stack(name: &str, parts: Vec<Tensor>, outline: bool) -> Result<Tensor, ModelError> {
    let count = parts.len() as u64;
    let mixed = parts.iter().any(|part| part.format != parts[0].format);
    if let (true, Some(first)) = (outline, parts.first()) {
        let format = if mixed { Format::F32 } else { first.format };
        let dims = first.dims.iter().copied().chain([count]).collect();
        return Ok(Tensor { format, dims, bytes: Bytes::new() });
    }
    let parts = if mixed { parts.into_iter().map(|part| part.single(name)).collect::<Result<_, _>>()? } else { parts };
    let first = parts.first().ok_or_else(|| ModelError::Tensor { name: name.to_owned(), reason: "is empty".into() })?;
    let (format, mut dims) = (first.format, first.dims.clone());
    dims.push(count);
    let mut bytes = Vec::with_capacity(parts.iter().map(|part| part.bytes.len()).sum());
    for part in parts {
        bytes.extend_from_slice(&part.bytes);
    }
    Ok(Tensor { format, dims, bytes: bytes.into() })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 2 heads, each 2 key rows and 1 value row of 3: value = 100 head + 10 row + column.
    fn kv_b(format: Format, rank: u32) -> Tensor {
        let value =
            |head: u32, row: u32, column: u32| f32::from(u16::try_from(100 * head + 10 * row + column).unwrap());
        let values: Vec<f32> = (0..2)
            .flat_map(|head| (0..3).flat_map(move |row| (0..rank).map(move |column| value(head, row, column))))
            .collect();
        let mut bytes = vec![0; format.row_bytes(rank as usize).unwrap() * 6];
        sparsed_quant::encode(format, &values, &mut bytes).unwrap();
        Tensor { format, dims: vec![rank.into(), 6], bytes: bytes.into() }
    }

    #[test]
    fn heads_are_split_into_a_transposed_key_and_a_plain_value() {
        for format in [Format::F32, Format::F16, Format::BF16] {
            let key = key_part("k", &kv_b(format, 3), [2, 3, 2], false).unwrap();
            assert_eq!((key.format, &key.dims[..]), (format, &[2, 3, 2][..]));
            let wanted = [0., 10., 1., 11., 2., 12., 100., 110., 101., 111., 102., 112.];
            // bf16 keeps 8 bits: 111 and the like are exact.
            assert_eq!(key.values("k").unwrap(), wanted);
            let value = value_part("v", &kv_b(format, 3), [3, 1, 2], false).unwrap();
            assert_eq!(
                (&value.dims[..], value.values("v").unwrap()),
                (&[3, 1, 2][..], vec![20., 21., 22., 120., 121., 122.])
            );
        }
    }

    #[test]
    fn blocks_are_decoded_for_the_key_and_copied_for_the_value() {
        let all = kv_b(Format::Q8_0, 32);
        let decoded = all.values("kv").unwrap();
        let key = key_part("k", &all, [2, 32, 2], false).unwrap();
        assert_eq!(key.format, Format::F32);
        assert_eq!(key.values("k").unwrap()[2 * 5 + 1].to_bits(), decoded[32 + 5].to_bits());
        let value = value_part("v", &all, [32, 1, 2], false).unwrap();
        assert_eq!((value.format, &value.bytes[..34]), (Format::Q8_0, &all.bytes[2 * 34..3 * 34]));
    }

    #[test]
    fn widths_that_do_not_fit_are_refused() {
        let all = kv_b(Format::F32, 3);
        for (rank, part, heads) in [(4, 2, 2), (3, 3, 2), (3, 2, 4), (3, 2, 0)] {
            assert!(
                key_part("k", &all, [part, rank, heads], false).is_err()
                    && value_part("v", &all, [rank, part, heads], false).is_err()
            );
        }
    }

    #[test]
    fn experts_of_different_formats_are_stacked_in_single_precision() {
        let part = |format: Format| Tensor { format, ..kv_b(format, 3) };
        let same = stack("e", vec![part(Format::F16), part(Format::F16)], false).unwrap();
        assert_eq!((same.format, &same.dims[..]), (Format::F16, &[3, 6, 2][..]));
        let mixed = stack("e", vec![part(Format::F16), part(Format::F32)], false).unwrap();
        assert_eq!((mixed.format, mixed.values("e").unwrap()), (Format::F32, same.values("e").unwrap()));
        assert!(stack("e", Vec::new(), false).is_err());
    }
}
