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

    /// Makes `one` a step of sequence `index` alone, with the same slots and rows.
    pub(crate) fn isolate(&self, index: usize, one: &mut Self) {
        let range = |offsets: &[u32]| offsets[index] as usize..offsets[index + 1] as usize;
        let (tokens, blocks) = (range(&self.seq_offsets), range(&self.block_offsets));
        one.clear();
        one.tokens.extend_from_slice(&self.tokens[tokens.clone()]);
        one.positions.extend_from_slice(&self.positions[tokens.clone()]);
        one.slots.extend_from_slice(&self.slots[tokens.clone()]);
        one.contexts.push(self.contexts[index]);
        one.block_ids.extend_from_slice(&self.block_ids[blocks]);
        one.seq_offsets.push(count(tokens.len()));
        one.block_offsets.push(count(one.block_ids.len()));
        let rows = self.rows.iter().map(|&row| row as usize).filter(|row| tokens.contains(row));
        one.rows.extend(rows.map(|row| count(row - tokens.start)));
    }

    /// The sequence of each row that gives logits.
    pub(crate) fn row_sequences(&self) -> impl Iterator<Item = usize> {
        self.rows.iter().map(|row| self.seq_offsets.partition_point(|start| start <= row) - 1)
    }

    /// Sequences of the step.
    pub(crate) fn n_sequences(&self) -> usize {
        self.contexts.len()
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

#[cfg(test)]
mod tests {
    use super::*;
    use sparsed_kv::Pool;

    #[test]
    fn a_sequence_alone_is_what_it_is_in_company() {
        let mut pool = Pool::new(8);
        let (mut all, mut one, mut expected) = (Batch::default(), Batch::default(), Batch::default());
        let mut reservation = pool.reserve(5, &mut Vec::new()).unwrap();
        let mut parts = Vec::new();
        for (n, rows) in [(70, Rows::None), (1, Rows::Last), (65, Rows::All)] {
            let (mut table, mut slots) = (BlockTable::new(), Vec::new());
            table.append(n, &mut pool, &mut reservation, &mut slots);
            parts.push(((100..100 + n).collect::<Vec<u32>>(), slots, table, rows));
        }
        pool.forfeit(reservation);
        parts.iter().for_each(|(tokens, slots, table, rows)| all.push(tokens, slots, table, *rows));
        assert_eq!(all.row_sequences().collect::<Vec<_>>(), [vec![1], vec![2; 65]].concat());
        for (index, (tokens, slots, table, rows)) in parts.iter().enumerate() {
            all.isolate(index, &mut one);
            expected.clear();
            expected.push(tokens, slots, table, *rows);
            assert!(one.row_sequences().all(|sequence| sequence == 0));
            assert_eq!(one.encode(7).as_bytes(), expected.encode(7).as_bytes(), "sequence {index}");
        }
    }
}
