//! Handing outcomes to the application.

use std::sync::Arc;

use tokio::task::JoinHandle;

use super::Durable;
use crate::error::Error;
use crate::options::validate_channel;
use crate::store::hand_over::OutcomeHandler;

/// Keeps a handler subscribed. Dropping it stops the handler in this process; outcomes then wait
/// for another handler. So `let _ = durable.on_outcome(…)` stops the handler at once: bind the
/// subscription to a name, or [`detach`](Self::detach) it.
///
/// A call of the handler that is under way when the subscription is dropped runs to its end.
#[derive(Debug)]
#[must_use = "dropping the subscription stops the handler; keep it, or call `detach`"]
pub struct OutcomeSubscription {
    channel: Arc<str>,
    /// `None` once it is detached.
    task: Option<JoinHandle<()>>,
}

impl OutcomeSubscription {
    /// Keeps the handler subscribed until the handle is [shut down](Durable::shutdown) or the
    /// process ends.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(
    /// #     durable: requeuest::Durable,
    /// #     handler: impl requeuest::OutcomeHandler,
    /// # ) -> Result<(), requeuest::Error> {
    /// durable.on_outcome("payments", handler).await?.detach();
    /// # Ok(()) }
    /// ```
    pub fn detach(mut self) {
        self.task = None;
    }
}

impl Drop for OutcomeSubscription {
    fn drop(&mut self) {
        let Some(task) = &self.task else {
            return;
        };
        if !task.is_finished() {
            let channel = &*self.channel;
            tracing::info!(
                channel,
                "a handler's subscription is dropped; its outcomes wait"
            );
            task.abort();
        }
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
    /// subscribe to the same channel: each outcome goes to one of them. A process hands over up to
    /// [`handler_concurrency`](crate::DurableBuilder::handler_concurrency) outcomes of a channel at
    /// the same time, in no promised order, and no outcome twice at the same time.
    ///
    /// A handler fails if it returns an error, panics, takes longer than
    /// [`handler_timeout`](crate::DurableBuilder::handler_timeout), or returns `Ok` although its
    /// transaction can't be committed any more, after a database error that it ignored. Then it is
    /// called again for this outcome later, and the other outcomes don't wait. After
    /// [`max_handler_failures`](crate::DurableBuilder::max_handler_failures) the outcome is parked.
    /// [`failed_hand_overs`](Self::failed_hand_overs) lists those outcomes, and
    /// [`handled_channels`](Self::handled_channels) the channels that have lost their handlers.
    ///
    /// The outcome is stored before the handler is called, so callers that await the response don't
    /// wait for the handler.
    ///
    /// An outcome that this process can't read ([`Error::is_unreadable`]) waits for a process that
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
        let name = Arc::clone(&channel);
        let task = self.engine().subscribe_outcomes(name, handler).await?;
        Ok(OutcomeSubscription {
            channel,
            task: Some(task),
        })
    }

    /// Stops keeping the outcomes of a channel for handlers. Outcomes that still wait are not
    /// handed over, except those that a handler has at this moment.
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

pub(super) fn checked(channel: impl Into<Arc<str>>) -> Result<Arc<str>, Error> {
    let channel = channel.into();
    validate_channel(&channel).map_err(|reason| Error::request("channel", reason))?;
    Ok(channel)
}
