//! The target of a request: what goes in is what is sent, by whichever client.

use bytes::Bytes;
use http_body_util::Full;
use requeuest::{Durable, Error, HeaderMap, Options, Request, ReqwestTransport, Url};
use tower::{Layer, ServiceExt};

use crate::support::{
    Server, assert_nothing_persisted, builder, hyper_client, in_time, migrated, outcome_of, post,
    quick, with_middleware,
};

/// What clients over `url::Url` would send as something else.
const CHANGED: [&str; 5] = [
    "/a/hunter2/%2e%2e/b/./c?x=%zz|y'",
    "/hunter2/../b",
    "/b/.?hunter2",
    "/b?hunter2='x'",
    "/hunter2/{b}",
];

/// Odd, and the same for every client.
const KEPT: [&str; 5] = [
    "/a//b/...c/.well-known?x=%zz|y%27",
    "/%2F%7euser/%C3%A9;v=1,2?",
    "/a:b@c/(d)*!$&+=~_-?a=b?c=d/../e",
    "/?{}[]^",
    "/?",
];

fn assert_refused(error: &Error) {
    assert_eq!(error.field(), Some("url"), "{error:?}");
    let shown = format!("{error} {error:?}");
    assert!(!shown.contains("hunter2"), "{shown}");
}

fn with_body(url: &str) -> http::Request<Full<Bytes>> {
    http::Request::post(url).body("x".into()).unwrap()
}

#[tokio::test]
async fn a_url_that_clients_would_change_is_refused_on_all_ways_in() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let durable = builder(&database).build().unwrap();
    let service = durable.layer().layer(hyper_client());
    let own = builder(&database).build_layer().unwrap();
    let own = own.layer(hyper_client());
    for target in CHANGED {
        let url = server.url(target);
        let plain = || http::Request::post(&url).body("x").unwrap();
        assert_refused(&Request::try_from(plain()).unwrap_err());
        assert_refused(&durable.fire(plain()).await.unwrap_err());
        let error = durable.fire_in(database.pool(), plain()).await;
        assert_refused(&error.unwrap_err());
        assert_refused(&durable.fire_many([plain()]).await.unwrap_err());
        assert_refused(&durable.await_response(plain()).await.unwrap_err());
        for service in [service.clone(), own.clone()] {
            let error = in_time(service.clone().oneshot(with_body(&url))).await;
            assert_refused(&error.unwrap_err());
            let mut fired = with_body(&url);
            fired.extensions_mut().insert(Options::default().fire());
            assert_refused(&in_time(service.oneshot(fired)).await.unwrap_err());
        }
    }
    assert_nothing_persisted(&database).await;
    assert_eq!(server.count(), 0);
}

#[tokio::test]
async fn what_a_url_has_changed_before_is_sent_as_it_is_then() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let durable = builder(&database).build().unwrap();
    let client = with_middleware(reqwest::Client::new(), &durable);
    // reqwest and `Url` change it when they take it, before this crate sees it.
    let url = server.url(CHANGED[0]);
    in_time(client.post(&url).body("x").send()).await.unwrap();
    let parsed = Url::parse(&url).unwrap();
    let request = Request::post(parsed.clone(), b"x".to_vec(), HeaderMap::new());
    let id = durable.fire(request).await.unwrap();
    outcome_of(&durable, id).await;
    for seen in server.seen() {
        assert_eq!(seen.uri.to_string(), "/a/b/c?x=%zz|y%27");
        assert_eq!(seen.uri.query(), parsed.query());
    }
    assert_eq!(server.count(), 2);
}

/// Makes the first attempt through a client of the caller's, and the second through the transport.
async fn attempts(durable: &Durable, server: &Server, target: &str) {
    let before = server.count();
    let service = durable.layer().layer(hyper_client());
    let response = in_time(service.oneshot(with_body(&server.url(target)))).await;
    assert_eq!(response.unwrap().status(), 200);
    let id = durable.fire(post(server.url(target), "x")).await.unwrap();
    outcome_of(durable, id).await;
    let client = with_middleware(reqwest::Client::new(), durable);
    let sent = client.post(server.url(target)).body("x").send();
    assert_eq!(in_time(sent).await.unwrap().status(), 200);
    let seen = server.seen();
    assert_eq!(seen.len(), before + 3);
    for seen in &seen[before..] {
        assert_eq!(seen.uri.to_string(), target);
    }
}

#[tokio::test]
async fn every_client_sends_the_target_as_given() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let plain = builder(&database).retry(quick()).build().unwrap();
    let reqwest = builder(&database)
        .channel("reqwest")
        .transport(ReqwestTransport::new(reqwest::Client::new()))
        .build()
        .unwrap();
    let hyper = builder(&database)
        .channel("hyper")
        .transport(hyper_client());
    let hyper = hyper.build().unwrap();
    for target in KEPT {
        for durable in [&plain, &reqwest, &hyper] {
            attempts(durable, &server, target).await;
        }
    }
}
