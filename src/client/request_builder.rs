//! The builder of requests that the older crate has had since its 0.4.

use std::fmt;

use bytes::Bytes;
use http::{HeaderMap, Method};
use url::Url;

use crate::classify::AcceptedResponse;
use crate::request::Request;

impl Request {
    /// Begins to build a request, as the older crate's users do; see
    /// [`RequestBuilder`](crate::client::RequestBuilder).
    pub fn builder() -> RequestBuilder {
        RequestBuilder {
            url: (),
            method: (),
            parts: Parts::default(),
        }
    }
}

/// Builds a [`Request`], with the setters of the older crate since its 0.4. New code uses
/// [`http::Request::builder`].
///
/// The URL and the method must be set: without them there is no `build`.
///
/// # Examples
///
/// ```
/// use requeuest::{AcceptedResponse, Method, Request, Url};
///
/// let request = Request::builder()
///     .method(Method::POST)
///     .url(Url::parse("https://example.com/hook")?)
///     .body("{}")
///     .accept_responses([AcceptedResponse::Success, AcceptedResponse::Status(409)])
///     .build();
/// assert_eq!(request.body().unwrap(), "{}");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
#[must_use]
pub struct RequestBuilder<U = (), M = ()> {
    url: U,
    method: M,
    parts: Parts,
}

/// What has a default.
#[derive(Clone, Default)]
struct Parts {
    body: Option<Bytes>,
    headers: HeaderMap,
    accept: Option<Vec<AcceptedResponse>>,
}

impl<U, M> RequestBuilder<U, M> {
    /// The URL.
    pub fn url(self, url: Url) -> RequestBuilder<Url, M> {
        RequestBuilder {
            url,
            method: self.method,
            parts: self.parts,
        }
    }

    /// The method.
    pub fn method(self, method: Method) -> RequestBuilder<U, Method> {
        RequestBuilder {
            url: self.url,
            method,
            parts: self.parts,
        }
    }

    /// The body. Defaults to none.
    pub fn body(mut self, body: impl Into<Vec<u8>>) -> Self {
        self.parts.body = Some(body.into().into());
        self
    }

    /// The headers. Defaults to none.
    pub fn headers(mut self, headers: HeaderMap) -> Self {
        self.parts.headers = headers;
        self
    }

    /// The responses that end the request, as with [`Request::accept_responses`]. Defaults to any
    /// 2xx, if a [`Client`](crate::Client) spawns the request.
    pub fn accept_responses<I>(mut self, responses: I) -> Self
    where
        I: IntoIterator,
        I::Item: Into<AcceptedResponse>,
    {
        self.parts.accept = Some(responses.into_iter().map(Into::into).collect());
        self
    }
}

impl RequestBuilder<Url, Method> {
    /// The request.
    pub fn build(self) -> Request {
        let Parts {
            body,
            headers,
            accept,
        } = self.parts;
        let mut request = Request::get(self.url, headers);
        request.method = self.method;
        request.body = body;
        match accept {
            Some(accept) => request.accept_responses(accept),
            None => request,
        }
    }
}

/// Without the URL, the headers and the body, which may hold secrets.
impl<U, M> fmt::Debug for RequestBuilder<U, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RequestBuilder").finish_non_exhaustive()
    }
}
