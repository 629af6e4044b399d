//! What an engine counts and measures.
//!
//! Everything that is worth a number passes through a method of [`Meter`], which is called once for
//! each operation: an enqueue, an attempt, a settle. The counts are always on, because they cost
//! less than a microsecond a request: see [`counters`]. The rest is for the application's
//! [`Recorder`], and costs a branch without one.

mod counters;
mod labels;

use std::borrow::Cow;
use std::collections::HashMap;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use http::StatusCode;

use self::counters::{ChannelCounters, add};
use self::labels::Labels;
use super::config::DestinationObserver;
use super::telemetry::LineLimit;
use crate::activity::{Counts, bucket_of};
use crate::classify::FailureClass;
use crate::destination::DestinationEvent;
use crate::recorder::{
    AttemptEnded, BatchKind, BatchWritten, Enqueued, Finished, HandleState, Limited, LimitedHow,
    QueueState, Recorder, SharedRecorder, TakenOver,
};
use crate::redact::panic_text;
use crate::status::Status;
use crate::store::enqueue::NewRequest;

/// The numbers of an engine.
#[derive(Debug, Default)]
pub(crate) struct Meter {
    channels: ChannelCounters,
    told: Option<Told>,
}

/// The application's recorder, and what it may be told.
struct Told {
    recorder: Arc<dyn Recorder>,
    channels: Labels,
    destinations: Labels,
    panics: LineLimit,
}

impl fmt::Debug for Told {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Told")
    }
}

/// Requests that count once their transaction has committed, by channel and destination.
pub(crate) type Tally = HashMap<(Arc<str>, Option<Arc<str>>), u64>;

/// What an attempt was, for the recorder.
pub(crate) struct Ended<'a> {
    pub(crate) channel: &'a str,
    pub(crate) destination: Cow<'a, str>,
    pub(crate) number: u32,
    /// What failed, unless the attempt completed its request.
    pub(crate) failure: Option<FailureClass>,
    pub(crate) status: Option<StatusCode>,
    pub(crate) due: Instant,
    pub(crate) duration: Duration,
}

impl Meter {
    pub(crate) fn new(recorder: Option<&SharedRecorder>) -> Self {
        Self {
            channels: ChannelCounters::default(),
            told: recorder.map(|recorder| Told {
                recorder: Arc::clone(&recorder.0),
                channels: Labels::default(),
                destinations: Labels::default(),
                panics: LineLimit::default(),
            }),
        }
    }

    /// Whether the application has a recorder.
    pub(crate) fn is_told(&self) -> bool {
        self.told.is_some()
    }

    /// Tells the recorder. Its panic must fail no request.
    fn tell(&self, tell: impl FnOnce(&Told)) {
        if let Some(told) = &self.told {
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| tell(told))) {
                if told.panics.allows("").is_some() {
                    tracing::error!(error = panic_text(&*panic), "the recorder panicked");
                }
            }
        }
    }

    /// Requests were persisted, handed in at this time.
    pub(crate) fn enqueued<'a>(
        &self,
        rows: impl IntoIterator<Item = (&'a NewRequest, Option<Instant>)>,
    ) {
        // Requests of one channel come together.
        let mut run: Option<(&Arc<str>, u64)> = None;
        for (row, since) in rows {
            match &mut run {
                Some((channel, number)) if Arc::ptr_eq(channel, &row.channel) => *number += 1,
                _ => self.count_enqueued(run.replace((&row.channel, 1))),
            }
            self.tell(|told| {
                told.recorder.enqueued(&Enqueued {
                    channel: &told.channels.of(&row.channel),
                    destination: &told.destinations.of(row.destination()),
                    requests: 1,
                    latency: since.map(|since| since.elapsed()),
                });
            });
        }
        self.count_enqueued(run);
    }

    fn count_enqueued(&self, run: Option<(&Arc<str>, u64)>) {
        if let Some((channel, number)) = run {
            self.channels.of(channel, |of| add(&of.enqueued, number));
        }
    }

    /// Adds requests to what is to be counted after a commit.
    pub(crate) fn tally<'a>(
        &self,
        tally: &mut Tally,
        rows: impl IntoIterator<Item = &'a NewRequest>,
    ) {
        for row in rows {
            let destination = self.destination_label(|| Cow::from(row.destination()));
            *tally
                .entry((Arc::clone(&row.channel), destination))
                .or_default() += 1;
        }
    }

    /// Counts them.
    pub(crate) fn enqueued_tally(&self, tally: Tally) {
        for ((channel, destination), requests) in tally {
            self.channels.of(&channel, |of| add(&of.enqueued, requests));
            self.tell(|told| {
                told.recorder.enqueued(&Enqueued {
                    channel: &told.channels.of(&channel),
                    destination: destination.as_deref().unwrap_or_default(),
                    requests,
                    latency: None,
                });
            });
        }
    }

    /// A batch was written, or could not be.
    pub(crate) fn batch_written(
        &self,
        kind: BatchKind,
        size: usize,
        began: Instant,
        is_written: bool,
    ) {
        self.tell(|told| {
            told.recorder.batch_written(&BatchWritten {
                kind,
                size,
                duration: began.elapsed(),
                is_written,
            });
        });
    }

    /// A request whose last process let its lease run out was claimed, this long after.
    pub(crate) fn taken_over(&self, channel: &str, late_by: Duration) {
        self.tell(|told| {
            told.recorder.taken_over(&TakenOver {
                channel: &told.channels.of(channel),
                late_by,
            });
        });
    }

    /// An attempt has ended. `ended` is called for a recorder only.
    pub(crate) fn attempted<'a>(
        &self,
        channel: &str,
        has_failed: bool,
        ended: impl FnOnce() -> Ended<'a>,
    ) {
        self.channels.of(channel, |of| {
            add(&of.attempts, 1);
            if has_failed {
                add(&of.failed_attempts, 1);
            }
        });
        self.tell(|told| {
            let ended = ended();
            let began = Instant::now().checked_sub(ended.duration);
            told.recorder.attempt_ended(&AttemptEnded {
                channel: &told.channels.of(ended.channel),
                destination: &told.destinations.of(&ended.destination),
                number: ended.number,
                failure: ended.failure,
                status: ended.status,
                queue_wait: began
                    .map(|began| began.saturating_duration_since(ended.due))
                    .unwrap_or_default(),
                duration: ended.duration,
            });
        });
    }

    /// The destination as the recorder is told it. `None` without a recorder.
    pub(crate) fn destination_label<'a>(
        &self,
        name: impl FnOnce() -> Cow<'a, str>,
    ) -> Option<Arc<str>> {
        self.told.as_ref().map(|told| told.destinations.of(&name()))
    }

    /// A request has its outcome, and was enqueued at this time. `destination` is a label.
    pub(crate) fn finished(
        &self,
        channel: &str,
        destination: Option<&str>,
        status: Status,
        attempts: u32,
        enqueued: Instant,
    ) {
        let latency = enqueued.elapsed();
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
        self.tell(|told| {
            told.recorder.finished(&Finished {
                channel: &told.channels.of(channel),
                destination: destination.unwrap_or_default(),
                status,
                attempts,
                latency,
            });
        });
    }

    /// Requests of a channel were ended by a statement, and not by a result.
    pub(crate) fn ended(&self, channel: &str, status: Status, number: u64) {
        self.channels.of(channel, |of| match status {
            Status::Discarded => add(&of.discarded, number),
            Status::Cancelled => add(&of.cancelled, number),
            _ => {}
        });
    }

    /// Results changed nothing.
    pub(crate) fn results_stale(&self, number: usize) {
        self.tell(|told| told.recorder.results_stale(number as u64));
    }

    /// A request has to wait, or has waited, for its destination.
    pub(crate) fn limited(&self, destination: &str, how: LimitedHow) {
        self.tell(|told| {
            told.recorder.limited(&Limited {
                destination: &told.destinations.of(destination),
                how,
            });
        });
    }

    /// An observer that tells the recorder as well.
    pub(super) fn observing(
        self: &Arc<Self>,
        observer: Option<DestinationObserver>,
    ) -> Option<DestinationObserver> {
        if !self.is_told() {
            return observer;
        }
        let meter = Arc::clone(self);
        Some(DestinationObserver(Arc::new(move |event| {
            meter.tell(|told| {
                let label = told.destinations.of(&event.destination);
                let event = DestinationEvent::new(label, event.kind.clone());
                told.recorder.destination_changed(&event);
            });
            if let Some(observer) = &observer {
                (observer.0)(event);
            }
        })))
    }

    /// Tells what the handle is doing.
    pub(super) fn handle_state(&self, state: &HandleState) {
        self.tell(|told| told.recorder.handle_state(state));
    }

    /// Tells what all processes have before them, with bounded names. `None`: another handle does.
    pub(super) fn queue_state(&self, state: Option<QueueState>) {
        self.tell(|told| {
            let state = state.map(|mut state| {
                for due in &mut state.due {
                    due.channel = told.channels.of(&due.channel);
                }
                for (name, _) in &mut state.destinations {
                    *name = told.destinations.of(name);
                }
                state
            });
            told.recorder.queue_state(state.as_ref());
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
