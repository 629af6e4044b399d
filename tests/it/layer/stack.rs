//! The layer together with other layers and with services that aren't always ready.

use std::collections::HashSet;
use std::convert::Infallible;
use std::future::pending;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use futures_util::{FutureExt, future};
use http::header::{ACCEPT_ENCODING, CONTENT_ENCODING, HeaderValue};
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Empty, Full};
use hyper::body::Incoming;
use requeuest::Body;
use tower::buffer::Buffer;
use tower::{Layer, Service, ServiceBuilder, ServiceExt, service_fn};
use tower_http::compression::CompressionLayer;
use tower_http::decompression::DecompressionLayer;
use tower_http::set_header::{SetRequestHeaderLayer, SetResponseHeaderLayer};
use tower_http::timeout::TimeoutLayer;
use tower_http::trace::TraceLayer;
use tower_test::mock;

use super::{INNER, OUTER, YES, counting, http_post, quick_layer, text};
use crate::support::{
    LONG, Server, builder, eventually_rows, hyper_client, in_time, migrated, only_id, quick, reply,
    rows,
};

type Mock = mock::Mock<Request<Body>, Response<Body>>;

/// "a zipped answer", compressed with gzip.
const ZIPPED: [u8; 35] = [
    31, 139, 8, 0, 0, 0, 0, 0, 2, 3, 75, 84, 168, 202, 44, 40, 72, 77, 81, 72, 204, 43, 46, 79, 45,
    2, 0, 212, 198, 190, 58, 15, 0, 0, 0,
];

/// Answers with 503 once, and then with a gzipped body. Requests must accept gzip.
async fn gzip_server() -> Server {
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

fn timeout(time: Duration) -> TimeoutLayer {
    TimeoutLayer::with_status_code(StatusCode::REQUEST_TIMEOUT, time)
}

#[tokio::test]
async fn decompression_and_timeouts_work_below_the_layer() {
    let database = migrated().await;
    let server = gzip_server().await;
    let client = ServiceBuilder::new()
        .layer(TraceLayer::new_for_http())
        .layer(SetRequestHeaderLayer::overriding(OUTER, YES))
        .layer(timeout(LONG))
        .layer(quick_layer(&database))
        .layer(SetRequestHeaderLayer::overriding(INNER, YES))
        .layer(DecompressionLayer::new())
        .layer(timeout(LONG))
        .map_response(|response: Response<Incoming>| response.map(Body::wrap))
        .service(hyper_client());

    let response = in_time(client.oneshot(http_post(server.url("/"), "x")))
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
async fn decompression_and_timeouts_work_above_the_layer() {
    let database = migrated().await;
    let server = gzip_server().await;
    let layer = quick_layer(&database);
    let durable = layer.durable().clone();
    let client = ServiceBuilder::new()
        .layer(DecompressionLayer::new())
        .layer(timeout(LONG))
        .layer(SetResponseHeaderLayer::overriding(OUTER, YES))
        .layer(layer)
        .layer(SetRequestHeaderLayer::overriding(INNER, YES))
        .layer(TraceLayer::new_for_http())
        .service(hyper_client());

    let response = in_time(client.oneshot(http_post(server.url("/"), "x")))
        .await
        .unwrap();
    assert_eq!(response.headers()[OUTER], "yes");
    assert_eq!(text(response).await, "a zipped answer");
    assert_eq!(server.seen()[1].headers[INNER], "yes");

    // The stored body is the body that came over the wire.
    let id = only_id(&database, "outcomes").await;
    let stored = durable.response(id).await.unwrap();
    assert_eq!(stored.body(), &ZIPPED[..]);
}

#[tokio::test]
async fn compression_works_below_and_above_the_layer() {
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

    let below = ServiceBuilder::new()
        .layer(quick_layer(&database))
        .layer(CompressionLayer::new())
        .service(hyper_client());
    let response = in_time(below.oneshot(request())).await.unwrap();
    assert_eq!(response.headers()[CONTENT_ENCODING], "gzip");
    let zipped = response.into_body().collect().await.unwrap().to_bytes();
    assert!(zipped.len() < long.len());

    let above = ServiceBuilder::new()
        .layer(DecompressionLayer::new())
        .layer(CompressionLayer::new())
        .layer(quick_layer(&database))
        .service(hyper_client());
    let response = in_time(above.oneshot(request())).await.unwrap();
    assert_eq!(text(response).await, long);
}

/// Zeros, compressed to about a thousandth.
async fn bomb(bytes: usize) -> Bytes {
    let zeros = service_fn(move |_: Request<Body>| async move {
        Ok::<_, Infallible>(Response::new(Full::<Bytes>::from(vec![0; bytes])))
    });
    let request = Request::get("http://a/")
        .header(ACCEPT_ENCODING, "gzip")
        .body(Body::empty())
        .unwrap();
    let zipped = CompressionLayer::new().layer(zeros).oneshot(request).await;
    let zipped = zipped.unwrap().into_body().collect().await;
    zipped.unwrap().to_bytes()
}

#[tokio::test]
async fn a_body_that_unpacks_to_more_than_the_limit_is_not_kept() {
    let database = migrated().await;
    let limit = 64 * 1024;
    let bomb = bomb(64 * limit).await;
    assert!(bomb.len() < limit, "{}", bomb.len());
    let server = Server::start(move |_, _| {
        let mut response = reply(200, bomb.clone());
        let gzip = HeaderValue::from_static("gzip");
        response.headers_mut().insert(CONTENT_ENCODING, gzip);
        async move { response }
    })
    .await;
    let client = ServiceBuilder::new()
        .layer(DecompressionLayer::new())
        .service(hyper_client());
    let durable = builder(&database)
        .transport(client)
        .max_response_body(limit)
        .build()
        .unwrap();
    let request = Request::get(server.url("/")).body("").unwrap();
    let error = in_time(durable.await_response(request)).await.unwrap_err();
    assert!(error.is_response_too_large(), "{error:?}");
    assert_eq!(server.count(), 1);
}

#[tokio::test]
async fn an_attempt_that_hits_an_inner_timeout_is_retried() {
    let database = migrated().await;
    let server = Server::start(|number, _| async move {
        if number == 0 {
            pending::<()>().await;
        }
        reply(200, "")
    })
    .await;
    let client = ServiceBuilder::new()
        .layer(quick_layer(&database))
        .layer(timeout(Duration::from_millis(300)))
        .map_response(|response: Response<Incoming>| response.map(Body::wrap))
        .service(hyper_client());
    let response = in_time(client.oneshot(http_post(server.url("/"), "x")))
        .await
        .unwrap();
    assert_eq!(response.status(), 200);
    assert_eq!(server.count(), 2);
}

#[tokio::test]
async fn an_unready_service_delays_the_attempt_not_the_caller() {
    let database = migrated().await;
    let (mock, mut handle): (Mock, _) = mock::pair();
    handle.allow(0);
    let mut client = quick_layer(&database).layer(mock);

    for _ in 0..2 {
        future::poll_fn(|cx| {
            Service::<Request<Full<Bytes>>>::poll_ready(&mut client, cx).map(Result::unwrap)
        })
        .now_or_never()
        .expect("always ready");
    }
    let response = tokio::spawn(client.call(http_post("http://localhost/", "x")));
    // The request is persisted, and its attempt has begun.
    eventually_rows(&database, "mq_msgs", 1).await;
    assert!(handle.next_request().now_or_never().is_none());
    assert!(!response.is_finished());

    handle.allow(1);
    let (request, answer) = in_time(handle.next_request()).await.unwrap();
    assert_eq!(request.uri(), "http://localhost/");
    answer.send_response(Response::new(Body::from("done")));
    let response = in_time(response).await.unwrap().unwrap();
    assert_eq!(text(response).await, "done");
    assert_eq!(rows(&database, "attempts").await, 0);
}

#[tokio::test]
async fn only_instances_polled_ready_are_called() {
    const REQUESTS: usize = 40;
    let database = migrated().await;
    // The mock panics if it is called before it was polled ready. Its clones don't start out ready.
    let (mock, mut handle): (Mock, _) = mock::pair();
    handle.allow(u64::MAX);
    let client = builder(&database)
        .retry(quick())
        .concurrency(8)
        .build_layer()
        .unwrap()
        .layer(mock);

    let answering = tokio::spawn(async move {
        // The first attempt of every request gets a 503.
        let mut seen = HashSet::new();
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
        let request = http_post(format!("http://localhost/{number}"), "x");
        tokio::spawn(async move {
            let ready = ServiceExt::<Request<Full<Bytes>>>::ready(&mut client);
            ready.await.unwrap().call(request).await
        })
    });
    for response in in_time(future::join_all(callers)).await {
        assert_eq!(response.unwrap().unwrap().status(), 200);
    }
    let refused = "attempts WHERE error_class = 'status'";
    assert_eq!(rows(&database, refused).await, REQUESTS as i64);
    // An attempt whose task panicked would be recorded as abandoned.
    assert_eq!(rows(&database, "attempts").await, REQUESTS as i64);
    answering.abort();
}

#[tokio::test]
async fn a_readiness_error_of_the_service_is_retried() {
    let database = migrated().await;
    let (mock, mut handle): (Mock, _) = mock::pair();
    handle.allow(1);
    handle.send_error("no connection today");
    let client = quick_layer(&database).layer(mock);
    let response = tokio::spawn(client.oneshot(http_post("http://localhost/", "x")));
    let (_, answer) = in_time(handle.next_request()).await.unwrap();
    answer.send_response(Response::new(Body::empty()));
    assert_eq!(in_time(response).await.unwrap().unwrap().status(), 200);
    let error: String = sqlx::query_scalar("SELECT error FROM requeuest.attempts")
        .fetch_one(database.pool())
        .await
        .unwrap();
    assert!(error.contains("no connection today"), "{error}");
}

#[tokio::test]
async fn buffers_work_above_and_below_the_layer() {
    let database = migrated().await;
    let server = Server::in_turn(&[503, 200]).await;
    let (client, calls) = counting();
    let client = ServiceBuilder::new()
        .layer(quick_layer(&database))
        .service(Buffer::new(client, 1));
    let client = Buffer::new(client, 1);
    let callers = (0..8).map(|_| {
        let (client, request) = (client.clone(), http_post(server.url("/"), "x"));
        tokio::spawn(client.oneshot(request))
    });
    for response in in_time(future::join_all(callers)).await {
        assert_eq!(response.unwrap().unwrap().status(), 200);
    }
    assert_eq!(server.count(), 9);
    assert_eq!(calls.load(Ordering::SeqCst), 9);
}
