//! Group commit: what piles up while one batch is written goes into the next.
//!
//! No timer, so no added latency: an idle lane writes at once, a busy one writes more at a time. Batches are capped by rows and by bytes.
//! When much piles up, a second batch is written beside the first: one is carried out while the other waits for the disk, and
//! callers that were answered together don't go on in step for ever. What is over a batch's bytes by itself goes beside them, so that the
//! small ones don't wait for it.

use std::collections::VecDeque;
use std::future::Future;

use tokio::sync::mpsc;
use tokio::task::{JoinError, JoinSet};

const MAX_BATCH: usize = 256;
const MAX_BATCH_BYTES: usize = 8 * 1024 * 1024;
const MAX_WRITES: usize = 2;
/// How many have to wait for a second batch.
const SECOND_FROM: usize = 16;
/// How many large ones are written at a time, beside the lane.
const MAX_LARGE: usize = 2;

/// Hands what comes to `write`, a batch at a time, until the last sender is gone and everything is written.
pub(crate) async fn run<T, F>(
    mut incoming: mpsc::UnboundedReceiver<T>,
    size: impl Fn(&T) -> usize,
    write: impl Fn(Vec<T>) -> F,
) where
    F: Future<Output = ()> + Send + 'static,
{
    let mut writes = JoinSet::new();
    let mut large_writes = JoinSet::new();
    let mut batch = Batch::default();
    let mut large = VecDeque::new();
    let mut came = Vec::with_capacity(MAX_BATCH);
    let mut open = true;
    loop {
        tokio::select! {
            biased;
            Some(written) = writes.join_next() => check(written),
            Some(written) = large_writes.join_next() => check(written),
            count = incoming.recv_many(&mut came, MAX_BATCH), if open && batch.has_room() => open = count > 0,
            // Nothing is written and nothing will come.
            else => break,
        }
        for item in came.drain(..) {
            match size(&item) {
                bytes if bytes > MAX_BATCH_BYTES => large.push_back(item),
                bytes => batch.push(item, bytes),
            }
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
    items: VecDeque<(T, usize)>,
}

impl<T> Default for Batch<T> {
    fn default() -> Self {
        Self {
            items: VecDeque::with_capacity(MAX_BATCH),
        }
    }
}

impl<T> Batch<T> {
    fn push(&mut self, item: T, bytes: usize) {
        self.items.push_back((item, bytes));
    }

    /// What is not taken waits in the channel.
    fn has_room(&self) -> bool {
        self.items.len() < MAX_BATCH
    }

    fn wanted_writes(&self) -> usize {
        match self.items.len() {
            0 => 0,
            1..SECOND_FROM => 1,
            _ => MAX_WRITES,
        }
    }

    /// As much as goes into one write.
    fn take(&mut self) -> Vec<T> {
        let mut bytes = 0;
        let fits = self.items.iter().take(MAX_BATCH).take_while(|(_, size)| {
            bytes += size;
            bytes <= MAX_BATCH_BYTES
        });
        let count = fits.count();
        self.items.drain(..count).map(|(item, _)| item).collect()
    }
}
