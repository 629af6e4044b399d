//! Recording the results of attempts, many at a time.
//!
//! A result is never dropped: while the database fails the lane keeps what it has and tries again. Waiters are woken, and other processes told,
//! only after the commit.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use uuid::Uuid;

use crate::engine::Shared;
use crate::engine::lane;
use crate::engine::runner::lease::Lease;
use crate::outcome::Outcome;
use crate::store::outcome::{self, Found};
use crate::store::settle::{self, Again, Failure, Settled};
use crate::store::{DbError, enqueue};

const RETRY_MIN: Duration = Duration::from_millis(50);
const RETRY_MAX: Duration = Duration::from_secs(1);

/// A result on its way into the database.
pub(crate) struct Settlement {
    pub(crate) lease: Arc<Lease>,
    pub(crate) result: Settling,
    /// Told after the commit: the claim that goes on, if one does.
    pub(crate) done: oneshot::Sender<Option<Held>>,
}

pub(crate) enum Settling {
    Finish(Outcome),
    Again {
        delay: Duration,
        hold: bool,
        uncounted: bool,
        failure: Option<Failure>,
    },
}

/// A claim that this process keeps for the next attempt.
#[derive(Debug)]
pub(crate) struct Held {
    pub(crate) lease: Arc<Lease>,
    pub(crate) attempts: u32,
}

impl Settlement {
    fn size(&self) -> usize {
        let response = match &self.result {
            Settling::Finish(outcome) => outcome.response.as_ref(),
            Settling::Again { failure, .. } => failure.as_ref().and_then(|f| f.response.as_ref()),
        };
        response.map_or(0, |response| response.body.len())
    }

    fn drop_refused_data(&mut self, refusal: &sqlx::Error) {
        match &mut self.result {
            Settling::Finish(outcome) => settle::without_refused_data(outcome, refusal),
            Settling::Again { failure, .. } => {
                if let Some(failure) = failure {
                    failure.response = None;
                    failure.text = String::from("the database refused the attempt's text");
                }
            }
        }
    }
}

/// Runs until the last sender is gone and everything is settled.
pub(crate) async fn run(shared: Arc<Shared>, incoming: mpsc::UnboundedReceiver<Settlement>) {
    lane::run(incoming, Settlement::size, |batch| write(&shared, batch)).await;
}

/// Writes a batch, splitting it down to the row that the database refuses.
async fn write(shared: &Shared, batch: Vec<Settlement>) {
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
            batch[0].drop_refused_data(&error.error);
        } else {
            log::warn!("settling failed, trying again: {}", error.error);
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(RETRY_MAX);
            if shared.is_abandoned() || shared.db.pool().is_closed() {
                // Shut down, or gone for longer than the leases last: others take over.
                return;
            }
        }
        stack.push(batch);
    }
}

async fn write_once(shared: &Shared, batch: &mut Vec<Settlement>) -> Result<(), DbError> {
    let mut finishes = Vec::new();
    let mut agains = Vec::new();
    for settlement in &*batch {
        let fence = settlement.lease.fence();
        match &settlement.result {
            Settling::Finish(outcome) => finishes.push((fence, outcome.clone())),
            Settling::Again {
                delay,
                hold,
                uncounted,
                failure,
            } => agains.push(Again {
                fence,
                delay: *delay,
                hold: *hold,
                uncounted: *uncounted,
                failure: failure.clone(),
            }),
        }
    }
    let (lease, retention) = (shared.config.lease, shared.config.retention);
    let mut word = Word::default();

    if !finishes.is_empty() {
        let (finishes, settled) = shared
            .db
            .run(move |connection| {
                Box::pin(async move {
                    let settled = settle::finish(connection, &mut finishes, retention).await?;
                    Ok((finishes, settled))
                })
            })
            .await?;
        word.about(shared, &settled);
        let mut stale = Vec::new();
        for settlement in take(batch, |result| matches!(result, Settling::Finish(_))) {
            let id = settlement.lease.id;
            shared.leases.remove(&settlement.lease);
            if settled.iter().any(|settled| settled.fence.id == id) {
                if let Some((_, outcome)) = finishes.iter().find(|(fence, _)| fence.id == id) {
                    shared.waiters.wake(outcome);
                }
            } else {
                stale.push(id);
            }
            // Whoever drove the attempt may be gone.
            let _ = settlement.done.send(None);
        }
        read_stale(shared, stale).await;
    }

    if !agains.is_empty() {
        let settled = shared
            .db
            .run(move |connection| {
                Box::pin(async move { settle::again(connection, &agains, lease).await })
            })
            .await?;
        for settlement in batch.drain(..) {
            let hold = matches!(settlement.result, Settling::Again { hold: true, .. });
            let found = settled
                .iter()
                .find(|settled| settled.fence.id == settlement.lease.id);
            shared.leases.remove(&settlement.lease);
            let held = found.filter(|_| hold).map(|settled| Held {
                lease: shared.leases.insert(settled.fence, Vec::new()),
                attempts: settled.attempts,
            });
            if let (
                Some(settled),
                Settling::Again {
                    delay, hold: false, ..
                },
            ) = (found, &settlement.result)
            {
                if *delay < enqueue::RUNNER_WAIT {
                    word.runners.push(settled.channel.as_str().into());
                }
            }
            if let Err(Some(held)) = settlement.done.send(held) {
                // Nobody is left to make the attempt; when its time and the lease are over, another runner will.
                shared.leases.remove(&held.lease);
            }
        }
        shared.waiters.poke();
    }
    word.send(shared).await;
    Ok(())
}

fn take(batch: &mut Vec<Settlement>, is: impl Fn(&Settling) -> bool) -> Vec<Settlement> {
    let (taken, kept) = std::mem::take(batch)
        .into_iter()
        .partition(|settlement| is(&settlement.result));
    *batch = kept;
    taken
}

/// Results whose claim is no longer the latest. If the request has ended, here after a lost acknowledgement or
/// elsewhere, its waiters get that outcome; else whoever holds it now will wake them.
async fn read_stale(shared: &Shared, ids: Vec<crate::id::RequestId>) {
    if ids.is_empty() {
        return;
    }
    log::warn!(
        "{} results came too late: their leases had run out",
        ids.len()
    );
    let found = shared
        .db
        .run(move |connection| Box::pin(async move { outcome::find(connection, &ids).await }))
        .await;
    for (_, found) in found.unwrap_or_default() {
        if let Found::Finished(outcome) = found {
            shared.waiters.wake(&outcome);
        }
    }
    shared.waiters.poke();
}

/// Who is to be told after a commit.
#[derive(Default)]
struct Word {
    instances: Vec<Uuid>,
    runners: Vec<Arc<str>>,
}

impl Word {
    fn about(&mut self, shared: &Shared, settled: &[Settled]) {
        for settled in settled {
            self.instances
                .extend(settled.waiter.filter(|waiter| *waiter != shared.instance));
            if settled.ordered {
                self.runners.push(settled.channel.as_str().into());
            }
        }
        self.instances.sort_unstable();
        self.instances.dedup();
    }

    async fn send(self, shared: &Shared) {
        let Self { instances, runners } = self;
        if instances.is_empty() && runners.is_empty() {
            return;
        }
        let told = shared
            .db
            .run(move |connection| {
                Box::pin(async move {
                    if !instances.is_empty() {
                        outcome::notify_waiters(&mut *connection, &instances).await?;
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
