//! An exporter whose spans a test reads, and a caller in a trace.

use opentelemetry_sdk::trace::{InMemorySpanExporter, SdkTracerProvider, SpanData};
use requeuest::otel::OpenTelemetry;
use requeuest::otel::opentelemetry::Context;
use requeuest::otel::opentelemetry::trace::{
    FutureExt as _, SpanContext, SpanId, SpanKind, TraceContextExt as _, TraceFlags, TraceState,
};
use requeuest::testkit::TestDatabase;
use requeuest::{Durable, DurableBuilder, RequestId, TraceContext};

use super::seen;
use crate::support::{Server, builder, outcome_of, post, quick};

/// A provider whose spans the test reads.
pub(super) struct Traced {
    pub(super) provider: SdkTracerProvider,
    pub(super) exporter: InMemorySpanExporter,
}

impl Traced {
    pub(super) fn new() -> Self {
        let exporter = InMemorySpanExporter::default();
        let provider = SdkTracerProvider::builder()
            .with_simple_exporter(exporter.clone())
            .build();
        Self { provider, exporter }
    }

    pub(super) fn otel(&self) -> OpenTelemetry {
        OpenTelemetry::new(&self.provider)
    }

    pub(super) fn builder(&self, database: &TestDatabase) -> DurableBuilder {
        builder(database).retry(quick()).open_telemetry(self.otel())
    }

    /// The crate's spans that have ended, in the order of their ends.
    pub(super) fn ended(&self) -> Vec<SpanData> {
        let spans = self.exporter.get_finished_spans().unwrap();
        for span in &spans {
            assert_eq!(span.instrumentation_scope.name(), "requeuest");
        }
        spans
    }

    /// Those of this kind, in the order of their beginnings.
    pub(super) fn of(&self, kind: &SpanKind) -> Vec<SpanData> {
        let mut spans = self.ended();
        spans.retain(|span| span.span_kind == *kind);
        spans.sort_by_key(|span| span.start_time);
        spans
    }

    /// The spans of a request with one attempt, which are left out from now on.
    pub(super) fn take(&self) -> (SpanData, SpanData, Option<SpanData>) {
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
pub(super) fn caller() -> Context {
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

pub(super) async fn send(durable: &Durable, url: &str) -> RequestId {
    let fired = durable.fire(post(url, "x")).with_context(caller());
    let id = fired.await.unwrap();
    outcome_of(durable, id).await;
    id
}

pub(super) fn attribute(span: &SpanData, name: &str) -> Option<String> {
    let mut found = span
        .attributes
        .iter()
        .filter(|found| found.key.as_str() == name);
    let value = found.next().map(|found| found.value.to_string());
    assert!(found.next().is_none(), "{name} twice: {span:#?}");
    value
}

/// Asserts all attributes of a span.
pub(super) fn assert_attributes(span: &SpanData, expected: &[(&str, &str)]) {
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

/// The spans that the receiver's requests name as their parents.
pub(super) fn parents(server: &Server) -> Vec<SpanId> {
    let of = |context: &Option<TraceContext>| {
        SpanId::from_hex(context.as_ref().unwrap().parent_id()).unwrap()
    };
    seen(server).iter().map(of).collect()
}
