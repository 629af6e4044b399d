//! The CONSUMER span of an attempt, and the CLIENT span of its request.

use std::sync::{Arc, Mutex, PoisonError};

use http::{HeaderMap, StatusCode};
use opentelemetry::global::BoxedSpan;
use opentelemetry::trace::TraceContextExt as _;
use opentelemetry::trace::{Link, Span as _, SpanContext, SpanKind, Status, Tracer as _};
use opentelemetry::{Context, KeyValue};

use super::OpenTelemetry;
use super::attributes::{ERROR_TYPE, OTHER, known_method, messaging, protocol_version};
use super::context::{below, span_context, trace_context};
use super::url::server;
use crate::classify::FailureClass;
use crate::trace_context::{AttemptSpan, Attempted, Received, Sending, TraceContext};

/// The spans of an attempt.
pub(super) struct Spans {
    otel: Arc<OpenTelemetry>,
    number: u32,
    /// What was stored with the request.
    stored: Option<TraceContext>,
    /// With the CONSUMER span.
    consumer: Context,
    client: Mutex<Option<BoxedSpan>>,
    has_ended: bool,
}

impl Spans {
    pub(super) fn begin(otel: &Arc<OpenTelemetry>, attempt: &Attempted<'_>) -> Self {
        let number = attempt.number;
        let producer = attempt.context.map(span_context);
        let mut attributes = messaging("process", attempt.channel, attempt.id);
        attributes.push(KeyValue::new("requeuest.attempt", i64::from(number)));
        let mut builder = otel
            .tracer
            .span_builder(format!("process {}", attempt.channel))
            .with_kind(SpanKind::Consumer)
            .with_attributes(attributes);
        let is_retry = number > 1;
        if let (true, Some(producer)) = (is_retry, &producer) {
            builder = builder.with_links(vec![Link::with_context(producer.clone())]);
        }
        // Not the span that is current here, which may be that of the call: the request may have
        // outlived it.
        let parent = match producer {
            Some(producer) if !(is_retry && otel.settings.new_trace_per_retry) => below(producer),
            _ => Context::new(),
        };
        let span = builder.start_with_context(&otel.tracer, &parent);
        Self {
            otel: Arc::clone(otel),
            number,
            stored: attempt.context.cloned(),
            consumer: parent.with_span(span),
            client: Mutex::new(None),
            has_ended: false,
        }
    }

    /// Begins the CLIENT span. Returns its context.
    fn begin_client(&self, sending: &Sending<'_>) -> SpanContext {
        let known = known_method(sending.method);
        let (address, port) = server(sending.uri);
        let mut attributes = vec![
            KeyValue::new("http.request.method", known.unwrap_or(OTHER)),
            KeyValue::new("server.address", address),
            KeyValue::new("server.port", i64::from(port)),
            KeyValue::new("url.full", self.otel.settings.url.shown(sending.uri)),
        ];
        if known.is_none() {
            let original = sending.method.to_string();
            attributes.push(KeyValue::new("http.request.method_original", original));
        }
        if self.number > 1 {
            let resend = i64::from(self.number - 1);
            attributes.push(KeyValue::new("http.request.resend_count", resend));
        }
        let tracer = &self.otel.tracer;
        let span = tracer
            .span_builder(known.unwrap_or("HTTP"))
            .with_kind(SpanKind::Client)
            .with_attributes(attributes)
            .start_with_context(tracer, &self.consumer);
        let context = span.span_context().clone();
        *self.client() = Some(span);
        context
    }

    fn client(&self) -> std::sync::MutexGuard<'_, Option<BoxedSpan>> {
        self.client.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn inject(&self, span: &SpanContext, headers: &mut HeaderMap) {
        // Without a recording provider, what is stored travels on.
        let Some(context) = trace_context(span).or_else(|| self.stored.clone()) else {
            return;
        };
        let baggage = self.stored.as_ref().and_then(TraceContext::baggage);
        let context = match baggage.filter(|_| self.otel.settings.baggage) {
            Some(baggage) => context.clone().with_baggage(baggage).unwrap_or(context),
            None => context.without_baggage(),
        };
        if self.otel.settings.replace_headers {
            context.replace_in(headers);
        } else {
            context.insert_into(headers);
        }
    }
}

impl AttemptSpan for Spans {
    fn scope(&self, part: &mut dyn FnMut()) {
        let _current = self.consumer.clone().attach();
        part();
    }

    fn begin_sending(&self, sending: Sending<'_>) {
        let span = if sending.by_own_client {
            self.begin_client(&sending)
        } else {
            self.consumer.span().span_context().clone()
        };
        self.inject(&span, sending.headers);
    }

    fn end_sending(&self, received: Received<'_>) {
        let Some(mut span) = self.client().take() else {
            return;
        };
        match received {
            Received::Response(status, version) => {
                let code = status.as_u16();
                span.set_attribute(KeyValue::new("http.response.status_code", i64::from(code)));
                let version = protocol_version(version);
                span.set_attribute(KeyValue::new("network.protocol.version", version));
                if code >= 400 {
                    span.set_attribute(KeyValue::new(ERROR_TYPE, code.to_string()));
                    // The status code says why.
                    span.set_status(Status::error(""));
                }
            }
            Received::Failure(class, text) => {
                span.set_attribute(KeyValue::new(ERROR_TYPE, class.as_str()));
                span.set_status(Status::error(text.to_owned()));
            }
        }
        span.end();
    }

    fn end(mut self: Box<Self>, error: Option<Result<StatusCode, FailureClass>>) {
        self.has_ended = true;
        let span = self.consumer.span();
        if let Some(error) = error {
            let error_type = match error {
                Ok(status) => status.as_u16().to_string(),
                Err(class) => class.as_str().to_owned(),
            };
            span.set_attribute(KeyValue::new(ERROR_TYPE, error_type));
            span.set_status(Status::error(""));
        }
        span.end();
    }
}

impl Drop for Spans {
    fn drop(&mut self) {
        if self.has_ended {
            return;
        }
        let abandoned = || KeyValue::new(ERROR_TYPE, FailureClass::Abandoned.as_str());
        if let Some(mut client) = self.client().take() {
            client.set_attribute(abandoned());
            client.set_status(Status::error(""));
            client.end();
        }
        let span = self.consumer.span();
        span.set_attribute(abandoned());
        span.set_status(Status::error(""));
        span.end();
    }
}
