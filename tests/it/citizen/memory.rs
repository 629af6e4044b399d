//! For how long destinations and what waits for them are remembered.

use std::time::Duration;

use requeuest::retry::RetryPolicy;
use requeuest::testkit::TestDatabase;
use requeuest::{
    CircuitBreaker, DestinationPolicy, DestinationState, Durable, Options, RequestId, Status,
};
use sqlx::Executor;

use super::{disabling, fire, origin};
use crate::support::{LONG, Server, builder, eventually, eventually_rows, migrated, post, quick};

const DAY: Duration = Duration::from_secs(24 * 3600);

async fn set(database: &TestDatabase, statement: &str) {
    database.pool().execute(statement).await.unwrap();
}

/// A process that only enqueues, and sweeps every few seconds.
fn enqueuing(database: &TestDatabase) -> Durable {
    let builder = builder(database).runner(false);
    builder.retention(Duration::from_secs(60)).build().unwrap()
}

/// Requests that were deferred two days ago, with no runner for two minutes.
async fn deferred_for_days(database: &TestDatabase, max_age: Duration) -> (Server, Vec<RequestId>) {
    let server = Server::always(200).await;
    let runner = builder(database).build().unwrap();
    let destination = runner.destination(&origin(&server)).unwrap();
    destination.pause(None).await.unwrap();
    let policy = RetryPolicy::exponential().max_age(max_age);
    let mut ids = Vec::new();
    for _ in 0..3 {
        let request = post(server.url("/"), "");
        let options = Options::default().retry(policy.clone());
        ids.push(runner.fire(request.with(options)).await.unwrap());
    }
    eventually_rows(database, "mq_msgs WHERE state = 'deferred'", 3).await;
    runner.shutdown(LONG).await.unwrap();
    set(
        database,
        "UPDATE requeuest.mq_msgs SET attempt_at = attempt_at - interval '2 days',
             created_at = created_at - interval '2 days'",
    )
    .await;
    (server, ids)
}

async fn without_a_runner(database: &TestDatabase) {
    set(
        database,
        "INSERT INTO requeuest.undelivered_channels (channel_name, format, since)
         SELECT DISTINCT channel_name, format, now() - interval '2 minutes' FROM requeuest.mq_msgs
         ON CONFLICT (channel_name, format) DO UPDATE SET since = excluded.since",
    )
    .await;
}

async fn assert_deferred(durable: &Durable, ids: &[RequestId]) {
    for id in ids {
        let status = durable.status(*id).await.unwrap();
        assert_eq!(status, Some(Status::Deferred));
    }
}

#[tokio::test]
async fn the_time_of_deferred_requests_counts_from_the_loss_of_their_runner() {
    let database = migrated().await;
    let (server, ids) = deferred_for_days(&database, DAY).await;
    let web = enqueuing(&database);
    // No runner sends them. No sweep looks at them while their destination is closed.
    let destination = web.destination(&origin(&server)).unwrap();
    destination.resume().await.unwrap();
    without_a_runner(&database).await;
    let noted = "undelivered WHERE give_up_at > now() + interval '23 hours'";
    eventually_rows(&database, noted, 3).await;
    assert_deferred(&web, &ids).await;
}

#[tokio::test]
async fn requests_of_a_closed_destination_outlive_a_time_without_a_runner() {
    let database = migrated().await;
    let (server, ids) = deferred_for_days(&database, Duration::from_secs(1)).await;
    without_a_runner(&database).await;
    let web = enqueuing(&database);
    let again = "undelivered WHERE give_up_at BETWEEN now() AND now() + interval '10 minutes'";
    eventually_rows(&database, again, 3).await;
    assert_deferred(&web, &ids).await;
    // They are given up once a runner would send them.
    let destination = web.destination(&origin(&server)).unwrap();
    destination.resume().await.unwrap();
    set(
        &database,
        "UPDATE requeuest.undelivered SET give_up_at = now()",
    )
    .await;
    eventually_rows(&database, "mq_msgs", 0).await;
}

#[tokio::test]
async fn destinations_without_traffic_are_forgotten() {
    let database = migrated().await;
    let server = Server::always(500).await;
    let breaker = CircuitBreaker::default().min_attempts(5);
    let durable = builder(&database)
        .retry(quick().max_attempts(1))
        .destination("*", DestinationPolicy::default().circuit_breaker(breaker))
        .build()
        .unwrap();
    durable
        .destination("kept")
        .unwrap()
        .pause(None)
        .await
        .unwrap();
    let policy = DestinationPolicy::default().max_concurrency(1);
    let with_policy = durable.destination("policy").unwrap();
    with_policy.set_policy(policy).await.unwrap();
    let resumed = durable.destination("resumed").unwrap();
    resumed.pause(None).await.unwrap();
    resumed.resume().await.unwrap();
    let soon = std::time::SystemTime::now() + Duration::from_secs(60);
    durable
        .destination("soon")
        .unwrap()
        .pause(soon)
        .await
        .unwrap();
    // One that failed once, and one whose breaker has opened.
    let failed = Server::always(500).await;
    fire(&durable, &failed, 1).await;
    fire(&durable, &server, 6).await;
    let destination = durable.destination(&origin(&server)).unwrap();
    eventually("it opens", || async {
        destination.status().await.unwrap().state == DestinationState::CircuitOpen
    })
    .await;
    eventually_rows(&database, "destinations", 6).await;
    durable.shutdown(LONG).await.unwrap();
    set(
        &database,
        "UPDATE requeuest.destinations SET closed_until = closed_until - interval '3 days'",
    )
    .await;
    disabling::pass(&database, 3 * DAY).await;
    let _web = enqueuing(&database);
    eventually("all but what is stored is forgotten", || async {
        set(
            &database,
            "UPDATE requeuest.destinations SET changed_at = changed_at - interval '1 hour'",
        )
        .await;
        let left: Vec<String> =
            sqlx::query_scalar("SELECT name FROM requeuest.destinations ORDER BY name")
                .fetch_all(database.pool())
                .await
                .unwrap();
        left == ["kept", "policy"]
    })
    .await;
}

#[tokio::test]
async fn a_pause_is_found_among_many_destinations() {
    let database = migrated().await;
    let server = Server::always(200).await;
    // More than are read at once.
    set(
        &database,
        "INSERT INTO requeuest.destinations (name, state)
         SELECT 'https://' || i || '.example:443', json_build_object('streak', json_build_object(
             'since', 1, 'last', 1, 'keep_ms', 9000000000000000))
         FROM generate_series(1, 12000) i",
    )
    .await;
    let operator = enqueuing(&database);
    // After and before all others by name.
    for name in [origin(&server), "zz-last".into(), "Aa-first".into()] {
        let destination = operator.destination(&name).unwrap();
        destination.pause(None).await.unwrap();
    }
    // Not among the latest changes.
    set(
        &database,
        "UPDATE requeuest.destinations SET changed_at = changed_at - interval '5 minutes'",
    )
    .await;
    let durable = builder(&database).build().unwrap();
    super::policies::until_deferred(&durable, &server).await;
    for key in ["zz-last", "Aa-first"] {
        let with = || post(server.url("/"), "").with(Options::default().limit_key(key));
        let id = durable.fire(with()).await.unwrap();
        eventually("it is deferred", || async {
            durable.status(id).await.unwrap() == Some(Status::Deferred)
        })
        .await;
    }
}
