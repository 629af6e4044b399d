//! Waiting for a request, and reading its status, through handles in other processes.

use std::sync::Arc;
use std::time::{Duration, Instant};

use requeuest::retry::RetryPolicy;
use requeuest::testkit::TestDatabase;
use requeuest::{Options, RequestId, Status};
use tokio::sync::Notify;

use crate::support::{
    Server, builder, count, eventually, eventually_rows, handle, in_time, migrated, only_id,
    other_process, post, reply, rows,
};

#[tokio::test]
async fn another_process_awaits_and_rereads_a_response() {
    let database = migrated().await;
    let (server, answer) = Server::held(200).await;
    let here = handle(&database);
    let there = other_process(&database).await;
    let id = here.fire(post(server.url("/"), "hello")).await.unwrap();
    server.wait_for(1).await;
    let waiting = tokio::spawn({
        let there = there.clone();
        async move { there.response(id).await }
    });
    let also_here = tokio::spawn(async move { here.response(id).await });
    other_process_waits(&database).await;
    assert!(!waiting.is_finished());
    answer.add_permits(1);
    for waiting in [waiting, also_here] {
        let response = in_time(waiting).await.unwrap().unwrap();
        assert_eq!(response.text().unwrap(), "hello");
    }
    let again = there.response(id).await.unwrap();
    assert_eq!(again.text().unwrap(), "hello");
    assert_eq!(again.id(), id);

    let unknown: RequestId = uuid::Uuid::now_v7().into();
    let error = there.response(unknown).await.unwrap_err();
    assert!(error.is_unknown_id());
    assert_eq!(error.request_id(), Some(unknown));
    assert_eq!(there.status(unknown).await.unwrap(), None);
}

/// Waits until another process listens for the outcome.
async fn other_process_waits(database: &TestDatabase) {
    eventually("another process listens", || async {
        let listening = "SELECT count(*) FROM pg_stat_activity
            WHERE datname = current_database() AND state = 'idle'
            AND query ILIKE '%listen %requeuest_%'";
        count(database, listening).await > 0
    })
    .await;
    eventually("the request has a waiter", || async {
        rows(database, "mq_msgs WHERE waiter IS NOT NULL").await > 0
    })
    .await;
}

#[tokio::test]
async fn a_waiter_in_another_process_is_woken_without_polling() {
    let database = migrated().await;
    let (server, answer) = Server::held(200).await;
    let here = handle(&database);
    let there = other_process(&database).await;
    let mut took = Vec::new();
    for round in 1..=3 {
        let id = here.fire(post(server.url("/"), "x")).await.unwrap();
        server.wait_for(round).await;
        let waiting = tokio::spawn({
            let there = there.clone();
            async move { there.response(id).await.map(|_| Instant::now()) }
        });
        // The waiter has just polled. Its next poll is a second away.
        other_process_waits(&database).await;
        let answered = Instant::now();
        answer.add_permits(1);
        took.push(in_time(waiting).await.unwrap().unwrap() - answered);
    }
    took.sort_unstable();
    // The median, as one round may have hit a busy moment of the machine.
    assert!(took[1] < Duration::from_millis(500), "{took:?}");
}

#[tokio::test]
async fn a_caller_is_woken_by_another_handle_that_delivers() {
    let database = migrated().await;
    let server = Server::in_turn(&[503, 200]).await;
    let _runner = handle(&database);
    let there = other_process(&database).await;
    let request = post(server.url("/"), "x");
    let response = in_time(there.await_response(request)).await.unwrap();
    assert_eq!(response.status(), 200);
    assert_eq!(server.count(), 2);
}

#[tokio::test]
async fn another_process_sees_every_status_of_a_request() {
    let database = migrated().await;
    let go = Arc::new(Notify::new());
    let gate = Arc::clone(&go);
    let server = Server::start(move |number, _| {
        let gate = Arc::clone(&gate);
        async move {
            gate.notified().await;
            reply(if number == 0 { 503 } else { 200 }, "")
        }
    })
    .await;
    let there = other_process(&database).await;
    let day = Duration::from_secs(24 * 60 * 60);
    let options = Options::default()
        .delay(day)
        .retry(RetryPolicy::constant(day));
    let request = post(server.url("/"), "x").with(options);
    let id = there.fire(request).await.unwrap();
    let state = || async { there.status(id).await.unwrap().unwrap() };
    assert_eq!(state().await, Status::Scheduled);

    make_all_due(&database).await;
    assert_eq!(state().await, Status::Available);
    let _runner = handle(&database);
    server.wait_for(1).await;
    assert_eq!(state().await, Status::Running);
    go.notify_one();
    eventually("the attempt failed", || async {
        state().await == Status::Retryable
    })
    .await;
    make_all_due(&database).await;
    server.wait_for(2).await;
    assert_eq!(state().await, Status::Running);
    go.notify_one();
    let response = in_time(there.response(id)).await.unwrap();
    assert_eq!(response.status(), 200);
    assert_eq!(state().await, Status::Completed);
}

/// Makes every request due.
async fn make_all_due(database: &TestDatabase) {
    sqlx::query("UPDATE requeuest.mq_msgs SET attempt_at = now()")
        .execute(database.pool())
        .await
        .unwrap();
}

#[tokio::test]
async fn a_request_between_two_attempts_is_retryable() {
    let database = migrated().await;
    let server = Server::always(503).await;
    let durable = builder(&database)
        .retry(RetryPolicy::constant(Duration::from_secs(60)))
        .build()
        .unwrap();
    let there = other_process(&database).await;
    let caller = tokio::spawn({
        let request = post(server.url("/"), "x");
        async move { durable.await_response(request).await }
    });
    server.wait_for(1).await;
    let id = only_id(&database, "mq_msgs").await;
    eventually("the request waits for its retry", || async {
        there.status(id).await.unwrap() == Some(Status::Retryable)
    })
    .await;
    caller.abort();
}

#[tokio::test]
async fn many_waiters_in_another_process_get_their_own_response() {
    let database = migrated().await;
    let server = Server::echo().await;
    let caller = other_process(&database).await;
    let mut callers = tokio::task::JoinSet::new();
    for number in 0..250 {
        let durable = caller.clone();
        let request = post(server.url("/"), number.to_string());
        callers.spawn(async move { (number, durable.await_response(request).await.unwrap()) });
    }
    eventually_rows(&database, "mq_msgs", 250).await;
    // These are settled in a few batches, with more ids than one notification's payload can hold.
    let _runner = handle(&database);
    for (number, response) in in_time(callers.join_all()).await {
        assert_eq!(response.text().unwrap(), number.to_string());
    }
    assert_eq!(server.count(), 250);
}
