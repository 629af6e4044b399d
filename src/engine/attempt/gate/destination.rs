//! What this process knows of one destination.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use super::leased::{Leased, Limits};
use super::pace::{Failing, Paced};
use crate::destination::{DestinationPolicy, Millis, Report, RetryMeter, State, millis};

/// How long a destination is remembered after its last attempt.
pub(super) const REMEMBERED: Duration = Duration::from_secs(60);

/// What this process knows of a destination.
#[derive(Debug)]
pub(super) struct Destination {
    pub(super) policy: Arc<DestinationPolicy>,
    /// Whether the policy is the database's.
    pub(super) has_stored_policy: bool,
    /// Attempts under way, and attempts that wait for their slot.
    pub(super) passes: usize,
    /// Requests that wait in memory for a pass.
    pub(super) waiting: usize,
    pub(super) pace: Paced,
    pub(super) failing: Failing,
    /// Whether its passes count among the slow ones.
    pub(super) counted_slow: bool,
    /// When deferred requests of it were last known to exist.
    pub(super) deferred: Option<Instant>,
    /// Notified when a pass is free.
    pub(super) freed: Arc<Notify>,
    pub(super) leased: Leased,
    pub(super) retries: Option<RetryMeter>,
    /// When the last of the retries without a budget is due.
    pub(super) next_retry: Option<Instant>,
    /// The end of a pause that other processes may not know of yet.
    pub(super) throttled: Option<Instant>,
    /// The state in the database, if there is any.
    pub(super) shared: Option<Shared>,
    pub(super) report: Report,
}

impl Destination {
    pub(super) fn new(policy: Arc<DestinationPolicy>, now: Instant) -> Self {
        let mut new = Self {
            policy: Arc::clone(&policy),
            has_stored_policy: false,
            passes: 0,
            waiting: 0,
            pace: Paced::new(now),
            failing: Failing::default(),
            counted_slow: true,
            deferred: None,
            freed: Arc::default(),
            leased: Leased::default(),
            retries: None,
            next_retry: None,
            throttled: None,
            shared: None,
            report: Report::default(),
        };
        new.set_policy(policy);
        new
    }

    pub(super) fn set_policy(&mut self, policy: Arc<DestinationPolicy>) {
        match (&mut self.retries, &policy.retry_budget) {
            (Some(meter), Some(budget)) => meter.set_budget(budget.clone()),
            (meter, budget) => *meter = budget.clone().map(RetryMeter::new),
        }
        self.policy = policy;
    }

    pub(super) fn is_closed(&self, now: Instant) -> bool {
        self.throttled.is_some_and(|until| now < until)
            || self.shared.as_ref().is_some_and(|it| it.is_closed(now))
    }

    pub(super) fn limits(&self, now: Instant) -> Limits {
        let probes = self.is_half_open(now).then(|| State::probes(&self.policy));
        Limits::of(&self.policy, probes)
    }

    pub(super) fn is_half_open(&self, now: Instant) -> bool {
        self.shared
            .as_ref()
            .is_some_and(|shared| shared.state.is_half_open(shared.now(now)))
    }

    pub(super) fn is_idle(&self, now: Instant) -> bool {
        self.passes == 0
            && self.waiting == 0
            && !self.has_stored_policy
            && self.pace.quiet(now) > REMEMBERED
            && self
                .deferred
                .is_none_or(|seen| now.saturating_duration_since(seen) > REMEMBERED)
            && self.shared.is_none()
            && self.report.is_empty()
    }

    /// Whether the report matters to other processes.
    pub(super) fn is_to_be_reported(&self) -> bool {
        let report = &self.report;
        !report.is_empty()
            && (self.shared.is_some()
                || report.retry_after.is_some()
                || report.gone
                || report.failures > 0 && self.policy.watches_failures())
    }
}

/// The state of a destination in the database.
#[derive(Clone, Debug)]
pub(super) struct Shared {
    pub(super) state: State,
    /// The database's time at an instant of this process.
    pub(super) clock: (Instant, Millis),
    /// Whether the destination was closed when this process last looked.
    pub(super) was_closed: bool,
}

impl Shared {
    pub(super) fn now(&self, now: Instant) -> Millis {
        let (at, time) = self.clock;
        time.saturating_add(millis(now.saturating_duration_since(at)))
    }

    pub(super) fn is_closed(&self, now: Instant) -> bool {
        self.state.closed_until(self.now(now)).is_some()
    }
}
