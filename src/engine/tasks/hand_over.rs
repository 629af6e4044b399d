//! Handing outcomes to the application, in a transaction of its own database.

use std::sync::Arc;
use std::time::Duration;

use crate::engine::attempt::Driver;
use crate::engine::telemetry::{Failures, OwnCondition};
use crate::error::chain;
use crate::id::RequestId;
use crate::redact::redact_urls;
use crate::store::StoreError;
use crate::store::hand_over::{OutcomeHandler, Taken};

/// How long an outcome of another process can wait unnoticed.
const POLL_INTERVAL: Duration = Duration::from_secs(1);
/// The longest time between two tries to hand an outcome over.
const MAX_BACKOFF: Duration = Duration::from_secs(5 * 60);

/// Hands over the outcomes of a channel, one after another, until a shutdown.
pub(crate) async fn run(driver: Arc<Driver>, channel: Arc<str>, handler: Arc<dyn OutcomeHandler>) {
    let mut unreachable = OwnCondition::default();
    let failures = Failures::default();
    loop {
        // Subscribed before looking, or an outcome could be settled in between.
        let finished = driver.settler.finished().notified();
        if driver.lifecycle.is_closing() {
            return;
        }
        let found = hand_over(&driver, &channel, &handler, &failures).await;
        match &found {
            Ok(_) => {
                if unreachable.ends() {
                    tracing::info!(channel = &*channel, "outcomes are handed over again");
                }
            }
            Err(error) => {
                if unreachable.begins() {
                    tracing::warn!(
                        channel = &*channel, %error,
                        "outcomes can't be handed over yet"
                    );
                }
            }
        }
        if !matches!(found, Ok(true)) {
            tokio::select! {
                () = finished => {}
                () = tokio::time::sleep(POLL_INTERVAL) => {}
                () = driver.lifecycle.closing() => return,
            }
        }
    }
}

/// Hands over one outcome. Returns whether there was one.
async fn hand_over(
    driver: &Driver,
    channel: &str,
    handler: &Arc<dyn OutcomeHandler>,
    failures: &Failures,
) -> Result<bool, StoreError> {
    let hand_over = match driver.store.take_unhandled(channel, MAX_BACKOFF).await? {
        Taken::Nothing => return Ok(false),
        Taken::Expired => return Ok(true),
        Taken::Unreadable { id, reason, first } => {
            let reason = reason.as_str();
            if first {
                tracing::warn!(
                    %id, channel, reason,
                    "an outcome can't be read by this version and is not handed over"
                );
            } else {
                tracing::debug!(%id, reason, "an outcome still can't be read");
            }
            return Ok(true);
        }
        Taken::HandOver(hand_over) => hand_over,
    };
    let (id, handler) = (hand_over.id(), Arc::clone(handler));
    // In a task of its own, so that a handler that panics is tried again like one that fails.
    let handled = tokio::spawn(async move { hand_over.run(&*handler).await });
    let error = match handled.await {
        Ok(Ok(())) => {
            failures.recovers(id);
            return Ok(true);
        }
        Ok(Err(error)) => chain(&*error),
        Err(_panic) => "the handler panicked".to_owned(),
    };
    let shown = redact_urls(&error);
    if failures.is_news(id) {
        tracing::warn!(%id, error = shown, "a handler failed and gets the outcome again later");
    } else {
        tracing::debug!(%id, error = shown, "a handler failed again");
    }
    put_off(driver, id, &error).await;
    Ok(true)
}

async fn put_off(driver: &Driver, id: RequestId, error: &str) {
    // Postgres stores no NUL in text.
    let error = error.replace('\0', "\u{fffd}");
    let put_off = driver
        .with_store(|store| async move { store.put_off(id, &error, MAX_BACKOFF).await })
        .await;
    if let Err(error) = put_off {
        // The outcome is due at once, so this task waits instead.
        tracing::debug!(%id, ?error, "an outcome could not be put off");
        tokio::time::sleep(POLL_INTERVAL).await;
    }
}
