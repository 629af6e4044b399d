//! Each stored request names its destination: in its group, or in a column of its own.

use std::collections::BTreeSet;
use std::sync::Arc;

use bytes::Bytes;
use http_body_util::Full;
use requeuest::client::{Channels, Client};
use requeuest::{DeadLetterFilter, Durable, Guarantee, Options, Resolution, Status};
use tokio::sync::Semaphore;
use tower::{ServiceBuilder, ServiceExt};

use crate::support::{
    LONG, Server, builder, end_three, hyper_client, in_time, migrated, outcome_of, post, quick,
    reply, with_middleware,
};

/// The destination of each row, in the order of arrival.
const DESTINATIONS: &str = "
    SELECT coalesce(destination, substr(channel_args, 8)) FROM requeuest.mq_msgs
    ORDER BY created_at, seq";

/// Its port refuses connections, so that requests stay in the queue.
const URL: &str = "http://user:secret@Localhost:1/path?token";
const DESTINATION: &str = "http://localhost:1";

#[tokio::test]
async fn every_way_into_the_queue_stores_the_destination() {
    let database = migrated().await;
    let durable = Durable::builder(database.pool().clone())
        .deliver(["another"])
        .build()
        .unwrap();
    let client = Client::new(database.pool().clone(), Channels::List(&["another"]))
        .await
        .unwrap();
    let request = |options| post(URL, "x").with(options);
    let ordered = || Options::default().ordered("key");

    durable.fire(request(Options::default())).await.unwrap();
    durable.fire(request(ordered())).await.unwrap();
    durable
        .fire_in(database.pool(), request(ordered().supersede("s")))
        .await
        .unwrap();
    let many = [request(Options::default()), request(ordered())];
    durable.fire_many(many).await.unwrap();
    client
        .spawn_cfg("c", &post(URL, "x"), |job| {
            job.set_channel_args("a group of its own");
        })
        .await
        .unwrap();

    let stored: Vec<String> = sqlx::query_scalar(DESTINATIONS)
        .fetch_all(database.pool())
        .await
        .unwrap();
    assert_eq!(stored, [DESTINATION; 6]);
}

#[tokio::test]
async fn a_replayed_request_keeps_its_destination() {
    let database = migrated().await;
    let durable = builder(&database)
        .retry(quick().max_attempts(1))
        .build()
        .unwrap();
    let request = post(URL, "x").with(Options::default().ordered("key"));
    let id = durable.fire(request).await.unwrap();
    outcome_of(&durable, id).await;
    durable.shutdown(LONG).await.unwrap();
    let elsewhere = builder(&database).deliver(["another"]).build().unwrap();
    elsewhere.replay(id).await.unwrap();
    let stored: Vec<String> = sqlx::query_scalar(DESTINATIONS)
        .fetch_all(database.pool())
        .await
        .unwrap();
    assert_eq!(stored, [DESTINATION]);
}

#[tokio::test]
async fn a_limit_key_is_the_destination_on_every_way_into_the_queue() {
    let database = migrated().await;
    let durable = Durable::builder(database.pool().clone())
        .deliver(["another"])
        .build()
        .unwrap();
    let options = || Options::default().limit_key("tenant-7");
    let ordered = || options().ordered("key");
    let request = |options| post(URL, "x").with(options);

    durable.fire(request(options())).await.unwrap();
    durable.fire(request(ordered())).await.unwrap();
    durable
        .fire_in(database.pool(), request(ordered().supersede("s")))
        .await
        .unwrap();
    let many = [request(options()), request(ordered())];
    durable.fire_many(many).await.unwrap();
    let layered = ServiceBuilder::new()
        .layer(durable.layer())
        .service(hyper_client());
    let mut fired = http::Request::post(URL)
        .body(Full::<Bytes>::from("x"))
        .unwrap();
    fired.extensions_mut().insert(options().fire());
    in_time(layered.oneshot(fired)).await.unwrap();
    let client = with_middleware(reqwest::Client::new(), &durable);
    let fired = client.post(URL).with_extension(options().fire());
    in_time(fired.send()).await.unwrap();

    let stored: Vec<String> = sqlx::query_scalar(DESTINATIONS)
        .fetch_all(database.pool())
        .await
        .unwrap();
    assert_eq!(stored, ["tenant-7"; 7]);
}

#[tokio::test]
async fn a_dead_letter_says_where_it_went_and_returns_with_its_limit_key() {
    let database = migrated().await;
    let server = Server::always(500).await;
    let durable = builder(&database)
        .retry(quick().max_attempts(1))
        .build()
        .unwrap();
    let longest = "\u{1f}".repeat(255);
    let keys = ["tenant-7", "\"a\"}}\\ /é\u{1}\t\n\u{7f}\u{1f600}", &longest];
    let mut number = 0;
    for key in keys {
        for guarantee in [Guarantee::AtLeastOnce, Guarantee::AtMostOnce] {
            number += 1;
            let options = || Options::default().limit_key(key).guarantee(guarantee);
            end_three(&durable, &server.url("/"), number, options).await;
        }
    }
    durable.shutdown(LONG).await.unwrap();

    // Does not deliver them.
    let elsewhere = builder(&database).deliver(["another"]).build().unwrap();
    let here = DeadLetterFilter::default().destination(server.url(""));
    let letters = elsewhere.dead_letters(&here).await.unwrap();
    assert_eq!(letters.len(), 18);
    for letter in letters {
        assert_eq!(letter.destination, Some(server.url("")));
        if letter.status == Status::Ambiguous {
            let resolved = elsewhere.resolve(letter.id, Resolution::NotSent);
            resolved.await.unwrap();
        }
    }
    assert_eq!(elsewhere.replay_all(&here).await.unwrap().len(), 9);
    let stored: Vec<String> = sqlx::query_scalar(DESTINATIONS)
        .fetch_all(database.pool())
        .await
        .unwrap();
    assert_eq!(stored.len(), 18);
    let stored: BTreeSet<&str> = stored.iter().map(|name| &**name).collect();
    assert_eq!(stored, BTreeSet::from(keys));
}

#[tokio::test]
async fn a_slow_tenant_of_a_host_does_not_delay_another_tenant_of_it() {
    let database = migrated().await;
    let answers = Arc::new(Semaphore::new(0));
    let gate = Arc::clone(&answers);
    let server = Server::start(move |_, seen| {
        let gate = Arc::clone(&gate);
        async move {
            if seen.uri.path() == "/slow" {
                let _permit = gate.acquire().await;
            }
            reply(200, "")
        }
    })
    .await;
    let durable = builder(&database).concurrency(4).build().unwrap();
    let of = |tenant: &str| {
        let path = format!("/{tenant}");
        post(server.url(&path), "x").with(Options::default().limit_key(tenant))
    };
    // Some are attempted at once, and polls find the others.
    for _ in 0..10 {
        durable.fire(of("slow")).await.unwrap();
    }
    durable
        .fire_many((0..40).map(|_| of("slow")))
        .await
        .unwrap();
    server.wait_for(1).await;
    for _ in 0..10 {
        let response = in_time(durable.await_response(of("good"))).await.unwrap();
        assert_eq!(response.status(), 200);
    }
    let ids = durable.fire_many((0..10).map(|_| of("good"))).await;
    for id in ids.unwrap() {
        assert_eq!(outcome_of(&durable, id).await.status(), Status::Completed);
    }
    let slow = |seen: &&crate::support::Seen| seen.uri.path() == "/slow";
    let attempted = server.seen().iter().filter(slow).count();
    assert!(attempted < 4, "{attempted} slow attempts took all slots");
    answers.close();
}
