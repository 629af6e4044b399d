//! The API of the older crate: spawning, channels, and the listener.

mod clear;
mod listener;
mod programs;

use std::collections::HashSet;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::header::CONTENT_TYPE;
use http::{HeaderMap, HeaderValue, StatusCode};
use requeuest::client::JobConfig;
use requeuest::testkit::TestDatabase;
use requeuest::{AcceptedResponse, Channels, Client, Durable, Request, Status, Url, Uuid, testkit};

use crate::support::{
    LONG, Seen, Server, builder, count, eventually, in_time, migrated, passing, post, reply, rows,
};

async fn client(database: &TestDatabase, channels: Channels<'_>) -> Client {
    Client::new(database.pool().clone(), channels)
        .await
        .unwrap()
}

/// A client that delivers all channels.
async fn serving_all(database: &TestDatabase) -> Client {
    client(database, Channels::All).await
}

/// A handle without a runner.
fn enqueue_only(database: &TestDatabase) -> Durable {
    builder(database).runner(false).build().unwrap()
}

fn url(server: &Server, path: &str) -> Url {
    Url::parse(&server.url(path)).unwrap()
}

async fn outcome(client: &Client, id: Uuid) -> requeuest::Outcome {
    testkit::outcome(client.durable(), id.into(), LONG)
        .await
        .unwrap()
}

/// Retries without noticeable delays.
fn quick_job(job: &mut JobConfig) {
    job.set_retry_backoff(Duration::from_millis(1));
}

fn bodies(server: &Server) -> Vec<Bytes> {
    server.seen().into_iter().map(|seen| seen.body).collect()
}

#[tokio::test]
async fn a_spawned_request_is_delivered() {
    let database = migrated().await;
    let server = Server::always(204).await;
    let client = client(&database, Channels::List(&["my_service"])).await;
    let id = in_time(client.spawn("my_service", &post(server.url("/"), "hello")))
        .await
        .unwrap();
    let outcome = outcome(&client, id).await;
    assert_eq!(outcome.status(), Status::Completed);
    assert_eq!(outcome.into_result().unwrap().status(), 204);
    assert_eq!(bodies(&server), ["hello"]);
}

#[tokio::test]
async fn every_constructor_sends_what_it_was_given() {
    fn headers() -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.append("x-kept", HeaderValue::from_static("one"));
        headers.append("x-kept", HeaderValue::from_static("two"));
        headers
    }

    async fn sent(client: &Client, server: &Server, request: Request) -> Seen {
        let id = in_time(client.spawn("c", &request)).await.unwrap();
        outcome(client, id).await.into_result().unwrap();
        server.seen().pop().unwrap()
    }

    fn assert_sent(seen: &Seen, method: &str, body: Option<&str>) {
        assert_eq!(seen.method, method);
        assert_eq!(seen.uri, "/a?b=c");
        let kept: Vec<_> = seen.headers.get_all("x-kept").iter().collect();
        assert_eq!(kept, ["one", "two"], "{method}");
        assert_eq!(seen.body, body.unwrap_or_default(), "{method}");
        let length = seen.headers.get("content-length");
        let length = length.map(|length| length.to_str().unwrap().parse().unwrap());
        assert_eq!(length, body.map(str::len), "{method}");
    }

    let database = migrated().await;
    let server = Server::always(200).await;
    let client = serving_all(&database).await;
    let to = || url(&server, "/a?b=c");
    let http = |method: &str| {
        let builder = http::Request::builder()
            .method(method)
            .uri(server.url("/a?b=c"));
        builder.header("x-kept", "one").header("x-kept", "two")
    };

    let cases = [
        (Request::get(to(), headers()), "GET", None),
        (Request::head(to(), headers()), "HEAD", None),
        (Request::delete(to(), None, headers()), "DELETE", None),
        (
            Request::delete(to(), Some(b"gone".to_vec()), headers()),
            "DELETE",
            Some("gone"),
        ),
        (
            Request::post(to(), b"post".to_vec(), headers()),
            "POST",
            Some("post"),
        ),
        (
            Request::put(to(), b"put".to_vec(), headers()),
            "PUT",
            Some("put"),
        ),
        (
            Request::from_reqwest(
                reqwest::Client::new()
                    .patch(to())
                    .headers(headers())
                    .body("patch")
                    .build()
                    .unwrap(),
            )
            .unwrap(),
            "PATCH",
            Some("patch"),
        ),
        (
            Request::from_http_builder(http("QUERY"), "query").unwrap(),
            "QUERY",
            Some("query"),
        ),
        (
            Request::from_http_body(http("POST").body("body").unwrap()).unwrap(),
            "POST",
            Some("body"),
        ),
        (
            Request::from_http_empty(http("OPTIONS").body(()).unwrap()).unwrap(),
            "OPTIONS",
            None,
        ),
    ];
    for (request, method, body) in cases {
        let seen = sent(&client, &server, request).await;
        assert_sent(&seen, method, body);
    }
}

#[tokio::test]
async fn invalid_requests_and_settings_are_refused_by_field() {
    let stream = futures_util::stream::iter([Ok::<_, std::io::Error>("part")]);
    let streamed = reqwest::Client::new()
        .post("http://localhost/")
        .body(reqwest::Body::wrap_stream(stream))
        .build()
        .unwrap();
    let error = Request::from_reqwest(streamed).unwrap_err();
    assert_eq!(error.field(), Some("body"));
    let broken = http::Request::post("http://localhost/").header("not a name", "x");
    assert!(
        Request::from_http_builder(broken, "x")
            .unwrap_err()
            .is_request()
    );
    let relative = http::Request::get("/a").body(()).unwrap();
    assert_eq!(
        Request::from_http_empty(relative).unwrap_err().field(),
        Some("url")
    );

    let database = migrated().await;
    let server = Server::always(200).await;
    let client = serving_all(&database).await;
    let error = client
        .spawn("", &post(server.url("/"), "x"))
        .await
        .unwrap_err();
    assert_eq!(error.field(), Some("channel"));
    let error = client
        .spawn_cfg("c", &post(server.url("/"), "x"), |job| {
            job.set_retry_backoff(Duration::ZERO);
        })
        .await
        .unwrap_err();
    assert_eq!(error.field(), Some("retry"));
    let long = "x".repeat(56);
    let channels = Channels::List(&["good", &long]);
    let error = Client::new(database.pool().clone(), channels)
        .await
        .unwrap_err();
    assert_eq!(error.field(), Some("deliver"));
}

#[tokio::test]
async fn a_commit_sends_and_a_rollback_never_does() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let client = serving_all(&database).await;

    let mut tx = client.pool().begin().await.unwrap();
    let undone = client
        .spawn_with(&mut *tx, "c", &post(server.url("/"), "undone"))
        .await
        .unwrap();
    tx.rollback().await.unwrap();

    let mut tx = client.pool().begin().await.unwrap();
    let done = client
        .spawn_with(&mut *tx, "c", &post(server.url("/"), "done"))
        .await
        .unwrap();
    let unseen = client.durable().response(done.into()).await.unwrap_err();
    assert!(unseen.is_unknown_id(), "{unseen}");
    tx.commit().await.unwrap();

    assert_eq!(outcome(&client, done).await.status(), Status::Completed);
    assert_eq!(client.durable().status(undone.into()).await.unwrap(), None);
    assert_eq!(rows(&database, "mq_payloads").await, 0);
    assert_eq!(bodies(&server), ["done"]);
}

#[tokio::test]
async fn a_request_in_a_transaction_takes_a_configuration() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let client = serving_all(&database).await;
    let mut tx = client.pool().begin().await.unwrap();
    let hour = Duration::from_secs(3600);
    let id = client
        .spawn_with_cfg(
            &mut *tx,
            "c",
            |job| {
                job.set_delay(hour);
            },
            &post(server.url("/"), "x"),
        )
        .await
        .unwrap();
    tx.commit().await.unwrap();
    let status = client.durable().status(id.into()).await.unwrap();
    assert_eq!(status, Some(Status::Scheduled));
}

#[tokio::test]
async fn a_returning_request_keeps_headers_and_waits_for_success() {
    let database = migrated().await;
    let server = Server::start(|number, seen| async move {
        match number {
            0 => reply(404, "not yet"),
            1 => reply(500, "nor now"),
            _ => {
                let mut response = reply(201, seen.body);
                response.headers_mut().insert("x-answer", 42.into());
                response
            }
        }
    })
    .await;
    let client = serving_all(&database).await;
    let mut headers = HeaderMap::new();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/plain"));
    let to = url(&server, "/");
    let request = Request::post(to.clone(), b"hello".to_vec(), headers);
    let response: reqwest::Response = in_time(client.spawn_returning("c", &request))
        .await
        .unwrap();
    assert_eq!(response.status(), 201);
    assert_eq!(response.url(), &to);
    assert_eq!(response.headers()["x-answer"], "42");
    assert_eq!(response.text().await.unwrap(), "hello");
    let seen = server.seen();
    assert_eq!(seen.len(), 3);
    for seen in seen {
        assert_eq!(seen.headers[CONTENT_TYPE], "text/plain");
        assert_eq!(seen.body, "hello");
    }
}

#[tokio::test]
async fn accepted_responses_replace_the_awaited_success() {
    let database = migrated().await;
    let server = Server::in_turn(&[200, 503, 404]).await;
    let client = serving_all(&database).await;
    let request = post(server.url("/"), "x").accept_responses([StatusCode::NOT_FOUND]);
    let response = in_time(client.spawn_returning_cfg("c", &request, quick_job))
        .await
        .unwrap();
    assert_eq!(response.status(), 404);
    assert_eq!(server.count(), 3);

    let server = Server::in_turn(&[500, 302, 204]).await;
    let request = post(server.url("/"), "x").accept_responses([
        AcceptedResponse::Status(204),
        AcceptedResponse::Range(400, 499),
    ]);
    let id = client.spawn_cfg("c", &request, quick_job).await.unwrap();
    let outcome = outcome(&client, id).await;
    assert_eq!(outcome.into_result().unwrap().status(), 204);
    assert_eq!(server.count(), 3);

    let server = Server::always(503).await;
    let request = post(server.url("/"), "x").accept_responses([AcceptedResponse::Any]);
    let response = in_time(client.spawn_returning("c", &request))
        .await
        .unwrap();
    assert_eq!(response.status(), 503);
    assert_eq!(server.count(), 1);
}

#[tokio::test]
async fn a_returning_request_may_be_delivered_by_another_client() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let here = client(&database, Channels::List(&["here"])).await;
    let _there = client(&database, Channels::List(&["there"])).await;
    let response = in_time(here.spawn_returning("there", &post(server.url("/"), "x")))
        .await
        .unwrap();
    assert_eq!(response.status(), 200);
}

#[tokio::test]
async fn retries_are_counted_after_the_first_attempt() {
    let database = migrated().await;
    let server = Server::always(500).await;
    let client = serving_all(&database).await;
    let id = client
        .spawn_cfg("c", &post(server.url("/"), "x"), |job| {
            quick_job(job);
            job.set_retries(2);
        })
        .await
        .unwrap();
    let ended = outcome(&client, id).await;
    assert_eq!(ended.status(), Status::Discarded);
    assert_eq!(ended.into_result().unwrap().status(), 500);
    assert_eq!(server.count(), 3);

    let request = post(server.url("/"), "x");
    let returned = client.spawn_returning_cfg("c", &request, |job| {
        quick_job(job);
        job.set_retries(0);
    });
    assert_eq!(in_time(returned).await.unwrap().status(), 500);
    assert_eq!(server.count(), 4);
}

#[tokio::test]
async fn the_retry_backoff_bounds_the_first_delay() {
    const REQUESTS: i64 = 8;
    let database = migrated().await;
    let server = Server::always(500).await;
    let client = serving_all(&database).await;
    let day = Duration::from_secs(24 * 3600);
    for _ in 0..REQUESTS {
        client
            .spawn_cfg("c", &post(server.url("/"), "x"), |job| {
                job.set_retry_backoff(day);
            })
            .await
            .unwrap();
    }
    eventually("all requests wait for their retry", || async {
        rows(
            &database,
            "mq_msgs WHERE state = 'waiting' AND attempts = 1",
        )
        .await
            == REQUESTS
    })
    .await;
    let later = "mq_msgs WHERE attempt_at > now() + interval '1 day'";
    assert_eq!(rows(&database, later).await, 0);
    // Jitter may make a single delay short, but not all of them.
    let longest =
        "SELECT extract(epoch FROM max(attempt_at) - now())::bigint FROM requeuest.mq_msgs";
    let longest = count(&database, longest).await;
    assert!(longest > 3600, "{longest} s is the longest delay");
}

#[tokio::test]
async fn a_delayed_request_waits_for_its_time() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let client = serving_all(&database).await;
    let delay = Duration::from_millis(500);
    let began = Instant::now();
    let id = client
        .spawn_cfg("c", &post(server.url("/"), "x"), |job| {
            job.set_delay(delay);
        })
        .await
        .unwrap();
    outcome(&client, id).await;
    assert!(began.elapsed() >= delay);
}

#[tokio::test]
async fn order_is_kept_per_channel_args() {
    const EACH: usize = 6;
    let database = migrated().await;
    // Every other request fails at first, so that later requests could overtake it.
    let failed = Arc::new(Mutex::new(HashSet::new()));
    let server = Server::start(move |number, seen| {
        let fails = number % 2 == 0 && failed.lock().unwrap().insert(seen.body);
        async move { reply(if fails { 503 } else { 200 }, "") }
    })
    .await;
    let client = serving_all(&database).await;
    let mut last = Vec::new();
    for number in 0..EACH {
        for args in ["a", "b"] {
            let request = post(server.url("/"), format!("{args}{number}"));
            let id = client
                .spawn_cfg("c", &request, |job| {
                    quick_job(job);
                    job.set_ordered(true).set_channel_args(args);
                })
                .await
                .unwrap();
            last.push(id);
        }
    }
    for id in last {
        assert_eq!(outcome(&client, id).await.status(), Status::Completed);
    }
    let all = bodies(&server);
    for args in ["a", "b"] {
        let mut came: Vec<Bytes> = all.clone();
        came.retain(|body| body.starts_with(args.as_bytes()));
        came.dedup();
        let order: Vec<_> = (0..EACH).map(|number| format!("{args}{number}")).collect();
        assert_eq!(came, order);
    }
}

#[tokio::test]
async fn only_listed_channels_are_delivered() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let idle = client(&database, Channels::List(&[])).await;
    let some = client(&database, Channels::List(&["a", "b"])).await;
    let other = some
        .spawn("other", &post(server.url("/"), "other"))
        .await
        .unwrap();
    let first = idle.spawn("a", &post(server.url("/"), "a")).await.unwrap();
    let second = idle.spawn("b", &post(server.url("/"), "b")).await.unwrap();
    for id in [first, second] {
        assert_eq!(outcome(&some, id).await.status(), Status::Completed);
    }
    passing(&database, Duration::from_millis(1500)).await;
    let status = some.durable().status(other.into()).await.unwrap();
    assert_eq!(status, Some(Status::Available));
    assert_eq!(server.count(), 2);

    let _all = serving_all(&database).await;
    assert_eq!(outcome(&some, other).await.status(), Status::Completed);
}

#[tokio::test]
async fn the_client_uses_the_callers_pool() {
    let database = migrated().await;
    let client = serving_all(&database).await;
    let server = Server::always(200).await;
    database.pool().close().await;
    assert!(client.pool().is_closed());
    let error = client
        .spawn("c", &post(server.url("/"), "x"))
        .await
        .unwrap_err();
    assert!(error.is_closed(), "{error}");
}
