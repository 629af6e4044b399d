//! The entry point for tower: a layer over any HTTP client service.
//!
//! The wrapped service makes every attempt, and the caller gets the stored response. The layer's
//! error is [`Error`] and not the service's: after a restart, only the recorded text of an error
//! exists.

use std::fmt;
use std::future::Future;
use std::marker::PhantomData;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use http_body::Body as HttpBody;
use http_body_util::combinators::Collect;
use http_body_util::{BodyExt, Limited};
use pin_project::pin_project;
use sqlx::PgPool;
use tower::util::Oneshot;
use tower::{Layer, Service, ServiceExt};
use tracing::Span;

use crate::body::Body;
use crate::context;
use crate::durable::{Awaiting, Durable, DurableBuilder, Mode, RequestHead};
use crate::engine::attempt::caller_client::CallerClient;
use crate::engine::attempt::transport::{HttpClient, erase};
use crate::engine::enqueue::Submitted;
use crate::error::{BoxError, Error};
use crate::id::RequestId;
use crate::into_request::body_error;
use crate::repetition::Marker;
use crate::request::Request;

/// The header that carries a fired request's id in the `202 Accepted` of the layer and the
/// middleware: `requeuest-id`.
pub const REQUEST_ID_HEADER: HeaderName = HeaderName::from_static("requeuest-id");

/// Makes every request through a service durable.
///
/// Each attempt's request carries its [`RequestId`], its [`AttemptNumber`](crate::AttemptNumber)
/// and its [`Channel`](crate::Channel) in its extensions. Responses carry the [`RequestId`] in
/// theirs.
///
/// While its caller waits, the attempts of a request run in the [`tracing`] span that was current
/// when the service was called, although other tasks make them. So does the first attempt of a
/// fired request. Other attempts have no span. Task-locals of the caller are not carried: inner
/// layers find what they need in the request's extensions, which each attempt gets a copy of.
///
/// A layer is for one client. The first service that it wraps sends every request that outlives its
/// caller, also of callers of another service that it wraps later, which is logged as a warning.
/// Clone the service rather than wrap its client again. A second client needs a layer of its own,
/// with a [`channel`](DurableBuilder::channel) of its own: [`DurableBuilder::build_layer`].
///
/// The wrapped client bounds its own sockets. A [`reqwest::Client`] bounds its idle connections for
/// each host only: for thousands of hosts, give it a short
/// [`pool_idle_timeout`](reqwest::ClientBuilder::pool_idle_timeout).
///
/// Make it the outermost layer, and remove layers that retry. For a layer above that retries, such
/// as tower's `Retry`, each try is a new request with an idempotency key of its own; the first such
/// repetition is logged as a warning. Only if its policy copies the extensions of the response to
/// the next try, that try attaches to the request that was persisted.
///
/// # Examples
///
/// ```no_run
/// use requeuest::{Body, DurableLayer, ReqwestTransport};
/// use tower::{ServiceBuilder, ServiceExt};
///
/// # async fn example(pool: sqlx::PgPool) -> Result<(), Box<dyn std::error::Error>> {
/// let client = ServiceBuilder::new()
///     .layer(DurableLayer::new(pool))
///     .service(ReqwestTransport::new(reqwest::Client::new()));
///
/// let request = http::Request::post("https://example.com/").body(Body::from("hello"))?;
/// let response = client.clone().oneshot(request).await?;
/// # Ok(()) }
/// ```
pub struct DurableLayer<B = Body> {
    durable: Durable,
    body: PhantomData<fn(B)>,
}

impl<B> DurableLayer<B> {
    /// A layer with the defaults of [`DurableBuilder`](crate::DurableBuilder). The first service
    /// that it wraps also makes background attempts; until there is one, the runner delivers
    /// nothing, and after 10 seconds a warning says so. Starts the engine, as [`Durable::new`]
    /// does.
    ///
    /// # Panics
    ///
    /// If a thread is needed and can't be started.
    pub fn new(pool: PgPool) -> Self {
        match Durable::builder(pool).build_layer() {
            Ok(layer) => layer,
            Err(error) => panic!("{error}"),
        }
    }

    /// The handle underneath, to ask for responses and statuses by id, and to shut down.
    pub fn durable(&self) -> &Durable {
        &self.durable
    }
}

impl<B> From<Durable> for DurableLayer<B> {
    fn from(durable: Durable) -> Self {
        Self {
            durable,
            body: PhantomData,
        }
    }
}

// Derived, these would ask the same of the body.
impl<B> Clone for DurableLayer<B> {
    fn clone(&self) -> Self {
        self.durable.clone().into()
    }
}

impl<B> fmt::Debug for DurableLayer<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("DurableLayer").field(&self.durable).finish()
    }
}

impl Durable {
    /// A [`tower::Layer`] over this handle.
    ///
    /// The wrapped service sends while a caller waits. Background attempts go through the handle's
    /// [`transport`](DurableBuilder::transport). With [`DurableLayer::new`] or
    /// [`DurableBuilder::build_layer`] the wrapped service makes both.
    pub fn layer<B>(&self) -> DurableLayer<B> {
        self.warn_of_plain_transport();
        DurableLayer::from(self.clone())
    }
}

impl DurableBuilder {
    /// Builds a layer whose wrapped service makes all attempts, background attempts included. The
    /// runner begins to deliver once the layer has wrapped its first service. If that takes longer
    /// than 10 seconds, a warning says so.
    ///
    /// # Errors
    ///
    /// As for [`build`](Self::build).
    pub fn build_layer<B>(mut self) -> Result<DurableLayer<B>, Error> {
        self.send_with_wrapped_service();
        self.build().map(DurableLayer::from)
    }
}

impl<S, B> Layer<S> for DurableLayer<B>
where
    S: HttpClient,
{
    type Service = DurableService<S, B>;

    fn layer(&self, inner: S) -> DurableService<S, B> {
        let engine = self.durable.engine();
        if !engine.offer_transport(|| erase(inner.clone())) {
            self.durable.warn_of_second_service();
        }
        DurableService {
            inner,
            durable: self.durable.clone(),
            body: PhantomData,
        }
    }
}

/// The service that [`DurableLayer`] makes.
///
/// It is always ready: each attempt is made on a clone of the wrapped service, once that clone is
/// ready. Per-request [`Options`](crate::Options) are taken from the request's extensions.
///
/// `B` is the body of the requests that it takes, usually inferred from the first call: any
/// [`http_body::Body`], such as [`Body`], `Full<Bytes>` or axum's.
pub struct DurableService<S, B = Body> {
    inner: S,
    durable: Durable,
    body: PhantomData<fn(B)>,
}

impl<S, B> DurableService<S, B> {
    /// The handle underneath, to ask for responses and statuses by id, and to shut down.
    pub fn durable(&self) -> &Durable {
        &self.durable
    }

    /// The wrapped service.
    pub fn get_ref(&self) -> &S {
        &self.inner
    }

    /// The same service for requests with bodies of another type.
    #[must_use]
    pub fn with_body<C>(self) -> DurableService<S, C> {
        DurableService {
            inner: self.inner,
            durable: self.durable,
            body: PhantomData,
        }
    }
}

impl<S: Clone, B> Clone for DurableService<S, B> {
    fn clone(&self) -> Self {
        Self {
            inner: self.inner.clone(),
            durable: self.durable.clone(),
            body: PhantomData,
        }
    }
}

impl<S: fmt::Debug, B> fmt::Debug for DurableService<S, B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DurableService")
            .field("inner", &self.inner)
            .field("durable", &self.durable)
            .finish_non_exhaustive()
    }
}

// The only implementation, so that the compiler knows the request's type before the first call.
impl<S, B> Service<http::Request<B>> for DurableService<S, B>
where
    S: HttpClient,
    B: HttpBody + Send + 'static,
    B::Data: Send,
    B::Error: Into<BoxError>,
{
    type Response = http::Response<Body>;
    type Error = Error;
    type Future = ResponseFuture<S, B>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Error>> {
        // `call` never calls `inner` itself, so its readiness would be wasted.
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<B>) -> ResponseFuture<S, B> {
        let inner = self.inner.clone();
        // An attempt comes here if a transport contains this or another durable service. The handle
        // that makes it may have no guard of its own.
        let passes = context::is_attempt(request.extensions())
            || self.durable.passes_through(&RequestHead::of_http(&request));
        if passes {
            if let Err(error) = self.durable.admit(request.uri()) {
                return ResponseFuture(State::Refused(Some(error)));
            }
            let passing = inner.oneshot(request.map(Body::wrap));
            return ResponseFuture(State::Passing(passing));
        }
        let limit = self.durable.max_request_body();
        let (parts, body) = request.into_parts();
        // A declared length over the limit is refused before the body is read.
        if body.size_hint().lower() > limit as u64 {
            return ResponseFuture(State::Refused(Some(Error::body_too_large(limit))));
        }
        let absent = body.is_end_stream();
        ResponseFuture(State::Collecting {
            body: Limited::new(body, limit).collect(),
            rest: Some(Rest {
                parts,
                absent,
                inner,
                durable: self.durable.clone(),
                span: Span::current(),
            }),
        })
    }
}

/// The response future of [`DurableService`]. Dropping it never cancels a persisted request.
#[pin_project]
pub struct ResponseFuture<S, B>(#[pin] State<S, B>)
where
    S: Service<http::Request<Body>>,
    B: HttpBody,
    B::Error: Into<BoxError>;

#[pin_project(project = StateProj)]
enum State<S, B>
where
    S: Service<http::Request<Body>>,
    B: HttpBody,
    B::Error: Into<BoxError>,
{
    /// Passes through without being persisted.
    Passing(#[pin] Oneshot<S, http::Request<Body>>),
    Refused(Option<Error>),
    Collecting {
        #[pin]
        body: Collect<Limited<B>>,
        rest: Option<Rest<S>>,
    },
    Firing(Submitted),
    Awaiting {
        waiting: Awaiting,
        marker: Marker,
    },
}

/// A request without its body, and how it is sent.
struct Rest<S> {
    parts: http::request::Parts,
    absent: bool,
    inner: S,
    durable: Durable,
    /// The caller's span.
    span: Span,
}

impl<S: HttpClient> Rest<S> {
    fn submit<B>(
        self,
        data: bytes::Bytes,
        trailers: Option<HeaderMap>,
    ) -> Result<State<S, B>, Error>
    where
        B: HttpBody,
        B::Error: Into<BoxError>,
    {
        let Self {
            mut parts,
            absent,
            inner,
            durable,
            span,
        } = self;
        // Not for the attempts: an inner layer of the same handle would attach to this request.
        let marker = parts.extensions.remove();
        let extensions = parts.extensions.clone();
        let request = Request::from_parts(parts, (!absent).then_some(data), trailers)?;
        let fire = request.options.fire;
        let mode = if fire { Mode::Fired } else { Mode::Awaited };
        let prepared = durable.prepare_call(request, mode, marker)?;
        let marker = durable.marker(&prepared);
        let client = Some(CallerClient::service(erase(inner), extensions, span));
        Ok(if fire {
            State::Firing(durable.submit(prepared, client)?)
        } else {
            State::Awaiting {
                waiting: durable.submit_awaited(prepared, client)?,
                marker,
            }
        })
    }
}

impl<S, B> Future for ResponseFuture<S, B>
where
    S: HttpClient,
    B: HttpBody,
    B::Error: Into<BoxError>,
{
    type Output = Result<http::Response<Body>, Error>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut state = self.project().0;
        loop {
            let next = match state.as_mut().project() {
                StateProj::Passing(passing) => {
                    return passing
                        .poll(cx)
                        .map_ok(|response| response.map(Body::wrap))
                        .map_err(|error| Error::pass_through(error.into()));
                }
                StateProj::Refused(error) => {
                    return match error.take() {
                        Some(error) => Poll::Ready(Err(error)),
                        None => Poll::Pending,
                    };
                }
                StateProj::Collecting { body, rest } => {
                    let collected = ready!(body.poll(cx));
                    let Some(rest) = rest.take() else {
                        return Poll::Pending;
                    };
                    let limit = rest.durable.max_request_body();
                    let submitted = match collected {
                        Ok(collected) => {
                            let trailers = collected.trailers().cloned();
                            rest.submit(collected.to_bytes(), trailers)
                        }
                        Err(error) => Err(body_error(error, limit)),
                    };
                    submitted.unwrap_or_else(|error| State::Refused(Some(error)))
                }
                StateProj::Firing(submitted) => {
                    return Pin::new(submitted).poll(cx).map_ok(accepted);
                }
                StateProj::Awaiting { waiting, marker } => {
                    let outcome = ready!(Pin::new(&mut *waiting).poll(cx));
                    let (response, marker) = waiting.durable().end_call(marker.clone(), outcome);
                    return Poll::Ready(response.map(|response| {
                        let mut response = http::Response::from(response);
                        // A retry layer may take the response's extensions for its next try.
                        if let Some(marker) = marker {
                            response.extensions_mut().insert(marker);
                        }
                        response
                    }));
                }
            };
            state.set(next);
        }
    }
}

impl<S, B> fmt::Debug for ResponseFuture<S, B>
where
    S: Service<http::Request<Body>>,
    B: HttpBody,
    B::Error: Into<BoxError>,
{
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResponseFuture").finish_non_exhaustive()
    }
}

/// The response to a fired request.
pub(crate) fn accepted(id: RequestId) -> http::Response<Body> {
    let mut response = http::Response::new(Body::empty());
    *response.status_mut() = StatusCode::ACCEPTED;
    if let Ok(text) = HeaderValue::from_str(&id.to_string()) {
        response.headers_mut().insert(REQUEST_ID_HEADER, text);
    }
    response.extensions_mut().insert(id);
    response
}
