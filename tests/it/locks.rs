//! Keys are locked exactly, however many a transaction has, and never fill the server's lock table.

use std::time::{Duration, Instant};

use requeuest::testkit::TestDatabase;
use requeuest::{Durable, Options, Request};
use sqlx::{Connection, Executor, PgConnection};

use crate::processes::{is_long, median_and_max};
use crate::support::{builder, count, eventually, in_time, migrated, passing, post, rows};

const URL: &str = "http://127.0.0.1:9/";

fn idle(database: &TestDatabase) -> Durable {
    builder(database).runner(false).build().unwrap()
}

fn ordered(key: impl Into<String>) -> Request {
    post(URL, "x").with(Options::default().ordered(key.into()))
}

fn keyed(key: &str, body: &'static str) -> Request {
    post(URL, body).with(Options::default().key(key))
}

/// More keys than a transaction takes advisory locks for.
fn many(prefix: &'static str) -> impl Iterator<Item = Request> {
    (0..500).map(move |number| ordered(format!("{prefix}{number}")))
}

async fn advisory_locks(database: &TestDatabase) -> i64 {
    let locks = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND database = (
                     SELECT oid FROM pg_database WHERE datname = current_database()
                 )";
    count(database, locks).await
}

/// Waits until this many sessions wait for a lock of any kind.
async fn until_waiting(database: &TestDatabase, sessions: i64) {
    let waiting = "SELECT count(*) FROM pg_stat_activity
                   WHERE datname = current_database() AND wait_event_type = 'Lock'";
    eventually("a session waits", || async {
        count(database, waiting).await == sessions
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_huge_fire_many_disturbs_no_other_session() {
    // Several times what the lock table has room for.
    let requests = if is_long() { 200_000 } else { 20_000 };
    let database = migrated().await;
    let (durable, other) = (idle(&database), idle(&database));
    let own = "CREATE TABLE public.own (number int)";
    database.pool().execute(own).await.unwrap();
    let firing = tokio::spawn(async move {
        let all = (0..requests).map(|number| {
            let options = Options::default().key(number.to_string());
            post(URL, "x").with(options.ordered(format!("order {number}")))
        });
        durable.fire_many(all).await
    });
    let began_firing = Instant::now();
    let (mut connecting, mut writing) = (Vec::new(), Vec::new());
    let (mut most, mut slowest, mut rounds) = (0, Duration::ZERO, 0);
    while !firing.is_finished() {
        most = most.max(advisory_locks(&database).await);
        let began = Instant::now();
        // A new connection needs room in the lock table.
        let mut session = PgConnection::connect(database.url()).await.unwrap();
        connecting.push(began.elapsed());
        // What has nothing to do with this crate.
        let write = "INSERT INTO public.own (number) VALUES (1)";
        session.execute(write).await.unwrap();
        writing.push(began.elapsed() - connecting[connecting.len() - 1]);
        let options = Options::default().key(format!("other {rounds}"));
        let request = post(URL, "x").with(options.ordered(format!("other {rounds}")));
        other.fire_in(&mut session, request).await.unwrap();
        other
            .fire(ordered(format!("another {rounds}")))
            .await
            .unwrap();
        session.close().await.unwrap();
        slowest = slowest.max(began.elapsed());
        rounds += 1;
    }
    let took = began_firing.elapsed();
    for (what, times) in [("a connection", connecting), ("a write", writing)] {
        let (median, max) = median_and_max(times);
        println!("{requests} requests in {took:?}: {what} takes {median:?}, at most {max:?}");
        assert!(max < Duration::from_secs(1), "{what}: {max:?}");
    }
    assert_eq!(firing.await.unwrap().unwrap().len(), requests);
    let expected = i64::try_from(requests).unwrap() + 2 * rounds;
    assert_eq!(rows(&database, "mq_msgs").await, expected);
    assert_eq!(rows(&database, "claimed_keys").await, 0);
    assert!(rounds > 2, "{rounds} rounds");
    assert!(most < 200, "{most} advisory locks");
    assert!(slowest < Duration::from_secs(2), "{slowest:?}");
}

#[tokio::test]
async fn single_calls_of_one_transaction_take_few_locks() {
    let database = migrated().await;
    let durable = idle(&database);
    let mut transaction = database.pool().begin().await.unwrap();
    for number in 0..1000 {
        let options = Options::default()
            .key(number.to_string())
            .supersede(number.to_string())
            .ordered(number.to_string());
        durable
            .fire_in(&mut *transaction, post(URL, "x").with(options))
            .await
            .unwrap();
    }
    let locks = advisory_locks(&database).await;
    assert!(locks < 80, "{locks} advisory locks");
    transaction.commit().await.unwrap();
    assert_eq!(rows(&database, "mq_msgs").await, 1000);
}

#[tokio::test]
async fn a_single_call_waits_for_the_bulk_that_has_its_key_and_for_no_other() {
    let database = migrated().await;
    let (durable, other) = (idle(&database), idle(&database));
    let mut bulk = database.pool().begin().await.unwrap();
    durable.fire_many_in(&mut bulk, many("a")).await.unwrap();
    in_time(other.fire(ordered("free"))).await.unwrap();
    // One call that tries, and one that waits in a transaction.
    let trying = tokio::spawn({
        let other = other.clone();
        async move { other.fire(ordered("a7")).await.unwrap() }
    });
    let waiting = tokio::spawn({
        let (other, pool) = (other.clone(), database.pool().clone());
        async move {
            let mut transaction = pool.begin().await.unwrap();
            let id = other.fire_in(&mut *transaction, ordered("a8")).await;
            transaction.commit().await.unwrap();
            id.unwrap()
        }
    });
    until_waiting(&database, 1).await;
    // A second chunk of the same bulk has the keys again.
    durable.fire_many_in(&mut bulk, many("a")).await.unwrap();
    in_time(other.fire(ordered("free"))).await.unwrap();
    assert!(!trying.is_finished() && !waiting.is_finished());
    bulk.commit().await.unwrap();
    for late in [trying, waiting] {
        let id = in_time(late).await.unwrap();
        let last = format!(
            "SELECT count(*) FROM requeuest.mq_msgs m JOIN requeuest.mq_msgs late
                 ON late.id = '{id}' AND m.channel_args = late.channel_args AND m.seq < late.seq"
        );
        assert_eq!(count(&database, &last).await, 2);
    }
}

#[tokio::test]
async fn a_bulk_waits_for_the_transaction_that_has_one_of_its_keys() {
    let database = migrated().await;
    let (durable, other) = (idle(&database), idle(&database));
    let mut single = database.pool().begin().await.unwrap();
    other.fire_in(&mut *single, ordered("a7")).await.unwrap();
    let bulk = tokio::spawn({
        let durable = durable.clone();
        async move { durable.fire_many(many("a")).await }
    });
    until_waiting(&database, 1).await;
    // Meanwhile the bulk keeps no key from others.
    in_time(other.fire(ordered("a8"))).await.unwrap();
    in_time(durable.fire_many(many("b"))).await.unwrap();
    single.commit().await.unwrap();
    in_time(bulk).await.unwrap().unwrap();
    let first = "SELECT count(*) FROM requeuest.mq_msgs m JOIN requeuest.mq_msgs earlier
                     ON m.channel_args = earlier.channel_args AND earlier.seq < m.seq";
    assert_eq!(count(&database, first).await, 2);
}

#[tokio::test]
async fn bulks_and_single_calls_agree_on_the_request_of_a_key() {
    let database = migrated().await;
    let (durable, other) = (idle(&database), idle(&database));
    let first = durable.fire(keyed("a", "x")).await.unwrap();
    // Two requests with a key are one, and an earlier request keeps its key.
    let batch = || ["a", "b", "b", "c"].map(|key| keyed(key, "x"));
    let mut bulk = database.pool().begin().await.unwrap();
    let ids = durable.fire_many_in(&mut bulk, batch()).await.unwrap();
    assert_eq!(ids[0], first);
    assert_eq!(ids[1], ids[2]);
    let waiting = [
        tokio::spawn({
            let other = other.clone();
            async move { vec![other.fire(keyed("b", "x")).await.unwrap()] }
        }),
        tokio::spawn({
            let other = other.clone();
            async move { other.fire_many(batch()).await.unwrap() }
        }),
    ];
    in_time(other.fire(keyed("free", "x"))).await.unwrap();
    until_waiting(&database, 1).await;
    bulk.commit().await.unwrap();
    let [single, batch] = waiting;
    assert_eq!(in_time(single).await.unwrap(), [ids[1]]);
    assert_eq!(in_time(batch).await.unwrap(), ids);
    assert_eq!(rows(&database, "mq_msgs").await, 4);

    let many = [keyed("new", "x"), keyed("b", "another body")];
    let error = in_time(durable.fire_many(many)).await.unwrap_err();
    assert!(error.is_key_conflict(), "{error}");
    assert_eq!(error.request_id(), Some(ids[1]));
    assert_eq!(rows(&database, "mq_msgs").await, 4);
    assert_eq!(rows(&database, "request_keys WHERE key = 'new'").await, 0);
}

#[tokio::test]
async fn a_transaction_uses_a_key_again_for_which_another_one_waits() {
    let database = migrated().await;
    let (durable, other) = (idle(&database), idle(&database));
    let replacing = || post(URL, "x").with(Options::default().supersede("s"));
    for savepoint in [false, true] {
        let mut transaction = database.pool().begin().await.unwrap();
        // From here on, its keys are claimed by rows.
        durable
            .fire_many_in(&mut transaction, many("a"))
            .await
            .unwrap();
        {
            let mut inner = transaction.begin().await.unwrap();
            durable.fire_many_in(&mut inner, many("b")).await.unwrap();
            durable.fire_in(&mut *inner, ordered("c")).await.unwrap();
            durable.fire_in(&mut *inner, replacing()).await.unwrap();
            inner.commit().await.unwrap();
        }
        let mut waiting = Vec::new();
        for request in [ordered("b7"), ordered("c"), replacing()] {
            let (other, pool) = (other.clone(), database.pool().clone());
            waiting.push(tokio::spawn(async move {
                let mut transaction = pool.begin().await.unwrap();
                other.fire_in(&mut *transaction, request).await.unwrap();
                transaction.commit().await.unwrap();
            }));
        }
        until_waiting(&database, 3).await;
        if savepoint {
            transaction.execute("SAVEPOINT again").await.unwrap();
        }
        let again = in_time(durable.fire_many_in(&mut transaction, many("b")));
        again.await.unwrap();
        for request in [ordered("b7"), ordered("c"), replacing()] {
            in_time(durable.fire_in(&mut *transaction, request))
                .await
                .unwrap();
        }
        assert!(waiting.iter().all(|other| !other.is_finished()));
        transaction.commit().await.unwrap();
        for other in waiting {
            in_time(other).await.unwrap();
        }
    }
}

#[tokio::test]
async fn a_keyed_insert_whose_commit_waits_is_not_tried_again() {
    let database = migrated().await;
    let durable = idle(&database);
    // As a commit that notifies, which waits for all others that do.
    let waits = "
        CREATE SEQUENCE public.commits;
        CREATE FUNCTION public.wait() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            PERFORM nextval('public.commits'), pg_advisory_xact_lock(1);
            RETURN NULL;
        END;
        $$;
        CREATE CONSTRAINT TRIGGER waits AFTER INSERT ON requeuest.mq_msgs
            DEFERRABLE INITIALLY DEFERRED FOR EACH ROW WHEN (NEW.channel_name = 'default')
            EXECUTE FUNCTION public.wait()";
    database.pool().execute(waits).await.unwrap();
    let mut other = database.pool().begin().await.unwrap();
    let lock = "SELECT pg_advisory_xact_lock(1)";
    other.execute(lock).await.unwrap();
    let firing = tokio::spawn(async move { durable.fire(keyed("a", "x")).await });
    until_waiting(&database, 1).await;
    passing(&database, Duration::from_millis(50)).await;
    other.commit().await.unwrap();
    in_time(firing).await.unwrap().unwrap();
    let commits = "SELECT last_value FROM public.commits";
    assert_eq!(count(&database, commits).await, 1);
}
