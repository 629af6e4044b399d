//! How the background work of a handle fares.

use std::time::Duration;

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
