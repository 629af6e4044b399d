//! Lists and counts of requests.

use std::fmt;
use std::time::SystemTime;

use super::cursor::Cursor;
use super::state::RequestState;
use crate::id::RequestId;
use crate::status::Status;

/// A part of a list. [`Admin::requests`](crate::admin::Admin::requests) returns it.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct RequestPage {
    /// The requests, the newest ones first: by the time at which they were enqueued.
    pub requests: Vec<RequestSummary>,
    /// Where the list continues. `None` at its end. A page looks at a bounded number of requests,
    /// so it may have few of them, or none, and a `next` anyway.
    pub next: Option<Cursor>,
}

/// A request in a list.
///
/// No field shows a header value, a body, a URL's path or query, or credentials. Times are by the
/// database's clock.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct RequestSummary {
    /// The id.
    pub id: RequestId,
    /// The channel.
    pub channel: String,
    /// The status. `None` if a newer version gave the request one that this version doesn't know.
    pub status: Option<Status>,
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
    /// When the request ended.
    pub finished_at: Option<SystemTime>,
    /// The status of the last response that is known.
    pub http_status: Option<u16>,
    /// In a word, why the request ended without success or why its last attempt failed.
    pub error_class: Option<String>,
    /// The same in a sentence.
    pub error: Option<String>,
    /// The new request that a replay made from this one.
    pub replayed_as: Option<RequestId>,
}

/// How many requests there are, as far as they were counted. `Display` shows `42`, or `10,000+` if
/// there may be more.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Count {
    /// At most 10,000.
    pub number: u64,
    /// There are no more.
    pub is_exact: bool,
}

/// How far requests are counted: 10,000.
pub const MAX_COUNT: u64 = 10_000;

impl Count {
    pub(crate) fn new(number: u64, is_exact: bool) -> Self {
        Self {
            number: number.min(MAX_COUNT),
            is_exact: is_exact && number <= MAX_COUNT,
        }
    }

    pub(crate) fn and(self, other: Self) -> Self {
        Self::new(self.number + other.number, self.is_exact && other.is_exact)
    }
}

impl fmt::Display for Count {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.number {
            number @ 0..1000 => write!(f, "{number}")?,
            number => write!(f, "{},{:03}", number / 1000, number % 1000)?,
        }
        f.write_str(if self.is_exact { "" } else { "+" })
    }
}

/// How many requests there are of each kind. [`Admin::counts`](crate::admin::Admin::counts)
/// returns it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Counts {
    /// By status, in the order of a request's life. Discarded and ambiguous ones are dead letters.
    pub by_status: Vec<(Status, Count)>,
    /// By the state in which the queue has them.
    pub by_state: Vec<(RequestState, Count)>,
}

impl Counts {
    /// How many requests have this status.
    pub fn status(&self, status: Status) -> Count {
        let mut counts = self.by_status.iter();
        let found = counts.find(|(known, _)| *known == status);
        found.map(|(_, count)| *count).unwrap_or_default()
    }

    /// How many requests the queue has in this state.
    pub fn state(&self, state: RequestState) -> Count {
        let mut counts = self.by_state.iter();
        let found = counts.find(|(known, _)| *known == state);
        found.map(|(_, count)| *count).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_count_says_whether_there_may_be_more() {
        for (number, is_exact, shown) in [
            (0, true, "0"),
            (999, true, "999"),
            (1000, true, "1,000"),
            (10_000, true, "10,000"),
            (10_001, true, "10,000+"),
            (7, false, "7+"),
            (20_000, false, "10,000+"),
        ] {
            assert_eq!(Count::new(number, is_exact).to_string(), shown);
        }
    }
}
