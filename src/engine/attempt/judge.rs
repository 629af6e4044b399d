//! Judging an attempt: whether its request finishes, or is sent again.

use std::time::Duration;

use http::StatusCode;

use super::claim::Claim;
use super::gate::{Blame, Seen};
use super::send::{Answer, Exchange, Failed};
use crate::classify::{Attempt, FailureClass, History, RequestKind, Verdict};
use crate::idempotency_header;
use crate::outcome::{Fault, Outcome};
use crate::status::Status;
use crate::store::settle::Failure;

/// What an attempt's result means for its request.
pub(super) enum Judgement {
    Finish(Outcome),
    Retry { delay: Duration, failure: Failure },
}

impl Judgement {
    /// Whether the attempt brought no final response.
    pub(super) fn has_failed(&self) -> bool {
        match self {
            Self::Finish(outcome) => outcome.status != Status::Completed,
            Self::Retry { .. } => true,
        }
    }
}

/// The attempt as a classifier sees it, without its history.
fn attempt<'a>(exchange: &'a Exchange, claim: &'a Claim) -> Attempt<'a> {
    let job = claim.job();
    let seen = exchange.seen();
    // Looked for only where it matters.
    let is_conflict = matches!(seen, Ok((StatusCode::CONFLICT, _)));
    let kind = RequestKind {
        awaited: job.delivery.awaited,
        guarantee: job.delivery.guarantee,
        keyed: is_conflict && idempotency_header::is_in(&job.request.headers, job.id),
    };
    Attempt::new(&job.request.method, claim.attempts(), kind, seen)
}

/// What the earlier attempts tell about this one. Read from the database, for the few results whose
/// meaning depends on it.
pub(super) async fn history(exchange: &Exchange, claim: &Claim) -> History {
    if !attempt(exchange, claim).depends_on_history() {
        return History::default();
    }
    let id = claim.job().id;
    // Boxed, so that other attempts don't take the room that it needs.
    let earlier = Box::pin(
        claim
            .driver()
            .with_store(|store| async move { store.earlier_attempts(id).await }),
    );
    match earlier.await {
        Ok(earlier) => History::before(claim.attempts(), &earlier),
        Err(error) => {
            tracing::debug!(%id, ?error, "the earlier attempts of a request can't be read");
            History::unknown()
        }
    }
}

pub(super) fn judge(exchange: Exchange, history: History, claim: &Claim) -> Judgement {
    let job = claim.job();
    let driver = claim.driver();
    let attempt = attempt(&exchange, claim).after(history);
    let accept = job.delivery.accept.as_deref();
    let (verdict, classifier) = match exchange.decided {
        // A list of accepted responses is only of use if there is a response.
        Some(verdict) if accept.is_none() || exchange.result.is_err() => (verdict, None),
        _ => driver.config.classifier.judge(accept, &attempt),
    };
    note(claim, &exchange, verdict);
    let mut function = None;
    let delay = match verdict {
        Verdict::Retry => {
            let asked = exchange
                .asked_delay()
                .map(|it| job.delivery.retry.bounded(it));
            claim.next_delay(asked.or(exchange.delay_of_hook()), &mut function)
        }
        Verdict::Final | Verdict::Discard | Verdict::Ambiguous => None,
    };
    let panicked = classifier
        .map(|text| format!("the classifier panicked: {text}"))
        .or(function.map(|text| format!("the retry policy's function panicked: {text}")));
    let mut result = exchange.result;
    if let Some(panicked) = &panicked {
        if driver.policy_panics.allows("").is_some() {
            tracing::error!(id = %job.id, error = panicked, "a hook panicked");
        }
        if let Err(failed) = &mut result {
            failed.note(panicked);
        }
    }
    match (delay, result) {
        // Whatever the verdict: it is unknown whether the request arrived.
        (_, Err(failed)) if claim.is_once() && failed.may_have_been_sent() => {
            Judgement::Finish(Outcome::ambiguous(job.id, failed.into_fault()))
        }
        (_, result) if verdict == Verdict::Ambiguous => Judgement::Finish(ambiguous(claim, result)),
        (Some(delay), result) => {
            let failure = failure(exchange.duration, result, panicked.as_deref());
            tracing::debug!(
                id = %job.id,
                destination = %job.destination(),
                attempt = claim.attempts(),
                class = %failure.class,
                reason = failure.text,
                ?delay,
                "an attempt failed and will be repeated"
            );
            Judgement::Retry { delay, failure }
        }
        (None, Ok(answer)) => {
            let status = match verdict {
                Verdict::Final => Status::Completed,
                Verdict::Retry | Verdict::Discard | Verdict::Ambiguous => Status::Discarded,
            };
            let limit = driver.store.config().max_response_body;
            let text = panicked.map(|panicked| answered(&answer, Some(&panicked)));
            let mut outcome = answer.into_outcome(status, limit);
            if let (Status::Discarded, Some(text)) = (status, text) {
                let fault = Fault::new(FailureClass::Status.as_str(), text);
                outcome.fault.get_or_insert(fault);
            }
            Judgement::Finish(outcome)
        }
        (None, Err(failed)) => Judgement::Finish(Outcome::discarded(job.id, failed.into_fault())),
    }
}

/// Notes what the attempt has shown of its destination.
fn note(claim: &Claim, exchange: &Exchange, verdict: Verdict) {
    let seen = exchange.seen();
    let is_of_proxy = matches!(&exchange.result, Err(failed) if failed.is_of_proxy);
    let fault = match seen {
        _ if is_of_proxy || exchange.decided.is_some() => Blame::Other,
        Ok(_) if verdict == Verdict::Final => Blame::Success,
        Ok((StatusCode::PROXY_AUTHENTICATION_REQUIRED, _))
        | Err(
            FailureClass::NotReady
            | FailureClass::Unusable
            | FailureClass::Denied
            | FailureClass::Abandoned
            | FailureClass::Hook
            | FailureClass::Other,
        ) => Blame::Other,
        Ok(_) | Err(_) => Blame::Destination,
    };
    let seen = Seen {
        turn: claim.turn(),
        status: seen.ok().map(|(status, _)| status),
        retry_after: exchange
            .asked_delay()
            .map(|asked| claim.job().delivery.retry.bounded(asked)),
        fault,
        is_repeated: verdict == Verdict::Retry,
    };
    claim.note(seen);
}

/// The outcome of a request that may have reached its receiver, with the answer to it.
fn ambiguous(claim: &Claim, result: Result<Answer, Failed>) -> Outcome {
    let id = claim.job().id;
    match result {
        Ok(answer) => {
            let text = format!(
                "{}, which leaves open whether the receiver has acted",
                answered(&answer, None)
            );
            let fault = Fault::new(FailureClass::Status.as_str(), text);
            Outcome {
                response: answer.into_whole(),
                ..Outcome::ambiguous(id, fault)
            }
        }
        Err(failed) => Outcome::ambiguous(id, failed.into_fault()),
    }
}

fn answered(answer: &Answer, panicked: Option<&str>) -> String {
    let status = answer.response().status;
    match panicked {
        Some(panicked) => format!("answered with {status}; {panicked}"),
        None => format!("answered with {status}"),
    }
}

/// The record of a failed attempt.
fn failure(duration: Duration, result: Result<Answer, Failed>, panicked: Option<&str>) -> Failure {
    match result {
        Ok(answer) => Failure {
            class: FailureClass::Status,
            text: answered(&answer, panicked),
            duration,
            response: answer.into_whole(),
        },
        Err(failed) => Failure {
            class: failed.class,
            text: failed.into_text(),
            duration,
            response: None,
        },
    }
}
