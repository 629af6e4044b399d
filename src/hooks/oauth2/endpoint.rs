//! The server that gives tokens.

use std::fmt;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE};
use http::{HeaderMap, HeaderValue, Method, StatusCode, Uri};
use http_body_util::{BodyExt, Limited};
use serde::Deserialize;
use tower::ServiceExt;
use url::form_urlencoded::{Serializer, byte_serialize};

use super::super::{OutgoingAttempt, Refusal};
use super::cache::Token;
use crate::base64;
use crate::body::Body;
use crate::context;
use crate::destination::Destination;
use crate::engine::attempt::fault::is_denied;
use crate::engine::attempt::transport::{HttpClient, Transport, erase};
use crate::error::{BoxError, chain, without_url};
use crate::redirects::Unfollowed;
use crate::request::check_uri;
use crate::retry::{DEFAULT_MAX_RETRY_AFTER, retry_after};

/// How long a request for a token may take.
const TIMEOUT: Duration = Duration::from_secs(10);
/// How large its answer may be.
const MAX_ANSWER: usize = 64 * 1024;
/// For how long a token is used if the answer doesn't say how long it holds. After a 401 it is
/// forgotten anyway.
const USUAL_LIFETIME: Duration = Duration::from_secs(3600);
/// The longest time for which an answer is believed.
const MAX_LIFETIME: Duration = Duration::from_secs(24 * 3600);

/// With a feature that brings `zeroize`, its memory is overwritten when it is dropped.
#[cfg(any(feature = "encryption", feature = "webhooks"))]
type Secret = zeroize::Zeroizing<String>;
#[cfg(not(any(feature = "encryption", feature = "webhooks")))]
type Secret = String;

fn secret(text: String) -> Secret {
    #[cfg(any(feature = "encryption", feature = "webhooks"))]
    return Secret::new(text);
    #[cfg(not(any(feature = "encryption", feature = "webhooks")))]
    text
}

pub(super) struct Endpoint {
    /// Checked when the handle is built.
    url: Option<Uri>,
    id: String,
    secret: Secret,
    pub(super) scope: Option<String>,
    pub(super) audience: Option<String>,
    pub(super) in_body: bool,
    // `BoxCloneService` isn't `Sync`.
    client: Option<Mutex<Transport>>,
}

/// The answer with a token (RFC 6749 section 5.1).
#[derive(Deserialize)]
struct Granted {
    access_token: String,
    token_type: String,
    expires_in: Option<Seconds>,
}

/// Some servers send a text.
#[derive(Deserialize)]
#[serde(untagged)]
enum Seconds {
    Number(f64),
    Text(String),
}

/// The answer without one (RFC 6749 section 5.2). Its description may have secrets in it.
#[derive(Deserialize)]
struct Denied {
    error: String,
}

impl Endpoint {
    pub(super) fn new(url: &str, id: String, secret: String) -> Self {
        Self {
            url: url.parse().ok(),
            id,
            secret: self::secret(secret),
            scope: None,
            audience: None,
            in_body: false,
            client: None,
        }
    }

    pub(super) fn send_with<S: HttpClient>(&mut self, client: S) {
        self.client = Some(Mutex::new(erase(client)));
    }

    pub(super) fn check(&self) -> Result<(), BoxError> {
        let url = self.url.as_ref().ok_or("the token URL is not a URL")?;
        check_uri(url).map_err(|_| "the token URL must be absolute, with http or https")?;
        if url.authority().is_some_and(|it| it.as_str().contains('@')) {
            return Err("the token URL must not have credentials in it".into());
        }
        if self.id.is_empty() {
            return Err("the client's id must not be empty".into());
        }
        Ok(())
    }

    /// Asks for a token.
    pub(super) async fn fetch(&self, attempt: &OutgoingAttempt) -> Result<Token, Refusal> {
        match tokio::time::timeout(TIMEOUT, self.exchange(attempt)).await {
            Ok(result) => result,
            Err(_elapsed) => Err(self.failed(&format!("no full answer within {TIMEOUT:?}"))),
        }
    }

    async fn exchange(&self, attempt: &OutgoingAttempt) -> Result<Token, Refusal> {
        let url = self.url.as_ref();
        let url = url.ok_or_else(|| self.failed("its URL is not valid"))?;
        attempt.admit(url).map_err(|error| self.failed_by(error))?;
        let client = match &self.client {
            Some(client) => Some(
                client
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .clone(),
            ),
            None => attempt.own_transport(),
        };
        let client = client.ok_or_else(|| self.failed("the handle has no transport"))?;
        let mut request = self.request(url)?;
        // A handle that is a middleware of the transport lets attempts pass, and persists others.
        let (id, number) = (attempt.id(), attempt.number());
        context::attach(
            request.extensions_mut(),
            id,
            &attempt.channel().into(),
            number,
        );
        // Its body may hold the client's secret, and the answer's token is the server's word.
        request.extensions_mut().insert(Unfollowed);
        let sent = client.oneshot(request).await;
        let (head, body) = sent.map_err(|error| self.failed_by(error))?.into_parts();
        let collected = Limited::new(body, MAX_ANSWER).collect().await;
        let body = collected.map_err(|error| self.failed_by(error))?.to_bytes();
        self.token(head.status, &head.headers, &body)
    }

    fn request(&self, url: &Uri) -> Result<http::Request<Body>, Refusal> {
        let mut form = Serializer::new(String::new());
        form.append_pair("grant_type", "client_credentials");
        for (name, value) in [("scope", &self.scope), ("audience", &self.audience)] {
            if let Some(value) = value {
                form.append_pair(name, value);
            }
        }
        if self.in_body {
            form.append_pair("client_id", &self.id);
            form.append_pair("client_secret", &self.secret);
        }
        let body = Body::buffered(Some(Bytes::from(form.finish())), None);
        let mut request = http::Request::new(body);
        *request.method_mut() = Method::POST;
        *request.uri_mut() = url.clone();
        let form = HeaderValue::from_static("application/x-www-form-urlencoded");
        let headers = request.headers_mut();
        headers.insert(CONTENT_TYPE, form);
        headers.insert(ACCEPT, HeaderValue::from_static("application/json"));
        if !self.in_body {
            headers.insert(AUTHORIZATION, self.basic()?);
        }
        Ok(request)
    }

    /// RFC 6749 section 2.3.1: both parts are encoded as in a form first.
    fn basic(&self) -> Result<HeaderValue, Refusal> {
        let encoded = |text: &str| byte_serialize(text.as_bytes()).collect::<String>();
        let both = format!("{}:{}", encoded(&self.id), encoded(&self.secret));
        let both = secret(both);
        let basic = format!("Basic {}", base64::encode(both.as_bytes()));
        let mut basic = HeaderValue::try_from(basic)
            .map_err(|_| self.failed("the client's credentials are too long"))?;
        basic.set_sensitive(true);
        Ok(basic)
    }

    fn token(
        &self,
        status: StatusCode,
        headers: &HeaderMap,
        body: &[u8],
    ) -> Result<Token, Refusal> {
        if !status.is_success() {
            let error = serde_json::from_slice::<Denied>(body).ok();
            let error = error.map(|denied| denied.error).filter(|it| is_code(it));
            let code = error.map_or_else(String::new, |code| format!(" and `{code}`"));
            let failed = self.failed(&format!("it answered with {status}{code}"));
            return Err(match retry_after(headers, SystemTime::now()) {
                Some(delay) => {
                    Refusal::retry_after(delay.min(DEFAULT_MAX_RETRY_AFTER), failed.reason)
                }
                None => failed,
            });
        }
        // The text of serde's error may show a part of the token.
        let granted: Granted = serde_json::from_slice(body)
            .map_err(|_| self.failed("its answer is not the JSON of a token"))?;
        if !granted.token_type.eq_ignore_ascii_case("bearer") {
            return Err(self.failed("its token is not of the type `Bearer`"));
        }
        let header = HeaderValue::try_from(format!("Bearer {}", granted.access_token))
            .map_err(|_| self.failed("its token is not valid in a header"))?;
        let lifetime = granted.expires_in.and_then(|seconds| match seconds {
            Seconds::Number(number) => Duration::try_from_secs_f64(number).ok(),
            Seconds::Text(text) => text.parse().ok().map(Duration::from_secs),
        });
        let lifetime = lifetime.unwrap_or(USUAL_LIFETIME).min(MAX_LIFETIME);
        Ok(Token::new(header, lifetime))
    }

    fn failed(&self, reason: &str) -> Refusal {
        let url = self.url.as_ref();
        let from = url.map_or_else(String::new, |url| format!(" from {}", Destination::of(url)));
        Refusal::failed(format!("no token{from}: {reason}"))
    }

    /// What the guard denies is denied again at each attempt, so the request is given up.
    fn failed_by(&self, error: BoxError) -> Refusal {
        let is_denied = is_denied(&*error);
        let failed = self.failed(&chain(&*without_url(error)));
        if is_denied {
            Refusal::discard(failed.reason)
        } else {
            failed
        }
    }
}

/// Whether a text can be one of the codes of RFC 6749. Anything else may be a secret.
fn is_code(text: &str) -> bool {
    (1..=40).contains(&text.len())
        && text
            .bytes()
            .all(|byte| byte.is_ascii_lowercase() || byte == b'_')
}

impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let origin = self
            .url
            .as_ref()
            .map(|url| Destination::of(url).to_string());
        f.debug_struct("Endpoint")
            .field("origin", &origin)
            .field("id", &self.id)
            .field("scope", &self.scope)
            .field("audience", &self.audience)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::Then;
    use super::*;

    fn endpoint() -> Endpoint {
        Endpoint::new(
            "https://login.example/t?hunter2",
            "a:b".into(),
            "hunter3 %".into(),
        )
    }

    fn answered(status: u16, body: &str) -> Result<Token, Refusal> {
        let status = StatusCode::from_u16(status).unwrap();
        endpoint().token(status, &HeaderMap::new(), body.as_bytes())
    }

    #[test]
    fn the_id_and_the_secret_are_encoded_first() {
        let basic = endpoint().basic().ok().unwrap();
        let expected = base64::encode(b"a%3Ab:hunter3+%25");
        assert_eq!(basic, format!("Basic {expected}"));
        assert!(basic.is_sensitive());
    }

    #[test]
    fn what_is_no_token_is_an_error_without_secrets() {
        for (status, body, expected) in [
            (401, r#"{"error":"invalid_client"}"#, "invalid_client"),
            (401, r#"{"error":"Hunter4!"}"#, "401"),
            (200, "hunter4", "JSON"),
            (200, r#"{"access_token":"hunter4"}"#, "JSON"),
            (
                200,
                r#"{"access_token":"hunter4","token_type":"mac"}"#,
                "type",
            ),
            (
                200,
                r#"{"access_token":"hunter4\n","token_type":"bearer"}"#,
                "header",
            ),
            (302, "", "302"),
        ] {
            let reason = answered(status, body).err().unwrap().reason;
            assert!(reason.contains(expected), "{reason}");
            assert!(!reason.to_lowercase().contains("hunter"), "{reason}");
        }
    }

    #[test]
    fn a_delay_that_the_server_asks_for_is_at_most_that_of_a_receiver() {
        for (asked, delay) in [("60", 60), ("99999999", 3600)] {
            let mut headers = HeaderMap::new();
            headers.insert("retry-after", HeaderValue::from_static(asked));
            let refusal = endpoint().token(StatusCode::TOO_MANY_REQUESTS, &headers, b"");
            let then = refusal.err().unwrap().then;
            assert_eq!(then, Then::Retry(Duration::from_secs(delay)), "{asked}");
        }
    }

    #[test]
    fn any_lifetime_is_read() {
        for lifetime in [
            "",
            r#","expires_in":60"#,
            r#","expires_in":"60""#,
            r#","expires_in":-1"#,
        ] {
            let body = format!(r#"{{"access_token":"a","token_type":"Bearer"{lifetime}}}"#);
            assert_eq!(answered(200, &body).ok().unwrap().header(), "Bearer a");
        }
        let body = r#"{"access_token":"a","token_type":"bearer","expires_in":1e300}"#;
        assert!(answered(200, body).is_ok());
    }

    #[test]
    fn settings_that_can_not_work_are_refused() {
        let check = |url, id: &str| Endpoint::new(url, id.into(), String::new()).check();
        assert!(check("https://login.example/token", "a").is_ok());
        for url in [
            "",
            "/token",
            "ftp://login.example",
            "https://u:p@login.example",
            "a b",
        ] {
            assert!(check(url, "a").is_err(), "{url}");
        }
        assert!(check("https://login.example", "").is_err());
    }

    #[cfg(any(feature = "encryption", feature = "webhooks"))]
    #[test]
    fn the_secret_is_overwritten_when_it_is_dropped() {
        fn overwrites<T: zeroize::ZeroizeOnDrop>(_: &T) {}
        overwrites(&endpoint().secret);
    }

    #[test]
    fn debug_shows_no_secret() {
        let shown = format!("{:?}", endpoint());
        assert!(!shown.contains("hunter"), "{shown}");
        assert!(shown.contains("https://login.example:443"), "{shown}");
    }
}
