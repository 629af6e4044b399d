//! When a failed attempt is followed by another one, and how much later.
//!
//! # Defaults
//!
//! Delays grow exponentially from [`DEFAULT_BASE`] by a factor of two up to [`DEFAULT_CAP`], with full jitter: each delay
//! is drawn evenly between zero and the computed bound, so that a thousand requests that failed together don't come
//! back together. Awaited requests are retried for [`DEFAULT_AWAITED_AGE`], fired ones for [`DEFAULT_FIRED_AGE`]; the
//! caller then gets the last response or, where there never was one, the last error.
//!
//! # What is retried
//!
//! Transport errors, timeouts and the statuses 408, 425, 429 and 5xx. Every other answer is final: a 404 is a response.
//! A request can narrow that with [`Options::accept`](crate::Options::accept): then only the accepted responses end it.
//!
//! # When not to retry
//!
//! A request whose effect must not happen twice, sent to a receiver that can't recognise a repetition, should use
//! [`RetryPolicy::none`].
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

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::error::Error;

/// The bound of the first delay: one second.
pub const DEFAULT_BASE: Duration = Duration::from_secs(1);
/// The bound that delays grow to: five minutes.
pub const DEFAULT_CAP: Duration = Duration::from_secs(5 * 60);
/// How long an awaited request is retried: five minutes from its enqueueing.
pub const DEFAULT_AWAITED_AGE: Duration = Duration::from_secs(5 * 60);
/// How long a fired request is retried: 24 hours from its enqueueing.
pub const DEFAULT_FIRED_AGE: Duration = Duration::from_secs(24 * 60 * 60);

/// No duration of ours may exceed a hundred years: far below what `interval` and `timestamptz` hold.
pub(crate) const MAX_DURATION: Duration = Duration::from_secs(100 * 365 * 24 * 60 * 60);

/// How often, for how long and how fast a request is tried again. See the [module](self) for the defaults.
///
/// The policy is stored with the request, so that any process can go on with it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RetryPolicy {
    #[serde(rename = "base_ms", with = "millis")]
    base: Duration,
    #[serde(rename = "cap_ms", with = "millis")]
    cap: Duration,
    #[serde(
        rename = "max_age_ms",
        with = "millis::option",
        default,
        skip_serializing_if = "Option::is_none"
    )]
    max_age: Option<Duration>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    max_attempts: Option<u32>,
}

impl RetryPolicy {
    /// Exponential delays with full jitter, for ever.
    pub fn exponential() -> Self {
        Self {
            base: DEFAULT_BASE,
            cap: DEFAULT_CAP,
            max_age: None,
            max_attempts: None,
        }
    }

    /// The default of awaited requests: [`exponential`](Self::exponential) for [`DEFAULT_AWAITED_AGE`].
    pub fn awaited() -> Self {
        Self::exponential().max_age(DEFAULT_AWAITED_AGE)
    }

    /// The default of fired requests: [`exponential`](Self::exponential) for [`DEFAULT_FIRED_AGE`].
    pub fn fired() -> Self {
        Self::exponential().max_age(DEFAULT_FIRED_AGE)
    }

    /// One attempt, whatever comes of it.
    pub fn none() -> Self {
        Self::exponential().max_attempts(1)
    }

    /// The bound of the first delay. Must be at least one millisecond. Defaults to [`DEFAULT_BASE`].
    #[must_use]
    pub fn base(mut self, base: Duration) -> Self {
        self.base = base;
        self
    }

    /// The bound that delays grow to. Must not be below the base. Defaults to [`DEFAULT_CAP`].
    #[must_use]
    pub fn cap(mut self, cap: Duration) -> Self {
        self.cap = cap;
        self
    }

    /// How long after its enqueueing a request is retried. The last attempt falls on the end of that time.
    /// Zero means one attempt.
    #[must_use]
    pub fn max_age(mut self, age: Duration) -> Self {
        self.max_age = Some(age);
        self
    }

    /// How many attempts are made in all, the first included. Must be at least one.
    #[must_use]
    pub fn max_attempts(mut self, attempts: u32) -> Self {
        self.max_attempts = Some(attempts);
        self
    }

    /// Takes both limits away.
    #[must_use]
    pub fn for_ever(mut self) -> Self {
        self.max_age = None;
        self.max_attempts = None;
        self
    }

    /// The delay after the `attempts`th failed attempt of a request that is `age` old, or `None` to give up.
    /// `random` is drawn from 0 to 1.
    pub(crate) fn delay(&self, attempts: u32, age: Duration, random: f64) -> Option<Duration> {
        if self.max_attempts.is_some_and(|max| attempts >= max) {
            return None;
        }
        let doublings = attempts.saturating_sub(1).min(31);
        let bound = self.base.saturating_mul(1 << doublings).min(self.cap);
        let delay = bound.mul_f64(random.clamp(0.0, 1.0));
        match self.max_age {
            Some(max) if age >= max => None,
            // So that the whole time is used: the last attempt is made at its end.
            Some(max) => Some(delay.min(max - age)),
            None => Some(delay),
        }
    }

    pub(crate) fn validate(&self) -> Result<(), &'static str> {
        if self.base < Duration::from_millis(1) {
            return Err("the base must be at least one millisecond");
        }
        if self.cap < self.base {
            return Err("the cap is below the base");
        }
        if self.cap > MAX_DURATION || self.max_age.is_some_and(|age| age > MAX_DURATION) {
            return Err("longer than a hundred years; use `for_ever` for no limit");
        }
        if self.max_attempts == Some(0) {
            return Err("at least one attempt must be allowed");
        }
        Ok(())
    }

    pub(crate) fn check(&self, field: &'static str) -> Result<(), Error> {
        self.validate()
            .map_err(|reason| Error::request(field, reason))
    }
}

/// Durations stand in the database as whole milliseconds.
pub(crate) mod millis {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, Serializer};

    pub(crate) fn serialize<S: Serializer>(value: &Duration, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_u64(value.as_millis() as u64)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Duration, D::Error> {
        u64::deserialize(from).map(Duration::from_millis)
    }

    pub(crate) mod option {
        use super::{Deserialize, Deserializer, Duration, Serializer};

        #[allow(clippy::ref_option)] // the signature that serde calls
        pub(crate) fn serialize<S: Serializer>(
            value: &Option<Duration>,
            to: S,
        ) -> Result<S::Ok, S::Error> {
            match value {
                Some(value) => super::serialize(value, to),
                None => to.serialize_none(),
            }
        }

        pub(crate) fn deserialize<'de, D: Deserializer<'de>>(
            from: D,
        ) -> Result<Option<Duration>, D::Error> {
            Ok(Option::<u64>::deserialize(from)?.map(Duration::from_millis))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    #[test]
    fn bounds_double_up_to_the_cap() {
        let policy = RetryPolicy::exponential();
        let bound = |attempts| {
            policy
                .delay(attempts, Duration::ZERO, 1.0)
                .unwrap()
                .as_secs()
        };
        assert_eq!([1, 2, 3, 4, 9].map(bound), [1, 2, 4, 8, 256]);
        assert_eq!([10, 40, u32::MAX].map(bound), [300; 3]);
    }

    #[test]
    fn full_jitter_spreads_from_zero_to_the_bound() {
        let policy = RetryPolicy::exponential();
        let at = |random| policy.delay(3, Duration::ZERO, random).unwrap();
        assert_eq!(at(0.0), Duration::ZERO);
        assert_eq!(at(0.5), Duration::from_secs(2));
        assert_eq!(at(7.0), Duration::from_secs(4));
    }

    #[test]
    fn the_last_attempt_falls_on_the_end_of_the_allowed_age() {
        let policy = RetryPolicy::exponential().max_age(HOUR);
        let just_before = HOUR - Duration::from_secs(1);
        assert_eq!(
            policy.delay(20, just_before, 1.0),
            Some(Duration::from_secs(1))
        );
        assert_eq!(policy.delay(20, HOUR, 1.0), None);
    }

    #[test]
    fn attempts_are_counted_with_the_first() {
        assert_eq!(RetryPolicy::none().delay(1, Duration::ZERO, 0.5), None);
        let twice = RetryPolicy::exponential().max_attempts(2);
        assert!(twice.delay(1, Duration::ZERO, 0.5).is_some());
        assert!(twice.delay(2, Duration::ZERO, 0.5).is_none());
    }

    #[test]
    fn a_policy_survives_its_stored_form() {
        for policy in [
            RetryPolicy::awaited(),
            RetryPolicy::none(),
            RetryPolicy::exponential(),
        ] {
            let stored = serde_json::to_string(&policy).unwrap();
            assert_eq!(
                serde_json::from_str::<RetryPolicy>(&stored).unwrap(),
                policy
            );
        }
    }

    #[test]
    fn nonsense_is_refused() {
        assert!(
            RetryPolicy::awaited()
                .base(Duration::ZERO)
                .validate()
                .is_err()
        );
        assert!(
            RetryPolicy::awaited()
                .cap(Duration::from_millis(5))
                .validate()
                .is_err()
        );
        assert!(RetryPolicy::awaited().max_attempts(0).validate().is_err());
        assert!(
            RetryPolicy::awaited()
                .max_age(Duration::MAX)
                .validate()
                .is_err()
        );
        assert!(RetryPolicy::awaited().validate().is_ok());
    }
}
