//! The claims that this process holds.
//!
//! A lease is due for renewal while its attempt is being sent or its result waits for its commit,
//! but never past the attempt's hard deadline: a caller that keeps a future without polling it
//! keeps neither the slot nor the lease.

use std::collections::HashMap;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use sqlxmq::CurrentJob;

use crate::id::RequestId;
use crate::store::settle::Fence;

use super::bodies::Room;
use super::gate::Seen;
use super::slots::Slot;

/// How long a claim that is held for its retry keeps the room of its body: longer than any delay
/// for which it is held.
const MAX_HELD: Duration = Duration::from_secs(90);

/// One claim. Its number is read when it is settled, because a poll may have raised it in between.
#[derive(Debug)]
pub(crate) struct Lease {
    pub(crate) id: RequestId,
    claim_no: AtomicI32,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    state: LeaseState,
    /// When this process got the claim.
    since: Instant,
    renewed: Instant,
    /// Held while an attempt is made.
    slot: Option<Slot>,
    /// What a large body takes of this process's memory, also between attempts.
    room: Option<Room>,
    /// The claim of a poll. sqlxmq's runner counts the request as running until it is dropped.
    current: Option<CurrentJob>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum LeaseState {
    /// Held until its next attempt. The row's due time includes a lease.
    Held,
    /// Waiting for a slot or its body, owned by the engine.
    Waiting,
    /// Being sent, until this hard deadline at most.
    Sending(Instant),
    /// Sent; the result waits for its commit.
    Settling,
}

impl Inner {
    fn give_up(&mut self) {
        self.slot = None;
        self.room = None;
        self.current = None;
    }
}

impl Lease {
    pub(crate) fn fence(&self) -> Fence {
        Fence {
            id: self.id,
            claim_no: self.claim_no.load(Ordering::Acquire),
        }
    }

    pub(crate) fn mark_sending(&self, deadline: Instant) {
        self.lock().state = LeaseState::Sending(deadline);
    }

    pub(crate) fn mark_waiting(&self) {
        self.lock().state = LeaseState::Waiting;
    }

    /// Notes that the attempt is over. Its body keeps its room if the claim is held for a retry.
    pub(crate) fn mark_settling(&self, held: bool) {
        let mut inner = self.lock();
        inner.state = LeaseState::Settling;
        inner.slot = None;
        if !held {
            inner.room = None;
        }
    }

    /// Whether the attempt has its slot. One that was taken before this process knew of limits and
    /// pauses is given back.
    pub(crate) fn keeps_slot(&self) -> bool {
        let mut inner = self.lock();
        let early = inner.slot.take_if(|slot| slot.is_early());
        let keeps = inner.slot.is_some();
        drop(inner);
        // Outside of the lock: the gate has its own.
        drop(early);
        keeps
    }

    /// Notes what the attempt has shown of its destination.
    pub(crate) fn note(&self, seen: Seen) {
        if let Some(slot) = &self.lock().slot {
            slot.note(seen);
        }
    }

    pub(crate) fn take_slot(&self, slot: Slot) {
        self.lock().slot = Some(slot);
    }

    pub(crate) fn has_room(&self) -> bool {
        self.lock().room.is_some()
    }

    /// Takes the room for the body.
    pub(crate) fn take_room(&self, room: Option<Room>) {
        self.lock().room = room;
    }

    /// Gives the room to the lease that follows this one.
    pub(crate) fn give_room(&self) -> Option<Room> {
        self.lock().room.take()
    }

    /// Keeps the runner's count of the request until the result is settled, or given up.
    pub(crate) fn take_current(&self, current: CurrentJob) {
        self.lock().current = Some(current);
    }

    pub(crate) fn has_current(&self) -> bool {
        self.lock().current.is_some()
    }

    /// Gives the runner's count of the request to its result.
    pub(crate) fn give_current(&self) -> Option<CurrentJob> {
        self.lock().current.take()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// All claims of this process. Each belongs to the task that drives its request. A claim whose
/// owner is gone, after a panic, is not renewed, so another claim takes its request over.
#[derive(Debug, Default)]
pub(crate) struct Leases {
    held: Mutex<HashMap<RequestId, Weak<Lease>>>,
}

/// What a polled claim means to this process.
pub(crate) enum Registered {
    New(Arc<Lease>),
    /// The request is in flight here already and its lease had run out. The attempt continues under
    /// the new number.
    Adopted,
}

impl Leases {
    /// Adds the claim of a request that this process has no other claim of.
    pub(crate) fn insert(
        &self,
        fence: Fence,
        slot: Option<Slot>,
        room: Option<Room>,
    ) -> Arc<Lease> {
        let lease = Arc::new(Lease {
            id: fence.id,
            claim_no: AtomicI32::new(fence.claim_no),
            inner: Mutex::new(Inner {
                state: LeaseState::Held,
                since: Instant::now(),
                renewed: Instant::now(),
                slot,
                room,
                current: None,
            }),
        });
        self.lock().insert(fence.id, Arc::downgrade(&lease));
        lease
    }

    /// Adds a polled claim.
    pub(crate) fn register(&self, fence: Fence) -> Registered {
        if let Some(lease) = self.get(fence.id) {
            // If the number rose by more than one, this process released the claim in between, and
            // the old attempt has ended.
            let before = lease.fence();
            let follows = before.next() == fence
                && lease
                    .claim_no
                    .compare_exchange(
                        before.claim_no,
                        fence.claim_no,
                        Ordering::AcqRel,
                        Ordering::Acquire,
                    )
                    .is_ok();
            if follows {
                lease.lock().renewed = Instant::now();
                return Registered::Adopted;
            }
        }
        Registered::New(self.insert(fence, None, None))
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

    /// Removes the claim of a request that finished without it. The claim's owner notices at its
    /// next step.
    pub(crate) fn forget(&self, id: RequestId) {
        let forgotten = self.lock().remove(&id);
        if let Some(lease) = forgotten.and_then(|lease| lease.upgrade()) {
            // A caller that isn't polled would keep them for ever.
            lease.lock().give_up();
        }
    }

    /// Whether the claim still stands, as far as this process knows.
    pub(crate) fn holds(&self, lease: &Arc<Lease>) -> bool {
        self.lock()
            .get(&lease.id)
            .is_some_and(|held| is_same(held, lease))
    }

    /// Whether this process has a claim of the request.
    pub(crate) fn is_driven(&self, id: RequestId) -> bool {
        self.get(id).is_some()
    }

    /// Whether this process has had a claim of the request for less than `age`.
    pub(crate) fn is_fresh(&self, id: RequestId, age: Duration) -> bool {
        self.get(id)
            .is_some_and(|lease| lease.lock().since.elapsed() < age)
    }

    /// The claims whose result waits for its commit.
    pub(crate) fn unsettled(&self) -> Vec<Arc<Lease>> {
        let mut held = self.all();
        held.retain(|lease| lease.lock().state == LeaseState::Settling);
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

    /// The claims whose leases are due for renewal, sorted by id. Claims past their hard deadline
    /// are removed.
    pub(crate) fn due(&self, after: Duration) -> Vec<Fence> {
        let now = Instant::now();
        let mut due = Vec::new();
        let mut lapsed = Vec::new();
        for lease in self.all() {
            let mut inner = lease.lock();
            match inner.state {
                LeaseState::Sending(deadline) if deadline <= now => {
                    inner.give_up();
                    lapsed.push(Arc::clone(&lease));
                }
                LeaseState::Sending(_) | LeaseState::Waiting | LeaseState::Settling
                    if now - inner.renewed >= after =>
                {
                    inner.renewed = now;
                    due.push(lease.fence());
                }
                // Its caller isn't polled, or it would have been sent by now.
                LeaseState::Held if now - inner.since >= MAX_HELD => inner.give_up(),
                _ => {}
            }
        }
        for lease in lapsed {
            self.remove(&lease);
        }
        self.lock().retain(|_, lease| lease.strong_count() > 0);
        due.sort_unstable_by_key(|fence| fence.id);
        due
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<RequestId, Weak<Lease>>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn is_same(held: &Weak<Lease>, lease: &Arc<Lease>) -> bool {
    std::ptr::eq(held.as_ptr(), Arc::as_ptr(lease))
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    fn fence(claim_no: i32) -> Fence {
        Fence {
            id: RequestId::from(Uuid::from_u128(7)),
            claim_no,
        }
    }

    #[test]
    fn a_claim_whose_owner_is_gone_is_not_renewed_but_replaced() {
        let leases = Leases::default();
        let lease = leases.insert(fence(1), None, None);
        lease.mark_settling(false);
        assert_eq!(leases.due(Duration::ZERO).len(), 1);
        assert!(matches!(leases.register(fence(2)), Registered::Adopted));
        // As after a panic in the settle lane.
        drop(lease);
        assert!(leases.due(Duration::ZERO).is_empty());
        assert!(leases.is_empty());
        assert!(matches!(leases.register(fence(3)), Registered::New(_)));
    }
}
