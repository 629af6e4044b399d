//! The claims that this process holds, and the one statement that renews them.
//!
//! A lease is renewed while its attempt is being sent or its result waits to be settled, and never past the attempt's hard
//! deadline: a caller that keeps a future without polling it keeps neither the slot nor the lease.

use std::collections::HashMap;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use tokio::sync::OwnedSemaphorePermit;
use uuid::Uuid;

use crate::engine::Shared;
use crate::id::RequestId;
use crate::store::claim;
use crate::store::settle::Fence;

/// One claim. Its number is read when it is settled, because the claim may have been renewed by a poll in between.
#[derive(Debug)]
pub(crate) struct Lease {
    pub(crate) id: RequestId,
    claim_no: AtomicI32,
    state: Mutex<LeaseState>,
}

#[derive(Debug)]
struct LeaseState {
    phase: Phase,
    /// When this process came by the claim.
    since: Instant,
    renewed: Instant,
    /// Counts against the concurrency while an attempt is made.
    slot: Option<Slot>,
}

/// One of the attempts at a time.
#[derive(Debug)]
pub(crate) struct Slot {
    pub(crate) _attempt: OwnedSemaphorePermit,
    /// Of those that new requests may have while there is a backlog.
    pub(crate) _inline: Option<OwnedSemaphorePermit>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Held until its next attempt; the database has its due time and a lease more.
    Idle,
    /// Waiting for a slot or its body, in the engine's own hands.
    Waiting,
    /// Being sent, until this hard deadline at most.
    Sending(Instant),
    /// Sent; the result waits for its commit.
    Settling,
}

impl Lease {
    pub(crate) fn fence(&self) -> Fence {
        Fence {
            id: self.id,
            claim_no: self.claim_no.load(Ordering::Acquire),
        }
    }

    pub(crate) fn sending(&self, deadline: Instant) {
        self.lock().phase = Phase::Sending(deadline);
    }

    pub(crate) fn waiting(&self) {
        self.lock().phase = Phase::Waiting;
    }

    pub(crate) fn settling(&self) {
        let mut state = self.lock();
        state.phase = Phase::Settling;
        state.slot = None;
    }

    pub(crate) fn has_slot(&self) -> bool {
        self.lock().slot.is_some()
    }

    pub(crate) fn take_slot(&self, attempt: OwnedSemaphorePermit) {
        self.lock().slot = Some(Slot {
            _attempt: attempt,
            _inline: None,
        });
    }

    fn lock(&self) -> MutexGuard<'_, LeaseState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// All claims of this process. Each belongs to whoever drives its request: one whose owner is gone, lost to a panic, is not renewed, so that
/// its request is taken over.
#[derive(Debug, Default)]
pub(crate) struct Leases {
    held: Mutex<HashMap<RequestId, Weak<Lease>>>,
}

/// What a claim that came from a poll means here.
pub(crate) enum Registered {
    New(Arc<Lease>),
    /// The request is in flight here already, and its lease had run out: the attempt goes on under the new number.
    Adopted,
}

impl Leases {
    /// Notes a claim of a request that no other claim of this process can be for.
    pub(crate) fn insert(&self, fence: Fence, slot: Option<Slot>) -> Arc<Lease> {
        let lease = Arc::new(Lease {
            id: fence.id,
            claim_no: AtomicI32::new(fence.claim_no),
            state: Mutex::new(LeaseState {
                phase: Phase::Idle,
                since: Instant::now(),
                renewed: Instant::now(),
                slot,
            }),
        });
        self.lock().insert(fence.id, Arc::downgrade(&lease));
        lease
    }

    /// Notes a claim that a poll made.
    pub(crate) fn register(&self, fence: Fence) -> Registered {
        if let Some(lease) = self.get(fence.id) {
            // A number further on was released by this process in between: then the old attempt has ended.
            let follows = lease.claim_no.compare_exchange(
                fence.claim_no - 1,
                fence.claim_no,
                Ordering::AcqRel,
                Ordering::Acquire,
            );
            if follows.is_ok() {
                lease.lock().renewed = Instant::now();
                return Registered::Adopted;
            }
        }
        Registered::New(self.insert(fence, None))
    }

    pub(crate) fn remove(&self, lease: &Arc<Lease>) {
        let mut held = self.lock();
        if held
            .get(&lease.id)
            .is_some_and(|other| is_same(other, lease))
        {
            held.remove(&lease.id);
        }
    }

    /// The request has ended without its claim: whoever holds it finds out when it goes on.
    pub(crate) fn forget(&self, id: RequestId) {
        let forgotten = self.lock().remove(&id);
        if let Some(lease) = forgotten.and_then(|lease| lease.upgrade()) {
            // A caller that is not polled would keep them for ever.
            lease.lock().slot = None;
        }
    }

    /// Whether the claim still stands, as far as this process knows.
    pub(crate) fn holds(&self, lease: &Arc<Lease>) -> bool {
        self.lock()
            .get(&lease.id)
            .is_some_and(|held| is_same(held, lease))
    }

    /// Whether the request is in this process's hands.
    pub(crate) fn is_driven(&self, id: RequestId) -> bool {
        self.get(id).is_some()
    }

    /// Whether the request came into this process's hands so lately that there is no need to ask how it is.
    pub(crate) fn is_fresh(&self, id: RequestId, age: Duration) -> bool {
        self.get(id)
            .is_some_and(|lease| lease.lock().since.elapsed() < age)
    }

    /// Those whose result waits for its commit.
    pub(crate) fn settling(&self) -> Vec<Arc<Lease>> {
        let mut held = self.all();
        held.retain(|lease| lease.lock().phase == Phase::Settling);
        held
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.lock().values().all(|lease| lease.strong_count() == 0)
    }

    pub(crate) fn all(&self) -> Vec<Arc<Lease>> {
        self.lock().values().filter_map(Weak::upgrade).collect()
    }

    fn get(&self, id: RequestId) -> Option<Arc<Lease>> {
        self.lock().get(&id)?.upgrade()
    }

    /// The claims whose leases are due for renewal, sorted. Those past their hard deadline are let go.
    fn due(&self, after: Duration) -> Vec<(Uuid, i32)> {
        let now = Instant::now();
        let mut due = Vec::new();
        let mut lapsed = Vec::new();
        for lease in self.all() {
            let mut state = lease.lock();
            match state.phase {
                Phase::Sending(deadline) if deadline <= now => {
                    state.slot = None;
                    lapsed.push(Arc::clone(&lease));
                }
                Phase::Sending(_) | Phase::Waiting | Phase::Settling
                    if now - state.renewed >= after =>
                {
                    state.renewed = now;
                    let fence = lease.fence();
                    due.push((fence.id.into(), fence.claim_no));
                }
                _ => {}
            }
        }
        for lease in lapsed {
            self.remove(&lease);
        }
        self.lock().retain(|_, lease| lease.strong_count() > 0);
        due.sort_unstable();
        due
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<RequestId, Weak<Lease>>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn is_same(held: &Weak<Lease>, lease: &Arc<Lease>) -> bool {
    std::ptr::eq(held.as_ptr(), Arc::as_ptr(lease))
}

/// Renews leases for as long as the engine lives. A third of the lease leaves time for two more tries.
pub(crate) async fn renew(shared: Arc<Shared>) {
    let lease = shared.config.lease;
    let interval = lease / 3;
    // Looked at more often than renewed, so that no lease is a whole interval late.
    let mut ticks = tokio::time::interval(interval / 3);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let due = shared.leases.due(interval);
        if due.is_empty() {
            continue;
        }
        let (ids, claim_nos): (Vec<_>, Vec<_>) = due.into_iter().unzip();
        let renewed = shared
            .db
            .run(move |connection| {
                Box::pin(async move { claim::renew(connection, &ids, &claim_nos, lease).await })
            })
            .await;
        if let Err(error) = renewed {
            log::warn!("renewing leases failed: {}", error.error);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fence(claim_no: i32) -> Fence {
        Fence {
            id: RequestId::from(Uuid::from_u128(7)),
            claim_no,
        }
    }

    #[test]
    fn a_claim_that_was_lost_with_its_owner_is_not_renewed_and_its_request_is_taken_anew() {
        let leases = Leases::default();
        let lease = leases.insert(fence(1), None);
        lease.settling();
        assert_eq!(leases.due(Duration::ZERO).len(), 1);
        assert!(matches!(leases.register(fence(2)), Registered::Adopted));
        // As by a panic of what settles it.
        drop(lease);
        assert!(leases.due(Duration::ZERO).is_empty());
        assert!(leases.is_empty());
        assert!(matches!(leases.register(fence(3)), Registered::New(_)));
    }
}
