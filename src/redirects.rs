//! Which redirects the crate's own transport follows, and what the next request of a chain is.
//!
//! reqwest's own redirects don't do. They drop credentials for the first request to another origin
//! and send them again with the second, know only five headers as credentials, name the whole URL
//! with its path in `Referer`, and follow from https to http.

use http::header::{
    CONTENT_ENCODING, CONTENT_LANGUAGE, CONTENT_LENGTH, CONTENT_LOCATION, CONTENT_TYPE, EXPECT,
    HOST, LAST_MODIFIED, LOCATION, ORIGIN, REFERER, TRAILER, TRANSFER_ENCODING,
};
use http::{HeaderMap, HeaderName, Method, StatusCode, Uri};
use url::Url;

use crate::error::Error;
use crate::redact::is_secret;
use crate::request::check_uri;

/// The most redirects that can be followed: 20.
pub const MAX_REDIRECTS: u32 = 20;

/// Headers that go to one origin only, besides those that carry credentials.
const OF_ORIGIN: [HeaderName; 4] = [HeaderName::from_static("cookie2"), HOST, ORIGIN, REFERER];

/// Headers that say something about a body.
const OF_BODY: [HeaderName; 11] = [
    CONTENT_ENCODING,
    CONTENT_LANGUAGE,
    CONTENT_LENGTH,
    CONTENT_LOCATION,
    CONTENT_TYPE,
    HeaderName::from_static("content-digest"),
    HeaderName::from_static("digest"),
    EXPECT,
    LAST_MODIFIED,
    TRAILER,
    TRANSFER_ENCODING,
];

/// Which redirects the crate's own transport follows, for
/// [`DurableBuilder::redirects`](crate::DurableBuilder::redirects).
///
/// By default none: a redirect is the response. One that isn't followed, because there were too
/// many, or for another reason below, is the response too. A fired request is then discarded, and
/// its dead letter has the response with its `Location`.
///
/// - **Method** (RFC 9110 section 15.4). 307 and 308 repeat the method and the body. 303 asks with
///   `GET`, or `HEAD` for a `HEAD`, and so do 301 and 302 for a `POST`. Other methods and their
///   bodies are repeated. So a `POST` that is redirected by 301, 302 or 303 arrives as a `GET`
///   without its body, and the answer to that `GET` ends the request.
/// - **Credentials** stay with their origin (scheme, host and port). For another one, these headers
///   are dropped, for the rest of the chain: those that carry credentials by their name, such as
///   `Authorization`, `Cookie`, `Proxy-Authorization` and `X-Api-Key`; `Host`, `Origin` and
///   `Referer`; values that are marked as sensitive; and those that
///   [`secret_header`](Self::secret_header) names. So are a user and a password in a `Location`.
/// - **From https to http** no redirect is followed.
/// - With the feature `ssrf-guard`, the handle's guard checks each redirect.
///
/// All requests of a chain are one attempt, with one timeout. No `Referer` is added. Requests for a
/// token of [`OAuth2`](crate::hooks::OAuth2) are not redirected.
///
/// # Examples
///
/// ```no_run
/// use requeuest::{Durable, Redirects, http::HeaderName};
///
/// # fn example(pool: sqlx::PgPool) -> Result<(), requeuest::Error> {
/// let redirects = Redirects::follow(3).secret_header(HeaderName::from_static("x-tenant-token"));
/// let durable = Durable::builder(pool).redirects(redirects).build()?;
/// # Ok(()) }
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Redirects {
    max: u32,
    secret: Vec<HeaderName>,
}

impl Redirects {
    /// Follows no redirect. This is the default.
    pub fn none() -> Self {
        Self::default()
    }

    /// Follows up to this many redirects of an attempt, at most [`MAX_REDIRECTS`].
    pub fn follow(max: u32) -> Self {
        Self {
            max,
            secret: Vec::new(),
        }
    }

    /// Drops this header, too, when a redirect leads to another origin.
    #[must_use]
    pub fn secret_header(mut self, name: HeaderName) -> Self {
        self.secret.push(name);
        self
    }

    pub(crate) fn validate(&self) -> Result<(), Error> {
        if self.max > MAX_REDIRECTS {
            let reason = format!("must follow at most {MAX_REDIRECTS}");
            return Err(Error::config("redirects", reason));
        }
        Ok(())
    }

    pub(crate) fn max(&self) -> u32 {
        self.max
    }

    fn is_secret(&self, name: &HeaderName) -> bool {
        is_secret(name) || OF_ORIGIN.contains(name) || self.secret.contains(name)
    }
}

/// In the extensions of a request whose redirects are never followed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Unfollowed;

/// A request of a chain, without its body.
#[derive(Clone, Debug)]
pub(crate) struct Hop {
    pub(crate) method: Method,
    pub(crate) uri: Uri,
    pub(crate) headers: HeaderMap,
    /// Whether the request's body and trailers are sent.
    pub(crate) has_body: bool,
}

impl Hop {
    /// The request that an answer asks for. `None` if the answer is no redirect, or one that is
    /// not followed.
    pub(crate) fn next(
        &self,
        redirects: &Redirects,
        status: StatusCode,
        answer: &HeaderMap,
    ) -> Option<Self> {
        let method = match (status.as_u16(), &self.method) {
            (301 | 302, &Method::POST) => Method::GET,
            (303, method) if *method != Method::HEAD => Method::GET,
            (301 | 302 | 303 | 307 | 308, method) => method.clone(),
            _ => return None,
        };
        let location = answer.get(LOCATION)?.to_str().ok()?;
        let from = Url::parse(&self.uri.to_string()).ok()?;
        let mut to = from.join(location).ok()?;
        to.set_fragment(None);
        if from.scheme() == "https" && to.scheme() != "https" {
            return None;
        }
        let is_same_origin = from.origin() == to.origin();
        let has_own_user =
            is_same_origin && (to.username(), to.password()) == (from.username(), from.password());
        if !has_own_user {
            // A URL without a host can't have them, and is refused below.
            let _ = (to.set_username(""), to.set_password(None));
        }
        let uri: Uri = to.as_str().parse().ok()?;
        check_uri(&uri).ok()?;
        let mut headers = self.headers.clone();
        if !is_same_origin {
            headers = headers_for_others(redirects, &headers);
        }
        let keeps_body = self.has_body && method == self.method && status != StatusCode::SEE_OTHER;
        if !keeps_body {
            for name in OF_BODY {
                headers.remove(name);
            }
        }
        Some(Self {
            method,
            uri,
            headers,
            has_body: keeps_body,
        })
    }
}

fn headers_for_others(redirects: &Redirects, headers: &HeaderMap) -> HeaderMap {
    headers
        .iter()
        .filter(|(name, value)| !value.is_sensitive() && !redirects.is_secret(name))
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect()
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    fn hop(method: Method, uri: &str) -> Hop {
        Hop {
            method,
            uri: uri.parse().unwrap(),
            headers: HeaderMap::new(),
            has_body: true,
        }
    }

    fn next(hop: &Hop, status: u16, location: &str) -> Option<Hop> {
        let mut answer = HeaderMap::new();
        answer.insert(LOCATION, location.parse().unwrap());
        let status = StatusCode::from_u16(status).unwrap();
        hop.next(&Redirects::follow(1), status, &answer)
    }

    #[test]
    fn the_method_follows_the_status() {
        for (status, method, expected, has_body) in [
            (301, "POST", "GET", false),
            (302, "POST", "GET", false),
            (303, "POST", "GET", false),
            (307, "POST", "POST", true),
            (308, "POST", "POST", true),
            (301, "PUT", "PUT", true),
            (302, "DELETE", "DELETE", true),
            (303, "PUT", "GET", false),
            (303, "GET", "GET", false),
            (303, "HEAD", "HEAD", false),
            (301, "HEAD", "HEAD", true),
        ] {
            let mut from = hop(method.parse().unwrap(), "http://a/");
            from.headers
                .insert(CONTENT_TYPE, HeaderValue::from_static("text/plain"));
            let next = next(&from, status, "/b").unwrap();
            assert_eq!(
                (next.method.as_str(), next.has_body),
                (expected, has_body),
                "{status}"
            );
            assert_eq!(
                next.headers.contains_key(CONTENT_TYPE),
                has_body,
                "{status} {method}"
            );
        }
        for status in [200, 300, 304, 305, 306, 309, 404] {
            assert!(
                next(&hop(Method::GET, "http://a/"), status, "/b").is_none(),
                "{status}"
            );
        }
    }

    #[test]
    fn a_location_is_resolved_and_one_that_no_request_can_have_is_not_followed() {
        let from = hop(Method::GET, "https://u:p@a/b/c?d");
        let to = |location: &str| next(&from, 302, location).map(|hop| hop.uri.to_string());
        for (location, uri) in [
            ("/x", "https://u:p@a/x"),
            ("x?y#z", "https://u:p@a/b/x?y"),
            ("https://a/x", "https://a/x"),
            ("https://v:q@a/x", "https://a/x"),
            ("//b/x", "https://b/x"),
            ("https://v:q@b/x", "https://b/x"),
            ("https://0x7f.1/", "https://127.0.0.1/"),
        ] {
            assert_eq!(to(location).as_deref(), Some(uri), "{location}");
        }
        for location in [
            "http://a/x",
            "ftp://a/x",
            "file:///etc/passwd",
            "https://",
            "//[::1",
        ] {
            assert_eq!(to(location), None, "{location}");
        }
        let status = StatusCode::FOUND;
        let redirects = Redirects::follow(1);
        assert!(from.next(&redirects, status, &HeaderMap::new()).is_none());
        let up = next(&hop(Method::GET, "http://a/"), 302, "https://a/").unwrap();
        assert_eq!(up.uri, "https://a/");
    }

    #[test]
    fn credentials_stay_with_their_origin() {
        let mut from = hop(Method::GET, "http://a/");
        for name in [
            "authorization",
            "cookie",
            "proxy-authorization",
            "x-api-key",
            "host",
            "x-named",
            "x-sensitive",
            "accept",
            "idempotency-key",
        ] {
            let mut value = HeaderValue::from_static("v");
            value.set_sensitive(name == "x-sensitive");
            from.headers.append(HeaderName::from_static(name), value);
        }
        from.headers.append("accept", HeaderValue::from_static("w"));
        let redirects = Redirects::follow(1).secret_header(HeaderName::from_static("x-named"));
        let to = |from: &Hop, location: &str| {
            let mut answer = HeaderMap::new();
            answer.insert(LOCATION, location.parse().unwrap());
            from.next(&redirects, StatusCode::FOUND, &answer).unwrap()
        };
        assert_eq!(to(&from, "http://a:80/x").headers, from.headers);
        for other in ["http://b/", "http://a:81/", "https://a/"] {
            let other = to(&from, other);
            let mut names: Vec<_> = other.headers.keys().map(HeaderName::as_str).collect();
            names.sort_unstable();
            assert_eq!(names, ["accept", "idempotency-key"]);
            assert_eq!(other.headers.get_all("accept").iter().count(), 2);
            // Not even the way back brings them back.
            let back = if other.uri.scheme_str() == Some("https") {
                "https://a:444/"
            } else {
                "http://a/"
            };
            assert_eq!(to(&other, back).headers, other.headers);
        }
    }

    #[test]
    fn a_limit_that_is_no_limit_is_refused() {
        assert!(Redirects::follow(MAX_REDIRECTS).validate().is_ok());
        let error = Redirects::follow(MAX_REDIRECTS + 1).validate().unwrap_err();
        assert_eq!(error.field(), Some("redirects"));
    }
}
