//! Which failures are retried, when, and how each is classified. The servers are real sockets on
//! loopback.

mod age;
pub mod answers;
mod panics;

use std::future::Future;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::{Duration, Instant, SystemTime};

use http::header::{DATE, HeaderValue, RETRY_AFTER};
use requeuest::classify::{Verdict, classify_fn};
use requeuest::retry::{Retry, RetryPolicy};
use requeuest::testkit::{self, TestDatabase};
use requeuest::{
    AcceptedResponse, Body, Durable, FailureClass, Options, Request, ReqwestTransport, Status,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tower::Layer;
use tower::limit::ConcurrencyLimitLayer;

use crate::support::{
    LONG, Server, builder, closed_port, eventually, in_time, migrated, post, quick, reply, rows,
    with_middleware,
};

/// A request that is tried once.
fn once(url: &str) -> Request {
    post(url, "x").with(Options::default().retry(RetryPolicy::none()))
}

/// A TCP server that handles its connections with `serve`.
async fn raw<F>(serve: impl Fn(TcpStream) -> F + Send + 'static) -> SocketAddr
where
    F: Future<Output = ()> + Send + 'static,
{
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let addr = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(serve(stream));
        }
    });
    addr
}

/// Reads a request's head and answers with these bytes, then closes the connection.
async fn answering(bytes: &'static str) -> SocketAddr {
    raw(move |mut stream| async move {
        let mut head = Vec::new();
        while !head.windows(4).any(|end| end == b"\r\n\r\n") {
            if stream.read_buf(&mut head).await.unwrap_or(0) == 0 {
                return;
            }
        }
        let _ = stream.write_all(bytes.as_bytes()).await;
        let _ = stream.shutdown().await;
        // Reads to the end, so that the connection closes without a reset.
        let _ = stream.read_to_end(&mut head).await;
    })
    .await
}

/// The failure class of a request that is tried once.
async fn class_of(database: &TestDatabase, durable: &Durable, request: Request) -> String {
    let error = in_time(durable.await_response(request)).await.unwrap_err();
    assert!(error.is_discarded(), "{error:?}");
    sqlx::query_scalar("SELECT error_class FROM requeuest.outcomes WHERE id = $1")
        .bind(uuid(&error))
        .fetch_one(database.pool())
        .await
        .unwrap()
}

#[tokio::test]
async fn the_clients_own_error_of_a_broken_body_comes_back() {
    let database = migrated().await;
    let address = answering("HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nx").await;
    let durable = builder(&database).retry(RetryPolicy::none());
    let client = with_middleware(reqwest::Client::new(), &durable.build().unwrap());
    let error = in_time(client.get(format!("http://{address}/")).send()).await;
    let error = error.unwrap_err();
    assert!(error.is_body() || error.is_decode(), "{error:?}");
}

fn uuid(error: &requeuest::Error) -> requeuest::Uuid {
    error.request_id().unwrap().into()
}

#[tokio::test]
async fn failures_before_sending_are_told_apart() {
    let database = migrated().await;
    let plain = raw(|mut stream| async move {
        let _ = stream.write_all(b"220 not TLS at all\r\n").await;
        let mut read = Vec::new();
        let _ = stream.read_to_end(&mut read).await;
    })
    .await;
    let hung_up = raw(|mut stream| async move {
        let mut hello = [0; 4096];
        let _ = stream.read(&mut hello).await;
    })
    .await;
    let cut_off = raw(|mut stream| async move {
        // Unread bytes turn the close into a reset.
        let mut hello = [0; 16];
        let _ = stream.read(&mut hello).await;
    })
    .await;
    // The kernel accepts connections that are never read: the handshake never ends.
    let silent = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let client = reqwest::Client::builder()
        .connect_timeout(Duration::from_millis(300))
        .build()
        .unwrap();
    let impatient = builder(&database)
        .channel("impatient")
        .transport(ReqwestTransport::new(client))
        .build()
        .unwrap();
    // Without a connect timeout, which a slow resolver could exceed before it fails.
    let patient = builder(&database)
        .channel("patient")
        .transport(ReqwestTransport::new(reqwest::Client::new()))
        .build()
        .unwrap();
    let durable = Durable::new(database.pool().clone());
    for (durable, url, class) in [
        (
            &durable,
            format!("http://{}/", closed_port().await),
            FailureClass::Connect,
        ),
        (
            &patient,
            "http://nonexistent.invalid/".to_owned(),
            FailureClass::Dns,
        ),
        (&durable, format!("https://{plain}/"), FailureClass::Tls),
        (&durable, format!("https://{hung_up}/"), FailureClass::Tls),
        (&durable, format!("https://{cut_off}/"), FailureClass::Tls),
        (
            &impatient,
            format!("https://{}/", silent.local_addr().unwrap()),
            FailureClass::ConnectTimeout,
        ),
    ] {
        let found = class_of(&database, durable, once(&url)).await;
        assert_eq!(found, class.as_str(), "{url}");
        assert!(!class.may_have_been_sent());
    }
}

#[tokio::test]
async fn failures_after_possible_sending_are_told_apart() {
    let database = migrated().await;
    let durable = builder(&database)
        .attempt_timeout(Duration::from_secs(1))
        .build()
        .unwrap();
    let silent = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let answers = [
        ("", FailureClass::Reset),
        ("HTTP/1.1 200 OK\r\ncontent-le", FailureClass::Reset),
        (
            "HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf",
            FailureClass::Incomplete,
        ),
        (
            "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhalf",
            FailureClass::Incomplete,
        ),
        (
            "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nnot a size\r\n",
            FailureClass::Protocol,
        ),
        ("+PONG this is no HTTP\r\n\r\n", FailureClass::Protocol),
        (
            "HTTP/1.1 200 OK\r\ncontent-length: 4\r\ncontent-length: 5\r\n\r\nfour",
            FailureClass::Protocol,
        ),
    ];
    let mut cases = vec![(
        silent.local_addr().unwrap(),
        "nothing at all",
        FailureClass::Timeout,
    )];
    for (answer, class) in answers {
        cases.push((answering(answer).await, answer, class));
    }
    for (addr, answer, class) in cases {
        let found = class_of(&database, &durable, once(&format!("http://{addr}/"))).await;
        assert_eq!(found, class.as_str(), "{answer:?}");
        assert!(class.may_have_been_sent());
    }
}

#[tokio::test]
async fn a_reset_connection_is_told_from_a_failed_connect() {
    let database = migrated().await;
    let resetting = raw(|mut stream| async move {
        let mut some = [0; 8];
        let _ = stream.read(&mut some).await;
        // Unread bytes turn the close into a reset.
    })
    .await;
    let durable = Durable::new(database.pool().clone());
    let request = once(&format!("http://{resetting}/"));
    let found = class_of(&database, &durable, request).await;
    assert_eq!(found, FailureClass::Reset.as_str());
}

/// A service that is never ready, or fails to become ready.
#[derive(Clone)]
struct Unready {
    fails: bool,
}

impl tower::Service<http::Request<Body>> for Unready {
    type Response = http::Response<Body>;
    type Error = tower::BoxError;
    type Future = std::future::Ready<Result<Self::Response, Self::Error>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        if self.fails {
            Poll::Ready(Err("out of order".into()))
        } else {
            Poll::Pending
        }
    }

    fn call(&mut self, _: http::Request<Body>) -> Self::Future {
        panic!("called without being ready");
    }
}

#[tokio::test]
async fn a_service_that_is_never_ready_sends_nothing() {
    let database = migrated().await;
    for fails in [true, false] {
        let durable = builder(&database)
            .attempt_timeout(Duration::from_millis(200))
            .transport(Unready { fails })
            .build()
            .unwrap();
        let found = class_of(&database, &durable, once("http://127.0.0.1/")).await;
        assert_eq!(found, FailureClass::NotReady.as_str());
        assert!(!FailureClass::NotReady.may_have_been_sent());
    }
}

#[tokio::test]
async fn an_attempt_that_stops_waiting_leaves_its_services_queue() {
    let database = migrated().await;
    let (server, answer) = Server::held(200).await;
    let client = ReqwestTransport::new(reqwest::Client::new());
    let durable = builder(&database)
        .transport(ConcurrencyLimitLayer::new(1).layer(client))
        .build()
        .unwrap();
    durable.fire(post(server.url("/"), "x")).await.unwrap();
    server.wait_for(1).await;
    let impatient = Options::default()
        .attempt_timeout(Duration::from_millis(100))
        .retry(RetryPolicy::constant(Duration::from_secs(60)));
    let caller = tokio::spawn({
        let (durable, request) = (durable.clone(), post(server.url("/"), "x"));
        async move { durable.await_response(request.with(impatient)).await }
    });
    eventually("the request waits for its next attempt", || async {
        rows(&database, "attempts WHERE error_class = 'not_ready'").await == 1
    })
    .await;
    answer.add_permits(2);
    let response = in_time(durable.await_response(post(server.url("/"), "x"))).await;
    assert_eq!(response.unwrap().status(), 200);
    assert_eq!(server.count(), 2);
    caller.abort();
}

/// Answers 503 with this `Retry-After` and `Date` once, then 200. Records when requests arrive.
async fn asking(retry_after: String, date: Option<String>) -> (Server, Arc<Mutex<Vec<Instant>>>) {
    let times = Arc::new(Mutex::new(Vec::new()));
    let noted = Arc::clone(&times);
    let server = Server::start(move |number, _| {
        noted.lock().unwrap().push(Instant::now());
        let mut response = reply(if number == 0 { 503 } else { 200 }, "");
        let headers = response.headers_mut();
        headers.insert(RETRY_AFTER, HeaderValue::from_str(&retry_after).unwrap());
        if let Some(date) = &date {
            headers.insert(DATE, HeaderValue::from_str(date).unwrap());
        }
        async move { response }
    })
    .await;
    (server, times)
}

fn between(times: &Mutex<Vec<Instant>>) -> Duration {
    let times = times.lock().unwrap();
    assert_eq!(times.len(), 2);
    times[1] - times[0]
}

#[tokio::test]
async fn retry_after_delays_the_next_attempt() {
    let database = migrated().await;
    let durable = builder(&database).retry(quick()).build().unwrap();
    // The second server's clock is days off: only its own `Date` matters.
    let wrong = SystemTime::now() - Duration::from_secs(3 * 24 * 60 * 60);
    let date = httpdate::fmt_http_date;
    for (retry_after, sent) in [
        ("1".to_owned(), None),
        (date(wrong + Duration::from_secs(1)), Some(date(wrong))),
    ] {
        let (server, times) = asking(retry_after, sent).await;
        let response = in_time(durable.await_response(post(server.url("/"), "x"))).await;
        assert_eq!(response.unwrap().status(), 200);
        assert!(between(&times) >= Duration::from_millis(990));
    }
}

#[tokio::test]
async fn retry_after_is_bounded() {
    let database = migrated().await;
    let durable = Durable::new(database.pool().clone());
    for bound in [Duration::ZERO, Duration::from_millis(20)] {
        let (server, _) = asking("86400".to_owned(), None).await;
        let policy = quick().max_retry_after(bound);
        let request = post(server.url("/"), "x").with(Options::default().retry(policy));
        let response = in_time(durable.await_response(request)).await.unwrap();
        assert_eq!(response.status(), 200);
    }
}

#[tokio::test]
async fn a_request_is_discarded_if_retry_after_exceeds_max_age() {
    let database = migrated().await;
    let (server, _) = asking("600".to_owned(), None).await;
    let durable = builder(&database)
        .retry(quick().max_age(Duration::from_secs(300)))
        .build()
        .unwrap();
    let response = in_time(durable.await_response(post(server.url("/"), "x")))
        .await
        .unwrap();
    assert_eq!(response.status(), 503);
    assert_eq!(response.headers()[RETRY_AFTER], "600");
    let status = durable.status(response.id()).await.unwrap();
    assert_eq!(status, Some(Status::Discarded));
    assert_eq!(server.count(), 1);
}

#[tokio::test]
async fn a_schedule_is_followed_to_its_end() {
    let database = migrated().await;
    let server = Server::always(503).await;
    let durable = Durable::new(database.pool().clone());
    let schedule = RetryPolicy::schedule([10, 20, 30].map(Duration::from_millis));
    let request = post(server.url("/"), "x").with(Options::default().retry(schedule));
    let response = in_time(durable.await_response(request)).await.unwrap();
    assert_eq!(response.status(), 503);
    assert_eq!(server.count(), 4);
}

#[tokio::test]
async fn delays_can_be_computed_by_a_function() {
    let database = migrated().await;
    let server = Server::always(503).await;
    let asked = Arc::new(Mutex::new(Vec::new()));
    let noted = Arc::clone(&asked);
    let durable = builder(&database)
        .retry(RetryPolicy::from_fn(move |Retry { attempts, .. }| {
            noted.lock().unwrap().push(attempts);
            (attempts < 3).then_some(Duration::from_millis(10))
        }))
        .build()
        .unwrap();
    // The delayed request waits in the queue, which doesn't store the function.
    let delayed =
        post(server.url("/"), "x").with(Options::default().delay(Duration::from_millis(50)));
    for request in [post(server.url("/"), "x"), delayed] {
        let id = durable.fire(request).await.unwrap();
        let outcome = testkit::outcome(&durable, id, LONG).await.unwrap();
        assert_eq!(outcome.status(), Status::Discarded);
        assert_eq!(std::mem::take(&mut *asked.lock().unwrap()), [1, 2, 3]);
    }
    assert_eq!(server.count(), 6);
}

#[tokio::test]
async fn a_policy_function_is_refused_in_request_options() {
    let database = migrated().await;
    let durable = Durable::new(database.pool().clone());
    let options = Options::default().retry(RetryPolicy::from_fn(|_| None));
    let error = durable
        .fire(post("http://127.0.0.1/", "x").with(options))
        .await
        .unwrap_err();
    assert!(error.is_request(), "{error:?}");
    assert_eq!(error.field(), Some("retry"));
    assert_eq!(rows(&database, "mq_msgs").await, 0);
}

#[tokio::test]
async fn a_handle_can_classify_responses_itself() {
    let database = migrated().await;
    let server = Server::in_turn(&[404, 404, 410]).await;
    let number = Arc::new(AtomicU32::new(0));
    let last = Arc::clone(&number);
    let durable = builder(&database)
        .retry(quick())
        .classify(classify_fn(move |attempt| {
            last.store(attempt.number(), Ordering::SeqCst);
            match attempt.result() {
                Ok((status, _)) if status == 404 => Verdict::Retry,
                Ok((status, _)) if status == 410 => Verdict::Discard,
                Err(FailureClass::Connect) => Verdict::Discard,
                _ => attempt.default_verdict(),
            }
        }))
        .build()
        .unwrap();
    let response = in_time(durable.await_response(post(server.url("/"), "x")))
        .await
        .unwrap();
    // Discarded, with the last response.
    assert_eq!(response.status(), 410);
    let status = durable.status(response.id()).await.unwrap();
    assert_eq!(status, Some(Status::Discarded));
    assert_eq!(number.load(Ordering::SeqCst), 3);

    // A failure that is discarded at the first attempt.
    let url = format!("http://{}/", closed_port().await);
    let error = in_time(durable.await_response(post(&url, "x")))
        .await
        .unwrap_err();
    assert_eq!(error.attempts(), Some(1), "{error:?}");

    // The request's accepted responses take precedence.
    let options = Options::default().accept([AcceptedResponse::Status(410)]);
    let request = post(server.url("/"), "x").with(options);
    let response = in_time(durable.await_response(request)).await.unwrap();
    let status = durable.status(response.id()).await.unwrap();
    assert_eq!(status, Some(Status::Completed));
}
