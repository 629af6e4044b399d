//! Recognising a call that a retry layer above this crate makes again.
//!
//! Such a layer would persist a new request for each of its tries, each with an idempotency key of
//! its own. A call leaves a [`Marker`] in the caller's extensions; if the extensions come by again,
//! the same request is meant. Where they don't, [`FailedRequests`] lets the user be warned.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use uuid::Uuid;

use crate::id::RequestId;
use crate::request::Request;

/// Which request a call made. Lies in the caller's extensions until the request has completed.
#[derive(Clone, Debug)]
pub(crate) struct Marker {
    id: RequestId,
    /// The handle that made the request. Another one may have another database.
    instance: Uuid,
    request: Arc<Request>,
    /// When the call ended, and its insert with it.
    ended: Option<Instant>,
}

impl Marker {
    pub(crate) fn new(id: RequestId, instance: Uuid, request: Arc<Request>) -> Self {
        Self {
            id,
            instance,
            request,
            ended: None,
        }
    }

    pub(crate) fn id(&self) -> RequestId {
        self.id
    }

    pub(crate) fn request(&self) -> &Request {
        &self.request
    }

    /// Whether this request of this handle is the marked one. Long after the call ended it is not:
    /// a caller that keeps its extensions for many calls would get that call's error for ever.
    pub(crate) fn is_of(&self, instance: Uuid, request: &Request, now: Instant) -> bool {
        let recent = self
            .ended
            .is_none_or(|ended| now.saturating_duration_since(ended) < RETRIED_WITHIN);
        recent
            && self.instance == instance
            && self.request.is_same(request)
            && self.request.options.mean_the_same(&request.options)
    }

    pub(crate) fn ended(self, now: Instant) -> Self {
        Self {
            ended: Some(now),
            ..self
        }
    }

    /// Whether the first attempt of the marked call may be waiting for its insert. That attempt and
    /// the call's end are the only other holders of the request.
    pub(crate) fn may_start(&self) -> bool {
        self.ended.is_none() && Arc::strong_count(&self.request) > 1
    }
}

/// How long after a call ended a retry layer may make it again.
const RETRIED_WITHIN: Duration = Duration::from_secs(5 * 60);
/// How soon after a failure a repetition is taken for that of a retry layer.
const SOON: Duration = Duration::from_secs(10);
/// How many failed requests are remembered.
const MAX_FAILED: usize = 64;

/// The last requests that were given up, until one of them is made again.
#[derive(Debug, Default)]
pub(crate) struct FailedRequests {
    /// How many are remembered. Read without the lock, so that healthy requests don't take it.
    count: AtomicUsize,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    failed: Vec<Failed>,
    /// A repetition was seen, and nothing is remembered any more.
    repeated: bool,
}

#[derive(Debug)]
struct Failed {
    fingerprint: [u8; 32],
    at: Instant,
}

impl FailedRequests {
    pub(crate) fn remember(&self, fingerprint: [u8; 32], now: Instant) {
        self.with_recent(now, |inner| {
            if inner.repeated {
                return;
            }
            if inner.failed.len() == MAX_FAILED {
                inner.failed.remove(0);
            }
            inner.failed.push(Failed {
                fingerprint,
                at: now,
            });
        });
    }

    /// Whether this request was given up shortly before. `true` once at most. The arguments are
    /// only called while failed requests are remembered.
    pub(crate) fn is_first_repetition(
        &self,
        fingerprint: impl FnOnce() -> [u8; 32],
        now: impl FnOnce() -> Instant,
    ) -> bool {
        if self.count.load(Ordering::Relaxed) == 0 {
            return false;
        }
        let fingerprint = fingerprint();
        self.with_recent(now(), |inner| {
            let mut failed = inner.failed.iter();
            let repeated = failed.any(|failed| failed.fingerprint == fingerprint);
            if repeated {
                inner.repeated = true;
                inner.failed = Vec::new();
            }
            repeated
        })
    }

    fn with_recent<T>(&self, now: Instant, act: impl FnOnce(&mut Inner) -> T) -> T {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner
            .failed
            .retain(|failed| now.saturating_duration_since(failed.at) < SOON);
        let acted = act(&mut inner);
        self.count.store(inner.failed.len(), Ordering::Relaxed);
        acted
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_repeated(requests: &FailedRequests, number: u8, now: Instant) -> bool {
        requests.is_first_repetition(|| [number; 32], || now)
    }

    #[test]
    fn a_failed_request_is_remembered_for_a_while() {
        let requests = FailedRequests::default();
        let now = Instant::now();
        assert!(!requests.is_first_repetition(|| unreachable!("none has failed"), || now));
        requests.remember([1; 32], now);
        assert!(!is_repeated(&requests, 2, now));
        assert!(!is_repeated(&requests, 1, now + SOON));
        assert_eq!(requests.count.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn only_the_first_repetition_counts() {
        let requests = FailedRequests::default();
        let now = Instant::now();
        requests.remember([1; 32], now);
        requests.remember([2; 32], now);
        assert!(is_repeated(&requests, 1, now));
        requests.remember([1; 32], now);
        for number in [1, 2] {
            assert!(!is_repeated(&requests, number, now));
        }
    }

    #[test]
    fn only_the_last_failed_requests_are_remembered() {
        let requests = FailedRequests::default();
        let now = Instant::now();
        for number in 0..=MAX_FAILED as u8 {
            requests.remember([number; 32], now);
        }
        assert_eq!(requests.count.load(Ordering::Relaxed), MAX_FAILED);
        assert!(!is_repeated(&requests, 0, now));
        assert!(is_repeated(&requests, 1, now));
    }
}
