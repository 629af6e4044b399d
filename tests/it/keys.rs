//! Idempotency keys, superseding keys, and the channel of an ordering key.

use std::process::{Child, Stdio};
use std::time::Duration;

use http::HeaderValue;
use requeuest::retry::RetryPolicy;
use requeuest::{Channels, Client, Durable, Options, Request, RequestId, Status};
use sqlx::PgPool;
use tokio::task::JoinSet;
use tower::{Layer, ServiceExt};

use crate::support::{
    Server, builder, eventually, eventually_rows, hyper_client, in_time, migrated, outcome_of,
    part, plays, post, reply, rows,
};

fn keyed(url: impl AsRef<str>, key: &str, body: &'static str) -> Request {
    post(url, body).with(Options::default().key(key))
}

/// Answers each request with its number.
async fn numbering_server() -> Server {
    Server::start(|number, _| async move { reply(200, number.to_string()) }).await
}

#[tokio::test]
async fn calls_with_the_same_key_are_one_request() {
    let database = migrated().await;
    let server = numbering_server().await;
    let durable = Durable::new(database.pool().clone());
    let first = in_time(durable.await_response(keyed(server.url("/"), "k", "x")))
        .await
        .unwrap();
    let second = in_time(durable.await_response(keyed(server.url("/"), "k", "x")))
        .await
        .unwrap();
    assert_eq!(first.id(), second.id());
    assert_eq!(first.body(), second.body());
    let fired = durable.fire(keyed(server.url("/"), "k", "x")).await;
    assert_eq!(fired.unwrap(), first.id());

    // A call in a transaction, through a handle with another pool.
    let other = Durable::new(PgPool::connect(database.url()).await.unwrap());
    let mut transaction = database.pool().begin().await.unwrap();
    let fired = other
        .fire_in(&mut *transaction, keyed(server.url("/"), "k", "x"))
        .await;
    transaction.commit().await.unwrap();
    assert_eq!(fired.unwrap(), first.id());

    // Another key or another channel makes another request.
    let request = keyed(server.url("/"), "l", "x");
    let another = in_time(durable.await_response(request)).await.unwrap();
    assert_ne!(another.id(), first.id());
    let request = keyed(server.url("/"), "k", "x");
    let request = request.with(Options::default().key("k").channel("other"));
    assert_ne!(durable.fire(request).await.unwrap(), first.id());
    assert_eq!(server.count(), 2);
}

#[tokio::test]
async fn concurrent_calls_with_the_same_key_are_one_request() {
    let database = migrated().await;
    let server = numbering_server().await;
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
async fn reusing_a_key_for_a_different_request_is_an_error() {
    let database = migrated().await;
    let server = numbering_server().await;
    let durable = Durable::new(database.pool().clone());
    let first = durable.fire(keyed(server.url("/"), "k", "x")).await;
    let first = first.unwrap();
    for other in [
        keyed(server.url("/"), "k", "y"),
        keyed(server.url("/other"), "k", "x"),
    ] {
        let error = durable.fire(&other).await.unwrap_err();
        assert!(error.is_key_conflict(), "{error:?}");
        assert_eq!(error.request_id(), Some(first));
        assert_eq!(error.field(), Some("key"));
        let text = error.to_string();
        for part in [&*first.to_string(), r#"key: "k""#, r#"channel "default""#] {
            assert!(text.contains(part), "{text}");
        }
        let error = in_time(durable.await_response(&other)).await.unwrap_err();
        assert!(error.is_key_conflict(), "{error:?}");
        let error = durable.fire_in(database.pool(), &other).await.unwrap_err();
        assert!(error.is_key_conflict(), "{error:?}");
    }
    outcome_of(&durable, first).await;
    assert_eq!(server.count(), 1);
    assert_eq!(rows(&database, "mq_msgs").await, 0);
}

/// A request with the key `k` and this header.
fn authorized(url: &str, (name, value): (&'static str, &'static str)) -> Request {
    let mut request = keyed(url, "k", "x");
    let mut value = HeaderValue::from_static(value);
    value.set_sensitive(name == "x-secret");
    request.headers_mut().insert(name, value);
    request
}

#[tokio::test]
async fn tenants_with_different_credentials_never_share_a_key() {
    let server = numbering_server().await;
    let url = server.url("/");
    for name in ["authorization", "cookie", "x-api-key", "x-secret"] {
        let database = migrated().await;
        let durable = Durable::new(database.pool().clone());
        let own = || authorized(&url, (name, "hunter1"));
        let first = in_time(durable.await_response(own())).await.unwrap();
        let again = in_time(durable.await_response(own())).await.unwrap();
        assert_eq!(first.id(), again.id());
        for other in [authorized(&url, (name, "hunter2")), keyed(&url, "k", "x")] {
            let mut http = http::Request::post(&url).body("x".to_owned()).unwrap();
            *http.headers_mut() = other.headers().clone();
            http.extensions_mut().insert(other.options().clone());
            let layered = durable.layer().layer(hyper_client());
            let errors = [
                durable.fire(&other).await.unwrap_err(),
                in_time(durable.await_response(&other)).await.unwrap_err(),
                durable.fire_in(database.pool(), &other).await.unwrap_err(),
                durable.fire_many([&other]).await.unwrap_err(),
                durable
                    .fire_many([&other, &post(&url, "y")])
                    .await
                    .unwrap_err(),
                in_time(layered.oneshot(http)).await.unwrap_err(),
            ];
            for error in errors {
                assert!(error.is_key_conflict(), "{name}: {error:?}");
                let text = format!("{error} {error:?}");
                assert!(text.contains("Options::key_owner"), "{text}");
                assert!(!text.contains("hunter"), "{text}");
            }
        }
        let kept = "request_keys WHERE strpos(encode(fingerprint, 'escape'), 'hunter') > 0";
        assert_eq!(rows(&database, kept).await, 0);
        assert_eq!(rows(&database, "request_keys").await, 1);
    }
    assert_eq!(server.count(), 4);
}

#[tokio::test]
async fn a_named_owner_keeps_its_key_when_its_token_changes() {
    let database = migrated().await;
    let server = numbering_server().await;
    let url = server.url("/");
    let durable = Durable::new(database.pool().clone());
    let of = |owner: &'static str, token| {
        let options = Options::default().key("k").key_owner(owner);
        authorized(&url, ("authorization", token)).with(options)
    };
    let first = in_time(durable.await_response(of("a", "old")))
        .await
        .unwrap();
    let second = in_time(durable.await_response(of("a", "new")))
        .await
        .unwrap();
    assert_eq!(first.id(), second.id());
    for other in [of("b", "old"), authorized(&url, ("authorization", "old"))] {
        let error = durable.fire(other).await.unwrap_err();
        assert!(error.is_key_conflict(), "{error:?}");
    }
    for owner in [String::new(), "x".repeat(256)] {
        let options = Options::default().key("l").key_owner(owner);
        let error = durable.fire(post(&url, "x").with(options)).await;
        assert_eq!(error.unwrap_err().field(), Some("key_owner"));
    }
    assert_eq!(server.count(), 1);
}

#[tokio::test]
async fn a_key_with_an_empty_body_is_the_same_through_each_entry_point() {
    let database = migrated().await;
    let server = numbering_server().await;
    let durable = Durable::new(database.pool().clone());
    let http = || {
        let request = http::Request::post(server.url("/"));
        let request = request.extension(Options::default().key("k"));
        request.body(String::new()).unwrap()
    };
    let id = durable.fire(http()).await.unwrap();
    let layered = durable.layer().layer(hyper_client());
    let response = in_time(layered.oneshot(http())).await.unwrap();
    assert_eq!(response.extensions().get(), Some(&id));
    let absent = http().map(|_| ());
    assert_eq!(durable.fire(absent).await.unwrap(), id);
    assert_eq!(server.count(), 1);
}

#[tokio::test]
async fn a_key_is_free_once_its_outcome_is_deleted() {
    let database = migrated().await;
    let server = numbering_server().await;
    let durable = Durable::new(database.pool().clone());
    let first = in_time(durable.await_response(keyed(server.url("/"), "k", "x")))
        .await
        .unwrap();
    sqlx::query("DELETE FROM requeuest.outcomes")
        .execute(database.pool())
        .await
        .unwrap();
    let second = in_time(durable.await_response(keyed(server.url("/"), "k", "other")))
        .await
        .unwrap();
    assert_ne!(first.id(), second.id());
    assert_eq!(server.count(), 2);
}

#[tokio::test]
async fn a_key_is_free_after_a_rollback() {
    let database = migrated().await;
    let server = numbering_server().await;
    let durable = Durable::new(database.pool().clone());
    let mut transaction = database.pool().begin().await.unwrap();
    let lost = durable
        .fire_in(&mut *transaction, keyed(server.url("/"), "k", "x"))
        .await
        .unwrap();
    // A caller with the same key waits for the transaction. A caller with another key doesn't.
    let waiting = tokio::spawn({
        let (durable, url) = (durable.clone(), server.url("/"));
        async move { durable.await_response(keyed(&url, "k", "y")).await }
    });
    let other = durable.await_response(keyed(server.url("/"), "l", "x"));
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
async fn a_killed_and_rerun_workflow_sends_each_call_once() {
    let database = migrated().await;
    let server = numbering_server().await;
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
    let ended = |mut child: Child| async move {
        in_time(tokio::task::spawn_blocking(move || child.wait().unwrap()))
            .await
            .unwrap()
    };
    // Two workflows at a time. Each is killed after one of its steps and then run to its end.
    let mut workflows = JoinSet::new();
    for lane in 0..2 {
        let numbers = (0..KILLS).filter(move |number| number % 2 == lane);
        let children: Vec<_> = numbers.collect();
        let run = &run;
        for number in children {
            let killed = run(number, number % STEPS + 1);
            let status = ended(killed).await;
            assert!(!status.success(), "the workflow was not killed");
            workflows.spawn(ended(run(number, usize::MAX)));
            if workflows.len() > 1 {
                assert!(workflows.join_next().await.unwrap().unwrap().success());
            }
        }
    }
    for status in workflows.join_all().await {
        assert!(status.success());
    }
    let mut calls = server.bodies();
    calls.sort();
    let sent = calls.len();
    calls.dedup();
    assert_eq!((sent, calls.len()), (KILLS * STEPS, KILLS * STEPS));
}

/// A workflow of three calls that aborts its process after the given number of steps.
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
        let request = post(&url, call.clone()).with(Options::default().key(call));
        in_time(durable.await_response(request)).await.unwrap();
        if step + 1 == until {
            std::process::abort();
        }
    }
}

fn superseding(url: &str, body: &'static str, delay: Duration) -> Request {
    post(url, body).with(Options::default().supersede("s").delay(delay))
}

#[tokio::test]
async fn the_latest_request_supersedes_those_not_yet_sent() {
    let database = migrated().await;
    let server = numbering_server().await;
    let durable = Durable::new(database.pool().clone());
    let hour = Duration::from_secs(3600);
    let url = server.url("/");
    let first = durable.fire(superseding(&url, "1", hour)).await.unwrap();
    let waiting = tokio::spawn({
        let (durable, request) = (durable.clone(), superseding(&url, "2", hour));
        async move { durable.await_response(request).await }
    });
    eventually("the second request supersedes the first", || async {
        durable.status(first).await.unwrap() == Some(Status::Cancelled)
    })
    .await;
    // In a transaction, the commit supersedes.
    let mut transaction = database.pool().begin().await.unwrap();
    let third = superseding(&url, "3", Duration::ZERO);
    let third = durable.fire_in(&mut *transaction, third).await.unwrap();
    transaction.commit().await.unwrap();
    let error = in_time(waiting).await.unwrap().unwrap_err();
    assert!(error.is_superseded() && error.is_cancelled(), "{error:?}");
    let error = durable.response(first).await.unwrap_err();
    assert!(error.is_superseded(), "{error:?}");

    let outcome = outcome_of(&durable, third).await;
    assert_eq!(outcome.status(), Status::Completed);
    assert_eq!(server.seen()[0].body, "3");
    assert_eq!(server.count(), 1);
    // A request that was sent is not superseded.
    let fourth = superseding(&url, "4", Duration::ZERO);
    in_time(durable.await_response(fourth)).await.unwrap();
    assert_eq!(
        durable.status(third).await.unwrap(),
        Some(Status::Completed)
    );
}

/// A request with the ordering key `k` in this channel. It has one attempt.
fn ordered(url: &str, channel: &'static str) -> Request {
    let options = Options::default().ordered("k").channel(channel);
    post(url, channel).with(options.retry(RetryPolicy::none()))
}

#[tokio::test]
async fn an_ordering_key_belongs_to_one_channel_at_a_time() {
    let database = migrated().await;
    let server = numbering_server().await;
    let url = server.url("/");
    let durable = builder(&database).runner(false).build().unwrap();
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
            let text = error.to_string();
            assert!(
                text.contains(r#"channel "m" have the ordering key "k""#),
                "{text}"
            );
        }
        // The same holds within a transaction that has not committed yet.
        let mut transaction = database.pool().begin().await.unwrap();
        let own = ordered(&url, other).with(Options::default().ordered("l").channel(other));
        durable.fire_in(&mut *transaction, own).await.unwrap();
        let own = ordered(&url, "m").with(Options::default().ordered("l").channel("m"));
        let error = durable.fire_in(&mut *transaction, own).await.unwrap_err();
        assert!(error.is_order_conflict(), "{error:?}");
        transaction.rollback().await.unwrap();
    }
    assert_eq!(rows(&database, "mq_msgs").await, 2);
    assert_eq!(
        durable.status(first).await.unwrap(),
        Some(Status::Available)
    );

    // Once these requests have ended, another channel may use the key.
    let _runner = builder(&database).channel("m").build().unwrap();
    eventually_rows(&database, "mq_msgs", 0).await;
    durable.fire(ordered(&url, "a")).await.unwrap();
    assert_eq!(server.count(), 2);
}

#[tokio::test]
async fn a_replay_is_refused_while_another_channel_has_its_key() {
    let database = migrated().await;
    let server = Server::in_turn(&[503, 200]).await;
    let url = server.url("/");
    let durable = builder(&database).channel("m").build().unwrap();
    let kept = durable.fire(ordered(&url, "m")).await.unwrap();
    let outcome = outcome_of(&durable, kept).await;
    assert_eq!(outcome.status(), Status::Discarded);
    let holder = durable.fire(ordered(&url, "a")).await.unwrap();
    let error = durable.replay(kept).await.unwrap_err();
    assert!(error.is_order_conflict(), "{error:?}");
    assert_eq!(error.request_id(), Some(kept));
    let text = error.to_string();
    assert!(
        text.contains(r#"channel "a" have the ordering key "k""#),
        "{text}"
    );
    assert_eq!(durable.status(kept).await.unwrap(), Some(Status::Discarded));
    assert!(durable.cancel(holder).await.unwrap());
    let replayed = durable.replay(kept).await.unwrap();
    assert_eq!(
        in_time(durable.response(replayed)).await.unwrap().status(),
        200
    );
}

#[tokio::test]
async fn the_older_api_orders_each_channel_separately() {
    let database = migrated().await;
    let client = Client::new(database.pool().clone(), Channels::List(&["other"]))
        .await
        .unwrap();
    let request = ordered("http://127.0.0.1:9/", "unused");
    for channel in ["a", "b"] {
        client
            .spawn_cfg(channel, &request, |job| {
                job.set_ordered(true);
            })
            .await
            .unwrap();
    }
    assert_eq!(rows(&database, "mq_msgs WHERE seq IS NOT NULL").await, 2);
}
