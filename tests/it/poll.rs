//! What `mq_poll` claims, and how long a runner then waits: the SQL without the runner.

use std::time::{Duration, Instant};

use requeuest::testkit::{self, TestDatabase};
use requeuest::{Durable, Status};
use sqlx::pool::PoolConnection;
use sqlx::{Executor, Postgres, Row};
use uuid::Uuid;

use crate::support::{LONG, count, eventually, migrated, rows};

/// Inserts rows as the crate does.
async fn enqueue(database: &TestDatabase, group: &str, ordered: bool, delay: &str, rows: i32) {
    sqlx::query(
        "SELECT requeuest.enqueue(
             gen_random_uuid(), 'c', $1, $2, false, $3::interval, NULL, 'n', '{}', NULL, NULL,
             'waiting', NULL, NULL, NULL, NULL, NULL, false, true, false
         )
         FROM generate_series(1, $4)",
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
        "SELECT p.id, m.channel_args, extract(epoch FROM p.wait_time)::float8 * 1000 AS wait_ms
         FROM requeuest.mq_poll($1, $2) p LEFT JOIN requeuest.mq_msgs m ON m.id = p.id",
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
async fn an_empty_queue_is_polled_every_second() {
    let database = migrated().await;
    for channels in [None, Some(&["c"][..])] {
        let polled = poll(&database, channels, 10).await;
        assert!(polled.groups.is_empty());
        assert!((polled.wait_ms - 1000.0).abs() < 1.0, "{}", polled.wait_ms);
    }
}

#[tokio::test]
async fn the_wait_lasts_until_the_next_due_time_within_bounds() {
    let database = migrated().await;
    enqueue(&database, "0000|d|x", false, "400 milliseconds", 1).await;
    let wait = poll(&database, None, 10).await.wait_ms;
    assert!((50.0..=400.0).contains(&wait), "{wait}");
    enqueue(&database, "0000|d|x", false, "1 millisecond", 1).await;
    // Not due yet or just due: the wait is never shorter than the minimum, and never negative.
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
    let claimed = "mq_msgs WHERE claim_no = 1 AND attempts = 1 AND state = 'claimed'";
    assert_eq!(rows(&database, claimed).await, 3);
}

#[tokio::test]
async fn a_due_row_that_is_locked_is_looked_at_again_soon_and_then_less_often() {
    let database = migrated().await;
    enqueue(&database, "0000|d|x", false, "1 minute", 1).await;
    for due_for in [1.0, 300.0, 60_000.0] {
        let began = Instant::now();
        sqlx::query(
            "UPDATE requeuest.mq_msgs
             SET attempt_at = clock_timestamp() - $1 * interval '1 millisecond'",
        )
        .bind(due_for)
        .execute(database.pool())
        .await
        .unwrap();
        // As a caller does that asks for the outcome.
        let mut watching = database.pool().begin().await.unwrap();
        watching
            .execute("UPDATE requeuest.mq_msgs SET waiter = gen_random_uuid()")
            .await
            .unwrap();
        for channels in [None, Some(&["c"][..])] {
            let polled = poll(&database, channels, 10).await;
            assert!(polled.groups.is_empty());
            let longest = due_for + began.elapsed().as_secs_f64() * 1000.0;
            let expected = due_for.clamp(50.0, 1000.0)..=longest.clamp(50.0, 1000.0);
            assert!(expected.contains(&polled.wait_ms), "{}", polled.wait_ms);
        }
        watching.commit().await.unwrap();
    }
    assert_eq!(poll(&database, None, 10).await.groups.len(), 1);
}

#[tokio::test]
async fn a_locked_row_of_a_limited_destination_is_looked_at_again_soon_too() {
    let database = migrated().await;
    enqueue(&database, "0000|d|x", false, "1 minute", 1).await;
    for state in ["waiting", "deferred"] {
        let due = "UPDATE requeuest.mq_msgs
             SET attempt_at = clock_timestamp(), destination = 'x', state = $1::requeuest.mq_state";
        let due = sqlx::query(due).bind(state);
        due.execute(database.pool()).await.unwrap();
        // As a caller does that asks for the outcome.
        let mut watching = database.pool().begin().await.unwrap();
        watching
            .execute("UPDATE requeuest.mq_msgs SET waiter = gen_random_uuid()")
            .await
            .unwrap();
        let began = Instant::now();
        let mut polling = database.pool().begin().await.unwrap();
        let room = r#"SET LOCAL requeuest.room = '{"x": 5}'"#;
        polling.execute(room).await.unwrap();
        for channels in ["NULL", "'{c}'"] {
            let poll = format!(
                "SELECT id, extract(epoch FROM wait_time)::float8
                 FROM requeuest.mq_poll({channels})"
            );
            let poll = sqlx::query_as(&poll).fetch_one(&mut *polling);
            let (id, wait): (Option<Uuid>, f64) = poll.await.unwrap();
            assert_eq!(id, None);
            let longest = 0.05 + began.elapsed().as_secs_f64();
            assert!((0.05..=longest).contains(&wait), "{state}: {wait}");
        }
        polling.rollback().await.unwrap();
        watching.rollback().await.unwrap();
    }
}

#[tokio::test]
async fn a_limited_destination_with_room_gets_a_share_beside_many_backlogs() {
    let database = migrated().await;
    for group in 0..40 {
        enqueue(&database, &format!("{group:04}|d|{group}"), false, "0", 8).await;
    }
    enqueue(&database, "0001|d|limited", false, "0", 8).await;
    database
        .pool()
        .execute(
            "UPDATE requeuest.mq_msgs SET state = 'deferred', destination = 'limited'
             WHERE channel_args = '0001|d|limited'",
        )
        .await
        .unwrap();
    let mut polling = database.pool().begin().await.unwrap();
    let room = r#"SET LOCAL requeuest.room = '{"limited": 4}'"#;
    polling.execute(room).await.unwrap();
    for _ in 0..2 {
        let claimed = "SELECT m.channel_args = '0001|d|limited' AS limited
             FROM requeuest.mq_poll(NULL, 16) p JOIN requeuest.mq_msgs m ON m.id = p.id";
        let claimed: Vec<bool> = sqlx::query_scalar(claimed)
            .fetch_all(&mut *polling)
            .await
            .unwrap();
        assert_eq!(claimed.len(), 16);
        assert_eq!(claimed.iter().filter(|limited| **limited).count(), 4);
    }
}

#[tokio::test]
async fn the_wait_lasts_until_the_process_has_room_for_limited_destinations() {
    let database = migrated().await;
    enqueue(&database, "0000|d|x", false, "0", 20).await;
    database
        .pool()
        .execute("UPDATE requeuest.mq_msgs SET state = 'deferred', destination = 'x'")
        .await
        .unwrap();
    // The first poll is told of no attempt under way. It brings some.
    for (soon, expected) in [("", 50.0), ("50", 50.0), ("200", 200.0)] {
        let mut polling = database.pool().begin().await.unwrap();
        let told = format!(
            r#"SET LOCAL requeuest.room = '{{"x": 4}}'; SET LOCAL requeuest.soon = '{soon}'"#
        );
        polling.execute(&*told).await.unwrap();
        let polled = "SELECT extract(epoch FROM wait_time)::float8 * 1000
             FROM requeuest.mq_poll(NULL, 16) WHERE id IS NOT NULL";
        let waits: Vec<f64> = sqlx::query_scalar(polled)
            .fetch_all(&mut *polling)
            .await
            .unwrap();
        assert_eq!(waits, [expected; 4], "{soon}");
    }
}

#[tokio::test]
async fn only_requested_channels_are_claimed() {
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
async fn only_the_first_of_an_ordering_key_is_claimed() {
    let database = migrated().await;
    enqueue(&database, "0000|o|a", true, "0", 5).await;
    enqueue(&database, "0001|o|b", true, "0", 5).await;
    // A poll claims few rows and a backlog in different ways.
    for batch in [100, 2] {
        let mut groups = poll(&database, None, batch).await.groups;
        groups.sort();
        assert_eq!(groups, ["0000|o|a", "0001|o|b"], "batch {batch}");
        assert!(
            poll(&database, None, batch).await.groups.is_empty(),
            "leased heads block their keys"
        );
        sqlx::query("DELETE FROM requeuest.mq_msgs WHERE state = 'claimed'")
            .execute(database.pool())
            .await
            .unwrap();
    }
    assert_eq!(rows(&database, "mq_msgs WHERE seq IS NOT NULL").await, 6);
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
async fn ordering_keys_of_a_closed_destination_are_moved_out_of_the_way() {
    let database = migrated().await;
    enqueue(&database, "8000|d|shut", false, "0", 2000).await;
    for key in 0..100 {
        enqueue(&database, &format!("{key:04}|c|key"), true, "0", 2).await;
    }
    enqueue(&database, "9000|d|open", false, "0", 1).await;
    sqlx::raw_sql(
        "UPDATE requeuest.mq_msgs SET destination = 'shut' WHERE seq IS NOT NULL;
         INSERT INTO requeuest.destinations (name, closed_until) VALUES ('shut', 'infinity');",
    )
    .execute(database.pool())
    .await
    .unwrap();
    assert_eq!(poll(&database, None, 32).await.groups, ["9000|d|open"]);
    // Polls visit keys also where older requests of the same destination fill their view.
    let deferred = "mq_msgs WHERE seq IS NOT NULL AND state = 'deferred'";
    assert!(rows(&database, deferred).await >= 31);
    eventually("all keys are out of the way", || async {
        assert!(poll(&database, None, 32).await.groups.is_empty());
        rows(&database, deferred).await == 100
    })
    .await;
    let others = "mq_msgs WHERE seq IS NULL AND state = 'waiting'";
    assert!(rows(&database, others).await > 500);
    let heads = "SELECT count(*) FROM requeuest.mq_msgs m
                 WHERE m.state = 'deferred' AND m.seq > (
                     SELECT min(a.seq) FROM requeuest.mq_msgs a
                     WHERE a.channel_args = m.channel_args
                 )";
    assert_eq!(count(&database, heads).await, 0);
}

#[tokio::test]
async fn most_of_a_backlog_is_claimed_by_age() {
    let database = migrated().await;
    enqueue(&database, "8000|d|oldest", false, "0", 100).await;
    for group in 0..50 {
        enqueue(&database, &format!("{group:04}|d|newer"), false, "0", 20).await;
    }
    for _ in 0..4 {
        let groups = poll(&database, None, 16).await.groups;
        assert_eq!(groups.len(), 16);
        let oldest = groups.iter().filter(|group| *group == "8000|d|oldest");
        // Of a batch of 16, four rows are from groups that have none by age.
        assert_eq!(oldest.count(), 12, "{groups:?}");
    }
}

#[tokio::test]
async fn concurrent_polls_of_a_backlog_fill_with_different_rows() {
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
    let claimed = "mq_msgs WHERE claim_no = 1 AND state = 'claimed'";
    assert_eq!(rows(&database, claimed).await, i64::from(POLLS * BATCH));
    assert_eq!(rows(&database, "mq_msgs WHERE claim_no > 1").await, 0);
}

#[tokio::test]
async fn a_single_due_row_is_found_among_many_delayed_groups() {
    let database = migrated().await;
    sqlx::query(
        "SELECT requeuest.enqueue(
             gen_random_uuid(), 'c', lpad(to_hex(i), 4, '0') || '|d|x', false, false, '1 hour',
             NULL, 'n', '{}', NULL, NULL, 'waiting', NULL, NULL, NULL, NULL, NULL, false, true,
             false
         )
         FROM generate_series(1, 3000) i",
    )
    .execute(database.pool())
    .await
    .unwrap();
    enqueue(&database, "0800|d|due", false, "0", 1).await;
    assert_eq!(poll(&database, None, 4).await.groups, ["0800|d|due"]);
}

#[tokio::test]
async fn two_concurrent_polls_claim_different_rows() {
    let database = migrated().await;
    enqueue(&database, "0000|d|x", false, "0", 40).await;
    let (one, other) = tokio::join!(poll(&database, None, 20), poll(&database, None, 20));
    assert!(one.groups.len() + other.groups.len() <= 40);
    assert_eq!(rows(&database, "mq_msgs WHERE claim_no > 1").await, 0);
    let claimed = "mq_msgs WHERE claim_no = 1";
    assert_eq!(
        rows(&database, claimed).await as usize,
        one.groups.len() + other.groups.len()
    );
}

#[tokio::test]
async fn a_row_without_a_payload_reaches_a_terminal_status() {
    let database = migrated().await;
    let id = Uuid::now_v7();
    sqlx::query(
        "INSERT INTO requeuest.mq_msgs (id, channel_name, channel_args, attempt_at)
         VALUES ($1, 'default', '0000|d|x', clock_timestamp())",
    )
    .bind(id)
    .execute(database.pool())
    .await
    .unwrap();
    let durable = Durable::new(database.pool().clone());
    let outcome = testkit::outcome(&durable, id.into(), LONG).await.unwrap();
    assert_eq!(outcome.status(), Status::Discarded);
}

#[tokio::test]
async fn under_backlog_lapsed_leases_are_checked_once_a_second() {
    let database = migrated().await;
    enqueue(&database, "0000|d|x", false, "0", 500).await;
    let mut session = database.pool().acquire().await.unwrap();
    let mut lapsed_of = async |lapse: bool| -> i64 {
        if lapse {
            sqlx::query(
                "UPDATE requeuest.mq_msgs
                 SET state = 'claimed', claim_no = 1, attempt_at = now() - interval '1 hour'
                 WHERE id IN (SELECT id FROM requeuest.mq_msgs WHERE state = 'waiting' LIMIT 3)",
            )
            .execute(&mut *session)
            .await
            .unwrap();
        }
        let claimed = "SELECT count(*) FROM requeuest.mq_poll(ARRAY['c'], 10)
                       WHERE payload_json ~ '\"claim_no\":2,'";
        sqlx::query_scalar(claimed)
            .fetch_one(&mut *session)
            .await
            .unwrap()
    };
    // Before the first look, because a busy machine may take long to say that it has ended.
    let looked = Instant::now();
    assert_eq!(lapsed_of(true).await, 3);
    // The session doesn't look again at once, but after a second.
    let mut found = lapsed_of(true).await;
    while found == 0 {
        assert!(looked.elapsed() < Duration::from_secs(5));
        tokio::time::sleep(Duration::from_millis(50)).await;
        found = lapsed_of(false).await;
    }
    assert_eq!(found, 3);
    assert!(looked.elapsed() > Duration::from_millis(900));
}

/// A session whose plans are made for an empty table, and kept.
pub(crate) async fn planned_while_empty(database: &TestDatabase) -> PoolConnection<Postgres> {
    let mut session = database.pool().acquire().await.unwrap();
    for statement in [
        // The crate's own sessions have these settings.
        "SET plan_cache_mode = force_generic_plan",
        "SET enable_seqscan = off",
        "SET enable_hashjoin = off",
        "SET enable_mergejoin = off",
        "ALTER TABLE requeuest.mq_msgs SET (autovacuum_enabled = false)",
        "VACUUM ANALYZE requeuest.mq_msgs",
    ] {
        session.execute(statement).await.unwrap();
    }
    session
}

#[tokio::test]
async fn what_is_behind_is_not_read_again() {
    let database = migrated().await;
    let mut session = planned_while_empty(&database).await;
    let poll = "SELECT count(*) FROM requeuest.mq_poll(ARRAY['c'], 64)";
    let mend = "SELECT requeuest.mend_behind(1000)";
    let end = "SELECT requeuest.mq_delete(ARRAY(
                   SELECT id FROM requeuest.mq_msgs
                   WHERE state = 'waiting' AND attempt_at > now() LIMIT 50
               ))";
    let key = |keys: &str, rows: i32, due: &str| {
        format!(
            "INSERT INTO requeuest.mq_msgs (id, channel_name, channel_args, attempt_at, seq)
             SELECT gen_random_uuid(), 'c', lpad(to_hex(n), 4, '0') || '|c|x', {due},
                 nextval('requeuest.mq_seq')
             FROM generate_series(1, {rows}), generate_series({keys}) n"
        )
    };
    let first = "now() + interval '1 hour'";
    let (one, many) = ("0, 0", "1, 500");
    let fills = [one, many].map(|keys| {
        let behind = if keys == one { 50 } else { 40 };
        key(keys, 1, first) + ";" + &key(keys, behind, "now()")
    });
    // With one key, all statements are planned.
    for statement in [&*fills[0], poll, mend, end, poll, &fills[1]] {
        sqlx::raw_sql(statement)
            .execute(&mut *session)
            .await
            .unwrap();
    }
    let mut read = async |statement: &str| -> i64 {
        // Within a transaction the counters only rise.
        let counters = "SELECT idx_tup_fetch + seq_tup_read FROM pg_stat_xact_user_tables
                        WHERE schemaname = 'requeuest' AND relname = 'mq_msgs'";
        session.execute("BEGIN").await.unwrap();
        let before: i64 = sqlx::query_scalar(counters)
            .fetch_one(&mut *session)
            .await
            .unwrap();
        session.execute(statement).await.unwrap();
        let after: i64 = sqlx::query_scalar(counters)
            .fetch_one(&mut *session)
            .await
            .unwrap();
        session.execute("COMMIT").await.unwrap();
        // Leaves no dead rows to step over.
        session.execute("VACUUM requeuest.mq_msgs").await.unwrap();
        after - before
    };
    let due =
        "SELECT count(*) FROM requeuest.mq_msgs WHERE state = 'waiting' AND attempt_at <= now()";
    let mut left = count(&database, due).await;
    while left > 16 {
        let read = read(poll).await;
        let now_left = count(&database, due).await;
        let moved = left - now_left;
        assert!(moved > 500, "{moved} rows were moved");
        assert!(read < 8 * moved, "{read} rows were read to move {moved}");
        left = now_left;
    }
    for (statement, most) in [(poll, 300), (mend, 2000), (end, 1000), (poll, 2000)] {
        let read = read(statement).await;
        assert!(read < most, "{read} rows were read by {statement}");
    }
    assert_eq!(
        rows(&database, "mq_msgs WHERE state = 'claimed'").await,
        1 + 50
    );
}

/// How many rows a poll of 64 reads, of 20,000 rows in a thousand groups, if its plan was made for
/// what the statements `before` left in the table.
async fn read_when_planned_after(before: &[&str]) -> i64 {
    let database = migrated().await;
    let mut session = database.pool().acquire().await.unwrap();
    let poll = "SELECT count(*) FROM requeuest.mq_poll(ARRAY['c'], 64)";
    let mut statements = vec![
        // The crate's own sessions have these settings.
        "SET plan_cache_mode = force_generic_plan",
        "SET enable_seqscan = off",
        "SET enable_hashjoin = off",
        "SET enable_mergejoin = off",
        "ALTER TABLE requeuest.mq_msgs SET (autovacuum_enabled = false)",
    ];
    statements.extend(before);
    statements.extend([
        poll,
        "INSERT INTO requeuest.mq_msgs (id, channel_name, channel_args, attempt_at)
         SELECT gen_random_uuid(), 'c', lpad(to_hex(i), 4, '0') || '|d|x', now()
         FROM generate_series(1, 20) again, generate_series(1, 1000) i",
        // Plans the statements that are only reached with this many rows.
        poll,
        "BEGIN",
        poll,
    ]);
    for statement in statements {
        session.execute(statement).await.unwrap();
    }
    let read = sqlx::query_scalar(
        "SELECT idx_tup_fetch FROM pg_stat_xact_user_tables
         WHERE schemaname = 'requeuest' AND relname = 'mq_msgs'",
    )
    .fetch_one(&mut *session)
    .await
    .unwrap();
    session.execute("ROLLBACK").await.unwrap();
    read
}

#[tokio::test]
async fn a_poll_skips_through_many_groups_whatever_its_plan() {
    let one_group = "INSERT INTO requeuest.mq_msgs (id, channel_name, channel_args, attempt_at)
                     SELECT gen_random_uuid(), 'c', '0000|d|x', clock_timestamp()
                     FROM generate_series(1, 50000)";
    let read = read_when_planned_after(&[one_group, "VACUUM ANALYZE requeuest.mq_msgs"]).await;
    assert!(read < 3000, "one group: {read} rows were read to claim 64");
    let read = read_when_planned_after(&[
        one_group,
        "DELETE FROM requeuest.mq_msgs",
        "ANALYZE requeuest.mq_msgs",
    ])
    .await;
    assert!(read < 3000, "nothing: {read} rows were read to claim 64");
    let read = read_when_planned_after(&[]).await;
    assert!(
        read < 3000,
        "a new table: {read} rows were read to claim 64"
    );
}

#[tokio::test]
async fn a_poll_of_all_channels_reads_few_rows_and_reaches_each_channel() {
    const CHANNELS: i64 = 300;
    const POLLS: i64 = 15;
    let database = migrated().await;
    database
        .pool()
        .execute(
            "INSERT INTO requeuest.mq_msgs (id, channel_name, channel_args, attempt_at)
             SELECT gen_random_uuid(), 'c' || n % 300, '0000|d|x',
                 now() - (30000 - n) * interval '1 millisecond'
             FROM generate_series(1, 30000) n",
        )
        .await
        .unwrap();
    let mut session = database.pool().acquire().await.unwrap();
    for statement in [
        "SET enable_seqscan = off",
        "SET plan_cache_mode = force_generic_plan",
        "BEGIN",
    ] {
        session.execute(statement).await.unwrap();
    }
    // Each poll looks at 64 channels.
    for _ in 0..POLLS {
        let claimed: i64 = sqlx::query_scalar("SELECT count(id) FROM requeuest.mq_poll(NULL, 64)")
            .fetch_one(&mut *session)
            .await
            .unwrap();
        assert_eq!(claimed, 64);
    }
    let read: i64 = sqlx::query_scalar(
        "SELECT idx_tup_fetch FROM pg_stat_xact_user_tables
         WHERE schemaname = 'requeuest' AND relname = 'mq_msgs'",
    )
    .fetch_one(&mut *session)
    .await
    .unwrap();
    assert!(read < POLLS * 3000, "{read} rows were read");
    let reached =
        "SELECT count(DISTINCT channel_name) FROM requeuest.mq_msgs WHERE state = 'claimed'";
    let reached: i64 = sqlx::query_scalar(reached)
        .fetch_one(&mut *session)
        .await
        .unwrap();
    assert_eq!(reached, CHANNELS);
    session.execute("ROLLBACK").await.unwrap();
}

#[tokio::test]
async fn a_poll_of_all_channels_finds_the_few_rows_that_are_due() {
    let database = migrated().await;
    database
        .pool()
        .execute(
            "INSERT INTO requeuest.mq_msgs (id, channel_name, channel_args, attempt_at)
             SELECT gen_random_uuid(), 'c' || n, '0000|d|x', now() + interval '1 hour'
             FROM generate_series(1, 300) n",
        )
        .await
        .unwrap();
    let mut session = database.pool().acquire().await.unwrap();
    for channel in ["c7", "c150", "c299", "c1", "c8"] {
        for rows in [1, 100] {
            sqlx::query(
                "INSERT INTO requeuest.mq_msgs (id, channel_name, channel_args, attempt_at)
                 SELECT gen_random_uuid(), $1, '0000|d|x', now() FROM generate_series(1, $2)",
            )
            .bind(channel)
            .bind(rows)
            .execute(database.pool())
            .await
            .unwrap();
            let poll = "SELECT count(id) FROM requeuest.mq_poll(NULL, 128)";
            let claimed: i64 = sqlx::query_scalar(poll)
                .fetch_one(&mut *session)
                .await
                .unwrap();
            assert_eq!(claimed, i64::from(rows), "{channel}");
        }
    }
}

#[tokio::test]
async fn a_poll_claims_only_the_formats_that_its_session_knows() {
    let database = migrated().await;
    // Newer rows in each place where a poll looks, and more of them than it looks at.
    sqlx::query(
        "INSERT INTO requeuest.mq_msgs (
             id, channel_name, channel_args, attempt_at, seq, state, deadline, format
         )
         SELECT gen_random_uuid(), 'c', lpad(to_hex(i), 4, '0') || '|d|x',
             now() - interval '1 hour', NULL,
             (ARRAY['waiting', 'claimed', 'held', 'sending_once', 'parked'])[1 + i % 5]
                 ::requeuest.mq_state,
             now() - interval '1 minute', 2
         FROM generate_series(1, 2000) i
         UNION ALL
         SELECT gen_random_uuid(), 'c', '0000|o|newer', now() - interval '1 hour',
             nextval('requeuest.mq_seq'), 'waiting', NULL, 2",
    )
    .execute(database.pool())
    .await
    .unwrap();
    enqueue(&database, "0000|o|newer", true, "0", 1).await;
    enqueue(&database, "0001|d|mine", false, "0", 20).await;
    let untouched = "mq_msgs WHERE format = 2 AND claim_no = 0 AND attempts = 0";

    let poll = "SELECT count(id) FROM requeuest.mq_poll($1, 32)";
    for channels in [Some(vec!["c"]), None] {
        let claimed: i64 = sqlx::query_scalar(poll)
            .bind(&channels)
            .fetch_one(database.pool())
            .await
            .unwrap();
        let mine = if channels.is_some() { 20 } else { 0 };
        assert_eq!(claimed, mine, "{channels:?}");
        assert_eq!(rows(&database, untouched).await, 2001);
    }
    assert_eq!(rows(&database, "outcomes").await, 0, "none is given up");

    // A session of a newer version, which knows both.
    let mut connection = database.pool().acquire().await.unwrap();
    sqlx::query("SET requeuest.formats = '{1,2}'")
        .execute(&mut *connection)
        .await
        .unwrap();
    let claimed: i64 = sqlx::query_scalar(poll)
        .bind(vec!["c"])
        .fetch_one(&mut *connection)
        .await
        .unwrap();
    assert_eq!(claimed, 32);
}
