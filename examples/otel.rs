//! The spans of one request: its call, two attempts, and the sending of each. The receiver fails
//! the first attempt.
//!
//! `cargo run --example otel`

use opentelemetry_sdk::trace::{InMemorySpanExporter, SdkTracerProvider, SpanData};
use requeuest::otel::OpenTelemetry;
use requeuest::otel::opentelemetry::Context;
use requeuest::otel::opentelemetry::trace::{
    FutureExt as _, Status, TraceContextExt as _, Tracer as _, TracerProvider as _,
};
use requeuest::testkit::Postgres;
use requeuest::{Durable, migrate};

mod support;
use support::{Result, Server};

#[tokio::main]
async fn main() -> Result<()> {
    let database = Postgres::start().await?.database().await?;
    migrate(database.pool()).await?;
    let server = Server::start(|number, _| async move { if number == 1 { 503 } else { 200 } });
    let server = server.await?;

    // An application has an exporter here that sends spans to its collector.
    let exporter = InMemorySpanExporter::default();
    let provider = SdkTracerProvider::builder()
        .with_simple_exporter(exporter.clone())
        .build();
    let durable = Durable::builder(database.pool().clone())
        .channel("billing")
        .open_telemetry(OpenTelemetry::new(&provider))
        .build()?;

    // The span of the application's own work.
    let span = provider.tracer("shop").start("POST /orders");
    let order = Context::current_with_span(span);
    let charge = http::Request::post(server.url()).body("amount=5")?;
    let charged = durable.await_response(charge).with_context(order.clone());
    let status = charged.await?.status();
    let number = server.received().len();
    println!("answered with {status} after {number} attempts");
    order.span().end();
    drop(order);

    let mut spans = exporter.get_finished_spans()?;
    spans.sort_by_key(|span| span.start_time);
    let roots = spans.iter().filter(|span| parent(span, &spans).is_none());
    for root in roots {
        print(root, &spans, 0);
    }
    durable.shutdown(std::time::Duration::from_secs(5)).await?;
    Ok(())
}

fn parent<'a>(span: &SpanData, spans: &'a [SpanData]) -> Option<&'a SpanData> {
    let is_parent = |other: &&SpanData| other.span_context.span_id() == span.parent_span_id;
    spans.iter().find(is_parent)
}

/// Prints a span, and those below it.
fn print(span: &SpanData, spans: &[SpanData], depth: usize) {
    let indent = "    ".repeat(depth);
    let (kind, name, trace) = (&span.span_kind, &span.name, span.span_context.trace_id());
    println!("{indent}{kind:?} `{name}` in trace {trace}");
    for link in span.links.iter() {
        println!("{indent}  linked to {}", link.span_context.span_id());
    }
    if span.status != Status::Unset {
        println!("{indent}  status: {:?}", span.status);
    }
    for attribute in &span.attributes {
        println!("{indent}  {} = {}", attribute.key, attribute.value);
    }
    let own = span.span_context.span_id();
    for child in spans.iter().filter(|child| child.parent_span_id == own) {
        print(child, spans, depth + 1);
    }
}
