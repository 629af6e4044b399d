//! What statements read when their plans were made for an empty queue.
//!
//! A queue is empty most of the time, and that is what its statistics say. Whatever piles up afterwards, no statement may go through it.

use std::time::Duration;

use requeuest::retry::RetryPolicy;
use requeuest::testkit::TestDatabase;
use requeuest::{DeadLetterFilter, Durable, Options, Request};
use sqlx::Executor;
use sqlx::postgres::PgPoolOptions;
use tokio::task::JoinSet;
use uuid::Uuid;

use crate::support::{Server, count, eventually, in_time, migrated, reply};

/// How many wait, not to be sent.
const WAITING: usize = 5000;
const REQUESTS: usize = 200;
/// What the sessions call themselves whose reading is counted.
const SESSIONS: &str = "counted";

fn post(server: &Server, path: &str) -> Request {
    let request = http::Request::post(server.url(path)).body("x").unwrap();
    request.try_into().unwrap()
}

/// A database whose queue was emptied before its statistics were made, and filled afterwards.
async fn filled_after_its_statistics(server: &Server) -> TestDatabase {
    let database = migrated().await;
    let durable = Durable::builder(database.pool().clone()).runner(false);
    let durable = durable.build().unwrap();
    let delay = Options::default().delay(Duration::from_secs(3600));
    let waiting = || (0..WAITING).map(|_| post(server, "/never").with(delay.clone()));
    for table in ["mq_msgs", "mq_payloads"] {
        let kept = format!("alter table requeuest.{table} set (autovacuum_enabled = false)");
        database.pool().execute(&*kept).await.unwrap();
    }
    durable.fire_many(waiting()).await.unwrap();
    for statement in [
        "delete from requeuest.mq_msgs",
        "delete from requeuest.mq_payloads",
        "analyze requeuest.mq_msgs",
        "analyze requeuest.mq_payloads",
    ] {
        database.pool().execute(statement).await.unwrap();
    }
    durable.fire_many(waiting()).await.unwrap();
    durable.shutdown(Duration::ZERO).await.unwrap();
    database
}

/// Index entries and rows that all sessions that have ended have read.
async fn read(database: &TestDatabase) -> i64 {
    // What the sessions counted is there when they are gone.
    let sessions =
        format!("select count(*) from pg_stat_activity where application_name = '{SESSIONS}'");
    eventually("the end of the sessions", || async {
        count(database, &sessions).await == 0
    })
    .await;
    let read = "select (
            select sum(idx_tup_read) from pg_stat_user_indexes where schemaname = 'requeuest'
        )::bigint + (
            select sum(seq_tup_read) from pg_stat_user_tables where schemaname = 'requeuest'
        )::bigint";
    count(database, read).await
}

#[tokio::test]
async fn whatever_waits_statements_read_only_what_they_are_about() {
    let server = Server::start(|_, seen| async move {
        match seen.uri.path() {
            "/fails" => reply(503, ""),
            // Its lease is renewed.
            "/slow" => {
                tokio::time::sleep(Duration::from_millis(700)).await;
                reply(200, "")
            }
            _ => reply(200, ""),
        }
    })
    .await;
    let database = filled_after_its_statistics(&server).await;
    let before = read(&database).await;
    let options = database.options().application_name(SESSIONS);
    let pool = PgPoolOptions::new().connect_lazy_with(options);
    let durable = Durable::builder(pool.clone())
        .retry(RetryPolicy::constant(Duration::from_millis(20)).max_attempts(2))
        .lease(Duration::from_secs(1))
        .build()
        .unwrap();

    let mut awaited = JoinSet::new();
    for number in 0..REQUESTS {
        let durable = durable.clone();
        let request = post(&server, ["/", "/", "/fails", "/slow"][number % 4]);
        awaited.spawn(async move { durable.await_response(request).await });
    }
    in_time(awaited.join_all()).await;

    // These are claimed by a poll.
    let mut transaction = pool.begin().await.unwrap();
    let requests = (0..REQUESTS).map(|_| post(&server, "/"));
    let ids = durable.fire_many_in(&mut transaction, requests).await;
    transaction.commit().await.unwrap();
    for id in ids.unwrap() {
        in_time(durable.response(id)).await.unwrap();
    }

    // These are taken over from somebody whose lease has run out.
    let mut transaction = pool.begin().await.unwrap();
    let requests = (0..REQUESTS).map(|_| post(&server, "/"));
    let ids = durable.fire_many_in(&mut transaction, requests).await;
    let ids = ids.unwrap();
    let lapsed = "update requeuest.mq_msgs set state = 1, claim_no = 1, attempts = 1, attempt_at = now() - interval '1 hour'
                  where id = any ($1)";
    sqlx::query(lapsed)
        .bind(ids.iter().map(|id| Uuid::from(*id)).collect::<Vec<_>>())
        .execute(&mut *transaction)
        .await
        .unwrap();
    transaction.commit().await.unwrap();
    for id in ids {
        in_time(durable.response(id)).await.unwrap();
    }

    let delayed = Options::default().delay(Duration::from_secs(3600));
    for number in 0..REQUESTS / 4 {
        let key = format!("key {number}");
        let options = delayed.clone().key(&*key).supersede(&*key).ordered(&*key);
        let request = post(&server, "/").with(options);
        let id = durable.fire(request).await.unwrap();
        assert!(durable.cancel(id).await.unwrap());
    }
    let kept = durable
        .dead_letters(&DeadLetterFilter::default().limit(1000))
        .await
        .unwrap();
    assert_eq!(kept.len(), REQUESTS / 4);
    durable.shutdown(Duration::from_secs(5)).await.unwrap();
    pool.close().await;
    let read = read(&database).await - before;
    // Not even once for each of them that a statement could go through all.
    let most = (WAITING * 4) as i64;
    assert!(read < most, "{read} rows and index entries were read");
}
