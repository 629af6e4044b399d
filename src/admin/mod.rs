//! For operators: why a request has not been sent.
//!
//! [`Durable::admin`](crate::Durable::admin) returns an [`Admin`]. It reads what all processes
//! share, so it works from any of them.

mod activity;
mod hold;

use crate::durable::Durable;
use crate::error::Error;
use crate::id::RequestId;

pub use crate::activity::{Activity, ActivityPoint, ChannelActivity, ParseWindowError, Window};
pub use crate::inspection::{FailedAttempt, Hold, RequestInfo};

/// Looks into the queue. Cheap to clone. From [`Durable::admin`].
///
/// # Examples
///
/// ```no_run
/// # async fn example(
/// #     durable: requeuest::Durable,
/// #     id: requeuest::RequestId,
/// # ) -> Result<(), requeuest::Error> {
/// let admin = durable.admin();
/// if let Some(request) = admin.request(id).await? {
///     println!("{} after {} attempts", request.status, request.attempts);
///     if let Some(hold) = request.hold {
///         println!("not sent, because {hold}");
///     }
/// }
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
pub struct Admin {
    durable: Durable,
}

impl Durable {
    /// The view of an operator on this schema.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(durable: requeuest::Durable) -> Result<(), requeuest::Error> {
    /// let id = "01890a5d-ac96-774b-bcce-b302099a8057".parse().unwrap();
    /// println!("{:?}", durable.admin().request(id).await?);
    /// # Ok(()) }
    /// ```
    pub fn admin(&self) -> Admin {
        Admin {
            durable: self.clone(),
        }
    }
}

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
        let engine = self.durable.engine();
        let found = engine
            .with_store(|store| async move { store.inspect(id).await })
            .await?;
        let Some(found) = found else {
            return Ok(None);
        };
        let mut info = found.info;
        if let Some(place) = found.place {
            let destination = match &info.destination {
                Some(name) => Some(self.durable.destination(name)?.status().await?),
                None => None,
            };
            info.hold = hold::of(&info, &place, destination);
        }
        Ok(Some(info))
    }
}
