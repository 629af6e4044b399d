//! Changes of many requests that processes make in the background.

use std::fmt;
use std::str::FromStr;
use std::time::SystemTime;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::change::{Entry, checked_limit};
use crate::dead_letter::Resolution;
use crate::error::{Error, ParseNameError};
use crate::inspection::{Count, RequestFilter};

/// The fastest rate of an operation, in requests a second: 100,000.
pub const MAX_RATE: f64 = 100_000.0;
/// The slowest rate of an operation: one request in 1000 seconds.
pub const MIN_RATE: f64 = 0.001;
/// How many destinations a [`Preview`] names at most: 20.
pub const MAX_PREVIEWED: usize = 20;

/// Identifies an operation on many requests.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct OperationId(Uuid);

impl OperationId {
    /// A new id, greater than all ids that this process made before.
    pub(crate) fn generate() -> Self {
        Self(Uuid::now_v7())
    }
}

impl fmt::Display for OperationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl fmt::Debug for OperationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "OperationId({})", self.0)
    }
}

impl FromStr for OperationId {
    type Err = ParseNameError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let id = text.parse();
        id.map(Self)
            .map_err(|_| ParseNameError::new("an operation id, which is a UUID"))
    }
}

impl From<Uuid> for OperationId {
    fn from(id: Uuid) -> Self {
        Self(id)
    }
}

impl From<OperationId> for Uuid {
    fn from(id: OperationId) -> Self {
        id.0
    }
}

/// What an operation does with each request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Action {
    /// Replays dead letters: see [`Durable::replay`](crate::Durable::replay). The first one to end
    /// comes first.
    Replay,
    /// Cancels unfinished requests: see [`Durable::cancel`](crate::Durable::cancel).
    Cancel,
    /// Records of ambiguous requests whether they were sent: see
    /// [`Durable::resolve`](crate::Durable::resolve).
    Resolve(Resolution),
    /// Deletes dead letters: see [`Admin::purge`](crate::admin::Admin::purge).
    Purge,
}

impl Action {
    const ALL: [Self; 5] = [
        Self::Replay,
        Self::Cancel,
        Self::Resolve(Resolution::Sent),
        Self::Resolve(Resolution::NotSent),
        Self::Purge,
    ];

    /// The name: `replay`, `cancel`, `resolve_sent`, `resolve_not_sent` or `purge`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Replay => "replay",
            Self::Cancel => "cancel",
            Self::Resolve(Resolution::Sent) => "resolve_sent",
            Self::Resolve(Resolution::NotSent) => "resolve_not_sent",
            Self::Purge => "purge",
        }
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Action {
    type Err = ParseNameError;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        let mut all = Self::ALL.into_iter();
        all.find(|action| action.as_str() == name).ok_or_else(|| {
            ParseNameError::new(
                "an action: replay, cancel, resolve_sent, resolve_not_sent or purge",
            )
        })
    }
}

/// An operation to be started: what is done, with which requests, and how fast.
///
/// # Examples
///
/// ```
/// use requeuest::Status;
/// use requeuest::admin::{Action, NewOperation, RequestFilter};
///
/// let failed = RequestFilter::new().channel("emails").status(Status::Discarded);
/// let replay = NewOperation::new(Action::Replay, failed).rate(20.0);
/// ```
#[derive(Clone, Debug, PartialEq)]
#[must_use = "it does nothing until it is started"]
pub struct NewOperation {
    pub(crate) action: Action,
    pub(crate) filter: RequestFilter,
    pub(crate) rate: Option<f64>,
    is_for_all: bool,
}

impl NewOperation {
    /// Does this with the requests that the filter selects.
    pub fn new(action: Action, filter: RequestFilter) -> Self {
        Self {
            action,
            filter,
            rate: None,
            is_for_all: false,
        }
    }

    /// Changes at most so many requests a second, from [`MIN_RATE`] to [`MAX_RATE`]. Defaults to as
    /// many as can be.
    pub fn rate(mut self, per_second: f64) -> Self {
        self.rate = Some(per_second);
        self
    }

    /// Allows a filter that selects all requests, which is refused otherwise.
    pub fn all(mut self) -> Self {
        self.is_for_all = true;
        self
    }

    /// The checked filter.
    pub(crate) fn checked(&self) -> Result<RequestFilter, Error> {
        if self.filter.is_empty() && !self.is_for_all {
            return Err(Error::request(
                "filter",
                "selects all requests; narrow it, or say so with NewOperation::all",
            ));
        }
        if let Some(rate) = self.rate {
            if !(MIN_RATE..=MAX_RATE).contains(&rate) {
                let range = format!("must be from {MIN_RATE} to {MAX_RATE} requests a second");
                return Err(Error::request("rate", range));
            }
        }
        self.filter.checked()
    }

    /// What is recorded of the start.
    pub(crate) fn entry(&self, id: OperationId) -> Entry {
        Entry::new("start_operation", id.to_string()).detail(&serde_json::json!({
            "action": self.action.as_str(),
            "filter": self.filter,
            "rate": self.rate,
        }))
    }
}

/// What an operation would do. [`Admin::preview`](crate::admin::Admin::preview) returns it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Preview {
    /// How many requests match now.
    pub count: Count,
    /// When the first one of the counted requests was enqueued.
    pub oldest: Option<SystemTime>,
    /// When the last one of the counted requests was enqueued.
    pub newest: Option<SystemTime>,
    /// How many of the counted requests go to each destination. Those with the most come first, and
    /// at most [`MAX_PREVIEWED`] of them.
    pub by_destination: Vec<(String, Count)>,
}

/// Where an operation stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum OperationState {
    /// Processes work at it.
    Running,
    /// All requests that matched were looked at.
    Finished,
    /// An operator has cancelled it. What it did before stays done.
    Cancelled,
}

impl OperationState {
    /// The name: `running`, `finished` or `cancelled`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Finished => "finished",
            Self::Cancelled => "cancelled",
        }
    }

    pub(crate) fn from_name(name: &str) -> Self {
        match name {
            "finished" => Self::Finished,
            "cancelled" => Self::Cancelled,
            _ => Self::Running,
        }
    }
}

impl fmt::Display for OperationState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// An operation and how far it is. [`Admin::operation`](crate::admin::Admin::operation) returns it.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Operation {
    /// The id.
    pub id: OperationId,
    /// What it does. `None` if it was started by a newer version that does something else.
    pub action: Option<Action>,
    /// With which requests. `None` if it was started by a newer version with another filter.
    pub filter: Option<RequestFilter>,
    /// Who started it.
    pub actor: String,
    /// Why, if the operator said so.
    pub reason: Option<String>,
    /// How many requests are changed in a second at most.
    pub rate: Option<f64>,
    /// Where it stands.
    pub state: OperationState,
    /// When it was started, by the database's clock. Requests that began to match later are left
    /// alone.
    pub started_at: SystemTime,
    /// When it finished, or was cancelled.
    pub finished_at: Option<SystemTime>,
    /// When a process last worked at it.
    pub driven_at: Option<SystemTime>,
    /// A process with a runner is alive, so that a running operation gets on.
    pub is_driven: bool,
    /// How many requests were looked at, also of those that don't match.
    pub looked: u64,
    /// How many requests were changed.
    pub done: u64,
    /// How many could not be changed: they had ended, were gone, or couldn't be read.
    pub skipped: u64,
    /// How many the database refused to change.
    pub failed: u64,
    /// How many are tried again, because transactions have their ordering keys.
    pub busy: u64,
    /// Why the last one was skipped.
    pub last_skipped: Option<String>,
    /// Why the last one failed, or what the operation waits for.
    pub last_error: Option<String>,
}

/// Which operations a page shows. All of them by default, the newest first.
#[derive(Clone, Debug, Default)]
#[must_use]
pub struct OperationFilter {
    pub(crate) is_running: bool,
    pub(crate) before: Option<OperationId>,
    pub(crate) limit: Option<u32>,
}

impl OperationFilter {
    /// All operations.
    pub fn new() -> Self {
        Self::default()
    }

    /// Only those that are running.
    pub fn running(mut self) -> Self {
        self.is_running = true;
        self
    }

    /// Only operations that were started before this one. With the last one of a page, this is the
    /// next page.
    pub fn before(mut self, id: OperationId) -> Self {
        self.before = Some(id);
        self
    }

    /// How many operations a page shows at most. Defaults to
    /// [`DEFAULT_CHANGES`](crate::admin::DEFAULT_CHANGES), and is at most
    /// [`MAX_CHANGES`](crate::admin::MAX_CHANGES).
    pub fn limit(mut self, limit: u32) -> Self {
        self.limit = Some(limit);
        self
    }

    pub(crate) fn checked(&self) -> Result<u32, Error> {
        checked_limit(self.limit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_action_is_known_by_its_name() {
        for action in Action::ALL {
            assert_eq!(action.to_string().parse::<Action>().unwrap(), action);
        }
        let error = "delete".parse::<Action>().unwrap_err();
        assert!(error.to_string().contains("resolve_not_sent"), "{error}");
        assert!("7".parse::<OperationId>().is_err());
    }

    #[test]
    fn all_requests_are_meant_only_if_the_operator_says_so() {
        let new = |filter| NewOperation::new(Action::Purge, filter);
        let error = new(RequestFilter::new()).checked().unwrap_err();
        assert_eq!(error.field(), Some("filter"));
        assert!(new(RequestFilter::new()).all().checked().is_ok());
        let some = || new(RequestFilter::new().channel("c"));
        assert!(some().checked().is_ok());
        for rate in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            let error = some().rate(rate).checked().unwrap_err();
            assert_eq!(error.field(), Some("rate"), "{rate}");
        }
        let bad = new(RequestFilter::new().channel("")).checked();
        assert_eq!(bad.unwrap_err().field(), Some("channel"));
    }
}
