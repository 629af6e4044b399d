//! What attempts carry in their headers.

use http::Method;
use requeuest::otel::OpenTelemetry;
use requeuest::otel::opentelemetry::KeyValue;
use requeuest::otel::opentelemetry::baggage::BaggageExt as _;
use requeuest::otel::opentelemetry::trace::FutureExt as _;
use requeuest::otel::opentelemetry::trace::TracerProvider as _;
use requeuest::otel::opentelemetry::trace::noop::NoopTracerProvider;
use tracing::Instrument as _;
use tracing::instrument::WithSubscriber as _;
use tracing_subscriber::layer::SubscriberExt as _;

use super::exporter::{Traced, caller, parents, send};
use super::{header, seen};
use crate::support::{Server, builder, in_time, migrated, outcome_of, post, with_middleware};

#[tokio::test]
async fn baggage_travels_by_choice_only() {
    let (database, traced) = (migrated().await, Traced::new());
    let server = Server::always(200).await;
    let caller = caller().with_baggage([KeyValue::new("tenant", "a b")]);
    for (channel, baggage) in [("without", false), ("with", true)] {
        let durable = traced.builder(&database).channel(channel);
        let durable = durable
            .open_telemetry(traced.otel().baggage(baggage))
            .build()
            .unwrap();
        let fired = durable
            .fire(post(server.url("/"), "x"))
            .with_context(caller.clone());
        outcome_of(&durable, fired.await.unwrap()).await;
    }
    let seen = server.seen();
    let baggage: Vec<_> = seen
        .iter()
        .map(|seen| header(&seen.headers, "baggage"))
        .collect();
    assert_eq!(baggage, [None, Some("tenant=a%20b")]);
}
#[tokio::test]
async fn a_traceparent_of_the_request_is_the_parent_and_stays() {
    let (database, traced) = (migrated().await, Traced::new());
    let server = Server::always(200).await;
    let trace_id = "4bf92f3577b34da6a3ce929d0e0e4736";
    for (channel, replaces) in [("keeping", false), ("replacing", true)] {
        let durable = traced.builder(&database).channel(channel);
        let otel = traced.otel().replace_headers(replaces);
        let durable = durable.open_telemetry(otel).build().unwrap();
        let request = http::Request::builder()
            .method(Method::GET)
            .uri(server.url("/"));
        let request = request
            .header("traceparent", super::PARENT)
            .body("")
            .unwrap();
        in_time(durable.await_response(request)).await.unwrap();
        let (send, _, client) = traced.take();
        assert_eq!(send.span_context.trace_id().to_string(), trace_id);
        assert_eq!(send.parent_span_id.to_string(), "00f067aa0ba902b7");
        let own = client.unwrap().span_context.span_id();
        let expected = if replaces { own } else { send.parent_span_id };
        assert_eq!(parents(&server).pop(), Some(expected));
    }
}

/// Without a provider, or with a sampler that drops the trace.
#[tokio::test]
async fn a_trace_that_is_not_recorded_travels_on() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let noop = NoopTracerProvider::new();
    let durable = builder(&database).open_telemetry(OpenTelemetry::new(&noop));
    let durable = durable.build().unwrap();
    send(&durable, &server.url("/")).await;
    let context = seen(&server).pop().unwrap().unwrap();
    assert_eq!(context.traceparent(), super::PARENT);
    assert_eq!(context.tracestate(), Some("vendor=a,other=b"));
    // Outside any trace.
    let client = with_middleware(reqwest::Client::new(), &durable);
    in_time(client.get(server.url("/")).send()).await.unwrap();
    assert_eq!(seen(&server).pop().unwrap(), None);
}

#[tokio::test]
async fn the_current_span_of_tracing_is_the_parent() {
    let (database, traced) = (migrated().await, Traced::new());
    let server = Server::always(200).await;
    let durable = traced.builder(&database).build().unwrap();
    let exporter = Traced::new();
    let layer = tracing_opentelemetry::layer().with_tracer(exporter.provider.tracer("test"));
    let subscriber = tracing_subscriber::registry().with(layer);
    let id = async {
        let span = tracing::info_span!("order");
        let fired = durable.fire(post(server.url("/"), "x"));
        fired.instrument(span).await.unwrap()
    };
    let id = id.with_subscriber(subscriber).await;
    outcome_of(&durable, id).await;
    let order = exporter.exporter.get_finished_spans().unwrap().remove(0);
    let (send, _, client) = traced.take();
    assert_eq!(order.name, "order");
    assert_eq!(send.parent_span_id, order.span_context.span_id());
    let trace_id = order.span_context.trace_id();
    assert_eq!(client.unwrap().span_context.trace_id(), trace_id);
}
