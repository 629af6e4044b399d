//! Statements that Postgres rejects, delays or locks out, and poolers in front of Postgres.

use std::time::{Duration, Instant};

use requeuest::migrate::Migrator;
use requeuest::testkit::{self, TestDatabase};
use requeuest::{Durable, Options, Status};
use sqlx::postgres::PgConnectOptions;
use tokio::task::JoinSet;

use super::network::{Through, address, pool_through, through_a_proxy};
use super::{check_ledger, echo_server, load, short_lease_builder};
use crate::proxy::Proxy;
use crate::support::{
    LONG, Server, builder_on, closed_port, eventually, in_time, migrated, passing, post, reply,
    rows,
};

/// Longer than the shortest lease: these tests need the lease to hold, even on a busy machine.
const BUSY_LEASE: Duration = Duration::from_secs(2);
/// Read-only, disk full, statement timeout, deadlock, serialization failure.
const FAULTS: [&str; 5] = ["25006", "53100", "57014", "40P01", "40001"];

#[tokio::test]
async fn requests_postgres_rejects_fail_and_are_never_sent() {
    let Through { proxy, pool, .. } = through_a_proxy().await;
    let server = echo_server().await;
    let durable = short_lease_builder(&pool).build().unwrap();
    for code in FAULTS {
        for (statement, options) in [
            ("INSERT INTO mq_msgs", Options::default()),
            (".enqueue(", Options::default().ordered("key")),
        ] {
            proxy.refuse(statement, code);
            let request = post(server.url("/"), code).with(options);
            let error = in_time(durable.fire(request)).await.unwrap_err();
            assert!(
                error.is_database() && !error.is_indeterminate(),
                "{error:?}"
            );
            assert!(
                format!("{error:?}").contains("a fault for a test"),
                "{error:?}"
            );
            assert_eq!(proxy.refuse_nothing(), 1);
        }
        let good = in_time(durable.await_response(post(server.url("/"), "good"))).await;
        assert_eq!(good.unwrap().text().unwrap(), "good");
    }
    assert!(server.seen().iter().all(|seen| seen.body == "good"));
}

#[tokio::test]
async fn results_postgres_rejects_are_kept_until_it_accepts_them() {
    let Through {
        database,
        proxy,
        pool,
    } = through_a_proxy().await;
    let (server, gate) = Server::held(200).await;
    let durable = short_lease_builder(&pool)
        .lease(BUSY_LEASE)
        .build()
        .unwrap();
    let url = server.url("/");
    for (round, code) in FAULTS.into_iter().enumerate() {
        let mut callers = JoinSet::new();
        for number in 0..10 {
            let (durable, request) = (durable.clone(), post(&url, number.to_string()));
            callers.spawn(async move { durable.await_response(request).await });
        }
        server.wait_for(10 * (round + 1)).await;
        // Takes the requests over if their leases run out.
        let _other = short_lease_builder(database.pool())
            .lease(BUSY_LEASE)
            .build()
            .unwrap();
        proxy.refuse("INSERT INTO outcomes", code);
        gate.add_permits(10);
        // The leases are renewed throughout.
        passing(&database, BUSY_LEASE * 3 / 2).await;
        assert!(callers.try_join_next().is_none(), "{code}");
        assert!(proxy.refuse_nothing() > 0);
        for response in in_time(callers.join_all()).await {
            assert_eq!(response.unwrap().status(), 200);
        }
        // No other runner took the requests over in the meantime.
        assert_eq!(server.count(), 10 * (round + 1), "{code}");
    }
    println!("duplicates under failing settles: 0 of 50 requests");
}

#[tokio::test]
async fn results_that_cannot_be_stored_pile_up_to_a_limit() {
    const REQUESTS: usize = 2000;
    // The results that the engine lets wait, plus what the runner holds or is about to claim.
    const MOST: usize = 1024 + 3 * CONCURRENCY;
    const CONCURRENCY: usize = 16;
    let Through {
        database,
        proxy,
        pool,
    } = through_a_proxy().await;
    let server = echo_server().await;
    let durable = builder_on(&pool).concurrency(CONCURRENCY);
    let durable = durable.build().unwrap();
    proxy.refuse("INSERT INTO outcomes", "53100");
    for number in 0..REQUESTS {
        let request = post(server.url("/"), number.to_string());
        in_time(durable.fire(request)).await.unwrap();
    }
    passing(&database, Duration::from_secs(1)).await;
    let sent = server.count();
    assert!(sent >= 1024, "{sent} were sent");
    assert!(sent <= MOST, "{sent} were sent");
    assert!(proxy.refuse_nothing() > 0);
    server.wait_for(REQUESTS).await;
    durable.shutdown(LONG).await.unwrap();
    // One of them is the request of `passing`.
    let completed = "outcomes WHERE status = 'completed'";
    assert_eq!(rows(&database, completed).await, REQUESTS as i64 + 1);
    assert_eq!(server.count(), REQUESTS);
}

#[tokio::test]
async fn failed_attempts_postgres_rejects_are_kept_until_accepted() {
    let Through {
        database,
        proxy,
        pool,
    } = through_a_proxy().await;
    let server = Server::start(|number, _| async move {
        // Each request's first attempt fails.
        reply(if number % 2 == 0 { 503 } else { 200 }, "")
    })
    .await;
    let durable = short_lease_builder(&pool)
        .lease(BUSY_LEASE)
        .build()
        .unwrap();
    for (round, code) in FAULTS.into_iter().enumerate() {
        proxy.refuse("INSERT INTO attempts", code);
        let calling = in_time(durable.await_response(post(server.url("/"), code)));
        let (response, ()) = tokio::join!(calling, async {
            eventually("the statement is refused", || async { proxy.refused() > 0 }).await;
            let _other = short_lease_builder(database.pool())
                .lease(BUSY_LEASE)
                .build()
                .unwrap();
            passing(&database, BUSY_LEASE * 3 / 2).await;
            assert_eq!(server.count(), 2 * round + 1, "{code}");
            proxy.refuse_nothing();
        });
        assert_eq!(response.unwrap().status(), 200, "{code}");
        assert_eq!(server.count(), 2 * round + 2, "{code}");
    }
}

#[tokio::test]
async fn a_retry_postgres_cannot_confirm_is_made_later() {
    let Through { proxy, pool, .. } = through_a_proxy().await;
    let server =
        Server::start(
            |number, _| async move { reply(if number % 2 == 0 { 503 } else { 200 }, "") },
        )
        .await;
    let durable = short_lease_builder(&pool).build().unwrap();
    for (round, code) in FAULTS.into_iter().enumerate() {
        proxy.refuse("+ $4::int, state = $5", code);
        let calling = in_time(durable.await_response(post(server.url("/"), code)));
        let (response, ()) = tokio::join!(calling, async {
            eventually("the statement is refused", || async { proxy.refused() > 0 }).await;
            proxy.refuse_nothing();
        });
        assert_eq!(response.unwrap().status(), 200, "{code}");
        assert_eq!(server.count(), 2 * round + 2, "{code}");
    }
}

#[tokio::test]
async fn rejected_lease_renewals_are_repeated_in_time() {
    let Through {
        database,
        proxy,
        pool,
    } = through_a_proxy().await;
    let lease = 3 * super::LEASE;
    let (server, gate) = Server::held(200).await;
    let durable = short_lease_builder(&pool).lease(lease).build().unwrap();
    let waiting = tokio::spawn({
        let (durable, request) = (durable.clone(), post(server.url("/"), "x"));
        async move { durable.await_response(request).await }
    });
    server.wait_for(1).await;
    let _other = short_lease_builder(database.pool())
        .lease(lease)
        .build()
        .unwrap();
    for code in FAULTS {
        proxy.refuse("FOR UPDATE OF m SKIP LOCKED", code);
        eventually("a renewal is refused", || async { proxy.refused() > 0 }).await;
        proxy.refuse_nothing();
        passing(&database, lease * 2 / 3).await;
    }
    gate.add_permits(10);
    assert_eq!(in_time(waiting).await.unwrap().unwrap().status(), 200);
    assert_eq!(server.count(), 1);
}

#[tokio::test]
async fn polls_resume_soon_after_a_long_series_of_errors() {
    let Through {
        database,
        proxy,
        pool,
    } = through_a_proxy().await;
    let server = echo_server().await;
    let enqueue_only = short_lease_builder(database.pool())
        .runner(false)
        .build()
        .unwrap();
    let mut refused = 0;
    proxy.refuse("mq_poll", FAULTS[0]);
    let _durable = short_lease_builder(&pool).build().unwrap();
    // sqlxmq by itself waits for 100 ms after the first error and doubles the wait with each
    // further one: 3.2 s after the sixth.
    for code in FAULTS {
        proxy.refuse("mq_poll", code);
        refused += 2;
        eventually("more polls are refused", || async {
            proxy.refused() >= refused
        })
        .await;
    }
    let id = enqueue_only.fire(post(server.url("/"), "x")).await.unwrap();
    proxy.refuse_nothing();
    let back = Instant::now();
    let outcome = testkit::outcome(&enqueue_only, id, LONG).await;
    assert_eq!(outcome.unwrap().status(), Status::Completed);
    println!(
        "polls that were refused {refused} times resumed after {:?}",
        back.elapsed()
    );
    assert!(
        back.elapsed() < Duration::from_secs(5),
        "took {:?}",
        back.elapsed()
    );
    assert_eq!(server.count(), 1);
}

/// How long an application's transaction holds its ordering key.
fn hold_time() -> Duration {
    Duration::from_secs(if super::is_long() { 60 } else { 5 })
}

#[tokio::test]
async fn a_long_transaction_delays_only_its_own_keys() {
    let database = migrated().await;
    let server = echo_server().await;
    let durable = short_lease_builder(database.pool()).max_key_wait(2 * hold_time());
    let durable = durable.build().unwrap();
    let url = server.url("/");
    let ordered = |body: &'static str, key: &str| {
        post(&url, body).with(Options::default().ordered(key.to_owned()))
    };
    // The key's first request finishes while the transaction is open.
    let before = durable.fire(ordered("k before", "k")).await.unwrap();
    let mut transaction = database.pool().begin().await.unwrap();
    durable
        .fire_in(&mut *transaction, ordered("k held", "k"))
        .await
        .unwrap();
    let keyed = |key: String| post(&url, "keyed").with(Options::default().key(key).supersede("s"));
    let other = Options::default().key("held");
    durable
        .fire_in(&mut *transaction, post(&url, "keyed").with(other))
        .await
        .unwrap();
    let outcome = testkit::outcome(&durable, before, hold_time())
        .await
        .unwrap();
    assert_eq!(outcome.status(), Status::Completed);
    // More callers than the pool has connections.
    let mut behind = JoinSet::new();
    for _ in 0..20 {
        let (durable, request) = (durable.clone(), ordered("k after", "k"));
        behind.spawn(async move { durable.fire(request).await });
    }
    let began = Instant::now();
    let mut slowest = Duration::ZERO;
    let mut others = 0;
    while began.elapsed() < hold_time() {
        let started = Instant::now();
        // The transaction's owner awaits other requests in the meantime.
        in_time(durable.await_response(post(&url, "unordered")))
            .await
            .unwrap();
        in_time(durable.await_response(ordered("other key", "other")))
            .await
            .unwrap();
        in_time(durable.await_response(keyed(format!("other {others}"))))
            .await
            .unwrap();
        slowest = slowest.max(started.elapsed());
        others += 3;
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    println!("beside a held ordering key the slowest three of {others} took {slowest:?}");
    assert!(slowest < Duration::from_secs(3), "took {slowest:?}");
    assert!(behind.try_join_next().is_none());
    transaction.commit().await.unwrap();
    for fired in in_time(behind.join_all()).await {
        fired.unwrap();
    }
    let of_key = || {
        let seen = server.seen().into_iter().map(|seen| seen.body);
        seen.filter(|body| body.starts_with(b"k "))
            .collect::<Vec<_>>()
    };
    eventually("all requests of the key are delivered", || async {
        of_key().len() == 22
    })
    .await;
    let of_key = of_key();
    assert_eq!(
        (&*of_key[0], &*of_key[1]),
        (&b"k before"[..], &b"k held"[..])
    );
}

#[tokio::test]
async fn requests_too_large_for_one_batch_are_all_persisted() {
    const MIB: usize = 1024 * 1024;
    let database = migrated().await;
    let server = echo_server().await;
    let durable = short_lease_builder(database.pool())
        .max_request_body(16 * MIB)
        .max_response_body(16 * MIB)
        .build()
        .unwrap();
    let mut callers = JoinSet::new();
    for size in [1, MIB, 2 * MIB, 3 * MIB, 3 * MIB, 12 * MIB] {
        let (durable, url) = (durable.clone(), server.url("/"));
        let request = post(&url, "x".repeat(size));
        callers.spawn(async move { (size, durable.await_response(request).await) });
    }
    for (size, response) in in_time(callers.join_all()).await {
        assert_eq!(response.unwrap().body().len(), size);
    }
    assert_eq!(server.count(), 6);
}

#[tokio::test]
async fn the_largest_allowed_body_goes_both_ways() {
    // Half of what Postgres takes in one value. Even the short form's body is too large to come
    // with the claim.
    let mib = if super::is_long() { 512 } else { 32 };
    let size = mib * 1024 * 1024;
    let database = migrated().await;
    let server = echo_server().await;
    let durable = short_lease_builder(database.pool())
        .attempt_timeout(Duration::from_secs(120))
        .max_request_body(size)
        .max_response_body(size)
        .build()
        .unwrap();
    let body = bytes::Bytes::from(vec![b'x'; size]);
    let large = durable.await_response(post(server.url("/"), body.clone()));
    let small = async {
        // Small requests keep going meanwhile.
        let mut callers = JoinSet::new();
        for number in 0..20 {
            let (durable, request) = (durable.clone(), post(server.url("/"), number.to_string()));
            callers.spawn(async move { durable.await_response(request).await });
        }
        for response in in_time(callers.join_all()).await {
            response.unwrap();
        }
    };
    let (large, ()) = tokio::join!(large, small);
    assert!(*large.unwrap().body() == body);
    assert_eq!(server.count(), 21);
}

#[tokio::test]
async fn a_pooler_that_drops_the_search_path_has_its_own_error() {
    let database = migrated().await;
    let server = echo_server().await;
    let proxy = Proxy::pooler(address(&database)).await;
    let durable = short_lease_builder(&pool_through(&proxy, &database))
        .build()
        .unwrap();
    let error = in_time(durable.fire(post(server.url("/"), "x")))
        .await
        .unwrap_err();
    assert!(error.is_not_migrated(), "{error:?}");
    assert!(error.to_string().contains("connect_options"), "{error}");
    assert_eq!(server.count(), 0);
}

/// Everything that an application does, with its own pool behind a pooler and the crate's direct.
async fn works_behind_a_pooler(database: &TestDatabase, application: &sqlx::PgPool) {
    // The sessions behind the pooler are used again.
    for _ in 0..2 {
        Migrator::new().undo(application).await.unwrap();
        requeuest::migrate(application).await.unwrap();
    }
    let server = echo_server().await;
    let durable: Durable = short_lease_builder(application)
        .connect_options(database.options())
        .build()
        .unwrap();
    let mut transaction = application.begin().await.unwrap();
    let committed = durable
        .fire_in(&mut *transaction, post(server.url("/"), "committed"))
        .await
        .unwrap();
    transaction.commit().await.unwrap();
    let mut transaction = application.begin().await.unwrap();
    let rolled_back = durable
        .fire_in(&mut *transaction, post(server.url("/"), "rolled back"))
        .await
        .unwrap();
    transaction.rollback().await.unwrap();
    let outcome = testkit::outcome(&durable, committed, LONG).await.unwrap();
    assert_eq!(outcome.status(), Status::Completed);
    assert_eq!(durable.status(rolled_back).await.unwrap(), None);
    assert_eq!(server.count(), 1);
    let load_server = echo_server().await;
    let ledger = load(&durable, &load_server.url("/"), 4, 10).await;
    let twice = check_ledger("a pooler", &durable, &load_server, ledger).await;
    assert_eq!(twice, 0);
    assert_eq!(rows(database, "mq_msgs").await, 0);
}

#[tokio::test]
async fn behind_a_pooler_everything_works_with_direct_options() {
    let database = migrated().await;
    let proxy = Proxy::pooler(address(&database)).await;
    works_behind_a_pooler(&database, &pool_through(&proxy, &database)).await;
}

/// Starts pgbouncer in transaction mode, which needs the program. The options lead through it.
pub async fn pgbouncer(database: &TestDatabase) -> (Pgbouncer, PgConnectOptions) {
    let port = closed_port().await.port();
    let options = database.options();
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("pgbouncer.ini");
    let text = format!(
        "[databases]\n* = host={} port={} user={}\n[pgbouncer]\n\
         listen_addr = 127.0.0.1\nlisten_port = {port}\n\
         auth_type = any\npool_mode = transaction\ndefault_pool_size = 2\nunix_socket_dir =\n\
         ignore_startup_parameters = extra_float_digits\n",
        options.get_host(),
        options.get_port(),
        options.get_username(),
    );
    std::fs::write(&config, text).unwrap();
    let mut command = tokio::process::Command::new("pgbouncer");
    // pgbouncer refuses to run as root.
    #[cfg(unix)]
    {
        use std::os::unix::fs::{MetadataExt, PermissionsExt};
        let open = std::fs::Permissions::from_mode(0o755);
        std::fs::set_permissions(dir.path(), open).unwrap();
        if std::fs::metadata(&config).unwrap().uid() == 0 {
            command.args(["--user", "nobody"]);
        }
    }
    let process = command
        .arg(&config)
        .kill_on_drop(true)
        .spawn()
        .expect("pgbouncer is not installed");
    eventually("pgbouncer listens", || async {
        tokio::net::TcpStream::connect(("127.0.0.1", port))
            .await
            .is_ok()
    })
    .await;
    let options = options
        .host("127.0.0.1")
        .port(port)
        .ssl_mode(sqlx::postgres::PgSslMode::Disable)
        // sqlx needs this behind a pooler in transaction mode.
        .statement_cache_capacity(0);
    let pgbouncer = Pgbouncer { process, _dir: dir };
    (pgbouncer, options)
}

/// A pgbouncer that ends with it.
pub struct Pgbouncer {
    pub process: tokio::process::Child,
    _dir: tempfile::TempDir,
}

#[tokio::test]
#[ignore = "needs pgbouncer; run by .ci/run"]
async fn behind_pgbouncer_everything_works_with_direct_options() {
    let database = migrated().await;
    let (mut pgbouncer, options) = pgbouncer(&database).await;
    let application = sqlx::PgPool::connect_lazy_with(options);
    works_behind_a_pooler(&database, &application).await;
    pgbouncer.process.kill().await.unwrap();
}
