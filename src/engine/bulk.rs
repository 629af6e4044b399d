//! Persisting many requests, all or none.
//!
//! The caller's iterator may be long. Its requests are written in chunks, in one transaction, while
//! the next chunk is prepared.

use std::sync::Arc;

use tokio::sync::{Semaphore, mpsc, oneshot};

use super::Engine;
use super::attempt::Driver;
use super::meter::Tally;
use crate::error::{Error, Kind};
use crate::id::RequestId;
use crate::store::bulk::Chunk;

/// How many bulk inserts run at the same time: each holds a connection, perhaps while it waits for
/// a caller's ordering key.
pub(super) const BULK_INSERTS: usize = 2;

/// A transaction on the crate's own pool that takes chunks from any executor. Dropping it before
/// its commit rolls back.
pub(crate) struct BulkTransaction {
    /// `None` asks for the commit.
    chunks: mpsc::Sender<Option<Chunk>>,
    written: oneshot::Receiver<Result<Vec<RequestId>, Error>>,
}

impl Engine {
    pub(crate) fn begin_bulk(&self) -> BulkTransaction {
        // One chunk is written and one waits, so that neither side idles.
        let (chunks, incoming) = mpsc::channel(1);
        let (mut done, written) = oneshot::channel();
        let (driver, permits) = (Arc::clone(self.driver()), Arc::clone(&self.bulk_permits));
        self.driver().spawn(async move {
            let written = run(&driver, &permits, incoming, &mut done).await;
            let _ = done.send(written);
        });
        BulkTransaction { chunks, written }
    }
}

impl BulkTransaction {
    /// Returns once there is room for another chunk. `false` if the transaction has failed, for the
    /// reason that [`commit`](Self::commit) returns.
    pub(crate) async fn write(&self, chunk: Chunk) -> bool {
        self.chunks.send(Some(chunk)).await.is_ok()
    }

    pub(crate) async fn commit(self) -> Result<Vec<RequestId>, Error> {
        let _ = self.chunks.send(None).await;
        let written = self.written.await;
        // The engine's runtime ended before the answer, perhaps after the commit.
        written.unwrap_or_else(|_| Err(Error::new(Kind::Indeterminate(None))))
    }
}

async fn run(
    driver: &Driver,
    permits: &Semaphore,
    incoming: mpsc::Receiver<Option<Chunk>>,
    done: &mut oneshot::Sender<Result<Vec<RequestId>, Error>>,
) -> Result<Vec<RequestId>, Error> {
    tokio::select! {
        written = write(driver, permits, incoming) => written,
        // The caller was dropped, perhaps while this waits for a key. The transaction rolls back.
        () = done.closed() => Err(Error::new(Kind::Closed)),
    }
}

async fn write(
    driver: &Driver,
    permits: &Semaphore,
    mut incoming: mpsc::Receiver<Option<Chunk>>,
) -> Result<Vec<RequestId>, Error> {
    // Begun for the first chunk, and not before: the caller may be reading slow streams for it, and
    // Postgres ends a transaction that is idle for long.
    let mut next = incoming.recv().await;
    let _permit = permits.acquire().await;
    let mut bulk = driver.store.begin_bulk().await?;
    let mut ids = Vec::new();
    let mut written = Tally::default();
    while let Some(chunk) = next {
        let Some(chunk) = chunk else {
            bulk.commit().await?;
            driver.meter.enqueued_tally(written);
            return Ok(ids);
        };
        let mut of_chunk = bulk.write(&chunk).await?;
        driver.channels.note(chunk.channels());
        driver.meter.tally(&mut written, chunk.new_rows(&of_chunk));
        ids.append(&mut of_chunk);
        next = incoming.recv().await;
    }
    // The caller was dropped before it asked for the commit.
    Err(Error::new(Kind::Closed))
}
