//! What a request sent and got, for an operator who asks for it.

use http::uri::{Authority, Uri};
use http::{HeaderMap, HeaderValue};

use crate::request::{Request, Target};
use crate::response::Response;

/// What is shown of a secret.
const MASK: &str = "***";

/// What a request sends and what it got. [`Admin::content`](crate::admin::Admin::content) returns
/// it.
///
/// Values of headers that are marked sensitive, and credentials in the URL, are replaced by `***`,
/// unless [`Admin::reveal`](crate::admin::Admin::reveal) returned it. Paths, queries and bodies are
/// shown as they are, and may hold secrets.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct RequestContent {
    /// The request. `None` once a request has ended without being a dead letter.
    pub request: Option<Request>,
    /// The final response or, of an unfinished request, the last one that asked for a retry.
    pub response: Option<Response>,
}

impl RequestContent {
    pub(crate) fn masked(request: Option<Request>, response: Option<Response>) -> Self {
        let request = request.map(|mut request| {
            if let Target::Uri(uri) = &request.target {
                request.target = Target::Uri(without_credentials(uri));
            }
            mask(&mut request.headers);
            request.trailers.iter_mut().for_each(mask);
            request
        });
        let response = response.map(|mut response| {
            mask(&mut response.headers);
            response.trailers.iter_mut().for_each(mask);
            response
        });
        Self { request, response }
    }
}

fn mask(headers: &mut HeaderMap) {
    for value in headers.values_mut() {
        if value.is_sensitive() {
            *value = HeaderValue::from_static(MASK);
            value.set_sensitive(true);
        }
    }
}

fn without_credentials(uri: &Uri) -> Uri {
    let masked = || {
        let mut parts = uri.clone().into_parts();
        let authority = parts.authority.take()?;
        let (_, host) = authority.as_str().rsplit_once('@')?;
        parts.authority = Some(format!("{MASK}@{host}").parse::<Authority>().ok()?);
        Uri::from_parts(parts).ok()
    };
    masked().unwrap_or_else(|| uri.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_masked() {
        let request = http::Request::get("http://hunter2:hunter2@a.example/b?c")
            .header("authorization", "hunter2")
            .header("x-open", "shown")
            .body("body")
            .unwrap();
        let mut request = Request::try_from(request).unwrap();
        crate::redact::mark_secrets(&mut request.headers, &[]);
        let content = RequestContent::masked(Some(request), None);
        let request = content.request.unwrap();
        assert_eq!(request.url(), "http://***@a.example/b?c");
        assert_eq!(request.headers()["authorization"], MASK);
        assert!(request.headers()["authorization"].is_sensitive());
        assert_eq!(request.headers()["x-open"], "shown");
        assert_eq!(request.body().unwrap(), "body");
    }
}
