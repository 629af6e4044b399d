//! What an engine was told by its builder.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use http::{HeaderName, Uri};

use crate::classify::Classifier;
use crate::destination::{DestinationEvent, DestinationPolicy, Policies};
use crate::engine::attempt::hooks::Hooks;
use crate::error::Error;
#[cfg(feature = "ssrf-guard")]
use crate::guard::Guard;
use crate::idempotency_header::IdempotencyHeader;
use crate::recorder::SharedRecorder;
use crate::redirects::Redirects;
use crate::retry::RetryPolicy;
use crate::trace_context::Tracing;

/// Told of what happens to destinations.
#[derive(Clone)]
pub(crate) struct DestinationObserver(pub(crate) Arc<dyn Fn(&DestinationEvent) + Send + Sync>);

impl fmt::Debug for DestinationObserver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DestinationObserver")
    }
}

#[derive(Debug)]
pub(crate) struct Config {
    /// The channel of requests that name none.
    pub(crate) channel: Arc<str>,
    /// The channels that the runner delivers. `None` for every channel.
    pub(crate) deliver: Option<Vec<Arc<str>>>,
    pub(crate) concurrency: usize,
    /// The share of the slots that one destination takes at most.
    pub(crate) max_share: f64,
    pub(crate) policies: Policies,
    /// The policy of destinations without another one.
    pub(crate) destination_policy: DestinationPolicy,
    pub(crate) on_destination_event: Option<DestinationObserver>,
    pub(crate) recorder: Option<SharedRecorder>,
    /// How many requests, and bytes of them, may wait to be persisted.
    pub(crate) max_queued_requests: usize,
    pub(crate) max_queued_bytes: usize,
    /// How long a request waits for a key that another transaction holds.
    pub(crate) max_key_wait: Duration,
    /// How many bytes of large request bodies attempts may have in memory.
    pub(crate) max_sending_bytes: usize,
    /// How many bytes of results may wait for their commit before no further attempt begins.
    pub(crate) max_unsettled_bytes: usize,
    pub(crate) attempt_timeout: Duration,
    /// How many attempts in a row may be lost with their processes.
    pub(crate) max_lost_attempts: u32,
    /// How many outcomes of a channel are in the hands of handlers at once.
    pub(crate) handler_concurrency: usize,
    /// How long a handler may take.
    pub(crate) handler_timeout: Duration,
    /// After how many failures of its handler an outcome is parked.
    pub(crate) max_handler_failures: u32,
    pub(crate) retry_awaited: RetryPolicy,
    pub(crate) retry_fired: RetryPolicy,
    pub(crate) classifier: Classifier,
    pub(crate) hooks: Hooks,
    /// `None` costs nothing.
    pub(crate) tracing: Option<Tracing>,
    /// Headers that are not stored.
    pub(crate) strip_headers: Box<[HeaderName]>,
    pub(crate) idempotency_header: IdempotencyHeader,
    pub(crate) redirects: Redirects,
    #[cfg(feature = "ssrf-guard")]
    pub(crate) guard: Option<Arc<Guard>>,
    /// Headers that are secret, besides those that always are.
    pub(crate) redact_headers: Vec<HeaderName>,
}

impl Config {
    /// Refuses a URL that the guard denies.
    #[cfg_attr(
        not(feature = "ssrf-guard"),
        allow(clippy::unnecessary_wraps, clippy::unused_self)
    )]
    pub(crate) fn admit(&self, uri: &Uri) -> Result<(), Error> {
        #[cfg(feature = "ssrf-guard")]
        if let Some(guard) = &self.guard {
            guard.admit(uri).map_err(|denied| Error::denied(&denied))?;
        }
        #[cfg(not(feature = "ssrf-guard"))]
        let _ = uri;
        Ok(())
    }

    /// Whether the runner delivers this channel.
    pub(crate) fn delivers(&self, channel: &str) -> bool {
        self.deliver
            .as_ref()
            .is_none_or(|channels| channels.iter().any(|delivered| **delivered == *channel))
    }
}
