//! Taking over what sqlxmq's runner claimed.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use sqlxmq::CurrentJob;

use super::claim::{Claim, unmade};
use super::lease::{Lease, Registered};
use super::settle::Settling;
use crate::classify::FailureClass;
use crate::codec;
use crate::engine::job::Job;
use crate::engine::transport::Transport;
use crate::engine::{Engine, attempt, live};
use crate::error::Error;
use crate::id::RequestId;
use crate::outcome::Outcome;
use crate::store::claim::{self, ClaimHead};
use crate::store::settle::Fence;

/// Takes over what sqlxmq's runner claimed: notes it at once, so that it is known when the runner has ended, and leaves the rest to a task.
pub(crate) fn take(engine: Arc<Engine>, current: CurrentJob) {
    let id = RequestId::from(current.id());
    let json = current.raw_json().unwrap_or_default();
    let head = match ClaimHead::parse(json) {
        Ok(head) => head,
        Err(error) => {
            log::error!("request {id}: {error}");
            return;
        }
    };
    engine.shared().backlog.store(head.more, Ordering::Relaxed);
    let fence = Fence {
        id,
        claim_no: head.claim_no,
    };
    let lease = match engine.shared().leases.register(fence) {
        Registered::New(lease) => lease,
        Registered::Adopted => return,
    };
    lease.waiting();
    let home = Arc::clone(&engine);
    home.spawn(run(engine, current, lease, head));
}

async fn run(engine: Arc<Engine>, current: CurrentJob, lease: Arc<Lease>, head: ClaimHead) {
    // What led to it is not kept while the attempt is made.
    let Some((claim, transport)) = claimed(engine, current, lease, head).await else {
        return;
    };
    // In this task: another one would cost as much as all that this one did.
    attempt::drive_by_engine(claim, transport).await;
}

/// The claim with the client for its attempt, unless the request has ended, is given back, or its caller makes the attempt.
async fn claimed(
    engine: Arc<Engine>,
    current: CurrentJob,
    lease: Arc<Lease>,
    head: ClaimHead,
) -> Option<(Claim, Transport)> {
    let id = lease.id;
    let result = if head.lost {
        let text = "it may have been sent by a process that was lost before it recorded an answer";
        let outcome = Outcome::ambiguous(id, FailureClass::Lost.as_str(), text.to_owned());
        finish(outcome.without_attempt())
    } else if !engine.is_claiming() {
        // It came from the last poll. Others may send it at once.
        unmade(Duration::ZERO)
    } else {
        let body = current.raw_bytes().map(Bytes::copy_from_slice);
        match job(&engine, id, &head, body).await {
            Ok(job) => {
                let claim = Claim::polled(&engine, lease, job, &head).counted_by(current);
                let overdue = head.deadline().is_some_and(|left| left.is_zero());
                return to_be_sent(claim, overdue);
            }
            Err(Unusable::Corrupt(error)) => {
                log::error!("request {id} is discarded: {error}");
                let class = FailureClass::Unusable.as_str();
                finish(Outcome::discarded(id, class, error.to_string()).without_attempt())
            }
            Err(Unusable::Later(error)) => {
                log::warn!("fetching the body of request {id} failed: {error}");
                unmade(Duration::from_secs(1))
            }
        }
    };
    engine.settle(lease, Some(current), result, true);
    None
}

fn to_be_sent(claim: Claim, overdue: bool) -> Option<(Claim, Transport)> {
    let (class, text) = if claim.is_exhausted() {
        let text = "the last allowed attempt was lost with the process that made it";
        (FailureClass::Lost, text)
    } else if overdue {
        (FailureClass::Deadline, "its deadline passed")
    } else {
        return live::hand_over(claim, None);
    };
    let outcome = Outcome::discarded(claim.job().id, class.as_str(), text.to_owned());
    claim.finish(outcome.without_attempt());
    None
}

fn finish(outcome: Outcome) -> Settling {
    Settling::Finish(Arc::new(outcome))
}

async fn fetch(engine: &Engine, id: RequestId) -> Result<Option<Bytes>, Unusable> {
    // A large body takes memory only once the attempt can be made soon.
    let _budget = engine.large_bodies().acquire().await;
    let fetched = engine
        .shared()
        .db
        .run_large(engine.config().max_request_body, move |connection| {
            Box::pin(async move { claim::body(connection, id.into()).await })
        })
        .await
        .map_err(|error| Unusable::Later(error.error))?;
    Ok(fetched.map(Bytes::from))
}

enum Unusable {
    Corrupt(Error),
    Later(sqlx::Error),
}

async fn job(
    engine: &Engine,
    id: RequestId,
    head: &ClaimHead,
    mut body: Option<Bytes>,
) -> Result<Job, Unusable> {
    let stored = head
        .head()
        .ok_or_else(|| Unusable::Corrupt(Error::corrupt("its payload is gone")))?;
    if head.fetch_body {
        // Boxed, so that the others don't take the room that it needs.
        body = Box::pin(fetch(engine, id)).await?;
    }
    let (request, uri, delivery) =
        codec::decode_request(stored, body).map_err(Unusable::Corrupt)?;
    Ok(Job {
        id,
        request: Arc::new(request),
        uri,
        delivery: Arc::new(delivery),
        extensions: http::Extensions::new(),
    })
}
