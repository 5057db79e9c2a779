//! Which model are these KV rows and this answer of, and what do these tokens mean?
//!
//! All are asked of every file at its start, so none reads all of it: of a weight only the ends are taken. Files
//! that differ nowhere else do not come about by accident, and nobody gains by making one: it would be served the same
//! way.

use super::Program;
use crate::{Model, Tokenizer};

/// Bytes of a weight that are taken at either end.
const SAMPLE: usize = 256;

impl Program {
    /// Says what the rows of a KV block depend on besides its tokens: the step's operators, the rows' formats and the
    /// weights, and the number that the plugin's maker has given to its arithmetic. Rows of equal programs may take
    /// each other's place.
    pub fn fingerprint(&self, arithmetic: u32) -> [u8; 32] {
        let mut hash = blake3::Hasher::new();
        // Who says nothing of it has the rows that there were before there was a number.
        if arithmetic != 0 {
            part_into(&mut hash, b"arithmetic");
            number_into(&mut hash, arithmetic.into());
        }
        hash.update(self.blob.as_bytes());
        for row in [self.kv.latent, self.kv.rope, self.kv.index] {
            [row.dtype, row.width].into_iter().for_each(|number| number_into(&mut hash, number.into()));
        }
        self.weights_into(&mut hash);
        hash.finalize().into()
    }

    /// Says which weights these are, whatever is done with them: equal ones say the same, but for a last bit.
    pub fn weights_fingerprint(&self) -> [u8; 32] {
        let mut hash = blake3::Hasher::new();
        self.weights_into(&mut hash);
        hash.finalize().into()
    }

    fn weights_into(&self, hash: &mut blake3::Hasher) {
        for weight in &self.weights {
            part_into(hash, weight.name.as_bytes());
            number_into(hash, weight.dtype.into());
            let (bytes, n) = (&weight.bytes, weight.bytes.len().min(SAMPLE));
            number_into(hash, bytes.len() as u64);
            hash.update(&bytes[..n]);
            hash.update(&bytes[bytes.len() - n..]);
        }
    }
}

impl Model {
    /// Says which tokens the model has: equal ones mean the same. And as it was said before control tokens, which have
    /// no text, were told apart by their names.
    pub fn vocabulary_fingerprints(&self) -> [[u8; 32]; 2] {
        vocabularies(self.spec().vocab_size, self.tokenizer())
    }
}

fn vocabularies(vocab: u32, tokenizer: Option<&Tokenizer>) -> [[u8; 32]; 2] {
    let mut hash = blake3::Hasher::new();
    number_into(&mut hash, vocab.into());
    let Some(tokenizer) = tokenizer else { return [hash.finalize().into(); 2] };
    (0..vocab).for_each(|id| part_into(&mut hash, tokenizer.token_bytes(id)));
    let before = hash.finalize().into();
    for id in (0..vocab).filter(|&id| tokenizer.token_bytes(id).is_empty()) {
        part_into(&mut hash, tokenizer.token_name(id).unwrap_or_default().as_bytes());
    }
    [hash.finalize().into(), before]
}

fn number_into(hash: &mut blake3::Hasher, number: u64) {
    hash.update(&number.to_le_bytes());
}

/// With its length, so that two parts do not run together.
fn part_into(hash: &mut blake3::Hasher, part: &[u8]) {
    number_into(hash, part.len() as u64);
    hash.update(part);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::bytes_and;

    #[test]
    fn control_tokens_are_told_apart_by_their_names() {
        let of = |names: &[&str]| vocabularies(259, Some(&bytes_and(names)));
        let [a, b] = [of(&["<|user|>", "<|end|>"]), of(&["<|user|>", "<|stop|>"])];
        assert_eq!(a[1], b[1], "as it was said before");
        assert!(a[0] != b[0] && a[0] != a[1], "{a:?}");
        assert_eq!(a, of(&["<|user|>", "<|end|>"]));
    }
}
