//! Calls on a database that is closed, stopped, or not at this version of the schema.

use std::error::Error as _;
use std::time::{Duration, Instant};

use requeuest::testkit::{Postgres, StopMode};
use requeuest::{Durable, Error, Options, RequestId, Status, Uuid};
use sqlx::postgres::PgPoolOptions;
use sqlx::{Executor, PgPool};
use tower::ServiceExt;

use super::{get, into_error, layered, middleware};
use crate::support::{
    Server, assert_nothing_persisted, builder, closed_port, count, in_time, migrated, outcome_of,
    post,
};

/// The error of every call that reaches the database through the handle.
async fn errors_of_calls(durable: &Durable) -> Vec<(&'static str, Error)> {
    let request = get("http://example.com/");
    let id = RequestId::from(Uuid::nil());
    let (fired, awaited, layer, middleware, response, status) = in_time(Box::pin(async {
        tokio::join!(
            durable.fire(request.clone()),
            durable.await_response(request.clone()),
            layered(durable).oneshot(request.clone()),
            middleware(durable).get("http://example.com/").send(),
            durable.response(id),
            durable.status(id),
        )
    }))
    .await;
    let middleware = into_error(middleware.unwrap_err());
    vec![
        ("fire", fired.unwrap_err()),
        ("await_response", awaited.unwrap_err()),
        ("layer", layer.unwrap_err()),
        ("middleware", middleware),
        ("response", response.unwrap_err()),
        ("status", status.unwrap_err()),
    ]
}

/// [`Durable::fire_in`] uses the caller's connection only.
async fn error_of_fire_in(durable: &Durable) -> Error {
    let request = get("http://example.com/");
    in_time(durable.fire_in(durable.pool(), request))
        .await
        .unwrap_err()
}

#[tokio::test]
async fn a_database_that_is_away_is_named_soon_and_without_credentials() {
    let closed = closed_port().await;
    let url = format!("postgres://hunter1:hunter2@{closed}/orders");
    let durable = Durable::new(PgPool::connect_lazy(&url).unwrap());
    let mut slowest = Duration::ZERO;
    // The first call waits for a failover to end, the others don't.
    for _ in 0..3 {
        let began = Instant::now();
        let error = in_time(durable.fire(get("http://example.com/"))).await;
        slowest = slowest.max(began.elapsed());
        let error = error.unwrap_err();
        assert!(error.is_database(), "{error:?}");
        assert_eq!(
            error.to_string(),
            format!("database error: connection refused ({closed})")
        );
        let source = error.source().unwrap().downcast_ref::<sqlx::Error>();
        assert!(matches!(source, Some(sqlx::Error::Io(_))), "{source:?}");
        assert!(!format!("{error:?}").contains("hunter"), "{error:?}");
    }
    // The pool's own timeout is five seconds.
    assert!(slowest < Duration::from_secs(5), "{slowest:?}");
    let began = Instant::now();
    for (call, error) in errors_of_calls(&durable).await {
        let refused = error.to_string().contains("connection refused");
        assert!(error.is_database() && refused, "{call}: {error}");
    }
    assert!(began.elapsed() < Duration::from_secs(1));
}

#[tokio::test]
async fn a_pool_of_the_application_that_times_out_is_named() {
    let database = migrated().await;
    let pool = PgPoolOptions::new()
        .max_connections(1)
        .acquire_timeout(Duration::from_millis(50))
        .connect_with(database.options())
        .await
        .unwrap();
    let durable = Durable::new(pool.clone());
    let _held = pool.acquire().await.unwrap();
    let error = error_of_fire_in(&durable).await;
    assert!(error.is_database(), "{error:?}");
    assert_eq!(
        error.to_string(),
        "database error: the application's pool had no connection to give within its \
         acquire_timeout"
    );
    let source = error.source().unwrap().downcast_ref::<sqlx::Error>();
    assert!(matches!(source, Some(sqlx::Error::PoolTimedOut)));
    // The crate's own pool has connections.
    in_time(durable.fire(get("http://127.0.0.1:9/")))
        .await
        .unwrap();
}

#[tokio::test]
async fn a_closed_pool_has_its_own_error() {
    let database = migrated().await;
    let durable = Durable::new(database.pool().clone());
    database.pool().close().await;
    let error = error_of_fire_in(&durable).await;
    assert!(error.is_closed(), "{error:?}");
    for (call, error) in errors_of_calls(&durable).await {
        assert!(error.is_closed(), "{call}: {error:?}");
    }
}

#[tokio::test]
async fn calls_after_a_shutdown_are_refused() {
    let database = migrated().await;
    let durable = Durable::new(database.pool().clone());
    in_time(durable.shutdown(Duration::ZERO)).await.unwrap();
    let error = error_of_fire_in(&durable).await;
    assert!(error.is_closed(), "{error:?}");
    for (call, error) in errors_of_calls(&durable).await {
        assert!(error.is_closed(), "{call}: {error:?}");
    }
    assert_nothing_persisted(&database).await;
}

#[tokio::test]
async fn the_error_for_a_missing_schema_names_the_migrations() {
    let database = Postgres::shared().await.unwrap().database().await.unwrap();
    let server = Server::always(200).await;
    let durable = Durable::new(database.pool().clone());
    let mut errors = errors_of_calls(&durable).await;
    errors.push(("fire_in", error_of_fire_in(&durable).await));
    for (call, error) in errors {
        assert!(error.is_not_migrated(), "{call}: {error:?}");
        assert!(
            error.to_string().contains("requeuest::migrate"),
            "{call}: {error}"
        );
    }
    // The same handle works once the schema is there.
    requeuest::migrate(database.pool()).await.unwrap();
    let response = in_time(durable.await_response(get(server.url("/"))))
        .await
        .unwrap();
    assert_eq!(response.status(), 200);
    let delayed = Options::default().delay(Duration::from_millis(10));
    let request = post(server.url("/"), "").with(delayed);
    let id = durable.fire(request).await.unwrap();
    outcome_of(&durable, id).await;
}

#[tokio::test]
async fn the_error_for_an_older_schema_names_the_migrations() {
    let database = migrated().await;
    let newest = "SELECT max(version) FROM requeuest._sqlx_migrations";
    let found = count(&database, newest).await;
    database
        .pool()
        .execute(&*format!(
            "DELETE FROM requeuest._sqlx_migrations WHERE version = {found}"
        ))
        .await
        .unwrap();
    let durable = Durable::new(database.pool().clone());
    for (call, error) in errors_of_calls(&durable).await {
        assert!(error.is_not_migrated(), "{call}: {error:?}");
        let shown = error.to_string();
        assert!(shown.contains("requeuest::migrate"), "{call}: {shown}");
        assert!(shown.contains(&found.to_string()), "{call}: {shown}");
    }
    assert_nothing_persisted(&database).await;
}

#[tokio::test]
async fn the_error_for_a_newer_schema_asks_for_a_newer_crate() {
    let database = migrated().await;
    let newest = "SELECT max(version) FROM requeuest._sqlx_migrations";
    let known = count(&database, newest).await;
    database
        .pool()
        .execute(
            "INSERT INTO requeuest._sqlx_migrations
             SELECT version + 1, description, installed_on, success, checksum, execution_time
             FROM requeuest._sqlx_migrations ORDER BY version DESC LIMIT 1;
             UPDATE requeuest.compatible_from
             SET version = (SELECT max(version) FROM requeuest._sqlx_migrations)",
        )
        .await
        .unwrap();
    let durable = Durable::new(database.pool().clone());
    for (call, error) in errors_of_calls(&durable).await {
        assert!(error.is_not_migrated(), "{call}: {error:?}");
        let shown = error.to_string();
        assert!(shown.contains(&(known + 1).to_string()), "{call}: {shown}");
        assert!(shown.contains("upgrade requeuest"), "{call}: {shown}");
    }
    assert_nothing_persisted(&database).await;
}

#[tokio::test]
async fn a_handle_works_once_its_database_starts() {
    let postgres = Postgres::builder().private().start().await.unwrap();
    let database = postgres.database().await.unwrap();
    requeuest::migrate(database.pool()).await.unwrap();
    let server = Server::always(200).await;
    // This request waits in the queue from before the stop.
    let earlier = builder(&database).runner(false).build().unwrap();
    let id = earlier.fire(get(server.url("/earlier"))).await.unwrap();
    drop(earlier);
    postgres.stop(StopMode::Fast).await.unwrap();

    let pool = PgPoolOptions::new()
        .acquire_timeout(Duration::from_secs(1))
        .connect_lazy_with(database.options());
    let durable = Durable::new(pool);
    let mut errors = errors_of_calls(&durable).await;
    errors.push(("fire_in", error_of_fire_in(&durable).await));
    for (call, error) in errors {
        assert!(error.is_database(), "{call}: {error:?}");
        let source = error.source();
        assert!(
            source.is_some_and(<dyn std::error::Error>::is::<sqlx::Error>),
            "{call}"
        );
        let names_cause = error.to_string().contains("connection refused");
        // This call waits for the application's own pool.
        assert!(names_cause || call == "fire_in", "{call}: {error}");
    }
    assert_eq!(server.count(), 0);

    postgres.resume().await.unwrap();
    server.wait_for(1).await;
    let outcome = outcome_of(&durable, id).await;
    assert_eq!(outcome.status(), Status::Completed);
    let response = in_time(durable.await_response(get(server.url("/later"))))
        .await
        .unwrap();
    assert_eq!(response.status(), 200);
}
