//! Requests of plain SQL: `requeuest.fire` and its companions.

mod encrypted;
mod same;
mod statement;
mod views;

use requeuest::migrate::DatabaseRole;
use requeuest::testkit::TestDatabase;
use requeuest::{Durable, RequestId, Uuid};
use sqlx::postgres::PgDatabaseError;
use sqlx::{Connection, Executor, PgConnection, PgExecutor, PgPool};

use crate::support::{
    LONG, Role, Server, assert_nothing_persisted, builder, in_time, migrated, outcome_of, rows,
};

/// The id that a statement returns.
async fn id<'e>(executor: impl PgExecutor<'e>, statement: &str) -> RequestId {
    let id: Uuid = sqlx::query_scalar(statement)
        .fetch_one(executor)
        .await
        .unwrap();
    RequestId::from(id)
}

/// The error of a statement.
async fn refused(pool: &PgPool, statement: &str) -> sqlx::Error {
    pool.fetch_all(statement).await.map(|_| ()).unwrap_err()
}

fn of_postgres(error: &sqlx::Error) -> &PgDatabaseError {
    error
        .as_database_error()
        .expect("an error of Postgres")
        .downcast_ref()
}

async fn status(database: &TestDatabase, id: RequestId) -> Option<String> {
    sqlx::query_scalar("SELECT requeuest.status($1)")
        .bind(Uuid::from(id))
        .fetch_one(database.pool())
        .await
        .unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_trigger_sends_with_its_transaction_or_not_at_all() {
    let database = migrated().await;
    let server = Server::echo().await;
    let durable = builder(&database).build().unwrap();
    let url = server.url("/orders");
    let setup = format!(
        "CREATE TABLE orders (id int PRIMARY KEY, note text);
         CREATE FUNCTION announce() RETURNS trigger LANGUAGE plpgsql AS $$
         BEGIN
             PERFORM requeuest.fire(
                 'POST', '{url}', '{{\"content-type\": \"application/json\"}}',
                 convert_to(to_jsonb(NEW)::text, 'UTF8'),
                 jsonb_build_object('key', 'order-' || NEW.id, 'ordered', 'orders')
             );
             RETURN NULL;
         END $$;
         CREATE TRIGGER announce AFTER INSERT ON orders FOR EACH ROW EXECUTE FUNCTION announce();"
    );
    database.pool().execute(&*setup).await.unwrap();

    let mut transaction = database.pool().begin().await.unwrap();
    let insert = "INSERT INTO orders VALUES (1, 'never')";
    transaction.execute(insert).await.unwrap();
    transaction.rollback().await.unwrap();
    assert_nothing_persisted(&database).await;

    let insert = "INSERT INTO orders VALUES (2, 'é'), (3, NULL)";
    database.pool().execute(insert).await.unwrap();
    server.wait_for(2).await;
    assert_eq!(
        server.bodies(),
        [r#"{"id": 2, "note": "é"}"#, r#"{"id": 3, "note": null}"#]
    );
    let seen = &server.seen()[0];
    assert_eq!(seen.headers["content-type"], "application/json");
    assert!(seen.headers.contains_key("idempotency-key"));
    in_time(durable.shutdown(LONG)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_is_followed_and_cancelled_by_its_id() {
    let database = migrated().await;
    let server = Server::echo().await;
    let durable = builder(&database).build().unwrap();
    let pool = database.pool();
    let fire = |options: &str| {
        let url = server.url("/");
        format!("SELECT requeuest.fire('PUT', '{url}', body => 'x', options => '{options}')")
    };
    let response = |id: RequestId| {
        format!(
            "SELECT status, headers::text, body FROM requeuest.response('{id}')
             WHERE headers IS NOT NULL"
        )
    };

    let sent = id(pool, &fire("{}")).await;
    outcome_of(&durable, sent).await;
    assert_eq!(status(&database, sent).await.as_deref(), Some("completed"));
    let (code, headers, body): (i32, String, Vec<u8>) = sqlx::query_as(&response(sent))
        .fetch_one(pool)
        .await
        .unwrap();
    assert_eq!((code, &*body), (200, &b"x"[..]));
    assert!(headers.contains("[\"content-length\", \"1\"]"), "{headers}");
    let cancel = |id: RequestId| format!("SELECT requeuest.cancel('{id}')");
    let cancelled: bool = sqlx::query_scalar(&cancel(sent))
        .fetch_one(pool)
        .await
        .unwrap();
    assert!(!cancelled);

    let waiting = id(pool, &fire(r#"{"delay": "1 hour"}"#)).await;
    assert_eq!(
        status(&database, waiting).await.as_deref(),
        Some("scheduled")
    );
    let row = pool.fetch_optional(&*response(waiting)).await.unwrap();
    assert!(row.is_none());
    // A call that waits for the request ends with the cancellation.
    let (outcome, cancelled) = tokio::join!(outcome_of(&durable, waiting), async {
        let cancelled: bool = sqlx::query_scalar(&cancel(waiting))
            .fetch_one(pool)
            .await
            .unwrap();
        cancelled
    });
    assert!(cancelled);
    let error = refused(pool, &response(waiting)).await;
    assert_eq!(of_postgres(&error).code(), "55000");
    assert_eq!(
        of_postgres(&error).message(),
        outcome.into_result().unwrap_err().to_string()
    );

    // An id that there isn't.
    let missing = RequestId::from(Uuid::from_u128(7));
    assert_eq!(status(&database, missing).await, None);
    for statement in [cancel(missing), response(missing)] {
        let error = refused(pool, &statement).await;
        assert_eq!(of_postgres(&error).code(), "P0002");
        let theirs = in_time(durable.cancel(missing)).await.unwrap_err();
        assert_eq!(of_postgres(&error).message(), theirs.to_string());
        assert!(of_postgres(&error).hint().is_some());
    }
    in_time(durable.shutdown(LONG)).await.unwrap();
}

#[tokio::test]
async fn a_key_makes_repeated_calls_one_in_both_languages() {
    let database = migrated().await;
    let durable = Durable::builder(database.pool().clone()).runner(false);
    let durable = durable.build().unwrap();
    let request = |body: &'static str| {
        let request = http::Request::post("http://a.example/")
            .header("x-api-key", "mine")
            .body(body)
            .unwrap();
        let options = requeuest::Options::default().key("one");
        requeuest::Request::try_from(request).unwrap().with(options)
    };
    let fire = |body: &str| {
        format!(
            "SELECT requeuest.fire('POST', 'http://a.example/', '{{\"X-Api-Key\": \"mine\"}}',
             '{body}', '{{\"key\": \"one\"}}')"
        )
    };
    let first = in_time(durable.fire(request("x"))).await.unwrap();
    assert_eq!(id(database.pool(), &fire("x")).await, first);
    let theirs = in_time(durable.fire(request("y"))).await.unwrap_err();
    let error = refused(database.pool(), &fire("y")).await;
    assert_eq!(of_postgres(&error).code(), "23505");
    assert_eq!(of_postgres(&error).message(), theirs.to_string());
    assert_eq!(of_postgres(&error).column(), Some("key"));
    assert_eq!(rows(&database, "mq_msgs").await, 1);

    let ordered = "SELECT requeuest.fire('POST', 'http://a/', options => '{\"ordered\": \"o\"}')";
    id(database.pool(), ordered).await;
    let options = requeuest::Options::default().ordered("o").channel("other");
    let theirs = in_time(durable.fire(request("x").with(options))).await;
    let elsewhere = ordered.replace("\"o\"", "\"o\", \"channel\": \"other\"");
    let error = refused(database.pool(), &elsewhere).await;
    assert_eq!(of_postgres(&error).code(), "55006");
    assert_eq!(
        of_postgres(&error).message(),
        theirs.unwrap_err().to_string()
    );
}

#[tokio::test]
async fn a_role_that_enqueues_fires_and_can_do_no_more() {
    let database = migrated().await;
    let role = Role::create(&database).await;
    role.plays(DatabaseRole::Enqueue).await;
    let mut connection = PgConnection::connect_with(&role.options()).await.unwrap();
    let fire = "SELECT requeuest.fire('POST', 'http://a/', options => '{\"ordered\": \"o\"}')";
    let id = id(&mut connection, fire).await;
    for call in ["status", "cancel", "response"] {
        let statement = format!("SELECT requeuest.{call}('{id}')");
        let error = connection.execute(&*statement).await.unwrap_err();
        assert_eq!(of_postgres(&error).code(), "42501", "{call}");
    }
    role.plays(DatabaseRole::ReadOnly).await;
    let read = format!("SELECT requeuest.status('{id}'), (SELECT requeuest.response('{id}'))");
    connection.execute(&*read).await.unwrap();
    for refused in [format!("SELECT requeuest.cancel('{id}')"), fire.to_owned()] {
        let error = connection.execute(&*refused).await.unwrap_err();
        assert_eq!(of_postgres(&error).code(), "42501", "{refused}");
    }
    role.plays(DatabaseRole::Runner).await;
    let cancelled: bool = sqlx::query_scalar(&format!("SELECT requeuest.cancel('{id}')"))
        .fetch_one(&mut connection)
        .await
        .unwrap();
    assert!(cancelled);
    connection.close().await.unwrap();
    role.dropped().await;
}

#[tokio::test]
async fn a_commit_tells_the_runners_of_what_is_due() {
    let database = migrated().await;
    let mut listener = sqlx::postgres::PgListener::connect_with(database.pool())
        .await
        .unwrap();
    listener.listen_all(["mq", "mq_billing"]).await.unwrap();
    let fire = "SELECT requeuest.fire('GET', 'http://a/', options => '{\"channel\": \"billing\"}')";
    let later = fire.replace('}', ", \"delay\": \"1 hour\"}");
    id(database.pool(), &later).await;
    id(database.pool(), fire).await;
    let end = "SELECT pg_notify('mq', 'end')";
    database.pool().execute(end).await.unwrap();
    let mut told = Vec::new();
    loop {
        let next = in_time(listener.recv()).await.unwrap();
        if next.payload() == "end" {
            break;
        }
        told.push(next.channel().to_owned());
    }
    told.sort();
    assert_eq!(told, ["mq", "mq_billing"], "once, for the one that is due");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn psql_sends_a_request_and_reads_its_response() {
    let database = migrated().await;
    let server = Server::echo().await;
    let durable = builder(&database).build().unwrap();
    let script = format!(
        "BEGIN;
         SELECT requeuest.fire('POST', '{url}', body => 'from psql');
         ROLLBACK;
         SELECT requeuest.fire('POST', '{url}', body => 'from psql') AS id \\gset
         \\echo :id",
        url = server.url("/")
    );
    let printed = psql(&database, &script).await;
    let id: RequestId = printed.trim().rsplit('\n').next().unwrap().parse().unwrap();
    outcome_of(&durable, id).await;
    let script =
        format!("SELECT status, convert_from(body, 'UTF8') FROM requeuest.response('{id}')");
    assert_eq!(psql(&database, &script).await.trim(), "200|from psql");
    assert_eq!(server.bodies(), ["from psql"]);
    in_time(durable.shutdown(LONG)).await.unwrap();
}

/// What psql prints for a script.
async fn psql(database: &TestDatabase, script: &str) -> String {
    let output = tokio::process::Command::new("psql")
        .args(["-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-f", "-"])
        .arg(database.url())
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn();
    let mut child = output.expect("psql, of Debian's postgresql-client, is in the PATH");
    let mut stdin = child.stdin.take().unwrap();
    tokio::io::AsyncWriteExt::write_all(&mut stdin, script.as_bytes())
        .await
        .unwrap();
    drop(stdin);
    let output = in_time(child.wait_with_output()).await.unwrap();
    let errors = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{errors}");
    String::from_utf8(output.stdout).unwrap()
}
