//! The server that all requests go to, and its count of what arrived.
//!
//! A queue that loses requests is fast, and so is a queue that wrongly takes them for sent. So
//! every request carries a number, and the receiver records how often each number arrived.

use std::convert::Infallible;
use std::net::TcpListener;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::sync::Notify;

use crate::peer::{AnyError, NUMBER};

/// Missing requests count as lost if none arrived for this long. It is longer than any peer here
/// waits before it first retries a failed request.
const STALL: Duration = Duration::from_secs(45);

pub(crate) struct Receiver {
    url: String,
    log: Arc<Log>,
}

/// How the requests of one measurement arrived.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Tally {
    /// Never arrived.
    pub(crate) lost: u64,
    /// Arrived more than once.
    pub(crate) doubled: u64,
}

#[derive(Default)]
struct Log {
    seen: Mutex<Seen>,
    complete: Notify,
}

#[derive(Default)]
struct Seen {
    /// How often each number arrived.
    times: Vec<u8>,
    /// How many of the numbers handed out haven't arrived, except those written off.
    missing: u64,
    /// All numbers below this one are written off.
    written_off: usize,
}

impl Receiver {
    /// Starts the server on its own thread, so that it doesn't compete with a peer for the workers
    /// of the runtime.
    pub(crate) fn start() -> Result<Self, AnyError> {
        let listener = TcpListener::bind(("127.0.0.1", 0))?;
        listener.set_nonblocking(true)?;
        let url = format!("http://{}/", listener.local_addr()?);
        let log = Arc::new(Log::default());
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let theirs = Arc::clone(&log);
        thread::Builder::new()
            .name("receiver".to_owned())
            .spawn(move || runtime.block_on(serve(listener, theirs)))?;
        Ok(Self { url, log })
    }

    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    /// Hands out numbers for `count` requests. No number is handed out twice, so a late request of
    /// one measurement is never taken for a request of the next.
    pub(crate) fn expect(&self, count: u64) -> Range<u64> {
        let mut seen = self.log.seen();
        let start = seen.times.len() as u64;
        let end = start + count;
        seen.times.resize(end as usize, 0);
        seen.missing += count;
        start..end
    }

    /// Waits for all numbers handed out, and returns whether all of them arrived.
    pub(crate) async fn all(&self) -> bool {
        let mut before = u64::MAX;
        loop {
            let complete = self.log.complete.notified();
            let missing = self.log.seen().missing;
            if missing == 0 {
                return true;
            }
            if missing == before {
                return false;
            }
            before = missing;
            // Only the last request notifies. After a timeout, the loop checks whether any requests
            // arrived meanwhile.
            let _ = tokio::time::timeout(STALL, complete).await;
        }
    }

    /// Writes off the requests that haven't arrived, so that the next measurement doesn't wait for
    /// them.
    pub(crate) fn write_off(&self) {
        let mut seen = self.log.seen();
        seen.missing = 0;
        seen.written_off = seen.times.len();
    }

    pub(crate) fn tally(&self, numbers: &Range<u64>) -> Tally {
        let seen = self.log.seen();
        let mut tally = Tally::default();
        for times in &seen.times[numbers.start as usize..numbers.end as usize] {
            match times {
                0 => tally.lost += 1,
                1 => {}
                _ => tally.doubled += 1,
            }
        }
        tally
    }
}

impl Log {
    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns whether the body has a number that was handed out.
    fn record(&self, body: &[u8]) -> bool {
        let number = body
            .get(..NUMBER)
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| digits.parse::<usize>().ok());
        let Some(number) = number else {
            return false;
        };
        let mut seen = self.seen();
        let Some(times) = seen.times.get_mut(number) else {
            return false;
        };
        let first = *times == 0;
        *times = times.saturating_add(1);
        if first && number >= seen.written_off {
            seen.missing -= 1;
            if seen.missing == 0 {
                self.complete.notify_waiters();
            }
        }
        true
    }
}

async fn serve(listener: TcpListener, log: Arc<Log>) {
    let listener = match tokio::net::TcpListener::from_std(listener) {
        Ok(listener) => listener,
        Err(error) => return eprintln!("the receiver can't listen: {error}"),
    };
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                eprintln!("the receiver can't accept: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        // Otherwise, small responses would wait for an acknowledgement.
        let _ = stream.set_nodelay(true);
        let log = Arc::clone(&log);
        let service = service_fn(move |request| answer(request, Arc::clone(&log)));
        let connection = http1::Builder::new().serve_connection(TokioIo::new(stream), service);
        // A connection ends with an error whenever its client goes away.
        tokio::spawn(async move { connection.await.ok() });
    }
}

async fn answer(
    request: http::Request<Incoming>,
    log: Arc<Log>,
) -> Result<http::Response<Full<Bytes>>, Infallible> {
    let body = request.into_body().collect().await;
    let known = body.is_ok_and(|body| log.record(&body.to_bytes()));
    let mut response = http::Response::new(Full::new(Bytes::from_static(b"ok")));
    if !known {
        *response.status_mut() = http::StatusCode::BAD_REQUEST;
    }
    Ok(response)
}
