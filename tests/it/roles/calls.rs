//! What a role that enqueues could do with arguments that the crate never passes.

use requeuest::Uuid;
use requeuest::migrate::DatabaseRole;
use sqlx::error::DatabaseError;
use sqlx::{ConnectOptions, Connection, Executor, PgConnection};

use super::requests_of_others;
use crate::support::{Role, count, migrated, rows};

/// A call of `enqueue`.
fn one(id: Uuid, channel: &str, metadata: &str) -> String {
    format!(
        "SELECT FROM requeuest.enqueue('{id}', '{channel}', 'g', false, false, '0', NULL, \
         'requeuest', 'h', NULL, NULL, 'waiting', NULL, NULL, NULL, NULL, NULL, NULL, false, \
         false, {metadata})"
    )
}

/// A call of `enqueue_many` for one request, with a caller's key or without one.
fn many(id: Uuid, channel: &str, metadata: &str, key: Option<&str>) -> String {
    let key = key.map_or("NULL".to_owned(), |key| format!("ARRAY['{key}']"));
    format!(
        "SELECT FROM requeuest.enqueue_many(ARRAY['{id}'::uuid], ARRAY['{channel}'], ARRAY['g'], \
         '{{0}}', '{{NULL}}', '{{h}}', '{{NULL}}', '{{false}}', '{{false}}', 'requeuest', false, \
         ARRAY[{metadata}]::text[], {key}, '{{guess}}')"
    )
}

async fn assert_refused(connection: &mut PgConnection, call: &str, sqlstates: &[&str]) {
    let error = connection.execute(call).await.expect_err(call);
    let state = error.as_database_error().and_then(DatabaseError::code);
    assert!(
        state.is_some_and(|state| sqlstates.contains(&&*state)),
        "{call}: {error:?}"
    );
}

#[tokio::test]
async fn an_id_of_another_request_replaces_neither_its_outcome_nor_its_key() {
    let database = migrated().await;
    let role = Role::create(&database).await;
    role.plays(DatabaseRole::Enqueue).await;
    let [(ended, _), (waiting, _)] = requests_of_others(&database).await;
    let mut connection = role.options().connect().await.unwrap();
    for (id, others_key) in [(ended, "waiting"), (waiting, "ended")] {
        let id = Uuid::from(id);
        for call in [
            one(id, "default", "NULL"),
            many(id, "default", "NULL", None),
            many(id, "default", "NULL", Some("new")),
            // A conflict takes back the keys of the call's own ids.
            many(id, "default", "NULL", Some(others_key)),
        ] {
            assert_refused(&mut connection, &call, &["23505"]).await;
        }
    }
    assert_eq!(rows(&database, "request_keys").await, 2);
    assert_eq!(rows(&database, "mq_payloads").await, 1);

    // A refusal leaves no lock behind that keeps outcomes from being pruned.
    let mut transaction = connection.begin().await.unwrap();
    let own = one(Uuid::now_v7(), "default", "NULL");
    transaction.execute(&*own).await.unwrap();
    let locks = "SELECT count(*) FROM pg_class c JOIN pg_locks l ON l.relation = c.oid
        JOIN pg_stat_activity a ON a.pid = l.pid
        WHERE c.relname LIKE";
    let of_role = |name: &str| format!("{locks} '{name}' AND a.usename = '{}'", role.name);
    assert!(count(&database, &of_role("mq_payloads%")).await > 0);
    assert_eq!(count(&database, &of_role("outcomes%")).await, 0);
    transaction.rollback().await.unwrap();
    connection.close().await.unwrap();
    role.dropped().await;
}

#[tokio::test]
async fn channels_and_metadata_that_no_handle_passes_are_refused() {
    let database = migrated().await;
    let role = Role::create(&database).await;
    role.plays(DatabaseRole::Enqueue).await;
    let mut connection = role.options().connect().await.unwrap();
    let (long, nul) = ("c".repeat(56), r#"'"\u0000"'"#);
    let large = format!("'\"{}\"'", "x".repeat(4095));
    for (channel, metadata, sqlstates) in [
        ("", "NULL", &["22023"][..]),
        (&long, "NULL", &["22023"]),
        ("default", nul, &["22P05"]),
        ("default", "'1e999999'", &["22003"]),
        ("default", &large, &["22023"]),
    ] {
        let id = Uuid::now_v7();
        assert_refused(&mut connection, &one(id, channel, metadata), sqlstates).await;
        let call = many(id, channel, metadata, None);
        assert_refused(&mut connection, &call, sqlstates).await;
    }
    for call in [
        one(Uuid::now_v7(), &long[1..], &large.replacen('x', "", 1)),
        many(Uuid::now_v7(), "default", "NULL", None),
    ] {
        connection.execute(&*call).await.unwrap();
    }
    connection.close().await.unwrap();
    role.dropped().await;
}
