//! The status of a request.

use std::fmt;
use std::str::FromStr;
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use crate::codec::Unreadable;
use crate::error::ParseNameError;
use crate::id::RequestId;

/// The status of a persisted request, as [`Durable::status`](crate::Durable::status) reports it.
///
/// ```text
/// Scheduled → Available → Running → Completed | Discarded | Cancelled | Ambiguous
///              ↕  ↑          ↓
///        Deferred ├── Retryable
///                 └── Parked
/// ```
///
/// Text and serde use the lower-case name, such as `"completed"`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Status {
    /// Not due yet: the request was enqueued with a delay and has not been attempted.
    Scheduled,
    /// Due, and waiting for a runner.
    Available,
    /// Due, and its destination takes no more requests now: it is paused, disabled, or as many
    /// attempts as it may have are under way. No attempt is counted meanwhile.
    Deferred,
    /// An attempt is in progress.
    Running,
    /// An attempt failed, and the next one is due later.
    Retryable,
    /// A process claimed the request and could not read what is stored of it: a newer version wrote
    /// it, another program did, it is encrypted with a key that the process doesn't have, or it is
    /// damaged. It was not sent, no attempt is counted, and later requests of its ordering key
    /// wait.
    ///
    /// Processes look at it again and again, every 5 seconds at first and every 10 minutes in the
    /// end, and one that can read it sends it. Until then it stays, also beyond its deadline.
    /// [`Durable::parked`](crate::Durable::parked) says what could not be read. Let a process of a
    /// newer version, or one with the key, deliver the channel, repair the row, or
    /// [cancel](crate::Durable::cancel) the request.
    Parked,
    /// The request got a final response, or was resolved as sent. For a fired request that is 2xx,
    /// or one of its [accepted](crate::Options::accept) responses.
    Completed,
    /// The request was given up and won't be attempted again, or it was fired and got a final
    /// response other than a success. It is a dead letter, with its last response or error.
    Discarded,
    /// The request was cancelled before it got a final response.
    Cancelled,
    /// The request may have been sent but got no response, or one that leaves open whether the
    /// receiver has acted, and it must not be sent twice. It is a dead letter.
    Ambiguous,
}

impl Status {
    pub(crate) const ALL: [Self; 10] = [
        Self::Scheduled,
        Self::Available,
        Self::Deferred,
        Self::Running,
        Self::Retryable,
        Self::Parked,
        Self::Completed,
        Self::Discarded,
        Self::Cancelled,
        Self::Ambiguous,
    ];

    /// Whether the request has finished: no further attempt will be made.
    pub fn is_terminal(self) -> bool {
        matches!(
            self,
            Self::Completed | Self::Discarded | Self::Cancelled | Self::Ambiguous
        )
    }

    /// The lower-case name, as stored in the database.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Scheduled => "scheduled",
            Self::Available => "available",
            Self::Deferred => "deferred",
            Self::Running => "running",
            Self::Retryable => "retryable",
            Self::Parked => "parked",
            Self::Completed => "completed",
            Self::Discarded => "discarded",
            Self::Cancelled => "cancelled",
            Self::Ambiguous => "ambiguous",
        }
    }

    pub(crate) fn from_name(name: &str) -> Option<Self> {
        name.parse().ok()
    }

    /// A status that is stored. A later version may have others.
    pub(crate) fn stored(name: &str) -> Result<Self, Unreadable> {
        Self::from_name(name).ok_or_else(|| Unreadable::status(name))
    }
}

/// A request that could not be read: see [`Status::Parked`].
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ParkedRequest {
    /// The id.
    pub id: RequestId,
    /// The channel.
    pub channel: String,
    /// Since when it is parked, by the database's clock.
    pub since: SystemTime,
    /// What could not be read: the field or variant and its position, and no value of the request.
    pub reason: String,
}

impl FromStr for Status {
    type Err = ParseNameError;

    /// Parses the name that [`as_str`](Self::as_str) returns.
    fn from_str(name: &str) -> Result<Self, Self::Err> {
        Ok(match name {
            "scheduled" => Self::Scheduled,
            "available" => Self::Available,
            "running" => Self::Running,
            "retryable" => Self::Retryable,
            "deferred" => Self::Deferred,
            "parked" => Self::Parked,
            "completed" => Self::Completed,
            "discarded" => Self::Discarded,
            "cancelled" => Self::Cancelled,
            "ambiguous" => Self::Ambiguous,
            _ => return Err(ParseNameError::new("the name of a status")),
        })
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_survive_text_and_serde() {
        for status in Status::ALL {
            assert_eq!(status.as_str().parse(), Ok(status));
            let json = serde_json::to_string(&status).unwrap();
            assert_eq!(json, format!("\"{status}\""));
            assert_eq!(serde_json::from_str::<Status>(&json).unwrap(), status);
        }
        let error = "Completed".parse::<Status>().unwrap_err();
        assert_eq!(error.to_string(), "not the name of a status");
    }
}
