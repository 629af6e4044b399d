//! The views for reports: what they show, to whom, and what they read.

use std::time::Duration;

use requeuest::encryption::{Key, Keyring};
use requeuest::migrate::DatabaseRole;
use requeuest::retry::RetryPolicy;
use requeuest::testkit::TestDatabase;
use requeuest::{Durable, Options, Request, RequestId, Uuid};
use sqlx::postgres::PgPoolOptions;
use sqlx::types::JsonValue;
use sqlx::{Connection, Executor, PgConnection, PgExecutor};

use super::of_postgres;
use crate::support::{
    LONG, Role, Server, add_outcomes, builder, count, eventually, in_time, migrated, outcome_of,
    post, quick, reply,
};

/// What must not be seen in any view.
const SECRET: &str = "k4n4ri3";

fn secretive(server: &Server, path: &str, options: Options) -> Request {
    let url = server.url(&format!("/{path}/{SECRET}?token={SECRET}"));
    let request = http::Request::post(url)
        .header("authorization", SECRET)
        .header("x-plain", SECRET)
        .body(SECRET)
        .unwrap();
    let options = options.metadata(SECRET).key(format!("{SECRET} {path}"));
    Request::try_from(request).unwrap().with(options)
}

/// The rows of a view for a request, as JSON.
async fn shown<'e>(executor: impl PgExecutor<'e>, view: &str, id: RequestId) -> Vec<JsonValue> {
    sqlx::query_scalar(&format!(
        "SELECT to_jsonb(v) FROM requeuest.{view} v WHERE v.id = $1"
    ))
    .bind(Uuid::from(id))
    .fetch_all(executor)
    .await
    .unwrap()
}

async fn only(executor: impl PgExecutor<'_>, id: RequestId) -> JsonValue {
    let mut rows = shown(executor, "requests", id).await;
    assert_eq!(rows.len(), 1, "{rows:?}");
    rows.remove(0)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reporting_role_sees_each_request_once_and_nothing_of_its_content() {
    let database = migrated().await;
    let role = Role::create(&database).await;
    role.plays(DatabaseRole::Report).await;
    let server = Server::start(|_, seen| async move {
        reply(
            if seen.uri.path().starts_with("/bad") {
                503
            } else {
                200
            },
            SECRET,
        )
    })
    .await;
    let durable = builder(&database).retry(quick()).build().unwrap();
    let fire = async |path: &str, options: Options| {
        in_time(durable.fire(secretive(&server, path, options)))
            .await
            .unwrap()
    };
    let once = RetryPolicy::constant(Duration::from_millis(10)).max_attempts(2);
    let halting = Options::default().ordered("tenant 7").halt_on_discard();
    let halted = fire("bad", halting.retry(once)).await;
    let done = fire("good", Options::default().channel("default")).await;
    for id in [halted, done] {
        outcome_of(&durable, id).await;
    }
    let behind = fire("good2", Options::default().ordered("tenant 7")).await;
    let hour = Duration::from_secs(3600);
    let later = Options::default().delay(hour).deadline(2 * hour);
    let later = fire("good3", later.limit_key("account 9")).await;

    let mut connection = PgConnection::connect_with(&role.options()).await.unwrap();
    let row = only(&mut connection, halted).await;
    let address = format!("http://{}", server.addr);
    assert_eq!(row["status"], "discarded");
    assert_eq!(row["state"], "ended");
    assert_eq!(row["ordering_key"], "tenant 7");
    assert_eq!(row["destination"], address);
    assert_eq!(row["attempts"], 2);
    assert_eq!(row["http_status"], 503);
    assert!(
        row["finished_at"].is_string() && row["due_at"].is_null(),
        "{row}"
    );
    let attempts = shown(&mut connection, "attempts_view", halted).await;
    assert_eq!(attempts.len(), 1, "the last one is the outcome");
    assert_eq!(attempts[0]["number"], 1);
    assert_eq!(attempts[0]["http_status"], 503);
    assert!(attempts[0]["duration"].is_string(), "{attempts:?}");
    let row = only(&mut connection, done).await;
    assert_eq!(row["status"], "completed");
    assert_eq!(row["channel"], "default");
    assert_eq!(row["destination"], address);
    let row = only(&mut connection, behind).await;
    assert_eq!(row["status"], "available");
    assert_eq!(row["ordering_key"], "tenant 7");
    let row = only(&mut connection, later).await;
    assert_eq!(
        (&row["status"], &row["state"]),
        (&"scheduled".into(), &"waiting".into())
    );
    assert_eq!(row["destination"], "account 9");
    assert!(
        row["due_at"].is_string() && row["deadline"].is_string(),
        "{row}"
    );

    // No view has anything of what is sent.
    let mut seen = String::new();
    for view in ["requests", "attempts_view"] {
        let rows: Vec<String> =
            sqlx::query_scalar(&format!("SELECT v::text FROM requeuest.{view} v"))
                .fetch_all(&mut connection)
                .await
                .unwrap();
        seen.push_str(&rows.join("\n"));
    }
    assert!(seen.contains(&halted.to_string()));
    assert!(!seen.contains(SECRET), "{seen}");
    // Nor has the role any other right.
    let rights = "SELECT count(*) FROM pg_class c
        WHERE c.relnamespace = 'requeuest'::regnamespace AND c.relkind <> 'i'
            AND c.relname NOT IN ('requests', 'attempts_view')
            AND has_table_privilege(c.oid, 'SELECT, INSERT, UPDATE, DELETE, TRUNCATE')";
    let rights: i64 = sqlx::query_scalar(rights)
        .fetch_one(&mut connection)
        .await
        .unwrap();
    assert_eq!(rights, 0);
    for refused in [
        "SELECT FROM requeuest.outcomes".to_owned(),
        "DELETE FROM requeuest.attempts_view".to_owned(),
        format!("SELECT requeuest.status('{done}')"),
        format!("SELECT requeuest.response('{done}')"),
    ] {
        let error = connection.execute(&*refused).await.unwrap_err();
        assert_eq!(of_postgres(&error).code(), "42501", "{refused}");
    }
    connection.close().await.unwrap();
    in_time(durable.shutdown(LONG)).await.unwrap();
    role.dropped().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_views_leave_encrypted_texts_out() {
    let database = migrated().await;
    let server = Server::always(503).await;
    let keys = Keyring::new(Key::new("one", (0..32).collect::<Vec<u8>>()).unwrap());
    let once = RetryPolicy::constant(Duration::from_millis(10)).max_attempts(2);
    let durable = Durable::builder(database.pool().clone())
        .encryption(keys)
        .retry(once)
        .build()
        .unwrap();
    let id = in_time(durable.fire(post(server.url("/"), "x")))
        .await
        .unwrap();
    // Cut off, so that the outcome has a text of an error.
    let refused = format!("http://{}/", crate::support::closed_port().await);
    let failed = in_time(durable.fire(post(refused, "x"))).await.unwrap();
    for id in [id, failed] {
        outcome_of(&durable, id).await;
        let attempts = shown(database.pool(), "attempts_view", id).await;
        assert_eq!(attempts.len(), 1, "the last one is the outcome");
        for attempt in attempts {
            assert!(attempt["error"].is_null(), "{attempt}");
            assert!(attempt["error_class"].is_string(), "{attempt}");
        }
    }
    let row = only(database.pool(), failed).await;
    assert!(row["error"].is_null(), "{row}");
    assert!(row["error_class"].is_string(), "{row}");
    in_time(durable.shutdown(LONG)).await.unwrap();
}

#[tokio::test]
async fn a_condition_of_the_reader_gets_what_the_view_shows() {
    let database = migrated().await;
    let role = Role::create(&database).await;
    role.plays(DatabaseRole::Report).await;
    let sealed = format!(
        "INSERT INTO requeuest.outcomes (
            slot, id, channel_name, channel_args, status, attempts, created_at, finished_at,
            error_class, error, head, metadata
         ) VALUES (
            -1, gen_random_uuid(), 'c', '0000|d|http://a:80', 'discarded', 1, now(), now(),
            'connection', 'sealed:{SECRET}', '{SECRET}', '\"{SECRET}\"'
         )"
    );
    database.pool().execute(&*sealed).await.unwrap();
    let mut connection = PgConnection::connect_with(&role.options()).await.unwrap();
    // A function that costs nothing is called first of all.
    connection
        .execute(
            "CREATE FUNCTION pg_temp.tells(text) RETURNS boolean LANGUAGE plpgsql COST 0.0000001
             AS 'BEGIN RAISE EXCEPTION ''told: %'', $1; END'",
        )
        .await
        .unwrap();
    let spied = "SELECT FROM requeuest.requests r WHERE pg_temp.tells(r::text)";
    let error = connection.execute(spied).await.unwrap_err().to_string();
    assert!(error.contains("told: ("), "{error}");
    assert!(
        error.contains("discarded") && !error.contains(SECRET),
        "{error}"
    );
    connection.close().await.unwrap();
    role.dropped().await;
}

/// How many rows and index entries of the schema a role has read in a session that has ended.
async fn read(database: &TestDatabase) -> i64 {
    let read = "SELECT (
            SELECT sum(idx_tup_read) FROM pg_stat_user_indexes WHERE schemaname = 'requeuest'
        )::bigint + (
            SELECT sum(seq_tup_read) FROM pg_stat_user_tables WHERE schemaname = 'requeuest'
        )::bigint";
    count(database, read).await
}

#[tokio::test]
async fn a_look_up_through_the_views_reads_one_request_of_many() {
    const MANY: i32 = 20_000;
    const ROUNDS: i64 = 8;
    const SESSION: &str = "reports";
    let database = migrated().await;
    let role = Role::create(&database).await;
    role.plays(DatabaseRole::ReadOnly).await;
    let pool = database.pool();
    let durable = Durable::builder(pool.clone()).runner(false);
    let durable = durable.build().unwrap();
    let waiting = durable.fire(post("http://a.example/", "x")).await.unwrap();
    for slot in [-1, 3] {
        add_outcomes(&database, slot, MANY, 60, 3600).await;
    }
    let many = format!(
        "INSERT INTO requeuest.mq_msgs (id, channel_name, channel_args, attempt_at)
         SELECT gen_random_uuid(), channel_name, channel_args, attempt_at
         FROM requeuest.mq_msgs, generate_series(1, {MANY})"
    );
    pool.execute(&*many).await.unwrap();
    let ended = "SELECT id FROM requeuest.outcomes WHERE slot = -1 LIMIT 1";
    let ended: Uuid = sqlx::query_scalar(ended).fetch_one(pool).await.unwrap();
    let failures = format!(
        "INSERT INTO requeuest.attempts (id, number, duration_ms, error_class, error)
         SELECT CASE i WHEN 1 THEN '{ended}' ELSE gen_random_uuid() END, 1, 5, 'timeout', 'late'
         FROM generate_series(1, {MANY}) i"
    );
    pool.execute(&*failures).await.unwrap();
    pool.execute("ANALYZE requeuest.mq_msgs, requeuest.outcomes, requeuest.attempts")
        .await
        .unwrap();
    let before = read(&database).await;

    let options = role.options().application_name(SESSION);
    let reports = PgPoolOptions::new()
        .max_connections(1)
        .connect_lazy_with(options);
    let nil = Uuid::nil();
    let look_ups = [
        "SELECT count(*) FROM requeuest.requests WHERE id = $1 AND id <> $2",
        "SELECT count(*) FROM requeuest.requests r LEFT JOIN requeuest.attempts_view a USING (id)
         WHERE r.id IN ($1, $2) AND r.channel LIKE '%'",
        "SELECT count(requeuest.status($1)) WHERE $2::uuid IS NOT NULL",
    ];
    for id in [Uuid::from(waiting), ended] {
        for look_up in look_ups {
            // Often enough that its plan is kept.
            for _ in 0..ROUNDS {
                let look_up = sqlx::query_scalar(look_up).bind(id).bind(nil);
                let found: i64 = look_up.fetch_one(&reports).await.unwrap();
                assert_eq!(found, 1);
            }
        }
    }
    reports.close().await;
    let sessions =
        format!("SELECT count(*) FROM pg_stat_activity WHERE application_name = '{SESSION}'");
    eventually("the end of the session", || async {
        count(&database, &sessions).await == 0
    })
    .await;
    let read = read(&database).await - before;
    let look_ups = 6 * ROUNDS;
    println!("{read} rows and index entries were read by {look_ups} look-ups");
    assert!(
        read < 10 * look_ups,
        "{read} rows and index entries were read"
    );
    drop(durable);
    role.dropped().await;
}
