//! Changing one request, an ordering key or a destination, on the record.

use std::time::SystemTime;

use super::{Access, Admin};
use crate::change::{Change, ChangeFilter, MAX_ACTOR_LEN, Signed};
use crate::dead_letter::Resolution;
use crate::destination::{DestinationPolicy, ordered_group};
use crate::durable::DEFAULT_ATTEMPT_TIMEOUT;
use crate::engine::changes;
use crate::engine::destination_change::DestinationChange;
use crate::engine::runner::presence::host;
use crate::error::{Error, Kind};
use crate::id::RequestId;
use crate::inspection::RequestContent;
use crate::store::cancel::Cancelled;

/// Changes are recorded with who made them and why, in the transaction of the change. A call that
/// changes nothing leaves no record.
impl Admin {
    /// Who makes the changes through this value: a name, an address, a ticket system. One line, of
    /// up to [`MAX_ACTOR_LEN`] bytes. Defaults to the user and the
    /// host of this process, as `user@host`.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(
    /// #     admin: requeuest::admin::Admin,
    /// #     id: requeuest::RequestId,
    /// # ) -> Result<(), requeuest::Error> {
    /// let admin = admin.by("ann").because("the receiver is mended");
    /// admin.replay(id).await?;
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn by(mut self, actor: impl Into<String>) -> Self {
        self.author.actor = Some(actor.into());
        self
    }

    /// Why the changes through this value are made. One line, of up to
    /// [`MAX_REASON_LEN`](crate::admin::MAX_REASON_LEN) bytes.
    #[must_use]
    pub fn because(mut self, reason: impl Into<String>) -> Self {
        self.author.reason = Some(reason.into());
        self
    }

    /// Cancels a request, as [`Durable::cancel`](crate::Durable::cancel). `false` if it had ended.
    ///
    /// # Errors
    ///
    /// If there is no such request ([`Error::is_unknown_id`]), if the author can't be recorded
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
    /// #     id: requeuest::RequestId,
    /// # ) -> Result<(), requeuest::Error> {
    /// admin.because("sent by hand").cancel(id).await?;
    /// # Ok(()) }
    /// ```
    pub async fn cancel(&self, id: RequestId) -> Result<bool, Error> {
        let author = self.signed()?;
        let cancelled = self
            .with_store(|store| async move { store.cancel_recorded(id, &author).await })
            .await?;
        match cancelled {
            Cancelled::Now(channel) => {
                self.note_cancelled(id, channel);
                Ok(true)
            }
            Cancelled::Finished => Ok(false),
            Cancelled::Unknown => Err(Error::new(Kind::UnknownId).with_id(id)),
        }
    }

    /// As [`content`](Self::content), with the values of headers that are marked sensitive and the
    /// credentials of the URL. It changes nothing but the record, which names who asked and why.
    ///
    /// # Errors
    ///
    /// Those of [`content`](Self::content), or if the author can't be recorded
    /// ([`Error::is_request`]).
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
    /// #     id: requeuest::RequestId,
    /// # ) -> Result<(), requeuest::Error> {
    /// let admin = admin.by("ann").because("the partner says that the token is old");
    /// if let Some(request) = admin.reveal(id).await?.and_then(|content| content.request) {
    ///     println!("{:?}", request.headers().get("authorization").map(|it| it.as_bytes()));
    /// }
    /// # Ok(()) }
    /// ```
    pub async fn reveal(&self, id: RequestId) -> Result<Option<RequestContent>, Error> {
        let author = self.signed()?;
        self.with_store(|store| async move { store.reveal(id, &author).await })
            .await
    }

    /// Replays a dead letter, as [`Durable::replay`](crate::Durable::replay). Returns the id of the
    /// new request.
    ///
    /// # Errors
    ///
    /// Those of [`Durable::replay`](crate::Durable::replay), or if the author can't be recorded
    /// ([`Error::is_request`]).
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
    /// #     id: requeuest::RequestId,
    /// # ) -> Result<(), requeuest::Error> {
    /// let new = admin.because("the receiver is mended").replay(id).await?;
    /// println!("sent again as {new}");
    /// # Ok(()) }
    /// ```
    pub async fn replay(&self, id: RequestId) -> Result<RequestId, Error> {
        let author = self.signed()?;
        self.with_store(|store| async move { changes::replay(&store, id, &author).await })
            .await
    }

    /// Records whether an ambiguous request was sent, as
    /// [`Durable::resolve`](crate::Durable::resolve).
    ///
    /// # Errors
    ///
    /// Those of [`Durable::resolve`](crate::Durable::resolve), or if the author can't be recorded
    /// ([`Error::is_request`]).
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
    /// #     id: requeuest::RequestId,
    /// # ) -> Result<(), requeuest::Error> {
    /// use requeuest::Resolution;
    ///
    /// admin.because("seen in their log").resolve(id, Resolution::Sent).await?;
    /// # Ok(()) }
    /// ```
    pub async fn resolve(&self, id: RequestId, resolution: Resolution) -> Result<(), Error> {
        let author = self.signed()?;
        self.with_store(
            |store| async move { changes::resolve(&store, id, resolution, &author).await },
        )
        .await
    }

    /// Deletes a dead letter. What waits behind it, if it halts its ordering key, is sent. `false`
    /// if there is no such dead letter.
    ///
    /// # Errors
    ///
    /// If the author can't be recorded ([`Error::is_request`]), or if the database fails.
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
    /// #     id: requeuest::RequestId,
    /// # ) -> Result<(), requeuest::Error> {
    /// admin.because("a test").purge(id).await?;
    /// # Ok(()) }
    /// ```
    pub async fn purge(&self, id: RequestId) -> Result<bool, Error> {
        let author = self.signed()?;
        self.with_store(|store| async move { store.purge_recorded(id, &author).await })
            .await
    }

    /// Lets the requests behind a dead letter be sent, as
    /// [`Durable::resume`](crate::Durable::resume). `false` if no dead letter halts the key.
    ///
    /// # Errors
    ///
    /// If the channel, the key or the author is refused ([`Error::is_request`]), or if the
    /// database fails.
    ///
    /// # Cancel safety
    ///
    /// Once begun it continues, awaited or not.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(admin: requeuest::admin::Admin) -> Result<(), requeuest::Error> {
    /// admin.because("can be skipped").release_key("emails", "customer 7").await?;
    /// # Ok(()) }
    /// ```
    pub async fn release_key(&self, channel: &str, key: &str) -> Result<bool, Error> {
        crate::Options::default()
            .channel(channel)
            .ordered(key)
            .validate()?;
        let author = self.signed()?;
        let (channel, key) = (channel.to_owned(), key.to_owned());
        let group = ordered_group(&key);
        self.with_store(|store| async move {
            store
                .release_key_recorded(&channel, &group, &key, &author)
                .await
        })
        .await
    }

    /// Keeps all processes from sending to a destination, until then or until further notice, as
    /// [`DestinationHandle::pause`](crate::DestinationHandle::pause).
    ///
    /// # Errors
    ///
    /// If the name or the author is refused ([`Error::is_request`]), or if the database
    /// fails.
    ///
    /// # Cancel safety
    ///
    /// Once begun it continues, awaited or not.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(admin: requeuest::admin::Admin) -> Result<(), requeuest::Error> {
    /// let admin = admin.because("their maintenance");
    /// admin.pause_destination("https://api.example.com", None).await?;
    /// # Ok(()) }
    /// ```
    pub async fn pause_destination(
        &self,
        name: &str,
        until: impl Into<Option<SystemTime>>,
    ) -> Result<(), Error> {
        let change = DestinationChange::pause(until.into());
        self.change_destination(name, change).await
    }

    /// Ends a pause, as [`DestinationHandle::resume`](crate::DestinationHandle::resume).
    ///
    /// # Errors
    ///
    /// As [`DestinationHandle::resume`](crate::DestinationHandle::resume), or if the author can't
    /// be recorded ([`Error::is_request`]).
    ///
    /// # Cancel safety
    ///
    /// Once begun it continues, awaited or not.
    pub async fn resume_destination(&self, name: &str) -> Result<(), Error> {
        self.change_destination(name, DestinationChange::Resume)
            .await
    }

    /// Disables a destination, as
    /// [`DestinationHandle::disable`](crate::DestinationHandle::disable), with the reason of
    /// [`because`](Self::because).
    ///
    /// # Errors
    ///
    /// If there is no reason, if the name or the author is refused ([`Error::is_request`]),
    /// or if the database fails.
    ///
    /// # Cancel safety
    ///
    /// Once begun it continues, awaited or not.
    pub async fn disable_destination(&self, name: &str) -> Result<(), Error> {
        let Some(reason) = self.signed()?.reason else {
            return Err(Error::request(
                "reason",
                "must be given; see Admin::because",
            ));
        };
        self.change_destination(name, DestinationChange::Disable(reason))
            .await
    }

    /// Lets requests be sent to a disabled destination again, as
    /// [`DestinationHandle::enable`](crate::DestinationHandle::enable).
    ///
    /// # Errors
    ///
    /// As [`DestinationHandle::enable`](crate::DestinationHandle::enable), or if the author can't
    /// be recorded ([`Error::is_request`]).
    ///
    /// # Cancel safety
    ///
    /// Once begun it continues, awaited or not.
    pub async fn enable_destination(&self, name: &str) -> Result<(), Error> {
        self.change_destination(name, DestinationChange::Enable)
            .await
    }

    /// Sets limits for all processes, or takes them back, as
    /// [`DestinationHandle::set_policy`](crate::DestinationHandle::set_policy).
    ///
    /// # Errors
    ///
    /// As [`DestinationHandle::set_policy`](crate::DestinationHandle::set_policy), or if the author
    /// can't be recorded ([`Error::is_request`]).
    ///
    /// # Cancel safety
    ///
    /// Once begun it continues, awaited or not.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(admin: requeuest::admin::Admin) -> Result<(), requeuest::Error> {
    /// use requeuest::DestinationPolicy;
    ///
    /// let admin = admin.because("they asked for less");
    /// let few = DestinationPolicy::default().max_concurrency(2);
    /// admin.set_destination_policy("https://api.example.com", few).await?;
    /// # Ok(()) }
    /// ```
    pub async fn set_destination_policy(
        &self,
        name: &str,
        policy: impl Into<Option<DestinationPolicy>>,
    ) -> Result<(), Error> {
        let change = self.policy_change(name, policy.into())?;
        self.change_destination(name, change).await
    }

    /// Forgets what processes have seen of a destination, as
    /// [`DestinationHandle::reset`](crate::DestinationHandle::reset).
    ///
    /// # Errors
    ///
    /// As [`DestinationHandle::reset`](crate::DestinationHandle::reset), or if the author can't be
    /// recorded ([`Error::is_request`]).
    ///
    /// # Cancel safety
    ///
    /// Once begun it continues, awaited or not.
    pub async fn reset_destination(&self, name: &str) -> Result<(), Error> {
        self.change_destination(name, DestinationChange::Reset)
            .await
    }

    /// The changes that operators have made, the newest first: a page of them. They are kept for
    /// [`CHANGES_RETENTION`](crate::admin::CHANGES_RETENTION).
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
    /// use requeuest::admin::ChangeFilter;
    ///
    /// for change in admin.changes(&ChangeFilter::new().target("emails")).await? {
    ///     println!("{change}");
    /// }
    /// # Ok(()) }
    /// ```
    pub async fn changes(&self, filter: &ChangeFilter) -> Result<Vec<Change>, Error> {
        let limit = filter.checked()?;
        let filter = filter.clone();
        self.with_store(|store| async move { store.changes(&filter, limit).await })
            .await
    }

    fn policy_change(
        &self,
        name: &str,
        policy: Option<DestinationPolicy>,
    ) -> Result<DestinationChange, Error> {
        if let Access::Handle(durable) = &self.access {
            return durable.destination(name)?.policy_change(policy);
        }
        if let Some(policy) = &policy {
            policy.validate(DEFAULT_ATTEMPT_TIMEOUT)?;
        }
        Ok(DestinationChange::SetPolicy {
            rules: Box::new(policy.clone().unwrap_or_default()),
            policy: policy.map(Box::new),
        })
    }

    /// The author of the changes through this value.
    pub(super) fn signed(&self) -> Result<Signed, Error> {
        self.author.checked(user_at_host)
    }
}

/// The user and the host of this process, as far as the environment says.
fn user_at_host() -> String {
    let user = ["USER", "LOGNAME", "USERNAME"]
        .iter()
        .find_map(|name| std::env::var(name).ok().filter(|user| !user.is_empty()));
    let user = user.unwrap_or_else(|| "unknown".to_owned());
    let host = host().unwrap_or_else(|| "unknown".to_owned());
    let line = |text: String, longest: usize| -> String {
        let shown = text.chars().filter(|it| !it.is_control());
        shown.take(longest / 4).collect()
    };
    let longest = MAX_ACTOR_LEN / 2 - 1;
    format!("{}@{}", line(user, longest), line(host, longest))
}
