//! Outcomes, attempts and keys go when their retention is over, whatever else happens.

use std::time::{Duration, Instant};

use requeuest::testkit::TestDatabase;
use requeuest::{DeadLetterFilter, Durable, Options, Outcome, RequestId, Status, outcome_fn};
use sqlx::{Executor, PgConnection};

use crate::support::{
    add_outcomes, builder, count, eventually, eventually_rows, migrated, outcome_of, post, quick,
    rows,
};

const URL: &str = "http://127.0.0.1:9/";
/// The shortest retention, which is swept every few seconds.
const RETENTION: Duration = Duration::from_secs(60);

fn sweeping(database: &TestDatabase) -> Durable {
    let sweeping = builder(database).retention(RETENTION).runner(false);
    sweeping.build().unwrap()
}

async fn size_of_slot(database: &TestDatabase, slot: i32) -> i64 {
    let size = format!("SELECT pg_relation_size('requeuest.outcomes_{slot}')");
    count(database, &size).await
}

#[tokio::test(flavor = "multi_thread")]
async fn slots_are_truncated_while_transactions_and_handlers_work() {
    let database = migrated().await;
    let durable = sweeping(&database);
    let _handlers = [(); 4].map(|()| {
        let url = database.url().to_owned();
        tokio::spawn(async move {
            let pool = sqlx::PgPool::connect(&url).await.unwrap();
            let handling = Durable::builder(pool).runner(false).build().unwrap();
            let slow = outcome_fn(async |_: &mut PgConnection, _: &Outcome| {
                tokio::time::sleep(Duration::from_secs(2)).await;
                Ok::<_, sqlx::Error>(())
            });
            let handler = handling.on_outcome("c", slow).await.unwrap();
            (handling, handler)
        })
    });
    // Outcomes for the handlers, and expired ones.
    add_outcomes(&database, 0, 200, 1, 3600).await;
    database
        .pool()
        .execute(
            "INSERT INTO requeuest.unhandled (id, channel_name, slot)
             SELECT id, 'c', 0 FROM requeuest.outcomes",
        )
        .await
        .unwrap();
    add_outcomes(&database, 3, 50_000, 100, 60).await;
    let working: Vec<_> = (0..20)
        .map(|number| {
            let (durable, url) = (durable.clone(), database.url().to_owned());
            tokio::spawn(async move {
                let pool = sqlx::PgPool::connect(&url).await.unwrap();
                let mut slowest = Duration::ZERO;
                let until = Instant::now() + Duration::from_secs(10);
                while Instant::now() < until {
                    let mut transaction = pool.begin().await.unwrap();
                    let key = Options::default().key(number.to_string());
                    let began = Instant::now();
                    durable
                        .fire_in(&mut *transaction, post(URL, "x").with(key))
                        .await
                        .unwrap();
                    slowest = slowest.max(began.elapsed());
                    tokio::time::sleep(Duration::from_millis(20)).await;
                    transaction.commit().await.unwrap();
                }
                slowest
            })
        })
        .collect();
    let began = Instant::now();
    eventually("the expired slot is truncated", || async {
        size_of_slot(&database, 3).await == 0
    })
    .await;
    let took = began.elapsed();
    // Two slots of a minute's retention.
    assert!(took < RETENTION / 6, "{took:?}");
    for working in working {
        let slowest = working.await.unwrap();
        assert!(slowest < Duration::from_secs(1), "{slowest:?}");
    }
}

#[tokio::test]
async fn outcomes_without_a_handler_are_moved_and_pin_nothing() {
    let database = migrated().await;
    let durable = sweeping(&database);
    let refusing = outcome_fn(async |_: &mut PgConnection, _: &Outcome| Err(std::fmt::Error));
    let handler = durable.on_outcome("c", refusing).await.unwrap();
    add_outcomes(&database, 5, 1, 100, 60).await;
    let unhandled = "INSERT INTO requeuest.unhandled (id, channel_name, slot)
                     SELECT id, 'c', slot FROM requeuest.outcomes";
    database.pool().execute(unhandled).await.unwrap();
    // Left behind by a subscription that ended.
    add_outcomes(&database, 5, 1, 100, 60).await;
    let orphans = unhandled.replace("'c'", "'gone'") + " ON CONFLICT DO NOTHING";
    database.pool().execute(&*orphans).await.unwrap();
    add_outcomes(&database, 5, 1000, 100, 60).await;
    eventually("the slot is truncated", || async {
        size_of_slot(&database, 5).await == 0
    })
    .await;
    assert_eq!(rows(&database, "outcomes WHERE slot = -2").await, 1);
    drop(handler);
    database
        .pool()
        .execute("UPDATE requeuest.unhandled SET due_at = now()")
        .await
        .unwrap();
    let taking = outcome_fn(async |tx: &mut PgConnection, outcome: &Outcome| {
        let taken = format!(
            "CREATE TABLE taken AS SELECT '{}'::uuid AS id",
            outcome.id()
        );
        tx.execute(&*taken).await?;
        Ok::<_, sqlx::Error>(())
    });
    let _handler = durable.on_outcome("c", taking).await.unwrap();
    eventually_rows(&database, "unhandled", 0).await;
    assert_eq!(count(&database, "SELECT count(*) FROM taken").await, 1);
    eventually_rows(&database, "outcomes", 0).await;
}

#[tokio::test]
async fn one_outcome_that_its_handler_refuses_keeps_none_of_the_others() {
    let database = migrated().await;
    let durable = sweeping(&database);
    let handler = outcome_fn(async |_: &mut PgConnection, _: &Outcome| Ok::<_, sqlx::Error>(()));
    drop(durable.on_outcome("c", handler).await.unwrap());
    // Handled ones, and one that is not.
    add_outcomes(&database, 4, 1, 100, 60).await;
    let unhandled = "INSERT INTO requeuest.unhandled (id, channel_name, slot)
                     SELECT id, 'c', slot FROM requeuest.outcomes";
    database.pool().execute(unhandled).await.unwrap();
    add_outcomes(&database, 4, 299, 100, 60).await;
    let poison = outcome_fn(async |_: &mut PgConnection, outcome: &Outcome| {
        assert_ne!(outcome.status(), Status::Completed, "poison");
        Ok::<_, sqlx::Error>(())
    });
    let _handler = durable.on_outcome("c", poison).await.unwrap();
    eventually_rows(&database, "outcomes", 1).await;
    eventually_rows(&database, "unhandled WHERE failures > 0", 1).await;
}

#[tokio::test]
async fn outcomes_of_different_retentions_go_each_at_its_time() {
    let database = migrated().await;
    let _durable = sweeping(&database);
    add_outcomes(&database, 7, 7000, 100, 60).await;
    add_outcomes(&database, 7, 100, 100, 3600).await;
    // A slot that can be truncated soon is left alone until then.
    add_outcomes(&database, 8, 10, 3600, 3599).await;
    add_outcomes(&database, 8, 10, 3599, 3699).await;
    eventually_rows(
        &database,
        "outcomes WHERE expires_at < now() AND slot = 7",
        0,
    )
    .await;
    assert_eq!(rows(&database, "outcomes WHERE slot = 7").await, 100);
    assert_eq!(rows(&database, "outcomes WHERE slot = 8").await, 20);
}

#[tokio::test]
async fn expired_outcomes_go_although_a_transaction_holds_their_slot() {
    let database = migrated().await;
    let _durable = sweeping(&database);
    add_outcomes(&database, 2, 12_000, 100, 60).await;
    let mut long = database.pool().begin().await.unwrap();
    long.execute("SELECT count(*) FROM requeuest.outcomes_2")
        .await
        .unwrap();
    eventually_rows(&database, "outcomes", 0).await;
    long.rollback().await.unwrap();
}

#[tokio::test]
async fn old_attempts_and_keys_go_from_between_those_that_stay() {
    let database = migrated().await;
    // Every third of them belongs to a request that is still there.
    let fill = "
        CREATE TEMPORARY TABLE old AS SELECT
            gen_random_uuid() AS id, n % 3 = 0 AS stays,
            now() - interval '1 day' + n * interval '1 millisecond' AS at
        FROM generate_series(1, 30000) AS n;
        INSERT INTO requeuest.attempts (id, number, ended_at, duration_ms, error_class, error)
        SELECT id, 1, at, 1, 'connect', 'refused' FROM old;
        INSERT INTO requeuest.request_keys (channel_name, key, id, fingerprint, created_at)
        SELECT 'c', id::text, id, '', at FROM old;
        INSERT INTO requeuest.mq_msgs (id, channel_name, channel_args, attempt_at)
        SELECT id, 'c', 'g', 'infinity' FROM old WHERE stays;
        INSERT INTO requeuest.mq_payloads (id, name, head)
        SELECT id, 'n', '{}' FROM old WHERE stays";
    database.pool().execute(fill).await.unwrap();
    let _durable = sweeping(&database);
    eventually_rows(&database, "attempts", 10_000).await;
    eventually_rows(&database, "request_keys", 10_000).await;
    // Their requests end.
    let end = "DELETE FROM requeuest.mq_msgs; DELETE FROM requeuest.mq_payloads";
    database.pool().execute(end).await.unwrap();
    eventually_rows(&database, "attempts", 0).await;
    eventually_rows(&database, "request_keys", 0).await;
}

#[tokio::test]
async fn a_part_of_the_sweep_that_fails_stops_no_other() {
    let database = migrated().await;
    let durable = sweeping(&database);
    for broken in [
        "expire_requests(int)",
        "expired_slots()",
        "delete_handled(uuid, int)",
    ] {
        let drop = format!("DROP FUNCTION requeuest.{broken} CASCADE");
        database.pool().execute(&*drop).await.unwrap();
    }
    assert!(durable.sweep_parts().is_empty());
    database
        .pool()
        .execute(
            "ALTER TABLE requeuest.attempts RENAME TO renamed;
             INSERT INTO requeuest.request_keys (channel_name, key, id, fingerprint, created_at)
             VALUES ('c', 'k', gen_random_uuid(), '', now() - interval '1 day')",
        )
        .await
        .unwrap();
    eventually_rows(&database, "request_keys", 0).await;
    let part = |name| {
        let parts = durable.sweep_parts();
        parts.into_iter().find(|part| part.name == name).unwrap()
    };
    // The gauge tells them apart, run after run.
    eventually("three failed runs", || async {
        part("attempts").failures > 2
    })
    .await;
    for failing in ["deadlines", "outcomes", "handled outcomes", "attempts"] {
        let failing = part(failing);
        assert!(failing.failures > 1 && failing.last_success.is_none());
        assert!(failing.error.unwrap().contains("does not exist"));
    }
    for working in ["keys", "dead letters", "ordering keys"] {
        let working = part(working);
        assert_eq!((working.failures, working.behind), (0, false));
        assert!(working.last_success.unwrap() < RETENTION);
    }
}

/// Moves the end of every dead letter, and with it its expiry, into the past.
async fn age_dead_letters(database: &TestDatabase, seconds: i32) {
    let age = format!(
        "UPDATE requeuest.outcomes_kept SET
             finished_at = finished_at - {seconds} * interval '1 second',
             expires_at = expires_at - {seconds} * interval '1 second'"
    );
    database.pool().execute(&*age).await.unwrap();
}

/// Discards requests after one attempt, and keeps them for a time.
fn discarding(database: &TestDatabase, kept: Option<Duration>) -> Durable {
    builder(database)
        .retry(quick().max_attempts(1))
        .dead_letter_retention(kept)
        .build()
        .unwrap()
}

async fn discarded(durable: &Durable, options: Options) -> RequestId {
    let id = durable.fire(post(URL, "x").with(options)).await.unwrap();
    assert_eq!(outcome_of(durable, id).await.status(), Status::Discarded);
    id
}

async fn dead_letters(durable: &Durable) -> Vec<RequestId> {
    let all = DeadLetterFilter::default();
    let letters = durable.dead_letters(&all).await.unwrap();
    letters.iter().map(|letter| letter.id).collect()
}

#[tokio::test]
async fn dead_letters_expire_with_all_that_belongs_to_them() {
    let database = migrated().await;
    let day = Duration::from_secs(24 * 3600);
    let (durable, until_purged) = (
        discarding(&database, Some(day)),
        discarding(&database, None),
    );
    let key = || Options::default().key("k");
    discarded(&durable, key()).await;
    age_dead_letters(&database, 24 * 3600 + 1).await;
    // These are younger, or kept until they are purged.
    let young = discarded(&durable, Options::default()).await;
    let kept = discarded(&until_purged, Options::default().ordered("o")).await;
    age_dead_letters(&database, 23 * 3600).await;
    let _sweeping = sweeping(&database);
    eventually_rows(&database, "outcomes", 2).await;
    assert_eq!(dead_letters(&durable).await, [young, kept]);
    assert_eq!(rows(&database, "mq_payloads").await, 2);
    assert_eq!(rows(&database, "request_keys").await, 0);
    // The key is free for another request.
    let other = durable.fire(post(URL, "y").with(key())).await.unwrap();
    outcome_of(&durable, other).await;
    assert_eq!(dead_letters(&durable).await, [young, kept, other]);
}

#[tokio::test]
async fn many_expired_dead_letters_go_in_batches_the_oldest_first() {
    let database = migrated().await;
    let fill = "
        INSERT INTO requeuest.outcomes
            (slot, id, channel_name, channel_args, status, attempts, created_at, finished_at,
             expires_at)
        SELECT -1, gen_random_uuid(), 'c', 'g', 'discarded', 1, t.at, t.at,
            t.at + interval '1 day'
        FROM (
            SELECT now() - interval '2 days' + n * interval '20 seconds' AS at
            FROM generate_series(1, 8640) AS n
        ) t";
    database.pool().execute(fill).await.unwrap();
    let purged = "SELECT purged FROM requeuest.purge_expired(1000)";
    assert_eq!(count(&database, purged).await, 1000);
    assert_eq!(rows(&database, "outcomes_kept").await, 7640);
    let oldest = "SELECT count(*) FROM requeuest.outcomes
                  WHERE finished_at < now() - interval '2 days' + interval '19990 seconds'";
    assert_eq!(count(&database, oldest).await, 0);
    let _sweeping = sweeping(&database);
    eventually_rows(&database, "outcomes WHERE expires_at < now()", 0).await;
    let left = rows(&database, "outcomes").await;
    assert!((4300..=4320).contains(&left), "{left}");
}

#[tokio::test]
async fn a_dead_letter_that_halts_its_key_stays_until_an_operator_acts() {
    let database = migrated().await;
    let durable = discarding(&database, Some(RETENTION));
    let options = || Options::default().ordered("key").halt_on_discard();
    let halting = discarded(&durable, options()).await;
    let behind = durable.fire(post(URL, "x").with(options())).await.unwrap();
    discarded(&durable, Options::default()).await;
    age_dead_letters(&database, 3600).await;
    // The other one goes.
    eventually_rows(&database, "outcomes", 1).await;
    eventually_rows(&database, "outcomes WHERE expires_at > now()", 1).await;
    let halted = durable.halted().await.unwrap();
    assert_eq!(halted[0].id, halting);
    assert!(!durable.status(behind).await.unwrap().unwrap().is_terminal());
    // It is looked at again a day later.
    age_dead_letters(&database, 24 * 3600 + 1).await;
    eventually_rows(&database, "outcomes WHERE expires_at > now()", 1).await;
    assert_eq!(dead_letters(&durable).await, [halting]);
    // Its retention begins anew.
    age_dead_letters(&database, 24 * 3600 - 10).await;
    assert!(durable.resume("default", "key").await.unwrap());
    outcome_of(&durable, behind).await;
    assert_eq!(dead_letters(&durable).await, [halting, behind]);
    let whole =
        "outcomes WHERE expires_at BETWEEN now() + interval '30 s' AND now() + interval '1 min'";
    assert_eq!(rows(&database, whole).await, 2);
    age_dead_letters(&database, 60).await;
    eventually_rows(&database, "outcomes WHERE error_class <> 'x'", 1).await;
    assert_eq!(dead_letters(&durable).await, [behind]);
}

#[tokio::test]
async fn a_dead_letter_that_its_handler_has_not_taken_stays() {
    let database = migrated().await;
    let durable = discarding(&database, Some(RETENTION));
    let refusing = outcome_fn(async |_: &mut PgConnection, _: &Outcome| Err(std::fmt::Error));
    let handler = durable.on_outcome("default", refusing).await.unwrap();
    let id = discarded(&durable, Options::default()).await;
    age_dead_letters(&database, 3600).await;
    eventually_rows(&database, "outcomes WHERE expires_at > now()", 1).await;
    assert_eq!(dead_letters(&durable).await, [id]);
    drop(handler);
    durable.unsubscribe_outcomes("default").await.unwrap();
    age_dead_letters(&database, 2 * 24 * 3600).await;
    eventually_rows(&database, "outcomes", 0).await;
    assert_eq!(rows(&database, "unhandled").await, 0);
}
