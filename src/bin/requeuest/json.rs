//! The shapes of JSON output, which `docs/cli.md` documents.

use std::time::{Duration, SystemTime};

use bytes::Bytes;
use requeuest::RunnerInfo;
use requeuest::admin::{FailedAttempt, Hold, Owner, RequestContent, RequestInfo, RequestSummary};
use requeuest::http::{HeaderMap, HeaderName, HeaderValue};
use serde_json::{Value, json};

use crate::when;

pub(crate) fn time(time: SystemTime) -> Value {
    when::rfc3339(time).into()
}

pub(crate) fn maybe_time(time: Option<SystemTime>) -> Value {
    time.map_or(Value::Null, self::time)
}

/// In seconds.
pub(crate) fn duration(duration: Duration) -> Value {
    let millis = duration.as_secs_f64() * 1000.0;
    (millis.round() / 1000.0).into()
}

pub(crate) fn request(request: &RequestInfo) -> Value {
    let attempts = request.failed_attempts.iter().map(attempt);
    json!({
        "id": request.id.to_string(),
        "channel": request.channel,
        "status": request.status.as_str(),
        "method": request.method,
        "destination": request.destination,
        "ordering_key": request.ordering_key,
        "attempts": request.attempts,
        "created_at": time(request.created_at),
        "due_at": maybe_time(request.due_at),
        "deadline": maybe_time(request.deadline),
        "finished_at": maybe_time(request.finished_at),
        "http_status": request.http_status,
        "error_class": request.error_class,
        "error": request.error,
        "replayed_as": request.replayed_as.map(|id| id.to_string()),
        "owner": request.owner.as_ref().map(owner),
        "leased_until": maybe_time(request.leased_until),
        "why_not_sent": request.hold.as_ref().map(hold),
        "failed_attempts": attempts.collect::<Vec<_>>(),
    })
}

/// The process that has a request.
fn owner(owner: &Owner) -> Value {
    json!({
        "id": owner.id.to_string(),
        "host": owner.host,
        "pid": owner.pid,
        "version": owner.version,
    })
}

pub(crate) fn content(content: &RequestContent) -> Value {
    let request = content.request.as_ref().map(|request| {
        json!({
            "method": request.method().as_str(),
            "url": request.url(),
            "headers": headers(request.headers()),
            "body": request.body().and_then(|body| std::str::from_utf8(body).ok()),
            "body_bytes": request.body().map(Bytes::len),
        })
    });
    let response = content.response.as_ref().map(|response| {
        json!({
            "http_status": response.status().as_u16(),
            "headers": headers(response.headers()),
            "body": std::str::from_utf8(response.body()).ok(),
            "body_bytes": response.body().len(),
        })
    });
    json!({ "request": request, "response": response })
}

/// In their order, because a name may be there twice.
fn headers(headers: &HeaderMap) -> Value {
    let pair = |(name, value): (&HeaderName, &HeaderValue)| {
        json!([name.as_str(), String::from_utf8_lossy(value.as_bytes())])
    };
    headers.iter().map(pair).collect()
}

pub(crate) fn summary(request: &RequestSummary) -> Value {
    json!({
        "id": request.id.to_string(),
        "channel": request.channel,
        "status": request.status.map(requeuest::Status::as_str),
        "state": request.state.map(requeuest::admin::RequestState::as_str),
        "method": request.method,
        "destination": request.destination,
        "ordering_key": request.ordering_key,
        "attempts": request.attempts,
        "created_at": time(request.created_at),
        "due_at": maybe_time(request.due_at),
        "finished_at": maybe_time(request.finished_at),
        "http_status": request.http_status,
        "error_class": request.error_class,
        "error": request.error,
        "replayed_as": request.replayed_as.map(|id| id.to_string()),
    })
}

pub(crate) fn runner(runner: &RunnerInfo) -> Value {
    json!({
        "id": runner.id.to_string(),
        "host": runner.host,
        "pid": runner.pid,
        "version": runner.version,
        "channels": runner.channels,
        "in_flight": runner.in_flight,
        "started_at": time(runner.started_at),
        "seen_at": time(runner.seen_at),
    })
}

fn attempt(attempt: &FailedAttempt) -> Value {
    json!({
        "number": attempt.number,
        "ended_at": time(attempt.ended_at),
        "seconds": duration(attempt.duration),
        "http_status": attempt.http_status,
        "error_class": attempt.error_class,
        "error": attempt.error,
    })
}

fn hold(hold: &Hold) -> Value {
    let reason = match hold {
        Hold::NotDue { .. } => "not_due",
        Hold::Behind { .. } => "behind",
        Hold::Halted { .. } => "halted",
        Hold::Closed(_) => "destination_closed",
        Hold::Limited { .. } => "destination_limited",
        Hold::Parked { .. } => "parked",
        Hold::NoRunner { .. } => "no_runner",
        Hold::LeaseEnded { .. } => "lease_ended",
        Hold::Queued { .. } => "queued",
        _ => "other",
    };
    json!({ "reason": reason, "sentence": hold.to_string() })
}
