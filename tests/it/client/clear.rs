//! The older crate's `clear`, which cancels the requests of channels.

use std::sync::Arc;
use std::time::{Duration, Instant};

use requeuest::testkit::TestDatabase;
use requeuest::{Channels, RequestId, Status, Uuid};

use super::{enqueue_only, serving_all};
use crate::support::{LONG, Server, eventually, in_time, migrated, passing, post, rows};

/// Waits until the channel has a request, and returns its id.
async fn id_in(database: &TestDatabase, channel: &str) -> RequestId {
    let ids = || {
        sqlx::query_scalar::<_, Uuid>("SELECT id FROM requeuest.mq_msgs WHERE channel_name = $1")
            .bind(channel)
            .fetch_optional(database.pool())
    };
    eventually("the request is persisted", || async {
        ids().await.unwrap().is_some()
    })
    .await;
    ids().await.unwrap().unwrap().into()
}

#[tokio::test]
async fn clearing_cancels_waiting_requests_and_tells_callers() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let client = Arc::new(serving_all(&database).await);
    let waiting = |channel: &'static str| {
        let (client, request) = (Arc::clone(&client), post(server.url("/"), channel));
        tokio::spawn(async move {
            let hour = Duration::from_secs(3600);
            let delayed = client.spawn_returning_cfg(channel, &request, |job| {
                job.set_delay(hour);
            });
            delayed.await
        })
    };
    let (a, b) = (waiting("a"), waiting("b"));
    let (a_id, b_id) = (id_in(&database, "a").await, id_in(&database, "b").await);

    client.clear(Channels::List(&[])).await.unwrap();
    client.clear(Channels::List(&["a", "none"])).await.unwrap();
    let error = in_time(a).await.unwrap().unwrap_err();
    assert!(error.is_cancelled(), "{error}");
    assert_eq!(error.request_id(), Some(a_id));
    let status = |id| client.durable().status(id);
    assert_eq!(status(a_id).await.unwrap(), Some(Status::Cancelled));
    assert_eq!(status(b_id).await.unwrap(), Some(Status::Scheduled));
    assert!(!b.is_finished());

    client.clear(Channels::All).await.unwrap();
    assert!(in_time(b).await.unwrap().unwrap_err().is_cancelled());
    assert_eq!(rows(&database, "mq_payloads").await, 0);
    assert_eq!(server.count(), 0);
}

#[tokio::test]
async fn clearing_tells_callers_between_two_attempts() {
    let database = migrated().await;
    let server = Server::always(503).await;
    let client = Arc::new(serving_all(&database).await);
    let caller = tokio::spawn({
        let (client, request) = (Arc::clone(&client), post(server.url("/"), "x"));
        async move {
            let minute = Duration::from_secs(60);
            let slow = client.spawn_returning_cfg("c", &request, |job| {
                job.set_retry_backoff(minute);
            });
            slow.await
        }
    });
    let id = id_in(&database, "c").await;
    eventually("the request waits for its retry", || async {
        client.durable().status(id).await.unwrap() == Some(Status::Retryable)
    })
    .await;
    let began = Instant::now();
    client.clear(Channels::All).await.unwrap();
    assert!(in_time(caller).await.unwrap().unwrap_err().is_cancelled());
    assert!(
        began.elapsed() < Duration::from_secs(3),
        "{:?}",
        began.elapsed()
    );
}

#[tokio::test]
async fn a_request_cleared_between_attempts_is_not_sent_again() {
    let database = migrated().await;
    let server = Server::always(503).await;
    let client = Arc::new(serving_all(&database).await);
    let bound = Duration::from_secs(2);
    let caller = tokio::spawn({
        let (client, request) = (Arc::clone(&client), post(server.url("/"), "x"));
        async move {
            let slow = client.spawn_returning_cfg("c", &request, |job| {
                job.set_retry_backoff(bound);
            });
            slow.await
        }
    });
    let id = id_in(&database, "c").await;
    eventually("the request waits for its retry", || async {
        client.durable().status(id).await.unwrap() == Some(Status::Retryable)
    })
    .await;
    client.clear(Channels::All).await.unwrap();
    assert!(in_time(caller).await.unwrap().unwrap_err().is_cancelled());
    // An attempt that had just begun has arrived by then.
    passing(&database, Duration::from_millis(200)).await;
    let arrived = server.count();
    passing(&database, bound).await;
    assert_eq!(server.count(), arrived);
}

#[tokio::test]
async fn clearing_ends_a_request_in_flight_whatever_its_answer() {
    let database = migrated().await;
    let (server, gate) = Server::held(200).await;
    let client = Arc::new(serving_all(&database).await);
    let caller = tokio::spawn({
        let (client, request) = (Arc::clone(&client), post(server.url("/"), "x"));
        async move { client.spawn_returning("c", &request).await }
    });
    server.wait_for(1).await;
    let id = id_in(&database, "c").await;
    let began = Instant::now();
    client.clear(Channels::All).await.unwrap();
    assert!(in_time(caller).await.unwrap().unwrap_err().is_cancelled());
    assert!(
        began.elapsed() < Duration::from_secs(5),
        "{:?}",
        began.elapsed()
    );
    gate.add_permits(1);
    // Once that attempt is over, the handle has no work left.
    in_time(client.durable().shutdown(LONG)).await.unwrap();
    let status = enqueue_only(&database).status(id).await.unwrap();
    assert_eq!(status, Some(Status::Cancelled));
}
