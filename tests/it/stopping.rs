//! Polls that are in flight when a runner stops. The requests that they claim go back to the queue
//! at once.

use std::time::{Duration, Instant};

use requeuest::testkit::TestDatabase;
use requeuest::{Channels, Client, Durable, RequestId, Status};
use sqlx::{Connection, Postgres, Transaction};

use crate::support::{
    LONG, Server, builder, count, eventually, in_time, migrated, outcome_of, post, rows,
};

/// Longer than a test takes, so that a request that stays leased fails the test.
const LEASE: Duration = Duration::from_secs(300);

fn serving(database: &TestDatabase) -> Durable {
    builder(database).lease(LEASE).build().unwrap()
}

/// A poll that waits for a lock in the database, and the request that the poll will claim.
struct Held {
    server: Server,
    id: RequestId,
    /// Holds up the poll until it commits.
    lock: Transaction<'static, Postgres>,
}

impl Held {
    /// Waits until the runner polls, and holds up that poll.
    async fn poll_of(durable: &Durable, database: &TestDatabase) -> Self {
        let server = Server::always(200).await;
        let patient = "ALTER FUNCTION requeuest.mq_poll SET lock_timeout = 0";
        sqlx::query(patient).execute(database.pool()).await.unwrap();
        let mut lock = database.pool().begin().await.unwrap();
        sqlx::query("LOCK TABLE requeuest.mq_msgs")
            .execute(&mut *lock)
            .await
            .unwrap();
        let request = post(server.url("/"), "");
        let id = durable.fire_in(&mut *lock, request).await.unwrap();
        // A poll claims requests that were due when it began.
        sqlx::query("UPDATE requeuest.mq_msgs SET attempt_at = now() - INTERVAL '1 minute'")
            .execute(&mut *lock)
            .await
            .unwrap();
        eventually("a poll waits", || poll_waits(database)).await;
        Self { server, id, lock }
    }

    /// Waits until the shutdown has begun.
    async fn shutdown_of(&mut self, durable: &Durable) {
        let deadline = Instant::now() + LONG;
        loop {
            // The transaction rolls back a request that is still accepted.
            let mut tx = self.lock.begin().await.unwrap();
            let request = post(self.server.url("/"), "late");
            match durable.fire_in(&mut *tx, request).await {
                Ok(_) => assert!(Instant::now() < deadline, "requests are still taken"),
                Err(error) => return assert!(error.is_closed(), "{error}"),
            }
        }
    }

    /// Lets the poll continue.
    async fn release(self) -> (Server, RequestId) {
        self.lock.commit().await.unwrap();
        (self.server, self.id)
    }
}

/// Whether a poll waits for the lock.
async fn poll_waits(database: &TestDatabase) -> bool {
    let waiting = "SELECT count(*) FROM pg_stat_activity
                   WHERE datname = current_database() AND wait_event_type = 'Lock'
                   AND query LIKE 'SELECT * FROM mq_poll%'";
    count(database, waiting).await == 1
}

/// Whether the request was claimed, and is back in the queue with no attempt counted.
async fn is_released(database: &TestDatabase) -> bool {
    let back = "mq_msgs WHERE claim_no > 1 AND state = 'waiting' AND attempts = 0
                AND attempt_at <= clock_timestamp()";
    rows(database, back).await == 1
}

/// Another handle can claim the request at once and delivers it with the first attempt.
async fn assert_deliverable(database: &TestDatabase, held: (Server, RequestId)) {
    let (server, id) = held;
    assert_eq!(server.count(), 0);
    let other = serving(database);
    let outcome = outcome_of(&other, id).await;
    assert_eq!(outcome.status(), Status::Completed);
    assert_eq!(server.count(), 1);
}

#[tokio::test]
async fn a_poll_that_outlives_the_handles_releases_its_claims() {
    let database = migrated().await;
    let durable = serving(&database);
    let held = Held::poll_of(&durable, &database).await;
    drop(durable);
    let held = held.release().await;
    eventually("the request is released", || is_released(&database)).await;
    assert_deliverable(&database, held).await;
}

#[tokio::test]
async fn a_poll_that_outlives_its_listener_releases_its_claims() {
    let database = migrated().await;
    let mut client = Client::new(database.pool().clone(), Channels::All)
        .await
        .unwrap();
    let held = Held::poll_of(client.durable(), &database).await;
    drop(client.take_listener());
    let held = held.release().await;
    eventually("the request is released", || is_released(&database)).await;
    assert_deliverable(&database, held).await;
}

#[tokio::test]
async fn a_poll_that_outlives_an_aborted_listener_releases_its_claims() {
    let database = migrated().await;
    let mut client = Client::new(database.pool().clone(), Channels::All)
        .await
        .unwrap();
    let held = Held::poll_of(client.durable(), &database).await;
    let mut listener = client.take_listener().unwrap();
    listener.abort();
    let ended = in_time(&mut listener).await;
    assert!(ended.is_err_and(|error| error.is_cancelled()));
    let held = held.release().await;
    eventually("the request is released", || is_released(&database)).await;
    assert_deliverable(&database, held).await;
}

#[tokio::test]
async fn a_shutdown_releases_the_claims_of_a_poll_in_flight() {
    let database = migrated().await;
    let durable = serving(&database);
    let mut held = Held::poll_of(&durable, &database).await;
    let shutdown = tokio::spawn({
        let durable = durable.clone();
        async move { durable.shutdown(Duration::ZERO).await }
    });
    held.shutdown_of(&durable).await;
    let held = held.release().await;
    in_time(shutdown).await.unwrap().unwrap();
    assert!(is_released(&database).await);
    assert_deliverable(&database, held).await;
}

#[tokio::test]
async fn a_shutdown_waits_for_the_poll_of_a_listener() {
    let database = migrated().await;
    let mut client = Client::new(database.pool().clone(), Channels::All)
        .await
        .unwrap();
    let durable = client.durable().clone();
    let _listener = client.take_listener();
    let mut held = Held::poll_of(&durable, &database).await;
    let shutdown = tokio::spawn({
        let durable = durable.clone();
        async move { durable.shutdown(LONG).await }
    });
    held.shutdown_of(&durable).await;
    let held = held.release().await;
    in_time(shutdown).await.unwrap().unwrap();
    assert!(is_released(&database).await);
    assert_deliverable(&database, held).await;
}
