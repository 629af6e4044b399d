//! From the enqueueing of a request to its outcome.

use std::time::Duration;

use requeuest::{Durable, Options, Request, Status, testkit};

use crate::support::{LONG, Server, closed_port, count, in_time, migrated, quick, reply};

fn post(url: &str, body: &'static str) -> Request {
    http::Request::post(url)
        .body(body)
        .unwrap()
        .try_into()
        .unwrap()
}

#[tokio::test]
async fn an_awaited_request_returns_the_stored_response() {
    let database = migrated().await;
    let server = Server::start(|_, seen| async move { reply(201, seen.body) }).await;
    let durable = Durable::new(database.pool().clone());

    let response = in_time(durable.await_response(post(&server.url("/"), "hello")))
        .await
        .unwrap();
    assert_eq!(response.status(), 201);
    assert_eq!(response.text().unwrap(), "hello");
    let id = response.id();
    assert_eq!(durable.status(id).await.unwrap(), Some(Status::Completed));
    assert_eq!(durable.response(id).await.unwrap().text().unwrap(), "hello");
    assert_eq!(server.count(), 1);
    assert_eq!(
        count(&database, "select count(*) from requeuest.mq_msgs").await,
        0
    );
    assert_eq!(
        count(&database, "select count(*) from requeuest.mq_payloads").await,
        0
    );
}

#[tokio::test]
async fn a_fired_request_arrives() {
    let database = migrated().await;
    let server = Server::always(204).await;
    let durable = Durable::new(database.pool().clone());
    let id = in_time(durable.fire(post(&server.url("/hook"), "x")))
        .await
        .unwrap();
    let outcome = testkit::outcome(&durable, id, LONG).await.unwrap();
    assert_eq!(outcome.status, Status::Completed);
    assert_eq!(outcome.response.unwrap().status(), 204);
    assert_eq!(server.count(), 1);
}

#[tokio::test]
async fn failing_attempts_are_repeated_until_one_is_answered() {
    let database = migrated().await;
    let server = Server::in_turn(&[503, 429, 500, 200]).await;
    let durable = Durable::builder(database.pool().clone())
        .retry(quick())
        .build()
        .unwrap();
    let response = in_time(durable.await_response(post(&server.url("/"), "x")))
        .await
        .unwrap();
    assert_eq!(response.status(), 200);
    assert_eq!(server.count(), 4);
    assert_eq!(
        count(&database, "select count(*) from requeuest.attempts").await,
        3
    );
    let attempts = "select attempts::bigint from requeuest.outcomes";
    assert_eq!(count(&database, attempts).await, 4);
}

#[tokio::test]
async fn a_final_answer_is_not_repeated() {
    let database = migrated().await;
    let server = Server::always(404).await;
    let durable = Durable::builder(database.pool().clone())
        .retry(quick())
        .build()
        .unwrap();
    let response = in_time(durable.await_response(post(&server.url("/"), "x")))
        .await
        .unwrap();
    assert_eq!(response.status(), 404);
    assert_eq!(server.count(), 1);
}

#[tokio::test]
async fn the_last_response_is_returned_when_retries_are_used_up() {
    let database = migrated().await;
    let server = Server::in_turn(&[500, 502, 503]).await;
    let durable = Durable::builder(database.pool().clone())
        .retry(quick().max_attempts(3))
        .build()
        .unwrap();
    let response = in_time(durable.await_response(post(&server.url("/"), "x")))
        .await
        .unwrap();
    assert_eq!(response.status(), 503);
    assert_eq!(
        durable.status(response.id()).await.unwrap(),
        Some(Status::Discarded)
    );
    assert_eq!(server.count(), 3);
}

#[tokio::test]
async fn the_last_error_is_returned_when_there_never_was_a_response() {
    let database = migrated().await;
    let durable = Durable::builder(database.pool().clone())
        .retry(quick().max_attempts(2))
        .build()
        .unwrap();
    let url = format!("http://{}/secret-path?token=hunter2", closed_port().await);
    let error = in_time(durable.await_response(post(&url, "x")))
        .await
        .unwrap_err();
    assert!(error.is_discarded(), "{error}");
    assert_eq!(error.attempts(), Some(2));
    assert!(!format!("{error} {error:?}").contains("hunter2"));
    let again = durable
        .response(error.request_id().unwrap())
        .await
        .unwrap_err();
    assert!(again.is_discarded(), "{again}");
}

#[tokio::test]
async fn the_delay_is_waited_for() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let durable = Durable::new(database.pool().clone());
    let delay = Duration::from_millis(700);
    let began = std::time::Instant::now();
    let request = post(&server.url("/"), "x").with(Options::default().delay(delay));
    let id = durable.fire(request).await.unwrap();
    assert_eq!(durable.status(id).await.unwrap(), Some(Status::Scheduled));
    testkit::outcome(&durable, id, LONG).await.unwrap();
    assert!(began.elapsed() >= delay);
    assert_eq!(server.count(), 1);
}

#[tokio::test]
async fn a_caller_that_is_not_polled_keeps_no_slot_past_its_deadline() {
    use futures_util::FutureExt;

    let database = migrated().await;
    let server = Server::always(200).await;
    let durable = Durable::builder(database.pool().clone())
        .lease(Duration::from_secs(1))
        .concurrency(1)
        .attempt_timeout(Duration::from_millis(100))
        .build()
        .unwrap();
    let client = reqwest_middleware::ClientBuilder::new(reqwest::Client::new())
        .with(durable.clone())
        .build();
    let mut stuck = Box::pin(client.post(server.url("/stuck")).body("x").send());
    // Begun, and never polled again: its claim comes and nobody takes it.
    assert!(stuck.as_mut().now_or_never().is_none());
    let id = in_time(durable.fire(post(&server.url("/other"), "x")))
        .await
        .unwrap();
    let outcome = testkit::outcome(&durable, id, LONG).await.unwrap();
    assert_eq!(outcome.status, Status::Completed);
    // It gets its response all the same, once it is polled.
    assert_eq!(in_time(stuck).await.unwrap().status(), 200);
}

#[tokio::test]
async fn a_refused_status_with_a_body_over_the_limit_is_repeated() {
    let database = migrated().await;
    let server = Server::start(|number, _| async move {
        if number == 0 {
            reply(503, vec![b'x'; 5000])
        } else {
            reply(200, "small")
        }
    })
    .await;
    let durable = Durable::builder(database.pool().clone())
        .retry(quick())
        .max_response_body(1000)
        .build()
        .unwrap();
    let response = in_time(durable.await_response(post(&server.url("/"), "x")))
        .await
        .unwrap();
    assert_eq!(response.text().unwrap(), "small");

    let only_large = Server::start(|_, _| async move { reply(503, vec![b'x'; 5000]) }).await;
    let twice = Options::default().retry(quick().max_attempts(2));
    let request = post(&only_large.url("/"), "x").with(twice);
    let error = in_time(durable.await_response(request)).await.unwrap_err();
    assert_eq!(error.response_head().unwrap().0, 503);
    assert_eq!(only_large.count(), 2);
}
