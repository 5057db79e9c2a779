//! What does one step carry? Tokens of several sequences side by side, in the arrays that a plugin reads.

use sparsed_abi::{Blob, StepArrays};
use sparsed_kv::BlockTable;

/// One step's work. Sequences are added one after another; the vectors are kept from step to step.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    pub(crate) tokens: Vec<u32>,
    pub(crate) positions: Vec<u32>,
    pub(crate) slots: Vec<u64>,
    pub(crate) seq_offsets: Vec<u32>,
    pub(crate) contexts: Vec<u32>,
    pub(crate) block_offsets: Vec<u32>,
    pub(crate) block_ids: Vec<u32>,
    pub(crate) rows: Vec<u32>,
}

/// Which rows of a sequence's tokens give logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rows {
    /// None: the sequence's prompt goes on in a later step.
    None,
    /// The last: the next token is to be sampled.
    Last,
    /// Every one.
    All,
}

impl Batch {
    /// Empties the batch.
    pub fn clear(&mut self) {
        for list in [&mut self.tokens, &mut self.positions, &mut self.contexts, &mut self.block_ids, &mut self.rows] {
            list.clear();
        }
        self.slots.clear();
        self.seq_offsets.clear();
        self.seq_offsets.push(0);
        self.block_offsets.clear();
        self.block_offsets.push(0);
    }

    /// Adds the next tokens of one sequence, whose `table` has been given the slots `slots` for them.
    ///
    /// # Panics
    /// When there are not as many slots as tokens, or none.
    pub fn push(&mut self, tokens: &[u32], slots: &[u64], table: &BlockTable, rows: Rows) {
        assert!(!tokens.is_empty() && tokens.len() == slots.len(), "{} tokens, {} slots", tokens.len(), slots.len());
        if self.seq_offsets.is_empty() {
            self.clear();
        }
        let start = count(self.tokens.len());
        self.tokens.extend_from_slice(tokens);
        self.slots.extend_from_slice(slots);
        let end = count(self.tokens.len());
        let context = table.n_tokens();
        self.positions.extend(context - (end - start)..context);
        self.seq_offsets.push(end);
        self.contexts.push(context);
        self.block_ids.extend(table.blocks().iter().map(|block| block.0));
        self.block_offsets.push(count(self.block_ids.len()));
        match rows {
            Rows::None => {}
            Rows::Last => self.rows.push(end - 1),
            Rows::All => self.rows.extend(start..end),
        }
    }

    /// Tokens of the step.
    pub fn n_tokens(&self) -> usize {
        self.tokens.len()
    }

    /// Rows that give logits.
    pub fn n_rows(&self) -> usize {
        self.rows.len()
    }

    /// Position of each token in its sequence.
    pub fn positions(&self) -> &[u32] {
        &self.positions
    }

    /// The step as a plugin reads it.
    pub(crate) fn encode(&self, step_id: u64) -> Blob {
        let step = StepArrays {
            step_id,
            flags: 0,
            tokens: &self.tokens,
            positions: &self.positions,
            slots: &self.slots,
            seq_offsets: &self.seq_offsets,
            contexts: &self.contexts,
            block_offsets: &self.block_offsets,
            block_ids: &self.block_ids,
            rows: &self.rows,
        };
        step.encode()
    }
}

fn count(n: usize) -> u32 {
    u32::try_from(n).expect("a step has far fewer than 2^32 tokens and blocks")
}
