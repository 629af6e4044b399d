//! Handing outcomes to the application.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use sqlx::PgConnection;
use tokio::task::JoinHandle;

use super::Durable;
use crate::engine::handlers;
use crate::error::{BoxError, Error};
use crate::handler::OutcomeHandler;
use crate::options::validate_channel;
use crate::outcome::Outcome;
use crate::store::handle;

/// Keeps a handler at work. Dropping it stops the handing over in this process; outcomes then wait for the next handler.
#[derive(Debug)]
#[must_use = "outcomes are handed over for as long as it is kept"]
pub struct OutcomeListener {
    task: JoinHandle<()>,
}

impl Drop for OutcomeListener {
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
    /// are kept until they are handled, also while no process has a handler; [`forget_outcomes`](Self::forget_outcomes) ends that. Several
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
    /// use requeuest::{Durable, Outcome};
    /// use sqlx::PgConnection;
    ///
    /// # async fn example(durable: Durable) -> Result<(), requeuest::Error> {
    /// let listener = durable
    ///     .on_outcome("payments", |transaction: &mut PgConnection, outcome: &Outcome| {
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
    ///     })
    ///     .await?;
    /// # drop(listener);
    /// # Ok(()) }
    /// ```
    pub async fn on_outcome<F>(
        &self,
        channel: impl Into<Arc<str>>,
        handler: F,
    ) -> Result<OutcomeListener, Error>
    where
        // Said as closures are checked by it; any other handler is wrapped in one.
        F: for<'a> Fn(
                &'a mut PgConnection,
                &'a Outcome,
            )
                -> Pin<Box<dyn Future<Output = Result<(), BoxError>> + Send + 'a>>
            + Send
            + Sync
            + 'static,
    {
        self.on_outcome_with(channel, handler).await
    }

    /// As [`on_outcome`](Self::on_outcome), with a handler that is not a closure.
    ///
    /// # Errors
    ///
    /// As for [`on_outcome`](Self::on_outcome).
    ///
    /// # Cancel safety
    ///
    /// As for [`on_outcome`](Self::on_outcome).
    pub async fn on_outcome_with(
        &self,
        channel: impl Into<Arc<str>>,
        handler: impl OutcomeHandler,
    ) -> Result<OutcomeListener, Error> {
        let channel = checked(channel)?;
        let name = Arc::clone(&channel);
        self.engine()
            .query(move |connection| {
                Box::pin(async move { handle::register(connection, &name).await })
            })
            .await?;
        let engine = Arc::clone(self.engine());
        let task = engine.spawn(handlers::run(
            Arc::clone(&engine),
            channel,
            Arc::new(handler),
        ));
        Ok(OutcomeListener { task })
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
    pub async fn forget_outcomes(&self, channel: impl Into<Arc<str>>) -> Result<(), Error> {
        let channel = checked(channel)?;
        self.engine()
            .query(move |connection| {
                Box::pin(async move { handle::unregister(connection, &channel).await })
            })
            .await
    }
}

fn checked(channel: impl Into<Arc<str>>) -> Result<Arc<str>, Error> {
    let channel = channel.into();
    validate_channel(&channel).map_err(|reason| Error::request("channel", reason))?;
    Ok(channel)
}
