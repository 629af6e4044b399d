//! Listing parked requests.

use super::Durable;
use crate::error::Error;
use crate::id::RequestId;
use crate::status::ParkedRequest;

/// How many parked requests a page has at most.
const PAGE: i64 = 100;

impl Durable {
    /// The requests that are [parked](crate::Status::Parked) because a process could not read them,
    /// with the reason: up to 100 of all channels, in the order of their ids, which is about the
    /// order in which they were enqueued. `after` is the last id of the page before.
    ///
    /// A request is missing from the list for the moment in which a process looks at it again.
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
    /// let mut page = durable.parked(None).await?;
    /// while let Some(last) = page.last() {
    ///     let last = last.id;
    ///     for request in page {
    ///         println!("{} of {}: {}", request.id, request.channel, request.reason);
    ///     }
    ///     page = durable.parked(Some(last)).await?;
    /// }
    /// # Ok(()) }
    /// ```
    pub async fn parked(&self, after: Option<RequestId>) -> Result<Vec<ParkedRequest>, Error> {
        self.engine()
            .with_store(|store| async move { store.parked(after, PAGE).await })
            .await
    }
}
