//! One attempt after another, until the request has ended or somebody else goes on with it.
//!
//! An attempt reads from top to bottom: [`make`] sends and reads within the attempt's time, [`Judged::judge`] decides what its
//! result means, the claim settles it. No database connection is held while it is sent.

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant, SystemTime};

use http::{HeaderMap, StatusCode};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use tower::{Service, ServiceExt};

use crate::body::Body;
use crate::classify::{Attempt, FailureClass, Verdict};
use crate::engine::fault::class_of;
use crate::engine::job::Job;
use crate::engine::runner::claim::Claim;
use crate::engine::transport::{ResponseUrl, Transport};
use crate::error::{BoxError, chain, without_url};
use crate::outcome::Outcome;
use crate::redact::redact_urls;
use crate::response::Response;
use crate::retry::retry_after;
use crate::status::Status;
use crate::store::BoxFuture;
use crate::store::settle::Failure;

/// A longer wait is not spent holding the claim: the request goes back into the queue.
const MAX_HOLD: Duration = Duration::from_secs(60);

/// Transmits one attempt.
pub(crate) trait Sender: Send {
    /// Whether it can send. Nothing has been sent before it is ready.
    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Ok(()))
    }

    /// It is not waited for any more.
    fn give_up(&mut self) {}

    fn send(
        &mut self,
        request: http::Request<Body>,
    ) -> BoxFuture<'_, Result<http::Response<Body>, BoxError>>;
}

/// Sends with a client that belongs to the engine.
struct ByEngine {
    transport: Transport,
    /// A service may only be called where it was ready: each attempt has a clone that is waited for and called.
    ready: Option<Transport>,
}

impl Sender for ByEngine {
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        let ready = self.ready.get_or_insert_with(|| self.transport.clone());
        ready.poll_ready(cx)
    }

    fn give_up(&mut self) {
        // It may be in a queue, and be given a place there that others wait for.
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

/// As [`drive`], with a client that belongs to the engine, and until a shutdown has no more time for it.
#[allow(clippy::manual_async_fn, reason = "as `drive`")]
pub(crate) fn drive_by_engine(
    claim: Claim,
    transport: Transport,
) -> impl Future<Output = ()> + Send {
    async move {
        let engine = Arc::clone(claim.engine());
        let mut sender = ByEngine {
            transport,
            ready: None,
        };
        // Pinned here, or it would take its room twice.
        let mut driven = pin!(drive(claim, &mut sender));
        tokio::select! {
            () = &mut driven => {}
            () = engine.stopping() => {}
        }
    }
}

/// Makes attempts until the request has ended or is back in the queue.
#[allow(
    clippy::manual_async_fn,
    reason = "an `async fn` keeps room for its arguments twice, and there is one of these for each request under way"
)]
pub(crate) fn drive(
    mut claim: Claim,
    sender: &mut dyn Sender,
) -> impl Future<Output = ()> + Send + '_ {
    async move {
        loop {
            if !claim.begin().await {
                return;
            }
            let max_response_body = claim.engine().config().max_response_body;
            let made = make(claim.job(), sender, max_response_body).await;
            match Judged::judge(made, &claim) {
                Judged::Ended(outcome) => return claim.finish(outcome),
                Judged::Again { delay, failure } => {
                    // Boxed, so that a task whose first attempt is answered doesn't take the room for it.
                    match Box::pin(again(claim, delay, failure)).await {
                        Some(held) => claim = held,
                        None => return,
                    }
                }
            }
        }
    }
}

/// Returns when the next attempt is due, if it is made here.
async fn again(claim: Claim, delay: Duration, failure: Failure) -> Option<Claim> {
    if delay > MAX_HOLD || !claim.is_awaited() {
        claim.put_back(delay, failure);
        return None;
    }
    let held = claim.hold(delay, failure).await?;
    held.wait().await.then_some(held)
}

/// What a transmission brought.
struct Made {
    took: Duration,
    result: Result<Answer, (FailureClass, String)>,
}

enum Answer {
    Whole(Response),
    /// The body is over the limit and was not kept.
    TooLarge(Response),
}

impl Answer {
    fn response(&self) -> &Response {
        match self {
            Self::Whole(response) | Self::TooLarge(response) => response,
        }
    }

    fn into_outcome(self, status: Status, limit: usize) -> Outcome {
        match self {
            Self::Whole(response) => Outcome::answered(status, response),
            Self::TooLarge(response) => Outcome::too_large(status, response, limit),
        }
    }

    /// For the caller, in case no better one comes: without its body it would pass for another response.
    fn into_whole(self) -> Option<Response> {
        match self {
            Self::Whole(response) => Some(response),
            Self::TooLarge(_) => None,
        }
    }
}

/// The request for one attempt.
fn transmission(job: &Job) -> http::Request<Body> {
    let mut request = job.request.to_http(job.uri.clone());
    *request.extensions_mut() = job.extensions.clone();
    request
}

async fn make(job: &Job, sender: &mut dyn Sender, max_response_body: usize) -> Made {
    let began = Instant::now();
    let mut called = false;
    let exchange = async {
        poll_fn(|cx| sender.poll_ready(cx)).await.map_err(failed)?;
        called = true;
        let response = sender.send(transmission(job)).await.map_err(failed)?;
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
    Made {
        took: began.elapsed(),
        result,
    }
}

/// Reads a response up to the limit; what is over it is not read.
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
    let class = class_of(&*error);
    // Clients put URLs into their errors, those of redirects too, with the secrets in them.
    let text = redact_urls(&chain(&*without_url(error)));
    // The database's text holds no NUL.
    (class, text.replace('\0', "\u{fffd}"))
}

/// What an attempt's result means for its request.
enum Judged {
    Ended(Outcome),
    Again { delay: Duration, failure: Failure },
}

impl Judged {
    fn judge(made: Made, claim: &Claim) -> Self {
        let job = claim.job();
        let config = claim.engine().config();
        let attempt = Attempt::new(&job.request.method, claim.attempts(), made.seen());
        let verdict = config
            .classifier
            .judge(job.delivery.accept.as_deref(), &attempt);
        let delay = match verdict {
            Verdict::Retry => claim.next_delay(made.asked_delay()),
            Verdict::Final | Verdict::Discard => None,
        };
        match (delay, made.result) {
            // Whatever the verdict: nobody can tell whether it arrived.
            (_, Err((class, text))) if claim.is_once() && class.may_have_been_sent() => {
                Self::Ended(Outcome::ambiguous(job.id, class.as_str(), text))
            }
            (Some(delay), result) => Self::Again {
                delay,
                failure: failure(made.took, result),
            },
            (None, Ok(answer)) => {
                let status = match verdict {
                    Verdict::Final => Status::Completed,
                    Verdict::Retry | Verdict::Discard => Status::Discarded,
                };
                Self::Ended(answer.into_outcome(status, config.max_response_body))
            }
            (None, Err((class, text))) => {
                Self::Ended(Outcome::discarded(job.id, class.as_str(), text))
            }
        }
    }
}

impl Made {
    /// What a classifier sees of it.
    fn seen(&self) -> Result<(StatusCode, &HeaderMap), FailureClass> {
        match &self.result {
            Ok(answer) => Ok((answer.response().status, &answer.response().headers)),
            Err((class, _)) => Err(*class),
        }
    }

    fn asked_delay(&self) -> Option<Duration> {
        let answer = self.result.as_ref().ok()?;
        retry_after(&answer.response().headers, SystemTime::now())
    }
}

/// A failed attempt, for the record.
fn failure(duration: Duration, result: Result<Answer, (FailureClass, String)>) -> Failure {
    match result {
        Ok(answer) => Failure {
            class: FailureClass::Status,
            text: format!("answered with {}", answer.response().status),
            duration,
            response: answer.into_whole(),
        },
        Err((class, text)) => Failure {
            class,
            text,
            duration,
            response: None,
        },
    }
}
