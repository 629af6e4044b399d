//! Handing outcomes to the application.

use std::sync::Arc;

use tokio::task::JoinHandle;

use super::Durable;
use crate::engine;
use crate::error::Error;
use crate::options::validate_channel;
use crate::store::hand_over::{self, OutcomeHandler};

/// Keeps a handler at work. Dropping it stops the handing over in this process; outcomes then wait for the next handler.
#[derive(Debug)]
#[must_use = "outcomes are handed over for as long as it is kept"]
pub struct OutcomeSubscription {
    task: JoinHandle<()>,
}

impl Drop for OutcomeSubscription {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Durable {
    /// Hands each outcome of a channel to `handler`, in a transaction of the caller's pool in which it is marked as handled. So what the handler
    /// writes and the outcome are true together, once each; when the handler fails, it is called again, but the request is not sent
    /// again.
    ///
    /// It gets every request of the channel that ends from now on, however it ends. From the first call on the channel's outcomes
    /// are kept until they are handled, also while no process has a handler; [`unsubscribe_outcomes`](Self::unsubscribe_outcomes) ends that. Several
    /// processes may handle the same channel: each outcome goes to one of them. One process handles one outcome at a time.
    ///
    /// The outcome itself is stored before the handler is called, so whoever awaits the response doesn't wait for the handler.
    ///
    /// # Errors
    ///
    /// If the channel's name is not valid ([`Error::field`] is `"channel"`), or the database fails.
    ///
    /// # Cancel safety
    ///
    /// Dropped before it returns, the channel may or may not be kept for handlers.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// use requeuest::{Durable, outcome_fn};
    ///
    /// # async fn example(durable: Durable) -> Result<(), requeuest::Error> {
    /// let subscription = durable
    ///     .on_outcome("payments", outcome_fn(|transaction, outcome| {
    ///         let paid = outcome.response().is_some_and(|response| response.status().is_success());
    ///         let id = outcome.id();
    ///         Box::pin(async move {
    ///             sqlx::query("UPDATE orders SET paid = $1 WHERE request = $2")
    ///                 .bind(paid)
    ///                 .bind(requeuest::Uuid::from(id))
    ///                 .execute(transaction)
    ///                 .await?;
    ///             Ok(())
    ///         })
    ///     }))
    ///     .await?;
    /// # drop(subscription);
    /// # Ok(()) }
    /// ```
    pub async fn on_outcome(
        &self,
        channel: impl Into<Arc<str>>,
        handler: impl OutcomeHandler,
    ) -> Result<OutcomeSubscription, Error> {
        let channel = checked(channel)?;
        let name = Arc::clone(&channel);
        self.engine()
            .query(move |connection| {
                Box::pin(async move { hand_over::register(connection, &name).await })
            })
            .await?;
        let engine = Arc::clone(self.engine());
        let task = engine.spawn(engine::hand_over::run(
            Arc::clone(&engine),
            channel,
            Arc::new(handler),
        ));
        Ok(OutcomeSubscription { task })
    }

    /// Outcomes of a channel are kept for handlers no more; those that still wait for one are not handed over.
    ///
    /// # Errors
    ///
    /// As for [`on_outcome`](Self::on_outcome).
    ///
    /// # Cancel safety
    ///
    /// Dropped before it returns, it may or may not have taken effect. It can be called again.
    pub async fn unsubscribe_outcomes(&self, channel: impl Into<Arc<str>>) -> Result<(), Error> {
        let channel = checked(channel)?;
        self.engine()
            .query(move |connection| {
                Box::pin(async move { hand_over::unregister(connection, &channel).await })
            })
            .await
    }
}

fn checked(channel: impl Into<Arc<str>>) -> Result<Arc<str>, Error> {
    let channel = channel.into();
    validate_channel(&channel).map_err(|reason| Error::request("channel", reason))?;
    Ok(channel)
}
