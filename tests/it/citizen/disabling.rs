//! How a destination that only fails is disabled, by a clock that the test moves.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use requeuest::testkit::TestDatabase;
use requeuest::{
    AutoDisable, DestinationEventKind, DestinationHandle, DestinationPolicy, DestinationState,
    Durable,
};
use serde_json::Value;

use super::{fire, origin};
use crate::support::{Server, builder, eventually, migrated, quick};

const HOUR: Duration = Duration::from_secs(3600);

/// Moves all times in a state back by so many milliseconds.
fn earlier(value: &mut Value, by: i64) {
    match value {
        Value::Object(fields) => {
            // The numbers of buckets of the window, counted from 1970.
            if let Some(length) = fields.get("bucket_ms").and_then(Value::as_i64) {
                for bucket in fields["buckets"].as_array_mut().unwrap() {
                    bucket["at"] = (bucket["at"].as_i64().unwrap() - by / length).into();
                }
            }
            fields.values_mut().for_each(|value| earlier(value, by));
        }
        Value::Array(values) => values.iter_mut().for_each(|value| earlier(value, by)),
        // Milliseconds since 1970, and no length of time.
        Value::Number(number) => {
            if let Some(at) = number.as_i64().filter(|at| *at > 1_000_000_000_000) {
                *value = (at - by).into();
            }
        }
        _ => {}
    }
}

/// Moves all times of destinations back, as if so much time had passed since.
pub(super) async fn pass(database: &TestDatabase, time: Duration) {
    let mut transaction = database.pool().begin().await.unwrap();
    let stored: Vec<(String, String)> =
        sqlx::query_as("SELECT name, state::text FROM requeuest.destinations FOR UPDATE")
            .fetch_all(&mut *transaction)
            .await
            .unwrap();
    for (name, state) in stored {
        let mut state: Value = serde_json::from_str(&state).unwrap();
        earlier(&mut state, time.as_millis() as i64);
        sqlx::query("UPDATE requeuest.destinations SET state = $2::json WHERE name = $1")
            .bind(name)
            .bind(state.to_string())
            .execute(&mut *transaction)
            .await
            .unwrap();
    }
    transaction.commit().await.unwrap();
}

/// Sends so many requests that fail, and waits until that is known.
async fn fail(durable: &Durable, server: &Server, destination: &DestinationHandle, number: u64) {
    fire(durable, server, number as usize).await;
    eventually("the failures are known", || async {
        destination.status().await.unwrap().failures >= number
    })
    .await;
}

#[tokio::test]
async fn failures_over_hours_disable_a_destination_and_one_bad_hour_does_not() {
    let database = migrated().await;
    let server = Server::always(500).await;
    let rule = AutoDisable::after(10 * HOUR)
        .at_least_apart(HOUR)
        .failures(3);
    let events: Arc<Mutex<Vec<DestinationEventKind>>> = Arc::default();
    let seen = Arc::clone(&events);
    let durable = builder(&database)
        .retry(quick().max_attempts(1))
        .destination("*", DestinationPolicy::default().auto_disable(rule))
        .on_destination_event(move |event| seen.lock().unwrap().push(event.kind.clone()))
        .build()
        .unwrap();
    let destination = durable.destination(&origin(&server)).unwrap();
    let told = || {
        let events = events.lock().unwrap();
        let percents = events.iter().map(|event| match event {
            DestinationEventKind::FailureThreshold { percent } => *percent,
            DestinationEventKind::Disabled { .. } => 0,
            other => panic!("{other:?}"),
        });
        percents.collect::<Vec<_>>()
    };
    fail(&durable, &server, &destination, 20).await;
    pass(&database, HOUR - Duration::from_secs(60)).await;
    fail(&durable, &server, &destination, 20).await;
    assert!(told().is_empty());
    for (hours, expected) in [(4, &[50][..]), (4, &[50, 90]), (1, &[50, 90, 100, 0])] {
        pass(&database, hours * HOUR + Duration::from_secs(120)).await;
        fail(&durable, &server, &destination, 1).await;
        eventually("the thresholds are told", || async { told() == expected }).await;
    }
    let status = destination.status().await.unwrap();
    assert_eq!(status.state, DestinationState::Disabled);
    assert_eq!(status.reason.as_deref(), Some("it has failed for 10 hours"));
}

#[tokio::test]
async fn a_success_between_failures_begins_anew() {
    let database = migrated().await;
    let server = Server::in_turn(&[500, 200, 500, 500]).await;
    let rule = AutoDisable::after(4 * HOUR)
        .at_least_apart(HOUR)
        .failures(2);
    let durable = builder(&database)
        .retry(quick().max_attempts(1))
        .destination("*", DestinationPolicy::default().auto_disable(rule))
        .build()
        .unwrap();
    let destination = durable.destination(&origin(&server)).unwrap();
    fail(&durable, &server, &destination, 1).await;
    pass(&database, 2 * HOUR).await;
    // The success.
    fire(&durable, &server, 1).await;
    eventually("the success is known", || async {
        destination.status().await.unwrap().failing_since.is_none()
    })
    .await;
    pass(&database, HOUR).await;
    fail(&durable, &server, &destination, 1).await;
    pass(&database, 2 * HOUR).await;
    fail(&durable, &server, &destination, 1).await;
    let status = destination.status().await.unwrap();
    assert_eq!(status.state, DestinationState::Open);
    assert!(status.failing_since.is_some());
}
