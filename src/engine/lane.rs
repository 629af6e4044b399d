//! Group commit: what piles up while one batch is written goes into the next.
//!
//! An idle lane writes at once what somebody waits for, and a busy one writes more at a time: no timer adds to a caller's latency. What nobody
//! waits for is given a moment for others to join it, which spares the disk, and callers who wait for it. Batches are capped by rows and
//! by bytes.
//! When much piles up, a second batch is written beside the first: one is carried out while the other waits for the disk, and
//! callers that were answered together don't go on in step for ever. What is over a batch's bytes by itself goes beside them, so that the
//! small ones don't wait for it.

use std::collections::VecDeque;
use std::future::Future;
use std::pin::pin;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::{JoinError, JoinSet};
use tokio::time::{Instant, sleep_until};

const MAX_BATCH: usize = 256;
const MAX_BATCH_BYTES: usize = 8 * 1024 * 1024;
const MAX_WRITES: usize = 2;
/// How many have to wait for a second batch.
const SECOND_FROM: usize = 16;
/// How many wait for no others, though nobody waits for them.
const ENOUGH: usize = 64;
/// How many large ones are written at a time, beside the lane.
const MAX_LARGE: usize = 2;
/// How long something waits for others at most that nobody waits for. Tokio's clock makes up to a millisecond more of it.
const PATIENCE: Duration = Duration::from_millis(1);

/// What a lane asks of what it writes.
pub(crate) trait Item {
    /// In bytes, about.
    fn size(&self) -> usize;

    /// Whether somebody waits until it is written.
    fn is_urgent(&self) -> bool;
}

/// Hands what comes to `write`, a batch at a time, until the last sender is gone and everything is written.
pub(crate) async fn run<T, F>(mut incoming: mpsc::UnboundedReceiver<T>, write: impl Fn(Vec<T>) -> F)
where
    T: Item,
    F: Future<Output = ()> + Send + 'static,
{
    let mut writes = JoinSet::new();
    let mut large_writes = JoinSet::new();
    let mut batch = Batch::default();
    let mut large = VecDeque::new();
    let mut came = Vec::with_capacity(MAX_BATCH);
    let mut open = true;
    let mut patience = pin!(sleep_until(Instant::now()));
    loop {
        tokio::select! {
            biased;
            Some(written) = writes.join_next() => check(written),
            Some(written) = large_writes.join_next() => check(written),
            count = incoming.recv_many(&mut came, MAX_BATCH), if open && batch.has_room() => open = count > 0,
            () = &mut patience, if batch.is_patient() => batch.hurry(),
            // Nothing is written and nothing will come.
            else => break,
        }
        let was_empty = batch.is_empty();
        for item in came.drain(..) {
            if item.size() > MAX_BATCH_BYTES {
                large.push_back(item);
            } else {
                batch.push(item);
            }
        }
        if !open {
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

/// A panic would be a fault of this crate's; it must not go unnoticed.
fn check(written: Result<(), JoinError>) {
    if let Err(error) = written {
        log::error!("a batch was not written: {error}");
    }
}

/// What waits to be written.
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

    /// It has waited for long enough.
    fn hurry(&mut self) {
        self.urgent = true;
    }

    fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    fn is_patient(&self) -> bool {
        !self.items.is_empty() && !self.urgent
    }

    /// What is not taken waits in the channel.
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

    /// As much as goes into one write.
    fn take(&mut self) -> Vec<T> {
        let mut bytes = 0;
        let fits = self.items.iter().take(MAX_BATCH).take_while(|item| {
            bytes += item.size();
            bytes <= MAX_BATCH_BYTES
        });
        let count = fits.count();
        let taken = self.items.drain(..count).collect();
        // What is left has waited already.
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
        Bad,
    }

    impl Item for Thing {
        fn size(&self) -> usize {
            match self {
                Self::Body(size) => *size,
                Self::Waited | Self::Bad => 0,
            }
        }

        fn is_urgent(&self) -> bool {
            *self == Self::Waited
        }
    }

    /// A lane, and what it writes with the time of it.
    fn lane() -> (
        mpsc::UnboundedSender<Thing>,
        mpsc::UnboundedReceiver<(Vec<Thing>, Instant)>,
    ) {
        let (sender, incoming) = mpsc::unbounded_channel();
        let (written, batches) = mpsc::unbounded_channel();
        tokio::spawn(run(incoming, move |batch: Vec<Thing>| {
            let written = written.clone();
            async move {
                assert!(!batch.contains(&Thing::Bad), "a batch as bad as can be");
                let _ = written.send((batch, Instant::now()));
            }
        }));
        (sender, batches)
    }

    #[tokio::test(start_paused = true)]
    async fn what_nobody_waits_for_is_written_together_a_moment_later() {
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
    async fn what_somebody_waits_for_is_written_at_once_and_all_that_is_there_with_it() {
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
    async fn a_batch_that_is_lost_does_not_stop_the_lane() {
        let (lane, mut written) = lane();
        lane.send(Thing::Bad).unwrap();
        tokio::time::sleep(2 * PATIENCE).await;
        lane.send(Thing::Waited).unwrap();
        assert_eq!(written.recv().await.unwrap().0, [Thing::Waited]);
    }
}
