//! Group commit: one writer, and whatever piled up while it wrote.
//!
//! No timer, so no added latency: an idle lane writes at once, a busy one writes more at a time. Batches are capped by rows
//! and by bytes.

use std::future::Future;

use tokio::sync::mpsc;

const MAX_BATCH: usize = 256;
const MAX_BATCH_BYTES: usize = 8 * 1024 * 1024;

/// Hands what comes to `write`, a batch at a time, until the last sender is gone and everything is written.
pub(crate) async fn run<T, F>(
    mut incoming: mpsc::UnboundedReceiver<T>,
    size: impl Fn(&T) -> usize,
    write: impl Fn(Vec<T>) -> F,
) where
    F: Future<Output = ()>,
{
    let mut waiting = Vec::with_capacity(MAX_BATCH);
    while incoming.recv_many(&mut waiting, MAX_BATCH).await > 0 {
        let mut batch = std::mem::take(&mut waiting);
        while !batch.is_empty() {
            let mut bytes = 0;
            let fits = batch.iter().take_while(|item| {
                bytes += size(item);
                bytes <= MAX_BATCH_BYTES
            });
            // One that is over the limit by itself goes alone.
            let count = fits.count().max(1);
            let rest = batch.split_off(count);
            write(batch).await;
            batch = rest;
        }
    }
}
