//! Sending one attempt, and reading its response.
//!
//! Both happen within the attempt's timeout. No database connection is held meanwhile.

use std::future::poll_fn;
use std::task::{Context, Poll};
use std::time::{Duration, Instant, SystemTime};

use http::{HeaderMap, StatusCode};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use tower::{Service, ServiceExt};

use super::fault::class_of;
use super::job::Job;
use super::transport::{ResponseUrl, Transport};
use crate::body::{Body, BodyError};
use crate::classify::FailureClass;
use crate::error::{BoxError, chain, without_url};
use crate::outcome::Outcome;
use crate::redact::redact_urls;
use crate::response::Response;
use crate::retry::retry_after;
use crate::runtime::BoxFuture;
use crate::status::Status;

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
}

/// A client that belongs to the engine.
pub(super) struct ByEngine {
    transport: Transport,
    /// A service may only be called on the instance that was ready, so each attempt polls and calls
    /// one clone.
    ready: Option<Transport>,
}

impl ByEngine {
    pub(super) fn new(transport: Transport) -> Self {
        Self {
            transport,
            ready: None,
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
}

/// What an attempt brought.
pub(super) struct Exchange {
    pub(super) duration: Duration,
    pub(super) result: Result<Answer, (FailureClass, String)>,
}

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
    /// What a classifier sees.
    pub(super) fn seen(&self) -> Result<(StatusCode, &HeaderMap), FailureClass> {
        match &self.result {
            Ok(answer) => Ok((answer.response().status, &answer.response().headers)),
            Err((class, _)) => Err(*class),
        }
    }

    /// The delay that the response asked for.
    pub(super) fn asked_delay(&self) -> Option<Duration> {
        let answer = self.result.as_ref().ok()?;
        retry_after(&answer.response().headers, SystemTime::now())
    }
}

/// Sends a request and reads its response, within the attempt's timeout.
pub(super) async fn exchange(
    job: &Job,
    sender: &mut dyn Sender,
    max_response_body: usize,
) -> Exchange {
    let began = Instant::now();
    let mut called = false;
    let exchange = async {
        poll_fn(|cx| sender.poll_ready(cx)).await.map_err(failed)?;
        called = true;
        let response = sender.send(to_http(job)).await.map_err(failed)?;
        read(job, response, max_response_body).await
    };
    let timeout = job.delivery.attempt_timeout;
    let mut result = tokio::time::timeout(timeout, exchange)
        .await
        .unwrap_or_else(|_elapsed| {
            Err((
                FailureClass::Timeout,
                format!("no full response within {timeout:?}"),
            ))
        });
    if let (false, Err((class, _))) = (called, &mut result) {
        sender.give_up();
        // Whatever the error looks like, nothing has been sent.
        if class.may_have_been_sent() {
            *class = FailureClass::NotReady;
        }
    }
    Exchange {
        duration: began.elapsed(),
        result,
    }
}

/// The request for one attempt.
fn to_http(job: &Job) -> http::Request<Body> {
    let mut request = job.request.to_http(job.uri.clone());
    *request.extensions_mut() = job.extensions.clone();
    request
}

/// Reads a response up to the limit, and leaves the rest of a larger body unread.
async fn read(
    job: &Job,
    response: http::Response<Body>,
    limit: usize,
) -> Result<Answer, (FailureClass, String)> {
    let (mut parts, body) = response.into_parts();
    let url = parts.extensions.remove::<ResponseUrl>().map(|url| url.0);
    let collected = Limited::new(body, limit).collect().await;
    let (body, trailers, whole) = match collected {
        Ok(collected) => {
            let trailers = collected.trailers().cloned();
            (collected.to_bytes(), trailers, true)
        }
        Err(error) if error.is::<LengthLimitError>() => Default::default(),
        Err(error) => return Err(failed(error)),
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

fn failed(error: BoxError) -> (FailureClass, String) {
    let error = unwrapped(error);
    let class = class_of(&*error);
    // Clients put URLs into their errors, also those of redirects, with the secrets in them.
    let text = redact_urls(&chain(&*without_url(error)));
    // Postgres stores no NUL in text.
    (class, text.replace('\0', "\u{fffd}"))
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
