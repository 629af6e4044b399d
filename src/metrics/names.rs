//! The metrics that there are: [docs/metrics.md] lists them, and a test compares the two.
//!
//! [docs/metrics.md]: https://github.com/requeuest/requeuest/blob/main/docs/metrics.md

use metrics::Unit;

/// What a metric is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Counter,
    Gauge,
    Histogram,
}

/// One metric.
#[derive(Debug)]
pub(super) struct Metric {
    pub(super) name: &'static str,
    pub(super) kind: Kind,
    pub(super) unit: Unit,
    /// What it is said to be, in the exporter and in the docs.
    pub(super) about: &'static str,
    #[cfg_attr(not(test), expect(dead_code, reason = "compared with the docs"))]
    pub(super) labels: &'static [&'static str],
}

macro_rules! metrics {
    ($($constant:ident $name:literal $kind:ident $unit:ident $labels:tt $about:literal)*) => {
        $(pub(super) const $constant: &str = $name;)*

        /// All of them, in the order of the docs.
        pub(super) const ALL: &[Metric] = &[$(Metric {
            name: $name,
            kind: Kind::$kind,
            unit: Unit::$unit,
            about: $about,
            labels: &$labels,
        }),*];
    };
}

metrics! {
    ENQUEUED "requeuest_requests_enqueued_total" Counter Count ["channel", "destination"]
        "Requests that were persisted."
    ATTEMPTS "requeuest_attempts_total" Counter Count ["channel", "destination", "result"]
        "Attempts that ended: success, or the class of their failure."
    FINISHED "requeuest_requests_finished_total" Counter Count ["channel", "destination", "status"]
        "Requests that have an outcome, by its status."
    DEAD_LETTERS "requeuest_dead_letters_total" Counter Count ["channel", "destination", "status"]
        "Requests that became dead letters: discarded or ambiguous."
    TAKEN_OVER "requeuest_leases_taken_over_total" Counter Count ["channel"]
        "Claims of requests whose last process let its lease run out."
    STALE "requeuest_results_stale_total" Counter Count []
        "Results that changed nothing: their requests were taken over or had finished."
    LIMITED "requeuest_requests_limited_total" Counter Count ["destination", "how"]
        "Requests that had to wait because of the limits or the state of their destination."
    EVENTS "requeuest_destination_events_total" Counter Count ["destination", "event"]
        "What happened to destinations: breakers, pauses, throttles."
    BATCHES_FAILED "requeuest_batches_failed_total" Counter Count ["kind"]
        "Writes of requests or results that failed."
    ENQUEUE_SECONDS "requeuest_enqueue_duration_seconds" Histogram Seconds ["channel"]
        "Time from the call to the commit of the request."
    WAIT_SECONDS "requeuest_queue_wait_seconds" Histogram Seconds ["channel"]
        "Time from when a request was due to its attempt."
    ATTEMPT_SECONDS "requeuest_attempt_duration_seconds" Histogram Seconds
        ["channel", "destination"]
        "Time that an attempt took."
    REQUEST_SECONDS "requeuest_request_duration_seconds" Histogram Seconds ["channel"]
        "Time from the enqueue of a request to its outcome, delays included."
    LIMIT_SECONDS "requeuest_limiter_wait_seconds" Histogram Seconds ["destination"]
        "Time that a request waited in memory for its destination."
    LATE_SECONDS "requeuest_lease_takeover_delay_seconds" Histogram Seconds ["channel"]
        "Time from the end of a lease to the claim that took the request over."
    BATCH_SIZE "requeuest_batch_size" Histogram Count ["kind"]
        "Rows of one write: requests (enqueue) or results (settle)."
    BATCH_SECONDS "requeuest_batch_duration_seconds" Histogram Seconds ["kind"]
        "Time that a write took."
    IN_FLIGHT "requeuest_attempts_in_flight" Gauge Count []
        "Attempts under way in this handle."
    CONCURRENCY "requeuest_attempts_limit" Gauge Count []
        "Attempts that may be under way in this handle at once."
    UNSETTLED "requeuest_results_unsettled" Gauge Count []
        "Results in this handle that wait for their commit."
    QUEUED "requeuest_requests_unpersisted" Gauge Count []
        "Requests in this handle that wait to be persisted."
    SWEEP_AGE "requeuest_sweep_last_success_age_seconds" Gauge Seconds ["part"]
        "Time since a part of the sweep last succeeded in this handle."
    SWEEP_BEHIND "requeuest_sweep_behind" Gauge Count ["part"]
        "1 while a part of the sweep can't keep up in this handle, else 0."
    DEPTH "requeuest_queue_depth" Gauge Count ["state"]
        "Unfinished requests of all processes, by state. At least, above 10,000."
    DUE "requeuest_queue_due" Gauge Count ["channel"]
        "Requests of all processes that are due. At least, above 10,000."
    OLDEST_DUE "requeuest_queue_oldest_due_age_seconds" Gauge Seconds ["channel"]
        "Time for which the oldest due request has waited."
    KEPT "requeuest_dead_letters_kept" Gauge Count []
        "Dead letters that are kept. At least, above 10,000."
    OLDEST_EXPIRED "requeuest_oldest_expired_outcome_age_seconds" Gauge Seconds []
        "Time by which the oldest outcome has outlived its retention."
    DESTINATION_STATE "requeuest_destination_state" Gauge Count ["destination", "state"]
        "1 for the state of a destination that takes no requests, or not all."
}
