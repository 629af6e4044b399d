//! What a single request may ask for.

use std::sync::Arc;
use std::time::Duration;

use crate::classify::AcceptedResponse;
use crate::error::Error;
use crate::retry::{MAX_DURATION, RetryPolicy};

/// sqlxmq listens on `mq_` + channel, and Postgres cuts no name of up to 63 bytes.
pub(crate) const MAX_CHANNEL_LEN: usize = 55;
const MAX_ORDERING_KEY_LEN: usize = 255;

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
}

impl Options {
    /// The channel to enqueue to: it names the client stack that sends. 1 to 55 bytes.
    /// Defaults to the builder's.
    #[must_use]
    pub fn channel(mut self, channel: impl Into<Arc<str>>) -> Self {
        self.channel = Some(channel.into());
        self
    }

    /// Delivers the request after all earlier ones of the same channel and key have ended, one at a time, in the order in which
    /// their inserts committed. A request that is being retried holds up its own key only. Up to 255 bytes. Defaults to no order.
    #[must_use]
    pub fn ordered(mut self, key: impl Into<Arc<str>>) -> Self {
        self.ordered = Some(key.into());
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
        for (field, key) in [("ordered", &self.ordered), ("group", &self.group)] {
            if let Some(key) = key {
                if key.len() > MAX_ORDERING_KEY_LEN {
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
