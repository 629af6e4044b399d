//! Rows with numbers, times and sizes that nothing but damage or a hand explains. Such a row fails
//! no poll, expiry, settle or sweep of the others, and ends itself where that is possible.

use std::time::Duration;

use requeuest::testkit::TestDatabase;
use requeuest::{DeadLetterFilter, Durable, Options, RequestId, Status, Uuid};
use sqlx::Executor;

use crate::support::{
    LONG, Server, builder, count, eventually, eventually_rows, in_time, migrated, other_process,
    outcome_of, post, quick, rows,
};

pub async fn damage(database: &TestDatabase, id: RequestId, table: &str, damage: &str) {
    let change = format!("UPDATE requeuest.{table} SET {damage} WHERE id = $1");
    let changed = sqlx::query(&change)
        .bind(Uuid::from(id))
        .execute(database.pool())
        .await
        .unwrap();
    assert_eq!(changed.rows_affected(), 1, "{damage}");
}

/// Damages of a row in the queue. `due` stands for a state and a time in which a poll claims it.
const DAMAGES: [&str; 19] = [
    "due, claim_no = 2147483647",
    "due, claim_no = 2147483646",
    "due, claim_no = -2147483648",
    "due, attempts = 2147483647",
    "due, attempts = -2147483648",
    "due, lost = 32767",
    "due, lost = -32768",
    "due, created_at = 'infinity'",
    "due, created_at = '-infinity'",
    "due, created_at = '4713-01-01 BC'",
    "due, created_at = '294276-12-31'",
    "due, deadline = 'infinity'",
    "due, deadline = '-infinity'",
    "due, deadline = '294276-12-31'",
    "due, deadline = '4713-01-01 BC'",
    "due, channel_args = '7065|c|' || id, seq = 9223372036854775807",
    "due, channel_args = '7065|c|' || id, seq = -9223372036854775808",
    "due, suspected_at = 'infinity', lost = 1",
    "due, channel_name = repeat('x', 100), channel_args = '706|c|' || id, deadline = now(), seq=1",
];

const DUE: [&str; 4] = [
    "state = 'waiting', attempt_at = '-infinity'",
    "state = 'claimed', attempt_at = '4713-01-01 BC'",
    "state = 'held', attempt_at = '-infinity'",
    "state = 'parked', attempt_at = '-infinity'",
];

async fn is_over(durable: &Durable, id: RequestId) -> bool {
    let status = durable.status(id).await.unwrap().unwrap();
    status == Status::Parked || status.is_terminal()
}

#[tokio::test]
async fn no_number_or_time_of_a_row_fails_a_poll_for_the_others() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let there = other_process(&database).await;
    let mut damaged = Vec::new();
    for change in DAMAGES {
        for due in DUE {
            let id = there.fire(post(server.url("/"), "bad")).await.unwrap();
            let change = change.replace("due", due);
            damage(&database, id, "mq_msgs", &change).await;
            damaged.push((id, change));
        }
    }
    // Never due again, and never in the way of other suspects.
    let lost = there.fire(post(server.url("/"), "lost")).await.unwrap();
    let never = "state = 'claimed', attempt_at = 'infinity', suspected_at = 'infinity', lost = 1";
    damage(&database, lost, "mq_msgs", never).await;
    let durable = builder(&database).retry(quick()).build().unwrap();
    for _ in 0..3 {
        let id = there.fire(post(server.url("/"), "good")).await.unwrap();
        assert_eq!(outcome_of(&durable, id).await.status(), Status::Completed);
    }
    for (id, change) in damaged {
        if change.contains("channel_name") {
            // No runner delivers this channel.
            let left = format!("mq_msgs WHERE id = '{id}'");
            let parked = i64::from(change.contains("'parked'"));
            assert_eq!(rows(&database, &left).await, parked, "{change}");
            continue;
        }
        eventually(&change, || is_over(&durable, id)).await;
    }
}

#[tokio::test]
async fn no_content_of_a_row_fails_a_poll_for_the_others() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let there = other_process(&database).await;
    let headers = |name: &str, count: usize| {
        format!(
            r#"head = replace(head, '"headers":[', '"headers":[' || (
                SELECT string_agg('["{name}","' || i || '"],', '')
                FROM generate_series(1, {count}) i
            ))"#
        )
    };
    let mut damaged = Vec::new();
    for change in [
        "head = repeat('[', 1000)",
        "head = repeat('{\"a\":', 100000)",
        "head = repeat('x', 5000000)",
        "head = '\"' || repeat('x', 5000000) || '\"'",
        "head = head, parked_since = '-infinity', parked_claim_no = 0",
        "head = '{}', parked_since = '-infinity', parked_claim_no = 0",
        "head = '{}', parked_since = 'infinity', parked_claim_no = 2147483647",
        "response_status = -1, response_head = ''",
        "name = ''",
        &headers("a", 25_000),
        &headers("a' || i || '", 24_577),
        &headers("a' || i || '", 40_000),
    ] {
        let id = there.fire(post(server.url("/"), "bad")).await.unwrap();
        damage(&database, id, "mq_payloads", change).await;
        damaged.push((id, change.chars().take(60).collect::<String>()));
    }
    let durable = builder(&database).retry(quick()).build().unwrap();
    let good = there.fire(post(server.url("/"), "good")).await.unwrap();
    assert_eq!(outcome_of(&durable, good).await.status(), Status::Completed);
    for (id, change) in damaged {
        eventually(&change, || is_over(&durable, id)).await;
    }
    for reason in ["`too_long`", "too many headers"] {
        eventually(reason, || async {
            let parked = durable.parked(None).await.unwrap();
            parked.iter().any(|parked| parked.reason.contains(reason))
        })
        .await;
    }
}

#[tokio::test]
async fn a_request_that_is_damaged_while_it_is_sent_is_settled() {
    let database = migrated().await;
    let (server, gate) = Server::held(200).await;
    let durable = builder(&database).build().unwrap();
    let changes = [
        "created_at = 'infinity'",
        "created_at = '-infinity'",
        "attempts = -2147483648",
        "attempts = 2147483647",
        "deadline = '-infinity'",
        "attempt_at = 'infinity'",
        "lost = -32768",
    ];
    let mut ids = Vec::new();
    for body in changes {
        ids.push(durable.fire(post(server.url("/"), body)).await.unwrap());
    }
    server.wait_for(ids.len()).await;
    for (id, change) in ids.iter().zip(changes) {
        damage(&database, *id, "mq_msgs", change).await;
    }
    gate.add_permits(ids.len());
    for id in ids {
        assert_eq!(outcome_of(&durable, id).await.status(), Status::Completed);
    }
}

#[tokio::test]
async fn no_time_of_an_old_row_fails_a_sweep_or_a_list() {
    let database = migrated().await;
    let server = Server::always(404).await;
    let there = other_process(&database).await;
    let mut dead = Vec::new();
    for times in [
        "created_at = 'infinity', finished_at = '-infinity'",
        "created_at = '-infinity', finished_at = 'infinity', attempts = -1",
        "created_at = '4713-01-01 BC', finished_at = '294276-12-31'",
    ] {
        let request = post(server.url("/"), "x");
        let overdue = request.with(Options::default().deadline(Duration::from_secs(1)));
        let id = there.fire(overdue).await.unwrap();
        damage(&database, id, "mq_msgs", "deadline = now()").await;
        dead.push((id, times));
    }
    let sweeping = builder(&database).retention(Duration::from_secs(60));
    let sweeping = sweeping.runner(false).build().unwrap();
    for (id, times) in &dead {
        assert_eq!(outcome_of(&sweeping, *id).await.status(), Status::Discarded);
        damage(&database, *id, "outcomes", times).await;
    }
    let old = "
        INSERT INTO requeuest.outcomes
            (slot, id, channel_name, channel_args, status, attempts, created_at, finished_at,
             expires_at)
        SELECT slot, gen_random_uuid(), 'c', 'g', 'completed', 1, now(), finished, expired
        FROM generate_series(3, 4) slot,
            unnest(ARRAY['infinity', '-infinity', now()]::timestamptz[]) finished,
            unnest(ARRAY['-infinity', '4713-01-01 BC']::timestamptz[]) expired";
    database.pool().execute(old).await.unwrap();
    for refused in [
        "INSERT INTO requeuest.attempts (id, number, ended_at, duration_ms, error_class, error)
         VALUES (gen_random_uuid(), 1, '-infinity', 1, 'timeout', 'x')",
        "INSERT INTO requeuest.request_keys (channel_name, key, id, fingerprint, created_at)
         VALUES ('c', 'k', gen_random_uuid(), '', '-infinity')",
    ] {
        assert!(database.pool().execute(refused).await.is_err(), "{refused}");
        let sweep = refused.replace("'-infinity'", "'4713-01-01 BC'");
        database.pool().execute(&*sweep).await.unwrap();
    }
    eventually_rows(&database, "outcomes WHERE slot IN (3, 4)", 0).await;
    eventually("all parts of the sweep", || async {
        let parts = sweeping.sweep_parts();
        parts.len() >= 7 && parts.iter().all(|part| part.last_success.is_some())
    })
    .await;
    for part in sweeping.sweep_parts() {
        assert_eq!(part.failures, 0, "{part:?}");
    }
    let all = DeadLetterFilter::default();
    let listed = sweeping.dead_letters(&all).await.unwrap();
    // One finishes after any filter's time.
    assert!(
        listed.iter().any(|letter| letter.id == dead[0].0),
        "{listed:?}"
    );
    for (id, _) in &dead {
        assert_eq!(
            sweeping.outcome(*id).await.unwrap().status(),
            Status::Discarded
        );
    }
}

#[tokio::test]
async fn an_overdue_request_that_cannot_be_ended_keeps_no_other_from_its_end() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let there = other_process(&database).await;
    let late = || {
        Options::default()
            .deadline(Duration::from_secs(600))
            .ordered("key")
    };
    let mut ids = Vec::new();
    for number in 0..20 {
        let options = Options::default().deadline(Duration::from_secs(600));
        let request = post(server.url("/"), number.to_string()).with(options);
        ids.push(there.fire(request).await.unwrap());
    }
    // It can't be claimed, so only its expiry ends it.
    let first = there
        .fire(post(server.url("/"), "first").with(late()))
        .await
        .unwrap();
    damage(
        &database,
        first,
        "mq_msgs",
        "deadline = NULL, attempt_at = now() + '1 day'",
    )
    .await;
    let behind = there
        .fire(post(server.url("/"), "behind").with(late()))
        .await
        .unwrap();
    let refuse = format!(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql
         AS 'BEGIN RAISE EXCEPTION ''no''; END';
         CREATE TRIGGER refuse BEFORE INSERT ON requeuest.outcomes
         FOR EACH ROW WHEN (NEW.id = '{behind}') EXECUTE FUNCTION refuse();
         UPDATE requeuest.mq_msgs SET deadline = now() WHERE deadline IS NOT NULL"
    );
    database.pool().execute(&*refuse).await.unwrap();
    let durable = builder(&database).build().unwrap();
    let good = post(server.url("/"), "good");
    assert_eq!(
        in_time(durable.await_response(good))
            .await
            .unwrap()
            .status(),
        200
    );
    for id in ids {
        assert_eq!(outcome_of(&durable, id).await.status(), Status::Discarded);
    }
    assert_eq!(
        rows(&database, "mq_msgs WHERE deadline IS NOT NULL").await,
        1
    );

    // Nothing can be ended, and polls still claim.
    let gone = "ALTER TABLE requeuest.outcomes DETACH PARTITION requeuest.outcomes_kept";
    database.pool().execute(gone).await.unwrap();
    let fired = there.fire(post(server.url("/"), "good")).await.unwrap();
    assert_eq!(
        outcome_of(&durable, fired).await.status(),
        Status::Completed
    );
    let back = "ALTER TABLE requeuest.outcomes
         ATTACH PARTITION requeuest.outcomes_kept FOR VALUES IN (-1);
         DROP TRIGGER refuse ON requeuest.outcomes";
    database.pool().execute(back).await.unwrap();
    assert_eq!(
        outcome_of(&durable, behind).await.status(),
        Status::Discarded
    );
    assert_eq!(
        count(&database, "SELECT count(*) FROM requeuest.mq_msgs").await,
        1
    );
    durable.shutdown(LONG).await.unwrap();
}
