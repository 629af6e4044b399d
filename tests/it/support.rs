//! What the tests share: a recording HTTP server, a migrated database, and waiting for conditions.

use std::future::Future;
use std::net::SocketAddr;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{HeaderMap, Method, Request, Response, Uri, Version};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use requeuest::retry::RetryPolicy;
use requeuest::testkit::{self, Postgres, TestDatabase};
use requeuest::{Durable, DurableBuilder, Options};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;

/// Longer than anything here takes on a busy machine, short enough to be waited for.
pub const LONG: Duration = Duration::from_secs(30);

/// A request as the server saw it.
#[derive(Clone, Debug, PartialEq)]
pub struct Seen {
    pub method: Method,
    pub uri: Uri,
    pub version: Version,
    pub headers: HeaderMap,
    pub body: Bytes,
}

/// An HTTP server (1.1 and 2 without TLS) on a loopback port, which records what it gets before it answers.
pub struct Server {
    pub addr: SocketAddr,
    seen: Arc<Mutex<Vec<Seen>>>,
    panicked: Arc<Mutex<Option<String>>>,
    accepting: JoinHandle<()>,
}

impl Server {
    /// Answers with what `handler` makes of the request and its number, counted from 0.
    pub async fn start<H, F>(handler: H) -> Self
    where
        H: Fn(usize, Seen) -> F + Send + Sync + 'static,
        F: Future<Output = Response<Full<Bytes>>> + Send + 'static,
    {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let addr = listener.local_addr().unwrap();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let panicked = Arc::new(Mutex::new(None));
        let handler = Arc::new(handler);
        let (record, failed) = (Arc::clone(&seen), Arc::clone(&panicked));
        let accepting = tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let (record, failed) = (Arc::clone(&record), Arc::clone(&failed));
                let handler = Arc::clone(&handler);
                let service = service_fn(move |request: Request<Incoming>| {
                    let (record, failed) = (Arc::clone(&record), Arc::clone(&failed));
                    let handler = Arc::clone(&handler);
                    async move {
                        let (parts, body) = request.into_parts();
                        let Ok(body) = body.collect().await else {
                            return Err(std::io::Error::other("the client went away"));
                        };
                        let seen = Seen {
                            method: parts.method,
                            uri: parts.uri,
                            version: parts.version,
                            headers: parts.headers,
                            body: body.to_bytes(),
                        };
                        let number = {
                            let mut record = record.lock().unwrap();
                            record.push(seen.clone());
                            record.len() - 1
                        };
                        // In a task of its own, so that its panic is noticed.
                        tokio::spawn(handler(number, seen)).await.map_err(|error| {
                            *failed.lock().unwrap() = Some(error.to_string());
                            std::io::Error::other("the handler panicked")
                        })
                    }
                });
                tokio::spawn(async move {
                    // Clients may cut the connection.
                    let _ = auto::Builder::new(TokioExecutor::new())
                        .serve_connection(TokioIo::new(stream), service)
                        .await;
                });
            }
        });
        Self {
            addr,
            seen,
            panicked,
            accepting,
        }
    }

    /// Answers every request with this status and an empty body.
    pub async fn always(status: u16) -> Self {
        Self::start(move |_, _| async move { reply(status, "") }).await
    }

    /// Answers with this status and the body that it got, once for each permit.
    pub async fn held(status: u16) -> (Self, Arc<Semaphore>) {
        let gate = Arc::new(Semaphore::new(0));
        let wait = Arc::clone(&gate);
        let server = Self::start(move |_, seen| {
            let wait = Arc::clone(&wait);
            async move {
                wait.acquire().await.unwrap().forget();
                reply(status, seen.body)
            }
        })
        .await;
        (server, gate)
    }

    /// Answers with these statuses in turn, and with the last one from then on.
    pub async fn in_turn(statuses: &'static [u16]) -> Self {
        Self::start(
            move |number, _| async move { reply(statuses[number.min(statuses.len() - 1)], "") },
        )
        .await
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.addr)
    }

    pub fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }

    pub fn count(&self) -> usize {
        self.seen.lock().unwrap().len()
    }

    /// Waits until so many requests have come.
    pub async fn wait_for(&self, count: usize) {
        eventually(&format!("{count} requests"), || async {
            self.count() >= count
        })
        .await;
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.accepting.abort();
        let panicked = self.panicked.lock().unwrap().take();
        if let (Some(panicked), false) = (panicked, std::thread::panicking()) {
            panic!("a handler failed: {panicked}");
        }
    }
}

pub fn reply(status: u16, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status.try_into().unwrap();
    response
}

/// A port on which nobody listens.
pub async fn closed_port() -> SocketAddr {
    TcpListener::bind(("127.0.0.1", 0))
        .await
        .unwrap()
        .local_addr()
        .unwrap()
}

/// A database of the test's own, with the schema in it.
pub async fn migrated() -> TestDatabase {
    let _ = env_logger::builder().is_test(true).try_init();
    let database = Postgres::shared().await.unwrap().database().await.unwrap();
    requeuest::migrate(database.pool()).await.unwrap();
    database
}

/// Polls a condition until it holds, and fails the test if it never does.
pub async fn eventually<F, C>(what: &str, mut condition: C)
where
    C: FnMut() -> F,
    F: Future<Output = bool>,
{
    let deadline = Instant::now() + LONG;
    while !condition().await {
        assert!(Instant::now() < deadline, "never happened: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Fails the test if this takes too long, rather than hang.
pub async fn in_time<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(LONG, future)
        .await
        .expect("took too long")
}

/// A `POST` request with this body.
pub fn post(url: impl AsRef<str>, body: impl Into<Bytes>) -> requeuest::Request {
    let request = Request::post(url.as_ref()).body(body.into()).unwrap();
    request.try_into().unwrap()
}

/// A builder on the test's own database.
pub fn builder(database: &TestDatabase) -> DurableBuilder {
    Durable::builder(database.pool().clone())
}

/// How many rows one of the schema's tables has. `table` may end with a `WHERE` clause.
pub async fn rows(database: &TestDatabase, table: &str) -> i64 {
    count(database, &format!("SELECT count(*) FROM requeuest.{table}")).await
}

/// A number from the database.
pub async fn count(database: &TestDatabase, query: &str) -> i64 {
    sqlx::query_scalar(query)
        .fetch_one(database.pool())
        .await
        .unwrap()
}

/// Tells a copy of this test binary which part to play.
const PART: &str = "REQUEUEST_TEST_PART";

/// A copy of this test binary that runs just one of a module's ignored tests.
pub fn part(module: &str, name: &str) -> Command {
    // The name by which the test binary knows it: without the crate's.
    let (_, module) = module.split_once("::").unwrap();
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args([
            &format!("{module}::{name}"),
            "--exact",
            "--ignored",
            "--nocapture",
        ])
        .env(PART, name)
        .stdin(Stdio::null());
    command
}

/// Whether this process was started to play the part.
pub fn plays(name: &str) -> bool {
    std::env::var(PART).is_ok_and(|part| part == name)
}

/// Retries without noticeable delays, for ever.
pub fn quick() -> RetryPolicy {
    RetryPolicy::exponential()
        .base(Duration::from_millis(1))
        .cap(Duration::from_millis(20))
}

/// Lets time pass until a request that is enqueued now has fallen due and been delivered. What should never happen has had its
/// chance then: runners have listened, polled and sent all the while.
pub async fn passing(database: &TestDatabase, time: Duration) {
    let server = Server::always(200).await;
    let clock = Durable::builder(database.pool().clone())
        .channel("clock")
        .build()
        .unwrap();
    let request = Request::post(server.url("/")).body("").unwrap();
    let mut request = requeuest::Request::try_from(request).unwrap();
    request = request.with(Options::default().delay(time));
    let id = clock.fire(request).await.unwrap();
    testkit::outcome(&clock, id, LONG).await.unwrap();
}
