//! Group commit: one writer, and whatever piled up while it wrote.
//!
//! No timer, so no added latency: an idle lane writes at once, a busy one writes more at a time. Batches are capped by rows
//! and by bytes. What is over a batch's bytes by itself is written beside the lane, so that the small ones don't wait for it.

use std::future::Future;

use tokio::sync::mpsc;
use tokio::task::JoinSet;

const MAX_BATCH: usize = 256;
const MAX_BATCH_BYTES: usize = 8 * 1024 * 1024;
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
    let mut large = JoinSet::new();
    let mut waiting = Vec::with_capacity(MAX_BATCH);
    while incoming.recv_many(&mut waiting, MAX_BATCH).await > 0 {
        let mut batch = Vec::with_capacity(waiting.len());
        let mut bytes = 0;
        for item in waiting.drain(..) {
            let size = size(&item);
            if size > MAX_BATCH_BYTES {
                while large.len() >= MAX_LARGE {
                    large.join_next().await;
                }
                large.spawn(write(vec![item]));
                continue;
            }
            if bytes + size > MAX_BATCH_BYTES {
                write(std::mem::take(&mut batch)).await;
                bytes = 0;
            }
            bytes += size;
            batch.push(item);
        }
        if !batch.is_empty() {
            write(batch).await;
        }
        while large.try_join_next().is_some() {}
    }
    large.join_all().await;
}
