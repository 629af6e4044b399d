//! Which attempts may begin now.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Instant;

use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};

use super::gate::{Full, Gate, Pass, Seen, Turn};
use crate::engine::meter::Meter;
use crate::recorder::LimitedHow;

/// How many results may wait for their commit before new requests are left to the queue, or the
/// concurrency if that is more.
const MAX_UNSETTLED: usize = 1024;
/// The part of the runner's room that results may take while they wait for others to share their
/// commit: one in four.
const ROOM_SHARE: usize = 4;

/// The slots of an engine, and the results that wait for their commit.
#[derive(Debug)]
pub(crate) struct Slots {
    concurrency: usize,
    /// Which destinations may take one.
    pub(crate) gate: Arc<Gate>,
    meter: Arc<Meter>,
    attempts: Arc<Semaphore>,
    /// Half of the slots. During a backlog, new requests may only use these, so that they can't
    /// starve the requests in the queue.
    inline: Arc<Semaphore>,
    /// The last poll that brought claims left more requests behind.
    backlog: AtomicBool,
    /// Cloned for each result that waits for its commit.
    results: Arc<Results>,
}

/// The results that wait for their commit.
#[derive(Debug)]
struct Results {
    bytes: AtomicUsize,
    /// From this many bytes on, no attempt begins.
    max_bytes: usize,
    /// Notified when there are fewer bytes than that again.
    settled: Notify,
}

/// A permit for one concurrent attempt.
#[derive(Debug)]
pub(crate) struct Slot {
    _attempt: OwnedSemaphorePermit,
    _inline: Option<OwnedSemaphorePermit>,
    pass: Pass,
}

impl Slot {
    /// Whether it was taken before this process knew what the database knows of destinations.
    pub(super) fn is_early(&self) -> bool {
        self.pass.is_early()
    }

    /// Notes what the attempt has shown of its destination.
    pub(super) fn note(&self, seen: Seen) {
        self.pass.note(seen);
    }
}

/// Why a new request has no slot at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NoSlot {
    /// A poll claims the request.
    Busy,
    /// The request's destination takes no more now.
    Full,
    /// As `Full`, until the database has answered or another attempt has ended.
    Short,
}

/// Counts a result that waits for its commit, until it is dropped.
#[derive(Debug)]
pub(crate) struct Unsettled {
    results: Arc<Results>,
    bytes: usize,
}

impl Unsettled {
    /// The size that the result had when it was counted.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Unsettled {
    fn drop(&mut self) {
        let Results {
            bytes,
            max_bytes,
            settled,
        } = &*self.results;
        let before = bytes.fetch_sub(self.bytes, Ordering::SeqCst);
        if before >= *max_bytes && before - self.bytes < *max_bytes {
            settled.notify_waiters();
        }
    }
}

impl Results {
    fn are_too_large(&self) -> bool {
        self.bytes.load(Ordering::SeqCst) >= self.max_bytes
    }

    async fn are_settled(&self) {
        loop {
            let settled = self.settled.notified();
            if !self.are_too_large() {
                return;
            }
            settled.await;
        }
    }
}

impl Slots {
    pub(super) fn new(
        concurrency: usize,
        gate: Arc<Gate>,
        meter: Arc<Meter>,
        max_unsettled_bytes: usize,
    ) -> Self {
        Self {
            concurrency,
            gate,
            meter,
            attempts: Arc::new(Semaphore::new(concurrency)),
            inline: Arc::new(Semaphore::new(concurrency.div_ceil(2))),
            backlog: AtomicBool::new(false),
            results: Arc::new(Results {
                bytes: AtomicUsize::new(0),
                max_bytes: max_unsettled_bytes,
                settled: Notify::new(),
            }),
        }
    }

    /// Waits for a slot, and while the results that wait for their commit are too large. An error
    /// says that the destination takes no more attempts for a while.
    pub(crate) async fn acquire(&self, destination: &str, turn: Turn) -> Result<Slot, Full> {
        if !self.gate.has_looked() {
            Box::pin(self.gate.looks()).await;
        }
        // The pass first: no slot waits for a destination.
        let mut pass = match self.gate.try_enter(destination, turn) {
            Err(Full::Soon | Full::Short) => Box::pin(self.enter(destination, turn)).await?,
            entered => entered?,
        };
        let attempt = Arc::clone(&self.attempts).acquire_owned().await;
        // The semaphore is never closed.
        let attempt = attempt.map_err(|_closed| Full::Lasting)?;
        if self.results.are_too_large() {
            // With the slot, in the order of arrival: no result needs a slot to be settled.
            Box::pin(self.results.are_settled()).await;
        }
        pass.begin();
        Ok(Slot {
            _attempt: attempt,
            _inline: None,
            pass,
        })
    }

    /// Waits for a pass.
    async fn enter(&self, destination: &str, turn: Turn) -> Result<Pass, Full> {
        let began = Instant::now();
        let pass = self.gate.enter(destination, turn).await?;
        let how = LimitedHow::Waited(began.elapsed());
        self.meter.limited(destination, how);
        Ok(pass)
    }

    /// How many attempts are under way.
    pub(crate) fn in_use(&self) -> usize {
        let free = self.attempts.available_permits();
        self.concurrency.saturating_sub(free)
    }

    /// A slot for the first attempt of a new request, if one is free and results don't pile up.
    pub(super) fn try_inline(&self, destination: &str) -> Result<Slot, NoSlot> {
        if self.is_behind() {
            return Err(NoSlot::Busy);
        }
        let mut pass =
            self.gate
                .try_enter(destination, Turn::First)
                .map_err(|full| match full {
                    Full::Soon => NoSlot::Busy,
                    Full::Short => NoSlot::Short,
                    Full::Lasting | Full::Later(_) => NoSlot::Full,
                })?;
        let taken = |slots: &Arc<Semaphore>| {
            Arc::clone(slots)
                .try_acquire_owned()
                .map_err(|_none_free| NoSlot::Busy)
        };
        let attempt = taken(&self.attempts)?;
        let inline = if self.backlog.load(Ordering::Relaxed) {
            Some(taken(&self.inline)?)
        } else {
            None
        };
        pass.begin();
        Ok(Slot {
            _attempt: attempt,
            _inline: inline,
            pass,
        })
    }

    /// Notes whether a poll left requests behind.
    pub(crate) fn set_backlog(&self, more: bool) {
        self.backlog.store(more, Ordering::Relaxed);
    }

    /// Counts a result that waits for its commit.
    pub(super) fn count_unsettled(&self, bytes: usize) -> Unsettled {
        self.results.bytes.fetch_add(bytes, Ordering::SeqCst);
        Unsettled {
            results: Arc::clone(&self.results),
            bytes,
        }
    }

    /// Whether results that wait for their commit take room that sqlxmq's runner could claim for.
    pub(super) fn unsettled_take_room(&self) -> bool {
        self.unsettled() >= self.concurrency / ROOM_SHARE
    }

    /// Whether so many results, or bytes of them, wait for their commit that no more may come.
    /// While the database takes requests faster than their results, memory must not grow with the
    /// difference. The number of results of polled requests is bounded by the runner's room.
    fn is_behind(&self) -> bool {
        self.unsettled() > MAX_UNSETTLED.max(self.concurrency) || self.results.are_too_large()
    }

    /// How many results wait for their commit.
    pub(crate) fn unsettled(&self) -> usize {
        Arc::strong_count(&self.results) - 1
    }
}

#[cfg(test)]
mod tests {
    use std::future::Future;
    use std::pin::pin;
    use std::task::{Context, Waker};
    use std::time::Duration;

    use super::*;
    use crate::destination::{DestinationPolicy, Policies};
    use crate::engine::attempt::gate::Rules;

    #[test]
    fn no_slot_is_had_until_results_are_below_their_limit() {
        let slots = Slots::new(
            3,
            Gate::new(Rules {
                slots: 3,
                share: 1.0,
                policies: Policies::default(),
                policy: DestinationPolicy::default(),
                lease: Duration::from_secs(15),
            }),
            Arc::default(),
            100,
        );
        slots.gate.note_look();
        let mut cx = Context::from_waker(Waker::noop());
        let small = slots.count_unsettled(60);
        assert!(slots.try_inline("a").is_ok());
        let large = slots.count_unsettled(1000);
        assert!(slots.try_inline("a").is_err());
        let mut acquired = [
            Box::pin(slots.acquire("a", Turn::First)),
            Box::pin(slots.acquire("b", Turn::First)),
        ];
        for slot in &mut acquired {
            assert!(slot.as_mut().poll(&mut cx).is_pending());
        }
        drop(small);
        assert!(acquired[0].as_mut().poll(&mut cx).is_pending());
        drop(large);
        for slot in &mut acquired {
            assert!(slot.as_mut().poll(&mut cx).is_ready());
        }
        assert!(
            pin!(slots.acquire("c", Turn::First))
                .poll(&mut cx)
                .is_ready()
        );
    }
}
