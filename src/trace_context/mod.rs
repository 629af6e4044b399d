//! Which trace a request belongs to, in the headers of [W3C Trace Context].
//!
//! A call and its attempts are far apart: in time, and often in different processes. So the trace
//! context of the call is stored with the request, and each attempt carries it. This module knows
//! the headers and no tracing library. A [`TraceContextHook`] connects the two.
//!
//! [W3C Trace Context]: https://www.w3.org/TR/trace-context/

mod baggage;
mod hook;
mod traceparent;
#[cfg_attr(
    not(feature = "otel"),
    allow(dead_code, reason = "hooks look at less than spans have")
)]
mod tracer;
mod tracestate;

use std::fmt;

use http::{HeaderMap, HeaderName, HeaderValue};

pub use self::hook::TraceContextHook;
#[cfg(feature = "otel")]
pub(crate) use self::tracer::EndEnqueue;
pub(crate) use self::tracer::{
    AttemptSpan, Attempted, EnqueueSpan, Enqueuing, ForHook, Received, Sending, Tracer, Tracing,
    in_scope,
};
use crate::error::Error;

pub(crate) const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
pub(crate) const TRACESTATE: HeaderName = HeaderName::from_static("tracestate");
pub(crate) const BAGGAGE: HeaderName = HeaderName::from_static("baggage");

/// The place of a request in a trace: the `traceparent` and `tracestate` of [W3C Trace Context],
/// and by choice the `baggage` of [W3C Baggage].
///
/// It is stored in the request's head, so it survives a restart and reaches other processes. With
/// encryption it is encrypted. It says nothing of who may see a trace: leave baggage out if it
/// holds what the receiver must not see.
///
/// `Debug` shows the trace, and no tracestate or baggage.
///
/// # Examples
///
/// ```
/// use requeuest::TraceContext;
///
/// let context = TraceContext::new("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01")?
///     .with_tracestate("vendor=opaque")?;
/// assert_eq!(context.trace_id(), "4bf92f3577b34da6a3ce929d0e0e4736");
/// assert!(context.is_sampled());
/// # Ok::<(), requeuest::Error>(())
/// ```
///
/// [W3C Trace Context]: https://www.w3.org/TR/trace-context/
/// [W3C Baggage]: https://www.w3.org/TR/baggage/
#[derive(Clone, PartialEq, Eq)]
pub struct TraceContext {
    traceparent: Box<str>,
    tracestate: Option<Box<str>>,
    baggage: Option<Box<str>>,
}

impl TraceContext {
    /// From a `traceparent` of version 00.
    ///
    /// # Errors
    ///
    /// If it is not one (section 3.2 of the recommendation): `00`, the trace id, the parent id and
    /// the flags, in lower-case hexadecimal digits and joined by `-`, neither id all zeros. The
    /// error's [`field`](Error::field) is `traceparent`.
    pub fn new(traceparent: &str) -> Result<Self, Error> {
        traceparent::validate(traceparent)
            .map_err(|reason| Error::request("traceparent", reason))?;
        Ok(Self {
            traceparent: traceparent.into(),
            tracestate: None,
            baggage: None,
        })
    }

    /// With this `tracestate`. An empty one is none. Of one over 512 characters, as much is kept as
    /// section 3.3.1.5 of the recommendation asks for: entries over 128 characters go first, then
    /// those at the end.
    ///
    /// # Errors
    ///
    /// If it is not a list of up to 32 entries `key=value` with different keys (section 3.3.1). The
    /// error's [`field`](Error::field) is `tracestate`.
    pub fn with_tracestate(mut self, tracestate: &str) -> Result<Self, Error> {
        let kept = tracestate::shortened(tracestate);
        let kept = kept.map_err(|reason| Error::request("tracestate", reason))?;
        self.tracestate = (!kept.is_empty()).then(|| kept.into());
        Ok(self)
    }

    /// With this `baggage`. An empty one is none. Receivers see it.
    ///
    /// # Errors
    ///
    /// If it is not a list of up to 64 entries `key=value`, or is over 8192 bytes. The error's
    /// [`field`](Error::field) is `baggage`.
    pub fn with_baggage(mut self, baggage: &str) -> Result<Self, Error> {
        let baggage = baggage.trim_matches([' ', '\t']);
        baggage::validate(baggage).map_err(|reason| Error::request("baggage", reason))?;
        self.baggage = (!baggage.is_empty()).then(|| baggage.into());
        Ok(self)
    }

    /// Without its baggage.
    #[cfg(feature = "otel")]
    pub(crate) fn without_baggage(mut self) -> Self {
        self.baggage = None;
        self
    }

    /// The context in the headers of a request that arrived, without its baggage. `None` without a
    /// valid `traceparent`. A `traceparent` of a later version is read as one of version 00, as
    /// section 3.2.4 of the recommendation asks. A `tracestate` that is not valid is left out.
    pub fn from_headers(headers: &HeaderMap) -> Option<Self> {
        let mut values = headers.get_all(TRACEPARENT).iter();
        let (Some(traceparent), None) = (values.next(), values.next()) else {
            return None;
        };
        let traceparent = traceparent::read(traceparent.to_str().ok()?)?;
        let context = Self {
            traceparent: traceparent.into(),
            tracestate: None,
            baggage: None,
        };
        // Several headers are one list (section 3.3.1).
        let values = headers.get_all(TRACESTATE).iter();
        let values: Option<Vec<_>> = values.map(|value| value.to_str().ok()).collect();
        let tracestate = values.unwrap_or_default().join(",");
        let with = context.clone().with_tracestate(&tracestate);
        Some(with.unwrap_or(context))
    }

    /// The `traceparent`.
    pub fn traceparent(&self) -> &str {
        &self.traceparent
    }

    /// The `tracestate`, if there is one.
    pub fn tracestate(&self) -> Option<&str> {
        self.tracestate.as_deref()
    }

    /// The `baggage`, if there is one.
    pub fn baggage(&self) -> Option<&str> {
        self.baggage.as_deref()
    }

    /// The trace's id, in 32 hexadecimal digits.
    pub fn trace_id(&self) -> &str {
        self.traceparent.get(3..35).unwrap_or_default()
    }

    /// The id of the span that the request belongs to, in 16 hexadecimal digits.
    pub fn parent_id(&self) -> &str {
        self.traceparent.get(36..52).unwrap_or_default()
    }

    /// Whether the caller may have recorded the trace: the `sampled` flag.
    pub fn is_sampled(&self) -> bool {
        let digit = self.traceparent.get(54..).unwrap_or_default();
        u8::from_str_radix(digit, 16).is_ok_and(|flags| flags & 1 == 1)
    }

    /// Puts the context into headers, unless they have a `traceparent`. Then they stay as they are:
    /// the request belongs to the trace that it names. A `baggage` of their own stays too.
    pub fn insert_into(&self, headers: &mut HeaderMap) {
        if !headers.contains_key(TRACEPARENT) {
            self.replace_in(headers);
        }
    }

    /// Puts the context into headers, in place of a `traceparent` and a `tracestate` that they
    /// have. A `baggage` of their own stays.
    pub fn replace_in(&self, headers: &mut HeaderMap) {
        // Whatever a caller has set, a tracestate belongs to its traceparent.
        headers.remove(TRACESTATE);
        let mut set = |name, text: &str| {
            if let Ok(value) = HeaderValue::from_str(text) {
                headers.insert(name, value);
            }
        };
        set(TRACEPARENT, &self.traceparent);
        if let Some(tracestate) = &self.tracestate {
            set(TRACESTATE, tracestate);
        }
        if let (Some(baggage), false) = (&self.baggage, headers.contains_key(BAGGAGE)) {
            if let Ok(mut value) = HeaderValue::from_str(baggage) {
                // So that it isn't sent on to where a redirect leads.
                value.set_sensitive(true);
                headers.insert(BAGGAGE, value);
            }
        }
    }
}

impl fmt::Debug for TraceContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TraceContext")
            .field("traceparent", &self.traceparent)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
