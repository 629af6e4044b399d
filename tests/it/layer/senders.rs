//! Which client sends an attempt, and what becomes of attempts without a caller.

use std::sync::atomic::Ordering;
use std::time::Duration;

use requeuest::retry::RetryPolicy;
use requeuest::{Body, DurableLayer, Options, Status};
use tower::{Layer, ServiceBuilder, ServiceExt};
use tower_http::set_header::SetRequestHeaderLayer;

use super::{INNER, YES, counting, http_post, id_of, quick_layer, with_options};
use crate::support::{
    Server, builder, eventually_rows, hyper_client, in_time, migrated, only_id, outcome_of,
    passing, post,
};

#[tokio::test]
async fn background_attempts_go_through_the_wrapped_service() {
    let database = migrated().await;
    let server = Server::in_turn(&[503, 503, 200]).await;
    let (client, calls) = counting();
    let client = ServiceBuilder::new()
        .layer(quick_layer(&database))
        .layer(SetRequestHeaderLayer::overriding(INNER, YES))
        .service(client);
    let durable = client.durable().clone();
    let request = with_options(http_post(server.url("/"), "x"), Options::default().fire());
    let id = id_of(&in_time(client.oneshot(request)).await.unwrap());
    let outcome = outcome_of(&durable, id).await;
    assert_eq!(outcome.into_result().unwrap().status(), 200);
    assert_eq!(calls.load(Ordering::SeqCst), 3);
    // Every attempt has the header that the inner layer sets, though the stored request doesn't.
    for seen in server.seen() {
        assert_eq!(seen.headers[INNER], "yes");
    }
}

#[tokio::test]
async fn a_configured_transport_sends_only_background_attempts() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let (background, background_calls) = counting();
    let (live, live_calls) = counting();
    let durable = builder(&database).transport(background).build().unwrap();
    let client = durable.layer().layer(live);

    in_time(client.clone().oneshot(http_post(server.url("/"), "x")))
        .await
        .unwrap();
    assert_eq!(live_calls.load(Ordering::SeqCst), 1);
    assert_eq!(background_calls.load(Ordering::SeqCst), 0);

    let later = Options::default().delay(Duration::from_millis(1)).fire();
    let response = in_time(client.oneshot(with_options(http_post(server.url("/"), "x"), later)))
        .await
        .unwrap();
    in_time(durable.response(id_of(&response))).await.unwrap();
    assert_eq!(live_calls.load(Ordering::SeqCst), 1);
    assert_eq!(background_calls.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn nothing_is_sent_before_a_service_is_wrapped() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let layer = DurableLayer::<Body>::new(database.pool().clone());
    let durable = layer.durable().clone();
    let request = post(server.url("/"), "x");
    let here = durable.fire(&request).await.unwrap();
    let other = builder(&database).runner(false).build().unwrap();
    let there = other.fire(&request).await.unwrap();

    // Longer than the interval between a runner's polls.
    passing(&database, Duration::from_millis(1500)).await;
    assert_eq!(server.count(), 0);
    for id in [here, there] {
        let status = durable.status(id).await.unwrap();
        assert_eq!(status, Some(Status::Available));
    }

    let (client, calls) = counting();
    let _client = layer.layer(client);
    for id in [here, there] {
        outcome_of(&durable, id).await;
    }
    assert_eq!(calls.load(Ordering::SeqCst), 2);
}

#[tokio::test]
async fn dropping_the_caller_cancels_nothing() {
    let database = migrated().await;
    let (server, answer) = Server::held(200).await;
    let layer = DurableLayer::new(database.pool().clone());
    let durable = layer.durable().clone();
    let client = layer.layer(hyper_client());
    let caller = tokio::spawn(client.oneshot(http_post(server.url("/"), "late")));
    server.wait_for(1).await;
    caller.abort();
    assert!(in_time(caller).await.unwrap_err().is_cancelled());
    let id = only_id(&database, "mq_msgs").await;

    answer.add_permits(1);
    let response = in_time(durable.response(id)).await.unwrap();
    assert_eq!(response.text().unwrap(), "late");
    // The same attempt finished: there was no second one.
    assert_eq!(server.count(), 1);
}

#[tokio::test]
async fn the_runner_retries_for_a_caller_dropped_between_attempts() {
    let database = migrated().await;
    let server = Server::in_turn(&[503, 200]).await;
    let (background, background_calls) = counting();
    let (live, live_calls) = counting();
    let durable = builder(&database)
        .retry(RetryPolicy::constant(Duration::from_secs(1)))
        .transport(background)
        .build()
        .unwrap();
    let client = durable.layer().layer(live);
    let caller = tokio::spawn(client.oneshot(http_post(server.url("/"), "x")));
    // The first attempt has failed.
    eventually_rows(&database, "attempts", 1).await;
    caller.abort();
    eventually_rows(&database, "outcomes WHERE attempts = 2", 1).await;
    let calls = live_calls.load(Ordering::SeqCst) + background_calls.load(Ordering::SeqCst);
    assert_eq!(calls, 2);
}

#[tokio::test]
async fn an_attempt_in_flight_outlives_every_handle() {
    let database = migrated().await;
    let (server, answer) = Server::held(200).await;
    let client = DurableLayer::new(database.pool().clone()).layer(hyper_client());
    let caller = tokio::spawn(client.oneshot(http_post(server.url("/"), "x")));
    server.wait_for(1).await;
    caller.abort();
    assert!(in_time(caller).await.unwrap_err().is_cancelled());
    answer.add_permits(1);
    eventually_rows(&database, "outcomes WHERE status = 'completed'", 1).await;
}

#[tokio::test]
async fn requests_claimed_by_the_runner_use_the_callers_service() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let (background, background_calls) = counting();
    let durable = builder(&database).transport(background).build().unwrap();
    let (own, own_calls) = counting();
    let service = durable.layer().layer(own);
    let later = Options::default().delay(Duration::from_millis(50));
    for options in [later, Options::default().ordered("k")] {
        let request = with_options(http_post(server.url("/"), "x"), options);
        assert_eq!(
            in_time(service.clone().oneshot(request))
                .await
                .unwrap()
                .status(),
            200
        );
    }
    assert_eq!(own_calls.load(Ordering::SeqCst), 2);
    assert_eq!(background_calls.load(Ordering::SeqCst), 0);
}
