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
/// use http_body_util::Full;
/// use hyper_util::client::legacy::Client;
/// use hyper_util::rt::TokioExecutor;
/// use requeuest::{Body, Durable, MapBody};
///
/// # fn example(pool: sqlx::PgPool) -> Result<(), Box<dyn std::error::Error>> {
/// let client: Client<_, Full<Bytes>> = Client::builder(TokioExecutor::new()).build_http();
/// // An attempt's body is in memory, unless its request passes through without being persisted.
/// let client = MapBody::new(client, |body: Body| {
///     Full::new(Bytes::copy_from_slice(body.as_bytes().unwrap_or_default()))
/// });
/// let durable = Durable::builder(pool).transport(client).build()?;
/// # Ok(()) }
/// ```
///
/// For a client over axum's body, the conversion is `axum::body::Body::new`.
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
