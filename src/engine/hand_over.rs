//! Handing outcomes to the application, in a transaction of its own database.

use std::sync::Arc;
use std::time::Duration;

use crate::engine::Engine;
use crate::error::{BoxError, chain};
use crate::id::RequestId;
use crate::store::hand_over::{self, OutcomeHandler, Taken};

/// How long an outcome that another process settled can wait unnoticed.
const POLL_INTERVAL: Duration = Duration::from_secs(1);
/// The longest time between two tries to hand over an outcome.
const MAX_BACKOFF: Duration = Duration::from_secs(5 * 60);

/// Hands over the outcomes of a channel, one after another, until a shutdown.
pub(crate) async fn run(engine: Arc<Engine>, channel: Arc<str>, handler: Arc<dyn OutcomeHandler>) {
    loop {
        // Before looking, or an outcome could be settled in between.
        let settled = engine.shared().settled.notified();
        if engine.is_closing() {
            return;
        }
        let found = hand_over_one(&engine, &channel, &handler).await;
        if let Err(error) = &found {
            log::warn!("outcomes of channel {channel} can't be handed over yet: {error}");
        }
        if !matches!(found, Ok(true)) {
            tokio::select! {
                () = settled => {}
                () = tokio::time::sleep(POLL_INTERVAL) => {}
                () = engine.closing() => return,
            }
        }
    }
}

/// Hands over one outcome. Returns whether there was one.
async fn hand_over_one(
    engine: &Engine,
    channel: &str,
    handler: &Arc<dyn OutcomeHandler>,
) -> Result<bool, sqlx::Error> {
    let mut transaction = engine.user_pool().begin().await?;
    let (schema, prepared) = (
        &engine.config().schema,
        engine.config().callers_sessions_last(),
    );
    let outcome = match hand_over::take(&mut *transaction, schema, channel, prepared).await? {
        Taken::Nothing => return Ok(false),
        Taken::Gone => {
            transaction.commit().await?;
            return Ok(true);
        }
        Taken::Outcome(outcome) => outcome,
    };
    let (id, handler) = (outcome.id, Arc::clone(handler));
    // In a task of its own: a handler that panics is tried again like one that fails.
    let handled = tokio::spawn(async move {
        handler.handle(&mut transaction, &outcome).await?;
        transaction.commit().await?;
        Ok::<(), BoxError>(())
    });
    match handled.await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => put_off(engine, id, chain(&*error)).await,
        Err(_panic) => put_off(engine, id, "the handler panicked".to_owned()).await,
    }
    Ok(true)
}

async fn put_off(engine: &Engine, id: RequestId, error: String) {
    log::warn!("the outcome of request {id} was not handled: {error}");
    // The database's text holds no NUL.
    let error = error.replace('\0', "\u{fffd}");
    let put_off = engine
        .query(move |connection| {
            Box::pin(async move { hand_over::put_off(connection, id, &error, MAX_BACKOFF).await })
        })
        .await;
    if let Err(error) = put_off {
        // It is tried again at once, then.
        log::warn!("putting off the outcome of request {id} failed: {error}");
        tokio::time::sleep(POLL_INTERVAL).await;
    }
}
