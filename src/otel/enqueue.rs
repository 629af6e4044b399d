//! The PRODUCER span of a call, until its request is persisted.

use opentelemetry::global::BoxedSpan;
use opentelemetry::trace::{Span as _, SpanKind, Status, TraceContextExt as _, Tracer as _};
use opentelemetry::{Context, KeyValue};

use super::OpenTelemetry;
use super::attributes::{ERROR_TYPE, MESSAGE_ID, OTHER, messaging};
use super::context::{span_context, trace_context, with_baggage};
use crate::error::Error;
use crate::id::RequestId;
use crate::trace_context::{EndEnqueue, EnqueueSpan, Enqueuing, TraceContext};

/// Begins the span of a call. Returns what is stored with its request, too.
pub(super) fn begin(
    otel: &OpenTelemetry,
    request: &Enqueuing<'_>,
) -> (Option<TraceContext>, Option<EnqueueSpan>) {
    let current = Context::current();
    let parent = match TraceContext::from_headers(request.headers) {
        Some(own) if !current.span().span_context().is_valid() => {
            current.with_remote_span_context(span_context(&own))
        }
        _ => current,
    };
    let span = otel
        .tracer
        .span_builder(format!("send {}", request.channel))
        .with_kind(SpanKind::Producer)
        .with_attributes(messaging("send", request.channel, request.id))
        .start_with_context(&otel.tracer, &parent);
    let mut context = trace_context(span.span_context());
    if otel.settings.baggage {
        context = context.map(|context| with_baggage(context, &parent));
    }
    let id = request.id;
    (context, Some(EnqueueSpan(Box::new(Send { span, id }))))
}

struct Send {
    span: BoxedSpan,
    id: RequestId,
}

impl EndEnqueue for Send {
    fn end(mut self: Box<Self>, persisted: Result<RequestId, &Error>) {
        match persisted {
            Ok(id) => {
                // With a caller's key, it may be an earlier request.
                if id != self.id {
                    self.span
                        .set_attribute(KeyValue::new(MESSAGE_ID, id.to_string()));
                }
            }
            Err(error) => {
                self.span
                    .set_attribute(KeyValue::new(ERROR_TYPE, error_type(error)));
                self.span.set_status(Status::error(error.to_string()));
            }
        }
        self.span.end();
    }
}

fn error_type(error: &Error) -> &'static str {
    if error.is_indeterminate() {
        "indeterminate"
    } else if error.is_overloaded() {
        "overloaded"
    } else if error.is_key_busy() {
        "key_busy"
    } else if error.is_closed() {
        "closed"
    } else if error.is_database() {
        "database"
    } else {
        OTHER
    }
}
