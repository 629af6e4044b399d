//! Priorities: what polls claim first while more is due than they take.

use std::collections::HashMap;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use requeuest::retry::RetryPolicy;
use requeuest::testkit::TestDatabase;
use requeuest::{DeadLetterFilter, Durable, Guarantee, Options, Priority, Resolution, Status};
use sqlx::{Executor, PgExecutor};
use tower::{ServiceBuilder, ServiceExt};

use crate::poll::planned_while_empty;
use crate::support::{
    LONG, Server, builder, end_three, eventually_rows, hyper_client, in_time, migrated,
    other_process, outcome_of, post, quick, rows,
};

const NAMES: [&str; 3] = ["high", "normal", "low"];
const PRIORITIES: [Priority; 3] = [Priority::High, Priority::Normal, Priority::Low];

/// Adds requests of one destination that have been due for this many seconds.
async fn add(database: &TestDatabase, priority: &str, number: i32, due_for: i32) {
    sqlx::query(
        "INSERT INTO requeuest.mq_msgs (id, channel_name, channel_args, attempt_at, priority)
         SELECT gen_random_uuid(), 'c', '0000|d|x', now() - $1 * interval '1 second',
             $2::requeuest.mq_priority
         FROM generate_series(1, $3)",
    )
    .bind(due_for)
    .bind(priority)
    .bind(number)
    .execute(database.pool())
    .await
    .unwrap();
}

/// How many requests of a high, normal and low priority a poll claims.
async fn poll(database: impl PgExecutor<'_>, batch: i32) -> [i64; 3] {
    let (high, normal, low) = sqlx::query_as(
        "SELECT
             count(*) FILTER (WHERE m.priority = 'high'),
             count(*) FILTER (WHERE m.priority = 'normal'),
             count(*) FILTER (WHERE m.priority = 'low')
         FROM requeuest.mq_poll(ARRAY['c'], $1) p JOIN requeuest.mq_msgs m ON m.id = p.id",
    )
    .bind(batch)
    .fetch_one(database)
    .await
    .unwrap();
    [high, normal, low]
}

/// The stored priorities, in the order of arrival.
async fn stored(database: &TestDatabase) -> Vec<String> {
    sqlx::query_scalar("SELECT priority::text FROM requeuest.mq_msgs ORDER BY created_at, seq")
        .fetch_all(database.pool())
        .await
        .unwrap()
}

#[tokio::test]
async fn high_comes_first_and_each_batch_has_some_of_the_others() {
    let database = migrated().await;
    // Those of a lower priority have been due for longer.
    for (name, due_for) in NAMES.into_iter().zip([0, 60, 120]) {
        add(&database, name, 300, due_for).await;
    }
    for _ in 0..4 {
        let [high, normal, low] = poll(database.pool(), 64).await;
        assert_eq!(high + normal + low, 64);
        assert_eq!(low, 8);
        assert!((18..=19).contains(&normal), "{normal}");
    }
    let gone = "DELETE FROM requeuest.mq_msgs WHERE priority = 'high'";
    database.pool().execute(gone).await.unwrap();
    assert_eq!(poll(database.pool(), 64).await, [0, 56, 8]);
    let gone = "DELETE FROM requeuest.mq_msgs WHERE priority = 'normal'";
    database.pool().execute(gone).await.unwrap();
    assert_eq!(poll(database.pool(), 64).await, [0, 0, 64]);
}

#[tokio::test]
async fn polls_for_few_requests_reach_low_while_high_keeps_coming() {
    let database = migrated().await;
    for name in ["normal", "low"] {
        add(&database, name, 10, 60).await;
    }
    add(&database, "high", 10, 0).await;
    let mut claimed = [0; 3];
    let mut polls = 0;
    while claimed[1] < 10 || claimed[2] < 10 {
        add(&database, "high", 2, 0).await;
        for (sum, some) in claimed.iter_mut().zip(poll(database.pool(), 2).await) {
            *sum += some;
        }
        polls += 1;
        assert!(polls < 500, "{claimed:?} were claimed");
    }
    assert!(claimed[0] > 10, "{claimed:?}");
}

#[tokio::test]
async fn an_ordering_key_is_claimed_by_the_priority_of_its_first_request() {
    let database = migrated().await;
    add(&database, "normal", 300, 60).await;
    let durable = other_process(&database).await;
    for (key, first, second) in [
        ("early", Priority::High, Priority::Low),
        ("late", Priority::Low, Priority::High),
    ] {
        for priority in [first, second] {
            let options = Options::default().channel("c").ordered(key);
            let request = post("http://a.example/", "x").with(options.priority(priority));
            durable.fire(request).await.unwrap();
        }
    }
    // The high one, and of the rest each eighth.
    assert_eq!(poll(database.pool(), 16).await, [1, 14, 1]);
    assert_eq!(poll(database.pool(), 16).await, [0, 16, 0]);
}

#[tokio::test]
async fn a_backlog_is_delivered_by_priority() {
    const EACH: usize = 40;
    let database = migrated().await;
    let server = Server::always(200).await;
    let there = other_process(&database).await;
    for (name, priority) in NAMES.into_iter().zip(PRIORITIES).rev() {
        let request = || post(server.url("/"), name).with(Options::default().priority(priority));
        there.fire_many((0..EACH).map(|_| request())).await.unwrap();
    }
    let durable = builder(&database).concurrency(4).build().unwrap();
    server.wait_for(3 * EACH).await;
    let mut places: HashMap<Bytes, usize> = HashMap::new();
    for (place, body) in server.bodies().into_iter().enumerate() {
        *places.entry(body).or_default() += place;
    }
    let places = NAMES.map(|name| places[name.as_bytes()] / EACH);
    assert!(places.is_sorted(), "on average at {places:?}");
    durable.shutdown(LONG).await.unwrap();
}

#[tokio::test]
async fn every_way_into_the_queue_stores_the_priority() {
    const URL: &str = "http://localhost:1/";
    let database = migrated().await;
    let durable = Durable::builder(database.pool().clone())
        .deliver(["another"])
        .build()
        .unwrap();
    let request = |options| post(URL, "x").with(options);
    durable.fire(request(Options::default())).await.unwrap();
    for priority in PRIORITIES {
        let options = || Options::default().priority(priority);
        let ordered = || options().ordered("key");
        durable.fire(request(options())).await.unwrap();
        durable.fire(request(ordered())).await.unwrap();
        let superseding = ordered().supersede(format!("{priority:?}"));
        let fired = durable.fire_in(database.pool(), request(superseding));
        fired.await.unwrap();
        let many = [request(options()), request(ordered())];
        durable.fire_many(many).await.unwrap();
        let layered = ServiceBuilder::new()
            .layer(durable.layer())
            .service(hyper_client());
        let mut fired = http::Request::post(URL)
            .body(Full::<Bytes>::from("x"))
            .unwrap();
        fired.extensions_mut().insert(options().fire());
        in_time(layered.oneshot(fired)).await.unwrap();
    }
    let mixed = PRIORITIES.map(|priority| request(Options::default().priority(priority)));
    durable.fire_many(mixed).await.unwrap();
    let mut expected = vec!["normal"];
    for name in NAMES {
        expected.extend([name; 6]);
    }
    expected.extend(NAMES);
    assert_eq!(stored(&database).await, expected);
}

#[tokio::test]
async fn a_retry_keeps_its_priority() {
    let database = migrated().await;
    let server = Server::always(503).await;
    let hour = Duration::from_secs(3600);
    let durable = builder(&database)
        .retry(RetryPolicy::constant(hour))
        .build()
        .unwrap();
    for (name, priority) in NAMES.into_iter().zip(PRIORITIES) {
        for ordered in [false, true] {
            let mut options = Options::default().priority(priority);
            if ordered {
                options = options.ordered(name);
            }
            let request = post(server.url("/"), "x").with(options);
            durable.fire(request).await.unwrap();
        }
        let retried = "mq_msgs WHERE state = 'waiting' AND attempts = 1 AND priority =";
        eventually_rows(&database, &format!("{retried} '{name}'"), 2).await;
    }
}

#[tokio::test]
async fn a_replay_and_a_resolution_keep_the_priority() {
    let database = migrated().await;
    let server = Server::always(500).await;
    let durable = builder(&database)
        .retry(quick().max_attempts(1))
        .build()
        .unwrap();
    let mut number = 0;
    for priority in PRIORITIES {
        for guarantee in [Guarantee::AtLeastOnce, Guarantee::AtMostOnce] {
            number += 1;
            let options = || Options::default().priority(priority).guarantee(guarantee);
            let awaited = post(server.url("/"), "x").with(options());
            let _ = in_time(durable.await_response(awaited)).await;
            let limited = options().limit_key("a \"key\"\\");
            let request = post(server.url("/"), "x").with(limited);
            let id = durable.fire(request).await.unwrap();
            outcome_of(&durable, id).await;
            end_three(&durable, &server.url("/"), number, options).await;
        }
    }
    durable.shutdown(LONG).await.unwrap();

    // Does not deliver them.
    let elsewhere = builder(&database).deliver(["another"]).build().unwrap();
    let all = DeadLetterFilter::default();
    let letters = elsewhere.dead_letters(&all).await.unwrap();
    let returned = letters.len();
    for letter in letters {
        if letter.status == Status::Ambiguous {
            let resolved = elsewhere.resolve(letter.id, Resolution::NotSent);
            resolved.await.unwrap();
        }
    }
    elsewhere.replay_all(&all).await.unwrap();
    assert_eq!(returned % 3, 0);
    assert!(returned >= 24, "{returned}");
    for name in NAMES {
        let kept = format!("mq_msgs WHERE priority = '{name}'");
        assert_eq!(rows(&database, &kept).await, returned as i64 / 3, "{name}");
    }
}

#[tokio::test]
async fn a_poll_reads_few_rows_of_each_priority_whatever_its_plan() {
    let database = migrated().await;
    let mut session = planned_while_empty(&database).await;
    let poll = "SELECT count(id) FROM requeuest.mq_poll(ARRAY['c'], 64)";
    // Planned while the table is empty.
    session.execute(poll).await.unwrap();
    let fill = |due: &str| {
        format!(
            "INSERT INTO requeuest.mq_msgs (
                 id, channel_name, channel_args, attempt_at, priority
             )
             SELECT gen_random_uuid(), 'c', lpad(to_hex(i), 4, '0') || '|d|x', {due},
                 ('{{high,normal,low}}'::requeuest.mq_priority[])[1 + i % 3]
             FROM generate_series(1, 20) again, generate_series(1, 1000) i"
        )
    };
    let mut read = async |fill: &str| -> i64 {
        session.execute(fill).await.unwrap();
        // Plans the statements that are only reached with this many rows.
        session.execute(poll).await.unwrap();
        session.execute("BEGIN").await.unwrap();
        session.execute(poll).await.unwrap();
        let read = sqlx::query_scalar(
            "SELECT idx_tup_fetch FROM pg_stat_xact_user_tables
             WHERE schemaname = 'requeuest' AND relname = 'mq_msgs'",
        )
        .fetch_one(&mut *session)
        .await
        .unwrap();
        session.execute("ROLLBACK").await.unwrap();
        read
    };
    let delayed = read(&fill("now() + interval '1 hour'")).await;
    assert!(delayed < 100, "{delayed} rows were read where none was due");
    let ready = read(&fill("now()")).await;
    assert!(ready < 5000, "{ready} rows were read to claim 64");
}
