//! What the runner's poll claims, and how long it then waits: the SQL by itself.

use std::time::{Duration, Instant};

use requeuest::testkit::TestDatabase;
use sqlx::{Executor, Row};
use uuid::Uuid;

use crate::support::{count, migrated};

/// Rows as the crate would insert them.
async fn enqueue(database: &TestDatabase, group: &str, ordered: bool, delay: &str, rows: i32) {
    sqlx::query(
        "select requeuest.enqueue(
             gen_random_uuid(), 'c', $1, $2, false, $3::interval, null, 'n', '{}', null, null, 0::smallint, null, null, null,
             null, null, false, true, false
         )
         from generate_series(1, $4)",
    )
    .bind(group)
    .bind(ordered)
    .bind(delay)
    .bind(rows)
    .execute(database.pool())
    .await
    .unwrap();
}

struct Polled {
    groups: Vec<String>,
    wait_ms: f64,
}

async fn poll(database: &TestDatabase, channels: Option<&[&str]>, batch: i32) -> Polled {
    let rows = sqlx::query(
        "select p.id, m.channel_args, extract(epoch from p.wait_time)::float8 * 1000 as wait_ms
         from requeuest.mq_poll($1, $2) p left join requeuest.mq_msgs m on m.id = p.id",
    )
    .bind(channels)
    .bind(batch)
    .fetch_all(database.pool())
    .await
    .unwrap();
    Polled {
        wait_ms: rows[0].get("wait_ms"),
        groups: rows
            .iter()
            .filter(|row| row.get::<Option<Uuid>, _>("id").is_some())
            .map(|row| row.get("channel_args"))
            .collect(),
    }
}

#[tokio::test]
async fn an_empty_queue_is_looked_at_every_second() {
    let database = migrated().await;
    for channels in [None, Some(&["c"][..])] {
        let polled = poll(&database, channels, 10).await;
        assert!(polled.groups.is_empty());
        assert!((polled.wait_ms - 1000.0).abs() < 1.0, "{}", polled.wait_ms);
    }
}

#[tokio::test]
async fn the_wait_is_until_the_next_due_time_within_its_bounds() {
    let database = migrated().await;
    enqueue(&database, "0000|d|x", false, "400 milliseconds", 1).await;
    let wait = poll(&database, None, 10).await.wait_ms;
    assert!((50.0..=400.0).contains(&wait), "{wait}");
    enqueue(&database, "0000|d|x", false, "1 millisecond", 1).await;
    // Not due yet or just due: never less than the least, and never negative.
    let polled = poll(&database, None, 10).await;
    assert!(polled.wait_ms >= 50.0, "{}", polled.wait_ms);
}

#[tokio::test]
async fn a_claimed_row_is_left_alone_for_its_lease() {
    let database = migrated().await;
    enqueue(&database, "0000|d|x", false, "0", 3).await;
    assert_eq!(poll(&database, None, 10).await.groups.len(), 3);
    let polled = poll(&database, None, 10).await;
    assert!(polled.groups.is_empty());
    assert!((50.0..=1000.0).contains(&polled.wait_ms));
    let fenced =
        "select count(*) from requeuest.mq_msgs where claim_no = 1 and attempts = 1 and state = 1";
    assert_eq!(count(&database, fenced).await, 3);
}

#[tokio::test]
async fn only_the_asked_for_channels_are_claimed() {
    let database = migrated().await;
    enqueue(&database, "0000|d|x", false, "0", 2).await;
    assert!(
        poll(&database, Some(&["other"]), 10)
            .await
            .groups
            .is_empty()
    );
    assert_eq!(
        poll(&database, Some(&["other", "c"]), 10)
            .await
            .groups
            .len(),
        2
    );
}

#[tokio::test]
async fn of_an_ordering_key_only_the_first_is_claimed() {
    let database = migrated().await;
    enqueue(&database, "0000|o|a", true, "0", 5).await;
    enqueue(&database, "0001|o|b", true, "0", 5).await;
    // Few rows and a backlog are claimed in different ways.
    for batch in [100, 2] {
        let mut groups = poll(&database, None, batch).await.groups;
        groups.sort();
        assert_eq!(groups, ["0000|o|a", "0001|o|b"], "batch {batch}");
        assert!(
            poll(&database, None, batch).await.groups.is_empty(),
            "leased heads block their keys"
        );
        sqlx::query("delete from requeuest.mq_msgs where state = 1")
            .execute(database.pool())
            .await
            .unwrap();
    }
    let order = "select count(*) from requeuest.mq_msgs where seq is not null";
    assert_eq!(count(&database, order).await, 6);
}

#[tokio::test]
async fn a_backlog_of_one_destination_does_not_hide_another() {
    let database = migrated().await;
    enqueue(&database, "8000|d|busy", false, "0", 2000).await;
    enqueue(&database, "4000|d|quiet", false, "0", 1).await;
    let groups = poll(&database, None, 16).await.groups;
    assert_eq!(groups.len(), 16);
    assert!(
        groups.iter().any(|group| group == "4000|d|quiet"),
        "{groups:?}"
    );
}

#[tokio::test]
async fn a_backlog_goes_by_age_for_the_most_part() {
    let database = migrated().await;
    enqueue(&database, "8000|d|oldest", false, "0", 100).await;
    for group in 0..50 {
        enqueue(&database, &format!("{group:04}|d|newer"), false, "0", 20).await;
    }
    for _ in 0..4 {
        let groups = poll(&database, None, 16).await.groups;
        assert_eq!(groups.len(), 16);
        let oldest = groups.iter().filter(|group| *group == "8000|d|oldest");
        // Of a batch of 16 four go to groups that have none by age.
        assert_eq!(oldest.count(), 12, "{groups:?}");
    }
}

#[tokio::test]
async fn polls_of_a_backlog_at_once_are_filled_with_different_rows() {
    const POLLS: i32 = 8;
    const BATCH: i32 = 64;
    let database = migrated().await;
    for group in 0..10 {
        enqueue(&database, &format!("{group:04}|d|x"), false, "0", 400).await;
    }
    let polls = (0..POLLS).map(|_| poll(&database, None, BATCH));
    for polled in futures_util::future::join_all(polls).await {
        assert_eq!(polled.groups.len(), BATCH as usize);
    }
    let claimed = "select count(*) from requeuest.mq_msgs where claim_no = 1 and state = 1";
    assert_eq!(count(&database, claimed).await, i64::from(POLLS * BATCH));
    let twice = "select count(*) from requeuest.mq_msgs where claim_no > 1";
    assert_eq!(count(&database, twice).await, 0);
}

#[tokio::test]
async fn a_single_due_row_is_found_among_many_delayed_groups() {
    let database = migrated().await;
    sqlx::query(
        "select requeuest.enqueue(
             gen_random_uuid(), 'c', lpad(to_hex(i), 4, '0') || '|d|x', false, false, '1 hour', null, 'n', '{}', null, null,
             0::smallint, null, null, null, null, null, false, true, false
         )
         from generate_series(1, 3000) i",
    )
    .execute(database.pool())
    .await
    .unwrap();
    enqueue(&database, "0800|d|due", false, "0", 1).await;
    assert_eq!(poll(&database, None, 4).await.groups, ["0800|d|due"]);
}

#[tokio::test]
async fn two_polls_at_once_claim_different_rows() {
    let database = migrated().await;
    enqueue(&database, "0000|d|x", false, "0", 40).await;
    let (one, other) = tokio::join!(poll(&database, None, 20), poll(&database, None, 20));
    assert!(one.groups.len() + other.groups.len() <= 40);
    let twice = "select count(*) from requeuest.mq_msgs where claim_no > 1";
    assert_eq!(count(&database, twice).await, 0);
    let claimed = "select count(*) from requeuest.mq_msgs where claim_no = 1";
    assert_eq!(
        count(&database, claimed).await as usize,
        one.groups.len() + other.groups.len()
    );
}

#[tokio::test]
async fn a_row_without_a_payload_reaches_a_terminal_status() {
    let database = migrated().await;
    let id = Uuid::now_v7();
    sqlx::query(
        "insert into requeuest.mq_msgs (id, channel_name, channel_args, attempt_at) values ($1, 'default', '0000|d|x', clock_timestamp())",
    )
    .bind(id)
    .execute(database.pool())
    .await
    .unwrap();
    let durable = requeuest::Durable::new(database.pool().clone());
    let outcome = requeuest::testkit::outcome(&durable, id.into(), crate::support::LONG)
        .await
        .unwrap();
    assert_eq!(outcome.status(), requeuest::Status::Discarded);
}

#[tokio::test]
async fn outcomes_and_attempts_go_when_they_have_outlived_their_retention() {
    let database = migrated().await;
    let next_slot = "(requeuest.outcome_slot(clock_timestamp(), '1 day') + 1) % 16";
    for (slot, expires) in [
        (next_slot, "- interval '1 hour'"),
        (next_slot, "+ interval '1 hour'"),
        ("-1", "- interval '1 hour'"),
    ] {
        sqlx::query(&format!(
            "insert into requeuest.outcomes
                 (slot, id, channel_name, channel_args, status, attempts, created_at, finished_at, expires_at)
             values ({slot}, gen_random_uuid(), 'c', 'g', 'completed', 1, now(), now(), now() {expires})"
        ))
        .execute(database.pool())
        .await
        .unwrap();
    }
    let outcomes = "select count(*) from requeuest.outcomes";
    let prune = "select requeuest.prune_outcomes('1 day')::bigint";
    assert_eq!(
        count(&database, prune).await,
        0,
        "one of the slot's rows is still wanted"
    );
    assert_eq!(count(&database, outcomes).await, 3);
    sqlx::query(
        "update requeuest.outcomes set expires_at = now() - interval '1 second' where slot >= 0",
    )
    .execute(database.pool())
    .await
    .unwrap();
    assert_eq!(count(&database, prune).await, 1);
    assert_eq!(count(&database, outcomes).await, 1, "what is kept is kept");
}

#[tokio::test]
async fn in_a_backlog_a_session_looks_for_lapsed_leases_once_a_second() {
    let database = migrated().await;
    enqueue(&database, "0000|d|x", false, "0", 500).await;
    let mut session = database.pool().acquire().await.unwrap();
    let mut lapsed_of = async |lapse: bool| -> i64 {
        if lapse {
            sqlx::query(
                "update requeuest.mq_msgs set state = 1, claim_no = 1, attempt_at = now() - interval '1 hour'
                 where id in (select id from requeuest.mq_msgs where state = 0 limit 3)",
            )
            .execute(&mut *session)
            .await
            .unwrap();
        }
        let claimed = "select count(*) from requeuest.mq_poll(array['c'], 10) where payload_json ~ '\"claim_no\":2,'";
        sqlx::query_scalar(claimed)
            .fetch_one(&mut *session)
            .await
            .unwrap()
    };
    assert_eq!(lapsed_of(true).await, 3);
    // Not again so soon, but in time.
    let looked = Instant::now();
    let mut found = lapsed_of(true).await;
    while found == 0 {
        assert!(looked.elapsed() < Duration::from_secs(5));
        tokio::time::sleep(Duration::from_millis(50)).await;
        found = lapsed_of(false).await;
    }
    assert_eq!(found, 3);
    assert!(looked.elapsed() > Duration::from_millis(900));
}

/// How many rows a poll of 64 reads, of 20,000 in a thousand groups, that was planned for what `before` left.
async fn read_when_planned_after(before: &[&str]) -> i64 {
    let database = migrated().await;
    let mut session = database.pool().acquire().await.unwrap();
    let poll = "select count(*) from requeuest.mq_poll(array['c'], 64)";
    let mut statements = vec![
        // As the crate's own sessions have it.
        "set plan_cache_mode = force_generic_plan",
        "set enable_seqscan = off",
        "set enable_hashjoin = off",
        "set enable_mergejoin = off",
        "alter table requeuest.mq_msgs set (autovacuum_enabled = false)",
    ];
    statements.extend(before);
    statements.extend([
        poll,
        "insert into requeuest.mq_msgs (id, channel_name, channel_args, attempt_at)
         select gen_random_uuid(), 'c', lpad(to_hex(i), 4, '0') || '|d|x', now()
         from generate_series(1, 20) again, generate_series(1, 1000) i",
        // What can only be planned when there are so many is.
        poll,
        "begin",
        poll,
    ]);
    for statement in statements {
        session.execute(statement).await.unwrap();
    }
    let read = sqlx::query_scalar(
        "select idx_tup_fetch from pg_stat_xact_user_tables where schemaname = 'requeuest' and relname = 'mq_msgs'",
    )
    .fetch_one(&mut *session)
    .await
    .unwrap();
    session.execute("rollback").await.unwrap();
    read
}

#[tokio::test]
async fn a_poll_skips_through_many_groups_whatever_it_was_planned_for() {
    let one_group = "insert into requeuest.mq_msgs (id, channel_name, channel_args, attempt_at)
                     select gen_random_uuid(), 'c', '0000|d|x', clock_timestamp() from generate_series(1, 50000)";
    let read = read_when_planned_after(&[one_group, "vacuum analyze requeuest.mq_msgs"]).await;
    assert!(read < 3000, "one group: {read} rows were read to claim 64");
    let read = read_when_planned_after(&[
        one_group,
        "delete from requeuest.mq_msgs",
        "analyze requeuest.mq_msgs",
    ])
    .await;
    assert!(read < 3000, "nothing: {read} rows were read to claim 64");
    let read = read_when_planned_after(&[]).await;
    assert!(
        read < 3000,
        "a new table: {read} rows were read to claim 64"
    );
}
