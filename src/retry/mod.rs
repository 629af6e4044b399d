//! Whether a failed attempt is retried, and after what delay.
//!
//! # Defaults
//!
//! Delays grow exponentially from [`DEFAULT_BASE`] by a factor of [`DEFAULT_FACTOR`] up to
//! [`DEFAULT_CAP`], with full jitter: each delay is drawn evenly between zero and the computed
//! bound, so that a thousand requests that failed together don't come back together. Awaited
//! requests are retried for [`DEFAULT_AWAITED_AGE`], fired ones for [`DEFAULT_FIRED_AGE`]. After
//! that, the caller gets the last response or, if there never was one, the last error.
//!
//! # What is retried
//!
//! Every failure to get a response ([`FailureClass`](crate::FailureClass)), and the statuses 408,
//! 421, 425, 429 and 5xx. Every other response is final: a 404 is a response. The details are in
//! [`classify`](crate::classify).
//! [`Options::accept`](crate::Options::accept) narrows this for one request: only the accepted
//! responses complete it. [`DurableBuilder::classify`](crate::DurableBuilder::classify) sets other
//! rules for a handle.
//!
//! # `Retry-After`
//!
//! A response that is retried may say when to come back (RFC 9110 section 10.2.3). The header can
//! raise the policy's delay, up to [`RetryPolicy::max_retry_after`], but never lowers it. If the
//! allowed age ends before the requested time, the request is given up at once, with that response.
//! A date is taken relative to the response's own `Date`, so this machine's clock doesn't matter.
//! Besides seconds and dates, the header may have fractions of seconds, timestamps of RFC 3339, or
//! seconds since 1970. Of several values the longest counts. The header is honoured on each
//! response that is retried, whatever its status.
//!
//! # When not to retry
//!
//! Use [`Guarantee::AtMostOnce`](crate::Guarantee::AtMostOnce) for a request whose effect must not
//! happen twice, if the receiver can't recognise a repetition. Such a request is retried only if it
//! certainly did not arrive, or if the answer says that it was not processed.
//! [`RetryPolicy::none`] makes a single attempt. If the process crashes during that attempt, the
//! request ends as discarded.
//!
//! # Examples
//!
//! ```
//! use std::time::Duration;
//! use requeuest::{Durable, retry::RetryPolicy};
//!
//! # fn example(pool: sqlx::PgPool) -> Result<(), requeuest::Error> {
//! let durable = Durable::builder(pool)
//!     .retry(RetryPolicy::exponential().max_age(Duration::from_secs(3600)).max_attempts(20))
//!     .build()?;
//! # Ok(()) }
//! ```

pub(crate) mod millis;
mod policy;
mod retry_after;

pub(crate) use self::policy::MAX_DURATION;
pub use self::policy::{
    DEFAULT_AWAITED_AGE, DEFAULT_BASE, DEFAULT_CAP, DEFAULT_FACTOR, DEFAULT_FIRED_AGE,
    DEFAULT_MAX_RETRY_AFTER, Jitter, Retry, RetryPolicy,
};
pub(crate) use self::retry_after::retry_after;
