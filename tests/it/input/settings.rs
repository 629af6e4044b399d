//! Options and builder settings: limits, and the field that an error names.

use std::time::Duration;

use requeuest::retry::RetryPolicy;
use requeuest::{
    AcceptedResponse, Body, Durable, DurableBuilder, MAX_METADATA_LEN, Options, Request,
};
use tower::ServiceExt;

use super::{assert_refused, get, layered, middleware, of_middleware};
use crate::support::{Server, assert_nothing_persisted, builder, in_time, migrated, post};

#[tokio::test]
async fn options_are_checked_before_anything_is_persisted() {
    let database = migrated().await;
    let durable = Durable::new(database.pool().clone());
    let client = middleware(&durable);
    let century = Duration::from_secs(101 * 365 * 24 * 3600);
    let options = Options::default;
    for (field, refused) in [
        ("channel", options().channel("")),
        ("key", options().key("")),
        ("ordered", options().ordered("")),
        ("supersede", options().supersede("")),
        ("channel", options().channel("x".repeat(56))),
        ("channel", options().channel("a\0b")),
        ("ordered", options().ordered("x".repeat(256))),
        ("ordered", options().ordered("a\0b")),
        ("delay", options().delay(century)),
        ("key", options().key("x".repeat(256))),
        ("key", options().key("a\0b")),
        ("supersede", options().supersede("x".repeat(256))),
        ("limit_key", options().limit_key("")),
        ("limit_key", options().limit_key("x".repeat(256))),
        ("limit_key", options().limit_key("a\0b")),
        ("limit_key", options().limit_key("https://a.example")),
        ("deadline", options().deadline(Duration::ZERO)),
        ("deadline", options().deadline(century)),
        (
            "deadline",
            options()
                .delay(Duration::from_secs(2))
                .deadline(Duration::from_secs(2)),
        ),
        ("halt_on_discard", options().halt_on_discard()),
        ("attempt_timeout", options().attempt_timeout(Duration::ZERO)),
        ("attempt_timeout", options().attempt_timeout(century)),
        (
            "retry",
            options().retry(RetryPolicy::none().base(Duration::ZERO)),
        ),
        ("accept", options().accept([] as [AcceptedResponse; 0])),
        ("metadata", options().metadata("x".repeat(MAX_METADATA_LEN))),
        ("metadata", options().metadata("a\0b")),
    ] {
        let url = "http://example.com/";
        let request = Request::try_from(get(url)).unwrap().with(refused.clone());
        assert_refused(&durable.fire(&request).await.unwrap_err(), field);
        assert_refused(&durable.await_response(&request).await.unwrap_err(), field);
        let error = durable.fire_in(database.pool(), &request).await;
        assert_refused(&error.unwrap_err(), field);
        let mut request = get(url);
        request.extensions_mut().insert(refused.clone());
        let error = in_time(layered(&durable).oneshot(request)).await;
        assert_refused(&error.unwrap_err(), field);
        let request = client.get(url).with_extension(refused);
        assert_refused(
            of_middleware(&in_time(request.send()).await.unwrap_err()),
            field,
        );
    }
    assert_nothing_persisted(&database).await;
}

#[tokio::test]
async fn the_longest_names_are_accepted() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let channel = "ä".repeat(27) + "x";
    assert_eq!(channel.len(), 55);
    let durable = builder(&database).channel(channel).build().unwrap();
    let options = Options::default()
        .ordered("x".repeat(255))
        .key("y".repeat(255))
        .supersede("z".repeat(255))
        .limit_key("k".repeat(255));
    let request = post(server.url("/"), "").with(options);
    let response = in_time(durable.await_response(request)).await.unwrap();
    assert_eq!(response.status(), 200);
}

#[tokio::test]
async fn the_builder_names_the_field_that_it_refuses() {
    type Change = fn(DurableBuilder) -> DurableBuilder;
    let database = migrated().await;
    let refused: [(&str, Change); 32] = [
        ("channel", |b| b.channel("")),
        ("channel", |b| b.channel("x".repeat(56))),
        ("channel", |b| b.channel("a\0b")),
        ("deliver", |b| b.deliver([] as [&str; 0])),
        ("deliver", |b| b.deliver(["good", ""])),
        ("deliver", |b| b.deliver(["x".repeat(56)])),
        ("concurrency", |b| b.concurrency(0)),
        ("concurrency", |b| b.concurrency(100_001)),
        ("lease", |b| b.lease(Duration::from_millis(999))),
        ("lease", |b| b.lease(Duration::from_secs(3601))),
        ("attempt_timeout", |b| b.attempt_timeout(Duration::ZERO)),
        ("attempt_timeout", |b| b.attempt_timeout(Duration::MAX)),
        ("retry", |b| {
            b.retry(RetryPolicy::none().base(Duration::ZERO))
        }),
        ("retry", |b| b.retry(RetryPolicy::none().max_attempts(0))),
        ("retry", |b| {
            b.retry(RetryPolicy::none().cap(Duration::ZERO))
        }),
        ("max_request_body", |b| b.max_request_body(usize::MAX)),
        ("max_response_body", |b| b.max_response_body(usize::MAX)),
        ("retention", |b| b.retention(Duration::from_secs(59))),
        ("retention", |b| b.retention(Duration::MAX)),
        ("dead_letter_retention", |b| {
            b.dead_letter_retention(Duration::from_secs(59))
        }),
        ("dead_letter_retention", |b| {
            b.dead_letter_retention(Duration::MAX)
        }),
        ("max_lost_attempts", |b| b.max_lost_attempts(0)),
        ("max_lost_attempts", |b| b.max_lost_attempts(1001)),
        ("handler_concurrency", |b| b.handler_concurrency(0)),
        ("handler_concurrency", |b| b.handler_concurrency(1001)),
        ("handler_timeout", |b| b.handler_timeout(Duration::ZERO)),
        ("handler_timeout", |b| b.handler_timeout(Duration::MAX)),
        ("max_handler_failures", |b| b.max_handler_failures(0)),
        ("max_handler_failures", |b| b.max_handler_failures(u32::MAX)),
        ("schema", |b| b.schema("")),
        ("schema", |b| b.schema("a\"; drop schema public; --")),
        ("max_connections", |b| b.max_connections(1)),
    ];
    for (field, change) in refused {
        let error = change(builder(&database)).build().unwrap_err();
        assert!(error.is_config(), "{error:?}");
        assert_eq!(error.field(), Some(field), "{error:?}");
        assert!(error.to_string().contains(field), "{error}");
        let error = change(builder(&database))
            .build_layer::<Body>()
            .unwrap_err();
        assert_eq!(error.field(), Some(field), "{error:?}");
    }
    // A handle that delivers nothing needs no channels.
    let builder = builder(&database);
    builder
        .deliver([] as [&str; 0])
        .runner(false)
        .build()
        .unwrap();
}
