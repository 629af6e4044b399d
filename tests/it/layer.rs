//! The door for tower: `DurableLayer` over HTTP clients, under and over other layers.

use std::cell::Cell;
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures_util::{FutureExt, StreamExt, future, stream};
use http::header::{ACCEPT_ENCODING, CONTENT_ENCODING, HeaderName, HeaderValue};
use http::{HeaderMap, Request, Response, StatusCode};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Empty, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::client::legacy::{self, Client};
use hyper_util::rt::TokioExecutor;
use requeuest::retry::RetryPolicy;
use requeuest::{
    Body, Durable, DurableLayer, DurableService, Options, REQUEST_ID_HEADER, RequestId,
    ReqwestTransport, ResponseFuture, Status, testkit,
};
use tokio::sync::{Notify, mpsc};
use tower::buffer::Buffer;
use tower::{Layer, Service, ServiceBuilder, ServiceExt, service_fn};
use tower_http::compression::CompressionLayer;
use tower_http::decompression::DecompressionLayer;
use tower_http::set_header::{SetRequestHeaderLayer, SetResponseHeaderLayer};
use tower_http::timeout::TimeoutLayer;
use tower_http::trace::TraceLayer;
use tower_test::mock;

use crate::support::{
    LONG, Server, closed_port, count, eventually, in_time, migrated, passing, quick, reply,
};

type Hyper = Client<HttpConnector, Body>;
type Mock = mock::Mock<Request<Body>, Response<Body>>;

const OUTER: HeaderName = HeaderName::from_static("x-outer");
const INNER: HeaderName = HeaderName::from_static("x-inner");
const YES: HeaderValue = HeaderValue::from_static("yes");

/// "a zipped answer", as gzip has it.
const ZIPPED: [u8; 35] = [
    31, 139, 8, 0, 0, 0, 0, 0, 2, 3, 75, 84, 168, 202, 44, 40, 72, 77, 81, 72, 204, 43, 46, 79, 45,
    2, 0, 212, 198, 190, 58, 15, 0, 0, 0,
];

fn hyper_client() -> Hyper {
    Client::builder(TokioExecutor::new()).build_http()
}

/// hyper's client, and how often it was called.
fn counting() -> (
    impl Service<
        Request<Body>,
        Response = Response<Incoming>,
        Error = legacy::Error,
        Future = legacy::ResponseFuture,
    > + Clone
    + Send
    + Sync
    + 'static,
    Arc<AtomicUsize>,
) {
    let calls = Arc::new(AtomicUsize::new(0));
    let (client, counted) = (hyper_client(), Arc::clone(&calls));
    let service = service_fn(move |request| {
        counted.fetch_add(1, Ordering::SeqCst);
        client.request(request)
    });
    (service, calls)
}

fn post(url: &str, body: &'static str) -> Request<Full<Bytes>> {
    Request::post(url).body(Full::from(body)).unwrap()
}

fn with(mut request: Request<Full<Bytes>>, options: Options) -> Request<Full<Bytes>> {
    request.extensions_mut().insert(options);
    request
}

async fn text<B>(response: Response<B>) -> String
where
    B: http_body::Body,
    B::Error: std::fmt::Debug,
{
    let collected = response.into_body().collect().await.unwrap();
    String::from_utf8(collected.to_bytes().into()).unwrap()
}

fn id_of<B>(response: &Response<B>) -> RequestId {
    let id = &response.headers()[REQUEST_ID_HEADER];
    id.to_str().unwrap().parse().unwrap()
}

fn quick_layer(pool: &sqlx::PgPool) -> DurableLayer {
    Durable::builder(pool.clone())
        .retry(quick())
        .build_layer()
        .unwrap()
}

#[tokio::test]
async fn requests_through_hypers_client_are_durable() {
    let database = migrated().await;
    let server = Server::start(|number, seen| async move {
        reply(if number == 0 { 503 } else { 201 }, seen.body)
    })
    .await;
    let client = ServiceBuilder::new()
        .layer(quick_layer(database.pool()))
        .service(hyper_client());

    let response = in_time(client.oneshot(post(&server.url("/a?b=c"), "hello")))
        .await
        .unwrap();
    assert_eq!(response.status(), 201);
    assert_eq!(text(response).await, "hello");
    assert_eq!(server.count(), 2);
    for seen in server.seen() {
        assert_eq!(seen.method, "POST");
        assert_eq!(seen.uri, "/a?b=c");
        assert_eq!(seen.body, "hello");
    }
    let outcomes = "select count(*) from requeuest.outcomes where status = 'completed'";
    assert_eq!(count(&database, outcomes).await, 1);
}

#[tokio::test]
async fn requests_through_reqwest_are_durable() {
    let database = migrated().await;
    let server = Server::start(|_, seen| async move { reply(200, seen.body) }).await;
    let client = reqwest::Client::builder()
        .user_agent("billing/1.0")
        .build()
        .unwrap();
    let client = DurableLayer::new(database.pool().clone()).layer(ReqwestTransport::new(client));

    let response = in_time(client.oneshot(post(&server.url("/"), "x")))
        .await
        .unwrap();
    assert_eq!(text(response).await, "x");
    assert_eq!(server.seen()[0].headers["user-agent"], "billing/1.0");
    let outcomes = "select count(*) from requeuest.outcomes where status = 'completed'";
    assert_eq!(count(&database, outcomes).await, 1);
}

/// Fails once, then answers zipped to those who understand it.
async fn zipping() -> Server {
    Server::start(|number, seen| async move {
        if number == 0 {
            return reply(503, "");
        }
        let accepts = seen.headers[ACCEPT_ENCODING].to_str().unwrap();
        assert!(accepts.contains("gzip"), "{accepts}");
        let mut response = reply(200, ZIPPED.to_vec());
        response
            .headers_mut()
            .insert(CONTENT_ENCODING, HeaderValue::from_static("gzip"));
        response
    })
    .await
}

#[tokio::test]
async fn trace_and_headers_go_over_it_and_decompression_and_timeouts_under_it() {
    let database = migrated().await;
    let server = zipping().await;
    let client = ServiceBuilder::new()
        .layer(TraceLayer::new_for_http())
        .layer(SetRequestHeaderLayer::overriding(OUTER, YES))
        .layer(TimeoutLayer::with_status_code(
            StatusCode::REQUEST_TIMEOUT,
            LONG,
        ))
        .layer(quick_layer(database.pool()))
        .layer(SetRequestHeaderLayer::overriding(INNER, YES))
        .layer(DecompressionLayer::new())
        .layer(TimeoutLayer::with_status_code(
            StatusCode::REQUEST_TIMEOUT,
            LONG,
        ))
        .map_response(|response: Response<Incoming>| response.map(Body::wrap))
        .service(hyper_client());

    let response = in_time(client.oneshot(post(&server.url("/"), "x")))
        .await
        .unwrap();
    assert_eq!(response.status(), 200);
    assert!(!response.headers().contains_key(CONTENT_ENCODING));
    assert_eq!(text(response).await, "a zipped answer");
    assert_eq!(server.count(), 2);
    for seen in server.seen() {
        assert_eq!(seen.headers[OUTER], "yes");
        assert_eq!(seen.headers[INNER], "yes");
    }
}

#[tokio::test]
async fn decompression_and_timeouts_go_over_it_and_trace_and_headers_under_it() {
    let database = migrated().await;
    let server = zipping().await;
    let layer = quick_layer(database.pool());
    let durable = layer.durable().clone();
    let client = ServiceBuilder::new()
        .layer(DecompressionLayer::new())
        .layer(TimeoutLayer::with_status_code(
            StatusCode::REQUEST_TIMEOUT,
            LONG,
        ))
        .layer(SetResponseHeaderLayer::overriding(OUTER, YES))
        .layer(layer)
        .layer(SetRequestHeaderLayer::overriding(INNER, YES))
        .layer(TraceLayer::new_for_http())
        .service(hyper_client());

    let response = in_time(client.oneshot(post(&server.url("/"), "x")))
        .await
        .unwrap();
    assert_eq!(response.headers()[OUTER], "yes");
    assert_eq!(text(response).await, "a zipped answer");
    assert_eq!(server.seen()[1].headers[INNER], "yes");

    // What is stored is what came over the wire.
    let id: uuid::Uuid = sqlx::query_scalar("select id from requeuest.outcomes")
        .fetch_one(database.pool())
        .await
        .unwrap();
    let stored = durable.response(id.into()).await.unwrap();
    assert_eq!(stored.body(), &ZIPPED[..]);
}

#[tokio::test]
async fn compression_goes_under_it_and_over_it() {
    let database = migrated().await;
    let long = "all work and no play ".repeat(100);
    let answer = long.clone();
    let server = Server::start(move |_, _| {
        let answer = answer.clone();
        async move { reply(200, answer) }
    })
    .await;
    let request = || {
        Request::get(server.url("/"))
            .header(ACCEPT_ENCODING, "gzip")
            .body(Empty::<Bytes>::new())
            .unwrap()
    };

    let under = ServiceBuilder::new()
        .layer(quick_layer(database.pool()))
        .layer(CompressionLayer::new())
        .service(hyper_client());
    let response = in_time(under.oneshot(request())).await.unwrap();
    assert_eq!(response.headers()[CONTENT_ENCODING], "gzip");
    let zipped = response.into_body().collect().await.unwrap().to_bytes();
    assert!(zipped.len() < long.len());

    let over = ServiceBuilder::new()
        .layer(DecompressionLayer::new())
        .layer(CompressionLayer::new())
        .layer(quick_layer(database.pool()))
        .service(hyper_client());
    let response = in_time(over.oneshot(request())).await.unwrap();
    assert_eq!(text(response).await, long);
}

#[tokio::test]
async fn an_attempt_that_an_inner_timeout_ends_is_repeated() {
    let database = migrated().await;
    let never = Arc::new(Notify::new());
    let server = Server::start(move |number, _| {
        let never = Arc::clone(&never);
        async move {
            if number == 0 {
                never.notified().await;
            }
            reply(200, "")
        }
    })
    .await;
    let client = ServiceBuilder::new()
        .layer(quick_layer(database.pool()))
        .layer(TimeoutLayer::with_status_code(
            StatusCode::REQUEST_TIMEOUT,
            Duration::from_millis(300),
        ))
        .map_response(|response: Response<Incoming>| response.map(Body::wrap))
        .service(hyper_client());
    let response = in_time(client.oneshot(post(&server.url("/"), "x")))
        .await
        .unwrap();
    assert_eq!(response.status(), 200);
    assert_eq!(server.count(), 2);
}

#[tokio::test]
async fn a_wrapped_service_that_is_not_ready_delays_the_attempt_and_not_the_caller() {
    let database = migrated().await;
    let (mock, mut handle): (Mock, _) = mock::pair();
    handle.allow(0);
    let mut client = quick_layer(database.pool()).layer(mock);

    for _ in 0..2 {
        future::poll_fn(|cx| {
            Service::<Request<Full<Bytes>>>::poll_ready(&mut client, cx).map(Result::unwrap)
        })
        .now_or_never()
        .expect("always ready");
    }
    let response = tokio::spawn(client.call(post("http://localhost/", "x")));
    // Persisted, and being attempted.
    eventually("the attempt began", || async {
        count(&database, "select count(*) from requeuest.mq_msgs").await == 1
    })
    .await;
    assert!(handle.next_request().now_or_never().is_none());
    assert!(!response.is_finished());

    handle.allow(1);
    let (request, answer) = in_time(handle.next_request()).await.unwrap();
    assert_eq!(request.uri(), "http://localhost/");
    answer.send_response(Response::new(Body::from("done")));
    let response = in_time(response).await.unwrap().unwrap();
    assert_eq!(text(response).await, "done");
    let failed = "select count(*) from requeuest.attempts";
    assert_eq!(count(&database, failed).await, 0);
}

#[tokio::test]
async fn only_instances_that_were_polled_ready_are_called() {
    const REQUESTS: usize = 40;
    let database = migrated().await;
    // Panics when it is called without having been ready, and no clone of it is ready from the start.
    let (mock, mut handle): (Mock, _) = mock::pair();
    handle.allow(u64::MAX);
    let client = Durable::builder(database.pool().clone())
        .retry(quick())
        .concurrency(8)
        .build_layer()
        .unwrap()
        .layer(mock);

    let answering = tokio::spawn(async move {
        // Every request is answered with 503 first.
        let mut seen = std::collections::HashSet::new();
        while let Some((request, answer)) = handle.next_request().await {
            let mut response = Response::new(Body::empty());
            if seen.insert(request.uri().clone()) {
                *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
            }
            answer.send_response(response);
        }
    });
    let callers = (0..REQUESTS).map(|number| {
        let mut client = client.clone();
        let request = post(&format!("http://localhost/{number}"), "x");
        tokio::spawn(async move {
            let ready = ServiceExt::<Request<Full<Bytes>>>::ready(&mut client);
            ready.await.unwrap().call(request).await
        })
    });
    for response in in_time(future::join_all(callers)).await {
        assert_eq!(response.unwrap().unwrap().status(), 200);
    }
    // An attempt whose task panicked would stand here as abandoned.
    let failed = "select count(*) from requeuest.attempts where error_class = 'status'";
    assert_eq!(count(&database, failed).await, REQUESTS as i64);
    let failed = "select count(*) from requeuest.attempts";
    assert_eq!(count(&database, failed).await, REQUESTS as i64);
    answering.abort();
}

#[tokio::test]
async fn a_wrapped_service_that_fails_to_get_ready_is_tried_again() {
    let database = migrated().await;
    let (mock, mut handle): (Mock, _) = mock::pair();
    handle.allow(1);
    handle.send_error("no connection today");
    let client = quick_layer(database.pool()).layer(mock);
    let response = tokio::spawn(client.oneshot(post("http://localhost/", "x")));
    let (_, answer) = in_time(handle.next_request()).await.unwrap();
    answer.send_response(Response::new(Body::empty()));
    assert_eq!(in_time(response).await.unwrap().unwrap().status(), 200);
    let error: String = sqlx::query_scalar("select error from requeuest.attempts")
        .fetch_one(database.pool())
        .await
        .unwrap();
    assert!(error.contains("no connection today"), "{error}");
}

#[tokio::test]
async fn a_buffer_goes_over_it_and_under_it() {
    let database = migrated().await;
    let server = Server::in_turn(&[503, 200]).await;
    let (client, calls) = counting();
    let client = ServiceBuilder::new()
        .layer(quick_layer(database.pool()))
        .service(Buffer::new(client, 1));
    let client = Buffer::new(client, 1);
    let callers = (0..8).map(|_| {
        let (client, request) = (client.clone(), post(&server.url("/"), "x"));
        tokio::spawn(client.oneshot(request))
    });
    for response in in_time(future::join_all(callers)).await {
        assert_eq!(response.unwrap().unwrap().status(), 200);
    }
    assert_eq!(server.count(), 9);
    assert_eq!(calls.load(Ordering::SeqCst), 9);
}

#[tokio::test]
async fn an_unanswered_request_ends_in_an_error_that_names_it() {
    let database = migrated().await;
    let layer = Durable::builder(database.pool().clone())
        .retry(quick().max_attempts(2))
        .build_layer()
        .unwrap();
    let client = layer.layer(hyper_client());
    let url = format!("http://{}/?token=hunter2", closed_port().await);
    let error = in_time(client.oneshot(post(&url, "x"))).await.unwrap_err();
    assert!(error.is_discarded(), "{error}");
    assert_eq!(error.attempts(), Some(2));
    assert!(
        !format!("{error} {error:?}").contains("hunter2"),
        "{error:?}"
    );
    let status = layer.durable().status(error.request_id().unwrap()).await;
    assert_eq!(status.unwrap(), Some(Status::Discarded));
}

/// A body that may be sent to another thread, but not be shared between two.
struct Unshared(Cell<Option<Bytes>>);

impl http_body::Body for Unshared {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        Poll::Ready(self.0.take().map(|data| Ok(Frame::data(data))))
    }
}

#[tokio::test]
async fn callers_may_send_any_body() {
    let database = migrated().await;
    let server = Server::start(|_, seen| async move { reply(200, seen.body) }).await;
    let client = DurableLayer::new(database.pool().clone()).layer(hyper_client());
    let post = || Request::post(server.url("/"));

    let full = post().body(Full::<Bytes>::from("full")).unwrap();
    let response = in_time(client.clone().oneshot(full)).await.unwrap();
    assert_eq!(text(response).await, "full");

    let empty = post().body(Empty::<Bytes>::new()).unwrap();
    let response = in_time(client.clone().oneshot(empty)).await.unwrap();
    assert_eq!(text(response).await, "");

    let frames = ["in ", "three ", "parts"].map(|part| Ok::<_, Infallible>(Frame::data(part)));
    let frames = stream::iter(frames).map(|frame| frame.map(|f| f.map_data(Bytes::from)));
    let streamed = post().body(StreamBody::new(frames)).unwrap();
    let response = in_time(client.clone().oneshot(streamed)).await.unwrap();
    assert_eq!(text(response).await, "in three parts");

    let boxed: BoxBody<Bytes, Infallible> = Full::from("boxed").boxed();
    let boxed = post().body(boxed).unwrap();
    let response = in_time(client.clone().oneshot(boxed)).await.unwrap();
    assert_eq!(text(response).await, "boxed");

    let unshared = Unshared(Cell::new(Some("unshared".into())));
    let unshared = post().body(unshared).unwrap();
    let response = in_time(client.clone().oneshot(unshared)).await.unwrap();
    assert_eq!(text(response).await, "unshared");

    let own = post().body(Body::from("own")).unwrap();
    let response = in_time(client.oneshot(own)).await.unwrap();
    assert_eq!(text(response).await, "own");

    let outcomes = "select count(*) from requeuest.outcomes";
    assert_eq!(count(&database, outcomes).await, 6);
}

#[tokio::test]
async fn a_streamed_body_is_sent_whole_with_each_attempt() {
    let database = migrated().await;
    let server = Server::in_turn(&[503, 503, 200]).await;
    let client = quick_layer(database.pool()).layer(hyper_client());
    let frames =
        stream::iter(["a", "b"].map(|part| Ok::<_, Infallible>(Frame::data(Bytes::from(part)))));
    let request = Request::post(server.url("/"))
        .body(StreamBody::new(frames))
        .unwrap();
    in_time(client.oneshot(request)).await.unwrap();
    let bodies: Vec<_> = server.seen().into_iter().map(|seen| seen.body).collect();
    assert_eq!(bodies, ["ab", "ab", "ab"]);
}

#[tokio::test]
async fn a_fired_request_is_accepted_at_once_and_known_by_its_id() {
    let database = migrated().await;
    let answer = Arc::new(Notify::new());
    let held = Arc::clone(&answer);
    let server = Server::start(move |_, seen| {
        let held = Arc::clone(&held);
        async move {
            held.notified().await;
            reply(200, seen.body)
        }
    })
    .await;
    let client = DurableLayer::new(database.pool().clone()).layer(hyper_client());
    let request = with(post(&server.url("/"), "x"), Options::default().fire());
    let response = in_time(client.clone().oneshot(request)).await.unwrap();
    assert_eq!(response.status(), StatusCode::ACCEPTED);
    let id = id_of(&response);
    assert_eq!(text(response).await, "");
    server.wait_for(1).await;
    let status = client.durable().status(id).await.unwrap();
    assert_eq!(status, Some(Status::Running));

    answer.notify_one();
    let response = in_time(client.durable().response(id)).await.unwrap();
    assert_eq!(response.text().unwrap(), "x");
}

#[tokio::test]
async fn background_attempts_go_through_the_wrapped_service() {
    let database = migrated().await;
    let server = Server::in_turn(&[503, 503, 200]).await;
    let (client, calls) = counting();
    let client = ServiceBuilder::new()
        .layer(quick_layer(database.pool()))
        .layer(SetRequestHeaderLayer::overriding(INNER, YES))
        .service(client);
    let durable = client.durable().clone();
    let request = with(post(&server.url("/"), "x"), Options::default().fire());
    let id = id_of(&in_time(client.oneshot(request)).await.unwrap());
    let outcome = testkit::outcome(&durable, id, LONG).await.unwrap();
    assert_eq!(outcome.into_result().unwrap().status(), 200);
    assert_eq!(calls.load(Ordering::SeqCst), 3);
    // The header that the inner layer sets is no part of the request, but is sent with every attempt.
    for seen in server.seen() {
        assert_eq!(seen.headers[INNER], "yes");
    }
}

#[tokio::test]
async fn a_given_transport_makes_background_attempts_and_the_wrapped_service_live_ones() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let (background, background_calls) = counting();
    let (live, live_calls) = counting();
    let durable = Durable::builder(database.pool().clone())
        .transport(background)
        .build()
        .unwrap();
    let client = durable.layer().layer(live);

    in_time(client.clone().oneshot(post(&server.url("/"), "x")))
        .await
        .unwrap();
    assert_eq!(live_calls.load(Ordering::SeqCst), 1);
    assert_eq!(background_calls.load(Ordering::SeqCst), 0);

    let later = Options::default().delay(Duration::from_millis(1)).fire();
    let response = in_time(client.oneshot(with(post(&server.url("/"), "x"), later)))
        .await
        .unwrap();
    in_time(durable.response(id_of(&response))).await.unwrap();
    assert_eq!(live_calls.load(Ordering::SeqCst), 1);
    assert_eq!(background_calls.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn nothing_is_delivered_before_a_service_was_wrapped() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let layer = DurableLayer::new(database.pool().clone());
    let durable = layer.durable().clone();
    let request = || http::Request::post(server.url("/")).body("x").unwrap();
    let here = durable.fire(request()).await.unwrap();
    let elsewhere = Durable::builder(database.pool().clone())
        .runner(false)
        .build()
        .unwrap();
    let there = elsewhere.fire(request()).await.unwrap();

    // Longer than a runner takes to look for itself.
    passing(&database, Duration::from_millis(1500)).await;
    assert_eq!(server.count(), 0);
    for id in [here, there] {
        let status = durable.status(id).await.unwrap();
        assert_eq!(status, Some(Status::Available));
    }

    let (client, calls) = counting();
    let _client = layer.layer(client);
    for id in [here, there] {
        testkit::outcome(&durable, id, LONG).await.unwrap();
    }
    assert_eq!(calls.load(Ordering::SeqCst), 2);
}

#[tokio::test]
async fn the_options_of_a_request_are_taken_from_its_extensions() {
    let database = migrated().await;
    let server = Server::in_turn(&[404, 404, 200, 503]).await;
    let client = Durable::builder(database.pool().clone())
        .deliver(["default", "billing"])
        .retry(quick())
        .build_layer()
        .unwrap()
        .layer(hyper_client());
    let send = |options| {
        let request = with(post(&server.url("/"), "x"), options);
        in_time(client.clone().oneshot(request)).map(Result::unwrap)
    };

    let accept = Options::default().accept([StatusCode::OK]);
    assert_eq!(send(accept).await.status(), 200);
    assert_eq!(server.count(), 3);

    let once = Options::default().retry(RetryPolicy::none());
    assert_eq!(send(once).await.status(), 503);
    assert_eq!(server.count(), 4);

    let delay = Duration::from_millis(300);
    let began = std::time::Instant::now();
    let later = Options::default().delay(delay).retry(RetryPolicy::none());
    send(later).await;
    assert!(began.elapsed() >= delay);

    let billing = Options::default().channel("billing");
    send(billing.retry(RetryPolicy::none())).await;
    let channel = "select count(*) from requeuest.outcomes where channel_name = 'billing'";
    assert_eq!(count(&database, channel).await, 1);

    let timeout = Options::default()
        .channel("x".repeat(56))
        .attempt_timeout(Duration::from_secs(1));
    let refused = with(post(&server.url("/"), "x"), timeout);
    let error = in_time(client.clone().oneshot(refused)).await.unwrap_err();
    assert_eq!(error.field(), Some("channel"));
}

#[tokio::test]
async fn requests_that_pass_through_are_neither_persisted_nor_repeated() {
    let database = migrated().await;
    let server = Server::always(503).await;
    let layer = Durable::builder(database.pool().clone())
        .retry(quick())
        .pass_through(|head| head.method().is_safe() && head.path() == "/safe")
        .build_layer()
        .unwrap();
    let (client, calls) = counting();
    let client = layer.layer(client);
    let get = Request::get(server.url("/safe"))
        .body(Empty::<Bytes>::new())
        .unwrap();
    let response = in_time(client.oneshot(get)).await.unwrap();
    assert_eq!(response.status(), 503);
    assert!(!response.headers().contains_key(REQUEST_ID_HEADER));
    assert_eq!(calls.load(Ordering::SeqCst), 1);
    for table in ["mq_msgs", "mq_payloads", "outcomes", "attempts"] {
        let rows = format!("select count(*) from requeuest.{table}");
        assert_eq!(count(&database, &rows).await, 0, "{table}");
    }

    let unreachable = layer.layer(hyper_client());
    let get = Request::get(format!("http://{}/safe", closed_port().await))
        .body(Empty::<Bytes>::new())
        .unwrap();
    let error = in_time(unreachable.oneshot(get)).await.unwrap_err();
    let source = std::error::Error::source(&error).unwrap();
    assert!(source.is::<legacy::Error>(), "{error:?}");
}

#[tokio::test]
async fn what_passes_through_keeps_streaming() {
    let database = migrated().await;
    // Answers at once, with whatever comes in for as long as it comes.
    let echo = service_fn(|request: Request<Body>| {
        let noted = request.extensions().get::<&str>().copied();
        assert_eq!(noted, Some("noted"));
        future::ok::<_, Infallible>(Response::new(request.into_body()))
    });
    let client = Durable::builder(database.pool().clone())
        .pass_through(|_| true)
        .build_layer()
        .unwrap()
        .layer(echo);
    let (input, frames) = mpsc::channel::<Frame<Bytes>>(1);
    let frames = stream::unfold(frames, |mut frames| async {
        let frame = frames.recv().await?;
        Some((Ok::<_, Infallible>(frame), frames))
    });
    let request = Request::post("http://localhost/")
        .extension("noted")
        .body(StreamBody::new(frames))
        .unwrap();
    let response = in_time(client.oneshot(request)).await.unwrap();
    let mut output = response.into_body();
    for part in ["one", "two"] {
        input.send(Frame::data(Bytes::from(part))).await.unwrap();
        let frame = in_time(output.frame()).await.unwrap().unwrap();
        assert_eq!(frame.into_data().unwrap(), part);
    }
    let mut trailers = HeaderMap::new();
    trailers.insert(INNER, YES);
    input.send(Frame::trailers(trailers.clone())).await.unwrap();
    let frame = in_time(output.frame()).await.unwrap().unwrap();
    assert_eq!(frame.into_trailers().unwrap(), trailers);
    drop(input);
    assert!(in_time(output.frame()).await.is_none());
    assert_eq!(
        count(&database, "select count(*) from requeuest.outcomes").await,
        0
    );
}

#[tokio::test]
async fn a_caller_that_goes_away_cancels_nothing() {
    let database = migrated().await;
    let answer = Arc::new(Notify::new());
    let held = Arc::clone(&answer);
    let server = Server::start(move |_, _| {
        let held = Arc::clone(&held);
        async move {
            held.notified().await;
            reply(200, "late")
        }
    })
    .await;
    let layer = DurableLayer::new(database.pool().clone());
    let durable = layer.durable().clone();
    let client = layer.layer(hyper_client());
    let caller = tokio::spawn(client.oneshot(post(&server.url("/"), "x")));
    server.wait_for(1).await;
    caller.abort();
    assert!(in_time(caller).await.unwrap_err().is_cancelled());
    let id: uuid::Uuid = sqlx::query_scalar("select id from requeuest.mq_msgs")
        .fetch_one(database.pool())
        .await
        .unwrap();

    answer.notify_one();
    let response = in_time(durable.response(id.into())).await.unwrap();
    assert_eq!(response.text().unwrap(), "late");
    // It was the same attempt that went on.
    assert_eq!(server.count(), 1);
}

#[tokio::test]
async fn a_caller_that_goes_away_between_two_attempts_leaves_the_next_to_the_runner() {
    let database = migrated().await;
    let server = Server::in_turn(&[503, 200]).await;
    let (background, background_calls) = counting();
    let (live, live_calls) = counting();
    let durable = Durable::builder(database.pool().clone())
        .retry(RetryPolicy::constant(Duration::from_secs(1)))
        .transport(background)
        .build()
        .unwrap();
    let client = durable.layer().layer(live);
    let caller = tokio::spawn(client.oneshot(post(&server.url("/"), "x")));
    eventually("the first attempt failed", || async {
        count(&database, "select count(*) from requeuest.attempts").await == 1
    })
    .await;
    caller.abort();
    eventually("it was delivered", || async {
        let completed = "select count(*) from requeuest.outcomes where attempts = 2";
        count(&database, completed).await == 1
    })
    .await;
    let calls = live_calls.load(Ordering::SeqCst) + background_calls.load(Ordering::SeqCst);
    assert_eq!(calls, 2);
}

#[tokio::test]
async fn an_attempt_in_flight_outlives_every_handle() {
    let database = migrated().await;
    let answer = Arc::new(Notify::new());
    let held = Arc::clone(&answer);
    let server = Server::start(move |_, _| {
        let held = Arc::clone(&held);
        async move {
            held.notified().await;
            reply(200, "late")
        }
    })
    .await;
    let client = DurableLayer::new(database.pool().clone()).layer(hyper_client());
    let caller = tokio::spawn(client.oneshot(post(&server.url("/"), "x")));
    server.wait_for(1).await;
    caller.abort();
    assert!(in_time(caller).await.unwrap_err().is_cancelled());
    answer.notify_one();
    eventually("its outcome is stored", || async {
        let stored = "select count(*) from requeuest.outcomes where status = 'completed'";
        count(&database, stored).await == 1
    })
    .await;
}

#[tokio::test]
async fn each_attempt_gets_a_fresh_copy_of_the_extensions() {
    #[derive(Clone, Debug, PartialEq)]
    struct Note(u32);

    let database = migrated().await;
    let notes = Arc::new(Mutex::new(Vec::new()));
    let noted = Arc::clone(&notes);
    let inner = service_fn(move |mut request: Request<Body>| {
        let mut notes = noted.lock().unwrap();
        let extensions = request.extensions_mut();
        notes.push((
            extensions.get::<Note>().cloned(),
            extensions.get::<u64>().copied(),
        ));
        extensions.get_mut::<Note>().unwrap().0 += 1;
        extensions.insert(7_u64);
        let mut response = Response::new(Empty::<Bytes>::new());
        if notes.len() < 3 {
            *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
        }
        future::ok::<_, Infallible>(response)
    });
    let client = quick_layer(database.pool()).layer(inner);
    let request = Request::post("http://localhost/")
        .extension(Note(1))
        .body(Full::<Bytes>::from("x"))
        .unwrap();
    in_time(client.oneshot(request)).await.unwrap();
    let fresh = (Some(Note(1)), None);
    assert_eq!(
        *notes.lock().unwrap(),
        [fresh.clone(), fresh.clone(), fresh]
    );
}

#[tokio::test]
async fn what_the_client_attached_to_the_response_reaches_a_live_caller() {
    let database = migrated().await;
    let inner = service_fn(|_: Request<Body>| {
        let mut response = Response::new(Empty::<Bytes>::new());
        response.extensions_mut().insert("from 10.0.0.1");
        future::ok::<_, Infallible>(response)
    });
    let client = quick_layer(database.pool()).layer(inner);
    let response = in_time(client.oneshot(post("http://localhost/", "x")))
        .await
        .unwrap();
    assert_eq!(response.extensions().get(), Some(&"from 10.0.0.1"));
}

/// A service that can be sent, but neither be shared nor be called from two threads.
#[derive(Clone)]
struct Lonely(Cell<u8>);

impl Service<Request<Body>> for Lonely {
    type Response = Response<Full<Bytes>>;
    type Error = Infallible;
    type Future = future::Ready<Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Request<Body>) -> Self::Future {
        self.0.set(self.0.get() + 1);
        future::ok(Response::new(Full::from("alone")))
    }
}

#[tokio::test]
async fn the_wrapped_service_need_not_be_shareable() {
    fn sendable<T: Send>() {}
    fn shareable<T: Send + Sync>() {}
    fn its_future_has_a_name<S, B>(_: &S)
    where
        S: Service<Request<Full<Bytes>>, Future = ResponseFuture<B, Full<Bytes>>>,
        B: Service<Request<Body>>,
    {
    }
    shareable::<DurableLayer>();
    shareable::<DurableService<Hyper>>();
    sendable::<DurableService<Lonely>>();
    sendable::<ResponseFuture<Hyper, Full<Bytes>>>();
    sendable::<ResponseFuture<Lonely, Unshared>>();

    let database = migrated().await;
    let client = DurableLayer::new(database.pool().clone()).layer(Lonely(Cell::new(0)));
    its_future_has_a_name(&client);
    assert_eq!(client.get_ref().0.get(), 0);
    let response = tokio::spawn(client.clone().oneshot(post("http://localhost/", "x")));
    let response = in_time(response).await.unwrap().unwrap();
    assert_eq!(text(response).await, "alone");
}

#[tokio::test]
async fn what_the_runner_claims_goes_through_the_callers_own_service_too() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let (background, background_calls) = counting();
    let durable = Durable::builder(database.pool().clone())
        .transport(background)
        .build()
        .unwrap();
    let (own, own_calls) = counting();
    let service = durable.layer().layer(own);
    let later = Options::default().delay(Duration::from_millis(50));
    for options in [later, Options::default().ordered("k")] {
        let request = with(post(&server.url("/"), "x"), options);
        assert_eq!(
            in_time(service.clone().oneshot(request))
                .await
                .unwrap()
                .status(),
            200
        );
    }
    assert_eq!(own_calls.load(Ordering::SeqCst), 2);
    assert_eq!(background_calls.load(Ordering::SeqCst), 0);
}
