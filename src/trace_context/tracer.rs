//! What makes spans of requests and attempts: more than a [`TraceContextHook`] can, and without
//! naming a tracing library.

use std::fmt;
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;

use http::{HeaderMap, Method, StatusCode, Uri, Version};

use super::{TraceContext, TraceContextHook};
use crate::classify::FailureClass;
use crate::error::Error;
use crate::id::RequestId;

/// The tracer of a handle.
#[derive(Clone)]
pub(crate) struct Tracing(pub(crate) Arc<dyn Tracer>);

impl fmt::Debug for Tracing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Tracing")
    }
}

pub(crate) trait Tracer: Send + Sync {
    /// A request is about to be persisted. Called on its caller's task. Returns the context that is
    /// stored with the request, and the span of the call, if there is one.
    fn enqueue(&self, request: &Enqueuing<'_>) -> (Option<TraceContext>, Option<EnqueueSpan>);

    /// An attempt begins. `None` if nothing has to be done for it.
    fn attempt(&self, attempt: &Attempted<'_>) -> Option<Box<dyn AttemptSpan>>;
}

/// A request on its way into the database.
pub(crate) struct Enqueuing<'a> {
    pub(crate) id: RequestId,
    pub(crate) channel: &'a str,
    pub(crate) headers: &'a HeaderMap,
}

/// An attempt that begins.
pub(crate) struct Attempted<'a> {
    pub(crate) id: RequestId,
    pub(crate) channel: &'a str,
    pub(crate) number: u32,
    /// What is stored with the request.
    pub(crate) context: Option<&'a TraceContext>,
}

/// The span of an enqueue. It ends when it is dropped.
pub(crate) struct EnqueueSpan(pub(crate) Box<dyn EndEnqueue>);

impl EnqueueSpan {
    pub(crate) fn end(self, persisted: Result<RequestId, &Error>) {
        self.0.end(persisted);
    }
}

pub(crate) trait EndEnqueue: Send {
    fn end(self: Box<Self>, persisted: Result<RequestId, &Error>);
}

/// The spans of an attempt. If this is dropped first, the attempt was given up.
pub(crate) trait AttemptSpan: Send + Sync {
    /// Runs a part of the attempt with the span as the current one.
    fn scope(&self, part: &mut dyn FnMut());

    /// The attempt's hooks are done, and the request is sent next.
    fn begin_sending(&self, sending: Sending<'_>);

    /// Its response was read, or it failed.
    fn end_sending(&self, received: Received<'_>);

    /// The attempt's result was judged. `error` is its class or status if the request isn't
    /// completed by it.
    fn end(self: Box<Self>, error: Option<Result<StatusCode, FailureClass>>);
}

/// A request that is about to be sent.
pub(crate) struct Sending<'a> {
    pub(crate) method: &'a Method,
    pub(crate) uri: &'a Uri,
    pub(crate) headers: &'a mut HeaderMap,
    /// The client is the crate's own, which makes no spans.
    pub(crate) by_own_client: bool,
}

/// What sending a request brought.
pub(crate) enum Received<'a> {
    Response(StatusCode, Version),
    Failure(FailureClass, &'a str),
}

/// Polls the future within the span.
pub(crate) async fn in_scope<T>(span: &dyn AttemptSpan, future: impl Future<Output = T>) -> T {
    let mut future = pin!(future);
    poll_fn(|cx| {
        let mut polled = Poll::Pending;
        span.scope(&mut || polled = future.as_mut().poll(cx));
        polled
    })
    .await
}

/// Makes no spans, and leaves the context to a hook.
pub(crate) struct ForHook<H>(pub(crate) Arc<H>);

impl<H: TraceContextHook> Tracer for ForHook<H> {
    fn enqueue(&self, _: &Enqueuing<'_>) -> (Option<TraceContext>, Option<EnqueueSpan>) {
        (self.0.extract(), None)
    }

    fn attempt(&self, attempt: &Attempted<'_>) -> Option<Box<dyn AttemptSpan>> {
        let context = attempt.context?.clone();
        let hook = Arc::clone(&self.0);
        Some(Box::new(Injecting { hook, context }))
    }
}

struct Injecting<H> {
    hook: Arc<H>,
    context: TraceContext,
}

impl<H: TraceContextHook> AttemptSpan for Injecting<H> {
    fn scope(&self, part: &mut dyn FnMut()) {
        part();
    }

    fn begin_sending(&self, sending: Sending<'_>) {
        self.hook.inject(&self.context, sending.headers);
    }

    fn end_sending(&self, _: Received<'_>) {}

    fn end(self: Box<Self>, _: Option<Result<StatusCode, FailureClass>>) {}
}
