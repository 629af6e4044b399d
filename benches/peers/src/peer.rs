//! What a queue has to offer to be measured, and the work that all of them do.
//!
//! The work is one type, [`Call`], so that no peer stores or sends less than another.

use std::future::Future;
use std::ops::Range;

use serde::{Deserialize, Serialize};

pub(crate) type AnyError = Box<dyn std::error::Error + Send + Sync>;

/// How many connections the pool of a peer may open: enough that commits of concurrent callers share a flush.
pub(crate) const CONNECTIONS: u32 = 20;

/// The length of every body, in bytes.
pub(crate) const BODY: usize = 256;

/// The first bytes of a body, which tell the receiver which request it got.
pub(crate) const NUMBER: usize = 20;

/// One HTTP POST, as a queue stores it.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct Call {
    pub(crate) url: String,
    pub(crate) body: String,
}

impl Call {
    /// Sends it; anything but a 2xx is an error, so that the queue tries again.
    pub(crate) async fn post(self, http: &reqwest::Client) -> Result<(), AnyError> {
        let response = http.post(self.url).body(self.body).send().await?;
        response.error_for_status()?.bytes().await?;
        Ok(())
    }
}

/// Where a peer finds what it works with.
#[derive(Clone)]
pub(crate) struct Site {
    /// An empty database of its own.
    pub(crate) database_url: String,
    /// The URL of the receiver.
    pub(crate) receiver: String,
    /// How many requests the peer may have under way at a time.
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

/// The HTTP client of a peer. A proxy of the environment would stand between it and a receiver on loopback.
pub(crate) fn http() -> Result<reqwest::Client, reqwest::Error> {
    reqwest::Client::builder().no_proxy().build()
}

/// A queue under measurement.
pub(crate) trait Peer: Send + Sync + Sized + 'static {
    /// What `--only` calls it.
    const NAME: &'static str;
    /// The crate whose version is shown.
    const CRATE: &'static str;

    /// Whatever delivers, running.
    type Workers: Send + Sync + 'static;

    /// Installs the peer's schema and gets ready; nothing is delivered yet.
    fn prepare(site: Site) -> impl Future<Output = Result<Self, AnyError>> + Send;

    /// Starts to deliver.
    fn start(&self) -> impl Future<Output = Result<Self::Workers, AnyError>> + Send;

    /// Persists one request: it is committed on return. Called by many callers at a time.
    fn enqueue(
        &self,
        workers: &Self::Workers,
        number: u64,
    ) -> impl Future<Output = Result<(), AnyError>> + Send;

    /// Persists many, by the quickest way that the peer has; no workers run meanwhile.
    fn enqueue_all(&self, numbers: Range<u64>)
    -> impl Future<Output = Result<(), AnyError>> + Send;

    /// Stops gracefully: what was sent is also marked as done.
    fn stop(&self, workers: Self::Workers) -> impl Future<Output = Result<(), AnyError>> + Send;
}

/// Cuts a range into pieces for a bulk insert.
pub(crate) fn pieces(numbers: Range<u64>, size: usize) -> impl Iterator<Item = Range<u64>> {
    let end = numbers.end;
    numbers
        .step_by(size)
        .map(move |start| start..end.min(start + size as u64))
}
