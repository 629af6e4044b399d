//! What the application's metrics are told: [`Recorder`].
//!
//! The crate counts and measures by itself, and hands each measurement to the recorder of a handle
//! as one typed value. So metrics of any library can be made of them. The feature `metrics` has an
//! implementation for the facade of that name.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use http::StatusCode;

use crate::classify::FailureClass;
use crate::destination::{DestinationEvent, DestinationState};
use crate::health::SweepPart;
use crate::status::Status;

/// How many channels a recorder is told by name, and how many destinations. Further ones are
/// [`OTHER`], so that no metric has more values of a label than that.
pub const MAX_LABELS: usize = 100;

/// Stands for all channels or destinations beyond the first [`MAX_LABELS`].
pub const OTHER: &str = "other";

/// Receives what a handle counts and measures. Set with
/// [`DurableBuilder::recorder`](crate::DurableBuilder::recorder).
///
/// Each method is called once for each operation, on the task that has made it: it must return at
/// once, without waiting for anything. All of them do nothing by default, and releases may add
/// others.
///
/// A panic is caught and logged. It loses the measurement, and no request.
///
/// Channels and destinations are bounded: a handle passes the names of the first [`MAX_LABELS`]
/// that it meets, and [`OTHER`] for all further ones. Values of headers, paths, queries and bodies
/// are in none of them. A destination is `scheme://host:port`, or the caller's limit key.
///
/// # Examples
///
/// ```
/// use std::sync::atomic::{AtomicU64, Ordering};
///
/// use requeuest::recorder::{AttemptEnded, Recorder};
///
/// #[derive(Default)]
/// struct FailedAttempts(AtomicU64);
///
/// impl Recorder for FailedAttempts {
///     fn attempt_ended(&self, attempt: &AttemptEnded<'_>) {
///         if attempt.failure.is_some() {
///             self.0.fetch_add(1, Ordering::Relaxed);
///         }
///     }
/// }
/// ```
pub trait Recorder: Send + Sync {
    /// Requests were persisted. Those of a caller's own transaction count when the call returns.
    fn enqueued(&self, enqueued: &Enqueued<'_>) {
        let _ = enqueued;
    }

    /// A statement has written requests or results.
    fn batch_written(&self, batch: &BatchWritten) {
        let _ = batch;
    }

    /// A runner has claimed a request whose last process let its lease run out.
    fn taken_over(&self, takeover: &TakenOver<'_>) {
        let _ = takeover;
    }

    /// An attempt has ended, or was given up by the caller or task that made it.
    fn attempt_ended(&self, attempt: &AttemptEnded<'_>) {
        let _ = attempt;
    }

    /// A request has its outcome, by a result of this process.
    fn finished(&self, finished: &Finished<'_>) {
        let _ = finished;
    }

    /// Results changed nothing, because their requests were taken over or had finished.
    fn results_stale(&self, number: u64) {
        let _ = number;
    }

    /// A request had to wait because of the limits, the breaker or the state of its destination.
    fn limited(&self, limited: &Limited<'_>) {
        let _ = limited;
    }

    /// Something happened to a destination. Of all processes, the one that noticed it is told.
    fn destination_changed(&self, event: &DestinationEvent) {
        let _ = event;
    }

    /// What this handle is doing: once a second.
    fn handle_state(&self, state: &HandleState) {
        let _ = state;
    }

    /// What all processes have before them: every 15 seconds, to one handle among all that have a
    /// recorder and share a schema. `None` says that another handle is told from now on.
    fn queue_state(&self, state: Option<&QueueState>) {
        let _ = state;
    }
}

/// Requests that were persisted: see [`Recorder::enqueued`].
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Enqueued<'a> {
    /// The channel.
    pub channel: &'a str,
    /// The destination.
    pub destination: &'a str,
    /// How many requests.
    pub requests: u64,
    /// The time from the call to the commit. `None` for requests of `fire_many` and of a caller's
    /// transaction.
    pub latency: Option<Duration>,
}

/// What a [`BatchWritten`] has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum BatchKind {
    /// Requests.
    Enqueue,
    /// Results of attempts.
    Settle,
}

impl BatchKind {
    /// The name of the kind: `"enqueue"` or `"settle"`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Enqueue => "enqueue",
            Self::Settle => "settle",
        }
    }
}

/// A write of many rows in one commit: see [`Recorder::batch_written`].
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct BatchWritten {
    /// What was written.
    pub kind: BatchKind,
    /// How many rows.
    pub size: usize,
    /// How long the write took.
    pub duration: Duration,
    /// Whether it was committed.
    pub is_written: bool,
}

/// A claim of a request that another process had: see [`Recorder::taken_over`].
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct TakenOver<'a> {
    /// The channel.
    pub channel: &'a str,
    /// How long the lease had run out.
    pub late_by: Duration,
}

/// An attempt that has ended: see [`Recorder::attempt_ended`].
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct AttemptEnded<'a> {
    /// The channel.
    pub channel: &'a str,
    /// The destination.
    pub destination: &'a str,
    /// The number of the attempt, from 1.
    pub number: u32,
    /// Why the attempt failed. `None` if it completed its request.
    pub failure: Option<FailureClass>,
    /// The status of the response, if there was one.
    pub status: Option<StatusCode>,
    /// The time from when the request was due to when its attempt began.
    pub queue_wait: Duration,
    /// How long the attempt took.
    pub duration: Duration,
}

/// A request that has its outcome: see [`Recorder::finished`].
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Finished<'a> {
    /// The channel.
    pub channel: &'a str,
    /// The destination.
    pub destination: &'a str,
    /// How it ended. Discarded and ambiguous requests are dead letters.
    pub status: Status,
    /// How many attempts it took.
    pub attempts: u32,
    /// The time from the enqueue to the commit of the outcome, delays included.
    pub latency: Duration,
}

impl Finished<'_> {
    /// Whether the request is a dead letter now.
    pub fn is_dead_letter(&self) -> bool {
        matches!(self.status, Status::Discarded | Status::Ambiguous)
    }
}

/// What became of a request whose destination took no more: see [`Limited`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum LimitedHow {
    /// It waited in memory for this long, and its attempt began.
    Waited(Duration),
    /// It was put back into the queue until its destination takes more.
    Deferred,
    /// There was no budget for its retry.
    OverRetryBudget,
}

impl LimitedHow {
    /// The name of the kind: `"waited"`, `"deferred"` or `"over_retry_budget"`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Waited(_) => "waited",
            Self::Deferred => "deferred",
            Self::OverRetryBudget => "over_retry_budget",
        }
    }
}

/// A request that had to wait for its destination: see [`Recorder::limited`].
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Limited<'a> {
    /// The destination.
    pub destination: &'a str,
    /// What became of it.
    pub how: LimitedHow,
}

/// What a handle is doing: see [`Recorder::handle_state`].
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct HandleState {
    /// How many attempts are under way.
    pub in_flight: usize,
    /// How many attempts may be under way at once.
    pub concurrency: usize,
    /// How many results wait for their commit.
    pub unsettled: usize,
    /// How many requests wait to be persisted.
    pub queued: usize,
    /// How the parts of the handle's sweep fare. A part that has not succeeded for long, or stays
    /// behind, lets old rows pile up.
    pub sweep: Vec<SweepPart>,
}

/// What all processes have before them: see [`Recorder::queue_state`].
///
/// Numbers are exact up to 10,000. A larger backlog is counted to about there, because a count of
/// all of it would read all of it.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct QueueState {
    /// How many unfinished requests are in each state. `due` and `scheduled` ones wait for a
    /// runner, `claimed`, `held` and `sending_once` ones are in the hands of a process. The others
    /// are `behind` another of their ordering key, `deferred` by their destination, `parked`
    /// because they can't be read, or `halted`.
    pub depth: Vec<(&'static str, u64)>,
    /// The channels with requests that are due.
    pub due: Vec<DueChannel>,
    /// How many dead letters there are.
    pub dead_letters: u64,
    /// How long the oldest outcome has outlived its retention. `None` if none has.
    pub oldest_expired_outcome: Option<Duration>,
    /// Destinations that take no requests, or not all.
    pub destinations: Vec<(Arc<str>, DestinationState)>,
}

impl QueueState {
    /// Each state, with nothing in it.
    pub(crate) fn none() -> Self {
        let states = [
            "due",
            "scheduled",
            "claimed",
            "held",
            "sending_once",
            "behind",
            "deferred",
            "parked",
            "halted",
        ];
        Self {
            depth: states.map(|name| (name, 0)).to_vec(),
            ..Self::default()
        }
    }
}

/// A channel with requests that are due: see [`QueueState`].
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct DueChannel {
    /// The channel.
    pub channel: Arc<str>,
    /// How many requests are due.
    pub requests: u64,
    /// For how long the oldest of them has been due.
    pub oldest: Duration,
}

/// The recorder that a builder was given.
#[derive(Clone)]
pub(crate) struct SharedRecorder(pub(crate) Arc<dyn Recorder>);

impl fmt::Debug for SharedRecorder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Recorder")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_recorder_is_object_safe_and_does_nothing_by_default() {
        struct Silent;
        impl Recorder for Silent {}
        let silent: Arc<dyn Recorder> = Arc::new(Silent);
        silent.results_stale(1);
        silent.queue_state(None);
        silent.limited(&Limited {
            destination: "http://a",
            how: LimitedHow::Deferred,
        });
    }
}
