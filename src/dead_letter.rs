//! Dead letters: what is shown of them, which are selected, and what became of them.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::time::{Duration, SystemTime};

use url::Url;

use crate::error::{BoxError, Error};
use crate::id::RequestId;
use crate::metadata::Metadata;
use crate::options::{TOO_LONG, validate_channel};
use crate::request::Request;
use crate::retry::MAX_DURATION;
use crate::status::Status;

/// How many dead letters a list has at most, unless its [`DeadLetterFilter`] sets another limit:
/// 100.
pub const DEFAULT_DEAD_LETTER_LIMIT: u32 = 100;
/// How far dead letters are counted, unless the [`DeadLetterFilter`] sets another limit: 10,000.
pub const MAX_DEAD_LETTER_COUNT: u32 = MAX_LIMIT;
const MAX_LIMIT: u32 = 10_000;

/// Selects dead letters: requests that ended as discarded or ambiguous. Defaults to all of them.
///
/// # Examples
///
/// ```
/// use std::time::Duration;
/// use requeuest::{DeadLetterFilter, Status};
///
/// let outage = DeadLetterFilter::default()
///     .destination("https://pay.example.com")
///     .status(Status::Discarded)
///     .finished_within(Duration::from_secs(3600));
/// ```
#[derive(Clone, Debug, Default)]
pub struct DeadLetterFilter {
    channel: Option<String>,
    destination: Option<String>,
    status: Option<Status>,
    finished_within: Option<Duration>,
    finished_before: Option<Duration>,
    limit: Option<u32>,
    after: Option<Position>,
}

impl DeadLetterFilter {
    /// Only dead letters of this channel.
    #[must_use]
    pub fn channel(mut self, channel: impl Into<String>) -> Self {
        self.channel = Some(channel.into());
        self
    }

    /// Only dead letters to this scheme, host and port. `https://example.com` is the same as
    /// `https://example.com:443`.
    #[must_use]
    pub fn destination(mut self, destination: impl Into<String>) -> Self {
        self.destination = Some(destination.into());
        self
    }

    /// Only dead letters of this status: [`Status::Discarded`] or [`Status::Ambiguous`].
    #[must_use]
    pub fn status(mut self, status: Status) -> Self {
        self.status = Some(status);
        self
    }

    /// Only dead letters that ended at most this long ago, by the database's clock. Must be longer
    /// than zero.
    #[must_use]
    pub fn finished_within(mut self, time: Duration) -> Self {
        self.finished_within = Some(time);
        self
    }

    /// Only dead letters that ended longer ago than this, by the database's clock.
    #[must_use]
    pub fn finished_before(mut self, time: Duration) -> Self {
        self.finished_before = Some(time);
        self
    }

    /// At most this many dead letters, from 1 to 10,000. Defaults to [`DEFAULT_DEAD_LETTER_LIMIT`]
    /// for lists, to [`MAX_DEAD_LETTER_COUNT`] for counts, and to all for replays and purges.
    #[must_use]
    pub fn limit(mut self, limit: u32) -> Self {
        self.limit = Some(limit);
        self
    }

    /// Only dead letters that come after this one, which need not exist any more: the page that
    /// follows the one that it ends.
    #[must_use]
    pub fn after(mut self, letter: &DeadLetter) -> Self {
        self.after = Some(Position::of(letter));
        self
    }

    /// Checks the filter and converts it for the store.
    pub(crate) fn checked(&self) -> Result<Wanted, Error> {
        if let Some(channel) = &self.channel {
            validate_channel(channel).map_err(|reason| Error::request("channel", reason))?;
        }
        if self
            .status
            .is_some_and(|status| !matches!(status, Status::Discarded | Status::Ambiguous))
        {
            return Err(Error::request(
                "status",
                "must be discarded or ambiguous, because only such requests are dead letters",
            ));
        }
        if self.finished_within.is_some_and(|time| time.is_zero()) {
            return Err(Error::request(
                "finished_within",
                "must be longer than zero",
            ));
        }
        for (field, time) in [
            ("finished_within", self.finished_within),
            ("finished_before", self.finished_before),
        ] {
            if time.is_some_and(|time| time > MAX_DURATION) {
                return Err(Error::request(field, TOO_LONG));
            }
        }
        if self
            .limit
            .is_some_and(|limit| !(1..=MAX_LIMIT).contains(&limit))
        {
            return Err(Error::request("limit", "must be from 1 to 10,000"));
        }
        Ok(Wanted {
            channel: self.channel.clone(),
            destination: self.destination.as_deref().map(origin).transpose()?,
            status: self.status,
            finished_within: self.finished_within,
            finished_before: self.finished_before,
            limit: self.limit,
            after: self.after,
        })
    }
}

/// A filter that passed its checks.
#[derive(Clone, Debug)]
pub(crate) struct Wanted {
    pub(crate) channel: Option<String>,
    /// As the column of that name has it.
    pub(crate) destination: Option<String>,
    pub(crate) status: Option<Status>,
    pub(crate) finished_within: Option<Duration>,
    pub(crate) finished_before: Option<Duration>,
    pub(crate) limit: Option<u32>,
    pub(crate) after: Option<Position>,
}

/// Where a dead letter stands among the others: they are in the order in which they ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Position {
    /// In microseconds since 1970, by the database's clock.
    pub(crate) finished_at: i64,
    pub(crate) id: RequestId,
}

impl Position {
    fn of(letter: &DeadLetter) -> Self {
        let since = letter.finished_at.duration_since(SystemTime::UNIX_EPOCH);
        let micros = since.unwrap_or_default().as_micros();
        Self {
            finished_at: i64::try_from(micros).unwrap_or(i64::MAX),
            id: letter.id,
        }
    }
}

fn origin(destination: &str) -> Result<String, Error> {
    let malformed = || Error::request("destination", "must be of the form https://host:port");
    let url = Url::parse(destination).map_err(|_| malformed())?;
    let plain = matches!(url.scheme(), "http" | "https")
        && url.username().is_empty()
        && url.password().is_none()
        && url.path() == "/"
        && url.query().is_none()
        && url.fragment().is_none();
    match (url.host_str(), url.port_or_known_default()) {
        (Some(host), Some(port)) if plain => Ok(format!("{}://{host}:{port}", url.scheme())),
        _ => Err(malformed()),
    }
}

/// A request that ended as discarded or ambiguous, kept for inspection and replay.
///
/// No field shows a header value, a URL's path or query, or credentials.
#[derive(Clone)]
#[non_exhaustive]
pub struct DeadLetter {
    /// The id.
    pub id: RequestId,
    /// The channel.
    pub channel: String,
    /// Scheme, host and port, always with the port. `None` if the stored request can't be read.
    pub destination: Option<String>,
    /// The method. `None` if the stored request can't be read.
    pub method: Option<String>,
    /// The key of an [`ordered`](crate::Options::ordered) request.
    pub ordering_key: Option<String>,
    /// [`Status::Discarded`] or [`Status::Ambiguous`].
    pub status: Status,
    /// How many attempts were made.
    pub attempts: u32,
    /// When the request was enqueued, by the database's clock.
    pub created_at: SystemTime,
    /// When the request ended, by the database's clock.
    pub finished_at: SystemTime,
    /// The status of the last response, if there was one.
    pub http_status: Option<u16>,
    /// Why the request ended, in a word: `timeout`, `connect`, `deadline`, … `None` if a response
    /// was the reason.
    pub error_class: Option<String>,
    /// Why the request ended, in a sentence.
    pub error: Option<String>,
    /// What the application attached to the request with
    /// [`Options::metadata`](crate::Options::metadata). `Debug` shows only its length.
    pub metadata: Option<serde_json::Value>,
}

impl fmt::Debug for DeadLetter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeadLetter")
            .field("id", &self.id)
            .field("channel", &self.channel)
            .field("destination", &self.destination)
            .field("method", &self.method)
            .field("ordering_key", &self.ordering_key)
            .field("status", &self.status)
            .field("attempts", &self.attempts)
            .field("created_at", &self.created_at)
            .field("finished_at", &self.finished_at)
            .field("http_status", &self.http_status)
            .field("error_class", &self.error_class)
            .field("error", &self.error)
            .field("metadata", &self.metadata.clone().and_then(Metadata::new))
            .finish()
    }
}

/// An ordering key that a dead letter halts: its later requests wait until an operator acts.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct HaltedKey {
    /// The channel.
    pub channel: String,
    /// The key, as the caller gave it to [`ordered`](crate::Options::ordered).
    pub key: String,
    /// The dead letter that halts the key.
    pub id: RequestId,
    /// Since when the key is halted, by the database's clock.
    pub since: SystemTime,
}

/// What became of an ambiguous request, for [`Durable::resolve`](crate::Durable::resolve).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Resolution {
    /// The receiver has the request. It ends as completed, without a response.
    Sent,
    /// The receiver never got the request. It is sent again.
    NotSent,
}

/// Asks the receiver what became of an ambiguous request. Set with
/// [`DurableBuilder::reconcile`](crate::DurableBuilder::reconcile).
///
/// Implemented for functions and closures that take a [`DeadLetter`] and a [`Request`].
///
/// # Examples
///
/// ```no_run
/// use requeuest::{DeadLetter, Durable, Request, Resolution};
///
/// type Answer = Result<Option<Resolution>, Box<dyn std::error::Error + Send + Sync>>;
///
/// async fn ask(_: DeadLetter, request: Request) -> Answer {
///     let order = request.headers().get("x-order").ok_or("no order")?.to_str()?;
///     let charges = format!("https://pay.example.com/charges?order={order}");
///     let found = reqwest::get(charges).await?;
///     Ok(match found.status().as_u16() {
///         200 => Some(Resolution::Sent),
///         404 => Some(Resolution::NotSent),
///         _ => None,
///     })
/// }
///
/// # fn example(pool: sqlx::PgPool) -> Result<(), requeuest::Error> {
/// let durable = Durable::builder(pool).reconcile(ask).build()?;
/// # Ok(()) }
/// ```
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a reconcile hook",
    label = "expected an async function of `(DeadLetter, Request)`",
    note = "the function returns `Result<Option<Resolution>, Box<dyn Error + Send + Sync>>`",
    note = "its future must be `Send`"
)]
pub trait Reconcile: Send + Sync + 'static {
    /// Returns what became of the request, or `None` if the receiver can't tell yet. After `None`
    /// an error or a panic the hook is called again later.
    fn reconcile(
        &self,
        letter: DeadLetter,
        request: Request,
    ) -> Pin<Box<dyn Future<Output = Result<Option<Resolution>, BoxError>> + Send + '_>>;
}

#[diagnostic::do_not_recommend]
impl<F, Fut> Reconcile for F
where
    F: Fn(DeadLetter, Request) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Result<Option<Resolution>, BoxError>> + Send + 'static,
{
    fn reconcile(
        &self,
        letter: DeadLetter,
        request: Request,
    ) -> Pin<Box<dyn Future<Output = Result<Option<Resolution>, BoxError>> + Send + '_>> {
        Box::pin(self(letter, request))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hook_is_object_safe() {
        let hook = |_: DeadLetter, _: Request| async { Ok(None) };
        let _: Box<dyn Reconcile> = Box::new(hook);
    }

    #[test]
    fn default_ports_make_no_difference() {
        for (given, stored) in [
            ("https://A.example", "https://a.example:443"),
            ("http://a.example:80/", "http://a.example:80"),
            ("http://[::1]:8080", "http://[::1]:8080"),
        ] {
            assert_eq!(origin(given).unwrap(), stored);
        }
    }

    #[test]
    fn a_bad_field_is_named() {
        let filter = DeadLetterFilter::default;
        for (filter, field) in [
            (filter().limit(0), "limit"),
            (filter().limit(10_001), "limit"),
            (filter().channel(""), "channel"),
            (filter().status(Status::Completed), "status"),
            (filter().destination("example.com"), "destination"),
            (filter().destination("https://u@example.com"), "destination"),
            (filter().destination("https://example.com/a"), "destination"),
            (filter().finished_within(Duration::ZERO), "finished_within"),
            (filter().finished_before(Duration::MAX), "finished_before"),
        ] {
            let error = filter.checked().unwrap_err();
            assert_eq!(error.field(), Some(field));
            assert!(error.is_request());
        }
    }
}
