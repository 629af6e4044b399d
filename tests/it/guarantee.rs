//! What is promised when an attempt's outcome is not known: the key by which repetitions are recognised, and at most once.

use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use requeuest::{
    Durable, DurableBuilder, Guarantee, IdempotencyHeader, Options, Request, RequestId, Status,
    testkit,
};
use reqwest_middleware::ClientBuilder;
use sqlx::PgPool;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tower::{Layer, ServiceExt};

use crate::support::{
    LONG, Server, closed_port, count, eventually, in_time, migrated, part, passing, plays, quick,
};

const LEASE: Duration = Duration::from_secs(1);

fn builder(pool: &PgPool) -> DurableBuilder {
    Durable::builder(pool.clone()).lease(LEASE).retry(quick())
}

fn request(method: &str, url: &str, options: Options) -> Request {
    let request = http::Request::builder().method(method).uri(url);
    let request = request.body("x").unwrap();
    Request::try_from(request).unwrap().with(options)
}

fn once(url: &str) -> Request {
    request(
        "POST",
        url,
        Options::default().guarantee(Guarantee::AtMostOnce),
    )
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
    let durable = builder(database.pool()).build().unwrap();
    let post = request("POST", &server.url("/"), Options::default());
    let response = in_time(durable.await_response(&post)).await.unwrap();
    let expected = Some(format!("\"{}\"", response.id()));
    for number in 0..3 {
        assert_eq!(key_of(&server, number), expected);
    }
    // Methods that are idempotent by themselves need none.
    let put = request("PUT", &server.url("/"), Options::default());
    in_time(durable.await_response(put)).await.unwrap();
    assert_eq!(key_of(&server, 3), None);
    // The caller's own is left alone.
    let mut own = post.clone();
    let value = http::HeaderValue::from_static("mine");
    own.headers_mut().insert("idempotency-key", value);
    in_time(durable.await_response(own)).await.unwrap();
    assert_eq!(key_of(&server, 4).as_deref(), Some("mine"));
    // Another form, or none.
    let bare = Options::default().idempotency_header(IdempotencyHeader::bare());
    let bare = request("POST", &server.url("/"), bare);
    let response = in_time(durable.await_response(bare)).await.unwrap();
    assert_eq!(key_of(&server, 5), Some(response.id().to_string()));
    let none = Options::default().idempotency_header(IdempotencyHeader::none());
    in_time(durable.await_response(request("POST", &server.url("/"), none)))
        .await
        .unwrap();
    assert_eq!(key_of(&server, 6), None);
}

#[tokio::test]
async fn the_layer_and_the_middleware_send_the_key_too() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let durable = builder(database.pool()).build().unwrap();
    let client = ClientBuilder::new(reqwest::Client::new())
        .with(durable.clone())
        .build();
    in_time(client.post(server.url("/")).body("x").send())
        .await
        .unwrap();
    let service = durable
        .layer()
        .layer(requeuest::ReqwestTransport::new(reqwest::Client::new()));
    let post = http::Request::post(server.url("/"));
    let post = post.body(requeuest::Body::from("x")).unwrap();
    in_time(service.oneshot(post)).await.unwrap();
    for number in 0..2 {
        let key = key_of(&server, number).unwrap();
        let id: RequestId = key.trim_matches('"').parse().unwrap();
        assert_eq!(durable.status(id).await.unwrap(), Some(Status::Completed));
    }
}

/// A server that takes a request and never answers.
async fn silent() -> (String, Arc<Semaphore>) {
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let url = format!("http://{}/", listener.local_addr().unwrap());
    let taken = Arc::new(Semaphore::new(0));
    let count = Arc::clone(&taken);
    tokio::spawn(async move {
        let mut kept = Vec::new();
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            stream.readable().await.unwrap();
            kept.push(stream);
            count.add_permits(1);
        }
    });
    (url, taken)
}

#[tokio::test]
async fn what_may_have_been_sent_once_is_not_sent_again() {
    let database = migrated().await;
    let durable = builder(database.pool()).build().unwrap();
    let (url, taken) = silent().await;
    let options = Options::default()
        .guarantee(Guarantee::AtMostOnce)
        .attempt_timeout(Duration::from_millis(300));
    let error = in_time(durable.await_response(request("POST", &url, options)))
        .await
        .unwrap_err();
    assert!(error.is_ambiguous(), "{error:?}");
    let id = error.request_id().unwrap();
    assert_eq!(durable.status(id).await.unwrap(), Some(Status::Ambiguous));
    // It is kept, with what was to be sent.
    let kept = "select count(*) from requeuest.outcomes o join requeuest.mq_payloads using (id)
                where o.status = 'ambiguous' and o.expires_at is null";
    assert_eq!(count(&database, kept).await, 1);
    passing(&database, Duration::from_millis(1500)).await;
    assert_eq!(taken.available_permits(), 1);
}

#[tokio::test]
async fn what_was_certainly_not_sent_or_was_answered_is_tried_again() {
    let database = migrated().await;
    let server = Server::in_turn(&[503, 200]).await;
    let durable = builder(database.pool()).build().unwrap();
    let response = in_time(durable.await_response(once(&server.url("/")))).await;
    assert_eq!(response.unwrap().status(), 200);
    assert_eq!(server.count(), 2);
    assert_eq!(key_of(&server, 0), None);

    let closed = closed_port().await;
    let id = durable.fire(once(&format!("http://{closed}/"))).await;
    let id = id.unwrap();
    let attempts = "select count(*) from requeuest.attempts where error_class = 'connect'";
    eventually("it is tried again", || async {
        count(&database, attempts).await > 2
    })
    .await;
    assert!(!durable.status(id).await.unwrap().unwrap().is_terminal());
}

#[tokio::test]
async fn a_process_that_is_killed_while_it_sends_leaves_it_ambiguous() {
    let database = migrated().await;
    let (url, taken) = silent().await;
    // One of its requests is sent with the insert, the other after a poll.
    let mut child = part(module_path!(), "send_once_and_be_killed")
        .env("REQUEUEST_TEST_DATABASE", database.url())
        .env("REQUEUEST_TEST_SERVER", &url)
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    in_time(taken.acquire_many(2)).await.unwrap().forget();
    child.kill().unwrap();
    child.wait().unwrap();

    let durable = builder(database.pool()).build().unwrap();
    let ambiguous =
        "select count(*) from requeuest.outcomes where status = 'ambiguous' and attempts = 1";
    eventually("both are ambiguous", || async {
        count(&database, ambiguous).await == 2
    })
    .await;
    assert_eq!(taken.available_permits(), 0);
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
    let durable = builder(&pool).build().unwrap();
    durable.fire_in(&pool, once(&url)).await.unwrap();
    let _ = in_time(durable.await_response(once(&url))).await;
}

#[tokio::test]
async fn what_a_shutdown_cuts_off_is_ambiguous() {
    let database = migrated().await;
    let (server, gate) = Server::held(200).await;
    let durable = builder(database.pool()).build().unwrap();
    let id = durable.fire(once(&server.url("/"))).await.unwrap();
    server.wait_for(1).await;
    in_time(durable.shutdown(Duration::from_millis(20)))
        .await
        .unwrap();
    gate.add_permits(10);
    let other = builder(database.pool()).build().unwrap();
    let outcome = testkit::outcome(&other, id, LONG).await.unwrap();
    assert_eq!(outcome.status(), Status::Ambiguous);
    assert_eq!(server.count(), 1);
}
