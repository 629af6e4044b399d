//! Between the headers of W3C and the types of OpenTelemetry.

use std::fmt::Write as _;
use std::str::FromStr as _;

use opentelemetry::Context;
use opentelemetry::baggage::BaggageExt as _;
use opentelemetry::trace::{
    SpanContext, SpanId, TraceContextExt as _, TraceFlags, TraceId, TraceState,
};

use crate::trace_context::TraceContext;

/// The span that a context names. It is in another process, or was.
pub(super) fn span_context(context: &TraceContext) -> SpanContext {
    let state = context.tracestate().map(TraceState::from_str);
    SpanContext::new(
        TraceId::from_hex(context.trace_id()).unwrap_or(TraceId::INVALID),
        SpanId::from_hex(context.parent_id()).unwrap_or(SpanId::INVALID),
        TraceFlags::new(u8::from(context.is_sampled())),
        true,
        state.and_then(Result::ok).unwrap_or_default(),
    )
}

/// A context with the span as its only content.
pub(super) fn below(span: SpanContext) -> Context {
    Context::new().with_remote_span_context(span)
}

/// What requests carry for the span. `None` for the span of a trace that isn't recorded at all.
pub(super) fn trace_context(span: &SpanContext) -> Option<TraceContext> {
    let traceparent = format!(
        "00-{:032x}-{:016x}-{:02x}",
        span.trace_id(),
        span.span_id(),
        span.trace_flags().to_u8() & 1
    );
    let context = TraceContext::new(&traceparent).ok()?;
    let with = context
        .clone()
        .with_tracestate(&span.trace_state().header());
    Some(with.unwrap_or(context))
}

/// The context with the baggage of another one. Baggage over its limits is left out.
pub(super) fn with_baggage(context: TraceContext, of: &Context) -> TraceContext {
    let mut text = String::new();
    for (key, (value, metadata)) in of.baggage() {
        if !text.is_empty() {
            text.push(',');
        }
        text.push_str(key.as_str());
        text.push('=');
        encode(value.as_str(), &mut text);
        for property in metadata
            .as_str()
            .split(';')
            .filter(|it| !it.trim().is_empty())
        {
            text.push(';');
            text.push_str(property.trim());
        }
    }
    context.clone().with_baggage(&text).unwrap_or(context)
}

/// Percent-encodes what must not be in a value (section 3.3.1.1 of W3C Baggage).
fn encode(value: &str, text: &mut String) {
    for byte in value.bytes() {
        if byte.is_ascii_graphic() && !matches!(byte, b'"' | b',' | b';' | b'\\' | b'%') {
            text.push(char::from(byte));
        } else {
            // Writing to a text can't fail.
            let _ = write!(text, "%{byte:02X}");
        }
    }
}

#[cfg(test)]
mod tests {
    use opentelemetry::KeyValue;

    use super::*;

    #[test]
    fn a_context_survives_the_way_there_and_back() {
        for flags in ["00", "01"] {
            let text = format!("00-0af7651916cd43dd8448eb211c80319c-00f067aa0ba902b7-{flags}");
            let context = TraceContext::new(&text).unwrap();
            for context in [
                context.clone(),
                context.with_tracestate("a=1,b@c=2").unwrap(),
            ] {
                assert_eq!(trace_context(&span_context(&context)), Some(context));
            }
        }
        assert_eq!(trace_context(&SpanContext::empty_context()), None);
    }

    #[test]
    fn baggage_is_encoded() {
        let parent = "00-0af7651916cd43dd8448eb211c80319c-00f067aa0ba902b7-01";
        let context = TraceContext::new(parent).unwrap();
        let of = Context::new().with_baggage([KeyValue::new("tenant", "a b,c%é;\"")]);
        let with = with_baggage(context.clone(), &of);
        assert_eq!(with.baggage(), Some("tenant=a%20b%2Cc%25%C3%A9%3B%22"));
        let without = with_baggage(context, &Context::new());
        assert_eq!(without.baggage(), None);
    }
}
