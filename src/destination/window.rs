//! How many attempts to a destination ended lately, and how many of them failed.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::policy::Unknown;
use super::state::{Millis, Report, millis};

const BUCKETS: u64 = 6;

/// Counts over a sliding window, in buckets of a sixth of it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct Window {
    /// The length of a bucket. Zero until something is counted.
    bucket_ms: Millis,
    buckets: Vec<Bucket>,
    #[serde(flatten)]
    unknown: Unknown,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
struct Bucket {
    /// Its number, counted from 1970.
    at: i64,
    #[serde(flatten)]
    counts: Counts,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct Counts {
    pub(super) attempts: u64,
    pub(super) failures: u64,
    pub(super) retries: u64,
}

impl Counts {
    fn add(&mut self, other: Self) {
        self.attempts = self.attempts.saturating_add(other.attempts);
        self.failures = self.failures.saturating_add(other.failures);
        self.retries = self.retries.saturating_add(other.retries);
    }
}

impl Window {
    /// Counts what a report says, in a window of this length. Another length than before begins
    /// with nothing counted.
    pub(super) fn add(&mut self, length: Duration, report: &Report, now: Millis) {
        let bucket_ms = (millis(length) / BUCKETS as i64).max(1);
        if self.bucket_ms != bucket_ms {
            self.buckets.clear();
            self.bucket_ms = bucket_ms;
        }
        let at = now.div_euclid(bucket_ms);
        self.buckets.retain(|bucket| bucket.is_within(at));
        if report.attempts == 0 {
            if self.buckets.is_empty() {
                self.clear();
            }
            return;
        }
        let counts = Counts {
            attempts: report.attempts.into(),
            failures: report.failures.min(report.attempts).into(),
            retries: report.retries.min(report.attempts).into(),
        };
        match self.buckets.iter_mut().find(|bucket| bucket.at == at) {
            Some(bucket) => bucket.counts.add(counts),
            None => self.buckets.push(Bucket { at, counts }),
        }
    }

    pub(super) fn sum(&self, now: Millis) -> Counts {
        let mut sum = Counts::default();
        if self.bucket_ms > 0 {
            let at = now.div_euclid(self.bucket_ms);
            let within = self.buckets.iter().filter(|bucket| bucket.is_within(at));
            within.for_each(|bucket| sum.add(bucket.counts));
        }
        sum
    }

    pub(super) fn clear(&mut self) {
        self.buckets.clear();
        self.bucket_ms = 0;
    }

    pub(super) fn is_default(&self) -> bool {
        *self == Self::default()
    }

    pub(super) fn has_unknown(&self) -> bool {
        !self.unknown.is_empty()
    }
}

impl Bucket {
    /// Whether the bucket counts at this time. If the clock was set back a little, some buckets are
    /// ahead of it, and they count. If it was set back by more than the window, they don't.
    fn is_within(&self, at: i64) -> bool {
        self.at.abs_diff(at) < BUCKETS
    }
}
