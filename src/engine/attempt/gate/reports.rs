//! What attempts show of their destinations, and what other processes are told of it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use http::StatusCode;

use super::{Gate, Turn};
use crate::destination::{DestinationPolicy, Report};

/// How long a destination stays closed here after an attempt has shown that it is to be, until the
/// database says so.
const UNTIL_KNOWN: Duration = Duration::from_secs(2);

/// What the answer to an attempt, or its failure, says of the destination.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Seen {
    pub(crate) turn: Turn,
    pub(crate) status: Option<StatusCode>,
    /// The pause that the answer asked for.
    pub(crate) retry_after: Option<Duration>,
    pub(crate) fault: Blame,
    /// Whether the request is to be sent again.
    pub(crate) is_repeated: bool,
}

/// What an attempt says of its destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Blame {
    Success,
    Destination,
    /// The fault is a proxy's or this side's.
    Other,
}

impl Gate {
    /// Notes what an attempt has shown.
    pub(super) fn note(&self, name: &str, is_probe: bool, seen: Seen) {
        let now = Instant::now();
        let mut inner = self.lock();
        let Some(destination) = inner.destinations.get_mut(name) else {
            return;
        };
        let throttle = seen
            .status
            .and_then(|status| destination.policy.throttle(status, seen.retry_after));
        let is_probe = is_probe && destination.is_half_open(now);
        // A receiver that wants fewer requests has not failed.
        let is_busy = throttle.is_some() && seen.status == Some(StatusCode::TOO_MANY_REQUESTS);
        let on_gone = destination
            .policy
            .auto_disable
            .as_ref()
            .is_some_and(|rule| rule.on_gone);
        if seen.fault != Blame::Other {
            destination.failing.note(seen.is_repeated);
        }
        let report = &mut destination.report;
        if let Some(pause) = throttle {
            report.retry_after = report.retry_after.max(Some(pause));
            let until = now + pause;
            destination.throttled = destination.throttled.max(Some(until));
            self.urgent.notify_one();
        }
        if seen.fault != Blame::Other {
            let failed = seen.fault == Blame::Destination && !is_busy;
            if !is_busy {
                report.attempts = report.attempts.saturating_add(1);
                report.failures = report.failures.saturating_add(failed.into());
                let retries = u32::from(seen.turn == Turn::Retry);
                report.retries = report.retries.saturating_add(retries);
            }
            if on_gone && seen.status == Some(StatusCode::GONE) {
                report.gone = true;
                destination.throttled = destination.throttled.max(Some(now + UNTIL_KNOWN));
                self.urgent.notify_one();
            }
            if is_probe {
                report.probe = Some(report.probe.unwrap_or(true) && !failed);
                if failed {
                    destination.throttled = destination.throttled.max(Some(now + UNTIL_KNOWN));
                }
                self.urgent.notify_one();
            }
        }
    }

    /// What attempts have shown since the last call, as far as other processes should know it, and
    /// the policies that judge it. A destination whose closed time has just ended is among them.
    pub(crate) fn take_reports(&self) -> Vec<(Arc<str>, Arc<DestinationPolicy>, Report)> {
        let now = Instant::now();
        let mut reports = Vec::new();
        for (name, destination) in &mut self.lock().destinations {
            let closed = destination.is_closed(now);
            let opened = destination
                .shared
                .as_mut()
                .is_some_and(|shared| std::mem::replace(&mut shared.was_closed, closed) && !closed);
            let report = destination.is_to_be_reported();
            let taken = std::mem::take(&mut destination.report);
            if report || opened {
                reports.push((Arc::clone(name), Arc::clone(&destination.policy), taken));
            }
        }
        reports
    }

    /// Keeps reports that could not be stored.
    pub(crate) fn restore_reports(&self, reports: &[(Arc<str>, Arc<DestinationPolicy>, Report)]) {
        let mut inner = self.lock();
        for (name, _, report) in reports {
            if let Some(destination) = inner.destinations.get_mut(name) {
                destination.report.add(report);
            }
        }
    }
}
