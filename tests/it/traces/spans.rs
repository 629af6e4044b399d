//! Spans by OpenTelemetry's conventions, as an exporter gets them.

use bytes::Bytes;
use http::Method;
use http_body_util::Full;
use opentelemetry_sdk::trace::{InMemorySpanExporter, SdkTracerProvider, SpanData};
use requeuest::hooks::{OutgoingAttempt, Refusal, hook_fn, hook_fn_with};
use requeuest::otel::OpenTelemetry;
use requeuest::otel::opentelemetry::baggage::BaggageExt as _;
use requeuest::otel::opentelemetry::trace::{
    FutureExt as _, SpanContext, SpanId, SpanKind, Status, TraceContextExt as _, TraceFlags,
    TraceState,
};
use requeuest::otel::opentelemetry::{Context, KeyValue};
use requeuest::testkit::TestDatabase;
use requeuest::{
    Body, Durable, DurableBuilder, HttpClient, RequestId, ReqwestTransport, TraceContext,
};
use reqwest_middleware::{ClientBuilder, Middleware, Next};
use tower::{Layer, ServiceExt, service_fn};

use super::{header, seen};
use crate::support::{
    Server, builder, closed_port, hyper_client, in_time, migrated, outcome_of, post, quick,
    with_middleware,
};

/// A provider whose spans the test reads.
struct Traced {
    provider: SdkTracerProvider,
    exporter: InMemorySpanExporter,
}

impl Traced {
    fn new() -> Self {
        let exporter = InMemorySpanExporter::default();
        let provider = SdkTracerProvider::builder()
            .with_simple_exporter(exporter.clone())
            .build();
        Self { provider, exporter }
    }

    fn otel(&self) -> OpenTelemetry {
        OpenTelemetry::new(&self.provider)
    }

    fn builder(&self, database: &TestDatabase) -> DurableBuilder {
        builder(database).retry(quick()).open_telemetry(self.otel())
    }

    /// The crate's spans that have ended, in the order of their ends.
    fn ended(&self) -> Vec<SpanData> {
        let spans = self.exporter.get_finished_spans().unwrap();
        for span in &spans {
            assert_eq!(span.instrumentation_scope.name(), "requeuest");
        }
        spans
    }

    /// Those of this kind, in the order of their beginnings.
    fn of(&self, kind: &SpanKind) -> Vec<SpanData> {
        let mut spans = self.ended();
        spans.retain(|span| span.span_kind == *kind);
        spans.sort_by_key(|span| span.start_time);
        spans
    }

    /// The spans of a request with one attempt, which are left out from now on.
    fn take(&self) -> (SpanData, SpanData, Option<SpanData>) {
        let of = |kind| {
            let mut spans = self.of(&kind);
            assert!(spans.len() <= 1, "{spans:#?}");
            spans.pop()
        };
        let client = of(SpanKind::Client);
        let taken = (
            of(SpanKind::Producer).unwrap(),
            of(SpanKind::Consumer).unwrap(),
            client,
        );
        self.exporter.reset();
        taken
    }
}

/// The context of a caller that another process has called.
fn caller() -> Context {
    caller_with([("vendor", "a"), ("other", "b")])
}

/// As [`caller`], with this tracestate.
pub(super) fn caller_with<const N: usize>(state: [(&str, &str); N]) -> Context {
    let state = TraceState::from_key_value(state).unwrap();
    Context::new().with_remote_span_context(SpanContext::new(
        0x4bf9_2f35_77b3_4da6_a3ce_929d_0e0e_4736_u128.into(),
        0xf0_67aa_0ba9_02b7_u64.into(),
        TraceFlags::SAMPLED,
        true,
        state,
    ))
}

async fn send(durable: &Durable, url: &str) -> RequestId {
    let fired = durable.fire(post(url, "x")).with_context(caller());
    let id = fired.await.unwrap();
    outcome_of(durable, id).await;
    id
}

fn attribute(span: &SpanData, name: &str) -> Option<String> {
    let mut found = span
        .attributes
        .iter()
        .filter(|found| found.key.as_str() == name);
    let value = found.next().map(|found| found.value.to_string());
    assert!(found.next().is_none(), "{name} twice: {span:#?}");
    value
}

/// Asserts all attributes of a span.
fn assert_attributes(span: &SpanData, expected: &[(&str, &str)]) {
    let mut found: Vec<_> = span.attributes.iter().collect();
    found.sort_by(|a, b| a.key.cmp(&b.key));
    let found: Vec<_> = found
        .iter()
        .map(|found| (found.key.as_str(), found.value.to_string()))
        .collect();
    let mut expected: Vec<_> = expected
        .iter()
        .map(|(name, value)| (*name, (*value).to_owned()))
        .collect();
    expected.sort_unstable();
    assert_eq!(found, expected);
}

fn error() -> Status {
    Status::error("")
}

/// The spans that the receiver's requests name as their parents.
fn parents(server: &Server) -> Vec<SpanId> {
    let of = |context: &Option<TraceContext>| {
        SpanId::from_hex(context.as_ref().unwrap().parent_id()).unwrap()
    };
    seen(server).iter().map(of).collect()
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

/// Notes the span that is current while a wrapped client sends.
#[derive(Clone, Default)]
struct Current(std::sync::Arc<std::sync::Mutex<Vec<SpanId>>>);

impl Current {
    fn note(&self) {
        let span = Context::map_current(|current| current.span().span_context().span_id());
        self.0.lock().unwrap().push(span);
    }

    fn take(&self) -> Vec<SpanId> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

#[async_trait::async_trait]
impl Middleware for Current {
    async fn handle(
        &self,
        request: reqwest::Request,
        extensions: &mut http::Extensions,
        next: Next<'_>,
    ) -> reqwest_middleware::Result<reqwest::Response> {
        self.note();
        let answered = next.run(request, extensions).await;
        self.note();
        answered
    }
}

/// A client that notes the span before and after each exchange.
fn noting(current: &Current) -> impl HttpClient + use<> {
    let current = current.clone();
    service_fn(move |request: http::Request<Body>| {
        let (current, client) = (current.clone(), hyper_client::<Body>());
        async move {
            current.note();
            let answered = client.oneshot(request).await;
            current.note();
            answered
        }
    })
}

#[tokio::test]
async fn a_wrapped_client_sends_within_the_attempt_and_without_a_span_of_ours() {
    let (database, traced, current) = (migrated().await, Traced::new(), Current::default());
    let server = Server::always(200).await;
    let mut sent = 0;
    let mut assert_spans = || {
        let (_, process, client) = traced.take();
        assert!(client.is_none());
        let id = process.span_context.span_id();
        assert_eq!(current.take(), [id; 2]);
        assert_eq!(parents(&server)[sent..], [id]);
        sent += 1;
    };
    // A service that a layer wraps.
    let layer = traced
        .builder(&database)
        .channel("layer")
        .build_layer()
        .unwrap();
    let request = http::Request::post(server.url("/")).body(Full::<Bytes>::from("x"));
    let called = layer.layer(noting(&current)).oneshot(request.unwrap());
    in_time(called.with_context(caller())).await.unwrap();
    assert_spans();
    // Another transport.
    let durable = traced
        .builder(&database)
        .channel("b")
        .transport(noting(&current));
    send(&durable.build().unwrap(), &server.url("/")).await;
    assert_spans();
    // The client below the middleware.
    let durable = traced.builder(&database).channel("c").build().unwrap();
    let client = ClientBuilder::new(reqwest::Client::new())
        .with(durable)
        .with(current.clone());
    let called = client.build().post(server.url("/")).body("x").send();
    in_time(called.with_context(caller())).await.unwrap();
    assert_spans();
    // A client that a hook has chosen.
    let hook = hook_fn_with(
        current.clone(),
        async |current: &Current, attempt: &mut OutgoingAttempt| {
            attempt.send_with(noting(current));
            Ok::<_, Refusal>(())
        },
    );
    let durable = traced.builder(&database).channel("d").on_attempt(hook);
    send(&durable.build().unwrap(), &server.url("/")).await;
    assert_spans();
}

#[tokio::test]
async fn a_plain_reqwest_client_sends_in_a_span_of_ours() {
    let (database, traced) = (migrated().await, Traced::new());
    let server = Server::always(404).await;
    let transport = ReqwestTransport::new(reqwest::Client::new());
    let durable = traced
        .builder(&database)
        .transport(transport)
        .build()
        .unwrap();
    let request = http::Request::builder()
        .method("PURGE")
        .uri(server.url("/"));
    in_time(durable.await_response(request.body("").unwrap()))
        .await
        .unwrap();
    let (send, process, client) = traced.take();
    // The caller has no span.
    assert_eq!(send.parent_span_id, SpanId::INVALID);
    // The caller waits for any final response.
    assert_eq!(process.status, Status::Unset);
    let client = client.unwrap();
    assert_eq!((&*client.name, &client.status), ("HTTP", &error()));
    let method = |name| attribute(&client, name).unwrap();
    assert_eq!(method("http.request.method"), "_OTHER");
    assert_eq!(method("http.request.method_original"), "PURGE");
    assert_eq!(method("error.type"), "404");
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
    let noop = requeuest::otel::opentelemetry::trace::noop::NoopTracerProvider::new();
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
