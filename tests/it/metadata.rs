//! What the application attaches to a request comes back with its outcome, on every path.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::future::join_all;
use requeuest::retry::RetryPolicy;
use requeuest::testkit::TestDatabase;
use requeuest::{
    DeadLetter, DeadLetterFilter, Durable, Guarantee, MAX_METADATA_LEN, Options, Outcome, Request,
    RequestId, Resolution, Status, outcome_fn_with,
};
use serde_json::{Value, json};
use sqlx::PgConnection;
use tower::{Layer, ServiceExt};

use crate::support::{
    Server, builder, eventually, eventually_rows, hyper_client, in_time, migrated, other_process,
    outcome_of, post, quick, with_middleware,
};

fn with(value: impl Into<Value>) -> Options {
    Options::default().metadata(value)
}

/// The metadata of a request's outcome, as this handle gets it.
async fn metadata(durable: &Durable, id: RequestId) -> Option<Value> {
    outcome_of(durable, id).await.metadata().cloned()
}

/// The metadata of all outcomes, as an operator reads them.
async fn stored(database: &TestDatabase) -> Vec<String> {
    sqlx::query_scalar(
        "SELECT metadata::jsonb->>'from' FROM requeuest.outcomes
         WHERE metadata IS NOT NULL ORDER BY 1",
    )
    .fetch_all(database.pool())
    .await
    .unwrap()
}

#[tokio::test]
async fn every_entry_point_stores_metadata() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let durable = Durable::new(database.pool().clone());
    let url = server.url("/");
    let from = |from: &str| with(json!({"from": from}));
    let request = |name: &str| post(&url, "x").with(from(name));

    let fired = durable.fire(request("fire")).await.unwrap();
    assert_eq!(
        metadata(&durable, fired).await,
        Some(json!({"from": "fire"}))
    );
    let keyed = post(&url, "x").with(from("key").key("k"));
    durable.fire(keyed).await.unwrap();
    durable
        .fire_in(database.pool(), request("fire_in"))
        .await
        .unwrap();
    let many = |name| [request(name), post(&url, "none"), request(name)];
    let ids = durable.fire_many(many("fire_many")).await.unwrap();
    assert_eq!(metadata(&durable, ids[1]).await, None);
    assert_eq!(
        metadata(&durable, ids[2]).await,
        Some(json!({"from": "fire_many"}))
    );
    let mut transaction = database.pool().begin().await.unwrap();
    durable
        .fire_many_in(&mut transaction, many("fire_many_in"))
        .await
        .unwrap();
    transaction.commit().await.unwrap();
    let awaited = in_time(durable.await_response(request("await_response")));
    awaited.await.unwrap();
    let extended = http::Request::post(&url).extension(from("layer"));
    let extended = extended.body("x".to_owned()).unwrap();
    in_time(durable.layer().layer(hyper_client()).oneshot(extended))
        .await
        .unwrap();
    let client = with_middleware(reqwest::Client::new(), &durable);
    in_time(
        client
            .post(&url)
            .with_extension(from("middleware").fire())
            .send(),
    )
    .await
    .unwrap();

    eventually_rows(&database, "outcomes", 12).await;
    assert_eq!(
        stored(&database).await,
        [
            "await_response",
            "fire",
            "fire_in",
            "fire_many",
            "fire_many",
            "fire_many_in",
            "fire_many_in",
            "key",
            "layer",
            "middleware",
        ]
    );
    // It is never sent.
    for seen in server.seen() {
        assert!(!format!("{seen:?}").contains("from"), "{seen:?}");
    }
}

#[tokio::test]
async fn metadata_of_a_batch_stays_with_its_requests() {
    let database = migrated().await;
    let (server, gate) = Server::held(200).await;
    let durable = builder(&database).build().unwrap();
    let url = server.url("/");
    let fired = (0..100).map(|number| {
        let request = post(&url, number.to_string());
        let request = match number % 3 {
            0 => request,
            _ => request.with(with(number)),
        };
        durable.fire(request)
    });
    let ids: Vec<_> = join_all(fired).await;
    // Answered together, so that their results share statements.
    gate.add_permits(100);
    let other = other_process(&database).await;
    for (number, id) in ids.into_iter().enumerate() {
        let id = id.unwrap();
        let expected = (number % 3 != 0).then(|| json!(number));
        assert_eq!(metadata(&durable, id).await, expected);
        assert_eq!(metadata(&other, id).await, expected);
    }
}

type Handled = Arc<Mutex<Vec<Option<Value>>>>;

#[tokio::test]
async fn waiters_and_handlers_get_metadata_after_a_retry() {
    let database = migrated().await;
    // In this process the first outcome settles at once, the second after another claim.
    let server = Server::in_turn(&[200, 503, 200]).await;
    let durable = builder(&database).retry(quick()).build().unwrap();
    let handled = Handled::default();
    let _subscription = durable
        .on_outcome(
            "default",
            outcome_fn_with(
                Arc::clone(&handled),
                async |handled: &Handled, _: &mut PgConnection, outcome: &Outcome| {
                    handled.lock().unwrap().push(outcome.metadata().cloned());
                    Ok::<_, sqlx::Error>(())
                },
            ),
        )
        .await
        .unwrap();
    for (number, tries) in [(1, 1), (2, 2)] {
        let id = durable.fire(post(server.url("/"), "x").with(with(number)));
        let outcome = in_time(durable.outcome(id.await.unwrap())).await.unwrap();
        assert_eq!(outcome.attempts(), tries);
        assert_eq!(outcome.metadata(), Some(&json!(number)));
    }
    eventually("both outcomes are handled", || async {
        handled.lock().unwrap().len() == 2
    })
    .await;
    assert_eq!(*handled.lock().unwrap(), [Some(json!(1)), Some(json!(2))]);
}

#[tokio::test]
async fn requests_that_end_without_an_answer_keep_their_metadata() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let durable = Durable::new(database.pool().clone());
    let hour = Duration::from_secs(3600);
    let later = |value: &str| {
        let options = with(value).delay(hour).supersede("s");
        post(server.url("/"), "x").with(options)
    };
    let superseded = durable.fire(later("superseded")).await.unwrap();
    let cancelled = durable.fire(later("cancelled")).await.unwrap();
    assert!(durable.cancel(cancelled).await.unwrap());
    let soon = Duration::from_millis(20);
    let overdue = with("overdue").delay(soon / 2).deadline(soon);
    // No runner of this process delivers the channel, so the deadline passes in the queue.
    let overdue = post(server.url("/"), "x").with(overdue.channel("elsewhere"));
    let overdue = durable.fire(overdue).await.unwrap();
    for (id, status, value) in [
        (superseded, Status::Cancelled, "superseded"),
        (cancelled, Status::Cancelled, "cancelled"),
        (overdue, Status::Discarded, "overdue"),
    ] {
        let outcome = outcome_of(&durable, id).await;
        assert_eq!(outcome.status(), status, "{value}");
        assert_eq!(outcome.metadata(), Some(&json!(value)));
    }
    assert_eq!(server.count(), 0);
}

async fn dead_letters(durable: &Durable) -> Vec<DeadLetter> {
    let all = DeadLetterFilter::default();
    durable.dead_letters(&all).await.unwrap()
}

#[tokio::test]
async fn dead_letters_show_metadata_and_a_replay_keeps_it() {
    let database = migrated().await;
    let server = Server::in_turn(&[503, 503, 200]).await;
    let durable = builder(&database)
        .retry(RetryPolicy::none())
        .build()
        .unwrap();
    let order = json!({"order": "hunter2"});
    let first = post(server.url("/"), "x").with(with(order.clone()));
    let mut id = durable.fire(first).await.unwrap();
    for _ in 0..2 {
        assert_eq!(metadata(&durable, id).await.as_ref(), Some(&order));
        let letters = dead_letters(&durable).await;
        assert_eq!(letters.len(), 1);
        assert_eq!(letters[0].metadata.as_ref(), Some(&order));
        let shown = format!("{:?}", letters[0]);
        assert!(shown.contains("metadata: Some(<19 bytes>)"), "{shown}");
        assert!(!shown.contains("hunter2"), "{shown}");
        let old = id;
        id = durable.replay(old).await.unwrap();
        let replayed = in_time(durable.outcome(id)).await.unwrap();
        assert_eq!(replayed.metadata(), Some(&order));
        assert!(!format!("{replayed:?}").contains("hunter2"));
        assert_eq!(metadata(&durable, old).await.as_ref(), Some(&order));
    }
    assert_eq!(durable.status(id).await.unwrap(), Some(Status::Completed));
}

#[tokio::test]
async fn ambiguous_requests_keep_their_metadata_when_resolved() {
    let database = migrated().await;
    let server = Server::start(|number, _| async move {
        if number < 2 {
            std::future::pending::<()>().await;
        }
        crate::support::reply(200, "")
    })
    .await;
    let asked = Arc::new(Mutex::new(Vec::new()));
    let ask = {
        let asked = Arc::clone(&asked);
        move |letter: DeadLetter, _: Request| {
            let sent = letter.metadata == Some(json!("sent"));
            asked.lock().unwrap().push(letter.metadata);
            async move {
                Ok(Some(if sent {
                    Resolution::Sent
                } else {
                    Resolution::NotSent
                }))
            }
        }
    };
    let durable = builder(&database).reconcile(ask).build().unwrap();
    for value in ["sent", "lost"] {
        let options = with(value)
            .guarantee(Guarantee::AtMostOnce)
            .attempt_timeout(Duration::from_millis(300));
        let id = durable.fire(post(server.url("/"), "x").with(options));
        let id = id.await.unwrap();
        let outcome = outcome_of(&durable, id).await;
        assert_eq!(outcome.metadata(), Some(&json!(value)));
        eventually("the request is resolved and completed", || async {
            durable.status(id).await.unwrap() == Some(Status::Completed)
        })
        .await;
        assert_eq!(metadata(&durable, id).await, Some(json!(value)));
    }
    let asked = asked.lock().unwrap();
    assert_eq!(*asked, [Some(json!("sent")), Some(json!("lost"))]);
}

#[tokio::test]
async fn the_largest_metadata_comes_back_unchanged() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let durable = Durable::new(database.pool().clone());
    let text = "\\\"é".repeat(MAX_METADATA_LEN / 6);
    let text = text + &"x".repeat(MAX_METADATA_LEN % 6 - 2);
    let value = Value::from(text);
    assert_eq!(value.to_string().len(), MAX_METADATA_LEN);
    let id = durable.fire(post(server.url("/"), "x").with(with(value.clone())));
    let id = id.await.unwrap();
    assert_eq!(metadata(&durable, id).await.as_ref(), Some(&value));
    let other = other_process(&database).await;
    assert_eq!(metadata(&other, id).await, Some(value));
}
