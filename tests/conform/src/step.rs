//! What does a step of a check work on?

use sparsed_abi::{Blob, Layout, SpdStep, StepArrays};

/// A sequence's part in a step.
#[derive(Clone, Debug)]
pub(crate) struct Sequence {
    /// The blocks of its context, the first first; empty where there is no pool.
    pub(crate) blocks: Vec<u32>,
    /// Tokens in the cache before the step.
    pub(crate) first: u32,
    /// Tokens of the step.
    pub(crate) n: u32,
}

impl Sequence {
    /// The same blocks, with the last `n` tokens of its context as the step's.
    pub(crate) fn last(&self, n: u32) -> Self {
        let end = self.first + self.n;
        let n = n.min(end);
        Self { blocks: self.blocks.clone(), first: end - n, n }
    }
}

/// The arrays of a step.
#[derive(Clone, Debug, Default)]
pub(crate) struct Step {
    pub(crate) flags: u32,
    pub(crate) tokens: Vec<u32>,
    pub(crate) positions: Vec<u32>,
    pub(crate) slots: Vec<u64>,
    pub(crate) seq_offsets: Vec<u32>,
    pub(crate) contexts: Vec<u32>,
    pub(crate) block_offsets: Vec<u32>,
    pub(crate) block_ids: Vec<u32>,
    pub(crate) rows: Vec<u32>,
}

impl Step {
    /// These sequences; token ids are 0, the last token of each sequence needs logits.
    pub(crate) fn over(sequences: &[Sequence], block_tokens: u32) -> Self {
        let mut step = Self { seq_offsets: vec![0], block_offsets: vec![0], ..Self::default() };
        for sequence in sequences {
            for position in sequence.first..sequence.first + sequence.n {
                let slot = match sequence.blocks.get((position / block_tokens) as usize) {
                    Some(&block) => u64::from(block) * u64::from(block_tokens) + u64::from(position % block_tokens),
                    None => u64::from(position),
                };
                step.tokens.push(0);
                step.positions.push(position);
                step.slots.push(slot);
            }
            let tokens = count(step.tokens.len());
            if sequence.n > 0 {
                step.rows.push(tokens - 1);
            }
            step.seq_offsets.push(tokens);
            step.contexts.push(sequence.first + sequence.n);
            step.block_ids.extend_from_slice(&sequence.blocks);
            step.block_offsets.push(count(step.block_ids.len()));
        }
        step
    }

    /// Sequences of `lengths` tokens from position 0, without a pool.
    pub(crate) fn without_pool(lengths: &[u32]) -> Self {
        let sequences: Vec<_> = lengths.iter().map(|&n| Sequence { blocks: Vec::new(), first: 0, n }).collect();
        Self::over(&sequences, 1)
    }

    pub(crate) fn encode(&self) -> Blob {
        StepArrays {
            step_id: 1,
            flags: self.flags,
            tokens: &self.tokens,
            positions: &self.positions,
            slots: &self.slots,
            seq_offsets: &self.seq_offsets,
            contexts: &self.contexts,
            block_offsets: &self.block_offsets,
            block_ids: &self.block_ids,
            rows: &self.rows,
        }
        .encode()
    }

    /// As a newer minor writes it: eight bytes more in the header, the last of them `last`.
    pub(crate) fn encode_newer(&self, last: u8) -> Blob {
        const MORE: usize = 8;
        let (old, header) = (self.encode(), size_of::<SpdStep>());
        let mut bytes = old.as_bytes()[..header].to_vec();
        bytes.resize(header + MORE, 0);
        bytes[header + MORE - 1] = last;
        bytes.extend_from_slice(&old.as_bytes()[header..]);
        let moves = |name: &str| name.ends_with("_offset") || ["struct_size", "total_size"].contains(&name);
        for field in SpdStep::LAYOUT.fields.iter().filter(|field| moves(field.name)) {
            let at = field.offset..field.offset + 4;
            let value = u32::from_le_bytes(bytes[at.clone()].try_into().expect("four bytes"));
            bytes[at].copy_from_slice(&(value + 8).to_le_bytes());
        }
        Blob::copied(&bytes)
    }

    /// The sequence of each token.
    pub(crate) fn seq_of(&self) -> Vec<usize> {
        let ranges = self.seq_offsets.windows(2).enumerate();
        ranges.flat_map(|(seq, range)| (range[0]..range[1]).map(move |_| seq)).collect()
    }
}

fn count(n: usize) -> u32 {
    u32::try_from(n).expect("steps of checks are small")
}
