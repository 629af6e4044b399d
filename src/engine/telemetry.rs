//! How the engine logs.
//!
//! Every event is a fixed sentence with fields. The levels are:
//!
//! - `error`: a fault of this crate, or stored data that can't be used.
//! - `warn`: an operator should look. A condition that lasts is logged once when it begins, not for
//!   each retry. A request that is given up is logged once.
//! - `info`: starts and stops, and the end of a condition.
//! - `debug`: failed attempts, failed operations of the store, retries.
//!
//! No event has a header value, or the credentials, path or query of a URL.

use std::collections::HashSet;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::id::RequestId;

/// A condition that lasts, such as an unreachable database. Several tasks may meet it at once.
#[derive(Debug, Default)]
pub(crate) struct Condition {
    holders: AtomicUsize,
}

/// One task's share of a [`Condition`].
#[derive(Debug)]
pub(crate) struct Lasting<'a>(&'a Condition);

impl Condition {
    /// Notes that the condition holds for one more task. `true` if it holds for no other.
    pub(crate) fn begins(&self) -> (Lasting<'_>, bool) {
        let first = self.holders.fetch_add(1, Ordering::Relaxed) == 0;
        (Lasting(self), first)
    }
}

impl Lasting<'_> {
    /// Notes that the condition is over for this task. `true` if it is over for all.
    pub(crate) fn ends(self) -> bool {
        let last = self.0.holders.fetch_sub(1, Ordering::Relaxed) == 1;
        std::mem::forget(self);
        last
    }
}

impl Drop for Lasting<'_> {
    fn drop(&mut self) {
        self.0.holders.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A condition that only one task meets.
#[derive(Debug, Default)]
pub(crate) struct OwnCondition {
    lasts: bool,
}

impl OwnCondition {
    /// Notes that the condition holds. `true` if it has just begun.
    pub(crate) fn begins(&mut self) -> bool {
        !std::mem::replace(&mut self.lasts, true)
    }

    /// Notes that the condition is over. `true` if it held until now.
    pub(crate) fn ends(&mut self) -> bool {
        std::mem::take(&mut self.lasts)
    }
}

/// How many failing requests are remembered.
const MAX_FAILING: usize = 1000;

/// The requests for which something fails again and again. Only the first failure of each is worth
/// a warning.
#[derive(Debug, Default)]
pub(crate) struct Failures {
    failing: Mutex<HashSet<RequestId>>,
}

impl Failures {
    /// Notes a failure. `true` if it is the first one of its request.
    pub(crate) fn is_first(&self, id: RequestId) -> bool {
        let mut failing = self.failing.lock().unwrap_or_else(PoisonError::into_inner);
        if failing.len() >= MAX_FAILING {
            failing.clear();
        }
        failing.insert(id)
    }

    /// Notes that it fails no more.
    pub(crate) fn recovers(&self, id: RequestId) {
        let mut failing = self.failing.lock().unwrap_or_else(PoisonError::into_inner);
        failing.remove(&id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_condition_begins_with_the_first_task_and_ends_with_the_last() {
        let condition = Condition::default();
        let (one, first) = condition.begins();
        assert!(first);
        let (two, first) = condition.begins();
        assert!(!first);
        let (three, _) = condition.begins();
        drop(three);
        assert!(!one.ends());
        assert!(two.ends());
        assert!(condition.begins().1);
    }

    #[test]
    fn a_condition_of_one_task_begins_and_ends_once() {
        let mut condition = OwnCondition::default();
        assert!(!condition.ends());
        assert!(condition.begins());
        assert!(!condition.begins());
        assert!(condition.ends());
        assert!(!condition.ends());
    }

    #[test]
    fn only_the_first_failure_of_a_request_is_news() {
        let failures = Failures::default();
        let (one, other) = (RequestId::generate(), RequestId::generate());
        assert!(failures.is_first(one));
        assert!(failures.is_first(other));
        assert!(!failures.is_first(one));
        failures.recovers(one);
        assert!(failures.is_first(one));
    }
}
