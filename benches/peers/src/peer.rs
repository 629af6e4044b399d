//! What a queue must offer to be measured, and the work that all queues do.
//!
//! The work is one type, [`Call`], so that no peer stores or sends less than another.

use std::future::Future;
use std::ops::Range;

use serde::{Deserialize, Serialize};

pub(crate) type AnyError = Box<dyn std::error::Error + Send + Sync>;

/// Maximum connections in the pool of a peer: enough that commits of concurrent callers share a
/// flush.
pub(crate) const CONNECTIONS: u32 = 20;

/// The length of every body, in bytes.
pub(crate) const BODY: usize = 256;

/// The length of the number at the start of every body. The number tells the receiver which request
/// it received.
pub(crate) const NUMBER: usize = 20;

/// One HTTP POST, as a queue stores it.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct Call {
    pub(crate) url: String,
    pub(crate) body: String,
}

impl Call {
    /// Sends the request. Any status but a 2xx is an error, so that the queue tries again.
    pub(crate) async fn post(self, http: &reqwest::Client) -> Result<(), AnyError> {
        let response = http.post(self.url).body(self.body).send().await?;
        response.error_for_status()?.bytes().await?;
        Ok(())
    }
}

/// What a peer works with.
#[derive(Clone)]
pub(crate) struct Site {
    /// An empty database for this peer alone.
    pub(crate) database_url: String,
    /// The URL of the receiver.
    pub(crate) receiver: String,
    /// The maximum number of concurrent requests of the peer.
    pub(crate) concurrency: usize,
    /// The only client that may send.
    pub(crate) http: reqwest::Client,
}

impl Site {
    pub(crate) fn call(&self, number: u64) -> Call {
        Call {
            url: self.receiver.clone(),
            body: body(number),
        }
    }
}

/// The body of the request with this number.
pub(crate) fn body(number: u64) -> String {
    let number = format!("{number:0NUMBER$}");
    format!("{number:x<BODY$}")
}

/// The HTTP client of a peer. It ignores a proxy from the environment, because the receiver is on
/// loopback.
pub(crate) fn http() -> Result<reqwest::Client, reqwest::Error> {
    reqwest::Client::builder().no_proxy().build()
}

/// A queue under measurement.
pub(crate) trait Peer: Send + Sync + Sized + 'static {
    /// The name of the peer in `--only`.
    const NAME: &'static str;
    /// The crate whose version is shown.
    const CRATE: &'static str;

    /// The running workers.
    type Workers: Send + Sync + 'static;

    /// Installs the peer's schema and gets ready; nothing is delivered yet.
    fn prepare(site: Site) -> impl Future<Output = Result<Self, AnyError>> + Send;

    /// Starts delivery.
    fn start(&self) -> impl Future<Output = Result<Self::Workers, AnyError>> + Send;

    /// Persists one request, which is committed on return. Many callers call this concurrently.
    fn enqueue(
        &self,
        workers: &Self::Workers,
        number: u64,
    ) -> impl Future<Output = Result<(), AnyError>> + Send;

    /// Persists many requests in the fastest way that the peer has. No workers run meanwhile.
    fn enqueue_all(&self, numbers: Range<u64>)
    -> impl Future<Output = Result<(), AnyError>> + Send;

    /// Stops gracefully: every request that was sent is also marked as done.
    fn stop(&self, workers: Self::Workers) -> impl Future<Output = Result<(), AnyError>> + Send;
}

/// Splits a range for bulk inserts.
pub(crate) fn pieces(numbers: Range<u64>, size: usize) -> impl Iterator<Item = Range<u64>> {
    let end = numbers.end;
    numbers
        .step_by(size)
        .map(move |start| start..end.min(start + size as u64))
}
