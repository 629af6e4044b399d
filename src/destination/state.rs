//! What all processes together know of a destination: the pure state machine.
//!
//! The state is stored as JSON. Each process reports what it saw, and [`State::apply`] is called
//! under a lock on the row, so that there is one sequence of changes. Times are milliseconds since
//! 1970 on the database's clock. That clock may jump: then times saturate, an opened breaker or a
//! throttle that seems to begin in the future ends, and a jump alone never opens or disables.
//!
//! A state written by a newer release may have fields that this one doesn't know. They are kept.

use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use super::breaker::{Breaker, Phase};
use super::event::DestinationEventKind as Event;
use super::event::{DestinationState, DestinationStatus};
use super::policy::{CircuitBreaker, DestinationPolicy, Unknown};
use super::streak::Streak;
use super::window::Window;
use crate::redact::{cut, storable};

/// Milliseconds since 1970.
pub(crate) type Millis = i64;

/// A clock that is set back by no more than this changes nothing.
const CLOCK_SLACK: Millis = 60_000;

/// How long a breaker that waits for probes is remembered, and a pause that has ended.
const UNUSED: Millis = 24 * 60 * 60 * 1000;

/// Longer reasons are cut to so many bytes.
const MAX_REASON_LEN: usize = 500;

/// Why a destination is disabled by itself.
const GONE: &str = "it answered 410 (Gone)";

/// What one process saw of a destination since its last report.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Report {
    /// How many attempts ended. Those that didn't fail are successes.
    pub(crate) attempts: u32,
    /// How many of them failed, and the destination is to blame.
    pub(crate) failures: u32,
    /// How many of them were retries.
    pub(crate) retries: u32,
    /// One of them was answered by a 410.
    pub(crate) gone: bool,
    /// The longest pause that an answer asked for: see `DestinationPolicy::throttle`.
    pub(crate) retry_after: Option<Duration>,
    /// Whether the probes of a half-open breaker succeeded. `None` if none ended.
    pub(crate) probe: Option<bool>,
}

impl Report {
    /// Adds another report of the same destination.
    pub(crate) fn add(&mut self, other: &Self) {
        self.attempts = self.attempts.saturating_add(other.attempts);
        self.failures = self.failures.saturating_add(other.failures);
        self.retries = self.retries.saturating_add(other.retries);
        self.gone |= other.gone;
        self.retry_after = self.retry_after.max(other.retry_after);
        self.probe = match (self.probe, other.probe) {
            (Some(one), Some(other)) => Some(one && other),
            (one, other) => one.or(other),
        };
    }

    pub(crate) fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// Until when a destination is closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Until {
    At(Millis),
    Forever,
}

/// A time that something lasts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct Span {
    pub(super) since: Millis,
    pub(super) until: Millis,
}

impl Span {
    pub(super) fn new(since: Millis, length: Millis) -> Self {
        Self {
            since,
            until: since.saturating_add(length),
        }
    }

    /// Whether it lasts. If the clock was set back before its beginning, it has ended: how much of
    /// it has passed can't be known, and it must not last for longer than it was meant to.
    pub(super) fn is_active(&self, now: Millis) -> bool {
        now < self.until && now >= self.since.saturating_sub(CLOCK_SLACK)
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Paused {
    /// `None` until an operator resumes it.
    #[serde(default)]
    until: Option<Millis>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
struct Disabled {
    reason: String,
    since: Millis,
}

/// The state of a destination.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct State {
    #[serde(skip_serializing_if = "Option::is_none")]
    paused: Option<Paused>,
    #[serde(skip_serializing_if = "Option::is_none")]
    disabled: Option<Disabled>,
    #[serde(skip_serializing_if = "Option::is_none")]
    throttled: Option<Span>,
    #[serde(skip_serializing_if = "Breaker::is_default")]
    breaker: Breaker,
    #[serde(skip_serializing_if = "Window::is_default")]
    window: Window,
    #[serde(skip_serializing_if = "Option::is_none")]
    streak: Option<Streak>,
    #[serde(flatten)]
    unknown: Unknown,
}

impl State {
    /// Adds what a process saw, and does what is due by now. An empty report does only the latter.
    pub(crate) fn apply(
        &mut self,
        policy: &DestinationPolicy,
        report: &Report,
        now: Millis,
    ) -> Vec<Event> {
        let mut events = Vec::new();
        if self
            .paused
            .as_ref()
            .is_some_and(|paused| !paused.is_active(now))
        {
            events.append(&mut self.resume(now));
        }
        let rule = policy.circuit_breaker.as_ref();
        let length = rule.map_or(CircuitBreaker::DEFAULT_WINDOW, |rule| rule.window);
        self.window.add(length, report, now);
        self.breaker
            .apply(rule, &mut self.window, report.probe, now, &mut events);
        let pause = report.retry_after.unwrap_or_default();
        self.throttle(pause.min(policy.max_retry_after), now, &mut events);
        self.note_streak(policy, report, now, &mut events);
        events
    }

    fn throttle(&mut self, pause: Duration, now: Millis, events: &mut Vec<Event>) {
        let current = self.throttled.take_if(|span| span.is_active(now));
        let asked = Span::new(now, millis(pause));
        self.throttled = match current {
            // A shorter pause doesn't shorten it.
            Some(current) if current.until >= asked.until => Some(current),
            _ if !asked.is_active(now) => current,
            _ => {
                if current.is_none() {
                    let until = time(asked.until);
                    events.push(Event::Throttled { until });
                }
                Some(asked)
            }
        };
    }

    fn note_streak(
        &mut self,
        policy: &DestinationPolicy,
        report: &Report,
        now: Millis,
        events: &mut Vec<Event>,
    ) {
        let rule = policy.auto_disable.as_ref();
        if report.attempts > report.failures {
            self.streak = None;
        } else if report.failures > 0 {
            for percent in Streak::fail(&mut self.streak, rule, now) {
                events.push(Event::FailureThreshold { percent });
                if let (100, Some(rule)) = (percent, rule) {
                    let reason = format!("it has failed for {}", in_words(rule.after));
                    events.append(&mut self.disable(&reason, now));
                }
            }
        }
        if report.gone && rule.is_some_and(|rule| rule.on_gone) {
            events.append(&mut self.disable(GONE, now));
        }
    }

    /// Closes the destination until a time, or until it is resumed. A time that has passed resumes
    /// it.
    pub(crate) fn pause(&mut self, until: Option<Millis>, now: Millis) -> Vec<Event> {
        let paused = Paused { until };
        if !paused.is_active(now) {
            return self.resume(now);
        }
        if self.paused.as_ref() == Some(&paused) {
            return Vec::new();
        }
        self.paused = Some(paused);
        let until = until.map(time);
        vec![Event::Paused { until }]
    }

    /// Ends a pause.
    pub(crate) fn resume(&mut self, _now: Millis) -> Vec<Event> {
        match self.paused.take() {
            Some(_) => vec![Event::Resumed],
            None => Vec::new(),
        }
    }

    /// Closes the destination until it is enabled. If it is disabled, the first reason stays.
    pub(crate) fn disable(&mut self, reason: &str, now: Millis) -> Vec<Event> {
        if self.disabled.is_some() {
            return Vec::new();
        }
        let mut reason = storable(reason);
        cut(&mut reason, MAX_REASON_LEN);
        self.disabled = Some(Disabled {
            since: now,
            reason: reason.clone(),
        });
        vec![Event::Disabled { reason }]
    }

    /// Enables a disabled destination, and forgets the failures that disabled it.
    pub(crate) fn enable(&mut self, _now: Millis) -> Vec<Event> {
        match self.disabled.take() {
            Some(_) => {
                self.streak = None;
                vec![Event::Enabled]
            }
            None => Vec::new(),
        }
    }

    /// Forgets what was observed: failures, breaker and throttle. A pause stays, and so does a
    /// disabled destination.
    pub(crate) fn reset(&mut self, _now: Millis) -> Vec<Event> {
        let mut events = Vec::new();
        self.breaker.close(&mut self.window, &mut events);
        self.window.clear();
        self.throttled = None;
        self.streak = None;
        events
    }

    /// Until when no request is sent. `None` if requests are sent, or probes of a half-open
    /// breaker.
    pub(crate) fn closed_until(&self, now: Millis) -> Option<Until> {
        self.closings(now).into_iter().map(|(until, _)| until).max()
    }

    /// All that closes it.
    fn closings(&self, now: Millis) -> Vec<(Until, DestinationState)> {
        let mut closings = Vec::new();
        if self.disabled.is_some() {
            closings.push((Until::Forever, DestinationState::Disabled));
        }
        if let Some(paused) = self.paused.as_ref().filter(|paused| paused.is_active(now)) {
            let until = paused.until.map_or(Until::Forever, Until::At);
            closings.push((until, DestinationState::Paused));
        }
        if let Some(until) = self.breaker.open_until(now) {
            closings.push((Until::At(until), DestinationState::CircuitOpen));
        }
        if let Some(span) = self.throttled.filter(|span| span.is_active(now)) {
            closings.push((Until::At(span.until), DestinationState::Throttled));
        }
        closings
    }

    /// Whether the breaker lets only probes through.
    pub(crate) fn is_half_open(&self, now: Millis) -> bool {
        self.breaker.phase(now) == Phase::HalfOpen
    }

    /// How many probes a half-open breaker lets through at a time, in all processes together.
    pub(crate) fn probes(policy: &DestinationPolicy) -> u32 {
        let rule = policy.circuit_breaker.as_ref();
        rule.map_or(CircuitBreaker::DEFAULT_PROBES, |rule| rule.probes.max(1))
    }

    /// Whether nothing is worth storing.
    pub(crate) fn is_idle(&self, now: Millis) -> bool {
        self.paused.is_none()
            && self.disabled.is_none()
            && self.throttled.is_none_or(|span| !span.is_active(now))
            && self.breaker.is_idle()
            && self.window.sum(now).failures == 0
            && !self.window.has_unknown()
            && !self
                .streak
                .as_ref()
                .is_some_and(|streak| streak.is_kept(now))
            && self.unknown.is_empty()
    }

    /// Forgets what has ended for long, although no attempt shows that it has. Returns whether
    /// nothing is worth storing any more. A destination that isn't used again would otherwise be
    /// remembered for ever.
    pub(crate) fn forget(&mut self, now: Millis) -> bool {
        self.paused = self
            .paused
            .take_if(|paused| paused.is_active(now.saturating_sub(UNUSED)));
        self.breaker.forget(UNUSED, now);
        self.is_idle(now)
    }

    pub(crate) fn status(
        &self,
        name: &str,
        policy: Option<&DestinationPolicy>,
        now: Millis,
    ) -> DestinationStatus {
        // Of those that last equally long, the first.
        let closing = self
            .closings(now)
            .into_iter()
            .reduce(|one, other| if other.0 > one.0 { other } else { one });
        let (state, until) = match closing {
            Some((Until::At(at), state)) => (state, Some(time(at))),
            Some((Until::Forever, state)) => (state, None),
            None if self.is_half_open(now) => (DestinationState::HalfOpen, None),
            None if policy.is_some_and(DestinationPolicy::has_limits) => {
                (DestinationState::Limited, None)
            }
            None => (DestinationState::Open, None),
        };
        let counts = self.window.sum(now);
        let streak = self.streak.as_ref().filter(|streak| streak.is_kept(now));
        DestinationStatus {
            name: name.to_owned(),
            state,
            until,
            reason: self.disabled.as_ref().map(|by| by.reason.clone()),
            failing_since: streak.map(|streak| time(streak.since)),
            attempts: counts.attempts,
            failures: counts.failures,
            retries: counts.retries,
            policy: policy.cloned(),
        }
    }
}

impl Paused {
    fn is_active(&self, now: Millis) -> bool {
        self.until.is_none_or(|until| now < until)
    }
}

pub(crate) fn millis(duration: Duration) -> Millis {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}

/// A time before 1970, or one that the system can't hold, is 1970.
pub(crate) fn time(at: Millis) -> SystemTime {
    let since = Duration::from_millis(u64::try_from(at).unwrap_or_default());
    let epoch = SystemTime::UNIX_EPOCH;
    epoch.checked_add(since).unwrap_or(epoch)
}

/// A duration in the largest unit that divides it.
fn in_words(duration: Duration) -> String {
    let seconds = duration.as_secs();
    let units = [
        (86_400, "day"),
        (3600, "hour"),
        (60, "minute"),
        (1, "second"),
    ];
    let unit = units.iter().find(|(unit, _)| seconds % unit == 0);
    match unit {
        Some((unit, name)) if seconds > 0 => {
            let number = seconds / unit;
            let plural = if number == 1 { "" } else { "s" };
            format!("{number} {name}{plural}")
        }
        _ => format!("{duration:?}"),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::destination::{AutoDisable, RateLimit};

    const SECOND: Millis = 1000;
    const HOUR: Millis = 3600 * SECOND;
    const DAY: Millis = 24 * HOUR;
    /// Some time in 2026.
    const START: Millis = 1_790_000_000_000;

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn with_breaker() -> DestinationPolicy {
        DestinationPolicy::default().circuit_breaker(CircuitBreaker::default())
    }

    fn that_disables() -> DestinationPolicy {
        let rule = AutoDisable::after(seconds(10 * 3600))
            .at_least_apart(seconds(3600))
            .failures(5);
        DestinationPolicy::default().auto_disable(rule)
    }

    fn ended(attempts: u32, failures: u32) -> Report {
        Report {
            attempts,
            failures,
            ..Report::default()
        }
    }

    fn probe(succeeded: bool) -> Report {
        Report {
            probe: Some(succeeded),
            ..ended(1, u32::from(!succeeded))
        }
    }

    fn asking(pause: u64) -> Report {
        Report {
            retry_after: Some(seconds(pause)),
            ..ended(1, 1)
        }
    }

    fn stored(state: &State) -> State {
        serde_json::from_str(&serde_json::to_string(state).unwrap()).unwrap()
    }

    /// A state whose breaker has opened at this time.
    fn opened(policy: &DestinationPolicy, now: Millis) -> State {
        let mut state = State::default();
        assert_eq!(state.apply(policy, &ended(20, 10), now), [Event::Opened]);
        state
    }

    fn at(now: Millis) -> Until {
        Until::At(now)
    }

    #[test]
    fn the_breaker_opens_at_its_share_of_enough_attempts() {
        let policy = with_breaker();
        let mut state = State::default();
        assert_eq!(state.apply(&policy, &ended(19, 19), START), []);
        assert_eq!(state.closed_until(START), None);
        // 19 of 39 are not enough, 20 of 40 are.
        assert_eq!(state.apply(&policy, &ended(20, 0), START + 1), []);
        assert_eq!(
            state.apply(&policy, &ended(1, 1), START + 2),
            [Event::Opened]
        );
        assert_eq!(
            state.closed_until(START + 2),
            Some(at(START + 2 + 5 * SECOND))
        );

        // Failures that have left the window don't count.
        let mut state = State::default();
        state.apply(&policy, &ended(19, 19), START);
        assert_eq!(state.apply(&policy, &ended(1, 1), START + 71 * SECOND), []);
        // A policy without a breaker opens none.
        let policy = DestinationPolicy::default();
        assert_eq!(State::default().apply(&policy, &ended(999, 999), START), []);
    }

    #[test]
    fn probes_close_the_breaker() {
        let policy = with_breaker();
        let mut state = opened(&policy, START);
        assert!(!state.is_half_open(START + 4_999));
        assert_eq!(state.apply(&policy, &Report::default(), START + 4_999), []);
        // A result of an attempt that was sent earlier changes nothing.
        assert_eq!(state.apply(&policy, &probe(true), START + 4_999), []);

        let now = START + 5_000;
        assert!(state.is_half_open(now));
        assert_eq!(state.closed_until(now), None);
        assert_eq!(
            state.apply(&policy, &Report::default(), now),
            [Event::HalfOpen]
        );
        assert_eq!(state.apply(&policy, &Report::default(), now), []);
        assert_eq!(state.apply(&policy, &ended(50, 50), now), []);
        assert_eq!(state.apply(&policy, &probe(true), now), []);
        assert!(state.is_half_open(now));
        assert_eq!(state.apply(&policy, &probe(true), now + 1), [Event::Closed]);
        assert!(!state.is_half_open(now + 1));
        // The failures that opened it are forgotten.
        assert_eq!(state.apply(&policy, &ended(19, 19), now + 2), []);
    }

    #[test]
    fn failed_probes_double_the_time_up_to_its_bound() {
        let policy = with_breaker();
        let mut state = opened(&policy, START);
        let mut now = START + 5 * SECOND;
        for open_for in [10, 20, 40, 80, 160, 300, 300, 300] {
            let events = state.apply(&policy, &probe(false), now);
            assert_eq!(events, [Event::HalfOpen, Event::Opened]);
            assert_eq!(state.closed_until(now), Some(at(now + open_for * SECOND)));
            now += open_for * SECOND;
        }
        // One success isn't enough, and a failure after it begins anew.
        state.apply(&policy, &probe(true), now);
        assert_eq!(state.apply(&policy, &probe(false), now), [Event::Opened]);
        now += 300 * SECOND;
        state.apply(&policy, &probe(true), now);
        assert_eq!(state.apply(&policy, &probe(true), now), [Event::Closed]);
        // The next time it is open for as long as at first.
        state.apply(&policy, &ended(20, 20), now);
        assert_eq!(state.closed_until(now), Some(at(now + 5 * SECOND)));
    }

    #[test]
    fn a_removed_breaker_is_closed() {
        let mut state = opened(&with_breaker(), START);
        let events = state.apply(&DestinationPolicy::default(), &Report::default(), START);
        assert_eq!(events, [Event::Closed]);
        assert_eq!(state.closed_until(START), None);
    }

    #[test]
    fn retry_after_pauses_and_is_never_shortened() {
        let policy = DestinationPolicy::default();
        let mut state = State::default();
        let until = START + 60 * SECOND;
        let throttled = Event::Throttled { until: time(until) };
        assert_eq!(state.apply(&policy, &asking(60), START), [throttled]);
        assert_eq!(state.apply(&policy, &asking(10), START + SECOND), []);
        assert_eq!(state.closed_until(START + SECOND), Some(at(until)));
        // A longer one makes it longer, up to the policy's bound.
        assert_eq!(state.apply(&policy, &asking(86_400), START + SECOND), []);
        let until = START + SECOND + HOUR;
        assert_eq!(state.closed_until(START + SECOND), Some(at(until)));
        assert_eq!(state.closed_until(until), None);
        // A short one after it counts again.
        assert_eq!(state.apply(&policy, &asking(1), until).len(), 1);
        assert_eq!(state.closed_until(until), Some(at(until + SECOND)));
        let deaf = policy.max_retry_after(Duration::ZERO);
        assert_eq!(State::default().apply(&deaf, &asking(60), START), []);
    }

    #[test]
    fn a_pause_lasts_until_its_end_or_until_it_is_resumed() {
        let policy = DestinationPolicy::default();
        let mut state = State::default();
        let until = Some(time(START + HOUR));
        assert_eq!(
            state.pause(Some(START + HOUR), START),
            [Event::Paused { until }]
        );
        assert_eq!(state.pause(Some(START + HOUR), START), []);
        assert_eq!(state.closed_until(START), Some(at(START + HOUR)));
        assert!(!state.is_idle(START + HOUR));
        let report = Report::default();
        assert_eq!(
            state.apply(&policy, &report, START + HOUR),
            [Event::Resumed]
        );
        assert!(state.is_idle(START + HOUR));

        assert_eq!(state.pause(None, START), [Event::Paused { until: None }]);
        assert_eq!(state.closed_until(i64::MAX), Some(Until::Forever));
        assert_eq!(stored(&state), state);
        // A time that has passed resumes.
        assert_eq!(state.pause(Some(START), START), [Event::Resumed]);
        assert_eq!(state.pause(Some(START), START), []);
        assert_eq!(state.resume(START), []);
    }

    #[test]
    fn a_disabled_destination_stays_so_until_it_is_enabled() {
        let mut state = State::default();
        let reason = "we owe them money".to_owned();
        assert_eq!(
            state.disable(&reason, START),
            [Event::Disabled {
                reason: reason.clone()
            }]
        );
        assert_eq!(state.disable("another", START), []);
        assert_eq!(state.resume(START), []);
        assert_eq!(state.reset(START), []);
        state.apply(&DestinationPolicy::default(), &ended(5, 0), START);
        assert_eq!(state.closed_until(START), Some(Until::Forever));
        let status = state.status("a", None, START);
        assert_eq!(status.reason, Some(reason));
        assert_eq!(state.enable(START), [Event::Enabled]);
        assert_eq!(state.enable(START), []);
        assert_eq!(state.closed_until(START), None);
        let long = format!("{}\0", "é".repeat(1000));
        state.disable(&long, START);
        let status = state.status("a", None, START);
        assert!(status.reason.is_some_and(|reason| reason.len() <= 500));
    }

    #[test]
    fn spread_out_failures_disable_with_warnings_before() {
        let policy = that_disables();
        let mut state = State::default();
        let mut told = Vec::new();
        for hour in 0..=10 {
            for event in state.apply(&policy, &ended(7, 7), START + hour * HOUR) {
                told.push((hour, event));
            }
        }
        let threshold = |percent| Event::FailureThreshold { percent };
        let reason = "it has failed for 10 hours".to_owned();
        assert_eq!(
            told,
            [
                (5, threshold(50)),
                (9, threshold(90)),
                (10, threshold(100)),
                (10, Event::Disabled { reason }),
            ]
        );
        // It begins anew once it is enabled.
        assert_eq!(state.enable(START + 11 * HOUR), [Event::Enabled]);
        assert_eq!(state.apply(&policy, &ended(1, 1), START + 12 * HOUR), []);
        let status = state.status("a", None, START + 12 * HOUR);
        assert_eq!(status.failing_since, Some(time(START + 12 * HOUR)));
    }

    #[test]
    fn neither_a_bad_hour_nor_a_failing_process_disables() {
        let policy = that_disables();
        let mut state = State::default();
        for second in 0..3600 {
            let now = START + second * SECOND;
            assert_eq!(state.apply(&policy, &ended(100, 100), now), []);
        }
        // A quiet time between a few failures counts in part only.
        let mut now = START + 10 * HOUR;
        for _ in 0..2 {
            assert_eq!(state.apply(&policy, &ended(1, 1), now), []);
            now += SECOND;
        }
        // Another process has success now and then.
        for hour in 0..1000 {
            let now = now + hour * HOUR;
            let report = ended(100, if hour % 5 == 0 { 99 } else { 100 });
            assert_eq!(state.apply(&policy, &report, now), [], "{hour}");
        }
    }

    #[test]
    fn a_410_disables_if_the_policy_says_so() {
        let gone = Report {
            gone: true,
            ..ended(1, 1)
        };
        let mut state = State::default();
        let events = state.apply(&DestinationPolicy::webhooks(), &gone, START);
        assert!(matches!(&events[..], [Event::Disabled { reason }] if reason.contains("410")));
        assert_eq!(
            state.apply(&DestinationPolicy::webhooks(), &gone, START),
            []
        );
        let mut state = State::default();
        assert_eq!(state.apply(&that_disables(), &gone, START), []);
    }

    #[test]
    fn a_clock_that_jumps_opens_and_closes_nothing_wrongly() {
        for jump in [-400 * DAY, -DAY, -12 * HOUR, 12 * HOUR, DAY, 400 * DAY] {
            let after = START + jump;
            // An opened breaker and a throttle don't last for longer than they were meant to.
            let policy = with_breaker();
            let mut state = opened(&policy, START);
            state.apply(&policy, &asking(3600), START);
            assert_eq!(state.closed_until(after), None, "{jump}");
            assert!(state.is_half_open(after));
            state.apply(&policy, &probe(true), after);
            assert_eq!(state.apply(&policy, &probe(true), after), [Event::Closed]);
            assert_eq!(state.closed_until(after), None);

            // Failures on both sides of a jump don't add up.
            let mut state = State::default();
            state.apply(&policy, &ended(19, 19), START);
            assert_eq!(state.apply(&policy, &ended(19, 19), after), []);

            // A jump alone doesn't disable.
            let policy = that_disables();
            let mut state = State::default();
            state.apply(&policy, &ended(1, 1), START);
            state.apply(&policy, &ended(1, 1), START + HOUR);
            for second in 0..60 {
                let now = after + second * SECOND;
                let events = state.apply(&policy, &ended(1, 1), now);
                assert!(!events.iter().any(|e| matches!(e, Event::Disabled { .. })));
            }
            assert_eq!(state.closed_until(after + HOUR), None);
        }
        // A small correction changes nothing.
        let state = opened(&with_breaker(), START);
        assert_eq!(
            state.closed_until(START - 30 * SECOND),
            Some(at(START + 5 * SECOND))
        );
        // A pause has an end by the clock, and the clock counts.
        let mut state = State::default();
        state.pause(Some(START + DAY), START);
        assert_eq!(state.closed_until(START - DAY), Some(at(START + DAY)));
        assert_eq!(state.closed_until(START + 2 * DAY), None);
    }

    #[test]
    fn a_healthy_destination_is_idle() {
        let policy = DestinationPolicy::webhooks();
        let mut state = State::default();
        assert!(state.is_idle(START));
        state.apply(&policy, &ended(5, 0), START);
        assert!(state.is_idle(START));
        state.apply(&policy, &ended(5, 5), START);
        assert!(!state.is_idle(START));
        // Failures of a destination that isn't used any more are forgotten at last.
        assert!(!state.is_idle(START + 10 * DAY));
        assert!(state.is_idle(START + 11 * DAY));
        state.apply(&policy, &ended(5, 0), START + HOUR);
        assert!(state.is_idle(START + HOUR));
        state.apply(&DestinationPolicy::default(), &asking(60), START + HOUR);
        assert!(!state.is_idle(START + HOUR));
        let opened = opened(&with_breaker(), START);
        assert!(!opened.is_idle(START + 400 * DAY));
    }

    #[test]
    fn what_has_ended_for_long_is_forgotten() {
        let opened = opened(&with_breaker(), START);
        let mut paused = State::default();
        paused.pause(Some(START + HOUR), START);
        for state in [opened, paused] {
            assert!(!state.clone().forget(START));
            assert!(!state.clone().forget(START + DAY));
            assert!(state.clone().forget(START + 2 * DAY));
        }
        let mut forever = State::default();
        forever.pause(None, START);
        assert!(!forever.forget(START + 400 * DAY));
        forever.resume(START);
        forever.disable("why", START);
        assert!(!forever.forget(START + 400 * DAY));
    }

    #[test]
    fn nothing_is_stored_of_a_window_without_attempts() {
        let policy = with_breaker();
        let mut state = State::default();
        state.apply(&policy, &ended(5, 5), START);
        assert!(serde_json::to_string(&state).unwrap().contains("window"));
        state.streak = None;
        state.apply(&policy, &Report::default(), START + HOUR);
        assert_eq!(serde_json::to_string(&state).unwrap(), "{}");
        state.pause(None, START);
        state.apply(&policy, &Report::default(), START);
        state.resume(START);
        assert_eq!(serde_json::to_string(&state).unwrap(), "{}");
    }

    #[test]
    fn the_status_says_what_lasts_longest() {
        let policy = with_breaker();
        let mut state = State::default();
        let of = |state: &State| {
            let status = state.status("a", Some(&policy), START);
            assert_eq!(
                status.state.is_closed(),
                state.closed_until(START).is_some()
            );
            (status.state.as_str(), status.until)
        };
        assert_eq!(of(&state), ("open", None));
        let limited = policy.clone().rate(RateLimit::new(1, seconds(1)));
        let status = state.status("a", Some(&limited), START);
        assert_eq!(status.state, DestinationState::Limited);
        assert_eq!(status.policy, Some(limited));

        state.apply(&policy, &ended(20, 15), START);
        assert_eq!(of(&state), ("circuit_open", Some(time(START + 5 * SECOND))));
        state.apply(&policy, &asking(60), START);
        assert_eq!(of(&state), ("throttled", Some(time(START + 60 * SECOND))));
        state.pause(Some(START + 30 * SECOND), START);
        assert_eq!(of(&state), ("throttled", Some(time(START + 60 * SECOND))));
        state.pause(None, START);
        assert_eq!(of(&state), ("paused", None));
        state.disable("why", START);
        assert_eq!(of(&state), ("disabled", None));
        let status = state.status("a", None, START);
        assert_eq!((status.attempts, status.failures), (21, 16));
        state.resume(START);
        state.enable(START);
        assert_eq!(state.reset(START), [Event::Closed]);
        assert_eq!(of(&state), ("open", None));
        let state = opened(&policy, START - 5 * SECOND);
        assert_eq!(of(&state), ("half_open", None));
    }

    #[test]
    fn fields_of_a_newer_release_are_kept() {
        let text = r#"{
            "breaker": {"phase": "open", "open": {"since": 5, "until": 9}, "forced": true},
            "window": {"bucket_ms": 10000, "buckets": [], "by_status": {}},
            "streak": {"since": 4, "last": 6, "keep_ms": 9, "told_by": "mail"},
            "quarantine": [1, 2]
        }"#;
        let mut state: State = serde_json::from_str(text).unwrap();
        assert!(!state.is_idle(START));
        assert_eq!(stored(&state), state);
        state.apply(&with_breaker(), &ended(1, 1), 7);
        let rewritten = serde_json::to_string(&state).unwrap();
        for field in ["forced", "by_status", "told_by", "quarantine"] {
            assert!(rewritten.contains(field), "{rewritten}");
        }
        let empty: State = serde_json::from_str("{}").unwrap();
        assert_eq!(empty, State::default());
    }

    #[test]
    fn reports_add_up() {
        let mut sum = Report::default();
        assert!(sum.is_empty());
        sum.add(&Report {
            retries: 1,
            ..ended(3, u32::MAX)
        });
        sum.add(&asking(9));
        sum.add(&asking(5));
        sum.add(&probe(true));
        assert_eq!(sum.probe, Some(true));
        sum.add(&probe(false));
        sum.add(&probe(true));
        assert_eq!((sum.attempts, sum.failures), (8, u32::MAX));
        assert_eq!(
            (sum.retry_after, sum.probe),
            (Some(seconds(9)), Some(false))
        );
        assert!(!sum.gone && !sum.is_empty());
    }

    #[derive(Clone, Debug)]
    enum Step {
        Apply(Report),
        Pause(Option<Millis>),
        Resume,
        Disable,
        Enable,
        Reset,
    }

    fn report() -> impl Strategy<Value = Report> {
        let retry_after = proptest::option::of((0u64..10_000).prop_map(seconds));
        let probe = proptest::option::of(any::<bool>());
        (0u32..30, 0u32..30, any::<bool>(), retry_after, probe).prop_map(
            |(attempts, failures, gone, retry_after, probe)| Report {
                gone,
                retry_after,
                probe,
                ..ended(attempts, failures.min(attempts))
            },
        )
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            12 => report().prop_map(Step::Apply),
            1 => proptest::option::of(any::<i64>()).prop_map(Step::Pause),
            1 => Just(Step::Resume),
            1 => Just(Step::Disable),
            1 => Just(Step::Enable),
            1 => Just(Step::Reset),
        ]
    }

    fn policy() -> impl Strategy<Value = DestinationPolicy> {
        let share = 0.01f64..1.0;
        (share, 1u64..100, 1u32..30, 1u64..100, 1u32..5, 1u64..100).prop_map(
            |(share, window, attempts, open_for, successes, after)| {
                let breaker = CircuitBreaker::default()
                    .failure_share(share)
                    .window(seconds(window))
                    .min_attempts(attempts)
                    .open_for(seconds(open_for))
                    .max_open_for(seconds(open_for * 7))
                    .successes(successes);
                let rule = AutoDisable::after(seconds(after * 60)).on_gone(after % 2 == 0);
                let policy = DestinationPolicy::default()
                    .circuit_breaker(breaker)
                    .auto_disable(rule);
                policy.validate(seconds(1)).unwrap();
                policy
            },
        )
    }

    fn take(state: &mut State, policy: &DestinationPolicy, step: &Step, now: Millis) -> Vec<Event> {
        match step {
            Step::Apply(report) => state.apply(policy, report, now),
            Step::Pause(until) => state.pause(*until, now),
            Step::Resume => state.resume(now),
            Step::Disable => state.disable("why", now),
            Step::Enable => state.enable(now),
            Step::Reset => state.reset(now),
        }
    }

    fn any_time() -> impl Strategy<Value = Millis> {
        prop_oneof![
            4 => START..START + HOUR,
            1 => any::<i64>(),
            1 => Just(i64::MAX),
            1 => Just(i64::MIN),
        ]
    }

    proptest! {
        /// Whatever happened, a destination that works again is open in the end.
        #[test]
        fn successes_open_it_again(
            policy in policy(),
            steps in proptest::collection::vec((step(), any_time()), 0..40),
        ) {
            let mut state = State::default();
            for (step, now) in &steps {
                take(&mut state, &policy, step, *now);
                prop_assert_eq!(&stored(&state), &state);
                let _ = state.status("a", Some(&policy), *now);
            }
            state.resume(START);
            state.enable(START);
            let mut now = START;
            let mut rounds = 0;
            while state.closed_until(now).is_some() || state.is_half_open(now) {
                rounds += 1;
                prop_assert!(rounds < 20, "{:?}", state);
                match state.closed_until(now) {
                    Some(Until::At(at)) => now = at,
                    Some(Until::Forever) => prop_assert!(false, "{:?}", state),
                    None => {
                        state.apply(&policy, &probe(true), now);
                    }
                }
            }
            // Until the failures have left the window, they may open it once more.
            let later = now + 2 * HOUR;
            prop_assert_eq!(state.apply(&policy, &ended(1, 0), later), []);
            prop_assert!(state.is_idle(later), "{:?}", state);
        }

        /// The breaker opens only after enough attempts, of which enough failed.
        #[test]
        fn the_breaker_never_opens_below_its_minimum(
            policy in policy(),
            steps in proptest::collection::vec((report(), 0i64..30_000), 1..60),
        ) {
            let rule = policy.circuit_breaker.clone().unwrap();
            let mut state = State::default();
            let mut now = START;
            let mut seen: Vec<(Millis, Report)> = Vec::new();
            for (report, pause) in steps {
                now += pause;
                let was_half_open = state.is_half_open(now);
                let events = state.apply(&policy, &report, now);
                seen.push((now, report));
                if events.contains(&Event::Opened) && !was_half_open {
                    let lately = seen.iter().filter(|(at, _)| now - at <= millis(rule.window));
                    let sum = |count: fn(&Report) -> u32| -> u32 {
                        lately.clone().map(|(_, report)| count(report)).sum()
                    };
                    prop_assert!(sum(|report| report.attempts) >= rule.min_attempts);
                    prop_assert!(sum(|report| report.failures) > 0);
                }
                if events.contains(&Event::Closed) {
                    seen.clear();
                }
            }
        }

        /// A destination is closed for at least as long as the last answer asked for.
        #[test]
        fn no_answer_shortens_a_throttle(
            steps in proptest::collection::vec((report(), 0i64..2_000_000), 1..40),
        ) {
            let policy = DestinationPolicy::default();
            let mut state = State::default();
            let mut now = START;
            let mut until = START;
            for (report, pause) in steps {
                now += pause;
                state.apply(&policy, &report, now);
                let asked = report.retry_after.unwrap_or_default().min(policy.max_retry_after);
                until = until.max(now + millis(asked));
                prop_assert_eq!(state.closed_until(now), (until > now).then_some(Until::At(until)));
            }
        }

        /// Policies that were written by hand, and any times, make nothing panic.
        #[test]
        fn no_policy_and_no_clock_makes_it_panic(
            numbers in proptest::collection::vec(
                prop_oneof![Just(0u64), Just(1), Just(u64::MAX), any::<u64>()],
                8,
            ),
            share in prop_oneof![Just(f64::NAN), Just(f64::MAX), Just(-1.0), Just(0.0)],
            steps in proptest::collection::vec((step(), any_time()), 0..20),
        ) {
            let time = |index: usize| Duration::from_millis(numbers[index]);
            let breaker = CircuitBreaker::default()
                .failure_share(share)
                .window(time(0))
                .min_attempts(numbers[1] as u32)
                .open_for(time(2))
                .max_open_for(time(3))
                .probes(numbers[4] as u32)
                .successes(numbers[4] as u32);
            let rule = AutoDisable::after(time(5))
                .at_least_apart(time(6))
                .failures(numbers[7] as u32);
            let policy = DestinationPolicy::default()
                .circuit_breaker(breaker)
                .auto_disable(rule)
                .max_retry_after(time(1));
            let mut state = State::default();
            for (step, now) in &steps {
                take(&mut state, &policy, step, *now);
                let _ = (state.status("a", None, *now), state.is_idle(*now));
                prop_assert_eq!(&stored(&state), &state);
            }
            prop_assert!(State::probes(&policy) >= 1);
        }
    }
}
