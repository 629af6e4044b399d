//! Where a request stands.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::ParseNameError;

/// The state of a persisted request, as [`Durable::status`](crate::Durable::status) reports it.
///
/// ```text
/// Scheduled → Available → Running → Completed | Discarded | Cancelled | Ambiguous
///                 ↑          ↓
///                 └── Retryable
/// ```
///
/// Text and serde use the lower-case name, such as `"completed"`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Status {
    /// Not due yet: it was enqueued with a delay and has not been attempted.
    Scheduled,
    /// Due, and waiting for a runner.
    Available,
    /// An attempt is being made.
    Running,
    /// An attempt failed; the next one is due later.
    Retryable,
    /// Answered with a response that counts as final.
    Completed,
    /// Given up: the retry policy allows no further attempt. Kept, with the last error.
    Discarded,
    /// Cancelled before it was answered.
    Cancelled,
    /// The bytes may have left, no answer came, and the request asked not to be sent twice.
    Ambiguous,
}

impl Status {
    /// Whether the request has ended: no further attempt will be made.
    pub fn is_terminal(self) -> bool {
        matches!(
            self,
            Self::Completed | Self::Discarded | Self::Cancelled | Self::Ambiguous
        )
    }

    /// The lower-case name, as it stands in the database.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Scheduled => "scheduled",
            Self::Available => "available",
            Self::Running => "running",
            Self::Retryable => "retryable",
            Self::Completed => "completed",
            Self::Discarded => "discarded",
            Self::Cancelled => "cancelled",
            Self::Ambiguous => "ambiguous",
        }
    }

    pub(crate) fn from_name(name: &str) -> Option<Self> {
        name.parse().ok()
    }
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
            "completed" => Self::Completed,
            "discarded" => Self::Discarded,
            "cancelled" => Self::Cancelled,
            "ambiguous" => Self::Ambiguous,
            _ => return Err(ParseNameError::new("a status")),
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
        for status in [
            Status::Scheduled,
            Status::Available,
            Status::Running,
            Status::Retryable,
            Status::Completed,
            Status::Discarded,
            Status::Cancelled,
            Status::Ambiguous,
        ] {
            assert_eq!(status.as_str().parse(), Ok(status));
            let json = serde_json::to_string(&status).unwrap();
            assert_eq!(json, format!("\"{status}\""));
            assert_eq!(serde_json::from_str::<Status>(&json).unwrap(), status);
        }
        let error = "Completed".parse::<Status>().unwrap_err();
        assert_eq!(error.to_string(), "not the name of a status");
    }
}
