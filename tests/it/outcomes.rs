//! Outcomes that are handed to the application in a transaction.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use requeuest::retry::RetryPolicy;
use requeuest::testkit::TestDatabase;
use requeuest::{
    Durable, Options, Outcome, OutcomeHandler, Request, RequestId, Status, Uuid, outcome_fn,
};
use sqlx::{PgConnection, PgPool};

use crate::support::{Server, count, eventually, migrated};

const DONE: &str = "select count(*) from done";

type BoxError = Box<dyn std::error::Error + Send + Sync>;

async fn with_table() -> TestDatabase {
    let database = migrated().await;
    sqlx::query("create table done (request uuid primary key, status text not null)")
        .execute(database.pool())
        .await
        .unwrap();
    database
}

async fn insert(connection: &mut PgConnection, id: RequestId, status: Status) {
    sqlx::query("insert into done (request, status) values ($1, $2)")
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

fn post(server: &Server) -> Request {
    let request = http::Request::post(server.url("/")).body("x").unwrap();
    request.try_into().unwrap()
}

async fn unhandled(database: &TestDatabase) -> i64 {
    count(database, "select count(*) from requeuest.unhandled").await
}

#[tokio::test]
async fn a_handler_writes_in_the_transaction_that_marks_the_outcome() {
    let database = with_table().await;
    let server = Server::always(201).await;
    let durable = Durable::new(database.pool().clone());
    let _listener = durable
        .on_outcome(
            "default",
            outcome_fn(|tx, outcome| {
                assert_eq!(outcome.response().unwrap().status(), 201);
                let (id, status) = (outcome.id(), outcome.status());
                Box::pin(async move {
                    insert(tx, id, status).await;
                    Ok(())
                })
            }),
        )
        .await
        .unwrap();
    for _ in 0..20 {
        durable.fire(post(&server)).await.unwrap();
    }
    let elsewhere = post(&server).with(Options::default().channel("another"));
    durable.fire(elsewhere).await.unwrap();
    eventually("all are handled", || async {
        count(&database, DONE).await == 20
    })
    .await;
    assert_eq!(unhandled(&database).await, 0);
    assert_eq!(server.count(), 20);
}

#[tokio::test]
async fn a_handler_that_fails_is_called_again_and_nothing_is_sent_again() {
    let database = with_table().await;
    let server = Server::always(200).await;
    let durable = Durable::new(database.pool().clone());
    let calls = Arc::new(AtomicUsize::new(0));
    let called = Arc::clone(&calls);
    let _listener = durable
        .on_outcome(
            "default",
            outcome_fn(move |tx, outcome| {
                let call = called.fetch_add(1, Ordering::SeqCst);
                let (id, status) = (outcome.id(), outcome.status());
                Box::pin(async move {
                    insert(tx, id, status).await;
                    match call {
                        0 => Err("what was written is rolled back".into()),
                        1 => panic!("this too"),
                        _ => Ok(()),
                    }
                })
            }),
        )
        .await
        .unwrap();
    let id = durable.fire(post(&server)).await.unwrap();
    eventually("it is handled", || async {
        count(&database, DONE).await == 1 && unhandled(&database).await == 0
    })
    .await;
    assert_eq!(calls.load(Ordering::SeqCst), 3);
    assert_eq!(server.count(), 1);
    assert_eq!(durable.status(id).await.unwrap(), Some(Status::Completed));
}

#[tokio::test]
async fn outcomes_wait_for_a_handler_and_go_to_one_of_several() {
    let database = with_table().await;
    let server = Server::in_turn(&[200, 200, 500]).await;
    let durable = Durable::builder(database.pool().clone())
        .retry(RetryPolicy::none())
        .build()
        .unwrap();
    drop(durable.on_outcome("default", Insert).await.unwrap());
    for _ in 0..20 {
        durable.fire(post(&server)).await.unwrap();
    }
    eventually("they wait", || async { unhandled(&database).await == 20 }).await;
    assert_eq!(count(&database, DONE).await, 0);

    let other = Durable::new(PgPool::connect(database.url()).await.unwrap());
    let _listeners = [
        durable.on_outcome("default", Insert).await.unwrap(),
        other.on_outcome("default", Insert).await.unwrap(),
    ];
    eventually("all are handled, each once", || async {
        count(&database, DONE).await == 20
    })
    .await;
    // Those that were given up, too.
    let discarded = "select count(*) from done where status = 'discarded'";
    assert_eq!(count(&database, discarded).await, 18);
}

#[tokio::test]
async fn nothing_waits_for_a_handler_that_was_given_up() {
    let database = with_table().await;
    let server = Server::always(200).await;
    let durable = Durable::new(database.pool().clone());
    let error = durable.unsubscribe_outcomes("").await.unwrap_err();
    assert_eq!(error.field(), Some("channel"));
    let listener = durable
        .on_outcome(
            "default",
            outcome_fn(|_, _| Box::pin(async { Err("never".into()) })),
        )
        .await
        .unwrap();
    durable.fire(post(&server)).await.unwrap();
    eventually("it waits", || async { unhandled(&database).await == 1 }).await;
    drop(listener);
    durable.unsubscribe_outcomes("default").await.unwrap();
    assert_eq!(unhandled(&database).await, 0);
    let id = durable.fire(post(&server)).await.unwrap();
    durable.response(id).await.unwrap();
    assert_eq!(unhandled(&database).await, 0);
}
