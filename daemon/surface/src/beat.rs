//! When do the doors look around? Together: a box that nobody asks anything is woken once for all of them.

use std::sync::OnceLock;
use std::time::Duration;
use tokio::time::{Instant, sleep_until};

/// Time between beats.
pub(crate) const BEAT: Duration = Duration::from_secs(5);

/// Resolves at the next beat.
pub(crate) async fn next() {
    static FIRST: OnceLock<Instant> = OnceLock::new();
    let first = *FIRST.get_or_init(Instant::now);
    sleep_until(first + beat_after(first.elapsed())).await;
}

/// How long after the first one the next beat comes, when so much time has `passed` since the first.
fn beat_after(passed: Duration) -> Duration {
    Duration::from_secs((passed.as_secs() / BEAT.as_secs() + 1) * BEAT.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_waits_for_the_same_beat_is_woken_at_the_same_time() {
        let after = |ms| beat_after(Duration::from_millis(ms));
        assert_eq!([after(0), after(1), after(4999)], [BEAT; 3]);
        assert_eq!([after(5000), after(9999)], [2 * BEAT; 2]);
    }
}
