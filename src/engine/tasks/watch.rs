//! Watching for outcomes that other processes settle.
//!
//! The task listens for notifications of other processes. It also asks the database every
//! [`POLL_INTERVAL`], because a notification is a hint, never the truth.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use uuid::Uuid;

use crate::engine::attempt::leases::Leases;
use crate::engine::attempt::waiters::Waiters;
use crate::error::{Error, Kind};
use crate::id::RequestId;
use crate::store::Store;
use crate::store::listen::OutcomeListener;
use crate::store::outcome::Found;

/// How long an outcome of another process can go unnoticed if its notification is lost.
const POLL_INTERVAL: Duration = Duration::from_secs(1);
/// The connection may have died unnoticed, and sqlx would wait as long as the socket does.
const LISTEN_TIMEOUT: Duration = Duration::from_secs(2);
/// How many requests one statement looks up.
const MAX_IDS: usize = 1000;

/// Watches until the task is aborted.
///
/// Every [`POLL_INTERVAL`] it looks up all requests that callers wait for. In between it only looks
/// up requests that a notification names, so the cost of an outcome doesn't grow with the number of
/// waiters.
pub(crate) async fn run(store: Store, leases: Arc<Leases>, waiters: Arc<Waiters>, instance: Uuid) {
    let mut listener: Option<OutcomeListener> = None;
    let mut next_round = Instant::now();
    loop {
        let mut ids = waiters.armed();
        // Requests driven here are included after a while: another process may cancel them.
        ids.retain(|id| !leases.is_fresh(*id, POLL_INTERVAL));
        let to_fetch = waiters.take_to_fetch();
        if ids.is_empty() {
            if waiters.is_empty() {
                // The connection goes back to the pool.
                listener = None;
            }
            tokio::select! {
                () = waiters.changed() => {}
                // Requests driven in this process don't signal this task when they start, to keep
                // the hot path free. The timer picks up the slow ones.
                () = tokio::time::sleep(POLL_INTERVAL) => {}
            }
            continue;
        }
        let mut whole_round = Instant::now() >= next_round;
        if listener.is_none() {
            let listening = tokio::time::timeout(LISTEN_TIMEOUT, store.listen(instance));
            listener = listening.await.ok().flatten();
            // Requests that finished before the listener started left no notification.
            whole_round = true;
        }
        if whole_round {
            next_round = Instant::now() + POLL_INTERVAL;
            give_up_deferred(&store, &waiters).await;
        } else {
            ids.retain(|id| to_fetch.contains(id));
        }
        fetch_outcomes(&store, &leases, &waiters, ids).await;
        tokio::select! {
            () = waiters.changed() => {}
            () = tokio::time::sleep_until(next_round.into()) => {}
            notified = next_notification(&mut listener) => match notified {
                Some(ids) => waiters.fetch_soon(ids),
                None => listener = None,
            },
        }
    }
}

/// Gives up requests that wait for their destinations longer than their callers do: no attempt
/// finds out that their time is over.
async fn give_up_deferred(store: &Store, waiters: &Waiters) {
    let overdue = waiters.overdue(Instant::now());
    for part in overdue.chunks(MAX_IDS) {
        // After a failure, which the store logs, the next round tries again.
        let _ = store.give_up_deferred(part).await;
    }
}

/// The requests that the next notification names, or `None` if the listener must be replaced.
async fn next_notification(listener: &mut Option<OutcomeListener>) -> Option<Vec<RequestId>> {
    match listener {
        Some(listener) => listener.next().await,
        None => std::future::pending().await,
    }
}

/// Looks the requests up in parts, whose responses are bounded in bytes: many may finish at once.
async fn fetch_outcomes(store: &Store, leases: &Leases, waiters: &Waiters, ids: Vec<RequestId>) {
    let mut left = VecDeque::from(ids);
    loop {
        let part = next_part(&mut left, |id| waiters.contains(id));
        if part.is_empty() {
            return;
        }
        // After a failure the callers keep waiting: the database comes back, or they give up.
        let Ok(found) = store.find(&part).await else {
            return;
        };
        for (id, found) in found.into_iter().rev() {
            match found {
                Found::Pending => {}
                Found::Finished(outcome) => {
                    // The request may be in flight here and have been finished by another process.
                    leases.forget(id);
                    waiters.wake(id, || *outcome);
                }
                Found::Unfetched => left.push_front(id),
                Found::Unknown => waiters.fail(id, || Error::new(Kind::UnknownId).with_id(id)),
                Found::Unreadable(unreadable) => {
                    leases.forget(id);
                    waiters.fail(id, || Error::from(unreadable.clone()).with_id(id));
                }
            }
        }
    }
}

/// The next requests to look up. Those whose callers left in the meantime are left out.
fn next_part(
    left: &mut VecDeque<RequestId>,
    is_waited_for: impl Fn(RequestId) -> bool,
) -> Vec<RequestId> {
    let mut part = Vec::new();
    while part.len() < MAX_IDS {
        let Some(id) = left.pop_front() else {
            break;
        };
        if is_waited_for(id) {
            part.push(id);
        }
    }
    part
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_leaves_out_callers_that_have_left() {
        let ids: Vec<_> = (0..MAX_IDS + 2).map(|_| RequestId::generate()).collect();
        let gone = ids[1];
        let mut left = VecDeque::from(ids.clone());
        let part = next_part(&mut left, |id| id != gone);
        assert_eq!(part.len(), MAX_IDS);
        assert!(!part.contains(&gone));
        assert_eq!(next_part(&mut left, |id| id != gone), [ids[MAX_IDS + 1]]);
        assert!(next_part(&mut left, |_| true).is_empty());
    }
}
