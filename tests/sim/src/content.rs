//! Which bytes of a file survive a power cut?

use fastrand::Rng;

/// What a disk writes at once.
const SECTOR_BYTES: u64 = 512;

/// A file as everybody sees it, and as it is on the disk.
#[derive(Debug, Default)]
pub(crate) struct Content {
    pub(crate) now: Vec<u8>,
    durable: Vec<u8>,
    /// What was not synced, the oldest first.
    pending: Vec<Change>,
}

#[derive(Debug)]
enum Change {
    Write { offset: usize, bytes: Vec<u8> },
    SetLen(usize),
}

/// How much of what was not synced is there after a power cut.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Luck {
    All,
    Nothing,
    Some,
}

impl Luck {
    pub(crate) fn any(rng: &mut Rng) -> Self {
        [Self::All, Self::Nothing, Self::Some, Self::Some][rng.usize(..4)]
    }

    pub(crate) fn keeps(self, rng: &mut Rng) -> bool {
        match self {
            Self::All => true,
            Self::Nothing => false,
            Self::Some => rng.bool(),
        }
    }
}

impl Content {
    /// A file with these bytes since ever.
    pub(crate) fn durable(bytes: Vec<u8>) -> Self {
        Self { now: bytes.clone(), durable: bytes, pending: Vec::new() }
    }

    pub(crate) fn write(&mut self, offset: usize, bytes: &[u8]) {
        put(&mut self.now, offset, bytes);
        self.pending.push(Change::Write { offset, bytes: bytes.to_vec() });
    }

    pub(crate) fn set_len(&mut self, n_bytes: usize) {
        self.now.resize(n_bytes, 0);
        self.pending.push(Change::SetLen(n_bytes));
    }

    pub(crate) fn sync(&mut self) {
        for change in self.pending.drain(..) {
            match change {
                Change::Write { offset, bytes } => put(&mut self.durable, offset, &bytes),
                Change::SetLen(n_bytes) => self.durable.resize(n_bytes, 0),
            }
        }
    }

    /// A failed sync, after which the system calls the file clean: the next one writes nothing of this.
    pub(crate) fn forget_pending(&mut self) {
        self.pending.clear();
    }

    /// Any part of each write may be there, and the file may have grown without it.
    pub(crate) fn power_cut(&mut self, rng: &mut Rng) {
        let luck = Luck::any(rng);
        for change in self.pending.drain(..) {
            match change {
                Change::SetLen(n_bytes) if luck.keeps(rng) => self.durable.resize(n_bytes, 0),
                Change::SetLen(_) => {}
                Change::Write { offset, bytes } => {
                    let end = offset + bytes.len();
                    if luck.keeps(rng) && self.durable.len() < end {
                        self.durable.resize(end, 0);
                    }
                    let mut at = offset;
                    while at < end {
                        let next = ((at as u64 / SECTOR_BYTES + 1) * SECTOR_BYTES).min(end as u64);
                        let next = usize::try_from(next).expect("it is not past the end");
                        if luck.keeps(rng) {
                            put(&mut self.durable, at, &bytes[at - offset..next - offset]);
                        }
                        at = next;
                    }
                }
            }
        }
        self.now.clone_from(&self.durable);
    }
}

fn put(file: &mut Vec<u8>, offset: usize, bytes: &[u8]) {
    let end = offset + bytes.len();
    if file.len() < end {
        file.resize(end, 0);
    }
    file[offset..end].copy_from_slice(bytes);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_synced_survives_every_cut_and_the_rest_some() {
        let mut lost = 0;
        for seed in 0..100 {
            let mut rng = Rng::with_seed(seed);
            let mut content = Content::default();
            content.write(0, &[1; 700]);
            content.sync();
            content.write(700, &[2; 1500]);
            content.power_cut(&mut rng);
            assert_eq!(content.now[..700], [1; 700]);
            assert!(content.now[700..].iter().all(|&byte| byte == 2 || byte == 0) && content.now.len() <= 2200);
            lost += usize::from(content.now.len() < 2200 || content.now[700..].contains(&0));
        }
        assert!((30..90).contains(&lost), "{lost} of 100 cuts lost something");
    }

    #[test]
    fn a_sync_after_a_failed_one_saves_nothing() {
        let mut content = Content::default();
        content.write(0, &[1]);
        content.forget_pending();
        content.sync();
        assert_eq!(content.now, [1]);
        content.power_cut(&mut Rng::with_seed(1));
        assert_eq!(content.now, [0_u8; 0]);
    }
}
