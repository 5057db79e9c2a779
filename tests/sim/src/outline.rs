//! What was a run of a daemon like, and what was planted in it?

use std::ops::AddAssign;

/// A mistake that is planted, in what the daemon is told or relies on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mistake {
    /// None.
    Nothing,
    /// One sync of a file in twenty does nothing, and nobody is told.
    SomeSyncs,
    /// Blocks that nobody holds any more keep their rows.
    KeepsFreed,
    /// Some writes into the slow tier are never reported.
    LosesWrites,
    /// A block is filled with the image that came before its own.
    OldImages,
    /// A session is made of the file that was made before its own.
    OldFiles,
    /// The time since the start goes along when the date is set.
    FollowsDate,
}

/// What a run was like.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DaemonOutline {
    /// Turns of anybody.
    pub steps: u64,
    /// Steps of the engine that have computed something.
    pub engine_steps: u64,
    /// Power cuts, deaths and ends of the daemon.
    pub restarts: u64,
    /// Devices that were lost.
    pub devices: u64,
    /// Answers that were heard to their end.
    pub answers: u64,
    /// Of them, answers that had been cut.
    pub resumed: u64,
    /// Requests that failed.
    pub failures: u64,
    /// Rows that attention has read in the slow tier.
    pub slow_rows: u64,
    /// Blocks that came back from sessions' files.
    pub images: u64,
    /// Turns that the sessions thread could not have because it waited for the disk.
    pub waits: u64,
    /// Sessions that were made of another one's file.
    pub copies: u64,
    /// Sessions that were deleted because they were old.
    pub expired: u64,
    /// Of all that has happened.
    pub digest: u64,
}

impl AddAssign for DaemonOutline {
    fn add_assign(&mut self, other: Self) {
        self.steps += other.steps;
        self.engine_steps += other.engine_steps;
        self.restarts += other.restarts;
        self.devices += other.devices;
        self.answers += other.answers;
        self.resumed += other.resumed;
        self.failures += other.failures;
        self.slow_rows += other.slow_rows;
        self.images += other.images;
        self.waits += other.waits;
        self.copies += other.copies;
        self.expired += other.expired;
        // In any order.
        self.digest = self.digest.wrapping_add(other.digest);
    }
}
