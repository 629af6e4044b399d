//! Headers that are not stored, and that a hook adds to each attempt.

use std::convert::Infallible;

use requeuest::hooks::header_fn;
use requeuest::{Options, Request, Status};

use super::values;
use crate::support::{
    Server, builder, in_time, migrated, outcome_of, post, quick, rows, with_middleware,
};

/// A request with a secret in two headers.
fn secret(url: &str, value: &'static str) -> Request {
    let mut request = post(url, "x");
    for name in ["authorization", "x-session"] {
        let value = http::HeaderValue::from_static(value);
        request.headers_mut().insert(name, value);
    }
    request
}

#[tokio::test]
async fn a_stripped_header_is_stored_nowhere_and_sent_by_no_attempt() {
    let database = migrated().await;
    let server = Server::in_turn(&[503, 404]).await;
    let durable = builder(&database)
        .retry(quick())
        .strip_headers(["Authorization", "x-session"])
        .on_attempt(header_fn("authorization", || async {
            Ok::<_, Infallible>("from the hook")
        }))
        .build()
        .unwrap();
    let id = durable
        .fire(secret(&server.url("/"), "hunter2"))
        .await
        .unwrap();
    assert_eq!(outcome_of(&durable, id).await.status(), Status::Discarded);
    assert_eq!(values(&server, "authorization"), ["from the hook"; 2]);
    assert_eq!(values(&server, "x-session"), [""; 2]);
    for table in [
        "mq_msgs",
        "mq_payloads",
        "outcomes",
        "attempts",
        "request_keys",
    ] {
        let found = format!("{table} t WHERE t::text LIKE '%hunter2%'");
        assert_eq!(rows(&database, &found).await, 0, "{table}");
    }
    assert_eq!(rows(&database, "mq_payloads").await, 1);

    // A waiting caller's own client sends no more than the others.
    let client = with_middleware(reqwest::Client::new(), &durable);
    let request = client.post(server.url("/")).header("x-session", "hunter2");
    in_time(request.body("x").send()).await.unwrap();
    assert_eq!(values(&server, "x-session"), [""; 3]);
}

#[tokio::test]
async fn a_stripped_credential_still_tells_who_owns_a_key() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let durable = builder(&database)
        .strip_headers(["authorization", "x-session"])
        .build()
        .unwrap();
    let call = |value| {
        let request = secret(&server.url("/"), value);
        durable.await_response(request.with(Options::default().key("invoice-42")))
    };
    let first = in_time(call("tenant-1")).await.unwrap();
    assert_eq!(in_time(call("tenant-1")).await.unwrap().id(), first.id());
    let error = in_time(call("tenant-2")).await.unwrap_err();
    assert!(error.is_key_conflict(), "{error}");
}
