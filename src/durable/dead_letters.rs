//! Inspecting, replaying, resolving and purging dead letters.

use std::sync::Arc;

use super::Durable;
use crate::dead_letter::{
    DEFAULT_DEAD_LETTER_LIMIT, DeadLetter, DeadLetterFilter, HaltedKey, MAX_DEAD_LETTER_COUNT,
    Resolution,
};
use crate::destination;
use crate::engine::dead_letters as work;
use crate::error::Error;
use crate::id::RequestId;

impl Durable {
    /// The dead letters that match: requests that were given up
    /// ([`Status::Discarded`](crate::Status::Discarded)) or may have been sent
    /// ([`Status::Ambiguous`](crate::Status::Ambiguous)). They come in the order in which they
    /// ended. Dead letters stay until they are replayed, resolved or purged, or until their
    /// [retention](crate::DurableBuilder::dead_letter_retention) is over. Those that a newer
    /// version wrote in a form that this one doesn't know are left out, here and where they are
    /// replayed or purged by a filter.
    ///
    /// However many dead letters there are, a page costs what it shows, with any filter.
    ///
    /// # Errors
    ///
    /// If a field of the filter is not valid, with its name in [`Error::field`], or the database
    /// fails.
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
    ///     let letters = durable.dead_letters(&page).await?;
    ///     let Some(last) = letters.last() else { break };
    ///     page = page.after(last);
    ///     for request in letters {
    ///         println!("{} {:?}: {:?}", request.id, request.destination, request.error);
    ///     }
    /// }
    /// # Ok(()) }
    /// ```
    pub async fn dead_letters(&self, filter: &DeadLetterFilter) -> Result<Vec<DeadLetter>, Error> {
        let wanted = filter.checked()?;
        let limit = wanted.limit.unwrap_or(DEFAULT_DEAD_LETTER_LIMIT);
        self.engine()
            .with_store(|store| async move { store.dead_letters(wanted, limit).await })
            .await
    }

    /// How many dead letters match, for alerts and dashboards. Counts up to the filter's
    /// [`limit`](DeadLetterFilter::limit), or up to [`MAX_DEAD_LETTER_COUNT`], so that the cost is
    /// bounded however many there are: a result that equals the limit means "at least".
    ///
    /// # Errors
    ///
    /// If a field of the filter is not valid, with its name in [`Error::field`], or the database
    /// fails.
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
    /// let billing = DeadLetterFilter::default().channel("billing");
    /// if durable.dead_letter_count(&billing).await? > 100 {
    ///     println!("billing has many dead letters");
    /// }
    /// # Ok(()) }
    /// ```
    pub async fn dead_letter_count(&self, filter: &DeadLetterFilter) -> Result<u64, Error> {
        let wanted = filter.checked()?;
        let limit = wanted.limit.unwrap_or(MAX_DEAD_LETTER_COUNT);
        self.engine()
            .with_store(|store| async move { store.count_dead_letters(wanted, limit).await })
            .await
    }

    /// Replays a dead letter: sends it again as a new request with a new id. Method, URL, headers
    /// and body stay the same, so the receiver gets the same idempotency key. The retry policy
    /// stays the same too, with attempts and age starting from zero. The new request has no
    /// [`deadline`](crate::Options::deadline).
    ///
    /// If the dead letter halts its ordering key, the new request takes its place and the key
    /// resumes. Any other [`ordered`](crate::Options::ordered) request goes to the end of its key.
    /// A [`key`](crate::Options::key) of the dead letter now belongs to the new request. The dead
    /// letter becomes an ordinary outcome, which expires after the retention.
    ///
    /// # Errors
    ///
    /// If there is no such request ([`Error::is_unknown_id`]), or it isn't a dead letter
    /// ([`Error::is_wrong_state`]): it is still pending, it succeeded, or it was already replayed.
    /// Nothing is changed then. If it is encrypted, and this process lacks the key
    /// ([`Error::is_unreadable`]). If the database fails. After [`Error::is_indeterminate`] it is
    /// unknown whether the request was replayed, and [`Error::request_id`] is the new id.
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped before it returns, the request may or may not have been replayed.
    /// It can't be replayed twice.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(
    /// #     durable: requeuest::Durable,
    /// #     id: requeuest::RequestId,
    /// # ) -> Result<(), requeuest::Error> {
    /// let again = durable.replay(id).await?;
    /// println!("{}", durable.response(again).await?.status());
    /// # Ok(()) }
    /// ```
    pub async fn replay(&self, id: RequestId) -> Result<RequestId, Error> {
        let driver = Arc::clone(self.engine().driver());
        self.engine().run(work::replay_one(driver, id)).await
    }

    /// Replays all dead letters that match, as [`replay`](Self::replay) does, and returns the new
    /// ids. It works in batches: after an error, some were replayed ([`Error::replayed`] has their
    /// new ids) and the others were not. Dead letters whose stored request is gone, or is encrypted
    /// with a key that this process doesn't have, are left out.
    ///
    /// Without a [`limit`](DeadLetterFilter::limit), all dead letters that existed when the call
    /// began are replayed.
    ///
    /// # Errors
    ///
    /// If a field of the filter is not valid, with its name in [`Error::field`], or the database
    /// fails.
    ///
    /// # Cancel safety
    ///
    /// Once begun it continues, awaited or not. No dead letter is replayed twice.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(durable: requeuest::Durable) -> Result<(), requeuest::Error> {
    /// use requeuest::{DeadLetterFilter, Status};
    ///
    /// let outage = DeadLetterFilter::default()
    ///     .destination("https://pay.example.com")
    ///     .status(Status::Discarded);
    /// let again = durable.replay_all(&outage).await?;
    /// println!("{} requests are sent again", again.len());
    /// # Ok(()) }
    /// ```
    pub async fn replay_all(&self, filter: &DeadLetterFilter) -> Result<Vec<RequestId>, Error> {
        let wanted = filter.checked()?;
        let driver = Arc::clone(self.engine().driver());
        self.engine().run(work::replay_all(driver, wanted)).await
    }

    /// Deletes all dead letters that match, with their outcomes and [`key`](crate::Options::key)s,
    /// and returns how many there were. If one of them halts its ordering key, the key resumes.
    /// Without a [`limit`](DeadLetterFilter::limit), all dead letters that existed when the call
    /// began are deleted.
    ///
    /// # Errors
    ///
    /// If a field of the filter is not valid, with its name in [`Error::field`], or the database
    /// fails. Some dead letters may be deleted then: [`Error::purged`] says how many.
    ///
    /// # Cancel safety
    ///
    /// Once begun it continues, awaited or not.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(durable: requeuest::Durable) -> Result<(), requeuest::Error> {
    /// use std::time::Duration;
    /// use requeuest::DeadLetterFilter;
    ///
    /// let quarter = Duration::from_secs(90 * 24 * 3600);
    /// durable
    ///     .purge_dead_letters(&DeadLetterFilter::default().finished_before(quarter))
    ///     .await?;
    /// # Ok(()) }
    /// ```
    pub async fn purge_dead_letters(&self, filter: &DeadLetterFilter) -> Result<u64, Error> {
        let wanted = filter.checked()?;
        let driver = Arc::clone(self.engine().driver());
        self.engine().run(work::purge(driver, wanted)).await
    }

    /// Records what became of a request that ended as
    /// [`Status::Ambiguous`](crate::Status::Ambiguous).
    ///
    /// [`Resolution::Sent`] completes the request. Callers that ask for its response get an error
    /// ([`Error::is_response_unknown`]). [`Resolution::NotSent`] puts the request back into the
    /// queue under its id, without its deadline, and doesn't count the attempt that did not arrive.
    /// If the request halts its ordering key, it is sent in its place; any other ordered request
    /// goes to the end of its key.
    ///
    /// A handler ([`on_outcome`](Self::on_outcome)) gets the new outcome too. This method waits
    /// while a handler has the first outcome of the same request, so don't await it inside that
    /// handler.
    ///
    /// # Errors
    ///
    /// If there is no such request ([`Error::is_unknown_id`]), or it isn't ambiguous
    /// ([`Error::is_wrong_state`]). Nothing is changed then. If the database fails, the resolution
    /// may have taken effect.
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped before it returns, it may or may not have taken effect.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(durable: requeuest::Durable) -> Result<(), requeuest::Error> {
    /// use requeuest::{DeadLetterFilter, Resolution, Status};
    ///
    /// let ambiguous = DeadLetterFilter::default().status(Status::Ambiguous);
    /// for request in durable.dead_letters(&ambiguous).await? {
    ///     // An operator found the request in the receiver's records.
    ///     durable.resolve(request.id, Resolution::Sent).await?;
    /// }
    /// # Ok(()) }
    /// ```
    pub async fn resolve(&self, id: RequestId, resolution: Resolution) -> Result<(), Error> {
        let driver = Arc::clone(self.engine().driver());
        self.engine()
            .run(async move { work::resolve(&driver.store, id, resolution, None).await })
            .await
    }

    /// The halted ordering keys: a request with
    /// [`halt_on_discard`](crate::Options::halt_on_discard) ended as a dead letter, and the
    /// requests behind it wait. A key that is halted by several dead letters is listed once for
    /// each.
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
            .with_store(|store| async move { store.halted().await })
            .await
    }

    /// Resumes a halted ordering key without the request that halts it, which stays a dead letter.
    /// If several requests halt the key, the first of them stops doing so: call this once for each.
    /// Returns `false` if the key was not halted.
    ///
    /// # Errors
    ///
    /// If the channel or the key is not valid, with its name in [`Error::field`]. If the database
    /// fails, the key may have been resumed.
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped before it returns, the key may or may not have been resumed.
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
            .with_store(|store| async move { store.resume(&channel, &group).await })
            .await
    }
}
