//! The examination of a database: each finding is provoked.

mod queue;

use std::collections::BTreeSet;

use requeuest::Durable;
use requeuest::admin::{Admin, Check, Finding, Severity};
use requeuest::migrate::DatabaseRole;
use requeuest::testkit::{Postgres, StopMode, TestDatabase};
use sqlx::{ConnectOptions, Executor, PgPool};

use crate::faults::database::pgbouncer;
use crate::support::{LONG, Role, Server, builder, count, eventually, migrated, outcome_of, post};

/// An examination through this pool.
async fn examined(pool: &PgPool) -> Vec<Finding> {
    let handle = Durable::builder(pool.clone())
        .runner(false)
        .build()
        .unwrap();
    handle.admin().doctor().await.unwrap()
}

/// The only finding of this check and severity.
#[track_caller]
fn found(findings: &[Finding], check: Check, severity: Severity) -> &Finding {
    let wanted = |finding: &&Finding| finding.check == check && finding.severity == severity;
    let found: Vec<&Finding> = findings.iter().filter(wanted).collect();
    assert_eq!(found.len(), 1, "{check} {severity}: {findings:#?}");
    found[0]
}

/// A finding worse than a note says what to do.
#[track_caller]
fn advised(findings: &[Finding], check: Check, severity: Severity) -> (&str, &str) {
    let found = found(findings, check, severity);
    (&found.summary, found.advice.as_deref().unwrap())
}

/// Those above a note, except about `fsync`, which is off in the clusters of tests.
fn bad(findings: &[Finding]) -> Vec<&Finding> {
    let is_bad = |finding: &&Finding| {
        finding.severity > Severity::Note && !finding.summary.starts_with("fsync is off")
    };
    findings.iter().filter(is_bad).collect()
}

async fn execute(database: &TestDatabase, statement: &str) {
    database.pool().execute(statement).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_healthy_database_is_fine_and_a_standby_is_worth_a_note() {
    let postgres = Postgres::builder().config("fsync", "on");
    let postgres = postgres.start().await.unwrap();
    let database = postgres.database().await.unwrap();
    requeuest::migrate(database.pool()).await.unwrap();
    let server = Server::always(200).await;
    let durable = builder(&database).build().unwrap();
    let id = durable.fire(post(server.url("/"), "x")).await.unwrap();
    outcome_of(&durable, id).await;

    let findings = durable.admin().doctor().await.unwrap();
    let worst = findings.iter().map(|finding| finding.severity).max();
    assert!(worst.unwrap() <= Severity::Note, "{findings:#?}");
    let checks: BTreeSet<Check> = findings.iter().map(|finding| finding.check).collect();
    assert_eq!(checks.len(), 24, "{findings:#?}");
    let runners = found(&findings, Check::Runners, Severity::Ok);
    assert!(
        runners.summary.starts_with("1 runner is alive"),
        "{runners:?}"
    );
    found(&findings, Check::Settings, Severity::Ok);
    durable.shutdown(LONG).await.unwrap();

    let directory: String = sqlx::query_scalar("SHOW data_directory")
        .fetch_one(database.pool())
        .await
        .unwrap();
    postgres.stop(StopMode::Fast).await.unwrap();
    let signal = std::path::Path::new(&directory).join("standby.signal");
    std::fs::write(signal, "").unwrap();
    postgres.resume().await.unwrap();
    let pool = PgPool::connect_lazy_with(database.options());
    let findings = examined(&pool).await;
    assert!(bad(&findings).is_empty(), "{findings:#?}");
    let (summary, advice) = advised(&findings, Check::Recovery, Severity::Note);
    assert!(summary.starts_with("the server is a standby"), "{summary}");
    assert!(advice.contains("primary"), "{advice}");
    let listen = found(&findings, Check::Listen, Severity::Note);
    assert!(
        listen.summary.starts_with("could not be checked"),
        "{listen:?}"
    );
}

#[tokio::test]
async fn an_empty_database_and_a_foreign_schema_say_what_to_do() {
    let database = Postgres::shared().await.unwrap().database().await.unwrap();
    let findings = Admin::builder(database.url()).doctor().await.unwrap();
    let (summary, advice) = advised(&findings, Check::Schema, Severity::Problem);
    let name = database.name();
    assert_eq!(
        summary,
        format!("there is no schema `requeuest` in the database `{name}`")
    );
    assert!(advice.contains("requeuest migrate"), "{advice}");
    assert_eq!(bad(&findings).len(), 1, "{findings:#?}");
    let lag = found(&findings, Check::Lag, Severity::Note);
    assert!(lag.summary.contains("it needs the schema"), "{lag:?}");

    execute(&database, "CREATE SCHEMA requeuest").await;
    let findings = examined(database.pool()).await;
    let (summary, _) = advised(&findings, Check::Schema, Severity::Problem);
    assert!(
        summary.ends_with("has no ledger of migrations"),
        "{summary}"
    );
}

#[tokio::test]
async fn a_schema_of_another_release_is_named() {
    let database = migrated().await;
    execute(
        &database,
        "INSERT INTO requeuest._sqlx_migrations
             (version, description, success, checksum, execution_time)
         VALUES (20990101000001, 'newer', true, '', 0)",
    )
    .await;
    let findings = examined(database.pool()).await;
    let (summary, _) = advised(&findings, Check::Version, Severity::Note);
    assert!(summary.contains("20990101000001"), "{summary}");
    execute(
        &database,
        "UPDATE requeuest.compatible_from SET version = 20990101000001",
    )
    .await;
    let findings = examined(database.pool()).await;
    let newer = found(&findings, Check::Version, Severity::Problem);
    assert!(newer.summary.contains("upgrade requeuest"), "{newer:?}");
}

#[tokio::test]
async fn each_role_learns_what_it_may_do_and_what_it_lacks() {
    let database = migrated().await;
    let reader = Role::named(&database, "reader").await;
    reader.plays(DatabaseRole::ReadOnly).await;
    let findings = examined(&reader.pool()).await;
    let (summary, _) = advised(&findings, Check::Grants, Severity::Note);
    assert!(
        summary.ends_with("can read; it can't enqueue, deliver and administrate"),
        "{summary}"
    );
    assert!(bad(&findings).is_empty(), "{findings:#?}");
    let others = found(&findings, Check::Transactions, Severity::Note);
    assert!(others.advice.as_ref().unwrap().contains("pg_monitor"));

    let web = Role::named(&database, "web").await;
    web.plays(DatabaseRole::Enqueue).await;
    let findings = examined(&web.pool()).await;
    assert!(bad(&findings).is_empty(), "{findings:#?}");
    let (summary, _) = advised(&findings, Check::Grants, Severity::Note);
    assert!(summary.contains("can enqueue; it can't"), "{summary}");
    let lag = found(&findings, Check::Lag, Severity::Note);
    assert!(lag.summary.contains("permission denied"), "{lag:?}");

    let stranger = Role::named(&database, "stranger").await;
    let findings = examined(&stranger.pool()).await;
    let (summary, advice) = advised(&findings, Check::Schema, Severity::Problem);
    assert!(summary.contains("may not use the schema"), "{summary}");
    assert!(advice.contains("Migrator::grants"), "{advice}");

    let runner = Role::named(&database, "runner").await;
    runner.plays(DatabaseRole::Runner).await;
    let findings = examined(&runner.pool()).await;
    assert!(bad(&findings).is_empty(), "{findings:#?}");
    runner
        .granted("REVOKE TRUNCATE ON requeuest.outcomes_3 FROM ROLE")
        .await;
    let findings = examined(&runner.pool()).await;
    let (summary, advice) = advised(&findings, Check::Truncate, Severity::Warning);
    assert!(summary.contains("TRUNCATE on outcomes_3"), "{summary}");
    assert!(advice.contains("Migrator::grants"), "{advice}");
    let (summary, _) = advised(&findings, Check::Grants, Severity::Problem);
    assert!(
        summary.ends_with("is meant to deliver and administrate, and lacks TRUNCATE on outcomes_3"),
        "{summary}"
    );
    // The database of a test outlives no role.
    for role in [reader, web, stranger, runner] {
        role.dropped().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_keeps_dead_rows_and_how_the_server_is_set_are_named() {
    let postgres = Postgres::builder()
        .config("max_prepared_transactions", "10")
        .config("max_connections", "30")
        .config("max_locks_per_transaction", "40")
        .config("full_page_writes", "off")
        .config("autovacuum", "off");
    let postgres = postgres.start().await.unwrap();
    let database = postgres.database().await.unwrap();
    requeuest::migrate(database.pool()).await.unwrap();
    let name = database.name();
    let report = database.options().application_name("report");
    let mut report = report.connect().await.unwrap();
    let pid: i32 = sqlx::query_scalar("SELECT pg_backend_pid()")
        .fetch_one(&mut report)
        .await
        .unwrap();
    report
        .execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM requeuest.runners")
        .await
        .unwrap();
    let mut other = database.options().connect().await.unwrap();
    other
        .execute("BEGIN; SELECT txid_current(); PREPARE TRANSACTION 'forgotten'")
        .await
        .unwrap();
    execute(
        &database,
        "INSERT INTO requeuest.mq_freed_keys SELECT 'c', n FROM generate_series(1, 12000) n",
    )
    .await;
    execute(&database, "DELETE FROM requeuest.mq_freed_keys").await;
    execute(&database, "VACUUM requeuest.mq_freed_keys").await;
    // The server counts in the background.
    eventually("dead rows and the vacuum are counted", || async {
        let counted = "SELECT n_dead_tup > 10000 AND vacuum_count > 0 FROM pg_stat_user_tables
            WHERE relid = 'requeuest.mq_freed_keys'::regclass";
        sqlx::query_scalar(counted)
            .fetch_one(database.pool())
            .await
            .unwrap()
    })
    .await;
    execute(
        &database,
        "SELECT pg_create_physical_replication_slot('abandoned', true)",
    )
    .await;
    execute(
        &database,
        &format!("ALTER DATABASE {name} SET synchronous_commit = off"),
    )
    .await;

    let pool = PgPool::connect_lazy_with(database.options());
    let findings = examined(&pool).await;
    let (summary, advice) = advised(&findings, Check::DeadRows, Severity::Warning);
    assert!(summary.contains("mq_freed_keys has "), "{summary}");
    let session = format!("session {pid} (report, idle in transaction, for ");
    assert!(summary.contains(&session), "{summary}");
    assert!(
        summary.contains("prepared transaction forgotten"),
        "{summary}"
    );
    assert!(
        advice.contains(&format!("pg_terminate_backend({pid})")),
        "{advice}"
    );
    let open = found(&findings, Check::Transactions, Severity::Ok);
    let session = format!("session {pid} (report) idle in transaction");
    assert!(open.summary.contains(&session), "{open:?}");
    let (summary, _) = advised(&findings, Check::ReplicationSlots, Severity::Note);
    assert!(summary.contains("abandoned keeps"), "{summary}");
    let (summary, _) = advised(&findings, Check::Autovacuum, Severity::Problem);
    assert_eq!(summary, "autovacuum doesn't run: autovacuum off");
    let (summary, _) = advised(&findings, Check::Locks, Severity::Note);
    assert!(
        summary.ends_with("max_locks_per_transaction is 40"),
        "{summary}"
    );
    let settings: Vec<_> = findings
        .iter()
        .filter(|finding| finding.check == Check::Settings)
        .map(|finding| finding.summary.split_once(' ').unwrap().0)
        .collect();
    assert_eq!(
        settings,
        ["fsync", "full_page_writes", "synchronous_commit"]
    );

    let crowd = PgPool::connect_lazy_with(database.options());
    let mut kept = Vec::new();
    for _ in 0..10 {
        kept.push(crowd.acquire().await.unwrap());
    }
    // The report, the prepared transaction's session and the test's own pool are there too.
    while count(&database, "SELECT sum(numbackends) FROM pg_stat_database").await < 17 {
        kept.push(pool.acquire().await.unwrap());
    }
    let findings = examined(&PgPool::connect_lazy_with(database.options())).await;
    let (summary, _) = advised(&findings, Check::Connections, Severity::Warning);
    assert!(summary.contains("of 27 connections"), "{summary}");
}

#[tokio::test]
async fn indexes_that_are_invalid_or_gone_and_tables_without_vacuum_are_named() {
    let database = migrated().await;
    execute(
        &database,
        "INSERT INTO requeuest.attempts (id, number, duration_ms, error_class, error)
         SELECT gen_random_uuid(), 1, 1, 'status', 'x' FROM generate_series(1, 2)",
    )
    .await;
    let failed = "CREATE UNIQUE INDEX CONCURRENTLY my_own ON requeuest.attempts (number)";
    database.pool().execute(failed).await.unwrap_err();
    execute(&database, "DROP INDEX requeuest.mq_msgs_due").await;
    execute(
        &database,
        "ALTER TABLE requeuest.mq_msgs SET (autovacuum_enabled = off)",
    )
    .await;
    let findings = examined(database.pool()).await;
    let (summary, advice) = advised(&findings, Check::InvalidIndexes, Severity::Warning);
    assert_eq!(summary, "invalid indexes: my_own of attempts");
    assert!(advice.contains("DROP INDEX CONCURRENTLY \"requeuest\".\"my_own\""));
    let (summary, _) = advised(&findings, Check::MissingIndexes, Severity::Problem);
    assert_eq!(summary, "missing indexes: mq_msgs_due");
    let (summary, advice) = advised(&findings, Check::Autovacuum, Severity::Problem);
    assert_eq!(summary, "autovacuum is off for mq_msgs");
    assert!(advice.contains("RESET (autovacuum_enabled"), "{advice}");
}

#[tokio::test]
#[ignore = "needs pgbouncer; run by .ci/run"]
async fn behind_pgbouncer_notifications_are_found_to_be_lost() {
    let database = migrated().await;
    let (mut pgbouncer, options) = pgbouncer(&database).await;
    let findings = examined(&PgPool::connect_lazy_with(options)).await;
    let (_, advice) = advised(&findings, Check::Listen, Severity::Problem);
    assert!(
        advice.contains("DurableBuilder::connect_options"),
        "{advice}"
    );
    assert_eq!(bad(&findings).len(), 1, "{findings:#?}");
    pgbouncer.process.kill().await.unwrap();
}
