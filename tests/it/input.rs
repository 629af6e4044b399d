//! Bad input: each kind has its own typed error, and nothing is half-done.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::StatusCode;
use http_body::{Frame, SizeHint};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use requeuest::retry::RetryPolicy;
use requeuest::testkit::{self, Postgres, StopMode, TestDatabase};
use requeuest::{
    AcceptedResponse, Body, Durable, DurableBuilder, DurableService, Error, HeaderMap, MAX_URL_LEN,
    Options, Request, RequestId, Status, Url, reqwest,
};
use reqwest_middleware::{ClientBuilder, ClientWithMiddleware};
use sqlx::Executor;
use sqlx::postgres::PgPoolOptions;
use tower::{Layer, ServiceExt};

use crate::support::{LONG, Server, closed_port, count, eventually, in_time, migrated, reply};

fn durable(database: &TestDatabase) -> Durable {
    Durable::new(database.pool().clone())
}

fn layered(durable: &Durable) -> DurableService<Client<HttpConnector, Body>> {
    let client = Client::builder(TokioExecutor::new()).build_http();
    durable.layer().layer(client)
}

fn with_middleware(durable: &Durable) -> ClientWithMiddleware {
    ClientBuilder::new(reqwest::Client::new())
        .with(durable.clone())
        .build()
}

fn of_middleware(error: &reqwest_middleware::Error) -> &Error {
    Error::from_middleware(error).unwrap_or_else(|| panic!("not an error of the crate: {error:?}"))
}

fn get(url: &str) -> http::Request<String> {
    http::Request::get(url).body(String::new()).unwrap()
}

/// Nothing of a refused request is in the database.
async fn nothing_persisted(database: &TestDatabase) {
    for table in ["mq_msgs", "mq_payloads", "outcomes", "attempts"] {
        let rows = format!("select count(*) from requeuest.{table}");
        assert_eq!(count(database, &rows).await, 0, "{table}");
    }
}

fn refuses(error: &Error, field: &str) {
    assert!(error.is_request(), "{error:?}");
    assert_eq!(error.field(), Some(field), "{error:?}");
    assert_eq!(error.request_id(), None);
}

#[tokio::test]
async fn a_url_that_is_not_absolute_http_is_refused_at_every_door() {
    let database = migrated().await;
    let durable = durable(&database);
    let client = with_middleware(&durable);
    for url in ["/relative", "*", "example.com", "ftp://example.com/"] {
        refuses(&durable.fire(get(url)).await.unwrap_err(), "url");
        refuses(&durable.await_response(get(url)).await.unwrap_err(), "url");
        let refused = durable.fire_in(database.pool(), get(url)).await;
        refuses(&refused.unwrap_err(), "url");
        let refused = in_time(layered(&durable).oneshot(get(url))).await;
        refuses(&refused.unwrap_err(), "url");
    }
    for url in ["ftp://example.com/", "mailto:a@example.com", "data:,x"] {
        let url = Url::parse(url).unwrap();
        let request = Request::get(url.clone(), HeaderMap::new());
        refuses(&durable.fire(&request).await.unwrap_err(), "url");
        let request = reqwest::Request::new(http::Method::GET, url);
        let refused = in_time(client.execute(request)).await;
        refuses(of_middleware(&refused.unwrap_err()), "url");
    }
    nothing_persisted(&database).await;
}

#[tokio::test]
async fn a_url_may_have_8_kib_and_no_more() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let durable = durable(&database);
    let base = server.url("/");
    let longest = format!("{base}{}", "x".repeat(MAX_URL_LEN - base.len() - 1));
    let too_long = format!("{base}{}", "x".repeat(MAX_URL_LEN));

    refuses(&durable.fire(get(&too_long)).await.unwrap_err(), "url");
    let refused = in_time(layered(&durable).oneshot(get(&too_long))).await;
    refuses(&refused.unwrap_err(), "url");
    let refused = in_time(with_middleware(&durable).get(&too_long).send()).await;
    refuses(of_middleware(&refused.unwrap_err()), "url");
    // Longer than what the `http` crate can express.
    let endless = Url::parse(&format!("{base}{}", "x".repeat(100_000))).unwrap();
    let refused = durable.fire(Request::get(endless, HeaderMap::new())).await;
    refuses(&refused.unwrap_err(), "url");
    nothing_persisted(&database).await;

    let response = in_time(durable.await_response(get(&longest)))
        .await
        .unwrap();
    assert_eq!(response.status(), 200);
    assert_eq!(server.url(&server.seen()[0].uri.to_string()), longest);
}

#[tokio::test]
async fn a_password_in_a_url_is_used_and_never_shown() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let durable = Durable::builder(database.pool().clone())
        .retry(
            RetryPolicy::exponential()
                .base(Duration::from_millis(1))
                .max_attempts(2),
        )
        .build()
        .unwrap();
    let with_password = |addr| format!("http://user:hunter2@{addr}/path?token=hunter3");

    let request = Request::try_from(get(&with_password(server.addr))).unwrap();
    assert!(request.url().contains("hunter2"));
    assert!(!format!("{request:?}").contains("hunter"), "{request:?}");
    in_time(durable.await_response(request)).await.unwrap();
    let by_url = Request::get(
        Url::parse(&with_password(server.addr)).unwrap(),
        HeaderMap::new(),
    );
    in_time(durable.await_response(&by_url)).await.unwrap();
    for seen in server.seen() {
        // user:hunter2
        assert_eq!(seen.headers["authorization"], "Basic dXNlcjpodW50ZXIy");
        assert_eq!(seen.uri, "/path?token=hunter3");
    }

    let closed = closed_port().await;
    let unreachable = with_password(closed);
    let mut errors = Vec::new();
    let failed = in_time(durable.await_response(get(&unreachable))).await;
    errors.push(failed.unwrap_err());
    // Through a client that says in its errors what it was asked.
    let talkative = tower::service_fn(|request: http::Request<Body>| async move {
        let text = format!("no way to {} ({0})", request.uri());
        Err::<http::Response<Body>, _>(std::io::Error::other(text))
    });
    let failed = in_time(durable.layer().layer(talkative).oneshot(get(&unreachable))).await;
    errors.push(failed.unwrap_err());
    for error in errors {
        assert!(error.is_discarded());
        assert!(
            !format!("{error} {error:?}").contains("hunter"),
            "{error:?}"
        );
        assert!(
            error.to_string().contains(&closed.ip().to_string())
                || error.to_string().contains("Connect")
        );
    }
    let failed = in_time(with_middleware(&durable).get(&unreachable).send()).await;
    let shown = failed.unwrap_err();
    assert!(
        !format!("{shown} {shown:?}").contains("hunter"),
        "{shown:?}"
    );
    for table in ["outcomes", "attempts"] {
        let texts = format!(
            "select count(*) from requeuest.{table} where error like '%refused%' or error like '%no way%'"
        );
        assert_eq!(count(&database, &texts).await, 3, "{table}");
        let leaks = format!("select count(*) from requeuest.{table} where error like '%hunter%'");
        assert_eq!(count(&database, &leaks).await, 0, "{table}");
    }
}

/// A request body of chunks of 1000 bytes, which counts how many of them were asked for.
struct Chunks {
    count: usize,
    polled: Arc<AtomicUsize>,
    declares: Option<u64>,
    fails_at: Option<usize>,
}

impl Chunks {
    fn new(count: usize) -> Self {
        Self {
            count,
            polled: Arc::default(),
            declares: None,
            fails_at: None,
        }
    }
}

impl http_body::Body for Chunks {
    type Data = Bytes;
    type Error = std::io::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, std::io::Error>>> {
        let number = self.polled.fetch_add(1, Ordering::Relaxed);
        Poll::Ready(if Some(number) == self.fails_at {
            Some(Err(std::io::Error::other("the disk is gone")))
        } else if number < self.count {
            Some(Ok(Frame::data(Bytes::from_static(&[b'x'; 1000]))))
        } else {
            None
        })
    }

    fn size_hint(&self) -> SizeHint {
        self.declares
            .map_or_else(SizeHint::default, SizeHint::with_exact)
    }
}

/// Sends a stream through the layer and one through the middleware.
async fn send_streams(
    durable: &Durable,
    url: &str,
    body: impl Fn() -> Chunks,
) -> [Result<(), Error>; 2] {
    let request = http::Request::post(url).body(body()).unwrap();
    let layer = in_time(layered(durable).oneshot(request)).await.map(drop);
    let request = with_middleware(durable)
        .post(url)
        .body(reqwest::Body::wrap(body()));
    let middleware = in_time(request.send()).await.map(drop);
    let middleware = middleware.map_err(|error| match error {
        reqwest_middleware::Error::Middleware(error) => error.downcast().unwrap(),
        reqwest_middleware::Error::Reqwest(error) => panic!("{error:?}"),
    });
    [layer, middleware]
}

fn refuses_as_too_large(error: &Error) {
    refuses(error, "body");
    assert!(error.is_body_too_large(), "{error:?}");
    assert!(error.to_string().contains("5000"), "{error}");
}

#[tokio::test]
async fn a_body_over_the_limit_is_refused_at_every_door() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let durable = Durable::builder(database.pool().clone())
        .max_request_body(5000)
        .build()
        .unwrap();
    let of = |len| {
        http::Request::post(server.url("/"))
            .body(vec![b'x'; len])
            .unwrap()
    };

    refuses_as_too_large(&durable.fire(of(5001)).await.unwrap_err());
    refuses_as_too_large(&durable.await_response(of(5001)).await.unwrap_err());
    let refused = durable.fire_in(database.pool(), of(5001)).await;
    refuses_as_too_large(&refused.unwrap_err());
    let refused = in_time(layered(&durable).oneshot(of(5001).map(Body::from))).await;
    refuses_as_too_large(&refused.unwrap_err());
    let request = with_middleware(&durable)
        .post(server.url("/"))
        .body(vec![b'x'; 5001]);
    let refused = in_time(request.send()).await.unwrap_err();
    refuses_as_too_large(of_middleware(&refused));
    nothing_persisted(&database).await;
    assert_eq!(server.count(), 0);

    in_time(durable.await_response(of(5000))).await.unwrap();
    for sent in send_streams(&durable, &server.url("/"), || Chunks::new(5)).await {
        sent.unwrap();
    }
    assert_eq!(server.count(), 3);
    assert!(server.seen().iter().all(|seen| seen.body.len() == 5000));
}

#[tokio::test]
async fn a_stream_is_not_read_past_the_limit() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let durable = Durable::builder(database.pool().clone())
        .max_request_body(5000)
        .build()
        .unwrap();
    let polled = Arc::new(AtomicUsize::new(0));
    // Each starts where the last one stopped.
    let endless = || Chunks {
        polled: Arc::clone(&polled),
        ..Chunks::new(usize::MAX)
    };
    for sent in send_streams(&durable, &server.url("/"), endless).await {
        refuses_as_too_large(&sent.unwrap_err());
    }
    // The sixth chunk of each is the one that is too much.
    assert_eq!(polled.swap(0, Ordering::Relaxed), 2 * 6);

    // A length that is declared is believed, and nothing is read.
    let declared = || Chunks {
        declares: Some(5001),
        ..endless()
    };
    for sent in send_streams(&durable, &server.url("/"), declared).await {
        refuses_as_too_large(&sent.unwrap_err());
    }
    assert_eq!(polled.load(Ordering::Relaxed), 0);
    nothing_persisted(&database).await;
    assert_eq!(server.count(), 0);
}

#[tokio::test]
async fn a_stream_that_fails_is_the_callers_error() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let durable = durable(&database);
    let failing = || Chunks {
        fails_at: Some(2),
        ..Chunks::new(5)
    };
    for sent in send_streams(&durable, &server.url("/"), failing).await {
        let error = sent.unwrap_err();
        refuses(&error, "body");
        assert!(!error.is_body_too_large());
        let shown = format!("{error:?}");
        assert!(shown.contains("the disk is gone"), "{shown}");
    }
    nothing_persisted(&database).await;
    assert_eq!(server.count(), 0);
}

#[tokio::test]
async fn a_stream_can_not_be_fired_directly() {
    let database = migrated().await;
    let durable = durable(&database);
    let streaming = || {
        let request = reqwest::Client::new().post("http://example.com/");
        let request = request.body(reqwest::Body::wrap(Chunks::new(1)));
        request.build().unwrap()
    };
    refuses(&durable.fire(streaming()).await.unwrap_err(), "body");
    refuses(
        &durable.await_response(streaming()).await.unwrap_err(),
        "body",
    );
    refuses(&Request::from_reqwest(streaming()).unwrap_err(), "body");
    nothing_persisted(&database).await;
}

#[tokio::test]
async fn a_response_over_the_limit_ends_the_request_and_keeps_its_head() {
    let database = migrated().await;
    let server = Server::start(|_, _| async move {
        let mut response = reply(409, vec![b'x'; 5001]);
        response.headers_mut().insert("x-a", "b".parse().unwrap());
        response
    })
    .await;
    let durable = Durable::builder(database.pool().clone())
        .max_response_body(5000)
        .build()
        .unwrap();
    let is_too_large = |error: &Error| {
        assert!(error.is_response_too_large(), "{error:?}");
        let (status, headers) = error.response_head().unwrap();
        assert_eq!(status, StatusCode::CONFLICT);
        assert_eq!(headers["x-a"], "b");
        assert_eq!(headers["content-length"], "5001");
        error.request_id().unwrap()
    };

    let url = server.url("/");
    let mut ids = Vec::new();
    let error = in_time(durable.await_response(get(&url)))
        .await
        .unwrap_err();
    ids.push(is_too_large(&error));
    let error = in_time(layered(&durable).oneshot(get(&url)))
        .await
        .unwrap_err();
    ids.push(is_too_large(&error));
    let error = in_time(with_middleware(&durable).get(&url).send())
        .await
        .unwrap_err();
    ids.push(is_too_large(of_middleware(&error)));
    let delayed = Options::default().delay(Duration::from_millis(10));
    let request = Request::try_from(get(&url)).unwrap().with(delayed);
    let id = durable.fire(request).await.unwrap();
    let outcome = testkit::outcome(&durable, id, LONG).await.unwrap();
    ids.push(is_too_large(&outcome.into_result().unwrap_err()));

    assert_eq!(server.count(), ids.len());
    for id in ids {
        assert_eq!(durable.status(id).await.unwrap(), Some(Status::Completed));
        let again = durable.response(id).await.unwrap_err();
        assert_eq!(is_too_large(&again), id);
    }
}

#[tokio::test]
async fn a_response_that_just_fits_is_kept() {
    let database = migrated().await;
    let server = Server::start(|_, _| async move { reply(200, vec![b'x'; 5000]) }).await;
    let durable = Durable::builder(database.pool().clone())
        .max_response_body(5000)
        .build()
        .unwrap();
    let response = in_time(durable.await_response(get(&server.url("/"))))
        .await
        .unwrap();
    assert_eq!(response.body().len(), 5000);
}

#[tokio::test]
async fn options_are_checked_before_anything_is_persisted() {
    let database = migrated().await;
    let durable = durable(&database);
    let client = with_middleware(&durable);
    let century = Duration::from_secs(101 * 365 * 24 * 3600);
    let options = Options::default;
    for (field, refused) in [
        ("channel", options().channel("")),
        ("channel", options().channel("x".repeat(56))),
        ("channel", options().channel("a\0b")),
        ("ordered", options().ordered("x".repeat(256))),
        ("ordered", options().ordered("a\0b")),
        ("delay", options().delay(century)),
        ("key", options().key("x".repeat(256))),
        ("key", options().key("a\0b")),
        ("supersede", options().supersede("x".repeat(256))),
        ("deadline", options().deadline(Duration::ZERO)),
        ("deadline", options().deadline(century)),
        (
            "deadline",
            options()
                .delay(Duration::from_secs(2))
                .deadline(Duration::from_secs(2)),
        ),
        ("halt_on_discard", options().halt_on_discard()),
        ("attempt_timeout", options().attempt_timeout(Duration::ZERO)),
        ("attempt_timeout", options().attempt_timeout(century)),
        (
            "retry",
            options().retry(RetryPolicy::none().base(Duration::ZERO)),
        ),
        ("accept", options().accept([] as [AcceptedResponse; 0])),
    ] {
        let url = "http://example.com/";
        let request = Request::try_from(get(url)).unwrap().with(refused.clone());
        refuses(&durable.fire(&request).await.unwrap_err(), field);
        refuses(&durable.await_response(&request).await.unwrap_err(), field);
        let error = durable.fire_in(database.pool(), &request).await;
        refuses(&error.unwrap_err(), field);
        let mut request = get(url);
        request.extensions_mut().insert(refused.clone());
        let error = in_time(layered(&durable).oneshot(request)).await;
        refuses(&error.unwrap_err(), field);
        let request = client.get(url).with_extension(refused);
        refuses(
            of_middleware(&in_time(request.send()).await.unwrap_err()),
            field,
        );
    }
    nothing_persisted(&database).await;
}

#[tokio::test]
async fn the_longest_names_are_accepted() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let channel = "ä".repeat(27) + "x";
    assert_eq!(channel.len(), 55);
    let durable = Durable::builder(database.pool().clone())
        .channel(channel)
        .build()
        .unwrap();
    let options = Options::default()
        .ordered("x".repeat(255))
        .key("y".repeat(255))
        .supersede("z".repeat(255));
    let request = Request::try_from(get(&server.url("/")))
        .unwrap()
        .with(options);
    let response = in_time(durable.await_response(request)).await.unwrap();
    assert_eq!(response.status(), 200);
}

#[tokio::test]
async fn the_builder_names_the_field_that_it_refuses() {
    type Change = fn(DurableBuilder) -> DurableBuilder;
    let database = migrated().await;
    let refused: [(&str, Change); 22] = [
        ("channel", |b| b.channel("")),
        ("channel", |b| b.channel("x".repeat(56))),
        ("channel", |b| b.channel("a\0b")),
        ("deliver", |b| b.deliver([] as [&str; 0])),
        ("deliver", |b| b.deliver(["good", ""])),
        ("deliver", |b| b.deliver(["x".repeat(56)])),
        ("concurrency", |b| b.concurrency(0)),
        ("concurrency", |b| b.concurrency(100_001)),
        ("lease", |b| b.lease(Duration::from_millis(999))),
        ("lease", |b| b.lease(Duration::from_secs(3601))),
        ("attempt_timeout", |b| b.attempt_timeout(Duration::ZERO)),
        ("attempt_timeout", |b| b.attempt_timeout(Duration::MAX)),
        ("retry", |b| {
            b.retry(RetryPolicy::none().base(Duration::ZERO))
        }),
        ("retry", |b| b.retry(RetryPolicy::none().max_attempts(0))),
        ("retry", |b| {
            b.retry(RetryPolicy::none().cap(Duration::ZERO))
        }),
        ("max_request_body", |b| b.max_request_body(usize::MAX)),
        ("max_response_body", |b| b.max_response_body(usize::MAX)),
        ("retention", |b| b.retention(Duration::from_secs(59))),
        ("retention", |b| b.retention(Duration::MAX)),
        ("schema", |b| b.schema("")),
        ("schema", |b| b.schema("a\"; drop schema public; --")),
        ("max_connections", |b| b.max_connections(1)),
    ];
    for (field, change) in refused {
        let error = change(Durable::builder(database.pool().clone()))
            .build()
            .unwrap_err();
        assert!(error.is_config(), "{error:?}");
        assert_eq!(error.field(), Some(field), "{error:?}");
        assert!(error.to_string().contains(field), "{error}");
        let error = change(Durable::builder(database.pool().clone()))
            .build_layer()
            .unwrap_err();
        assert_eq!(error.field(), Some(field), "{error:?}");
    }
    // A handle that delivers nothing needs no channels.
    let builder = Durable::builder(database.pool().clone());
    builder
        .deliver([] as [&str; 0])
        .runner(false)
        .build()
        .unwrap();
}

/// Every call that asks the database through the handle, with its error.
async fn errors_of_calls(durable: &Durable) -> Vec<(&'static str, Error)> {
    let request = get("http://example.com/");
    let id = RequestId::from(requeuest::Uuid::nil());
    let (fired, awaited, layer, middleware, response, status) = in_time(Box::pin(async {
        tokio::join!(
            durable.fire(request.clone()),
            durable.await_response(request.clone()),
            layered(durable).oneshot(request.clone()),
            with_middleware(durable).get("http://example.com/").send(),
            durable.response(id),
            durable.status(id),
        )
    }))
    .await;
    let middleware = match middleware.unwrap_err() {
        reqwest_middleware::Error::Middleware(error) => error.downcast().unwrap(),
        reqwest_middleware::Error::Reqwest(error) => panic!("{error:?}"),
    };
    vec![
        ("fire", fired.unwrap_err()),
        ("await_response", awaited.unwrap_err()),
        ("layer", layer.unwrap_err()),
        ("middleware", middleware),
        ("response", response.unwrap_err()),
        ("status", status.unwrap_err()),
    ]
}

/// [`Durable::fire_in`] asks the caller's connection, and nothing else.
async fn error_of_fire_in(durable: &Durable) -> Error {
    let request = get("http://example.com/");
    in_time(durable.fire_in(durable.pool(), request))
        .await
        .unwrap_err()
}

#[tokio::test]
async fn a_closed_pool_is_told_apart() {
    let database = migrated().await;
    let durable = durable(&database);
    database.pool().close().await;
    let error = error_of_fire_in(&durable).await;
    assert!(error.is_closed(), "{error:?}");
    for (call, error) in errors_of_calls(&durable).await {
        assert!(error.is_closed(), "{call}: {error:?}");
    }
}

#[tokio::test]
async fn calls_after_a_shutdown_are_refused() {
    let database = migrated().await;
    let durable = durable(&database);
    in_time(durable.shutdown(Duration::ZERO)).await.unwrap();
    let error = error_of_fire_in(&durable).await;
    assert!(error.is_closed(), "{error:?}");
    for (call, error) in errors_of_calls(&durable).await {
        assert!(error.is_closed(), "{call}: {error:?}");
    }
    nothing_persisted(&database).await;
}

#[tokio::test]
async fn a_missing_schema_is_said_to_need_the_migrations() {
    let database = Postgres::shared().await.unwrap().database().await.unwrap();
    let server = Server::always(200).await;
    let durable = durable(&database);
    let mut errors = errors_of_calls(&durable).await;
    errors.push(("fire_in", error_of_fire_in(&durable).await));
    for (call, error) in errors {
        assert!(error.is_not_migrated(), "{call}: {error:?}");
        assert!(
            error.to_string().contains("requeuest::migrate"),
            "{call}: {error}"
        );
    }
    // The same handle works as soon as the schema is there.
    requeuest::migrate(database.pool()).await.unwrap();
    let response = in_time(durable.await_response(get(&server.url("/"))))
        .await
        .unwrap();
    assert_eq!(response.status(), 200);
    let delayed = Options::default().delay(Duration::from_millis(10));
    let request = Request::try_from(get(&server.url("/")))
        .unwrap()
        .with(delayed);
    let id = durable.fire(request).await.unwrap();
    testkit::outcome(&durable, id, LONG).await.unwrap();
}

#[tokio::test]
async fn an_older_schema_is_said_to_need_the_migrations() {
    let database = migrated().await;
    let newest = "select max(version) from requeuest._sqlx_migrations";
    let found = count(&database, newest).await;
    database
        .pool()
        .execute(&*format!(
            "delete from requeuest._sqlx_migrations where version = {found}"
        ))
        .await
        .unwrap();
    let durable = durable(&database);
    for (call, error) in errors_of_calls(&durable).await {
        assert!(error.is_not_migrated(), "{call}: {error:?}");
        let shown = error.to_string();
        assert!(shown.contains("requeuest::migrate"), "{call}: {shown}");
        assert!(shown.contains(&found.to_string()), "{call}: {shown}");
    }
    nothing_persisted(&database).await;
}

#[tokio::test]
async fn a_newer_schema_is_said_to_need_a_newer_crate() {
    let database = migrated().await;
    let newest = "select max(version) from requeuest._sqlx_migrations";
    let known = count(&database, newest).await;
    database
        .pool()
        .execute(
            "insert into requeuest._sqlx_migrations
             select version + 1, description, installed_on, success, checksum, execution_time
             from requeuest._sqlx_migrations order by version desc limit 1",
        )
        .await
        .unwrap();
    let durable = durable(&database);
    for (call, error) in errors_of_calls(&durable).await {
        assert!(error.is_not_migrated(), "{call}: {error:?}");
        let shown = error.to_string();
        assert!(shown.contains(&(known + 1).to_string()), "{call}: {shown}");
        assert!(shown.contains("upgrade requeuest"), "{call}: {shown}");
    }
    nothing_persisted(&database).await;
}

#[tokio::test]
async fn a_handle_waits_for_a_database_that_is_not_there_yet() {
    let postgres = Postgres::builder().private().start().await.unwrap();
    let database = postgres.database().await.unwrap();
    requeuest::migrate(database.pool()).await.unwrap();
    let server = Server::always(200).await;
    // Waiting in the queue from an earlier life.
    let earlier = Durable::builder(database.pool().clone())
        .runner(false)
        .build()
        .unwrap();
    let id = earlier.fire(get(&server.url("/earlier"))).await.unwrap();
    drop(earlier);
    postgres.stop(StopMode::Fast).await.unwrap();

    let pool = PgPoolOptions::new()
        .acquire_timeout(Duration::from_secs(1))
        .connect_lazy_with(database.options());
    let durable = Durable::new(pool);
    let mut errors = errors_of_calls(&durable).await;
    errors.push(("fire_in", error_of_fire_in(&durable).await));
    for (call, error) in errors {
        assert!(error.is_database(), "{call}: {error:?}");
        let source = std::error::Error::source(&error);
        assert!(
            source.is_some_and(<dyn std::error::Error>::is::<sqlx::Error>),
            "{call}"
        );
    }
    assert_eq!(server.count(), 0);

    postgres.resume().await.unwrap();
    server.wait_for(1).await;
    let outcome = testkit::outcome(&durable, id, LONG).await.unwrap();
    assert_eq!(outcome.status(), Status::Completed);
    let response = in_time(durable.await_response(get(&server.url("/later"))))
        .await
        .unwrap();
    assert_eq!(response.status(), 200);
}

#[tokio::test]
async fn an_id_that_nobody_knows_is_told_apart() {
    let database = migrated().await;
    let durable = durable(&database);
    let id = RequestId::from(requeuest::Uuid::now_v7());
    let error = in_time(durable.response(id)).await.unwrap_err();
    assert!(error.is_unknown_id(), "{error:?}");
    assert_eq!(error.request_id(), Some(id));
    assert_eq!(durable.status(id).await.unwrap(), None);
}

#[tokio::test]
async fn a_refused_request_disturbs_no_other() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let durable = durable(&database);
    let (bad, good) = tokio::join!(
        durable.await_response(get("/relative")),
        durable.await_response(get(&server.url("/"))),
    );
    refuses(&bad.unwrap_err(), "url");
    assert_eq!(good.unwrap().status(), 200);
    eventually("only the good one is there", || async {
        count(&database, "select count(*) from requeuest.outcomes").await == 1
    })
    .await;
}
