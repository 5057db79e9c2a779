//! Which model are these KV rows of, and what do these tokens mean?
//!
//! Both are asked of every file at its start, so neither reads all of it: of a weight only the ends are taken. Files
//! that differ nowhere else do not come about by accident, and nobody gains by making one: it would be served the same
//! way.

use super::Program;
use crate::Model;

/// Bytes of a weight that are taken at either end.
const SAMPLE: usize = 256;

impl Program {
    /// Says what the rows of a KV block depend on besides its tokens: the step's operators, the rows' formats and the
    /// weights. Rows of equal programs may take each other's place.
    pub fn fingerprint(&self) -> [u8; 32] {
        let mut hash = blake3::Hasher::new();
        hash.update(self.blob.as_bytes());
        for row in [self.kv.latent, self.kv.rope, self.kv.index] {
            [row.dtype, row.width].into_iter().for_each(|number| number_into(&mut hash, number.into()));
        }
        for weight in &self.weights {
            part_into(&mut hash, weight.name.as_bytes());
            number_into(&mut hash, weight.dtype.into());
            let (bytes, n) = (&weight.bytes, weight.bytes.len().min(SAMPLE));
            number_into(&mut hash, bytes.len() as u64);
            hash.update(&bytes[..n]);
            hash.update(&bytes[bytes.len() - n..]);
        }
        hash.finalize().into()
    }
}

impl Model {
    /// Says which tokens the model has: equal ones mean the same.
    pub fn vocabulary_fingerprint(&self) -> [u8; 32] {
        let mut hash = blake3::Hasher::new();
        let vocab = self.spec().vocab_size;
        number_into(&mut hash, vocab.into());
        if let Some(tokenizer) = self.tokenizer() {
            (0..vocab).for_each(|id| part_into(&mut hash, tokenizer.token_bytes(id)));
        }
        hash.finalize().into()
    }
}

fn number_into(hash: &mut blake3::Hasher, number: u64) {
    hash.update(&number.to_le_bytes());
}

/// With its length, so that two parts do not run together.
fn part_into(hash: &mut blake3::Hasher, part: &[u8]) {
    number_into(hash, part.len() as u64);
    hash.update(part);
}
