//! What a user does with requests that ended without success.

use std::sync::Arc;

use super::Durable;
use crate::dead_letter::{
    DEFAULT_DEAD_LETTER_LIMIT, DeadLetter, DeadLetterFilter, HaltedKey, Resolution,
};
use crate::destination;
use crate::engine::dead_letters as work;
use crate::error::Error;
use crate::id::RequestId;
use crate::store::dead_letters::{self, Page};

impl Durable {
    /// The requests that were given up ([`Status::Discarded`](crate::Status::Discarded)) or may have been sent
    /// ([`Status::Ambiguous`](crate::Status::Ambiguous)), in the order of their ids: about that of their enqueueing. They are kept until
    /// they are replayed, resolved or purged.
    ///
    /// # Errors
    ///
    /// If the filter is not valid, with the field's name in [`Error::field`], or the database fails.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(durable: requeuest::Durable) -> Result<(), requeuest::Error> {
    /// use requeuest::DeadLetterFilter;
    ///
    /// let mut page = DeadLetterFilter::default().channel("billing");
    /// loop {
    ///     let kept = durable.dead_letters(&page).await?;
    ///     let Some(last) = kept.last() else { break };
    ///     page = page.after(last.id);
    ///     for request in kept {
    ///         println!("{} {:?}: {:?}", request.id, request.destination, request.error);
    ///     }
    /// }
    /// # Ok(()) }
    /// ```
    pub async fn dead_letters(&self, filter: &DeadLetterFilter) -> Result<Vec<DeadLetter>, Error> {
        let wanted = filter.checked()?;
        self.engine()
            .query(move |connection| {
                Box::pin(async move {
                    let page = Page {
                        now: dead_letters::now(&mut *connection).await?,
                        limit: wanted.limit.unwrap_or(DEFAULT_DEAD_LETTER_LIMIT),
                        wanted,
                    };
                    dead_letters::list(connection, &page).await
                })
            })
            .await
    }

    /// Sends a kept request once more, as a new request with a new id: the same method, URL, headers and body, so that an
    /// idempotency key stays what it was, and the same retry policy, with attempts and age counted anew. It has no
    /// [`deadline`](crate::Options::deadline), whatever the first one had.
    ///
    /// If the old one holds up its ordering key, the new one takes its place and the key goes on; any other
    /// [`ordered`](crate::Options::ordered) one goes last. A [`key`](crate::Options::key) that led to the old one leads to the new one.
    /// The old one is no longer kept: its outcome can be asked for until the retention has passed.
    ///
    /// # Errors
    ///
    /// If there is no such request ([`Error::is_unknown_id`]), or it is not kept ([`Error::is_wrong_state`]): it has not ended, or not
    /// so, or was replayed before. Nothing is changed then. If the database fails; after [`Error::is_indeterminate`] it is
    /// unknown whether it was replayed, and [`Error::request_id`] is the new id.
    ///
    /// # Cancel safety
    ///
    /// Dropped before it returns, it may or may not have been replayed. It can't be replayed twice.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(durable: requeuest::Durable, id: requeuest::RequestId) -> Result<(), requeuest::Error> {
    /// let again = durable.replay(id).await?;
    /// println!("{}", durable.response(again).await?.status());
    /// # Ok(()) }
    /// ```
    pub async fn replay(&self, id: RequestId) -> Result<RequestId, Error> {
        let engine = Arc::clone(self.engine());
        self.engine().run(work::replay_one(engine, id)).await
    }

    /// Sends all kept requests once more that match, as [`replay`](Self::replay) does. A batch at a time: after an error some
    /// were replayed and the others were not. One whose stored request is gone is left out.
    ///
    /// Without a [`limit`](DeadLetterFilter::limit) it is all that had ended when the call began. Returns the new ids.
    ///
    /// # Errors
    ///
    /// If the filter is not valid, with the field's name in [`Error::field`], or the database fails.
    ///
    /// # Cancel safety
    ///
    /// Once begun it goes on, awaited or not. None is replayed twice.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(durable: requeuest::Durable) -> Result<(), requeuest::Error> {
    /// use requeuest::{DeadLetterFilter, Status};
    ///
    /// let outage = DeadLetterFilter::default().destination("https://pay.example.com").status(Status::Discarded);
    /// let again = durable.replay_all(&outage).await?;
    /// println!("{} requests go out again", again.len());
    /// # Ok(()) }
    /// ```
    pub async fn replay_all(&self, filter: &DeadLetterFilter) -> Result<Vec<RequestId>, Error> {
        let wanted = filter.checked()?;
        let engine = Arc::clone(self.engine());
        self.engine().run(work::replay_all(engine, wanted)).await
    }

    /// Forgets all kept requests that match, with their outcomes and [`key`](crate::Options::key)s. If one of them holds up its ordering
    /// key, the key goes on. Returns how many there were. Without a [`limit`](DeadLetterFilter::limit) it is all that had ended when the call began.
    ///
    /// # Errors
    ///
    /// If the filter is not valid, with the field's name in [`Error::field`], or the database fails: some may be gone then.
    ///
    /// # Cancel safety
    ///
    /// Once begun it goes on, awaited or not.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(durable: requeuest::Durable) -> Result<(), requeuest::Error> {
    /// use std::time::Duration;
    /// use requeuest::DeadLetterFilter;
    ///
    /// let old = DeadLetterFilter::default().finished_before(Duration::from_secs(90 * 24 * 3600));
    /// durable.purge_dead_letters(&old).await?;
    /// # Ok(()) }
    /// ```
    pub async fn purge_dead_letters(&self, filter: &DeadLetterFilter) -> Result<u64, Error> {
        let wanted = filter.checked()?;
        let engine = Arc::clone(self.engine());
        self.engine().run(work::purge(engine, wanted)).await
    }

    /// Says of a request that ended as [`Status::Ambiguous`](crate::Status::Ambiguous) what became of it.
    ///
    /// [`Resolution::Sent`] ends it as completed; who asks for its response gets an error
    /// ([`Error::is_response_unknown`]). [`Resolution::NotSent`] puts it back into the queue under its id, without the attempt that did not
    /// arrive and without a deadline. If it holds up its ordering key, it is sent in its place; any other ordered one goes last.
    ///
    /// A handler ([`on_outcome`](Self::on_outcome)) gets the new end, too. While it handles the first one, this waits: don't await it in there.
    ///
    /// # Errors
    ///
    /// If there is no such request ([`Error::is_unknown_id`]), or it is not ambiguous ([`Error::is_wrong_state`]): nothing is changed then.
    /// If the database fails: it may have taken effect.
    ///
    /// # Cancel safety
    ///
    /// Dropped before it returns, it may or may not have taken effect.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(durable: requeuest::Durable) -> Result<(), requeuest::Error> {
    /// use requeuest::{DeadLetterFilter, Resolution, Status};
    ///
    /// for request in durable.dead_letters(&DeadLetterFilter::default().status(Status::Ambiguous)).await? {
    ///     // Somebody looked into the other side's books.
    ///     durable.resolve(request.id, Resolution::Sent).await?;
    /// }
    /// # Ok(()) }
    /// ```
    pub async fn resolve(&self, id: RequestId, resolution: Resolution) -> Result<(), Error> {
        let engine = Arc::clone(self.engine());
        self.engine()
            .run(async move { work::resolve(engine.shared(), id, resolution, None).await })
            .await
    }

    /// The ordering keys whose requests wait, because one that was to hold them up
    /// ([`halt_on_discard`](crate::Options::halt_on_discard)) ended without success. A key in which several did is there several times.
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
    /// for halted in durable.halted().await? {
    ///     println!("{} waits for request {}", halted.key, halted.id);
    /// }
    /// # Ok(()) }
    /// ```
    pub async fn halted(&self) -> Result<Vec<HaltedKey>, Error> {
        self.engine()
            .query(|connection| Box::pin(async move { dead_letters::halted(connection).await }))
            .await
    }

    /// Lets an ordering key go on without the request that holds it up, which stays kept. If several of its requests do, it is the
    /// first of them: call it once for each. Returns `false` if the key was not held up.
    ///
    /// # Errors
    ///
    /// If channel or key are not valid, with the name in [`Error::field`], or the database fails: it may have taken effect.
    ///
    /// # Cancel safety
    ///
    /// Dropped before it returns, it may or may not have taken effect.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(durable: requeuest::Durable) -> Result<(), requeuest::Error> {
    /// for halted in durable.halted().await? {
    ///     durable.resume(halted.channel, halted.key).await?;
    /// }
    /// # Ok(()) }
    /// ```
    pub async fn resume(
        &self,
        channel: impl Into<String>,
        key: impl Into<String>,
    ) -> Result<bool, Error> {
        let (channel, key) = (channel.into(), key.into());
        crate::Options::default()
            .channel(&*channel)
            .ordered(&*key)
            .validate()?;
        let group = destination::ordered_group(&key);
        self.engine()
            .query(move |connection| {
                Box::pin(async move { dead_letters::resume(connection, &channel, &group).await })
            })
            .await
    }
}
