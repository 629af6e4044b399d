//! Shutting down a handle: attempts in flight, requests that wait, and calls that come later.

use std::time::{Duration, Instant};

use requeuest::retry::RetryPolicy;
use requeuest::{Options, Status};

use crate::support::{
    LONG, Server, builder, eventually, eventually_rows, handle, in_time, migrated, other_process,
    post, rows,
};

#[tokio::test]
async fn a_shutdown_lets_attempts_in_flight_finish() {
    let database = migrated().await;
    let (server, answer) = Server::held(200).await;
    let durable = handle(&database);
    let caller = tokio::spawn({
        let (durable, request) = (durable.clone(), post(server.url("/"), "x"));
        async move { durable.await_response(request).await }
    });
    server.wait_for(1).await;
    let shutdown = tokio::spawn({
        let durable = durable.clone();
        async move { durable.shutdown(LONG).await }
    });
    eventually("new requests are refused", || async {
        // The transaction rolls back a request that is still accepted.
        let mut tx = database.pool().begin().await.unwrap();
        let refused = durable.fire_in(&mut *tx, post(server.url("/"), "late"));
        refused.await.is_err_and(|error| error.is_closed())
    })
    .await;
    assert!(!shutdown.is_finished());
    answer.add_permits(1);
    let response = in_time(caller).await.unwrap().unwrap();
    assert_eq!(response.text().unwrap(), "x");
    in_time(shutdown).await.unwrap().unwrap();
    let completed = "outcomes WHERE status = 'completed'";
    assert_eq!(rows(&database, completed).await, 1);
}

#[tokio::test]
async fn a_shutdown_returns_unfinished_requests_to_the_queue() {
    let database = migrated().await;
    let (server, _never) = Server::held(200).await;
    let durable = handle(&database);
    let id = durable.fire(post(server.url("/"), "x")).await.unwrap();
    server.wait_for(1).await;
    in_time(durable.shutdown(Duration::ZERO)).await.unwrap();
    let there = other_process(&database).await;
    // The request may have arrived, so this counts as a failed attempt. Its retry delay is random
    // and may already be over.
    let failed = "attempts WHERE error_class = 'abandoned'";
    assert_eq!(rows(&database, failed).await, 1);
    let status = there.status(id).await.unwrap().unwrap();
    assert!(
        [Status::Retryable, Status::Available].contains(&status),
        "{status}"
    );
    assert!(!database.pool().is_closed());

    let other = handle(&database);
    server.wait_for(2).await;
    drop(other);
}

#[tokio::test]
async fn a_shutdown_does_not_wait_for_the_next_attempt() {
    let database = migrated().await;
    let server = Server::in_turn(&[503, 200]).await;
    let minute = Duration::from_secs(60);
    let durable = builder(&database)
        .retry(RetryPolicy::constant(minute))
        .build()
        .unwrap();
    let caller = tokio::spawn({
        let (durable, request) = (durable.clone(), post(server.url("/"), "x"));
        async move { durable.await_response(request).await }
    });
    server.wait_for(1).await;
    // The request waits for its retry.
    eventually_rows(&database, "attempts", 1).await;
    let began = Instant::now();
    in_time(durable.shutdown(LONG)).await.unwrap();
    assert!(
        began.elapsed() < Duration::from_secs(5),
        "{:?}",
        began.elapsed()
    );
    assert!(in_time(caller).await.unwrap().unwrap_err().is_closed());
    // The request is back in the queue and keeps its backoff.
    let queued = "mq_msgs WHERE state = 'waiting' AND attempts = 1
                  AND attempt_at < now() + INTERVAL '1 minute'";
    assert_eq!(rows(&database, queued).await, 1);
    assert_eq!(server.count(), 1);
}

#[tokio::test]
async fn a_shutdown_ends_waiting_callers_and_refuses_new_calls() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let durable = handle(&database);
    let later = post(server.url("/"), "x").with(Options::default().delay(LONG));
    let id = durable.fire(&later).await.unwrap();
    let waiting = tokio::spawn({
        let durable = durable.clone();
        async move { durable.response(id).await }
    });
    let calling = tokio::spawn({
        let durable = durable.clone();
        async move { durable.await_response(later).await }
    });
    // Both calls wait.
    eventually_rows(&database, "mq_msgs WHERE waiter IS NOT NULL", 2).await;
    in_time(durable.shutdown(LONG)).await.unwrap();
    assert!(in_time(waiting).await.unwrap().unwrap_err().is_closed());
    assert!(in_time(calling).await.unwrap().unwrap_err().is_closed());

    let request = post(server.url("/"), "late");
    assert!(durable.fire(&request).await.unwrap_err().is_closed());
    assert!(
        durable
            .await_response(&request)
            .await
            .unwrap_err()
            .is_closed()
    );
    assert!(durable.response(id).await.unwrap_err().is_closed());
    assert!(durable.status(id).await.unwrap_err().is_closed());
    let inside = durable.fire_in(database.pool(), &request).await;
    assert!(inside.unwrap_err().is_closed());
    // A second shutdown is harmless.
    in_time(durable.shutdown(LONG)).await.unwrap();

    let there = other_process(&database).await;
    assert_eq!(there.status(id).await.unwrap(), Some(Status::Scheduled));
    assert_eq!(server.count(), 0);
}
