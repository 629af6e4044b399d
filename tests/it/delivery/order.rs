//! Requests with ordering keys.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use requeuest::{Options, Status};

use crate::support::{Server, builder, handle, in_time, migrated, outcome_of, post, quick, reply};

#[tokio::test]
async fn ordered_requests_are_sent_one_at_a_time_in_commit_order() {
    const EACH: usize = 8;
    let database = migrated().await;
    let in_flight = Arc::new(Mutex::new(HashMap::<String, usize>::new()));
    let server = Server::start(move |number, seen| {
        let in_flight = Arc::clone(&in_flight);
        async move {
            let key = seen.uri.path().to_owned();
            let at_once = {
                let mut in_flight = in_flight.lock().unwrap();
                let at_once = in_flight.entry(key.clone()).or_default();
                *at_once += 1;
                *at_once
            };
            assert_eq!(at_once, 1, "two of {key} at a time");
            // A chance for other requests to overtake.
            tokio::task::yield_now().await;
            *in_flight.lock().unwrap().get_mut(&key).unwrap() -= 1;
            reply(if number % 3 == 0 { 503 } else { 200 }, "")
        }
    })
    .await;
    // Two runners compete, and both handles have callers.
    let handles = [(); 2].map(|()| builder(&database).retry(quick()).build().unwrap());
    let mut last = Vec::new();
    for number in 0..EACH {
        for key in ["/a", "/b", "/c"] {
            let request = post(server.url(key), number.to_string());
            let request = request.with(Options::default().ordered(key));
            let durable = &handles[number % 2];
            // Both entry points are used.
            let id = if number % 4 < 2 {
                durable.fire(request).await.unwrap()
            } else {
                durable.fire_in(database.pool(), request).await.unwrap()
            };
            last.push(id);
        }
    }
    for id in last {
        let outcome = outcome_of(&handles[0], id).await;
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
async fn an_open_transaction_holds_up_only_its_ordering_key() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let durable = handle(&database);
    let ordered =
        |body: &'static str| post(server.url("/"), body).with(Options::default().ordered("k"));
    let mut tx = database.pool().begin().await.unwrap();
    let first = durable.fire_in(&mut *tx, ordered("first")).await.unwrap();
    // This call waits for the key, which the transaction holds until it ends.
    let second = tokio::spawn({
        let (durable, request) = (durable.clone(), ordered("second"));
        async move { durable.fire(request).await }
    });
    // Requests with another key or without a key don't wait.
    let other = post(server.url("/"), "other").with(Options::default().ordered("l"));
    in_time(durable.await_response(other)).await.unwrap();
    in_time(durable.await_response(post(server.url("/"), "plain")))
        .await
        .unwrap();
    assert!(!second.is_finished());
    tx.commit().await.unwrap();
    let second = in_time(second).await.unwrap().unwrap();
    for id in [first, second] {
        outcome_of(&durable, id).await;
    }
    assert_eq!(server.bodies(), ["other", "plain", "first", "second"]);
}

#[tokio::test]
async fn a_failing_head_holds_up_only_its_ordering_key() {
    let database = migrated().await;
    let recovered = Arc::new(AtomicBool::new(false));
    let has_recovered = Arc::clone(&recovered);
    let server = Server::start(move |_, seen| {
        let fails = seen.body == "head" && !has_recovered.load(Ordering::SeqCst);
        async move { reply(if fails { 503 } else { 200 }, "") }
    })
    .await;
    let durable = builder(&database).retry(quick()).build().unwrap();
    let fire = |body: &'static str, key: &'static str| {
        let options = Options::default().ordered(key);
        durable.fire(post(server.url("/"), body).with(options))
    };
    let head = fire("head", "failing").await.unwrap();
    let next = fire("next", "failing").await.unwrap();
    let other = fire("other", "healthy").await.unwrap();
    outcome_of(&durable, other).await;
    server.wait_for(4).await;
    assert!(server.seen().iter().all(|seen| seen.body != "next"));
    assert_eq!(durable.status(next).await.unwrap(), Some(Status::Available));

    recovered.store(true, Ordering::SeqCst);
    for id in [head, next] {
        outcome_of(&durable, id).await;
    }
    assert_eq!(server.seen().pop().unwrap().body, "next");
}

#[tokio::test]
async fn ordering_keys_run_in_parallel() {
    let database = migrated().await;
    let (server, answer) = Server::held(200).await;
    let durable = handle(&database);
    let mut ids = Vec::new();
    for key in ["a", "a", "b", "c"] {
        let request = post(server.url("/"), key).with(Options::default().ordered(key));
        ids.push(durable.fire(request).await.unwrap());
    }
    // The first request of each key is in flight. The second request of `a` is not.
    server.wait_for(3).await;
    let mut bodies = server.bodies();
    bodies.sort_unstable();
    assert_eq!(bodies, ["a", "b", "c"]);
    answer.add_permits(4);
    for id in ids {
        outcome_of(&durable, id).await;
    }
}
