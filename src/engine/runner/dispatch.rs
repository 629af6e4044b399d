//! Taking over the requests that sqlxmq's runner claimed.

use std::sync::Arc;
use std::time::Duration;

use sqlxmq::CurrentJob;

use crate::classify::FailureClass;
use crate::codec::Unreadable;
use crate::destination::name_of;
use crate::engine::attempt::Driver;
use crate::engine::attempt::caller_client;
use crate::engine::attempt::claim::{Claim, PolledClaim};
use crate::engine::attempt::drive::drive_by_engine;
use crate::engine::attempt::gate::Full;
use crate::engine::attempt::job::Job;
use crate::engine::attempt::leases::Registered;
use crate::engine::attempt::transport::Transport;
use crate::id::RequestId;
use crate::outcome::{Fault, Outcome};
use crate::sealer::ReadHead;
use crate::store::StoreError;
use crate::store::claim::{PolledRow, StoredBody};
use crate::store::enqueue::MESSAGE_NAME;
use crate::store::settle::Fence;

/// The delay before a request whose body couldn't be fetched is claimed again.
const FETCH_RETRY: Duration = Duration::from_secs(1);

/// Room for a body of this size is taken before its size is known. A larger one is asked for again.
const FIRST_READ: usize = 1024 * 1024;

/// Takes over a request that sqlxmq's runner claimed. Registers the claim at once, so that it is
/// known when the runner has ended, and leaves the rest to a task.
pub(super) fn take(driver: &Arc<Driver>, current: CurrentJob) {
    let id = RequestId::from(current.id());
    let json = current.raw_json().unwrap_or_default();
    let head = match PolledRow::parse(json) {
        Ok(head) => head,
        Err(error) => {
            // The lease runs out, and the request is claimed again and again.
            if driver.unusable.is_news(id) {
                tracing::error!(%id, %error, "a claimed request can't be read");
            } else {
                tracing::debug!(%id, %error, "a claimed request can't be read");
            }
            return;
        }
    };
    driver.slots.set_backlog(head.more);
    let fence = Fence {
        id,
        claim_no: head.claim_no,
    };
    let lease = match driver.leases.register(fence) {
        Registered::New(lease) => lease,
        Registered::Adopted => return,
    };
    if head.taken_over {
        driver.meter.taken_over(&head.channel, head.waited());
    }
    let claim = PolledClaim::new(Arc::clone(driver), lease, current, head);
    driver.spawn(run(claim, id));
}

async fn run(claim: PolledClaim, id: RequestId) {
    // The steps up to the claim are not kept in memory while the attempt is made.
    let Some((claim, transport)) = prepare(claim, id).await else {
        return;
    };
    // In this task: another one would cost as much as everything that this one did.
    drive_by_engine(claim, transport).await;
}

/// The claim with the client for its attempt, unless the request has finished, is put back, or its
/// caller makes the attempt.
async fn prepare(claim: PolledClaim, id: RequestId) -> Option<(Claim, Transport)> {
    if claim.head().lost {
        let text = "the process that made the attempt died before it recorded an answer";
        let outcome =
            Outcome::ambiguous(id, Fault::new(FailureClass::Lost.as_str(), text.to_owned()));
        claim.finish(outcome);
        return None;
    }
    if let Some(outcome) = given_up_as_lost(&claim, id) {
        claim.finish(outcome);
        return None;
    }
    if !claim.driver().lifecycle.is_claiming() {
        // The request came from the last poll. Other processes may send it at once.
        claim.put_back(Duration::ZERO);
        return None;
    }
    match read(&claim, id).await {
        Ok(job) => {
            let overdue = claim.deadline().is_some_and(|left| left.is_zero());
            to_be_sent(claim.open(job), overdue)
        }
        Err(Unusable::Gone) => {
            if claim.driver().unusable.is_news(id) {
                tracing::error!(%id, "a request's payload is gone, and the request is discarded");
            }
            let class = FailureClass::Unusable.as_str();
            let fault = Fault::new(class, "its payload is gone".to_owned());
            claim.finish(Outcome::discarded(id, fault));
            None
        }
        Err(Unusable::Unreadable(reason)) => {
            claim.park(reason);
            None
        }
        Err(Unusable::Later(error)) => {
            if claim.driver().unfetched.is_news(id) {
                tracing::warn!(%id, %error, "a request's body can't be fetched yet");
            }
            claim.put_back(FETCH_RETRY);
            None
        }
        Err(Unusable::Closing | Unusable::Changed) => {
            claim.put_back(Duration::ZERO);
            None
        }
        Err(Unusable::Full { destination, full }) => {
            claim.defer(&destination, full);
            None
        }
    }
}

/// The outcome of a request that may be what its processes die of. Before the stored request is
/// read, which may be what does it.
fn given_up_as_lost(claim: &PolledClaim, id: RequestId) -> Option<Outcome> {
    let lost = claim.head().lost_attempts;
    (lost >= claim.driver().config.max_lost_attempts).then(|| {
        let text = format!(
            "{lost} attempts in a row were lost with the processes that made them; the request may \
             be what ends them"
        );
        Outcome::discarded(id, Fault::new(FailureClass::Lost.as_str(), text))
    })
}

fn to_be_sent(claim: Claim, overdue: bool) -> Option<(Claim, Transport)> {
    let (class, text) = if claim.is_exhausted() {
        let text = "the last allowed attempt was lost with the process that made it";
        (FailureClass::Lost, text)
    } else if overdue {
        (FailureClass::Deadline, "its deadline passed")
    } else {
        return caller_client::assign(claim, None);
    };
    let outcome = Outcome::discarded(claim.job().id, Fault::new(class.as_str(), text.to_owned()));
    claim.finish(outcome.without_attempt());
    None
}

enum Unusable {
    /// There is nothing to send.
    Gone,
    /// A newer version may have written it, and may be able to send it.
    Unreadable(Unreadable),
    /// The body can't be fetched now.
    Later(StoreError),
    /// The handle shut down before the body was read.
    Closing,
    /// Head and body were encrypted anew in between.
    Changed,
    /// The destination takes no more attempts now.
    Full { destination: String, full: Full },
}

/// Reads the stored request.
async fn read(claim: &PolledClaim, id: RequestId) -> Result<Job, Unusable> {
    let (head, read) = read_head(claim, id)?;
    let (mut request, uri, delivery) = (read.request, read.uri, read.delivery);
    let body = if claim.head().fetch_body {
        // Boxed, so that other requests don't take the room that it needs.
        let destination = name_of(delivery.limit_key.as_deref(), &uri);
        Box::pin(fetch(claim, id, head, &destination)).await?
    } else {
        claim.current().raw_bytes().map(<[u8]>::to_vec)
    };
    request.body = read.body.open(body).map_err(Unusable::Unreadable)?;
    request.options.metadata = claim.head().metadata();
    let channel = Arc::clone(&claim.head().channel);
    Ok(Job::new(id, channel, request, uri, delivery))
}

fn read_head(claim: &PolledClaim, id: RequestId) -> Result<(&str, ReadHead), Unusable> {
    let name = claim.current().name();
    let Some(head) = claim.head().head().map_err(Unusable::Unreadable)? else {
        // A head that says `null` is there.
        return Err(if name.is_empty() {
            Unusable::Gone
        } else {
            Unusable::Unreadable(Unreadable::new("the head is not a JSON object"))
        });
    };
    if name != MESSAGE_NAME {
        let reason = "its name is not `requeuest`, so another program wrote it";
        return Err(Unusable::Unreadable(Unreadable::new(reason)));
    }
    let read = claim.driver().store.sealer().read_request(id, head);
    Ok((head, read.map_err(Unusable::Unreadable)?))
}

/// Reads a large body once its attempt has a slot, and the body room in memory.
async fn fetch(
    claim: &PolledClaim,
    id: RequestId,
    head: &str,
    destination: &str,
) -> Result<Option<Vec<u8>>, Unusable> {
    let driver = claim.driver();
    let mut limit = FIRST_READ;
    loop {
        let admitted = async {
            let room = driver.bodies.take(limit).await;
            (driver.slots.acquire(destination, claim.turn()).await, room)
        };
        let (slot, mut room) = tokio::select! {
            admitted = admitted => admitted,
            () = driver.lifecycle.closing() => return Err(Unusable::Closing),
        };
        let slot = slot.map_err(|full| Unusable::Full {
            destination: destination.to_owned(),
            full,
        })?;
        let fetched = driver.store.fetch_body(id, head, limit).await;
        match fetched.map_err(Unusable::Later)? {
            StoredBody::Larger(bytes) => {
                // The slot goes back: with one, the claim must not wait for more room.
                limit = bytes;
            }
            StoredBody::Whole(body) => {
                driver.unfetched.recovers(id);
                if let Some(room) = &mut room {
                    room.shrink_to(body.as_ref().map_or(0, Vec::len));
                }
                claim.take(slot, room);
                return Ok(body);
            }
            StoredBody::Changed => return Err(Unusable::Changed),
        }
    }
}
