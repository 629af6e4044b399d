//! Which answers end a request.

use std::fmt;
use std::ops::RangeInclusive;

use http::StatusCode;
use serde::{Deserialize, Serialize};

/// A response that ends a request, for [`Options::accept`](crate::Options::accept) and
/// [`Request::accept_responses`](crate::Request::accept_responses).
///
/// # Examples
///
/// ```
/// use requeuest::{AcceptedResponse, StatusCode};
///
/// assert!(AcceptedResponse::Success.matches(StatusCode::CREATED));
/// assert!(AcceptedResponse::from(StatusCode::CONFLICT).matches(StatusCode::CONFLICT));
/// assert!(!AcceptedResponse::from(200..=204).matches(StatusCode::NOT_FOUND));
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum AcceptedResponse {
    /// Any 2xx status.
    Success,
    /// Any response at all.
    Any,
    /// One status code.
    Status(u16),
    /// The status codes from the first to the second, both included.
    Range(u16, u16),
}

impl AcceptedResponse {
    /// Whether a response of this status is accepted.
    pub fn matches(&self, status: StatusCode) -> bool {
        match self {
            Self::Success => status.is_success(),
            Self::Any => true,
            Self::Status(code) => status.as_u16() == *code,
            Self::Range(first, last) => (*first..=*last).contains(&status.as_u16()),
        }
    }
}

impl From<StatusCode> for AcceptedResponse {
    fn from(status: StatusCode) -> Self {
        Self::Status(status.as_u16())
    }
}

impl From<RangeInclusive<u16>> for AcceptedResponse {
    fn from(range: RangeInclusive<u16>) -> Self {
        Self::Range(*range.start(), *range.end())
    }
}

/// What a response means for its request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Final,
    Retry,
}

/// Judges a response. Without a list of accepted ones the statuses that ask for a repetition are retried
/// (RFC 9110 section 15.5.9 for 408, RFC 8470 section 5.2 for 425, RFC 6585 section 4 for 429, and all of 5xx).
pub(crate) fn classify(accept: Option<&[AcceptedResponse]>, status: StatusCode) -> Verdict {
    let is_final = match accept {
        Some(accepted) => accepted.iter().any(|accepted| accepted.matches(status)),
        None => !(status.is_server_error() || matches!(status.as_u16(), 408 | 425 | 429)),
    };
    if is_final {
        Verdict::Final
    } else {
        Verdict::Retry
    }
}

/// Why an attempt brought no response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FailureClass {
    /// No answer within the attempt's time.
    Timeout,
    /// The connection could not be made.
    Connect,
    /// The connection broke, or what came over it was no HTTP.
    Transport,
    /// A response came whose status asks for another attempt.
    Status,
    /// The process or caller that made the attempt went away.
    Abandoned,
    /// The process that made the attempt was lost.
    Lost,
    /// The request's deadline passed.
    Deadline,
    /// The stored request can't be sent.
    Unusable,
}

impl FailureClass {
    /// Whether bytes of the request may have left. Without certainty they may.
    pub(crate) fn may_have_been_sent(self) -> bool {
        !matches!(self, Self::Connect | Self::Deadline | Self::Unusable)
    }

    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Timeout => "timeout",
            Self::Connect => "connect",
            Self::Transport => "transport",
            Self::Status => "status",
            Self::Abandoned => "abandoned",
            Self::Lost => "lost",
            Self::Deadline => "deadline",
            Self::Unusable => "unusable",
        }
    }
}

impl fmt::Display for FailureClass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdict(status: u16) -> Verdict {
        classify(None, StatusCode::from_u16(status).unwrap())
    }

    #[test]
    fn answers_are_final_unless_they_ask_for_a_repetition() {
        for status in [200, 204, 301, 304, 400, 401, 404, 409, 418, 600, 999] {
            assert_eq!(verdict(status), Verdict::Final, "{status}");
        }
        for status in [408, 425, 429, 500, 502, 503, 504, 599] {
            assert_eq!(verdict(status), Verdict::Retry, "{status}");
        }
    }

    #[test]
    fn a_list_of_accepted_responses_replaces_the_default() {
        let accept = [AcceptedResponse::Success, AcceptedResponse::Status(409)];
        let of = |status| classify(Some(&accept), StatusCode::from_u16(status).unwrap());
        assert_eq!(of(200), Verdict::Final);
        assert_eq!(of(409), Verdict::Final);
        assert_eq!(of(404), Verdict::Retry);
    }
}
