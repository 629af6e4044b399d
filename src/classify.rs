//! What the result of an attempt means for its request.
//!
//! # Defaults
//!
//! A response is final unless its status asks for a repetition: 408 (RFC 9110 section 15.5.9), 421,
//! 425 (RFC 8470 section 5.2), 429 (RFC 6585 section 4) and all of 5xx. An attempt without a
//! response, which has a [`FailureClass`], is retried.
//!
//! **Not processed.** 408, 421 (RFC 9110 section 15.5.20), 425, 429 and 503 (section 15.6.4) say
//! that the request was not processed, and so do HTTP/2's `REFUSED_STREAM` and a GOAWAY without an
//! error for a stream that it leaves out (RFC 9113 section 8.7), which are
//! [`FailureClass::Refused`]. After these, an at-most-once request is sent again, too. Any other
//! 5xx leaves open what happened: a 500 may come after half of the work, a gateway's 502 or 504
//! after the receiver got the request. An at-most-once request then ends as ambiguous.
//!
//! **In progress.** A repetition that carries an idempotency key can overtake its own first
//! transmission, and is then told so with 409, as the IETF draft for the header asks, or with 425.
//! So a 409 is retried, up to [`MAX_IN_PROGRESS_ANSWERS`] times, if an earlier attempt left open
//! what happened: it timed out, its connection broke, its process died, or a gateway answered for
//! the receiver. Any other 409 is final.
//!
//! A receiver that answers with something that is no complete response ([`FailureClass::Protocol`],
//! [`FailureClass::Incomplete`]) has probably acted, and answers the same again. The request is
//! discarded after [`MAX_BROKEN_ANSWERS`] of them.
//!
//! A final response completes an awaited request, whatever its status: the caller gets it. A fired
//! request is completed by 2xx only. No caller would see a final 401, 404 or 301, so such a request
//! is discarded, and its dead letter keeps the request and the response.
//!
//! # Per request
//!
//! [`Options::accept`](crate::Options::accept) lists the responses that end one request. All other
//! responses are then retried. For responses, the list takes precedence over everything else here.
//!
//! # Classifiers
//!
//! [`DurableBuilder::classify`](crate::DurableBuilder::classify) sets a [`Classify`] for a handle,
//! which replaces the defaults. A classifier is code and is not stored with the request: the
//! process that makes the attempt calls its own classifier. So all handles that deliver a channel
//! should have the same classifier.
//!
//! An attempt without a known result is not classified. If the process that made the attempt died,
//! or the caller that made it went away, the request is retried within the policy. With
//! [`Guarantee::AtMostOnce`] it ends as ambiguous instead.
//!
//! # When not to retry
//!
//! An answer that says that the same request can never succeed is final: retrying a 401 or a 422
//! only keeps the receiver busy. To give a request up at once, as discarded rather than completed,
//! return [`Verdict::Discard`]. [`Verdict::Final`] completes it, also a fired one.
//!
//! # Examples
//!
//! ```
//! use requeuest::classify::{FailureClass, Verdict, classify_fn};
//! use requeuest::{Durable, StatusCode};
//!
//! # fn example(pool: sqlx::PgPool) -> Result<(), requeuest::Error> {
//! let durable = Durable::builder(pool)
//!     .classify(classify_fn(|attempt| match attempt.result() {
//!         // This receiver answers 404 until it has caught up.
//!         Ok((StatusCode::NOT_FOUND, _)) if attempt.number() < 5 => Verdict::Retry,
//!         // A name that doesn't resolve is a typo here.
//!         Err(FailureClass::Dns) => Verdict::Discard,
//!         _ => attempt.default_verdict(),
//!     }))
//!     .build()?;
//! # Ok(()) }
//! ```

use std::fmt;
use std::ops::RangeInclusive;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::str::FromStr;
use std::sync::Arc;

use http::{HeaderMap, Method, StatusCode};
use serde::{Deserialize, Serialize};

use crate::error::ParseNameError;
use crate::options::Guarantee;
use crate::redact::panic_text;

/// After how many answers that are no complete response a request is discarded: ten. A classifier
/// can decide otherwise.
pub const MAX_BROKEN_ANSWERS: u32 = 10;

/// How many answers that an earlier transmission is still in progress are retried: eight. With the
/// default policy that takes about two minutes. The next one is the final response.
pub const MAX_IN_PROGRESS_ANSWERS: u32 = 8;

/// A response that ends a request, for [`Options::accept`](crate::Options::accept) and
/// [`Request::accept_responses`](crate::Request::accept_responses).
///
/// # Examples
///
/// ```
/// use requeuest::{AcceptedResponse, StatusCode};
///
/// assert!(AcceptedResponse::Success.matches(StatusCode::CREATED));
/// assert!(AcceptedResponse::from(StatusCode::CONFLICT).matches(StatusCode::CONFLICT));
/// assert!(!AcceptedResponse::from(200..=204).matches(StatusCode::NOT_FOUND));
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum AcceptedResponse {
    /// Any 2xx status.
    Success,
    /// Any response at all.
    Any,
    /// One status code.
    Status(u16),
    /// The status codes from the first to the second, inclusive.
    Range(u16, u16),
}

impl AcceptedResponse {
    /// Whether a response with this status is accepted.
    pub fn matches(&self, status: StatusCode) -> bool {
        match self {
            Self::Success => status.is_success(),
            Self::Any => true,
            Self::Status(code) => status.as_u16() == *code,
            Self::Range(first, last) => (*first..=*last).contains(&status.as_u16()),
        }
    }
}

impl From<StatusCode> for AcceptedResponse {
    fn from(status: StatusCode) -> Self {
        Self::Status(status.as_u16())
    }
}

impl From<RangeInclusive<u16>> for AcceptedResponse {
    fn from(range: RangeInclusive<u16>) -> Self {
        Self::Range(*range.start(), *range.end())
    }
}

/// What the result of an attempt means for its request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Verdict {
    /// The response ends the request as completed. Without a response, the same as
    /// [`Discard`](Self::Discard).
    Final,
    /// Another attempt is made, if the retry policy allows one. Also for an at-most-once request,
    /// if it was answered.
    Retry,
    /// The request is given up at once, with the response if there is one.
    Discard,
    /// It is not known whether the receiver has acted, and the request must not be sent again. It
    /// ends as [ambiguous](crate::Status::Ambiguous), with the response if there is one.
    Ambiguous,
}

/// The result of an attempt, for [`Classify`].
#[derive(Clone, Copy, Debug)]
pub struct Attempt<'a> {
    method: &'a Method,
    number: u32,
    kind: RequestKind,
    history: History,
    result: Result<(StatusCode, &'a HeaderMap), FailureClass>,
}

/// What the default verdict needs to know of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RequestKind {
    pub(crate) awaited: bool,
    pub(crate) guarantee: Guarantee,
    /// The receiver can recognise a repetition.
    pub(crate) keyed: bool,
}

/// What the earlier attempts of a request tell about the last one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct History {
    /// How many brought a broken answer.
    broken: u32,
    /// How many were answered with 409.
    in_progress: u32,
    /// After one of them it was open whether the receiver had acted, or would.
    open: bool,
}

/// An earlier attempt, as it is recorded.
#[derive(Clone, Debug)]
pub(crate) struct Earlier {
    pub(crate) number: u32,
    pub(crate) class: String,
    pub(crate) status: Option<u16>,
}

impl History {
    /// The history of a request before its attempt with this number.
    pub(crate) fn before(number: u32, earlier: &[Earlier]) -> Self {
        let mut history = Self::default();
        for earlier in earlier.iter().filter(|earlier| earlier.number < number) {
            let class = earlier.class.parse::<FailureClass>().ok();
            let status = earlier.status.and_then(|s| StatusCode::from_u16(s).ok());
            history.broken += u32::from(class.is_some_and(FailureClass::is_broken_answer));
            history.in_progress += u32::from(status == Some(StatusCode::CONFLICT));
            history.open |= match (class, status) {
                (_, Some(status)) => leaves_open(status),
                (Some(class), None) => class.may_have_been_sent(),
                (None, None) => true,
            };
        }
        // An attempt whose process died is not recorded. The first attempts stay recorded.
        let is_recorded = |number| earlier.iter().any(|earlier| earlier.number == number);
        history.open |= !(1..number.min(4)).all(is_recorded);
        history.open |= number > 1 && !is_recorded(number - 1);
        history
    }

    /// What is assumed if the earlier attempts can't be read: that the receiver may be at work.
    pub(crate) fn unknown() -> Self {
        Self {
            open: true,
            ..Self::default()
        }
    }
}

impl<'a> Attempt<'a> {
    pub(crate) fn new(
        method: &'a Method,
        number: u32,
        kind: RequestKind,
        result: Result<(StatusCode, &'a HeaderMap), FailureClass>,
    ) -> Self {
        Self {
            method,
            number,
            kind,
            history: History::default(),
            result,
        }
    }

    pub(crate) fn after(self, history: History) -> Self {
        Self { history, ..self }
    }

    /// Whether the default verdict depends on the earlier attempts.
    pub(crate) fn depends_on_history(&self) -> bool {
        self.number > 1
            && match self.result {
                Ok((status, _)) => status == StatusCode::CONFLICT && self.kind.keyed,
                Err(class) => class.is_broken_answer(),
            }
    }

    /// Whether the receiver says that it works on an earlier transmission of the request.
    fn is_in_progress(&self) -> bool {
        self.depends_on_history()
            && self.history.open
            && self.history.in_progress < MAX_IN_PROGRESS_ANSWERS
    }

    /// The request's method.
    pub fn method(&self) -> &'a Method {
        self.method
    }

    /// The number of the attempt. The first attempt of a request has number 1.
    pub fn number(&self) -> u32 {
        self.number
    }

    /// Whether the request was made by a call that returns the response: `await_response`, or the
    /// layer and the middleware without [`Options::fire`](crate::Options::fire). `false` for fired
    /// requests and for replays.
    pub fn is_awaited(&self) -> bool {
        self.kind.awaited
    }

    /// What is promised if the result of an attempt is unknown.
    pub fn guarantee(&self) -> Guarantee {
        self.kind.guarantee
    }

    /// The status and headers of the response, or why there is none.
    ///
    /// # Errors
    ///
    /// Returns the attempt's failure class if there was no response.
    pub fn result(&self) -> Result<(StatusCode, &'a HeaderMap), FailureClass> {
        self.result
    }

    /// The verdict without a [`Classify`]: see the [module](self).
    pub fn default_verdict(&self) -> Verdict {
        let once = self.kind.guarantee == Guarantee::AtMostOnce;
        match self.result {
            Ok((status, _)) if once && leaves_open(status) => Verdict::Ambiguous,
            Ok((status, _)) if asks_for_repetition(status) => Verdict::Retry,
            Ok(_) if self.is_in_progress() => Verdict::Retry,
            // No caller would ever see the answer.
            Ok((status, _)) if !self.kind.awaited && !status.is_success() => Verdict::Discard,
            Ok(_) => Verdict::Final,
            Err(class)
                if class.is_broken_answer() && self.history.broken + 1 >= MAX_BROKEN_ANSWERS =>
            {
                Verdict::Discard
            }
            Err(FailureClass::Denied) => Verdict::Discard,
            Err(_) => Verdict::Retry,
        }
    }
}

fn asks_for_repetition(status: StatusCode) -> bool {
    status.is_server_error() || matches!(status.as_u16(), 408 | 421 | 425 | 429)
}

/// Whether the receiver may have acted on a request that was answered with this status, or may act
/// yet. 501, 503 and 505 say that it did not (RFC 9110 section 15.6).
fn leaves_open(status: StatusCode) -> bool {
    status.is_server_error() && !matches!(status.as_u16(), 501 | 503 | 505)
}

/// Judges the results of attempts, for
/// [`DurableBuilder::classify`](crate::DurableBuilder::classify). See the [module](self).
///
/// It is called after each attempt that this process makes, so it must not block. If it panics, the
/// default verdict applies, and the attempt's record has the panic's text.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a classifier",
    label = "expected a `Classify`",
    note = "wrap a closure of `&Attempt` in `requeuest::classify::classify_fn(closure)`"
)]
pub trait Classify: Send + Sync + 'static {
    /// Returns what the result means for its request.
    fn classify(&self, attempt: &Attempt<'_>) -> Verdict;
}

/// The verdicts of [`DurableBuilder::webhooks`](crate::DurableBuilder::webhooks).
#[derive(Clone, Copy, Debug)]
pub(crate) struct Webhooks;

impl Classify for Webhooks {
    fn classify(&self, attempt: &Attempt<'_>) -> Verdict {
        let default = attempt.default_verdict();
        if attempt.is_awaited() || default == Verdict::Ambiguous {
            return default;
        }
        match attempt.result {
            Ok((StatusCode::GONE, _)) => Verdict::Discard,
            Ok((status, _)) if !status.is_success() => Verdict::Retry,
            _ => default,
        }
    }
}

/// Makes a [`Classify`] from a function.
///
/// # Examples
///
/// ```
/// use requeuest::classify::{Verdict, classify_fn};
///
/// let once_is_enough = classify_fn(|_| Verdict::Final);
/// ```
pub fn classify_fn<F>(function: F) -> ClassifyFn<F>
where
    F: Fn(&Attempt<'_>) -> Verdict + Send + Sync + 'static,
{
    ClassifyFn(function)
}

/// What [`classify_fn`] returns.
#[derive(Clone, Copy)]
pub struct ClassifyFn<F>(F);

impl<F> Classify for ClassifyFn<F>
where
    F: Fn(&Attempt<'_>) -> Verdict + Send + Sync + 'static,
{
    fn classify(&self, attempt: &Attempt<'_>) -> Verdict {
        (self.0)(attempt)
    }
}

impl<F> fmt::Debug for ClassifyFn<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ClassifyFn")
    }
}

/// The [`Classify`] of a handle, if it has one.
#[derive(Clone, Default)]
pub(crate) struct Classifier(Option<Arc<dyn Classify>>);

impl Classifier {
    pub(crate) fn new(classify: impl Classify) -> Self {
        Self(Some(Arc::new(classify)))
    }

    /// Judges an attempt. For responses, `accept` takes precedence over everything else. The text
    /// is that of a panic.
    pub(crate) fn judge(
        &self,
        accept: Option<&[AcceptedResponse]>,
        attempt: &Attempt<'_>,
    ) -> (Verdict, Option<String>) {
        if let (Some(accept), Ok((status, _))) = (accept, attempt.result) {
            let verdict = if accept.iter().any(|accepted| accepted.matches(status)) {
                Verdict::Final
            } else if attempt.default_verdict() == Verdict::Ambiguous {
                Verdict::Ambiguous
            } else {
                Verdict::Retry
            };
            return (verdict, None);
        }
        let Some(classify) = &self.0 else {
            return (attempt.default_verdict(), None);
        };
        match catch_unwind(AssertUnwindSafe(|| classify.classify(attempt))) {
            Ok(verdict) => (verdict, None),
            Err(panic) => (attempt.default_verdict(), Some(panic_text(&*panic))),
        }
    }
}

impl fmt::Debug for Classifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Classifier")
    }
}

/// Why an attempt did not get an answer that ends its request.
///
/// The class is derived from the client's error. The errors of reqwest, hyper, tower and the TLS
/// libraries are recognised, and `std::io::Error`s of any client. If a client follows redirects, or
/// has middleware that sends further requests, its error may be about one of those instead.
///
/// Text and serde use the lower-case name, such as `"connect_timeout"`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum FailureClass {
    /// The host name could not be resolved.
    Dns,
    /// The connection could not be made.
    Connect,
    /// The connection was made, but the TLS handshake failed.
    Tls,
    /// The client timed out while it was connecting.
    ConnectTimeout,
    /// The client never became ready for the request, or failed before it was ready.
    NotReady,
    /// The receiver's protocol said that it did not process the request: HTTP/2's
    /// `REFUSED_STREAM`, or a GOAWAY without an error (RFC 9113 section 8.7).
    Refused,
    /// No complete response came in time. The request may have been sent.
    Timeout,
    /// The connection broke after the request may have been sent, and before a response came.
    Reset,
    /// The answer was not valid HTTP, its head exceeded the client's limits, or its body could not
    /// be decoded.
    Protocol,
    /// A response came, and ended before its body was complete: the connection broke, or the
    /// response is shorter than its `Content-Length` (RFC 9112 section 8).
    Incomplete,
    /// The client failed with an error that is not recognised.
    Other,
    /// A response came whose status asks for another attempt.
    Status,
    /// The caller that made the attempt went away, or a shutdown's grace time ran out.
    Abandoned,
    /// The process that made the attempt died.
    Lost,
    /// The client can't send this request, or what was stored of it is gone.
    Unusable,
    /// The guard of the feature `ssrf-guard` denies where the request, or a redirect, leads. The
    /// request is discarded at once, unless a classifier says otherwise.
    Denied,
    /// A [hook](crate::hooks) refused the attempt or failed. Nothing was sent.
    Hook,
    /// The request's deadline passed before it was sent.
    Deadline,
    /// No runner has delivered the request's channel within the time that the request may take: the
    /// [`max_age`](crate::retry::RetryPolicy::max_age) of its retry policy, or a day where that
    /// limits its attempts only.
    NoRunner,
    /// The request waited for its destination, which was paused, disabled or limited, until its
    /// caller's time was over: the [`max_age`](crate::retry::RetryPolicy::max_age) of its retry
    /// policy.
    Deferred,
}

impl FailureClass {
    /// The lower-case name, as it stands in the database.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Dns => "dns",
            Self::Connect => "connect",
            Self::Tls => "tls",
            Self::ConnectTimeout => "connect_timeout",
            Self::NotReady => "not_ready",
            Self::Refused => "refused",
            Self::Timeout => "timeout",
            Self::Reset => "reset",
            Self::Protocol => "protocol",
            Self::Incomplete => "incomplete",
            Self::Other => "other",
            Self::Status => "status",
            Self::Abandoned => "abandoned",
            Self::Lost => "lost",
            Self::Unusable => "unusable",
            Self::Denied => "denied",
            Self::Hook => "hook",
            Self::Deadline => "deadline",
            Self::NoRunner => "no_runner",
            Self::Deferred => "deferred",
        }
    }

    /// Whether the receiver answered, with something that is no complete response.
    pub(crate) fn is_broken_answer(self) -> bool {
        matches!(self, Self::Protocol | Self::Incomplete)
    }

    /// Whether the request may have reached the receiver. `false` only if certainly nothing of it
    /// was sent, or if the receiver's protocol said that it was not processed.
    pub fn may_have_been_sent(self) -> bool {
        !matches!(
            self,
            Self::Dns
                | Self::Connect
                | Self::Tls
                | Self::ConnectTimeout
                | Self::NotReady
                | Self::Refused
                | Self::Unusable
                | Self::Denied
                | Self::Hook
                | Self::Deadline
                | Self::NoRunner
                | Self::Deferred
        )
    }
}

impl FromStr for FailureClass {
    type Err = ParseNameError;

    /// Parses the name that [`as_str`](Self::as_str) returns.
    fn from_str(name: &str) -> Result<Self, Self::Err> {
        Ok(match name {
            "dns" => Self::Dns,
            "connect" => Self::Connect,
            "tls" => Self::Tls,
            "connect_timeout" => Self::ConnectTimeout,
            "not_ready" => Self::NotReady,
            "refused" => Self::Refused,
            "timeout" => Self::Timeout,
            "reset" => Self::Reset,
            "protocol" => Self::Protocol,
            "incomplete" => Self::Incomplete,
            "other" => Self::Other,
            "status" => Self::Status,
            "abandoned" => Self::Abandoned,
            "lost" => Self::Lost,
            "unusable" => Self::Unusable,
            "denied" => Self::Denied,
            "hook" => Self::Hook,
            "deadline" => Self::Deadline,
            "no_runner" => Self::NoRunner,
            "deferred" => Self::Deferred,
            _ => return Err(ParseNameError::new("the name of a failure class")),
        })
    }
}

impl fmt::Display for FailureClass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind(awaited: bool) -> RequestKind {
        RequestKind {
            awaited,
            guarantee: Guarantee::AtLeastOnce,
            keyed: true,
        }
    }

    fn judged(
        classifier: &Classifier,
        accept: Option<&[AcceptedResponse]>,
        result: Result<u16, FailureClass>,
    ) -> Verdict {
        let headers = HeaderMap::new();
        let result = result.map(|status| (StatusCode::from_u16(status).unwrap(), &headers));
        classifier
            .judge(accept, &Attempt::new(&Method::POST, 3, kind(true), result))
            .0
    }

    fn by_default(result: Result<u16, FailureClass>) -> Verdict {
        judged(&Classifier::default(), None, result)
    }

    #[test]
    fn answers_are_final_unless_they_ask_for_a_repetition() {
        for status in [200, 204, 301, 304, 400, 401, 404, 409, 418, 600, 999] {
            assert_eq!(by_default(Ok(status)), Verdict::Final, "{status}");
        }
        for status in [408, 421, 425, 429, 500, 502, 503, 504, 599] {
            assert_eq!(by_default(Ok(status)), Verdict::Retry, "{status}");
        }
        assert_eq!(by_default(Err(FailureClass::Protocol)), Verdict::Retry);
    }

    #[test]
    fn a_fired_request_is_completed_by_success_only() {
        let headers = HeaderMap::new();
        let fired = |classifier: &Classifier, status| {
            let result = Ok((StatusCode::from_u16(status).unwrap(), &headers));
            classifier
                .judge(None, &Attempt::new(&Method::POST, 1, kind(false), result))
                .0
        };
        let default = Classifier::default();
        for status in [200, 204, 299] {
            assert_eq!(fired(&default, status), Verdict::Final, "{status}");
        }
        for status in [301, 304, 400, 401, 404, 409, 600] {
            assert_eq!(fired(&default, status), Verdict::Discard, "{status}");
        }
        assert_eq!(fired(&default, 503), Verdict::Retry);
        let lenient = Classifier::new(classify_fn(|attempt| match attempt.result() {
            Ok((StatusCode::CONFLICT, _)) if !attempt.is_awaited() => Verdict::Final,
            _ => attempt.default_verdict(),
        }));
        assert_eq!(fired(&lenient, 409), Verdict::Final);
        assert_eq!(fired(&lenient, 410), Verdict::Discard);
    }

    #[test]
    fn at_most_once_repeats_only_what_was_not_processed() {
        let headers = HeaderMap::new();
        let verdict = |accept: Option<&[AcceptedResponse]>, status| {
            let kind = RequestKind {
                guarantee: Guarantee::AtMostOnce,
                ..kind(true)
            };
            let result = Ok((StatusCode::from_u16(status).unwrap(), &headers));
            let attempt = Attempt::new(&Method::POST, 1, kind, result);
            Classifier::default().judge(accept, &attempt).0
        };
        let accept = [AcceptedResponse::Success];
        for accept in [None, Some(&accept[..])] {
            for status in [408, 421, 425, 429, 501, 503, 505] {
                assert_eq!(verdict(accept, status), Verdict::Retry, "{status}");
            }
            for status in [500, 502, 504, 599] {
                assert_eq!(verdict(accept, status), Verdict::Ambiguous, "{status}");
            }
            assert_eq!(verdict(accept, 200), Verdict::Final);
        }
        assert_eq!(verdict(None, 404), Verdict::Final);
        assert_eq!(
            verdict(Some(&[AcceptedResponse::Status(502)]), 502),
            Verdict::Final
        );
    }

    #[test]
    fn a_409_is_in_progress_only_after_an_attempt_that_left_it_open() {
        let headers = HeaderMap::new();
        let earlier = |number, class: &str, status| Earlier {
            number,
            class: class.to_owned(),
            status,
        };
        let verdict = |keyed, number, earlier: &[Earlier]| {
            let kind = RequestKind {
                keyed,
                ..kind(true)
            };
            let attempt = Attempt::new(
                &Method::POST,
                number,
                kind,
                Ok((StatusCode::CONFLICT, &headers)),
            );
            attempt
                .after(History::before(number, earlier))
                .default_verdict()
        };
        for (class, status, expected) in [
            ("timeout", None, Verdict::Retry),
            ("reset", None, Verdict::Retry),
            ("incomplete", None, Verdict::Retry),
            ("abandoned", None, Verdict::Retry),
            ("status", Some(504), Verdict::Retry),
            ("status", Some(503), Verdict::Final),
            ("status", Some(429), Verdict::Final),
            ("connect", None, Verdict::Final),
            ("refused", None, Verdict::Final),
        ] {
            let first = [earlier(1, class, status)];
            assert_eq!(verdict(true, 2, &first), expected, "{class} {status:?}");
            // Without a key, the receiver can't know that it is a repetition.
            assert_eq!(verdict(false, 2, &first), Verdict::Final, "{class}");
        }
        assert_eq!(verdict(true, 1, &[]), Verdict::Final);
        // The first attempt's process died.
        assert_eq!(verdict(true, 2, &[]), Verdict::Retry);
        let mut many = vec![earlier(1, "timeout", None)];
        many.extend((2..=8).map(|number| earlier(number, "status", Some(409))));
        assert_eq!(verdict(true, 9, &many), Verdict::Retry);
        many.push(earlier(9, "status", Some(409)));
        assert_eq!(verdict(true, 10, &many), Verdict::Final);
    }

    #[test]
    fn the_tenth_broken_answer_is_the_last() {
        let earlier = |class: &str, numbers: std::ops::RangeInclusive<u32>| {
            let earlier = numbers.map(|number| Earlier {
                number,
                class: class.to_owned(),
                status: None,
            });
            earlier.collect::<Vec<_>>()
        };
        let verdict = |number, earlier: &[Earlier]| {
            let attempt = Attempt::new(
                &Method::POST,
                number,
                kind(true),
                Err(FailureClass::Protocol),
            );
            assert!(attempt.depends_on_history());
            attempt
                .after(History::before(number, earlier))
                .default_verdict()
        };
        // A receiver that was down for long counts for nothing.
        let mut all = earlier("connect", 1..=90);
        all.extend(earlier("incomplete", 91..=98));
        assert_eq!(verdict(99, &all), Verdict::Retry);
        all.extend(earlier("protocol", 99..=99));
        assert_eq!(verdict(100, &all), Verdict::Discard);
        // What this version doesn't know is none.
        assert_eq!(
            verdict(100, &earlier("of tomorrow", 1..=99)),
            Verdict::Retry
        );
    }

    #[test]
    fn a_list_of_accepted_responses_takes_precedence() {
        let accept = [AcceptedResponse::Success, AcceptedResponse::Status(409)];
        let discard = Classifier::new(classify_fn(|_| Verdict::Discard));
        for classifier in [&Classifier::default(), &discard] {
            let of = |status| judged(classifier, Some(&accept), Ok(status));
            assert_eq!(of(200), Verdict::Final);
            assert_eq!(of(409), Verdict::Final);
            assert_eq!(of(404), Verdict::Retry);
        }
        // A failure is no response.
        let failed = Err(FailureClass::Dns);
        assert_eq!(judged(&discard, Some(&accept), failed), Verdict::Discard);
    }

    #[test]
    fn a_classifier_sees_the_attempt_and_can_defer_to_the_default() {
        let classifier = Classifier::new(classify_fn(|attempt| {
            assert_eq!((attempt.method(), attempt.number()), (&Method::POST, 3));
            match attempt.result() {
                Ok((StatusCode::NOT_FOUND, headers)) if headers.is_empty() => Verdict::Retry,
                Err(FailureClass::Dns) => Verdict::Discard,
                _ => attempt.default_verdict(),
            }
        }));
        assert_eq!(judged(&classifier, None, Ok(404)), Verdict::Retry);
        assert_eq!(judged(&classifier, None, Ok(410)), Verdict::Final);
        let failed = |class| judged(&classifier, None, Err(class));
        assert_eq!(failed(FailureClass::Dns), Verdict::Discard);
        assert_eq!(failed(FailureClass::Tls), Verdict::Retry);
    }

    #[test]
    fn the_default_applies_if_a_classifier_panics() {
        let classifier = Classifier::new(classify_fn(|_| panic!("no verdict")));
        assert_eq!(judged(&classifier, None, Ok(200)), Verdict::Final);
    }

    #[test]
    fn classifiers_are_object_safe() {
        struct Never;
        impl Classify for Never {
            fn classify(&self, _: &Attempt<'_>) -> Verdict {
                Verdict::Discard
            }
        }
        let headers = HeaderMap::new();
        let attempt = Attempt::new(&Method::GET, 1, kind(true), Ok((StatusCode::OK, &headers)));
        let all: [Box<dyn Classify>; 2] =
            [Box::new(Never), Box::new(classify_fn(|_| Verdict::Discard))];
        for classify in all {
            assert_eq!(classify.classify(&attempt), Verdict::Discard);
        }
    }

    #[test]
    fn failure_class_names_survive_text_and_serde() {
        for class in [
            FailureClass::Dns,
            FailureClass::Connect,
            FailureClass::Tls,
            FailureClass::ConnectTimeout,
            FailureClass::NotReady,
            FailureClass::Refused,
            FailureClass::Timeout,
            FailureClass::Reset,
            FailureClass::Protocol,
            FailureClass::Incomplete,
            FailureClass::Other,
            FailureClass::Status,
            FailureClass::Abandoned,
            FailureClass::Lost,
            FailureClass::Unusable,
            FailureClass::Hook,
            FailureClass::Deadline,
        ] {
            assert_eq!(class.as_str().parse(), Ok(class));
            let json = serde_json::to_string(&class).unwrap();
            assert_eq!(json, format!("\"{class}\""));
            assert_eq!(serde_json::from_str::<FailureClass>(&json).unwrap(), class);
        }
        let error = "".parse::<FailureClass>().unwrap_err();
        assert_eq!(error.to_string(), "not the name of a failure class");
    }
}
