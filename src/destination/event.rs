//! What an application learns about destinations.

use std::fmt;
use std::sync::Arc;
use std::time::SystemTime;

use super::policy::DestinationPolicy;

/// What happened to a destination.
///
/// The process that notices a change reports it: one process of all that share the database. After
/// a crash at the wrong moment no process does.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct DestinationEvent {
    /// `scheme://host:port`, or the limit key.
    pub destination: Arc<str>,
    /// What happened.
    pub kind: DestinationEventKind,
}

impl DestinationEvent {
    pub(crate) fn new(destination: Arc<str>, kind: DestinationEventKind) -> Self {
        Self { destination, kind }
    }
}

/// The kinds of [`DestinationEvent`]. Times are on the database's clock.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum DestinationEventKind {
    /// The circuit breaker opened, or opened again after a failed probe.
    Opened,
    /// The circuit breaker lets probes through.
    HalfOpen,
    /// The circuit breaker closed.
    Closed,
    /// An operator paused the destination.
    Paused {
        /// The end of the pause. `None` if it has none.
        until: Option<SystemTime>,
    },
    /// A pause ended, by itself or by an operator.
    Resumed,
    /// The destination asked to be left alone for a while.
    Throttled {
        /// Until when.
        until: SystemTime,
    },
    /// The destination was disabled, by an operator or by its policy.
    Disabled {
        /// Why.
        reason: String,
    },
    /// An operator enabled the destination.
    Enabled,
    /// The destination has failed for this part of what disables it.
    FailureThreshold {
        /// 50, 90 or 100.
        percent: u8,
    },
}

/// Whether a destination takes requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DestinationState {
    /// It takes all requests.
    Open,
    /// It takes requests as far as its policy's limits allow.
    Limited,
    /// Its circuit breaker lets probes through.
    HalfOpen,
    /// It asked to be left alone for a while, by `Retry-After` or by its status.
    Throttled,
    /// Its circuit breaker is open.
    CircuitOpen,
    /// An operator paused it.
    Paused,
    /// An operator or its policy disabled it.
    Disabled,
}

impl DestinationState {
    /// The name of the state: `"open"`, `"limited"`, `"half_open"`, `"throttled"`,
    /// `"circuit_open"`, `"paused"` or `"disabled"`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::Limited => "limited",
            Self::HalfOpen => "half_open",
            Self::Throttled => "throttled",
            Self::CircuitOpen => "circuit_open",
            Self::Paused => "paused",
            Self::Disabled => "disabled",
        }
    }

    /// Whether no request is sent in this state.
    pub fn is_closed(self) -> bool {
        match self {
            Self::Open | Self::Limited | Self::HalfOpen => false,
            Self::Throttled | Self::CircuitOpen | Self::Paused | Self::Disabled => true,
        }
    }
}

impl fmt::Display for DestinationState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What all processes together know of a destination. Times are on the database's clock.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct DestinationStatus {
    /// `scheme://host:port`, or the limit key.
    pub name: String,
    /// Whether it takes requests. If several things keep it closed, the one that lasts longest.
    pub state: DestinationState,
    /// When the state ends by itself. `None` if it doesn't.
    pub until: Option<SystemTime>,
    /// Why it is disabled.
    pub reason: Option<String>,
    /// The first of the failures since its last success. `None` if there are none, or if the last
    /// one is long ago.
    pub failing_since: Option<SystemTime>,
    /// How many attempts ended within the circuit breaker's window, or within the last minute if
    /// it has no breaker.
    pub attempts: u64,
    /// How many of these attempts failed.
    pub failures: u64,
    /// How many of these attempts were retries.
    pub retries: u64,
    /// The policy that applies to it. `None` if it has none of its own.
    pub policy: Option<DestinationPolicy>,
}
