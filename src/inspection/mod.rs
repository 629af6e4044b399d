//! What an operator is shown of one request: where it stands, which attempts failed, and why it has
//! not been sent.

mod content;
mod cursor;
mod filter;
mod page;
mod state;

use std::fmt;
use std::time::{Duration, SystemTime};

use uuid::Uuid;

use crate::destination::{DestinationState, DestinationStatus};
use crate::id::RequestId;
use crate::status::Status;

pub use self::content::RequestContent;
pub use self::cursor::Cursor;
pub(crate) use self::filter::micros_of;
pub use self::filter::{
    DEFAULT_PAGE_LIMIT, MAX_PAGE_LIMIT, MAX_SEARCH_LEN, PageRequest, RequestFilter,
};
pub use self::page::{Count, Counts, MAX_COUNT, RequestPage, RequestSummary};
pub use self::state::RequestState;

/// One request with its failed attempts. [`Admin::request`](crate::admin::Admin::request) returns
/// it.
///
/// No field shows a header value, a body, a URL's path or query, or credentials. Times are by the
/// database's clock.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct RequestInfo {
    /// The id.
    pub id: RequestId,
    /// The channel.
    pub channel: String,
    /// The status.
    pub status: Status,
    /// How the queue has it. `None` if it has ended and halts no ordering key, or in a state that
    /// this version doesn't know.
    pub state: Option<RequestState>,
    /// The method. `None` if what is stored of the request can't be read, or is gone.
    pub method: Option<String>,
    /// Scheme, host and port, or the caller's limit key. `None` if it isn't known any more, as of
    /// completed requests.
    pub destination: Option<String>,
    /// The key of an [`ordered`](crate::Options::ordered) request.
    pub ordering_key: Option<String>,
    /// How many attempts were begun.
    pub attempts: u32,
    /// When the request was enqueued.
    pub created_at: SystemTime,
    /// When the next attempt is due, or was, if the request waits for one.
    pub due_at: Option<SystemTime>,
    /// When the request is given up: its [`deadline`](crate::Options::deadline).
    pub deadline: Option<SystemTime>,
    /// When the request ended.
    pub finished_at: Option<SystemTime>,
    /// The status of the final response.
    pub http_status: Option<u16>,
    /// Why the request ended, in a word. `None` if a response was the reason.
    pub error_class: Option<String>,
    /// Why the request ended, in a sentence.
    pub error: Option<String>,
    /// The new request that a replay made from this one.
    pub replayed_as: Option<RequestId>,
    /// The attempts that failed, the first one first. Of many, the first 3 and the last 20.
    pub failed_attempts: Vec<FailedAttempt>,
    /// The process that has claimed the request. `None` if none has, or if it began the first
    /// attempt a few seconds ago.
    pub owner: Option<Owner>,
    /// Until when other processes leave the request to its owner, which renews that.
    pub leased_until: Option<SystemTime>,
    /// Whether the application attached metadata to the request.
    pub has_metadata: bool,
    /// Why the request is not being sent. `None` while it is, and once it has ended.
    pub hold: Option<Hold>,
}

/// A channel of which no process begins an attempt.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct PausedChannel {
    /// The channel.
    pub channel: String,
    /// Since when, by the database's clock.
    pub since: SystemTime,
    /// Who paused it.
    pub by: String,
    /// Why, if the operator said so.
    pub reason: Option<String>,
}

/// A process that has claimed a request. `Display` says it in a few words.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Owner {
    /// Its handle: the [`RunnerInfo::id`](crate::RunnerInfo::id) of its runner.
    pub id: Uuid,
    /// The machine. `None` if it isn't known, as for a handle without a runner.
    pub host: Option<String>,
    /// The process on that machine.
    pub pid: Option<u32>,
    /// The version of this crate in the process.
    pub version: Option<String>,
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.pid, &self.host) {
            (Some(pid), Some(host)) => write!(f, "process {pid} on {host}"),
            (Some(pid), None) => write!(f, "process {pid} of handle {}", self.id),
            (None, _) => write!(f, "handle {}", self.id),
        }
    }
}

/// An attempt that failed, or got a response that asked for a retry.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct FailedAttempt {
    /// Counted from 1.
    pub number: u32,
    /// When it ended, by the database's clock.
    pub ended_at: SystemTime,
    /// How long it took.
    pub duration: Duration,
    /// The status of the response, if there was one.
    pub http_status: Option<u16>,
    /// Why it failed, in a word: the name of a [`FailureClass`](crate::FailureClass), or another
    /// one of a newer version.
    pub error_class: String,
    /// Why it failed, in a sentence.
    pub error: String,
}

/// Why a request is not being sent. `Display` says it in a sentence.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Hold {
    /// It is due later: it was enqueued with a delay, or it is to be retried.
    NotDue {
        /// When it is due.
        at: SystemTime,
        /// How long that is from now, by the database's clock.
        in_time: Duration,
    },
    /// An earlier request of its ordering key has not ended.
    Behind {
        /// The ordering key.
        key: String,
        /// The first request of the key.
        first: RequestId,
    },
    /// A dead letter halts its ordering key until that is replayed, resolved or purged.
    Halted {
        /// The ordering key.
        key: String,
        /// The dead letter.
        by: RequestId,
    },
    /// Its destination takes no requests now: see [`DestinationStatus::state`].
    Closed(Box<DestinationStatus>),
    /// Its destination takes as many requests as its limits allow, and others come first.
    Limited {
        /// The destination.
        destination: String,
        /// When it is looked at again.
        at: SystemTime,
    },
    /// A process could not read it: see [`Status::Parked`].
    Parked {
        /// Since when.
        since: SystemTime,
        /// What could not be read.
        reason: String,
        /// When a process looks at it again.
        at: SystemTime,
    },
    /// Its channel is paused: see [`Admin::pause_channel`](crate::admin::Admin::pause_channel).
    ChannelPaused(PausedChannel),
    /// No runner that is alive delivers its channel.
    NoRunner {
        /// The channel.
        channel: String,
    },
    /// The process that had it has not said that it is alive since its lease began, so another one
    /// takes the request over.
    LeaseEnded {
        /// When the lease ended.
        at: SystemTime,
    },
    /// It is due, and a runner claims it as soon as it has an attempt free.
    Queued {
        /// When it was due.
        due_at: SystemTime,
        /// How long ago that is, by the database's clock.
        waited: Duration,
    },
}

impl fmt::Display for Hold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotDue { in_time, .. } => {
                write!(f, "the next attempt is due in {}", Rough(*in_time))
            }
            Self::Behind { key, first } => write!(
                f,
                "the request {first} of the same ordering key `{key}` has not ended"
            ),
            Self::Halted { key, by } => write!(
                f,
                "the dead letter {by} halts the ordering key `{key}`; replay, resolve or purge it"
            ),
            Self::Closed(destination) => closed(destination, f),
            Self::Limited { destination, .. } => write!(
                f,
                "the destination {destination} takes as many requests as its limits allow, and \
                 others come first"
            ),
            Self::Parked { reason, .. } => {
                write!(f, "no process could read it so far: {reason}")
            }
            Self::ChannelPaused(paused) => {
                write!(f, "{} paused the channel `{}`", paused.by, paused.channel)?;
                match &paused.reason {
                    Some(reason) => write!(f, ": {reason}"),
                    None => Ok(()),
                }
            }
            Self::NoRunner { channel } => {
                write!(f, "no runner delivers the channel `{channel}`")
            }
            Self::LeaseEnded { .. } => f.write_str(
                "the process that had it has not renewed its lease; another one takes it over",
            ),
            Self::Queued { waited, .. } => write!(
                f,
                "due since {}, it waits for a runner with a free attempt",
                Rough(*waited)
            ),
        }
    }
}

fn closed(destination: &DestinationStatus, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    let name = &destination.name;
    let until = |f: &mut fmt::Formatter<'_>| match destination.until {
        Some(until) => write!(f, " until {}", httpdate::fmt_http_date(until)),
        None => Ok(()),
    };
    match (destination.state, &destination.reason) {
        (DestinationState::Paused, _) => {
            write!(f, "the destination {name} is paused")?;
            until(f)
        }
        (DestinationState::Disabled, Some(reason)) => {
            write!(f, "the destination {name} is disabled: {reason}")
        }
        (DestinationState::Disabled, None) => write!(f, "the destination {name} is disabled"),
        (DestinationState::CircuitOpen, _) => {
            write!(f, "the circuit breaker of the destination {name} is open")?;
            until(f)
        }
        (DestinationState::Throttled, _) => {
            write!(f, "the destination {name} asked to be left alone")?;
            until(f)
        }
        (state, _) => write!(f, "the destination {name} is {state}"),
    }
}

/// A time in its largest unit.
struct Rough(Duration);

impl fmt::Display for Rough {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.0.as_secs();
        match seconds {
            0..120 => write!(f, "{seconds} s"),
            120..7200 => write!(f, "{} min", seconds / 60),
            7200..172_800 => write!(f, "{} h", seconds / 3600),
            _ => write!(f, "{} days", seconds / 86_400),
        }
    }
}
