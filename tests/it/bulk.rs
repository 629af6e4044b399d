//! `fire_many`: all requests or none are persisted, and they keep their order.

use std::convert::Infallible;
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream;
use requeuest::{Durable, Error, Options, Request};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::support::{
    Server, builder, count, eventually, eventually_rows, in_time, migrated, outcome_of, passing,
    post, rows,
};

#[tokio::test]
async fn many_requests_are_delivered_once_each() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let durable = Durable::new(database.pool().clone());
    let requests = (0..2500).map(|number: usize| {
        let request = post(server.url("/"), number.to_string());
        // One in a hundred has a key.
        match number % 100 {
            0 => request.with(Options::default().key(number.to_string())),
            _ => request,
        }
    });
    let ids = in_time(durable.fire_many(requests)).await.unwrap();
    assert_eq!(ids.len(), 2500);
    for number in [0, 1, 999, 1000, 2499] {
        let outcome = outcome_of(&durable, ids[number]).await;
        assert_eq!(outcome.into_result().unwrap().status(), 200);
    }
    eventually_rows(&database, "mq_msgs", 0).await;
    let mut bodies: Vec<usize> = server
        .seen()
        .iter()
        .map(|seen| std::str::from_utf8(&seen.body).unwrap().parse().unwrap())
        .collect();
    bodies.sort_unstable();
    assert!(bodies.into_iter().eq(0..2500));
}

#[tokio::test]
async fn requests_of_a_key_keep_their_order() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let durable = Durable::new(database.pool().clone());
    let requests = (0..120).map(|number: usize| {
        let key = ["a", "b", "c"][number % 3];
        let request = post(server.url("/"), format!("{key}{number:03}"));
        request.with(Options::default().ordered(key))
    });
    in_time(durable.fire_many(requests)).await.unwrap();
    server.wait_for(120).await;
    for key in ["a", "b", "c"] {
        let mut bodies = server.seen();
        bodies.retain(|seen| seen.body.starts_with(key.as_bytes()));
        assert_eq!(bodies.len(), 40);
        assert!(bodies.is_sorted_by_key(|seen| seen.body.clone()), "{key}");
    }
}

#[tokio::test]
async fn one_refused_request_keeps_all_from_being_persisted() {
    let database = migrated().await;
    let durable = builder(&database).runner(false).build().unwrap();
    let url = "http://127.0.0.1:9/";
    let with_last = |last: Options| {
        let many = (0..1500).map(|_| post(url, "x").with(Options::default().ordered("k")));
        many.chain([post(url, "last").with(last)])
    };
    let invalid = Options::default().channel("");
    let error = in_time(durable.fire_many(with_last(invalid))).await;
    assert_eq!(error.unwrap_err().field(), Some("channel"));
    let other_channel = || Options::default().ordered("k").channel("other");
    let error = in_time(durable.fire_many(with_last(other_channel()))).await;
    let error = error.unwrap_err();
    assert!(error.is_order_conflict());
    assert!(
        error.to_string().contains(r#"the ordering key "k""#),
        "{error}"
    );
    let few = [
        post(url, "x").with(Options::default().ordered("k")),
        post(url, "x").with(other_channel()),
    ];
    let error = in_time(durable.fire_many(few)).await;
    assert!(error.unwrap_err().is_order_conflict());

    // An `http` request that can't be converted is refused too.
    let relative = http::Request::post("/relative").body("").unwrap();
    let error: Error = in_time(durable.fire_many([relative])).await.unwrap_err();
    assert_eq!(error.field(), Some("url"));
    assert!(
        durable
            .fire_many([] as [Request; 0])
            .await
            .unwrap()
            .is_empty()
    );
    assert_eq!(rows(&database, "mq_msgs").await, 0);
}

#[tokio::test]
async fn a_callers_transaction_persists_all_requests_or_none() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let durable = Durable::new(database.pool().clone());
    let requests = |body: &'static str| {
        let url = server.url("/");
        (0..1200).map(move |_| post(&url, body))
    };
    let mut transaction = database.pool().begin().await.unwrap();
    let lost = durable
        .fire_many_in(&mut transaction, requests("lost"))
        .await
        .unwrap();
    transaction.rollback().await.unwrap();
    let mut transaction = database.pool().begin().await.unwrap();
    let ids = durable
        .fire_many_in(&mut transaction, requests("sent"))
        .await
        .unwrap();
    transaction.commit().await.unwrap();
    assert_eq!((lost.len(), ids.len()), (1200, 1200));
    assert_eq!(durable.status(lost[0]).await.unwrap(), None);
    server.wait_for(1200).await;
    assert!(server.seen().iter().all(|seen| seen.body == "sent"));
}

#[tokio::test]
async fn a_dropped_fire_many_leaves_nothing_behind() {
    let database = migrated().await;
    let durable = builder(&database).runner(false).build().unwrap();
    let mut transaction = database.pool().begin().await.unwrap();
    let held = Options::default().ordered("held");
    let url = "http://127.0.0.1:9/";
    durable
        .fire_in(&mut *transaction, post(url, "x").with(held.clone()))
        .await
        .unwrap();
    // The call has written a thousand requests when it waits for the key of the last one.
    let many = (0..1000).map(|_| post(url, "x"));
    let many: Vec<_> = many.chain([post(url, "x").with(held)]).collect();
    let firing = tokio::spawn({
        let durable = durable.clone();
        async move { durable.fire_many(many).await }
    });
    let waiting = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted
                   AND database = (
                       SELECT oid FROM pg_database WHERE datname = current_database()
                   )";
    eventually("the call waits for the key", || async {
        count(&database, waiting).await == 1
    })
    .await;
    firing.abort();
    assert!(firing.await.unwrap_err().is_cancelled());
    transaction.commit().await.unwrap();
    eventually("the session of the call is gone", || async {
        let idle = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()
                    AND state LIKE 'idle in transaction%'";
        count(&database, waiting).await == 0 && count(&database, idle).await == 0
    })
    .await;
    assert_eq!(rows(&database, "mq_msgs").await, 1);
}

#[tokio::test]
async fn fire_many_with_keys_in_opposite_order_never_deadlocks() {
    let database = migrated().await;
    let durable = builder(&database).runner(false).build().unwrap();
    let mut firing = JoinSet::new();
    for round in 0..40 {
        let durable = durable.clone();
        firing.spawn(async move {
            let mut keys: Vec<usize> = (0..20).collect();
            if round % 2 == 0 {
                keys.reverse();
            }
            let requests = keys.into_iter().map(|key| {
                let request = post("http://127.0.0.1:9/", "x");
                request.with(Options::default().ordered(key.to_string()))
            });
            durable.fire_many(requests).await
        });
    }
    for fired in in_time(firing.join_all()).await {
        fired.unwrap();
    }
    assert_eq!(rows(&database, "mq_msgs").await, 800);
}

#[tokio::test]
async fn no_transaction_is_open_before_the_first_streams_are_read() {
    let database = migrated().await;
    let durable = builder(&database).runner(false).build().unwrap();
    let (parts, stream) = mpsc::unbounded_channel::<Result<Bytes, Infallible>>();
    let stream = stream::unfold(stream, |mut parts| async {
        Some((parts.recv().await?, parts))
    });
    let request = reqwest::Client::new()
        .post("http://localhost/")
        .body(reqwest::Body::wrap_stream(stream));
    let firing = tokio::spawn({
        let durable = durable.clone();
        async move { durable.fire_many([request]).await }
    });
    parts.send(Ok(Bytes::from("slow "))).unwrap();
    passing(&database, Duration::from_millis(200)).await;
    let open = "SELECT count(*) FROM pg_stat_activity
        WHERE datname = current_database() AND state = 'idle in transaction'";
    assert_eq!(count(&database, open).await, 0);
    parts.send(Ok(Bytes::from("stream"))).unwrap();
    drop(parts);
    assert_eq!(in_time(firing).await.unwrap().unwrap().len(), 1);
}
