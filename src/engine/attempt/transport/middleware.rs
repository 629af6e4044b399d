//! A reqwest-middleware client as a transport.

use std::pin::Pin;
use std::task::{Context, Poll};

use http_body::Body as _;
use reqwest_middleware::{ClientWithMiddleware, Error as MiddlewareError};
use tower::Service;

use super::from_reqwest;
use crate::body::Body;
use crate::error::{BoxError, Error};

/// Adapts a [`ClientWithMiddleware`] to `Service<http::Request<Body>>`, for
/// [`DurableBuilder::transport`](crate::DurableBuilder::transport): background attempts run through
/// its middleware too.
///
/// Leave any retry middleware out of that client. Each middleware sees the extensions of the
/// attempt, and a [`Durable`](crate::Durable) among them lets attempts pass.
///
/// # Examples
///
/// ```
/// use requeuest::{Durable, MiddlewareTransport};
/// use reqwest_middleware::ClientBuilder;
///
/// # fn example(pool: sqlx::PgPool) -> Result<(), Box<dyn std::error::Error>> {
/// let plain = reqwest::Client::new();
/// // Without `Durable`, for background attempts.
/// let inner = ClientBuilder::new(plain.clone()).build();
/// let durable = Durable::builder(pool).transport(MiddlewareTransport::from(inner)).build()?;
/// let client = ClientBuilder::new(plain).with(durable).build();
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
pub struct MiddlewareTransport {
    client: ClientWithMiddleware,
}

impl MiddlewareTransport {
    /// Sends with the given client, as it is configured.
    pub fn new(client: ClientWithMiddleware) -> Self {
        Self { client }
    }
}

impl From<ClientWithMiddleware> for MiddlewareTransport {
    fn from(client: ClientWithMiddleware) -> Self {
        Self::new(client)
    }
}

impl Service<http::Request<Body>> for MiddlewareTransport {
    type Response = http::Response<reqwest::Body>;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, BoxError>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let client = self.client.clone();
        let (parts, body) = request.into_parts();
        Box::pin(async move {
            // The builder turns credentials in the URL into a header.
            let mut builder = client
                .request(parts.method, parts.uri.to_string())
                .headers(parts.headers)
                .version(parts.version);
            if !body.is_end_stream() {
                builder = builder.body(body);
            }
            // What the client's initialisers attached. The attempt's own extensions go first.
            let mut extensions = std::mem::take(builder.extensions());
            extensions.extend(parts.extensions);
            let request = builder.build()?;
            client
                .execute_with_extensions(request, &mut extensions)
                .await
                .map(from_reqwest)
                .map_err(unwrapped)
        })
    }
}

/// The error of the middleware or of reqwest. The wrapper hides it: it isn't part of the chain of
/// sources.
pub(crate) fn unwrapped(error: MiddlewareError) -> BoxError {
    match error {
        MiddlewareError::Reqwest(error) => error.into(),
        // Of this crate's, if another handle is among the middleware.
        MiddlewareError::Middleware(error) => match error.downcast::<Error>() {
            Ok(own) => own.into(),
            Err(other) => other.into(),
        },
    }
}
