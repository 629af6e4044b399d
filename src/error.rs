//! Why a call failed, and what is known of the request all the same.
//!
//! One opaque type for every door: what a caller can act on is asked with `is_*` predicates and accessors, so that
//! new causes can be told apart later without breaking anybody. Nothing here carries a URL query, a
//! password or a header value marked sensitive.

use std::borrow::Cow;
use std::error::Error as StdError;
use std::fmt;

use http::{HeaderMap, StatusCode};

use crate::id::RequestId;
use crate::redact::redact_urls;
use crate::status::Status;

/// The error that [`Client`](crate::client::Client)'s `spawn` functions return.
pub type SpawnError = Error;

/// A text that names no value of a type: the error of
/// [`Status`](crate::Status)'s and [`FailureClass`](crate::FailureClass)'s `FromStr`.
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
        write!(f, "not the name of {}", self.what)
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
///     Err(error) if error.is_indeterminate() => println!("ask later for {:?}", error.request_id()),
///     Err(error) => println!("not accepted: {error}"),
/// }
/// # }
/// ```
pub struct Error(Box<Inner>);

struct Inner {
    kind: Kind,
    id: Option<RequestId>,
}

pub(crate) enum Kind {
    /// The caller's input is refused; `field` names the part.
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
    /// The caller's body failed while it was read.
    Body(BoxError),
    ResponseTooLarge {
        status: StatusCode,
        headers: Box<HeaderMap>,
    },
    Database(sqlx::Error),
    Migrations(MigrationState),
    /// The outcome of the insert's commit is not known.
    Indeterminate(Option<sqlx::Error>),
    Discarded {
        attempts: u32,
        last: Cow<'static, str>,
    },
    Cancelled {
        superseded: bool,
    },
    Ambiguous,
    /// The caller's key belongs to another request.
    KeyConflict,
    /// Unfinished requests of another channel have the ordering key.
    OrderConflict,
    /// The request is not in a state in which this can be done to it.
    WrongState {
        status: Status,
        replayed_as: Option<RequestId>,
    },
    /// Delivered, as somebody found out who could not get at the response.
    ResponseUnknown,
    UnknownId,
    /// The pool was closed or the handle shut down.
    Closed,
    /// A stored row can't be read back.
    Corrupt(Cow<'static, str>),
    /// A request that passed through untouched failed in the wrapped service.
    PassThrough(BoxError),
}

/// How the installed schema differs from the one this version of the crate works with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MigrationState {
    Missing,
    /// The session's `search_path` is not the one that was asked for.
    Swallowed,
    Older {
        found: i64,
        wanted: i64,
    },
    Newer {
        found: i64,
        wanted: i64,
    },
}

impl Error {
    pub(crate) fn new(kind: Kind) -> Self {
        Self(Box::new(Inner { kind, id: None }))
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

    pub(crate) fn corrupt(reason: impl Into<Cow<'static, str>>) -> Self {
        Self::new(Kind::Corrupt(reason.into()))
    }

    pub(crate) fn body_too_large(limit: usize) -> Self {
        Self::new(Kind::BodyTooLarge { limit })
    }

    pub(crate) fn with_id(mut self, id: RequestId) -> Self {
        self.0.id = Some(id);
        self
    }

    /// The wrapped service's error, without the URL where it is known how to take it out.
    pub(crate) fn pass_through(error: BoxError) -> Self {
        Self::new(Kind::PassThrough(without_url(error)))
    }

    /// The same failure, for another caller whose row was in the same batch.
    pub(crate) fn share(&self) -> Self {
        let kind = match &self.0.kind {
            Kind::Database(error) => Kind::Database(share_sqlx(error)),
            Kind::Indeterminate(error) => Kind::Indeterminate(error.as_ref().map(share_sqlx)),
            Kind::Migrations(state) => Kind::Migrations(*state),
            Kind::Closed => Kind::Closed,
            other => Kind::Corrupt(Cow::Owned(other.to_string())),
        };
        Self(Box::new(Inner {
            kind,
            id: self.0.id,
        }))
    }

    /// The request that the error is about, where one was persisted or may have been.
    pub fn request_id(&self) -> Option<RequestId> {
        self.0.id
    }

    /// The name of the refused part of a request or configuration: `"url"`, `"body"`, `"channel"`, `"concurrency"`, …
    pub fn field(&self) -> Option<&'static str> {
        match self.0.kind {
            Kind::Request { field, .. } | Kind::Config { field, .. } => Some(field),
            Kind::BodyTooLarge { .. } | Kind::Body(_) => Some("body"),
            Kind::KeyConflict => Some("key"),
            Kind::OrderConflict => Some("ordered"),
            _ => None,
        }
    }

    /// Status and headers of a response whose body was too large to keep.
    pub fn response_head(&self) -> Option<(StatusCode, &HeaderMap)> {
        match &self.0.kind {
            Kind::ResponseTooLarge {
                status, headers, ..
            } => Some((*status, headers)),
            _ => None,
        }
    }

    /// Whether the request itself was refused. Nothing was persisted, and trying again is of no use.
    pub fn is_request(&self) -> bool {
        matches!(
            self.0.kind,
            Kind::Request { .. } | Kind::BodyTooLarge { .. } | Kind::Body(_) | Kind::KeyConflict
        )
    }

    /// Whether the request body is over `max_request_body`. Nothing was persisted.
    pub fn is_body_too_large(&self) -> bool {
        matches!(self.0.kind, Kind::BodyTooLarge { .. })
    }

    /// Whether the builder's configuration was refused.
    pub fn is_config(&self) -> bool {
        matches!(self.0.kind, Kind::Config { .. })
    }

    /// Whether the request was delivered, but its response body is over `max_response_body`.
    /// [`response_head`](Self::response_head) has the rest of it.
    pub fn is_response_too_large(&self) -> bool {
        matches!(self.0.kind, Kind::ResponseTooLarge { .. })
    }

    /// Whether the database failed or refused. The source is the [`sqlx::Error`].
    pub fn is_database(&self) -> bool {
        matches!(self.0.kind, Kind::Database(_))
    }

    /// Whether the schema is missing or of another version than this crate's: see [`migrate`](crate::migrate()).
    pub fn is_not_migrated(&self) -> bool {
        matches!(self.0.kind, Kind::Migrations(_))
    }

    /// Whether it is unknown if the request was persisted: the connection broke during the commit, or the runtime ended.
    ///
    /// [`request_id`](Self::request_id) is set; [`Durable::status`](crate::Durable::status) tells once the database is back.
    pub fn is_indeterminate(&self) -> bool {
        matches!(self.0.kind, Kind::Indeterminate(_))
    }

    /// Whether the request was given up without ever having been answered.
    pub fn is_discarded(&self) -> bool {
        matches!(self.0.kind, Kind::Discarded { .. })
    }

    /// Whether the request was cancelled.
    pub fn is_cancelled(&self) -> bool {
        matches!(self.0.kind, Kind::Cancelled { .. })
    }

    /// Whether the request was cancelled because a newer one took its place: see [`Options::supersede`](crate::Options::supersede).
    pub fn is_superseded(&self) -> bool {
        matches!(self.0.kind, Kind::Cancelled { superseded: true })
    }

    /// Whether the key of the request was given to a different one before: see [`Options::key`](crate::Options::key).
    /// [`request_id`](Self::request_id) is that one's. Nothing was persisted.
    pub fn is_key_conflict(&self) -> bool {
        matches!(self.0.kind, Kind::KeyConflict)
    }

    /// Whether unfinished requests of another channel have the ordering key, so that no order could be kept: see
    /// [`Options::ordered`](crate::Options::ordered). Nothing was persisted or changed. It is of use to try again when they have ended.
    pub fn is_order_conflict(&self) -> bool {
        matches!(self.0.kind, Kind::OrderConflict)
    }

    /// Whether the request may have been sent and must not be sent again.
    pub fn is_ambiguous(&self) -> bool {
        matches!(self.0.kind, Kind::Ambiguous)
    }

    /// Whether the request is not in a state in which this can be done to it: a request that has not ended can't be replayed, for
    /// example. Nothing was changed.
    pub fn is_wrong_state(&self) -> bool {
        matches!(self.0.kind, Kind::WrongState { .. })
    }

    /// Whether the request was delivered, but its response is not known: it was
    /// [resolved](crate::Durable::resolve) as sent.
    pub fn is_response_unknown(&self) -> bool {
        matches!(self.0.kind, Kind::ResponseUnknown)
    }

    /// Whether no request of this id exists: it never did, or its outcome is older than the retention.
    pub fn is_unknown_id(&self) -> bool {
        matches!(self.0.kind, Kind::UnknownId)
    }

    /// Whether the handle was shut down or its pool closed.
    pub fn is_closed(&self) -> bool {
        matches!(self.0.kind, Kind::Closed)
    }

    /// The number of attempts made for a request that was given up.
    pub fn attempts(&self) -> Option<u32> {
        match self.0.kind {
            Kind::Discarded { attempts, .. } => Some(attempts),
            _ => None,
        }
    }

    /// Finds this crate's error in one that reqwest-middleware returned.
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

/// An error and its causes, in one line.
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

/// reqwest puts the URL into its errors, with all that is in it.
pub(crate) fn without_url(error: BoxError) -> BoxError {
    match error.downcast::<reqwest::Error>() {
        Ok(error) => Box::new(error.without_url()),
        Err(error) => error,
    }
}

/// `sqlx::Error` is not `Clone`; a caller that shares a failed batch needs the class, the code and the text.
fn share_sqlx(error: &sqlx::Error) -> sqlx::Error {
    match error {
        sqlx::Error::PoolClosed => sqlx::Error::PoolClosed,
        sqlx::Error::PoolTimedOut => sqlx::Error::PoolTimedOut,
        sqlx::Error::Io(error) => {
            sqlx::Error::Io(std::io::Error::new(error.kind(), error.to_string()))
        }
        other => sqlx::Error::Protocol(other.to_string()),
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Request { field, reason } => write!(f, "invalid request: {field}: {reason}"),
            Self::Config { field, reason } => write!(f, "invalid configuration: {field}: {reason}"),
            Self::BodyTooLarge { limit } => write!(
                f,
                "invalid request: body: longer than the limit of {limit} bytes (max_request_body)"
            ),
            Self::Body(_) => f.write_str("the request's body failed while it was read"),
            Self::ResponseTooLarge { status, .. } => write!(
                f,
                "delivered and answered with {status}, but the response body is over the limit (max_response_body)"
            ),
            Self::Database(_) => f.write_str("the database failed"),
            Self::Migrations(MigrationState::Missing) => f.write_str(
                "requeuest's schema is not in this database: call requeuest::migrate(&pool) first",
            ),
            Self::Migrations(MigrationState::Swallowed) => f.write_str(
                "the connection did not keep its search_path, as behind a pooler: give direct options with DurableBuilder::connect_options",
            ),
            Self::Migrations(MigrationState::Older { found, wanted }) => write!(
                f,
                "requeuest's schema is at version {found}, this crate needs {wanted}: call requeuest::migrate(&pool)"
            ),
            Self::Migrations(MigrationState::Newer { found, wanted }) => write!(
                f,
                "requeuest's schema is at version {found}, newer than the {wanted} that this crate knows: upgrade requeuest"
            ),
            Self::Indeterminate(_) => f.write_str(
                "the connection broke or the runtime ended during the commit: the request may or may not be persisted",
            ),
            Self::Discarded { attempts, last } => {
                write!(f, "given up after {attempts} attempts: {last}")
            }
            Self::Cancelled { superseded: false } => f.write_str("the request was cancelled"),
            Self::Cancelled { superseded: true } => {
                f.write_str("the request was cancelled: a newer one took its place")
            }
            Self::KeyConflict => {
                f.write_str("invalid request: key: it was given to a different request before")
            }
            Self::OrderConflict => f.write_str(
                "ordered: unfinished requests of another channel have this ordering key, and no order is kept between channels",
            ),
            Self::Ambiguous => {
                f.write_str("the request may have been sent, no answer came, and it must not be sent twice")
            }
            Self::WrongState {
                status,
                replayed_as: None,
            } => write!(f, "it is {status}, and this can't be done to it"),
            Self::WrongState {
                status,
                replayed_as: Some(id),
            } => write!(f, "it is {status}, and was replayed as request {id}"),
            Self::ResponseUnknown => {
                f.write_str("the request was delivered, but its response is not known")
            }
            Self::UnknownId => f.write_str("no request of this id exists, or no more"),
            Self::Closed => f.write_str("the handle was shut down or its pool closed"),
            Self::Corrupt(reason) => write!(f, "a stored request can't be used: {reason}"),
            Self::PassThrough(_) => f.write_str("a request that passed through untouched failed"),
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.id {
            Some(id) => write!(f, "request {id}: {}", self.0.kind),
            None => self.0.kind.fmt(f),
        }
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut debug = f.debug_tuple("requeuest::Error");
        debug.field(&format_args!("{self}"));
        match (&self.0.kind, self.source()) {
            // Somebody else's error, which may show more of a URL than we would.
            (Kind::Body(error) | Kind::PassThrough(error), _) => {
                debug.field(&redact_urls(&chain(&**error)));
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
            Kind::Database(error) | Kind::Indeterminate(Some(error)) => Some(error),
            Kind::Body(error) | Kind::PassThrough(error) => Some(error.as_ref()),
            _ => None,
        }
    }
}

impl From<sqlx::Error> for Error {
    fn from(error: sqlx::Error) -> Self {
        let missing = error
            .as_database_error()
            .and_then(sqlx::error::DatabaseError::code)
            // undefined_table, invalid_schema_name, undefined_function, undefined_object
            .is_some_and(|code| matches!(&*code, "42P01" | "3F000" | "42883" | "42704"));
        Self::new(match error {
            sqlx::Error::PoolClosed => Kind::Closed,
            _ if missing => Kind::Migrations(MigrationState::Missing),
            error => Kind::Database(error),
        })
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
    fn what_somebody_elses_error_says_of_a_url_is_cut_down() {
        let error = Error::pass_through("no answer from http://a:b@c/d?token=e".into());
        assert_eq!(
            format!("{error:?}"),
            r#"requeuest::Error(a request that passed through untouched failed, "no answer from http://c/d")"#
        );
    }

    #[test]
    fn a_refused_field_is_named() {
        let error = Error::request("url", "is relative");
        assert_eq!(error.field(), Some("url"));
        assert!(error.is_request());
        assert_eq!(error.to_string(), "invalid request: url: is relative");
    }
}
