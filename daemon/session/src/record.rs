//! What does a journal record say?

use crate::history::{Outcome, Settings, TurnHistory};
use serde::{Deserialize, Serialize};

/// The first record of every journal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Create {
    pub(crate) owner: u64,
    pub(crate) created: u64,
    pub(crate) used: u64,
    pub(crate) model: String,
    pub(crate) fingerprint: [u8; 32],
    pub(crate) title: String,
    pub(crate) settings: Settings,
    pub(crate) pinned: bool,
}

/// A turn begins.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Turn {
    pub(crate) at: u64,
    /// Of the tokens there are, how many stay.
    pub(crate) keep_tokens: u32,
    /// What comes after them.
    pub(crate) prompt: Vec<u32>,
    pub(crate) request: Vec<u8>,
    pub(crate) sampling: Vec<u8>,
}

/// One record. The order is the format's: new kinds come at the end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Record {
    Create(Create),
    Turn(Turn),
    /// Tokens of the running turn.
    Tokens(Vec<u32>),
    End {
        at: u64,
        outcome: Outcome,
        answer: Vec<u8>,
    },
    Truncate {
        n_turns: u32,
        n_tokens: u32,
    },
    Rename {
        title: String,
    },
    Pin {
        pinned: bool,
    },
    Settings(Settings),
    /// Tokens of a compacted journal, whatever turns they are of.
    Kept(Vec<u32>),
    /// A turn of a compacted journal, without its tokens.
    Past(TurnHistory),
}

impl Record {
    /// The bytes of it, before they are encrypted.
    pub(crate) fn encode(&self) -> Vec<u8> {
        postcard::to_allocvec(self).expect("a record has nothing that postcard cannot write")
    }

    /// The record in `bytes`, all of them.
    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        let (record, rest) = postcard::take_from_bytes(bytes).ok()?;
        rest.is_empty().then_some(record)
    }

    /// About as many bytes as [`Record::encode`] gives, and not fewer.
    pub(crate) fn n_bytes(&self) -> u64 {
        let n_bytes = match self {
            Self::Turn(turn) => turn.request.len() + turn.sampling.len() + 5 * turn.prompt.len(),
            Self::Tokens(ids) | Self::Kept(ids) => 5 * ids.len(),
            Self::End { answer, .. } => answer.len(),
            Self::Rename { title } => title.len(),
            Self::Past(turn) => turn.request.len() + turn.sampling.len() + turn.answer.len(),
            Self::Create(create) => create.title.len() + create.model.len() + create.fingerprint.len(),
            Self::Truncate { .. } | Self::Pin { .. } | Self::Settings(_) => 0,
        };
        n_bytes as u64 + 64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::history::tests::{empty, end, turn};

    #[test]
    fn a_record_is_read_back_whole_or_not_at_all() {
        let mut records = empty().records();
        records.extend([turn(u32::MAX, &[u32::MAX; 9]), Record::Tokens(vec![u32::MAX; 70]), end(Outcome::Failed)]);
        records.extend([Record::Truncate { n_turns: u32::MAX, n_tokens: u32::MAX }, Record::Kept(vec![0])]);
        for record in records {
            let bytes = record.encode();
            assert_eq!(Record::decode(&bytes).as_ref(), Some(&record));
            assert!(record.n_bytes() >= bytes.len() as u64, "{record:?}: {} bytes", bytes.len());
            (0..bytes.len()).for_each(|n| assert_eq!(Record::decode(&bytes[..n]), None, "{n} bytes of {record:?}"));
            assert_eq!(Record::decode(&[bytes.as_slice(), &[0]].concat()), None);
        }
    }
}
