//! A receiver of webhooks that checks their signatures, takes its time, and whose answers can be
//! changed.

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use requeuest::webhooks::Verifier;
use tokio::net::TcpListener;
use tokio::time::sleep;

/// An HTTP server on a loopback port. It ends with the process.
pub(crate) struct Receiver {
    pub(crate) origin: String,
    seen: Arc<Seen>,
}

/// What a receiver answers, and how many requests it has at a time.
struct Seen {
    verifier: Verifier,
    status: AtomicU16,
    takes: Duration,
    now: AtomicUsize,
    most: AtomicUsize,
    answered: AtomicUsize,
    refused: AtomicUsize,
}

impl Receiver {
    /// Takes webhooks that are signed with this key.
    pub(crate) async fn start(status: u16, takes: Duration, key: &str) -> crate::Result<Self> {
        let seen = Arc::new(Seen {
            verifier: Verifier::new([key])?,
            status: status.into(),
            takes,
            now: AtomicUsize::new(0),
            most: AtomicUsize::new(0),
            answered: AtomicUsize::new(0),
            refused: AtomicUsize::new(0),
        });
        let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
        let origin = format!("http://{}", listener.local_addr()?);
        let app = Router::new().fallback(receive);
        let app = app.with_state(Arc::clone(&seen));
        tokio::spawn(async move { axum::serve(listener, app).await });
        Ok(Self { origin, seen })
    }

    /// Sets the status of all answers from now on.
    pub(crate) fn answer(&self, status: u16) {
        self.seen.status.store(status, SeqCst);
    }

    pub(crate) fn answered(&self) -> usize {
        self.seen.answered.load(SeqCst)
    }

    /// How many were not signed with its key.
    pub(crate) fn refused(&self) -> usize {
        self.seen.refused.load(SeqCst)
    }

    /// The largest number of requests that it had at the same time.
    pub(crate) fn most_at_a_time(&self) -> usize {
        self.seen.most.load(SeqCst)
    }
}

async fn receive(State(seen): State<Arc<Seen>>, headers: HeaderMap, body: Bytes) -> StatusCode {
    if seen.verifier.verify(&headers, &body).is_err() {
        seen.refused.fetch_add(1, SeqCst);
        return StatusCode::BAD_REQUEST;
    }
    let now = seen.now.fetch_add(1, SeqCst) + 1;
    seen.most.fetch_max(now, SeqCst);
    sleep(seen.takes).await;
    seen.now.fetch_sub(1, SeqCst);
    seen.answered.fetch_add(1, SeqCst);
    StatusCode::from_u16(seen.status.load(SeqCst)).unwrap_or_default()
}
