//! Who waits for which outcome in this process.
//!
//! Callers whose request is driven here are woken by the settle that committed it. The others are looked after by one task:
//! it listens for word from other processes, and asks the database every [`POLL_INTERVAL`] all the same, because a
//! notification is a hint and never the truth.

use std::collections::{HashMap, HashSet};
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use sqlx::postgres::PgListener;
use tokio::sync::{Notify, oneshot};
use uuid::Uuid;

use crate::engine::Shared;
use crate::engine::live::Live;
use crate::error::{Error, Kind};
use crate::id::RequestId;
use crate::outcome::Outcome;
use crate::store::outcome::{self, Found};

/// How long an outcome that another process settled can go unnoticed when its notification is lost.
const POLL_INTERVAL: Duration = Duration::from_secs(1);
/// The connection may have died unnoticed, and sqlx would wait for an answer to the end of the socket's own patience.
const LISTEN_TIMEOUT: Duration = Duration::from_secs(2);
/// How many ids one question to the database holds.
const MAX_IDS: usize = 1000;

/// What a waiter gets.
pub(crate) type Waited = Result<Outcome, Error>;

#[derive(Debug, Default)]
pub(crate) struct Waiters {
    waiting: Mutex<HashMap<RequestId, Vec<Entry>>>,
    next_token: AtomicU64,
    /// Requests that may have ended, or that nobody has listened for yet.
    wanted: Mutex<Vec<RequestId>>,
    changed: Notify,
}

#[derive(Debug)]
struct Entry {
    token: u64,
    sender: oneshot::Sender<Waited>,
    /// The request is known to be persisted: that the database doesn't know it is news.
    armed: bool,
    /// The client that the caller would have used.
    live: Option<Live>,
}

/// A place in the queue for an outcome; dropping it gives it up.
#[derive(Debug)]
pub(crate) struct Waiter {
    waiters: Arc<Waiters>,
    id: RequestId,
    token: u64,
    receiver: oneshot::Receiver<Waited>,
}

impl Waiters {
    /// Begins to wait for an outcome. Not before [`Waiter::arm`] is the database asked for it.
    pub(crate) fn subscribe(self: &Arc<Self>, id: RequestId, live: Option<Live>) -> Waiter {
        let token = self.next_token.fetch_add(1, Ordering::Relaxed);
        let (sender, receiver) = oneshot::channel();
        self.lock().entry(id).or_default().push(Entry {
            token,
            sender,
            armed: false,
            live,
        });
        Waiter {
            waiters: Arc::clone(self),
            id,
            token,
            receiver,
        }
    }

    /// Hands a committed outcome to everybody who waits for it. It is made if anybody does.
    pub(crate) fn wake(&self, id: RequestId, outcome: impl FnOnce() -> Outcome) {
        let Some(mut entries) = self.lock().remove(&id) else {
            return;
        };
        let Some(last) = entries.pop() else {
            return;
        };
        let outcome = outcome();
        for entry in entries {
            // A receiver that is gone wants nothing.
            let _ = entry.sender.send(Ok(outcome.clone()));
        }
        let _ = last.sender.send(Ok(outcome));
    }

    /// Whether somebody here waits for the request.
    pub(crate) fn contains(&self, id: RequestId) -> bool {
        self.lock().contains_key(&id)
    }

    /// The client of a caller that waits for the request.
    pub(crate) fn live(&self, id: RequestId) -> Option<Live> {
        let waiting = self.lock();
        waiting
            .get(&id)?
            .iter()
            .find_map(|entry| entry.live.clone())
    }

    /// Has the database asked soon for those of these requests that somebody waits for.
    pub(crate) fn ask_soon(&self, ids: Vec<RequestId>) {
        if !ids.is_empty() {
            let mut wanted = self.wanted.lock().unwrap_or_else(PoisonError::into_inner);
            wanted.extend(ids);
            drop(wanted);
            self.changed.notify_one();
        }
    }

    /// Nobody will be woken any more.
    pub(crate) fn close(&self) {
        for entry in self.lock().drain().flat_map(|(_, entries)| entries) {
            let _ = entry.sender.send(Err(Error::new(Kind::Closed)));
        }
        // Lets go of the connection that listens.
        self.changed.notify_one();
    }

    fn fail(&self, id: RequestId, error: impl Fn() -> Error) {
        let mut waiting = self.lock();
        if let Some(entries) = waiting.remove(&id) {
            let (gone, early): (Vec<_>, Vec<_>) =
                entries.into_iter().partition(|entry| entry.armed);
            for entry in gone {
                let _ = entry.sender.send(Err(error()));
            }
            if !early.is_empty() {
                waiting.insert(id, early);
            }
        }
    }

    fn take_wanted(&self) -> HashSet<RequestId> {
        let mut wanted = self.wanted.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut *wanted).into_iter().collect()
    }

    fn armed(&self) -> Vec<RequestId> {
        let waiting = self.lock();
        waiting
            .iter()
            .filter(|(_, entries)| entries.iter().any(|entry| entry.armed))
            .map(|(id, _)| *id)
            .collect()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<RequestId, Vec<Entry>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Waiter {
    /// The request is persisted. If it is not driven here, `elsewhere`, the database is asked for its outcome.
    pub(crate) fn arm(&self, elsewhere: bool) {
        if let Some(entries) = self.waiters.lock().get_mut(&self.id) {
            for entry in entries.iter_mut().filter(|entry| entry.token == self.token) {
                entry.armed = true;
            }
        }
        if elsewhere {
            self.waiters.ask_soon(vec![self.id]);
        }
    }
}

impl Future for Waiter {
    type Output = Waited;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Waited> {
        Pin::new(&mut self.receiver).poll(cx).map(|received| {
            // The sender goes away unused only when the engine does.
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

/// Looks after waiters whose request is driven elsewhere, or nowhere yet.
///
/// All of them are asked for every [`POLL_INTERVAL`]; in between only those of which there is word, so that the cost of
/// an outcome doesn't grow with the number of waiters.
pub(crate) async fn watch(shared: Arc<Shared>) {
    let waiters = &shared.waiters;
    let mut listener: Option<PgListener> = None;
    let mut next_round = Instant::now();
    loop {
        let mut ids = waiters.armed();
        // What is driven here may be cancelled elsewhere.
        ids.retain(|id| !shared.leases.is_fresh(*id, POLL_INTERVAL));
        let wanted = waiters.take_wanted();
        if ids.is_empty() {
            if waiters.lock().is_empty() {
                // Nobody to listen for: the connection goes back.
                listener = None;
            }
            tokio::select! {
                () = waiters.changed.notified() => {}
                // What is driven here says nothing when it begins, to cost nothing: it is come by when it takes long.
                () = tokio::time::sleep(POLL_INTERVAL) => {}
            }
            continue;
        }
        let mut whole_round = Instant::now() >= next_round;
        if listener.is_none() {
            let listening = tokio::time::timeout(LISTEN_TIMEOUT, listen(&shared));
            listener = listening.await.ok().flatten();
            // What ended before there was a listener has to be asked for.
            whole_round = true;
        }
        if whole_round {
            next_round = Instant::now() + POLL_INTERVAL;
        } else {
            ids.retain(|id| wanted.contains(id));
        }
        for ids in ids.chunks(MAX_IDS) {
            ask(&shared, ids).await;
        }
        tokio::select! {
            () = waiters.changed.notified() => {}
            () = tokio::time::sleep_until(next_round.into()) => {}
            heard = heard(&mut listener) => match heard {
                Some(ids) => waiters.ask_soon(ids),
                None => listener = None,
            },
        }
    }
}

async fn listen(shared: &Shared) -> Option<PgListener> {
    let mut listener = PgListener::connect_with(shared.db.pool()).await.ok()?;
    let own = outcome::notification_channel(shared.instance);
    let all = outcome::notification_channel(Uuid::nil());
    listener
        .listen_all([own.as_str(), all.as_str()])
        .await
        .ok()?;
    Some(listener)
}

/// The requests of which there is word, or `None` if the listener is of no more use.
async fn heard(listener: &mut Option<PgListener>) -> Option<Vec<RequestId>> {
    match listener {
        Some(listener) => {
            let heard = listener.recv().await.ok()?;
            Some(outcome::notified_ids(heard.payload()))
        }
        None => std::future::pending().await,
    }
}

async fn ask(shared: &Shared, ids: &[RequestId]) {
    let asked = ids.to_vec();
    let found = shared
        .db
        .run_large(shared.config.max_response_body, move |connection| {
            Box::pin(async move { outcome::find(connection, &asked).await })
        })
        .await;
    let found = match found {
        Ok(found) => found,
        Err(error) => {
            // The callers go on waiting: the database comes back, or they give up by themselves.
            log::debug!("asking for outcomes failed: {}", error.error);
            return;
        }
    };
    for (id, found) in found {
        match found {
            Found::Pending => {}
            Found::Finished(outcome) => {
                // It may be in flight here, and have been ended elsewhere.
                shared.leases.forget(id);
                shared.waiters.wake(id, || *outcome);
            }
            Found::Unknown => shared
                .waiters
                .fail(id, || Error::new(Kind::UnknownId).with_id(id)),
        }
    }
}
