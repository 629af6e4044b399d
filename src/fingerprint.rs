//! Tells whether two calls with the same key mean the same request.

use http::Uri;
use sha2::{Digest, Sha256};

use crate::request::Request;

/// Headers that say who calls, besides those that are marked sensitive.
const CREDENTIALS: [&str; 7] = [
    "authorization",
    "cookie",
    "api-key",
    "apikey",
    "x-api-key",
    "x-auth-token",
    "x-access-token",
];

/// SHA-256 over method, URL, body, and the key's owner: the one that the options name, else the
/// credentials in the headers. Otherwise a caller that guesses or happens to use the key of another
/// one would get that one's response. Other headers are left out, because many of them differ
/// between calls without any meaning: dates, trace ids.
///
/// The fingerprint is stored with the key, so it must never change.
pub(crate) fn fingerprint(request: &Request, uri: &Uri) -> [u8; 32] {
    let mut hasher = Sha256::new();
    let uri = uri.to_string();
    for part in [request.method.as_str(), &uri] {
        // Each part is preceded by its length; otherwise two parts could run into each other.
        hasher.update((part.len() as u64).to_be_bytes());
        hasher.update(part);
    }
    // No body and an empty one mean the same, because entry points make either of an empty text.
    let body = request.body.as_deref().unwrap_or_default();
    hasher.update([u8::from(!body.is_empty())]);
    hasher.update(body);
    let content = hasher.finalize();
    let Some(owner) = owner(request) else {
        return content.into();
    };
    let mut hasher = Sha256::new();
    hasher.update(content);
    hasher.update(owner.finalize());
    hasher.finalize().into()
}

/// The owner of the request's key. `None` if nothing tells.
fn owner(request: &Request) -> Option<Sha256> {
    let mut hasher = Sha256::new();
    let mut add = |part: &[u8]| {
        hasher.update((part.len() as u64).to_be_bytes());
        hasher.update(part);
    };
    if let Some(owner) = &request.options.key_owner {
        add(owner.as_bytes());
        return Some(hasher);
    }
    let mut credentials: Vec<_> = request
        .headers
        .iter()
        .map(|(name, value)| (name.as_str(), value))
        .filter(|(name, value)| value.is_sensitive() || CREDENTIALS.contains(name))
        .collect();
    // The values of one header keep their order.
    credentials.sort_by_key(|(name, _)| *name);
    for (name, value) in &credentials {
        add(name.as_bytes());
        add(value.as_bytes());
    }
    (!credentials.is_empty()).then_some(hasher)
}

impl Request {
    /// Whether both have the same method, URL and body. Credentials may differ: the next try of a
    /// retry layer may have a fresh token.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        self.method == other.method && self.body == other.body && self.url() == other.url()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(method: &str, url: &'static str, body: Option<&'static str>) -> [u8; 32] {
        let mut request = http::Request::builder()
            .method(method)
            .uri(url)
            .body("")
            .map(|request| Request::try_from(request).unwrap())
            .unwrap();
        request.body = body.map(Into::into);
        fingerprint(&request, &Uri::from_static(url))
    }

    #[test]
    fn method_url_and_body_tell_requests_apart() {
        let one = of("POST", "http://a/b", Some("c"));
        assert_eq!(one, of("POST", "http://a/b", Some("c")));
        for other in [
            of("PUT", "http://a/b", Some("c")),
            of("POST", "http://a/bc", Some("")),
            of("POST", "http://a/b", Some("d")),
            of("POST", "http://a/b", None),
        ] {
            assert_ne!(one, other);
        }
        assert_eq!(
            of("GET", "http://a/", None),
            of("GET", "http://a/", Some(""))
        );
    }

    fn owned(headers: &[(&str, &'static str)], owner: Option<&str>) -> [u8; 32] {
        let mut request = http::Request::get("http://a/");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let mut request = Request::try_from(request.body("").unwrap()).unwrap();
        if let Some(owner) = owner {
            request.options = request.options.key_owner(owner);
        }
        fingerprint(&request, &Uri::from_static("http://a/"))
    }

    #[test]
    fn credentials_or_the_named_owner_tell_requests_apart() {
        let plain = owned(&[], None);
        assert_eq!(plain, of("GET", "http://a/", None));
        assert_eq!(plain, owned(&[("date", "x"), ("x-tenant", "y")], None));
        let distinct = [
            plain,
            owned(&[("authorization", "a")], None),
            owned(&[("authorization", "b")], None),
            owned(&[("cookie", "a")], None),
            owned(&[("x-api-key", "a")], None),
            owned(&[("authorization", "a"), ("x-api-key", "a")], None),
            owned(&[("cookie", "a"), ("cookie", "b")], None),
            owned(&[("cookie", "b"), ("cookie", "a")], None),
            owned(&[], Some("a")),
            owned(&[], Some("b")),
        ];
        for (number, one) in distinct.iter().enumerate() {
            assert!(!distinct[..number].contains(one), "{number}");
        }
        assert_eq!(
            owned(&[("authorization", "a"), ("x-api-key", "b")], None),
            owned(&[("x-api-key", "b"), ("authorization", "a")], None)
        );
        let fresh = |token| owned(&[("authorization", token)], Some("a"));
        assert_eq!(fresh("1"), fresh("2"));
        assert_eq!(fresh("1"), distinct[8]);
    }

    #[test]
    fn a_value_that_is_marked_sensitive_is_a_credential() {
        let of = |value: &'static str, sensitive| {
            let mut value = http::HeaderValue::from_static(value);
            value.set_sensitive(sensitive);
            let request = http::Request::get("http://a/").header("x-secret", value);
            let request = Request::try_from(request.body("").unwrap()).unwrap();
            fingerprint(&request, &Uri::from_static("http://a/"))
        };
        assert_ne!(of("a", true), of("b", true));
        assert_eq!(of("a", false), of("b", false));
    }

    #[test]
    fn the_stored_form_never_changes() {
        assert_eq!(
            of("POST", "http://a/b", Some("c"))[..8],
            [0x76, 0x6f, 0xd9, 0xd1, 0x18, 0x8e, 0x8e, 0x15]
        );
        assert_eq!(
            owned(&[("authorization", "a")], None)[..8],
            [0x8a, 0xd6, 0x95, 0x20, 0xe6, 0x5d, 0x23, 0xa9]
        );
        assert_eq!(
            owned(&[], Some("a"))[..8],
            [0xca, 0xcf, 0x0e, 0x07, 0x9a, 0xf1, 0x36, 0xb3]
        );
    }
}
