//! The schema: how it is installed and removed, what it leaves alone, and who may use it.

use std::path::Path;
use std::time::Duration;

use futures_util::future::join_all;
use requeuest::migrate::Migrator;
use requeuest::retry::RetryPolicy;
use requeuest::testkit::{Postgres, TestDatabase};
use requeuest::{Durable, Error, Options, RequestId, Status, Uuid};
use sqlx::migrate::{Migrate, MigrateError};
use sqlx::postgres::PgPoolOptions;
use sqlx::{ConnectOptions, Connection, Executor, PgPool};

use crate::faults::network::{address, pool_through};
use crate::proxy::Proxy;
use crate::support::{
    LONG, Role, Server, add_outcomes, builder, closed_port, count, eventually, eventually_rows,
    in_time, migrated, outcome_of, post, quick,
};

/// A database without the schema.
async fn empty() -> TestDatabase {
    let _ = env_logger::builder().is_test(true).try_init();
    Postgres::shared().await.unwrap().database().await.unwrap()
}

/// Checks that an awaited request is delivered.
async fn delivers(durable: &Durable) {
    let server = Server::always(200).await;
    let response = in_time(durable.await_response(post(server.url("/"), "x")))
        .await
        .unwrap();
    assert_eq!(response.status(), 200);
    assert_eq!(server.count(), 1);
}

/// The qualified name of each table, function, type and sequence outside Postgres' own schemas.
async fn objects(database: &TestDatabase) -> Vec<String> {
    sqlx::query_scalar(
        "SELECT n.nspname || '.' || o.name
         FROM (
            SELECT relnamespace AS schema, relname::text AS name FROM pg_class
            UNION ALL SELECT pronamespace, proname::text FROM pg_proc
            UNION ALL SELECT typnamespace, typname::text FROM pg_type
         ) o
         JOIN pg_namespace n ON n.oid = o.schema
         WHERE n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'
         ORDER BY 1",
    )
    .fetch_all(database.pool())
    .await
    .unwrap()
}

/// The versions of the migrations that were applied to a schema.
async fn ledger(database: &TestDatabase, schema: &str) -> Vec<i64> {
    let query = format!("SELECT version FROM {schema}._sqlx_migrations ORDER BY version");
    sqlx::query_scalar(&query)
        .fetch_all(database.pool())
        .await
        .unwrap()
}

#[tokio::test]
async fn migrating_twice_changes_nothing() {
    let database = migrated().await;
    let before = objects(&database).await;
    requeuest::migrate(database.pool()).await.unwrap();
    assert_eq!(objects(&database).await, before);
    delivers(&Durable::new(database.pool().clone())).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_concurrent_migrations_are_harmless() {
    let database = empty().await;
    let others = (0..10).map(|_| {
        let pool = PgPoolOptions::new().connect_lazy_with(database.options());
        tokio::spawn(async move { requeuest::migrate(&pool).await })
    });
    for done in in_time(join_all(others)).await {
        done.unwrap().unwrap();
    }
    let versions = ledger(&database, "requeuest").await;
    requeuest::migrate(database.pool()).await.unwrap();
    assert_eq!(ledger(&database, "requeuest").await, versions);
    delivers(&Durable::new(database.pool().clone())).await;
}

/// Writes a host application's own migrations, some with names that this crate uses, too.
fn write_host_migrations(dir: &Path, upto: i64) {
    let statements = [
        "CREATE TABLE orders (id bigint PRIMARY KEY)",
        "CREATE TABLE outcomes (of bigint REFERENCES orders)",
        "CREATE FUNCTION enqueue() RETURNS int LANGUAGE sql AS 'SELECT 1'",
    ];
    for (version, statement) in (1..=upto).zip(statements) {
        std::fs::write(dir.join(format!("{version}_step.sql")), statement).unwrap();
    }
}

async fn run_host_migrations(pool: &PgPool, dir: &Path) {
    let migrator = sqlx::migrate::Migrator::new(dir).await.unwrap();
    migrator.run(pool).await.unwrap();
}

#[tokio::test]
async fn host_migrations_run_before_and_after_ours() {
    let database = empty().await;
    let dir = tempfile::tempdir().unwrap();
    write_host_migrations(dir.path(), 1);
    run_host_migrations(database.pool(), dir.path()).await;

    requeuest::migrate(database.pool()).await.unwrap();
    write_host_migrations(dir.path(), 3);
    run_host_migrations(database.pool(), dir.path()).await;
    requeuest::migrate(database.pool()).await.unwrap();
    run_host_migrations(database.pool(), dir.path()).await;

    assert_eq!(ledger(&database, "public").await, [1, 2, 3]);
    let ours = ledger(&database, "requeuest").await;
    assert!(ours.iter().all(|version| *version > 3), "{ours:?}");
    delivers(&Durable::new(database.pool().clone())).await;
}

#[tokio::test]
async fn host_migrations_run_concurrently_with_ours() {
    let database = empty().await;
    let dir = tempfile::tempdir().unwrap();
    write_host_migrations(dir.path(), 3);
    let (ours, ()) = in_time(futures_util::future::join(
        requeuest::migrate(database.pool()),
        run_host_migrations(database.pool(), dir.path()),
    ))
    .await;
    ours.unwrap();
    assert_eq!(ledger(&database, "public").await, [1, 2, 3]);
    delivers(&Durable::new(database.pool().clone())).await;
}

#[tokio::test]
async fn the_schema_can_have_another_name() {
    let database = empty().await;
    let migrator = Migrator::new().schema("calls_1");
    migrator.run(database.pool()).await.unwrap();
    migrator.run(database.pool()).await.unwrap();
    let everywhere = objects(&database).await;
    assert!(
        everywhere.iter().all(|name| name.starts_with("calls_1.")),
        "{everywhere:?}"
    );
    let durable = builder(&database).schema("calls_1").build().unwrap();
    delivers(&durable).await;

    let error = Durable::new(database.pool().clone())
        .fire(post("http://127.0.0.1:1/", "x"))
        .await
        .unwrap_err();
    assert!(error.is_not_migrated(), "{error}");
}

#[tokio::test]
async fn an_invalid_schema_name_is_refused_before_any_change() {
    let database = empty().await;
    for name in ["", "Calls", "a b", "x;drop schema public", "é"] {
        let migrator = Migrator::new().schema(name);
        migrator.run(database.pool()).await.unwrap_err();
        migrator.undo(database.pool()).await.unwrap_err();
    }
    assert_eq!(objects(&database).await, [""; 0]);
}

#[tokio::test]
async fn two_schemas_deliver_only_their_own_requests() {
    let database = empty().await;
    let mut handles = Vec::new();
    for schema in ["first", "second"] {
        let migrator = Migrator::new().schema(schema);
        migrator.run(database.pool()).await.unwrap();
        handles.push(builder(&database).schema(schema).build().unwrap());
    }
    let (first, second) = (&handles[0], &handles[1]);
    let server = Server::always(200).await;
    for durable in [first, second, first] {
        let response = in_time(durable.await_response(post(server.url("/"), "x")))
            .await
            .unwrap();
        assert_eq!(response.status(), 200);
    }
    // A delayed request is delivered through the queue, not directly by the enqueuing process.
    let later = Options::default().delay(Duration::from_millis(1));
    let id = first
        .fire_in(database.pool(), post(server.url("/"), "x").with(later))
        .await
        .unwrap();
    in_time(first.response(id)).await.unwrap();
    assert_eq!(second.status(id).await.unwrap(), None);
    let error = in_time(second.response(id)).await.unwrap_err();
    assert!(error.is_unknown_id(), "{error}");
    assert_eq!(server.count(), 4);
    assert_eq!(
        count(&database, "SELECT count(*) FROM first.outcomes").await,
        3
    );
    assert_eq!(
        count(&database, "SELECT count(*) FROM second.outcomes").await,
        1
    );

    Migrator::new()
        .schema("first")
        .undo(database.pool())
        .await
        .unwrap();
    delivers(second).await;
}

#[tokio::test]
async fn undo_removes_everything_and_migrating_again_works() {
    let database = empty().await;
    let before = objects(&database).await;
    requeuest::migrate(database.pool()).await.unwrap();
    let installed = objects(&database).await;
    assert_ne!(installed, before);
    delivers(&Durable::new(database.pool().clone())).await;

    let migrator = Migrator::new();
    migrator.undo(database.pool()).await.unwrap();
    assert_eq!(objects(&database).await, before);
    let schemas = "SELECT count(*) FROM pg_namespace WHERE nspname = 'requeuest'";
    assert_eq!(count(&database, schemas).await, 0);
    migrator.undo(database.pool()).await.unwrap();

    requeuest::migrate(database.pool()).await.unwrap();
    assert_eq!(objects(&database).await, installed);
    delivers(&Durable::new(database.pool().clone())).await;
}

#[tokio::test]
async fn a_handle_survives_an_undo_and_a_new_migration() {
    let database = migrated().await;
    let durable = Durable::new(database.pool().clone());
    delivers(&durable).await;
    let server = Server::always(200).await;
    let mut transaction = database.pool().begin().await.unwrap();
    durable
        .fire_in(&mut *transaction, post(server.url("/"), "x"))
        .await
        .unwrap();
    transaction.rollback().await.unwrap();

    Migrator::new().undo(database.pool()).await.unwrap();
    let error = in_time(durable.fire(post(server.url("/"), "x")))
        .await
        .unwrap_err();
    assert!(error.is_not_migrated(), "{error}");
    let error = durable
        .fire_in(database.pool(), post(server.url("/"), "x"))
        .await
        .unwrap_err();
    assert!(error.is_not_migrated(), "{error}");

    requeuest::migrate(database.pool()).await.unwrap();
    delivers(&durable).await;
    let id = durable
        .fire_in(database.pool(), post(server.url("/"), "x"))
        .await
        .unwrap();
    in_time(durable.response(id)).await.unwrap();
}

#[tokio::test]
async fn a_stock_sqlxmq_in_public_is_never_touched() {
    let database = empty().await;
    // The same names as stock sqlxmq. The functions fail if they are called.
    database
        .pool()
        .execute(
            "CREATE TABLE mq_msgs (id uuid PRIMARY KEY, attempt_at timestamptz);
             CREATE TABLE mq_payloads (id uuid PRIMARY KEY, name text, payload_json jsonb);
             INSERT INTO mq_msgs VALUES (gen_random_uuid(), now());
             INSERT INTO mq_payloads VALUES (gen_random_uuid(), 'job', '{}');
             CREATE TYPE mq_new_t AS (id uuid);
             CREATE FUNCTION mq_poll(channel_names text[], batch_size int DEFAULT 1)
                RETURNS TABLE (id uuid) LANGUAGE plpgsql AS
                $$ BEGIN RAISE EXCEPTION 'a function in public was called'; END $$;
             CREATE FUNCTION mq_insert(new_messages mq_new_t[]) RETURNS void LANGUAGE plpgsql AS
                $$ BEGIN RAISE EXCEPTION 'a function in public was called'; END $$;
             CREATE FUNCTION mq_delete(msg_ids uuid[]) RETURNS void LANGUAGE plpgsql AS
                $$ BEGIN RAISE EXCEPTION 'a function in public was called'; END $$;",
        )
        .await
        .unwrap();
    let theirs = "SELECT md5(string_agg(t::text, '|' ORDER BY t::text)) FROM (
        SELECT m::text AS t FROM public.mq_msgs m
        UNION ALL SELECT p::text FROM public.mq_payloads p
        UNION ALL SELECT pg_get_functiondef(f.oid) FROM pg_proc f
        WHERE pronamespace = 'public'::regnamespace
    ) AS t(t)";
    let fingerprint = || async {
        sqlx::query_scalar::<_, String>(theirs)
            .fetch_one(database.pool())
            .await
            .unwrap()
    };
    let before = fingerprint().await;
    let objects_before = objects(&database).await;

    requeuest::migrate(database.pool()).await.unwrap();
    let durable = Durable::new(database.pool().clone());
    delivers(&durable).await;
    let server = Server::always(200).await;
    let id = durable
        .fire_in(database.pool(), post(server.url("/"), "x"))
        .await
        .unwrap();
    in_time(durable.response(id)).await.unwrap();
    durable.shutdown(LONG).await.unwrap();
    assert_eq!(fingerprint().await, before);

    Migrator::new().undo(database.pool()).await.unwrap();
    assert_eq!(fingerprint().await, before);
    assert_eq!(objects(&database).await, objects_before);
}

#[tokio::test]
async fn calls_fail_before_the_migration_and_work_after_it() {
    let database = empty().await;
    let server = Server::always(200).await;
    let durable = Durable::new(database.pool().clone());
    let id = RequestId::from(Uuid::nil());
    let errors = [
        in_time(durable.fire(post(server.url("/"), "x")))
            .await
            .unwrap_err(),
        in_time(durable.await_response(post(server.url("/"), "x")))
            .await
            .unwrap_err(),
        durable
            .fire_in(database.pool(), post(server.url("/"), "x"))
            .await
            .unwrap_err(),
        in_time(durable.response(id)).await.unwrap_err(),
        in_time(durable.status(id)).await.unwrap_err(),
    ];
    for error in errors {
        assert!(error.is_not_migrated(), "{error}");
        assert!(error.to_string().contains("requeuest::migrate"), "{error}");
    }

    requeuest::migrate(database.pool()).await.unwrap();
    delivers(&durable).await;
    // The runner could not start before, and has found the schema by itself.
    let id = durable
        .fire_in(database.pool(), post(server.url("/"), "x"))
        .await
        .unwrap();
    in_time(durable.response(id)).await.unwrap();
    assert_eq!(server.count(), 1);
}

#[tokio::test]
async fn no_extension_is_needed() {
    let database = migrated().await;
    assert_eq!(
        count(
            &database,
            "SELECT count(*) FROM pg_extension WHERE extname <> 'plpgsql'"
        )
        .await,
        0
    );
}

#[tokio::test]
async fn a_role_without_rights_is_told_which_it_needs() {
    let database = migrated().await;
    let role = Role::create(&database).await;
    let refused = requeuest::migrate(&role.pool()).await.unwrap_err();
    assert!(
        refused.to_string().contains("grant it USAGE on the schema"),
        "{refused}"
    );
    let durable = Durable::builder(role.pool()).build().unwrap();
    let refused = in_time(durable.fire(post("http://localhost/", "x"))).await;
    let refused = refused.unwrap_err();
    assert!(refused.is_not_migrated(), "{refused:?}");
    assert!(
        refused.to_string().contains("grant it USAGE on the schema"),
        "{refused}"
    );
    durable.shutdown(Duration::ZERO).await.unwrap();

    // It may use the schema, and there is something to migrate.
    role.granted(
        "DROP SCHEMA requeuest CASCADE;
         CREATE SCHEMA requeuest; GRANT USAGE ON SCHEMA requeuest TO ROLE",
    )
    .await;
    let refused = requeuest::migrate(&role.pool()).await.unwrap_err();
    let shown = format!("{refused:?}");
    assert!(
        shown.contains("run migrate as the schema's owner"),
        "{shown}"
    );
    role.dropped().await;
}

#[tokio::test]
async fn a_role_that_cannot_change_the_schema_can_run_a_handle() {
    let database = migrated().await;
    let role = Role::create(&database).await;
    role.granted(
        "GRANT USAGE ON SCHEMA requeuest TO ROLE;
         GRANT SELECT, INSERT, UPDATE, DELETE, TRUNCATE ON ALL TABLES IN SCHEMA requeuest TO ROLE;
         GRANT USAGE ON ALL SEQUENCES IN SCHEMA requeuest TO ROLE;
         GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA requeuest TO ROLE;
         REVOKE INSERT, UPDATE, DELETE, TRUNCATE ON requeuest._sqlx_migrations FROM ROLE",
    )
    .await;
    let mut connection = role.options().connect().await.unwrap();
    let denied = connection.execute("CREATE TABLE requeuest.more ()").await;
    denied.unwrap_err();

    // There is nothing to migrate.
    requeuest::migrate(&role.pool()).await.unwrap();

    let server = Server::in_turn(&[503, 200]).await;
    let durable = Durable::builder(role.pool())
        .retry(quick())
        .build()
        .unwrap();
    let response = in_time(durable.await_response(post(server.url("/"), "x")))
        .await
        .unwrap();
    assert_eq!(response.status(), 200);
    let ordered = post(server.url("/"), "x").with(Options::default().ordered("key"));
    let id = in_time(durable.fire(ordered)).await.unwrap();
    in_time(durable.response(id)).await.unwrap();
    let id = durable
        .fire_in(&mut connection, post(server.url("/"), "x"))
        .await
        .unwrap();
    in_time(durable.response(id)).await.unwrap();
    assert_eq!(durable.status(id).await.unwrap(), Some(Status::Completed));

    // Prunes as the sweep does, with outcomes that have expired.
    database
        .pool()
        .execute("UPDATE requeuest.outcomes SET expires_at = now() - interval '1 second'")
        .await
        .unwrap();
    let emptied = "SELECT count(*) FROM (
            SELECT requeuest.move_unhandled(slot, 1000), requeuest.empty_slot(slot) AS verdict,
                requeuest.delete_expired(slot, 1000)
            FROM requeuest.expired_slots()
        ) pruned, requeuest.delete_handled(NULL, 1000)
        WHERE pruned.verdict = 'emptied'";
    let emptied: i64 = sqlx::query_scalar(emptied)
        .fetch_one(&mut connection)
        .await
        .unwrap();
    assert!(emptied > 0);
    connection.close().await.unwrap();
    durable.shutdown(LONG).await.unwrap();
    role.dropped().await;
}

#[tokio::test]
async fn outcomes_expire_without_the_right_to_truncate() {
    let database = migrated().await;
    let role = Role::create(&database).await;
    role.granted(
        "GRANT USAGE ON SCHEMA requeuest TO ROLE;
         GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA requeuest TO ROLE;
         GRANT USAGE ON ALL SEQUENCES IN SCHEMA requeuest TO ROLE;
         GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA requeuest TO ROLE",
    )
    .await;
    add_outcomes(&database, 4, 7000, 100, 60).await;
    let durable = Durable::builder(role.pool())
        .retention(Duration::from_secs(60))
        .runner(false)
        .build()
        .unwrap();
    eventually_rows(&database, "outcomes", 0).await;
    durable.shutdown(LONG).await.unwrap();
    role.dropped().await;
}

#[tokio::test]
async fn the_owner_of_an_empty_schema_can_migrate() {
    let database = empty().await;
    let role = Role::create(&database).await;
    let pool = role.pool();
    let denied = requeuest::migrate(&pool).await.unwrap_err();
    let denied = format!("{denied:?}");
    assert!(
        denied.contains("grant it CREATE on the database"),
        "{denied}"
    );
    role.granted("CREATE SCHEMA requeuest AUTHORIZATION ROLE")
        .await;
    requeuest::migrate(&pool).await.unwrap();
    let durable = Durable::new(pool.clone());
    delivers(&durable).await;
    durable.shutdown(LONG).await.unwrap();
    pool.close().await;
    role.dropped().await;
}

#[tokio::test]
async fn migrations_through_a_pooler_that_drops_options_are_in_their_schema() {
    let database = empty().await;
    let proxy = Proxy::pooler(address(&database)).await;
    let pool = pool_through(&proxy, &database);
    let migrator = Migrator::new().schema("calls_1");
    for _ in 0..2 {
        in_time(migrator.run(&pool)).await.unwrap();
    }
    let everywhere = objects(&database).await;
    assert!(
        everywhere.iter().all(|name| name.starts_with("calls_1.")),
        "{everywhere:?}"
    );
    in_time(migrator.undo(&pool)).await.unwrap();
    assert_eq!(objects(&database).await, [""; 0]);
}

#[tokio::test]
async fn a_migrator_connects_as_it_is_told() {
    let database = empty().await;
    let nowhere = closed_port().await;
    let options = database.options().host("127.0.0.1").port(nowhere.port());
    let pool = PgPoolOptions::new().connect_lazy_with(options);
    let error = in_time(requeuest::migrate(&pool)).await.unwrap_err();
    let text = error.to_string();
    assert!(text.contains(&nowhere.to_string()), "{text}");

    let migrator = Migrator::new().connect_options(database.options());
    in_time(migrator.run(&pool)).await.unwrap();
    delivers(&Durable::new(database.pool().clone())).await;
    in_time(migrator.undo(&pool)).await.unwrap();
    assert_eq!(objects(&database).await, [""; 0]);
}

#[tokio::test]
async fn the_callers_search_path_does_not_matter() {
    let database = migrated().await;
    database
        .pool()
        .execute(
            "CREATE SCHEMA evil;
             CREATE FUNCTION evil.fail() RETURNS int LANGUAGE plpgsql AS
                $$ BEGIN RAISE EXCEPTION 'the wrong schema was used'; END $$;
             CREATE FUNCTION evil.times(int8, interval) RETURNS interval LANGUAGE sql AS
                $$ SELECT evil.fail() * interval '1 second' $$;
             CREATE OPERATOR evil.* (LEFTARG = int8, RIGHTARG = interval, FUNCTION = evil.times);
             CREATE TABLE evil.mq_msgs (id int DEFAULT evil.fail());
             CREATE TABLE evil.mq_payloads (id int DEFAULT evil.fail());
             CREATE SEQUENCE evil.mq_seq;
             CREATE FUNCTION evil.now() RETURNS int LANGUAGE sql AS 'SELECT evil.fail()';
             CREATE FUNCTION evil.clock_timestamp() RETURNS int LANGUAGE sql
                AS 'SELECT evil.fail()';
             CREATE FUNCTION evil.pg_notify(text, text) RETURNS int LANGUAGE sql
                AS 'SELECT evil.fail()'",
        )
        .await
        .unwrap();
    // The search path of the application's pool. The handle's own connections have another one.
    let hostile = database
        .options()
        .options([("search_path", "evil,pg_catalog")]);
    let pool = PgPoolOptions::new().connect_lazy_with(hostile.clone());
    requeuest::migrate(&pool).await.unwrap();
    let durable = Durable::new(pool.clone());
    delivers(&durable).await;

    let server = Server::always(200).await;
    let mut connection = hostile.connect().await.unwrap();
    // Temporary tables come first, unless the search path says otherwise.
    connection
        .execute(
            "CREATE TEMPORARY TABLE mq_msgs (id int DEFAULT evil.fail());
             CREATE TEMPORARY TABLE mq_payloads (id int DEFAULT evil.fail());
             CREATE TEMPORARY SEQUENCE mq_seq",
        )
        .await
        .unwrap();
    let ordered = Options::default().ordered("key");
    for request in [
        post(server.url("/"), "x"),
        post(server.url("/"), "x").with(ordered),
    ] {
        let id = durable.fire_in(&mut connection, request).await.unwrap();
        let response = in_time(durable.response(id)).await.unwrap();
        assert_eq!(response.status(), 200);
    }
    for path in ["", "pg_temp", "pg_temp, evil, pg_catalog, requeuest"] {
        sqlx::query("SELECT pg_catalog.set_config('search_path', $1, false)")
            .bind(path)
            .execute(&mut connection)
            .await
            .unwrap();
        let request = post(server.url("/"), "x");
        let id = durable.fire_in(&mut connection, request).await.unwrap();
        in_time(durable.response(id)).await.unwrap();
    }
}

/// Upgrades the schema as the next two releases might: two more migrations in the ledger, and
/// columns that this release doesn't know. Returns the versions.
async fn upgrade_twice(database: &TestDatabase) -> [i64; 2] {
    let known = *ledger(database, "requeuest").await.last().unwrap();
    let tables: Vec<String> = sqlx::query_scalar(
        "SELECT c.oid::regclass::text FROM pg_class c
         WHERE c.relnamespace = 'requeuest'::regnamespace AND c.relkind IN ('r', 'p')
            AND NOT c.relispartition AND c.relname <> '_sqlx_migrations'",
    )
    .fetch_all(database.pool())
    .await
    .unwrap();
    assert!(tables.len() > 5, "{tables:?}");
    for version in [known + 1, known + 2] {
        for table in &tables {
            let alter = format!("ALTER TABLE {table} ADD COLUMN added_{version} int DEFAULT 1");
            database.pool().execute(&*alter).await.unwrap();
        }
        let record = "INSERT INTO requeuest._sqlx_migrations
                (version, description, success, checksum, execution_time)
            VALUES ($1, 'of a newer release', true, 'x', 1)";
        let record = sqlx::query(record).bind(version);
        record.execute(database.pool()).await.unwrap();
    }
    [known + 1, known + 2]
}

async fn set_compatible_from(database: &TestDatabase, version: i64) {
    sqlx::query("UPDATE requeuest.compatible_from SET version = $1")
        .bind(version)
        .execute(database.pool())
        .await
        .unwrap();
}

/// The error of a call, and that of `migrate`, which are about the same.
async fn refusals(database: &TestDatabase) -> (Error, MigrateError) {
    let durable = Durable::builder(database.pool().clone()).runner(false);
    let durable = durable.build().unwrap();
    let call = in_time(durable.fire(post("http://localhost/", "x"))).await;
    let migrate = in_time(requeuest::migrate(database.pool())).await;
    (call.unwrap_err(), migrate.unwrap_err())
}

/// Makes each kind of request, and ends requests in each way.
async fn works(database: &TestDatabase, durable: &Durable) {
    let server = Server::in_turn(&[503, 200]).await;
    let kinds = [
        Options::default(),
        Options::default().ordered("order"),
        Options::default().key(Uuid::now_v7().to_string()),
        Options::default().delay(Duration::from_millis(1)),
    ];
    for options in kinds {
        let request = post(server.url("/"), "x").with(options.clone());
        let fired = in_time(durable.fire(request.clone())).await.unwrap();
        let fired_in = durable.fire_in(database.pool(), request).await.unwrap();
        for id in [fired, fired_in] {
            let outcome = outcome_of(durable, id).await;
            assert_eq!(outcome.status(), Status::Completed, "{options:?}");
        }
    }
    let many = (0..3).map(|number| post(server.url("/"), number.to_string()));
    for id in in_time(durable.fire_many(many)).await.unwrap() {
        outcome_of(durable, id).await;
    }
    let nowhere = format!("http://{}/", closed_port().await);
    let once = Options::default().retry(RetryPolicy::none());
    let hopeless = post(nowhere, "x").with(once);
    let id = in_time(durable.fire(hopeless)).await.unwrap();
    assert_eq!(outcome_of(durable, id).await.status(), Status::Discarded);
    let again = in_time(durable.replay(id)).await.unwrap();
    assert_eq!(outcome_of(durable, again).await.status(), Status::Discarded);
    let later = post(server.url("/"), "x").with(Options::default().delay(LONG));
    let id = in_time(durable.fire(later)).await.unwrap();
    in_time(durable.cancel(id)).await.unwrap();
    assert_eq!(outcome_of(durable, id).await.status(), Status::Cancelled);
}

#[tokio::test]
async fn an_older_process_works_beside_a_newer_schema() {
    let database = migrated().await;
    let known = *ledger(&database, "requeuest").await.last().unwrap();
    let running = builder(&database).retry(quick()).build().unwrap();
    works(&database, &running).await;
    let added = upgrade_twice(&database).await;
    set_compatible_from(&database, known).await;
    let before = objects(&database).await;

    in_time(requeuest::migrate(database.pool())).await.unwrap();
    assert!(ledger(&database, "requeuest").await.ends_with(&added));
    assert_eq!(objects(&database).await, before);

    let started = builder(&database).retry(quick()).build().unwrap();
    for durable in [running, started] {
        works(&database, &durable).await;
        durable.shutdown(LONG).await.unwrap();
    }
}

#[tokio::test]
async fn a_release_older_than_compatible_from_is_refused() {
    let database = migrated().await;
    let known = *ledger(&database, "requeuest").await.last().unwrap();
    let [needed, newest] = upgrade_twice(&database).await;
    set_compatible_from(&database, needed).await;
    let before = objects(&database).await;

    let (call, migrate) = refusals(&database).await;
    let MigrateError::Source(source) = &migrate else {
        panic!("{migrate:?}");
    };
    let typed = source.downcast_ref::<Error>().unwrap();
    assert!(call.is_not_migrated() && typed.is_not_migrated());
    for text in [call.to_string(), migrate.to_string()] {
        for part in [known, needed, newest].map(|version| version.to_string()) {
            assert!(text.contains(&part), "{part} is not in: {text}");
        }
        assert!(text.contains("upgrade requeuest"), "{text}");
    }
    assert_eq!(objects(&database).await, before);

    // Without the row it is not known which releases can work with the schema.
    let delete = "DELETE FROM requeuest.compatible_from";
    database.pool().execute(delete).await.unwrap();
    let (call, migrate) = refusals(&database).await;
    assert!(call.is_not_migrated(), "{call}");
    assert!(
        migrate.to_string().contains(&newest.to_string()),
        "{migrate}"
    );
}

#[tokio::test]
async fn a_newer_schema_is_not_undone() {
    let database = migrated().await;
    let [unknown, _] = upgrade_twice(&database).await;
    let before = objects(&database).await;
    let error = Migrator::new().undo(database.pool()).await.unwrap_err();
    assert!(
        matches!(error, MigrateError::VersionMissing(version) if version == unknown),
        "{error:?}"
    );
    assert_eq!(objects(&database).await, before);
}

#[tokio::test]
async fn a_ledger_with_a_failed_migration_is_refused() {
    let database = migrated().await;
    let versions = ledger(&database, "requeuest").await;
    let newest = versions[versions.len() - 1];
    let mark = "UPDATE requeuest._sqlx_migrations SET success = false WHERE version = $1";
    let mark = sqlx::query(mark).bind(newest);
    mark.execute(database.pool()).await.unwrap();
    let (call, migrate) = refusals(&database).await;
    assert!(call.is_not_migrated(), "{call}");
    assert!(call.to_string().contains(&newest.to_string()), "{call}");
    assert!(
        matches!(migrate, MigrateError::Dirty(version) if version == newest),
        "{migrate:?}"
    );
    let undo = Migrator::new().undo(database.pool()).await.unwrap_err();
    assert!(matches!(undo, MigrateError::Dirty(_)), "{undo:?}");
    assert_eq!(ledger(&database, "requeuest").await, versions);
}

#[tokio::test]
async fn a_ledger_that_lost_its_rows_is_refused() {
    let database = migrated().await;
    let first = ledger(&database, "requeuest").await[0];
    let before = objects(&database).await;
    let empty = "DELETE FROM requeuest._sqlx_migrations";
    database.pool().execute(empty).await.unwrap();
    let (call, migrate) = refusals(&database).await;
    assert!(call.is_not_migrated(), "{call}");
    // What the first migration creates is there.
    assert!(
        matches!(&migrate, MigrateError::ExecuteMigration(_, version) if *version == first),
        "{migrate:?}"
    );
    assert!(migrate.to_string().contains("already exists"), "{migrate}");
    assert_eq!(objects(&database).await, before);
    assert_eq!(ledger(&database, "requeuest").await, [0; 0]);
}

#[tokio::test]
async fn an_empty_ledger_in_an_empty_schema_is_filled() {
    let database = empty().await;
    let options = database.options().options([("search_path", "requeuest")]);
    let mut connection = options.connect().await.unwrap();
    let schema = "CREATE SCHEMA requeuest";
    connection.execute(schema).await.unwrap();
    connection.ensure_migrations_table().await.unwrap();
    requeuest::migrate(database.pool()).await.unwrap();
    delivers(&Durable::new(database.pool().clone())).await;
}

/// Holds the lock of a migrator at work.
async fn begin_other_migration(database: &TestDatabase) -> sqlx::PgConnection {
    let mut other = database.options().connect().await.unwrap();
    let lock = "SELECT pg_advisory_lock(hashtextextended('requeuest/migrate/requeuest', 0))";
    other.execute(lock).await.unwrap();
    other
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_waiting_migration_holds_no_snapshot() {
    let database = empty().await;
    let other = begin_other_migration(&database).await;
    let named = database.options().application_name("waiting");
    let pool = PgPoolOptions::new().connect_lazy_with(named);
    let waiting = tokio::spawn(async move { requeuest::migrate(&pool).await });
    let waits = "SELECT count(*) FROM pg_stat_activity
        WHERE application_name = 'waiting' AND query ~ 'pg_try_advisory_xact_lock|ROLLBACK'";
    eventually("migrate waits", || async {
        count(&database, waits).await > 0
    })
    .await;

    let host = database.pool();
    host.execute("CREATE TABLE orders (id bigint)")
        .await
        .unwrap();
    let concurrently = "CREATE INDEX CONCURRENTLY orders_id ON orders (id)";
    in_time(host.execute(concurrently)).await.unwrap();
    let held = "SELECT count(*) FROM pg_stat_activity
        WHERE application_name = 'waiting'
            AND (backend_xid IS NOT NULL
                OR backend_xmin IS NOT NULL AND now() - xact_start > interval '1 second')";
    let seen = std::cell::Cell::new(0);
    let tried = "SELECT count(*) FROM pg_stat_activity
        WHERE application_name = 'waiting' AND state = 'idle'";
    eventually("migrate was seen between its tries", || async {
        assert_eq!(count(&database, held).await, 0);
        seen.set(seen.get() + count(&database, tried).await);
        seen.get() >= 20
    })
    .await;

    assert!(!waiting.is_finished());
    other.close().await.unwrap();
    in_time(waiting).await.unwrap().unwrap();
    delivers(&Durable::new(database.pool().clone())).await;
}

#[tokio::test]
async fn a_host_that_holds_the_lock_of_sqlx_can_migrate() {
    let database = empty().await;
    let mut host = database.options().connect().await.unwrap();
    host.lock().await.unwrap();
    in_time(requeuest::migrate(database.pool())).await.unwrap();
    delivers(&Durable::new(database.pool().clone())).await;
    in_time(Migrator::new().undo(database.pool()))
        .await
        .unwrap();
    // In a transaction of the host's, which has read the catalog.
    let mut transaction = database.pool().begin().await.unwrap();
    transaction
        .execute("CREATE TABLE orders (id bigint)")
        .await
        .unwrap();
    in_time(requeuest::migrate(database.pool())).await.unwrap();
    transaction.commit().await.unwrap();
    host.unlock().await.unwrap();
}

#[tokio::test]
async fn migrators_of_different_schemas_do_not_wait_for_each_other() {
    let database = empty().await;
    let _other = begin_other_migration(&database).await;
    let calls = Migrator::new().schema("calls").max_wait(Duration::ZERO);
    in_time(calls.run(database.pool())).await.unwrap();
    in_time(calls.undo(database.pool())).await.unwrap();
}

#[tokio::test]
async fn a_migration_that_waits_too_long_says_for_what() {
    let database = empty().await;
    let mut other = begin_other_migration(&database).await;
    let pid: i32 = sqlx::query_scalar("SELECT pg_backend_pid()")
        .fetch_one(&mut other)
        .await
        .unwrap();
    let migrator = Migrator::new().max_wait(Duration::from_millis(100));
    for error in [
        in_time(migrator.run(database.pool())).await.unwrap_err(),
        in_time(migrator.undo(database.pool())).await.unwrap_err(),
    ] {
        let MigrateError::Source(source) = &error else {
            panic!("{error:?}");
        };
        let source = source.downcast_ref::<std::io::Error>().unwrap();
        assert_eq!(source.kind(), std::io::ErrorKind::TimedOut);
        let text = error.to_string();
        assert!(text.contains("another migrate or undo"), "{text}");
        assert!(text.contains(&format!("[{pid}]")), "{text}");
    }
    assert_eq!(objects(&database).await, [""; 0]);

    // Where there is nothing to do, there is nothing to wait for.
    other.close().await.unwrap();
    migrator.run(database.pool()).await.unwrap();
    let _other = begin_other_migration(&database).await;
    in_time(migrator.run(database.pool())).await.unwrap();
}

#[tokio::test]
async fn the_settings_of_the_callers_sessions_do_not_matter() {
    let database = empty().await;
    let hostile = database.options().options([
        ("default_transaction_isolation", "serializable"),
        ("default_transaction_read_only", "on"),
        ("default_transaction_deferrable", "on"),
        ("lock_timeout", "1"),
        ("idle_in_transaction_session_timeout", "1000"),
        ("search_path", "pg_catalog"),
    ]);
    let pool = PgPoolOptions::new().connect_lazy_with(hostile);
    in_time(requeuest::migrate(&pool)).await.unwrap();
    delivers(&Durable::new(pool.clone())).await;
    in_time(Migrator::new().undo(&pool)).await.unwrap();
    assert_eq!(objects(&database).await, [""; 0]);
}
