//! What a hook sees of an attempt, and can change.

use std::error::Error as StdError;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use http::header::{CONTENT_LENGTH, TRANSFER_ENCODING};
use http::{Extensions, HeaderMap, HeaderName, HeaderValue, Method, Uri};

use super::Refusal;
use crate::destination::Destination;
use crate::engine::attempt::Driver;
use crate::engine::attempt::job::Job;
use crate::engine::attempt::transport::{HttpClient, Transport, erase};
use crate::error::BoxError;
use crate::id::RequestId;
use crate::request::check_headers;

/// An attempt that is about to be sent, for an [`AttemptHook`](super::AttemptHook).
///
/// Method, URL and body are as they are stored: limits, breakers and the order of requests depend
/// on them. The headers can be changed, for this attempt only.
///
/// `Debug` shows no header value, and no path or query.
pub struct OutgoingAttempt {
    job: Job,
    number: u32,
    headers: HeaderMap,
    notes: Extensions,
    // `BoxCloneService` isn't `Sync`.
    transport: Mutex<Option<Transport>>,
    driver: Option<Arc<Driver>>,
}

impl OutgoingAttempt {
    pub(crate) fn new(job: &Job, number: u32, driver: Option<Arc<Driver>>) -> Self {
        Self {
            headers: job.request.headers.clone(),
            job: job.clone(),
            number,
            notes: Extensions::new(),
            transport: Mutex::new(None),
            driver,
        }
    }

    /// The id of the request. It is the same for all attempts.
    pub fn id(&self) -> RequestId {
        self.job.id
    }

    /// The number of the attempt. The first attempt of a request has number 1.
    pub fn number(&self) -> u32 {
        self.number
    }

    /// The request's channel.
    pub fn channel(&self) -> &str {
        &self.job.channel
    }

    /// Where the attempt goes: scheme, host and port, always with the port.
    pub fn destination(&self) -> String {
        self.job.destination().to_string()
    }

    /// The request's [limit key](crate::Options::limit_key).
    pub fn limit_key(&self) -> Option<&str> {
        self.job.delivery.limit_key.as_deref()
    }

    /// What the application attached to the request with
    /// [`Options::metadata`](crate::Options::metadata).
    pub fn metadata(&self) -> Option<&serde_json::Value> {
        self.job.request.options.metadata.as_ref()?.value()
    }

    /// The method.
    pub fn method(&self) -> &Method {
        &self.job.request.method
    }

    /// The URL. It may have secrets in it.
    pub fn uri(&self) -> &Uri {
        &self.job.uri
    }

    /// The body. Empty if there is none.
    pub fn body(&self) -> &[u8] {
        self.job.request.body.as_deref().unwrap_or_default()
    }

    /// The headers that are sent.
    pub fn headers(&self) -> &HeaderMap {
        &self.headers
    }

    /// The headers that are sent, to change them. A changed `Content-Length` or `Transfer-Encoding`
    /// fails the attempt, and so do more headers than a request may have.
    pub fn headers_mut(&mut self) -> &mut HeaderMap {
        &mut self.headers
    }

    /// Sets a header, in place of those of that name.
    ///
    /// # Errors
    ///
    /// If the name or the value is not valid in HTTP: a line break, for example. The error names
    /// the header and doesn't show the value.
    pub fn set_header<V>(&mut self, name: &str, value: V) -> Result<(), Refusal>
    where
        V: TryInto<HeaderValue>,
    {
        let name = HeaderName::try_from(name).map_err(|_| {
            Refusal::failed(InvalidHeader {
                part: "name",
                name: name.escape_debug().to_string(),
            })
        })?;
        let value = value.try_into().map_err(|_| InvalidHeader {
            part: "value",
            name: name.to_string(),
        })?;
        self.headers.insert(name, value);
        Ok(())
    }

    /// As [`set_header`](Self::set_header), for a value that must never be shown.
    ///
    /// # Errors
    ///
    /// As those of [`set_header`](Self::set_header).
    pub fn set_secret_header<V>(&mut self, name: &str, value: V) -> Result<(), Refusal>
    where
        V: TryInto<HeaderValue>,
    {
        self.set_header(name, value)?;
        if let Some(value) = self.headers.get_mut(name) {
            value.set_sensitive(true);
        }
        Ok(())
    }

    /// Sends this attempt with another client than the usual one: one with a TLS identity, or with
    /// a forward proxy. If several hooks choose a client, the last one counts. It is chosen also in
    /// place of a waiting caller's own client.
    ///
    /// A guard checks the URL of the attempt as always. Which addresses a name has, and redirects,
    /// it checks in the handle's own transport only.
    pub fn send_with<S: HttpClient>(&mut self, client: S) {
        *self
            .transport
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner) = Some(erase(client));
    }

    /// What hooks keep for [`AttemptHook::after`](super::AttemptHook::after). It isn't sent, and
    /// the client doesn't see it.
    pub fn notes(&self) -> &Extensions {
        &self.notes
    }

    /// As [`notes`](Self::notes), to change them.
    pub fn notes_mut(&mut self) -> &mut Extensions {
        &mut self.notes
    }

    pub(crate) fn take_transport(&mut self) -> Option<Transport> {
        self.transport
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
    }

    /// Fails if the handle's guard denies a request that a hook makes itself.
    #[cfg_attr(
        not(feature = "ssrf-guard"),
        allow(clippy::unnecessary_wraps, clippy::unused_self)
    )]
    pub(super) fn admit(&self, uri: &Uri) -> Result<(), BoxError> {
        #[cfg(feature = "ssrf-guard")]
        if let Some(guard) = self.driver.as_ref().and_then(|it| it.config.guard.as_ref()) {
            guard.admit(uri)?;
        }
        #[cfg(not(feature = "ssrf-guard"))]
        let _ = uri;
        Ok(())
    }

    /// The handle's own client, for a request that a hook makes itself.
    pub(super) fn own_transport(&self) -> Option<Transport> {
        self.driver.as_ref()?.transport.get()
    }

    /// Refuses changes of headers after which the attempt would not be the stored request.
    pub(crate) fn check(&self) -> Result<(), Refusal> {
        for name in [CONTENT_LENGTH, TRANSFER_ENCODING] {
            let stored = self.job.request.headers.get_all(&name);
            if !self.headers.get_all(&name).iter().eq(stored.iter()) {
                return Err(Refusal::failed(format!(
                    "it changed the header `{name}`, which frames the body"
                )));
            }
        }
        check_headers("headers", &self.headers).map_err(Refusal::failed)
    }
}

impl fmt::Debug for OutgoingAttempt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OutgoingAttempt")
            .field("id", &self.job.id)
            .field("number", &self.number)
            .field("channel", &self.job.channel)
            .field("destination", &Destination::of(&self.job.uri).to_string())
            .field("method", &self.job.request.method)
            .field("headers", &self.headers.keys().collect::<Vec<_>>())
            .finish_non_exhaustive()
    }
}

/// A part of a header that is not valid in HTTP.
#[derive(Debug)]
struct InvalidHeader {
    part: &'static str,
    name: String,
}

impl fmt::Display for InvalidHeader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { part, name } = self;
        write!(f, "the {part} of the header `{name}` is not valid in HTTP")
    }
}

impl StdError for InvalidHeader {}

#[cfg(test)]
pub(crate) mod tests {
    use std::time::Duration;

    use super::*;
    use crate::codec::Delivery;
    use crate::options::{Guarantee, Priority};
    use crate::request::Request;
    use crate::retry::RetryPolicy;

    /// The first attempt of a request.
    pub(crate) fn first_of(request: http::Request<&'static str>) -> OutgoingAttempt {
        let uri = request.uri().clone();
        let request = Request::try_from(request).unwrap();
        let delivery = Delivery {
            attempt_timeout: Duration::from_secs(30),
            retry: RetryPolicy::fired(),
            accept: None,
            guarantee: Guarantee::default(),
            priority: Priority::default(),
            limit_key: None,
            awaited: false,
        };
        let job = Job::new(
            RequestId::generate(),
            "default".into(),
            request,
            uri,
            delivery,
        );
        OutgoingAttempt::new(&job, 1, None)
    }

    fn attempt() -> OutgoingAttempt {
        let request = http::Request::post("https://u:hunter2@a.example/hunter3?hunter4");
        let request = request.header("x-token", "hunter5").body("hunter6");
        first_of(request.unwrap())
    }

    #[test]
    fn a_line_break_in_a_header_is_an_error_that_names_the_header() {
        let mut attempt = attempt();
        let refusal = attempt.set_header("x-token", "a\r\nhunter2: b");
        let reason = refusal.unwrap_err().reason;
        assert_eq!(
            reason,
            "the value of the header `x-token` is not valid in HTTP"
        );
        let refusal = attempt.set_secret_header("x\n", "a");
        let reason = refusal.unwrap_err().reason;
        assert_eq!(reason, "the name of the header `x\\n` is not valid in HTTP");
        attempt.set_secret_header("X-Token", "b").unwrap();
        assert!(attempt.headers()["x-token"].is_sensitive());
        assert_eq!(attempt.headers().get_all("x-token").iter().count(), 1);
    }

    #[test]
    fn headers_that_frame_the_body_stay() {
        for name in ["content-length", "transfer-encoding"] {
            let mut attempt = attempt();
            attempt.check().unwrap();
            attempt.set_header(name, "7").unwrap();
            let reason = attempt.check().unwrap_err().reason;
            assert!(reason.contains(name), "{reason}");
        }
        let mut attempt = attempt();
        attempt.set_header("a", "b".repeat(1 << 20)).unwrap();
        assert!(attempt.check().unwrap_err().reason.contains("headers"));
    }

    #[test]
    fn debug_shows_no_secret() {
        let mut attempt = attempt();
        attempt.set_header("authorization", "hunter7").unwrap();
        let shown = format!("{attempt:?}");
        assert!(!shown.contains("hunter"), "{shown}");
        assert!(shown.contains("https://a.example:443"), "{shown}");
    }
}
