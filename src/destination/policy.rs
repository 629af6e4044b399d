//! What a destination may be asked to take, and what happens when it fails.
//!
//! A policy is stored as JSON in the database, and processes of several releases read it. A field
//! that a release doesn't know is kept and ignored there. [`DestinationPolicy::validate`] refuses
//! it where a policy comes in, so that a misspelt field is noticed.

use std::collections::BTreeMap;
use std::time::Duration;

use http::StatusCode;
use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::retry::{MAX_DURATION, millis};

/// Fields that a newer release wrote.
pub(super) type Unknown = BTreeMap<String, serde_json::Value>;

/// Limits, circuit breaker and other rules for a destination: the scheme, host and port of a URL,
/// or a limit key.
///
/// The default limits nothing, has no circuit breaker and no retry budget, and never disables a
/// destination. It pauses a destination that answers 429 or 503 with a `Retry-After`.
/// [`webhooks`](Self::webhooks) is a preset for receivers that belong to others.
///
/// Setters accept any value. The call that gets the policy checks it. It returns an error that
/// names the field, such as `rate.burst`, if a value is invalid.
///
/// # Examples
///
/// ```
/// use std::time::Duration;
/// use requeuest::{CircuitBreaker, DestinationPolicy, RateLimit};
///
/// // A partner that allows 100 calls a minute, 10 of them at the same time.
/// let partner = DestinationPolicy::default()
///     .max_concurrency(10)
///     .rate(RateLimit::new(100, Duration::from_secs(60)).burst(20))
///     .circuit_breaker(CircuitBreaker::default().failure_share(0.8));
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct DestinationPolicy {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) max_concurrency: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) max_concurrency_per_process: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) rate: Option<RateLimit>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) circuit_breaker: Option<CircuitBreaker>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) retry_budget: Option<RetryBudget>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) auto_disable: Option<AutoDisable>,
    #[serde(rename = "max_retry_after_ms", with = "millis")]
    pub(crate) max_retry_after: Duration,
    throttle_on: Vec<u16>,
    #[serde(rename = "throttle_for_ms", with = "millis")]
    throttle_for: Duration,
    #[serde(flatten)]
    unknown: Unknown,
}

impl Default for DestinationPolicy {
    fn default() -> Self {
        Self {
            max_concurrency: None,
            max_concurrency_per_process: None,
            rate: None,
            circuit_breaker: None,
            retry_budget: None,
            auto_disable: None,
            max_retry_after: Self::DEFAULT_MAX_RETRY_AFTER,
            throttle_on: Self::DEFAULT_THROTTLE_ON.map(|s| s.as_u16()).to_vec(),
            throttle_for: Duration::ZERO,
            unknown: Unknown::new(),
        }
    }
}

impl DestinationPolicy {
    /// How long a `Retry-After` can pause a destination: one hour.
    pub const DEFAULT_MAX_RETRY_AFTER: Duration = Duration::from_secs(60 * 60);
    /// The statuses whose `Retry-After` pauses the destination: 429 and 503.
    pub const DEFAULT_THROTTLE_ON: [StatusCode; 2] = [
        StatusCode::TOO_MANY_REQUESTS,
        StatusCode::SERVICE_UNAVAILABLE,
    ];
    /// How long the [`webhooks`](Self::webhooks) preset pauses a destination that answers with a
    /// throttling status and no `Retry-After`: 5 seconds.
    pub const WEBHOOKS_THROTTLE_FOR: Duration = Duration::from_secs(5);
    /// For how long a destination must have failed before the [`webhooks`](Self::webhooks) preset
    /// disables it: 5 days.
    pub const WEBHOOKS_DISABLE_AFTER: Duration = Duration::from_secs(5 * 24 * 60 * 60);

    /// A preset for sending webhooks to receivers that belong to others, by the rules of the
    /// [Standard Webhooks] specification.
    ///
    /// - A 410 disables the destination at once.
    /// - Failures for [`WEBHOOKS_DISABLE_AFTER`](Self::WEBHOOKS_DISABLE_AFTER), at least one hour
    ///   apart, disable it too.
    /// - 429, 502, 503 and 504 pause it for as long as `Retry-After` says, or for
    ///   [`WEBHOOKS_THROTTLE_FOR`](Self::WEBHOOKS_THROTTLE_FOR).
    /// - The default [`CircuitBreaker`] and [`RetryBudget`] are on.
    ///
    /// [Standard Webhooks]: https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md
    pub fn webhooks() -> Self {
        const HOUR: Duration = Duration::from_secs(60 * 60);
        Self::default()
            .circuit_breaker(CircuitBreaker::default())
            .retry_budget(RetryBudget::default())
            .auto_disable(
                AutoDisable::after(Self::WEBHOOKS_DISABLE_AFTER)
                    .at_least_apart(HOUR)
                    .on_gone(true),
            )
            .throttle_on([
                StatusCode::TOO_MANY_REQUESTS,
                StatusCode::BAD_GATEWAY,
                StatusCode::SERVICE_UNAVAILABLE,
                StatusCode::GATEWAY_TIMEOUT,
            ])
            .throttle_for(Self::WEBHOOKS_THROTTLE_FOR)
    }

    /// How many attempts all processes together make at the same time. At least 1. Defaults to no
    /// limit.
    #[must_use]
    pub fn max_concurrency(mut self, attempts: u32) -> Self {
        self.max_concurrency = Some(attempts);
        self
    }

    /// How many attempts each process makes at the same time. At least 1. Defaults to no limit
    /// other than the destination's share of the process's attempts.
    #[must_use]
    pub fn max_concurrency_per_process(mut self, attempts: u32) -> Self {
        self.max_concurrency_per_process = Some(attempts);
        self
    }

    /// How many attempts all processes together begin in a period. Defaults to no limit.
    #[must_use]
    pub fn rate(mut self, limit: RateLimit) -> Self {
        self.rate = Some(limit);
        self
    }

    /// Stops attempts while most of them fail. Defaults to none.
    #[must_use]
    pub fn circuit_breaker(mut self, breaker: CircuitBreaker) -> Self {
        self.circuit_breaker = Some(breaker);
        self
    }

    /// Removes the circuit breaker of a preset.
    #[must_use]
    pub fn without_circuit_breaker(mut self) -> Self {
        self.circuit_breaker = None;
        self
    }

    /// Limits retries to a share of first attempts. Defaults to none.
    #[must_use]
    pub fn retry_budget(mut self, budget: RetryBudget) -> Self {
        self.retry_budget = Some(budget);
        self
    }

    /// Removes the retry budget of a preset.
    #[must_use]
    pub fn without_retry_budget(mut self) -> Self {
        self.retry_budget = None;
        self
    }

    /// Disables a destination that has failed for long. Its requests are kept until it is enabled.
    /// Defaults to off.
    #[must_use]
    pub fn auto_disable(mut self, rule: AutoDisable) -> Self {
        self.auto_disable = Some(rule);
        self
    }

    /// Removes the rule of a preset that disables destinations.
    #[must_use]
    pub fn without_auto_disable(mut self) -> Self {
        self.auto_disable = None;
        self
    }

    /// The longest pause that a `Retry-After` can ask for (RFC 9110 section 10.2.3). Zero ignores
    /// the header here, and [`throttle_for`](Self::throttle_for) too. A request's own delay is
    /// limited by [`RetryPolicy::max_retry_after`](crate::retry::RetryPolicy::max_retry_after).
    /// Defaults to [`DEFAULT_MAX_RETRY_AFTER`](Self::DEFAULT_MAX_RETRY_AFTER).
    #[must_use]
    pub fn max_retry_after(mut self, pause: Duration) -> Self {
        self.max_retry_after = pause;
        self
    }

    /// The statuses whose `Retry-After` pauses the destination for all of its requests. With other
    /// statuses the header delays only the request itself. Statuses below 300 are refused. Defaults
    /// to [`DEFAULT_THROTTLE_ON`](Self::DEFAULT_THROTTLE_ON).
    #[must_use]
    pub fn throttle_on(mut self, statuses: impl IntoIterator<Item = StatusCode>) -> Self {
        self.throttle_on = statuses.into_iter().map(|s| s.as_u16()).collect();
        self
    }

    /// How long a status of [`throttle_on`](Self::throttle_on) without a `Retry-After` pauses the
    /// destination. Defaults to zero: it doesn't.
    #[must_use]
    pub fn throttle_for(mut self, pause: Duration) -> Self {
        self.throttle_for = pause;
        self
    }

    /// How long a response with this status and `Retry-After` pauses the destination.
    pub(crate) fn throttle(
        &self,
        status: StatusCode,
        retry_after: Option<Duration>,
    ) -> Option<Duration> {
        if !self.throttle_on.contains(&status.as_u16()) {
            return None;
        }
        let pause = retry_after
            .unwrap_or(self.throttle_for)
            .min(self.max_retry_after);
        (!pause.is_zero()).then_some(pause)
    }

    /// Whether it limits attempts.
    pub(crate) fn has_limits(&self) -> bool {
        self.max_concurrency.is_some()
            || self.max_concurrency_per_process.is_some()
            || self.rate.is_some()
    }

    /// Whether a report of attempts can change the state of a destination that has none yet.
    pub(crate) fn watches_failures(&self) -> bool {
        self.circuit_breaker.is_some() || self.auto_disable.is_some()
    }

    /// Checks a policy that an application passes in. Policies read from the database aren't
    /// checked: all that use them cope with any value.
    pub(crate) fn validate(&self, attempt_timeout: Duration) -> Result<(), Error> {
        known("policy", &self.unknown)?;
        at_least_1("max_concurrency", self.max_concurrency.unwrap_or(1))?;
        at_least_1(
            "max_concurrency_per_process",
            self.max_concurrency_per_process.unwrap_or(1),
        )?;
        if let Some(rate) = &self.rate {
            rate.validate()?;
        }
        if let Some(breaker) = &self.circuit_breaker {
            breaker.validate(attempt_timeout)?;
        }
        if let Some(budget) = &self.retry_budget {
            budget.validate()?;
        }
        if let Some(rule) = &self.auto_disable {
            rule.validate()?;
        }
        not_too_long("max_retry_after", self.max_retry_after)?;
        not_too_long("throttle_for", self.throttle_for)?;
        check(
            "throttle_on",
            self.throttle_on.iter().all(|s| (300..1000).contains(s)),
            "must hold statuses from 300 to 999",
        )
    }
}

/// So many attempts a period, as a token bucket: tokens return evenly over the period, and up to
/// [`burst`](Self::burst) of them can be saved up.
///
/// # Examples
///
/// ```
/// use std::time::Duration;
/// use requeuest::RateLimit;
///
/// // 5 a second, and no more than 5 at once.
/// let limit = RateLimit::new(5, Duration::from_secs(1));
/// // 3,600 an hour, evenly.
/// let even = RateLimit::new(3600, Duration::from_secs(3600)).burst(1);
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RateLimit {
    pub(crate) count: u32,
    #[serde(rename = "per_ms", with = "millis")]
    pub(crate) per: Duration,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    burst: Option<u32>,
    #[serde(flatten)]
    unknown: Unknown,
}

impl RateLimit {
    /// At most `count` attempts per period. The count must be at least 1, the period at least one
    /// millisecond.
    pub fn new(count: u32, per: Duration) -> Self {
        Self {
            count,
            per,
            burst: None,
            unknown: Unknown::new(),
        }
    }

    /// How many attempts can begin at once after a quiet time. At least 1. Defaults to the count.
    #[must_use]
    pub fn burst(mut self, attempts: u32) -> Self {
        self.burst = Some(attempts);
        self
    }

    /// The size of the bucket: the burst, or the count.
    pub(crate) fn bucket(&self) -> u32 {
        self.burst.unwrap_or(self.count).max(1)
    }

    fn validate(&self) -> Result<(), Error> {
        known("rate", &self.unknown)?;
        at_least_1("rate.count", self.count)?;
        at_least_1("rate.burst", self.burst.unwrap_or(1))?;
        positive("rate.per", self.per)
    }
}

/// Stops the attempts to a destination while most of them fail.
///
/// The breaker opens when at least [`min_attempts`](Self::min_attempts) ended within the
/// [`window`](Self::window) and the [`failure_share`](Self::failure_share) of them failed. While it
/// is open no request is sent. After [`open_for`](Self::open_for) it is half-open: so many
/// [`probes`](Self::probes) at a time are sent. Enough [`successes`](Self::successes) close it. A
/// failed probe opens it for twice as long as before, up to [`max_open_for`](Self::max_open_for).
/// All processes share one breaker for each destination.
///
/// A forward proxy that can't be reached, breaks off or asks for credentials is no failure of the
/// destination. This holds for `https` destinations, which are reached through a tunnel, and for
/// SOCKS proxies. A request to an `http` destination goes to an HTTP proxy as it would go to the
/// destination. So there, apart from a 407, the proxy's failures count as the destination's. With
/// either scheme, so do a proxy's refusals and time-outs, because the destination may be their
/// cause.
///
/// # Examples
///
/// ```
/// use std::time::Duration;
/// use requeuest::CircuitBreaker;
///
/// let strict = CircuitBreaker::default().failure_share(0.25).open_for(Duration::from_secs(30));
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct CircuitBreaker {
    pub(crate) failure_share: f64,
    #[serde(rename = "window_ms", with = "millis")]
    pub(crate) window: Duration,
    pub(crate) min_attempts: u32,
    #[serde(rename = "open_for_ms", with = "millis")]
    pub(crate) open_for: Duration,
    #[serde(rename = "max_open_for_ms", with = "millis")]
    pub(crate) max_open_for: Duration,
    pub(crate) probes: u32,
    pub(crate) successes: u32,
    #[serde(flatten)]
    unknown: Unknown,
}

impl Default for CircuitBreaker {
    fn default() -> Self {
        Self {
            failure_share: Self::DEFAULT_FAILURE_SHARE,
            window: Self::DEFAULT_WINDOW,
            min_attempts: Self::DEFAULT_MIN_ATTEMPTS,
            open_for: Self::DEFAULT_OPEN_FOR,
            max_open_for: Self::DEFAULT_MAX_OPEN_FOR,
            probes: Self::DEFAULT_PROBES,
            successes: Self::DEFAULT_SUCCESSES,
            unknown: Unknown::new(),
        }
    }
}

impl CircuitBreaker {
    /// The share of failures that opens the breaker: one half.
    pub const DEFAULT_FAILURE_SHARE: f64 = 0.5;
    /// The time over which attempts are counted: one minute.
    pub const DEFAULT_WINDOW: Duration = Duration::from_secs(60);
    /// The number of attempts below which the breaker doesn't open: 20.
    pub const DEFAULT_MIN_ATTEMPTS: u32 = 20;
    /// How long the breaker is open at first: 5 seconds.
    pub const DEFAULT_OPEN_FOR: Duration = Duration::from_secs(5);
    /// How long the breaker is open at most: 5 minutes.
    pub const DEFAULT_MAX_OPEN_FOR: Duration = Duration::from_secs(5 * 60);
    /// How many probes are sent at a time: 1.
    pub const DEFAULT_PROBES: u32 = 1;
    /// How many probes must succeed: 2.
    pub const DEFAULT_SUCCESSES: u32 = 2;

    /// The share of attempts that must fail, above 0 and at most 1. Defaults to
    /// [`DEFAULT_FAILURE_SHARE`](Self::DEFAULT_FAILURE_SHARE).
    #[must_use]
    pub fn failure_share(mut self, share: f64) -> Self {
        self.failure_share = share;
        self
    }

    /// The time over which attempts are counted, to about a sixth of it. At least one second, and
    /// not shorter than the attempt timeout: attempts that time out would not be counted together.
    /// Defaults to [`DEFAULT_WINDOW`](Self::DEFAULT_WINDOW).
    #[must_use]
    pub fn window(mut self, window: Duration) -> Self {
        self.window = window;
        self
    }

    /// The number of attempts within the window below which the breaker doesn't open. At least 1.
    /// Defaults to [`DEFAULT_MIN_ATTEMPTS`](Self::DEFAULT_MIN_ATTEMPTS).
    #[must_use]
    pub fn min_attempts(mut self, attempts: u32) -> Self {
        self.min_attempts = attempts;
        self
    }

    /// How long the breaker is open before the first probe. At least one millisecond. Defaults to
    /// [`DEFAULT_OPEN_FOR`](Self::DEFAULT_OPEN_FOR).
    #[must_use]
    pub fn open_for(mut self, time: Duration) -> Self {
        self.open_for = time;
        self
    }

    /// How long the breaker is open at most, after many failed probes. Not below
    /// [`open_for`](Self::open_for). Defaults to
    /// [`DEFAULT_MAX_OPEN_FOR`](Self::DEFAULT_MAX_OPEN_FOR).
    #[must_use]
    pub fn max_open_for(mut self, time: Duration) -> Self {
        self.max_open_for = time;
        self
    }

    /// How many probes are sent at a time while the breaker is half-open. At least 1. Defaults to
    /// [`DEFAULT_PROBES`](Self::DEFAULT_PROBES).
    #[must_use]
    pub fn probes(mut self, probes: u32) -> Self {
        self.probes = probes;
        self
    }

    /// How many probes must succeed before the breaker closes. At least 1. Defaults to
    /// [`DEFAULT_SUCCESSES`](Self::DEFAULT_SUCCESSES).
    #[must_use]
    pub fn successes(mut self, successes: u32) -> Self {
        self.successes = successes;
        self
    }

    fn validate(&self, attempt_timeout: Duration) -> Result<(), Error> {
        const WINDOW: &str = "circuit_breaker.window";
        known("circuit_breaker", &self.unknown)?;
        share("circuit_breaker.failure_share", self.failure_share)?;
        check(
            WINDOW,
            self.window >= Duration::from_secs(1),
            "must be at least one second",
        )?;
        check(
            WINDOW,
            self.window >= attempt_timeout,
            "must not be shorter than the attempt timeout",
        )?;
        not_too_long(WINDOW, self.window)?;
        at_least_1("circuit_breaker.min_attempts", self.min_attempts)?;
        positive("circuit_breaker.open_for", self.open_for)?;
        positive("circuit_breaker.max_open_for", self.max_open_for)?;
        check(
            "circuit_breaker.max_open_for",
            self.max_open_for >= self.open_for,
            "must not be below `open_for`",
        )?;
        at_least_1("circuit_breaker.probes", self.probes)?;
        at_least_1("circuit_breaker.successes", self.successes)
    }
}

/// How many retries a process sends to a destination, measured by its first attempts: a
/// [`share`](Self::share) of them, and some [`per_second`](Self::per_second) more.
///
/// This is decided when a retry is about to be sent, so that a destination which has recovered
/// isn't met by all retries at once. A retry over the budget waits, and uses up no attempt. The
/// wait doesn't count in the request's [`max_age`](crate::retry::RetryPolicy::max_age), unless a
/// caller waits for the response. Each process counts its own attempts.
///
/// # Examples
///
/// ```
/// use requeuest::RetryBudget;
///
/// let careful = RetryBudget::default().share(0.1).per_second(1);
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct RetryBudget {
    pub(crate) share: f64,
    pub(crate) per_second: u32,
    #[serde(rename = "window_ms", with = "millis")]
    pub(crate) window: Duration,
    #[serde(flatten)]
    unknown: Unknown,
}

impl Default for RetryBudget {
    fn default() -> Self {
        Self {
            share: Self::DEFAULT_SHARE,
            per_second: Self::DEFAULT_PER_SECOND,
            window: Self::DEFAULT_WINDOW,
            unknown: Unknown::new(),
        }
    }
}

impl RetryBudget {
    /// The retries allowed for each first attempt: 20 %.
    pub const DEFAULT_SHARE: f64 = 0.2;
    /// The retries a second that are always allowed: 10.
    pub const DEFAULT_PER_SECOND: u32 = 10;
    /// The time over which attempts are counted: 10 seconds.
    pub const DEFAULT_WINDOW: Duration = Duration::from_secs(10);

    /// The retries allowed for each first attempt, above 0 and at most 1. Defaults to
    /// [`DEFAULT_SHARE`](Self::DEFAULT_SHARE).
    #[must_use]
    pub fn share(mut self, share: f64) -> Self {
        self.share = share;
        self
    }

    /// The retries a second, on average over the window, that are allowed without first attempts.
    /// At least 1: without any, a destination that gets no new requests would get no retries
    /// either. Defaults to [`DEFAULT_PER_SECOND`](Self::DEFAULT_PER_SECOND).
    #[must_use]
    pub fn per_second(mut self, retries: u32) -> Self {
        self.per_second = retries;
        self
    }

    /// The time over which attempts are counted, to about a tenth of it. At least one second.
    /// Defaults to [`DEFAULT_WINDOW`](Self::DEFAULT_WINDOW).
    #[must_use]
    pub fn window(mut self, window: Duration) -> Self {
        self.window = window;
        self
    }

    fn validate(&self) -> Result<(), Error> {
        known("retry_budget", &self.unknown)?;
        share("retry_budget.share", self.share)?;
        at_least_1("retry_budget.per_second", self.per_second)?;
        check(
            "retry_budget.window",
            self.window >= Duration::from_secs(1),
            "must be at least one second",
        )?;
        not_too_long("retry_budget.window", self.window)
    }
}

/// When a destination that only fails is disabled.
///
/// It is disabled once it has failed for [`after`](Self::after) without a success, and enough
/// [`failures`](Self::failures) were [`at_least_apart`](Self::at_least_apart). So one bad hour
/// never disables it, however many requests failed then. A time without any attempt counts only as
/// the part of `after` that lies between two of the required failures.
///
/// # Examples
///
/// ```
/// use std::time::Duration;
/// use requeuest::AutoDisable;
///
/// const HOUR: Duration = Duration::from_secs(3600);
/// let after_two_days = AutoDisable::after(48 * HOUR).at_least_apart(HOUR).failures(10);
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AutoDisable {
    #[serde(rename = "after_ms", with = "millis")]
    pub(crate) after: Duration,
    #[serde(
        rename = "at_least_apart_ms",
        with = "millis::option",
        default,
        skip_serializing_if = "Option::is_none"
    )]
    at_least_apart: Option<Duration>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    failures: Option<u32>,
    #[serde(default)]
    pub(crate) on_gone: bool,
    #[serde(flatten)]
    unknown: Unknown,
}

impl AutoDisable {
    /// How far apart failures must be to be counted, at most: one hour.
    pub const DEFAULT_AT_LEAST_APART: Duration = Duration::from_secs(60 * 60);
    /// How many such failures there must be, at most: 5.
    pub const DEFAULT_FAILURES: u32 = 5;

    /// Disables a destination that has failed for this long. At least one millisecond.
    pub fn after(time: Duration) -> Self {
        Self {
            after: time,
            at_least_apart: None,
            failures: None,
            on_gone: false,
            unknown: Unknown::new(),
        }
    }

    /// Counts a failure only if it comes so long after the last counted one. At least one
    /// millisecond. Defaults to a tenth of [`after`](Self::after), and to at most
    /// [`DEFAULT_AT_LEAST_APART`](Self::DEFAULT_AT_LEAST_APART).
    #[must_use]
    pub fn at_least_apart(mut self, time: Duration) -> Self {
        self.at_least_apart = Some(time);
        self
    }

    /// How many counted failures there must be. At least 2, and no more than fit into
    /// [`after`](Self::after). Defaults to [`DEFAULT_FAILURES`](Self::DEFAULT_FAILURES), or to as
    /// many as fit.
    #[must_use]
    pub fn failures(mut self, failures: u32) -> Self {
        self.failures = Some(failures);
        self
    }

    /// Whether a 410 (Gone) disables the destination at once. Defaults to `false`.
    #[must_use]
    pub fn on_gone(mut self, disable: bool) -> Self {
        self.on_gone = disable;
        self
    }

    /// How far apart failures must be to be counted.
    pub(crate) fn apart(&self) -> Duration {
        self.at_least_apart
            .unwrap_or((self.after / 10).min(Self::DEFAULT_AT_LEAST_APART))
            .max(Duration::from_millis(1))
    }

    /// How many counted failures there must be.
    pub(crate) fn min_failures(&self) -> u32 {
        let fitting = self.fitting().min(u128::from(Self::DEFAULT_FAILURES)) as u32;
        self.failures.unwrap_or(fitting).max(2)
    }

    /// How many failures that far apart there are within the time.
    fn fitting(&self) -> u128 {
        self.after.as_millis() / self.apart().as_millis().max(1) + 1
    }

    fn validate(&self) -> Result<(), Error> {
        known("auto_disable", &self.unknown)?;
        positive("auto_disable.after", self.after)?;
        positive("auto_disable.at_least_apart", self.apart())?;
        check(
            "auto_disable.at_least_apart",
            self.at_least_apart.is_none_or(|apart| !apart.is_zero()),
            "must be at least one millisecond",
        )?;
        check(
            "auto_disable.at_least_apart",
            self.apart() <= self.after,
            "must not be longer than `after`",
        )?;
        if let Some(failures) = self.failures {
            check("auto_disable.failures", failures >= 2, "must be at least 2")?;
            check(
                "auto_disable.failures",
                u128::from(failures) <= self.fitting(),
                "must fit into `after`, when they are `at_least_apart`",
            )?;
        }
        Ok(())
    }
}

fn check(field: &'static str, is_valid: bool, reason: &'static str) -> Result<(), Error> {
    if is_valid {
        Ok(())
    } else {
        Err(Error::config(field, reason))
    }
}

fn known(field: &'static str, unknown: &Unknown) -> Result<(), Error> {
    match unknown.keys().next() {
        None => Ok(()),
        Some(name) => {
            let name: String = name.chars().take(64).collect();
            let reason = format!("this version knows no field {name:?}");
            Err(Error::config(field, reason))
        }
    }
}

fn at_least_1(field: &'static str, value: u32) -> Result<(), Error> {
    check(field, value >= 1, "must be at least 1")
}

fn share(field: &'static str, share: f64) -> Result<(), Error> {
    // Not a number fails both comparisons.
    let is_valid = share > 0.0 && share <= 1.0;
    check(field, is_valid, "must be above 0 and at most 1")
}

fn positive(field: &'static str, time: Duration) -> Result<(), Error> {
    check(
        field,
        time >= Duration::from_millis(1),
        "must be at least one millisecond",
    )?;
    not_too_long(field, time)
}

fn not_too_long(field: &'static str, time: Duration) -> Result<(), Error> {
    check(
        field,
        time <= MAX_DURATION,
        "must be at most a hundred years",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);
    const HOUR: Duration = Duration::from_secs(3600);

    fn policy() -> DestinationPolicy {
        DestinationPolicy::default()
    }

    fn stored(policy: &DestinationPolicy) -> DestinationPolicy {
        serde_json::from_str(&serde_json::to_string(policy).unwrap()).unwrap()
    }

    #[test]
    fn policies_survive_their_stored_form() {
        let full = policy()
            .max_concurrency(3)
            .max_concurrency_per_process(2)
            .rate(RateLimit::new(7, SECOND).burst(9))
            .circuit_breaker(
                CircuitBreaker::default()
                    .failure_share(0.3)
                    .window(7 * SECOND)
                    .min_attempts(3)
                    .open_for(SECOND)
                    .max_open_for(2 * SECOND)
                    .probes(4)
                    .successes(5),
            )
            .retry_budget(RetryBudget::default().share(0.7).per_second(3).window(HOUR))
            .auto_disable(
                AutoDisable::after(9 * HOUR)
                    .at_least_apart(HOUR)
                    .failures(4)
                    .on_gone(true),
            )
            .max_retry_after(5 * SECOND)
            .throttle_on([StatusCode::IM_A_TEAPOT])
            .throttle_for(SECOND);
        for policy in [policy(), DestinationPolicy::webhooks(), full] {
            policy.validate(SECOND).unwrap();
            assert_eq!(stored(&policy), policy);
        }
    }

    #[test]
    fn a_stored_policy_with_few_fields_has_the_defaults() {
        let read = |text| serde_json::from_str::<DestinationPolicy>(text);
        assert_eq!(read("{}").unwrap(), policy());
        let breaker = CircuitBreaker::default().probes(3);
        assert_eq!(
            read(r#"{"circuit_breaker": {"probes": 3}}"#).unwrap(),
            policy().circuit_breaker(breaker)
        );
        assert!(read(r#"{"rate": {"count": 3}}"#).is_err());
        assert!(read(r#"{"max_concurrency": -1}"#).is_err());
    }

    #[test]
    fn fields_of_a_newer_release_are_kept_and_refused_as_input() {
        for (field, text) in [
            ("policy", r#"{"hedge": {"after_ms": 5}}"#),
            ("rate", r#"{"rate": {"count": 1, "per_ms": 1, "hedge": 1}}"#),
            ("circuit_breaker", r#"{"circuit_breaker": {"hedge": null}}"#),
            ("retry_budget", r#"{"retry_budget": {"hedge": []}}"#),
            (
                "auto_disable",
                r#"{"auto_disable": {"after_ms": 1, "hedge": 1}}"#,
            ),
        ] {
            let policy: DestinationPolicy = serde_json::from_str(text).unwrap();
            let rewritten = serde_json::to_string(&policy).unwrap();
            assert!(rewritten.contains("hedge"), "{rewritten}");
            assert_eq!(stored(&policy), policy);
            let error = policy.validate(SECOND).unwrap_err();
            assert_eq!(error.field(), Some(field));
            assert!(error.to_string().contains("hedge"), "{error}");
        }
    }

    #[test]
    fn the_default_limits_nothing_and_honours_retry_after() {
        let policy = policy();
        assert!(!policy.has_limits() && !policy.watches_failures());
        assert!(policy.retry_budget.is_none());
        let asked = |status: u16, after| {
            let status = StatusCode::from_u16(status).unwrap();
            policy.throttle(status, after)
        };
        assert_eq!(asked(429, Some(SECOND)), Some(SECOND));
        assert_eq!(asked(503, Some(9 * HOUR)), Some(HOUR));
        assert_eq!(asked(503, Some(Duration::ZERO)), None);
        assert_eq!(asked(503, None), None);
        assert_eq!(asked(500, Some(SECOND)), None);
        let deaf = policy.clone().max_retry_after(Duration::ZERO);
        assert_eq!(
            deaf.throttle(StatusCode::TOO_MANY_REQUESTS, Some(SECOND)),
            None
        );
    }

    #[test]
    fn the_webhooks_preset_follows_the_standard() {
        let policy = DestinationPolicy::webhooks();
        let rule = policy.auto_disable.as_ref().unwrap();
        assert!(rule.on_gone);
        assert_eq!((rule.after, rule.apart()), (120 * HOUR, HOUR));
        assert!(policy.circuit_breaker.is_some() && policy.retry_budget.is_some());
        for status in [429, 502, 503, 504] {
            let status = StatusCode::from_u16(status).unwrap();
            assert_eq!(policy.throttle(status, None), Some(5 * SECOND));
            assert_eq!(policy.throttle(status, Some(SECOND)), Some(SECOND));
        }
        let quiet = policy
            .without_auto_disable()
            .without_circuit_breaker()
            .without_retry_budget();
        assert!(!quiet.watches_failures() && quiet.retry_budget.is_none());
    }

    #[test]
    fn the_rule_that_disables_has_defaults_that_fit() {
        for seconds in [1, 60, 3600, 86_400, 432_000] {
            let rule = AutoDisable::after(Duration::from_secs(seconds));
            rule.validate().unwrap();
            assert_eq!(rule.min_failures(), 5);
        }
        let wide = AutoDisable::after(3 * HOUR).at_least_apart(2 * HOUR);
        wide.validate().unwrap();
        assert_eq!(wide.min_failures(), 2);
    }

    #[test]
    fn bad_settings_are_refused_by_name() {
        let breaker = CircuitBreaker::default;
        let budget = RetryBudget::default;
        let mut cases = vec![
            ("max_concurrency", policy().max_concurrency(0)),
            (
                "max_concurrency_per_process",
                policy().max_concurrency_per_process(0),
            ),
            ("max_retry_after", policy().max_retry_after(Duration::MAX)),
            ("throttle_for", policy().throttle_for(Duration::MAX)),
            ("throttle_on", policy().throttle_on([StatusCode::OK])),
        ];
        for (field, rate) in [
            ("rate.count", RateLimit::new(0, SECOND)),
            ("rate.burst", RateLimit::new(1, SECOND).burst(0)),
            ("rate.per", RateLimit::new(1, Duration::ZERO)),
            ("rate.per", RateLimit::new(1, Duration::from_nanos(1))),
            ("rate.per", RateLimit::new(1, Duration::MAX)),
        ] {
            cases.push((field, policy().rate(rate)));
        }
        for (field, breaker) in [
            (
                "circuit_breaker.failure_share",
                breaker().failure_share(0.0),
            ),
            (
                "circuit_breaker.failure_share",
                breaker().failure_share(1.1),
            ),
            (
                "circuit_breaker.failure_share",
                breaker().failure_share(f64::NAN),
            ),
            ("circuit_breaker.window", breaker().window(Duration::ZERO)),
            ("circuit_breaker.window", breaker().window(29 * SECOND)),
            ("circuit_breaker.window", breaker().window(Duration::MAX)),
            ("circuit_breaker.min_attempts", breaker().min_attempts(0)),
            (
                "circuit_breaker.open_for",
                breaker().open_for(Duration::ZERO),
            ),
            ("circuit_breaker.max_open_for", breaker().open_for(HOUR)),
            (
                "circuit_breaker.max_open_for",
                breaker().max_open_for(Duration::MAX),
            ),
            ("circuit_breaker.probes", breaker().probes(0)),
            ("circuit_breaker.successes", breaker().successes(0)),
        ] {
            cases.push((field, policy().circuit_breaker(breaker)));
        }
        for (field, budget) in [
            ("retry_budget.share", budget().share(-0.1)),
            ("retry_budget.share", budget().share(f64::INFINITY)),
            ("retry_budget.per_second", budget().per_second(0)),
            ("retry_budget.window", budget().window(SECOND / 2)),
            ("retry_budget.window", budget().window(Duration::MAX)),
        ] {
            cases.push((field, policy().retry_budget(budget)));
        }
        let day = AutoDisable::after(24 * HOUR);
        for (field, rule) in [
            ("auto_disable.after", AutoDisable::after(Duration::ZERO)),
            ("auto_disable.after", AutoDisable::after(Duration::MAX)),
            (
                "auto_disable.at_least_apart",
                day.clone().at_least_apart(Duration::ZERO),
            ),
            (
                "auto_disable.at_least_apart",
                day.clone().at_least_apart(25 * HOUR),
            ),
            ("auto_disable.failures", day.clone().failures(1)),
            ("auto_disable.failures", day.clone().failures(26)),
        ] {
            cases.push((field, policy().auto_disable(rule)));
        }
        for (field, policy) in cases {
            let error = policy.validate(30 * SECOND).unwrap_err();
            assert!(error.is_config());
            assert_eq!(error.field(), Some(field), "{policy:?}");
        }
        let fitting = day.at_least_apart(HOUR).failures(25);
        policy().auto_disable(fitting).validate(SECOND).unwrap();
    }
}
