//! Where a request stands, its failed attempts, and why it is not being sent.

use std::time::Duration;

use requeuest::admin::{Hold, RequestInfo};
use requeuest::retry::RetryPolicy;
use requeuest::{DestinationPolicy, DestinationState, Durable, Options, RequestId, Status, Uuid};

use crate::support::{
    Server, builder, eventually, eventually_some, execute, migrated, other_process, outcome_of,
    post, quick,
};

const HOUR: Duration = Duration::from_secs(3600);
const PATH: &str = "/hunter2?token=hunter2";

async fn request(durable: &Durable, id: RequestId) -> RequestInfo {
    let found = durable.admin().request(id).await.unwrap();
    let found = found.expect("the request exists");
    assert!(!format!("{found:?}").contains("hunter2"), "{found:?}");
    found
}

async fn hold(durable: &Durable, id: RequestId) -> Option<Hold> {
    request(durable, id).await.hold
}

/// Waits until there is a reason that begins as this one, and returns it with its sentence.
async fn held(durable: &Durable, id: RequestId, beginning: &str) -> Hold {
    eventually_some(beginning, || async {
        let hold = hold(durable, id).await?;
        hold.to_string().starts_with(beginning).then_some(hold)
    })
    .await
}

#[tokio::test]
async fn a_request_that_is_not_due_says_when_it_is() {
    let database = migrated().await;
    let durable = other_process(&database).await;
    let options = Options::default().delay(HOUR);
    let delayed = post("http://localhost:1/hunter2", "x").with(options);
    let id = durable.fire(delayed).await.unwrap();

    let found = request(&durable, id).await;
    assert_eq!((found.status, found.attempts), (Status::Scheduled, 0));
    assert_eq!(found.method.as_deref(), Some("POST"));
    assert_eq!(found.destination.as_deref(), Some("http://localhost:1"));
    assert_eq!(found.channel, "default");
    let due_at = found.due_at.unwrap();
    let until = due_at.duration_since(found.created_at).unwrap();
    assert!(HOUR.abs_diff(until) < Duration::from_secs(5), "{until:?}");
    let Some(Hold::NotDue { at, in_time }) = found.hold else {
        panic!("{found:?}");
    };
    assert_eq!(at, due_at);
    assert!(in_time <= HOUR && in_time > HOUR / 2, "{in_time:?}");
    assert!(
        held(&durable, id, "the next attempt is due in")
            .await
            .to_string()
            .ends_with(" min")
    );
}

#[tokio::test]
async fn a_request_without_a_runner_says_so_until_there_is_one_with_an_attempt_free() {
    let database = migrated().await;
    let (server, gate) = Server::held(200).await;
    let there = other_process(&database).await;
    let first = there.fire(post(server.url(PATH), "1")).await.unwrap();
    let reason = hold(&there, first).await.unwrap();
    assert_eq!(
        reason.to_string(),
        "no runner delivers the channel `default`"
    );

    let durable = builder(&database).concurrency(1).build().unwrap();
    server.wait_for(1).await;
    let sending = request(&there, first).await;
    assert_eq!((sending.status, sending.hold), (Status::Running, None));
    assert_eq!((sending.attempts, sending.due_at), (1, None));
    let second = there.fire(post(server.url(PATH), "2")).await.unwrap();
    held(&there, second, "due since").await;
    gate.add_permits(2);
    for id in [first, second] {
        outcome_of(&durable, id).await;
        let found = request(&there, id).await;
        assert_eq!((found.status, found.hold), (Status::Completed, None));
        assert_eq!(found.http_status, Some(200));
        assert!(found.finished_at.unwrap() >= found.created_at);
    }
    let unknown = there.admin().request(RequestId::from(Uuid::nil())).await;
    assert!(unknown.unwrap().is_none());
}

#[tokio::test]
async fn a_request_behind_another_of_its_key_names_that_one_and_what_halts_the_key() {
    let database = migrated().await;
    let server = Server::in_turn(&[404, 200]).await;
    let there = other_process(&database).await;
    let mut ids = Vec::new();
    for _ in 0..2 {
        let options = Options::default().ordered("orders").halt_on_discard();
        let id = there.fire(post(server.url(PATH), "x").with(options)).await;
        ids.push(id.unwrap());
    }
    let (first, second) = (ids[0], ids[1]);
    let key = "orders".to_owned();
    let behind = hold(&there, second).await.unwrap();
    assert_eq!(
        behind,
        Hold::Behind {
            key: key.clone(),
            first
        }
    );
    assert!(behind.to_string().contains(&first.to_string()), "{behind}");

    let durable = builder(&database).build().unwrap();
    assert_eq!(
        outcome_of(&durable, first).await.status(),
        Status::Discarded
    );
    let halted = hold(&there, second).await.unwrap();
    assert_eq!(halted, Hold::Halted { key, by: first });
    let letter = request(&there, first).await;
    assert_eq!((letter.status, letter.hold), (Status::Discarded, None));
    assert_eq!(letter.ordering_key.as_deref(), Some("orders"));
    assert_eq!(letter.error.as_deref(), Some("answered with 404 Not Found"));

    let replayed = durable.replay(first).await.unwrap();
    outcome_of(&durable, second).await;
    assert_eq!(request(&there, first).await.replayed_as, Some(replayed));
}

#[tokio::test]
async fn a_request_to_a_closed_or_limited_destination_says_why_it_is() {
    let database = migrated().await;
    let (server, gate) = Server::held(200).await;
    let name = format!("http://{}", server.addr);
    let policy = DestinationPolicy::default().max_concurrency(1);
    let durable = builder(&database)
        .destination(&name, policy)
        .build()
        .unwrap();
    let partner = durable.destination(&name).unwrap();

    partner.pause(None).await.unwrap();
    let id = durable.fire(post(server.url(PATH), "1")).await.unwrap();
    let paused = held(&durable, id, "the destination").await;
    assert_eq!(
        paused.to_string(),
        format!("the destination {name} is paused")
    );
    partner.resume().await.unwrap();
    partner.disable("the contract has ended").await.unwrap();
    let Hold::Closed(status) = held(&durable, id, "the destination").await else {
        panic!("not closed");
    };
    assert_eq!(status.state, DestinationState::Disabled);
    assert_eq!(status.reason.as_deref(), Some("the contract has ended"));
    partner.enable().await.unwrap();
    server.wait_for(1).await;

    let second = durable.fire(post(server.url(PATH), "2")).await.unwrap();
    eventually("the second request waits for a permit", || async {
        matches!(
            hold(&durable, second).await,
            Some(Hold::Limited { destination, .. }) if destination == name
        )
    })
    .await;
    gate.add_permits(2);
    for id in [id, second] {
        outcome_of(&durable, id).await;
    }
}

#[tokio::test]
async fn failed_attempts_are_listed_with_what_failed() {
    let database = migrated().await;
    let server = Server::in_turn(&[503, 500, 200]).await;
    let durable = builder(&database).retry(quick()).build().unwrap();
    let id = durable.fire(post(server.url(PATH), "x")).await.unwrap();
    outcome_of(&durable, id).await;
    let found = request(&durable, id).await;
    let failed: Vec<_> = found
        .failed_attempts
        .iter()
        .map(|attempt| (attempt.number, attempt.http_status))
        .collect();
    assert_eq!(failed, [(1, Some(503)), (2, Some(500))]);
    for attempt in &found.failed_attempts {
        assert!(attempt.ended_at >= found.created_at, "{attempt:?}");
        assert!(attempt.error.contains("50"), "{attempt:?}");
    }

    let server = Server::always(503).await;
    let retry = RetryPolicy::constant(HOUR);
    let request_of_hour = post(server.url(PATH), "x").with(Options::default().retry(retry));
    let id = durable.fire(request_of_hour).await.unwrap();
    held(&durable, id, "the next attempt is due in").await;
    let waiting = request(&durable, id).await;
    assert_eq!((waiting.status, waiting.attempts), (Status::Retryable, 1));
}

#[tokio::test]
async fn a_parked_request_says_what_could_not_be_read() {
    let database = migrated().await;
    let there = other_process(&database).await;
    let id = there.fire(post("http://localhost:1/", "x")).await.unwrap();
    let damage = "UPDATE requeuest.mq_payloads SET head = '{\"hunter2\":' || head WHERE id = $1";
    execute(&database, id, damage).await;
    let durable = builder(&database).build().unwrap();
    let Hold::Parked { reason, .. } = held(&there, id, "no process could read it").await else {
        panic!("not parked");
    };
    assert!(reason.contains("JSON"), "{reason}");
    durable.shutdown(Duration::ZERO).await.unwrap();
}

#[tokio::test]
async fn a_request_whose_process_died_says_that_its_lease_has_ended() {
    let database = migrated().await;
    let there = other_process(&database).await;
    let id = there.fire(post("http://localhost:1/", "x")).await.unwrap();
    let lost = "UPDATE requeuest.mq_msgs
        SET state = 'claimed', attempts = 1, attempt_at = now() - interval '1 second'
        WHERE id = $1";
    execute(&database, id, lost).await;
    let found = hold(&there, id).await;
    assert!(matches!(found, Some(Hold::LeaseEnded { .. })), "{found:?}");
}
