//! For operators: which requests there are, and why a request has not been sent.
//!
//! [`Durable::admin`](crate::Durable::admin) returns an [`Admin`], and [`Admin::connect`] makes one
//! for a program that neither enqueues nor delivers. It reads what all processes share, so it works
//! from any of them.
//!
//! Each read looks at a bounded number of rows, so it takes milliseconds however many requests
//! there are.

mod activity;
mod builder;
mod change;
mod doctor;
mod hold;
mod operation;
mod pause;
mod reads;

use std::fmt;
use std::future::Future;
use std::sync::Arc;

use crate::change::Author;
use crate::destination::{DestinationStatus, validate_name};
use crate::durable::Durable;
use crate::engine::destination_change::DestinationChange;
use crate::error::{Error, Kind};
use crate::id::RequestId;
use crate::runtime::Runtime;
use crate::store::Store;

pub use self::builder::{AdminBuilder, DEFAULT_ADMIN_CONNECTIONS};
pub use crate::activity::{Activity, ActivityPoint, ChannelActivity, ParseWindowError, Window};
pub use crate::change::{
    CHANGES_RETENTION, Change, ChangeFilter, DEFAULT_CHANGES, MAX_ACTOR_LEN, MAX_CHANGES,
    MAX_REASON_LEN,
};
pub use crate::finding::{Check, Finding, Severity};
pub use crate::inspection::{
    Count, Counts, Cursor, DEFAULT_PAGE_LIMIT, FailedAttempt, Hold, MAX_COUNT, MAX_PAGE_LIMIT,
    MAX_SEARCH_LEN, Owner, PageRequest, PausedChannel, RequestContent, RequestFilter, RequestInfo,
    RequestPage, RequestState, RequestSummary,
};
pub use crate::operation::{
    Action, MAX_PREVIEWED, MAX_RATE, MIN_RATE, NewOperation, Operation, OperationFilter,
    OperationId, OperationState, Preview,
};

/// Looks into the queue. Cheap to clone. From [`Durable::admin`] or [`Admin::connect`].
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
#[derive(Clone)]
pub struct Admin {
    access: Access,
    /// Who makes changes through this value, and why.
    author: Author,
}

/// How an [`Admin`] reaches the database.
#[derive(Clone)]
enum Access {
    /// Through a handle, whose process learns of changes at once.
    Handle(Durable),
    Own {
        store: Store,
        runtime: Arc<Runtime>,
    },
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
            access: Access::Handle(self.clone()),
            author: Author::default(),
        }
    }
}

impl Admin {
    /// An [`Admin`] for the database at a URL, with the defaults of [`AdminBuilder`]. It has a
    /// small pool of its own, and no runner or other background task. It connects and checks the
    /// schema.
    ///
    /// What only reads works with a role that has the rights of
    /// [`ReadOnly`](crate::migrate::DatabaseRole::ReadOnly), and on a replica.
    ///
    /// # Errors
    ///
    /// If the URL is not valid, with `url` as its [`Error::field`]; if the database can't be
    /// reached; if the schema is not installed or doesn't fit ([`Error::is_not_migrated`]).
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// use requeuest::admin::{Admin, RequestFilter};
    ///
    /// # async fn example() -> Result<(), requeuest::Error> {
    /// let admin = Admin::connect("postgres://localhost/app").await?;
    /// println!("{} requests", admin.count(&RequestFilter::new()).await?);
    /// # Ok(()) }
    /// ```
    pub async fn connect(url: impl Into<String>) -> Result<Self, Error> {
        Self::builder(url).connect().await
    }

    /// Begins to configure an [`Admin`] for the database at a URL.
    pub fn builder(url: impl Into<String>) -> AdminBuilder {
        AdminBuilder::new(url.into())
    }

    pub(crate) fn store(&self) -> &Store {
        match &self.access {
            Access::Handle(durable) => durable.engine().store(),
            Access::Own { store, .. } => store,
        }
    }

    /// Runs an operation of the store on a tokio runtime, from any executor.
    pub(crate) async fn with_store<T, F>(
        &self,
        operation: impl FnOnce(Store) -> F,
    ) -> Result<T, Error>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, Error>> + Send + 'static,
    {
        match &self.access {
            Access::Handle(durable) => durable.engine().with_store(operation).await,
            Access::Own { store, runtime } => runtime
                .run(operation(store.clone()))
                .await
                .unwrap_or_else(|| Err(Error::new(Kind::Closed))),
        }
    }

    /// What all processes together know of a destination, whatever its name is.
    async fn destination_status(&self, name: &str) -> Result<DestinationStatus, Error> {
        let named = name.to_owned();
        let row = self
            .with_store(|store| async move { store.destination(&named).await })
            .await?;
        let coded = match &self.access {
            Access::Handle(durable) => durable.engine().config().policies.of(name),
            Access::Own { .. } => None,
        };
        let policy = row.policy.as_ref().or(coded);
        Ok(row.state.status(name, policy, row.now))
    }

    /// Changes a destination, on the record.
    async fn change_destination(&self, name: &str, change: DestinationChange) -> Result<(), Error> {
        let author = self.signed()?;
        match &self.access {
            Access::Handle(durable) => durable.destination(name)?.make(change, Some(author)).await,
            Access::Own { .. } => {
                let name = validate_name(name)?;
                let make = |store| async move { change.make(&store, &name, Some(&author)).await };
                self.with_store(make).await.map(drop)
            }
        }
    }

    /// Notes that a request of this channel was cancelled.
    fn note_cancelled(&self, id: RequestId, channel: String) {
        if let Access::Handle(durable) = &self.access {
            let driver = durable.engine().driver();
            driver.note_cancelled(vec![(id, channel)]);
        }
    }

    /// Notes that an operation was started, which this process may drive.
    fn note_started(&self) {
        if let Access::Handle(durable) = &self.access {
            durable.engine().driver().operation_started.notify_one();
        }
    }

    /// Notes that a channel was paused or resumed.
    fn note_paused(&self, channel: &str, paused: bool) {
        if let Access::Handle(durable) = &self.access {
            durable.engine().driver().paused.set(channel, paused);
        }
    }
}

impl fmt::Debug for Admin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Admin")
            .field("schema", &self.store().config().schema)
            .finish_non_exhaustive()
    }
}
