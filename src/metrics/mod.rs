//! Metrics over the facade of the crate [`metrics`](https://docs.rs/metrics): for Prometheus, or
//! any other exporter that the application installs.
//!
//! ```
//! # async fn example(pool: sqlx::PgPool) -> Result<(), requeuest::Error> {
//! use std::sync::Arc;
//!
//! use requeuest::Durable;
//! use requeuest::metrics::MetricsRecorder;
//!
//! // After the exporter was installed, which keeps the descriptions.
//! let recorder = Arc::new(MetricsRecorder::new());
//! let durable = Durable::builder(pool).recorder(recorder).build()?;
//! # Ok(()) }
//! ```
//!
//! [docs/metrics.md] lists the metrics with their labels, and `docs/grafana.json` is a dashboard of
//! them. The number of values of each label is bounded: see [`recorder`](crate::recorder).
//!
//! [docs/metrics.md]: https://github.com/requeuest/requeuest/blob/main/docs/metrics.md

mod names;

use std::collections::HashSet;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use ::metrics::{
    SharedString, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram,
};

use self::names::Kind;
use crate::destination::{DestinationEvent, DestinationEventKind, DestinationState};
use crate::recorder::{
    AttemptEnded, BatchWritten, Enqueued, Finished, HandleState, Limited, LimitedHow, QueueState,
    Recorder, TakenOver,
};

/// Limits of buckets for all histograms of times, in seconds: from 1 ms to 18 hours. For exporters
/// that need to be told, such as Prometheus's.
pub const DURATION_BUCKETS: [f64; 20] = [
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0,
    300.0, 1800.0, 7200.0, 21_600.0, 64_800.0,
];

/// Limits of buckets for `requeuest_batch_size`. A batch has at most 256 rows.
pub const BATCH_SIZE_BUCKETS: [f64; 9] = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0];

/// A [`Recorder`] for the facade `metrics`.
pub struct MetricsRecorder {
    /// The gauges that have to become zero once their channel or destination is not told of.
    shown: Mutex<Shown>,
}

#[derive(Default)]
struct Shown {
    channels: HashSet<Arc<str>>,
    destinations: HashSet<(Arc<str>, DestinationState)>,
}

impl MetricsRecorder {
    /// A recorder for the exporter that is installed. Describes all metrics to it.
    pub fn new() -> Self {
        for metric in names::ALL {
            let (name, unit, about) = (metric.name, metric.unit, metric.about);
            match metric.kind {
                Kind::Counter => describe_counter!(name, unit, about),
                Kind::Gauge => describe_gauge!(name, unit, about),
                Kind::Histogram => describe_histogram!(name, unit, about),
            }
        }
        Self {
            shown: Mutex::default(),
        }
    }

    /// Sets the gauges of what was told last time to this number.
    fn reset(&self, number: f64) {
        let shown = std::mem::take(&mut *self.shown.lock().unwrap_or_else(PoisonError::into_inner));
        for channel in shown.channels {
            gauge!(names::DUE, "channel" => Arc::clone(&channel)).set(number);
            gauge!(names::OLDEST_DUE, "channel" => channel).set(number);
        }
        for (destination, state) in shown.destinations {
            gauge!(
                names::DESTINATION_STATE,
                "destination" => destination, "state" => state.as_str()
            )
            .set(number);
        }
    }

    fn show(&self, state: &QueueState) {
        let mut shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        // Several channels may have one name: all beyond the first ones.
        let mut due = std::collections::HashMap::<&Arc<str>, (u64, Duration)>::new();
        for channel in &state.due {
            let (requests, oldest) = due.entry(&channel.channel).or_default();
            *requests += channel.requests;
            *oldest = channel.oldest.max(*oldest);
        }
        for (channel, (requests, oldest)) in due {
            gauge!(names::DUE, "channel" => Arc::clone(channel)).set(number(requests));
            gauge!(names::OLDEST_DUE, "channel" => Arc::clone(channel)).set(oldest.as_secs_f64());
            shown.channels.insert(Arc::clone(channel));
        }
        for (destination, state) in &state.destinations {
            gauge!(
                names::DESTINATION_STATE,
                "destination" => Arc::clone(destination), "state" => state.as_str()
            )
            .set(1.0);
            shown.destinations.insert((Arc::clone(destination), *state));
        }
    }
}

impl Default for MetricsRecorder {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for MetricsRecorder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("MetricsRecorder")
    }
}

fn label(text: &str) -> SharedString {
    SharedString::from(text.to_owned())
}

#[expect(clippy::cast_precision_loss, reason = "a gauge is a float")]
fn number(number: u64) -> f64 {
    number as f64
}

fn event_name(kind: &DestinationEventKind) -> &'static str {
    match kind {
        DestinationEventKind::Opened => "opened",
        DestinationEventKind::HalfOpen => "half_open",
        DestinationEventKind::Closed => "closed",
        DestinationEventKind::Paused { .. } => "paused",
        DestinationEventKind::Resumed => "resumed",
        DestinationEventKind::Throttled { .. } => "throttled",
        DestinationEventKind::Disabled { .. } => "disabled",
        DestinationEventKind::Enabled => "enabled",
        DestinationEventKind::FailureThreshold { .. } => "failure_threshold",
    }
}

impl Recorder for MetricsRecorder {
    fn enqueued(&self, enqueued: &Enqueued<'_>) {
        let channel = label(enqueued.channel);
        counter!(
            names::ENQUEUED,
            "channel" => channel.clone(), "destination" => label(enqueued.destination)
        )
        .increment(enqueued.requests);
        if let Some(latency) = enqueued.latency {
            histogram!(names::ENQUEUE_SECONDS, "channel" => channel).record(latency);
        }
    }

    fn batch_written(&self, batch: &BatchWritten) {
        let kind = batch.kind.as_str();
        histogram!(names::BATCH_SIZE, "kind" => kind).record(number(batch.size as u64));
        histogram!(names::BATCH_SECONDS, "kind" => kind).record(batch.duration);
        let failed = u64::from(!batch.is_written);
        counter!(names::BATCHES_FAILED, "kind" => kind).increment(failed);
    }

    fn taken_over(&self, takeover: &TakenOver<'_>) {
        let channel = label(takeover.channel);
        counter!(names::TAKEN_OVER, "channel" => channel.clone()).increment(1);
        histogram!(names::LATE_SECONDS, "channel" => channel).record(takeover.late_by);
    }

    fn attempt_ended(&self, attempt: &AttemptEnded<'_>) {
        let result = attempt.failure.map_or("success", |class| class.as_str());
        let (channel, destination) = (label(attempt.channel), label(attempt.destination));
        counter!(
            names::ATTEMPTS,
            "channel" => channel.clone(), "destination" => destination.clone(), "result" => result
        )
        .increment(1);
        histogram!(names::WAIT_SECONDS, "channel" => channel.clone()).record(attempt.queue_wait);
        histogram!(
            names::ATTEMPT_SECONDS,
            "channel" => channel, "destination" => destination
        )
        .record(attempt.duration);
    }

    fn finished(&self, finished: &Finished<'_>) {
        let (channel, destination) = (label(finished.channel), label(finished.destination));
        let status = finished.status.as_str();
        histogram!(names::REQUEST_SECONDS, "channel" => channel.clone()).record(finished.latency);
        if finished.is_dead_letter() {
            counter!(
                names::DEAD_LETTERS,
                "channel" => channel.clone(), "destination" => destination.clone(),
                "status" => status
            )
            .increment(1);
        }
        counter!(
            names::FINISHED,
            "channel" => channel, "destination" => destination, "status" => status
        )
        .increment(1);
    }

    fn results_stale(&self, number: u64) {
        counter!(names::STALE).increment(number);
    }

    fn limited(&self, limited: &Limited<'_>) {
        let destination = label(limited.destination);
        counter!(
            names::LIMITED,
            "destination" => destination.clone(), "how" => limited.how.as_str()
        )
        .increment(1);
        if let LimitedHow::Waited(waited) = limited.how {
            histogram!(names::LIMIT_SECONDS, "destination" => destination).record(waited);
        }
    }

    fn destination_changed(&self, event: &DestinationEvent) {
        counter!(
            names::EVENTS,
            "destination" => Arc::clone(&event.destination), "event" => event_name(&event.kind)
        )
        .increment(1);
    }

    fn handle_state(&self, state: &HandleState) {
        gauge!(names::IN_FLIGHT).set(number(state.in_flight as u64));
        gauge!(names::CONCURRENCY).set(number(state.concurrency as u64));
        gauge!(names::UNSETTLED).set(number(state.unsettled as u64));
        gauge!(names::QUEUED).set(number(state.queued as u64));
        for part in &state.sweep {
            if let Some(age) = part.last_success {
                gauge!(names::SWEEP_AGE, "part" => part.name).set(age.as_secs_f64());
            }
            gauge!(names::SWEEP_BEHIND, "part" => part.name).set(f64::from(part.behind));
        }
    }

    fn queue_state(&self, state: Option<&QueueState>) {
        let Some(state) = state else {
            // Another process knows: `max` over processes leaves these out.
            self.reset(f64::NAN);
            for (state, _) in &QueueState::none().depth {
                gauge!(names::DEPTH, "state" => *state).set(f64::NAN);
            }
            gauge!(names::KEPT).set(f64::NAN);
            gauge!(names::OLDEST_EXPIRED).set(f64::NAN);
            return;
        };
        self.reset(0.0);
        self.show(state);
        for (state, depth) in &state.depth {
            gauge!(names::DEPTH, "state" => *state).set(number(*depth));
        }
        gauge!(names::KEPT).set(number(state.dead_letters));
        let oldest = state.oldest_expired_outcome.unwrap_or_default();
        gauge!(names::OLDEST_EXPIRED).set(oldest.as_secs_f64());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DOCS: &str = include_str!("../../docs/metrics.md");

    /// The cells of the rows of the docs' table, without the code marks.
    fn documented() -> Vec<Vec<String>> {
        let rows = DOCS
            .lines()
            .filter(|line| line.starts_with("| `requeuest_"));
        let cells = rows.map(|row| {
            let cells = row.trim_matches('|').split('|');
            cells.map(|cell| cell.trim().replace('`', "")).collect()
        });
        cells.collect()
    }

    #[test]
    fn the_docs_list_each_metric_with_its_kind_unit_and_labels() {
        let registered: Vec<Vec<String>> = names::ALL
            .iter()
            .map(|metric| {
                let kind = match metric.kind {
                    Kind::Counter => "counter",
                    Kind::Gauge => "gauge",
                    Kind::Histogram => "histogram",
                };
                let about = metric.about.trim_end_matches('.').to_owned();
                let labels = metric.labels.join(", ");
                vec![metric.name.to_owned(), kind.to_owned(), labels, about]
            })
            .collect();
        assert_eq!(documented(), registered);
    }

    #[test]
    fn names_say_their_unit_and_whether_they_only_rise() {
        for metric in names::ALL {
            let is_counter = metric.kind == Kind::Counter;
            assert_eq!(metric.name.ends_with("_total"), is_counter, "{metric:?}");
            let is_time = metric.unit == ::metrics::Unit::Seconds;
            assert_eq!(metric.name.ends_with("_seconds"), is_time, "{metric:?}");
        }
    }
}
