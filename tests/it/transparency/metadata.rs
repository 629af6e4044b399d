//! Headers, versions, URLs, timeouts and redirects.

use std::convert::Infallible;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use http::{HeaderValue, Request, Response, Version};
use requeuest::{Body, FailureClass, ReqwestTransport, Status, reqwest};

use super::{Got, durable, plain_builder, reqwest_client, soon};
use crate::support::{
    Server, closed_port, in_time, migrated, outcome_of, post, reply, rows, with_middleware,
};

#[tokio::test]
async fn sensitive_values_stay_marked_in_storage() {
    let database = migrated().await;
    let flags = Arc::new(Mutex::new(Vec::new()));
    let record = Arc::clone(&flags);
    let transport = tower::service_fn(move |request: Request<Body>| {
        let marked = |value: &HeaderValue| (value.clone(), value.is_sensitive());
        record
            .lock()
            .unwrap()
            .extend(request.headers().get_all("x-key").iter().map(marked));
        async {
            let mut secret = HeaderValue::from_static("session");
            secret.set_sensitive(true);
            let response = Response::builder()
                .header("x-key", secret)
                .header("x-key", "theme=dark")
                .body(Body::empty());
            Ok::<_, Infallible>(response.unwrap())
        }
    });
    let durable = plain_builder(&database)
        .transport(transport)
        .build()
        .unwrap();

    let mut secret = HeaderValue::from_static("secret");
    secret.set_sensitive(true);
    let request = Request::get("http://example.com/")
        .header("x-key", "open")
        .header("x-key", &secret)
        .extension(soon())
        .body("")
        .unwrap();
    let id = durable.fire(request).await.unwrap();
    outcome_of(&durable, id).await;
    assert_eq!(
        *flags.lock().unwrap(),
        [(HeaderValue::from_static("open"), false), (secret, true)]
    );
    // This response comes from the database.
    let response = durable.response(id).await.unwrap();
    let keys = response.headers().get_all("x-key").iter();
    let marked: Vec<_> = keys.map(HeaderValue::is_sensitive).collect();
    assert_eq!(marked, [true, false]);
    assert!(!format!("{response:?}").contains("session"));
}

#[tokio::test]
async fn a_stored_response_keeps_its_http_2_version() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let client = reqwest::Client::builder()
        .http2_prior_knowledge()
        .build()
        .unwrap();
    let durable = plain_builder(&database)
        .transport(ReqwestTransport::new(client))
        .build()
        .unwrap();
    let id = durable
        .fire(post(server.url("/"), "x").with(soon()))
        .await
        .unwrap();
    outcome_of(&durable, id).await;
    assert_eq!(server.seen()[0].version, Version::HTTP_2);
    let response = durable.response(id).await.unwrap();
    assert_eq!(response.version(), Version::HTTP_2);
}

#[tokio::test]
async fn the_timeout_of_a_reqwest_request_limits_each_attempt() {
    let database = migrated().await;
    let (server, _never) = Server::held(200).await;
    let durable = durable(&database);
    let began = Instant::now();
    let short = Duration::from_millis(150);

    let client = with_middleware(reqwest::Client::new(), &durable);
    let request = client.post(server.url("/middleware")).timeout(short);
    let error = in_time(request.send()).await.unwrap_err();
    assert!(error.is_timeout(), "{error:?}");

    let bare = reqwest::Client::new();
    let request = bare.post(server.url("/")).timeout(short).build().unwrap();
    let error = in_time(durable.await_response(request)).await.unwrap_err();
    assert!(error.is_discarded(), "{error:?}");
    assert_eq!(error.failure_class(), Some(FailureClass::Timeout));

    let request = bare.post(server.url("/")).timeout(short).build().unwrap();
    let id = durable.fire(request).await.unwrap();
    let outcome = outcome_of(&durable, id).await;
    assert_eq!(outcome.status(), Status::Discarded);

    // The handle's `attempt_timeout` is 30 s.
    assert!(began.elapsed() < Duration::from_secs(15));
    assert_eq!(server.count(), 3);
    assert_eq!(
        rows(&database, "outcomes WHERE error_class = 'timeout'").await,
        3
    );
}

#[tokio::test]
async fn redirects_are_left_to_the_client() {
    let database = migrated().await;
    let server = Server::start(|_, seen| async move {
        let mut response = reply(200, seen.body);
        if let Some(status) = seen.uri.path().strip_prefix("/from/") {
            *response.status_mut() = status.parse().unwrap();
            let target = HeaderValue::from_static("/to?a=%2F#part");
            response.headers_mut().insert("location", target);
        }
        response
    })
    .await;
    let durable = durable(&database);
    let following = reqwest::Client::new();
    for bare in [following, reqwest_client()] {
        let client = with_middleware(bare.clone(), &durable);
        for status in [301, 302, 303, 307, 308] {
            let seen_before = server.count();
            let url = server.url(&format!("/from/{status}"));
            let without = in_time(bare.post(&url).body("x").send()).await.unwrap();
            let without = Got::of_reqwest(without).await;
            let seen_between = server.count();
            let with = in_time(client.post(&url).body("x").send()).await.unwrap();
            let with = Got::of_reqwest(with).await;

            // The `date` header may differ.
            let dateless = |mut got: Got| {
                got.headers.retain(|(name, _)| name != "date");
                got
            };
            assert_eq!(dateless(without), dateless(with));
            let seen = server.seen();
            assert_eq!(seen[seen_before..seen_between], seen[seen_between..]);
        }
    }
}

#[tokio::test]
async fn a_stored_response_keeps_its_url() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let durable = durable(&database);
    let bare = reqwest_client();
    let url = server.url("/a/../b?c=%2f#part");
    let expected = in_time(bare.get(&url).send()).await.unwrap();
    let request = bare.get(&url).build().unwrap();
    let response = in_time(durable.await_response(request)).await.unwrap();
    let id = response.id();
    let response = reqwest::Response::from(response);
    assert_eq!(response.url(), expected.url());
    let stored = reqwest::Response::from(durable.response(id).await.unwrap());
    assert_eq!(stored.url(), expected.url());
}

#[tokio::test]
async fn errors_hide_the_query_of_every_url_on_the_way() {
    let database = migrated().await;
    let closed = closed_port().await;
    let server = Server::start(move |_, _| async move {
        let mut response = reply(307, "");
        let target = format!("http://{closed}/to?token=hunter2");
        response
            .headers_mut()
            .insert("location", target.parse().unwrap());
        response
    })
    .await;
    let client = with_middleware(reqwest::Client::new(), &durable(&database));
    for url in [
        format!("http://{closed}/secret?token=hunter2#hunter3"),
        server.url("/from?token=hunter4"),
    ] {
        let error = in_time(client.post(url).send()).await.unwrap_err();
        let shown = format!("{error} {error:?}");
        assert!(!shown.contains("hunter"), "{shown}");
    }
    assert_eq!(
        rows(&database, "outcomes WHERE error LIKE '%hunter%'").await,
        0
    );
    assert_eq!(
        rows(&database, "outcomes WHERE error_class = 'connect'").await,
        2
    );
}
