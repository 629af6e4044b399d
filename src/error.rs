//! Why a call failed, and what is known of its request anyway.
//!
//! All entry points return one opaque type. Callers examine it with `is_*` predicates and
//! accessors, so that new causes can be added later without breaking callers. No error shows a URL
//! query, a password or a header value marked sensitive.

mod database;

use std::borrow::Cow;
use std::error::Error as StdError;
use std::fmt;
use std::sync::Arc;

use http::{HeaderMap, StatusCode};

use crate::classify::FailureClass;
use crate::id::RequestId;
use crate::operation::OperationId;
use crate::outcome::{Cause, Fault};
use crate::redact::error_text;
use crate::status::Status;

pub(crate) use self::database::{database_text, has_sqlstate, is_lock_timeout, shared};

/// The error that [`Client`](crate::client::Client)'s `spawn` functions return.
pub type SpawnError = Error;

/// A text is not the name of a value: the error of `FromStr` for [`RequestId`], [`Status`] and
/// [`FailureClass`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParseNameError {
    what: &'static str,
}

impl ParseNameError {
    pub(crate) fn new(what: &'static str) -> Self {
        Self { what }
    }
}

impl fmt::Display for ParseNameError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "not {}", self.what)
    }
}

impl StdError for ParseNameError {}

pub(crate) type BoxError = Box<dyn StdError + Send + Sync>;

/// Why a durable call failed.
///
/// # Examples
///
/// ```
/// use requeuest::{Durable, Request};
///
/// # async fn example(durable: Durable, request: Request) {
/// match durable.await_response(request).await {
///     Ok(response) => println!("{}", response.status()),
///     Err(error) if error.is_discarded() => println!("given up: {error}"),
///     Err(error) if error.is_indeterminate() => {
///         println!("check the status of {:?} later", error.request_id());
///     }
///     Err(error) => println!("{error}"),
/// }
/// # }
/// ```
pub struct Error(Box<Inner>);

struct Inner {
    kind: Kind,
    id: Option<RequestId>,
    /// What the database said, if the kind says what it means.
    refusal: Option<Arc<sqlx::Error>>,
    done: Done,
}

/// What a call over many dead letters had done before it failed.
enum Done {
    Nothing,
    Replayed(Vec<RequestId>),
    Purged(u64),
}

pub(crate) enum Kind {
    /// The guard denies where the caller's request goes.
    #[cfg(feature = "ssrf-guard")]
    Denied(Box<str>),
    /// A part of the caller's request, options or filter is refused.
    Request {
        field: &'static str,
        reason: Cow<'static, str>,
    },
    /// `DurableBuilder::build` refuses a field.
    Config {
        field: &'static str,
        reason: Cow<'static, str>,
    },
    BodyTooLarge {
        limit: usize,
    },
    /// Reading the caller's body failed.
    Body(BoxError),
    ResponseTooLarge {
        status: StatusCode,
        headers: Box<HeaderMap>,
    },
    Database(Arc<sqlx::Error>),
    Migrations(MigrationState),
    /// The schema belongs to a role that isn't the one that migrates it.
    ForeignSchema {
        schema: Box<str>,
        owner: Box<str>,
        role: Box<str>,
    },
    /// The role may enqueue, and the call needs more.
    OnlyEnqueues(&'static str),
    /// It is unknown whether the commit of the insert took effect.
    Indeterminate(Option<Arc<sqlx::Error>>),
    Discarded {
        attempts: u32,
        fault: Box<Fault>,
    },
    Cancelled {
        superseded: bool,
    },
    Ambiguous(Box<Fault>),
    /// The caller's key belongs to a different request.
    KeyConflict {
        key: Arc<str>,
        channel: Arc<str>,
    },
    /// Another transaction has had the key for as long as a request waits for it.
    KeyBusy {
        field: &'static str,
        /// `None` if it is one of the keys of many requests.
        key: Option<Box<str>>,
        channel: Arc<str>,
    },
    /// Unfinished requests of another channel have the ordering key.
    OrderConflict {
        key: Box<str>,
        /// `None` if those requests finished meanwhile.
        holder: Option<Box<str>>,
    },
    /// The request's status does not permit the operation.
    WrongState {
        operation: Operation,
        status: Status,
        replayed_as: Option<RequestId>,
    },
    /// An operator or hook resolved the request as sent, so its response was never recorded.
    ResponseUnknown,
    UnknownId,
    /// Nothing is known of a destination of this name.
    UnknownDestination(Box<str>),
    /// There is no operation on many requests of this id.
    UnknownOperation(OperationId),
    /// The pool was closed or the handle shut down.
    Closed,
    /// Too much waits in this process to be persisted: so many requests and bytes.
    Overloaded {
        requests: usize,
        bytes: usize,
    },
    /// What is stored of the request, or of its outcome, can't be read by this version.
    Unreadable(Cow<'static, str>),
    /// What is stored of the request can't be used.
    Corrupt(Cow<'static, str>),
    /// A request that passed through without being persisted failed in the wrapped service.
    PassThrough(BoxError),
}

/// What a caller wants to do with a dead letter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Operation {
    Replay,
    Resolve,
}

/// How the installed schema differs from the one that this version of the crate needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MigrationState {
    Missing,
    /// The schema exists, and the session's role may not use it.
    Forbidden,
    /// The session's `search_path` is not the one that this crate set.
    SettingsDropped,
    Older {
        found: i64,
        wanted: i64,
    },
    /// A newer release has made changes that this one can't work with.
    Newer {
        found: i64,
        /// The oldest release that can work with the schema.
        needed: i64,
        wanted: i64,
    },
    /// A tool has marked a migration as failed.
    Failed {
        version: i64,
    },
}

impl Error {
    pub(crate) fn new(kind: Kind) -> Self {
        Self(Box::new(Inner {
            kind,
            id: None,
            refusal: None,
            done: Done::Nothing,
        }))
    }

    pub(crate) fn request(field: &'static str, reason: impl Into<Cow<'static, str>>) -> Self {
        Self::new(Kind::Request {
            field,
            reason: reason.into(),
        })
    }

    pub(crate) fn config(field: &'static str, reason: impl Into<Cow<'static, str>>) -> Self {
        Self::new(Kind::Config {
            field,
            reason: reason.into(),
        })
    }

    #[cfg(feature = "ssrf-guard")]
    pub(crate) fn denied(denied: &crate::guard::Denied) -> Self {
        Self::new(Kind::Denied(denied.to_string().into()))
    }

    pub(crate) fn body_too_large(limit: usize) -> Self {
        Self::new(Kind::BodyTooLarge { limit })
    }

    pub(crate) fn with_id(mut self, id: RequestId) -> Self {
        self.0.id = Some(id);
        self
    }

    pub(crate) fn with_replayed(mut self, ids: Vec<RequestId>) -> Self {
        if !ids.is_empty() {
            self.0.done = Done::Replayed(ids);
        }
        self
    }

    pub(crate) fn with_purged(mut self, letters: u64) -> Self {
        if letters > 0 {
            self.0.done = Done::Purged(letters);
        }
        self
    }

    /// The wrapped service's error. The URL of a reqwest error is removed.
    pub(crate) fn pass_through(error: BoxError) -> Self {
        Self::new(Kind::PassThrough(without_url(error)))
    }

    /// A copy of this error for another caller whose row was in the same batch.
    pub(crate) fn share(&self) -> Self {
        let kind = match &self.0.kind {
            Kind::Database(error) => Kind::Database(Arc::clone(error)),
            Kind::Indeterminate(error) => Kind::Indeterminate(error.clone()),
            Kind::Migrations(state) => Kind::Migrations(*state),
            Kind::OnlyEnqueues(what) => Kind::OnlyEnqueues(what),
            Kind::Closed => Kind::Closed,
            Kind::Corrupt(reason) => Kind::Corrupt(reason.clone()),
            Kind::Unreadable(reason) => Kind::Unreadable(reason.clone()),
            other => Kind::Corrupt(Cow::Owned(other.to_string())),
        };
        Self(Box::new(Inner {
            kind,
            id: self.0.id,
            refusal: self.0.refusal.clone(),
            done: Done::Nothing,
        }))
    }

    /// Whether a statement met a lock of another transaction for too long (`lock_not_available`).
    pub(crate) fn is_lock_timeout(&self) -> bool {
        match &self.0.kind {
            Kind::Database(error) => is_lock_timeout(error),
            _ => false,
        }
    }

    /// The id of the request that the error is about, if a request was or may have been persisted.
    pub fn request_id(&self) -> Option<RequestId> {
        self.0.id
    }

    /// The ids of the new requests that [`Durable::replay_all`](crate::Durable::replay_all) had
    /// made before it failed. Empty for the errors of other calls.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(durable: requeuest::Durable) {
    /// let all = requeuest::DeadLetterFilter::default();
    /// match durable.replay_all(&all).await {
    ///     Ok(ids) => println!("{} requests are sent again", ids.len()),
    ///     Err(error) => println!("{} are, then: {error}", error.replayed().len()),
    /// }
    /// # }
    /// ```
    pub fn replayed(&self) -> &[RequestId] {
        match &self.0.done {
            Done::Replayed(ids) => ids,
            _ => &[],
        }
    }

    /// How many dead letters
    /// [`Durable::purge_dead_letters`](crate::Durable::purge_dead_letters) had deleted before it
    /// failed. The batch that failed may be deleted too, and isn't counted. 0 for the errors of
    /// other calls.
    pub fn purged(&self) -> u64 {
        match self.0.done {
            Done::Purged(letters) => letters,
            _ => 0,
        }
    }

    /// The name of the refused part of a request or configuration: `"url"`, `"body"`, `"channel"`,
    /// `"concurrency"`, …
    pub fn field(&self) -> Option<&'static str> {
        match self.0.kind {
            Kind::Request { field, .. }
            | Kind::Config { field, .. }
            | Kind::KeyBusy { field, .. } => Some(field),
            Kind::BodyTooLarge { .. } | Kind::Body(_) => Some("body"),
            Kind::KeyConflict { .. } => Some("key"),
            #[cfg(feature = "ssrf-guard")]
            Kind::Denied(_) => Some("url"),
            Kind::OrderConflict { .. } => Some("ordered"),
            _ => None,
        }
    }

    /// The status and headers of a response whose body was too large to store.
    pub fn response_head(&self) -> Option<(StatusCode, &HeaderMap)> {
        match &self.0.kind {
            Kind::ResponseTooLarge {
                status, headers, ..
            } => Some((*status, headers)),
            _ => None,
        }
    }

    /// Whether the request itself was refused. Nothing was persisted. Don't retry: the same request
    /// is refused again.
    pub fn is_request(&self) -> bool {
        #[cfg(feature = "ssrf-guard")]
        if matches!(self.0.kind, Kind::Denied(_)) {
            return true;
        }
        matches!(
            self.0.kind,
            Kind::Request { .. }
                | Kind::BodyTooLarge { .. }
                | Kind::Body(_)
                | Kind::KeyConflict { .. }
        )
    }

    /// Whether the guard of the feature `ssrf-guard` denies where the request goes. If
    /// [`is_request`](Self::is_request) holds too, it was refused when it was enqueued, and nothing
    /// was persisted. Otherwise its attempt was denied: its name resolves to a denied address, or a
    /// redirect leads to one.
    pub fn is_denied(&self) -> bool {
        #[cfg(feature = "ssrf-guard")]
        if matches!(self.0.kind, Kind::Denied(_)) {
            return true;
        }
        self.failure_class() == Some(FailureClass::Denied)
    }

    /// Whether the request body exceeds `max_request_body`. Nothing was persisted.
    pub fn is_body_too_large(&self) -> bool {
        matches!(self.0.kind, Kind::BodyTooLarge { .. })
    }

    /// Whether the builder's configuration was refused.
    pub fn is_config(&self) -> bool {
        matches!(self.0.kind, Kind::Config { .. })
    }

    /// Whether the request was delivered, but its response body exceeds `max_response_body`.
    /// [`response_head`](Self::response_head) returns the rest of the response.
    pub fn is_response_too_large(&self) -> bool {
        matches!(self.0.kind, Kind::ResponseTooLarge { .. })
    }

    /// Whether the database failed or refused a statement. The source is the [`sqlx::Error`], which
    /// several callers share if their requests were written together. It has the SQLSTATE, the
    /// constraint and the table. Its texts don't show the DETAIL, which may hold whole rows;
    /// `downcast_ref::<PgDatabaseError>()` leads to it.
    pub fn is_database(&self) -> bool {
        matches!(self.0.kind, Kind::Database(_))
    }

    /// Whether the database's role lacks a right that the call needs: see
    /// [`Migrator::grants`](crate::migrate::Migrator::grants). Nothing was changed. Then
    /// [`is_database`](Self::is_database) is true too, if Postgres refused a statement.
    pub fn is_forbidden(&self) -> bool {
        match &self.0.kind {
            Kind::Database(error) => is_insufficient_privilege(error),
            Kind::OnlyEnqueues(_) => true,
            _ => false,
        }
    }

    /// Whether the schema is missing, the role may not use it, or it is too old for this crate, or
    /// too new: see [`migrate`](crate::migrate()). Also if a pooler dropped the connection's
    /// `search_path`, and of `migrate` if the schema belongs to another role.
    pub fn is_not_migrated(&self) -> bool {
        matches!(
            self.0.kind,
            Kind::Migrations(_) | Kind::ForeignSchema { .. }
        )
    }

    /// Whether it is unknown if the request was persisted: the connection broke or the runtime
    /// ended during the commit.
    ///
    /// [`request_id`](Self::request_id) is set, except after
    /// [`Durable::fire_many`](crate::Durable::fire_many). Once the database is back,
    /// [`Durable::status`](crate::Durable::status) says whether the request exists.
    pub fn is_indeterminate(&self) -> bool {
        matches!(self.0.kind, Kind::Indeterminate(_))
    }

    /// Whether the request was given up and there is no response to return.
    pub fn is_discarded(&self) -> bool {
        matches!(self.0.kind, Kind::Discarded { .. })
    }

    /// Whether the request was cancelled.
    pub fn is_cancelled(&self) -> bool {
        matches!(self.0.kind, Kind::Cancelled { .. })
    }

    /// Whether the request was cancelled because a newer one replaced it: see
    /// [`Options::supersede`](crate::Options::supersede).
    pub fn is_superseded(&self) -> bool {
        matches!(self.0.kind, Kind::Cancelled { superseded: true })
    }

    /// Whether the request's key already belongs to a different request: see
    /// [`Options::key`](crate::Options::key). [`request_id`](Self::request_id) is the id of that
    /// earlier request. Nothing was persisted.
    pub fn is_key_conflict(&self) -> bool {
        matches!(self.0.kind, Kind::KeyConflict { .. })
    }

    /// Whether another transaction has held one of the request's keys for too long: its
    /// [`key`](crate::Options::key), [`ordered`](crate::Options::ordered) or
    /// [`supersede`](crate::Options::supersede), which [`field`](Self::field) names. Nothing was
    /// persisted. If the transaction is the caller's own, enqueue with
    /// [`Durable::fire_in`](crate::Durable::fire_in) in it, or after it. Otherwise retry once it
    /// has ended.
    ///
    /// The limit is [`max_key_wait`](crate::DurableBuilder::max_key_wait).
    pub fn is_key_busy(&self) -> bool {
        matches!(self.0.kind, Kind::KeyBusy { .. })
    }

    /// Whether unfinished requests of another channel have the ordering key, so that the order
    /// can't be kept: see [`Options::ordered`](crate::Options::ordered). Nothing was persisted or
    /// changed. Retry once those requests have finished.
    pub fn is_order_conflict(&self) -> bool {
        matches!(self.0.kind, Kind::OrderConflict { .. })
    }

    /// Whether the request may have been sent and must not be sent again. Find out whether it
    /// arrived, then call [`Durable::resolve`](crate::Durable::resolve).
    pub fn is_ambiguous(&self) -> bool {
        matches!(self.0.kind, Kind::Ambiguous(_))
    }

    /// Whether the request's status does not permit the operation. For example, a request that has
    /// not finished can't be replayed. Nothing was changed.
    pub fn is_wrong_state(&self) -> bool {
        matches!(self.0.kind, Kind::WrongState { .. })
    }

    /// Whether the request was delivered, but its response is unknown: the request was
    /// [resolved](crate::Durable::resolve) as sent.
    pub fn is_response_unknown(&self) -> bool {
        matches!(self.0.kind, Kind::ResponseUnknown)
    }

    /// Whether there is no request with this id: it never existed, or its outcome expired after the
    /// [`retention`](crate::DurableBuilder::retention).
    pub fn is_unknown_id(&self) -> bool {
        matches!(self.0.kind, Kind::UnknownId | Kind::UnknownOperation(_))
    }

    /// Whether an operation on a [destination](crate::Durable::destination) found nothing to work
    /// on: it isn't paused, disabled, limited or failing, or its name is wrong.
    pub fn is_unknown_destination(&self) -> bool {
        matches!(self.0.kind, Kind::UnknownDestination(_))
    }

    /// Whether this process can't read what is stored of the request or of its outcome: a newer
    /// version wrote it, it is encrypted with a key that the process doesn't have, or it is
    /// damaged. Nothing was changed. A process of the version that wrote it, with its keys, can
    /// read it.
    pub fn is_unreadable(&self) -> bool {
        matches!(self.0.kind, Kind::Unreadable(_))
    }

    /// Whether the handle was shut down or its pool was closed.
    pub fn is_closed(&self) -> bool {
        matches!(self.0.kind, Kind::Closed)
    }

    /// Whether too many requests of this handle wait to be persisted, because they come faster than
    /// the database takes them. Nothing was persisted. Retry later, or pass the refusal on.
    ///
    /// The limits are [`max_queued_requests`](crate::DurableBuilder::max_queued_requests) and
    /// [`max_queued_bytes`](crate::DurableBuilder::max_queued_bytes).
    pub fn is_overloaded(&self) -> bool {
        matches!(self.0.kind, Kind::Overloaded { .. })
    }

    /// How many attempts were made of a request that was given up.
    pub fn attempts(&self) -> Option<u32> {
        match self.0.kind {
            Kind::Discarded { attempts, .. } => Some(attempts),
            _ => None,
        }
    }

    /// Why the last attempt failed, if the request was given up
    /// ([`is_discarded`](Self::is_discarded)) or may have been sent
    /// ([`is_ambiguous`](Self::is_ambiguous)) without any response.
    ///
    /// [`source`](StdError::source) is the client's own error, if this process made the attempt.
    /// Only the text of an error is stored, so in other processes, and after a restart, there is
    /// the class and no source.
    ///
    /// # Examples
    ///
    /// ```
    /// use requeuest::{Error, FailureClass};
    ///
    /// fn is_timeout(error: &Error) -> bool {
    ///     error.failure_class() == Some(FailureClass::Timeout)
    /// }
    /// ```
    pub fn failure_class(&self) -> Option<FailureClass> {
        self.fault()?.class.parse().ok()
    }

    fn fault(&self) -> Option<&Fault> {
        match &self.0.kind {
            Kind::Discarded { fault, .. } | Kind::Ambiguous(fault) => Some(fault),
            _ => None,
        }
    }

    /// Whether the caller made the last attempt through its own stack, and has its error.
    #[cfg(feature = "reqwest-middleware")]
    pub(crate) fn is_with_caller(&self) -> bool {
        let cause = self.fault().and_then(|fault| fault.cause.as_ref());
        matches!(cause, Some(Cause::WithCaller))
    }

    /// Finds this crate's error inside one that reqwest-middleware returned. `None` if the caller's
    /// own stack made the last attempt and its own error came back.
    ///
    /// # Examples
    ///
    /// ```
    /// # fn example(error: reqwest_middleware::Error) {
    /// if let Some(error) = requeuest::Error::from_middleware(&error) {
    ///     println!("request {:?}: {error}", error.request_id());
    /// }
    /// # }
    /// ```
    #[cfg(feature = "reqwest-middleware")]
    pub fn from_middleware(error: &reqwest_middleware::Error) -> Option<&Self> {
        match error {
            reqwest_middleware::Error::Middleware(error) => error.downcast_ref(),
            reqwest_middleware::Error::Reqwest(_) => None,
        }
    }
}

/// An error and its causes on one line.
pub(crate) fn chain(error: &(dyn StdError + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        // Many errors repeat their cause in their own text.
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}

/// Removes the URL from a reqwest error, which would show it with its query.
pub(crate) fn without_url(error: BoxError) -> BoxError {
    match error.downcast::<reqwest::Error>() {
        Ok(error) => Box::new(error.without_url()),
        Err(error) => error,
    }
}

/// Whether the session's role may not do what the statement does (`insufficient_privilege`).
fn is_insufficient_privilege(error: &sqlx::Error) -> bool {
    has_sqlstate(error, &["42501"])
}

/// Where a request was going, and why there is no response.
fn fault_of(fault: &Fault, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    if let Some(destination) = &fault.destination {
        write!(f, " to {destination}")?;
    }
    match &*fault.text {
        "" => f.write_str(": no reason recorded"),
        text => write!(f, ": {text}"),
    }
}

/// Says why a request's status does not permit an operation, and what can be done instead.
fn wrong_state(
    f: &mut fmt::Formatter<'_>,
    operation: Operation,
    status: Status,
    replayed_as: Option<RequestId>,
) -> fmt::Result {
    if let Some(id) = replayed_as {
        return write!(
            f,
            "the request is {status} and was already replayed as request {id}; use that id"
        );
    }
    let rule = match operation {
        Operation::Replay => "only discarded or ambiguous requests can be replayed",
        Operation::Resolve => "only ambiguous requests can be resolved",
    };
    let advice = match (status, operation) {
        (Status::Completed, _) => "it was delivered; to send it again, enqueue a new request",
        (Status::Cancelled, _) => "to send it, enqueue a new request",
        (Status::Discarded, Operation::Resolve) => "to send it again, replay it",
        // The status changed after the operation was refused.
        (Status::Discarded | Status::Ambiguous, _) => "its status has just changed; try again",
        (_, _) => "it has not finished; wait for its outcome, or cancel it",
    };
    write!(f, "the request is {status}, and {rule}; {advice}")
}

fn key_busy(
    f: &mut fmt::Formatter<'_>,
    field: &str,
    key: Option<&str>,
    channel: &str,
) -> fmt::Result {
    write!(f, "{field}: another transaction holds ")?;
    match key {
        Some(key) => write!(f, "{key:?} of channel {channel:?}")?,
        None => f.write_str("a key of one of the requests")?,
    }
    f.write_str(
        ", and nothing was persisted; if it is the caller's own, use fire_in in it, or else retry \
         once it has ended; see max_key_wait",
    )
}

fn refused_by_database(f: &mut fmt::Formatter<'_>, error: &sqlx::Error) -> fmt::Result {
    write!(f, "database error: {}", database_text(error))?;
    if is_insufficient_privilege(error) {
        f.write_str("; the role lacks a right for this call: see Migrator::grants")?;
    }
    Ok(())
}

fn foreign_schema(
    f: &mut fmt::Formatter<'_>,
    schema: &str,
    owner: &str,
    role: &str,
) -> fmt::Result {
    write!(
        f,
        "the schema {schema:?} belongs to the role {owner:?}, who can change and read all that is \
         put there, and not to {role:?}; run migrate as {owner:?}, or choose another schema"
    )
}

fn only_enqueues(f: &mut fmt::Formatter<'_>, what: &str) -> fmt::Result {
    write!(
        f,
        "the database's role may not {what}; use a role with the rights of a runner: see \
         Migrator::grants"
    )
}

const RESPONSE_UNKNOWN: &str =
    "the request was resolved as sent, so it was delivered but its response is unknown";

fn unknown_operation(f: &mut fmt::Formatter<'_>, id: OperationId) -> fmt::Result {
    write!(
        f,
        "there is no operation {id}, or it ended more than 90 days ago"
    )
}

fn unreadable(f: &mut fmt::Formatter<'_>, reason: &str) -> fmt::Result {
    write!(
        f,
        "this process can't read what is stored: {reason}; ask a process of the version that wrote \
         it and with its keys, or repair the row"
    )
}

impl fmt::Display for MigrationState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing => f.write_str(
                "requeuest's schema is not in this database; call requeuest::migrate(&pool) first",
            ),
            Self::Forbidden => f.write_str(
                "the role may not use requeuest's schema; grant it USAGE on the schema, and the \
                 rights on its tables that the guide names",
            ),
            Self::SettingsDropped => f.write_str(
                "the connection did not keep its search_path, probably because of a pooler; \
                 connect directly, with DurableBuilder::connect_options or \
                 Migrator::connect_options",
            ),
            Self::Older { found, wanted } => write!(
                f,
                "requeuest's schema is at version {found}, but this crate needs version {wanted}; \
                 call requeuest::migrate(&pool)"
            ),
            Self::Newer {
                found,
                needed,
                wanted,
            } => write!(
                f,
                "requeuest's schema is at version {found} and needs a crate that knows version \
                 {needed}, but this crate only knows version {wanted}; upgrade requeuest"
            ),
            Self::Failed { version } => write!(
                f,
                "version {version} of requeuest's schema is marked as failed; repair the schema \
                 and delete the version's row from _sqlx_migrations"
            ),
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            #[cfg(feature = "ssrf-guard")]
            Self::Denied(reason) => write!(f, "invalid request: url: {reason}; see Guard::allow"),
            Self::Request { field, reason } => write!(f, "invalid request: {field}: {reason}"),
            Self::Config { field, reason } => write!(f, "invalid configuration: {field}: {reason}"),
            Self::BodyTooLarge { limit } => write!(
                f,
                "invalid request: body: longer than {limit} bytes; shorten it or raise \
                 max_request_body"
            ),
            Self::Body(_) => f.write_str("error reading the request body"),
            Self::ResponseTooLarge { status, .. } => write!(
                f,
                "the request was delivered and answered with {status}, but the response body \
                 exceeds the limit; see max_response_body"
            ),
            Self::Database(error) => refused_by_database(f, error),
            Self::Migrations(state) => state.fmt(f),
            Self::ForeignSchema {
                schema,
                owner,
                role,
            } => foreign_schema(f, schema, owner, role),
            Self::OnlyEnqueues(what) => only_enqueues(f, what),
            Self::Indeterminate(_) => f.write_str(
                "the connection broke or the runtime ended during the commit, and the request may \
                 or may not be persisted; check its status before submitting it again",
            ),
            Self::Discarded { attempts, fault } => {
                let s = if *attempts == 1 { "" } else { "s" };
                write!(f, "given up after {attempts} attempt{s}")?;
                fault_of(fault, f)
            }
            Self::Cancelled { superseded: false } => f.write_str("the request was cancelled"),
            Self::Cancelled { superseded: true } => {
                f.write_str("the request was cancelled: a newer request superseded it")
            }
            Self::KeyConflict { key, channel } => write!(
                f,
                "invalid request: key: {key:?} of channel {channel:?} already belongs to this \
                 request, which has a different method, URL, body or owner; use another key, or \
                 name the owner with Options::key_owner if only credentials changed"
            ),
            Self::KeyBusy {
                field,
                key,
                channel,
            } => key_busy(f, field, key.as_deref(), channel),
            Self::OrderConflict {
                key,
                holder: Some(holder),
            } => write!(
                f,
                "ordered: unfinished requests of channel {holder:?} have the ordering key {key:?}; \
                 retry once they have finished, or use a different key in each channel"
            ),
            Self::OrderConflict { key, holder: None } => write!(
                f,
                "ordered: requests of another channel had the ordering key {key:?} and have just \
                 finished; retry"
            ),
            Self::Ambiguous(fault) => {
                f.write_str("the request may have been sent")?;
                fault_of(fault, f)?;
                f.write_str(
                    "; it must not be sent twice: find out whether it arrived, then call \
                     Durable::resolve",
                )
            }
            Self::WrongState {
                operation,
                status,
                replayed_as,
            } => wrong_state(f, *operation, *status, *replayed_as),
            Self::ResponseUnknown => f.write_str(RESPONSE_UNKNOWN),
            Self::UnknownDestination(name) => write!(
                f,
                "nothing is known of the destination {name:?}: it is not paused, disabled, limited \
                 or failing; check the name, which has the scheme and host of its URLs, such as \
                 https://api.example.com, or is a limit key"
            ),
            Self::UnknownOperation(id) => unknown_operation(f, *id),
            Self::UnknownId => f.write_str(
                "there is no such request, or its outcome has expired; see \
                 DurableBuilder::retention",
            ),
            Self::Closed => f.write_str(
                "the handle was shut down or its pool was closed; build a new handle on an open \
                 pool",
            ),
            Self::Overloaded { requests, bytes } => write!(
                f,
                "{requests} requests with {bytes} bytes wait to be persisted, and this one was \
                 not; retry later, or see max_queued_requests and max_queued_bytes"
            ),
            Self::Unreadable(reason) => unreadable(f, reason),
            Self::Corrupt(reason) => write!(f, "a stored request can't be used: {reason}"),
            Self::PassThrough(_) => f.write_str("pass-through request failed"),
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.id {
            Some(id) => write!(f, "request {id}: {}", self.0.kind),
            None => self.0.kind.fmt(f),
        }?;
        match &self.0.done {
            Done::Nothing => Ok(()),
            Done::Replayed(ids) => write!(f, "; {} were replayed before that", ids.len()),
            Done::Purged(letters) => write!(f, "; {letters} were deleted before that"),
        }
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut debug = f.debug_tuple("requeuest::Error");
        debug.field(&format_args!("{self}"));
        match (&self.0.kind, self.source()) {
            // An error from outside this crate may show secrets of a URL.
            (
                Kind::Body(_) | Kind::PassThrough(_) | Kind::Discarded { .. } | Kind::Ambiguous(_),
                Some(source),
            ) => {
                debug.field(&error_text(&chain(source)));
            }
            (_, Some(source)) => {
                debug.field(&source);
            }
            (_, None) => {}
        }
        debug.finish()
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        match &self.0.kind {
            Kind::Database(error) | Kind::Indeterminate(Some(error)) => Some(&**error),
            Kind::Body(error) | Kind::PassThrough(error) => Some(error.as_ref()),
            Kind::Discarded { fault, .. } | Kind::Ambiguous(fault) => match &fault.cause {
                Some(Cause::Error(error)) => Some(error.as_ref()),
                Some(Cause::WithCaller) | None => None,
            },
            _ => {
                let refusal = self.0.refusal.as_deref()?;
                Some(refusal)
            }
        }
    }
}

impl From<sqlx::Error> for Error {
    fn from(error: sqlx::Error) -> Self {
        // undefined_table, invalid_schema_name, undefined_function, undefined_object
        let missing = has_sqlstate(&error, &["42P01", "3F000", "42883", "42704"]);
        match error {
            sqlx::Error::PoolClosed => Self::new(Kind::Closed),
            error if missing => {
                let mut meaning = Self::new(Kind::Migrations(MigrationState::Missing));
                meaning.0.refusal = Some(shared(error));
                meaning
            }
            error => Self::new(Kind::Database(shared(error))),
        }
    }
}

impl From<std::convert::Infallible> for Error {
    fn from(never: std::convert::Infallible) -> Self {
        match never {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn assert_error<T: StdError + Send + Sync + 'static>() {}

    #[test]
    fn the_error_is_thread_safe_and_small() {
        assert_error::<Error>();
        assert_eq!(size_of::<Error>(), size_of::<usize>());
    }

    #[test]
    fn secrets_of_urls_in_foreign_errors_are_hidden() {
        let error = Error::pass_through("no answer from http://a:b@c/d?token=e".into());
        assert_eq!(
            format!("{error:?}"),
            r#"requeuest::Error(pass-through request failed, "no answer from http://c")"#
        );
    }

    /// An error as Postgres sends it.
    #[derive(Debug)]
    struct Refusal;

    impl fmt::Display for Refusal {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str(sqlx::error::DatabaseError::message(self))
        }
    }

    impl StdError for Refusal {}

    impl sqlx::error::DatabaseError for Refusal {
        fn message(&self) -> &'static str {
            "no room\nDETAIL: a secret row"
        }

        fn code(&self) -> Option<Cow<'_, str>> {
            Some("53100".into())
        }

        fn as_error(&self) -> &(dyn StdError + Send + Sync + 'static) {
            self
        }

        fn as_error_mut(&mut self) -> &mut (dyn StdError + Send + Sync + 'static) {
            self
        }

        fn into_error(self: Box<Self>) -> Box<dyn StdError + Send + Sync + 'static> {
            self
        }

        fn kind(&self) -> sqlx::error::ErrorKind {
            sqlx::error::ErrorKind::Other
        }
    }

    /// What each kind must say. The match makes a new kind a compile error here.
    fn wanted(kind: &Kind) -> &'static [&'static str] {
        match kind {
            #[cfg(feature = "ssrf-guard")]
            Kind::Denied(_) => &["url: the guard denies a: b; see Guard::allow"],
            Kind::Request { .. } => &["invalid request", "url", "is relative"],
            Kind::Config { .. } => &["invalid configuration", "lease", "too short"],
            Kind::BodyTooLarge { .. } => &["body", "17 bytes", "raise max_request_body"],
            Kind::Body(_) => &["body"],
            Kind::ResponseTooLarge { .. } => &["200 OK", "max_response_body"],
            Kind::Database(_) => &["database error", "no room", "53100"],
            Kind::Migrations(MigrationState::Missing) => &["call requeuest::migrate"],
            Kind::Migrations(MigrationState::Forbidden) => &["grant it USAGE on the schema"],
            Kind::Migrations(MigrationState::SettingsDropped) => &["connect_options"],
            Kind::Migrations(MigrationState::Older { .. }) => &["1", "2", "requeuest::migrate"],
            Kind::Migrations(MigrationState::Newer { .. }) => &["4", "3", "2", "upgrade requeuest"],
            Kind::Migrations(MigrationState::Failed { .. }) => &["2", "_sqlx_migrations"],
            Kind::ForeignSchema { .. } => &["\"calls\"", "\"mallory\"", "\"app\"", "migrate as"],
            Kind::OnlyEnqueues(_) => &["may not read responses", "rights of a runner"],
            Kind::Indeterminate(_) => &["may or may not be persisted", "check its status"],
            Kind::Discarded { .. } => &["given up", "refused by the receiver"],
            Kind::Cancelled { superseded: false } => &["cancelled"],
            Kind::Cancelled { superseded: true } => &["cancelled", "newer request superseded it"],
            Kind::Ambiguous(_) => &["may have been sent", "Durable::resolve"],
            Kind::KeyConflict { .. } => &["key", "\"k-1\"", "\"billing\"", "use another key"],
            Kind::KeyBusy { key: Some(_), .. } => &[
                "supersede: another transaction holds \"s-1\" of channel \"billing\"",
                "fire_in",
            ],
            Kind::KeyBusy { key: None, .. } => &["a key of one of the requests", "max_key_wait"],
            Kind::OrderConflict {
                holder: Some(_), ..
            } => &["ordered", "\"o-1\"", "\"billing\"", "retry once they"],
            Kind::OrderConflict { holder: None, .. } => &["ordered", "\"o-1\"", "retry"],
            Kind::WrongState {
                replayed_as: Some(_),
                ..
            } => &["already replayed as request 0", "use that id"],
            Kind::WrongState {
                operation: Operation::Replay,
                ..
            } => &["only discarded or ambiguous requests can be replayed; "],
            Kind::WrongState {
                operation: Operation::Resolve,
                ..
            } => &["only ambiguous requests can be resolved; "],
            Kind::ResponseUnknown => &["resolved as sent", "response is unknown"],
            Kind::UnknownId => &["no such request", "DurableBuilder::retention"],
            Kind::UnknownDestination(_) => &["destination", "check the name", "limit key"],
            Kind::UnknownOperation(_) => &["no operation", "90 days"],
            Kind::Closed => &["shut down", "pool was closed", "build a new handle"],
            Kind::Overloaded { .. } => &["5 requests", "70 bytes", "retry later"],
            Kind::Unreadable(_) => &["can't read", "format 2", "of the version that wrote it"],
            Kind::Corrupt(_) => &["a stored request can't be used", "its payload is gone"],
            Kind::PassThrough(_) => &["pass-through"],
        }
    }

    #[test]
    fn every_error_says_what_failed_and_what_to_do() {
        let id = RequestId::from(uuid::Uuid::nil());
        let state = |operation, status, replayed_as| Kind::WrongState {
            operation,
            status,
            replayed_as,
        };
        let conflict = |holder: Option<&str>| Kind::OrderConflict {
            key: "o-1".into(),
            holder: holder.map(Into::into),
        };
        let busy = |key: Option<&str>| Kind::KeyBusy {
            field: "supersede",
            key: key.map(Into::into),
            channel: "billing".into(),
        };
        let discarded = crate::outcome::Outcome::discarded(
            id,
            Fault::new("connect", "refused by the receiver".to_owned()),
        );
        let (found, wanted_version) = (1, 2);
        let mut errors = vec![
            Error::request("url", "is relative").0.kind,
            Error::config("lease", "too short").0.kind,
            Kind::BodyTooLarge { limit: 17 },
            Kind::Body("cut".into()),
            Kind::ResponseTooLarge {
                status: StatusCode::OK,
                headers: Box::default(),
            },
            Kind::Database(shared(sqlx::Error::Database(Box::new(Refusal)))),
            Kind::ForeignSchema {
                schema: "calls".into(),
                owner: "mallory".into(),
                role: "app".into(),
            },
            Kind::OnlyEnqueues("read responses"),
            Kind::Indeterminate(Some(shared(sqlx::Error::PoolTimedOut))),
            discarded.into_result().unwrap_err().0.kind,
            Kind::Cancelled { superseded: false },
            Kind::Cancelled { superseded: true },
            Kind::Ambiguous(Box::default()),
            Kind::KeyConflict {
                key: "k-1".into(),
                channel: "billing".into(),
            },
            busy(Some("s-1")),
            busy(None),
            conflict(Some("billing")),
            conflict(None),
            state(Operation::Replay, Status::Discarded, Some(id)),
            Kind::ResponseUnknown,
            Kind::UnknownId,
            Kind::UnknownDestination("https://a.example:443".into()),
            Kind::UnknownOperation(OperationId::from(uuid::Uuid::nil())),
            Kind::Closed,
            Kind::Overloaded {
                requests: 5,
                bytes: 70,
            },
            Kind::Unreadable("a newer version wrote it, in format 2".into()),
            Kind::Corrupt("its payload is gone".into()),
            Kind::PassThrough("cut".into()),
            #[cfg(feature = "ssrf-guard")]
            Kind::Denied("the guard denies a: b".into()),
        ];
        for state in [
            MigrationState::Missing,
            MigrationState::Forbidden,
            MigrationState::SettingsDropped,
            MigrationState::Older {
                found,
                wanted: wanted_version,
            },
            MigrationState::Newer {
                found: 4,
                needed: 3,
                wanted: wanted_version,
            },
            MigrationState::Failed {
                version: wanted_version,
            },
        ] {
            errors.push(Kind::Migrations(state));
        }
        for operation in [Operation::Replay, Operation::Resolve] {
            errors.push(state(operation, Status::Completed, None));
        }
        for kind in errors {
            let parts = wanted(&kind);
            let text = Error::new(kind).with_id(id).to_string();
            assert!(text.starts_with(&format!("request {id}: ")), "{text}");
            for part in parts {
                assert!(text.contains(part), "{part} is not in: {text}");
            }
        }
    }

    #[test]
    fn the_advice_fits_the_status_and_the_operation() {
        use Operation::{Replay, Resolve};
        for (operation, status, advice) in [
            (Replay, Status::Scheduled, "wait for its outcome, or cancel"),
            (
                Replay,
                Status::Running,
                "wait for its outcome, or cancel it",
            ),
            (Replay, Status::Completed, "it was delivered"),
            (Replay, Status::Cancelled, "enqueue a new request"),
            (Replay, Status::Discarded, "try again"),
            (Resolve, Status::Discarded, "to send it again, replay it"),
            (Resolve, Status::Retryable, "wait for its outcome"),
            (Resolve, Status::Ambiguous, "try again"),
        ] {
            let error = Error::new(Kind::WrongState {
                operation,
                status,
                replayed_as: None,
            });
            let text = error.to_string();
            assert!(text.contains(status.as_str()), "{text}");
            assert!(text.contains(advice), "{text}");
        }
    }

    #[test]
    fn only_the_first_line_of_a_database_error_is_shown() {
        let error = Error::from(sqlx::Error::Database(Box::new(Refusal)));
        let shared = error.share();
        for error in [error, shared] {
            assert_eq!(
                error.to_string(),
                "database error: no room (SQLSTATE 53100)"
            );
            let source = error.source().and_then(|source| source.downcast_ref());
            let Some(source @ sqlx::Error::Database(refusal)) = source else {
                panic!("{source:?}");
            };
            assert_eq!(refusal.code().as_deref(), Some("53100"));
            for shown in [
                format!("{error:?}"),
                source.to_string(),
                format!("{source:?}"),
            ] {
                assert!(
                    shown.contains("53100") && !shown.contains("secret"),
                    "{shown}"
                );
            }
        }
        let endless = Error::from(sqlx::Error::Protocol("x".repeat(10_000)));
        assert!(endless.to_string().len() < 400);
        let refused = std::io::Error::new(std::io::ErrorKind::ConnectionRefused, "refused (h:1)");
        let refused = Error::from(sqlx::Error::Io(refused));
        assert_eq!(refused.to_string(), "database error: refused (h:1)");
    }

    #[test]
    fn a_refused_field_is_named() {
        let error = Error::request("url", "is relative");
        assert_eq!(error.field(), Some("url"));
        assert!(error.is_request());
        assert_eq!(error.to_string(), "invalid request: url: is relative");
    }
}
