//! The listener: the handle of a client's background delivery.

use std::time::Duration;

use futures_util::FutureExt;
use requeuest::client::Listener;
use requeuest::retry::RetryPolicy;
use requeuest::testkit::{self, TestDatabase};
use requeuest::{Channels, Client, Options, Status};
use sqlx::postgres::PgPoolOptions;
use tokio::runtime::Runtime;

use super::{bodies, enqueue_only, outcome, serving_all};
use crate::support::{
    LONG, Server, eventually, eventually_rows, in_time, migrated, passing, post, rows,
};

#[tokio::test]
async fn dropping_the_client_stops_its_delivery() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let client = serving_all(&database).await;
    let id = client
        .spawn("c", &post(server.url("/"), "before"))
        .await
        .unwrap();
    outcome(&client, id).await;
    // Other handles don't keep the runner alive.
    let durable = client.durable().clone();
    drop(client);

    let id = durable.fire(post(server.url("/"), "after")).await.unwrap();
    passing(&database, Duration::from_millis(1500)).await;
    assert_eq!(durable.status(id).await.unwrap(), Some(Status::Available));
    assert_eq!(bodies(&server), ["before"]);
}

#[tokio::test]
async fn the_listener_keeps_delivering_without_the_client() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let durable = enqueue_only(&database);
    let mut client = serving_all(&database).await;
    assert!(!client.is_detached());
    let listener = client.take_listener().unwrap();
    assert!(client.is_detached());
    assert!(client.take_listener().is_none());
    let id = client
        .spawn("c", &post(server.url("/"), "with"))
        .await
        .unwrap();
    outcome(&client, id).await;

    drop(client);
    let id = durable
        .fire(post(server.url("/"), "without"))
        .await
        .unwrap();
    testkit::outcome(&durable, id, LONG).await.unwrap();
    drop(listener);
    let id = durable.fire(post(server.url("/"), "never")).await.unwrap();
    passing(&database, Duration::from_millis(1500)).await;
    assert_eq!(durable.status(id).await.unwrap(), Some(Status::Available));
    assert_eq!(bodies(&server), ["with", "without"]);
}

#[tokio::test]
async fn a_client_without_its_listener_still_spawns_and_waits() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let mut client = serving_all(&database).await;
    drop(client.take_listener());
    let request = post(server.url("/"), "x");
    let waiting = client.spawn_returning("c", &request);
    let serving = async {
        eventually("the request is persisted", || async {
            rows(&database, "mq_msgs").await == 1
        })
        .await;
        serving_all(&database).await
    };
    let (response, _serving) = in_time(futures_util::future::join(waiting, serving)).await;
    assert_eq!(response.unwrap().status(), 200);
}

/// A client that delivers all channels, and its listener.
async fn parted(database: &TestDatabase) -> (Client, Listener) {
    let mut client = serving_all(database).await;
    let listener = client.take_listener().unwrap();
    (client, listener)
}

/// Waits until this process claims no request.
async fn claiming_ends(client: &Client, server: &Server) {
    eventually("a new request stays in the queue", || async {
        let request = post(server.url("/"), "late");
        let id = client.spawn("c", &request).await.unwrap();
        let status = client.durable().status(id.into()).await.unwrap();
        status == Some(Status::Available)
    })
    .await;
}

#[tokio::test]
async fn stopping_waits_for_the_attempts_in_flight() {
    let database = migrated().await;
    let (server, answers) = Server::held(200).await;
    let (client, listener) = parted(&database).await;
    let request = post(server.url("/"), "early");
    let id = client.spawn("c", &request).await.unwrap();
    server.wait_for(1).await;

    let stopping = tokio::spawn(listener.stop());
    claiming_ends(&client, &server).await;
    assert!(!stopping.is_finished());
    answers.add_permits(1000);
    in_time(stopping).await.unwrap().unwrap();
    // What was in flight is recorded.
    let status = client.durable().status(id.into()).await.unwrap();
    assert_eq!(status, Some(Status::Completed));
    assert_eq!(rows(&database, "mq_msgs WHERE state <> 'waiting'").await, 0);
}

#[tokio::test]
async fn a_stopped_listener_leaves_held_retries_to_other_clients() {
    let database = migrated().await;
    let server = Server::in_turn(&[503, 200]).await;
    let (client, listener) = parted(&database).await;
    let minute = RetryPolicy::constant(Duration::from_secs(60));
    let request = post(server.url("/"), "x").with(Options::default().retry(minute));
    let calling = tokio::spawn(async move { client.spawn_returning("c", &request).await });
    eventually_rows(&database, "mq_msgs WHERE state = 'held'", 1).await;

    in_time(listener.stop()).await.unwrap();
    // In the queue, with its backoff. The caller still waits.
    let queued = "mq_msgs WHERE state = 'waiting' AND attempts = 1
                  AND attempt_at > now() + INTERVAL '30 seconds'";
    assert_eq!(rows(&database, queued).await, 1);
    assert!(!calling.is_finished());
    sqlx::query("UPDATE requeuest.mq_msgs SET attempt_at = now()")
        .execute(database.pool())
        .await
        .unwrap();
    let _other = serving_all(&database).await;
    let response = in_time(calling).await.unwrap().unwrap();
    assert_eq!(response.status(), 200);
    assert_eq!(server.count(), 2);
}

#[tokio::test]
async fn an_aborted_listener_ends_at_once_and_cuts_no_attempt_off() {
    let database = migrated().await;
    let (server, answers) = Server::held(200).await;
    let (client, mut listener) = parted(&database).await;
    let request = post(server.url("/"), "x");
    let id = client.spawn("c", &request).await.unwrap();
    server.wait_for(1).await;
    assert!((&mut listener).now_or_never().is_none());
    assert!(!listener.is_finished());

    listener.abort();
    let error = in_time(&mut listener).await.unwrap_err();
    assert!(error.is_cancelled(), "{error}");
    assert!(listener.is_finished());
    let request = post(server.url("/"), "late");
    let late = client.spawn("c", &request).await.unwrap();

    answers.add_permits(1);
    assert_eq!(outcome(&client, id).await.status(), Status::Completed);
    passing(&database, Duration::from_millis(1500)).await;
    let status = client.durable().status(late.into()).await.unwrap();
    assert_eq!(status, Some(Status::Available));
    assert_eq!(bodies(&server), ["x"]);
}

#[tokio::test]
async fn a_listener_resolves_once_its_handle_has_shut_down() {
    let database = migrated().await;
    let (client, mut listener) = parted(&database).await;
    assert!((&mut listener).now_or_never().is_none());
    in_time(client.durable().shutdown(LONG)).await.unwrap();
    in_time(&mut listener).await.unwrap();
    assert!(listener.is_finished());
    // There is nothing left to stop or to keep.
    listener.abort();
    in_time(listener.stop()).await.unwrap();
}

#[tokio::test]
async fn a_listener_resolves_with_an_error_when_its_runtime_ends() {
    let database = migrated().await;
    let options = database.pool().connect_options();
    let runtime = Runtime::new().unwrap();
    let make = async move {
        let pool = PgPoolOptions::new().connect_with((*options).clone());
        let client = Client::new(pool.await.unwrap(), Channels::All);
        let mut client = client.await.unwrap();
        let listener = client.take_listener().unwrap();
        (client, listener)
    };
    let (_client, mut listener) = runtime.spawn(make).await.unwrap();
    assert!((&mut listener).now_or_never().is_none());
    runtime.shutdown_background();
    let error = in_time(&mut listener).await.unwrap_err();
    assert!(error.is_cancelled(), "{error}");
    let error = in_time(listener.stop()).await.unwrap_err();
    assert!(error.is_closed(), "{error}");
}

#[tokio::test]
async fn a_detached_listener_delivers_until_a_shutdown() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let enqueuing = enqueue_only(&database);
    let (client, listener) = parted(&database).await;
    let durable = client.durable().clone();
    listener.detach();
    drop(client);
    let request = post(server.url("/"), "x");
    let id = enqueuing.fire(&request).await.unwrap();
    testkit::outcome(&enqueuing, id, LONG).await.unwrap();

    in_time(durable.shutdown(LONG)).await.unwrap();
    let id = enqueuing.fire(&request).await.unwrap();
    passing(&database, Duration::from_millis(1500)).await;
    let status = enqueuing.status(id).await.unwrap();
    assert_eq!(status, Some(Status::Available));
    assert_eq!(server.count(), 1);
}
