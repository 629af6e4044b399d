//! How the background work of a handle fares.

use std::time::{Duration, SystemTime};

use uuid::Uuid;

use crate::id::RequestId;

/// A channel's handler counts as gone once no process has had one for this long: 2 minutes.
pub const HANDLER_GONE_AFTER: Duration = Duration::from_secs(120);

/// A part of a handle's sweep, which deletes what has outlived its retention.
/// [`Durable::sweep_parts`](crate::Durable::sweep_parts) returns all of them.
///
/// Worth an alert: `failures` stays above zero, or `behind` stays `true`. Then old rows pile up.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct SweepPart {
    /// What the part looks after: `outcomes`, `dead letters`, …
    pub name: &'static str,
    /// How many runs in a row have failed.
    pub failures: u32,
    /// Why the last run failed. `None` if it didn't.
    pub error: Option<String>,
    /// The last run ended before its work: more rows had expired than one run deletes, or they
    /// could not be deleted yet.
    pub behind: bool,
    /// How long ago the last run without a failure ended. `None` if there was none yet.
    pub last_success: Option<Duration>,
}

/// An outcome that could not be handed over to its channel's handler.
/// [`Durable::failed_hand_overs`](crate::Durable::failed_hand_overs) lists them.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct FailedHandOver {
    /// The id of the request.
    pub id: RequestId,
    /// The channel.
    pub channel: String,
    /// How many times its handler has failed, since the last
    /// [`retry_hand_over`](crate::Durable::retry_hand_over).
    pub failures: u32,
    /// Why the handler failed the last time. URLs are cut to scheme, host and port.
    pub error: Option<String>,
    /// When it could not be handed over for the first time, by the database's clock.
    pub since: SystemTime,
    /// Its handler has failed
    /// [`max_handler_failures`](crate::DurableBuilder::max_handler_failures) times, so it is not
    /// handed over any more until it is retried.
    pub parked: bool,
    /// A process with a handler could not read it, because a newer version wrote it or because it
    /// is damaged.
    pub unreadable: bool,
}

/// A channel whose outcomes wait for a handler.
/// [`Durable::handled_channels`](crate::Durable::handled_channels) lists them.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct HandledChannel {
    /// The channel.
    pub channel: String,
    /// A process has had a handler within the last [`HANDLER_GONE_AFTER`].
    pub has_handler: bool,
    /// How long ago a process noted that it has a handler. Processes do so every 10 seconds.
    pub last_seen: Option<Duration>,
    /// How many outcomes wait for their handler, counted up to 10,000.
    pub waiting: u64,
    /// How many more are [parked](FailedHandOver::parked), counted up to 10,000.
    pub parked: u64,
}

/// A task that a handle runs in the background for as long as it lives.
/// [`Durable::background_tasks`](crate::Durable::background_tasks) returns all of them.
///
/// Worth an alert, and a report: `panics` is above zero. The task has begun again.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct BackgroundTask {
    /// What the task does: `sweep`, `renew`, …
    pub name: &'static str,
    /// How often it has panicked. The log has an error for each time.
    pub panics: u64,
}

/// A runner that is alive, in any process. [`Durable::runners`](crate::Durable::runners) returns
/// all of them.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct RunnerInfo {
    /// Identifies the runner: each handle has another id.
    pub id: Uuid,
    /// The channels that it delivers. `None` for every channel.
    pub channels: Option<Vec<String>>,
    /// The version of this crate in its process.
    pub version: String,
    /// The machine, if its name is known.
    pub host: Option<String>,
    /// The process on that machine.
    pub pid: u32,
    /// How many requests its process had claimed when it last said that it is alive: those being
    /// sent, and those whose retry it keeps.
    pub in_flight: u32,
    /// When it registered, by the database's clock.
    pub started_at: SystemTime,
    /// When it last said that it is alive, by the database's clock.
    pub seen_at: SystemTime,
}

impl RunnerInfo {
    /// Whether the runner delivers this channel.
    pub fn delivers(&self, channel: &str) -> bool {
        self.channels
            .as_ref()
            .is_none_or(|channels| channels.iter().any(|delivered| delivered == channel))
    }
}
