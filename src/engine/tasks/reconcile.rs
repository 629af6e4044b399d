//! Asking receivers about ambiguous requests.
//!
//! Each request is taken under a lease in the database, so that no two processes ask about it at
//! the same time. No connection is held while the hook asks.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::{JoinHandle, JoinSet};

use crate::dead_letter::{Reconcile, Resolution};
use crate::engine::attempt::Driver;
use crate::engine::dead_letters::resolve;
use crate::engine::supervise::supervise;
use crate::engine::telemetry::{Failures, LineLimit};
use crate::error::{BoxError, Error, chain};
use crate::redact::error_text;
use crate::runtime::caught;
use crate::sealer::Sealer;
use crate::store::dead_letters::Question;

/// How often the database is asked for ambiguous requests.
const LOOK_INTERVAL: Duration = Duration::from_secs(2);
/// How long the hook may take for one request.
const HOOK_TIMEOUT: Duration = Duration::from_secs(60);
/// How long other processes leave a taken request alone: longer than the hook and the statements
/// around it.
const ASK_LEASE: Duration = Duration::from_secs(100);
/// How many requests a process asks about at the same time: their bodies are in memory.
const BATCH: usize = 8;
const BACKOFF_MIN: Duration = Duration::from_secs(5);
const BACKOFF_MAX: Duration = Duration::from_secs(300);

/// Asks until it is dropped.
#[derive(Debug)]
pub(crate) struct ReconcileGuard(JoinHandle<()>);

impl ReconcileGuard {
    pub(crate) fn start(driver: &Arc<Driver>, hook: Arc<dyn Reconcile>) -> Self {
        let panics = Arc::clone(&driver.panics);
        let (asks, hook) = (Arc::clone(driver), hook);
        let asking = move || run(Arc::clone(&asks), Arc::clone(&hook));
        Self(driver.spawn(supervise(panics, "reconcile", asking)))
    }
}

impl Drop for ReconcileGuard {
    fn drop(&mut self) {
        self.0.abort();
    }
}

async fn run(driver: Arc<Driver>, hook: Arc<dyn Reconcile>) {
    let (failures, hook_panics) = (Arc::default(), LineLimit::default());
    let asking = async {
        loop {
            match round(&driver, &hook, &failures, &hook_panics).await {
                // There may be more.
                Ok(BATCH..) => continue,
                Ok(_) => {}
                Err(error) => tracing::debug!(?error, "looking for ambiguous requests failed"),
            }
            // The jitter spreads the processes of a fleet, which may have started together.
            tokio::time::sleep(LOOK_INTERVAL.mul_f64(0.5 + fastrand::f64())).await;
        }
    };
    tokio::select! {
        () = driver.lifecycle.closing() => {}
        () = asking => {}
    }
}

/// Asks about a batch. Returns how many requests it had.
async fn round(
    driver: &Arc<Driver>,
    hook: &Arc<dyn Reconcile>,
    failures: &Arc<Failures>,
    hook_panics: &LineLimit,
) -> Result<usize, Error> {
    let channels: Option<Vec<String>> = driver.config.deliver.as_ref().map(|channels| {
        let channels = channels.iter();
        channels.map(ToString::to_string).collect()
    });
    let questions = driver
        .store
        .take_ambiguous(channels.as_deref(), ASK_LEASE, BATCH as i64)
        .await?;
    let count = questions.len();
    // Dropping the set with this future aborts the hooks when the engine ends.
    let mut tasks = JoinSet::new();
    for question in questions {
        tasks.spawn(ask_about(
            Arc::clone(driver),
            Arc::clone(hook),
            Arc::clone(failures),
            question,
        ));
    }
    while let Some(done) = tasks.join_next().await {
        if done.is_err() {
            // The request is asked about again once its lease runs out.
            if hook_panics.allows("").is_some() {
                tracing::error!("a reconcile hook panicked");
            }
        }
    }
    Ok(count)
}

async fn ask_about(
    driver: Arc<Driver>,
    hook: Arc<dyn Reconcile>,
    failures: Arc<Failures>,
    mut question: Question,
) {
    let id = question.dead_letter.id;
    let resolution = match answer(&*hook, driver.store.sealer(), &mut question).await {
        Ok(Some(resolution)) => Some(resolution),
        Ok(None) => {
            failures.recovers(id);
            None
        }
        Err(error) => {
            let error = error_text(&chain(&*error));
            if failures.is_news(id) {
                tracing::warn!(%id, error, "a reconcile hook failed and is called again later");
            } else {
                tracing::debug!(%id, error, "a reconcile hook failed again");
            }
            None
        }
    };
    let store = &driver.store;
    let Some(resolution) = resolution else {
        let delay = backoff(question.times);
        // After a failure, which the store logs, the lease says when the hook is asked again.
        let _ = store.ask_again(id, question.times, delay).await;
        return;
    };
    match resolve(store, id, resolution, Some(question.finished_at)).await {
        Ok(()) => failures.recovers(id),
        // Another process or an operator has resolved the request in the meantime.
        Err(error) if error.is_wrong_state() || error.is_unknown_id() => {}
        Err(error) if failures.is_news(id) => {
            tracing::warn!(%id, ?error, "a resolution could not be recorded");
        }
        Err(error) => tracing::debug!(%id, ?error, "a resolution could not be recorded"),
    }
}

async fn answer(
    hook: &dyn Reconcile,
    sealer: &Sealer,
    question: &mut Question,
) -> Result<Option<Resolution>, BoxError> {
    let head = question.head.take().ok_or("its payload is gone")?;
    let read = sealer.read_request(question.dead_letter.id, &head)?;
    let mut request = read.request;
    request.body = read.body.open(question.body.take())?;
    let letter = question.dead_letter.clone();
    // The function that returns the future may panic, too.
    let asked = pin!(async { hook.reconcile(letter, request).await });
    tokio::time::timeout(HOOK_TIMEOUT, caught(asked))
        .await
        .map_err(|_elapsed| format!("the hook did not answer within {HOOK_TIMEOUT:?}"))?
        .unwrap_or_else(|panic| Err(format!("the hook panicked: {panic}").into()))
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
