//! Roles of the database: what each may do, and what it must not be able to find out.

mod calls;

use std::time::Duration;

use requeuest::migrate::{DatabaseRole, Migrator};
use requeuest::testkit::TestDatabase;
use requeuest::{
    DeadLetterFilter, Durable, Error, Options, RequestId, Resolution, Status, Uuid, outcome_fn,
};
use sqlx::migrate::MigrateError;
use sqlx::{ConnectOptions, Connection, Executor, PgConnection, Row};

use crate::sessions::{RETENTION, with_table, works};
use crate::support::{
    LONG, Role, Server, add_outcomes, builder, count, eventually, eventually_rows, in_time, limits,
    migrated, outcome_of, post, quick, rows,
};

/// What a test looks for in everything that a role gets to see.
const SECRET: &str = "k4n4ri3";

fn assert_forbidden<T: std::fmt::Debug>(result: Result<T, Error>, what: &str) {
    let error = result.expect_err(what);
    assert!(error.is_forbidden(), "{what}: {error:?}");
    let text = format!("{error} {error:?}");
    assert!(text.contains("Migrator::grants"), "{what}: {text}");
    assert!(!text.contains(SECRET), "{what}: {text}");
}

/// A request that holds the secret in each of its parts.
fn secretive(server: &Server, key: &str) -> requeuest::Request {
    let url = server.url(&format!("/{SECRET}?token={SECRET}"));
    let request = http::Request::post(url)
        .header("authorization", SECRET)
        .body(SECRET)
        .unwrap();
    let request = requeuest::Request::try_from(request).unwrap();
    request.with(Options::default().key(key))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_role_that_enqueues_can_do_that_and_nothing_else() {
    let database = migrated().await;
    let role = Role::create(&database).await;
    role.plays(DatabaseRole::Enqueue).await;
    let server = Server::echo().await;
    let runner = builder(&database).build().unwrap();
    let web = Durable::builder(role.pool()).runner(false).build().unwrap();
    let request = |options: Options| post(server.url("/"), "x").with(options);

    // Every kind of request arrives.
    let kinds = [
        Options::default(),
        Options::default().ordered("order"),
        Options::default().key("key"),
        Options::default().supersede("latest"),
        Options::default().delay(Duration::from_millis(1)),
    ];
    let mut ids = Vec::new();
    for options in kinds {
        ids.push(in_time(web.fire(request(options.clone()))).await.unwrap());
        let pool = role.pool();
        let mut transaction = pool.begin().await.unwrap();
        ids.push(
            web.fire_in(&mut *transaction, request(options.clone()))
                .await
                .unwrap(),
        );
        ids.extend(
            web.fire_many_in(&mut transaction, [request(options.clone())])
                .await
                .unwrap(),
        );
        transaction.commit().await.unwrap();
        let many = [options.clone(), options].map(request);
        ids.extend(in_time(web.fire_many(many)).await.unwrap());
    }
    // As many at once as make batches.
    let calls = (0..100).map(|_| web.fire(request(Options::default())));
    for fired in in_time(futures_util::future::join_all(calls)).await {
        ids.push(fired.unwrap());
    }
    for id in &ids {
        assert!(outcome_of(&runner, *id).await.status().is_terminal());
    }

    // Anything else names what is missing.
    let before = rows(&database, "mq_payloads").await + rows(&database, "outcomes").await;
    for options in [Options::default(), Options::default().key("awaited")] {
        assert_forbidden(in_time(web.await_response(request(options))).await, "await");
    }
    let after = rows(&database, "mq_payloads").await + rows(&database, "outcomes").await;
    assert_eq!(before, after, "an awaited request was persisted");
    let id = in_time(runner.fire(secretive(&server, "theirs"))).await;
    let id = id.unwrap();
    outcome_of(&runner, id).await;
    assert_forbidden(web.outcome(id).await, "outcome");
    assert_forbidden(web.response(id).await, "response");
    assert_forbidden(web.status(id).await, "status");
    assert_forbidden(web.cancel(id).await, "cancel");
    assert_forbidden(web.replay(id).await, "replay");
    assert_forbidden(web.resolve(id, Resolution::Sent).await, "resolve");
    let all = DeadLetterFilter::default();
    assert_forbidden(web.dead_letters(&all).await, "dead letters");
    assert_forbidden(web.purge_dead_letters(&all).await, "purge");
    assert_forbidden(web.runners().await, "runners");
    let handler =
        outcome_fn(async |_: &mut PgConnection, _: &requeuest::Outcome| Ok::<_, sqlx::Error>(()));
    assert_forbidden(
        web.on_outcome("default", handler).await.map(drop),
        "handler",
    );

    // A handle that delivers can't, and says which setting fits the role.
    let delivering = Durable::builder(role.pool()).build().unwrap();
    let refused = in_time(delivering.fire(request(Options::default()))).await;
    let refused = refused.unwrap_err();
    assert!(refused.is_forbidden(), "{refused:?}");
    assert!(refused.to_string().contains("runner(false)"), "{refused}");
    in_time(delivering.shutdown(LONG)).await.unwrap();
    in_time(web.shutdown(LONG)).await.unwrap();
    in_time(runner.shutdown(LONG)).await.unwrap();
    role.dropped().await;
}

#[tokio::test]
async fn a_role_that_enqueues_has_seven_functions_and_no_table_of_requests() {
    let database = migrated().await;
    let role = Role::create(&database).await;
    role.plays(DatabaseRole::Enqueue).await;
    let mut connection = role.options().connect().await.unwrap();
    let tables = "SELECT c.relname::text FROM pg_class c
        WHERE c.relnamespace = 'requeuest'::regnamespace AND c.relkind IN ('r', 'p', 'v', 'm')
            AND (
                has_any_column_privilege(c.oid, 'SELECT, INSERT, UPDATE, REFERENCES')
                OR has_table_privilege(c.oid, 'DELETE, TRUNCATE, TRIGGER')
            )
        ORDER BY 1";
    let tables: Vec<String> = names(&mut connection, tables).await;
    assert_eq!(tables, ["_sqlx_migrations", "compatible_from"]);
    let functions = "SELECT p.proname::text FROM pg_proc p
        WHERE p.pronamespace = 'requeuest'::regnamespace
            AND has_function_privilege(p.oid, 'EXECUTE')
        ORDER BY 1";
    let functions = names(&mut connection, functions).await;
    assert_eq!(
        functions,
        [
            "enqueue",
            "enqueue_many",
            "fire",
            "fire_prepared",
            "is_delivered",
            "known_formats",
            "note_activity"
        ]
    );
    let sequence = "SELECT has_sequence_privilege('requeuest.mq_seq', 'USAGE, SELECT, UPDATE')";
    let sequence: bool = sqlx::query_scalar(sequence)
        .fetch_one(&mut connection)
        .await
        .unwrap();
    assert!(!sequence);
    connection.close().await.unwrap();
    role.dropped().await;
}

/// Two requests with secrets, one that has ended and one that waits, and their keys.
async fn requests_of_others(database: &TestDatabase) -> [(RequestId, &'static str); 2] {
    let server = Server::echo().await;
    let runner = builder(database).build().unwrap();
    let ended = in_time(runner.fire(secretive(&server, "ended"))).await;
    let ended = ended.unwrap();
    outcome_of(&runner, ended).await;
    in_time(runner.shutdown(LONG)).await.unwrap();
    let idle = builder(database).runner(false).build().unwrap();
    let waiting = in_time(idle.fire(secretive(&server, "waiting"))).await;
    assert_eq!(rows(database, "mq_payloads").await, 1);
    [(ended, "ended"), (waiting.unwrap(), "waiting")]
}

#[tokio::test]
async fn a_role_that_enqueues_learns_no_content_by_any_statement() {
    let database = migrated().await;
    let role = Role::create(&database).await;
    role.plays(DatabaseRole::Enqueue).await;
    let others = requests_of_others(&database).await;
    let mut connection = role.options().connect().await.unwrap();
    // Each table, and each function with NULLs.
    let all = "SELECT 'SELECT t::text FROM requeuest.' || c.relname || ' t' FROM pg_class c
        WHERE c.relnamespace = 'requeuest'::regnamespace AND c.relkind IN ('r', 'p')
        UNION ALL
        SELECT 'SELECT f::text FROM requeuest.' || p.proname || '(' || array_to_string(ARRAY(
            SELECT 'NULL::' || format_type(a.type, NULL)
            FROM unnest(p.proargtypes::oid[]) WITH ORDINALITY AS a(type, number) ORDER BY a.number
        ), ', ') || ') f'
        FROM pg_proc p WHERE p.pronamespace = 'requeuest'::regnamespace
            AND p.prorettype <> 'trigger'::regtype";
    let mut statements = names(&mut connection, all).await;
    let tried = statements.len();
    assert!(tried > 100, "{tried}");
    for (id, _) in others {
        let id = Uuid::from(id);
        // What an insert with another's id tells.
        statements.extend([true, false].map(|again| {
            format!(
                "SELECT e::text FROM requeuest.enqueue('{id}', 'c', 'g', false, false, '0', NULL, \
                 'requeuest', 'h', NULL, NULL, 'waiting', NULL, NULL, NULL, NULL, NULL, true, \
                 false, {again}) e"
            )
        }));
    }
    let (mut seen, mut refused) = (Vec::new(), 0);
    for statement in &statements {
        match sqlx::query(statement).fetch_all(&mut connection).await {
            Ok(found) => seen.extend(found.iter().map(|row| {
                let text: Option<String> = row.try_get(0).unwrap();
                text.unwrap_or_default()
            })),
            Err(error) => {
                refused += 1;
                seen.push(format!("{error:?}"));
            }
        }
    }
    assert!(refused > 100, "{refused} of {tried}");
    let seen = seen.join("\n");
    assert!(seen.contains("permission denied"), "{seen}");
    assert!(!seen.contains(SECRET), "{seen}");
    connection.close().await.unwrap();
    role.dropped().await;
}

#[tokio::test]
async fn a_key_of_another_request_tells_its_id_and_no_more() {
    let database = migrated().await;
    let role = Role::create(&database).await;
    role.plays(DatabaseRole::Enqueue).await;
    let others = requests_of_others(&database).await;
    let web = Durable::builder(role.pool()).runner(false).build().unwrap();
    for (id, key) in others {
        let guess = post("http://localhost:1/", "guess").with(Options::default().key(key));
        let conflict = in_time(web.fire(guess)).await.unwrap_err();
        assert!(conflict.is_key_conflict(), "{conflict:?}");
        assert_eq!(conflict.request_id(), Some(id));
        let text = format!("{conflict} {conflict:?}");
        assert!(!text.contains(SECRET), "{text}");
        assert_forbidden(web.response(id).await, "another's response");
        assert_forbidden(web.status(id).await, "another's status");
    }
    in_time(web.shutdown(LONG)).await.unwrap();

    // Nor may it insert what its own process would send, or what looks ended.
    let mut connection = role.options().connect().await.unwrap();
    for state in [
        "claimed",
        "held",
        "sending_once",
        "halted",
        "parked",
        "behind",
    ] {
        let insert = format!(
            "SELECT FROM requeuest.enqueue(gen_random_uuid(), 'c', 'g', false, false, '0', NULL, \
             'requeuest', 'h', NULL, NULL, '{state}', '1 day', NULL, NULL, NULL, NULL, true, \
             false, false) e"
        );
        let denied = connection.execute(&*insert).await.unwrap_err();
        assert!(format!("{denied:?}").contains("42501"), "{denied:?}");
    }
    connection.close().await.unwrap();
    role.dropped().await;
}

async fn names(connection: &mut PgConnection, query: &str) -> Vec<String> {
    sqlx::query_scalar(query)
        .fetch_all(connection)
        .await
        .unwrap()
}

#[tokio::test]
async fn a_function_of_the_schema_is_safe_to_run_as_its_owner() {
    let database = migrated().await;
    // Those with the owner's rights pin their path to the schema, with temporary tables last.
    let loose = "SELECT count(*) FROM pg_proc p
        WHERE p.pronamespace = 'requeuest'::regnamespace AND p.prosecdef AND NOT (
            'search_path=requeuest, pg_temp' = ANY (coalesce(p.proconfig, '{}'))
        )";
    assert_eq!(count(&database, loose).await, 0);
    let public = "SELECT count(*) FROM pg_proc p
        WHERE p.pronamespace = 'requeuest'::regnamespace
            AND has_function_privilege('pg_monitor', p.oid, 'EXECUTE')";
    assert_eq!(count(&database, public).await, 0);
    let definers = "SELECT count(*) FROM pg_proc p
        WHERE p.pronamespace = 'requeuest'::regnamespace AND p.prosecdef";
    assert_eq!(count(&database, definers).await, 7);

    // A caller's temporary tables and functions aren't taken for the schema's.
    let role = Role::create(&database).await;
    role.plays(DatabaseRole::Enqueue).await;
    let mut connection = role.options().connect().await.unwrap();
    connection
        .execute(
            "CREATE TEMP TABLE mq_payloads (id uuid, name text, head text, body bytea,
                metadata json);
             CREATE TEMP TABLE mq_msgs AS SELECT 1 AS id;
             CREATE TEMP TABLE request_keys AS SELECT 1 AS id;
             CREATE FUNCTION pg_temp.clock_timestamp() RETURNS timestamptz LANGUAGE plpgsql
             AS 'BEGIN RAISE EXCEPTION ''called''; END';
             SET search_path = pg_temp, pg_catalog",
        )
        .await
        .unwrap();
    let web = Durable::builder(role.pool()).runner(false).build().unwrap();
    let request = || post("http://localhost:1/", "x").with(Options::default().key("k"));
    web.fire_in(&mut connection, request()).await.unwrap();
    let many = [
        post("http://localhost:1/", "x"),
        post("http://localhost:1/", "y"),
    ];
    web.fire_many_in(&mut connection, many).await.unwrap();
    assert_eq!(rows(&database, "mq_payloads").await, 3);
    connection.close().await.unwrap();
    in_time(web.shutdown(LONG)).await.unwrap();
    role.dropped().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_runners_role_does_all_that_a_handle_does() {
    let database = with_table().await;
    requeuest::migrate(database.pool()).await.unwrap();
    let role = Role::create(&database).await;
    role.plays(DatabaseRole::Runner).await;
    role.granted("GRANT ALL ON public.done TO ROLE").await;
    let pool = role.pool();
    // There is nothing to migrate.
    in_time(requeuest::migrate(&pool)).await.unwrap();
    let durable = Durable::builder(pool.clone())
        .channel("handled")
        .deliver_all()
        .destination("*", limits())
        .retention(RETENTION)
        .retry(quick())
        .build()
        .unwrap();
    add_outcomes(&database, 4, 7000, 100, 60).await;
    works(&durable, &pool).await;
    assert_eq!(durable.runners().await.unwrap().len(), 1);
    eventually_rows(
        &database,
        "outcomes WHERE expires_at < now() - interval '10 s'",
        0,
    )
    .await;
    eventually("the sweep has come by", || async {
        durable.sweep_parts().len() >= 8
    })
    .await;
    let parts = durable.sweep_parts();
    assert!(parts.iter().all(|part| part.failures == 0), "{parts:?}");
    in_time(durable.shutdown(LONG)).await.unwrap();

    let mut connection = role.options().connect().await.unwrap();
    for denied in [
        "CREATE TABLE requeuest.more ()",
        "ALTER TABLE requeuest.mq_msgs ADD more int",
        "DROP FUNCTION requeuest.enqueue",
        "TRUNCATE requeuest.mq_payloads",
        "DELETE FROM requeuest._sqlx_migrations",
        "UPDATE requeuest.compatible_from SET version = 0",
        "CREATE OR REPLACE FUNCTION requeuest.bulk_lock() RETURNS bigint LANGUAGE sql
            AS 'SELECT 1::bigint'",
    ] {
        let error = connection.execute(denied).await.unwrap_err();
        let state = error
            .as_database_error()
            .and_then(sqlx::error::DatabaseError::code);
        assert_eq!(state.as_deref(), Some("42501"), "{denied}: {error:?}");
    }
    connection.close().await.unwrap();
    pool.close().await;
    role.dropped().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_role_that_reads_sees_everything_and_changes_nothing() {
    let database = migrated().await;
    let role = Role::create(&database).await;
    role.plays(DatabaseRole::ReadOnly).await;
    let (server, gate) = Server::held(200).await;
    let runner = builder(&database).build().unwrap();
    let support = Durable::builder(role.pool())
        .runner(false)
        .retention(RETENTION)
        .build()
        .unwrap();
    let id = in_time(runner.fire(post(server.url("/"), "x")))
        .await
        .unwrap();
    server.wait_for(1).await;
    assert_eq!(support.status(id).await.unwrap(), Some(Status::Running));
    let waiting = support.response(id);
    gate.add_permits(10);
    assert_eq!(in_time(waiting).await.unwrap().text().unwrap(), "x");
    let all = DeadLetterFilter::default();
    assert_eq!(support.dead_letters(&all).await.unwrap().len(), 0);
    assert_eq!(support.runners().await.unwrap().len(), 1);
    assert_eq!(support.parked(None).await.unwrap().len(), 0);
    assert_eq!(support.handled_channels().await.unwrap().len(), 0);

    assert_forbidden(support.fire(post(server.url("/"), "x")).await, "fire");
    assert_forbidden(
        support.await_response(post(server.url("/"), "x")).await,
        "await",
    );
    assert_forbidden(
        support.fire_many([post(server.url("/"), "x")]).await,
        "many",
    );
    assert_forbidden(support.cancel(id).await, "cancel");
    assert_forbidden(support.replay(id).await, "replay");
    let mut connection = role.options().connect().await.unwrap();
    let writable = "SELECT c.relname::text FROM pg_class c
        WHERE c.relnamespace = 'requeuest'::regnamespace AND c.relkind IN ('r', 'p')
            AND (
                has_any_column_privilege(c.oid, 'INSERT, UPDATE, REFERENCES')
                OR has_table_privilege(c.oid, 'DELETE, TRUNCATE, TRIGGER')
            )";
    assert!(names(&mut connection, writable).await.is_empty());
    connection.close().await.unwrap();
    // It doesn't sweep either.
    assert!(support.sweep_parts().is_empty());
    in_time(support.shutdown(LONG)).await.unwrap();
    in_time(runner.shutdown(LONG)).await.unwrap();
    role.dropped().await;
}

#[tokio::test]
async fn a_role_has_the_rights_of_its_parts_and_no_others() {
    let database = migrated().await;
    let role = Role::create(&database).await;
    role.plays(DatabaseRole::Runner).await;
    role.plays(DatabaseRole::Enqueue).await;
    let mut connection = role.options().connect().await.unwrap();
    let denied = connection
        .execute("SELECT FROM requeuest.mq_payloads")
        .await;
    denied.unwrap_err();

    // The statements do the same, by hand.
    let both = Migrator::new()
        .grants(DatabaseRole::Enqueue, &role.name)
        .grants(DatabaseRole::ReadOnly, &role.name);
    let sql = both.grants_sql().unwrap();
    let mut transaction = database.pool().begin().await.unwrap();
    transaction.execute(&*sql).await.unwrap();
    transaction.commit().await.unwrap();
    connection
        .execute("SELECT FROM requeuest.mq_payloads")
        .await
        .unwrap();
    connection
        .execute("DELETE FROM requeuest.mq_payloads")
        .await
        .unwrap_err();

    let missing = Migrator::new().grants(DatabaseRole::Runner, "no such role");
    let error = missing.run(database.pool()).await.unwrap_err();
    assert!(error.to_string().contains("no such role"), "{error:?}");
    for name in ["public", "", "none"] {
        let refused = Migrator::new().grants(DatabaseRole::Enqueue, name);
        let error = refused.run(database.pool()).await.unwrap_err();
        assert!(error.to_string().contains("grants"), "{error:?}");
        refused.grants_sql().unwrap_err();
    }
    let owner: String = sqlx::query_scalar("SELECT current_user::text")
        .fetch_one(database.pool())
        .await
        .unwrap();
    let own = Migrator::new().grants(DatabaseRole::Enqueue, owner);
    let error = own.run(database.pool()).await.unwrap_err();
    assert!(error.to_string().contains("owns the schema"), "{error:?}");
    connection.close().await.unwrap();
    role.dropped().await;
}

fn assert_foreign(migrated: Result<(), MigrateError>, owner: &Role<'_>) {
    let refused = migrated.unwrap_err();
    let MigrateError::Source(source) = &refused else {
        panic!("{refused:?}");
    };
    let error = source.downcast_ref::<Error>().unwrap();
    assert!(error.is_not_migrated(), "{error:?}");
    let text = error.to_string();
    for part in ["\"requeuest\"", &owner.name, "run migrate as"] {
        assert!(text.contains(part), "{text}");
    }
}

#[tokio::test]
async fn a_schema_of_another_role_is_refused() {
    let database = requeuest::testkit::Postgres::shared().await.unwrap();
    let database = database.database().await.unwrap();
    let mallory = Role::named(&database, "mallory").await;
    let app = Role::named(&database, "app").await;
    mallory
        .granted("CREATE SCHEMA requeuest AUTHORIZATION ROLE")
        .await;
    app.granted("GRANT ALL ON SCHEMA requeuest TO ROLE").await;
    // A superuser may do anything there, and would run what its owner puts there.
    for pool in [app.pool(), database.pool().clone()] {
        assert_foreign(requeuest::migrate(&pool).await, &mallory);
    }
    assert_eq!(
        count(
            &database,
            "SELECT count(*) FROM pg_class WHERE relnamespace = 'requeuest'::regnamespace"
        )
        .await,
        0
    );
    in_time(requeuest::migrate(&mallory.pool())).await.unwrap();
    // With nothing to migrate, too. Not even its ledger is read, which may be anything.
    let owner = mallory.pool();
    owner
        .execute(
            "CREATE TABLE requeuest.called (by text);
             GRANT ALL ON ALL TABLES IN SCHEMA requeuest TO PUBLIC;
             CREATE FUNCTION requeuest.call(bigint) RETURNS bigint LANGUAGE sql AS
                'INSERT INTO requeuest.called VALUES (current_user); SELECT $1';
             ALTER TABLE requeuest._sqlx_migrations RENAME TO real;
             CREATE VIEW requeuest._sqlx_migrations AS
                SELECT requeuest.call(version) AS version, description, success, checksum
                FROM requeuest.real;
             GRANT SELECT ON requeuest._sqlx_migrations TO PUBLIC",
        )
        .await
        .unwrap();
    for pool in [app.pool(), database.pool().clone()] {
        assert_foreign(requeuest::migrate(&pool).await, &mallory);
    }
    let called = "SELECT count(*) FROM requeuest.called";
    assert_eq!(count(&database, called).await, 0);
    owner
        .execute(
            "DROP VIEW requeuest._sqlx_migrations;
             ALTER TABLE requeuest.real RENAME TO _sqlx_migrations;
             DROP FUNCTION requeuest.call; DROP TABLE requeuest.called",
        )
        .await
        .unwrap();
    let app_too = Migrator::new().grants(DatabaseRole::Runner, &app.name);
    app_too.run(database.pool()).await.unwrap_err();
    app_too.run(&mallory.pool()).await.unwrap();
    app.dropped().await;
    mallory.dropped().await;
}
