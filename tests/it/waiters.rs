//! Callers that wait for outcomes of other processes: what they cost, and whom they hold up.

use std::process::Stdio;
use std::time::Duration;

use requeuest::testkit::TestDatabase;
use requeuest::{Durable, Options, RequestId, Status};
use sqlx::PgPool;
use tokio::task::JoinSet;

use crate::support::{
    LONG, Server, builder, count, eventually, eventually_some, in_time, migrated, other_process,
    part, plays, post,
};

const URL: &str = "http://127.0.0.1:9/";
const DATABASE: &str = "REQUEUEST_TEST_DATABASE";
const WATCHED: &str = "SELECT count(*) FROM requeuest.mq_msgs WHERE waiter IS NOT NULL";

/// Finishes every request, as another process would, with a body of this size. Requests in `broken`
/// get a head that can't be decoded.
async fn finish_all(pool: &PgPool, bytes: usize, broken: &[RequestId]) {
    sqlx::query(
        r#"WITH gone AS (DELETE FROM requeuest.mq_msgs RETURNING *)
           INSERT INTO requeuest.outcomes (
               slot, id, channel_name, channel_args, status, attempts, created_at, finished_at,
               expires_at, http_status, head, body
           )
           SELECT
               0, g.id, g.channel_name, g.channel_args, 'completed', 1, g.created_at, now(),
               now() + interval '1 day', 200,
               CASE WHEN g.id = ANY ($2) THEN '{"version":1}'
                   ELSE '{"version":"HTTP/1.1","headers":[]}' END,
               convert_to(repeat('x', $1), 'UTF8')
           FROM gone g"#,
    )
    .bind(bytes as i32)
    .bind(
        broken
            .iter()
            .map(|id| (*id).into())
            .collect::<Vec<uuid::Uuid>>(),
    )
    .execute(pool)
    .await
    .unwrap();
}

async fn fired(durable: &Durable, number: usize) -> Vec<RequestId> {
    durable
        .fire_many((0..number).map(|_| post(URL, "x")))
        .await
        .unwrap()
}

async fn waiting_for(
    durable: &Durable,
    database: &TestDatabase,
    ids: &[RequestId],
) -> JoinSet<(RequestId, Result<usize, requeuest::Error>)> {
    let mut waiting = JoinSet::new();
    for id in ids.iter().copied() {
        let durable = durable.clone();
        waiting.spawn(async move {
            let response = durable.response(id).await;
            (id, response.map(|response| response.body().len()))
        });
    }
    eventually("every caller waits", || async {
        count(database, WATCHED).await == ids.len() as i64
    })
    .await;
    waiting
}

#[tokio::test]
async fn an_outcome_that_cannot_be_read_fails_its_own_waiter_alone() {
    let database = migrated().await;
    let durable = other_process(&database).await;
    let ids = fired(&durable, 20).await;
    let mut waiting = waiting_for(&durable, &database, &ids).await;
    let broken = [ids[0], ids[7]];
    finish_all(database.pool(), 10, &broken).await;
    while let Some(told) = in_time(waiting.join_next()).await {
        let (id, told) = told.unwrap();
        if broken.contains(&id) {
            let error = told.unwrap_err();
            assert_eq!(error.request_id(), Some(id), "{error}");
            assert!(!error.is_unknown_id(), "{error}");
        } else {
            assert_eq!(told.unwrap(), 10);
        }
    }
    // It is asked for again by its id, with the same answer.
    let error = durable.response(ids[7]).await.unwrap_err();
    assert!(error.to_string().contains("head"), "{error}");
}

/// Many callers, and responses of this size. Together they are several times as large as the limit
/// of this test.
const CALLERS: usize = 1500;
const RESPONSE: usize = 192 * 1024;
const MOST: u64 = 128 * 1024;

#[tokio::test]
async fn many_outcomes_at_once_are_fetched_a_part_at_a_time() {
    let database = migrated().await;
    let child = part(module_path!(), "wait_for_many")
        .env(DATABASE, database.url())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let output = tokio::task::spawn_blocking(move || child.wait_with_output());
    let output = tokio::time::timeout(Duration::from_secs(120), output)
        .await
        .expect("took too long")
        .unwrap()
        .unwrap();
    let told = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{told}");
    let grew = told.lines().find_map(|line| line.strip_prefix("grew "));
    let grew: u64 = grew.expect("no number").parse().unwrap();
    println!("{CALLERS} waiting callers got {RESPONSE} bytes each; memory grew by {grew} KiB");
    assert!(grew < MOST, "memory grew by {grew} KiB");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a part played by a copy of this binary"]
async fn wait_for_many() {
    if !plays("wait_for_many") {
        return;
    }
    let pool = PgPool::connect(&std::env::var(DATABASE).unwrap())
        .await
        .unwrap();
    let durable = Durable::builder(pool.clone())
        .runner(false)
        .build()
        .unwrap();
    let mut waiting = JoinSet::new();
    for id in fired(&durable, CALLERS).await {
        let durable = durable.clone();
        waiting.spawn(async move { durable.response(id).await.unwrap().body().len() });
    }
    in_time(async {
        while sqlx::query_scalar::<_, i64>(WATCHED)
            .fetch_one(&pool)
            .await
            .unwrap()
            < CALLERS as i64
        {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    let before = memory("VmRSS:");
    finish_all(&pool, RESPONSE, &[]).await;
    while let Some(length) = in_time(waiting.join_next()).await {
        assert_eq!(length.unwrap(), RESPONSE);
    }
    println!("grew {}", memory("VmHWM:").saturating_sub(before));
}

/// A number of kibibytes that the system reports of this process.
fn memory(name: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let size = status.lines().find_map(|line| line.strip_prefix(name));
    let size = size.expect("not reported").trim();
    size.trim_end_matches("kB").trim().parse().unwrap()
}

#[tokio::test]
async fn a_notification_that_lies_changes_nothing() {
    let database = migrated().await;
    let (server, gate) = Server::held(200).await;
    let prompt = Server::always(200).await;
    let runner = builder(&database).build().unwrap();
    let idle = other_process(&database).await;
    let delayed = Options::default().delay(LONG);
    let delayed = idle.fire(post(server.url("/"), "x").with(delayed)).await;
    let held = idle.fire(post(server.url("/"), "x")).await.unwrap();
    server.wait_for(1).await;
    let waiter = idle.clone();
    let awaited = tokio::spawn(async move { waiter.response(held).await });
    let instance = eventually_some("the instance waits", || async {
        let waiter = "SELECT waiter FROM requeuest.mq_msgs WHERE waiter IS NOT NULL";
        let waiter: Option<uuid::Uuid> = sqlx::query_scalar(waiter)
            .fetch_optional(database.pool())
            .await
            .unwrap();
        waiter
    })
    .await;

    // Every role of the database may send these.
    let channel = format!("requeuest_{}", instance.simple());
    let (held_id, delayed_id) = (held.to_string(), delayed.unwrap());
    for (channel, payload) in [
        (&*channel, &*held_id),
        (&channel, "no id"),
        (&channel, &delayed_id.to_string()),
        ("mq", ""),
        ("mq_default", &held_id),
    ] {
        sqlx::query("SELECT pg_notify($1, $2)")
            .bind(channel)
            .bind(payload)
            .execute(database.pool())
            .await
            .unwrap();
    }
    // Another request goes all the way after them.
    let id = idle
        .fire_in(database.pool(), post(prompt.url("/"), "x"))
        .await;
    let response = in_time(idle.response(id.unwrap())).await.unwrap();
    assert_eq!(response.status(), 200);
    assert!(!awaited.is_finished());
    let status = idle.status(delayed_id).await.unwrap();
    assert_eq!(status, Some(Status::Scheduled));
    assert_eq!(server.count(), 1);

    gate.add_permits(1);
    let response = in_time(awaited).await.unwrap().unwrap();
    assert_eq!(response.status(), 200);
    assert_eq!(server.count(), 1);
    in_time(runner.shutdown(LONG)).await.unwrap();
}
