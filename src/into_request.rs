//! What the methods of a handle accept as a request.
//!
//! A body in memory is taken as it is. A stream is read by the method that takes the request,
//! because a conversion can't wait.

use http_body_util::{BodyExt, Collected, LengthLimitError, Limited};

use crate::body::{Body, IntoBody, in_memory};
use crate::error::{BoxError, Error, Kind};
use crate::request::Request;

/// A request that [`Durable::fire`](crate::Durable::fire) and its siblings accept:
///
/// - [`Request`] and `&Request`,
/// - [`http::Request`] with any of the bodies of [`IntoBody`],
/// - [`reqwest::Request`] and [`reqwest::RequestBuilder`],
/// - with the feature `reqwest-middleware`, its `RequestBuilder`, including its extensions.
///
/// [`Options`](crate::Options) in a request's extensions apply. A body that is a stream is read, up
/// to [`max_request_body`](crate::DurableBuilder::max_request_body), before anything is persisted.
/// It can't be implemented outside this crate.
///
/// # Examples
///
/// ```no_run
/// # async fn example(durable: requeuest::Durable) -> Result<(), Box<dyn std::error::Error>> {
/// durable.fire(http::Request::get("https://example.com/ping").body(())?).await?;
///
/// let client = reqwest::Client::new();
/// durable.fire(client.post("https://example.com/hook").body("{}")).await?;
/// # Ok(()) }
/// ```
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a request that requeuest can persist",
    label = "expected `requeuest::Request`, `http::Request<_>`, `reqwest::Request` or a builder of \
             reqwest",
    note = "finish an `http::request::Builder` with `.body(…)?`, and `?` the `Result` that it \
            returns"
)]
pub trait IntoRequest: sealed::IntoRequest {}

// One by one: for a blanket implementation, the compiler would not name the body that it misses.
impl IntoRequest for Request {}
impl IntoRequest for &Request {}
impl<B: IntoBody> IntoRequest for http::Request<B> {}
impl IntoRequest for reqwest::Request {}
impl IntoRequest for reqwest::RequestBuilder {}
#[cfg(feature = "reqwest-middleware")]
impl IntoRequest for reqwest_middleware::RequestBuilder {}

pub(crate) mod sealed {
    use crate::error::Error;
    use crate::into_request::Unread;

    pub trait IntoRequest {
        fn into_request(self) -> Result<Unread, Error>;
    }
}

/// A request, and its body if that is a stream.
pub struct Unread {
    request: Request,
    stream: Option<Body>,
}

impl Unread {
    /// Reads a stream into memory.
    pub(crate) async fn read(self, limit: usize) -> Result<Request, Error> {
        match self.stream {
            None => Ok(self.request),
            // Boxed, so that callers' futures have no room for a stream that is rarely there.
            Some(stream) => Box::pin(read(self.request, stream, limit)).await,
        }
    }

    fn in_memory(self) -> Result<Request, Error> {
        match self.stream {
            None => Ok(self.request),
            Some(_) => Err(Error::request(
                "body",
                "is a stream, which a conversion can't read; pass the request itself to \
                 `Durable::fire`, the layer or the middleware",
            )),
        }
    }
}

impl From<Request> for Unread {
    fn from(request: Request) -> Self {
        Self {
            request,
            stream: None,
        }
    }
}

async fn read(mut request: Request, stream: Body, limit: usize) -> Result<Request, Error> {
    // As for the layer: a stream that has ended already, such as the body of a received GET, is no
    // body. With a caller's key, the two are different requests.
    let absent = http_body::Body::is_end_stream(&stream);
    let collected = collect(stream, limit).await?;
    request.trailers = collected.trailers().cloned();
    request.body = (!absent).then(|| collected.to_bytes());
    Ok(request)
}

/// Reads a stream within the limit.
pub(crate) async fn collect<B>(stream: B, limit: usize) -> Result<Collected<B::Data>, Error>
where
    B: http_body::Body,
    B::Error: Into<BoxError>,
{
    // A declared length over the limit is refused before the body is read.
    if stream.size_hint().lower() > limit as u64 {
        return Err(Error::body_too_large(limit));
    }
    Limited::new(stream, limit)
        .collect()
        .await
        .map_err(|error| body_error(error, limit))
}

/// The caller's error for a body that could not be read within the limit.
pub(crate) fn body_error(error: BoxError, limit: usize) -> Error {
    if error.is::<LengthLimitError>() {
        Error::body_too_large(limit)
    } else {
        Error::new(Kind::Body(error))
    }
}

impl sealed::IntoRequest for Request {
    fn into_request(self) -> Result<Unread, Error> {
        Ok(self.into())
    }
}

impl sealed::IntoRequest for &Request {
    fn into_request(self) -> Result<Unread, Error> {
        Ok(self.clone().into())
    }
}

impl<B: IntoBody> sealed::IntoRequest for http::Request<B> {
    fn into_request(self) -> Result<Unread, Error> {
        let (parts, body) = self.into_parts();
        let body: Body = body.into();
        Ok(match body.into_buffered() {
            Ok((data, trailers)) => Request::from_parts(parts, data, trailers)?.into(),
            Err(stream) => Unread {
                request: Request::from_parts(parts, None, None)?,
                stream: Some(stream),
            },
        })
    }
}

impl sealed::IntoRequest for reqwest::Request {
    fn into_request(mut self) -> Result<Unread, Error> {
        let body = self.body_mut().take();
        let (data, stream) = match body.map(in_memory) {
            None => (None, None),
            Some(Ok(data)) => (Some(data), None),
            Some(Err(stream)) => (None, Some(Body::wrap(stream))),
        };
        Ok(Unread {
            request: Request::from_reqwest_head(&self, data, None),
            stream,
        })
    }
}

impl sealed::IntoRequest for reqwest::RequestBuilder {
    fn into_request(self) -> Result<Unread, Error> {
        let request = self.build().map_err(not_built)?;
        sealed::IntoRequest::into_request(request)
    }
}

#[cfg(feature = "reqwest-middleware")]
impl sealed::IntoRequest for reqwest_middleware::RequestBuilder {
    fn into_request(mut self) -> Result<Unread, Error> {
        let options = self.extensions().get::<crate::Options>().cloned();
        let request = self.build().map_err(not_built)?;
        let mut unread = sealed::IntoRequest::into_request(request)?;
        if let Some(options) = options {
            unread.request = unread.request.with_over_timeout(options);
        }
        Ok(unread)
    }
}

/// The builder's error, without the URL that it may show.
fn not_built(error: reqwest::Error) -> Error {
    let error = error.without_url();
    let Some(cause) = std::error::Error::source(&error) else {
        return Error::request("request", error.to_string());
    };
    let is_url = cause.is::<url::ParseError>();
    let field = if is_url { "url" } else { "request" };
    Error::request(field, cause.to_string())
}

impl TryFrom<&Request> for Request {
    type Error = Error;

    fn try_from(request: &Request) -> Result<Self, Error> {
        Ok(request.clone())
    }
}

impl<B: IntoBody> TryFrom<http::Request<B>> for Request {
    type Error = Error;

    fn try_from(request: http::Request<B>) -> Result<Self, Error> {
        sealed::IntoRequest::into_request(request)?.in_memory()
    }
}

impl TryFrom<reqwest::Request> for Request {
    type Error = Error;

    fn try_from(request: reqwest::Request) -> Result<Self, Error> {
        sealed::IntoRequest::into_request(request)?.in_memory()
    }
}

impl TryFrom<reqwest::RequestBuilder> for Request {
    type Error = Error;

    fn try_from(request: reqwest::RequestBuilder) -> Result<Self, Error> {
        sealed::IntoRequest::into_request(request)?.in_memory()
    }
}
