//! The hook that connects a tracing library.

use http::HeaderMap;

use super::TraceContext;

/// Where trace contexts come from, and how attempts carry them. Set it with
/// [`DurableBuilder::trace_context`](crate::DurableBuilder::trace_context).
///
/// The feature `otel` has one for OpenTelemetry, which makes spans too. This trait is for other
/// libraries, and for other versions of OpenTelemetry.
///
/// All handles that deliver a channel should have the same hook: without one, a process sends
/// requests without their trace context.
///
/// # Examples
///
/// The trace of the request that an application serves, kept in a task-local:
///
/// ```
/// use requeuest::{Durable, TraceContext, TraceContextHook};
///
/// tokio::task_local! {
///     static SERVED: TraceContext;
/// }
///
/// struct OfServedRequest;
///
/// impl TraceContextHook for OfServedRequest {
///     fn extract(&self) -> Option<TraceContext> {
///         SERVED.try_with(Clone::clone).ok()
///     }
/// }
///
/// # fn example(pool: sqlx::PgPool) -> Result<(), requeuest::Error> {
/// let durable = Durable::builder(pool).trace_context(OfServedRequest).build()?;
/// # Ok(()) }
/// ```
pub trait TraceContextHook: Send + Sync + 'static {
    /// The trace context of a request that is about to be persisted, or `None`. Called once for
    /// each request, on the task and thread of its caller. It must not block.
    fn extract(&self) -> Option<TraceContext>;

    /// Puts the stored context into the headers of an attempt, after the handle's other
    /// [hooks](crate::hooks). Called for each attempt of a request that has one, by the process
    /// that makes the attempt. It must not block.
    ///
    /// By default, an attempt that has a `traceparent` keeps it
    /// ([`TraceContext::insert_into`]). To replace it: [`TraceContext::replace_in`].
    fn inject(&self, context: &TraceContext, headers: &mut HeaderMap) {
        context.insert_into(headers);
    }
}
