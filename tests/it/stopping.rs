//! The end of the claiming: what a poll brings that was in flight then goes back at once, for others.

use std::time::{Duration, Instant};

use http::Request;
use requeuest::testkit::{self, TestDatabase};
use requeuest::{Channels, Client, Durable, RequestId, Status};
use sqlx::{Connection, Postgres, Transaction};

use crate::support::{LONG, Server, count, eventually, in_time, migrated};

/// So long that what is left leased stays so until the test fails.
const LEASE: Duration = Duration::from_secs(300);

fn serving(database: &TestDatabase) -> Durable {
    Durable::builder(database.pool().clone())
        .lease(LEASE)
        .build()
        .unwrap()
}

/// A poll that waits in the database, and the request that it will claim when it goes on.
struct Held {
    server: Server,
    id: RequestId,
    /// Its commit lets the poll go on.
    lock: Transaction<'static, Postgres>,
}

impl Held {
    /// Waits until the runner polls, and holds it there.
    async fn poll_of(durable: &Durable, database: &TestDatabase) -> Self {
        let server = Server::always(200).await;
        let patient = "alter function requeuest.mq_poll set lock_timeout = 0";
        sqlx::query(patient).execute(database.pool()).await.unwrap();
        let mut lock = database.pool().begin().await.unwrap();
        sqlx::query("lock table requeuest.mq_msgs")
            .execute(&mut *lock)
            .await
            .unwrap();
        let request = Request::post(server.url("/")).body("").unwrap();
        let id = durable.fire_in(&mut *lock, request).await.unwrap();
        // A poll looks for what was due when it began.
        sqlx::query("update requeuest.mq_msgs set attempt_at = now() - interval '1 minute'")
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
            // Where it is not refused yet, it is rolled back.
            let mut tx = self.lock.begin().await.unwrap();
            let request = Request::post(self.server.url("/")).body("late").unwrap();
            match durable.fire_in(&mut *tx, request).await {
                Ok(_) => assert!(Instant::now() < deadline, "requests are still taken"),
                Err(error) => return assert!(error.is_closed(), "{error}"),
            }
        }
    }

    /// Lets the poll go on.
    async fn release(self) -> (Server, RequestId) {
        self.lock.commit().await.unwrap();
        (self.server, self.id)
    }
}

/// Whether a poll waits for the lock.
async fn poll_waits(database: &TestDatabase) -> bool {
    let waiting = "select count(*) from pg_stat_activity
                   where datname = current_database() and wait_event_type = 'Lock' and query like 'SELECT * FROM mq_poll%'";
    count(database, waiting).await == 1
}

/// Whether the request was claimed and is back in the queue, as if it had not been.
async fn is_back(database: &TestDatabase) -> bool {
    let back = "select count(*) from requeuest.mq_msgs
                where claim_no > 1 and state = 0 and attempts = 0 and attempt_at <= clock_timestamp()";
    count(database, back).await == 1
}

/// Another process delivers it, with its first attempt.
async fn assert_free(database: &TestDatabase, held: (Server, RequestId)) {
    let (server, id) = held;
    assert_eq!(server.count(), 0);
    let other = serving(database);
    let outcome = testkit::outcome(&other, id, LONG).await.unwrap();
    assert_eq!(outcome.status(), Status::Completed);
    assert_eq!(server.count(), 1);
}

#[tokio::test]
async fn what_a_poll_brings_after_the_last_handle_is_dropped_goes_back_at_once() {
    let database = migrated().await;
    let durable = serving(&database);
    let held = Held::poll_of(&durable, &database).await;
    drop(durable);
    let held = held.release().await;
    eventually("it is back", || is_back(&database)).await;
    assert_free(&database, held).await;
}

#[tokio::test]
async fn what_a_poll_brings_after_a_listener_is_dropped_goes_back_at_once() {
    let database = migrated().await;
    let mut client = Client::new(database.pool().clone(), Channels::All)
        .await
        .unwrap();
    let held = Held::poll_of(client.durable(), &database).await;
    drop(client.take_listener());
    let held = held.release().await;
    eventually("it is back", || is_back(&database)).await;
    assert_free(&database, held).await;
}

#[tokio::test]
async fn a_shutdown_gives_back_what_a_poll_in_flight_brings() {
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
    assert!(is_back(&database).await);
    assert_free(&database, held).await;
}

#[tokio::test]
async fn a_shutdown_waits_for_the_poll_of_a_listener_too() {
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
    assert!(is_back(&database).await);
    assert_free(&database, held).await;
}
