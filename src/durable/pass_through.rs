//! What is known of a request before its body is read.

use std::fmt;
use std::sync::Arc;

use http::{HeaderMap, Method, Uri};

use super::Durable;
use crate::error::Error;

impl Durable {
    /// Refuses a request, or an attempt of another handle, that passes through to where the guard
    /// denies.
    pub(crate) fn admit(&self, uri: &Uri) -> Result<(), Error> {
        self.engine().config().admit(uri)
    }

    /// As [`admit`](Self::admit), for a parsed URL.
    #[cfg(feature = "reqwest-middleware")]
    pub(crate) fn admit_url(&self, url: &url::Url) -> Result<(), Error> {
        match url.as_str().parse() {
            Ok(uri) => self.admit(&uri),
            // reqwest refuses to send it.
            Err(_) => Ok(()),
        }
    }
}

use crate::redact::Shown;

/// Decides which requests pass through without being persisted.
pub(super) type PassThrough = Arc<dyn Fn(&RequestHead<'_>) -> bool + Send + Sync>;

/// The part of a request that
/// [`DurableBuilder::pass_through`](crate::DurableBuilder::pass_through) sees. `Debug` shows the
/// host of the URL, and no credentials.
pub struct RequestHead<'a> {
    method: &'a Method,
    url: UrlRef<'a>,
    headers: &'a HeaderMap,
}

enum UrlRef<'a> {
    Uri(&'a http::Uri),
    #[cfg(feature = "reqwest-middleware")]
    Url(&'a url::Url),
}

impl<'a> RequestHead<'a> {
    pub(crate) fn of_http<B>(request: &'a http::Request<B>) -> Self {
        Self {
            method: request.method(),
            url: UrlRef::Uri(request.uri()),
            headers: request.headers(),
        }
    }

    #[cfg(feature = "reqwest-middleware")]
    pub(crate) fn of_reqwest(request: &'a reqwest::Request) -> Self {
        Self {
            method: request.method(),
            url: UrlRef::Url(request.url()),
            headers: request.headers(),
        }
    }

    /// The method.
    pub fn method(&self) -> &Method {
        self.method
    }

    /// The host of the URL.
    pub fn host(&self) -> Option<&str> {
        match &self.url {
            UrlRef::Uri(uri) => uri.host(),
            #[cfg(feature = "reqwest-middleware")]
            UrlRef::Url(url) => url.host_str(),
        }
    }

    /// The path of the URL.
    pub fn path(&self) -> &str {
        match &self.url {
            UrlRef::Uri(uri) => uri.path(),
            #[cfg(feature = "reqwest-middleware")]
            UrlRef::Url(url) => url.path(),
        }
    }

    /// The headers.
    pub fn headers(&self) -> &HeaderMap {
        self.headers
    }
}

impl fmt::Debug for RequestHead<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RequestHead")
            .field("method", &self.method)
            .field("host", &self.host())
            .field("headers", &Shown(self.headers))
            .finish_non_exhaustive()
    }
}
