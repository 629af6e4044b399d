//! Shared by the benches: a server, a receiver, callers, polls and reports.

#![allow(dead_code)] // each bench uses a part of it

pub(crate) mod load;
pub(crate) mod memory;
pub(crate) mod poll;
pub(crate) mod receiver;
pub(crate) mod report;
pub(crate) mod server;

use bytes::Bytes;

pub(crate) type AnyError = Box<dyn std::error::Error + Send + Sync>;

/// Command-line arguments: names, each with its value.
pub(crate) fn arguments() -> impl Iterator<Item = Result<(String, String), AnyError>> {
    // Cargo adds `--bench`.
    let mut arguments = std::env::args().skip(1).filter(|name| name != "--bench");
    std::iter::from_fn(move || {
        let name = arguments.next()?;
        let value = arguments.next();
        Some(match value {
            Some(value) => Ok((name, value)),
            None => Err(format!("{name} needs a value").into()),
        })
    })
}

pub(crate) fn request(url: &str, body: &Bytes) -> http::Request<Bytes> {
    let mut request = http::Request::new(body.clone());
    *request.method_mut() = http::Method::POST;
    if let Ok(uri) = url.parse() {
        *request.uri_mut() = uri;
    }
    request
}
