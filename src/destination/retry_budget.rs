//! How many retries one process may send to a destination now.
//!
//! A retry is counted when it is sent, not when it is scheduled. So when a destination recovers,
//! the retries that piled up for it go out at the budget's pace.

use std::time::{Duration, Instant};

use super::policy::RetryBudget;

const SLICES: usize = 10;

/// The first attempts and retries of a sliding window, in slices.
#[derive(Debug)]
pub(crate) struct RetryMeter {
    budget: RetryBudget,
    slices: [Slice; SLICES],
    /// The slice that counts now.
    current: usize,
    /// When it began.
    began: Option<Instant>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Slice {
    first: u32,
    retries: u32,
}

impl RetryMeter {
    pub(crate) fn new(budget: RetryBudget) -> Self {
        Self {
            budget,
            slices: [Slice::default(); SLICES],
            current: 0,
            began: None,
        }
    }

    /// Changes the budget. What was counted stays.
    pub(crate) fn set_budget(&mut self, budget: RetryBudget) {
        self.budget = budget;
    }

    /// A first attempt is about to be sent.
    pub(crate) fn note_first(&mut self, now: Instant) {
        self.advance(now);
        let first = &mut self.slices[self.current].first;
        *first = first.saturating_add(1);
    }

    /// Whether a retry may be sent. If so, it is counted.
    pub(crate) fn try_retry(&mut self, now: Instant) -> bool {
        self.advance(now);
        let sum = |count: fn(&Slice) -> u32| -> f64 {
            self.slices
                .iter()
                .map(|slice| f64::from(count(slice)))
                .sum()
        };
        let always = f64::from(self.budget.per_second) * self.budget.window.as_secs_f64();
        let allowed = sum(|slice| slice.first) * self.budget.share + always;
        // Not a number, from a policy that was written by hand, allows nothing more.
        let is_allowed = sum(|slice| slice.retries) + 1.0 <= allowed;
        if is_allowed {
            let retries = &mut self.slices[self.current].retries;
            *retries = retries.saturating_add(1);
        }
        is_allowed
    }

    /// Empties the slices that are older than the window.
    fn advance(&mut self, now: Instant) {
        let slice = (self.budget.window / SLICES as u32).max(Duration::from_millis(1));
        let began = *self.began.get_or_insert(now);
        let passed = now.saturating_duration_since(began).as_nanos() / slice.as_nanos();
        if passed >= SLICES as u128 {
            self.slices = [Slice::default(); SLICES];
            self.began = Some(now);
            return;
        }
        for _ in 0..passed {
            self.current = (self.current + 1) % SLICES;
            self.slices[self.current] = Slice::default();
        }
        self.began = Some(began + slice * passed as u32);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn millis(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    /// How many retries are allowed at a time.
    fn allowed(meter: &mut RetryMeter, now: Instant) -> u32 {
        (0..10_000).take_while(|_| meter.try_retry(now)).count() as u32
    }

    #[test]
    fn retries_are_a_share_of_first_attempts_and_some_more() {
        let now = Instant::now();
        let mut meter = RetryMeter::new(RetryBudget::default());
        assert_eq!(allowed(&mut meter, now), 100);
        for _ in 0..1000 {
            meter.note_first(now);
        }
        assert_eq!(allowed(&mut meter, now), 200);
        // All of it is used up for as long as it is in the window.
        assert_eq!(allowed(&mut meter, now + millis(9_900)), 0);
        assert_eq!(allowed(&mut meter, now + millis(10_000)), 100);
    }

    #[test]
    fn the_window_slides() {
        let start = Instant::now();
        let mut meter = RetryMeter::new(RetryBudget::default().per_second(1));
        for second in 0..30 {
            let now = start + millis(second * 1000);
            for _ in 0..100 {
                meter.note_first(now);
            }
            let sent = allowed(&mut meter, now);
            // The first second spends what is always allowed.
            assert!(second == 0 || sent >= 20, "{second}: {sent}");
        }
        let quiet = start + millis(29_000) + millis(86_400_000);
        assert_eq!(allowed(&mut meter, quiet), 10);
    }

    #[test]
    fn a_changed_budget_counts_at_once() {
        let now = Instant::now();
        let mut meter = RetryMeter::new(RetryBudget::default());
        assert_eq!(allowed(&mut meter, now), 100);
        meter.set_budget(RetryBudget::default().per_second(11));
        assert_eq!(allowed(&mut meter, now), 10);
    }

    proptest! {
        /// When a retry is sent, the window holds no more of them than first attempts allow.
        #[test]
        fn retries_stay_within_the_budget(
            steps in proptest::collection::vec((0u64..700, 0u32..20, 0u32..20), 1..60),
        ) {
            let budget = RetryBudget::default().share(0.5).per_second(2).window(millis(2_000));
            let mut meter = RetryMeter::new(budget);
            let mut now = Instant::now();
            let mut sent = Vec::new();
            for (pause, first, retries) in steps {
                now += millis(pause);
                for _ in 0..first {
                    meter.note_first(now);
                }
                let retries = (0..retries).filter(|_| meter.try_retry(now)).count() as u32;
                sent.push((now, first, retries));
                if retries == 0 {
                    continue;
                }
                // Whole slices leave the window, so it is between 1.8 and 2 seconds long.
                let since = |at: &Instant, time| now.duration_since(*at) <= millis(time);
                let known = sent.iter().filter(|(at, ..)| since(at, 2_000));
                let recent = sent.iter().filter(|(at, ..)| since(at, 1_800));
                let firsts: u32 = known.map(|(_, first, _)| first).sum();
                let retried: u32 = recent.map(|(.., retries)| retries).sum();
                let bound = f64::from(firsts) * 0.5 + 4.0;
                prop_assert!(f64::from(retried) <= bound, "{retried} {bound}");
            }
        }
    }
}
