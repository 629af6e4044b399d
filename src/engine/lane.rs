//! Group commit: items that arrive while one batch is written go into the next.
//!
//! An idle lane writes an urgent item at once, and a busy lane writes larger batches, so no timer
//! adds to a caller's latency. Items without a waiter are held for up to [`PATIENCE`] so that they
//! share a commit. That saves an fsync for callers who are waiting. Batches are capped by rows and
//! by bytes.
//!
//! When many items pile up, a second batch is written beside the first: one runs while the other
//! waits for the disk, and callers that were answered together don't stay in step for ever. An item
//! larger than a whole batch is written beside both, so that small items don't wait for it.

use std::collections::VecDeque;
use std::future::Future;
use std::pin::pin;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::{JoinError, JoinSet};
use tokio::time::{Instant, sleep_until};

use super::supervise::{Panics, Restarts};

const MAX_BATCH: usize = 256;
const MAX_BATCH_BYTES: usize = 8 * 1024 * 1024;
const MAX_WRITES: usize = 2;
/// How many items must wait before a second batch is written.
const SECOND_FROM: usize = 16;
/// So many items without a waiter are written without waiting for more.
const ENOUGH: usize = 64;
/// How many large items are written at the same time, beside the batches.
const MAX_LARGE: usize = 2;
/// How long an item without a waiter is held for others to join it. Tokio's timer adds up to a
/// millisecond.
const PATIENCE: Duration = Duration::from_millis(1);

/// What a lane writes.
pub(crate) trait Item {
    /// About how many bytes the item moves.
    fn size(&self) -> usize;

    /// Whether a caller waits until the item is written.
    fn is_urgent(&self) -> bool;
}

/// Hands incoming items to `write`, a batch at a time, until the last sender is gone and everything
/// is written. A panic of a write loses its batch.
pub(crate) async fn run<T, F>(
    panics: &Panics,
    name: &'static str,
    incoming: mpsc::UnboundedReceiver<T>,
    write: impl Fn(Vec<T>) -> F,
) where
    T: Item,
    F: Future<Output = ()> + Send + 'static,
{
    // Outlives a panic of the loop.
    let mut lane = Lane {
        incoming,
        open: true,
        arrived: VecDeque::new(),
        batch: Batch::default(),
        large: VecDeque::new(),
        writes: JoinSet::new(),
        large_writes: JoinSet::new(),
    };
    let mut restarts = Restarts::new(panics, name);
    while panics
        .catch(name, lane.run(panics, name, &write))
        .await
        .is_none()
    {
        restarts.pause().await;
    }
}

struct Lane<T> {
    incoming: mpsc::UnboundedReceiver<T>,
    /// There may be more incoming items.
    open: bool,
    /// Items that are not sorted yet into the batch and the large ones.
    arrived: VecDeque<T>,
    batch: Batch<T>,
    large: VecDeque<T>,
    writes: JoinSet<()>,
    large_writes: JoinSet<()>,
}

impl<T: Item> Lane<T> {
    async fn run<F>(&mut self, panics: &Panics, name: &'static str, write: &impl Fn(Vec<T>) -> F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let check = |written: Result<(), JoinError>| {
            if written.is_err() {
                panics.note(name);
            }
        };
        let mut received = Vec::with_capacity(MAX_BATCH);
        let mut patience = pin!(sleep_until(Instant::now()));
        loop {
            let Self {
                incoming,
                open,
                arrived,
                batch,
                large,
                writes,
                large_writes,
            } = &mut *self;
            if arrived.is_empty() {
                let has_room = *open && batch.has_room();
                tokio::select! {
                    biased;
                    Some(written) = writes.join_next() => check(written),
                    Some(written) = large_writes.join_next() => check(written),
                    count = incoming.recv_many(&mut received, MAX_BATCH), if has_room => {
                        *open = count > 0;
                    }
                    () = &mut patience, if batch.is_patient() => batch.hurry(),
                    // No write is under way and no item will come.
                    else => break,
                }
                // Neither this nor the way back copies an item.
                *arrived = VecDeque::from(std::mem::take(&mut received));
            }
            let was_empty = batch.is_empty();
            while let Some(item) = arrived.pop_front() {
                if item.size() > MAX_BATCH_BYTES {
                    large.push_back(item);
                } else {
                    batch.push(item);
                }
            }
            received = Vec::from(std::mem::take(arrived));
            if !*open {
                batch.hurry();
            }
            if was_empty && batch.is_patient() {
                patience.as_mut().reset(Instant::now() + PATIENCE);
            }
            while large_writes.len() < MAX_LARGE {
                let Some(item) = large.pop_front() else {
                    break;
                };
                large_writes.spawn(write(vec![item]));
            }
            while writes.len() < batch.wanted_writes() {
                writes.spawn(write(batch.take()));
            }
        }
    }
}

/// The items that wait to be written.
struct Batch<T> {
    items: VecDeque<T>,
    urgent: bool,
}

impl<T> Default for Batch<T> {
    fn default() -> Self {
        Self {
            items: VecDeque::with_capacity(MAX_BATCH),
            urgent: false,
        }
    }
}

impl<T: Item> Batch<T> {
    fn push(&mut self, item: T) {
        self.urgent |= item.is_urgent();
        self.items.push_back(item);
    }

    /// The items have been held for long enough.
    fn hurry(&mut self) {
        self.urgent = true;
    }

    fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    fn is_patient(&self) -> bool {
        !self.items.is_empty() && !self.urgent
    }

    /// Further items wait in the channel.
    fn has_room(&self) -> bool {
        self.items.len() < MAX_BATCH
    }

    fn wanted_writes(&self) -> usize {
        match self.items.len() {
            0 => 0,
            1..ENOUGH if !self.urgent => 0,
            1..SECOND_FROM => 1,
            _ => MAX_WRITES,
        }
    }

    /// The items of the next write.
    fn take(&mut self) -> Vec<T> {
        let mut bytes = 0;
        let fits = self.items.iter().take(MAX_BATCH).take_while(|item| {
            bytes += item.size();
            bytes <= MAX_BATCH_BYTES
        });
        let count = fits.count();
        let taken = self.items.drain(..count).collect();
        // The remaining items have waited already.
        self.urgent &= !self.items.is_empty();
        taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, PartialEq, Eq)]
    enum Thing {
        Body(usize),
        Waited,
        /// Its write panics.
        Bad,
        /// The lane itself panics.
        Worse,
    }

    impl Item for Thing {
        fn size(&self) -> usize {
            match self {
                Self::Body(size) => *size,
                Self::Waited | Self::Bad => 0,
                Self::Worse => panic!("an item as bad as can be"),
            }
        }

        fn is_urgent(&self) -> bool {
            *self == Self::Waited
        }
    }

    /// A lane, and the batches that it writes with their times.
    fn lane() -> (
        mpsc::UnboundedSender<Thing>,
        mpsc::UnboundedReceiver<(Vec<Thing>, Instant)>,
    ) {
        let (sender, incoming) = mpsc::unbounded_channel();
        let (written, batches) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            let write = |batch: Vec<Thing>| {
                let written = written.clone();
                async move {
                    assert!(!batch.contains(&Thing::Bad), "a batch as bad as can be");
                    let _ = written.send((batch, Instant::now()));
                }
            };
            run(&Panics::default(), "lane", incoming, write).await;
        });
        (sender, batches)
    }

    #[tokio::test(start_paused = true)]
    async fn items_without_a_waiter_are_written_together_a_moment_later() {
        let (lane, mut written) = lane();
        let began = Instant::now();
        for _ in 0..3 {
            lane.send(Thing::Body(1)).unwrap();
            tokio::task::yield_now().await;
        }
        let (batch, at) = written.recv().await.unwrap();
        assert_eq!(batch.len(), 3);
        let took = at - began;
        assert!((PATIENCE..=2 * PATIENCE).contains(&took), "after {took:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn an_urgent_item_and_those_before_it_are_written_at_once() {
        let (lane, mut written) = lane();
        let began = Instant::now();
        lane.send(Thing::Body(1)).unwrap();
        tokio::task::yield_now().await;
        lane.send(Thing::Waited).unwrap();
        let (batch, at) = written.recv().await.unwrap();
        assert_eq!(batch, [Thing::Body(1), Thing::Waited]);
        assert_eq!(at, began);
    }

    #[tokio::test(start_paused = true)]
    async fn enough_are_written_at_once() {
        let (lane, mut written) = lane();
        let began = Instant::now();
        for _ in 0..ENOUGH {
            lane.send(Thing::Body(1)).unwrap();
        }
        let (batch, at) = written.recv().await.unwrap();
        assert_eq!(batch.len(), ENOUGH);
        assert_eq!(at, began);
    }

    #[tokio::test(start_paused = true)]
    async fn batches_are_capped_by_bytes_and_what_is_over_them_goes_beside() {
        let (lane, mut written) = lane();
        let half = MAX_BATCH_BYTES / 2;
        for size in [half, half, half, MAX_BATCH_BYTES + 1] {
            lane.send(Thing::Body(size)).unwrap();
        }
        drop(lane);
        let mut batches = Vec::new();
        while let Some((batch, _)) = written.recv().await {
            batches.push(batch.iter().map(Item::size).collect::<Vec<_>>());
        }
        batches.sort();
        assert_eq!(
            batches,
            [vec![half], vec![half, half], vec![MAX_BATCH_BYTES + 1]]
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_panic_of_the_lane_loses_no_other_item() {
        let (lane, mut written) = lane();
        for item in [Thing::Body(1), Thing::Worse, Thing::Body(2), Thing::Waited] {
            lane.send(item).unwrap();
        }
        let batch = written.recv().await.unwrap().0;
        assert_eq!(batch, [Thing::Body(1), Thing::Body(2), Thing::Waited]);
        drop(lane);
        assert!(written.recv().await.is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn a_batch_that_is_lost_does_not_stop_the_lane() {
        let (lane, mut written) = lane();
        lane.send(Thing::Bad).unwrap();
        tokio::time::sleep(2 * PATIENCE).await;
        lane.send(Thing::Waited).unwrap();
        assert_eq!(written.recv().await.unwrap().0, [Thing::Waited]);
    }
}
