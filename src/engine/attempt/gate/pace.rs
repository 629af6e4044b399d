//! How fast a destination answers.

use std::time::{Duration, Instant};

/// A destination whose attempts take longer than this is slow.
pub(super) const SLOW: Duration = Duration::from_millis(250);
/// How much one attempt's duration counts in the average.
const WEIGHT: f64 = 0.2;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pace {
    Fast,
    /// No attempt has ended yet.
    Unknown,
    Slow,
}

/// The attempts of a destination, as far as they tell its pace.
#[derive(Debug)]
pub(super) struct Paced {
    /// Attempts that have a slot.
    sending: usize,
    /// When the last attempt ended, or the first of those under way began.
    moved: Instant,
    /// The average duration of attempts in seconds, if any has ended.
    average: Option<f64>,
}

impl Paced {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            sending: 0,
            moved: now,
            average: None,
        }
    }

    pub(super) fn begin(&mut self, now: Instant) {
        if self.sending == 0 {
            self.moved = now;
        }
        self.sending += 1;
    }

    pub(super) fn end(&mut self, took: Duration, now: Instant) {
        self.sending -= 1;
        self.moved = now;
        let took = took.as_secs_f64();
        self.average = Some(match self.average {
            Some(average) => average + WEIGHT * (took - average),
            None => took,
        });
    }

    pub(super) fn pace(&self, now: Instant) -> Pace {
        let stalled = self.sending > 0 && now.saturating_duration_since(self.moved) > SLOW;
        match self.average {
            _ if stalled => Pace::Slow,
            Some(average) if average > SLOW.as_secs_f64() => Pace::Slow,
            Some(_) => Pace::Fast,
            None => Pace::Unknown,
        }
    }

    /// For how long no attempt has begun or ended.
    pub(super) fn quiet(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.moved)
    }
}
