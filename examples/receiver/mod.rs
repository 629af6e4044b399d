//! A receiver of webhooks that takes its time, and whose answers can be changed.

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use tokio::net::TcpListener;
use tokio::time::sleep;

/// An HTTP server on a loopback port. It ends with the process.
pub(crate) struct Receiver {
    pub(crate) origin: String,
    seen: Arc<Seen>,
}

/// What a receiver answers, and how many requests it has at a time.
#[derive(Default)]
struct Seen {
    status: AtomicU16,
    takes: Duration,
    now: AtomicUsize,
    most: AtomicUsize,
    answered: AtomicUsize,
}

impl Receiver {
    pub(crate) async fn start(status: u16, takes: Duration) -> std::io::Result<Self> {
        let status = status.into();
        let seen = Arc::new(Seen {
            status,
            takes,
            ..Seen::default()
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

    /// The largest number of requests that it had at the same time.
    pub(crate) fn most_at_a_time(&self) -> usize {
        self.seen.most.load(SeqCst)
    }
}

async fn receive(State(seen): State<Arc<Seen>>) -> StatusCode {
    let now = seen.now.fetch_add(1, SeqCst) + 1;
    seen.most.fetch_max(now, SeqCst);
    sleep(seen.takes).await;
    seen.now.fetch_sub(1, SeqCst);
    seen.answered.fetch_add(1, SeqCst);
    StatusCode::from_u16(seen.status.load(SeqCst)).unwrap_or_default()
}
