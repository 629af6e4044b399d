//! The schema: how it comes, what it leaves alone, who may use it, and how its statements are planned.

use std::path::Path;
use std::time::Duration;

use futures_util::future::join_all;
use requeuest::migrate::Migrator;
use requeuest::retry::RetryPolicy;
use requeuest::testkit::{Postgres, TestDatabase};
use requeuest::{Durable, Options, Request, Status};
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use sqlx::{ConnectOptions, Connection, Executor, PgPool};

use crate::support::{LONG, Server, count, eventually, in_time, migrated};

fn post(server: &Server) -> Request {
    let request = http::Request::post(server.url("/")).body("x").unwrap();
    request.try_into().unwrap()
}

/// Retries without noticeable delays.
fn quick() -> RetryPolicy {
    RetryPolicy::exponential()
        .base(Duration::from_millis(1))
        .cap(Duration::from_millis(20))
}

async fn empty() -> TestDatabase {
    let _ = env_logger::builder().is_test(true).try_init();
    Postgres::shared().await.unwrap().database().await.unwrap()
}

async fn delivers(durable: &Durable) {
    let server = Server::always(200).await;
    let response = in_time(durable.await_response(post(&server)))
        .await
        .unwrap();
    assert_eq!(response.status(), 200);
    assert_eq!(server.count(), 1);
}

/// Every table, function, type and sequence outside Postgres' own schemas, with its schema.
async fn objects(database: &TestDatabase) -> Vec<String> {
    sqlx::query_scalar(
        "select n.nspname || '.' || o.name
         from (
            select relnamespace as schema, relname::text as name from pg_class
            union all select pronamespace, proname::text from pg_proc
            union all select typnamespace, typname::text from pg_type
         ) o
         join pg_namespace n on n.oid = o.schema
         where n.nspname !~ '^pg_' and n.nspname <> 'information_schema'
         order by 1",
    )
    .fetch_all(database.pool())
    .await
    .unwrap()
}

async fn ledger(database: &TestDatabase, schema: &str) -> Vec<i64> {
    let query = format!("select version from {schema}._sqlx_migrations order by version");
    sqlx::query_scalar(&query)
        .fetch_all(database.pool())
        .await
        .unwrap()
}

#[tokio::test]
async fn running_it_twice_changes_nothing() {
    let database = migrated().await;
    let before = objects(&database).await;
    requeuest::migrate(database.pool()).await.unwrap();
    assert_eq!(objects(&database).await, before);
    delivers(&Durable::new(database.pool().clone())).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_at_once_are_harmless() {
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

/// A host application's own migrations, some of them with the names that this crate uses.
fn write_host_migrations(dir: &Path, upto: i64) {
    let statements = [
        "create table orders (id bigint primary key)",
        "create table outcomes (of bigint references orders)",
        "create function enqueue() returns int language sql as 'select 1'",
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
async fn a_hosts_own_migrations_work_before_and_after() {
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
async fn a_hosts_own_migrations_run_at_the_same_time() {
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
    let durable = Durable::builder(database.pool().clone())
        .schema("calls_1")
        .build()
        .unwrap();
    delivers(&durable).await;

    let error = Durable::new(database.pool().clone())
        .fire(http::Request::get("http://127.0.0.1:1/").body("").unwrap())
        .await
        .unwrap_err();
    assert!(error.is_not_migrated(), "{error}");
}

#[tokio::test]
async fn a_schema_name_that_is_none_is_refused_before_anything_is_done() {
    let database = empty().await;
    for name in ["", "Calls", "a b", "x;drop schema public", "é"] {
        let migrator = Migrator::new().schema(name);
        migrator.run(database.pool()).await.unwrap_err();
        migrator.undo(database.pool()).await.unwrap_err();
    }
    assert_eq!(objects(&database).await, [""; 0]);
}

#[tokio::test]
async fn two_schemas_side_by_side_deliver_their_own() {
    let database = empty().await;
    let mut handles = Vec::new();
    for schema in ["first", "second"] {
        let migrator = Migrator::new().schema(schema);
        migrator.run(database.pool()).await.unwrap();
        handles.push(
            Durable::builder(database.pool().clone())
                .schema(schema)
                .build()
                .unwrap(),
        );
    }
    let (first, second) = (&handles[0], &handles[1]);
    let server = Server::always(200).await;
    for durable in [first, second, first] {
        let response = in_time(durable.await_response(post(&server)))
            .await
            .unwrap();
        assert_eq!(response.status(), 200);
    }
    // Through the queue as well, not only by the process that enqueues.
    let later = Options::default().delay(Duration::from_millis(1));
    let id = first
        .fire_in(database.pool(), post(&server).with(later))
        .await
        .unwrap();
    in_time(first.response(id)).await.unwrap();
    assert_eq!(second.status(id).await.unwrap(), None);
    let error = in_time(second.response(id)).await.unwrap_err();
    assert!(error.is_unknown_id(), "{error}");
    assert_eq!(server.count(), 4);
    assert_eq!(
        count(&database, "select count(*) from first.outcomes").await,
        3
    );
    assert_eq!(
        count(&database, "select count(*) from second.outcomes").await,
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
async fn undoing_removes_everything_and_it_can_be_installed_again() {
    let database = empty().await;
    let before = objects(&database).await;
    requeuest::migrate(database.pool()).await.unwrap();
    let installed = objects(&database).await;
    assert_ne!(installed, before);
    delivers(&Durable::new(database.pool().clone())).await;

    let migrator = Migrator::new();
    migrator.undo(database.pool()).await.unwrap();
    assert_eq!(objects(&database).await, before);
    let schemas = "select count(*) from pg_namespace where nspname = 'requeuest'";
    assert_eq!(count(&database, schemas).await, 0);
    migrator.undo(database.pool()).await.unwrap();

    requeuest::migrate(database.pool()).await.unwrap();
    assert_eq!(objects(&database).await, installed);
    delivers(&Durable::new(database.pool().clone())).await;
}

#[tokio::test]
async fn a_handle_survives_an_undo_and_a_new_installation() {
    let database = migrated().await;
    let durable = Durable::new(database.pool().clone());
    delivers(&durable).await;
    let server = Server::always(200).await;
    let mut transaction = database.pool().begin().await.unwrap();
    durable
        .fire_in(&mut *transaction, post(&server))
        .await
        .unwrap();
    transaction.rollback().await.unwrap();

    Migrator::new().undo(database.pool()).await.unwrap();
    let error = in_time(durable.fire(post(&server))).await.unwrap_err();
    assert!(error.is_not_migrated(), "{error}");
    let error = durable
        .fire_in(database.pool(), post(&server))
        .await
        .unwrap_err();
    assert!(error.is_not_migrated(), "{error}");

    requeuest::migrate(database.pool()).await.unwrap();
    delivers(&durable).await;
    let id = durable
        .fire_in(database.pool(), post(&server))
        .await
        .unwrap();
    in_time(durable.response(id)).await.unwrap();
}

#[tokio::test]
async fn a_stock_sqlxmq_in_public_is_never_touched() {
    let database = empty().await;
    // What it looks like from outside: the same names, and bodies that give away who calls them.
    database
        .pool()
        .execute(
            "create table mq_msgs (id uuid primary key, attempt_at timestamptz);
             create table mq_payloads (id uuid primary key, name text, payload_json jsonb);
             insert into mq_msgs values (gen_random_uuid(), now());
             insert into mq_payloads values (gen_random_uuid(), 'job', '{}');
             create type mq_new_t as (id uuid);
             create function mq_poll(channel_names text[], batch_size int default 1)
                returns table (id uuid) language plpgsql as
                $$ begin raise exception 'somebody else''s function was called'; end $$;
             create function mq_insert(new_messages mq_new_t[]) returns void language plpgsql as
                $$ begin raise exception 'somebody else''s function was called'; end $$;
             create function mq_delete(msg_ids uuid[]) returns void language plpgsql as
                $$ begin raise exception 'somebody else''s function was called'; end $$;",
        )
        .await
        .unwrap();
    let theirs = "select md5(string_agg(t::text, '|' order by t::text)) from (
        select m::text as t from public.mq_msgs m
        union all select p::text from public.mq_payloads p
        union all select pg_get_functiondef(f.oid) from pg_proc f where pronamespace = 'public'::regnamespace
    ) as t(t)";
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
        .fire_in(database.pool(), post(&server))
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
async fn calls_before_the_migration_say_what_to_do_and_the_handle_works_after_it() {
    let database = empty().await;
    let server = Server::always(200).await;
    let durable = Durable::new(database.pool().clone());
    let id = requeuest::RequestId::from(requeuest::Uuid::nil());
    let errors = [
        in_time(durable.fire(post(&server))).await.unwrap_err(),
        in_time(durable.await_response(post(&server)))
            .await
            .unwrap_err(),
        durable
            .fire_in(database.pool(), post(&server))
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
    // The runner, which could not start, has found the schema by itself.
    let id = durable
        .fire_in(database.pool(), post(&server))
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
            "select count(*) from pg_extension where extname <> 'plpgsql'"
        )
        .await,
        0
    );
}

/// A role that may log in, dropped with what it may do when the test is over.
struct Role<'a> {
    database: &'a TestDatabase,
    name: String,
}

impl<'a> Role<'a> {
    async fn create(database: &'a TestDatabase) -> Self {
        let name = format!("{}_role", database.name());
        let statements = format!("create role {name} login password 'test'");
        database.pool().execute(&*statements).await.unwrap();
        Self { database, name }
    }

    async fn granted(&self, statements: &str) {
        let statements = statements.replace("ROLE", &self.name);
        self.database.pool().execute(&*statements).await.unwrap();
    }

    fn options(&self) -> PgConnectOptions {
        let options = self.database.options();
        options.username(&self.name).password("test")
    }

    fn pool(&self) -> PgPool {
        PgPoolOptions::new().connect_lazy_with(self.options())
    }

    async fn dropped(self) {
        let name = &self.name;
        let statements = format!("drop owned by {name} cascade; drop role {name}");
        self.database.pool().execute(&*statements).await.unwrap();
    }
}

#[tokio::test]
async fn a_role_without_rights_to_change_the_schema_can_run_a_handle() {
    let database = migrated().await;
    let role = Role::create(&database).await;
    role.granted(
        "grant usage on schema requeuest to ROLE;
         grant select, insert, update, delete, truncate on all tables in schema requeuest to ROLE;
         grant usage on all sequences in schema requeuest to ROLE;
         grant execute on all functions in schema requeuest to ROLE;
         revoke insert, update, delete, truncate on requeuest._sqlx_migrations from ROLE",
    )
    .await;
    let mut connection = role.options().connect().await.unwrap();
    let denied = connection.execute("create table requeuest.more ()").await;
    denied.unwrap_err();

    let server = Server::in_turn(&[503, 200]).await;
    let durable = Durable::builder(role.pool())
        .retry(quick())
        .build()
        .unwrap();
    let response = in_time(durable.await_response(post(&server)))
        .await
        .unwrap();
    assert_eq!(response.status(), 200);
    let ordered = post(&server).with(Options::default().ordered("key"));
    let id = in_time(durable.fire(ordered)).await.unwrap();
    in_time(durable.response(id)).await.unwrap();
    let id = durable
        .fire_in(&mut connection, post(&server))
        .await
        .unwrap();
    in_time(durable.response(id)).await.unwrap();
    assert_eq!(durable.status(id).await.unwrap(), Some(Status::Completed));

    // What the sweep does, with something to empty.
    database
        .pool()
        .execute("update requeuest.outcomes set expires_at = now() - interval '1 second'")
        .await
        .unwrap();
    let emptied: i32 = sqlx::query_scalar(
        "select sum(requeuest.prune_outcomes(r * interval '1 second'))::int
         from generate_series(60, 600) as r",
    )
    .fetch_one(&mut connection)
    .await
    .unwrap();
    assert!(emptied > 0);
    connection.close().await.unwrap();
    durable.shutdown(LONG).await.unwrap();
    role.dropped().await;
}

#[tokio::test]
async fn an_owner_of_an_empty_schema_needs_no_right_to_create_one() {
    let database = empty().await;
    let role = Role::create(&database).await;
    let pool = role.pool();
    let denied = requeuest::migrate(&pool).await.unwrap_err();
    assert!(
        denied.to_string().contains("permission denied"),
        "{denied:?}"
    );
    role.granted("create schema requeuest authorization ROLE")
        .await;
    requeuest::migrate(&pool).await.unwrap();
    let durable = Durable::new(pool.clone());
    delivers(&durable).await;
    durable.shutdown(LONG).await.unwrap();
    pool.close().await;
    role.dropped().await;
}

#[tokio::test]
async fn the_callers_search_path_is_of_no_consequence() {
    let database = migrated().await;
    database
        .pool()
        .execute(
            "create schema evil;
             create function evil.fail() returns int language plpgsql as
                $$ begin raise exception 'the wrong schema was used'; end $$;
             create function evil.times(int8, interval) returns interval language sql as
                $$ select evil.fail() * interval '1 second' $$;
             create operator evil.* (leftarg = int8, rightarg = interval, function = evil.times);
             create table evil.mq_msgs (id int default evil.fail());
             create table evil.mq_payloads (id int default evil.fail());
             create sequence evil.mq_seq;
             create function evil.now() returns int language sql as 'select evil.fail()';
             create function evil.clock_timestamp() returns int language sql as 'select evil.fail()';
             create function evil.pg_notify(text, text) returns int language sql as 'select evil.fail()'",
        )
        .await
        .unwrap();
    // The path of the pool that the handle is made from: its own connections have another one.
    let hostile = database
        .options()
        .options([("search_path", "evil,pg_catalog")]);
    let pool = PgPoolOptions::new().connect_lazy_with(hostile.clone());
    requeuest::migrate(&pool).await.unwrap();
    let durable = Durable::new(pool.clone());
    delivers(&durable).await;

    let server = Server::always(200).await;
    let mut connection = hostile.connect().await.unwrap();
    // Temporary tables come before everything, unless a path says otherwise.
    connection
        .execute(
            "create temporary table mq_msgs (id int default evil.fail());
             create temporary table mq_payloads (id int default evil.fail());
             create temporary sequence mq_seq",
        )
        .await
        .unwrap();
    let ordered = Options::default().ordered("key");
    for request in [post(&server), post(&server).with(ordered)] {
        let id = durable.fire_in(&mut connection, request).await.unwrap();
        let response = in_time(durable.response(id)).await.unwrap();
        assert_eq!(response.status(), 200);
    }
    for path in ["", "pg_temp", "pg_temp, evil, pg_catalog, requeuest"] {
        sqlx::query("select pg_catalog.set_config('search_path', $1, false)")
            .bind(path)
            .execute(&mut connection)
            .await
            .unwrap();
        let request = post(&server);
        let id = durable.fire_in(&mut connection, request).await.unwrap();
        in_time(durable.response(id)).await.unwrap();
    }
}

/// Rows that are due in the given time, made from one that waits, spread over groups.
async fn backlog(pool: &PgPool, like: requeuest::RequestId, channel: &str, due: &str) {
    let insert = format!(
        "with p as (
            insert into requeuest.mq_payloads (id, name, head, body)
            select gen_random_uuid(), l.name, l.head, l.body
            from requeuest.mq_payloads l, generate_series(1, {BACKLOG}) where l.id = $1
            returning id
        )
        insert into requeuest.mq_msgs (id, channel_name, channel_args, attempt_at)
        select id, $2, to_char((random() * 2000)::int, 'FM0000') || '|d|http://some.where', now() + {due}
        from p"
    );
    sqlx::query(&insert)
        .bind(requeuest::Uuid::from(like))
        .bind(channel)
        .execute(pool)
        .await
        .unwrap();
}

const BACKLOG: i64 = 20_000;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_statement_reads_a_whole_table_though_it_was_planned_while_that_was_empty() {
    let database = empty().await;
    // A session's counters are sure to be in once it has ended.
    let ended = async |name: &str| {
        let sessions = format!(
            "select count(*) from pg_stat_activity
             where datname = current_database() and application_name = '{name}'"
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
    // Of a table that was never looked at, Postgres guesses that it isn't tiny.
    database.pool().execute("vacuum analyze").await.unwrap();
    ended("caller").await;
    let reset = "select pg_stat_reset()";
    database.pool().execute(reset).await.unwrap();

    let server = Server::in_turn(&[200, 503, 200]).await;
    // Few connections, so that the later calls come to those that have planned everything already.
    let durable = Durable::builder(pool.clone())
        .max_connections(2)
        .connect_options(options.application_name("handle"))
        .retry(quick())
        .build()
        .unwrap();
    let round = || async {
        let awaited = (0..20).map(|_| durable.await_response(post(&server)));
        for response in in_time(join_all(awaited)).await {
            assert_eq!(response.unwrap().status(), 200);
        }
        let options = [
            Options::default().ordered("key"),
            Options::default().delay(Duration::from_millis(5)),
            Options::default(),
        ];
        for options in options {
            let request = post(&server).with(options);
            let id = in_time(durable.fire(request)).await.unwrap();
            let response = in_time(durable.response(id)).await.unwrap();
            assert_eq!(response.status(), 200);
            let status = durable.status(id).await.unwrap();
            assert_eq!(status, Some(Status::Completed));
        }
        let mut transaction = pool.begin().await.unwrap();
        let id = durable
            .fire_in(&mut *transaction, post(&server))
            .await
            .unwrap();
        transaction.commit().await.unwrap();
        in_time(durable.response(id)).await.unwrap();
        24
    };
    let mut enqueued = round().await;

    let hour = Options::default().delay(Duration::from_secs(3600));
    let like = durable.fire(post(&server).with(hour)).await.unwrap();
    backlog(&pool, like, "default", "interval '1 hour'").await;
    backlog(&pool, like, "elsewhere", "interval '-1 hour'").await;
    enqueued += 1 + 2 * BACKLOG + round().await;
    // More that is due than one look takes in: groups are skipped through until it is delivered.
    let sent = server.count();
    pool.execute(
        "update requeuest.mq_msgs set attempt_at = now() where id in (
            select id from requeuest.mq_msgs where channel_name = 'default' and state = 0 order by attempt_at limit 1500
         )",
    )
    .await
    .unwrap();
    server.wait_for(sent + 1500).await;
    durable.shutdown(LONG).await.unwrap();
    ended("handle").await;
    let left = "select count(*) from requeuest.mq_msgs";
    let (left,): (i64,) = sqlx::query_as(left).fetch_one(&pool).await.unwrap();
    drop((durable, pool));
    ended("caller").await;

    // Before Postgres 15 the counters still take a moment.
    let rows = "select n_tup_ins = $1 and n_tup_ins - n_tup_del = $2 from pg_stat_user_tables
                where schemaname = 'requeuest' and relname = 'mq_msgs'";
    eventually("the counters are in", || async {
        let rows = sqlx::query_scalar(rows).bind(enqueued).bind(left);
        rows.fetch_one(database.pool()).await.unwrap()
    })
    .await;
    let read: Vec<(String, i64)> = sqlx::query_as(
        "select relname::text, seq_scan from pg_stat_user_tables
         where schemaname = 'requeuest' and relname ~ '^(mq_msgs|mq_payloads|attempts|outcomes)' and seq_scan > 0",
    )
    .fetch_all(database.pool())
    .await
    .unwrap();
    assert_eq!(read, []);
}
