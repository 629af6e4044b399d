//! Where the queue has an unfinished request.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::ParseNameError;

/// How the queue has a request. Finer than its [`Status`](crate::Status): it tells who acts next.
///
/// Text and serde use the lower-case name, such as `"sending_once"`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum RequestState {
    /// A runner claims it once it is due, if it is the first of its ordering key.
    Waiting,
    /// A process has claimed it, and is sending it.
    Claimed,
    /// The process that made the last attempt makes the next one too.
    Held,
    /// As claimed, and it must not be sent twice.
    SendingOnce,
    /// A runner has found that an earlier request of its ordering key comes first.
    Behind,
    /// Its destination takes no more requests now.
    Deferred,
    /// A process could not read it: see [`Status::Parked`](crate::Status::Parked).
    Parked,
    /// A dead letter that halts its ordering key.
    Halted,
}

impl RequestState {
    /// All of them.
    pub(crate) const ALL: [Self; 8] = [
        Self::Waiting,
        Self::Claimed,
        Self::Held,
        Self::SendingOnce,
        Self::Behind,
        Self::Deferred,
        Self::Parked,
        Self::Halted,
    ];

    /// The lower-case name, as stored in the database.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Waiting => "waiting",
            Self::Claimed => "claimed",
            Self::Held => "held",
            Self::SendingOnce => "sending_once",
            Self::Behind => "behind",
            Self::Deferred => "deferred",
            Self::Parked => "parked",
            Self::Halted => "halted",
        }
    }

    /// `None` for a state of a newer version.
    pub(crate) fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|state| state.as_str() == name)
    }
}

impl FromStr for RequestState {
    type Err = ParseNameError;

    /// Parses the name that [`as_str`](Self::as_str) returns.
    fn from_str(name: &str) -> Result<Self, Self::Err> {
        Self::from_name(name).ok_or_else(|| ParseNameError::new("the name of a request's state"))
    }
}

impl fmt::Display for RequestState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_survive_text_and_serde() {
        for state in RequestState::ALL {
            assert_eq!(state.as_str().parse(), Ok(state));
            let json = serde_json::to_string(&state).unwrap();
            assert_eq!(json, format!("\"{state}\""));
        }
        "Held".parse::<RequestState>().unwrap_err();
    }
}
