//! A [`reqwest::Client`] as a transport.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use http_body::Body as _;
use pin_project::pin_project;
use tower::Service;
use url::Url;

use crate::body::Body;

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
#[derive(Clone)]
pub struct ReqwestTransport {
    client: reqwest::Client,
}

impl ReqwestTransport {
    /// Sends with the given client, as it is configured.
    pub fn new(client: reqwest::Client) -> Self {
        Self { client }
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
pub struct ReqwestFuture(#[pin] State);

#[pin_project(project = StateProj)]
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

// Without the client, whose default headers may be credentials, and the request's URL.

impl fmt::Debug for ReqwestTransport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReqwestTransport").finish_non_exhaustive()
    }
}

impl fmt::Debug for ReqwestFuture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReqwestFuture").finish_non_exhaustive()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_shows_no_secret() {
        let mut headers = http::HeaderMap::new();
        headers.insert("x-mine", "hunter2".parse().unwrap());
        let proxy = reqwest::Proxy::all("http://u:hunter3@127.0.0.1:1/hunter4").unwrap();
        let client = reqwest::Client::builder()
            .default_headers(headers)
            .proxy(proxy);
        let mut transport = ReqwestTransport::new(client.build().unwrap());
        let mut shown = vec![format!("{transport:?}")];
        for uri in ["http://u:hunter5@localhost:1/hunter6?hunter7", "/hunter8"] {
            let mut request = http::Request::new(Body::empty());
            *request.uri_mut() = uri.parse().unwrap();
            shown.push(format!("{:?}", transport.call(request)));
        }
        assert!(!shown.concat().contains("hunter"), "{shown:?}");
    }
}
