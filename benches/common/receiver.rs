//! An HTTP server on its own thread that counts the requests it receives.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::StatusCode;
use http_body_util::{BodyExt, Full};
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;
use tokio::sync::Notify;

use super::AnyError;

/// Longer than any measurement may stall.
const PATIENCE: Duration = Duration::from_secs(300);
/// The header in which clients may name themselves.
pub(crate) const SENDER: &str = "sender";

pub(crate) struct Receiver {
    pub(crate) url: String,
    counted: Arc<Counts>,
}

#[derive(Default)]
struct Counts {
    received: AtomicUsize,
    /// `reached` is notified when this many requests have arrived.
    goal: AtomicUsize,
    reached: Notify,
    senders: Mutex<BTreeMap<Vec<u8>, usize>>,
}

impl Receiver {
    pub(crate) fn start() -> Result<Self, AnyError> {
        Self::answering(StatusCode::OK)
    }

    /// Answers all requests with this status.
    pub(crate) fn answering(status: StatusCode) -> Result<Self, AnyError> {
        let listener = std::net::TcpListener::bind(("127.0.0.1", 0))?;
        listener.set_nonblocking(true)?;
        let url = format!("http://{}/", listener.local_addr()?);
        let counted = Arc::new(Counts::default());
        let counter = Arc::clone(&counted);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        std::thread::spawn(move || runtime.block_on(serve(listener, counter, status)));
        Ok(Self { url, counted })
    }

    pub(crate) fn received(&self) -> usize {
        self.counted.received.load(Ordering::SeqCst)
    }

    /// How many requests arrived from each sender that named itself.
    pub(crate) fn by_sender(&self) -> Vec<usize> {
        let senders = &self.counted.senders;
        let senders = senders.lock().unwrap_or_else(PoisonError::into_inner);
        senders.values().copied().collect()
    }

    /// Waits until at least this many requests have arrived since the start.
    pub(crate) async fn wait_for(&self, count: usize) -> Result<Instant, AnyError> {
        self.counted.goal.store(count, Ordering::SeqCst);
        let reached = async {
            while self.received() < count {
                let notified = self.counted.reached.notified();
                if self.received() >= count {
                    break;
                }
                notified.await;
            }
        };
        tokio::time::timeout(PATIENCE, reached).await?;
        Ok(Instant::now())
    }

    /// Fails unless exactly this many requests have arrived since the start.
    pub(crate) fn expect(&self, count: usize) -> Result<(), AnyError> {
        match self.received() {
            received if received == count => Ok(()),
            received => Err(format!("{count} requests were made and {received} received").into()),
        }
    }
}

async fn serve(listener: std::net::TcpListener, counted: Arc<Counts>, status: StatusCode) {
    let Ok(listener) = TcpListener::from_std(listener) else {
        return;
    };
    while let Ok((stream, _)) = listener.accept().await {
        let _ = stream.set_nodelay(true);
        let counted = Arc::clone(&counted);
        let service = service_fn(move |request: http::Request<hyper::body::Incoming>| {
            let counted = Arc::clone(&counted);
            async move {
                if let Some(sender) = request.headers().get(SENDER) {
                    let senders = &counted.senders;
                    let mut senders = senders.lock().unwrap_or_else(PoisonError::into_inner);
                    *senders.entry(sender.as_bytes().to_vec()).or_default() += 1;
                }
                let _ = request.into_body().collect().await;
                let received = counted.received.fetch_add(1, Ordering::SeqCst) + 1;
                if received == counted.goal.load(Ordering::SeqCst) {
                    counted.reached.notify_one();
                }
                let mut response = http::Response::new(Full::new(Bytes::from_static(b"ok")));
                *response.status_mut() = status;
                Ok::<_, Infallible>(response)
            }
        });
        tokio::spawn(
            hyper::server::conn::http1::Builder::new()
                .serve_connection(TokioIo::new(stream), service),
        );
    }
}
