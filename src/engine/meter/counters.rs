//! Counting by channel, on every request's way.
//!
//! A count is one look-up under a read lock and one addition. The number of channels is bounded:
//! further ones are counted together.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use crate::activity::{BUCKETS, Counts};

/// How many channels are counted apart.
pub(super) const MAX_CHANNELS: usize = 100;

/// What is counted of one channel until it is taken.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) enqueued: AtomicU64,
    pub(super) attempts: AtomicU64,
    pub(super) failed_attempts: AtomicU64,
    pub(super) completed: AtomicU64,
    pub(super) discarded: AtomicU64,
    pub(super) cancelled: AtomicU64,
    pub(super) ambiguous: AtomicU64,
    pub(super) latency: [AtomicU64; BUCKETS],
}

/// Adds to a number that is only read as a whole once in a while.
pub(super) fn add(counter: &AtomicU64, number: u64) {
    counter.fetch_add(number, Ordering::Relaxed);
}

impl Counters {
    fn take(&self) -> Counts {
        let take = |counter: &AtomicU64| counter.swap(0, Ordering::Relaxed);
        Counts {
            enqueued: take(&self.enqueued),
            attempts: take(&self.attempts),
            failed_attempts: take(&self.failed_attempts),
            completed: take(&self.completed),
            discarded: take(&self.discarded),
            cancelled: take(&self.cancelled),
            ambiguous: take(&self.ambiguous),
            latency: self.latency.each_ref().map(take),
        }
    }

    fn restore(&self, counts: &Counts) {
        add(&self.enqueued, counts.enqueued);
        add(&self.attempts, counts.attempts);
        add(&self.failed_attempts, counts.failed_attempts);
        add(&self.completed, counts.completed);
        add(&self.discarded, counts.discarded);
        add(&self.cancelled, counts.cancelled);
        add(&self.ambiguous, counts.ambiguous);
        for (counter, number) in self.latency.iter().zip(counts.latency) {
            add(counter, number);
        }
    }
}

/// The counters of all channels.
#[derive(Debug, Default)]
pub(super) struct ChannelCounters {
    channels: RwLock<HashMap<Arc<str>, Counters>>,
    /// Of further channels.
    others: Counters,
}

impl ChannelCounters {
    /// Counts for a channel.
    pub(super) fn of(&self, channel: &str, count: impl FnOnce(&Counters)) {
        let channels = self.channels.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(counters) = channels.get(channel) {
            return count(counters);
        }
        if channels.len() >= MAX_CHANNELS {
            return count(&self.others);
        }
        drop(channels);
        let mut channels = self
            .channels
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        if channels.len() >= MAX_CHANNELS && !channels.contains_key(channel) {
            return count(&self.others);
        }
        count(channels.entry(channel.into()).or_default());
    }

    /// Takes what was counted since the last time, for each channel with something. The name of
    /// further channels together is empty.
    pub(super) fn take(&self) -> Vec<(Arc<str>, Counts)> {
        let channels = self.channels.read().unwrap_or_else(PoisonError::into_inner);
        let counted = channels
            .iter()
            .map(|(name, counters)| (Arc::clone(name), counters.take()));
        let others = std::iter::once_with(|| (Arc::from(""), self.others.take()));
        counted
            .chain(others)
            .filter(|(_, counts)| !counts.is_empty())
            .collect()
    }

    /// Puts back what was taken.
    pub(super) fn restore(&self, counted: &[(Arc<str>, Counts)]) {
        for (channel, counts) in counted {
            if channel.is_empty() {
                self.others.restore(counts);
            } else {
                self.of(channel, |counters| counters.restore(counts));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_taken_is_counted_once_and_can_be_put_back() {
        let counters = ChannelCounters::default();
        for _ in 0..3 {
            counters.of("a", |of| add(&of.enqueued, 1));
        }
        counters.of("b", |of| add(&of.latency[27], 1));
        let taken = counters.take();
        assert_eq!(taken.len(), 2);
        assert!(counters.take().is_empty());
        counters.restore(&taken);
        counters.of("a", |of| add(&of.enqueued, 1));
        let again = counters.take();
        let of = |name: &str| {
            again
                .iter()
                .find(|(channel, _)| **channel == *name)
                .unwrap()
        };
        assert_eq!(of("a").1.enqueued, 4);
        assert_eq!(of("b").1.latency[27], 1);
    }

    #[test]
    fn channels_beyond_the_first_ones_are_counted_together() {
        let counters = ChannelCounters::default();
        for number in 0..10 * MAX_CHANNELS {
            counters.of(&number.to_string(), |of| add(&of.enqueued, 1));
        }
        let taken = counters.take();
        assert_eq!(taken.len(), MAX_CHANNELS + 1);
        let (_, others) = taken.iter().find(|(name, _)| name.is_empty()).unwrap();
        assert_eq!(others.enqueued, 9 * MAX_CHANNELS as u64);
        counters.restore(&taken);
        let sum: u64 = counters
            .take()
            .iter()
            .map(|(_, counts)| counts.enqueued)
            .sum();
        assert_eq!(sum, 10 * MAX_CHANNELS as u64);
    }
}
