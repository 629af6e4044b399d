//! Sessions as they come in production: with the settings of a role or a database, a server that
//! becomes a standby, credentials that rotate, publications, and two-phase commits.

use std::time::Duration;

use futures_util::future::join_all;
use requeuest::migrate::Migrator;
use requeuest::retry::RetryPolicy;
use requeuest::testkit::{Postgres, TestDatabase};
use requeuest::{
    DeadLetterFilter, Durable, Guarantee, Options, Outcome, RequestId, Resolution, Status, Uuid,
    outcome_fn,
};
use sqlx::postgres::PgPoolOptions;
use sqlx::{Executor, PgConnection, PgPool};

use crate::support::{
    LONG, Role, Server, add_outcomes, builder, closed_port, count, eventually, eventually_rows,
    in_time, migrated, outcome_of, post, quick, rows,
};

/// The shortest retention, which is swept every few seconds.
pub const RETENTION: Duration = Duration::from_secs(60);

/// Settings with which a role or a database might come. Some are odd, and all are allowed.
const ODD: &[(&str, &str)] = &[
    ("array_nulls", "off"),
    ("backslash_quote", "off"),
    ("bytea_output", "escape"),
    ("check_function_bodies", "off"),
    ("client_encoding", "LATIN1"),
    ("client_min_messages", "debug1"),
    ("constraint_exclusion", "on"),
    ("cpu_index_tuple_cost", "100"),
    ("cpu_operator_cost", "100"),
    ("cpu_tuple_cost", "100"),
    ("cursor_tuple_fraction", "1"),
    ("DateStyle", "SQL, DMY"),
    ("default_statistics_target", "1"),
    ("default_table_access_method", "odd"),
    ("default_tablespace", "nowhere"),
    ("default_text_search_config", "pg_catalog.german"),
    ("default_toast_compression", "pglz"),
    ("default_transaction_deferrable", "on"),
    ("default_transaction_isolation", "serializable"),
    ("default_transaction_read_only", "on"),
    ("effective_cache_size", "8kB"),
    ("enable_async_append", "off"),
    ("enable_bitmapscan", "off"),
    ("enable_gathermerge", "off"),
    ("enable_group_by_reordering", "off"),
    ("enable_hashagg", "off"),
    ("enable_incremental_sort", "off"),
    ("enable_indexonlyscan", "off"),
    ("enable_indexscan", "off"),
    ("enable_material", "off"),
    ("enable_memoize", "off"),
    ("enable_nestloop", "off"),
    ("enable_parallel_append", "off"),
    ("enable_partition_pruning", "off"),
    ("enable_presorted_aggregate", "off"),
    ("enable_sort", "off"),
    ("enable_tidscan", "off"),
    ("escape_string_warning", "on"),
    ("exit_on_error", "on"),
    ("extra_float_digits", "-15"),
    ("from_collapse_limit", "1"),
    ("geqo_threshold", "2"),
    ("gin_fuzzy_search_limit", "1"),
    ("idle_in_transaction_session_timeout", "500ms"),
    ("idle_session_timeout", "500ms"),
    ("IntervalStyle", "sql_standard"),
    ("jit", "on"),
    ("jit_above_cost", "-1"),
    ("join_collapse_limit", "1"),
    ("lc_monetary", "C"),
    ("lc_numeric", "C"),
    ("lc_time", "C"),
    ("lock_timeout", "1ms"),
    ("max_parallel_workers_per_gather", "8"),
    ("min_parallel_index_scan_size", "0"),
    ("min_parallel_table_scan_size", "0"),
    ("parallel_setup_cost", "0"),
    ("parallel_tuple_cost", "0"),
    ("plan_cache_mode", "force_custom_plan"),
    ("plpgsql.extra_errors", "all"),
    ("plpgsql.variable_conflict", "use_variable"),
    ("quote_all_identifiers", "on"),
    ("random_page_cost", "1000"),
    ("requeuest.dead_letter_retention", "x"),
    ("requeuest.formats", "{7}"),
    ("requeuest.lease", "x"),
    ("row_security", "off"),
    ("search_path", "pg_catalog"),
    ("seq_page_cost", "0.001"),
    ("session_replication_role", "replica"),
    ("standard_conforming_strings", "off"),
    ("statement_timeout", "2s"),
    ("synchronous_commit", "off"),
    ("temp_tablespaces", "nowhere"),
    ("TimeZone", "America/St_Johns"),
    ("transaction_timeout", "500ms"),
    ("transform_null_equals", "on"),
    ("work_mem", "64kB"),
    ("xmlbinary", "hex"),
];

/// Settings under which the connections of this test itself could not work.
const HARSH: [&str; 7] = [
    "default_transaction",
    "timeout",
    "session_replication_role",
    "exit_on_error",
    "search_path",
    "default_table",
    "client_min_messages",
];

/// A role that may migrate, with these settings in the database, and how many they are. Every
/// second one is the database's.
pub async fn odd_role(database: &TestDatabase) -> (Role<'_>, usize) {
    let role = Role::create(database).await;
    role.granted(
        "CREATE SCHEMA requeuest AUTHORIZATION ROLE;
         GRANT ALL ON public.done TO ROLE;
         CREATE ACCESS METHOD odd TYPE TABLE HANDLER heap_tableam_handler",
    )
    .await;
    let name = database.name();
    let mut set = 0;
    for (number, (setting, value)) in ODD.iter().enumerate() {
        let known = format!(
            "SELECT count(*) FROM pg_settings WHERE name ILIKE '{setting}' OR '{setting}' ~ '[.]'"
        );
        if count(database, &known).await == 0 {
            continue;
        }
        let harsh = HARSH.iter().any(|harsh| setting.contains(harsh));
        let whose = if harsh || number % 2 == 0 {
            format!("ROLE {} IN DATABASE {name}", role.name)
        } else {
            format!("DATABASE {name}")
        };
        let value = match *setting {
            "DateStyle" | "search_path" => (*value).to_owned(),
            _ => format!("'{value}'"),
        };
        let alter = format!("ALTER {whose} SET {setting} = {value}");
        database.pool().execute(&*alter).await.unwrap();
        set += 1;
    }
    (role, set)
}

/// A pool of an application that works in spite of its settings: it can write, its sessions last,
/// and sqlx's own settings are as odd as the others.
pub fn application_pool(role: &Role<'_>) -> PgPool {
    PgPoolOptions::new()
        .max_connections(4)
        .after_connect(|connection, _| {
            Box::pin(async move {
                connection
                    .execute(
                        "SET default_transaction_read_only = off;
                         SET default_transaction_isolation = 'read committed';
                         SET DateStyle = 'SQL, DMY';
                         SET TimeZone = 'America/St_Johns';
                         SET extra_float_digits = -15;
                         SELECT set_config(name, '0', false) FROM pg_settings
                         WHERE name ~ 'timeout$' AND context = 'user'",
                    )
                    .await?;
                Ok(())
            })
        })
        .connect_lazy_with(role.options())
}

async fn delivered(durable: &Durable, id: RequestId) {
    let outcome = outcome_of(durable, id).await;
    assert_eq!(outcome.status(), Status::Completed, "{outcome:?}");
}

/// Makes and ends requests in each way, some of them on the application's connections.
pub async fn works(durable: &Durable, application: &PgPool) {
    let server = Server::in_turn(&[503, 200]).await;
    let url = server.url("/");
    let kinds = [
        Options::default(),
        Options::default().ordered("order"),
        Options::default().key(Uuid::now_v7().to_string()),
        Options::default().delay(Duration::from_millis(1)),
        Options::default().deadline(LONG),
    ];
    for options in kinds {
        let request = post(&url, "x").with(options.clone());
        let awaited = in_time(durable.await_response(request.clone())).await;
        assert_eq!(awaited.unwrap().status(), 200, "{options:?}");
        let fired = in_time(durable.fire(request.clone())).await.unwrap();
        let mut transaction = application.begin().await.unwrap();
        let fired_in = durable.fire_in(&mut *transaction, request).await.unwrap();
        transaction.commit().await.unwrap();
        delivered(durable, fired).await;
        delivered(durable, fired_in).await;
    }

    // Ordered ones pile up behind one that is retried, and later ones are superseded.
    let (held, gate) = Server::held(200).await;
    let ordered = || Options::default().ordered("pile");
    let mut pile = Vec::new();
    for number in 0..20 {
        let request = post(held.url("/"), number.to_string()).with(ordered());
        pile.push(in_time(durable.fire(request)).await.unwrap());
    }
    let many = (20..40).map(|number| post(held.url("/"), number.to_string()).with(ordered()));
    let mut connection = application.acquire().await.unwrap();
    let many = durable.fire_many_in(&mut connection, many).await.unwrap();
    drop(connection);
    pile.extend(many);
    let replaced = post(held.url("/"), "replaced").with(ordered().supersede("one"));
    let replaced = durable.fire_in(application, replaced).await.unwrap();
    let latest = post(held.url("/"), "latest").with(ordered().supersede("one"));
    pile.push(durable.fire_in(application, latest).await.unwrap());
    assert_eq!(
        outcome_of(durable, replaced).await.status(),
        Status::Cancelled
    );
    gate.add_permits(100);
    for id in pile {
        delivered(durable, id).await;
    }
    let expected = (0..40).map(|number| number.to_string());
    let expected: Vec<_> = expected.chain(["latest".to_owned()]).collect();
    assert_eq!(held.bodies(), expected);

    // Dead letters.
    let nowhere = format!("HTTP://{}/", closed_port().await);
    let hopeless = || post(&nowhere, "x").with(Options::default().retry(RetryPolicy::none()));
    let id = in_time(durable.fire(hopeless())).await.unwrap();
    assert_eq!(outcome_of(durable, id).await.status(), Status::Discarded);
    let listed = durable.dead_letters(&DeadLetterFilter::default()).await;
    let listed = listed.unwrap();
    assert_eq!(listed.len(), 1);
    assert_eq!(listed[0].method.as_deref(), Some("POST"));
    let destination = nowhere.trim_end_matches('/').to_lowercase();
    assert_eq!(listed[0].destination, Some(destination));
    let again = in_time(durable.replay(id)).await.unwrap();
    assert_eq!(outcome_of(durable, again).await.status(), Status::Discarded);
    let once = Options::default()
        .guarantee(Guarantee::AtMostOnce)
        .attempt_timeout(Duration::from_millis(100));
    for resolution in [Resolution::Sent, Resolution::NotSent] {
        let (mute, answer) = Server::held(200).await;
        let request = post(mute.url("/"), "x").with(once.clone());
        let id = in_time(durable.fire(request)).await.unwrap();
        assert_eq!(outcome_of(durable, id).await.status(), Status::Ambiguous);
        answer.add_permits(10);
        in_time(durable.resolve(id, resolution)).await.unwrap();
        delivered(durable, id).await;
    }
    let all = DeadLetterFilter::default();
    assert_eq!(in_time(durable.purge_dead_letters(&all)).await.unwrap(), 1);

    let later = post(&url, "x").with(Options::default().delay(LONG));
    let id = in_time(durable.fire(later)).await.unwrap();
    assert!(in_time(durable.cancel(id)).await.unwrap());
    assert_eq!(outcome_of(durable, id).await.status(), Status::Cancelled);

    // A handler writes in its transaction.
    let note = outcome_fn(async |tx: &mut PgConnection, outcome: &Outcome| {
        sqlx::query("INSERT INTO public.done (request) VALUES ($1)")
            .bind(Uuid::from(outcome.id()))
            .execute(tx)
            .await?;
        Ok::<_, sqlx::Error>(())
    });
    let handler = durable.on_outcome("handled", note).await.unwrap();
    let request = post(&url, "x").with(Options::default().channel("handled"));
    let handled: Uuid = durable.fire(request).await.unwrap().into();
    let waiting = "SELECT count(*) FROM public.done WHERE request = $1";
    eventually("the outcome is handled", || async {
        let found: i64 = sqlx::query_scalar(waiting)
            .bind(handled)
            .fetch_one(application)
            .await
            .unwrap();
        found == 1
    })
    .await;
    drop(handler);
}

/// A database with what the flows of [`works`] need.
pub async fn with_table() -> TestDatabase {
    let _ = env_logger::builder().is_test(true).try_init();
    let database = Postgres::shared().await.unwrap().database().await.unwrap();
    database
        .pool()
        .execute("CREATE TABLE done (request uuid PRIMARY KEY)")
        .await
        .unwrap();
    database
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn settings_of_a_role_or_a_database_have_no_effect() {
    let database = with_table().await;
    let (role, set) = odd_role(&database).await;
    assert!(set > 65, "{set}");
    let pool = application_pool(&role);
    for _ in 0..2 {
        in_time(requeuest::migrate(&pool)).await.unwrap();
    }
    let elsewhere = "SELECT count(*) FROM pg_class c LEFT JOIN pg_am a ON a.oid = c.relam
        WHERE c.relnamespace = 'requeuest'::regnamespace AND a.amname = 'odd'";
    assert_eq!(count(&database, elsewhere).await, 0);

    let durable = Durable::builder(pool.clone())
        .channel("handled")
        .deliver_all()
        .retention(RETENTION)
        .retry(quick())
        .build()
        .unwrap();
    add_outcomes(&database, 4, 7000, 100, 60).await;
    works(&durable, &pool).await;
    // Triggers make dead letters expire and move ordering keys on.
    let inert = "SELECT count(*) FROM pg_trigger t JOIN pg_class c ON c.oid = t.tgrelid
        WHERE c.relnamespace = 'requeuest'::regnamespace AND t.tgenabled <> 'A'";
    assert_eq!(count(&database, inert).await, 0);

    eventually_rows(
        &database,
        "outcomes WHERE expires_at < now() - interval '10 s'",
        0,
    )
    .await;
    let parts = durable.sweep_parts();
    assert!(parts.iter().all(|part| part.failures == 0), "{parts:?}");
    in_time(durable.shutdown(LONG)).await.unwrap();
    pool.close().await;
    role.dropped().await;
}

#[tokio::test]
async fn destinations_are_lower_cased_alike_in_every_locale() {
    let database = migrated().await;
    let turkish: Option<String> = sqlx::query_scalar(
        "SELECT quote_ident(collname) FROM pg_collation
         WHERE collname ~ '^tr' AND collencoding IN (-1, 6) ORDER BY 1 LIMIT 1",
    )
    .fetch_optional(database.pool())
    .await
    .unwrap();
    // A server without any Turkish locale can't have such a database.
    let collation = turkish.unwrap_or_else(|| "\"C\"".to_owned());
    let statement = format!(
        r#"SELECT requeuest.request_destination(
            '{{"method":"GET","url":"HTTP://INFO.example/"}}' COLLATE {collation}
        )"#
    );
    let destination: String = sqlx::query_scalar(&statement)
        .fetch_one(database.pool())
        .await
        .unwrap();
    assert_eq!(destination, "http://info.example:80");
}

/// Makes sessions of before the current time fail to write, as those of a standby do.
pub const DEMOTE: &str = "
    CREATE TABLE public.demoted AS SELECT clock_timestamp() AS at;
    CREATE FUNCTION public.refuse() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        IF (SELECT backend_start FROM pg_stat_activity WHERE pid = pg_backend_pid())
            < (SELECT at FROM public.demoted)
        THEN
            RAISE EXCEPTION 'cannot write in a read-only transaction' USING ERRCODE = '25006';
        END IF;
        RETURN NULL;
    END $$;
    CREATE TRIGGER refuse BEFORE INSERT OR UPDATE OR DELETE ON requeuest.mq_msgs
        FOR EACH STATEMENT EXECUTE FUNCTION public.refuse()";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sessions_that_cannot_write_any_more_are_replaced_at_once() {
    let database = migrated().await;
    let server = Server::always(200).await;
    for runner in [false, true] {
        let durable = builder(&database).runner(runner).build().unwrap();
        // With keys, so that each insert takes a connection of its own.
        let calls = |number: usize| {
            let calls = (0..number).map(|_| {
                let key = Options::default().key(Uuid::now_v7().to_string());
                durable.fire(post(server.url("/"), "x").with(key))
            });
            in_time(join_all(calls))
        };
        for result in calls(50).await {
            result.unwrap();
        }
        database.pool().execute(DEMOTE).await.unwrap();
        // One call finds it out for all of them.
        let _ = calls(1).await;
        let mut ids = Vec::new();
        for result in calls(50).await {
            ids.push(result.unwrap());
        }
        if runner {
            for id in ids {
                delivered(&durable, id).await;
            }
        }
        durable.shutdown(LONG).await.unwrap();
        let undo = "DROP TABLE public.demoted; DROP FUNCTION public.refuse CASCADE";
        database.pool().execute(undo).await.unwrap();
    }
}

/// Ends all sessions of a role.
pub async fn terminate(database: &TestDatabase, role: &Role<'_>) {
    let terminate = format!(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{}'",
        role.name
    );
    database.pool().execute(&*terminate).await.unwrap();
}

const RIGHTS: &str = "GRANT USAGE ON SCHEMA requeuest TO ROLE;
    GRANT SELECT, INSERT, UPDATE, DELETE, TRUNCATE ON ALL TABLES IN SCHEMA requeuest TO ROLE;
    GRANT USAGE ON ALL SEQUENCES IN SCHEMA requeuest TO ROLE;
    GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA requeuest TO ROLE";

#[tokio::test]
async fn new_connections_follow_the_credentials_of_the_callers_pool() {
    let database = migrated().await;
    let server = Server::always(200).await;
    for runner in [false, true] {
        let old = Role::named(&database, "old").await;
        let new = Role::named(&database, "new").await;
        old.granted(RIGHTS).await;
        new.granted(RIGHTS).await;
        let pool = old.pool();
        let durable = Durable::builder(pool.clone())
            .runner(runner)
            .build()
            .unwrap();
        let request = || post(server.url("/"), "x");
        in_time(durable.fire(request())).await.unwrap();

        // The old credentials are of no use any more, as after a rotated password.
        let nologin = format!("ALTER ROLE {} NOLOGIN", old.name);
        database.pool().execute(&*nologin).await.unwrap();
        pool.set_connect_options(new.options());
        terminate(&database, &old).await;
        let mut failed = 0;
        for _ in 0..35 {
            match in_time(durable.fire(request())).await {
                Ok(id) if runner => delivered(&durable, id).await,
                Ok(_) => {}
                Err(_) => failed += 1,
            }
        }
        // Those on a connection that was open, at most.
        assert!(failed <= 3, "{failed} calls failed");
        if runner {
            // The request comes through a poll.
            let id = durable.fire_in(database.pool(), request()).await.unwrap();
            delivered(&durable, id).await;
        }
        in_time(durable.shutdown(LONG)).await.unwrap();
        pool.close().await;
        old.dropped().await;
        new.dropped().await;
    }
}

#[tokio::test]
async fn a_role_is_set_by_an_option_and_not_by_after_connect() {
    let database = migrated().await;
    let app = Role::named(&database, "app").await;
    app.granted(RIGHTS).await;
    let login = Role::named(&database, "login").await;
    let member = format!(
        "ALTER ROLE {login} NOINHERIT; GRANT {app} TO {login}",
        login = login.name,
        app = app.name
    );
    database.pool().execute(&*member).await.unwrap();
    let set = format!("SET ROLE {}", app.name);
    let pool = PgPoolOptions::new()
        .after_connect(move |connection, _| {
            let set = set.clone();
            Box::pin(async move { connection.execute(&*set).await.map(drop) })
        })
        .connect_lazy_with(login.options());
    let server = Server::always(200).await;
    let request = || post(server.url("/"), "x");

    let without = Durable::builder(pool.clone()).build().unwrap();
    let refused = in_time(without.fire(request())).await.unwrap_err();
    assert!(refused.to_string().contains("grant it USAGE"), "{refused}");
    without.shutdown(LONG).await.unwrap();

    let role = login.options().options([("role", &app.name)]);
    let with = Durable::builder(pool.clone());
    let with = with.connect_options(role.clone()).build().unwrap();
    let mut transaction = pool.begin().await.unwrap();
    let id = with.fire_in(&mut *transaction, request()).await.unwrap();
    transaction.commit().await.unwrap();
    delivered(&with, id).await;
    let response = in_time(with.await_response(request())).await.unwrap();
    assert_eq!(response.status(), 200);
    let migrator = Migrator::new().connect_options(role);
    migrator.run(&pool).await.unwrap();

    // New connections take other options, as after a change of the password.
    with.set_connect_options(app.options());
    let nologin = format!("ALTER ROLE {} NOLOGIN", login.name);
    database.pool().execute(&*nologin).await.unwrap();
    terminate(&database, &login).await;
    eventually("a call works again", || async {
        with.fire(request()).await.is_ok()
    })
    .await;
    with.shutdown(LONG).await.unwrap();
    pool.close().await;
    login.dropped().await;
    app.dropped().await;
}

#[tokio::test]
async fn a_right_that_is_taken_away_is_named_and_not_the_migration() {
    let database = migrated().await;
    let role = Role::create(&database).await;
    role.granted(RIGHTS).await;
    let server = Server::always(200).await;
    let durable = Durable::builder(role.pool()).runner(false).build().unwrap();
    let request = || post(server.url("/"), "x");
    in_time(durable.fire(request())).await.unwrap();

    let usage = "REVOKE USAGE ON SCHEMA requeuest FROM ROLE";
    role.granted(usage).await;
    // Sessions may have the plans of their statements still.
    terminate(&database, &role).await;
    for options in [Options::default(), Options::default().ordered("key")] {
        eventually("the right is named", || async {
            let refused = durable.fire(request().with(options.clone())).await;
            let text = refused.unwrap_err().to_string();
            assert!(!text.contains("migrate"), "{text}");
            text.contains("grant it USAGE")
        })
        .await;
    }
    let refused = in_time(durable.fire_in(&role.pool(), request())).await;
    let text = format!("{:?}", refused.unwrap_err());
    assert!(text.contains("permission denied for schema"), "{text}");
    let refused = requeuest::migrate(&role.pool()).await.unwrap_err();
    assert!(refused.to_string().contains("grant it USAGE"), "{refused}");

    role.granted("GRANT USAGE ON SCHEMA requeuest TO ROLE")
        .await;
    // Without the first of these rights, a handle calls the function.
    role.granted(
        "REVOKE INSERT ON requeuest.mq_msgs FROM ROLE;
         REVOKE EXECUTE ON FUNCTION requeuest.enqueue FROM ROLE",
    )
    .await;
    let refused = in_time(durable.fire(request())).await.unwrap_err();
    let text = format!("{refused:?}");
    assert!(text.contains("permission denied for"), "{text}");
    assert!(refused.is_forbidden(), "{text}");
    in_time(durable.shutdown(LONG)).await.unwrap();
    role.dropped().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_publication_of_all_tables_refuses_nothing() {
    let database = with_table().await;
    requeuest::migrate(database.pool()).await.unwrap();
    let publish = "CREATE PUBLICATION everything FOR ALL TABLES";
    database.pool().execute(publish).await.unwrap();
    let durable = builder(&database)
        .channel("handled")
        .deliver_all()
        .retention(RETENTION)
        .retry(quick())
        .build()
        .unwrap();
    add_outcomes(&database, 4, 100, 100, 60).await;
    works(&durable, database.pool()).await;
    eventually_rows(
        &database,
        "outcomes WHERE expires_at < now() - interval '10 s'",
        0,
    )
    .await;
    let without = "SELECT count(*) FROM pg_class c
        WHERE c.relnamespace = 'requeuest'::regnamespace AND c.relkind IN ('r', 'p')
            AND c.relreplident <> 'f'
            AND NOT EXISTS (SELECT FROM pg_index i WHERE i.indrelid = c.oid AND i.indisprimary)";
    assert_eq!(count(&database, without).await, 0);
}

#[tokio::test]
async fn the_order_survives_a_sequence_that_went_back() {
    let database = migrated().await;
    let (server, gate) = Server::held(200).await;
    let durable = builder(&database).build().unwrap();
    let ordered = |number: usize| {
        let options = Options::default().ordered(format!("key {}", number % 2));
        post(server.url(&format!("/{}", number % 2)), number.to_string()).with(options)
    };
    let mut ids = Vec::new();
    for number in 0..10 {
        ids.push(in_time(durable.fire(ordered(number))).await.unwrap());
    }
    // A subscriber of a logical replication has the rows, and its own sequence.
    let back = "ALTER SEQUENCE requeuest.mq_seq RESTART";
    database.pool().execute(back).await.unwrap();
    for number in 10..20 {
        let fired = durable.fire_in(database.pool(), ordered(number)).await;
        ids.push(fired.unwrap());
    }
    database.pool().execute(back).await.unwrap();
    let many = (20..30).map(&ordered);
    ids.extend(in_time(durable.fire_many(many)).await.unwrap());
    for number in 30..40 {
        ids.push(in_time(durable.fire(ordered(number))).await.unwrap());
    }
    gate.add_permits(100);
    for id in ids {
        delivered(&durable, id).await;
    }
    for part in [0, 1] {
        let path = format!("/{part}");
        let seen = server.seen();
        let of_key = seen.iter().filter(|seen| seen.uri.path() == path);
        let numbers: Vec<_> = of_key.map(|seen| seen.body.clone()).collect();
        let expected: Vec<_> = (part..40).step_by(2).map(|n| n.to_string()).collect();
        assert_eq!(numbers, expected);
    }
}

#[tokio::test]
async fn a_replay_after_a_sequence_that_went_back_comes_last() {
    let database = migrated().await;
    let durable = builder(&database).build().unwrap();
    let nowhere = format!("http://{}/", closed_port().await);
    let ordered = || Options::default().ordered("key");
    let hopeless = post(nowhere, "x").with(ordered().retry(RetryPolicy::none()));
    let id = in_time(durable.fire(hopeless)).await.unwrap();
    assert_eq!(outcome_of(&durable, id).await.status(), Status::Discarded);
    let (server, _gate) = Server::held(200).await;
    for _ in 0..3 {
        let request = post(server.url("/"), "x").with(ordered());
        in_time(durable.fire(request)).await.unwrap();
    }
    let back = "ALTER SEQUENCE requeuest.mq_seq RESTART";
    database.pool().execute(back).await.unwrap();
    let again: Uuid = in_time(durable.replay(id)).await.unwrap().into();
    let last = "SELECT count(*) FROM requeuest.mq_msgs m
        WHERE m.seq > (SELECT max(o.seq) FROM requeuest.mq_msgs o WHERE o.id <> m.id)
            AND m.id = '";
    assert_eq!(count(&database, &format!("{last}{again}'")).await, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_phase_commits_work_without_notifications() {
    let _ = env_logger::builder().is_test(true).try_init();
    let postgres = Postgres::builder().config("max_prepared_transactions", "10");
    let postgres = postgres.start().await.unwrap();
    let database = postgres.database().await.unwrap();
    requeuest::migrate(database.pool()).await.unwrap();
    let server = Server::echo().await;
    let durable = builder(&database)
        .notify_in_transactions(false)
        .build()
        .unwrap();
    let kinds = [
        Options::default(),
        Options::default().ordered("order"),
        Options::default().key("key"),
        Options::default().supersede("latest"),
        Options::default().supersede("latest").ordered("latest"),
        Options::default().delay(Duration::from_millis(1)),
    ];
    for (number, options) in kinds.into_iter().enumerate() {
        // There is one to supersede.
        let long = Duration::from_secs(3600);
        let key = format!("replaced {number}");
        let replaced = options.clone().delay(long).key(key);
        let replaced = post(server.url("/replaced"), "x").with(replaced);
        let replaced = durable.fire_in(database.pool(), replaced).await.unwrap();
        let request = || post(server.url("/"), number.to_string()).with(options.clone());
        let mut transactions = Vec::new();
        for name in ["committed", "rolled back"] {
            let mut connection = database.pool().acquire().await.unwrap();
            connection.execute("BEGIN").await.unwrap();
            let id = durable.fire_in(&mut *connection, request()).await.unwrap();
            let many = durable.fire_many_in(&mut connection, [request(), request()]);
            let mut ids = many.await.unwrap();
            ids.push(id);
            let prepare = format!("PREPARE TRANSACTION '{name}'");
            connection.execute(&*prepare).await.unwrap();
            let end = match name {
                "committed" => "COMMIT PREPARED 'committed'",
                _ => "ROLLBACK PREPARED 'rolled back'",
            };
            connection.execute(end).await.unwrap();
            transactions.push(ids);
        }
        let cancelled = durable.cancel(replaced).await.unwrap();
        assert_eq!(cancelled, !format!("{options:?}").contains("latest"));
        // Of those that a newer one of the transaction superseded, none was sent.
        for id in &transactions[0] {
            let outcome = outcome_of(&durable, *id).await;
            assert!(outcome.status().is_terminal());
        }
        let last = outcome_of(&durable, transactions[0][1]).await;
        assert_eq!(last.status(), Status::Completed);
        for id in &transactions[1] {
            let known = durable.status(*id).await.unwrap();
            assert!(known.is_none() || transactions[0].contains(id), "{known:?}");
        }
    }
    assert_eq!(rows(&database, "mq_msgs").await, 0);
    assert!(server.seen().iter().all(|seen| seen.uri.path() == "/"));
}
