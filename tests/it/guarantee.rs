//! Attempts whose result is unknown: the idempotency key by which a receiver recognises retries,
//! and `Guarantee::AtMostOnce`.

mod answers;

use std::process::Stdio;
use std::time::Duration;

use requeuest::{
    DurableBuilder, Guarantee, IdempotencyHeader, Options, Request, RequestId, Status,
};
use sqlx::PgPool;
use tower::{Layer, ServiceExt};

use crate::support::{
    Server, builder_on, closed_port, eventually, eventually_rows, in_time, migrated, outcome_of,
    part, passing, plays, post, quick, rows, with_middleware,
};

const LEASE: Duration = Duration::from_secs(1);

/// Short leases and quick retries.
fn quick_builder(pool: &PgPool) -> DurableBuilder {
    builder_on(pool).lease(LEASE).retry(quick())
}

fn at_most_once(url: impl AsRef<str>) -> Request {
    post(url, "x").with(Options::default().guarantee(Guarantee::AtMostOnce))
}

fn key_of(server: &Server, number: usize) -> Option<String> {
    let key = server.seen()[number]
        .headers
        .get("idempotency-key")
        .cloned();
    key.map(|key| key.to_str().unwrap().to_owned())
}

#[tokio::test]
async fn each_attempt_carries_the_same_idempotency_key() {
    let database = migrated().await;
    let server = Server::in_turn(&[503, 503, 200]).await;
    let durable = quick_builder(database.pool()).build().unwrap();
    let request = post(server.url("/"), "x");
    let response = in_time(durable.await_response(&request)).await.unwrap();
    let expected = Some(format!("\"{}\"", response.id()));
    for number in 0..3 {
        assert_eq!(key_of(&server, number), expected);
    }
    // A request with an idempotent method gets no key.
    let put = http::Request::put(server.url("/")).body("x").unwrap();
    in_time(durable.await_response(put)).await.unwrap();
    assert_eq!(key_of(&server, 3), None);
    // A key that the caller set is left alone.
    let mut own = request.clone();
    let value = http::HeaderValue::from_static("mine");
    own.headers_mut().insert("idempotency-key", value);
    in_time(durable.await_response(own)).await.unwrap();
    assert_eq!(key_of(&server, 4).as_deref(), Some("mine"));
    // The key has another form, or is switched off.
    let bare = Options::default().idempotency_header(IdempotencyHeader::bare());
    let bare = request.clone().with(bare);
    let response = in_time(durable.await_response(bare)).await.unwrap();
    assert_eq!(key_of(&server, 5), Some(response.id().to_string()));
    let none = Options::default().idempotency_header(IdempotencyHeader::none());
    in_time(durable.await_response(request.with(none)))
        .await
        .unwrap();
    assert_eq!(key_of(&server, 6), None);
}

#[tokio::test]
async fn the_layer_and_the_middleware_send_the_key() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let durable = quick_builder(database.pool()).build().unwrap();
    let client = with_middleware(reqwest::Client::new(), &durable);
    in_time(client.post(server.url("/")).body("x").send())
        .await
        .unwrap();
    let service = durable
        .layer()
        .layer(requeuest::ReqwestTransport::new(reqwest::Client::new()));
    let request = http::Request::post(server.url("/"));
    let request = request.body(requeuest::Body::from("x")).unwrap();
    in_time(service.oneshot(request)).await.unwrap();
    for number in 0..2 {
        let key = key_of(&server, number).unwrap();
        let id: RequestId = key.trim_matches('"').parse().unwrap();
        assert_eq!(durable.status(id).await.unwrap(), Some(Status::Completed));
    }
}

#[tokio::test]
async fn an_at_most_once_request_that_may_have_arrived_is_not_resent() {
    let database = migrated().await;
    let durable = quick_builder(database.pool()).build().unwrap();
    let (server, _never) = Server::held(200).await;
    let options = Options::default()
        .guarantee(Guarantee::AtMostOnce)
        .attempt_timeout(Duration::from_millis(300));
    let error = in_time(durable.await_response(post(server.url("/"), "x").with(options)))
        .await
        .unwrap_err();
    assert!(error.is_ambiguous(), "{error:?}");
    let id = error.request_id().unwrap();
    assert_eq!(durable.status(id).await.unwrap(), Some(Status::Ambiguous));
    // The request is a dead letter and keeps its payload.
    let kept = "outcomes o JOIN requeuest.mq_payloads USING (id)
                WHERE o.status = 'ambiguous' AND o.slot = -1";
    assert_eq!(rows(&database, kept).await, 1);
    passing(&database, Duration::from_millis(1500)).await;
    assert_eq!(server.count(), 1);
}

#[tokio::test]
async fn at_most_once_retries_answered_and_never_sent_attempts() {
    let database = migrated().await;
    let server = Server::in_turn(&[503, 200]).await;
    let durable = quick_builder(database.pool()).build().unwrap();
    let response = in_time(durable.await_response(at_most_once(server.url("/")))).await;
    assert_eq!(response.unwrap().status(), 200);
    assert_eq!(server.count(), 2);
    assert_eq!(key_of(&server, 0), None);

    let closed = closed_port().await;
    let request = at_most_once(format!("http://{closed}/"));
    let id = durable.fire(request).await.unwrap();
    let attempts = "attempts WHERE error_class = 'connect'";
    eventually("the request is retried", || async {
        rows(&database, attempts).await > 2
    })
    .await;
    assert!(!durable.status(id).await.unwrap().unwrap().is_terminal());
}

#[tokio::test]
async fn a_process_killed_while_sending_leaves_ambiguous_requests() {
    let database = migrated().await;
    let (server, _never) = Server::held(200).await;
    // The child sends one request with its insert, and another request after a poll.
    let mut child = part(module_path!(), "send_once_and_be_killed")
        .env("REQUEUEST_TEST_DATABASE", database.url())
        .env("REQUEUEST_TEST_SERVER", server.url("/"))
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    server.wait_for(2).await;
    child.kill().unwrap();
    child.wait().unwrap();

    let durable = quick_builder(database.pool()).build().unwrap();
    let ambiguous = "outcomes WHERE status = 'ambiguous' AND attempts = 1";
    eventually_rows(&database, ambiguous, 2).await;
    assert_eq!(server.count(), 2);
    drop(durable);
}

#[tokio::test]
#[ignore = "a part played by a copy of this binary"]
async fn send_once_and_be_killed() {
    if !plays("send_once_and_be_killed") {
        return;
    }
    let url = std::env::var("REQUEUEST_TEST_DATABASE").unwrap();
    let pool = PgPool::connect(&url).await.unwrap();
    let url = std::env::var("REQUEUEST_TEST_SERVER").unwrap();
    let durable = quick_builder(&pool).build().unwrap();
    durable.fire_in(&pool, at_most_once(&url)).await.unwrap();
    let _ = in_time(durable.await_response(at_most_once(&url))).await;
}

#[tokio::test]
async fn an_at_most_once_request_cut_off_by_shutdown_is_ambiguous() {
    let database = migrated().await;
    let (server, gate) = Server::held(200).await;
    let durable = quick_builder(database.pool()).build().unwrap();
    let id = durable.fire(at_most_once(server.url("/"))).await.unwrap();
    server.wait_for(1).await;
    in_time(durable.shutdown(Duration::from_millis(20)))
        .await
        .unwrap();
    gate.add_permits(10);
    let other = quick_builder(database.pool()).build().unwrap();
    let outcome = outcome_of(&other, id).await;
    assert_eq!(outcome.status(), Status::Ambiguous);
    assert_eq!(server.count(), 1);
}
