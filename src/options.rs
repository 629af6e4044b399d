//! What a single request may ask for.

use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::classify::AcceptedResponse;
use crate::error::Error;
use crate::idempotency_header::IdempotencyHeader;
use crate::retry::{MAX_DURATION, RetryPolicy};

/// sqlxmq listens on `mq_` + channel, and Postgres cuts no name of up to 63 bytes.
pub(crate) const MAX_CHANNEL_LEN: usize = 55;
const MAX_KEY_LEN: usize = 255;

/// What is promised when an attempt's outcome is not known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Guarantee {
    /// The request is sent again, so that it arrives, perhaps more than once. An [`IdempotencyHeader`] lets the receiver tell.
    #[default]
    AtLeastOnce,
    /// Once bytes of it may have left without an answer it is not sent again: it ends as [`Status::Ambiguous`](crate::Status::Ambiguous)
    /// and is kept until somebody finds out and says so. An attempt that certainly sent nothing, and an answer that asks for a
    /// repetition, are followed by another attempt all the same.
    ///
    /// What a client reports is believed. One that follows redirects by itself may report that it could not connect to the second place,
    /// when the first had acted: give it a client that follows none.
    AtMostOnce,
}

impl Guarantee {
    #[allow(clippy::trivially_copy_pass_by_ref)] // the signature that serde calls
    pub(crate) fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// Per-request options: given with [`Request::with`](crate::Request::with), or put into a request's
/// [`http::Extensions`] for the layer and the middleware. What is not set comes from the
/// [`DurableBuilder`](crate::DurableBuilder).
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
    pub(crate) delay: Option<Duration>,
    pub(crate) attempt_timeout: Option<Duration>,
    pub(crate) retry: Option<RetryPolicy>,
    pub(crate) accept: Option<Arc<[AcceptedResponse]>>,
    pub(crate) fire: bool,
    pub(crate) key: Option<Arc<str>>,
    pub(crate) supersede: Option<Arc<str>>,
    pub(crate) deadline: Option<Duration>,
    pub(crate) guarantee: Guarantee,
    pub(crate) idempotency_header: Option<IdempotencyHeader>,
    pub(crate) halt_on_discard: bool,
    pub(crate) ordered_by_channel: bool,
}

impl Options {
    /// The channel to enqueue to: it names the client stack that sends. 1 to 55 bytes.
    /// Defaults to the builder's.
    #[must_use]
    pub fn channel(mut self, channel: impl Into<Arc<str>>) -> Self {
        self.channel = Some(channel.into());
        self
    }

    /// Delivers the request after all earlier ones of the same key have ended, one at a time, in the order in which
    /// their inserts committed. A request that is being retried holds up its own key only. Up to 255 bytes. Defaults to no order.
    ///
    /// An order is kept within a channel, because each channel has runners of its own. So a key belongs to one channel at a time: while
    /// unfinished requests of another one have it, the request is refused
    /// ([`Error::is_order_conflict`](crate::Error::is_order_conflict)) rather than sent out of order. Where channels may go on side by side, put
    /// the channel's name into the key.
    #[must_use]
    pub fn ordered(mut self, key: impl Into<Arc<str>>) -> Self {
        self.ordered = Some(key.into());
        self
    }

    /// With [`ordered`](Self::ordered): when this request is given up, or ends as ambiguous, the later ones of its key are not sent until
    /// somebody has seen to it. Defaults to skipping it: they go on.
    #[must_use]
    pub fn halt_on_discard(mut self) -> Self {
        self.halt_on_discard = true;
        self
    }

    /// Makes the call idempotent: while a request with this key and channel is known, a second call attaches to it. It has the same
    /// id and response, and one delivery, from whichever process it comes, also after a crash in between. So a function that is run
    /// again after a restart takes up what was already done.
    ///
    /// A request is known for the [`retention`](crate::DurableBuilder::retention) after its end; one that was given up, for as long as it is kept.
    /// The same key with a different method, URL or body is an error ([`Error::is_key_conflict`](crate::Error::is_key_conflict)); headers
    /// and options may differ, and those of the first call count. Up to 255 bytes. Defaults to none.
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

    /// Takes the place of an earlier request with the same key and channel that has not been sent yet: the latest wins. The earlier one
    /// ends as cancelled ([`Error::is_superseded`](crate::Error::is_superseded)). With a [`delay`](Self::delay), a
    /// burst of requests becomes one. Up to 255 bytes. Defaults to none.
    #[must_use]
    pub fn supersede(mut self, key: impl Into<Arc<str>>) -> Self {
        self.supersede = Some(key.into());
        self
    }

    /// How long after its enqueueing the request is given up, on the database's clock: no attempt begins later, whether or not there was
    /// any before. One that is being made may finish. Longer than the [`delay`](Self::delay). Defaults to none.
    ///
    /// [`RetryPolicy::max_age`] limits retries only: it still makes a first attempt of a request that waited for long.
    #[must_use]
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = Some(deadline);
        self
    }

    /// What is promised when an attempt's outcome is not known. Defaults to [`Guarantee::AtLeastOnce`].
    #[must_use]
    pub fn guarantee(mut self, guarantee: Guarantee) -> Self {
        self.guarantee = guarantee;
        self
    }

    /// The header by which the receiver can recognise a repetition; requests that are sent at most once have none.
    /// Defaults to the builder's.
    #[must_use]
    pub fn idempotency_header(mut self, key: IdempotencyHeader) -> Self {
        self.idempotency_header = Some(key);
        self
    }

    /// With [`ordered`](Self::ordered): other channels may have the same key, and an order of their own.
    pub(crate) fn ordered_by_channel(mut self) -> Self {
        self.ordered_by_channel = true;
        self
    }

    /// The group among which runners share their attention; the destination if it is not set.
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

    /// How long one attempt may take, from its start to the last byte of the response. Defaults to a reqwest request's own timeout,
    /// if it has one, else to the builder's.
    #[must_use]
    pub fn attempt_timeout(mut self, timeout: Duration) -> Self {
        self.attempt_timeout = Some(timeout);
        self
    }

    /// How failed attempts are repeated. Defaults to the builder's.
    #[must_use]
    pub fn retry(mut self, policy: RetryPolicy) -> Self {
        self.retry = Some(policy);
        self
    }

    /// Only these responses end the request; all others are retried. Defaults to what [`retry`](crate::retry) says.
    #[must_use]
    pub fn accept<I>(mut self, responses: I) -> Self
    where
        I: IntoIterator,
        I::Item: Into<AcceptedResponse>,
    {
        self.accept = Some(responses.into_iter().map(Into::into).collect());
        self
    }

    /// Through the layer or the middleware: answers `202 Accepted` with the id in the header
    /// [`requeuest-id`](crate::REQUEST_ID_HEADER) as soon as the request is persisted, and delivers it in the background.
    #[must_use]
    pub fn fire(mut self) -> Self {
        self.fire = true;
        self
    }

    pub(crate) fn validate(&self) -> Result<(), Error> {
        if let Some(channel) = &self.channel {
            validate_channel(channel).map_err(|reason| Error::request("channel", reason))?;
        }
        let keys = [
            ("ordered", &self.ordered),
            ("group", &self.group),
            ("key", &self.key),
            ("supersede", &self.supersede),
        ];
        for (field, key) in keys {
            if let Some(key) = key {
                if key.len() > MAX_KEY_LEN {
                    return Err(Error::request(field, "the key is longer than 255 bytes"));
                }
                if key.contains('\0') {
                    return Err(Error::request(field, "the key contains a NUL"));
                }
            }
        }
        if self.delay.is_some_and(|delay| delay > MAX_DURATION) {
            return Err(Error::request("delay", "longer than a hundred years"));
        }
        if self.halt_on_discard && self.ordered.is_none() {
            return Err(Error::request(
                "halt_on_discard",
                "there is no ordering key to hold up",
            ));
        }
        match self.deadline {
            Some(deadline) if deadline.is_zero() || deadline <= self.delay.unwrap_or_default() => {
                return Err(Error::request(
                    "deadline",
                    "it is over before the first attempt is due",
                ));
            }
            Some(deadline) if deadline > MAX_DURATION => {
                return Err(Error::request("deadline", "longer than a hundred years"));
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
            return Err(Error::request("accept", "no response is accepted"));
        }
        Ok(())
    }
}

pub(crate) fn validate_channel(channel: &str) -> Result<(), &'static str> {
    if channel.is_empty() {
        Err("the channel name is empty")
    } else if channel.len() > MAX_CHANNEL_LEN {
        Err("the channel name is longer than 55 bytes")
    } else if channel.contains('\0') {
        Err("the channel name contains a NUL")
    } else {
        Ok(())
    }
}

pub(crate) fn validate_timeout(timeout: Duration) -> Result<(), &'static str> {
    if timeout.is_zero() {
        Err("must be longer than zero")
    } else if timeout > MAX_DURATION {
        Err("longer than a hundred years")
    } else {
        Ok(())
    }
}
