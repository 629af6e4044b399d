//! Handing outcomes to the application.

use std::sync::Arc;

use tokio::task::JoinHandle;

use super::Durable;
use crate::error::Error;
use crate::options::validate_channel;
use crate::store::hand_over::OutcomeHandler;

/// Keeps a handler subscribed. Dropping it stops the handler in this process; outcomes then wait
/// for another handler.
#[derive(Debug)]
#[must_use = "dropping the subscription stops the handler"]
pub struct OutcomeSubscription {
    task: JoinHandle<()>,
}

impl Drop for OutcomeSubscription {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Durable {
    /// Hands each outcome of a channel to `handler`, in a transaction on the caller's pool. The
    /// same transaction marks the outcome as handled, so the handler's writes take effect exactly
    /// once. If the handler fails, it is called again, but the request is not sent again.
    ///
    /// The handler gets every request of the channel that finishes from now on, whatever its
    /// status. From the first subscription on, outcomes of the channel are kept until they are
    /// handled, also while no process has a handler.
    /// [`unsubscribe_outcomes`](Self::unsubscribe_outcomes) ends that. Several processes may
    /// subscribe to the same channel: each outcome goes to one of them. A process handles one
    /// outcome of a channel at a time.
    ///
    /// The outcome is stored before the handler is called, so callers that await the response don't
    /// wait for the handler.
    ///
    /// An outcome that this version can't read ([`Error::is_unreadable`]) waits for a process that
    /// can. The others don't wait for it.
    ///
    /// Async functions become handlers through [`outcome_fn`](crate::outcome_fn).
    ///
    /// # Errors
    ///
    /// If the channel's name is not valid ([`Error::field`] is `"channel"`), or the database fails.
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped before it returns, outcomes of the channel may or may not be kept
    /// for handlers.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// use requeuest::{Durable, Outcome, outcome_fn};
    /// use sqlx::PgConnection;
    ///
    /// async fn paid(tx: &mut PgConnection, outcome: &Outcome) -> Result<(), sqlx::Error> {
    ///     let paid = outcome.response().is_some_and(|response| response.status().is_success());
    ///     sqlx::query("UPDATE orders SET paid = $1 WHERE request = $2")
    ///         .bind(paid)
    ///         .bind(requeuest::Uuid::from(outcome.id()))
    ///         .execute(tx)
    ///         .await?;
    ///     Ok(())
    /// }
    ///
    /// # async fn example(durable: Durable) -> Result<(), requeuest::Error> {
    /// let subscription = durable.on_outcome("payments", outcome_fn(paid)).await?;
    /// # drop(subscription);
    /// # Ok(()) }
    /// ```
    pub async fn on_outcome(
        &self,
        channel: impl Into<Arc<str>>,
        handler: impl OutcomeHandler,
    ) -> Result<OutcomeSubscription, Error> {
        let channel = checked(channel)?;
        let task = self.engine().subscribe_outcomes(channel, handler).await?;
        Ok(OutcomeSubscription { task })
    }

    /// Stops keeping the outcomes of a channel for handlers. Outcomes that still wait are not
    /// handed over.
    ///
    /// # Errors
    ///
    /// As for [`on_outcome`](Self::on_outcome).
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped before it returns, it may or may not have taken effect. It can be
    /// called again.
    pub async fn unsubscribe_outcomes(&self, channel: impl Into<Arc<str>>) -> Result<(), Error> {
        let channel = checked(channel)?;
        self.engine()
            .with_store(|store| async move { store.unregister_handler(&channel).await })
            .await
    }
}

fn checked(channel: impl Into<Arc<str>>) -> Result<Arc<str>, Error> {
    let channel = channel.into();
    validate_channel(&channel).map_err(|reason| Error::request("channel", reason))?;
    Ok(channel)
}
