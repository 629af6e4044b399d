//! Requests behind the first one of their ordering key. They hide no other request, and are claimed
//! in order once that one is gone.

use std::collections::{HashMap, HashSet};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use requeuest::testkit::TestDatabase;
use requeuest::{Options, RequestId, Status};
use sqlx::{Executor, PgExecutor, PgPool, Row};
use uuid::Uuid;

use crate::support::{
    Server, builder, count, eventually, eventually_rows, in_time, migrated, outcome_of, post,
    quick, reply, rows,
};

const KEY: &str = "4000|c|key";
/// Enough rows for a poll to move them out of the way.
const BEHIND: usize = 40;
const NONE: [Uuid; 0] = [];

async fn enqueue(executor: impl PgExecutor<'_>, group: &str, delay: &str) -> Uuid {
    sqlx::query_scalar(
        "SELECT request_id FROM requeuest.enqueue(
             gen_random_uuid(), 'c', $1, $1 NOT LIKE '%|d|%', true, $2::interval, NULL, 'n', '{}',
             NULL, NULL, 'waiting', NULL, NULL, NULL, NULL, NULL, false, true, false
         )",
    )
    .bind(group)
    .bind(delay)
    .fetch_one(executor)
    .await
    .unwrap()
}

/// The ids that one poll claims.
async fn claim(pool: &PgPool, batch: i32) -> Vec<Uuid> {
    sqlx::query_scalar("SELECT id FROM requeuest.mq_poll(ARRAY['c'], $1) WHERE id IS NOT NULL")
        .bind(batch)
        .fetch_all(pool)
        .await
        .unwrap()
}

async fn delete(executor: impl PgExecutor<'_>, id: Uuid) {
    sqlx::query("SELECT requeuest.mq_delete(ARRAY[$1])")
        .bind(id)
        .execute(executor)
        .await
        .unwrap();
}

/// A key whose first request is claimed, and whose others have been moved behind it. Returns the
/// ids in order.
async fn blocked_key(database: &TestDatabase) -> Vec<Uuid> {
    let mut ids = Vec::new();
    for _ in 0..=BEHIND {
        ids.push(enqueue(database.pool(), KEY, "0").await);
    }
    assert_eq!(claim(database.pool(), 64).await, ids[..1]);
    let behind = "mq_msgs WHERE state = 'behind'";
    assert_eq!(rows(database, behind).await, BEHIND as i64);
    ids
}

/// Claims and deletes these requests, one by one.
async fn assert_claimed_in_order(database: &TestDatabase, ids: &[Uuid]) {
    for id in ids {
        assert_eq!(claim(database.pool(), 64).await, [*id]);
        assert_eq!(
            claim(database.pool(), 64).await,
            NONE,
            "the claim blocks its key"
        );
        delete(database.pool(), *id).await;
    }
    assert_eq!(rows(database, "mq_msgs WHERE seq IS NOT NULL").await, 0);
    assert_eq!(rows(database, "mq_freed_keys").await, 0);
}

/// 5,000 keys with one request behind the first one, and 100 behind that of each hundredth key.
async fn blocked_keys(database: &TestDatabase, first: &str) {
    let insert = |due: &str, state: &str, series: &str| {
        format!(
            "INSERT INTO requeuest.mq_msgs
                 (id, channel_name, channel_args, attempt_at, seq, state)
             SELECT gen_random_uuid(), 'c', lpad(to_hex(n * 13), 4, '0') || '|c|' || n, {due},
                 nextval('requeuest.mq_seq'), {state}
             FROM {series}"
        )
    };
    let (due, state) = first.split_once(", state ").unwrap();
    for statement in [
        insert(due, state, "generate_series(1, 5000) n"),
        insert("now()", "'waiting'", "generate_series(1, 5000) n"),
        insert(
            "now()",
            "'waiting'",
            "generate_series(1, 99), generate_series(1, 5000, 50) n",
        ),
    ] {
        database.pool().execute(&*statement).await.unwrap();
    }
}

#[tokio::test]
async fn blocked_keys_hide_no_new_request() {
    for first in [
        "now() + interval '1 hour', state 'waiting'",
        "now() + interval '1 hour', state 'claimed'",
        "'9999-12-31 UTC', state 'halted'",
    ] {
        let database = migrated().await;
        blocked_keys(&database, first).await;
        // While the rows behind the first ones are moved out of the way, and afterwards.
        for round in 0..8 {
            let new = HashSet::from([
                enqueue(database.pool(), &format!("{round:04}|d|plain"), "0").await,
                enqueue(database.pool(), &format!("{round:04}|c|new"), "0").await,
            ]);
            let claimed = claim(database.pool(), 64).await;
            assert_eq!(HashSet::from_iter(claimed), new, "{first}, round {round}");
        }
        // All are out of the way, but for as many as cost less than moving them.
        let due = "mq_msgs WHERE state = 'waiting' AND attempt_at <= now()";
        assert!(rows(&database, due).await < 16, "{first}");
    }
}

#[tokio::test]
async fn the_next_request_is_claimable_however_the_first_one_ends() {
    let resolve = "SELECT requeuest.end_requests(ARRAY[$1], 'ambiguous', 'other', 'x', NULL),
                       requeuest.resolve_request($1, true, NULL, '1 day')";
    let halted = "SELECT requeuest.end_requests(ARRAY[$1], 'discarded', 'other', 'x', NULL), ";
    let ways = [
        "SELECT requeuest.mq_delete(ARRAY[$1])".to_owned(),
        "DELETE FROM requeuest.mq_msgs WHERE id = $1".to_owned(),
        "SELECT requeuest.cancel_request($1, '1 day')".to_owned(),
        "SELECT requeuest.cancel_channels(ARRAY['c'], '1 day', 1), $1::uuid".to_owned(),
        "WITH u AS (
             UPDATE requeuest.mq_msgs SET deadline = now(), attempt_at = now() WHERE id = $1
             RETURNING id
         )
         SELECT requeuest.end_requests(ARRAY[id], 'cancelled', 'deadline', 'x', '1 day') FROM u"
            .to_owned(),
        resolve.to_owned(),
        format!("{halted} requeuest.resume_key('c', '{KEY}')"),
        format!("{halted} requeuest.purge_requests(ARRAY[$1])"),
        format!(
            "{halted} requeuest.replay_request($1, '{0}', '1 day'),
                 requeuest.cancel_request('{0}', '1 day')",
            Uuid::now_v7()
        ),
    ];
    for way in ways {
        let database = migrated().await;
        let ids = blocked_key(&database).await;
        let ended = sqlx::query(&way).bind(ids[0]).execute(database.pool());
        ended.await.unwrap();
        let left = "SELECT count(*) FROM requeuest.mq_msgs";
        assert_eq!(count(&database, left).await, BEHIND as i64, "{way}");
        assert_claimed_in_order(&database, &ids[1..]).await;
    }
}

#[tokio::test]
async fn requests_behind_a_failing_one_are_sent_in_order_once_it_ends() {
    for gives_up in [false, true] {
        let database = migrated().await;
        let recovered = std::sync::Arc::new(AtomicBool::new(false));
        let has_recovered = recovered.clone();
        let server = Server::start(move |_, seen| {
            let fails = seen.body == "0" && !has_recovered.load(Ordering::SeqCst);
            async move { reply(if fails { 503 } else { 200 }, "") }
        })
        .await;
        let durable = builder(&database).retry(quick()).build().unwrap();
        let request = |number: usize| {
            let options = Options::default().ordered("key");
            let options = match (number, gives_up) {
                (0, true) => options.retry(quick().max_attempts(20)),
                _ => options,
            };
            post(server.url("/"), number.to_string()).with(options)
        };
        let first = durable.fire(request(0)).await.unwrap();
        server.wait_for(1).await;
        let mut transaction = database.pool().begin().await.unwrap();
        let rest = (1..=150).map(request);
        let rest = durable.fire_many_in(&mut transaction, rest).await.unwrap();
        transaction.commit().await.unwrap();
        if !gives_up {
            eventually("most are behind", || async {
                rows(&database, "mq_msgs WHERE state = 'behind'").await > 100
            })
            .await;
            assert_eq!(
                durable.status(rest[149]).await.unwrap(),
                Some(Status::Available)
            );
            recovered.store(true, Ordering::SeqCst);
        }
        outcome_of(&durable, first).await;
        for id in rest {
            assert_eq!(outcome_of(&durable, id).await.status(), Status::Completed);
        }
        let mut bodies = server.bodies();
        bodies.dedup();
        let numbers: Vec<_> = (0..=150).map(|number: usize| number.to_string()).collect();
        assert_eq!(bodies, numbers);
    }
}

#[tokio::test]
async fn requests_of_one_call_are_put_behind_the_first_of_their_key() {
    let database = migrated().await;
    let handle = builder(&database).runner(false).build().unwrap();
    let to = |key: &'static str, idempotent: Option<&'static str>| {
        let mut options = Options::default().ordered(key);
        if let Some(key) = idempotent {
            options = options.key(key);
        }
        post("http://127.0.0.1:9/", "").with(options)
    };
    let plain = || post("http://127.0.0.1:9/", "");
    let earlier = handle.fire(to("c", Some("used"))).await.unwrap();
    let requests = [
        to("a", None),
        to("b", None),
        plain(),
        to("a", None),
        // Attached to an earlier request, so the next one of its key is the first of this call.
        to("c", Some("used")),
        to("c", None),
        to("c", None),
        to("a", None),
        plain(),
    ];
    let ids = handle.fire_many(Vec::from(requests)).await.unwrap();
    assert_eq!(ids[4], earlier);
    let states: HashMap<Uuid, String> =
        sqlx::query("SELECT id, state::text FROM requeuest.mq_msgs")
            .fetch_all(database.pool())
            .await
            .unwrap()
            .into_iter()
            .map(|row| (row.get("id"), row.get("state")))
            .collect();
    let states: Vec<_> = ids.iter().map(|id| &*states[&Uuid::from(*id)]).collect();
    let (due, behind) = ("waiting", "behind");
    assert_eq!(
        states,
        [due, due, due, behind, due, due, behind, behind, due]
    );
    // The first one of a key frees the next.
    delete(database.pool(), ids[0].into()).await;
    let claimed: HashSet<_> = sqlx::query_scalar::<_, Uuid>(
        "SELECT id FROM requeuest.mq_poll(NULL, 64) WHERE id IS NOT NULL",
    )
    .fetch_all(database.pool())
    .await
    .unwrap()
    .into_iter()
    .collect();
    let expected = [1, 2, 3, 4, 8].map(|number: usize| Uuid::from(ids[number]));
    assert_eq!(claimed, HashSet::from(expected));
}

#[tokio::test]
async fn a_request_behind_another_can_be_cancelled_replaced_and_given_up() {
    let database = migrated().await;
    let durable = builder(&database)
        .channel("c")
        .runner(false)
        .build()
        .unwrap();
    let mut ids = Vec::new();
    for number in 0..=BEHIND {
        let mut options = Options::default().ordered("key");
        match number {
            2 => options = options.supersede("replaced"),
            3 => options = options.deadline(Duration::from_millis(1)),
            _ => {}
        }
        let request = post("http://127.0.0.1:9/", "x").with(options);
        ids.push(Uuid::from(durable.fire(request).await.unwrap()));
    }
    // The request whose deadline has passed must not be given up before it is behind.
    let no_deadline = "UPDATE requeuest.mq_msgs SET deadline = NULL WHERE deadline IS NOT NULL";
    database.pool().execute(no_deadline).await.unwrap();
    assert_eq!(claim(database.pool(), 64).await, ids[..1]);
    let behind = "mq_msgs WHERE state = 'behind'";
    assert_eq!(rows(&database, behind).await, BEHIND as i64);

    let status = async |id: Uuid| durable.status(id.into()).await.unwrap();
    assert_eq!(status(ids[1]).await, Some(Status::Available));
    assert!(durable.cancel(RequestId::from(ids[1])).await.unwrap());
    assert_eq!(status(ids[1]).await, Some(Status::Cancelled));
    let newer = post("http://127.0.0.1:9/", "x").with(Options::default().supersede("replaced"));
    let newer = Uuid::from(durable.fire(newer).await.unwrap());
    assert_eq!(status(ids[2]).await, Some(Status::Cancelled));
    sqlx::query("UPDATE requeuest.mq_msgs SET deadline = now() WHERE id = $1")
        .bind(ids[3])
        .execute(database.pool())
        .await
        .unwrap();
    assert_eq!(claim(database.pool(), 64).await, [newer]);
    assert_eq!(status(ids[3]).await, Some(Status::Discarded));
    delete(database.pool(), ids[0]).await;
    assert_claimed_in_order(&database, &ids[4..]).await;
}

/// Replaces the second request of a key in a transaction that is open while the first one ends.
/// Returns the requests that are left.
async fn replaced_meanwhile(database: &TestDatabase, commit: bool) -> Vec<Uuid> {
    let mut ids = blocked_key(database).await;
    sqlx::query("UPDATE requeuest.mq_msgs SET supersede_key = 's' WHERE id = $1")
        .bind(ids[1])
        .execute(database.pool())
        .await
        .unwrap();
    let mut transaction = database.pool().begin().await.unwrap();
    let newer: Uuid = sqlx::query_scalar(
        "SELECT request_id FROM requeuest.enqueue(
             gen_random_uuid(), 'c', '0000|d|x', false, false, '1 hour', NULL, 'n', '{}',
             NULL, NULL, 'waiting', NULL, NULL, NULL, 's', '1 day', false, true, false
         )",
    )
    .fetch_one(&mut *transaction)
    .await
    .unwrap();
    // Must not wait for the transaction.
    in_time(delete(database.pool(), ids[0])).await;
    assert_eq!(claim(database.pool(), 64).await, NONE);
    assert_eq!(rows(database, "mq_freed_keys").await, 1);
    if commit {
        transaction.commit().await.unwrap();
        delete(database.pool(), newer).await;
        ids.remove(1);
    } else {
        transaction.rollback().await.unwrap();
    }
    ids.split_off(1)
}

#[tokio::test]
async fn a_callers_transaction_on_the_next_request_delays_only_its_key() {
    for commit in [true, false] {
        let database = migrated().await;
        let left = replaced_meanwhile(&database, commit).await;
        assert_claimed_in_order(&database, &left).await;
    }
}

#[tokio::test]
async fn a_replaced_first_request_leaves_the_next_one_unlocked() {
    let database = migrated().await;
    let first = enqueue(database.pool(), KEY, "1 hour").await;
    let next = enqueue(database.pool(), KEY, "0").await;
    sqlx::query("UPDATE requeuest.mq_msgs SET supersede_key = 's' WHERE id = $1")
        .bind(first)
        .execute(database.pool())
        .await
        .unwrap();
    let mut transaction = database.pool().begin().await.unwrap();
    transaction
        .execute(
            "SELECT FROM requeuest.enqueue(
                 gen_random_uuid(), 'c', '0000|d|x', false, false, '1 hour', NULL, 'n', '{}',
                 NULL, NULL, 'waiting', NULL, NULL, NULL, 's', '1 day', false, true, false
             )",
        )
        .await
        .unwrap();
    let locked = sqlx::query("SELECT FROM requeuest.mq_msgs WHERE id = $1 FOR UPDATE NOWAIT")
        .bind(next)
        .execute(database.pool())
        .await;
    locked.unwrap();
    transaction.commit().await.unwrap();
    assert_eq!(claim(database.pool(), 64).await, [next]);
    assert_eq!(rows(&database, "mq_freed_keys").await, 0);
}

#[tokio::test]
async fn a_transaction_with_an_old_snapshot_frees_requests_that_it_cannot_see() {
    let database = migrated().await;
    let first = enqueue(database.pool(), KEY, "1 hour").await;
    let begin = "BEGIN ISOLATION LEVEL REPEATABLE READ";
    let mut late = database.pool().begin_with(begin).await.unwrap();
    late.execute("SELECT FROM requeuest.mq_msgs").await.unwrap();
    let mut ids = Vec::new();
    for _ in 0..BEHIND {
        ids.push(enqueue(database.pool(), KEY, "0").await);
    }
    assert_eq!(claim(database.pool(), 64).await, NONE);
    assert_eq!(
        rows(&database, "mq_msgs WHERE state = 'behind'").await,
        BEHIND as i64
    );
    delete(&mut *late, first).await;
    late.commit().await.unwrap();
    assert_claimed_in_order(&database, &ids).await;
}

#[tokio::test]
async fn a_first_request_moved_by_hand_is_mended_and_counted() {
    let database = migrated().await;
    let ids = blocked_key(&database).await;
    let mend = "SELECT requeuest.mend_behind(1000)::bigint";
    assert_eq!(count(&database, mend).await, 0);
    let by_hand = "UPDATE requeuest.mq_msgs SET state = 'behind' WHERE state <> 'behind'";
    database.pool().execute(by_hand).await.unwrap();
    assert_eq!(claim(database.pool(), 64).await, NONE);
    assert_eq!(count(&database, mend).await, 1);
    assert_eq!(count(&database, mend).await, 0);
    // The lease of the first one was moved as well.
    database
        .pool()
        .execute("UPDATE requeuest.mq_msgs SET attempt_at = now() WHERE state = 'waiting'")
        .await
        .unwrap();
    assert_claimed_in_order(&database, &ids).await;
}

#[tokio::test]
async fn requests_inserted_while_the_first_one_ends_are_not_moved() {
    let database = migrated().await;
    let first = enqueue(database.pool(), KEY, "1 hour").await;
    let mut ending = database.pool().begin().await.unwrap();
    delete(&mut *ending, first).await;
    let mut ids = Vec::new();
    for _ in 0..BEHIND {
        ids.push(enqueue(database.pool(), KEY, "0").await);
    }
    // The poll sees the first one, and must not rely on it.
    assert_eq!(claim(database.pool(), 64).await, NONE);
    ending.commit().await.unwrap();
    assert_claimed_in_order(&database, &ids).await;
}

#[tokio::test]
async fn the_first_and_the_second_request_may_end_at_once() {
    for first_commits_first in [true, false] {
        let database = migrated().await;
        let ids = blocked_key(&database).await;
        let mut one = database.pool().begin().await.unwrap();
        let mut other = database.pool().begin().await.unwrap();
        delete(&mut *one, ids[0]).await;
        if first_commits_first {
            one.commit().await.unwrap();
            delete(&mut *other, ids[1]).await;
            other.commit().await.unwrap();
        } else {
            one.rollback().await.unwrap();
            delete(&mut *other, ids[1]).await;
            in_time(delete(database.pool(), ids[0])).await;
            assert_eq!(claim(database.pool(), 64).await, NONE);
            other.commit().await.unwrap();
        }
        assert_claimed_in_order(&database, &ids[2..]).await;
    }
}

#[tokio::test]
async fn a_request_that_a_poll_moves_can_be_replaced() {
    let database = migrated().await;
    let first = enqueue(database.pool(), KEY, "1 hour").await;
    for _ in 0..BEHIND {
        enqueue(database.pool(), KEY, "0").await;
    }
    let named = "UPDATE requeuest.mq_msgs SET supersede_key = 's' WHERE seq = (
                     SELECT max(seq) FROM requeuest.mq_msgs
                 ) OR seq = (SELECT min(seq) FROM requeuest.mq_msgs)";
    database.pool().execute(named).await.unwrap();
    let mut polling = database.pool().begin().await.unwrap();
    polling
        .execute("SELECT FROM requeuest.mq_poll(ARRAY['c'], 64)")
        .await
        .unwrap();
    let replacing = async {
        database
            .pool()
            .execute(
                "SELECT FROM requeuest.enqueue(
                     gen_random_uuid(), 'c', '0000|d|x', false, false, '1 hour', NULL, 'n', '{}',
                     NULL, NULL, 'waiting', NULL, NULL, NULL, 's', '1 day', false, true, false
                 )",
            )
            .await
            .unwrap();
    };
    let waiting = "SELECT count(*) FROM pg_stat_activity
                   WHERE datname = current_database() AND wait_event_type = 'Lock'";
    let committed = async {
        eventually("the insert waits for the poll", || async {
            count(&database, waiting).await == 1
        })
        .await;
        polling.commit().await.unwrap();
    };
    in_time(async { tokio::join!(replacing, committed) }).await;
    let replaced = "outcomes WHERE error_class = 'superseded'";
    assert_eq!(rows(&database, replaced).await, 2);
    assert_eq!(
        count(&database, "SELECT count(*) FROM requeuest.mq_msgs").await,
        40
    );
    assert_ne!(claim(database.pool(), 64).await, [first]);
}

#[tokio::test]
async fn polls_inserts_and_endings_at_once_leave_no_key_stuck() {
    const KEYS: usize = 5;
    const EACH: usize = 200;
    let database = &migrated().await;
    let inserted = AtomicBool::new(false);
    // For each key, the position of the request that was claimed last.
    let claimed: Mutex<HashMap<String, i64>> = Mutex::default();
    let insert = async {
        for _ in 0..EACH {
            let group = |key| format!("{key:04}|c|{key}");
            let inserts = (0..KEYS).map(|key| {
                let group = group(key);
                async move { enqueue(database.pool(), &group, "0").await }
            });
            futures_util::future::join_all(inserts).await;
        }
        inserted.store(true, Ordering::SeqCst);
    };
    let poll = async |batch: i32| {
        loop {
            let ended = inserted.load(Ordering::SeqCst);
            if ended && rows(database, "mq_msgs").await == 0 {
                break;
            }
            let found = sqlx::query(
                "SELECT m.id, m.channel_args, m.seq FROM requeuest.mq_poll(ARRAY['c'], $1) p
                 JOIN requeuest.mq_msgs m ON m.id = p.id",
            )
            .bind(batch)
            .fetch_all(database.pool())
            .await
            .unwrap();
            for row in found {
                let (key, seq): (String, i64) = (row.get("channel_args"), row.get("seq"));
                let last = claimed.lock().unwrap().insert(key, seq);
                assert!(last.is_none_or(|last| last < seq), "{last:?}, {seq}");
                let id: Uuid = row.get("id");
                if seq % 2 == 0 {
                    delete(database.pool(), id).await;
                } else {
                    sqlx::query("SELECT requeuest.cancel_request($1, '1 day')")
                        .bind(id)
                        .execute(database.pool())
                        .await
                        .unwrap();
                }
            }
        }
    };
    // Requests that are not the first ones of their keys go, too. Locked, because a request that a
    // poll claims meanwhile must not go: the next one could be claimed before this test has noted
    // the claim.
    let cancel = async {
        while !inserted.load(Ordering::SeqCst) {
            database
                .pool()
                .execute(
                    "SELECT requeuest.cancel_request(id, '1 day') FROM (
                         SELECT id FROM requeuest.mq_msgs WHERE state IN ('waiting', 'behind')
                         ORDER BY random() LIMIT 1 FOR UPDATE SKIP LOCKED
                     ) any_one",
                )
                .await
                .unwrap();
        }
    };
    let all = async { tokio::join!(insert, poll(1), poll(2), poll(8), cancel) };
    tokio::time::timeout(Duration::from_secs(120), all)
        .await
        .expect("all keys came to their end");
    assert_eq!(rows(database, "mq_freed_keys").await, 0);
    eventually_rows(database, "mq_msgs", 0).await;
}
