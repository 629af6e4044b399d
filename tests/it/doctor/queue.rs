//! What waits, and for what.

use std::time::Duration;

use requeuest::admin::{Check, Severity};
use requeuest::{Outcome, outcome_fn};
use sqlx::{Executor, PgConnection};

use super::{advised, examined, execute, found};
use crate::support::{
    LONG, Server, add_outcomes, builder, eventually_rows, migrated, other_process, outcome_of, post,
};

#[tokio::test]
async fn requests_without_a_runner_and_closed_destinations_are_named() {
    let database = migrated().await;
    let there = builder(&database).runner(false);
    let there = there.channel("orders").build().unwrap();
    there.fire(post("http://localhost:1/", "x")).await.unwrap();
    let paused = there.destination("http://paused.test:80").unwrap();
    paused.pause(None).await.unwrap();
    let disabled = there.destination("http://disabled.test:80").unwrap();
    disabled.disable("the contract has ended").await.unwrap();

    let findings = there.admin().doctor().await.unwrap();
    let (summary, advice) = advised(&findings, Check::Runners, Severity::Problem);
    assert!(
        summary.starts_with("no runner delivers due requests of `orders` (due for "),
        "{summary}"
    );
    assert!(advice.contains("requeuest work"), "{advice}");
    let (summary, _) = advised(&findings, Check::Destinations, Severity::Warning);
    assert_eq!(summary, "disabled destinations: http://disabled.test:80");
    let (summary, _) = advised(&findings, Check::Destinations, Severity::Note);
    assert_eq!(summary, "paused destinations: http://paused.test:80");
    found(&findings, Check::Lag, Severity::Ok);
}

#[tokio::test]
async fn a_due_request_that_no_runner_claims_in_time_lags() {
    let database = migrated().await;
    let durable = builder(&database).runner(false).build().unwrap();
    durable
        .fire(post("http://localhost:1/", "x"))
        .await
        .unwrap();
    // As if it had been due for an hour, and another process had a runner without a free attempt.
    let aged = "WITH aged AS (
            UPDATE requeuest.mq_msgs SET attempt_at = attempt_at - interval '1 hour'
        )
        INSERT INTO requeuest.runners (id, formats, version, pid, expires_at)
        VALUES (gen_random_uuid(), '{1}', '0.1.0', 1, now() + interval '1 hour')";
    database.pool().execute(aged).await.unwrap();
    let findings = durable.admin().doctor().await.unwrap();
    let (summary, advice) = advised(&findings, Check::Lag, Severity::Problem);
    assert!(
        summary.contains("`default` has waited for 60 min"),
        "{summary}"
    );
    assert!(advice.contains("add runners"), "{advice}");
}

#[tokio::test]
async fn requests_that_can_not_be_read_and_handlers_that_are_gone_are_named() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let durable = builder(&database).build().unwrap();
    let handler = outcome_fn(async |_: &mut PgConnection, _: &Outcome| Err::<(), _>("not now"));
    let subscription = durable.on_outcome("default", handler).await.unwrap();
    let id = durable.fire(post(server.url("/"), "x")).await.unwrap();
    outcome_of(&durable, id).await;
    let there = other_process(&database).await;
    let findings = there.admin().doctor().await.unwrap();
    found(&findings, Check::Handlers, Severity::Ok);

    // As if the process had gone some time ago.
    drop(subscription);
    durable.shutdown(LONG).await.unwrap();
    execute(
        &database,
        "UPDATE requeuest.handler_heartbeats SET seen_at = now() - interval '1 hour'",
    )
    .await;
    let findings = there.admin().doctor().await.unwrap();
    let (summary, advice) = advised(&findings, Check::Handlers, Severity::Problem);
    assert_eq!(
        summary,
        "outcomes wait for a handler, and no process has one: default"
    );
    assert!(advice.contains("Durable::on_outcome"), "{advice}");

    there.fire(post(server.url("/"), "y")).await.unwrap();
    execute(
        &database,
        "UPDATE requeuest.mq_payloads SET head = '{' || head",
    )
    .await;
    let reader = builder(&database).build().unwrap();
    eventually_rows(&database, "mq_payloads WHERE parked_since IS NOT NULL", 1).await;
    reader.shutdown(Duration::ZERO).await.unwrap();
    let findings = there.admin().doctor().await.unwrap();
    let (summary, advice) = advised(&findings, Check::Parked, Severity::Warning);
    assert!(summary.starts_with("1 request is parked"), "{summary}");
    assert!(advice.contains("Durable::parked"), "{advice}");
}

#[tokio::test]
async fn expired_outcomes_that_a_session_keeps_name_the_session() {
    let database = migrated().await;
    add_outcomes(&database, 3, 5, 3600, 60).await;
    let findings = examined(database.pool()).await;
    let (summary, advice) = advised(&findings, Check::PruneLag, Severity::Warning);
    assert!(
        summary.contains("outcomes_3 should have gone 58 min ago"),
        "{summary}"
    );
    assert!(advice.contains("sweep_parts"), "{advice}");

    let mut transaction = database.pool().begin().await.unwrap();
    let pid: i32 = sqlx::query_scalar("SELECT pg_backend_pid() FROM requeuest.outcomes_3 LIMIT 1")
        .fetch_one(&mut *transaction)
        .await
        .unwrap();
    let findings = examined(database.pool()).await;
    let (summary, advice) = advised(&findings, Check::PruneLag, Severity::Warning);
    assert!(
        summary.ends_with(&format!("it is used by session {pid}")),
        "{summary}"
    );
    assert!(advice.contains("end these transactions"), "{advice}");
}
