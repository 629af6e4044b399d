//! The callers of this process that wait for outcomes.
//!
//! A settle that commits here wakes its waiters directly. The other waiters depend on the task in
//! [`tasks::watch`](crate::engine::tasks::watch).

use std::collections::{HashMap, HashSet};
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, oneshot};

use super::caller_client::CallerClient;
use crate::error::{Error, Kind};
use crate::id::RequestId;
use crate::outcome::Outcome;

/// What a waiter gets.
pub(crate) type Waited = Result<Outcome, Error>;

#[derive(Debug, Default)]
pub(crate) struct Waiters {
    waiting: Mutex<HashMap<RequestId, Vec<Entry>>>,
    next_token: AtomicU64,
    /// Requests that may have finished, or that weren't looked up yet.
    to_fetch: Mutex<Vec<RequestId>>,
    changed: Notify,
}

#[derive(Debug)]
struct Entry {
    token: u64,
    sender: oneshot::Sender<Waited>,
    /// The request is known to be persisted, so it is an error if the database doesn't know it.
    armed: bool,
    /// When the caller's time is over, if its retry policy says so.
    until: Option<Instant>,
    /// The client that the caller would have used.
    client: Option<CallerClient>,
}

/// A future outcome. Dropping it stops the waiting.
#[derive(Debug)]
pub(crate) struct Waiter {
    waiters: Arc<Waiters>,
    id: RequestId,
    token: u64,
    receiver: oneshot::Receiver<Waited>,
}

impl Waiters {
    /// Begins to wait for an outcome. The database isn't asked for it before [`Waiter::arm`].
    pub(crate) fn subscribe(
        self: &Arc<Self>,
        id: RequestId,
        client: Option<CallerClient>,
        within: Option<Duration>,
    ) -> Waiter {
        let until = within.and_then(|within| Instant::now().checked_add(within));
        let token = self.next_token.fetch_add(1, Ordering::Relaxed);
        let (sender, receiver) = oneshot::channel();
        self.lock().entry(id).or_default().push(Entry {
            token,
            sender,
            armed: false,
            until,
            client,
        });
        Waiter {
            waiters: Arc::clone(self),
            id,
            token,
            receiver,
        }
    }

    /// Hands a committed outcome to its waiters. `outcome` is only called if there are any.
    pub(crate) fn wake(&self, id: RequestId, outcome: impl FnOnce() -> Outcome) {
        let Some(mut entries) = self.lock().remove(&id) else {
            return;
        };
        let Some(last) = entries.pop() else {
            return;
        };
        let outcome = outcome();
        for entry in entries {
            // Without a receiver the caller was dropped.
            let _ = entry.sender.send(Ok(outcome.clone()));
        }
        let _ = last.sender.send(Ok(outcome));
    }

    /// Whether a caller of this process waits for the request.
    pub(crate) fn contains(&self, id: RequestId) -> bool {
        self.lock().contains_key(&id)
    }

    /// The client of a caller that waits for the request.
    pub(crate) fn client(&self, id: RequestId) -> Option<CallerClient> {
        let waiting = self.lock();
        waiting
            .get(&id)?
            .iter()
            .find_map(|entry| entry.client.clone())
    }

    /// Has the outcomes of these requests fetched soon, if callers wait for them.
    pub(crate) fn fetch_soon(&self, ids: Vec<RequestId>) {
        if !ids.is_empty() {
            let mut to_fetch = self.to_fetch.lock().unwrap_or_else(PoisonError::into_inner);
            to_fetch.extend(ids);
            drop(to_fetch);
            self.changed.notify_one();
        }
    }

    /// Fails every waiter: no outcome will come any more.
    pub(crate) fn close(&self) {
        for entry in self.lock().drain().flat_map(|(_, entries)| entries) {
            let _ = entry.sender.send(Err(Error::new(Kind::Closed)));
        }
        // The watching task returns its connection.
        self.changed.notify_one();
    }

    /// Fails the armed waiters of a request.
    pub(crate) fn fail(&self, id: RequestId, error: impl Fn() -> Error) {
        let mut waiting = self.lock();
        if let Some(entries) = waiting.remove(&id) {
            let (armed, early): (Vec<_>, Vec<_>) =
                entries.into_iter().partition(|entry| entry.armed);
            for entry in armed {
                let _ = entry.sender.send(Err(error()));
            }
            if !early.is_empty() {
                waiting.insert(id, early);
            }
        }
    }

    /// The requests that [`fetch_soon`](Self::fetch_soon) named since the last call.
    pub(crate) fn take_to_fetch(&self) -> HashSet<RequestId> {
        let mut to_fetch = self.to_fetch.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut *to_fetch).into_iter().collect()
    }

    /// Waits until there may be requests to fetch.
    pub(crate) async fn changed(&self) {
        self.changed.notified().await;
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.lock().is_empty()
    }

    /// The requests of armed waiters.
    pub(crate) fn armed(&self) -> Vec<RequestId> {
        let waiting = self.lock();
        waiting
            .iter()
            .filter(|(_, entries)| entries.iter().any(|entry| entry.armed))
            .map(|(id, _)| *id)
            .collect()
    }

    /// The requests of armed waiters whose time is over.
    pub(crate) fn overdue(&self, now: Instant) -> Vec<RequestId> {
        let waiting = self.lock();
        let is_overdue = |entry: &Entry| entry.armed && entry.until.is_some_and(|it| it <= now);
        waiting
            .iter()
            .filter(|(_, entries)| entries.iter().any(is_overdue))
            .map(|(id, _)| *id)
            .collect()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<RequestId, Vec<Entry>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Waiter {
    /// Notes that the request is persisted. If another process drives it (`elsewhere`), the
    /// database is asked for its outcome.
    pub(crate) fn arm(&self, elsewhere: bool) {
        if let Some(entries) = self.waiters.lock().get_mut(&self.id) {
            for entry in entries.iter_mut().filter(|entry| entry.token == self.token) {
                entry.armed = true;
            }
        }
        if elsewhere {
            self.waiters.fetch_soon(vec![self.id]);
        }
    }
}

impl Future for Waiter {
    type Output = Waited;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Waited> {
        Pin::new(&mut self.receiver).poll(cx).map(|received| {
            // The sender is only dropped unused when the engine ends.
            received.unwrap_or_else(|_| Err(Error::new(Kind::Closed)))
        })
    }
}

impl Drop for Waiter {
    fn drop(&mut self) {
        let mut waiting = self.waiters.lock();
        if let Some(entries) = waiting.get_mut(&self.id) {
            entries.retain(|entry| entry.token != self.token);
            if entries.is_empty() {
                waiting.remove(&self.id);
            }
        }
    }
}
