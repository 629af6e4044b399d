//! Sending one attempt, and reading its response.
//!
//! Both happen within the attempt's timeout. No database connection is held meanwhile.

use std::error::Error as StdError;
use std::fmt;
use std::future::poll_fn;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant, SystemTime};

use http::{HeaderMap, HeaderName, StatusCode, Uri};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use tower::{Service, ServiceExt};

use super::Driver;
use super::fault::{class_of, is_after_redirect, is_of_proxy};
use super::job::Job;
use super::transport::{ResponseUrl, Transport};
use crate::body::{Body, BodyError};
use crate::classify::{FailureClass, Verdict};
use crate::context;
use crate::engine::config::Config;
use crate::error::{BoxError, chain, without_url};
use crate::hooks::Then;
use crate::outcome::{Cause, Fault, Outcome};
use crate::redact::{error_text, mark_secrets, redact_urls, shorten};
use crate::response::Response;
use crate::retry::retry_after;
use crate::runtime::{BoxFuture, caught};
use crate::status::Status;
use crate::trace_context::{AttemptSpan, Received, Sending};

/// A client that can send a request.
pub(crate) trait Sender: Send {
    /// Whether the client can send. Nothing is sent before it is ready.
    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Ok(()))
    }

    /// The attempt timed out before the client was ready.
    fn give_up(&mut self) {}

    fn send(
        &mut self,
        request: http::Request<Body>,
    ) -> BoxFuture<'_, Result<http::Response<Body>, BoxError>>;

    /// Reading the response failed. A sender that keeps the error for its caller returns a
    /// [`KeptByCaller`] for it.
    fn keep(&mut self, error: BoxError) -> BoxError {
        error
    }

    /// Whether it is the crate's own client, which makes no spans.
    fn is_own(&self) -> bool {
        false
    }

    /// How long after the attempt's timeout the client reports its own, if it has one.
    fn timeout_margin(&self) -> Duration {
        Duration::ZERO
    }
}

/// A client that belongs to the engine.
pub(super) struct ByEngine {
    transport: Transport,
    /// A service may only be called on the instance that was ready, so each attempt polls and calls
    /// one clone.
    ready: Option<Transport>,
    is_own: bool,
}

impl ByEngine {
    pub(super) fn new(transport: Transport, is_own: bool) -> Self {
        Self {
            transport,
            ready: None,
            is_own,
        }
    }
}

impl Sender for ByEngine {
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        let ready = self.ready.get_or_insert_with(|| self.transport.clone());
        ready.poll_ready(cx)
    }

    fn give_up(&mut self) {
        // The clone may be in a queue, and would be given a place that others wait for.
        self.ready = None;
    }

    fn send(
        &mut self,
        request: http::Request<Body>,
    ) -> BoxFuture<'_, Result<http::Response<Body>, BoxError>> {
        match self.ready.take() {
            Some(mut ready) => ready.call(request),
            None => Box::pin(self.transport.clone().oneshot(request)),
        }
    }

    fn is_own(&self) -> bool {
        self.is_own
    }
}

/// What an attempt brought.
pub(super) struct Exchange {
    pub(super) duration: Duration,
    pub(super) result: Result<Answer, Failed>,
    /// What a hook says of it, whatever the classifier would.
    pub(super) decided: Option<Verdict>,
}

/// Why an attempt brought no response.
#[derive(Debug)]
pub(crate) struct Failed {
    pub(super) class: FailureClass,
    /// A forward proxy is to blame.
    pub(super) is_of_proxy: bool,
    /// The receiver has answered with a redirect, and the request after it failed.
    is_after_redirect: bool,
    /// What the hook wants that refused the attempt.
    pub(super) then: Then,
    text: String,
    cause: Option<Cause>,
}

impl Failed {
    pub(super) fn new(class: FailureClass, text: &str) -> Self {
        Self {
            class,
            is_of_proxy: false,
            is_after_redirect: false,
            then: Then::Judge,
            text: error_text(text),
            cause: None,
        }
    }

    fn with(error: BoxError) -> Self {
        let error = match unwrapped(error).downcast::<KeptByCaller>() {
            Ok(kept) => return kept.0,
            Err(error) => error,
        };
        // Clients put URLs into their errors, also those of redirects, with the secrets in them.
        let error = without_url(error);
        let shown = chain(&*error);
        let failed = Self::new(class_of(&*error), &shown);
        // What the error prints in full may be more than its text.
        let is_safe = [shown, format!("{error:?}")]
            .iter()
            .all(|shown| redact_urls(shown) == *shown);
        let is_of_proxy = is_of_proxy(&*error);
        let is_after_redirect = is_after_redirect(&*error);
        let cause: Arc<dyn StdError + Send + Sync> = if is_safe {
            Arc::from(error)
        } else {
            // Only the text of it is safe to hand out.
            Arc::new(Redacted(failed.text.clone()))
        };
        Self {
            is_of_proxy,
            is_after_redirect,
            cause: Some(Cause::Error(cause)),
            ..failed
        }
    }

    /// Whether the request may have reached the receiver.
    pub(super) fn may_have_been_sent(&self) -> bool {
        self.class.may_have_been_sent() || self.is_after_redirect
    }

    /// As the failure of an attempt whose response has begun.
    fn after_head(mut self) -> Self {
        if self.class == FailureClass::Reset {
            self.class = FailureClass::Incomplete;
        }
        self
    }

    /// Adds to the text.
    pub(super) fn note(&mut self, note: &str) {
        self.text = format!("{}; {note}", self.text);
        shorten(&mut self.text);
    }

    pub(super) fn into_text(self) -> String {
        self.text
    }

    pub(super) fn into_fault(self) -> Fault {
        Fault {
            cause: self.cause,
            ..Fault::new(self.class.as_str(), self.text)
        }
    }
}

/// Stands for an error with a secret in it.
#[derive(Debug)]
struct Redacted(String);

impl fmt::Display for Redacted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl StdError for Redacted {}

/// Stands for the error of a caller's own stack, which the caller keeps.
#[derive(Debug)]
pub(crate) struct KeptByCaller(Failed);

impl KeptByCaller {
    #[cfg(feature = "reqwest-middleware")]
    pub(crate) fn of(error: &(dyn StdError + 'static)) -> Self {
        Self(Failed {
            is_of_proxy: is_of_proxy(error),
            is_after_redirect: is_after_redirect(error),
            cause: Some(Cause::WithCaller),
            ..Failed::new(class_of(error), &chain(error))
        })
    }
}

impl fmt::Display for KeptByCaller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.text)
    }
}

impl StdError for KeptByCaller {}

pub(super) enum Answer {
    Whole(Response),
    /// The body is over the limit and was not kept.
    TooLarge(Response),
}

impl Answer {
    pub(super) fn response(&self) -> &Response {
        match self {
            Self::Whole(response) | Self::TooLarge(response) => response,
        }
    }

    pub(super) fn into_outcome(self, status: Status, limit: usize) -> Outcome {
        match self {
            Self::Whole(response) => Outcome::answered(status, response),
            Self::TooLarge(response) => Outcome::too_large(status, response, limit),
        }
    }

    /// The response for the caller, in case no better one comes. Without its body it would look
    /// like a different response.
    pub(super) fn into_whole(self) -> Option<Response> {
        match self {
            Self::Whole(response) => Some(response),
            Self::TooLarge(_) => None,
        }
    }
}

impl Exchange {
    /// An attempt that a hook did not let pass.
    pub(super) fn failed(duration: Duration, failed: Failed) -> Self {
        Self {
            duration,
            decided: match failed.then {
                Then::Judge => None,
                Then::Retry(_) => Some(Verdict::Retry),
                Then::Discard => Some(Verdict::Discard),
            },
            result: Err(failed),
        }
    }

    /// What a classifier sees.
    pub(super) fn seen(&self) -> Result<(StatusCode, &HeaderMap), FailureClass> {
        match &self.result {
            Ok(answer) => Ok((answer.response().status, &answer.response().headers)),
            Err(failed) => Err(failed.class),
        }
    }

    /// What a classifier sees, without the headers.
    pub(super) fn seen_status(&self) -> Result<StatusCode, FailureClass> {
        self.seen().map(|(status, _)| status)
    }

    /// The delay that a hook asked for.
    pub(super) fn delay_of_hook(&self) -> Option<Duration> {
        match self.result.as_ref().err()?.then {
            Then::Retry(delay) => Some(delay),
            Then::Judge | Then::Discard => None,
        }
    }

    /// The delay that the response asked for.
    pub(super) fn asked_delay(&self) -> Option<Duration> {
        let answer = self.result.as_ref().ok()?;
        retry_after(&answer.response().headers, SystemTime::now())
    }
}

/// Makes the attempt with this number: sends the request and reads its response, within the
/// attempt's timeout. `headers` are sent instead of the stored ones. The `span` adds its own.
pub(super) async fn exchange(
    job: &Job,
    number: u32,
    headers: Option<&HeaderMap>,
    span: Option<&dyn AttemptSpan>,
    sender: &mut dyn Sender,
    driver: &Driver,
) -> Exchange {
    let config = &driver.config;
    let max_response_body = driver.store.config().max_response_body;
    let began = Instant::now();
    let mut called = false;
    let margin = sender.timeout_margin();
    let timeout = job.delivery.attempt_timeout;
    let mut result = {
        let exchange = pin!(async {
            let mut request = to_http(job, number, headers);
            admit(config, request.uri())?;
            poll_fn(|cx| sender.poll_ready(cx))
                .await
                .map_err(Failed::with)?;
            called = true;
            if let Some(span) = span {
                begin_sending(span, &mut request, sender.is_own());
            }
            let response = sender.send(request).await.map_err(Failed::with)?;
            let answer = read(job, response, &config.redact_headers, max_response_body).await;
            answer.map_err(|error| Failed::with(sender.keep(unwrapped(error))).after_head())
        });
        match tokio::time::timeout(timeout + margin, caught(exchange)).await {
            Ok(Ok(result)) => result,
            Ok(Err(panic)) => Err(Failed::new(
                FailureClass::Other,
                &format!("the client panicked: {panic}"),
            )),
            Err(_elapsed) => Err(Failed::new(
                FailureClass::Timeout,
                &format!("no full response within {timeout:?}"),
            )),
        }
    };
    if let (false, Err(failed)) = (called, &mut result) {
        sender.give_up();
        // Whatever the error looks like, nothing has been sent.
        if failed.class.may_have_been_sent() {
            failed.class = FailureClass::NotReady;
        }
    }
    if let (true, Some(span)) = (called, span) {
        end_sending(span, &result);
    }
    Exchange {
        duration: began.elapsed(),
        result,
        decided: None,
    }
}

fn begin_sending(span: &dyn AttemptSpan, request: &mut http::Request<Body>, by_own_client: bool) {
    let mut headers = std::mem::take(request.headers_mut());
    span.begin_sending(Sending {
        method: request.method(),
        uri: request.uri(),
        headers: &mut headers,
        by_own_client,
    });
    *request.headers_mut() = headers;
}

fn end_sending(span: &dyn AttemptSpan, result: &Result<Answer, Failed>) {
    span.end_sending(match result {
        Ok(answer) => {
            let response = answer.response();
            Received::Response(response.status, response.version)
        }
        Err(failed) => Received::Failure(failed.class, &failed.text),
    });
}

/// Fails the attempt if the guard denies where it goes.
#[cfg_attr(not(feature = "ssrf-guard"), allow(clippy::unnecessary_wraps))]
fn admit(config: &Config, uri: &Uri) -> Result<(), Failed> {
    #[cfg(feature = "ssrf-guard")]
    if let Some(guard) = &config.guard {
        let admitted = guard.admit(uri);
        admitted.map_err(|denied| Failed::with(denied.into()))?;
    }
    #[cfg(not(feature = "ssrf-guard"))]
    let _ = (config, uri);
    Ok(())
}

/// The request for one attempt.
fn to_http(job: &Job, number: u32, headers: Option<&HeaderMap>) -> http::Request<Body> {
    let headers = headers.unwrap_or(&job.request.headers);
    let mut request = job.request.to_http(job.uri.clone(), headers.clone());
    let extensions = request.extensions_mut();
    *extensions = job.extensions.clone();
    context::attach(extensions, job.id, &job.channel, number);
    request
}

/// Reads a response up to the limit, and leaves the rest of a larger body unread.
async fn read(
    job: &Job,
    response: http::Response<Body>,
    secret_headers: &[HeaderName],
    limit: usize,
) -> Result<Answer, BoxError> {
    let (mut parts, body) = response.into_parts();
    mark_secrets(&mut parts.headers, secret_headers);
    let url = parts.extensions.remove::<ResponseUrl>().map(|url| url.0);
    let collected = Limited::new(body, limit).collect().await;
    let (body, trailers, whole) = match collected {
        Ok(collected) => {
            let mut trailers = collected.trailers().cloned();
            if let Some(trailers) = &mut trailers {
                mark_secrets(trailers, secret_headers);
            }
            (collected.to_bytes(), trailers, true)
        }
        Err(error) if error.is::<LengthLimitError>() => Default::default(),
        Err(error) => return Err(error),
    };
    let response = Response {
        id: job.id,
        status: parts.status,
        version: parts.version,
        headers: parts.headers,
        body,
        trailers,
        url,
        extensions: parts.extensions,
    };
    Ok(if whole {
        Answer::Whole(response)
    } else {
        Answer::TooLarge(response)
    })
}

/// The client's error, without the crate's own around it.
fn unwrapped(mut error: BoxError) -> BoxError {
    loop {
        match error
            .downcast::<BodyError>()
            .map(|error| error.into_read_error())
        {
            Ok(Ok(inner)) => error = inner,
            Ok(Err(error)) => return error.into(),
            Err(other) => return other,
        }
    }
}
