//! Clients over another body type.

use std::fmt;
use std::task::{Context, Poll};

use tower::Service;

use crate::body::Body;

/// Makes a client over another body type one over [`Body`], so that it can be wrapped or registered
/// as a transport.
///
/// # Examples
///
/// ```
/// use bytes::Bytes;
/// use http_body_util::BodyExt;
/// use http_body_util::combinators::BoxBody;
/// use hyper_util::client::legacy::Client;
/// use hyper_util::rt::TokioExecutor;
/// use requeuest::{Body, BodyError, Durable, MapBody};
///
/// # fn example(pool: sqlx::PgPool) -> Result<(), Box<dyn std::error::Error>> {
/// type Boxed = BoxBody<Bytes, BodyError>;
///
/// let client: Client<_, Boxed> = Client::builder(TokioExecutor::new()).build_http();
/// let client = MapBody::new(client, Body::boxed);
/// let durable = Durable::builder(pool).transport(client).build()?;
/// # Ok(()) }
/// ```
///
/// For a client over axum's body, the conversion is `axum::body::Body::new`.
///
/// An attempt's body is in memory, so [`Body::as_bytes`] has all of it. The body of a request that
/// passes through without being persisted may be a stream: a conversion that ignores streams would
/// send such a request with an empty body.
#[derive(Clone, Copy)]
pub struct MapBody<S, F> {
    inner: S,
    convert: F,
}

impl<S, F> MapBody<S, F> {
    /// Sends with `inner`, whose request bodies `convert` makes.
    pub fn new(inner: S, convert: F) -> Self {
        Self { inner, convert }
    }
}

impl<S, F, B> Service<http::Request<Body>> for MapBody<S, F>
where
    S: Service<http::Request<B>>,
    F: FnMut(Body) -> B,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: http::Request<Body>) -> S::Future {
        self.inner.call(request.map(&mut self.convert))
    }
}

impl<S: fmt::Debug, F> fmt::Debug for MapBody<S, F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("MapBody").field(&self.inner).finish()
    }
}
