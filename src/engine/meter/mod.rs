//! What an engine counts and measures.
//!
//! Everything that is worth a number passes through a method of [`Meter`], which is called once for
//! each operation: an enqueue, an attempt, a settle. The counts are always on, because they cost
//! less than a microsecond a request: see [`counters`].

mod counters;

use std::sync::Arc;
use std::time::Duration;

use self::counters::{ChannelCounters, add};
use crate::activity::{Counts, bucket_of};
use crate::status::Status;

/// The numbers of an engine.
#[derive(Debug, Default)]
pub(crate) struct Meter {
    channels: ChannelCounters,
}

impl Meter {
    /// Requests were enqueued in this channel.
    pub(crate) fn enqueued(&self, channel: &str, number: u64) {
        self.channels.of(channel, |of| add(&of.enqueued, number));
    }

    /// Requests were enqueued in these channels.
    pub(crate) fn enqueued_each<'a>(&self, channels: impl IntoIterator<Item = &'a Arc<str>>) {
        let mut run: Option<(&Arc<str>, u64)> = None;
        for channel in channels {
            match &mut run {
                // Requests of one channel come together.
                Some((last, number)) if Arc::ptr_eq(last, channel) => *number += 1,
                _ => {
                    if let Some((last, number)) = run.replace((channel, 1)) {
                        self.enqueued(last, number);
                    }
                }
            }
        }
        if let Some((last, number)) = run {
            self.enqueued(last, number);
        }
    }

    /// An attempt has ended.
    pub(crate) fn attempted(&self, channel: &str, has_failed: bool) {
        self.channels.of(channel, |of| {
            add(&of.attempts, 1);
            if has_failed {
                add(&of.failed_attempts, 1);
            }
        });
    }

    /// A request has its outcome, this long after it was enqueued.
    pub(crate) fn finished(&self, channel: &str, status: Status, latency: Duration) {
        self.channels.of(channel, |of| {
            let counter = match status {
                Status::Completed => &of.completed,
                Status::Discarded => &of.discarded,
                Status::Cancelled => &of.cancelled,
                Status::Ambiguous => &of.ambiguous,
                _ => return,
            };
            add(counter, 1);
            add(&of.latency[bucket_of(latency)], 1);
        });
    }

    /// Requests that were being waited for have ended this way without an attempt of this process.
    pub(crate) fn ended(&self, channel: &str, status: Status, number: u64) {
        self.channels.of(channel, |of| match status {
            Status::Discarded => add(&of.discarded, number),
            Status::Cancelled => add(&of.cancelled, number),
            _ => {}
        });
    }

    /// Takes what was counted by channel since the last time.
    pub(super) fn take(&self) -> Vec<(Arc<str>, Counts)> {
        self.channels.take()
    }

    /// Puts back what could not be stored.
    pub(super) fn restore(&self, counted: &[(Arc<str>, Counts)]) {
        self.channels.restore(counted);
    }
}
