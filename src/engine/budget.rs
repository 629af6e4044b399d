//! How much may wait in this process to be persisted.
//!
//! A database that is slow or away would otherwise let requests pile up until memory runs out. The
//! caller gets an error instead, while it can still decide what to do.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::error::{Error, Kind};

/// The requests on their way into the database, and their limits.
#[derive(Debug)]
pub(super) struct Budget {
    requests: AtomicUsize,
    bytes: AtomicUsize,
    max_requests: usize,
    max_bytes: usize,
}

/// A request's share of the budget, which it gives back when it is dropped.
#[derive(Debug)]
pub(super) struct Share {
    budget: Arc<Budget>,
    bytes: usize,
}

impl Budget {
    pub(super) fn new(max_requests: usize, max_bytes: usize) -> Self {
        Self {
            requests: AtomicUsize::new(0),
            bytes: AtomicUsize::new(0),
            max_requests,
            max_bytes,
        }
    }

    /// Takes a share for a request of this size. A request that is larger than the whole budget
    /// may wait alone.
    ///
    /// # Errors
    ///
    /// If too much waits already.
    /// How many requests wait.
    pub(super) fn requests(&self) -> usize {
        self.requests.load(Ordering::Relaxed)
    }

    pub(super) fn take(self: &Arc<Self>, bytes: usize) -> Result<Share, Error> {
        // Counted first and checked afterwards, so that no lock is needed. A share that is refused
        // is given back at once.
        let requests = self.requests.fetch_add(1, Ordering::Relaxed);
        let waiting = self.bytes.fetch_add(bytes, Ordering::Relaxed);
        let share = Share {
            budget: Arc::clone(self),
            bytes,
        };
        let fits = waiting == 0 || waiting.saturating_add(bytes) <= self.max_bytes;
        if requests < self.max_requests && fits {
            Ok(share)
        } else {
            Err(Error::new(Kind::Overloaded {
                requests,
                bytes: waiting,
            }))
        }
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.budget.requests.fetch_sub(1, Ordering::Relaxed);
        self.budget.bytes.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_and_bytes_are_limited_and_come_back() {
        let budget = Arc::new(Budget::new(3, 100));
        let first = budget.take(60).unwrap();
        assert!(budget.take(41).unwrap_err().is_overloaded());
        let second = budget.take(40).unwrap();
        let third = budget.take(0).unwrap();
        assert!(budget.take(0).unwrap_err().is_overloaded());
        drop(third);
        budget.take(0).unwrap();
        drop((first, second));
        // Larger than the budget, but alone.
        let alone = budget.take(1000).unwrap();
        assert!(budget.take(1).unwrap_err().is_overloaded());
        drop(alone);
        budget.take(1).unwrap();
    }
}
