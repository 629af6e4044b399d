//! Spans by OpenTelemetry's conventions, as an exporter gets them.

use opentelemetry_sdk::trace::SpanData;
use requeuest::hooks::{OutgoingAttempt, Refusal, hook_fn};
use requeuest::otel::OpenTelemetry;
use requeuest::otel::opentelemetry::trace::{SpanId, SpanKind, Status, TraceContextExt as _};

use super::exporter::{Traced, assert_attributes, attribute, caller, parents, send};
use super::seen;
use crate::support::{Server, builder, closed_port, in_time, migrated, post, quick};

fn error() -> Status {
    Status::error("")
}

#[tokio::test]
async fn the_spans_of_a_retried_request_are_one_trace() {
    let (database, traced) = (migrated().await, Traced::new());
    let server = Server::in_turn(&[503, 200]).await;
    let durable = traced
        .builder(&database)
        .channel("billing")
        .build()
        .unwrap();
    let id = send(&durable, &server.url("/")).await.to_string();

    let (send, process) = (
        traced.of(&SpanKind::Producer),
        traced.of(&SpanKind::Consumer),
    );
    let client = traced.of(&SpanKind::Client);
    assert_eq!([send.len(), process.len(), client.len()], [1, 2, 2]);
    let caller = caller().span().span_context().clone();
    for span in traced.ended() {
        assert_eq!(span.span_context.trace_id(), caller.trace_id());
        assert_eq!(span.span_context.trace_state(), caller.trace_state());
    }
    assert_eq!(send[0].name, "send billing");
    assert_eq!(send[0].parent_span_id, caller.span_id());
    let of_messaging = |operation| {
        [
            ("messaging.system", "requeuest"),
            ("messaging.operation.name", operation),
            ("messaging.operation.type", operation),
            ("messaging.destination.name", "billing"),
            ("messaging.message.id", &*id),
        ]
    };
    assert_attributes(&send[0], &of_messaging("send"));
    let producer = send[0].span_context.span_id();
    for (process, client) in process.iter().zip(&client) {
        assert_eq!(process.name, "process billing");
        assert_eq!(process.parent_span_id, producer);
        assert!(process.parent_span_is_remote);
        assert_eq!(client.name, "POST");
        assert_eq!(client.parent_span_id, process.span_context.span_id());
    }
    let links = |span: &SpanData| -> Vec<SpanId> {
        span.links
            .iter()
            .map(|link| link.span_context.span_id())
            .collect()
    };
    assert_eq!(
        [links(&process[0]), links(&process[1])],
        [vec![], vec![producer]]
    );

    let processed = of_messaging("process");
    let with = |more: &[(&'static str, &'static str)]| [&processed[..], more].concat();
    assert_attributes(
        &process[0],
        &with(&[("requeuest.attempt", "1"), ("error.type", "503")]),
    );
    assert_attributes(&process[1], &with(&[("requeuest.attempt", "2")]));
    assert_eq!(
        [&process[0].status, &process[1].status],
        [&error(), &Status::Unset]
    );
    let (port, origin) = (
        server.addr.port().to_string(),
        format!("http://{}", server.addr),
    );
    let http = [
        ("http.request.method", "POST"),
        ("server.address", "127.0.0.1"),
        ("server.port", &*port),
        ("url.full", &*origin),
        ("network.protocol.version", "1.1"),
    ];
    let failed = [("http.response.status_code", "503"), ("error.type", "503")];
    assert_attributes(&client[0], &[&http[..], &failed].concat());
    let answered = [
        ("http.response.status_code", "200"),
        ("http.request.resend_count", "1"),
    ];
    assert_attributes(&client[1], &[&http[..], &answered].concat());
    assert_eq!(
        [&client[0].status, &client[1].status],
        [&error(), &Status::Unset]
    );

    // What the receiver saw.
    let ids: Vec<SpanId> = client
        .iter()
        .map(|span| span.span_context.span_id())
        .collect();
    assert_eq!(parents(&server), ids);
    for context in seen(&server).into_iter().flatten() {
        assert_eq!(context.trace_id(), caller.trace_id().to_string());
        assert_eq!(context.tracestate(), Some("vendor=a,other=b"));
        assert!(context.is_sampled());
    }
}

#[tokio::test]
async fn further_attempts_begin_traces_of_their_own_by_choice() {
    let (database, traced) = (migrated().await, Traced::new());
    let server = Server::in_turn(&[503, 200]).await;
    let otel = traced.otel().new_trace_per_retry(true);
    let durable = builder(&database).retry(quick()).open_telemetry(otel);
    let durable = durable.build().unwrap();
    send(&durable, &server.url("/")).await;
    let producer = &traced.of(&SpanKind::Producer)[0].span_context;
    let process = traced.of(&SpanKind::Consumer);
    assert_eq!(process[0].span_context.trace_id(), producer.trace_id());
    assert_eq!(process[0].parent_span_id, producer.span_id());
    assert_ne!(process[1].span_context.trace_id(), producer.trace_id());
    assert_eq!(process[1].parent_span_id, SpanId::INVALID);
    let link = &process[1].links[0].span_context;
    assert_eq!(
        (link.trace_id(), link.span_id()),
        (producer.trace_id(), producer.span_id())
    );
    let own = process[1].span_context.trace_id().to_string();
    assert_eq!(seen(&server)[1].as_ref().unwrap().trace_id(), own);
}

#[tokio::test]
async fn failures_are_named_by_their_class() {
    let (database, traced) = (migrated().await, Traced::new());
    let durable = traced.builder(&database).retry(quick().max_attempts(2));
    let durable = durable.build().unwrap();
    let url = format!("http://u:hunter1@{}/hunter2?hunter3", closed_port().await);
    send(&durable, &url).await;
    for client in traced.of(&SpanKind::Client) {
        assert_eq!(attribute(&client, "error.type").as_deref(), Some("connect"));
        assert!(matches!(client.status, Status::Error { .. }));
        assert_eq!(attribute(&client, "http.response.status_code"), None);
    }
    let process = traced.of(&SpanKind::Consumer);
    assert_eq!(
        attribute(&process[0], "error.type").as_deref(),
        Some("connect")
    );
    traced.exporter.reset();

    // A hook that sends nothing.
    let refusing = hook_fn(async |_: &mut OutgoingAttempt| Err(Refusal::discard("hunter4")));
    let durable = traced
        .builder(&database)
        .channel("b")
        .on_attempt(refusing)
        .build()
        .unwrap();
    send(&durable, "http://127.0.0.1:1/").await;
    let (_, process, client) = traced.take();
    assert!(client.is_none());
    assert_eq!(attribute(&process, "error.type").as_deref(), Some("hook"));

    // A request that can't be persisted.
    database.pool().close().await;
    durable
        .fire(post("http://127.0.0.1:1/", "x"))
        .await
        .unwrap_err();
    let spans = traced.ended();
    assert_eq!((spans.len(), &spans[0].span_kind), (1, &SpanKind::Producer));
    assert_eq!(
        attribute(&spans[0], "error.type").as_deref(),
        Some("closed")
    );
}

#[tokio::test]
async fn an_attempt_that_a_shutdown_ends_is_abandoned() {
    let (database, traced) = (migrated().await, Traced::new());
    let (server, _gate) = Server::held(200).await;
    let durable = traced.builder(&database).build().unwrap();
    durable.fire(post(server.url("/"), "x")).await.unwrap();
    server.wait_for(1).await;
    durable.shutdown(std::time::Duration::ZERO).await.unwrap();
    let (_, process, client) = traced.take();
    for span in [process, client.unwrap()] {
        assert_eq!(attribute(&span, "error.type").as_deref(), Some("abandoned"));
    }
}
#[tokio::test]
async fn no_secret_of_a_url_is_in_a_span() {
    let (database, traced) = (migrated().await, Traced::new());
    let server = Server::always(200).await;
    let url = format!(
        "http://hunter1:hunter2@{}/path?a=1&token=hunter3&mine=hunter4&hunter5",
        server.addr
    );
    let shown = async |otel: OpenTelemetry, channel: &str, url: &str| {
        let durable = traced
            .builder(&database)
            .channel(channel)
            .open_telemetry(otel);
        let request = http::Request::post(url)
            .header("authorization", "hunter6")
            .header("x-mine", "hunter7")
            .body("hunter8");
        let durable = durable.build().unwrap();
        in_time(durable.await_response(request.unwrap()))
            .await
            .unwrap();
        let spans = format!("{:?}", traced.ended());
        assert!(!spans.contains("hunter"), "{spans}");
        attribute(&traced.take().2.unwrap(), "url.full").unwrap()
    };
    let origin = format!("http://{}", server.addr);
    let secret_path = format!("{origin}/hunter0");
    assert_eq!(shown(traced.otel(), "a", &secret_path).await, origin);
    let full = traced.otel().full_url(true).redact_query(["Mine"]);
    assert_eq!(
        shown(full, "b", &url).await,
        format!("{origin}/path?a=1&token=REDACTED&mine=REDACTED&REDACTED")
    );
}
