//! Persisting many requests, all or none.
//!
//! The caller's iterator may be long: what it yields is written in chunks, in one transaction, while the next chunk is prepared.

use std::sync::Arc;

use sqlx::PgConnection;
use tokio::sync::{mpsc, oneshot};

use crate::engine::{Engine, Shared};
use crate::error::{Error, Kind};
use crate::id::RequestId;
use crate::store::enqueue::{self, Inserting, NewRequest};
use crate::store::{BoxFuture, DbError, bulk};

/// How many rows one statement has at most. More gain nothing and make the statement long.
const MAX_ROWS: usize = 1000;
const MAX_BYTES: usize = 4 * 1024 * 1024;

/// Rows for one statement: many without keys, or one with a key.
#[derive(Default)]
pub(crate) struct Chunk {
    rows: Vec<NewRequest>,
    bytes: usize,
}

impl Chunk {
    /// Adds a row. Returns what has to be written before it.
    pub(crate) fn push(&mut self, row: NewRequest) -> Option<Self> {
        let bytes = row.size();
        let alone = |row: &NewRequest| row.key.is_some() || row.supersede.is_some();
        let full = self.rows.len() >= MAX_ROWS
            || self.bytes + bytes > MAX_BYTES
            || alone(&row)
            || self.rows.last().is_some_and(alone);
        let before = (full && !self.rows.is_empty()).then(|| std::mem::take(self));
        self.bytes += bytes;
        self.rows.push(row);
        before
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }
}

/// How rows are written.
#[derive(Clone, Copy, Debug)]
pub(crate) struct How<'a> {
    pub(crate) schema: &'a str,
    pub(crate) inserting: Inserting,
}

/// Writes a chunk in the transaction that the connection is in. Returns the ids of its requests: the new ones, or those of earlier
/// ones that have their keys.
pub(crate) fn write<'c>(
    connection: &'c mut PgConnection,
    how: How<'c>,
    chunk: &'c Chunk,
) -> BoxFuture<'c, Result<Vec<RequestId>, Error>> {
    // Boxed, or the compiler can't see that it may go to another thread.
    Box::pin(async move {
        let rows = &chunk.rows;
        if let [row] = &**rows {
            let inserted = enqueue::insert_one(connection, how.schema, row, how.inserting).await?;
            return inserted.persisted(row.id).map(|id| vec![id]);
        }
        match bulk::insert_many(connection, how.schema, rows, how.inserting).await? {
            Some(_) => Err(Error::new(Kind::OrderConflict)),
            None => Ok(rows.iter().map(|row| row.id).collect()),
        }
    })
}

/// A transaction on the crate's own pool, to which chunks are handed from any executor. Dropped before it is committed, it leaves nothing
/// behind.
pub(crate) struct Transaction {
    chunks: mpsc::Sender<Option<Chunk>>,
    written: oneshot::Receiver<Result<Vec<RequestId>, Error>>,
}

impl Transaction {
    pub(crate) fn begin(engine: &Arc<Engine>) -> Self {
        // One is written and one waits, so that neither side idles.
        let (chunks, incoming) = mpsc::channel(1);
        let (mut done, written) = oneshot::channel();
        let engine = Arc::clone(engine);
        let home = Arc::clone(&engine);
        home.spawn(async move {
            // Those that wait for a caller's ordering key hold a connection.
            let _turn = engine.bulk_turns().acquire().await;
            let written = run(engine.shared(), incoming, &mut done).await;
            let _ = done.send(written);
        });
        Self { chunks, written }
    }

    /// Returns when there is room for another one. `false` if there is none to come, which [`commit`](Self::commit) says the reason of.
    pub(crate) async fn write(&self, chunk: Chunk) -> bool {
        self.chunks.send(Some(chunk)).await.is_ok()
    }

    pub(crate) async fn commit(self) -> Result<Vec<RequestId>, Error> {
        let _ = self.chunks.send(None).await;
        let written = self.written.await;
        // Lost on its way, perhaps after the commit: the engine's runtime has ended.
        written.unwrap_or_else(|_| Err(Error::new(Kind::Indeterminate(None))))
    }
}

type Done = oneshot::Sender<Result<Vec<RequestId>, Error>>;

async fn run(
    shared: &Shared,
    mut incoming: mpsc::Receiver<Option<Chunk>>,
    done: &mut Done,
) -> Result<Vec<RequestId>, Error> {
    shared.verify().await?;
    let mut turn = shared.db.acquire().await?;
    let written = tokio::select! {
        written = in_transaction(shared, &mut turn.connection, &mut incoming) => written,
        // The caller is gone, perhaps while this waits for a key.
        () = done.closed() => Err(Error::new(Kind::Closed)),
    };
    if written.is_err() {
        // Rolls back, in whatever state it is.
        drop(turn.connection.detach());
    }
    written
}

async fn in_transaction(
    shared: &Shared,
    connection: &mut PgConnection,
    incoming: &mut mpsc::Receiver<Option<Chunk>>,
) -> Result<Vec<RequestId>, Error> {
    let (db, config) = (&shared.db, &shared.config);
    let how = How {
        schema: &config.schema,
        inserting: config.inserting(),
    };
    db.within(0, bulk::begin(connection)).await?;
    let mut ids = Vec::new();
    while let Some(chunk) = incoming.recv().await {
        let Some(chunk) = chunk else {
            let committed = db.within(0, bulk::commit(connection)).await;
            return match committed.map_err(DbError::from) {
                Ok(()) => Ok(ids),
                Err(error) if error.unknown => {
                    Err(Error::new(Kind::Indeterminate(Some(error.error))))
                }
                Err(error) => Err(error.into()),
            };
        };
        let mut written = db
            .within(chunk.bytes, write(&mut *connection, how, &chunk))
            .await?;
        ids.append(&mut written);
    }
    // Without the word to commit.
    Err(Error::new(Kind::Closed))
}
