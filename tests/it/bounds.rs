//! Nothing grows without a bound: attempts, locks, old rows, memory.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Waker};
use std::time::Duration;

use futures_util::future::join_all;
use requeuest::retry::RetryPolicy;
use requeuest::testkit::TestDatabase;
use requeuest::{Durable, Error, Options, Request, RequestId, Status};
use sqlx::{Executor, Postgres, Transaction};

use crate::support::{
    LONG, Server, builder, count, eventually, in_time, migrated, other_process, outcome_of,
    passing, post, quick, rows,
};

const URL: &str = "http://127.0.0.1:9/";

#[tokio::test]
async fn a_failing_request_keeps_its_first_and_last_attempts() {
    let database = migrated().await;
    let server = Server::always(503).await;
    let durable = builder(&database)
        .retry(quick().max_attempts(60))
        .build()
        .unwrap();
    let id = durable.fire(post(server.url("/"), "x")).await.unwrap();
    let outcome = outcome_of(&durable, id).await;
    assert_eq!(
        (outcome.status(), outcome.attempts()),
        (Status::Discarded, 60)
    );
    // The last attempt is part of the outcome.
    let numbers: Vec<i32> =
        sqlx::query_scalar("SELECT number FROM requeuest.attempts ORDER BY number")
            .fetch_all(database.pool())
            .await
            .unwrap();
    assert!(
        numbers.iter().copied().eq((1..=3).chain(40..=59)),
        "{numbers:?}"
    );
}

/// Keeps inserts waiting until the transaction ends.
async fn blocked(database: &TestDatabase) -> Transaction<'static, Postgres> {
    let mut transaction = database.pool().begin().await.unwrap();
    transaction
        .execute("LOCK TABLE requeuest.mq_msgs IN SHARE MODE")
        .await
        .unwrap();
    transaction
}

type Firing = Pin<Box<dyn Future<Output = Result<RequestId, Error>> + Send>>;

/// A request that has been handed in and waits to be persisted.
fn queued(durable: &Durable, request: Request) -> Firing {
    let durable = durable.clone();
    let mut firing: Firing = Box::pin(async move { durable.fire(request).await });
    let polled = firing
        .as_mut()
        .poll(&mut Context::from_waker(Waker::noop()));
    assert!(polled.is_pending(), "{polled:?}");
    firing
}

async fn assert_persisted(firing: impl IntoIterator<Item = Firing>) {
    for fired in in_time(join_all(firing)).await {
        fired.unwrap();
    }
}

async fn assert_overloaded(durable: &Durable, request: Request) {
    let error = in_time(durable.fire(request)).await.unwrap_err();
    assert!(error.is_overloaded(), "{error}");
    assert_eq!(error.request_id(), None);
}

#[tokio::test]
async fn requests_beyond_the_queue_are_refused_until_it_drains() {
    let database = migrated().await;
    let small = builder(&database).runner(false).max_queued_requests(20);
    let durable = small.build().unwrap();
    let lock = blocked(&database).await;
    let firing: Vec<_> = (0..20).map(|_| queued(&durable, post(URL, "x"))).collect();
    assert_overloaded(&durable, post(URL, "too many")).await;
    let keyed = post(URL, "too many").with(Options::default().key("k"));
    assert_overloaded(&durable, keyed).await;
    let awaited = in_time(durable.await_response(post(URL, "too many"))).await;
    assert!(awaited.unwrap_err().is_overloaded());
    lock.rollback().await.unwrap();
    assert_persisted(firing).await;
    in_time(durable.fire(post(URL, "x"))).await.unwrap();
    assert_eq!(rows(&database, "mq_msgs").await, 21);
    assert_eq!(
        rows(&database, "mq_payloads WHERE body = 'too many'").await,
        0
    );
}

#[tokio::test]
async fn requests_that_wait_for_a_key_count_too() {
    let database = migrated().await;
    let small = builder(&database).runner(false).max_queued_requests(20);
    let durable = small.build().unwrap();
    let ordered = || post(URL, "x").with(Options::default().ordered("k"));
    let mut holder = database.pool().begin().await.unwrap();
    durable.fire_in(&mut *holder, ordered()).await.unwrap();
    let firing: Vec<_> = (0..20).map(|_| queued(&durable, ordered())).collect();
    assert_overloaded(&durable, ordered()).await;
    holder.commit().await.unwrap();
    assert_persisted(firing).await;
    assert_eq!(rows(&database, "mq_msgs").await, 21);
}

#[tokio::test]
async fn queued_bytes_are_bounded() {
    let database = migrated().await;
    let small = builder(&database)
        .runner(false)
        .max_queued_bytes(1024 * 1024);
    let durable = small.build().unwrap();
    let lock = blocked(&database).await;
    let large = queued(&durable, post(URL, vec![0; 900_000]));
    assert_overloaded(&durable, post(URL, vec![0; 200_000])).await;
    let little = queued(&durable, post(URL, "x"));
    lock.rollback().await.unwrap();
    assert_persisted([large, little]).await;
    // Larger than the budget, but alone.
    let huge = post(URL, vec![0; 2_000_000]);
    in_time(durable.fire(huge)).await.unwrap();
    assert_eq!(rows(&database, "mq_msgs").await, 3);
}

#[tokio::test]
async fn what_no_caller_waits_for_any_more_is_not_written() {
    let database = migrated().await;
    let durable = builder(&database).runner(false).build().unwrap();
    let lock = blocked(&database).await;
    let first = queued(&durable, post(URL, "x"));
    let waiting = "SELECT count(*) FROM pg_stat_activity
                   WHERE datname = current_database() AND wait_event_type = 'Lock'";
    eventually("the first insert waits", || async {
        count(&database, waiting).await == 1
    })
    .await;
    for _ in 0..10 {
        drop(queued(&durable, post(URL, "left")));
    }
    let last = queued(&durable, post(URL, "x"));
    lock.rollback().await.unwrap();
    assert_persisted([first, last]).await;
    assert_eq!(rows(&database, "mq_msgs").await, 2);
}

#[tokio::test]
async fn a_budget_of_nothing_is_refused() {
    let database = migrated().await;
    let builder = || builder(&database).runner(false);
    for (refused, field) in [
        (builder().max_queued_requests(0), "max_queued_requests"),
        (builder().max_queued_bytes(0), "max_queued_bytes"),
        (builder().max_sending_bytes(0), "max_sending_bytes"),
        (builder().max_unsettled_bytes(0), "max_unsettled_bytes"),
    ] {
        assert_eq!(refused.build().unwrap_err().field(), Some(field));
    }
}

const KIB: usize = 1024;

#[tokio::test]
async fn large_bodies_wait_for_room_and_delay_no_small_one() {
    let database = migrated().await;
    let (large, gate) = Server::held(200).await;
    let small = Server::always(200).await;
    let here = builder(&database).max_sending_bytes(2048 * KIB);
    let here = here.build().unwrap();
    let elsewhere = other_process(&database).await;
    let mut ids = Vec::new();
    for number in 0..8 {
        // The first ones come with their bodies. Those of the others must be fetched.
        let durable = if number < 4 { &here } else { &elsewhere };
        let request = post(large.url("/"), vec![number; 900 * KIB]);
        ids.push(durable.fire(request).await.unwrap());
    }
    large.wait_for(2).await;
    for _ in 0..20 {
        let answered = in_time(here.await_response(post(small.url("/"), "x"))).await;
        assert_eq!(answered.unwrap().status(), 200);
    }
    passing(&database, Duration::from_millis(500)).await;
    assert_eq!(large.count(), 2);
    gate.add_permits(ids.len());
    for (number, id) in ids.into_iter().enumerate() {
        let outcome = outcome_of(&here, id).await;
        let body = outcome.response().unwrap().body();
        assert_eq!(*body, vec![number as u8; 900 * KIB]);
    }
    assert_eq!(large.count(), 8);
}

#[tokio::test]
async fn a_body_larger_than_all_the_room_is_sent_alone() {
    let database = migrated().await;
    let (server, gate) = Server::held(200).await;
    let here = builder(&database).max_sending_bytes(1).build().unwrap();
    let elsewhere = other_process(&database).await;
    let mut ids = Vec::new();
    for size in [3000 * KIB, 100 * KIB, 3000 * KIB] {
        let request = post(server.url("/"), vec![7; size]);
        ids.push((elsewhere.fire(request).await.unwrap(), size));
    }
    for alone in 1..=ids.len() {
        server.wait_for(alone).await;
        passing(&database, Duration::from_millis(200)).await;
        assert_eq!(server.count(), alone);
        gate.add_permits(1);
    }
    for (id, size) in ids {
        let outcome = outcome_of(&here, id).await;
        assert_eq!(outcome.response().unwrap().body().len(), size);
    }
}

#[tokio::test]
async fn a_large_body_that_waits_for_its_retry_gives_its_room_up() {
    let database = migrated().await;
    let (failing, healthy) = (Server::always(503).await, Server::always(200).await);
    let durable = builder(&database)
        .max_sending_bytes(1024 * KIB)
        // Longer than this test, and short enough to be held for the caller.
        .retry(RetryPolicy::constant(LONG + Duration::from_secs(25)))
        .build()
        .unwrap();
    let caller = durable.clone();
    let request = post(failing.url("/"), vec![1; 900 * KIB]);
    let waiting = tokio::spawn(async move { caller.await_response(request).await });
    failing.wait_for(1).await;
    let request = post(healthy.url("/"), vec![2; 900 * KIB]);
    let id = durable.fire(request).await.unwrap();
    outcome_of(&durable, id).await;
    assert_eq!((failing.count(), healthy.count()), (1, 1));
    // The first one is still to be retried, for the caller that waits.
    assert_eq!(rows(&database, "mq_msgs").await, 1);
    assert!(!waiting.is_finished());
    waiting.abort();
}
