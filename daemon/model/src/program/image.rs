//! Where do rows lie in a block's host image? For each index layer and token the index row, then for each layer and
//! token the latent row and the rope row, with nothing in between: `spd_kv_info` of the plugin's header.

use super::{KvShape, bad_row, row_bytes, row_format};
use crate::ModelError;
use sparsed_abi::SpdRow;
use sparsed_quant::decode;

/// What attention reads of one layer, a row for each token.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LayerRows {
    /// `[tokens, kv_lora_rank]`
    pub latent: Vec<f32>,
    /// `[tokens, rope_row]`
    pub rope: Vec<f32>,
}

impl KvShape {
    /// Appends the first `n_tokens` tokens of layer `layer` to `rows`, out of the host image of a block of
    /// `block_tokens` tokens.
    ///
    /// # Errors
    /// A layer or tokens that the image does not have, or rows of an unknown format.
    pub fn decode_image(
        &self,
        image: &[u8],
        block_tokens: usize,
        layer: u32,
        n_tokens: usize,
        rows: &mut LayerRows,
    ) -> Result<(), ModelError> {
        let (latent, rope) = (row_bytes(self.latent)?, row_bytes(self.rope)?);
        let index = row_bytes(self.index)? * self.n_index_layers as usize * block_tokens;
        let start = index + layer as usize * block_tokens * (latent + rope);
        let inside = layer < self.n_layers && n_tokens <= block_tokens;
        let bytes = Some(start..start + n_tokens * (latent + rope)).filter(|_| inside);
        let bytes = bytes.and_then(|range| image.get(range)).ok_or_else(|| ModelError::Tensor {
            name: "a KV block's image".to_owned(),
            reason: format!("{n_tokens} tokens of layer {layer} are not in its {} bytes", image.len()),
        })?;
        for token in bytes.chunks_exact((latent + rope).max(1)) {
            let (latent_bytes, rope_bytes) = token.split_at(latent);
            append(self.latent, latent_bytes, &mut rows.latent)?;
            append(self.rope, rope_bytes, &mut rows.rope)?;
        }
        Ok(())
    }
}

fn append(row: SpdRow, bytes: &[u8], values: &mut Vec<f32>) -> Result<(), ModelError> {
    let start = values.len();
    values.resize(start + row.width as usize, 0.0);
    decode(row_format(row)?, bytes, &mut values[start..]).map_err(bad_row)
}

#[cfg(test)]
mod tests {
    use super::*;
    use sparsed_abi::{DT_F32, DT_Q8_0};
    use sparsed_quant::{Format, encode};

    /// Two layers, one index layer, blocks of 2 tokens; every value says where it is.
    fn image() -> (KvShape, Vec<u8>) {
        let row = |dtype, width| SpdRow { dtype, width };
        let (latent, rope, index) = (row(DT_Q8_0, 32), row(DT_F32, 2), row(DT_F32, 3));
        let shape = KvShape { n_layers: 2, n_index_layers: 1, latent, rope, index };
        let mut image = vec![0xff; 2 * 3 * 4];
        for n in 0..4u8 {
            let mut row = [0; 34];
            encode(Format::Q8_0, &[f32::from(n); 32], &mut row).unwrap();
            image.extend(row);
            image.extend([f32::from(n) + 0.5, f32::from(n) + 0.25].map(f32::to_le_bytes).concat());
        }
        (shape, image)
    }

    #[test]
    fn a_layer_is_read_past_the_index_plane_and_the_layers_before_it() {
        let (shape, image) = image();
        let mut rows = LayerRows::default();
        shape.decode_image(&image, 2, 1, 2, &mut rows).unwrap();
        assert_eq!(rows.rope, [2.5, 2.25, 3.5, 3.25]);
        assert_eq!(rows.latent.iter().map(|value| value.round()).collect::<Vec<_>>(), [[2.0; 32], [3.0; 32]].concat());
        shape.decode_image(&image, 2, 0, 1, &mut rows).unwrap();
        assert_eq!((&rows.rope[4..], rows.latent.len()), (&[0.5, 0.25][..], 96), "rows are appended");
    }

    #[test]
    fn what_an_image_does_not_hold_is_an_error() {
        let (shape, image) = image();
        let decode = |image: &[u8], layer, n| shape.decode_image(image, 2, layer, n, &mut LayerRows::default());
        assert!(decode(&image, 1, 2).is_ok());
        for (image, layer, n) in [(&image[..], 2, 1), (&image, 0, 3), (&image[..image.len() - 1], 1, 2), (&[], 0, 1)] {
            assert!(matches!(decode(image, layer, n), Err(ModelError::Tensor { .. })), "{layer} {n}");
        }
    }
}
