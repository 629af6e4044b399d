//! Which attempts may begin now.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

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
    attempts: Arc<Semaphore>,
    /// Half of the slots. During a backlog, new requests may only use these, so that they can't
    /// starve the requests in the queue.
    inline: Arc<Semaphore>,
    /// The last poll that brought claims left more requests behind.
    backlog: AtomicBool,
    /// Cloned for each result that waits for its commit.
    unsettled: Arc<()>,
}

/// A permit for one concurrent attempt.
#[derive(Debug)]
pub(crate) struct Slot {
    _attempt: OwnedSemaphorePermit,
    _inline: Option<OwnedSemaphorePermit>,
}

/// Counts a result that waits for its commit, until it is dropped.
#[derive(Debug)]
pub(crate) struct Unsettled(#[expect(dead_code, reason = "only counted")] Arc<()>);

impl Slots {
    pub(super) fn new(concurrency: usize) -> Self {
        Self {
            concurrency,
            attempts: Arc::new(Semaphore::new(concurrency)),
            inline: Arc::new(Semaphore::new(concurrency.div_ceil(2))),
            backlog: AtomicBool::new(false),
            unsettled: Arc::default(),
        }
    }

    /// Waits for a slot.
    pub(super) async fn acquire(&self) -> Option<Slot> {
        let attempt = Arc::clone(&self.attempts).acquire_owned().await.ok()?;
        Some(Slot {
            _attempt: attempt,
            _inline: None,
        })
    }

    /// A slot for the first attempt of a new request, if one is free and results don't pile up.
    pub(super) fn try_inline(&self) -> Option<Slot> {
        if self.is_behind() {
            return None;
        }
        let attempt = Arc::clone(&self.attempts).try_acquire_owned().ok()?;
        let inline = if self.backlog.load(Ordering::Relaxed) {
            Some(Arc::clone(&self.inline).try_acquire_owned().ok()?)
        } else {
            None
        };
        Some(Slot {
            _attempt: attempt,
            _inline: inline,
        })
    }

    /// Notes whether a poll left requests behind.
    pub(crate) fn set_backlog(&self, more: bool) {
        self.backlog.store(more, Ordering::Relaxed);
    }

    /// Counts a result that waits for its commit.
    pub(super) fn count_unsettled(&self) -> Unsettled {
        Unsettled(Arc::clone(&self.unsettled))
    }

    /// Whether results that wait for their commit take room that sqlxmq's runner could claim for.
    pub(super) fn unsettled_take_room(&self) -> bool {
        self.unsettled() >= self.concurrency / ROOM_SHARE
    }

    /// Whether so many results wait for their commit that no more may come. While the database
    /// takes requests faster than their results, memory must not grow with the difference. Results
    /// of polled requests are bounded by the runner's room.
    fn is_behind(&self) -> bool {
        self.unsettled() > MAX_UNSETTLED.max(self.concurrency)
    }

    fn unsettled(&self) -> usize {
        Arc::strong_count(&self.unsettled) - 1
    }
}
