//! The client that sends if no other transport was given, with a bound on its idle connections.
//!
//! A [`reqwest::Client`] bounds the idle connections to each host, but not to all hosts: requests
//! to ten thousand receivers would leave ten thousand sockets. A client's idle connections are
//! closed with it, so this transport counts the connections that its client opens, and replaces the
//! client after a number of them. A connection in use stays until its response is read.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use pin_project::pin_project;
use tower::{Layer, Service};

use super::{ReqwestFuture, ReqwestTransport};
use crate::body::Body;

/// How long a connection may be idle. Shorter than the keep-alive of usual load balancers, which
/// would close it while a request is on its way.
const IDLE_TIMEOUT: Duration = Duration::from_secs(30);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// How many header fields a response may have. Its head may take 400 KiB, which is hyper's limit.
const MAX_RESPONSE_HEADERS: usize = 1000;
/// The limit of a head in HTTP/2, about that of HTTP/1.
const MAX_HTTP2_HEAD: u32 = 400 * 1024;
/// How many connections may be idle at least.
const MIN_IDLE: usize = 64;

/// Further settings of each client.
pub(super) type Setup = Arc<dyn Fn(reqwest::ClientBuilder) -> reqwest::ClientBuilder + Send + Sync>;

/// Follows no redirects, because the answer to a request is its response. Has no retries of its
/// own, because each attempt must be counted.
#[derive(Clone, Debug)]
pub(crate) struct PlainTransport {
    shared: Arc<Shared>,
}

struct Shared {
    current: Mutex<Counted>,
    setup: Option<Setup>,
    /// How many connections may be idle, in all.
    max_idle: usize,
}

/// A client, and how many connections it has opened.
#[derive(Debug)]
struct Counted {
    client: ReqwestTransport,
    opened: Opened,
}

impl PlainTransport {
    /// A transport for this many attempts at the same time.
    pub(super) fn new(concurrency: usize, setup: Option<Setup>) -> Result<Self, reqwest::Error> {
        let current = Mutex::new(Counted::new(setup.as_ref())?);
        // As many again as can be in use, so that a burst to one host keeps its connections.
        let max_idle = concurrency.saturating_mul(2).max(MIN_IDLE);
        Ok(Self {
            shared: Arc::new(Shared {
                current,
                setup,
                max_idle,
            }),
        })
    }

    fn client(&self) -> ReqwestTransport {
        let current = self.shared.current.lock();
        let mut current = current.unwrap_or_else(PoisonError::into_inner);
        if current.opened.count() >= self.shared.max_idle {
            // Where no client can be made any more, the current one continues.
            match Counted::new(self.shared.setup.as_ref()) {
                Ok(new) => *current = new,
                Err(error) => tracing::debug!(%error, "the client could not be replaced"),
            }
        }
        current.client.clone()
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared")
            .field("max_idle", &self.max_idle)
            .finish_non_exhaustive()
    }
}

impl Counted {
    fn new(setup: Option<&Setup>) -> Result<Self, reqwest::Error> {
        let opened = Opened::default();
        let mut client = settings().connector_layer(opened.clone());
        if let Some(setup) = setup {
            client = setup(client);
        }
        let client = client.build()?;
        Ok(Self {
            client: ReqwestTransport::new(client),
            opened,
        })
    }
}

fn settings() -> reqwest::ClientBuilder {
    reqwest::Client::builder()
        .redirect(reqwest::redirect::Policy::none())
        .retry(reqwest::retry::never())
        .connect_timeout(CONNECT_TIMEOUT)
        .pool_idle_timeout(IDLE_TIMEOUT)
        .http1_max_headers(MAX_RESPONSE_HEADERS)
        .http2_max_header_list_size(MAX_HTTP2_HEAD)
}

impl Service<http::Request<Body>> for PlainTransport {
    type Response = http::Response<reqwest::Body>;
    type Error = reqwest::Error;
    type Future = ReqwestFuture;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), reqwest::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> ReqwestFuture {
        self.client().call(request)
    }
}

/// Counts the connections that a connector makes.
#[derive(Clone, Debug, Default)]
struct Opened(Arc<AtomicUsize>);

impl Opened {
    fn count(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }
}

impl<S> Layer<S> for Opened {
    type Service = Counting<S>;

    fn layer(&self, connector: S) -> Counting<S> {
        Counting {
            connector,
            opened: self.clone(),
        }
    }
}

#[derive(Clone, Debug)]
struct Counting<S> {
    connector: S,
    opened: Opened,
}

impl<S: Service<R>, R> Service<R> for Counting<S> {
    type Response = S::Response;
    type Error = S::Error;
    type Future = Connecting<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.connector.poll_ready(cx)
    }

    fn call(&mut self, destination: R) -> Self::Future {
        Connecting {
            connecting: self.connector.call(destination),
            opened: self.opened.clone(),
        }
    }
}

#[pin_project]
struct Connecting<F> {
    #[pin]
    connecting: F,
    opened: Opened,
}

impl<F: Future<Output = Result<T, E>>, T, E> Future for Connecting<F> {
    type Output = Result<T, E>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let connected = ready!(this.connecting.poll(cx));
        if connected.is_ok() {
            this.opened.0.fetch_add(1, Ordering::Relaxed);
        }
        Poll::Ready(connected)
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use http_body_util::Empty;
    use hyper::body::{Bytes, Incoming};
    use hyper::service::service_fn;
    use hyper_util::rt::{TokioExecutor, TokioIo};
    use tokio::net::TcpListener;

    use super::*;

    /// Most clients take 16 KiB.
    #[tokio::test]
    async fn a_large_head_in_http2_is_a_response() {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let url = format!("http://{}/", listener.local_addr().unwrap());
        tokio::spawn(async move {
            let (stream, _) = listener.accept().await.unwrap();
            let service = service_fn(async |_: http::Request<Incoming>| {
                let mut response = http::Response::new(Empty::<Bytes>::new());
                for number in 0..300 {
                    let name = http::HeaderName::try_from(format!("x-{number}")).unwrap();
                    let value = http::HeaderValue::try_from("v".repeat(1000)).unwrap();
                    response.headers_mut().insert(name, value);
                }
                Ok::<_, Infallible>(response)
            });
            let _ = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
                .serve_connection(TokioIo::new(stream), service)
                .await;
        });
        let client = settings().http2_prior_knowledge().build().unwrap();
        let response = client.get(url).send().await.unwrap();
        assert_eq!(response.version(), http::Version::HTTP_2);
        assert!(response.headers().len() >= 300);
    }
}
