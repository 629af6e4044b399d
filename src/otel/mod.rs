//! Spans of requests and attempts, by OpenTelemetry's conventions.
//!
//! ```no_run
//! use requeuest::Durable;
//! use requeuest::otel::OpenTelemetry;
//!
//! # fn example(pool: sqlx::PgPool) -> Result<(), requeuest::Error> {
//! let durable = Durable::builder(pool).open_telemetry(OpenTelemetry::global()).build()?;
//! # Ok(()) }
//! ```
//!
//! # Spans
//!
//! | span | kind | when | parent |
//! |---|---|---|---|
//! | `send {channel}` | PRODUCER | a call, until its request is persisted | the caller's span |
//! | `process {channel}` | CONSUMER | an attempt, with its hooks | `send`, from any process |
//! | `{method}` | CLIENT | sending the request and reading the response | `process` |
//!
//! All attempts of a request belong to the trace of its call, so receivers see one trace id. From
//! the second attempt on, `process` has a link to `send` too. Requests may be retried for a day,
//! and not all backends keep a trace open for as long: with
//! [`new_trace_per_retry`](OpenTelemetry::new_trace_per_retry), each further attempt begins a trace
//! of its own, and the link connects them. The `process` of a request that was persisted without a
//! trace is a root. No span lasts longer than a call or an attempt.
//!
//! There is a CLIENT span where the crate's own transport sends, or a [`ReqwestTransport`] given to
//! [`DurableBuilder::transport`]. A service that a layer wraps, the client below the middleware,
//! and other transports may make their own: the `process` span is current while they send, as
//! [`Context::current`] and as the parent in the headers.
//!
//! The caller's span is the one of [`Context::current`]. With the crate `tracing-opentelemetry`,
//! whose context activation is on by default, that is the current span of `tracing`, and spans of
//! `tracing` that a wrapped client makes are below `process`. A call outside any span, whose
//! request has a `traceparent`, is a child of the span that it names.
//!
//! # Headers
//!
//! Each attempt carries `traceparent` and `tracestate` of its CLIENT span, or of its `process` span
//! if there is none. Headers that the request has itself stay, unless
//! [`replace_headers`](OpenTelemetry::replace_headers) is on. Baggage is not sent, unless
//! [`baggage`](OpenTelemetry::baggage) is on.
//!
//! # Attributes
//!
//! Those of HTTP are of the stable conventions (1.23 and later): `http.request.method` (of an
//! unknown method, `_OTHER` and `http.request.method_original`), `server.address`, `server.port`,
//! `url.full`, `http.response.status_code`, `http.request.resend_count`,
//! `network.protocol.version`, `error.type`. A status from 400 on is an error, as is a failure;
//! `error.type` is then the status or the [`FailureClass`](crate::FailureClass). A `process` span
//! is an error if the attempt doesn't complete its request. Spans of attempts that ended with their
//! caller or by a shutdown have `error.type` `abandoned`.
//!
//! Those of messaging are in development in the conventions and may change with them:
//! `messaging.system` (`requeuest`), `messaging.operation.name`, `messaging.operation.type`,
//! `messaging.destination.name` (the channel) and `messaging.message.id` (the request's id). The
//! number of the attempt is in `requeuest.attempt`.
//!
//! `url.full` is scheme, host and port only, because webhook URLs carry secrets in their path:
//! [`full_url`](OpenTelemetry::full_url) shows more. Headers and bodies are in no span.
//!
//! [`ReqwestTransport`]: crate::ReqwestTransport
//! [`DurableBuilder::transport`]: crate::DurableBuilder::transport
//! [`Context::current`]: opentelemetry::Context::current

mod attempt;
mod attributes;
mod context;
mod enqueue;
mod url;

use std::fmt;
use std::sync::Arc;

use opentelemetry::InstrumentationScope;
use opentelemetry::global::{self, BoxedTracer};
use opentelemetry::trace::{Span, TracerProvider};

pub use opentelemetry;

use self::url::UrlDetail;
use crate::durable::DurableBuilder;
use crate::trace_context::{AttemptSpan, Attempted, EnqueueSpan, Enqueuing, TraceContext, Tracer};

/// Makes spans with OpenTelemetry, and carries the trace context of each call to the request's
/// attempts. Set it with [`DurableBuilder::open_telemetry`]. See the [module](self).
#[must_use = "it does nothing until a builder gets it"]
pub struct OpenTelemetry {
    tracer: BoxedTracer,
    settings: Settings,
}

#[derive(Debug, Default)]
struct Settings {
    baggage: bool,
    replace_headers: bool,
    new_trace_per_retry: bool,
    url: UrlDetail,
}

impl OpenTelemetry {
    /// With the global tracer provider, as it is set now.
    pub fn global() -> Self {
        Self::new(&global::tracer_provider())
    }

    /// With this tracer provider.
    pub fn new<P>(provider: &P) -> Self
    where
        P: TracerProvider,
        P::Tracer: Send + Sync + 'static,
        <P::Tracer as opentelemetry::trace::Tracer>::Span: Span + Send + Sync + 'static,
    {
        let scope = InstrumentationScope::builder(env!("CARGO_PKG_NAME"))
            .with_version(env!("CARGO_PKG_VERSION"))
            .build();
        Self {
            tracer: BoxedTracer::new(Box::new(provider.tracer_with_scope(scope))),
            settings: Settings::default(),
        }
    }

    /// Whether the baggage of the caller's context is stored with the request and sent with each
    /// attempt. Receivers see it, and without encryption, so does each role that can read the
    /// database. Defaults to `false`.
    pub fn baggage(mut self, baggage: bool) -> Self {
        self.settings.baggage = baggage;
        self
    }

    /// Whether attempts carry the context of their own span also if the request has a `traceparent`
    /// of its own. Defaults to `false`.
    pub fn replace_headers(mut self, replace: bool) -> Self {
        self.settings.replace_headers = replace;
        self
    }

    /// Whether each attempt after the first begins a trace of its own, with a link to the call's.
    /// Defaults to `false`.
    pub fn new_trace_per_retry(mut self, new: bool) -> Self {
        self.settings.new_trace_per_retry = new;
        self
    }

    /// Whether `url.full` has the path and the query too, and not only scheme, host and port. User
    /// name, password and fragment are always left out. In the query, `REDACTED` stands for the
    /// values of parameters whose names are those of secrets: names that contain `token`, `secret`,
    /// `passw`, `signature`, `credential`, `auth`, `session`, `jwt` or `accesskey`, those that end
    /// in `key`, and `sig`, `code`, `pwd`, `pass` and `otp`, in upper or lower case.
    /// [`redact_query`](Self::redact_query) adds more. Leave this off if your URLs have secrets in
    /// their paths. Defaults to `false`.
    pub fn full_url(mut self, full: bool) -> Self {
        self.settings.url.full = full;
        self
    }

    /// Further parameters of queries whose values [`full_url`](Self::full_url) hides, in upper or
    /// lower case.
    pub fn redact_query<I>(mut self, names: I) -> Self
    where
        I: IntoIterator,
        I::Item: Into<String>,
    {
        let names = names.into_iter().map(|name| name.into().to_lowercase());
        self.settings.url.secret.extend(names);
        self
    }
}

impl fmt::Debug for OpenTelemetry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OpenTelemetry")
            .field("settings", &self.settings)
            .finish_non_exhaustive()
    }
}

impl DurableBuilder {
    /// Makes spans with OpenTelemetry. In place of a [`trace_context`](Self::trace_context) hook.
    /// All handles that deliver a channel should have it. Defaults to none. See
    /// [`otel`](crate::otel).
    pub fn open_telemetry(self, open_telemetry: OpenTelemetry) -> Self {
        self.tracer(OtelTracer(Arc::new(open_telemetry)))
    }
}

/// The tracer of a handle.
struct OtelTracer(Arc<OpenTelemetry>);

impl Tracer for OtelTracer {
    fn enqueue(&self, request: &Enqueuing<'_>) -> (Option<TraceContext>, Option<EnqueueSpan>) {
        enqueue::begin(&self.0, request)
    }

    fn attempt(&self, attempt: &Attempted<'_>) -> Option<Box<dyn AttemptSpan>> {
        Some(Box::new(attempt::Spans::begin(&self.0, attempt)))
    }
}
