//! The request as it is persisted: everything that is sent, complete and in memory.

use std::fmt;

use bytes::Bytes;
use http::uri::Authority;
use http::{HeaderMap, HeaderValue, Method, Uri, Version, header};
use url::Url;

use crate::body::Body;
use crate::classify::AcceptedResponse;
use crate::destination::Destination;
use crate::error::Error;
use crate::options::Options;
use crate::redact::Shown;
use crate::target;
use crate::trace_context::TraceContext;

/// The longest URL that is accepted, in bytes. It exceeds the 8000 bytes that RFC 9110 section 4.1
/// recommends every recipient to support.
pub const MAX_URL_LEN: usize = 8 * 1024;

/// The most header values that a request can have, and as many trailers again. Servers accept far
/// fewer: most of them 100.
pub const MAX_HEADERS: usize = 1000;
/// The longest headers of a request, in bytes of names and values together: 256 KiB. As much again
/// for trailers.
pub const MAX_HEADERS_LEN: usize = 256 * 1024;

/// An HTTP request with its body in memory, ready to be persisted.
///
/// The URL is sent as it is given, by every client that makes an attempt. A URL that
/// [`Url::parse`](url::Url::parse) would change, as `http://a/b/../c`, is refused with an error that
/// names the field `url`: reqwest sends the changed one, and other clients the given one.
///
/// Make one with the constructors below, or by `TryFrom` from a [`reqwest::Request`], a
/// [`reqwest::RequestBuilder`] or an [`http::Request`] whose body is in memory.
/// [`Durable`](crate::Durable)'s methods accept all of these types: see [`IntoRequest`].
///
/// [`IntoRequest`]: crate::IntoRequest
///
/// # Examples
///
/// ```
/// use requeuest::{HeaderMap, Options, Request, Url};
///
/// let url = Url::parse("https://example.com/hook")?;
/// let request = Request::post(url, b"{}".to_vec(), HeaderMap::new())
///     .with(Options::default().channel("hooks"));
/// assert_eq!(request.method(), "POST");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct Request {
    pub(crate) method: Method,
    /// A URL that `http` can't express is stored as given and refused with an error once it is
    /// used, because the constructors that take a `Url` can't fail.
    pub(crate) target: Target,
    pub(crate) version: Version,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Option<Bytes>,
    pub(crate) trailers: Option<HeaderMap>,
    /// What attempts carry of the trace of the call. Set when the request is persisted.
    pub(crate) trace: Option<Box<TraceContext>>,
    pub(crate) options: Options,
}

#[derive(Clone, PartialEq, Eq)]
pub(crate) enum Target {
    Uri(Uri),
    Url(Url),
}

impl Request {
    /// A request without options.
    fn new(method: Method, target: Target, headers: HeaderMap, body: Option<Bytes>) -> Self {
        Self {
            method,
            target,
            version: Version::HTTP_11,
            headers,
            body,
            trailers: None,
            trace: None,
            options: Options::default(),
        }
    }

    /// A `GET` request.
    pub fn get(url: Url, headers: HeaderMap) -> Self {
        Self::new(Method::GET, Target::Url(url), headers, None)
    }

    /// A `HEAD` request.
    pub fn head(url: Url, headers: HeaderMap) -> Self {
        Self::new(Method::HEAD, Target::Url(url), headers, None)
    }

    /// A `DELETE` request, with or without a body.
    pub fn delete(url: Url, body: Option<Vec<u8>>, headers: HeaderMap) -> Self {
        Self::new(
            Method::DELETE,
            Target::Url(url),
            headers,
            body.map(Bytes::from),
        )
    }

    /// A `POST` request.
    pub fn post(url: Url, body: Vec<u8>, headers: HeaderMap) -> Self {
        Self::new(Method::POST, Target::Url(url), headers, Some(body.into()))
    }

    /// A `PUT` request.
    pub fn put(url: Url, body: Vec<u8>, headers: HeaderMap) -> Self {
        Self::new(Method::PUT, Target::Url(url), headers, Some(body.into()))
    }

    /// Converts a reqwest request.
    ///
    /// # Errors
    ///
    /// If its body is a stream, because reading one needs async code. The layer and the middleware
    /// accept streams, and so does [`Durable::fire`](crate::Durable::fire).
    pub fn from_reqwest(request: reqwest::Request) -> Result<Self, Error> {
        request.try_into()
    }

    /// Converts an HTTP request with a body of bytes.
    ///
    /// # Errors
    ///
    /// If its URL is not an absolute `http` or `https` URL.
    pub fn from_http_body<B: Into<Bytes>>(request: http::Request<B>) -> Result<Self, Error> {
        let (parts, body) = request.into_parts();
        Self::from_parts(parts, Some(body.into()), None)
    }

    /// Converts an HTTP request without a body.
    ///
    /// # Errors
    ///
    /// If its URL is not an absolute `http` or `https` URL.
    pub fn from_http_empty(request: http::Request<()>) -> Result<Self, Error> {
        let (parts, ()) = request.into_parts();
        Self::from_parts(parts, None, None)
    }

    /// Finishes an [`http::request::Builder`] with a body.
    ///
    /// # Errors
    ///
    /// If the builder holds an error, or its URL is not an absolute `http` or `https` URL.
    pub fn from_http_builder<B: Into<Bytes>>(
        builder: http::request::Builder,
        body: B,
    ) -> Result<Self, Error> {
        let request = builder
            .body(body)
            .map_err(|error| Error::request("request", error.to_string()))?;
        Self::from_http_body(request)
    }

    pub(crate) fn from_parts(
        parts: http::request::Parts,
        body: Option<Bytes>,
        trailers: Option<HeaderMap>,
    ) -> Result<Self, Error> {
        let request = Self {
            method: parts.method,
            target: Target::Uri(parts.uri),
            version: parts.version,
            headers: parts.headers,
            body,
            trailers,
            trace: None,
            options: parts.extensions.get().cloned().unwrap_or_default(),
        };
        request.uri()?;
        Ok(request)
    }

    /// Replaces the request's options.
    #[must_use]
    pub fn with(mut self, options: Options) -> Self {
        self.options = options;
        self
    }

    /// Only these responses end the request; all other responses are retried. The same as
    /// [`Options::accept`].
    #[must_use]
    pub fn accept_responses<I>(mut self, responses: I) -> Self
    where
        I: IntoIterator,
        I::Item: Into<AcceptedResponse>,
    {
        self.options = self.options.accept(responses);
        self
    }

    /// The method.
    pub fn method(&self) -> &Method {
        &self.method
    }

    /// The full URL, with its query and any secrets in it.
    pub fn url(&self) -> String {
        match &self.target {
            Target::Uri(uri) => uri.to_string(),
            Target::Url(url) => url.to_string(),
        }
    }

    /// The headers, in the order in which they are sent.
    pub fn headers(&self) -> &HeaderMap {
        &self.headers
    }

    /// A mutable reference to the headers.
    pub fn headers_mut(&mut self) -> &mut HeaderMap {
        &mut self.headers
    }

    /// The body, or `None` if the request has none.
    pub fn body(&self) -> Option<&Bytes> {
        self.body.as_ref()
    }

    /// The options.
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// The URL as it is sent, or an error if it can't be sent.
    pub(crate) fn uri(&self) -> Result<Uri, Error> {
        let uri = match &self.target {
            Target::Uri(uri) => uri.clone(),
            Target::Url(url) if url.as_str().len() > MAX_URL_LEN => return Err(too_long()),
            Target::Url(url) => url
                .as_str()
                .parse()
                .map_err(|_| Error::request("url", "must be a valid http or https URL"))?,
        };
        check_uri(&uri)?;
        if !target::is_normal(&uri) {
            return Err(Error::request(
                "url",
                "is not in its normal form, so not every client would send it as given; resolve \
                 `.` and `..`, and percent-encode what `Url::parse` encodes",
            ));
        }
        Ok(uri)
    }

    /// Refuses more headers or trailers than are stored, and a framing that is not the body's.
    pub(crate) fn check_headers(&self) -> Result<(), Error> {
        check_headers("headers", &self.headers)?;
        check_framing(&self.headers, self.body.as_ref().map_or(0, Bytes::len))?;
        let trailers = self.trailers.as_ref();
        trailers.map_or(Ok(()), |trailers| check_headers("trailers", trailers))
    }

    /// Builds the HTTP request for one attempt. The body is shared, not copied.
    pub(crate) fn to_http(&self, uri: Uri, headers: HeaderMap) -> http::Request<Body> {
        let mut request =
            http::Request::new(Body::buffered(self.body.clone(), self.trailers.clone()));
        *request.method_mut() = self.method.clone();
        *request.uri_mut() = uri;
        *request.version_mut() = self.version;
        *request.headers_mut() = headers;
        request
    }
}

pub(crate) fn check_headers(field: &'static str, headers: &HeaderMap) -> Result<(), Error> {
    let count = headers.len();
    if count > MAX_HEADERS {
        let reason = format!("must have at most {MAX_HEADERS} values, but have {count}");
        return Err(Error::request(field, reason));
    }
    let len: usize = headers
        .iter()
        .map(|(name, value)| name.as_str().len() + value.len())
        .sum();
    if len > MAX_HEADERS_LEN {
        let reason = format!("must be at most {MAX_HEADERS_LEN} bytes long, but have {len}");
        return Err(Error::request(field, reason));
    }
    Ok(())
}

/// Refuses headers that say where the body ends, and say it wrongly. One client would fail with
/// them, and another would send them: then a server between here and the receiver may take a part
/// of the body for a request of its own.
fn check_framing(headers: &HeaderMap, body: usize) -> Result<(), Error> {
    let refused = |reason: String| Err(Error::request("headers", reason));
    let mut lengths = headers.get_all(header::CONTENT_LENGTH).iter();
    if let Some(length) = lengths.next() {
        let is_bodys = |length: &HeaderValue| {
            let digits = length.to_str().ok().filter(|text| !text.starts_with('+'));
            digits.and_then(|text| text.parse().ok()) == Some(body)
        };
        if !is_bodys(length) || lengths.next().is_some() {
            return refused(format!(
                "Content-Length must be that of the body, which has {body} bytes; leave it out, \
                 and it is added"
            ));
        }
    }
    let mut encodings = headers.get_all(header::TRANSFER_ENCODING).iter();
    if let Some(encoding) = encodings.next() {
        let is_chunked = encoding.as_bytes().eq_ignore_ascii_case(b"chunked");
        if !is_chunked || encodings.next().is_some() {
            return refused("Transfer-Encoding must be `chunked`, or be left out".to_owned());
        }
        if headers.contains_key(header::CONTENT_LENGTH) {
            return refused(
                "Transfer-Encoding and Content-Length must not be given together".to_owned(),
            );
        }
    }
    Ok(())
}

fn too_long() -> Error {
    Error::request("url", format!("must be at most {MAX_URL_LEN} bytes long"))
}

/// Whether requests can be sent to this URL.
pub(crate) fn check_uri(uri: &Uri) -> Result<(), Error> {
    match uri.scheme_str() {
        Some("http" | "https") => {}
        None => {
            return Err(Error::request(
                "url",
                "must be absolute, with a scheme and a host",
            ));
        }
        Some(_) => {
            return Err(Error::request("url", "its scheme must be http or https"));
        }
    }
    if uri.host().is_none_or(str::is_empty) {
        return Err(Error::request("url", "must have a host"));
    }
    if uri.authority().is_some_and(has_invalid_port) {
        return Err(Error::request(
            "url",
            "its port must be a number up to 65535",
        ));
    }
    let len = uri
        .authority()
        .map_or(0, |authority| authority.as_str().len())
        + uri.path_and_query().map_or(0, |path| path.as_str().len())
        + "https://".len();
    if len > MAX_URL_LEN {
        Err(too_long())
    } else {
        Ok(())
    }
}

/// `Uri` takes any digits for a port, and then has none.
fn has_invalid_port(authority: &Authority) -> bool {
    let host_and_port = authority.as_str().rsplit('@').next().unwrap_or_default();
    let port = host_and_port
        .strip_prefix(authority.host())
        .and_then(|rest| rest.strip_prefix(':'));
    port.is_some_and(|port| !port.is_empty() && port.parse::<u16>().is_err())
}

impl fmt::Debug for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Request")
            .field("method", &self.method)
            .field(
                "url",
                &self
                    .uri()
                    .map(|uri| Destination::of(&uri).to_string())
                    .unwrap_or_default(),
            )
            .field("headers", &Shown(&self.headers))
            .field("body", &self.body.as_ref().map(Bytes::len))
            .field("options", &self.options)
            .finish_non_exhaustive()
    }
}

impl Request {
    pub(crate) fn from_reqwest_head(
        request: &reqwest::Request,
        body: Option<Bytes>,
        trailers: Option<HeaderMap>,
    ) -> Self {
        Self {
            method: request.method().clone(),
            target: Target::Url(request.url().clone()),
            version: request.version(),
            headers: request.headers().clone(),
            body,
            trailers,
            trace: None,
            options: Options {
                attempt_timeout: request.timeout().copied().filter(|time| !time.is_zero()),
                ..Options::default()
            },
        }
    }

    /// Replaces the options. If they set no attempt timeout, the request's own timeout stays.
    #[cfg(feature = "reqwest-middleware")]
    pub(crate) fn with_over_timeout(mut self, mut options: Options) -> Self {
        let timeout = self.options.attempt_timeout;
        options.attempt_timeout = options.attempt_timeout.or(timeout);
        self.options = options;
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(url: &str) -> Error {
        let request = http::Request::get(url).body("").unwrap();
        Request::try_from(request).unwrap_err()
    }

    #[test]
    fn a_url_must_be_absolute_http() {
        for url in [
            "/path",
            "example.com",
            "ftp://example.com/",
            "*",
            "http://a:99999/",
            "http://u:p@[::1]:99999/",
        ] {
            assert_eq!(refused(url).field(), Some("url"), "{url}");
        }
        for url in ["http://a:65535/", "http://u:p@[::1]/", "http://u:99999@a:/"] {
            let request = http::Request::get(url).body("").unwrap();
            assert!(Request::try_from(request).is_ok(), "{url}");
        }
        let mail = Request::get(
            Url::parse("mailto:a@example.com").unwrap(),
            HeaderMap::new(),
        );
        assert_eq!(mail.uri().unwrap_err().field(), Some("url"));
    }

    #[test]
    fn a_url_over_the_limit_is_refused() {
        let long = format!("http://example.com/{}", "x".repeat(MAX_URL_LEN));
        assert!(refused(&long).to_string().contains("8192"));
        let url = Url::parse(&long).unwrap();
        assert_eq!(
            Request::get(url, HeaderMap::new())
                .uri()
                .unwrap_err()
                .field(),
            Some("url")
        );
    }

    #[test]
    fn a_framing_that_is_not_the_bodys_is_refused() {
        let check = |headers: &[(&str, &str)], body: &'static str| {
            let mut builder = http::Request::post("http://a/");
            for (name, value) in headers {
                builder = builder.header(*name, *value);
            }
            Request::from_http_builder(builder, body)
                .unwrap()
                .check_headers()
        };
        let (length, encoding) = ("content-length", "transfer-encoding");
        for good in [
            &[(length, "4")][..],
            &[(length, "004")],
            &[(encoding, "Chunked")],
            &[],
        ] {
            check(good, "body").unwrap();
        }
        check(&[(length, "0")], "").unwrap();
        for bad in [
            &[(length, "3")][..],
            &[(length, "5")],
            &[(length, "+4")],
            &[(length, "-4")],
            &[(length, "4, 4")],
            &[(length, "0x4")],
            &[(length, "")],
            &[(length, "99999999999999999999999")],
            &[(length, "4"), (length, "4")],
            &[(length, "4"), (encoding, "chunked")],
            &[(encoding, "chunked"), (encoding, "chunked")],
            &[(encoding, "gzip, chunked")],
            &[(encoding, "chunked, identity")],
            &[(encoding, "xchunked")],
            &[(encoding, "identity")],
            &[(encoding, "chunked\t")],
        ] {
            let error = check(bad, "body").unwrap_err();
            assert_eq!(error.field(), Some("headers"), "{bad:?}");
            assert!(error.is_request());
        }
    }

    #[test]
    fn secrets_of_a_url_are_stored_but_never_shown() {
        let url = Url::parse("https://user:hunter2@example.com/hunter4?token=hunter3").unwrap();
        let request = Request::get(url.clone(), HeaderMap::new());
        assert_eq!(request.url(), url.as_str());
        let shown = format!("{request:?}");
        assert!(!shown.contains("hunter"), "{shown}");
        assert!(shown.contains("https://example.com:443"), "{shown}");
    }
}
