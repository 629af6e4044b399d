//! The circuit breaker of a destination: closed, open, half-open.

use serde::{Deserialize, Serialize};

use super::event::DestinationEventKind as Event;
use super::policy::{CircuitBreaker, Unknown};
use super::state::{Millis, Span, millis};
use super::window::{Counts, Window};

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct Breaker {
    phase: Phase,
    /// Since when and until when it is open. After that it is half-open.
    open: Span,
    /// How many times it has opened since it was closed.
    trips: u32,
    /// How many probes have succeeded since it was open.
    successes: u32,
    #[serde(flatten)]
    unknown: Unknown,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Phase {
    #[default]
    Closed,
    Open,
    HalfOpen,
}

impl Breaker {
    /// The phase at this time. An open breaker becomes half-open by itself.
    pub(super) fn phase(&self, now: Millis) -> Phase {
        match self.phase {
            Phase::Open if !self.open.is_active(now) => Phase::HalfOpen,
            phase => phase,
        }
    }

    /// Until when it is open.
    pub(super) fn open_until(&self, now: Millis) -> Option<Millis> {
        (self.phase(now) == Phase::Open).then_some(self.open.until)
    }

    pub(super) fn is_default(&self) -> bool {
        *self == Self::default()
    }

    /// Whether nothing of it is worth storing.
    pub(super) fn is_idle(&self) -> bool {
        self.phase == Phase::Closed && self.unknown.is_empty()
    }

    /// Forgets an open breaker if no attempt was made for so long after its end.
    pub(super) fn forget(&mut self, unused: Millis, now: Millis) {
        let ended = self.open.until.saturating_add(unused);
        if self.phase(now) == Phase::HalfOpen && now > ended {
            *self = Self {
                unknown: std::mem::take(&mut self.unknown),
                ..Self::default()
            };
        }
    }

    /// Moves on after attempts, which the window has counted already, or after some time.
    pub(super) fn apply(
        &mut self,
        rule: Option<&CircuitBreaker>,
        window: &mut Window,
        probe: Option<bool>,
        now: Millis,
        events: &mut Vec<Event>,
    ) {
        let Some(rule) = rule else {
            return self.close(window, events);
        };
        if self.phase == Phase::Open && self.phase(now) == Phase::HalfOpen {
            self.phase = Phase::HalfOpen;
            self.successes = 0;
            events.push(Event::HalfOpen);
        }
        match (self.phase, probe) {
            (Phase::Closed, _) if is_over(rule, window.sum(now)) => self.open(rule, now, events),
            (Phase::HalfOpen, Some(true)) => {
                self.successes = self.successes.saturating_add(1);
                if self.successes >= rule.successes {
                    self.close(window, events);
                }
            }
            (Phase::HalfOpen, Some(false)) => self.open(rule, now, events),
            // Results of attempts that were sent before it opened change nothing.
            (Phase::Closed | Phase::Open | Phase::HalfOpen, _) => {}
        }
    }

    fn open(&mut self, rule: &CircuitBreaker, now: Millis, events: &mut Vec<Event>) {
        let doubled = 1u32.checked_shl(self.trips).unwrap_or(u32::MAX);
        let time = rule.open_for.saturating_mul(doubled).min(rule.max_open_for);
        self.phase = Phase::Open;
        self.trips = self.trips.saturating_add(1);
        self.successes = 0;
        self.open = Span::new(now, millis(time).max(1));
        events.push(Event::Opened);
    }

    /// Closes it, and forgets the failures that opened it.
    pub(super) fn close(&mut self, window: &mut Window, events: &mut Vec<Event>) {
        if self.phase != Phase::Closed {
            *self = Self {
                unknown: std::mem::take(&mut self.unknown),
                ..Self::default()
            };
            window.clear();
            events.push(Event::Closed);
        }
    }
}

/// Whether so many attempts failed that the breaker opens.
fn is_over(rule: &CircuitBreaker, counts: Counts) -> bool {
    let number = |count: u64| f64::from(u32::try_from(count).unwrap_or(u32::MAX));
    counts.failures > 0
        && counts.attempts >= u64::from(rule.min_attempts)
        && number(counts.failures) >= rule.failure_share * number(counts.attempts)
}
