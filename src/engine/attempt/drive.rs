//! Drives a claimed request: hooks, send, judge, settle, and repeat until it finishes or goes back
//! to the queue.

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use tracing::Instrument as _;

use super::claim::Claim;
use super::hooks::exchange_with_hooks;
use super::judge::{Judgement, history, judge};
use super::send::{ByEngine, Sender, exchange};
use super::transport::Transport;
use crate::store::settle::Failure;

/// A retry after a longer delay than this goes back to the queue instead of being held.
const MAX_HOLD: Duration = Duration::from_secs(60);

/// As [`drive`], with a client that belongs to the engine, in the span of the call, and until a
/// shutdown gives attempts up.
#[expect(clippy::manual_async_fn, reason = "as for `drive`")]
pub(crate) fn drive_by_engine(
    mut claim: Claim,
    transport: Transport,
) -> impl Future<Output = ()> + Send {
    async move {
        let driver = Arc::clone(claim.driver());
        let span = claim.take_span();
        let mut sender = ByEngine::new(transport);
        // Pinned here, or the future would take its room twice.
        let mut driven = pin!(drive(claim, &mut sender).instrument(span));
        tokio::select! {
            () = &mut driven => {}
            () = driver.lifecycle.stopping() => {}
        }
    }
}

/// Makes attempts until the request has finished or is back in the queue.
#[expect(
    clippy::manual_async_fn,
    reason = "an `async fn` keeps room for its arguments twice, and each request in flight has one"
)]
pub(crate) fn drive(
    mut claim: Claim,
    sender: &mut dyn Sender,
) -> impl Future<Output = ()> + Send + '_ {
    async move {
        loop {
            if !claim.begin().await {
                return;
            }
            let driver = claim.driver();
            let max_response_body = driver.store.config().max_response_body;
            let exchange = if driver.config.hooks.is_empty() {
                claim.begin_sending();
                let (job, number) = (claim.job(), claim.attempts());
                let config = &claim.driver().config;
                exchange(job, number, None, sender, config, max_response_body).await
            } else {
                // Boxed, so that attempts without hooks don't take its room.
                Box::pin(exchange_with_hooks(&mut claim, sender, max_response_body)).await
            };
            let history = history(&exchange, &claim).await;
            let judgement = judge(exchange, history, &claim);
            claim.count_attempt(judgement.has_failed());
            match judgement {
                Judgement::Finish(outcome) => return claim.finish(outcome),
                Judgement::Retry { delay, failure } => {
                    // Boxed, so that a task whose first attempt is answered doesn't take its room.
                    match Box::pin(retry(claim, delay, failure)).await {
                        Some(held) => claim = held,
                        None => return,
                    }
                }
            }
        }
    }
}

/// Returns the claim when the next attempt is due, if this process makes it.
async fn retry(claim: Claim, delay: Duration, failure: Failure) -> Option<Claim> {
    if delay > MAX_HOLD || !claim.is_awaited() {
        claim.put_back(delay, failure);
        return None;
    }
    let held = claim.hold(delay, failure).await?;
    held.wait_until_due().await.then_some(held)
}
