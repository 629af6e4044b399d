//! Tells whether two calls with the same key mean the same request.

use http::Uri;
use sha2::{Digest, Sha256};

use crate::request::Request;

/// SHA-256 over method, URL and body. Headers are left out, because many of them differ between
/// calls without any meaning: dates, trace ids.
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
    hasher.update([u8::from(request.body.is_some())]);
    hasher.update(request.body.as_deref().unwrap_or_default());
    hasher.finalize().into()
}

impl Request {
    /// Whether the fingerprints of both requests would be equal.
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
        assert_ne!(
            of("GET", "http://a/", None),
            of("GET", "http://a/", Some(""))
        );
    }

    #[test]
    fn the_stored_form_never_changes() {
        assert_eq!(
            of("POST", "http://a/b", Some("c"))[..8],
            [0x76, 0x6f, 0xd9, 0xd1, 0x18, 0x8e, 0x8e, 0x15]
        );
    }
}
