//! The clients that send: a wrapped service, or a plain reqwest client.

use std::future::Future;
use std::pin::Pin;
use std::sync::{Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use http_body::Body as HttpBody;
use pin_project::pin_project;
use tower::util::{BoxCloneService, MapErr};
use tower::{Service, ServiceExt};
use url::Url;

use crate::body::Body;
use crate::error::BoxError;

/// The services that send for this crate: an alias of the bound in its `where` clause, which holds
/// for every type that meets it. It can't be implemented otherwise.
pub trait HttpClient: sealed::HttpClient {}

impl<S: sealed::HttpClient> HttpClient for S {}

mod sealed {
    use super::{Body, BoxError, HttpBody, Service};

    /// A [`Service`] from requests to responses with any body.
    pub trait HttpClient:
        Service<
            http::Request<Body>,
            Response = http::Response<Self::ResponseBody>,
            Error: Into<BoxError>,
            Future: Send + 'static,
        > + Clone
        + Send
        + 'static
    {
        type ResponseBody: HttpBody<Data: Send, Error: Into<BoxError>> + Send + 'static;
    }

    impl<S, B> HttpClient for S
    where
        S: Service<http::Request<Body>, Response = http::Response<B>> + Clone + Send + 'static,
        S::Error: Into<BoxError>,
        S::Future: Send + 'static,
        B: HttpBody + Send + 'static,
        B::Data: Send,
        B::Error: Into<BoxError>,
    {
        type ResponseBody = B;
    }
}

/// Any HTTP client, with its type erased.
pub(crate) type Transport = BoxCloneService<http::Request<Body>, http::Response<Body>, BoxError>;

/// Erases a service's type.
pub(crate) fn erase<S: HttpClient>(service: S) -> Transport {
    let service: MapErr<_, fn(S::Error) -> BoxError> = service
        .map_response(wrap_body::<S::ResponseBody> as fn(_) -> _)
        .map_err(Into::into);
    BoxCloneService::new(service)
}

fn wrap_body<B>(response: http::Response<B>) -> http::Response<Body>
where
    B: HttpBody + Send + 'static,
    B::Data: Send,
    B::Error: Into<BoxError>,
{
    response.map(Body::wrap)
}

/// The transport of attempts that don't run through a caller's own client. The runner claims
/// nothing until it is known.
#[derive(Default)]
pub(crate) struct DefaultTransport {
    // `BoxCloneService` isn't `Sync`.
    transport: Mutex<Option<Transport>>,
    known: tokio::sync::Notify,
}

impl DefaultTransport {
    /// Sets the transport unless one is set.
    pub(crate) fn offer(&self, transport: impl FnOnce() -> Transport) {
        let mut current = self
            .transport
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if current.is_none() {
            *current = Some(transport());
            self.known.notify_waiters();
        }
    }

    pub(crate) fn is_known(&self) -> bool {
        self.transport
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .is_some()
    }

    pub(crate) fn get(&self) -> Option<Transport> {
        self.transport
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Waits until a transport is known.
    pub(crate) async fn known(&self) {
        loop {
            let known = self.known.notified();
            if self.is_known() {
                return;
            }
            known.await;
        }
    }
}

/// Adapts a [`reqwest::Client`] to `Service<http::Request<Body>>`, for
/// [`DurableBuilder::transport`](crate::DurableBuilder::transport) and for tower stacks.
///
/// A user name and password in the URL become an `Authorization` header, as with reqwest itself.
///
/// # Examples
///
/// ```
/// use requeuest::{Durable, ReqwestTransport};
///
/// # fn example(pool: sqlx::PgPool) -> Result<(), Box<dyn std::error::Error>> {
/// let client = reqwest::Client::builder().user_agent("billing/1.0").build()?;
/// let durable = Durable::builder(pool).transport(ReqwestTransport::new(client)).build()?;
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
pub struct ReqwestTransport {
    client: reqwest::Client,
}

impl ReqwestTransport {
    /// Sends with the given client, as it is configured.
    pub fn new(client: reqwest::Client) -> Self {
        Self { client }
    }

    /// The client that sends if no other transport was given. It follows no redirects, because the
    /// answer to a request is its response. It has no retries of its own, because each attempt must
    /// be counted. It gives up connecting after ten seconds.
    pub(crate) fn plain() -> Result<Self, reqwest::Error> {
        let client = reqwest::Client::builder()
            .redirect(reqwest::redirect::Policy::none())
            .retry(reqwest::retry::never())
            .connect_timeout(Duration::from_secs(10))
            .build()?;
        Ok(Self::new(client))
    }
}

impl From<reqwest::Client> for ReqwestTransport {
    fn from(client: reqwest::Client) -> Self {
        Self::new(client)
    }
}

impl Service<http::Request<Body>> for ReqwestTransport {
    type Response = http::Response<reqwest::Body>;
    type Error = reqwest::Error;
    type Future = ReqwestFuture;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), reqwest::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> ReqwestFuture {
        let (parts, body) = request.into_parts();
        // The builder turns credentials in the URL into a header.
        let mut builder = self
            .client
            .request(parts.method, parts.uri.to_string())
            .headers(parts.headers)
            .version(parts.version);
        if !body.is_end_stream() {
            builder = builder.body(body);
        }
        ReqwestFuture(match builder.build() {
            Ok(request) => State::Sending(self.client.call(request)),
            Err(error) => State::Refused(Some(error)),
        })
    }
}

/// The response future of [`ReqwestTransport`].
#[pin_project]
#[derive(Debug)]
pub struct ReqwestFuture(#[pin] State);

#[pin_project(project = StateProj)]
#[derive(Debug)]
enum State {
    Sending(#[pin] <reqwest::Client as Service<reqwest::Request>>::Future),
    Refused(Option<reqwest::Error>),
}

impl Future for ReqwestFuture {
    type Output = reqwest::Result<http::Response<reqwest::Body>>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match self.project().0.project() {
            StateProj::Sending(sending) => sending.poll(cx).map_ok(from_reqwest),
            StateProj::Refused(error) => match error.take() {
                Some(error) => Poll::Ready(Err(error)),
                None => Poll::Pending,
            },
        }
    }
}

/// The URL that a response came from. An [`http::Response`] has no field for it, unlike a
/// [`reqwest::Response`].
#[derive(Clone, Debug)]
pub(crate) struct ResponseUrl(pub(crate) Url);

pub(crate) fn from_reqwest(response: reqwest::Response) -> http::Response<reqwest::Body> {
    let url = ResponseUrl(response.url().clone());
    let mut response = http::Response::from(response);
    response.extensions_mut().insert(url);
    response
}
