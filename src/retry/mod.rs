//! When a failed attempt is followed by another one, and how much later.
//!
//! # Defaults
//!
//! Delays grow exponentially from [`DEFAULT_BASE`] by a factor of [`DEFAULT_FACTOR`] up to [`DEFAULT_CAP`], with full jitter: each delay
//! is drawn evenly between zero and the computed bound, so that a thousand requests that failed together don't come
//! back together. Awaited requests are retried for [`DEFAULT_AWAITED_AGE`], fired ones for [`DEFAULT_FIRED_AGE`]; the
//! caller then gets the last response or, where there never was one, the last error.
//!
//! # What is retried
//!
//! Every failure to get a response ([`FailureClass`](crate::FailureClass)), and the statuses 408, 425, 429 and 5xx. Every other
//! answer is final: a 404 is a response. A request can narrow that with [`Options::accept`](crate::Options::accept): then only
//! the accepted responses end it. A handle can judge for itself with [`DurableBuilder::classify`](crate::DurableBuilder::classify).
//!
//! # `Retry-After`
//!
//! A response that is retried may say when to come back (RFC 9110 section 10.2.3). That raises the policy's delay, never lowers it, up to
//! [`RetryPolicy::max_retry_after`]. If the allowed age ends before that time, the request is given up at once, with that response. A date is
//! taken relative to the response's own `Date`, so that it does not matter how this machine's clock is set.
//!
//! # When not to retry
//!
//! A request whose effect must not happen twice, sent to a receiver that can't recognise a repetition, should ask for
//! [`Guarantee::AtMostOnce`](crate::Guarantee::AtMostOnce): it is then repeated only where it certainly did not arrive or was answered.
//! [`RetryPolicy::none`] makes one attempt, and says of a crash in the middle of it that the request was given up.
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
