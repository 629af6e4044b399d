//! Requests that are enqueued in a transaction of the caller.

use std::time::{Duration, Instant};

use requeuest::{Options, Status};

use crate::support::{Server, builder, handle, in_time, migrated, outcome_of, passing, post, rows};

#[tokio::test]
async fn fire_in_takes_a_pool_a_connection_or_a_transaction() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let durable = handle(&database);
    let request = post(server.url("/"), "x");

    let on_pool = durable.fire_in(database.pool(), &request).await.unwrap();
    let mut connection = database.pool().acquire().await.unwrap();
    let on_connection = durable.fire_in(&mut *connection, &request).await.unwrap();
    let mut tx = database.pool().begin().await.unwrap();
    let in_transaction = durable.fire_in(&mut *tx, &request).await.unwrap();
    tx.commit().await.unwrap();
    for id in [on_pool, on_connection, in_transaction] {
        let outcome = outcome_of(&durable, id).await;
        assert_eq!(outcome.status(), Status::Completed);
    }
    assert_eq!(server.count(), 3);
}

#[tokio::test]
async fn a_commit_sends_and_a_rollback_sends_nothing() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let durable = handle(&database);
    let to = server.url("/");
    let mut undone = Vec::new();
    let plain = |body: &'static str| post(&to, body);
    let ordered = |body: &'static str| post(&to, body).with(Options::default().ordered("k"));

    let mut tx = database.pool().begin().await.unwrap();
    undone.push(durable.fire_in(&mut *tx, plain("undone")).await.unwrap());
    undone.push(durable.fire_in(&mut *tx, ordered("undone")).await.unwrap());
    tx.rollback().await.unwrap();
    let mut tx = database.pool().begin().await.unwrap();
    undone.push(durable.fire_in(&mut *tx, plain("dropped")).await.unwrap());
    drop(tx);

    let mut tx = database.pool().begin().await.unwrap();
    let mut done = vec![durable.fire_in(&mut *tx, plain("done")).await.unwrap()];
    done.push(durable.fire_in(&mut *tx, ordered("done")).await.unwrap());
    // No runner sees the requests before the commit.
    passing(&database, Duration::from_millis(1200)).await;
    assert_eq!(server.count(), 0);
    for id in &done {
        assert_eq!(durable.status(*id).await.unwrap(), None);
    }
    tx.commit().await.unwrap();
    for id in done {
        outcome_of(&durable, id).await;
    }
    for id in undone {
        assert_eq!(durable.status(id).await.unwrap(), None);
        assert!(durable.response(id).await.unwrap_err().is_unknown_id());
    }
    assert_eq!(server.bodies(), ["done", "done"]);
    assert_eq!(rows(&database, "mq_payloads").await, 0);
}

#[tokio::test]
async fn an_aborted_transaction_accepts_no_request() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let durable = handle(&database);
    let mut tx = database.pool().begin().await.unwrap();
    sqlx::query("SELECT 1 / 0")
        .execute(&mut *tx)
        .await
        .unwrap_err();
    let error = durable
        .fire_in(&mut *tx, post(server.url("/"), "x"))
        .await
        .unwrap_err();
    assert!(error.is_database(), "{error:?}");
    tx.rollback().await.unwrap();
    assert_eq!(rows(&database, "mq_payloads").await, 0);
}

#[tokio::test]
async fn a_response_is_awaited_from_the_moment_of_the_commit_without_a_pause() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let durable = builder(&database).build().unwrap();
    let mut slow = Vec::new();
    for number in 0..200 {
        let mut transaction = database.pool().begin().await.unwrap();
        let request = post(server.url("/"), number.to_string());
        let id = durable.fire_in(&mut *transaction, request).await.unwrap();
        let began = Instant::now();
        transaction.commit().await.unwrap();
        // Looks at the row while a poll does.
        in_time(durable.response(id)).await.unwrap();
        slow.extend(Some(began.elapsed()).filter(|took| *took > Duration::from_millis(500)));
    }
    // The first one waits for the runner to start.
    assert!(slow.len() <= 1, "{slow:?}");
}
