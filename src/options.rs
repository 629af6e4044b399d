//! The settings of a single request.

use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::classify::AcceptedResponse;
use crate::destination::validate_limit_key;
use crate::error::Error;
use crate::idempotency_header::IdempotencyHeader;
use crate::metadata::Metadata;
use crate::retry::{MAX_DURATION, RetryPolicy};

/// sqlxmq listens on `mq_` + channel, and Postgres truncates names over 63 bytes.
pub(crate) const MAX_CHANNEL_LEN: usize = 55;
pub(crate) const MAX_KEY_LEN: usize = 255;
/// The reason for refusing a time over [`MAX_DURATION`].
pub(crate) const TOO_LONG: &str = "must be at most a hundred years";

/// What is promised if the result of an attempt is unknown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Guarantee {
    /// The request is sent again, so it arrives, perhaps more than once. An [`IdempotencyHeader`]
    /// lets the receiver recognise a repetition.
    #[default]
    AtLeastOnce,
    /// Once bytes of the request may have left without an answer, it is not sent again. It ends as
    /// [`Status::Ambiguous`](crate::Status::Ambiguous) and stays a dead letter until it is
    /// [resolved](crate::Durable::resolve), replayed or purged. After an attempt that certainly
    /// sent nothing, or an answer that says that the request was not processed, such as 503,
    /// another attempt is made anyway. After a 500, 502 or 504 it ends as ambiguous, with that
    /// response. [`classify`](crate::classify) has the whole list.
    ///
    /// The client's report is believed. A client that follows redirects may report that it could
    /// not connect to the second server although the first one had acted. Use a client that
    /// doesn't follow redirects.
    AtMostOnce,
}

impl Guarantee {
    #[expect(
        clippy::trivially_copy_pass_by_ref,
        reason = "serde passes a reference to `skip_serializing_if`"
    )]
    pub(crate) fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// What polls claim first while more is due than there is room for. The row of each request that
/// waits has one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Priority {
    /// Before the others.
    High,
    /// After those of a high priority, and before those of a low one.
    #[default]
    Normal,
    /// After the others.
    Low,
}

impl Priority {
    #[expect(
        clippy::trivially_copy_pass_by_ref,
        reason = "serde passes a reference to `skip_serializing_if`"
    )]
    pub(crate) fn is_default(&self) -> bool {
        *self == Self::default()
    }

    /// The priority's name in the database.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::High => "high",
            Self::Normal => "normal",
            Self::Low => "low",
        }
    }
}

/// Per-request options. Set them with [`Request::with`](crate::Request::with), or put them into a
/// request's [`http::Extensions`] for the layer and the middleware. Many default to the setting of
/// the [`DurableBuilder`](crate::DurableBuilder).
///
/// # Examples
///
/// ```
/// use std::time::Duration;
/// use requeuest::{Options, retry::RetryPolicy};
///
/// let options = Options::default()
///     .channel("billing")
///     .attempt_timeout(Duration::from_secs(5))
///     .retry(RetryPolicy::fired().max_attempts(10));
///
/// let request = http::Request::post("https://example.com/").extension(options).body("{}")?;
/// # Ok::<(), http::Error>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct Options {
    pub(crate) channel: Option<Arc<str>>,
    pub(crate) ordered: Option<Arc<str>>,
    pub(crate) group: Option<Arc<str>>,
    pub(crate) limit_key: Option<Arc<str>>,
    pub(crate) delay: Option<Duration>,
    pub(crate) attempt_timeout: Option<Duration>,
    pub(crate) retry: Option<RetryPolicy>,
    pub(crate) accept: Option<Arc<[AcceptedResponse]>>,
    pub(crate) fire: bool,
    pub(crate) key: Option<Arc<str>>,
    pub(crate) key_owner: Option<Arc<str>>,
    pub(crate) supersede: Option<Arc<str>>,
    pub(crate) deadline: Option<Duration>,
    pub(crate) guarantee: Guarantee,
    pub(crate) priority: Priority,
    pub(crate) idempotency_header: Option<IdempotencyHeader>,
    pub(crate) halt_on_discard: bool,
    pub(crate) ordered_by_channel: bool,
    pub(crate) metadata: Option<Metadata>,
}

impl Options {
    /// The channel to enqueue to, which names the client stack that sends the request. 1 to 55
    /// bytes. Defaults to the builder's.
    #[must_use]
    pub fn channel(mut self, channel: impl Into<Arc<str>>) -> Self {
        self.channel = Some(channel.into());
        self
    }

    /// Delivers the requests of a key one at a time, in the order in which their inserts committed.
    /// Each request waits until all earlier requests of the key have ended. A request that is being
    /// retried delays its own key only. Up to 255 bytes. Defaults to no order.
    ///
    /// The order is kept within a channel, because each channel has its own runners. So a key
    /// belongs to one channel at a time. While unfinished requests of another channel have the key,
    /// the request is refused ([`Error::is_order_conflict`](crate::Error::is_order_conflict))
    /// rather than sent out of order. If channels don't need a common order, put the channel's name
    /// into the key.
    #[must_use]
    pub fn ordered(mut self, key: impl Into<Arc<str>>) -> Self {
        self.ordered = Some(key.into());
        self
    }

    /// With [`ordered`](Self::ordered): if this request ends as discarded or ambiguous, it halts
    /// its key. Later requests of the key wait until the dead letter is replayed, resolved or
    /// purged, or the key is [resumed](crate::Durable::resume). Defaults to off: later requests are
    /// sent.
    #[must_use]
    pub fn halt_on_discard(mut self) -> Self {
        self.halt_on_discard = true;
        self
    }

    /// Makes the call idempotent: while a request with this key and channel is known, a second call
    /// attaches to that request. Both calls have the same id and response, and the request is
    /// delivered once. That holds for calls from any process, also after a crash in between. So a
    /// function that runs again after a restart continues from the requests that it already made.
    ///
    /// A request is known for the [`retention`](crate::DurableBuilder::retention) after it ended,
    /// and a dead letter for as long as it exists. The same key with a different method, URL or
    /// body is an error ([`Error::is_key_conflict`](crate::Error::is_key_conflict)), and so is one
    /// of another [owner](Self::key_owner): no caller gets the response of another one. Other
    /// headers and options may differ; those of the first call are used. Up to 255 bytes. Defaults
    /// to none.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// use requeuest::{Durable, Options, Request};
    ///
    /// # async fn example(durable: Durable) -> Result<(), Box<dyn std::error::Error>> {
    /// let charge = http::Request::post("https://pay.example.com/charges").body("amount=5")?;
    /// let charge = Request::try_from(charge)?.with(Options::default().key("invoice-42"));
    /// let first = durable.await_response(&charge).await?;
    /// let second = durable.await_response(&charge).await?;
    /// assert_eq!(first.id(), second.id());
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn key(mut self, key: impl Into<Arc<str>>) -> Self {
        self.key = Some(key.into());
        self
    }

    /// Who owns the [`key`](Self::key): a tenant, an account. A key that an earlier request of
    /// another owner has is an error
    /// ([`Error::is_key_conflict`](crate::Error::is_key_conflict)).
    ///
    /// Defaults to the credentials among the request's headers: `Authorization`, `Cookie`,
    /// `Api-Key`, `ApiKey`, `X-Api-Key`, `X-Auth-Token`, `X-Access-Token`, and each header whose
    /// value is [marked sensitive](http::HeaderValue::set_sensitive). Name an owner if the
    /// credentials of one caller change between a call and its repetition, such as a token that is
    /// refreshed or a signature, or if they don't tell tenants apart, such as those that a layer
    /// below adds. Then the headers don't matter.
    ///
    /// With the key, a hash of the owner is stored. Up to 255 bytes.
    ///
    /// # Examples
    ///
    /// ```
    /// use requeuest::Options;
    ///
    /// // The same request, whatever token it is sent with.
    /// let options = Options::default().key("invoice-42").key_owner("tenant-7");
    /// ```
    #[must_use]
    pub fn key_owner(mut self, owner: impl Into<Arc<str>>) -> Self {
        self.key_owner = Some(owner.into());
        self
    }

    /// Replaces an earlier unsent request with the same key and channel. The earlier request ends
    /// as cancelled ([`Error::is_superseded`](crate::Error::is_superseded)). With a
    /// [`delay`](Self::delay), a burst of requests becomes one. Up to 255 bytes. Defaults to none.
    #[must_use]
    pub fn supersede(mut self, key: impl Into<Arc<str>>) -> Self {
        self.supersede = Some(key.into());
        self
    }

    /// How long after its enqueueing the request is given up, by the database's clock. No attempt,
    /// not even the first, begins after the deadline. An attempt in flight may finish. Must be
    /// longer than the [`delay`](Self::delay). Defaults to none.
    ///
    /// [`RetryPolicy::max_age`] limits retries only, and counts from the first attempt.
    #[must_use]
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = Some(deadline);
        self
    }

    /// What is promised if the result of an attempt is unknown. Defaults to
    /// [`Guarantee::AtLeastOnce`].
    #[must_use]
    pub fn guarantee(mut self, guarantee: Guarantee) -> Self {
        self.guarantee = guarantee;
        self
    }

    /// Which requests runners claim first while more are due than the process has slots for. A
    /// request that is attempted at once, because a slot is free, has no use for a priority.
    ///
    /// No priority waits for the end of a higher one. Of what a poll claims by age, at least one
    /// eighth is of low priority and at least one quarter of normal priority, as long as such
    /// requests are due. A poll claims at least three quarters by age. The rest, which keeps a
    /// destination's backlog from hiding others, goes from destination to destination and ignores
    /// priorities. So does what a destination that takes no more for a while has deferred: its
    /// oldest requests leave first.
    ///
    /// With [`ordered`](Self::ordered), the first request of a key is claimed by its own priority,
    /// whatever waits behind it. Retries and replays keep the priority. Defaults to
    /// [`Priority::Normal`].
    ///
    /// # Examples
    ///
    /// ```
    /// use requeuest::{Options, Priority};
    ///
    /// // A nightly export that may wait for everything else.
    /// let options = Options::default().priority(Priority::Low);
    /// ```
    #[must_use]
    pub fn priority(mut self, priority: Priority) -> Self {
        self.priority = priority;
        self
    }

    /// The header by which the receiver can recognise a repetition. Requests that are sent at most
    /// once don't get the header. Defaults to the builder's.
    #[must_use]
    pub fn idempotency_header(mut self, header: IdempotencyHeader) -> Self {
        self.idempotency_header = Some(header);
        self
    }

    /// With [`ordered`](Self::ordered): each channel keeps its own order, so that several channels
    /// can have the same key.
    pub(crate) fn ordered_by_channel(mut self) -> Self {
        self.ordered_by_channel = true;
        self
    }

    /// The request's destination: what limits, circuit breakers and pauses apply to, and what a
    /// process is fair over. The name of a tenant, an account or an API key; not the key itself,
    /// because events, statuses and log lines of a destination show it. Requests with the same
    /// limit key share one destination, wherever they go; requests of different limit keys at one
    /// host don't delay each other.
    ///
    /// It is stored with the request, and a replay keeps it. Errors, log lines of a request and
    /// [`DeadLetter::destination`](crate::DeadLetter::destination) show where the request goes, not
    /// its limit key. 1 to 255 bytes, without NUL characters and without `://`. Defaults to scheme,
    /// host and port of the URL.
    ///
    /// # Examples
    ///
    /// ```
    /// use requeuest::Options;
    ///
    /// // Each account has a rate limit of its own at the same host.
    /// let options = Options::default().limit_key("account-7");
    /// ```
    #[must_use]
    pub fn limit_key(mut self, key: impl Into<Arc<str>>) -> Self {
        self.limit_key = Some(key.into());
        self
    }

    /// The group, which polls are fair over. Defaults to the destination.
    pub(crate) fn group(mut self, group: impl Into<Arc<str>>) -> Self {
        self.group = Some(group.into());
        self
    }

    /// How long to wait before the first attempt. Defaults to none.
    #[must_use]
    pub fn delay(mut self, delay: Duration) -> Self {
        self.delay = Some(delay);
        self
    }

    /// How long one attempt may take, from its start to the last byte of the response. Defaults to
    /// a reqwest request's own timeout if it has one, else to the builder's.
    #[must_use]
    pub fn attempt_timeout(mut self, timeout: Duration) -> Self {
        self.attempt_timeout = Some(timeout);
        self
    }

    /// How failed attempts are retried. Defaults to the builder's.
    #[must_use]
    pub fn retry(mut self, policy: RetryPolicy) -> Self {
        self.retry = Some(policy);
        self
    }

    /// Only these responses end the request; all other responses are retried. Defaults to the
    /// verdict of [`classify`](crate::classify).
    #[must_use]
    pub fn accept<I>(mut self, responses: I) -> Self
    where
        I: IntoIterator,
        I::Item: Into<AcceptedResponse>,
    {
        self.accept = Some(responses.into_iter().map(Into::into).collect());
        self
    }

    /// Through the layer or the middleware: answers `202 Accepted` as soon as the request is
    /// persisted, with the id in the header [`requeuest-id`](crate::REQUEST_ID_HEADER), and
    /// delivers the request in the background.
    #[must_use]
    pub fn fire(mut self) -> Self {
        self.fire = true;
        self
    }

    /// A JSON value of the application's own, for example the id of the order that the request is
    /// about. It is stored with the request and with its outcome, and is never sent.
    /// [`Outcome::metadata`](crate::Outcome::metadata) and
    /// [`DeadLetter::metadata`](crate::DeadLetter::metadata) return it, in any process. A replay
    /// keeps it.
    ///
    /// Takes a [`serde_json::Value`] or anything that converts into one: a string, a number, a
    /// list. [`serde_json::to_value`] makes one of a type that implements `Serialize`. Up to
    /// [`MAX_METADATA_LEN`](crate::MAX_METADATA_LEN) bytes of JSON and 100 levels deep, without NUL
    /// characters. Logs and `Debug` show its length only. Defaults to none, which `null` means too.
    ///
    /// # Examples
    ///
    /// ```
    /// use requeuest::{Options, Outcome};
    /// use serde_json::json;
    ///
    /// let simple = Options::default().metadata("order-42");
    /// let more = Options::default().metadata(json!({"order": 42, "customer": "c-7"}));
    ///
    /// fn order_of(outcome: &Outcome) -> Option<u64> {
    ///     outcome.metadata()?["order"].as_u64()
    /// }
    /// ```
    #[must_use]
    pub fn metadata(mut self, metadata: impl Into<serde_json::Value>) -> Self {
        self.metadata = Metadata::new(metadata.into());
        self
    }

    /// Whether two calls for the same request may be tries of one. A retry layer changes no option;
    /// these are the ones by which an application tells its calls apart.
    pub(crate) fn mean_the_same(&self, other: &Self) -> bool {
        self.fire == other.fire
            && self.channel == other.channel
            && self.key == other.key
            && self.key_owner == other.key_owner
            && self.supersede == other.supersede
            && self.ordered == other.ordered
            && self.limit_key == other.limit_key
            && self.metadata.as_ref().map(Metadata::json)
                == other.metadata.as_ref().map(Metadata::json)
    }

    pub(crate) fn validate(&self) -> Result<(), Error> {
        if let Some(channel) = &self.channel {
            validate_channel(channel).map_err(|reason| Error::request("channel", reason))?;
        }
        let keys = [
            ("ordered", &self.ordered),
            ("group", &self.group),
            ("key", &self.key),
            ("key_owner", &self.key_owner),
            ("supersede", &self.supersede),
        ];
        for (field, key) in keys {
            if let Some(key) = key {
                if key.len() > MAX_KEY_LEN {
                    return Err(Error::request(field, "must be at most 255 bytes long"));
                }
                if key.contains('\0') {
                    return Err(Error::request(field, "must not contain a NUL character"));
                }
                // An empty text is mostly a default by mistake, and would make many calls one. The
                // older API orders its requests by an empty group.
                if key.is_empty() && field != "group" && !self.ordered_by_channel {
                    return Err(Error::request(field, "must not be empty"));
                }
            }
        }
        if let Some(key) = &self.limit_key {
            validate_limit_key(key)?;
        }
        if let Some(metadata) = &self.metadata {
            metadata
                .check()
                .map_err(|reason| Error::request("metadata", reason))?;
        }
        if self.delay.is_some_and(|delay| delay > MAX_DURATION) {
            return Err(Error::request("delay", TOO_LONG));
        }
        if self.halt_on_discard && self.ordered.is_none() {
            return Err(Error::request(
                "halt_on_discard",
                "there is no ordering key to halt; set `ordered` too",
            ));
        }
        match self.deadline {
            Some(deadline) if deadline.is_zero() || deadline <= self.delay.unwrap_or_default() => {
                return Err(Error::request(
                    "deadline",
                    "must be longer than zero and longer than `delay`",
                ));
            }
            Some(deadline) if deadline > MAX_DURATION => {
                return Err(Error::request("deadline", TOO_LONG));
            }
            _ => {}
        }
        if let Some(timeout) = self.attempt_timeout {
            validate_timeout(timeout)
                .map_err(|reason| Error::request("attempt_timeout", reason))?;
        }
        if let Some(policy) = &self.retry {
            policy.check("retry")?;
        }
        if self.accept.as_ref().is_some_and(|accept| accept.is_empty()) {
            return Err(Error::request(
                "accept",
                "the list is empty; name at least one response",
            ));
        }
        Ok(())
    }
}

pub(crate) fn validate_channel(channel: &str) -> Result<(), &'static str> {
    if channel.is_empty() {
        Err("the channel name must not be empty")
    } else if channel.len() > MAX_CHANNEL_LEN {
        Err("the channel name must be at most 55 bytes long")
    } else if channel.contains('\0') {
        Err("the channel name must not contain a NUL character")
    } else {
        Ok(())
    }
}

pub(crate) fn validate_timeout(timeout: Duration) -> Result<(), &'static str> {
    if timeout.is_zero() {
        Err("must be longer than zero")
    } else if timeout > MAX_DURATION {
        Err(TOO_LONG)
    } else {
        Ok(())
    }
}
