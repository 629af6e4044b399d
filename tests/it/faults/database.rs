//! What Postgres refuses, delays or locks, and poolers in front of it.

use std::time::{Duration, Instant};

use requeuest::testkit::{self, TestDatabase};
use requeuest::{Durable, Options, Status};
use tokio::task::JoinSet;

use super::network::{address, pool_through};
use super::{builder, echo_server, held_server, load, post_body, settle_accounts};
use crate::proxy::Proxy;
use crate::support::{count, eventually, in_time, migrated};

/// Read-only, disk full, statement timeout, deadlock, serialization failure.
const FAULTS: [&str; 5] = ["25006", "53100", "57014", "40P01", "40001"];

/// Has statements that write to a table fail with the code that stands in the table `fault`, while one does.
async fn may_fail(database: &TestDatabase, table: &str, operation: &str) {
    let statement = format!(
        "create table public.fault (code text);
         create function public.fail() returns trigger language plpgsql as $$
         declare failing text := (select min(code) from public.fault);
         begin
             if failing is not null then
                 raise exception 'a fault for a test' using errcode = failing;
             end if;
             return null;
         end $$;
         create trigger fail before {operation} on requeuest.{table}
             for each statement execute function public.fail()"
    );
    sqlx::raw_sql(&statement)
        .execute(database.pool())
        .await
        .unwrap();
}

async fn set_fault(database: &TestDatabase, code: Option<&str>) {
    let mut transaction = database.pool().begin().await.unwrap();
    sqlx::query("delete from public.fault")
        .execute(&mut *transaction)
        .await
        .unwrap();
    sqlx::query("insert into public.fault select $1 where $1 is not null")
        .bind(code)
        .execute(&mut *transaction)
        .await
        .unwrap();
    transaction.commit().await.unwrap();
}

#[tokio::test]
async fn a_request_that_postgres_can_not_take_is_refused_with_an_error_and_never_sent() {
    let database = migrated().await;
    may_fail(&database, "mq_msgs", "insert").await;
    let server = echo_server().await;
    let durable = builder(database.pool()).build().unwrap();
    for code in FAULTS {
        set_fault(&database, Some(code)).await;
        for options in [Options::default(), Options::default().ordered("key")] {
            let request = post_body(&server.url("/"), code).with(options);
            let error = in_time(durable.fire(request)).await.unwrap_err();
            assert!(
                error.is_database() && !error.is_indeterminate(),
                "{error:?}"
            );
            assert!(
                format!("{error:?}").contains("a fault for a test"),
                "{error:?}"
            );
        }
        set_fault(&database, None).await;
        let good = in_time(durable.await_response(post_body(&server.url("/"), "good"))).await;
        assert_eq!(good.unwrap().text().unwrap(), "good");
    }
    assert!(server.seen().iter().all(|seen| seen.body == "good"));
}

#[tokio::test]
async fn results_that_postgres_can_not_take_are_kept_until_it_can() {
    let database = migrated().await;
    may_fail(&database, "outcomes", "insert").await;
    let (server, gate) = held_server().await;
    let durable = builder(database.pool()).build().unwrap();
    let _other = builder(database.pool()).build().unwrap();
    let url = server.url("/");
    for (round, code) in FAULTS.iter().enumerate() {
        let mut callers = JoinSet::new();
        for number in 0..10 {
            let (durable, request) = (durable.clone(), post_body(&url, &number.to_string()));
            callers.spawn(async move { durable.await_response(request).await });
        }
        server.wait_for(10 * (round + 1)).await;
        set_fault(&database, Some(code)).await;
        gate.add_permits(10);
        // Longer than the lease, which is renewed all the while.
        let failing = Instant::now();
        eventually("a lease goes by", || async {
            failing.elapsed() > super::LEASE * 3 / 2
        })
        .await;
        assert!(callers.try_join_next().is_none(), "{code}");
        set_fault(&database, None).await;
        for response in in_time(callers.join_all()).await {
            assert_eq!(response.unwrap().status(), 200);
        }
        // No other runner took them in the meantime.
        assert_eq!(server.count(), 10 * (round + 1), "{code}");
    }
    println!("duplicates under failing settles: 0 of 50 requests");
}

/// How long a transaction of the application sits on its ordering key.
fn long() -> Duration {
    let long = std::env::var_os("REQUEUEST_LONG_FAULTS").is_some();
    Duration::from_secs(if long { 60 } else { 5 })
}

#[tokio::test]
async fn a_long_transaction_holds_up_its_keys_alone() {
    let database = migrated().await;
    let server = echo_server().await;
    let durable = builder(database.pool()).build().unwrap();
    let url = server.url("/");
    let ordered = |body: &str, key: &str| {
        post_body(&url, body).with(Options::default().ordered(key.to_owned()))
    };
    // Its predecessor ends while the transaction is open.
    let before = durable.fire(ordered("k before", "k")).await.unwrap();
    let mut transaction = database.pool().begin().await.unwrap();
    durable
        .fire_in(&mut *transaction, ordered("k held", "k"))
        .await
        .unwrap();
    let keyed =
        |key: String| post_body(&url, "keyed").with(Options::default().key(key).supersede("s"));
    let other = Options::default().key("held");
    durable
        .fire_in(&mut *transaction, post_body(&url, "keyed").with(other))
        .await
        .unwrap();
    let outcome = testkit::outcome(&durable, before, long()).await.unwrap();
    assert_eq!(outcome.status, Status::Completed);
    // More than the pool has connections.
    let mut behind = JoinSet::new();
    for _ in 0..20 {
        let (durable, request) = (durable.clone(), ordered("k after", "k"));
        behind.spawn(async move { durable.fire(request).await });
    }
    let began = Instant::now();
    let mut slowest = Duration::ZERO;
    let mut others = 0;
    while began.elapsed() < long() {
        let started = Instant::now();
        // Its owner, too, waits for others meanwhile.
        in_time(durable.await_response(post_body(&url, "unordered")))
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
    eventually("all of the key are delivered", || async {
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
async fn requests_that_are_too_large_for_one_batch_are_all_persisted() {
    const MIB: usize = 1024 * 1024;
    let database = migrated().await;
    let server = echo_server().await;
    let durable = builder(database.pool())
        .max_request_body(16 * MIB)
        .max_response_body(16 * MIB)
        .build()
        .unwrap();
    let mut callers = JoinSet::new();
    for size in [1, MIB, 2 * MIB, 3 * MIB, 3 * MIB, 12 * MIB] {
        let (durable, url) = (durable.clone(), server.url("/"));
        let request = post_body(&url, &"x".repeat(size));
        callers.spawn(async move { (size, durable.await_response(request).await) });
    }
    for (size, response) in in_time(callers.join_all()).await {
        assert_eq!(response.unwrap().body().len(), size);
    }
    assert_eq!(server.count(), 6);
}

#[tokio::test]
async fn a_pooler_that_swallows_the_search_path_is_told_from_a_missing_schema() {
    let database = migrated().await;
    let server = echo_server().await;
    let proxy = Proxy::pooler(address(&database)).await;
    let durable = builder(&pool_through(&proxy, &database)).build().unwrap();
    let error = in_time(durable.fire(post_body(&server.url("/"), "x")))
        .await
        .unwrap_err();
    assert!(error.is_not_migrated(), "{error:?}");
    assert!(error.to_string().contains("runner_connect"), "{error}");
    assert_eq!(server.count(), 0);
}

/// Everything that an application does, with its pool behind a pooler and the crate's beside it.
async fn works_behind_a_pooler(database: &TestDatabase, application: &sqlx::PgPool) {
    let server = echo_server().await;
    let durable: Durable = builder(application)
        .runner_connect(database.options())
        .build()
        .unwrap();
    let mut transaction = application.begin().await.unwrap();
    let committed = durable
        .fire_in(&mut *transaction, post_body(&server.url("/"), "committed"))
        .await
        .unwrap();
    transaction.commit().await.unwrap();
    let mut transaction = application.begin().await.unwrap();
    let rolled_back = durable
        .fire_in(
            &mut *transaction,
            post_body(&server.url("/"), "rolled back"),
        )
        .await
        .unwrap();
    transaction.rollback().await.unwrap();
    let outcome = testkit::outcome(&durable, committed, crate::support::LONG)
        .await
        .unwrap();
    assert_eq!(outcome.status, Status::Completed);
    assert_eq!(durable.status(rolled_back).await.unwrap(), None);
    assert_eq!(server.count(), 1);
    let load_server = echo_server().await;
    let ledger = load(&durable, &load_server.url("/"), 4, 10).await;
    let twice = settle_accounts("a pooler", &durable, &load_server, ledger).await;
    assert_eq!(twice, 0);
    let left = "select count(*) from requeuest.mq_msgs";
    assert_eq!(count(database, left).await, 0);
}

#[tokio::test]
async fn behind_a_pooler_everything_works_with_direct_options() {
    let database = migrated().await;
    let proxy = Proxy::pooler(address(&database)).await;
    works_behind_a_pooler(&database, &pool_through(&proxy, &database)).await;
}

#[tokio::test]
#[ignore = "needs pgbouncer; run by .ci/run"]
async fn behind_pgbouncer_everything_works_with_direct_options() {
    let database = migrated().await;
    let port = crate::support::closed_port().await.port();
    let options = database.options();
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("pgbouncer.ini");
    let text = format!(
        "[databases]\n* = host={} port={} user={}\n[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\n\
         auth_type = any\npool_mode = transaction\ndefault_pool_size = 2\nunix_socket_dir =\n\
         ignore_startup_parameters = extra_float_digits\n",
        options.get_host(),
        options.get_port(),
        options.get_username(),
    );
    std::fs::write(&config, text).unwrap();
    let mut command = tokio::process::Command::new("pgbouncer");
    // It refuses to run as root.
    #[cfg(unix)]
    {
        use std::os::unix::fs::{MetadataExt, PermissionsExt};
        let open = std::fs::Permissions::from_mode(0o755);
        std::fs::set_permissions(dir.path(), open).unwrap();
        if std::fs::metadata(&config).unwrap().uid() == 0 {
            command.args(["--user", "nobody"]);
        }
    }
    let mut pgbouncer = command
        .arg(&config)
        .kill_on_drop(true)
        .spawn()
        .expect("pgbouncer is not installed");
    let options = options
        .host("127.0.0.1")
        .port(port)
        .ssl_mode(sqlx::postgres::PgSslMode::Disable)
        // As one does with sqlx behind a pooler in transaction mode.
        .statement_cache_capacity(0);
    let application = sqlx::PgPool::connect_lazy_with(options);
    eventually("pgbouncer listens", || async {
        tokio::net::TcpStream::connect(("127.0.0.1", port))
            .await
            .is_ok()
    })
    .await;
    works_behind_a_pooler(&database, &application).await;
    pgbouncer.kill().await.unwrap();
}
