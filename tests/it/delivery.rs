//! From the enqueueing of a request to its outcome.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use requeuest::retry::RetryPolicy;
use requeuest::testkit::TestDatabase;
use requeuest::{Durable, Options, Request, RequestId, Status, testkit};
use tokio::sync::Notify;

use crate::support::{
    LONG, Server, closed_port, count, eventually, in_time, migrated, passing, quick, reply,
};

fn post(url: &str, body: impl Into<bytes::Bytes>) -> Request {
    http::Request::post(url)
        .body(body.into())
        .unwrap()
        .try_into()
        .unwrap()
}

/// A handle of another process, as good as: with a pool of its own, and without a runner.
async fn elsewhere(database: &TestDatabase) -> Durable {
    let pool = sqlx::PgPool::connect(database.url()).await.unwrap();
    Durable::builder(pool).runner(false).build().unwrap()
}

#[tokio::test]
async fn an_awaited_request_returns_the_stored_response() {
    let database = migrated().await;
    let server = Server::start(|_, seen| async move { reply(201, seen.body) }).await;
    let durable = Durable::new(database.pool().clone());

    let response = in_time(durable.await_response(post(&server.url("/"), "hello")))
        .await
        .unwrap();
    assert_eq!(response.status(), 201);
    assert_eq!(response.text().unwrap(), "hello");
    let id = response.id();
    assert_eq!(durable.status(id).await.unwrap(), Some(Status::Completed));
    assert_eq!(durable.response(id).await.unwrap().text().unwrap(), "hello");
    assert_eq!(server.count(), 1);
    assert_eq!(
        count(&database, "select count(*) from requeuest.mq_msgs").await,
        0
    );
    assert_eq!(
        count(&database, "select count(*) from requeuest.mq_payloads").await,
        0
    );
}

#[tokio::test]
async fn a_fired_request_arrives() {
    let database = migrated().await;
    let server = Server::always(204).await;
    let durable = Durable::new(database.pool().clone());
    let id = in_time(durable.fire(post(&server.url("/hook"), "x")))
        .await
        .unwrap();
    let outcome = testkit::outcome(&durable, id, LONG).await.unwrap();
    assert_eq!(outcome.status(), Status::Completed);
    assert_eq!(outcome.into_result().unwrap().status(), 204);
    assert_eq!(server.count(), 1);
}

#[tokio::test]
async fn failing_attempts_are_repeated_until_one_is_answered() {
    let database = migrated().await;
    let server = Server::in_turn(&[503, 429, 500, 200]).await;
    let durable = Durable::builder(database.pool().clone())
        .retry(quick())
        .build()
        .unwrap();
    let response = in_time(durable.await_response(post(&server.url("/"), "x")))
        .await
        .unwrap();
    assert_eq!(response.status(), 200);
    assert_eq!(server.count(), 4);
    assert_eq!(
        count(&database, "select count(*) from requeuest.attempts").await,
        3
    );
    let attempts = "select attempts::bigint from requeuest.outcomes";
    assert_eq!(count(&database, attempts).await, 4);
}

#[tokio::test]
async fn a_final_answer_is_not_repeated() {
    let database = migrated().await;
    let server = Server::always(404).await;
    let durable = Durable::builder(database.pool().clone())
        .retry(quick())
        .build()
        .unwrap();
    let response = in_time(durable.await_response(post(&server.url("/"), "x")))
        .await
        .unwrap();
    assert_eq!(response.status(), 404);
    assert_eq!(server.count(), 1);
}

#[tokio::test]
async fn the_last_response_is_returned_when_retries_are_used_up() {
    let database = migrated().await;
    let server = Server::in_turn(&[500, 502, 503]).await;
    let durable = Durable::builder(database.pool().clone())
        .retry(quick().max_attempts(3))
        .build()
        .unwrap();
    let response = in_time(durable.await_response(post(&server.url("/"), "x")))
        .await
        .unwrap();
    assert_eq!(response.status(), 503);
    assert_eq!(
        durable.status(response.id()).await.unwrap(),
        Some(Status::Discarded)
    );
    assert_eq!(server.count(), 3);
}

#[tokio::test]
async fn the_last_error_is_returned_when_there_never_was_a_response() {
    let database = migrated().await;
    let durable = Durable::builder(database.pool().clone())
        .retry(quick().max_attempts(2))
        .build()
        .unwrap();
    let url = format!("http://{}/secret-path?token=hunter2", closed_port().await);
    let error = in_time(durable.await_response(post(&url, "x")))
        .await
        .unwrap_err();
    assert!(error.is_discarded(), "{error}");
    assert_eq!(error.attempts(), Some(2));
    assert!(!format!("{error} {error:?}").contains("hunter2"));
    let again = durable
        .response(error.request_id().unwrap())
        .await
        .unwrap_err();
    assert!(again.is_discarded(), "{again}");
}

#[tokio::test]
async fn the_delay_is_waited_for() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let durable = Durable::new(database.pool().clone());
    let delay = Duration::from_millis(700);
    let began = std::time::Instant::now();
    let request = post(&server.url("/"), "x").with(Options::default().delay(delay));
    let id = durable.fire(request).await.unwrap();
    assert_eq!(durable.status(id).await.unwrap(), Some(Status::Scheduled));
    testkit::outcome(&durable, id, LONG).await.unwrap();
    assert!(began.elapsed() >= delay);
    assert_eq!(server.count(), 1);
}

#[tokio::test]
async fn a_caller_that_is_not_polled_keeps_no_slot_past_its_deadline() {
    use futures_util::FutureExt;

    let database = migrated().await;
    let server = Server::always(200).await;
    let durable = Durable::builder(database.pool().clone())
        .lease(Duration::from_secs(1))
        .concurrency(1)
        .attempt_timeout(Duration::from_millis(100))
        .build()
        .unwrap();
    let client = reqwest_middleware::ClientBuilder::new(reqwest::Client::new())
        .with(durable.clone())
        .build();
    let mut stuck = Box::pin(client.post(server.url("/stuck")).body("x").send());
    // Begun, and never polled again: its claim comes and nobody takes it.
    assert!(stuck.as_mut().now_or_never().is_none());
    let id = in_time(durable.fire(post(&server.url("/other"), "x")))
        .await
        .unwrap();
    let outcome = testkit::outcome(&durable, id, LONG).await.unwrap();
    assert_eq!(outcome.status(), Status::Completed);
    // Its own request goes through the handle's transport instead, and it gets the response once it is polled.
    server.wait_for(2).await;
    assert_eq!(in_time(stuck).await.unwrap().status(), 200);
    assert_eq!(server.count(), 2);
}

#[tokio::test]
async fn a_refused_status_with_a_body_over_the_limit_is_repeated() {
    let database = migrated().await;
    let server = Server::start(|number, _| async move {
        if number == 0 {
            reply(503, vec![b'x'; 5000])
        } else {
            reply(200, "small")
        }
    })
    .await;
    let durable = Durable::builder(database.pool().clone())
        .retry(quick())
        .max_response_body(1000)
        .build()
        .unwrap();
    let response = in_time(durable.await_response(post(&server.url("/"), "x")))
        .await
        .unwrap();
    assert_eq!(response.text().unwrap(), "small");

    let only_large = Server::start(|_, _| async move { reply(503, vec![b'x'; 5000]) }).await;
    let twice = Options::default().retry(quick().max_attempts(2));
    let request = post(&only_large.url("/"), "x").with(twice);
    let error = in_time(durable.await_response(request)).await.unwrap_err();
    assert_eq!(error.response_head().unwrap().0, 503);
    assert_eq!(only_large.count(), 2);
}

#[tokio::test]
async fn a_request_is_fired_on_a_pool_a_connection_or_a_transaction() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let durable = Durable::new(database.pool().clone());
    let request = post(&server.url("/"), "x");

    let on_pool = durable.fire_in(database.pool(), &request).await.unwrap();
    let mut connection = database.pool().acquire().await.unwrap();
    let on_connection = durable.fire_in(&mut *connection, &request).await.unwrap();
    let mut tx = database.pool().begin().await.unwrap();
    let in_transaction = durable.fire_in(&mut *tx, &request).await.unwrap();
    tx.commit().await.unwrap();
    for id in [on_pool, on_connection, in_transaction] {
        let outcome = testkit::outcome(&durable, id, LONG).await.unwrap();
        assert_eq!(outcome.status(), Status::Completed);
    }
    assert_eq!(server.count(), 3);
}

#[tokio::test]
async fn a_commit_sends_and_a_rollback_never_does() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let durable = Durable::new(database.pool().clone());
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
    // Nobody sees it before the commit, however long that takes.
    passing(&database, Duration::from_millis(1200)).await;
    assert_eq!(server.count(), 0);
    for id in &done {
        assert_eq!(durable.status(*id).await.unwrap(), None);
    }
    tx.commit().await.unwrap();
    for id in done {
        testkit::outcome(&durable, id, LONG).await.unwrap();
    }
    for id in undone {
        assert_eq!(durable.status(id).await.unwrap(), None);
        assert!(durable.response(id).await.unwrap_err().is_unknown_id());
    }
    let bodies: Vec<_> = server.seen().into_iter().map(|seen| seen.body).collect();
    assert_eq!(bodies, ["done", "done"]);
    assert_eq!(
        count(&database, "select count(*) from requeuest.mq_payloads").await,
        0
    );
}

#[tokio::test]
async fn an_aborted_transaction_takes_no_request() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let durable = Durable::new(database.pool().clone());
    let mut tx = database.pool().begin().await.unwrap();
    sqlx::query("select 1 / 0")
        .execute(&mut *tx)
        .await
        .unwrap_err();
    let error = durable
        .fire_in(&mut *tx, post(&server.url("/"), "x"))
        .await
        .unwrap_err();
    assert!(error.is_database(), "{error:?}");
    tx.rollback().await.unwrap();
    assert_eq!(
        count(&database, "select count(*) from requeuest.mq_payloads").await,
        0
    );
}

#[tokio::test]
async fn a_response_is_had_from_elsewhere_before_and_after_it_came() {
    let database = migrated().await;
    let (server, answer) = Server::held(200).await;
    let here = Durable::new(database.pool().clone());
    let there = elsewhere(&database).await;
    let id = here.fire(post(&server.url("/"), "hello")).await.unwrap();
    server.wait_for(1).await;
    let waiting = tokio::spawn({
        let there = there.clone();
        async move { there.response(id).await }
    });
    let also_here = tokio::spawn(async move { here.response(id).await });
    waited_for(&database).await;
    assert!(!waiting.is_finished());
    answer.add_permits(1);
    for waiting in [waiting, also_here] {
        let response = in_time(waiting).await.unwrap().unwrap();
        assert_eq!(response.text().unwrap(), "hello");
    }
    let again = there.response(id).await.unwrap();
    assert_eq!(again.text().unwrap(), "hello");
    assert_eq!(again.id(), id);

    let unknown: RequestId = uuid::Uuid::now_v7().into();
    let error = there.response(unknown).await.unwrap_err();
    assert!(error.is_unknown_id());
    assert_eq!(error.request_id(), Some(unknown));
    assert_eq!(there.status(unknown).await.unwrap(), None);
}

/// Waits until another process's waiter listens.
async fn waited_for(database: &TestDatabase) {
    eventually("somebody elsewhere listens", || async {
        let listening = "select count(*) from pg_stat_activity
            where datname = current_database() and state = 'idle' and query ilike '%listen %requeuest_%'";
        count(database, listening).await > 0
    })
    .await;
    eventually("the request is marked as waited for", || async {
        let marked = "select count(*) from requeuest.mq_msgs where waiter is not null";
        count(database, marked).await > 0
    })
    .await;
}

#[tokio::test]
async fn a_waiter_elsewhere_is_woken_and_does_not_find_out_by_asking() {
    let database = migrated().await;
    let (server, answer) = Server::held(200).await;
    let here = Durable::new(database.pool().clone());
    let there = elsewhere(&database).await;
    let mut took = Vec::new();
    for round in 1..=3 {
        let id = here.fire(post(&server.url("/"), "x")).await.unwrap();
        server.wait_for(round).await;
        let waiting = tokio::spawn({
            let there = there.clone();
            async move { there.response(id).await.map(|_| Instant::now()) }
        });
        // It has just asked, and would ask again a second later.
        waited_for(&database).await;
        let answered = Instant::now();
        answer.add_permits(1);
        took.push(in_time(waiting).await.unwrap().unwrap() - answered);
    }
    took.sort_unstable();
    // One of them may have met a busy machine.
    assert!(took[1] < Duration::from_millis(500), "{took:?}");
}

#[tokio::test]
async fn callers_of_one_handle_are_woken_by_another_that_delivers() {
    let database = migrated().await;
    let server = Server::in_turn(&[503, 200]).await;
    let _runner = Durable::new(database.pool().clone());
    let there = elsewhere(&database).await;
    let request = post(&server.url("/"), "x");
    let response = in_time(there.await_response(request)).await.unwrap();
    assert_eq!(response.status(), 200);
    assert_eq!(server.count(), 2);
}

#[tokio::test]
async fn a_shutdown_lets_attempts_in_flight_finish() {
    let database = migrated().await;
    let (server, answer) = Server::held(200).await;
    let durable = Durable::new(database.pool().clone());
    let caller = tokio::spawn({
        let (durable, request) = (durable.clone(), post(&server.url("/"), "x"));
        async move { durable.await_response(request).await }
    });
    server.wait_for(1).await;
    let shutdown = tokio::spawn({
        let durable = durable.clone();
        async move { durable.shutdown(LONG).await }
    });
    eventually("new requests are refused", || async {
        // Where it is not refused yet, it is rolled back.
        let mut tx = database.pool().begin().await.unwrap();
        let refused = durable.fire_in(&mut *tx, post(&server.url("/"), "late"));
        refused.await.is_err_and(|error| error.is_closed())
    })
    .await;
    assert!(!shutdown.is_finished());
    answer.add_permits(1);
    let response = in_time(caller).await.unwrap().unwrap();
    assert_eq!(response.text().unwrap(), "x");
    in_time(shutdown).await.unwrap().unwrap();
    let completed = "select count(*) from requeuest.outcomes where status = 'completed'";
    assert_eq!(count(&database, completed).await, 1);
}

#[tokio::test]
async fn a_shutdown_gives_back_what_does_not_finish_in_time() {
    let database = migrated().await;
    let (server, _never) = Server::held(200).await;
    let durable = Durable::new(database.pool().clone());
    let id = durable.fire(post(&server.url("/"), "x")).await.unwrap();
    server.wait_for(1).await;
    in_time(durable.shutdown(Duration::ZERO)).await.unwrap();
    let there = elsewhere(&database).await;
    // It may have arrived: it counts as a failed attempt, with a delay that is drawn and may be over already.
    let failed = "select count(*) from requeuest.attempts where error_class = 'abandoned'";
    assert_eq!(count(&database, failed).await, 1);
    let status = there.status(id).await.unwrap().unwrap();
    assert!(
        [Status::Retryable, Status::Available].contains(&status),
        "{status}"
    );
    assert!(!database.pool().is_closed());

    let other = Durable::new(database.pool().clone());
    server.wait_for(2).await;
    drop(other);
}

#[tokio::test]
async fn a_shutdown_does_not_wait_for_the_time_between_two_attempts() {
    let database = migrated().await;
    let server = Server::in_turn(&[503, 200]).await;
    let minute = Duration::from_secs(60);
    let durable = Durable::builder(database.pool().clone())
        .retry(RetryPolicy::constant(minute))
        .build()
        .unwrap();
    let caller = tokio::spawn({
        let (durable, request) = (durable.clone(), post(&server.url("/"), "x"));
        async move { durable.await_response(request).await }
    });
    server.wait_for(1).await;
    eventually("it waits for its retry", || async {
        count(&database, "select count(*) from requeuest.attempts").await == 1
    })
    .await;
    let began = Instant::now();
    in_time(durable.shutdown(LONG)).await.unwrap();
    assert!(
        began.elapsed() < Duration::from_secs(5),
        "{:?}",
        began.elapsed()
    );
    assert!(in_time(caller).await.unwrap().unwrap_err().is_closed());
    // It is in the queue again, and keeps its backoff.
    let waiting = "select count(*) from requeuest.mq_msgs where state = 0 and attempts = 1
                       and attempt_at < now() + interval '1 minute'";
    assert_eq!(count(&database, waiting).await, 1);
    assert_eq!(server.count(), 1);
}

#[tokio::test]
async fn after_a_shutdown_every_call_says_so() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let durable = Durable::new(database.pool().clone());
    let later = post(&server.url("/"), "x").with(Options::default().delay(LONG));
    let id = durable.fire(&later).await.unwrap();
    let waiting = tokio::spawn({
        let durable = durable.clone();
        async move { durable.response(id).await }
    });
    let calling = tokio::spawn({
        let durable = durable.clone();
        async move { durable.await_response(later).await }
    });
    eventually("both are waited for", || async {
        let waited = "select count(*) from requeuest.mq_msgs where waiter is not null";
        count(&database, waited).await == 2
    })
    .await;
    in_time(durable.shutdown(LONG)).await.unwrap();
    assert!(in_time(waiting).await.unwrap().unwrap_err().is_closed());
    assert!(in_time(calling).await.unwrap().unwrap_err().is_closed());

    let request = post(&server.url("/"), "late");
    assert!(durable.fire(&request).await.unwrap_err().is_closed());
    assert!(
        durable
            .await_response(&request)
            .await
            .unwrap_err()
            .is_closed()
    );
    assert!(durable.response(id).await.unwrap_err().is_closed());
    assert!(durable.status(id).await.unwrap_err().is_closed());
    let inside = durable.fire_in(database.pool(), &request).await;
    assert!(inside.unwrap_err().is_closed());
    // Once more is harmless.
    in_time(durable.shutdown(LONG)).await.unwrap();

    let there = elsewhere(&database).await;
    assert_eq!(there.status(id).await.unwrap(), Some(Status::Scheduled));
    assert_eq!(server.count(), 0);
}

#[tokio::test]
async fn ordered_requests_go_one_after_another_in_commit_order() {
    const EACH: usize = 8;
    let database = migrated().await;
    let under_way = Arc::new(Mutex::new(std::collections::HashMap::<String, usize>::new()));
    let server = Server::start(move |number, seen| {
        let under_way = Arc::clone(&under_way);
        async move {
            let key = seen.uri.path().to_owned();
            let at_once = {
                let mut under_way = under_way.lock().unwrap();
                let at_once = under_way.entry(key.clone()).or_default();
                *at_once += 1;
                *at_once
            };
            assert_eq!(at_once, 1, "two of {key} at a time");
            // Room for others to overtake.
            tokio::task::yield_now().await;
            *under_way.lock().unwrap().get_mut(&key).unwrap() -= 1;
            reply(if number % 3 == 0 { 503 } else { 200 }, "")
        }
    })
    .await;
    // Two runners compete, and callers on both.
    let handles = [(); 2].map(|()| {
        Durable::builder(database.pool().clone())
            .retry(quick())
            .build()
            .unwrap()
    });
    let mut last = Vec::new();
    for number in 0..EACH {
        for key in ["/a", "/b", "/c"] {
            let request = post(&server.url(key), number.to_string());
            let request = request.with(Options::default().ordered(key));
            let durable = &handles[number % 2];
            // Through both ways in.
            let id = if number % 4 < 2 {
                durable.fire(request).await.unwrap()
            } else {
                durable.fire_in(database.pool(), request).await.unwrap()
            };
            last.push(id);
        }
    }
    for id in last {
        let outcome = testkit::outcome(&handles[0], id, LONG).await.unwrap();
        assert_eq!(outcome.status(), Status::Completed);
    }
    for key in ["/a", "/b", "/c"] {
        let mut came: Vec<_> = server.seen();
        came.retain(|seen| seen.uri.path() == key);
        let mut bodies: Vec<_> = came.into_iter().map(|seen| seen.body).collect();
        bodies.dedup();
        let order: Vec<_> = (0..EACH).map(|number| number.to_string()).collect();
        assert_eq!(bodies, order, "{key}");
    }
}

#[tokio::test]
async fn the_order_is_that_of_the_commits() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let durable = Durable::new(database.pool().clone());
    let ordered =
        |body: &'static str| post(&server.url("/"), body).with(Options::default().ordered("k"));
    let mut tx = database.pool().begin().await.unwrap();
    let first = durable.fire_in(&mut *tx, ordered("first")).await.unwrap();
    // Waits for the key, which the transaction holds until its end.
    let second = tokio::spawn({
        let (durable, request) = (durable.clone(), ordered("second"));
        async move { durable.fire(request).await }
    });
    // Other keys and requests without one don't.
    let other = post(&server.url("/"), "other").with(Options::default().ordered("l"));
    in_time(durable.await_response(other)).await.unwrap();
    in_time(durable.await_response(post(&server.url("/"), "plain")))
        .await
        .unwrap();
    assert!(!second.is_finished());
    tx.commit().await.unwrap();
    let second = in_time(second).await.unwrap().unwrap();
    for id in [first, second] {
        testkit::outcome(&durable, id, LONG).await.unwrap();
    }
    let bodies: Vec<_> = server.seen().into_iter().map(|seen| seen.body).collect();
    assert_eq!(bodies, ["other", "plain", "first", "second"]);
}

#[tokio::test]
async fn a_failing_head_holds_up_its_own_key_only() {
    let database = migrated().await;
    let healed = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let heals = Arc::clone(&healed);
    let server = Server::start(move |_, seen| {
        let sick = seen.body == "head" && !heals.load(std::sync::atomic::Ordering::SeqCst);
        async move { reply(if sick { 503 } else { 200 }, "") }
    })
    .await;
    let durable = Durable::builder(database.pool().clone())
        .retry(quick())
        .build()
        .unwrap();
    let fire = |body: &'static str, key: &'static str| {
        let options = Options::default().ordered(key);
        durable.fire(post(&server.url("/"), body).with(options))
    };
    let head = fire("head", "sick").await.unwrap();
    let next = fire("next", "sick").await.unwrap();
    let other = fire("other", "well").await.unwrap();
    testkit::outcome(&durable, other, LONG).await.unwrap();
    server.wait_for(4).await;
    assert!(server.seen().iter().all(|seen| seen.body != "next"));
    assert_eq!(durable.status(next).await.unwrap(), Some(Status::Available));

    healed.store(true, std::sync::atomic::Ordering::SeqCst);
    for id in [head, next] {
        testkit::outcome(&durable, id, LONG).await.unwrap();
    }
    assert_eq!(server.seen().pop().unwrap().body, "next");
}

#[tokio::test]
async fn keys_run_side_by_side() {
    let database = migrated().await;
    let (server, answer) = Server::held(200).await;
    let durable = Durable::new(database.pool().clone());
    let mut ids = Vec::new();
    for key in ["a", "a", "b", "c"] {
        let request = post(&server.url("/"), key).with(Options::default().ordered(key));
        ids.push(durable.fire(request).await.unwrap());
    }
    // All heads are in flight at the same time, the second of a key is not.
    server.wait_for(3).await;
    let mut bodies: Vec<_> = server.seen().into_iter().map(|seen| seen.body).collect();
    bodies.sort_unstable();
    assert_eq!(bodies, ["a", "b", "c"]);
    answer.add_permits(4);
    for id in ids {
        testkit::outcome(&durable, id, LONG).await.unwrap();
    }
}

#[tokio::test]
async fn every_state_on_the_way_is_seen_from_elsewhere() {
    let database = migrated().await;
    let go = Arc::new(Notify::new());
    let gate = Arc::clone(&go);
    let server = Server::start(move |number, _| {
        let gate = Arc::clone(&gate);
        async move {
            gate.notified().await;
            reply(if number == 0 { 503 } else { 200 }, "")
        }
    })
    .await;
    let there = elsewhere(&database).await;
    let day = Duration::from_secs(24 * 60 * 60);
    let options = Options::default()
        .delay(day)
        .retry(RetryPolicy::constant(day));
    let request = post(&server.url("/"), "x").with(options);
    let id = there.fire(request).await.unwrap();
    let state = || async { there.status(id).await.unwrap().unwrap() };
    assert_eq!(state().await, Status::Scheduled);

    due(&database).await;
    assert_eq!(state().await, Status::Available);
    let _runner = Durable::new(database.pool().clone());
    server.wait_for(1).await;
    assert_eq!(state().await, Status::Running);
    go.notify_one();
    eventually("the attempt failed", || async {
        state().await == Status::Retryable
    })
    .await;
    due(&database).await;
    server.wait_for(2).await;
    assert_eq!(state().await, Status::Running);
    go.notify_one();
    let response = in_time(there.response(id)).await.unwrap();
    assert_eq!(response.status(), 200);
    assert_eq!(state().await, Status::Completed);
}

/// Lets the time come that everything waits for.
async fn due(database: &TestDatabase) {
    sqlx::query("update requeuest.mq_msgs set attempt_at = now()")
        .execute(database.pool())
        .await
        .unwrap();
}

#[tokio::test]
async fn a_request_held_between_two_attempts_is_seen_as_retryable() {
    let database = migrated().await;
    let server = Server::always(503).await;
    let durable = Durable::builder(database.pool().clone())
        .retry(RetryPolicy::constant(Duration::from_secs(60)))
        .build()
        .unwrap();
    let there = elsewhere(&database).await;
    let caller = tokio::spawn({
        let request = post(&server.url("/"), "x");
        async move { durable.await_response(request).await }
    });
    server.wait_for(1).await;
    let id: uuid::Uuid = sqlx::query_scalar("select id from requeuest.mq_msgs")
        .fetch_one(database.pool())
        .await
        .unwrap();
    eventually("it waits for its retry", || async {
        there.status(id.into()).await.unwrap() == Some(Status::Retryable)
    })
    .await;
    caller.abort();
}

#[tokio::test]
async fn requests_held_between_two_attempts_leave_the_runner_room_for_others() {
    let database = migrated().await;
    let (failing, answer) = Server::held(503).await;
    let server = Server::always(200).await;
    let durable = Durable::builder(database.pool().clone())
        .concurrency(1)
        .build()
        .unwrap();
    let retry = RetryPolicy::constant(Duration::from_secs(60));
    let held = post(&failing.url("/"), "x").with(Options::default().retry(retry));
    // By way of the queue, so that the runner has it.
    let id = durable.fire_in(database.pool(), held).await.unwrap();
    failing.wait_for(1).await;
    let mut caller = std::pin::pin!(durable.response(id));
    tokio::select! {
        biased;
        ended = &mut caller => panic!("{ended:?}"),
        () = std::future::ready(()) => {}
    }
    answer.add_permits(1);
    eventually("it waits for its retry", || async {
        durable.status(id).await.unwrap() == Some(Status::Retryable)
    })
    .await;
    let other = post(&server.url("/"), "y");
    durable.fire_in(database.pool(), other).await.unwrap();
    server.wait_for(1).await;
    assert_eq!(failing.count(), 1);
}

#[tokio::test]
async fn many_waiters_elsewhere_each_get_their_own_response() {
    let database = migrated().await;
    let server = Server::start(|_, seen| async move { reply(200, seen.body) }).await;
    let waiting = elsewhere(&database).await;
    let mut callers = tokio::task::JoinSet::new();
    for number in 0..250 {
        let durable = waiting.clone();
        let request = http::Request::post(server.url("/"))
            .body(number.to_string())
            .unwrap();
        callers.spawn(async move { (number, durable.await_response(request).await.unwrap()) });
    }
    let queued = "select count(*) from requeuest.mq_msgs";
    eventually("all are enqueued", || async {
        count(&database, queued).await == 250
    })
    .await;
    // More than the payload of one notification names, settled in a few batches.
    let _delivering = Durable::new(database.pool().clone());
    for (number, response) in in_time(callers.join_all()).await {
        assert_eq!(response.text().unwrap(), number.to_string());
    }
    assert_eq!(server.count(), 250);
}
