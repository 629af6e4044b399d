//! What a caller learns of a refusal by the database: the SQLSTATE, and no row.

use std::error::Error as _;

use futures_util::future::join_all;
use requeuest::client::{Channels, Client};
use requeuest::{Error, Options, Request};
use serde_json::json;
use sqlx::Executor;
use sqlx::postgres::PgDatabaseError;
use tower::ServiceExt;

use super::{into_error, layered, middleware};
use crate::support::{Server, builder, in_time, migrated, outcome_of, post, quick};

/// What rows contain and no text may show.
const CANARY: &str = "hunter2";

fn request() -> Request {
    post(format!("http://a/{CANARY}"), "x").with(Options::default().metadata(json!(CANARY)))
}

/// The error has this SQLSTATE, constraint and table, and no text of it shows the canary.
fn assert_refusal(door: &str, error: Error, code: &str, constraint: &str) {
    assert!(error.is_database(), "{door}: {error:?}");
    let source = error.source().unwrap().downcast_ref::<sqlx::Error>();
    let Some(own @ sqlx::Error::Database(refusal)) = source else {
        panic!("{door}: {source:?}");
    };
    assert_eq!(refusal.code().as_deref(), Some(code), "{door}");
    assert_eq!(refusal.constraint(), Some(constraint), "{door}");
    assert_eq!(refusal.table(), Some("mq_payloads"), "{door}");
    assert_eq!(refusal.is_check_violation(), code == "23514", "{door}");
    // A caller that asks for the DETAIL gets it.
    let driver: &PgDatabaseError = refusal.downcast_ref();
    assert!(driver.detail().unwrap().contains(CANARY), "{door}");
    let mut shown = vec![
        format!("{error} {error:?} {error:#?}"),
        format!("{own} {own:?} {refusal} {refusal:?}"),
    ];
    let mut cause = error.source();
    while let Some(source) = cause {
        shown.push(format!("{source} {source:?}"));
        cause = source.source();
    }
    let error = anyhow::Error::new(error);
    shown.push(format!("{error:#} {error:?}"));
    let shown = shown.join("\n");
    assert!(!shown.contains(CANARY), "{door}: {shown}");
    assert!(shown.contains(code), "{door}: {shown}");
}

#[tokio::test]
async fn errors_keep_their_sqlstate_and_show_no_row_through_every_door() {
    let database = migrated().await;
    let server = Server::always(503).await;
    let durable = builder(&database).retry(quick().max_attempts(1));
    let durable = durable.build().unwrap();
    let dead = post(server.url(&format!("/{CANARY}")), "x");
    let dead = durable.fire(dead).await.unwrap();
    outcome_of(&durable, dead).await;
    let pool = database.pool();
    pool.execute(
        "ALTER TABLE requeuest.mq_payloads ADD CONSTRAINT none CHECK (head IS NULL) NOT VALID",
    )
    .await
    .unwrap();
    let ordered = || request().with(Options::default().ordered("k"));
    let keyed = || request().with(Options::default().key("k"));
    let http = || {
        let url = format!("http://a/{CANARY}");
        http::Request::post(url).body("x".to_owned()).unwrap()
    };
    let mut connection = pool.acquire().await.unwrap();
    let client = Client::new(pool.clone(), Channels::List(&["c"])).await;
    let of_middleware = in_time(middleware(&durable).post(http().uri().to_string()).send());
    let errors = [
        ("fire", durable.fire(request()).await.unwrap_err()),
        ("ordered", durable.fire(ordered()).await.unwrap_err()),
        ("keyed", durable.fire(keyed()).await.unwrap_err()),
        ("fire_in", durable.fire_in(pool, keyed()).await.unwrap_err()),
        (
            "fire_many",
            durable.fire_many([request(), request()]).await.unwrap_err(),
        ),
        (
            "fire_many_in",
            durable
                .fire_many_in(&mut connection, [request(), keyed()])
                .await
                .unwrap_err(),
        ),
        (
            "await_response",
            in_time(durable.await_response(request()))
                .await
                .unwrap_err(),
        ),
        (
            "layer",
            in_time(layered(&durable).oneshot(http()))
                .await
                .unwrap_err(),
        ),
        ("middleware", into_error(of_middleware.await.unwrap_err())),
        (
            "client",
            client.unwrap().spawn("c", &request()).await.unwrap_err(),
        ),
        ("replay", durable.replay(dead).await.unwrap_err()),
    ];
    for (door, error) in errors {
        assert_refusal(door, error, "23514", "none");
    }
    // Handed in at once, so they are one batch.
    let fired = join_all((0..20).map(|_| durable.fire(request())));
    for error in in_time(fired).await {
        assert_refusal("batch", error.unwrap_err(), "23514", "none");
    }
}

#[tokio::test]
async fn callers_of_a_batch_that_fails_as_a_whole_all_get_its_sqlstate() {
    let database = migrated().await;
    database
        .pool()
        .execute(&*format!(
            "CREATE FUNCTION full_disk() RETURNS trigger LANGUAGE plpgsql AS $$
             BEGIN
                RAISE EXCEPTION 'no room' USING
                    ERRCODE = '53100', DETAIL = '{CANARY}', TABLE = TG_TABLE_NAME,
                    CONSTRAINT = 'room';
             END;
             $$;
             CREATE TRIGGER full_disk BEFORE INSERT ON requeuest.mq_payloads
             EXECUTE FUNCTION full_disk()"
        ))
        .await
        .unwrap();
    let durable = builder(&database).runner(false).build().unwrap();
    let fired = join_all((0..20).map(|_| durable.fire(request())));
    for error in in_time(fired).await {
        let error = error.unwrap_err();
        assert_eq!(
            error.to_string(),
            "database error: no room (SQLSTATE 53100)"
        );
        assert_refusal("batch", error, "53100", "room");
    }
}

#[tokio::test]
async fn a_duplicate_shows_no_header() {
    let database = migrated().await;
    // Unlike a CHECK's, the DETAIL of a unique index shows values in full.
    database
        .pool()
        .execute("CREATE UNIQUE INDEX once ON requeuest.mq_payloads (head)")
        .await
        .unwrap();
    let durable = builder(&database).runner(false).build().unwrap();
    let request = || {
        let request = http::Request::get("http://a/").header("authorization", CANARY);
        request.body("").unwrap()
    };
    durable.fire(request()).await.unwrap();
    let error = durable.fire(request()).await.unwrap_err();
    assert_refusal("fire", error, "23505", "once");
    let error = durable.fire_in(database.pool(), request()).await;
    assert_refusal("fire_in", error.unwrap_err(), "23505", "once");
}

#[tokio::test]
async fn an_error_that_means_more_keeps_its_sqlstate() {
    let database = migrated().await;
    let durable = builder(&database).runner(false).build().unwrap();
    database
        .pool()
        .execute("DROP FUNCTION requeuest.enqueue")
        .await
        .unwrap();
    let error = durable.fire_in(database.pool(), request()).await;
    let error = error.unwrap_err();
    assert!(error.is_not_migrated(), "{error:?}");
    let source = error.source().unwrap().downcast_ref::<sqlx::Error>();
    let code = source.unwrap().as_database_error().unwrap().code();
    assert_eq!(code.as_deref(), Some("42883"));
}
