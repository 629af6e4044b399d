//! `DurableLayer` for tower, around HTTP clients, below and above other layers.

mod bodies;
pub mod context;
pub mod repetition;
mod senders;
mod spans;
mod stack;

use std::convert::Infallible;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::{FutureExt, future};
use http::header::{HeaderName, HeaderValue};
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Empty, Full};
use hyper::body::Incoming;
use hyper_util::client::legacy;
use requeuest::retry::RetryPolicy;
use requeuest::testkit::TestDatabase;
use requeuest::{
    Body, DurableLayer, FailureClass, Options, REQUEST_ID_HEADER, RequestId, ReqwestTransport,
    Status,
};
use tower::{Layer, Service, ServiceBuilder, ServiceExt, service_fn};

use crate::support::{
    Server, builder, closed_port, hyper_client, in_time, migrated, quick, reply, rows,
};

const OUTER: HeaderName = HeaderName::from_static("x-outer");
const INNER: HeaderName = HeaderName::from_static("x-inner");
const YES: HeaderValue = HeaderValue::from_static("yes");

/// A hyper client, and the number of its calls.
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

fn http_post(url: impl AsRef<str>, body: &'static str) -> Request<Full<Bytes>> {
    Request::post(url.as_ref()).body(Full::from(body)).unwrap()
}

fn with_options(mut request: Request<Full<Bytes>>, options: Options) -> Request<Full<Bytes>> {
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

/// A layer that retries without noticeable delays.
fn quick_layer<B>(database: &TestDatabase) -> DurableLayer<B> {
    builder(database).retry(quick()).build_layer().unwrap()
}

#[tokio::test]
async fn requests_through_hyper_are_durable() {
    let database = migrated().await;
    let server = Server::start(|number, seen| async move {
        reply(if number == 0 { 503 } else { 201 }, seen.body)
    })
    .await;
    let client = ServiceBuilder::new()
        .layer(quick_layer(&database))
        .service(hyper_client());

    let response = in_time(client.oneshot(http_post(server.url("/a?b=c"), "hello")))
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
    let outcomes = "outcomes WHERE status = 'completed'";
    assert_eq!(rows(&database, outcomes).await, 1);
}

#[tokio::test]
async fn requests_through_reqwest_are_durable() {
    let database = migrated().await;
    let server = Server::echo().await;
    let client = reqwest::Client::builder()
        .user_agent("billing/1.0")
        .build()
        .unwrap();
    let client = DurableLayer::new(database.pool().clone()).layer(ReqwestTransport::new(client));

    let response = in_time(client.oneshot(http_post(server.url("/"), "x")))
        .await
        .unwrap();
    assert_eq!(text(response).await, "x");
    assert_eq!(server.seen()[0].headers["user-agent"], "billing/1.0");
    let outcomes = "outcomes WHERE status = 'completed'";
    assert_eq!(rows(&database, outcomes).await, 1);
}

#[tokio::test]
async fn the_error_of_an_unanswered_request_has_its_id() {
    let database = migrated().await;
    let layer = builder(&database)
        .retry(quick().max_attempts(2))
        .build_layer()
        .unwrap();
    let client = layer.layer(hyper_client());
    let url = format!("http://{}/?token=hunter2", closed_port().await);
    let error = in_time(client.oneshot(http_post(&url, "x")))
        .await
        .unwrap_err();
    assert!(error.is_discarded(), "{error}");
    assert_eq!(error.attempts(), Some(2));
    assert_eq!(error.failure_class(), Some(FailureClass::Connect));
    let own = std::error::Error::source(&error).unwrap();
    let own = own.downcast_ref::<hyper_util::client::legacy::Error>();
    assert!(own.unwrap().is_connect());
    assert!(
        !format!("{error} {error:?}").contains("hunter2"),
        "{error:?}"
    );
    let status = layer.durable().status(error.request_id().unwrap()).await;
    assert_eq!(status.unwrap(), Some(Status::Discarded));
}

#[tokio::test]
async fn a_fired_request_gets_202_and_its_id_at_once() {
    let database = migrated().await;
    let (server, answer) = Server::held(200).await;
    let client = DurableLayer::new(database.pool().clone()).layer(hyper_client());
    let request = with_options(http_post(server.url("/"), "x"), Options::default().fire());
    let response = in_time(client.clone().oneshot(request)).await.unwrap();
    assert_eq!(response.status(), StatusCode::ACCEPTED);
    let id = id_of(&response);
    assert_eq!(text(response).await, "");
    server.wait_for(1).await;
    let status = client.durable().status(id).await.unwrap();
    assert_eq!(status, Some(Status::Running));

    answer.add_permits(1);
    let response = in_time(client.durable().response(id)).await.unwrap();
    assert_eq!(response.text().unwrap(), "x");
}

#[tokio::test]
async fn options_are_taken_from_the_request_extensions() {
    let database = migrated().await;
    let server = Server::in_turn(&[404, 404, 200, 503]).await;
    let client = builder(&database)
        .deliver(["default", "billing"])
        .retry(quick())
        .build_layer()
        .unwrap()
        .layer(hyper_client());
    let send = |options| {
        let request = with_options(http_post(server.url("/"), "x"), options);
        in_time(client.clone().oneshot(request)).map(Result::unwrap)
    };

    let accept = Options::default().accept([StatusCode::OK]);
    assert_eq!(send(accept).await.status(), 200);
    assert_eq!(server.count(), 3);

    let once = Options::default().retry(RetryPolicy::none());
    assert_eq!(send(once).await.status(), 503);
    assert_eq!(server.count(), 4);

    let delay = Duration::from_millis(300);
    let began = Instant::now();
    let later = Options::default().delay(delay).retry(RetryPolicy::none());
    send(later).await;
    assert!(began.elapsed() >= delay);

    let billing = Options::default().channel("billing");
    send(billing.retry(RetryPolicy::none())).await;
    let channel = "outcomes WHERE channel_name = 'billing'";
    assert_eq!(rows(&database, channel).await, 1);

    let timeout = Options::default()
        .channel("x".repeat(56))
        .attempt_timeout(Duration::from_secs(1));
    let invalid = with_options(http_post(server.url("/"), "x"), timeout);
    let error = in_time(client.clone().oneshot(invalid)).await.unwrap_err();
    assert_eq!(error.field(), Some("channel"));
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
    let client = quick_layer(&database).layer(inner);
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
async fn response_extensions_reach_a_live_caller() {
    let database = migrated().await;
    let inner = service_fn(|_: Request<Body>| {
        let mut response = Response::new(Empty::<Bytes>::new());
        response.extensions_mut().insert("from 10.0.0.1");
        future::ok::<_, Infallible>(response)
    });
    let client = quick_layer(&database).layer(inner);
    let response = in_time(client.oneshot(http_post("http://localhost/", "x")))
        .await
        .unwrap();
    assert_eq!(response.extensions().get(), Some(&"from 10.0.0.1"));
}
