//! Changing many requests.

use super::Admin;
use crate::error::{Error, Kind};
use crate::inspection::RequestFilter;
use crate::operation::{Action, NewOperation, Operation, OperationFilter, OperationId, Preview};

impl Admin {
    /// What an operation would do now, and changes nothing. Counts are exact up to 10,000, unless
    /// so few requests match that it would have to look at more than 50,000.
    ///
    /// # Errors
    ///
    /// If the filter is refused ([`Error::is_request`]), or if the database fails.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(admin: requeuest::admin::Admin) -> Result<(), requeuest::Error> {
    /// use requeuest::admin::{Action, RequestFilter};
    ///
    /// let filter = RequestFilter::new().channel("emails");
    /// let preview = admin.preview(Action::Replay, &filter).await?;
    /// println!("{} requests", preview.count);
    /// for (destination, count) in preview.by_destination {
    ///     println!("{count} to {destination}");
    /// }
    /// # Ok(()) }
    /// ```
    pub async fn preview(&self, action: Action, filter: &RequestFilter) -> Result<Preview, Error> {
        let filter = filter.checked()?;
        self.with_store(|store| async move { store.preview(action, &filter).await })
            .await
    }

    /// Starts an operation on many requests. It is stored, and processes with a runner work at it,
    /// whatever becomes of this one: see [`Operation::is_driven`]. It meets the requests that match
    /// when it is started, each once. One that meets none has finished when this returns.
    ///
    /// # Errors
    ///
    /// If the filter selects all requests without [`NewOperation::all`], or if the filter, the rate
    /// or the author is refused ([`Error::is_request`]), or if the database fails.
    ///
    /// # Cancel safety
    ///
    /// Once begun it continues, awaited or not.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(admin: requeuest::admin::Admin) -> Result<(), requeuest::Error> {
    /// use requeuest::admin::{Action, NewOperation, RequestFilter};
    ///
    /// let filter = RequestFilter::new().destination("https://api.example.com");
    /// let replay = NewOperation::new(Action::Replay, filter).rate(20.0);
    /// let id = admin.by("ann").because("they are back").start(&replay).await?;
    /// println!("started as {id}");
    /// # Ok(()) }
    /// ```
    pub async fn start(&self, new: &NewOperation) -> Result<OperationId, Error> {
        let filter = new.checked()?;
        let author = self.signed()?;
        let new = new.clone();
        let id = self
            .with_store(|store| async move { store.start_operation(&new, &filter, &author).await })
            .await?;
        self.note_started();
        Ok(id)
    }

    /// One operation, and how far it is. `None` if there is none, or it ended more than 90 days
    /// ago.
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
    /// # async fn example(
    /// #     admin: requeuest::admin::Admin,
    /// #     id: requeuest::admin::OperationId,
    /// # ) -> Result<(), requeuest::Error> {
    /// if let Some(operation) = admin.operation(id).await? {
    ///     println!("{}: {} done", operation.state, operation.done);
    /// }
    /// # Ok(()) }
    /// ```
    pub async fn operation(&self, id: OperationId) -> Result<Option<Operation>, Error> {
        self.with_store(|store| async move { store.operation(id).await })
            .await
    }

    /// Operations, the newest first: a page of them. They are kept for 90 days after their end.
    ///
    /// # Errors
    ///
    /// If the limit is out of range ([`Error::is_request`]), or if the database fails.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(admin: requeuest::admin::Admin) -> Result<(), requeuest::Error> {
    /// use requeuest::admin::OperationFilter;
    ///
    /// for operation in admin.operations(&OperationFilter::new().running()).await? {
    ///     println!("{} by {}", operation.id, operation.actor);
    /// }
    /// # Ok(()) }
    /// ```
    pub async fn operations(&self, filter: &OperationFilter) -> Result<Vec<Operation>, Error> {
        let limit = filter.checked()?;
        let filter = filter.clone();
        self.with_store(|store| async move { store.operations(&filter, limit).await })
            .await
    }

    /// Cancels an operation. What it has done stays done, and it does nothing more once this has
    /// returned. `false` if it had ended.
    ///
    /// # Errors
    ///
    /// If there is no such operation ([`Error::is_unknown_id`]), if the author is refused
    /// ([`Error::is_request`]), or if the database fails.
    ///
    /// # Cancel safety
    ///
    /// Once begun it continues, awaited or not.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(
    /// #     admin: requeuest::admin::Admin,
    /// #     id: requeuest::admin::OperationId,
    /// # ) -> Result<(), requeuest::Error> {
    /// admin.because("too fast for them").cancel_operation(id).await?;
    /// # Ok(()) }
    /// ```
    pub async fn cancel_operation(&self, id: OperationId) -> Result<bool, Error> {
        let author = self.signed()?;
        let cancelled = self
            .with_store(|store| async move { store.cancel_operation(id, &author).await })
            .await?;
        cancelled.ok_or_else(|| Error::new(Kind::UnknownOperation(id)))
    }
}
