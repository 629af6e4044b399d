//! Which process has a request, and which processes there are.

use std::time::{Duration, SystemTime};

use requeuest::admin::{Hold, RequestState};
use requeuest::retry::RetryPolicy;
use requeuest::{Options, Status};

use crate::support::{
    Server, builder, eventually, eventually_some, execute, migrated, other_process, outcome_of,
    post,
};

#[tokio::test]
async fn a_request_that_is_being_sent_names_its_process() {
    let database = migrated().await;
    let (server, gate) = Server::held(200).await;
    let there = other_process(&database).await;
    let admin = there.admin();
    let polled = there.fire(post(server.url("/"), "x")).await.unwrap();
    let short = builder(&database).lease(Duration::from_secs(1));
    let durable = short.build().unwrap();
    server.wait_for(1).await;
    let runner = durable.runners().await.unwrap().remove(0);
    let found = admin.request(polled).await.unwrap().unwrap();
    assert_eq!((found.status, found.hold), (Status::Running, None));
    assert_eq!(found.state, Some(RequestState::Claimed));
    assert!(found.leased_until.unwrap() > found.created_at);
    let owner = found.owner.unwrap();
    assert_eq!((owner.id, owner.pid), (runner.id, Some(std::process::id())));
    assert_eq!(
        (&owner.host, owner.version.clone()),
        (&runner.host, Some(runner.version))
    );
    assert!(owner.to_string().starts_with("process"), "{owner}");

    // The first renewal of its lease notes who sends it.
    let inline = durable.fire(post(server.url("/"), "x")).await.unwrap();
    let owner = eventually_some("the owner", || async {
        admin.request(inline).await.unwrap().unwrap().owner
    })
    .await;
    assert_eq!(owner.id, runner.id);
    eventually("both are counted", || async {
        admin.runners().await.unwrap()[0].in_flight == 2
    })
    .await;
    gate.add_permits(2);
    for id in [polled, inline] {
        outcome_of(&durable, id).await;
        let found = admin.request(id).await.unwrap().unwrap();
        assert_eq!(
            (found.owner, found.leased_until, found.state),
            (None, None, None)
        );
    }
}

#[tokio::test]
async fn a_held_retry_names_its_process_and_a_request_put_back_none() {
    let database = migrated().await;
    let server = Server::always(503).await;
    let durable = builder(&database).build().unwrap();
    let retry =
        |seconds| Options::default().retry(RetryPolicy::constant(Duration::from_secs(seconds)));
    let awaited = post(server.url("/"), "x").with(retry(30));
    let waits = durable.clone();
    let caller = tokio::spawn(async move { waits.await_response(awaited).await });
    let admin = durable.admin();
    let held = eventually_some("the held request", || async {
        let filter = requeuest::admin::RequestFilter::new().state(RequestState::Held);
        let page = requeuest::admin::PageRequest::new();
        let found = admin.requests(&filter, &page).await.unwrap().requests;
        found.first().map(|request| request.id)
    })
    .await;
    let found = admin.request(held).await.unwrap().unwrap();
    assert!(matches!(found.hold, Some(Hold::NotDue { .. })), "{found:?}");
    assert!(found.leased_until.unwrap() > found.due_at.unwrap());
    caller.abort();

    let put_back = post(server.url("/"), "x").with(retry(3600));
    let id = durable.fire(put_back).await.unwrap();
    eventually("the attempt has failed", || async {
        durable.status(id).await.unwrap() == Some(Status::Retryable)
    })
    .await;
    let found = admin.request(id).await.unwrap().unwrap();
    assert_eq!((found.owner, found.leased_until), (None, None));
}

#[tokio::test]
async fn a_request_whose_destination_was_damaged_is_shown() {
    let database = migrated().await;
    let there = other_process(&database).await;
    let id = there.fire(post("http://localhost:1/", "x")).await.unwrap();
    let damage = "UPDATE requeuest.mq_msgs SET destination = 'https://' WHERE id = $1";
    execute(&database, id, damage).await;
    let found = there.admin().request(id).await.unwrap().unwrap();
    assert_eq!(found.destination.as_deref(), Some("https://"));
    assert!(
        matches!(found.hold, Some(Hold::NoRunner { .. })),
        "{found:?}"
    );
    assert!(found.created_at <= SystemTime::now() + Duration::from_secs(5));
}

#[tokio::test]
async fn a_closed_destination_says_until_when() {
    let database = migrated().await;
    let there = other_process(&database).await;
    let id = there.fire(post("http://localhost:1/", "x")).await.unwrap();
    let partner = there.destination("http://localhost:1").unwrap();
    let until = SystemTime::now() + Duration::from_secs(3600);
    partner.pause(until).await.unwrap();
    let hold = there.admin().request(id).await.unwrap().unwrap().hold;
    let sentence = hold.unwrap().to_string();
    assert!(sentence.contains(" is paused until "), "{sentence}");
    assert!(sentence.ends_with(" GMT"), "{sentence}");
}
