//! The retry policy. It is pure: time and randomness are arguments.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::millis;
use crate::error::Error;
use crate::redact::panic_text;

/// The upper bound of the first delay: one second.
pub const DEFAULT_BASE: Duration = Duration::from_secs(1);
/// The factor between one bound and the next: two.
pub const DEFAULT_FACTOR: f64 = 2.0;
/// The largest bound: five minutes.
pub const DEFAULT_CAP: Duration = Duration::from_secs(5 * 60);
/// How long an awaited request is retried: five minutes after its first attempt.
pub const DEFAULT_AWAITED_AGE: Duration = Duration::from_secs(5 * 60);
/// How long a fired request is retried: 24 hours after its first attempt.
pub const DEFAULT_FIRED_AGE: Duration = Duration::from_secs(24 * 60 * 60);
/// How far a response's `Retry-After` can raise a delay: one hour.
pub const DEFAULT_MAX_RETRY_AFTER: Duration = Duration::from_secs(60 * 60);

/// No duration may exceed a hundred years, which is far below the limits of `interval` and
/// `timestamptz`.
pub(crate) const MAX_DURATION: Duration = Duration::from_secs(100 * 365 * 24 * 60 * 60);

/// The schedule is stored with each request, so its length is limited.
const MAX_SCHEDULE: usize = 1000;
/// Delays are stored in whole milliseconds.
const MIN_DELAY: Duration = Duration::from_millis(1);

/// How often, for how long and how fast a request is retried. See the [module](super) for the
/// defaults.
///
/// The policy is stored with the request, so that any process can continue with it. Setters accept
/// any value. [`DurableBuilder::build`](crate::DurableBuilder::build), or the call that the
/// [`Options`](crate::Options) are passed to, checks the policy. It returns an error that names the
/// field `retry` if a value is invalid, if values contradict each other, or if a setter doesn't
/// apply to this kind of policy.
///
/// # Examples
///
/// ```
/// use std::time::Duration;
/// use requeuest::retry::{Jitter, RetryPolicy};
///
/// let gentle = RetryPolicy::exponential().factor(1.5).jitter(Jitter::Equal).max_attempts(10);
///
/// const MINUTE: u64 = 60;
/// let webhooks = RetryPolicy::schedule(
///     [5, 5 * MINUTE, 30 * MINUTE, 120 * MINUTE, 300 * MINUTE].map(Duration::from_secs),
/// );
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RetryPolicy {
    delays: Delays,
    jitter: Jitter,
    #[serde(
        rename = "max_age_ms",
        with = "millis::option",
        default,
        skip_serializing_if = "Option::is_none"
    )]
    max_age: Option<Duration>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    max_attempts: Option<u32>,
    #[serde(
        rename = "max_retry_after_ms",
        with = "millis::option",
        default,
        skip_serializing_if = "Option::is_none"
    )]
    max_retry_after: Option<Duration>,
    /// A setter was called that doesn't apply to this kind of policy.
    #[serde(skip)]
    misused: Option<&'static str>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
enum Delays {
    Exponential {
        #[serde(rename = "base_ms", with = "millis")]
        base: Duration,
        factor: f64,
        #[serde(rename = "cap_ms", with = "millis")]
        cap: Duration,
    },
    #[serde(rename = "schedule_ms", with = "millis::list")]
    Schedule(Vec<Duration>),
    #[serde(rename = "constant_ms", with = "millis")]
    Constant(Duration),
    None,
    /// A function can't be stored: each process that continues with the request has its own.
    FromFn(#[serde(skip)] Option<Function>),
}

/// How much of a delay is random.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Jitter {
    /// All of it: evenly between zero and the bound. Spreads requests that failed together best.
    Full,
    /// The second half: evenly between half of the bound and the bound. Never retries at once.
    Equal,
    /// None of it: the delay is the bound.
    None,
}

impl Jitter {
    fn apply(self, bound: Duration, random: f64) -> Duration {
        let random = random.clamp(0.0, 1.0);
        match self {
            Self::Full => bound.mul_f64(random),
            Self::Equal => bound / 2 + (bound - bound / 2).mul_f64(random),
            Self::None => bound,
        }
        // Rounding must not exceed the bound.
        .min(bound)
    }
}

/// The argument of a [`RetryPolicy::from_fn`] function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Retry {
    /// How many attempts have been made. At least 1.
    pub attempts: u32,
    /// The time since the first attempt, as [`RetryPolicy::max_age`] counts it.
    pub age: Duration,
}

impl Retry {
    pub(crate) fn new(attempts: u32, age: Duration) -> Self {
        Self { attempts, age }
    }
}

/// A caller's function that computes delays.
#[derive(Clone)]
pub(crate) struct Function(Arc<dyn Fn(Retry) -> Option<Duration> + Send + Sync>);

impl Function {
    /// Returns the text of a panic as `Err`. A panic must not escape: it would end more than this
    /// request's attempt.
    fn call(&self, retry: Retry) -> Result<Option<Duration>, String> {
        catch_unwind(AssertUnwindSafe(|| (self.0)(retry))).map_err(|panic| panic_text(&*panic))
    }
}

impl fmt::Debug for Function {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Function")
    }
}

impl PartialEq for Function {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl RetryPolicy {
    fn new(delays: Delays, jitter: Jitter) -> Self {
        Self {
            delays,
            jitter,
            max_age: None,
            max_attempts: None,
            max_retry_after: None,
            misused: None,
        }
    }

    /// Exponential delays with full jitter and no limit.
    pub fn exponential() -> Self {
        let delays = Delays::Exponential {
            base: DEFAULT_BASE,
            factor: DEFAULT_FACTOR,
            cap: DEFAULT_CAP,
        };
        Self::new(delays, Jitter::Full)
    }

    /// The default for awaited requests: [`exponential`](Self::exponential) for
    /// [`DEFAULT_AWAITED_AGE`].
    pub fn awaited() -> Self {
        Self::exponential().max_age(DEFAULT_AWAITED_AGE)
    }

    /// The default for fired requests: [`exponential`](Self::exponential) for
    /// [`DEFAULT_FIRED_AGE`].
    pub fn fired() -> Self {
        Self::exponential().max_age(DEFAULT_FIRED_AGE)
    }

    /// What [Standard Webhooks](https://www.standardwebhooks.com) recommends: 5 seconds, 5 and 30
    /// minutes, 2, 5, 10, 14, 20 and 24 hours, with [equal jitter](Jitter::Equal). The last attempt
    /// is up to 76 hours after the first.
    pub fn webhooks() -> Self {
        const HOUR: u64 = 60 * 60;
        let delays = [
            5,
            5 * 60,
            HOUR / 2,
            2 * HOUR,
            5 * HOUR,
            10 * HOUR,
            14 * HOUR,
            20 * HOUR,
            24 * HOUR,
        ];
        Self::schedule(delays.map(Duration::from_secs)).jitter(Jitter::Equal)
    }

    /// These delays in order, then no more: one attempt more than there are delays. No jitter
    /// unless set. 1 to 1,000 delays of at least one millisecond.
    pub fn schedule(delays: impl IntoIterator<Item = Duration>) -> Self {
        Self::new(Delays::Schedule(delays.into_iter().collect()), Jitter::None)
    }

    /// The same delay each time, with no limit. No jitter unless set. At least one millisecond.
    pub fn constant(delay: Duration) -> Self {
        Self::new(Delays::Constant(delay), Jitter::None)
    }

    /// A single attempt, whatever its result. No setter applies.
    pub fn none() -> Self {
        Self::new(Delays::None, Jitter::None)
    }

    /// The delays that a function returns, until it returns `None`. Only for
    /// [`DurableBuilder::retry`](crate::DurableBuilder::retry).
    ///
    /// A function can't be stored with the request. A process that continues with the request calls
    /// the function that its own builder was given. If its builder has none, or the function
    /// panics, the delays are those of [`exponential`](Self::exponential), and a policy without
    /// limits gets the limit of [`fired`](Self::fired). The function must not block. Delays above a
    /// hundred years are cut to a hundred years.
    ///
    /// # Examples
    ///
    /// ```
    /// use std::time::Duration;
    /// use requeuest::retry::{Retry, RetryPolicy};
    ///
    /// // Every second at first, then every minute, for a day.
    /// let policy = RetryPolicy::from_fn(|Retry { attempts, .. }| {
    ///     Some(Duration::from_secs(if attempts < 10 { 1 } else { 60 }))
    /// })
    /// .max_age(Duration::from_secs(24 * 60 * 60));
    /// ```
    pub fn from_fn(function: impl Fn(Retry) -> Option<Duration> + Send + Sync + 'static) -> Self {
        Self::new(
            Delays::FromFn(Some(Function(Arc::new(function)))),
            Jitter::None,
        )
    }

    /// The bound of the first delay of an exponential policy. Must be at least one millisecond.
    /// Defaults to [`DEFAULT_BASE`].
    #[must_use]
    pub fn base(mut self, value: Duration) -> Self {
        match &mut self.delays {
            Delays::Exponential { base, .. } => *base = value,
            _ => self.misused = Some("`base` applies to exponential policies only"),
        }
        self
    }

    /// The factor between one bound of an exponential policy and the next. Must be a number of at
    /// least 1. Defaults to [`DEFAULT_FACTOR`].
    #[must_use]
    pub fn factor(mut self, value: f64) -> Self {
        match &mut self.delays {
            Delays::Exponential { factor, .. } => *factor = value,
            _ => self.misused = Some("`factor` applies to exponential policies only"),
        }
        self
    }

    /// The largest bound of an exponential policy. Must not be below the base. Defaults to
    /// [`DEFAULT_CAP`].
    #[must_use]
    pub fn cap(mut self, value: Duration) -> Self {
        match &mut self.delays {
            Delays::Exponential { cap, .. } => *cap = value,
            _ => self.misused = Some("`cap` applies to exponential policies only"),
        }
        self
    }

    /// How much of each delay is random. Not for [`from_fn`](Self::from_fn), whose function can add
    /// its own jitter. Defaults to [`Jitter::Full`] for exponential policies and to
    /// [`Jitter::None`] for others.
    #[must_use]
    pub fn jitter(mut self, jitter: Jitter) -> Self {
        match self.delays {
            Delays::None | Delays::FromFn(_) => {
                self.misused = Some("`jitter` doesn't apply to `none` or `from_fn`");
            }
            _ => self.jitter = jitter,
        }
        self
    }

    /// How long after its first attempt a request is retried. The last attempt falls on the end of
    /// that time. Zero means one attempt.
    ///
    /// Time before the first attempt doesn't count: a [`delay`](crate::Options::delay), waiting
    /// behind an [ordering key](crate::Options::ordered), or without a runner. Later, these don't
    /// count either, unless a caller waits for the response:
    ///
    /// - time for which no runner comes
    /// - time for which the destination takes nothing: it is paused, disabled, over a limit, or its
    ///   circuit breaker is open
    /// - time for which the destination has no [retry budget](crate::RetryBudget)
    ///
    /// If a caller waits, all time counts. A request that such a wait has made too old still gets
    /// one more attempt. [`Options::deadline`](crate::Options::deadline) is a limit that always
    /// counts.
    #[must_use]
    pub fn max_age(mut self, age: Duration) -> Self {
        self.max_age = Some(age);
        self.misused_if_none("`max_age` doesn't apply to `none`")
    }

    /// How many attempts are made in total, including the first. Must be at least one.
    #[must_use]
    pub fn max_attempts(mut self, attempts: u32) -> Self {
        self.max_attempts = Some(attempts);
        self.misused_if_none("`max_attempts` doesn't apply to `none`")
    }

    /// Removes both limits. Not for schedules, which are finite.
    #[must_use]
    pub fn for_ever(mut self) -> Self {
        self.max_age = None;
        self.max_attempts = None;
        if let Delays::Schedule(_) = self.delays {
            self.misused = Some("`for_ever` doesn't apply to schedules, which are finite");
        }
        self.misused_if_none("`for_ever` doesn't apply to `none`")
    }

    /// How far a response's `Retry-After` can raise a delay. Zero ignores the header. Defaults to
    /// [`DEFAULT_MAX_RETRY_AFTER`].
    #[must_use]
    pub fn max_retry_after(mut self, delay: Duration) -> Self {
        self.max_retry_after = Some(delay);
        self.misused_if_none("`max_retry_after` doesn't apply to `none`")
    }

    fn misused_if_none(mut self, message: &'static str) -> Self {
        if self.delays == Delays::None {
            self.misused = Some(message);
        }
        self
    }

    /// A delay that a response asked for, as far as it counts.
    pub(crate) fn bounded(&self, asked: Duration) -> Duration {
        asked.min(self.max_retry_after.unwrap_or(DEFAULT_MAX_RETRY_AFTER))
    }

    /// The function of a [`from_fn`](Self::from_fn) policy. `None` if the policy was read from the
    /// database, which can't store a function.
    pub(crate) fn function(&self) -> Option<&Function> {
        match &self.delays {
            Delays::FromFn(function) => function.as_ref(),
            _ => None,
        }
    }

    /// The delay before the next attempt, or `None` to give up.
    ///
    /// `random` is drawn from 0 to 1. `asked` is the delay that the response or a hook asked for.
    /// `function` is this process's function, for a policy whose own one could not be stored. If it
    /// panics, its text goes to `panicked`.
    pub(crate) fn delay(
        &self,
        retry: Retry,
        random: f64,
        asked: Option<Duration>,
        function: Option<&Function>,
        panicked: &mut Option<String>,
    ) -> Option<Duration> {
        if !self.allows_after(retry.attempts) {
            return None;
        }
        let bound = match &self.delays {
            Delays::Exponential { base, factor, cap } => {
                exponential(*base, *factor, *cap, retry.attempts)
            }
            Delays::Schedule(delays) => {
                let index = retry.attempts.saturating_sub(1) as usize;
                *delays.get(index)?
            }
            Delays::Constant(delay) => *delay,
            Delays::None => return None,
            Delays::FromFn(own) => match own.as_ref().or(function).map(|f| f.call(retry)) {
                Some(Ok(delay)) => delay?.min(MAX_DURATION),
                // The function is missing, or it panicked.
                failed => {
                    *panicked = failed.and_then(Result::err);
                    let policy = self.without_function();
                    return policy.delay(retry, random, asked, None, panicked);
                }
            },
        };
        let own = self.jitter.apply(bound, random);
        let asked = asked.unwrap_or_default();
        let left = match self.max_age {
            Some(max) if retry.age >= max => return None,
            Some(max) => max - retry.age,
            None => Duration::MAX,
        };
        // The last attempt is made at the end of the allowed time, so that all of it is used.
        let own = own.min(left);
        // But not before the time that the receiver asked for.
        (asked <= left).then_some(own.max(asked))
    }

    /// The policy used when the function is missing or panicked.
    fn without_function(&self) -> Self {
        let limitless = self.max_age.is_none() && self.max_attempts.is_none();
        Self {
            max_age: self.max_age.or(limitless.then_some(DEFAULT_FIRED_AGE)),
            max_attempts: self.max_attempts,
            max_retry_after: self.max_retry_after,
            ..Self::exponential()
        }
    }

    /// How old a request may be for another attempt.
    pub(crate) fn age_limit(&self) -> Option<Duration> {
        self.max_age
    }

    /// Whether the number of attempts allows another one.
    pub(crate) fn allows_after(&self, attempts: u32) -> bool {
        let in_kind = match &self.delays {
            Delays::None => false,
            Delays::Schedule(delays) => attempts as usize <= delays.len(),
            _ => true,
        };
        in_kind && self.max_attempts.is_none_or(|max| attempts < max)
    }

    pub(crate) fn validate(&self) -> Result<(), &'static str> {
        const MAX_AGE_TOO_LONG: &str =
            "`max_age` must be at most a hundred years; use `for_ever` for no limit";
        const TOO_SHORT: &str = "each delay must be at least one millisecond";
        if let Some(misused) = self.misused {
            return Err(misused);
        }
        match &self.delays {
            Delays::Exponential { base, factor, cap } => {
                if *base < MIN_DELAY {
                    return Err("`base` must be at least one millisecond");
                }
                if !(factor.is_finite() && *factor >= 1.0) {
                    return Err("`factor` must be a finite number of at least 1");
                }
                if cap < base {
                    return Err("`cap` must not be below `base`");
                }
                if *cap > MAX_DURATION {
                    return Err("`cap` must be at most a hundred years");
                }
            }
            Delays::Schedule(delays) => {
                if delays.is_empty() {
                    return Err("the schedule is empty; use `none` for a single attempt");
                }
                if delays.len() > MAX_SCHEDULE {
                    return Err("the schedule must have at most 1,000 delays");
                }
                if delays.iter().any(|delay| *delay < MIN_DELAY) {
                    return Err(TOO_SHORT);
                }
                if delays.iter().any(|delay| *delay > MAX_DURATION) {
                    return Err("each delay must be at most a hundred years");
                }
            }
            Delays::Constant(delay) => {
                if *delay < MIN_DELAY {
                    return Err(TOO_SHORT);
                }
                if *delay > MAX_DURATION {
                    return Err("the delay must be at most a hundred years");
                }
            }
            Delays::None | Delays::FromFn(_) => {}
        }
        if self.max_age.is_some_and(|age| age > MAX_DURATION) {
            return Err(MAX_AGE_TOO_LONG);
        }
        if self
            .max_retry_after
            .is_some_and(|delay| delay > MAX_DURATION)
        {
            return Err("`max_retry_after` must be at most a hundred years");
        }
        if self.max_attempts == Some(0) {
            return Err("`max_attempts` must be at least 1");
        }
        Ok(())
    }

    /// Checks a policy that comes with a request.
    pub(crate) fn check(&self, field: &'static str) -> Result<(), Error> {
        self.validate()
            .and(match self.delays {
                Delays::FromFn(_) => Err(
                    "a function can't be stored with a request; pass it to `DurableBuilder::retry`",
                ),
                _ => Ok(()),
            })
            .map_err(|reason| Error::request(field, reason))
    }
}

/// The bound of the delay after this many attempts.
fn exponential(base: Duration, factor: f64, cap: Duration, attempts: u32) -> Duration {
    let exponent = i32::try_from(attempts.saturating_sub(1)).unwrap_or(i32::MAX);
    // At worst infinite, which is above every cap.
    let seconds = base.as_secs_f64() * factor.powi(exponent);
    Duration::try_from_secs_f64(seconds).map_or(cap, |bound| bound.min(cap))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);
    const HOUR: Duration = Duration::from_secs(3600);

    fn delay(policy: &RetryPolicy, attempts: u32, age: Duration, random: f64) -> Option<Duration> {
        policy.delay(Retry::new(attempts, age), random, None, None, &mut None)
    }

    fn asked(policy: &RetryPolicy, age: Duration, asked: Duration) -> Option<Duration> {
        let asked = Some(policy.bounded(asked));
        policy.delay(Retry::new(1, age), 1.0, asked, None, &mut None)
    }

    fn stored(policy: &RetryPolicy) -> RetryPolicy {
        serde_json::from_str(&serde_json::to_string(policy).unwrap()).unwrap()
    }

    fn millis(range: std::ops::Range<u64>) -> impl Strategy<Value = Duration> {
        range.prop_map(Duration::from_millis)
    }

    /// Any valid policy that can be stored.
    fn policy() -> impl Strategy<Value = RetryPolicy> {
        let exponential = (millis(1..100_000), 4u32..40, millis(0..10_000_000)).prop_map(
            |(base, quarters, more)| {
                RetryPolicy::exponential()
                    .base(base)
                    .factor(f64::from(quarters) / 4.0)
                    .cap(base + more)
            },
        );
        let kinds = prop_oneof![
            exponential,
            proptest::collection::vec(millis(1..100_000_000), 1..8).prop_map(RetryPolicy::schedule),
            millis(1..100_000_000).prop_map(RetryPolicy::constant),
        ];
        let jitter = prop_oneof![Just(Jitter::Full), Just(Jitter::Equal), Just(Jitter::None)];
        let age = proptest::option::of(millis(0..100_000_000));
        let attempts = proptest::option::of(1u32..20);
        let retry_after = proptest::option::of(millis(0..100_000_000));
        (kinds, jitter, age, attempts, retry_after).prop_map(
            |(mut policy, jitter, age, attempts, retry_after)| {
                policy = policy.jitter(jitter);
                policy.max_age = age;
                policy.max_attempts = attempts;
                policy.max_retry_after = retry_after;
                policy
            },
        )
    }

    /// The longest delay of a policy, without `Retry-After`.
    fn longest(policy: &RetryPolicy) -> Duration {
        match &policy.delays {
            Delays::Exponential { cap, .. } => *cap,
            Delays::Schedule(delays) => *delays.iter().max().unwrap(),
            Delays::Constant(delay) => *delay,
            Delays::None | Delays::FromFn(_) => unreachable!(),
        }
    }

    proptest! {
        #[test]
        fn any_policy_is_valid_and_survives_its_stored_form(policy in policy()) {
            prop_assert_eq!(policy.validate(), Ok(()));
            prop_assert!(policy.check("retry").is_ok());
            prop_assert_eq!(stored(&policy), policy);
        }

        #[test]
        fn delays_keep_their_bounds_and_limits(
            policy in policy(),
            attempts in prop_oneof![1u32..20, Just(u32::MAX)],
            age in millis(0..200_000_000),
            random in -1.0f64..2.0,
        ) {
            let delay = delay(&policy, attempts, age, random);
            let over = policy.max_age.is_some_and(|max| age >= max);
            // It gives up because of its limits, and for no other reason.
            prop_assert_eq!(delay.is_none(), over || !policy.allows_after(attempts));
            let Some(delay) = delay else { return Ok(()) };
            prop_assert!(delay <= longest(&policy));
            prop_assert!(policy.max_age.is_none_or(|max| age + delay <= max));
        }

        #[test]
        fn retry_after_raises_the_delay_and_never_lowers_it(
            policy in policy(),
            attempts in 1u32..8,
            age in millis(0..200_000_000),
            random in 0.0f64..1.0,
            wanted in prop_oneof![millis(0..200_000_000), Just(Duration::MAX)],
        ) {
            let retry = Retry::new(attempts, age);
            let own = policy.delay(retry, random, None, None, &mut None);
            let asked = Some(policy.bounded(wanted));
            let raised = policy.delay(retry, random, asked, None, &mut None);
            let bound = policy.max_retry_after.unwrap_or(DEFAULT_MAX_RETRY_AFTER);
            match (own, raised) {
                (None, raised) => prop_assert_eq!(raised, None),
                (Some(own), Some(raised)) => prop_assert_eq!(raised, own.max(wanted.min(bound))),
                // The requested delay doesn't fit into the time left.
                (Some(_), None) => {
                    prop_assert!(policy.max_age.is_some_and(|max| age + wanted.min(bound) > max));
                }
            }
        }

        #[test]
        fn jitter_stays_within_its_share(bound in millis(0..1 << 40), random in 0.0f64..=1.0) {
            prop_assert!(Jitter::Full.apply(bound, random) <= bound);
            let equal = Jitter::Equal.apply(bound, random);
            prop_assert!(equal >= bound / 2 && equal <= bound);
            prop_assert_eq!(Jitter::None.apply(bound, random), bound);
        }

        #[test]
        fn bounds_never_shrink(
            base in millis(1..10_000),
            factor in 1.0f64..1e300,
            attempts in 1u32..1000,
        ) {
            let policy = RetryPolicy::exponential().base(base).factor(factor).cap(MAX_DURATION);
            let bound = |attempts| delay(&policy, attempts, Duration::ZERO, 1.0).unwrap();
            prop_assert!(bound(attempts) <= bound(attempts + 1));
        }
    }

    #[test]
    fn bounds_double_up_to_the_cap() {
        let policy = RetryPolicy::exponential();
        let bound = |attempts| {
            delay(&policy, attempts, Duration::ZERO, 1.0)
                .unwrap()
                .as_secs()
        };
        assert_eq!([1, 2, 3, 4, 9].map(bound), [1, 2, 4, 8, 256]);
        assert_eq!([10, 40, u32::MAX].map(bound), [300; 3]);
    }

    #[test]
    fn the_factor_is_what_bounds_grow_by() {
        let policy = RetryPolicy::exponential().factor(1.5);
        assert_eq!(
            delay(&policy, 3, Duration::ZERO, 1.0),
            Some(Duration::from_millis(2250))
        );
        let level = RetryPolicy::exponential().factor(1.0);
        assert_eq!(delay(&level, 1000, Duration::ZERO, 1.0), Some(SECOND));
    }

    #[test]
    fn full_jitter_spreads_from_zero_to_the_bound() {
        let policy = RetryPolicy::exponential();
        let at = |random| delay(&policy, 3, Duration::ZERO, random).unwrap();
        assert_eq!(at(0.0), Duration::ZERO);
        assert_eq!(at(0.5), Duration::from_secs(2));
        assert_eq!(at(7.0), Duration::from_secs(4));
    }

    #[test]
    fn the_last_attempt_falls_on_the_end_of_the_allowed_age() {
        let policy = RetryPolicy::exponential().max_age(HOUR);
        assert_eq!(delay(&policy, 20, HOUR - SECOND, 1.0), Some(SECOND));
        assert_eq!(delay(&policy, 20, HOUR, 1.0), None);
    }

    #[test]
    fn attempts_are_counted_with_the_first() {
        assert_eq!(delay(&RetryPolicy::none(), 1, Duration::ZERO, 0.5), None);
        let twice = RetryPolicy::exponential().max_attempts(2);
        assert!(delay(&twice, 1, Duration::ZERO, 0.5).is_some());
        assert!(delay(&twice, 2, Duration::ZERO, 0.5).is_none());
    }

    #[test]
    fn a_schedule_ends_after_its_last_entry() {
        let policy = RetryPolicy::schedule([5, 300, 1800].map(Duration::from_secs));
        let delays = [1, 2, 3, 4, u32::MAX].map(|attempts| delay(&policy, attempts, HOUR, 0.3));
        let seconds = |seconds| Some(Duration::from_secs(seconds));
        assert_eq!(
            delays,
            [seconds(5), seconds(300), seconds(1800), None, None]
        );
        let jittered = policy.jitter(Jitter::Equal);
        assert_eq!(delay(&jittered, 2, HOUR, 0.0), seconds(150));
    }

    #[test]
    fn a_requested_delay_is_bounded_and_must_fit() {
        let policy = RetryPolicy::exponential();
        assert_eq!(asked(&policy, HOUR, SECOND * 90), Some(SECOND * 90));
        assert_eq!(
            asked(&policy, HOUR, Duration::MAX),
            Some(DEFAULT_MAX_RETRY_AFTER)
        );
        let deaf = RetryPolicy::exponential().max_retry_after(Duration::ZERO);
        assert_eq!(asked(&deaf, HOUR, SECOND * 90), Some(SECOND));
        let short = RetryPolicy::awaited();
        assert_eq!(asked(&short, SECOND * 299, SECOND), Some(SECOND));
        assert_eq!(asked(&short, SECOND * 299, SECOND * 2), None);
    }

    #[test]
    fn a_function_decides_within_the_limits() {
        let policy = RetryPolicy::from_fn(|Retry { attempts, age, .. }| {
            (attempts < 3).then_some(age * attempts)
        })
        .max_age(HOUR);
        assert_eq!(delay(&policy, 2, SECOND, 0.1), Some(SECOND * 2));
        assert_eq!(delay(&policy, 3, SECOND, 0.1), None);
        assert_eq!(delay(&policy, 2, HOUR, 0.1), None);
    }

    #[test]
    fn a_stored_policy_uses_the_function_of_the_current_process() {
        let policy = stored(&RetryPolicy::from_fn(|_| Some(SECOND)).max_attempts(5));
        let other = RetryPolicy::from_fn(|_| Some(HOUR));
        let delay = |function| policy.delay(Retry::new(2, SECOND), 1.0, None, function, &mut None);
        assert_eq!(delay(other.function()), Some(HOUR));
        // Without a function: the default's delays, and the request's own limits.
        assert_eq!(delay(None), Some(SECOND * 2));
        assert!(
            policy
                .delay(Retry::new(5, SECOND), 1.0, None, None, &mut None)
                .is_none()
        );
        let limitless = stored(&other);
        let at = |age| limitless.delay(Retry::new(2, age), 1.0, None, None, &mut None);
        assert_eq!(at(DEFAULT_FIRED_AGE - SECOND), Some(SECOND));
        assert_eq!(at(DEFAULT_FIRED_AGE), None);
    }

    #[test]
    fn a_function_that_panics_is_ignored() {
        let policy = RetryPolicy::from_fn(|_| panic!("no delay"));
        assert_eq!(delay(&policy, 1, Duration::ZERO, 1.0), Some(SECOND));
    }

    #[test]
    fn invalid_policies_are_refused() {
        let ms = Duration::from_millis;
        let exponential = RetryPolicy::exponential;
        for (about, policy) in [
            ("base", exponential().base(Duration::ZERO)),
            ("cap", exponential().cap(ms(5))),
            ("cap", exponential().cap(Duration::MAX)),
            ("factor", exponential().factor(0.99)),
            ("factor", exponential().factor(f64::NAN)),
            ("factor", exponential().factor(f64::INFINITY)),
            ("attempt", exponential().max_attempts(0)),
            ("for_ever", exponential().max_age(Duration::MAX)),
            (
                "max_retry_after",
                exponential().max_retry_after(Duration::MAX),
            ),
            ("empty", RetryPolicy::schedule([])),
            ("1,000", RetryPolicy::schedule([ms(1); 1001])),
            (
                "millisecond",
                RetryPolicy::schedule([ms(1), Duration::ZERO]),
            ),
            ("years", RetryPolicy::schedule([Duration::MAX])),
            (
                "millisecond",
                RetryPolicy::constant(Duration::from_micros(999)),
            ),
            ("years", RetryPolicy::constant(Duration::MAX)),
            ("base", RetryPolicy::constant(ms(1)).base(ms(1))),
            ("cap", RetryPolicy::schedule([ms(1)]).cap(ms(1))),
            ("factor", RetryPolicy::from_fn(|_| None).factor(2.0)),
            (
                "jitter",
                RetryPolicy::from_fn(|_| None).jitter(Jitter::Full),
            ),
            ("for_ever", RetryPolicy::schedule([ms(1)]).for_ever()),
            ("jitter", RetryPolicy::none().jitter(Jitter::Full)),
            ("for_ever", RetryPolicy::none().for_ever()),
            ("max_age", RetryPolicy::none().max_age(HOUR)),
            ("max_attempts", RetryPolicy::none().max_attempts(1)),
            ("max_retry_after", RetryPolicy::none().max_retry_after(HOUR)),
        ] {
            let reason = policy.validate().unwrap_err();
            assert!(reason.contains(about), "{policy:?}: {reason}");
            assert_eq!(policy.check("retry").unwrap_err().field(), Some("retry"));
        }
        let function = RetryPolicy::from_fn(|_| None);
        assert_eq!(function.validate(), Ok(()));
        assert_eq!(function.check("retry").unwrap_err().field(), Some("retry"));
    }
}
