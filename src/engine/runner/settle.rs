//! Recording the results of attempts, many at a time.
//!
//! A result is never dropped: while the database fails the lane keeps what it has and tries again. Waiters are woken, and
//! other processes told, only after the commit.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use sqlxmq::CurrentJob;
use tokio::sync::{mpsc, oneshot};
use uuid::Uuid;

use crate::engine::lane::{self, Item};
use crate::engine::runner::lease::Lease;
use crate::engine::{Engine, Shared};
use crate::id::RequestId;
use crate::outcome::Outcome;
use crate::store::outcome::{self, Found};
use crate::store::settle::{self, Again, Failure, Fence, Finished, Settled};
use crate::store::{DbError, enqueue};

const RETRY_MIN: Duration = Duration::from_millis(50);
const RETRY_MAX: Duration = Duration::from_secs(1);

/// A result on its way into the database.
pub(crate) struct Settlement {
    pub(crate) lease: Arc<Lease>,
    pub(crate) result: Settling,
    /// Whether somebody waits for the commit.
    pub(crate) urgent: bool,
    /// Dropped after the commit: until then sqlxmq's runner counts the request as running.
    pub(crate) _current: Option<CurrentJob>,
    /// So that the engine knows how many wait.
    pub(crate) _counted: Arc<()>,
    /// Or the runtime that the result is written on could end before, with the last handle.
    pub(crate) _engine: Arc<Engine>,
}

pub(crate) enum Settling {
    /// Shared with the statement that writes it.
    Finish(Arc<Outcome>),
    Again {
        delay: Duration,
        /// Who makes the next attempt, if not whoever claims the request then. Told after the commit.
        hold: Option<oneshot::Sender<Held>>,
        uncounted: bool,
        failure: Option<Box<Failure>>,
    },
}

/// A claim that this process keeps for the next attempt.
#[derive(Debug)]
pub(crate) struct Held {
    pub(crate) lease: Arc<Lease>,
    pub(crate) attempts: u32,
}

impl Settlement {
    fn is_finish(&self) -> bool {
        matches!(self.result, Settling::Finish(_))
    }

    /// Leaves out what the database may have refused: the body, then the rest of the response, then the text. `false` if nothing is
    /// left to leave out.
    fn drop_refused_data(&mut self) -> bool {
        const REFUSED: &str = "the database refused what there is to say of it";
        let (response, text) = match &mut self.result {
            Settling::Finish(outcome) => {
                let outcome = Arc::make_mut(outcome);
                if outcome.drop_body() {
                    return true;
                }
                let fault = outcome.fault.get_or_insert_default();
                (&mut outcome.response, &mut fault.text)
            }
            Settling::Again {
                failure: Some(failure),
                ..
            } => (&mut failure.response, &mut failure.text),
            Settling::Again { failure: None, .. } => return false,
        };
        if response.take().is_some() {
            return true;
        }
        let text_refused = text == REFUSED;
        REFUSED.clone_into(text);
        !text_refused
    }
}

impl Item for Settlement {
    fn size(&self) -> usize {
        let response = match &self.result {
            Settling::Finish(outcome) => outcome.response.as_ref(),
            Settling::Again { failure, .. } => failure.as_ref().and_then(|f| f.response.as_ref()),
        };
        response.map_or(0, |response| response.body.len())
    }

    fn is_urgent(&self) -> bool {
        self.urgent
    }
}

/// Runs until the last sender is gone and everything is settled.
pub(crate) async fn run(shared: Arc<Shared>, incoming: mpsc::UnboundedReceiver<Settlement>) {
    lane::run(incoming, |batch| {
        let shared = Arc::clone(&shared);
        async move { write(&shared, batch).await }
    })
    .await;
}

/// Writes a batch, splitting it down to the row that the database refuses.
async fn write(shared: &Shared, mut batch: Vec<Settlement>) {
    // As the statements want it.
    batch.sort_unstable_by_key(|settlement| settlement.lease.id);
    let mut stack = vec![batch];
    let mut pause = RETRY_MIN;
    while let Some(mut batch) = stack.pop() {
        let error = match write_once(shared, &mut batch).await {
            Ok(()) => {
                pause = RETRY_MIN;
                continue;
            }
            Err(error) => error,
        };
        if error.is_data() && batch.len() > 1 {
            let half = batch.split_off(batch.len() / 2);
            stack.push(half);
            stack.push(batch);
            continue;
        }
        if error.is_data() {
            log::error!(
                "the database refused a result, which is settled without its data: {}",
                error.error
            );
            if !batch[0].drop_refused_data() {
                // Its lease will run out. It can't be told from one that was lost with its process.
                continue;
            }
        } else {
            log::warn!("settling failed, trying again: {}", error.error);
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(RETRY_MAX);
            if shared.db.pool().is_closed() {
                // Shut down: others take over.
                return;
            }
        }
        stack.push(batch);
    }
}

/// Writes what is in the batch and takes it out as it is committed.
async fn write_once(shared: &Shared, batch: &mut Vec<Settlement>) -> Result<(), DbError> {
    let mut word = Word::default();
    while !batch.is_empty() {
        if batch.iter().any(Settlement::is_finish) {
            write_finishes(shared, batch, &mut word).await?;
        } else {
            write_agains(shared, batch, &mut word).await?;
        }
    }
    word.send(shared).await;
    Ok(())
}

async fn write_finishes(
    shared: &Shared,
    batch: &mut Vec<Settlement>,
    word: &mut Word,
) -> Result<(), DbError> {
    let finishes: Vec<_> = batch
        .iter()
        .filter_map(|settlement| match &settlement.result {
            Settling::Finish(outcome) => Some((settlement.lease.fence(), Arc::clone(outcome))),
            Settling::Again { .. } => None,
        })
        .collect();
    let fences: Vec<_> = finishes.iter().map(|(fence, _)| *fence).collect();
    let retention = shared.config.retention;
    let bytes = batch.iter().map(Settlement::size).sum();
    let finished = shared
        .db
        .run_large(bytes, move |connection| {
            Box::pin(async move { settle::finish(connection, &finishes, retention).await })
        })
        .await?;
    word.about_finished(shared, &finished);
    // By claim: an earlier one of the same request may be in the same batch.
    let mut finished: HashMap<Fence, Finished> = finished
        .into_iter()
        .map(|finished| (finished.settled.fence, finished))
        .collect();
    let (written, rest) = std::mem::take(batch)
        .into_iter()
        .partition(Settlement::is_finish);
    *batch = rest;
    let mut unsettled = Vec::new();
    // In the same order, as one was made from the other.
    for (settlement, fence) in written.into_iter().zip(fences) {
        let Some(finished) = finished.remove(&fence) else {
            unsettled.push((settlement, fence));
            continue;
        };
        shared.leases.remove(&settlement.lease);
        if let Settling::Finish(outcome) = settlement.result {
            shared
                .waiters
                .wake(fence.id, || completed(outcome, finished));
        }
    }
    shared.settled.notify_waiters();
    look_into(shared, unsettled, batch).await;
    Ok(())
}

/// The outcome with what only the database knows.
fn completed(outcome: Arc<Outcome>, finished: Finished) -> Outcome {
    // The statement is over, and with it the other owner.
    let outcome = Arc::unwrap_or_clone(outcome);
    Outcome {
        attempts: finished.settled.attempts,
        response: finished
            .earlier
            .map(|response| *response)
            .or(outcome.response),
        ..outcome
    }
}

/// Results whose claims are not the latest. Those that a poll of this process claimed anew stand under the new number, and go back into
/// the batch; the others are stale.
async fn look_into(
    shared: &Shared,
    unsettled: Vec<(Settlement, Fence)>,
    batch: &mut Vec<Settlement>,
) {
    if unsettled.is_empty() {
        return;
    }
    if any_queued(shared, &unsettled).await {
        // As after an outage that outlasted the lease; the poll's answer may be on the way.
        shared.polls.wait_out().await;
    }
    let mut stale = Vec::new();
    for (settlement, fence) in unsettled {
        if settlement.lease.fence() != fence {
            batch.push(settlement);
            continue;
        }
        shared.leases.remove(&settlement.lease);
        stale.push(fence.id);
    }
    read_stale(shared, stale);
}

/// Whether one of them has not ended. Without an answer it may be.
async fn any_queued(shared: &Shared, unsettled: &[(Settlement, Fence)]) -> bool {
    let ids: Vec<_> = unsettled.iter().map(|(_, fence)| fence.id).collect();
    let found = shared
        .db
        .run(move |connection| Box::pin(async move { outcome::find(connection, &ids).await }))
        .await;
    found.map_or(true, |found| {
        found
            .iter()
            .any(|(_, found)| matches!(found, Found::Pending))
    })
}

async fn write_agains(
    shared: &Shared,
    batch: &mut Vec<Settlement>,
    word: &mut Word,
) -> Result<(), DbError> {
    let agains: Vec<_> = batch
        .iter()
        .filter_map(|settlement| match &settlement.result {
            Settling::Finish(_) => None,
            Settling::Again {
                delay,
                hold,
                uncounted,
                failure,
            } => Some(Again {
                fence: settlement.lease.fence(),
                delay: *delay,
                hold: hold.is_some(),
                uncounted: *uncounted,
                failure: failure.as_deref().cloned(),
            }),
        })
        .collect();
    let fences: Vec<_> = agains.iter().map(|again| again.fence).collect();
    let lease = shared.config.lease;
    let bytes = batch.iter().map(Settlement::size).sum();
    let settled = shared
        .db
        .run_large(bytes, move |connection| {
            Box::pin(async move { settle::again(connection, &agains, lease).await })
        })
        .await?;
    let mut settled: HashMap<Fence, Settled> = settled
        .into_iter()
        .map(|settled| (settled.fence.before(), settled))
        .collect();
    let mut returned = Vec::new();
    let mut unsettled = Vec::new();
    for (settlement, fence) in std::mem::take(batch).into_iter().zip(fences) {
        let Some(settled) = settled.remove(&fence) else {
            unsettled.push((settlement, fence));
            continue;
        };
        shared.leases.remove(&settlement.lease);
        let Settling::Again { delay, hold, .. } = settlement.result else {
            continue;
        };
        let Some(goes_on) = hold else {
            returned.push(settled.fence.id);
            if delay < enqueue::RUNNER_WAIT {
                word.runners.push(settled.channel.into());
            }
            continue;
        };
        let held = Held {
            lease: shared.leases.insert(settled.fence, None),
            attempts: settled.attempts,
        };
        if let Err(held) = goes_on.send(held) {
            // Nobody is left to make the attempt; when its time and the lease are over, another runner will.
            shared.leases.remove(&held.lease);
        }
    }
    // Those who wait for what went back into the queue have to listen for it.
    shared.waiters.ask_soon(returned);
    look_into(shared, unsettled, batch).await;
    Ok(())
}

/// Results whose claim is no longer the latest. If the request has ended, here after a lost acknowledgement or
/// elsewhere, its waiters get that outcome; else whoever holds it now will wake them.
fn read_stale(shared: &Shared, ids: Vec<RequestId>) {
    if ids.is_empty() {
        return;
    }
    shared
        .stale_results
        .fetch_add(ids.len() as u64, Ordering::Relaxed);
    log::info!(
        "{} results change nothing: their requests were taken over or ended in the meantime",
        ids.len()
    );
    shared.waiters.ask_soon(ids);
}

/// Who is to be told after a commit.
#[derive(Default)]
struct Word {
    /// Ended requests, and the other instances that wait for them.
    waiters: Vec<(Uuid, RequestId)>,
    runners: Vec<Arc<str>>,
}

impl Word {
    fn about_finished(&mut self, shared: &Shared, finished: &[Finished]) {
        for Finished { settled, .. } in finished {
            let waiter = settled.waiter.filter(|waiter| *waiter != shared.instance);
            self.waiters
                .extend(waiter.map(|waiter| (waiter, settled.fence.id)));
            if settled.ordered {
                self.runners.push(settled.channel.as_str().into());
            }
        }
    }

    async fn send(self, shared: &Shared) {
        let Self { waiters, runners } = self;
        if waiters.is_empty() && runners.is_empty() {
            return;
        }
        let told = shared
            .db
            .run(move |connection| {
                Box::pin(async move {
                    if !waiters.is_empty() {
                        outcome::notify_waiters(&mut *connection, &waiters).await?;
                    }
                    if !runners.is_empty() {
                        enqueue::notify_runners(connection, &runners).await?;
                    }
                    Ok(())
                })
            })
            .await;
        if let Err(error) = told {
            // They ask by themselves a moment later.
            log::debug!("notifying failed: {}", error.error);
        }
    }
}
