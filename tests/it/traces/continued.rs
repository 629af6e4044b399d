//! A trace that outlives the process that began it.

use std::process::Stdio;
use std::time::Duration;

use opentelemetry_sdk::trace::SdkTracerProvider;
use requeuest::TraceContext;
use requeuest::otel::OpenTelemetry;
use requeuest::otel::opentelemetry::Context;
use requeuest::otel::opentelemetry::trace::{
    FutureExt as _, Span as _, TraceContextExt as _, Tracer as _, TracerProvider as _,
};
use sqlx::PgPool;

use super::seen;
use crate::support::{Server, builder_on, in_time, migrated, part, plays, quick, reply};

const DATABASE: &str = "REQUEUEST_TEST_DATABASE";
const SERVER: &str = "REQUEUEST_TEST_SERVER";
const LEASE: Duration = Duration::from_secs(1);

/// A handle that makes spans, which no test reads here.
fn traced(pool: &PgPool) -> requeuest::DurableBuilder {
    let otel = OpenTelemetry::new(&SdkTracerProvider::builder().build());
    builder_on(pool)
        .lease(LEASE)
        .retry(quick())
        .open_telemetry(otel)
}

#[tokio::test(flavor = "multi_thread")]
async fn another_process_continues_the_trace_of_a_killed_one() {
    let database = migrated().await;
    // The first attempt is never answered.
    let server = Server::start(|number, _| async move {
        if number == 0 {
            std::future::pending::<()>().await;
        }
        reply(200, "")
    })
    .await;
    let mut command = part(module_path!(), "call");
    command
        .env(DATABASE, database.url())
        .env(SERVER, server.url("/"))
        .stdout(Stdio::null());
    let mut command = tokio::process::Command::from(command);
    let mut child = command.kill_on_drop(true).spawn().unwrap();
    server.wait_for(1).await;
    child.kill().await.unwrap();

    let durable = traced(database.pool()).build().unwrap();
    server.wait_for(2).await;
    in_time(durable.shutdown(Duration::from_secs(5)))
        .await
        .unwrap();
    let contexts: Vec<TraceContext> = seen(&server).into_iter().flatten().collect();
    let [first, second] = &contexts[..] else {
        panic!("{contexts:?}");
    };
    assert_eq!(first.trace_id(), second.trace_id());
    assert_ne!(first.parent_id(), second.parent_id());
    // The trace that the caller began.
    let caller = server.seen().remove(1).headers["x-caller"].clone();
    assert_eq!(caller.to_str().unwrap(), second.trace_id());
    assert_eq!(second.tracestate(), Some("vendor=a"));
}

#[tokio::test]
#[ignore = "a part played by a copy of this binary"]
async fn call() {
    if !plays("call") {
        return;
    }
    let variable = |name| std::env::var(name).unwrap();
    let pool = PgPool::connect(&variable(DATABASE)).await.unwrap();
    let durable = traced(&pool).build().unwrap();
    let remote = super::exporter::caller_with([("vendor", "a")]);
    let tracer = SdkTracerProvider::builder().build().tracer("test");
    let span = tracer.start_with_context("caller", &remote);
    let mut request = http::Request::post(variable(SERVER)).body("x").unwrap();
    let trace_id = span.span_context().trace_id().to_string();
    request
        .headers_mut()
        .insert("x-caller", trace_id.parse().unwrap());
    let caller = Context::new().with_span(span);
    durable.fire(request).with_context(caller).await.unwrap();
    std::future::pending::<()>().await;
}
