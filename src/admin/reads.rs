//! Reading requests: one, a list, and counts.

use super::hold::{self, Known};
use super::{
    Admin, Count, Counts, Cursor, PageRequest, RequestContent, RequestFilter, RequestInfo,
    RequestPage,
};
use crate::destination::{DestinationStatus, validate_name};
use crate::error::Error;
use crate::health::RunnerInfo;
use crate::id::RequestId;

impl Admin {
    /// One request, with its failed attempts and the reason why it is not being sent. `None` if
    /// there is no such request, or its outcome has expired.
    ///
    /// It takes a few look-ups by key, however many requests there are. They are not one snapshot:
    /// of a request that moves on meanwhile, an attempt may be missing.
    ///
    /// # Errors
    ///
    /// If the outcome has a status of a newer version ([`Error::is_unreadable`]), or if the
    /// database fails.
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
    /// #     id: requeuest::RequestId,
    /// # ) -> Result<(), requeuest::Error> {
    /// let Some(request) = admin.request(id).await? else {
    ///     println!("no such request, or its outcome has expired");
    ///     return Ok(());
    /// };
    /// for attempt in &request.failed_attempts {
    ///     println!("attempt {}: {}", attempt.number, attempt.error);
    /// }
    /// # Ok(()) }
    /// ```
    pub async fn request(&self, id: RequestId) -> Result<Option<RequestInfo>, Error> {
        let found = self
            .with_store(|store| async move { store.inspect(id).await })
            .await?;
        let Some(found) = found else {
            return Ok(None);
        };
        let mut info = found.info;
        if let Some(place) = found.place {
            info.hold = match hold::of(&info, &place) {
                Known::Hold(hold) => hold,
                Known::AsksDestination => {
                    let destination = match &info.destination {
                        Some(name) => Some(self.destination_status(name).await?),
                        None => None,
                    };
                    Some(hold::at_destination(&info, &place, destination))
                }
            };
        }
        Ok(Some(info))
    }

    /// The request of a caller's [key](crate::Options::key), as [`request`](Self::request) shows
    /// it. `None` if no request of the channel has the key, or not any more.
    ///
    /// # Errors
    ///
    /// As for [`request`](Self::request). If the channel or the key is not valid, with its name as
    /// [`Error::field`].
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(admin: requeuest::admin::Admin) -> Result<(), requeuest::Error> {
    /// if let Some(request) = admin.request_by_key("billing", "invoice-42").await? {
    ///     println!("{} is {}", request.id, request.status);
    /// }
    /// # Ok(()) }
    /// ```
    pub async fn request_by_key(
        &self,
        channel: &str,
        key: &str,
    ) -> Result<Option<RequestInfo>, Error> {
        RequestFilter::new().channel(channel).key(key).validate()?;
        let (channel, key) = (channel.to_owned(), key.to_owned());
        let found = self
            .with_store(|store| async move { store.request_of_key(&channel, &key).await })
            .await?;
        match found {
            Some(id) => self.request(id).await,
            None => Ok(None),
        }
    }

    /// What a request sends and what it got, with headers and bodies. `None` if there is no such
    /// request, or its outcome has expired. Values of headers that are marked sensitive are masked.
    /// What is encrypted is read with the keys of this process.
    ///
    /// # Errors
    ///
    /// If it can't be read ([`Error::is_unreadable`]), or if the database fails.
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
    /// #     id: requeuest::RequestId,
    /// # ) -> Result<(), requeuest::Error> {
    /// if let Some(content) = admin.content(id).await? {
    ///     if let Some(response) = content.response {
    ///         println!("{}: {:?}", response.status(), response.text());
    ///     }
    /// }
    /// # Ok(()) }
    /// ```
    pub async fn content(&self, id: RequestId) -> Result<Option<RequestContent>, Error> {
        self.with_store(|store| async move { store.content(id).await })
            .await
    }

    /// The runners that are alive, of all processes: see
    /// [`Durable::runners`](crate::Durable::runners).
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
    /// # async fn example(admin: requeuest::admin::Admin) -> Result<(), requeuest::Error> {
    /// for runner in admin.runners().await? {
    ///     println!("{:?} {}: {} in flight", runner.host, runner.pid, runner.in_flight);
    /// }
    /// # Ok(()) }
    /// ```
    pub async fn runners(&self) -> Result<Vec<RunnerInfo>, Error> {
        self.with_store(|store| async move { store.runners().await })
            .await
    }

    /// What all processes together know of a destination: as
    /// [`DestinationHandle::status`](crate::DestinationHandle::status). Without a handle, policies
    /// of the code are not known.
    ///
    /// # Errors
    ///
    /// If the name is not valid, with `destination` as [`Error::field`]; if the database fails.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(admin: requeuest::admin::Admin) -> Result<(), requeuest::Error> {
    /// println!("{}", admin.destination("https://api.example.com").await?.state);
    /// # Ok(()) }
    /// ```
    pub async fn destination(&self, name: &str) -> Result<DestinationStatus, Error> {
        self.destination_status(&validate_name(name)?).await
    }

    /// The requests that match a filter, unfinished and ended, the newest ones first: by the time
    /// at which they were enqueued.
    ///
    /// A page looks at about 10,000 requests at most, so it can have few of them, or none, and say
    /// with [`next`](RequestPage::next) where the list continues. What has an index is found at
    /// once: an id, a key, an ordering key, a status of dead letters, parked, deferred and similar
    /// states, and channels and destinations of dead letters with few requests.
    ///
    /// A request that is enqueued while pages are read is not on the later ones.
    ///
    /// # Errors
    ///
    /// If a part of the filter is not valid, with its name as [`Error::field`], or `limit`; with
    /// `cursor`, if the page continues a list of another filter. If the database fails.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// use requeuest::Status;
    /// use requeuest::admin::{Admin, PageRequest, RequestFilter};
    ///
    /// # async fn example(admin: Admin) -> Result<(), requeuest::Error> {
    /// let refused = RequestFilter::new().status(Status::Retryable).error_contains("refused");
    /// let mut page = PageRequest::new();
    /// loop {
    ///     let found = admin.requests(&refused, &page).await?;
    ///     for request in found.requests {
    ///         println!("{} {:?}", request.id, request.error);
    ///     }
    ///     let Some(next) = found.next else { break };
    ///     page = page.after(next);
    /// }
    /// # Ok(()) }
    /// ```
    pub async fn requests(
        &self,
        filter: &RequestFilter,
        page: &PageRequest,
    ) -> Result<RequestPage, Error> {
        let (before, limit) = page.checked(filter)?;
        let checked = filter.checked()?;
        let (requests, next) = self
            .with_store(|store| async move { store.requests(&checked, before, limit).await })
            .await?;
        Ok(RequestPage {
            requests,
            next: next.map(|id| Cursor::behind(id, filter)),
        })
    }

    /// How many requests match a filter: all of them if they are few, and otherwise at least how
    /// many. Looks at as many requests as a page of [`requests`](Self::requests).
    ///
    /// # Errors
    ///
    /// As for [`requests`](Self::requests).
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// use requeuest::Status;
    /// use requeuest::admin::{Admin, RequestFilter};
    ///
    /// # async fn example(admin: Admin) -> Result<(), requeuest::Error> {
    /// let letters = RequestFilter::new().channel("billing").status(Status::Discarded);
    /// println!("{} dead letters", admin.count(&letters).await?);
    /// # Ok(()) }
    /// ```
    pub async fn count(&self, filter: &RequestFilter) -> Result<Count, Error> {
        let checked = filter.checked()?;
        self.with_store(|store| async move { store.count_requests(&checked).await })
            .await
    }

    /// How many requests there are of each status, and in each state of the queue. Each kind is
    /// counted up to 10,000.
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
    /// # async fn example(admin: requeuest::admin::Admin) -> Result<(), requeuest::Error> {
    /// for (status, count) in admin.counts().await?.by_status {
    ///     println!("{status}: {count}");
    /// }
    /// # Ok(()) }
    /// ```
    pub async fn counts(&self) -> Result<Counts, Error> {
        self.with_store(|store| async move { store.counts().await })
            .await
    }
}
