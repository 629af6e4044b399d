//! From enqueueing a request to its outcome.

mod order;
mod shutdown;
mod transactions;
mod waiters;

use std::time::{Duration, Instant};

use futures_util::FutureExt;
use requeuest::retry::RetryPolicy;
use requeuest::testkit::TestDatabase;
use requeuest::{Durable, FailureClass, Options, Status};

use crate::support::{
    Server, builder, closed_port, count, eventually, eventually_rows, handle, in_time, migrated,
    outcome_of, post, quick, reply, rows, with_middleware,
};

#[tokio::test]
async fn an_awaited_request_returns_the_stored_response() {
    let database = migrated().await;
    let server = Server::start(|_, seen| async move { reply(201, seen.body) }).await;
    let durable = handle(&database);

    let response = in_time(durable.await_response(post(server.url("/"), "hello")))
        .await
        .unwrap();
    assert_eq!(response.status(), 201);
    assert_eq!(response.text().unwrap(), "hello");
    let id = response.id();
    assert_eq!(durable.status(id).await.unwrap(), Some(Status::Completed));
    assert_eq!(durable.response(id).await.unwrap().text().unwrap(), "hello");
    assert_eq!(server.count(), 1);
    assert_eq!(rows(&database, "mq_msgs").await, 0);
    assert_eq!(rows(&database, "mq_payloads").await, 0);
}

#[tokio::test]
async fn a_fired_request_arrives() {
    let database = migrated().await;
    let server = Server::always(204).await;
    let durable = handle(&database);
    let id = in_time(durable.fire(post(server.url("/hook"), "x")))
        .await
        .unwrap();
    let outcome = outcome_of(&durable, id).await;
    assert_eq!(outcome.status(), Status::Completed);
    assert_eq!(outcome.into_result().unwrap().status(), 204);
    assert_eq!(server.count(), 1);
}

#[tokio::test]
async fn failed_attempts_are_retried_until_one_is_answered() {
    let database = migrated().await;
    let server = Server::in_turn(&[503, 429, 500, 200]).await;
    let durable = builder(&database).retry(quick()).build().unwrap();
    let response = in_time(durable.await_response(post(server.url("/"), "x")))
        .await
        .unwrap();
    assert_eq!(response.status(), 200);
    assert_eq!(server.count(), 4);
    assert_eq!(rows(&database, "attempts").await, 3);
    let attempts = "SELECT attempts::bigint FROM requeuest.outcomes";
    assert_eq!(count(&database, attempts).await, 4);
}

#[tokio::test]
async fn a_final_404_is_a_response() {
    let database = migrated().await;
    let server = Server::always(404).await;
    let durable = builder(&database).retry(quick()).build().unwrap();
    let response = in_time(durable.await_response(post(server.url("/"), "x")))
        .await
        .unwrap();
    assert_eq!(response.status(), 404);
    assert_eq!(server.count(), 1);
}

#[tokio::test]
async fn the_last_response_is_returned_when_retries_are_used_up() {
    let database = migrated().await;
    let server = Server::in_turn(&[500, 502, 503]).await;
    let durable = builder(&database)
        .retry(quick().max_attempts(3))
        .build()
        .unwrap();
    let response = in_time(durable.await_response(post(server.url("/"), "x")))
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
async fn without_any_response_the_last_error_is_returned() {
    let database = migrated().await;
    let durable = builder(&database)
        .retry(quick().max_attempts(2))
        .build()
        .unwrap();
    let closed = closed_port().await;
    let url = format!("http://{closed}/secret-path?token=hunter2");
    let error = in_time(durable.await_response(post(&url, "x")))
        .await
        .unwrap_err();
    let source = std::error::Error::source(&error).unwrap();
    assert!(
        source
            .downcast_ref::<reqwest::Error>()
            .unwrap()
            .is_connect()
    );
    // From the database, where only the text of the source is.
    let again = durable
        .response(error.request_id().unwrap())
        .await
        .unwrap_err();
    assert!(std::error::Error::source(&again).is_none());
    for error in [error, again] {
        assert!(error.is_discarded(), "{error}");
        assert_eq!(error.attempts(), Some(2));
        assert_eq!(error.failure_class(), Some(FailureClass::Connect));
        let shown = format!("given up after 2 attempts to http://{closed}: ");
        assert!(error.to_string().contains(&shown), "{error}");
        let shown = format!("{error} {error:?}");
        assert!(
            !shown.contains("hunter2") && !shown.contains("secret"),
            "{shown}"
        );
    }
}

#[tokio::test]
async fn a_delayed_request_is_sent_after_its_delay() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let durable = handle(&database);
    let delay = Duration::from_millis(700);
    let began = Instant::now();
    let request = post(server.url("/"), "x").with(Options::default().delay(delay));
    let id = durable.fire(request).await.unwrap();
    assert_eq!(durable.status(id).await.unwrap(), Some(Status::Scheduled));
    outcome_of(&durable, id).await;
    assert!(began.elapsed() >= delay);
    assert_eq!(server.count(), 1);
}

/// A handle that sends one request at a time, for a short time.
fn with_one_slot(database: &TestDatabase) -> Durable {
    builder(database)
        .lease(Duration::from_secs(1))
        .concurrency(1)
        .attempt_timeout(Duration::from_millis(100))
        .build()
        .unwrap()
}

#[tokio::test]
async fn an_unpolled_caller_keeps_no_slot_past_its_deadline() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let durable = with_one_slot(&database);
    let client = with_middleware(reqwest::Client::new(), &durable);
    let mut stuck = Box::pin(client.post(server.url("/stuck")).body("x").send());
    // The call begins and isn't polled again, so it never takes the claim of its request.
    assert!(stuck.as_mut().now_or_never().is_none());
    let id = in_time(durable.fire(post(server.url("/other"), "x")))
        .await
        .unwrap();
    let outcome = outcome_of(&durable, id).await;
    assert_eq!(outcome.status(), Status::Completed);
    // The handle's transport sends the stuck request instead. The caller gets the response once it
    // is polled.
    server.wait_for(2).await;
    assert_eq!(in_time(stuck).await.unwrap().status(), 200);
    assert_eq!(server.count(), 2);
}

#[tokio::test]
async fn an_unpolled_caller_keeps_no_room_of_the_runner_past_its_deadline() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let durable = with_one_slot(&database);
    let client = with_middleware(reqwest::Client::new(), &durable);
    let ordered = Options::default().ordered("stuck");
    let stuck = client.post(server.url("/stuck")).body("x");
    let mut stuck = Box::pin(stuck.with_extension(ordered).send());
    // A poll claims the ordered request for a caller that isn't polled again.
    assert!(stuck.as_mut().now_or_never().is_none());
    eventually_rows(&database, "mq_msgs WHERE claim_no > 0", 1).await;
    let other = Options::default().ordered("other");
    let other = post(server.url("/other"), "x").with(other);
    let id = in_time(durable.fire(other)).await.unwrap();
    assert_eq!(outcome_of(&durable, id).await.status(), Status::Completed);
    assert_eq!(in_time(stuck).await.unwrap().status(), 200);
    assert_eq!(server.count(), 2);
}

#[tokio::test]
async fn a_503_with_a_body_over_the_limit_is_retried() {
    let database = migrated().await;
    let server = Server::start(|number, _| async move {
        if number == 0 {
            reply(503, vec![b'x'; 5000])
        } else {
            reply(200, "small")
        }
    })
    .await;
    let durable = builder(&database)
        .retry(quick())
        .max_response_body(1000)
        .build()
        .unwrap();
    let response = in_time(durable.await_response(post(server.url("/"), "x")))
        .await
        .unwrap();
    assert_eq!(response.text().unwrap(), "small");

    let only_large = Server::start(|_, _| async move { reply(503, vec![b'x'; 5000]) }).await;
    let twice = Options::default().retry(quick().max_attempts(2));
    let request = post(only_large.url("/"), "x").with(twice);
    let error = in_time(durable.await_response(request)).await.unwrap_err();
    assert_eq!(error.response_head().unwrap().0, 503);
    assert_eq!(only_large.count(), 2);
}

#[tokio::test]
async fn requests_between_two_attempts_hold_no_slots() {
    let database = migrated().await;
    let (failing, answer) = Server::held(503).await;
    let server = Server::always(200).await;
    let durable = builder(&database).concurrency(1).build().unwrap();
    let retry = RetryPolicy::constant(Duration::from_secs(60));
    let held = post(failing.url("/"), "x").with(Options::default().retry(retry));
    // Enqueued in a transaction, so that the runner claims the request.
    let id = durable.fire_in(database.pool(), held).await.unwrap();
    failing.wait_for(1).await;
    let mut caller = std::pin::pin!(durable.response(id));
    tokio::select! {
        biased;
        ended = &mut caller => panic!("{ended:?}"),
        () = std::future::ready(()) => {}
    }
    answer.add_permits(1);
    eventually("the request waits for its retry", || async {
        durable.status(id).await.unwrap() == Some(Status::Retryable)
    })
    .await;
    let other = post(server.url("/"), "y");
    durable.fire_in(database.pool(), other).await.unwrap();
    server.wait_for(1).await;
    assert_eq!(failing.count(), 1);
}
