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
use super::send::{ByEngine, Exchange, Sender, exchange};
use super::transport::Transport;
use crate::store::settle::Failure;
use crate::trace_context::{AttemptSpan, Attempted, Tracing, in_scope};

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
        let mut sender = ByEngine::new(transport, claim.is_by_own_client());
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
            let config = &claim.driver().config;
            let (exchange, span) = if config.hooks.is_empty() && config.tracing.is_none() {
                claim.begin_sending();
                let (job, number) = (claim.job(), claim.attempts());
                (
                    exchange(job, number, None, None, sender, claim.driver()).await,
                    None,
                )
            } else {
                // Boxed, so that attempts without hooks and spans don't take its room.
                Box::pin(exchange_with_span(&mut claim, sender)).await
            };
            let history = history(&exchange, &claim).await;
            let (seen, duration) = (exchange.seen_status(), exchange.duration);
            let judgement = judge(exchange, history, &claim);
            claim.count_attempt(judgement.has_failed(), seen, duration);
            if let Some(span) = span {
                span.end(judgement.has_failed().then_some(seen));
            }
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

/// Makes the claim's attempt in a span, if it gets one, and with the handle's hooks.
async fn exchange_with_span(
    claim: &mut Claim,
    sender: &mut dyn Sender,
) -> (Exchange, Option<Box<dyn AttemptSpan>>) {
    let Some(span) = span_of(claim) else {
        return (exchange_in_span(claim, None, sender).await, None);
    };
    let exchange = in_scope(&*span, exchange_in_span(claim, Some(&*span), sender)).await;
    (exchange, Some(span))
}

fn span_of(claim: &Claim) -> Option<Box<dyn AttemptSpan>> {
    let Tracing(tracer) = claim.driver().config.tracing.as_ref()?;
    let job = claim.job();
    tracer.attempt(&Attempted {
        id: job.id,
        channel: &job.channel,
        number: claim.attempts(),
        context: job.request.trace.as_deref(),
    })
}

async fn exchange_in_span(
    claim: &mut Claim,
    span: Option<&dyn AttemptSpan>,
    sender: &mut dyn Sender,
) -> Exchange {
    if !claim.driver().config.hooks.is_empty() {
        return exchange_with_hooks(claim, span, sender).await;
    }
    claim.begin_sending();
    let (job, number) = (claim.job(), claim.attempts());
    exchange(job, number, None, span, sender, claim.driver()).await
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
