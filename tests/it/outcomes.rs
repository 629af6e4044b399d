//! Handlers, which get outcomes in a transaction.

mod failing;

use std::error::Error;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use requeuest::retry::RetryPolicy;
use requeuest::testkit::TestDatabase;
use requeuest::{
    Durable, Options, Outcome, OutcomeHandler, RequestId, Status, Uuid, outcome_fn, outcome_fn_with,
};
use sqlx::{PgConnection, PgPool};

use crate::support::{
    Server, builder, builder_on, count, eventually, eventually_rows, in_time, migrated, post, rows,
};

const DONE: &str = "SELECT count(*) FROM done";

type BoxError = Box<dyn std::error::Error + Send + Sync>;

async fn with_table() -> TestDatabase {
    let database = migrated().await;
    sqlx::query("CREATE TABLE done (request uuid PRIMARY KEY, status text NOT NULL)")
        .execute(database.pool())
        .await
        .unwrap();
    database
}

async fn insert(connection: &mut PgConnection, id: RequestId, status: Status) {
    sqlx::query("INSERT INTO done (request, status) VALUES ($1, $2)")
        .bind(Uuid::from(id))
        .bind(status.as_str())
        .execute(connection)
        .await
        .unwrap();
}

struct Insert;

impl OutcomeHandler for Insert {
    fn handle<'a>(
        &'a self,
        transaction: &'a mut PgConnection,
        outcome: &'a Outcome,
    ) -> Pin<Box<dyn Future<Output = Result<(), BoxError>> + Send + 'a>> {
        Box::pin(async move {
            insert(transaction, outcome.id(), outcome.status()).await;
            Ok(())
        })
    }
}

#[tokio::test]
async fn a_handler_writes_in_the_transaction_that_marks_the_outcome() {
    let database = with_table().await;
    let server = Server::always(201).await;
    let durable = Durable::new(database.pool().clone());
    let _listener = durable
        .on_outcome(
            "default",
            outcome_fn(async |tx: &mut PgConnection, outcome: &Outcome| {
                assert_eq!(outcome.response().unwrap().status(), 201);
                insert(tx, outcome.id(), outcome.status()).await;
                Ok::<_, sqlx::Error>(())
            }),
        )
        .await
        .unwrap();
    for _ in 0..20 {
        durable.fire(post(server.url("/"), "x")).await.unwrap();
    }
    let other = post(server.url("/"), "x").with(Options::default().channel("another"));
    durable.fire(other).await.unwrap();
    eventually("all outcomes are handled", || async {
        count(&database, DONE).await == 20
    })
    .await;
    assert_eq!(rows(&database, "unhandled").await, 0);
    assert_eq!(server.count(), 20);
}

async fn fails_twice(
    calls: &Arc<AtomicUsize>,
    tx: &mut PgConnection,
    outcome: &Outcome,
) -> Result<(), Box<dyn Error + Send + Sync>> {
    insert(tx, outcome.id(), outcome.status()).await;
    match calls.fetch_add(1, Ordering::SeqCst) {
        0 => Err("the insert is rolled back".into()),
        1 => panic!("the insert is rolled back"),
        _ => Ok(()),
    }
}

#[tokio::test]
async fn a_failing_handler_is_called_again_and_nothing_is_resent() {
    let database = with_table().await;
    let server = Server::always(200).await;
    let durable = Durable::new(database.pool().clone());
    let calls = Arc::new(AtomicUsize::new(0));
    let _listener = durable
        .on_outcome("default", outcome_fn_with(Arc::clone(&calls), fails_twice))
        .await
        .unwrap();
    let id = durable.fire(post(server.url("/"), "x")).await.unwrap();
    eventually("the outcome is handled", || async {
        count(&database, DONE).await == 1 && rows(&database, "unhandled").await == 0
    })
    .await;
    assert_eq!(calls.load(Ordering::SeqCst), 3);
    assert_eq!(server.count(), 1);
    assert_eq!(durable.status(id).await.unwrap(), Some(Status::Completed));
}

#[tokio::test]
async fn outcomes_wait_for_a_handler_and_go_to_exactly_one() {
    let database = with_table().await;
    let server = Server::in_turn(&[200, 200, 500]).await;
    let durable = builder(&database)
        .retry(RetryPolicy::none())
        .build()
        .unwrap();
    drop(durable.on_outcome("default", Insert).await.unwrap());
    for _ in 0..20 {
        durable.fire(post(server.url("/"), "x")).await.unwrap();
    }
    eventually_rows(&database, "unhandled", 20).await;
    assert_eq!(count(&database, DONE).await, 0);

    let pool = PgPool::connect(database.url()).await.unwrap();
    let other = builder_on(&pool).build().unwrap();
    let _listeners = [
        durable.on_outcome("default", Insert).await.unwrap(),
        other.on_outcome("default", Insert).await.unwrap(),
    ];
    eventually("each outcome is handled once", || async {
        count(&database, DONE).await == 20
    })
    .await;
    // Handlers get discarded requests too.
    let discarded = "SELECT count(*) FROM done WHERE status = 'discarded'";
    assert_eq!(count(&database, discarded).await, 18);
}

#[tokio::test]
async fn outcomes_do_not_wait_for_an_unsubscribed_handler() {
    let database = with_table().await;
    let server = Server::always(200).await;
    let durable = Durable::new(database.pool().clone());
    let error = durable.unsubscribe_outcomes("").await.unwrap_err();
    assert_eq!(error.field(), Some("channel"));
    let listener = durable
        .on_outcome(
            "default",
            outcome_fn(async |_: &mut PgConnection, _: &Outcome| Err(std::fmt::Error)),
        )
        .await
        .unwrap();
    durable.fire(post(server.url("/"), "x")).await.unwrap();
    eventually_rows(&database, "unhandled", 1).await;
    drop(listener);
    // The outcome stays as long as the handler has it.
    eventually("the outcome is forgotten", || async {
        durable.unsubscribe_outcomes("default").await.unwrap();
        rows(&database, "unhandled").await == 0
    })
    .await;
    let id = durable.fire(post(server.url("/"), "x")).await.unwrap();
    in_time(durable.response(id)).await.unwrap();
    assert_eq!(rows(&database, "unhandled").await, 0);
}

async fn replays_and_fails_once(
    (durable, replayed): &(Durable, Arc<AtomicUsize>),
    tx: &mut PgConnection,
    outcome: &Outcome,
) -> Result<(), BoxError> {
    insert(tx, outcome.id(), outcome.status()).await;
    if outcome.status() != Status::Discarded {
        return Ok(());
    }
    // After the failure, the request has been replayed already.
    match durable.replay(outcome.id()).await {
        Ok(_) if replayed.fetch_add(1, Ordering::SeqCst) == 0 => Err("rolled back".into()),
        Err(error) if !error.is_wrong_state() => Err(error.into()),
        _ => Ok(()),
    }
}

#[tokio::test]
async fn a_handler_replays_the_request_whose_outcome_it_has() {
    let database = with_table().await;
    let server = Server::in_turn(&[500, 200]).await;
    let durable = builder(&database)
        .retry(RetryPolicy::none())
        .build()
        .unwrap();
    let replayed = Arc::new(AtomicUsize::new(0));
    let handler = outcome_fn_with((durable.clone(), replayed.clone()), replays_and_fails_once);
    let _listener = durable.on_outcome("default", handler).await.unwrap();
    let id = durable.fire(post(server.url("/"), "x")).await.unwrap();
    // Sent again although the handler fails, and while the handler still waits for its next call.
    server.wait_for(2).await;
    eventually_rows(&database, "unhandled WHERE failures = 1", 1).await;
    // An outcome that a handler still needs is not in a slot that may be emptied.
    let where_it_is = format!("outcomes WHERE id = '{id}' AND slot = -2");
    assert_eq!(rows(&database, &where_it_is).await, 1);
    eventually("both outcomes are handled", || async {
        count(&database, DONE).await == 2 && rows(&database, "unhandled").await == 0
    })
    .await;
    assert_eq!(replayed.load(Ordering::SeqCst), 1);
    // It is kept as long as any other that was replayed.
    count(
        &database,
        "SELECT waiting FROM requeuest.delete_handled(NULL, 1000)",
    )
    .await;
    assert_eq!(durable.status(id).await.unwrap(), Some(Status::Discarded));
    assert_eq!(server.count(), 2);
}

#[tokio::test]
async fn a_handler_that_hangs_does_not_keep_its_channel_subscribed() {
    let database = with_table().await;
    let server = Server::always(200).await;
    let durable = Durable::new(database.pool().clone());
    drop(durable.on_outcome("default", Insert).await.unwrap());
    for _ in 0..2 {
        durable.fire(post(server.url("/"), "x")).await.unwrap();
    }
    eventually_rows(&database, "unhandled", 2).await;
    // Where the handler of another process has one of them.
    let mut handler = database.pool().begin().await.unwrap();
    sqlx::query("SELECT requeuest.take_unhandled('default')")
        .execute(&mut *handler)
        .await
        .unwrap();
    in_time(durable.unsubscribe_outcomes("default"))
        .await
        .unwrap();
    assert_eq!(rows(&database, "handled_channels").await, 0);
    assert_eq!(rows(&database, "unhandled").await, 1);
    handler.rollback().await.unwrap();
    // The sweep forgets it with its outcome.
    let forget = "SELECT count(requeuest.move_unhandled(slot, 1000)) FROM requeuest.unhandled";
    count(&database, forget).await;
    assert_eq!(rows(&database, "unhandled").await, 0);
}
