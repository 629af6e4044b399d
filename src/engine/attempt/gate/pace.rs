//! How fast a destination answers.

use std::time::{Duration, Instant};

/// A destination whose attempts take longer than this is slow.
pub(super) const SLOW: Duration = Duration::from_millis(250);
/// The times until the next poll while a destination has room soon.
pub(super) const SOON_MIN: Duration = Duration::from_millis(50);
const SOON_MAX: Duration = Duration::from_millis(250);
/// How much one attempt's duration counts in the average.
const WEIGHT: f64 = 0.2;

/// How much one attempt's result counts in the share of failures.
const FAILURE_WEIGHT: f64 = 0.1;
/// A destination of which more attempts fail is failing.
const FAILING: f64 = 0.5;
/// The time between two attempts at a failing destination: 100 a second if about half of them fail,
/// and 50 if all do.
const FAILING_INTERVAL_MIN: Duration = Duration::from_millis(10);
const FAILING_INTERVAL_MAX: Duration = Duration::from_millis(20);
/// How much of that time may be made up for at once.
const FAILING_BURST: Duration = Duration::from_millis(250);

/// How often a destination is asked while its attempts fail.
///
/// Each retry of a request takes work, here and in the database. So a destination that fails is
/// asked at a bounded rate, whatever waits for it, until it answers again.
#[derive(Debug, Default)]
pub(super) struct Failing {
    /// The share of attempts that failed, the last ones the most.
    share: f64,
    /// When the next attempt is due.
    next: Option<Instant>,
}

impl Failing {
    pub(super) fn note(&mut self, failed: bool) {
        let result = f64::from(u8::from(failed));
        self.share += FAILURE_WEIGHT * (result - self.share);
    }

    fn is_failing(&self) -> bool {
        self.share > FAILING
    }

    /// How many attempts may be made now.
    pub(super) fn free(&self, now: Instant) -> usize {
        if !self.is_failing() {
            return usize::MAX;
        }
        let next = self.next.map_or(now, |next| next.max(now));
        let left = (now + FAILING_BURST).saturating_duration_since(next);
        (left.as_millis() / self.interval().as_millis()) as usize
    }

    /// The time between two attempts.
    pub(super) fn interval(&self) -> Duration {
        let beyond = ((self.share - FAILING) / (1.0 - FAILING)).clamp(0.0, 1.0);
        let most = FAILING_INTERVAL_MAX - FAILING_INTERVAL_MIN;
        FAILING_INTERVAL_MIN + most.mul_f64(beyond * beyond)
    }

    /// How long to wait for the next few attempts.
    pub(super) fn soon(&self) -> Duration {
        (4 * self.interval()).max(SOON_MIN)
    }

    /// An attempt is made.
    pub(super) fn spend(&mut self, now: Instant) {
        if self.is_failing() {
            let next = self.next.map_or(now, |next| next.max(now));
            self.next = Some(next + self.interval());
        }
    }
}

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

    /// How long an attempt takes, as far as is known.
    pub(super) fn took(&self) -> Duration {
        self.average.map_or(SLOW, Duration::from_secs_f64)
    }

    /// How long to wait for attempts to end before asking for more requests, so that the slots of a
    /// slow destination are empty for a small part of the time.
    pub(super) fn soon(&self, now: Instant) -> Duration {
        match self.pace(now) {
            Pace::Slow => (self.took().max(self.quiet(now)) / 8).clamp(SOON_MIN, SOON_MAX),
            Pace::Fast | Pace::Unknown => SOON_MIN,
        }
    }

    /// For how long no attempt has begun or ended.
    pub(super) fn quiet(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.moved)
    }
}
