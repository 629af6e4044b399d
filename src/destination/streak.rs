//! For how long a destination has only failed, towards disabling it.

use serde::{Deserialize, Serialize};

use super::policy::{AutoDisable, Unknown};
use super::state::{Millis, millis};

/// How long a streak is kept after its last failure, at least.
const MIN_KEPT: Millis = 60 * 60 * 1000;
/// The parts of the way to disabled that are reported.
const THRESHOLDS: [u8; 3] = [50, 90, 100];

/// Failures without a success between them.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct Streak {
    /// The first failure.
    pub(super) since: Millis,
    /// The last failure.
    last: Millis,
    /// How long it has failed. A time without attempts counts in part, and so does a jump of the
    /// clock.
    failing_ms: Millis,
    /// How many failures were far enough apart, and the last of them.
    counted: u32,
    counted_at: Millis,
    /// The last threshold that was reported.
    told: u8,
    /// How long the streak is kept after its last failure. A destination that isn't used any more
    /// must not be remembered for ever.
    keep_ms: Millis,
    #[serde(flatten)]
    unknown: Unknown,
}

impl Streak {
    fn new(now: Millis) -> Self {
        Self {
            since: now,
            last: now,
            counted: 1,
            counted_at: now,
            ..Self::default()
        }
    }

    pub(super) fn is_kept(&self, now: Millis) -> bool {
        now.saturating_sub(self.last) <= self.keep_ms
    }

    /// Notes a failure. Returns the thresholds that it has reached.
    pub(super) fn fail(
        streak: &mut Option<Self>,
        rule: Option<&AutoDisable>,
        now: Millis,
    ) -> Vec<u8> {
        if !streak.as_ref().is_some_and(|streak| streak.is_kept(now)) {
            *streak = None;
        }
        let streak = streak.get_or_insert_with(|| Self::new(now));
        let Some(rule) = rule else {
            streak.pass(MIN_KEPT, now);
            streak.keep_ms = MIN_KEPT;
            return Vec::new();
        };
        let after = millis(rule.after).max(1);
        let failures = rule.min_failures();
        // What lies between two of the required failures, rounded up.
        let between = (after - 1) / i64::from(failures - 1) + 1;
        streak.pass(between, now);
        streak.keep_ms = after.saturating_mul(2).max(MIN_KEPT);
        let passed = now.saturating_sub(streak.counted_at);
        if passed < 0 {
            // The clock was set back.
            streak.counted_at = now;
        } else if passed >= millis(rule.apart()) {
            streak.counted = streak.counted.saturating_add(1);
            streak.counted_at = now;
        }
        let percent = (streak.failing_ms.saturating_mul(100) / after)
            .min(i64::from(streak.counted) * 100 / i64::from(failures));
        let reached = THRESHOLDS
            .into_iter()
            .filter(|threshold| streak.told < *threshold && i64::from(*threshold) <= percent)
            .collect::<Vec<_>>();
        if let Some(last) = reached.last() {
            streak.told = *last;
        }
        reached
    }

    /// Counts the time since the last failure, at most so much of it.
    fn pass(&mut self, at_most: Millis, now: Millis) {
        let passed = now.saturating_sub(self.last).clamp(0, at_most);
        self.failing_ms = self.failing_ms.saturating_add(passed);
        self.last = now;
        // The clock may have been set back.
        self.since = self.since.min(now);
    }
}
