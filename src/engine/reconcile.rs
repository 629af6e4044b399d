//! Asking the other side about requests that may have been sent.
//!
//! Each is taken under a lease in the database, so that no two processes ask about it at once. No connection is held while the
//! hook asks.

use std::sync::Arc;
use std::time::Duration;

use tokio::task::{JoinHandle, JoinSet};

use crate::codec;
use crate::dead_letter::{Reconcile, Resolution};
use crate::engine::Engine;
use crate::engine::dead_letters::resolve;
use crate::error::{BoxError, Error, chain};
use crate::redact::redact_urls;
use crate::store::dead_letters::{self, Asked};

/// How often the database is asked for ambiguous requests.
const LOOK_INTERVAL: Duration = Duration::from_secs(2);
/// How long the hook may take for a request.
pub(crate) const HOOK_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a request that a process has taken is left alone by others: longer than the hook and the statements around it.
const ASK_LEASE: Duration = Duration::from_secs(100);
/// How many requests a process asks about at a time: their bodies are in memory.
const ASK_AT_ONCE: usize = 8;
const BACKOFF_MIN: Duration = Duration::from_secs(5);
const BACKOFF_MAX: Duration = Duration::from_secs(300);

/// Keeps the asking going until it is dropped.
#[derive(Debug)]
pub(crate) struct ReconcileGuard(JoinHandle<()>);

impl ReconcileGuard {
    pub(crate) fn start(engine: &Arc<Engine>, hook: Arc<dyn Reconcile>) -> Self {
        let asking = run(Arc::clone(engine), hook);
        Self(engine.spawn(asking))
    }
}

impl Drop for ReconcileGuard {
    fn drop(&mut self) {
        self.0.abort();
    }
}

async fn run(engine: Arc<Engine>, hook: Arc<dyn Reconcile>) {
    let asking = async {
        loop {
            match round(&engine, &hook).await {
                // There may be more.
                Ok(ASK_AT_ONCE..) => continue,
                Ok(_) => {}
                Err(error) => log::debug!("looking for ambiguous requests failed: {error:?}"),
            }
            // Spread over the fleet, which is of one mind otherwise.
            tokio::time::sleep(LOOK_INTERVAL.mul_f64(0.5 + fastrand::f64())).await;
        }
    };
    tokio::select! {
        () = engine.closing() => {}
        () = asking => {}
    }
}

/// Asks about a batch. Returns how many it had.
async fn round(engine: &Arc<Engine>, hook: &Arc<dyn Reconcile>) -> Result<usize, Error> {
    let shared = engine.shared();
    let channels: Option<Vec<String>> = shared.config.channels.as_ref().map(|channels| {
        let channels = channels.iter();
        channels.map(ToString::to_string).collect()
    });
    let asked = shared
        .query(move |connection| {
            Box::pin(async move {
                dead_letters::ask(
                    connection,
                    channels.as_deref(),
                    ASK_LEASE,
                    ASK_AT_ONCE as i64,
                )
                .await
            })
        })
        .await?;
    let count = asked.len();
    // Dropped with this future: a hook is not left running when the engine goes.
    let mut tasks = JoinSet::new();
    for asked in asked {
        tasks.spawn(ask_about(Arc::clone(engine), Arc::clone(hook), asked));
    }
    while let Some(done) = tasks.join_next().await {
        if let Err(error) = done {
            // The lease says when it is asked about again.
            log::error!("a reconcile hook failed: {error}");
        }
    }
    Ok(count)
}

async fn ask_about(engine: Arc<Engine>, hook: Arc<dyn Reconcile>, mut asked: Asked) {
    let id = asked.kept.id;
    let shared = engine.shared();
    let answer = answer(&*hook, &mut asked).await;
    let resolution = match answer {
        Ok(resolution) => resolution,
        Err(error) => {
            let error = redact_urls(&chain(&*error));
            log::warn!("what became of request {id} can't be found out: {error}");
            None
        }
    };
    let Some(resolution) = resolution else {
        let delay = backoff(asked.times);
        let noted = shared
            .db
            .run(move |connection| {
                Box::pin(async move {
                    dead_letters::ask_again(connection, id, asked.times, delay).await
                })
            })
            .await;
        if let Err(error) = noted {
            // The lease says when it is asked about again.
            log::debug!("request {id}: {}", error.error);
        }
        return;
    };
    match resolve(shared, id, resolution, Some(asked.finished_at)).await {
        Ok(()) => {}
        // Somebody else has resolved it in the meantime.
        Err(error) if error.is_wrong_state() || error.is_unknown_id() => {}
        Err(error) => log::warn!("what became of request {id} can't be recorded: {error:?}"),
    }
}

async fn answer(hook: &dyn Reconcile, asked: &mut Asked) -> Result<Option<Resolution>, BoxError> {
    let head = asked.head.take().ok_or("its payload is gone")?;
    let (request, _, _) = codec::decode_request(&head, asked.body.take())?;
    tokio::time::timeout(HOOK_TIMEOUT, hook.reconcile(asked.kept.clone(), request))
        .await
        .map_err(|_elapsed| format!("the hook has not answered within {HOOK_TIMEOUT:?}"))?
}

fn backoff(asked: i32) -> Duration {
    let doublings = asked.saturating_sub(1).clamp(0, 16).unsigned_abs();
    (BACKOFF_MIN * (1 << doublings)).min(BACKOFF_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pause_grows_up_to_five_minutes() {
        assert_eq!(backoff(1), BACKOFF_MIN);
        assert_eq!(backoff(2), 2 * BACKOFF_MIN);
        assert_eq!(backoff(i32::MAX), BACKOFF_MAX);
    }
}
