//! Seeing and retrying the outcomes that a handler doesn't take.

use std::sync::Arc;

use super::Durable;
use super::outcomes::checked;
use crate::error::Error;
use crate::health::{FailedHandOver, HandledChannel};
use crate::id::RequestId;

/// How many failed hand-overs a page has at most.
const PAGE: i64 = 100;

impl Durable {
    /// The outcomes that could not be handed over to a handler ([`on_outcome`](Self::on_outcome)):
    /// those whose handler has failed, the [parked](FailedHandOver::parked) ones among them, and
    /// those that a process could not read. Up to 100 of all channels, in the order of their ids,
    /// which is about the order in which the requests were enqueued. `after` is the last id of the
    /// page before.
    ///
    /// # Errors
    ///
    /// If the database fails.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(durable: requeuest::Durable) -> Result<(), requeuest::Error> {
    /// let mut page = durable.failed_hand_overs(None).await?;
    /// while let Some(last) = page.last() {
    ///     let last = last.id;
    ///     for outcome in page.iter().filter(|outcome| outcome.parked) {
    ///         println!("{} of {}: {:?}", outcome.id, outcome.channel, outcome.error);
    ///     }
    ///     page = durable.failed_hand_overs(Some(last)).await?;
    /// }
    /// # Ok(()) }
    /// ```
    pub async fn failed_hand_overs(
        &self,
        after: Option<RequestId>,
    ) -> Result<Vec<FailedHandOver>, Error> {
        self.engine()
            .with_store(|store| async move { store.failed_hand_overs(after, PAGE).await })
            .await
    }

    /// Hands an outcome over again now, one of those in
    /// [`failed_hand_overs`](Self::failed_hand_overs). Its failures are counted anew. Returns
    /// `false` if the outcome isn't among them, for example because it has been handled.
    ///
    /// # Errors
    ///
    /// If the database fails.
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped before it returns, it may or may not have taken effect. It can be
    /// called again.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(
    /// #     durable: requeuest::Durable,
    /// #     id: requeuest::RequestId,
    /// # ) -> Result<(), requeuest::Error> {
    /// if !durable.retry_hand_over(id).await? {
    ///     println!("{id} doesn't wait for its handler any more");
    /// }
    /// # Ok(()) }
    /// ```
    pub async fn retry_hand_over(&self, id: RequestId) -> Result<bool, Error> {
        self.engine()
            .with_store(|store| async move { store.retry_hand_over(id).await })
            .await
    }

    /// Does the same as [`retry_hand_over`](Self::retry_hand_over) for all of a channel: after a
    /// handler was mended, for example. Returns how many there were, apart from those that a
    /// handler has at this moment.
    ///
    /// # Errors
    ///
    /// If the channel's name is not valid ([`Error::field`] is `"channel"`), or the database fails.
    /// Some of the outcomes may have been retried by then.
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped before it returns, some of the outcomes may have been retried. It
    /// can be called again.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(durable: requeuest::Durable) -> Result<(), requeuest::Error> {
    /// let retried = durable.retry_hand_overs("payments").await?;
    /// println!("{retried} outcomes are handed over again");
    /// # Ok(()) }
    /// ```
    pub async fn retry_hand_overs(&self, channel: impl Into<Arc<str>>) -> Result<u64, Error> {
        let channel = checked(channel)?;
        let (mut all, mut after) = (0, None);
        loop {
            let channel = Arc::clone(&channel);
            let (retried, last) = self
                .engine()
                .with_store(|store| async move { store.retry_hand_overs(&channel, after).await })
                .await?;
            all += retried;
            if last.is_none() {
                return Ok(all);
            }
            after = last;
        }
    }

    /// Gives up the hand-over of an outcome, one of those in
    /// [`failed_hand_overs`](Self::failed_hand_overs): no handler gets it any more. The outcome
    /// itself stays until its retention is over. Returns `false` if it isn't among them, or a
    /// handler has it at this moment.
    ///
    /// # Errors
    ///
    /// If the database fails.
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped before it returns, it may or may not have taken effect. It can be
    /// called again.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(
    /// #     durable: requeuest::Durable,
    /// #     id: requeuest::RequestId,
    /// # ) -> Result<(), requeuest::Error> {
    /// durable.forget_hand_over(id).await?;
    /// # Ok(()) }
    /// ```
    pub async fn forget_hand_over(&self, id: RequestId) -> Result<bool, Error> {
        self.engine()
            .with_store(|store| async move { store.forget_hand_over(id).await })
            .await
    }

    /// The channels whose outcomes are kept for a handler: whether a process has one, and how many
    /// outcomes wait. In the order of their names.
    ///
    /// Worth an alert: [`has_handler`](HandledChannel::has_handler) stays `false`, or
    /// [`waiting`](HandledChannel::waiting) or [`parked`](HandledChannel::parked) grows.
    ///
    /// # Errors
    ///
    /// If the database fails.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(durable: requeuest::Durable) -> Result<(), requeuest::Error> {
    /// for channel in durable.handled_channels().await? {
    ///     if !channel.has_handler {
    ///         println!("{} has no handler, {} wait", channel.channel, channel.waiting);
    ///     }
    /// }
    /// # Ok(()) }
    /// ```
    pub async fn handled_channels(&self) -> Result<Vec<HandledChannel>, Error> {
        self.engine()
            .with_store(|store| async move { store.handled_channels().await })
            .await
    }
}
