//! Random requests, and random responses to them.

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Version};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;

use super::raw::Answer;

#[derive(Clone, Debug)]
pub struct Case {
    pub asked: Asked,
    pub answered: Answered,
    /// What prevents retries: accepting any response, or a policy of one attempt.
    pub accept_any: bool,
}

#[derive(Clone, Debug)]
pub struct Asked {
    pub method: Method,
    pub target: String,
    pub credentials: bool,
    pub version: Version,
    pub headers: HeaderMap,
    /// Absent, empty, or not empty.
    pub body: Option<Bytes>,
}

#[derive(Clone, Debug)]
pub struct Answered {
    pub status: u16,
    pub reason: &'static str,
    pub old: bool,
    /// Whether an interim response comes first.
    pub hints: bool,
    pub headers: Vec<(String, Bytes)>,
    pub body: Bytes,
    pub framing: Framing,
}

#[derive(Clone, Copy, Debug)]
pub enum Framing {
    Length,
    Chunked,
    Close,
}

/// A random case. `allowed` says which targets the client can express.
pub fn case(allowed: fn(&str) -> bool) -> impl Strategy<Value = Case> {
    (asked(allowed), answered(), any::<bool>()).prop_map(|(asked, answered, accept_any)| Case {
        asked,
        answered,
        accept_any,
    })
}

fn asked(allowed: fn(&str) -> bool) -> impl Strategy<Value = Asked> {
    let method = prop_oneof![
        4 => select(&[
            "GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD", "TRACE", "PROPFIND", "get",
        ][..])
        .prop_map(str::to_owned),
        1 => "[A-Za-z0-9!#$%&'*+.^_`|~-]{1,12}",
    ]
    // `CONNECT` opens a tunnel, which is not a request.
    .prop_filter("a tunnel", |method| method != "CONNECT")
    .prop_map(|method| Method::from_bytes(method.as_bytes()).unwrap());
    let version = prop_oneof![9 => Just(Version::HTTP_11), 1 => Just(Version::HTTP_10)];
    let body = prop_oneof![
        Just(None),
        Just(Some(Bytes::new())),
        vec(any::<u8>(), 1..300).prop_map(|body| Some(body.into())),
    ];
    (
        method,
        target().prop_filter("can't be expressed", move |target| allowed(target)),
        prop::bool::weighted(0.1),
        version,
        request_headers(),
        body,
        prop::bool::weighted(0.2),
    )
        .prop_map(
            |(method, target, credentials, version, mut headers, body, says_length)| {
                if says_length {
                    let len = body.as_ref().map_or(0, Bytes::len);
                    headers.insert(http::header::CONTENT_LENGTH, len.into());
                }
                Asked {
                    method,
                    target,
                    credentials,
                    version,
                    headers,
                    body,
                }
            },
        )
}

/// Paths and queries that a careless parser would change.
fn target() -> impl Strategy<Value = String> {
    let piece = prop_oneof![
        4 => "[a-zA-Z0-9._~-]{1,5}",
        4 => select(&[
            "/", "//", "/./", "/../", "%2F", "%2f", "%00", "%zz", "%", "%C3%A9", "%ff", "+", "'",
            "\"", "|", "{x}", "[]", "\\", "^", "`", ";", ":", "@", "&", "=", "$", "!", "*", "(,)",
        ][..])
        .prop_map(str::to_owned),
    ];
    let query = prop_oneof![
        Just(None),
        vec(prop_oneof![piece.clone(), Just("?".to_owned())], 0..5).prop_map(Some),
    ];
    (vec(piece, 0..6), query).prop_map(|(path, query)| {
        let query = query.map(|query| format!("?{}", query.concat()));
        format!("/{}{}", path.concat(), query.unwrap_or_default())
    })
}

fn request_headers() -> impl Strategy<Value = HeaderMap> {
    let name = prop_oneof![
        select(
            &[
                "accept",
                "accept-encoding",
                "authorization",
                "content-type",
                "cookie",
                "host",
                "user-agent",
                "x-a",
                "x-b",
            ][..]
        )
        .prop_map(str::to_owned),
        "x-[a-z0-9!#$%&'*+.^_`|~-]{1,8}",
    ];
    let byte = prop_oneof![8 => 0x20u8..0x7f, 2 => 0x80u8..=0xff, 1 => Just(b'\t')];
    vec((name, vec(byte, 0..12), any::<bool>()), 0..10).prop_map(|pairs| {
        let mut headers = HeaderMap::new();
        for (name, value, sensitive) in pairs {
            let name = HeaderName::from_bytes(name.as_bytes()).unwrap();
            let mut value = HeaderValue::from_bytes(&value).unwrap();
            value.set_sensitive(sensitive);
            headers.append(name, value);
        }
        headers
    })
}

fn answered() -> impl Strategy<Value = Answered> {
    let status = prop_oneof![
        2 => select(&[
            200, 201, 202, 203, 204, 205, 206, 300, 301, 302, 303, 304, 307, 308, 400, 401, 404,
            407, 408, 409, 410, 417, 421, 425, 426, 429, 431, 500, 501, 502, 503, 504, 511, 599,
            600, 999u16,
        ][..]),
        1 => 200u16..=999,
    ];
    let name = prop_oneof![
        select(
            &[
                "Set-Cookie",
                "Content-Type",
                "Content-Encoding",
                "ETag",
                "Retry-After",
                "WWW-Authenticate",
                "X-A",
                "x-b",
            ][..]
        )
        .prop_map(str::to_owned),
        "[xX]-[a-zA-Z0-9_.~-]{1,8}",
    ];
    let byte = prop_oneof![8 => 0x20u8..0x7f, 2 => 0x80u8..=0xff, 1 => Just(b'\t')];
    let body = prop_oneof![1 => Just(Vec::new()), 3 => vec(any::<u8>(), 1..300)];
    let framing = prop_oneof![
        4 => Just(Framing::Length),
        2 => Just(Framing::Chunked),
        1 => Just(Framing::Close),
    ];
    (
        status,
        select(&["", "OK", "Quite Another Phrase"][..]),
        prop::bool::weighted(0.1),
        prop::bool::weighted(0.1),
        vec((name, vec(byte, 0..12).prop_map(Bytes::from)), 0..10),
        body.prop_map(Bytes::from),
        framing,
    )
        .prop_map(
            |(status, reason, old, hints, headers, body, framing)| Answered {
                status,
                reason,
                old,
                hints: hints && !old,
                headers,
                body,
                framing,
            },
        )
}

impl Answered {
    /// The response's bytes, for a request of this method.
    pub fn to(&self, method: &Method) -> Answer {
        let mut bytes = Vec::new();
        if self.hints {
            bytes.extend_from_slice(b"HTTP/1.1 103 Early Hints\r\nlink: </a.css>\r\n\r\n");
        }
        let version = if self.old { "HTTP/1.0" } else { "HTTP/1.1" };
        bytes
            .extend_from_slice(format!("{version} {} {}\r\n", self.status, self.reason).as_bytes());
        for (name, value) in &self.headers {
            bytes.extend_from_slice(name.as_bytes());
            bytes.extend_from_slice(b": ");
            bytes.extend_from_slice(value);
            bytes.extend_from_slice(b"\r\n");
        }
        let bodiless = *method == Method::HEAD || matches!(self.status, 204 | 304);
        let framing = match self.framing {
            Framing::Chunked if self.old => Framing::Close,
            framing => framing,
        };
        let close = self.old || matches!(framing, Framing::Close);
        if close {
            bytes.extend_from_slice(b"connection: close\r\n");
        }
        match framing {
            // A 204 has no length at all (RFC 9110 section 8.6).
            Framing::Length if self.status != 204 => {
                bytes.extend_from_slice(
                    format!("content-length: {}\r\n", self.body.len()).as_bytes(),
                );
            }
            Framing::Chunked if self.status != 204 => {
                bytes.extend_from_slice(b"transfer-encoding: chunked\r\n");
            }
            _ => {}
        }
        bytes.extend_from_slice(b"\r\n");
        if bodiless {
            return Answer { bytes, close };
        }
        if let Framing::Chunked = framing {
            for chunk in self.body.chunks(100) {
                bytes.extend_from_slice(format!("{:x}\r\n", chunk.len()).as_bytes());
                bytes.extend_from_slice(chunk);
                bytes.extend_from_slice(b"\r\n");
            }
            bytes.extend_from_slice(b"0\r\n\r\n");
        } else {
            bytes.extend_from_slice(&self.body);
        }
        Answer { bytes, close }
    }
}
