//! What the database tells of destinations, and what it is asked.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Instant;

use super::Gate;
use super::destination::Shared;
use crate::store::destinations::{Grant, LeaseRequest, StoredDestination};

impl Gate {
    /// Whether anything was sent or polled for, so that the database has to be asked.
    pub(crate) fn is_used(&self) -> bool {
        self.lock().used
    }

    /// Notes that the database has nothing of other destinations than these.
    pub(crate) fn forget_others(&self, known: &HashSet<String>) {
        for (name, destination) in &mut self.lock().destinations {
            if known.contains(&**name) {
                continue;
            }
            if destination.shared.take().is_some() {
                destination.throttled = None;
            }
            if std::mem::take(&mut destination.has_stored_policy) {
                destination.set_policy(self.policy_of(name));
            }
        }
    }

    /// Notes what the database has of destinations.
    pub(crate) fn learn(&self, known: Vec<StoredDestination>) {
        let now = Instant::now();
        let mut inner = self.lock();
        for known in known {
            let is_stored = known.policy.is_some();
            let policy = match known.policy {
                Some(policy) => Arc::new(policy),
                None => self.policy_of(&known.name),
            };
            let destination = self.entry(&mut inner, &known.name, now);
            if *destination.policy != *policy {
                destination.set_policy(policy);
            }
            destination.has_stored_policy = is_stored;
            let closed = known.state.closed_until(known.now);
            if closed.is_none() {
                // Resumed or reset, unless it was throttled after that.
                destination.throttled = destination
                    .throttled
                    .filter(|_| destination.report.retry_after.is_some());
            }
            destination.shared = (!known.state.is_idle(known.now)).then(|| Shared {
                was_closed: closed.is_some(),
                clock: (now, known.now),
                state: known.state,
            });
            destination.freed.notify_waiters();
        }
    }

    /// The permits and tokens to ask the database for.
    pub(crate) fn asks(&self) -> Vec<LeaseRequest> {
        let now = Instant::now();
        let mut asks = Vec::new();
        let mut inner = self.lock();
        if inner.closed {
            return asks;
        }
        let most = if inner.is_alone(now) {
            self.most_alone
        } else {
            self.most
        };
        for (name, destination) in &mut inner.destinations {
            let limits = destination.limits(now);
            let passes = destination.passes as u32;
            let quiet = destination.pace.quiet(now);
            let leased = &mut destination.leased;
            asks.extend(leased.ask(name, limits, passes, most as u32, quiet, now));
        }
        asks
    }

    /// Asks for no more. Returns whether there may be permits to give back.
    pub(crate) fn close(&self) -> bool {
        let mut inner = self.lock();
        inner.closed = true;
        inner.destinations.values().any(|it| it.leased.has_row())
    }

    /// Notes the database's answers, or that it gave none.
    pub(crate) fn answer(
        &self,
        asked: Instant,
        asks: &[LeaseRequest],
        grants: Option<&HashMap<String, Grant>>,
    ) {
        let mut inner = self.lock();
        for ask in asks {
            let Some(destination) = inner.destinations.get_mut(&ask.name) else {
                continue;
            };
            match grants.and_then(|grants| grants.get(&*ask.name)) {
                Some(grant) => {
                    destination
                        .leased
                        .granted(ask, *grant, self.rules.lease, asked);
                    destination.freed.notify_waiters();
                }
                None => destination.leased.not_answered(Instant::now()),
            }
        }
    }

    /// When the next question is due, if one is.
    pub(crate) fn next_ask(&self) -> Option<Instant> {
        let inner = self.lock();
        let destinations = inner.destinations.values();
        destinations
            .filter_map(|destination| destination.leased.next_ask())
            .min()
    }
}
