//! The stored form of requests and responses.
//!
//! A head is one line of JSON text, readable with `psql`. Headers are an ordered list of pairs, so
//! that repetitions and order survive. Header values are bytes (RFC 9110 section 5.5). Each byte
//! becomes the character with the same number, as in ISO 8859-1; this is reversible for every value
//! and leaves ASCII unchanged. Bodies are stored beside the head, as bytes.

use std::borrow::Cow;
use std::str::FromStr;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri, Version};
use serde::{Deserialize, Serialize};
use url::Url;

use crate::classify::AcceptedResponse;
use crate::error::Error;
use crate::id::RequestId;
use crate::options::{Guarantee, Options};
use crate::request::{Request, Target};
use crate::response::Response;
use crate::retry::{RetryPolicy, millis};

/// What a runner needs to know about a request besides its bytes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Delivery {
    #[serde(rename = "timeout_ms", with = "millis")]
    pub(crate) attempt_timeout: Duration,
    pub(crate) retry: RetryPolicy,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) accept: Option<Vec<AcceptedResponse>>,
    #[serde(default, skip_serializing_if = "Guarantee::is_default")]
    pub(crate) guarantee: Guarantee,
}

// Both heads repeat the fields of `Headers`: `flatten` would copy a whole head before reading it.
#[derive(Serialize, Deserialize)]
struct StoredRequest<'a> {
    #[serde(borrow)]
    method: Text<'a>,
    url: Text<'a>,
    version: Text<'a>,
    headers: Pairs<'a>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    sensitive: Vec<usize>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    trailers: Option<Headers<'a>>,
    delivery: Cow<'a, Delivery>,
}

#[derive(Serialize, Deserialize)]
struct StoredResponse<'a> {
    #[serde(borrow)]
    version: Text<'a>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    url: Option<Text<'a>>,
    headers: Pairs<'a>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    sensitive: Vec<usize>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    trailers: Option<Headers<'a>>,
}

#[derive(Serialize, Deserialize)]
struct Headers<'a> {
    #[serde(borrow)]
    headers: Pairs<'a>,
    /// Positions in `headers` of the values that must never be shown.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    sensitive: Vec<usize>,
}

type Pairs<'a> = Vec<(Text<'a>, Text<'a>)>;

/// Borrowed from the head unless it contains an escape. A plain `Cow` in a list would always be
/// copied.
#[derive(Serialize, Deserialize)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

impl<'a> From<&'a str> for Text<'a> {
    fn from(text: &'a str) -> Self {
        Self(text.into())
    }
}

impl<'a> Headers<'a> {
    fn of(map: &'a HeaderMap) -> Self {
        let sensitive = map
            .values()
            .enumerate()
            .filter_map(|(position, value)| value.is_sensitive().then_some(position))
            .collect();
        let headers = map
            .iter()
            .map(|(name, value)| (name.as_str().into(), Text(latin1(value.as_bytes()))))
            .collect();
        Self { headers, sensitive }
    }

    fn into_map(self) -> Result<HeaderMap, Error> {
        let mut map = HeaderMap::with_capacity(self.headers.len());
        for (position, (Text(name), Text(value))) in self.headers.into_iter().enumerate() {
            let name = HeaderName::from_str(&name).map_err(|_| corrupt("a header name"))?;
            let mut value = from_latin1(&value)
                .and_then(|bytes| HeaderValue::from_maybe_shared(bytes).ok())
                .ok_or_else(|| corrupt("a header value"))?;
            value.set_sensitive(self.sensitive.contains(&position));
            map.append(name, value);
        }
        Ok(map)
    }
}

fn corrupt(what: &'static str) -> Error {
    Error::corrupt(format!("{what} is malformed"))
}

fn latin1(bytes: &[u8]) -> Cow<'_, str> {
    match std::str::from_utf8(bytes) {
        Ok(text) if text.is_ascii() => Cow::Borrowed(text),
        _ => Cow::Owned(bytes.iter().copied().map(char::from).collect()),
    }
}

fn from_latin1(text: &str) -> Option<Bytes> {
    if text.is_ascii() {
        return Some(Bytes::copy_from_slice(text.as_bytes()));
    }
    text.chars().map(|char| u8::try_from(char).ok()).collect()
}

fn version_name(version: Version) -> &'static str {
    match version {
        Version::HTTP_09 => "HTTP/0.9",
        Version::HTTP_10 => "HTTP/1.0",
        Version::HTTP_2 => "HTTP/2",
        Version::HTTP_3 => "HTTP/3",
        _ => "HTTP/1.1",
    }
}

fn version_of(name: &str) -> Version {
    match name {
        "HTTP/0.9" => Version::HTTP_09,
        "HTTP/1.0" => Version::HTTP_10,
        "HTTP/2" => Version::HTTP_2,
        "HTTP/3" => Version::HTTP_3,
        _ => Version::HTTP_11,
    }
}

pub(crate) fn encode_request(request: &Request, uri: &Uri, delivery: &Delivery) -> String {
    let Headers { headers, sensitive } = Headers::of(&request.headers);
    let head = StoredRequest {
        method: request.method.as_str().into(),
        // The fragment is dropped, because it is not sent.
        url: Text(uri.to_string().into()),
        version: version_name(request.version).into(),
        headers,
        sensitive,
        trailers: request.trailers.as_ref().map(Headers::of),
        delivery: Cow::Borrowed(delivery),
    };
    to_json(&head)
}

/// Serializing maps with string keys, strings and numbers can't fail.
fn to_json<T: Serialize>(head: &T) -> String {
    // Most heads fit without growing the buffer.
    let mut json = Vec::with_capacity(768);
    match serde_json::to_writer(&mut json, head) {
        Ok(()) => String::from_utf8(json).unwrap_or_default(),
        Err(_) => String::new(),
    }
}

pub(crate) fn decode_request(
    head: &str,
    body: Option<Bytes>,
) -> Result<(Request, Uri, Delivery), Error> {
    let head: StoredRequest<'_> = serde_json::from_str(head)
        .map_err(|error| Error::corrupt(format!("the head can't be parsed: {error}")))?;
    let uri: Uri = head.url.0.parse().map_err(|_| corrupt("the URL"))?;
    let (headers, sensitive) = (head.headers, head.sensitive);
    let request = Request {
        method: Method::from_str(&head.method.0).map_err(|_| corrupt("the method"))?,
        target: Target::Uri(uri.clone()),
        version: version_of(&head.version.0),
        headers: Headers { headers, sensitive }.into_map()?,
        body,
        trailers: head.trailers.map(Headers::into_map).transpose()?,
        options: Options::default(),
    };
    Ok((request, uri, head.delivery.into_owned()))
}

pub(crate) fn encode_response(response: &Response) -> String {
    let Headers { headers, sensitive } = Headers::of(&response.headers);
    to_json(&StoredResponse {
        version: version_name(response.version).into(),
        url: response.url.as_ref().map(|url| url.as_str().into()),
        headers,
        sensitive,
        trailers: response.trailers.as_ref().map(Headers::of),
    })
}

pub(crate) fn decode_response(
    id: RequestId,
    status: u16,
    head: &str,
    body: Bytes,
) -> Result<Response, Error> {
    let head: StoredResponse<'_> = serde_json::from_str(head)
        .map_err(|error| Error::corrupt(format!("the response's head can't be parsed: {error}")))?;
    let (headers, sensitive) = (head.headers, head.sensitive);
    Ok(Response {
        id,
        status: StatusCode::from_u16(status).map_err(|_| corrupt("the response's status"))?,
        version: version_of(&head.version.0),
        headers: Headers { headers, sensitive }.into_map()?,
        body,
        trailers: head.trailers.map(Headers::into_map).transpose()?,
        url: head.url.and_then(|url| Url::parse(&url.0).ok()),
        extensions: http::Extensions::new(),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn delivery() -> Delivery {
        Delivery {
            attempt_timeout: Duration::from_secs(30),
            retry: RetryPolicy::awaited(),
            accept: None,
            guarantee: Guarantee::default(),
        }
    }

    fn header_value() -> impl Strategy<Value = HeaderValue> {
        let byte = prop_oneof![0x20u8..0x7f, 0x80u8..=0xff, Just(b'\t')];
        (proptest::collection::vec(byte, 0..20), any::<bool>()).prop_map(|(bytes, sensitive)| {
            let mut value = HeaderValue::from_bytes(&bytes).unwrap();
            value.set_sensitive(sensitive);
            value
        })
    }

    proptest! {
        #[test]
        fn headers_survive_in_order_with_repetitions_and_flags(
            pairs in proptest::collection::vec(("[a-z][a-z0-9-]{0,3}", header_value()), 0..12),
        ) {
            let mut headers = HeaderMap::new();
            for (name, value) in pairs {
                headers.append(HeaderName::from_str(&name).unwrap(), value);
            }
            let json = to_json(&Headers::of(&headers));
            let back = serde_json::from_str::<Headers<'_>>(&json).unwrap().into_map().unwrap();
            let flat = |map: &HeaderMap| -> Vec<(String, Vec<u8>, bool)> {
                map.iter()
                    .map(|(name, value)| {
                        (name.to_string(), value.as_bytes().to_vec(), value.is_sensitive())
                    })
                    .collect()
            };
            prop_assert_eq!(flat(&headers), flat(&back));
        }

        #[test]
        fn methods_and_urls_survive(
            method in "[A-Z!#$%&'*+.^_`|~0-9-]{1,12}",
            path in "[!-~]{0,30}",
        ) {
            let Ok(uri) = format!("http://user:pw@Example.com:81/{path}").parse::<Uri>() else {
                return Ok(());
            };
            let builder = http::Request::builder().method(&*method).uri(uri.clone());
            let request = builder.body("x").unwrap();
            let request = Request::try_from(request).unwrap();
            let head = encode_request(&request, &uri, &delivery());
            let decoded = decode_request(&head, request.body.clone());
            let (back, back_uri, back_delivery) = decoded.unwrap();
            prop_assert_eq!(back_uri.to_string(), uri.to_string());
            prop_assert_eq!(back.method, request.method);
            prop_assert_eq!(back_delivery, delivery());
        }
    }

    #[test]
    fn a_head_is_readable() {
        let request = http::Request::post("https://example.com/a?b=c")
            .header("content-type", "text/plain")
            .body("x")
            .unwrap();
        let request = Request::try_from(request).unwrap();
        let head = encode_request(&request, &request.uri().unwrap(), &delivery());
        assert!(
            head.starts_with(concat!(
                r#"{"method":"POST","url":"https://example.com/a?b=c","version":"HTTP/1.1","#,
                r#""headers":[["content-type","text/plain"]]"#,
            )),
            "{head}"
        );
    }

    #[test]
    fn a_malformed_head_is_an_error() {
        assert!(decode_request("{}", None).is_err());
        assert!(decode_response(RequestId::generate(), 200, "", Bytes::new()).is_err());
    }
}
