//! Requests that end without a response, because they are cancelled or miss their deadline, and the
//! effect on their ordering key.

use std::time::Duration;

use requeuest::retry::RetryPolicy;
use requeuest::{Durable, Options, Request, RequestId, Status, Uuid};

use crate::support::{
    Server, builder, eventually_rows, in_time, migrated, only_id, other_process, outcome_of,
    passing, post, quick, reply, rows,
};

async fn final_status(durable: &Durable, id: RequestId) -> Status {
    outcome_of(durable, id).await.status()
}

#[tokio::test]
async fn a_waiting_request_that_is_cancelled_is_never_sent() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let durable = Durable::new(database.pool().clone());
    let delayed = post(server.url("/"), "x").with(Options::default().delay(Duration::from_secs(1)));
    let id = durable.fire(delayed).await.unwrap();
    assert!(durable.cancel(id).await.unwrap());
    assert_eq!(durable.status(id).await.unwrap(), Some(Status::Cancelled));
    let error = durable.response(id).await.unwrap_err();
    assert!(error.is_cancelled() && !error.is_superseded(), "{error:?}");
    // The request has already ended.
    assert!(!durable.cancel(id).await.unwrap());
    passing(&database, Duration::from_millis(1500)).await;
    assert_eq!(server.count(), 0);
}

#[tokio::test]
async fn another_process_cancels_a_request_in_flight() {
    let database = migrated().await;
    let (server, gate) = Server::held(503).await;
    let durable = builder(&database).retry(quick()).build().unwrap();
    let waiting = tokio::spawn({
        let (durable, request) = (durable.clone(), post(server.url("/"), "x"));
        async move { durable.await_response(request).await }
    });
    server.wait_for(1).await;
    let id = only_id(&database, "mq_msgs").await;
    let other = other_process(&database).await;
    assert!(other.cancel(id).await.unwrap());
    // The waiter wakes at once, before the attempt ends.
    let error = in_time(waiting).await.unwrap().unwrap_err();
    assert!(error.is_cancelled(), "{error:?}");
    gate.add_permits(10);
    passing(&database, Duration::from_millis(1500)).await;
    assert_eq!(server.count(), 1);
    assert_eq!(final_status(&durable, id).await, Status::Cancelled);
}

#[tokio::test]
async fn another_process_cancels_a_request_between_attempts() {
    let database = migrated().await;
    let server = Server::always(503).await;
    let durable = Durable::new(database.pool().clone());
    let soon = RetryPolicy::constant(Duration::from_secs(2));
    let waiting = tokio::spawn({
        let request = post(server.url("/"), "x").with(Options::default().retry(soon));
        let durable = durable.clone();
        async move { durable.await_response(request).await }
    });
    // The request waits for its retry. The retry may begin before the cancellation.
    eventually_rows(&database, "mq_msgs WHERE state = 'held'", 1).await;
    let id = only_id(&database, "mq_msgs").await;
    let other = other_process(&database).await;
    assert!(other.cancel(id).await.unwrap());
    let sent = server.count();
    let error = in_time(waiting).await.unwrap().unwrap_err();
    assert!(error.is_cancelled(), "{error:?}");
    passing(&database, Duration::from_secs(3)).await;
    assert!(server.count() <= sent + 1, "{} {sent}", server.count());
}

#[tokio::test]
async fn an_unknown_request_cannot_be_cancelled() {
    let database = migrated().await;
    let durable = Durable::new(database.pool().clone());
    let error = durable
        .cancel(RequestId::from(Uuid::nil()))
        .await
        .unwrap_err();
    assert!(error.is_unknown_id(), "{error:?}");
}

#[tokio::test]
async fn a_deadline_ends_a_request_that_was_never_attempted() {
    let database = migrated().await;
    let server = Server::always(200).await;
    // No runner delivers the channel of the request. The runner of another channel ends it.
    let durable = Durable::new(database.pool().clone());
    let options = Options::default()
        .channel("undelivered")
        .deadline(Duration::from_millis(500));
    let id = durable
        .fire(post(server.url("/"), "x").with(options))
        .await
        .unwrap();
    let error = in_time(durable.response(id)).await.unwrap_err();
    assert!(error.is_discarded(), "{error:?}");
    assert!(error.to_string().contains("deadline"), "{error}");
    assert_eq!(error.attempts(), Some(0));
    assert_eq!(durable.status(id).await.unwrap(), Some(Status::Discarded));
    assert_eq!(server.count(), 0);
}

#[tokio::test]
async fn a_retry_after_the_deadline_is_not_waited_for() {
    let database = migrated().await;
    let server = Server::always(503).await;
    let durable = Durable::new(database.pool().clone());
    let options = Options::default()
        .retry(RetryPolicy::constant(Duration::from_secs(3600)))
        .deadline(Duration::from_millis(1));
    let response = in_time(durable.await_response(post(server.url("/"), "x").with(options))).await;
    match response {
        Ok(response) => assert_eq!(response.status(), 503),
        Err(error) => assert!(error.is_discarded(), "{error:?}"),
    }
}

#[tokio::test]
async fn a_deadline_lets_an_attempt_in_flight_finish() {
    let database = migrated().await;
    let (server, gate) = Server::held(200).await;
    let durable = Durable::new(database.pool().clone());
    let options = Options::default().deadline(Duration::from_millis(300));
    let id = durable
        .fire(post(server.url("/"), "x").with(options))
        .await
        .unwrap();
    server.wait_for(1).await;
    passing(&database, Duration::from_secs(1)).await;
    assert_eq!(durable.status(id).await.unwrap(), Some(Status::Running));
    gate.add_permits(1);
    assert_eq!(final_status(&durable, id).await, Status::Completed);
}

fn ordered(server: &Server, path: &str, halts: bool) -> Request {
    let options = Options::default().ordered("k").retry(RetryPolicy::none());
    let options = if halts {
        options.halt_on_discard()
    } else {
        options
    };
    post(server.url(path), "x").with(options)
}

/// Answers requests for `/bad` with 503.
async fn refusing_server() -> Server {
    Server::start(
        |_, seen| async move { reply(if seen.uri.path() == "/bad" { 503 } else { 200 }, "") },
    )
    .await
}

#[tokio::test]
async fn a_discarded_head_is_skipped_by_default() {
    let database = migrated().await;
    let server = refusing_server().await;
    let durable = Durable::new(database.pool().clone());
    let bad = durable.fire(ordered(&server, "/bad", false)).await.unwrap();
    let next = durable.fire(ordered(&server, "/", false)).await.unwrap();
    assert_eq!(final_status(&durable, bad).await, Status::Discarded);
    assert_eq!(final_status(&durable, next).await, Status::Completed);
}

#[tokio::test]
async fn halt_on_discard_halts_the_key_of_a_discarded_head() {
    let database = migrated().await;
    let server = refusing_server().await;
    let durable = Durable::new(database.pool().clone());
    let bad = durable.fire(ordered(&server, "/bad", true)).await.unwrap();
    let next = durable.fire(ordered(&server, "/", true)).await.unwrap();
    let other = Options::default().ordered("other").halt_on_discard();
    let other = durable
        .fire(post(server.url("/"), "x").with(other))
        .await
        .unwrap();
    assert_eq!(final_status(&durable, bad).await, Status::Discarded);
    assert_eq!(final_status(&durable, other).await, Status::Completed);
    passing(&database, Duration::from_millis(1500)).await;
    assert_eq!(durable.status(next).await.unwrap(), Some(Status::Available));
    // A request behind the halted one can be cancelled.
    assert!(durable.cancel(next).await.unwrap());
    assert_eq!(rows(&database, "mq_msgs WHERE state = 'halted'").await, 1);
}

#[tokio::test]
async fn a_missed_deadline_halts_its_key() {
    let database = migrated().await;
    let server = refusing_server().await;
    let durable = Durable::new(database.pool().clone());
    let late = Options::default()
        .ordered("k")
        .halt_on_discard()
        .delay(Duration::from_millis(400))
        .deadline(Duration::from_millis(500));
    // The request misses its deadline because it waits behind another request.
    let (slow, gate) = Server::held(200).await;
    let head = post(slow.url("/"), "x").with(Options::default().ordered("k"));
    let head = durable.fire(head).await.unwrap();
    let late = durable
        .fire(post(server.url("/"), "x").with(late))
        .await
        .unwrap();
    let next = durable.fire(ordered(&server, "/", false)).await.unwrap();
    assert_eq!(final_status(&durable, late).await, Status::Discarded);
    gate.add_permits(1);
    assert_eq!(final_status(&durable, head).await, Status::Completed);
    passing(&database, Duration::from_millis(1500)).await;
    assert_eq!(durable.status(next).await.unwrap(), Some(Status::Available));
    assert_eq!(server.count(), 0);
}
