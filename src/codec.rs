//! The stored form of requests and responses.
//!
//! A head is one line of JSON text, readable with `psql`. Headers are an ordered list of pairs, so
//! that repetitions and order survive. Header values are bytes (RFC 9110 section 5.5). Each byte
//! becomes the character with the same number, as in ISO 8859-1; this is reversible for every value
//! and leaves ASCII unchanged. Bodies are stored beside the head, as bytes.
//!
//! A later version may store more than this one knows. A field or a variant that is not known here
//! makes the whole form [`Unreadable`]: without it, the request would not be the one that was
//! persisted.

use std::borrow::Cow;
use std::error::Error as StdError;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri, Version};
use serde::{Deserialize, Serialize};
use serde_json::error::Category;
use url::Url;

use crate::classify::AcceptedResponse;
use crate::destination::validate_limit_key;
use crate::error::{Error, Kind};
use crate::id::RequestId;
use crate::options::{Guarantee, Options, Priority, validate_timeout};
use crate::request::{Request, Target, check_uri};
use crate::response::Response;
use crate::retry::{RetryPolicy, millis};
use crate::trace_context::TraceContext;

/// The newest form of outcomes that this version reads. Versions that only read earlier ones leave
/// such outcomes alone.
pub(crate) const OUTCOME_FORMAT: i16 = 1;

/// A map of headers is given room for this many. It grows if there are more.
const USUAL_HEADERS: usize = 64;

/// Why a stored form can't be read. Names fields and positions, never values, so it may be stored
/// and shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Unreadable(Cow<'static, str>);

impl Unreadable {
    pub(crate) fn new(reason: impl Into<Cow<'static, str>>) -> Self {
        Self(reason.into())
    }

    /// A part of the form is not what it must be.
    fn part(name: &'static str) -> Self {
        Self(format!("{name} is malformed").into())
    }

    /// The text is not JSON, or not of the expected form. Its own error might show values of it.
    pub(crate) fn json(what: &str, error: &serde_json::Error, start: usize) -> Self {
        let text = error.to_string();
        let problem = match error.classify() {
            Category::Data => named(&text).unwrap_or("a value is malformed"),
            Category::Syntax | Category::Eof | Category::Io => "it is not JSON",
        };
        let line = error.line();
        let column = error.column()
            - if line == 1 {
                start.min(error.column())
            } else {
                0
            };
        Self(format!("{what}: {problem}, at line {line}, column {column}").into())
    }

    /// The status of an outcome is none that this version knows.
    pub(crate) fn status(name: &str) -> Self {
        let shown = if is_name(name) { name } else { "?" };
        Self(format!("a newer version wrote it, with the status `{shown}`").into())
    }

    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

/// The start of serde's error that names a field or a variant, if that is what it is about.
fn named(error: &str) -> Option<&str> {
    let start = [
        "unknown field `",
        "unknown variant `",
        "missing field `",
        "duplicate field `",
    ]
    .into_iter()
    .find(|start| error.starts_with(start))?;
    let end = start.len() + error[start.len()..].find('`')?;
    is_name(&error[start.len()..end]).then(|| &error[..=end])
}

/// Whether a text can be a name of this crate's. Anything else may be a secret.
fn is_name(text: &str) -> bool {
    (1..=40).contains(&text.len())
        && text
            .bytes()
            .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_')
}

impl fmt::Display for Unreadable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl StdError for Unreadable {}

impl From<Unreadable> for Error {
    fn from(unreadable: Unreadable) -> Self {
        Self::new(Kind::Unreadable(unreadable.0))
    }
}

/// Whether this version reads outcomes of this format.
pub(crate) fn check_outcome_format(format: i16) -> Result<(), Unreadable> {
    match format {
        1..=OUTCOME_FORMAT => Ok(()),
        ..=0 => Err(Unreadable::part("the format")),
        _ => Err(Unreadable(
            format!("a newer version wrote it, in format {format}").into(),
        )),
    }
}

/// What a runner needs to know about a request besides its bytes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Delivery {
    #[serde(rename = "timeout_ms", with = "millis")]
    pub(crate) attempt_timeout: Duration,
    pub(crate) retry: RetryPolicy,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) accept: Option<Vec<AcceptedResponse>>,
    #[serde(default, skip_serializing_if = "Guarantee::is_default")]
    pub(crate) guarantee: Guarantee,
    /// The row has it too, until the request ends. The migrations' `request_priority` looks for it
    /// here.
    #[serde(default, skip_serializing_if = "Priority::is_default")]
    pub(crate) priority: Priority,
    /// The name of the destination, if the URL doesn't give it. The migrations' `request_limit_key`
    /// looks for it here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) limit_key: Option<Box<str>>,
    /// A caller gets the response, whatever it is. Without one, a final response other than a
    /// success makes a dead letter. Stays last: the migrations' `without_caller` takes it off.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) awaited: bool,
}

// Both heads repeat the fields of `Headers`: `flatten` would copy a whole head before reading it.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
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
    #[serde(default, skip_serializing_if = "Option::is_none")]
    trace: Option<StoredTrace<'a>>,
    delivery: Cow<'a, Delivery>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
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
#[serde(deny_unknown_fields)]
struct Headers<'a> {
    #[serde(borrow)]
    headers: Pairs<'a>,
    /// Positions in `headers` of the values that must never be shown.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    sensitive: Vec<usize>,
}

/// What an encrypted head hides. The method, the origin and the delivery stay readable beside it,
/// because statements and operators read them.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[cfg(feature = "encryption")]
struct HiddenRequest<'a> {
    #[serde(borrow)]
    url: Text<'a>,
    version: Text<'a>,
    headers: Pairs<'a>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    sensitive: Vec<usize>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    trailers: Option<Headers<'a>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    trace: Option<StoredTrace<'a>>,
    /// Whether there is a body: a row whose body was removed must not be sent without one.
    body: bool,
}

/// What attempts carry of the trace that the request belongs to.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct StoredTrace<'a> {
    #[serde(borrow)]
    traceparent: Text<'a>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    tracestate: Option<Text<'a>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    baggage: Option<Text<'a>>,
}

impl<'a> StoredTrace<'a> {
    fn of(context: &'a TraceContext) -> Self {
        Self {
            traceparent: context.traceparent().into(),
            tracestate: context.tracestate().map(Text::from),
            baggage: context.baggage().map(Text::from),
        }
    }

    fn into_context(self) -> Result<TraceContext, Unreadable> {
        let context = TraceContext::new(&self.traceparent.0).and_then(|context| {
            let context = match self.tracestate {
                Some(tracestate) => context.with_tracestate(&tracestate.0)?,
                None => context,
            };
            match self.baggage {
                Some(baggage) => context.with_baggage(&baggage.0),
                None => Ok(context),
            }
        });
        context.map_err(|_| Unreadable::part("the trace context"))
    }
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

    fn into_map(self) -> Result<HeaderMap, Unreadable> {
        if self
            .sensitive
            .iter()
            .any(|position| *position >= self.headers.len())
        {
            return Err(Unreadable::part("the list of sensitive headers"));
        }
        let mut sensitive = self.sensitive;
        sensitive.sort_unstable();
        // A map takes any number of values of one name, and panics at too many names.
        let too_many = |_| Unreadable::new("there are too many headers");
        let capacity = self.headers.len().min(USUAL_HEADERS);
        let mut map = HeaderMap::try_with_capacity(capacity).map_err(too_many)?;
        for (position, (Text(name), Text(value))) in self.headers.into_iter().enumerate() {
            let name =
                HeaderName::from_str(&name).map_err(|_| Unreadable::part("a header name"))?;
            let mut value = from_latin1(&value)
                .and_then(|bytes| HeaderValue::from_maybe_shared(bytes).ok())
                .ok_or_else(|| Unreadable::part("a header value"))?;
            value.set_sensitive(sensitive.binary_search(&position).is_ok());
            map.try_append(name, value).map_err(too_many)?;
        }
        Ok(map)
    }
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

fn version_of(name: &str) -> Result<Version, Unreadable> {
    Ok(match name {
        "HTTP/0.9" => Version::HTTP_09,
        "HTTP/1.0" => Version::HTTP_10,
        "HTTP/1.1" => Version::HTTP_11,
        "HTTP/2" => Version::HTTP_2,
        "HTTP/3" => Version::HTTP_3,
        _ => return Err(Unreadable::part("the HTTP version")),
    })
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
        trace: request.trace.as_deref().map(StoredTrace::of),
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

/// The JSON behind these bytes, and before room for this many more.
#[cfg(feature = "encryption")]
fn to_json_between<T: Serialize>(head: &T, before: &[u8], after: usize) -> Vec<u8> {
    let mut json = Vec::with_capacity(768 + before.len() + after);
    json.extend_from_slice(before);
    if serde_json::to_writer(&mut json, head).is_err() {
        json.truncate(before.len());
    }
    json
}

/// The request without its body.
pub(crate) fn decode_request(head: &str) -> Result<(Request, Uri, Delivery), Unreadable> {
    let head: StoredRequest<'_> =
        serde_json::from_str(head).map_err(|error| Unreadable::json("the head", &error, 0))?;
    let method = head.method;
    let (delivery, parts) = (
        head.delivery.into_owned(),
        RequestParts {
            url: head.url,
            version: head.version,
            headers: head.headers,
            sensitive: head.sensitive,
            trailers: head.trailers,
            trace: head.trace,
        },
    );
    parts.into_request(&method.0, delivery)
}

/// The parts of a stored request that an encrypted head hides.
struct RequestParts<'a> {
    url: Text<'a>,
    version: Text<'a>,
    headers: Pairs<'a>,
    sensitive: Vec<usize>,
    trailers: Option<Headers<'a>>,
    trace: Option<StoredTrace<'a>>,
}

impl RequestParts<'_> {
    fn into_request(
        self,
        method: &str,
        delivery: Delivery,
    ) -> Result<(Request, Uri, Delivery), Unreadable> {
        let uri: Uri = self
            .url
            .0
            .parse()
            .map_err(|_| Unreadable::part("the URL"))?;
        check_uri(&uri).map_err(|_| Unreadable::part("the URL"))?;
        validate_timeout(delivery.attempt_timeout).map_err(|_| Unreadable::part("`timeout_ms`"))?;
        let retry = delivery.retry.validate();
        retry.map_err(|reason| Unreadable(format!("`retry`: {reason}").into()))?;
        if let Some(key) = &delivery.limit_key {
            validate_limit_key(key).map_err(|_| Unreadable::part("`limit_key`"))?;
        }
        let (headers, sensitive) = (self.headers, self.sensitive);
        let request = Request {
            method: Method::from_str(method).map_err(|_| Unreadable::part("the method"))?,
            target: Target::Uri(uri.clone()),
            version: version_of(&self.version.0)?,
            headers: Headers { headers, sensitive }.into_map()?,
            body: None,
            trailers: self.trailers.map(Headers::into_map).transpose()?,
            trace: match self.trace {
                Some(trace) => Some(Box::new(trace.into_context()?)),
                None => None,
            },
            options: Options::default(),
        };
        Ok((request, uri, delivery))
    }
}

/// What an encrypted head hides of a request, with room for the nonce before it and for the tag
/// after it, so that it is encrypted in place.
#[cfg(feature = "encryption")]
pub(crate) fn encode_hidden(request: &Request, uri: &Uri, before: &[u8], after: usize) -> Vec<u8> {
    let Headers { headers, sensitive } = Headers::of(&request.headers);
    let hidden = HiddenRequest {
        url: Text(uri.to_string().into()),
        version: version_name(request.version).into(),
        headers,
        sensitive,
        trailers: request.trailers.as_ref().map(Headers::of),
        trace: request.trace.as_deref().map(StoredTrace::of),
        body: request.body.is_some(),
    };
    to_json_between(&hidden, before, after)
}

/// The request of an encrypted head without its body, and whether it has one.
#[cfg(feature = "encryption")]
pub(crate) fn decode_hidden(
    method: &str,
    hidden: &[u8],
    delivery: &str,
) -> Result<((Request, Uri, Delivery), bool), Unreadable> {
    let delivery: Delivery = serde_json::from_str(delivery)
        .map_err(|error| Unreadable::json("the head's delivery", &error, 0))?;
    let hidden: HiddenRequest<'_> = serde_json::from_slice(hidden)
        .map_err(|error| Unreadable::json("the decrypted head", &error, 0))?;
    let body = hidden.body;
    let parts = RequestParts {
        url: hidden.url,
        version: hidden.version,
        headers: hidden.headers,
        sensitive: hidden.sensitive,
        trailers: hidden.trailers,
        trace: hidden.trace,
    };
    Ok((parts.into_request(method, delivery)?, body))
}

/// The delivery as it stands in a head.
#[cfg(feature = "encryption")]
pub(crate) fn encode_delivery(delivery: &Delivery) -> String {
    to_json(delivery)
}

pub(crate) fn encode_response(response: &Response) -> String {
    to_json(&stored_response(response))
}

/// The head of a response behind these bytes, and before room for this many more.
#[cfg(feature = "encryption")]
pub(crate) fn encode_response_between(response: &Response, before: &[u8], after: usize) -> Vec<u8> {
    to_json_between(&stored_response(response), before, after)
}

fn stored_response(response: &Response) -> StoredResponse<'_> {
    let Headers { headers, sensitive } = Headers::of(&response.headers);
    StoredResponse {
        version: version_name(response.version).into(),
        url: response.url.as_ref().map(|url| url.as_str().into()),
        headers,
        sensitive,
        trailers: response.trailers.as_ref().map(Headers::of),
    }
}

pub(crate) fn decode_response(
    id: RequestId,
    status: u16,
    head: &str,
    body: Bytes,
) -> Result<Response, Unreadable> {
    let head: StoredResponse<'_> = serde_json::from_str(head)
        .map_err(|error| Unreadable::json("the response's head", &error, 0))?;
    let url = head.url.map(|url| Url::parse(&url.0)).transpose();
    let (headers, sensitive) = (head.headers, head.sensitive);
    Ok(Response {
        id,
        status: StatusCode::from_u16(status)
            .map_err(|_| Unreadable::part("the response's status"))?,
        version: version_of(&head.version.0)?,
        headers: Headers { headers, sensitive }.into_map()?,
        body,
        trailers: head.trailers.map(Headers::into_map).transpose()?,
        url: url.map_err(|_| Unreadable::part("the response's URL"))?,
        extensions: http::Extensions::new(),
    })
}

#[cfg(test)]
pub(crate) mod fuzz;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::Value;

    use super::*;

    fn delivery() -> Delivery {
        Delivery {
            attempt_timeout: Duration::from_secs(30),
            retry: RetryPolicy::awaited(),
            accept: None,
            guarantee: Guarantee::default(),
            priority: Priority::default(),
            limit_key: None,
            awaited: true,
        }
    }

    fn trace() -> TraceContext {
        let parent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        let context = TraceContext::new(parent).unwrap();
        let context = context.with_tracestate("a=1").unwrap();
        context.with_baggage("b=2").unwrap()
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
            let Ok(request) = Request::try_from(request) else {
                return Ok(());
            };
            let head = encode_request(&request, &uri, &delivery());
            let (back, back_uri, back_delivery) = decode_request(&head).unwrap();
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
    fn a_reason_names_fields_and_positions_but_no_values() {
        let request = http::Request::post("https://example.com/hunter2").body("x");
        let request = Request::try_from(request.unwrap()).unwrap();
        let head = encode_request(&request, &request.uri().unwrap(), &delivery());
        for (from, to, reason) in [
            (
                "{",
                r#"{"new":1,"#,
                "the head: unknown field `new`, at line 1, column 6",
            ),
            (
                "{",
                r#"{"hunter 2":1,"#,
                "the head: a value is malformed, at line 1, column 11",
            ),
            (
                r#""POST""#,
                r#"["hunter2"]"#,
                "the head: a value is malformed, at line 1, column 10",
            ),
            (
                r#""POST""#,
                "hunter2",
                "the head: it is not JSON, at line 1, column 11",
            ),
            (r#""POST""#, r#""hunter 2""#, "the method is malformed"),
            ("https:", "hunter2:", "the URL is malformed"),
            (
                r#""timeout_ms":30000"#,
                r#""timeout_ms":0"#,
                "`timeout_ms` is malformed",
            ),
            (
                r#""headers":[]"#,
                r#""headers":[],"sensitive":[0]"#,
                "the list of sensitive headers is malformed",
            ),
        ] {
            assert!(head.contains(from), "{head}");
            let error = decode_request(&head.replacen(from, to, 1)).unwrap_err();
            assert_eq!(error.as_str(), reason);
        }
    }

    /// Copies of a form, each with one more field in one of its objects.
    fn with_field(json: &Value) -> Vec<Value> {
        let mut all = Vec::new();
        match json {
            Value::Object(fields) => {
                let mut more = fields.clone();
                more.insert("x".into(), 1.into());
                all.push(Value::Object(more));
                for (name, value) in fields {
                    for value in with_field(value) {
                        let mut changed = fields.clone();
                        changed.insert(name.clone(), value);
                        all.push(Value::Object(changed));
                    }
                }
            }
            Value::Array(values) => {
                for (position, value) in values.iter().enumerate() {
                    for value in with_field(value) {
                        let mut changed = values.clone();
                        changed[position] = value;
                        all.push(Value::Array(changed));
                    }
                }
            }
            _ => {}
        }
        all
    }

    #[test]
    fn every_struct_of_a_stored_form_refuses_unknown_fields() {
        let delivery = Delivery {
            accept: Some(vec![
                AcceptedResponse::Status(404),
                AcceptedResponse::Range(1, 2),
            ]),
            guarantee: Guarantee::AtMostOnce,
            priority: Priority::High,
            limit_key: Some("tenant-7".into()),
            awaited: true,
            ..delivery()
        };
        let mut request =
            Request::try_from(http::Request::post("http://a/").body("x").unwrap()).unwrap();
        request.trailers = Some(HeaderMap::from_iter([(
            http::header::ETAG,
            "x".parse().unwrap(),
        )]));
        request.trace = Some(Box::new(trace()));
        let head = encode_request(&request, &request.uri().unwrap(), &delivery);
        assert!(decode_request(&head).is_ok());
        let changed = with_field(&serde_json::from_str(&head).unwrap());
        // The head, its trailers, its trace, the delivery, its policy, the delays with their kind,
        // and two accepted responses.
        assert_eq!(changed.len(), 9, "{changed:#?}");
        for head in changed {
            assert!(decode_request(&head.to_string()).is_err(), "{head}");
        }
        let response = Response {
            id: RequestId::generate(),
            status: StatusCode::OK,
            version: Version::HTTP_11,
            headers: HeaderMap::new(),
            body: Bytes::new(),
            trailers: request.trailers.clone(),
            url: None,
            extensions: http::Extensions::new(),
        };
        let changed = with_field(&serde_json::from_str(&encode_response(&response)).unwrap());
        assert_eq!(changed.len(), 2);
        for head in changed {
            let decoded = decode_response(response.id, 200, &head.to_string(), Bytes::new());
            assert!(decoded.is_err(), "{head}");
        }
    }

    #[test]
    fn a_trace_context_survives_and_a_malformed_one_is_unreadable() {
        let request = http::Request::get("http://a/").body("").unwrap();
        let mut request = Request::try_from(request).unwrap();
        let uri = request.uri().unwrap();
        assert!(!encode_request(&request, &uri, &delivery()).contains("trace"));
        request.trace = Some(Box::new(trace()));
        let head = encode_request(&request, &uri, &delivery());
        let (read, _, _) = decode_request(&head).unwrap();
        assert_eq!(read.trace, request.trace);
        for part in ["00-4b", "a=1", "b=2"] {
            let error = decode_request(&head.replace(part, "?")).unwrap_err();
            assert_eq!(error.as_str(), "the trace context is malformed");
        }
    }

    #[test]
    fn a_head_with_any_number_of_headers_is_read_or_refused() {
        let request = http::Request::get("http://a/").body("").unwrap();
        let request = Request::try_from(request).unwrap();
        let head = encode_request(&request, &request.uri().unwrap(), &delivery());
        let with = |name: &dyn Fn(usize) -> String, count| {
            let pairs: Vec<_> = (0..count).map(|at| (name(at), "x")).collect();
            let pairs = serde_json::to_string(&pairs).unwrap();
            let positions: Vec<usize> = (0..count).collect();
            head.replace(
                r#""headers":[]"#,
                &format!(r#""headers":{pairs},"sensitive":{positions:?}"#),
            )
        };
        // As many values as http's map can have names.
        for count in [24_576, 24_577, 70_000] {
            let (request, _, _) = decode_request(&with(&|_| "a".to_owned(), count)).unwrap();
            assert_eq!(request.headers.get_all("a").iter().count(), count);
        }
        let error = decode_request(&with(&|at| format!("a{at}"), 40_000)).unwrap_err();
        assert_eq!(error.as_str(), "there are too many headers");
    }

    #[test]
    fn a_malformed_head_is_an_error() {
        assert!(decode_request("{}").is_err());
        assert!(decode_response(RequestId::generate(), 200, "", Bytes::new()).is_err());
    }
}
