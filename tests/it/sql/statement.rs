//! `Durable::statement`: what it returns, and what its statement reports. `same` compares the rows,
//! and the programs of `tests/drivers` run it with other drivers.

use requeuest::migrate::DatabaseRole;
use requeuest::{Durable, Options, OutboxStatement, Request, RequestId, Uuid};
use sqlx::{Connection, PgConnection, PgExecutor};

use super::of_postgres;
use crate::support::{Role, in_time, migrated, post};

/// Runs a statement as another driver does, and returns the id that it returns.
pub(super) async fn run<'e>(
    executor: impl PgExecutor<'e>,
    statement: &OutboxStatement,
) -> Result<RequestId, sqlx::Error> {
    let (request, body) = statement.parameters();
    let statement = sqlx::query_scalar(statement.sql()).bind(request).bind(body);
    statement.fetch_one(executor).await.map(Uuid::into)
}

#[tokio::test]
async fn a_statement_with_an_earlier_key_returns_that_request() {
    let database = migrated().await;
    let durable = Durable::builder(database.pool().clone()).runner(false);
    let durable = durable.build().unwrap();
    let keyed = |body: &'static str| post("http://a/", body).with(Options::default().key("one"));
    let first = durable.statement(&keyed("x")).unwrap();
    let second = durable.statement(&keyed("x")).unwrap();
    assert_ne!(first.id(), second.id());
    let pool = database.pool();
    for statement in [&first, &second] {
        assert_eq!(run(pool, statement).await.unwrap(), first.id());
    }
    assert_eq!(in_time(durable.fire(keyed("x"))).await.unwrap(), first.id());

    let other = durable.statement(&keyed("y")).unwrap();
    let error = run(pool, &other).await.unwrap_err();
    let theirs = in_time(durable.fire(keyed("y"))).await.unwrap_err();
    assert_eq!(of_postgres(&error).code(), "23505");
    assert_eq!(of_postgres(&error).message(), theirs.to_string());
    assert_eq!(of_postgres(&error).column(), Some("key"));
    assert!(of_postgres(&error).hint().is_some());

    let ordered = |channel: &str| {
        post("http://a/", "x").with(Options::default().ordered("o").channel(channel))
    };
    run(pool, &durable.statement(&ordered("here")).unwrap())
        .await
        .unwrap();
    let elsewhere = durable.statement(&ordered("there")).unwrap();
    let error = run(pool, &elsewhere).await.unwrap_err();
    let theirs = in_time(durable.fire(ordered("there"))).await.unwrap_err();
    assert_eq!(of_postgres(&error).code(), "55006");
    assert_eq!(of_postgres(&error).message(), theirs.to_string());
}

#[tokio::test]
async fn a_statement_is_refused_before_it_is_run_and_shows_no_secret() {
    let database = migrated().await;
    let durable = Durable::builder(database.pool().clone())
        .runner(false)
        .max_request_body(10)
        .build()
        .unwrap();
    let long = durable.statement(&post("http://a/", "longer than ten"));
    assert!(long.unwrap_err().is_request());
    let wrong = post("http://a/", "x").with(Options::default().channel(""));
    assert_eq!(
        durable.statement(&wrong).unwrap_err().field(),
        Some("channel")
    );

    let secret = http::Request::post("http://a/secret?secret")
        .header("authorization", "secret")
        .body("secret")
        .unwrap();
    let statement = durable
        .statement(&Request::try_from(secret).unwrap())
        .unwrap();
    let shown = format!("{statement:?}");
    assert!(shown.contains(&statement.id().to_string()), "{shown}");
    assert!(!shown.contains("secret"), "{shown}");
    in_time(durable.shutdown(std::time::Duration::ZERO))
        .await
        .unwrap();
    let closed = durable.statement(&post("http://a/", "x")).unwrap_err();
    assert!(closed.is_closed(), "{closed}");
}

#[tokio::test]
async fn a_role_that_enqueues_runs_a_statement_under_any_search_path() {
    let database = migrated().await;
    let role = Role::create(&database).await;
    role.plays(DatabaseRole::Enqueue).await;
    let durable = Durable::builder(database.pool().clone()).runner(false);
    let durable = durable.build().unwrap();
    let mut connection = PgConnection::connect_with(&role.options()).await.unwrap();
    let disturb = "CREATE FUNCTION pg_temp.decode(text, text) RETURNS bytea LANGUAGE sql AS
                       'SELECT NULL::bytea';
                   CREATE DOMAIN pg_temp.text AS int;
                   SET search_path = pg_temp, pg_catalog";
    sqlx::raw_sql(disturb)
        .execute(&mut connection)
        .await
        .unwrap();
    let options = Options::default().key("k").ordered("o").supersede("s");
    let statement = durable
        .statement(&post("http://a/", "x").with(options))
        .unwrap();
    let id = run(&mut connection, &statement).await.unwrap();
    assert_eq!(statement.id(), id);
    connection.close().await.unwrap();
    assert_eq!(
        durable.status(statement.id()).await.unwrap(),
        Some(requeuest::Status::Available)
    );
    role.dropped().await;
}
