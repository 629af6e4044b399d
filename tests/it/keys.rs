//! A caller's keys: calls that attach to an earlier one, requests that take another's place, and the channel of an ordering key.

use std::process::Stdio;
use std::time::Duration;

use requeuest::retry::RetryPolicy;
use requeuest::{Channels, Client, Durable, Options, Request, RequestId, Status, testkit};
use sqlx::PgPool;
use tokio::task::JoinSet;

use crate::support::{LONG, Server, count, eventually, in_time, migrated, part, plays, reply};

fn keyed(url: &str, key: &str, body: &'static str) -> Request {
    let request = http::Request::post(url).body(body).unwrap();
    let request = Request::try_from(request).unwrap();
    request.with(Options::default().key(key))
}

async fn echo() -> Server {
    Server::start(|number, _| async move { reply(200, number.to_string()) }).await
}

#[tokio::test]
async fn calls_with_one_key_are_one_request() {
    let database = migrated().await;
    let server = echo().await;
    let durable = Durable::new(database.pool().clone());
    let first = in_time(durable.await_response(keyed(&server.url("/"), "k", "x")))
        .await
        .unwrap();
    let second = in_time(durable.await_response(keyed(&server.url("/"), "k", "x")))
        .await
        .unwrap();
    assert_eq!(first.id(), second.id());
    assert_eq!(first.body(), second.body());
    let fired = durable.fire(keyed(&server.url("/"), "k", "x")).await;
    assert_eq!(fired.unwrap(), first.id());

    // In a transaction of the caller's, and from a handle of another process, as good as.
    let other = Durable::builder(PgPool::connect(database.url()).await.unwrap())
        .build()
        .unwrap();
    let mut transaction = database.pool().begin().await.unwrap();
    let fired = other
        .fire_in(&mut *transaction, keyed(&server.url("/"), "k", "x"))
        .await;
    transaction.commit().await.unwrap();
    assert_eq!(fired.unwrap(), first.id());

    // Another key, and another channel, are another request.
    let request = keyed(&server.url("/"), "l", "x");
    let another = in_time(durable.await_response(request)).await.unwrap();
    assert_ne!(another.id(), first.id());
    let request = keyed(&server.url("/"), "k", "x");
    let request = request.with(Options::default().key("k").channel("other"));
    assert_ne!(durable.fire(request).await.unwrap(), first.id());
    assert_eq!(server.count(), 2);
}

#[tokio::test]
async fn calls_with_one_key_at_once_are_one_request() {
    let database = migrated().await;
    let server = echo().await;
    let handles = [
        Durable::new(database.pool().clone()),
        Durable::new(PgPool::connect(database.url()).await.unwrap()),
    ];
    let mut callers = JoinSet::new();
    for number in 0..40 {
        let (durable, url) = (handles[number % 2].clone(), server.url("/"));
        callers.spawn(async move {
            let key = if number % 4 < 2 { "even" } else { "odd" };
            durable.await_response(keyed(&url, key, "x")).await
        });
    }
    let mut ids: Vec<RequestId> = in_time(callers.join_all())
        .await
        .into_iter()
        .map(|response| response.unwrap().id())
        .collect();
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), 2);
    assert_eq!(server.count(), 2);
}

#[tokio::test]
async fn the_same_key_for_another_request_is_an_error() {
    let database = migrated().await;
    let server = echo().await;
    let durable = Durable::new(database.pool().clone());
    let first = durable.fire(keyed(&server.url("/"), "k", "x")).await;
    let first = first.unwrap();
    for other in [
        keyed(&server.url("/"), "k", "y"),
        keyed(&server.url("/other"), "k", "x"),
    ] {
        let error = durable.fire(&other).await.unwrap_err();
        assert!(error.is_key_conflict(), "{error:?}");
        assert_eq!(error.request_id(), Some(first));
        assert_eq!(error.field(), Some("key"));
        let error = in_time(durable.await_response(&other)).await.unwrap_err();
        assert!(error.is_key_conflict(), "{error:?}");
        let error = durable.fire_in(database.pool(), &other).await.unwrap_err();
        assert!(error.is_key_conflict(), "{error:?}");
    }
    testkit::outcome(&durable, first, LONG).await.unwrap();
    assert_eq!(server.count(), 1);
    assert_eq!(
        count(&database, "select count(*) from requeuest.mq_msgs").await,
        0
    );
}

#[tokio::test]
async fn a_key_is_free_again_when_its_request_is_forgotten() {
    let database = migrated().await;
    let server = echo().await;
    let durable = Durable::new(database.pool().clone());
    let first = in_time(durable.await_response(keyed(&server.url("/"), "k", "x")))
        .await
        .unwrap();
    sqlx::query("delete from requeuest.outcomes")
        .execute(database.pool())
        .await
        .unwrap();
    let second = in_time(durable.await_response(keyed(&server.url("/"), "k", "other")))
        .await
        .unwrap();
    assert_ne!(first.id(), second.id());
    assert_eq!(server.count(), 2);
}

#[tokio::test]
async fn a_rolled_back_key_is_free() {
    let database = migrated().await;
    let server = echo().await;
    let durable = Durable::new(database.pool().clone());
    let mut transaction = database.pool().begin().await.unwrap();
    let lost = durable
        .fire_in(&mut *transaction, keyed(&server.url("/"), "k", "x"))
        .await
        .unwrap();
    // Another caller with the key waits for the transaction; one with another key does not.
    let waiting = tokio::spawn({
        let (durable, url) = (durable.clone(), server.url("/"));
        async move { durable.await_response(keyed(&url, "k", "y")).await }
    });
    let other = durable.await_response(keyed(&server.url("/"), "l", "x"));
    in_time(other).await.unwrap();
    assert!(!waiting.is_finished());
    transaction.rollback().await.unwrap();
    let response = in_time(waiting).await.unwrap().unwrap();
    assert_ne!(response.id(), lost);
    assert_eq!(durable.status(lost).await.unwrap(), None);
}

const STEPS: usize = 3;
const KILLS: usize = 50;

#[tokio::test]
async fn a_workflow_that_is_killed_and_run_again_sends_each_call_once() {
    let database = migrated().await;
    let server = echo().await;
    let run = |number: usize, steps: usize| {
        part(module_path!(), "run_workflow")
            .env("REQUEUEST_TEST_DATABASE", database.url())
            .env("REQUEUEST_TEST_SERVER", server.url("/"))
            .env("REQUEUEST_TEST_WORKFLOW", number.to_string())
            .env("REQUEUEST_TEST_STEPS", steps.to_string())
            .stdout(Stdio::null())
            .spawn()
            .unwrap()
    };
    let ended = |mut child: std::process::Child| async move {
        in_time(tokio::task::spawn_blocking(move || child.wait().unwrap()))
            .await
            .unwrap()
    };
    // Two at a time: each is killed between its steps, a different one each time, and then run to its end.
    let mut workflows = JoinSet::new();
    for lane in 0..2 {
        let numbers = (0..KILLS).filter(move |number| number % 2 == lane);
        let children: Vec<_> = numbers.collect();
        let run = &run;
        for number in children {
            let killed = run(number, number % STEPS + 1);
            let status = ended(killed).await;
            assert!(!status.success(), "it was to be killed");
            workflows.spawn(ended(run(number, usize::MAX)));
            if workflows.len() > 1 {
                assert!(workflows.join_next().await.unwrap().unwrap().success());
            }
        }
    }
    for status in workflows.join_all().await {
        assert!(status.success());
    }
    let mut calls: Vec<_> = server.seen().into_iter().map(|seen| seen.body).collect();
    calls.sort();
    let sent = calls.len();
    calls.dedup();
    assert_eq!((sent, calls.len()), (KILLS * STEPS, KILLS * STEPS));
}

/// A workflow of three calls, which kills itself after some of its steps.
#[tokio::test]
#[ignore = "a part played by a copy of this binary"]
async fn run_workflow() {
    if !plays("run_workflow") {
        return;
    }
    let variable = |name: &str| std::env::var(name).unwrap();
    let pool = PgPool::connect(&variable("REQUEUEST_TEST_DATABASE"))
        .await
        .unwrap();
    let (url, workflow) = (
        variable("REQUEUEST_TEST_SERVER"),
        variable("REQUEUEST_TEST_WORKFLOW"),
    );
    let until: usize = variable("REQUEUEST_TEST_STEPS").parse().unwrap();
    let durable = Durable::new(pool);
    for step in 0..STEPS {
        let call = format!("{workflow}.{step}");
        let request = http::Request::post(&url).body(call.clone()).unwrap();
        let request = Request::try_from(request).unwrap();
        let request = request.with(Options::default().key(call));
        in_time(durable.await_response(request)).await.unwrap();
        if step + 1 == until {
            std::process::abort();
        }
    }
}

fn superseding(url: &str, body: &'static str, delay: Duration) -> Request {
    let request = http::Request::post(url).body(body).unwrap();
    let request = Request::try_from(request).unwrap();
    request.with(Options::default().supersede("s").delay(delay))
}

#[tokio::test]
async fn the_latest_request_takes_the_place_of_those_not_sent() {
    let database = migrated().await;
    let server = echo().await;
    let durable = Durable::new(database.pool().clone());
    let hour = Duration::from_secs(3600);
    let url = server.url("/");
    let first = durable.fire(superseding(&url, "1", hour)).await.unwrap();
    let waiting = tokio::spawn({
        let (durable, request) = (durable.clone(), superseding(&url, "2", hour));
        async move { durable.await_response(request).await }
    });
    eventually("the second takes the first's place", || async {
        durable.status(first).await.unwrap() == Some(Status::Cancelled)
    })
    .await;
    // In a transaction: only its commit replaces.
    let mut transaction = database.pool().begin().await.unwrap();
    let third = superseding(&url, "3", Duration::ZERO);
    let third = durable.fire_in(&mut *transaction, third).await.unwrap();
    transaction.commit().await.unwrap();
    let error = in_time(waiting).await.unwrap().unwrap_err();
    assert!(error.is_superseded() && error.is_cancelled(), "{error:?}");
    let error = durable.response(first).await.unwrap_err();
    assert!(error.is_superseded(), "{error:?}");

    let outcome = testkit::outcome(&durable, third, LONG).await.unwrap();
    assert_eq!(outcome.status(), Status::Completed);
    assert_eq!(server.seen()[0].body, "3");
    assert_eq!(server.count(), 1);
    // What was sent is not replaced.
    let fourth = superseding(&url, "4", Duration::ZERO);
    in_time(durable.await_response(fourth)).await.unwrap();
    assert_eq!(
        durable.status(third).await.unwrap(),
        Some(Status::Completed)
    );
}

fn ordered(url: &str, channel: &'static str) -> Request {
    let request = http::Request::post(url).body(channel).unwrap();
    let request = Request::try_from(request).unwrap();
    let options = Options::default().ordered("k").channel(channel);
    request.with(options.retry(RetryPolicy::none()))
}

#[tokio::test]
async fn an_ordering_key_belongs_to_one_channel_at_a_time() {
    let database = migrated().await;
    let server = echo().await;
    let url = server.url("/");
    let durable = Durable::builder(database.pool().clone()).runner(false);
    let durable = durable.build().unwrap();
    let first = durable.fire(ordered(&url, "m")).await.unwrap();
    durable.fire(ordered(&url, "m")).await.unwrap();
    for other in ["a", "z"] {
        let request = ordered(&url, other);
        for error in [
            durable.fire(&request).await.unwrap_err(),
            in_time(durable.await_response(&request)).await.unwrap_err(),
            durable
                .fire_in(database.pool(), &request)
                .await
                .unwrap_err(),
        ] {
            assert!(error.is_order_conflict(), "{error:?}");
            assert_eq!(error.field(), Some("ordered"));
        }
        // Nor in one transaction, where nothing is committed yet.
        let mut transaction = database.pool().begin().await.unwrap();
        let own = ordered(&url, other).with(Options::default().ordered("l").channel(other));
        durable.fire_in(&mut *transaction, own).await.unwrap();
        let own = ordered(&url, "m").with(Options::default().ordered("l").channel("m"));
        let error = durable.fire_in(&mut *transaction, own).await.unwrap_err();
        assert!(error.is_order_conflict(), "{error:?}");
        transaction.rollback().await.unwrap();
    }
    let unfinished = "select count(*) from requeuest.mq_msgs";
    assert_eq!(count(&database, unfinished).await, 2);
    assert_eq!(
        durable.status(first).await.unwrap(),
        Some(Status::Available)
    );

    // Once they have ended, another channel may have it.
    let runner = Durable::builder(database.pool().clone()).channel("m");
    let _runner = runner.build().unwrap();
    eventually("they have ended", || async {
        count(&database, unfinished).await == 0
    })
    .await;
    durable.fire(ordered(&url, "a")).await.unwrap();
    assert_eq!(server.count(), 2);
}

#[tokio::test]
async fn a_kept_request_is_not_replayed_while_another_channel_has_its_ordering_key() {
    let database = migrated().await;
    let server = Server::in_turn(&[503, 200]).await;
    let url = server.url("/");
    let durable = Durable::builder(database.pool().clone()).channel("m");
    let durable = durable.build().unwrap();
    let kept = durable.fire(ordered(&url, "m")).await.unwrap();
    let outcome = testkit::outcome(&durable, kept, LONG).await.unwrap();
    assert_eq!(outcome.status(), Status::Discarded);
    let holder = durable.fire(ordered(&url, "a")).await.unwrap();
    let error = durable.replay(kept).await.unwrap_err();
    assert!(error.is_order_conflict(), "{error:?}");
    assert_eq!(error.request_id(), Some(kept));
    assert_eq!(durable.status(kept).await.unwrap(), Some(Status::Discarded));
    assert!(durable.cancel(holder).await.unwrap());
    let replayed = durable.replay(kept).await.unwrap();
    assert_eq!(
        in_time(durable.response(replayed)).await.unwrap().status(),
        200
    );
}

#[tokio::test]
async fn the_older_api_keeps_an_order_in_each_channel() {
    let database = migrated().await;
    let client = Client::new(database.pool().clone(), Channels::List(&["other"]))
        .await
        .unwrap();
    let request = ordered("http://127.0.0.1:9/", "unused");
    for channel in ["a", "b"] {
        client
            .spawn_cfg(channel, &request, |job| job.set_ordered(true))
            .await
            .unwrap();
    }
    let unfinished = "select count(*) from requeuest.mq_msgs where seq is not null";
    assert_eq!(count(&database, unfinished).await, 2);
}
