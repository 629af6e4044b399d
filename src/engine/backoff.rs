//! The pause between two tries of a statement that another transaction blocks.

use std::time::Duration;

const MIN: Duration = Duration::from_millis(2);
const MAX: Duration = Duration::from_millis(100);

/// After a commit whose outcome is unknown, a statement is tried again for this long. A restarted
/// server leaves several dead connections in the pool, and each try finds one.
pub(super) const RETRY_UNKNOWN_FOR: Duration = Duration::from_secs(3);

/// A pause that doubles from 2 ms to 100 ms, with jitter so that several processes don't keep step.
#[derive(Debug)]
pub(super) struct BusyPause(Duration);

impl BusyPause {
    pub(super) fn new() -> Self {
        Self(MIN)
    }

    /// How long the next pause takes, without jitter.
    pub(super) fn length(&self) -> Duration {
        self.0
    }

    pub(super) async fn wait(&mut self) {
        let length = self.0;
        self.0 = (self.0 * 2).min(MAX);
        tokio::time::sleep(length.mul_f64(0.5 + fastrand::f64())).await;
    }
}
