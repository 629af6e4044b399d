//! A stored response, as callers get it.

use std::fmt;
use std::str::Utf8Error;

use bytes::Bytes;
use http::{Extensions, HeaderMap, StatusCode, Version};
use reqwest::ResponseBuilderExt as _;
use serde::de::DeserializeOwned;
use url::Url;

use crate::body::{Body, BodyError};
use crate::id::RequestId;
use crate::redact::Shown;

/// The answer to a persisted request. It is committed to the database before any caller sees it.
///
/// It converts into an [`http::Response`] and into a [`reqwest::Response`], with the [`RequestId`]
/// in the extensions.
///
/// # Examples
///
/// ```
/// # async fn example(
/// #     durable: requeuest::Durable,
/// #     request: requeuest::Request,
/// # ) -> Result<(), Box<dyn std::error::Error>> {
/// let response = durable.await_response(request).await?;
/// println!("{}: {}", response.status(), response.text()?);
///
/// let response: reqwest::Response = response.into();
/// response.error_for_status()?;
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct Response {
    pub(crate) id: RequestId,
    pub(crate) status: StatusCode,
    pub(crate) version: Version,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
    pub(crate) trailers: Option<HeaderMap>,
    /// The URL that the response came from, after redirects, if the client reported it.
    pub(crate) url: Option<Url>,
    /// What the client attached to the response. Extensions can't be stored, so they are empty
    /// unless this process made the attempt.
    pub(crate) extensions: Extensions,
}

impl Response {
    /// The id of the request that this response answers.
    pub fn id(&self) -> RequestId {
        self.id
    }

    /// The status.
    pub fn status(&self) -> StatusCode {
        self.status
    }

    /// The HTTP version of the response.
    pub fn version(&self) -> Version {
        self.version
    }

    /// The headers, in the order in which they were received.
    pub fn headers(&self) -> &HeaderMap {
        &self.headers
    }

    /// How many bytes the response has, about.
    pub(crate) fn size(&self) -> usize {
        let headers = self.headers.iter().chain(self.trailers.iter().flatten());
        let headers = headers.map(|(name, value)| name.as_str().len() + value.len());
        self.body.len() + headers.sum::<usize>()
    }

    /// The body.
    pub fn body(&self) -> &Bytes {
        &self.body
    }

    /// The body, without a copy.
    pub fn into_body(self) -> Bytes {
        self.body
    }

    /// The body, without a copy. The same as [`into_body`](Self::into_body), under the name that
    /// [`Body`] has for it.
    pub fn into_bytes(self) -> Bytes {
        self.body
    }

    /// The body as text.
    ///
    /// # Errors
    ///
    /// If the body is not UTF-8.
    pub fn text(&self) -> Result<&str, Utf8Error> {
        std::str::from_utf8(&self.body)
    }

    /// The body, parsed as JSON.
    ///
    /// # Errors
    ///
    /// If the body is not JSON for a `T`.
    ///
    /// # Examples
    ///
    /// ```
    /// # #[derive(serde::Deserialize)]
    /// # struct Charge;
    /// # fn example(response: requeuest::Response) -> Result<(), Box<dyn std::error::Error>> {
    /// let charge: Charge = response.json()?;
    /// # Ok(()) }
    /// ```
    pub fn json<T: DeserializeOwned>(&self) -> Result<T, BodyError> {
        serde_json::from_slice(&self.body).map_err(BodyError::json)
    }

    /// The URL that the response came from, if the client reported it. After redirects, this is the
    /// last URL.
    pub fn url(&self) -> Option<&Url> {
        self.url.as_ref()
    }

    fn into_http_with(
        self,
        body: impl FnOnce(Bytes, Option<HeaderMap>) -> Body,
    ) -> http::Response<Body> {
        let mut response = http::Response::new(body(self.body, self.trailers));
        *response.status_mut() = self.status;
        *response.version_mut() = self.version;
        *response.headers_mut() = self.headers;
        *response.extensions_mut() = self.extensions;
        response.extensions_mut().insert(self.id);
        response
    }
}

impl fmt::Debug for Response {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Response")
            .field("id", &self.id)
            .field("status", &self.status)
            .field("version", &self.version)
            .field("headers", &Shown(&self.headers))
            .field("body", &self.body.len())
            .finish_non_exhaustive()
    }
}

impl From<Response> for http::Response<Body> {
    fn from(response: Response) -> Self {
        response.into_http_with(|data, trailers| Body::buffered(Some(data), trailers))
    }
}

impl From<Response> for http::Response<Bytes> {
    fn from(response: Response) -> Self {
        let body = response.body.clone();
        response.into_http_with(|_, _| Body::empty()).map(|_| body)
    }
}

impl From<Response> for reqwest::Response {
    fn from(mut response: Response) -> Self {
        let url = response.url.take();
        let response = http::Response::<Body>::from(response);
        let Some(url) = url else {
            return response.into();
        };
        // reqwest keeps the URL in an extension of a private type, which only its builder can make.
        let mut with_url = http::Response::builder()
            .url(url)
            .body(())
            .unwrap_or_default();
        let (mut parts, body) = response.into_parts();
        parts
            .extensions
            .extend(std::mem::take(with_url.extensions_mut()));
        http::Response::from_parts(parts, body).into()
    }
}
