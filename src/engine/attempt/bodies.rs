//! The room for large request bodies in this process's memory.
//!
//! A large body gets its room first, then the slot of its attempt, and only then is it read from
//! the database. An attempt with a slot never waits for room, so neither can block the other for
//! ever. The room belongs to the lease. A claim that is held for its retry keeps it until another
//! body waits for room: a dead destination must not stop the large bodies of all others.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};

/// Larger bodies need room. The migrations have the same limit: polls bring no larger body along.
const LARGE: usize = 64 * 1024;
/// Room is counted in units of this many bytes.
const UNIT: usize = 1024;

#[derive(Debug)]
pub(crate) struct Bodies {
    /// In units.
    room: Arc<Semaphore>,
    all: u32,
    /// How many claims wait for room.
    waiting: AtomicUsize,
    /// Notified when a claim begins to wait.
    wanted: Notify,
}

/// The room of one body, until it is dropped.
#[derive(Debug)]
pub(crate) struct Room(OwnedSemaphorePermit);

/// Whether a body of this size needs room.
pub(crate) fn is_large(bytes: usize) -> bool {
    bytes > LARGE
}

impl Bodies {
    pub(super) fn new(max_bytes: usize) -> Self {
        let most = Semaphore::MAX_PERMITS.min(u32::MAX as usize);
        let all = max_bytes.div_ceil(UNIT).clamp(1, most) as u32;
        Self {
            room: Arc::new(Semaphore::new(all as usize)),
            all,
            waiting: AtomicUsize::new(0),
            wanted: Notify::new(),
        }
    }

    /// Room for a body of this size, if there is some now.
    pub(super) fn try_take(&self, bytes: usize) -> Option<Room> {
        let room = Arc::clone(&self.room);
        let taken = room.try_acquire_many_owned(self.units(bytes));
        taken.ok().map(Room)
    }

    /// Waits for room for a body of this size. `None` never comes: the semaphore stays open.
    pub(crate) async fn take(&self, bytes: usize) -> Option<Room> {
        if let Some(room) = self.try_take(bytes) {
            return Some(room);
        }
        let _waiting = Waiting::begin(self);
        let room = Arc::clone(&self.room);
        let taken = room.acquire_many_owned(self.units(bytes)).await;
        taken.ok().map(Room)
    }

    /// Waits until a claim waits for room.
    pub(super) async fn wanted(&self) {
        loop {
            let wanted = self.wanted.notified();
            if self.waiting.load(Ordering::SeqCst) > 0 {
                return;
            }
            wanted.await;
        }
    }

    /// A body that is larger than all the room takes all of it.
    fn units(&self, bytes: usize) -> u32 {
        bytes.div_ceil(UNIT).min(self.all as usize) as u32
    }
}

impl Room {
    /// Gives back what a body of this size doesn't need.
    pub(crate) fn shrink_to(&mut self, bytes: usize) {
        let surplus = self.0.num_permits().saturating_sub(bytes.div_ceil(UNIT));
        drop(self.0.split(surplus));
    }
}

/// Counts a claim that waits for room, until it is dropped.
struct Waiting<'a>(&'a Bodies);

impl<'a> Waiting<'a> {
    fn begin(bodies: &'a Bodies) -> Self {
        bodies.waiting.fetch_add(1, Ordering::SeqCst);
        bodies.wanted.notify_waiters();
        Self(bodies)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::task::{Context, Waker};

    use super::*;

    #[tokio::test]
    async fn a_body_waits_for_room_and_the_largest_is_alone() {
        let bodies = Bodies::new(100 * UNIT);
        let mut first = bodies.try_take(70 * UNIT).unwrap();
        assert!(bodies.try_take(31 * UNIT).is_none());
        first.shrink_to(60 * UNIT + 1);
        let second = bodies.try_take(39 * UNIT).unwrap();
        assert!(bodies.try_take(1).is_none());
        drop((first, second));
        let alone = bodies.try_take(1000 * UNIT).unwrap();
        assert!(bodies.try_take(1).is_none());
        drop(alone);
        assert!(bodies.try_take(100 * UNIT).is_some());
    }

    #[tokio::test]
    async fn room_is_wanted_while_a_body_waits_for_it() {
        use std::future::Future;

        let bodies = Bodies::new(100 * UNIT);
        let all = bodies.try_take(100 * UNIT).unwrap();
        let mut cx = Context::from_waker(Waker::noop());
        let mut wanted = pin!(bodies.wanted());
        assert!(wanted.as_mut().poll(&mut cx).is_pending());
        let mut taking = Box::pin(bodies.take(UNIT));
        assert!(taking.as_mut().poll(&mut cx).is_pending());
        assert!(wanted.as_mut().poll(&mut cx).is_ready());
        assert!(pin!(bodies.wanted()).poll(&mut cx).is_ready());
        // A claim that doesn't wait any more wants nothing, and has taken nothing.
        drop(taking);
        assert!(pin!(bodies.wanted()).poll(&mut cx).is_pending());
        drop(all);
        assert!(bodies.try_take(100 * UNIT).is_some());
    }
}
