//! Requests that end without an answer: cancelled, or past their deadline; and what that means for their ordering key.

use std::time::Duration;

use requeuest::retry::RetryPolicy;
use requeuest::{Durable, Options, Request, RequestId, Status, testkit};
use sqlx::PgPool;

use crate::support::{LONG, Server, count, eventually, in_time, migrated, passing, quick, reply};

const HOUR: Duration = Duration::from_secs(3600);

fn post(url: &str, options: Options) -> Request {
    let request = http::Request::post(url).body("x").unwrap();
    Request::try_from(request).unwrap().with(options)
}

async fn ended(durable: &Durable, id: RequestId) -> Status {
    testkit::outcome(durable, id, LONG).await.unwrap().status()
}

/// As good as another process: with a pool of its own, and without a runner.
async fn elsewhere(url: &str) -> Durable {
    let pool = PgPool::connect(url).await.unwrap();
    Durable::builder(pool).runner(false).build().unwrap()
}

#[tokio::test]
async fn a_cancelled_request_that_waits_is_never_sent() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let durable = Durable::new(database.pool().clone());
    let delayed = post(
        &server.url("/"),
        Options::default().delay(Duration::from_secs(1)),
    );
    let id = durable.fire(delayed).await.unwrap();
    assert!(durable.cancel(id).await.unwrap());
    assert_eq!(durable.status(id).await.unwrap(), Some(Status::Cancelled));
    let error = durable.response(id).await.unwrap_err();
    assert!(error.is_cancelled() && !error.is_superseded(), "{error:?}");
    // It ended already.
    assert!(!durable.cancel(id).await.unwrap());
    passing(&database, Duration::from_millis(1500)).await;
    assert_eq!(server.count(), 0);
}

#[tokio::test]
async fn a_request_in_flight_is_cancelled_from_elsewhere() {
    let database = migrated().await;
    let (server, gate) = Server::held(503).await;
    let durable = Durable::builder(database.pool().clone())
        .retry(quick())
        .build()
        .unwrap();
    let waiting = tokio::spawn({
        let (durable, request) = (durable.clone(), post(&server.url("/"), Options::default()));
        async move { durable.await_response(request).await }
    });
    server.wait_for(1).await;
    let id: requeuest::Uuid = sqlx::query_scalar("select id from requeuest.mq_msgs")
        .fetch_one(database.pool())
        .await
        .unwrap();
    let other = elsewhere(database.url()).await;
    assert!(other.cancel(id.into()).await.unwrap());
    // The waiter is told at once, not when the attempt ends.
    let error = in_time(waiting).await.unwrap().unwrap_err();
    assert!(error.is_cancelled(), "{error:?}");
    gate.add_permits(10);
    passing(&database, Duration::from_millis(1500)).await;
    assert_eq!(server.count(), 1);
    assert_eq!(ended(&durable, id.into()).await, Status::Cancelled);
}

#[tokio::test]
async fn a_request_between_two_attempts_is_cancelled_from_elsewhere() {
    let database = migrated().await;
    let server = Server::always(503).await;
    let durable = Durable::new(database.pool().clone());
    let soon = RetryPolicy::constant(Duration::from_secs(2));
    let waiting = tokio::spawn({
        let request = post(&server.url("/"), Options::default().retry(soon));
        let durable = durable.clone();
        async move { durable.await_response(request).await }
    });
    let held = || {
        sqlx::query_scalar::<_, requeuest::Uuid>("select id from requeuest.mq_msgs where state = 2")
            .fetch_optional(database.pool())
    };
    eventually("it is held", || async { held().await.unwrap().is_some() }).await;
    let id = held().await.unwrap();
    // It may have gone on in between: then it is found as such.
    let id = RequestId::from(id.unwrap());
    let other = elsewhere(database.url()).await;
    assert!(other.cancel(id).await.unwrap());
    let sent = server.count();
    let error = in_time(waiting).await.unwrap().unwrap_err();
    assert!(error.is_cancelled(), "{error:?}");
    passing(&database, Duration::from_secs(3)).await;
    assert!(server.count() <= sent + 1, "{} {sent}", server.count());
}

#[tokio::test]
async fn an_unknown_request_can_not_be_cancelled() {
    let database = migrated().await;
    let durable = Durable::new(database.pool().clone());
    let error = durable
        .cancel(RequestId::from(requeuest::Uuid::nil()))
        .await
        .unwrap_err();
    assert!(error.is_unknown_id(), "{error:?}");
}

#[tokio::test]
async fn a_deadline_ends_a_request_that_nobody_got_round_to() {
    let database = migrated().await;
    let server = Server::always(200).await;
    // Nobody delivers its channel; a runner of another one looks after it all the same.
    let durable = Durable::new(database.pool().clone());
    let options = Options::default()
        .channel("nobody")
        .deadline(Duration::from_millis(500));
    let id = durable.fire(post(&server.url("/"), options)).await.unwrap();
    let error = in_time(durable.response(id)).await.unwrap_err();
    assert!(error.is_discarded(), "{error:?}");
    assert!(error.to_string().contains("deadline"), "{error}");
    assert_eq!(error.attempts(), Some(0));
    assert_eq!(durable.status(id).await.unwrap(), Some(Status::Discarded));
    assert_eq!(server.count(), 0);
}

#[tokio::test]
async fn no_attempt_is_waited_for_that_would_come_after_the_deadline() {
    let database = migrated().await;
    let server = Server::always(503).await;
    let durable = Durable::new(database.pool().clone());
    let options = Options::default()
        .retry(RetryPolicy::constant(HOUR))
        .deadline(Duration::from_millis(1));
    let response = in_time(durable.await_response(post(&server.url("/"), options))).await;
    match response {
        Ok(response) => assert_eq!(response.status(), 503),
        Err(error) => assert!(error.is_discarded(), "{error:?}"),
    }
}

#[tokio::test]
async fn a_deadline_lets_an_attempt_finish() {
    let database = migrated().await;
    let (server, gate) = Server::held(200).await;
    let durable = Durable::new(database.pool().clone());
    let options = Options::default().deadline(Duration::from_millis(300));
    let id = durable.fire(post(&server.url("/"), options)).await.unwrap();
    server.wait_for(1).await;
    passing(&database, Duration::from_secs(1)).await;
    assert_eq!(durable.status(id).await.unwrap(), Some(Status::Running));
    gate.add_permits(1);
    assert_eq!(ended(&durable, id).await, Status::Completed);
}

fn ordered(server: &Server, path: &str, halts: bool) -> Request {
    let options = Options::default().ordered("k").retry(RetryPolicy::none());
    let options = if halts {
        options.halt_on_discard()
    } else {
        options
    };
    post(&server.url(path), options)
}

/// Refuses what goes to `/bad`.
async fn choosy() -> Server {
    Server::start(
        |_, seen| async move { reply(if seen.uri.path() == "/bad" { 503 } else { 200 }, "") },
    )
    .await
}

#[tokio::test]
async fn a_discarded_head_is_skipped_by_default() {
    let database = migrated().await;
    let server = choosy().await;
    let durable = Durable::new(database.pool().clone());
    let bad = durable.fire(ordered(&server, "/bad", false)).await.unwrap();
    let next = durable.fire(ordered(&server, "/", false)).await.unwrap();
    assert_eq!(ended(&durable, bad).await, Status::Discarded);
    assert_eq!(ended(&durable, next).await, Status::Completed);
}

#[tokio::test]
async fn a_discarded_head_halts_its_key_if_it_is_to() {
    let database = migrated().await;
    let server = choosy().await;
    let durable = Durable::new(database.pool().clone());
    let bad = durable.fire(ordered(&server, "/bad", true)).await.unwrap();
    let next = durable.fire(ordered(&server, "/", true)).await.unwrap();
    let other = Options::default().ordered("other").halt_on_discard();
    let other = durable.fire(post(&server.url("/"), other)).await.unwrap();
    assert_eq!(ended(&durable, bad).await, Status::Discarded);
    assert_eq!(ended(&durable, other).await, Status::Completed);
    passing(&database, Duration::from_millis(1500)).await;
    assert_eq!(durable.status(next).await.unwrap(), Some(Status::Available));
    // What ends without having been sent does so behind the halted one too.
    assert!(durable.cancel(next).await.unwrap());
    let halting = "select count(*) from requeuest.mq_msgs where state = 3";
    assert_eq!(count(&database, halting).await, 1);
}

#[tokio::test]
async fn a_deadline_halts_its_key_too() {
    let database = migrated().await;
    let server = choosy().await;
    let durable = Durable::new(database.pool().clone());
    let late = Options::default()
        .ordered("k")
        .halt_on_discard()
        .delay(Duration::from_millis(400))
        .deadline(Duration::from_millis(500));
    // Nobody sends it in time: it is behind another one.
    let (slow, gate) = Server::held(200).await;
    let head = post(&slow.url("/"), Options::default().ordered("k"));
    let head = durable.fire(head).await.unwrap();
    let late = durable.fire(post(&server.url("/"), late)).await.unwrap();
    let next = durable.fire(ordered(&server, "/", false)).await.unwrap();
    assert_eq!(ended(&durable, late).await, Status::Discarded);
    gate.add_permits(1);
    assert_eq!(ended(&durable, head).await, Status::Completed);
    passing(&database, Duration::from_millis(1500)).await;
    assert_eq!(durable.status(next).await.unwrap(), Some(Status::Available));
    assert_eq!(server.count(), 0);
}
