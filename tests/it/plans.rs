//! What statements read if they were planned for an empty queue.
//!
//! A queue is empty most of the time, and its statistics say so. No statement may read through a
//! backlog that builds up afterwards.

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use requeuest::retry::RetryPolicy;
use requeuest::testkit::{Postgres, TestDatabase};
use requeuest::{DeadLetterFilter, Durable, Options, RequestId, Status};
use sqlx::postgres::PgPoolOptions;
use sqlx::{Executor, PgPool};
use tokio::task::JoinSet;
use uuid::Uuid;

use crate::support::{LONG, Server, count, eventually, in_time, migrated, post, quick, reply};

/// How many requests of one session wait and are never sent.
const WAITING: usize = 5000;
/// How many wait in a queue that was empty. On a busy machine, polls and renewals come to some ten
/// thousand reads.
const MANY: usize = 20_000;
const REQUESTS: usize = 200;
/// The application name of the sessions whose reads are counted.
const SESSIONS: &str = "counted";
/// How many rows [`backlog`] adds.
const BACKLOG: i64 = 20_000;

/// A database whose queue was empty when its statistics were gathered, and was filled afterwards.
async fn filled_after_its_statistics(server: &Server) -> TestDatabase {
    let database = migrated().await;
    // Its sessions have ended, and their reads are counted, before the test begins to count.
    let options = database.options().application_name(SESSIONS);
    let pool = PgPoolOptions::new().connect_lazy_with(options);
    let durable = Durable::builder(pool.clone())
        .runner(false)
        .build()
        .unwrap();
    let delay = Options::default().delay(Duration::from_secs(3600));
    let waiting = || (0..MANY).map(|_| post(server.url("/never"), "x").with(delay.clone()));
    for table in ["mq_msgs", "mq_payloads"] {
        let kept = format!("ALTER TABLE requeuest.{table} SET (autovacuum_enabled = false)");
        pool.execute(&*kept).await.unwrap();
    }
    durable.fire_many(waiting()).await.unwrap();
    for statement in [
        "DELETE FROM requeuest.mq_msgs",
        "DELETE FROM requeuest.mq_payloads",
        "ANALYZE requeuest.mq_msgs",
        "ANALYZE requeuest.mq_payloads",
    ] {
        pool.execute(statement).await.unwrap();
    }
    durable.fire_many(waiting()).await.unwrap();
    durable.shutdown(Duration::ZERO).await.unwrap();
    pool.close().await;
    database
}

#[tokio::test]
async fn a_callers_session_that_knew_the_queue_empty_reads_through_no_backlog() {
    let database = migrated().await;
    let options = database.options().application_name(SESSIONS);
    let caller = PgPoolOptions::new()
        .max_connections(1)
        .connect_with(options)
        .await
        .unwrap();
    let durable = Durable::builder(database.pool().clone())
        .runner(false)
        .build()
        .unwrap();
    for table in ["mq_msgs", "mq_payloads", "request_keys", "unhandled"] {
        let kept = format!("ALTER TABLE requeuest.{table} SET (autovacuum_enabled = false)");
        database.pool().execute(&*kept).await.unwrap();
    }
    database.pool().execute("VACUUM ANALYZE").await.unwrap();
    let options = |round: usize, number: usize| {
        let key = format!("{round} {number}");
        Options::default().key(&*key).ordered(&*key)
    };
    let request = |options| post("http://127.0.0.1:9/", "x").with(options);
    let round = async |round: usize| {
        for number in 0..10 {
            let mut transaction = caller.begin().await.unwrap();
            let alone = request(options(round, number).supersede("s"));
            durable.fire_in(&mut *transaction, alone).await.unwrap();
            let many = (0..10).map(|one| request(options(round, 10 + number * 10 + one)));
            durable.fire_many_in(&mut transaction, many).await.unwrap();
            for handing_over in [
                "SELECT requeuest.take_unhandled('default')",
                "SELECT requeuest.mark_handled(gen_random_uuid(), pg_current_xact_id()::text)",
            ] {
                sqlx::query(handing_over)
                    .execute(&mut *transaction)
                    .await
                    .unwrap();
            }
            if round == 0 {
                transaction.rollback().await.unwrap();
            } else {
                transaction.commit().await.unwrap();
            }
        }
    };
    // Postgres plans the statements of a session a few times before it keeps a plan.
    round(0).await;
    let waiting = (0..WAITING).map(|number| request(options(2, number)));
    durable.fire_many(waiting).await.unwrap();
    let unhandled = format!(
        "INSERT INTO requeuest.unhandled (id, channel_name, slot)
         SELECT gen_random_uuid(), 'default', 0 FROM generate_series(1, {WAITING})"
    );
    database.pool().execute(&*unhandled).await.unwrap();
    round(1).await;
    caller.close().await;
    let read = "SELECT coalesce(sum(seq_tup_read), 0)::bigint FROM pg_stat_user_tables
                WHERE schemaname = 'requeuest'
                    AND relname IN ('mq_msgs', 'request_keys', 'unhandled')";
    sessions_end(&database).await;
    let read = count(&database, read).await;
    assert!(read < WAITING as i64, "{read} rows were read");
}

/// Waits until the counted sessions have ended. Then their counters are complete.
async fn sessions_end(database: &TestDatabase) {
    let sessions =
        format!("SELECT count(*) FROM pg_stat_activity WHERE application_name = '{SESSIONS}'");
    eventually("the end of the sessions", || async {
        count(database, &sessions).await == 0
    })
    .await;
}

/// How many index entries and rows the counted sessions have read.
async fn read(database: &TestDatabase) -> i64 {
    sessions_end(database).await;
    let read = "SELECT (
            SELECT sum(idx_tup_read) FROM pg_stat_user_indexes WHERE schemaname = 'requeuest'
        )::bigint + (
            SELECT sum(seq_tup_read) FROM pg_stat_user_tables WHERE schemaname = 'requeuest'
        )::bigint";
    count(database, read).await
}

#[tokio::test]
async fn no_statement_reads_through_the_backlog() {
    let server = Server::start(|_, seen| async move {
        match seen.uri.path() {
            "/fails" => reply(503, ""),
            // The lease is renewed meanwhile.
            "/slow" => {
                tokio::time::sleep(Duration::from_millis(700)).await;
                reply(200, "")
            }
            _ => reply(200, ""),
        }
    })
    .await;
    let database = filled_after_its_statistics(&server).await;
    let before = read(&database).await;
    let options = database.options().application_name(SESSIONS);
    let pool = PgPoolOptions::new().connect_lazy_with(options);
    let durable = Durable::builder(pool.clone())
        .retry(RetryPolicy::constant(Duration::from_millis(20)).max_attempts(2))
        .lease(Duration::from_secs(1))
        .build()
        .unwrap();

    let mut awaited = JoinSet::new();
    for number in 0..REQUESTS {
        let durable = durable.clone();
        let path = ["/", "/", "/fails", "/slow"][number % 4];
        let request = post(server.url(path), "x");
        awaited.spawn(async move { durable.await_response(request).await });
    }
    in_time(awaited.join_all()).await;

    // A poll claims these requests.
    let mut transaction = pool.begin().await.unwrap();
    let requests = (0..REQUESTS).map(|_| post(server.url("/"), "x"));
    let ids = durable.fire_many_in(&mut transaction, requests).await;
    transaction.commit().await.unwrap();
    for id in ids.unwrap() {
        in_time(durable.response(id)).await.unwrap();
    }

    // The runner takes these requests over: their leases have run out.
    let mut transaction = pool.begin().await.unwrap();
    let requests = (0..REQUESTS).map(|_| post(server.url("/"), "x"));
    let ids = durable.fire_many_in(&mut transaction, requests).await;
    let ids = ids.unwrap();
    let lapsed = "UPDATE requeuest.mq_msgs
                  SET state = 'claimed', claim_no = 1, attempts = 1,
                      attempt_at = now() - interval '1 hour'
                  WHERE id = ANY ($1)";
    sqlx::query(lapsed)
        .bind(ids.iter().map(|id| Uuid::from(*id)).collect::<Vec<_>>())
        .execute(&mut *transaction)
        .await
        .unwrap();
    transaction.commit().await.unwrap();
    for id in ids {
        in_time(durable.response(id)).await.unwrap();
    }

    let delayed = Options::default().delay(Duration::from_secs(3600));
    for number in 0..REQUESTS / 4 {
        let key = format!("key {number}");
        let options = delayed.clone().key(&*key).supersede(&*key).ordered(&*key);
        let request = post(server.url("/"), "x").with(options);
        let id = durable.fire(request).await.unwrap();
        let waiting = durable.admin().request(id).await.unwrap();
        assert!(waiting.unwrap().hold.is_some());
        assert!(durable.cancel(id).await.unwrap());
        let cancelled = durable.admin().request(id).await.unwrap();
        assert_eq!(cancelled.unwrap().status, Status::Cancelled);
    }
    let kept = durable
        .dead_letters(&DeadLetterFilter::default().limit(1000))
        .await
        .unwrap();
    assert_eq!(kept.len(), REQUESTS / 4);
    durable.shutdown(Duration::from_secs(5)).await.unwrap();
    pool.close().await;
    let read = read(&database).await - before;
    // Fewer than if a statement had read through the backlog a single time.
    let most = (MANY * 2) as i64;
    println!("{read} rows and index entries were read");
    assert!(read < most, "{read} rows and index entries were read");
}

/// Adds rows that are due after the given time, copies of a waiting one, spread over groups.
async fn backlog(pool: &PgPool, like: RequestId, channel: &str, due: &str) {
    let insert = format!(
        "WITH p AS (
            INSERT INTO requeuest.mq_payloads (id, name, head, body)
            SELECT gen_random_uuid(), l.name, l.head, l.body
            FROM requeuest.mq_payloads l, generate_series(1, {BACKLOG}) WHERE l.id = $1
            RETURNING id
        )
        INSERT INTO requeuest.mq_msgs (id, channel_name, channel_args, attempt_at, priority)
        SELECT id, $2, to_char((random() * 2000)::int, 'FM0000') || '|d|http://some.where',
            now() + {due},
            ('{{high,normal,low}}'::requeuest.mq_priority[])[1 + floor(random() * 3)::int]
        FROM p"
    );
    sqlx::query(&insert)
        .bind(Uuid::from(like))
        .bind(channel)
        .execute(pool)
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_statement_scans_a_table_that_was_empty_when_planned() {
    let database = Postgres::shared().await.unwrap().database().await.unwrap();
    // A session's counters are complete once it has ended.
    let ended = async |name: &str| {
        let sessions = format!(
            "SELECT count(*) FROM pg_stat_activity
             WHERE datname = current_database() AND application_name = '{name}'"
        );
        let none = || async { count(&database, &sessions).await == 0 };
        eventually(&format!("{name}'s sessions have ended"), none).await;
    };
    let options = database.options();
    let callers = options
        .clone()
        .application_name("caller")
        .options([("enable_seqscan", "off")]);
    let pool = PgPoolOptions::new().connect_lazy_with(callers);
    requeuest::migrate(&pool).await.unwrap();
    // Postgres assumes that a table it has never analyzed isn't tiny.
    database.pool().execute("VACUUM ANALYZE").await.unwrap();
    ended("caller").await;
    let reset = "SELECT pg_stat_reset()";
    database.pool().execute(reset).await.unwrap();

    let server = Server::in_turn(&[200, 503, 200]).await;
    // Few connections, so that the later calls use connections that have planned all statements.
    let durable = Durable::builder(pool.clone())
        .max_connections(2)
        .connect_options(options.application_name("handle"))
        .retry(quick())
        .build()
        .unwrap();
    let round = || async {
        let awaited = (0..20).map(|_| durable.await_response(post(server.url("/"), "x")));
        for response in in_time(join_all(awaited)).await {
            assert_eq!(response.unwrap().status(), 200);
        }
        let options = [
            Options::default().ordered("key"),
            Options::default().delay(Duration::from_millis(5)),
            Options::default(),
        ];
        for options in options {
            let request = post(server.url("/"), "x").with(options);
            let id = in_time(durable.fire(request)).await.unwrap();
            let response = in_time(durable.response(id)).await.unwrap();
            assert_eq!(response.status(), 200);
            assert!(durable.admin().request(id).await.unwrap().is_some());
            let status = durable.status(id).await.unwrap();
            assert_eq!(status, Some(Status::Completed));
        }
        let mut transaction = pool.begin().await.unwrap();
        let id = durable
            .fire_in(&mut *transaction, post(server.url("/"), "x"))
            .await
            .unwrap();
        transaction.commit().await.unwrap();
        in_time(durable.response(id)).await.unwrap();
        24
    };
    let mut enqueued = round().await;

    let hour = Options::default().delay(Duration::from_secs(3600));
    let like = durable
        .fire(post(server.url("/"), "x").with(hour))
        .await
        .unwrap();
    backlog(&pool, like, "default", "interval '1 hour'").await;
    backlog(&pool, like, "elsewhere", "interval '-1 hour'").await;
    enqueued += 1 + 2 * BACKLOG + round().await;
    // More due rows than a poll looks at by age: it has to skip through groups to find them all.
    let sent = server.count();
    pool.execute(
        "UPDATE requeuest.mq_msgs SET attempt_at = now() WHERE id IN (
            SELECT id FROM requeuest.mq_msgs WHERE channel_name = 'default' AND state = 'waiting'
            ORDER BY attempt_at LIMIT 1500
         )",
    )
    .await
    .unwrap();
    server.wait_for(sent + 1500).await;
    durable.shutdown(LONG).await.unwrap();
    ended("handle").await;
    let left = "SELECT count(*) FROM requeuest.mq_msgs";
    let (left,): (i64,) = sqlx::query_as(left).fetch_one(&pool).await.unwrap();
    drop((durable, pool));
    ended("caller").await;

    // Before Postgres 15 the counters still take a moment.
    let rows = "SELECT n_tup_ins = $1 AND n_tup_ins - n_tup_del = $2 FROM pg_stat_user_tables
                WHERE schemaname = 'requeuest' AND relname = 'mq_msgs'";
    eventually("the counters are in", || async {
        let rows = sqlx::query_scalar(rows).bind(enqueued).bind(left);
        rows.fetch_one(database.pool()).await.unwrap()
    })
    .await;
    let read: Vec<(String, i64)> = sqlx::query_as(
        "SELECT relname::text, seq_scan FROM pg_stat_user_tables
         WHERE schemaname = 'requeuest' AND seq_scan > 0
             AND relname ~ '^(mq_msgs|mq_payloads|attempts|outcomes)'",
    )
    .fetch_all(database.pool())
    .await
    .unwrap();
    assert_eq!(read, []);
}

#[tokio::test]
async fn no_poll_reads_the_backlog_of_a_paused_channel() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let enqueuing = Durable::builder(database.pool().clone()).runner(false);
    let enqueuing = enqueuing.build().unwrap();
    let hour = Options::default().delay(Duration::from_secs(3600));
    let like = post(server.url("/"), "x").with(hour);
    let like = enqueuing.fire(like).await.unwrap();
    backlog(database.pool(), like, "paused", "interval '-1 hour'").await;
    enqueuing.admin().pause_channel("paused").await.unwrap();
    for delivers_all in [false, true] {
        let before = read(&database).await;
        let options = database.options().application_name(SESSIONS);
        let pool = PgPoolOptions::new().connect_lazy_with(options);
        let mut builder = Durable::builder(pool.clone());
        if delivers_all {
            builder = builder.deliver_all();
        }
        let durable = builder.build().unwrap();
        // Polls claim these.
        let requests = (0..REQUESTS).map(|_| post(server.url("/"), "x"));
        let ids = enqueuing.fire_many(requests).await.unwrap();
        for id in ids {
            in_time(durable.response(id)).await.unwrap();
        }
        durable.shutdown(Duration::from_secs(5)).await.unwrap();
        pool.close().await;
        let read = read(&database).await - before;
        assert!(read < BACKLOG, "{read} rows and index entries were read");
    }
    assert_eq!(server.count(), 2 * REQUESTS);
}

/// The quick form has enough dead letters for a scan to be seen. The long form measures.
fn letters() -> i64 {
    let long = std::env::var("REQUEUEST_LONG_FAULTS").is_ok_and(|value| value == "1");
    if long { 300_000 } else { 20_000 }
}

#[tokio::test]
async fn a_page_of_dead_letters_reads_what_it_shows_whatever_the_filter() {
    let database = migrated().await;
    let pool = database.pool();
    for statement in [
        "ALTER TABLE requeuest.outcomes_kept SET (autovacuum_enabled = false)",
        "ANALYZE requeuest.outcomes_kept",
    ] {
        pool.execute(statement).await.unwrap();
    }
    let options = database.options().application_name(SESSIONS);
    let counted = PgPoolOptions::new().connect_lazy_with(options);
    // One connection, so that a plan that is kept would be one for few rows.
    let durable = Durable::builder(counted.clone())
        .runner(false)
        .max_connections(2)
        .build()
        .unwrap();
    let fill = |number: i64| {
        format!(
            "INSERT INTO requeuest.outcomes (
                slot, id, channel_name, channel_args, status, attempts, created_at, finished_at,
                destination, format
             )
             SELECT
                -1, gen_random_uuid(), 'c', 'g', 'discarded', 1, now(),
                now() - i * interval '5 seconds', 'https://a.example:443', 1 + i % 2
             FROM generate_series(1, {number}) i"
        )
    };
    let common = "https://a.example";
    let (hour, year) = (Duration::from_secs(3600), Duration::from_secs(365 * 86_400));
    let filter = || DeadLetterFilter::default().limit(50);
    let filters = [
        filter(),
        filter().channel("c"),
        filter().channel("none"),
        filter().destination(common),
        filter().destination("https://b.example"),
        filter().channel("c").destination(common),
        filter().channel("c").destination("https://b.example"),
        filter().channel("none").destination(common),
        filter().status(Status::Discarded),
        filter().status(Status::Ambiguous),
        filter().status(Status::Ambiguous).channel("c"),
        filter().status(Status::Ambiguous).destination(common),
        filter()
            .status(Status::Discarded)
            .channel("c")
            .destination(common),
        filter().finished_within(hour / 3600),
        filter()
            .finished_within(hour)
            .channel("c")
            .destination(common),
        filter().finished_before(year),
        filter().finished_before(year).channel("c"),
        filter().finished_before(year).destination(common),
    ];
    let round = async |print: bool| {
        for filter in &filters {
            let began = Instant::now();
            let page = durable.dead_letters(filter).await.unwrap();
            let listed = began.elapsed();
            let counted = durable.dead_letter_count(filter).await.unwrap();
            assert_eq!(counted, page.len() as u64, "{filter:?}");
            if let Some(last) = page.last() {
                let next = filter.clone().after(last);
                assert_eq!(durable.dead_letters(&next).await.unwrap().len(), page.len());
            }
            if page.is_empty() {
                assert_eq!(durable.purge_dead_letters(filter).await.unwrap(), 0);
                assert!(durable.replay_all(filter).await.unwrap().is_empty());
            }
            if print {
                let took = began.elapsed() - listed;
                println!(
                    "{} of {} in {listed:?}, the rest {took:?}: {filter:?}",
                    page.len(),
                    letters()
                );
            }
        }
    };
    pool.execute(&*fill(400)).await.unwrap();
    round(false).await;
    pool.execute(&*fill(letters())).await.unwrap();
    round(true).await;
    durable.shutdown(Duration::ZERO).await.unwrap();
    counted.close().await;
    let read = read(&database).await;
    assert!(
        read < letters() / 2,
        "{read} rows and index entries were read"
    );
}
